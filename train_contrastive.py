"""CLIP training on image-caption pairs, with an exact batch of any size (Radford et al. 2021).

The loss compares every image of a batch with every text of it, so a larger batch is a harder and
better task. Memory usually limits it; here it does not: `--batch-size` pairs are always contrasted,
on one device or many, and `--micro-batch` is how many of them are encoded at a time. One step:

1. Encode the batch in pieces of `--micro-batch`, keeping activations only of the last piece.
2. Compute the loss, and its gradient for the features, some rows of the N x N matrix at a time.
3. Encode each other piece again, with the same dropout, now for its share of that gradient
   (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup").

The gradient, the scale's included, is that of the whole batch, for at most 4/3 of the arithmetic;
`--check-grad` shows it on your model and data. Processes exchange features for the loss, and sum
gradients once a step. How many there are changes only rounding, dropout masks and BatchNorm.

    python train_contrastive.py                           the bundled demo, a minute on a CPU
    python train_contrastive.py --data flickr8k --data-dir DIR --model tiny    a small ViT
    python train_contrastive.py --data coco --preset clip-roberta --image-tower ViT-B/32 \
        --text-tower FOLDER                           ViT-B/32 + RoBERTa on COCO 2017
    python train_contrastive.py --data flickr8k --preset simple-clip --batch-size 1024 \
        --image-tower resnet50:IMAGENET1K_V2 --text-tower FOLDER
    torchrun --nproc-per-node 8 train_contrastive.py --data coco        on eight GPUs

Losses (`--loss`) of N pairs, cos = image @ text.T of unit rows, z = scale * cos. The formulas are
those of `--positives diag`. With mask, the default, their sums and maxima leave out every j that
shares an image or caption with i; with multi such j are positives (for triplet: the same as mask).
    infonce          half the sum of two cross-entropies: mean_i (logsumexp_j z_ij - z_ii), and the
                     same with z transposed (Radford et al. 2021)
    siglip           -1/N sum_ij log sigmoid(y_ij (z_ij + bias)), y = 1 if i = j else -1 (Zhai 2023)
    triplet          1/N sum_i max(0, margin + cos_ij - cos_ii) both ways; over all negatives j
                     (sum: VSE), the hardest (VSE++, Faghri et al. 2018) or the semi-hard one
    infonce+triplet  infonce + triplet_weight * triplet

AdamW, weight decay on all but gains and biases, warm-up, then cosine (clip-roberta: linear,
simple-clip: constant); the scale is learned and stays in [1, 100]. After each epoch the held-out
pairs are scored. checkpoint_best.pt has the weights of the best mean recall, which are tested (the
last ones, where there are no held-out pairs); checkpoint_last.pt has everything to go on from.
Both, and what --export writes, can be the --weights of another run. `--eval-only` scores
checkpoint_best.pt, else checkpoint_last.pt, else --weights; `--resume FILE` names another.

Different from common practice:
- an epoch takes every image once, with one of its captions (`--captions all`: every caption), and
  never one image twice in a batch; pairs that share an image or caption are no negatives;
- retrieval is scored on the unique images with all captions of each, as in the papers;
- BatchNorm statistics are frozen if the batch is split (pieces, processes); a message says so;
- with `--crop 0` a frozen image tower always gives the same features, so they are computed once.

Logged: loss, its terms, ln B (InfoNCE at chance), scale, lr. Results: i2t_r1 ... t2i_r10,
mean_recall (%), samples_per_second, and the loss of held-out pairs. That is always InfoNCE, for any
--loss, in batches of 64 images with one caption each."""
import dataclasses
import functools
import hashlib
import json
import math
import sys

from device import (add_run_flags, guard, number, Parser, Place, run_folder, run_identity,
                    SafeStop, start, UserError, whole)  # before torch, which reads what it sets
import torch
import torch.nn.functional as F
from torch import nn

import weights
from clip_model import HEADS, text_pieces, training_mode
from data import ImageSet, open_dataset, Preprocess, require_words
from large_batch import by_rows, info_nce, together, TwoPass
from pairs import (add_pair_flags, decode_once, FeatureLoader, identities, make_pair_loader,
                   open_splits, PairBatches, PairSet)
from scores import embed, frozen_features, image_features, recall_at_k, zero_shot
from tokenizer import for_model

MAX_SCALE = 100.0  # CLIP's clamp
QUIET = ("rsum", "i2t_median_rank", "t2i_median_rank", "captions")  # of the scores; not logged


# -----------------------------------------------------------------------------
# The loss

def batch_loss(run, model, image, text, ids, counts, args):
    """The loss of the batch over all processes -> {"loss", and its terms}, () each: this process's
    part, whose sum over processes is the loss. image, text (n, D), ids (n, 2): of its own pairs;
    counts: how many pairs each process has."""
    texts, ids = run.gather(text, counts), run.gather(ids, counts)             # (N, D), (N, 2)
    N, scale, bias = len(texts), model.logit_scale.exp(), model.logit_bias
    every = torch.arange(N, device=texts.device)
    own = every.split(counts)[run.rank]  # the numbers of this process's pairs
    if args.positives == "diag":
        ids = every[:, None]  # each pair belongs to itself alone
    terms = {}
    if "infonce" in args.loss:  # a column's log-sum-exp is combined across processes in there
        terms["infonce"] = info_nce(run, image, texts, scale, own, ids, args.positives)
    if args.loss == "siglip":
        formula = functools.partial(siglip, ids=ids, positives=args.positives)
        terms["siglip"] = by_rows(formula, (image, own), (texts, scale, bias)) / N
    if "triplet" in args.loss:
        formula = functools.partial(triplet, ids=ids, kind=args.triplet, margin=args.margin)
        images = run.gather(image, counts)
        hinges = by_rows(formula, (image, own), (texts,)) + by_rows(formula, (text, own), (images,))
        terms["triplet"] = args.triplet_weight * hinges / N
    return {"loss": sum(terms.values()), **terms}


# siglip and triplet see m rows of the N x N matrix. own (m,): the indices of those rows in the
# batch. ids (N, k): two pairs belong together if they agree in any column.

def siglip(image, own, texts, scale, bias, ids, positives):
    """image (m, D), texts (N, D) -> the sum over these rows, ()."""
    z = scale * image @ texts.T + bias                                         # (m, N)
    sign = torch.full_like(z, -1)  # 1: a pair, -1: a negative, 0: left out
    sign.masked_fill_(together(ids, own), 1 if positives == "multi" else 0)
    sign.scatter_(1, own[:, None], 1)
    return -(sign.abs() * F.logsigmoid(sign * z)).sum()


def triplet(anchors, own, others, ids, kind, margin):
    """anchors (m, D) of one side, others (N, D) of the other -> the sum over these anchors, ()."""
    cosine = anchors @ others.T                                                # (m, N)
    near = cosine.gather(1, own[:, None])                                       # of the pair itself
    far = cosine.masked_fill(together(ids, own), -math.inf)                     # of its negatives
    if kind == "semi-hard":  # the nearest of those that are farther than the pair
        far = far.masked_fill(cosine >= near, -math.inf)
    if kind != "sum":
        far = far.amax(dim=1, keepdim=True)
    return (margin + far - near).clamp(min=0).sum()


def add_gradient(run, model, images, tokens, ids, counts, args, scaler, seed):
    """Add the gradient of the batch to `.grad`, this process's part -> the losses, detached.

    images (n, 3, S, S) uint8 or kept features (n, F), tokens (n, L), ids (n, 2): this process's
    pairs, on the host; seed: of dropout, another one for every step."""
    micro = args.micro_batch or max(1, len(images))
    texts, places = text_pieces(tokens, micro, model.text_pad)  # by length; places undo the order

    def encode_text(piece):
        tokens, ends = run.move(*piece)
        return model.encode_text(tokens, normalize=True, ends=ends)

    image = TwoPass(run, functools.partial(image_features, run, model), images.split(micro),
                    2 * seed, model.visual)
    text = TwoPass(run, encode_text, texts, 2 * seed + 1)
    losses = batch_loss(run, model, image.features, text.features[run.move(places)], run.move(ids),
                        counts, args)
    scaler.scale(losses["loss"]).backward()  # to the features, and to scale and bias
    image.backward()                         # from there into the towers, piece by piece
    text.backward()
    return {name: loss.detach() for name, loss in losses.items()}


def check_grad(run, model, batch, counts, args):
    """Compare the gradient of one step in two pieces or more with that in one piece, without
    dropout -> the largest relative error of a parameter's gradient. Raises SafeStop if it is above
    1e-4 in fp32, or 5e-2 in a lower precision."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    piece = min(args.micro_batch or counts[0], max(1, counts[0] // 2))
    model.eval()
    found = []
    for micro_batch in (piece, 0):  # 0: all in one piece
        args.micro_batch = micro_batch
        model.zero_grad(set_to_none=True)
        losses = add_gradient(run, model, *batch, counts, args, run.scaler(), 0)
        run.sum_gradients(trainable.values())
        found.append({name: p.grad for name, p in trainable.items() if p.grad is not None})
    size = {name: float(gradient.abs().max()) for name, gradient in found[1].items()}
    floor = 1e-3 * max(size.values()) or 1.0  # a gradient that nearly vanishes holds rounding alone
    errors = {name: float((found[0][name] - gradient).abs().max()) / max(size[name], floor)
              for name, gradient in found[1].items()}
    worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))
    run.say(f"gradient of {sum(counts)} pairs in pieces of {piece} against one piece: loss "
            f"{float(run.sum(losses['loss'])):.7g}, largest error of {len(errors)} tensors "
            f"{errors[worst]:.1e} in {worst}")
    if not errors[worst] <= (1e-4 if run.precision == "fp32" else 5e-2):
        raise SafeStop("the gradients differ; where all features are nearly equal, as of an "
                       "untrained ResNet, rounding alone can do that")
    return {"check_grad_error": errors[worst], "check_grad_worst": worst}


# -----------------------------------------------------------------------------
# What trains, and at which rate

def side_of(name):
    """The part of the model that the parameter called `name` belongs to: image, text or head."""
    if name.startswith((*HEADS, "logit_")):
        return "head"
    return "image" if name.startswith("visual.") else "text"


def freeze(model, names):
    """Freeze the parameters that --freeze names: image, text, or how a name begins. The heads stay
    trainable. UserError if a name matches none."""
    parameters = dict(model.named_parameters())
    for wanted in names:
        hit = [p for name, p in parameters.items() if side_of(name) != "head" and (
            side_of(name) == wanted or name.startswith(wanted))]
        if not hit:
            known = ", ".join(sorted({name.partition(".")[0] for name in parameters
                                      if side_of(name) != "head"}))
            raise UserError(f"--freeze {wanted} matches no parameter; expected image, text, or how "
                            f"a name begins: {known}")
        for p in hit:
            p.requires_grad_(False)


def parameter_groups(model, args):
    """Trainable parameters by learning rate and weight decay -> list of dicts for AdamW. As in the
    paper, gains and biases do not decay (here: every vector and scalar); all else does."""
    rates = {"image": args.image_lr or args.lr, "text": args.text_lr or args.lr, "head": args.lr}
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            side = side_of(name)
            decay = args.wd if side == "head" or args.tower_wd is None else args.tower_wd
            groups.setdefault((rates[side], decay if p.ndim > 1 else 0.0), []).append(p)
    return [{"params": some, "lr": lr, "base_lr": lr, "weight_decay": wd}
            for (lr, wd), some in groups.items()]


def rate(step, steps, warmup, schedule):
    """Factor in [0, 1] on the learning rates of a step (from 0): linear warm-up, then cosine or
    linear towards 0, or constant."""
    if step < warmup:
        return (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    return {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share,
            "constant": 1.0}[schedule]


# -----------------------------------------------------------------------------
# Evaluation

def evaluate(run, model, pairs, data, args):
    """Retrieval both ways, and InfoNCE (whatever --loss is), of held-out pairs -> dict of floats.
    Changes no module's mode."""
    image, text, relevant = embed(run, model, pairs, data.tokenizer, workers=args.workers,
                                  max_text=args.max_text, pooled=data.pooled.get(pairs.split))
    scores = {**recall_at_k(image, text, relevant), "images": len(image), "captions": len(text)}
    # relevant (R, 2): numbers of a text and of its image. The loss takes an image's first text.
    first = torch.full((len(image),), len(text))  # stays so where an image has no caption
    first.scatter_reduce_(0, relevant[:, 1], relevant[:, 0], "amin")
    has_caption = first < len(text)
    image, text = image[has_caption], text[first[has_caption]]
    loss, scale = 0.0, model.logit_scale.detach().exp().cpu()
    for some, captions in zip(image.split(64), text.split(64)):
        z, labels = scale * some @ captions.T, torch.arange(len(some))
        loss += len(some) * float(F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)) / 2
    return {**scores, "loss": loss / len(image)}


def log_scores(run, step, split, scores):
    run.log(step, split, **{name: x for name, x in scores.items() if name not in QUIET})


# -----------------------------------------------------------------------------
# The loop

def in_one_piece(run, args):
    """Whether a whole batch is encoded at once, so that BatchNorm can take its statistics."""
    return run.world_size == 1 and not 0 < args.micro_batch < args.batch_size


def train(run, model, data, stored, args):
    """Train `model` in place; data: see `Data`; stored: a checkpoint to go on from, or None."""
    counts, whole_batch = data.loader.batch_sampler.counts, in_one_piece(run, args)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    kept, buffers = kept_state(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, args), betas=(0.9, args.beta2),
                                  eps=args.eps, fused=run.fused_optimizer)
    scaler = run.scaler()
    at = run.load_training(stored, kept, optimizer, scaler, buffers)
    norms = training_mode(model, statistics=whole_batch)
    if norms and not whole_batch:
        run.say("BatchNorm statistics are frozen: the batch is split over pieces or processes")
        if any(norm.track_running_stats and (norm.running_var == 1).all() for norm in norms):
            run.say("WARNING: BatchNorm was never trained and normalises nothing. Use trained "
                    "weights (--image-tower resnet50:IMAGENET1K_V2), or --micro-batch 0 in one "
                    "process")
    at.steps = min(args.epochs * len(data.loader), args.max_steps or math.inf,
                   2 if args.dry_run else math.inf)
    warmup = round(args.warmup if args.warmup >= 1 else args.warmup * at.steps)
    if warmup >= at.steps:
        run.say(f"note: {at.steps} steps never leave the warm-up of {warmup}")
    card = weights.card(model, data.tokenizer)
    best = stored["best"] if stored else -1.0
    # asked: numbers of the captions planned; used: of those read, which differ at a broken image.
    for images, used, asked in run.batches(data.loader, at):
        # ---- one step ------------------------------------------------------------------
        factor = rate(at.step, at.steps, warmup, args.schedule)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        optimizer.zero_grad(set_to_none=True)
        losses = add_gradient(run, model, images, data.tokens[used], data.ids[used], counts, args,
                              scaler, args.seed * 1_000_003 + at.step)
        run.sum_gradients(trainable.values())
        run.update(optimizer, trainable.values(), scaler, args.grad_clip, loss=losses["loss"])
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(MAX_SCALE))
        # --------------------------------------------------------------------------------
        due = run.tick(at, losses, samples=args.batch_size, ln_batch=math.log(args.batch_size),
                       describe=functools.partial(data.train.describe, used),
                       replaced=data.train.replaced(used, asked),
                       scale=model.logit_scale.detach().exp(), lr=args.lr * factor)  # `at` moves on
        if data.val and (at.batch == 0 or at.step == at.steps):  # an epoch has just ended, or all
            scores = evaluate(run, model, data.val, data, args)
            log_scores(run, at.step, "val", scores)
            if scores["mean_recall"] > best:
                best = scores["mean_recall"]
                run.save_training(at, kept, None, None, buffers, "checkpoint_best.pt",
                                  card=card, best=best)
        if due:
            run.save_training(at, kept, optimizer, scaler, buffers, card=card, best=best)
    return at


def kept_state(model):
    """What a checkpoint holds of the model -> parameters and buffers, {name: tensor} each."""
    return weights.kept_tensors(model), {
        name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


# -----------------------------------------------------------------------------
# Opening data and model

def open_model(args):
    """The CLIP that the flags ask for, on the CPU, with what --freeze says frozen."""
    if not args.model and args.weights in ("auto", "none"):
        args.model = "tiny" if args.data == "demo" else "ViT-B/32"
    model = weights.open_clip(args)
    if args.squash:
        model.image_resize = "squash"
    if args.loss == "siglip" and model.logit_bias is None:
        model.logit_bias = nn.Parameter(torch.tensor(-10.0))
        nn.init.constant_(model.logit_scale, math.log(10))
        model.origin["notes"].append("siglip starts with scale 10 and bias -10 (Zhai et al.)")
    freeze(model, args.freeze)
    if args.export:
        weights.check_layout(model, args.export)
    return model


@dataclasses.dataclass
class Data:
    """What a run reads."""
    train: PairSet
    val: PairSet | None
    test: PairSet | None
    labelled: ImageSet | None            # of --zero-shot
    tokenizer: object
    pooled: dict = dataclasses.field(default_factory=dict)  # split -> features kept of its images
    loader: object = None                # of the training pairs
    tokens: torch.Tensor | None = None   # (M, L) of all their captions
    ids: torch.Tensor | None = None      # (M, 2), see pairs.identities


def open_data(run, model, tokenizer, splits, args):
    """The pairs of `open_splits`, and the images of --zero-shot, checked -> Data."""
    plain, labelled = Preprocess.of(model), None
    crop = Preprocess.of(model, train=True, seed=args.seed, flip=False, scale=(args.crop, 1.0))
    train, val, test = splits
    train = train.with_transform(crop if args.crop else plain)
    val, test = (pairs and pairs.with_transform(plain) for pairs in (val, test))
    if val and (not test or test.paths == val.paths):
        test = val
        train.notes.append("NOTE: there are no test pairs, so the best epoch is chosen and scored "
                           "on the same val images, which flatters")
    for held_out in dict.fromkeys(filter(None, (not args.eval_only and val, test))):
        train.notes += held_out.retrieval().notes
    if args.zero_shot:
        source = dict(name_or_path=args.zero_shot, split="test", data_dir=args.data_dir, whole=True)
        run.on_first(lambda: len(open_dataset(**source)))  # fetches it, if that is needed
        labelled = open_dataset(**source, download=False).with_transform(plain)
        labelled.check_files()
        require_words(labelled)
    return Data(train, val, test, labelled, tokenizer)


def prepare(run, model, data, folder, args):
    """Set data.loader, tokens and ids; keep a frozen image tower's features, or decoded images."""
    training = not args.eval_only and not args.check_grad
    cache = (folder if args.output_dir else folder.parent) / "cache"  # runs share the latter
    options, train = run.loader_options(args.workers), data.train
    frozen = not any(p.requires_grad for name, p in model.named_parameters()
                     if side_of(name) == "image")
    splits = dict.fromkeys(filter(None, (train, data.val, data.test)))  # each once, in order
    run.say(*model.origin["notes"], *(note for pairs in splits for note in pairs.notes))
    if training and frozen and not args.crop:
        tower = weights.digest(model, "image", head=False)
        data.pooled = {pairs.split: frozen_features(run, model, pairs, cache, tower,
                                                    workers=args.workers) for pairs in splits}
    elif training:
        options = decode_once(run, splits, cache, args)
        if frozen:
            run.say("note: with --crop 0 the features of the frozen image tower would be computed "
                    "only once")
    if args.eval_only:
        return
    data.loader = make_pair_loader(train, args.batch_size, args.seed, args.captions, run.rank,
                                   run.world_size, **options)
    if data.pooled:
        data.loader = FeatureLoader(data.loader, data.pooled["train"])
    data.tokens = data.tokenizer(train.captions, context_length=args.max_text)
    data.ids = identities(train)
    run.say(f"{len(data.loader)} steps an epoch of {args.batch_size} pairs, ln B "
            f"{math.log(args.batch_size):.3f}, lr {args.lr:g}; {data.tokenizer.truncated} captions "
            f"cut to {args.max_text} tokens, {len(data.ids) - len(data.ids[:, 1].unique())} repeat "
            f"another")


# -----------------------------------------------------------------------------
# A run

def report(run, model, data, folder, at, tested, args):
    """Score the weights of step `tested`, export them, write and return what the run found."""
    scores = evaluate(run, model, data.test, data, args) if data.test else {}
    if data.labelled:
        scores["zero_shot_accuracy"] = zero_shot(run, model, data.labelled, data.tokenizer, None,
                                                 args)["accuracy"]
    if scores:
        log_scores(run, tested, "test", scores)
    if args.export:
        export(run, model, data.tokenizer, folder, args)
    trainable = [p for p in model.parameters() if p.requires_grad]
    results = run.finish({
        "method": "contrastive", "data": data.train.name, "model": model.origin["name"], **scores,
        "scale": float(model.logit_scale.detach().exp()), "steps": at.step, "tested_step": tested,
        "epochs": at.epoch, "batch_size": args.batch_size,
        "trainable_parameters": sum(p.numel() for p in trainable),
        "trainable_tensors": len(trainable), "dry_run": args.dry_run})
    speed = f"{results['samples_per_second']:.4g} pairs/s"
    if not args.eval_only:
        run.say("dry run, no result; " * args.dry_run + speed)
    return results


def export(run, model, tokenizer, folder, args):
    to = folder / "export"
    path = run.on_first(lambda: str(weights.export(model, to, args.export, tokenizer)))
    run.say(f"wrote {path}")


def restore_best(run, model, stored=None):
    """Give the model the weights of checkpoint_best.pt in the run's folder, else of `stored`, which
    `Run.begin` found (--eval-only) -> that checkpoint, or None."""
    if best := (run.load("checkpoint_best.pt") or stored):
        run.restore(best, *kept_state(model))
    return best


def main(args):
    """Train (or score) one model -> the results."""
    run = start(args.device, args.precision, args.seed, args.deterministic)
    splits = open_splits(args)  # before weights are fetched
    model = open_model(args)
    tokenizer = for_model(model, args.tokenizer)
    args.max_text = min(args.max_text, model.config.context_length)
    data = open_data(run, model, tokenizer, splits, args)
    if not args.eval_only:  # refuses a batch that is larger than the data
        PairBatches(data.train, args.batch_size, captions=args.captions)
    folder = run_folder(args, "train_contrastive", f"{data.train.name}_{model.origin['name']}")
    words = hashlib.sha256(json.dumps(tokenizer.facts(), sort_keys=True).encode()).hexdigest()
    identity = run_identity(args, but=("preset", "tokenizer", "check_grad"),
                            method="contrastive", data=data.train.fingerprint,
                            model=model.origin["name"], weights=model.origin["sha256"],
                            vocabulary=words[:16])
    if training_mode(model) and not in_one_piece(run, args):
        identity["statistics"] = "of BatchNorm, frozen"
    model.eval()
    stored = finished = None
    if not args.check_grad:
        stored, finished = run.begin(folder, args, identity)
    if args.eval_only and not stored and not model.origin["sha256"]:
        raise UserError(f"--eval-only finds no checkpoint in {folder} and --weights gives no "
                        f"weights; name the run with --output-dir, or the weights")
    if finished:
        if args.export:
            if not restore_best(run, model, stored):
                raise UserError(f"--export finds no checkpoint in {folder}")
            export(run, model, tokenizer, folder, args)
        return finished
    model = run.move(model).fuse_attention(run.fused_attention)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    run.say(f"{model.origin['name']}: {sum(n for n, trains in sizes if trains):,} of "
            f"{sum(n for n, _ in sizes):,} weights train")
    prepare(run, model, data, folder, args)
    if args.check_grad:
        images, used, _ = next(iter(data.loader))
        return check_grad(run, model, (images, data.tokens[used], data.ids[used]),
                          data.loader.batch_sampler.counts, args)
    if args.eval_only:
        best = restore_best(run, model, stored)
        at = Place(best["epoch"], best["batch"], best["step"]) if best else Place()
        return report(run, model, data, folder, at, at.step, args)
    at = train(run, model, data, stored, args)
    step = at.step
    if best := restore_best(run, model):
        step = best["step"]
        run.say(f"testing the weights of step {step}, the best mean recall on val")
    return report(run, model, data, folder, at, step, args)


# -----------------------------------------------------------------------------
# The command line

# What a preset sets where the command line does not. clip-roberta and simple-clip are two public
# projects' recipes: Hugging Face's run_clip.py on COCO, and ResNet50 + DistilBERT on Flickr. The
# latter lowers lr when the loss stalls; here it stays constant.
DEFAULTS = {  # clip-scratch: the paper's, but epochs, batch, warm-up and crop suit smaller data
    "loss": "infonce", "margin": 0.2, "epochs": 30, "batch_size": 256, "lr": 5e-4, "wd": 0.2,
    "warmup": 0.1, "schedule": "cosine", "beta2": 0.98, "eps": 1e-6, "grad_clip": 0.0, "seed": 1,
    "captions": "one", "crop": 0.6, "embed_dim": 512, "proj": "linear", "weights": "none",
    "tower_wd": None, "squash": False, "freeze": []}
PRESETS = {
    "clip-scratch": {},
    "clip-finetune": {"lr": 1e-5, "wd": 0.1, "epochs": 5, "grad_clip": 1.0, "weights": "auto",
                      "beta2": 0.999, "eps": 1e-8},
    "clip-roberta": {"lr": 5e-5, "wd": 0.1, "warmup": 0.0, "schedule": "linear", "epochs": 3,
                     "batch_size": 64, "beta2": 0.999, "eps": 1e-8, "grad_clip": 1.0, "seed": 42,
                     "captions": "all", "crop": 0.0},
    "simple-clip": {"loss": "infonce+triplet", "image_lr": 1e-4, "text_lr": 1e-5, "lr": 1e-3,
                    "wd": 1e-3, "tower_wd": 0.0, "warmup": 0.0, "crop": 0.0, "batch_size": 32,
                    "schedule": "constant", "beta2": 0.999, "eps": 1e-8, "captions": "all",
                    "squash": True, "embed_dim": 256, "proj": "mlp"}}
DEMO = {"epochs": 6, "batch_size": 128, "lr": 3e-4, "crop": 0.9, "weights": "auto",
        "zero_shot": "demo", "freeze": ["token_embedding"]}  # frozen, so that checkpoints are small
ALIASES = {  # of run_clip.py and its port to Ascend
    "--data-path": "--data", "--model-name-or-path": "--weights", "--model-path": "--weights",
    "--num-train-epochs": "--epochs", "--learning-rate": "--lr", "--weight-decay": "--wd",
    "--warmup-steps": "--warmup", "--overwrite-output-dir": "--overwrite"}
PIECES = "the batch is always exact; --micro-batch says how many pairs are encoded at a time"
REFUSED = {
    "--do-train": "a run trains without --eval-only", "--do-eval": "each epoch is scored",
    "--fp16": "use --precision fp16", "--fp16-opt-level": "use --precision",
    "--loss-scale": "it is automatic; use --precision fp16",
    "--preprocessing-num-workers": "captions are tokenized at once; --workers read images",
    "--optim": "it is always AdamW; see --lr, --wd",
    "--use-combine-grad": "gradients are always combined",
    "--remove-unused-columns": "see --image-column and --caption-column",
    "--dataset-name": "name a folder with --data", "--dataset-config-name": "see --data",
    "--train-file": "use --data FILE, with a column named split",
    "--validation-file": "use --data FILE, with a column named split",
    "--dataloader-drop-last": "batches are always full",
    "--per-device-train-batch-size": "use --batch-size, of all processes together",
    "--per-device-eval-batch-size": "scores do not depend on it",
    "--accum-freq": PIECES, "--gradient-accumulation-steps": PIECES}


def get_args(argv=None):
    """The command line as a namespace. Exits with code 2 and one line on a wrong one."""
    parser = Parser(description="CLIP training on image-caption pairs, any batch exact.",
                    epilog="example: python train_contrastive.py --data flickr8k --batch-size 1024",
                    aliases=ALIASES, refused=REFUSED)
    add_pair_flags(parser)
    weights.add_model_flags(parser, towers=True)
    add = parser.add_argument_group("method").add_argument
    add("--preset", choices=list(PRESETS), help="defaults for what follows (default: clip-scratch, "
        "or clip-finetune where --weights are given)")
    add("--loss", choices=("infonce", "siglip", "triplet", "infonce+triplet"),
        help="what is minimised (default: infonce)")
    add("--positives", choices=("diag", "mask", "multi"), default="mask", help="pairs sharing an "
        "image or caption are negatives (diag), left out (mask, the default) or positives (multi)")
    add("--triplet", choices=("sum", "hardest", "semi-hard"), default="hardest",
        help="the negatives of its hinge (default: hardest)")
    add("--triplet-weight", type=number(), help="default: 0.1 beside infonce, else 1")
    add("--margin", type=number(), help="of the triplet loss (default: 0.2)")
    add("--freeze", nargs="+", metavar="NAME", help="image, text, or how the names of "
        "parameters begin; the heads stay trainable")
    add("--crop", type=number(0, 1), help="smallest share of an image that a training crop keeps; "
        "0: no augmentation (default: 0.6)")
    add("--max-text", type=whole(3), default=77, help="tokens of a text (default: 77)")
    add("--epochs", type=whole(1), help="default: 30, or the preset's")
    add("--max-steps", type=whole(0), default=0, help="total steps, if fewer than the "
        "epochs'; the schedule ends there")
    add("--batch-size", type=whole(2), help="pairs in a step (default: 256, or the preset's)")
    add("--micro-batch", type=whole(0), default=64, help="pairs encoded at a time per process; the "
        "gradient stays the batch's (default: 64; 0: all)")
    add("--lr", type=number(0, 1e3, above=True), help="default: 5e-4, or the preset's")
    add("--image-lr", type=number(0, 1e3, above=True), help="of the image tower (default: --lr)")
    add("--text-lr", type=number(0, 1e3, above=True), help="of the text tower (default: --lr)")
    add("--wd", type=number(), help="weight decay (default: 0.2, or the preset's)")
    add("--warmup", type=number(), help="steps, or a share below 1 (default: 0.1, or the preset's)")
    add("--grad-clip", type=number(), help="largest norm (default: 0, none)")
    add("--zero-shot", metavar="DATA", help="at the end also classify this labelled data set; "
        "for a finished run: with --eval-only")
    add("--check-grad", action="store_true", help="compare the gradient of a step in pieces with "
        "that in one piece, and stop")
    add_run_flags(parser)
    parser.set_defaults(**dict.fromkeys(DEFAULTS))
    args = parser.parse_args(argv)
    if args.check_grad and args.eval_only:
        parser.error("--check-grad takes a training step, and --eval-only takes none")
    demo = args.data == "demo" and args.model in (None, "tiny") and not (
        args.preset or args.weights or args.image_tower or args.text_tower)
    args.preset = args.preset or (
        "clip-scratch" if args.weights in (None, "none") else "clip-finetune")
    for name, value in {**DEFAULTS, **(DEMO if demo else PRESETS[args.preset])}.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.triplet_weight is None:
        args.triplet_weight = 1.0 if args.loss == "triplet" else 0.1
    return args


if __name__ == "__main__":
    sys.exit(guard(main, get_args))
