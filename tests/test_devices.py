"""The scripts from end to end on an npu and an mps, both simulated (see simulated_device.py).

A process can simulate one device, and starting one is what costs: so one process per device does
all the work (`drive`, at the end) and leaves its findings, and the tests read them.
"""
import json
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import traceback

import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils import backend_registration

import train_clipfit
import train_contrastive
import train_distill
import train_staged
from device import examine
from test_train_contrastive import scenes, tiny_flags

HERE = pathlib.Path(__file__).resolve().parent
SCRIPT = HERE.parent / "train_clipfit.py"
# 12 images in steps of 4: three steps per epoch, six in all.
TINY = ["--data", "demo", "--classes", "river", "forest", "pasture land", "--shots", "4",
        "--epochs", "2", "--batch-size", "4", "--workers", "0"]
RUNS = {  # name -> flags. Every third step ends an epoch, saves, and is logged where it says 3.
    "fp32": ["--log-every", "1"],
    "clipped": ["--grad-clip", "0.5", "--log-every", "3"],
    "micro": ["--micro-batch", "2", "--log-every", "100"],  # the last step is always logged
    "bf16": ["--precision", "bf16", "--log-every", "3"],
    "fp16": ["--precision", "fp16", "--log-every", "3"],
    "official-fp16": ["--precision", "official-fp16", "--log-every", "3"],
}
CONTRASTIVE = HERE.parent / "train_contrastive.py"
# 24 pairs in steps of 8 and pieces of 3, dropout in the text tower: six steps too.
PAIRS = {
    "pairs": [],
    "pairs siglip": ["--loss", "siglip", "--positives", "multi", "--ema", "0.5", "--log-every",
                     "100"],
    "pairs triplet": ["--loss", "infonce+triplet", "--grad-clip", "0.5", "--log-every", "100"],
    "pairs bf16": ["--precision", "bf16", "--log-every", "100"],
    "pairs fp16": ["--precision", "fp16"],
    "pairs clip-roberta": ["--preset", "clip-roberta", "--epochs", "1", "--max-steps", "2"],
    "pairs simple-clip": ["--preset", "simple-clip", "--max-steps", "2", "--epochs", "1"],
}
BOTH = ("pairs", "pairs siglip")  # the rest, for time, on one of the devices alone
DISTILL = HERE.parent / "train_distill.py"
# 64 demo images, the bundled teacher: four steps of 16 pairs.
TAUGHT = {
    "taught": ["--ema", "0.9", "--ema-teacher", "0.3", "--mixup", "0.4", "--relation", "1", "--hint",
               "1", "--attention", "1"],
    "taught stored": ["--reinforced", "stored", "--cutmix", "1", "--train-text"],
    "taught fp16": ["--precision", "fp16"],
}

STAGED = HERE.parent / "train_staged.py"
# Two stages of three steps, on what stands in for the pairs of the contrastive runs; every third
# step saves. The second has all that a step can do.
STAGES = {
    "staged": [["name=one,matching=red|yellow|white,positives=multi", "name=two,matching=green|blue"
                "|black,replay=one:0.5,distill=0.5,lora=2,mask_ratio=0.25,wise=0.5"], "fp32"],
    "staged frozen": [["name=one,matching=red|yellow|white,freeze=visual.*+!visual.proj",
                       "name=two,matching=green|blue|black,freeze=text"], "fp32"],
    "staged fp16": [["name=one", "name=two,layer_decay=0.5"], "fp16"],
}


def staged_flags(folder, name, device, *more):
    stages, precision = STAGES[name]
    return ["--data", folder / "scenes", "--weights", folder / "start.safetensors", "--tokenizer",
            folder / "scenes" / "vocab.txt", "--batch-size", "4", "--micro-batch", "3", "--lr",
            "1e-3", "--steps", "3", "--eval-every", "3", "--log-every", "3", "--workers", "0",
            "--precision", precision, "--device", device, "--output-dir", folder / name, *more,
            *(word for stage in stages for word in ("--stage", stage))]


def start_of_stages(folder):
    """The weights that all of them begin with."""
    from test_train_staged import weights_file
    weights_file(folder).rename(folder / "start.safetensors")


def taught_flags(folder, name, device):
    more = [str(folder / "stored") if word == "stored" else word for word in TAUGHT[name]]
    return ["--data", "demo", "--max-samples", "64", "--model", "tiny-vit", "--batch-size", "16",
            "--epochs", "1", "--workers", "0", "--cache", "none", "--log-every", "1", "--device",
            device, "--output-dir", str(folder / name), *more]


def store(folder):
    """A stored teacher for both, made on the CPU."""
    train_distill.main(train_distill.get_args([
        "--data", "demo", "--max-samples", "64", "--write-reinforced", str(folder / "stored"),
        "--views", "2", "--workers", "0", "--cache", "none", "--device", "cpu"]))
# What a program written for cuda does: what the script says -> what it says instead -> the error.
FAULTS = {
    "cuda": ("model = run.move(model)", "model = run.move(model).cuda()",
             "AssertionError: Torch not compiled with CUDA enabled"),
    "number": ("images, labels = run.move(images, labels)", "images, labels = images.to(0), labels",
               "AssertionError: Torch not compiled with CUDA enabled"),
    "labels": ("images, labels = run.move(images, labels)", "images = run.move(images)",
               "RuntimeError: Expected all tensors to be on the same device, but found at least "
               "two devices, DEVICE:0 and cpu!"),
    "anchor": ("1 - (tuned * pretrained)", "1 - (tuned * pretrained.cpu())",
               "RuntimeError: Expected all tensors to be on the same device, but found at least "
               "two devices, DEVICE:0 and cpu!"),
    "numpy": ("predictions = (image_features @ text_features.T).argmax(dim=-1).cpu()",
              "predictions = (image_features @ text_features.T).argmax(dim=-1).numpy()",
              "TypeError: can't convert DEVICE:0 device type tensor to numpy"),
}


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows if row["split"] == "train"
            for key in ("loss", "ce", "drift", "batch_accuracy")]


def results(folder):
    return json.loads((folder / "results.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """Folders of the runs on the CPU, the measure of the others."""
    parent = tmp_path_factory.mktemp("cpu")
    for name in ("fp32", "clipped"):
        train_clipfit.main(train_clipfit.get_args(
            [*TINY, *RUNS[name], "--device", "cpu", "--output-dir", str(parent / name)]))
    return parent


@pytest.fixture(scope="module")
def simulated_devices(tmp_path_factory):
    """Both simulated devices at work, each in its own process: {name: (folder, process)}."""
    at_work, here = {}, pathlib.Path(__file__).resolve()
    for name in ("npu", "mps"):
        folder = tmp_path_factory.mktemp(name)
        with open(folder / "output.txt", "w") as output:
            at_work[name] = folder, subprocess.Popen(
                [sys.executable, str(here.parent / "simulated_device.py"), name, str(here), name,
                 str(folder)], stdout=output, stderr=output)
    yield at_work
    for _, process in at_work.values():
        process.kill()


@pytest.fixture(scope="module", params=["npu", "mps"])
def device(request, simulated_devices):
    """The name of a simulated device, the folder of its runs, and what happened in them."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} cannot take a device written in Python (2.9 can)")
    folder, process = simulated_devices[request.param]
    code = process.wait(timeout=400)
    assert code == 0, (folder / "output.txt").read_text()[-6000:]
    return request.param, folder, json.loads((folder / "happened.json").read_text())


def test_the_simulation_behaves_as_the_device(device):
    assert device[2]["facts"]["error"] == ""


@pytest.mark.parametrize("name", [*RUNS, "stopped", "evaluated", "workers"])
def test_the_script_runs_from_end_to_end(device, name):
    kind, folder, happened = device
    assert happened[name]["error"] == ""
    if name in RUNS:
        found = results(folder / name)
        assert found["device"].split(":")[0] == kind and found["seconds"] > 0
        stored = torch.load(folder / name / "checkpoint_last.pt", weights_only=True)
        assert stored["step"] == 6
        assert all(torch.isfinite(x).all() for x in stored["weights"].values())


def test_fp32_gives_the_numbers_of_the_cpu(device, on_cpu):
    folder = device[1]
    for name in ("fp32", "clipped"):
        assert losses(folder / name) == pytest.approx(losses(on_cpu / name), rel=1e-5, abs=1e-5)
        assert results(folder / name)["accuracy"] == results(on_cpu / name)["accuracy"]
    assert losses(folder / "clipped") != losses(folder / "fp32")


def test_micro_batches_change_nothing(device, on_cpu):
    last = losses(on_cpu / "fp32")[-4:]
    assert losses(device[1] / "micro") == pytest.approx(last, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["bf16", "fp16", "official-fp16"])
def test_lower_precisions_stay_near_fp32_and_are_not_it(device, on_cpu, name):
    ours, exact = losses(device[1] / name)[:2], losses(on_cpu / "fp32")[8:10]
    # Until the third step the rate is 1e-5: its losses measure the arithmetic, not the path.
    assert ours == pytest.approx(exact, rel=0.05) and ours != pytest.approx(exact, rel=1e-5)
    stored = torch.load(device[1] / name / "checkpoint_last.pt", weights_only=True)
    dtypes = {x.dtype for x in stored["weights"].values()}
    assert dtypes == {torch.float32} | ({torch.float16} if name == "official-fp16" else set())
    assert bool(stored["scaler"]) == (name == "fp16")


@pytest.mark.parametrize("name", ["clipped", "micro", "bf16"])
def test_a_step_that_does_not_log_does_not_wait_for_the_device(device, name):
    """Steps 1, 2, 4 and 5 neither log nor save; the third ends an epoch and saves."""
    _, one, two, three, four, five, rest = device[2][name]["stretches"]
    for step in (one, two, four, five):
        assert step["waits"] == []
        assert len(step["uploads"]) == 2, "images and labels"
    assert three["waits"] and rest["waits"], "the count counts"


def test_a_run_that_was_stopped_resumes_to_the_same_bits(device):
    kind, folder, happened = device
    assert happened["stopped"]["exit_code"] == 128 + signal.SIGTERM
    whole, halves = (torch.load(folder / name / "checkpoint_last.pt", weights_only=True)
                     for name in ("fp32", "stopped"))
    for name, weight in whole["weights"].items():
        assert torch.equal(weight, halves["weights"][name]), name
    assert losses(folder / "fp32") == losses(folder / "stopped")
    assert results(folder / "fp32")["accuracy"] == results(folder / "stopped")["accuracy"]
    rng = whole["rng"][0]
    assert rng["device_type"] == kind and rng["device"].dtype == torch.uint8


def test_a_checkpoint_is_evaluated_there_and_on_the_cpu(device, capsys, tmp_path):
    _, folder, happened = device
    trained = results(folder / "fp32")["accuracy"]
    assert happened["evaluated"]["accuracy"] == happened["workers"]["accuracy"] == trained
    here = train_clipfit.main(train_clipfit.get_args(
        [*TINY, "--device", "cpu", "--eval-only", "--output-dir", str(tmp_path), "--resume",
         str(folder / "fp32" / "checkpoint_last.pt")]))
    assert here["accuracy"] == trained


def test_the_doctor_finds_the_device_right(device):
    kind, _, happened = device
    assert happened["doctor"]["error"] == ""
    errors = {row["precision"]: row["error"] for row in happened["doctor"]["rows"]}
    assert set(errors) == {"fp32", "fp16", "bf16"} and errors["fp32"] < 5e-4
    assert re.search(f"use --device {kind} --precision fp32$", happened["doctor"]["verdict"])
    assert len(happened["doctor"]["transfer"]) == 2


@pytest.mark.parametrize("name", FAULTS)
def test_a_program_written_for_cuda_is_caught(device, name):
    kind, _, happened = device
    assert FAULTS[name][2].replace("DEVICE", kind) in happened[f"fault {name}"]["error"]


@pytest.fixture(scope="module")
def pairs_on_cpu(tmp_path_factory):
    """Folders of the contrastive runs on the CPU."""
    parent = tmp_path_factory.mktemp("cpu_pairs")
    scenes(parent / "scenes", 24, 12)
    for name in ("pairs", "pairs clip-roberta", "pairs simple-clip"):
        train_contrastive.main(train_contrastive.get_args(tiny_flags(
            parent / "scenes", *PAIRS[name], "--output-dir", parent / name)))
    return parent


def contrastive_losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows for key in ("loss", "scale", "mean_recall") if key in row]


@pytest.mark.parametrize("name", PAIRS)
def test_the_contrastive_script_runs_from_end_to_end(device, name):
    kind, folder, happened = device
    if kind != "npu" and name not in BOTH:
        pytest.skip("run on the npu")
    assert happened[name]["error"] == ""
    assert results(folder / name)["device"].split(":")[0] == kind
    stored = torch.load(folder / name / "checkpoint_last.pt", weights_only=True)
    assert stored["step"] == (2 if "--max-steps" in PAIRS[name] else 6)
    assert all(torch.isfinite(x).all() for x in stored["weights"].values())


@pytest.mark.parametrize("name", ["pairs", "pairs clip-roberta", "pairs simple-clip"])
def test_contrastive_fp32_gives_the_numbers_of_the_cpu(device, pairs_on_cpu, name):
    if device[0] != "npu" and name not in BOTH:
        pytest.skip("run on the npu")
    found = contrastive_losses(device[1] / name)
    assert len(found) >= 8
    assert found == pytest.approx(contrastive_losses(pairs_on_cpu / name), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["pairs siglip", "pairs triplet", "pairs bf16"])
def test_a_contrastive_step_that_does_not_log_does_not_wait_for_the_device(device, name):
    if device[0] != "npu" and name not in BOTH:
        pytest.skip("run on the npu")
    _, one, two, three, four, five, rest = device[2][name]["stretches"]
    for step in (one, two, four, five):
        assert step["waits"] == []
    assert three["waits"] and rest["waits"], "the count counts"


def test_a_contrastive_checkpoint_is_evaluated_there_and_on_the_cpu(device, tmp_path):
    _, folder, happened = device
    trained = results(folder / "pairs")
    assert happened["pairs evaluated"]["mean_recall"] == trained["mean_recall"]
    here = train_contrastive.main(train_contrastive.get_args(tiny_flags(
        folder / "scenes", "--eval-only", "--output-dir", tmp_path, "--resume",
        folder / "pairs" / "checkpoint_best.pt")))
    assert here["mean_recall"] == trained["mean_recall"]
    assert here["loss"] == pytest.approx(trained["loss"], rel=1e-5)


@pytest.fixture(scope="module")
def taught_on_cpu(tmp_path_factory):
    """Folders of the distillation runs on the CPU."""
    parent = tmp_path_factory.mktemp("cpu_taught")
    store(parent)
    for name in ("taught", "taught stored"):
        train_distill.main(train_distill.get_args(taught_flags(parent, name, "cpu")))
    return parent


@pytest.mark.parametrize("name", TAUGHT)
def test_the_distillation_script_gives_the_numbers_of_the_cpu(device, taught_on_cpu, name):
    kind, folder, happened = device
    if kind != "npu" and name != "taught":
        pytest.skip("run on the npu")
    assert happened[name]["error"] == ""
    assert results(folder / name)["device"].split(":")[0] == kind
    if name != "taught fp16":
        found = contrastive_losses(folder / name)
        assert len(found) >= 8
        assert found == pytest.approx(contrastive_losses(taught_on_cpu / name), rel=1e-4, abs=1e-4)


@pytest.fixture(scope="module")
def staged_on_cpu(tmp_path_factory):
    """Folders of the staged runs on the CPU."""
    parent = tmp_path_factory.mktemp("cpu_staged")
    scenes(parent / "scenes", 24, 12)
    start_of_stages(parent)
    for name in ("staged", "staged frozen"):
        train_staged.main(train_staged.get_args(list(map(str, staged_flags(parent, name, "cpu")))))
    return parent


@pytest.mark.parametrize("name", STAGES)
def test_a_plan_of_stages_gives_the_numbers_of_the_cpu(device, staged_on_cpu, name):
    kind, folder, happened = device
    if kind != "npu" and name != "staged":
        pytest.skip("run on the npu")
    assert happened[name]["error"] == ""
    assert results(folder / name)["device"].split(":")[0] == kind
    assert [row["row"] for row in results(folder / name)["rows"] if row["stage"]] == ["one", "two"]
    for stage in ("one", "two"):
        stored = torch.load(folder / name / stage / "checkpoint_last.pt", weights_only=True)
        assert stored["step"] == 3 and bool(stored["scaler"]) == (name == "staged fp16")
        if name != "staged fp16":
            found = contrastive_losses(folder / name / stage)
            assert len(found) >= 4
            assert found == pytest.approx(contrastive_losses(staged_on_cpu / name / stage),
                                          rel=1e-4, abs=1e-4)


def test_a_staged_step_that_does_not_log_does_not_wait_for_the_device(device):
    """Each stretch ends with a step's update; of either stage the third logs, scores and saves."""
    first, two, three, four, five, six, rest = device[2]["staged"]["stretches"]
    assert two["waits"] == three["waits"] == five["waits"] == six["waits"] == []
    assert first["waits"] and four["waits"] and rest["waits"], "the count counts"


# -----------------------------------------------------------------------------
# In the process with the device

def facts(kind):
    """What a device of this kind does and refuses, asserted."""
    ones = torch.ones(2, 3, device=kind)
    assert str(ones.device) == f"{kind}:0" and torch.zeros(2).to(kind).device == ones.device

    def refused(error, words, call):
        with pytest.raises(error, match=words):
            call()
    # places
    both = f"Expected all tensors to be on the same device.* {kind}:0 and cpu!"
    refused(RuntimeError, both, lambda: ones + torch.ones(3))
    refused(RuntimeError, both, lambda: F.linear(torch.ones(2, 3), ones))
    refused(RuntimeError, both, lambda: torch.where(ones > 0, torch.ones(3), ones))
    assert (ones + torch.tensor(1.0)).sum().item() == 12 and (2 * ones).device == ones.device
    rows = torch.tensor([1, 0])
    assert ones[rows].device == ones.device
    refused(RuntimeError, "indices should be", lambda: torch.ones(2, 3)[rows.to(kind)])
    for call in (ones.cuda, lambda: torch.ones(1).to(0), lambda: torch.nn.Linear(1, 1).to(0),
                 lambda: torch.zeros(1, device=0), lambda: torch.zeros(1, device="cuda")):
        refused(AssertionError, "not compiled with CUDA", call)
    refused(TypeError, f"can't convert {kind}:0 device type tensor to numpy", ones.numpy)
    # what is not for mps
    if kind == "mps":
        words = "the MPS framework doesn't support float64"
        for call in (ones.double, lambda: torch.ones(1, dtype=torch.float64).to(kind),
                     lambda: torch.zeros(1, device=kind, dtype=torch.float64)):
            refused(TypeError, words, call)
        refused(RuntimeError, "pin memory", torch.ones(1).pin_memory)
        refused(RuntimeError, "loses data", lambda: torch.ones(1).to(kind, non_blocking=True))
    else:
        assert ones.double().dtype == torch.float64 and torch.ones(1).pin_memory().is_pinned()
    for low in (torch.float16, torch.bfloat16):
        with torch.autocast(kind, dtype=low):
            product = F.linear(ones, ones)
            assert product.dtype == F.conv2d(ones[None, None], ones[None, None]).dtype == low
            heads = ones[None, None]
            assert F.scaled_dot_product_attention(heads, heads, heads).dtype == low
            for exact in (F.layer_norm(product, (2,)), product.softmax(-1), product.exp(),
                          product.sum(), F.cross_entropy(product, rows.to(kind)),
                          torch.cat([product, ones], dim=1), product + ones[:, :2]):
                assert exact.dtype == torch.float32
            assert torch.cat([product, product]).dtype == low
        assert F.linear(ones, ones).dtype == torch.float32
    # random numbers of its own
    torch.manual_seed(3)
    first, host = torch.rand(4, device=kind).cpu(), torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4), host)
    assert torch.equal(torch.rand(4, device=kind).cpu(), first)


def attempt(work):
    """-> {"error": a traceback or "", ...}: what came of it, and where it waited meanwhile."""
    import simulated_device
    simulated_device.stretches[:] = []
    simulated_device.next_stretch()
    found = {"error": ""}
    try:
        found |= work() or {}
    except Exception as error:
        found |= {"error": traceback.format_exc(), "exit_code": getattr(error, "exit_code", 1)}
    return {**found, "stretches": list(simulated_device.stretches)}


def run_script(path, *flags, stop_after=0):
    """main() of the script at `path`; a SIGTERM comes in the optimiser's step `stop_after`."""
    script, steps = runpy.run_path(str(path)), []

    def count(*_):
        steps.append(1)
        if len(steps) == stop_after:
            signal.raise_signal(signal.SIGTERM)
    hook = register_optimizer_step_post_hook(count)
    try:
        found = script["main"](script["get_args"](list(map(str, flags))))
        return {key: found[key] for key in ("accuracy", "mean_recall") if key in found}
    finally:
        hook.remove()


def drive(kind, folder):
    """Everything that is to happen on the simulated device; writes happened.json."""
    common, happened = [*TINY, "--device", kind], {"facts": attempt(lambda: facts(kind))}
    happened["doctor"] = attempt(lambda: examine(kind, seconds=0))
    for name, flags in RUNS.items():
        happened[name] = attempt(lambda: run_script(
            SCRIPT, *common, *flags, "--output-dir", folder / name))
    stopped = [*common, *RUNS["fp32"], "--output-dir", folder / "stopped"]
    exit_code = attempt(lambda: run_script(SCRIPT, *stopped, "--save-every", 2, stop_after=4))
    happened["stopped"] = {**attempt(lambda: run_script(SCRIPT, *stopped)),
                           "exit_code": exit_code.get("exit_code")}
    evaluate = [*common, "--eval-only", "--output-dir", folder / "fp32"]
    happened["evaluated"] = attempt(lambda: run_script(SCRIPT, *evaluate))
    evaluate[evaluate.index("--workers") + 1] = "1"
    happened["workers"] = attempt(lambda: run_script(SCRIPT, *evaluate))
    scenes(folder / "scenes", 24, 12)
    for name, flags in PAIRS.items() if kind == "npu" else [(n, PAIRS[n]) for n in BOTH]:
        happened[name] = attempt(lambda: run_script(CONTRASTIVE, *tiny_flags(
            folder / "scenes", *flags, "--device", kind, "--output-dir", folder / name)))
    happened["pairs evaluated"] = attempt(lambda: run_script(CONTRASTIVE, *tiny_flags(
        folder / "scenes", "--eval-only", "--device", kind, "--output-dir", folder / "pairs")))
    store(folder)
    for name in TAUGHT if kind == "npu" else ["taught"]:
        happened[name] = attempt(lambda: run_script(DISTILL, *taught_flags(folder, name, kind)))
    start_of_stages(folder)
    for name in STAGES if kind == "npu" else ["staged"]:
        happened[name] = attempt(lambda: run_script(STAGED, *staged_flags(folder, name, kind)))
    source = SCRIPT.read_text("utf-8")
    for name, (right, wrong, _) in FAULTS.items():
        assert source.count(right) == 1, name
        copy = folder / f"wrong_{name}" / SCRIPT.name
        copy.parent.mkdir()
        copy.write_text(source.replace(right, wrong), "utf-8")
        happened[f"fault {name}"] = attempt(lambda: run_script(
            copy, *common, "--output-dir", copy.parent / "run", "--dry-run"))
    (folder / "happened.json").write_text(json.dumps(happened))


if __name__ == "__main__":
    drive(sys.argv[1], pathlib.Path(sys.argv[2]))
