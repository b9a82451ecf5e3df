"""CLIPFit: few-shot tuning of a CLIP by its own norms and biases (Li et al., EMNLP 2024).

Two thin slices of the pretrained model move: the bias of the second linear layer in every MLP of
the text tower, and every LayerNorm of the image tower; 64 tensors, 46,080 of the 149.6 M numbers
of ViT-B/16. Nothing is added to the model. Per step, over a batch of images and one prompt per
class:

    loss = cross-entropy(100 cos(image, prompts), label) + reg_weight * drift
    drift = 1 - mean over classes of cos(prompt feature now, prompt feature before training)

    python train_clipfit.py                                       the bundled demo, under a minute
    python train_clipfit.py --data dtd --shots 4 --device mps     one run on an Apple GPU
    python train_clipfit.py --data dtd --shots 1 2 4 8 16 --seeds 1 2 3    a table with mean +- std
    python train_clipfit.py --data food101 --setting base2new     train on half of the classes
    python train_clipfit.py --data imagenet --setting dg          test on ImageNet-V2/-Sketch/-A/-R
    torchrun --nproc-per-node 2 train_clipfit.py --data dtd       two processes, the same numbers

Recipe (the official README): SGD 0.9, batch 32, lr 0.002 with one epoch at 1e-5 and then a cosine,
weight decay 5e-4 on all 64 tensors, 100 epochs (Food101 and ImageNet 10), reg_weight 8 for DTD,
SUN397 and every base-to-new run and 2 elsewhere. What you change is listed as a departure.

Different from the official code, with the reason:
- the prompts pass the text tower once per step instead of twice, cut to the longest (equal result);
- `--micro-batch` gives the gradient of the whole batch in less memory;
- zero-shot accuracy is measured first, with the same prompts, and stands beside the result;
- fp32 weights, or autocast over them; the official run keeps fp16 biases, whose small updates
  round away (`--precision official-fp16` does that too). Its AMP branch forgets the drift term;
- a missing split file is an error, not a silent new split; seed 0 means seed 0;
- a ResNet tower has no LayerNorm: only the 6,144 text biases move and BatchNorm stays frozen
  (the official code lets its statistics drift);
- a checkpoint holds the 64 tensors, their momentum, the place in the epoch, the random state and
  what run it belongs to; resuming is exact to the bit.
As there, the last epoch's weights are the result: no validation or test image chooses anything.

Logged: loss, ce (cross-entropy), drift, lr, and batch_accuracy on augmented training crops, which
is no test accuracy. Results: zero_shot_accuracy, accuracy, gain (all in %), macro_f1.
"""
import argparse
import csv
import io
import itertools
import json
import math
import pathlib
import statistics
import sys
import time

from device import (expanded, guard, load_checkpoint, Parser, start,  # before torch, which reads
                    UserError)                                        # at import what it sets
import torch
import torch.nn.functional as F
from torch import nn

from clip_model import bucket, canonical_name, check_layout, CLIP, CONFIGS, load, save
from data import (class_prompts, classification_scores, few_shot, find_classes, halves,
                  make_loader, normalise, open_dataset, Preprocess)
from tokenizer import BPETokenizer

# data set -> (epochs, reg_weight) of the few-shot setting; base-to-new takes reg_weight 8 for all
RECIPES = {
    "caltech101": (100, 2.0), "oxford_pets": (100, 2.0), "stanford_cars": (100, 2.0),
    "oxford_flowers": (100, 2.0), "food101": (10, 2.0), "fgvc_aircraft": (100, 2.0),
    "sun397": (100, 8.0), "dtd": (100, 8.0), "eurosat": (100, 2.0), "ucf101": (100, 2.0),
    "imagenet": (10, 2.0),
}
OFFICIAL = {"lr": 0.002, "wd": 5e-4, "momentum": 0.9, "batch_size": 32, "warmup": 1}
# The bundled model's logit scale is 16, not 100, so its gradients are small: this rate gains 25
# points on the demo where the official one gains 17 (mean of seeds 1-3).
DEMO = {"lr": 0.05}
IN_MEMORY = 2 << 30  # bytes of decoded training images to keep; more are read at every step
SHIFTS = ("imagenetv2", "imagenet-sketch", "imagenet-a", "imagenet-r")
ALIASES = {
    "--dataset": "--data", "--root": "--data-dir", "--data-root": "--data-dir",
    "--backbone": "--model", "--arch": "--model", "--pretrained": "--weights",
    "--checkpoint": "--weights", "--lambda": "--reg-weight", "--seeds": "--seed",
    "--max-epochs": "--epochs", "--learning-rate": "--lr", "--weight-decay": "--wd",
    "--num-workers": "--workers", "--output": "--output-dir", "--out-dir": "--output-dir",
    "--accum-freq": "--accum-steps", "--max-grad-norm": "--grad-clip",
}


def get_args(argv=None):
    """The command line as a namespace. Exits with code 2 and one line on a wrong one."""
    parser = Parser(
        description="Few-shot tuning of a CLIP by its norms and biases (CLIPFit, EMNLP 2024).",
        epilog="example: python train_clipfit.py --data dtd --shots 4 --device mps",
        aliases=ALIASES)
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="demo", help="a data set by name (dtd, eurosat, ...), a "
                       "folder of class folders, or a CSV/TSV/JSONL file (default: demo)")
    group.add_argument("--data-dir", default="data", help="where the named data sets lie "
                       "(default: data)")
    group.add_argument("--split", choices=("coop", "official"), default="coop", help="CoOp's split "
                       "files, or the data set's own split where it has one (default: coop)")
    group.add_argument("--download", action="store_true", help="fetch the images with torchvision")
    group.add_argument("--classes", nargs="+", metavar="NAME", help="train and test on these only")
    group.add_argument("--template", help="prompt with {} for the class; default: the paper's")
    group.add_argument("--shots", nargs="+", type=int, metavar="N", help="training images per "
                       "class; several give a table (default: 4; 16 for base2new and dg)")
    group.add_argument("--workers", type=int, default=-1, help="processes that read test images "
                       "(default: -1, up to 4 by system; 0 reads in the main process)")
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="a released size such as ViT-B/16 or RN50, or tiny "
                       "(default: ViT-B/16; tiny for the demo)")
    group.add_argument("--weights", default="auto", help="auto: OpenAI's for the model; a file or "
                       "folder; none: random (default: auto)")
    group = parser.add_argument_group("method")
    group.add_argument("--setting", choices=("fewshot", "base2new", "dg"), default="fewshot",
                       help="few-shot; base-to-new classes; domain generalisation from ImageNet")
    group.add_argument("--reg-weight", type=float, metavar="LAMBDA", help="weight of the drift "
                       "term (default: the recipe's, 2 or 8)")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--epochs", type=int, help="default: the recipe's, 100 or 10")
    group.add_argument("--batch-size", type=int, default=OFFICIAL["batch_size"],
                       help="images per step over all processes (default: 32)")
    group.add_argument("--micro-batch", type=int, default=0, help="images in memory at a time; the "
                       "gradient stays that of the batch (default: 0, the whole batch)")
    group.add_argument("--text-memory", type=float, default=4.0, metavar="GB", help="prompts whose "
                       "activations take more are encoded twice, in parts; the gradient is the "
                       "same (default: 4)")
    group.add_argument("--accum-steps", type=int, default=1,
                       help="another way to say it: batch-size / accum-steps in memory")
    group.add_argument("--eval-batch-size", type=int, default=100, help="default: 100")
    group.add_argument("--lr", type=float, help="default: 0.002; the demo's is larger")
    group.add_argument("--wd", type=float, default=OFFICIAL["wd"], help="default: 5e-4")
    group.add_argument("--momentum", type=float, default=OFFICIAL["momentum"], help="default: 0.9")
    group.add_argument("--warmup", type=int, default=OFFICIAL["warmup"],
                       help="first epochs at lr 1e-5 (default: 1)")
    group.add_argument("--grad-clip", type=float, default=0.0, help="default: 0, off")
    group.add_argument("--precision", default="auto", help="arithmetic of the towers over fp32 "
                       "weights (default: auto)",
                       choices=("auto", "fp32", "bf16", "fp16", "official-fp16"))
    group = parser.add_argument_group("run")
    group.add_argument("--device", default="auto", help="auto, cuda, mps, npu or cpu; refused when "
                       "absent (default: auto)")
    group.add_argument("--seed", nargs="+", type=int, default=[1], metavar="S",
                       help="seed of the shots and the order; several, also as --seeds, give a "
                       "table (default: 1)")
    group.add_argument("--output-dir", default="", help="default: runs/train_clipfit/...")
    group.add_argument("--resume", default="auto", help="auto: go on with an interrupted run in "
                       "the output folder; none; or the path of a checkpoint (default: auto)")
    group.add_argument("--overwrite", action="store_true", help="replace the run in the folder")
    group.add_argument("--eval-only", action="store_true",
                       help="evaluate the run's checkpoint (or zero-shot without one) and stop")
    group.add_argument("--dry-run", action="store_true",
                       help="two batches of everything, to see that the whole path works; into a "
                       "folder of its own, ..._dry_run")
    group.add_argument("--export", choices=("openai", "open_clip", "hf", "safetensors"),
                       help="also write the tuned model as a full CLIP in this layout")
    group.add_argument("--log-every", type=int, default=5, metavar="STEPS", help="default: 5")
    group.add_argument("--save-every", type=int, default=0, metavar="STEPS",
                       help="also save inside an epoch (default: 0, after each epoch)")
    group.add_argument("--deterministic", action="store_true",
                       help="refuse operations without a repeatable result")
    group.add_argument("--worker-timeout", type=int, default=600, metavar="SECONDS",
                       help="take a reading process to hang after this long (default: 600)")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    args.shots = list(dict.fromkeys(args.shots or [4 if args.setting == "fewshot" else 16]))
    args.seed = list(dict.fromkeys(args.seed))
    refuse_bad_flags(parser, args)
    return args


def refuse_bad_flags(parser, args):
    """Exit with one line on values and pairs of flags that make no sense."""
    for name, low in (("epochs", 1), ("batch_size", 1), ("micro_batch", 0), ("accum_steps", 1),
                      ("eval_batch_size", 1), ("warmup", 0), ("log_every", 1), ("save_every", 0),
                      ("workers", -1), ("worker_timeout", 1), ("reg_weight", 0), ("wd", 0),
                      ("momentum", 0),
                      ("grad_clip", 0), ("text_memory", 0)):
        value = getattr(args, name)
        if value is not None and not low <= value < math.inf:
            parser.error(f"--{name.replace('_', '-')} is {value}; expected at least {low}")
    if args.lr is not None and not 0 < args.lr < 1e3:
        parser.error(f"--lr is {args.lr}; expected a positive number")
    if min(args.shots + args.seed) < 0 or max(args.seed) >= 2 ** 32:
        parser.error("--shots and --seed take whole numbers from 0 on")
    if args.micro_batch and args.accum_steps > 1:
        parser.error("--micro-batch and --accum-steps say the same thing twice; give one")
    if args.setting == "dg" and args.data != "imagenet":
        parser.error("--setting dg trains on ImageNet and tests on its four shifts; add "
                     "--data imagenet")
    if args.setting == "dg" and args.classes:
        parser.error("--classes does not go with --setting dg, whose test sets have their own")
    if args.template == "":
        parser.error("--template is empty; write a sentence with {} for the class")
    if args.resume not in ("auto", "none") and len(args.shots) * len(args.seed) > 1:
        parser.error("--resume PATH continues one run; give one --shots and one --seed")


def fill_recipe(args, data):
    """Put the recipe into the flags left open; -> the list of departures from the official one."""
    epochs, reg_weight = RECIPES.get(data, (100, 2.0))
    official = {**OFFICIAL, "epochs": epochs,
                "reg_weight": 8.0 if args.setting == "base2new" else reg_weight}
    ours = DEMO if data == "demo" and (args.model or "tiny") == "tiny" else {}
    for name, value in {**official, **ours}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    notes = [f"--{name.replace('_', '-')} {getattr(args, name):g} (official {value:g})"
             for name, value in official.items() if getattr(args, name) != value]
    notes += [f"--grad-clip {args.grad_clip:g} (official none)"] if args.grad_clip else []
    notes += [f"--{name.replace('_', '-')} {getattr(args, name)} (official {value})"
              for name, value in (("model", "ViT-B/16"), ("split", "coop"), ("classes", "all"),
                                  ("template", "by data set"))
              if getattr(args, name) not in (None, value)]
    if args.setting == "base2new" and args.shots != [16]:
        notes.append(f"--shots {args.shots} (official 16 for base-to-new)")
    if args.epochs <= args.warmup:
        notes.append(f"--epochs {args.epochs}: the rate never leaves its warm-up of 1e-5")
    if data not in RECIPES:
        notes.append("no official recipe names this data; that of most sets was taken")
    if args.setting == "dg":
        notes.append("no official recipe names domain generalisation; ImageNet's was taken")
    return notes


# -----------------------------------------------------------------------------
# The method: two thin slices of the pretrained model move, the rest stays put.

def free_clipfit_weights(model):
    """Freeze `model`, free CLIPFit's two slices, and return them: dict of name -> Parameter."""
    model.requires_grad_(False)
    for block in model.transformer.resblocks:  # text tower: the bias of each MLP's second layer
        block.mlp.c_proj.bias.requires_grad_(True)
    for module in model.visual.modules():      # image tower: every LayerNorm
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def encode_prompts(model, texts):
    """Unit features of the class prompts, (C, D). texts: what `bucket` made of their tokens."""
    groups, places = texts
    return torch.cat([model.encode_text(tokens, normalize=True, ends=ends)
                      for tokens, ends in groups])[places]


def prompt_memory(model, texts):
    """Bytes that autograd keeps for one pass over the prompts: per position and block 9 fp32
    vectors of the tower's width (measured: 8.7 in fp32, 4.9 in bf16)."""
    positions = sum(tokens.numel() for tokens, _ in texts[0])
    return 9 * 4 * positions * model.config.text_width * model.config.text_layers


def drift(tuned, pretrained):
    """How far the class prompts have turned: 1 - mean cosine. Both (C, D) with unit rows."""
    return 1 - (tuned * pretrained).sum(dim=-1).mean()


def warmup_cosine(epoch, epochs, lr, warmup):
    """Learning rate of an epoch (from 0): 1e-5 for `warmup` epochs, then a cosine that starts anew.

    As in Dassl, the cosine's period is all of `epochs`, so it ends a little above zero.
    """
    if epoch < warmup:
        return 1e-5
    return 0.5 * lr * (1 + math.cos(math.pi * (epoch - warmup) / epochs))


def add_gradient(run, model, images, labels, batch, texts, pretrained, args, scaler):
    """Add a batch's gradient to the free tensors' `.grad`; -> losses and hits, still on the device.

    images (b, 3, R, R) and labels (b,) are this process's share of a batch of `batch`; texts are
    the class prompts (see `encode_prompts`), pretrained (C, D) their features before training.
    """
    kept = prompt_memory(model, texts) <= args.text_memory * 2 ** 30
    # One pass over the prompts feeds both terms; the official code makes two.
    with run.autocast(), torch.set_grad_enabled(kept):
        text_features = encode_prompts(model, texts)                      # (C, D)
    # The graph is cut here. Micro-batches of images meet the texts in a leaf, which collects their
    # gradients and the drift term's; the text tower's own backward then runs once. Exact: the loss
    # is a sum over images, and there is no BatchNorm in training mode.
    text_leaf = text_features.detach().requires_grad_()
    scale = model.logit_scale.exp()                                      # 100, frozen
    ce_loss = hits = torch.zeros((), device=text_leaf.device)
    micro = args.micro_batch or max(1, -(-len(images) // args.accum_steps))
    for some_images, some_labels in zip(images.split(micro), labels.split(micro)):
        with run.autocast():
            image_features = model.encode_image(some_images, normalize=True)
        logits = scale * image_features @ text_leaf.T                    # (micro, C), in fp32
        part = F.cross_entropy(logits, some_labels, reduction="sum",
                               ignore_index=-1) / batch  # -1: an image that cannot be read
        scaler.scale(part).backward()
        ce_loss = ce_loss + part.detach()
        hits = hits + (logits.detach().argmax(dim=-1) == some_labels).sum()

    # 0 on the first step. The same in every process, so each adds its share to the sum over them.
    drift_loss = drift(text_leaf, pretrained) / run.world_size
    scaler.scale(args.reg_weight * drift_loss).backward()
    loss = ce_loss + args.reg_weight * drift_loss.detach()

    # The leaf now holds the gradient of `loss` for the prompts' features: on into the text tower.
    if kept:
        text_features.backward(text_leaf.grad)
    else:  # its activations are too many: each group of prompts is encoded again, for its own part
        groups, places = texts
        gradients = torch.empty_like(text_leaf).index_copy_(0, places, text_leaf.grad)
        for (tokens, ends), gradient in zip(groups, gradients.split([len(t) for t, _ in groups])):
            with run.autocast():
                features = model.encode_text(tokens, normalize=True, ends=ends)
            features.backward(gradient)
    return {"loss": loss, "ce": ce_loss, "drift": drift_loss.detach(),
            "batch_accuracy": 100 * hits / batch}


# -----------------------------------------------------------------------------
# Evaluation

class Target:
    """A test set and its prompts, tokenised and on the device: what an accuracy is measured on."""

    def __init__(self, run, name, images, tokenizer, template=None):
        self.name, self.images = name, images
        prompts = class_prompts(images.classnames, template or images.template)
        groups, places = bucket(tokenizer(prompts))
        self.texts = [run.move(*group) for group in groups], run.move(places)


@torch.no_grad()
def evaluate(run, model, target, args):
    """Classify a test set by its prompts -> the scores of `classification_scores`, with the
    position, label and prediction of every image.

    The prompts' features are computed once. Each process takes a share of the images; images that
    cannot be read have label -1, are left out of the scores and counted under "skipped".
    """
    with run.autocast():
        text_features = encode_prompts(model, target.texts)                  # (C, D)
    loader = make_loader(target.images, args.eval_batch_size * run.world_size, shuffle=False,
                         rank=run.rank, world_size=run.world_size,
                         timeout=args.worker_timeout, **run.loader_options(args.workers))
    rows = []
    for done, (images, labels, indices) in enumerate(loader, 1):
        images = normalise(run.move(images))
        with run.autocast():
            image_features = model.encode_image(images, normalize=True)      # (B, D)
        predictions = (image_features @ text_features.T).argmax(dim=-1).cpu()
        rows.append(torch.stack([indices, labels, predictions]))             # (3, B)
        run.progress(done, len(loader), f"testing on {target.name}")
        if args.dry_run and done == 2:
            break
    rows = torch.cat(run.gather_objects(torch.cat(rows, dim=1)), dim=1)
    index, labels, predictions = rows[:, rows[0].argsort()]
    lost = index[labels < 0].tolist()
    if lost:  # more than 1 % of them, or a whole class, is an error
        first = target.images.paths[lost[0]]
        target.images.refuse_losses(lost, first)
        run.say(f"note: {len(lost)} unreadable {target.name} images are left out, e.g. {first}")
    return {**classification_scores(predictions, labels, len(target.images.classnames)),
            "index": index.tolist(), "labels": labels.tolist(), "predictions": predictions.tolist()}


def harmonic_mean(base, new):
    return 2 * base * new / (base + new) if base and new else 0.0


def headline(scores, setting):
    """The one number of a run: H of base and new, otherwise the first target's accuracy."""
    accuracies = [score["accuracy"] for score in scores.values()]
    return harmonic_mean(*accuracies) if setting == "base2new" else accuracies[0]


# -----------------------------------------------------------------------------
# The loop

def train(run, model, loader, texts, stored, args):
    """Tune `model` in place -> steps done. texts: the class prompts (see `encode_prompts`).
    stored: the checkpoint to go on from, or None."""
    moving = free_clipfit_weights(model)
    with torch.no_grad(), run.autocast():
        pretrained = encode_prompts(model, texts)                             # (C, D), the anchor
    if args.precision == "official-fp16":
        for name in (n for n in moving if n.endswith("c_proj.bias")):
            moving[name].data = moving[name].data.half()  # LayerNorms stay fp32, as there
    optimizer = torch.optim.SGD(moving.values(), lr=args.lr, momentum=args.momentum,
                                weight_decay=args.wd)                        # on norms and biases
    scaler = run.scaler(enabled=args.precision != "official-fp16")
    epoch = batch = step = 0
    if stored:
        restore(moving, stored["weights"])
        optimizer.load_state_dict(stored["optimizer"])
        scaler.load_state_dict(stored["scaler"])
        run.set_rng_state(stored["rng"])
        epoch, batch, step = stored["epoch"], stored["batch"], stored["step"]

    model.eval()  # no dropout to switch; a ResNet's BatchNorm statistics must not move
    batches, unchecked, seen, waited = loader.batch_sampler, [], 0, 0.0
    steps = 2 if args.dry_run else args.epochs * len(loader)
    while step < steps:
        batches.set_epoch(epoch, first_batch=batch)
        lr = warmup_cosine(epoch, args.epochs, args.lr, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        clock = time.perf_counter()
        for images, labels, indices in loader:
            images, labels = run.move(images, labels)
            images = normalise(images)  # pixels travel as bytes
            waited += time.perf_counter() - clock

            # ---- one step -----------------------------------------------------------------
            size = batches.global_size(batch)
            optimizer.zero_grad(set_to_none=True)
            losses = add_gradient(run, model, images, labels, size, texts, pretrained, args, scaler)
            run.sum_gradients(moving.values())
            fine = run.drop_bad_gradients(moving.values(), scaler)
            if args.grad_clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(moving.values(), args.grad_clip)
            scaler.step(optimizer)
            scaler.update()
            # -------------------------------------------------------------------------------

            step, batch, seen = step + 1, batch + 1, seen + size
            if batch == len(loader):
                epoch, batch = epoch + 1, 0
            unchecked.append((torch.where(fine, losses["loss"], math.nan), indices))
            leaving = run.stop_requested()
            saving = leaving or batch == 0 or step == steps or (
                args.save_every and step % args.save_every == 0)
            if saving or step % args.log_every == 0:  # reading a loss waits, so not at every step
                check_finite(run, loader.dataset, unchecked)
            if step % args.log_every == 0 or step == steps:
                run.log(step, steps=steps, epoch=epoch + (batch > 0), samples=seen, waited=waited,
                        **{name: run.sum(value) for name, value in losses.items()}, lr=lr,
                        **({"loss_scale": scaler.get_scale()} if scaler.is_enabled() else {}))
                seen, waited = 0, 0.0
            if saving:
                run.save(run.out / "checkpoint_last.pt", {
                    "format": "clipfit/1", "weights": {n: p.detach() for n, p in moving.items()},
                    "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                    "epoch": epoch, "batch": batch, "step": step,  # what comes next
                    "rng": run.gather_objects(run.rng_state()), "identity": args.identity})
            if leaving:
                raise run.interrupted()
            if step == steps:
                break
            clock = time.perf_counter()
    return step


def check_finite(run, images, unchecked):
    """Report the steps that were skipped for a loss or gradient that is not a number, with the
    images of their batch; stop after several in a row. Empties `unchecked`."""
    run.check_finite([loss for loss, _ in unchecked], lambda i: "the batch of " + ", ".join(
        images.paths[index] for index in unchecked[i][1].tolist()[:8]))
    unchecked.clear()


def restore(moving, weights):
    """Copy stored tensors into the free ones. Raises UserError unless the names are the same."""
    odd = sorted(set(weights) ^ set(moving))
    if odd:
        raise UserError(f"the checkpoint holds {len(weights)} tensors and this model frees "
                        f"{len(moving)}, e.g. {odd[0]!r} on one side only; it belongs to another "
                        f"--model")
    with torch.no_grad():
        for name, p in moving.items():
            p.data = p.data.to(weights[name].dtype)  # official-fp16 stores its biases in half
            p.copy_(weights[name])


# -----------------------------------------------------------------------------
# One run

def find_start(run, args):
    """Take the run's folder -> (checkpoint to go on from or None, results if it is finished)."""
    if args.resume not in ("auto", "none"):
        stored = load_checkpoint(args.resume)  # before the folder is touched
        refuse_other_run(stored, args.resume, args)
        if not args.eval_only:
            run.claim(args.config, args.identity, overwrite=args.overwrite)
        return stored, None
    last = args.folder / "checkpoint_last.pt"
    if args.eval_only:
        stored = run.load(last) if args.resume == "auto" else None
        if stored:
            refuse_other_run(stored, last, args)
        else:
            run.say(f"no checkpoint in {args.folder}: this is zero-shot")
        return stored, None
    if not run.claim(args.config, args.identity, resume=args.resume == "auto",
                     overwrite=args.overwrite):
        return None, None
    stored, done = run.load(last), args.folder / "results.json"
    if stored:
        refuse_other_run(stored, last, args)
    if done.exists():
        run.say(f"{args.folder} holds this run, finished; --overwrite runs it again")
        return stored, json.loads(done.read_text("utf-8"))
    run.rewind(stored["step"] if stored else -1)
    return stored, None


def tune(parent, model, pretrained, shots, targets, zero_shot, args):
    """One run, from zero-shot to results.json, in args.folder; -> the results.

    pretrained: the free tensors as loaded. shots: the few training images. zero_shot: scores
    before training by target, filled by the first of several runs.
    """
    run = parent.enter("" if args.eval_only else args.folder, args.seed)
    stored, results = find_start(run, args)
    free, several, step = free_clipfit_weights(model), len(targets) > 1, 0
    restore(free, pretrained)
    if results:
        if stored and args.export:
            restore(free, stored["weights"])
            export(run, model, args)
        return results
    for target in targets:
        if target.name not in zero_shot:
            zero_shot[target.name] = evaluate(run, model, target, args)
        if not stored:
            log_scores(run, 0, ("zero-shot " + target.name * several).strip(),
                       zero_shot[target.name])
    if args.eval_only and stored:
        restore(free, stored["weights"])
        step = stored["step"]
    elif not args.eval_only and len(shots):
        shots = shots.with_transform(Preprocess(model.config.image_size, True, args.seed,
                                                dtype=torch.uint8))
        known = len(shots.notes)
        for note in shots.preload(IN_MEMORY).notes[known:]:  # what could not be read, or kept
            run.say(note)
        loader = make_loader(shots, args.batch_size, seed=args.seed, rank=run.rank,
                             world_size=run.world_size,
                             timeout=args.worker_timeout,
                             **run.loader_options(0 if shots.images else args.workers))
        run.watch_signals()
        try:
            step = train(run, model, loader, targets[0].texts, stored, args)
        finally:
            run.unwatch_signals()
        if args.dry_run:
            restore(free, run.load(args.folder / "checkpoint_last.pt")["weights"])
    tuned = zero_shot
    if step:
        tuned = {target.name: evaluate(run, model, target, args) for target in targets}
        for name, score in tuned.items():
            log_scores(run, step, ("test " + name * several).strip(), score)
    results = report(run, model, shots, step, targets, zero_shot, tuned, args)
    if args.export:
        export(run, model, args)
    return results


def log_scores(run, step, split, score):
    run.log(step, split=split, accuracy=score["accuracy"], macro_f1=score["macro_f1"])


def refuse_other_run(stored, path, args):
    """Raise UserError unless the checkpoint at `path` fits this command line."""
    theirs = stored.get("identity")
    if stored.get("format") != "clipfit/1" or not isinstance(theirs, dict):
        raise UserError(f"{path} is not a checkpoint of this script; a CLIP to start from goes to "
                        f"--weights")
    # Scores of tuned weights on other data are a fair question; on another model they are noise.
    elsewhere = args.eval_only and args.resume not in ("auto", "none")
    keys = ("model", "weights_sha256") if elsewhere else sorted({*theirs, *args.identity})
    odd = [f"{key} {theirs.get(key)!r} there and {args.identity.get(key)!r} here" for key in keys
           if theirs.get(key) != args.identity.get(key)]
    if odd:
        raise UserError(f"{path} belongs to another run: {'; '.join(odd)}; give the same flags, or "
                        f"start without --resume")
    args.shots, args.seed = theirs["shots"], theirs["seed"]  # what these weights were tuned on


def report(run, model, shots, step, targets, zero_shot, tuned, args):
    """Print, write and return what one run found."""
    free = [p for p in model.parameters() if p.requires_grad]
    before, after = headline(zero_shot, args.setting), headline(tuned, args.setting)
    results = {
        "method": "clipfit", "data": args.identity["data"], "model": args.model,
        "setting": args.setting, "shots": args.shots if step else 0, "seed": args.seed,
        "zero_shot_accuracy": before, "accuracy": after, "gain": after - before}
    for target in targets:
        prefix = f"{target.name}_" if len(targets) > 1 else ""
        if prefix:
            results[f"{prefix}accuracy"] = tuned[target.name]["accuracy"]
            results[f"zero_shot_{prefix}accuracy"] = zero_shot[target.name]["accuracy"]
        results[f"{prefix}macro_f1"] = tuned[target.name]["macro_f1"]
        write_tables(run, target, zero_shot[target.name], tuned[target.name])
    results |= {
        "trainable_parameters": sum(p.numel() for p in free), "trainable_tensors": len(free),
        "steps": step, "training_images": len(shots) if step else 0,
        "images": {t.name: tuned[t.name]["scored"] for t in targets},
        "unreadable_images": sum(tuned[t.name]["skipped"] for t in targets),
        "dry_run": args.dry_run, "departures": args.departures, "identity": args.identity}
    run.write("shots.json", {"train": [list(pair) for pair in zip(shots.paths, shots.labels)]})
    what = {"fewshot": "accuracy", "base2new": "harmonic mean of base and new",
            "dg": "accuracy on ImageNet"}[args.setting]
    tuned_by = f"{args.shots} shots per class (seed {args.seed}) {after:.2f} %"
    run.say("dry run, no result: " * args.dry_run + f"{what}: zero-shot {before:.2f} %" + (
        f", {tuned_by}, gain {after - before:+.2f}" if step else ""))
    return run.finish(results)


def export(run, model, args):
    """Write the tuned model as a full CLIP that the named library loads."""
    path = args.folder / "export" / {"openai": "clip.pt", "safetensors": "clip.safetensors"}.get(
        args.export, args.export)
    run.say(f"wrote {run.on_first(lambda: str(save(model, path, args.export)))}")


def write_tables(run, target, before, after):
    """predictions_*.csv, per_class_*.csv and confusion_*.json of one test set, to look into."""
    names, paths = target.images.classnames, target.images.paths

    def text(*rows):
        out = io.StringIO()
        csv.writer(out).writerows(rows)
        return out.getvalue()
    run.write(f"predictions_{target.name}.csv", text(("path", "label", "zero_shot", "tuned"), *(
        (paths[i], names[label] if label >= 0 else "unreadable", names[old], names[new])
        for i, label, old, new in zip(after["index"], after["labels"], before["predictions"],
                                      after["predictions"]))))
    run.write(f"per_class_{target.name}.csv", text(("class", "images", "zero_shot", "tuned"), *zip(
        names, after["confusion"].sum(axis=1).tolist(), before["per_class"], after["per_class"])))
    run.write(f"confusion_{target.name}.json", {
        "classes": names, "zero_shot": before["confusion"].tolist(),
        "tuned": after["confusion"].tolist()})


# -----------------------------------------------------------------------------
# All runs

# Student's t for a two-sided 95 % interval by degrees of freedom, the last for more: with three
# seeds the usual 1.96 would promise far too much.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
        2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)


def spread(values):
    """-> mean, sample standard deviation, half width of the 95 % interval; nan for one value."""
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return mean, math.nan, math.nan
    std = statistics.stdev(values)
    return mean, std, T_95[min(n - 2, len(T_95) - 1)] * std / math.sqrt(n)


def tabulate(run, results, args):
    """table.md, table.csv and results.json of several runs, from unrounded numbers; -> results."""
    columns = {"accuracy": "zero_shot_accuracy"}
    if args.setting != "fewshot":
        names = [key for key in results[0] if key.endswith("_accuracy") and key != "accuracy"
                 and not key.startswith("zero_shot")]
        columns = {**{name: f"zero_shot_{name}" for name in names}, **columns}
    rows = [["shots", "score", "zero-shot", *(f"seed {seed}" for seed in args.seed),
             "mean", "std", "95 % CI", "gain"]]
    for place, shots in enumerate(args.shots):  # results come shots by shots, seed by seed
        some = results[place * len(args.seed):(place + 1) * len(args.seed)]
        for name, base in columns.items():
            values = [r[name] for r in some]
            mean, std, half = spread(values)
            if name == "accuracy" and args.setting == "base2new":  # H of the averages, as published
                mean = harmonic_mean(*(statistics.fmean(r[f"{part}_accuracy"] for r in some)
                                       for part in ("base", "new")))
                name = "H"
            rows.append([shots, name.removesuffix("_accuracy"), some[0][base], *values, mean, std,
                         half, mean - some[0][base]])

    def cell(x):
        return x if isinstance(x, (str, int)) else "" if math.isnan(x) else f"{x:.2f}"
    lines = ["| " + " | ".join(str(cell(x)) for x in row) + " |" for row in rows]
    lines.insert(1, "|" + "---:|" * len(rows[0]))
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    run.write("table.md", "\n".join(lines) + "\n")
    run.write("table.csv", out.getvalue())
    run.say("\n".join(lines))
    by_shots = {row[0]: dict(zip(rows[0][2:], row[2:])) for row in rows[1:]
                if row[1] in ("accuracy", "H")}
    same = ("method", "data", "model", "setting", "trainable_parameters", "trainable_tensors",
            "zero_shot_accuracy")
    results = run.finish({**{key: results[0][key] for key in same}, "shots": args.shots,
                          "seed": args.seed, "by_shots": by_shots, "runs": results})
    # One number that stands for the table: the mean over seeds at the last number of shots.
    results |= {"accuracy": rows[-1][-4], "gain": rows[-1][-1], "accuracy_at_shots": rows[-1][0]}
    results["seconds"] = sum(r["seconds"] for r in results["runs"])
    run.write("results.json", results)
    return results


def open_model(args, data):
    """The CLIP that --model and --weights ask for, on the CPU; args.model becomes its name."""
    name = args.model or ("tiny" if data == "demo" else "ViT-B/16")
    known = canonical_name(name)
    if known is None and args.weights in ("auto", "none"):
        raise UserError(f"unknown --model {name!r}; known: {', '.join(CONFIGS)}. A file goes to "
                        f"--weights")
    if args.weights == "none":  # the same random weights whatever --seed is
        args.model = known
        torch.manual_seed(0)
        return CLIP(CONFIGS[known]).eval()
    model = load(known if args.weights == "auto" else args.weights)
    if args.weights != "auto" and args.model and CONFIGS.get(known) != model.config:
        raise UserError(f"{args.weights} is not a {name}: it holds {model.config}; leave --model "
                        f"out to take what the file holds")
    args.model = next((n for n, c in CONFIGS.items() if c == model.config), "custom")
    return model


def open_tests(args, train_set, where):
    """-> labels to train on, {name: test ImageSet}, as --setting and --classes choose them."""
    test = open_dataset(args.data, "test", **where)
    labels = find_classes(train_set.classnames, args.classes) if args.classes else list(
        range(len(train_set.classnames)))
    if len(labels) < (4 if args.setting == "base2new" else 2):
        raise UserError(f"{len(labels)} classes are too few to tell apart in the setting "
                        f"{args.setting}; name more with --classes")
    tests = {"test": test.select(labels)}
    if args.setting == "base2new":
        labels, new = halves(labels)
        tests = {"base": test.select(labels), "new": test.select(new)}
    if args.setting == "dg":
        tests = {"imagenet": tests["test"]} | {
            name: open_dataset(name, "test", **where) for name in SHIFTS}
    untaught = [train_set.classnames[c] for c in labels if c not in set(train_set.labels)]
    if untaught:
        raise UserError(f"{train_set.name}: no training image of {', '.join(untaught[:10])}; add "
                        f"some, or leave them out with --classes")
    for name, images in tests.items():
        if not len(images):
            raise UserError(f"{train_set.name}: the {name} part has no image to test on")
        images.check_files()
    return labels, tests


def identify(args, model, train_set):
    """What must be equal for a run to be continued, and what names it in results.json."""
    names = ("setting", "split", "classes", "template", "epochs", "batch_size", "lr", "wd",
             "momentum", "warmup", "grad_clip", "reg_weight", "precision")
    return {"data": train_set.name, "split_sha256": train_set.fingerprint, "model": args.model,
            "weights_sha256": model.origin["sha256"], **{n: getattr(args, n) for n in names}}


def main(args):
    """Every (shots, seed) of the command line; -> the results of the one run, or of the table."""
    given = dict(vars(args))  # as config.json keeps it, before the recipe fills the rest
    precision = "fp16" if args.precision == "official-fp16" else args.precision
    run = start(args.device, precision, args.seed[0], "" if args.eval_only else args.output_dir,
                args.deterministic)
    where = dict(data_dir=args.data_dir, layout=args.split)
    if args.download:  # once; the other processes find the files
        run.on_first(lambda: open_dataset(args.data, "train", **where, download=True).name)
    train_set = open_dataset(args.data, "train", **where)
    args.departures = fill_recipe(args, train_set.name)
    labels, tests = open_tests(args, train_set, where)
    model = open_model(args, train_set.name)
    if args.export:
        check_layout(model.config, args.export)
    identity = identify(args, model, train_set)
    name = f"{train_set.name}_{args.model}_{args.setting}".replace("/", "-")
    folder = expanded(args.output_dir or f"runs/train_clipfit/{name}")
    folder = folder.with_name(folder.name + "_dry_run") if args.dry_run else folder
    single = len(args.shots) * len(args.seed) == 1
    jobs = []
    for shots, seed in itertools.product(args.shots, args.seed):
        # Sampled from all classes and then narrowed, as the official code does: the base shots
        # are among the all-class shots of the same seed.
        few = few_shot(train_set, shots, seed).select(labels)
        few.check_files()
        inside = folder if single and args.output_dir else folder / f"shots{shots}_seed{seed}"
        jobs.append((few, argparse.Namespace(**{
            **vars(args), "shots": shots, "seed": seed, "folder": inside,
            "overwrite": args.overwrite or args.dry_run,
            "config": {**given, "shots": [shots], "seed": [seed]},
            "identity": {**identity, "shots": shots, "seed": seed, "shots_sha256": few.digest()}})))
    table = run.enter("" if args.eval_only else folder)
    if not single and not args.eval_only:
        table.claim(given, {**identity, "table": True}, resume=args.resume == "auto",
                    overwrite=args.overwrite or args.dry_run)

    model = run.move(model).fuse_attention(run.fused_attention)
    view = Preprocess(model.config.image_size, dtype=torch.uint8)
    tokenizer = BPETokenizer()
    targets = [Target(run, name, images.with_transform(view), tokenizer, args.template)
               for name, images in tests.items()]
    if tokenizer.truncated:
        run.say(f"note: {tokenizer.truncated} class prompts are cut to 77 tokens")
    pretrained = {n: p.detach().clone() for n, p in free_clipfit_weights(model).items()}
    model.round_frozen(run.dtype)
    for note in dict.fromkeys([*train_set.notes, *(n for few, _ in jobs for n in few.notes),
                               *model.origin["notes"]]):
        run.say(note)
    total = sum(p.numel() for p in model.parameters())
    run.say(f"{args.model}: {sum(p.numel() for p in pretrained.values()):,} of {total:,} weights "
            f"move, in {len(pretrained)} tensors")
    if not any(name.startswith("visual.") for name in pretrained):
        run.say("note: a ResNet image tower has no LayerNorm; only text biases are tuned")
    for departure in args.departures:
        run.say(f"departs from the official recipe: {departure}")
    zero_shot = {}
    results = [tune(run, model, pretrained, few, targets, zero_shot, job) for few, job in jobs]
    return results[0] if single else tabulate(table, results, args)


if __name__ == "__main__":
    sys.exit(guard(main, get_args))
