"""Draw a run: curves, confusion matrix, worst pairs, per-class gains, accuracy over shots; of a
plan of stages what was learned and forgotten, searches, and maps of the embeddings.

    python report.py runs/train_clipfit/demo_tiny_fewshot/shots4_seed1      one run
    python report.py runs/train_clipfit/dtd_ViT-B-16_fewshot                a folder of runs
    python report.py RUN RUN ... --out DIR --font NotoSansCJK-Regular.ttc

Writes PNG figures and one page, report.html, which holds everything it shows: no script, no
network. Finished and interrupted runs are drawn alike; what a run lacks is left out with a note.
Only Pillow and NumPy draw. Every scalar in metrics.jsonl gets its place by its name alone, so a
new script needs no new code here: the train split is a line, other splits are points. Example
images are looked up where the run found its data (or in --data-dir). The same run gives the same
bytes. Exit code 0, or 2 and one line.
"""
import argparse
import base64
import csv
import html
import io
import json
import math
import pathlib
import re
import statistics
import sys

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

SCALE, SUPER = 2, 2  # pixels per unit, for sharp screens and print; drawn larger, then reduced
INK, SOFT, GRID, WHITE = (34, 34, 34), (105, 105, 105), (229, 229, 229), (255, 255, 255)
# Okabe and Ito's colours, which colour-blind readers can tell apart; their yellow fades on white.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = PALETTE = (
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (213, 94, 0), (204, 121, 167), (86, 180, 233))
GREY = (170, 170, 170)
SYSTEM = (
    "DejaVuSans.ttf", "arial.ttf", "Arial.ttf", "NotoSansCJK-Regular.ttc", "PingFang.ttc",
    "NotoSansCJKsc-Regular.otf", "NotoSansSC-Regular.otf", "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc", "wqy-zenhei.ttc", "Hiragino Sans GB.ttc", "STHeiti Light.ttc", "msyh.ttc",
    "simhei.ttf", "simsun.ttc", "DroidSansFallbackFull.ttf", "DroidSansFallback.ttf", "uming.ttc")
TITLES = {"lr": "learning rate", "i2t_r": "image to text recall (%)",
          "t2i_r": "text to image recall (%)", "accuracy": "accuracy (%)",
          "macro_f1": "macro F1 (%)", "samples_per_second": "samples per second",
          "data_wait": "share of time waiting for data", "memory_mb": "memory (MB)",
          "mean_recall": "mean recall (%)", "r1": "R@1, mean of both directions (%)",
          "gap": "distance between mean image and mean text", "scale": "logit scale"}
TIMING = ("samples_per_second", "data_wait", "memory_mb")
MATRIX_MAX = 250  # more classes than this make a picture of dust


class ReportError(Exception):
    """What the user can fix, in one line."""


# -----------------------------------------------------------------------------
# A tiny vocabulary for drawing

class Fonts:
    """Pillow's own font, or for texts it cannot write: --font, then fonts of the system."""

    def __init__(self, path=None):
        self.sources, self.others, self.cache, self.known = [], list(SYSTEM), {}, {}
        if path:
            try:
                ImageFont.truetype(str(path), 12)
            except OSError:
                raise ReportError(f"--font {path} is no font that can be read; give a "
                                  f".ttf, .otf or .ttc file") from None
            self.sources.append(str(path))
        self.sources.append(None)

    def at(self, source, size):
        if (source, size) not in self.cache:
            self.cache[source, size] = (ImageFont.truetype(source, size) if source
                                        else ImageFont.load_default(size=size))
        return self.cache[source, size]

    def covers(self, source, text):
        """Whether no character would come out as the font's box for the unknown."""
        font = self.at(source, 16)
        for letter in {*text, "\U0010ffff"}:
            if (source, letter) not in self.known:
                mask = font.getmask(letter)
                self.known[source, letter] = (mask.size, bytes(mask))
        box = self.known[source, "\U0010ffff"]
        return all(c.isspace() or self.known[source, c] != box for c in text)

    def source(self, text):
        """The first font that can write `text`, or False."""
        for source in self.sources:
            if self.covers(source, text):
                return source
        while self.others:  # walking the system's font folders is slow: only if needed, and once
            try:
                self.sources.append(ImageFont.truetype(self.others.pop(0), 12).path)
            except OSError:
                continue
            if self.covers(self.sources[-1], text):
                return self.sources[-1]
        return False

    def pick(self, text, size):
        """-> (font, text it can write), with ? for what no font here has."""
        text = "".join(c if c.isprintable() else " " for c in str(text))
        source = self.source(text)
        if source is False:
            source = self.sources[0]
            text = "".join(c if self.covers(source, c) else "?" for c in text)
        return self.at(source, round(size * SCALE * SUPER)), text


class Canvas:
    """A white picture measured in units. Every text it draws is remembered in `boxes`."""

    def __init__(self, width, height, fonts):
        self.size, self.fonts, self.boxes, zoom = (width, height), fonts, [], SCALE * SUPER
        self.zoom = zoom
        self.image = Image.new("RGB", (round(width * zoom), round(height * zoom)), WHITE)
        self.draw = ImageDraw.Draw(self.image)

    def line(self, points, colour=INK, width=1.0):
        self.draw.line([(x * self.zoom, y * self.zoom) for x, y in points], fill=colour,
                       width=max(1, round(width * self.zoom)), joint="curve")

    def rect(self, x0, y0, x1, y1, fill=None, outline=None, width=1.0):
        if x1 > x0 and y1 > y0:
            z = self.zoom
            self.draw.rectangle([x0 * z, y0 * z, x1 * z - 1, y1 * z - 1], fill, outline,
                                round(width * z))

    def mark(self, x, y, colour, shape=0, r=3.6):
        """A dot, a square, a diamond or a triangle, with a white rim to stand off from lines."""
        for r, fill in ((r + 1, WHITE), (r, colour)):
            x0, y0, x1, y1 = [v * self.zoom for v in (x - r, y - r, x + r, y + r)]
            cx, cy = x * self.zoom, y * self.zoom
            if shape % 4 == 0:
                self.draw.ellipse([x0, y0, x1, y1], fill=fill)
            else:
                self.draw.polygon([[(x0, y0), (x1, y0), (x1, y1), (x0, y1)],
                                   [(cx, y0), (x1, cy), (cx, y1), (x0, cy)],
                                   [(cx, y0), (x1, y1), (x0, y1)]][shape % 4 - 1], fill=fill)

    def width(self, text, size=11):
        font, text = self.fonts.pick(text, size)
        return font.getlength(text) / self.zoom

    def fit(self, text, width, size=11):
        """`text`, cut with an ellipsis where it is wider than `width`."""
        text = str(text)
        if self.width(text, size) <= width:
            return text
        low, high = 0, len(text)
        while low < high:  # the longest beginning that fits
            middle = (low + high + 1) // 2
            fits = self.width(text[:middle].rstrip() + "…", size) <= width
            low, high = (middle, high) if fits else (low, middle - 1)
        return text[:low].rstrip() + "…"

    def text(self, x, y, text, size=11, anchor="lm", colour=INK, turned=False):
        """Write at (x, y). turned: upwards, centred on x; then anchor[0] says where y lies."""
        font, text = self.fonts.pick(text, size)
        x, y = x * self.zoom, y * self.zoom
        if not turned:
            self.draw.text((x, y), text, fill=colour, font=font, anchor=anchor)
            box = self.draw.textbbox((x, y), text, font=font, anchor=anchor)
        else:
            length, height = math.ceil(font.getlength(text)), sum(font.getmetrics())
            mask = Image.new("L", (max(1, length), height))
            ImageDraw.Draw(mask).text((0, 0), text, fill=255, font=font, anchor="la")
            x, y = round(x - height / 2), round(y - length * {"l": 1, "m": .5, "r": 0}[anchor[0]])
            self.image.paste(colour, (x, y), mask.rotate(90, expand=True))
            box = (x, y, x + height, y + length)
        self.boxes.append((text, *(v / self.zoom for v in box)))

    def paste(self, image, x, y, width, height, resample=Image.LANCZOS):
        size = round(width * self.zoom), round(height * self.zoom)
        self.image.paste(image.resize(size, resample), (round(x * self.zoom), round(y * self.zoom)))

    def png(self):
        out = io.BytesIO()
        size = [round(v * SCALE) for v in self.size]
        self.image.resize(size, Image.LANCZOS).save(out, "PNG")
        return out.getvalue()


def pale(colour, share=0.65):
    return tuple(round(c + (255 - c) * share) for c in colour)


def ticks(low, high, most=6, log=False, whole=False):
    """Round numbers in [low, high], about `most` of them; on a log axis powers of ten."""
    if log:
        first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
        return [10.0 ** k for k in range(first, last + 1, -(-(last - first + 1) // most))]
    raw = max((high - low) / most, 1 if whole else 0)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999
                and not (whole and m * power % 1))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def tick_labels(values):
    """The ticks as short texts of one kind; zero is 0, never -0."""
    top = max(map(abs, values), default=0)
    units = ((1e9, "G", 1e9), (1e6, "M", 1e6), (1e3, "k", 1e4))
    unit, letter = next(((u, s) for u, s, least in units if least <= top < 1e13), (1, ""))

    def text(v):
        if abs(v) <= top * 1e-9:
            return "0"
        if 1e-3 <= top < 1e13:
            return f"{v / unit:.6g}{letter}"
        digits, power = f"{v:.3e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    return [text(v) for v in values]


def legend(canvas, entries, left, y, width):
    """Write the labels of `entries` with their line or mark in rows; -> the height taken."""
    x, top = left, y
    for s in entries:
        label = canvas.fit(s["label"], width - 24)
        if x > left and x + canvas.width(label) + 24 > left + width:
            x, y = left, y + 16
        if s.get("line"):
            canvas.line([(x, y), (x + 16, y)], s["colour"], 2.4)
        if s.get("shape") is not None:
            canvas.mark(x + 8, y, s["colour"], s["shape"])
        canvas.text(x + 21, y, label)
        x += canvas.width(label) + 34
    return y - top + 16 if entries else 0


def axis_range(values, log=False, least=0.0):
    """The ends of an axis that holds `values` with a little air, also for a single number."""
    low, high = float(min(values)), float(max(values))
    if log:
        low, high = math.log10(low), math.log10(high)
    air = (high - low) * 0.06
    if air < 1e-9 * max(abs(low), abs(high), 1e-6):
        air = least or abs(low) * 0.1 or 1
    return (10 ** (low - air), 10 ** (high + air)) if log else (low - air, high + air)


def plot(canvas, box, series, title, xlabel="step", xticks=None):
    """A panel inside `box`, for series of dicts: label (None: not in the legend), x, y, colour,
    and of line (bool), shape (marker), std (error bars). -> functions from values to units."""
    left, top, right, bottom = box
    canvas.text((left + right) / 2, top + 9, canvas.fit(title, right - left, 12.5), 12.5, "mm")
    entries = {s["label"]: s for s in reversed(series) if s["label"] is not None}
    entries = list(entries.values())[::-1] if len(entries) > 1 else []
    top += 30 + legend(canvas, entries[:12], left + 20, top + 30, right - left - 30)
    ys = np.concatenate([np.add(s["y"], sign * np.asarray(s.get("std") or 0.0))
                         for s in series for sign in (-1, 1)])
    ys = ys[np.isfinite(ys)]
    # Two decades in the bulk of the values: a few warm-up steps alone do not make an axis log.
    log = bool(ys.min() > 0 and np.quantile(ys, .9) / np.quantile(ys, .1) > 100)
    xlog = bool(xticks) and min(xticks) > 0 and max(xticks) / min(xticks) >= 4
    y0, y1 = axis_range(ys, log)
    x0, x1 = axis_range([v for s in series for v in s["x"]], xlog, 1)
    y_ticks = ticks(y0, y1, 7, log)
    labels = tick_labels(y_ticks) if not log else [tick_labels([v])[0] for v in y_ticks]
    left += max(map(canvas.width, labels), default=0) + 14
    right, bottom = right - 18, bottom - 38
    fx, fy = [math.log10 if flag else float for flag in (xlog, log)]

    def to_x(v):
        return left + (fx(v) - fx(x0)) / (fx(x1) - fx(x0)) * (right - left)

    def to_y(v):
        return bottom - (fy(v) - fy(y0)) / (fy(y1) - fy(y0)) * (bottom - top)
    for v, text in zip(y_ticks, labels):
        canvas.line([(left, to_y(v)), (right, to_y(v))], GRID, 0.7)
        canvas.text(left - 6, to_y(v), text, 11, "rm", SOFT)
    x_ticks, end = xticks or ticks(x0, x1, 6, whole=True), -math.inf
    for v, text in zip(x_ticks, tick_labels(x_ticks)):
        canvas.line([(to_x(v), bottom), (to_x(v), bottom + 3)], SOFT, 0.8)
        if to_x(v) - canvas.width(text) / 2 > end:  # labels that would touch are left out
            canvas.text(to_x(v), bottom + 12, text, 11, "mm", SOFT)
            end = to_x(v) + canvas.width(text) / 2 + 6
    canvas.text((left + right) / 2, bottom + 28, xlabel, 11, "mm", SOFT)
    lines = sum(bool(s.get("line")) for s in series)
    for i, s in enumerate(series):  # a broad first line still shows below one that covers it
        draw_series(canvas, s, to_x, to_y, 3.4 if i == 0 and lines > 1 else 1.9, bottom)
    canvas.line([(left, top), (left, bottom), (right, bottom)], SOFT, 0.9)
    return to_x, to_y


def draw_series(canvas, s, to_x, to_y, width, floor):
    """Lines with gaps where values are not finite (a red tick on the axis says where), points."""
    x, y = np.asarray(s["x"], float), np.asarray(s["y"], float)
    for value in x[~np.isfinite(y)]:
        canvas.line([(to_x(value), floor - 7), (to_x(value), floor)], RED, 1.6)
    if s.get("line"):
        curves = [(y, s["colour"], width)]
        finite = y[np.isfinite(y)]
        if len(finite) > 200 and np.abs(np.diff(finite, 2)).mean() > 0.005 * np.ptp(finite):
            # Noise stays visible behind its running mean; what is smooth needs none.
            size = np.ones(len(y) // 40)
            ok = np.isfinite(y)
            mean = np.convolve(np.where(ok, y, 0), size, "same") / np.maximum(
                np.convolve(ok, size, "same"), 1)
            curves = [(y, pale(s["colour"]), 1.0), (np.where(ok, mean, np.nan), s["colour"], 1.9)]
        for values, colour, wide in curves:
            for part in np.split(np.arange(len(x)), np.flatnonzero(~np.isfinite(values))):
                points = [(to_x(x[i]), to_y(values[i])) for i in part if np.isfinite(values[i])]
                if len(points) > 1:
                    canvas.line(points, colour, wide)
                elif points:
                    canvas.mark(*points[0], colour, 0, 2.4)
    if s.get("shape") is not None:
        points = [(to_x(a), to_y(b)) for a, b in zip(x, y) if np.isfinite(b)]
        if len(points) > 1 and not s.get("line") and not s.get("loose"):
            canvas.line(points, pale(s["colour"], 0.5), 1.0)
        for (a, b), std in zip(zip(x, y), s.get("std") or [0] * len(x)):
            if std:
                for ends in ([(to_x(a), to_y(b - std)), (to_x(a), to_y(b + std))],
                             *([(to_x(a) - 4, to_y(v)), (to_x(a) + 4, to_y(v))]
                               for v in (b - std, b + std))):
                    canvas.line(ends, s["colour"], 1.3)
        for point in points:
            canvas.mark(*point, s["colour"], s["shape"], s.get("r", 3.6))


# -----------------------------------------------------------------------------
# What a run left in its folder

class Run:
    """The readable part of a run's folder; `notes` says what could not be read."""

    def __init__(self, folder):
        self.folder, self.name, self.notes = folder, folder.resolve().name, []
        self.config = self.json("config.json") or {}
        self.results = self.json("results.json") or {}
        self.records = self.metrics()
        if not self.results:
            steps = [r["step"] for r in self.records]
            self.notes.append("the run is not finished (no results.json)"
                              + (f"; its last record is of step {max(steps):g}" if steps else ""))
        identity = self.results.get("identity") or self.config.get("identity") or {}
        self.facts = dict(identity) if isinstance(identity, dict) else {}
        for key in ("method", "data", "model", "setting", "shots", "seed"):
            value = self.results.get(key, self.config.get(key, self.facts.get(key)))
            value = value[0] if isinstance(value, list) and len(value) == 1 else value
            if isinstance(value, (str, int, float)):
                self.facts[key] = value

    def json(self, name):
        try:
            value = json.loads((self.folder / name).read_text("utf-8"))
            if not isinstance(value, dict):
                raise ValueError("not an object")
            return value
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.notes.append(f"{name} cannot be read ({one_line(error)}) and is left out")

    def metrics(self):
        """The records of metrics.jsonl in the order of their steps, broken lines counted."""
        records, broken = [], 0
        try:
            lines = (self.folder / "metrics.jsonl").read_bytes().splitlines()
        except OSError:
            lines = []
        for line in filter(None, map(bytes.strip, lines)):
            try:
                record = json.loads(line)
                if not (isinstance(record, dict) and abs(record["step"]) < 1e15):
                    raise ValueError
                records.append(record)
            except (ValueError, KeyError, TypeError, RecursionError):
                broken += 1
        if broken:
            self.notes.append(f"metrics.jsonl: {broken} broken line{'s' * (broken > 1)} skipped")
        return sorted(records, key=lambda r: r["step"])

    def scalars(self):
        """{name: {split: (steps, values)}}; null is a number that was not finite."""
        found = {}
        for record in self.records:
            split = str(record.get("split", "train"))
            if split.startswith("best on "):  # the final score, which stands in the table
                continue
            for name, value in record.items():
                if name in ("step", "steps", "epoch", "time", "split") or isinstance(value, bool) \
                        or not isinstance(value, (int, float, type(None))) \
                        or name in TIMING and split != "train":
                    continue
                steps, values = found.setdefault(name, {}).setdefault(split, ([], []))
                steps.append(record["step"])
                values.append(math.nan if value is None or abs(value) > 1e300 else value)
        whole = found.get("loss", {}).get("train")
        return {name: kept for name, splits in found.items()
                if (name == "loss" or splits != {"train": whole})  # the only term of the loss
                and (kept := {split: xy for split, xy in splits.items()
                              if np.isfinite(xy[1]).any()})}

    def targets(self):
        """Test sets with tables: the order of results.json, then the alphabet."""
        names = {p.stem.removeprefix(kind) for kind in ("confusion_", "per_class_")
                 for p in self.folder.glob(f"{kind}*.*")}
        first = self.results.get("images")
        first = [n for n in first if n in names] if isinstance(first, dict) else []
        return first + sorted(names - set(first))

    def rows(self, name):
        """A CSV file as dicts, [] where there is none."""
        try:
            with open(self.folder / name, encoding="utf-8", newline="") as file:
                return [row for row in csv.DictReader(file) if None not in row.values()]
        except FileNotFoundError:
            self.notes.append(f"no {name}: what it feeds is left out")
        except (OSError, ValueError, csv.Error) as error:
            self.notes.append(f"{name} cannot be read ({one_line(error)}) and is left out")
        return []

    def confusion(self, target):
        """-> (class names, (C, C) counts after training) or None."""
        stored = self.json(f"confusion_{target}.json")
        if stored is None:
            return None
        try:
            names, counts = list(map(str, stored["classes"])), np.asarray(stored["tuned"], float)
            if not names or counts.shape != (len(names),) * 2 or not (counts >= 0).all():
                raise ValueError(f"{len(names)} classes, matrix of {counts.shape}")
            return names, counts
        except (KeyError, TypeError, ValueError) as error:
            self.notes.append(f"confusion_{target}.json is left out ({one_line(error)})")


def one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


def is_run(folder):
    if (folder / "metrics.jsonl").is_file():
        return True
    try:  # a folder of several runs has results.json too: a list of theirs
        return "runs" not in json.loads((folder / "results.json").read_text("utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def find_runs(paths):
    """The runs in the folders given, each a run or the parent of runs -> list, notes."""
    runs, notes = [], []
    for path in map(pathlib.Path, paths):
        if not path.is_dir():
            raise ReportError(f"{path} is no folder; give the output folder of a run")
        if path.name == "cache" and len(paths) > 1:  # it stands beside runs, so `runs/*` names it
            continue
        inside = [path] if is_run(path) else sorted(
            {p for depth in ("*", "*/*") for p in path.glob(depth) if p.is_dir() and is_run(p)},
            key=lambda p: [int(w) if w.isdigit() else w for w in re.split(r"(\d+)", str(p))])
        if not inside:
            raise ReportError(f"{path} holds no run: neither metrics.jsonl nor results.json, nor "
                              f"folders with them")
        for run in map(Run, inside):
            if run.records or run.results:
                runs.append(run)
            else:
                notes.append(f"{run.name} is empty (no record in metrics.jsonl) and is left out")
    if not runs:
        raise ReportError(f"{paths[0]}: metrics.jsonl has no readable record and there is no "
                          f"results.json; there is nothing to draw")
    return runs, notes


# -----------------------------------------------------------------------------
# The figures: each returns a Canvas, or None where there is nothing to draw

def group_names(runs, apart=("seed",)):
    """A label for each run from what differs between them, the keys in `apart` aside."""
    keys = [k for k in dict.fromkeys(k for run in runs for k in run.facts)
            if k not in apart and "sha256" not in k
            and len({json.dumps(run.facts.get(k)) for run in runs}) > 1]
    return [", ".join(f"{k.replace('_', ' ')} {run.facts.get(k, '-')}" for k in keys)
            or "all runs" for run in runs]


def stem(name):
    """What names of one panel share: ce_loss is a loss, and ln_batch is what a contrastive loss
    begins with; i2t_r1 and i2t_r5 are both i2t_r."""
    bare = name.rstrip("0123456789")
    if name == "ln_batch":
        return "loss"
    return bare if bare.endswith("_r") else bare.rsplit("_", 1)[-1] or name


def panels(runs, timing=False):
    """{title: series} for `plot`, of every scalar in the runs' metrics, or of speed and memory."""
    found, groups, shapes = {}, group_names(runs), {"train": None}
    colours = {g: PALETTE[i % len(PALETTE)] for i, g in enumerate(dict.fromkeys(groups))}
    for run, group in zip(runs, groups):
        scalars = run.scalars()
        for name in sorted(scalars, key=lambda name: "train" not in scalars[name]):
            for split, (x, y) in scalars[name].items() if (name in TIMING) == timing else ():
                shape = shapes.setdefault(split, len(shapes) - 1)
                alone = len(runs) > 1 or timing  # colours tell runs apart, or names of one panel
                found.setdefault(name if alone else stem(name), []).append({
                    "x": x, "y": y, "line": split == "train", "shape": shape, "label": group,
                    "colour": colours[group], "name": name,
                    "split": " ".join(dict.fromkeys(split.split()))})  # "test test": a set "test"
    figures = {}
    for key, panel in found.items():
        names, splits = [list(dict.fromkeys(s[k] for s in panel)) for k in ("name", "split")]
        for i, s in enumerate(panel) if len(runs) == 1 else ():
            parts = [s["name"]] * (len(names) > 1) + [s["split"]] * (len(splits) > 1)
            s.update(label=", ".join(parts), colour=PALETTE[i % len(PALETTE)])
        title = names[0] if len(names) == 1 and not key.endswith("_r") else key
        title = TITLES.get(title, title.replace("_", " "))
        if len(runs) > 1 and splits != ["train"]:
            title += f", {' / '.join(splits)}"
        figures[title] = panel
    return figures


def draw_panels(figures, fonts):
    """All panels in rows of two or three."""
    if not figures:
        return None
    across = min(len(figures), 3 if len(figures) > 4 or len(figures) == 3 else 2)
    width, height = 960 / across, 300 if across < 3 else 270
    canvas = Canvas(960, height * -(-len(figures) // across), fonts)
    for i, (title, series) in enumerate(figures.items()):
        x, y = i % across * width, i // across * height
        plot(canvas, (x + 6, y + 6, x + width - 6, y + height - 6), series, title)
    return canvas


def number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def by_shots(runs):
    """{group: {shots: [results of its seeds]}} of finished runs that say their shots."""
    facts, table = [], {}
    for run in runs:
        if number(run.facts.get("shots")) and number(run.results.get("accuracy")):
            facts.append(run)
    for run, group in zip(facts, group_names(facts, ("seed", "shots"))):
        table.setdefault(group, {}).setdefault(run.facts["shots"], []).append(run.results)
    return {group: dict(sorted(rows.items())) for group, rows in table.items()}


def mean_std(values):
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def draw_shots(table, fonts):
    """Accuracy over shots: mean and standard deviation over seeds, each seed as a pale dot."""
    shots = sorted({s for rows in table.values() for s in rows})
    if len(shots) < 2:
        return None
    series = []
    for i, (group, rows) in enumerate(table.items()):
        colour, name = PALETTE[i % len(PALETTE)], "" if len(table) == 1 else f"{group}: "
        before = [r["zero_shot_accuracy"] for some in rows.values() for r in some
                  if number(r.get("zero_shot_accuracy"))]
        if before:
            series.append({"label": f"{name}zero-shot", "x": [shots[0], shots[-1]], "line": True,
                           "y": [before[0]] * 2, "colour": GREY if not name else pale(colour, .5)})
        dots = [(s, r["accuracy"]) for s, some in rows.items() for r in some]
        series.append({"label": None, "x": [s for s, _ in dots], "y": [a for _, a in dots],
                       "shape": 0, "colour": pale(colour), "r": 2.4, "loose": True})
        spread = [mean_std([r["accuracy"] for r in some]) for some in rows.values()]
        series.append({"label": f"{name}mean and standard deviation over seeds", "x": list(rows),
                       "y": [m for m, _ in spread], "std": [s for _, s in spread],
                       "line": True, "shape": i, "colour": colour})
    canvas = Canvas(620, 360, fonts)
    plot(canvas, (6, 6, 614, 354), series, "accuracy (%)", "training images per class", shots)
    return canvas


def class_label(fonts, name, index):
    """The name, or its number where no font here can write it (classes.txt says which is which)."""
    name = "".join(c if c.isprintable() else " " for c in name)
    return f"#{index}" if fonts.source(name) is False else name


def draw_bars(rows, fonts):
    """Per-class accuracy before and after, best gain first. rows: (index, name, before, after)."""
    rows = sorted(rows, key=lambda r: (r[2] - r[3], r[0]))
    hidden = max(0, len(rows) - 60)
    if hidden:  # the two ends tell the story
        rows = rows[:30] + [None] + rows[-30:]
    canvas = Canvas(820, 84 + 18 * len(rows), fonts)
    canvas.text(410, 14, "accuracy per class (%), sorted by gain", 12.5, "mm")
    names = [class_label(fonts, r[1], r[0]) if r else "" for r in rows]
    left = min(220, max(map(canvas.width, names))) + 16
    right, top, bottom = 820 - 64, 60, 66 + 18 * len(rows)
    for x, colour, label in ((left, GREY, "zero-shot"), (left + 90, BLUE, "tuned")):
        canvas.rect(x, 32, x + 12, 42, colour)
        canvas.text(x + 17, 37, label)
    canvas.text(812, 37, "gain", 11, "rm")
    for v in range(0, 101, 20):
        x = left + (right - left) * v / 100
        canvas.line([(x, top - 4), (x, bottom)], GRID, 0.7)
        canvas.text(x, 52, v, 10, "mm", SOFT) if v else None
        canvas.text(x, bottom + 9, v, 10, "mm", SOFT)
    for i, (row, name) in enumerate(zip(rows, names)):
        y = top + 4 + 18 * i
        if row is None:
            canvas.text((left + right) / 2, y + 7, f"… {hidden} classes between …", 10, "mm", SOFT)
            continue
        canvas.text(left - 7, y + 7, canvas.fit(name, left - 14), 11, "rm")
        for part, (value, colour) in enumerate(((row[2], GREY), (row[3], BLUE))):
            canvas.rect(left, y + 7 * part, left + (right - left) * value / 100, y + 7 * part + 7,
                        colour)
        gain = row[3] - row[2] + 0.0
        text = f"{gain:+.1f}" if abs(gain) >= 0.05 else "0"
        canvas.text(812, y + 7, text, 11, "rm", SOFT if text == "0" else BLUE if gain > 0 else RED)
    canvas.line([(left, top - 4), (left, bottom)], SOFT, 0.9)
    return canvas


def draw_confusion(names, counts, fonts):
    """Rows are true classes. Right answers in blue, wrong ones in orange, by share of the row."""
    n = len(names)
    if n > MATRIX_MAX:
        return None
    cell = max(4.0, min(46.0, 560 / n if n <= 20 else 760 / n))
    right = np.eye(n, dtype=bool)[..., None]
    shade = (counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))[..., None]
    shade = shade ** np.where(right, 0.6, 0.45)  # lifts the few: one wrong image must be seen
    deep = np.where(right, (8, 62, 125), (196, 78, 0))
    colours = (255 - (255 - deep) * shade).round().astype(np.uint8)
    size, measure = min(11.0, max(7.5, cell * 0.68)), Canvas(1, 1, fonts)
    labels = [measure.fit(class_label(fonts, name, i), 140, size) for i, name in enumerate(names)]
    margin = max(measure.width(text, size) for text in labels) + 10
    left, top, side = margin + 26, margin + 66, n * cell
    wide = max(left + side + 20, 420)
    canvas = Canvas(wide, top + side + 24, fonts)
    canvas.text(wide / 2, 14, "confusion matrix, tuned model", 12.5, "mm")
    for x, colour, label in ((wide / 2 - 150, (8, 62, 125), "right"),
                             (wide / 2 - 85, (196, 78, 0), "wrong: images, shade by share")):
        canvas.rect(x, 30, x + 12, 40, colour)
        canvas.text(x + 17, 35, label)
    canvas.text(left + side / 2, 54, "predicted class", 11, "mm", SOFT)
    canvas.text(14, top + side / 2, "true class", 11, "mm", SOFT, turned=True)
    canvas.paste(Image.fromarray(colours), left, top, side, side, Image.NEAREST)
    if cell >= 9:
        for k in range(1, n):
            for a, b in (((left + k * cell, top), (left + k * cell, top + side)),
                         ((left, top + k * cell), (left + side, top + k * cell))):
                canvas.line([a, b], GRID, 0.5)
    canvas.rect(left, top, left + side, top + side, None, SOFT, 0.8)
    every = math.ceil((size + 1.5) / cell)  # small cells: a name at every second, third ... class
    for i in range(0, n, every):
        middle = (i + 0.5) * cell
        canvas.text(left - 5, top + middle, labels[i], size, "rm")
        canvas.text(left + middle, top - 5, labels[i], size, "lm", turned=True)
    least, small = 1 if n <= 20 else 2, min(11, cell * 0.55)
    for i, j in np.argwhere(counts >= least) if cell >= 9 else ():
        text = f"{counts[i, j]:g}"
        if (i != j or n <= 20) and canvas.width(text, small) < cell - 1:
            canvas.text(left + (j + .5) * cell, top + (i + .5) * cell, text, small, "mm",
                        WHITE if shade[i, j, 0] > 0.62 else INK)
    return canvas


def worst_pairs(names, counts, most=10):
    """(true, predicted, images, share of the true class in %) of the most frequent confusions."""
    wrong = counts * ~np.eye(len(names), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    return [(int(i), int(j), wrong[i, j], 100 * wrong[i, j] / counts[i].sum())
            for i, j in zip(*np.unravel_index(order, wrong.shape)) if wrong[i, j] > 0]


def draw_pairs(names, pairs, predictions, read, fonts):
    """Images of the worst pairs, beside some that are what those were taken for; `read` gives the
    image of a path."""
    sides, rows = 68, []
    for i, j, count, share in pairs[:6]:
        def shown(label, most):
            paths = [row["path"] for row in predictions
                     if (row["label"], row["tuned"]) == (label, names[j])]
            return [image for path in paths[:3 * most] if (image := read(path))][:most]
        rows.append((i, j, count, shown(names[i], 4), shown(names[j], 2)))
    if not any(row[3] for row in rows):
        return None
    canvas = Canvas(960, 44 + 110 * -(-len(rows) // 2), fonts)
    x = 12
    for colour, label in ((RED, "images of the first class, taken for the second"),
                          (BLUE, "images of the second class, for comparison")):
        canvas.rect(x, 14, x + 12, 26, None, colour, 2)
        canvas.text(x + 18, 20, label)
        x += canvas.width(label) + 50
    for k, (i, j, count, wrong, right) in enumerate(rows):
        x, y = 12 + k % 2 * 480, 44 + 110 * (k // 2)
        text = f": {count:g} images"
        half = (456 - canvas.width(text) - canvas.width("  →  ")) / 2
        a, b = [canvas.fit(class_label(fonts, names[c], c), half) for c in (i, j)]
        canvas.text(x, y + 8, a)
        x_arrow = x + canvas.width(a) + 7
        canvas.line([(x_arrow, y + 8), (x_arrow + 12, y + 8)], SOFT)
        canvas.line([(x_arrow + 8, y + 5), (x_arrow + 12, y + 8), (x_arrow + 8, y + 11)], SOFT)
        canvas.text(x_arrow + 19, y + 8, b)
        canvas.text(x_arrow + 19 + canvas.width(b), y + 8, text, colour=SOFT)
        for n, (image, colour) in enumerate([(w, RED) for w in wrong] + [(r, BLUE) for r in right]):
            left = x + n * (sides + 6) + 10 * (colour == BLUE)
            canvas.rect(left, y + 20, left + sides + 4, y + 24 + sides, colour)
            square = ImageOps.fit(image, (sides * canvas.zoom,) * 2)
            canvas.paste(square, left + 2, y + 22, sides, sides)
    return canvas


def image_reader(run, target, data_dir):
    """-> (function path -> PIL image or None, note). Looks where the run says its data lies."""
    try:
        from data import open_dataset  # torch comes with it: only when images are wanted
        name = run.config["data"] if target in ("test", "base", "new") else target
        images = open_dataset(name, "test", data_dir=data_dir or run.config.get("data_dir", "data"),
                              layout=run.config.get("split", "coop"))
    except Exception as error:  # whatever it is, a report without photographs is still a report
        return None, f"example images are left out: {one_line(error)}"

    def read(path):
        try:
            return images.store.image(path).convert("RGB")
        except Exception:
            return None
    return read, f"example images are left out: none of them is in {images.root}"


# -----------------------------------------------------------------------------
# The page

STYLE = """
:root{color-scheme:light dark;--ink:#222;--soft:#666;--line:#ddd;--back:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e6e6e6;--soft:#a5a5a5;--line:#3a3d42;--back:#16181b}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:1000px;
margin:2em auto;padding:0 1em}h1{font-size:1.5em;margin-bottom:.2em}h2{font-size:1.15em;
margin:2em 0 .5em}.soft{color:var(--soft)}.scroll{overflow-x:auto}table{border-collapse:collapse;
font-size:.92em}td,th{padding:.22em .8em;border-bottom:1px solid var(--line);text-align:left;
overflow-wrap:anywhere}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
figure{margin:1em 0;background:#fff;border-radius:8px;padding:8px;text-align:center;
border:1px solid var(--line)}img,svg{max-width:100%;height:auto}
"""


def cell(value):
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}" if abs(value) < 1e-2 else f"{value:,.2f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10 ** 4 else str(value)
    return "" if value is None else str(value)


def table(head, rows):
    """An HTML table, numbers to the right."""
    numeric = [all(number(r[i]) or r[i] in ("", None) for r in rows) for i in range(len(head))]
    marks = [' class="n"' if flag else "" for flag in numeric]

    def line(values, tag):
        return "<tr>" + "".join(f"<{tag}{mark}>{html.escape(cell(v))}</{tag}>"
                                for v, mark in zip(values, marks)) + "</tr>"
    return ('<div class="scroll"><table>' + line(head, "th")
            + "".join(line(row, "td") for row in rows) + "</table></div>")


class Page:
    """Collects the sections of report.html and writes the figures beside it."""

    def __init__(self, out, fonts):
        self.out, self.fonts, self.parts, self.notes, self.legend = out, fonts, [], [], {}

    def add(self, title, *blocks):
        blocks = [block for block in blocks if block]
        if blocks:
            self.parts.append(f"<h2>{html.escape(title)}</h2>\n" + "\n".join(blocks))

    def figure(self, name, canvas, alt, photos=False):
        """photos: the page has it as JPEG, an eighth of the size; the file is PNG as ever."""
        if canvas is None:
            return ""
        data, kind = canvas.png(), "png"
        (self.out / name).write_bytes(data)
        if photos:
            small, kind = io.BytesIO(), "jpeg"
            Image.open(io.BytesIO(data)).save(small, "JPEG", quality=85)
            data = small.getvalue()
        return (f'<figure><img width="{round(canvas.size[0])}" alt="{html.escape(alt)}" '
                f'src="data:image/{kind};base64,{base64.b64encode(data).decode()}"></figure>')

    def write(self, title, lead):
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in dict.fromkeys(self.notes))
        if self.legend:
            (self.out / "classes.txt").write_text("".join(
                f"#{i}\t{name}\n" for i, name in sorted(self.legend.items())), "utf-8")
        text = "\n".join([
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            'img-src data:; style-src \'unsafe-inline\'">',
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
            f"<h1>{html.escape(title)}</h1>", lead, *self.parts,
            f"<h2>Notes</h2><ul class=\"soft\">{notes}</ul>" if notes else "", "</body></html>\n"])
        path = self.out / "report.html"
        path.write_text(text, "utf-8", "xmlcharrefreplace")
        return path


# -----------------------------------------------------------------------------
# A plan of stages: the matrix of weights x test sets, searches, maps of the embeddings

TILE, SIDE, HEAD = 76, 150, 46  # of a search: a tile, the labels beside, the lines above
RIGHT, WRONG, UNKNOWN = GREEN, RED, GREY
MAP_POINTS = 1000               # t-SNE here is exact, so its time grows with the square


def stage_label(fonts, name, kind, index):
    """The name, or where no font here can write it "set 2", by which the tables have it."""
    name = "".join(c if c.isprintable() else " " for c in name)
    return f"{kind} {index + 1}" if fonts.source(name) is False else name


def draw_matrix(rows, fonts):
    """R@1 of every row on every set with its interval, coloured by the change from the first; the
    set that a stage was trained on is framed."""
    sets = list(rows[0]["sets"])
    wide = max(90, min(150, 700 / len(sets)))
    across = max(220 + wide * len(sets), 560)
    canvas = Canvas(across, 100 + 34 * len(rows), fonts)
    canvas.text(10, 14, "R@1, mean of both directions (%), and its 95 % interval over images", 12.5)
    x = 10
    for fill, outline, label in ((pale(GREEN, 0.5), None, "above the first row"), (
            pale(RED, 0.5), None, "below"), (WHITE, INK, "what the stage was trained on")):
        canvas.rect(x, 32, x + 14, 44, fill, outline or GRID, 1.2)
        canvas.text(x + 20, 38, label)
        x += canvas.width(label) + 40
    for j, name in enumerate(sets):
        label = canvas.fit(stage_label(fonts, name, "set", j), wide - 8)
        canvas.text(210 + wide * (j + 0.5), 72, label, 11, "mm")
    for i, row in enumerate(rows):
        y = 88 + 34 * i
        label = stage_label(fonts, row["row"], "row", i)
        canvas.text(200, y + 16, canvas.fit(label, 190), 11, "rm")
        for j, name in enumerate(sets):
            found, x = row["sets"][name], 210 + wide * j
            gain = found["r1"] - rows[0]["sets"][name]["r1"]
            fill = pale(GREEN if gain > 0 else RED,
                        1 - min(0.75, abs(gain) / 20)) if gain else WHITE
            own = row["stage"] == name
            canvas.rect(x, y, x + wide - 3, y + 31, fill, INK if own else GRID, 1.4 if own else 1)
            low, high = found["interval"]["r1"]
            canvas.text(x + wide / 2, y + 11, f"{found['r1']:.1f}", 12, "mm")
            canvas.text(x + wide / 2, y + 24, f"{low:.1f} to {high:.1f}", 9, "mm", SOFT)
    return canvas


def draw_search(query, number, read, fonts):
    """A line of tiles for each row's weights, best first; green: a right answer, red: a wrong one,
    grey: not known. `read(set, path)` gives an image or None."""
    across = max(len(row["results"]) for row in query["rows"])
    picture = query.get("image") and read(None, query["text"])  # what was searched for by likeness
    top = HEAD + TILE * (picture is not None and picture is not False)
    canvas = Canvas(SIDE + TILE * max(across, 3) + 8, top + (TILE + 14) * len(query["rows"]) + 4,
                    fonts)
    label = stage_label(fonts, query["text"], "search", number - 1)
    canvas.text(8, 16, canvas.fit(label, canvas.size[0] - 16, 13), 13)
    x = 8
    known = any(one["right"] is not None for row in query["rows"] for one in row["results"])
    for colour, label in ((RIGHT, "right"), (WRONG, "wrong")) if known else (
            (UNKNOWN, "right or wrong: not known"),):
        canvas.rect(x, 31, x + 9, 40, colour)
        canvas.text(x + 13, 36, label, 9, "lm", SOFT)
        x += canvas.width(label, 9) + 24
    if top > HEAD:
        put_tile(canvas, picture, 8, HEAD, None, "")
    for k in range(across):
        canvas.text(SIDE + TILE * (k + 0.5) - 3, top - 10, str(k + 1), 10, "mm", SOFT)
    for i, row in enumerate(query["rows"]):
        y = top + (TILE + 14) * i
        label = stage_label(fonts, row["row"], "row", i)
        canvas.text(8, y + TILE / 2 - 3, canvas.fit(label, SIDE - 16))
        for k, one in enumerate(row["results"]):
            put_tile(canvas, read(one["set"], one["path"]), SIDE + TILE * k, y, one["right"],
                     one["path"].rsplit("/", 1)[-1])
            canvas.text(SIDE + TILE * (k + .5) - 3, y + TILE + 2, f"{one['score']:.3f}", 9, "mm",
                        SOFT)
    return canvas


def put_tile(canvas, image, x, y, right, name):
    """An image in a frame that says whether it is right; its file's name where it is not here."""
    canvas.rect(x, y, x + TILE - 6, y + TILE - 6, {True: RIGHT, False: WRONG, None: UNKNOWN}[right])
    if image is None:
        canvas.rect(x + 3, y + 3, x + TILE - 9, y + TILE - 9, WHITE)
        canvas.text(x + TILE / 2 - 3, y + TILE / 2 - 3, canvas.fit(name, TILE - 16, 8), 8, "mm",
                    SOFT)
    else:
        square = ImageOps.fit(image.convert("RGB"), (round((TILE - 12) * canvas.zoom),) * 2)
        canvas.paste(square, x + 3, y + 3, TILE - 12, TILE - 12)


def first_right(scores, right):
    """Rank of the first right answer in a line of scores, 0 being best, ties by place."""
    best = max(scores[i] for i in right)
    place = min(i for i in right if scores[i] == best)
    return int((scores > best).sum() + (scores[:place] == best).sum())


def load_features(kept, folder, label, name):
    """Image and text features (n, D), (M, D) of a row and a set; NaN: an image without pixels."""
    return [np.load(folder / file, allow_pickle=False) for file in kept["files"][label][name]]


def plain_rows(kept):
    return [label for label in kept["rows"] if " wise " not in label]


def moved(before, after, each):
    """Keys of two dicts of ranks: `each` that rose most, then `each` that fell most."""
    change = sorted((after[key] - rank, key) for key, rank in before.items())
    return [key for d, key in change if d < 0][:each] + [
        key for d, key in change[::-1] if d > 0][:each]


def image_cases(kept, folder, each=2):
    """Images of each set whose first right text rose and fell most from the first row to the last
    -> (set, path, a text of its own, for both rows: the text found first and that rank)."""
    labels, found = plain_rows(kept), []
    for name, of in kept["sets"].items():
        right, ranks, scores = {}, {}, {}
        for text, image in of["relevant"]:
            right.setdefault(image, set()).add(text)
        for label in (labels[0], labels[-1]):
            images, texts = load_features(kept, folder, label, name)
            scores[label] = {i: texts @ images[i] for i in right if not np.isnan(images[i]).any()}
            ranks[label] = {i: 1 + first_right(x, right[i]) for i, x in scores[label].items()}
        for i in moved(ranks[labels[0]], ranks[labels[-1]], each):
            found.append([name, of["paths"][i], of["texts"][min(right[i])], *(x for label in (
                labels[0], labels[-1]) for x in (of["texts"][int(scores[label][i].argmax())],
                                                 ranks[label][i]))])
    return found


def cases(kept, folder, top=8, each=2):
    """Texts of each test set whose first right image rose and fell most from the first to the last
    stage, and what each row finds for them -> queries as `draw_search` takes them; and the texts
    that the last stage is surest to have another image for, by set."""
    labels, queries, doubtful = plain_rows(kept), [], []
    for name, of in kept["sets"].items():
        right = {}
        for text, image in of["relevant"]:
            right.setdefault(text, set()).add(image)
        arrays, ranks = {label: load_features(kept, folder, label, name) for label in labels}, {}

        def scores_of(label, t, arrays=arrays):
            return np.nan_to_num(arrays[label][1][t] @ arrays[label][0].T, nan=-np.inf)
        for label in labels:
            ranks[label] = {t: 1 + first_right(scores_of(label, t), right[t]) for t in right}
        for t in moved(ranks[labels[0]], ranks[labels[-1]], each):
            rows = []
            for label in labels:
                scores = scores_of(label, t)
                best = np.argsort(-scores, kind="stable")[:top]
                rows.append({"row": label, "results": [{
                    "set": name, "path": of["paths"][i], "score": float(scores[i]),
                    "right": int(i) in right[t]} for i in best if scores[i] > -np.inf]})
            queries.append({"text": of["texts"][t], "set": name, "rows": rows, "ranks": {
                label: ranks[label][t] for label in labels}})
        margins = []
        for t, some in right.items():
            scores = scores_of(labels[-1], t)
            first, own = int(scores.argmax()), max(some, key=lambda i: (scores[i], -i))
            margins += [(float(scores[first] - scores[own]), t, own, first)] * (first not in some)
        doubtful += [(name, of["texts"][t], of["paths"][own], of["paths"][first], margin)
                     for margin, t, own, first in sorted(margins, key=lambda m: (-m[0], m[1]))[:5]]
    return queries, doubtful


def pca(x, k=2):
    """(n, D) -> (n, k), the directions of largest variance; the largest loading is positive."""
    x = x - x.mean(axis=0)
    _, _, ways = np.linalg.svd(x, full_matrices=False)
    ways = ways[:k] * np.sign(ways[:k][np.arange(len(ways[:k])), np.abs(ways[:k]).argmax(axis=1)])[
        :, None]
    return x @ ways.T


def affinities(x, perplexity):
    """(n, D) -> (n, n) symmetric probabilities of neighbours: a Gaussian around each point as wide
    as `perplexity` asks, found by bisection (van der Maaten and Hinton 2008, eq. 1)."""
    import torch
    far = torch.cdist(x, x).square()
    far.fill_diagonal_(math.inf)
    low, high = torch.zeros(len(x), 1, dtype=x.dtype), torch.full((len(x), 1), math.inf,
                                                                  dtype=x.dtype)
    beta = torch.ones(len(x), 1, dtype=x.dtype)
    for _ in range(64):
        p = torch.softmax(-far * beta, dim=1)
        entropy = -(p * p.clamp(min=1e-300).log()).sum(dim=1, keepdim=True)
        wide = entropy > math.log(perplexity)
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
        beta = torch.where(high.isinf(), beta * 2, (low + high) / 2)
    return ((p + p.T) / (2 * len(x))).clamp(min=1e-12)


def tsne(x, perplexity=30.0, steps=750):
    """Exact t-SNE of (n, D) -> coordinates (n, 2), the KL divergence that is left. Starts from PCA;
    early exaggeration 12 for 250 steps, momentum 0.5 then 0.8, gains, rate n / 48 as in later
    practice (Belkina et al. 2019). Time and memory grow with n^2."""
    import torch
    n = len(x)
    x = np.asarray(x, np.float64)
    p = affinities(torch.from_numpy(x), min(perplexity, max(2, (n - 1) / 3)))
    y = torch.from_numpy(pca(x))
    y = y / y[:, 0].std() * 1e-4
    speed, gain, rate = torch.zeros_like(y), torch.ones_like(y), max(n / 48, 50)
    for step in range(steps):
        near = 1 / (1 + torch.cdist(y, y).square())
        near.fill_diagonal_(0)
        pull = ((p * (12 if step < 250 else 1)) - near / near.sum()) * near
        slope = 4 * (pull.sum(dim=1, keepdim=True) * y - pull @ y)
        gain = torch.where((slope > 0) != (speed > 0), gain + 0.2, gain * 0.8).clamp(min=0.01)
        speed = (0.5 if step < 250 else 0.8) * speed - rate * gain * slope
        y = y + speed
    near = 1 / (1 + torch.cdist(y, y).square())
    near.fill_diagonal_(0)
    q = (near / near.sum()).clamp(min=1e-12)
    return (y - y.mean(dim=0)).numpy(), float((p * (p / q).log()).sum())


def silhouette(x, labels):
    """Mean over points of (b - a) / max(a, b): a is the mean distance to its own label, b to the
    nearest other one (Rousseeuw 1987). A label alone counts 0."""
    labels = np.asarray(labels)
    far = np.sqrt(np.maximum(0, (x ** 2).sum(1)[:, None] + (x ** 2).sum(1) - 2 * x @ x.T))
    known, found = np.unique(labels), []
    for i in range(len(x)):
        means = {label: far[i][labels == label].sum() / max(1, (labels == label).sum() - (
            label == labels[i])) for label in known}
        a = means.pop(labels[i])
        b = min(means.values(), default=0)
        found.append(0 if (labels == labels[i]).sum() < 2 or not means else
                     (b - a) / max(a, b, 1e-12))
    return float(np.mean(found))


def neighbours_agree(x, labels, k=10):
    """Share of the k nearest points that have the point's own label, in %."""
    labels, near = np.asarray(labels), x @ x.T - (x ** 2).sum(axis=1) / 2
    np.fill_diagonal(near, -np.inf)
    best = np.argsort(-near, axis=1, kind="stable")[:, :k]
    return 100 * float((labels[best] == labels[:, None]).mean())


def pairs_apart(images, texts):
    """How often a pair is nearer than the image and another's text, in % (the area under the ROC
    curve): 50 by chance."""
    scores = images @ texts.T
    own = scores.diagonal()[:, None]
    others = ~np.eye(len(scores), dtype=bool)
    return 100 * float(((scores < own) + 0.5 * (scores == own))[others].mean())


def sample_points(kept, folder):
    """The same images, with a text each, under every stage's weights -> labels of rows, items
    (set, path, text), images and texts (rows, n, D)."""
    labels, items, images, texts = plain_rows(kept), [], [], []
    each = max(4, MAP_POINTS // (2 * len(labels) * len(kept["sets"])))
    for name, of in kept["sets"].items():
        image, text = (np.stack(some) for some in zip(*(load_features(kept, folder, label, name)
                                                        for label in labels)))
        text_of = {image: text for text, image in reversed(of["relevant"])}
        lost = np.isnan(image).any(axis=(0, 2))
        chosen = np.array([i for i in sorted(text_of) if not lost[i]], dtype=int)
        chosen = chosen[np.random.RandomState(kept["seed"]).permutation(len(chosen))[:each]]
        items += [(name, of["paths"][i], of["texts"][text_of[i]]) for i in chosen]
        images.append(image[:, chosen])
        texts.append(text[:, [text_of[i] for i in chosen]])
    return labels, items, np.concatenate(images, axis=1), np.concatenate(texts, axis=1)


def placed(spots, side, x, y):
    """Spots (..., 2) into a square of `side` at (x, y), both axes on one scale."""
    flat = spots.reshape(-1, 2)
    low, high = flat.min(axis=0), flat.max(axis=0)
    return (spots - (low + high) / 2) / max(*(high - low), 1e-12) * side + (x + side / 2,
                                                                          y + side / 2)


def draw_map(labels, items, spots, title, fonts):
    """A panel per row of points (rows, 2, n, 2): images as dots, texts as squares, a line between
    the two of a pair, coloured by test set; all on the same axes."""
    sets = list(dict.fromkeys(item[0] for item in items))
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(sets)}
    across = min(2 if len(labels) in (2, 4) else 3, len(labels))
    side = 310 if across == 3 else 460
    measure = Canvas(across * side + 10, 100, fonts)  # how many lines the legend takes
    entries = [{"label": stage_label(fonts, name, "set", i), "colour": colours[name], "shape": 0}
               for i, name in enumerate(sets)]
    head = 36 + legend(measure, entries, 10, 36, across * side)
    canvas = Canvas(across * side + 10, head + 4 + side * -(-len(labels) // across), fonts)
    canvas.text(10, 14, canvas.fit(title, across * side - 10, 12.5), 12.5)
    legend(canvas, entries, 10, 36, across * side)
    at = placed(spots, side - 56, 0, 0)
    for r, label in enumerate(labels):
        x0, y0 = 8 + r % across * side, head + r // across * side
        canvas.rect(x0, y0, x0 + side - 8, y0 + side - 8, None, GRID)
        canvas.text(x0 + 8, y0 + 12, canvas.fit(stage_label(fonts, label, "row", r), side - 24))
        pairs = [(point + (x0 + 24, y0 + 32), item[0])
                 for point, item in zip(at[r].transpose(1, 0, 2), items)]
        for (image, text), _ in pairs:
            canvas.line([tuple(image), tuple(text)], GRID, 0.6)
        for (image, text), name in pairs:
            canvas.mark(*text, pale(colours[name], 0.5), 1, 2.0)
            canvas.mark(*image, colours[name], 0, 2.6)
    return canvas


def hover_map(labels, items, spots):
    """The last row's points as SVG in the page: a caption shows where the pointer rests."""
    sets, dots = list(dict.fromkeys(item[0] for item in items)), []
    at = placed(spots, 560, 20, 20)[-1]
    for k, (name, path, text) in enumerate(items):
        colour = "#%02x%02x%02x" % PALETTE[sets.index(name) % len(PALETTE)]
        said = html.escape(f"{name}: {text} ({path})")
        (x, y), (u, v) = at[:, k]
        dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{said}</title>'
                    f'</circle><rect x="{u - 3:.1f}" y="{v - 3:.1f}" width="6" height="6" '
                    f'fill="{colour}" opacity=".45"><title>{said}</title></rect>')
    return (f'<p class="soft">t-SNE after {html.escape(labels[-1])}; rest the pointer on a point '
            f'to read it.</p><figure><svg viewBox="0 0 600 600" width="600" role="img">'
            f'{"".join(dots)}</svg></figure>')


def stage_reader(kept, data_dir, notes):
    """function (set, path) -> PIL image or None, where the run found its data; a path of no set is
    a file of its own."""
    opened = {}

    def read(name, path):
        try:
            if name is None:
                return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
            if name not in opened:
                from data import open_pairs  # torch comes with it: only when images are wanted
                where = dict(kept["sets"][name]["source"])
                opened[name] = open_pairs(**{**where, "data_dir": data_dir or where["data_dir"]})
            return opened[name].store.image(path).convert("RGB")
        except Exception as error:  # a report without photographs is still a report
            if name not in opened:
                opened[name] = None
                notes.append(f"images of {name} are left out: {one_line(error)}; --data-dir says "
                             f"where data lies")
    return read


def add_stages(page, run, data_dir):
    """The sections of a plan of stages."""
    results, rows = run.results, run.results["rows"]
    sets, plain = list(rows[0]["sets"]), [r["row"] for r in rows if r["stage"] or r is rows[0]]
    page.add("What each stage learned and forgot", page.figure("matrix.png", draw_matrix(
        rows, page.fonts), "R@1 of weights by test sets"))
    for kind, names in (("set", sets), ("row", [row["row"] for row in rows])):
        page.notes += [f"no font here can write {name}: it is {kind} {i + 1} in the figures; "
                       f"--font names one that can" for i, name in enumerate(names)
                       if stage_label(page.fonts, name, kind, i) != name]
    add_plan(page, run)
    keys = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10", "mean_recall")
    page.add("All recalls (%)", table(["weights", "set", *keys], [
        [row["row"], name, *(float(row["sets"][name][k]) for k in keys)]
        for row in rows for name in sets]))
    page.add("Forgetting and transfer", "<p class='soft'>R@1 points below the best stage so far. "
             + " ".join(f"{way.capitalize()} transfer {results[way + '_transfer']:+.1f}."
                        for way in ("backward", "forward")
                        if results.get(way + "_transfer") is not None) + "</p>",
             table(["after", *sets], [[label, *(float(lost[name]) for name in sets)]
                                      for label, lost in zip(plain, results["forgetting"])]))
    changes = [[c["from"], c["to"], c["set"], float(c["r1"]), *c["interval"],
                "yes" if c["clear"] else ""] for c in results["changes"]]
    page.add("Changes from stage to stage", table(
        ["from", "to", "set", "change of R@1", "low", "high", "clear"], changes) if changes else "",
        "<p class='soft'>Low to high: 95 % interval, both weights on the same resampled images. "
        "Clear: it leaves out 0.</p>" if changes else "")
    page.add("Which weights to take", table(["use", "weights"], list(
        results["recommended"].items())), "<p class='soft'>Chosen on these test sets, so a little "
        "flattered there.</p>")
    for label in plain[1:]:
        stage = Run(run.folder / label)
        if stage.records:
            page.add(f"Stage {label}", page.figure(f"curves_{label}.png", draw_panels(
                panels([stage]), page.fonts), f"curves of stage {label}"))
    add_embeddings(page, run, data_dir)


def add_plan(page, run):
    """What each stage was told, where the stages or the defaults say anything, and how it went."""
    plan, went = run.json("plan.json") or {}, run.results.get("stages")
    went = went if isinstance(went, dict) else {}
    stages = [s for s in plan.get("stages", []) if isinstance(s, dict) and "name" in s]
    keys = [k for k in dict.fromkeys(k for s in stages for k in s)
            if k != "name" and any(s.get(k) not in (None, [], {}) for s in stages)]

    def short(value):
        return value if number(value) or isinstance(value, str) else "" if value in (
            None, [], {}) else json.dumps(value, ensure_ascii=False).strip('[]{}').replace('"', "")
    page.add("The stages", table(
        ["stage", "from", "steps", "best at step", "judged by", "at its start", "at its best",
         "weights that move", "samples/s"],
        [[s["name"], s.get("from"), *(went[s["name"]].get(k) for k in (
            "steps", "best_step", "select", "begun", "best", "trainable_parameters",
            "samples_per_second"))] for s in stages if s["name"] in went]) if went else "",
        "<details><summary>The plan</summary>" + table(["", *(s["name"] for s in stages)], [
            [k, *(short(s.get(k)) for s in stages)] for k in keys]) + "</details>"
        if stages else "")


def add_embeddings(page, run, data_dir):
    """Searches, texts that rose and fell, and maps, as far as their files are there."""
    kept, found = run.json("features.json"), run.json("queries.json")
    if not kept:
        return page.notes.append("no features.json: searches and maps are left out")
    read, folder = stage_reader(kept, data_dir, page.notes), run.folder / "cache"
    try:
        if found and found["queries"]:
            add_searches(page, found, read)
        if not kept.get("files"):
            return page.notes.append("the run kept no features (--no-feature-cache): cases and "
                                     "maps are left out")
        add_cases(page, kept, folder, read)
        add_maps(page, kept, folder)
    except (OSError, ValueError, KeyError, TypeError, IndexError, ImportError) as error:
        page.notes.append(f"searches, cases or maps are left out: {one_line(error)}")


def add_searches(page, found, read):
    blocks = []
    for k, query in enumerate(found["queries"], 1):
        ranks = ", ".join(f"{row['row']} {row['rank']:,}" for row in query["rows"]
                          if row.get("rank"))
        blocks += [f"<p><b>{html.escape(query['text'])}</b>" + (
            f" <span class='soft'>rank of the first right image: {html.escape(ranks)}</span>"
            if ranks else "") + "</p>", page.figure(f"search_{k}.png", draw_search(
                query, k, read, page.fonts), query["text"], photos=True)]
    if found["precision"]:
        blocks.append(table(["weights", "P@1: a right image is first (%)", "P@5: among five (%)"], [
            [label, some["p1"], some["p5"]] for label, some in found["precision"].items()]))
    page.add("Searches", *blocks)


def add_cases(page, kept, folder, read):
    chosen, doubtful = cases(kept, folder)
    blocks = []
    for k, query in enumerate(chosen, 1):
        ranks = ", ".join(f"{label} {rank:,}" for label, rank in query["ranks"].items())
        blocks += [f"<p><b>{html.escape(query['text'])}</b> <span class='soft'>"
                   f"{html.escape(query['set'])}; rank of the first right image: "
                   f"{html.escape(ranks)}</span></p>", page.figure(f"case_{k}.png", draw_search(
                       query, k, read, page.fonts), query["text"], photos=True)]
    page.add("Texts that gained and lost most", *blocks)
    labels, images = plain_rows(kept), image_cases(kept, folder)
    page.add("Images that gained and lost most", table(
        ["set", "image", "a text of its own", f"{labels[0]} finds first", "rank of a right one",
         f"{labels[-1]} finds first", "rank"], images) if images else "")
    page.add(f"Where {labels[-1]} is surest of another image", table(
        ["set", "text", "its image", "found first", "higher by"], doubtful) if doubtful else "",
        "<p class='soft'>Hard cases, or labels to look at.</p>" if doubtful else "")


def add_maps(page, kept, folder):
    labels, items, images, texts = sample_points(kept, folder)
    points = np.stack([images, texts], axis=1)                         # (rows, 2, n, D)
    flat = points.reshape(-1, points.shape[-1])
    spots = {"pca": pca(flat).reshape(*points.shape[:3], 2)}
    coordinates, left = tsne(flat)
    spots["tsne"] = coordinates.reshape(*points.shape[:3], 2)
    names = [item[0] for item in items]
    with open(page.out / "map.csv", "w", encoding="utf-8", newline="", errors="replace") as file:
        out = csv.writer(file)
        out.writerow(("weights", "kind", "set", "path", "text",
                      "pca_x", "pca_y", "tsne_x", "tsne_y"))
        for r, label in enumerate(labels):
            for kind in (0, 1):
                for k, item in enumerate(items):
                    out.writerow((label, ("image", "text")[kind], *item, *(
                        f"{v:.6g}" for name in spots for v in spots[name][r, kind, k])))
    what = "one fit over all stages: dots are images, squares their texts"
    figures = [page.figure(f"map_{name}.png", draw_map(
        labels, items, spots[name], title, page.fonts), title) for name, title in (
            ("pca", f"PCA, {what}"), ("tsne", f"t-SNE, {what}; KL {left:.3f}"))]
    page.add("Maps of the embeddings", *figures, table(
        ["weights", "silhouette by set", "10 neighbours of the same set (%)", "pairs nearer than "
         "others (%)"], [[label, silhouette(images[r], names), neighbours_agree(images[r], names),
                          pairs_apart(images[r], texts[r])] for r, label in enumerate(labels)]),
        hover_map(labels, items, spots["tsne"]))


def add_target(page, run, target, data_dir):
    """Per-class bars, confusion matrix, worst pairs and worst classes of one test set."""
    suffix = f" on {target}" if target != "test" else ""
    rows = []
    for i, row in enumerate(run.rows(f"per_class_{target}.csv")):
        try:
            rows.append((i, row["class"], float(row["zero_shot"]), float(row["tuned"])))
        except (KeyError, TypeError, ValueError):
            run.notes.append(f"per_class_{target}.csv: row {i + 1} cannot be read; skipped")
    rows = [row for row in rows if 0 <= row[2] <= 100 and 0 <= row[3] <= 100]  # nan: no test image
    if rows:
        page.add(f"Accuracy per class{suffix}", page.figure(
            f"per_class_{target}.png", draw_bars(rows, page.fonts), "bars of accuracy per class"))
    stored = run.confusion(target)
    names = stored[0] if stored else []
    for i, name in [(r[0], r[1]) for r in rows] + list(enumerate(names)):
        if class_label(page.fonts, name, i) != "".join(c if c.isprintable() else " " for c in name):
            page.legend[i] = name
    if not stored:
        return
    counts, pairs = stored[1], worst_pairs(*stored)
    picture = draw_confusion(names, counts, page.fonts)
    page.add(f"Confusion{suffix}", page.figure(
        f"confusion_{target}.png", picture, "confusion matrix")
        or f"<p class='soft'>{len(names):,} classes are too many for a matrix.</p>")
    read, note = image_reader(run, target, data_dir)
    predictions = run.rows(f"predictions_{target}.csv") if read and pairs else []
    sheet = draw_pairs(names, pairs, predictions, read, page.fonts) if predictions else None
    if pairs and not sheet:
        run.notes.append(note)
    page.add(f"Worst pairs{suffix}", table(
        ["true class", "taken for", "images", "% of the class"],
        [(names[i], names[j], int(n), share) for i, j, n, share in pairs]) if pairs else
        "<p>No image was misclassified.</p>", page.figure(f"pairs_{target}.png", sheet, "images of "
                                                          "the worst pairs"))
    total, hits = counts.sum(axis=1), counts.diagonal()
    worst = sorted(np.flatnonzero(total), key=lambda i: (hits[i] / total[i], i))[:10]
    before = {r[1]: r[2] for r in rows}
    others = counts * ~np.eye(len(names), dtype=bool)
    page.add(f"Worst classes{suffix}", table(
        ["class", "images", "zero-shot %", "tuned %", "most often taken for"],
        [(names[i], int(total[i]), before.get(names[i]), 100 * hits[i] / total[i],
          names[others[i].argmax()] if others[i].any() else "") for i in worst]))


def scalars_of(results):
    return {k: v for k, v in results.items() if isinstance(v, (str, int, float)) and k != "git"}


def add_results(page, runs, shots):
    """The numbers of one run in two columns, or one line for each of several runs."""
    found = [scalars_of(run.results) or scalars_of(run.facts) for run in runs]
    if len(runs) == 1:
        return page.add("Results", table(["", ""], list(found[0].items())))
    keys = list(dict.fromkeys(k for f in found for k in f))
    same = [k for k in keys if len({json.dumps(f.get(k)) for f in found}) == 1]
    if any(len(some) > 1 for rows in shots.values() for some in rows.values()):
        page.add("Mean over seeds", table(
            ["", "shots", "runs", "accuracy", "± std"],
            [(group, s, len(some), *mean_std([r["accuracy"] for r in some]))
             for group, rows in shots.items() for s, some in rows.items()]))
    keys = [k for k in keys if k not in same]
    page.add("Results", table(["run", *keys], [[run.name, *(f.get(k) for k in keys)]
                                               for run, f in zip(runs, found)]),
             "<p class='soft'>The same in all: " + html.escape(
                 ", ".join(f"{k} {cell(found[0][k])}" for k in same)) + "</p>")


def timing_line(runs):
    """What the runs cost, in a sentence."""
    parts = []
    for key, unit, join in (("seconds", "s in all", sum), ("peak_memory_mb", "MB at most", max)):
        values = [run.results[key] for run in runs if number(run.results.get(key))]
        parts += [f"{join(values):,.0f} {unit}"] if values else []
    for name, form in (("samples_per_second", "{:,.0f} samples per second (median)"),
                       ("data_wait", "{:.0%} of the time waiting for data")):
        values = [v for run in runs for r in run.records if r.get("split", "train") == "train"
                  and number(v := r.get(name))]
        parts += [form.format(statistics.median(values))] if values else []
    parts += [f"{k} {runs[0].results[k]}" for k in ("device", "precision", "torch")
              if k in runs[0].results]
    return f"<p>{html.escape(' · '.join(parts))}</p>" if parts else ""


def build(runs, notes, out, fonts, data_dir=None):
    """All figures and the page -> path of the page."""
    page, shots = Page(out, fonts), by_shots(runs)
    first, last = runs[0], runs[-1]
    facts = {k: v for k, v in first.facts.items() if all(r.facts.get(k) == v for r in runs)}
    title = " · ".join(f"{facts[k]}{' shots' * (k == 'shots')}" for k in (
        "method", "data", "model", "shots") if k in facts) or first.name
    lead = f"<p class='soft'>{html.escape(', '.join(run.name for run in runs))}</p>"
    add_results(page, runs, shots)
    departures = next((d for d in (first.results.get("departures"), first.config.get("departures"))
                       if isinstance(d, list)), None)
    if departures is not None:
        page.add("Departures from the published recipe", "<ul>" + "".join(
            f"<li>{html.escape(str(d))}</li>" for d in departures) + "</ul>" if departures
            else "<p>None.</p>")
    page.add("Accuracy and shots", page.figure("shots.png", draw_shots(shots, fonts),
                                               "accuracy over training images per class"))
    page.add("Curves", page.figure("curves.png", draw_panels(panels(runs), fonts), "curves"))
    if isinstance(last.results.get("rows"), list):
        add_stages(page, last, data_dir)
    if len(runs) > 1 and last.targets():
        page.add(f"In detail: {last.name}", "<p class='soft'>What follows is of this run; give "
                 "report.py another run's folder to see that one.</p>")
    for target in last.targets():
        add_target(page, last, target, data_dir)
    if not last.targets() and not isinstance(last.results.get("rows"), list):
        page.notes.append(f"{last.name} has no per-class tables: those sections are left out")
    page.add("Time and memory", timing_line(runs), page.figure(
        "timing.png", draw_panels(panels(runs, True), fonts), "speed and memory"))
    config = {key: json.dumps(value, ensure_ascii=False) for key, value in last.config.items()
              if key != "identity" and value is not None}
    page.add("Configuration", f"<details><summary>config.json of {html.escape(last.name)}</summary>"
             f"{table(['flag', 'value'], list(config.items()))}</details>" if config else "")
    page.notes += notes + [note if len(runs) == 1 else f"{run.name}: {note}"
                           for run in runs for note in run.notes]
    return page.write(title, lead)


def get_args(argv=None):
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Draw finished or interrupted "
                                     "runs: PNG figures and one self-contained HTML page.")
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="output folder of a run, or a folder that holds such folders")
    parser.add_argument("--out", metavar="DIR",
                        help="where to write (default: report/ in the first RUN)")
    parser.add_argument("--data-dir", metavar="DIR",
                        help="where the data sets lie, for example images (default: as in the run)")
    parser.add_argument("--font", metavar="FILE", help="a font for class names that the built-in "
                        "one cannot write (default: a font of the system, if needed)")
    parser.error = lambda message: parser.exit(2, f"error: {message} (--help lists the flags)\n")
    return parser.parse_args(argv)


def main(argv=None):
    """Returns the exit code: 0, or 2 after one line on stderr."""
    args = get_args(argv)
    try:
        fonts = Fonts(args.font)
        runs, notes = find_runs(args.runs)
        out = pathlib.Path(args.out or pathlib.Path(args.runs[0]) / "report")
        out.mkdir(parents=True, exist_ok=True)
        print(build(runs, notes, out, fonts, args.data_dir))
    except (ReportError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
