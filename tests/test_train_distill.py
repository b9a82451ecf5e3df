"""The distillation script: its losses, the exact step, maps, averages, stored teachers, students."""
import json
import math
import re
import shutil
import types

import pytest
import torch
import torch.nn.functional as F
from helpers import (after, at_step, attempt, bad_steps, checkpoint, die, differences, metrics,
                     perturb, processes, refused, results, run_main, same_run, scenes, tiny_clip,
                     with_defaults)

import device
import large_batch
import teachers
import weights
from clip_model import CLIP, unit
from pairs import make_pair_loader, open_pairs
from teachers import ShownPairs, Stored, Teacher
from tokenizer import for_model, open_tokenizer
from train_distill import add_gradient, as_map, Average, Batch, draw_mix, get_args, Heads, Maps, Mix

DOUBLE = torch.float64
LOOK = (32, "shortest", "bicubic")


def randoms(*shape, seed=0):
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))


def units(n, dim=7, seed=0):
    return unit(randoms(n, dim, seed=seed))


# -----------------------------------------------------------------------------
# Mixing, maps inside the towers, the average

def test_mixing_is_exact_about_its_shares():
    images = torch.randint(0, 255, (6, 3, 16, 16), dtype=torch.uint8)
    model = types.SimpleNamespace(image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4))
    whole, other = slice(0, 6), [3, 4, 5, 0, 1, 2]
    plain = Mix().show(images, whole, model)
    mixed = Mix(0.7).show(images, whole, model)
    assert mixed.allclose(0.7 * plain + 0.3 * plain[other], atol=1e-6)
    assert Mix(0.7).show(images, slice(2, 4), model).equal(mixed[2:4])  # a piece of the batch
    args, before = get_args(["--cutmix", "1"]), images.clone()
    for number in range(20):
        mix = draw_mix(args, number, 16)
        cut = mix.show(images, whole, model)
        kept = (cut == plain).all(dim=1).float().mean(dim=(1, 2))
        assert kept.allclose(torch.full((6,), mix.share))  # random pixels: no two are equal
        assert ((cut == plain) | (cut == plain[other])).all() and images.equal(before)
    both = get_args(["--mixup", "0.4", "--cutmix", "1"])
    assert {draw_mix(both, number, 32).box is None for number in range(20)} == {True, False}


def vit(seed=0, **changes):
    return tiny_clip(seed, DOUBLE, **changes)


def cnn(name="mobilenet_v3_small"):
    torch.manual_seed(0)
    model = weights.load(image_tower=name, text_tower="tiny-vit:none", embed_dim=32, image_size=64)
    return model.double()


def test_hint_and_attention_are_their_formulas_in_vits():
    """The teacher's grid of 8 x 8 is averaged to the student's 4 x 4; attention as in torch's own
    module."""
    teacher, student = vit(1, image_size=64), vit(2)
    maps = Maps(student, teacher)
    assert maps.channels == [64, 64]
    images, adapter, inputs = randoms(3, 3, 64, 64), torch.nn.Conv2d(64, 64, 1), []
    block = teacher.visual.transformer.resblocks[-1]
    for model, pixels in ((teacher, images), (student, F.avg_pool2d(images, 2))):
        model.visual.transformer.resblocks[-1].register_forward_pre_hook(
            lambda _, given: inputs.append(given[0]))
        model.encode_image(pixels)
    found = {name: float(x.detach()) for name, x in maps.losses(adapter, 3).items()}
    theirs, ours = inputs                                       # (3, 65, 64) and (3, 17, 64)
    torchs = torch.nn.MultiheadAttention(64, block.attn.heads, batch_first=True).double()
    torchs.load_state_dict(block.attn.state_dict())
    normed = block.ln_1(theirs)
    seen = torchs(normed, normed, normed, average_attn_weights=True)[1][:, 0, 1:]
    seen = F.avg_pool2d(seen.view(3, 1, 8, 8), 2).flatten(1)
    seen = seen / seen.sum(dim=1, keepdim=True)
    map_ = ours[:, 1:].transpose(1, 2).reshape(3, 64, 4, 4)
    energy = map_.square().sum(dim=1).flatten(1)
    energy = energy / energy.sum(dim=1, keepdim=True)
    kl = (seen * (seen.log() - energy.log())).sum() / 3
    assert found["attention"] == pytest.approx(float(kl.detach()), rel=1e-5)
    goal = F.avg_pool2d(theirs[:, 1:].transpose(1, 2).reshape(3, 64, 8, 8), 2)
    goal = F.layer_norm(goal.permute(0, 2, 3, 1), (64,)).float()
    near = F.cosine_similarity(adapter(map_.float()).permute(0, 2, 3, 1), goal, dim=-1)
    assert found["hint"] == pytest.approx(float((1 - near).mean().detach()), rel=1e-5)


def test_a_cnns_map_is_its_last_and_cnn_teachers_are_refused():
    student, teacher, images = cnn().eval(), vit(1, image_size=64), randoms(2, 3, 64, 64)
    maps = Maps(student, teacher)
    student.encode_image(images)
    teacher.encode_image(images)
    last = student.visual.trunk.features(images)
    assert maps.channels == [576, 64] and maps.caught["student"].equal(last)
    assert all(map(torch.isfinite, maps.losses(torch.nn.Conv2d(576, 64, 1), 2).values()))
    assert as_map(randoms(2, 5, 5, 3)).shape == (2, 3, 5, 5)  # channels last, as in a Swin
    refused(lambda: Maps(student, student), "--hint")
    maps.catch("student", False, None, (), randoms(2, 65, 8))  # tokens, as inside a ViT of timm
    assert "student" not in maps.caught


def test_the_average_is_the_closed_form_skips_bad_steps_and_copies_integers():
    model = cnn()
    model.text_projection.requires_grad_(False)
    average, weight = Average(model, 0.9), model.visual.proj
    assert average.model.text_projection is model.text_projection  # what is frozen is shared
    norm, mine = (next(m for m in x.modules() if isinstance(m, torch.nn.BatchNorm2d))
                  for x in (model, average.model))
    expected = weight.detach().clone()
    for n in range(90):
        with torch.no_grad():
            weight.copy_(randoms(*weight.shape, seed=n))
            norm.running_mean.fill_(n)
            norm.num_batches_tracked.fill_(n)
        if n not in (3, 7):
            kept = min(0.9, (1 + n) / (10 + n))
            expected = kept * expected + (1 - kept) * weight.detach()
        average.update(n, torch.tensor(n not in (3, 7)))
    assert average.model.visual.proj.allclose(expected, atol=1e-6)  # its decay is fp32
    assert int(mine.num_batches_tracked) == 89 and 0 < float(mine.running_mean[0]) < 89


# -----------------------------------------------------------------------------
# The exact step

ALL = {"task": 0.25, "crd": 1.0, "fd": 8.0, "icl": 0.5, "ema": 0.4, "hint": 0.0, "attention": 0.0,
       "text_teacher": 0.3}


def takes_fp32(model):
    """A model in fp64 takes what `normalise` gives."""
    model.visual.register_forward_pre_hook(lambda _, x: (x[0].double(),))
    return model


class Scene:
    """A student in fp64, two teachers of widths 32 and 24 and a text teacher, n pairs."""

    def __init__(self, n=8, stored=False, frozen=False):
        self.student = takes_fp32(vit())
        self.average = takes_fp32(vit(5)).requires_grad_(False)
        self.heads, self.teachers, self.frozen = Heads(32, [32, 24]).double(), [], frozen
        for dim, scale in ((32, 20.0), (24, 50.0)):
            model = takes_fp32(vit(dim, embed_dim=dim)).requires_grad_(False)
            self.teachers.append(Teacher(f"t{dim}", "", "", dim, scale, LOOK, "linear", "", model))
        draw = torch.Generator().manual_seed(3)
        images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=draw)
        tokens = torch.randint(1, 40_000, (n, 6), generator=draw)
        tokens[:, 4] = 49_407                      # the end
        keys = [units(n, dim, dim) for dim in (32, 24)]
        answers = [units(n, dim, dim + 1) for dim in (32, 24)] if stored else None
        self.batch = Batch({LOOK: images}, None if frozen else tokens, keys, answers,
                           units(n, 5, 9))
        for name, p in self.student.named_parameters():
            p.requires_grad_(not frozen or name.startswith(("visual.", "logit_scale")))
        self.learner = types.SimpleNamespace(
            student=self.student, teachers=self.teachers, heads=self.heads, maps=None, counts=[n],
            average=types.SimpleNamespace(model=self.average),
            scaler=device.start("cpu", "fp32").scaler())

    def named(self):
        return {**dict(self.student.named_parameters()),
                **{f"heads.{name}": p for name, p in self.heads.named_parameters()}}

    def gradients(self):
        """Those that there are, which this clears."""
        found = {name: p.grad for name, p in self.named().items()
                 if p.grad is not None and p.grad.abs().max() > 0}
        for p in self.named().values():
            p.grad = None
        return found

    def step(self, micro, mix, given):
        self.learner.micro = micro
        found = add_gradient(device.start("cpu", "fp32"), self.learner, self.batch, mix, given, 5)
        return {name: x.detach() for name, x in found.items()}, self.gradients()

    def defined(self, mix, w):
        """Loss and gradients by the formulas, on whole matrices."""
        batch, eye = self.batch, torch.eye(len(self.batch.similar), dtype=DOUBLE)
        T = mix.share * eye + (1 - mix.share) * eye[Mix().partners(len(eye))]  # what i shows of j
        mixed = torch.einsum("ij,jchw->ichw", T, batch.images[LOOK].double())

        def look(model):
            mean, std = (torch.tensor(x, dtype=DOUBLE).view(3, 1, 1)
                         for x in (model.image_mean, model.image_std))
            return unit(model.encode_image((mixed / 255 - mean) / std))

        def text(model):
            return batch.q[0] if self.frozen else unit(model.encode_text(batch.tokens))

        def crossed(rows, columns, z):
            return (F.cross_entropy(z, rows) + F.cross_entropy(z.T, columns)) / 2

        def targets(t, p, q):
            return (t * p @ q.T).softmax(dim=1), (t * q @ p.T).softmax(dim=1)
        u, v = look(self.student), text(self.student)
        z, own = self.student.logit_scale.exp() * u @ v.T, self.heads.icl_scale.exp()
        told = [unit(T @ p) for p in batch.p] if batch.p else [
            look(teacher.model) for teacher in self.teachers]
        both = [targets(t.scale, p, q) for t, p, q in zip(self.teachers, told, batch.q)]
        alike = targets(10.0, unit(T @ batch.similar), batch.similar)
        old = targets(self.average.logit_scale.exp(), look(self.average), text(self.average))
        total = w["crd"] * crossed(*(sum(x) / 2 for x in zip(*both)), z) + w["task"] * (
            (1 - w["text_teacher"]) * crossed(T, T.T, z) + w["text_teacher"] * crossed(*alike, z)
        ) + w["ema"] * crossed(*old, z)
        for k in range(2):
            image, text = self.heads.image[k](u), self.heads.text[k](v)
            total = total + w["fd"] / 2 * (1 - F.cosine_similarity(image, told[k])).mean()
            if not self.frozen:
                total = total + w["fd"] / 2 * (1 - F.cosine_similarity(text, batch.q[k])).mean()
                total = total + w["icl"] / 4 * (
                    F.cross_entropy(own * unit(image) @ batch.q[k].T, T)
                    + F.cross_entropy(own * unit(text) @ told[k].T, T.T))
        total.backward()
        return total.detach(), self.gradients()


@pytest.mark.parametrize("frozen", [False, True], ids=["text trains", "text frozen"])
@pytest.mark.parametrize("stored", [False, True], ids=["live", "stored"])
@pytest.mark.parametrize("n, share", [(7, 1.0), (150, 0.7)])
def test_the_step_has_the_gradient_of_the_definition(n, share, stored, frozen, monkeypatch):
    """All losses on features, whole and in pieces; 150 rows of similarities come in two chunks."""
    monkeypatch.setattr(large_batch, "BLOCK", 1)
    given = {**ALL, "icl": 0.0} if frozen else ALL
    scene = Scene(n, stored, frozen)
    loss, truth = scene.defined(Mix(share), given)
    assert {"logit_scale", "visual.conv1.weight", "heads.image.1.weight"} <= set(truth)
    assert ("transformer.resblocks.0.ln_1.weight" in truth) is not frozen
    for micro in (n, 2 * n // 5):
        found, ours = scene.step(micro, Mix(share), given)
        assert float(found["loss"]) == pytest.approx(float(loss), rel=1e-6)
        assert set(ours) == set(truth)
        for name, x in truth.items():     # pixels are fp32
            assert (ours[name] - x).abs().max() < 1e-5 * x.abs().max(), name


def test_losses_inside_the_towers_join_the_gradient_once():
    scene = Scene(frozen=True)
    scene.learner.maps = Maps(scene.student, scene.teachers[0].model)
    scene.heads.hint = torch.nn.Conv2d(*scene.learner.maps.channels, 1)
    grads = {}
    for hint, attention in ((0, 0), (0.5, 0), (1, 0), (0, 1), (1, 1)):
        found, grads[hint, attention] = scene.step(
            100, Mix(0.7), {**ALL, "icl": 0.0, "hint": hint, "attention": attention})
        assert found["hint"] > 0.1 / 8 and found["attention"] > 1e-3 / 8
    name = "visual.transformer.resblocks.0.ln_1.weight"
    zero, half, hint, attention, both = (some[name] for some in grads.values())
    assert (hint - zero).abs().max() > 1e-3 and (attention - zero).abs().max() > 1e-5
    assert (2 * (half - zero)).allclose(hint - zero, atol=1e-6)
    assert (hint + attention - zero).allclose(both, atol=1e-6)
    assert "heads.hint.weight" in grads[1, 0] and "heads.hint.weight" not in grads[0, 0]


# -----------------------------------------------------------------------------
# What distillation is for

class Toy(torch.nn.Module):
    """Anything with `encode_image` learns: here 192 numbers that pass for 3 x 8 x 8 pixels."""
    image_mean, image_std, image_resize, image_interpolation = (0.5,) * 3, (0.25,) * 3, "", ""
    config = types.SimpleNamespace(image_size=8)

    def __init__(self, *layers):
        super().__init__()
        self.visual = torch.nn.Sequential(torch.nn.Flatten(), *layers)
        self.logit_scale = torch.nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, images, normalize=True):
        return unit(self.visual(images))


def test_a_student_learns_more_from_a_good_teacher_than_from_pairs_alone():
    """64 classes in noise, 256 pairs for the student; the teacher knows the classes."""
    draw, run, look = torch.Generator().manual_seed(0), device.start("cpu", "fp32"), (8, "", "")
    centres = torch.randn(64, 192, generator=draw)
    texts = unit(torch.randn(64, 32, generator=draw))

    def sample(n):
        labels = torch.randint(64, (n,), generator=draw)
        pixels = centres[labels] + 2.5 * torch.randn(n, 192, generator=draw)
        return (128 + 40 * pixels).clamp(0, 255).byte().view(n, 3, 8, 8), labels
    (images, labels), (test, truth) = sample(256), sample(2000)
    linear = torch.nn.Linear(192, 32, False)
    linear.weight.data = texts.T @ centres
    teacher = Teacher("toy", "", "", 32, 15.0, look, "linear", "", Toy(linear).requires_grad_(False))

    @torch.no_grad()
    def accuracy(model):
        features = model.encode_image(Mix().show(test, slice(None), model))
        return 100 * float(((features @ texts.T).argmax(1) == truth).float().mean())
    found = {}
    for name, given in {"task": {"task": 1}, "crd": {"crd": 1}, "fd": {"fd": 8},
                        "all": {"task": 0.25, "crd": 1, "fd": 8}}.items():
        torch.manual_seed(0)
        model = Toy(torch.nn.Linear(192, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32))
        learner = types.SimpleNamespace(student=model, teachers=[teacher], heads=Heads(32, [32]),
                                        maps=None, scaler=run.scaler(), counts=[128], micro=128)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for number in range(100):
            rows = torch.randint(256, (128,), generator=torch.Generator().manual_seed(number))
            batch = Batch({look: images[rows]}, None, [texts[labels[rows]]], None, None)
            optimizer.zero_grad()
            add_gradient(run, learner, batch, Mix(), {**dict.fromkeys(ALL, 0), **given}, number)
            optimizer.step()
        found[name] = accuracy(model)
    assert accuracy(teacher.model) > found["all"] > found["task"] + 10
    assert found["fd"] > found["task"] + 10 and found["crd"] > found["task"] + 5


def test_the_demo_learns(tmp_path):
    """Ten classes: chance is 10 %."""
    found = run_main("train_distill", "--max-steps", 30, "--workers", 0, "--device", "cpu",
                     "--log-every", 100, "--output-dir", tmp_path)
    assert found["zero_shot_demo_top1"] > 30 and found["teacher_zero_shot_demo_top1"] > 70
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 100e6


# -----------------------------------------------------------------------------
# Runs

@pytest.fixture(scope="module")
def school(tmp_path_factory):
    """24 + 12 drawn pairs of 32 x 32 pixels; two random teachers, the second of another width and
    image size; a BERT."""
    folder = tmp_path_factory.mktemp("school")
    scenes(folder / "pairs", 24, 12)
    for seed, (name, more) in enumerate({"teacher": {}, "second": {
            "embed_dim": 24, "image_size": 48}}.items()):
        model = perturb(tiny_clip(seed, **more), where=lambda name, p: name.startswith("visual."))
        weights.save(model, folder / f"{name}.safetensors")
    torch.manual_seed(0)
    bert = weights.load(image_tower="tiny-vit:none", text_tower="tiny-bert:none", embed_dim=32)
    (folder / "bert").mkdir()
    (folder / "bert" / "vocab.txt").write_text((folder / "pairs" / "vocab.txt").read_text())
    bert.vocabulary = open_tokenizer(folder / "bert").facts()
    weights.save(bert, folder / "bert" / "clip.safetensors")
    return folder


def flags(school, *more, but=()):
    """but: the flags that are not given."""
    given = {"--data": school / "pairs", "--teacher": school / "teacher.safetensors",
             "--model": "tiny-vit", "--batch-size": 8, "--epochs": 2, "--workers": 0, "--crop": 0.8,
             "--device": "cpu", "--log-every": 1}
    return with_defaults([pair for pair in given.items() if pair[0] not in but], more)


def distill(school, folder, *more):
    return run_main("train_distill", *flags(school, *more, "--output-dir", folder))


def losses(folder):
    return [row["loss"] for row in metrics(folder, "train")]


@pytest.fixture(scope="module")
def plain(school, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    return folder, distill(school, folder)


def test_a_student_has_its_teachers_text_tower_and_the_terms_add_up(plain, school):
    folder, found = plain
    assert found["steps"] == 6 and 0 <= found["mean_recall"] <= 100
    assert {"student_latency_ms", "teacher_latency_ms", "teacher_mean_recall", "scale",
            "student_image_parameters", "teacher_image_parameters"} <= set(results(folder))
    for row in metrics(folder, "train"):
        assert row["loss"] == pytest.approx(0.25 * row["task"] + row["crd"] + 8 * row["fd"], rel=1e-5)
    student, teacher = weights.load(folder), weights.load(school / "teacher.safetensors")
    stored = (folder / "checkpoint_best.pt").stat().st_size
    assert stored < (school / "teacher.safetensors").stat().st_size  # which holds the texts' tower
    tokens = torch.tensor([[49406, 320, 49407]])
    assert student.encode_text(tokens).equal(teacher.encode_text(tokens))   # frozen all along
    assert len(checkpoint(folder)["optimizer"]["state"]) == sum(
        name.startswith(("visual.", "logit_scale")) for name, _ in student.named_parameters())


SWITCHES = {
    "task": ["--task", "1"], "crd": ["--crd", "0"], "fd": ["--fd", "0"],
    "hint": ["--hint", "1"], "attention": ["--attention", "5"],
    "hint alone": ["--hint", "1", "--task", "0", "--crd", "0", "--fd", "0"],
    "text teacher": ["--text-teacher", "BERT"], "mixup": ["--mixup", "0.4"],
    "cutmix": ["--cutmix", "1"], "randaugment": ["--randaugment"], "crop": ["--crop", "0"],
    "two teachers": ["--teacher", "TEACHER", "SECOND"], "scale": ["--teacher-scale", "5"],
    "ema teacher": ["--ema", "0.9", "--ema-teacher", "0.5"], "text": ["--train-text"],
    "icl": ["--train-text", "--icl", "0"], "own text": ["--train-text", "tiny-vit:none"],
    "clip": ["--grad-clip", "0.1"], "wd": ["--wd", "1"], "seed": ["--seed", "2"],
    "warmup": ["--warmup", "2"]}


def test_everything_that_can_be_switched_on_changes_the_training(school, tmp_path):
    """The weights after three steps of each, and the losses that were logged."""
    names = {"BERT": school / "bert", "TEACHER": school / "teacher.safetensors",
             "SECOND": school / "second.safetensors"}
    moved, logged = {}, {}
    for what, more in {"nothing": [], **SWITCHES}.items():
        distill(school, tmp_path / what, *(names.get(x, x) for x in more), "--max-steps", 3)
        moved[what] = checkpoint(tmp_path / what)["weights"]["visual.conv1.weight"]
        assert all(map(math.isfinite, losses(tmp_path / what)))
        logged[what] = set(metrics(tmp_path / what, "train")[-1])
    for what, weight in moved.items():
        assert [other for other, x in moved.items() if weight.equal(x)] == [what]
    assert {"hint", "attention"} <= logged["hint"] & logged["attention"]
    assert "ema" in logged["ema teacher"] and "icl" in logged["text"]
    assert "icl" not in logged["icl"] | logged["nothing"] and "crd" not in logged["crd"]


@pytest.fixture(scope="module")
def everything(school, tmp_path_factory):
    """The flags of a run with all losses, and its folder."""
    more = ("--ema", 0.9, "--mixup", 0.4, "--train-text", "--ema-teacher", 0.3, "--randaugment",
            "--text-teacher", school / "bert", "--save-every", 2,
            "--teacher", school / "teacher.safetensors", school / "second.safetensors")
    folder = tmp_path_factory.mktemp("everything")
    distill(school, folder, *more)
    return more, folder


def test_resuming_is_exact_with_everything_on(school, everything, tmp_path):
    more, whole = everything
    assert after(lambda: at_step(5, die), distill, school, tmp_path, *more).code == 137
    distill(school, tmp_path, *more)
    same_run(whole, tmp_path, ("checkpoint_last.pt", "checkpoint_best.pt"))


def test_two_processes_compute_what_one_does(school, everything, tmp_path):
    """Of a run, and of a stored teacher. Uneven batches: test_distributed.py."""
    more, whole = everything

    def work(rank):
        distill(school, tmp_path / "two", *more, "--micro-batch", 2)
        reinforce(school, tmp_path / "stored2")
    for ended in processes(2, work):
        ended.ok()
    assert losses(tmp_path / "two") == pytest.approx(losses(whole), rel=1e-4)
    one, two = (checkpoint(folder) for folder in (whole, tmp_path / "two"))
    for part in ("weights", "heads", "ema"):
        assert max(float((x - two[part][name]).abs().max()) for name, x in one[part].items()) < 2e-4
    reinforce(school, tmp_path / "stored1")
    images = [Stored(tmp_path / name).images for name in ("stored1", "stored2")]
    assert (images[0] - images[1]).abs().max() < 1e-5


def test_a_bad_step_moves_neither_average_nor_batchnorm(school, tmp_path):
    """The last checkpoint, after a bad step, is the one before."""
    result = after(lambda: bad_steps(3), distill, school, tmp_path, "--model", "resnet18",
                   "--image-size", 32, "--ema", 0.9, "--max-steps", 3, "--save-every", 1)
    assert "step skipped" in result.ok().out
    before, last = (checkpoint(tmp_path, f"checkpoint_{name}.pt") for name in ("prev", "last"))
    assert (before["step"], last["step"]) == (2, 3)
    for part in ("weights", "buffers", "ema", "heads"):
        assert differences(before[part], last[part]) == [] and before[part]
    assert differences(*(x["optimizer"]["state"] for x in (before, last))) == []


def test_the_average_is_what_is_scored_and_loaded_and_scales_stay_in_bounds(school, tmp_path):
    more = ("--ema", 0.9, "--lr", 0.01, "--train-text", "--teacher",
            school / "teacher.safetensors", school / "second.safetensors")
    found = distill(school, tmp_path, *more)
    stored, student = checkpoint(tmp_path, "checkpoint_best.pt"), weights.load(tmp_path)
    assert student.visual.conv1.weight.equal(stored["ema"]["visual.conv1.weight"])
    assert not student.visual.conv1.weight.allclose(stored["weights"]["visual.conv1.weight"], atol=1e-4)
    assert found["scale"] == pytest.approx(float(stored["ema"]["logit_scale"].exp()), rel=1e-6)
    again = distill(school, tmp_path, *more, "--eval-only")
    for key in [key for key in found if re.search("_r\\d|scale|top1", key)]:
        assert again[key] == found[key]
    assert again["steps"] == stored["step"]
    *rows, last = metrics(tmp_path, "val")  # held-out pairs, which are tested too
    best = max(rows, key=lambda row: row["mean_recall"])["step"]
    assert found["tested_step"] == last["step"] == best < rows[-1]["step"]
    distill(school, tmp_path / "wild", "--train-text", "--lr", 20, "--max-steps", 2, "--warmup", 0)
    last = checkpoint(tmp_path / "wild")
    for scale in (last["weights"]["logit_scale"], last["heads"]["icl_scale"]):
        assert 0 <= float(scale) <= math.log(100) + 1e-6 and float(scale) in (
            0, pytest.approx(math.log(100)))


def test_every_tower_reads_captions_its_own_way(school, tmp_path):
    """Captions of 100 tokens; teachers that take 16, 77, and a BERT; a text teacher."""
    scenes(tmp_path / "pairs", 24, 12)
    table = tmp_path / "pairs" / "pairs.csv"
    table.write_text(table.read_text("utf-8").replace(" at the ", " at the " * 50))
    weights.save(tiny_clip(3, context_length=16), tmp_path / "short.safetensors")
    all_three = [tmp_path / "short.safetensors", school / "teacher.safetensors",
                 school / "bert" / "clip.safetensors"]
    more = ("--data", tmp_path / "pairs", "--text-teacher", school / "bert", "--max-steps", 1)
    for kind, named in (("bpe", all_three), ("wordpiece", all_three[::-1])):
        assert distill(school, tmp_path / kind, *more, "--teacher", *named)["steps"] == 1
        assert weights.load(tmp_path / kind).text_kind == kind
    refused(attempt("train_distill", *flags(school, "--teacher", *all_three, "--tokenizer",
                                            school / "bert", "--output-dir", tmp_path / "c")))


def test_what_a_teachers_file_leaves_open_is_said(tmp_path, capsys):
    torch.save(tiny_clip().state_dict(), tmp_path / "plain.pt")
    teachers.open_teachers(device.start("cpu", "fp32"), [tmp_path / "plain.pt"])
    assert "plain.pt: the file does not say its activation" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# A stored teacher

def reinforce(school, folder, *more):
    return run_main("tools.reinforce", *with_defaults([
        ("--data", school / "pairs"), ("--teacher", school / "teacher.safetensors"),
        ("--views", 3), ("--crop", 0.5), ("--workers", 0), ("--device", "cpu"),
        ("--output", folder)], more))


@pytest.fixture(scope="module")
def stored(school):
    reinforce(school, school / "stored", "--randaugment", "--teacher",
              school / "teacher.safetensors", school / "second.safetensors")
    return school / "stored"


def taught(school, folder, *more):
    return flags(school, "--reinforced", folder, *more, but=("--teacher", "--crop"))


def test_training_from_it_asks_no_teacher(school, stored, tmp_path):
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        real = CLIP.encode_image
        patch.setattr(CLIP, "encode_image", lambda self, images, normalize=False: (
            asked.append(len(images)), real(self, images, normalize))[1])
        found = run_main("train_distill", *taught(school, stored, "--output-dir", tmp_path))
    # One to see that the student takes images of that size; training; val twice, then as test; timing.
    assert sum(asked) == 1 + 6 * 8 + 12 * 3 + 12
    assert "teacher_mean_recall" not in found and len(found["teachers"]) == 2
    words = taught(school, stored)
    for more in (("--eval-only",), (*words, "--eval-only")):
        again = run_main("train_distill", *more, "--output-dir", tmp_path)
        assert again["mean_recall"] == found["mean_recall"]
    config = ("--config", tmp_path / "config.json")
    run_main("train_distill", *config, "--output-dir", tmp_path / "again")
    same_run(tmp_path, tmp_path / "again")
    refused(attempt("train_distill", *config, "--crop", 0.5), "--crop")


def test_a_stored_teacher_that_has_moved_is_named_by_where_it_lies_now(school, stored, tmp_path):
    """Its checkpoints name the file of the frozen text tower."""
    away = shutil.copytree(school, tmp_path / "school")
    held = json.loads((away / "stored" / "teacher.json").read_text())
    held["teachers"][0]["path"] = str(tmp_path / "gone.safetensors")
    facts = {key: x for key, x in held.items() if key != "sha256"}
    held["sha256"] = teachers.digest(away / "stored", facts)
    (away / "stored" / "teacher.json").write_text(json.dumps(held))
    run_main("train_distill", *taught(away, away / "stored", "--output-dir", tmp_path / "run"),
             "--teacher", away / "teacher.safetensors", "--max-steps", 2)
    assert weights.load(tmp_path / "run").origin["name"]


def test_what_is_stored_is_what_each_teacher_says_of_the_view_that_is_shown(school, stored):
    held, pairs, seen = Stored(stored), open_pairs(school / "pairs", "train"), set()
    assert held.images.shape == (3, 24, 56) and held.texts.shape == (48, 56)
    models = [weights.load(school / f"{name}.safetensors") for name in ("teacher", "second")]
    shown = ShownPairs(pairs, held.views([teacher.look for teacher in held.teachers]), 3, 1)
    loader = make_pair_loader(shown, 8, 1)
    for epoch in range(9):
        loader.batch_sampler.set_epoch(epoch)
        for images, used, _ in loader:
            seen |= {(shown.owner[c], shown.view(epoch, shown.owner[c])) for c in used.tolist()}
            for model, pixels, rows in zip(models, images, held.answers(shown, epoch, used)):
                with torch.no_grad():
                    own = model.encode_image(Mix().show(pixels, slice(0, 8), model), True)
                assert (own * rows).sum(dim=1).min() > 0.99999
    assert len(seen) > 60 and (held.images[0] - held.images[1]).abs().max() > 1e-3  # of 24 * 3
    for model, teacher in zip(models, held.teachers):
        with torch.no_grad():
            own = model.encode_text(for_model(model)(pairs.captions), normalize=True)
        assert (own - teacher.texts).abs().max() < 1e-5


def test_another_teacher_other_data_and_damage_are_refused(school, stored, tmp_path):
    out = ("--output-dir", tmp_path / "run")
    refused(attempt("train_distill", *taught(school, stored, *out), "--teacher",
                    school / "second.safetensors"), "frozen text tower")
    scenes(tmp_path / "pairs", 20, 4)
    refused(attempt("train_distill", *taught(school, stored, *out, "--data", tmp_path / "pairs")),
            "pairs")
    facts = {**json.loads((stored / "teacher.json").read_text()), "seed": 8}
    views = json.dumps({**facts, "sha256": teachers.digest(stored, facts)}).encode()

    def flipped(content):  # the sign of a number
        return content[:-9] + bytes([content[-9] ^ 128]) + content[-8:]
    for case, name, change in (
            ("cut", "images.npy", lambda content: content[:-500]), ("sign", "texts.npy", flipped),
            ("scale", "teacher.json", lambda x: re.sub(rb'("scale": )\d', rb"\g<1>9", x)),
            ("views", "teacher.json", lambda content: views)):
        shutil.copytree(stored, tmp_path / case)
        (tmp_path / case / name).write_bytes(change((stored / name).read_bytes()))
        refused(attempt("train_distill", *taught(school, tmp_path / case, *out)), case, "stored")
    refused(attempt("train_distill", *taught(school, tmp_path / "nowhere", *out)), "nowhere")
    refused(attempt("tools.reinforce", "--teacher", "tiny", "--output", stored), "--overwrite")
    assert not (tmp_path / "run").exists()


def test_an_image_that_cannot_be_read_has_no_answer_and_is_not_asked_for(school, tmp_path):
    scenes(tmp_path / "pairs", 24, 12)
    file = tmp_path / "pairs" / "5.png"
    whole = file.read_bytes()
    file.write_bytes(whole[:60])
    words = ("--data", tmp_path / "pairs")
    reinforce(school, tmp_path / "stored", *words)
    held = Stored(tmp_path / "stored")
    assert held.images.isnan().any(dim=2).all(dim=0).nonzero().tolist() == [[5]]
    words = taught(school, tmp_path / "stored", *words, "--cache-gb", 0, "--output-dir")
    assert run_main("train_distill", *words, tmp_path / "a")["steps"] == 6
    file.write_bytes(whole)   # it is there again, and nobody asked about it
    refused(attempt("train_distill", *words, tmp_path / "b"), "5.png")


# -----------------------------------------------------------------------------
# Students

@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18", "timm:mobileone_s0", "ViT-T/16"])
def test_students_of_other_families_learn_and_load(school, tmp_path, name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    found = distill(school, tmp_path, "--model", name, "--image-size", 32, "--max-steps", 2)
    assert found["model"] == name and found["student_image_parameters"] > 900_000
    student = weights.load(tmp_path)
    assert getattr(student.visual, "channels_first", False) == name.startswith("timm")
    assert student.encode_image(torch.zeros(1, 3, 32, 32)).shape == (1, 32)
    rows = losses(tmp_path)
    assert all(map(math.isfinite, rows)) and rows[0] != rows[1]


def test_batchnorm_of_a_short_training_is_not_that_of_the_start():
    """With torchvision's own momenta, 0.01 and 0.0003, students that learned scored at chance."""
    for name in ("mobilenet_v3_small", "mnasnet0_5"):
        assert min(m.momentum for m in cnn(name).modules()
                   if isinstance(m, torch.nn.BatchNorm2d)) >= 0.1


def test_a_student_goes_on_from_another_run(school, plain, tmp_path):
    folder, before = plain
    words = flags(school, "--lr", 1e-5, but=["--model"])
    assert run_main("train_distill", *words, "--weights", folder, "--output-dir", tmp_path / "a")[
        "model"] == "tiny-vit"
    assert losses(tmp_path / "a")[0] < 0.7 * losses(folder)[0]
    weights.save(tiny_clip(9), tmp_path / "other.safetensors")
    refused(attempt("train_distill", *words, "--weights", tmp_path / "other.safetensors",
                    "--output-dir", tmp_path / "b"), "--train-text")


# -----------------------------------------------------------------------------
# What is refused, and what tells runs apart

def test_wrong_command_lines_are_refused_in_one_line(school):
    for line, flag in {
            "--ema-teacher 0.3": "--ema", "--ema-teacher 0.9 --ema 0.9": "--ema-teacher",
            "--data x": "--teacher", "--crd -1": "--crd", "--task 0 --crd 0 --fd 0": "--task",
            "--reinforced x --hint 1": "--hint", "--reinforced x --crop 0.5": "--crop",
            "--weights x --model y": "--model", "--teacher-scale 0": "--teacher-scale",
            "--views 3": "tools.reinforce", "--max-text 9": "--max-text",
            "--text-teacher-weight 0.5": "--text-teacher", "--icl 1": "--train-text",
            "--teacher tiny --text-teacher x --task 0": "--text-teacher",
            "--accum-steps 2": "--micro-batch", "--batch-size 1": "--batch-size"}.items():
        refused(attempt("train_distill", *line.split()), flag)
    for more, flag in ((("--warmup", 6), "--warmup"), (("--batch-size", 30), "30"),
                       (("--hint", 1, "--micro-batch", 4), "--micro-batch"),
                       (("--teacher-scale", 5, 5), "--teacher-scale"),
                       (("--mixup", 1, "--batch-size", 7), "--mixup"),
                       (("--zero-shot", "nowhere"), "nowhere"),
                       (("--zero-shot", "demo", "demo"), "--zero-shot"),
                       (("--text-teacher", school / "nowhere"), "nowhere"),
                       (("--model", "timm:no_such_net"), "no_such_net"),
                       (("--model", "alexnet", "--image-size", 32), "--image-size"),
                       (("--export", "openai", "--model", "resnet18"), "openai")):
        out = school / "refused"
        refused(attempt("train_distill", *flags(school, *more, "--output-dir", out)), flag)
        assert not out.exists()


def test_another_vocabulary_teacher_or_piece_of_batchnorm_is_another_run(school, plain, tmp_path):
    folder, _ = plain
    for more in (("--crd", 2), ("--text-teacher", school / "bert"), ("--mixup", 0.1),
                 ("--teacher", school / "second.safetensors"), ("--train-text", "tiny-vit:none")):
        refused(attempt("train_distill", *flags(school, *more, "--output-dir", folder)),
                more[0].strip("-").replace("-", "_") if more[0] != "--teacher" else "teachers")
    attempt("train_distill", *flags(school, "--micro-batch", 3, "--output-dir", folder)).ok()
    words = flags(school, "--model", "resnet18", "--image-size", 32, "--max-steps", 1,
                  "--output-dir", tmp_path)
    attempt("train_distill", *words, "--micro-batch", 4).ok()
    refused(attempt("train_distill", *words, "--micro-batch", 2), "pieces")
