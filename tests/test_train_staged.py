"""train_staged: the recipe, plans and what is refused, chains of stages, resuming, forgetting and
what holds it, frozen towers. Its step is in test_train_contrastive.py."""
import colorsys
import dataclasses
import json
import math
import os
import pathlib
import shutil
import signal

import helpers
import pytest
import torch
from helpers import attempt, checkpoint, metrics, refused, results, run_main
from PIL import Image

import plans
import tokenizer
import train_staged
import weights
from clip_model import bert_fields, BertConfig, CLIP, CONFIGS
from plans import Stage
from train_staged import freeze, optimizer_groups

SCRIPT, ROOT = "train_staged", pathlib.Path(__file__).resolve().parent.parent


def weights_file(folder, dropout=0.1, words=None):
    """A CLIP of 0.1 M weights whose text tower is a BERT, as a file."""
    words = words or len(helpers.WORDS)
    text = BertConfig("bert", words, 32, 2, 2, 64, 64, dropout=dropout, attention_dropout=dropout)
    torch.manual_seed(0)
    model = CLIP(dataclasses.replace(CONFIGS["tiny-vit"], embed_dim=16, **bert_fields(text)))
    return weights.save(model, folder / "start.safetensors")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """48 drawn pictures and 24 held out, with two captions each, a vocabulary, and a tiny CLIP."""
    folder = helpers.scenes(tmp_path_factory.mktemp("staged") / "pairs", 48, 24)
    weights_file(folder)
    return folder


WARM = {"name": "warm", "matching": "red|yellow|white", "epochs": 2}
COLD = {"name": "cold", "matching": "green|blue|black", "epochs": 3}


def plan_file(path, *stages, **more):
    path.write_text(json.dumps({"stages": stages, **more}), "utf-8")
    return path


def flags(world, out, *more, plan=(WARM, COLD)):
    """The flags of a run with a plan: a file, or its stages, by default two of 6 steps of 8 pairs.
    One in `more` takes the place of its default."""
    if not isinstance(plan, pathlib.Path):
        plan = plan_file(out.parent / "plan.json", *plan)
    return helpers.with_defaults([
        ("--plan", plan), ("--data", world),
        ("--weights", world / "start.safetensors"), ("--tokenizer", world / "vocab.txt"),
        ("--batch-size", 8), ("--micro-batch", 3), ("--captions", "one"), ("--lr", 1e-3),
        ("--workers", 0), ("--device", "cpu"), ("--log-every", 1), ("--output-dir", out)], more)


@pytest.fixture(scope="module")
def two_stages(world, tmp_path_factory):
    """The folder of the plain run of both stages."""
    out = tmp_path_factory.mktemp("two") / "run"
    run_main(SCRIPT, *flags(world, out))
    return out


def state_of(path):
    return weights.load(path).state_dict()


def same_stages(one, other, names=("warm", "cold")):
    """Two runs of a plan hold the same bits, logs and matrix."""
    for name in names:
        files = [file.name for file in sorted((one / name).glob("*.pt"))]
        helpers.same_run(one / name, other / name, files)
    ours, theirs = (results(folder) for folder in (one, other))
    for row in (*ours["rows"], *theirs["rows"]):
        row["weights"] = pathlib.Path(row["weights"]).name
    for key in ("rows", "forgetting", "backward_transfer"):
        assert ours[key] == theirs[key], key


# -----------------------------------------------------------------------------
# The recipe

@pytest.fixture(scope="module")
def chinese():
    """Chinese-CLIP's B/16 without memory."""
    with torch.device("meta"):
        return CLIP(CONFIGS["CN-ViT-B/16"])


@pytest.mark.parametrize("rules, count", [
    ([], 351), (["logit_scale"], 350), (["visual"], 351 - 152), (["text"], 153),
    (["all_but_proj"], 3 - 1), (["*", "!bert.encoder.layer.1.*"], 16),
    (["visual", "!visual.proj"], 351 - 151),
    (["*.resblocks.[6-9].*", "*.resblocks.1?.*"], 351 - 6 * 12)])
def test_rules_of_freeze_are_read_in_order_and_every_group_keeps_its_share_of_the_rate(
        chinese, rules, count):
    """Frozen blocks above a parameter count too."""
    trainable = freeze(chinese, Stage(freeze=rules))
    assert all(p.requires_grad == (n in trainable) for n, p in chinese.named_parameters())
    rates = {}
    for group in optimizer_groups(chinese, Stage(lr=1.0, layer_decay=0.65, wd=0.3)):
        for p in group["params"]:
            rates[id(p)] = group["full_lr"], group["weight_decay"]
    assert len(rates) == len(trainable) == count
    for name, power in (("visual.proj", 0), ("text_projection", 0), ("visual.ln_post.weight", 0),
                        ("visual.transformer.resblocks.11.mlp.c_fc.weight", 1),
                        ("bert.encoder.layer.11.output.dense.weight", 1),
                        ("visual.transformer.resblocks.0.ln_1.weight", 12),
                        ("visual.conv1.weight", 13),
                        ("bert.embeddings.word_embeddings.weight", 13)):
        if name not in trainable:
            continue
        lr, wd = rates[id(trainable[name])]
        assert lr == pytest.approx(0.65 ** power), name
        assert wd == (0.3 if trainable[name].ndim > 1 else 0.0), name


def test_each_tower_counts_its_own_blocks():
    with torch.device("meta"):
        model = CLIP(dataclasses.replace(CONFIGS["tiny"], vision_layers=4, text_layers=2))
    freeze(model, Stage())
    rates = {id(p): group["full_lr"] for group in optimizer_groups(model, Stage(lr=1.0, layer_decay=0.5))
             for p in group["params"]}
    assert rates[id(model.visual.conv1.weight)] == 0.5 ** 5
    assert rates[id(model.token_embedding.weight)] == 0.5 ** 3


# -----------------------------------------------------------------------------
# Plans

def refused_unread(world, tmp_path, monkeypatch, plan, names, *more):
    """Exit code 2, one line, no image opened and no folder made -> the line."""
    monkeypatch.setattr(Image, "open", None)
    line = refused(attempt(SCRIPT, *flags(world, tmp_path / "run", *more, plan=plan)), *names)
    assert not (tmp_path / "run").exists()
    return line


@pytest.mark.parametrize("change, names", [
    ({"epochs": 0}, ["cold", "epochs"]), ({"warmup": 6}, ["cold", "warmup"]),
    ({"batch_size": 200}, ["cold", "batch_size"]), ({"freeze": ["visul.*"]}, ["visul"]),
    ({"freeze": ["visual", "text"]}, ["cold", "freeze"]), ({"freeze": "visual"}, ["freeze"]),
    ({"from": "cold"}, ["cold", "warm"]), ({"from": "warm:bst"}, ["warm:bst"]),
    ({"from": "warm:wise"}, ["wise"]), ({"replay": {"wrm": 0.1}}, ["wrm"]),
    ({"replay": {"warm": 0.95}}, ["replay"]), ({"replay": {"warm": 0.01}}, ["cold", "0 of the"]),
    ({"replay": 0.1}, ["replay"]), ({"wise": [2]}, ["wise"]), ({"matching": "purple"}, ["purple"]),
    ({"matching": "("}, ["matching"]), ({"positives": "all"}, ["positives", "multi"]),
    ({"lr": math.nan}, ["lr"]), ({"epoch": 2}, ["epochs"]),
    ({"augment": ["crop", "spin"]}, ["augment", "spin"]), ({"data": "no/such"}, ["no/such"]),
    ({"val": "no/val.csv"}, ["no/val.csv"]), ({"name": "Warm"}, ["Warm"]),
    ({"name": "a/b"}, ["a/b"]), ({"name": "Cache"}, ["Cache"]),
    *(({key: 1}, [key, "cold", instead]) for key, instead in plans.DROPPED.items())])
def test_a_stage_that_cannot_be_meant_is_refused_and_a_dropped_key_with_what_to_use(
        world, tmp_path, monkeypatch, change, names):
    refused_unread(world, tmp_path, monkeypatch, (WARM, {**COLD, **change}), names)


@pytest.mark.parametrize("content, name", [
    ('{"stages": [\n {"name": "a",, "epochs": 1}]}', "line 2"), ('{"stages": []}', "stages"),
    ("[1]", "stages"), ("", "plan.json"), ("[" * 100_000, "plan.json"),
    ('{"stages": [{"name": "a", "lr": 0.1, "lr": 0.2}]}', "lr"),
    ('{"stages": [{"name": "a"}], "weigths": "x"}', "weights"), ('{"stages": [{}]}', "stage 1"),
    ('{"stages": ["a"]}', "stage 1"), ('{"stages": "a"}', "stages"),
    ('{"stages": [{"name": "a"}], "defaults": {"wdd": 1}}', "defaults"),
    ('{"stages": [{"name": "a"}], "eval_sets": {"a": "b"}}', "eval_sets"),
    ('{"stages": [{"name": "a"}], "eval_sets": {"../b": "b"}}', "../b"),
    ('{"stages": [{"name": "a"}], "seed": -1}', "--seed")])
def test_a_wrong_plan_file_is_refused(world, tmp_path, monkeypatch, content, name):
    (tmp_path / "plan.json").write_text(content, "utf-8")
    refused_unread(world, tmp_path, monkeypatch, tmp_path / "plan.json", [name])


@pytest.mark.parametrize("more, name", [
    (["--from-stage", "hot"], "--from-stage"), (["--batch-size", 1], "--batch-size"),
    (["--text-data", "x"], "--caption-file"), (["--replay", "x"], "--plan"),
    (["--early-stop", 2], "--plan"),
    (["--tokenizer", "no.txt"], "no.txt"), (["--weights", "tiny"], "vocab.txt"),
    (["--export", "openai"], "openai"), (["--plan", "no.json"], "no.json"),
    (["--plan", ""], "--plan"), (["--model", "ViT-B/32"], "--model")])
def test_a_wrong_flag_is_refused(world, tmp_path, monkeypatch, more, name):
    refused_unread(world, tmp_path, monkeypatch, (WARM, COLD), [name], *more)


def test_a_run_without_a_clip_to_start_from_is_refused(world):
    assert "None" not in refused(attempt(SCRIPT, "--data", world), "--weights", "--model")


def test_keys_win_over_flags_and_flags_over_defaults(tmp_path):
    plan = plan_file(tmp_path / "plan.json", {"name": "a", "data": "x", "lr": 1e-3},
                     {"name": "b", "data": "x", "batch_size": 512}, weights="w.pt", max_text=20,
                     seed=7, defaults={"lr": 1e-4, "wd": 0.3, "epochs": 2, "freeze": ["text"]})
    args = train_staged.get_args(["--plan", str(plan), "--wd", "0.1", "--epochs", "9",
                                  "--seed", "8"])
    a, b = plans.read_stages(plans.read_plan(args), args)
    assert (a.lr, a.wd, a.epochs, a.batch_size, a.from_) == (1e-3, 0.1, 9, 128, "init")
    assert (b.lr, b.freeze, b.batch_size, b.from_) == (1e-4, ["text"], 512, "a")
    assert (args.weights, args.max_text, args.seed) == ("w.pt", 20, 8)
    args = train_staged.get_args("--train-data x.csv --val-data y.csv --context-length 52 --logs o "
                                 "--checkpoint c.pt --batch_size 256 --freeze visual text".split())
    one, = plans.read_stages(plans.read_plan(args), args)
    assert (one.name, one.data, one.val, one.lr) == ("tuned", "x.csv", "y.csv", 5e-5 / 4)
    assert (args.max_text, args.output_dir, args.weights) == (52, "o", "c.pt")
    assert one.freeze == ["visual", "text"]


def test_the_recipes_can_be_run(world, tmp_path, monkeypatch, capsys):
    """--check-plan says each stage in a line and reads no image; demo.json is the script's."""
    assert plans.DEMO.read_text() == (ROOT / "docs" / "recipes" / "demo.json").read_text()
    plan = json.loads((ROOT / "docs" / "recipes" / "chinese_clip.json").read_text("utf-8"))
    for stage in plan["stages"]:
        stage |= {"data": str(world), "batch_size": min(stage["batch_size"], 18), "warmup": 0.1}
    monkeypatch.setattr(Image, "open", None)
    result = run_main(
        SCRIPT, "--plan", plan_file(tmp_path / "plan.json", *plan.pop("stages"), **{
            **plan, "weights": str(world / "start.safetensors")}), "--check-plan",
        "--tokenizer", world / "vocab.txt", "--output-dir", tmp_path / "run")
    assert [stage["name"] for stage in result["stages"]] == ["muge", "flickr", "private"]
    assert all(stage["steps"] > stage["warmup"] for stage in result["stages"])
    assert "of 16 pairs, 2 of muge, 2 of flickr;" in capsys.readouterr().out
    args = train_staged.get_args(["--plan", str(ROOT / "docs" / "recipes" / "flickr8k_stages.json")])
    stages = plans.read_stages(plans.read_plan(args), args)
    assert [stage.from_ for stage in stages][3:] == ["english", "chinese_replay"]
    demo = run_main(SCRIPT, "--check-plan", "--output-dir", tmp_path / "run")
    assert [stage["name"] for stage in demo["stages"]] == ["land", "towns", "water"]
    assert not (tmp_path / "run").exists()


def test_named_held_out_data_leaves_all_else_to_training(world, tmp_path):
    """A table without splits is cut 80/10/10, but not where its val is named."""
    (tmp_path / "images").symlink_to(world)  # a split by name: of names that are always the same
    rows = ["image,caption", *(f"images/{i}.png,a red circle {i}" for i in range(72))]
    (tmp_path / "bare.csv").write_text("\n".join(rows))
    (tmp_path / "train.csv").write_text("\n".join([rows[0] + ",split", *(
        f"{row},train" for row in rows[1:])]))

    def check(**stage):
        return attempt(SCRIPT, *flags(world, tmp_path / "run", "--check-plan", plan=[
            {"name": "x", "epochs": 2, **stage}]))
    bare, train = str(tmp_path / "bare.csv"), str(tmp_path / "train.csv")
    assert "72 images" not in check(data=bare).ok().out
    assert "72 images" in check(data=bare, val=str(world)).ok().out
    (tmp_path / "some.csv").write_text("\n".join(rows[:31]))  # of the same images
    assert "30 images" in check(data=bare, val=str(tmp_path / "some.csv")).ok().out
    check(data=train, test=str(world)).ok()
    refused(check(data=train), "x", "test")
    refused(check(data=train, test=str(world), early_stop=2), "early_stop")


# -----------------------------------------------------------------------------
# A chain of stages, and one that was stopped

def test_a_stage_begins_with_the_best_of_the_one_before(world, two_stages):
    rows = {row["row"]: row["sets"] for row in results(two_stages)["rows"]}
    assert list(rows) == ["before", "warm", "cold"]
    for name, steps in (("warm", [0, 3, 6]), ("cold", [0, 2, 4, 6])):
        held = metrics(two_stages / name, f"{name} val")
        assert [row["step"] for row in held] == steps
        # val is also test here, so the best weights are those of the matrix
        assert rows[name][name]["mean_recall"] == max(row["mean_recall"] for row in held)
        stored = checkpoint(two_stages / name)
        assert stored["step"] == 6 and not stored["optimizer"]
    begun = metrics(two_stages / "cold", "cold val")[0]
    assert all(begun[key] == rows["warm"]["cold"][key] for key in train_staged.SCORES)
    identity = json.loads((two_stages / "cold" / "config.json").read_text())["identity"]
    assert identity["parent"] == weights.sha256_of(two_stages / "warm" / "checkpoint_best.pt")
    rates = [row["lr"] for row in metrics(two_stages / "warm", "train")]  # one of warm-up, cosine
    assert rates == pytest.approx([1e-3, *(5e-4 * (1 + math.cos(math.pi * i / 5))
                                           for i in range(5))])


def test_a_stage_stopped_before_its_results_finds_them_again(world, two_stages, tmp_path):
    """Its last checkpoint has no optimizer any more."""
    shutil.copytree(two_stages, tmp_path / "run")
    for folder in ("", "cold"):
        (tmp_path / "run" / folder / "results.json").unlink()
    found = run_main(SCRIPT, *flags(world, tmp_path / "run"))
    for row, before in zip(found["rows"], results(two_stages)["rows"], strict=True):
        assert row["sets"] == before["sets"]
    (tmp_path / "run/cold/results.json").write_text("{")
    (tmp_path / "run/results.json").unlink()
    refused(attempt(SCRIPT, *flags(world, tmp_path / "run")), "cold/results.json")


def test_what_a_run_leaves_beside_what_every_script_leaves(two_stages):
    found = results(two_stages)
    assert (two_stages / "plan.json").is_file()
    assert {*train_staged.SCORES, "image_ms", "text_ms"} <= set(found)
    assert found["judged_on"] == "cold"
    assert found["mean_recall"] == found["rows"][-1]["sets"]["cold"]["mean_recall"]
    assert f"| cold | {found['rows'][2]['sets']['warm']['r1']:.1f} [" in (
        two_stages / "matrix.md").read_text("utf-8")
    assert not list(two_stages.rglob("*_prev.pt"))
    for path in (two_stages, two_stages / "cold", two_stages / "cold" / "checkpoint_last.pt"):
        assert tokenizer.for_model(weights.load(path)).vocab_size == len(helpers.WORDS)


def test_a_finished_plan_is_checked_without_a_trace(world, two_stages):
    files = {path: path.read_bytes() for path in two_stages.rglob("*") if path.is_file()}
    checked = run_main(SCRIPT, *flags(world, two_stages, "--check-plan"))
    assert [stage["done"] for stage in checked["stages"]] == [True, True]
    assert files == {path: path.read_bytes() for path in two_stages.rglob("*") if path.is_file()}


def test_an_edited_plan_is_stale_until_trained_again(world, two_stages, tmp_path):
    """What is refused changes nothing, and the stage before stays as it is, bit for bit."""
    out = shutil.copytree(two_stages, tmp_path / "run")
    plan = WARM, {**COLD, "lr": 5e-4}
    kept = {path: path.read_bytes() for path in out.rglob("results.json")}
    edited = flags(world, out, plan=plan)
    refused(attempt(SCRIPT, *edited), "cold", "lr was 0.001", "--from-stage cold")
    refused(attempt(SCRIPT, *edited, "--check-plan"), "cold", "--from-stage cold")
    refused(attempt(SCRIPT, *flags(world, out, "--seed", 2, plan=plan)), "warm", "seed")
    assert {path: path.read_bytes() for path in out.rglob("results.json")} == kept
    found = run_main(SCRIPT, *edited, "--from-stage", "cold")
    assert max(row["lr"] for row in metrics(out / "cold", "train")) == 5e-4
    assert found == results(out)
    helpers.same_run(out / "warm", two_stages / "warm")
    assert run_main(SCRIPT, *edited) == found
    shutil.copy(out / "warm" / "checkpoint_last.pt", out / "warm" / "checkpoint_best.pt")
    refused(attempt(SCRIPT, *edited), "cold", "parent was")
    (out / "warm" / "checkpoint_best.pt").unlink()
    refused(attempt(SCRIPT, *edited), "warm", "checkpoint_best.pt", "--from-stage warm")


def test_stages_in_another_order_are_scored_again_and_not_trained_again(world, tmp_path):
    stages, times, found = [{**stage, "from": "init", "epochs": 1} for stage in (WARM, COLD)], [], []
    for some in (stages, stages[::-1]):
        found.append(run_main(SCRIPT, *flags(world, tmp_path / "run", plan=some)))
        times.append({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.pt")})
    assert [[row["row"] for row in x["rows"]] for x in found] == [
        ["before", "warm", "cold"], ["before", "cold", "warm"]]
    assert [x["judged_on"] for x in found] == ["cold", "warm"] and times[0] == times[1]
    assert results(tmp_path / "run")["weights"] == "warm/checkpoint_best.pt"


def test_a_stage_more_of_another_runs_config_is_trained_on_top_of_finished_ones(
        world, two_stages, tmp_path):
    first = run_main(SCRIPT, *flags(world, tmp_path / "run", plan=[WARM]))
    assert [row["row"] for row in first["rows"]] == ["before", "warm"]
    run_main(SCRIPT, "--config", two_stages / "config.json", "--output-dir", tmp_path / "run",
             "--plan", two_stages / "plan.json")
    same_stages(two_stages, tmp_path / "run")


def test_one_command_a_stage_in_the_flags_of_chinese_clips_trainer(world, tmp_path):
    """Each takes the folder of the one before as its --checkpoint."""
    def command(name, start, *more):
        return run_main(SCRIPT, "--train-data", world, "--val-data", world, "--checkpoint", start,
                        "--context-length", 12, "--batch-size", 8, "--epochs", 1, "--lr", "1e-3",
                        "--wd", 0.2, "--warmup", 2, "--workers", 0, "--precision", "fp32",
                        "--logs", tmp_path / name, *more)
    first = command("one", world / "start.safetensors", "--tokenizer", world / "vocab.txt")
    second = command("two", tmp_path / "one", "--export", "safetensors")
    assert second["rows"][0]["sets"]["tuned"] == first["rows"][1]["sets"]["tuned"]
    exported, best = (state_of(tmp_path / "two" / name) for name in (
        "export/clip.safetensors", "tuned/checkpoint_best.pt"))
    assert helpers.differences(exported, best) == []


def test_eval_only_scores_what_there_is(world, two_stages, tmp_path):
    found = run_main(SCRIPT, *flags(world, tmp_path / "run", "--eval-only"))
    assert found["rows"] == results(two_stages)["rows"][:1] and not (tmp_path / "run").exists()
    found = run_main(SCRIPT, *flags(world, two_stages, "--eval-only"))
    assert found["rows"] == results(two_stages)["rows"]
    other = flags(world, two_stages, "--eval-only", "--weights", two_stages / "warm")
    refused(attempt(SCRIPT, *other), "weights was")


RICH = [{**WARM, "augment": ["crop", "flip"], "wise": [0.3, 0.7], "early_stop": 4},
        {**COLD, "augment": ["crop"], "replay": {"warm": 0.25}, "freeze": ["visual.conv1.*"],
         "layer_decay": 0.8, "recompute": 1}]


@pytest.fixture(scope="module")
def rich(world, tmp_path_factory):
    """The folder of a plan with augmentation, dropout, replay and more, saved in every step."""
    out = tmp_path_factory.mktemp("rich") / "run"
    run_main(SCRIPT, *flags(world, out, "--save-every", 1, plan=RICH))
    return out


@pytest.mark.parametrize("plant, code", [
    (lambda: helpers.at_call(os, "fsync", 17, helpers.die), 137),
    (lambda: helpers.at_call(os, "replace", 31, helpers.die), 137),  # in the second stage, as here:
    (lambda: helpers.signal_at(8), 143)])
def test_stopped_at_any_moment_the_same_command_gives_the_same_bits(
        world, rich, tmp_path, plant, code):
    command = flags(world, tmp_path / "run", "--save-every", 1, plan=RICH)
    assert helpers.after(plant, helpers.script, SCRIPT, *command).code == code
    run_main(SCRIPT, *command)
    same_stages(rich, tmp_path / "run")


# -----------------------------------------------------------------------------
# What is forgotten, and what holds it

def two_domains(folder):
    """12 colours and 12 places of a bar, each with a word for a caption."""
    folder.mkdir()
    for i in range(12):
        hue = tuple(int(255 * x) for x in colorsys.hsv_to_rgb(i / 12, 1, 1))
        Image.new("RGB", (32, 32), hue).save(folder / f"c{i}.png")
        bar, (x, y) = Image.new("RGB", (32, 32)), (8 * (i % 4), 10 * (i // 4))
        bar.paste("white", (x, y, x + 8, y + 10))
        bar.save(folder / f"b{i}.png")
    words = {name: [f"{name[0]}{i}" for i in range(12)] for name in ("colours", "bars")}
    for name, some in (*words.items(), ("five", words["colours"][:5])):
        (folder / f"{name}.csv").write_text("image,caption,split\n" + "".join(
            f"{word}.png,{word},{split}\n" for split in ("train", "val") for word in some))
    vocabulary = [*helpers.WORDS[:4], *words["colours"], *words["bars"]]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    model = weights.load(weights_file(folder, 0.0, len(vocabulary)))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.startswith("bert.") and p.ndim > 1:
                p.normal_(0, 0.18, generator=torch.Generator().manual_seed(len(name)))
    weights.save(model, folder / "start.safetensors")
    return folder


@pytest.fixture(scope="module")
def forgetting(tmp_path_factory):
    """Colours by heart, then bars, with nothing and with half of each batch replayed; the first
    stage is trained once -> the folder and {name: results}"""
    folder, found = tmp_path_factory.mktemp("forgetting"), {}
    data = two_domains(folder / "pairs")
    for name, more in (("plain", {"wise": [0, 0.5, 1]}),
                       ("replayed", {"replay": {"colours": 0.5}})):
        plan = plan_file(
            folder / f"{name}.json", {"name": "colours", "data": f"{data}/colours.csv"},
            {"name": "bars", "data": f"{data}/bars.csv", **more},
            eval_sets={"five": f"{data}/five.csv"})
        found[name] = run_main(SCRIPT, *flags(
            data, folder / name, "--epochs", 40, "--batch-size", 12, "--micro-batch", 0, "--lr",
            1.5e-3, "--wd", 0, "--log-every", 100, plan=plan))
        if name == "plain":
            shutil.copytree(folder / "plain" / "colours", folder / "replayed" / "colours")
    return folder, found


def test_pairs_are_learned_by_heart_and_then_forgotten_and_with_replay_less(forgetting):
    folder, found = forgetting
    rows = {row["row"]: row["sets"] for row in found["plain"]["rows"]}
    assert rows["before"]["colours"]["r1"] < 30
    for name, images in (("colours", 12), ("five", 5)):  # five: fewer than a batch, yet 100 %
        assert rows["colours"][name]["mean_recall"] == 100
        assert rows["colours"][name]["images"] == images
    assert rows["bars"]["bars"]["r1"] > 50
    lost = {name: result["forgetting"]["colours"] for name, result in found.items()}
    assert lost["plain"] > 40 and lost["replayed"] < lost["plain"] / 4


def test_the_matrix_and_its_sums_are_those_by_hand(forgetting):
    found = forgetting[1]["plain"]
    assert [(row["row"], row["stage"], row["kind"]) for row in found["rows"]] == [
        ("before", None, "before"), ("colours", "colours", "best"), ("bars", "bars", "best"),
        ("bars wise", "bars", "wise")]
    r1 = {row["row"]: {name: x["r1"] for name, x in row["sets"].items()} for row in found["rows"]}
    for row in found["rows"]:
        for x in row["sets"].values():
            assert x["r1"] == pytest.approx((x["i2t_r1"] + x["t2i_r1"]) / 2)
            low, high = x["interval"]["r1"]
            assert low <= x["r1"] <= high
    for name in ("colours", "bars", "five"):
        assert found["forgetting"][name] == max(
            r1[row][name] for row in ("before", "colours", "bars")) - r1["bars"][name]
    assert found["backward_transfer"] == r1["bars"]["colours"] - r1["colours"]["colours"]
    assert found["weights"] == "bars/checkpoint_best.pt"


def test_the_mean_with_the_start_is_the_best_on_held_out_pairs_so_far(forgetting):
    folder, found = forgetting
    means = found["plain"]["stages"]["bars"]["wise"]
    rows = {row["row"]: row["sets"] for row in found["plain"]["rows"]}
    for share, label in (("0", "colours"), ("1", "bars")):  # here val is also test
        assert means[share] == pytest.approx(sum(
            rows[label][name]["mean_recall"] for name in ("colours", "bars")) / 2, abs=1e-3)
    best = max(means, key=means.get)
    start, end, mixed = (state_of(folder / "plain" / path) for path in (
        "colours/checkpoint_best.pt", "bars/checkpoint_best.pt", "bars/wise_best.pt"))
    for name, x in mixed.items():
        wanted = (1 - float(best)) * start[name].double() + float(best) * end[name].double()
        assert (x.double() - wanted).abs().max() < 1e-6, name


def test_a_stage_that_only_harms_ends_with_what_it_began_with(world, tmp_path, monkeypatch):
    plan = [{**WARM, "epochs": 9, "early_stop": 2, "warmup": 0}]
    judged, real = [], train_staged.evaluate
    monkeypatch.setattr(train_staged, "evaluate", lambda *of, **how: (
        judged.append(1) or real(*of, **how)))
    found = run_main(SCRIPT, *flags(world, tmp_path / "run", "--lr", 0.9, plan=plan))
    held = metrics(tmp_path / "run" / "warm", "warm val")
    best = max(held, key=lambda row: row["mean_recall"])  # the first of them
    stage = found["stages"]["warm"]
    assert stage["best_step"] == best["step"] and stage["start_score"] == held[0]["mean_recall"]
    assert len(held) == 3 + held.index(best) < 10
    command = flags(world, tmp_path / "again", "--lr", 0.9, plan=plan)

    def fault():  # in the evaluation that ends the stage: the last is that of the test set
        helpers.at_call(train_staged, "evaluate", len(judged) - 1, lambda: signal.raise_signal(
            signal.SIGTERM))
    assert helpers.after(fault, helpers.script, SCRIPT, *command).code == 143
    assert run_main(SCRIPT, *command)["stages"]["warm"]["best_step"] == stage["best_step"]
    if best["step"] == 0:
        start, kept = (state_of(path) for path in (
            world / "start.safetensors", tmp_path / "run" / "warm" / "checkpoint_best.pt"))
        assert helpers.differences(start, kept) == []


# -----------------------------------------------------------------------------
# Frozen parts

IMAGE, TEXT = "encode_image", "encode_text"


@pytest.mark.parametrize("frozen, augment, idle", [
    (["visual", "text", "!visual.proj", "!text_projection"], [], {IMAGE, TEXT}),
    (["visual"], [], {IMAGE}), (["text"], [], {TEXT}), (["visual"], ["crop"], set())])
def test_what_a_frozen_tower_gives_is_kept_and_trains_as_computing_it_does(
        world, tmp_path, monkeypatch, frozen, augment, idle):
    """What is kept does not run in a step; where images vary, they are not kept. One is lost."""
    folder, steps, found = shutil.copytree(world, tmp_path / "pairs"), set(), {}
    weights_file(folder, dropout=0.0)
    (folder / "7.png").write_bytes((folder / "7.png").read_bytes()[:60])
    for name in (IMAGE, TEXT):
        def counted(self, *args, name=name, encode=getattr(CLIP, name), **options):
            if torch.is_grad_enabled():
                steps.add(name)
            return encode(self, *args, **options)
        monkeypatch.setattr(CLIP, name, counted)
    plan = [{"name": "x", "epochs": 3, "freeze": frozen, "augment": augment}]
    for name in ("kept", "anew"):
        steps.clear()
        run_main(SCRIPT, *flags(folder, tmp_path / name, "--micro-batch", 0, plan=plan))
        assert steps == {IMAGE, TEXT} - (idle if name == "kept" else set())
        monkeypatch.setattr(train_staged, "keep_frozen", lambda *args: (*args[3:5], None))
        found[name] = state_of(tmp_path / name / "x" / "checkpoint_last.pt")
    start = state_of(folder / "start.safetensors")
    for name, x in found["kept"].items():
        assert (x - found["anew"][name]).abs().max() < 1e-4, name
        if idle == {IMAGE, TEXT}:
            moves = name in ("visual.proj", "text_projection", "logit_scale")
            assert torch.equal(x, start[name]) != moves, name
    for key, kind in (("loss", "train"), ("mean_recall", "x val")):
        rows = [[row[key] for row in metrics(tmp_path / name / "x", kind)] for name in found]
        assert rows[0] and rows[0] == pytest.approx(rows[1], rel=1e-3), kind


def test_batch_norm_keeps_its_statistics_and_only_what_trains_is_saved(tmp_path):
    folder = helpers.scenes(tmp_path / "pairs", 24, 12)
    start = weights.save(helpers.tiny_clip(config="tiny-rn"), tmp_path / "rn.safetensors")
    plan = plan_file(tmp_path / "plan.json", {"name": "a", "freeze": ["text"], "epochs": 1},
                     {"name": "b", "freeze": ["visual"], "epochs": 1})
    out = tmp_path / "run"
    run_main(SCRIPT, "--plan", plan, "--data", folder, "--weights", start, "--batch-size", 8,
             "--workers", 0, "--lr", 1e-3, "--output-dir", out)
    first, a, b = (state_of(path) for path in (
        start, out / "a" / "checkpoint_last.pt", out / "b" / "checkpoint_last.pt"))
    for name, x in first.items():
        if "running_" in name:
            assert torch.equal(x, b[name]), name
    assert not torch.equal(first["visual.conv1.weight"], a["visual.conv1.weight"])
    assert not torch.equal(first["text_projection"], b["text_projection"])
    assert torch.equal(first["text_projection"], a["text_projection"])
    assert "text_projection" not in checkpoint(out / "a")["weights"]
    assert "visual.conv1.weight" in checkpoint(out / "b")["weights"]  # of its parent
