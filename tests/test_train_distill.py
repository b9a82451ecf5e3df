"""The distillation script: losses, the exact step, stored teachers, shards, zero-shot, faults."""
import contextlib
import copy
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

import train_distill
from clip_model import CLIP, CONFIGS, evaluating, load, save, unit
from data import (distort, DISTORTIONS, expand, make_pair_loader, open_pairs, open_zero_shot,
                  prompts_per_class, read_tars, read_templates, ShardTeacher, source_weights, StoredPairs,
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


@pytest.mark.parametrize("mix", [Mix(), Mix(0.7)], ids=["plain", "mixed"])
def test_targets_are_distributions_both_ways(mix):
    """Where all of a student's similarities are equal, the cross-entropy to any distribution is
    ln N; a transposed softmax, whose columns sum to anything, gives another number. And the slope
    along what is common to all is 0."""
    same = unit(torch.ones(8, 7, dtype=DOUBLE))
    targets = affinity("crd", (20.0, 50.0), [units(8, 5, 1), units(8, 3, 2)],
                       [units(8, 5, 3), units(8, 3, 4)], 1.0, mix, stored=True)
    scale = torch.tensor(9.0, dtype=DOUBLE)
    found, values = match_similarities(Sides(same, same), scale, 0.0, targets, mix, 3)
    assert values["crd"] == pytest.approx(math.log(8), abs=1e-12)
    assert abs(float(found.scale)) < 1e-12
    z = randoms(8, 8, seed=5)  # and of each row and column apart: constants added to them
    image = torch.linalg.qr(randoms(8, 8, seed=6))[0]
    text = (image.T @ z).T.contiguous()  # image @ text.T == z
    one = match_similarities(Sides(image, text), scale, 0.0, targets, mix, 3)[1]["crd"]
    T = sum(t.weight * ((t.scale * t.image @ t.text.T).softmax(1)
                        + (t.scale * t.image @ t.text.T).softmax(0)) for t in targets)
    assert T.sum() == pytest.approx(16.0)
    norms = ((9 * z).logsumexp(1).sum() + (9 * z).logsumexp(0).sum() - (T * 9 * z).sum()) / 16
    assert one == pytest.approx(float(norms), abs=1e-12)


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


def test_each_model_sees_the_image_with_its_own_statistics():
    run, images = start("cpu", "fp32"), torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8)
    student, teacher = two_towers()
    student.eval()
    found, _ = Teacher("t", 20.0, 32, teacher).look(run, images, [slice(0, 3), slice(3, 4)], Mix())
    told = Encoder(run, student, 0).one("image", 0, (images, slice(None)))[0]
    for model, features in ((teacher, found), (student, told)):
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.image_mean, model.image_std))
        own = model.encode_image((images / 255 - mean) / std, normalize=True)
        assert features.allclose(own, atol=1e-5)
    assert student.image_mean != teacher.image_mean


def test_weight_decay_spares_vectors_and_tables():
    student, _ = two_towers()
    student.visual.embedding = torch.nn.Embedding(3, 4)  # a table whose rows are looked up
    student.text_projection.requires_grad_(False)
    adapters = Adapters(32, [24], True)
    groups = train_distill.decay_groups(student, (adapters, None), types.SimpleNamespace(
        lr=1.0, wd=0.5))
    held = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    named = {**dict(student.named_parameters()), **dict(adapters.named_parameters())}
    assert len(held) == len(named) - 1 and id(student.text_projection) not in held
    for name, p in named.items():
        spared = p.ndim < 2 or "embedding" in name
        assert name == "text_projection" or held[id(p)] == (0.0 if spared else 0.5), name
    assert held[id(adapters.image[0].weight)] == 0.5 and held[id(adapters.icl_scale)] == 0.0


def test_what_is_frozen_stays_so_after_an_evaluation(school, tmp_path):
    """Two epochs with BatchNorm frozen, scored after each: its statistics are those of the start,
    and a tower of dropout that does not train stays in eval mode."""
    run_main(*flags(school, "--model", "mobilevit_xxs", "--image-size", "32", "--bn", "freeze",
                    "--output-dir", tmp_path))
    buffers = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)["buffers"]
    tracked = [tensor for name, tensor in buffers.items() if name.endswith("batches_tracked")]
    assert len(tracked) > 10 and not torch.stack(tracked).any()
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout()))
    model[1].eval()
    with pytest.raises(KeyError), evaluating(model):
        assert not model[0].training
        raise KeyError
    assert [m.training for m in model.modules()] == [True, True, False, False]


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


@pytest.mark.parametrize("stored", [False, True], ids=["live", "stored"])
def test_in_an_odd_batch_partners_are_no_couples_and_the_gradient_is_exact(stored):
    """What an image shows of a text and what a text is shown of by images then differ."""
    scene, mix = Scene(n=7, stored=stored), Mix(0.7)
    assert not mixing(7, mix).equal(mixing(7, mix).T)
    loss, truth = scene.defined(options(), mix)
    found, ours = scene.step(options(), mix)
    assert float(found["loss"]) == pytest.approx(float(loss), rel=1e-12)
    assert largest_error({n: ours[n] for n in truth}, truth) < 1e-9


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
    faded = {**weights, "relation": 0.5, "hint": 0.25, "attention": 0.15}
    three, half = Scene.step(scene, options(), weights=faded, inside=inside)
    assert half["inside.hint.weight"].allclose(0.5 * whole["inside.hint.weight"], atol=1e-7)
    assert float(three["relation"]) == pytest.approx(float(one["relation"]), rel=1e-5)
    assert "relation" not in Scene.step(scene, options(), weights={**WEIGHTS, "icl": 0.0},
                                        inside=inside)[0]


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


# -----------------------------------------------------------------------------
# What distillation is for

class Toy(torch.nn.Module):
    """Anything with `encode_image` learns: an MLP over 192 numbers that pass for 3 x 8 x 8 pixels."""
    image_mean, image_std = (0.0,) * 3, (1.0,) * 3

    def __init__(self, *layers):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Flatten(), *layers)
        self.logit_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, images, normalize=False):
        features = self.layers(images)
        return unit(features) if normalize else features


def test_a_student_learns_more_from_a_good_teacher_than_from_pairs_alone():
    """64 classes in noise, 256 pairs for the student; the teacher has seen 16,384."""
    draw = torch.Generator().manual_seed(0)
    centres, texts = torch.randn(64, 192, generator=draw), unit(torch.randn(64, 32, generator=draw))

    def sample(n):
        labels = torch.randint(64, (n,), generator=draw)
        return (centres[labels] + 2.5 * torch.randn(n, 192, generator=draw)).view(n, 3, 8, 8), labels
    many, labels = sample(16_384)
    flat = many.flatten(1)
    ridge = torch.linalg.solve(flat.T @ flat + 100 * torch.eye(192), flat.T @ texts[labels])
    linear = torch.nn.Linear(192, 32, bias=False)
    linear.weight.data = ridge.T.contiguous()
    teacher = Teacher("toy", 15.0, 32, Toy(linear).eval().requires_grad_(False))
    (images, labels), (test, truth) = sample(256), sample(2000)
    run, score, near = start("cpu", "fp32"), {}, {}

    @torch.no_grad()
    def accuracy(model):
        return 100 * float(((model.encode_image(test) @ texts.T).argmax(1) == truth).float().mean())
    for name, terms in {"task": (1, 0, 0), "crd": (0, 1, 0), "fd": (0, 0, 8),
                        "all": (0.25, 1, 8)}.items():
        torch.manual_seed(0)
        model = Toy(torch.nn.Linear(192, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32))
        weights = {**dict.fromkeys(WEIGHTS, 0.0), **dict(zip(("task", "crd", "fd"), terms))}
        adapters, optimizer = Adapters(32, [32], False), torch.optim.AdamW(model.parameters(), 3e-3)
        key, losses = texts[labels], []
        for step in range(100):
            rows = torch.randint(256, (128,), generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            found = add_gradient(run, model, (adapters, None), [teacher], Batch(
                (images[rows],), None, key[rows], [None], [key[rows]], None), [128], weights, Mix(),
                options(), run.scaler(), step)
            optimizer.step()
            losses.append(float(found["loss"]))
        assert losses[-1] < losses[0]
        score[name] = accuracy(model.eval())
        near[name] = float((model.encode_image(images, True).detach() * teacher.model.encode_image(
            images, True)).sum(1).mean())
    assert accuracy(teacher.model) > score["all"] > score["task"] + 10
    assert score["fd"] > score["task"] + 10 and score["crd"] > score["task"] + 5
    assert near["all"] > 0.8 and near["fd"] > 0.8


# -----------------------------------------------------------------------------
# Runs

def flags(school, *more):
    chosen = [("--data", school / "pairs"), ("--teacher", school / "teacher.safetensors"),
              ("--model", "tiny-vit"), ("--batch-size", 8), ("--epochs", 2), ("--workers", 0),
              ("--crop", 0.8), ("--device", "cpu"), ("--log-every", 1)]
    return [str(w) for flag, value in chosen if flag not in more for w in (flag, value)] + [
        str(w) for w in more]


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    """24 + 12 drawn pairs of 32 x 32 pixels; two random teachers, the second of another width and
    image size."""
    folder = tmp_path_factory.mktemp("school")
    scenes(folder / "pairs", 24, 12)
    torch.manual_seed(7)
    for name, more in (("teacher", {}), ("second", {"embed_dim": 24, "image_size": 48})):
        model = CLIP(dataclasses.replace(CONFIGS["tiny-vit"], **more))
        with torch.no_grad():  # so that images differ to it
            for p in model.visual.parameters():
                p.add_(0.1 * torch.randn_like(p))
        save(model, folder / f"{name}.safetensors")
    return folder


def logged(folder, split="train"):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = ("samples_per_second", "data_wait", "memory_mb", "time")
    return [{k: v for k, v in row.items() if k not in times} for row in rows if row["split"] == split]


@contextlib.contextmanager
def spying():
    """How many images teachers were asked about."""
    asked, look = [0], Teacher.look

    def counted(self, run, images, *rest, **more):
        asked[0] += len(images)
        return look(self, run, images, *rest, **more)
    Teacher.look = counted
    try:
        yield asked
    finally:
        Teacher.look = look


@pytest.fixture(scope="module")
def finished(school, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, run_main(*flags(school, "--output-dir", folder, "--export", "safetensors"))


def test_a_run_leaves_its_results_and_a_student_that_loads_alone(finished, school):
    folder, results = finished
    stored = json.loads((folder / "results.json").read_text())
    assert stored["method"] == "distill" and stored["steps"] == 6 and 0 <= stored["mean_recall"] <= 100
    assert {"i2t_r1", "t2i_r10", "student_latency_ms", "teacher_latency_ms", "samples_per_second",
            "student_image_parameters", "seconds", "git"} <= set(stored)
    row = logged(folder)[0]
    assert row["loss"] == pytest.approx(0.25 * row["task"] + row["crd"] + 8 * row["fd"], rel=1e-6)
    file = folder / "export" / "student_export.pt"
    held = torch.load(file, weights_only=True)
    model, other = load(file), load(file.with_suffix(".safetensors"))
    count = sum(p.numel() for p in model.parameters())
    assert not {"optimizer", "adapters", "average"} & set(held)
    assert 4 * count < file.stat().st_size < 4.1 * count + 100_000
    checkpoint = torch.load(folder / "checkpoint_best.pt", weights_only=True)
    for name, weight in checkpoint["weights"].items():
        assert model.state_dict()[name].equal(weight), name
    images = torch.randn(2, 3, 32, 32)
    assert model.encode_image(images).equal(other.encode_image(images))
    tokens = torch.tensor([[49406, 320, 49407]])
    teacher = load(school / "teacher.safetensors")
    assert model.encode_text(tokens).equal(teacher.encode_text(tokens))  # frozen all along


def test_frozen_text_has_no_gradient_no_moments_and_teachers_stay_in_eval(school):
    args = get_args(flags(school, "--text-tower", "teacher"))
    teachers = train_distill.open_teachers(args, None)
    model, frozen = train_distill.open_student(args, teachers, None)
    assert frozen and not any(p.requires_grad for n, p in model.named_parameters()
                              if not n.startswith(("visual.", "logit_scale")))
    training_mode(model, args, False, False)
    assert model.visual.training and not model.transformer.training and not model.ln_final.training
    assert not teachers[0].model.training
    run = start("cpu", "fp32")
    state = State(run, model, (Adapters(32, [32], False), None), args)
    held = {id(p) for group in state.optimizer.param_groups for p in group["params"]}
    assert id(model.text_projection) not in held and id(model.visual.proj) in held


def test_a_teacher_with_batchnorm_and_dropout_is_left_as_it_was(school, tmp_path):
    """Twenty steps: weights and running statistics of the teacher, texts of the student."""
    torch.manual_seed(0)
    teacher = load(None, "mobilevit_xxs:none", "tiny-vit:none", embed_dim=32, image_size=32)
    for m in teacher.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_()
    save(teacher, tmp_path / "teacher.safetensors")
    kept, opened = [], train_distill.open_teachers

    def keep(args, stored):
        kept.extend(opened(args, stored))
        return kept
    train_distill.open_teachers = keep
    try:
        results = run_main(*flags(school, "--teacher", tmp_path / "teacher.safetensors", "--epochs",
                                  "7", "--max-steps", "20", "--output-dir", tmp_path / "a"))
    finally:
        train_distill.open_teachers = opened
    assert results["steps"] == 20 and not any(m.training for m in kept[0].model.modules())
    before = load(tmp_path / "teacher.safetensors").state_dict()
    assert all(tensor.equal(before[name]) for name, tensor in kept[0].model.state_dict().items())
    student = load(tmp_path / "a" / "export" / "student_export.pt").state_dict()
    text = [n for n in before if not n.startswith(("visual.", "logit_scale"))]
    assert len(text) > 10 and all(student[name].equal(before[name]) for name in text)


def test_sixty_steps_bring_a_student_to_its_teacher_on_64_pairs():
    torch.manual_seed(0)
    images, key = torch.randn(64, 3, 8, 8), units(64, 32).float()
    teacher = Teacher("toy", 15.0, 32, Toy(torch.nn.Linear(192, 32)).eval().requires_grad_(False))
    student = Toy(torch.nn.Linear(192, 256), torch.nn.ReLU(), torch.nn.Linear(256, 32))
    optimizer, losses = torch.optim.AdamW(student.parameters(), 3e-3), []

    def near():
        with torch.no_grad():
            return float((student.encode_image(images, True)
                          * teacher.model.encode_image(images, True)).sum(dim=1).mean())
    before = near()
    for step in range(60):
        optimizer.zero_grad()
        losses.append(float(add_gradient(
            start("cpu", "fp32"), student, (Adapters(32, [32], False), None), [teacher],
            Batch((images,), None, key, [None], [key], None), [64], {**WEIGHTS, "icl": 0.0}, Mix(),
            options(), start("cpu", "fp32").scaler(), step)["loss"]))
        optimizer.step()
    assert abs(before) < 0.3 and near() > 0.8 and losses[-1] < 0.7 * losses[0]


def test_resuming_is_exact_also_inside_an_epoch(school, tmp_path):
    more = ("--ema", "0.9", "--mixup", "0.4", "--train-text", "--teacher", school / "teacher.safetensors",
            school / "second.safetensors", "--ema-teacher", "0.3", "--randaugment", "1")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_main(*flags(school, "--output-dir", whole, *more))
    update = train_distill.update

    def interrupt(run, state, args):
        fine = update(run, state, args)
        if state.step == 4:
            raise KeyboardInterrupt
        return fine
    train_distill.update = interrupt
    try:
        with pytest.raises(KeyboardInterrupt):
            run_main(*flags(school, "--output-dir", cut, "--save-every", "4", *more))
    finally:
        train_distill.update = update
    run_main(*flags(school, "--output-dir", cut, "--save-every", "4", *more))
    assert logged(cut) == logged(whole) and len(logged(whole)) == 6
    one, two = (torch.load(f / "checkpoint_last.pt", weights_only=True) for f in (cut, whole))
    for part in ("weights", "adapters", "buffers"):
        for name, tensor in one[part].items():
            assert tensor.equal(two[part][name]), name
    assert all(a.equal(b) for a, b in zip(one["average"], two["average"])) and one["average"]
    orders = [PairOrder(school, epoch) for epoch in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    with pytest.raises(UserError, match="crd was 1.0, now 2.0"):
        run_main(*flags(school, "--output-dir", whole, "--crd", "2", *more))


def PairOrder(school, epoch):
    pairs = open_pairs(school / "pairs", "train").with_transform(Views([32]))
    loader = make_pair_loader(pairs, 8, seed=1)
    loader.batch_sampler.set_epoch(epoch)
    return [c for batch in loader.batch_sampler for _, c in batch]


def test_a_bad_step_moves_nothing_and_three_in_a_row_save_and_stop(school, tmp_path, monkeypatch):
    step, before, after, bad = train_distill.update, {}, {}, [1]

    def spoiled(run, state, args):
        if state.step in bad:
            state.parameters[0].grad.view(-1)[0] = math.nan
            before.update(pack(state))
        fine = step(run, state, args)
        if state.step in bad:
            after.update(pack(state))
        else:
            norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in state.parameters
                                                         if p.grad is not None]))
            assert norm <= args.grad_clip * 1.001
        return fine

    def pack(state):
        moments = {f"{i} {k}": v.clone() for i, held in state.optimizer.state_dict()["state"].items()
                   for k, v in held.items()}
        return {**moments, **{n: p.detach().clone() for n, p in state.moving.items()},
                **{f"ema {i}": t.clone() for i, t in enumerate(state.average.tensors())}}
    monkeypatch.setattr(train_distill, "update", spoiled)
    results = run_main(*flags(school, "--output-dir", tmp_path / "a", "--ema", "0.9", "--grad-clip",
                              "0.1"))
    assert results["skipped_steps"] == 1 and results["steps"] == 6
    assert before and all(before[k].equal(after[k]) for k in before)
    assert all(math.isfinite(row["loss"]) for row in logged(tmp_path / "a")[2:])
    bad += [2, 3]
    with pytest.raises(SafeStop, match="3 steps in a row were skipped.*batch of"):
        run_main(*flags(school, "--output-dir", tmp_path / "b", "--ema", "0.9", "--grad-clip", "0.1"))
    assert torch.load(tmp_path / "b" / "checkpoint_last.pt", weights_only=True)["step"] == 4


def test_the_host_asks_for_no_tensor_in_the_optimisers_step(school, tmp_path, monkeypatch):
    """Which would wait for the device once a step: a tensor has no truth there."""
    step = train_distill.update

    def blind(run, state, args):
        def refuse(self):
            raise AssertionError("the host waits for the device")
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: None)  # its own affair
            patch.setattr(train_distill.Average, "update", lambda self: None)
            run.drop_bad_gradients = lambda parameters, scaler: torch.tensor(True)
            for name in ("__bool__", "__float__", "__int__", "item"):
                patch.setattr(torch.Tensor, name, refuse)
            fine = step(run, state, args)
        del run.drop_bad_gradients
        return fine
    monkeypatch.setattr(train_distill, "update", blind)
    assert run_main(*flags(school, "--output-dir", tmp_path, "--max-steps", "2"))["steps"] == 2


def test_an_average_is_scored_only_where_there_is_one(school, finished, tmp_path):
    folder, results = finished
    again = run_main(*flags(school, "--output-dir", folder, "--export", "safetensors",
                            "--eval-only"))
    assert again["mean_recall"] == results["mean_recall"]
    with pytest.raises(UserError, match="no average of the weights; leave --ema out"):
        run_main(*flags(school, "--output-dir", folder, "--eval-only", "--ema", "0.9"))
    run_main(*flags(school, "--output-dir", tmp_path, "--ema", "0.9", "--max-steps", "2", "--lr",
                    "0.01"))
    held = torch.load(tmp_path / "checkpoint_best.pt", weights_only=True)
    student = load(tmp_path / "export" / "student_export.pt").visual.conv1.weight
    assert any(student.equal(tensor) for tensor in held["average"])
    assert not student.allclose(held["weights"]["visual.conv1.weight"], atol=1e-4)
    with pytest.raises(UserError, match="give its --ema"):
        run_main(*flags(school, "--output-dir", tmp_path, "--eval-only"))


def test_the_scale_stays_below_100_at_any_rate(school, tmp_path):
    results = run_main(*flags(school, "--output-dir", tmp_path / "a", "--lr", "50", "--warmup", "0",
                              "--max-steps", "3", "--grad-clip", "0"))
    assert 1 <= results["scale"] <= 100.001


def test_the_teacher_sees_the_mixed_image(school, tmp_path, monkeypatch):
    seen, look = [], Teacher.look

    def spy(self, run, images, parts, mix, *rest):
        seen.append(mix)
        return look(self, run, images, parts, mix, *rest)
    monkeypatch.setattr(Teacher, "look", spy)
    run_main(*flags(school, "--output-dir", tmp_path / "a", "--mixup", "1", "--mix-prob", "1",
                    "--max-steps", "2"))
    assert len(seen) == 2 and all(0 < mix.share < 1 for mix in seen)


# -----------------------------------------------------------------------------
# Teachers and students that differ

def test_shared_projection_keeps_the_teachers_text_and_folds_into_a_plain_clip(school, tmp_path):
    base = flags(school, "--max-steps", "2")
    args = get_args(base + ["--shared-proj", "frozen"])
    teachers = train_distill.open_teachers(args, None)
    shared, _ = train_distill.open_student(args, teachers, None)
    plain, _ = train_distill.open_student(get_args(base), teachers, None)

    def free(model):
        return sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert free(plain) - free(shared) == 64 * 32  # features x D: widths are equal, no adapter
    tokens = torch.tensor([[49406, 320, 1125, 49407]])
    assert shared.encode_text(tokens).equal(teachers[0].model.encode_text(tokens))
    results = run_main(*flags(school, "--max-steps", "2", "--shared-proj", "frozen", "--model",
                              "mobilevit_xxs", "--image-size", "32", "--output-dir", tmp_path / "a"))
    assert results["steps"] == 2
    exported = load(tmp_path / "a" / "export" / "student_export.pt")
    assert exported.visual.proj.shape == (320, 32)
    assert exported.encode_text(tokens).equal(teachers[0].model.encode_text(tokens))
    torch.manual_seed(0)
    wide = load(None, "mobilevit_xxs:none", "tiny-vit:none", embed_dim=32, image_size=32).eval()
    share_projection(wide)
    images = torch.randn(2, 3, 32, 32)
    assert plain_copy(wide).encode_image(images).allclose(wide.encode_image(images), atol=1e-5)
    with pytest.raises(SystemExit):
        get_args(base + ["--shared-proj", "train"])
    assert get_args(base + ["--shared-proj", "train", "--train-text"])


def test_two_teachers_of_other_width_and_size_and_a_bert_teach_together(school, tmp_path):
    torch.manual_seed(0)
    bert = tmp_path / "bert"
    bert.mkdir()
    model = load(None, "tiny-vit:none", "tiny-bert:none")
    torch.save({f"bert.{n}": p for n, p in model.bert.state_dict().items()}, bert / "pytorch_model.bin")
    config = model.config.text
    (bert / "config.json").write_text(json.dumps({
        "model_type": "bert", "num_attention_heads": config.heads, "hidden_size": config.width,
        "vocab_size": config.vocab_size, "pad_token_id": config.pad_id}))
    words = (school / "pairs" / "vocab.txt").read_text()
    (bert / "vocab.txt").write_text(words)
    run_main(*flags(school, "--teacher", school / "teacher.safetensors", school /
                    "second.safetensors", "--output-dir", tmp_path / "a", "--max-steps", "2",
                    "--text-teacher", bert, "--eval-teacher", "--relation", "0.5"))
    rows = logged(tmp_path / "a")
    assert len(rows) == 2 and rows[0]["relation"] > 0 and rows[0]["crd"] > 0
    assert json.loads((tmp_path / "a" / "results.json").read_text())["teacher1_mean_recall"] >= 0
    odd = {"--embed-dim 16": "frozen text tower", "--teacher-scale 1 2": "2 numbers for 1 teacher"}
    for more, said in odd.items():
        with pytest.raises(UserError, match=said):
            run_main(*flags(school, "--output-dir", tmp_path / "b", *more.split()))


def test_an_activation_that_a_file_does_not_tell_is_the_students_too(school, tmp_path):
    """And texts that were computed with the other one are not taken for it."""
    more = ("--teacher-activation", "gelu", "--max-steps", "1")
    args = get_args(flags(school, *more))
    teachers = train_distill.open_teachers(args, None)
    student, _ = train_distill.open_student(args, teachers, None)
    tokens = torch.tensor([[49406, 320, 1125, 49407]])
    assert student.encode_text(tokens).equal(teachers[0].model.encode_text(tokens))
    assert not student.encode_text(tokens).equal(load(school / "teacher.safetensors")
                                                 .encode_text(tokens))
    for name, words in (("a", ("--max-steps", "1")), ("b", more)):
        run_main(*flags(school, "--output-dir", tmp_path / name, *words))
    assert len(list((tmp_path / "cache").glob("*.texts.pt"))) == 2
    run_main(*flags(school, "--output-dir", tmp_path / "c", "--seed", "2", *more))
    assert len(list((tmp_path / "cache").glob("*.texts.pt"))) == 2


def test_a_student_with_another_text_tower_than_the_teachers_is_refused(school, tmp_path):
    torch.manual_seed(1)
    other = CLIP(CONFIGS["tiny-vit"])
    save(other, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="another teacher, and cannot stay frozen; add --train-text"):
        run_main(*flags(school, "--weights", tmp_path / "other.safetensors", "--output-dir",
                        tmp_path / "a"))
    for more in ((tmp_path / "other.safetensors", "--train-text"),
                 (school / "teacher.safetensors",)):
        assert run_main(*flags(school, "--weights", *more, "--max-steps", "1", "--output-dir",
                               tmp_path / str(len(more))))["steps"] == 1


def test_teachers_read_captions_with_their_own_tokenizers(school, tmp_path):
    """A BERT with a vocabulary in a folder beside a CLIP with byte pairs."""
    torch.manual_seed(0)
    bert = load(None, "tiny-vit:none", "tiny-bert:none", embed_dim=32)
    save(bert, tmp_path / "bert.safetensors")
    (tmp_path / "vocab.txt").write_text((school / "pairs" / "vocab.txt").read_text())
    both = [school / "teacher.safetensors", tmp_path / "bert.safetensors"]
    words = ("--teacher-tokenizer", tmp_path)
    teachers = train_distill.open_teachers(get_args(flags(school, "--teacher", *both, *words)), None)
    assert [type(t.tokenizer).__name__ for t in teachers] == ["BPETokenizer", "WordPieceTokenizer"]
    assert run_main(*flags(school, "--teacher", *both, *words, "--max-steps", "1", "--output-dir",
                           tmp_path / "a"))["steps"] == 1
    with pytest.raises(ValueError, match="carries no vocabulary"):
        run_main(*flags(school, "--teacher", both[1], "--output-dir", tmp_path / "b"))


def test_another_teacher_under_the_same_name_does_not_go_on_with_a_run(school, tmp_path):
    file = tmp_path / "teacher.safetensors"
    for source in ("teacher", "second"):
        file.write_bytes((school / f"{source}.safetensors").read_bytes())
        words = flags(school, "--teacher", file, "--text-tower", "tiny-vit:none", "--embed-dim",
                      "16", "--max-steps", "1", "--output-dir", tmp_path / "a")
        if source == "teacher":
            run_main(*words)
    with pytest.raises(UserError, match="teacher_sha256"):
        run_main(*words)


# -----------------------------------------------------------------------------
# Stored teachers

@pytest.fixture(scope="module")
def stored(school):
    run_main(*flags(school, "--write-reinforced", school / "stored", "--views", "3",
                    "--eval-batch-size", "5", "--randaugment", "2"))
    return school / "stored"


def test_what_is_stored_is_what_the_teacher_says_of_the_view_made_again(school, stored):
    """24 images in batches of 5: the published generator loses what comes after the first batch."""
    teacher, held = load(school / "teacher.safetensors"), StoredTeacher.open(stored)
    pairs = held.adopt(open_pairs(school / "pairs", "train"))
    look, seen = Views([32], augment=2), set()
    for image in range(24):
        for view in range(3):
            c = pairs.owner.index(image)
            numbers, size, row, text = held.sample(image, view, c, 0)
            pixels = look.show(pairs.picture(image), numbers)
            with torch.no_grad():
                x = Mix().view(start("cpu", "fp32"), pixels[None], slice(None), teacher)
                own = teacher.encode_image(x, normalize=True)[0]
            assert float(own @ torch.tensor(row)) > 0.99999 and size == (32, 32)
            seen.add(json.dumps(numbers))
    assert len(seen) == 72
    tokens = train_distill.BPETokenizer()(pairs.captions)
    with torch.no_grad():
        texts = teacher.encode_text(tokens, normalize=True)
    rows = torch.stack([torch.tensor(held.sample(pairs.owner[c], 0, c, 0)[3]) for c in range(48)])
    assert (rows - texts).abs().max() < 1e-5


@pytest.mark.parametrize("more", [(), ("--workers", "2", "--views-in-turn", "--train-text")])
def test_stored_answers_train_as_the_live_teacher_does_on_the_same_views(school, stored, tmp_path,
                                                                         more):
    base = flags(school, "--reinforced", stored, *more)
    with spying() as asked:
        run_main(*base, "--output-dir", tmp_path / "stored")
        assert asked == [0]
        run_main(*base, "--output-dir", tmp_path / "live", "--live")
        assert asked == [48]
    for one, two in zip(logged(tmp_path / "stored"), logged(tmp_path / "live")):
        for name, value in one.items():
            assert value == (two[name] if isinstance(value, str) else pytest.approx(
                two[name], rel=1e-5)), name


def test_teachers_that_are_only_scored_do_not_teach(school, tmp_path, monkeypatch):
    """Of another image size than the student, whose views they would not take; they are scored on
    images that are not shrunk to the student's size."""
    run_main(*flags(school, "--teacher", school / "second.safetensors", "--write-reinforced",
                    tmp_path / "stored", "--views", "2"))
    words = flags(school, "--teacher", school / "second.safetensors", "--reinforced",
                  tmp_path / "stored", "--max-steps", "2", "--eval-teacher", "--image-size", "16")
    sizes, fill = [], train_distill.cache_images
    monkeypatch.setattr(train_distill, "cache_images", lambda run, pairs, size, *rest: (
        sizes.append(size), fill(run, pairs, size, *rest)))
    with spying() as asked:
        results = run_main(*words, "--output-dir", tmp_path / "a")
    assert asked == [0] and results["steps"] == 2 and sizes == [48] * 3
    live = flags(school, "--teacher", school / "second.safetensors", "--max-steps", "1",
                 "--eval-teacher", "--image-size", "16", "--output-dir", tmp_path / "b")
    assert run_main(*live)["teacher_mean_recall"] == results["teacher_mean_recall"]


def test_an_unreadable_image_is_left_out_and_the_others_keep_their_own_answers(school, tmp_path):
    scenes(tmp_path / "pairs", 24, 12)
    whole = open_pairs(tmp_path / "pairs", "train")
    file = tmp_path / "pairs" / whole.paths[5]
    file.write_bytes(file.read_bytes()[:60])
    words = flags(school, "--data", tmp_path / "pairs")
    run_main(*words, "--write-reinforced", tmp_path / "stored", "--views", "2")
    held, teacher = StoredTeacher.open(tmp_path / "stored"), load(school / "teacher.safetensors")
    assert held.facts["lost"] == [5]
    pairs = held.adopt(open_pairs(tmp_path / "pairs", "train"))
    assert pairs.paths == [path for path in whole.paths if path != whole.paths[5]]
    tokens = train_distill.BPETokenizer()(pairs.captions)
    with torch.no_grad():
        texts = teacher.encode_text(tokens, normalize=True)
    for c, image in enumerate(pairs.owner):
        numbers, size, row, text = held.sample(image, 1, c, 0)
        with torch.no_grad():
            x = Views([32]).show(pairs.picture(image), numbers)
            own = teacher.encode_image(Mix().view(start("cpu", "fp32"), x[None], slice(None),
                                                  teacher), normalize=True)[0]
        assert float(own @ torch.tensor(row)) > 0.99999 and size == (32, 32)
        assert (torch.tensor(text) - texts[c]).abs().max() < 1e-5
    assert run_main(*words, "--reinforced", tmp_path / "stored", "--max-steps", "2", "--output-dir",
                    tmp_path / "a")["steps"] == 2


def test_a_stored_view_of_a_cache_of_another_side_shows_the_same_part(school, tmp_path):
    """A picture of 90 x 60 kept at 45 x 30: the crop is scaled with it, and so are translations,
    which are pixels of a view of 224."""
    ramp = np.stack([np.tile(np.arange(90) * 2, (60, 1)), np.tile(np.arange(60)[:, None] * 3, (1, 90)),
                     np.zeros((60, 90))], axis=2).astype(np.uint8)
    (tmp_path / "pairs").mkdir()
    for i in range(4):
        Image.fromarray(ramp).save(tmp_path / "pairs" / f"{i}.png")
    (tmp_path / "pairs" / "pairs.csv").write_text("image,caption\n" + "".join(
        f"{i}.png,number {i}\n" for i in range(4)))
    pairs = open_pairs(tmp_path / "pairs", "train", split_ratio=(1, 0, 0))
    look = Views([16], seed=3, scale=(0.3, 0.6))

    class Held:
        views = 1

        def sample(self, image, view, caption, place):
            return look.draw(90, 60, 0, image), (90, 60), np.zeros(4), np.zeros(4)
    full = StoredPairs(pairs.with_transform(look), Held(), look)
    small = open_pairs(tmp_path / "pairs", "train", split_ratio=(1, 0, 0)).with_transform(look)
    small.cache("ram", 30)
    assert small.picture(0).size == (45, 30)
    small = StoredPairs(small, Held(), look)
    for c in range(4):
        (one, *_), (two, *_) = full[(0, c)], small[(0, c)]
        assert (one.int() - two.int()).abs().max() <= 6 and one.float().std() > 10
    left = DISTORTIONS.index("TranslateX")
    for size, pixels in ((224, 56), (112, 28)):
        image = Image.fromarray(np.random.RandomState(0).randint(1, 255, (size, size, 3), np.uint8))
        moved = Views([size]).show(image, [[0, 0, size, size], [[left, 56.0]]])
        still = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert moved[..., pixels:].equal(still[..., :-pixels]) and not moved[..., :pixels].any()


def test_an_epoch_shows_each_image_in_one_of_its_views_and_all_views_come(school, stored):
    held = StoredTeacher.open(stored)
    pairs = held.adopt(open_pairs(school / "pairs", "train"))
    drawn, turn = (StoredPairs(pairs, held, Views([32], augment=2), 1, in_turn)
                   for in_turn in (False, True))
    assert [turn.view(epoch, 5) for epoch in range(5)] == [0, 1, 2, 0, 1]
    views = torch.tensor([[drawn.view(epoch, i) for i in range(24)] for epoch in range(60)])
    assert torch.bincount(views.flatten(), minlength=3).min() > 1440 / 3 * 0.85
    assert (views.double().std(dim=0, correction=0) > 0).all() and (views.double().std(dim=1) > 0).all()
    for epoch in range(3):  # pixels and embedding are of one view
        c = pairs.owner.index(4)
        image, row, text, *_ = drawn[(epoch, c)]
        numbers, _, answer, _ = held.sample(4, drawn.view(epoch, 4), c, 0)
        assert row.numpy() == pytest.approx(answer)
        assert image.equal(drawn.transform.show(pairs.picture(4), numbers))


def test_another_teachers_or_datas_answers_are_refused_and_so_is_damage(school, stored, tmp_path):
    with pytest.raises(UserError, match="not of .*second"):
        run_main(*flags(school, "--reinforced", stored, "--teacher", school / "second.safetensors",
                        "--output-dir", tmp_path / "a"))
    scenes(tmp_path / "pairs", 20, 4)
    with pytest.raises(ValueError, match="of other data"):
        run_main(*flags(school, "--data", tmp_path / "pairs", "--reinforced", stored,
                        "--output-dir", tmp_path / "a"))
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in stored.iterdir():
        content = bytearray(file.read_bytes())
        if file.name == "images.npy":
            content[300] ^= 1
        (broken / file.name).write_bytes(content)
    with pytest.raises(ValueError, match="checksum of images.npy"):
        StoredTeacher.open(broken)
    with pytest.raises(UserError, match="--overwrite writes it again"):
        run_main(*flags(school, "--write-reinforced", stored))
    with pytest.raises(SystemExit):
        get_args(flags(school, "--reinforced", stored, "--hint", "1"))
    with pytest.raises(UserError, match="cut at 77 tokens; give --max-text 77"):
        run_main(*flags(school, "--reinforced", stored, "--max-text", "20", "--output-dir", tmp_path))
    with pytest.raises(UserError, match="--teacher-activation quick_gelu, and here it is gelu"):
        run_main(*flags(school, "--reinforced", stored, "--teacher-activation", "gelu",
                        "--output-dir", tmp_path))


def test_the_distortions_are_torchvisions():
    transforms = pytest.importorskip("torchvision.transforms")
    from torchvision.transforms.autoaugment import _apply_op
    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (37, 51, 3), dtype=np.uint8))
    space = transforms.RandAugment()._augmentation_space(31, (224, 224))
    assert tuple(space) == DISTORTIONS
    for name, (strengths, signed) in space.items():
        strength = float(strengths[9]) if strengths.ndim else 0.0
        assert strength == pytest.approx({"Posterize": 7.0, "Solarize": 178.5}.get(
            name, 9 / 30 * STRENGTHS.get(name, 0.0)), rel=1e-6)
        for value in (strength, -strength) if signed else (strength,):
            theirs = _apply_op(image, name, value, transforms.InterpolationMode.NEAREST, None)
            ours = distort(image, DISTORTIONS.index(name), value)
            assert np.array_equal(np.asarray(ours), np.asarray(theirs)), name


def png(colour=0, size=32):
    buffer = io.BytesIO()
    noise = np.random.RandomState(colour).randint(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "png")
    return buffer.getvalue()


def shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def reinforced_shard(path, teachers, n, views=2, packed="npz"):
    """A shard in DataCompDR's layout, with what the two teachers really say."""
    look, members = Views([32], scale=(0.5, 1.0), augment=2), []
    run, tokenizer = start("cpu", "fp32"), train_distill.BPETokenizer()
    for i in range(n):
        image, texts = Image.open(io.BytesIO(png(i))), [f"real {i}", f"written {i}", f"also {i}"]
        numbers = [look.draw(32, 32, view, i) for view in range(views)]
        with torch.no_grad():
            pixels = torch.stack([look.show(image, some) for some in numbers])
            rows = torch.cat([t.encode_image(Mix().view(run, pixels, slice(None), t), normalize=True)
                              for t in teachers], dim=1)
            words = torch.cat([t.encode_text(tokenizer(texts), normalize=True) for t in teachers],
                              dim=1)
        buffer = io.BytesIO()
        if packed == "npz":
            np.savez(buffer, image_emb=rows.numpy(), text_emb=words.numpy())
            content = buffer.getvalue()
        else:
            torch.save({"image_emb": rows.bfloat16(), "text_emb": words.bfloat16()}, buffer)
            content = gzip.compress(buffer.getvalue())
        members += [(f"{i:05d}.png", png(i)), (f"{i:05d}.txt", texts[0].encode()),
                    (f"{i:05d}.url.txt", b"http://"), (f"{i:05d}.json", b'{"uid": "x"}'),
                    (f"{i:05d}.syn.json", json.dumps({"syn_text": texts[1:]}).encode()),
                    (f"{i:05d}.paug.json", json.dumps({"param_aug": numbers}).encode()),
                    (f"{i:05d}.{packed}", content)]
    return shard(path, members)


def test_shards_in_the_published_layout_teach_as_their_teachers_would(school, tmp_path):
    torch.manual_seed(1)
    teachers = [load(school / "teacher.safetensors"), load(school / "teacher.safetensors")]
    with torch.no_grad():
        teachers[1].visual.proj.mul_(torch.randn_like(teachers[1].visual.proj))
    save(teachers[1], tmp_path / "other.safetensors")
    save(CLIP(CONFIGS["tiny-vit"]), tmp_path / "other2.safetensors")
    for k, packed in enumerate(("npz", "pth.gz")):
        reinforced_shard(tmp_path / f"{k}.tar", teachers, 8, packed=packed)
    pattern, dims = str(tmp_path / "{0..1}.tar"), ("--teacher-dims", "32", "32")
    held = ShardTeacher([str(tmp_path / "0.tar")], [32, 32])
    pairs = held.adopt(open_pairs([tmp_path / "0.tar"], "train", split_ratio=(1, 0, 0)))
    assert pairs.texts_of(2) == ["real 2", "written 2", "also 2"] and held.views == 2
    numbers, _, row, text = held.sample(2, 1, 0, 2)
    tokens = train_distill.BPETokenizer()(["also 2"])
    with torch.no_grad():
        expected = torch.cat([t.encode_text(tokens, normalize=True) for t in teachers], dim=1)[0]
    assert torch.tensor(text).allclose(expected, atol=1e-5)
    both = ("--teacher", school / "teacher.safetensors", tmp_path / "other.safetensors")
    base = flags(school, "--data", pattern, "--reinforced", pattern, *dims, "--batch-size", "4",
                 "--max-steps", "2", *both)
    run_main(*base, "--output-dir", tmp_path / "stored")
    run_main(*base, "--output-dir", tmp_path / "live", "--live", "--teacher-scale", "100", "100")
    for one, two in zip(logged(tmp_path / "stored"), logged(tmp_path / "live")):
        for name in ("loss", "task", "crd", "fd"):
            assert one[name] == pytest.approx(two[name], rel=2e-2)  # bf16 in one of the shards
    with pytest.raises(UserError, match="shards are of another teacher"):
        run_main(*flags(school, "--data", pattern, "--reinforced", pattern, *dims, "--batch-size",
                        "4", "--output-dir", tmp_path / "b", "--teacher", tmp_path /
                        "other2.safetensors"))
    with pytest.raises(ValueError, match="--teacher-dims"):
        run_main(*flags(school, "--data", pattern, "--reinforced", pattern, "--teacher-dims", "16",
                        "--teacher", school / "teacher.safetensors", "--batch-size", "4",
                        "--output-dir", tmp_path / "c", "--train-text"))


def unpacked(path):
    with tarfile.open(path) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def test_keys_that_come_again_in_another_shard_keep_their_own_teacher(school, tmp_path):
    """Two shards that both begin with 00000, of two teachers; then the same apart from the images."""
    torch.manual_seed(1)
    teachers = [load(school / "teacher.safetensors"), CLIP(CONFIGS["tiny-vit"]).eval()]
    files = [reinforced_shard(tmp_path / f"{k}.tar", [teachers[k]], 4) for k in range(2)]
    held = ShardTeacher(files, [32])
    pairs = held.adopt(open_pairs(files, "train", split_ratio=(1, 0, 0)))
    for k in range(2):
        alone = ShardTeacher([files[k]], [32])
        alone.adopt(open_pairs([files[k]], "train", split_ratio=(1, 0, 0)))
        for i in range(4):
            assert pairs.paths[4 * k + i] == f"{k}.tar:{i:05d}.png"
            (_, _, *ours), (_, _, *theirs) = (t.sample(j, 0, 0, 1) for t, j in (
                (held, 4 * k + i), (alone, i)))
            assert all(np.array_equal(a, b) for a, b in zip(ours, theirs))
    (tmp_path / "apart").mkdir()
    for k, file in enumerate(files):
        for name, kinds in ((f"images{k}", (".png", "0.txt", "1.txt", "2.txt", "3.txt")),
                            (f"told{k}", (".json", ".npz"))):
            shard(tmp_path / "apart" / f"{name}.tar", [(name, content) for name, content in unpacked(
                file) if name.endswith(kinds)])
    images = [tmp_path / "apart" / f"images{k}.tar" for k in range(2)]
    told = [tmp_path / "apart" / f"told{k}.tar" for k in range(2)]
    joined = ShardTeacher(told[:1], [32])
    assert len(joined.adopt(open_pairs(images[:1], "train", split_ratio=(1, 0, 0))).paths) == 4
    with pytest.raises(ValueError, match="more than one shard holds a .* of the key '00000'"):
        ShardTeacher(told, [32]).adopt(open_pairs(images, "train", split_ratio=(1, 0, 0)))


@pytest.mark.parametrize("kind, content, said", [
    ("paug.json", b"{", "paug.json in .* cannot be used"),
    ("paug.json", b'{"views": []}', "paug.json in .* cannot be used"),
    ("paug.json", b'{"param_aug": [[[0, 0, 9, 9], [[99, 0.3]]]]}', "is no view"),
    ("syn.json", b'{"syn_text": 3}', "syn.json in .* cannot be used"),
    ("npz", b"PK", "its stored embeddings in .* cannot be used")])
def test_damaged_members_of_published_shards_are_named(school, tmp_path, kind, content, said):
    whole = reinforced_shard(tmp_path / "whole.tar", [load(school / "teacher.safetensors")], 3)
    file = shard(tmp_path / "0.tar", [(name, content if name.endswith(kind) else held)
                                      for name, held in unpacked(whole)])
    held = ShardTeacher([file], [32])
    with pytest.raises(ValueError, match=said):
        held.adopt(open_pairs([file], "train", split_ratio=(1, 0, 0)))
        held.sample(0, 0, 0, 0)


def test_a_stored_teacher_that_is_not_there_is_refused(school, tmp_path):
    (tmp_path / "empty").mkdir()
    for name, said in (("nowhere", "shards are missing"), ("nowhere.tar", "shards are missing"),
                       ("empty", "neither the teacher.json")):
        with pytest.raises((UserError, ValueError), match=said):
            run_main(*flags(school, "--reinforced", tmp_path / name, "--output-dir", tmp_path / "a"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="cannot be written"):
        run_main(*flags(school, "--write-reinforced", tmp_path / "file" / "x"))


# -----------------------------------------------------------------------------
# Shards

def test_a_shard_gives_exactly_its_samples_and_says_what_it_left_out(tmp_path):
    one = shard(tmp_path / "0.tar", [
        ("a.JPG", png()), ("a.TXT", b"upper"), ("__meta__.json", b"{}"), (".hidden", b"x"),
        ("dir/b.png", png(1)), ("dir/b.txt", b"in a folder"), ("b.png", png(2)), ("b.txt", b"not it"),
        ("c.seg.png", png(3)), ("c.txt", b"the segmentation is no image"),
        ("d.png", png(4)), ("e.png", b"no image"), ("e.txt", b"does not decode"),
        ("f.png", png(5)), ("f.txt", b"first"), ("f.png", png(6)), ("f.txt", b"again"),
        ("z.png", png(7)), ("z.txt", b"ends one")])
    two = shard(tmp_path / "1.tar", [("z.png", png(8)), ("z.txt", b"begins another"),
                                     ("y.png", png(9)), ("y.txt", b"cut off")])
    content = two.read_bytes()
    two.write_bytes(content[:content.rindex(b"cut off") - 100])  # inside the header of y.txt
    rows, store, notes = read_tars([one, two])
    assert [(path, text) for path, text in rows["all"]] == [
        ("0.tar:a.JPG", "upper"), ("0.tar:dir/b.png", "in a folder"), ("0.tar:b.png", "not it"),
        ("0.tar:e.png", "does not decode"), ("0.tar:f.png", "first"), ("0.tar:f.png+", "again"),
        ("0.tar:z.png", "ends one"), ("1.tar:z.png", "begins another")]
    assert store.read("0.tar:f.png") == png(5) and store.read("0.tar:f.png+") == png(6)
    said = " ".join(notes)
    assert "1.tar is damaged" in said and "3 samples without image or caption left out" in said
    pairs = open_pairs([one, two], "train", split_ratio=(1, 0, 0)).with_transform(Views([16]))
    image, used, asked = pairs[(0, 3)]
    assert asked == 3 and used != 3  # the one that does not decode: another takes its place


def test_braces_stand_for_what_they_do_in_a_shell():
    cases = {"0.tar": 1, "{0..0}.tar": 1, "{0..9}.tar": 10, "{00..09}/{0..9}.tar": 100,
             "{0..9,10}.tar": 2, "{{0..9},x}.tar": 11, "{a,b}{0..9}.tar": 20, "x{1}.tar": 1,
             "{1,2}.tar": 2}
    assert {text: len(expand(text)) for text in cases} == cases
    assert expand("s-{08..11}.tar") == ["s-08.tar", "s-09.tar", "s-10.tar", "s-11.tar"]
    nested = expand("{{00..64}/{00000000..00000999},65/{00000000..00000535}}.tar")
    assert len(nested) == len(set(nested)) == 65 * 1000 + 536 and nested[-1] == "65/00000535.tar"


def test_captions_are_found_where_their_makers_put_them(tmp_path):
    """img2dataset's json, a list in it, and CLIP_benchmark's txt with one caption a line."""
    said = {"a.json": {"caption": "one"}, "b.json": {"text": "two"}, "c.json": {"caption": ["", "x", "y"]},
            "d.json": {"captions": ["p", 3, "q"], "caption": "no"}, "e.json": {"caption": None}}
    members = [(f"{name[0]}.png", png(i)) for i, name in enumerate(said)] + [
        (name, json.dumps(held).encode()) for name, held in said.items()]
    members.sort(key=lambda member: member[0])
    rows, _, notes = read_tars([shard(tmp_path / "0.tar", members)])
    assert [text for _, text in rows["all"]] == ["one", "two", "x", "y", "p", "q"]
    assert "1 samples without image or caption" in " ".join(notes)
    for kind, expected in (("retrieval", ["a dog", "a brown dog"]), ("other", ["a dog\na brown dog"])):
        home = tmp_path / kind / "test"
        home.mkdir(parents=True)
        (home.parent / "dataset_type.txt").write_text(f"{kind}\n")
        shard(home / "0.tar", [("0.png", png()), ("0.txt", b"a dog\na brown dog")])
        assert [text for _, text in read_tars([home / "0.tar"])[0]["all"]] == expected


def test_a_name_with_braces_that_is_there_is_no_pattern(tmp_path):
    home = tmp_path / "set{1,2}"
    home.mkdir()
    file = shard(home / "{0..1}.tar", [(f"{i}.{kind}", content) for i in range(3) for kind, content
                                       in (("png", png(i)), ("txt", b"a b"))])
    for where in (home, str(file), f"{file}::{home}"):
        assert len(open_pairs(where, "train", split_ratio=(1, 0, 0)).paths) in (3, 6)
    (home / "prompts.txt").write_text("one {}.\n\ntwo {c}\n")
    assert read_templates([str(home / "prompts.txt"), "a {}"]) == ["one {}.", "two {c}", "a {}"]


def test_counts_that_disagree_are_said_and_shards_without_captions_refused(tmp_path):
    shard(tmp_path / "0.tar", [m for i in range(3) for m in ((f"{i}.png", png(i)),
                                                             (f"{i}.txt", b"a b"))])
    (tmp_path / "sizes.json").write_text('{"0.tar": 5}')
    (tmp_path / "nshards.txt").write_text("4")
    said = " ".join(open_pairs(tmp_path, "train", split_ratio=(1, 0, 0)).notes)
    assert "3 samples and 5 by its folder's list" in said and "1 shards and nshards.txt says 4" in said
    (tmp_path / "more").mkdir()
    (tmp_path / "0.tar").replace(tmp_path / "more" / "0.tar")
    (tmp_path / "more" / "__len__").write_text("7")
    said = " ".join(open_pairs(tmp_path / "more", "train", split_ratio=(1, 0, 0)).notes)
    assert "has 3 samples and __len__ says 7" in said
    (tmp_path / "more" / "0.tar").replace(tmp_path / "0.tar")
    (tmp_path / "bad").mkdir()
    shard(tmp_path / "bad" / "0.tar", [("1.png", png()), ("1.caption", b"wrong kind"),
                                       ("2.png", png()), ("2.caption", b"wrong kind")])
    with pytest.raises(ValueError, match="no image with a caption.*2 png, 2 caption"):
        open_pairs(tmp_path / "bad", "train")
    with pytest.raises(ValueError, match="2 of 3 shards are missing"):
        open_pairs(str(tmp_path / "{0..2}.tar"), "train")


def test_fewer_shards_than_workers_and_ranks_give_every_sample_once(tmp_path):
    """Samples are dealt out, not shards: 3 shards of 5, 4 and 3, 2 ranks with 2 workers each."""
    for k, n in enumerate((5, 4, 3)):
        shard(tmp_path / f"{k}.tar", [m for i in range(n) for m in (
            (f"{i}.png", png(i)), (f"{i}.txt", f"{k} {i}".encode()))])
    pairs = open_pairs(str(tmp_path / "{0..2}.tar"), "train", split_ratio=(1, 0, 0))
    pairs = pairs.with_transform(Views([16]))
    shares = []
    for rank in range(2):
        loader = make_pair_loader(pairs, 4, 1, "one", rank, 2, workers=2)
        batches = [used.tolist() for _, used, _ in loader]
        assert [len(batch) for batch in batches] == [2, 2, 2]
        shares.append({c for batch in batches for c in batch})
    assert not shares[0] & shares[1] and shares[0] | shares[1] == set(range(12))


def test_weighted_sources_come_in_their_proportion_and_no_image_twice_in_a_batch(tmp_path):
    for k, n in enumerate((10, 5)):
        shard(tmp_path / f"{k}.tar", [m for i in range(n) for m in (
            (f"{i}.png", png(i)), (f"{i}.txt", b"x"))])
    where = f"{tmp_path}/0.tar::{tmp_path}/1.tar"
    pairs = open_pairs(where, "train", split_ratio=(1, 0, 0)).with_transform(Views([16]))
    for weights, ratio in (("1::1", 1.0), ("1::3", 3.0)):
        given = source_weights(pairs, where, weights)
        batches = make_pair_loader(pairs, 2, 1, weights=given).batch_sampler
        counts = np.zeros(15)
        for epoch in range(720):
            batches.set_epoch(epoch)
            for batch in batches:
                images = [c for _, c in batch]
                assert len(set(images)) == 2
                counts[images] += 1
        assert counts.sum() == 720 * 14
        one, two = counts[:10].mean(), counts[10:].mean()
        assert two / one == pytest.approx(ratio, rel=0.2)
        assert np.abs(counts[:10] / one - 1).max() < 0.2 and np.abs(counts[10:] / two - 1).max() < 0.2
        batches.set_epoch(3)
        assert list(batches) == list(batches)
    with pytest.raises(ValueError, match="weights '1' for 2 sources"):
        source_weights(pairs, where, "1")
    for k in range(2):  # sources that are folders
        (tmp_path / f"s{k}").mkdir()
        (tmp_path / f"{k}.tar").rename(tmp_path / f"s{k}" / "0.tar")
    for where, weights, expected in ((f"{tmp_path}/s0::{tmp_path}/s1", "1::3", [1.0] * 10 + [3.0] * 5),
                                     (f"{tmp_path}/s1", "2", [2.0] * 5)):
        pairs = open_pairs(where, "train", split_ratio=(1, 0, 0))
        assert source_weights(pairs, where, weights) == expected
    (tmp_path / "x.png").write_bytes(png())
    (tmp_path / "x.csv").write_text("image,caption\nx.png,a b\n")
    pairs = open_pairs(tmp_path / "x.csv", "train", split_ratio=(1, 0, 0))
    with pytest.raises(ValueError, match="are for shards, and x is none"):
        source_weights(pairs, str(tmp_path / "x.csv"), "1")


def test_class_folders_teach_by_their_names(tmp_path, school):
    for name in ("red_fox", "owl"):
        for i in range(6):
            (tmp_path / "animals" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "animals" / name / f"{i}.png").write_bytes(png(i))
    pairs = open_pairs(tmp_path / "animals", "train", split_ratio=(1, 0, 0))
    assert set(pairs.captions) == {"a photo of a red fox.", "a photo of a owl."} and len(pairs) == 12
    assert run_main(*flags(school, "--data", tmp_path / "animals", "--batch-size", "4", "--epochs",
                           "1", "--output-dir", tmp_path / "a"))["steps"] > 0


# -----------------------------------------------------------------------------
# Zero-shot

def test_templates_of_every_kind_give_one_matrix_in_the_right_order():
    from data import zero_shot_weights
    names, draw = ["red_fox", "owl", "cat"], {}

    def encode(prompts):
        for text in prompts:
            draw.setdefault(text, randoms(5, seed=len(draw)))
        return torch.stack([draw[text] for text in prompts])
    kinds = (["a {}.", "one {}"], ["a {c}.", "one {c}"], [lambda c: f"a {c}.", lambda c: f"one {c}"])
    one, *rest = [zero_shot_weights(encode, prompts_per_class(names, kind)) for kind in kinds]
    assert one.shape == (3, 5) and all(one.equal(other) for other in rest)
    hand = torch.stack([unit((unit(draw[f"a {n}."]) + unit(draw[f"one {n}"])) / 2)
                        for n in ("red fox", "owl", "cat")])
    assert one.allclose(hand, atol=1e-12) and one.norm(dim=1).allclose(torch.ones(3, dtype=DOUBLE))
    with pytest.raises(ValueError, match="unknown field {d}"):
        prompts_per_class(names, ["{d}"])


class Oracle(torch.nn.Module):
    """Its embedding of a class's prompt is a random vector, and of an image that of the class whose
    wnid number stands in the first pixel."""
    image_mean, image_std, config = (0.0,) * 3, (1.0,) * 3, types.SimpleNamespace(
        image_size=16, context_length=77, text=None)
    pad_id, origin = 0, {"sha256": ""}

    def __init__(self, names, dim, noise=0.0):
        super().__init__()
        self.table = unit(torch.randn(len(names), dim, generator=torch.Generator().manual_seed(0)))
        self.names, self.noise = names, noise

    def encode_image(self, images, normalize=False):
        low, high = (images[:, k, 0, 0] * 255 for k in (0, 1))
        rows = self.table[(low + 256 * high).round().long()]
        return unit(rows + self.noise * torch.randn_like(rows))

    def encode_text(self, tokens, normalize=False, ends=None):
        return self.table[tokens[:, 1]]

    def tokenizer(self, texts, context_length=77):
        rows = torch.zeros(len(texts), 3, dtype=torch.long)
        rows[:, 1] = torch.tensor([self.names.index(text[:-1].split(" ")[-1]) for text in texts])
        rows[:, 2] = 10_000  # the end
        return rows


def classed(folder, numbers, names=str, per_class=1):
    for i in reversed(range(len(numbers))):  # made in another order than they are read
        (folder / names(numbers[i])).mkdir(parents=True)
        pixel = (numbers[i] % 256, numbers[i] // 256, 0)
        for k in range(per_class):
            Image.new("RGB", (16, 16), pixel).save(folder / names(numbers[i]) / f"{k}.png")


def score(model, images):
    args = get_args(["--eval-batch-size", "64"])
    look = train_distill.Preprocess(16, dtype=torch.uint8)
    return train_distill.classify(start("cpu", "fp32"), model, images.with_transform(look),
                                  model.tokenizer, images.templates, args)


def test_an_oracle_is_right_on_every_layout_of_imagenet_and_only_with_the_right_columns(tmp_path):
    """300 classes: as wnids, as numbers in V2's folders, and a tenth of them as in -A."""
    words = [f"w{i}" for i in range(300)]
    listed = "".join(f"n{i:08d} {word}\n" for i, word in enumerate(words))
    for home in ("imagenet", "imagenetv2", "imagenet-adversarial"):
        (tmp_path / home).mkdir()
        (tmp_path / home / "classnames.txt").write_text(listed)
    classed(tmp_path / "imagenet" / "images" / "val", range(300), "n{:08d}".format)
    v2 = tmp_path / "imagenetv2" / "imagenetv2-matched-frequency-format-val"
    classed(v2, range(300))
    few = list(range(0, 300, 10))
    classed(tmp_path / "imagenet-adversarial" / "imagenet-a", few, "n{:08d}".format)
    model = Oracle(words, 48)
    for name, classes in (("imagenet", 300), ("imagenetv2", 300), ("imagenet-a", 30)):
        images = open_zero_shot(name, tmp_path)
        assert len(images.classnames) == classes
        found = score(model, images)
        assert found == {"top1": 100.0, "top5": 100.0, "mean_per_class": 100.0}, name
    by_path = (v2, tmp_path / "imagenet-adversarial" / "imagenet-a", tmp_path / "imagenet" / "images"
               / "val")
    for path, classes in zip(by_path, (300, 30, 300)):  # the words are found for folders too
        images = open_zero_shot(path, tmp_path)
        assert len(images.classnames) == classes and images.classnames[:2] == words[
            :2 * len(words) // classes:len(words) // classes]
        assert score(model, images)["top1"] == 100.0

    # Every image of a class that -A has looks most like the next one, which -A has not.
    class Misled(Oracle):
        def encode_image(self, images, normalize=False):
            rows = (images[:, 0, 0, 0] * 255 + 256 * (images[:, 1, 0, 0] * 255)).round().long()
            return unit(0.5 * self.table[rows] + self.table[(rows + 1) % 300])
    misled = Misled(words, 48)
    assert score(misled, open_zero_shot("imagenet-a", tmp_path))["top1"] == 100.0
    assert score(misled, open_zero_shot("imagenet", tmp_path))["top1"] == 0.0
    square = Oracle([f"w{i}" for i in range(48)], 48)  # as many classes as numbers
    classed(tmp_path / "square", range(48), "w{}".format)
    assert score(square, open_zero_shot(tmp_path / "square", tmp_path))["top1"] == 100.0


def test_folders_named_by_wnids_without_their_words_are_refused(tmp_path):
    classed(tmp_path / "animals", range(3), "n{:08d}".format, per_class=4)
    with pytest.raises(ValueError, match="3 class folders are named like 'n00000000'"):
        open_zero_shot(tmp_path / "animals", tmp_path)
    with pytest.raises(ValueError, match="put CoOp's classnames.txt"):
        open_pairs(tmp_path / "animals", "train")
    (tmp_path / "classnames.txt").write_text("n00000000 red fox\nn00000001 owl\nn00000002 cat\n")
    assert open_zero_shot(tmp_path / "animals", tmp_path).classnames == ["red fox", "owl", "cat"]
    pairs = open_pairs(tmp_path / "animals", "train", split_ratio=(1, 0, 0))
    assert set(pairs.captions) == {f"a photo of a {name}." for name in ("red fox", "owl", "cat")}
    classed(tmp_path / "digits", range(3), str, per_class=4)  # numbers are names elsewhere
    assert open_zero_shot(tmp_path / "digits", tmp_path).classnames == ["0", "1", "2"]


def test_the_mean_over_classes_is_not_the_mean_over_images(tmp_path):
    """Classes of 9, 3 and 1 images: the model takes the second for the first."""
    for number, count in enumerate((9, 3, 1)):
        (tmp_path / "x" / f"w{number}").mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / "x" / f"w{number}" / f"{k}.png")

    class Misled(Oracle):
        def encode_image(self, images, normalize=False):
            numbers = (images[:, 0, 0, 0] * 255).round().long()
            return self.table[torch.where(numbers == 1, 0, numbers)]
    found = score(Misled(["w0", "w1", "w2"], 8), open_zero_shot(tmp_path / "x", tmp_path))
    assert found == {"top1": pytest.approx(1000 / 13), "mean_per_class": pytest.approx(200 / 3)}


def test_a_random_student_is_right_as_often_as_chance(tmp_path):
    classed(tmp_path / "x", range(20), "w{}".format, per_class=60)
    images = open_zero_shot(tmp_path / "x", tmp_path)
    found = score(Oracle([f"w{i}" for i in range(20)], 32, noise=1e4), images)
    sigma = 100 * math.sqrt(0.05 * 0.95 / len(images))
    assert abs(found["top1"] - 5) < 3 * sigma and 15 < found["top5"] < 35


def test_a_folder_of_clip_benchmark_is_read_with_its_own_prompts(tmp_path):
    home = tmp_path / "set"
    (home / "test").mkdir(parents=True)
    (home / "classnames.txt").write_text("w0\nw1\nw2\n")
    (home / "zeroshot_classification_templates.txt").write_text("this is {c}.\nwe see {c}.\n")
    (home / "test" / "nshards.txt").write_text("2")
    for k in range(2):
        members = []
        for i in range(6):
            buffer = io.BytesIO()
            Image.new("RGB", (16, 16), (i % 3, 0, 0)).save(buffer, "png")
            members += [(f"s{i}.png", buffer.getvalue()), (f"s{i}.cls", str(i % 3).encode())]
        shard(home / "test" / f"{k}.tar", members + [("odd.png", png()), ("odd.cls", b"7")])
    images = open_zero_shot(home)
    assert len(images) == 12 and images.templates == ["this is {c}.", "we see {c}."]
    assert any("2 samples without an image or a label" in note for note in images.notes)
    found = score(Oracle(["w0", "w1", "w2"], 8), images)
    assert found == {"top1": 100.0, "mean_per_class": 100.0}  # no top 5 of three classes


# -----------------------------------------------------------------------------
# Command line and several processes

def test_wrong_command_lines_are_refused_in_one_line(capsys):
    cases = {"--ema-teacher 0.3": "needs --ema", "--ema-teacher 0.9 --ema 0.9": "from 0 to 0.5",
             "--batch-size 1": "at least 2", "--data x": "--teacher is missing",
             "--crd -1": "at least 0", "--mix-prob 2": "from 0 to 1", "--lr 0": "between 0",
             "--reinforced a --write-reinforced b": "write first", "--seed 4294967296": "below",
             "--shared-proj train": "computed once",
             "--randaugment 2 --crop 0": "random crops that --crop 0 turns off", "--crdd 1": "did you mean --crd"}
    for line, said in cases.items():
        with pytest.raises(SystemExit) as stop:
            get_args(line.split())
        error = capsys.readouterr().err
        assert stop.value.code == 2 and said in error and error.count("\n") == 1, line


def test_a_dry_run_trains_three_steps_of_the_demo_and_exports(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "train_distill.py", "--dry-run", "--model", "tiny",
                           "--max-samples", "192", "--cache", "none", "--device", "cpu", "--zero-shot", "demo",
                           "--workers", "0"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = next((tmp_path / "runs" / "train_distill").glob("*_dry_run"))
    results = json.loads((folder / "results.json").read_text())
    assert results["steps"] == 3 and 0 <= results["zero_shot_demo_top1"] <= 100
    assert (folder / "export" / "student_export.pt").exists()


def test_a_master_port_of_0_is_refused_with_the_way_out():
    done = subprocess.run([sys.executable, ROOT / "train_distill.py"], text=True, timeout=60,
                          capture_output=True, env={**os.environ, "MASTER_PORT": "0", "RANK": "0",
                                                    "WORLD_SIZE": "2", "LOCAL_RANK": "0",
                                                    "MASTER_ADDR": "localhost"})
    assert done.returncode == 2 and "--standalone" in done.stderr, done.stderr


# In each of two processes: the gradient of its share of 8 pairs in fp64 against that of one process,
# all losses, mixed and not; then a bad gradient in process 1 alone; then, by main, a whole run.
TWO = '''
import sys
sys.path[:0] = ["tests", "."]
import copy, hashlib, json, math, os, pathlib, types
import torch
import test_train_distill as t
from device import Run, start
run = start("cpu", "fp32")
worst = 0.0
for n, stored, mix in ((8, False, t.Mix()), (8, True, t.Mix(0.7)), (8, False, t.Mix(0.7)),
                       (7, False, t.Mix())):
    scene = t.Scene(n, stored=stored)
    whole, mine = scene.batch, slice(run.rank, None, 2)
    alone = Run(run.device, "fp32", 0, 1, 0, "")
    loss, truth = scene.step(t.options(micro_batch=3, tile=5), mix, run=alone)
    part = lambda x: None if x is None else x[mine]
    scene.batch = t.Batch((whole.images[0][mine],), part(whole.tokens), None,
                          [part(x) for x in whole.answers], [part(x) for x in whole.keys],
                          part(whole.other))
    for p in scene.parameters().values():
        p.grad = None
    found = t.add_gradient(run, scene.model, (scene.adapters, None), scene.teachers, scene.batch,
                           [n - n // 2, n // 2], t.WEIGHTS, mix, t.options(micro_batch=3, tile=5), run.scaler(), 5)
    run.sum_gradients(scene.parameters().values())
    worst = max(worst, t.largest_error(scene.grads(), truth),
                *(abs(float(run.sum(found[k])) - float(loss[k])) for k in loss))
args = types.SimpleNamespace(ema=0.9, lr=0.1, wd=0.1, beta2=0.98, grad_clip=1.0, identity={})
state = t.State(run, scene.model, (scene.adapters, None), args)
before = [p.detach().clone() for p in state.parameters]
if run.rank:
    state.parameters[3].grad.view(-1)[0] = math.nan
run.sum_gradients(state.parameters)
fine = t.train_distill.update(run, state, args)
still = all(a.equal(b) for a, b in zip(before, state.parameters)) and state.skipped == 1
still = all(run.gather_objects(still and not fine))
results = t.main(t.get_args(json.loads(sys.argv[1])))
state = torch.load(pathlib.Path(results_folder := sys.argv[2]) / "checkpoint_last.pt",
                   weights_only=True)
digest = hashlib.sha256(b"".join(w.numpy().tobytes() for w in state["weights"].values())).hexdigest()
words = json.loads(sys.argv[3])
t.main(t.get_args(words + ["--write-reinforced", sys.argv[4], "--views", "2"]))
t.main(t.get_args(words + ["--reinforced", sys.argv[4], "--output-dir", sys.argv[2] + "_stored"]))
if run.rank == 0:
    print("RESULT", worst, still, results["mean_recall"], digest)
run.barrier()
sys.stdout.flush()
os._exit(0)  # as `guard` leaves: gloo's threads abort a tidy end now and then
'''


def test_two_processes_compute_what_one_does_and_skip_a_bad_step_together(school, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    more = ("--mixup", "0.4", "--ema", "0.9", "--train-text", "--workers", "2", "--randaugment", "1",
            "--teacher", school / "second.safetensors", "--embed-dim", "16")
    words = flags(school, "--output-dir", tmp_path / "two", *more)
    base = flags(school, "--epochs", "1", "--randaugment", "1")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script), json.dumps(words), str(tmp_path / "two"), json.dumps(base),
         str(tmp_path / "written")], cwd=ROOT, text=True, timeout=120,
        capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))
    _, worst, still, recall, _ = line.split()
    assert float(worst) < 1e-11 and still == "True"
    results = run_main(*flags(school, "--output-dir", tmp_path / "one", *more))
    run_main(*base, "--write-reinforced", tmp_path / "alone", "--views", "2")
    alone, written = (StoredTeacher.open(tmp_path / name) for name in ("alone", "written"))
    for name, array in alone.arrays.items():
        assert np.abs(array - written.arrays[name]).max() < 1e-5, name
    run_main(*base, "--reinforced", tmp_path / "alone", "--output-dir", tmp_path / "one_stored")
    for a, b in zip(logged(tmp_path / "one_stored"), logged(tmp_path / "two_stored")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    one, two = (torch.load(tmp_path / name / "checkpoint_last.pt", weights_only=True)
                for name in ("one", "two"))
    for part in ("weights", "adapters"):
        for name, tensor in one[part].items():
            assert (tensor - two[part][name]).abs().max() < 2e-5, name
    for a, b in zip(logged(tmp_path / "one"), logged(tmp_path / "two")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert results["mean_recall"] == pytest.approx(float(recall), abs=5)


def test_onnx_files_take_any_number_of_rows_and_give_the_students_numbers(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator
    student = load(None, "mobilevit_xxs:none", "tiny-vit:none", embed_dim=32, image_size=32).eval()
    tokens = torch.zeros(5, 77, dtype=torch.long)
    tokens[:, 0], tokens[torch.arange(5), torch.arange(2, 7)] = 49406, 49407
    inputs = {"image": torch.randn(5, 3, 32, 32), "text": tokens}
    for path in train_distill.write_onnx(student, tmp_path):
        kind = path.stem.partition("_")[2]
        onnx.checker.check_model(onnx.load(path))
        found = ReferenceEvaluator(str(path)).run(None, {kind: inputs[kind].numpy()})[0]
        own = getattr(student, f"encode_{kind}")(inputs[kind], normalize=True)
        assert (torch.tensor(found) - own).abs().max() < 1e-5


def test_onnx_without_its_packages_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(train_distill.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package onnx"):
        run_main("--export", "onnx", "--data", "nowhere", "--teacher", "none", "--device", "cpu")
