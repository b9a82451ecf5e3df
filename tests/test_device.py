"""device.py: choosing, the update of a step, the run's folder, checkpoints, signals, exits."""
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types

import numpy
import pytest
import torch
import torch.nn.functional as F

import device
from tools import doctor
from device import guard, load_checkpoint, Parser, SafeStop, start, UserError
from helpers import (after, at_call, at_step, attempt, damaged_files, die, differences, in_child,
                     metrics, python, refused, results, same_run)


# -----------------------------------------------------------------------------
# A toy script with everything that a run has.

def get_args(words=()):
    parser = Parser()
    device.add_run_flags(parser, log_every=1)
    parser.add_argument("--lr", type=device.number(0, above=True), default=0.1)
    parser.add_argument("--epochs", type=device.whole(1), default=3)
    parser.add_argument("--template", default="a {}")
    return parser.parse_args(list(map(str, words)))


class Loader:
    """4 batches of 8 a epoch, a function of epoch and number."""
    def __init__(self):
        self.batch_sampler = self

    def set_epoch(self, epoch, first_batch=0):
        self.epoch, self.first = epoch, first_batch

    def __len__(self):
        return 4

    def __iter__(self):
        for batch in range(self.first, 4):
            generator = torch.Generator().manual_seed(100 * self.epoch + batch)
            yield torch.randn(8, 3, generator=generator)


def main(args):
    run = start("cpu", args.precision, args.seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Dropout())
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, fused=run.fused_optimizer)
    scaler, trainable = run.scaler(), dict(model.named_parameters())
    identity = device.run_identity(args, method="toy", data="d41d", model="tiny", weights="c0de")
    stored, finished = run.begin(device.run_folder(args, "toy", "a/b:c"), args, identity)
    if finished:
        return finished
    buffers, best = dict(model.named_buffers()), stored["best"] if stored else -1.0
    if args.eval_only:
        run.restore(stored, trainable, buffers)
        return {"step": stored["step"]}
    at = run.load_training(stored, trainable, optimizer, scaler, buffers)
    at.steps = 2 if args.dry_run else 4 * args.epochs
    for batch in run.batches(Loader(), at):
        optimizer.zero_grad(set_to_none=True)
        with run.autocast():
            loss = model(batch).square().mean().float()
        scaler.scale(loss).backward()
        run.update(optimizer, trainable.values(), scaler, 1.0, loss=loss)
        due = run.tick(at, {"loss": loss}, samples=8, lr=args.lr,
                       describe=lambda step=at.step: f"{step}.png")
        if at.batch == 0:
            run.log(at.step, "val", loss=loss.item())
            if 1 / loss.item() > best:
                best = 1 / loss.item()
                run.save_training(at, trainable, None, None, buffers, "checkpoint_best.pt",
                                  best=best)
        if due:
            run.save_training(at, trainable, optimizer, scaler, buffers, best=best)
    return run.finish({"accuracy": torch.tensor(1.5)})


def toy(folder, *flags):
    return main(get_args(["--output-dir", folder, *flags]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "whole"
    toy(folder)
    return folder


# -----------------------------------------------------------------------------
# Choosing

def test_the_device_asked_for_is_used_or_refused(monkeypatch, capsys):
    for name in ("cuda", "npu", "mps"):
        if device.KINDS[name].absent():
            refused(lambda name=name: start(name), "--device", name, "cpu")
    for nonsense in ("gpu", "auto:1", "cuda:x", "", "cpu:1"):
        refused(lambda word=nonsense: start(word), "--device")
    run = start()
    assert capsys.readouterr().out.count("\n") == 1 and run.precision in ("fp32", "bf16", "fp16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert start("cpu").device.type == "cpu"
    refused(lambda: start("cuda:7"), "cuda:7", "cuda:0 to cuda:1")

    def busy(index):
        raise RuntimeError(f"number {index}\nis busy")
    monkeypatch.setattr(torch.cuda, "set_device", busy)
    refused(lambda: start("cuda:1"), "cuda:1", "number 1 is busy")
    for name, value in dict(WORLD_SIZE=3, RANK=1, LOCAL_RANK=1, MASTER_ADDR="localhost",
                            MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    refused(lambda: start("cuda:1"), "3 processes")
    refused(lambda: start("cuda"), "number 1 is busy")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # as Slurm shows each its own
    refused(lambda: start("cuda"), "number 0 is busy")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    refused(lambda: start("mps"), "mps", "one process")
    monkeypatch.setenv("RANK", "zero")
    refused(lambda: start("cpu"), "WORLD_SIZE", "torchrun")
    monkeypatch.delenv("RANK")
    refused(lambda: start("cpu"), "RANK", "torchrun")


def test_a_broken_torch_npu_is_one_line(tmp_path):
    """torch imports such a package by itself, as long as it is not told otherwise."""
    (tmp_path / "torch_npu.py").write_text("raise OSError('libascendcl.so: cannot open')")
    info = tmp_path / "torch_npu-2.6.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.6\n")
    (info / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:autoload\n")
    code = ("import sys, device\n"
            "sys.exit(device.guard(lambda name: device.start(name), lambda argv: sys.argv[1]))")
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}"}
    refused(python(code, "npu", env=environment), "libascendcl.so", "torch_npu")
    assert python(code, "cpu", env=environment).ok().out.startswith("device cpu")


def test_the_precision_is_what_the_device_has(monkeypatch):
    refused(lambda: start("cpu", "fp8"), "--precision", "fp8")
    assert start("cpu").precision == "fp32"
    gpu = torch.device("cuda", 0)  # an old GPU emulates bf16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True:
                        including_emulation)
    refused(lambda: device.pick_precision(gpu, "bf16"), "--precision", "cuda:0")
    for capability, name in (((7, 5), "fp16"), ((6, 1), "fp32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, c=capability: c)
        assert device.pick_precision(gpu, "auto") == name
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert device.pick_precision(gpu, "auto") == "bf16"
    for version, has in (("2.7.1", False), ("2.8.0+cu128", True), ("2.10.0", True)):
        monkeypatch.setattr(torch, "__version__", version)
        assert ("fp16" in device.KINDS["mps"].precisions("cpu")) == has


def test_autocast_attention_optimiser_and_workers_suit_device_and_precision(monkeypatch):
    weight = torch.ones(4, 4)
    for precision in ("fp32", "bf16", "fp16"):
        run = start("cpu", precision)
        with run.autocast():
            assert F.linear(weight, weight).dtype == run.dtype == device.PRECISIONS[precision]
        assert run.scaler().is_enabled() == (precision == "fp16")
        assert run.fused_attention == (precision != "bf16") and run.fused_optimizer
    assert run.loader_options(3)["workers"] == 3 and not run.loader_options()["pin_memory"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert run.loader_options(-1)["workers"] == 1
    mps = device.Run(torch.device("mps"), "fp32", 0, 1, 0)
    assert not mps.fused_attention and mps.fused_optimizer is None


# -----------------------------------------------------------------------------
# The update

OPTIMIZERS = {
    "adamw": lambda p, fused: torch.optim.AdamW(p, 0.1, weight_decay=0.1, fused=fused),
    "sgd": lambda p, fused: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, fused=fused)}


@pytest.mark.parametrize("name, precision, fused", [*itertools.product(
    OPTIMIZERS, ("fp32", "fp16"), (False, True))])
def test_a_bad_step_changes_nothing(name, precision, fused):
    """Weights, moments, decay, scale and buffers are those of a run without the bad steps."""
    ends = {}
    for bad in (False, True):
        run = start("cpu", precision, seed=1)
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
        optimizer, scaler = OPTIMIZERS[name](model.parameters(), fused), run.scaler()
        run.load_training(None, {}, optimizer, scaler, dict(model.named_buffers()))
        for step in range(6):
            for how in ("loss", "gradient", "") if bad else ("",):
                optimizer.zero_grad(set_to_none=True)
                x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
                loss = model(x * (math.inf if how == "loss" else 1)).square().mean()
                scaler.scale(loss).backward()
                if how == "gradient":
                    model[0].bias.grad[1] = math.nan
                    loss = loss * math.nan if precision == "fp16" else None
                moved = run.update(optimizer, model.parameters(), scaler, 0.5, loss=loss)
                assert bool(moved) == (how == "")
        ends[bad] = [model.state_dict(), optimizer.state_dict()["state"], scaler.state_dict()]
    assert differences(*ends.values()) == []


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_the_update_unscales_and_clips_as_torch_does(clip):
    ours, theirs = (torch.nn.Linear(3, 2) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    run, x = start("cpu", "fp16"), torch.randn(4, 3)
    scaler = run.scaler()
    steps = [torch.optim.SGD(model.parameters(), 0.1) for model in (ours, theirs)]
    scaler.scale(ours(x).square().mean()).backward()
    run.update(steps[0], ours.parameters(), scaler, clip)
    theirs(x).square().mean().backward()
    if clip:
        assert torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip) > clip
    steps[1].step()
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)


def test_a_loss_scale_that_still_falls_is_no_failure_until_it_can_fall_no_more():
    """How bad steps are said, and stop a run, is in test_faults.py."""
    run, p = start("cpu", "fp16"), torch.nn.Parameter(torch.zeros(()))
    optimizer, scaler, at = torch.optim.SGD([p], 0.1), run.scaler(), device.Place(steps=99)
    with pytest.raises(SafeStop):
        while True:
            scaler.scale(p * math.inf).backward()
            run.update(optimizer, [p], scaler, loss=torch.tensor(1.0))
            optimizer.zero_grad()
            run.tick(at, {}, 1, str)
    assert at.step == 19  # 65536 = 2 ** 16 halvings, then three that count


# -----------------------------------------------------------------------------
# The folder

def test_speed_wait_and_eta_are_of_training_alone(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Slow(Loader):
        def __iter__(self):
            for batch in super().__iter__():
                now[0] += 1  # waiting for data
                yield batch
    run, args, p = start("cpu"), get_args(["--log-every", 2]), torch.nn.Parameter(torch.ones(1))
    run.begin(tmp_path / "run", args, {"method": "toy"})
    at, optimizer = device.Place(steps=8), torch.optim.SGD([p], 0.1)
    for _ in run.batches(Slow(), at):
        now[0] += 3
        run.update(optimizer, [p], run.scaler())
        run.tick(at, {"loss": 1.0}, 8, str)
        now[0] += 1000  # validation and saving
        run.log(at.step, "val", accuracy=1.0)
    rows = metrics(tmp_path / "run", "train")
    assert [row["samples_per_second"] for row in rows] == [2.0] * 4
    assert [row["data_wait"] for row in rows] == [0.25] * 4
    etas = [x.split("eta ")[1] for x in (tmp_path / "run/log.txt").read_text().splitlines()
            if "eta " in x]
    assert etas == ["0:00:24", "0:00:16", "0:00:08", "0:00:00"]
    assert run.finish({})["samples_per_second"] == 2.0


def test_a_folder_that_cannot_be_used_is_refused(whole, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        refused(lambda out=out: get_args(["--output-dir", out]), "--output-dir")
    assert toy(whole, "--log-every", 7, "--device", "cpu")["seconds"] == results(whole)["seconds"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"hidden_size": 4}')  # a downloaded model's
    for more in ((), ("--overwrite",)):
        refused(lambda more=more: toy(tmp_path / "model", *more), "config.json", "--output-dir")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text('{"foo": 1}')
    (tmp_path / "other" / "my_best.pt").write_text("kept")
    for more in ((), ("--overwrite",)):
        refused(lambda more=more: toy(tmp_path / "other", *more), "results.json", "--output-dir")
    assert {path.name for path in (tmp_path / "other").iterdir()} == {"results.json", "my_best.pt"}
    with device.lock(tmp_path / "used"):

        def beside():
            refused(lambda: toy(tmp_path / "used"), "used", "--output-dir")
        in_child(beside).ok()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)

        def as_nobody():  # root may write anywhere
            if os.geteuid() == 0:
                os.setuid(65534)
            refused(lambda: device.Run(torch.device("cpu"), "fp32", 0, 1, 0).begin(
                folder, get_args(), {}), folder, "--output-dir")
        assert in_child(as_nobody).code == 0


def test_overwrite_starts_again_and_keeps_what_is_not_the_runs(tmp_path):
    toy(tmp_path, "--epochs", 1)
    for name in ("mine.npy", "mine.tmp"):
        (tmp_path / name).write_text("kept")
    toy(tmp_path, "--epochs", 2, "--overwrite")
    assert len(metrics(tmp_path, "train")) == 8 and len([*tmp_path.glob("mine.*")]) == 2
    for name in ("export", "table.csv"):  # of a folder that held no run
        (tmp_path / "new" / name).mkdir(parents=True)
    toy(tmp_path / "new", "--overwrite")
    assert {"export", "table.csv"} <= {path.name for path in (tmp_path / "new").iterdir()}


def test_tensorboard_gets_what_is_logged_and_a_resumed_run_appends(whole, tmp_path, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(device.Run, "tick", device.Run.tick)  # to have it back
        at_step(6, lambda: 1 / 0)
        toy(tmp_path, "--tensorboard")
    toy(tmp_path, "--tensorboard")
    same_run(whole, tmp_path, but=("timed",))  # the flag is not in the identity
    events = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for split, name in (("train", "loss"), ("train", "lr"), ("train", "memory_mb"), ("val", "loss")):
        found = [(x.step, x.value) for x in events.Scalars(f"{split}/{name}")]
        assert found == [(row["step"], pytest.approx(row[name])) for row in metrics(tmp_path, split)]
    toy(tmp_path, "--overwrite")
    assert not list(tmp_path.glob("tensorboard/*"))
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # it is not installed
    refused(lambda: get_args(["--tensorboard"]), "--tensorboard", "pip install")


def test_a_run_begun_again_from_a_checkpoint_of_its_own_keeps_the_best(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    toy(tmp_path / "run", "--resume", tmp_path / "run" / "checkpoint_last.pt", "--overwrite")
    best, kept = (load_checkpoint(x / "checkpoint_best.pt") for x in (whole, tmp_path / "run"))
    assert kept["step"] == best["step"]
    assert load_checkpoint(tmp_path / "run" / "checkpoint_last.pt")["step"] == 12
    (tmp_path / "run" / "results.json").write_text("{")  # is made again
    assert toy(tmp_path / "run")["accuracy"] == results(tmp_path / "run")["accuracy"] == 1.5
    for name in ("results.json", "checkpoint_best.pt"):
        (tmp_path / "run" / name).unlink()
    refused(lambda: toy(tmp_path / "run"), "checkpoint_best.pt")


def test_eval_only_scores_the_best_and_claims_nothing(whole, tmp_path):
    best, path = load_checkpoint(whole / "checkpoint_best.pt"), whole / "checkpoint_last.pt"
    assert toy(whole, "--eval-only", "--lr", 0.7)["step"] == best["step"]  # a fair question
    assert toy(tmp_path / "none", "--eval-only", "--resume", path)["step"] == 12
    assert not (tmp_path / "none").exists()
    run = start("cpu")
    identity = {"method": "toy", "model": "other", "weights": "c0de"}
    refused(lambda: run.begin(whole, get_args(["--eval-only"]), identity), "model")
    refused(lambda: run.begin(whole, get_args(["--eval-only"]), {**identity, "method": "x"}),
            "--weights")
    refused(lambda: run.restore(best, {"0.weight": torch.ones(3, 3)}), "--model")


# -----------------------------------------------------------------------------
# Checkpoints

KILLS = [(device.os, "replace", n) for n in (1, 4, 9, 10, 11, 12)] + [
    (device.os, "fsync", n) for n in (2, 6, 7, 8)] + [(torch, "save", n) for n in (1, 3, 4)] + [
    (device.Run, "tick", n) for n in (1, 5, 8)]


@pytest.mark.parametrize("owner, name, number", KILLS)
def test_a_kill_at_any_moment_resumes_to_the_same_bits(whole, tmp_path, owner, name, number):
    ended = after(lambda: at_call(owner, name, number, die), toy, tmp_path, "--save-every", 3)
    assert ended.code == 128 + signal.SIGKILL
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    toy(tmp_path, "--save-every", 3, "--workers", 3)
    same_run(whole, tmp_path, ("checkpoint_last.pt", "checkpoint_best.pt"))
    assert not list(tmp_path.glob("*.tmp"))


def test_each_kind_of_damage_is_named_and_the_previous_one_steps_in(tmp_path, capsys):
    toy(tmp_path / "run", "--epochs", 2)
    last, before = (tmp_path / "run" / f"checkpoint_{name}.pt" for name in ("last", "prev"))
    for kind, path in damaged_files(tmp_path / "bad", last).items():
        assert refused(lambda path=path: load_checkpoint(path), path.name)
        last.write_bytes(path.read_bytes())
        run = start("cpu")
        stored = run.load(last)
        assert stored["step"] == 4 and last.name in capsys.readouterr().out, kind
    last.unlink()  # the instant between the two renames
    assert run.load(last)["step"] == 4
    before.unlink()
    assert run.load(last) is None
    refused(lambda: load_checkpoint(tmp_path), tmp_path)
    torch.save([1], last)
    refused(lambda: load_checkpoint(last), last.name, "list")
    before.write_bytes(b"")
    refused(lambda: run.load(last), before.name, "--overwrite")


def test_what_would_not_load_again_or_is_not_finite_is_not_saved(tmp_path):
    run, path = start("cpu"), tmp_path / "a_last.pt"
    run.save(path, {"good": 1, "best": -math.inf})
    for bad, error in ((numpy.float64(1), TypeError), (path, TypeError),
                       (torch.tensor([1.0, math.nan]), SafeStop),
                       (torch.tensor(math.inf), SafeStop)):
        with pytest.raises(error):
            run.save(path, {"deep": [bad]} if error is TypeError else {"model": {"w": bad}})
    assert load_checkpoint(path) == {"good": 1, "best": -math.inf}
    run.save(path, {"view": torch.ones(10 ** 6)[:2]})
    assert path.stat().st_size < 10_000


# -----------------------------------------------------------------------------
# Signals and exits

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_exits_at_once(tmp_path, number):
    def twice():
        for _ in range(2):
            signal.raise_signal(number)
    ended = after(lambda: at_step(5, twice), toy, tmp_path)
    assert ended.code == 128 + number and "second signal" in ended.out
    assert load_checkpoint(tmp_path / "checkpoint_last.pt")["step"] == 4


@pytest.mark.parametrize("error, code, said", [
    (None, 0, ""), (UserError("wrong,\nexpected"), 2, "error: wrong, expected\n"),
    (SafeStop("nan"), 3, "error: nan\n"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), 3, "--micro-batch"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 1)"), 3, "--micro-batch"),
    (MemoryError(), 3, "out of memory"), (KeyboardInterrupt(), 130, "interrupted"),
    (KeyboardInterrupt(signal.SIGTERM), 143, "SIGTERM"),
    (BrokenPipeError("a worker's"), 3, "has ended"), (ZeroDivisionError("a bug"), 1, "Traceback")])
def test_exit_codes_are_real(error, code, said, capsys):
    def failing(args):
        if error:
            raise error
    assert guard(failing, lambda argv: types.SimpleNamespace(debug=False), []) == code
    text = capsys.readouterr().err
    assert said in text if said else text == ""
    assert ("Traceback" in text) == (code == 1)
    guard(failing, lambda argv: None, ["--debug"])
    assert ("Traceback" in capsys.readouterr().err) == (error is not None)


def test_a_closed_pipe_ends_a_tool_as_it_ends_others():
    """test_faults.py has the same for a run, which goes on."""
    talker = """import sys
from device import guard
def main(args):
    for n in range(9000):
        print(chr(0x732b), n, flush=n == 0)
sys.exit(guard(main, lambda argv: None))"""
    child = subprocess.Popen([sys.executable, "-c", talker], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.close()  # as `| head -1` does
    assert child.wait(timeout=60) == 141 and child.stderr.read() == b""
    child.stderr.close()
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
                  "PYTHONIOENCODING": "ascii:strict"}
    assert r"\u732b 8999" in python(talker, env=ascii_only).ok().out


# -----------------------------------------------------------------------------
# The doctor

def test_the_doctor_finds_this_cpu_right(capsys):
    doctor.main(doctor.get_args(["--device", "cpu"]))
    assert "--device cpu --precision" in capsys.readouterr().out.splitlines()[-1]
    doctor.main(doctor.get_args(["--device", "cpu", "--json"]))
    cpu, = json.loads(capsys.readouterr().out)["devices"]
    rows = {row["precision"]: row for row in cpu["rows"]}
    assert not any(row["wrong"] for row in rows.values()) and "--precision" in cpu["verdict"]
    assert rows["fp32"]["error"] < 5e-4 < rows["bf16"]["error"]
    refused(attempt(doctor, "--device", "npu:99"), "--device")


def test_the_doctor_recommends_nothing_that_is_wrong_or_slower():
    def advice(fp32, bf16=None):
        """fp32, bf16: the speed; 0 where it is wrong."""
        return doctor.advice(torch.device("cpu"), [
            {"precision": name, "speed": speed or 9.0, "wrong": "" if speed else "is wrong"}
            for name, speed in (("fp32", fp32), ("bf16", bf16)) if speed is not None])
    for speeds, best in (((1, 1), "fp32"), ((1, 0.1), "fp32"), ((1, 3), "bf16"), ((1, 0), "fp32"),
                         ((0, 0.5), "bf16")):
        assert f"--precision {best}" in advice(*speeds)
    assert "do not" in advice(0)
