"""The distillation script: losses, the exact step, stored teachers, shards, zero-shot, faults."""
import contextlib
import copy
import csv
import dataclasses
import gzip
import io
import json
import math
import os
import pathlib
import subprocess
import sys
import tarfile
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip_model
import train_distill
from clip_model import CLIP, CONFIGS, load, save, unit
from data import (distort, DISTORTIONS, expand, make_pair_loader, open_pairs, open_zero_shot,
                  prompts_per_class, read_tars, sample_seed, ShardTeacher, source_weights,
                  StoredTeacher, STRENGTHS, Views)
from device import SafeStop, start, UserError
from test_train_contrastive import batch_of, model_of, scenes
from train_distill import (Adapters, add_gradient, affinity, Average, Batch, distance, draw_mix,
                           Encoder, get_args, Inside, main, match_keys, match_similarities, Mix,
                           plain_copy, share_projection, Sides, State, Target, Teacher,
                           term_weights, text_pieces, text_relation, training_mode)

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOUBLE = torch.float64


def run_main(*flags):
    return main(get_args([str(flag) for flag in flags]))


def randoms(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def units(n, dim=7, seed=0):
    return unit(randoms(n, dim, seed=seed))


def soft_cross_entropy(target, logits):
    return -(target * logits.log_softmax(dim=-1)).sum(dim=-1).mean()


def mixing(n, mix):
    """The matrix of what image i shows of image j."""
    eye = torch.eye(n, dtype=DOUBLE)
    return mix.share * eye + (1 - mix.share) * eye[(torch.arange(n) + n // 2) % n]


def defined_similarities(image, text, scale, task, teachers, mix, stored=False):
    """Task and CRD by definition, on whole matrices. teachers: [(weight, image, text, scale)]."""
    z, T = scale * image @ text.T, mixing(len(image), mix)
    total = task * (soft_cross_entropy(T, z) + soft_cross_entropy(T.T, z.T)) / 2
    for weight, p, q, s in teachers:
        rows, columns = (s * p @ q.T).softmax(dim=1), (s * p @ q.T).softmax(dim=0)
        if stored:
            rows, columns = T @ rows, T @ columns
        total = total + weight * (soft_cross_entropy(rows, z)
                                  + soft_cross_entropy(columns.T, z.T)) / 2
    return total


def gradients(loss, *points):
    leaves = [x.clone().requires_grad_() for x in points]
    value = loss(*leaves)
    return value.detach(), *torch.autograd.grad(value, leaves)


# -----------------------------------------------------------------------------
# The losses on embeddings

@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("mix", [Mix(), Mix(0.7)], ids=["plain", "mixed"])
def test_tiles_give_the_losses_and_gradients_of_the_definition(mix, stored):
    """Two teachers of other widths; N = 11, tiles of 1, 4 and all."""
    image, text, scale = units(11), units(11, seed=1), torch.tensor(9.0, dtype=DOUBLE)
    answers, keys = [units(11, d, d) for d in (5, 3)], [units(11, d, d + 1) for d in (5, 3)]
    truth = gradients(lambda v, s, t: defined_similarities(
        v, s, t, 0.25, [(0.35, *pair) for pair in zip(answers, keys, (20.0, 50.0))], mix, stored),
        image, text, scale)
    assert truth[0] > 0.1
    for tile in (1, 4, 64):
        found, values = match_similarities(
            Sides(image, text), scale, 0.25, affinity("crd", (20.0, 50.0), answers, keys, 0.7, mix,
                                                      stored), mix, tile)
        assert sum(values.values()) == pytest.approx(float(truth[0]), abs=1e-12)
        for ours, theirs in zip(found, truth[1:]):
            assert (ours - theirs).abs().max() < 1e-12


def test_crd_is_the_kl_divergence_and_has_no_slope_at_a_student_equal_to_its_teacher():
    image, text, p, q = (units(9, seed=i) for i in range(4))
    scale = torch.tensor(12.0, dtype=DOUBLE)

    def kl(v, s):
        z, y = scale * v @ s.T, 30 * p @ q.T
        return sum(F.kl_div(a.log_softmax(1), b.log_softmax(1), reduction="batchmean",
                            log_target=True) for a, b in ((z, y), (z.T, y.T))) / 2
    truth = gradients(kl, image, text)
    found, values = match_similarities(Sides(image, text), scale, 0.0,
                                       [Target("crd", 1.0, p, q, 30.0)], Mix(), 4)
    assert max((a - b).abs().max() for a, b in zip(found, truth[1:])) < 1e-12
    y = 30 * p @ q.T
    entropy = sum(-(x.softmax(1) * x.log_softmax(1)).sum(1).mean() for x in (y, y.T)) / 2
    assert values["crd"] - entropy == pytest.approx(float(truth[0]), abs=1e-12)
    same, values = match_similarities(Sides(p, q), torch.tensor(30.0, dtype=DOUBLE), 0.0,
                                      [Target("crd", 1.0, p, q, 30.0)], Mix(), 4)
    assert values["crd"] == pytest.approx(float(entropy), abs=1e-12)
    assert max(float(torch.as_tensor(g).abs().max()) for g in same) < 1e-12


def test_two_equal_teachers_are_one_and_scales_matter():
    image, text, p, q = (units(8, seed=i) for i in range(4))
    scale = torch.tensor(9.0, dtype=DOUBLE)

    def gradient(*scales):
        K = len(scales)
        targets = affinity("crd", scales, [p] * K, [q] * K, 1.0, Mix(), False)
        assert sum(t.weight for t in targets) == pytest.approx(1.0)
        return match_similarities(Sides(image, text), scale, 0.0, targets, Mix(), 64)[0].image
    one, two = gradient(20.0), gradient(20.0, 20.0)
    assert (one - two).abs().max() < 1e-15
    assert (one - gradient(20.0, 50.0)).abs().max() > 1e-3
    # Averages are taken of probabilities: of rows for rows and of columns for columns.
    z = [s * p @ q.T for s in (20.0, 50.0)]
    assert (sum(x.softmax(0) for x in z) / 2).sum(0).allclose(torch.ones(8, dtype=DOUBLE))
    assert ((sum(x.softmax(1) for x in z) / 2).T.sum(1) - 1).abs().max() > 0.01


def test_fd_is_half_the_squared_distance_and_knows_neither_length_nor_width():
    for dim in (64, 512):
        a, b = randoms(6, dim), units(6, dim, seed=1)
        assert distance(a, b) == pytest.approx(float((unit(a) - b).square().sum() / 2))
        assert distance(10 * a, b) == pytest.approx(float(distance(a, b)))
    angle = 0.3
    for dim in (64, 512):
        a = F.one_hot(torch.tensor([0]), dim).double()
        b = math.cos(angle) * a + math.sin(angle) * F.one_hot(torch.tensor([1]), dim)
        assert distance(a, b) == pytest.approx(1 - math.cos(angle))


@pytest.mark.parametrize("tile", [2, 64])
def test_icl_and_its_scale_have_the_gradients_of_the_definition(tile):
    anchors, keys, scale = units(6), units(6, seed=1), torch.tensor(14.0, dtype=DOUBLE)
    mix = Mix(0.6)

    def defined(a, s):
        return soft_cross_entropy(mixing(6, mix), s * a @ keys.T) * 6
    truth = gradients(defined, anchors, scale)
    value, *found = match_keys(anchors, keys, mix.blend(keys), scale, tile)
    assert value == pytest.approx(float(truth[0]), abs=1e-12)
    assert max((a - b).abs().max() for a, b in zip(found, truth[1:])) < 1e-12


def test_icl_repeats_the_task_where_the_text_tower_is_the_teachers():
    """Which is why it is off then: its rows are the task's rows, and its columns move nothing."""
    image, text = units(6), units(6, seed=1)
    value, *_ = match_keys(image, text, text, torch.tensor(9.0, dtype=DOUBLE), 64)
    assert value / 6 == pytest.approx(float(F.cross_entropy(9 * image @ text.T, torch.arange(6))))
    args = get_args(["--icl", "2"])
    assert term_weights(args, False, 0, 10)["icl"] == 0 and term_weights(args, True, 0, 10)["icl"] == 2
    assert term_weights(get_args([]), True, 0, 10)["icl"] == 1


@pytest.mark.parametrize("tile", [2, 64])
def test_the_text_teachers_relation_has_the_gradient_of_the_definition(tile):
    text, other = units(7), units(7, 4, seed=1)

    def defined(text):
        total = 0.0
        for i in range(7):
            rest = [j for j in range(7) if j != i]
            z, y = text[rest] @ text[i] / 0.1, other[rest] @ other[i] / 0.1
            total = total + (y.softmax(0) * (y.log_softmax(0) - z.log_softmax(0))).sum()
        return total / 7
    value, gradient = gradients(defined, text)
    found = text_relation(Sides(text, text), other, 0.1, tile)
    assert found[0] == pytest.approx(float(value), abs=1e-12)
    assert (found[1] - gradient).abs().max() < 1e-12


# -----------------------------------------------------------------------------
# Losses on maps

def two_towers():
    torch.manual_seed(0)
    teacher = CLIP(dataclasses.replace(CONFIGS["tiny-vit"], image_size=32)).eval()   # 4 x 4
    student = load(None, "mobilevit_xxs:none", "tiny-vit:none", embed_dim=32, image_size=32)
    return student, teacher


def test_maps_are_compared_on_the_coarser_grid_and_the_relation_ignores_rotations():
    student, teacher = two_towers()
    weights = {"relation": 1.0, "hint": 1.0, "attention": 1.0}
    inside = Inside(student, teacher, weights)
    images = torch.randn(3, 3, 32, 32)
    embedding, goal, attention = inside.look(teacher.visual, images)
    assert inside.grid == 4 and goal.shape == (3, 64, 4, 4)  # 17 tokens less the class token
    assert embedding.allclose(teacher.encode_image(images), atol=1e-5)
    assert attention.shape == (3, 16) and attention.sum(dim=1).allclose(torch.ones(3))
    map_ = torch.randn(3, 64, 4, 4)
    rotation = torch.linalg.qr(torch.randn(64, 64))[0]
    turned = torch.einsum("ij,bjhw->bihw", rotation, map_)
    inside.hint = torch.nn.Identity()
    one, two = inside(map_, goal, attention), inside(turned, goal, attention)
    assert one["relation"] > 0.1 and one["relation"].allclose(two["relation"], rtol=1e-4)
    assert not one["hint"].allclose(two["hint"], rtol=1e-2)
    own = map_.square().sum(1).flatten(1)
    same = inside(map_, map_, own / own.sum(dim=1, keepdim=True))
    assert same["relation"] < 1e-6 and same["attention"].abs() < 1e-4
    fine = inside(torch.randn(3, 64, 8, 8), goal, attention)  # a finer map is averaged down
    assert all(torch.isfinite(x) for x in fine.values())


def test_maps_inside_fade_and_are_refused_where_they_do_not_exist():
    args = get_args(["--relation", "2", "--inside-until", "0.5"])
    assert [term_weights(args, False, step, 100)["relation"] for step in (0, 25, 50, 99)] == [2, 1, 0, 0]
    student, teacher = two_towers()
    student.visual.tap_channels = {}
    with pytest.raises(UserError, match="needs? maps inside the student's image tower"):
        Inside(student, teacher, {"relation": 1.0, "hint": 0.0, "attention": 0.0})


# -----------------------------------------------------------------------------
# Mixing and averages

def test_mixing_is_exact_about_its_shares_and_partners():
    images = torch.randint(0, 255, (6, 3, 16, 16), dtype=torch.uint8)
    run = start("cpu", "fp32")
    model = types.SimpleNamespace(image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4))
    whole = slice(None)
    plain = Mix().view(run, images, whole, model)
    assert Mix(1.0).view(run, images, whole, model).equal(plain)
    mixed = Mix(0.7).view(run, images, whole, model)
    assert mixed.allclose(0.7 * plain + 0.3 * plain[[3, 4, 5, 0, 1, 2]], atol=1e-6)
    assert Mix(0.7).view(run, images, slice(2, 4), model).equal(mixed[2:4])  # a piece of it
    args = get_args(["--cutmix", "1", "--mix-prob", "1"])
    for step in range(20):
        mix = draw_mix(args, step, 16)
        cut = mix.view(run, images, whole, model)
        kept = (cut == plain).all(dim=1).float().mean(dim=(1, 2))
        assert kept.allclose(torch.full((6,), mix.share))  # random pixels: none are equal
    x = randoms(6, 4)
    T = mixing(6, Mix(0.7))
    assert Mix(0.7).blend(x).allclose(T @ x) and Mix(0.7).back(x).allclose(T.T @ x)
    assert T.sum(0).allclose(torch.ones(6, dtype=DOUBLE)) and T.sum(1).allclose(T.sum(0))


def test_mixed_targets_are_the_two_labels_cross_entropies_and_draws_repeat():
    image, text = units(6), units(6, seed=1)
    z, partners = 9 * image @ text.T, torch.tensor([3, 4, 5, 0, 1, 2])
    _, values = match_similarities(Sides(image, text), torch.tensor(9.0, dtype=DOUBLE), 1.0, [],
                                   Mix(0.7), 64)
    ways = [0.7 * F.cross_entropy(a, torch.arange(6)) + 0.3 * F.cross_entropy(a, partners)
            for a in (z, z.T)]
    assert values["task"] == pytest.approx(float(sum(ways) / 2), abs=1e-12)
    args = get_args(["--mixup", "0.4", "--cutmix", "1"])
    draws = [draw_mix(args, step, 32) for step in range(400)]
    assert draws == [draw_mix(args, step, 32) for step in range(400)]
    kinds = [0 if m.share == 1 and not m.box else 1 if m.box else 2 for m in draws]
    assert 150 < kinds.count(0) < 250 and min(kinds.count(1), kinds.count(2)) > 60
    assert all(draw_mix(get_args([]), step, 32) == Mix() for step in range(5))


def test_the_average_is_the_closed_form_with_its_warm_up_and_copies_integers():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).double()
    model[0].bias.requires_grad_(False)
    average = Average(model, 0.9)
    assert average.model[0].bias is model[0].bias  # what is frozen is shared
    history, expected = [], model[0].weight.detach().clone()
    for n in range(12):
        with torch.no_grad():
            model[0].weight.copy_(randoms(2, 2, seed=n))
            model[1].running_mean.fill_(n)
            model[1].num_batches_tracked.fill_(n)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
        history.append(decay)
        average.update()
    assert average.model[0].weight.allclose(expected, atol=1e-12)
    assert int(average.model[1].num_batches_tracked) == 11
    assert history[0] == pytest.approx(0.1) and (1 + 100) / (10 + 100) == pytest.approx(0.918, abs=1e-3)


# -----------------------------------------------------------------------------
# The exact step

WEIGHTS = {"task": 0.25, "crd": 1.0, "fd": 8.0, "icl": 0.5, "relation": 0.0, "hint": 0.0,
           "attention": 0.0, "ema": 0.0, "text_relation": 0.3}
OPTIONS = types.SimpleNamespace(micro_batch=0, tile=1024, text_teacher_weight=0.3,
                                text_teacher_temp=0.1)


def options(**changes):
    return types.SimpleNamespace(**{**vars(OPTIONS), **changes})


class Scene:
    """A student with dropout in a text tower that trains, two teachers of widths 32 and 24, all in
    fp64, and a batch of n pairs."""

    def __init__(self, n=8, dropout=0.0, stored=False, frozen=False):
        self.model = model_of(DOUBLE, dropout)
        del self.model.logit_bias
        torch.manual_seed(3)
        self.teachers = []
        for dim, scale in ((32, 20.0), (24, 50.0)):
            clip = CLIP(dataclasses.replace(CONFIGS["tiny-vit"], embed_dim=dim)).to(DOUBLE).eval()
            self.teachers.append(Teacher(f"t{dim}", scale, dim, clip.requires_grad_(False)))
        self.adapters = Adapters(32, [32, 24], not frozen).to(DOUBLE)
        images, tokens, _ = batch_of(n, DOUBLE)
        keys = [units(n, dim, dim) for dim in (32, 24)]
        answers = [units(n, dim, dim + 1) if stored else None for dim in (32, 24)]
        self.batch = Batch((images,), None if frozen else tokens, keys[0] if frozen else None,
                           answers, keys, units(n, 5, 9))
        self.stored = stored
        if frozen:
            for name, p in self.model.named_parameters():
                p.requires_grad_(name.startswith(("visual.", "logit_scale")))

    def parameters(self):
        return {**dict(self.model.named_parameters()),
                **{f"adapters.{n}": p for n, p in self.adapters.named_parameters()}}

    def grads(self):
        return {n: p.grad.clone() for n, p in self.parameters().items() if p.grad is not None}

    def step(self, args=OPTIONS, mix=Mix(), weights=WEIGHTS, run=None, inside=None, seed=5,
             average=None):
        run = run or start("cpu", "fp32")
        for p in self.parameters().values():
            p.grad = None
        found = add_gradient(run, self.model, (self.adapters, inside), self.teachers, self.batch,
                             [len(self.batch.images[0])], weights, mix, args, run.scaler(), seed,
                             average)
        return found, self.grads()

    def defined(self, args=OPTIONS, mix=Mix(), seed=5):
        """Loss and gradients by plain autograd on whole matrices."""
        for p in self.parameters().values():
            p.grad = None
        run, batch, n = start("cpu", "fp32"), self.batch, len(self.batch.images[0])
        encoder = Encoder(run, self.model, seed, mix)
        micro = args.micro_batch or n
        image = torch.cat([encoder.one("image", i, (batch.images[0], slice(k, k + micro)))[0]
                           for i, k in enumerate(range(0, n, micro))])
        if batch.tokens is None:
            text = batch.text
        else:
            parts, places = text_pieces(batch.tokens, micro, self.model.pad_id)
            text = torch.cat([encoder.one("text", i, p)[0] for i, p in enumerate(parts)])[places]
        T, w = mixing(n, mix), WEIGHTS
        answers = batch.answers if self.stored else [
            unit(t.model.encode_image(mix.view(run, batch.images[0], slice(None), t.model)))
            for t in self.teachers]
        told = [(w["crd"] / 2, a, k, t.scale) for a, k, t in zip(answers, batch.keys, self.teachers)]
        scale, other = self.model.logit_scale.exp(), batch.other
        a = args.text_teacher_weight if batch.tokens is None else 0.0
        total = defined_similarities(image, text, scale, (1 - a) * w["task"], told, mix, self.stored)
        total = total + defined_similarities(image, text, scale, 0.0, [
            (a * w["task"], other, other, 1 / args.text_teacher_temp)], mix, stored=True)
        icl = self.adapters.icl_scale.exp()
        for k in range(2):
            goal = answers[k] if not self.stored else unit(T @ answers[k])
            features = self.adapters.image[k](image)
            total = total + w["fd"] * (1 - F.cosine_similarity(features, goal)).mean() / 2
            if batch.tokens is not None:
                total = total + w["icl"] / 4 * soft_cross_entropy(
                    T, icl * unit(features) @ batch.keys[k].T)
                features = self.adapters.text[k](text)
                total = total + w["fd"] * (1 - F.cosine_similarity(features, batch.keys[k])).mean() / 2
                goals = torch.eye(n, dtype=DOUBLE) if self.stored else T.T
                total = total + w["icl"] / 4 * soft_cross_entropy(
                    goals, icl * unit(features) @ answers[k].T)
        if batch.tokens is not None:
            off = torch.eye(n, dtype=torch.bool)
            z, y = ((x @ x.T / 0.1).masked_fill(off, -1e9) for x in (text, other))
            total = total + args.text_teacher_weight * F.kl_div(
                z.log_softmax(1), y.log_softmax(1), reduction="batchmean", log_target=True)
        total.backward()
        return total.detach(), self.grads()


def largest_error(ours, theirs):
    assert set(ours) == set(theirs)
    return max(float((ours[n] - g).abs().max() / max(g.abs().max(), 1e-6)) for n, g in theirs.items())


@pytest.mark.parametrize("frozen", [False, True], ids=["text trains", "text frozen"])
@pytest.mark.parametrize("stored", [False, True], ids=["live", "stored"])
@pytest.mark.parametrize("mix", [Mix(), Mix(0.7)], ids=["plain", "mixed"])
def test_the_step_in_pieces_and_tiles_has_the_gradient_of_the_definition(mix, stored, frozen):
    """All losses on embeddings, two teachers, dropout: whole, and in pieces of 3 and tiles of 5."""
    weights = {**WEIGHTS, "icl": 0.0 if frozen else 0.5}
    for args in (options(), options(micro_batch=3, tile=5)):
        scene = Scene(dropout=0.2, stored=stored, frozen=frozen)
        loss, truth = scene.defined(args, mix)
        found, ours = scene.step(args, mix, weights)
        ours = {n: g for n, g in ours.items() if n in truth or g.abs().max() > 0}
        assert float(found["loss"]) == pytest.approx(float(loss), rel=1e-12)
        assert largest_error(ours, truth) < 1e-9
        assert truth["logit_scale"].abs() > 1e-6 and "visual.conv1.weight" in truth


def test_the_naive_accumulation_is_another_gradient():
    scene = Scene(frozen=True)
    _, whole = scene.step()
    parts = []
    for k in range(2):
        rows = slice(4 * k, 4 * k + 4)
        half = copy.copy(scene)
        half.batch = Batch((scene.batch.images[0][rows],), None, scene.batch.text[rows],
                           scene.batch.answers, [x[rows] for x in scene.batch.keys],
                           scene.batch.other[rows])
        parts.append(half.step()[1])
    naive = {n: (parts[0][n] + parts[1][n]) / 2 for n in whole}
    assert largest_error(naive, whole) > 1e-2


def test_losses_inside_the_towers_are_exact_in_pieces():
    student, teacher = two_towers()
    student.eval()  # BatchNorm's statistics fixed, or pieces would have others
    weights = {**WEIGHTS, "icl": 0.0, "relation": 1.0, "hint": 0.5, "attention": 0.3}
    inside = Inside(student, teacher, weights)
    images = torch.randint(0, 255, (6, 3, 32, 32), dtype=torch.uint8)
    keys = [units(6, 32).float()]
    scene = types.SimpleNamespace(
        model=student, adapters=Adapters(32, [32], False), stored=False,
        teachers=[Teacher("t", 20.0, 32, teacher.requires_grad_(False))],
        batch=Batch((images,), None, keys[0], [None], keys, None))
    scene.parameters = lambda: {**dict(student.named_parameters()), **dict(
        inside.named_parameters(prefix="inside"))}
    scene.grads = lambda: {n: p.grad.clone() for n, p in scene.parameters().items()
                           if p.grad is not None}
    one, whole = Scene.step(scene, options(), weights=weights, inside=inside)
    two, pieces = Scene.step(scene, options(micro_batch=4), weights=weights, inside=inside)
    assert largest_error({n: g for n, g in pieces.items() if whole[n].abs().max() > 1e-4}, {
        n: g for n, g in whole.items() if g.abs().max() > 1e-4}) < 1e-3
    for name in ("relation", "hint", "attention", "loss"):
        assert float(one[name]) == pytest.approx(float(two[name]), rel=1e-4)
    assert whole["inside.hint.weight"].abs().max() > 0


def test_batchnorm_counts_each_sample_once():
    student, teacher = two_towers()
    student.train()
    norm = next(m for m in student.modules() if isinstance(m, torch.nn.BatchNorm2d))
    images = torch.randint(0, 255, (6, 3, 32, 32), dtype=torch.uint8)
    keys = [units(6, 32).float()]
    scene = types.SimpleNamespace(
        model=student, adapters=Adapters(32, [32], False), parameters=dict, grads=dict,
        teachers=[Teacher("t", 20.0, 32, teacher)],
        batch=Batch((images,), None, keys[0], [None], keys, None))
    with torch.no_grad():
        x = Mix().view(start("cpu", "fp32"), images, slice(None), student)
        expected = torch.zeros_like(norm.running_mean)
        first = copy.deepcopy(student.visual).train()
        probe = next(m for m in first.modules() if isinstance(m, torch.nn.BatchNorm2d))
        for rows in (slice(3, 6), slice(0, 3)):  # the last piece goes first
            first(x[rows])
        expected = probe.running_mean.clone()
    Scene.step(scene, options(micro_batch=3), weights={**WEIGHTS, "icl": 0.0})
    assert norm.running_mean.allclose(expected, atol=1e-6) and norm.running_mean.abs().max() > 1e-3


def test_the_averaged_student_teaches_with_its_own_weight():
    scene = Scene(frozen=True)
    average = copy.deepcopy(scene.model).eval()
    base = scene.step(weights={**WEIGHTS, "icl": 0.0})[1]
    with_it = scene.step(weights={**WEIGHTS, "icl": 0.0, "ema": 0.5}, average=average)
    assert float(with_it[0]["ema"]) > 0 and largest_error(with_it[1], base) < 1e-6  # equal to itself
    with torch.no_grad():
        for p in average.visual.parameters():
            p.add_(0.05 * torch.randn_like(p))
    other = scene.step(weights={**WEIGHTS, "icl": 0.0, "ema": 0.5}, average=average)[1]
    assert largest_error(other, base) > 1e-3


def test_bf16_towers_change_the_loss_by_less_than_two_percent():
    student, teacher = two_towers()
    student.eval()
    images = torch.randint(0, 255, (8, 3, 32, 32), dtype=torch.uint8)
    keys = [units(8, 32).float()]
    losses = {}
    for precision in ("fp32", "bf16"):
        scene = types.SimpleNamespace(
            model=student, adapters=Adapters(32, [32], False), parameters=dict, grads=dict,
            teachers=[Teacher("t", 20.0, 32, teacher)],
            batch=Batch((images,), None, keys[0], [None], keys, None))
        losses[precision] = float(Scene.step(scene, run=start("cpu", precision),
                                             weights={**WEIGHTS, "icl": 0.0})[0]["loss"])
    assert 0 < abs(losses["bf16"] / losses["fp32"] - 1) < 0.02
