"""What goes wrong around a run, and the answer: one table of faults, for all scripts.

Faults are real where they can be: processes die, disks fill, signals arrive. A fork of this process
stands for a run started from a shell: the same code and exit codes, without seconds of importing.
What device.py answers alone is in test_device.py, what needs several processes in
test_distributed.py, wrong flags in test_scripts.py.
"""
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest
import torch

import device
import train_clipfit  # here: who is not root may not read what it imports
from helpers import (after, at_call, at_step, bad_steps, checkpoint, class_folder, cli, die,
                     in_child, metrics, Payload, refused, results, ROOT, run_folder, same_run,
                     script, script_data, script_flags, SCRIPTS, signal_at, skipped)

NAMES = [name.removeprefix("train_") for name in SCRIPTS]


def flags(name, data, out, *more):
    return script_flags(name, data, "--save-every", 2, *more, "--output-dir", out)


def meets(fault, name, data, out, *more):
    """The run that meets `fault()` in a process of its own -> Result"""
    return after(fault, script, f"train_{name}", *flags(name, data, out, *more))


def one_line(result, code, *words):
    """The exit code, and a last line that says why; no traceback. (Both streams are in `out`.)"""
    line = result.out.splitlines()[-1]
    assert result.code == code and "Traceback" not in result.out, result.out[-3000:]
    assert line.startswith("error: ") and all(word in line for word in words), line


def signal_after_the_last_step():
    real = device.Run.save_training

    def save(run, at, *rest, **more):
        if at.step == at.steps:
            signal.raise_signal(signal.SIGINT)
        return real(run, at, *rest, **more)
    device.Run.save_training = save


# -----------------------------------------------------------------------------
# Ends that come from outside

def disk_fills():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))


FAULTS = {  # what happens -> the exit code, and words of the last line
    "killed in a step": (lambda: at_step(3, die), 137),
    "SIGTERM in an epoch": (lambda: signal_at(4), 143, "--resume auto"),
    "a closed terminal": (lambda: signal_at(4, signal.SIGHUP), 129, "--resume auto"),
    "Ctrl-C at an epoch's end": (lambda: signal_at(3, signal.SIGINT), 130, "--resume auto"),
    "Ctrl-C after the last step": (signal_after_the_last_step, 130, "--resume auto"),
    "SIGTERM at the end": (lambda: at_call(device.Run, "finish", 1, lambda: signal.raise_signal(
        signal.SIGTERM)), 143, "--resume auto"),
    "a full disk": (lambda: at_step(5, disk_fills), 3, "checkpoint", "MB are free", "intact"),
    "no memory": (lambda: at_step(5, lambda: torch.empty(2 ** 50)), 3, "--micro-batch", "intact")}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_that_was_ended_goes_on_to_the_same_bits(name, fault, data, whole_run, tmp_path):
    happens, code, *words = FAULTS[fault]
    result = meets(happens, name, data, tmp_path / "run")
    assert result.code == code
    if words:
        one_line(result, code, *words)
    if code == 3:
        assert checkpoint(run_folder(tmp_path / "run"))["step"] == 4
    in_child(script, f"train_{name}", *flags(name, data, tmp_path / "run")).ok()
    same_run(run_folder(whole_run(name)), run_folder(tmp_path / "run"))
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_disk_that_fills_while_a_teacher_is_stored(data, tmp_path):
    result = after(disk_fills, script, "tools.reinforce", "--teacher", data / "start.safetensors",
                   "--data", data / "pairs", "--output", tmp_path / "stored", "--views", 30)
    one_line(result, 3, "images.npy")


def test_a_stop_of_the_whole_group_is_answered_after_a_checkpoint(data, tmp_path):
    def stopped():  # from outside, as `timeout` does: workers tell their parent's signals apart
        os.setsid()
        at_step(4, lambda: os.system(f"trap '' TERM; kill -TERM -{os.getpgrp()}; sleep 1"))
    result = meets(stopped, "contrastive", data, tmp_path / "run", "--workers", 2, "--cache-gb", 0)
    one_line(result, 143, "--resume auto")
    assert checkpoint(tmp_path / "run")["step"] == 4


def test_images_that_cannot_be_read_end_a_run_whose_workers_read_them(tmp_path):
    """In a process of its own: it would wait for the workers as it ends."""
    pairs = script_data(tmp_path) / "pairs"
    for i in range(3):
        (pairs / f"{i}.png").write_bytes(b"no picture")
    done = cli("train_contrastive.py", *flags(
        "contrastive", tmp_path, tmp_path / "run", "--workers", 1, "--cache-gb", 0), timeout=120)
    refused(done, "1 %")
    assert checkpoint(tmp_path / "run")["epoch"] == 1


# -----------------------------------------------------------------------------
# Numbers and files that are not what they were

@pytest.mark.parametrize("name", NAMES)
def test_bad_steps_are_skipped_and_their_images_named_until_the_third_in_a_row(name, data, tmp_path):
    """AdamW has counted the good steps only (test_device.py compares bit for bit)."""
    result = meets(lambda: bad_steps(2, 4, 5, 6), name, data, tmp_path / "run")
    one_line(result, 3, ".png", "intact", "--lr")
    folder = run_folder(tmp_path / "run")
    assert [".png" in line for line in skipped(folder)] == [True] * 3
    stored = checkpoint(folder)
    assert stored["step"] == 4 and all(x.isfinite().all() for x in stored["weights"].values())
    moments = stored["optimizer"].get("state", {}).values()
    assert {x["step"].item() for x in moments if "step" in x} <= {2.0}, "two good steps"


@pytest.mark.parametrize("name", NAMES)
def test_code_in_a_file_is_refused_by_every_flag_that_reads_one(name, data, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "bad.pt"
    torch.save({"weights": {"x": torch.ones(1)}, "step": 1, "x": Payload(canary)}, path)
    for flag in {"distill": ("--resume", "--teacher", "--tokenizer"),
                 "staged": ("--weights", "--tokenizer")}.get(
                     name, ("--resume", "--weights", "--tokenizer")):
        result = in_child(script, f"train_{name}", *flags(name, data, tmp_path / "out", flag, path))
        one_line(result, 2, path.name)
    assert not canary.exists() and not (tmp_path / "out" / "checkpoint_last.pt").exists()


@pytest.mark.parametrize("name", NAMES)
def test_another_method_and_data_that_changed_are_refused(name, data, whole_run, tmp_path):
    folder, advice = whole_run(name), "--from-stage" if name == "staged" else "--output-dir"
    result = in_child(script, f"train_{name}", *flags(name, data, folder, "--resume", "none"))
    one_line(result, 2, "--overwrite", "--output-dir")
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    changed = copy / ("classes/train/red/9.png" if name == "clipfit" else "pairs/pairs.csv")
    changed.write_bytes((copy / "pairs/1.png").read_bytes() if name == "clipfit" else
                        changed.read_bytes() + b"1.png,a new caption,train\n")
    result = in_child(script, f"train_{name}", *flags(name, copy, folder))
    one_line(result, 2, "data", advice)
    assert not re.search("[0-9a-f]{20}", result.err)  # a few digits tell two fingerprints apart
    other = "contrastive" if name != "contrastive" else "clipfit"
    result = in_child(script, f"train_{other}", *flags(other, data, folder))
    one_line(result, 2, "method", "--weights", "--output-dir")


# -----------------------------------------------------------------------------
# Surroundings

def test_a_hostile_environment_changes_nothing(data, tmp_path):
    """`| head -1`, no stdin, a C locale with Chinese class names, no home, and no TMPDIR."""
    class_folder(tmp_path / "图片", ("红色_a", "it's \"green\"", "голубой"))
    out, environment = tmp_path / "运行", {
        "PATH": os.path.dirname(shutil.which("head")), "LC_ALL": "C", "TERM": "dumb",
        "TMPDIR": "/nowhere", "OMP_NUM_THREADS": "1"}
    given = flags("clipfit", data, out, "--data", tmp_path / "图片", "--workers", 2)
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" <&- | head -1', "bash", sys.executable,
         ROOT / "train_clipfit.py", *given], env=environment, cwd=tmp_path, text=True,
        capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith("device ") and done.stdout.count("\n") == 1
    assert results(out)["steps"] == 6 and len(metrics(out, "train")) == 6
    assert "红色" in (out / "per_class_test.csv").read_text("utf-8")


def test_home_and_variables_are_expanded_in_path_flags(data, whole_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PICTURES", str(data / "classes"))
    monkeypatch.chdir(tmp_path)
    given = ("--data", "$PICTURES", "--output-dir", "~/runs/a")
    in_child(script, "train_clipfit", *script_flags("clipfit", data, *given)).ok()
    same_run(whole_run("clipfit"), tmp_path / "runs" / "a", but=("timed", "identity", "card"))
    result = in_child(script, "train_clipfit", "--config", "~/runs/a/config.json")
    assert result.code == 0 and "finished" in result.out and not (tmp_path / "~").exists()


def test_a_folder_that_may_not_be_entered_and_a_missing_home_are_named(data, monkeypatch):
    if os.geteuid():
        pytest.skip("only root can become another user")
    monkeypatch.delenv("HOME", raising=False)
    with tempfile.TemporaryDirectory() as folder:  # not below tmp_path, which only we may enter
        folder = pathlib.Path(folder)
        folder.chmod(0o777)
        class_folder(folder / "set")
        (folder / "set/train/red").chmod(0)

        def work(*more):
            os.setuid(54_321)  # as a container runs whom its system does not know
            return script(train_clipfit, *script_flags("clipfit", data, "--weights", "tiny", *more))
        result = in_child(work, "--data", folder / "set", "--output-dir", folder / "out")
        one_line(result, 2, "train/red")
        one_line(in_child(work, "--output-dir", "~/run"), 2, "HOME")
        (folder / "set/train/red").chmod(0o755)
