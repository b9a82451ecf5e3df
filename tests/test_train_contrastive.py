"""train_contrastive: its losses and its step (and train_staged's) against their definitions, the
recipe, presets, what is refused before any work, kept features, best weights, learning."""
import dataclasses
import functools
import math
import shutil
import types

import helpers
import pytest
import torch
import torch.nn.functional as F
from helpers import (attempt, checkpoint, error, gradients, largest, metrics, refused, run_main,
                     unit_pairs)

import device
import large_batch
import train_contrastive
import train_staged
import weights
from clip_model import BERTS, bert_fields, training_mode
from pairs import open_pairs
from train_contrastive import batch_loss, get_args, parameter_groups

SCRIPT = "train_contrastive"
POSITIVES = ("diag", "mask", "multi")
LOSSES = [("infonce", "hardest"), ("siglip", "hardest"), ("triplet", "sum"),
          ("triplet", "hardest"), ("triplet", "semi-hard"), ("infonce+triplet", "hardest")]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return helpers.scenes(tmp_path_factory.mktemp("scenes") / "pairs", 24, 12)


def flags(folder, *more):
    """A run of tiny towers with dropout in the text's: 24 images in batches of 8, two epochs."""
    return helpers.with_defaults([
        ("--data", folder), ("--image-tower", "tiny-vit:none"), ("--text-tower", "tiny-bert:none"),
        ("--tokenizer", folder / "vocab.txt"), ("--embed-dim", 16), ("--batch-size", 8),
        ("--micro-batch", 3), ("--crop", 0.9), ("--epochs", 2), ("--workers", 0),
        ("--device", "cpu"), ("--log-every", 1)], more)


def options(**changes):
    """The method's flags, with plain defaults."""
    return types.SimpleNamespace(**{"loss": "infonce", "positives": "mask", "triplet": "hardest",
                                    "triplet_weight": 0.3, "margin": 0.2, "micro_batch": 0,
                                    **changes})


# -----------------------------------------------------------------------------
# The losses against their definitions, in float64

def defined(image, text, ids, scale, bias, args):
    """The loss on the whole N x N matrix, as the papers write it."""
    n = len(image)
    eye = torch.eye(n, dtype=torch.bool)
    same = eye if args.positives == "diag" else eye | (ids[:, None] == ids).any(dim=2)
    wanted = same if args.positives == "multi" else eye
    counted = torch.ones_like(eye) if args.positives != "mask" else ~same | eye
    total = 0.0
    if "infonce" in args.loss:
        for side in (scale * image @ text.T, scale * text @ image.T):
            for i, z in enumerate(side):
                total = total + (z[counted[i]].logsumexp(0) - z[wanted[i]].mean()) / (2 * n)
    if "triplet" in args.loss:
        for cosine in (image @ text.T, text @ image.T):
            for i in range(n):
                far = cosine[i][~same[i]]
                if args.triplet == "semi-hard":
                    far = far[far < cosine[i, i]]
                if args.triplet != "sum":
                    far = far.sort().values[-1:]
                total = total + args.triplet_weight * (args.margin + far - cosine[i, i]).clamp(
                    min=0).sum() / n
    if args.loss == "siglip":
        z = torch.where(wanted, 1.0, -1.0) * (scale * image @ text.T + bias)
        total = -F.logsigmoid(z)[counted].sum() / n
    return total


def script_loss(run, image, text, ids, scale, bias, args):
    model = types.SimpleNamespace(logit_scale=scale.log(), logit_bias=bias)
    return batch_loss(run, model, image, text, ids, [len(image)], args)["loss"]


@pytest.mark.parametrize("loss, kind", LOSSES)
def test_losses_and_gradients_are_those_of_the_definition(run, monkeypatch, loss, kind):
    """150 pairs, more than are taken at once; and 6, where semi-hard finds none for some."""
    monkeypatch.setattr(large_batch, "BLOCK", 1)
    for n in (150, 6):
        image, text, ids = unit_pairs(n)
        scale, bias = (torch.tensor(x, dtype=torch.float64) for x in (9.0, -3.0))
        values = {}
        for positives in POSITIVES:
            args = options(loss=loss, triplet=kind, positives=positives)
            truth, ours = (gradients(lambda i, t, s, b, f=f, k=ids, a=args: f(i, t, k, s, b, a),
                                     image, text, scale, bias)
                           for f in (defined, functools.partial(script_loss, run)))
            assert largest(ours, truth) < 1e-12, (n, positives)
            values[positives] = round(float(truth[0]), 9)
        if n == 150:
            assert values["diag"] != values["mask"]
            assert (values["mask"] != values["multi"]) == (loss != "triplet")


@pytest.mark.parametrize("loss, kind", [("infonce", "ClipLoss"), ("siglip", "SigLipLoss")])
def test_plain_losses_are_open_clips(run, loss, kind):
    theirs = getattr(pytest.importorskip("open_clip.loss"), kind)()
    image, text, ids = unit_pairs(150)
    inputs = image, text, *(torch.tensor(x, dtype=torch.float64) for x in (14.0, -10.0))
    args = options(loss=loss, positives="diag")
    ours = gradients(lambda i, t, s, b: script_loss(run, i, t, ids, s, b, args), *inputs)
    expected = gradients(lambda i, t, s, b: theirs(i, t, s, *[b] * (loss == "siglip")), *inputs)
    assert largest(ours, expected) < 1e-12


# -----------------------------------------------------------------------------
# The step

def model_of(dtype=torch.float64, config="tiny-vit", **changes):
    """A random CLIP with a BERT of 30 words, and a SigLIP bias."""
    text = dataclasses.replace(BERTS["tiny-bert"], vocab_size=30, dropout=0.0, attention_dropout=0.0)
    model = helpers.tiny_clip(dtype=dtype, config=config, **bert_fields(text), **changes)
    model.logit_bias = torch.nn.Parameter(torch.tensor(-2.0, dtype=dtype))
    return model.train()


def batch_of(model, n=11):
    """uint8 images, tokens of 3 to 9 words with their padding, ids with partners."""
    generator, size = torch.Generator().manual_seed(2), model.config.image_size
    images = torch.randint(0, 256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    return images, helpers.texts_for(model, [3 + i * i % 7 for i in range(n)], 12), unit_pairs(n)[2]


def pixels(model, images):
    mean, std = (torch.tensor(x)[:, None, None] for x in (model.image_mean, model.image_std))
    return ((images.float() / 255 - mean) / std).to(model.logit_scale.dtype)


def step(run, model, batch, args, counts=None, script=train_contrastive):
    model.zero_grad(set_to_none=True)
    losses = script.add_gradient(run, model, *batch, counts or [len(batch[0])], args, run.scaler(), 5)
    run.sum_gradients(list(model.parameters()))
    return losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def whole(model, batch, args):
    """Both towers on the whole batch in plain autograd, then the loss as defined."""
    images, tokens, ids = batch
    model.zero_grad(set_to_none=True)
    image, text, scale = model(pixels(model, images), tokens)
    loss = defined(image, text, ids, scale, model.logit_bias, args)
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()
                           if p.grad is not None}


@pytest.fixture
def in_double(monkeypatch):
    """Pixels in float64: the script's own are fp32, as are its weights."""
    for script in (train_contrastive, train_staged):
        monkeypatch.setattr(script, "image_features", lambda run, model, images:
                            model.encode_image(pixels(model, images), normalize=True))


@pytest.mark.parametrize("script, loss, positives", [
    (train_contrastive, "infonce", "mask"), (train_contrastive, "siglip", "mask"),
    (train_contrastive, "infonce+triplet", "mask"), (train_staged, "infonce", "multi"),
    (train_staged, "infonce", "mask"), (train_staged, "infonce", "diag")])
def test_pieces_give_the_gradient_of_the_whole_batch(run, in_double, script, loss, positives):
    """11 pairs in pieces of 1, of 7 and 4, and in one; every parameter, scale and bias too."""
    model = model_of()
    batch, args = batch_of(model), options(loss=loss, positives=positives)
    value, theirs = whole(model, batch, args)
    assert theirs["logit_scale"].abs() > 1e-3 and ("logit_bias" in theirs) == (loss == "siglip")
    for args.micro_batch in (1, 7, 0):
        losses, ours = step(run, model, batch, args, script=script)
        assert abs(losses["loss"] - value) < 1e-12 and error(ours, theirs) < 1e-12
        terms = [x for name, x in losses.items() if name != "loss"]
        assert script is train_staged or torch.isclose(sum(terms), losses["loss"])
        assert len(terms) == (script is train_contrastive) + ("+" in loss)


def test_any_number_of_processes_gives_the_gradient_of_one(in_double):
    """Two and three, with partners across them, in pieces."""
    model = model_of()
    batch, truth = batch_of(model), []
    for script, loss, positives in (
            (train_contrastive, "infonce", "diag"), (train_contrastive, "infonce", "mask"),
            (train_contrastive, "infonce+triplet", "multi"), (train_contrastive, "siglip", "mask"),
            (train_staged, "infonce", "multi")):
        args = options(loss=loss, positives=positives, micro_batch=2)
        truth.append((script, args, *whole(model, batch, args)))

    def work(rank):
        run = device.start("cpu", "fp32")
        mine = [torch.arange(r, 11, run.world_size) for r in range(run.world_size)]
        for script, args, value, theirs in truth:
            share = [x[mine[run.rank]] for x in batch]
            losses, ours = step(run, model, share, args, [len(x) for x in mine], script)
            assert abs(run.sum(losses["loss"]) - value) < 1e-12 and error(ours, theirs) < 1e-12
    for count in (2, 3):
        for result in helpers.processes(count, work):
            result.ok()


def test_batch_norm_moves_only_where_one_piece_is_the_batch(pairs, run, tmp_path):
    model = model_of(torch.float32, config="tiny-rn", image_size=32)
    training_mode(model, statistics=False)
    one, pieces = (step(run, model, batch_of(model), options(micro_batch=n))[1] for n in (0, 4))
    assert error(pieces, one) < 1e-5
    for micro, moves in ((3, False), (0, True)):
        folder = tmp_path / str(micro)
        result = attempt(SCRIPT, *flags(pairs, "--image-tower", "tiny-rn:none", "--micro-batch",
                                        micro, "--output-dir", folder))
        assert ("WARNING: BatchNorm" in result.ok().out) == (not moves)
        means = [x for n, x in checkpoint(folder)["buffers"].items() if "running_mean" in n]
        assert means and all(bool(mean.any()) == moves for mean in means)
    refused(attempt(SCRIPT, *flags(pairs, "--image-tower", "tiny-rn:none", "--micro-batch", 3,
                                   "--output-dir", tmp_path / "0")), "statistics")


# -----------------------------------------------------------------------------
# The recipe

def test_all_decay_but_gains_and_biases_and_towers_have_their_rates():
    model = model_of(torch.float32, proj="mlp")
    args = types.SimpleNamespace(lr=1.0, image_lr=2.0, text_lr=3.0, wd=0.5, tower_wd=0.25)
    found = {id(p): (group["lr"], group["weight_decay"])
             for group in parameter_groups(model, args) for p in group["params"]}
    assert len(found) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        head = name.startswith(("visual.proj.", "text_projection.", "logit_"))
        lr = 1.0 if head else 2.0 if name.startswith("visual.") else 3.0
        wd = 0.0 if p.ndim < 2 else 0.5 if head else 0.25
        assert found[id(p)] == (lr, wd), name
    tables = ("visual.positional_embedding", "bert.embeddings.word_embeddings.weight")
    assert all(found[id(model.get_parameter(name))][1] for name in tables)  # as in the paper


@pytest.mark.parametrize("preset, factors", [
    ("clip-scratch", [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]),
    ("clip-roberta", [1, 0.75, 0.5, 0.25]), ("simple-clip", [1] * 4)])
def test_rates_and_scale_of_a_run(pairs, tmp_path, preset, factors):
    """Six steps, 40 % of which, 2.4, are a warm-up of two. The scale meets its ends at this lr."""
    result = run_main(SCRIPT, *flags(pairs, "--warmup", 0.4, "--lr", 0.9, "--preset", preset,
                                     "--captions", "one", "--output-dir", tmp_path))
    rows = metrics(tmp_path, "train")
    assert [row["lr"] for row in rows] == pytest.approx([0.9 * x for x in (0.5, 1, *factors)])
    assert all(1 <= row["scale"] < 100.001 for row in rows) and 1 <= result["scale"] < 100.001
    assert [row["ln_batch"] for row in rows] == pytest.approx([math.log(8)] * 6)


@pytest.mark.parametrize("names, held", [
    (["image"], lambda n: n.startswith("visual.") and n != "visual.proj"),
    (["text"], lambda n: n.startswith("bert.")),
    (["visual.ln_p", "bert.embeddings"],
     lambda n: n.startswith(("visual.ln_pre.", "visual.ln_post.", "bert.embeddings")))])
def test_what_is_frozen_does_not_move_and_all_else_does(pairs, tmp_path, names, held):
    run_main(SCRIPT, *flags(pairs, "--freeze", *names, "--warmup", 0, "--epochs", 1,
                            "--export", "safetensors", "--output-dir", tmp_path))
    torch.manual_seed(1)
    before = weights.load(None, "tiny-vit:none", "tiny-bert:none", embed_dim=16).state_dict()
    after = weights.load(tmp_path / "export" / "clip.safetensors").state_dict()
    for name, tensor in before.items():  # keys' biases do not change a softmax
        assert torch.equal(tensor, after[name]) == held(name) or "key.bias" in name, name


# -----------------------------------------------------------------------------
# Command lines

PRESETS = [
    ([], dict(preset="clip-scratch", weights="auto", zero_shot="demo")),
    (["--data", "x"], dict(lr=5e-4, wd=0.2, batch_size=256, beta2=0.98, seed=1, captions="one",
                           weights="none", crop=0.6, embed_dim=512, triplet_weight=0.1)),
    (["--data", "x", "--weights", "ViT-B/32"], dict(preset="clip-finetune", lr=1e-5, warmup=0.1)),
    (["--preset", "clip-finetune"], dict(lr=1e-5, wd=0.1, weights="auto", grad_clip=1.0)),
    (["--preset", "clip-roberta", "--lr", "2e-5"],
     dict(lr=2e-5, schedule="linear", batch_size=64, seed=42, captions="all", crop=0.0)),
    (["--preset", "simple-clip", "--positives", "diag"],
     dict(loss="infonce+triplet", image_lr=1e-4, text_lr=1e-5, lr=1e-3, wd=1e-3, tower_wd=0.0,
          proj="mlp", embed_dim=256, squash=True, positives="diag")),
    (["--preset", "clip-scratch"], dict(weights="none", lr=5e-4, zero_shot=None, freeze=[])),
    (["--loss", "triplet"], dict(triplet_weight=1.0)),
    (["--model_name_or_path", "w", "--num-train-epochs=3", "--warmup_steps", "32"],
     dict(weights="w", epochs=3, warmup=32))]


@pytest.mark.parametrize("words, wanted", PRESETS)
def test_what_a_command_line_means(words, wanted):
    args = get_args(words)
    assert {name: getattr(args, name) for name in wanted} == wanted


@pytest.mark.parametrize("words, name", [
    (["--do-train"], "--eval-only"), (["--fp16"], "--precision"), (["--optim", "adamw"], "AdamW"),
    (["--per_device_train_batch_size", "8"], "--batch-size"),
    (["--accum-freq", "2"], "--micro-batch"),
    (["--batch-size", "1"], "--batch-size"), (["--crop", "2"], "--crop"),
    (["--loss", "moein"], "--loss"), (["--cache-gb", "nan"], "--cache-gb")])
def test_flags_that_are_refused(words, name):
    refused(attempt(SCRIPT, *words), name)


def test_what_is_refused_before_any_work(pairs, tmp_path):
    """Nothing is left behind by any of them."""
    folder = tmp_path / "no"
    for more, name in (
            (["--eval-only"], "--eval-only"), (["--check-grad", "--eval-only"], "--check-grad"),
            (["--freeze", "vision"], "vision"), (["--zero-shot", "nowhere"], "nowhere"),
            (["--export", "openai"], "openai"),
            (["--tokenizer", helpers.ROOT / "assets/tiny_vocab/bytebpe"], "--tokenizer"),
            (["--image-tower", "no-such-net"], "no-such-net"), (["--batch-size", 25], "24")):
        refused(attempt(SCRIPT, *flags(pairs, *more, "--output-dir", folder)), name)
        assert not folder.exists(), more


@pytest.mark.parametrize("more", [
    ["--loss", "siglip", "--positives", "multi", "--micro-batch", 0],
    ["--loss", "triplet", "--triplet", "semi-hard", "--precision", "bf16"],
    ["--loss", "triplet", "--triplet-weight", 0],  # no gradient at all
    ["--loss", "infonce+triplet", "--captions", "all"]])
def test_check_grad_holds(pairs, tmp_path, more):
    result = attempt(SCRIPT, *flags(pairs, "--check-grad", *more, "--output-dir", tmp_path / "no"))
    assert "8 pairs in pieces of" in result.ok().out and "pieces of 8" not in result.out
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("factor", [2, math.nan])
def test_check_grad_finds_one_wrong_gradient_of_pieces(pairs, monkeypatch, factor):
    """Wherever it stands: the largest of [0, nan] is 0 to Python."""
    real = train_contrastive.add_gradient

    def spoilt(run, model, images, tokens, ids, counts, args, *rest):
        losses = real(run, model, images, tokens, ids, counts, args, *rest)
        if args.micro_batch:
            [p for p in model.parameters() if p.grad is not None][-1].grad.mul_(factor)
        return losses
    monkeypatch.setattr(train_contrastive, "add_gradient", spoilt)
    assert attempt(SCRIPT, *flags(pairs, "--check-grad")).code == 3


def test_the_simple_clip_preset_from_end_to_end(pairs, tmp_path):
    """A torchvision backbone, squashed pixels, MLP heads: all of it comes back from the file."""
    result = run_main(SCRIPT, *flags(
        pairs, "--preset", "simple-clip", "--image-tower", "squeezenet1_0:none", "--max-steps", 2,
        "--export", "safetensors", "--output-dir", tmp_path))
    assert result["steps"] == 2
    for row in metrics(tmp_path, "train"):
        assert row["triplet"] > 0 and row["loss"] == pytest.approx(
            row["infonce"] + row["triplet"], rel=1e-5)
    for name in ("export/clip.safetensors", "checkpoint_best.pt"):
        model = weights.load(tmp_path / name)
        assert (model.config.proj, model.config.backbone) == ("mlp", "squeezenet1_0")
        assert model.image_resize == "squash"


# -----------------------------------------------------------------------------
# Runs

def test_the_best_weights_are_what_is_tested_and_exported(pairs, tmp_path):
    words = flags(pairs, "--loss", "siglip", "--export", "safetensors", "--output-dir", tmp_path)
    results = run_main(SCRIPT, *words)
    scores = [row["mean_recall"] for row in metrics(tmp_path, "val")]
    assert results["mean_recall"] == max(scores) and len(scores) == 2
    best = checkpoint(tmp_path, "checkpoint_best.pt")
    model = weights.load(tmp_path / "export" / "clip.safetensors")
    for name, tensor in best["weights"].items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert weights.load(tmp_path).logit_bias.item() == model.logit_bias.item() != -10  # SigLIP's
    again = run_main(SCRIPT, *words, "--eval-only")
    loaded = run_main(SCRIPT, *flags(pairs, "--loss", "siglip", "--image-tower", tmp_path,
                                     "--text-tower", tmp_path, "--eval-only"))
    for key in ("mean_recall", "loss"):
        assert again[key] == pytest.approx(results[key]), key
        assert loaded["mean_recall"] == results["mean_recall"]
    assert again["steps"] == results["tested_step"] == best["step"] and results["steps"] == 6
    refused(attempt(SCRIPT, *words, "--zero-shot", "demo"), "zero_shot")


def test_kept_features_train_and_score_as_images_do(pairs, tmp_path):
    """A frozen image tower sees each image once, damaged ones too; afterwards --eval-only, which
    keeps nothing, finds the same scores."""
    folder = shutil.copytree(pairs, tmp_path / "pairs")
    (folder / open_pairs(folder, "val").paths[1]).write_bytes(b"no picture")
    words = flags(folder, "--freeze", "image", "--crop", 0, "--output-dir", tmp_path / "run")
    result = attempt(SCRIPT, *words).ok()
    assert "1 of 12 val images" in result.out
    kept, plain = helpers.results(tmp_path / "run"), run_main(SCRIPT, *words, "--eval-only")
    assert kept["images"] == plain["images"] == 11
    assert kept["mean_recall"] == plain["mean_recall"]
    assert kept["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    again = attempt(SCRIPT, *words, "--overwrite").ok()
    assert "features of the frozen image tower from" in again.out


def test_data_without_test_pairs_or_without_any_held_out(pairs, tmp_path):
    """val alone is scored twice, which is said; train alone may be scored by --zero-shot."""
    assert "NOTE" in attempt(SCRIPT, *flags(pairs, "--output-dir", tmp_path / "val")).ok().out
    table = (pairs / "pairs.csv").read_text().replace(",val", ",train")
    folder = shutil.copytree(pairs, tmp_path / "pairs")
    (folder / "pairs.csv").write_text(table)
    result = run_main(SCRIPT, *flags(folder, "--zero-shot", helpers.class_folder(tmp_path / "shot"),
                                     "--output-dir", tmp_path / "train"))
    assert "zero_shot_accuracy" in result and "mean_recall" not in result and result["steps"] == 8


def test_the_demo_learns_and_leaves_little(tmp_path):
    """Two epochs of the bundled demo. The tiny CLIP begins with 44 % of ten classes; by chance one
    caption in a hundred finds its image among the first ten of 1,000."""
    result = run_main(SCRIPT, "--epochs", 2, "--device", "cpu", "--output-dir", tmp_path)
    assert result["model"] == "tiny" and result["zero_shot_accuracy"] > 50
    assert result["t2i_r10"] > 15 and result["mean_recall"] > 12
    assert sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()) < 100e6


