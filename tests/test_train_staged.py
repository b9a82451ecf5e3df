"""The staged script: plans, exact steps, chained stages, resuming, forgetting, bad input."""
import base64
import copy
import dataclasses
import io
import json
import math
import os
import pathlib
import pickle
import random
import re
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import test_train_contrastive as contrastive
import train_staged
from clip_model import bert_fields, BertConfig, chinese_clip, CLIP, CONFIGS, load, save, unit
from data import open_pairs
from device import Run, start
from test_distributed import in_processes
from test_train_contrastive import at_call, CLOCK, in_child, scenes, WORDS
from train_staged import (add_gradient, between, choose, decay_groups, get_args, info_nce, main,
                          rate, Sides, STAGE)

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """48 drawn pictures and 24 held out, with two captions each, and a CLIP of 0.1 M weights that
    has dropout in its text tower: what all runs here begin with."""
    folder = scenes(tmp_path_factory.mktemp("staged") / "pairs", 48, 24)
    (folder / "start.safetensors").write_bytes(weights_file(folder).read_bytes())
    return folder


def weights_file(folder, dropout=0.1, **changes):
    text = BertConfig("bert", len(WORDS), 32, 2, 2, 64, 64, dropout=dropout,
                      attention_dropout=dropout)
    torch.manual_seed(0)
    model = CLIP(dataclasses.replace(CONFIGS["tiny-vit"], **bert_fields(text), **{
        "embed_dim": 16, "image_size": 32, "vision_patch": 8, "vision_width": 64,
        "vision_layers": 2, **changes}))
    return pathlib.Path(save(model, folder / "made.safetensors"))


WARM = "name=warm,matching=red|yellow|white,epochs=2"
COLD = "name=cold,matching=green|blue|black,epochs=2"


def flags_of(world, out, *more, stages=(WARM, COLD)):
    """A run of two stages of two epochs of 3 steps of 8 pairs. A flag in `more` takes the place of
    its default."""
    flags = [("--data", world), ("--weights", world / "start.safetensors"),
             ("--tokenizer", world / "vocab.txt"), ("--batch-size", 8), ("--micro-batch", 3),
             ("--captions", "one"), ("--lr", "1e-3"), ("--workers", 0), ("--device", "cpu"),
             ("--log-every", 1), ("--output-dir", out)]
    words = [word for flag, value in flags if flag not in more for word in (flag, value)]
    words += [word for stage in stages for word in ("--stage", stage)]
    return [str(word) for word in (*words, *more)]


def run_main(*flags):
    return main(get_args([str(flag) for flag in flags]))


def plan_file(folder, **content):
    path = folder / "plan.json"
    path.write_text(json.dumps(content), "utf-8")
    return path


def stage_of(**changes):
    """A stage's settings with their defaults, as the method takes them."""
    found = {key: default for key, (default, _, _) in STAGE.items()}
    return types.SimpleNamespace(**{**found, "lr": 1.0, "parent": "init", "micro_batch": 0,
                                    **changes})


def metrics(folder, split="train"):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if split in (None, row["split"])]


def weights_of(path):
    return load(path).state_dict()


def refusal(capsys, *flags):
    """The one line on stderr of a command that must end with exit code 2."""
    capsys.readouterr()
    try:
        code = train_staged.guard(main, get_args, [str(flag) for flag in flags])
    except SystemExit as error:  # argparse
        code = error.code
    text = capsys.readouterr().err
    assert code == 2 and text.startswith("error: ") and text.count("\n") == 1, (code, text)
    return text


@pytest.fixture(scope="module")
def two_stages(world, tmp_path_factory):
    """The plain run of both stages: (folder, results)."""
    folder = tmp_path_factory.mktemp("two")
    return folder, run_main(*flags_of(world, folder))


# -----------------------------------------------------------------------------
# The exact step

def model_of(dtype, dropout=0.0):
    return contrastive.model_of(dtype, dropout)


def step_gradient(model, images, tokens, ids, stage, run=None, scaler=None, seed=5, tile=4,
                  teacher=None):
    """(losses, {name: gradient}) of the script's own step."""
    run = run or start("cpu", "fp32")
    model.zero_grad(set_to_none=True)
    losses = add_gradient(run, model, images, tokens, ids, [len(images)], stage,
                          types.SimpleNamespace(tile=tile), scaler or run.scaler(), seed, teacher)
    return losses, gradients_of(model)


def gradients_of(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_gradient(model, images, tokens, ids, stage, seed=5, teacher=None):
    """The loss of each pair by its definition, and the gradient by autograd through all pieces at
    once, each with its own dropout and its own patches."""
    run = start("cpu", "fp32")
    encoder = train_staged.Encoder(run, model, seed, stage.mask_ratio)
    parts = train_staged.cut(images, tokens, stage.micro_batch, model)
    model.zero_grad(set_to_none=True)
    image = torch.cat([encoder.one("image", i, piece) for i, piece in enumerate(parts[0])])
    text = torch.cat([encoder.one("text", i, piece) for i, piece in enumerate(parts[1])])[parts[2]]
    loss = contrastive.defined_loss(image, text, ids, model.logit_scale.exp(), 0,
                                    contrastive.options(positives=stage.positives))
    if teacher is not None:
        with torch.no_grad():
            far = teacher.encode_image(images, normalize=True), teacher.encode_text(
                tokens, normalize=True)
        for ours, theirs in zip((image, text), far):
            loss = loss + stage.distill * sum(1 - a @ b for a, b in zip(ours, theirs)) / len(ours)
    loss.backward()
    return float(loss), gradients_of(model)


relative_error = contrastive.relative_error


@pytest.mark.parametrize("positives", ["multi", "mask", "diag"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_pieces_with_dropout_give_the_gradient_of_the_whole_batch(positives, dtype, tolerance):
    """11 pairs, some alike, in pieces of 2 and 4, dropout on; every parameter and the scale."""
    model, batch = model_of(dtype, dropout=0.3), contrastive.batch_of(11, dtype)
    for micro in (2, 4):
        stage = stage_of(micro_batch=micro, positives=positives)
        value, theirs = plain_gradient(model, *batch, stage)
        losses, ours = step_gradient(model, *batch, stage)
        assert abs(float(losses["loss"]) - value) < 10 * tolerance
        assert theirs["logit_scale"].abs() > 1e-3
        assert relative_error(ours, theirs) < tolerance
    assert relative_error(step_gradient(model, *batch, stage, seed=6)[1], theirs) > 1e-3


def test_without_dropout_pieces_give_the_gradient_of_one():
    model, batch = model_of(torch.float64), contrastive.batch_of(8, torch.float64)
    whole = step_gradient(model, *batch, stage_of(micro_batch=0))[1]
    for micro in (1, 2, 5):
        ours = step_gradient(model, *batch, stage_of(micro_batch=micro))[1]
        assert relative_error(ours, whole) < 1e-12
        # what Chinese-CLIP's --accum-freq does to the scale
        assert abs(-(-8 // micro) * ours["logit_scale"] - whole["logit_scale"]) > 1e-2


def test_masked_patches_are_the_same_in_both_passes():
    """Half of the 16 patches, others for each image, in pieces of 3; none masked is another."""
    model, batch = model_of(torch.float64), contrastive.batch_of(7, torch.float64)
    stage = stage_of(micro_batch=3, mask_ratio=0.5)
    value, theirs = plain_gradient(model, *batch, stage)
    losses, ours = step_gradient(model, *batch, stage)
    assert abs(float(losses["loss"]) - value) < 1e-12 and relative_error(ours, theirs) < 1e-12
    places = train_staged.Encoder(start("cpu", "fp32"), model, 5, 0.5).patches(7)
    assert places.shape == (7, 8) and all(len(set(row)) == 8 for row in places.tolist())
    assert len({tuple(sorted(row)) for row in places.tolist()}) > 1
    plain = step_gradient(model, *batch, stage_of(micro_batch=3))
    assert relative_error(plain[1], theirs) > 1e-2


def test_staying_near_the_start_is_the_mean_of_one_minus_cosine():
    model, batch = model_of(torch.float64, dropout=0.3), contrastive.batch_of(9, torch.float64)
    teacher = copy.deepcopy(model).requires_grad_(False).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, dtype=p.dtype))
    stage = stage_of(micro_batch=4, distill=0.7)
    value, theirs = plain_gradient(model, *batch, stage, teacher=teacher)
    losses, ours = step_gradient(model, *batch, stage, teacher=teacher)
    assert float(losses["loss"]) == pytest.approx(value, abs=1e-12)
    assert losses["loss"] == losses["infonce"] + 0.7 * losses["departure"]
    assert losses["departure"] > 0.01 and relative_error(ours, theirs) < 1e-12
    same = step_gradient(teacher.eval(), *batch, stage_of(distill=1.0), teacher=teacher)[0]
    assert abs(same["departure"]) < 1e-12


@pytest.mark.parametrize("frozen", ["image", "text", "both"])
def test_a_step_on_kept_features_is_the_step_on_images_and_texts(frozen):
    model, batch = model_of(torch.float64), contrastive.batch_of(9, torch.float64)
    rules = [r for r, side in (("visual", "image"), ("text", "text")) if frozen in (side, "both")]
    choose(model, stage_of(freeze=[*rules, "!visual.proj", "!text_projection"]))
    whole, theirs = step_gradient(model, *batch, stage_of(micro_batch=4))
    images, tokens, ids = batch
    with torch.no_grad():
        images = images if frozen == "text" else model.visual.pooled(images)
        tokens = tokens if frozen == "image" else model.pooled_text(tokens)
    losses, ours = step_gradient(model, images, tokens, ids, stage_of(micro_batch=4))
    assert abs(losses["loss"] - whole["loss"]) < 1e-12
    assert set(ours) == set(theirs) and relative_error(ours, theirs) < 1e-12


def test_a_gradient_scaler_scales_everything_alike():
    model, batch = model_of(torch.float32), contrastive.batch_of(7, torch.float32)
    plain = step_gradient(model, *batch, stage_of(micro_batch=3))[1]
    scaled = step_gradient(model, *batch, stage_of(micro_batch=3), scaler=torch.amp.GradScaler(
        "cpu", init_scale=2.0 ** 16))[1]
    for name, gradient in plain.items():
        assert torch.allclose(scaled[name] / 2 ** 16, gradient, rtol=1e-6, atol=0), name


# -----------------------------------------------------------------------------
# Small data with many equal captions

def test_positives_of_unlike_captions_are_the_clip_loss():
    image, text, _ = contrastive.embeddings(12)
    scale = torch.tensor(14.0, dtype=torch.float64)
    z, goal = scale * image @ text.T, torch.arange(12)
    wanted = (nn.functional.cross_entropy(z, goal) + nn.functional.cross_entropy(z.T, goal)) / 2
    ids = torch.arange(24).view(12, 2)
    found = info_nce(Sides(image, text, ids, 0, None), scale, "multi", 5, torch.float64)
    assert float(found.loss) == pytest.approx(float(wanted), abs=1e-12)


def test_ten_class_names_are_learned_as_positives_and_have_a_floor_as_negatives():
    """The floor of 40 pairs of 10 captions, 4 each, is ln 4 for one-hot targets. Multi: the soft
    targets' own entropy, ln 4 too, is what is left; less it, the loss goes to 0."""
    torch.manual_seed(0)
    label, losses = torch.arange(40) % 10, {}
    ids = torch.stack([torch.arange(40), label], dim=1)
    for positives in ("multi", "mask", "diag"):
        raw = [torch.randn(40, 16, requires_grad=True), torch.randn(10, 16, requires_grad=True)]
        optimizer = torch.optim.Adam(raw, lr=0.1)
        for _ in range(200):
            image, text = unit(raw[0]), unit(raw[1])[label]
            found = info_nce(Sides(image.detach(), text.detach(), ids, 0, None),
                             torch.tensor(30.0), positives, 16, torch.float32)
            optimizer.zero_grad()
            torch.autograd.backward([image, text], [found.image, found.text])
            optimizer.step()
        losses[positives] = float(found.loss)
    assert losses["diag"] > math.log(4) - 0.05
    assert losses["mask"] < 0.1 and losses["multi"] - math.log(4) < 0.1


# -----------------------------------------------------------------------------
# The recipe

@pytest.mark.parametrize("warmup, total", [(3, 20), (100, 1000), (0, 7)])
def test_rates_equal_chinese_clips_cosine(warmup, total):
    for step in range(total):
        wanted = (step + 1) / warmup if step < warmup else 0.5 * (1 + np.cos(
            np.pi * (step - warmup) / (total - warmup)))
        assert rate(step, total, warmup, "cosine") == pytest.approx(wanted, abs=1e-12)


@pytest.fixture(scope="module")
def chinese():
    """Chinese-CLIP's B/16 without memory."""
    with torch.device("meta"):
        return CLIP(CONFIGS["CN-ViT-B/16"])


def test_decay_of_chinese_clip_and_of_everybody_else(chinese):
    moving = choose(chinese, stage_of())[0]
    names = {id(p): name for name, p in moving.items()}
    decayed = {}
    for rule in ("chinese-clip", "standard"):
        groups = decay_groups(moving, stage_of(wd_rule=rule, wd=0.2))
        assert {group["weight_decay"] for group in groups} == {0.0, 0.2}
        decayed[rule] = {names[id(p)] for g in groups for p in g["params"] if g["weight_decay"]}
        assert sum(len(g["params"]) for g in groups) == 351
    assert len(decayed["chinese-clip"]) == 153
    assert sum("LayerNorm" in name for name in decayed["chinese-clip"]) == 25
    assert all(moving[name].ndim > 1 and "embedding" not in name for name in decayed["standard"])
    assert {"visual.conv1.weight", "visual.proj", "text_projection"} <= decayed["standard"]


def test_rates_fall_from_the_heads_down_and_towers_have_their_own(chinese):
    moving = choose(chinese, stage_of())[0]
    groups = decay_groups(moving, stage_of(lr=1.0, image_lr=0.5, layer_decay=0.1))
    lr = {name: group["lr"] for group in groups for p in group["params"]
          for name, q in moving.items() if q is p}
    assert len(lr) == 351
    for name, power, base in (
            ("logit_scale", 0, 1), ("text_projection", 0, 1), ("visual.proj", 0, 1),
            ("visual.transformer.resblocks.11.mlp.c_fc.weight", 1, 0.5),
            ("visual.ln_post.weight", 0, 0.5), ("visual.conv1.weight", 13, 0.5),
            ("visual.transformer.resblocks.0.attn.in_proj_weight", 12, 0.5),
            ("bert.encoder.layer.11.output.dense.weight", 1, 1),
            ("bert.embeddings.word_embeddings.weight", 13, 1)):
        assert lr[name] == pytest.approx(base * 0.1 ** power), name


@pytest.mark.parametrize("rules, free", [
    ([], lambda n: True),
    (["visual"], lambda n: not n.startswith("visual.")),
    (["visual.*", "!visual.proj"], lambda n: not n.startswith("visual.") or n == "visual.proj"),
    (["text"], lambda n: n.startswith(("visual.", "logit_scale"))),
    (["all_but_proj", "logit_scale"], lambda n: n in ("visual.proj", "text_projection")),
    (["visual_lower:1"], lambda n: not n.startswith(
        ("visual.conv1", "visual.class", "visual.positional", "visual.ln_pre",
         "visual.transformer.resblocks.0."))),
    (["text_lower:2"], lambda n: not n.startswith(("bert.embeddings", "bert.encoder"))),
    (["!visual", "bert.*"], lambda n: not n.startswith("bert.")),
    (["*", "!*.ln_?.*"], lambda n: ".ln_1." in n or ".ln_2." in n)])
def test_freezing_holds_what_the_rules_match_in_their_order(rules, free):
    model = model_of(torch.float32)
    model.logit_bias = None
    moving, _ = choose(model, stage_of(freeze=rules))
    assert set(moving) == {name for name, _ in model.named_parameters() if free(name)}
    grads = step_gradient(model, *contrastive.batch_of(6, torch.float32), stage_of())[1]
    assert set(grads) <= set(moving) and len(grads) > 1


def test_all_but_norms_frees_the_norms_alone():
    model = model_of(torch.float32)
    moving = choose(model, stage_of(freeze=["all_but_norms"]))[0]
    assert len(moving) == 2 * (2 + 2 * 2 + 1 + 2 * 2) and all(
        "ln_" in name or "LayerNorm" in name for name in moving)


def test_low_rank_updates_move_attention_and_heads_alone():
    model = model_of(torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stage = stage_of(lora=2)
    moving, updates = choose(model, stage)
    assert len(updates) == 2 * 2 + 2 * 4 and len(moving) == 2 * len(updates) + 3
    batch, optimizer = contrastive.batch_of(6, torch.float32), torch.optim.SGD(moving.values(), 0.1)
    for _ in range(3):
        step_gradient(model, *batch, stage)
        for update in updates.values():
            update.pull()
        optimizer.step()
        for update in updates.values():
            update.push()
    for name, p in model.named_parameters():
        moved = p.detach() - before[name]
        if name in updates:
            assert 1 <= torch.linalg.matrix_rank(moved, rtol=1e-4) <= 2, name
            assert torch.allclose(moved, updates[name].B @ updates[name].A, atol=1e-6)
        else:
            assert moved.any() == (name in moving), name


# -----------------------------------------------------------------------------
# What is said before anything is done

