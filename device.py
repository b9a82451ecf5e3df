"""Where the code runs, and which process may write.

`start` picks a device, a precision and the process group and says what it chose; the `Run` it
returns is all a training loop needs to stay free of device, precision and process tests: its
methods are called by every process, and only the first one prints or touches a file.

    run = start(device="auto", precision="auto", seed=1, out="runs/demo")
    run.claim(config=vars(args), resume=True)
    images = run.move(images)
    with run.autocast():
        ...
    run.log(step, steps, loss=loss)
    run.save("checkpoint_last.pt", state)

`python device.py` lists the devices and measures whether each computes a CLIP step right.

Four promises: the device asked for is the device used; every number comes out the same for any
number of processes; a checkpoint on disk is whole or absent, whenever the machine stops; no file
that is read can run code.
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
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import zipfile
from collections.abc import Callable

# An operation Apple's GPUs lack would stop the run; with this it falls back to the CPU instead.
# torch reads it once, when it is imported: import this file before anything that imports torch.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
# Likewise read once. Idle CPU threads spin by default, and steal the cores from loader workers and
# from whatever else runs: beside one busy program the demo took 46 s instead of 14 on two cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _keep_freed_memory():
    """Let glibc keep large blocks that were freed. By default every activation over 32 MB is given
    back to the system and faulted in again at its next use: SqueezeNet on 64 images took 62 ms an
    image instead of 35 on one core (EPYC); a ViT-B/16 step in small pieces is the same."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(-3, 1 << 30)       # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2 ** 31 - 1)   # M_TRIM_THRESHOLD


_keep_freed_memory()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# How long a process waits for the others: the first one may be downloading or evaluating.
PATIENCE = datetime.timedelta(minutes=30)
BAD_STEPS = 3  # in a row: one is a bad batch, so many are a run that has come apart


class UserError(Exception):
    """The user can fix it. One line: what is wrong, what was expected, what to do."""
    exit_code = 2


class SafeStop(Exception):
    """Training stopped itself before it could do harm; the last good checkpoint is intact."""
    exit_code = 3


class Interrupted(Exception):
    """A signal stopped the run after it saved; `exit_code` is 128 + the signal's number."""
    def __init__(self, message, exit_code=130):
        super().__init__(message, exit_code)
        self.exit_code = exit_code

    def __str__(self):
        return self.args[0]


# -----------------------------------------------------------------------------
# The kinds of device. Written out in full, because the torch modules only look alike: torch.mps
# has no peak memory and no set_device, torch.cpu no RNG state, torch.npu may not exist at all.

@dataclasses.dataclass(frozen=True)
class Kind:
    absent: Callable  # () -> why it cannot be used, "" when it can
    count: Callable  # () -> how many there are
    select: Callable  # (index) -> None
    precisions: Callable  # (torch.device) -> the names autocast computes in
    synchronize: Callable  # () -> None
    memory: Callable  # () -> bytes in use; the peak where the device keeps one
    reset_memory: Callable  # () -> None
    get_rng: Callable  # () -> ByteTensor, or None where torch's own state is all there is
    set_rng: Callable
    backend: str  # of the process group; "" where there can be one process only
    pinned: bool  # pinned memory and non_blocking copies; on mps the copy could lose data
    workers: int  # most loader processes by default
    context: str | None  # how they start; None: as Python does on this system


def _cuda_absent():
    if torch.cuda.is_available():
        return ""
    built = torch.version.cuda or torch.version.hip
    return "no usable NVIDIA or AMD GPU" if built else "this torch is built without it"


def _npu_absent():
    if not hasattr(torch, "npu"):  # torch_npu may have loaded itself when torch was imported
        install = "install the torch_npu release made for this torch: pip install torch_npu"
        if importlib.util.find_spec("torch_npu") is None:
            return f"torch_npu is not installed ({install})"
        try:
            import torch_npu  # noqa: F401
        except Exception as error:  # a missing CANN library shows up as almost any type
            return f"torch_npu does not import: {_one_line(error)} ({install}, and source CANN)"
    return "" if torch.npu.is_available() else "no usable Ascend NPU"


def _mps_absent():
    if torch.backends.mps.is_available():
        return ""
    return ("macOS is too old or there is no Apple GPU" if torch.backends.mps.is_built()
            else "this torch is built without it")


def _cuda_precisions(device):
    names = ["fp32", "fp16"]
    if torch.cuda.is_bf16_supported(including_emulation=False):
        names.append("bf16")  # emulated bf16 exists on older GPUs and is slower than fp32
    return names


def _npu_precisions(device):
    return ["fp32", "fp16"] + ["bf16"] * torch.npu.is_bf16_supported()


def _mps_precisions(device):
    try:  # old systems and Intel Macs have no bf16 and no call that says so
        torch.ones(1, device=device, dtype=torch.bfloat16).add(1)
        return ["fp32", "fp16", "bf16"]
    except (TypeError, RuntimeError):
        return ["fp32", "fp16"]


def _cpu_memory():
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _nothing(*args):
    return None


KINDS = {  # in the order "auto" tries them
    "cuda": Kind(
        absent=_cuda_absent, precisions=_cuda_precisions,
        count=lambda: torch.cuda.device_count(), select=lambda i: torch.cuda.set_device(i),
        synchronize=lambda: torch.cuda.synchronize(),
        memory=lambda: torch.cuda.max_memory_allocated(),
        reset_memory=lambda: torch.cuda.reset_peak_memory_stats(),
        get_rng=lambda: torch.cuda.get_rng_state(), set_rng=lambda x: torch.cuda.set_rng_state(x),
        backend="nccl", pinned=True, workers=4, context=None),
    "npu": Kind(
        absent=_npu_absent, precisions=_npu_precisions,
        count=lambda: torch.npu.device_count(), select=lambda i: torch.npu.set_device(i),
        synchronize=lambda: torch.npu.synchronize(),
        memory=lambda: torch.npu.max_memory_allocated(),
        reset_memory=lambda: torch.npu.reset_peak_memory_stats(),
        get_rng=lambda: torch.npu.get_rng_state(), set_rng=lambda x: torch.npu.set_rng_state(x),
        backend="hccl", pinned=True, workers=4, context=None),
    "mps": Kind(
        absent=_mps_absent, precisions=_mps_precisions,
        count=lambda: 1, select=_nothing, synchronize=lambda: torch.mps.synchronize(),
        memory=lambda: torch.mps.driver_allocated_memory(), reset_memory=_nothing,
        get_rng=lambda: torch.mps.get_rng_state(), set_rng=lambda x: torch.mps.set_rng_state(x),
        backend="", pinned=False, workers=0, context="spawn"),
    "cpu": Kind(
        absent=lambda: "", precisions=lambda device: ["fp32", "bf16", "fp16"],
        count=lambda: 1, select=_nothing, synchronize=_nothing,
        memory=_cpu_memory, reset_memory=_nothing, get_rng=_nothing, set_rng=_nothing,
        backend="gloo", pinned=False, workers=4, context=None)}


# -----------------------------------------------------------------------------
# Choosing

def start(device="auto", precision="auto", seed=0, out="", deterministic=False):
    """Choose where and how to run, join the other processes, seed, and say so in one line.

    device: auto, cuda, cuda:N, npu, npu:N, mps or cpu; one that is not there raises UserError.
    precision: auto, fp32, bf16 or fp16. seed: 0 <= seed < 2**32, the same in every process.
    out: the run's folder; nothing is written to it before `Run.claim`. May be called again.
    """
    _tolerate_any_locale()
    rank, local_rank, world_size = _processes()
    device, why = _pick_device(str(device), local_rank, world_size)
    kind = KINDS[device.type]
    _select(device)
    precision, why_precision = _pick_precision(device, precision)
    if world_size > 1 and not dist.is_initialized():
        _meet(kind.backend, device, world_size)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
    run = Run(device, precision, rank, world_size, seed, out)
    run.say(f"device {device}{why} | precision {precision}{why_precision} | "
            f"processes {world_size} | threads {torch.get_num_threads()} | "
            f"torch {torch.__version__}")
    return run


def _processes():
    """(rank, local rank, number of processes) as torchrun put them into the environment."""
    world_size = os.environ.get("WORLD_SIZE", "")
    if world_size in ("", "0", "1"):
        return 0, 0, 1
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    numbers = [os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    if missing or not all(number.isdigit() for number in numbers):
        raise UserError(
            f"WORLD_SIZE={world_size} is set in the environment, but "
            f"{', '.join(missing) or 'RANK or LOCAL_RANK'} is not as torchrun sets it: for one "
            "process `unset WORLD_SIZE RANK LOCAL_RANK`, for several start with "
            "`torchrun --nproc-per-node 2 SCRIPT.py ...`")
    if not os.environ["MASTER_PORT"].strip("0"):  # each process would take a port of its own
        raise UserError(f"MASTER_PORT={os.environ['MASTER_PORT']}: expected the number of a free "
                        "port, the same for all processes; `torchrun --standalone` finds one")
    rank, local_rank, world_size = map(int, numbers)
    return rank, local_rank, world_size


def _meet(backend, device, world_size):
    """Join the process group. Raises UserError if the port is taken or the others do not come."""
    # Naming the device spares nccl a guess, which it warns about.
    bound = {"device_id": device} if backend == "nccl" else {}
    try:
        dist.init_process_group(backend, timeout=PATIENCE, **bound)
    except (RuntimeError, ValueError, OverflowError) as error:  # the last: a port above 65535
        raise UserError(
            f"the {world_size} processes cannot meet at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} ({_one_line(error)[:150]}): expected a free port, and "
            f"all {world_size} of them; `torchrun --standalone --nproc-per-node {world_size} "
            "SCRIPT.py ...` takes care of both") from error


def _pick_device(asked, local_rank, world_size):
    match = re.fullmatch(r"(auto|cuda|npu|mps|cpu)(?::(\d+))?", asked)
    if not match or asked.startswith("auto:"):
        raise UserError(f"unknown device {asked!r}: expected auto, cuda, cuda:N, npu, npu:N, "
                        "mps or cpu")
    name, index, why = match[1], match[2], ""
    if name == "auto":
        reasons = []
        for name, kind in KINDS.items():
            reason = kind.absent()
            if not reason and world_size > 1 and not kind.backend:
                reason = "one process only"
            if not reason:
                break
            reasons.append(f"{name}: {reason.split(' (')[0]}")
        why = f" (auto; {'; '.join(reasons)})" if reasons else " (auto)"
    kind = KINDS[name]
    reason = kind.absent()
    if reason:
        raise UserError(f"device {name} is not usable: {reason}. {_what_exists()}")
    if world_size > 1:
        if not kind.backend:
            raise UserError(f"{name} has one GPU for one process, but torchrun started "
                            f"{world_size}: run the script without torchrun")
        if index is not None and name != "cpu":
            raise UserError(f"device {asked}: with {world_size} processes each takes its own; "
                            f"ask for {name} without a number")
        index = local_rank if name != "cpu" else 0
    index = int(index or 0)
    if index >= kind.count():
        raise UserError(f"device {name}:{index} does not exist. {_what_exists()}")
    return (torch.device(name, index) if kind.pinned else torch.device(name)), why


def _what_exists():
    here = []
    for name, kind in KINDS.items():
        if not kind.absent():
            last = kind.count() - 1
            here.append(f"{name}:0 to {name}:{last}" if last > 0 else name)
    return f"Here there is: {', '.join(here)}. Ask for one of these, or --device auto"


def _select(device):
    """Make `device` this process's own, and try it."""
    try:
        KINDS[device.type].select(device.index or 0)
        torch.ones(1, device=device).add(1).cpu()
    except RuntimeError as error:  # busy, or too old for this torch
        raise UserError(f"{device} is listed but does not work: {_one_line(error)}") from error


def _pick_precision(device, asked):
    names = KINDS[device.type].precisions(device)
    if asked == "auto":
        if device.type != "cuda":
            return "fp32", " (auto; always exact enough, bf16 is there to try)"
        if "bf16" in names:
            return "bf16", " (auto; this GPU computes bf16 natively, and it needs no loss scaling)"
        # Before tensor cores (Volta, 7.0) half precision is no faster than single.
        fast = torch.cuda.get_device_capability(device) >= (7, 0)
        return ("fp16", " (auto; no native bf16)") if fast else ("fp32", " (auto; an older GPU)")
    if asked not in PRECISIONS:
        raise UserError(f"unknown precision {asked!r}: expected auto, {', '.join(PRECISIONS)}")
    if asked not in names:
        raise UserError(f"{device} cannot compute in {asked}: it can do {', '.join(names)}")
    slow = asked == "fp16" and device.type == "cpu"
    return asked, " (slow on a cpu: fp32 or bf16 is faster)" if slow else ""


def _numpy():
    try:
        import numpy
        return numpy
    except ImportError:
        return None


# -----------------------------------------------------------------------------
# Gathering features

class _Gather(torch.autograd.Function):
    """Rows of all processes; backward, the sum over processes of the gradients of my rows.

    The usual gather without gradient gives the towers 1/W of it or, with local rows only, one
    that points elsewhere. torch.distributed.nn has such a function, but in a private place now.
    """
    @staticmethod
    def forward(ctx, x, counts):
        ctx.counts = counts
        longest = max(counts)
        mine = x.new_zeros(longest, *x.shape[1:])  # uneven shares travel padded
        mine[:len(x)] = x
        parts = [torch.empty_like(mine) for _ in counts]
        dist.all_gather(parts, mine)
        return torch.cat([part[:n] for part, n in zip(parts, counts)])

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)  # others may hold the original
        dist.all_reduce(grad)
        return grad.split(ctx.counts)[dist.get_rank()], None


# -----------------------------------------------------------------------------

class Run:
    """One run on one device. Public: device, precision, dtype, rank, world_size, seed, out.

    dtype is what autocast computes in; weights stay fp32. out is a pathlib.Path or None. Unless
    it says otherwise, a method is called by every process at the same point.
    """
    def __init__(self, device, precision, rank, world_size, seed, out):
        self.device, self.precision, self.dtype = device, precision, PRECISIONS[precision]
        self.rank, self.world_size, self.kind = rank, world_size, KINDS[device.type]
        self._signals = {"number": 0, "since": 0.0, "old": {}}  # shared by the runs of a process
        self._begin(out, seed)

    def enter(self, out, seed=None):
        """A Run on the same device and processes for another folder; seeds again."""
        other = copy.copy(self)
        other._begin(out, self.seed if seed is None else seed)
        other._unwritten = list(self._unwritten)  # its log too begins with the device
        return other

    def _begin(self, out, seed):
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2 ** 32:
            raise UserError(f"seed {seed} is not a whole number from 0 to 4294967295")
        random.seed(seed)
        if _numpy():
            _numpy().random.seed(seed)
        torch.manual_seed(seed)  # every accelerator's generator too
        self.seed, self.out = seed, expanded(out) if out else None
        self._bad = 0  # steps skipped in a row
        if self.out and not self.rank:  # before models are loaded and images fetched
            _refuse_unusable(self.out)
        self._open, self._unwritten, self._progress = False, [], 0
        self._began = self._clock = time.monotonic()
        self._last_step, self._timed = 0, [0, 0.0]  # steps, seconds: what the ETA rests on
        self._peak = 0.0
        self.kind.reset_memory()

    # -------------------------------------------------------------------------
    # Placement

    def move(self, *things):
        """Tensors or modules to the device. One thing comes back as itself, several as a tuple."""
        moved = []
        for thing in things:
            pinned = self.kind.pinned and torch.is_tensor(thing) and (
                thing.device.type == "cpu" and thing.is_pinned())
            moved.append(thing.to(self.device, non_blocking=True) if pinned
                         else thing.to(self.device))
        return moved[0] if len(moved) == 1 else tuple(moved)

    def autocast(self):
        """Context in which matrix products run in `dtype`; does nothing in fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @property
    def fused_attention(self):
        """Whether torch's fused attention is the faster one: all but on a CPU in bf16, where the
        plain products gave a ViT-B/16 step 1.4 times its speed (two Xeon cores with AMX)."""
        return not (self.device.type == "cpu" and self.precision == "bf16")

    @property
    def fused_optimizer(self):
        """Whether torch.optim's `fused=True` is there and equal: on a CPU and on cuda. Elsewhere
        the plain one, which is None to torch."""
        return True if self.device.type in ("cpu", "cuda") else None

    def scaler(self, enabled=True):
        """A GradScaler that scales in fp16 (if `enabled`) and lets everything pass otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=enabled and self.precision == "fp16")

    def wrap(self, model):
        """DistributedDataParallel, or `model` itself when alone. Call after freezing: a parameter
        freed later would keep its own process's gradient, and the copies would drift apart."""
        if self.world_size == 1 or not any(p.requires_grad for p in model.parameters()):
            return model
        ids = None if self.device.type == "cpu" else [self.device.index]
        return torch.nn.parallel.DistributedDataParallel(
            model, device_ids=ids, gradient_as_bucket_view=True)

    def loader_options(self, workers=-1):
        """dict(workers, pin_memory, multiprocessing_context) for a DataLoader; -1 chooses."""
        if workers < -1:
            raise UserError(f"workers {workers}: expected 0 or more, or -1 to choose")
        if workers == -1:
            cpus = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                    else os.cpu_count() or 1)
            # Where workers start as fresh interpreters they cost more than they bring by default.
            slow_start = sys.platform in ("win32", "darwin")
            workers = 0 if slow_start else min(self.kind.workers, cpus)
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
        return _Gather.apply(x, list(counts or [len(x)] * self.world_size))

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
        Divide the loss so that a sum is right; unscale (fp16) and clip afterwards. Costs one flat
        copy of the gradients.
        """
        if self.world_size == 1:
            return
        moving = [p for p in parameters if p.requires_grad]
        for dtype in sorted({p.dtype for p in moving}, key=str):
            group = [p for p in moving if p.dtype == dtype]
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

    def barrier(self):
        """Wait for all processes."""
        self.gather_objects(None)

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
                error = caught if travels else RuntimeError(_one_line(caught))
        result, error = self.gather_objects((result, error))[0]
        if error is not None:
            error = caught or error
            error.shared = True  # guard prints it once
            raise error
        return result

    def drop_bad_gradients(self, parameters, scaler=None):
        """Zero all .grad if any is inf or nan -> bool tensor (): whether they were fine.

        So a bad batch moves nothing but momentum and weight decay, which go on as they would. Call
        it after `sum_gradients`: every process then decides the same. Never waits for the device.
        An enabled GradScaler looks for itself and skips the step, so nothing is done beside one.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients or scaler is not None and scaler.is_enabled():
            return torch.ones((), dtype=torch.bool, device=self.device)
        largest = torch.nn.utils.get_total_norm(gradients, math.inf)  # nan if any element is
        fine = torch.isfinite(largest).to(self.device)
        if self.device.type != "cpu" or not fine:  # only on a CPU is asking free
            for gradient in gradients:
                gradient.masked_fill_(~fine, 0)
        return fine

    def check_finite(self, losses, describe=str):
        """Say which steps had a loss that is inf or nan; SafeStop in all processes at the third in
        a row, counted over calls.

        losses: 0-dim tensors or floats, one a step, as many in every process. describe(i) -> str
        says what loss i is. Waits for the device once, however many there are.
        """
        if not losses:
            return
        finite = [torch.isfinite(torch.as_tensor(x)).to(self.device).view(()) for x in losses]
        for i, bad in enumerate(self.sum((~torch.stack(finite)).int()).tolist()):
            self._bad = self._bad + 1 if bad else 0
            if not bad:
                continue
            here = None if finite[i] else f"the loss or its gradient is not finite at {describe(i)}"
            what = "; ".join(filter(None, self.gather_objects(here)))
            if self._bad < BAD_STEPS:
                self.say(f"step skipped: {what}")
                continue
            error = SafeStop(f"{self._bad} steps in a row were skipped, {what}; training stopped "
                             "and the last checkpoint is intact. Try a smaller --lr, --grad-clip, "
                             "or --precision fp32")
            error.shared = True
            raise error

    # -------------------------------------------------------------------------
    # Speaking

    def say(self, text):
        """Print a line, and append it to log.txt."""
        if self.rank:
            return
        if self._progress:
            _print("\r" + " " * self._progress + "\r", end="")
            self._progress = 0
        _print(text)
        if self._open:
            self._append("log.txt", text)
        else:
            self._unwritten.append(text)  # a folder that may be refused is not written to

    def progress(self, done, total, what=""):
        """A line that overwrites itself on a terminal; nothing at all elsewhere."""
        if self.rank or not (sys.stdout and sys.stdout.isatty()):
            return
        text = f"{what} {done}/{total}"
        _print("\r" + text.ljust(self._progress), end="")
        self._progress = len(text)

    def log(self, step, steps=None, epoch=None, split="train", samples=0, waited=0.0, **scalars):
        """One line for people, one JSON object in metrics.jsonl for programs.

        scalars: already global; floats or 0-dim tensors. samples: passed by all processes since
        the last call; waited: seconds of these spent waiting for data. Every call restarts the
        clock, so log training before evaluating, and both before saving (see `rewind`).
        """
        now = time.monotonic()
        seconds, self._clock = max(now - self._clock, 1e-9), now
        if self.rank:
            return
        scalars = {name: _plain(value) for name, value in scalars.items()}
        rate, wait, memory = samples / seconds, waited / seconds, self.memory_mb()
        words = [f"{step:>{len(str(steps or ''))}}/{steps}" if split == "train" and steps
                 else f"{split} at step {step}" if step else split]
        words += [f"{name} {_short(value):<8}" for name, value in scalars.items()]
        if samples:
            words.append(f"{rate:.3g} samples/s  wait {wait:.0%}  {memory:.0f} MB")
        if split == "train":
            self._timed[0] += step - self._last_step
            self._timed[1] += seconds
            self._last_step = step
            if steps and self._timed[0] > 0:
                left = (steps - step) * self._timed[1] / self._timed[0]
                words.append(f"eta {datetime.timedelta(seconds=round(left))}")
        self.say("  ".join(words).rstrip())
        record = {"step": step, "epoch": epoch, "split": split, **scalars,
                  "samples_per_second": round(rate, 3), "data_wait": round(wait, 4),
                  "memory_mb": memory, "time": round(time.time(), 3)}
        if self.out:
            self._append("metrics.jsonl", json.dumps(record, ensure_ascii=False))

    # -------------------------------------------------------------------------
    # The run's folder

    def claim(self, config=None, identity=None, resume=False, overwrite=False):
        """Take the folder for this run. True when there is a run in it to continue.

        config: dict of what re-runs it. identity: dict of what must not change when it is
        continued; both go into config.json. Raises UserError if `out` is a file, cannot be
        written, holds another run without `resume` or `overwrite` (which deletes it and wins over
        `resume`), or holds one of another identity.
        """
        if self.out is None:
            return False
        identity = json.loads(json.dumps(_plain(identity or {}), default=str))
        return self.on_first(lambda: self._claim(config or {}, identity, resume, overwrite))

    def _claim(self, config, identity, resume, overwrite):
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            probe = self.out / "config.json.tmp"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"the output folder {self.out} cannot be used: "
                            f"{error.strerror or error}; choose another --output-dir") from error
        names = ["config.json", "env.json", "command.txt", "log.txt", "metrics.jsonl",
                 "results.json", "*_last.pt", "*_prev.pt", "*_best.pt"]
        held = [path for name in names for path in sorted(self.out.glob(name))]
        if held and not (resume or overwrite):
            raise UserError(f"{self.out} already holds a run ({held[0].name}): --resume auto "
                            "continues it, --overwrite starts again, or choose another "
                            "--output-dir")
        if held:
            self._same_run(identity, overwrite)
        for path in held if overwrite else []:
            path.unlink()
        for name in names:  # left by a write that was killed
            for path in self.out.glob(name + ".tmp"):
                path.unlink()
        command = " ".join(map(shlex.quote, [sys.executable, *sys.argv])) + "\n"
        before = self.out / "command.txt"
        if before.exists():
            command = before.read_text("utf-8", "replace") + command
        self._open_folder()
        self._write("config.json", {**config, "identity": identity})
        self._write("command.txt", command)
        self._write("env.json", self._environment())
        return bool(held) and not overwrite

    def _same_run(self, identity, overwrite):
        path = self.out / "config.json"
        if not path.exists():
            return
        try:
            stored = json.loads(path.read_text("utf-8"))["identity"]
            changed = [f"{key} was {stored.get(key)!r}, now {identity.get(key)!r}"
                       for key in sorted({*stored, *identity})
                       if stored.get(key) != identity.get(key)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            # Somebody else's folder perhaps: a downloaded model has a config.json too.
            raise UserError(f"{path} is not of a run of this program, or damaged: choose another "
                            "--output-dir, or move the file away") from error
        if changed and not overwrite:
            raise UserError(f"{self.out} holds a run of another kind ({'; '.join(changed)}): use "
                            "the old values to continue it, --overwrite, or another --output-dir")

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

    def rewind(self, step):
        """On resume from `step`: forget what was logged after it, so that metrics.jsonl equals an
        uninterrupted run's but for the times."""
        self._last_step, self._clock = max(step, 0), time.monotonic()

        def cut():
            path = self.out / "metrics.jsonl"
            lines = path.read_bytes().splitlines() if path.exists() else []
            kept = [line for line in lines if _step_of(line) <= step]
            _write_atomic(path, b"".join(line + b"\n" for line in kept))
            where = f"continuing after step {step}" if step > 0 else "starting over"
            self.say(f"{where}; {len(lines) - len(kept)} later log entries are dropped")
        if self.out:
            self.on_first(cut)

    def write(self, name, content):
        """Write bytes, a text, or an object as JSON to a file in `out`, whole or not at all."""
        if self.out:
            self.on_first(lambda: (self._open_folder(), self._write(name, content))[1])

    def finish(self, results):
        """`results` with what every script adds, written to results.json. Returns the dict."""
        self.synchronize()
        memory = max(self.gather_objects(self.memory_mb()))
        results = {**_plain(results), "seconds": round(time.monotonic() - self._began, 3),
                   "peak_memory_mb": memory, "device": str(self.device),
                   "precision": self.precision, "processes": self.world_size,
                   "git": git_commit(), "torch": str(torch.__version__)}
        self.write("results.json", results)
        return results

    def _open_folder(self):
        if not self._open:
            self.out.mkdir(parents=True, exist_ok=True)
            self._open = True
            for text in self._unwritten:
                self._append("log.txt", text)

    def _append(self, name, line):
        self._open_folder()
        try:
            with open(self.out / name, "ab") as file:  # one write: a kill cannot mix two lines
                file.write((line + "\n").encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise SafeStop(f"cannot write {self.out / name}: {error.strerror}; the last "
                           "checkpoint is intact") from error

    def _write(self, name, content):
        if not isinstance(content, (bytes, str)):
            content = json.dumps(_plain(content), indent=1, ensure_ascii=False, default=str) + "\n"
        if isinstance(content, str):
            content = content.encode("utf-8", "backslashreplace")
        _write_atomic(self.out / name, content)

    # -------------------------------------------------------------------------
    # Checkpoints and random state

    def save(self, path, state):
        """Write `state` (tensors, numbers, text, containers of them) so that a kill at any moment
        leaves a file that loads. `x_last.pt` keeps its predecessor as `x_prev.pt`. A bare name
        lies in `out`; without `out` nothing is written.

        Raises TypeError for what a safe load would refuse, SafeStop for nan or inf in a tensor or
        a disk that does not take it; the old file is intact then.
        """
        path = self._inside(path)
        if path:
            self.on_first(lambda: _write_checkpoint(path, state))

    def load(self, path, fallback=True):
        """The checkpoint at `path`, or its predecessor when that is damaged or gone and `fallback`
        allows; None when neither is there. Raises UserError when none can be read."""
        path = self._inside(path)
        previous = path and _previous(path)
        fallback = path and fallback and previous != path and previous.exists()
        if not path or not (path.exists() or fallback):
            return None
        try:
            return load_checkpoint(path)
        except UserError as error:
            if not fallback:
                raise
            state = load_checkpoint(previous)
            self.say(f"{error} | continuing from {previous.name} instead")
            return state

    def _inside(self, path):
        path = expanded(path)
        if path.parent != pathlib.Path():
            return path
        return self.out / path if self.out else None

    def rng_state(self):
        """This process's random state, cheap enough for every chunk of a batch; no other process
        takes part. A checkpoint holds `run.gather_objects(run.rng_state())`."""
        numpy = None
        if _numpy():
            name, keys, position, has_gauss, gauss = _numpy().random.get_state()
            numpy = (str(name), keys.tolist(), int(position), int(has_gauss), float(gauss))
        return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state(),
                "device_type": self.device.type, "device": self.kind.get_rng()}

    def set_rng_state(self, state):
        """Restore what `rng_state` gave, or this process's entry of a list of them."""
        if isinstance(state, (list, tuple)):
            if len(state) != self.world_size:
                self.say(f"note: the checkpoint is of {len(state)} processes, not "
                         f"{self.world_size}: dropout will differ, the order of samples will not")
            state = state[min(self.rank, len(state) - 1)]
        random.setstate(state["python"])
        if _numpy() and state["numpy"] is not None:
            _numpy().random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"].cpu())
        if state["device_type"] != self.device.type:
            self.say(f"note: the random state of {state['device_type']} is of no use on "
                     f"{self.device.type}: dropout will differ, the order of samples will not")
        elif state["device"] is not None:
            self.kind.set_rng(state["device"].cpu())

    # -------------------------------------------------------------------------
    # Signals

    def watch_signals(self):
        """Training starts: from now on Ctrl-C and SIGTERM ask to stop, and a second one exits at
        once, saving nothing (only in the main thread, Python allows no other). Starts the clock
        of `log` too."""
        self._clock = time.monotonic()
        if self._signals["old"] or threading.current_thread() is not threading.main_thread():
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
        seen["number"] = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            seen["old"][number] = signal.signal(number, handle)

    def unwatch_signals(self):
        """Give the signals back to whoever had them."""
        while self._signals["old"]:
            signal.signal(*self._signals["old"].popitem())

    def stop_requested(self):
        """The signal that asked any process to stop, or 0; the same in all processes.
        Waits for the device when there are several."""
        if self.world_size > 1:
            number = torch.tensor(self._signals["number"], device=self.device, dtype=torch.int32)
            dist.all_reduce(number, op=dist.ReduceOp.MAX)
            self._signals["number"] = int(number)
        return self._signals["number"]

    def interrupted(self):
        """The exception to raise once everything is saved."""
        number = self._signals["number"] or signal.SIGINT
        error = Interrupted(f"stopped by {signal.Signals(number).name} after saving; "
                            "--resume auto continues", 128 + number)
        error.shared = True
        return error


# -----------------------------------------------------------------------------
# Files

def expanded(path):
    """A path as a user may write it -> pathlib.Path, with `~` and $VARIABLES replaced."""
    path = pathlib.Path(os.path.expanduser(os.path.expandvars(path)))
    if path.parts[:1] == ("~",):
        raise UserError(f"{path} has no meaning: HOME is not set, and the system does not know "
                        "this user; set HOME, or write the whole path")
    return path


def _refuse_unusable(folder):
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
    start_of_text = head.lstrip().lower()
    again = "copy or download it again"
    if not head:
        problem = f"is empty (0 bytes): {again}"
    elif head.startswith(b"version https://git-lfs"):
        problem = "is a Git LFS pointer, not the file itself: run `git lfs pull`"
    elif start_of_text.startswith((b"<!doctype", b"<html", b"<?xml")):
        problem = f"is a web page, not a checkpoint: a download went wrong, {again}"
    elif head.startswith(b"\x1f\x8b"):
        problem = "is compressed with gzip: unpack it first"
    elif not head.startswith(b"PK\x03\x04"):
        problem = f"is not a checkpoint (it does not start like one): {again}"
    else:
        problem = _damage(path)
    if problem:
        raise UserError(f"{path} {problem}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch has five types for this
        raise UserError(f"{path} holds something other than tensors and plain values; refused, "
                        f"nothing in it was run ({_one_line(error)[:120]})") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint of this program")
    return state


def _damage(path):
    """What is wrong with a zip file, or "". Reads it whole: 0.3 s for 340 MB."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return "is a TorchScript archive, not a checkpoint: pass it as --weights"
            broken = archive.testzip()
    except Exception as error:  # zipfile, zlib, struct and others, each for its own kind of damage
        return (f"is cut short or damaged ({path.stat().st_size} bytes; {_one_line(error)}): "
                "use an older copy")
    return f"is damaged: the checksum of {broken} is wrong; use an older copy" if broken else ""


def _previous(path):
    return path.with_name(re.sub("_last$", "_prev", path.stem) + path.suffix)


def _write_checkpoint(path, state):
    tensors = []
    state = _portable(state, "state", tensors)
    for where, x in tensors:
        if x.is_floating_point() and x.numel() and not all(map(math.isfinite, x.aminmax())):
            raise SafeStop(f"{where} holds nan or inf, so {path.name} was not written and the "
                           "last good checkpoint stays. Try a smaller --lr or --precision fp32")
    temp = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temp, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        problem = _damage(temp)
        if problem:
            raise OSError(errno.EIO, f"what was written {problem}")
        # Between the two renames only the previous one is there; `load` knows.
        if _previous(path) != path and path.exists():
            os.replace(path, _previous(path))
        os.replace(temp, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer hides a full disk in a RuntimeError
        if _is_lost(error):  # a loader's worker, whose death interrupts whatever goes on
            raise
        needed = sum(x.numel() * x.element_size() for _, x in tensors)
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        raise SafeStop(f"{path} could not be written ({_one_line(error)[:200]}): it needs about "
                       f"{needed} bytes, {free} are free; the last good checkpoint is intact. Free "
                       "space and continue with --resume auto") from error
    finally:
        with contextlib.suppress(OSError):
            temp.unlink()


def _portable(x, where, tensors):
    """A copy of `x` with its tensors on the CPU, noted in `tensors` as (where, tensor)."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu()
        if x.untyped_storage().nbytes() > x.numel() * x.element_size():
            x = x.clone()  # a view would bring the whole of what it is a view of
        tensors.append((where, x))
        return x
    if type(x) in (dict, collections.OrderedDict):
        return {_portable(key, f"a key of {where}", tensors):
                _portable(value, f"{where}[{key!r}]", tensors) for key, value in x.items()}
    if type(x) in (list, tuple, set):
        return type(x)(_portable(v, f"{where}[{i}]", tensors) for i, v in enumerate(x))
    # Exact types: numpy.float64 is a float, but a file with one in it would not load again.
    if x is None or type(x) in (bool, int, float, str, torch.dtype, torch.device,
                                torch.Size):
        return x
    raise TypeError(f"{where} is a {type(x).__module__}.{type(x).__name__}, which a checkpoint "
                    "cannot hold: convert it with float(), str(), vars() or torch.as_tensor()")


def _write_atomic(path, data):
    temp = path.with_name(path.name + ".tmp")
    try:
        with open(temp, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temp.unlink()
        raise SafeStop(f"cannot write {path}: {error.strerror}") from error


def _sync_folder(folder):
    """A rename survives a power cut once its folder is on the disk too."""
    with contextlib.suppress(OSError):  # Windows and some network file systems cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _step_of(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a line that a kill cut off
        return math.inf


def _plain(x):
    """`x` as JSON can hold it: scalars as Python numbers, nan and inf as "nan", "inf", "-inf"."""
    if isinstance(x, dict):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    if hasattr(x, "item"):
        x = x.item()
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    return x


def _short(x):
    return f"{x:.4g}" if isinstance(x, float) else str(x)


def _one_line(error):
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
# The way in and the way out

class _Store(argparse.Action):
    """A flag with a list, given twice, has the words of both; any other must not change its mind.
    argparse alone keeps the last and forgets the rest in silence."""
    def __call__(self, parser, namespace, values, option_string=None):
        if self.dest in parser.given:
            before = getattr(namespace, self.dest)
            if isinstance(values, list):
                values = before + values
            elif values != before:
                parser.error(f"{option_string} is given twice, as {before} and as {values}; "
                             "give it once")
        parser.given.add(self.dest)
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser with what every script promises of its command line.

    --flag_name and the spellings in `aliases` ({"--their-name": "--our-name"}) are understood;
    `--config FILE` takes its flags as defaults, which the command line overrides; no flag may be
    abbreviated; a list may come in several pieces (`--seed 1 --seed 2`), any other flag only once.
    A wrong line exits with code 2 and one line, which names the nearest known flag.
    """
    def __init__(self, *args, aliases=None, **options):
        super().__init__(*args, allow_abbrev=False, **options)
        for name in (None, "store"):
            self.register("action", name, _Store)
        self.given = set()  # flags met on the line that is being parsed
        self.aliases = aliases or {}
        self.add_argument("--config", metavar="FILE", help="take the flags of a run's config.json")

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the flags)\n")

    def parse_known_args(self, args=None, namespace=None):
        words = [self.spelled(word) for word in (sys.argv[1:] if args is None else args)]
        self.given = set()
        config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        config.add_argument("--config", nargs="?")
        path = config.parse_known_args(words)[0].config
        if path:
            self.set_defaults(**self.stored(path))
        parsed, odd = super().parse_known_args(words, namespace)
        if odd:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(odd[0].partition("=")[0], flags, n=1)
            self.error(f"unknown argument {odd[0]}"
                       + (f"; did you mean {near[0]}?" if near else ""))
        return parsed, odd

    def spelled(self, word):
        if not word.startswith("--"):
            return word
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        return self.aliases.get(flag, flag) + equals + value

    def stored(self, path):
        """The flags in a config.json that this parser has, less those about one run."""
        try:
            values = json.loads(expanded(path).read_text("utf-8"))
            flags = {action.dest: action for action in self._actions if action.dest not in (
                "help", "config", "resume", "overwrite", "debug")}
            return {key: _typed(flags[key], value) for key, value in values.items()
                    if key in flags}
        except (OSError, ValueError, AttributeError) as error:
            self.error(f"--config {path} is not a run's config.json: {_one_line(error)}")


def _typed(action, value):
    """A flag's value out of a file, as the command line would give it; ValueError if it would not.
    argparse takes defaults that are no text as they are."""
    several, words = action.nargs in ("+", "*"), value if isinstance(value, list) else [value]
    problem = ValueError(f"{action.dest} is {value!r} there")
    if value is None or action.nargs == 0 and isinstance(value, bool):
        return value
    if action.nargs == 0 or several != isinstance(value, list):
        raise problem
    try:
        words = [(action.type or str)(str(word)) for word in words]
    except (TypeError, ValueError):
        raise problem from None
    if action.choices and not set(words) <= set(action.choices):
        raise problem
    return words if several else words[0]


# -----------------------------------------------------------------------------
# Settings: a table of keys that files, lines of k=v and flags are all read by

def a_text(x):
    if not isinstance(x, str) or not x.strip():
        raise ValueError("a text")
    return x.strip()


def a_list(x):
    """["a", "b"], or "a+b" on a command line."""
    x = x.split("+") if isinstance(x, str) else x
    if not isinstance(x, list) or not all(isinstance(word, str) and word for word in x):
        raise ValueError("a list of texts")
    return x


def a_switch(x):
    if x not in (True, False, "true", "false"):
        raise ValueError("true or false")
    return x in (True, "true")


def an_expression(x):
    try:
        return re.compile(a_text(x)) and x
    except re.error as error:
        raise ValueError(f"a regular expression ({error})") from None


def one_of(*known, also=None):
    """One of `known` words; `also` has other spellings of them."""
    def read(x):
        x = (also or {}).get(x, x) if isinstance(x, str) else x
        if x not in known:
            raise ValueError(f"one of {', '.join(known)}")
        return x
    return read


def a_count(low):
    """A whole number from `low` on, as a number or its spelling."""
    def read(x):
        try:
            if not isinstance(x, bool) and float(x) == int(float(x)) >= low:
                return int(float(x))
        except (TypeError, ValueError, OverflowError):
            pass
        raise ValueError(f"a whole number from {low} on")
    return read


def a_number(low, high=math.inf, above=False):
    """A finite number from `low` (or `above` it) to `high`."""
    def read(x):
        try:
            value = math.nan if isinstance(x, bool) else float(x)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if (low < value if above else low <= value) and value <= high and math.isfinite(value):
            return value
        raise ValueError(f"a number {'above' if above else 'from'} {low:g}"
                         + (f" to {high:g}" if high < math.inf else " on"))
    return read


def read_settings(path):
    """A JSON file, or TOML where Python has a reader -> dict. UserError with the line of a mistake,
    and for a key that stands twice in one object."""
    path = expanded(path)

    def once(pairs):
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise UserError(f"{path}: the key {twice!r} stands twice in one object; keep one")
        return dict(pairs)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        if path.suffix == ".toml":
            import tomllib  # of Python 3.11 and later
            return tomllib.loads(text)
        content = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}:{error.colno}: {error.msg}: not JSON there") from None
    except (OSError, ValueError, ImportError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {_one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; expected an object of keys")
    return content


def settings_of(line):
    """"name=own,lr=1e-6" -> {"name": "own", "lr": "1e-6"}. Raises UserError."""
    found = {}
    for part in line.split(","):
        key, equals, value = part.partition("=")
        if not equals or key.strip() in found:
            raise UserError(f"{line!r}: {part!r} is not KEY=VALUE, or stands twice; expected such "
                            f"as name=own,lr=1e-6, and lists as a+b")
        found[key.strip()] = value.strip()
    return found


def check_settings(entries, table, also, where):
    """{key: value} -> the same as `table` {key: (default, how it is read, meaning)} reads it, under
    its keys; `also` has other spellings of them. None stands where it is the default. UserError
    says `where`, which key (and the nearest, if unknown), and what it takes."""
    if not isinstance(entries, dict):
        raise UserError(f"{where}: expected an object of keys, found {entries!r}")
    found = {}
    for given, value in entries.items():
        key = str(given).replace("-", "_")
        key = also.get(key, key)
        if key not in table:
            near = difflib.get_close_matches(key, [*table, *also], n=1)
            raise UserError(f"{where}: unknown key {given!r}" + (
                f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(table)}"))
        if key in found:
            raise UserError(f"{where}: {given!r} says {key!r} a second time")
        default, read, _ = table[key]
        try:
            found[key] = None if value is None and default is None else read(value)
        except ValueError as error:
            raise UserError(f"{where}: {key} is {value!r}; expected {error}") from None
    return found


def guard(main, get_args, argv=None):
    """`sys.exit(guard(main, get_args))`: run a script, turn what it raises into an exit code.

    0 done, 2 the user can fix it, 3 stopped safely (out of memory too), 128 + n by a signal,
    1 a bug: the only one that shows a traceback, unless --debug asks for it.
    """
    _tolerate_any_locale()
    debug, code = "--debug" in (sys.argv[1:] if argv is None else argv), 0
    try:
        with _sigterm_as_ctrl_c():
            args = get_args(argv)
            debug = debug or getattr(args, "debug", False)
            main(args)
            print(end="", flush=True)
    except BrokenPipeError:
        _leave_stdout()
        code = 128 + 13  # as if SIGPIPE had ended it, which is how `| head` ends other programs
    except KeyboardInterrupt as error:
        number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
        code = _report(f"interrupted by {number.name}; --resume auto goes on from the last "
                       "checkpoint, if there is one", 128 + number, None)
    except Exception as error:
        if hasattr(error, "exit_code"):
            code = _report(_one_line(error), error.exit_code, error, debug)
        elif is_oom(error):
            code = _report(f"out of memory ({_one_line(error)[:150]}): a smaller --micro-batch "
                           "gives the same result in less, --precision bf16 halves most of it; "
                           "the last checkpoint is intact", 3, error, debug)
        elif _is_lost(error):
            code = _report(f"a process that this one works with has ended ({_one_line(error)[:150]}"
                           "): what it said itself tells why; the last checkpoint is intact", 3,
                           error, debug)
        else:
            code = _report("", 1, error, True)
    if dist.is_available() and dist.is_initialized():
        if code:  # the others may be waiting for this process: do not wait for them in turn
            sys.stderr.flush()
            os._exit(code)
        if argv is None:
            # Everything is written. Taking the group down raced with the other processes' leaving:
            # gloo's threads then ended this one by SIGABRT, a few times in a day of tests.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        dist.destroy_process_group()
    return code


def is_oom(error):
    """Whether an exception says that memory ran out: each device has its own type or words."""
    text = str(error).lower()
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or isinstance(error, OSError) and error.errno == errno.ENOMEM
            or isinstance(error, RuntimeError) and (
                "out of memory" in text or "can't allocate memory" in text))


def _is_lost(error):
    """Whether another process went away: of the group, or one that reads images."""
    if not isinstance(error, RuntimeError):
        return False
    grouped = dist.is_available() and dist.is_initialized() and (
        isinstance(error, dist.DistError) or re.search("closed by peer|reset by peer|Broken pipe",
                                                       str(error)))
    return bool(grouped) or str(error).startswith("DataLoader worker")


@contextlib.contextmanager
def _sigterm_as_ctrl_c():
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


def _report(line, code, error, debug=False):
    """Say what ended the run on stderr; an error that all processes share is said once."""
    joined = dist.is_available() and dist.is_initialized()
    rank = dist.get_rank() if joined else _rank_in_environment()
    if rank and (not joined or getattr(error, "shared", False)):
        return code
    with contextlib.suppress(BrokenPipeError):
        if debug and error is not None:
            traceback.print_exception(error)
        if line:
            print(f"process {rank}: " * bool(rank) + f"error: {line}", file=sys.stderr, flush=True)
    return code


def _rank_in_environment():
    try:
        return _processes()[0]
    except UserError:
        return 0


def _tolerate_any_locale():
    """A terminal that knows ASCII only shows \\u4e2d instead of ending the run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _print(text, end="\n"):
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:  # `| head` has seen enough; the run and its log go on
        _leave_stdout()
    except (ValueError, AttributeError):  # closed, or a program without a console
        pass


def _leave_stdout():
    """Nobody reads stdout any more: send the rest to nowhere, the interpreter's last flush too."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


# -----------------------------------------------------------------------------
# python device.py: does this machine compute a CLIP step right, and how fast?

# The largest relative error that rounding explains, with room for TF32 (newer NVIDIA GPUs round the
# inputs of fp32 convolutions to 10 bits). A wrong kernel is off by much more.
LIMITS = {"fp32": 5e-3, "fp16": 5e-2, "bf16": 2e-1}


class _SmallCLIP(nn.Module):
    """A transformer block per tower, with every kind of operation of a ViT CLIP."""
    def __init__(self, width=128, heads=2):
        super().__init__()
        self.heads = heads
        self.patchify, self.embed = nn.Conv2d(3, width, 8, 8), nn.Embedding(500, width)
        nn.init.normal_(self.embed.weight, std=0.02)  # as in a CLIP
        self.places = nn.ParameterList(0.02 * torch.randn(length, width) for length in (64, 16))
        self.towers = nn.ModuleList(nn.ModuleDict({
            "norm1": nn.LayerNorm(width), "qkv": nn.Linear(width, 3 * width),
            "out": nn.Linear(width, width), "norm2": nn.LayerNorm(width),
            "up": nn.Linear(width, 4 * width), "down": nn.Linear(4 * width, width),
            "norm3": nn.LayerNorm(width), "head": nn.Linear(width, width)}) for _ in range(2))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10)))

    def forward(self, images, tokens, fused):
        """images (B, 3, 64, 64) and tokens (B, 16) -> logits (B, B)."""
        rows, features = torch.arange(len(tokens), device=tokens.device), []
        x = self.patchify(images).flatten(2).transpose(1, 2), self.embed(tokens)
        ends = 0 * rows, tokens.argmax(dim=-1)
        for causal, tower in enumerate(self.towers):
            h = x[causal] + self.places[causal]                            # (B, L, W)
            h = h + tower["out"](self.attend(tower["qkv"](tower["norm1"](h)), causal == 1, fused))
            up = tower["up"](tower["norm2"](h))
            h = h + tower["down"](up * torch.sigmoid(1.702 * up))          # QuickGELU
            h = tower["head"](tower["norm3"](h[rows, ends[causal]]))       # (B, W)
            features.append(F.normalize(h.to(self.log_scale.dtype), dim=-1))
        return self.log_scale.exp() * features[0] @ features[1].T

    def attend(self, qkv, causal, fused):
        """(B, L, 3 W) -> (B, L, W)"""
        B, L, W = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        q, k, v = qkv.view(B, L, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)
        if fused:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        else:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)       # (B, H, L, L)
            if causal:
                ahead = torch.ones(L, L, dtype=torch.bool, device=q.device).triu(1)
                scores = scores.masked_fill(ahead, float("-inf"))
            out = scores.softmax(dim=-1) @ v
        return out.transpose(1, 2).reshape(B, L, W)


def _outcome(run, model, images, tokens, fused=False, seconds=0.0):
    """What one step gives, in float64 on the CPU: {"loss", "gradients", "weights": {name: tensor}},
    "weights" being how far they moved; and "speed", steps/s over `seconds` and at least one step.
    """
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1.0), run.scaler()
    labels = torch.arange(len(images), device=images.device)

    def host(tensors):
        return {name: x.detach().cpu().double().clone() for name, x in tensors}

    def step():
        optimizer.zero_grad(set_to_none=True)
        with run.autocast():
            logits = model(images, tokens, fused)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return host([("loss", loss)])  # waits for the device
    before = host(model.named_parameters())
    for _ in range(16):  # the first scales of fp16 may overflow; then it halves and moves nothing
        loss = step()
        gradients = host((name, p.grad) for name, p in model.named_parameters())
        if all(x.isfinite().all() for x in gradients.values()):
            break
    after = host(model.named_parameters())
    count, since = 0, time.perf_counter()
    while count == 0 or time.perf_counter() - since < seconds:
        step()
        count += 1
    return {"loss": loss, "gradients": gradients,
            "weights": {name: after[name] - before[name] for name in after},
            "speed": count / (time.perf_counter() - since)}


def _compare(ours, truth):
    """Relative errors, each of the worst tensor, whose name stands in "worst"; nan is worst."""
    row, worst = {"speed": ours["speed"]}, []
    for what in ("loss", "gradients", "weights"):
        # A tensor whose gradient nearly vanishes holds nothing but rounding.
        floor = 1e-2 * max(x.norm() for x in truth[what].values())
        errors = [(float((ours[what][name] - x).norm() / max(x.norm(), floor)), name)
                  for name, x in truth[what].items()]
        worst.append(max(errors, key=lambda error: (math.isnan(error[0]), error)))
        row[what] = worst[-1][0]
    row["error"], row["worst"] = max(worst, key=lambda error: (math.isnan(error[0]), error))
    return row


def examine(device, seconds=0.3):
    """Compare a small CLIP step on `device` with float64 on the CPU, in every precision it has.

    -> {"device", "transfer": GB/s to it and back, "rows", "verdict"}. A row: relative errors,
    steps/s, and under "wrong" what no rounding explains, or "".
    """
    device = _pick_device(device, 0, 1)[0]
    _select(device)
    run, rows = Run(torch.device("cpu"), "fp32", 0, 1, 0, ""), []  # seeds
    patient, images = _SmallCLIP(), torch.randn(32, 3, 64, 64)
    tokens = torch.randint(499, (32, 16))
    tokens[range(32), torch.randint(16, (32,))] = 499  # one end each: a tie may go either way
    truth = _outcome(run, copy.deepcopy(patient).double(), images.double(), tokens)
    for precision, fused in [(name, fused) for name in KINDS[device.type].precisions(device)
                             for fused in (True, False)]:
        run = Run(device, precision, 0, 1, 0, "")
        row = {"precision": precision, "attention": "fused" if fused else "plain", "wrong": ""}
        what = f"{device} {precision} with {row['attention']} attention"
        try:
            row |= _compare(_outcome(run, run.move(copy.deepcopy(patient)),
                                     *run.move(images, tokens), fused, seconds), truth)
            if not row["error"] <= LIMITS[precision]:  # nan too
                row["wrong"] = f"{what} computes wrong: {row['worst']} is off by {row['error']:.1g}"
        except Exception as error:  # an operation or a dtype it has not
            row["wrong"] = f"{what} does not run: {_one_line(error)}"
        rows.append(row)
    return {"device": str(device), "transfer": _transfer(run), "rows": rows,
            "verdict": _verdict(device, rows)}


def _transfer(run, size=2 ** 26):
    """GB/s of `size` bytes to the device and back; None on the CPU, where nothing travels."""
    here, rates = torch.ones(size // 4), []
    for way in (run.move, torch.Tensor.cpu) if run.device.type != "cpu" else ():
        way(here)  # the first time costs more
        run.synchronize()
        since = time.perf_counter()
        here = way(here)
        run.synchronize()
        rates.append(round(size / 1e9 / (time.perf_counter() - since), 2))
    return rates or None


def _verdict(device, rows):
    """One line: what each precision is good for here, and the flags to use."""
    words, speeds = [], {}  # speeds of the precisions that are right
    for name in dict.fromkeys(row["precision"] for row in rows):
        some = [row for row in rows if row["precision"] == name]
        wrong = [row["attention"] for row in some if row["wrong"]]
        if wrong:
            words.append(f"{name} WRONG with {' and '.join(wrong)} attention")
            continue
        error, speeds[name] = (max(row[key] for row in some) for key in ("gradients", "speed"))
        word = "exact" if error < 1e-4 else f"usable (gradient error {error:.0e})"
        faster = speeds[name] / speeds.get("fp32", math.inf)
        words.append(f"{name} {word}" + f" at {faster:.1f}x fp32's speed" * (0 < faster != 1))
    auto = _pick_precision(device, "auto")[0]
    best = auto if auto in speeds else next(iter(speeds), "")
    flags = f"use --device {str(device).removesuffix(':0')} --precision {best}"
    return f"{device}: {', '.join(words)}; {flags if best else 'do not train on it'}"


def doctor_args(argv=None):
    parser = Parser(description="Which devices are here, and do they compute a CLIP step right?",
                    epilog="example: python device.py --device mps")
    parser.add_argument("--device", default="all", help="examine one only (default: all)")
    parser.add_argument("--seconds", type=float, default=0.3,
                        help="to measure each speed over (default: 0.3)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(argv)


def doctor(args):
    """Print the devices, why the others are absent, and what `examine` finds."""
    absent, found = {name: kind.absent() for name, kind in KINDS.items() if kind.absent()}, []
    here = [name for name in KINDS if name not in absent]
    for name in here if args.device == "all" else [args.device]:
        try:
            found.append(examine(name, args.seconds))
        except UserError as error:  # listed, but busy or too old for this torch
            if args.device != "all":
                raise
            absent[name] = str(error)
    if args.json:
        _print(json.dumps(_plain({"torch": str(torch.__version__), "absent": absent,
                                  "devices": found}), indent=1))
    else:
        _print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads; a large model "
               "gains more speed from bf16 and fp16 than the small step measured here")
        for name, why in absent.items():
            _print(f"{name:<4} absent: {why}")
        for report in found:
            _print(f"\n{report['device']:<7}  attention  loss error  gradients  weights  steps/s")
            for row in report["rows"]:
                _print(f"  {row['precision']:<5}  {row['attention']:<9}  " + (
                    f"{row['loss']:<10.0e}  {row['gradients']:<9.0e}  {row['weights']:<7.0e}  "
                    f"{row['speed']:.1f}" if "error" in row else "does not run"))
            if report["transfer"]:
                _print("  {} GB/s to the device, {} back".format(*report["transfer"]))
            _print(report["verdict"])
    wrong = [row["wrong"] for report in found for row in report["rows"] if row["wrong"]]
    if wrong:
        raise SafeStop("; ".join(wrong))


if __name__ == "__main__":
    sys.exit(guard(doctor, doctor_args))
