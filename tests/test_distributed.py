"""Several processes compute what one computes: gradients, weights and printed numbers."""
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent


def torchrun(processes, *command, seconds=300):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(processes), *map(str, command)], capture_output=True, text=True, timeout=seconds,
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


# Each process takes its strided share of a batch of 7, in fp64, then sums. Process 0 also computes
# the whole batch alone and prints the largest difference, and whether all processes agree to the bit.
GRADIENT = '''
import dataclasses, hashlib, sys, types
sys.path[:0] = ["tests", "."]
import torch
import test_train_clipfit as t
import train_clipfit
from device import start, Run

run = start("cpu", "fp32")
model = t.perturbed(t.SMALL, torch.float64)
_, texts = t.texts_of(t.CLASSES)
images, labels = t.batch_for(t.SMALL, 7, len(t.CLASSES), torch.float64)
anchor = t.clip_model.unit(torch.randn(len(t.CLASSES), 32, dtype=torch.float64,
                                       generator=torch.Generator().manual_seed(0)))
args = types.SimpleNamespace(reg_weight=8.0, micro_batch=2, accum_steps=1)
mine = slice(run.rank, None, run.world_size)
losses = train_clipfit.add_gradient(run, model, images[mine], labels[mine], 7, texts, anchor, args,
                                    run.scaler())
free = train_clipfit.free_clipfit_weights(model)
run.sum_gradients(free.values())
losses = {name: float(run.sum(value)) for name, value in losses.items()}
summed = {name: p.grad.clone() for name, p in free.items()}
digest = hashlib.sha256(b"".join(g.numpy().tobytes() for g in summed.values())).hexdigest()
agree = len(set(run.gather_objects(digest))) == 1
if run.rank == 0:
    model.zero_grad(set_to_none=True)
    alone = Run(run.device, "fp32", 0, 1, 0, "")
    whole = train_clipfit.add_gradient(alone, model, images, labels, 7, texts, anchor, args,
                                       alone.scaler())
    worst = max((summed[n] - p.grad).abs().max().item() for n, p in free.items())
    worst = max([worst] + [abs(losses[n] - float(whole[n])) for n in losses])
    print("RESULT", worst, agree)
run.barrier()
torch.distributed.destroy_process_group()
'''


@pytest.mark.parametrize("processes", [2, 3])
def test_the_gradient_over_processes_is_that_of_one(tmp_path, processes):
    script = tmp_path / "gradient.py"
    script.write_text(GRADIENT)
    out = torchrun(processes, script)
    _, worst, agree = next(line for line in out.splitlines() if line.startswith("RESULT")).split()
    assert float(worst) < 1e-12 and agree == "True"


FLAGS = ["--data", "demo", "--shots", "8", "--epochs", "4", "--batch-size", "32", "--log-every",
         "2", "--workers", "0", "--device", "cpu"]


def logged(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["split"], row["step"], {
        key: row[key] for key in ("loss", "ce", "drift", "batch_accuracy", "lr", "accuracy",
                                  "macro_f1") if key in row}) for row in rows]


def test_two_and_three_processes_print_the_numbers_of_one(tmp_path):
    folders = {}
    for processes in (1, 2, 3):
        folders[processes] = tmp_path / str(processes)
        out = torchrun(processes, "train_clipfit.py", *FLAGS, "--output-dir", folders[processes])
        assert out.count("2,944 of 7,788,545 weights move") == 1  # only the first process speaks
    one = logged(folders[1])
    assert [row["split"] for row in map(
        json.loads, (folders[1] / "metrics.jsonl").read_text().splitlines())].count("train") == 4
    for processes in (2, 3):
        other = logged(folders[processes])
        assert [row[:2] for row in other] == [row[:2] for row in one]
        for (split, step, ours), (_, _, theirs) in zip(one, other):
            for key in ours:
                assert theirs[key] == pytest.approx(ours[key], rel=1e-4, abs=1e-5), (split, step)
        first, second = (torch.load(folders[n] / "checkpoint_last.pt", weights_only=True)["weights"]
                         for n in (1, processes))
        for name in first:
            assert torch.allclose(first[name], second[name], atol=1e-5), name


def test_a_run_of_two_processes_goes_on_with_one(tmp_path):
    """The order of samples is a function of seed and epoch, whoever takes them."""
    torchrun(2, "train_clipfit.py", *FLAGS, "--output-dir", tmp_path / "whole")
    torchrun(2, "train_clipfit.py", *FLAGS, "--output-dir", tmp_path / "moved")
    (tmp_path / "moved" / "results.json").unlink()  # as if it had been stopped before its end
    (tmp_path / "moved" / "checkpoint_last.pt").unlink()
    torchrun(1, "train_clipfit.py", *FLAGS, "--output-dir", tmp_path / "moved")
    first, second = (torch.load(tmp_path / n / "checkpoint_last.pt", weights_only=True)["weights"]
                     for n in ("whole", "moved"))
    for name in first:
        assert torch.allclose(first[name], second[name], atol=1e-5), name
