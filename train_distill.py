"""Distillation: a phone-size CLIP learns from large ones.

The student is a small image tower beside the teacher's own text tower, which stays frozen, so that
every caption is encoded once. Of a batch of N pairs, with unit rows u, v of the student and p, q of
a teacher, scales s and t (`exp(logit_scale)`), s' a scale of ICL's own, and CE(T, z) the mean over
rows of the cross-entropy of softmax(z) to targets T (I: the target of row i is column i):

    task  1/2 CE(I, s u v^T) + 1/2 CE(I, s v u^T)                 InfoNCE, Radford et al. 2021
    crd   the same to T = 1/K sum_k softmax(t_k p_k q_k^T), and   MobileCLIP, Vasu et al. 2024 §3.1;
          to T' = 1/K sum_k softmax(t_k q_k p_k^T)                CRD in CLIP-KD, Yang et al. 2024
    fd    mean of 1 - cos(u, p), plus mean of 1 - cos(v, q)       FD in CLIP-KD
    icl   1/2 CE(I, s' u q^T) + 1/2 CE(I, s' v p^T)               ICL in CLIP-KD
    loss = 0.25 task + 1 crd + 8 fd   (+ 1 icl when a text tower is trained)

The pairs weigh less: captions are noisy, and the teacher knows it. Off unless asked for: --hint and
--attention compare maps inside the image towers; --ema scores a moving average of the student, and
--ema-teacher W adds W * crd against it; --text-teacher, a BERT, softens the targets of the task.

    python train_distill.py                                   the demo on a CPU, under a minute
    python train_distill.py --task 1 --crd 0 --fd 0           its student, taught by the pairs alone
    python train_distill.py --teacher ViT-B/16 --data flickr8k --data-dir DIR
    python -m tools.reinforce --teacher ViT-B/16 --data flickr8k --data-dir DIR --output stored
    python train_distill.py --reinforced stored --data flickr8k --data-dir DIR
    torchrun --standalone --nproc-per-node 8 train_distill.py --teacher ViT-L/14 \
        --data shards/{000..127}.tar --model mobilenet_v3_small:IMAGENET1K_V1

A stored teacher was asked once about a few random views of every image (Faghri et al. 2023): a step
is then the small tower alone. `--batch-size` is what is compared, over all processes, and
`--micro-batch` what is encoded at a time, with the gradient of the whole batch (Gao et al. 2021);
only BatchNorm takes the statistics of each piece.

Different from the released codes, with the reason:
- teachers are averaged after each softmax, rows and columns apart; MobileCLIP's code transposes the
  averaged softmax unless --local-loss, and its rows then do not sum to 1;
- FD is 1 - cos. CLIP-KD's 2000 * MSE is 4000/D of that: 8 at D = 512, but 63 at D = 64;
- ICL's own scale is exp(.), at most 100; CLIP-KD's is used as it is, a temperature of 0.4;
- with a frozen text tower ICL repeats the task and FD of texts is constant: both are off;
- under Mixup and CutMix the teacher sees the mixed images; a stored one's embeddings are mixed.

Logged: loss, its terms without their weights, scale, lr. Results: retrieval of the student and of
a live teacher on held-out pairs (%), zero_shot_..., parameters and latency (ms) of image towers.
"""
import copy
import functools
import hashlib
import json
import math
import pathlib
import random
import sys
import time
import types
import typing

from device import (add_run_flags, guard, number, Parser, Place, run_folder, run_identity, start,
                    UserError, whole)  # before torch, which reads what it sets
import torch
import torch.nn.functional as F
from torch import nn

import weights
from clip_model import canonical_name, evaluating, text_pieces, unit, VisionTransformer
from data import open_dataset, require_words
from images import normalise, Preprocess, sample_seed
from large_batch import by_rows, TwoPass
from pairs import add_pair_flags, make_pair_loader, open_pairs, PairBatches
from scores import embed, encode_texts, recall_at_k, zero_shot
from teachers import ask_texts, look_of, open_teachers, ShownPairs, Stored, Views
from tokenizer import for_model

TERMS = ("task", "crd", "fd", "icl", "ema", "hint", "attention")
RECALLS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "mean_recall")


# -----------------------------------------------------------------------------
# The losses. Each is this process's part: its rows against the columns of all processes; the sum
# over processes is the loss of the batch.

class Pairs(typing.NamedTuple):
    """What one model says of the batch's N pairs: unit rows, whose cosines its scale multiplies."""
    scale: torch.Tensor | float
    image: torch.Tensor       # (n, D), this process's
    text: torch.Tensor
    images: torch.Tensor      # (N, D), of all processes in rank order
    texts: torch.Tensor


def info_nce(ours, theirs, at, partner, share=1.0):
    """Images of `ours` against texts of `theirs`, texts against images: the task with itself, ICL
    with a teacher. Column at[i] is right for row i, or `share` right and the rest partner[i]."""
    def loss(rows, at, partner, columns, scale):
        logits = (scale * rows) @ columns.T                                    # (m, N)
        return (share * F.cross_entropy(logits, at, reduction="sum")
                + (1 - share) * F.cross_entropy(logits, partner, reduction="sum"))
    images = by_rows(loss, (ours.image, at, partner), (theirs.texts, ours.scale))
    texts = by_rows(loss, (ours.text, at, partner), (theirs.images, ours.scale))
    return (images + texts) / (2 * len(ours.images))


def crd(ours, told):
    """Cross-entropy to the softmaxes of K teachers, averaged afterwards: KL plus a constant."""
    K = len(told)

    def loss(rows, *more):
        asked, columns, scale, keys = more[:K], more[K], more[K + 1], more[K + 2:]
        targets = sum((theirs.scale * p @ q.T).softmax(dim=1)
                      for theirs, p, q in zip(told, asked, keys)) / K          # (m, N)
        return F.cross_entropy((scale * rows) @ columns.T, targets, reduction="sum")
    images = by_rows(loss, (ours.image, *(theirs.image for theirs in told)),
                     (ours.texts, ours.scale, *(theirs.texts for theirs in told)))
    texts = by_rows(loss, (ours.text, *(theirs.text for theirs in told)),
                    (ours.images, ours.scale, *(theirs.images for theirs in told)))
    return (images + texts) / (2 * len(ours.images))


def fd(rows, goals, N):
    """1 - cos is half the squared distance of unit vectors, whatever their number D of numbers."""
    return (1 - F.cosine_similarity(rows, goals, dim=1)).sum() / N


# -----------------------------------------------------------------------------
# Mixing

class Mix(typing.NamedTuple):
    """Mixup or CutMix of a whole batch: one share, one box, so that targets stay distributions."""
    share: float = 1.0        # of an image itself; the rest is its partner's
    box: tuple | None = None  # CutMix: top, left, bottom, right, each from 0 to 1

    def partners(self, n):
        """Pairs half of this process's share apart mix, n even, which are half the batch apart."""
        return (torch.arange(n) + n // 2) % n

    def blend(self, x):
        """Unit rows (n, D) of the images before mixing -> what stands for the mixed ones."""
        return unit(x.lerp(x[self.partners(len(x)).to(x.device)], 1 - self.share))

    def show(self, images, rows, model):
        """Rows of uint8 images (n, 3, S, S), mixed -> as `model` takes them."""
        own = images[rows]
        if self.share < 1:
            other = images[self.partners(len(images)).to(images.device)[rows]].float()
            own = own.float()
            if self.box is None:
                own = torch.lerp(other, own, self.share)
            else:
                top, left, bottom, right = (round(edge * own.shape[-1]) for edge in self.box)
                own[..., top:bottom, left:right] = other[..., top:bottom, left:right]
        return normalise(own, model.image_mean, model.image_std)


def draw_mix(args, step, size):
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) of a step, by the seed alone."""
    draw = random.Random(sample_seed(args.seed, 2, step))
    if not args.mixup + args.cutmix:
        return Mix()
    if args.mixup and (not args.cutmix or draw.random() < 0.5):
        return Mix(draw.betavariate(args.mixup, args.mixup))
    half = math.sqrt(1 - draw.betavariate(args.cutmix, args.cutmix)) / 2
    y, x = draw.random(), draw.random()
    top, left, bottom, right = (round(size * min(1, max(0, edge))) / size
                                for edge in (y - half, x - half, y + half, x + half))
    return Mix(1 - (bottom - top) * (right - left), (top, left, bottom, right))  # pixels that stay


# -----------------------------------------------------------------------------
# Maps inside the image towers

class Maps:
    """The student's last map of features against that of the first teacher, a ViT, both averaged
    down to the coarser of their grids, P places; forward hooks keep what passes. Means over images:

        hint       1 - cos(1 x 1 convolution of the map, LayerNorm of the teacher's), mean over P;
                   FitNets, Romero et al. 2015
        attention  KL(a' || a): a the energy sum_c map^2 of a place over that of all (Zagoruyko and
                   Komodakis 2017), a' how the class token attends in the teacher's last block

    A ViT's map is what its last block gets. The class token itself is left out of both."""

    def __init__(self, student, teacher):
        if not isinstance(teacher.visual, VisionTransformer):
            raise UserError("--hint and --attention need a ViT as the first teacher")
        self.caught, self.last = {}, teacher.visual.transformer.resblocks[-1]
        self.last.ln_1.register_forward_hook(functools.partial(self.keep, "normed"))
        for who, model in (("teacher", teacher), ("student", student)):
            keep = functools.partial(self.keep, who)
            if isinstance(model.visual, VisionTransformer):
                model.visual.transformer.resblocks[-1].register_forward_pre_hook(keep)
            else:  # the last of its modules whose output is a map stays
                for module in model.visual.modules():
                    module.register_forward_hook(keep)
            with torch.no_grad(), evaluating(model):
                side = model.config.image_size
                model.encode_image(model.logit_scale.new_zeros(1, 3, side, side))
        if "student" not in self.caught:
            raise UserError("--hint and --attention find no map inside the student's image tower")
        self.channels = [as_map(self.caught[who]).shape[1] for who in ("student", "teacher")]

    def keep(self, who, module, inputs, output=None):
        if output is None or who == "normed":
            self.caught[who] = inputs[0] if output is None else output
        elif torch.is_tensor(output) and output.ndim == 4 and as_map(output).shape[-1] > 1:
            self.caught[who] = output

    def attended(self, side):                                          # (n, P), a row's sum is 1
        weight, bias = self.last.attn.in_proj_weight, self.last.attn.in_proj_bias
        x = F.linear(self.caught["normed"].to(weight.dtype), weight, bias)
        q, k, _ = x.unflatten(2, (3, self.last.attn.heads, -1)).permute(2, 0, 3, 1, 4)
        found = (q[:, :, :1] @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1).float()
        found = F.adaptive_avg_pool2d(as_map(found.mean(dim=1).mT), side).flatten(1)
        return found / found.sum(dim=1, keepdim=True)

    def losses(self, adapter):
        """When both towers have seen the same images -> {"hint", "attention"}, sums over them."""
        ours, goal = (as_map(self.caught[who]).float() for who in ("student", "teacher"))
        side = min(ours.shape[-1], goal.shape[-1])
        ours, goal = F.adaptive_avg_pool2d(ours, side), F.adaptive_avg_pool2d(goal, side)
        energy = ours.square().sum(dim=1).flatten(1) + 1e-12           # (n, P)
        energy = (energy / energy.sum(dim=1, keepdim=True)).log()
        goal = F.layer_norm(goal.movedim(1, -1), goal.shape[1:2])      # (n, side, side, C')
        hint = 1 - F.cosine_similarity(adapter(ours).movedim(1, -1), goal, dim=-1)
        return {"hint": hint.mean(dim=(1, 2)).sum(),
                "attention": F.kl_div(energy, self.attended(side), reduction="sum")}


def as_map(x):
    """(n, C, h, w) of a map, of one with channels last, or of a ViT's tokens (n, 1 + G^2, C)."""
    if x.ndim == 3:
        return x[:, 1:].mT.unflatten(2, (math.isqrt(x.shape[1] - 1), -1))
    return x.movedim(3, 1) if x.shape[1] == x.shape[2] != x.shape[3] else x


# -----------------------------------------------------------------------------
# One exact step

class Heads(nn.Module):
    """What the losses learn and the student does not keep: a linear map to each teacher's width
    where it differs, ICL's scale, and the hint's convolution."""

    def __init__(self, dim, dims, channels=None):
        super().__init__()
        self.image, self.text = (nn.ModuleList(
            nn.Identity() if d == dim else nn.Linear(dim, d) for d in dims) for _ in range(2))
        self.icl_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.hint = nn.Conv2d(*channels, 1) if channels else None


def objective(ours, labels, told, heads, weight, other=None, average=None):
    """The terms on embeddings that have a weight -> {name: this process's part}. labels: the last
    arguments of info_nce; told: K teachers; other: the text teacher; average: of the student."""
    N, trains, terms = len(ours.images), ours.text.requires_grad, {}
    if weight["task"]:
        terms["task"] = info_nce(ours, ours, *labels)
        if other:  # whose similarities soften the targets
            terms["task"] = terms["task"].lerp(crd(ours, [other]), weight["other"])
    if weight["crd"]:
        terms["crd"] = crd(ours, told)
    if weight["ema"]:
        terms["ema"] = crd(ours, [average])
    images = [head(ours.image) for head in heads.image]  # as wide as each teacher's
    texts = [head(ours.text) for head in heads.text]
    if weight["fd"]:
        near = sum(fd(u, theirs.image, N) for u, theirs in zip(images, told))
        if trains:
            near = near + sum(fd(v, theirs.text, N) for v, theirs in zip(texts, told))
        terms["fd"] = near / len(told)
    if weight["icl"]:
        scale = heads.icl_scale.exp()
        terms["icl"] = sum(
            info_nce(Pairs(scale, unit(u), unit(v), *ours[3:]), theirs, *labels)
            for u, v, theirs in zip(images, texts, told)) / len(told)
    return terms


class Batch(typing.NamedTuple):
    """This process's n pairs."""
    images: dict                   # uint8 (n, 3, S, S) for each way to look, see Views
    tokens: torch.Tensor | None    # (n, L), on the host, for a text tower that trains
    text: torch.Tensor | None      # (n, D) of one that is frozen
    keys: list                     # K of (n, D_k), the teachers' text embeddings
    stored: list | None            # K of (n, D_k), their image embeddings if none of them runs
    other: torch.Tensor | None     # (n, D') of the text teacher


def step(run, learner, teachers, maps, batch, counts, mix, weight, micro, seed):
    """Add this process's part of the batch's gradient to `.grad` -> its part of {"loss", terms}.
    counts: pairs of each process; weight: of the terms; micro: pairs in a piece; seed: of dropout,
    another one for every step."""
    student, n, first = learner.student, counts[run.rank], sum(counts[:run.rank])
    pieces = [slice(i, min(n, i + micro)) for i in range(0, n, micro)]
    at = first + torch.arange(n, device=run.device)
    labels = at, first + mix.partners(n).to(run.device), mix.share

    def encoder(model):
        pixels = batch.images[look_of(model)]
        return lambda rows: model.encode_image(mix.show(pixels, rows, model), True)

    @torch.no_grad()
    def ask(encode, pieces):
        with run.autocast():
            return torch.cat([encode(piece) for piece in pieces])

    def both(scale, image, text):
        return Pairs(scale, image, text, run.gather(image, counts), run.gather(text, counts))

    # ---- encode -------------------------------------------------------------------
    said = [mix.blend(p) for p in batch.stored or ()]                          # K of (n, D_k)
    taught = sum(weight[name] for name in ("crd", "fd", "icl", "hint", "attention"))
    if batch.stored is None and taught:
        said = [ask(encoder(teacher.model), pieces) for teacher in teachers]
    image = TwoPass(run, encoder(student), pieces, 2 * seed, student.visual)
    text, v = None, batch.text                                                 # v (n, D)
    if batch.tokens is not None:
        parts, places = text_pieces(batch.tokens, micro, student.text_pad)
        parts, places = [run.move(*part) for part in parts], run.move(places)

        def encode_text(part, model=student):
            return model.encode_text(part[0], True, part[1])
        text = TwoPass(run, encode_text, parts, 2 * seed + 1, student)
        v = text.features[places]

    # ---- the loss, in fp32 over all processes -------------------------------------
    ours, average = both(student.logit_scale.exp(), image.features, v), None
    told = [both(teacher.scale, p, q) for teacher, p, q in zip(teachers, said, batch.keys)]
    other = batch.other is not None and both(10.0, mix.blend(batch.other), batch.other)
    if weight["ema"]:
        model = learner.average.model
        q = v if text is None else ask(functools.partial(encode_text, model=model), parts)[places]
        average = both(model.logit_scale.exp(), ask(encoder(model), pieces), q)
    terms = objective(ours, labels, told, learner.heads, weight, other, average)
    inside = {name: x / sum(counts) for name, x in maps.losses(learner.heads.hint).items()
              } if maps else {}
    loss = sum(weight[name] * x for name, x in terms.items())
    more = sum(weight[name] * x for name, x in inside.items())
    # -------------------------------------------------------------------------------

    if terms:
        learner.scaler.scale(loss).backward()  # as far as the features, which are leaves
    if text:
        text.backward()
    image.backward(also=learner.scaler.scale(more) if maps else None)
    return {"loss": loss + more, **terms, **inside}


# -----------------------------------------------------------------------------
# What trains, and at which rate

class Average:
    """Moving average of what trains: update n = 0, 1, ... keeps min(decay, (1 + n) / (10 + n)) of
    it. Frozen tensors are the model's own; integers are copied."""

    def __init__(self, model, decay):
        self.decay, self.updates = decay, torch.zeros((), device=model.logit_scale.device)
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self.model = copy.deepcopy(model, {id(p): p for p in frozen.values()}).eval()
        theirs = model.state_dict()
        self.pairs = {name: (x, theirs[name]) for name, x in self.model.requires_grad_(False)
                      .state_dict().items() if name not in frozen}

    @torch.no_grad()
    def update(self, fine):
        """fine: bool (), whether the step counts; nobody waits to know."""
        kept = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        for mine, theirs in self.pairs.values():
            if mine.is_floating_point():
                mine.lerp_(theirs, ((1 - kept) * fine).to(mine.dtype))
            else:
                mine.copy_(theirs)
        self.updates += fine


class Learner:
    """Everything that training changes, and how it is kept."""

    def __init__(self, run, student, heads, average, args):
        self.run, self.student, self.heads, self.average = run, student, heads, average
        self.tested = average.model if average else student
        self.parameters = [p for module in (student, heads) for p in module.parameters()
                           if p.requires_grad]
        groups = [{"params": [p for p in self.parameters if (p.ndim > 1) is decays],
                   "weight_decay": args.wd * decays} for decays in (True, False)]
        self.optimizer = torch.optim.AdamW(groups, args.lr, (0.9, 0.98), eps=1e-6,
                                           fused=run.fused_optimizer)
        self.scaler, self.kept = run.scaler(), weights.kept_tensors(student)
        names = student.state_dict().keys()
        self.buffers = {name: x for name, x in student.named_buffers() if name in names}

    def save(self, at, name, **more):
        if self.average:
            more |= {"ema": {name: mine for name, (mine, _) in self.average.pairs.items()},
                     "updates": self.average.updates, "tested": "ema"}
        self.run.save_training(at, self.kept, self.optimizer, self.scaler, self.buffers, name,
                               heads=self.heads.state_dict(), **more)

    def load(self, checkpoint):
        """Go on from a checkpoint, or begin (None) -> Place"""
        at = self.run.load_training(checkpoint, self.kept, self.optimizer, self.scaler,
                                    self.buffers)
        if checkpoint:
            self.heads.load_state_dict(checkpoint["heads"])
        if checkpoint and self.average:
            self.average.updates.copy_(checkpoint["updates"])
            self.average.model.load_state_dict(checkpoint["ema"], strict=False)  # less the frozen
        return at


def text_trains(student):
    return any(p.requires_grad for name, p in student.named_parameters()
               if not name.startswith(("visual.", "logit_")))


def set_training_mode(student):
    """Dropout and BatchNorm's statistics on, but not in what is frozen -> whether it has those."""
    student.train()
    for module in student.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
               for module in student.modules())


def rate(step, steps, warmup):
    """Factor on the learning rate in a step (from 0): a linear warm-up, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def term_weights(args, with_text, done):
    """The weight of each term when a share `done` of the training is over. The averaged student
    comes in over the first tenth: at first it knows nothing."""
    icl = (1.0 if args.icl is None else args.icl) * with_text
    return {"task": args.task, "crd": args.crd, "fd": args.fd, "icl": icl, "hint": args.hint,
            "attention": args.attention, "other": args.text_teacher_weight,
            "ema": args.ema_teacher * min(1.0, 10 * done)}


# -----------------------------------------------------------------------------
# Scores

def recalls(run, model, tokenizer, pairs, args, texts=None):
    """Retrieval on held-out pairs -> dict, in %. texts: their features by a frozen text tower."""
    pairs = pairs.with_transform(Preprocess.of(model))
    scores = recall_at_k(*embed(run, model, pairs, tokenizer, max_text=args.max_text, texts=texts,
                                workers=args.workers if pairs.pixels is None else 0))
    return {name: scores[name] for name in RECALLS}


def score(run, model, tokenizer, setup, args):
    """Retrieval on the test pairs (or val) and accuracy on the sets of --zero-shot -> dict, in %"""
    pairs, look = setup.test or setup.val, Preprocess.of(model)
    found = recalls(run, model, tokenizer, pairs, args) if pairs else {}
    for images in setup.labelled:
        scores = zero_shot(run, model, images.with_transform(look), tokenizer,
                           args.templates or images.templates, args)
        found[f"zero_shot_{images.name}_top1"] = scores["accuracy"]
    return found


@torch.no_grad()
def measure(run, model):
    """Parameters of the image tower, and its time for one image on this device."""
    image = run.move(torch.zeros(1, 3, *[model.config.image_size] * 2))
    with evaluating(model), run.autocast():
        model.encode_image(image)  # warms up
        run.synchronize()
        began = time.perf_counter()
        for _ in range(10):
            model.encode_image(image)
        run.synchronize()
    return {"image_parameters": sum(p.numel() for p in model.visual.parameters()),
            "latency_ms": 100 * (time.perf_counter() - began)}


# -----------------------------------------------------------------------------
# The loop

def name_images(pairs, used):
    return "the batch of " + ", ".join(pairs.paths[pairs.owner[c]] for c in used[:8].tolist())


def train(run, learner, setup, maps, loader, look_up, checkpoint, args, **kept):
    """Train the student in place. look_up: what the loader gives -> Batch; checkpoint: to go on
    from, or None; kept: more for the checkpoints -> Place"""
    student, pairs, val, texts = learner.student, loader.dataset, setup.val, None
    if val and not text_trains(student):
        texts = encode_texts(run, student, setup.tokenizer, val.retrieval().texts, args.max_text)
    at = learner.load(checkpoint)
    at.steps = setup.steps
    best = checkpoint["best"] if checkpoint else -1.0
    for images, used, _ in run.batches(loader, at):
        # ---- one step ------------------------------------------------------------------
        lr = args.lr * rate(at.step, setup.steps, setup.warmup)
        for group in learner.optimizer.param_groups:
            group["lr"] = lr
        learner.optimizer.zero_grad(set_to_none=True)
        losses = step(run, learner, setup.teachers, maps, look_up(images, used, at.epoch),
                      setup.counts, draw_mix(args, at.step, student.config.image_size),
                      term_weights(args, text_trains(student), at.step / at.steps),
                      args.micro_batch or setup.counts[0], args.seed * 1_000_003 + at.step)
        run.sum_gradients(learner.parameters)
        fine = run.update(learner.optimizer, learner.parameters, learner.scaler, args.grad_clip,
                          losses["loss"])
        with torch.no_grad():
            for scale in (student.logit_scale, learner.heads.icl_scale):
                scale.clamp_(0, math.log(100))  # CLIP's
        if learner.average:
            learner.average.update(fine)
        # --------------------------------------------------------------------------------
        due = run.tick(at, losses, args.batch_size, functools.partial(name_images, pairs, used),
                       lr=lr, scale=student.logit_scale.detach().exp())
        if val and (at.batch == 0 or at.step == at.steps):
            scores = recalls(run, learner.tested, setup.tokenizer, val, args, texts)
            run.log(at.step, "val", **scores)
            if scores["mean_recall"] > best:
                best = scores["mean_recall"]
                learner.save(at, "checkpoint_best.pt", best=best, **kept)
        if due:
            learner.save(at, "checkpoint_last.pt", best=best, **kept)
    return at


# -----------------------------------------------------------------------------
# Student, teachers and data

def open_setup(run, args):
    """What the command line names, opened and checked, models on the device -> a namespace: pairs,
    val, test (PairSet or None), labelled (ImageSets of --zero-shot), stored (Stored or None),
    teachers, student, tokenizer, steps, warmup, counts (pairs of a batch in each process)."""
    where = {"data_dir": args.data_dir, "layout": args.layout, "caption_file": args.caption_file,
             "image_column": args.image_column, "caption_column": args.caption_column}
    pairs = open_pairs(args.data, "train", **where)
    val, test = (open_pairs(args.data, split, **where) if pairs.counts.get(split) else None
                 for split in ("val", "test"))
    labelled = [open_dataset(name, "test", args.data_dir, download=False, whole=True)
                for name in args.zero_shot]
    if val and test and test.paths == val.paths:
        test = None
    for some in filter(None, (pairs, val, test, *labelled)):
        some.check_files()
    for images in labelled:
        require_words(images)
    batches = len(PairBatches(pairs, args.batch_size, captions=args.captions))
    steps = min(args.epochs * batches, args.max_steps or math.inf)
    warmup = round(args.warmup if args.warmup >= 1 else args.warmup * steps)
    if warmup >= steps:
        raise UserError(f"--warmup {args.warmup:g} is {warmup} steps and the training has {steps}, "
                        f"{batches} an epoch: nothing comes after it")
    steps, warmup = (2, 1) if args.dry_run else (steps, warmup)
    stored = Stored(args.reinforced) if args.reinforced else None
    if stored:
        stored.check(pairs)
    teachers = stored.teachers if stored else open_teachers(
        args.teacher, args.teacher_activation, args.tokenizer if args.text_tower == "teacher" else
        None)
    scales = args.teacher_scale or [teacher.scale for teacher in teachers]
    if len(scales) != len(teachers):
        raise UserError(f"--teacher-scale: {len(scales)} numbers for {len(teachers)} teachers")
    for teacher, scale in zip(teachers, scales):
        teacher.scale = scale
        if not stored:
            run.move(teacher.model).fuse_attention(run.fused_attention)
    student, tokenizer = open_student(run, teachers[0], pairs.captions[:8], args)
    if args.export:
        weights.check_layout(student.config, args.export)
    counts = [len(range(rank, args.batch_size, run.world_size)) for rank in range(run.world_size)]
    if args.mixup + args.cutmix and args.batch_size % (2 * run.world_size):
        raise UserError(f"--mixup and --cutmix mix two by two: --batch-size {args.batch_size} must "
                        f"be a multiple of {2 * run.world_size}")
    if args.hint + args.attention and 0 < args.micro_batch < counts[0]:
        raise UserError("--hint and --attention need the batch in one piece, without --micro-batch")
    return types.SimpleNamespace(
        pairs=pairs, val=val, test=test, labelled=labelled, stored=stored, teachers=teachers,
        student=student, tokenizer=tokenizer, steps=steps, warmup=warmup, counts=counts)


def open_student(run, first, captions, args):
    """The CLIP that learns -> model, tokenizer. Its text tower is that of the `first` teacher,
    frozen unless --train-text, or one of its own."""
    torch.manual_seed(args.seed)
    own = args.text_tower != "teacher"
    source = args.text_tower if own else args.teacher[0] if args.teacher else first.path
    if args.weights:
        model = weights.load(args.weights)
    else:
        known = canonical_name(args.model) and not pathlib.Path(args.model).exists()
        model = weights.load(
            image_tower=f"{args.model}:none" if known else args.model, text_tower=source,
            proj=first.proj, embed_dim=first.dim, image_size=args.image_size,
            activation=args.teacher_activation or first.activation)
    vocabulary = model.vocabulary or model.text_kind == "bpe"
    tokenizer = for_model(model, args.tokenizer or (None if vocabulary else source))
    run.move(model).fuse_attention(run.fused_attention)
    if own or args.train_text:
        return model, tokenizer
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(("visual.", "logit_scale")))
    ours = encode_texts(run, model, tokenizer, captions, args.max_text)
    theirs = first.texts[:len(ours)] if first.model is None else encode_texts(
        run, first.model, first.tokenizer, captions, args.max_text)
    if ours.shape != theirs.shape or (ours * theirs).sum(dim=1).min() < 0.99:
        raise UserError(f"the student's frozen text tower is not that of the teacher {first.name}; "
                        f"give that teacher, or add --train-text")
    return model, tokenizer


def prepare(run, setup, args):
    """Decode, tokenize and encode once what does not change -> the loader, and what it gives
    (images, used, epoch) -> Batch, on the device."""
    train, stored, looks = setup.pairs, setup.stored, [look_of(setup.student)]
    captions, options, tokens, other = train.captions, run.loader_options(args.workers), None, None
    for teacher in () if stored else setup.teachers:
        looks.append(teacher.look)
        teacher.texts = encode_texts(run, teacher.model, teacher.tokenizer, captions, args.max_text)
    if text_trains(setup.student):
        tokens = setup.tokenizer(captions, context_length=args.max_text)
    if args.text_teacher:
        other = ask_texts(run, args.text_teacher, captions, args.max_text)
    for pairs in filter(None, (train, setup.val)):
        pairs.cache(run, max(size for size, *_ in looks) * 8 // 7, run.out / "cache",
                    int(args.cache_gb * 2 ** 30), options["workers"])
    if args.workers < 0 and train.pixels is not None:
        options.update(workers=0, multiprocessing_context=None)  # there is little to do
    if stored:
        shown = ShownPairs(train, stored.views(looks), len(stored.images), args.seed)
    else:
        shown = train.with_transform(Views(looks, args.seed, args.crop, args.randaugment))
    loader = make_pair_loader(shown, args.batch_size, args.seed, args.captions, run.rank,
                              run.world_size, **options)

    def look_up(images, used, epoch):
        views = dict(zip(shown.transform.looks, map(run.move, images)))
        keys = [run.move(teacher.texts[used]) for teacher in setup.teachers]
        answers = stored and [run.move(x) for x in stored.answers(shown, epoch, used)]
        return Batch(views, None if tokens is None else tokens[used], keys[0], keys, answers,
                     None if other is None else run.move(other[used]))
    return loader, look_up


# -----------------------------------------------------------------------------
# A run

def report(run, student, setup, at, facts, args):
    """Score the student, write and return what the run found, and `facts`."""
    scores, held = score(run, student, setup.tokenizer, setup, args), setup.test or setup.val
    run.log(at.step, held.split if held else "test", **scores)
    if held and not setup.test:
        run.say("NOTE: no test pairs: val chose the best epoch and is scored, which flatters")
    results = run.finish({
        "method": "distill", "data": setup.pairs.name, "scored_on": held and held.split,
        **facts, **scores,
        **{f"student_{key}": x for key, x in measure(run, student).items()}, "steps": at.step,
        "epochs": at.epoch, "scale": float(student.logit_scale.detach().exp()),
        "batch_size": args.batch_size, "dry_run": args.dry_run})
    for name, x in scores.items():
        if name.endswith(("mean_recall", "top1")):
            teacher = facts.get(f"teacher_{name}")
            run.say(f"{'dry run, no result: ' * args.dry_run}{name} {x:.1f} %"
                    + (f", its teacher {teacher:.1f} %" if teacher else ""))
    return results


def open_result(run, path, setup, args):
    """The student that a run left, exported if that is asked for."""
    student = run.move(weights.load(path)).fuse_attention(run.fused_attention)
    if args.export and not args.eval_only:
        run.say("wrote " + run.on_first(lambda: str(weights.export(
            student, pathlib.Path(path) / "export", args.export, setup.tokenizer))))
    return student


def main(args):
    """Train (or score) one student -> the results."""
    run = start(args.device, args.precision, args.seed, args.deterministic)
    setup = open_setup(run, args)
    student, first, stored = setup.student, setup.teachers[0], setup.stored
    pieces = [args.micro_batch, run.world_size] if set_training_mode(student) else None
    words = json.dumps(setup.tokenizer.facts(), sort_keys=True).encode()
    name, kind = args.model or student.origin["name"], "stored" if stored else "live"
    identity = run_identity(
        args, but=("teacher", "reinforced", "weights", "tokenizer"), method="distill", model=name,
        data=setup.pairs.fingerprint, weights=student.origin["sha256"],
        teachers=[(teacher.sha256, teacher.scale) for teacher in setup.teachers],
        vocabulary=hashlib.sha256(words).hexdigest(), stored=stored and stored.facts,
        pieces=pieces)  # of which BatchNorm takes statistics
    folder = run_folder(args, "distill", f"{setup.pairs.name}_{pathlib.Path(name).name}_{kind}")
    checkpoint, finished = run.begin(folder, args, identity)
    if finished:
        open_result(run, folder, setup, args)
        return finished
    facts = {"model": name, "teachers": [teacher.name for teacher in setup.teachers]}
    if args.eval_only and not (checkpoint or args.weights):
        raise UserError(f"--eval-only: no checkpoint in {folder}; give --output-dir or --weights")
    if args.eval_only:
        at = Place(*(checkpoint[key] for key in ("epoch", "batch", "step")) if checkpoint else ())
        path = folder if args.resume == "auto" else args.resume
        student = open_result(run, path, setup, args) if checkpoint else student
        return report(run, student, setup, at, facts, args)

    if not text_trains(student) and not args.weights:  # checkpoints need not hold that tower again
        student.origin |= {"path": first.path, "sha256": first.sha256, "side": "text"}
    average = Average(student, args.ema) if args.ema else None  # a copy, before there are hooks
    maps = Maps(student, first.model) if args.hint + args.attention else None
    heads = run.move(Heads(student.config.embed_dim, [teacher.dim for teacher in setup.teachers],
                           maps and maps.channels))
    learner = Learner(run, student, heads, average, args)
    loader, look_up = prepare(run, setup, args)
    for note in (*student.origin["notes"], *setup.pairs.notes):
        run.say(note)
    run.say(f"{name}: {sum(p.numel() for p in learner.parameters):,} weights train, {len(loader)} "
            f"steps an epoch of {args.batch_size} pairs; {kind} teachers: " + ", ".join(
                f"{teacher.name} (scale {teacher.scale:.4g})" for teacher in setup.teachers))
    teacher_scores = checkpoint["teacher"] if checkpoint else {}
    if not checkpoint and not stored:
        teacher_scores = score(run, first.model, first.tokenizer, setup, args)
        run.log(0, "teacher", **teacher_scores)
    at = train(run, learner, setup, maps, loader, look_up, checkpoint, args, teacher=teacher_scores,
               card=weights.card(student, setup.tokenizer))
    if not stored:
        teacher_scores |= measure(run, first.model)
    facts |= {f"teacher_{key}": x for key, x in teacher_scores.items()}
    return report(run, open_result(run, folder, setup, args), setup, at, facts, args)


# -----------------------------------------------------------------------------
# The command line

DEFAULTS = {"model": "mobilenet_v3_small", "epochs": 30, "batch_size": 256, "lr": 1e-3,
            "crop": 0.4, "zero_shot": []}
DEMO = {"teacher": [str(pathlib.Path(__file__).resolve().parent / "assets" / "demo_teacher.pt")],
        "model": "tiny-vit", "image_size": 64, "epochs": 30, "batch_size": 64, "lr": 2e-3,
        "crop": 0.6, "zero_shot": ["demo"]}
ALIASES = {
    "--dataset": "--data", "--train-data": "--data", "--arch": "--model", "--student": "--model",
    "--backbone": "--model", "--pretrained": "--weights", "--distill-model": "--teacher",
    "--learning-rate": "--lr", "--weight-decay": "--wd", "--max-epochs": "--epochs",
    "--num-workers": "--workers", "--output": "--output-dir", "--zeroshot": "--zero-shot"}
PIECES = "the batch is exact whatever fits; --micro-batch says how many pairs are encoded at a time"
REFUSED = {
    "--accum-freq": PIECES, "--accum-steps": PIECES, "--gradient-accumulation-steps": PIECES,
    "--write-reinforced": "it is a program: python -m tools.reinforce",
    "--views": "it is a flag of python -m tools.reinforce"}


def get_args(argv=None):
    """The command line as a namespace. Exits with code 2 and one line on a wrong one."""
    parser = Parser(description="Distillation of CLIP.", aliases=ALIASES, refused=REFUSED)
    add_pair_flags(parser)
    add = parser.add_argument_group("student").add_argument
    add("--model", help="image tower: [timm:]NAME[:WEIGHTS] of torchvision or timm, or a CLIP's")
    add("--weights", help="a CLIP to go on from, instead of --model")
    add("--image-size", type=whole(8), help="pixels per side (default: the tower's own)")
    add("--text-tower", default="teacher", help="or one to train: a BERT's folder, or NAME:none")
    add("--train-text", action="store_true", help="train the teacher's text tower on")
    add("--tokenizer", help="file or folder of the text tower's vocabulary")
    add("--max-text", type=whole(3), default=77, help="tokens of a text (default: 77)")
    add = parser.add_argument_group("teachers").add_argument
    add("--teacher", nargs="+", help="one CLIP or several: names, files or folders")
    add("--teacher-scale", nargs="+", type=number(0, 1e3, True), help="default: what each learned")
    add("--teacher-activation", choices=("quick_gelu", "gelu"), help="where its file does not say")
    add("--reinforced", metavar="FOLDER", help="a stored teacher, see python -m tools.reinforce")
    add("--text-teacher", metavar="FOLDER", help="a BERT; what it finds alike is no plain negative")
    add("--text-teacher-weight", type=number(0, 1), default=0.2, help="in the task (default: 0.2)")
    add("--ema-teacher", type=number(0, 0.5), default=0.0, help="weight of the student's average")
    add = parser.add_argument_group("method").add_argument
    for name, default, what in (
            ("task", 0.25, "InfoNCE on the pairs"), ("crd", 1.0, "the teachers' similarities"),
            ("fd", 8.0, "1 - cos to the teachers' embeddings"),
            ("icl", None, "InfoNCE against them (default: 1 where text trains)"),
            ("hint", 0.0, "1 - cos between maps inside the image towers"),
            ("attention", 0.0, "where the image towers look")):
        add(f"--{name}", type=number(), default=default, help=f"weight of {what}" + (
            f" (default: {default:g})" if default is not None else ""))
    add("--mixup", type=number(), default=0.0, help="alpha of Beta (default: 0, off)")
    add("--cutmix", type=number(), default=0.0, help="alpha of Beta (default: 0, off)")
    add("--crop", type=number(0, 1), help="least share of an image that a view shows, 0: all")
    add("--randaugment", action="store_true", help="distort the views: two of RandAugment's")
    add("--ema", type=number(0, 0.999999), default=0.0, help="decay of averaged, tested weights")
    add("--epochs", type=whole(1), help="default: 30")
    add("--max-steps", type=whole(0), default=0, help="stop after so many steps; 0: after --epochs")
    add("--batch-size", type=whole(2), help="pairs compared in a step, over all processes")
    add("--micro-batch", type=whole(0), default=0, help="encoded at a time (default: 0, all)")
    add("--lr", type=number(0, 1e3, above=True), help="default: 1e-3")
    add("--wd", type=number(), default=0.1, help="weight decay, on all but gains and biases")
    add("--warmup", type=number(), default=0.05, help="steps, or below 1 a share of all")
    add("--grad-clip", type=number(), default=1.0, help="largest norm, 0: none (default: 1)")
    add = parser.add_argument_group("scores").add_argument
    add("--zero-shot", nargs="+", metavar="DATA", help="labelled images: names, or class folders")
    add("--templates", nargs="+", metavar="TEXT", help="prompts with {} for the class")
    add_run_flags(parser)
    args = parser.parse_args(argv)

    demo, look_inside = args.data == "demo", args.hint + args.attention
    with_text = args.train_text or args.text_tower != "teacher"
    for wrong, line in (
            (args.weights and args.model, "--weights brings its image tower; leave --model out"),
            (not (args.teacher or args.reinforced or demo), "--teacher is missing: name a CLIP"),
            (args.ema_teacher and not args.ema, "--ema-teacher needs --ema, the average's decay"),
            (args.icl and not with_text, "--icl needs --train-text: with frozen text it is --task"),
            (args.reinforced and look_inside, "--hint and --attention need a teacher that runs"),
            (args.reinforced and (args.crop is not None or args.randaugment),
             "--reinforced brings its views; leave --crop and --randaugment out"),
            (not any(term_weights(args, with_text, 1)[name] for name in TERMS),
             "--task, --crd and --fd are 0: nothing to learn")):
        if wrong:
            parser.error(line)
    for name, value in {**DEFAULTS, **(DEMO if demo else {})}.items():
        brought = {"teacher": args.reinforced, "model": args.weights}.get(name)
        if getattr(args, name) is None and not brought:
            setattr(args, name, value)
    return args


if __name__ == "__main__":
    sys.exit(guard(main, get_args))
