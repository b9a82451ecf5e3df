"""The scripts from end to end on an npu and an mps, both simulated (see simulated_device.py).

A process can simulate one device, and starting one is what costs: so one process per device does
all the work (`drive`, at the end) and leaves its findings, and the tests read them.
"""
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import traceback

import pytest
import torch
import torch.nn.functional as F
from torch.utils import backend_registration

from helpers import (checkpoint, metrics, results, run_folder, run_main, same_run, script_data,
                     script_flags)

ALONE = {"CUDA_VISIBLE_DEVICES": "", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}  # no second accelerator
RUNS = {  # name -> more flags; the name begins with the script's
    "clipfit": [],
    "clipfit micro": ["--micro-batch", "1"],
    "clipfit bf16": ["--precision", "bf16"],
    "clipfit fp16": ["--precision", "fp16"],
    "contrastive": [],
    "contrastive bert": ["--weights", "none", "--image-tower", "tiny-vit:none", "--text-tower",
                         "tiny-bert:none", "--tokenizer", "pairs/vocab.txt", "--embed-dim", "16"],
    "contrastive siglip": ["--loss", "siglip", "--positives", "multi"],
    "contrastive triplet": ["--loss", "infonce+triplet", "--grad-clip", "0.5"],
    "contrastive fp16": ["--precision", "fp16"],
    "distill": ["--mixup", "0.4", "--batch-size", "8", "--ema", "0.9"],
    "staged": []}
ON_MPS = ("clipfit", "clipfit fp16", "contrastive bert", "distill", "staged")  # the rest for time
EXACT = [name for name in RUNS if name[-2:] != "16"]


def of_kind(kind):
    return [name for name in RUNS if kind == "npu" or name in ON_MPS]


def flags_of(name, *more):
    """Every third step logs, ends an epoch and saves. Paths are those below the run's folder."""
    return script_flags(name.split()[0], pathlib.Path(), "--log-every", 3, *RUNS[name], *more)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """name -> the folder of that run on the CPU, the measure of the others."""
    folder = tmp_path_factory.mktemp("cpu")
    script_data(folder)

    def run(name):
        if not (folder / name).exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                run_main(f"train_{name.split()[0]}",
                         *flags_of(name, "--device", "cpu", "--output-dir", folder / name))
        return folder / name
    return run


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Both simulated devices at work, each in its own process: {name: (folder, process)}."""
    at_work = {}
    for name in ("npu", "mps"):
        folder = tmp_path_factory.mktemp(name)
        script_data(folder)
        with open(folder / "output.txt", "w") as output:
            at_work[name] = folder, subprocess.Popen(
                [sys.executable, pathlib.Path(__file__).resolve(), name], stdout=output,
                stderr=output, cwd=folder, env={**os.environ, **ALONE})
    yield at_work
    for _, process in at_work.values():
        process.kill()


@pytest.fixture(scope="module", params=["npu", "mps"])
def device(request, simulated):
    """The name of a simulated device, the folder of its runs, and what happened in them."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} cannot take a device written in Python (2.9 can)")
    folder, process = simulated[request.param]
    code = process.wait(timeout=500)
    assert code == 0, (folder / "output.txt").read_text()[-6000:]
    return request.param, folder, json.loads((folder / "happened.json").read_text())


def test_the_simulation_behaves_as_the_device(device):
    assert device[2]["facts"]["error"] == ""


@pytest.mark.parametrize("name", RUNS)
def test_every_script_gives_there_the_numbers_of_the_cpu(device, on_cpu, name):
    kind, folder, happened = device
    if name not in of_kind(kind):
        pytest.skip("run on the npu")
    assert happened[name]["error"] == ""
    assert results(folder / name)["device"].split(":")[0] == kind
    stored = checkpoint(run_folder(folder / name))
    assert stored["step"] == 6 and bool(stored["scaler"]) == (name[-4:] == "fp16")
    assert {x.dtype for x in stored["weights"].values()} == {torch.float32}
    if name not in EXACT:
        return
    ours, theirs = metrics(run_folder(folder / name)), metrics(run_folder(on_cpu(name)))
    assert len(ours) == len(theirs) >= 4
    for mine, yours in zip(ours, theirs):
        for key in set(yours) & {"loss", "ce", "scale", "mean_recall", "accuracy", "r1"}:
            rank = 100 / 24 / 3 if key in ("mean_recall", "r1") else 0.0  # near ties may change
            assert mine[key] == pytest.approx(yours[key], rel=1e-4, abs=1e-4 + rank), key


@pytest.mark.parametrize("name", ["clipfit", "clipfit micro", "contrastive triplet", "distill",
                                  "staged"])
def test_a_step_that_does_not_log_waits_for_one_flag_alone(device, name):
    """Whether the step was fine: where the optimiser is fused (cuda), not even for that."""
    if name not in of_kind(device[0]):
        pytest.skip("run on the npu")
    waits = device[2][name]["waits"]  # in front of each step's end, from that of the one before
    for step in (1, 2, 4, 5):
        assert [x.split(":")[0] for x in waits[step]] == ["device.py"], (step, waits[step])
    assert len(waits[3]) > 3, "the third step logged and saved: the count counts"


def test_a_run_that_was_stopped_resumes_to_the_same_bits(device):
    kind, folder, happened = device
    assert happened["stopped"]["said"] == str(signal.SIGTERM.value)
    same_run(folder / "clipfit", folder / "stopped")
    state = checkpoint(folder / "stopped")["rng"][0]
    assert state["device_type"] == kind and state["device"].dtype == torch.uint8


def test_a_checkpoint_is_evaluated_there_and_on_the_cpu(device, monkeypatch):
    _, folder, happened = device
    monkeypatch.chdir(folder)
    for name, key in (("clipfit", "accuracy"), ("contrastive bert", "mean_recall")):
        trained = results(folder / name)[key]
        assert happened[f"{name} evaluated"][key] == trained
        kept = "best" if key == "mean_recall" else "last"
        path = folder / name / f"checkpoint_{kept}.pt"
        here = run_main(f"train_{name.split()[0]}", *flags_of(
            name, "--device", "cpu", "--eval-only", "--resume", path))
        assert here[key] == trained


def test_the_doctor_finds_the_device_right(device):
    happened = device[2]
    assert happened["doctor"]["error"] == ""
    rows = {row["precision"]: row for row in happened["doctor"]["rows"]}
    assert set(rows) == {"fp32", "fp16", "bf16"} and rows["fp32"]["error"] < 5e-4
    assert not any(row["wrong"] for row in rows.values())


# -----------------------------------------------------------------------------
# In the process with the device

def facts(kind):
    """What a device of this kind refuses and computes otherwise than the CPU, asserted."""
    ones, rows = torch.ones(2, 3, device=kind), torch.tensor([1, 0])
    refusals = {
        "to be on the same device": [
            lambda: ones + torch.ones(3), lambda: F.linear(torch.ones(2, 3), ones)],
        "indices should be": [lambda: torch.ones(2, 3)[rows.to(kind)]],
        "not compiled with CUDA": [ones.cuda, lambda: torch.nn.Linear(1, 1).to(0),
                                   lambda: torch.zeros(1, device="cuda")],
        "to numpy": [ones.numpy]}
    if kind == "mps":
        refusals |= {"support float64": [ones.double], "pin memory": [torch.ones(1).pin_memory],
                     "loses data": [lambda: torch.ones(1).to(kind, non_blocking=True)]}
    for words, calls in refusals.items():
        for call in calls:
            with pytest.raises((RuntimeError, AssertionError, TypeError), match=words):
                call()
    assert (ones + torch.tensor(1.0)).sum().item() == 12  # a number may come from anywhere
    assert str(ones[rows].device) == f"{kind}:0"
    for low in (torch.float16, torch.bfloat16):
        with torch.autocast(kind, dtype=low):
            product, heads = F.linear(ones, ones), ones[None, None]
            assert product.dtype == F.scaled_dot_product_attention(heads, heads, heads).dtype == low
            for exact in (F.layer_norm(product, (2,)), product.softmax(-1), product + ones[:, :2]):
                assert exact.dtype == torch.float32
    torch.manual_seed(3)  # random numbers of its own
    first, host = torch.rand(4, device=kind).cpu(), torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4), host)
    assert torch.equal(torch.rand(4, device=kind).cpu(), first)


def attempt(work):
    """-> {"error": a traceback or "", ...}: what came of it."""
    found = {"error": ""}
    try:
        found |= work() or {}
    except (Exception, KeyboardInterrupt) as error:
        found |= {"error": traceback.format_exc(), "said": str(error)}
    return found


def run_script(name, *flags, stop_after=0):
    """main() of a script -> its score, and the lines that waited in each step; a
    SIGTERM comes in the step `stop_after`."""
    import simulated_device
    from device import Run
    script, waits, real = importlib.import_module(name), [], Run.update

    def update(*args, **options):
        fine = real(*args, **options)
        waits.append(simulated_device.waits[:])
        simulated_device.waits.clear()
        if len(waits) == stop_after:
            signal.raise_signal(signal.SIGTERM)
        return fine
    Run.update = update
    try:
        found = script.main(script.get_args(list(map(str, flags))))
        return {"waits": waits, **{key: found[key] for key in ("accuracy", "mean_recall")
                                   if key in found}}
    finally:
        Run.update = real


def drive(kind):
    """Everything that is to happen on the simulated device; writes happened.json."""
    from tools.doctor import examine
    folder, happened = pathlib.Path.cwd(), {"facts": attempt(lambda: facts(kind))}
    happened["doctor"] = attempt(lambda: examine(kind))

    def train(name, *more, **options):
        return attempt(lambda: run_script(f"train_{name.split()[0]}", *flags_of(
            name, "--device", kind, *more), **options))
    for name in of_kind(kind):
        happened[name] = train(name, "--output-dir", folder / name)
    stopped = "--output-dir", folder / "stopped"
    said = train("clipfit", *stopped, "--save-every", 2, stop_after=4)["said"]
    happened["stopped"] = {**train("clipfit", *stopped), "said": said}
    for name in ("clipfit", "contrastive bert"):
        happened[f"{name} evaluated"] = train(name, "--eval-only", "--output-dir", folder / name)
    (folder / "happened.json").write_text(json.dumps(happened))


if __name__ == "__main__":
    from simulated_device import install
    with install(sys.argv[1]):
        drive(sys.argv[1])
