"""What all four scripts promise of a run, through the command line: one contract, four scripts.

How a run ends and goes on is in test_faults.py, several processes in test_distributed.py.
"""
import importlib
import json
import math
import modulefinder
import pathlib
import re
import shutil

import pytest
import torch

import weights
from helpers import (after, attempt, checkpoint, cli, differences, metrics, refused, results, ROOT,
                     run_folder, run_main, same_run, scenes, script, script_flags, SCRIPTS,
                     signal_at)

SCORES = {"train_clipfit": ["accuracy", "zero_shot_accuracy"], "train_staged": ["rows"]}
RETRIEVAL = ["i2t_r1", "t2i_r10", "mean_recall"]


@pytest.fixture(params=SCRIPTS)
def name(request):
    return request.param


@pytest.fixture
def flags(name, data):
    return script_flags(name, data, "--save-every", 2)


@pytest.fixture
def whole(name, whole_run):
    return whole_run(name)


def kept(folder):
    """The names of the checkpoints that a run leaves, without the predecessor of the last."""
    names = sorted(path.name for path in run_folder(folder).glob("checkpoint_*.pt"))
    return [file for file in names if "prev" not in file]


def scores(name, folder):
    return {key: results(folder)[key] for key in SCORES.get(name, RETRIEVAL)}


def test_a_dry_run_walks_the_whole_path_beside_the_run(name, flags, tmp_path):
    attempt(name, *flags, "--dry-run", "--output-dir", tmp_path / "run").ok()
    assert [path.name for path in tmp_path.iterdir()] == ["run_dry_run"]
    assert results(tmp_path / "run_dry_run")["method"]
    logged = metrics(run_folder(tmp_path / "run_dry_run"), "train")
    assert 0 < len(logged) < 6
    read = importlib.import_module(name).get_args  # its config.json asks for all
    words = [str(x) for x in (*flags, "--output-dir", tmp_path / "run")]
    asked, stored = (vars(read([*more, "--output-dir", str(tmp_path / "run")])) for more in (
        words, ["--config", str(tmp_path / "run_dry_run" / "config.json")]))
    assert {key: (x, stored[key]) for key, x in asked.items() if x is not None and
            x != stored[key]} == {}


def test_what_a_run_leaves(name, whole):
    left = {path.name for path in whole.rglob("*")}
    assert left >= {"config.json", "command.txt", "env.json", "log.txt", "metrics.jsonl",
                    "results.json", "checkpoint_last.pt"}
    assert not [file for file in left if file.endswith(".tmp")]
    assert {"method", "data", "model", "seconds", "peak_memory_mb", "device", "precision", "git",
            "samples_per_second", "processes", "torch"} <= set(results(whole))
    assert [] not in scores(name, whole).values()
    rows = metrics(run_folder(whole), "train")
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert [row["epoch"] for row in rows] == [1] * 3 + [2] * 3
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert {"lr", "samples_per_second", "data_wait", "memory_mb", "time"} <= set(rows[0])
    first, *said = (whole / "log.txt").read_text("utf-8").splitlines()
    assert first.startswith("device ")
    said = said if name != "train_staged" else (run_folder(whole) / "log.txt").read_text().splitlines()
    step = next(line for line in said if line.startswith("1/6  "))
    assert all(word in step for word in ("loss ", "lr ", "samples/s", "wait", "MB", "eta"))
    if name != "train_clipfit":
        assert "checkpoint_best.pt" in kept(whole)


def test_a_finished_run_is_not_run_again_and_another_is_refused(name, flags, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("checkpoint_*")}
    again = attempt(name, *flags, "--output-dir", whole).ok()
    assert "finished" in again.out
    refused(attempt(name, *flags, "--lr", 0.123, "--output-dir", whole), "lr", "--output-dir")
    refused(attempt(name, *flags, "--epochs", 9, "--output-dir", whole), "epochs", "--output-dir",
            "--weights")  # how to train on
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("checkpoint_*")} == before


def test_evaluation_alone_says_what_training_said_and_writes_nothing(name, whole):
    """The folder says what the run was trained on, and how."""
    def listing():
        return {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    before = listing()
    found = run_main(name, "--eval-only", "--output-dir", whole)
    assert {key: found[key] for key in scores(name, whole)} == scores(name, whole)
    assert listing() == before


def test_a_runs_config_runs_it_again(name, whole, tmp_path):
    attempt(name, "--config", whole / "config.json", "--output-dir", tmp_path).ok()
    same_run(run_folder(whole), run_folder(tmp_path), kept(whole))
    for key in ("accuracy", "mean_recall", "steps"):
        assert results(whole).get(key) == results(tmp_path).get(key), key


def test_a_checkpoint_goes_on_in_another_folder_with_its_best_weights(name, flags, whole, tmp_path):
    if name == "train_staged":
        pytest.skip("a plan goes on in its own folder; --from-stage takes a stage again")

    stopped = after(lambda: signal_at(4), script, name, *flags, "--output-dir", tmp_path / "first")
    assert stopped.code == 143
    attempt(name, *flags, "--resume", tmp_path / "first" / "checkpoint_last.pt",
            "--output-dir", tmp_path / "second").ok()
    assert kept(tmp_path / "second") == kept(whole)
    for file in kept(whole):
        ours, theirs = (checkpoint(x, file)["weights"] for x in (whole, tmp_path / "second"))
        assert differences(ours, theirs) == []


def test_weights_that_were_kept_for_their_scores_go_on_exactly_or_are_refused(name, flags, whole,
                                                                             tmp_path):
    best = run_folder(whole) / "checkpoint_best.pt"
    if not best.exists():
        pytest.skip("the last weights are tested")
    ended = attempt(name, *flags, "--resume", best, "--output-dir", tmp_path / "out")
    if ended.code:
        refused(ended, "--resume", "--weights")
        assert not (tmp_path / "out").exists()
    else:
        assert differences(*(checkpoint(x)["weights"] for x in (whole, tmp_path / "out"))) == []


def test_every_file_that_a_run_leaves_can_be_its_weights(name, flags, whole, tmp_path):
    """The checkpoints, an export, the folder: each loads, is inspected, and starts another run."""
    copied = shutil.copytree(whole, tmp_path / "run")
    for more in ((), ("--eval-only",)):  # the weights that are scored
        shutil.rmtree(copied / "export", ignore_errors=True)
        attempt(name, *flags, *more, "--export", "safetensors", "--output-dir", copied).ok()
        exported, scored = weights.load(*copied.rglob("*.safetensors")), weights.load(copied)
        assert differences(exported.state_dict(), scored.state_dict()) == []
    files = [*copied.rglob("*.pt"), *copied.rglob("*.safetensors")]
    assert len(files) >= 3
    for file in [*files, copied]:
        model = weights.load(file)
        assert all(torch.isfinite(p).all() for p in model.parameters()), file
    seen = cli("-m", "tools.convert", "inspect", files[0], "--json").ok()
    assert json.loads(seen.out)
    if name == "train_clipfit":
        stored = checkpoint(copied)["weights"]
        assert all(torch.equal(model.get_parameter(key), x) for key, x in stored.items())
    taken = "--model" if name == "train_distill" else "--weights"
    attempt(name, *flags, taken, copied, "--dry-run", "--output-dir", tmp_path / "next").ok()
    for file in files:
        file.unlink()
    refused(attempt(name, *flags, "--export", "safetensors", "--output-dir", copied))


REFUSED = [
    ("--epohcs", "3"), ("--epochs", "0"), ("--epochs", "many"), ("--lr", "nan"), ("--lr", "-1"),
    ("--batch-size", "0"), ("--seed", "-1"), ("--seed", str(2 ** 32)), ("--device", "tpu"),
    ("--device", "cuda:7"), ("--precision", "fp8"), ("--weights", "no/such/file.pt"),
    ("--weights", str(ROOT / "README.md")), ("--model", "ViT-Z/99"), ("--resume", "no_such.pt"),
    ("--config", "no_such.json"), ("--data", "no_such_data"), ("--workers", "-2"),
    ("--log-every", "0"), ("--export", "pickle"), ("--batch", "4"), ("--micro-batch", 20 * "9")]


@pytest.mark.parametrize("flag, value", REFUSED)
def test_a_wrong_command_line_is_one_line_before_any_work(name, flags, tmp_path, flag, value):
    if flag == "--weights" and name == "train_distill" or (
            flag == "--device" and torch.cuda.is_available()):
        pytest.skip("its students are named by --model; or the GPU is there")
    done = attempt(name, *flags, flag, value, "--output-dir", tmp_path / "out")
    refused(done, flag if flag.startswith(("--ep", "--lr", "--batch")) else value.split(":")[0])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content, said", [
    ('{"lr": 0.001, "bacth_size": 8}', "bacth_size"), ('{"tensorboard": "no"}', "tensorboard"),
    ('{"export": "pickle"}', "pickle"), ('{"dry_run": 1}', "dry_run"), ('{"lr": [0.1]}', "lr"),
    ('{"seed": ["x"]}', "seed"), ('{"workers": true}', "workers"), ('{"data": {}}', "data"),
    ('{"classes": ["Forest", "River", "--dry-run"]}', "classes"),  # an item of a list is no flag
    ('{"from": "init", "lr": 0.1}', "from"), ('{"zzz": 1, "identity": {}}', "zzz"), ("[]", "mine.json")])
def test_a_config_is_checked_like_the_flags_it_stands_for(name, tmp_path, content, said):
    (tmp_path / "mine.json").write_text(content)
    refused(attempt(name, "--config", tmp_path / "mine.json"), said)


def test_a_config_of_another_script_is_refused(name, tmp_path):
    for other in set(SCRIPTS) - {name}:
        asked = vars(importlib.import_module(other).get_args([]))
        (tmp_path / "a.json").write_text(json.dumps({**asked, "identity": {}}))
        refused(attempt(name, "--config", tmp_path / "a.json"), "a.json")


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "train_clipfit"])
def test_the_caption_of_an_unreadable_image_goes_with_it(name, flags, tmp_path):
    """One in a hundred is borne. Another pair takes its place, so that what its own caption says
    changes no loss."""
    losses = []
    for words in ("", "quite other "):
        folder, out = scenes(tmp_path / f"pairs{words}", 100, 12), tmp_path / f"run{words}"
        (folder / "5.png").write_bytes(b"no image")
        table = folder / "pairs.csv"
        table.write_text(re.sub(r'(?m)^(5\.png,"?)', rf"\g<1>{words}", table.read_text("utf-8")))
        done = attempt(name, *flags, "--data", folder, "--batch-size", 50, "--micro-batch", 0,
                       "--cache-gb", 0, "--output-dir", out).ok()
        assert len(re.findall("cannot be read: 1, e.g. .*5.png", done.out)) == 1
        losses.append([row["loss"] for row in metrics(run_folder(out), "train")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == 4


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "train_clipfit"])
@pytest.mark.parametrize("broken, cache", [([107, 109], 0), ([107, 109], 8), ([5, 50], 0),
                                           ([5, 50], 8)])
def test_unreadable_images_are_named_and_too_many_stop_a_run(name, flags, tmp_path, broken, cache):
    """Before it trains; only training images that are not kept decoded after an epoch, which is
    saved."""
    folder, out = scenes(tmp_path / "pairs", 100, 12), tmp_path / "run"
    lines = (folder / "pairs.csv").read_text("utf-8").splitlines()
    last = tuple(f"{i}.png" for i in range(106, 112))  # of val; they become test images
    (folder / "pairs.csv").write_text("\n".join(
        re.sub("val$", "test", line) if line.startswith(last) else line for line in lines))
    flags = [*flags, "--data", folder, "--batch-size", 50, "--micro-batch", 0, "--cache-gb", cache,
             "--output-dir", out]
    (folder / "108.png").write_bytes(b"no image")
    done = attempt(name, *flags, "--dry-run").ok()
    assert done.out.count("108.png (they do not decode)") == 1
    for i in broken:
        (folder / f"{i}.png").write_bytes(b"no image")
    refused(attempt(name, *flags), "5.png" if broken[0] == 5 else "test images", ".png")
    trained = [row for log in out.rglob("metrics.jsonl") for row in metrics(log.parent, "train")]
    late = broken[0] == 5 and not cache
    assert len(trained) == 2 * late
    assert not late or checkpoint(run_folder(out))["step"] == 2


def test_a_script_and_its_leaves_run_in_an_empty_folder(name, tmp_path):
    """The unit that people copy: the script, the leaves it imports, assets/."""
    finder = modulefinder.ModuleFinder([str(ROOT)])
    finder.run_script(str(ROOT / f"{name}.py"))
    files = [pathlib.Path(module.__file__) for module in finder.modules.values() if module.__file__]
    for file in files:
        shutil.copy(file, tmp_path)
    shutil.copytree(ROOT / "assets", tmp_path / "assets")
    done = cli(f"{name}.py", "--dry-run", "--workers", 0, cwd=tmp_path, env={"PYTHONPATH": None})
    assert "step" in done.ok().out
    assert not {file.stem for file in files} & {*SCRIPTS} - {name}


@pytest.mark.slow
def test_a_script_without_flags_shows_the_whole_job_and_leaves_little(name, tmp_path):
    cli(f"{name}.py", "--output-dir", tmp_path / "run", timeout=900).ok()
    assert results(tmp_path / "run")
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 100e6
