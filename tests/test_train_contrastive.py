"""The contrastive script: its losses, the exact step, the recipe, retrieval, resuming, learning."""
import csv
import dataclasses
import itertools
import json
import math
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import clip_model
import train_contrastive
from clip_model import BERTS, bert_fields, CLIP, CONFIGS, unit
from data import batch_losses, open_pairs, PairBatches, row_error
from device import start
from tokenizer import WordPieceTokenizer
from train_contrastive import (add_gradient, criterion, decay_groups, freeze, get_args, Gradients,
                               main, plain_loss, rate, Sides)

ROOT = pathlib.Path(__file__).resolve().parent.parent
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230),
           "yellow": (235, 215, 60), "white": (240, 240, 240), "black": (15, 15, 15)}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {"left": (1, 10), "right": (19, 10), "top": (10, 1), "bottom": (10, 19)}
WORDS = [*"[PAD] [UNK] [CLS] [SEP] a at the one : ,".split(), *COLOURS, *SHAPES, *PLACES]


def draw(colour, shape, place, stream):
    """A 32 x 32 picture of one shape."""
    picture = Image.new("RGB", (32, 32), tuple(stream.randrange(90, 150) for _ in range(3)))
    x, y = PLACES[place]
    pen, fill = ImageDraw.Draw(picture), COLOURS[colour]
    if shape == "cross":
        pen.rectangle((x + 4, y, x + 7, y + 11), fill=fill)
        pen.rectangle((x, y + 4, x + 11, y + 7), fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, y + 11), (x + 11, y + 11), (x + 5, y)], fill=fill)
    else:
        (pen.ellipse if shape == "circle" else pen.rectangle)((x, y, x + 11, y + 11), fill=fill)
    return picture


def scenes(folder, train, val=0, captions=2):
    """`train` drawn images of random kinds and `val` of kinds that differ (96 at most), with a
    table that gives each two sentences, or none; and the vocabulary of these. -> the folder"""
    folder.mkdir(parents=True)
    stream = random.Random(0)
    kinds = list(itertools.product(COLOURS, SHAPES, PLACES))
    chosen = [stream.choice(kinds) for _ in range(train)] + stream.sample(kinds, val)
    with open(folder / "pairs.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(("image", "caption", "split"))
        for i, (colour, shape, place) in enumerate(chosen):
            draw(colour, shape, place, stream).save(folder / f"{i}.png")
            for words in (f"a {colour} {shape} at the {place}", f"{place}: one {shape}, {colour}"):
                out.writerow((f"{i}.png", words if captions else "",
                              "train" if i < train else "val"))
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    return folder


def tiny_flags(folder, *more):
    """A run of 0.8 M weights with dropout in its text tower: 24 images in batches of 8. A flag in
    `more` takes the place of its default."""
    flags = [("--data", folder), ("--image-tower", "tiny-vit:none"),
             ("--text-tower", "tiny-bert:none"), ("--tokenizer", folder / "vocab.txt"),
             ("--embed-dim", 16), ("--batch-size", 8), ("--micro-batch", 3), ("--crop", 0.9),
             ("--epochs", 2), ("--workers", 0), ("--device", "cpu"), ("--log-every", 1)]
    return [str(word) for flag, value in flags if flag not in more for word in (flag, value)
            ] + [str(word) for word in more]


def run_main(*flags):
    return main(get_args([str(flag) for flag in flags]))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return scenes(tmp_path_factory.mktemp("scenes") / "pairs", 24, 12)


def options(**changes):
    """The method's flags, with plain defaults."""
    return types.SimpleNamespace(**{
        "loss": "infonce", "positives": "mask", "triplet": "hardest", "triplet_weight": 0.3,
        "margin": 0.2, "tile": 1024, "loss_precision": "fp32", "micro_batch": 0,
        "local_negatives": False, **changes})


# -----------------------------------------------------------------------------
# The losses, tile by tile, against their definitions written out

LOSSES = [("infonce", "hardest"), ("siglip", "hardest"), ("triplet", "sum"),
          ("triplet", "hardest"), ("triplet", "semi-hard"), ("infonce+triplet", "hardest")]
POSITIVES = ["diag", "mask", "multi"]


def embeddings(n, dim=7, dtype=torch.float64, seed=0):
    """Unit rows of images and texts, and (n, 2) ids with partners in either column."""
    generator = torch.Generator().manual_seed(seed)
    image, text = (unit(torch.randn(n, dim, dtype=torch.float64, generator=generator))
                   for _ in range(2))
    text = unit(text + 0.7 * image)  # so that pairs are near, and semi-hard negatives exist
    ids = torch.stack([torch.arange(n), torch.arange(n) + 100], dim=1)
    for i, j, column in ((0, 3, 0), (3, n - 1, 1), (1, 2, 1), (4, 5, 0)):
        if max(i, j) < n:
            ids[j, column] = ids[i, column]
    return image.to(dtype), text.to(dtype), ids


def defined_loss(image, text, ids, scale, bias, args):
    """The loss by its definition: one anchor and one candidate at a time."""
    n = len(image)
    partners = [[j for j in range(n) if args.positives != "diag" and bool((ids[i] == ids[j]).any())
                 and j != i] for i in range(n)]
    total = 0.0
    for ours, theirs in ((image, text), (text, image)):
        for i in range(n):
            cosine = [ours[i] @ theirs[j] for j in range(n)]
            rest = [j for j in range(n) if j != i and j not in partners[i]]
            if "infonce" in args.loss:
                counted = [i, *rest] if args.positives != "multi" else range(n)
                norm = torch.stack([scale * cosine[j] for j in counted]).logsumexp(dim=0)
                goals = [i, *partners[i]] if args.positives == "multi" else [i]
                total = total + sum(norm - scale * cosine[j] for j in goals) / len(goals) / (2 * n)
            if "triplet" in args.loss:
                hinges = [args.margin + cosine[j] - cosine[i] for j in rest
                          if args.triplet != "semi-hard" or cosine[j] < cosine[i]]
                if args.triplet != "sum" and hinges:
                    hinges = [max(hinges)]
                weight = args.triplet_weight if args.loss == "infonce+triplet" else 1.0
                total = total + weight * sum((h for h in hinges if h > 0), 0 * scale) / n
            if args.loss == "siglip" and ours is image:
                goals = [i, *partners[i]] if args.positives == "multi" else [i]
                for j in range(n):
                    if j in goals:
                        total = total - F.logsigmoid(scale * cosine[j] + bias) / n
                    elif j in rest:
                        total = total - F.logsigmoid(-scale * cosine[j] - bias) / n
    return total


def with_gradients(loss, image, text, ids, scale, bias, args):
    leaves = [x.clone().requires_grad_() for x in (image, text, scale, bias)]
    value = loss(leaves[0], leaves[1], ids, leaves[2], leaves[3], args)
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return Gradients(value.detach(), *(torch.zeros_like(leaf) if g is None else g
                                       for leaf, g in zip(leaves, grads)))


def tiled(image, text, ids, scale, bias, args):
    ids = None if args.positives == "diag" else ids
    return criterion(Sides(image, text, ids, 0, None), scale, bias, args)[0]


def largest_error(one, other):
    return max(float((torch.as_tensor(a) - torch.as_tensor(b)).abs().max())
               for a, b in zip(one, other))


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("loss, kind", LOSSES)
def test_tiles_give_the_loss_and_the_gradients_of_the_definition(loss, kind, positives):
    """N = 13, tiles of 1, 5 (which does not divide it) and all; `plain_loss` is held to it too."""
    image, text, ids = embeddings(13)
    args = options(loss=loss, triplet=kind, positives=positives)
    where = image, text, ids, torch.tensor(9.0, dtype=torch.float64), torch.tensor(
        -3.0, dtype=torch.float64), args
    truth = with_gradients(defined_loss, *where)
    assert truth.loss > 0.01 and truth.image.abs().max() > 1e-3
    assert largest_error(with_gradients(plain_loss, *where), truth) < 1e-12
    for tile in (1, 5, 64):
        args.tile = tile
        assert largest_error(tiled(*where), truth) < 1e-12, tile


def test_partners_change_every_loss():
    """Otherwise the comparisons above could not tell the ways to treat them apart."""
    image, text, ids = embeddings(13)
    for loss, kind in LOSSES[:4]:
        values = {p: float(tiled(image, text, ids, torch.tensor(9.0), torch.tensor(-3.0), options(
            loss=loss, triplet=kind, positives=p)).loss) for p in POSITIVES}
        assert values["diag"] != values["mask"], loss
        assert (values["mask"] != values["multi"]) == (loss != "triplet"), loss


@pytest.mark.parametrize("loss, kind", LOSSES)
def test_gradients_are_the_slopes_of_the_loss(loss, kind):
    """Central differences along random directions; N = 6."""
    image, text, ids = embeddings(6, seed=3)
    args = options(loss=loss, triplet=kind, positives="multi", tile=4)
    point = [image, text, torch.tensor(9.0, dtype=torch.float64),
             torch.tensor(-3.0, dtype=torch.float64)]
    found = tiled(image, text, ids, *point[2:], args)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        way = [torch.randn(x.shape, dtype=torch.float64, generator=generator) for x in point]
        ends = []
        for h in (1e-5, -1e-5):
            moved = [x + h * d for x, d in zip(point, way)]
            ends.append(tiled(moved[0], moved[1], ids, *moved[2:], args).loss)
        slope = sum((torch.as_tensor(g) * d).sum() for g, d in zip(found[1:], way))
        assert float((ends[0] - ends[1]) / 2e-5) == pytest.approx(float(slope), abs=1e-7)


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_the_losses_equal_open_clips(loss):
    theirs = pytest.importorskip("open_clip.loss")
    image, text, ids = embeddings(12)
    scale, bias = (torch.tensor(x, dtype=torch.float64) for x in (14.0, -10.0))

    def reference(image, text, ids, scale, bias, args):
        if loss == "siglip":
            return theirs.SigLipLoss()(image, text, scale, bias)
        return theirs.ClipLoss()(image, text, scale)
    where = image, text, ids, scale, bias, options(loss=loss, positives="diag", tile=5)
    assert largest_error(tiled(*where), with_gradients(reference, *where)) < 1e-12


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_bf16_tiles_stay_within_two_percent_of_the_gradient(loss):
    image, text, ids = embeddings(96, dim=64, dtype=torch.float32)
    where = [image, text, ids, torch.tensor(14.0), torch.tensor(-10.0), options(loss=loss, tile=40)]
    exact = tiled(*where)
    where[-1] = options(loss=loss, tile=40, loss_precision="bf16")
    rough = tiled(*where)
    assert rough.image.dtype == rough.loss.dtype == torch.float32
    assert float(rough.loss) == pytest.approx(float(exact.loss), rel=1e-2)
    for ours, theirs in zip(rough[1:3], exact[1:3]):
        error = float((ours - theirs).norm() / theirs.norm())
        assert 1e-4 < error < 0.02


def test_a_batch_whose_captions_are_all_equal_has_no_negatives():
    """Every pair belongs to every other: nothing to contrast, and nothing that is no number."""
    image, text, _ = embeddings(5)
    ids = torch.stack([torch.arange(5), torch.zeros(5, dtype=torch.long)], dim=1)
    scale, bias = torch.tensor(9.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    for loss, kind in [("infonce", "hardest")] + LOSSES[2:5]:
        found = tiled(image, text, ids, scale, bias, options(loss=loss, triplet=kind, tile=2))
        assert abs(float(found.loss)) < 1e-12
        assert found.image.abs().max() < 1e-12 and found.text.abs().max() < 1e-12


# Loss and gradients of 8,192 pairs, and by how many MB the peak of the process grew meanwhile: one
# N x N matrix of fp32 is 256 MB. The limit leaves room for one, autograd needs several.
MEMORY = '''
import resource
import torch
import test_train_contrastive as t
torch.manual_seed(0)
image, text = (t.unit(torch.randn(8192, 32)) for _ in range(2))
ids, where = torch.arange(8192)[:, None], (torch.tensor(9.0), torch.tensor(0.0), t.options())
t.tiled(image[:64], text[:64], ids[:64], *where)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 450 * 2 ** 20,) * 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(float(t.tiled(image, text, ids, *where).loss))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
try:
    t.with_gradients(t.plain_loss, image, text, ids, *where)
except (MemoryError, RuntimeError) as error:
    print("refused", "memory" in str(error))
'''


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and limits the address space")
def test_the_loss_of_8192_pairs_needs_a_few_tiles_where_the_matrix_does_not_fit():
    done = subprocess.run([sys.executable, "-c", MEMORY], text=True, capture_output=True,
                          cwd=pathlib.Path(__file__).parent, timeout=120)
    assert done.returncode == 0, done.stderr
    loss, grown, refused = done.stdout.splitlines()
    assert float(loss) > 8 and float(grown) < 100 and refused == "refused True"


# -----------------------------------------------------------------------------
# The exact step

def model_of(dtype, dropout=0.0, **changes):
    """A random CLIP with a BERT of 30 words, whose scalars are not at their start."""
    text = dataclasses.replace(BERTS["tiny-bert"], vocab_size=30, dropout=dropout,
                               attention_dropout=dropout)
    torch.manual_seed(0)
    model = CLIP(dataclasses.replace(CONFIGS["tiny-vit"], **bert_fields(text), **changes))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    model.logit_bias = torch.nn.Parameter(torch.tensor(-2.0))
    return model.to(dtype).train()


def batch_of(n, dtype, size=32, seed=2):
    """Images, tokens of 3 to 9 words with their padding, ids with partners."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, size, size, generator=generator).to(dtype)
    tokens = torch.randint(4, 30, (n, 12), generator=generator)
    lengths = torch.randint(3, 10, (n,), generator=generator)
    tokens[torch.arange(12) >= lengths[:, None]] = 0
    return images, tokens, embeddings(n)[2]


def step_gradient(model, images, tokens, ids, args, run=None, scaler=None, seed=5):
    """(losses, {name: gradient}) of the script's own step."""
    run = run or start("cpu", "fp32")
    model.zero_grad(set_to_none=True)
    losses = add_gradient(run, model, images, tokens, ids, [len(images)], args,
                          scaler or run.scaler(), seed)
    return losses, {name: p.grad.clone() for name, p in model.named_parameters()
                    if p.grad is not None}


def whole_gradient(model, images, tokens, ids, args):
    """The same by plain autograd: both towers on the whole batch, then the loss as defined."""
    model.zero_grad(set_to_none=True)
    image, text, scale = model(images, tokens)
    loss = defined_loss(image, text, ids, scale, model.logit_bias, args)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()
                           if p.grad is not None}


def relative_error(ours, theirs):
    assert set(ours) >= set(theirs)
    scale = max(g.abs().max() for g in theirs.values())
    return float(max((ours[name] - theirs[name]).abs().max() for name in theirs) / scale)


@pytest.mark.parametrize("loss", ["infonce", "siglip", "infonce+triplet"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_pieces_give_the_gradient_of_the_whole_batch(loss, dtype, tolerance):
    """11 pairs in pieces of 1, of 7 and 4, and in one; every parameter, the scale and bias too."""
    model, batch = model_of(dtype), batch_of(11, dtype)
    args = options(loss=loss, tile=4)
    value, theirs = whole_gradient(model, *batch, args)
    assert theirs["logit_scale"].abs() > 1e-3 and ("logit_bias" in theirs) == (loss == "siglip")
    for args.micro_batch in (1, 7, 11, 0):
        losses, ours = step_gradient(model, *batch, args)
        assert abs(losses["loss"] - value) < 10 * tolerance
        assert relative_error(ours, theirs) < tolerance, args.micro_batch


def dropped_out(model, batch, args):
    """The gradient by plain autograd through all pieces at once, each with its own dropout."""
    run = start("cpu", "fp32")
    encoder = train_contrastive.Encoder(run, model, 5)
    images, texts, places = train_contrastive.pieces(*batch[:2], args.micro_batch, model.pad_id)
    model.zero_grad(set_to_none=True)
    image = torch.cat([encoder.one("image", i, piece) for i, piece in enumerate(images)])
    text = torch.cat([encoder.one("text", i, piece) for i, piece in enumerate(texts)])[places]
    defined_loss(image, text, batch[2], model.logit_scale.exp(), model.logit_bias, args).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("micro", [1, 7, 0])
def test_dropout_is_the_same_in_both_passes(dtype, tolerance, micro):
    model, batch = model_of(dtype, dropout=0.3), batch_of(11, dtype)
    args = options(micro_batch=micro, tile=4)
    theirs = dropped_out(model, batch, args)
    assert relative_error(step_gradient(model, *batch, args)[1], theirs) < tolerance
    other = step_gradient(model, *batch, args, seed=6)[1]
    assert relative_error(other, theirs) > 1e-3  # another step drops others


def test_without_the_replayed_seed_the_gradient_is_another(monkeypatch):
    model, batch = model_of(torch.float64, dropout=0.3), batch_of(11, torch.float64)
    args = options(micro_batch=3)
    theirs = dropped_out(model, batch, args)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    assert relative_error(step_gradient(model, *batch, args)[1], theirs) > 1e-2


def test_the_largest_seed_still_seeds_dropout():
    model, batch = model_of(torch.float64, dropout=0.3), batch_of(4, torch.float64)
    args, largest = options(micro_batch=2), (2 ** 32 - 1) * 1_000_003
    found = [step_gradient(model, *batch, args, seed=largest + i)[1]["visual.proj"]
             for i in (0, 0, 1)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("frozen", ["image", "text", ""])
def test_a_frozen_tower_is_encoded_once_and_the_other_but_for_a_piece_twice(frozen):
    model, batch = model_of(torch.float64), batch_of(11, torch.float64)
    for name, p in model.named_parameters():
        if frozen and name.startswith("visual.") == (frozen == "image"):
            p.requires_grad_(name.startswith("logit"))
    calls = {"image": 0, "text": 0}
    for side in calls:
        def counted(*args, _side=side, _encode=getattr(model, f"encode_{side}"), **kwargs):
            calls[_side] += 1
            return _encode(*args, **kwargs)
        setattr(model, f"encode_{side}", counted)
    step_gradient(model, *batch, options(micro_batch=4))
    assert calls == {side: 3 if side == frozen else 5 for side in calls}


def test_a_gradient_scaler_scales_everything_alike():
    model, batch = model_of(torch.float32), batch_of(7, torch.float32)
    args = options(loss="siglip", micro_batch=3)
    losses, plain = step_gradient(model, *batch, args)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 16)
    again, scaled = step_gradient(model, *batch, args, scaler=scaler)
    assert again["loss"] == losses["loss"]
    for name, gradient in plain.items():
        assert torch.allclose(scaled[name] / 2 ** 16, gradient, rtol=1e-6, atol=0), name


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_under_autocast_the_loss_stays_in_fp32(precision, monkeypatch):
    seen = []

    def watched(sides, scale, bias, args):
        found = criterion(sides, scale, bias, args)
        seen.extend([sides.image.dtype, sides.text.dtype, scale.dtype, found[0].loss.dtype,
                     found[0].image.dtype])
        return found
    monkeypatch.setattr(train_contrastive, "criterion", watched)
    model, batch = model_of(torch.float32), batch_of(7, torch.float32)
    exact = step_gradient(model, *batch, options(micro_batch=3))
    low = start("cpu", precision)
    rough = step_gradient(model, *batch, options(micro_batch=3), low, low.scaler(False))
    assert set(seen) == {torch.float32} and len(seen) == 10
    assert 0 < abs(rough[0]["loss"] - exact[0]["loss"]) < 0.05
    assert 1e-4 < relative_error(rough[1], exact[1]) < 0.1


def test_gradients_add_up_over_calls():
    model, batch = model_of(torch.float64), batch_of(6, torch.float64)
    once = step_gradient(model, *batch, options())[1]
    add_gradient(start("cpu", "fp32"), model, *batch, [6], options(), torch.amp.GradScaler(
        enabled=False), 5)
    for name, p in model.named_parameters():
        if name in once:
            assert torch.allclose(p.grad, 2 * once[name], rtol=1e-12, atol=1e-15), name


def test_batch_norm_counts_each_piece_once_and_frozen_it_is_exact():
    torch.manual_seed(0)
    model = CLIP(dataclasses.replace(CONFIGS["tiny-rn"], image_size=32, vocab_size=30))
    images, _, ids = batch_of(6, torch.float32)
    tokens = torch.tensor([[5, 6, 7 + i, 29] for i in range(6)])
    args = options(micro_batch=4, bn="chunk")
    assert not train_contrastive.training_mode(model, args, True)
    step_gradient(model, images, tokens, ids, args)
    moved = model.visual.bn1.running_mean.clone()
    first, mean = F.conv2d(images, model.visual.conv1.weight, stride=2, padding=1), 0.0
    for part in reversed(first.split(4)):  # the last piece is kept from the first pass
        mean = 0.9 * mean + 0.1 * part.mean(dim=(0, 2, 3))
    assert torch.allclose(moved, mean, atol=1e-5)
    args.bn = "auto"
    assert train_contrastive.training_mode(model, args, True)
    theirs = step_gradient(model, images, tokens, ids, options())[1]
    ours = step_gradient(model, images, tokens, ids, args)[1]
    assert relative_error(ours, theirs) < 1e-5
    assert torch.equal(model.visual.bn1.running_mean, moved)


def test_frozen_statistics_stay_so_after_an_evaluation(pairs, tmp_path):
    result = run_main(*tiny_flags(pairs, "--image-tower", "tiny-rn:none", "--bn", "freeze",
                                  "--output-dir", tmp_path))
    held = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)
    means = [tensor for name, tensor in held["buffers"].items() if "running_mean" in name]
    assert result["epochs"] == 2 and means and not any(mean.any() for mean in means)


# -----------------------------------------------------------------------------
# The recipe

def test_weight_decay_spares_vectors_and_embeddings_and_towers_have_their_rates():
    model = model_of(torch.float32, proj="mlp")
    args = types.SimpleNamespace(lr=1.0, image_lr=2.0, text_lr=3.0, wd=0.5, tower_wd=0.25)
    found = {}
    for group in decay_groups(model, args):
        assert group["lr"] == group["base_lr"]
        for p in group["params"]:
            name = next(n for n, q in model.named_parameters() if q is p)
            assert name not in found
            found[name] = group["lr"], group["weight_decay"]
    assert set(found) == {name for name, _ in model.named_parameters()}
    for name, p in model.named_parameters():
        head = name.startswith(("visual.proj.", "text_projection.", "logit_"))
        lr = 1.0 if head else 2.0 if name.startswith("visual.") else 3.0
        table = p.ndim < 2 or "embedding" in name
        assert found[name] == (lr, 0.0 if table else 0.5 if head else 0.25), name
    for name in ("visual.positional_embedding", "bert.embeddings.word_embeddings.weight",
                 "logit_scale", "visual.ln_pre.weight", "visual.conv1.weight"):
        assert (found[name][1] == 0) == (name != "visual.conv1.weight"), name
    args = types.SimpleNamespace(lr=1.0, image_lr=None, text_lr=None, wd=0.5, tower_wd=None)
    assert {(g["lr"], g["weight_decay"]) for g in decay_groups(model, args)} == {(1, 0), (1, 0.5)}
    for p in model.visual.parameters():
        p.requires_grad_(False)
    assert sum(len(g["params"]) for g in decay_groups(model, args)) == sum(
        not name.startswith("visual.") for name in found)


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("schedule, middle, last", [
    ("cosine", 0.5, lambda n: 0.5 * (1 + math.cos(math.pi * (n - 1) / n))),
    ("linear", 0.5, lambda n: 1 / n), ("constant", 1, lambda n: 1), ("plateau", 1, lambda n: 1)])
def test_rates_equal_their_closed_forms(warmup, schedule, middle, last):
    steps = 25
    rates = [rate(step, steps, warmup, schedule) for step in range(steps)]
    if warmup:
        assert rates[0] == 1 / warmup and rates[warmup - 1] == 1
    assert rates[warmup] == 1 and max(rates) == 1
    assert rates[-1] == pytest.approx(last(steps - warmup), abs=1e-12)
    if (steps - warmup) % 2 == 0:
        assert rates[warmup + (steps - warmup) // 2] == pytest.approx(middle)


def metrics(folder, split="train"):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == split]


def test_the_rates_of_a_run_follow_the_schedule_and_never_exceed_the_peak(pairs, tmp_path):
    """Six steps; 40 % of them, 2.4, are a warm-up of two."""
    run_main(*tiny_flags(pairs, "--warmup", 0.4, "--lr", 1e-3, "--output-dir", tmp_path))
    cosine = [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    assert [row["lr"] for row in metrics(tmp_path)] == pytest.approx(
        [1e-3 * x for x in (0.5, 1, *cosine)])


def test_a_plateau_slows_the_rates_as_reduce_lr_on_plateau(pairs, tmp_path):
    run_main(*tiny_flags(pairs, "--preset", "simple-clip", "--epochs", 12, "--lr", 0.1, "--text-lr",
                         0.1, "--image-lr", 0.1, "--captions", "one", "--output-dir", tmp_path))
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.8, patience=1,
                                                        threshold=0)
    wanted = []
    for row in metrics(tmp_path, "val"):
        wanted += 3 * [optimizer.param_groups[0]["lr"]]
        theirs.step(row["loss"])
    assert len(wanted) == 36 and wanted[-1] < 0.1
    assert [row["lr"] for row in metrics(tmp_path)] == pytest.approx(wanted)


@pytest.mark.parametrize("way, end", [(-1.0, 100.0), (1.0, 1.0)])
def test_the_scale_stays_between_1_and_100_after_every_step(pairs, tmp_path, monkeypatch, way, end):
    def pushed(run, model, *rest):
        losses = add_gradient(run, model, *rest)
        model.logit_scale.grad.fill_(way)
        return losses
    monkeypatch.setattr(train_contrastive, "add_gradient", pushed)
    result = run_main(*tiny_flags(pairs, "--lr", 0.9, "--warmup", 0, "--schedule", "constant",
                                  "--output-dir", tmp_path))
    scales = [row["scale"] for row in metrics(tmp_path)]
    assert all(1 <= scale < 100.0001 for scale in scales) and len(set(scales)) > 2
    assert scales[-1] == pytest.approx(end) and math.isfinite(result["scale"])


def test_averaged_weights_follow_their_closed_form_and_are_what_is_scored(
        pairs, tmp_path, monkeypatch):
    past, average = [], train_contrastive.State.average

    def watched(state):
        past.append({name: p.detach().clone() for name, p in state.moving.items()})
        average(state)
    monkeypatch.setattr(train_contrastive.State, "average", watched)
    flags = tiny_flags(pairs, "--lr", 1e-3, "--output-dir", tmp_path, "--ema", 0.75)
    run_main(*flags, "--export", "safetensors")
    torch.manual_seed(1)
    before = clip_model.load(None, "tiny-vit:none", "tiny-bert:none", embed_dim=16).state_dict()
    stored = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)
    assert len(past) == 6
    for name, found in stored["ema"].items():
        wanted = 0.75 ** 6 * before[name] + sum(
            0.25 * 0.75 ** (5 - i) * weights[name] for i, weights in enumerate(past))
        assert torch.allclose(found, wanted, atol=1e-6), name
        assert torch.equal(stored["weights"][name], past[-1][name]), name
    best = torch.load(tmp_path / "checkpoint_best.pt", weights_only=True)
    exported = clip_model.load(tmp_path / "export" / "clip.safetensors").state_dict()
    assert all(torch.equal(exported[name], best["ema"][name]) for name in best["ema"])
    assert any(not torch.equal(exported[name], best["weights"][name]) for name in best["ema"])


@pytest.mark.parametrize("names, held", [
    (["image"], lambda n: n.startswith("visual.") and n != "visual.proj"),
    (["text"], lambda n: n.startswith("bert.")),
    (["image", "text"], lambda n: n.startswith(("visual.", "bert.")) and n != "visual.proj"),
    (["visual.ln_p"], lambda n: n.startswith(("visual.ln_pre.", "visual.ln_post."))),
    (["bert.embeddings"], lambda n: n.startswith("bert.embeddings"))])
def test_freezing_holds_what_it_names_and_never_the_heads(names, held):
    model = model_of(torch.float32)
    freeze(model, names)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if held(name)} != set()


def test_frozen_weights_do_not_move_and_all_others_do(pairs, tmp_path):
    run_main(*tiny_flags(pairs, "--freeze", "image", "--epochs", 1, "--warmup", 0, "--output-dir",
                         tmp_path, "--export", "safetensors"))
    torch.manual_seed(1)
    before = clip_model.load(None, "tiny-vit:none", "tiny-bert:none", embed_dim=16)
    after = clip_model.load(tmp_path / "export" / "clip.safetensors").state_dict()
    for name, tensor in before.state_dict().items():
        held = name.startswith("visual.") and name != "visual.proj"
        # a softmax over tokens does not change with the biases of all keys
        assert torch.equal(tensor, after[name]) == held or "key.bias" in name, name


# -----------------------------------------------------------------------------
# Retrieval and the losses of held-out pairs

def test_five_captions_of_an_image_in_file_order_put_a_floor_of_1_5728_under_the_loss():
    owner = torch.arange(320).repeat_interleave(5)
    image = torch.eye(320)
    loss, floor = batch_losses(image, image[owner], owner, 100.0, 64)
    assert floor == pytest.approx(1.5728, abs=5e-5)
    assert loss == pytest.approx(floor, abs=1e-6)  # of a perfect model


def test_the_floor_of_coco_captions_val2017_in_file_order(shared):
    stored = json.loads((shared / "meta" / "coco_captions_val2017.json").read_text())
    place = {}
    owner = torch.tensor([place.setdefault(a["image_id"], len(place))
                          for a in stored["annotations"]])
    image = unit(torch.randn(len(place), 256, generator=torch.Generator().manual_seed(0)))
    loss, floor = batch_losses(image, image[owner], owner, 100.0, 64)
    assert len(owner) == 25_014 and len(place) == 5_000
    assert floor == pytest.approx(1.1269, abs=5e-5) and loss == pytest.approx(floor, abs=1e-6)


def held_out(images, captions, dim=8, seed=0):
    """Unit features and owner, the captions of each image in number and order by chance."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.cat([torch.full((c,), i) for i, c in enumerate(captions)])
    owner = owner[torch.randperm(len(owner), generator=generator)]
    image = unit(torch.randn(images, dim, generator=generator))
    text = unit(image[owner] + 0.8 * torch.randn(len(owner), dim, generator=generator))
    return image, text, owner


def test_the_loss_and_floor_of_batches_equal_a_loop():
    image, text, owner = held_out(30, [1 + i % 5 for i in range(30)])
    loss, floor = batch_losses(image, text, owner, 7.0, 16)
    total = bound = 0.0
    for at in range(0, len(text), 16):
        rows = range(at, min(at + 16, len(text)))
        z = {(i, j): 7.0 * float(image[owner[i]] @ text[j]) for i in rows for j in rows}
        for i in rows:
            total += math.log(sum(math.exp(z[i, j]) for j in rows)) / 2 - z[i, i]
            total += math.log(sum(math.exp(z[j, i]) for j in rows)) / 2
            bound += math.log(sum(bool(owner[j] == owner[i]) for j in rows))
    assert loss == pytest.approx(total / len(text), rel=1e-5)
    assert floor == pytest.approx(bound / len(text), rel=1e-9)


@pytest.mark.parametrize("captions, k", [([5] * 20, 5), ([7, 5, 6, 5, 8], 5), ([1] * 20, 5),
                                         ([1, 2, 3, 4, 5, 6], 3)])
def test_the_error_by_rows_equals_a_gallery_with_a_row_per_caption(captions, k):
    image, text, owner = held_out(len(captions), captions)
    missed = 0
    for i in range(len(text)):
        scores = [float(x) for x in image[owner] @ text[i]]
        order = sorted(range(len(text)), key=lambda j: (-scores[j], j))
        missed += i not in order[:k]
    found = row_error(image, text, owner, k)
    assert found == pytest.approx(100 * missed / len(text))
    if min(captions) >= k:
        if max(captions) == k:
            r1 = train_contrastive.recall_at_k(image, text, owner)["t2i_r1"]
            assert found == pytest.approx(100 - r1)
        assert found > 10


# -----------------------------------------------------------------------------
# Command lines

HUGGING_FACE = """--output_dir ./out --model_name_or_path ./clip-roberta --data_dir /data/coco
--image_column=image_path --caption_column caption --remove_unused_columns=False --do_train
--do_eval --per_device_train_batch_size=48 --per_device_eval_batch_size="32" --learning_rate=2e-5
--warmup_steps 7 --weight_decay 0.15 --overwrite_output_dir --num_train_epochs 2 --fp16
--dataloader_drop_last --dataloader_num_workers 3 --skip_steps=4 --save_steps 1500 --max_steps 1000
--max_seq_length 32 --logging_steps 9 --max_grad_norm 0.7 --seed 42"""


def test_the_spellings_of_run_clip_mean_what_they_mean_there():
    args = get_args(HUGGING_FACE.replace('"', "").split())
    train_contrastive.fill_preset(args, types.SimpleNamespace(world_size=3))
    wanted = dict(output_dir="./out", weights="./clip-roberta", data_dir="/data/coco",
                  image_column="image_path", caption_column="caption", batch_size=3 * 48,
                  eval_batch_size=32, lr=2e-5, warmup=7, wd=0.15, overwrite=True, epochs=2,
                  precision="fp16", workers=3, skip_steps=4, save_every=1500, max_steps=1000,
                  max_text=32, log_every=9, grad_clip=0.7, seed=42)
    assert {name: getattr(args, name) for name in wanted} == wanted


@pytest.mark.parametrize("preset, wanted", [
    ("clip-scratch", dict(lr=5e-4, wd=0.2, batch_size=256, beta2=0.98, eps=1e-6, seed=1,
                          schedule="cosine", captions="one", loss="infonce", tower_wd=None)),
    ("clip-finetune", dict(lr=1e-5, wd=0.1, warmup=0.1, batch_size=256, weights="auto")),
    ("clip-roberta", dict(lr=5e-5, wd=0.1, warmup=0, schedule="linear", epochs=3, batch_size=64,
                          beta2=0.999, eps=1e-8, grad_clip=1.0, seed=42, captions="all", crop=0,
                          embed_dim=512, proj="linear")),
    ("simple-clip", dict(lr=1e-3, image_lr=1e-4, text_lr=1e-5, wd=1e-3, tower_wd=0, epochs=30,
                         batch_size=32, triplet_weight=0.1, margin=0.2, loss="infonce+triplet",
                         schedule="plateau", embed_dim=256, proj="mlp", squash=True))])
def test_presets_fill_what_is_left_open_and_nothing_else(preset, wanted):
    args = get_args(["--preset", preset, "--data", "coco"])
    train_contrastive.fill_preset(args, types.SimpleNamespace(world_size=1))
    assert {name: getattr(args, name) for name in wanted} == wanted
    args = get_args(["--preset", preset, "--data", "coco", "--lr", "0.5", "--wd", "0", "--seed",
                     "0", "--batch-size", "6"])
    train_contrastive.fill_preset(args, types.SimpleNamespace(world_size=1))
    assert (args.lr, args.wd, args.seed, args.batch_size) == (0.5, 0, 0, 6)


def refusal(capsys, *flags):
    """The one line on stderr of a command that must end with exit code 2."""
    try:
        code = train_contrastive.guard(main, get_args, [str(flag) for flag in flags])
    except SystemExit as error:  # argparse
        code = error.code
    text = capsys.readouterr().err
    assert code == 2 and text.startswith("error: ") and text.count("\n") == 1, (code, text)
    return text


@pytest.mark.parametrize("flags, words", [
    (["--batch-size", "1"], ["--batch-size is 1", "2 or more"]),
    (["--per-device-train-batch-size", "1"], ["2 or more"]),
    (["--per-device-train-batch-size", "8"], ["--batch-size", "give one"]),
    (["--batch-size", "25"], ["batch size 25 with 24 images"]),
    (["--max-samples", "7"], ["batch size 8 with 7 images"]),
    (["--lr", "0"], ["--lr"]), (["--lr", "nan"], ["--lr"]), (["--epochs", "0"], ["--epochs"]),
    (["--tile", "0"], ["--tile"]), (["--micro-batch", "-1"], ["--micro-batch"]),
    (["--ema", "1"], ["--ema"]), (["--crop", "2"], ["--crop"]), (["--scale", "0"], ["--scale"]),
    (["--seed", "4294967296"], ["--seed"]), (["--loss", "clip"], ["--loss", "infonce"]),
    (["--accum-freqq", "2"], ["--accum-freqq"]),
    (["--freeze", "vision"], ["--freeze vision", "image, text", "visual"]),
    (["--freeze", "visual.proj"], ["visual.proj", "matches no parameter"]),
    (["--text-tower", "tiny-bert"], ["tiny-bert:none"]),
    (["--text-tower", "no/such/folder"], ["no/such/folder"]),
    (["--image-tower", "resnet5"], ["resnet5"]),
    (["--tokenizer", "no/such/vocab.txt"], ["no/such/vocab.txt"]),
    (["--tokenizer", "assets/bpe_simple_vocab_16e6.txt.gz"], ["bpe", "wordpiece"]),
    (["--resume", "no_such_checkpoint.pt"], ["no_such_checkpoint.pt"]),
    (["--resume", "assets/tiny_clip.safetensors"], ["tiny_clip.safetensors"]),
    (["--data", "no/such/folder"], ["no/such/folder"]),
    (["--caption-column", "sentence"], ["sentence"]),
    (["--device", "tpu"], ["tpu", "cpu"]),
])
def test_a_wrong_command_line_gets_one_line(pairs, capsys, tmp_path, flags, words):
    text = refusal(capsys, *tiny_flags(pairs, *flags, "--output-dir", tmp_path / "out"))
    for word in words:
        assert word in text
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("flags, words", [
    (["--model", "ViT-Z/99"], ["ViT-Z/99", "ViT-B/32"]),
    (["--model", "tiny", "--tokenizer", "vocab.txt"], ["wordpiece", "bpe"]),
    (["--model", "tiny", "--weights", "pairs.csv"], ["pairs.csv"]),
    (["--text-tower", "tiny-bert:none"], ["tiny-bert:none", "--tokenizer"]),
])
def test_a_wrong_model_gets_one_line(pairs, capsys, flags, words):
    flags = [str(pairs / flag) if "." in flag else flag for flag in flags]
    text = refusal(capsys, "--data", pairs, "--output-dir", pairs / "no", "--batch-size", 8, *flags)
    for word in words:
        assert word in text
    assert not (pairs / "no").exists()


def test_a_vocabulary_larger_than_the_text_tower_is_refused(pairs, capsys, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, *map(str, range(21_128))]))
    text = refusal(capsys, *tiny_flags(pairs, "--tokenizer", tmp_path / "vocab.txt"))
    assert f"{len(WORDS) + 21_128:,} tokens" in text and "text tower 21,128" in text


def test_pairs_without_captions_are_refused(capsys, tmp_path):
    folder = scenes(tmp_path / "pairs", 12, captions=0)
    assert "caption" in refusal(capsys, *tiny_flags(folder, "--output-dir", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_port_of_zero_is_refused(pairs, capsys, monkeypatch):
    for name, value in (("WORLD_SIZE", 2), ("RANK", 0), ("LOCAL_RANK", 0), ("MASTER_PORT", 0),
                        ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, str(value))
    assert "MASTER_PORT=0" in refusal(capsys, *tiny_flags(pairs))


# -----------------------------------------------------------------------------
# Runs from end to end

FLAGS = ["--save-every", 2, "--lr", "2e-3", "--loss", "infonce+triplet", "--ema", "0.5"]


@pytest.fixture(scope="module")
def uninterrupted(pairs, tmp_path_factory):
    """Six steps, three an epoch, saved after the second, third, fourth and sixth."""
    folder = tmp_path_factory.mktemp("whole")
    run_main(*tiny_flags(pairs, *FLAGS, "--output-dir", folder, "--export", "safetensors"))
    return folder


CLOCK = ("samples_per_second", "data_wait", "memory_mb", "time")


def assert_same_run(one, other):
    """Weights, moments, averages and what was logged, to the bit."""
    ours, theirs = (torch.load(folder / "checkpoint_last.pt", weights_only=True)
                    for folder in (one, other))
    for kind in ("weights", "ema", "buffers"):
        assert ours[kind].keys() == theirs[kind].keys()
        assert all(torch.equal(ours[kind][name], theirs[kind][name]) for name in ours[kind])
    for i, moments in ours["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, theirs["optimizer"]["state"][i][name])
    for key in ("epoch", "batch", "step", "best", "lowest", "stale", "slow"):
        assert ours[key] == theirs[key]
    rows = [[{k: v for k, v in json.loads(line).items() if k not in CLOCK} for line in
             (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, other)]
    assert rows[0] == rows[1]
    scores = [json.loads((folder / "results.json").read_text()) for folder in (one, other)]
    for key in ("mean_recall", "loss", "scale", "steps"):
        assert scores[0][key] == scores[1][key]


def in_child(work):
    """Fork, work() there -> its exit code, or minus the signal that ended it."""
    process = os.fork()
    if not process:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            os._exit(work() or 0)
        except BaseException:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def at_call(owner, name, number):
    """Let call `number` of a function, from 1, be the end of this process."""
    function, taken = getattr(owner, name), []

    def counted(*args, **kwargs):
        taken.append(1)
        if len(taken) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    setattr(owner, name, counted)


@pytest.mark.parametrize("owner, name, numbers", [
    (train_contrastive, "add_gradient", range(2, 7)),  # in a step, at random
    (os, "fsync", range(8, 20)), (os, "replace", range(4, 9))])  # while something is written
@pytest.mark.parametrize("workers", [0, 2])
def test_a_kill_at_any_moment_and_the_same_command_give_the_same_bits(
        pairs, uninterrupted, tmp_path, owner, name, numbers, workers):
    number = random.Random(f"{name} {workers}").choice(numbers)
    flags = tiny_flags(pairs, *FLAGS, "--output-dir", tmp_path)

    def work():
        at_call(owner, name, number)
        run_main(*flags)
    assert in_child(work) == -signal.SIGKILL
    assert not (tmp_path / "results.json").exists()
    flags[flags.index("--workers") + 1] = str(workers)
    run_main(*flags, "--cache", "ram")
    assert_same_run(uninterrupted, tmp_path)


@pytest.mark.parametrize("step", [2, 3, 6])
def test_sigterm_saves_and_the_run_goes_on_to_the_same_bits(pairs, uninterrupted, tmp_path,
                                                            monkeypatch, step):
    """In the middle of an epoch, in its last step, and in the last step of all."""
    taken = []

    def until(*args):
        taken.append(1)
        if len(taken) == step:
            signal.raise_signal(signal.SIGTERM)
        return add_gradient(*args)
    monkeypatch.setattr(train_contrastive, "add_gradient", until)
    flags = tiny_flags(pairs, *FLAGS, "--output-dir", tmp_path)
    assert train_contrastive.guard(main, get_args, flags) == 128 + signal.SIGTERM
    assert torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)["step"] == step
    run_main(*flags)
    assert len(taken) == 6
    assert_same_run(uninterrupted, tmp_path)


def test_a_finished_run_is_not_run_again_and_another_is_refused(pairs, uninterrupted, capsys):
    before = (uninterrupted / "checkpoint_last.pt").stat().st_mtime_ns
    flags = tiny_flags(pairs, *FLAGS, "--output-dir", uninterrupted)
    again = run_main(*flags)
    assert again["mean_recall"] == json.loads(
        (uninterrupted / "results.json").read_text())["mean_recall"]
    flags[flags.index("--lr") + 1] = "0.1"
    assert "lr was 0.002, now 0.1" in refusal(capsys, *flags)
    assert (uninterrupted / "checkpoint_last.pt").stat().st_mtime_ns == before


def test_eval_only_prints_what_training_printed(pairs, uninterrupted, tmp_path):
    trained = json.loads((uninterrupted / "results.json").read_text())
    listing = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*")}
    flags = tiny_flags(pairs, *FLAGS, "--eval-only", "--output-dir")
    here = run_main(*flags, uninterrupted)
    there = run_main(*flags, tmp_path / "no", "--resume", uninterrupted / "checkpoint_best.pt")
    for key in ("i2t_r1", "t2i_r10", "mean_recall", "loss", "scale"):
        assert here[key] == there[key] == trained[key], key
    assert {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*")} == listing
    assert not (tmp_path / "no").exists()
    start_anew = run_main(*flags, tmp_path / "no")
    assert start_anew["loss"] != trained["loss"] and start_anew["steps"] == 0


def test_a_named_checkpoint_goes_on_in_another_folder(pairs, uninterrupted, tmp_path, capsys):
    flags = tiny_flags(pairs, *FLAGS, "--output-dir", tmp_path)

    def work():
        at_call(train_contrastive, "add_gradient", 4)
        run_main(*flags)
    in_child(work)
    path = tmp_path / "middle.pt"
    path.write_bytes((tmp_path / "checkpoint_last.pt").read_bytes())
    flags[-1] = str(tmp_path / "moved")
    result = run_main(*flags, "--resume", path)
    assert result["steps"] == 6
    ours, theirs = (torch.load(folder / "checkpoint_last.pt", weights_only=True)["weights"]
                    for folder in (tmp_path / "moved", uninterrupted))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    other = tiny_flags(pairs, *FLAGS[:-4], "--resume", path, "--output-dir", tmp_path / "other")
    text = refusal(capsys, *other)
    assert "loss 'infonce+triplet' there and 'infonce' here" in text and "ema" in text


def test_what_a_run_leaves_behind(pairs, uninterrupted, capsys):
    names = {p.name for p in uninterrupted.iterdir()}
    assert names >= {"config.json", "command.txt", "env.json", "log.txt", "metrics.jsonl",
                     "results.json", "checkpoint_last.pt", "checkpoint_best.pt", "summary.md",
                     "export"}
    results = json.loads((uninterrupted / "results.json").read_text())
    for key in ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "mean_recall",
                "samples_per_second", "method", "data", "model", "seconds", "peak_memory_mb",
                "device", "precision", "git", "steps", "batch_size"):
        assert key in results, key
    assert results["method"] == "contrastive" and results["images"] == 12
    table = (uninterrupted / "summary.md").read_text().splitlines()
    assert len(table) == 3 and "| FPS |" in table[0] and table[1].count("---") == 8
    assert "| 8 | 1 |" in table[2] and results["model"] in table[2]
    rows = metrics(uninterrupted)
    assert len(rows) == 6 and len(metrics(uninterrupted, "val")) == 2
    for row in rows:
        assert row["ln_batch"] == pytest.approx(math.log(8))
        assert row["loss"] == pytest.approx(row["infonce"] + row["triplet"], rel=1e-5)
    scores = [row["mean_recall"] for row in metrics(uninterrupted, "val")]
    assert results["mean_recall"] == max(scores)


def test_an_export_loads_and_scores_the_same(pairs, uninterrupted):
    model = clip_model.load(uninterrupted / "export" / "clip.safetensors")
    tokenizer = WordPieceTokenizer(pairs / "vocab.txt")
    held = open_pairs(pairs, "val", ".").with_transform(train_contrastive.Preprocess(32))
    with torch.no_grad():
        image = model.encode_image(torch.stack([x[0] for x in held.image_items()]), normalize=True)
        text = model.encode_text(tokenizer(held.captions, context_length=64), normalize=True)
    found = train_contrastive.recall_at_k(image, text, held.owner)
    results = json.loads((uninterrupted / "results.json").read_text())
    assert {key: results[key] for key in found} == pytest.approx(found)


def test_kept_features_leave_out_what_cannot_be_read(pairs, tmp_path):
    folder = shutil.copytree(pairs, tmp_path / "pairs")
    for split in ("train", "val"):
        damaged = open_pairs(folder, split, ".")
        (folder / damaged.paths[1]).write_bytes(b"no picture")
    flags = tiny_flags(folder, "--freeze", "image", "--crop", 0, "--epochs", 1)
    plain = run_main(*flags, "--output-dir", tmp_path / "plain")
    kept = run_main(*flags, "--cache", "features", "--output-dir", tmp_path / "kept")
    assert kept["images"] == plain["images"] == 11
    assert [row["loss"] for row in metrics(tmp_path / "kept")] == pytest.approx(
        [row["loss"] for row in metrics(tmp_path / "plain")], rel=1e-5)
    assert kept["mean_recall"] == pytest.approx(plain["mean_recall"])


def test_config_json_runs_again(uninterrupted, tmp_path):
    run_main("--config", uninterrupted / "config.json", "--output-dir", tmp_path)
    assert_same_run(uninterrupted, tmp_path)


def test_a_dry_run_takes_two_steps_beside_the_real_run(pairs, tmp_path):
    result = run_main(*tiny_flags(pairs, "--dry-run", "--output-dir", tmp_path / "run"))
    assert result["steps"] == 2 and result["dry_run"] and "mean_recall" in result
    assert not (tmp_path / "run").exists() and (tmp_path / "run_dry_run" / "results.json").exists()


@pytest.mark.parametrize("flags", [
    ["--loss", "siglip", "--positives", "multi"], ["--loss", "triplet", "--triplet", "sum"],
    ["--loss", "triplet", "--triplet", "semi-hard", "--positives", "diag"],
    ["--loss", "infonce+triplet", "--captions", "all"], ["--micro-batch", "0"],
    ["--precision", "bf16"], ["--loss-precision", "bf16"], ["--freeze", "image"]])
def test_check_grad_holds_on_every_loss_with_dropout(pairs, capsys, tmp_path, flags):
    args = [str(flag) for flag in tiny_flags(pairs, "--check-grad", "--tile", 3, *flags,
                                             "--output-dir", tmp_path / "no")]
    assert train_contrastive.guard(main, get_args, args) == 0
    said = capsys.readouterr().out
    assert "against autograd on all 8" in said and not (tmp_path / "no").exists()
    assert "pieces of 8" not in said, "it would be compared with itself"


def test_check_grad_finds_a_wrong_gradient_and_exits_3(pairs, capsys, monkeypatch):
    monkeypatch.setattr(train_contrastive, "criterion", lambda sides, scale, bias, args: (
        lambda found: (found[0]._replace(scale=2 * found[0].scale), found[1]))(
            criterion(sides, scale, bias, args)))
    assert train_contrastive.guard(main, get_args, tiny_flags(pairs, "--check-grad")) == 3
    assert "logit_scale" in capsys.readouterr().out


def test_the_clip_roberta_preset_from_end_to_end(pairs, tmp_path):
    """Every caption, a linear schedule, no crop; the loss and floor that its project reports."""
    flags = tiny_flags(pairs, "--preset", "clip-roberta", "--eval-protocol", "run-clip", "--epochs",
                       1, "--output-dir", tmp_path)
    del flags[flags.index("--crop"):flags.index("--crop") + 2]
    result = run_main(*flags)
    assert result["steps"] == 6 and result["captions"] == 24  # 48 captions, 8 a step
    assert [row["lr"] for row in metrics(tmp_path)] == pytest.approx(
        [5e-5 * (1 - i / 6) for i in range(6)])
    assert result["run_clip_floor"] == pytest.approx(math.log(2))  # two captions of an image
    assert result["run_clip_loss"] > result["run_clip_floor"]
    assert json.loads((tmp_path / "config.json").read_text())["identity"]["seed"] == 42


def test_the_simple_clip_preset_from_end_to_end(pairs, tmp_path):
    pytest.importorskip("torchvision")
    result = run_main(*tiny_flags(
        pairs, "--preset", "simple-clip", "--image-tower", "squeezenet1_0:none", "--max-steps", 2,
        "--eval-protocol", "simple-clip", "--export", "safetensors", "--output-dir", tmp_path))
    assert result["steps"] == 2 and 0 <= result["simple_clip_top5_error"] <= 100
    assert all(row["triplet"] > 0 and row["infonce"] > 1 for row in metrics(tmp_path))
    model = clip_model.load(tmp_path / "export" / "clip.safetensors")
    assert model.config.proj == "mlp" and model.config.backbone == "squeezenet1_0"


def test_weights_of_a_whole_clip_with_another_tower_keep_the_rest(pairs):
    flags = tiny_flags(pairs, "--weights", "auto", "--model", "tiny")
    del flags[flags.index("--image-tower"):flags.index("--image-tower") + 2]
    args = get_args(flags)
    train_contrastive.fill_preset(args, types.SimpleNamespace(world_size=1))
    model, tiny = train_contrastive.open_model(args), clip_model.load("tiny")
    assert torch.equal(model.visual.conv1.weight, tiny.visual.conv1.weight)
    assert model.text_kind == "wordpiece"


def test_zero_shot_is_scored_beside_retrieval(pairs, tmp_path):
    result = run_main("--data", pairs, "--model", "tiny", "--weights", "auto", "--eval-only",
                      "--zero-shot", "demo", "--workers", 0, "--device", "cpu", "--batch-size", 8,
                      "--output-dir", tmp_path / "no")
    alone = clip_model.load("tiny")
    test = train_contrastive.open_dataset("demo", "test")
    test = test.with_transform(train_contrastive.Preprocess(64))
    tokens = train_contrastive.BPETokenizer()(train_contrastive.class_prompts(
        test.classnames, test.template))
    with torch.no_grad():
        text = alone.encode_text(tokens, normalize=True)
        right = sum(int(((alone.encode_image(torch.stack([test[i][0] for i in part])) @ text.T)
                         .argmax(dim=1) == torch.tensor(test.labels)[part]).sum())
                    for part in torch.arange(len(test)).split(250))
    assert result["zero_shot_accuracy"] == pytest.approx(100 * right / len(test))
    assert result["zero_shot_accuracy"] > 30


def test_images_that_cannot_be_read_are_replaced_and_counted(tmp_path, capsys):
    """One in a hundred is borne. Without a cache it is met again in every epoch."""
    folder = scenes(tmp_path / "pairs", 100, 4)
    (folder / "5.png").write_bytes(b"no image")
    for cache in ("none", "ram"):
        run_main(*tiny_flags(folder, "--batch-size", 50, "--micro-batch", 0, "--cache", cache,
                             "--log-every", 2, "--output-dir", tmp_path / cache))
        rows = metrics(tmp_path / cache)
        assert [row.get("replaced", 0) for row in rows] == [1, 1], cache
    said = capsys.readouterr().out
    assert "1 of 100 train images are unreadable" in said and "5.png" in said


def test_pairs_per_second_leave_out_the_first_steps_and_the_scoring(pairs, tmp_path, monkeypatch):
    """Six steps of 8 pairs, two of them skipped: 32 pairs in four steps of 0.1 s and one save of
    0.3 s, the last save being after the end; scoring takes 0.5 s, twice."""
    def slowed(function, seconds):
        def slow(*args, **kwargs):
            time.sleep(seconds)
            return function(*args, **kwargs)
        return slow
    state = train_contrastive.State
    saves = []

    def save(self, name, _save=state.save):
        saves.append(name)
        time.sleep(0.3 * (name == "checkpoint_last.pt"))
        _save(self, name)
    monkeypatch.setattr(state, "save", save)
    monkeypatch.setattr(train_contrastive, "add_gradient", slowed(add_gradient, 0.1))
    monkeypatch.setattr(train_contrastive, "evaluate", slowed(train_contrastive.evaluate, 0.5))
    result = run_main(*tiny_flags(pairs, "--skip-steps", 2, "--output-dir", tmp_path))
    seconds, counted = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)["clock"]
    assert saves.count("checkpoint_last.pt") == 2 and counted == 32
    assert 0.7 <= seconds < 1.2
    assert result["samples_per_second"] == pytest.approx(32 / seconds)
    skipped = run_main(*tiny_flags(pairs, "--output-dir", tmp_path / "all"))  # ten, of six
    assert skipped["samples_per_second"] == 0


def test_batches_of_any_size_that_fits_train(pairs, tmp_path):
    """Odd, and the whole data set at once."""
    for size in (7, 24):
        result = run_main(*tiny_flags(pairs, "--batch-size", size, "--output-dir",
                                      tmp_path / str(size)))
        assert result["steps"] == 2 * (24 // size) and math.isfinite(result["loss"])


def test_equal_captions_do_not_count_against_each_other(pairs):
    train = open_pairs(pairs, "train", ".")
    ids = train_contrastive.identities(train)
    assert ids.shape == (48, 2) and ids[:, 0].tolist() == train.owner
    for i, j in itertools.combinations(range(48), 2):
        assert bool(ids[i, 1] == ids[j, 1]) == (train.captions[i] == train.captions[j])
    assert len(ids[:, 1].unique()) < 48
    for batch in PairBatches(train, 24):
        assert len({train.owner[c] for _, c in batch}) == 24


# -----------------------------------------------------------------------------
# It learns

@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """256 steps on 512 drawn scenes of 96 kinds; 64 of different kinds are held out."""
    folder = tmp_path_factory.mktemp("learned")
    scenes(folder / "pairs", 512, 64)
    flags = ["--data", folder / "pairs", "--image-tower", "tiny-vit:none", "--text-tower",
             "tiny:none", "--embed-dim", 64, "--batch-size", 64, "--lr", "2e-3", "--warmup", 0.1,
             "--wd", 0.05, "--crop", 0, "--workers", 0, "--device", "cpu", "--log-every", 1,
             "--epochs", 32, "--eval-every", 32]
    result = run_main(*flags, "--micro-batch", 0, "--output-dir", folder / "whole")
    return folder, flags, result


@pytest.mark.slow
def test_drawn_scenes_are_learned(learned):
    """A batch holds images of one kind with either of its two sentences: the loss ends above 0."""
    folder, _, result = learned
    losses = [row["loss"] for row in metrics(folder / "whole")]
    assert losses[0] > 0.95 * math.log(64) and sum(losses[-8:]) / 8 < 0.12 * math.log(64)
    assert result["images"] == 64  # chance is 1 in 64
    assert result["t2i_r1"] > 90 and result["i2t_r1"] > 90  # 98 both


@pytest.mark.slow
def test_pieces_of_8_follow_the_loss_curve_of_the_whole_batch(learned):
    folder, flags, _ = learned

    def stop(run, model, *rest):
        losses = add_gradient(run, model, *rest)
        taken.append(float(losses["loss"]))
        if len(taken) == 30:
            raise RuntimeError("enough")
        return losses
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_contrastive, "add_gradient", stop)
        with pytest.raises(RuntimeError, match="enough"):
            run_main(*flags, "--micro-batch", 8, "--output-dir", folder / "pieces")
    whole = [row["loss"] for row in metrics(folder / "whole")][:30]
    assert taken == pytest.approx(whole, abs=1e-4) and whole[-1] < whole[0]


def test_every_epoch_has_the_order_of_its_number(pairs, tmp_path, monkeypatch):
    seen = []

    def watched(run, model, images, tokens, ids, *rest):
        seen.append(ids.tolist())
        return add_gradient(run, model, images, tokens, ids, *rest)
    monkeypatch.setattr(train_contrastive, "add_gradient", watched)
    run_main(*tiny_flags(pairs, "--output-dir", tmp_path))
    train = open_pairs(pairs, "train", ".")
    ids, batches, wanted = train_contrastive.identities(train), PairBatches(train, 8, seed=1), []
    for epoch in range(2):
        batches.set_epoch(epoch)
        wanted += [ids[[c for _, c in batch]].tolist() for batch in batches]
    assert seen == wanted and seen[:3] != seen[3:]
