"""Fine-tune a CLIP in stages, one data set after another, and see what each stage forgets.

A stage starts from the best weights of the stage before it, or of the one that its key `from`
names, with its own AdamW, warm-up and cosine to 0. Its held-out pairs are scored once before the
first step and after each epoch, and the weights with the best mean recall are kept: so a stage can
end where it began. (Without held-out pairs the last ones are kept.) Then the model is scored on the
test set of every stage: a matrix, stages x test sets. A falling column is forgetting.

For a batch of N pairs, unit vectors v_i of images and t_i of texts, and z_ij = exp(s) v_i . t_j
(s: logit_scale):

    loss = 1/(2N) sum_i [ L_i(row i of z) + L_i(column i of z) ]
    L_i(x) = - mean over j in P(i) of log softmax(x)_j

With `positives` multi, the default, P(i) is i and every pair with the same image or caption (Khosla
et al. 2020, eq. 2, leave i out). With mask, P(i) is i alone, and those other pairs leave the sums;
with diag, P(i) is i alone, and they stay as negatives, as in CLIP (Radford et al. 2021). Where no
image or caption repeats, the three are the same.

    python train_staged.py                               three themes of the demo, about a minute
    python train_staged.py --plan docs/recipes/chinese_clip.json --check-plan     reads no image
    torchrun --nproc-per-node 8 train_staged.py --plan docs/recipes/chinese_clip.json
    python train_staged.py --data own.csv --weights clip_cn_vit-b-16.pt --epochs 30 --batch-size 16
    python train_staged.py --plan plan.json --from-stage own     that stage and those after it again
    python -m tools.search RUN --query "黑色碳纤维材料表面"         search with each stage

A plan is JSON: {"weights": FILE, "defaults": {...}, "eval_sets": {NAME: DATA}, "stages": [{...}]}.
The keys of a stage are the fields of `plans.Stage`; most are flags too, for every stage that does
not say otherwise. Without a plan the flags are one stage.

Against forgetting, all off by default: `replay` mixes pairs of earlier stages into every batch;
`freeze` and `layer_decay` hold what need not change; `wise` averages the stage's best weights with
those it started from (Wortsman et al. 2022, WiSE-FT). The average is one more row of the matrix,
the file RUN/NAME/wise_best.pt, and the start of a later stage that says "from": "NAME:wise";
--export writes the last stage's best weights, not their average.

Different from Chinese-CLIP's trainer: recall is measured on the whole held-out set, not inside
batches; a missing parent, a batch larger than the data and a warm-up as long as the stage are
refused before any work; the gradient is that of the whole batch on any number of processes (only
BERT's dropout draws otherwise); gains never decay, BERT's LayerNorm included; BatchNorm keeps its
statistics. Scores are in %; r1 is the mean of both directions' R@1.
"""
import argparse
import copy
import fnmatch
import functools
import hashlib
import math
import os
import re
import sys

from device import add_run_flags, guard, Parser, run_folder, run_identity, start, UserError, whole
import numpy as np  # device before torch, which reads what it sets
import torch

from clip_model import evaluating, HEADS, project, text_pieces, training_mode, unit
from data import EXTRAS, nearest, note_leaks, Preprocess
from large_batch import info_nce, TwoPass
from pairs import (add_pair_flags, decode_once, FeatureLoader, identities, make_pair_loader,
                   Mixture, open_pairs, PairBatches)
from plans import (add_stage_flags, FILES, FLAGS, KEYS, OF_THE_RUN, read_plan, read_stages, refuse)
from scores import (bootstrap, embed, frozen_features, image_features, milliseconds, recalls,
                    retrieval_ranks)
from tokenizer import for_model
from weights import (add_model_flags, card, check_layout, digest, export, load, open_clip,
                     read_json, sha256_of)

MAX_SCALE = 100.0     # CLIP's clamp of exp(s)
BOOTSTRAPS = 1000     # for each test set and row
DRY_IMAGES = 64       # of each test set: a dry run shows that all works, not how well
FEW = 2000            # up to so many images, reading them here is faster than starting workers
SCORES = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "mean_recall", "r1")


# -----------------------------------------------------------------------------
# The loss and the step

def add_gradient(run, model, images, tokens, ids, counts, stage, scaler, seed):
    """Add this process's part of the whole batch's gradient to `.grad` -> {"loss": its part of the
    loss}. Summed over processes, the parts give the gradient and the loss of the whole batch.

    images (n, 3, R, R) uint8, tokens (n, L) and ids (n, k) are this process's pairs, and pairs that
    are equal in a column of ids have an equal image or caption. Images or tokens may also be the
    features (n, W) that a frozen tower gives. counts: pairs in each process; seed: of this step's
    dropout."""
    micro = stage.micro_batch or len(images)
    pieces, places = cut_texts(model, tokens, micro)
    image = TwoPass(run, functools.partial(image_features, run, model), images.split(micro),
                    2 * seed)
    text = TwoPass(run, functools.partial(text_features, run, model), pieces, 2 * seed + 1)

    # ---- the loss, in fp32: rows are this process's images, columns all texts --
    texts = run.gather(text.features[run.move(places)], counts)               # (N, D)
    ids = run.gather(run.move(ids), counts)                                   # (N, k)
    own = sum(counts[:run.rank]) + torch.arange(len(images), device=ids.device)
    loss = info_nce(run, image.features, texts, model.logit_scale.exp(), own, ids, stage.positives)
    # --------------------------------------------------------------------------
    scaler.scale(loss).backward()
    image.backward()
    text.backward()
    return {"loss": loss.detach()}


def cut_texts(model, tokens, micro):
    """-> pieces of texts, and the places that put their features into the order given."""
    if tokens.is_floating_point():
        return tokens.split(micro), torch.arange(len(tokens))
    return text_pieces(tokens, micro, model.text_pad)


def text_features(run, model, piece):
    """Unit features (m, D) of a piece of texts, or of what the frozen tower made of it, (m, W)."""
    if torch.is_tensor(piece):
        return unit(project(run.move(piece), model.text_projection))
    tokens, ends = run.move(*piece)
    return model.encode_text(tokens, normalize=True, ends=ends)


# -----------------------------------------------------------------------------
# What trains, and how fast

def blocks_below(name):
    """The depth of a parameter in its tower: 0 for embeddings, i + 1 in block i, inf for what comes
    after the blocks."""
    if name.startswith(HEADS) or re.search(r"ln_post|ln_final|pooler|attnpool|logit_", name):
        return math.inf
    block = re.search(r"(?:resblocks|layers?|blocks|stages|features)\.?(\d+)\.", name)
    return int(block[1]) + 1 if block else 0


def freeze(model, stage):
    """Set what trains in a stage -> {name: parameter that trains}. The rules of `freeze` are read
    in order: a later one wins, and !RULE unfreezes."""
    names, frozen = [name for name, _ in model.named_parameters()], set()
    towers = {"visual": [name for name in names if name.startswith("visual.")],
              "text": [name for name in names if not name.startswith(("visual.", "logit_"))],
              "all_but_proj": [name for name in names if not name.startswith(HEADS)]}
    for rule in stage.freeze:
        bare = rule.removeprefix("!")
        hit = set(towers.get(bare) or fnmatch.filter(names, bare))
        frozen = frozen | hit if bare == rule else frozen - hit
        refuse(stage, f"freeze {rule!r} names nothing{nearest(bare, [*towers, *names])}",
               when=not hit)
    trainable = {name: p for name, p in model.named_parameters() if name not in frozen}
    refuse(stage, f"freeze {[*stage.freeze]} leaves nothing to train",
           when=set(trainable) <= {"logit_scale"})
    for name, p in model.named_parameters():
        p.requires_grad_(name in trainable)
    return trainable


def optimizer_groups(model, stage):
    """Groups for AdamW of what trains. Matrices decay; gains and biases do not. A parameter k
    blocks below the head of its tower, frozen blocks counted, gets the rate lr * layer_decay^k."""
    below = {name: blocks_below(name) for name, _ in model.named_parameters()}
    top, groups = {True: 0, False: 0}, {}  # most blocks: of the image tower, of the text tower
    for name, blocks in below.items():
        if blocks < math.inf:
            top[name.startswith("visual.")] = max(top[name.startswith("visual.")], blocks)
    for name, p in model.named_parameters():
        away = max(0, top[name.startswith("visual.")] + 1 - below[name])
        key = stage.lr * stage.layer_decay ** away, stage.wd if p.ndim > 1 else 0.0
        if p.requires_grad:
            groups.setdefault(key, []).append(p)
    return [{"params": some, "lr": lr, "full_lr": lr, "weight_decay": wd}
            for (lr, wd), some in groups.items()]


def rate(step, steps, warmup):
    """Factor on every learning rate in step 0, 1, ...: a linear warm-up, then half a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


# -----------------------------------------------------------------------------
# Evaluation: the rows of the matrix

def evaluate(run, model, pairs, tokenizer, args, draws=0, pooled=None):
    """Recall both ways on all of `pairs`, in % -> dict. draws: of a bootstrap over the images, for
    "interval", the 95 % interval of each score. pooled: see `embed`."""
    shown = pairs.with_transform(Preprocess.of(model))
    image, text, relevant = embed(run, model, shown, tokenizer, workers=args.workers,
                                  max_text=args.max_text, pooled=pooled)
    ranks = retrieval_ranks(image, text, relevant)
    found, interval = recalls(ranks), {}
    found["r1"] = (found["i2t_r1"] + found["t2i_r1"]) / 2
    if draws:
        spread = bootstrap(ranks, relevant, draws, args.seed)
        spread["r1"] = (spread["i2t_r1"] + spread["t2i_r1"]) / 2
        interval = {name: np.quantile(spread[name], (0.025, 0.975)).tolist() for name in SCORES}
    return {**{name: found[name] for name in SCORES}, "interval": interval, "images": len(image),
            "texts": len(text)}


def forgetting_of(rows, score):
    """-> {set: best row - last row}, and backward transfer (Lopez-Paz and Ranzato 2017): last row -
    the stage's own row on its own set, the mean over all stages but the last, or None. Rows of
    `wise` do not count."""
    rows = [row for row in rows if row["kind"] != "wise"]
    last = {name: x[score] for name, x in rows[-1]["sets"].items()}
    lost = {name: max(row["sets"][name][score] for row in rows) - last[name] for name in last}
    changes = [last[row["stage"]] - row["sets"][row["stage"]][score]
               for row in rows[1:-1]]  # neither "before" nor the last
    return lost, sum(changes) / len(changes) if changes else None


def matrix_text(rows):
    """The matrix as Markdown: R@1, then mean recall."""
    sets, lines = rows[0]["sets"], []
    names = " | ".join(f"{name} ({x['images']} images)" for name, x in sets.items())
    for score, title in (("r1", "R@1"), ("mean_recall", "Mean of R@1, 5 and 10")):
        lost, back = forgetting_of(rows, score)
        lines += [f"{title} both ways, in % [95 % interval]", "", f"| weights | {names} |",
                  "|---" * (len(sets) + 1) + "|"]
        for row in rows:
            cells = ("{:.1f} [{:.1f}, {:.1f}]".format(x[score], *x["interval"][score])
                     for x in row["sets"].values())
            lines.append(f"| {row['row']} | {' | '.join(cells)} |")
        cells = " | ".join(f"{x:.1f}" for x in lost.values())
        lines += [f"| forgotten (best row - last) | {cells} |", ""]
        if back is not None:
            lines += [f"backward transfer, later stages' effect on earlier sets: {back:+.1f}", ""]
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# One stage

def train(run, model, stage, loader, tokens, judge, checkpoint):
    """Train `model` in place -> {"score", "step", ...} of the best weights, and where it stopped.
    loader: batches of the stage's pairs and of those it replays; tokens (M, L): of all their
    captions; judge: () -> scores on its held-out pairs; checkpoint: to go on from, or None."""
    trainable, pairs = freeze(model, stage), loader.dataset
    patience = stage.early_stop or math.inf
    kept = {n: x for n, x in model.state_dict(keep_vars=True).items() if n in stage.kept}
    optimizer = torch.optim.AdamW(optimizer_groups(model, stage), betas=(0.9, 0.98), eps=1e-6,
                                  fused=run.fused_optimizer)
    scaler, ids = run.scaler(), identities(pairs)
    at = run.load_training(checkpoint, kept, optimizer, scaler)
    best = dict(checkpoint["best"]) if checkpoint else {"score": None, "step": 0, "stale": -1}

    def save(name, optimizer, scaler):
        run.save_training(at, kept, optimizer, scaler, name=name, best=best, card=card(model))

    def consider():
        """Score the weights as they are, and keep them if they are the best so far."""
        scores = judge() if stage.held_out else {"mean_recall": None}
        score = scores["mean_recall"]
        best["stale"] += 1
        best.setdefault("start_score", score)
        if score is None or best["score"] is None or score > best["score"]:
            best.update(score=score, step=at.step, stale=0)
            save(FILES["best"], None, None)
        if stage.held_out:
            run.log(at.step, f"{stage.name} val", **{name: scores[name] for name in SCORES})

    if checkpoint is None:  # what the stage starts from is its first candidate
        consider()
    at.steps = at.step if best["stale"] >= patience else stage.steps  # none left if it had stopped
    training_mode(model, statistics=False)
    for images, used, asked in run.batches(loader, at):
        # ---- one step --------------------------------------------------------
        for group in optimizer.param_groups:
            group["lr"] = group["full_lr"] * rate(at.step, stage.steps, stage.warmup_steps)
        optimizer.zero_grad(set_to_none=True)
        losses = add_gradient(run, model, images, tokens[used], ids[used],
                              loader.batch_sampler.counts, stage, scaler,
                              run.seed * 1_000_003 + at.step)
        run.sum_gradients(trainable.values())
        run.update(optimizer, trainable.values(), scaler, stage.grad_clip, loss=losses["loss"])
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(MAX_SCALE))
        # ----------------------------------------------------------------------
        due = run.tick(at, losses, samples=stage.batch_size, scale=model.logit_scale.detach().exp(),
                       lr=max(group["lr"] for group in optimizer.param_groups),
                       describe=functools.partial(pairs.describe, used),
                       replaced=pairs.replaced(used, asked))
        if at.batch == 0 or at.step == at.steps:  # an epoch has just ended, or the stage
            consider()
        if due:
            save(FILES["last"], optimizer, scaler)
        if best["stale"] >= patience:
            at.steps = at.step  # the last; a `break` would pass over a signal
    return best, at


def open_batches(run, model, stage, tokenizer, args):
    """-> the loader of a stage's pairs and of those it replays, and the tokens of all captions."""
    parts = [part.train for part in stage.parts]
    options = decode_once(run, parts, stage.folder.parent / "cache", args)
    view = Preprocess.of(model, train=bool(stage.augment), seed=args.seed,
                         scale=(0.8, 1.0) if "crop" in stage.augment else None,
                         flip="flip" in stage.augment,
                         augment=[name for name in stage.augment if name in EXTRAS])
    loader = make_pair_loader(Mixture([pairs.with_transform(view) for pairs in parts]), stage.sizes,
                              args.seed, args.captions, run.rank, run.world_size, **options)
    return loader, tokenizer(loader.dataset.captions, context_length=args.max_text)


@torch.no_grad()
def keep_frozen(run, model, stage, loader, tokens, args):
    """Compute a frozen tower's features once, to use instead of the tokens, or of images that are
    not augmented -> loader, tokens, features of the held-out images or None."""
    trainable = freeze(model, stage)  # which also sets requires_grad
    below_heads = [name for name in trainable if not name.startswith((*HEADS, "logit_"))]
    trains = {"image" if name.startswith("visual.") else "text" for name in below_heads}
    held_out = None
    if "image" not in trains:
        keep = functools.partial(frozen_features, run, model, workers=args.workers,
                                 folder=stage.folder.parent / "cache",
                                 tower=digest(model, "image", head=False))
        held_out = stage.held_out and keep(stage.held_out.with_transform(Preprocess.of(model)))
        if not stage.augment:
            loader = FeatureLoader(loader, torch.cat([keep(part) for part in loader.dataset.parts]))
    if "text" not in trains:
        pieces, places = text_pieces(tokens, 64, model.text_pad)
        with evaluating(model), run.autocast():
            features = [model.pooled_text(*run.move(*piece)).float().cpu() for piece in pieces]
        tokens = torch.cat(features)[places]
    return loader, tokens, held_out


def wise_average(run, model, stage, start_weights, judges, tokenizer, args):
    """WiSE-FT: (1 - a) start + a best for every a of `wise`. The weights with the highest mean
    recall over the held-out pairs of all stages so far are kept -> {a: that mean}."""
    end, means = load(run.out / FILES["best"]).state_dict(), {}
    for share in stage.wise:
        model.load_state_dict({
            name: torch.lerp(x, run.move(end[name]), share) if x.is_floating_point() else x
            for name, x in start_weights.items()})
        scores = [evaluate(run, model, pairs, tokenizer, args)["mean_recall"] for pairs in judges]
        mean = sum(scores) / max(1, len(scores))
        if mean > max(means.values(), default=-1.0):
            kept = {name: x for name, x in model.state_dict().items() if name in stage.kept}
            run.save(FILES["wise"], {"weights": kept, "card": card(model)})
        means[f"{share:g}"] = mean
    run.say(f"{stage.name}: wise, mean recall by the share of the trained weights: "
            + ", ".join(f"{share}: {mean:.1f} %" for share, mean in means.items()))
    return means


def run_stage(run, model, stage, stages, tokenizer, args, about):
    """Train a stage from the weights that are in `model`, or from its checkpoint. Its folder then
    holds checkpoint_best.pt, checkpoint_last.pt and, with `wise`, wise_best.pt."""
    run = run.enter(args.seed)
    checkpoint, _ = run.begin(stage.folder, stage.args, identity_of(stage, about))
    start_weights = copy.deepcopy(model.state_dict()) if stage.wise else None
    loader, tokens = open_batches(run, model, stage, tokenizer, args)
    loader, tokens, held_out = keep_frozen(run, model, stage, loader, tokens, args)
    model.recompute_blocks(bool(stage.recompute))
    judge = functools.partial(evaluate, run, model, stage.held_out, tokenizer, args,
                              pooled=held_out)
    best, at = train(run, model, stage, loader, tokens, judge, checkpoint)
    model.recompute_blocks(False)
    found = {"method": "staged", "stage": stage.name, "steps": at.step, "epochs": at.epoch,
             "start_score": best["start_score"], "best": best["score"], "best_step": best["step"]}
    model.requires_grad_(True)
    if stage.wise:
        so_far = stages[:stages.index(stage) + 1]
        judges = [other.held_out for other in so_far if other.held_out]
        found["wise"] = wise_average(run, model, stage, start_weights, judges, tokenizer, args)
    # Adam's state is two thirds of the file, and a finished stage does not need it.
    run.save(FILES["last"], {**run.load(FILES["last"]), "optimizer": {}, "scaler": {}})
    run.on_first(lambda: (run.out / "checkpoint_prev.pt").unlink(missing_ok=True))
    run.finish(found)


# -----------------------------------------------------------------------------
# Opening data, and checking a plan

def open_split(source, split, args, stage=None, whole=False):
    """A split of `source` -> PairSet; of a stage's own data only what matches. whole: data without
    splits is not cut."""
    own = stage and source == stage.data
    pairs = open_pairs(source, split, args.data_dir, args.layout,
                       stage.caption_file if own else None, args.image_column,
                       args.caption_column, whole)
    if own and stage.matching:
        wanted = re.compile(stage.matching, re.IGNORECASE)
        pairs = pairs.subset([i for i, name in enumerate(pairs.paths) if wanted.search(
            "\n".join([name, *pairs.texts_of(i)]))])
        refuse(stage, f"{len(pairs.paths)} {split} images of {source} match {stage.matching!r}: "
               f"expected 2 or more", when=len(pairs.paths) < 2)
    if args.dry_run and split != "train":
        pairs = pairs.subset(range(min(DRY_IMAGES, len(pairs.paths))))
    pairs.check_files()
    return pairs


def open_data(stages, eval_sets, args):
    """Give each stage its pairs -> {name: pairs} of all test sets. No image is read."""
    tests = {}
    for stage in stages:
        stage.train, found = open_split(stage.data, "train", args, stage, bool(stage.val)), {}
        for split in ("val", "test"):
            source = getattr(stage, split) or stage.data
            if source != stage.data or stage.train.counts.get(split):
                found[split] = open_split(source, split, args, stage, source != stage.data)
        refuse(stage, f"{stage.data} has no val or test pairs beside train; name other data in val "
               f"or test", when=not found)
        stage.held_out = found.get("val")
        tests[stage.name] = found.get("test", stage.held_out)
    return tests | {name: open_split(str(source), "test", args, whole=True)
                    for name, source in eval_sets.items()}


def preflight(run, stages, tests, model, args):
    """Work out each stage's steps and say what it will do. UserError for what cannot work."""
    judged = [*tests.values(), *(stage.held_out for stage in stages if stage.held_out)]

    def files(sets):  # whichever source lists them
        return [(os.path.join(os.path.abspath(str(pairs.store)), path),)
                for pairs in sets for path in pairs.paths]
    notes = [note for pairs in judged for note in (*pairs.notes, *pairs.retrieval().notes)]
    notes += [f"NOTE: {stage.name} has no test pairs: its held-out pairs choose its weights and "
              f"are scored, which flatters" for stage in stages
              if tests[stage.name] is stage.held_out]
    notes += note_leaks({"train": files(stage.train for stage in stages), "val": files(judged),
                         "test": []})
    run.say(*dict.fromkeys([note for stage in stages for note in stage.train.notes] + notes))
    for stage in stages:
        size = stage.batch_size
        replayed = [round(stage.replay[part.name] * size) for part in stage.parts[1:]]
        stage.sizes = [size - sum(replayed), *replayed]
        refuse(stage, f"batch_size {size} is too small for {run.world_size} processes",
               when=size < run.world_size)
        for part, some in zip(stage.parts, stage.sizes):
            images = len(part.train.paths)
            refuse(stage, f"batch_size {size} takes {some} of the {images} images of {part.name}; "
                   f"expected from 1 to {images}", when=not 0 < some <= images)
        epoch = len(PairBatches(stage.train, stage.sizes[0], captions=args.captions))
        stage.steps = stage.epochs * epoch   # 1 or more, as a batch is no larger than the data
        warmup = round(stage.warmup if stage.warmup >= 1 else stage.warmup * stage.steps)
        refuse(stage, f"warmup takes {warmup} of {stage.steps} steps; give a share such as 0.1, or "
               f"more epochs", when=warmup >= stage.steps)
        refuse(stage, "early_stop and a choice of wise need held-out pairs; name some in val",
               when=stage.held_out is None and (stage.early_stop or len(stage.wise) > 1))
        if args.dry_run:
            stage.steps, warmup = min(2, stage.steps), min(1, warmup)
        stage.warmup_steps = warmup
        trainable = freeze(model, stage)
        stage.kept = set(model.state_dict())
        if model.origin["path"]:  # keep only what was trained: `load` takes the rest from that file
            stage.kept = {*trainable, *(stage.parent.kept if stage.parent else ())}
        weights = sum(p.numel() for p in trainable.values())
        model.requires_grad_(True)
        run.say(f"stage {stage.name} from {stage.from_}: {len(stage.train.paths):,} images, "
                f"{len(stage.train):,} captions; {stage.steps:,} steps, {epoch:,} an epoch, of "
                f"{size} pairs"
                + "".join(f", {n} of {x.name}" for x, n in zip(stage.parts[1:], replayed))
                + f"; warm-up {warmup}, lr {stage.lr:.3g}; {weights:,} weights train; held-out "
                f"images: {len(stage.held_out.paths) if stage.held_out else 0:,}")


def identity_of(stage, about):
    """If this changed, a stage is neither continued nor taken as done. "parent" tells the weights
    that it starts from: the sha256 of its parent's file, or of the run's."""
    parent = about["weights"]
    if stage.parent:
        parent = sha256_of(stage.start) if stage.start.exists() else None
    return run_identity(stage.args, but=NO_IDENTITY, **about, parent=parent,
                        data=stage.train.fingerprint,
                        val=stage.held_out and stage.held_out.fingerprint)


def settle(run, stages, out, args, about):
    """Give each stage its folder, the file it starts from, its flags (`args`) and whether it is
    `done`. UserError where the plan has changed since, or a file is gone."""
    names = [stage.name for stage in stages]
    if args.eval_only:
        run.check(out, about, keys=("method", "model", "weights"))
    for i, stage in enumerate(stages):
        stage.folder = out / stage.name
        if stage.parent:
            stage.start = stage.parent.folder / FILES[stage.from_.partition(":")[2] or "best"]
        again = args.overwrite or args.dry_run or args.from_stage in names[:i + 1]
        keys = {name: getattr(stage, field.name) for name, field in KEYS.items()}
        stage.args = argparse.Namespace(**{**vars(args), **keys, "overwrite": again})
        stage.done = (args.eval_only or not again) and (stage.folder / "results.json").exists()
        if args.eval_only or again:
            continue
        cure = f"--from-stage {stage.name} trains it and all after it again"
        run.check(stage.folder, identity_of(stage, about), f"{cure}; --output-dir OTHER makes "
                  f"another run, --weights {stage.folder} one that goes on from it")
        for file in (stage.folder / FILES[kind] for kind in stage.kinds):
            refuse(stage, f"{file} is missing; {cure}", when=stage.done and not file.exists())


# -----------------------------------------------------------------------------
# A run

def main(args):
    """Train what is left of the plan and score every row on every test set -> the results."""
    plan = read_plan(args)
    stages = read_stages(plan, args)
    if args.resume not in ("auto", "none"):
        raise UserError("--resume: a plan goes on by itself; --weights starts from a checkpoint")
    run = start(args.device, args.precision, args.seed, args.deterministic)
    tests = open_data(stages, plan.get("eval_sets", {}), args)  # before weights are fetched
    model = open_clip(args)
    tokenizer = for_model(model, args.tokenizer)
    model.vocabulary = tokenizer.facts()  # goes into every file of the run
    args.max_text = min(args.max_text or (52 if tokenizer.kind == "chinese" else 77),
                        model.config.context_length)
    if args.export:
        check_layout(model, args.export)
    run.say(*model.origin["notes"])
    opened = [*tests.values(), *(stage.train for stage in stages)]
    if args.workers < 0 and max(len(pairs.paths) for pairs in opened) <= FEW:
        args.workers = 0
    preflight(run, stages, tests, model, args)
    about = {"method": "staged", "model": model.origin["name"], "weights": model.origin["sha256"],
             "vocabulary": hashlib.sha256(repr(model.vocabulary).encode()).hexdigest()}
    out = run_folder(args, "train_staged",
                     str(plan.get("name") or "_".join(stage.name for stage in stages))[:60])
    settle(run, stages, out, args, about)
    if args.check_plan:
        return {"stages": [{"name": stage.name, "steps": stage.steps, "warmup": stage.warmup_steps,
                            "done": stage.done} for stage in stages]}
    found = run_plan(run, model, plan, stages, tests, tokenizer, out, args, about)
    if args.export:
        if (out / found["weights"]).is_file():  # else `model` is still as --weights gave it
            model.load_state_dict(load(out / found["weights"]).state_dict())
        run.say("wrote " + run.on_first(lambda: str(export(model, out / "export", args.export,
                                                           tokenizer))))
    return found


def run_plan(run, model, plan, stages, tests, tokenizer, out, args, about):
    """Train the stages that are not done, and score every row of the matrix -> the results."""
    judged_on = {name: [pairs.fingerprint, len(pairs)] for name, pairs in tests.items()}
    if not args.eval_only:
        _, finished = run.begin(out, args, about)
        # As text, since the order of the test sets counts too.
        if finished and all(s.done for s in stages) and str(finished["tests"]) == str(judged_on):
            return finished
        run.write("plan.json", plan)
        run.on_first(lambda: (out / "results.json").unlink(missing_ok=True))
    start_weights = copy.deepcopy(model.state_dict())
    model = run.move(model).fuse_attention(run.fused_attention)
    rows = []

    def score(label, stage, kind, path):
        """Score the weights that are in `model` on every test set: a row of the matrix."""
        sets = {name: evaluate(run, model, pairs, tokenizer, args, BOOTSTRAPS)
                for name, pairs in tests.items()}
        run.say(f"{label}: r1 " + ", ".join(f"{x['r1']:.1f} on {name}" for name, x in sets.items()))
        rows.append(dict(row=label, stage=stage, kind=kind, weights=str(path), sets=sets))
    score("before", None, "before", args.weights)
    for stage in stages:
        if not (stage.done or args.eval_only):
            model.load_state_dict(load(stage.start).state_dict() if stage.parent else start_weights)
            run_stage(run, model, stage, stages, tokenizer, args, about)
            stage.done = True
        for kind in stage.kinds:
            path = stage.folder / FILES[kind]
            if not path.exists():  # --eval-only takes what there is
                run.say(f"no {path}: {stage.name} is not scored")
            else:
                model.load_state_dict(load(path).state_dict())
                score(stage.name + " wise" * (kind == "wise"), stage.name, kind, path)
    return run.finish({**report(run, model, rows, stages, tests, tokenizer, args),
                       "tests": judged_on})


def report(run, model, rows, stages, tests, tokenizer, args):
    """Write the matrix -> the results, but for what `Run.finish` adds."""
    lost, back = forgetting_of(rows, "r1")
    text = matrix_text(rows)
    run.write("matrix.md", text)
    run.say(text.rstrip())
    last = [row for row in rows if row["kind"] != "wise"][-1]
    judged = last["stage"] or next(iter(tests))
    done = {stage.name: read_json(stage.folder / "results.json") for stage in stages if stage.done}
    pixels = torch.zeros(1, 3, *[model.config.image_size] * 2, dtype=torch.uint8)
    tokens = tokenizer(tests[judged].captions[:1], context_length=args.max_text)
    return {"method": "staged", "data": "+".join(dict.fromkeys(s.train.name for s in stages)),
            "model": model.origin["name"], "judged_on": judged,
            **{name: last["sets"][judged][name] for name in SCORES},
            "rows": rows, "forgetting": lost, "backward_transfer": back, "stages": done,
            "image_ms": milliseconds(run, model, image_features, pixels),
            "text_ms": milliseconds(run, model, text_features, cut_texts(model, tokens, 1)[0][0]),
            "samples_per_second": max([x["samples_per_second"] for x in done.values()] or [0.0]),
            "weights": f"{judged}/{FILES['best']}" if last["stage"] else str(args.weights)}


# -----------------------------------------------------------------------------
# The command line

# Not in the identity of a stage: it is known there by its content, or changes none of its weights.
NO_IDENTITY = ("from", "data", "val", "test", "recompute", "tokenizer", "plan", "from_stage",
               "check_plan")


def get_args(argv=None):
    """The command line as a namespace. Settings of the run in a plan are defaults, which flags
    override. Exits with code 2 and one line on a wrong flag."""
    parser = Parser(
        description="Fine-tune a CLIP in stages and see what each forgets.",
        aliases={"--train-data": "--data", "--val-data": "--val", "--context-length": "--max-text",
                 "--logs": "--output-dir", "--checkpoint": "--weights"},
        refused={"--text-data": "texts are found beside the images; --caption-file names others",
                 "--text-model": "--model CN-ViT-B/16 names both towers",
                 "--query": "use python -m tools.search RUN --query",
                 **{"--" + name.replace("_", "-"): "it is a key of a stage in a --plan"
                    for name in KEYS if name not in FLAGS}})
    group = parser.add_argument_group("plan")
    group.add_argument("--plan", metavar="FILE", help="stages as JSON (default: the demo's, or one "
                       "stage of the flags)")
    group.add_argument("--from-stage", metavar="STAGE", help="train it and all after it again")
    group.add_argument("--check-plan", action="store_true", help="say what would be done, and stop")
    add_model_flags(parser)
    parser.add_argument("--max-text", type=whole(3), help="tokens of a text (default: 52 for "
                        "Chinese-CLIP, else 77)")
    add_pair_flags(parser)
    add_stage_flags(parser)
    add_run_flags(parser)
    parser.set_defaults(data=None, captions="all")
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    plan = read_plan(args)
    told = [f"--{name.replace('_', '-')}={plan[name]}" for name in OF_THE_RUN if name in plan]
    return parser.parse_args(told + words)


if __name__ == "__main__":
    sys.exit(guard(main, get_args))
