"""Where the code runs, which process may write, and what a run keeps.

`start` picks device, precision and processes; the `Run` it returns keeps a training loop free of
device, precision and process tests. Every process calls its methods at the same point, and only
the first one prints or touches a file.

Four promises: the device asked for is the device used; every number comes out the same for any
number of processes; a checkpoint on disk is whole or absent, whenever the machine stops; no file
that is read can run code. Import this file before torch: it sets variables that torch reads once.
"""
import argparse
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import difflib
import errno
import json
import math
import os
import pathlib
import platform
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
import zipfile

# An operation that Apple's GPUs lack runs on the CPU instead of ending the run.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
# Idle CPU threads spin by default and steal the cores from loader workers and other programs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# torch would import torch_npu itself, and a broken one would end every program; see `Kind.absent`.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import numpy as np
import torch
import torch.distributed as dist

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PATIENCE = datetime.timedelta(minutes=30)  # for other processes: the first may be downloading
BAD_STEPS = 3  # in a row: one is a bad batch, three are a run that has come apart
LAST, BEST = "checkpoint_last.pt", "checkpoint_best.pt"


class UserError(Exception):
    """The user can fix it. One line: what is wrong, what was expected, what to do."""
    exit_code = 2


class SafeStop(Exception):
    """The run stopped before it could do harm; the last good checkpoint is intact."""
    exit_code = 3


class Interrupted(Exception):
    """A signal stopped the run after it saved; `exit_code` is 128 + the signal's number."""
    exit_code = 130


# -----------------------------------------------------------------------------
# Devices

class Kind:
    """What differs between devices: torch.cuda, .npu, .mps and .cpu only look alike."""

    def __init__(self, name, backend, pinned=False, workers=4, context=None):
        self.name = name
        self.backend = backend  # of the process group; "" where there can be one process only
        self.pinned = pinned    # has numbers, and pinned memory; on mps such a copy can lose data
        self.workers = workers  # most loader processes by default
        self.context = context  # how they start; None: as Python does on this system

    @property
    def module(self):
        return getattr(torch, self.name)

    def absent(self):
        """Why there is no such device, or ""."""
        if self.name == "npu" and not hasattr(torch, "npu"):
            try:
                import torch_npu  # noqa: F401
            except Exception as error:  # a missing CANN library shows up as almost any type
                return (f"{one_line(error)}: install the torch_npu made for torch "
                        f"{torch.__version__}, and source CANN")
        home = torch.backends.mps if self.name == "mps" else self.module
        return "" if home.is_available() else f"torch {torch.__version__} finds none it can use"

    def precisions(self, device):
        """Names of what autocast can compute in, and computes right."""
        bf16, fp16 = True, True
        if self.name == "cuda":  # emulated bf16 exists on older GPUs and is slower than fp32
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        elif self.name == "npu":
            bf16 = torch.npu.is_bf16_supported()
            # Older ones saturate at 65504 where others give inf: an overflow would go unseen.
            fp16 = getattr(torch.npu.utils, "is_support_inf_nan", lambda: False)()
        elif self.name == "mps":
            fp16 = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) >= (2, 8)
            try:
                torch.ones(1, device=device, dtype=torch.bfloat16).add(1)
            except (TypeError, RuntimeError):  # an old system
                bf16 = False
        return ["fp32"] + ["bf16"] * bf16 + ["fp16"] * fp16

    def count(self):
        return self.module.device_count() if self.pinned else 1

    def select(self, index):
        if self.pinned:
            self.module.set_device(index)
            self.module.reset_peak_memory_stats()
        elif self.name == "cpu" and sys.platform == "linux":
            # By default glibc gives every activation over 32 MB back to the system and faults it
            # in again at its next use: SqueezeNet took 62 ms an image instead of 35 on one core.
            with contextlib.suppress(OSError, AttributeError):  # another C library
                libc = ctypes.CDLL(None)
                libc.mallopt(-3, 1 << 30)       # M_MMAP_THRESHOLD
                libc.mallopt(-1, 2 ** 31 - 1)   # M_TRIM_THRESHOLD

    def memory(self):
        """Bytes in use; the peak where the device keeps one."""
        if self.name != "cpu":
            return (self.module.max_memory_allocated() if self.pinned
                    else self.module.driver_allocated_memory())
        try:
            import resource
        except ImportError:  # Windows
            return 0
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


KINDS = {"cuda": Kind("cuda", "nccl", True), "npu": Kind("npu", "hccl", True),
         "mps": Kind("mps", "", workers=0, context="spawn"),
         "cpu": Kind("cpu", "gloo")}  # the order in which "auto" tries them


def start(device="auto", precision="auto", seed=0, deterministic=False):
    """Choose where and how to run, join the other processes, seed, and say so in one line -> Run.

    device: auto, cuda, cuda:N, npu, npu:N, mps or cpu; one that is not there raises UserError.
    precision: auto, fp32, bf16 or fp16. seed: the same in every process.
    """
    tolerate_any_locale()
    rank, local_rank, world_size = torchrun_environment()
    device, why = pick_device(str(device), local_rank, world_size)
    precision, why_precision = pick_precision(device, precision)
    if world_size > 1 and not dist.is_initialized():  # after the device was made this process's
        join_group(device, world_size)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
    run = Run(device, precision, rank, world_size, seed)
    run.say(f"device {device}{why} | precision {precision}{why_precision} | processes {world_size}"
            f" | threads {torch.get_num_threads()} | torch {torch.__version__}")
    return run


def torchrun_environment():
    """(rank, local rank, number of processes) as torchrun put them into the environment."""
    if os.environ.get("WORLD_SIZE", "") in ("", "0", "1"):
        return 0, 0, 1
    try:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
        *found, port = (int(os.environ[name]) for name in names)
        if not port or not os.environ["MASTER_ADDR"]:  # port 0: each would take one of its own
            raise ValueError("MASTER_PORT or MASTER_ADDR")
        return tuple(found)
    except (KeyError, ValueError) as error:
        raise UserError(f"WORLD_SIZE is set in the environment, but not all that torchrun sets "
                        f"({one_line(error)}): for one process `unset WORLD_SIZE RANK LOCAL_RANK`, "
                        "for several `torchrun --standalone --nproc-per-node 2 SCRIPT.py ...`"
                        ) from error


def join_group(device, world_size):
    backend = KINDS[device.type].backend
    bound = {"device_id": device} if backend == "nccl" else {}  # spares nccl a guess
    try:
        dist.init_process_group(backend, timeout=PATIENCE, **bound)
    except (RuntimeError, ValueError, OverflowError) as error:  # the last: a port above 65535
        why = "several got the same GPU" if "Duplicate GPU" in str(error) else one_line(error)[:150]
        raise UserError(f"the {world_size} processes cannot meet at {os.environ['MASTER_ADDR']}:"
                        f"{os.environ['MASTER_PORT']} ({why}): expected a free port and, on GPUs, "
                        "one for each; `torchrun --standalone` finds a port") from error


def pick_device(asked, local_rank=0, world_size=1):
    """-> torch.device, now this process's own, and in brackets why. UserError if it cannot be."""
    match = re.fullmatch(r"auto|(cuda|npu|mps|cpu)(?::(\d+))?", asked)
    if not match:
        raise UserError(f"--device {asked}: expected auto, cuda, cuda:N, npu, npu:N, mps or cpu")
    name, index, why = match[1], match[2], ""
    absent = {n: kind.absent() or ("" if world_size == 1 or kind.backend else
                                   f"one GPU for one process, and torchrun started {world_size}")
              for n, kind in KINDS.items()}
    here = {n: KINDS[n].count() for n in KINDS if not absent[n]}
    if asked == "auto":
        name = next(iter(here))
        passed = "; ".join(f"no {n}" for n in [*KINDS][:[*KINDS].index(name)])
        why = f" (auto; {passed})" if passed else " (auto)"
    problem, index = absent[name], int(index or 0)
    if not problem and world_size > 1 and name != "cpu":
        if match[2]:
            problem = f"{world_size} processes take one each; ask for {name} without a number"
        # Where the scheduler shows each process its own GPU alone, that is number 0.
        index = local_rank if here[name] > 1 else 0
    if not problem and index >= here[name]:
        problem = f"there is no number {index}"
    if problem:
        raise UserError(f"--device {asked} cannot be used: {problem}. Here there is: " + ", ".join(
            n if count == 1 else f"{n}:0 to {n}:{count - 1}" for n, count in here.items()))
    device = torch.device(name, index) if KINDS[name].pinned else torch.device(name)
    try:
        KINDS[name].select(index)
        torch.ones(1, device=device).add(1).cpu()
    except RuntimeError as error:  # busy, or too old for this torch
        raise UserError(f"{device} is listed but does not work: {one_line(error)}") from error
    return device, why


def pick_precision(device, asked):
    """-> the name of a precision that the device has, and in brackets why."""
    names = KINDS[device.type].precisions(device)
    if asked == "auto":
        if device.type != "cuda":
            return "fp32", " (auto)"
        if "bf16" in names:
            return "bf16", " (auto; this GPU computes bf16 natively, and it needs no loss scaling)"
        # Before tensor cores (Volta, 7.0) half precision is no faster than single.
        fast = torch.cuda.get_device_capability(device) >= (7, 0)
        return ("fp16", " (auto; no native bf16)") if fast else ("fp32", " (auto; an older GPU)")
    if asked not in names:
        raise UserError(f"--precision {asked}: expected auto, {', '.join(names)} on {device} with "
                        f"torch {torch.__version__}")
    slow = device.type == "cpu" and asked != "fp32"
    return asked, " (slow on most CPUs: `python -m tools.doctor` measures it)" if slow else ""


# -----------------------------------------------------------------------------
# Parts of a run

@dataclasses.dataclass
class Place:
    """Where training stands: what comes next (epoch, batch of it, step) and how far it goes."""
    epoch: int = 0
    batch: int = 0
    step: int = 0
    steps: int = 0    # of the whole run; set by the script
    batches: int = 0  # of an epoch; set by `Run.batches`


@dataclasses.dataclass
class Clock:
    """What training alone took, since the last line of the log: no validation, no saving."""
    steps: int = 0
    samples: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # seconds of these, for data


class Scaler:
    """Loss scaling for fp16 (Micikevicius et al. 2018): the scale halves when a gradient
    overflows and doubles after 2,000 steps that do not. Switched off it changes nothing."""

    def __init__(self, device, enabled):
        self.enabled = enabled
        self.value = torch.full((), 65536.0, device=device)
        self.good = torch.zeros((), device=device)  # steps since the last change

    def is_enabled(self):
        return self.enabled

    def get_scale(self):
        return float(self.value)  # waits for the device

    def scale(self, loss):
        return loss * self.value if self.enabled else loss

    def adapt(self, fine, overflow):
        """fine, overflow: bool (). Neither, where the loss itself was not finite: no change."""
        grown = fine & (self.good >= 1999)
        self.value.mul_(torch.where(overflow, 0.5, torch.where(grown, 2.0, 1.0)))
        self.good.add_(fine).mul_(~(overflow | grown))

    def state_dict(self):
        return {"value": self.value, "good": self.good} if self.enabled else {}

    def load_state_dict(self, state):
        if self.enabled and state:
            self.value.copy_(state["value"])
            self.good.copy_(state["good"])


class Gather(torch.autograd.Function):
    """Rows of all processes; backward, the sum over processes of the gradients of my rows.

    The usual gather without gradient gives the towers 1/W of it or, with local rows only, one
    that points elsewhere. torch.distributed.nn has such a function, but in a private place now.
    """
    @staticmethod
    def forward(ctx, x, counts):
        ctx.counts = counts
        mine = x.new_zeros(max(counts), *x.shape[1:])  # uneven shares travel padded
        mine[:len(x)] = x
        parts = [torch.empty_like(mine) for _ in counts]
        dist.all_gather(parts, mine)
        return torch.cat([part[:n] for part, n in zip(parts, counts)])

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)  # others may hold the original
        dist.all_reduce(grad)
        return grad.split(ctx.counts)[dist.get_rank()], None


class Run:
    """One run on one device. Public: device, precision, dtype, rank, world_size, seed, out, kind.

    dtype is what autocast computes in; weights stay fp32. out is the run's folder, a pathlib.Path,
    or None. Unless it says otherwise, a method is called by every process at the same point.
    """
    def __init__(self, device, precision, rank, world_size, seed):
        self.device, self.precision, self.dtype = device, precision, PRECISIONS[precision]
        self.rank, self.world_size, self.kind = rank, world_size, KINDS[device.type]
        self._early = []  # lines said before there was a folder, which may be refused
        self._start(seed)

    def enter(self, seed):
        """A Run on the same device and processes with another seed and clock, without a folder."""
        other = copy.copy(self)
        other._early = self._early[:1]  # its log too begins with the device
        other._start(seed)
        return other

    def _start(self, seed):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)  # every accelerator's generator too
        self.seed, self.out, self._identity = seed, None, {}
        self._log_every, self._save_every, self._logged = 20, 0, 0  # the last: lines of metrics
        self._began, self._peak, self._shown = time.monotonic(), 0.0, 0
        self._clock, self._asked, self._total = Clock(), self._began, [0, 0.0]  # samples, seconds
        self._steps, self._bad, self._fine = [], 0, None  # steps not looked at; skipped in a row
        self._signal, self._stopping = 0, 0  # seen by this process; agreed on by all
        self._scaler, self._buffers = None, []

    # -------------------------------------------------------------------------
    # Placement

    def move(self, *things):
        """Tensors or modules to the device. One thing comes back as itself, several as a tuple."""
        def to_device(x):
            # Only from pinned memory is a copy that nobody waits for safe.
            pinned = self.kind.pinned and torch.is_tensor(x) and (
                x.device.type == "cpu" and x.is_pinned())
            return x.to(self.device, non_blocking=True) if pinned else x.to(self.device)
        return to_device(things[0]) if len(things) == 1 else tuple(map(to_device, things))

    def autocast(self):
        """Context in which matrix products run in `dtype`; does nothing in fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @property
    def fused_attention(self):
        """Whether torch's fused attention is right and the faster one. On mps its kernel for
        short queries gave wrong numbers up to torch 2.12; on a CPU in bf16 plain products gave a
        ViT-B/16 step 1.4 times its speed (two Xeon cores with AMX)."""
        return self.device.type != "mps" and (self.device.type, self.precision) != ("cpu", "bf16")

    @property
    def fused_optimizer(self):
        """What to pass to torch.optim as `fused`: True on a CPU and on cuda, else None."""
        return True if self.device.type in ("cpu", "cuda") else None

    def scaler(self):
        """A loss scaler that scales in fp16 and lets everything pass otherwise."""
        return Scaler(self.device, self.precision == "fp16")

    def loader_options(self, workers=-1):
        """dict(workers, pin_memory, multiprocessing_context) for a DataLoader; -1 chooses."""
        if workers == -1 and sys.platform in ("win32", "darwin"):
            workers = 0  # fresh interpreters there: they cost more than they bring by default
        elif workers == -1:
            cpus = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                    else os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
            workers = min(self.kind.workers, max(1, cpus))
        return {"workers": workers, "pin_memory": self.kind.pinned,
                "multiprocessing_context": self.kind.context if workers else None}

    def synchronize(self):
        """Wait until the device has done what it was given; only timing needs this."""
        self.kind.module.synchronize()

    def memory_mb(self):
        """Peak memory in MB; on a cpu that of the process, on mps the largest seen."""
        self._peak = max(self._peak, self.kind.memory() / 2 ** 20)
        return round(self._peak, 1)

    # -------------------------------------------------------------------------
    # Processes

    def gather(self, x, counts=None):
        """(B, D) of each process -> (W * B, D) in rank order, with the exact gradient: every
        process sees that of the *sum* of all processes' losses. counts: rows per process where
        shares differ; without it all must have the same B."""
        if self.world_size == 1:
            return x
        return Gather.apply(x, list(counts or [len(x)] * self.world_size))

    def sum(self, x):
        """Sum over processes of a number or a tensor, as the same kind, no gradient."""
        if not torch.is_tensor(x):
            return sum(self.gather_objects(x))  # as Python numbers: exact for ints and float64
        total = x.detach().to(self.device, copy=True).contiguous()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.to(x.device)

    def sum_gradients(self, parameters):
        """Replace each .grad by its sum over processes, in one all-reduce; no-op when alone.

        A parameter without gradient here counts as zero, and keeps None if it has none anywhere.
        Divide the loss so that a sum is right. Costs one flat copy of the gradients, and does not
        overlap with the backward pass as DistributedDataParallel does.
        """
        if self.world_size == 1:
            return
        trainable = [p for p in parameters if p.requires_grad]
        for dtype in sorted({p.dtype for p in trainable}, key=str):
            group = [p for p in trainable if p.dtype == dtype]
            here = [float(p.grad is not None) for p in group]
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                              for p in group] + [group[0].new_tensor(here)])
            dist.all_reduce(flat)
            *sums, anywhere = flat.split([p.numel() for p in group] + [len(group)])
            # Only a missing gradient is worth waiting for the device to learn who has it.
            anywhere = here if all(here) else anywhere.tolist()
            for p, total, someone in zip(group, sums, anywhere):
                if someone:
                    p.grad = total.view_as(p).clone()

    def gather_objects(self, x):
        """[x of process 0, x of process 1, ...]; x is small and picklable."""
        objects = [x] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(objects, x)
        return objects

    def on_first(self, work):
        """Result of `work()` on the first process; its error is raised in every process."""
        if self.world_size == 1:
            return work()
        result = error = None
        if self.rank == 0:
            try:
                result = work()
            except Exception as caught:  # one of another type may not survive the journey
                travels = hasattr(caught, "exit_code") or type(caught) is TypeError
                error = caught if travels else RuntimeError(one_line(caught))
        result, error = self.gather_objects((result, error))[0]
        if error is not None:
            raise shared(error)
        return result

    # -------------------------------------------------------------------------
    # Training

    def batches(self, loader, at):
        """Yield the batches from where `at` stands up to at.steps, over epochs. Signals are
        watched meanwhile: Interrupted is raised here, once the checkpoint that one asked for is
        saved. loader: has a length, and a batch_sampler with set_epoch(epoch, first_batch=)."""
        at.batches = len(loader)
        if not at.batches:
            raise UserError("the training data gives no batch: expected a smaller --batch-size")
        with self._watching_signals():
            while at.step < at.steps:
                loader.batch_sampler.set_epoch(at.epoch, first_batch=at.batch)
                epoch, self._asked = at.epoch, time.monotonic()
                for batch in loader:
                    self._clock.waited += time.monotonic() - self._asked
                    yield batch
                    if self._stopping:
                        error = Interrupted(f"stopped by {signal.Signals(self._stopping).name} "
                                            "after saving; --resume auto continues")
                        error.exit_code = 128 + self._stopping
                        raise shared(error)
                    if at.step >= at.steps:
                        return
                    self._asked = time.monotonic()
                if at.epoch == epoch:
                    raise RuntimeError(f"epoch {epoch} ended before its {at.batches} batches")

    @torch.no_grad()
    def update(self, optimizer, parameters, scaler, clip=0.0, loss=None):
        """Unscale and clip (if clip > 0) the gradients, then step -> bool tensor (): whether the
        weights moved. Call it after `sum_gradients`.

        If a gradient or this step's loss is inf or nan in any process, the step changes nothing:
        no weights, moments, decay, nor buffers given to `load_training`; and the loss scale only
        where nothing but the scaled gradients overflowed. On cuda with a fused optimizer it does
        not wait for the device.
        """
        parameters = [p for p in parameters if p.grad is not None]
        sound = torch.as_tensor(0.0 if loss is None else loss, device=self.device).isfinite().all()
        # One by one: the largest of several norms hides a nan on mps.
        fine = torch.stack([sound] + [p.grad.isfinite().all() for p in parameters]).all()
        if self.world_size > 1:
            flags = torch.stack([sound, fine]).int()
            dist.all_reduce(flags, op=dist.ReduceOp.MIN)
            sound, fine = flags.bool()
        if scaler.is_enabled():
            for p in parameters:
                p.grad.div_(scaler.value)
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        fused = self.device.type == "cuda" and all(g.get("fused") for g in optimizer.param_groups)
        if fused and optimizer.state:  # fused SGD's first step would keep momentum it never wrote
            optimizer.grad_scale, optimizer.found_inf = None, (~fine).float()
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
        elif fine:
            optimizer.step()
        for buffer, kept in self._buffers:
            kept.copy_(torch.where(fine, buffer, kept))
            buffer.copy_(kept)
        self._scaler, self._fine = scaler, fine
        if scaler.is_enabled():
            overflow = sound & ~fine
            self._fine = fine | overflow & (scaler.value > 1)  # a scale still falling is no failure
            scaler.adapt(fine, overflow)
        return fine

    def tick(self, at, losses, samples, describe=None, **scalars):
        """Count a step: move `at`, check the step, log, look for signals -> whether a checkpoint
        is due (end of an epoch, --save-every, the last step, a signal). Once after each `update`.

        losses: {name: this process's part}, logged as sums over processes; scalars: logged as
        they are, floats or 0-dim tensors. samples: of the whole batch. describe: () -> str, what
        was in this batch; called for a bad step only and perhaps steps later, so bind its
        arguments (functools.partial). SafeStop after three bad steps in a row.
        """
        at.step, at.batch, epoch = at.step + 1, at.batch + 1, at.epoch + 1  # as people count
        if at.batch == at.batches:
            at.epoch, at.batch = at.epoch + 1, 0
        last = at.step == at.steps
        log = last or at.step % self._log_every == 0
        due = last or at.batch == 0 or bool(self._save_every and at.step % self._save_every == 0)
        self._steps.append((at.step, self._fine, describe))
        # On a CPU looking is free; elsewhere it waits for the device and the other processes.
        look = log or due or at.step % 20 == 0 or self.device.type == "cpu"
        if look:
            self._look_at_steps()
        if look or self.world_size == 1:
            self._stopping = max(self.gather_objects(self._signal))
        if log:
            losses = dict(zip(losses, self.sum(torch.stack(
                [torch.as_tensor(x, device=self.device).float() for x in losses.values()]
            )).tolist()))
        self._count(samples)
        self.progress(at.step, at.steps, "step")
        if log:
            self._log_training(at, epoch, {**losses, **scalars})
        return due or bool(self._stopping)

    def _look_at_steps(self):
        """Say which steps since the last look were skipped; SafeStop at the third in a row."""
        steps, self._steps = self._steps, []
        flags = torch.stack([fine for _, fine, _ in steps]).tolist()
        for fine, (step, _, describe) in zip(flags, steps):
            self._bad = 0 if fine else self._bad + 1
            if fine:
                continue
            what = self.gather_objects(describe() if describe else f"step {step}")
            what = f"the loss or its gradient is not finite at {'; '.join(dict.fromkeys(what))}"
            if self._bad == BAD_STEPS:
                raise shared(SafeStop(
                    f"{BAD_STEPS} steps in a row were skipped, {what}; the last checkpoint is "
                    "intact. Try a smaller --lr, --grad-clip, or --precision fp32"))
            self.say(f"step skipped: {what}")

    def _count(self, samples):
        seconds, clock = time.monotonic() - self._asked, self._clock
        clock.steps, clock.samples = clock.steps + 1, clock.samples + samples
        clock.seconds += seconds
        self._total = [self._total[0] + samples, self._total[1] + seconds]

    @contextlib.contextmanager
    def _watching_signals(self):
        """Inside, Ctrl-C and SIGTERM ask to stop, and a second one exits at once, saving nothing.
        Only in the main thread: Python allows no other."""
        owner, since, self._signal, self._stopping = os.getpid(), 0.0, 0, 0

        def handle(number, frame):
            nonlocal since
            if os.getpid() != owner:  # a loader's worker: its parent tells it when to stop
                if number == signal.SIGTERM:
                    os._exit(128 + number)
            elif not self._signal:
                self._signal, since = number, time.monotonic()
            # Ctrl-C under torchrun comes twice at once: from the terminal and from torchrun.
            elif self.world_size == 1 or time.monotonic() - since > 2:
                os._exit(128 + number)
        main_thread = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, handle) for number in (
            signal.SIGINT, signal.SIGTERM)} if main_thread else {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # -------------------------------------------------------------------------
    # Speaking

    def say(self, text):
        """Print a line, and append it to log.txt."""
        if self.rank:
            return
        if self._shown:
            show("\r" + " " * self._shown + "\r", end="")
            self._shown = 0
        show(text)
        if self.out:
            append(self.out / "log.txt", text)
        else:
            self._early.append(text)

    def progress(self, done, total, what=""):
        """A line that overwrites itself on a terminal; nothing at all elsewhere."""
        if not self.rank and sys.stdout and sys.stdout.isatty():
            text = f"{what} {done}/{total}"
            show("\r" + text.ljust(self._shown), end="")
            self._shown = len(text)

    def log(self, step, split, **scalars):
        """Scores: one line for people, one JSON object in metrics.jsonl for programs. scalars are
        already global; floats or 0-dim tensors."""
        self._record(f"{split} at step {step}" if step else split, "", step, None, split, scalars)

    def _log_training(self, at, epoch, scalars):
        if self._scaler is not None and self._scaler.is_enabled():
            scalars["loss_scale"] = self._scaler.get_scale()
        clock, self._clock = self._clock, Clock()
        rate, wait = clock.samples / clock.seconds, clock.waited / clock.seconds
        left = (at.steps - at.step) * clock.seconds / clock.steps
        self._record(f"{at.step:>{len(str(at.steps))}}/{at.steps}",
                     f"{rate:.3g} samples/s  wait {wait:.0%}  {self.memory_mb():.0f} MB  "
                     f"eta {datetime.timedelta(seconds=round(left))}",
                     at.step, epoch, "train", scalars, rate, wait)

    def _record(self, head, tail, step, epoch, split, scalars, rate=0.0, wait=0.0):
        if self.rank:
            return
        scalars = {name: plain(value) for name, value in scalars.items()}
        words = [f"{name} {f'{x:.4g}' if isinstance(x, float) else str(x):<8}"
                 for name, x in scalars.items()]
        self.say("  ".join([head, *words, tail]).rstrip())
        if self.out:
            append(self.out / "metrics.jsonl", json.dumps({
                "step": step, "epoch": epoch, "split": split, **scalars,
                "samples_per_second": round(rate, 3), "data_wait": round(wait, 4),
                "memory_mb": self.memory_mb(), "time": round(time.time(), 3)}, ensure_ascii=False))
            self._logged += 1

    # -------------------------------------------------------------------------
    # The run's folder

    def begin(self, folder, args, identity):
        """Take `folder` for this run -> (checkpoint to go on from or None, results of a run that
        is finished or None).

        args: the flags of `add_run_flags`, kept in config.json. identity: what must not change
        when the run is continued (see `run_identity`). With args.eval_only nothing is claimed or
        written, and the checkpoint is the one to score. Raises UserError, before anything is
        changed, for a folder that cannot be used and for a run or checkpoint of another kind.
        """
        folder, stored, named = expanded(folder), None, args.resume not in ("auto", "none")
        self._identity = json.loads(json.dumps(plain(identity), default=str))
        self._log_every, self._save_every = args.log_every, args.save_every
        fresh = (args.overwrite or args.dry_run) and not args.eval_only
        path = folder / (BEST if args.eval_only and (folder / BEST).exists() else LAST)
        if named or args.resume == "auto" and not fresh:
            stored = self.load(args.resume if named else path)
            keys = ("method", "model", "weights") if args.eval_only else None
            if stored:
                self._refuse_other(stored.get("identity"), args.resume if named else folder, keys)
        if len(set(self.gather_objects(stored and stored["step"]))) > 1:
            raise shared(UserError(f"not all processes see the checkpoint in {folder}: expected "
                                   "--output-dir on a disk that they share"))
        if args.eval_only:
            if not stored:
                self.say(f"no checkpoint in {folder}: this scores what --weights gives")
            return stored, None
        self.on_first(lambda: self._claim(folder, args, fresh))
        self.out = folder
        if (folder / "results.json").exists():
            self.say(f"{folder} holds this run, finished; --overwrite runs it again")
            return stored, json.loads((folder / "results.json").read_text("utf-8"))
        self._logged = stored["logged"] if stored and not named else 0
        self.on_first(lambda: cut_lines(folder / "metrics.jsonl", self._logged))
        if named:
            self.on_first(lambda: self._take_best(expanded(args.resume).parent / BEST, stored))
        if stored:
            self.say(f"continuing after step {stored['step']}")
        return stored, None

    def _claim(self, folder, args, fresh):
        """Check, clear and make the folder."""
        refuse_unusable(folder)
        config = folder / "config.json"
        if config.exists():
            try:
                theirs = dict(json.loads(config.read_text("utf-8"))["identity"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                # Somebody else's folder perhaps: a downloaded model has a config.json too.
                raise UserError(f"{config} is not of a run of this program, or damaged: choose "
                                "another --output-dir, or move the file away") from error
            if not fresh and args.resume != "auto":
                raise UserError(f"{folder} already holds a run: --resume auto continues it, "
                                "--overwrite starts again, or choose another --output-dir")
            if not fresh:
                self._refuse_other(theirs, folder)
        names = ["*.tmp"]  # left by a write that was killed
        if fresh:
            names += ["env.json", "command.txt", "log.txt", "metrics.jsonl", "results.json",
                      "*_last.pt", "*_prev.pt", "*_best.pt"]
        for path in (path for name in names for path in folder.glob(name)):
            path.unlink()
        write_atomic(config, {**vars(args), "identity": self._identity})
        write_atomic(folder / "env.json", {
            **self._facts(), "threads": torch.get_num_threads(), "numpy": np.__version__,
            "python": platform.python_version(), "platform": platform.platform(),
            "cuda": torch.version.cuda or torch.version.hip,
            "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds")})
        append(folder / "command.txt", shlex.join([sys.executable, *sys.argv]))
        append(folder / "log.txt", *self._early)

    def _refuse_other(self, theirs, where, keys=None):
        """Raise UserError unless `theirs` is this run's identity (or its `keys` are)."""
        ours, theirs = self._identity, theirs if isinstance(theirs, dict) else {}
        changed = {key: f"{key} was {theirs.get(key)!r}, now {ours.get(key)!r}"
                   for key in keys or sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)}
        if not changed:
            return
        text = "; ".join(changed.values())
        if "method" in changed:
            text = (f"{where} is not of a run of this script: a CLIP to start from goes to "
                    "--weights, a new run to another --output-dir")
        elif {*changed} <= {"epochs", "max_steps"} and pathlib.Path(where, "results.json").exists():
            text = (f"{where} holds a finished run ({text}): to train on, start a new one from its "
                    f"best weights with --weights {where} --output-dir OTHER")
        else:
            text = (f"{where} is of another run ({text}): choose another --output-dir for a new "
                    "run, or give the old values")
        raise UserError(text)

    def _take_best(self, best, stored):
        """The best weights that lie beside a checkpoint of another folder come along."""
        state = load_checkpoint(best) if best.exists() else {"step": math.inf}
        if state["step"] <= stored["step"]:
            write_checkpoint(self.out / BEST, state)

    def _facts(self):
        return {"device": str(self.device), "precision": self.precision, "git": git_commit(),
                "processes": self.world_size, "torch": str(torch.__version__)}

    def write(self, name, content):
        """Write bytes, a text, or an object as JSON to a file in `out`, whole or not at all."""
        if self.out:
            self.on_first(lambda: write_atomic(self.out / name, content))

    def finish(self, results):
        """`results` with what every script adds, written to results.json. Returns the dict."""
        self.synchronize()
        samples, seconds = self._total
        results = {"samples_per_second": round(samples / seconds, 3) if seconds else 0.0,
                   **plain(results), "seconds": round(time.monotonic() - self._began, 3),
                   "peak_memory_mb": max(self.gather_objects(self.memory_mb())), **self._facts()}
        self.write("results.json", results)
        return results

    # -------------------------------------------------------------------------
    # Checkpoints and random state

    def save_training(self, at, trainable, optimizer, scaler, buffers=(), name=LAST, **more):
        """Write a checkpoint: {name: Parameter} trainable, {name: tensor} buffers, and all that an
        exact resume needs; `more` is plain values and tensors. optimizer, scaler: may be None."""
        self.save(name, {
            "format": f"{self._identity.get('method', 'run')}/2",
            "weights": dict(trainable), "buffers": dict(buffers),
            "optimizer": optimizer.state_dict() if optimizer else {},
            "scaler": scaler.state_dict() if scaler else {},
            "epoch": at.epoch, "batch": at.batch, "step": at.step,  # what comes next
            "timed": self._total, "logged": self._logged,
            "rng": self.gather_objects(self._rng_state()), "identity": self._identity, **more})

    def load_training(self, stored, trainable, optimizer, scaler, buffers=()):
        """Put what `save_training` wrote back in place -> Place. stored None: a new run."""
        self._buffers = [(b, b.detach().clone()) for b in dict(buffers).values()]
        if not stored:
            return Place()
        self.restore(stored, trainable, buffers)
        optimizer.load_state_dict(stored["optimizer"])
        scaler.load_state_dict(stored["scaler"])
        self._restore_rng(stored["rng"])
        self._total = stored["timed"]
        return Place(stored["epoch"], stored["batch"], stored["step"])

    @torch.no_grad()
    def restore(self, stored, trainable, buffers=()):
        """Copy the stored weights into `trainable` and `buffers`. UserError unless the names and
        shapes are the same."""
        there, here = {**stored["weights"], **stored["buffers"]}, {**trainable, **dict(buffers)}
        odd = sorted({*there} ^ {*here}) or [n for n in here if here[n].shape != there[n].shape]
        if odd:
            raise UserError(f"the checkpoint holds {len(there)} tensors and {len(here)} are "
                            f"expected here, e.g. {odd[0]!r} does not fit; it belongs to another "
                            "--model or other flags of what is trained")
        for name, tensor in here.items():
            tensor.copy_(there[name])
        self._buffers = [(b, b.detach().clone()) for b in dict(buffers).values()]

    def save(self, path, state):
        """Write `state` (tensors, numbers, text, containers of them) so that a kill at any moment
        leaves a file that loads. `x_last.pt` keeps its predecessor as `x_prev.pt`. A bare name
        lies in `out`; without `out` it is not written.

        Raises TypeError for what a safe load would refuse, SafeStop for nan or inf in a tensor or
        a disk that does not take it; the old file is intact then.
        """
        path = self._inside(path)
        if path:
            self.on_first(lambda: write_checkpoint(path, state))

    def load(self, path):
        """The checkpoint at `path` (a bare name: in `out`), or its predecessor when that is damaged
        or gone; None when neither is there. Raises UserError when none can be read."""
        path = self._inside(path)
        if not path:
            return None
        before = previous(path)
        fallback = before != path and before.exists()
        if not (path.exists() or fallback):
            return None
        try:
            return load_checkpoint(path)
        except UserError as error:
            if not fallback:
                raise
            state = load_checkpoint(before)
            self.say(f"{error} | continuing from {before.name} instead")
            return state

    def _inside(self, path):
        path = expanded(path)
        bare = path.parent == pathlib.Path()
        return path if not bare else self.out / path if self.out else None

    def _rng_state(self):
        name, keys, *rest = np.random.get_state()
        own = None if self.device.type == "cpu" else self.kind.module.get_rng_state()
        return {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest),
                "torch": torch.get_rng_state(), "device_type": self.device.type, "device": own}

    def _restore_rng(self, states):
        """states: what `_rng_state` gave in each process."""
        state = states[min(self.rank, len(states) - 1)]
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"].cpu())
        same = state["device_type"] == self.device.type
        if same and state["device"] is not None:
            self.kind.module.set_rng_state(state["device"].cpu())
        if not same or len(states) != self.world_size:
            self.say(f"note: the checkpoint is of {len(states)} x {state['device_type']}, not "
                     f"{self.world_size} x {self.device.type}: dropout will differ, the order of "
                     "samples will not")


def shared(error):
    """An error that every process raises: `guard` prints it once."""
    error.shared = True
    return error


# -----------------------------------------------------------------------------
# Files

def expanded(path):
    """A path as a user may write it -> pathlib.Path, with `~` and $VARIABLES replaced."""
    path = pathlib.Path(os.path.expanduser(os.path.expandvars(path)))
    if path.parts[:1] == ("~",):
        raise UserError(f"{path} has no meaning, as HOME is not set: write the whole path")
    return path


def refuse_unusable(folder):
    """Raise UserError if a run's folder could not be made or written to. Creates nothing."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"the output folder {folder} cannot be used: {nearest} is not a folder "
                        "that can be written; choose another --output-dir")


def load_checkpoint(path):
    """Read a checkpoint onto the CPU, as tensors and plain values; no code in it can run.
    Raises UserError that says what the file is instead."""
    path = expanded(path)
    try:
        with open(path, "rb") as file:
            problem = diagnosis(file)
        state = {} if problem else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
    except Exception as error:  # torch has five types for this
        problem = ("holds something other than tensors and plain values; refused, nothing in it "
                   f"was run ({one_line(error)[:120]})")
    if not problem and not isinstance(state, dict):
        problem = f"holds a {type(state).__name__}, not a checkpoint of this program"
    if problem:
        raise UserError(f"{path} {problem}")
    return state


def diagnosis(file):
    """What is wrong with an open checkpoint, or "". Checks every byte, which torch.load does not
    do: 0.3 s for 340 MB."""
    head = file.read(512)
    text = head.lstrip().lower()
    if not head:
        return "is empty (0 bytes)"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer: run `git lfs pull`"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page: the download went wrong"
    if head.startswith(b"\x1f\x8b"):
        return "is compressed with gzip: unpack it first"
    if not head.startswith(b"PK\x03\x04"):
        return "is no checkpoint: copy or download it again"
    try:
        with zipfile.ZipFile(file) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return "is a TorchScript archive, not a checkpoint: pass it as --weights"
            broken = archive.testzip()
    except Exception as error:  # zipfile, zlib, struct and others, each for its own kind of damage
        return f"is cut short or damaged ({one_line(error)}): use an older copy"
    return f"is damaged: the checksum of {broken} is wrong; use an older copy" if broken else ""


def previous(path):
    return path.with_name(re.sub("_last$", "_prev", path.stem) + path.suffix)


def write_checkpoint(path, state):
    """See `Run.save`."""
    state = portable(state, "state", path.name)
    write_whole(path, lambda file: torch.save(state, file))


def write_atomic(path, content):
    """Write bytes, a text, or an object as JSON, whole or not at all."""
    if not isinstance(content, (bytes, str)):
        content = json.dumps(plain(content), indent=1, ensure_ascii=False, default=str) + "\n"
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    write_whole(path, lambda file: file.write(content))


def write_whole(path, write):
    """write(file) beside `path`, then rename: a kill leaves the old file or the new one."""
    temp = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temp, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # Between the two renames only the previous one is there; `Run.load` knows.
        if previous(path) != path and path.exists():
            os.replace(path, previous(path))
        os.replace(temp, path)
    except (OSError, RuntimeError) as error:  # torch's writer hides a full disk in a RuntimeError
        temp.unlink(missing_ok=True)
        if is_lost(error):  # a loader's worker, whose death interrupts whatever goes on
            raise
        raise SafeStop(f"{path} could not be written ({one_line(error)[:200]}); the last good "
                       "checkpoint is intact. Free space and continue with "
                       "--resume auto") from error


def append(path, *lines):
    try:
        with open(path, "ab") as file:  # one write: a kill cannot mix two lines
            file.write("".join(f"{x}\n" for x in lines).encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise SafeStop(f"cannot write {path}: {error.strerror}; the last checkpoint is intact"
                       ) from error


def cut_lines(path, count):
    """Keep the first `count` lines, so that metrics.jsonl equals that of an uninterrupted run."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if len(lines) > count:
        write_atomic(path, b"".join(lines[:count]))


def portable(x, where, name):
    """A copy of `x` with its tensors on the CPU. TypeError for what would not load again, SafeStop
    for a tensor that is not finite."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        if x.is_floating_point() and not x.isfinite().all():
            raise SafeStop(f"{where} holds nan or inf, so {name} was not written and the last "
                           "good checkpoint stays. Try a smaller --lr or --precision fp32")
        # A view would bring the whole of what it is a view of.
        whole = x.untyped_storage().nbytes() <= x.numel() * x.element_size()
        return x if whole else x.clone()
    if isinstance(x, dict):
        return {portable(key, f"a key of {where}", name):
                portable(value, f"{where}[{key!r}]", name) for key, value in x.items()}
    if type(x) in (list, tuple):
        return type(x)(portable(v, f"{where}[{i}]", name) for i, v in enumerate(x))
    # Exact types: numpy.float64 is a float, but a file with one in it would not load again.
    if x is None or type(x) in (bool, int, float, str):
        return x
    raise TypeError(f"{where} is a {type(x).__module__}.{type(x).__name__}, which a checkpoint "
                    "cannot hold: convert it with float(), str(), vars() or torch.as_tensor()")


def plain(x):
    """`x` as JSON can hold it: scalars as Python numbers, nan and inf as "nan", "inf", "-inf"."""
    if isinstance(x, dict):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    x = x.item() if hasattr(x, "item") else x
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def git_commit():
    """Commit of this file's folder, with "-dirty" if files differ from it; "" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError, UnicodeError):
        return subprocess.run(command, cwd=pathlib.Path(__file__).resolve().parent, text=True,
                              capture_output=True, timeout=10).stdout.strip()
    return ""


# -----------------------------------------------------------------------------
# The command line

def number(least=0.0, most=math.inf, above=False, read=float):
    """An argparse type: a finite number from `least` (or above it) to `most`."""
    def checked(text):
        with contextlib.suppress(ValueError):
            value = read(str(text))
            if least <= value <= most and math.isfinite(value) and not (above and value == least):
                return value
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected {'a whole' if read is int else 'a'} number "
            f"{'above' if above else 'from'} {least}" + (f" to {most}" if most < math.inf else ""))
    return checked


def whole(least=0, most=math.inf):
    """An argparse type: a whole number from `least` to `most`."""
    return number(least, most, read=int)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with what every script promises of its command line.

    --flag_name and the spellings in `aliases` ({"--their-name": "--our-name"}) are understood;
    those in `refused` ({"--their-name": "what to use instead"}) are refused with that text.
    `--config FILE` takes the flags of a run's config.json, which the command line overrides; no
    flag may be abbreviated. A wrong line exits with code 2 and one line.
    """
    def __init__(self, *args, aliases=None, refused=None, **options):
        super().__init__(*args, allow_abbrev=False, **options)
        self.aliases, self.refused = aliases or {}, refused or {}
        self.add_argument("--config", metavar="FILE", help="take the flags of a run's config.json")

    def error(self, message):
        self.exit(2, f"error: {one_line(message)} (--help lists the flags)\n")

    def parse_known_args(self, args=None, namespace=None):
        words = [self.spelled(word) for word in (sys.argv[1:] if args is None else args)]
        config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        config.add_argument("--config", nargs="?")
        path = config.parse_known_args(words)[0].config
        words = (self.stored(path) if path else []) + words
        parsed, odd = super().parse_known_args(words, namespace)
        if odd:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(odd[0].partition("=")[0], flags, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unknown argument {odd[0]}{hint}")
        try:
            refuse_run_flags(parsed)
        except UserError as error:
            self.error(error)
        return parsed, odd

    def spelled(self, word):
        flag, equals, value = word.partition("=")
        if not flag.startswith("--"):
            return word
        flag = flag.replace("_", "-")
        flag = self.aliases.get(flag, flag)
        if flag in self.refused:
            self.error(f"{flag} is not a flag here: {self.refused[flag]}")
        return flag + equals + value

    def stored(self, path):
        """The flags of a config.json that this parser has, as words of a command line."""
        words = []
        try:
            values = json.loads(expanded(path).read_text("utf-8"))
            actions = [(action, values.get(action.dest)) for action in self._actions
                       if action.dest not in ("help", "config", "resume", "overwrite", "debug")]
        except (OSError, ValueError, AttributeError, UserError) as error:
            self.error(f"--config {path} is not a run's config.json: {one_line(error)}")
        for action, value in actions:
            if action.nargs == 0:  # a switch, perhaps with a --no- of its own
                no = [word for word in action.option_strings if word.startswith("--no-")]
                words += action.option_strings[:1] if value else no
            elif isinstance(value, list):
                words += [action.option_strings[0], *map(str, value)]
            elif value is not None:
                words.append(f"{action.option_strings[0]}={value}")
        return words


def add_run_flags(parser, seed=1, log_every=20, several_seeds=False, **defaults):
    """The flags that all scripts share; `defaults` changes some of their defaults."""
    add = parser.add_argument_group("the run").add_argument
    add("--device", default="auto", help="auto, cuda, cuda:N, npu, npu:N, mps or cpu")
    add("--precision", default="auto", choices=["auto", *PRECISIONS],
        help="of matrix products; auto: bf16 on a GPU that has it, else fp32")
    several = {"nargs": "+", "default": [seed]} if several_seeds else {"default": seed}
    add("--seed", type=whole(0, 2 ** 32 - 1), **several, help=f"(default: {seed})")
    add("--output-dir", default="", help="the run's folder (default: one under runs/)")
    add("--resume", default="auto", metavar="auto|none|PATH",
        help="go on from the folder's last checkpoint, or from the one at PATH")
    add("--overwrite", action="store_true", help="delete the run that the folder holds")
    add("--eval-only", action="store_true", help="score a checkpoint, train nothing")
    add("--dry-run", action="store_true", help="two steps of everything, in a folder of its own")
    add("--export", choices=["openai", "open_clip", "hf", "safetensors"],
        help="also write the trained model for this library")
    add("--workers", type=whole(-1), default=-1, help="processes that read images; -1 chooses")
    add("--log-every", type=whole(1), default=log_every, metavar="STEPS")
    add("--save-every", type=whole(0), default=0, metavar="STEPS",
        help="also save within an epoch; 0: only at its end")
    add("--deterministic", action="store_true", help="the same bits on a GPU, slower")
    add("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(**defaults)


def refuse_run_flags(args):
    """Raise UserError for what can be refused before any work."""
    resume, folder = getattr(args, "resume", "auto"), getattr(args, "output_dir", "")
    if resume not in ("auto", "none") and not expanded(resume).is_file():
        raise UserError(f"--resume {resume}: expected auto, none, or the path of a checkpoint")
    if folder and not getattr(args, "eval_only", False):
        refuse_unusable(expanded(folder))


CHANGES_NO_RESULT = """device workers output_dir resume overwrite eval_only dry_run export log_every
save_every debug config data_dir no_download deterministic micro_batch cache cache_gb""".split()


def run_identity(args, but=(), **facts):
    """What must be equal for a run to be continued: every flag but those that change no result
    (and those in `but`), and `facts`, which win: method, data (fingerprint), model (name),
    weights (sha256), micro_batch where it matters."""
    flags = {key: value for key, value in vars(args).items()
             if key not in CHANGES_NO_RESULT and key not in but}
    return {**flags, **facts}


def run_folder(args, method, name):
    """--output-dir, or runs/METHOD/name; a dry run has its own beside it."""
    folder = expanded(args.output_dir or f"runs/{method}/{re.sub(r'[/:]+', '-', name)}")
    return folder.with_name(folder.name + "_dry_run") if args.dry_run else folder


# -----------------------------------------------------------------------------
# The way out

def guard(main, get_args, argv=None):
    """`sys.exit(guard(main, get_args))`: run a script, turn what it raises into an exit code.

    0 done, 2 the user can fix it, 3 stopped safely (out of memory too), 128 + n by a signal,
    1 a bug: the only one that shows a traceback, unless --debug asks for it.
    """
    tolerate_any_locale()
    debug, code = "--debug" in (sys.argv[1:] if argv is None else argv), 0
    try:
        with sigterm_as_ctrl_c():
            main(get_args(argv))
            print(end="", flush=True)
    except (Exception, KeyboardInterrupt) as error:
        code, line = verdict(error)
        report(error, line, debug or code == 1)
    if dist.is_available() and dist.is_initialized():
        if code or argv is None:
            # After a failure the others may be waiting for this process: do not wait for them in
            # turn. After success all is written, and taking the group down races with their
            # leaving: gloo's threads ended this process by SIGABRT a few times in a day of tests.
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError, AttributeError):
                    stream.flush()
            os._exit(code)
        dist.destroy_process_group()
    return code


def verdict(error):
    """What ended a script -> its exit code, and what to say of it."""
    text = one_line(error)
    if isinstance(error, KeyboardInterrupt):
        number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
        return 128 + number, (f"interrupted by {number.name}; --resume auto goes on from the last "
                              "checkpoint, if there is one")
    if isinstance(error, BrokenPipeError) and stdout_is_closed():
        return 128 + 13, ""  # as if SIGPIPE had ended it, which is how `| head` ends programs
    if hasattr(error, "exit_code"):
        return error.exit_code, text
    if is_oom(error):
        return 3, (f"out of memory ({text[:150]}): a smaller --micro-batch gives the same result "
                   "in less, --precision bf16 halves most of it; the last checkpoint is intact")
    if is_lost(error):
        return 3, (f"a process that this one works with has ended ({text[:150]}): what it said "
                   "itself tells why; the last checkpoint is intact")
    return 1, ""


def report(error, line, debug):
    """Say what ended the run on stderr; an error that all processes share is said once."""
    joined, rank = dist.is_available() and dist.is_initialized(), 0
    with contextlib.suppress(UserError):
        rank = dist.get_rank() if joined else torchrun_environment()[0]
    if rank and (not joined or getattr(error, "shared", False)):
        return
    with contextlib.suppress(BrokenPipeError):
        if debug:
            traceback.print_exception(error)
        if line:
            print(f"process {rank}: " * bool(rank) + f"error: {line}", file=sys.stderr, flush=True)


def is_oom(error):
    """Whether an exception says that memory ran out: each device has its own type or words."""
    words = ("out of memory" in str(error).lower(), "can't allocate memory" in str(error))
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or isinstance(error, OSError) and error.errno == errno.ENOMEM
            or isinstance(error, RuntimeError) and any(words))


def is_lost(error):
    """Whether another process went away: of the group, or one that reads images."""
    words = re.search("^DataLoader worker|closed by peer|reset by peer|Broken pipe", str(error))
    return (isinstance(error, (BrokenPipeError, ConnectionResetError, dist.DistError))
            or isinstance(error, RuntimeError) and bool(words))


@contextlib.contextmanager
def sigterm_as_ctrl_c():
    """Where nothing is trained (while loading and testing, that is), SIGTERM ends the run as
    Ctrl-C does: loader workers are stopped, one line is said. A second one ends it at once. Not
    under torchrun: Python could not answer while it waits for another process."""
    owner, main_thread = os.getpid(), threading.current_thread() is threading.main_thread()
    alone = os.environ.get("WORLD_SIZE", "") in ("", "0", "1")
    if not (main_thread and alone):
        yield
        return

    def handle(number, frame):
        if os.getpid() != owner:  # a loader's worker
            os._exit(128 + number)
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt(number)  # which no `except Exception` on the way swallows
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def tolerate_any_locale():
    """A terminal that knows ASCII only shows \\u4e2d instead of ending the run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def show(text, end="\n"):
    try:
        print(text, end=end, flush=True)
    except (OSError, ValueError, AttributeError):  # `| head` has seen enough, or no console at all
        leave_stdout()                             # the run and its log go on


def stdout_is_closed():
    """Whether nobody reads stdout any more, found out by an empty line."""
    try:
        print(flush=True)
        return False
    except (OSError, ValueError, AttributeError):
        leave_stdout()
        return True


def leave_stdout():
    """Send the rest of stdout to nowhere, the interpreter's last flush too."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
