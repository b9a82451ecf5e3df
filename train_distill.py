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

The task weighs less: captions are noisy, and a teacher's targets allow for it. Off by default:
--hint and --attention compare maps inside the image towers; --ema scores a moving average of the
student, and --ema-teacher W adds W * crd against it; --text-teacher, a BERT with centred features
r, turns the task's targets into 0.8 I + 0.2 softmax(10 r r^T).

    python train_distill.py                                   the demo on a CPU, about a minute
    python train_distill.py --task 1 --crd 0 --fd 0           its student, taught by the pairs alone
    python train_distill.py --teacher ViT-B/16 --data flickr8k --data-dir DIR
    python -m tools.reinforce --teacher ViT-B/16 --data flickr8k --data-dir DIR --output stored
    python train_distill.py --reinforced stored --data flickr8k --data-dir DIR
    torchrun --standalone --nproc-per-node 8 train_distill.py --teacher ViT-L/14 \
        --data shards/{000..127}.tar --model mobilenet_v3_small:IMAGENET1K_V1

With --reinforced, the teacher's features of a few random views of every image come from the disk
(Faghri et al. 2023), and only the small tower runs. `--batch-size` is what is compared, over all
processes, and `--micro-batch` what is encoded at a time, with the gradient of the whole batch (Gao
et al. 2021); only BatchNorm takes the statistics of each piece.

Different from the released codes, with the reason:
- teachers are averaged after each softmax, rows and columns apart; MobileCLIP's code transposes the
  averaged softmax unless --local-loss, and its rows then do not sum to 1;
- FD is 1 - cos. CLIP-KD's 2000 * MSE is 4000/D of that: 8 at D = 512, but 63 at D = 64;
- with frozen text, ICL repeats half of the task, and its rest and FD of texts are constant: off;
- the hint is 1 - cos where FitNets squares differences, and attention is the KL divergence of the
  class token's maps, not the distance of two energy maps (Zagoruyko and Komodakis 2017);
- under Mixup and CutMix the teacher sees the mixed images; a stored one's embeddings are mixed.

AdamW, weight decay on all but gains and biases, warm-up, then a cosine to 0. After each epoch the
held-out pairs are scored: checkpoint_best.pt has the student of the best mean recall, which is
tested, and checkpoint_last.pt everything to go on from, a frozen text tower by its file's name.

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
import types
import typing

from device import (add_run_flags, guard, number, Parser, Place, run_folder, run_identity, start,
                    UserError, whole)  # before torch, which reads what it sets
import torch
import torch.nn.functional as F
from torch import nn

import weights
from clip_model import (canonical_name, evaluating, text_pieces, training_mode, unit,
                        VisionTransformer)
from data import open_dataset, require_words
from files import one_line
from images import normalise, Preprocess, sample_seed
from large_batch import by_rows, TwoPass
from pairs import add_pair_flags, decode_once, make_pair_loader, open_splits, PairBatches
from scores import (embed, encode_texts, image_features, milliseconds, recalls, retrieval_ranks,
                    zero_shot)
from teachers import look_of, open_teachers, open_text_teacher, ShownPairs, Stored, Views
from tokenizer import for_model

OF_TEACHERS = ("crd", "fd", "icl", "hint", "attention")  # the terms that ask them about images
TEXT_TEACHER = 0.2  # its share of the task's targets
TEXT_SCALE = 10.0   # of its similarities


# -----------------------------------------------------------------------------
# The losses. Each is this process's part: its rows against the columns of all processes; the sum
# over processes is the loss of the batch.

class Features(typing.NamedTuple):
    """What a model makes of the batch's N pairs: unit rows; its scale multiplies their cosines."""
    scale: torch.Tensor | float
    image: torch.Tensor       # (n, D), of this process's pairs
    text: torch.Tensor
    images: torch.Tensor      # (N, D), of all processes' pairs, in rank order
    texts: torch.Tensor

    def turned(self):
        """The same with texts in the place of images."""
        return Features(self.scale, self.text, self.image, self.texts, self.images)


def both_ways(one_way, *features):
    """The mean of a loss from images to texts and that from texts to images."""
    turned = (x.turned() for x in features)
    return (one_way(*features) + one_way(*turned)) / (2 * len(features[0].images))


def info_nce(ours, theirs, labels):
    """Cross-entropy of ours' images against theirs' texts, and of ours' texts against theirs'
    images. With theirs = ours that is the task, with a teacher ICL. labels = (own, partner, share):
    the target of row i is `share` on column own[i] and 1 - share on column partner[i]; without
    mixing share is 1."""
    own, partner, share = labels

    def some_rows(rows, own_rows, partner_rows, columns, scale):
        logits = (scale * rows) @ columns.T                                    # (m, N)
        return (share * F.cross_entropy(logits, own_rows, reduction="sum")
                + (1 - share) * F.cross_entropy(logits, partner_rows, reduction="sum"))

    def one_way(a, b):
        return by_rows(some_rows, (a.image, own, partner), (b.texts, a.scale))
    return both_ways(one_way, ours, theirs)


def crd(ours, teachers):
    """Cross-entropy to the mean of K teachers' softmaxes: the KL divergence plus a constant."""
    def one_way(a, *others):
        def some_rows(rows, *rest):  # as by_rows gives them: the teachers' rows, then a's columns
            *p, columns, scale = rest
            targets = sum((other.scale * p_k @ other.texts.T).softmax(dim=1)
                          for other, p_k in zip(others, p)) / len(others)      # (m, N)
            return F.cross_entropy((scale * rows) @ columns.T, targets, reduction="sum")
        return by_rows(some_rows, (a.image, *(other.image for other in others)), (a.texts, a.scale))
    return both_ways(one_way, ours, *teachers)


def fd(ours, theirs, with_text):
    """1 - cos, half the squared distance of unit vectors, at any width D."""
    distance = (1 - (ours.image * theirs.image).sum(dim=1)).sum()
    if with_text:
        distance = distance + (1 - (ours.text * theirs.text).sum(dim=1)).sum()
    return distance / len(ours.images)


class Heads(nn.Module):
    """What the losses learn and the student does not keep: a linear map to each teacher's width
    where it differs, ICL's scale, and the hint's convolution."""

    def __init__(self, dim, dims, channels=None):
        super().__init__()
        self.image = nn.ModuleList(nn.Identity() if d == dim else nn.Linear(dim, d) for d in dims)
        self.text = nn.ModuleList(nn.Identity() if d == dim else nn.Linear(dim, d) for d in dims)
        self.icl_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.hint = nn.Conv2d(*channels, 1) if channels else None


def objective(ours, labels, teachers, heads, weight, text_teacher=None, average=None):
    """The terms on features that have a weight -> {name: this process's part}. labels: see
    info_nce; teachers: a list of Features; text_teacher, average (of the student): Features."""
    terms, text_trains = {}, ours.text.requires_grad
    if weight["task"]:
        terms["task"] = info_nce(ours, ours, labels)
        if text_teacher is not None:  # its similarities soften the targets
            share = weight["text_teacher"]
            terms["task"] = (1 - share) * terms["task"] + share * crd(ours, [text_teacher])
    if weight["crd"]:
        terms["crd"] = crd(ours, teachers)
    if weight["ema"]:
        terms["ema"] = crd(ours, [average])
    # As wide as each teacher's. FD and ICL do not read `images` and `texts`, nor FD the scale.
    wide = [ours._replace(scale=heads.icl_scale.exp(), image=unit(to_image(ours.image)),
                          text=unit(to_text(ours.text)))
            for to_image, to_text in zip(heads.image, heads.text)]
    if weight["fd"]:
        terms["fd"] = sum(fd(x, teacher, text_trains)
                          for x, teacher in zip(wide, teachers)) / len(teachers)
    if weight["icl"]:
        terms["icl"] = sum(info_nce(x, teacher, labels)
                           for x, teacher in zip(wide, teachers)) / len(teachers)
    return terms


# -----------------------------------------------------------------------------
# One exact step

class Batch(typing.NamedTuple):
    """This process's n pairs."""
    images: dict                  # uint8 (n, 3, S, S) for each way to look, see Views
    tokens: torch.Tensor | None   # (n, L), on the host, for a text tower that trains
    q: list                       # K of (n, D_k), the teachers' features of the texts
    p: list | None                # K of (n, D_k), those of the images, if they are stored
    similar: torch.Tensor | None  # (n, D') of the text teacher


def add_gradient(run, learner, batch, mix, weight, seed):
    """Add this process's part of the batch's gradient to `.grad` -> its part of {"loss", terms}.
    weight: of the terms; seed: of dropout, another one for every step."""
    student, teachers, counts = learner.student, learner.teachers, learner.counts
    n, offset = counts[run.rank], sum(counts[:run.rank])
    own = offset + torch.arange(n, device=run.device)
    labels = own, offset + mix.partners(n).to(run.device), mix.share

    def encode_image(model, rows):
        return model.encode_image(mix.show(batch.images[look_of(model)], rows, model), True)

    def encode_text(model, piece):
        return model.encode_text(piece[0], True, piece[1])

    @torch.no_grad()
    def ask(model, encode, pieces):
        with run.autocast():
            return torch.cat([encode(model, piece) for piece in pieces])

    def features(scale, image, text):
        return Features(scale, image, text, run.gather(image, counts), run.gather(text, counts))

    # ---- encode -------------------------------------------------------------------
    def cut(size):
        return [slice(i, min(n, i + size)) for i in range(0, n, size)]
    pieces = cut(learner.micro)
    asked = pieces if learner.maps else cut(min(64, learner.micro))  # 256 at once took 5 GB more
    p = []  # empty where no term needs the teachers' image features
    if batch.p is not None:
        p = [mix.blend(rows) for rows in batch.p]
    elif any(weight[name] for name in OF_TEACHERS):
        p = [ask(teacher.model, encode_image, asked) for teacher in teachers]
    image = TwoPass(run, functools.partial(encode_image, student), pieces, 2 * seed, student.visual)
    text, v = None, batch.q[0]  # (n, D): a frozen text tower is that of the first teacher
    if batch.tokens is not None:
        texts, places = text_pieces(batch.tokens, learner.micro, student.text_pad)
        texts, places = [run.move(*piece) for piece in texts], run.move(places)
        text = TwoPass(run, functools.partial(encode_text, student), texts, 2 * seed + 1)
        v = text.features[places]

    # ---- the loss, in fp32 over all processes -------------------------------------
    ours = features(student.logit_scale.exp(), image.features, v)
    theirs = [features(t.scale, p_k, q_k) for t, p_k, q_k in zip(teachers, p, batch.q)]
    text_teacher = average = None
    if batch.similar is not None:
        text_teacher = features(TEXT_SCALE, mix.blend(batch.similar), batch.similar)
    if weight["ema"]:
        model = learner.average.model
        average = features(model.logit_scale.exp(), ask(model, encode_image, asked),
                           ask(model, encode_text, texts)[places] if text else v)
    terms = objective(ours, labels, theirs, learner.heads, weight, text_teacher, average)
    map_terms = learner.maps.losses(learner.heads.hint, sum(counts)) if learner.maps else {}
    loss = sum(weight[name] * x for name, x in terms.items())
    map_loss = sum(weight[name] * x for name, x in map_terms.items())
    # -------------------------------------------------------------------------------

    if terms:
        learner.scaler.scale(loss).backward()  # as far as the features, which are leaves
    if text:
        text.backward()
    image.backward(also=learner.scaler.scale(map_loss) if map_terms else None)
    return {"loss": loss + map_loss, **terms, **map_terms}


# -----------------------------------------------------------------------------
# Mixing

class Mix(typing.NamedTuple):
    """Mixup or CutMix of a whole batch: one share, one box, so that targets stay distributions."""
    share: float = 1.0        # of an image itself; the rest is its partner's
    box: tuple | None = None  # CutMix: top, left, bottom, right, each from 0 to 1

    def partners(self, n):
        """Pair i of the n of this process mixes with pair i + n/2, and that with it; n is even."""
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
    down to the coarser of their grids, P places. Hooks catch what passes. Means over images:

        hint       1 - cos(1 x 1 convolution of the map, LayerNorm of the teacher's), mean over P;
                   FitNets, Romero et al. 2015
        attention  KL(a' || a): a the energy sum_c map^2 of a place over that of all (Zagoruyko and
                   Komodakis 2017), a' how the class token attends in the teacher's last block

    A ViT's map is what its last block gets, any other tower's the last module output that is a map.
    The class token itself is left out of both."""

    def __init__(self, student, teacher):
        if not isinstance(teacher.visual, VisionTransformer):
            raise UserError("--hint and --attention need a ViT as the first teacher")
        self.caught, self.last = {}, teacher.visual.transformer.resblocks[-1]
        for who, model in (("teacher", teacher), ("student", student)):
            vit = isinstance(model.visual, VisionTransformer)
            for module in ([model.visual.transformer.resblocks[-1]] if vit
                           else model.visual.modules()):
                module.register_forward_hook(functools.partial(self.catch, who, vit))
            with torch.no_grad(), evaluating(model):
                side = model.config.image_size
                model.encode_image(model.logit_scale.new_zeros(1, 3, side, side))
        if "student" not in self.caught:
            raise UserError("--hint and --attention find no map inside the student's image tower")
        self.channels = [as_map(self.caught[who]).shape[1] for who in ("student", "teacher")]

    def catch(self, who, vit, module, inputs, output):
        if vit:
            self.caught[who] = inputs[0]
        elif torch.is_tensor(output) and output.ndim == 3:  # tokens: what came before is no map
            self.caught.pop(who, None)
        elif torch.is_tensor(output) and output.ndim == 4 and as_map(output).shape[-1] > 1:
            self.caught[who] = output

    def attended(self, side):
        """a' of the images that the teacher has just seen, (n, P)."""
        attention = self.last.attn
        x = self.last.ln_1(self.caught["teacher"].to(attention.in_proj_weight.dtype))
        x = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)  # (n, 1 + G^2, 3 C)
        q, k, _ = x.unflatten(2, (3, attention.heads, -1)).permute(2, 0, 3, 1, 4)
        found = (q[:, :, :1] @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1).float()
        found = F.adaptive_avg_pool2d(as_map(found.mean(dim=1).mT), side).flatten(1)
        return found / found.sum(dim=1, keepdim=True)

    def losses(self, adapter, N):
        """When both towers have seen the same images -> {"hint", "attention"}, of N in all."""
        ours, goal = (as_map(self.caught[who]).float() for who in ("student", "teacher"))
        side = min(ours.shape[-1], goal.shape[-1])
        ours, goal = F.adaptive_avg_pool2d(ours, side), F.adaptive_avg_pool2d(goal, side)
        energy = ours.square().sum(dim=1).flatten(1) + 1e-12           # (n, P)
        energy = (energy / energy.sum(dim=1, keepdim=True)).log()
        goal = F.layer_norm(goal.movedim(1, -1), goal.shape[1:2])      # (n, side, side, C')
        hint = 1 - F.cosine_similarity(adapter(ours).movedim(1, -1), goal, dim=-1)
        return {"hint": hint.mean(dim=(1, 2)).sum() / N,
                "attention": F.kl_div(energy, self.attended(side), reduction="sum") / N}


def as_map(x):
    """(n, C, h, w) of a map, of one with channels last, or of a ViT's tokens (n, 1 + G^2, C)."""
    if x.ndim == 3:
        return x[:, 1:].mT.unflatten(2, (math.isqrt(x.shape[1] - 1), -1))
    return x.movedim(3, 1) if x.shape[1] == x.shape[2] != x.shape[3] else x


# -----------------------------------------------------------------------------
# What trains, and at which rate

class Average:
    """Moving average of what trains: step n = 0, 1, ... keeps min(decay, (1 + n) / (10 + n)) of it.
    Frozen tensors are the model's own; integers are copied."""

    def __init__(self, model, decay):
        self.decay, theirs = decay, model.state_dict()
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        shared = {id(p): p for p in frozen.values()}  # what deepcopy then does not copy
        self.model = copy.deepcopy(model, shared).eval().requires_grad_(False)
        self.pairs = {name: (mine, theirs[name]) for name, mine in self.model.state_dict().items()
                      if name not in frozen}

    @torch.no_grad()
    def update(self, step, fine):
        """fine: 0-d bool tensor, False if the step was skipped; it stays on the device, unread."""
        kept = min(self.decay, (1 + step) / (10 + step))
        for mine, theirs in self.pairs.values():
            if mine.is_floating_point():
                mine.lerp_(theirs, ((1 - kept) * fine).to(mine.dtype))
            else:
                mine.copy_(theirs)


class Learner:
    """The student, what teaches it, everything that training changes, and how it is kept."""

    def __init__(self, run, setup, args):
        self.run, self.student, self.teachers = run, setup.student, setup.teachers
        self.counts, self.micro = setup.counts, args.micro_batch or setup.counts[0]
        self.average = Average(self.student, args.ema) if args.ema else None  # before Maps' hooks
        self.tested = self.average.model if args.ema else self.student
        self.maps = (Maps(self.student, self.teachers[0].model) if args.hint + args.attention
                     else None)
        self.heads = run.move(Heads(self.student.config.embed_dim, [t.dim for t in self.teachers],
                                    self.maps and self.maps.channels))
        self.parameters = [p for module in (self.student, self.heads)
                           for p in module.parameters() if p.requires_grad]
        groups = [{"params": [p for p in self.parameters if (p.ndim > 1) is decays],
                   "weight_decay": args.wd * decays} for decays in (True, False)]
        self.optimizer = torch.optim.AdamW(groups, args.lr, (0.9, 0.98), eps=1e-6,
                                           fused=run.fused_optimizer)
        self.scaler, self.kept = run.scaler(), weights.kept_tensors(self.student)
        names = self.student.state_dict().keys()
        self.buffers = {name: x for name, x in self.student.named_buffers() if name in names}
        self.card = weights.card(self.student, setup.tokenizer)

    def save(self, at, name, **more):
        if self.average:
            more |= {"ema": {name: mine for name, (mine, _) in self.average.pairs.items()},
                     "tested": "ema"}
        self.run.save_training(at, self.kept, self.optimizer, self.scaler, self.buffers, name,
                               heads=self.heads.state_dict(), card=self.card, **more)

    def load(self, checkpoint):
        """Go on from a checkpoint, or begin (None) -> Place"""
        at = self.run.load_training(checkpoint, self.kept, self.optimizer, self.scaler,
                                    self.buffers)
        if checkpoint:
            self.heads.load_state_dict(checkpoint["heads"])
        if checkpoint and self.average:
            self.average.model.load_state_dict(checkpoint["ema"], strict=False)  # less the frozen
        return at


def rate(step, steps, warmup):
    """Factor on the learning rate in a step (from 0): a linear warm-up, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def term_weights(args, done):
    """The weight of each term when a share `done` of the training is over. The averaged student
    comes in over the first tenth: at first it knows nothing."""
    icl = (1.0 if args.icl is None else args.icl) if args.train_text else 0.0
    return {"task": args.task, "crd": args.crd, "fd": args.fd, "icl": icl, "hint": args.hint,
            "attention": args.attention, "ema": args.ema_teacher * min(1.0, 10 * done),
            "text_teacher": TEXT_TEACHER}


# -----------------------------------------------------------------------------
# Scores, and the loop

def retrieve(run, model, tokenizer, pairs, args, texts=None):
    """Recalls of held-out pairs -> dict, in %. texts: their features by a frozen text tower."""
    pairs = pairs.with_transform(Preprocess.of(model))
    return recalls(retrieval_ranks(*embed(
        run, model, pairs, tokenizer, texts=texts,
        workers=args.workers if pairs.pixels is None else 0)))


def score(run, model, tokenizer, setup, args):
    """Retrieval on the test pairs (or val) and accuracy on the sets of --zero-shot -> dict, in %"""
    pairs, look = setup.test or setup.val, Preprocess.of(model)
    found = retrieve(run, model, tokenizer, pairs, args) if pairs else {}
    for images in setup.labelled:
        found[f"zero_shot_{images.name}_top1"] = zero_shot(
            run, model, images.with_transform(look), tokenizer, args.templates, args)["accuracy"]
    return found


def measure(run, model):
    """Parameters of the image tower, and its time for one image on this device."""
    image = torch.zeros(1, 3, *[model.config.image_size] * 2, dtype=torch.uint8)
    return {"image_parameters": sum(p.numel() for p in model.visual.parameters()),
            "latency_ms": milliseconds(run, model, image_features, image)}


def train(run, setup, checkpoint, args):
    """Train the student in place, from a checkpoint if one is given -> Place."""
    student, pairs, val = setup.student, setup.pairs, setup.val
    if not (args.train_text or args.weights):  # checkpoints only name the frozen text tower's file
        text = student.origin["text"]
        student.origin |= {"path": text["path"], "sha256": text["sha256"], "side": "text"}
    learner = Learner(run, setup, args)
    run.say(*student.origin["notes"], *pairs.notes)
    loader, look_up = prepare(run, setup, args)
    run.say(f"{setup.name}: {sum(p.numel() for p in learner.parameters):,} weights train, "
            f"{len(loader)} steps an epoch of {args.batch_size} pairs; teachers: "
            + ", ".join(f"{some.name} (scale {some.scale:.4g})" for some in setup.teachers))
    texts = None if args.train_text or not val else encode_texts(  # by a frozen text tower
        run, student, setup.tokenizer, val.retrieval().texts)
    at = learner.load(checkpoint)
    at.steps = setup.steps
    best = checkpoint["best"] if checkpoint else -1.0
    for images, used, asked in run.batches(loader, at):
        # ---- one step ------------------------------------------------------------------
        lr = args.lr * rate(at.step, at.steps, setup.warmup)
        for group in learner.optimizer.param_groups:
            group["lr"] = lr
        learner.optimizer.zero_grad(set_to_none=True)
        losses = add_gradient(run, learner, look_up(images, used, at.epoch),
                              draw_mix(args, at.step, student.config.image_size),
                              term_weights(args, at.step / at.steps),
                              args.seed * 1_000_003 + at.step)
        run.sum_gradients(learner.parameters)
        fine = run.update(learner.optimizer, learner.parameters, learner.scaler, args.grad_clip,
                          losses["loss"])
        with torch.no_grad():
            for scale in (student.logit_scale, learner.heads.icl_scale):
                scale.clamp_(0, math.log(100))  # CLIP's
        if learner.average:
            learner.average.update(at.step, fine)
        # --------------------------------------------------------------------------------
        due = run.tick(at, losses, args.batch_size, functools.partial(pairs.describe, used),
                       replaced=pairs.replaced(used, asked), lr=lr,
                       scale=student.logit_scale.detach().exp())
        if val and (at.batch == 0 or at.step == at.steps):
            scores = retrieve(run, learner.tested, setup.tokenizer, val, args, texts)
            run.log(at.step, "val", **scores)
            if scores["mean_recall"] > best:
                best = scores["mean_recall"]
                learner.save(at, "checkpoint_best.pt", best=best)
        if due:
            learner.save(at, "checkpoint_last.pt", best=best)
    return at


# -----------------------------------------------------------------------------
# Data, teachers and student

def open_setup(run, args):
    """What the command line names, opened and checked, models on the device -> a namespace: pairs,
    val, test (None if there are none), labelled (sets of --zero-shot), stored (Stored or None),
    teachers, text_teacher (model and tokenizer, or None), student, tokenizer, name (of the
    student's image tower), steps, warmup, counts (pairs of a batch in each process)."""
    pairs, val, test = open_splits(args)
    if val and test and test.paths == val.paths:
        test = None
    named = functools.partial(open_dataset, split="test", data_dir=args.data_dir, whole=True)
    run.on_first(lambda: [len(named(name)) for name in args.zero_shot])  # fetches what is needed
    labelled = [named(name, download=False) for name in args.zero_shot]
    for images in labelled:
        images.check_files()
        require_words(images)
        if [other.name for other in labelled].count(images.name) > 1:
            raise UserError(f"--zero-shot: two sets are called {images.name}; rename one")
    if args.batch_size < run.world_size:
        raise UserError(f"--batch-size {args.batch_size}: expected {run.world_size} or more, one "
                        f"for each process")
    batches = PairBatches(pairs, args.batch_size, 0, run.rank, run.world_size, args.captions)
    steps = min(args.epochs * len(batches), args.max_steps or math.inf)
    warmup = round(args.warmup if args.warmup >= 1 else args.warmup * steps)
    if warmup >= steps:
        raise UserError(f"--warmup {args.warmup:g} is {warmup} steps and the training has {steps}, "
                        f"{len(batches)} an epoch: nothing comes after it")
    steps, warmup = (2, 1) if args.dry_run else (steps, warmup)
    if args.mixup + args.cutmix and args.batch_size % (2 * run.world_size):
        raise UserError(f"--mixup and --cutmix mix two by two: --batch-size {args.batch_size} must "
                        f"be a multiple of {2 * run.world_size}")
    if args.hint + args.attention and 0 < args.micro_batch < batches.counts[0]:
        raise UserError("--hint and --attention need the batch in one piece, without --micro-batch")

    stored = Stored(args.reinforced) if args.reinforced else None
    if stored:
        run.on_first(lambda: stored.check(pairs))
    own_text = args.train_text not in (None, "teacher")
    teachers = stored.teachers if stored else open_teachers(
        run, args.teacher, args.teacher_activation, None if own_text else args.tokenizer)
    scales = args.teacher_scale or ()
    if scales and len(scales) != len(teachers):
        raise UserError(f"--teacher-scale: {len(scales)} numbers for {len(teachers)} teachers")
    for teacher, scale in zip(teachers, scales):
        teacher.scale = scale
    text_teacher = open_text_teacher(args.text_teacher) if args.text_teacher else None
    student, tokenizer = open_student(run, teachers[0], pairs.captions[:8], args)
    if args.export:
        weights.check_layout(student, args.export)
    return types.SimpleNamespace(
        pairs=pairs, val=val, test=test, labelled=labelled, stored=stored, teachers=teachers,
        text_teacher=text_teacher, student=student, tokenizer=tokenizer,
        name=args.model or student.origin["name"], steps=steps, warmup=warmup,
        counts=batches.counts)


def open_student(run, first, captions, args):
    """The CLIP that learns -> model, tokenizer. Its text tower is that of the `first` teacher,
    frozen without --train-text, or one of its own."""
    torch.manual_seed(args.seed)
    own_text = args.train_text not in (None, "teacher")
    source = args.train_text if own_text else args.teacher[0] if args.teacher else first.path
    if args.weights:
        model = weights.load(args.weights)
    else:
        known = canonical_name(args.model) and not pathlib.Path(args.model).exists()
        model = weights.load(
            image_tower=f"{args.model}:none" if known else args.model, text_tower=source,
            proj=first.proj, embed_dim=first.dim, image_size=args.image_size,
            activation=args.teacher_activation or first.activation)
    tokenizer = for_model(model, args.tokenizer)
    run.move(model).fuse_attention(run.fused_attention)
    side = model.config.image_size
    try:
        with torch.no_grad(), evaluating(model):
            image_features(run, model, torch.zeros(1, 3, side, side))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"--image-size: the student {args.model} takes no image of {side} pixels "
                        f"({one_line(error)[:99]})") from error
    if args.train_text:
        return model, tokenizer
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(("visual.", "logit_scale")))
    ours = encode_texts(run, model, tokenizer, captions)
    theirs = first.texts[:len(ours)] if first.model is None else encode_texts(
        run, first.model, first.tokenizer, captions)
    if ours.shape != theirs.shape or (ours * theirs).sum(dim=1).min() < 0.99:
        raise UserError(f"the student's frozen text tower is not that of the teacher {first.name}; "
                        f"give that teacher, or add --train-text")
    return model, tokenizer


def prepare(run, setup, args):
    """Decode, tokenize and encode once what does not change -> (loader, look_up). look_up makes a
    Batch on the device of the loader's images and `used`, the numbers of the captions read."""
    train, stored, looks = setup.pairs, setup.stored, [look_of(setup.student)]
    captions, tokens, similar = train.captions, None, None
    for teacher in () if stored else setup.teachers:
        looks.append(teacher.look)
        teacher.texts = encode_texts(run, teacher.model, teacher.tokenizer, captions)
    if args.train_text:
        tokens = setup.tokenizer(captions, context_length=setup.student.config.context_length)
    if setup.text_teacher:
        model, tokenizer = setup.text_teacher
        similar = encode_texts(run, run.move(model), tokenizer, captions)
        similar = unit(similar - similar.mean(dim=0))  # without what all captions have in common
    held_out = filter(None, (setup.val, setup.test))
    options = decode_once(run, [train, *held_out], run.out / "cache", args)
    if stored:
        shown = ShownPairs(train, stored.views(looks), len(stored.images), args.seed)
    else:
        shown = train.with_transform(Views(looks, args.seed, args.crop, args.randaugment))
    loader = make_pair_loader(shown, args.batch_size, args.seed, args.captions, run.rank,
                              run.world_size, **options)

    def look_up(images, used, epoch):
        views = dict(zip(shown.transform.each, map(run.move, images)))
        q = [run.move(teacher.texts[used]) for teacher in setup.teachers]
        p = stored and [run.move(x) for x in stored.answers(shown, epoch, used)]
        return Batch(views, None if tokens is None else tokens[used], q, p,
                     None if similar is None else run.move(similar[used]))
    return loader, look_up


# -----------------------------------------------------------------------------
# A run

def report(run, student, setup, at, tested, teacher, args):
    """Score the student of step `tested`, write and return what was found. teacher: the scores of
    a live one, or {}."""
    scores = score(run, student, setup.tokenizer, setup, args)
    held = setup.test or setup.val
    run.log(tested, held.split if held else "test", **scores)
    if held and not setup.test:
        run.say("NOTE: no test pairs: val chose the best epoch and is scored, which flatters")
    for name, x in scores.items():
        if name.endswith(("mean_recall", "top1")):
            run.say(f"{'dry run, no result: ' * args.dry_run}{name} {x:.1f} %"
                    + (f", its teacher {teacher[name]:.1f} %" if teacher else ""))
    return run.finish({
        "method": "distill", "data": setup.pairs.name, "model": setup.name,
        "teachers": [some.name for some in setup.teachers], "scored_on": held and held.split,
        **scores, **{f"student_{key}": x for key, x in measure(run, student).items()},
        **{f"teacher_{key}": x for key, x in teacher.items()}, "steps": at.step,
        "tested_step": tested, "epochs": at.epoch, "batch_size": args.batch_size,
        "scale": float(student.logit_scale.detach().exp()), "dry_run": args.dry_run})


def open_result(run, path, folder, setup, args):
    """The student that lies at `path`, exported to the run's folder if that is asked for."""
    student = run.move(weights.load(path)).fuse_attention(run.fused_attention)
    if args.export:
        run.say("wrote " + run.on_first(lambda: str(weights.export(
            student, folder / "export", args.export, setup.tokenizer))))
    return student


def main(args):
    """Train (or score) one student -> the results."""
    run = start(args.device, args.precision, args.seed, args.deterministic)
    setup = open_setup(run, args)
    first, stored = setup.teachers[0], setup.stored
    norms = training_mode(setup.student)  # from here on; scoring puts it back
    words = json.dumps(setup.tokenizer.facts(), sort_keys=True).encode()
    identity = run_identity(
        args, but=("teacher", "reinforced", "weights", "tokenizer"), method="distill",
        model=setup.name, data=setup.pairs.fingerprint, weights=setup.student.origin["sha256"],
        teachers=[(teacher.sha256, teacher.scale) for teacher in setup.teachers],
        train_text=bool(args.train_text),  # the weights say which
        text_teacher=setup.text_teacher and setup.text_teacher[0].origin["sha256"],
        text_teacher_weight=TEXT_TEACHER,  # was a flag once
        vocabulary=hashlib.sha256(words).hexdigest(), stored=stored and stored.facts,
        pieces=[args.micro_batch, run.world_size] if norms else None)  # of BatchNorm's statistics
    name = f"{setup.pairs.name}_{pathlib.Path(setup.name).name}_{'stored' if stored else 'live'}"
    folder = run_folder(args, "train_distill", name)
    checkpoint, finished = run.begin(folder, args, identity)
    if finished:
        open_result(run, folder, folder, setup, args)
        return finished
    if args.eval_only and not (checkpoint or args.weights):
        raise UserError(f"--eval-only: no checkpoint in {folder}; give --output-dir or --weights")
    teacher = {} if stored else (score(run, first.model, first.tokenizer, setup, args)
                                 | measure(run, first.model))
    if teacher and not checkpoint:
        run.log(0, "teacher", **teacher)
    if args.eval_only:
        at = Place(checkpoint["epoch"], checkpoint["batch"], checkpoint["step"]
                   ) if checkpoint else Place()
        path = args.weights if not checkpoint else folder if args.resume == "auto" else args.resume
        tested = at.step
    else:
        at = train(run, setup, checkpoint, args)
        best, path = run.load("checkpoint_best.pt"), folder
        tested = best["step"] if best else at.step
        run.say(f"testing the weights of step {tested}" + ", the best on val" * bool(best))
    student = open_result(run, path, folder, setup, args)
    return report(run, student, setup, at, tested, teacher, args)


# -----------------------------------------------------------------------------
# The command line

DEFAULTS = {"model": "mobilenet_v3_small", "epochs": 30, "batch_size": 256, "lr": 1e-3,
            "crop": 0.4, "zero_shot": []}
DEMO = {"teacher": [str(pathlib.Path(__file__).resolve().parent / "assets" / "demo_teacher.pt")],
        "model": "tiny-vit", "image_size": 64, "epochs": 24, "batch_size": 64, "lr": 2e-3,
        "crop": 0.6, "zero_shot": ["demo"]}
EXACT = "the batch is exact whatever fits; --micro-batch says how many pairs are encoded at a time"
REFUSED = {"--accum-freq": EXACT, "--accum-steps": EXACT, "--gradient-accumulation-steps": EXACT,
           "--max-text": "every text tower reads as many tokens as it takes",
           "--text-teacher-weight": "its share of the task's targets is 0.2; see --text-teacher",
           "--views": "it is a flag of python -m tools.reinforce"}


def get_args(argv=None):
    """The command line as a namespace. Exits with code 2 and one line on a wrong one."""
    parser = Parser(description="Distillation of CLIP.", refused=REFUSED,
                    aliases={"--templates": "--template"})
    add_pair_flags(parser)
    add = parser.add_argument_group("student").add_argument
    add("--model", help="image tower: [timm:]NAME[:WEIGHTS] or CLIP (default: mobilenet_v3_small)")
    add("--weights", help="a CLIP to go on from, instead of --model")
    add("--image-size", type=whole(8), help="pixels per side (default: the tower's own)")
    add("--train-text", nargs="?", const="teacher", metavar="TOWER", help="train a text tower too: "
        "the teacher's, or TOWER, a BERT's folder or NAME:none (default: the teacher's, frozen)")
    add("--tokenizer", help="file or folder of the text tower's vocabulary")
    add = parser.add_argument_group("teachers").add_argument
    add("--teacher", nargs="+", help="one CLIP or several: names, files or folders")
    add("--teacher-scale", nargs="+", type=number(0, 1e3, True), help="default: what each learned")
    add("--teacher-activation", choices=("quick_gelu", "gelu"), help="where its file does not say")
    add("--reinforced", metavar="FOLDER", help="a stored teacher, see python -m tools.reinforce")
    add("--text-teacher", metavar="FOLDER", help="a BERT whose similarities soften the targets")
    add("--ema-teacher", type=number(0, 0.5), default=0.0,
        help="weight of CRD against the averaged student")
    add = parser.add_argument_group("method").add_argument
    add("--task", type=number(), default=0.25, help="weight of InfoNCE (default: 0.25)")
    add("--crd", type=number(), default=1.0, help="weight of the teachers' softmax (default: 1)")
    add("--fd", type=number(), default=8.0, help="weight of 1 - cos to their features (default: 8)")
    add("--icl", type=number(), help="weight of InfoNCE to teachers (default: 1 if text trains)")
    add("--hint", type=number(), default=0.0, help="weight of matching feature maps")
    add("--attention", type=number(), default=0.0, help="weight of matching attention maps")
    add("--mixup", type=number(), default=0.0, help="alpha of Beta (default: 0, off)")
    add("--cutmix", type=number(), default=0.0, help="alpha of Beta (default: 0, off)")
    add("--crop", type=number(0, 1), help="least share of an image in view, 0: all (default: 0.4)")
    add("--randaugment", action="store_true", help="two random RandAugment operations a view")
    add("--ema", type=number(0, 0.999999), default=0.0, help="decay of averaged, tested weights")
    add("--epochs", type=whole(1), help="default: 30")
    add("--max-steps", type=whole(0), default=0, help="most steps; the cosine ends there (0: off)")
    add("--batch-size", type=whole(2), help="pairs in a step, of all processes (default: 256)")
    add("--micro-batch", type=whole(0), default=0, help="encoded at a time (default: 0, all)")
    add("--lr", type=number(0, 1e3, above=True), help="default: 1e-3")
    add("--wd", type=number(), default=0.1, help="decay of all but gains and biases (default: 0.1)")
    add("--warmup", type=number(), default=0.05, help="steps, or below 1 a share (default: 0.05)")
    add("--grad-clip", type=number(), default=1.0, help="largest norm, 0: none (default: 1)")
    add = parser.add_argument_group("scores").add_argument
    add("--zero-shot", nargs="+", metavar="DATA", help="labelled images: names, or class folders")
    add("--template", dest="templates", nargs="+", metavar="TEXT", help="prompts, {} is the class")
    add_run_flags(parser)
    args = parser.parse_args(argv)

    demo = args.data == "demo"
    for wrong, line in (
            (args.weights and args.model, "--weights brings its image tower; leave --model out"),
            (not (args.teacher or args.reinforced or demo), "--teacher is missing: name a CLIP"),
            (args.ema_teacher and not args.ema, "--ema-teacher needs --ema, the average's decay"),
            (args.text_teacher and not args.task, "--text-teacher softens the targets of --task: "
             "give that a weight"),
            (args.icl and not args.train_text,
             "--icl needs --train-text: with frozen text it is --task"),
            (args.reinforced and args.hint + args.attention,
             "--hint and --attention need a teacher that runs"),
            (args.reinforced and (args.crop is not None or args.randaugment),
             "--reinforced brings its views; leave --crop and --randaugment out"),
            (not any(x for name, x in term_weights(args, 0).items() if name != "text_teacher"),
             "--task, --crd, --fd and all other weights are 0 (--ema-teacher's at first)")):
        if wrong:
            parser.error(line)
    for name, value in {**DEFAULTS, **(DEMO if demo else {})}.items():
        brought = {"teacher": args.reinforced, "crop": args.reinforced,
                   "model": args.weights}.get(name)
        if getattr(args, name) is None and not brought:
            setattr(args, name, value)
    return args


if __name__ == "__main__":
    sys.exit(guard(main, get_args))
