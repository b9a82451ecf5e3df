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
import base64
import html
import io
import json
import math
import pathlib
import re
import statistics
import sys
import warnings

from device import guard, one_line, Parser, UserError, write_atomic  # before torch
import numpy as np
import torch

from files import refuse_unusable
from scores import retrieval_ranks
from weights import read_json

# Okabe and Ito's colours, which colour-blind readers can tell apart.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9")
BLUE, ORANGE, GREEN = PALETTE[:3]
CHINESE = "CJK|PingFang|Hiragino Sans GB|YaHei|SimHei|WenQuanYi"  # in the names of fonts with it
NOT_DRAWN = ("step", "steps", "epoch", "time", "samples_per_second", "data_wait", "memory_mb")
MOST_CLASSES = 100  # a confusion matrix of more classes has cells too small to see
MAP_POINTS = 400    # of each set


def open_matplotlib(font=None):
    """pyplot without a window, with a font for Chinese if there is one -> (pyplot, notes)."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import font_manager, pyplot
    except ImportError:
        raise UserError("matplotlib draws the figures and is not installed: "
                        "pip install matplotlib") from None
    families, notes = ["DejaVu Sans"], []  # matplotlib's own
    if font:
        try:
            font_manager.fontManager.addfont(font)
            families.append(font_manager.FontProperties(fname=font).get_name())
        except (OSError, RuntimeError) as error:
            raise UserError(f"--font {font} cannot be read ({one_line(error)})") from None
    installed = sorted({entry.name for entry in font_manager.fontManager.ttflist})
    families += [name for name in installed if re.search(CHINESE, name)][:1]
    if len(families) == 1:
        notes.append("no font for Chinese is installed: figures show boxes for it, and the page "
                     "has the words; --font FILE names one")
    warnings.filterwarnings("ignore", message="Glyph")  # said once, in that note
    pyplot.rcParams.update({
        "font.family": families, "font.size": 9, "axes.spines.top": False, "figure.dpi": 110,
        "axes.spines.right": False, "figure.constrained_layout.use": True, "legend.frameon": False})
    return pyplot, notes


# -----------------------------------------------------------------------------
# What a run left in its folder

class Run:
    """What a run left in its folder; `notes` says what is missing."""

    def __init__(self, folder):
        self.folder, self.name, self.notes = folder, folder.resolve().name, []
        self.results, self.config = (read_json(folder / f"{x}.json") for x in ("results", "config"))
        self.records, log = [], folder / "metrics.jsonl"
        for line in log.read_text("utf-8", "replace").splitlines() if log.is_file() else ():
            try:
                record = json.loads(line)
                self.records.append((record["step"], record))
            except (ValueError, KeyError, TypeError):  # a line that a kill cut off
                self.notes.append("metrics.jsonl has a broken line, which is left out")
        if not self.results:
            self.notes.append("the run is not finished (no results.json)")

    def curves(self):
        """{(scalar, split): (steps, values)}. A value that is not finite leaves a gap."""
        found, gaps = {}, 0
        for step, record in self.records:
            for name, value in record.items():
                if value in ("nan", "inf", "-inf"):  # so are they written
                    value, gaps = math.nan, gaps + 1
                if isinstance(value, (int, float)) and name not in NOT_DRAWN:
                    key = name, record.get("split", "train")
                    steps, values = found.setdefault(key, ([], []))
                    steps.append(step)
                    values.append(value)
        if gaps:
            self.notes.append(f"{gaps} logged values are not finite: the curves have gaps there")
        return found


def find_runs(paths):
    """The runs in the folders given, each a run, a plan of stages, or a folder of runs."""
    runs = []
    for path in map(pathlib.Path, paths):
        if not path.is_dir():
            raise UserError(f"{path} is not a folder; give the output folder of a run")
        found = [path]
        if not (path / "plan.json").is_file() and not (path / "metrics.jsonl").is_file():
            found = sorted(file.parent for file in path.glob("*/metrics.jsonl"))
        if not found:
            raise UserError(f"{path} holds no run: no metrics.jsonl in it or in its folders")
        runs += map(Run, found)
    return runs


# -----------------------------------------------------------------------------
# The page

STYLE = """:root{color-scheme:light dark}img{max-width:100%}.soft{opacity:.7}
body{font:15px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em}
table{border-collapse:collapse;display:block;overflow-x:auto}
td,th{padding:.2em .8em;border-bottom:1px solid #8886;text-align:left}
figure{margin:1em 0;background:#fff;text-align:center}"""


class Page:
    """Collects the sections of report.html; its figures are written beside it as PNG files too."""

    def __init__(self, out, plot, notes):
        self.out, self.plot, self.notes, self.parts = out, plot, notes, []

    def add(self, title, *blocks):
        self.parts.append(f"<h2>{html.escape(title)}</h2>\n" + "\n".join(blocks))

    def figure(self, name, figure, description):
        """Write a matplotlib figure and close it -> its HTML."""
        drawn = io.BytesIO()
        figure.savefig(drawn, bbox_inches="tight")
        self.plot.close(figure)
        write_atomic(self.out / f"{name}.png", drawn.getvalue())
        code = base64.b64encode(drawn.getvalue()).decode()
        return (f'<figure><img alt="{html.escape(description)}" '
                f'src="data:image/png;base64,{code}"></figure>')

    def write(self, title):
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in dict.fromkeys(self.notes))
        notes = [f"<h2>Notes</h2><ul class='soft'>{notes}</ul>"] if notes else []
        return write_html(self.out / "report.html", title, [*self.parts, *notes])


def write_html(path, title, parts):
    content = "\n".join([
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>", *parts, "</body></html>"])
    write_atomic(path, content.encode("utf-8", "xmlcharrefreplace"))
    return path


def table(head, rows):
    """HTML of a table. A cell is a number, a text or None."""
    def cell(value):
        if isinstance(value, float):
            value = "" if math.isnan(value) else f"{value:.4g}"
        return html.escape("" if value is None else str(value))

    def line(values, tag):
        return "<tr>" + "".join(f"<{tag}>{cell(value)}</{tag}>" for value in values) + "</tr>"
    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


# -----------------------------------------------------------------------------
# Any run: results and curves

def add_results(page, runs):
    """One run: a line for each of its numbers; several: a line for each run, of what differs."""
    lines = [["", *(run.name for run in runs)]]
    for key in dict.fromkeys(key for run in runs for key in run.results):
        values = [run.results.get(key, "") for run in runs]
        scalars = all(isinstance(value, (str, int, float)) for value in values)
        if scalars and (len(runs) == 1 or len(set(values)) > 1):
            lines.append([key, *values])
    head, *rows = lines if len(runs) == 1 else zip(*lines)
    page.add("Results", table(head, rows))


def add_curves(page, runs, title="Curves", file="curves"):
    """A panel for each logged scalar: the train split as a line, others as dots; colours by run,
    or by split where there is one run."""
    panels = {}
    for run in runs:
        for (name, split), line in run.curves().items():
            label = run.name if len(runs) > 1 else split
            panels.setdefault(name, []).append((label, split == "train", *line))
    if not panels:
        return
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure, axes = page.plot.subplots(down, across, squeeze=False,
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
    figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=4)
    page.add(title, page.figure(file, figure, "logged scalars over steps"))


# -----------------------------------------------------------------------------
# Few-shot runs: accuracy over shots, classes, confusion

def add_shots(page, runs):
    """Accuracy over training images per class, mean and standard deviation over seeds, beside the
    linear probe on the same images and zero-shot."""
    of_shots = {}  # shots: the results of runs
    for found in (run.results for run in runs):
        if isinstance(found.get("shots"), int) and isinstance(found.get("accuracy"), float):
            of_shots.setdefault(found["shots"], []).append(found)
    shots = sorted(of_shots)
    if len(shots) < 2:
        return
    alike = [{name: value for name, value in found.get("identity", {}).items()
              if name not in ("shots", "seed", "shots_sha256")}
             for some in of_shots.values() for found in some]
    if any(other != alike[0] for other in alike):
        page.notes.append("no accuracy over shots: the runs differ in more than shots and seed")
        return
    rows = {count: [count, len(of_shots[count])] for count in shots}
    figure, axis = page.plot.subplots(figsize=(6, 3.6))
    for key, label, colour in (("accuracy", "tuned", BLUE),
                               ("linear_probe_accuracy", "linear probe", GREEN),
                               ("zero_shot_accuracy", "zero-shot", ORANGE)):
        for count, row in rows.items():
            values = [found.get(key) for found in of_shots[count]]
            values = [value for value in values if isinstance(value, float)] or [math.nan]
            row += [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0]
        mean, std = zip(*(row[-2:] for row in rows.values()))
        axis.errorbar(shots, mean, yerr=std, fmt="o-", color=colour, capsize=3, label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(shots, map(str, shots))
    axis.set(xlabel="training images per class", ylabel="accuracy (%)")
    axis.legend()
    page.add("Accuracy over shots", page.figure("shots", figure, "accuracy over shots"),
             table(["shots", "runs", "tuned", "std", "linear probe", "std", "zero-shot", "std"],
                   rows.values()))


def add_classes(page, run, name):
    """Of one test set: accuracy per class by what it gained, confusion matrix and worst pairs."""
    confusion = read_json(run.folder / f"confusion_{name}.json")
    if not confusion:
        return
    classes, counts = confusion["classes"], np.asarray(confusion["tuned"], dtype=float)
    images = counts.sum(axis=1)
    before, after = (100 * np.diagonal(confusion[key]) / np.maximum(1, images)
                     for key in ("zero_shot", "tuned"))
    page.add(f"Accuracy per class: {name}", table(
        ["class", "images", "zero-shot (%)", "tuned (%)", "gained"],
        [[classes[i], int(images[i]), before[i], after[i], after[i] - before[i]]
         for i in np.argsort(before - after, kind="stable") if images[i]]))
    if len(classes) <= MOST_CLASSES:
        size = 3 + 0.16 * len(classes)
        figure, axis = page.plot.subplots(figsize=(size + 1, size))
        axis.imshow(counts / np.maximum(1, images)[:, None], cmap="Blues", vmin=0, vmax=1)
        axis.set_xticks(range(len(classes)), classes, rotation=90)
        axis.set_yticks(range(len(classes)), classes)
        axis.set(xlabel="predicted", ylabel="true")
        page.add(f"Confusion: {name}", page.figure(
            f"confusion_{name}", figure, "confusion matrix, rows in shares of the true class"))
    wrong = counts * ~np.eye(len(classes), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:10]
    rows, columns = np.unravel_index(order, wrong.shape)
    worst = [(i, j) for i, j in zip(rows, columns) if wrong[i, j]]
    if worst:
        page.add(f"Worst pairs: {name}", table(
            ["true class", "taken for", "images", "of the class (%)"],
            [[classes[i], classes[j], int(wrong[i, j]), 100 * wrong[i, j] / images[i]]
             for i, j in worst]))


# -----------------------------------------------------------------------------
# A plan of stages: matrix, maps of the embeddings, texts that gained and lost

def add_matrix(page, run):
    """R@1 of every row of weights on every test set, coloured by the change from the first row."""
    rows = run.results.get("rows")
    if not rows:
        return
    sets = list(rows[0]["sets"])
    r1 = np.array([[row["sets"][name]["r1"] for name in sets] for row in rows])
    figure, axis = page.plot.subplots(figsize=(1.4 * len(sets) + 3, 0.45 * len(rows) + 1.2))
    change = r1 - r1[0]
    most = max(5.0, 1.5 * np.abs(change).max())  # so that no cell gets too dark for its text
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
    page.add("Learned and forgotten", page.figure("matrix", figure, "R@1 of weights on sets"),
             "<p class='soft'>R@1, mean of both directions (%), with its 95 % interval. Bold: the "
             "set that the row's stage was trained on.</p>")
    for stage in read_json(run.folder / "plan.json").get("stages", []):
        add_curves(page, [Run(run.folder / stage["name"])], f"Stage {stage['name']}",
                   f"curves_{stage['name']}")


def load_embeddings(run):
    """What `tools.search --embeddings` kept: {set: (metadata, {row: (images, texts)})}."""
    found = {}
    for row in run.results.get("rows") or []:
        for name in row["sets"]:
            folder = run.folder / "embeddings" / row["row"] / name
            facts = read_json(folder / "metadata.json")
            if facts:
                _, of_rows = found.setdefault(name, (facts, {}))
                of_rows[row["row"]] = [np.load(folder / f"{side}_emb.npy")
                                       for side in ("img", "text")]
    return found


def add_maps(page, found):
    """Images and their texts of all sets in two dimensions, one fit over all rows of weights."""
    parts = {}  # (row, set, side) -> features
    for name, (facts, of_rows) in found.items():
        for row, (images, texts) in of_rows.items():
            pairs = [(text, image) for text, image in facts["relevant"]
                     if np.isfinite(images[image]).all()]
            pairs = pairs[::max(1, len(pairs) // MAP_POINTS)]
            parts[row, name, "images"] = images[[image for _, image in pairs]]
            parts[row, name, "texts"] = texts[[text for text, _ in pairs]]
    points = np.concatenate(list(parts.values()))
    centred = points - points.mean(axis=0)
    maps = {"PCA": centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T}
    try:
        from sklearn.manifold import TSNE
        maps["t-SNE"] = TSNE(init="pca", random_state=0, perplexity=min(
            30, (len(points) - 1) / 3)).fit_transform(points)
    except ImportError:
        page.notes.append("scikit-learn is not installed: the t-SNE map is left out")
    rows = list(dict.fromkeys(row for row, _, _ in parts))
    ends = np.cumsum([len(part) for part in parts.values()])
    colours, blocks = dict(zip(found, PALETTE * len(found))), []
    for title, places in maps.items():
        figure, panels = page.plot.subplots(1, len(rows), squeeze=False, sharex=True, sharey=True,
                                            figsize=(3.6 * len(rows), 3.6))
        for (row, name, side), dots in zip(parts, np.split(places, ends[:-1])):
            panel = panels[0, rows.index(row)]
            panel.scatter(*dots.T, s=7, marker="o" if side == "images" else "s", alpha=0.5,
                          color=colours[name], label=f"{name}, {side}" if row == rows[0] else None)
            panel.set(title=row, xticks=[], yticks=[])
        figure.legend(loc="outside lower center", ncols=4, fontsize=7)
        blocks.append(page.figure(f"map_{title.lower()}", figure, f"{title} of embeddings"))
    page.add("Maps of the embeddings", *blocks)


def add_moves(page, found, most=4):
    """The texts whose first right image rose and fell most, from the first row of weights to the
    last."""
    rows = []
    for name, (facts, of_rows) in found.items():
        features = list(of_rows.values())
        before, after = (retrieval_ranks(*map(torch.from_numpy, arrays), facts["relevant"])["t2i"]
                         for arrays in (features[0], features[-1]))
        order = np.argsort(after - before, kind="stable").tolist()
        rows += [[name, facts["texts"][text], 1 + before[text], 1 + after[text]]
                 for text in dict.fromkeys([*order[:most], *order[-most:]])
                 if after[text] != before[text]]
    if rows:
        page.add("Texts that gained and lost most", table(
            ["set", "text", "rank before the first stage", "rank after the last"], rows))


# -----------------------------------------------------------------------------

def main(args):
    plot, notes = open_matplotlib(args.font)
    runs = find_runs(args.runs)
    out = pathlib.Path(args.out or pathlib.Path(args.runs[0]) / "report")
    refuse_unusable(out, "--out")
    page, last = Page(out, plot, notes), runs[-1]
    add_results(page, runs)
    if departures := last.results.get("departures"):
        page.add("Departures from the published recipe",
                 table([""], [[line] for line in departures]))
    add_shots(page, runs)
    add_curves(page, runs)
    add_matrix(page, last)
    if embeddings := load_embeddings(last):
        add_maps(page, embeddings)
        add_moves(page, embeddings)
    elif last.results.get("rows"):
        notes.append(f"no maps: `python -m tools.search {last.folder} --embeddings` keeps "
                     "what they need")
    for file in sorted(last.folder.glob("confusion_*.json")):
        add_classes(page, last, file.stem.removeprefix("confusion_"))
    notes += [f"{run.name}: {note}" for run in runs for note in run.notes]
    facts = {**last.config, **last.results}
    words = [str(facts[key]) for key in ("method", "data", "model") if facts.get(key)]
    print(page.write(" · ".join(words) or last.name))


def get_args(argv=None):
    parser = Parser(prog="python -m tools.report",
                    description="Draw runs: one HTML page and its figures.")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run's folder, or a folder of runs")
    add("--out", metavar="DIR", help="default: report/ in the first RUN")
    add("--font", metavar="FILE", help="a font for names that need it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(guard(main, get_args))
