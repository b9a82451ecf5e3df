"""device.py: choosing, processes, the run's folder, checkpoints that survive, signals, exits."""
import argparse
import dataclasses
import gzip
import io
import json
import math
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import types
import zipfile

import numpy
import pytest
import torch
import torch.nn.functional as F

import device
from device import guard, load_checkpoint, SafeStop, start, UserError


def finish_of(code, *arguments, timeout=60, **options):
    """Run Python source in a process of its own -> CompletedProcess with text."""
    environment = {**os.environ, **options.pop("env", {})}
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], text=True,
                          capture_output=True, timeout=timeout, env=environment, **options)


def one_line_error(call, *words):
    """`call` raises a UserError of one line with all `words` in it."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text
    return text


# -----------------------------------------------------------------------------
# Choosing

def test_a_device_that_is_not_here_is_refused_and_what_is_here_is_said():
    for name in ("cuda", "npu", "mps"):
        if device.KINDS[name].absent():
            one_line_error(lambda: start(name), name, "Here there is:", "cpu")
    one_line_error(lambda: start("cpu:1"), "cpu:1 does not exist")
    for nonsense in ("gpu", "auto:1", "cuda:x", ""):
        one_line_error(lambda: start(nonsense), "unknown device", "cuda")


def test_a_number_beyond_the_gpus_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    one_line_error(lambda: start("cuda:7"), "cuda:7 does not exist", "cuda:0 to cuda:1")
    monkeypatch.setattr(torch.cuda, "set_device", broken)
    one_line_error(lambda: start("cuda:1"), "cuda:1 is listed but does not work", "busy")


def broken(*args, **kwargs):
    raise RuntimeError("the GPU is\nbusy")


def test_a_torch_npu_that_does_not_import_is_quoted(tmp_path, monkeypatch):
    if hasattr(torch, "npu"):
        pytest.skip("torch_npu is here")
    one_line_error(lambda: start("npu"), "torch_npu is not installed", "pip install torch_npu")
    (tmp_path / "torch_npu.py").write_text("raise OSError('libascendcl.so: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    one_line_error(lambda: start("npu"), "libascendcl.so: cannot open", "pip install torch_npu")


def test_the_first_line_says_what_was_chosen_and_why(capsys, monkeypatch):
    monkeypatch.setitem(device.KINDS, "cuda", device.KINDS["cpu"])  # as absent as can be told
    monkeypatch.delitem(device.KINDS, "cuda")
    run = start()
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and torch.__version__ in line and "processes 1" in line
    assert run.device.type in line and f"precision {run.precision} (auto" in line
    start("cpu", "fp16")
    assert "slow" in capsys.readouterr().out


def test_a_precision_the_device_lacks_is_refused(monkeypatch):
    one_line_error(lambda: start("cpu", "fp8"), "fp8", "expected auto, fp32, bf16, fp16")
    old_gpu = torch.device("cuda", 0)
    # an old GPU emulates bf16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True:
                        including_emulation)
    one_line_error(lambda: device._pick_precision(old_gpu, "bf16"), "cuda:0", "fp32, fp16")
    for capability, name in (((7, 5), "fp16"), ((6, 1), "fp32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, c=capability: c)
        assert device._pick_precision(old_gpu, "auto")[0] == name
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert device._pick_precision(old_gpu, "auto")[0] == "bf16"


def test_autocast_and_scaler_do_what_the_precision_says():
    weight = torch.ones(4, 4)
    for precision in ("fp32", "bf16", "fp16"):
        run = start("cpu", precision)
        with run.autocast():
            assert F.linear(weight, weight).dtype == run.dtype == device.PRECISIONS[precision]
        assert run.scaler().is_enabled() == (precision == "fp16")
    assert start("cpu").precision == "fp32" and not run.scaler(enabled=False).is_enabled()


def test_a_seed_repeats_all_generators_and_a_bad_one_is_refused():
    def draws():
        return random.random(), numpy.random.rand(), torch.rand(1).item()
    run = start("cpu", seed=5)
    first = draws()
    assert draws() != first
    run.enter("", seed=5)
    assert draws() == first
    for seed in (-1, 2 ** 32, 1.5, True, "1"):
        one_line_error(lambda: start("cpu", seed=seed), "seed", "4294967295")


def test_move_gives_one_or_several_and_models():
    run = start("cpu")
    one = run.move(torch.ones(2))
    assert torch.is_tensor(one) and len(run.move(one, one)) == 2
    assert isinstance(run.move(torch.nn.Linear(2, 2)), torch.nn.Linear)


def test_loader_options_suit_the_device(monkeypatch):
    run = start("cpu")
    assert run.loader_options(3)["workers"] == 3 and not run.loader_options()["pin_memory"]
    assert 0 <= run.loader_options(-1)["workers"] <= 4
    one_line_error(lambda: run.loader_options(-2), "workers -2")
    run.kind = device.KINDS["mps"]
    assert run.loader_options(-1) == {
        "workers": 0, "pin_memory": False, "multiprocessing_context": None}
    assert run.loader_options(1)["multiprocessing_context"] == "spawn"


def test_deterministic_is_asked_of_torch():
    code = ("import os, torch; from device import start; start('cpu', deterministic=True);"
            "assert torch.are_deterministic_algorithms_enabled();"
            "assert os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8';"
            "assert os.environ['PYTORCH_ENABLE_MPS_FALLBACK'] == '1'")
    assert finish_of(code).returncode == 0


# -----------------------------------------------------------------------------
# Processes

def worker(rank, world_size, port, folder):
    arguments = rank, world_size, port, folder
    sys.exit(guard(lambda args: facts_about_processes(*args), lambda argv: arguments, []))


def facts_about_processes(rank, world_size, port, folder):
    """Everything that can be said of several processes, in one start of them."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    run = start("cpu", out=folder, seed=1)
    assert (run.rank, run.world_size) == (rank, world_size)
    start("cpu")  # the group is there already

    for counts in ([2] * world_size, [3, 1, 2][:world_size]):  # even and uneven shares
        both, weight, given = contrastive_problem(sum(counts))
        mine = slice(sum(counts[:rank]), sum(counts[:rank + 1]))
        local = both[:, mine] @ weight
        everyone = [run.gather(x, counts) for x in local]
        assert torch.equal(torch.cat([run.gather(torch.full((n, 1), rank), counts)
                                      for n in [counts[rank]]]).flatten(),
                           torch.cat([torch.full((n,), r) for r, n in enumerate(counts)]))
        labels = torch.arange(sum(counts))[mine]
        loss = sum(F.cross_entropy(a @ b.T * given, labels, reduction="sum")
                   for a, b in zip(local, reversed(everyone))) / sum(counts)
        loss.backward()
        unused, once = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
        if rank == world_size - 1:
            once.grad = torch.full((2,), 3.0)
        run.sum_gradients([weight, unused, once, given])
        expected, whole = one_process_gradient(sum(counts))
        assert (weight.grad - expected).abs().max() < 1e-12
        assert abs(run.sum(loss.item()) - whole) < 1e-12
        assert unused.grad is None and once.grad.tolist() == [3, 3]
        bits = run.gather_objects(weight.grad.tolist())
        assert all(other == bits[0] for other in bits)

    if world_size > 2:
        return
    assert run.sum(2) == 4 and run.sum(0.5) == 1.0 and type(run.sum(2)) is int
    assert torch.equal(run.sum(torch.tensor([rank, 1])), torch.tensor([1, 2]))
    model = run.wrap(torch.nn.Linear(2, 1))
    model(torch.full((1, 2), float(rank))).sum().backward()
    assert model.module.weight.grad.tolist() == [[0.5, 0.5]]

    # The folder: every process calls, one writes; what one finds wrong, all raise.
    run.claim(identity={"a": 1}, resume=True)
    run.log(1, loss=0.5)
    run.save("checkpoint_last.pt", {"rank": rank, "rng": run.gather_objects(run.rng_state())})
    state = run.load("checkpoint_last.pt")
    assert state["rank"] == 0 and len(state["rng"]) == 2
    run.set_rng_state(state["rng"])
    for bad, error in ((object(), TypeError), (torch.tensor(math.nan), SafeStop)):
        with pytest.raises(error):
            run.save("checkpoint_last.pt", {"x": bad})
    with pytest.raises(UserError):
        run.enter(folder).claim()
    with pytest.raises(SafeStop, match="batch 3 of process 1"):
        run.check_finite([1.0, *[torch.tensor(math.inf if rank else 1.0)] * 3],
                         lambda i: f"batch {i} of process {rank}")
    run.check_finite([], str)

    # A signal to one stops all.
    run.watch_signals()
    assert run.stop_requested() == 0
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # the echo torchrun makes is not a second one
    assert run.stop_requested() == signal.SIGTERM and run.interrupted().exit_code == 143
    run.unwatch_signals()
    assert run.finish({"x": 1})["processes"] == 2
    run.barrier()
    torch.distributed.destroy_process_group()  # its threads must not outlive the interpreter


def contrastive_problem(n):
    """Two towers' inputs (2, n, 3), their weight (3, 4), a scale: float64, the same everywhere."""
    generator = torch.Generator().manual_seed(n)
    both = torch.randn(2, n, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    return both, weight, torch.tensor(2.0, dtype=torch.float64, requires_grad=True)


def one_process_gradient(n):
    both, weight, given = contrastive_problem(n)
    a, b = both @ weight
    labels = torch.arange(n)
    loss = F.cross_entropy(a @ b.T * given, labels) + F.cross_entropy(b @ a.T * given, labels)
    loss.backward()
    return weight.grad, loss.item()


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_processes_are_exact_and_agree(world_size, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.start_processes(
        worker, (world_size, port, str(tmp_path / "run")), world_size, start_method="spawn")
    if world_size == 2:
        lines = (tmp_path / "run" / "log.txt").read_text().splitlines()
        assert sum(line.startswith("device cpu") for line in lines) == 1
        assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_alone_everything_passes_through():
    run = start("cpu")
    x = torch.ones(2, 3, requires_grad=True)
    assert run.gather(x) is x and run.sum(3) == 3 and run.gather_objects(x)[0] is x
    model = torch.nn.Linear(2, 2)
    assert run.wrap(model) is model and run.sum_gradients(model.parameters()) is None
    run.barrier()
    assert not torch.distributed.is_initialized()


def test_half_of_torchruns_environment_is_explained(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    one_line_error(lambda: start("cpu"), "WORLD_SIZE=4", "RANK", "torchrun --nproc-per-node")
    for name, value in (("RANK", "zero"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "localhost"),
                        ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    one_line_error(lambda: start("cpu"), "RANK", "torchrun")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    one_line_error(lambda: start("mps"), "mps has one GPU", "4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    one_line_error(lambda: start("cuda:1"), "without a number")
    monkeypatch.setenv("LOCAL_RANK", "3")
    one_line_error(lambda: start("cuda"), "cuda:3 does not exist", "cuda:0 to cuda:1")


def test_one_failing_process_ends_the_others_and_tells_its_own_error(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, types; from device import guard, start, UserError\n"
        "def main(args):\n"
        "    run = start('cpu')\n"
        "    if run.rank == 1: raise UserError('the file is missing')\n"
        "    run.barrier()\n"
        "sys.exit(guard(main, lambda argv: types.SimpleNamespace()))\n")
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(script)], text=True, capture_output=True, timeout=60)
    assert result.returncode != 0 and "process 1: error: the file is missing" in result.stderr


# -----------------------------------------------------------------------------
# The folder

def test_a_run_leaves_its_files_and_numbers(tmp_path, capsys):
    run = start("cpu", seed=1, out=tmp_path / "中" / "run")
    assert not run.out.exists()  # nothing before claim
    assert not run.claim({"model": "tiny", "out": run.out}, {"model": "tiny"})
    run.say("猫 \udcff")
    run.log(5, 10, epoch=1, samples=50, waited=0.0, loss=torch.tensor(0.25), lr=1e-5, hits=7)
    run.log(5, split="val", loss=math.nan)
    assert run.finish({"accuracy": torch.tensor(1.5)})["accuracy"] == 1.5
    config = json.loads((run.out / "config.json").read_text())
    assert config == {"model": "tiny", "out": str(run.out), "identity": {"model": "tiny"}}
    assert sys.argv[0] in (run.out / "command.txt").read_text()
    assert json.loads((run.out / "env.json").read_text())["torch"] == torch.__version__
    log = (run.out / "log.txt").read_text("utf-8").splitlines()
    assert log[0].startswith("device cpu") and log[1].startswith("猫") and "5/10" in log[2]
    for word in ("loss 0.25", "lr 1e-05", "hits 7", "samples/s", "MB", "eta"):
        assert word in log[2]
    train, val = map(json.loads, (run.out / "metrics.jsonl").read_text().splitlines())
    assert set(train) == {"step", "epoch", "split", "loss", "lr", "hits", "samples_per_second",
                          "data_wait", "memory_mb", "time"}
    assert train["loss"] == 0.25 and train["samples_per_second"] > 0 and val["loss"] == "nan"
    results = json.loads((run.out / "results.json").read_text())
    assert {"seconds", "peak_memory_mb", "device", "precision", "processes", "git"} < set(results)
    assert results["peak_memory_mb"] > 50 and "eta" not in capsys.readouterr().out.splitlines()[3]


def test_samples_per_second_counts_from_the_last_line(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    run = start("cpu", out=tmp_path)
    run.rewind(10)  # resumed: the ETA rests on the steps of this process only
    for step, seconds in ((12, 4.0), (14, 2.0)):
        now[0] += seconds
        run.log(step, 20, samples=64, waited=1.0)
    now[0] += 1000
    run.log(14, split="val")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples_per_second"] for line in lines] == [16, 32, 0]
    assert [line["data_wait"] for line in lines] == [0.25, 0.5, 0]
    assert "eta 0:00:09" in (tmp_path / "log.txt").read_text()  # 6 steps of 6/4 s


def test_a_folder_that_is_not_free_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        one_line_error(lambda: start("cpu", out=out).claim(), "cannot be used", "--output-dir")
    run = start("cpu", out=tmp_path / "run")
    run.claim(identity={"batch_size": 32, "model": "tiny"})
    run.save("checkpoint_last.pt", {"step": 1})
    again = run.enter(run.out)
    run.enter(tmp_path / "other").claim()
    assert (tmp_path / "other" / "log.txt").read_text().startswith("device cpu")
    one_line_error(again.claim, "already holds a run", "--resume", "--overwrite")
    text = one_line_error(lambda: again.claim({}, {"batch_size": 64, "model": "tiny"}, resume=True),
                          "batch_size was 32, now 64")
    assert "model" not in text
    assert again.claim({"epochs": 3}, {"batch_size": 32, "model": "tiny"}, resume=True)
    assert len((run.out / "command.txt").read_text().splitlines()) >= 2
    assert again.load("checkpoint_last.pt") == {"step": 1}
    (run.out / "mine.npy").write_text("kept")
    assert not again.claim({}, {"batch_size": 64}, resume=True, overwrite=True)
    assert again.load("checkpoint_last.pt") is None and (run.out / "mine.npy").exists()
    (run.out / "config.json").write_text('{"hidden_size": 4}')  # a downloaded model's
    one_line_error(lambda: again.claim(overwrite=True), "not of a run of this program")


def test_a_read_only_folder_is_refused():
    with tempfile.TemporaryDirectory() as folder:
        run = start("cpu", out=folder)
        os.chmod(folder, 0o555)
        child = os.fork()
        if child == 0:  # root may write anywhere, so be nobody
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                run.claim()
            except UserError:
                os._exit(2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2


def test_rewind_drops_what_was_logged_after_the_step(tmp_path):
    run = start("cpu", out=tmp_path)
    for step in range(1, 6):
        run.log(step, loss=step / 3)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # killed in the middle of a line
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    run.rewind(3)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == before[:3]
    assert "after step 3; 3 later" in (tmp_path / "log.txt").read_text()


def test_a_folder_is_not_needed():
    run = start("cpu")
    run.claim({"a": 1})
    run.log(1, loss=1.0)
    run.rewind(0)
    run.save("checkpoint_last.pt", {})
    assert run.load("checkpoint_last.pt") is None
    assert run.finish({})["device"] == "cpu"


# -----------------------------------------------------------------------------
# Checkpoints

def test_a_kill_at_any_moment_leaves_a_checkpoint_that_loads(tmp_path):
    # Forks of one process, as a new interpreter for each kill would take seconds.
    run, best, moment = start("cpu", out=tmp_path), 0, random.Random(0)
    for attempt in range(40):
        child = os.fork()
        if child == 0:
            for n in range(best + 1, 10 ** 9):
                for name in ("checkpoint_last.pt", "checkpoint_best.pt"):
                    run.save(name, {"n": n, "w": torch.full((100_000,), float(n))})
        time.sleep(moment.uniform(0.002, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for state in (run.load("checkpoint_best.pt"), run.load("checkpoint_last.pt")):
            assert state or best == 0
            if state:
                assert state["w"].eq(state["n"]).all()
        assert not state or state["n"] >= best
        best = state["n"] if state else best
    assert best > 20
    run.claim(resume=True)
    assert not list(tmp_path.glob("*.tmp"))


def test_the_previous_checkpoint_is_kept_and_steps_in(tmp_path, capsys):
    run = start("cpu", out=tmp_path)
    for n in (1, 2, 3):
        run.save("checkpoint_last.pt", {"n": n})
        run.save("checkpoint_best.pt", {"n": n})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint_best.pt", "checkpoint_last.pt", "checkpoint_prev.pt"]
    last = tmp_path / "checkpoint_last.pt"
    assert load_checkpoint(last) == {"n": 3}
    last.write_bytes(last.read_bytes()[:-200])
    capsys.readouterr()
    assert run.load(last) == {"n": 2}
    assert "cut short" in capsys.readouterr().out
    with pytest.raises(UserError):
        run.load(last, fallback=False)
    last.unlink()  # the instant between the two renames
    assert run.load("checkpoint_last.pt") == {"n": 2}
    (tmp_path / "checkpoint_prev.pt").unlink()
    assert run.load("checkpoint_last.pt") is None


def test_each_kind_of_damage_is_named(tmp_path):
    path = tmp_path / "checkpoint_last.pt"
    run = start("cpu", out=tmp_path)
    run.save(path, {"w": torch.arange(5000.0)})
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[good.index(torch.tensor([2500.0]).numpy().tobytes())] ^= 4
    for content, word in (
            (b"", "empty"), (good[:9000], "cut short"), (good[:-30], "cut short"),
            (bytes(flipped), "checksum"), (random.Random(0).randbytes(4000), "does not start"),
            (b"\n<!DOCTYPE html><html>Log in</html>", "web page"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
            (gzip.compress(good), "gzip")):
        path.write_bytes(content)
        one_line_error(lambda: load_checkpoint(path), path.name, word)
    assert torch.load(io.BytesIO(flipped), weights_only=True)  # torch alone would train on this
    one_line_error(lambda: load_checkpoint(tmp_path / "none.pt"), "No such file")
    one_line_error(lambda: load_checkpoint(tmp_path), "directory")
    torch.save([1], path)
    one_line_error(lambda: load_checkpoint(path), "holds a list")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ViT/constants.pkl", b"")
    one_line_error(lambda: load_checkpoint(path), "TorchScript", "--weights")


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path):
    canary = tmp_path / "canary"
    torch.save({"w": torch.ones(1), "x": Payload(canary)}, tmp_path / "x.pt")
    one_line_error(lambda: load_checkpoint(tmp_path / "x.pt"), "refused")
    assert not canary.exists()


def test_what_would_not_load_again_is_not_saved(tmp_path):
    run = start("cpu", out=tmp_path)
    run.save("a_last.pt", {"good": 1})
    for bad in (numpy.float64(1), numpy.ones(2), pathlib.Path("x"), types.SimpleNamespace(),
                {numpy.int64(1): 1}, lambda: 0, torch.ones(2).max(0)):
        with pytest.raises(TypeError, match=r"state\['deep'\]\[0\]"):
            run.save("a_last.pt", {"deep": [bad]})
    for bad in (math.nan, math.inf):
        with pytest.raises(SafeStop, match=r"state\['model'\]\['w'\] holds nan or inf"):
            run.save("a_last.pt", {"model": {"w": torch.tensor([1.0, bad])}})
    assert load_checkpoint(tmp_path / "a_last.pt") == {"good": 1}


def test_what_training_holds_is_saved_and_no_more_than_that(tmp_path):
    run = start("cpu", "fp16", out=tmp_path)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "scaler": run.scaler().state_dict(), "rng": run.rng_state(), "best": -math.inf,
             "empty": torch.ones(0), "half": torch.ones(2).half(), "view": torch.ones(10**6)[:2]}
    run.save("a_last.pt", state)
    loaded = run.load("a_last.pt")
    assert (tmp_path / "a_last.pt").stat().st_size < 100_000
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    assert loaded["best"] == -math.inf and loaded["view"].tolist() == [1, 1]


def test_a_full_disk_stops_safely_and_keeps_the_old_checkpoint(tmp_path):
    code = ("import resource, sys, torch; from device import guard, start\n"
            "def main(args):\n"
            "    run = start('cpu', out=sys.argv[1])\n"
            "    run.save('a_last.pt', {'n': 1})\n"
            "    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\n"
            "    run.save('a_last.pt', {'w': torch.ones(1_000_000)})\n"
            "sys.exit(guard(main, lambda argv: None))")
    result = finish_of(code, tmp_path)
    assert result.returncode == 3 and result.stderr.count("\n") == 1, result.stderr
    assert "needs about 4000000 bytes" in result.stderr and " are free" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a_last.pt"]
    assert load_checkpoint(tmp_path / "a_last.pt") == {"n": 1}


def test_a_write_that_reads_back_wrong_is_not_put_in_place(tmp_path, monkeypatch):
    run = start("cpu", out=tmp_path)
    run.save("a_last.pt", {"n": 1})
    torch_save = torch.save

    def save(state, file):  # a disk that loses a block
        torch_save(state, file)
        file.seek(-300, os.SEEK_END)
        file.write(bytes(100))
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(SafeStop, match="intact"):
        run.save("a_last.pt", {"n": 2})
    assert load_checkpoint(tmp_path / "a_last.pt") == {"n": 1}


def test_the_random_state_survives_a_checkpoint(tmp_path, capsys):
    def draws():
        return [random.random(), random.gauss(0, 1), numpy.random.randn(), torch.randn(2).tolist()]
    run = start("cpu", seed=3, out=tmp_path)
    draws()
    run.save("a_last.pt", {"rng": run.gather_objects(run.rng_state())})
    expected = draws()
    state = run.load("a_last.pt")["rng"]
    run.set_rng_state(state)
    assert draws() == expected
    run.set_rng_state(state[0] | {"device_type": "cuda", "device": torch.ones(16).byte()})
    assert draws() == expected and "state of cuda" in capsys.readouterr().out
    run.set_rng_state(state * 2)
    assert draws() == expected and "2 processes, not 1" in capsys.readouterr().out


def test_losses_that_are_not_finite_are_named_and_the_third_in_a_row_stops(capsys):
    run, bad = start("cpu"), torch.tensor(math.nan)
    run.check_finite([1.0, torch.tensor(2.0)], str)
    run.check_finite([1.0, bad, math.inf], lambda i: f"image {i}.png")
    said = capsys.readouterr().out
    assert "image 0.png" not in said and "image 1.png" in said and "image 2.png" in said
    run.check_finite([1.0, bad, -math.inf], str)       # a good one in between: two in a row again
    with pytest.raises(SafeStop, match="3 steps in a row .* image 0.png") as caught:
        run.check_finite([bad], lambda i: f"image {i}.png")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_counts_as_zero(bad):
    run = start("cpu")
    p, q, frozen = (torch.nn.Parameter(torch.ones(3)) for _ in range(3))
    p.grad, q.grad = torch.tensor([1.0, 3e38, 0]), torch.tensor([3e38, -3e38, 1])
    assert run.drop_bad_gradients([p, q, frozen]) and p.grad[0] == 1 and frozen.grad is None
    q.grad[1] = bad
    assert not run.drop_bad_gradients([p, q, frozen])
    assert p.grad.tolist() == q.grad.tolist() == [0, 0, 0] and frozen.grad is None


# -----------------------------------------------------------------------------
# Signals and exits

STOPPABLE = """
import sys, time
from device import guard, start
def main(args):
    run = start("cpu", out=sys.argv[1])
    run.watch_signals()
    print("ready", flush=True)
    for step in range(1, 2000):
        time.sleep(0.01)
        if run.stop_requested() and sys.argv[2] == "once":
            run.save("checkpoint_last.pt", {"step": step})
            raise run.interrupted()
sys.exit(guard(main, lambda argv: None))
"""


def test_one_signal_saves_and_a_second_exits_at_once(tmp_path):
    children = []
    for number, times in ((signal.SIGINT, "once"), (signal.SIGTERM, "once"),
                          (signal.SIGTERM, "twice")):
        folder = tmp_path / f"{number}{times}"
        children.append((number, times, folder, subprocess.Popen(
            [sys.executable, "-c", STOPPABLE, str(folder), times], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE)))
    for number, times, folder, child in children:
        assert "device" in child.stdout.readline() and "ready" in child.stdout.readline()
        child.send_signal(number)
        if times == "twice":
            time.sleep(0.2)
            assert child.poll() is None
            child.send_signal(number)
        _, said = child.communicate(timeout=20)
        assert child.returncode == 128 + number, said
        assert (folder / "checkpoint_last.pt").exists() == (times == "once")
        assert ("after saving" in said) == (times == "once")


def test_signals_go_back_to_whoever_had_them():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run = start("cpu")
    run.watch_signals()
    run.watch_signals()
    other = run.enter("")
    os.kill(os.getpid(), signal.SIGTERM)
    assert other.stop_requested() == signal.SIGTERM  # of the process, not of one run in it
    assert signal.getsignal(signal.SIGTERM) != before[1]
    other.unwatch_signals()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    run.watch_signals()
    assert run.stop_requested() == 0
    run.unwatch_signals()


class OwnError(Exception):
    exit_code = 2


@pytest.mark.parametrize("error, code, said", [
    (None, 0, ""), (UserError("wrong,\nexpected"), 2, "error: wrong, expected\n"),
    (OwnError("mine"), 2, "error: mine\n"), (SafeStop("nan"), 3, "error: nan\n"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), 3, "--micro-batch"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 1)"), 3, "--micro-batch"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 3, "--micro-batch"),
    (MemoryError(), 3, "out of memory (MemoryError)"), (KeyboardInterrupt(), 130, "interrupted"),
    (device.Interrupted("saved", 143), 143, "error: saved\n"),
    (BrokenPipeError(), 141, None), (ZeroDivisionError("a bug"), 1, "Traceback")])
def test_exit_codes_are_real(error, code, said, capsys, monkeypatch):
    monkeypatch.setattr(device, "_leave_stdout", lambda: None)

    def main(args):
        if error:
            raise error
    assert guard(main, lambda argv: types.SimpleNamespace(debug=False)) == code
    text = capsys.readouterr().err
    assert said in text if said else text == ""
    assert ("Traceback" in text) == (code == 1)
    if code in (2, 3):
        guard(main, lambda argv: types.SimpleNamespace(debug=True))
        assert "Traceback" in capsys.readouterr().err
        monkeypatch.setenv("WORLD_SIZE", "2")  # all processes find a wrong flag: one says so
        for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
            monkeypatch.setenv(name, "1")
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        assert guard(main, lambda argv: types.SimpleNamespace(debug=False)) == code
        assert capsys.readouterr().err == ""


def test_argparse_keeps_its_own_exit():
    with pytest.raises(SystemExit):
        guard(print, argparse.ArgumentParser().parse_args, ["--nonsense"])


def test_the_command_line_takes_other_spellings_and_a_stored_run(tmp_path, capsys):
    parser = device.Parser(aliases={"--learning-rate": "--lr"})
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=8)
    assert parser.parse_args(["--batch_size=4", "--learning_rate", "2"]).batch_size == 4
    assert parser.parse_args(["--learning_rate", "2"]).lr == 2
    for words, hint in ((["--batch-sise", "1"], "did you mean --batch-size?"),
                        (["--l", "1"], "unknown argument --l"),
                        (["--config", str(tmp_path / "none")], "is not a run's config.json")):
        with pytest.raises(SystemExit) as caught:
            parser.parse_args(words)
        text = capsys.readouterr().err
        assert caught.value.code == 2 and hint in text and text.count("\n") == 1
    stored = tmp_path / "config.json"
    stored.write_text(json.dumps({"lr": 0.5, "batch_size": 2, "resume": "none", "identity": {}}))
    args = parser.parse_args(["--config", str(stored), "--batch-size", "16"])
    assert (args.lr, args.batch_size) == (0.5, 16) and not hasattr(args, "identity")


TALKER = """
import sys
from device import guard, start
def main(args):
    print(chr(0x732b))
    run = start("cpu", out=sys.argv[1])
    run.claim()
    for n in range(3000):
        run.say(f"{chr(0x732b)} {n} " + "x" * 50)
sys.exit(guard(main, lambda argv: None))
"""


def test_a_closed_pipe_and_a_c_locale_do_not_end_a_run(tmp_path):
    command = [sys.executable, "-c", TALKER, str(tmp_path / "pipe")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.close()  # as `| head -1` does
    assert child.wait(timeout=60) == 0 and child.stderr.read() == b""
    child.stderr.close()
    assert "猫 2999" in (tmp_path / "pipe" / "log.txt").read_text("utf-8")
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
                  "PYTHONIOENCODING": "ascii:strict"}
    result = finish_of(TALKER, tmp_path / "locale", env=ascii_only)
    assert result.returncode == 0, result.stderr
    assert r"\u732b 2999" in result.stdout
    assert "猫 2999" in (tmp_path / "locale" / "log.txt").read_text("utf-8")


def test_progress_is_for_terminals_only(capsys, monkeypatch):
    run = start("cpu")
    capsys.readouterr()
    run.progress(1, 9, "encoding")
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run.progress(1, 9, "encoding")
    run.say("done")
    assert capsys.readouterr().out == "\rencoding 1/9\r" + " " * 12 + "\rdone\n"


def test_git_commit_never_fails(tmp_path, monkeypatch):
    assert device.git_commit() == "" or len(device.git_commit().split("-")[0]) == 40
    monkeypatch.setattr(device, "__file__", str(tmp_path / "device.py"))
    assert device.git_commit() == ""
    monkeypatch.setenv("PATH", "")
    assert device.git_commit() == ""


# -----------------------------------------------------------------------------
# The doctor

def test_the_doctor_finds_this_cpu_right_and_says_which_flags_to_use(capsys):
    assert guard(device.doctor, device.doctor_args, ["--device", "cpu", "--seconds", "0.05",
                                                     "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    cpu, = report["devices"]
    errors = {(row["precision"], row["attention"]): row["error"] for row in cpu["rows"]}
    assert len(errors) == 6 and all(row["wrong"] == "" for row in cpu["rows"])
    assert max(errors["fp32", "fused"], errors["fp32", "plain"]) < 5e-4
    for precision in ("fp16", "bf16"):  # measured, not assumed: they do round
        assert 1e-3 < errors[precision, "plain"] < device.LIMITS[precision] / 2
    assert all(row["speed"] > 0 for row in cpu["rows"]) and cpu["transfer"] is None
    assert cpu["verdict"].startswith("cpu: fp32 exact, bf16 usable (gradient error ")
    assert cpu["verdict"].endswith("use --device cpu --precision fp32")
    assert set(report["absent"]) == {name for name, kind in device.KINDS.items() if kind.absent()}


attention, sgd_step = F.scaled_dot_product_attention, torch.optim.SGD.step


@pytest.mark.parametrize("owner, name, wrong, which", [
    (F, "scaled_dot_product_attention", lambda *qkv, is_causal: attention(*qkv), "fused"),
    (F, "scaled_dot_product_attention", lambda *qkv, is_causal: attention(*qkv, is_causal=is_causal)
     * 1.02, "fused"),
    (F, "scaled_dot_product_attention", lambda q, k, v, is_causal: v * math.nan, "fused"),
    (torch.optim.SGD, "step", lambda self, closure=None: None, "fused and plain"),
    (F, "layer_norm", lambda x, *_, **__: missing(), "fused and plain")])
def test_the_doctor_sees_a_wrong_kernel(owner, name, wrong, which, capsys, monkeypatch):
    fp32_only = dataclasses.replace(device.KINDS["cpu"], precisions=lambda device: ["fp32"])
    monkeypatch.setattr(device, "KINDS", {"cpu": fp32_only})
    truth = device._outcome

    def outcome(run, *arguments, **options):  # another device has other kernels: the truth stays
        with monkeypatch.context() as patch:
            if arguments[1].dtype == torch.float32:
                patch.setattr(owner, name, wrong)
            return truth(run, *arguments, **options)
    monkeypatch.setattr(device, "_outcome", outcome)
    assert guard(device.doctor, device.doctor_args, ["--seconds", "0"]) == 3
    out, err = capsys.readouterr()
    assert f"cpu: fp32 WRONG with {which} attention; do not train on it\n" in out
    assert err.startswith(f"error: cpu fp32 with {which.split()[0]} attention ")
    assert err.count("\n") == 1


def missing():
    raise NotImplementedError("an operation it has not")


def test_the_doctor_lists_what_is_absent_or_broken_and_refuses_it_when_asked(capsys, monkeypatch):
    cpu = dataclasses.replace(device.KINDS["cpu"], precisions=lambda device: ["fp32"])
    busy = dataclasses.replace(device.KINDS["cuda"], absent=lambda: "", count=lambda: 1,
                               select=broken, precisions=lambda device: ["fp32"])
    gone = dataclasses.replace(device.KINDS["mps"], absent=lambda: "there is no Apple GPU")
    monkeypatch.setattr(device, "KINDS", {"cuda": busy, "mps": gone, "cpu": cpu})
    assert guard(device.doctor, device.doctor_args, ["--seconds", "0"]) == 0
    out = capsys.readouterr().out
    assert "mps  absent: there is no Apple GPU\n" in out and "cpu: fp32 exact; use --device" in out
    assert "cuda absent: cuda:0 is listed but does not work: the GPU is busy\n" in out
    for name, words in (("cuda", "does not work"), ("mps", "no Apple GPU"), ("gpu", "unknown")):
        assert guard(device.doctor, device.doctor_args, ["--device", name]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_the_doctor_is_a_command():
    run = subprocess.run([sys.executable, device.__file__, "--device", "npu:99"], text=True,
                         capture_output=True)
    assert run.returncode == 2 and run.stderr.startswith("error: device npu")
    assert run.stderr.count("\n") == 1
