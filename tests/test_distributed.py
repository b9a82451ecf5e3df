"""Several processes compute what one computes: gradients, weights and printed numbers."""
import itertools
import math
import os
import signal

import pytest
import torch

import device
from device import load_checkpoint, SafeStop, start, UserError
from helpers import (at_step, bad_steps, checkpoint, cli, die, metrics, numbers, processes, results,
                     run_folder, same_run, script, script_data, script_flags, skipped)


def test_a_gradient_that_only_one_process_has_is_the_sum_and_what_one_finds_all_raise(tmp_path):
    """That a step's gradient is that of one process: test_train_contrastive.py."""
    def together(rank):
        run, args = start("cpu"), device.Parser()
        unused, once = (torch.nn.Parameter(torch.ones(2).double()) for _ in range(2))
        if rank == 1:
            once.grad = torch.full((2,), 3.0).double()
        run.sum_gradients([unused, once])
        assert unused.grad is None and once.grad.tolist() == [3, 3]
        assert run.gather_objects(rank) == [0, 1]
        total = run.sum(rank)  # a whole number stays one
        assert total == 1 and type(total) is int
        device.add_run_flags(args, log_every=1)
        args = args.parse_args([])
        assert run.begin(tmp_path / "run", args, {"method": "toy"}) == (None, None)
        with pytest.raises(RuntimeError, match="division"):
            run.on_first(lambda: 1 / 0)
        with pytest.raises(SafeStop):
            run.save("x_last.pt", {"x": torch.tensor(math.nan)})
        for identity, word in (({"method": "other"}, "method"), ({"data": rank}, "disks")):
            with pytest.raises(UserError, match=word) as caught:
                run.enter(1).begin(tmp_path / "run", args, identity)
            assert caught.value.shared
        assert run.finish({"x": 1})["processes"] == 2
        torch.distributed.destroy_process_group()
    for result in processes(2, together):
        result.ok()
    said = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert sum(line.startswith("device cpu") for line in said) == 1


def test_a_step_that_is_bad_in_one_process_is_skipped_by_all(data, tmp_path):
    """Step 2 by the loss of one; 4 to 6 by gradients of the other, once they are summed."""
    def work(rank):
        real, steps = device.Run.update, itertools.count(1)

        def update(run, *args, loss=None, **options):
            bad = next(steps) == 2 and rank
            return real(run, *args, loss=loss * math.nan if bad else loss, **options)
        device.Run.update = update
        bad_steps(*[] if rank else (4, 5, 6))
        return script("train_clipfit", *script_flags("clipfit", data, "--save-every", 3,
                                                     "--output-dir", tmp_path))
    first, second = processes(2, work)
    assert (first.code, second.code) == (3, 3) and "intact" in first.out
    assert [line.count(".png") >= 2 for line in skipped(tmp_path)] == [True] * 3
    stored = checkpoint(tmp_path)
    assert stored["step"] == 3 and all(x.isfinite().all() for x in stored["weights"].values())


def test_an_error_of_one_ends_the_others_and_a_busy_port_is_named(tmp_path):
    def one_fails(rank):
        def main(args):
            run = start("cpu")
            if run.rank == 1:
                raise UserError("the file is missing")
            run.gather_objects(None)
        return device.guard(main, lambda argv: None, [])
    first, second = processes(2, one_fails)
    assert second.code == 2 and "process 1: error: the file is missing" in second.out
    assert first.code == 3 and "Traceback" not in first.out

    def no_port(args):
        os.environ["MASTER_PORT"] = "70000"
        start("cpu")
    result, _ = processes(2, lambda rank: device.guard(no_port, lambda argv: None, []))
    assert result.code == 2 and "MASTER_PORT" in result.out and "Traceback" not in result.out


# -----------------------------------------------------------------------------
# The scripts

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What the scripts train on, with an image that cannot be read."""
    folder = script_data(tmp_path_factory.mktemp("data"))
    (folder / "pairs" / "3.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def run_of(data, tmp_path_factory):
    """(script, number of processes) -> the folder of such a run."""
    parent = tmp_path_factory.mktemp("runs")

    def run(name, count):
        out = parent / f"{name}{count}"
        if not out.exists():
            ended = processes(count, lambda rank: script(
                f"train_{name}", *script_flags(name, data, "--output-dir", out)))
            for rank, result in enumerate(ended):
                result.ok()
                assert not rank or not result.out, "only the first process speaks"
        return run_folder(out)
    return run


@pytest.mark.parametrize("name, count", [
    ("clipfit", 2), ("contrastive", 2), ("contrastive", 3), ("distill", 2), ("staged", 3)])
def test_several_processes_print_the_numbers_of_one(run_of, name, count):
    one, several = numbers(run_of(name, 1)), numbers(run_of(name, count))
    assert len(one) == len(several) >= 6
    for ours, theirs in zip(one, several):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert theirs[key] == (value if not isinstance(value, float) else
                                   pytest.approx(value, rel=1e-4, abs=1e-5)), key
    first, second = (checkpoint(run_of(name, n))["weights"] for n in (1, count))
    for key in first:  # where a gradient is all rounding, Adam still makes steps of it
        assert torch.allclose(first[key], second[key], atol=2e-4), key


def test_two_processes_of_which_one_was_killed_go_on_to_the_same_bits(run_of, data, tmp_path):
    out = tmp_path / "killed"
    words = script_flags("contrastive", data, "--save-every", 2, "--output-dir", out)

    def dying(rank):
        at_step(5, die if rank else lambda: None)
        return script("train_contrastive", *words)
    first, second = processes(2, dying)
    assert (first.code, second.code) == (3, 128 + signal.SIGKILL) and "has ended" in first.out
    assert checkpoint(out)["step"] == 4
    for result in processes(2, lambda rank: script("train_contrastive", *words)):
        result.ok()
    same_run(run_of("contrastive", 2), out)


def test_the_number_of_processes_may_change_within_a_run(run_of, data, tmp_path):
    """The order of samples is a function of seed and epoch, whoever takes them."""
    out = tmp_path / "moved"
    words = script_flags("clipfit", data, "--output-dir", out)

    def stopped(rank):
        def signals():  # to one; the echo that torchrun makes is not a second one
            for _ in range(2 * rank):
                os.kill(os.getpid(), signal.SIGTERM)
        at_step(4, signals)
        return script("train_clipfit", *words)
    assert [result.code for result in processes(2, stopped)] == [143, 143]
    step = load_checkpoint(out / "checkpoint_last.pt")["step"]
    assert script("train_clipfit", *words) == 0
    whole, moved = (checkpoint(folder)["weights"] for folder in (run_of("clipfit", 1), out))
    assert 4 <= step < 6 and len(metrics(out, "train")) == 6
    assert all(torch.allclose(whole[key], moved[key], atol=1e-5) for key in whole)


def test_torchrun_starts_a_script(tmp_path, data):
    done = cli("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2,
               "train_contrastive.py", *script_flags("contrastive", data, "--max-steps", 2,
                                                   "--output-dir", tmp_path / "run")).ok()
    assert "processes 2" in done.out and results(tmp_path / "run")["processes"] == 2
