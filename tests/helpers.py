"""What the tests share: running scripts, refusals, pictures, tiny data and models, processes.

    result = cli("train_clipfit.py", "--shots", 0)      # a process of its own
    result = attempt("train_clipfit", "--shots", 0)     # in this process, through `guard`
    refused(result, "--shots")                          # code 2, one line, names the flag
    results = run_main("train_clipfit", "--epochs", 1)  # what main(args) returns; errors are raised
    refused(lambda: read_image(path), path.name)        # a leaf's error, likewise
"""
import contextlib
import csv
import dataclasses
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile

import numpy
import pytest
import torch
from PIL import Image, ImageDraw

ROOT = pathlib.Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in ROOT.glob("train_*.py"))


# -----------------------------------------------------------------------------
# Running

@dataclasses.dataclass
class Result:
    code: int
    out: str
    err: str

    def ok(self):
        """This result, if the program ended well; else the test fails with what it said."""
        assert self.code == 0, f"exit code {self.code}\n{self.out[-2000:]}\n{self.err[-4000:]}"
        return self


def cli(script, *flags, env=None, timeout=300, **options):
    """Run `script` ("train_clipfit.py", or "-m", "tools.convert", ...) in a process of its own,
    in the checkout unless `cwd` says otherwise -> Result. env: variables to add; None removes."""
    variables = {**os.environ, **(env or {})}
    done = subprocess.run(
        [sys.executable, *map(str, (script, *flags))], text=True, errors="replace",
        capture_output=True, timeout=timeout,
        env={key: str(value) for key, value in variables.items() if value is not None},
        **{"cwd": ROOT, **options})
    return Result(done.returncode if done.returncode >= 0 else 128 - done.returncode,
                  done.stdout, done.stderr)


def python(code, *arguments, **options):
    """`cli` for Python source."""
    return cli("-c", code, *arguments, **options)


def run_main(module, *flags):
    """main(get_args(flags)) of a script (its name, or the module) in this process."""
    module = importlib.import_module(module) if isinstance(module, str) else module
    return module.main(module.get_args([str(flag) for flag in flags]))


def script(module, *flags):
    """The exit code of a script in this process; for `Child` and `processes`."""
    import device
    module = importlib.import_module(module) if isinstance(module, str) else module
    return device.guard(module.main, module.get_args, [str(flag) for flag in flags])


def attempt(module, *flags):
    """The script in this process as its command line runs it -> Result."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = script(module, *flags)
        except SystemExit as stop:  # argparse's way out
            code = stop.code or 0
    return Result(code, out.getvalue(), err.getvalue())


def refused(what, *names):
    """`what`, a Result or a call of no arguments, was refused: exit code 2, one line, and every
    name (a flag's, a file's) stands in it. -> the line"""
    if isinstance(what, Result):
        assert what.code == 2, f"exit code {what.code}\n{what.out[-2000:]}\n{what.err[-3000:]}"
        lines = [line for line in what.err.splitlines() if line.strip()]
        assert len(lines) == 1, what.err
        line = lines[0]
    else:
        with pytest.raises(Exception) as caught:
            what()
        assert getattr(caught.value, "exit_code", None) == 2, repr(caught.value)
        line = str(caught.value)
    assert line.strip() and "\n" not in line, line
    missing = [str(name) for name in names if str(name) not in line]
    assert not missing, f"{missing} not in: {line}"
    return line


# -----------------------------------------------------------------------------
# What a run left

def results(folder):
    return json.loads((pathlib.Path(folder) / "results.json").read_text("utf-8"))


def metrics(folder, split=None):
    """The records of metrics.jsonl, those of one split if it is named."""
    lines = (pathlib.Path(folder) / "metrics.jsonl").read_text("utf-8").splitlines()
    return [row for row in map(json.loads, lines) if split in (None, row["split"])]


CLOCK = {"samples_per_second", "data_wait", "memory_mb", "time"}


def numbers(folder):
    """metrics.jsonl without what a clock or the memory says: equal for equal runs."""
    return [{key: x for key, x in row.items() if key not in CLOCK and not key.endswith("_ms")}
            for row in metrics(folder)]


def skipped(folder):
    """The lines of the log that say which steps changed nothing."""
    lines = (pathlib.Path(folder) / "log.txt").read_text("utf-8").splitlines()
    return [line for line in lines if "step skipped" in line]


def checkpoint(folder, name="checkpoint_last.pt"):
    return torch.load(pathlib.Path(folder) / name, weights_only=True)


def differences(one, other, where=""):
    """Where two nests of tensors and plain values differ, bit for bit; [] where nowhere."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [where]
    if isinstance(one, dict) and isinstance(other, dict):
        return [x for key in {**one, **other} for x in differences(
            one.get(key), other.get(key), f"{where}[{key!r}]")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return [f"length of {where}"]
        return [x for i, (a, b) in enumerate(zip(one, other))
                for x in differences(a, b, f"{where}[{i}]")]
    return [] if type(one) is type(other) and one == other else [where]


def same_run(one, other, names=("checkpoint_last.pt",), but=("timed", "identity", "card")):
    """Two runs' folders hold the same checkpoints, bit for bit, and the same logged numbers."""
    for name in names:
        ours, theirs = ({key: x for key, x in checkpoint(folder, name).items() if key not in but}
                        for folder in (one, other))
        assert differences(ours, theirs) == []
    assert numbers(one) == numbers(other)


# -----------------------------------------------------------------------------
# Pictures and tiny data

def noise(width=32, height=32, mode="RGB", seed=0):
    """A picture of random pixels."""
    stream = numpy.random.default_rng(seed)
    pixels = stream.integers(0, 256, (height, width, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels).convert(mode)


def save_picture(path, picture=None):
    """Write a picture (noise, if none is given) and the folders above it -> the path"""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture or noise()).save(path)
    return path


def class_folder(root, classes=("red", "green", "blue"), **counts):
    """root/SPLIT/CLASS/N.png, of the class's colour if it is one; or root/CLASS/N.png where
    counts has a key "all". Default: train=6, test=3. -> root"""
    for split, count in (counts or {"train": 6, "test": 3}).items():
        for place, name in enumerate(classes):
            for i in range(count):
                stream = random.Random(f"{split} {name} {i}")
                base = COLOURS.get(name, (40 + 40 * place % 200, 90, 200 - 30 * place % 200))
                fill = tuple(min(255, max(0, x + stream.randrange(-30, 30))) for x in base)
                folder = root / name if split == "all" else root / split / name
                save_picture(folder / f"{i}.png", Image.new("RGB", (32, 32), fill))
    return root


COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 230),
           "yellow": (235, 215, 60), "white": (240, 240, 240), "black": (15, 15, 15)}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = {"left": (1, 10), "right": (19, 10), "top": (10, 1), "bottom": (10, 19)}
WORDS = [*"[PAD] [UNK] [CLS] [SEP] a at the one : , ! ? photo of .".split(),
         *COLOURS, *SHAPES, *PLACES]


def draw(colour, shape, place, stream):
    """A 32 x 32 picture of one shape."""
    picture = Image.new("RGB", (32, 32), tuple(stream.randrange(90, 150) for _ in range(3)))
    x, y = PLACES[place]
    pen, fill = ImageDraw.Draw(picture), COLOURS[colour]
    if shape == "cross":
        pen.rectangle((x + 4, y, x + 7, y + 11), fill=fill)
        pen.rectangle((x, y + 4, x + 11, y + 7), fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, y + 11), (x + 11, y + 11), (x + 5, y)], fill=fill)
    else:
        (pen.ellipse if shape == "circle" else pen.rectangle)((x, y, x + 11, y + 11), fill=fill)
    return picture


def scenes(folder, train, val=0, captions=2, seed=0):
    """`train` drawn images of random kinds and `val` of kinds that differ (96 at most), a table
    pairs.csv that gives each `captions` (0 to 2) sentences, and vocab.txt of their words.
    -> folder"""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True)
    stream = random.Random(seed)
    kinds = list(itertools.product(COLOURS, SHAPES, PLACES))
    chosen = [stream.choice(kinds) for _ in range(train)] + stream.sample(kinds, val)
    with open(folder / "pairs.csv", "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(("image", "caption", "split"))
        for i, (colour, shape, place) in enumerate(chosen):
            draw(colour, shape, place, stream).save(folder / f"{i}.png")
            split = "train" if i < train else "val"
            sentences = [f"a {colour} {shape} at the {place}", f"{place}: one {shape}, {colour}"]
            for words in sentences[:captions] or [""]:
                out.writerow((f"{i}.png", words, split))
    (folder / "vocab.txt").write_text("\n".join(WORDS), "utf-8")
    return folder


def with_defaults(flags, more):
    """Flags as text: pairs (flag, value) that are not in `more`, then `more`."""
    kept = [word for flag, value in flags if flag not in more for word in (flag, value)]
    return [str(word) for word in (*kept, *more)]


# -----------------------------------------------------------------------------
# Tiny models

def perturb(model, seed=1, by=0.1, where=lambda name, p: p.dim() < 2):
    """Move norms, biases and running statistics from their start -> the model"""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if where(name, p):
                step = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.add_((by * step).to(p))
        for name, statistics in model.named_buffers():
            if "running" in name:
                statistics.add_(torch.rand(statistics.shape, generator=generator).to(statistics))
    return model


def tiny_clip(seed=0, dtype=torch.float32, config="tiny-vit", vocab_size=49_408, **changes):
    """A random CLIP of 32 x 32 pixels whose norms and biases are not at their start."""
    from clip_model import CLIP, CONFIGS
    torch.manual_seed(seed)
    config = dataclasses.replace(CONFIGS[config], vocab_size=vocab_size, **changes)
    return perturb(CLIP(config).to(dtype).eval(), seed + 1)


def images_for(model, count, seed=5):
    """(count, 3, S, S) random pixels as the model's image tower takes them."""
    generator, size = torch.Generator().manual_seed(seed), model.config.image_size
    images = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)
    return images.to(next(model.parameters()).dtype)


def texts_for(model, lengths, width=0, seed=2):
    """Random texts of these lengths, their ends counted, as the model's text tower takes them."""
    generator, words = torch.Generator().manual_seed(seed), model.config.vocab_size
    tokens = torch.full((len(lengths), width or max(lengths)), model.pad_id)
    for row, length in zip(tokens, lengths):
        row[:length] = torch.randint(3, words - 2, (length,), generator=generator)
        if not model.config.text:
            row[0], row[length - 1] = words - 2, words - 1
    return tokens


def unit_pairs(n, dim=7, seed=0):
    """Unit rows (n, dim) of images and texts in float64, and ids (n, 2) with partners."""
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(n, dim, dtype=torch.float64, generator=generator) for _ in range(2))
    image, text = (torch.nn.functional.normalize(x, dim=1) for x in (image, text + 0.7 * image))
    return image, text, torch.stack([torch.arange(n) // 2, torch.arange(n) % 7], dim=1)


def gradients(loss, *tensors):
    """-> loss(*tensors), and its gradient for each of them, zeros where it has none."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    value = loss(*leaves)
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    return [value.detach(), *(torch.zeros_like(x) if g is None else g
                              for x, g in zip(leaves, found))]


def largest(ones, others):
    """The largest difference of two lists of tensors."""
    return max(float((a - b).abs().max()) for a, b in zip(ones, others, strict=True))


def error(ours, theirs):
    """The largest difference of two gradients {name: tensor}, relative to the largest entry."""
    assert set(ours) >= set(theirs)
    return largest([ours[name] for name in theirs], theirs.values()) / max(
        float(g.abs().max()) for g in theirs.values())


# -----------------------------------------------------------------------------
# A run of each script: six steps, of which every third ends an epoch

def script_data(folder):
    """folder/pairs (26 images), folder/classes (red, green, blue), folder/start.safetensors."""
    import weights
    scenes(folder / "pairs", 26, 12)
    class_folder(folder / "classes")
    weights.save(tiny_clip(), folder / "start.safetensors", "safetensors")
    return folder


def script_flags(name, data, *more):
    """Flags of such a run; its batches divide unevenly, into pieces and among processes."""
    name, start = name.removeprefix("train_"), data / "start.safetensors"
    flags = [("--data", data / ("classes" if name == "clipfit" else "pairs")),
             ("--workers", 0), ("--device", "cpu"), ("--log-every", 1), ("--micro-batch", 2)]
    flags += {"clipfit": [("--weights", start), ("--shots", 5), ("--batch-size", 5)],
              "contrastive": [("--weights", start), ("--batch-size", 7)],
              "distill": [("--model", "tiny-vit"), ("--teacher", start), ("--batch-size", 7)],
              "staged": [("--weights", start), ("--batch-size", 7), ("--captions", "one")]}[name]
    return with_defaults([*flags, ("--epochs", 2), ("--lr", 5e-4)], more)


def run_folder(out):
    """Where the checkpoints of a run lie: those of a run of stages in the stage's folder."""
    return next(pathlib.Path(out).rglob("checkpoint_last.pt")).parent


# -----------------------------------------------------------------------------
# Files that must not be trusted

class Payload:
    """Pickled, it makes the file `canary` when something unpickles it."""
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.canary),)


def damaged_files(folder, whole):
    """{kind: path} of files that are not the checkpoint or weights file `whole` any more."""
    data = pathlib.Path(whole).read_bytes()
    middle = len(data) // 2
    kinds = {
        "empty": b"", "cut": data[:middle], "gzip": b"\x1f\x8b\x08\0" + data[:64],
        "html": b"<!DOCTYPE html><html><body>404</body></html>",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "random": random.Random(0).randbytes(4096),
        "flipped": data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1:]}
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for kind, content in kinds.items():
        paths[kind] = folder / f"{kind}{pathlib.Path(whole).suffix}"
        paths[kind].write_bytes(content)
    return paths


# -----------------------------------------------------------------------------
# Processes. Forks of this one: the same group and exit codes, without seconds of importing.

class Child:
    """work(*arguments) in a fork of this process, its prints in a file."""
    def __init__(self, work, *arguments, environment=None):
        self.file = tempfile.TemporaryFile()

        def run():
            os.environ.update(environment or {})
            for number in (1, 2):
                os.dup2(self.file.fileno(), number)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False, errors="replace")
                                      for number in (1, 2))
            code = work(*arguments)
            sys.exit(code if type(code) is int else 0)
        self.process = multiprocessing.get_context("fork").Process(target=run)
        self.process.start()

    def end(self):
        """Wait for it -> Result: the exit code (128 + n after signal n), both streams in `out`."""
        self.process.join(180)
        self.process.kill()
        self.file.seek(0)
        said, code = self.file.read().decode("utf-8", "replace"), self.process.exitcode
        assert code is not None, f"still running after 180 s: {said}"
        return Result(code if code >= 0 else 128 - code, said, "")


def in_child(work, *arguments):
    return Child(work, *arguments).end()


def after(fault, work, *arguments):
    """work(*arguments) in a process that first does `fault()`, which plants what goes wrong."""
    return in_child(lambda: (fault(), work(*arguments))[1])


def processes(count, work):
    """work(rank) in `count` processes that find each other, as torchrun would start them
    -> [Result] in rank order. `work` may return an exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [Child(work, rank, environment={
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}) for rank in range(count)]
    try:
        return [child.end() for child in children]
    finally:
        for child in children:
            child.process.kill()


def at_call(owner, name, number, fault):
    """`fault()` before the call `number` (from 1) of owner.name, for good."""
    real, calls = getattr(owner, name), itertools.count(1)

    def counted(*args, **options):
        if next(calls) == number:
            fault()
        return real(*args, **options)
    setattr(owner, name, counted)


def at_step(number, fault):
    """`fault()` in the training step `number`, after its update. For use in a `Child`."""
    import device
    at_call(device.Run, "tick", number, fault)


def signal_at(step, number=signal.SIGTERM):
    """This signal in the training step `step`. For use in a `Child`."""
    at_step(step, lambda: signal.raise_signal(number))


def bad_steps(*numbers):
    """Those training steps have a gradient that is not a number. For use in a `Child`."""
    import device
    real, calls = device.Run.sum_gradients, itertools.count(1)

    def summed(run, parameters):
        parameters = list(parameters)
        real(run, parameters)
        if next(calls) in numbers:
            next(p for p in parameters if p.grad is not None).grad.view(-1)[0] = math.nan
    device.Run.sum_gradients = summed


def die():
    """End as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)
