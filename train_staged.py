"""Progressive fine-tuning that shows what it forgets: a CLIP in stages, each judged on every test.

A plan is a list of stages. Each starts from the weights that it names (the best of the stage
before, unless told otherwise), trains with an optimiser and a schedule of its own, and keeps the
best by its held-out pairs, the weights it began with being a candidate. Then everything is scored
on every test set: row 0 is the model before any stage, and a number that falls down a column is
forgetting.

    python train_staged.py                                  three themes of the demo, about a minute
    python train_staged.py --plan plan.json                  the plan below; --check-plan shows it
    python train_staged.py --weights clip_cn_vit-b-16.pt --tokenizer vocab.txt \
        --stage name=muge,data=MUGE,epochs=5 --stage name=own,data=own.csv,replay=muge:0.2
    python train_staged.py --plan plan.json --set own.lr=2e-6 --from-stage own     that one again
    python train_staged.py --plan plan.json --query "黑色碳纤维材料表面"             search by each stage
    torchrun --nproc-per-node 8 train_staged.py --plan plan.json                   the same numbers

    {"weights": "clip_cn_vit-b-16.pt", "tokenizer": "vocab.txt", "defaults": {"wd": 0.2},
     "eval_sets": {"coco": "COCO-CN@test"},
     "stages": [
      {"name": "muge", "data": "MUGE", "epochs": 5, "batch_size": 512, "augment": "light"},
      {"name": "flickr", "data": "Flickr30k-CN", "epochs": 10, "batch_size": 256},
      {"name": "own", "data": "own.csv", "epochs": 30, "batch_size": 16, "augment": "strong",
       "freeze": ["visual_lower:8"], "replay": {"muge": 0.1}, "early_stop": 8, "wise": [0.5]}]}

Every key of a stage is also a flag, which then holds for all stages that do not say otherwise.
Lists are written a+b on the command line, shares as muge:0.1+flickr:0.1.

The batch is exact as in train_contrastive.py: `batch_size` pairs are contrasted whatever fits,
encoded in pieces of `micro_batch`, the loss and its gradient computed tile by tile. Captions that
say the same and captions of one image are positives of each other (`positives=multi`).

Against forgetting, all off by default: `replay` of earlier stages' pairs in each batch; `wise`,
weights between the stage's start and end (Wortsman et al. 2022, WiSE-FT), as further rows;
`distill`, 1 - cosine to the features of the stage's start; `freeze`, `lora`, `layer_decay`.

Different from Chinese-CLIP's trainer, with the reason:
- recall is measured on the whole held-out set, by the rules of its evaluation programs, and not
  inside batches, where a perfect model cannot reach 100 % on a set smaller than the batch;
- a stage never falls back: a missing parent, a stage of no steps or one that would end inside its
  warm-up is refused before any work, and so is a finished stage whose plan was edited since;
- gains, biases and embeddings do not decay (`wd_rule=chinese-clip`: its rule, which decays
  BERT's LayerNorm); gradients are clipped; lr defaults to 5e-5 * batch_size / 1024.

Logged: loss, its terms, ln B, scale, lr; on held-out pairs i2t_r1 ... mean_recall (%). r1 is the
mean of both directions. Results: rows x sets with 95 % bootstrap intervals over images, forgetting,
backward and forward transfer; matrix.md has them as a table, and `python report.py RUN` draws them.
"""
import collections
import contextlib
import copy
import dataclasses
import hashlib
import importlib.util
import json
import math
import pathlib
import re
import sys
import time
import types
from typing import NamedTuple

from device import (a_count, a_list, a_number, a_switch, a_text, an_expression, check_settings,
                    expanded, guard, one_of, Parser, read_settings, settings_of, start, UserError)
import numpy as np  # device before torch, which reads what it sets
import torch
from torch import nn

from clip_model import (bucket, canonical_name, check_layout, CLIP, CONFIGS, digest, dropout_of,
                        export_checked, freeze, HEADS, height, is_chinese_clip, load, LowRank,
                        project, save, sha256_of, trim, unit)
from data import (Augment, AUGMENTS, bootstrap, cached_features, caption_notes,
                  FeatureLoader, HASHED, hit_table, make_loader, make_mixed_loader, normalise,
                  open_pairs, PairBatches, Preprocess, read_image, recalls, RECALLS,
                  retrieval_ranks, save_embeddings, top_k, transfer)
from tokenizer import BPETokenizer, ChineseTokenizer, open_tokenizer

MAX_SCALE = 100.0          # CLIP's clamp
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
LR_AT_1024 = 5e-5          # what fine-tuned CLIPs bear at a batch of 1,024, and in proportion below
BOOTSTRAPS = 1000
DRY_IMAGES = 64            # of each test set: a dry run shows that all works, not how well
DEMO = [  # what `--data demo` alone stands for: land, then towns, then a small set of waters
    {"name": "land", "matching": "Crop|Vegetation|Forest|Pasture"},
    {"name": "towns", "matching": "Residential|Industrial|Highway"},
    {"name": "water", "matching": "River|SeaLake", "epochs": 12, "batch_size": 32},
]
DEMO_DEFAULTS = {"data": "demo", "epochs": 8, "batch_size": 64, "lr": 2e-4, "wise": [0.5]}
RESERVED = ("init", "cache", "report", "export", "zero-shot")
ALIASES = {
    "--train-data": "--data", "--dataset": "--data", "--train": "--data", "--val-data": "--val",
    "--checkpoint": "--weights", "--init": "--weights", "--pretrained": "--weights",
    "--vision-model": "--model", "--arch": "--model", "--vocab": "--tokenizer",
    "--max-epochs": "--epochs", "--learning-rate": "--lr", "--weight-decay": "--wd",
    "--num-workers": "--workers", "--context-length": "--max-text", "--max-steps": "--steps",
    "--accum-freq": "--accum-steps", "--clip-grad": "--grad-clip", "--batch": "--batch-size",
    "--output": "--output-dir", "--save-step-frequency": "--save-every", "--lr-visual":
    "--image-lr", "--lr-text": "--text-lr", "--num-train-epochs": "--epochs",
}


# -----------------------------------------------------------------------------
# What a stage can say: one table for the plan's keys, for --stage k=v, and for the flags

def stage_name(x):
    if not isinstance(x, str) or not re.fullmatch(r"[\w-]{1,40}", x) or x in RESERVED:
        raise ValueError(f"letters, digits, - and _, up to 40, and not {', '.join(RESERVED)}")
    return x


def shares(x):
    """{"muge": 0.1} or "muge:0.1+flickr:0.1"."""
    if isinstance(x, str):
        x = dict(part.rpartition(":")[::2] for part in x.split("+"))
    if not isinstance(x, dict):
        raise ValueError("stages with their shares")
    return {str(key): a_number(0, 0.9, above=True)(value) for key, value in x.items()}


def portions(x):
    x = x.split("+") if isinstance(x, str) else x if isinstance(x, list) else [x]
    return list(dict.fromkeys(a_number(0, 1)(value) for value in x))


def second_beta(x):
    """AdamW's second beta, or both of them, of which the first is 0.9 here."""
    if isinstance(x, (list, tuple)):
        if len(x) != 2 or x[0] != 0.9:
            raise ValueError("[0.9, a number from 0 to 1]")
        x = x[1]
    return a_number(0, 1)(x)


def scale_rule(x):
    x = x.removeprefix("fixed:") if isinstance(x, str) else x
    try:
        return x if x == "train" else a_number(1, MAX_SCALE)(x)
    except ValueError as error:
        raise ValueError(f"train, or {error}") from None


STAGE = {  # key: (default, how it is read, what it means)
    "name": (None, stage_name, "the stage's folder"),
    # data
    "data": (None, a_text, "flickr8k, MUGE, a folder, shards or a CSV/TSV/JSONL file"),
    "layout": ("auto", a_text, "how the data is to be read"),
    "caption_file": (None, a_text, "another caption file of the folder, such as a translation"),
    "matching": (None, an_expression, "only images whose path or captions hold this regular "
                 "expression"),
    "max_samples": (None, a_count(2), "train on the first images alone"),
    "val": (None, a_text, "held-out pairs, as PATH or PATH@split, if not the data's own"),
    "test": (None, a_text, "test pairs, likewise, or in eval_sets by the stage's name; without "
             "any, the held-out ones"),
    "captions": ("all", one_of("all", "one"), "per epoch all captions, or one per "
                 "image"),
    "augment": ("none", one_of(*AUGMENTS, also={"seed": "light"}), "how training images vary: "
                + ", ".join(AUGMENTS)),
    "flip": (True, a_switch, "augmentations may mirror images: false where captions say left, 左"),
    "colour": (True, a_switch, "they may change colours: false where captions name them"),
    # what trains
    "from": (None, a_text, "init, STAGE:best, STAGE:last, STAGE:wise0.5 or a file; best of the "
             "stage before"),
    "freeze": ([], a_list, "names of parameters with *, ! takes back; also visual, text, "
               "visual_lower:8, text_lower:8, all_but_proj, all_but_norms"),
    "lora": (0, a_count(0), "rank of the updates of attention matrices; only they and the heads "
             "train"),
    "dropout": (None, a_number(0, 0.9), "of a BERT's layers, instead of its own"),
    "bn": ("freeze", one_of("freeze", "chunk"), "BatchNorm: frozen statistics, or, as "
           "chunk, those of pieces"),
    "recompute": (False, a_switch, "keep no activations inside blocks: slower, less memory"),
    "scale": ("train", scale_rule, "the logit scale: train, or held at this number"),
    # method
    "positives": ("multi", one_of("multi", "mask", "diag", also={"clip": "diag"}), "pairs with an "
                  "equal image or caption: positives too (multi), left out (mask), or negatives "
                  "(diag)"),
    "mask_ratio": (0.0, a_number(0, 0.95), "share of a ViT's patches left out in training (FLIP, "
                   "Li et al. 2023)"),
    "replay": ({}, shares, "share of each batch from earlier stages' training pairs"),
    "distill": (0.0, a_number(0, 1e4), "weight of 1 - cosine to the features of the stage's start"),
    "wise": ([], portions, "between the stage's start (0) and end (1): further rows"),
    # optimisation
    "epochs": (5, a_count(0), "passes over the data"),
    "steps": (0, a_count(0), "or so many steps; 0: by epochs"),
    "batch_size": (128, a_count(2), "pairs contrasted per step, over all processes"),
    "micro_batch": (64, a_count(0), "pairs encoded at a time per process; 0: all"),
    "accum_steps": (1, a_count(1), "another way to say it: batch-size / accum-steps in memory"),
    "lr": (None, a_number(0, 1, above=True), "5e-5 * batch_size / 1024 unless given"),
    "image_lr": (None, a_number(0, 1), "of the image tower, if another"),
    "text_lr": (None, a_number(0, 1), "of the text tower, if another"),
    "layer_decay": (1.0, a_number(0, 1, above=True), "factor on the rate per block away from the "
                    "heads"),
    "wd": (0.2, a_number(0, 100), "weight decay of matrices"),
    "wd_rule": ("standard", one_of("standard", "chinese-clip", also={
        "cnclip": "chinese-clip", "ndim": "standard"}), "what does not decay: gains, "
                "biases and embeddings; or, as chinese-clip, what its code leaves out"),
    "beta2": (0.98, second_beta, "of AdamW"),
    "eps": (1e-6, a_number(0, 1, above=True), "of AdamW"),
    "warmup": (0.1, a_number(0), "steps, or below 1 a share of all"),
    "schedule": ("cosine", one_of("cosine", "linear", "constant", also={
        "const": "constant"}), "of the learning rates: cosine, "
                 "linear or constant"),
    "min_lr": (0.0, a_number(0, 1), "no rate falls below this after the warm-up"),
    "grad_clip": (1.0, a_number(0), "largest norm; 0: none"),
    "early_stop": (0, a_count(0), "stop after so many evaluations without a better one; 0: never"),
    "select": ("mean_recall", one_of("mean_recall", "r1", "i2t_r1", "t2i_r1", also={
        "mean_r1": "r1"}), "what the best is "
               "chosen by on held-out pairs: mean_recall, r1, i2t_r1 or t2i_r1"),
    "eval_every": (1, lambda x: 1 if x == "epoch" else a_count(1)(x), "epochs between evaluations"),
}
ALSO = {"train": "data", "batch": "batch_size", "lr_visual": "image_lr", "lr_text": "text_lr",
        "clip_grad": "grad_clip", "max_epochs": "epochs", "init": "from", "only": "matching",
        "logit_scale": "scale", "loss": "positives", "betas": "beta2", "accum": "accum_steps",
        "distill_prev": "distill", **{
            given[2:].replace("-", "_"): flag[2:].replace("-", "_") for given, flag in
            ALIASES.items() if flag[2:].replace("-", "_") in STAGE}}
PLAN = {"name": (None, stage_name, ""), "seed": (None, a_count(0), ""), "max_text": (
    None, a_count(3), ""), "precision": (None, one_of("auto", "fp32", "bf16", "fp16"), ""),
    **{key: (None, a_text, "") for key in ("model", "weights", "tokenizer", "device", "data_dir")},
    **{key: (None, lambda x: x, "") for key in ("defaults", "eval_sets", "stages")}}
FLAGS = [key for key in STAGE if key not in ("name", "from")]
PLACE = {"data": None, "layout": "auto", "caption_file": None, "matching": None}
PLAN_ALSO = {"init": "weights", "vocab": "tokenizer", "context_length": "max_text"}


def get_args(argv=None):
    """The command line as a namespace. Exits with code 2 and one line on a wrong one."""
    parser = Parser(description="Fine-tune a CLIP in stages and see what each forgets.",
                    epilog="example: python train_staged.py --plan plan.json --check-plan",
                    aliases=ALIASES)
    plan = parser.add_argument_group("plan")
    plan.add_argument("--plan", metavar="FILE", help="stages as JSON, or TOML (default: the demo, "
                      "or one stage of the flags)")
    plan.add_argument("--stage", nargs="+", metavar="K=V,K=V", help="a stage; again "
                      "for the next. Keys: name, from (init, STAGE:best, STAGE:last or a file), "
                      "and the flags below with _ for -")
    plan.add_argument("--set", nargs="+", default=[], metavar="STAGE.K=V", help="change one key of "
                      "a stage")
    plan.add_argument("--only", metavar="STAGE", help="train this stage alone")
    plan.add_argument("--until", metavar="STAGE", help="train no stage after this one")
    plan.add_argument("--from-stage", metavar="STAGE", help="train this one and all after it again")
    plan.add_argument("--check-plan", action="store_true", help="say what would be done, and stop")
    group = parser.add_argument_group("stage (for all that do not say otherwise)")
    for key in FLAGS:
        default, _, meaning = STAGE[key]
        group.add_argument("--" + key.replace("_", "-"), metavar="V", help=meaning + (
            "" if default in (None, [], {}) else f" (default: {default})"))
    add_model_flags(parser.add_argument_group("model and data"))
    add_run_flags(parser.add_argument_group("run"))
    args = parser.parse_args(argv)
    for name, low in (("eval_batch_size", 1), ("log_every", 1), ("save_every", 0), ("tile", 1),
                      ("workers", -1), ("worker_timeout", 1), ("seed", 0), ("max_text", 3),
                      ("cache_gb", 0), ("top", 1), ("lose", 0)):
        value = getattr(args, name)
        if value is not None and not low <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')} is {value}; expected at least {low}")
    if args.seed is not None and args.seed >= 2 ** 32:
        parser.error(f"--seed is {args.seed}; expected below 4294967296")
    if args.plan and args.stage:
        parser.error("--plan and --stage both list stages; give one, and --set to change a key")
    return args


def add_model_flags(group):
    group.add_argument("--model", help="a released size, or tiny (default: what --weights holds; "
                       "tiny for the demo)")
    group.add_argument("--weights", help="where stage 1 begins: a file or folder; auto: OpenAI's "
                       "for the model; none: random (default: auto)")
    group.add_argument("--tokenizer", help="vocabulary of the text tower, a file or folder "
                       "(default: what the weights carry)")
    group.add_argument("--max-text", type=int, help="tokens (default: the model's, at most 77; 52 "
                       "for Chinese-CLIP)")
    group.add_argument("--data-dir", help="where named data lies (default: data)")
    group.add_argument("--cache", choices=("ram", "disk", "none"), default="ram", help="decoded "
                       "training images, short side 8/7 of the model's (default: ram)")
    group.add_argument("--cache-gb", type=float, default=8.0, help="give that cache up beyond "
                       "(default: 8)")
    group.add_argument("--no-feature-cache", action="store_true",
                       help="encode test sets and frozen towers anew each time")
    group.add_argument("--workers", type=int, default=-1, help="processes that read images "
                       "(default: -1: none beside a cache in memory, else up to 4)")


def add_run_flags(group):
    group.add_argument("--device", default=None, help="auto, cuda, mps, npu or cpu; refused when "
                       "absent (default: auto)")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default=None,
                       help="of the towers; the loss is fp32 (default: auto)")
    group.add_argument("--seed", type=int, help="default: 1")
    group.add_argument("--output-dir", default="", help="default: runs/train_staged/...")
    group.add_argument("--resume", choices=("auto", "none"), default="auto",
                       help="go on with what the folder holds (default: auto)")
    group.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    group.add_argument("--eval-only", action="store_true", help="score the model and stop")
    group.add_argument("--eval-batch-size", type=int, default=256, help="images (default: 256)")
    group.add_argument("--tile", type=int, default=1024, help="side of a loss tile (default: 1024)")
    group.add_argument("--lose", type=float, default=1.0, help="points of r1 that the checkpoint "
                       "recommended for keeping everything may lose on a set (default: 1)")
    group.add_argument("--query", nargs="+", metavar="TEXT", help="also search the test images by "
                       "each row's weights; FILE.txt: a query per line; an image: by likeness")
    group.add_argument("--top", type=int, default=10, help="results per query (default: 10)")
    group.add_argument("--export", choices=("safetensors", "chinese_clip", "hf", "openai",
                       "open_clip", "onnx", "clip-retrieval"), help="also write the chosen row as "
                       "that library loads it, or its test features")
    group.add_argument("--row", help="the row to export (default: the last stage)")
    group.add_argument("--dry-run", action="store_true", help="two steps of every stage, 64 images "
                       "of every test set, into a folder of its own, ..._dry_run")
    group.add_argument("--log-every", type=int, default=20, metavar="STEPS", help="default: 20")
    group.add_argument("--save-every", type=int, default=0, metavar="STEPS",
                       help="also save inside an epoch (default: 0, after each epoch)")
    group.add_argument("--deterministic", action="store_true",
                       help="refuse operations without a repeatable result")
    group.add_argument("--worker-timeout", type=int, default=600, metavar="SECONDS",
                       help="take a reading process to hang after this long (default: 600)")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


# -----------------------------------------------------------------------------
# The plan

def read_plan(args):
    """The command line and its plan file -> the stages, a list of namespaces with all keys of
    STAGE; eval_sets goes to `args`. Raises UserError: which key of which stage, and what it takes.
    """
    where = args.plan or "--stage"
    content = read_settings(args.plan) if args.plan else {
        "stages": [settings_of(line) for line in args.stage or []]}
    content = check_settings(content, PLAN, PLAN_ALSO, where)
    for key in ("model", "weights", "tokenizer", "max_text", "seed", "device", "precision",
                "data_dir"):
        if getattr(args, key) is None:
            setattr(args, key, content.get(key))
    args.name, args.eval_sets = content.get("name"), content.get("eval_sets") or {}
    listed = content.get("stages")
    if not listed and not args.plan:
        listed = DEMO if args.data in (None, "demo") else [{"name": "tuned"}]
    if not isinstance(listed, list) or not listed or not isinstance(args.eval_sets, dict):
        raise UserError(f"{where} has no list of stages; expected {{\"stages\": [{{\"name\": "
                        f"...}}, ...]}}, and eval_sets as {{name: data}}")
    if args.seed is not None and args.seed >= 2 ** 32:
        raise UserError(f"{where}: seed is {args.seed}; expected below 4294967296")
    args.eval_sets = eval_sets_of(args.eval_sets, where)
    base = {**{key: value for key, (value, _, _) in STAGE.items()},
            **(DEMO_DEFAULTS if listed is DEMO else {}),
            **check_settings(content.get("defaults") or {}, STAGE, ALSO, f"{where}: defaults"),
            **check_settings({key: getattr(args, key) for key in FLAGS if getattr(args, key)
                              is not None}, STAGE, {}, "the command line")}
    stages = []
    for i, entry in enumerate(listed, 1):
        if not isinstance(entry, dict) or "name" not in entry:
            raise UserError(f"{where}: stage {i} has no name")
        stages.append({**base, **check_settings(entry, STAGE, ALSO,
                                                f"{where}: stage {entry['name']!r}")})
    names = [stage["name"] for stage in stages]
    for change in args.set:
        name, dot, rest = change.partition(".")
        if name not in names or not dot:
            raise UserError(f"--set {change}: expected STAGE.KEY=VALUE with a stage of "
                            f"{', '.join(names)}")
        stages[names.index(name)].update(check_settings(settings_of(rest), STAGE, ALSO,
                                                        f"--set {change}"))
    for stage in stages:  # a test set that has a stage's name is that stage's
        given = args.eval_sets.pop(stage["name"], None)
        if given and (stage["test"] or given != {**PLACE, "data": given["data"]}):
            raise UserError(f"eval_sets: {stage['name']!r} is a stage too; give the set another "
                            f"name, or name its data alone and no test= in the stage")
        stage["test"] = given["data"] if given else stage["test"]
    return complete(stages, [stage["name"] for stage in stages], args)


def eval_sets_of(listed, where):
    """The `eval_sets` of a plan, {name: data, or what `PLACE` knows} -> {name: all of it}."""
    found = {}
    for name, given in listed.items():
        words = f"{where}: eval_sets: {name!r}"
        found[name] = {**PLACE, **check_settings(
            given if isinstance(given, dict) else {"data": given},
            {key: STAGE[key] for key in PLACE}, {}, words)}
        if not name.strip() or not found[name]["data"]:
            raise UserError(f"{words} has no {'data' if name.strip() else 'name'}")
    return found


def parent_of(stage, stages, names, earlier):
    """`from` of a stage, in the one spelling that its file has too: wise0.5 for wise0.50."""
    parent, _, which = stage["from"].partition(":")
    if parent not in names:
        return stage["from"]
    between = re.fullmatch(r"wise(\d*\.?\d+)", which)
    if parent not in earlier or not between and which not in ("", "best", "last"):
        raise UserError(f"stage {stage['name']!r} starts from {stage['from']!r}; expected an "
                        f"earlier stage ({', '.join(earlier) or 'there is none'}) with best, last "
                        f"or wise and a number of its list")
    which = f"wise{float(between[1]):g}" if between else which or "best"
    shares = stages[names.index(parent)]["wise"]
    if between and which not in [f"wise{share:g}" for share in shares]:
        raise UserError(f"stage {stage['name']!r} starts from {stage['from']!r}, which is not "
                        f"among wise={shares} of that stage")
    return f"{parent}:{which}"


def complete(stages, names, args):
    """Fill in what depends on other stages; UserError on what contradicts itself."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"two stages are called {twice!r}; a name is also a folder, so give each "
                        f"its own")
    for flag in ("only", "until", "from_stage"):
        if getattr(args, flag) not in (None, *names):
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected one of "
                            f"{', '.join(names)}")
    if args.from_stage and any(names.index(last) < names.index(args.from_stage)
                               for last in (args.until, args.only) if last):
        raise UserError(f"--from-stage {args.from_stage} trains what --until or --only leaves out; "
                        f"give one of them")
    for i, stage in enumerate(stages):
        name, earlier = stage["name"], names[:i]
        if not stage["data"]:
            raise UserError(f"stage {name!r} has no data; name its folder or file with data=")
        stage["from"] = stage["from"] or (f"{names[i - 1]}:best" if i else "init")
        stage["from"] = parent_of(stage, stages, names, earlier)
        odd = sorted(set(stage["replay"]) - set(earlier))
        if odd or sum(stage["replay"].values()) > 0.9:
            raise UserError(f"stage {name!r} replays {odd[0] if odd else 'over 90 %'}; expected "
                            f"earlier stages ({', '.join(earlier) or 'there is none'}), together "
                            f"at most 0.9")
        if stage["accum_steps"] > 1:
            stage["micro_batch"] = -(-stage["batch_size"] // stage["accum_steps"])
        stage["lr"] = stage["lr"] or LR_AT_1024 * stage["batch_size"] / 1024
        stage["steps"] = 2 if args.dry_run else stage["steps"]
        if not stage["epochs"] and not stage["steps"]:
            raise UserError(f"stage {name!r} has no steps: epochs is 0; take the stage out, or "
                            f"give it epochs or steps")
    return [types.SimpleNamespace(**{key: value for key, value in stage.items() if key != "from"},
                                  parent=stage["from"], told={key: stage[key] for key in FLAGS})
            for stage in stages]


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
    """Unit features of pieces of a batch, twice with the same random numbers. What a frozen tower
    made of a piece (`pooled`) is taken in its place."""

    def __init__(self, run, model, seed, mask_ratio=0.0):
        self.run, self.model, self.seed, self.mask_ratio = run, model, seed, mask_ratio

    def image(self, piece):
        if piece.ndim == 2:
            return unit(project(self.run.move(piece), self.model.visual.proj))
        images = normalise(self.run.move(piece), self.model.image_mean, self.model.image_std)
        return self.model.encode_image(images, normalize=True, patches=self.patches(len(images)))

    def patches(self, n):
        """(n, K) places of the patches that are kept, drawn anew for each image; None: all."""
        if not self.mask_ratio:
            return None
        places = (self.model.config.image_size // self.model.config.vision_patch) ** 2
        kept = max(1, int(places * (1 - self.mask_ratio)))
        return self.run.move(torch.rand(n, places).argsort(dim=1)[:, :kept])

    def text(self, piece):
        tokens, ends = piece
        if ends is None:
            return unit(project(self.run.move(tokens), self.model.text_projection))
        tokens, ends = self.run.move(tokens, ends)
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


def add_gradient(run, model, images, tokens, ids, counts, stage, args, scaler, seed, teacher=None):
    """Add the gradient of the batch over all processes to `.grad`, this process's part of it; the
    sum over processes is the gradient. -> the loss and its terms, () each, this process's part.

    images (n, 3, R, R) uint8, tokens (n, L) and ids (n, k) are this process's pairs, on the host,
    or rows (n, F) of what a frozen tower made of them; counts: pairs in each process; seed: of
    dropout in this step; teacher: the model to stay near, for `distill`.
    """
    encoder = Encoder(run, model, seed * run.world_size + run.rank, stage.mask_ratio)
    image_parts, text_parts, places = cut(images, tokens, stage.micro_batch, model)
    free = free_sides(model)
    image, last_image = encoder.all("image", image_parts, free["image"])         # (n, D)
    text, last_text = encoder.all("text", text_parts, free["text"])
    if stage.positives == "diag":
        ids = None  # nothing to look for in the tiles
    places, alone = run.move(places), run.world_size == 1

    # ---- the loss, in fp32 over all processes ----------------------------------------------------
    with torch.no_grad():
        text = text[places]
        scale = model.logit_scale.exp()
        ids = ids if ids is None else run.move(ids)
        sides = Sides(image, text, ids, 0, None)
        if not alone:
            sides = Sides(image, run.gather(text, counts), ids if ids is None else run.gather(
                ids, counts), sum(counts[:run.rank]), run, run.rank)
        found = info_nce(sides, scale, stage.positives, args.tile, image.dtype)
        d_image, d_text = found.image, found.text if alone else run.sum(found.text)[sides.own]
        losses = {"loss": found.loss}
        if teacher is not None:
            far, d_far_image, d_far_text = departure(run, teacher, image, text, image_parts,
                                                     text_parts, places, sum(counts))
            losses = {"loss": found.loss + stage.distill * far, "infonce": found.loss,
                      "departure": far}
            d_image = d_image + stage.distill * d_far_image
            d_text = d_text + stage.distill * d_far_text
    # ---------------------------------------------------------------------------------------------

    send = scaler.scale(image.new_ones(()))
    p = model.logit_scale
    if p.requires_grad:
        p.grad = torch.as_tensor(found.scale * scale * send, dtype=p.dtype, device=p.device) + (
            0 if p.grad is None else p.grad)
    if free["text"]:
        encoder.backward("text", text_parts, last_text, (d_text * send)[places.argsort()])
    if free["image"]:
        encoder.backward("image", image_parts, last_image, d_image * send)
    return losses


def cut(images, tokens, micro, model):
    """`pieces`, also of texts that a frozen tower has read already."""
    if not tokens.is_floating_point():
        return pieces(images, tokens, micro, model.pad_id if model.config.text else None)
    parts = tokens.split(micro or max(1, len(tokens)))
    return (list(images.split(micro or max(1, len(images)))), [(part, None) for part in parts],
            torch.arange(len(tokens)))


def departure(run, teacher, image, text, image_parts, text_parts, places, total):
    """Mean over pairs and towers of 1 - cosine to the teacher's features of the same pixels and
    words -> this process's share, and its gradients for image and text (n, D)."""
    encoder = Encoder(run, teacher, 0)
    theirs = [encoder.all(kind, parts, False)[0] for kind, parts in (("image", image_parts),
                                                                     ("text", text_parts))]
    theirs[1] = theirs[1][places]
    near = sum((ours * other).sum() for ours, other in zip((image, text), theirs))
    return ((2 * len(image) - near) / (2 * total), *(-other / (2 * total) for other in theirs))


def free_sides(model, heads=True):
    """Which tower has anything to train, its head included or not."""
    free = {"image": False, "text": False}
    for name, p in model.named_parameters():
        if name != "logit_scale" and (heads or not name.startswith(HEADS)):
            free["image" if name.startswith("visual.") else "text"] |= p.requires_grad
    return free


# -----------------------------------------------------------------------------
# What trains, and how fast

def choose(model, stage):
    """Say what trains in a stage -> {name: parameter that moves}, {name: LowRank}."""
    freeze(model, stage.freeze)
    if stage.scale != "train":
        model.logit_scale.requires_grad_(False)
    updates = {}
    if stage.lora:
        for name, p in model.named_parameters():
            attention = re.search(r"attn\.(in_proj_weight|out_proj\.weight)|attention\.\S*(query|"
                                  r"key|value|dense)\.weight", name)
            if attention and p.requires_grad and "attnpool" not in name:
                updates[name] = LowRank(p, stage.lora)
            elif not name.startswith((*HEADS, "logit_scale")):
                p.requires_grad_(False)
    moving = {name: p for name, p in model.named_parameters() if p.requires_grad
              and name not in updates}
    for name, update in updates.items():
        moving |= {f"{name}.A": update.A, f"{name}.B": update.B}
    if not set(moving) - {"logit_scale"}:
        raise UserError(f"stage {stage.name!r}: freeze={'+'.join(stage.freeze)} leaves nothing to "
                        f"train")
    return moving, updates


def decay_groups(moving, stage):
    """Parameters by learning rate and weight decay -> list of dicts for AdamW. The rate of a tower
    falls by `layer_decay` for each block away from its heads."""
    groups, top = {}, {True: 0, False: 0}
    for name in moving:
        if height(name) < math.inf:
            side = name.startswith("visual.")
            top[side] = max(top[side], height(name))
    for name, p in moving.items():
        side = name.startswith("visual.")
        head = name.startswith((*HEADS, "logit_scale"))
        lr = stage.lr if head else stage.image_lr if side else stage.text_lr
        lr = stage.lr if lr is None else lr
        away = max(0, top[side] + 1 - height(name)) if not head else 0
        if stage.wd_rule == "chinese-clip":
            plain = any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
        else:
            plain = p.ndim < 2 or "embedding" in name
        key = lr * stage.layer_decay ** away, 0.0 if plain else stage.wd
        groups.setdefault(key, []).append(p)
    return [{"params": some, "lr": lr, "base_lr": lr, "weight_decay": wd}
            for (lr, wd), some in groups.items()]


def rate(step, steps, warmup, schedule):
    """Factor on the learning rates in a step (from 0): up in equal stages, then down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share}.get(schedule, 1.0)


def training_mode(model, stage):
    """Dropout on where something trains; BatchNorm as `bn` says."""
    model.train()
    free = free_sides(model, heads=False)
    text = model.bert if model.config.text else model.transformer
    for tower, trains in ((model.visual, free["image"]), (text, free["text"])):
        tower.train(trains)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and (
                stage.bn == "freeze" or not any(p.requires_grad for p in m.parameters())):
            m.eval()


# -----------------------------------------------------------------------------
# Features: what is encoded once and kept, by the content of weights, pixels and words

def kept(run, args, identity, compute):
    """`compute()` -> (array, the file of the cache it is in or None), the same in every process and
    computed only where the cache lacks it. identity: plain values that decide every bit of it."""
    def absent():
        raise LookupError

    def look(compute=absent):
        try:
            found = cached_features(args.feature_cache, identity, compute)[0]
            return np.array(found), pathlib.Path(found.filename).name
        except LookupError:
            return None
    if args.feature_cache is None:
        return compute(), None
    found = run.on_first(look)
    if found is None:
        computed = compute()
        found = run.on_first(lambda: look(lambda: computed))
    return found


@torch.no_grad()
def encode_images(run, model, pairs, args, pooled=False, kept=None):
    """-> (n, D) unit features of the images of a PairSet, or what the head gets; rows of NaN for
    images that cannot be read. kept: (n, F), what a frozen tower gave the head."""
    encoder, rows = Encoder(run, model, 0), []
    if kept is not None:
        return torch.cat([encoder.one("image", 0, part).cpu()
                          for part in torch.from_numpy(kept).split(4096)]).numpy()
    loader = make_loader(pairs.image_items(), args.eval_batch_size * run.world_size, shuffle=False,
                         rank=run.rank, world_size=run.world_size, timeout=args.worker_timeout,
                         **run.loader_options(0 if pairs.pixels else args.workers))
    for done, (images, positions, indices) in enumerate(loader, 1):
        if pooled:
            images = normalise(run.move(images), model.image_mean, model.image_std)
            with run.autocast():
                found = model.visual.pooled(images).float().cpu()
        else:
            found = encoder.one("image", 0, images).cpu()
        found[positions < 0] = math.nan
        rows.append((indices, found))
        run.progress(done, len(loader), f"encoding images of {pairs.name}")
    indices, found = (torch.cat(part) for part in zip(*sum(run.gather_objects(rows), [])))
    return found[indices.argsort()].numpy()


@torch.no_grad()
def encode_texts(run, model, groups, places, pooled=False, kept=None):
    """-> (M, D) unit features of texts in groups, as `bucket` gives them, or what the head gets."""
    encoder, rows = Encoder(run, model, 0), []
    if kept is not None:
        return torch.cat([encoder.one("text", 0, (part, None)).cpu()
                          for part in torch.from_numpy(kept).split(4096)]).numpy()
    for i in range(run.rank, len(groups), run.world_size):
        if pooled:
            with run.autocast():
                rows.append((i, model.pooled_text(*run.move(*groups[i])).float().cpu()))
        else:
            rows.append((i, encoder.one("text", 0, groups[i]).cpu()))
    rows = sorted(sum(run.gather_objects(rows), []), key=lambda row: row[0])
    return torch.cat([row[1] for row in rows])[places].numpy()


class Target:
    """Held-out pairs as a search task: what recall is measured on."""

    def __init__(self, name, pairs, tokenizer, model, args):
        task = pairs.retrieval()
        self.name, self.texts, self.relevant = name, task.texts, task.relevant
        self.notes, self.source = task.notes, pairs.source
        view = view_of(model, args)
        self.images = task.images.with_transform(view)
        self.tokens = tokenizer(task.texts, context_length=args.max_text)
        self.groups, self.places = bucket(self.tokens, most=512, pad_id=model.pad_id
                                          if model.config.text else None)
        self.frozen = {}  # side: what a tower that does not train in this stage makes of the set
        self.pixels = {"images": hash_of(self.images.contents()), **look_of(view)}
        self.words = {"tokens": hash_of(self.tokens.tolist())}
        self.identity = [self.pixels, self.words, hash_of(self.relevant.tolist())]


def view_of(model, args):
    """How an image is shown to a model when nothing varies."""
    return Preprocess(model.config.image_size, mean=model.image_mean, std=model.image_std,
                      dtype=torch.uint8, squash=args.squash)


def look_of(view):
    return {"size": view.size, "squash": view.squash, "mean": view.mean, "std": view.std}


def hash_of(x):
    return hashlib.sha256(json.dumps(x, sort_keys=True).encode()).hexdigest()


def digests(model, args):
    """What names the features of a model in the cache: the sha256 of each tower, {} without one."""
    return {} if args.feature_cache is None else {side: digest(model, side)
                                                  for side in ("image", "text")}


def unit_features(run, model, side, target, towers, args):
    """-> ((n, D) unit features of the images or texts of a Target, their file), out of the cache
    if they are there. towers: the model's `digests`."""
    look = target.pixels if side == "image" else target.words
    return kept(run, args, {"tower": towers.get(side), **look, "unit": True,
                            "precision": run.precision},
                (lambda: encode_images(run, model, target.images, args)) if side == "image" else
                lambda: encode_texts(run, model, target.groups, target.places))


def features(run, model, target, args, towers=None):
    """-> unit features (n, D), (M, D), relevant (R, 2) and the two files. Images that cannot be
    read are left out, with the texts that have no other. towers: the model's `digests`, to take
    features from the cache and put them there."""
    files = None
    if towers is not None:
        found = [unit_features(run, model, side, target, towers, args)
                 for side in ("image", "text")]
        (image, text), files = ([torch.from_numpy(rows) for rows, _ in found],
                                [file for _, file in found])
    else:
        image, text = (torch.from_numpy(rows) for rows in (
            encode_images(run, model, target.images, args, kept=target.frozen.get("image")),
            encode_texts(run, model, target.groups, target.places,
                         kept=target.frozen.get("text"))))
    relevant, lost = target.relevant, image.isnan().any(dim=1)
    if lost.any():
        target.images.refuse_losses(lost.nonzero()[:, 0].tolist(), "they do not decode")
        left = relevant[~lost[relevant[:, 1]]]
        gone = set(relevant[:, 0].tolist()) - set(left[:, 0].tolist())
        stays = torch.tensor([i not in gone for i in range(len(text))])
        relevant = torch.stack([(stays.cumsum(0) - 1)[left[:, 0]],
                                ((~lost).cumsum(0) - 1)[left[:, 1]]], dim=1)
        image, text = image[~lost], text[stays]
    return image, text, relevant, files


def evaluate(run, model, target, args, towers=None):
    """Recall both ways on a Target -> dict of floats, under "table" what the bootstrap takes, and
    under "files" where the features are kept."""
    was_training = model.training
    model.eval()
    image, text, relevant, files = features(run, model, target, args, towers)
    model.train(was_training)
    table = hit_table(retrieval_ranks(image, text, relevant), relevant, len(image))
    return {**recalls(table.sum(axis=0)), "gap": float((image.mean(0) - text.mean(0)).norm()),
            "images": len(image), "texts": len(text), "table": table, "files": files,
            "scale": float(model.logit_scale.detach().exp())}


# -----------------------------------------------------------------------------
# A stage

class State:
    """Everything that training changes, and how it is kept: what a checkpoint holds."""

    def __init__(self, run, model, stage, args):
        self.run, self.model, self.stage = run, model, stage
        torch.manual_seed(args.seed)  # of the low-rank updates
        self.moving, self.updates = choose(model, stage)
        if stage.scale != "train":
            with torch.no_grad():
                model.logit_scale.fill_(math.log(stage.scale))
        self.optimizer = torch.optim.AdamW(decay_groups(self.moving, stage), eps=stage.eps,
                                           betas=(0.9, stage.beta2), fused=run.fused_optimizer)
        self.scaler = run.scaler()
        self.epoch = self.batch = self.step = 0   # what comes next
        self.best, self.best_step, self.begun, self.stale, self.over = -1.0, 0, None, 0, False
        self.clock = [0.0, 0]                     # seconds of training, and pairs

    def save(self):
        buffers = {n: b for n, b in self.model.named_buffers() if b.is_floating_point()}
        self.run.save("checkpoint_last.pt", {
            "format": "staged/1", "weights": {n: p.detach() for n, p in self.moving.items()},
            "buffers": buffers, "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(), "identity": self.stage.identity,
            **{name: getattr(self, name) for name in self.PLAIN}})

    PLAIN = ("epoch", "batch", "step", "best", "best_step", "begun", "stale", "over", "clock")

    @torch.no_grad()
    def load(self, stored):
        odd = sorted(set(stored["weights"]) ^ set(self.moving))
        if stored.get("format") != "staged/1" or odd:
            raise UserError(f"the checkpoint in {self.run.out} is of another stage"
                            + (f": {odd[0]!r} moves on one side only" if odd else "")
                            + f"; --from-stage {self.stage.name} trains it again")
        for name, p in self.moving.items():
            p.copy_(stored["weights"][name])
        for name, buffer in self.model.named_buffers():
            if name in stored["buffers"]:
                buffer.copy_(stored["buffers"][name])
        for update in self.updates.values():
            update.push()
        self.optimizer.load_state_dict(stored["optimizer"])
        self.scaler.load_state_dict(stored["scaler"])
        for name in self.PLAIN:
            setattr(self, name, stored[name])

    def write(self, name):
        """The whole model as a file of its own, which `load` and --weights take."""
        self.run.on_first(lambda: str(save(self.model, self.run.out / f"{name}.safetensors")))


def train(run, model, teacher, loader, tokens, ids, target, state, stage, args):
    """Train `model` in place. loader: batches of the stage's pairs, tokens (M, L) and ids (M, 2) of
    all their captions; target: held-out pairs or None; teacher: the model to stay near, or None."""
    batches = loader.batch_sampler
    counts = [len(range(rank, batches.batch_size, run.world_size))
              for rank in range(run.world_size)]
    if state.step == 0 and state.begun is None:  # what it begins with is its first candidate
        finish_epoch(run, model, target, state, stage, args)
        state.save()
    training_mode(model, stage)
    unchecked, seen, replaced, waited, losses = [], 0, 0, 0.0, {}
    began = time.perf_counter()
    while not state.over:
        batches.set_epoch(state.epoch, first_batch=state.batch)
        clock = time.perf_counter()
        for images, used, asked in loader:
            waited += time.perf_counter() - clock
            replaced += int((used != asked).sum())

            # ---- one step -----------------------------------------------------------------
            for group in state.optimizer.param_groups:
                lr = group["base_lr"] * rate(state.step, stage.total, stage.warm, stage.schedule)
                group["lr"] = lr if state.step < stage.warm else max(lr, stage.min_lr)
            model.zero_grad(set_to_none=True)
            losses = add_gradient(run, model, images, tokens[used], ids[used], counts, stage, args,
                                  state.scaler, args.seed * 1_000_003 + state.step, teacher)
            run.sum_gradients(model.parameters())
            for update in state.updates.values():
                update.pull()
            fine = run.drop_bad_gradients(state.moving.values(), state.scaler)
            if stage.grad_clip:
                state.scaler.unscale_(state.optimizer)
                nn.utils.clip_grad_norm_(state.moving.values(), stage.grad_clip)
            state.scaler.step(state.optimizer)
            state.scaler.update()
            for update in state.updates.values():
                update.push()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(MAX_SCALE))
            # -------------------------------------------------------------------------------

            state.step, state.batch = state.step + 1, state.batch + 1
            seen += batches.batch_size
            if state.batch == len(loader):
                state.epoch, state.batch = state.epoch + 1, 0
            unchecked.append((torch.where(fine, losses["loss"], math.nan), used))
            leaving, done = run.stop_requested(), state.step == stage.total
            saving = leaving or state.batch == 0 or done or (
                args.save_every and state.step % args.save_every == 0)
            if saving or state.step % args.log_every == 0:  # reading a loss waits for the device
                check_finite(run, loader.dataset, unchecked)
            if state.step % args.log_every == 0 or done:
                lost = run.sum(replaced)  # images that could not be read
                run.log(state.step, steps=stage.total, epoch=state.epoch + (state.batch > 0),
                        samples=seen, waited=waited, **{k: run.sum(v) for k, v in losses.items()},
                        ln_batch=math.log(batches.batch_size),
                        scale=model.logit_scale.detach().exp(),
                        lr=max(group["lr"] for group in state.optimizer.param_groups),
                        **({"replaced": lost} if lost else {}), **(
                            {"loss_scale": state.scaler.get_scale()}
                            if state.scaler.is_enabled() else {}))
                seen, replaced, waited = 0, 0, 0.0
            state.clock = [state.clock[0] + time.perf_counter() - began,
                           state.clock[1] + batches.batch_size]
            if saving:
                if done or state.batch == 0 and state.epoch % stage.eval_every == 0:
                    finish_epoch(run, model, target, state, stage, args)
                state.over |= done
                state.save()
                training_mode(model, stage)
            if leaving:
                raise run.interrupted()
            if state.over:
                break
            began = clock = time.perf_counter()


def finish_epoch(run, model, target, state, stage, args):
    """Score the held-out pairs, keep the weights if they are the best so far, and stop a stage that
    has not improved for `early_stop` evaluations. Without held-out pairs the last are the best."""
    if target is None:
        state.best_step = state.step
        return state.write("best")
    scores = evaluate(run, model, target, args)
    run.log(state.step, split=target.name, **{
        key: scores[key] for key in (*RECALLS, "mean_recall", "r1", "gap")})
    score = scores[stage.select]
    state.begun = score if state.begun is None else state.begun
    state.stale += 1
    if score > state.best:
        state.best, state.best_step, state.stale = score, state.step, 0
        state.write("best")
    state.over = bool(stage.early_stop and state.stale >= stage.early_stop)


def check_finite(run, pairs, unchecked):
    """Report the steps that were skipped for a loss or gradient that is not a number, with the
    images of their batch; stop after several in a row. Empties `unchecked`."""
    run.check_finite([loss for loss, _ in unchecked], lambda i: "the batch of " + ", ".join(
        pairs.paths[pairs.owner[c]] for c in unchecked[i][1].tolist()[:8]))
    unchecked.clear()


def frozen_towers(model, stage):
    """The towers that make the same of an image or text in every step of a stage: nothing in them
    trains, below the head, and nothing varies what they see."""
    free = free_sides(model, heads=False)
    still = [] if free["image"] or stage.augment != "none" or stage.mask_ratio or (
        not hasattr(model.visual, "pooled")) else ["image"]
    return still + ["text"] * (not free["text"])


def identities(parts):
    """(M, 2) numbers of each caption of several PairSets: of its image, and of its wording."""
    image, wording = {}, {}
    return torch.tensor([
        (image.setdefault((pairs.root, pairs.paths[owner]), len(image)),
         wording.setdefault(" ".join(caption.casefold().split()), len(wording)))
        for pairs in parts for owner, caption in zip(pairs.owner, pairs.captions)])


def prepare(run, model, stage, args):
    """The PairSets that a stage's batches come from, its own first, with their transform and their
    cache of decoded images."""
    size = model.config.image_size
    look = dict(mean=model.image_mean, std=model.image_std, dtype=torch.uint8)
    view = view_of(model, args) if stage.augment == "none" else Augment(
        size, stage.augment, args.seed, stage.flip, stage.colour, **look)
    parts = []
    for pairs in [stage.train, *(stage.others[name].train for name in stage.replay)]:
        pairs = pairs.with_transform(view)
        known = len(pairs.notes)
        pairs.cache("none" if "image" in frozen_towers(model, stage) else args.cache,
                    size * 8 // 7, args.out / "cache" if args.out else None,
                    int(args.cache_gb * 2 ** 30), run.loader_options(args.workers)["workers"])
        for note in pairs.notes[known:]:
            run.say(note)
        parts.append(pairs)
    return parts


def run_stage(run, model, stage, tokenizer, args):
    """Train one stage, from the weights that are in `model`; leaves best and last as files."""
    run = run.enter(stage.folder, args.seed)
    stored = None
    if run.claim({"name": stage.name, "from": stage.parent, **stage.told}, stage.identity,
                 resume=True, overwrite=stage.again):
        stored = run.load("checkpoint_last.pt")
        run.rewind(stored["step"] if stored else -1)
    teacher = copy.deepcopy(model).requires_grad_(False).eval() if stage.distill else None
    start = copy.deepcopy(model.state_dict()) if stage.wise else {}
    state = State(run, model, stage, args)
    parts = prepare(run, model, stage, args)
    loader = make_mixed_loader(parts, stage.sizes, args.seed, stage.captions, run.rank,
                               run.world_size, timeout=args.worker_timeout, **run.loader_options(
                                   0 if parts[0].pixels and args.workers < 0 else args.workers))
    tokens = tokenizer(loader.dataset.captions, context_length=args.max_text)
    loader, tokens, target = with_frozen(run, model, stage, loader, parts, tokens, args)
    if stored:
        state.load(stored)
    say_moving(run, model, state, stage, loader)
    run.watch_signals()
    try:
        with dropout_of(model, stage.dropout):
            model.recompute_blocks(stage.recompute)
            train(run, model, teacher, loader, tokens, identities(parts), target, state, stage,
                  args)
    finally:
        model.recompute_blocks(False)
        run.unwatch_signals()
    state.write("last")
    if state.best_step == 0 and target is not None:
        run.say(f"stage {stage.name}: no step improved {stage.select} on {target.name}, "
                f"{state.begun:.2f} at its start; its best is what it began with")
    if stage.wise:
        put(model, stage.folder / "best.safetensors")
        end = copy.deepcopy(model.state_dict())
    for share in stage.wise:
        put(model, between(start, end, share))
        state.write(f"wise{share:g}")
    model.requires_grad_(True)
    seconds, pairs = state.clock
    return run.finish({"method": "staged", "stage": stage.name, "steps": state.step,
                       "best_step": state.best_step, "begun": state.begun,
                       "best": None if target is None else state.best,
                       "select": stage.select, "epochs": state.epoch,
                       "trainable_parameters": sum(p.numel() for p in state.moving.values()),
                       "trainable_tensors": len(state.moving),
                       "samples_per_second": pairs / seconds if seconds else 0.0})


def with_frozen(run, model, stage, loader, parts, tokens, args):
    """Loader, tokens and held-out set with kept features in the place of what a frozen tower would
    compute in every step again."""
    target, still = stage.val and copy.copy(stage.val), frozen_towers(model, stage)
    model.eval()
    if target:
        target.frozen = {}
    if args.feature_cache is not None and "image" in still:
        def images(pairs, look):
            return kept(run, args, {**look, "tower": digest(model, "image"), "pooled": True,
                                    "precision": run.precision},
                        lambda: encode_images(run, model, pairs, args, pooled=True))[0]
        look = look_of(parts[0].transform)
        rows = [images(part, {**look, "images": hash_of(part.contents())}) for part in parts]
        for part, some in zip(parts, rows):
            part.refuse_losses(np.flatnonzero(np.isnan(some).any(axis=1)).tolist(),
                               "they do not decode")
        loader = FeatureLoader(loader, torch.from_numpy(np.concatenate(rows)))
        if target:
            target.frozen["image"] = images(target.images, target.pixels)
    if args.feature_cache is not None and "text" in still:
        def texts(tokens):
            groups, places = bucket(tokens, most=512, pad_id=model.pad_id if model.config.text
                                    else None)
            return kept(run, args, {"tokens": hash_of(tokens.tolist()), "pooled": True, "tower":
                                    digest(model, "text"), "precision": run.precision},
                        lambda: encode_texts(run, model, groups, places, pooled=True))[0]
        tokens = torch.from_numpy(texts(tokens))
        if target:
            target.frozen["text"] = texts(target.tokens)
    return loader, tokens, target


def between(start, end, share):
    """WiSE-FT (Wortsman et al. 2022): (1 - share) * start + share * end, exact at both ends."""
    return {name: torch.lerp(x, end[name], share) if x.is_floating_point() else end[name]
            for name, x in start.items()}


def put(model, weights):
    """Weights into `model`: a file, or a state dict. UserError unless they are of its shape."""
    if not isinstance(weights, dict):
        if not pathlib.Path(weights).exists():
            raise UserError(f"the weights {weights} are gone; train the stage they come from again "
                            f"with --from-stage, or name others with from=")
        weights = same_size(load(weights), model, weights).state_dict()
    model.load_state_dict(weights)


def same_size(other, model, path):
    """`other`, a CLIP that was read from `path`. UserError unless it is of the size of `model`."""
    ours, theirs = dataclasses.asdict(model.config), dataclasses.asdict(other.config)
    odd = [f"{key} {theirs[key]}, not {ours[key]}" for key in ours if ours[key] != theirs[key]]
    if odd:
        raise UserError(f"{path} is a CLIP of another size than the plan's: {'; '.join(odd)}")
    return other


def say_moving(run, model, state, stage, loader):
    free = sum(p.numel() for p in state.moving.values())
    run.say(f"stage {stage.name} from {stage.parent}: {free:,} weights in {len(state.moving)} "
            f"tensors move, of {sum(p.numel() for p in model.parameters()):,}; {stage.total} "
            f"steps, {len(loader)} an epoch, of {sum(stage.sizes)} pairs, ln B "
            f"{math.log(sum(stage.sizes)):.3f}" + (
                f"; step {state.step} is done" if state.step else ""))


# -----------------------------------------------------------------------------
# What a plan needs before it starts: model, tokenizer, data, and what speaks against it

def open_model(args, demo):
    """The CLIP that the stages begin with, on the CPU."""
    torch.manual_seed(args.seed)
    args.weights = args.weights or "auto"
    given = args.weights not in ("auto", "none")
    args.model = args.model or ("tiny" if demo and not given else None)
    known = canonical_name(args.model) if args.model else None
    if given and args.model is None:
        return load(args.weights)
    if known is None:
        raise UserError(f"unknown --model {args.model!r}; known: {', '.join(CONFIGS)}. A file goes "
                        f"to --weights" if args.model else "name the CLIP to start from with "
                        "--weights FILE, or a released one with --model")
    if not given:
        return CLIP(CONFIGS[known]) if args.weights == "none" else load(known)
    model = load(args.weights)
    with torch.device("meta"):
        named = CLIP(CONFIGS[known])
    ours, theirs = ({key: tuple(x.shape) for key, x in m.state_dict().items()}
                    for m in (named, model))
    odd = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    if odd:
        raise UserError(f"{args.weights} is no {args.model}: {odd[0]} is {theirs.get(odd[0])} "
                        f"there and {ours.get(odd[0])} in that model; leave --model out, or name "
                        f"the right file")
    return model


def open_texts(args, model):
    """The tokenizer of the model's text tower; its vocabulary goes into every file we write."""
    chinese, own = is_chinese_clip(model.config), model.config.vocab_size != 21_128
    place = args.tokenizer or model.vocabulary
    if not place and model.text_kind != "bpe":
        beside = expanded(args.weights)
        beside = beside.parent if beside.is_file() else beside
        found = importlib.util.find_spec("cn_clip") if chinese else None
        places = [beside / "vocab.txt", *(pathlib.Path(folder) / "clip" / "vocab.txt" for folder in
                                          (found.submodule_search_locations if found else ()))]
        place = next((path for path in places if path.exists()), None)
        if place is None:
            raise UserError(f"{args.weights} carries no vocabulary; name one with --tokenizer" + (
                " (pip download --no-deps cn_clip, a zip, has cn_clip/clip/vocab.txt)" * chinese))
    if not place:
        tokenizer = BPETokenizer()
    elif chinese and not isinstance(place, dict):
        tokenizer = ChineseTokenizer(place, any_vocab=own)
    else:
        tokenizer = open_tokenizer(place)
    if tokenizer.text_kind != model.text_kind or tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"the tokenizer {args.tokenizer or ''} is a {tokenizer.text_kind} of "
                        f"{tokenizer.vocab_size:,} tokens and the text tower takes a "
                        f"{model.text_kind} of {model.config.vocab_size:,}; name its own with "
                        f"--tokenizer")
    model.vocabulary = getattr(tokenizer, "vocabulary", None)
    most = min(model.config.context_length, 52 if chinese else 77)
    args.max_text = min(args.max_text or most, model.config.context_length)
    args.squash = chinese
    return tokenizer


def named_split(source):
    """PATH@split -> its two parts; None for the second where there is none."""
    path, at, split = source.rpartition("@")
    return (path, split) if at and split in ("train", "val", "test") else (source, None)


def open_split(source, split, ratio, stage, args, kind=""):
    """The pairs of `source`, PATH or PATH@split -> PairSet with the stage's choice of images.
    ratio: how images are cut where there are no splits. kind "val": the val split, if it has one.
    """
    source, asked = named_split(source)
    own = source == named_split(stage.data)[0]  # the layout is that of the stage's data alone
    where = dict(name_or_path=source, split=asked or split, data_dir=args.data_dir or "data",
                 layout=stage.layout if own else "auto",
                 captions=stage.caption_file if own else None, split_ratio=ratio)
    pairs = open_pairs(**where)
    if kind == "val" and not asked and pairs.counts["val"]:
        where["split"] = "val"  # what is held out is no test
        pairs = open_pairs(**where)
    if stage.matching:
        wanted = re.compile(stage.matching, re.IGNORECASE)
        chosen = [i for i, path in enumerate(pairs.paths)
                  if wanted.search("\n".join([path, *pairs.texts_of(i)]))]
        if len(chosen) < 2:
            raise UserError(f"stage {stage.name!r}: {len(chosen)} {split} images of {source} match "
                            f"{stage.matching!r}; expected 2 or more")
        pairs = pairs.subset(chosen)
    pairs.check_files()
    pairs.source = where  # so that report.py finds the images
    return pairs


def open_sets(stages, tokenizer, model, args):
    """Give each stage its pairs and its held-out Target -> {name: test Target} of all."""
    tests, whole = {}, (0.0, 0.0, 1.0)

    def held_out(name, pairs):
        if args.dry_run and len(pairs.paths) > DRY_IMAGES:
            pairs = pairs.subset(range(DRY_IMAGES))
        return Target(name, pairs, tokenizer, model, args)
    for stage in stages:
        stage.others = {other.name: other for other in stages}
        # Data without splits gives held-out images only where none are named.
        ratio = (1.0, 0.0, 0.0) if stage.val else (
            HASHED[0] + HASHED[2], HASHED[1], 0.0) if stage.test else HASHED
        stage.train = open_split(stage.data, "train", ratio, stage, args)
        counts = stage.train.counts
        if stage.max_samples:
            stage.train = stage.train.subset(range(min(stage.max_samples, len(stage.train.paths))))
        data, taken = named_split(stage.data)
        val, test = (
            open_split(named, "test", whole, stage, args, split) if named else
            open_split(data, split, ratio, stage, args)
            if counts.get(split) and split != taken else None
            for split, named in (("val", stage.val), ("test", stage.test)))
        if val is None and test is None:
            raise UserError(f"stage {stage.name!r}: {stage.data} has neither val nor test images "
                            f"to judge it by; name them with test=")
        stage.val = val and held_out(f"{stage.name} val", val)
        tests[stage.name] = held_out(stage.name, test or val)
    for name, source in args.eval_sets.items():
        tests[name] = held_out(name, open_split(source["data"], "test", whole,
                                                types.SimpleNamespace(name=name, **source), args))
    return tests


def preflight(run, stages, tests, tokenizer, model, args):
    """Work out each stage's steps and say what it will do; UserError on what cannot be meant."""
    seen = {}  # bytes of a training image -> the stage
    opened = [stage.train for stage in stages] + [target.images for target in tests.values()]
    for note in dict.fromkeys(note for pairs in opened for note in pairs.notes):
        run.say(note)
    for stage in stages:
        took = {name: round(share * stage.batch_size) for name, share in stage.replay.items()}
        stage.sizes = [stage.batch_size - sum(took.values()), *took.values()]
        for part, size in zip([stage.name, *took], stage.sizes):
            images = len(stage.others[part].train.paths)
            if not 2 <= size <= images:
                raise UserError(f"stage {stage.name!r}: a batch of {stage.batch_size} takes {size} "
                                f"images of {part!r}, which has {images}; no image may come twice "
                                f"in a batch, so take 2 to {images}")
        epoch = len(PairBatches(stage.train, stage.sizes[0], captions=stage.captions))
        stage.total = stage.steps or stage.epochs * epoch
        stage.warm = round(stage.warmup if stage.warmup >= 1 else stage.warmup * stage.total)
        stage.warm = min(stage.warm, 1) if args.dry_run else stage.warm
        if stage.warm >= stage.total:
            raise UserError(f"stage {stage.name!r}: a warm-up of {stage.warm} steps in "
                            f"{stage.total} steps ({len(stage.train.paths)} images, batches of "
                            f"{stage.batch_size}) never ends; give warmup=0.1 or more epochs")
        if stage.early_stop and not stage.val:
            raise UserError(f"stage {stage.name!r}: early_stop needs held-out images, and "
                            f"{stage.data} has none; name some with val=")
        if stage.mask_ratio and not model.config.vision_patch:
            raise UserError(f"stage {stage.name!r}: mask_ratio leaves out patches, and this image "
                            f"tower is no ViT")
        moving, _ = choose(model, stage)
        model.requires_grad_(True)
        for line in about(stage, epoch, moving, tokenizer, model, args):
            run.say(line)
        seen |= {one: stage.name for one in stage.train.contents() if one}
    for target in [*tests.values(), *(stage.val for stage in stages if stage.val)]:
        for note in target.notes:
            run.say(f"{target.name}: {note}")
        known = [seen[one] for one in target.images.contents() if one in seen]
        if known:
            run.say(f"{target.name}: {len(known)} of {len(target.images.paths)} images are in the "
                    f"training data of {', '.join(sorted(set(known)))}, byte for byte: its score "
                    f"flatters")


def about(stage, epoch, moving, tokenizer, model, args):
    """What a stage is, in lines."""
    pairs, B = stage.train, stage.batch_size
    texts = collections.Counter(" ".join(c.casefold().split()) for c in pairs.captions)
    n = max(2, len(pairs))
    alike = sum(k * (k - 1) for k in texts.values()) / (n * (n - 1)) * B * (B - 1) / 2
    rule = LR_AT_1024 * B / 1024
    free = sum(p.numel() for p in moving.values())
    all_of_it = sum(p.numel() for p in model.parameters())
    judged = f"chosen by {stage.select} on {len(stage.val.images.paths)} held-out images" if (
        stage.val) else "no held-out images: the last weights count"
    replayed = "".join(f", {size} of {name}" for name, size in zip(stage.replay, stage.sizes[1:]))
    yield (f"{stage.name}: {len(pairs.paths):,} images, {len(pairs):,} captions ({len(texts):,} "
           f"different) of {pairs.name}; from {stage.parent}; {stage.total:,} steps, {epoch:,} an "
           f"epoch, of {B} pairs{replayed}; warm-up {stage.warm} ({stage.warm / stage.total:.0%}), "
           f"lr {stage.lr:.3g}; {free:,} of {all_of_it:,} weights train; about "
           f"{(4 * all_of_it + 12 * free) / 2 ** 20:,.0f} MB beside activations; {judged}")
    if stage.lr > 4 * rule and stage.data != "demo":
        yield (f"{stage.name}: note: lr {stage.lr:.3g} is {stage.lr / rule:.0f} times 5e-5 * batch "
               f"/ 1024 = {rule:.2g}; pretrained CLIPs have fallen below their zero-shot score so")
    if alike > 1:
        yield (f"{stage.name}: {alike:.1f} pairs of equal captions in a batch; positives="
               f"{stage.positives} " + {"multi": "lets them attract each other", "mask": "leaves "
                                        "them out", "diag": "pushes them apart: the loss has a "
                                        "floor"}[stage.positives])
    turns = stage.flip and stage.augment != "none"
    hues = stage.colour and stage.augment in ("strong", "autoaugment")
    for note in caption_notes(pairs.captions, tokenizer.statistics(pairs.captions, args.max_text),
                              args.max_text, turns, hues, stage.positives == "diag"):
        yield f"{stage.name}: {note}"


def settle(stages, model, args):
    """Give each stage its folder, its parent's file and its identity, and say where it stands: new,
    begun, done. UserError where a plan no longer fits what was trained."""
    names = [stage.name for stage in stages]
    first = names.index(args.from_stage) if args.from_stage else len(names)
    final = names.index(args.until) if args.until else len(names)
    stale = []
    for i, stage in enumerate(stages):
        stage.folder = args.out / stage.name
        name, _, which = stage.parent.partition(":")
        stage.start = None if stage.parent == "init" else expanded(stage.parent)
        if name in names:
            stage.start = args.out / name / f"{which or 'best'}.safetensors"
        elif stage.start and not stage.start.exists():
            raise UserError(f"stage {stage.name!r} starts from {stage.parent!r}, which is neither "
                            f"init, nor an earlier stage ({', '.join(names[:i])}), nor a file")
        stage.again = args.overwrite or i >= first
        stage.identity = identity_of(stage, args)
        config, done = stage.folder / "config.json", stage.folder / "results.json"
        if stage.again or not config.exists():
            stage.stands = "new"
            continue
        stored = stored_in(config, stage.name).get("identity") or {}
        mine = json.loads(json.dumps(stage.identity))
        parent = stage.others.get(name)
        if parent and parent.stands != "done":
            stale.append(f"{stage.name} (its parent {name} is not done)")
        elif mine["parent_sha256"] is None:
            raise UserError(f"{stage.start}, which stage {stage.name!r} was trained from, is gone; "
                            f"train that stage again with --from-stage {name}")
        else:
            run_wide = ("seed", "precision", "max_text", "parent_sha256" if stage.start is None
                        else "")  # the run's own folder says so better
            changed = [f"{key} was {stored.get(key)!r}, now {mine.get(key)!r}"
                       for key in sorted({*stored, *mine}.difference(run_wide))
                       if stored.get(key) != mine.get(key)]
            stale += [f"{stage.name} ({'; '.join(changed)})"] if changed else []
        stage.stands = "done" if done.exists() and stored_in(done, stage.name) else "begun"
        lost = [path for _, _, path in rows_of([stage]) if path and not path.exists()]
        if lost:
            raise UserError(f"{lost[0]}, which stage {stage.name!r} has left, is gone; put it back "
                            f"or train the stage again with --from-stage {stage.name}")
    for i, stage in enumerate(stages):
        stage.trains = stage.stands != "done" and i <= final and not args.eval_only and (
            args.only in (None, stage.name))
        parent = stage.others.get(stage.parent.partition(":")[0])
        if not stage.trains or stage.start is None or parent and parent.trains:
            continue
        if parent and parent.stands != "done":
            raise UserError(f"stage {stage.name!r} starts from {stage.parent}, which is not "
                            f"trained yet; train {parent.name!r} first, or with it")
        if not stage.start.exists():
            raise UserError(f"{stage.start}, which stage {stage.name!r} starts from, is gone; put "
                            f"it back or train {parent.name!r} again with --from-stage")
        if not parent:
            same_size(load(stage.start), model, stage.start)
    if stale:
        raise UserError(f"stale, trained under another plan: {', '.join(stale)}; --from-stage "
                        f"{stale[0].split()[0]} trains it and what follows again, or choose "
                        f"another --output-dir")


def stored_in(path, stage=None):
    """What a run has left in a JSON file, a dict."""
    try:
        content = json.loads(path.read_text("utf-8"))
        if isinstance(content, dict):
            return content
        problem = f"holds a {type(content).__name__}"
    except ValueError as error:
        problem = error
    raise UserError(f"{path} is damaged ({problem}); " + (
        f"--from-stage {stage} trains that stage again" if stage else
        "remove it, and all is scored again"))


def identity_of(stage, args):
    """What must be equal for a stage to be continued or taken as done."""
    free = ("micro_batch", "accum_steps", "recompute", "data", "val", "test")
    plain = {key: getattr(stage, key) for key in FLAGS if key not in free}
    sha = args.start_sha if stage.start is None else (
        sha256_of_all(stage.start) if stage.start.exists() else None)
    val = stage.val and stage.val.identity
    return {**plain, "parent": stage.parent, "parent_sha256": sha, "seed": args.seed,
            "precision": args.precision, "max_text": args.max_text, "dry_run": args.dry_run,
            "vocabulary": args.vocabulary_sha, "data": hash_of_pairs(stage.train),
            "val": hash_of(val), "replayed": {name: hash_of_pairs(stage.others[name].train)
                                              for name in stage.replay}}


def hash_of_pairs(pairs):
    """What training on them depends on: names and bytes of images, and whose each caption is."""
    return hash_of([pairs.captions, pairs.owner, pairs.paths, pairs.contents()])


def sha256_of_all(path):
    """The sha256 of a file, or of those in a folder with their names."""
    return sha256_of(path) if path.is_file() else hash_of(
        {str(file.relative_to(path)): sha256_of(file) for file in sorted(path.rglob("*"))
         if file.is_file()})


# -----------------------------------------------------------------------------
# The matrix

def rows_of(stages):
    """(label, stage or None, file or None) of every row that can be scored."""
    yield "zero-shot", None, None
    for stage in stages:
        if stage.stands == "done":
            yield stage.name, stage.name, stage.folder / "best.safetensors"
            for share in stage.wise:
                yield (f"{stage.name} wise {share:g}", None,
                       stage.folder / f"wise{share:g}.safetensors")


def score_row(run, model, label, stage, path, tests, args):
    """One row of the matrix: the model scored on every test set."""
    put(model, args.initial if path is None else path)
    row = {"row": label, "stage": stage, "weights": str(path or args.weights), "sets": {},
           "files": {}}
    towers = digests(model, args)
    for name, target in tests.items():
        scores = evaluate(run, model, target, args, towers)
        spread = bootstrap(scores.pop("table"), BOOTSTRAPS, args.seed)
        row["files"][name] = scores.pop("files")
        row["sets"][name] = {**scores, "interval": {
            key: [float(x) for x in np.quantile(spread[key], (0.025, 0.975))] for key in (
                *RECALLS, "mean_recall", "r1")}, "spread": spread["r1"]}
    run.say(f"{label}: " + ", ".join(f"{name} r1 {found['r1']:.1f} mean recall "
                                     f"{found['mean_recall']:.1f}" for name, found in
                                     row["sets"].items()))
    return row


def compare(rows, stages, args):
    """-> forgetting, transfer, changes from stage to stage with intervals, recommendations."""
    plain = [row for row in rows if row["row"] == "zero-shot" or row["stage"]]
    own = [row["stage"] for row in plain[1:]]
    scores = [{name: found["r1"] for name, found in row["sets"].items()} for row in plain]
    changes = []
    for before, after in zip(plain, plain[1:]):
        for name in after["sets"]:
            gain = after["sets"][name]["spread"] - before["sets"][name]["spread"]
            low, high = (float(x) for x in np.quantile(gain, (0.025, 0.975)))
            changes.append({"from": before["row"], "to": after["row"], "set": name, "r1":
                            after["sets"][name]["r1"] - before["sets"][name]["r1"],
                            "interval": [low, high], "clear": low > 0 or high < 0})
    mean = {row["row"]: sum(found["r1"] for found in row["sets"].values()) / len(row["sets"])
            for row in rows}
    safe = [row["row"] for row in rows if all(
        found["r1"] >= scores[0][name] - args.lose for name, found in row["sets"].items())]
    recommended = {f"best on {name}": max(rows, key=lambda row: row["sets"][name]["r1"])["row"]
                   for name in rows[0]["sets"]}
    recommended["best on average"] = max(mean, key=mean.get)
    recommended[f"best that loses at most {args.lose:g} anywhere"] = max(safe, key=mean.get)
    return {**transfer(scores, own), "changes": changes, "recommended": recommended}


def matrix_text(rows, found):
    """The matrix as Markdown, one table for r1 and one for all recalls."""
    sets = list(rows[0]["sets"])
    sizes = [f"{name} ({rows[0]['sets'][name]['images']} images)" for name in sets]
    lines = ["R@1, mean of both directions (%), and its 95 % interval", "",
             f"| weights | {' | '.join(sizes)} |", "|---" * (len(sets) + 1) + "|"]
    for row in rows:
        cells = (f"{row['sets'][s]['r1']:.1f} [{row['sets'][s]['interval']['r1'][0]:.1f}, "
                 f"{row['sets'][s]['interval']['r1'][1]:.1f}]" for s in sets)
        lines.append(f"| {row['row']} | {' | '.join(cells)} |")
    if found["forgetting"]:
        lines += ["| forgotten since the best stage | " + " | ".join(
            f"{found['forgetting'][-1][s]:.1f}" for s in sets) + " |"]
    lines += ["", *(f"{what} transfer: {found[key]:+.1f}" for what, key in (
        ("backward", "backward_transfer"), ("forward", "forward_transfer"))
        if found[key] is not None)]
    lines += ["", *(f"- {use}: {row}" for use, row in found["recommended"].items()),
              "", "Chosen on these test sets, so a little flattered there.", ""]
    lines += [f"| weights | set | {' | '.join(RECALLS)} | mean recall |", "|---" * 9 + "|"]
    lines += [f"| {row['row']} | {s} | " + " | ".join(
        f"{row['sets'][s][key]:.1f}" for key in (*RECALLS, "mean_recall")) + " |"
        for row in rows for s in sets]
    return "\n".join(lines) + "\n"


def encode_times(run, model, tests):
    """Milliseconds for one image and for one text, apart, with pixels and tokens ready: the median
    of ten. All rows share the architecture, so one measurement is theirs all."""
    target, encoder, found = next(iter(tests.values())), Encoder(run, model.eval(), 0), {}
    pixels = torch.zeros(1, 3, *[model.config.image_size] * 2, dtype=torch.uint8)
    for name, kind, piece in (("image_ms", "image", pixels), ("text_ms", "text", trim(
            target.tokens[:1], model.pad_id if model.config.text else None))):
        took = []
        for _ in range(12):
            run.synchronize()
            began = time.perf_counter()
            with torch.no_grad():
                encoder.one(kind, 0, piece)
            run.synchronize()
            took.append(1000 * (time.perf_counter() - began))
        found[name] = sorted(took[2:])[5]
    return found


# -----------------------------------------------------------------------------
# What is left for others: features for report.py, searches, exported models

def check_asked(stages, model, args):
    """UserError, before any work, on a search or an export that could not be done afterwards."""
    for query in args.query or []:
        lines = lines_of(query)
        if not any(map(str.strip, lines)):
            raise UserError("--query is empty; expected words, an image or a .txt file of queries")
        for line in filter(None, map(str.strip, lines)):
            if expanded(line).suffix.lower() in PICTURES:
                read_image(expanded(line))
    if args.export is None:
        if args.row:
            raise UserError(f"--row {args.row} chooses what is exported; name the format with "
                            f"--export")
        return
    labels = ["zero-shot", *(label for stage in stages if stage.trains or stage.stands == "done"
                             for label in (stage.name, *(f"{stage.name} wise {share:g}" for share in
                                                         stage.wise)))]
    if args.row not in (None, *labels):
        raise UserError(f"--row {args.row}: expected one of the rows that are trained, "
                        f"{', '.join(labels)}")
    if args.export == "onnx":
        absent = [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]
        if absent:
            raise UserError(f"--export onnx needs the packages onnx and onnxscript; pip install "
                            f"{' '.join(absent)}")
    elif args.export != "clip-retrieval":
        check_layout(model.config, args.export)


def keep_features(run, rows, tests, args):
    """Say in features.json which cached features are whose, and where the images of each test set
    are: report.py draws maps and searches from it."""
    run.write("features.json", {
        "rows": [row["row"] for row in rows], "seed": args.seed,
        "files": None if args.feature_cache is None else {row["row"]: row["files"] for row in rows},
        "sets": {name: {"source": target.source, "paths": target.images.paths,
                        "texts": target.texts, "relevant": target.relevant.tolist()}
                 for name, target in tests.items()}})


def lines_of(query):
    """The queries that one of --query stands for: the lines of a .txt file, or itself."""
    path = expanded(query)
    if path.suffix != ".txt":
        return [query]
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"--query {query}: expected a file with a query in each line, in UTF-8 "
                        f"({error})") from None
    if not any(map(str.strip, lines)):
        raise UserError(f"--query {query}: expected a file with a query in each line")
    return lines


def asked(args, tests):
    """The queries of --query -> dicts: text, whether it is an image, and the (set, place) of the
    right answers, where it is a text of a test set."""
    lines, right = [], {}
    for query in args.query:
        lines += lines_of(query)
    for name, target in tests.items():
        for text, i in target.relevant.tolist():
            right.setdefault(" ".join(target.texts[text].split()), []).append((name, i))
    return [{"text": query, "right": right.get(" ".join(query.split()), []), "rows": [],
             "image": expanded(query).suffix.lower() in PICTURES}
            for query in filter(None, map(str.strip, lines))]


def search(run, model, tokenizer, rows, tests, args):
    """The best test images, each content once, for each query under each row's weights ->
    queries.json, with the rank of the first right image and the share of queries (%) that have a
    right one first, or among five."""
    places = {}
    for name, target in tests.items():
        for i, content in enumerate(target.images.contents()):
            places.setdefault(content or (name, i), []).append((name, i))
    places, queries = list(places.values()), asked(args, tests)
    where = {one: at for at, some in enumerate(places) for one in some}
    right = [{where[one] for one in query["right"]} for query in queries]
    for label, _, path in rows:
        put(model, args.initial if path is None else path)
        encoder, towers, asking = Encoder(run, model.eval(), 0), digests(model, args), []
        images = {name: torch.from_numpy(unit_features(run, model, "image", target, towers,
                                                       args)[0]) for name, target in tests.items()}
        gallery = torch.stack([images[name][i] for (name, i), *_ in places])
        with torch.no_grad():
            for query in queries:
                if query["image"]:
                    piece = view_of(model, args)(read_image(expanded(query["text"])))[None]
                else:
                    tokens = tokenizer([query["text"]], context_length=args.max_text)
                    piece = trim(tokens, model.pad_id if model.config.text else None)
                asking.append(encoder.one("image" if query["image"] else "text", 0, piece).cpu())
        order = [x.tolist() for x in top_k(torch.cat(asking), gallery, len(places))]
        for query, fine, scores, best in zip(queries, right, *order):
            found = [{"set": name, "path": tests[name].images.paths[i], "score": score,
                      "right": at in fine if fine else None}
                     for at, score in zip(best[:args.top], scores)
                     if score > -math.inf  # an image that cannot be read
                     for name, i in places[at][:1]]
            rank = next((i for i, at in enumerate(best, 1) if at in fine), None)
            query["rows"].append({"row": label, "rank": rank, "results": found})
            run.say(f"{query['text']} | {label}: " + ", ".join(
                f"{one['path']} {one['score']:.3f}" for one in found[:5]))
    known = [query for query in queries if query["right"]]
    precision = {label: {f"p{k}": 100 * sum((query["rows"][r]["rank"] or math.inf) <= k
                                            for query in known) / len(known) for k in (1, 5)}
                 for r, (label, _, _) in enumerate(rows)} if known else {}
    run.write("queries.json", {"precision": precision, "queries": queries})
    return precision


def export(run, model, rows, tests, args):
    """Write a row's model as the named library loads it and say how far the file's features are
    from ours; or its test features as clip-retrieval lays them out. -> that difference, or None."""
    labels = [row[0] for row in rows]
    label = args.row or [label for label, stage, _ in rows if stage or label == "zero-shot"][-1]
    path = rows[labels.index(label)][2]
    put(model, args.initial if path is None else path)
    folder = args.out / "export"
    if args.export == "clip-retrieval":  # a row is an image with a text of its own
        found, towers = [], digests(model.eval(), args)
        for target in tests.values():
            first = {image: text for text, image in reversed(target.relevant.tolist())}
            chosen = sorted(first), [first[image] for image in sorted(first)]
            found.append([unit_features(run, model, side, target, towers, args)[0][some]
                          for side, some in zip(("image", "text"), chosen)])
            found[-1].append([{"image_path": target.images.paths[i], "caption": target.texts[t],
                               "set": target.name} for i, t in zip(*chosen)])
        image, text, about = zip(*found)
        run.on_first(lambda: save_embeddings(folder, np.concatenate(image), np.concatenate(text),
                                             sum(about, [])))
        return run.say(f"wrote the test features of {label} to {folder}")
    images = torch.randn(5, 3, *[model.config.image_size] * 2,
                         generator=torch.Generator().manual_seed(0))
    tokens = next(iter(tests.values())).tokens[:5]
    far = run.on_first(lambda: export_checked(model, folder, args.export, images, tokens))
    run.say(f"wrote {label} as {args.export} to {folder}; " + (
        "not read back: onnxruntime is not installed" if math.isnan(far) else
        f"read back, its features differ from ours by at most {far:.1e}"))
    return far


# -----------------------------------------------------------------------------
# A run

def main(args):
    """Train what is left of the plan, score every row on every test set -> the results."""
    given = dict(vars(args))  # as config.json keeps it, before the plan fills the rest
    stages = read_plan(args)
    args.seed = 1 if args.seed is None else args.seed
    run = start(args.device or "auto", args.precision or "auto", seed=args.seed,
                deterministic=args.deterministic)
    args.precision = run.precision
    model = open_model(args, all(stage.data == "demo" for stage in stages))
    tokenizer = open_texts(args, model)
    tests = open_sets(stages, tokenizer, model, args)
    preflight(run, stages, tests, tokenizer, model, args)
    args.vocabulary_sha = hash_of(model.vocabulary)
    args.start_sha = hash_of([digest(model, "image"), digest(model, "text"),
                              float(model.logit_scale.detach())])
    name = args.name or "_".join(stage.name for stage in stages)[:60]
    args.out = expanded(args.output_dir or f"runs/train_staged/{name}")
    args.out = args.out.with_name(args.out.name + "_dry_run") if args.dry_run else args.out
    args.overwrite |= args.dry_run
    settle(stages, model, args)
    check_asked(stages, model, args)
    if args.check_plan:
        return {"stages": [{"name": stage.name, "steps": stage.total, "warmup": stage.warm}
                           for stage in stages]}
    run = run.enter(args.out, args.seed)
    run.claim(given, {"start_sha256": args.start_sha, "seed": args.seed, "precision": run.precision,
                      "max_text": args.max_text}, resume=args.resume == "auto",
              overwrite=args.overwrite)
    args.feature_cache = None if args.no_feature_cache else args.out / "cache"
    args.initial = {key: x.detach().clone() for key, x in model.state_dict().items()}
    run.write("plan.json", plan_of(stages, args))
    finished = args.out / "results.json"
    if finished.exists() and not (args.query or args.export or args.eval_only):
        results = stored_in(finished)
        whole = json.loads(json.dumps(whole_identity(stages, tests, args)))
        if all(stage.stands == "done" for stage in stages) and results.get("identity") == whole:
            run.say(f"{args.out} holds this plan, finished; --overwrite trains it again, "
                    f"--from-stage some of it")
            return results
    model = run.move(model).fuse_attention(run.fused_attention)
    table = [score_row(run, model, "zero-shot", None, None, tests, args)]
    for stage in stages:
        table += one_stage(run, model, stage, stages, tokenizer, tests, args)
    return report(run, model, tokenizer, stages, tests, table, args)


def plan_of(stages, args):
    """The whole plan, flags and defaults filled in, as --plan takes it."""
    keys = [key for key in PLAN if key not in ("defaults", "stages")]
    return {**{key: value for key in keys if (value := getattr(args, key)) not in (None, {}, "")},
            "stages": [
        {"name": stage.name, "from": stage.parent,
         **{key: value for key, value in stage.told.items() if value not in (None, [], {})}}
        for stage in stages]}


def one_stage(run, model, stage, stages, tokenizer, tests, args):
    """Train a stage if the plan says so and it is not done -> its rows."""
    if stage.trains:
        put(model, args.initial if stage.start is None else stage.start)
        stage.identity = identity_of(stage, args)  # the parent may be new
        run_stage(run, model, stage, tokenizer, args)
        stage.stands = "done"
    return [score_row(run, model, *row, tests, args) for row in rows_of([stage])
            if row[0] != "zero-shot"]


def whole_identity(stages, tests, args):
    return {"stages": {stage.name: stage.identity for stage in stages}, "lose": args.lose,
            "tests": {name: target.identity for name, target in tests.items()}}


def report(run, model, tokenizer, stages, tests, table, args):
    """Compare the rows, write the matrix, the cases and the maps; -> the results."""
    found = compare(table, stages, args)
    text = matrix_text(table, found)
    run.write("matrix.md", text)
    run.say(text.rstrip())
    rows = list(rows_of(stages))
    keep_features(run, table, tests, args)
    precision = search(run, model, tokenizer, rows, tests, args) if args.query else None
    if not args.query:  # those of another evaluation
        run.on_first(lambda: (args.out / "queries.json").unlink(missing_ok=True))
    far = export(run, model, rows, tests, args) if args.export else None
    done = [stage for stage in stages if stage.stands == "done"]
    judged = done[-1].name if done else next(iter(tests))
    scores = next(row for row in table if not done or row["stage"] == judged)["sets"][judged]
    for row in table:
        for scored in row["sets"].values():
            del scored["spread"]
        del row["files"]
    stage_results = {stage.name: stored_in(stage.folder / "results.json", stage.name)
                     for stage in done}
    results = {"method": "staged", "judged_on": judged,
               "data": "+".join(dict.fromkeys(stage.train.name for stage in stages)),
               "model": args.model or pathlib.Path(args.weights).name,
               **{key: scores[key] for key in (*RECALLS, "mean_recall", "r1")}, "rows": table,
               **found,
               **({"precision_at": precision} if precision else {}),
               **({"export_difference": far} if far is not None and math.isfinite(far) else {}),
               **encode_times(run, model, tests),
               "samples_per_second": max((r["samples_per_second"] for r in stage_results.values()),
                                         default=0.0), "stages": stage_results,
               "dry_run": args.dry_run, "identity": whole_identity(stages, tests, args)}
    results = run.finish(results)
    run.say(f"{args.out}/matrix.md has the matrix; python report.py {args.out} draws it, the "
            f"searches and the maps")
    return results


if __name__ == "__main__":
    sys.exit(guard(main, get_args))
