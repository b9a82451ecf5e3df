"""Draw finished or interrupted runs: one HTML page, with its figures beside it.

    python -m tools.report runs/train_clipfit/demo_tiny_fewshot     one run, or a folder of runs
    python -m tools.report RUN RUN ... --out DIR --font NotoSansCJK-Regular.ttc

The page holds all it shows: no script, no network. Of a few-shot run: accuracy over shots, curves,
gains per class, confusion and its worst pairs. Of a plan of stages: the matrix of what was learned
and forgotten, and, once `python -m tools.search RUN --embeddings` has kept features, maps of them
and the texts that gained and lost most. Any scalar in metrics.jsonl is drawn by its name: the
train split as a line, others as points. What a run lacks is left out with a note. Exit code 0, or
2 and one line. Needs matplotlib; the t-SNE map needs scikit-learn too.
"""
import argparse
import base64
import csv
import html
import io
import json
import math
import pathlib
import statistics
import sys
import warnings

import numpy as np
from PIL import ImageOps

# Okabe and Ito's colours, which colour-blind readers can tell apart.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
BLUE, ORANGE, GREEN, RED = PALETTE[:4]
# matplotlib's own font, then the first of these that is installed, for Chinese names and captions.
CJK_FONTS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Hiragino Sans GB",
             "Microsoft YaHei", "SimHei", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei")
NOT_DRAWN = ("step", "steps", "epoch", "time", "split", "samples_per_second", "data_wait",
             "memory_mb")
MOST_CLASSES = 100  # more than this make a confusion matrix of dust
MAP_POINTS = 400    # of each set


class ReportError(Exception):
    """What the user can fix, in one line."""


def open_matplotlib(font=None):
    """pyplot without a window, with a font for Chinese if there is one -> (pyplot, notes)."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import font_manager, pyplot
    except ImportError:
        raise ReportError("matplotlib draws the figures and is not installed: "
                          "pip install matplotlib") from None
    families, notes = ["DejaVu Sans"], []
    if font:
        try:
            font_manager.fontManager.addfont(font)
            families.append(font_manager.FontProperties(fname=font).get_name())
        except (OSError, RuntimeError) as error:
            raise ReportError(f"--font {font} cannot be read ({error})") from None
    installed = {entry.name for entry in font_manager.fontManager.ttflist}
    families += [name for name in CJK_FONTS if name in installed][:1]
    if len(families) == 1:
        notes.append("no font for Chinese is installed: figures show boxes for it, and the page "
                     "has the words; --font FILE names one")
    warnings.filterwarnings("ignore", message="Glyph")  # said once, in that note
    pyplot.rcParams.update({"font.family": families, "font.size": 9, "axes.spines.top": False,
                            "axes.spines.right": False, "figure.dpi": 110})
    return pyplot, notes


# -----------------------------------------------------------------------------
# What a run left in its folder

def number(value):
    """A finite number; metrics.jsonl writes the others as text ("nan")."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class Run:
    """The readable part of a run's folder; `notes` says what could not be read."""

    def __init__(self, folder):
        self.folder, self.name, self.notes = folder, folder.resolve().name, []
        self.config = self.read("config.json", json.loads) or {}
        self.results = self.read("results.json", json.loads) or {}
        self.records = []
        for line in (self.read("metrics.jsonl", str.splitlines) or []):
            try:
                record = json.loads(line)
                self.records.append((record["step"], record))
            except (ValueError, KeyError, TypeError):  # a line that a kill cut off
                self.notes.append("metrics.jsonl has a broken line, which is left out")
        if not self.results:
            self.notes.append("the run is not finished (no results.json)")

    def read(self, name, parse):
        """parse(text of a file); None where there is no such file, or a broken one (noted)."""
        try:
            return parse((self.folder / name).read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            self.notes.append(f"{name} cannot be read ({error}) and is left out")

    def rows(self, name):
        """A CSV file as a list of dicts."""
        return self.read(name, lambda text: list(csv.DictReader(io.StringIO(text)))) or []

    def fact(self, key):
        """What the results or the flags say, such as the number of shots; None if nothing."""
        value = self.results.get(key, self.config.get(key))
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    def curves(self):
        """{scalar: {split: (steps, values)}}. A value that is not finite leaves a gap."""
        found, gaps = {}, 0
        for step, record in self.records:
            for name, value in record.items():
                if name in NOT_DRAWN or not (number(value) or value in ("nan", "inf", "-inf")):
                    continue
                splits = found.setdefault(name, {})
                steps, values = splits.setdefault(record.get("split", "train"), ([], []))
                steps.append(step)
                values.append(value if number(value) else math.nan)
                gaps += not number(value)
        if gaps:
            self.notes.append(f"{gaps} logged values are not finite: the curves have gaps there")
        return found

    def test_sets(self):
        return sorted(path.stem.removeprefix("per_class_")
                      for path in self.folder.glob("per_class_*.csv"))


def find_runs(paths):
    """The runs in the folders given, each a run or a folder of runs."""
    runs = []
    for path in map(pathlib.Path, paths):
        if not path.is_dir():
            raise ReportError(f"{path} is not a folder; give the output folder of a run")
        inside = [path] if (path / "metrics.jsonl").is_file() else sorted(
            file.parent for file in path.glob("*/metrics.jsonl"))
        plan = path / "plan.json"  # of stages: the folder above them is the run
        runs += [Run(folder) for folder in ([path] if plan.is_file() else inside)]
        if not inside and not plan.is_file():
            raise ReportError(f"{path} holds no run: no metrics.jsonl in it or in its folders")
    return runs


# -----------------------------------------------------------------------------
# The page

STYLE = """
:root{color-scheme:light dark;--ink:#222;--soft:#666;--line:#ddd;--back:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e6e6e6;--soft:#a5a5a5;--line:#3a3d42;--back:#16181b}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:1000px;
margin:2em auto;padding:0 1em}h2{font-size:1.15em;margin:2em 0 .5em}.soft{color:var(--soft)}
table{border-collapse:collapse;font-size:.92em;display:block;overflow-x:auto}
td,th{padding:.22em .8em;border-bottom:1px solid var(--line);text-align:left}
figure{margin:1em 0;background:#fff;padding:8px;text-align:center}img{max-width:100%;height:auto}
"""


class Page:
    """Collects the sections of report.html; its figures are written beside it as PNG files too."""

    def __init__(self, out, plot, notes):
        self.out, self.plot, self.notes, self.parts = out, plot, notes, []

    def add(self, title, *blocks):
        if any(blocks):
            self.parts.append(f"<h2>{html.escape(title)}</h2>\n" + "\n".join(filter(None, blocks)))

    def figure(self, name, figure, description):
        """Write a matplotlib figure and close it -> its HTML."""
        data = io.BytesIO()
        figure.savefig(data, format="png", bbox_inches="tight")
        self.plot.close(figure)
        (self.out / name).write_bytes(data.getvalue())
        code = base64.b64encode(data.getvalue()).decode()
        return (f'<figure><img alt="{html.escape(description)}" '
                f'src="data:image/png;base64,{code}"></figure>')

    def table(self, head, rows):
        def cell(value):
            if isinstance(value, float):
                value = "" if math.isnan(value) else f"{value:.4g}"
            return html.escape("" if value is None else str(value))

        def line(values, tag):
            return "<tr>" + "".join(f"<{tag}>{cell(v)}</{tag}>" for v in values) + "</tr>"
        return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"

    def write(self, title):
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in dict.fromkeys(self.notes))
        path = self.out / "report.html"
        path.write_text("\n".join([
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            'img-src data:; style-src \'unsafe-inline\'">',
            f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
            f"<h1>{html.escape(title)}</h1>", *self.parts,
            f"<h2>Notes</h2><ul class='soft'>{notes}</ul>" if notes else "", "</body></html>"]),
            "utf-8", "xmlcharrefreplace")
        return path


# -----------------------------------------------------------------------------
# Any run: results and curves

def add_results(page, runs):
    """One run: its numbers in two columns; several: a line each, of what differs."""
    found = [{key: value for key, value in run.results.items()
              if isinstance(value, (str, int, float)) and key != "git"} for run in runs]
    if len(runs) == 1:
        page.add("Results", page.table(["", ""], found[0].items()))
        return
    keys = [key for key in dict.fromkeys(key for numbers in found for key in numbers)
            if len({json.dumps(numbers.get(key)) for numbers in found}) > 1]
    page.add("Results", page.table(["run", *keys], [
        [run.name, *map(numbers.get, keys)] for run, numbers in zip(runs, found)]))


def add_curves(page, runs, title="Curves", file="curves.png"):
    """A panel for each logged scalar: the train split as a line, others as dots; colours by run,
    or by split where there is one run."""
    panels = {}
    for run in runs:
        for name, splits in run.curves().items():
            for split, (steps, values) in splits.items():
                label = run.name if len(runs) > 1 else split
                panels.setdefault(name, []).append((label, split == "train", steps, values))
    if not panels:
        return
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure, axes = page.plot.subplots(down, across, squeeze=False, layout="constrained",
                                      figsize=(3.4 * across, 2.4 * down + 0.4))
    colours, drawn = {}, {}
    for axis, (name, lines) in zip(axes.flat, panels.items()):
        for label, is_train, steps, values in lines:
            colour = colours.setdefault(label, PALETTE[len(colours) % len(PALETTE)])
            drawn[label], = axis.plot(steps, values, "-" if is_train and len(steps) > 1 else "o:",
                                      color=colour, linewidth=1.2, markersize=4)
        axis.set(title=name.replace("_", " "), xlabel="step")
    for axis in axes.flat[len(panels):]:
        axis.axis("off")
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=4, frameon=False)
    page.add(title, page.figure(file, figure, "logged scalars over steps"))


# -----------------------------------------------------------------------------
# Few-shot runs: accuracy over shots, classes, confusion

def add_shots(page, runs):
    """Accuracy over training images per class: mean and standard deviation over seeds."""
    runs = [run for run in runs if number(run.fact("shots")) and number(run.fact("accuracy"))]
    shots = sorted({run.fact("shots") for run in runs})
    if len(shots) < 2:
        return
    mean, std, rows = [], [], []
    for count in shots:
        values = [run.results["accuracy"] for run in runs if run.fact("shots") == count]
        mean.append(statistics.fmean(values))
        std.append(statistics.stdev(values) if len(values) > 1 else 0.0)
        rows.append([count, len(values), mean[-1], std[-1]])
    figure, axis = page.plot.subplots(figsize=(6, 3.6), layout="constrained")
    axis.errorbar(shots, mean, yerr=std, fmt="o-", color=BLUE, capsize=3, label="tuned")
    for run in runs:
        axis.plot(run.fact("shots"), run.results["accuracy"], ".", color=BLUE, alpha=0.4)
    zero = [run.results["zero_shot_accuracy"] for run in runs
            if number(run.results.get("zero_shot_accuracy"))]
    if zero:
        axis.axhline(statistics.fmean(zero), color=ORANGE, linestyle="--", label="zero-shot")
    axis.set_xscale("log", base=2)
    axis.set_xticks(shots, [str(count) for count in shots])
    axis.set(xlabel="training images per class", ylabel="accuracy (%)")
    axis.legend(frameon=False)
    page.add("Accuracy over shots", page.figure("shots.png", figure, "accuracy over shots"),
             page.table(["shots", "runs", "mean accuracy", "std"], rows))


def add_classes(page, run, name, data_dir):
    """Gains per class, the confusion matrix and its worst pairs on one test set."""
    rows = [row for row in run.rows(f"per_class_{name}.csv")
            if row.get("tuned") not in (None, "", "nan")]
    if rows:
        classes = [row["class"] for row in rows]
        before, after = ([float(row[key]) for row in rows] for key in ("zero_shot", "tuned"))
        figure, axis = page.plot.subplots(figsize=(8, 0.24 * len(rows) + 1), layout="constrained")
        places = np.arange(len(rows))
        axis.barh(places - 0.2, before, 0.4, color=ORANGE, label="zero-shot")
        axis.barh(places + 0.2, after, 0.4, color=BLUE, label="tuned")
        axis.set_yticks(places, classes)
        axis.set(xlabel="accuracy (%)", ylim=(len(rows) - 0.5, -0.5))
        axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
        page.add(f"Accuracy per class: {name}", page.figure(
            f"per_class_{name}.png", figure, "accuracy per class, zero-shot and tuned"))
    confusion = run.read(f"confusion_{name}.json", json.loads)
    if not confusion:
        return
    classes, counts = confusion["classes"], np.asarray(confusion["tuned"], dtype=float)
    if len(classes) <= MOST_CLASSES:
        share = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
        size = 3 + 0.16 * len(classes)
        figure, axis = page.plot.subplots(figsize=(size + 1, size), layout="constrained")
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axis.set_xticks(range(len(classes)), classes, rotation=90)
        axis.set_yticks(range(len(classes)), classes)
        axis.set(xlabel="predicted", ylabel="true")
        page.add(f"Confusion: {name}", page.figure(
            f"confusion_{name}.png", figure, "confusion matrix, rows in shares of the true class"))
    add_worst_pairs(page, run, name, classes, counts, data_dir)


def add_worst_pairs(page, run, name, classes, counts, data_dir):
    """The most frequent confusions, with images of them where the data is here."""
    wrong = counts * ~np.eye(len(classes), dtype=bool)
    pairs = [np.unravel_index(i, wrong.shape) for i in np.argsort(-wrong, axis=None, kind="stable")]
    pairs = [(true, other) for true, other in pairs[:10] if wrong[true, other]]
    if not pairs:
        return
    table = page.table(["true class", "taken for", "images", "of the class (%)"], [
        [classes[i], classes[j], int(wrong[i, j]), 100 * wrong[i, j] / counts[i].sum()]
        for i, j in pairs])
    read = image_reader(page, run, name, data_dir)
    predictions = run.rows(f"predictions_{name}.csv") if read else []
    examples = []
    for i, j in pairs[:6]:
        paths = [row["path"] for row in predictions
                 if row["label"] == classes[i] and row["tuned"] == classes[j]]
        images = [image for path in paths[:8] if (image := read(path))][:4]
        if images:
            examples.append((f"{classes[i]}, taken for {classes[j]}", images))
    page.add(f"Worst pairs: {name}", table, draw_sheet(page, f"pairs_{name}.png", examples))


def draw_sheet(page, file, rows):
    """Rows of images with a title each -> HTML; "" for no rows. rows: [(title, [PIL image])]."""
    if not rows:
        return ""
    across = max(len(images) for _, images in rows)
    figure, axes = page.plot.subplots(len(rows), across, squeeze=False, layout="constrained",
                                      figsize=(1.3 * across + 2, 1.6 * len(rows)))
    for axis in axes.flat:
        axis.axis("off")
    for line, (title, images) in zip(axes, rows):
        line[0].set_title(title, loc="left", fontsize=8)
        for axis, image in zip(line, images):
            axis.imshow(ImageOps.fit(image, (128, 128)))
    return page.figure(file, figure, "example images")


def image_reader(page, run, name, data_dir):
    """A function path -> PIL image or None, which looks where the run found its data; or None."""
    try:
        from data import open_dataset  # torch comes with it: only when images are wanted
        data = run.config["data"] if name in ("test", "base", "new") else name
        images = open_dataset(data, "test", data_dir=data_dir or run.config.get("data_dir", "data"),
                              download=False)
    except Exception as error:  # whatever it is, a report without photographs is still a report
        page.notes.append(f"example images are left out: {error}")
        return None

    def read(path):
        try:
            return images.store.image(path).convert("RGB")
        except Exception:
            return None
    return read


# -----------------------------------------------------------------------------
# A plan of stages: matrix, maps of the embeddings, texts that gained and lost

def add_matrix(page, run):
    """R@1 of every row of weights on every test set, coloured by the change from the first row."""
    rows = run.results.get("rows")
    if not isinstance(rows, list) or not rows:
        return
    sets = list(rows[0]["sets"])
    r1 = np.array([[row["sets"][name]["r1"] for name in sets] for row in rows])
    figure, axis = page.plot.subplots(figsize=(1.4 * len(sets) + 3, 0.45 * len(rows) + 1.2),
                                      layout="constrained")
    change = r1 - r1[0]
    most = max(5.0, np.abs(change).max())
    # Purple to green: lost against gained, which red and green would hide from many readers.
    shown = axis.imshow(change, cmap="PRGn", vmin=-most, vmax=most, aspect="auto")
    figure.colorbar(shown, label="points above the first row")
    for i, row in enumerate(rows):
        for j, name in enumerate(sets):
            low, high = row["sets"][name]["interval"]["r1"]
            axis.text(j, i, f"{r1[i, j]:.1f}\n{low:.1f} to {high:.1f}", ha="center", va="center",
                      fontsize=7, weight="bold" if row.get("stage") == name else "normal")
    axis.set_xticks(range(len(sets)), sets)
    axis.set_yticks(range(len(rows)), [row["row"] for row in rows])
    page.add("Learned and forgotten", page.figure("matrix.png", figure, "R@1 of weights on sets"),
             "<p class='soft'>R@1, mean of both directions (%), with its 95 % interval. Bold: the "
             "set that the row's stage was trained on.</p>")
    plan = run.read("plan.json", json.loads) or {}
    for stage in plan.get("stages", []):
        part = Run(run.folder / stage["name"])
        if part.records:
            add_curves(page, [part], f"Stage {stage['name']}", f"curves_{stage['name']}.png")


def load_embeddings(run):
    """What `tools.search --embeddings` kept: {set: (metadata, {row: (images, texts)})}."""
    found = {}
    for row in run.results.get("rows") or []:
        for name in row["sets"]:
            folder = run.folder / "embeddings" / row["row"] / name
            if (folder / "metadata.json").is_file():
                facts = json.loads((folder / "metadata.json").read_text("utf-8"))
                arrays = [np.load(folder / f"{side}_emb.npy", allow_pickle=False)
                          for side in ("img", "text")]
                found.setdefault(name, (facts, {}))[1][row["row"]] = arrays
    return found


def add_maps(page, found):
    """Images and their texts of all sets in two dimensions, one fit over all rows of weights."""
    rows = list(next(iter(found.values()))[1])
    points, sides, names, of_row = [], [], [], []
    for row in rows:
        for name, (facts, arrays) in found.items():
            images, texts = arrays[row]
            pairs = [pair for pair in facts["relevant"] if np.isfinite(images[pair[1]]).all()]
            pairs = pairs[::max(1, len(pairs) // MAP_POINTS)]
            for side, chosen in (("image", images[[i for _, i in pairs]]),
                                 ("text", texts[[t for t, _ in pairs]])):
                points.append(chosen)
                sides += [side] * len(chosen)
                names += [name] * len(chosen)
                of_row += [row] * len(chosen)
    points = np.concatenate(points)
    centred = points - points.mean(axis=0)
    axes = np.linalg.svd(centred, full_matrices=False)[2]
    maps = {"PCA": centred @ axes[:2].T}
    try:
        from sklearn.manifold import TSNE
        maps["t-SNE"] = TSNE(init="pca", random_state=0, perplexity=min(
            30, (len(points) - 1) / 3)).fit_transform(points)
    except ImportError:
        page.notes.append("scikit-learn is not installed: the t-SNE map is left out")
    sides, names, of_row = np.array(sides), np.array(names), np.array(of_row)
    blocks = []
    for title, places in maps.items():
        figure, panels = page.plot.subplots(1, len(rows), squeeze=False, sharex=True, sharey=True,
                                            figsize=(3.6 * len(rows), 3.6), layout="constrained")
        for axis, row in zip(panels.flat, rows):
            for name, colour in zip(found, PALETTE * len(found)):
                for side, mark in (("image", "o"), ("text", "s")):
                    chosen = (of_row == row) & (names == name) & (sides == side)
                    axis.scatter(*places[chosen].T, s=7, marker=mark, color=colour, alpha=0.5,
                                 label=f"{name}, {side}s" if axis is panels[0, 0] else None)
            axis.set(title=row, xticks=[], yticks=[])
        figure.legend(loc="outside lower center", ncols=4, fontsize=7, frameon=False)
        blocks.append(page.figure(f"map_{title.lower()}.png", figure, f"{title} of embeddings"))
    page.add("Maps of the embeddings", *blocks)


def add_cases(page, found, most=4):
    """Texts whose first right image rose and fell most from the first row of weights to the last;
    any image that belongs to the text counts as right."""
    table = []
    for name, (facts, arrays) in found.items():
        rows, right = list(arrays), {}
        for text, image in facts["relevant"]:
            right.setdefault(text, []).append(image)
        ranks = {}
        for row in (rows[0], rows[-1]):
            images, texts = arrays[row]
            cosines = np.nan_to_num(texts @ images.T, nan=-1.0)       # (texts, images)
            ranks[row] = {text: 1 + int((cosines[text] > cosines[text, own].max()).sum())
                          for text, own in right.items()}
        before, after = ranks[rows[0]], ranks[rows[-1]]
        order = sorted(right, key=lambda text: after[text] - before[text])
        table += [[name, facts["texts"][text], before[text], after[text]]
                  for text in dict.fromkeys([*order[:most], *order[-most:]])
                  if after[text] != before[text]]
    page.add("Texts that gained and lost most", page.table(
        ["set", "text", "rank before the first stage", "rank after the last"], table)
        if table else "")


# -----------------------------------------------------------------------------

def build(runs, out, plot, notes, data_dir=None):
    """All figures and the page -> the page's path."""
    page, last = Page(out, plot, notes), runs[-1]
    add_results(page, runs)
    departures = last.results.get("departures")
    if isinstance(departures, list) and departures:
        page.add("Departures from the published recipe", "<ul>" + "".join(
            f"<li>{html.escape(str(line))}</li>" for line in departures) + "</ul>")
    add_shots(page, runs)
    add_curves(page, runs)
    add_matrix(page, last)
    embeddings = load_embeddings(last)
    if embeddings:
        add_maps(page, embeddings)
        add_cases(page, embeddings)
    elif last.results.get("rows"):
        notes.append(f"no maps: `python -m tools.search {last.folder} --embeddings` keeps "
                     "what they need")
    for name in last.test_sets():
        add_classes(page, last, name, data_dir)
    notes += [f"{run.name}: {note}" for run in runs for note in run.notes]
    words = [str(last.fact(key)) for key in ("method", "data", "model") if last.fact(key)]
    return page.write(" · ".join(words) or last.name)


def get_args(argv=None):
    parser = argparse.ArgumentParser(allow_abbrev=False, prog="python -m tools.report",
                                     description="Draw runs: one HTML page and its figures.")
    parser.add_argument("runs", nargs="+", metavar="RUN",
                        help="a run's folder, or a folder of runs")
    parser.add_argument("--out", metavar="DIR", help="default: report/ in the first RUN")
    parser.add_argument("--data-dir", metavar="DIR", help="where data sets lie, for example images")
    parser.add_argument("--font", metavar="FILE", help="a font for names that need it")
    parser.error = lambda message: parser.exit(2, f"error: {message} (--help lists the flags)\n")
    return parser.parse_args(argv)


def main(argv=None):
    """Returns the exit code: 0, or 2 after one line on stderr."""
    args = get_args(argv)
    try:
        plot, notes = open_matplotlib(args.font)
        runs = find_runs(args.runs)
        out = pathlib.Path(args.out or pathlib.Path(args.runs[0]) / "report")
        out.mkdir(parents=True, exist_ok=True)
        print(build(runs, out, plot, notes, args.data_dir))
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
