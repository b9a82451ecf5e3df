"""Where the code runs, which process may write, and what a run keeps.

`start` picks a device, a precision and the process group and says what it chose. The `Run` it
returns keeps a training loop free of device, precision and process tests: every process calls its
methods at the same point, and only the first one prints or touches a file.

    run = start(args.device, args.precision, args.seed)
    stored, finished = run.begin(folder, args, identity)
    at = run.load_training(stored, trainable, optimizer, scaler)
    at.steps = args.epochs * len(loader)
    for images, labels, index in run.batches(loader, at):
        optimizer.zero_grad(set_to_none=True)
        loss = ...                                         # this process's part of the batch
        scaler.scale(loss).backward()
        run.sum_gradients(trainable.values())
        run.update(optimizer, trainable.values(), scaler, args.grad_clip, loss=loss)
        if run.tick(at, {"loss": loss}, samples=args.batch_size, lr=lr):
            run.save_training(at, trainable, optimizer, scaler)
    run.finish({"accuracy": ...})

Four promises: the device asked for is the device used; every number comes out the same for any
number of processes; a checkpoint on disk is whole or absent, whenever the machine stops; no file
that is read can run code. Import this file before torch: it sets variables that torch reads once.
"""
import argparse
import collections
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import difflib
import errno
import importlib.metadata
import importlib.util
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
# torch would import torch_npu itself, and a broken one would end every program. See `Npu.absent`.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

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
    def __init__(self, message, exit_code=130):
        super().__init__(message, exit_code)
        self.exit_code = exit_code

    def __str__(self):
        return self.args[0]


# -----------------------------------------------------------------------------
# The kinds of device. The torch modules only look alike: torch.mps has no peak memory and no
# set_device, torch.cpu no random state, torch.npu may not exist at all.

class Cpu:
    backend = "gloo"   # of the process group; "" where there can be one process only
    pinned = False     # pinned memory and non_blocking copies; on mps the copy could lose data
    workers = 4        # most loader processes by default
    context = None     # how they start; None: as Python does on this system

    def absent(self):
        """Why the device cannot be used, or ""."""
        return ""

    def precisions(self, device):
        """The names of what autocast computes in here, and computes right."""
        return ["fp32", "bf16", "fp16"]

    def memory(self):
        """Bytes in use; the peak where the device keeps one."""
        try:
            import resource
        except ImportError:  # Windows
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def count(self):
        return 1

    def select(self, index):
        """Let large blocks that were freed stay with the process. By default glibc gives every
        activation over 32 MB back to the system and faults it in again at its next use:
        SqueezeNet on 64 images took 62 ms an image instead of 35 on one core."""
        if sys.platform == "linux":
            with contextlib.suppress(OSError, AttributeError):  # another C library
                libc = ctypes.CDLL(None)
                libc.mallopt(-3, 1 << 30)       # M_MMAP_THRESHOLD
                libc.mallopt(-1, 2 ** 31 - 1)   # M_TRIM_THRESHOLD

    def synchronize(self):
        pass

    def reset_memory(self):
        pass

    def get_rng(self):
        """ByteTensor, or None where torch's own state is all there is."""
        return None

    def set_rng(self, state):
        pass


class Cuda(Cpu):
    backend, pinned = "nccl", True

    @property
    def module(self):
        return torch.cuda

    def absent(self):
        if torch.cuda.is_available():
            return ""
        built = torch.version.cuda or torch.version.hip
        return "no usable NVIDIA or AMD GPU" if built else "this torch is built without it"

    def precisions(self, device):
        # Emulated bf16 exists on older GPUs and is slower than fp32.
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return ["fp32", "fp16"] + ["bf16"] * native

    def memory(self):
        return self.module.max_memory_allocated()

    def count(self):
        return self.module.device_count()

    def select(self, index):
        self.module.set_device(index)

    def synchronize(self):
        self.module.synchronize()

    def reset_memory(self):
        self.module.reset_peak_memory_stats()

    def get_rng(self):
        return self.module.get_rng_state()

    def set_rng(self, state):
        self.module.set_rng_state(state)


class Npu(Cuda):
    backend = "hccl"

    @property
    def module(self):
        return torch.npu

    def absent(self):
        if not hasattr(torch, "npu"):
            install = "install the torch_npu release made for this torch: pip install torch_npu"
            if importlib.util.find_spec("torch_npu") is None:
                return f"torch_npu is not installed ({install})"
            try:
                import torch_npu  # noqa: F401
            except Exception as error:  # a missing CANN library shows up as almost any type
                return f"torch_npu does not import: {one_line(error)} ({install}, and source CANN)"
        return "" if torch.npu.is_available() else "no usable Ascend NPU"

    def precisions(self, device):
        # Older Ascends saturate at 65504 where others give inf: an overflow would go unseen.
        shows_inf = getattr(torch.npu.utils, "is_support_inf_nan", lambda: False)()
        return ["fp32"] + ["fp16"] * shows_inf + ["bf16"] * torch.npu.is_bf16_supported()


class Mps(Cpu):
    backend, workers, context = "", 0, "spawn"

    def absent(self):
        if torch.backends.mps.is_available():
            return ""
        built = torch.backends.mps.is_built()
        return "macOS is too old or there is no Apple GPU" if built else (
            "this torch is built without it")

    def precisions(self, device):
        names = ["fp32"]
        if torch_version() >= (2, 8):  # before, unscaling gradients failed there
            names.append("fp16")
        with contextlib.suppress(TypeError, RuntimeError):  # old systems have no bf16
            torch.ones(1, device=device, dtype=torch.bfloat16).add(1)
            names.append("bf16")
        return names

    def memory(self):
        return torch.mps.driver_allocated_memory()

    def select(self, index):
        pass

    def synchronize(self):
        torch.mps.synchronize()

    def get_rng(self):
        return torch.mps.get_rng_state()

    def set_rng(self, state):
        torch.mps.set_rng_state(state)


KINDS = {"cuda": Cuda(), "npu": Npu(), "mps": Mps(), "cpu": Cpu()}  # the order "auto" tries


# -----------------------------------------------------------------------------
# Choosing

def start(device="auto", precision="auto", seed=0, deterministic=False):
    """Choose where and how to run, join the other processes, seed, and say so in one line -> Run.

    device: auto, cuda, cuda:N, npu, npu:N, mps or cpu; one that is not there raises UserError.
    precision: auto, fp32, bf16 or fp16. seed: 0 <= seed < 2**32, the same in every process.
    """
    tolerate_any_locale()
    rank, local_rank, world_size = torchrun_environment()
    device, why = pick_device(str(device), local_rank, world_size)
    select(device)
    precision, why_precision = pick_precision(device, precision)
    if world_size > 1 and not dist.is_initialized():  # after the device, which nccl asks for
        meet(device, world_size)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
    run = Run(device, precision, rank, world_size, seed)
    run.say(f"device {device}{why} | precision {precision}{why_precision} | "
            f"processes {world_size} | threads {torch.get_num_threads()} | "
            f"torch {torch.__version__}")
    return run


def torchrun_environment():
    """(rank, local rank, number of processes) as torchrun put them into the environment."""
    world_size = os.environ.get("WORLD_SIZE", "")
    if world_size in ("", "0", "1"):
        return 0, 0, 1
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
    missing = [name for name in names if not os.environ.get(name)]
    odd = [name for name in names[:4] if not os.environ.get(name, "0").isdigit()]
    if missing or odd:
        raise UserError(
            f"WORLD_SIZE={world_size} is set in the environment, but {', '.join(missing or odd)} "
            "is not as torchrun sets it: for one process `unset WORLD_SIZE RANK LOCAL_RANK`, for "
            "several start with `torchrun --nproc-per-node 2 SCRIPT.py ...`")
    if int(os.environ["MASTER_PORT"]) == 0:  # each process would take a port of its own
        raise UserError("MASTER_PORT=0: expected the number of a free port, the same for all "
                        "processes; `torchrun --standalone` finds one")
    return tuple(int(os.environ[name]) for name in names[:3])


def meet(device, world_size):
    """Join the process group. Raises UserError if the port is taken or the others do not come."""
    backend = KINDS[device.type].backend
    bound = {"device_id": device} if backend == "nccl" else {}  # spares nccl a guess
    try:
        dist.init_process_group(backend, timeout=PATIENCE, **bound)
    except (RuntimeError, ValueError, OverflowError) as error:  # the last: a port above 65535
        if "Duplicate GPU" in str(error):
            raise UserError(f"several of the {world_size} processes got the same GPU ({device}): "
                            "start as many processes as there are GPUs") from error
        raise UserError(
            f"the {world_size} processes cannot meet at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} ({one_line(error)[:150]}): expected a free port, and "
            f"all {world_size} of them; `torchrun --standalone --nproc-per-node {world_size} "
            "SCRIPT.py ...` takes care of both") from error


def pick_device(asked, local_rank=0, world_size=1):
    """-> torch.device, and in brackets why. Raises UserError if it is not there."""
    match = re.fullmatch(r"auto|(cuda|npu|mps|cpu)(?::(\d+))?", asked)
    if not match:
        raise UserError(f"unknown device {asked!r}: expected auto, cuda, cuda:N, npu, npu:N, "
                        "mps or cpu")
    name, index, why = match[1], match[2], ""
    if asked == "auto":
        reasons = {}
        for name, kind in KINDS.items():
            alone = world_size == 1 or kind.backend
            reasons[name] = kind.absent() or ("" if alone else "one process only")
            if not reasons[name]:
                break
        why = "; ".join(f"{n}: {reason.split(' (')[0]}" for n, reason in reasons.items() if reason)
        why = f" (auto; {why})" if why else " (auto)"
    kind = KINDS[name]
    if kind.absent():
        raise UserError(f"device {name} is not usable: {kind.absent()}. {what_exists()}")
    if world_size > 1 and not kind.backend:
        raise UserError(f"{name} has one GPU for one process, but torchrun started "
                        f"{world_size}: run the script without torchrun")
    if world_size > 1 and name != "cpu":
        if index is not None:
            raise UserError(f"device {asked}: with {world_size} processes each takes its own; "
                            f"ask for {name} without a number")
        # Where the scheduler shows each process its own GPU alone, that is number 0.
        index = local_rank if kind.count() > 1 else 0
    index = int(index or 0)
    if index >= kind.count():
        raise UserError(f"device {name}:{index} does not exist. {what_exists()}")
    return (torch.device(name, index) if kind.pinned else torch.device(name)), why


def what_exists():
    here = []
    for name, kind in KINDS.items():
        if not kind.absent():
            last = kind.count() - 1
            here.append(f"{name}:0 to {name}:{last}" if last > 0 else name)
    return f"Here there is: {', '.join(here)}. Ask for one of these, or --device auto"


def select(device):
    """Make `device` this process's own, and try it."""
    try:
        KINDS[device.type].select(device.index or 0)
        torch.ones(1, device=device).add(1).cpu()
    except RuntimeError as error:  # busy, or too old for this torch
        raise UserError(f"{device} is listed but does not work: {one_line(error)}") from error


def pick_precision(device, asked):
    """-> name of a precision that the device has, and in brackets why."""
    names = KINDS[device.type].precisions(device)
    if asked == "auto":
        if device.type != "cuda":
            return "fp32", " (auto)"
        if "bf16" in names:
            return "bf16", " (auto; this GPU computes bf16 natively, and it needs no loss scaling)"
        # Before tensor cores (Volta, 7.0) half precision is no faster than single.
        fast = torch.cuda.get_device_capability(device) >= (7, 0)
        return ("fp16", " (auto; no native bf16)") if fast else ("fp32", " (auto; an older GPU)")
    if asked not in PRECISIONS:
        raise UserError(f"unknown precision {asked!r}: expected auto, {', '.join(PRECISIONS)}")
    if asked not in names:
        raise UserError(f"{device} cannot compute in {asked} with torch {torch.__version__}: "
                        f"expected --precision {' or '.join(names)}")
    if device.type == "cpu" and asked != "fp32":
        return asked, " (slow on most CPUs: `python -m tools.doctor` measures it)"
    return asked, ""


def torch_version():
    """(major, minor)"""
    return tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))


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


class Scaler:
    """Loss scaling for fp16 (Micikevicius et al. 2018): the scale halves when a gradient
    overflows and doubles after 2,000 steps that do not. Switched off it changes nothing."""

    def __init__(self, device, enabled):
        self.enabled = enabled
        self.value = torch.full((), 65536.0 if enabled else 1.0, device=device)
        self.good = torch.zeros((), device=device)  # steps since the last change

    def is_enabled(self):
        return self.enabled

    def scale(self, loss):
        return loss * self.value if self.enabled else loss

    def get_scale(self):
        return float(self.value)  # waits for the device

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
        self._signals = {"number": 0, "since": 0.0, "old": {}}  # shared by the runs of a process
        self._early = []  # lines said before there was a folder; every run's log begins with them
        self._start(seed)

    def enter(self, seed):
        """A Run on the same device and processes with another seed and clock, without a folder."""
        other = copy.copy(self)
        other._early = self._early[:1]
        other._start(seed)
        return other

    def _start(self, seed):
        if type(seed) is not int or not 0 <= seed < 2 ** 32:
            raise UserError(f"seed {seed} is not a whole number from 0 to 4294967295")
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)  # every accelerator's generator too
        self.seed, self.out, self._identity = seed, None, {}
        self._log_every, self._save_every, self._logged = 20, 0, 0
        self._began, self._peak, self._progress = time.monotonic(), 0.0, 0
        # Training time alone: totals over the whole run, over this process, since the last line.
        self._timed, self._here = [0, 0.0], [0, 0.0]
        self._seen, self._spent, self._waited, self._asked = 0, 0.0, 0.0, self._began
        self._bad, self._unchecked, self._fine = 0, [], None
        self._scaler, self._buffers, self._kept, self._stopping = None, [], [], 0
        self.kind.reset_memory()

    # -------------------------------------------------------------------------
    # Placement

    def move(self, *things):
        """Tensors or modules to the device. One thing comes back as itself, several as a tuple."""
        moved = []
        for x in things:
            # Only from pinned memory is a copy that nobody waits for safe.
            pinned = torch.is_tensor(x) and self.kind.pinned and (
                x.device.type == "cpu" and x.is_pinned())
            moved.append(x.to(self.device, non_blocking=True) if pinned else x.to(self.device))
        return moved[0] if len(moved) == 1 else tuple(moved)

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
        if workers == -1:
            cpus = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                    else os.cpu_count() or 1)
            cpus //= max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
            # Where workers start as fresh interpreters they cost more than they bring by default.
            slow_start = sys.platform in ("win32", "darwin")
            workers = 0 if slow_start else max(1, min(self.kind.workers, cpus))
            workers = min(workers, self.kind.workers)
        return {"workers": workers, "pin_memory": self.kind.pinned,
                "multiprocessing_context": self.kind.context if workers else None}

    def synchronize(self):
        """Wait until the device has done what it was given; only timing needs this."""
        self.kind.synchronize()

    def memory_mb(self):
        """Peak memory of this run in MB; on a cpu that of the process, on mps the largest seen."""
        self._peak = max(self._peak, self.kind.memory() / 2 ** 20)
        return round(self._peak, 1)

    # -------------------------------------------------------------------------
    # Processes

    def gather(self, x, counts=None):
        """(B, D) of each process -> (W * B, D) in rank order, with the exact gradient.

        Every process sees the gradient of the *sum* of all processes' losses. counts: rows per
        process where shares differ; without it all must have the same B.
        """
        if self.world_size == 1:
            return x
        return Gather.apply(x, list(counts or [len(x)] * self.world_size))

    def sum(self, x):
        """Sum over processes of a number or a tensor, as the same kind, no gradient."""
        if self.world_size == 1:
            return x.detach().clone() if torch.is_tensor(x) else x
        if not torch.is_tensor(x):
            return sum(self.gather_objects(x))  # as Python numbers: exact for ints and float64
        total = x.detach().to(self.device, copy=True).contiguous()
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
                if p.grad is not None:
                    p.grad.copy_(total.view_as(p))
                elif someone:
                    p.grad = total.view_as(p).clone()

    def gather_objects(self, x):
        """[x of process 0, x of process 1, ...]; x is small and picklable."""
        if self.world_size == 1:
            return [x]
        objects = [None] * self.world_size
        dist.all_gather_object(objects, x)
        return objects

    def on_first(self, work):
        """Result of `work()` on the first process; its error is raised in every process."""
        if self.world_size == 1:
            return work()
        result = error = caught = None
        if self.rank == 0:
            try:
                result = work()
            except Exception as raised:
                caught = raised
                # Other errors may not survive the journey to the other processes.
                travels = hasattr(caught, "exit_code") or type(caught) is TypeError
                error = caught if travels else RuntimeError(one_line(caught))
        result, error = self.gather_objects((result, error))[0]
        if error is not None:
            raise shared(caught or error)
        return result

    # -------------------------------------------------------------------------
    # Training

    def batches(self, loader, at):
        """Yield the batches from where `at` stands up to at.steps, over epochs; see `tick`, which
        moves `at`. Signals are watched meanwhile: once the checkpoint that one asked for is saved,
        Interrupted is raised here.

        loader: has a length, and a batch_sampler with set_epoch(epoch, first_batch=).
        """
        at.batches = len(loader)
        if not at.batches:
            raise UserError("the training data gives no batch: expected a smaller --batch-size")
        with self._watching_signals():
            while at.step < at.steps:
                loader.batch_sampler.set_epoch(at.epoch, first_batch=at.batch)
                self._asked, before = time.monotonic(), at.step
                for batch in loader:
                    self._waited += time.monotonic() - self._asked
                    yield batch
                    if self._stopping:
                        number = signal.Signals(self._stopping)
                        raise shared(Interrupted(f"stopped by {number.name} after saving; "
                                                 "--resume auto continues", 128 + number))
                    if at.step >= at.steps:
                        return
                    self._asked = time.monotonic()
                if at.step == before:
                    raise RuntimeError(f"the loader gave no batch of epoch {at.epoch}")

    @torch.no_grad()
    def update(self, optimizer, parameters, scaler, clip=0.0, loss=None):
        """Unscale and clip (if clip > 0) the gradients, then step -> bool tensor (): whether the
        weights moved.

        If a gradient or this step's loss is inf or nan in any process, the step changes nothing:
        no weights, moments, decay, and no buffers given to `load_training`; nor the loss scale,
        unless only the scaled gradients overflowed. Call it after `sum_gradients`. On cuda with a
        fused optimizer it does not wait for the device.
        """
        parameters = [p for p in parameters if p.grad is not None]
        sound = torch.ones((), dtype=torch.bool, device=self.device)
        if loss is not None:
            sound = torch.as_tensor(loss, device=self.device).detach().isfinite().all()
        # One by one: the largest of several norms hides a nan on mps.
        finite = torch.stack([sound] + [p.grad.isfinite().all() for p in parameters]).all()
        if self.world_size > 1:
            flags = torch.stack([sound, finite]).int()
            dist.all_reduce(flags, op=dist.ReduceOp.MIN)
            sound, finite = flags.bool()
        if scaler.is_enabled():
            for p in parameters:
                p.grad.div_(scaler.value)
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        self._step(optimizer, finite)
        overflow = sound & ~finite
        self._fine = finite
        if scaler.is_enabled():  # a scale that is still falling is no failure
            self._fine = finite | overflow & (scaler.value > 1)
            scaler.adapt(finite, overflow)
        self._scaler = scaler
        for buffer, kept in zip(self._buffers, self._kept):
            kept.copy_(torch.where(finite, buffer, kept))
            buffer.copy_(kept)
        return finite

    def _step(self, optimizer, finite):
        fused = self.device.type == "cuda" and all(g.get("fused") for g in optimizer.param_groups)
        if not (fused and optimizer.state):  # fused SGD's first step would keep empty momentum
            if finite:
                optimizer.step()
            return
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf

    def tick(self, at, losses, samples, describe=None, **scalars):
        """Count a step: move `at`, check the step, log, look for signals -> whether a checkpoint
        is due (end of an epoch, --save-every, the last step, a signal). Once after each `update`.

        losses: {name: this process's part}, logged as sums over processes; scalars: logged as
        they are, floats or 0-dim tensors. samples: of the whole batch. describe: () -> str, what
        was in this batch; called for a bad step only and perhaps steps later, so bind its
        arguments (functools.partial). SafeStop after three bad steps in a row.
        """
        at.step, at.batch, self._seen = at.step + 1, at.batch + 1, self._seen + samples
        epoch = at.epoch + 1  # as people count
        if at.batch == at.batches:
            at.epoch, at.batch = at.epoch + 1, 0
        self._unchecked.append((self._fine, describe, at.step))
        log = at.step % self._log_every == 0 or at.step == at.steps
        due = at.batch == 0 or at.step == at.steps or bool(
            self._save_every and at.step % self._save_every == 0)
        free = self.device.type == "cpu"  # reading a flag is; elsewhere it waits for the device
        if log or due or free:
            self._check_steps()
        if free or due or self.world_size == 1 or at.step % min(self._log_every, 20) == 0:
            self._stopping = self._signal_anywhere()
            due = due or bool(self._stopping)
        names = list(losses) if log else []
        values = self.sum(torch.stack([torch.as_tensor(losses[name], device=self.device).detach()
                                       .float() for name in names])).tolist() if log else []
        spent = time.monotonic() - self._asked
        self._asked += spent
        self._spent += spent
        for total, more in ((self._timed, samples), (self._here, 1)):
            total[0], total[1] = total[0] + more, total[1] + spent
        self.progress(at.step, at.steps, "step")
        if log:
            if self._scaler is not None and self._scaler.is_enabled():
                scalars["loss_scale"] = self._scaler.get_scale()
            self._log_training(at, epoch, {**dict(zip(names, values)), **scalars})
        return due

    def _check_steps(self):
        """Say which steps since the last look were skipped; SafeStop at the third in a row."""
        steps, self._unchecked = [x for x in self._unchecked if x[0] is not None], []
        if not steps:
            return
        for fine, (_, describe, step) in zip(torch.stack([x[0] for x in steps]).tolist(), steps):
            self._bad = 0 if fine else self._bad + 1
            if fine:
                continue
            here = describe() if describe else f"step {step}"
            what = "; ".join(dict.fromkeys(filter(None, self.gather_objects(here))))
            what = f"the loss or its gradient is not finite at {what}"
            if self._bad < BAD_STEPS:
                self.say(f"step skipped: {what}")
                continue
            raise shared(SafeStop(
                f"{self._bad} steps in a row were skipped, {what}; training stopped and the last "
                "checkpoint is intact. Try a smaller --lr, --grad-clip, or --precision fp32"))

    def _signal_anywhere(self):
        number = self._signals["number"]
        if self.world_size > 1:
            largest = torch.tensor(number, device=self.device, dtype=torch.int32)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            number = int(largest)
        return number

    @contextlib.contextmanager
    def _watching_signals(self):
        """Inside, Ctrl-C and SIGTERM ask to stop, and a second one exits at once, saving nothing.
        Only in the main thread: Python allows no other."""
        if self._signals["old"] or threading.current_thread() is not threading.main_thread():
            yield
            return
        owner, seen = os.getpid(), self._signals

        def handle(number, frame):
            if os.getpid() != owner:  # a loader's worker: its parent tells it when to stop
                if number == signal.SIGTERM:
                    os._exit(128 + number)
            elif not seen["number"]:
                seen["number"], seen["since"] = number, time.monotonic()
            # Ctrl-C under torchrun comes twice at once: from the terminal and from torchrun.
            elif self.world_size == 1 or time.monotonic() - seen["since"] > 2:
                os._exit(128 + number)
        seen["number"] = self._stopping = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            seen["old"][number] = signal.signal(number, handle)
        try:
            yield
        finally:
            while seen["old"]:
                signal.signal(*seen["old"].popitem())

    # -------------------------------------------------------------------------
    # Speaking

    def say(self, text):
        """Print a line, and append it to log.txt."""
        if self.rank:
            return
        if self._progress:
            show("\r" + " " * self._progress + "\r", end="")
            self._progress = 0
        show(text)
        if self.out:
            self._append("log.txt", text)
        else:
            self._early.append(text)  # a folder that may be refused is not written to

    def progress(self, done, total, what=""):
        """A line that overwrites itself on a terminal; nothing at all elsewhere."""
        if self.rank or not (sys.stdout and sys.stdout.isatty()):
            return
        text = f"{what} {done}/{total}"
        show("\r" + text.ljust(self._progress), end="")
        self._progress = len(text)

    def log(self, step, split, **scalars):
        """Scores: one line for people, one JSON object in metrics.jsonl for programs. scalars are
        already global; floats or 0-dim tensors."""
        words = [f"{split} at step {step}" if step else split]
        self._record(words, {"step": step, "epoch": None, "split": split}, scalars)

    def _log_training(self, at, epoch, scalars):
        rate, wait = self._seen / max(self._spent, 1e-9), self._waited / max(self._spent, 1e-9)
        left = (at.steps - at.step) * self._here[1] / self._here[0]
        words = [f"{at.step:>{len(str(at.steps))}}/{at.steps}"]
        after = [f"{rate:.3g} samples/s  wait {wait:.0%}  {self.memory_mb():.0f} MB  "
                 f"eta {datetime.timedelta(seconds=round(left))}"]
        self._seen, self._spent, self._waited = 0, 0.0, 0.0
        self._record(words, {"step": at.step, "epoch": epoch, "split": "train"}, scalars, after,
                     rate, wait)

    def _record(self, words, record, scalars, after=(), rate=0.0, wait=0.0):
        if self.rank:
            return
        scalars = {name: plain(value) for name, value in scalars.items()}
        words += [f"{name} {f'{x:.4g}' if isinstance(x, float) else x:<8}"
                  for name, x in scalars.items()]
        self.say("  ".join([*words, *after]).rstrip())
        record = {**record, **scalars, "samples_per_second": round(rate, 3),
                  "data_wait": round(wait, 4), "memory_mb": self.memory_mb(),
                  "time": round(time.time(), 3)}
        if self.out:
            self._append("metrics.jsonl", json.dumps(record, ensure_ascii=False))
            self._logged += 1

    # -------------------------------------------------------------------------
    # The run's folder

    def begin(self, folder, args, identity):
        """Take `folder` for this run -> (checkpoint to go on from or None, results of a run that
        is finished or None).

        args: the flags of `add_run_flags`, kept in config.json. identity: what must not change
        when the run is continued (see `run_identity`). With args.eval_only nothing is claimed or
        written, and the checkpoint is the one to score. Raises UserError, before anything is
        changed, for a folder that cannot be used or holds another run, and for a checkpoint of
        another one.
        """
        folder, named = expanded(folder), args.resume not in ("auto", "none")
        self._identity = identity = json.loads(json.dumps(plain(identity), default=str))
        self._log_every, self._save_every = args.log_every, args.save_every
        stored = load_checkpoint(args.resume) if named else None
        if args.eval_only:
            self.out = None
            if args.resume == "auto":
                best = folder / BEST
                stored = self.load(best if best.exists() else folder / LAST)
                if not stored:
                    self.say(f"no checkpoint in {folder}: the weights are scored as --weights "
                             "gives them")
            if stored:
                self._refuse_other(stored.get("identity"), args.resume if named else folder,
                                   only=("method", "model", "weights"))
            return stored, None
        if named:
            self._refuse_other(stored.get("identity"), args.resume)
        continues = self.on_first(lambda: self._claim(folder, args))
        self.out = folder
        if named:
            self.on_first(lambda: self._take_best(args.resume, stored))
        elif continues:
            stored = self.load(LAST)
        self._agree(stored)
        if stored:
            self._refuse_other(stored.get("identity"), args.resume if named else folder)
        done = folder / "results.json"
        if continues and done.exists():
            self.say(f"{folder} holds this run, finished; --overwrite runs it again")
            return stored, json.loads(done.read_text("utf-8"))
        self.on_first(lambda: self._rewind(stored if continues else None))
        if stored:
            self.say(f"continuing after step {stored['step']}")
        return stored, None

    def _claim(self, folder, args):
        """Check, clear and make the folder -> whether there is a run in it to continue."""
        refuse_unusable(folder)
        names = ["config.json", "env.json", "command.txt", "log.txt", "metrics.jsonl",
                 "results.json", "*_last.pt", "*_prev.pt", "*_best.pt"]
        held = [path for name in names for path in sorted(folder.glob(name))]
        overwrite = args.overwrite or args.dry_run
        if held and not overwrite and args.resume != "auto":
            raise UserError(f"{folder} already holds a run ({held[0].name}): --resume auto "
                            "continues it, --overwrite starts again, or choose another "
                            "--output-dir")
        config = folder / "config.json"
        if config.exists():
            try:
                theirs = dict(json.loads(config.read_text("utf-8"))["identity"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                # Somebody else's folder perhaps: a downloaded model has a config.json too.
                raise UserError(f"{config} is not of a run of this program, or damaged: choose "
                                "another --output-dir, or move the file away") from error
            if not overwrite:
                self._refuse_other(theirs, folder, finished=(folder / "results.json").exists())
        command = " ".join(map(shlex.quote, [sys.executable, *sys.argv])) + "\n"
        before = folder / "command.txt"
        if before.exists() and not overwrite:
            command = before.read_text("utf-8", "replace") + command
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in held if overwrite else []:
                path.unlink()
            for path in (p for name in names for p in folder.glob(name + ".tmp")):
                path.unlink()  # left by a write that was killed
        except OSError as error:
            raise UserError(f"the output folder {folder} cannot be used: "
                            f"{error.strerror or error}; choose another --output-dir") from error
        config = {**{k: v for k, v in vars(args).items() if k[0] != "_"},
                  "identity": self._identity}
        for name, content in (("config.json", config), ("command.txt", command),
                              ("env.json", self._environment())):
            write_atomic(folder / name, content)
        with open(folder / "log.txt", "ab") as file:
            file.write("".join(line + "\n" for line in self._early)
                       .encode("utf-8", "backslashreplace"))
        return bool(held) and not overwrite

    def _refuse_other(self, theirs, where, only=None, finished=False):
        """Raise UserError unless `theirs` is this run's identity (or its `only` keys are)."""
        ours = self._identity
        if not isinstance(theirs, dict) or theirs.get("method") != ours.get("method"):
            raise UserError(f"{where} is not of a run of this script; a CLIP to start from goes "
                            "to --weights, and a new run needs another --output-dir")
        changed = {key: f"{key} was {theirs.get(key)!r}, now {ours.get(key)!r}"
                   for key in only or sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)}
        if not changed:
            return
        if finished and set(changed) <= {"epochs", "max_steps"}:
            raise UserError(f"{where} holds a finished run ({'; '.join(changed.values())}): to "
                            "train on, start a new run from its best weights with "
                            f"--weights {where} --output-dir OTHER")
        raise UserError(f"{where} is of another run ({'; '.join(changed.values())}): choose "
                        "another --output-dir for a new run, or give the old values to continue")

    def _take_best(self, path, stored):
        """The best weights that lie beside a checkpoint of another folder come along."""
        best = expanded(path).parent / BEST
        if best.exists() and best.parent.resolve() != self.out.resolve():
            state = load_checkpoint(best)
            if state.get("step", math.inf) <= stored["step"]:
                write_checkpoint(self.out / BEST, state)

    def _agree(self, stored):
        steps = self.gather_objects(stored and stored.get("step"))
        if len(set(steps)) > 1:
            raise shared(UserError(f"the processes found checkpoints of steps {steps} in "
                                   f"{self.out}: --output-dir must be on a disk they share"))

    def _rewind(self, stored):
        """Forget what was logged after the checkpoint, so that metrics.jsonl equals that of an
        uninterrupted run but for the times."""
        path = self.out / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        self._logged = stored["logged"] if stored else 0
        if len(lines) > self._logged:
            write_atomic(path, b"".join(lines[:self._logged]))

    def _environment(self):
        versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
        for name in ("torchvision", "torch_npu", "numpy", "pillow"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        return {**versions, "device": str(self.device), "precision": self.precision,
                "processes": self.world_size, "threads": torch.get_num_threads(),
                "cuda": torch.version.cuda or torch.version.hip, "platform": platform.platform(),
                "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
                "git": git_commit()}

    def write(self, name, content):
        """Write bytes, a text, or an object as JSON to a file in `out`, whole or not at all."""
        if self.out:
            self.on_first(lambda: write_atomic(self.out / name, content))

    def finish(self, results):
        """`results` with what every script adds, written to results.json. Returns the dict."""
        self.synchronize()
        memory = max(self.gather_objects(self.memory_mb()))
        samples, seconds = self._timed
        results = {"samples_per_second": round(samples / seconds, 3) if seconds else 0.0,
                   **plain(results), "seconds": round(time.monotonic() - self._began, 3),
                   "peak_memory_mb": memory, "device": str(self.device),
                   "precision": self.precision, "processes": self.world_size,
                   "git": git_commit(), "torch": str(torch.__version__)}
        self.write("results.json", results)
        return results

    def _append(self, name, line):
        try:
            with open(self.out / name, "ab") as file:  # one write: a kill cannot mix two lines
                file.write((line + "\n").encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise SafeStop(f"cannot write {self.out / name}: {error.strerror}; the last "
                           "checkpoint is intact") from error

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
            "timed": self._timed, "logged": self._logged,
            "rng": self.gather_objects(self.rng_state()), "identity": self._identity, **more})

    def load_training(self, stored, trainable, optimizer, scaler, buffers=()):
        """Put what `save_training` wrote back in place -> Place. stored None: a new run."""
        if not stored:
            self._keep(buffers)
            return Place()
        self.restore(stored, trainable, buffers)
        optimizer.load_state_dict(stored["optimizer"])
        scaler.load_state_dict(stored["scaler"])
        self.set_rng_state(stored["rng"])
        self._timed = list(stored["timed"])
        return Place(stored["epoch"], stored["batch"], stored["step"])

    @torch.no_grad()
    def restore(self, stored, trainable, buffers=()):
        """Copy the stored weights into `trainable` and `buffers`. UserError unless the names and
        shapes are the same."""
        for there, here in ((stored["weights"], trainable), (stored["buffers"], dict(buffers))):
            odd = sorted({*there} ^ {*here}) or [
                name for name in here if here[name].shape != there[name].shape]
            if odd:
                raise UserError(f"the checkpoint holds {len(there)} tensors and {len(here)} are "
                                f"expected here, e.g. {odd[0]!r} does not fit; it belongs to "
                                "another --model or other flags of what is trained")
            for name, tensor in here.items():
                tensor.copy_(there[name])
        self._keep(buffers)

    def _keep(self, buffers):
        self._buffers = list(dict(buffers).values())
        self._kept = [buffer.detach().clone() for buffer in self._buffers]

    def save(self, path, state):
        """Write `state` (tensors, numbers, text, containers of them) so that a kill at any moment
        leaves a file that loads. `x_last.pt` keeps its predecessor as `x_prev.pt`. A bare name
        lies in `out`; without `out` nothing is written.

        Raises TypeError for what a safe load would refuse, SafeStop for nan or inf in a tensor or
        a disk that does not take it; the old file is intact then.
        """
        path = self._inside(path)
        if path:
            self.on_first(lambda: write_checkpoint(path, state))

    def load(self, path):
        """The checkpoint at `path`, or its predecessor when that is damaged or gone; None when
        neither is there. Raises UserError when none can be read."""
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
        if path.parent != pathlib.Path():
            return path
        return self.out / path if self.out else None

    def rng_state(self):
        """This process's random state, cheap enough for every piece of a batch; no other process
        takes part."""
        name, keys, *rest = np.random.get_state()
        return {"python": random.getstate(), "numpy": (str(name), keys.tolist(), *rest),
                "torch": torch.get_rng_state(), "device_type": self.device.type,
                "device": self.kind.get_rng()}

    def set_rng_state(self, state):
        """Restore what `rng_state` gave, or this process's entry of a list of them."""
        if isinstance(state, (list, tuple)):
            if len(state) != self.world_size:
                self.say(f"note: the checkpoint is of {len(state)} processes, not "
                         f"{self.world_size}: dropout will differ, the order of samples will not")
            state = state[min(self.rank, len(state) - 1)]
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"].cpu())
        if state["device_type"] != self.device.type:
            self.say(f"note: the random state of {state['device_type']} is of no use on "
                     f"{self.device.type}: dropout will differ, the order of samples will not")
        elif state["device"] is not None:
            self.kind.set_rng(state["device"].cpu())


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
        raise UserError(f"{path} has no meaning: HOME is not set; set it, or write the whole path")
    return path


def refuse_unusable(folder):
    """Raise UserError if a run's folder could not be made or written to. Creates nothing."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        why = f"{nearest} is not a folder"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        why = f"{nearest} cannot be written"
    else:
        return
    raise UserError(f"the output folder {folder} cannot be used: {why}; choose another "
                    "--output-dir")


def load_checkpoint(path):
    """Read a checkpoint onto the CPU, as tensors and plain values; no code in it can run.

    Raises UserError with a diagnosis: absent, empty, a web page, a Git LFS pointer, compressed,
    cut short, damaged (every byte is checked, which torch.load does not do), or a pickle.
    """
    path = expanded(path)
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise UserError(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    problem = diagnosis(path, head)
    if problem:
        raise UserError(f"{path} {problem}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has five types for this
        raise UserError(f"{path} holds something other than tensors and plain values; refused, "
                        f"nothing in it was run ({one_line(error)[:120]})") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint of this program")
    return state


def diagnosis(path, head):
    """What is wrong with a checkpoint's file, or "". Reads it whole: 0.3 s for 340 MB."""
    if not head:
        return "is empty (0 bytes): copy or download it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: run `git lfs pull`"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not a checkpoint: a download went wrong, download it again"
    if head.startswith(b"\x1f\x8b"):
        return "is compressed with gzip: unpack it first"
    if not head.startswith(b"PK\x03\x04"):
        return "is not a checkpoint (it does not start like one): copy or download it again"
    try:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return "is a TorchScript archive, not a checkpoint: pass it as --weights"
            broken = archive.testzip()
    except Exception as error:  # zipfile, zlib, struct and others, each for its own kind of damage
        return (f"is cut short or damaged ({path.stat().st_size} bytes; {one_line(error)}): "
                "use an older copy")
    return f"is damaged: the checksum of {broken} is wrong; use an older copy" if broken else ""


def previous(path):
    return path.with_name(re.sub("_last$", "_prev", path.stem) + path.suffix)


def write_checkpoint(path, state):
    """See `Run.save`."""
    state = portable(state, "state", path.name)
    write_whole(path, lambda file: torch.save(state, file), keep=previous(path))


def write_atomic(path, content):
    """Write bytes, a text, or an object as JSON, whole or not at all."""
    if not isinstance(content, (bytes, str)):
        content = json.dumps(plain(content), indent=1, ensure_ascii=False, default=str) + "\n"
    if isinstance(content, str):
        content = content.encode("utf-8", "backslashreplace")
    write_whole(path, lambda file: file.write(content))


def write_whole(path, write, keep=None):
    """write(file) beside `path`, then rename: a kill leaves the old file or the new one. keep:
    where the old one goes."""
    temp = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temp, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # Between the two renames only the previous one is there; `Run.load` knows.
        if keep and keep != path and path.exists():
            os.replace(path, keep)
        os.replace(temp, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer hides a full disk in a RuntimeError
        if is_lost(error):  # a loader's worker, whose death interrupts whatever goes on
            raise
        raise SafeStop(f"{path} could not be written ({one_line(error)[:200]}); the last good "
                       "checkpoint is intact. Free space and continue with "
                       "--resume auto") from error
    finally:
        with contextlib.suppress(OSError):
            temp.unlink()


def sync_folder(folder):
    """A rename survives a power cut once its folder is on the disk too."""
    with contextlib.suppress(OSError):  # Windows and some network file systems cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def portable(x, where, name):
    """A copy of `x` with its tensors on the CPU. TypeError for what would not load again, SafeStop
    for a tensor that is not finite."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        if x.is_floating_point() and x.numel() and not all(map(math.isfinite, x.aminmax())):
            raise SafeStop(f"{where} holds nan or inf, so {name} was not written and the last "
                           "good checkpoint stays. Try a smaller --lr or --precision fp32")
        # A view would bring the whole of what it is a view of; a Parameter is a plain tensor here.
        whole = x.untyped_storage().nbytes() <= x.numel() * x.element_size()
        return x if whole else x.clone()
    if type(x) in (dict, collections.OrderedDict):
        return {portable(key, f"a key of {where}", name):
                portable(value, f"{where}[{key!r}]", name) for key, value in x.items()}
    if type(x) in (list, tuple, set):
        return type(x)(portable(v, f"{where}[{i}]", name) for i, v in enumerate(x))
    # Exact types: numpy.float64 is a float, but a file with one in it would not load again.
    if x is None or type(x) in (bool, int, float, str, torch.dtype, torch.device, torch.Size):
        return x
    raise TypeError(f"{where} is a {type(x).__module__}.{type(x).__name__}, which a checkpoint "
                    "cannot hold: convert it with float(), str(), vars() or torch.as_tensor()")


def plain(x):
    """`x` as JSON can hold it: scalars as Python numbers, nan and inf as "nan", "inf", "-inf"."""
    if isinstance(x, dict):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(value) for value in x]
    if hasattr(x, "item"):
        x = x.item()
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    return x


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def git_commit():
    """Commit of this file's folder, with "-dirty" if files differ from it; "" outside git."""
    def git(*words):
        return subprocess.run(["git", *words], cwd=pathlib.Path(__file__).resolve().parent,
                              capture_output=True, text=True, timeout=10, check=True).stdout
    try:
        commit = git("rev-parse", "HEAD").strip()
        return commit + ("-dirty" if git("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return ""


# -----------------------------------------------------------------------------
# The command line

def whole(least=0, most=None):
    """An argparse type: a whole number from `least` to `most`."""
    def read(text):
        with contextlib.suppress(ValueError):
            value = int(str(text))
            if least <= value and (most is None or value <= most):
                return value
        upto = "" if most is None else f" to {most}"
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {least}{upto}")
    return read


def number(least=0.0, most=math.inf, above=False):
    """An argparse type: a finite number from `least` (or above it) to `most`."""
    def read(text):
        with contextlib.suppress(ValueError):
            value = float(str(text))
            if math.isfinite(value) and value <= most and (
                    value > least if above else value >= least):
                return value
        start = "a number" if least == -math.inf else f"a number {'above' if above else 'from'} " \
            f"{least:g}"
        upto = "" if most == math.inf else f" to {most:g}"
        raise argparse.ArgumentTypeError(f"{text!r}: expected {start}{upto}")
    return read


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
        parsed, odd = super().parse_known_args((self.stored(path) if path else []) + words,
                                               namespace)
        if odd:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(odd[0].partition("=")[0], flags, n=1)
            self.error(f"unknown argument {odd[0]}"
                       + (f"; did you mean {near[0]}?" if near else ""))
        try:
            check_run_flags(parsed)
        except UserError as error:
            self.error(error)
        return parsed, odd

    def spelled(self, word):
        if not word.startswith("--"):
            return word
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        flag = self.aliases.get(flag, flag)
        if flag in self.refused:
            self.error(f"{flag} is not a flag here: {self.refused[flag]}")
        return flag + equals + value

    def stored(self, path):
        """The flags in a config.json that this parser has, as words of a command line, less those
        about one run."""
        try:
            values = json.loads(expanded(path).read_text("utf-8"))
            flags = {action.dest: action for action in self._actions if action.dest not in (
                "help", "config", "resume", "overwrite", "debug")}
            words = []
            for key in flags.keys() & values.keys():
                action, value = flags[key], values[key]
                flag = action.option_strings[0] if action.option_strings else ""
                if value is None or not flag:
                    continue
                if isinstance(value, bool):
                    no = [word for word in action.option_strings if word.startswith("--no-")]
                    words += [flag] if value else no[:1]
                elif isinstance(value, list):
                    words += [flag, *map(str, value)]
                else:
                    words.append(f"{flag}={value}")
            return words
        except (OSError, ValueError, AttributeError, UserError) as error:
            self.error(f"--config {path} is not a run's config.json: {one_line(error)}")


def add_run_flags(parser, seed=1, log_every=20, several_seeds=False, **defaults):
    """The flags that all scripts share; `defaults` changes some of their defaults."""
    group = parser.add_argument_group("the run")
    add = group.add_argument
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


def check_run_flags(args):
    """Refuse what can be refused before any work. Raises UserError."""
    resume = getattr(args, "resume", "auto")
    if resume not in ("auto", "none") and not expanded(resume).is_file():
        raise UserError(f"--resume {resume}: expected auto, none, or the path of a checkpoint")
    if getattr(args, "output_dir", "") and not getattr(args, "eval_only", False):
        refuse_unusable(expanded(args.output_dir))


ABOUT_THE_PROCESS = ("device", "workers", "output_dir", "resume", "overwrite", "eval_only",
                     "dry_run", "export", "log_every", "save_every", "debug", "config", "data_dir",
                     "no_download", "download", "deterministic", "micro_batch")


def run_identity(args, but=(), **facts):
    """What must be equal for a run to be continued: every flag but those that change no result
    (and those in `but`), and `facts`, which win: method, data (fingerprint), model (name),
    weights (sha256), micro_batch where it matters."""
    flags = {key: value for key, value in vars(args).items()
             if key not in ABOUT_THE_PROCESS and key not in but
             and not key.startswith(("cache", "_"))}
    return {**flags, **facts}


def run_folder(args, method, name):
    """--output-dir, or runs/METHOD/name; a dry run has its own beside it."""
    name = re.sub(r"[/\\:]+", "-", name)
    folder = expanded(args.output_dir or f"runs/{method}/{name}")
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
            args = get_args(argv)
            debug = debug or getattr(args, "debug", False)
            main(args)
            print(end="", flush=True)
    except KeyboardInterrupt as error:
        number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
        code = report(f"interrupted by {number.name}; --resume auto goes on from the last "
                      "checkpoint, if there is one", 128 + number, None)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and stdout_is_closed():
            leave_stdout()
            code = 128 + 13  # as if SIGPIPE had ended it, which is how `| head` ends programs
        elif hasattr(error, "exit_code"):
            code = report(one_line(error), error.exit_code, error, debug)
        elif is_oom(error):
            code = report(f"out of memory ({one_line(error)[:150]}): a smaller --micro-batch "
                          "gives the same result in less, --precision bf16 halves most of it; "
                          "the last checkpoint is intact", 3, error, debug)
        elif is_lost(error):
            code = report(f"a process that this one works with has ended ({one_line(error)[:150]}"
                          "): what it said itself tells why; the last checkpoint is intact", 3,
                          error, debug)
        else:
            code = report("", 1, error, True)
    if dist.is_available() and dist.is_initialized():
        if code or argv is None:
            # After a failure the others may be waiting for this process: do not wait for them in
            # turn. After success all is written, and taking the group down races with their
            # leaving: gloo's threads ended this process by SIGABRT a few times in a day of tests.
            leave(code)
        dist.destroy_process_group()
    return code


def leave(code):
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def is_oom(error):
    """Whether an exception says that memory ran out: each device has its own type or words."""
    text = str(error).lower()
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or isinstance(error, OSError) and error.errno == errno.ENOMEM
            or isinstance(error, RuntimeError) and (
                "out of memory" in text or "can't allocate memory" in text))


def is_lost(error):
    """Whether another process went away: of the group, or one that reads images."""
    if isinstance(error, (BrokenPipeError, ConnectionResetError)):
        return True
    grouped = dist.is_available() and dist.is_initialized() and isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or re.search("closed by peer|reset by peer|Broken pipe",
                                                       str(error)))
    return bool(grouped) or isinstance(error, RuntimeError) and str(error).startswith(
        "DataLoader worker")


@contextlib.contextmanager
def sigterm_as_ctrl_c():
    """Where no handler waits for SIGTERM (while loading and testing, that is), it ends the run as
    Ctrl-C does: loader workers are stopped, one line is said. A second one ends it at once. Not
    under torchrun: Python could not answer while it waits for another process."""
    owner, main_thread = os.getpid(), threading.current_thread() is threading.main_thread()
    alone = os.environ.get("WORLD_SIZE", "") in ("", "0", "1")
    if not (main_thread and alone and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL):
        yield
        return

    def handle(number, frame):
        if os.getpid() != owner:  # a loader's worker
            os._exit(128 + number)
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt(number)  # which no `except Exception` on the way swallows
    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def report(line, code, error, debug=False):
    """Say what ended the run on stderr; an error that all processes share is said once."""
    joined = dist.is_available() and dist.is_initialized()
    try:
        rank = dist.get_rank() if joined else torchrun_environment()[0]
    except UserError:
        rank = 0
    if rank and (not joined or getattr(error, "shared", False)):
        return code
    with contextlib.suppress(BrokenPipeError):
        if debug and error is not None:
            traceback.print_exception(error)
        if line:
            print(f"process {rank}: " * bool(rank) + f"error: {line}", file=sys.stderr, flush=True)
    return code


def tolerate_any_locale():
    """A terminal that knows ASCII only shows \\u4e2d instead of ending the run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def show(text, end="\n"):
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:  # `| head` has seen enough; the run and its log go on
        leave_stdout()
    except (ValueError, AttributeError):  # closed, or a program without a console
        pass


def stdout_is_closed():
    """Whether nobody reads stdout any more: what could not be written is still to be written."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        return True
    return False


def leave_stdout():
    """Send the rest of stdout to nowhere, the interpreter's last flush too."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
