"""train_clipfit.py: what trains, the loss and its gradient, recipe, settings, tables, learning."""
import csv
import json
import math
import types

import official
import pytest
import torch
from helpers import (attempt, checkpoint, class_folder, error, images_for, metrics, refused,
                     results, ROOT, run_main, tiny_clip)

import train_clipfit
import weights
from clip_model import bert_fields, BertConfig, CLIP, CONFIGS, text_pieces, unit
from data import (class_prompts, few_shot, find_classes, make_loader, normalise, open_dataset,
                  Preprocess)
from device import start
from scores import linear_probe, zero_shot
from tokenizer import BPETokenizer
from train_clipfit import add_gradients, choose_trainable, class_features, get_args

FEW = ["--classes", "Forest", "River", "Pasture Land"]  # of the demo: 300 test images, not 1,000
CLASSES = ["banded", "polka-dotted", "a rather long class name", "grid", "lacelike"]


def clipfit(folder, *flags):
    return run_main("train_clipfit", "--workers", 0, "--output-dir", folder, *flags)


def refusal(folder, *flags, names=()):
    return refused(attempt("train_clipfit", "--output-dir", folder, *flags), *names)


TEMPLATES = ("a photo of a {}, a type of texture.", "{}")


def prompts_of(names, templates=TEMPLATES[:1]):
    """Tokens (T, C, 77) and what the step takes: pieces of two prompts, and their places."""
    tokens = torch.stack([BPETokenizer()(class_prompts(names, x)) for x in templates])
    pieces, places = text_pieces(tokens.flatten(0, 1), 2)
    return tokens, (pieces, places.view(-1, len(names)))


def gradient(model, images, labels, prompts, pretrained, reg_weight=8.0, micro_batch=0):
    """(losses, {name: gradient}) of the script's own step."""
    run = start("cpu", "fp32")
    model.zero_grad(set_to_none=True)
    args = types.SimpleNamespace(reg_weight=reg_weight, micro_batch=micro_batch)
    losses = add_gradients(run, model, images, labels, len(images), prompts, pretrained, args,
                           run.scaler())
    return losses, {name: p.grad.clone() for name, p in model.named_parameters()
                    if p.grad is not None}


@pytest.fixture
def twin():
    """A model, a batch, and the features that a differently perturbed model gives the prompts: with
    equal ones the drift would be 0 and prove nothing. float64."""
    model, before = tiny_clip(dtype=torch.float64), tiny_clip(dtype=torch.float64, seed=7)
    choose_trainable(model)
    (tokens,), prompts = prompts_of(CLASSES)
    labels = torch.arange(12) % len(CLASSES)
    pretrained = unit(official.text_features(before, tokens)).detach()
    return model, images_for(model, 12), labels, tokens, prompts, pretrained


@pytest.mark.parametrize("name, tensors, numbers", [
    ("ViT-B/16", 64, 46_080), ("ViT-L/14", 12 + 100, 111_616), ("RN50", 12, 6_144)])
def test_the_trainable_set_is_the_official_one(name, tensors, numbers):
    with torch.device("meta"):
        model = CLIP(CONFIGS[name])
    trainable = choose_trainable(model)
    # The official rule, literally: two substring tests on the parameter names.
    wanted = {n for n, _ in model.named_parameters()
              if (n.startswith("visual.") and "ln" in n.removeprefix("visual."))
              or (not n.startswith("visual.") and "c_proj.bias" in n)}
    assert set(trainable) == wanted == {n for n, p in model.named_parameters() if p.requires_grad}
    assert (len(trainable), sum(p.numel() for p in trainable.values())) == (tensors, numbers)


# -----------------------------------------------------------------------------
# The loss

@pytest.mark.parametrize("micro_batch", [0, 1, 5, 32])
def test_loss_and_gradient_equal_the_official_two_pass_77_token_computation(twin, micro_batch):
    model, images, labels, tokens, prompts, pretrained = twin
    losses, ours = gradient(model, images, labels, prompts, pretrained, micro_batch=micro_batch)
    model.zero_grad(set_to_none=True)
    total, ce, drift = official.loss(model, images, labels, tokens, pretrained, 8.0)
    total.backward()
    assert drift > 0.01
    for name, theirs in (("loss", total), ("ce", ce), ("drift", drift)):
        assert abs(losses[name] - theirs) <= 1e-6 * max(1, abs(theirs)), name
    theirs = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(ours) == set(theirs) == set(choose_trainable(model))
    assert error(ours, theirs) <= 1e-12


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_several_templates_give_the_gradient_of_their_mean_feature(twin, micro_batch):
    """Against autograd of everything at once, in float64."""
    model, images, labels, _, _, pretrained = twin
    tokens, prompts = prompts_of(CLASSES, TEMPLATES)
    losses, ours = gradient(model, images, labels, prompts, pretrained, micro_batch=micro_batch)
    model.zero_grad(set_to_none=True)
    text = unit(sum(unit(official.text_features(model, each)) for each in tokens) / 2)
    logits = model.logit_scale.exp() * unit(official.image_features(model, images)) @ text.T
    drift = 1 - (text * pretrained).sum(dim=1).mean()
    loss = torch.nn.functional.cross_entropy(logits, labels) + 8 * drift
    loss.backward()
    assert losses["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    for name, p in choose_trainable(model).items():
        assert torch.allclose(ours[name], p.grad, rtol=1e-9, atol=1e-11), name


def test_an_unreadable_image_adds_nothing_to_the_gradient(twin):
    model, images, labels, _, prompts, _ = twin
    own = class_features(model, prompts).detach()
    _, clean = gradient(model, images[:3], labels[:3], prompts, own)
    labels[3] = -1
    _, marked = gradient(model, images[:4], labels[:4], prompts, own)
    for name in clean:
        assert torch.allclose(marked[name], clean[name] * 3 / 4, atol=1e-12), name


def test_twenty_steps_equal_a_plain_loop(tmp_path):
    """The script's weights against a plain loop: same images, same order, decay on every tensor."""
    clipfit(tmp_path, "--epochs", 5, "--batch-size", 10, "--reg-weight", 8, "--lr", 0.01)
    ours, model = checkpoint(tmp_path)["weights"], weights.load("tiny").eval()
    trainable = choose_trainable(model)
    few = few_shot(open_dataset("demo", "train"), 4, 1)
    loader = make_loader(few.with_transform(Preprocess(64, True, 1)), 10, seed=1)
    tokens = BPETokenizer()([few.template.format(name) for name in few.classnames])
    before = unit(official.text_features(model, tokens)).detach()
    sgd = torch.optim.SGD(trainable.values(), momentum=0.9, weight_decay=5e-4)
    for epoch in range(5):
        loader.batch_sampler.set_epoch(epoch)
        sgd.param_groups[0]["lr"] = 1e-5 if epoch == 0 else 0.005 * (
            1 + math.cos(math.pi * (epoch - 1) / 5))
        for images, labels, _ in loader:
            model.zero_grad(set_to_none=True)
            official.loss(model, normalise(images), labels, tokens, before, 8.0)[0].backward()
            sgd.step()
    for name, p in trainable.items():
        assert torch.allclose(p, ours[name], atol=2e-5), name


# -----------------------------------------------------------------------------
# Settings, tables, models

RECIPE = {  # the official README, by hand
    "caltech101": (100, 2), "oxford_pets": (100, 2), "stanford_cars": (100, 2),
    "oxford_flowers": (100, 2), "food101": (10, 2), "fgvc_aircraft": (100, 2), "sun397": (100, 8),
    "dtd": (100, 8), "eurosat": (100, 2), "ucf101": (100, 2), "imagenet": (10, 2)}


def test_every_data_set_has_the_published_recipe_and_what_is_changed_is_said():
    for data, (epochs, reg_weight) in RECIPE.items():
        for setting in ("fewshot", "base2new"):
            args = get_args(["--data", data, "--setting", setting])
            assert train_clipfit.fill_recipe(args, data, "ViT-B/16") == []
            assert args.epochs == epochs
            assert args.reg_weight == (8 if setting == "base2new" else reg_weight)
            assert (args.lr, args.wd, args.batch_size, args.warmup) == (0.002, 5e-4, 32, 1)
    flags = {"--lr": 0.01, "--reg-weight": 2, "--epochs": 50, "--batch-size": 8, "--wd": 0,
             "--warmup": 0, "--template": "{}"}
    args = get_args([str(x) for pair in flags.items() for x in ("--data", "dtd", *pair)])
    notes = " ".join(train_clipfit.fill_recipe(args, "dtd", "RN50"))
    assert all(f"{flag} " in notes for flag in (*flags, "RN50"))


def test_several_shots_and_seeds_give_a_table_from_unrounded_numbers(tmp_path):
    flags, shots = [*FEW, "--epochs", 2], ["--shots", 1, 2]
    clipfit(tmp_path / "table", *flags, *shots, "--seeds", 1, 2)
    found = clipfit(tmp_path / "table", *flags, *shots, "--seeds", 1, 2, 3)  # two are done
    assert [(r["shots"], r["seed"]) for r in found["runs"]] == [
        (n, seed) for n in (1, 2) for seed in (1, 2, 3)]
    for row in csv.DictReader(open(tmp_path / "table" / "table.csv", encoding="utf-8")):
        values = [r["accuracy"] for r in found["runs"] if r["shots"] == int(row["shots"])]
        mean = sum(values) / 3
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / 2)
        for key, value in (("mean", mean), ("std", std),
                           ("gain", mean - found["zero_shot_accuracy"])):
            assert float(row[key]) == pytest.approx(value, abs=1e-9), key
    assert found["accuracy"] == pytest.approx(mean) and found["accuracy_at_shots"] == 2
    said = (tmp_path / "table" / "log.txt").read_text("utf-8").splitlines()
    assert sum(line.startswith("| ") for line in said) >= 4
    alone = clipfit(tmp_path / "alone", *flags, "--shots", 1, "--seed", 2)  # seeds do not leak
    ours, theirs = (checkpoint(tmp_path / folder)["weights"]
                    for folder in ("alone", "table/shots1_seed2"))
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())
    again = clipfit(tmp_path / "table", *flags, "--shots", 1, "--seed", 2, "--eval-only")
    assert again["accuracy"] == alone["accuracy"] == found["runs"][1]["accuracy"]
    again = clipfit(tmp_path / "table", *flags, "--shots", 0, 2, "--seeds", 1, 3, "--eval-only")
    assert again["accuracy"] == (found["runs"][3]["accuracy"] + found["runs"][5]["accuracy"]) / 2
    refusal(tmp_path / "table", *flags, *shots, "--seeds", 1, 4, "--eval-only",
            names=("shots1_seed4", "shots2_seed4"))  # zero-shot accuracy is none of theirs
    for folder, more in (("alone", [*shots, "--seeds", 1, 2]), ("table", ["--shots", 4])):
        line = refusal(tmp_path / folder, *flags, *more, names=(folder, "--seed", "--output-dir"))
        assert "None" not in line and len(line) < 300


def test_base_to_new_trains_on_half_of_the_classes(tmp_path):
    found = clipfit(tmp_path, "--setting", "base2new", "--shots", 2, "--seeds", 1, 2, "--epochs", 2)
    assert "linear_probe_accuracy" not in found  # it cannot know new classes
    assert "nan" not in (tmp_path / "table.csv").read_text()
    for one in found["runs"]:
        base, new = one["base_accuracy"], one["new_accuracy"]
        assert one["accuracy"] == pytest.approx(2 * base * new / (base + new))
        assert one["images"] == {"base": 500, "new": 500}
        assert one["linear_probe_base_accuracy"] > 30 and "linear_probe_accuracy" not in one
    base, new = (sum(r[f"{part}_accuracy"] for r in found["runs"]) / 2 for part in ("base", "new"))
    assert found["accuracy"] == pytest.approx(2 * base * new / (base + new))  # H of the averages
    shots = json.loads((tmp_path / "shots2_seed1" / "shots.json").read_text())["train"]
    everything = few_shot(open_dataset("demo", "train"), 2, 1)
    assert {label for _, label in shots} == set(range(5)) and len(shots) == 10
    assert {tuple(pair) for pair in shots} <= set(zip(everything.paths, everything.labels))


def fake_imagenet(folder, words=True):
    """ImageNet and its four shifts in miniature, in the folders of the real ones."""
    names = [f"n{i:08d}" for i in range(4)]
    places = {"imagenet/images/train": names, "imagenet/images/val": names,
              "imagenet-sketch/images": names, "imagenet-adversarial/imagenet-a": names[1:],
              "imagenet-rendition/imagenet-r": names[:3],
              "imagenetv2/imagenetv2-matched-frequency-format-val": list("0123")}
    for place, inside in places.items():
        class_folder(folder / place, inside, all=3 if place.endswith("train") else 2)
        if words:
            (folder / place.split("/")[0] / "classnames.txt").write_text("\n".join(
                map(" ".join, zip(names, ("forest", "river", "highway", "pasture")))))
    return folder


def test_domain_generalisation_trains_on_imagenet_and_tests_on_its_four_shifts(tmp_path):
    flags = ["--data", "imagenet", "--data-dir", fake_imagenet(tmp_path / "data"), "--no-download"]
    found = clipfit(tmp_path / "run", *flags, "--setting", "dg", "--shots", 2, "--epochs", 2,
                    "--model", "tiny")
    assert found["images"] == {"imagenet": 8, "imagenetv2": 8, "imagenet-sketch": 8,
                               "imagenet-a": 6, "imagenet-r": 6}
    assert found["accuracy"] == found["imagenet_accuracy"]
    probed = {key for key in found if key.startswith("linear_probe") and key.endswith("accuracy")}
    assert probed == {f"linear_probe_{part}accuracy" for part in (
        "", "imagenet_", "imagenetv2_", "imagenet-sketch_")}  # those that have its classes
    assert any("--setting dg" in note for note in found["departures"])


def test_a_resnet_trains_the_text_biases_and_keeps_its_statistics(tmp_path):
    model = tiny_clip(config="tiny-rn", image_size=64)
    path = weights.save(model, tmp_path / "rn.safetensors")
    done = attempt("train_clipfit", *FEW, "--weights", path, "--epochs", 2, "--workers", 0,
                   "--export", "openai", "--output-dir", tmp_path / "run").ok()
    assert "no LayerNorm" in done.out and "warm-up" not in done.out
    done = attempt("train_clipfit", *FEW, "--epochs", 1, "--dry-run", "--output-dir", tmp_path).ok()
    assert "all epochs are warm-up" in done.out
    after = weights.load(tmp_path / "run" / "export" / "clip.pt").state_dict()
    for name, tensor in model.state_dict().items():
        trained = "c_proj.bias" in name and "attnpool" not in name
        assert torch.equal(tensor, after[name]) != trained, name


def test_a_clip_of_bert_and_a_torchvision_tower_trains(tmp_path):
    """With the tokenizer and the pixel statistics of its own file."""
    pytest.importorskip("torchvision")
    model = tiny_clip(backbone="squeezenet1_0", image_size=64,
                      **bert_fields(BertConfig("bert", 265, 32, 2, 2, 48, 40)))
    path = weights.save(model, tmp_path / "two.safetensors")
    vocab = ROOT / "assets" / "tiny_vocab" / "wordpiece"
    refusal(tmp_path / "no", *FEW, "--weights", path, names=("--tokenizer",))
    found = clipfit(tmp_path / "run", *FEW, "--weights", path, "--tokenizer", vocab, "--epochs", 2,
                    "--export", "safetensors")
    assert found["trainable_tensors"] == 2
    again = clipfit(tmp_path / "again", *FEW, "--shots", 0, "--weights", tmp_path / "run")
    assert again["zero_shot_accuracy"] == found["accuracy"]  # the vocabulary lies in the checkpoint


def test_half_precision_trains_with_the_drift_term(tmp_path):
    found = clipfit(tmp_path, *FEW, "--precision", "bf16", "--epochs", 6, "--reg-weight", 1000,
                    "--log-every", 1)
    for row in metrics(tmp_path, "train"):
        assert row["loss"] == pytest.approx(row["ce"] + 1000 * row["drift"], rel=1e-4)
    assert 1000 * row["drift"] > 0.002 * row["loss"]  # felt by the sum above
    assert found["accuracy"] > 40
    assert all(x.dtype == torch.float32 for x in checkpoint(tmp_path)["weights"].values())


# -----------------------------------------------------------------------------
# Results

def test_the_tables_and_the_probe_say_what_plain_loops_say(tmp_path):
    done = attempt("train_clipfit", *FEW, "--shots", 8, "--epochs", 6, "--workers", 0,
                   "--output-dir", tmp_path).ok()
    found, names = results(tmp_path), FEW[1:]
    few, val = (part.select(find_classes(part.classnames, names)) for part in few_shot(
        open_dataset("demo", "train"), 8, 1, open_dataset("demo", "val")))
    test, sets = open_dataset("demo", "test", classes=names), []
    shots = json.loads((tmp_path / "shots.json").read_text())["train"]
    assert [tuple(pair) for pair in shots] == list(zip(few.paths, few.labels))
    for images in (few, val, test):
        pixels = [images.with_transform(Preprocess(64))[i][0] for i in range(len(images))]
        sets.append((normalise(torch.stack(pixels)), torch.tensor(images.labels)))
    model, trained = weights.load("tiny"), checkpoint(tmp_path)["weights"]
    rows = list(csv.DictReader(open(tmp_path / "predictions_test.csv", encoding="utf-8")))
    assert [row["path"] for row in rows] == test.paths and len(rows) == 300
    tokens = BPETokenizer()([test.template.format(name) for name in names])
    with torch.no_grad():
        features = [(model.encode_image(pixels, normalize=True), labels) for pixels, labels in sets]
        weight, bias, C = linear_probe(*features[0], 3, features[1])
        guesses = (features[2][0] @ weight.T + bias).argmax(dim=1)
        right = 100 * float((guesses == features[2][1]).double().mean())
        assert found["linear_probe_accuracy"] == pytest.approx(right)
        assert f"linear probe: C {C:.4g}, chosen on 12 validation images" in done.out
        for column, accuracy in (("zero_shot", "zero_shot_accuracy"), ("tuned", "accuracy")):
            image, text, _ = model(sets[2][0], tokens)
            guesses = [names[i] for i in (image @ text.T).argmax(dim=-1)]
            assert [row[column] for row in rows] == guesses
            right = sum(row["label"] == row[column] for row in rows)
            assert 100 * right / len(rows) == pytest.approx(found[accuracy])
            for name, p in model.named_parameters():
                p.copy_(trained.get(name, p))
    confusion = json.loads((tmp_path / "confusion_test.json").read_text())["tuned"]
    assert sum(confusion[i][i] for i in range(3)) == right
    classes = list(csv.DictReader(open(tmp_path / "per_class_test.csv", encoding="utf-8")))
    assert sum(int(c["images"]) for c in classes) == 300


def test_seed_zero_is_a_seed_and_templates_change_the_prompts(tmp_path):
    templates, names = ["{c}", "a photo of {}."], FEW[1:]
    flags = [word for template in templates for word in ("--template", template)]
    found = clipfit(tmp_path, *FEW, *flags, "--seed", 0, "--shots", 1, "--epochs", 1)
    few = few_shot(open_dataset("demo", "train"), 1, 0)
    shots = json.loads((tmp_path / "shots.json").read_text())["train"]
    assert [path for path, _ in shots] == few.select(find_classes(few.classnames, names)).paths
    test = open_dataset("demo", "test", classes=names).with_transform(Preprocess(64))
    ours, own = (zero_shot(start("cpu", "fp32"), weights.load("tiny"), test, BPETokenizer(), each,
                           types.SimpleNamespace(workers=0))["accuracy"]
                 for each in (templates, None))
    assert found["zero_shot_accuracy"] == ours != own


def test_unreadable_images_are_counted_and_named_and_too_many_are_refused(tmp_path):
    data = class_folder(tmp_path / "mine", train=8, test=40)
    flags = ["--data", data, "--model", "tiny", "--epochs", 1, "--workers", 0, "--output-dir"]
    (data / "test/red/3.png").write_bytes(b"no image")
    (data / "train/blue/5.png").write_bytes((data / "train/blue/5.png").read_bytes()[:40])
    done = attempt("train_clipfit", *flags, tmp_path / "one", "--shots", 8).ok()
    found = results(tmp_path / "one")
    assert found["unreadable_images"] == 1 and found["images"] == {"test": 119}
    assert found["training_images"] in (23, 24) and "test/red/3.png" in done.out
    assert "5.png" in done.out and "no validation images" in done.out
    for i in range(4):
        (data / f"test/green/{i}.png").write_bytes(b"no image")
    refusal(tmp_path / "two", *flags[:-1], names=("of 120",))


@pytest.mark.parametrize("words", [["--trainer", "CLIPFit"], ["DATASET.NUM_SHOTS", "4"],
                                   ["--dataset-config-file", "dtd.yaml"], ["--local_rank", "0"],
                                   ["--grad-clip", "1"]])
def test_flags_of_other_programs_are_named(words, tmp_path):
    refusal(tmp_path, "--seed", 1, *words, names=(words[0][2:7],))


def test_data_that_cannot_be_used_is_refused_before_any_work(tmp_path, monkeypatch):
    imagenet = fake_imagenet(tmp_path / "data", words=False) / "imagenet" / "images"
    refusal(tmp_path / "a", "--data", "dtd", "--weights", "nothere.pt", "--data-dir", tmp_path,
            names=("nothere.pt",))  # before 600 MB of images
    monkeypatch.setenv("HOME", str(tmp_path))  # nothing is here: all of it is said at once
    refusal(tmp_path / "a", "--data", "dtd", "--data-dir", tmp_path, "--no-download",
            names=("dtd", "--no-download", "ViT-B-16.pt"))
    refusal(tmp_path / "c", "--classes", "Forrest", "River", names=("Forrest", "forest"))
    refusal(tmp_path / "d", "--classes", "Forest", names=("--classes",))
    refusal(tmp_path / "e", "--setting", "dg", names=("imagenet",))
    refusal(tmp_path / "f", "--template", "a photo", names=("a photo",))
    # "a photo of a n01440764." scores at chance.
    refusal(tmp_path / "h", "--data", imagenet, "--model", "tiny", names=("n00000000",))
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_demo_learns_ten_points_over_a_useful_zero_shot(tmp_path):
    """On held-out images; chance is 10 %."""
    found = clipfit(tmp_path)
    assert found["zero_shot_accuracy"] >= 30
    assert found["gain"] >= 10
