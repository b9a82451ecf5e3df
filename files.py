"""The files of a run: whole or absent, whenever the machine stops; read without trusting them."""
import contextlib
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import zipfile

import torch
from torch.utils._pytree import tree_map


class UserError(Exception):
    """The user can fix it. One line: what is wrong, what was expected, what to do."""
    exit_code = 2


class SafeStop(Exception):
    """The run stopped before it could do harm; what was saved before is intact."""
    exit_code = 3


def expanded(path):
    """A path as a user may write it -> pathlib.Path, with `~` and $VARIABLES replaced."""
    path = pathlib.Path(os.path.expanduser(os.path.expandvars(path)))
    if path.parts[:1] == ("~",):
        raise UserError(f"{path} has no meaning, as HOME is not set: write the whole path")
    return path


def refuse_unusable(folder, flag="--output-dir"):
    """Raise UserError if a folder could not be made or written to. Creates nothing."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder} cannot be used: {nearest} is not a folder that can "
                        "be written")


def mistaken(file):
    """What an open file is that is often taken for weights or an image; "" where it may be one."""
    file.seek(0)
    head = file.read(100).lstrip()
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; run `git lfs pull` where it came from"
    if head.startswith(b"<"):
        return "a web page: the download gave a login or error page"
    if head.startswith(b"\x1f\x8b"):
        return "gzip-compressed"
    return "" if head else "empty: an interrupted download or copy"


def load_checkpoint(path):
    """Read a checkpoint onto the CPU, as tensors and plain values; no code in it can run. Checks
    every byte, which torch.load does not: 0.3 s for 340 MB."""
    path = expanded(path)
    try:
        with open(path, "rb") as file:
            if what := mistaken(file):
                raise ValueError(what)
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError("a part fails its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"a {type(state).__name__}")
    except Exception as error:  # zipfile, zlib, pickle and torch have many types for this
        raise UserError(f"{path} is no whole checkpoint of tensors and plain values "
                        f"({one_line(error)[:120]}); nothing in it was run") from error
    return state


def previous(path):
    return path.with_name(re.sub("_last$", "_prev", path.stem) + path.suffix)


def write_checkpoint(path, state):
    """See `Run.save`."""
    def portable(x):
        if not torch.is_tensor(x):
            # Exact types: numpy.float64 is a float, but a file with one in it would not load again.
            if x is None or type(x) in (bool, int, float, str):
                return x
            raise TypeError(f"a checkpoint cannot hold {x!r}, a {type(x).__name__}: convert it")
        x = x.detach().cpu()
        if x.is_floating_point() and not x.isfinite().all():
            raise SafeStop(f"a tensor holds nan or inf, so {path} was not written; what was "
                           "saved before is intact. Try a smaller --lr, or --precision fp32")
        # A view would bring the whole of what it is a view of.
        whole = x.untyped_storage().nbytes() <= x.numel() * x.element_size()
        return x if whole else x.clone()
    state = tree_map(portable, state)
    write_whole(path, lambda file: torch.save(state, file))


def write_atomic(path, content):
    """Write bytes, a text, or an object as JSON, whole or not at all."""
    if not isinstance(content, (bytes, str)):
        content = as_json(content, indent=1) + "\n"
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
        free = ""
        with contextlib.suppress(OSError):
            free = f"; {shutil.disk_usage(path.parent).free >> 20:,} MB are free"
            temp.unlink()
        if str(error).startswith("DataLoader worker"):  # its death interrupts whatever goes on
            raise
        raise SafeStop(f"{path} could not be written ({one_line(error)[:200]}{free}); what was "
                       "saved before is intact") from error


def append(path, *lines):
    try:
        with open(path, "ab") as file:  # one write: a kill cannot mix two lines
            file.write("".join(f"{x}\n" for x in lines).encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise SafeStop(f"cannot write {path}: {error}; what was saved is intact") from error


def cut_lines(path, count):
    """Keep the first `count` whole lines, so that metrics.jsonl equals that of an uninterrupted
    run."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines[:count] if line.endswith(b"\n")]
    if len(whole) < len(lines):
        write_atomic(path, b"".join(whole))


def plain(x):
    """`x` as JSON can hold it: scalars as Python numbers, nan and inf as "nan", "inf", "-inf"."""
    def scalar(x):
        x = x.item() if hasattr(x, "item") else x
        return str(x) if isinstance(x, float) and not math.isfinite(x) else x
    return tree_map(scalar, x)


def as_json(x, indent=None):
    return json.dumps(plain(x), indent=indent, ensure_ascii=False, default=str)


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def git_commit():
    """Commit of this file's folder, with "-dirty" if files differ from it; "" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, cwd=pathlib.Path(__file__).resolve().parent, text=True,
                              capture_output=True, timeout=10).stdout.strip()
    return ""
