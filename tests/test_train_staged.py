"""The staged script: plans, exact steps, chained stages, resuming, forgetting, bad input."""
import colorsys
import copy
import csv
import dataclasses
import io
import json
import math
import os
import pathlib
import pickle
import random
import re
import shutil
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
from device import start
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


def weights_file(folder, dropout=0.1, words=len(WORDS)):
    text = BertConfig("bert", words, 32, 2, 2, 64, 64, dropout=dropout,
                      attention_dropout=dropout)
    torch.manual_seed(0)
    model = CLIP(dataclasses.replace(CONFIGS["tiny-vit"], **bert_fields(text), **{
        "embed_dim": 16}))
    return pathlib.Path(save(model, folder / "made.safetensors"))


WARM = "name=warm,matching=red|yellow|white,epochs=2"
COLD = "name=cold,matching=green|blue|black,epochs=3"


def flags_of(world, out, *more, stages=(WARM, COLD)):
    """A run of two stages of 6 steps of 8 pairs, 3 and 2 an epoch. A flag in `more` takes the place of
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
            loss = loss + stage.distill * sum(1 - a @ b for a, b in zip(ours, theirs)) / (
                2 * len(ours))
    loss.backward()
    return float(loss.detach()), gradients_of(model)


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
    """20 pairs of 10 captions, each twice. As each other's negatives they cannot go below ln 2. As
    positives they give up the targets' own entropy, ln 2 too, and nothing else; left out, nothing.
    """
    torch.manual_seed(0)
    label, losses = torch.arange(20) % 10, {}
    ids = torch.stack([torch.arange(20), label], dim=1)
    for positives in ("multi", "mask", "diag"):
        raw = [torch.randn(20, 16, requires_grad=True), torch.randn(10, 16, requires_grad=True)]
        optimizer = torch.optim.Adam(raw, lr=0.2)
        for _ in range(40):
            image, text = unit(raw[0]), unit(raw[1])[label]
            found = info_nce(Sides(image.detach(), text.detach(), ids, 0, None),
                             torch.tensor(30.0), positives, 64, torch.float32)
            optimizer.zero_grad()
            torch.autograd.backward([image, text], [found.image, found.text])
            optimizer.step()
        losses[positives] = float(found.loss)
    assert losses["diag"] > math.log(2) - 0.01
    assert losses["mask"] < 0.1 and losses["multi"] - math.log(2) < 0.1


def test_pairs_are_alike_by_image_and_by_wording_also_across_sets():
    one, two = (types.SimpleNamespace(root=root, paths=paths, owner=owner, captions=captions)
                for root, paths, owner, captions in (
                    ("x", ["a", "b"], [0, 0, 1], ["Red  Dog", "red dog", "cat"]),
                    ("x", ["b", "c"], [0, 1], ["hen", "CAT"])))
    ids = train_staged.identities([one, two])
    assert ids[:, 0].tolist() == [0, 0, 1, 1, 2] and ids[:, 1].tolist() == [0, 0, 1, 2, 1]
    two.root = "y"
    ids = train_staged.identities([one, two])  # of two folders: other images, the same words
    assert ids[:, 0].tolist() == [0, 0, 1, 2, 3] and ids[:, 1].tolist() == [0, 0, 1, 2, 1]


# -----------------------------------------------------------------------------
# The recipe

@pytest.mark.parametrize("warmup, total", [(3, 20), (100, 1000), (0, 7)])
def test_rates_equal_chinese_clips_cosine(warmup, total):
    for step in range(total):
        wanted = (step + 1) / warmup if step < warmup else 0.5 * (1 + np.cos(
            np.pi * (step - warmup) / (total - warmup)))
        assert rate(step, total, warmup, "cosine") == pytest.approx(wanted, abs=1e-12)


def test_a_run_keeps_its_schedule_and_clips_its_gradients(world, tmp_path):
    """Six steps, two of them warm-up; a gradient of norm 1e-9 is nothing beside AdamW's eps."""
    run_main(*flags_of(world, tmp_path, "--warmup", 2, "--schedule", "linear", "--min-lr", 4e-4,
                       "--grad-clip", 1e-9, "--wd", 0, stages=[WARM]))
    assert [row["lr"] for row in metrics(tmp_path / "warm")] == pytest.approx(
        [5e-4, 1e-3, 1e-3, 7.5e-4, 5e-4, 4e-4])
    start, last = weights_of(world / "start.safetensors"), weights_of(
        tmp_path / "warm" / "last.safetensors")
    moved = max(float((start[name] - last[name]).abs().max()) for name in start)
    assert 0 < moved < 6 * 1e-3 * 1e-9 / 1e-6


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

@pytest.mark.parametrize("more, words", [
    (["--set", "warm.epochs=0"], ["'warm'", "no steps", "epochs is 0"]),
    (["--set", "cold.warmup=1000"], ["'cold'", "warm-up of 1000 steps in 6 steps", "warmup=0.1"]),
    (["--set", "cold.warmup=6"], ["warm-up of 6 steps in 6 steps"]),
    (["--set", "cold.learning_rat=1"], ["--set cold.learning_rat=1", "mean 'learning_rate'"]),
    (["--set", "cold.scale=x"], ["scale is 'x'", "train, or a number from 1 to 100"]),
    (["--set", "cold.xyz=1"], ["--set cold.xyz=1", "unknown key", "known: name"]),
    (["--from-stage", "cold", "--until", "warm"], ["--from-stage cold", "give one"]),
    (["--from-stage", "cold", "--only", "warm"], ["--from-stage cold", "give one"]),
    (["--set", "cold.epoch=1"], ["did you mean 'epochs'"]),
    (["--set", "cold.lr=fast"], ["cold.lr=fast", "lr is 'fast'", "a number above 0 to 1"]),
    (["--set", "cold.batch_size=200"], ["'cold'", "200", "which has 2", "no image may come twice"]),
    (["--set", "cold.freeze=visul.*"], ["visul.*", "matches no parameter"]),
    (["--set", "cold.freeze=visual.pro"], ["did you mean 'visual.proj'"]),
    (["--set", "cold.freeze=visual+text"], ["'cold'", "visual+text", "nothing to train"]),
    (["--set", "cold.from=warm:bst"], ["'warm:bst'", "best, last or wise"]),
    (["--set", "cold.from=cold:best"], ["'cold:best'", "an earlier stage (warm)"]),
    (["--set", "warm.from=cold:best"], ["there is none"]),
    (["--set", "cold.from=warm:wise0.5"], ["warm:wise0.5", "not among wise=[]"]),
    (["--set", "warm.from=cold"], ["'cold'", "there is none"]),
    (["--set", "cold.from=cold"], ["'cold'", "an earlier stage (warm)"]),
    (["--set", "cold.from=warm:wise0.5.5"], ["'warm:wise0.5.5'", "best, last or wise"]),
    (["--set", "cold.from=warm:wise."], ["'warm:wise.'", "best, last or wise"]),
    (["--set", "cold.name=warm"], ["two stages are called 'warm'"]),
    (["--model", "tiny"], ["start.safetensors is no tiny", "leave --model out"]),
    (["--query", "a red circle", "--row", "cold"], ["--export"]),
    (["--until", "warm", "--row", "cold", "--export", "hf"], ["--row cold", "zero-shot, warm"]),
    (["--set", "cold.from=no/such.pt"], ["'no/such.pt'", "nor a file"]),
    (["--set", "cold.replay=wrm:0.1"], ["replays wrm", "earlier stages (warm)"]),
    (["--set", "cold.replay=warm:0.95"], ["replay", "0.95"]),
    (["--set", "warm.replay=warm:0.5"], ["replays warm", "there is none"]),
    (["--set", "cold.wise=2"], ["wise", "from 0 to 1"]),
    (["--set", "cold.matching=purple"], ["0 train images", "'purple'"]),
    (["--set", "cold.matching=("], ["regular expression"]),
    (["--set", "hot.lr=1"], ["hot.lr=1", "warm, cold"]), (["--set", "lr=1"], ["STAGE.KEY=VALUE"]),
    (["--set", "cold.lr"], ["KEY=VALUE"]), (["--set", "cold.positives=all"], ["multi, mask, diag"]),
    (["--set", "cold.val=no/val.csv"], ["no/val.csv"]),
    (["--set", "cold.mask_ratio=1"], ["mask_ratio"]),
    (["--only", "hot"], ["--only hot", "warm, cold"]), (["--until", "hot"], ["--until hot"]),
    (["--from-stage", "hot"], ["--from-stage hot"]), (["--only", "cold"], ["train 'warm' first"]),
    (["--stage", "name=warm"], ["two stages are called 'warm'"]),
    (["--stage", "name=init"], ["name is 'init'"]), (["--stage", "name=a/b"], ["a/b"]),
    (["--stage", "data=x"], ["stage 3 has no name"]), (["--stage", "warm"], ["KEY=VALUE"]),
    (["--plan", "plan.json"], ["--plan and --stage"]), (["--epoch", "2"], ["--epoch"]),
    (["--lr", "0"], ["lr is '0'"]), (["--lr", "nan"], ["lr"]), (["--epochs", "2.5"], ["epochs"]),
    (["--batch-size", "1"], ["batch_size", "2"]), (["--tile", "0"], ["--tile"]),
    (["--seed", "4294967296"], ["--seed"]), (["--workers", "many"], ["--workers"]),
    (["--data", "no/such/folder"], ["no/such/folder"]), (["--weights", "no.pt"], ["no.pt"]),
    (["--tokenizer", "no.txt"], ["no.txt"]), (["--device", "tpu"], ["tpu", "cpu"]),
    (["--config", "no.json"], ["no.json"]), (["--model", "ViT-Z", "--weights", "auto"], ["ViT-Z"]),
])
def test_a_plan_that_cannot_be_meant_gets_one_line(world, capsys, tmp_path, more, words):
    text = refusal(capsys, *flags_of(world, tmp_path / "out", *more))
    for word in words:
        assert word in text, text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, words", [
    ('{"stages": [\n {"name": "a",, "epochs": 1}]}', ["plan.json:2:", "not JSON"]),
    ('{"stages": []}', ["no list of stages"]), ("[1]", ["holds a list"]), ("", ["plan.json:1:1"]),
    ('{"stage": [{"name": "a"}]}', ["unknown key 'stage'", "did you mean 'stages'"]),
    ('{"stages": [{"name": "a", "btach": 2}]}', ["stage 'a'", "'btach'", "did you mean 'batch'"]),
    ('{"stages": [{"name": "a", "lr": 1, "lr": 2}]}', ["'lr' stands twice"]),
    ('{"stages": [{"name": "a", "batch": 4, "batch_size": 4}]}', ["'batch_size' a second time"]),
    ('{"stages": [{"name": "a"}], "defaults": {"wdd": 1}}', ["defaults", "'wdd'"]),
    ('{"stages": [{"name": "a"}], "eval_sets": [1]}', ["eval_sets"]),
    ('{"stages": [{"name": "a", "test": "."}], "eval_sets": {"a": "b"}}', ["'a'", "stage too"]),
    ('{"stages": [{"name": "a"}], "eval_sets": {"a": {"data": "b", "matching": "x"}}}', [
        "'a' is a stage too", "its data alone"]),
    ('{"stages": [{"name": "a"}], "eval_sets": {"b": 5}}', ["eval_sets: 'b'", "data is 5"]),
    ('{"stages": [{"name": "a"}], "eval_sets": {"b": ["x"]}}', ["eval_sets: 'b'", "a text"]),
    ('{"stages": [{"name": "a"}], "eval_sets": {"b": {"data": "x", "matching": "("}}}', [
        "eval_sets: 'b'", "matching", "regular expression"]),
    ('{"stages": [{"name": "a"}], "seed": 4294967296}', ["seed is 4294967296", "below"]),
    ('{"stages": [{"name": "a"}], "eval_sets": {" ": "x"}}', ["no name"]),
    ('{"stages": [{"name": "a"}], "eval_sets": {"b": {"path": "c"}}}', ["unknown key 'path'"]),
    ('{"stages": [{"name": "a", "epochs": true}]}', ["epochs is True"]),
])
def test_a_wrong_plan_file_gets_one_line(world, capsys, tmp_path, content, words):
    (tmp_path / "plan.json").write_text(content, "utf-8")
    text = refusal(capsys, *flags_of(world, tmp_path / "out", "--plan", tmp_path / "plan.json",
                                     stages=()))
    for word in words:
        assert word in text, text
    assert not (tmp_path / "out").exists()


def checked(*flags):
    """{stage: (steps, warm-up)} of a plan that is only looked at, and its stages."""
    args = get_args([str(flag) for flag in (*flags, "--check-plan")])
    stages = {stage.name: stage for stage in train_staged.read_plan(copy.deepcopy(args))}
    return {stage["name"]: (stage["steps"], stage["warmup"]) for stage in main(args)["stages"]
            }, stages


def test_a_plan_is_said_and_nothing_is_written(world, tmp_path, capsys):
    found, _ = checked(*flags_of(world, tmp_path / "out", "--set", "cold.epochs=4", "warm.warmup=2"))
    assert found == {"warm": (6, 2), "cold": (8, 1)} and not (tmp_path / "out").exists()
    said = capsys.readouterr().out
    train = open_pairs(world, "train")
    warm = {path for path, i in zip(train.paths, range(99))
            if re.search("red|yellow|white", train.texts_of(i)[0])}
    for words in (f"warm: {len(warm)} images, {2 * len(warm)} captions", "from init; 6 steps, 3 an "
                  "epoch", "warm-up 2 (33%)", "from warm:best", "lr 0.001 is 2560 times",
                  "chosen by mean_recall on", "weights train"):
        assert words in said, words


def test_what_speaks_against_a_plan_is_said(world, tmp_path, capsys):
    rows = ["image,caption", *(f"{world}/{i}.png,Red  circle" for i in range(48))]
    (tmp_path / "alike.csv").write_text("\n".join(rows))
    plan = plan_file(tmp_path, eval_sets={"seen": f"{world}@train"}, stages=[
        {"name": "one", "data": str(world), "captions": "all", "max_samples": 30, "batch": 30},
        {"name": "two", "data": f"{tmp_path}/alike.csv", "batch": 4, "positives": "diag"}])
    args = get_args(flags_of(world, tmp_path / "out", "--check-plan", "--plan", str(plan),
                             "--max-text", 5, stages=()))
    main(args)
    said = capsys.readouterr().out
    for words in ("of 48 images are in the training data of one, two, byte for byte",
                  "60 of 60 captions (100.0 %) are longer than the 5 tokens", "two: 6.0 pairs "
                  "of equal captions in a batch; positives=diag pushes them apart"):
        assert words in said, words


def test_plan_defaults_flags_and_stages_win_in_this_order(world, tmp_path):
    plan = plan_file(tmp_path, init=str(world / "start.safetensors"), vocab=str(world / "vocab.txt"),
                     context_length=20, seed=7, defaults={"lr": 1e-4, "wd": 0.3, "clip_grad": 2},
                     stages=[{"name": "a", "train": str(world), "batch": 6, "lr": 1e-3},
                             {"name": "b", "data": str(world), "init": "a:last"}])
    args = get_args(["--plan", str(plan), "--wd", "0.1", "--set", "b.lr=2e-3,epochs=2"])
    a, b = train_staged.read_plan(args)
    assert (a.lr, a.wd, a.grad_clip, a.batch_size, a.epochs) == (1e-3, 0.1, 2, 6, 5)
    assert (b.lr, b.wd, b.batch_size, b.epochs, b.parent) == (2e-3, 0.1, 128, 2, "a:last")
    assert (args.seed, args.max_text, args.weights) == (7, 20, str(world / "start.safetensors"))
    assert train_staged.read_plan(get_args([
        "--plan", str(plan), "--batch-size", "256"]))[1].lr == 1e-4
    one, = train_staged.read_plan(get_args(["--data", "x.csv", "--batch-size", "256"]))
    assert (one.name, one.lr, one.data) == ("tuned", 5e-5 / 4, "x.csv")
    assert [s.name for s in train_staged.read_plan(get_args([]))] == ["land", "towns", "water"]


def test_a_plan_in_toml_with_a_byte_order_mark_and_crlf(world, tmp_path):
    pytest.importorskip("tomllib")
    for name, text in (("plan.toml", '[[stages]]\nname = "a"\ndata = "x"\nreplay = {}\n'),
                       ("plan.json", '\ufeff{"stages":\r\n[{"name": "a", "data": "x"}]}\r\n')):
        (tmp_path / name).write_bytes(text.encode())
        stage, = train_staged.read_plan(get_args(["--plan", str(tmp_path / name)]))
        assert (stage.name, stage.data, stage.replay) == ("a", "x", {})


def test_spellings_of_other_trainers_mean_the_same():
    args = get_args("--train-data a --val-data b --max-epochs 3 --checkpoint c.pt --num-workers 2 "
                    "--learning-rate 1e-5 --weight-decay 0.1 --context-length 52 --vision-model "
                    "ViT-B-16 --clip-grad 0.5 --batch 16 --vocab v.txt --save_step_frequency 9 "
                    "--stage name=x,batch=8 --stage name=y,lr_text=0,init=x:last".split())
    x, y = train_staged.read_plan(args)
    assert (x.data, x.val, x.epochs, x.lr, x.wd, x.grad_clip, x.batch_size) == (
        "a", "b", 3, 1e-5, 0.1, 0.5, 8)
    assert (args.weights, args.workers, args.max_text, args.model, args.tokenizer, args.save_every
            ) == ("c.pt", 2, 52, "ViT-B-16", "v.txt", 9)
    assert (y.text_lr, y.parent, y.batch_size) == (0, "x:last", 16)


def test_plans_take_the_spellings_that_flags_take():
    found = train_staged.check_settings({
        "train-data": "x", "learning_rate": 1e-5, "max_steps": 3, "lr-text": 1e-6, "accum_freq": 2,
        "logit_scale": 100}, STAGE, train_staged.ALSO, "plan")
    assert found == {"data": "x", "lr": 1e-5, "steps": 3, "text_lr": 1e-6, "accum_steps": 2,
                     "scale": 100}


def test_a_plan_in_the_words_of_chinese_clips_users_is_understood(tmp_path):
    plan = {"name": "cn", "model": "ViT-B-16@RoBERTa-wwm-ext-base-chinese", "init": "clip_cn.pt",
            "vocab": None, "context_length": 52, "seed": 1, "device": "auto", "precision": "auto",
            "defaults": {"wd": 0.2, "betas": [0.9, 0.95], "eps": 1e-6, "clip_grad": 1.0, "loss":
                         "multi", "select": "mean_r1", "eval_every": "epoch", "schedule": "const",
                         "wd_rule": "cnclip", "logit_scale": "fixed:100"},
            "eval_sets": {"muge": "MUGE/lmdb/valid"},
            "stages": [
                {"name": "muge", "train": "MUGE/lmdb/train", "batch": 512, "lr": 1e-5, "epochs": 5,
                 "warmup": 1000, "augment": "seed"},
                {"name": "own", "train": "own.csv", "from": "muge:best", "batch": 16, "lr": 1e-6,
                 "wd": 0.1, "warmup": 10, "epochs": 30, "augment": "strong", "freeze": [
                     "visual.*", "!visual.proj"], "replay": {"muge": 0.1}, "early_stop": 8}]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    args = get_args(["--plan", str(tmp_path / "plan.json")])
    first, own = train_staged.read_plan(args)
    assert (args.weights, args.tokenizer, args.max_text) == ("clip_cn.pt", None, 52)
    assert (first.data, first.batch_size, first.augment, first.warmup) == (
        "MUGE/lmdb/train", 512, "light", 1000)
    assert (own.beta2, own.select, own.eval_every, own.schedule, own.wd_rule, own.scale) == (
        0.95, "r1", 1, "constant", "chinese-clip", 100)
    assert (own.positives, own.wd, own.replay) == ("multi", 0.1, {"muge": 0.1})
    assert own.parent == "muge:best"
    plan["defaults"]["betas"] = [0.8, 0.95]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(train_staged.UserError, match="beta2 is .0.8, 0.95.; expected .0.9"):
        train_staged.read_plan(get_args(["--plan", str(tmp_path / "plan.json")]))


def test_help_is_quick_and_needs_neither_torchvision_nor_lmdb():
    code = """
import sys
for name in ("torchvision", "torch_npu", "lmdb", "onnx"):
    sys.modules[name] = None
import train_staged
assert train_staged.get_args([]).plan is None
"""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - began < 30  # about 2 s on an idle core


# -----------------------------------------------------------------------------
# Data of all kinds, and spoilt data

def test_named_held_out_data_leaves_all_else_to_training(world, tmp_path):
    """A table without splits is cut 80/10/10, but not where val or test are named."""
    rows = ["image,caption", *(f"{i}.png,a red circle" for i in range(48))]
    for name in ("bare", *range(48)):
        (tmp_path / f"{name}.{'csv' if name == 'bare' else 'png'}").write_bytes(
            "\n".join(rows).encode() if name == "bare" else (world / f"{name}.png").read_bytes())
    counted = {}
    for name, more in (("cut", ""), ("val", f",val={world}"), ("test", f",test={world}")):
        args = get_args(flags_of(world, tmp_path, stages=[f"name=x,data={tmp_path}/bare.csv{more}"]))
        stage, = train_staged.read_plan(args)
        args.seed = 1
        model = train_staged.open_model(args, False)
        tests = train_staged.open_sets([stage], train_staged.open_texts(args, model), model, args)
        counted[name] = [len(stage.train.paths), stage.val and len(stage.val.images.paths),
                         len(tests["x"].images.paths)]
    assert sum(counted["cut"]) == 48 and counted["val"] == [48, 24, 24]
    assert sum(counted["test"][:2]) == 48 and 0 < counted["test"][1] < 12
    assert counted["test"][2] == 24


def test_an_eval_set_with_the_name_of_a_stage_is_its_test_set(world, tmp_path):
    plan = plan_file(tmp_path, eval_sets={"a": f"{world}@train"}, stages=[
        {"name": "a", "epochs": 1}])
    result = run_main(*flags_of(world, tmp_path / "out", "--plan", plan, stages=()))
    assert {name: found["images"] for name, found in result["rows"][0]["sets"].items()} == {"a": 48}


def test_held_out_pairs_are_the_val_split_and_read_in_their_own_way(world, tmp_path):
    """A `val` of three splits is its val, not the test it is judged on; layout and caption file are
    those of the data alone; what is trained on is not held out."""
    with open(world / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for i, row in enumerate(rows):
        row["split"] = "test" if i % 6 == 0 else row["split"]
    for folder, found in ((tmp_path / "three", rows), (tmp_path / "own", rows[:20])):
        shutil.copytree(world, folder)
        with open(folder / "pairs.csv", "w", newline="") as file:
            out = csv.DictWriter(file, ("image", "caption", "split"))
            out.writeheader()
            out.writerows(found)
    (tmp_path / "own" / "pairs.csv").rename(tmp_path / "own" / "zh.csv")

    def sets(line):
        args = get_args(flags_of(world, tmp_path, stages=[line]))
        stage, = train_staged.read_plan(args)
        args.seed = 1
        model = train_staged.open_model(args, False)
        tests = train_staged.open_sets([stage], train_staged.open_texts(args, model), model, args)
        return [set(pairs.paths) if pairs else None for pairs in (
            stage.train, stage.val and stage.val.images, tests["x"].images)]
    splits = {split: {row["image"] for row in rows if row["split"] == split}
              for split in ("train", "val", "test")}
    three, own = tmp_path / "three", tmp_path / "own"
    assert sets(f"name=x,data={world},val={three}")[1] == splits["val"]
    assert sets(f"name=x,data={world},val={three}@test")[1] == splits["test"]
    assert sets(f"name=x,data={three}@val") == [splits["val"], None, splits["test"]]
    for told in (f"caption_file={own}/zh.csv", f"caption_file={own}/zh.csv,layout=table"):
        train, val, test = sets(f"name=x,data={own},{told},val={three},test={world}")
        assert train <= {row["image"] for row in rows[:20]} and val == splits["val"]
        assert test == {f"{i}.png" for i in range(48, 72)}


def test_without_held_out_images_nothing_stops_early(world, tmp_path, capsys):
    with open(world / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    shutil.copytree(world, tmp_path / "data")
    with open(tmp_path / "data" / "pairs.csv", "w", newline="") as file:
        out = csv.DictWriter(file, ("image", "caption", "split"))
        out.writeheader()
        out.writerows({**row, "split": "train"} for row in rows if row["split"] == "train")
    stage = f"name=x,epochs=1,data={tmp_path}/data@train,test={world}"
    text = refusal(capsys, *flags_of(world, tmp_path / "out", stages=[stage + ",early_stop=2"]))
    assert "early_stop needs held-out images" in text and "val=" in text
    run_main(*flags_of(world, tmp_path / "out", stages=[stage]))
    assert json.loads((tmp_path / "out" / "x" / "results.json").read_text())["best"] is None


def test_weights_to_start_from_are_looked_at_before_any_stage(world, tmp_path, capsys):
    """A file of another size, one that is none; a folder of weights, and when its files change."""
    torch.manual_seed(0)
    other = pathlib.Path(save(CLIP(CONFIGS["tiny-vit"]), tmp_path / "other.safetensors"))
    (tmp_path / "spoilt.pt").write_bytes(b"no weights")
    for path, words in ((other, "text_width 64, not 32"), (
            tmp_path / "spoilt.pt", "spoilt.pt")):
        text = refusal(capsys, *flags_of(world, tmp_path / "out", "--set", f"cold.from={path}"))
        assert str(path) in text and words in text and not (tmp_path / "out").exists()
    hf = pathlib.Path(save(load(world / "start.safetensors"), tmp_path / "hf", "hf")).parent
    flags = flags_of(world, tmp_path / "out", "--set", f"cold.from={hf}", "cold.steps=1",
                     "warm.steps=1", "warm.warmup=0", "cold.warmup=0")
    result = run_main(*flags)
    assert run_main(*flags)["rows"] == json.loads(json.dumps(result["rows"]))
    (hf / "config.json").write_text((hf / "config.json").read_text() + " ")
    assert "cold (parent_sha256 was" in refusal(capsys, *flags)
    (tmp_path / "out" / "warm" / "last.safetensors").unlink()
    text = refusal(capsys, *flags_of(
        world, tmp_path / "out", "--set", "warm.steps=1", "warm.warmup=0", "new.from=warm:last",
        stages=(WARM, COLD.replace("cold", "new"))))
    assert "warm/last.safetensors, which stage 'new' starts from, is gone" in text
    assert not (tmp_path / "out" / "new").exists()


def test_a_model_that_is_named_must_be_that_of_the_weights(tmp_path):
    path = save(CLIP(CONFIGS["tiny-vit"]), tmp_path / "clip.safetensors")
    for name in ("tiny-vit", "TINY_VIT", None):
        args = types.SimpleNamespace(seed=0, model=name, weights=str(path))
        assert train_staged.open_model(args, False).config == CONFIGS["tiny-vit"]
    args.model = "ViT-B/32"
    with pytest.raises(train_staged.UserError, match="clip.safetensors is no ViT-B/32"):
        train_staged.open_model(args, False)


def test_other_images_captions_or_words_under_the_same_names_are_noticed(world, tmp_path, capsys):
    """A caption that moves to the next image, an image with other pixels, another vocabulary."""
    shutil.copytree(world, tmp_path / "data")
    flags = flags_of(tmp_path / "data", tmp_path / "out", "--epochs", 1, "--captions", "all",
                     stages=["name=x,steps=1,warmup=0"])
    run_main(*flags)
    table, vocabulary = tmp_path / "data" / "pairs.csv", tmp_path / "data" / "vocab.txt"
    rows = table.read_text().splitlines()
    moved = [*rows[:2], rows[2].replace("0.png", "1.png"), *rows[3:]]
    held = [*rows[:-3], rows[-3].replace("70.png", "71.png"), *rows[-2:]]
    assert moved != rows != held
    words = vocabulary.read_text().split("\n")
    i = words.index("red")
    for path, changed, key in (
            (table, "\n".join(moved).encode(), "data"),
            (table, "\n".join(held).encode(), "val"),
            (tmp_path / "data" / "3.png", (world / "4.png").read_bytes(), "data"),
            (vocabulary, "\n".join([*words[:i], "rouge", *words[i + 1:]]).encode(), "vocabulary")):
        kept = path.read_bytes()
        path.write_bytes(changed)
        text = refusal(capsys, *flags)
        assert "stale" in text and f"{key} was '" in text, (path, text)
        path.write_bytes(kept)
    run_main(*flags)
    assert "holds this plan, finished" in capsys.readouterr().out


@pytest.mark.parametrize("name, hint", [
    ("warm/config.json", "--from-stage warm"), ("warm/results.json", "--from-stage warm"),
    ("results.json", "remove it")])
def test_a_damaged_file_of_a_run_is_named(world, two_stages, tmp_path, capsys, name, hint):
    shutil.copytree(two_stages[0], tmp_path / "run")
    for content in ("", "[]", '{"identity": '):
        (tmp_path / "run" / name).write_text(content)
        text = refusal(capsys, *flags_of(world, tmp_path / "run"))
        assert f"{name} is damaged" in text and hint in text


def test_a_finished_plan_is_judged_anew_by_other_rules(world, two_stages, tmp_path):
    shutil.copytree(two_stages[0], tmp_path / "run")
    result = run_main(*flags_of(world, tmp_path / "run", "--lose", 50))
    assert "best that loses at most 50 anywhere" in result["recommended"]
    assert "best that loses at most 50 anywhere" in run_main(*flags_of(
        world, tmp_path / "run", "--lose", 50))["recommended"]


def test_spoilt_pairs_are_counted_and_borne(tmp_path, capsys):
    """A byte-order mark and CRLF, an image of one pixel, half a JPEG, an empty caption, a lone
    surrogate, names that are no numbers, a caption twice; one image in a hundred may be lost."""
    folder = scenes(tmp_path / "pairs", 110, 12)
    with open(folder / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rows[3]["caption"], rows[5]["caption"] = "", "one \ud800 circle"
    rows[8], rows[9]["image"] = dict(rows[7]), "str\u00ed ng.png"
    (folder / "pairs.csv").unlink()
    (folder / "pairs.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(
        map(json.dumps, rows)).encode())
    Image.new("RGB", (1, 1), "red").save(folder / "str\u00ed ng.png")
    buffer = io.BytesIO()
    Image.open(folder / "7.png").resize((300, 300)).save(buffer, "JPEG")
    (folder / "7.png").write_bytes(buffer.getvalue()[:len(buffer.getvalue()) // 2])
    weights_file(folder).rename(folder / "start.safetensors")
    result = run_main(*flags_of(folder, tmp_path / "out", "--batch-size", 55, "--cache", "none",
                                stages=["name=all,epochs=2"]))
    rows = metrics(tmp_path / "out" / "all")
    assert result["stages"]["all"]["steps"] == 4 and all(row["loss"] > 0 for row in rows)
    assert sum(row.get("replaced", 0) for row in rows) >= 1
    assert "1 rows without image or caption left out" in capsys.readouterr().out


@pytest.mark.parametrize("line, words", [
    ('{"image": "1.png", "caption": ', ["pairs.jsonl", "line 2"]),
    ("[3]", ["pairs.jsonl", "line 2", "not an object"])])
def test_a_bad_line_of_the_data_is_named(world, capsys, tmp_path, line, words):
    good = json.dumps({"image": str(world / "0.png"), "caption": "a red circle"})
    (tmp_path / "pairs.jsonl").write_text("\n".join([good, line, good]))
    text = refusal(capsys, *flags_of(world, tmp_path / "out", "--data", tmp_path / "pairs.jsonl"))
    for word in words:
        assert word in text, text


def test_a_hostile_pickle_of_an_lmdb_is_refused_and_not_run(world, capsys, tmp_path, monkeypatch):
    from test_chinese import Evil, write_lmdb, write_split_lmdb
    monkeypatch.chdir(tmp_path)
    write_split_lmdb(tmp_path / "lmdb")
    write_lmdb(tmp_path / "lmdb/train/pairs", {b"0": pickle.dumps((1, 2, Evil())),
                                               b"num_samples": b"1"})
    text = refusal(capsys, *flags_of(world, tmp_path / "out", "--data", tmp_path / "lmdb"))
    assert "refused and was not run" in text
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


# -----------------------------------------------------------------------------
# A chain of stages

def plain_logs(folder):
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in metrics(folder, None)]


RESULTS = ("rows", "forgetting", "backward_transfer", "forward_transfer", "changes", "recommended")


def assert_same_plan(one, other, stages=("warm", "cold")):
    """Weights of all files, optimisers, logs and the matrix, to the bit."""
    for stage in stages:
        ours, theirs = (torch.load(folder / stage / "checkpoint_last.pt", weights_only=True)
                        for folder in (one, other))
        for i, moments in ours["optimizer"]["state"].items():
            for name, value in moments.items():
                assert torch.equal(value, theirs["optimizer"]["state"][i][name])
        for key in train_staged.State.PLAIN[:-1]:
            assert ours[key] == theirs[key], key
        names = {path.name for path in (one / stage).glob("*.safetensors")}
        assert names == {path.name for path in (other / stage).glob("*.safetensors")}
        for name in names:
            left, right = weights_of(one / stage / name), weights_of(other / stage / name)
            assert all(torch.equal(left[key], right[key]) for key in left), (stage, name)
        assert plain_logs(one / stage) == plain_logs(other / stage)
    ours, theirs = (json.loads((folder / "results.json").read_text()) for folder in (one, other))
    for row in (*ours["rows"], *theirs["rows"]):
        row["weights"] = pathlib.Path(row["weights"]).name
    for key in RESULTS:
        assert ours[key] == theirs[key], key


def test_a_stage_begins_with_the_best_of_the_one_before(world, two_stages):
    folder, results = two_stages
    before, after = results["rows"][1:]
    for path, row in (("warm", before), ("cold", after)):
        found = torch.load(folder / path / "checkpoint_last.pt", weights_only=True)
        assert found["step"] == 6 and all(
            moments["step"] == 6 for moments in found["optimizer"]["state"].values())
        rows = metrics(folder / path, None)
        held = [r for r in rows if r["split"] == f"{path} val"]
        assert [r["step"] for r in held] == ([0, 3, 6] if path == "warm" else [0, 2, 4, 6])
        assert row["sets"][path]["mean_recall"] == max(r["mean_recall"] for r in held)
    first = metrics(folder / "cold", "cold val")[0]
    for key in ("mean_recall", "i2t_r1", "t2i_r5", "gap"):
        assert first[key] == before["sets"]["cold"][key], key
    assert results["mean_recall"] == after["sets"]["cold"]["mean_recall"]
    identity = json.loads((folder / "cold" / "config.json").read_text())["identity"]
    assert identity["parent"] == "warm:best"
    assert identity["parent_sha256"] == train_staged.sha256_of(folder / "warm" / "best.safetensors")
    start, last = weights_of(world / "start.safetensors"), weights_of(folder / "cold" /
                                                                       "last.safetensors")
    assert any(not torch.equal(start[name], last[name]) for name in start)


def test_what_a_run_leaves_behind(two_stages):
    folder, results = two_stages
    assert {path.name for path in folder.iterdir()} >= {
        "config.json", "command.txt", "env.json", "log.txt", "results.json", "plan.json",
        "matrix.md", "warm", "cold"}
    for key in ("method", "data", "model", "seconds", "peak_memory_mb", "device", "precision", "git",
                "i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "mean_recall",
                "samples_per_second", "image_ms", "text_ms"):
        assert key in results, key
    assert results["method"] == "staged" and results["samples_per_second"] > 0
    assert "| zero-shot |" in (folder / "matrix.md").read_text()
    for row in metrics(folder / "warm"):
        assert row["ln_batch"] == pytest.approx(math.log(8)) and row["lr"] <= 1e-3


def test_a_finished_plan_does_nothing(world, two_stages, capsys):
    folder, results = two_stages
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    began = time.perf_counter()
    again = run_main(*flags_of(world, folder))
    assert time.perf_counter() - began < 2
    assert "finished" in capsys.readouterr().out
    assert again["rows"] == json.loads((folder / "results.json").read_text())["rows"]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before


def test_an_edited_plan_is_stale_until_trained_again(world, two_stages, tmp_path, capsys):
    """The stage before stays, bit for bit; the command that is refused changes nothing."""
    folder = tmp_path / "run"
    shutil.copytree(two_stages[0], folder)
    kept = {path: path.read_bytes() for path in folder.rglob("*.json")}
    edited = flags_of(world, folder, "--set", "cold.lr=5e-4")
    text = refusal(capsys, *edited)
    assert "stale" in text and "cold (lr was 0.001, now 0.0005)" in text
    assert "--from-stage cold" in text
    text = refusal(capsys, *flags_of(world, folder, "--set", "warm.wd=0.5"))
    assert "stale" in text and "warm (wd was 0.2, now 0.5)" in text
    text = refusal(capsys, *flags_of(world, folder, "--seed", 2))
    assert "seed was 1, now 2" in text
    (folder / "warm" / "best.safetensors").rename(folder / "away")
    text = refusal(capsys, *flags_of(world, folder))
    assert f"{folder}/warm/best.safetensors" in text and "--from-stage warm" in text
    (folder / "away").rename(folder / "warm" / "best.safetensors")
    assert {path: path.read_bytes() for path in folder.rglob("*.json")} == kept
    result = run_main(*edited, "--from-stage", "cold")
    assert metrics(folder / "cold")[-1]["lr"] < 5e-4 and result["rows"][2]["row"] == "cold"
    assert plain_logs(folder / "warm") == plain_logs(two_stages[0] / "warm")
    assert run_main(*edited)["rows"] == json.loads((folder / "results.json").read_text())["rows"]
    # another parent under the same name
    sha = train_staged.sha256_of(folder / "warm" / "best.safetensors")
    (folder / "warm" / "best.safetensors").write_bytes(
        (world / "start.safetensors").read_bytes())
    text = refusal(capsys, *edited)
    assert "stale" in text and f"parent_sha256 was '{sha}'" in text and "cold" in text


def test_a_stage_before_without_its_weights_is_an_error(world, two_stages, tmp_path, capsys):
    shutil.copytree(two_stages[0] / "warm", tmp_path / "warm")
    (tmp_path / "warm" / "best.safetensors").unlink()
    text = refusal(capsys, *flags_of(world, tmp_path))
    assert f"{tmp_path}/warm/best.safetensors" in text and "is gone" in text
    assert not (tmp_path / "cold").exists()


def test_parts_of_a_plan_make_the_whole(world, two_stages, tmp_path):
    """One stage today, the next tomorrow: the bits of both at once."""
    first = run_main(*flags_of(world, tmp_path, "--until", "warm"))
    assert [row["row"] for row in first["rows"]] == ["zero-shot", "warm"]
    assert not (tmp_path / "cold").exists()
    run_main(*flags_of(world, tmp_path, "--only", "cold"))
    assert_same_plan(two_stages[0], tmp_path)


def test_a_plan_is_written_with_its_seed_of_zero(world, tmp_path):
    run_main(*flags_of(world, tmp_path, "--seed", 0, "--eval-only"))
    assert json.loads((tmp_path / "plan.json").read_text())["seed"] == 0


def test_config_json_runs_again(two_stages, tmp_path):
    folder = two_stages[0]
    run_main("--config", folder / "config.json", "--output-dir", tmp_path)
    assert_same_plan(folder, tmp_path)


def test_a_dry_run_takes_two_steps_of_each_stage_beside_the_real_run(world, tmp_path):
    for stages in ([WARM], [WARM, COLD]):
        result = run_main(*flags_of(world, tmp_path / "run", "--dry-run", stages=stages))
    assert [result["stages"][name]["steps"] for name in ("warm", "cold")] == [2, 2]
    assert result["dry_run"] and not (tmp_path / "run").exists()


def test_eval_only_scores_the_start_and_trains_nothing(world, two_stages, tmp_path):
    result = run_main(*flags_of(world, tmp_path, "--eval-only"))
    assert [row["row"] for row in result["rows"]] == ["zero-shot"]
    assert result["rows"][0]["sets"] == json.loads(
        (two_stages[0] / "results.json").read_text())["rows"][0]["sets"]
    assert not (tmp_path / "warm").exists()


def test_a_held_scale_is_its_stages_alone(world, tmp_path):
    result = run_main(*flags_of(world, tmp_path, "--set", "cold.scale=20", "warm.epochs=1",
                                "cold.epochs=1"))
    scales = [row["sets"]["warm"]["scale"] for row in result["rows"]]
    assert scales[0] == pytest.approx(1 / 0.07, rel=1e-4)
    assert [row["scale"] for row in metrics(tmp_path / "cold")] == 2 * [pytest.approx(20)]
    assert all(abs(row["scale"] - 1 / 0.07) < 2 for row in metrics(tmp_path / "warm"))


# -----------------------------------------------------------------------------
# Stopped, and gone on with

RICH = [f"{WARM},augment=light,wise=0.5,early_stop=4", f"{COLD},augment=light,replay=warm:0.25,"
        "distill=0.5,dropout=0.2,mask_ratio=0.25,lora=2"]


@pytest.fixture(scope="module")
def rich(world, tmp_path_factory):
    """A plan with augmentation, dropout, replay and more, uninterrupted, saved in every step."""
    folder = tmp_path_factory.mktemp("rich")
    run_main(*flags_of(world, folder, "--save-every", 1, stages=RICH))
    return folder


@pytest.mark.parametrize("owner, name, numbers, workers", [
    (train_staged, "add_gradient", [1], 0),               # before the first step is saved
    (train_staged, "add_gradient", range(2, 6), 2),       # inside the first stage
    (train_staged, "add_gradient", range(8, 13), 0),      # inside the second
    (os, "fsync", range(20, 60), 0), (os, "replace", range(30, 60), 0)])  # while writing
def test_a_kill_at_any_moment_and_the_same_command_give_the_same_bits(
        world, rich, tmp_path, owner, name, numbers, workers):
    number = random.Random(f"{name} {workers}").choice(numbers)
    flags = "--save-every", 1, "--workers"

    def work():
        at_call(owner, name, number)
        run_main(*flags_of(world, tmp_path, *flags, 0, stages=RICH))
    assert in_child(work) == -signal.SIGKILL
    assert not (tmp_path / "results.json").exists()
    run_main(*flags_of(world, tmp_path, *flags, workers, stages=RICH))
    assert_same_plan(rich, tmp_path)


@pytest.mark.parametrize("at", [0, 6, 9])
def test_sigterm_saves_and_the_plan_goes_on_to_the_same_bits(world, two_stages, tmp_path, at,
                                                             monkeypatch):
    """Before the first step, at the end of a stage, and inside the next."""
    taken = []

    def until(*args):
        taken.append(1)
        if len(taken) == at:
            signal.raise_signal(signal.SIGTERM)
        return add_gradient(*args)
    score = train_staged.finish_epoch

    def scored(*args):
        score(*args)
        if at == len(taken) == 0:
            signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(train_staged, "add_gradient", until)
    monkeypatch.setattr(train_staged, "finish_epoch", scored)
    flags = flags_of(world, tmp_path)
    assert train_staged.guard(main, get_args, flags) == 128 + signal.SIGTERM
    run_main(*flags)
    assert len(taken) == 12
    assert_same_plan(two_stages[0], tmp_path)


def test_a_loss_that_is_no_number_is_skipped_and_three_stop(world, tmp_path, capsys, monkeypatch):
    taken = []

    def spoilt(*args):
        losses = add_gradient(*args)
        taken.append(1)
        if len(taken) in bad:
            return {**losses, "loss": losses["loss"] * math.nan}
        return losses
    monkeypatch.setattr(train_staged, "add_gradient", spoilt)
    flags, bad = flags_of(world, tmp_path), {2}
    flags = flags_of(world, tmp_path / "one", stages=[WARM])
    assert train_staged.guard(main, get_args, flags) == 0
    said = capsys.readouterr().out
    assert said.count("step skipped") == 1 and ".png" in said
    taken.clear()
    bad = {2, 3, 4}
    flags = flags_of(world, tmp_path / "three", stages=[WARM])
    assert train_staged.guard(main, get_args, flags) == 3
    assert "3 steps in a row" in capsys.readouterr().err
    stored = torch.load(tmp_path / "three" / "warm" / "checkpoint_last.pt", weights_only=True)
    assert stored["step"] == 3 and len(taken) == 4
    bad = set()
    assert train_staged.guard(main, get_args, flags) == 0


def test_two_processes_give_the_numbers_of_one(world, tmp_path):
    """Replay, distance to the start and uneven shares of 7 pairs; without dropout, as pieces lie
    differently."""
    def run_of(count):
        out = tmp_path / str(count)
        flags = flags_of(world, out, "--batch-size", 7, "--micro-batch", 2, "--eps", 1e-4,
                         "--dropout", 0, stages=[WARM, COLD + ",replay=warm:0.3,distill=0.5"])
        codes, said = in_processes(count, lambda rank: train_staged.guard(main, get_args, flags))
        assert codes == [0] * count, said
        assert said.count("stage warm from init") == 1
        return out
    one, several = run_of(1), run_of(2)
    for stage in ("warm", "cold"):
        ours, theirs = plain_logs(one / stage), plain_logs(several / stage)
        assert len(ours) == len(theirs) >= 9
        for a, b in zip(ours, theirs):
            assert a.keys() == b.keys() and a["split"] == b["split"]
            for key in set(a) - {"split", "epoch"}:
                assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key
        first, second = (weights_of(out / stage / "last.safetensors") for out in (one, several))
        for name in first:
            assert torch.allclose(first[name], second[name], atol=1e-6, rtol=0), name
    ours, theirs = (json.loads((out / "results.json").read_text()) for out in (one, several))
    for a, b in zip(ours["rows"], theirs["rows"]):
        for name in a["sets"]:
            assert a["sets"][name]["mean_recall"] == b["sets"][name]["mean_recall"]
            assert a["sets"][name]["interval"] == b["sets"][name]["interval"]


# -----------------------------------------------------------------------------
# What is forgotten, and what is kept

def two_domains(folder):
    """12 colours and 12 places of a bar, each with a word for a caption, held out from nothing;
    five of the colours once more; and a CLIP whose text tower tells words apart. -> the folder"""
    folder.mkdir()
    words = {"colours": [f"c{i}" for i in range(12)], "bars": [f"b{i}" for i in range(12)]}
    for i in range(12):
        hue = tuple(int(255 * x) for x in colorsys.hsv_to_rgb(i / 12, 1, 1))
        Image.new("RGB", (32, 32), hue).save(folder / f"c{i}.png")
        bar, (x, y) = Image.new("RGB", (32, 32)), (8 * (i % 4), 10 * (i // 4))
        bar.paste("white", (x, y, x + 8, y + 10))
        bar.save(folder / f"b{i}.png")
    for name, some in (*words.items(), ("five", words["colours"][:5])):
        (folder / f"{name}.csv").write_text("image,caption,split\n" + "".join(
            f"{word}.png,{word},{split}\n" for split in ("train", "val") for word in some))
    vocabulary = [*WORDS[:4], *words["colours"], *words["bars"]]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    model = load(weights_file(folder, 0.0, len(vocabulary)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("bert.") and p.ndim > 1:
                p.normal_(0, 0.18, generator=torch.Generator().manual_seed(len(name)))
    save(model, folder / "start.safetensors")
    return folder


@pytest.fixture(scope="module")
def forgetting(tmp_path_factory):
    """Colours by heart, then bars, without and with half of each batch replayed: the folder and the
    two results. The first stage is trained once."""
    folder = tmp_path_factory.mktemp("forgetting")
    data = two_domains(folder / "pairs")
    results = {}
    for name, more in (("plain", {}), ("replayed", {"replay": {"colours": 0.5}})):
        plan = plan_file(folder, eval_sets={"five": f"{data}/five.csv"}, stages=[
            {"name": "colours", "data": f"{data}/colours.csv"},
            {"name": "bars", "data": f"{data}/bars.csv", **more}])
        results[name] = run_main(*flags_of(
            data, folder / name, "--epochs", 40, "--batch-size", 12, "--micro-batch", 0, "--lr",
            "1.5e-3", "--select", "r1", "--eval-every", 20, "--log-every", 100, "--wd", 0,
            "--wise", "1+0.5+0", "--plan", plan, stages=()))
        if name == "plain":
            shutil.copytree(folder / "plain" / "colours", folder / "replayed" / "colours")
    return folder, results


def test_twelve_pairs_are_learned_by_heart_and_so_are_five_of_them(forgetting, capsys):
    """A held-out set smaller than a batch: recall inside batches would read 5/12 at most."""
    folder, results = forgetting
    row = results["plain"]["rows"][1]["sets"]
    assert row["five"]["images"] == 5 and row["colours"]["images"] == 12
    for name in ("colours", "five"):
        assert row[name]["i2t_r1"] == row[name]["t2i_r1"] == row[name]["mean_recall"] == 100
    assert "five: a pool of 5" in (folder / "plain" / "log.txt").read_text()


def test_the_matrix_is_whole_and_its_sums_are_those_by_hand(forgetting):
    result = forgetting[1]["plain"]
    assert [row["row"] for row in result["rows"]] == [
        "zero-shot", "colours", "colours wise 1", "colours wise 0.5", "colours wise 0", "bars",
        "bars wise 1", "bars wise 0.5", "bars wise 0"]
    r = {row["row"]: {name: found["r1"] for name, found in row["sets"].items()}
         for row in result["rows"]}
    assert all(set(cells) == {"colours", "bars", "five"} for cells in r.values())
    for row in result["rows"]:
        for found in row["sets"].values():
            low, high = found["interval"]["r1"]
            assert low <= found["r1"] <= high
            assert found["r1"] == pytest.approx((found["i2t_r1"] + found["t2i_r1"]) / 2)
    steps = [r[name] for name in ("zero-shot", "colours", "bars")]
    assert result["forgetting"] == [
        {name: max(row[name] for row in steps[:k + 1]) - steps[k][name] for name in steps[0]}
        for k in range(3)]
    assert result["backward_transfer"] == steps[2]["colours"] - steps[1]["colours"]
    assert result["forward_transfer"] == steps[1]["bars"] - steps[0]["bars"]
    assert [(c["from"], c["to"], c["set"]) for c in result["changes"]] == [
        (a, b, name) for a, b in (("zero-shot", "colours"), ("colours", "bars"))
        for name in ("colours", "bars", "five")]
    best = result["recommended"]["best on colours"]
    assert r[best]["colours"] == max(row["colours"] for row in r.values())


def test_the_second_stage_forgets_the_first_and_replay_less(forgetting):
    plain, replayed = (forgetting[1][name]["forgetting"][2]["colours"]
                       for name in ("plain", "replayed"))
    assert plain > 40 and replayed < plain / 4


def test_weights_between_start_and_end_meet_both_exactly(forgetting):
    folder, results = forgetting
    rows = {row["row"]: row["sets"] for row in results["plain"]["rows"]}
    assert rows["colours wise 0"] == rows["zero-shot"] and rows["bars wise 0"] == rows["colours"]
    for name in ("colours", "bars"):
        assert rows[f"{name} wise 1"] == rows[name]
        start = folder / "pairs" / "start.safetensors" if name == "colours" else (
            folder / "plain" / "colours" / "best.safetensors")
        ends = [weights_of(start), weights_of(folder / "plain" / name / "best.safetensors")]
        half = weights_of(folder / "plain" / name / "wise0.5.safetensors")
        for key in half:
            assert torch.allclose(half[key], (ends[0][key] + ends[1][key]) / 2, atol=1e-6), key


def test_rows_between_stages_do_not_change_what_the_next_begins_with(forgetting):
    """The last weights that were scored before the second stage are not those it starts from."""
    folder, results = forgetting
    rows = {row["row"]: row["sets"]["bars"]["gap"] for row in results["plain"]["rows"]}
    first = metrics(folder / "plain" / "bars", "bars val")[0]
    assert first["gap"] == rows["colours"] != rows["colours wise 0"]


def test_between_is_exact_at_both_ends():
    start, end = {"a": torch.randn(99)}, {"a": torch.randn(99)}
    assert torch.equal(between(start, end, 0.0)["a"], start["a"])
    assert torch.equal(between(start, end, 1.0)["a"], end["a"])


def test_replayed_pairs_are_in_every_batch_in_their_share(world, tmp_path, monkeypatch):
    seen = []

    def watched(run, model, images, tokens, ids, counts, stage, *rest):
        if stage.name == "cold":
            seen.append(ids[:, 0].tolist())
        return add_gradient(run, model, images, tokens, ids, counts, stage, *rest)
    monkeypatch.setattr(train_staged, "add_gradient", watched)
    run_main(*flags_of(world, tmp_path, "--set", "cold.replay=warm:0.25", "warm.epochs=1"))
    own = open_pairs(world, "train")
    cold = sum(bool(re.search("green|blue|black", own.texts_of(i)[0])) for i in range(48))
    assert len(seen) >= 6
    for batch in seen:
        assert sum(i >= cold for i in batch) == 2 and len(set(batch)) == 8


def test_a_stage_that_never_improves_ends_with_what_it_began_with(world, tmp_path, capsys):
    """The rate is so high that the weights are ruined; early_stop ends it after two evaluations."""
    run_main(*flags_of(world, tmp_path, "--lr", "0.9", "--warmup", 0, "--epochs", 9, "--early-stop",
                       2, "--wd", 0, stages=["name=warm,matching=red|yellow|white"]))
    stored = torch.load(tmp_path / "warm" / "checkpoint_last.pt", weights_only=True)
    held = metrics(tmp_path / "warm", "warm val")
    best = max(held, key=lambda row: row["mean_recall"])
    assert len(held) == 3 + held.index(best) < 10 and stored["over"]
    assert stored["best_step"] == best["step"]
    if best["step"] == 0:
        assert "its best is what it began with" in capsys.readouterr().out
        start, kept = weights_of(world / "start.safetensors"), weights_of(
            tmp_path / "warm" / "best.safetensors")
        assert all(torch.equal(start[name], kept[name]) for name in start)


# -----------------------------------------------------------------------------
# Frozen towers

@pytest.mark.parametrize("freeze, touched", [
    ("visual.*+!visual.proj", "image"), ("text+!text_projection", "text")])
def test_kept_features_train_as_computing_them_does(world, tmp_path, monkeypatch, freeze, touched):
    """And the frozen tower is not run in a step, nor in the second run at all."""
    calls = []
    for side, name in (("image", "encode_image"), ("text", "encode_text")):
        def counted(self, *args, _side=side, _encode=getattr(CLIP, name), **kwargs):
            if self.training:
                calls.append(_side)
            return _encode(self, *args, **kwargs)
        monkeypatch.setattr(CLIP, name, counted)
    found = {}
    for name, more in (("kept", []), ("anew", ["--no-feature-cache"])):
        calls.clear()
        found[name] = run_main(*flags_of(world, tmp_path / name, "--freeze", freeze, "--eps",
                                         1e-4, *more, stages=[WARM]))
        assert (touched in calls) == (name == "anew")
    kept, anew = (weights_of(tmp_path / name / "warm" / "last.safetensors")
                  for name in ("kept", "anew"))
    assert max(float((kept[name] - anew[name]).abs().max()) for name in kept) <= 1e-6
    start = weights_of(world / "start.safetensors")
    for name in start:
        held = name.startswith("visual.") == (touched == "image") and name not in (
            "visual.proj", "text_projection", "logit_scale")
        if held:
            assert torch.equal(kept[name], start[name]), name
    moved = "visual.proj" if touched == "image" else "text_projection"
    assert not torch.equal(kept[moved], start[moved])
    for ours, theirs in zip(plain_logs(tmp_path / "kept" / "warm"),
                            plain_logs(tmp_path / "anew" / "warm")):
        assert ours["split"] == theirs["split"]
        for key in set(ours) - {"split"}:
            assert ours[key] == pytest.approx(theirs[key], abs=1e-5), key


def test_kept_features_replace_a_lost_image_by_the_pair_that_reading_takes(tmp_path):
    """Also among replayed pairs; a row of zeros would be a feature that is not a number."""
    folder = scenes(tmp_path / "pairs", 160, 12)
    weights_file(folder).rename(folder / "start.safetensors")
    for i in (7, 150):
        (folder / f"{i}.png").write_bytes((folder / f"{i}.png").read_bytes()[:60])
    table = (folder / "pairs.csv").read_text().splitlines()
    for name, some in (("one", slice(1, 2 * 80 + 1)), ("two", slice(2 * 80 + 1, None))):
        (folder / f"{name}.csv").write_text("\n".join([table[0], *table[some]]))
    found = {}
    for name, more in (("kept", []), ("anew", ["--no-feature-cache"])):
        run_main(*flags_of(folder, tmp_path / name, "--batch-size", 40, "--cache", "none", "--freeze",
                           "visual.*+!visual.proj", "--eps", 1e-4, "--test", folder / "pairs.csv",
                           *more, "--epochs", 1, "--lr", 1e-4, stages=[
                               f"name=one,data={folder}/one.csv@train,val={folder}/pairs.csv",
                               f"name=two,data={folder}/two.csv@train,val={folder}/pairs.csv,"
                               "replay=one:0.5"]))
        found[name] = [metrics(tmp_path / name / stage) for stage in ("one", "two")]
    for kept, anew in zip(*found.values()):
        assert sum(row.get("replaced", 0) for row in anew) >= 1
        for ours, theirs in zip(kept, anew):
            assert ours.get("replaced") == theirs.get("replaced")
            assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_recomputed_blocks_train_to_the_same_weights(world, tmp_path):
    """With dropout, and with half of a tower frozen: the same random numbers are drawn again."""
    found = []
    for name, recompute in (("kept", "false"), ("anew", "true")):
        run_main(*flags_of(world, tmp_path / name, "--recompute", recompute, stages=[
            "name=x,steps=3,warmup=0,freeze=visual_lower:1,dropout=0.3,augment=light"]))
        found.append((weights_of(tmp_path / name / "x" / "last.safetensors"),
                      plain_logs(tmp_path / name / "x")))
    (ours, logs), (theirs, other_logs) = found
    assert all(torch.equal(ours[name], theirs[name]) for name in ours) and logs == other_logs


def test_batch_norm_of_a_resnet_is_still_unless_asked():
    torch.manual_seed(0)
    model = CLIP(dataclasses.replace(CONFIGS["tiny-rn"], image_size=32, vocab_size=30))
    images = torch.randn(6, 3, 32, 32)
    tokens = torch.tensor([[5, 6, 7 + i, 29] for i in range(6)])
    batch = images, tokens, contrastive.embeddings(6)[2]
    norm = model.visual.bn1
    before = norm.running_mean.clone()
    train_staged.training_mode(model, stage_of())
    whole = step_gradient(model, *batch, stage_of())[1]
    assert torch.equal(norm.running_mean, before)
    assert relative_error(step_gradient(model, *batch, stage_of(micro_batch=4))[1], whole) < 1e-5
    train_staged.training_mode(model, stage_of(bn="chunk"))
    step_gradient(model, *batch, stage_of(micro_batch=4, bn="chunk"))
    assert not torch.equal(norm.running_mean, before)
    choose(model, stage_of(freeze=["visual"]))
    before = norm.running_mean.clone()
    train_staged.training_mode(model, stage_of(bn="chunk"))
    step_gradient(model, *batch, stage_of(bn="chunk"))
    assert torch.equal(norm.running_mean, before)
