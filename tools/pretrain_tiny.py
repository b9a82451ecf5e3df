"""Trains tiny_clip.safetensors, the model behind `--model tiny`, from scratch on EuroSAT.

    OMP_NUM_THREADS=2 python -m tools.pretrain_tiny --data-dir DIR     13 minutes on two CPU cores

DIR is as for make_demo.py. Only the train part of CoOp's split is used, with its clean look; the
demo's images come from the other two parts and look different. Every epoch gives each image a new
caption, from the bare class prompt to a sentence with all that was measured in the image, so the
model answers to prompts and to descriptions. This is the plainest program that does the job; once
train_contrastive.py can read the same captions it takes over.

The loss is InfoNCE in both directions. Ten classes in a batch of 256 mean that the caption of one
image is often true of others too. Pushing those apart would teach what is wrong, and which pairs
they are is known here, since captions are made from facts: they are taken out of the denominator.

The shipped weights reach 82 % zero-shot accuracy on clean images of the val part. Other versions of
torch, other processors and other thread counts round differently and give a model as good, but not
the same bytes.
"""
import argparse
import io
import json
import math
import pathlib
import random
import time
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from clip_model import CLIP, CONFIGS
from data import normalise
from tokenizer import BPETokenizer
from tools.make_demo import FRAMES, PHRASES, SUBJECTS, caption, facts, measure, thresholds
from weights import save

ASSETS = pathlib.Path(__file__).resolve().parent.parent / "assets"
# Prompts with nothing but the class name; the first one is CLIPFit's for EuroSAT.
PROMPTS = ("a centered satellite photo of {}.", "a centered satellite photo of {}.", "{}",
           "a photo of a {}.", "a photo of {}.", "a satellite photo of {}.",
           "a satellite image of {}.", "an aerial photo of {}.", "an image of {}.",
           "a picture of {}.", "a blurry photo of {}.", "this is {}.")
# Words that other captions and prompts may use. Never trained here, but kept, so that they stay
# distinct: `load` makes zeros of the rows that the file leaves out.
MORE_WORDS = """the of and or to in on at with without from by for near between under over
    through across around along is are was it its this that these those there some many few several
    one two three four five no not very more most less all each other same different new old large
    small big tiny huge long short wide narrow high low deep flat round square straight curved open
    closed empty full dense sparse clear cloudy hazy foggy sunny wet dry warm cold dirty clean sharp
    noisy grainy dull pale vivid red orange yellow green blue purple pink brown black white grey
    gray color colour colorful texture pattern patch strip stripe grid line edge center corner
    middle top bottom left right upper lower north south east west half quarter part side scene view
    image picture photo photograph satellite aerial sensor drone map landscape close cropped
    resolution bad good type kind flower food pet aircraft person doing art drawing sketch painting
    water ocean coast beach shore island bay harbor harbour ship boat bridge dam pond stream creek
    canal wave ice snow mountain hill valley desert sand rock soil mud earth land field farm
    farmland crop wheat corn rice grass meadow tree trees bush shrub wood woods forest jungle park
    garden orchard vineyard plant leaf leaves city town village suburb street road highway motorway
    lane crossing junction roundabout railway train station airport runway car truck parking lot
    building house home roof roofs tower school church factory warehouse tank port yard stadium pool
    fence wall sky cloud shadow light dark bright night day summer winter spring autumn season dog
    cat bird horse cow sheep man woman child people circle triangle star cross ring
    shape !""".split()


def read_images(folder, count, seed, part):
    """A seeded sample of a split part: uint8 (M, 3, 64, 64), and M class names."""
    entries = json.loads((folder / "split_zhou_EuroSAT.json").read_text())[part]
    entries = random.Random(seed).sample(entries, min(count, len(entries)))
    pixels = np.empty((len(entries), 64, 64, 3), np.uint8)
    with zipfile.ZipFile(folder / "EuroSAT_RGB_2750.zip") as archive:
        for row, (path, _, _) in zip(pixels, entries):
            row[:] = Image.open(io.BytesIO(archive.read(f"2750/{path}"))).convert("RGB")
    return pixels, [name for _, _, name in entries]


def augment(pixels, generator, jitter):
    """uint8 (B, 3, S, S) -> float (B, 3, S, S): crop, flip, quarter turn, a little brightness.

    From above there is no up, so turns are free. A crop keeps at least 40 % of the area. Colour
    tells crops from forest and is left nearly alone; it is also what the demo's look changes.
    `jitter` bounds the random gain, half of it per channel.
    """
    B = len(pixels)

    def draw(low, high, *shape):
        return low + (high - low) * torch.rand(B, *shape, generator=generator)
    scale = draw(0.4, 1) ** 0.5
    angle = torch.randint(4, (B,), generator=generator) * (math.pi / 2)
    mirror = torch.randint(2, (B,), generator=generator) * 2 - 1
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift = (1 - scale)[:, None] * draw(-1, 1, 2)
    theta = torch.stack([torch.stack([cos * mirror, -sin, shift[:, 0]], 1),
                         torch.stack([sin * mirror, cos, shift[:, 1]], 1)], 1)   # (B, 2, 3)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    x = F.grid_sample(pixels.float(), grid, padding_mode="reflection", align_corners=False)
    return (x * draw(1 - jitter, 1 + jitter, 1, 1, 1)
            * draw(1 - jitter / 2, 1 + jitter / 2, 3, 1, 1)).clamp(0, 255)


def say(label, known, rng):
    """-> (text, facts said): a prompt, or a sentence that says some of what is known."""
    if rng.random() < 0.5:
        return rng.choice(PROMPTS).format(label), ()
    said = [fact for fact in known if rng.random() < 0.7]
    return caption(label, said, rng), said


def as_bits(facts_of_images):
    """Facts as bits of an integer, so that whole batches compare at once: LongTensor (M,)."""
    bit = {fact: 1 << i for i, fact in enumerate(PHRASES)}
    return torch.tensor([sum(bit[fact] for fact in said) for said in facts_of_images])


def info_nce(images, texts, scale, true_of):
    """InfoNCE over unit rows (B, D); `true_of` (B, B) says that text j is true of image i."""
    also_true = true_of & ~torch.eye(len(images), dtype=torch.bool)
    logits = (scale * images @ texts.t()).masked_fill(also_true, -torch.inf)
    target = torch.arange(len(images))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


@torch.no_grad()
def accuracy(model, tokenizer, pixels, labels):
    """Zero-shot accuracy in per cent with CLIPFit's prompt."""
    prompts = model.encode_text(tokenizer([PROMPTS[0].format(c) for c in SUBJECTS]), True)
    scores = torch.cat([model.encode_image(normalise(part), True) @ prompts.t()
                        for part in torch.from_numpy(pixels).permute(0, 3, 1, 2).split(256)])
    truth = torch.tensor([list(SUBJECTS).index(label) for label in labels])
    return 100 * (scores.argmax(1) == truth).double().mean().item()


def rows_in_use(tokenizer):
    """Vocabulary rows to save: every word that training, the demo or MORE_WORDS can use."""
    words = [*MORE_WORDS, *FRAMES, *PROMPTS, *SUBJECTS]
    for group in (*SUBJECTS.values(), *PHRASES.values()):
        words += group
    text = " ".join(words).replace("{}", " ")
    single = range(512)  # the bytes, with and without an end of word: letters, digits, signs
    return torch.tensor(sorted({*single, *tokenizer.encode(text), tokenizer.start_id,
                                tokenizer.end_id}))


def train(args):
    """Trains and saves; prints the zero-shot accuracy after every epoch."""
    torch.manual_seed(args.seed)
    rng, generator = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    folder, tokenizer, model = pathlib.Path(args.data_dir), BPETokenizer(), CLIP(CONFIGS["tiny"])
    pixels, labels = read_images(folder, args.images, args.seed, "train")
    val_pixels, val_labels = read_images(folder, 2000, args.seed, "val")
    limits = thresholds(measure(pixels))
    label_ids = torch.tensor([list(SUBJECTS).index(label) for label in labels])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    # Decay on matrices only; on embeddings it would wash out the words that no caption has.
    matrices = [p for n, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim < 2 or "embedding" in n]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1},
                                   {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98))
    B, started = args.batch_size, time.time()
    per_epoch = len(images) // B
    steps = args.epochs * per_epoch
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(images), generator=generator)
        rows = order[step % per_epoch * B:][:B]
        x = augment(images[rows], generator, args.jitter)
        # Measured after augmentation, which turns, crops and tints: captions stay true.
        known = facts(measure(x.permute(0, 2, 3, 1).numpy()), limits)
        texts, said = zip(*(say(labels[i], true, rng) for i, true in zip(rows.tolist(), known)))
        true_of = ((label_ids[rows][:, None] == label_ids[rows])
                   & (as_bits(said) & ~as_bits(known)[:, None] == 0))                # (B, B)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / 100,
                                        (1 + math.cos(math.pi * step / steps)) / 2)
        image_features, text_features, scale = model(normalise(x), tokenizer(texts))
        loss = info_nce(image_features, text_features, scale, true_of)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if (step + 1) % per_epoch == 0:
            print(f"epoch {(step + 1) // per_epoch}  loss {loss.item():.3f}  scale "
                  f"{scale.item():.1f}  zero-shot on clean val "
                  f"{accuracy(model, tokenizer, val_pixels, val_labels):.1f} %  "
                  f"{time.time() - started:.0f} s", flush=True)
    save(model, args.output, dtype=torch.float16, token_rows=rows_in_use(tokenizer))
    print(f"wrote {args.output}")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data-dir", required=True, help="folder with EuroSAT's zip and split file")
    add("--output", default=str(ASSETS / "tiny_clip.safetensors"), help="file to write")
    add("--epochs", type=int, default=10, help="passes over the images")
    add("--images", type=int, default=13_500, help="training images; 13,500 is all")
    add("--batch-size", type=int, default=256, help="images per step")
    add("--lr", type=float, default=1e-3, help="peak learning rate")
    add("--jitter", type=float, default=0.1, help="random gain: 0.1 is up to 10 %% brightness")
    add("--seed", type=int, default=0, help="of weights, order, captions and augmentation")
    return parser.parse_args(argv)


if __name__ == "__main__":
    train(get_args())
