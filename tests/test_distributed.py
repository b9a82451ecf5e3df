"""Several processes compute what one computes: gradients, weights and printed numbers."""
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback

import pytest
import torch

import test_train_contrastive as contrastive
import train_contrastive
from clip_model import bert_fields, BertConfig, CLIP, CONFIGS, save
from device import Run, start

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
import dataclasses, hashlib, os, sys, types
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
args = types.SimpleNamespace(reg_weight=8.0, micro_batch=2, accum_steps=1, text_memory=4)
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
sys.stdout.flush()
os._exit(0)  # as `guard` leaves
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


# -----------------------------------------------------------------------------
# train_contrastive.py. Forks of this process stand for processes that torchrun starts: the same
# group and exit codes, without seconds of importing.

def in_processes(count, work, seconds=120):
    """work(rank) in `count` processes that find each other -> (exit codes, 128 + n after signal n;
    what they said, together)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out, children = tempfile.TemporaryFile(), []
    for rank in range(count):
        children.append(os.fork())
        if children[-1]:
            continue
        code = 1
        try:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))
            code = work(rank) or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    codes, deadline = [None] * count, time.monotonic() + seconds
    while None in codes and time.monotonic() < deadline:
        for rank, child in enumerate(children):
            if codes[rank] is None:
                done, status = os.waitpid(child, os.WNOHANG)
                codes[rank] = os.waitstatus_to_exitcode(status) if done else None
        time.sleep(0.01)
    for child, code in zip(children, codes):
        if code is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    with out:
        out.seek(0)
        said = out.read().decode()
    assert None not in codes, f"still running after {seconds} s: {said}"
    return [code if code >= 0 else 128 - code for code in codes], said


def compare_steps(rank):
    """A batch of 11 pairs with partners across processes, over the processes and here alone, in
    fp64: prints the largest difference of any loss, of any gradient, of any weight after each of up
    to 5 steps of AdamW, and of local negatives from the mean of the processes' own losses."""
    run, worst = start("cpu", "fp32"), {}
    alone = Run(run.device, "fp32", 0, 1, 0, "")
    shares = [list(range(r, 11, run.world_size)) for r in range(run.world_size)]
    counts, order = [len(share) for share in shares], sum(shares, [])

    def note(name, ours, theirs):
        scale = max(1.0, float(theirs.detach().abs().max()))
        worst[name] = max(worst.get(name, 0.0), float((ours - theirs).abs().max()) / scale)

    def take(model, run, places, batch, counts, args):
        model.zero_grad(set_to_none=True)
        found = train_contrastive.add_gradient(run, model, *(x[places] for x in batch), counts,
                                               args, run.scaler(), 3)
        run.sum_gradients(model.parameters())
        return {name: run.sum(value) for name, value in found.items()}
    rates = contrastive.types.SimpleNamespace(lr=1e-3, image_lr=None, text_lr=None, wd=0.1,
                                              tower_wd=None)
    cases = [*contrastive.LOSSES, ("infonce", "hardest"), ("siglip", "hardest")]
    for (loss, kind), positives in zip(cases, [*["mask"] * 6, "multi", "multi"]):
        args = contrastive.options(loss=loss, triplet=kind, positives=positives, micro_batch=2,
                                   tile=3)
        ours, theirs = (contrastive.model_of(torch.float64) for _ in range(2))
        moves = [torch.optim.AdamW(train_contrastive.decay_groups(model, rates), eps=1e-6)
                 for model in (ours, theirs)]
        for step in range(5 if (loss, positives) == ("infonce", "mask") else 1):
            batch = contrastive.batch_of(11, torch.float64, seed=step)
            found = take(ours, run, shares[rank], batch, counts, args)
            whole = take(theirs, alone, order, batch, [11], args)
            for name in whole:
                note("loss", found[name], whole[name])
            for p, q in zip(ours.parameters(), theirs.parameters()):
                if q.grad is not None:
                    note("gradient", p.grad, q.grad)
            for move in moves:
                move.step()
            for p, q in zip(ours.parameters(), theirs.parameters()):
                note(f"step {step + 1}", p, q)

    args = contrastive.options(micro_batch=2, tile=3, local_negatives=True)
    model, batch = contrastive.model_of(torch.float64), contrastive.batch_of(11, torch.float64)
    found = take(model, run, shares[rank], batch, counts, args)
    local = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    total = 0.0
    for share in shares:
        images, tokens, ids = (x[share] for x in batch)
        total = total + contrastive.defined_loss(*model(images, tokens)[:2], ids, model.logit_scale
                                                 .exp(), 0, args) / len(shares)
    total.backward()
    note("local", found["loss"], total)
    for name, p in model.named_parameters():
        if p.grad is not None:
            note("local", local[name], p.grad)
    print("RESULT " + json.dumps(worst))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("processes", [2, 3])
def test_contrastive_steps_over_processes_are_those_of_one(processes):
    codes, said = in_processes(processes, compare_steps)
    assert codes == [0] * processes, said
    results = [json.loads(line.removeprefix("RESULT ")) for line in said.splitlines()
               if line.startswith("RESULT")]
    assert len(results) == processes
    for worst in results:
        assert set(worst) == {"loss", "gradient", "local", *(f"step {i}" for i in range(1, 6))}
        assert max(worst.values()) < 1e-12, worst


def script(flags):
    """The exit code of train_contrastive.py with these flags."""
    return train_contrastive.guard(train_contrastive.main, train_contrastive.get_args,
                                   [str(flag) for flag in flags])


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory):
    """Folder, flags of a run of six steps of 7 pairs, three an epoch, without dropout, and a
    function that gives its folder from some number of processes."""
    folder = tmp_path_factory.mktemp("contrastive")
    contrastive.scenes(folder / "pairs", 24, 12)
    text = BertConfig("bert", len(contrastive.WORDS), 32, 2, 2, 64, 64, dropout=0.0,
                      attention_dropout=0.0)
    torch.manual_seed(0)
    weights = save(CLIP(dataclasses.replace(CONFIGS["tiny-vit"], **bert_fields(text),
                                            embed_dim=16)), folder / "start", "hf")
    flags = ["--data", folder / "pairs", "--weights", weights, "--model", "start", "--tokenizer",
             folder / "pairs" / "vocab.txt", "--batch-size", 7, "--micro-batch", 2, "--epochs", 2,
             "--lr", 5e-4, "--eps", 1e-4, "--crop", 0.9, "--workers", 0, "--device", "cpu",
             "--log-every", 1]

    def run_of(processes):
        out = folder / str(processes)
        if not out.exists():
            codes, said = in_processes(processes, lambda rank: script(
                [*flags, "--output-dir", out]))
            assert codes == [0] * processes, said
            assert said.count("weights train") == 1  # only the first process speaks
        return out
    return folder, flags, run_of


def stored(folder):
    return torch.load(folder / "checkpoint_last.pt", weights_only=True)


@pytest.mark.parametrize("processes", [2, 3])
def test_contrastive_runs_of_several_processes_print_the_numbers_of_one(six_steps, processes):
    """7 pairs leave uneven shares, which divide into other pieces."""
    run_of = six_steps[2]
    one, several = ([json.loads(line) for line in (run_of(n) / "metrics.jsonl").read_text()
                     .splitlines()] for n in (1, processes))
    assert len(one) == len(several) == 6 + 2 + 1
    clock = {"samples_per_second", "data_wait", "memory_mb", "time"}
    for ours, theirs in zip(one, several):
        assert ours.keys() == theirs.keys()
        assert (ours["split"], ours["epoch"]) == (theirs["split"], theirs["epoch"])
        for key in set(ours) - clock - {"split", "epoch"}:
            assert theirs[key] == pytest.approx(ours[key], rel=1e-5, abs=1e-6), key
    first, second = (stored(run_of(n))["weights"] for n in (1, processes))
    for name in first:
        assert torch.allclose(first[name], second[name], atol=1e-6, rtol=0), name


@pytest.fixture
def two_hosts():
    """Names and addresses of two network namespaces joined by a cable, as two hosts are."""
    names, ends = ([f"{kind}{os.getpid() % 100_000}{i}" for i in "ab"] for kind in ("host", "c"))
    hosts = list(zip(names, ends, ("10.213.7.1", "10.213.7.2")))
    commands = [f"ip netns add {name}" for name in names]
    commands += [f"ip link add {ends[0]} type veth peer name {ends[1]}"]
    for name, end, address in hosts:
        commands += [f"ip link set {end} netns {name}", f"ip -n {name} link set lo up",
                     f"ip -n {name} addr add {address}/24 dev {end}",
                     f"ip -n {name} link set {end} up"]
    try:
        for command in commands:
            try:
                subprocess.run(command.split(), check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', '') or error}")
        yield hosts
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_two_hosts_print_the_numbers_of_one(six_steps, two_hosts, tmp_path):
    _, flags, run_of = six_steps
    at_work = [subprocess.Popen(
        ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
         "--node-rank", str(number), "--nproc-per-node", "1", "--master-addr", two_hosts[0][2],
         "--master-port", "29400", "train_contrastive.py", *map(str, flags), "--output-dir",
         str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=ROOT, env={**os.environ, "GLOO_SOCKET_IFNAME": end, "OMP_NUM_THREADS": "1"})
        for number, (name, end, _) in enumerate(two_hosts)]
    said = [process.communicate(timeout=120)[0] for process in at_work]
    assert [process.returncode for process in at_work] == [0, 0], "".join(said)
    assert "processes 2" in said[0] and "weights train" not in said[1]
    ours, theirs = stored(tmp_path / "run"), stored(run_of(2))
    assert ours["step"] == 6 and ours["best"] == theirs["best"]
    for name in theirs["weights"]:
        assert torch.equal(ours["weights"][name], theirs["weights"][name]), name


def test_two_processes_of_which_one_was_killed_go_on_to_the_same_bits(six_steps, tmp_path):
    _, flags, run_of = six_steps
    flags = [*flags, "--save-every", 2, "--output-dir", tmp_path]

    def dying(rank):
        step, taken = train_contrastive.add_gradient, []

        def counted(*args):
            taken.append(1)
            if len(taken) == 5 and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(*args)
        train_contrastive.add_gradient = counted
        return script(flags)
    codes, said = in_processes(2, dying)
    assert codes == [3, 128 + signal.SIGKILL] and "has ended" in said
    assert stored(tmp_path)["step"] == 4
    codes, said = in_processes(2, lambda rank: script(flags))
    assert codes == [0, 0], said
    whole, killed = stored(run_of(2)), stored(tmp_path)
    assert whole["step"] == killed["step"] == 6 and whole["best"] == killed["best"]
    for name in whole["weights"]:
        assert torch.equal(whole["weights"][name], killed["weights"][name]), name
    for i, moments in whole["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, killed["optimizer"]["state"][i][name])


def test_a_contrastive_batch_smaller_than_the_processes_is_exact(six_steps):
    _, flags, _ = six_steps
    flags = list(flags)
    flags[flags.index("--batch-size") + 1] = 2
    codes, said = in_processes(3, lambda rank: script([*flags, "--check-grad"]))
    assert codes == [0, 0, 0] and "against autograd on all 2" in said, said


def test_pairs_without_captions_end_all_processes_with_one_reason(tmp_path):
    contrastive.scenes(tmp_path / "pairs", 12, captions=0)
    codes, said = in_processes(2, lambda rank: script(["--data", tmp_path / "pairs"]))
    assert codes == [2, 2]
    reasons = [line.partition("error: ")[2] for line in said.splitlines() if "error: " in line]
    assert len(set(reasons)) == 1 and "caption" in reasons[0] and "Traceback" not in said


def test_each_process_of_run_clip_brings_its_own_batch(six_steps):
    _, flags, _ = six_steps
    flags = list(flags)
    at = flags.index("--batch-size")
    flags[at:at + 2] = ["--per_device_train_batch_size", 5]
    codes, said = in_processes(2, lambda rank: script(
        [*flags, "--check-grad", "--local-negatives"]))
    assert codes == [0, 0] and "against autograd on all 10" in said, said
