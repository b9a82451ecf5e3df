"""Where the code runs, which process may write, and what a run keeps.

`start` picks device, precision and processes; the `Run` it returns keeps a training loop free of
device, precision and process tests. Every process calls its methods at the same point, and only
the first one prints or touches a file. Import this file before torch: it sets what torch reads.

Four promises: the device asked for is the device used; every number comes out the same for any
number of processes, up to rounding and dropout; a checkpoint on disk is whole or absent, whenever
the machine stops; no file that is read can run code.
"""
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import errno
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import signal
import sys
import threading
import time

os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what Apple's GPUs lack runs on the CPU
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads leave the cores to the workers
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # a broken torch_npu would end torch

import numpy as np
import torch
import torch.distributed as dist

from command import (add_device_flags, add_run_flags, guard, number, on_signals,  # noqa: F401
                     Parser, run_folder, run_identity, show, STOPS, tolerate_any_locale, whole)
from files import (append, as_json, cut_lines, expanded, git_commit, load_checkpoint, one_line,
                   plain, previous, refuse_unusable, SafeStop, UserError, write_atomic,
                   write_checkpoint)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PATIENCE = datetime.timedelta(minutes=30)  # for other processes: the first may be downloading
LAST, BEST = "checkpoint_last.pt", "checkpoint_best.pt"
WRITTEN = ["env.json", "command.txt", "log.txt", "metrics.jsonl", "results.json", "*_last.pt",
           "*_prev.pt", "*_best.pt", "tensorboard/events.*", "confusion_*.json", "per_class_*.csv",
           "predictions_*.csv", "table.csv", "shots.json", "matrix.md"]  # --overwrite clears it
STOPPING = b"stopping after this step, to save; a second signal ends it at once, unsaved\n"


# -----------------------------------------------------------------------------
# Devices

@dataclasses.dataclass(frozen=True)
class Kind:
    """What differs between devices: torch.cuda, .npu, .mps and .cpu only look alike."""
    name: str
    backend: str          # of the process group; "" where there can be one process only
    pinned: bool = False  # has numbers, and pinned memory; on mps such a copy can lose data

    @property
    def module(self):
        return getattr(torch, self.name)

    def absent(self):
        """Why there is no such device, or ""."""
        if self.name == "npu" and not hasattr(torch, "npu"):
            try:
                import torch_npu  # noqa: F401
            except Exception as error:  # a missing CANN library shows up as almost any type
                return f"{one_line(error)} (install the torch_npu made for this torch, and CANN)"
        home = torch.backends.mps if self.name == "mps" else self.module
        return "" if home.is_available() else f"torch {torch.__version__} finds none it can use"

    def precisions(self, device):
        """Names of what autocast can compute in, and computes right."""
        bf16, fp16 = True, True
        if self.name == "cuda":  # emulated bf16 exists on older GPUs and is slower than fp32
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        elif self.name == "npu":  # older ones saturate where others give inf: overflow goes unseen
            bf16 = torch.npu.is_bf16_supported()
            fp16 = getattr(torch.npu.utils, "is_support_inf_nan", lambda: False)()
        elif self.name == "mps":
            fp16 = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) >= (2, 8)
            try:
                torch.ones(1, device=device, dtype=torch.bfloat16).add(1)
            except (TypeError, RuntimeError):  # an old system
                bf16 = False
        return ["fp32"] + ["bf16"] * bf16 + ["fp16"] * fp16

    def select(self, index):
        if self.pinned:
            self.module.set_device(index)
            self.module.reset_peak_memory_stats()
        elif self.name == "cpu" and sys.platform == "linux":
            # By default glibc gives every activation over 32 MB back to the system and faults it
            # in again at its next use: SqueezeNet took 62 ms an image instead of 35 on one core.
            with contextlib.suppress(OSError, AttributeError):  # another C library
                for option, value in ((-3, 1 << 30), (-1, 2 ** 31 - 1)):  # mmap and trim threshold
                    ctypes.CDLL(None).mallopt(option, value)

    def memory(self):
        """Bytes in use; the peak where the device keeps one."""
        if self.name != "cpu":
            return (self.module.max_memory_allocated() if self.pinned
                    else self.module.driver_allocated_memory())
        if sys.platform == "win32":
            return 0
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


KINDS = {"cuda": Kind("cuda", "nccl", pinned=True), "npu": Kind("npu", "hccl", pinned=True),
         "mps": Kind("mps", ""), "cpu": Kind("cpu", "gloo")}  # the order in which "auto" tries them


def start(device="auto", precision="auto", seed=0, deterministic=False):
    """Choose where and how to run, join the other processes, seed, and say so in one line -> Run.

    device: auto, cuda, cuda:N, npu, npu:N, mps or cpu; precision: auto, fp32, bf16 or fp16.
    UserError where the device is not there or cannot compute so.
    """
    tolerate_any_locale()
    rank, local_rank, world_size = processes()
    auto = [" (auto)" if asked == "auto" else "" for asked in (device, precision)]
    device = pick_device(str(device), local_rank, world_size)
    precision = pick_precision(device, precision)
    if world_size > 1 and not dist.is_initialized():  # after the device was made this process's
        join_group(device, world_size)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.use_deterministic_algorithms(True)
    run = Run(device, precision, rank, world_size, seed)
    run.say(f"device {device}{auto[0]} | precision {precision}{auto[1]} | processes {world_size} | "
            f"threads {torch.get_num_threads()} | torch {torch.__version__}")
    return run


def processes():
    """(rank, local rank, number of processes) as torchrun put them into the environment."""
    if os.environ.get("WORLD_SIZE", "") in ("", "0", "1"):
        return 0, 0, 1
    try:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
        *found, port = (int(os.environ[name]) for name in names)
        if not port or not os.environ["MASTER_ADDR"]:  # port 0: each would take one of its own
            raise ValueError("MASTER_PORT or MASTER_ADDR")
    except (KeyError, ValueError) as error:
        raise UserError(f"WORLD_SIZE is set, but {one_line(error)} is not as torchrun sets it: "
                        "unset WORLD_SIZE, or `torchrun --standalone --nproc-per-node 2 ...`"
                        ) from error
    return found


def join_group(device, world_size):
    backend = KINDS[device.type].backend
    bound = {"device_id": device} if backend == "nccl" else {}  # spares nccl a guess
    try:
        dist.init_process_group(backend, timeout=PATIENCE, **bound)
    except (RuntimeError, ValueError, OverflowError) as error:  # the last: a port above 65535
        raise UserError(f"the {world_size} processes cannot meet at MASTER_PORT "
                        f"{os.environ['MASTER_PORT']}: expected a free port and, on GPUs, one for "
                        f"each process ({one_line(error)[:200]})") from error


def pick_device(asked, local_rank=0, world_size=1):
    """-> torch.device, from now on this process's own. UserError if it cannot be."""
    match = re.fullmatch(r"auto|(cuda|npu|mps|cpu)(?::(\d+))?", asked)
    here, absent = {}, {}  # name: how many there are; name: why there is none
    for name, kind in KINDS.items():
        why = kind.absent()
        if why or world_size > 1 and not kind.backend:
            absent[name] = why or "one process only"
        else:
            here[name] = kind.module.device_count() if kind.pinned else 1
    if not match or match[1] in absent:
        raise UserError(f"--device {asked}: expected auto, {', '.join(here)}; " + "; ".join(
            f"no {name}: {why}" for name, why in absent.items()))
    name = match[1] or next(iter(here))
    if world_size > 1 and match[2]:
        raise UserError(f"--device {asked}: {world_size} processes take one each; expected {name}")
    # Where the scheduler shows each process its own GPU alone, that is number 0.
    index = int(match[2] or (local_rank if here[name] > 1 else 0))
    if index >= here[name]:
        raise UserError(f"--device {name}:{index}: there are {name}:0 to {name}:{here[name] - 1}")
    device = torch.device(name, index) if KINDS[name].pinned else torch.device(name)
    try:
        KINDS[name].select(index)
        torch.ones(1, device=device).add(1).cpu()
    except RuntimeError as error:  # busy, or too old for this torch
        raise UserError(f"--device {device} does not work: {one_line(error)}") from error
    return device


def pick_precision(device, asked):
    """-> the name of a precision that the device has."""
    names = KINDS[device.type].precisions(device)
    if asked not in ("auto", *names):
        raise UserError(f"--precision {asked}: expected auto, {', '.join(names)} on {device} with "
                        f"torch {torch.__version__}")
    if asked != "auto":
        return asked
    if device.type != "cuda":  # never one that is slower there than fp32
        return "fp32"
    # Before tensor cores (Volta, 7.0) half precision is no faster than single.
    fast = torch.cuda.get_device_capability(device) >= (7, 0)
    return "bf16" if "bf16" in names else "fp16" if fast else "fp32"


@dataclasses.dataclass
class Place:
    """Where training stands: what comes next (epoch, batch of it, step) and how far it goes."""
    epoch: int = 0
    batch: int = 0
    step: int = 0
    steps: int = 0    # of the whole run; set by the script
    batches: int = 0  # of an epoch; set by `Run.batches`


class Gather(torch.autograd.Function):
    """Rows of all processes; backward, the sum over processes of the gradients of my rows. (A
    gather without gradient gives the towers 1/W of it, or one that points elsewhere.)"""

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

    dtype is what autocast computes in; weights stay fp32. out: the run's folder or None.
    """
    def __init__(self, device, precision="fp32", rank=0, world_size=1, seed=0):
        self.device, self.precision, self.dtype = device, precision, PRECISIONS[precision]
        self.rank, self.world_size, self.kind = rank, world_size, KINDS[device.type]
        torch.manual_seed(seed)  # every accelerator's generator too
        self.seed, self.out, self._identity, self._board = seed, None, {}, None
        self._early = []  # lines said before there was a folder, which may be refused
        self._log_every, self._save_every, self._logged = 20, 0, 0  # the last: lines of metrics
        self._began = self._asked = time.monotonic()  # the run, and asking for the last batch
        # Of training: samples, seconds, those waited for data, steps; as they were when last told.
        self._spent, self._told = collections.Counter(), collections.Counter()
        self._steps, self._bad, self._fine = [], 0, None  # steps not looked at; skipped in a row
        self._signal, self._stopping = 0, 0  # seen by this process; agreed on by all
        self._loss_scale, self._buffers, self._peak = None, [], 0.0
        self._replaced, self._lost = [], set()  # images not read: since the last look, and ever
        self._refusal, self._lock = "", None    # what came of that look; of the folder

    def enter(self, seed):
        """A Run on the same device and processes with another seed and clock, without a folder."""
        other = Run(self.device, self.precision, self.rank, self.world_size, seed)
        other._early = self._early[:1]  # its log too begins with the device
        return other

    # -------------------------------------------------------------------------
    # Placement

    def move(self, *things):
        """Tensors or modules to the device. One thing comes back as itself, several as a tuple."""
        def to_device(x):  # only from pinned memory is a copy that nobody waits for safe
            pinned = self.kind.pinned and torch.is_tensor(x) and x.is_pinned()
            return x.to(self.device, non_blocking=pinned)
        return to_device(things[0]) if len(things) == 1 else tuple(map(to_device, things))

    def autocast(self):
        """Context in which matrix products run in `dtype`; does nothing in fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    @property
    def fused_attention(self):
        """Whether torch's fused attention is right and the faster one. On mps its kernel for short
        queries is wrong up to torch 2.12; on a CPU in bf16 plain products are 1.4 times as fast."""
        return self.device.type != "mps" and (self.device.type, self.precision) != ("cpu", "bf16")

    @property
    def fused_optimizer(self):
        """What to pass to torch.optim as `fused`: True on a CPU and on cuda, else None."""
        return True if self.device.type in ("cpu", "cuda") else None

    def scaler(self):
        """A loss scaler that scales in fp16 and lets everything pass otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")

    def loader_options(self, workers=-1):
        """dict(workers, pin_memory) for a DataLoader; -1 chooses."""
        if workers == -1:
            workers = 0  # on Windows and macOS they are fresh interpreters and cost too much
            if sys.platform == "linux":
                mine = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
                workers = min(4, max(1, mine))
        return {"workers": workers, "pin_memory": self.kind.pinned}

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
        """(B, D) of each process -> (W * B, D) in rank order, with the exact gradient: that of the
        *sum* of all processes' losses. counts: rows per process where shares differ."""
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
        """Replace each .grad by its sum over processes, whose losses are parts of one sum. A single
        all-reduce of a flat copy, after the backward pass."""
        trainable = [p for p in parameters if p.requires_grad]
        if self.world_size == 1 or not trainable:
            return
        here = [float(p.grad is not None) for p in trainable]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                          for p in trainable] + [trainable[0].new_tensor(here)])
        dist.all_reduce(flat)
        *sums, anywhere = flat.split([p.numel() for p in trainable] + [len(trainable)])
        # Only a missing gradient is worth waiting for the device to learn who has it.
        anywhere = here if all(here) else anywhere.tolist()
        for p, total, someone in zip(trainable, sums, anywhere):
            p.grad = total.view_as(p).clone() if someone else None

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
            except Exception as caught:  # one of an unknown type may not survive the journey
                error = caught if hasattr(caught, "exit_code") else RuntimeError(one_line(caught))
        result, error = self.gather_objects((result, error))[0]
        if error is not None:
            raise shared(error)
        return result

    # -------------------------------------------------------------------------
    # Training

    def batches(self, loader, at):
        """Yield the batches from where `at` stands up to at.steps, over epochs. After a signal the
        checkpoint that `tick` asks for is saved, then KeyboardInterrupt is raised here. loader: has
        a length, and a batch_sampler with set_epoch(epoch, first_batch=)."""
        at.batches = len(loader)
        with self._watching_signals():
            while at.step < at.steps:
                loader.batch_sampler.set_epoch(at.epoch, first_batch=at.batch)
                step, self._asked = at.step, time.monotonic()
                for batch in loader:
                    self._spent["waited"] += time.monotonic() - self._asked
                    yield batch
                    if self._refusal:
                        raise shared(UserError(self._refusal))
                    if at.step >= at.steps:  # a signal may have come since the last `tick`
                        self._stopping = max(self.gather_objects(self._signal))
                    if self._stopping:
                        raise shared(KeyboardInterrupt(self._stopping))
                    if at.step >= at.steps:
                        return
                    self._asked = time.monotonic()
                if at.step == step:
                    raise UserError("the training data gives no batch; expected more images, or a "
                                    "smaller --batch-size")

    def update(self, optimizer, parameters, scaler, clip=0.0, loss=None):
        """After `sum_gradients`: unscale and clip (if clip > 0) the gradients, then step -> bool
        tensor (): whether the weights moved.

        If a gradient or this step's loss is inf or nan in any process, the step changes nothing: no
        weights, moments, decay, nor buffers given to `load_training`; the loss scale only where
        nothing but scaled gradients overflowed. A fused cuda optimizer waits for it in fp16 alone.
        """
        if scaler.is_enabled():
            scaler.unscale_(optimizer)
        parameters = [p for p in parameters if p.grad is not None]
        sound = torch.as_tensor(0.0 if loss is None else loss, device=self.device).isfinite().all()
        # One by one: the largest of several norms hides a nan on mps.
        fine = torch.stack([sound] + [p.grad.isfinite().all() for p in parameters]).all()
        if self.world_size > 1:
            flags = torch.stack([sound, fine]).int()
            dist.all_reduce(flags, op=dist.ReduceOp.MIN)
            sound, fine = flags.bool()
        if clip:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        fused = self.device.type == "cuda" and all(g.get("fused") for g in optimizer.param_groups)
        if fused and optimizer.state:  # fused SGD's first step would keep momentum it never wrote
            optimizer.grad_scale, optimizer.found_inf = None, (~fine).float()
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
        elif fine:
            optimizer.step()
        with torch.no_grad():
            for buffer, kept in self._buffers:
                kept.copy_(torch.where(fine, buffer, kept))
                buffer.copy_(kept)
        self._fine = fine
        if scaler.is_enabled():
            scale = self._loss_scale = scaler.get_scale()
            self._fine = fine | sound & (scale > 1)  # a scale that is still falling is no failure
            scaler.update(None if sound else scale)
        return fine

    def tick(self, at, losses, samples, describe, replaced=(), **scalars):
        """Count a step: move `at`, check the step, log, look for signals -> whether a checkpoint
        is due (end of an epoch, --save-every, the last step, a signal). Once after each `update`.

        losses: {name: this process's part}, logged as sums over processes; scalars: floats or
        0-dim tensors, logged as they are. samples: of the whole batch. describe: () -> str, the
        batch in words; called for a bad step only and perhaps later, so bind its arguments.
        replaced: names of images of this process's share that could not be read: the run ends with
        an epoch that has two, and more than 1 %. SafeStop after three bad steps in a row.
        """
        epoch = at.epoch + 1  # as people count
        at.step, at.batch = at.step + 1, at.batch + 1
        if at.batch == at.batches:
            at.epoch, at.batch = at.epoch + 1, 0
        last = at.step == at.steps
        log = last or at.step % self._log_every == 0
        due = last or at.batch == 0 or bool(self._save_every and at.step % self._save_every == 0)
        self._steps.append((self._fine, describe))
        # On a CPU looking is free; elsewhere it waits for the device and the other processes.
        if log or due or at.step % 20 == 0 or self.device.type == "cpu":
            self._look_at_steps()
        if log:
            losses = {name: float(self.sum(torch.as_tensor(x))) for name, x in losses.items()}
        took = time.monotonic() - self._asked
        self._spent.update(samples=float(samples), seconds=took, steps=1)
        if took > 10 and self._spent["steps"] == 1:
            self.say(f"the first step took {took:.0f} s; there are {at.steps - at.step:,} more")
        self._replaced += replaced
        if last or at.batch == 0:
            self._look_at_images(at.batches * samples)
        if log:
            self._log_training(at, epoch, {**losses, **scalars})
        return due or bool(self._stopping)

    def _look_at_steps(self):
        """Say which steps since the last look were skipped; SafeStop at the third in a row. See
        whether a signal asked any process to stop."""
        flags, describers = zip(*self._steps)
        self._steps = []
        for fine, describe in zip(torch.stack(flags).tolist(), describers):
            self._bad = 0 if fine else self._bad + 1
            if not fine:
                where = "; ".join(dict.fromkeys(self.gather_objects(describe())))
                what = f"step skipped: the loss or its gradient is not finite at {where}"
                if self._bad == 3:  # one is a bad batch, three a run that has come apart
                    raise shared(SafeStop(f"{what}, the third in a row; what was saved before "
                                          "is intact. Try a smaller --lr, or --precision fp32"))
                self.say(what)
        self._stopping = max(self.gather_objects(self._signal))

    def _look_at_images(self, epoch):
        """Say which images could not be read since the last look. If they are too many of an
        epoch, so many samples, `batches` raises UserError, once a checkpoint is saved."""
        names = sum(self.gather_objects(self._replaced), [])
        self._replaced = []
        if self._lost.issuperset(names):
            return
        self._lost.update(names)
        said = (f"images that cannot be read: {len(self._lost)}, e.g. {min(names)}; other pairs "
                f"took their places")
        if len(set(names)) > 1 and len(names) > epoch // 100:
            # As text: an exception would keep the loader, which would be waited for at exit.
            self._refusal = f"{said}. They are more than 1 %: restore them, or list the rest"
        self.say(said)

    @contextlib.contextmanager
    def _watching_signals(self):
        """Inside, Ctrl-C and STOPS ask to stop, and a second one exits at once, saving nothing.
        Only in the main thread: Python allows no other."""
        self._signal, self._stopping, since = 0, 0, 0.0

        def answer(number):
            nonlocal since
            if not self._signal:
                self._signal, since = number, time.monotonic()
                with contextlib.suppress(OSError):  # print could be in the middle of a line
                    os.write(2, b"" if self.rank else STOPPING)
            # Ctrl-C under torchrun comes twice at once: from the terminal and from torchrun.
            elif self.world_size == 1 or time.monotonic() - since > 2:
                os._exit(128 + number)
        before = {}
        if threading.current_thread() is threading.main_thread():
            before = on_signals(answer, signal.SIGINT, *STOPS)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    # -------------------------------------------------------------------------
    # Speaking

    def say(self, *lines):
        """Print lines, and append them to log.txt."""
        if self.rank:
            return
        for line in lines:
            show(line)
        if self.out:
            append(self.out / "log.txt", *lines)
        else:
            self._early += lines

    def progress(self, done, total, what):
        """A line that the next one overwrites on a terminal; nothing at all elsewhere."""
        if not self.rank and sys.stdout and sys.stdout.isatty():
            show(f"{what} {done}/{total}", end="\r")

    def log(self, step, split, epoch=None, rate=0.0, wait=0.0, head="", tail="", **scalars):
        """Scores (floats or 0-dim tensors): a line for people, and one in metrics.jsonl."""
        scalars, words = plain(scalars), []
        for name, x in scalars.items():
            shown = f"{x:.4g}" if isinstance(x, float) else str(x)
            words.append(f"{name} {shown:<8}")
        head = head or (f"{split} at step {step}" if step else split)
        self.say("  ".join([head, *words, tail]).rstrip())
        if self.rank or not self.out:
            return
        record = {"step": step, "epoch": epoch, "split": split, **scalars,
                  "samples_per_second": round(rate, 3), "data_wait": round(wait, 4),
                  "memory_mb": self.memory_mb(), "time": round(time.time(), 3)}
        append(self.out / "metrics.jsonl", as_json(record))
        self._logged += 1
        if self._board:
            for name, x in record.items():
                if isinstance(x, (int, float)) and name not in ("step", "epoch", "time"):
                    self._board.add_scalar(f"{split}/{name}", x, step)
            self._board.flush()  # a kill loses nothing

    def _log_training(self, at, epoch, scalars):
        if self._loss_scale:
            scalars["loss_scale"] = self._loss_scale
        new, self._told = self._spent - self._told, self._spent.copy()
        seconds = max(new["seconds"], 1e-9)
        rate, wait = new["samples"] / seconds, new["waited"] / seconds
        left = datetime.timedelta(seconds=round((at.steps - at.step) * seconds / new["steps"]))
        self.log(at.step, "train", epoch, rate, wait, f"{at.step:>{len(str(at.steps))}}/{at.steps}",
                 f"{rate:.3g} samples/s  wait {wait:.0%}  {self.memory_mb():.0f} MB  eta {left}",
                 **scalars)

    # -------------------------------------------------------------------------
    # The run's folder

    def begin(self, folder, args, identity):
        """Take `folder` for this run -> checkpoint to go on from, results of a finished run; each
        None where there is none. args: the flags of `add_run_flags`; identity: see `run_identity`.

        With args.eval_only nothing is written, and the checkpoint is the one to score. UserError,
        before anything is changed, for a folder that cannot be used and a run of another identity.
        """
        folder = expanded(folder)
        self._identity = json.loads(as_json(identity))
        self._log_every, self._save_every = args.log_every, args.save_every
        fresh = (args.overwrite or args.dry_run) and not args.eval_only
        named = None if args.resume in ("auto", "none") else expanded(args.resume)
        stored = self._find(folder, named, args, fresh)
        own = None if named else stored  # what the folder itself holds
        if args.eval_only:
            if not stored:
                self.say(f"no checkpoint in {folder}: this scores what --weights gives")
            return stored, None
        if named and not stored["optimizer"]:
            raise UserError(f"--resume {named}: it was kept for its scores, without what training "
                            f"needs to go on; give {LAST}, or start from it with --weights")
        best = self.load(named.parent / BEST) if named else None  # before it is cleared away
        self.on_first(lambda: self._claim(folder, args, fresh, bool(own)))
        self.out = folder
        with contextlib.suppress(OSError, ValueError):  # there is none, or a damaged one
            results = dict(json.loads((folder / "results.json").read_text("utf-8")))
            self.say(f"{folder} holds this run, finished: see results.json; --overwrite runs again")
            return stored, results
        if own and own.get("best", -1) != -1 and not (folder / BEST).exists():
            raise shared(UserError(f"{folder / BEST} is gone, the weights that were best so far: "
                                   f"put it back, or --resume {folder / LAST} --output-dir OTHER "
                                   "goes on without it"))
        self._logged = own["logged"] if own else 0
        self.on_first(lambda: cut_lines(folder / "metrics.jsonl", self._logged))
        if named:  # it may have been of this folder, which is cleared
            self.save(LAST, {**stored, "logged": 0})
        if best and best["step"] <= stored["step"]:
            self.save(BEST, best)  # what lies beside a checkpoint of another folder comes along
        if args.tensorboard and not self.rank:
            from torch.utils.tensorboard import SummaryWriter
            first = stored["step"] + 1 if stored else 0  # what was drawn later goes
            self._board = SummaryWriter(folder / "tensorboard", purge_step=first)
        after = f", continuing after step {stored['step']}" if stored else ""
        self.say(f"writing to {folder}{after}")
        return stored, None

    def _find(self, folder, named, args, fresh):
        """The checkpoint to go on from or to score, or None. UserError for one of another run."""
        stored = None
        if named:
            stored = self.load(named)
        elif args.resume == "auto" and not fresh:
            best = args.eval_only and (folder / BEST).exists()
            stored = self.load(folder / (BEST if best else LAST))
        if stored:
            refuse_other(self._identity, stored.get("identity"), named or folder,
                         keys=("method", "model", "weights") if args.eval_only else ())
        seen = self.gather_objects((stored and stored["step"], self._identity))
        if any(other != seen[0] for other in seen):
            raise shared(UserError("the processes do not see the same data, weights, or checkpoint "
                                   f"in {folder}: expected all on disks that they share"))
        return stored

    def _claim(self, folder, args, fresh, goes_on):
        """Check, clear and make the folder. goes_on: it has a checkpoint that is continued."""
        refuse_unusable(folder)
        held = stored_identity(folder) is not None
        if held and not fresh:
            if args.resume != "auto":
                raise UserError(f"{folder} already holds a run: --resume auto continues it, "
                                "--overwrite starts again, or choose another --output-dir")
            self.check(folder, self._identity)
        strange = [name for name in ("results.json", BEST, LAST) if (folder / name).exists()]
        if strange and not held and not goes_on:
            raise UserError(f"{folder} holds {strange[0]} and no config.json: it is not a run of "
                            "this program, or not whole; choose another --output-dir")
        self._lock = None  # one of this process is given up first
        self._lock = lock(folder)
        stale = [f"{name}.tmp" for name in ("config.json", *WRITTEN)]  # of a killed write
        if fresh and held:
            shutil.rmtree(folder / "export", ignore_errors=True)
            stale += WRITTEN
        for name in stale:
            for path in folder.glob(name):
                path.unlink()
        write_atomic(folder / "config.json", {**vars(args), "identity": self._identity})
        write_atomic(folder / "env.json", {
            **self._facts(), "threads": torch.get_num_threads(), "numpy": np.__version__,
            "python": platform.python_version(), "platform": platform.platform(),
            "cuda": torch.version.cuda or torch.version.hip})
        append(folder / "command.txt", shlex.join([sys.executable, *sys.argv]))
        append(folder / "log.txt", *self._early)

    def check(self, folder, identity, advice="", keys=()):
        """UserError where `folder` holds a run of another identity; see `refuse_other`."""
        theirs = stored_identity(folder)
        if theirs is not None:
            refuse_other(json.loads(as_json(identity)), theirs, folder, advice, keys)

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
        samples, seconds = self._spent["samples"], self._spent["seconds"]
        results = {"samples_per_second": round(samples / seconds, 3) if seconds else 0.0,
                   **plain(results), "seconds": round(time.monotonic() - self._began, 3),
                   "peak_memory_mb": max(self.gather_objects(self.memory_mb())), **self._facts()}
        self.write("results.json", results)
        return results

    # -------------------------------------------------------------------------
    # Checkpoints

    def save_training(self, at, trainable, optimizer, scaler, buffers=(), name=LAST, **more):
        """Write all that an exact resume needs: {name: Parameter} trainable, {name: tensor}
        buffers, ..., and `more`, plain values and tensors. optimizer, scaler: may be None."""
        self.save(name, {
            "format": f"{self._identity.get('method', 'run')}/2",
            "weights": dict(trainable), "buffers": dict(buffers),
            "optimizer": optimizer.state_dict() if optimizer else {},
            "scaler": scaler.state_dict() if scaler else {},
            "epoch": at.epoch, "batch": at.batch, "step": at.step,  # what comes next
            "timed": [self._spent["samples"], self._spent["seconds"]], "logged": self._logged,
            "rng": self.gather_objects(self._random_state()), "identity": self._identity, **more})

    def load_training(self, stored, trainable, optimizer, scaler, buffers=()):
        """Put what `save_training` wrote back in place -> Place. stored None: a new run."""
        at = Place()
        if stored:
            self.restore(stored, trainable, buffers)
            if stored["optimizer"]:  # else it was kept of a stage that has no step left
                optimizer.load_state_dict(stored["optimizer"])
                scaler.load_state_dict(stored["scaler"])
            self._set_random_state(stored["rng"])
            self._spent["samples"], self._spent["seconds"] = stored["timed"]
            self._told = self._spent.copy()
            at = Place(stored["epoch"], stored["batch"], stored["step"])
        self._buffers = [(b, b.detach().clone()) for b in dict(buffers).values()]
        return at

    @torch.no_grad()
    def restore(self, stored, trainable, buffers=()):
        """Copy stored weights to `trainable` and `buffers`. UserError if names or shapes differ."""
        there, here = {**stored["weights"], **stored["buffers"]}, {**trainable, **dict(buffers)}
        odd = sorted({*there} ^ {*here}) or [n for n in here if here[n].shape != there[n].shape]
        if odd:
            raise UserError(f"the checkpoint does not fit: {odd[0]!r} is not the same in it and "
                            "here; give the --model and the flags of what is trained as then")
        for name, tensor in here.items():
            tensor.copy_(there[name])

    def save(self, path, state):
        """Write `state` (tensors, numbers, text, containers of them), whole or not at all, to a
        Path or to a name in `out`, if there is one. `x_last.pt` keeps its predecessor as
        `x_prev.pt`. SafeStop for nan or inf in a tensor and for a disk that does not take it."""
        if path := self._inside(path):
            self.on_first(lambda: write_checkpoint(path, state))

    def load(self, path):
        """The checkpoint at `path`, or its predecessor when that is damaged or gone; None when
        neither is there. UserError when none can be read."""
        path = self._inside(path)
        there = [x for x in dict.fromkeys([path, previous(path)]) if x.exists()] if path else []
        while there:
            try:
                return load_checkpoint(there.pop(0))
            except UserError as error:
                if not there:
                    raise UserError(f"{error}; --overwrite starts the run again") from error
                self.say(f"{error}; {there[0].name} is taken instead")

    def _inside(self, path):
        return path if isinstance(path, pathlib.Path) else self.out and self.out / path

    def _random_state(self):
        own = None if self.device.type == "cpu" else self.kind.module.get_rng_state()
        return {"torch": torch.get_rng_state(), "device_type": self.device.type, "device": own}

    def _set_random_state(self, states):
        state = states[min(self.rank, len(states) - 1)]
        torch.set_rng_state(state["torch"].cpu())
        if state["device_type"] != self.device.type or len(states) != self.world_size:
            self.say("note: the checkpoint is of another kind of device or number of processes: "
                     "dropout will differ, the order of samples will not")
        elif state["device"] is not None:
            self.kind.module.set_rng_state(state["device"].cpu())


def shared(error):
    """An error that every process raises: `guard` prints it once."""
    error.shared = True
    return error


def lock(folder):
    """A file that keeps other programs out of `folder` while it is open; None where the system
    cannot lock files. UserError if another one has it."""
    with contextlib.suppress(OSError, ImportError):
        import fcntl
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # else there are no locks here
                raise UserError(f"{folder} is in use by another program that writes a run there: "
                                "wait for it, or choose another --output-dir") from None
        return file


def stored_identity(folder):
    """The identity of the run in `folder`; None where there is no config.json."""
    path = folder / "config.json"
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text("utf-8"))["identity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        # Somebody else's folder perhaps: a downloaded model has a config.json too.
        raise UserError(f"{path} is not of a run of this program: choose another --output-dir"
                        ) from error


def refuse_other(ours, theirs, where, advice="", keys=()):
    """UserError unless the identities are equal, or their `keys` are. advice: what to do then."""
    theirs = theirs if isinstance(theirs, dict) else {}
    for kind in ("table", "method"):
        if theirs.get(kind) != ours.get(kind):
            keys = [kind]  # nothing else need be compared
    changed = [key for key in keys or sorted({*theirs, *ours}) if theirs.get(key) != ours.get(key)]
    if not changed:
        return
    how = "; ".join(f"{key} was {theirs.get(key)!r}, now {ours.get(key)!r}" for key in changed)
    how = re.sub(r"([0-9a-f]{12})[0-9a-f]{20,}", r"\1...", how)  # a sha256
    if changed == ["table"]:
        how = "one run and a table of several --seed or --shots need a folder each"
    what, default = "another run", ("choose another --output-dir, or give the old values; a CLIP "
                                    "to start from goes to --weights")
    if {*changed} <= {"epochs", "max_steps"} and pathlib.Path(where, "results.json").exists():
        what, default = "a finished run", (
            f"to train on from its weights: --weights {where} --output-dir OTHER")
    raise UserError(f"{where} is of {what} ({how}): {advice or default}")
