"""A phone-size CLIP taught by a large one: its similarities, its embeddings, its text tower.

The student is a small image tower and the teacher's own text tower, frozen, so every caption is
encoded once and a step is the student's image tower alone. Per batch of N pairs, unit embeddings
u, v of the student and p, q of a teacher, scales s and t (`exp(logit_scale)`), rows and columns:

    task  1/2N sum CE(T, softmax(s u v^T)), T = pairs           InfoNCE, Radford et al. 2021
    crd   the same with T = 1/K sum_k softmax(t_k p_k q_k^T)    MobileCLIP, Vasu et al. 2024 §3.1;
          = KL to the teachers + a constant                     CRD in CLIP-KD, Yang et al. 2024
    fd    mean of 1 - cos(u, p), and of 1 - cos(v, q)           FD in CLIP-KD, free of its D
    icl   1/2N sum CE(pairs, rows of s' u q^T and s' v p^T)     ICL in CLIP-KD
    relation, hint, attention: maps inside the towers, see `Inside`; off, and fading when on
    loss = 0.25 task + 1 crd + 8 fd (+ 1 icl when a text tower is trained)

The teacher can be nearly free. `--write-reinforced` looks at a few random views of every image
once and keeps their numbers and the teacher's embeddings (Faghri et al. 2023); `--reinforced`
trains from them: the same losses, no teacher in the loop. DataCompDR's shards are read too.

    python train_distill.py                                   bundled teacher and demo, on a CPU
    python train_distill.py --teacher clip.pt --data flickr8k --data-dir DIR       a live teacher
    python train_distill.py --teacher clip.pt --data flickr8k --write-reinforced stored --views 10
    python train_distill.py --reinforced stored --data flickr8k --model mobilevit_xs
    torchrun --standalone --nproc-per-node 8 train_distill.py --teacher ViT-B/16 \
        --data shards/{000..127}.tar --model mobilenet_v3_small:IMAGENET1K_V1

`--batch-size` is always the batch that is compared, over all processes: in pieces (`--micro-batch`)
the loss and its gradient are computed tile by tile and handed back to each piece (GradCache, Gao et
al. 2021). Exact but for BatchNorm, whose statistics are those of a piece.

Different from the released codes, with the reason:
- teachers are averaged after each softmax, rows and columns apart; MobileCLIP's patch transposes
  the averaged softmax unless --local-loss, and its columns then do not sum to 1;
- FD is w (1 - cos), CLIP-KD's 2000 * MSE is 4000/D of it: 8 at D = 512 but 63 at D = 64;
- ICL's own scale is exponentiated, CLIP-KD's is not and stays at a temperature of 0.4;
- with a frozen text tower ICL, and FD of texts, repeat the task or are constant: switched off;
- Mixup and CutMix: the teacher sees the mixed image. A stored teacher's probabilities are mixed.
  Partners stand half a batch apart: the same for any number of processes that divides half of it;
- two images with an equal caption need no mask: equal texts are equal vectors, and share targets;
- a synthetic caption of DataCompDR is one of its image's captions, where MobileCLIP adds a loss.

On the demo the bundled teacher (44 % zero-shot: it never saw such pictures) teaches a student of
0.99 M weights to 49 % in 15 epochs, one seed; by `--task 1 --crd 0 --fd 0` on the pairs alone it
learned more in 8 (59 %). A teacher helps as far as it knows the pictures.

Logged: loss, its terms without their weights, scale, lr. Results: retrieval of student and teacher
on held-out pairs (%), zero_shot_..., image-tower parameters and latency (ms) of both.
"""
import contextlib
import copy
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import pathlib
import random
import re
import sys
import time
from typing import NamedTuple

from device import guard, load_checkpoint, Parser, SafeStop, start, UserError  # before torch,
import torch                                                          # which reads what it sets
import torch.nn.functional as F
from torch import nn

from clip_model import bucket, evaluating, inherit, load, save, trim, unit
from data import (classification_scores, find_shards, make_loader, make_pair_loader, normalise,
                  open_pairs, open_zero_shot, Preprocess, prompts_per_class, read_templates,
                  recall_at_k, sample_seed, ShardTeacher, source_weights, StoredPairs,
                  StoredTeacher, ViewItems, Views, zero_shot_weights)
from tokenizer import BPETokenizer, open_tokenizer, WordPieceTokenizer

DEFAULTS = {"epochs": 30, "batch_size": 256, "lr": 1e-3, "wd": 0.1, "warmup": 0.05, "crop": 0.4,
            "model": "mobilevit_xs", "beta2": 0.98}
DEMO = {"epochs": 15, "batch_size": 64, "lr": 2e-3, "crop": 0.7, "model": "mobilevit_xxs"}
TERMS = ("task", "crd", "fd", "icl", "relation", "hint", "attention")
MAX_SCALE = 100.0            # CLIP's clamp
ALIASES = {
    "--dataset": "--data", "--train-data": "--data", "--data-path": "--data",
    "--root": "--data-dir", "--backbone": "--model", "--arch": "--model", "--student": "--model",
    "--pretrained": "--weights", "--distill-model": "--teacher", "--max-epochs": "--epochs",
    "--learning-rate": "--lr", "--weight-decay": "--wd", "--warmup-steps": "--warmup",
    "--num-workers": "--workers", "--out-dir": "--output-dir", "--output": "--output-dir",
    "--max-grad-norm": "--grad-clip", "--zeroshot": "--zero-shot", "--smoke": "--dry-run",
    "--accum-freq": "--accum-steps", "--gradient-accumulation-steps": "--accum-steps",
    "--distill-logit-scale": "--teacher-scale", "--distill-teacher-dimension": "--teacher-dims",
    "--train-data-upsampling-factors": "--upsample",
}


def get_args(argv=None):
    """The command line as a namespace. Exits with code 2 and one line on a wrong one."""
    parser = Parser(description="A small CLIP taught by large ones.", aliases=ALIASES,
                    epilog="example: python train_distill.py --data flickr8k --teacher clip.pt "
                    "--model mobilevit_xs")
    add_data_flags(parser.add_argument_group("data"))
    add_model_flags(parser.add_argument_group("model"))
    add_teacher_flags(parser.add_argument_group("teachers"))
    add_method_flags(parser.add_argument_group("method"))
    add_run_flags(parser.add_argument_group("run"))
    args = parser.parse_args(argv)
    refuse_bad_flags(parser, args)
    return args


def add_data_flags(group):
    group.add_argument("--data", default="demo", help="flickr8k, flickr30k, coco, a folder (of "
                       "class folders too, whose names become captions), shards "
                       "({0000..0012}.tar, several joined by ::) or a CSV/TSV/JSONL file "
                       "(default: demo)")
    group.add_argument("--data-dir", default="data", help="where named data lies (default: data)")
    group.add_argument("--layout", default="auto", help="how the folder is to be read")
    group.add_argument("--caption-file", help="another caption file of the folder")
    group.add_argument("--image-column", help="default: found by name")
    group.add_argument("--caption-column", help="default: found by name")
    group.add_argument("--upsample", metavar="A::B", help="draw pairs with replacement, those of "
                       "each source of --data with this weight (default: each once an epoch)")
    group.add_argument("--crop", type=float, help="smallest share of an image that a view keeps; "
                       "0: the whole image, always (default: 0.4)")
    group.add_argument("--randaugment", type=int, default=0, metavar="N", help="distortions of a "
                       "view, RandAugment's (default: 0; MobileCLIP: 2)")
    group.add_argument("--cache", choices=("ram", "disk", "none"), default="ram",
                       help="decoded images, short side 8/7 of the largest model's (default: ram)")
    group.add_argument("--cache-gb", type=float, default=8.0, help="give the cache up beyond "
                       "(default: 8)")
    group.add_argument("--max-samples", type=int, help="train on the first images alone")
    group.add_argument("--zero-shot", nargs="+", default=[], metavar="DATA", help="labelled data "
                       "sets to classify: a name (imagenet, imagenetv2, imagenet-a, ...), a folder "
                       "of class folders, or one of CLIP_benchmark")
    group.add_argument("--templates", nargs="+", default=[], help="prompts with {} or {c}, or a "
                       "file of them (default: the data set's own)")
    group.add_argument("--workers", type=int, default=-1, help="processes that read images "
                       "(default: -1: none beside a cache in memory, else up to 4)")


def add_model_flags(group):
    group.add_argument("--model", help="the student's image tower: mobilevit_xxs/xs/s, ViT-T/16, "
                       "tiny, a CLIP's file, or a torchvision classifier as NAME, "
                       "NAME:IMAGENET1K_V1 or NAME:FILE (default: mobilevit_xs)")
    group.add_argument("--weights", help="a student to start from, instead of --model")
    group.add_argument("--image-size", type=int, help="pixels per side (default: the tower's own; "
                       "the teacher's if that is less)")
    group.add_argument("--text-tower", default="teacher", help="teacher: the first teacher's, or a "
                       "tower to train, as a folder of the BERT family or NAME:none (default: "
                       "teacher)")
    group.add_argument("--train-text", action="store_true", help="train the teacher's text tower "
                       "on instead of freezing it")
    group.add_argument("--tokenizer", help="folder of the text tower's vocabulary")
    group.add_argument("--embed-dim", type=int, help="default: the first teacher's")
    group.add_argument("--shared-proj", choices=("off", "frozen", "train"), default="off",
                       help="the text tower's projection for images too, after an adapter where "
                       "the widths differ; its weights as the teacher's or trained (default: off)")
    group.add_argument("--inherit", action="store_true", help="start from slices of the teacher's "
                       "weights, for a student of its family (TinyCLIP)")
    group.add_argument("--bn", choices=("auto", "freeze", "chunk"), default="auto",
                       help="BatchNorm: statistics frozen, or of each piece (default: auto: of "
                       "each piece, but frozen if the tower is pretrained and comes in pieces)")
    group.add_argument("--max-text", type=int, default=77, help="tokens (default: 77)")


def add_teacher_flags(group):
    group.add_argument("--teacher", nargs="+", default=[], help="one CLIP or several: names, files "
                       "or folders (default: the bundled one for the demo; a stored teacher's own)")
    group.add_argument("--teacher-scale", nargs="+", type=float, default=[], help="scale of "
                       "each (default: the scale it learned)")
    group.add_argument("--teacher-activation", choices=("quick_gelu", "gelu"), help="where its "
                       "file does not tell: gelu for LAION's")
    group.add_argument("--teacher-tokenizer", help="folder of the vocabulary, for a teacher whose "
                       "own folder has none")
    group.add_argument("--eval-teacher", action="store_true", help="score the teachers first")
    group.add_argument("--write-reinforced", metavar="DIR", help="store the teachers' embeddings "
                       "of --views views of the training images, and stop")
    group.add_argument("--views", type=int, default=10, help="stored views of an image (default: "
                       "10)")
    group.add_argument("--store-precision", choices=("fp32", "fp16"), default="fp32",
                       help="of the stored embeddings (default: fp32)")
    group.add_argument("--reinforced", metavar="DIR", help="train from a stored teacher: a folder "
                       "of --write-reinforced, or DataCompDR's shards, {0000..0012}.tar")
    group.add_argument("--teacher-dims", nargs="+", type=int, default=[], help="where the "
                       "embeddings in shards are cut (DataCompDR: 768 768)")
    group.add_argument("--views-in-turn", action="store_true", help="an epoch shows the stored "
                       "view of its own number instead of a drawn one")
    group.add_argument("--live", action="store_true", help="ask the teachers although their "
                       "answers are stored, to compare")
    group.add_argument("--text-teacher", metavar="FOLDER", help="a BERT whose similarities of "
                       "captions soften the task's targets; with a trained text tower they teach "
                       "it their relations instead")
    group.add_argument("--text-teacher-weight", type=float, default=0.2, help="share of "
                       "the targets that it softens, or weight of the relations (default: 0.2)")
    group.add_argument("--text-teacher-temp", type=float, default=0.1, help="temperature of its "
                       "similarities (default: 0.1)")
    group.add_argument("--ema-teacher", type=float, default=0.0, metavar="W", help="weight of the "
                       "student's own average as one more teacher, at most 0.5 (default: 0)")


def add_method_flags(group):
    group.add_argument("--task", type=float, default=0.25, help="weight of InfoNCE on the pairs "
                       "(default: 0.25)")
    group.add_argument("--crd", type=float, default=1.0, help="weight of the teachers' "
                       "similarities, as soft targets (default: 1)")
    group.add_argument("--fd", type=float, default=8.0, help="weight of 1 - cos to the teachers' "
                       "embeddings (default: 8)")
    group.add_argument("--icl", type=float, help="weight of InfoNCE against the teachers' "
                       "embeddings (default: 1 if text is trained, else 0)")
    group.add_argument("--relation", type=float, default=0.0, help="weight of the cosines between "
                       "places of the towers' maps (default: 0)")
    group.add_argument("--hint", type=float, default=0.0, help="weight of 1 - cos between the maps "
                       "(default: 0)")
    group.add_argument("--attention", type=float, default=0.0, help="weight of where the towers "
                       "look (default: 0)")
    group.add_argument("--inside-until", type=float, default=0.5, help="share of the training "
                       "after which the three above have faded to 0 (default: 0.5)")
    group.add_argument("--mixup", type=float, default=0.0, help="alpha of Beta (default: 0, off)")
    group.add_argument("--cutmix", type=float, default=0.0, help="alpha of Beta (default: 0, off)")
    group.add_argument("--mix-prob", type=float, default=0.5, help="share of the steps that mix, "
                       "with either if both are on (default: 0.5)")
    group.add_argument("--epochs", type=int, help="default: 30; 15 for the demo")
    group.add_argument("--max-steps", type=int, default=0, help="stop earlier")
    group.add_argument("--batch-size", type=int, help="pairs compared per step, over all processes "
                       "(default: 256)")
    group.add_argument("--micro-batch", type=int, default=0, help="pairs encoded at a time per "
                       "process; the gradient stays the batch's (default: 0: all)")
    group.add_argument("--accum-steps", type=int, default=1, help="another way to say it: "
                       "batch-size / accum-steps in memory, still one batch to the loss")
    group.add_argument("--tile", type=int, default=1024, help="side of a loss tile (default: 1024)")
    group.add_argument("--lr", type=float, help="default: 1e-3; 2e-3 for the demo")
    group.add_argument("--wd", type=float, help="on matrices and kernels (default: 0.1)")
    group.add_argument("--beta2", type=float, help="of AdamW (default: 0.98)")
    group.add_argument("--warmup", type=float, help="steps, or below 1 a share of all (default: "
                       "0.05)")
    group.add_argument("--schedule", choices=("cosine", "linear", "constant"), default="cosine",
                       help="of the learning rate (default: cosine)")
    group.add_argument("--grad-clip", type=float, default=1.0, help="largest norm (default: 1; 0: "
                       "none)")
    group.add_argument("--ema", type=float, default=0.0, help="decay of averaged weights, which "
                       "are then evaluated and exported (default: 0, off)")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                       help="of the towers; the loss is fp32 (default: auto)")


def add_run_flags(group):
    group.add_argument("--device", default="auto", help="auto, cuda, mps, npu or cpu; refused when "
                       "absent (default: auto)")
    group.add_argument("--seed", type=int, default=1, help="default: 1")
    group.add_argument("--output-dir", default="", help="default: runs/train_distill/...")
    group.add_argument("--resume", default="auto", help="auto, none, or a checkpoint's path")
    group.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    group.add_argument("--eval-only", action="store_true", help="score the student and stop")
    group.add_argument("--eval-batch-size", type=int, default=256, help="images (default: 256)")
    group.add_argument("--eval-every", type=int, default=1, metavar="EPOCHS",
                       help="score held-out pairs so often (default: 1)")
    group.add_argument("--dry-run", action="store_true", help="three steps and every score, into "
                       "a folder of its own, ..._dry_run")
    group.add_argument("--export", nargs="+", default=[], choices=("safetensors", "onnx"),
                       help="also write the student so, beside student_export.pt")
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
    """Exit with one line on values and pairs of flags that make no sense; fill the defaults."""
    for name, low in (("epochs", 1), ("batch_size", 2), ("micro_batch", 0), ("tile", 1),
                      ("accum_steps", 1), ("eval_batch_size", 1), ("log_every", 1), ("views", 1),
                      ("save_every", 0), ("workers", -1), ("worker_timeout", 1), ("grad_clip", 0),
                      ("warmup", 0), ("max_steps", 0), ("eval_every", 1), ("skip_steps", 0),
                      ("max_text", 3), ("embed_dim", 1), ("max_samples", 2), ("wd", 0), ("seed", 0),
                      ("image_size", 8), ("randaugment", 0), ("mixup", 0), ("cutmix", 0),
                      ("cache_gb", 0), *((term, 0) for term in TERMS)):
        value = getattr(args, name)
        if value is not None and not low <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')} is {value}; expected at least {low}")
    for name, high in (("crop", 1), ("mix_prob", 1), ("ema", 0.999999), ("ema_teacher", 0.5),
                       ("text_teacher_weight", 1), ("inside_until", 1)):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= high:
            parser.error(f"--{name.replace('_', '-')} is {value}; expected from 0 to {high:g}")
    for name, high in (("lr", 1e3), ("beta2", 1), ("text_teacher_temp", 100)):
        value = getattr(args, name)
        if value is not None and not 0 < value < high:
            parser.error(f"--{name.replace('_', '-')} is {value}; expected between 0 and {high:g}")
    if args.seed >= 2 ** 32:
        parser.error(f"--seed is {args.seed}; expected below 4294967296")
    if any(not 0 < scale <= 1000 for scale in args.teacher_scale):
        parser.error("--teacher-scale takes numbers above 0, 100 for OpenAI's CLIP")
    if args.accum_steps > 1 and "micro_batch" in parser.given:
        parser.error("--micro-batch and --accum-steps say the same thing twice; give one")
    if args.ema_teacher and not args.ema:
        parser.error("--ema-teacher needs --ema, the decay of the average that teaches")
    if args.shared_proj == "train" and args.text_tower == "teacher" and not args.train_text:
        parser.error("--shared-proj train moves every text embedding, and those of a frozen text "
                     "tower are computed once; take --shared-proj frozen, or --train-text too")
    if args.randaugment and args.crop == 0:
        parser.error("--randaugment distorts the random crops that --crop 0 turns off; give one")
    if args.reinforced and args.write_reinforced:
        parser.error("--write-reinforced and --reinforced: write first, then train")
    if args.reinforced and not args.live and args.relation + args.hint + args.attention:
        parser.error("--relation, --hint and --attention compare with a live teacher's maps; a "
                     "stored teacher has embeddings alone")
    if not args.teacher and not args.reinforced and args.data != "demo":
        parser.error("--teacher is missing: a CLIP's name, file or folder")
    for name, value in {**DEFAULTS, **(DEMO if args.data == "demo" else {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.teacher = args.teacher or (["tiny"] if args.data == "demo" and not args.reinforced else [])


# -----------------------------------------------------------------------------
# Mixing

class Mix(NamedTuple):
    """One share and one box for the whole batch, so that targets stay distributions both ways. A
    pair's partner stands half of this process's pairs further on, which is half the batch."""
    share: float = 1.0        # of the pair itself
    box: tuple | None = None  # CutMix: top, left, bottom, right, each from 0 to 1

    def partners(self, n):
        return (torch.arange(n) + n // 2) % n

    def blend(self, x):
        """(n, ...) of each image's own, mixed as the images are."""
        return x if self.share == 1 else torch.lerp(x[self.partners(len(x))], x, self.share)

    def back(self, x):
        """The transposed mixture: for each text, of the images that show a share of its own."""
        n = len(x)
        return x if self.share == 1 else torch.lerp(x[self.partners(n).argsort()], x, self.share)

    def view(self, run, images, rows, model):
        """Rows of uint8 images (n, 3, S, S) -> as `model` takes them, mixed, on the device."""
        own = normalise(run.move(images[rows]), model.image_mean, model.image_std)
        if self.share == 1:
            return own
        other = normalise(run.move(images[self.partners(len(images))[rows]]), model.image_mean,
                          model.image_std)
        if self.box is None:
            return torch.lerp(other, own, self.share)
        top, left, bottom, right = (round(edge * own.shape[-1]) for edge in self.box)
        own[..., top:bottom, left:right] = other[..., top:bottom, left:right]
        return own


def draw_mix(args, step, size):
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) of one step, a function of the seed.
    CutMix's share is that of the pixels which stay, in an image of `size`."""
    draw = random.Random(sample_seed(args.seed, 2, step))
    if not args.mixup + args.cutmix or draw.random() >= args.mix_prob:
        return Mix()
    if args.mixup and (not args.cutmix or draw.random() < 0.5):
        return Mix(draw.betavariate(args.mixup, args.mixup))
    half = size * math.sqrt(1 - draw.betavariate(args.cutmix, args.cutmix)) / 2
    y, x = draw.randrange(size), draw.randrange(size)
    top, bottom, left, right = (min(size, max(0, round(edge))) for edge in (
        y - half, y + half, x - half, x + half))
    return Mix(1 - (bottom - top) * (right - left) / size ** 2,
               tuple(edge / size for edge in (top, left, bottom, right)))


# -----------------------------------------------------------------------------
# The losses on embeddings and their gradients, tile by tile: memory is a few tiles and vectors of
# length N. Each process has its part of a value; the sum over processes is the whole.

class Sides(NamedTuple):
    """What is compared: unit rows, and row `first + i` of text belongs to image i."""
    image: torch.Tensor       # (n, D), this process's
    text: torch.Tensor        # (N, D), of all processes in rank order
    first: int = 0
    run: object = None        # to merge over processes; None when this process stands alone

    @property
    def own(self):
        return slice(self.first, self.first + len(self.image))

    def merge(self, x):
        """(..., N) here -> (W, ..., N) of all processes."""
        return x[None] if self.run is None else self.run.gather(x[None].contiguous())

    def tiles(self, size):
        for r in range(0, len(self.image), size):
            for c in range(0, len(self.text), size):
                yield slice(r, r + size), slice(c, c + size)


class Target(NamedTuple):
    """A teacher's similarities scale * image @ text.T, whose softmax over each row and over each
    column is to be matched with this weight. Rows as in Sides; any width."""
    name: str
    weight: float
    image: torch.Tensor
    text: torch.Tensor
    scale: torch.Tensor | float


class Gradients(NamedTuple):
    """Of a sum of losses: the gradient for this process's images is whole, for texts its part."""
    image: torch.Tensor                # (n, D)
    text: torch.Tensor                 # (N, D)
    scale: torch.Tensor | float = 0.0


def affinity(name, scales, images, texts, weight, mix, stored):
    """CRD: targets of K teachers, averaged after the softmax (each row then sums to 1 both ways).

    A stored teacher has not seen the mixed images: its probabilities for an image and for the
    partner are mixed instead, which for one share over a permutation stay distributions.
    """
    targets, weight = [], weight / len(scales)
    for scale, image, text in zip(scales, images, texts):
        share = mix.share if stored else 1.0
        targets.append(Target(name, weight * share, image, text, scale))
        if share < 1:
            partner = image[mix.partners(len(image)).to(image.device)]
            targets.append(Target(name, weight * (1 - share), partner, text, scale))
    return targets


def match_similarities(sides, scale, task, targets, mix, tile, text_moves=True):
    """`task` * InfoNCE + sum of weight * cross-entropy to each target, value and gradient.

    z = scale * image @ text.T, and for each term with its targets T (of rows) and T' (of columns)

        1/2N [sum_i (lse_j z_ij - sum_j T_ij z_ij) + sum_j (lse_i z_ij - sum_i T'_ij z_ij)]
        dz = (weights * (softmax of the row + softmax of the column) - sum weight (T + T')) / 2N

    InfoNCE's T are the pairs, or with Mixup share * pairs + (1 - share) * partners. The first sweep
    over the tiles finds every log-sum-exp, the second computes the tiles again for dz. One softmax
    of the student serves all terms: a teacher costs its own two products per tile.
    -> Gradients, {name: weighted value}
    """
    image, text, own, (n, N) = sides.image, sides.text, sides.own, (len(sides.image),
                                                                    len(sides.text))
    logits = [(image, text, scale)] + [(t.image, t.text, t.scale) for t in targets]
    rows = image.new_full((len(logits), n), -math.inf)
    columns = image.new_full((len(logits), N), -math.inf)

    def product(k, r, c):
        rows_of, columns_of, times = logits[k]
        return (rows_of[r] @ columns_of[c].T).mul_(times)
    for r, c in sides.tiles(tile):
        for k in range(len(logits)):
            z = product(k, r, c)
            rows[k, r] = torch.logaddexp(rows[k, r], z.logsumexp(dim=1))
            columns[k, c] = torch.logaddexp(columns[k, c], z.logsumexp(dim=0))
    columns = sides.merge(columns).logsumexp(dim=0)
    norms = rows[0].sum() + columns[0, own].sum()

    pairs = mix.blend(text[own])                                       # (n, D), what T asks for
    values = {"task": task * (norms - 2 * scale * (image * pairs).sum())}
    d_image, d_text = pairs.mul(-2 * task), torch.zeros_like(text)
    d_text[own] = mix.back(image).mul(-2 * task)
    total = task + sum(t.weight for t in targets)
    for t in targets:
        values[t.name] = values.get(t.name, 0.0) + t.weight * norms
    for r, c in sides.tiles(tile):
        z = product(0, r, c)
        dz = (z - rows[0, r, None]).exp_().add_((z - columns[0, c]).exp_()).mul_(total)
        for k, t in enumerate(targets, 1):
            y = product(k, r, c)
            y = (y - rows[k, r, None]).exp_().add_(y.sub_(columns[k, c]).exp_())
            values[t.name] -= t.weight * (y * z).sum()
            dz.sub_(y, alpha=t.weight)
        d_image[r] += dz @ text[c]
        if text_moves:
            d_text[c] += dz.T @ image[r]
    d_scale = torch.einsum("nd,nd->n", image, d_image).sum() / (2 * N)
    return Gradients(d_image.mul_(scale / (2 * N)), d_text.mul_(scale / (2 * N)), d_scale), {
        name: value / (2 * N) for name, value in values.items()}


def match_keys(anchors, keys, pairs, scale, tile):
    """ICL's one direction, InfoNCE from anchors (n, D) to a teacher's N keys, 1/2N in front; pairs
    (n, D): the keys that belong to them. -> value, its gradient for the anchors, for the scale."""
    norms = anchors.new_full((len(anchors),), -math.inf)
    chunks = torch.arange(len(keys), device=keys.device).split(tile)
    for c in chunks:
        norms = torch.logaddexp(norms, (scale * anchors @ keys[c].T).logsumexp(dim=1))
    gradient = -pairs
    for c in chunks:
        gradient = gradient + (scale * anchors @ keys[c].T - norms[:, None]).exp_() @ keys[c]
    value = norms.sum() - scale * (anchors * pairs).sum()
    return value, gradient * scale, (anchors * gradient).sum()


def text_relation(sides, other, temperature, tile):
    """KL of the captions' similarities to those that a text-only teacher sees, without the pair of
    a caption with itself: 1/N sum_i KL(softmax(r_i / tau) || softmax(v_i v^T / tau)), r the
    similarities of `other` (N, D'). -> value, gradient for the texts (N, D), a part."""
    own, text, first = sides.own, sides.text, sides.first
    value, d_text = text.new_zeros(()), torch.zeros_like(text)
    for start in range(own.start, own.stop, tile):
        some = slice(start, min(start + tile, own.stop))               # m rows, against all N
        itself = torch.arange(some.start, some.stop, device=text.device)
        itself = itself - some.start, itself
        z, y = text[some] @ text.T / temperature, other[some] @ other.T / temperature
        z[itself] = y[itself] = -math.inf
        p, goal = z.log_softmax(dim=1), y.log_softmax(dim=1)
        p[itself] = goal[itself] = 0.0
        weight = goal.exp()
        weight[itself] = 0.0
        value += (weight * (goal - p)).sum()
        dz = p.exp()
        dz[itself] = 0.0
        dz = (dz - weight) / (temperature * len(text))
        d_text[some] += dz @ text
        d_text += dz.T @ text[some]
    return value / len(text), d_text


def distance(features, goals):
    """FD: sum over rows of 1 - cos, which is half the squared distance of the unit vectors and
    depends on neither their length nor their number D of components."""
    return (1 - F.cosine_similarity(features, goals, dim=-1)).sum()


class Adapters(nn.Module):
    """What the losses learn and the student does not keep: a linear map to each teacher's width
    where it differs, and ICL's scale."""

    def __init__(self, dim, dims, text_moves):
        super().__init__()
        self.image = nn.ModuleList(nn.Identity() if d == dim else nn.Linear(dim, d) for d in dims)
        self.text = nn.ModuleList(nn.Identity() if d == dim else nn.Linear(dim, d) for d in dims
                                  if text_moves)
        self.icl_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, sides, image, text, answers, all_answers, keys, weights, mix, stored, tile):
        """FD and ICL of the leaves image (n, D) and text (n, D), or None if it is frozen, against
        the teachers' answers for these images (n, D_k), those of all processes (N, D_k), and their
        texts `keys` (N, D_k). A stored teacher's answers are of the images before mixing.
        -> a sum with its graph, {name: weighted value}, the gradient for `icl_scale`."""
        own, N, K = sides.own, len(sides.text), len(keys)
        total, values, d_scale = 0.0, {"fd": 0.0, "icl": 0.0}, 0.0
        scale = self.icl_scale.detach().exp()
        for k in range(K):
            goals = unit(mix.blend(answers[k])) if stored and mix.share < 1 else answers[k]
            there = [(self.image[k](image), goals, keys[k], mix.blend(keys[k][own]))]
            if text is not None:
                there.append((self.text[k](text), keys[k][own], all_answers[k],
                              answers[k] if stored else mix.back(answers[k])))
            for features, goals, others, pairs in there:
                near = weights["fd"] * distance(features, goals) / (N * K)
                values["fd"] += near.detach()
                total = total + near
                if weights["icl"]:
                    features = unit(features)
                    value, gradient, d = match_keys(features.detach(), others, pairs, scale, tile)
                    part = weights["icl"] / (2 * N * K)
                    total = total + part * (features * gradient).sum()
                    values["icl"] += part * value
                    d_scale = d_scale + part * d * scale
        return total, values, d_scale


# -----------------------------------------------------------------------------
# Losses on maps inside the image towers: of each image by itself, so exact in pieces

class Inside(nn.Module):
    """The student's map of features against the teacher's, on the coarser of their two grids
    (h, w), P = hw places; both are averaged down to it. Means over the images of

        relation   mean of (G - G')^2, G the P x P cosines between places     no adapter is needed
        hint       1 - cos(adapter(map), LayerNorm(teacher's map)), mean of P  FitNets, Romero 2015
        attention  KL(a' || a), a the energy sum_c map^2 of a place over that of all (Zagoruyko and
                   Komodakis 2017), a' how the teacher's class token attends, or a CNN's energy

    A ViT's map is its last block's input without the class token. In a CNN it is the deepest one
    whose grid is not coarser than the teacher's.
    """

    def __init__(self, student, teacher, weights):
        super().__init__()
        self.weights, self.attends = weights, hasattr(teacher.visual, "class_embedding")
        shapes = {}
        for side, model in (("teacher", teacher), ("student", student)):
            if not getattr(model.visual, "tap_channels", None):
                raise UserError(f"--relation, --hint and --attention need maps inside the "
                                f"{side}'s image tower: {type(model.visual).__name__} has none")
            size = model.config.image_size
            with torch.no_grad(), evaluating(model):
                maps = model.visual.taps(torch.zeros(
                    1, 3, size, size, device=model.logit_scale.device)).maps
            shapes[side] = sorted(((x.shape[-1], tap, x.shape) for tap, x in maps.items()))
        self.teacher_tap = shapes["teacher"][0][1]
        side = shapes["teacher"][0][0]
        fine = [some for some in shapes["student"] if some[0] >= side] or shapes["student"][-1:]
        self.student_tap, self.grid = fine[0][1], min(side, fine[0][0])
        self.hint = nn.Conv2d(fine[0][2][1], shapes["teacher"][0][2][1], 1) if weights["hint"] \
            else None

    def pool(self, x):
        return F.adaptive_avg_pool2d(x.float(), self.grid)

    @torch.no_grad()
    def look(self, visual, images):
        """The teacher's forward -> its embeddings (m, D), map (m, C, h, w), attention (m, P)."""
        taps = visual.taps(images, (self.teacher_tap,), (-1,) if self.attends else ())
        map_ = taps.maps[self.teacher_tap]
        energy = map_.float().square().sum(dim=1, keepdim=True)
        if self.attends:
            energy = taps.attention[-1].float().mean(dim=1)[:, 1:].view_as(energy)
        energy = self.pool(energy).flatten(1)
        return taps.embedding, self.pool(map_), energy / energy.sum(dim=1, keepdim=True)

    def forward(self, map_, goal, attention):
        """Student's map, and what `look` said of the same images -> {name: sum over images}."""
        ours, found = self.pool(map_), {}
        if self.weights["relation"]:
            one, two = (F.normalize(x.flatten(2), dim=1) for x in (ours, goal))   # (m, C, P)
            found["relation"] = (one.mT @ one - two.mT @ two).square().mean(dim=(1, 2)).sum()
        if self.weights["hint"]:
            goal = F.layer_norm(goal.movedim(1, -1), goal.shape[1:2]).movedim(-1, 1)
            found["hint"] = (1 - F.cosine_similarity(self.hint(ours), goal, dim=1)).mean(
                dim=(1, 2)).sum()
        if self.weights["attention"]:
            energy = self.pool(map_.float().square().sum(dim=1, keepdim=True)).flatten(1)
            log = (energy + 1e-12).log() - (energy + 1e-12).sum(dim=1, keepdim=True).log()
            found["attention"] = F.kl_div(log, attention, reduction="sum")
        return found


# -----------------------------------------------------------------------------
# One exact step

class Teacher:
    """A CLIP that answers; its captions' embeddings (M, D) are computed once. Without `model` its
    answers are stored."""

    def __init__(self, name, scale, dim, model=None, tokenizer=None, size=0):
        self.name, self.scale, self.dim, self.model = name, scale, dim, model
        self.tokenizer, self.size, self.texts = tokenizer, size, None

    @torch.no_grad()
    def look(self, run, images, parts, mix, inside=None):
        """Unit embeddings (n, D) of mixed images, and what `inside` looks at."""
        found = []
        for rows in parts:
            x = mix.view(run, images, rows, self.model)
            with run.autocast():
                found.append(inside.look(self.model.visual, x) if inside else
                             (self.model.encode_image(x),))
        columns = [torch.cat(column) for column in zip(*found)]
        return unit(columns[0]), columns[1:]


class Batch(NamedTuple):
    """This process's n pairs, on the host; K teachers."""
    images: tuple                  # (n, 3, S, S) uint8 for each size in use
    tokens: torch.Tensor | None    # (n, L), for a text tower that trains
    text: torch.Tensor | None      # (n, D), the student's texts where they are frozen
    answers: list                  # K times stored image embeddings (n, D_k), or None: ask
    keys: list                     # K times text embeddings (n, D_k)
    other: torch.Tensor | None     # (n, D') of the text-only teacher


class Encoder:
    """Unit features of pieces of a batch, twice with the same random numbers. What the losses
    inside the tower say of a piece comes with it, and their values are kept in `values`."""

    def __init__(self, run, model, seed, mix=Mix(), inside=None, seen=(), weights=None):
        self.run, self.model, self.seed, self.mix = run, model, seed, mix
        self.inside, self.seen, self.weights, self.values = inside, seen, weights, {}

    def image(self, piece):
        images, rows = piece
        x = self.mix.view(self.run, images, rows, self.model)
        if not self.inside:
            return self.model.encode_image(x, normalize=True), 0.0
        taps = self.model.visual.taps(x, (self.inside.student_tap,))
        more = 0.0
        if torch.is_grad_enabled():  # once for each piece
            terms = self.inside(taps.maps[self.inside.student_tap], *(s[rows] for s in self.seen))
            for name, value in terms.items():
                more = more + self.weights[name] * value
                self.values[name] = self.values.get(name, 0.0) + (
                    self.weights[name] * value.detach())
        return unit(taps.embedding), more

    def text(self, piece):
        tokens, ends = self.run.move(*piece)
        return self.model.encode_text(tokens, normalize=True, ends=ends), 0.0

    def one(self, kind, number, piece):
        # Dropout of a piece is drawn from its own seed, so that the second time repeats the first.
        torch.manual_seed(((self.seed * 2 + (kind == "text")) * 65_537 + number) % 2 ** 63)
        with self.run.autocast():
            return getattr(self, kind)(piece)

    def all(self, kind, parts):
        """Features of all pieces, (n, D) without graph; and the last piece's with its graph: its
        second pass is spared."""
        out = []
        for number, piece in enumerate(parts):
            last = number == len(parts) - 1
            still = contextlib.nullcontext() if last else still_statistics(self.model)
            with torch.set_grad_enabled(last), still:
                out.append(self.one(kind, number, piece))
        return torch.cat([x.detach() for x, _ in out]), out[-1]

    def backward(self, kind, parts, last, gradient, times):
        """Send the gradient (n, D) into the tower, and `times` what was found inside; `last` is
        what `all` kept."""
        sizes = [len(p[0]) if kind == "text" else len(range(len(p[0]))[p[1]]) for p in parts]
        *shares, share = gradient.split(sizes)
        (last[1] * times + (last[0] * share).sum()).backward()
        for number, (piece, share) in enumerate(zip(parts, shares)):
            features, more = self.one(kind, number, piece)
            (more * times + (features * share).sum()).backward()


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


def text_pieces(tokens, micro, pad_id):
    """(n, L) cut for encoding -> [((m, L'), ends)] sorted by length so that short texts do not pay
    for long ones, and the places that undo the sorting."""
    order = trim(tokens, pad_id)[1].argsort(stable=True)
    return [trim(part, pad_id) for part in tokens[order].split(micro)], order.argsort()


def add_gradient(run, model, losses, teachers, batch, counts, weights, mix, args, scaler, seed,
                 average=None):
    """Add the gradient of the batch over all processes to `.grad`, this process's part of it; the
    sum over processes is the gradient. -> the loss and its terms, () each, this process's part.

    losses: (Adapters, Inside or None); counts: pairs in each process; weights: of the terms, now;
    average: the averaged student, where it teaches too.
    """
    adapters, inside = losses
    if not weights["relation"] + weights["hint"] + weights["attention"]:
        inside = None  # they have faded
    n, N, alone = len(batch.images[0]), sum(counts), run.world_size == 1
    micro = args.micro_batch or max(1, n)
    parts = [slice(i, min(i + micro, n)) for i in range(0, n, micro)]
    text_moves, stored = batch.text is None, batch.answers[0] is not None
    answers, seen = ask(run, teachers, batch, parts, mix, inside, weights)
    encoder = Encoder(run, model, seed * run.world_size + run.rank, mix, inside, seen, weights)
    images = [(batch.images[0], rows) for rows in parts]
    image, last_image = encoder.all("image", images)                             # (n, D)
    if text_moves:
        texts, places = text_pieces(batch.tokens, micro,
                                    model.pad_id if model.config.text else None)
        text, last_text = encoder.all("text", texts)
        text = text[run.move(places)]
    else:
        text = run.move(batch.text)

    # ---- the losses on embeddings, in fp32 over all processes ------------------------------------
    with torch.no_grad():
        gather = (lambda x: x) if alone else (lambda x: run.gather(x, counts))
        sides = Sides(image, gather(text), sum(counts[:run.rank]), None if alone else run)
        scale = model.logit_scale.exp()
        keys = [gather(run.move(k)) for k in batch.keys]
        answered = answers[0] is not None
        targets = affinity("crd", [t.scale for t in teachers], answers, keys, weights["crd"], mix,
                           stored) if weights["crd"] and answered else []
        task, other = weights["task"], None
        if batch.other is not None:
            other = gather(run.move(batch.other))
            if not text_moves:  # a part of the hard targets is softened
                part = task * args.text_teacher_weight
                targets += affinity("task", [1 / args.text_teacher_temp], [other[sides.own]],
                                    [other], part, mix, stored=True)
                task -= part
        if average is not None and weights["ema"]:
            targets.append(look_average(run, average, batch, parts, mix, sides, gather,
                                        weights["ema"]))
        found, terms = match_similarities(sides, scale, task, targets, mix, args.tile, text_moves)
        d_text = found.text
        if other is not None and text_moves:
            value, gradient = text_relation(sides, other, args.text_teacher_temp, args.tile)
            terms["text_relation"] = args.text_teacher_weight * value
            d_text = d_text + args.text_teacher_weight * gradient
        if text_moves:
            d_text = (d_text if alone else run.sum(d_text))[sides.own]
    send = scaler.scale(image.new_full((), 1.0))
    leaves = [image.requires_grad_(), text.detach().requires_grad_() if text_moves else None]
    if answered and weights["fd"] + weights["icl"]:
        others = [gather(x) for x in answers] if weights["icl"] and text_moves else keys
        total, more, d_icl = adapters(sides, *leaves, answers, others, keys, weights, mix, stored,
                                      args.tile)
        (total * send).backward()
        terms |= more
        add_to(adapters.icl_scale, d_icl * send)
    # ----------------------------------------------------------------------------------------------

    add_to(model.logit_scale, found.scale * scale * send)
    gradients = [g * send if leaf is None or leaf.grad is None else g * send + leaf.grad
                 for g, leaf in zip((found.image, d_text), leaves)]
    if text_moves:
        encoder.backward("text", texts, last_text, gradients[1][run.move(places.argsort())], send)
    encoder.backward("image", images, last_image, gradients[0], send / N)
    terms |= {name: value / N for name, value in encoder.values.items()}
    whole = sum(terms.values())
    return {"loss": whole, **{name: value / weights[name] for name, value in terms.items()
                              if weights.get(name)}}


def ask(run, teachers, batch, parts, mix, inside, weights):
    """What the teachers say of the mixed images -> a list of unit embeddings (n, D_k), stored or
    asked for, or None where no term needs them; and what `inside` looks at in the first teacher."""
    answers, seen = [], ()
    needed = any(weights[term] for term in ("crd", "fd", "icl"))
    for k, (teacher, stored) in enumerate(zip(teachers, batch.answers)):
        first = inside if k == 0 else None
        if stored is not None:
            answers.append(run.move(stored))
        elif needed or first is not None:
            answer, maps = teacher.look(run, batch.images[teacher.size], parts, mix, first)
            answers.append(answer)
            seen = maps if first is not None else seen
        else:
            answers.append(None)
    return answers, seen


def look_average(run, average, batch, parts, mix, sides, gather, weight):
    """The averaged student as one more teacher of similarities, on the same mixed images."""
    rows = []
    for part in parts:
        with run.autocast():
            rows.append(average.encode_image(mix.view(run, batch.images[0], part, average)))
    text = sides.text
    if batch.text is None:
        with run.autocast():
            text = gather(unit(average.encode_text(run.move(batch.tokens))))
    return Target("ema", weight, unit(torch.cat(rows)), text, average.logit_scale.exp())


def add_to(p, gradient):
    """Add to a parameter's .grad what was computed without autograd."""
    if p.requires_grad:
        gradient = torch.as_tensor(gradient, dtype=p.dtype, device=p.device)
        p.grad = gradient if p.grad is None else p.grad + gradient


# -----------------------------------------------------------------------------
# Evaluation

@torch.no_grad()
def text_table(run, model, tokenizer, captions, args, folder=None):
    """Unit embeddings (M, D) of captions on the host, the same in every process; kept in `folder`
    for the next run where the weights are a file's."""
    length = min(args.max_text, model.config.context_length)
    identity = json.dumps([captions, model.origin["sha256"], run.precision, length, getattr(
        model.config, "activation", ""), tokenizer(captions[:64], context_length=length).tolist()])
    path = folder and folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.texts.pt"
    stored = run.load(path) if path and model.origin["sha256"] else None
    if stored:
        return stored["texts"]
    encoder = Encoder(run, model, 0)
    tokens = tokenizer(captions, context_length=length)
    groups, places = bucket(tokens, pad_id=model.pad_id if model.config.text else None)
    mine = []
    with evaluating(model):
        for i in range(run.rank, len(groups), run.world_size):
            mine.append((i, encoder.one("text", 0, groups[i])[0].cpu()))
            run.progress(i + 1, len(groups), "encoding captions")
    parts = sorted(sum(run.gather_objects(mine), []), key=lambda pair: pair[0])
    texts = torch.cat([x for _, x in parts])[places]
    if path and model.origin["sha256"]:
        run.save(path, {"texts": texts})
    return texts


class Held:
    """Pairs that retrieval is measured on; a frozen text tower encodes their captions once."""

    def __init__(self, pairs, tokenizer, frozen):
        self.pairs, self.tokenizer, self.frozen, self.texts = pairs, tokenizer, frozen, None

    def encode(self, run, model, args):
        texts = self.texts
        if texts is None:
            texts = text_table(run, model, self.tokenizer, self.pairs.captions, args)
            self.texts = texts if self.frozen else None
        return texts


@torch.no_grad()
def embed(run, model, held, args):
    """-> unit image features (n, D), text features (M, D), owner (M,): images that cannot be read
    are left out with their captions, and noted. On the CPU, the same in every process."""
    pairs, encoder = held.pairs, Encoder(run, model, 0)
    loader = make_loader(pairs.image_items(), args.eval_batch_size * run.world_size, shuffle=False,
                         rank=run.rank, world_size=run.world_size, timeout=args.worker_timeout,
                         **run.loader_options(0 if pairs.pixels else args.workers))
    rows, features = [], []
    for done, (images, positions, indices) in enumerate(loader, 1):
        features.append(encoder.one("image", 0, (images, slice(None)))[0].cpu())
        rows.append(torch.stack([indices, positions]))
        run.progress(done, len(loader), f"testing on {pairs.split}")
    parts = run.gather_objects((torch.cat(rows, dim=1), torch.cat(features)))
    rows = torch.cat([part[0] for part in parts], dim=1)
    order = rows[0].argsort()
    image, readable = torch.cat([part[1] for part in parts])[order], rows[1][order] >= 0
    text, owner = held.encode(run, model, args), torch.tensor(pairs.owner)
    if not readable.all():
        pairs.refuse_losses((~readable).nonzero()[:, 0].tolist(), "they do not decode")
        text, owner = text[readable[owner]], (readable.cumsum(0) - 1)[owner[readable[owner]]]
        image = image[readable]
    return image, text, owner


def evaluate(run, model, held, args):
    """Retrieval both ways on held-out pairs -> dict of floats, in %."""
    with evaluating(model):
        image, text, owner = embed(run, model, held, args)
    scores = recall_at_k(image, text, owner)
    return {k: v for k, v in scores.items() if re.fullmatch(r"..._r\d+|mean_recall", k)}


@torch.no_grad()
def classify(run, model, images, tokenizer, templates, args):
    """Zero-shot accuracy (%) on labelled images: the first choice, the first five where there are
    so many classes, and the mean over classes. Only the classes of the set compete."""
    encoder = Encoder(run, model, 0)
    weights = zero_shot_weights(  # (C, D)
        lambda prompts: text_table(run, model, tokenizer, prompts, args),
        prompts_per_class(images.classnames, templates or [images.template]))
    loader = make_loader(images, args.eval_batch_size * run.world_size, shuffle=False,
                         rank=run.rank, world_size=run.world_size,
                         timeout=args.worker_timeout, **run.loader_options(args.workers))
    rows, few = [], min(5, len(weights))
    with evaluating(model):
        for pixels, labels, indices in loader:
            scores = encoder.one("image", 0, (pixels, slice(None)))[0].cpu() @ weights.T
            rows.append(torch.cat([labels[:, None], scores.topk(few, dim=1).indices], dim=1))
    labels, *guesses = torch.cat(run.gather_objects(torch.cat(rows)), dim=0).T
    found = classification_scores(guesses[0], labels, len(weights))
    per_class = [x for x in found["per_class"] if x is not None]
    top5 = torch.stack([guess == labels for guess in guesses])[:, labels >= 0].any(dim=0)
    return {"top1": found["accuracy"], **({"top5": 100 * float(top5.float().mean())}
                                          if len(weights) >= 5 else {}),
            "mean_per_class": sum(per_class) / len(per_class)}


def zero_shot(run, model, sets, tokenizer, args):
    """All of --zero-shot -> {"zero_shot_<set>_top1": ...}."""
    look = Preprocess(model.config.image_size, dtype=torch.uint8)
    return {f"zero_shot_{images.name}_{k}": v for images in sets for k, v in classify(
        run, model, images.with_transform(look), tokenizer,
        read_templates(args.templates) or images.templates, args).items()}


@torch.no_grad()
def latency(run, model, repeats=10):
    """Median milliseconds of the image tower for one image on this device."""
    size, seconds = model.config.image_size, []
    images = run.move(torch.zeros(1, 3, size, size))
    with evaluating(model):
        for _ in range(repeats + 2):
            run.synchronize()
            began = time.perf_counter()
            with run.autocast():
                model.encode_image(images)
            run.synchronize()
            seconds.append(time.perf_counter() - began)
    return 1000 * sorted(seconds[2:])[repeats // 2]


# -----------------------------------------------------------------------------
# The loop

def decay_groups(model, adapters, args):
    """Parameters with and without weight decay, which gains, biases and embeddings are spared (all
    vectors and scalars, and tables whose rows are looked up) -> list of dicts for AdamW."""
    groups = {}
    for module in (model, *filter(None, adapters)):
        for name, p in module.named_parameters():
            if p.requires_grad:
                wd = 0.0 if p.ndim < 2 or "embedding" in name else args.wd
                groups.setdefault(wd, []).append(p)
    return [{"params": some, "lr": args.lr, "weight_decay": wd} for wd, some in groups.items()]


def rate(step, steps, warmup, schedule):
    """Factor on the learning rates in a step (from 0): up in equal stages, then down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share}.get(schedule, 1.0)


def term_weights(args, text_moves, step, steps):
    """The weight of each term in a step: those inside fade linearly, the averaged student comes in
    over the first tenth, for at first it knows nothing."""
    icl = (1.0 if text_moves else 0.0) if args.icl is None else args.icl * text_moves
    fade = max(0.0, 1 - step / max(1, args.inside_until * steps)) if args.inside_until else 0.0
    return {"task": args.task, "crd": args.crd, "fd": args.fd, "icl": icl,
            **{name: fade * getattr(args, name) for name in ("relation", "hint", "attention")},
            "ema": args.ema_teacher * min(1.0, 10 * step / steps),
            "text_relation": args.text_teacher_weight}


def training_mode(model, args, in_pieces, pretrained):
    """Dropout on, frozen modules in eval; BatchNorm as --bn says -> what is to be said of it."""
    model.train()
    for m in model.modules():
        mine = list(m.parameters())
        if mine and not any(p.requires_grad for p in mine):
            m.eval()
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
             and m.training]
    if norms and (args.bn == "freeze" or args.bn == "auto" and in_pieces and pretrained):
        for m in norms:
            m.eval()
        return "BatchNorm statistics are frozen: in pieces they could not be the batch's"
    return "BatchNorm takes its statistics from each piece: the gradient is not exactly the " \
        "batch's" if norms and in_pieces else ""


class Average:
    """Moving average of a model: floats lerp by 1 - min(decay, (1 + n) / (10 + n)) at update n = 0,
    1, ..., integers are copied. Frozen parameters are shared with the model."""

    def __init__(self, model, decay):
        self.decay, self.updates = decay, 0
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.model = copy.deepcopy(model, frozen).eval()
        both = [(e, p) for one, two in ((self.model.parameters(), model.parameters()),
                                        (self.model.buffers(), model.buffers()))
                for e, p in zip(one, two) if e is not p]
        self.floats = [pair for pair in both if pair[0].is_floating_point()]
        self.others = [pair for pair in both if not pair[0].is_floating_point()]
        self.model.requires_grad_(False)

    @torch.no_grad()
    def update(self):
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        if self.floats:
            mine, theirs = map(list, zip(*self.floats))
            torch._foreach_lerp_(mine, [p.detach() for p in theirs], 1 - decay)
        for mine, theirs in self.others:
            mine.copy_(theirs)

    def tensors(self):
        return [e.detach() for e, _ in self.floats + self.others]


class State:
    """Everything that training changes, and how it is kept: what a checkpoint holds."""

    def __init__(self, run, model, adapters, args):
        self.run, self.model, self.adapters, self.args = run, model, adapters, args
        self.moving = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.learned = {f"{i}.{n}": p for i, module in enumerate(adapters) if module
                        for n, p in module.named_parameters()}
        self.optimizer = torch.optim.AdamW(decay_groups(model, adapters, args), betas=(
            0.9, args.beta2), eps=1e-6, fused=run.fused_optimizer)
        self.scaler = run.scaler()
        self.average = Average(model, args.ema) if args.ema else None
        self.epoch = self.batch = self.step = self.skipped = 0   # what comes next
        self.best, self.clock = -1.0, [0.0, 0]  # seconds and pairs after the first --skip-steps

    @property
    def parameters(self):
        return [*self.moving.values(), *self.learned.values()]

    @property
    def tested(self):
        """The model that is evaluated and exported."""
        return self.average.model if self.average else self.model

    def save(self, name):
        self.run.save(self.run.out / name, {
            "format": "distill/1", "weights": {n: p.detach() for n, p in self.moving.items()},
            "buffers": dict(self.model.named_buffers()),
            "adapters": {n: p.detach() for n, p in self.learned.items()},
            "average": self.average.tensors() if self.average else [],
            "updates": self.average.updates if self.average else 0,
            "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
            **{n: getattr(self, n) for n in ("epoch", "batch", "step", "best", "clock")},
            "skipped": int(self.skipped),
            "identity": self.args.identity})

    @torch.no_grad()
    def load(self, stored, weights_only=False):
        odd = sorted(set(stored["weights"]) ^ set(self.moving))
        if odd:
            raise UserError(f"the checkpoint holds {len(stored['weights'])} tensors and "
                            f"{len(self.moving)} move here, e.g. {odd[0]!r} on one side only; give "
                            f"the same towers")
        if bool(stored["average"]) != bool(self.average):
            raise UserError("the checkpoint holds an average of the weights, which is what was "
                            "scored; give its --ema" if stored["average"] else "the checkpoint "
                            "holds no average of the weights; leave --ema out")
        for name, p in self.moving.items():
            p.copy_(stored["weights"][name])
        for name, buffer in self.model.named_buffers():
            buffer.copy_(stored["buffers"][name])
        for mine, theirs in zip(self.average.tensors() if self.average else [], stored["average"]):
            mine.copy_(theirs)
        if weights_only:
            return
        for name, p in self.learned.items():
            p.copy_(stored["adapters"][name])
        if self.average:
            self.average.updates = stored["updates"]
        self.optimizer.load_state_dict(stored["optimizer"])
        self.scaler.load_state_dict(stored["scaler"])
        for name in ("epoch", "batch", "step", "skipped", "best", "clock"):
            setattr(self, name, stored[name])


class Texts(NamedTuple):
    """What a step looks up by caption, on the host."""
    tokens: torch.Tensor | None    # (M, L) where the text tower trains
    frozen: torch.Tensor | None    # (M, D) where it does not
    keys: list                     # K times (M, D_k); empty where the batches bring them
    other: torch.Tensor | None     # (M, D') of the text-only teacher


def make_batch(items, texts, teachers):
    """What a loader gives -> Batch, used, asked."""
    images, *stored, used, asked = items
    images = tuple(images) if isinstance(images, (list, tuple)) else (images,)
    dims = [teacher.dim for teacher in teachers]
    answers, keys = [None] * len(dims), [rows[used] for rows in texts.keys]
    if stored:
        keys = list(stored[1].split(dims, dim=1))
        answers = answers if teachers[0].model is not None else list(stored[0].split(dims, dim=1))
    tokens = None if texts.tokens is None else texts.tokens[used]
    frozen = None if tokens is not None else keys[0] if texts.frozen is None else texts.frozen[used]
    return Batch(images, tokens, frozen, answers, keys,
                 None if texts.other is None else texts.other[used]), used, asked


def train(run, model, losses, teachers, loader, texts, held, state, args):
    """Train `model` in place. loader: batches of the training pairs; held: what `finish_epoch`
    scores with."""
    batches = loader.batch_sampler
    counts = [len(range(rank, batches.batch_size, run.world_size))
              for rank in range(run.world_size)]
    said = training_mode(model, args, run.world_size > 1 or 0 < args.micro_batch < counts[0],
                         bool(model.origin.get("pretrained")))
    if said:
        run.say(said)
    steps = args.epochs * len(loader)
    steps = min(steps, args.max_steps) if args.max_steps else steps
    warmup = round(args.warmup if args.warmup >= 1 else args.warmup * steps)
    unchecked, seen, replaced, waited = [], 0, 0, 0.0
    average = state.average.model if args.ema_teacher else None
    began = time.perf_counter()
    while state.step < steps:
        batches.set_epoch(state.epoch, first_batch=state.batch)
        clock = time.perf_counter()
        for items in loader:
            waited += time.perf_counter() - clock
            batch, used, asked = make_batch(items, texts, teachers)
            replaced += int((used != asked).sum())

            # ---- one step -----------------------------------------------------------------
            for group in state.optimizer.param_groups:
                group["lr"] = args.lr * rate(state.step, steps, warmup, args.schedule)
            state.optimizer.zero_grad(set_to_none=True)
            weights = term_weights(args, batch.text is None, state.step, steps)
            found = add_gradient(run, model, losses, teachers, batch, counts, weights,
                                 draw_mix(args, state.step, model.config.image_size), args,
                                 state.scaler, args.seed * 1_000_003 + state.step, average)
            run.sum_gradients(state.parameters)
            fine = update(run, state, args)
            # -------------------------------------------------------------------------------

            state.step, state.batch = state.step + 1, state.batch + 1
            seen += batches.batch_size
            if state.batch == len(loader):
                state.epoch, state.batch = state.epoch + 1, 0
            unchecked.append((torch.where(fine, found["loss"], math.nan), used))
            leaving, done = run.stop_requested(), state.step == steps
            saving = leaving or state.batch == 0 or done or (
                args.save_every and state.step % args.save_every == 0)
            if saving or state.step % args.log_every == 0:  # reading a loss waits for the device
                check_finite(run, loader.dataset, state, unchecked)
            if state.step % args.log_every == 0 or done:
                lost = run.sum(replaced)  # images that could not be read
                run.log(state.step, steps=steps, epoch=state.epoch + (state.batch > 0),
                        samples=seen, waited=waited, **{k: run.sum(v) for k, v in found.items()},
                        scale=model.logit_scale.detach().exp(),
                        lr=state.optimizer.param_groups[0]["lr"],
                        **({"replaced": lost} if lost else {}),
                        **({"skipped": int(state.skipped)} if state.skipped else {}))
                seen, replaced, waited = 0, 0, 0.0
            if state.step > args.skip_steps:
                state.clock = [state.clock[0] + time.perf_counter() - began,
                               state.clock[1] + batches.batch_size]
            began = time.perf_counter()
            if saving:
                finish_epoch(run, held, state, done, args)
                began = time.perf_counter()
                state.save("checkpoint_last.pt")
            if leaving:
                raise run.interrupted()
            if done:
                break
            clock = time.perf_counter()
    return state


def update(run, state, args):
    """Let the optimiser use the gradients, unless one is inf or nan: then weights, its moments and
    the average stay as they are, in every process. -> bool tensor (), whether they were fine.

    The host does not wait for the answer where AdamW's kernel reads it itself; it does for fp16's
    scaler, which skips by itself, for an average, and where AdamW is not fused.
    """
    fine = run.drop_bad_gradients(state.parameters, state.scaler)
    before = state.scaler.get_scale()
    if args.grad_clip:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_norm_(state.parameters, args.grad_clip)
    if run.fused_optimizer and not state.scaler.is_enabled():
        state.optimizer.found_inf = (~fine).float()
    if run.fused_optimizer or fine:
        state.scaler.step(state.optimizer)
        state.scaler.update()
        with torch.no_grad():
            state.model.logit_scale.clamp_(0, math.log(MAX_SCALE))
    moved = fine & (state.scaler.get_scale() >= before)
    state.skipped = state.skipped + (~moved).int()
    if state.average and moved:
        state.average.update()
    return fine


def check_finite(run, pairs, state, unchecked):
    """Report the steps that were skipped for a loss or gradient that is not a number, with the
    images of their batch; save and stop after several in a row. Empties `unchecked`."""
    try:
        run.check_finite([loss for loss, _ in unchecked], lambda i: "the batch of " + ", ".join(
            pairs.paths[pairs.owner[c]] for c in unchecked[i][1].tolist()[:8]))
    except SafeStop:
        state.save("checkpoint_last.pt")  # no bad step has moved anything
        raise
    unchecked.clear()


def finish_epoch(run, held, state, done, args):
    """At the end of an epoch: held-out scores and the best checkpoint. Also when a signal came in
    its last step: the run that goes on begins with the next epoch."""
    if held is None or not (done or state.batch == 0 and state.epoch % args.eval_every == 0):
        return
    scores = evaluate(run, state.tested, held, args)
    run.log(state.step, split=held.pairs.split, **scores)
    if scores["mean_recall"] > state.best:
        state.best = scores["mean_recall"]
        state.save("checkpoint_best.pt")


# -----------------------------------------------------------------------------
# A run

class SharedHead(nn.Module):
    """The text tower's projection (W, D) for images too, behind an adapter (F, W) where F != W."""

    def __init__(self, features, projection):
        super().__init__()
        self.into = None if features == len(projection) else nn.Parameter(
            features ** -0.5 * torch.randn(features, len(projection)))
        self.shared = projection

    def matrix(self):
        return self.shared if self.into is None else self.into @ self.shared

    def forward(self, x):                                              # (B, F) -> (B, D)
        return (x if self.into is None else x @ self.into) @ self.shared


def open_student(args, teachers, stored):
    """The CLIP that learns, on the CPU; its text tower is the first teacher's or one of its own."""
    torch.manual_seed(args.seed)
    teach = teachers[0]
    if args.weights:
        model, pretrained = load(args.weights), True
    else:
        known = pathlib.Path(args.model).exists() or ":" in args.model
        tower = args.model if known else f"{args.model}:none"
        source = args.teacher[0] if args.teacher else None
        if args.text_tower == "teacher" and source is None:
            raise UserError("the student's text tower is the teacher's, and the stored teacher "
                            "names no file; give --teacher FILE or --text-tower")
        more = dict(proj=teach.model.config.proj if teach.model else "linear",
                    embed_dim=args.embed_dim or teach.dim,
                    text_tower=source if args.text_tower == "teacher" else args.text_tower)
        if args.text_tower == "teacher":
            more["activation"] = args.teacher_activation
        model = load(None, tower, image_size=args.image_size, **more)
        largest = max([t.model.config.image_size for t in teachers if t.model] or [10_000])
        if not (args.image_size or model.config.vision_patch) and (
                model.config.image_size > largest):
            torch.manual_seed(args.seed)
            model = load(None, tower, image_size=largest, **more)
        pretrained = known and not tower.endswith(":none")
    model.origin["pretrained"] = pretrained
    args.model = model.origin["name"] if args.weights else args.model
    frozen = args.text_tower == "teacher" and not args.train_text
    if frozen and model.config.embed_dim != teach.dim:
        raise UserError(f"the student's embeddings have {model.config.embed_dim} numbers and those "
                        f"of the teacher's frozen text tower {teach.dim}; leave --embed-dim out, "
                        f"or add --train-text")
    if args.inherit:
        if teach.model is None:
            raise UserError("--inherit needs the teacher itself, not its stored answers")
        for line in inherit(model, teach.model, text=args.text_tower != "teacher"):
            model.origin["notes"].append(line)
    if args.shared_proj != "off":
        share_projection(model)
    for name, p in model.named_parameters():
        text = not name.startswith(("visual.", "logit_"))
        if text and (frozen or args.shared_proj == "frozen" and name == "text_projection"):
            p.requires_grad_(False)
    return model, frozen


def share_projection(model):
    """Give the image tower the text tower's projection for a head; UserError where one has none."""
    if not isinstance(getattr(model.visual, "proj", None), nn.Parameter) or not isinstance(
            model.text_projection, nn.Parameter):
        raise UserError("--shared-proj needs towers with one linear projection each; "
                        f"{type(model.visual).__name__} has none")
    features = len(model.visual.proj)
    del model.visual.proj
    model.visual.proj = SharedHead(features, model.text_projection)


def tokenizer_of(model, *folders):
    """The tokenizer of a model's text tower, out of the first of the folders that is given."""
    folder = next(filter(None, folders), None)
    if model.text_kind == "bpe" and not folder:
        return BPETokenizer()
    if not folder or not pathlib.Path(folder).exists():
        raise UserError(f"a text tower of {model.origin['name']} needs its vocabulary: name its "
                        f"folder with --tokenizer (student) or --teacher-tokenizer")
    tokenizer = open_tokenizer(folder)
    kind = {BPETokenizer: "bpe", WordPieceTokenizer: "wordpiece"}.get(type(tokenizer), "bytebpe")
    if kind != model.text_kind or tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"the tokenizer in {folder} is a {kind} of {tokenizer.vocab_size:,} tokens "
                        f"and the text tower takes a {model.text_kind} of "
                        f"{model.config.vocab_size:,}; they do not belong together")
    return tokenizer


def open_teachers(args, stored):
    """The CLIPs that teach. With stored answers they are opened only to be checked, for their text
    tower and for --eval-teacher."""
    held = stored.facts["teachers"] if stored else []
    names = args.teacher or [t.get("source", "") for t in held]
    args.teacher = [] if isinstance(stored, ShardTeacher) and not args.teacher else names
    scales = args.teacher_scale
    if scales and len(scales) != len(held or names):
        raise UserError(f"--teacher-scale has {len(scales)} numbers for {len(held or names)} "
                        f"teachers")
    if isinstance(stored, ShardTeacher) and not args.live:
        return [Teacher(t["name"], scales[i] if scales else 100.0, t["dim"])
                for i, t in enumerate(held)]
    length = stored.facts.get("max_text", args.max_text) if stored else args.max_text
    if length != args.max_text:
        raise UserError(f"the captions in {args.reinforced} were cut at {length} tokens; give "
                        f"--max-text {length}")
    if held and len(held) != len(names):
        raise UserError(f"{len(names)} teachers are given and {len(held)} are stored in "
                        f"{args.reinforced}")
    found = []
    for i, name in enumerate(names):
        model = load(name, activation=args.teacher_activation).eval().requires_grad_(False)
        if held and held[i].get("sha256") not in ("", None, model.origin["sha256"]):
            raise UserError(f"the answers in {args.reinforced} are those of {held[i]['name']} "
                            f"({held[i]['sha256'][:12]}), not of {name} "
                            f"({model.origin['sha256'][:12]}); give that teacher, or write them "
                            f"again with --write-reinforced")
        if held and held[i].get("activation", model.config.activation) != model.config.activation:
            raise UserError(f"the answers in {args.reinforced} were given with "
                            f"--teacher-activation {held[i]['activation']}, and here it is "
                            f"{model.config.activation}")
        mine = model.text_kind != "bpe" or len(names) == 1  # among several, that of the others
        folder = args.teacher_tokenizer if mine else None
        folder = folder or (name if model.text_kind != "bpe" else None)
        found.append(Teacher(model.origin["name"], scales[i] if scales else float(
            model.logit_scale.exp()), model.config.embed_dim, model, tokenizer_of(model, folder)))
        found[-1].source = name
    return found


def open_stored(args):
    """The stored answers that --reinforced names, or None."""
    if not args.reinforced:
        return None
    if pathlib.Path(args.reinforced).expanduser().is_dir():
        folder = pathlib.Path(args.reinforced).expanduser()
        if (folder / "teacher.json").exists():
            return StoredTeacher.open(folder)
        files = sorted(map(str, folder.glob("*.tar")))
        if not files:
            raise UserError(f"{folder} holds no stored teacher: neither the teacher.json of "
                            f"--write-reinforced nor shards of DataCompDR, *.tar")
        return ShardTeacher(files, args.teacher_dims or [768, 768])
    return ShardTeacher(find_shards(find_shards(args.reinforced)), args.teacher_dims or [768, 768])


def open_data(args):
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


def cache_images(run, pairs, size, folder, args):
    """Decode the images once, as --cache says, and say what was noticed."""
    known = len(pairs.notes) if pairs.split != "train" else 0
    pairs.cache(args.cache, size * 8 // 7, folder / "cache", int(args.cache_gb * 2 ** 30),
                run.loader_options(args.workers)["workers"])
    for note in pairs.notes[known:]:
        run.say(note)
    return pairs


def write_reinforced(run, pairs, teachers, folder, args):
    """Store the teachers' embeddings of `--views` random views of each image, and of each caption.
    Embeddings of a batch are written before the next, so any number of images will do."""
    target = pathlib.Path(args.write_reinforced).expanduser()
    if target.exists() and not args.overwrite:
        raise UserError(f"{target} is there already; --overwrite writes it again")
    sizes = sorted({t.model.config.image_size for t in teachers})
    for t in teachers:
        t.size = sizes.index(t.model.config.image_size)
        run.move(t.model)
    pairs = cache_images(run, pairs, sizes[-1], folder, args)
    look = Views(sizes, args.seed, (args.crop, 1.0) if args.crop else None, args.randaugment)
    facts = {"format": 1, "views": args.views, "data": pairs.fingerprint, "split": pairs.split,
             "images": len(pairs.paths), "lost": [], "seed": args.seed, "crop": args.crop,
             "randaugment": args.randaugment, "precision": run.precision,
             "max_text": args.max_text,
             "teachers": [{"name": t.name, "source": os.path.abspath(t.source) if os.path.exists(
                 t.source) else t.source, "sha256": t.model.origin["sha256"], "dim": t.dim,
                 "activation": t.model.config.activation,
                 "image_size": t.model.config.image_size, "mean": t.model.image_mean,
                 "std": t.model.image_std} for t in teachers]}
    dtype = "float16" if args.store_precision == "fp16" else "float32"
    run.on_first(lambda: StoredTeacher.create(target, facts, len(pairs.paths), len(pairs.captions),
                                              args.randaugment, dtype))
    arrays, lost = StoredTeacher.filling(target, facts).arrays, set()
    texts = torch.cat([text_table(run, t.model, t.tokenizer, pairs.captions, args)
                       for t in teachers], dim=1)
    mine = slice(run.rank, None, run.world_size)
    arrays["texts"][mine] = texts[mine].numpy().astype(dtype)
    loader = make_loader(ViewItems(pairs, look), args.eval_batch_size * run.world_size,
                         shuffle=False, rank=run.rank, world_size=run.world_size,
                         timeout=args.worker_timeout,
                         **run.loader_options(0 if pairs.pixels else args.workers))
    began = time.perf_counter()
    for view in range(args.views):
        loader.batch_sampler.set_epoch(view)
        for images, *rest, indices in loader:
            if not len(indices):
                continue
            numbers, shape, positions = rest
            images = images if isinstance(images, list) else [images]
            whole = [slice(None)]
            answers = torch.cat([t.look(run, images[t.size], whole, Mix())[0] for t in teachers],
                                dim=1)
            arrays["images"][view, indices] = answers.cpu().numpy().astype(dtype)
            arrays["views"][view, indices] = numbers.float().numpy()
            arrays["sizes"][indices] = shape.int().numpy()
            lost |= set(indices[positions < 0].tolist())
        run.say(f"view {view + 1} of {args.views}: {len(pairs.paths):,} images, "
                f"{time.perf_counter() - began:.1f} s")
    for array in arrays.values():
        array.flush()
    facts["lost"] = sorted(set().union(*run.gather_objects(lost)))
    pairs.refuse_losses(facts["lost"], "they do not decode")
    run.on_first(lambda: StoredTeacher.complete(target, facts))
    run.say(f"wrote {target}: {args.views} views of {len(pairs.paths):,} images, "
            f"{len(pairs.captions):,} captions, "
            f"{sum(a.nbytes for a in arrays.values()) >> 20:,} MB")
    return {"method": "distill", "wrote": str(target), "views": args.views,
            "seconds": time.perf_counter() - began, "images": len(pairs.paths)}


def refuse_other_text(run, model, tokenizer, pairs, stored, teacher, args):
    """Raise UserError unless the student's frozen text tower gives what it is taught by, the first
    teacher's embedding of a caption: shards do not name their teachers, and a student of --weights
    may come from another one."""
    some = pairs.captions[:1]
    ours = text_table(run, model, tokenizer, some, args)[0]
    theirs = torch.as_tensor(stored.sample(pairs.owner[0], 0, 0, 0)[3][:len(ours)]) if stored else (
        text_table(run, run.move(teacher.model), teacher.tokenizer, some, args)[0])
    near = float(F.cosine_similarity(ours, theirs.float(), dim=0))
    if near < 0.99:
        whose = f"the text tower of {args.weights}" if args.weights else args.teacher[0]
        raise UserError(f"{whose} gives {some[0]!r} an embedding whose cosine to the "
                        f"{'stored' if stored else 'first'} teacher's is {near:.2f}: "
                        f"{'the shards are of' if not args.weights else 'it is'} another teacher"
                        f"{', and cannot stay frozen; add --train-text' if args.weights else ''}")


def refuse_other_run(stored, path, args):
    """Raise UserError unless the checkpoint at `path` fits this command line."""
    theirs = stored.get("identity")
    if stored.get("format") != "distill/1" or not isinstance(theirs, dict):
        raise UserError(f"{path} is not a checkpoint of this script; a student to start from goes "
                        f"to --weights")
    keys = ("model", "weights_sha256") if args.eval_only else sorted({*theirs, *args.identity})
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


def identify(args, pairs, model, teachers, stored):
    """What must be equal for a run to be continued, and what names it in results.json."""
    names = (*TERMS, "bn", "mixup", "cutmix", "mix_prob", "epochs", "max_steps", "batch_size",
             "upsample", "crop", "randaugment", "cache", "max_samples", "max_text", "lr", "wd",
             "beta2", "warmup", "schedule", "grad_clip", "ema", "ema_teacher", "precision", "seed",
             "text_tower", "train_text", "shared_proj", "text_teacher", "text_teacher_weight",
             "teacher_activation",
             "text_teacher_temp", "views_in_turn", "live", "inside_until", "image_size", "inherit")
    return {"data": pairs.name, "split_sha256": pairs.fingerprint, "model": args.model,
            "weights_sha256": model.origin["sha256"],
            "teachers": [t.name for t in teachers], "teacher_scales": [t.scale for t in teachers],
            "teacher_sha256": [t.model.origin["sha256"] if t.model else "" for t in teachers],
            "stored": stored.facts.get("crc", {}).get("images") if stored else None,
            **{n: getattr(args, n) for n in names}}


def plain_copy(model):
    """The student as any CLIP: a shared head becomes the one matrix that it computes."""
    model = copy.deepcopy(model)
    if isinstance(getattr(model.visual, "proj", None), SharedHead):
        matrix = nn.Parameter(model.visual.proj.matrix().detach().clone())
        del model.visual.proj
        model.visual.proj = matrix
    return model.eval()


def export(run, model, folder, args):
    """Write student_export.pt (weights and sizes, nothing else; `clip_model.load` reads it), and
    what --export names."""
    plain = plain_copy(model).cpu()
    path = folder / "export" / "student_export.pt"

    def write():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".partial")
        torch.save({"format": "clip/1", "clip_config": json.dumps(dataclasses.asdict(plain.config)),
                    "image_mean": plain.image_mean, "image_std": plain.image_std,
                    "state_dict": plain.state_dict()}, temporary)
        os.replace(temporary, path)
        wrote = [path]
        if "safetensors" in args.export:
            wrote.append(save(plain, path.with_suffix(".safetensors")))
        if "onnx" in args.export:
            wrote += write_onnx(plain, path.parent)
        return ", ".join(map(str, wrote))
    run.say(f"wrote {run.on_first(write)}")


class Half(nn.Module):
    """One tower with unit rows, for ONNX."""

    def __init__(self, model, kind):
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x):
        if self.kind == "image":
            return F.normalize(self.model.visual(x), dim=-1)
        return F.normalize(self.model.encode_text(x, ends=x.argmax(dim=-1)), dim=-1)


def need_onnx():
    """Raise UserError unless the two packages of --export onnx are there."""
    for package in ("onnx", "onnxscript"):
        if not importlib.util.find_spec(package):
            raise UserError(f"--export onnx needs the package {package} (pip install onnx "
                            f"onnxscript)")


def write_onnx(model, folder):
    """student_image.onnx and student_text.onnx, for any number of rows -> their paths."""
    model, size, wrote = model.fuse_attention(False), model.config.image_size, []
    inputs = {"image": torch.zeros(3, 3, size, size),
              "text": torch.ones(3, model.config.context_length, dtype=torch.long)}
    for kind, x in inputs.items():
        if kind == "text" and model.config.text:
            continue
        wrote.append(folder / f"student_{kind}.onnx")
        torch.onnx.export(Half(model, kind).eval(), (x,), str(wrote[-1]), input_names=[kind],
                          output_names=["features"], dynamic_shapes=({0: torch.export.Dim("n")},),
                          dynamo=True, external_data=False, verbose=False)
    return wrote


def report(run, model, teachers, state, held, tokenizer, labelled, folder, args):
    """Score the best weights on the test pairs, print, write and return what the run found."""
    best = run.load(run.out / "checkpoint_best.pt") if run.out and not args.eval_only else None
    if best and state.step:
        state.load(best, weights_only=True)
        run.say(f"testing the weights of step {best['step']}, the best held-out mean recall")
    tested, pairs = state.tested, held and held.pairs
    scores = evaluate(run, tested, held, args) if held else {}
    scores |= zero_shot(run, tested, labelled, tokenizer, args)
    if run.out:
        export(run, tested, folder, args)
    sizes = {"student": sum(p.numel() for p in tested.visual.parameters()),
             "student_latency_ms": latency(run, tested)}
    for teacher in teachers[:1]:
        if teacher.model is not None:
            sizes |= {"teacher": sum(p.numel() for p in teacher.model.visual.parameters()),
                      "teacher_latency_ms": latency(run, run.move(teacher.model))}
    if pairs:
        run.log(state.step, split=f"best on {pairs.split}", **scores)
    seconds, count = state.clock
    results = {"method": "distill", "data": args.identity["data"], "model": args.model, **scores,
               "teachers": [t.name for t in teachers],
               **{f"{k}{'_image_parameters' if k in ('student', 'teacher') else ''}": v
                  for k, v in sizes.items()},
               "steps": state.step, "epochs": state.epoch, "batch_size": args.batch_size,
               "scale": float(model.logit_scale.detach().exp()),
               "skipped_steps": int(state.skipped),
               "samples_per_second": count / seconds if seconds else 0.0,
               "trainable_parameters": sum(p.numel() for p in state.moving.values()),
               "trainable_tensors": len(state.moving), "dry_run": args.dry_run,
               **args.teacher_scores, "identity": args.identity}
    results = run.finish(results)
    if pairs:
        run.say("dry run, no result: " * args.dry_run +
                f"test, {len(pairs.paths)} images: image to text R@1 {scores['i2t_r1']:.1f} R@5 "
                f"{scores['i2t_r5']:.1f} R@10 {scores['i2t_r10']:.1f}, text to image "
                f"{scores['t2i_r1']:.1f} {scores['t2i_r5']:.1f} {scores['t2i_r10']:.1f} %")
    return results


def score_teachers(run, teachers, pairs, labelled, args):
    """Retrieval and zero-shot of each teacher, before anything is learned from it."""
    found = {}
    for i, teacher in enumerate(teachers):
        if teacher.model is None:
            continue
        name = f"teacher{i or ''}"
        look = Preprocess(teacher.model.config.image_size, dtype=torch.uint8)
        scores = evaluate(run, run.move(teacher.model), Held(pairs.with_transform(
            look), teacher.tokenizer, False), args) if pairs else {}
        scores |= zero_shot(run, teacher.model, labelled, teacher.tokenizer, args)
        run.log(0, split=f"{name} {teacher.name}", **scores)
        found |= {f"{name}_{k}": v for k, v in scores.items()}
    return found


@torch.no_grad()
def look_up_texts(run, model, tokenizer, teachers, captions, frozen, stored, folder, args):
    """Every caption encoded once by whatever is frozen -> Texts."""
    keys = [] if stored else [text_table(run, t.model, t.tokenizer, captions, args, folder)
                              for t in teachers]
    other = None
    if args.text_teacher:
        bert = run.move(load(None, "tiny-vit:none", args.text_teacher).eval())
        words = tokenizer_of(bert, args.text_teacher)(captions, context_length=min(
            args.max_text, bert.config.context_length))
        groups, places = bucket(words, pad_id=bert.pad_id)
        other = torch.cat([bert.bert(run.move(t)).float().cpu() for t, _ in groups])[places]
        other = unit(other - other.mean(dim=0))  # BERT's vectors share one direction
    tokens = None if frozen else tokenizer(captions, context_length=args.max_text)
    return Texts(tokens, keys[0] if frozen and keys else None, keys, other)


def main(args):
    """Train (or score) one student, or store its teachers' answers -> the results."""
    given = dict(vars(args))
    run = start(args.device, args.precision, seed=args.seed, deterministic=args.deterministic)
    if args.batch_size < run.world_size:
        raise UserError(f"--batch-size {args.batch_size} with {run.world_size} processes leaves "
                        f"some without a pair")
    if args.accum_steps > 1:
        args.micro_batch = -(-args.batch_size // (run.world_size * args.accum_steps))
    if "onnx" in args.export:
        need_onnx()
    args.max_steps = 3 if args.dry_run else args.max_steps
    sets, stored = open_data(args), open_stored(args)
    labelled = [open_zero_shot(name, args.data_dir) for name in args.zero_shot]
    teachers = open_teachers(args, stored)
    root = pathlib.Path(args.output_dir or "runs/train_distill/x").expanduser().parent
    if args.write_reinforced:
        return write_reinforced(run, sets["train"], teachers, root, args)
    if stored:
        sets["train"] = stored.adopt(sets["train"])
    model, frozen = open_student(args, teachers, stored)
    args.max_text = min(args.max_text, model.config.context_length)
    tokenizer = tokenizer_of(model, args.tokenizer or (
        None if model.text_kind == "bpe" else args.text_tower if args.text_tower != "teacher"
        else args.teacher[0]))
    args.identity = identify(args, sets["train"], model, teachers, stored)
    kind = "stored" if stored and not args.live else "live"
    name = f"{sets['train'].name}_{pathlib.Path(args.model).name}_{kind}".replace(":", "-")
    folder = pathlib.Path(args.output_dir or f"runs/train_distill/{name}").expanduser()
    folder = folder.with_name(folder.name + "_dry_run") if args.dry_run else folder
    run = run.enter("" if args.eval_only else folder, args.seed)
    start_from, results = find_start(run, folder, given, args)
    if results:
        return results

    if stored and not args.live and not args.eval_teacher:
        for teacher in teachers:
            teacher.model = None
    loader = open_loader(run, sets, model, teachers, stored, folder, args)
    model = run.move(model).fuse_attention(run.fused_attention)
    for teacher in filter(lambda t: t.model is not None, teachers):
        run.move(teacher.model).fuse_attention(run.fused_attention)
    inside = None
    if args.relation + args.hint + args.attention:
        inside = run.move(Inside(model, teachers[0].model, {
            k: getattr(args, k) for k in ("relation", "hint", "attention")}))
    adapters = run.move(Adapters(model.config.embed_dim, [t.dim for t in teachers], not frozen))
    if frozen and (args.weights or isinstance(stored, ShardTeacher)):
        refuse_other_text(run, model, tokenizer, sets["train"], stored, teachers[0], args)
    free = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run.say(f"{args.model}: {free:,} of {sum(p.numel() for p in model.parameters()):,} weights "
            f"train, {len(loader)} steps an epoch of {args.batch_size} pairs; "
            f"{'stored' if stored and not args.live else 'live'} teachers: " + ", ".join(
                f"{t.name} (scale {t.scale:.4g})" for t in teachers))
    for note in model.origin["notes"]:
        run.say(note)
    if frozen and args.icl:
        run.say("--icl is off: with a frozen text tower it is the task loss again")
    args.teacher_scores = {}
    if args.eval_teacher:
        args.teacher_scores = score_teachers(run, teachers, sets["test"] or sets["val"], labelled,
                                             args)
    for teacher in teachers if stored and not args.live else ():
        teacher.model = None
    held = {split: Held(sets[split], tokenizer, frozen) for split in ("val", "test") if sets[split]}
    state = State(run, model, (adapters, inside), args)
    if start_from:
        state.load(start_from, weights_only=args.eval_only)
    elif args.eval_only and not args.weights:
        run.say(f"note: {folder} holds no checkpoint; scored is what a run would begin with")
    if not args.eval_only:
        texts = look_up_texts(run, model, tokenizer, teachers, sets["train"].captions, frozen,
                              stored, folder.parent / "cache", args)
        run.watch_signals()
        try:
            train(run, model, (adapters, inside), teachers, loader, texts,
                  held.get("val"), state, args)
        finally:
            run.unwatch_signals()
    return report(run, model, teachers, state, held.get("test") or held.get("val"), tokenizer,
                  labelled, folder, args)


def open_loader(run, sets, model, teachers, stored, folder, args):
    """Give each set its transform and cache -> the loader of training batches."""
    live = [t for t in teachers if t.model is not None and (args.live or not stored)]
    sizes = list(dict.fromkeys([model.config.image_size, *(t.model.config.image_size
                                                           for t in live)]))
    for teacher in live:
        teacher.size = sizes.index(teacher.model.config.image_size)
    largest = max(sizes + [t.model.config.image_size for t in teachers if t.model is not None])
    look = Views(sizes, args.seed, (args.crop, 1.0) if args.crop else None, args.randaugment)
    still = Preprocess(model.config.image_size, dtype=torch.uint8)
    for split in filter(sets.get, sets):
        pairs = sets[split].with_transform(look if split == "train" else still)
        if not (split == "train" and (args.eval_only or isinstance(stored, ShardTeacher))):
            cache_images(run, pairs, largest, folder, args)
        sets[split] = pairs
    pairs = sets["train"]
    if stored:
        pairs = StoredPairs(pairs, stored, look, args.seed, args.views_in_turn)
    workers = 0 if sets["train"].pixels and args.workers < 0 else args.workers
    weights = source_weights(sets["train"], args.data, args.upsample) if args.upsample else None
    return make_pair_loader(pairs, args.batch_size, args.seed, "one", run.rank, run.world_size,
                            weights=weights, timeout=args.worker_timeout,
                            **run.loader_options(workers))


if __name__ == "__main__":
    sys.exit(guard(main, get_args))
