"""The CLIPFit script: what moves, the loss and its gradient, the recipe, resuming, and learning."""
import copy
import csv
import dataclasses
import json
import math
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
import types

import official
import pytest
import torch

import clip_model
import train_clipfit
from clip_model import CLIP, CONFIGS
from data import open_dataset
from device import start
from tokenizer import BPETokenizer
from train_clipfit import (add_gradient, fill_recipe, free_clipfit_weights, get_args, main,
                           warmup_cosine)

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL = dataclasses.replace(CONFIGS["tiny-vit"], vocab_size=49_408)
FEW = ["--classes", "Forest", "River", "Pasture Land"]  # of the demo: 300 test images, not 1,000
CLASSES = ["banded", "polka-dotted", "a rather long class name", "grid", "lacelike"]


def run_main(*flags):
    return main(get_args([str(flag) for flag in flags]))


def perturbed(config, dtype, seed=0):
    """A random CLIP whose norms and biases are not at their start: zeros would hide mistakes."""
    torch.manual_seed(seed)
    model = CLIP(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in free_clipfit_weights(model).values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype))
    return model


def texts_of(names, template="a photo of a {}, a type of texture."):
    tokens = BPETokenizer()([template.format(name) for name in names])
    return tokens, clip_model.bucket(tokens, least=2)  # several groups, as with many classes


def batch_for(config, count, classes, dtype):
    generator = torch.Generator().manual_seed(5)
    size = config.image_size
    return (torch.randn(count, 3, size, size, generator=generator).to(dtype),
            torch.randint(classes, (count,), generator=generator))


def gradient(model, images, labels, texts, teacher, reg_weight=8.0, micro_batch=0, text_memory=4):
    """(losses, {name: gradient}) of the script's own step."""
    run = start("cpu", "fp32")
    model.zero_grad(set_to_none=True)
    args = types.SimpleNamespace(reg_weight=reg_weight, micro_batch=micro_batch, accum_steps=1,
                                 text_memory=text_memory)
    losses = add_gradient(run, model, images, labels, len(images), texts, teacher, args,
                          run.scaler())
    return losses, {name: p.grad.clone() for name, p in model.named_parameters()
                    if p.grad is not None}


# -----------------------------------------------------------------------------
# What moves

@pytest.mark.parametrize("name, tensors, numbers", [
    ("ViT-B/16", 64, 46_080), ("ViT-B/32", 64, 46_080), ("ViT-L/14", 12 + 100, 111_616),
    ("RN50", 12, 6_144), ("RN101", 12, 6_144)])
def test_the_free_set_is_the_official_one(name, tensors, numbers):
    with torch.device("meta"):
        model = CLIP(CONFIGS[name])
    free = free_clipfit_weights(model)
    # The official rule, literally: two substring tests on the parameter names.
    wanted = {n for n, _ in model.named_parameters()
              if (n.startswith("visual.") and "ln" in n.removeprefix("visual."))
              or (not n.startswith("visual.") and "c_proj.bias" in n)}
    assert set(free) == wanted
    assert len(free) == tensors and sum(p.numel() for p in free.values()) == numbers
    assert {n for n, p in model.named_parameters() if p.requires_grad} == wanted
    assert not model.logit_scale.requires_grad


def test_training_changes_every_free_tensor_and_nothing_else(tmp_path):
    before = clip_model.load("tiny")
    run_main(*FEW, "--output-dir", tmp_path, "--epochs", 3, "--export", "safetensors")
    after = clip_model.load(tmp_path / "export" / "clip.safetensors")
    free = free_clipfit_weights(before)
    for name, tensor in before.state_dict().items():
        same = torch.equal(tensor, after.state_dict()[name])
        assert same != (name in free), name


# -----------------------------------------------------------------------------
# The loss

@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_loss_and_gradient_equal_the_official_two_pass_77_token_computation(dtype, tolerance):
    model, teacher = perturbed(SMALL, dtype), perturbed(SMALL, dtype, seed=7)
    tokens, texts = texts_of(CLASSES)
    images, labels = batch_for(SMALL, 6, len(CLASSES), dtype)
    with torch.no_grad():
        anchor = clip_model.unit(official.text_features(teacher, tokens))
    losses, ours = gradient(model, images, labels, texts, anchor)
    model.zero_grad(set_to_none=True)
    total, ce, drift = official.loss(model, images, labels, tokens, anchor, 8.0)
    total.backward()
    assert drift > 0.01  # otherwise the term proves nothing
    for name, theirs in (("loss", total), ("ce", ce), ("drift", drift)):
        assert abs(losses[name] - theirs) <= tolerance * max(1, abs(theirs)), name
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(ours) == set(theirs) == set(free_clipfit_weights(model))
    scale = max(g.abs().max() for g in theirs.values())
    for name in theirs:
        assert (ours[name] - theirs[name]).abs().max() <= tolerance * scale, name


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance, images", [
    (torch.float64, 1e-12, 2)])
def test_full_size_gradient_of_all_46080_numbers_equals_the_official_one(
        shared, dtype, tolerance, images):
    """ViT-B/16, random weights; `tests/bench.py exact` has batch 32 and all 47 prompts of DTD."""
    model = perturbed(CONFIGS["ViT-B/16"], dtype)
    names = open_dataset("dtd", "train", shared).classnames[::4]
    tokens, texts = texts_of(names)
    pictures, labels = batch_for(model.config, images, len(names), dtype)
    anchor = clip_model.unit(torch.randn(len(names), 512, dtype=dtype,
                                         generator=torch.Generator().manual_seed(3)))
    losses, ours = gradient(model, pictures, labels, texts, anchor, micro_batch=2)
    model.zero_grad(set_to_none=True)
    total, ce, drift = official.loss(model, pictures, labels, tokens, anchor, 8.0)
    total.backward()
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert sum(g.numel() for g in ours.values()) == 46_080 and set(ours) == set(theirs)
    assert abs(losses["loss"] - total) <= tolerance * abs(total)
    scale = max(g.abs().max() for g in theirs.values())
    assert max((ours[n] - theirs[n]).abs().max() for n in ours) <= tolerance * scale


def test_before_the_first_update_drift_is_zero_and_the_loss_is_the_zero_shot_cross_entropy():
    model = perturbed(SMALL, torch.float32)
    tokens, texts = texts_of(CLASSES)
    images, labels = batch_for(SMALL, 6, len(CLASSES), torch.float32)
    with torch.no_grad():
        anchor = train_clipfit.encode_prompts(model, texts)
        image, text, scale = model(images, tokens)
        zero_shot = torch.nn.functional.cross_entropy(scale * image @ text.T, labels)
    losses, with_drift = gradient(model, images, labels, texts, anchor, reg_weight=8.0)
    _, without = gradient(model, images, labels, texts, anchor, reg_weight=0.0)
    assert abs(losses["drift"]) < 1e-6
    assert abs(losses["loss"] - zero_shot) < 1e-5
    for name in without:  # and its gradient is zero too
        assert torch.allclose(with_drift[name], without[name], atol=1e-4), name


def test_the_drift_gradient_reaches_text_biases_only():
    model = perturbed(SMALL, torch.float64)
    _, texts = texts_of(CLASSES)
    images, labels = batch_for(SMALL, 4, len(CLASSES), torch.float64)
    anchor = clip_model.unit(torch.randn(len(CLASSES), 32, dtype=torch.float64))
    _, plain = gradient(model, images, labels, texts, anchor, reg_weight=0.0)
    _, heavy = gradient(model, images, labels, texts, anchor, reg_weight=1e3)
    for name in plain:
        moved = (plain[name] - heavy[name]).abs().max()
        assert (moved > 1e-3) == (not name.startswith("visual.")), name


@pytest.mark.parametrize("micro_batch", [1, 5, 8, 32])
def test_micro_batches_give_the_gradient_of_the_whole_batch(micro_batch):
    model = perturbed(SMALL, torch.float64)
    _, texts = texts_of(CLASSES)
    images, labels = batch_for(SMALL, 32, len(CLASSES), torch.float64)
    anchor = clip_model.unit(torch.randn(len(CLASSES), 32, dtype=torch.float64))
    whole_losses, whole = gradient(model, images, labels, texts, anchor)
    losses, parts = gradient(model, images, labels, texts, anchor, micro_batch=micro_batch)
    assert abs(losses["loss"] - whole_losses["loss"]) < 1e-12
    assert losses["batch_accuracy"] == whole_losses["batch_accuracy"]
    for name in whole:
        assert (whole[name] - parts[name]).abs().max() < 1e-12, name


def test_prompts_encoded_in_parts_give_the_same_gradient():
    model = perturbed(SMALL, torch.float64)
    words = [f"{a} {b}" for a in CLASSES for b in CLASSES[:30]]
    words = [word * (1 + i % 4) for i, word in enumerate(words)][:200]  # several lengths
    _, texts = texts_of(words)
    assert len(texts[0]) > 2 and texts[1].tolist() != list(range(len(words)))
    images, labels = batch_for(SMALL, 8, len(words), torch.float64)
    anchor = clip_model.unit(torch.randn(len(words), 32, dtype=torch.float64))
    losses, whole = gradient(model, images, labels, texts, anchor)
    again, parts = gradient(model, images, labels, texts, anchor, text_memory=0)
    assert losses["loss"] == again["loss"] and losses["drift"] == again["drift"]
    assert any(not name.startswith("visual.") for name in whole)
    for name in whole:
        assert (whole[name] - parts[name]).abs().max() < 1e-12, name


def test_the_memory_of_the_prompts_is_estimated_from_above():
    model = perturbed(dataclasses.replace(SMALL, text_layers=12), torch.float32)
    _, texts = texts_of(CLASSES)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = train_clipfit.encode_prompts(model, texts)
    assert features.requires_grad
    estimate = train_clipfit.prompt_memory(model, texts)
    assert 0.7 * estimate < sum(kept.values()) < estimate


def test_an_unreadable_image_adds_nothing_to_the_gradient():
    model = perturbed(SMALL, torch.float64)
    _, texts = texts_of(CLASSES)
    images, labels = batch_for(SMALL, 4, len(CLASSES), torch.float64)
    anchor = train_clipfit.encode_prompts(model, texts).detach()
    _, clean = gradient(model, images[:3], labels[:3], texts, anchor)
    labels[3] = -1
    _, marked = gradient(model, images, labels, texts, anchor)
    for name in clean:
        assert torch.allclose(marked[name], clean[name] * 3 / 4, atol=1e-12), name


def test_twenty_steps_equal_torch_sgd_with_decay_on_norms_and_biases(tmp_path):
    """The script's weights against a loop written out: same images, same order, plain SGD."""
    run_main("--output-dir", tmp_path, "--epochs", 5, "--batch-size", 10, "--shots", 4,
             "--reg-weight", 8, "--lr", 0.01, "--export", "safetensors")
    ours = clip_model.load(tmp_path / "export" / "clip.safetensors")
    model = clip_model.load("tiny").eval()
    free = free_clipfit_weights(model)
    few = train_clipfit.few_shot(open_dataset("demo", "train"), 4, 1)
    few = few.with_transform(train_clipfit.Preprocess(64, True, 1))
    loader = train_clipfit.make_loader(few, 10, seed=1)
    tokens, _ = texts_of(few.classnames, few.template)
    anchor = clip_model.unit(official.text_features(model, tokens)).detach()
    momentum = {name: torch.zeros_like(p) for name, p in free.items()}
    for epoch in range(5):
        loader.batch_sampler.set_epoch(epoch)
        lr = 1e-5 if epoch == 0 else 0.005 * (1 + math.cos(math.pi * (epoch - 1) / 5))
        for images, labels, _ in loader:
            model.zero_grad(set_to_none=True)
            official.loss(model, images, labels, tokens, anchor, 8.0)[0].backward()
            with torch.no_grad():
                for name, p in free.items():
                    momentum[name] = 0.9 * momentum[name] + p.grad + 5e-4 * p
                    p -= lr * momentum[name]
    for name, p in free.items():
        assert torch.allclose(p, ours.get_parameter(name), atol=2e-5), name


# -----------------------------------------------------------------------------
# Recipe

def test_learning_rates_are_the_published_ones():
    table = [1e-5, 2.0e-3, 1.951057e-3, 1.809017e-3, 1.587785e-3, 1.309017e-3, 1.0e-3,
             6.909830e-4, 4.122147e-4, 1.909830e-4]
    assert [warmup_cosine(e, 10, 0.002, 1) for e in range(10)] == pytest.approx(table, rel=1e-6)
    assert warmup_cosine(2, 50, 0.002, 1) == pytest.approx(1.998027e-3, rel=1e-6)
    assert warmup_cosine(99, 100, 0.002, 1) == pytest.approx(1.973272e-6, rel=1e-6)
    for epochs in (10, 50, 100):
        closed = [1e-5] + [0.001 * (1 + math.cos(math.pi * (e - 2) / epochs))
                           for e in range(2, epochs + 1)]
        assert [warmup_cosine(e, epochs, 0.002, 1) for e in range(epochs)] == pytest.approx(
            closed, abs=1e-12)


def test_learning_rates_equal_constant_warmup_over_cosine_annealing():
    for epochs in (10, 50, 100):
        p = torch.nn.Parameter(torch.zeros(()))
        optimizer = torch.optim.SGD([p], lr=0.002)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs, eta_min=0)
        rates = [1e-5]
        for _ in range(1, epochs):  # recount: the cosine starts when the warm-up is over
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            cosine.step()
        assert [warmup_cosine(e, epochs, 0.002, 1) for e in range(epochs)] == pytest.approx(
            rates, abs=1e-12)


RECIPE = {  # the official README, by hand
    "caltech101": (100, 2), "oxford_pets": (100, 2), "stanford_cars": (100, 2),
    "oxford_flowers": (100, 2), "food101": (10, 2), "fgvc_aircraft": (100, 2), "sun397": (100, 8),
    "dtd": (100, 8), "eurosat": (100, 2), "ucf101": (100, 2), "imagenet": (10, 2)}


@pytest.mark.parametrize("data", RECIPE)
@pytest.mark.parametrize("setting", ["fewshot", "base2new"])
def test_every_data_set_resolves_to_the_published_recipe(data, setting):
    args = get_args(["--data", data, "--setting", setting])
    assert fill_recipe(args, data) == []
    epochs, reg_weight = RECIPE[data]
    assert (args.epochs, args.reg_weight) == (epochs, 8 if setting == "base2new" else reg_weight)
    assert (args.lr, args.wd, args.momentum, args.batch_size) == (0.002, 5e-4, 0.9, 32)


def test_every_override_is_recorded_as_a_departure():
    args = get_args("--data dtd --lr 0.01 --reg-weight 2 --epochs 50 --batch-size 8 --wd 0 "
                    "--grad-clip 1 --warmup 0 --momentum 0.8".split())
    notes = " ".join(fill_recipe(args, "dtd"))
    for flag in ("lr", "reg-weight", "epochs", "batch-size", "wd", "grad-clip", "warmup",
                 "momentum"):
        assert f"--{flag} " in notes
    args = get_args([])
    assert any("--lr 0.05" in note for note in fill_recipe(args, "demo"))


def test_the_47_prompts_are_those_the_official_log_prints(shared):
    data = open_dataset("dtd", "train", shared)
    prompts = train_clipfit.class_prompts(data.classnames, data.template)
    assert prompts[0] == "a photo of a banded, a type of texture."
    assert prompts[30] == "a photo of a polka-dotted, a type of texture."
    assert prompts[19] == "a photo of a interlaced, a type of texture."  # grammar not repaired
    assert len(prompts) == 47 and prompts[-1] == "a photo of a zigzagged, a type of texture."
    assert BPETokenizer()(prompts).argmax(dim=-1).max() + 1 == 15


@pytest.mark.parametrize("data, shots, per_epoch, first", [
    ("dtd", 4, 5, 32), ("dtd", 1, 1, 32), ("dtd", 16, 23, 32), ("eurosat", 1, 1, 10),
    ("eurosat", 4, 1, 32), ("eurosat", 16, 5, 32)])
def test_an_epoch_has_the_official_number_of_steps(shared, data, shots, per_epoch, first):
    few = train_clipfit.few_shot(open_dataset(data, "train", shared), shots, 1)
    loader = train_clipfit.make_loader(few.with_transform(train_clipfit.Preprocess(32)), 32)
    assert len(loader) == per_epoch and loader.batch_sampler.global_size(0) == first


# -----------------------------------------------------------------------------
# Resuming

def metrics(folder):
    """What was logged, without the numbers that depend on the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in (
        "samples_per_second", "data_wait", "memory_mb", "time")} for row in rows]


def weights(folder):
    stored = torch.load(folder / "checkpoint_last.pt", weights_only=True)
    moments = {i: s["momentum_buffer"] for i, s in stored["optimizer"]["state"].items()}
    return stored["weights"], moments


def assert_same_run(one, other):
    for ours, theirs in zip(weights(one), weights(other)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert metrics(one) == metrics(other)
    scores = [json.loads((f / "results.json").read_text()) for f in (one, other)]
    assert scores[0]["accuracy"] == scores[1]["accuracy"]


FLAGS = ["--data", "demo", *FEW, "--shots", "8", "--epochs", "6", "--batch-size", "8",
         "--log-every", "2", "--save-every", "2", "--workers", "0"]  # 18 steps, 3 an epoch


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run_main(*FLAGS, "--output-dir", folder)
    return folder


@pytest.mark.parametrize("step", [3, 4, 10])
def test_stopping_at_any_step_and_resuming_changes_no_bit(uninterrupted, tmp_path, monkeypatch,
                                                          step):
    """An exception instead of the step's save stands for a power cut at that moment."""
    taken = []

    def add_gradient_until(*args):
        taken.append(1)
        if len(taken) > step:
            raise RuntimeError("the plug")
        return add_gradient(*args)
    monkeypatch.setattr(train_clipfit, "add_gradient", add_gradient_until)
    with pytest.raises(RuntimeError, match="the plug"):
        run_main(*FLAGS, "--output-dir", tmp_path)
    monkeypatch.undo()
    run_main(*FLAGS, "--output-dir", tmp_path)
    assert_same_run(uninterrupted, tmp_path)


def wait_for(path, process, seconds=120):
    deadline = time.time() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.time() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_process_resumes_to_the_same_bits(uninterrupted, tmp_path, number):
    command = [sys.executable, ROOT / "train_clipfit.py", *FLAGS, "--output-dir", tmp_path]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                               text=True)
    wait_for(tmp_path / "checkpoint_last.pt", process)
    time.sleep(random.Random(int(number)).uniform(0, 0.5))
    process.send_signal(number)
    code = process.wait(60)
    # -n: it came after training, while testing, when there is nothing to save
    assert code in (0, -number) if number == signal.SIGKILL else (0, -number, 128 + number)
    run_main(*FLAGS, "--output-dir", tmp_path)
    assert_same_run(uninterrupted, tmp_path)


def test_the_rate_continues_its_curve_after_resuming(uninterrupted):
    rates = [row["lr"] for row in metrics(uninterrupted) if row["split"] == "train"]
    steps = [row["step"] for row in metrics(uninterrupted) if row["split"] == "train"]
    per_epoch = 24 // 8
    assert rates == [warmup_cosine((step - 1) // per_epoch, 6, 0.05, 1) for step in steps]


def test_a_finished_run_is_not_run_again_and_another_is_refused(uninterrupted, tmp_path, capsys):
    before = (uninterrupted / "checkpoint_last.pt").stat().st_mtime_ns
    again = run_main(*FLAGS, "--output-dir", uninterrupted)
    assert again["accuracy"] == json.loads((uninterrupted / "results.json").read_text())["accuracy"]
    assert (uninterrupted / "checkpoint_last.pt").stat().st_mtime_ns == before
    assert train_clipfit.guard(main, get_args, [*FLAGS, "--lr", "0.01", "--output-dir",
                                                str(uninterrupted)]) == 2
    error = capsys.readouterr().err
    assert "lr was 0.05, now 0.01" in error and error.count("\n") == 1
    assert (uninterrupted / "checkpoint_last.pt").stat().st_mtime_ns == before


def test_eval_only_prints_the_number_that_training_printed(uninterrupted, tmp_path):
    trained = json.loads((uninterrupted / "results.json").read_text())
    listing = sorted(p.name for p in uninterrupted.iterdir())
    again = run_main(*FLAGS, "--output-dir", uninterrupted, "--eval-only")
    assert again["accuracy"] == trained["accuracy"]
    assert again["zero_shot_accuracy"] == trained["zero_shot_accuracy"]
    path = uninterrupted / "checkpoint_last.pt"
    other = run_main(*FLAGS, "--eval-only", "--resume", path, "--output-dir", tmp_path / "other")
    assert other["accuracy"] == trained["accuracy"]
    assert sorted(p.name for p in uninterrupted.iterdir()) == listing
    base = run_main(*FLAGS, "--eval-only", "--output-dir", tmp_path / "nothing")
    assert base["accuracy"] == base["zero_shot_accuracy"] == trained["zero_shot_accuracy"]


def test_eval_only_asks_whose_checkpoint_it_is(uninterrupted, tmp_path, capsys):
    """Weights tuned on 8 shots are not reported as 16, nor nothing at all as 4."""
    sixteen = list(FLAGS)
    sixteen[sixteen.index("--shots") + 1] = "16"
    text = refusal(capsys, *sixteen, "--eval-only", "--output-dir", uninterrupted)
    assert "shots 8 there and 16 here" in text
    nothing = run_main(*FEW, "--eval-only", "--output-dir", tmp_path)
    assert nothing["shots"] == 0 and "zero-shot" in capsys.readouterr().out


def test_other_base_weights_or_other_images_are_another_run(tmp_path, capsys):
    tiles = open_dataset("demo", "train")
    for place in ("mine/a", "mine/b"):
        (tmp_path / place).mkdir(parents=True)
        for i in range(12):
            tiles[i + 70 * place.endswith("b")][0].save(tmp_path / place / f"{i}.png")
    flags = ["--data", tmp_path / "mine", "--epochs", 1, "--shots", 2, "--output-dir",
             tmp_path / "run"]
    run_main(*flags, "--model", "tiny")
    other = clip_model.load("tiny")
    with torch.no_grad():
        other.text_projection.mul_(2)
    path = clip_model.save(other, tmp_path / "other.safetensors")
    assert "weights_sha256 was" in refusal(capsys, *flags, "--weights", path)
    for path in (tmp_path / "mine" / "a").iterdir():
        tiles[100][0].save(path)
    assert "shots_sha256 was" in refusal(capsys, *flags, "--model", "tiny")


def test_a_table_and_a_run_do_not_take_each_other_s_folder(tmp_path, capsys):
    flags = [*FEW, "--epochs", 1, "--shots", 1, "--output-dir"]
    run_main(*flags, tmp_path / "table", "--seed", 1, 2)
    assert "another kind" in refusal(capsys, *flags, tmp_path / "table", "--seed", 1)
    run_main(*flags, tmp_path / "run", "--seed", 1)
    assert "another kind" in refusal(capsys, *flags, tmp_path / "run", "--seed", 1, 2)


def test_a_finished_run_is_exported_when_asked_later(uninterrupted):
    run_main(*FLAGS, "--output-dir", uninterrupted, "--export", "hf")
    model = clip_model.load(uninterrupted / "export" / "hf")
    stored = weights(uninterrupted)[0]
    assert all(torch.equal(model.get_parameter(name), p) for name, p in stored.items())


def test_test_images_that_cannot_be_read_are_named_and_too_many_are_refused(tmp_path, capsys):
    tiles = open_dataset("demo", "train")
    for part, first in (("train", 0), ("test", 20)):
        for label, name in ((0, "a"), (1, "b")):
            folder = tmp_path / "mine" / part / name
            folder.mkdir(parents=True)
            for i in range(first, first + 12):
                tiles[64 * label + i][0].save(folder / f"{i}.png")
    flags = ["--data", tmp_path / "mine", "--model", "tiny", "--epochs", 1, "--output-dir"]
    (tmp_path / "mine/test/a/20.png").write_bytes(b"no image")
    result = run_main(*flags, tmp_path / "one")
    assert result["unreadable_images"] == 1 and result["images"]["test"] == 23
    assert "test/a/20.png" in capsys.readouterr().out
    (tmp_path / "mine/test/a/21.png").write_bytes(b"no image")
    assert "2 of 24" in refusal(capsys, *flags, tmp_path / "two")


def test_a_checkpoint_of_vit_b_16_is_small():
    with torch.device("meta"):
        free = free_clipfit_weights(CLIP(CONFIGS["ViT-B/16"]))
    assert sum(p.numel() * 4 for p in free.values()) == 184_320


def test_what_a_run_leaves_behind(uninterrupted):
    names = {p.name for p in uninterrupted.iterdir()}
    assert names >= {"config.json", "command.txt", "env.json", "log.txt", "metrics.jsonl",
                     "results.json", "checkpoint_last.pt", "checkpoint_prev.pt", "shots.json",
                     "predictions_test.csv", "per_class_test.csv", "confusion_test.json"}
    results = json.loads((uninterrupted / "results.json").read_text())
    for key in ("zero_shot_accuracy", "accuracy", "gain", "shots", "seed", "trainable_parameters",
                "trainable_tensors", "method", "data", "model", "seconds", "peak_memory_mb",
                "device", "precision", "git"):
        assert key in results
    rows = list(csv.DictReader(open(uninterrupted / "predictions_test.csv", encoding="utf-8")))
    right = sum(row["label"] == row["tuned"] for row in rows)
    assert 100 * right / len(rows) == pytest.approx(results["accuracy"])
    confusion = json.loads((uninterrupted / "confusion_test.json").read_text())["tuned"]
    assert sum(confusion[i][i] for i in range(3)) == right
    classes = list(csv.DictReader(open(uninterrupted / "per_class_test.csv", encoding="utf-8")))
    assert sum(int(c["images"]) for c in classes) == len(rows)
    test = open_dataset("demo", "test")
    shots = json.loads((uninterrupted / "shots.json").read_text())["train"]
    assert len(shots) == 24 and not {path for path, _ in shots} & set(test.paths)


def test_the_test_images_are_seen_whole_and_classified_as_a_plain_loop_does(uninterrupted):
    rows = list(csv.DictReader(open(uninterrupted / "predictions_test.csv", encoding="utf-8")))
    test = open_dataset("demo", "test").with_transform(train_clipfit.Preprocess(64))
    names, place = [FEW[1], FEW[2], FEW[3]], {path: i for i, path in enumerate(test.paths)}
    tokens = BPETokenizer()([test.template.format(name) for name in names])
    images = torch.stack([test[place[row["path"]]][0] for row in rows])
    model, moved = clip_model.load("tiny"), weights(uninterrupted)[0]
    for column in ("zero_shot", "tuned"):
        with torch.no_grad():
            image, text, _ = model(images, tokens)
            for name, p in model.named_parameters():
                p.copy_(moved.get(name, p))
        assert [row[column] for row in rows] == [names[i] for i in (image @ text.T).argmax(dim=-1)]


# -----------------------------------------------------------------------------
# Settings, tables, precision

def test_several_shots_and_seeds_give_a_table_from_unrounded_numbers(tmp_path):
    flags = [*FEW, "--shots", 1, 2, "--seeds", 1, 2, 3, "--epochs", 2, "--output-dir", tmp_path]
    result = run_main(*flags)
    assert [(r["shots"], r["seed"]) for r in result["runs"]] == [
        (1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    rows = list(csv.DictReader(open(tmp_path / "table.csv", encoding="utf-8")))
    for row in rows:
        values = [r["accuracy"] for r in result["runs"] if r["shots"] == int(row["shots"])]
        mean = sum(values) / 3
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / 2)
        assert float(row["mean"]) == pytest.approx(mean, abs=1e-9)
        assert float(row["std"]) == pytest.approx(std, abs=1e-9)
        assert float(row["95 % CI"]) == pytest.approx(4.303 * std / math.sqrt(3), abs=1e-9)
        assert float(row["gain"]) == pytest.approx(mean - result["zero_shot_accuracy"], abs=1e-9)
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len(table) == 4 and table[1].startswith("|---")
    assert run_main(*flags)["accuracy"] == result["accuracy"]  # all six are found finished


def test_one_of_several_runs_equals_that_run_alone(tmp_path):
    """The model starts from the pretrained weights again, and seeds do not leak."""
    flags = [*FEW, "--shots", 2, "--epochs", 3]
    both = run_main(*flags, "--seeds", 1, 2, "--output-dir", tmp_path / "two")
    alone = run_main(*flags, "--seed", 2, "--output-dir", tmp_path / "one")
    assert both["runs"][1]["accuracy"] == alone["accuracy"]
    first, second = (weights(tmp_path / f)[0] for f in ("two/shots2_seed2", "one"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_base_to_new_trains_on_half_of_the_classes_and_reports_the_harmonic_mean(tmp_path):
    result = run_main("--setting", "base2new", "--shots", 4, "--epochs", 2, "--output-dir",
                      tmp_path)
    base, new = result["base_accuracy"], result["new_accuracy"]
    assert result["accuracy"] == pytest.approx(2 * base * new / (base + new))
    assert result["images"] == {"base": 500, "new": 500}
    shots = json.loads((tmp_path / "shots.json").read_text())["train"]
    assert {label for _, label in shots} == set(range(5)) and len(shots) == 20
    everything = train_clipfit.few_shot(open_dataset("demo", "train"), 4, 1)
    assert {tuple(pair) for pair in shots} <= set(zip(everything.paths, everything.labels))


def test_seed_zero_is_a_seed(tmp_path):
    paths = []
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        run_main(*FEW, "--seed", seed, "--shots", 1, "--epochs", 1, "--output-dir",
                 tmp_path / name)
        paths.append(json.loads((tmp_path / name / "shots.json").read_text()))
    assert paths[0] == paths[1] != paths[2]


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow),
                                       "official-fp16"])
def test_every_precision_trains_with_the_drift_term(tmp_path, precision):
    result = run_main(*FEW, "--precision", precision, "--epochs", 6, "--reg-weight", 1000,
                      "--output-dir", tmp_path, "--log-every", 1)
    train = [row for row in metrics(tmp_path) if row["split"] == "train"]
    assert 1000 * train[-1]["drift"] > 0.002 * train[-1]["loss"]  # felt by the sum below
    for row in train:
        assert row["loss"] == pytest.approx(row["ce"] + 1000 * row["drift"], rel=1e-4)
    stored, moments = weights(tmp_path)
    half = {name for name, tensor in stored.items() if tensor.dtype == torch.float16}
    wanted = {name for name in stored if "c_proj.bias" in name}
    assert half == (wanted if precision == "official-fp16" else set())
    assert result["accuracy"] > 40


def test_the_default_precision_off_a_gpu_is_fp32():
    run = start("cpu", "auto")
    assert run.precision == "fp32" and not run.scaler().is_enabled()


def test_a_resnet_tower_tunes_the_text_biases_and_keeps_its_statistics(tmp_path, capsys):
    torch.manual_seed(0)
    model = CLIP(dataclasses.replace(CONFIGS["tiny-rn"], image_size=64)).eval()
    path = clip_model.save(model, tmp_path / "rn.safetensors")
    run_main(*FEW, "--weights", path, "--epochs", 2, "--output-dir", tmp_path / "run",
             "--export", "openai")
    assert "no LayerNorm" in capsys.readouterr().out
    after = clip_model.load(tmp_path / "run" / "export" / "clip.pt").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, after[name]) != ("c_proj.bias" in name
                                                    and "attnpool" not in name), name


def test_a_dry_run_walks_the_whole_path_in_two_steps(tmp_path):
    result = run_main("--dry-run", "--output-dir", tmp_path / "run")
    assert result["images"]["test"] == 200 and result["dry_run"] and result["steps"] == 2
    rows = metrics(tmp_path / "run_dry_run")  # beside the real run, which it does not block
    assert [r["step"] for r in rows if r["split"] == "train"][-1] == 2
    assert not (tmp_path / "run").exists()


def test_config_json_runs_again(uninterrupted, tmp_path):
    run_main("--config", uninterrupted / "config.json", "--output-dir", tmp_path)
    assert_same_run(uninterrupted, tmp_path)


def fake_imagenet(folder, classes=4, train=3, test=2):
    """ImageNet and its four shifts in miniature: the demo's tiles under ImageNet's layout."""
    tiles = open_dataset("demo", "train")
    names = [f"n{i:08d}" for i in range(classes)]
    text = "".join(f"{wnid} {tiles.classnames[i].lower()}\n" for i, wnid in enumerate(names))
    places = {"imagenet/images/train": names, "imagenet/images/val": names,
              "imagenet-sketch/images": names, "imagenet-adversarial/imagenet-a": names[1:],
              "imagenet-rendition/imagenet-r": names[:3],
              "imagenetv2/imagenetv2-matched-frequency-format-val": [str(i) for i in range(classes)]}
    for place, inside in places.items():
        for name in inside:
            label = names.index(name) if name in names else int(name)
            mine = [i for i, other in enumerate(tiles.labels) if other == label]
            path = folder / place / name
            path.mkdir(parents=True)
            for i in mine[:train if place.endswith("train") else test]:
                tiles[i][0].save(path / f"{i}.png")
        (folder / place.split("/")[0] / "classnames.txt").write_text(text)


def test_domain_generalisation_trains_on_imagenet_and_tests_on_its_four_shifts(tmp_path):
    fake_imagenet(tmp_path / "data")
    result = run_main("--data", "imagenet", "--data-dir", tmp_path / "data", "--setting", "dg",
                      "--shots", 2, "--epochs", 2, "--model", "tiny", "--output-dir",
                      tmp_path / "run")
    assert result["images"] == {"imagenet": 8, "imagenetv2": 8, "imagenet-sketch": 8,
                                "imagenet-a": 6, "imagenet-r": 6}
    assert result["accuracy"] == result["imagenet_accuracy"]
    assert any("domain generalisation" in note for note in result["departures"])


def test_the_harmonic_mean_of_a_table_is_that_of_the_averages(tmp_path):
    result = run_main("--setting", "base2new", "--shots", 2, "--seeds", 1, 2, "--epochs", 4,
                      "--output-dir", tmp_path)
    base, new = (sum(r[f"{part}_accuracy"] for r in result["runs"]) / 2 for part in ("base", "new"))
    assert result["runs"][0]["accuracy"] != result["runs"][1]["accuracy"]
    assert result["accuracy"] == pytest.approx(2 * base * new / (base + new))
    assert result["seconds"] >= sum(r["seconds"] for r in result["runs"]) - 1e-6


def poison(monkeypatch, bad):
    """Let the first image of the given steps (from 1) be infinite."""
    taken = []

    def poisoned(run, model, images, *rest):
        taken.append(1)
        if len(taken) in bad:
            images[0, 0, 0, 0] = math.inf
        return add_gradient(run, model, images, *rest)
    monkeypatch.setattr(train_clipfit, "add_gradient", poisoned)


def test_a_step_without_a_finite_loss_is_skipped_and_its_images_are_named(tmp_path, monkeypatch):
    poison(monkeypatch, {3, 5})
    assert math.isfinite(run_main(*FLAGS, "--output-dir", tmp_path)["accuracy"])
    said = (tmp_path / "log.txt").read_text()
    assert said.count("step skipped: the loss or its gradient is not finite at the batch of") == 2
    assert ".jpg" in said
    stored = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)
    assert all(torch.isfinite(w).all() for w in stored["weights"].values())


def test_a_skipped_step_moves_nothing_but_momentum_and_weight_decay(tmp_path, monkeypatch):
    def weights(folder):
        run_main(*FLAGS, "--output-dir", tmp_path / folder)
        return torch.load(tmp_path / folder / "checkpoint_last.pt", weights_only=True)["weights"]
    poison(monkeypatch, {4})
    skipped = weights("a")
    monkeypatch.undo()
    taken = []

    def nothing(run, model, *rest):
        losses = add_gradient(run, model, *rest)
        taken.append(1)
        for p in model.parameters():
            if len(taken) == 4 and p.grad is not None:
                p.grad.zero_()
        return losses
    monkeypatch.setattr(train_clipfit, "add_gradient", nothing)
    zeroed = weights("b")
    assert all(torch.equal(skipped[name], zeroed[name]) for name in zeroed)


def test_three_bad_steps_in_a_row_stop_with_code_3_and_name_the_images(tmp_path, monkeypatch,
                                                                       capsys):
    poison(monkeypatch, {5, 6, 7})
    code = train_clipfit.guard(main, get_args, [*FLAGS, "--output-dir", str(tmp_path)])
    text = capsys.readouterr().err
    assert code == 3 and "3 steps in a row" in text and ".jpg" in text and text.count("\n") == 1
    stored = torch.load(tmp_path / "checkpoint_last.pt", weights_only=True)
    assert 0 < stored["step"] < 7
    assert all(torch.isfinite(w).all() for w in stored["weights"].values())


def test_clipping_scales_the_gradient_that_the_optimiser_sees(tmp_path):
    """One step from the start, without momentum's past: the update's length is lr x the clip."""
    flags = [*FEW, "--epochs", 1, "--warmup", 0, "--wd", 0, "--lr", 0.1, "--batch-size", 12]
    run_main(*flags, "--grad-clip", 0.01, "--output-dir", tmp_path)
    before = free_clipfit_weights(clip_model.load("tiny"))
    after = weights(tmp_path)[0]
    moved = float(torch.cat([(after[n] - p.detach()).flatten() for n, p in before.items()]).norm())
    assert moved == pytest.approx(0.1 * 0.01, rel=1e-3)


def test_accumulation_steps_are_another_way_to_say_micro_batch(tmp_path):
    for flag, value in (("--accum-steps", 3), ("--micro-batch", 4)):
        run_main(*FEW, "--epochs", 2, "--batch-size", 12, flag, value, "--output-dir",
                 tmp_path / flag)
    first, second = (weights(tmp_path / f)[0] for f in ("--accum-steps", "--micro-batch"))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_a_template_changes_the_prompts(tmp_path):
    plain = run_main(*FEW, "--shots", 0, "--output-dir", tmp_path / "a")
    other = run_main(*FEW, "--shots", 0, "--template", "{c}", "--output-dir", tmp_path / "b")
    assert plain["zero_shot_accuracy"] != other["zero_shot_accuracy"]
    assert any("template" in note for note in other["departures"])


# -----------------------------------------------------------------------------
# It learns

@pytest.mark.slow
def test_the_demo_learns_ten_points_over_a_useful_zero_shot(tmp_path):
    """Mean of two seeds on held-out images; chance is 10 %."""
    result = run_main("--seeds", 1, 2, "--output-dir", tmp_path)
    assert result["zero_shot_accuracy"] >= 30
    assert result["gain"] >= 10


# -----------------------------------------------------------------------------
# Real data, and input that is wrong

def refusal(capsys, *flags):
    """The one line on stderr of a command that must end with exit code 2."""
    try:
        code = train_clipfit.guard(main, get_args, [str(flag) for flag in flags])
    except SystemExit as error:  # argparse
        code = error.code
    text = capsys.readouterr().err
    assert code == 2 and text.startswith("error: ") and text.count("\n") == 1, (code, text)
    return text


def test_dtd_without_its_images_is_refused_with_the_41_missing_classes(shared, capsys, tmp_path):
    text = refusal(capsys, "--data", "dtd", "--data-dir", shared, "--model", "tiny",
                   "--output-dir", tmp_path / "no")
    assert "41 of 47 classes" in text and "bumpy" in text and "zigzagged" in text
    assert "banded" not in text and "--classes" in text
    assert not (tmp_path / "no").exists()


def test_six_classes_of_dtd_train_and_evaluate(shared, tmp_path):
    six = "banded blotchy braided bubbly chequered cracked".split()
    result = run_main("--data", "dtd", "--data-dir", shared, "--classes", *six, "--model", "tiny",
                      "--epochs", 2, "--output-dir", tmp_path)
    assert result["images"]["test"] == 6 * 36
    published = json.loads((shared / "dtd/fewshot_indices/shot_4-seed_1.json").read_text())
    wanted = [pathlib.Path(item["impath"]).name for item in published["train"]["data"]
              if item["classname"] in six]
    shots = json.loads((tmp_path / "shots.json").read_text())["train"]
    assert [pathlib.Path(path).name for path, _ in shots] == wanted


def test_a_missing_split_names_the_file_its_id_and_its_place(capsys, tmp_path):
    text = refusal(capsys, "--data", "dtd", "--data-dir", tmp_path)
    assert "split_zhou_DescribableTextures.json" in text
    assert "1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x" in text and str(tmp_path / "dtd") in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags, words", [
    (["--data", "dtdd"], ["dtd"]),
    (["--epohcs", "3"], ["--epochs"]),
    (["--classes", "Forrest", "River"], ["Forrest", "forest"]),
    (["--device", "cuda:7"], ["cuda", "cpu"]),
    (["--device", "tpu"], ["tpu", "cpu"]),
    (["--weights", "no/such/file.pt"], ["no/such/file.pt"]),
    (["--weights", "README.md"], []),
    (["--model", "ViT-Z/99"], ["ViT-Z/99", "ViT-B/16"]),
    (["--shots", "-1"], ["--shots"]),
    (["--lr", "0"], ["--lr"]), (["--lr", "nan"], ["--lr"]), (["--epochs", "0"], ["--epochs"]),
    (["--seed", "4294967296"], ["--seed"]),
    (["--micro-batch", "4", "--accum-steps", "2"], ["--micro-batch"]),
    (["--setting", "dg"], ["imagenet"]),
    (["--template", "a photo"], ["a photo"]),
    (["--resume", "no_such_checkpoint.pt"], ["no_such_checkpoint.pt"]),
    (["--classes", "Forest"], ["--classes"]),
    (["--batch", "4"], ["--batch"]),
    (["--config", "nothing.json"], ["nothing.json"]),
])
def test_a_wrong_command_line_gets_one_line(capsys, tmp_path, flags, words):
    text = refusal(capsys, "--output-dir", tmp_path / "out", *flags)
    for word in words:
        assert word in text
    assert not (tmp_path / "out" / "results.json").exists()


def test_weights_of_another_model_are_refused(capsys, tmp_path):
    path = clip_model.save(CLIP(CONFIGS["tiny-vit"]), tmp_path / "small.safetensors")
    assert "is not a ViT-B/16" in refusal(capsys, "--weights", path, "--model", "ViT-B/16")


def test_a_checkpoint_of_another_run_is_refused(capsys, tmp_path, uninterrupted):
    text = refusal(capsys, "--resume", uninterrupted / "checkpoint_last.pt", "--shots", 2,
                   "--output-dir", tmp_path)
    assert "shots 8 there and 2 here" in text


def test_a_truncated_shot_is_left_out_and_counted(tmp_path, capsys):
    """A folder of class folders, one of whose few images is cut short."""
    demo = open_dataset("demo", "train")
    for index in range(0, len(demo)):
        label = demo.labels[index]
        if label > 2:
            break
        folder = tmp_path / "mine" / demo.classnames[label].replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        demo[index][0].save(folder / f"{index}.png")
    # ... of 3 classes x 40 images, half of which are this folder's train part
    plain = run_main("--data", tmp_path / "mine", "--model", "tiny", "--epochs", 1, "--shots", 16,
                     "--output-dir", tmp_path / "plain")
    shots = json.loads((tmp_path / "plain" / "shots.json").read_text())["train"]
    victim = tmp_path / "mine" / shots[5][0]
    victim.write_bytes(victim.read_bytes()[:500])
    capsys.readouterr()
    run_main("--data", tmp_path / "mine", "--model", "tiny", "--epochs", 1, "--shots", 16,
             "--output-dir", tmp_path / "cut")
    out = capsys.readouterr().out
    assert plain["shots"] == 16 and victim.name in out and "unreadable" in out
    left = json.loads((tmp_path / "cut" / "shots.json").read_text())["train"]
    assert len(left) == len(shots) - 1
