"""CLIP training on image-caption pairs with an exact batch of any size (Radford et al. 2021).

The loss compares every image of a batch with every text of it, so a larger batch is a harder and
better task, and memory is what limits it. Not here: `--batch-size` is always the batch that is
contrasted, whatever fits, on one device or many. One step:

1. Encode the batch in pieces of `--micro-batch`, without keeping activations (but the last's).
2. Loss and its gradient for the embeddings, tile by tile; the N x N matrix is never built.
3. Encode each piece again with the same dropout, now for its share of that gradient
   (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup").

The gradient is that of the whole batch at once, the scale's included, for 4/3 of the arithmetic;
`--check-grad` shows it on your model and data. Processes exchange embeddings and log-sums only.

    python train_contrastive.py                           the bundled demo, a minute on a CPU
    python train_contrastive.py --data flickr8k --data-dir DIR --model tiny    a small ViT
    python train_contrastive.py --data coco --preset clip-roberta --image-tower ViT-B/32 \
        --text-tower FOLDER                                        ViT-B/32 + RoBERTa on COCO 2017
    python train_contrastive.py --data flickr8k --preset simple-clip --batch-size 1024
    torchrun --nproc-per-node 8 train_contrastive.py --data coco   the same numbers, faster

Losses (`--loss`), z = scale * cosine, P = pairs that belong together:
    infonce   mean of the cross-entropies of rows and of columns       Radford et al. 2021
    siglip    -1/N sum log sigmoid(+-(z + bias)), + on P, - elsewhere  Zhai et al. 2023
    triplet   1/N sum of max(0, margin + cos(negative) - cos(pair)) both ways, over all negatives
              (`sum`, VSE), the `hardest` (VSE++, Faghri et al. 2018) or the `semi-hard` one
    infonce+triplet   infonce + triplet_weight * triplet

Different from common practice, with the reason:
- an epoch takes every image once, with one of its captions (`--captions all`: every caption), and
  never one image twice in a batch; equal captions of two images do not count against each other
  (`--positives mask`);
- retrieval is scored on the unique images with all captions of each, as in the papers. The loss on
  held-out data is printed beside the floor that its repeated images put under it;
- BatchNorm cannot be exact in pieces: its statistics stay frozen then, which is said.

Logged: loss, its terms, ln B beside them, scale, lr. Results: i2t_r1 ... t2i_r10, mean_recall (%).
"""
import argparse
import contextlib
import hashlib
import json
import math
import pathlib
import sys
import time
from typing import NamedTuple

from device import guard, load_checkpoint, Parser, SafeStop, start, UserError  # before torch,
import torch                                                          # which reads what it sets
import torch.nn.functional as F
from torch import nn

from clip_model import (bucket, canonical_name, CLIP, CONFIGS, evaluating, HEADS, load, project,
                        save, trim, unit)
from data import (batch_losses, class_prompts, classification_scores, FeatureLoader, make_loader,
                  make_pair_loader, normalise, open_dataset, open_pairs, Preprocess, recall_at_k,
                  row_error)
from tokenizer import BPETokenizer, open_tokenizer

# What a preset sets where the command line does not. clip-roberta and simple-clip are two public
# projects' recipes: Hugging Face's run_clip.py on COCO, and ResNet50 + DistilBERT on Flickr.
PRESETS = {
    "clip-scratch": {},
    "clip-finetune": {"lr": 1e-5, "wd": 0.1, "warmup": 0.1, "batch_size": 256, "epochs": 5,
                      "grad_clip": 1.0, "weights": "auto", "beta2": 0.999, "eps": 1e-8},
    "clip-roberta": {"lr": 5e-5, "wd": 0.1, "warmup": 0.0, "schedule": "linear", "epochs": 3,
                     "batch_size": 64, "beta2": 0.999, "eps": 1e-8, "grad_clip": 1.0, "seed": 42,
                     "captions": "all", "crop": 0.0, "embed_dim": 512},
    "simple-clip": {"loss": "infonce+triplet", "triplet_weight": 0.1, "margin": 0.2, "epochs": 30,
                    "image_lr": 1e-4, "text_lr": 1e-5, "lr": 1e-3, "wd": 1e-3, "warmup": 0.0,
                    "schedule": "plateau", "batch_size": 32, "beta2": 0.999, "eps": 1e-8,
                    "captions": "all", "crop": 0.0, "squash": True, "embed_dim": 256,
                    "proj": "mlp", "tower_wd": 0.0},
}
DEFAULTS = {  # of clip-scratch, the paper's but for what its 400 M pairs allow
    "loss": "infonce", "triplet_weight": 0.1, "margin": 0.2, "epochs": 30, "batch_size": 256,
    "lr": 5e-4, "wd": 0.2, "warmup": 0.1, "schedule": "cosine", "beta2": 0.98, "eps": 1e-6,
    "grad_clip": 0.0, "seed": 1, "captions": "one", "crop": 0.6, "squash": False, "embed_dim": 512,
    "proj": "linear", "weights": "none",
}
DEMO = {"epochs": 15, "batch_size": 128, "lr": 3e-4, "crop": 0.9, "weights": "auto"}
PLATEAU, PATIENCE = 0.8, 1   # factor on the rates when the held-out loss has not fallen for longer
MAX_SCALE = 100.0            # CLIP's clamp
QUIET = ("rsum", "i2t_median_rank", "t2i_median_rank", "images", "captions")  # in results.json
ALIASES = {
    "--dataset": "--data", "--data-path": "--data", "--root": "--data-dir",
    "--backbone": "--model", "--arch": "--model", "--pretrained": "--weights",
    "--model-name-or-path": "--weights", "--model-path": "--weights",
    "--num-train-epochs": "--epochs", "--max-epochs": "--epochs", "--learning-rate": "--lr",
    "--weight-decay": "--wd", "--warmup-steps": "--warmup", "--num-workers": "--workers",
    "--dataloader-num-workers": "--workers", "--output": "--output-dir", "--out-dir":
    "--output-dir", "--overwrite-output-dir": "--overwrite", "--max-grad-norm": "--grad-clip",
    "--per-device-eval-batch-size": "--eval-batch-size", "--logging-steps": "--log-every",
    "--save-steps": "--save-every", "--zeroshot": "--zero-shot", "--accum-freq": "--accum-steps",
    "--gradient-accumulation-steps": "--accum-steps",
}


def get_args(argv=None):
    """The command line as a namespace. Exits with code 2 and one line on a wrong one."""
    parser = Parser(description="CLIP training on image-caption pairs, any batch exact.",
                    epilog="example: python train_contrastive.py --data flickr8k --batch-size 1024",
                    aliases=ALIASES)
    add_data_flags(parser.add_argument_group("data"))
    add_model_flags(parser.add_argument_group("model"))
    add_method_flags(parser.add_argument_group("method"))
    add_run_flags(parser.add_argument_group("run"))
    hidden = parser.add_argument_group("of run_clip.py")  # understood, so its commands run as is
    for flag in ("--do-train", "--do-eval", "--dataloader-drop-last", "--fp16",
                 "--use-combine-grad"):
        hidden.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    for flag in ("--per-device-train-batch-size", "--max-seq-length"):
        hidden.add_argument(flag, type=int, help=argparse.SUPPRESS)
    for flag in ("--remove-unused-columns", "--dataset-name", "--dataset-config-name", "--optim",
                 "--fp16-opt-level", "--loss-scale"):
        hidden.add_argument(flag, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    refuse_bad_flags(parser, args)
    return args


def add_data_flags(group):
    group.add_argument("--data", default="demo", help="flickr8k, flickr30k, coco, a folder, shards "
                       "({0000..0012}.tar) or a CSV/TSV/JSONL file (default: demo)")
    group.add_argument("--data-dir", default="data", help="where named data lies (default: data)")
    group.add_argument("--layout", default="auto", help="how the folder is to be read, and "
                       "simple-clip for that project's 80/20 split (default: auto)")
    group.add_argument("--caption-file", help="another caption file of the folder, such as a "
                       "translation")
    group.add_argument("--image-column", help="default: found by name")
    group.add_argument("--caption-column", help="default: found by name")
    group.add_argument("--captions", choices=("one", "all"), help="per epoch, each image once with "
                       "one of its captions, or every caption (default: one)")
    group.add_argument("--crop", type=float, help="smallest share of an image that a training crop "
                       "keeps; 0: no augmentation (default: 0.6)")
    group.add_argument("--squash", action="store_true", default=None,
                       help="resize to a square without keeping the aspect")
    group.add_argument("--cache", choices=("ram", "disk", "features", "none"), default="ram",
                       help="decoded images, short side 8/7 of the model's, or what a frozen image "
                       "tower makes of them (default: ram)")
    group.add_argument("--cache-gb", type=float, default=8.0, help="give the cache up beyond "
                       "(default: 8)")
    group.add_argument("--max-samples", type=int, help="train on the first images alone")
    group.add_argument("--zero-shot", metavar="DATA", help="also classify this labelled data set")
    group.add_argument("--workers", type=int, default=-1, help="processes that read images "
                       "(default: -1: none beside a cache in memory, else up to 4)")


def add_model_flags(group):
    group.add_argument("--model", help="a released size, or tiny (default: ViT-B/32; tiny for the "
                       "demo)")
    group.add_argument("--weights", help="none: random; auto: OpenAI's for the model; a file or "
                       "folder to start from (default: none)")
    group.add_argument("--image-tower", help="instead of the model's: a CLIP, or a torchvision "
                       "classifier as NAME or NAME:FILE")
    group.add_argument("--text-tower", help="instead of the model's: a folder of the BERT family, "
                       "or NAME:none, as roberta-base:none")
    group.add_argument("--tokenizer", help="folder of the text tower's vocabulary (default: "
                       "the text tower's)")
    group.add_argument("--proj", choices=("linear", "mlp"), help="heads of chosen towers")
    group.add_argument("--embed-dim", type=int, help="of chosen towers (default: 512)")
    group.add_argument("--new-visual-projection", action="store_true",
                       help="draw the image head anew even where the image tower brings one")
    group.add_argument("--freeze", nargs="+", default=[], metavar="NAME", help="image, text, or "
                       "how the names of parameters begin; the heads stay free")
    group.add_argument("--bn", choices=("auto", "freeze", "chunk"), default="auto",
                       help="BatchNorm: frozen statistics, or those of each piece, which no batch "
                       "in pieces equals (default: auto: frozen when the batch comes in pieces)")
    group.add_argument("--max-text", type=int, default=77, help="tokens (default: 77)")


def add_method_flags(group):
    group.add_argument("--preset", choices=list(PRESETS), default="clip-scratch",
                       help="defaults for what follows (default: clip-scratch)")
    group.add_argument("--loss", choices=("infonce", "siglip", "triplet", "infonce+triplet"),
                       help="what is minimised (default: infonce)")
    group.add_argument("--positives", choices=("diag", "mask", "multi"), default="mask",
                       help="pairs with an equal image or caption: negatives, left out, or "
                       "positives too (default: mask)")
    group.add_argument("--triplet", choices=("sum", "hardest", "semi-hard"), default="hardest",
                       help="the negatives of its hinge (default: hardest)")
    group.add_argument("--triplet-weight", type=float, help="default: 0.1")
    group.add_argument("--margin", type=float, help="default: 0.2")
    group.add_argument("--scale", type=float, help="start of the logit scale (default: 14.3, or "
                       "the loaded one; 10 for siglip)")
    group.add_argument("--local-negatives", action="store_true", help="each process contrasts its "
                       "own share alone, as run_clip.py does: a smaller task, for comparison")
    group.add_argument("--epochs", type=int, help="default: 30, or the preset's")
    group.add_argument("--max-steps", type=int, default=0, help="stop earlier")
    group.add_argument("--batch-size", type=int, help="pairs contrasted per step, over all "
                       "processes")
    group.add_argument("--micro-batch", type=int, default=64, help="pairs encoded at a time per "
                       "process; the gradient stays the batch's (default: 64; 0: all)")
    group.add_argument("--accum-steps", type=int, default=1, help="another way to say it: "
                       "batch-size / accum-steps in memory, still one batch to the loss")
    group.add_argument("--tile", type=int, default=1024, help="side of a loss tile (default: 1024)")
    group.add_argument("--loss-precision", choices=("fp32", "bf16"), default="fp32",
                       help="of the tiles' products; bf16 costs about 1 %% of the gradient")
    group.add_argument("--lr", type=float, help="default: 5e-4, or the preset's")
    group.add_argument("--image-lr", type=float, help="of the image tower (default: --lr)")
    group.add_argument("--text-lr", type=float, help="of the text tower (default: --lr)")
    group.add_argument("--wd", type=float, help="on matrices, not on gains, biases, embeddings")
    group.add_argument("--tower-wd", type=float, help="of the two towers (default: --wd)")
    group.add_argument("--beta2", type=float, help="of AdamW (default: 0.98)")
    group.add_argument("--eps", type=float, help="of AdamW (default: 1e-6)")
    group.add_argument("--warmup", type=float, help="steps, or below 1 a share of all")
    group.add_argument("--schedule", choices=("cosine", "linear", "constant", "plateau"),
                       help="of the learning rates (default: cosine)")
    group.add_argument("--grad-clip", type=float, help="largest norm (default: 0, none)")
    group.add_argument("--ema", type=float, default=0.0, help="decay of averaged weights, which "
                       "are then evaluated and exported (default: 0, off)")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                       help="of the towers; the loss is fp32 (default: auto)")


def add_run_flags(group):
    group.add_argument("--device", default="auto", help="auto, cuda, mps, npu or cpu; refused when "
                       "absent (default: auto)")
    group.add_argument("--seed", type=int, help="default: 1")
    group.add_argument("--output-dir", default="", help="default: runs/train_contrastive/...")
    group.add_argument("--resume", default="auto", help="auto, none, or a checkpoint's path")
    group.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    group.add_argument("--eval-only", action="store_true", help="score the model and stop")
    group.add_argument("--eval-batch-size", type=int, default=256, help="images (default: 256)")
    group.add_argument("--eval-protocol", choices=("paper", "run-clip", "simple-clip"),
                       default="paper", help="also print the number that project reports")
    group.add_argument("--eval-every", type=int, default=1, metavar="EPOCHS",
                       help="score held-out pairs so often (default: 1)")
    group.add_argument("--check-grad", action="store_true", help="compare one step's gradient with "
                       "plain autograd on the whole batch and stop")
    group.add_argument("--dry-run", action="store_true", help="two steps and every score, into a "
                       "folder of its own, ..._dry_run")
    group.add_argument("--export", choices=("openai", "open_clip", "hf", "safetensors"),
                       help="also write the model as that library loads it")
    group.add_argument("--log-every", type=int, default=20, metavar="STEPS", help="default: 20")
    group.add_argument("--save-every", type=int, default=0, metavar="STEPS",
                       help="also save inside an epoch (default: 0, after each epoch)")
    group.add_argument("--skip-steps", type=int, default=10, help="left out of samples per second, "
                       "as they warm up (default: 10)")
    group.add_argument("--deterministic", action="store_true", 
                       help="refuse operations without a repeatable result")
    group.add_argument("--worker-timeout", type=int, default=600, metavar="SECONDS",
                       help="take a reading process to hang after this long (default: 600)")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def refuse_bad_flags(parser, args):
    """Exit with one line on values and pairs of flags that make no sense."""
    for name, low in (("epochs", 1), ("batch_size", 1), ("micro_batch", 0), ("tile", 1),
                      ("accum_steps", 1), ("eval_batch_size", 1), ("log_every", 1),
                      ("save_every", 0), ("wd", 0),
                      ("workers", -1), ("worker_timeout", 1), ("grad_clip", 0), ("warmup", 0),
                      ("max_steps", 0),
                      ("eval_every", 1), ("skip_steps", 0), ("triplet_weight", 0), ("margin", 0),
                      ("max_text", 3), ("embed_dim", 1), ("max_samples", 2), ("tower_wd", 0),
                      ("cache_gb", 0), ("per_device_train_batch_size", 1), ("seed", 0)):
        value = getattr(args, name)
        if value is not None and not low <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')} is {value}; expected at least {low}")
    for name, high in (("lr", 1e3), ("image_lr", 1e3), ("text_lr", 1e3), ("scale", MAX_SCALE + 1),
                       ("eps", 1), ("beta2", 1)):
        value = getattr(args, name)
        if value is not None and not 0 < value < high:
            parser.error(f"--{name.replace('_', '-')} is {value}; expected between 0 and {high:g}")
    if args.crop is not None and not 0 <= args.crop <= 1 or not 0 <= args.ema < 1:
        parser.error("--crop and --ema take numbers from 0 to 1")
    if args.seed is not None and args.seed >= 2 ** 32:
        parser.error(f"--seed is {args.seed}; expected below 4294967296")
    if args.batch_size == 1 or args.per_device_train_batch_size == 1:
        parser.error("--batch-size is 1; the loss of a single pair is 0 whatever it is, so take "
                     "2 or more")
    if args.accum_steps > 1 and "micro_batch" in parser.given:
        parser.error("--micro-batch and --accum-steps say the same thing twice; give one")
    if args.dataset_name and "coco" not in args.dataset_name.lower():
        parser.error(f"--dataset-name {args.dataset_name}: hub data sets are not fetched here; "
                     f"name a folder with --data")
    if args.per_device_train_batch_size and args.batch_size:
        parser.error("--per-device-train-batch-size and --batch-size say the same; give one")


def fill_preset(args, run):
    """Put the preset's values into the flags left open, and the first project's names into ours."""
    if args.dataset_name:
        args.data = "coco"
    if args.fp16:
        args.precision = "fp16"
    if args.max_seq_length:
        args.max_text = args.max_seq_length
    if args.per_device_train_batch_size:
        args.batch_size = args.per_device_train_batch_size * run.world_size
    demo = DEMO if args.data == "demo" and args.preset == "clip-scratch" else {}
    for name, value in {**DEFAULTS, **demo, **PRESETS[args.preset]}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.model = args.model or ("tiny" if args.data == "demo" else "ViT-B/32")
    if args.accum_steps > 1:
        args.micro_batch = -(-args.batch_size // (run.world_size * args.accum_steps))


# -----------------------------------------------------------------------------
# The loss and its gradient, tile by tile. Memory: a few tiles and vectors of length N.

class Sides(NamedTuple):
    """What is contrasted. Rows are unit vectors; row `first + i` of text belongs to image i."""
    image: torch.Tensor       # (n, D), this process's
    text: torch.Tensor        # (N, D), of all processes in rank order
    ids: torch.Tensor | None  # (N, k): pairs equal in any column belong together; None: none do
    first: int
    run: object               # to merge over processes; None when this process stands alone
    turn: int = 0             # which of the processes this is

    @property
    def own(self):
        return slice(self.first, self.first + len(self.image))

    def merge(self, x):
        """(N,) here -> (W, N) of all processes."""
        return x[None] if self.run is None else self.run.gather(x[None].contiguous())

    def everywhere(self, x):
        """(n,) of this process's rows -> (N,) of all."""
        whole = x.new_zeros(len(self.text))
        whole[self.own] = x
        return self.merge(whole).sum(dim=0)

    def tiles(self, size):
        for r in range(0, len(self.image), size):
            for c in range(0, len(self.text), size):
                yield slice(r, r + size), slice(c, c + size)

    def pairs(self, r, c):
        """The diagonal inside a tile: rows and columns of the pairs, counted from its corner."""
        low = max(self.first + r.start, c.start)
        high = min(self.first + min(r.stop, len(self.image)), c.stop)
        both = torch.arange(low, max(low, high), device=self.image.device)
        return both - self.first - r.start, both - c.start

    def mates(self, r, c, diagonal):
        """(rows, columns) bool: which belong together, with `diagonal` the pairs too; or None."""
        if self.ids is None:
            return None
        same = False
        for column in self.ids.unbind(dim=1):
            same = same | (column[self.own][r][:, None] == column[c])
        same[self.pairs(r, c)] = diagonal
        return same


class Gradients(NamedTuple):
    """A loss, and its derivatives for what it was computed from. Each process's part: the sum over
    processes is the whole, but `image` has this process's own rows, complete."""
    loss: torch.Tensor   # ()
    image: torch.Tensor  # (n, D)
    text: torch.Tensor   # (N, D)
    scale: torch.Tensor | float = 0.0
    bias: torch.Tensor | float = 0.0


def info_nce(sides, scale, positives, tile, dtype):
    """Symmetric InfoNCE (van den Oord et al. 2018; Radford et al. 2021), and its gradient.

    z = scale * image @ text.T. The first sweep over the tiles finds the log-sum-exp of every row
    and column, which is the loss; the second computes the tiles again for

        dz = (softmax of the row + softmax of the column - targets) / 2N

    targets 2 on the diagonal; with `multi` 1/n_i + 1/n_j on all that belong together (Khosla et
    al. 2020, eq. 2). 8 N^2 D operations, where autograd takes 6 and 5 to 8 matrices N x N.
    """
    image, text, (n, N) = sides.image, sides.text, (len(sides.image), len(sides.text))
    low_image, low_text = image.to(dtype), text.to(dtype)
    row, column = image.new_full((n,), -math.inf), image.new_full((N,), -math.inf)
    multi = positives == "multi" and sides.ids is not None
    if multi:
        count = image.new_zeros(n)
        for r, c in sides.tiles(tile):
            count[r] += sides.mates(r, c, diagonal=True).sum(dim=1)
        weight = 1 / sides.everywhere(count)                                   # (N,)
        agreement = image.new_zeros(())                                        # sum of targets * z

    def logits(r, c):
        z = (low_image[r] @ low_text[c].T).to(image.dtype).mul_(scale)
        if positives == "mask" and sides.ids is not None:
            z.masked_fill_(sides.mates(r, c, diagonal=False), -math.inf)
        return z

    def targets(r, c):
        same = sides.mates(r, c, diagonal=True).to(image.dtype)
        return same * (weight[sides.own][r][:, None] + weight[c])
    for r, c in sides.tiles(tile):
        z = logits(r, c)
        row[r] = torch.logaddexp(row[r], z.logsumexp(dim=1))
        column[c] = torch.logaddexp(column[c], z.logsumexp(dim=0))
        if multi:
            agreement += (targets(r, c) * z).sum()
    column = sides.merge(column).logsumexp(dim=0)
    if not multi:
        agreement = 2 * scale * (image * text[sides.own]).sum()
    loss = (row.sum() + column[sides.own].sum() - agreement) / (2 * N)

    d_image, d_text = torch.zeros_like(image), torch.zeros_like(text)
    for r, c in sides.tiles(tile):
        z = logits(r, c)
        dz = (z - row[r, None]).exp_().add_(z.sub_(column[c]).exp_())
        if multi:
            dz.sub_(targets(r, c))
        else:
            dz[sides.pairs(r, c)] -= 2
        dz = dz.to(dtype)
        d_image[r] += dz @ low_text[c]
        d_text[c] += dz.T @ low_image[r]
    # sum(dz * cosine), which is what the scale gets, is in there already
    d_scale = torch.einsum("nd,nd->n", image, d_image).sum() / (2 * N)
    return Gradients(loss, d_image.mul_(scale / (2 * N)), d_text.mul_(scale / (2 * N)), d_scale)


def siglip(sides, scale, bias, positives, tile, dtype):
    """Sigmoid loss (Zhai et al. 2023, eq. 1), and its gradient, in one sweep."""
    image, text, N = sides.image, sides.text, len(sides.text)
    low_image, low_text = image.to(dtype), text.to(dtype)
    loss, d_bias = image.new_zeros(()), image.new_zeros(())
    d_image, d_text = torch.zeros_like(image), torch.zeros_like(text)
    for r, c in sides.tiles(tile):
        z = (low_image[r] @ low_text[c].T).to(image.dtype).mul_(scale).add_(bias)
        sign = torch.full_like(z, -1)
        mates = sides.mates(r, c, diagonal=False) if positives != "diag" else None
        if mates is not None:
            sign.masked_fill_(mates, 1 if positives == "multi" else 0)
        sign[sides.pairs(r, c)] = 1
        counts = sign.abs()
        loss += (F.softplus(-sign * z) * counts).sum()
        dz = -sign * torch.sigmoid(-sign * z)
        d_bias += dz.sum()
        dz = dz.to(dtype)
        d_image[r] += dz @ low_text[c]
        d_text[c] += dz.T @ low_image[r]
    d_scale = torch.einsum("nd,nd->n", image, d_image).sum() / N
    return Gradients(loss / N, d_image.mul_(scale / N), d_text.mul_(scale / N), d_scale,
                     d_bias / N)


def triplet(sides, kind, margin, positives, tile):
    """Hinge of every image and every text as anchor on cosines, and its gradient.

    An anchor's negatives do not belong to it. kind "sum": all of them count (VSE, Kiros et al.
    2014); "hardest": the nearest alone (VSE++, Faghri et al. 2018); "semi-hard": the nearest of
    those that are farther than the pair (Schroff et al. 2015), none if there is none.
    """
    image, text, own, N = sides.image, sides.text, sides.own, len(sides.text)
    near = (image * text[own]).sum(dim=1)                              # (n,), cosines of the pairs
    everywhere = sides.everywhere(near)                                # (N,)
    d_image, d_text = torch.zeros_like(image), torch.zeros_like(text)
    row_hits, column_hits = image.new_zeros(len(image)), image.new_zeros(N)
    loss = image.new_zeros(())
    rows = Nearest(len(image), image)
    columns = Nearest(N, image)
    for r, c in sides.tiles(tile):
        cosine = image[r] @ text[c].T
        cosine[sides.pairs(r, c)] = -math.inf
        mates = sides.mates(r, c, diagonal=False) if positives != "diag" else None
        if mates is not None:
            cosine.masked_fill_(mates, -math.inf)
        from_rows, from_columns = near[r, None], everywhere[c]
        if kind == "sum":
            over_row = (margin + cosine - from_rows).clamp_(min=0)
            over_column = (margin + cosine - from_columns).clamp_(min=0)
            loss += over_row.sum() + over_column.sum()
            dz = (over_row > 0).to(image.dtype) + (over_column > 0)
            d_image[r] += dz @ text[c]
            d_text[c] += dz.T @ image[r]
            row_hits[r] += (over_row > 0).sum(dim=1)
            column_hits[c] += (over_column > 0).sum(dim=0)
            continue
        far = kind == "semi-hard"
        rows.see(cosine.masked_fill(cosine >= from_rows, -math.inf) if far else cosine, r, c, 1)
        columns.see(cosine.masked_fill(cosine >= from_columns, -math.inf) if far else cosine,
                    c, r, 0)
    if kind == "sum":
        hits = row_hits + sides.merge(column_hits).sum(dim=0)[own]
    else:
        over, place = (margin + rows.cosine - near).clamp_(min=0), rows.place
        row_hits = (over > 0).to(image.dtype)
        loss += over.sum()
        d_image += row_hits[:, None] * text[place]
        d_text.index_add_(0, place, row_hits[:, None] * image)
        # A text's nearest image may lie in any process; the one that has it adds the gradient.
        best = sides.merge(columns.cosine)                             # (W, N)
        top, here = best.max(dim=0)
        over = (margin + top - everywhere).clamp_(min=0)
        column_hits = (over > 0).to(image.dtype)
        loss += over[own].sum()
        mine = column_hits * (here == sides.turn)
        d_text += mine[:, None] * image[columns.place]
        d_image.index_add_(0, columns.place, mine[:, None] * text)
        hits = row_hits + column_hits[own]
    d_image -= hits[:, None] * text[own]
    d_text[own] -= hits[:, None] * image
    return Gradients(loss / N, d_image / N, d_text / N)


class Nearest:
    """Running largest cosine of each anchor, and where it was seen."""

    def __init__(self, anchors, like):
        self.cosine = like.new_full((anchors,), -math.inf)
        self.place = torch.zeros(anchors, dtype=torch.long, device=like.device)

    def see(self, cosine, anchors, others, dim):
        top, place = cosine.max(dim=dim)
        better = top > self.cosine[anchors]
        self.cosine[anchors] = torch.where(better, top, self.cosine[anchors])
        self.place[anchors] = torch.where(better, place + others.start, self.place[anchors])


def criterion(sides, scale, bias, args):
    """`args.loss` and its gradient -> Gradients, {term: its value}."""
    dtype = torch.bfloat16 if args.loss_precision == "bf16" else sides.image.dtype
    terms = {}
    if "infonce" in args.loss:
        terms["infonce"] = info_nce(sides, scale, args.positives, args.tile, dtype)
    if args.loss == "siglip":
        terms["siglip"] = siglip(sides, scale, bias, args.positives, args.tile, dtype)
    if "triplet" in args.loss:
        weight = args.triplet_weight if args.loss == "infonce+triplet" else 1.0
        terms["triplet"] = Gradients(*(weight * x for x in triplet(
            sides, args.triplet, args.margin, args.positives, args.tile)))
    whole = Gradients(*map(sum, zip(*terms.values())))
    return whole, {name: term.loss for name, term in terms.items()}


def plain_loss(image, text, ids, scale, bias, args):
    """The same loss as plain autograd has it, on the N x N matrix: what `--check-grad` trusts."""
    N, cosine = len(image), image @ text.T
    eye = torch.eye(N, dtype=torch.bool, device=image.device)
    same = eye
    if args.positives != "diag":
        same = eye | (ids[:, None] == ids).any(dim=2)
    out = same & ~eye
    total = 0.0
    if "infonce" in args.loss:
        z = scale * cosine
        if args.positives == "mask":
            z = z.masked_fill(out, -math.inf)
        on = (same if args.positives == "multi" else eye).to(image.dtype)
        for way, p in ((1, on / on.sum(dim=1, keepdim=True)), (0, on / on.sum(dim=0))):
            total = total - torch.where(on > 0, p * z.log_softmax(dim=way), 0).sum() / (2 * N)
    if args.loss == "siglip":
        sign = 2.0 * (same if args.positives == "multi" else eye) - 1
        some = F.logsigmoid(sign * (scale * cosine + bias))
        total = total - (some.masked_fill(out, 0) if args.positives == "mask" else some).sum() / N
    if "triplet" in args.loss:
        near, hinge = cosine.diagonal(), 0.0
        for anchor, way in ((near[:, None], 1), (near, 0)):
            negative = cosine.masked_fill(same, -math.inf)
            if args.triplet == "semi-hard":
                negative = negative.masked_fill(cosine >= anchor, -math.inf)
            if args.triplet != "sum":
                negative = negative.amax(dim=way, keepdim=True)
            hinge = hinge + (args.margin + negative - anchor).clamp(min=0).sum()
        total = total + (args.triplet_weight if args.loss == "infonce+triplet" else 1.0) * hinge / N
    return total


# -----------------------------------------------------------------------------
# One exact step

def pieces(images, tokens, micro, pad_id):
    """A batch cut for encoding -> image pieces [(m, 3, R, R)], text pieces [((m, L), ends)] sorted
    by length so that short texts do not pay for long ones, and the places that undo the sorting."""
    micro = micro or max(1, len(images))
    lengths = trim(tokens, pad_id)[1]
    order = lengths.argsort(stable=True)
    texts = [trim(part, pad_id) for part in tokens[order].split(micro)]
    return list(images.split(micro)), texts, order.argsort()


class Encoder:
    """Unit features of pieces of a batch, twice with the same random numbers."""

    def __init__(self, run, model, seed):
        self.run, self.model, self.seed = run, model, seed

    def image(self, piece):
        if piece.ndim == 2:  # what a frozen tower made of them, see FeatureLoader
            return unit(project(self.run.move(piece), self.model.visual.proj))
        images = normalise(self.run.move(piece), self.model.image_mean, self.model.image_std)
        return self.model.encode_image(images, normalize=True)

    def text(self, piece):
        tokens, ends = self.run.move(*piece)
        return self.model.encode_text(tokens, normalize=True, ends=ends)

    def one(self, kind, number, piece):
        # Dropout of a piece is drawn from its own seed, so that the second time repeats the first.
        torch.manual_seed(((self.seed * 2 + (kind == "text")) * 65_537 + number) % 2 ** 63)
        with self.run.autocast():
            return getattr(self, kind)(piece)

    def all(self, kind, parts, keep):
        """Features of all pieces, (n, D) without graph; and the last piece's with one, if `keep`:
        its second pass is spared."""
        out = []
        for number, piece in enumerate(parts):
            last = keep and number == len(parts) - 1
            still = contextlib.nullcontext() if last else still_statistics(self.model)
            with torch.set_grad_enabled(last), still:
                out.append(self.one(kind, number, piece))
        return torch.cat([x.detach() for x in out]), out[-1]

    def backward(self, kind, parts, last, gradient):
        """Send the gradient (n, D) into the tower; `last` is what `all` kept."""
        shares = gradient.split([len(p[0]) if kind == "text" else len(p) for p in parts])
        last.backward(shares[-1])
        for number, (piece, share) in enumerate(zip(parts[:-1], shares)):
            self.one(kind, number, piece).backward(share)


@contextlib.contextmanager
def still_statistics(model):
    """BatchNorm's running statistics do not move in here: a piece must not count twice."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    rates = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 0.0
    yield
    for m, rate in zip(norms, rates):
        m.momentum = rate


def add_gradient(run, model, images, tokens, ids, counts, args, scaler, seed):
    """Add the gradient of the batch over all processes to `.grad`, this process's part of it; the
    sum over processes is the gradient. -> the loss and its terms, () each, this process's part.

    images (n, 3, R, R) uint8, tokens (n, L) and ids (n, k) are this process's pairs, on the host;
    counts: pairs in each process; seed: of dropout in this step.
    """
    alone = run.world_size == 1 or args.local_negatives
    encoder = Encoder(run, model, seed * run.world_size + run.rank)
    image_parts, text_parts, places = pieces(images, tokens, args.micro_batch, model.pad_id
                                             if model.config.text else None)
    free = {"image": any(p.requires_grad for p in model.visual.parameters()),
            "text": any(p.requires_grad for name, p in model.named_parameters()
                        if not name.startswith(("visual.", "logit_")))}
    image, last_image = encoder.all("image", image_parts, free["image"])         # (n, D)
    text, last_text = encoder.all("text", text_parts, free["text"])
    if args.positives == "diag" or alone and all(len(x.unique()) == len(x) for x in ids.T):
        ids = None  # nothing to look for in the tiles
    places = run.move(places)

    # ---- the loss, in fp32 over all processes ----------------------------------------------------
    with torch.no_grad():
        text = text[places]
        scale, bias = model.logit_scale.exp(), getattr(model, "logit_bias", 0.0)
        ids = ids if ids is None else run.move(ids)
        sides = Sides(image, text, ids, 0, None)
        if not alone:
            sides = Sides(image, run.gather(text, counts), ids if ids is None else run.gather(
                ids, counts), sum(counts[:run.rank]), run, run.rank)
        found, terms = criterion(sides, scale, bias, args)
        d_text = found.text if alone else run.sum(found.text)[sides.own]
        share = 1 / run.world_size if alone else 1.0  # local losses are averaged
    # ---------------------------------------------------------------------------------------------

    send = scaler.scale(image.new_full((), share))
    for name, gradient in (("logit_scale", found.scale * scale), ("logit_bias", found.bias)):
        p = getattr(model, name, None)
        if p is not None and p.requires_grad:
            p.grad = torch.as_tensor(gradient * send, dtype=p.dtype, device=p.device) + (
                0 if p.grad is None else p.grad)
    if free["text"]:
        encoder.backward("text", text_parts, last_text, (d_text * send)[places.argsort()])
    if free["image"]:
        encoder.backward("image", image_parts, last_image, found.image * send)
    return {"loss": found.loss * share, **{name: value * share for name, value in terms.items()}}


def check_grad(run, model, images, tokens, ids, counts, args):
    """The largest relative error of any parameter's gradient against plain autograd on the whole
    batch, with the same dropout; -> dict. SafeStop above 1e-4 (fp32), or 5e-2 below it. In at
    least two pieces and tiles, as otherwise nothing would be compared; but BatchNorm's statistics
    are those of a piece, so with them the pieces are the run's own."""
    half = max(1, len(images) // 2)
    args = argparse.Namespace(**{**vars(args), "tile": min(args.tile, half)})
    if not any(m.training for m in model.modules() if isinstance(
            m, nn.modules.batchnorm._BatchNorm)):
        args.micro_batch = min(args.micro_batch or half, half)
    moving = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    found = add_gradient(run, model, images, tokens, ids, counts, args, run.scaler(False), 0)
    run.sum_gradients(moving.values())
    ours = {name: p.grad.clone() for name, p in moving.items() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    encoder = Encoder(run, model, run.rank)
    parts = pieces(images, tokens, args.micro_batch, model.pad_id if model.config.text else None)
    with still_statistics(model):
        image = torch.cat([encoder.one("image", i, x) for i, x in enumerate(parts[0])])
        text = torch.cat([encoder.one("text", i, x) for i, x in enumerate(parts[1])])[
            run.move(parts[2])]
    ids = run.move(ids)
    if run.world_size > 1 and not args.local_negatives:
        image, text = run.gather(image, counts), run.gather(text, counts)
        ids = run.gather(ids, counts)
    loss = plain_loss(image, text, ids, model.logit_scale.exp(), getattr(model, "logit_bias", 0.0),
                      args) / run.world_size
    loss.backward()
    run.sum_gradients(moving.values())
    largest = max(float(p.grad.abs().max()) for p in moving.values() if p.grad is not None)
    errors = {name: float((ours[name] - p.grad).abs().max() / max(float(p.grad.abs().max()),
                                                                  1e-3 * largest))
              for name, p in moving.items() if p.grad is not None}
    worst = max(errors, key=errors.get)
    losses = float(run.sum(found["loss"])), float(run.sum(loss.detach()))
    run.say(f"gradient in pieces of {args.micro_batch or len(images)} and tiles of {args.tile} "
            f"against autograd on all {sum(counts)}: loss {losses[0]:.7g} and {losses[1]:.7g}, "
            f"largest error of {len(errors)} tensors {errors[worst]:.1e} in {worst}")
    if not errors[worst] <= (1e-4 if run.precision == args.loss_precision == "fp32" else 5e-2):
        raise SafeStop("the gradients differ; BatchNorm with --bn chunk does that, and low "
                       "precision a little")
    return {"check_grad_error": errors[worst], "check_grad_worst": worst, "loss": losses[0]}


# -----------------------------------------------------------------------------
# Features of a frozen image tower, computed once

@torch.no_grad()
def pooled_features(run, model, pairs, folder, args):
    """What the image head gets of every image: (n, F) on the host, the same in every process, kept
    in `folder` for the next run; NaN where an image cannot be read. Raises UserError unless the
    tower is frozen and sees every image always alike."""
    heads = [name for name, p in model.named_parameters()
             if name.startswith("visual.") and p.requires_grad and not name.startswith(HEADS)]
    if heads or args.crop or not hasattr(model.visual, "pooled"):
        raise UserError("--cache features keeps what a frozen image tower makes of each image: it "
                        "needs --freeze image, --crop 0, and no ModifiedResNet")
    identity = json.dumps([pairs.fingerprint, pairs.split, pairs.paths, args.squash, run.precision,
                           model.origin["sha256"], model.image_mean])
    path = folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.features.pt"
    stored = run.load(path) if model.origin["sha256"] else None
    if stored:
        run.say(f"{pairs.split} features from {path}")
        return stored["features"]
    model.eval()
    loader = make_loader(pairs.image_items(), args.eval_batch_size * run.world_size, shuffle=False,
                         rank=run.rank, world_size=run.world_size,
                         timeout=args.worker_timeout, **run.loader_options(args.workers))
    rows = []
    for done, (images, positions, indices) in enumerate(loader, 1):
        images = normalise(run.move(images), model.image_mean, model.image_std)
        with run.autocast():
            rows.append((indices, model.visual.pooled(images).float().cpu(), positions))
        run.progress(done, len(loader), f"features of {pairs.split}")
    indices, features, positions = (torch.cat(part) for part in zip(*sum(
        run.gather_objects(rows), [])))
    lost = indices[positions < 0].tolist()
    pairs.refuse_losses(lost, "they do not decode")
    features = features[indices.argsort()]
    features[lost] = math.nan  # FeatureLoader replaces them, embed leaves them out
    if model.origin["sha256"]:
        run.save(path, {"features": features})
    return features


# -----------------------------------------------------------------------------
# Evaluation

class Target:
    """Held-out pairs with their tokens: what retrieval is measured on."""

    def __init__(self, model, name, pairs, tokenizer, args):
        self.name, self.pairs, self.features = name, pairs, None
        self.texts = bucket(tokenizer(pairs.captions, context_length=args.max_text), most=512,
                            pad_id=model.pad_id if model.config.text else None)


@torch.no_grad()
def embed(run, model, target, args):
    """-> unit image features (n, D), text features (M, D), owner (M,): images that cannot be read
    are left out with their captions, and noted. On the CPU, the same in every process."""
    pairs, encoder = target.pairs, Encoder(run, model, 0)
    loader = make_loader(pairs.image_items(), args.eval_batch_size * run.world_size, shuffle=False,
                         rank=run.rank, world_size=run.world_size,
                         timeout=args.worker_timeout,
                         **run.loader_options(0 if pairs.pixels else args.workers))
    rows, features = [], []
    if target.features is not None:
        order = torch.arange(run.rank, len(target.features), run.world_size)
        lost = target.features[order].isnan().any(dim=1)
        loader = [(target.features[order], order.masked_fill(lost, -1), order)]
    for done, (images, positions, indices) in enumerate(loader, 1):
        features.append(encoder.one("image", 0, images).cpu())
        rows.append(torch.stack([indices, positions]))
        run.progress(done, len(loader), f"testing on {target.name}")
    groups, places = target.texts
    texts = [(i, encoder.one("text", 0, groups[i]).cpu())
             for i in range(run.rank, len(groups), run.world_size)]
    parts = run.gather_objects((torch.cat(rows, dim=1), torch.cat(features), texts))
    rows = torch.cat([part[0] for part in parts], dim=1)
    order = rows[0].argsort()
    image, readable = torch.cat([part[1] for part in parts])[order], rows[1][order] >= 0
    text = torch.cat([x for _, x in sorted(sum((part[2] for part in parts), []),
                                           key=lambda pair: pair[0])])[places]
    owner = torch.tensor(pairs.owner)
    if not readable.all():
        pairs.refuse_losses((~readable).nonzero()[:, 0].tolist(), "they do not decode")
        text, owner = text[readable[owner]], (readable.cumsum(0) - 1)[owner[readable[owner]]]
        image = image[readable]
    return image, text, owner


def evaluate(run, model, target, args):
    """Retrieval both ways and the losses of held-out pairs -> dict of floats."""
    with evaluating(model):
        image, text, owner = embed(run, model, target, args)
    scale = float(model.logit_scale.detach().exp())
    scores = recall_at_k(image, text, owner)
    first = torch.full((len(image),), len(owner)).scatter_reduce_(
        0, owner, torch.arange(len(owner)), "amin")
    once = first[first < len(owner)]  # one caption of each image: no batch holds an image twice
    scores["loss"], _ = batch_losses(image, text[once], owner[once], scale)
    if args.eval_protocol == "run-clip":
        scores["run_clip_loss"], scores["run_clip_floor"] = batch_losses(image, text, owner, scale)
    if args.eval_protocol == "simple-clip":
        scores["simple_clip_top5_error"] = row_error(image, text, owner)
    return {**scores, "images": len(image), "captions": len(text)}


@torch.no_grad()
def classify(run, model, images, tokenizer, args):
    """Zero-shot accuracy (%) on labelled images with the data set's own prompt."""
    encoder = Encoder(run, model, 0)
    prompts = tokenizer(class_prompts(images.classnames, images.template),
                        context_length=args.max_text)
    groups, places = bucket(prompts, pad_id=model.pad_id if model.config.text else None)
    with evaluating(model):
        text = torch.cat([encoder.one("text", 0, group) for group in groups])[run.move(places)]
    loader = make_loader(images, args.eval_batch_size * run.world_size, shuffle=False,
                         rank=run.rank, world_size=run.world_size,
                         timeout=args.worker_timeout, **run.loader_options(args.workers))
    rows = []
    with evaluating(model):
        for pixels, labels, indices in loader:
            guess = (encoder.one("image", 0, pixels) @ text.T).argmax(dim=-1).cpu()
            rows.append(torch.stack([indices, labels, guess]))
    rows = torch.cat(run.gather_objects(torch.cat(rows, dim=1)), dim=1)
    return classification_scores(rows[2], rows[1], len(images.classnames))["accuracy"]


# -----------------------------------------------------------------------------
# The loop

def decay_groups(model, args):
    """Parameters by learning rate and weight decay, which gains, biases and embeddings are spared
    (all vectors and scalars, and tables whose rows are looked up) -> list of dicts for AdamW."""
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        head = name.startswith(HEADS) or name in ("logit_scale", "logit_bias")
        lr = args.lr if head else (args.image_lr if name.startswith("visual.") else
                                   args.text_lr) or args.lr
        plain = p.ndim < 2 or "embedding" in name
        wd = 0.0 if plain else args.wd if head or args.tower_wd is None else args.tower_wd
        groups.setdefault((lr, wd), []).append(p)
    return [{"params": some, "lr": lr, "base_lr": lr, "weight_decay": wd}
            for (lr, wd), some in groups.items()]


def rate(step, steps, warmup, schedule):
    """Factor on the learning rates in a step (from 0): up in equal stages, then down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share}.get(schedule, 1.0)


def freeze(model, names):
    """Freeze the parameters that --freeze names; UserError if it matches none. The heads stay."""
    for wanted in names:
        hit = [p for name, p in model.named_parameters() if not name.startswith(HEADS) and (
            name.startswith("visual.") if wanted == "image" else
            not name.startswith(("visual.", "logit_")) if wanted == "text" else
            name.startswith(wanted))]
        if not hit:
            known = sorted({name.split(".")[0] for name, _ in model.named_parameters()})
            raise UserError(f"--freeze {wanted} matches no parameter; expected image, text, or how "
                            f"a name begins: {', '.join(known)}")
        for p in hit:
            p.requires_grad_(False)


def training_mode(model, args, in_pieces):
    """Dropout on; BatchNorm as --bn says -> whether the model has BatchNorm that stays frozen."""
    model.train()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    frozen = bool(norms) and (args.bn == "freeze" or args.bn == "auto" and in_pieces)
    for m in norms:
        if frozen or not any(p.requires_grad for p in m.parameters()):
            m.eval()
    return frozen


class State:
    """Everything that training changes, and how it is kept: what a checkpoint holds."""

    def __init__(self, run, model, args):
        self.run, self.model, self.args = run, model, args
        self.moving = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(decay_groups(model, args), betas=(0.9, args.beta2),
                                           eps=args.eps, fused=run.fused_optimizer)
        self.scaler = run.scaler()
        self.ema = {n: p.detach().clone() for n, p in self.moving.items()} if args.ema else {}
        self.epoch = self.batch = self.step = 0   # what comes next
        self.best, self.lowest, self.stale, self.slow = -1.0, math.inf, 0, 1.0
        self.clock = [0.0, 0]                     # seconds and pairs after the first --skip-steps

    def save(self, name):
        buffers = {n: b for n, b in self.model.named_buffers() if b.is_floating_point()}
        self.run.save(self.run.out / name, {
            "format": "contrastive/1", "weights": {n: p.detach() for n, p in self.moving.items()},
            "buffers": buffers, "ema": self.ema, "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(), "epoch": self.epoch, "batch": self.batch,
            "step": self.step, "best": self.best, "lowest": self.lowest, "stale": self.stale,
            "slow": self.slow, "clock": self.clock, "identity": self.args.identity})

    @torch.no_grad()
    def load(self, stored, weights_only=False):
        odd = sorted(set(stored["weights"]) ^ set(self.moving))
        if odd:
            raise UserError(f"the checkpoint holds {len(stored['weights'])} tensors and "
                            f"{len(self.moving)} move here, e.g. {odd[0]!r} on one side only; give "
                            f"the same towers and --freeze")
        for name, p in self.moving.items():
            p.copy_(stored["weights"][name])
        for name, buffer in self.model.named_buffers():
            if name in stored["buffers"]:
                buffer.copy_(stored["buffers"][name])
        for name, p in self.ema.items():
            p.copy_(stored["ema"].get(name, p))
        if weights_only:
            return
        self.optimizer.load_state_dict(stored["optimizer"])
        self.scaler.load_state_dict(stored["scaler"])
        for name in ("epoch", "batch", "step", "best", "lowest", "stale", "slow", "clock"):
            setattr(self, name, stored[name])

    @torch.no_grad()
    def average(self):
        torch._foreach_lerp_(list(self.ema.values()), list(self.moving.values()),
                             1 - self.args.ema)

    @contextlib.contextmanager
    def averaged(self):
        """The averaged weights, while they are evaluated or written."""
        held = {n: p.detach().clone() for n, p in self.moving.items()} if self.ema else {}
        with torch.no_grad():
            for name, p in self.ema.items():
                self.moving[name].copy_(p)
        yield
        with torch.no_grad():
            for name, p in held.items():
                self.moving[name].copy_(p)


def train(run, model, loader, tokens, ids, target, state, args):
    """Train `model` in place. loader: batches of the training pairs, tokens (M, L), ids (M, 2) of
    all their captions; target: held-out pairs or None."""
    batches = loader.batch_sampler
    counts = [len(range(rank, batches.batch_size, run.world_size))
              for rank in range(run.world_size)]
    in_pieces = run.world_size > 1 or 0 < args.micro_batch < counts[0]
    if training_mode(model, args, in_pieces):
        run.say("BatchNorm statistics are frozen: in pieces they could not be the batch's")
    steps = args.epochs * len(loader)
    steps = min(steps, args.max_steps) if args.max_steps else steps
    warmup = round(args.warmup if args.warmup >= 1 else args.warmup * steps)
    if warmup >= steps:
        run.say(f"note: {steps} steps never leave the warm-up of {warmup}")
    unchecked, seen, replaced, waited, losses = [], 0, 0, 0.0, {}
    chance = math.log(batches.batch_size // (run.world_size if args.local_negatives else 1))
    began = time.perf_counter()
    while state.step < steps:
        batches.set_epoch(state.epoch, first_batch=state.batch)
        clock = time.perf_counter()
        for images, used, asked in loader:
            waited += time.perf_counter() - clock
            replaced += int((used != asked).sum())

            # ---- one step -----------------------------------------------------------------
            for group in state.optimizer.param_groups:
                group["lr"] = group["base_lr"] * state.slow * rate(state.step, steps, warmup,
                                                                   args.schedule)
            state.optimizer.zero_grad(set_to_none=True)
            losses = add_gradient(run, model, images, tokens[used], ids[used], counts, args,
                                  state.scaler, args.seed * 1_000_003 + state.step)
            run.sum_gradients(state.moving.values())
            fine = run.drop_bad_gradients(state.moving.values(), state.scaler)
            if args.grad_clip:
                state.scaler.unscale_(state.optimizer)
                nn.utils.clip_grad_norm_(state.moving.values(), args.grad_clip)
            state.scaler.step(state.optimizer)
            state.scaler.update()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(MAX_SCALE))
            if args.ema:
                state.average()
            # -------------------------------------------------------------------------------

            state.step, state.batch = state.step + 1, state.batch + 1
            seen += batches.batch_size
            if state.batch == len(loader):
                state.epoch, state.batch = state.epoch + 1, 0
            unchecked.append((torch.where(fine, losses["loss"], math.nan), used))
            leaving, done = run.stop_requested(), state.step == steps
            saving = leaving or state.batch == 0 or done or (
                args.save_every and state.step % args.save_every == 0)
            if saving or state.step % args.log_every == 0:  # reading a loss waits for the device
                check_finite(run, loader.dataset, unchecked)
            if state.step % args.log_every == 0 or done:
                lost = run.sum(replaced)  # images that could not be read
                run.log(state.step, steps=steps, epoch=state.epoch + (state.batch > 0),
                        samples=seen, waited=waited, **{k: run.sum(v) for k, v in losses.items()},
                        ln_batch=chance, scale=model.logit_scale.detach().exp(),
                        lr=state.optimizer.param_groups[0]["lr"],
                        **({"replaced": lost} if lost else {}), **(
                            {"loss_scale": state.scaler.get_scale()}
                            if state.scaler.is_enabled() else {}))
                seen, replaced, waited = 0, 0, 0.0
            count_speed(state, batches.batch_size, time.perf_counter() - began, args)
            began = time.perf_counter()
            if saving:
                finish_epoch(run, model, target, state, done, args)
                began = time.perf_counter()
                state.save("checkpoint_last.pt")
            if leaving:
                raise run.interrupted()
            if done:
                break
            clock = time.perf_counter()
    return state


def count_speed(state, pairs, seconds, args):
    """Pairs and seconds since --skip-steps, waiting for data and checkpoints included and
    evaluation left out, as run_clip.py's FPS."""
    if state.step > args.skip_steps:
        state.clock = [state.clock[0] + seconds, state.clock[1] + pairs]


def finish_epoch(run, model, target, state, done, args):
    """At the end of an epoch: held-out scores, the best checkpoint, a slower plateau. Also when a
    signal came in its last step: the run that goes on begins with the next epoch."""
    if target is None or not (done or state.batch == 0 and state.epoch % args.eval_every == 0):
        return
    with state.averaged():
        scores = evaluate(run, model, target, args)
    run.log(state.step, split=target.name, **{k: v for k, v in scores.items() if k not in QUIET})
    state.stale = 0 if scores["loss"] < state.lowest else state.stale + 1
    if args.schedule == "plateau" and state.stale > PATIENCE:
        state.slow, state.stale = state.slow * PLATEAU, 0
    state.lowest = min(state.lowest, scores["loss"])
    if scores["mean_recall"] > state.best:
        state.best = scores["mean_recall"]
        state.save("checkpoint_best.pt")


def check_finite(run, pairs, unchecked):
    """Report the steps that were skipped for a loss or gradient that is not a number, with the
    images of their batch; stop after several in a row. Empties `unchecked`."""
    run.check_finite([loss for loss, _ in unchecked], lambda i: "the batch of " + ", ".join(
        pairs.paths[pairs.owner[c]] for c in unchecked[i][1].tolist()[:8]))
    unchecked.clear()


# -----------------------------------------------------------------------------
# A run

def open_model(args):
    """The CLIP that the flags ask for, on the CPU."""
    torch.manual_seed(args.seed)
    if args.image_tower or args.text_tower:
        source = None if args.weights == "none" else args.weights
        other = {None: f"{args.model}:none", "auto": args.model}.get(source)
        names = {side: getattr(args, f"{side}_tower") or other for side in ("image", "text")}
        model = load(None if source == "auto" else source, names["image"], names["text"],
                     proj=args.proj, embed_dim=args.embed_dim,
                     keep_visual_projection=not args.new_visual_projection)
        args.model = "+".join(pathlib.Path(part).name if pathlib.Path(part).exists() else
                              part.removeprefix("torchvision:").partition(":")[0]
                              for part in (args.image_tower or args.model,
                                           args.text_tower or args.model))
    else:
        known = canonical_name(args.model)
        if known is None and args.weights in ("auto", "none"):
            raise UserError(f"unknown --model {args.model!r}; known: {', '.join(CONFIGS)}. A file "
                            f"goes to --weights")
        model = CLIP(CONFIGS[known]) if args.weights == "none" else load(
            known if args.weights == "auto" else args.weights)
    if args.loss == "siglip":
        model.logit_bias = nn.Parameter(torch.tensor(-10.0))
    if args.scale or args.loss == "siglip":
        with torch.no_grad():
            model.logit_scale.fill_(math.log(args.scale or 10.0))
    freeze(model, args.freeze)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("--freeze leaves nothing to train")
    return model


def open_texts(args, model):
    """The tokenizer of the model's text tower."""
    if model.text_kind == "bpe" and not args.tokenizer:
        return BPETokenizer()
    folder = args.tokenizer or args.text_tower or args.weights
    if not pathlib.Path(folder).exists():
        raise UserError(f"the text tower {folder} needs its vocabulary; name its folder with "
                        f"--tokenizer")
    tokenizer = open_tokenizer(folder)
    if tokenizer.text_kind != model.text_kind:
        raise UserError(f"the tokenizer in {folder} is a {tokenizer.text_kind} and the text tower "
                        f"needs a {model.text_kind}; name the folder of its own with --tokenizer")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"the tokenizer in {folder} has {tokenizer.vocab_size:,} tokens and the "
                        f"text tower {model.config.vocab_size:,}; they do not belong together")
    return tokenizer


def open_data(args, run):
    """-> {"train", "val", "test": PairSet or None}; without val, test takes its place."""
    where = dict(data_dir=args.data_dir, layout=args.layout, captions=args.caption_file,
                 image_column=args.image_column, caption_column=args.caption_column)
    sets = {"train": open_pairs(args.data, "train", **where)}
    for split in ("val", "test"):
        sets[split] = open_pairs(args.data, split, **where) if sets["train"].counts.get(
            split) else None
    if args.max_samples:
        sets["train"] = sets["train"].subset(range(min(args.max_samples,
                                                       len(sets["train"].paths))))
    for pairs in filter(None, sets.values()):
        pairs.check_files()
    return sets


def identities(pairs):
    """(M, 2) numbers of each caption: of its image, and of its wording."""
    wording = {}
    return torch.tensor([(owner, wording.setdefault(caption.casefold(), len(wording)))
                         for owner, caption in zip(pairs.owner, pairs.captions)])


def refuse_other_run(stored, path, args):
    """Raise UserError unless the checkpoint at `path` fits this command line."""
    theirs = stored.get("identity")
    if stored.get("format") != "contrastive/1" or not isinstance(theirs, dict):
        raise UserError(f"{path} is not a checkpoint of this script; a CLIP to start from goes to "
                        f"--weights")
    keys = ("model", "weights_sha256", "freeze") if args.eval_only else sorted(
        {*theirs, *args.identity})
    odd = [f"{key} {theirs.get(key)!r} there and {args.identity.get(key)!r} here" for key in keys
           if theirs.get(key) != args.identity.get(key)]
    if odd:
        raise UserError(f"{path} belongs to another run: {'; '.join(odd)}; give the same flags, or "
                        f"start without --resume")


def find_start(run, folder, given, args):
    """Take the run's folder -> (checkpoint to go on from or None, results if it is finished)."""
    named, best = args.resume not in ("auto", "none"), folder / "checkpoint_best.pt"
    path = args.resume if named else best if args.eval_only and best.exists() else (
        folder / "checkpoint_last.pt")
    if args.eval_only or named:
        stored = load_checkpoint(path) if named or path.exists() and args.resume == "auto" else None
        if stored:
            refuse_other_run(stored, path, args)
        if not args.eval_only:
            run.claim(given, args.identity, overwrite=args.overwrite)
        return stored, None
    if not run.claim(given, args.identity, resume=args.resume == "auto",
                     overwrite=args.overwrite or args.dry_run):
        return None, None
    stored, done = run.load(path), folder / "results.json"
    if done.exists():
        run.say(f"{folder} holds this run, finished; --overwrite runs it again")
        return stored, json.loads(done.read_text("utf-8"))
    run.rewind(stored["step"] if stored else -1)
    return stored, None


def identify(args, pairs, model):
    """What must be equal for a run to be continued, and what names it in results.json."""
    names = ("preset", "freeze", "bn", "loss", "positives", "triplet", "triplet_weight", "margin",
             "scale", "local_negatives", "proj", "embed_dim", "epochs", "max_steps", "batch_size",
             "captions", "crop", "squash", "cache", "max_samples", "max_text", "lr", "image_lr",
             "text_lr", "wd", "tower_wd", "beta2", "eps", "warmup", "schedule", "grad_clip", "ema",
             "precision", "loss_precision", "seed")
    return {"data": pairs.name, "split_sha256": pairs.fingerprint, "model": args.model,
            "weights_sha256": model.origin["sha256"], **{n: getattr(args, n) for n in names}}


def prepare(run, model, sets, folder, args):
    """Give each set its transform and its cache of decoded images, and say what was noticed."""
    size = model.config.image_size
    look = dict(mean=model.image_mean, std=model.image_std, dtype=torch.uint8, squash=args.squash)
    views = {"train": Preprocess(size, bool(args.crop), args.seed, scale=(args.crop or 1, 1.0),
                                 flip=False, **look)}
    for split in filter(sets.get, sets):
        pairs = sets[split].with_transform(views.get(split) or Preprocess(size, **look))
        known = len(pairs.notes) if split != "train" else 0
        unused = args.cache == "features" or split == "train" and (
            args.eval_only or args.check_grad)
        pairs.cache("none" if unused else args.cache, size * 8 // 7, folder / "cache",
                    int(args.cache_gb * 2 ** 30), run.loader_options(args.workers)["workers"])
        for note in pairs.notes[known:]:
            run.say(note)
        sets[split] = pairs
    return sets


def summary(run, results, args):
    """The table that the first project prints, one line a run."""
    row = {"name": args.model, "eval loss": results.get("run_clip_loss", results.get("loss")),
           "floor": results.get("run_clip_floor", 0.0), "FPS": results["samples_per_second"] or "-",
           "precision": run.precision, "epochs": args.epochs, "batch": args.batch_size,
           "processes": run.world_size}
    cells = [f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()]
    lines = [f"| {' | '.join(row)} |", "|" + "---|" * len(row), f"| {' | '.join(cells)} |"]
    run.write("summary.md", "\n".join(lines) + "\n")
    run.say("\n".join(lines))


def export(run, model, folder, args):
    """Write the model as a full CLIP that the named library loads."""
    path = folder / "export" / {"openai": "clip.pt", "safetensors": "clip.safetensors"}.get(
        args.export, args.export)
    run.say(f"wrote {run.on_first(lambda: str(save(model, path, args.export)))}")


def report(run, model, state, target, tokenizer, folder, args):
    """Score the best weights on the test pairs, print, write and return what the run found."""
    best = run.load(run.out / "checkpoint_best.pt") if run.out and not args.eval_only else None
    if best and state.step:
        state.load(best, weights_only=True)
        run.say(f"testing the weights of step {best['step']}, the best held-out mean recall")
    with state.averaged():
        scores = evaluate(run, model, target, args) if target else {}
        if args.zero_shot:
            images = open_dataset(args.zero_shot, "test", data_dir=args.data_dir).with_transform(
                target.pairs.transform)
            scores["zero_shot_accuracy"] = classify(run, model, images, tokenizer, args)
        if args.export:
            export(run, model, folder, args)
    if target:
        run.log(state.step, split=f"best on {target.name}", **{
            k: v for k, v in scores.items() if k not in QUIET})
    seconds, pairs = state.clock
    results = {"method": "contrastive", "data": args.identity["data"], "model": args.model,
               **scores, "scale": float(model.logit_scale.detach().exp()), "steps": state.step,
               "epochs": state.epoch, "batch_size": args.batch_size,
               "samples_per_second": pairs / seconds if seconds else 0.0,
               "trainable_parameters": sum(p.numel() for p in state.moving.values()),
               "trainable_tensors": len(state.moving), "dry_run": args.dry_run,
               "identity": args.identity}
    results = run.finish(results)
    if target:
        summary(run, results, args)
        run.say("dry run, no result: " * args.dry_run +
                f"{target.name}, {scores['images']} images: image to text R@1 "
                f"{scores['i2t_r1']:.1f} R@5 {scores['i2t_r5']:.1f} R@10 {scores['i2t_r10']:.1f}, "
                f"text to image {scores['t2i_r1']:.1f} {scores['t2i_r5']:.1f} "
                f"{scores['t2i_r10']:.1f} %")
    return results


def main(args):
    """Train (or score) one model -> the results."""
    given = dict(vars(args))  # as config.json keeps it, before the preset fills the rest
    run = start(args.device, "fp16" if args.fp16 else args.precision, seed=args.seed or 1,
                deterministic=args.deterministic)
    fill_preset(args, run)
    if args.dry_run:
        args.max_steps = 2
    sets = open_data(args, run)
    model = open_model(args)
    args.max_text = min(args.max_text, model.config.context_length)
    tokenizer = open_texts(args, model)
    args.identity = identify(args, sets["train"], model)
    name = f"{sets['train'].name}_{args.model}_{args.preset}".replace("/", "-").replace(":", "-")
    folder = pathlib.Path(args.output_dir or f"runs/train_contrastive/{name}").expanduser()
    folder = folder.with_name(folder.name + "_dry_run") if args.dry_run else folder
    run = run.enter("" if args.eval_only or args.check_grad else folder, args.seed)
    stored = results = None
    if not args.check_grad:
        stored, results = find_start(run, folder, given, args)
    if results:
        if stored and args.export:
            state = State(run, model, args)
            state.load(run.load(folder / "checkpoint_best.pt") or stored, weights_only=True)
            with state.averaged():
                export(run, model, folder, args)
        return results

    sets = prepare(run, model, sets, folder, args)
    loader = make_pair_loader(sets["train"], args.batch_size, args.seed, args.captions, run.rank,
                              run.world_size, timeout=args.worker_timeout, **run.loader_options(
                                  0 if sets["train"].pixels and args.workers < 0 else args.workers))
    model = run.move(model).fuse_attention(run.fused_attention)
    tokens = tokenizer(sets["train"].captions, context_length=args.max_text)
    ids = identities(sets["train"])
    free = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.say(f"{args.model}: {free:,} of {sum(p.numel() for p in model.parameters()):,} weights "
            f"train, {len(loader)} steps an epoch of {args.batch_size} pairs, ln B "
            f"{math.log(args.batch_size):.3f}; {tokenizer.truncated} captions cut to "
            f"{args.max_text} tokens, {len(ids) - len(ids[:, 1].unique())} repeat another")
    for note in model.origin["notes"]:
        run.say(note)
    if args.check_grad:
        images, used, _ = next(iter(loader))
        training_mode(model, args, True)
        counts = [len(range(r, args.batch_size, run.world_size)) for r in range(run.world_size)]
        return check_grad(run, model, images, tokens[used], ids[used], counts, args)
    held = {split: Target(model, split, sets[split], tokenizer, args)
            for split in ("val", "test") if sets[split]}
    if args.cache == "features":
        loader = FeatureLoader(loader, pooled_features(
            run, model, sets["train"], folder.parent / "cache", args))
        for target in held.values():
            target.features = pooled_features(run, model, target.pairs, folder.parent / "cache",
                                              args)
    state = State(run, model, args)
    if stored:
        state.load(stored, weights_only=args.eval_only)
    if not args.eval_only:
        run.watch_signals()
        try:
            train(run, model, loader, tokens, ids, held.get("val"), state, args)
        finally:
            run.unwatch_signals()
    return report(run, model, state, held.get("test") or held.get("val"), tokenizer, folder, args)


if __name__ == "__main__":
    sys.exit(guard(main, get_args))
