"""report.py: pictures are opened and looked at, pages are searched, bad runs are refused."""
import csv
import html.parser
import io
import json
import math
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import report

ROOT = pathlib.Path(__file__).resolve().parent.parent


def lines(folder, *records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), "utf-8")
    return folder


def make_run(folder, classes=("cat", "dog", "owl"), shots=4, seed=1, accuracy=80.0, counts=None,
             train=None, target="test"):
    """A finished run written by hand, as train_clipfit.py leaves it."""
    train = train or [(5, 2.0), (10, 1.0), (15, 0.5)]
    lines(folder, {"step": 0, "split": f"zero-shot {target}", "accuracy": 50.0},
          *({"step": step, "epoch": 1, "split": "train", "loss": loss, "lr": 0.01 / step,
             "samples_per_second": 100.0, "data_wait": 0.1, "memory_mb": 500.0, "time": 1.0}
            for step, loss in train), {"step": 15, "split": f"test {target}", "accuracy": accuracy})
    n = len(classes)
    if counts is None:
        counts = np.eye(n, dtype=int) * 8 + 1
    facts = {"method": "clipfit", "data": "nowhere", "model": "tiny", "shots": shots, "seed": seed}
    (folder / "results.json").write_text(json.dumps({
        **facts, "accuracy": accuracy, "zero_shot_accuracy": 50.0, "images": {target: 10},
        "departures": ["--lr 1 (official <2>)"], "seconds": 3.0, "identity": facts}), "utf-8")
    (folder / "config.json").write_text(json.dumps({
        "data": "nowhere", "shots": [shots], "seed": [seed], "identity": facts}), "utf-8")
    (folder / f"confusion_{target}.json").write_text(json.dumps({
        "classes": list(classes), "tuned": np.asarray(counts).tolist()}), "utf-8")
    with open(folder / f"per_class_{target}.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("class", "images", "zero_shot", "tuned"), *(
            (name, 10, 50.0, 100.0 * (i + 1) / n) for i, name in enumerate(classes))])
    return folder


def draw(*folders, code=0):
    out = folders[0] / "report"
    assert report.main([str(f) for f in folders]) == code
    return (out / "report.html").read_text("utf-8")


def pixel(image, x, y):
    return tuple(np.asarray(image)[round(y * report.SCALE), round(x * report.SCALE)].tolist())


def near(a, b, by=60):
    return np.abs(np.subtract(a, b)).max() < by


def opened(canvas):
    return Image.open(io.BytesIO(canvas.png()))


def check_labels(canvas):
    """Every text lies inside the picture and none lies on another."""
    width, height = canvas.size
    for text, x0, y0, x1, y1 in canvas.boxes:
        assert -0.5 <= x0 and x1 <= width + 0.5 and -0.5 <= y0 and y1 <= height + 0.5, text
    for i, (a, ax0, ay0, ax1, ay1) in enumerate(canvas.boxes):
        for b, bx0, by0, bx1, by1 in canvas.boxes[:i]:
            assert ax1 <= bx0 + .5 or bx1 <= ax0 + .5 or ay1 <= by0 + .5 or by1 <= ay0 + .5, (a, b)


@pytest.fixture
def canvases(monkeypatch):
    """Every canvas that reaches a page."""
    seen, figure = {}, report.Page.figure

    def spy(page, name, canvas, alt):
        if canvas:
            seen[name] = canvas
        return figure(page, name, canvas, alt)
    monkeypatch.setattr(report.Page, "figure", spy)
    return seen


def test_a_curve_passes_through_its_values():
    canvas = report.Canvas(480, 300, report.Fonts())
    x, y = [0, 10, 20], [1.0, 3.0, 2.0]
    to_x, to_y = report.plot(canvas, (0, 0, 480, 300), [
        {"label": "loss", "x": x, "y": y, "colour": report.BLUE, "line": True},
        {"label": "val", "x": [20], "y": [2.5], "colour": report.ORANGE, "shape": 0}], "loss")
    image = opened(canvas)
    for a, b in [*zip(x[1:2], y[1:2]), (5, 2.0), (15, 2.5)]:
        assert near(pixel(image, to_x(a), to_y(b)), report.BLUE)
    assert pixel(image, to_x(20), to_y(2.5)) == report.ORANGE
    assert pixel(image, to_x(5), to_y(2.8)) == report.WHITE
    assert to_y(3) < to_y(2) < to_y(1) and to_x(0) < to_x(10)
    check_labels(canvas)


def test_values_that_are_not_finite_leave_a_gap_and_a_tick(tmp_path, canvases):
    nan, canvas = float("nan"), report.Canvas(480, 300, report.Fonts())
    to_x, to_y = report.plot(canvas, (0, 0, 480, 300), [{
        "label": "loss", "x": [0, 1, 2, 3, 4], "y": [1, 1, nan, 1, 1], "colour": report.BLUE,
        "line": True}], "loss")
    image = opened(canvas)
    assert near(pixel(image, to_x(.5), to_y(1)), report.BLUE)
    assert not near(pixel(image, to_x(1.6), to_y(1)), report.BLUE)
    assert not near(pixel(image, to_x(2.4), to_y(1)), report.BLUE)
    assert any(near(pixel(image, to_x(2), y), report.RED) for y in range(200, 300))
    run = make_run(tmp_path / "run", train=[(5, 1.0), (10, nan), (15, float("inf")), (20, 1e308)])
    draw(run)
    lines(run, {"step": 1, "loss": None})  # nothing but what cannot be drawn
    draw(run)


@pytest.mark.parametrize("low, high", [(0, 1), (-0.3, 0.4), (1e-5, 9e-5), (12, 90000), (-5, -1),
                                       (99.97, 99.99), (0, 3e7), (1e20, 5e20)])
def test_ticks_are_round_and_few_and_zero_has_no_sign(low, high):
    values = report.ticks(low, high)
    labels = report.tick_labels(values)
    assert 2 <= len(values) <= 13 and len(set(labels)) == len(labels)
    assert all(low - 1e-9 * abs(low) <= v <= high + 1e-9 * abs(high) for v in values)
    assert "-0" not in labels and max(map(len, labels)) <= 8
    back = [float(t.translate({ord(c): p for c, p in zip("kMG", ("e3", "e6", "e9"))}))
            for t in labels]
    assert back == pytest.approx(values, rel=1e-3, abs=1e-12)


def test_log_axes_take_powers_of_ten():
    assert report.ticks(0.002, 300, log=True) == pytest.approx([0.01, 0.1, 1, 10, 100])


def test_bars_are_as_long_as_their_values_and_sorted_by_gain():
    canvas = report.draw_bars([(0, "low", 10.0, 20.0), (1, "high", 20.0, 90.0),
                               (2, "fell", 60.0, 40.0)], report.Fonts())
    image = np.asarray(opened(canvas)).astype(int)
    y = {text: (y0 + y1) / 2 for text, _, y0, _, y1 in canvas.boxes}
    assert y["high"] < y["low"] < y["fell"] and {"+70.0", "+10.0", "-20.0"} <= set(y)

    def length(name, colour, shift):
        row = image[round((y[name] + shift) * report.SCALE)]
        return (np.abs(row - colour).max(axis=1) < 12).sum()
    tuned = {name: length(name, report.BLUE, 3.5) for name in ("low", "high", "fell")}
    assert tuned["high"] / tuned["low"] == pytest.approx(4.5, rel=.02)
    assert tuned["fell"] / tuned["low"] == pytest.approx(2.0, rel=.02)
    assert length("fell", report.GREY, -3.5) / tuned["fell"] == pytest.approx(1.5, rel=.02)
    check_labels(canvas)


def test_the_diagonal_of_a_good_confusion_is_darkest_and_wrong_cells_differ_in_hue():
    canvas = report.draw_confusion(["a", "b"], np.array([[9., 1], [5, 5]]), report.Fonts())
    image = np.asarray(opened(canvas)).astype(int)
    spots = {text: ((x0 + x1) / 2, (y0 + y1) / 2) for text, x0, y0, x1, y1 in canvas.boxes}

    def colour(x, y):  # beside the number, inside the cell
        return image[round((y - 15) * report.SCALE), round((x - 15) * report.SCALE)]
    right, wrong = colour(*spots["9"]), colour(*spots["1"])
    assert right.sum() < wrong.sum() and right[2] > right[0] and wrong[0] > wrong[2]


@pytest.mark.parametrize("names", [
    ["only one"], [f"texture{i}" for i in range(47)], [f"species {i}" for i in range(200)],
    ["棉花", "森林", "plain"], ["a very long name " * 20, "W" * 300, "\n\t\x00", ""]],
    ids=["1", "47", "200", "chinese", "long"])
def test_labels_fit_whatever_the_classes(tmp_path, canvases, names):
    n = len(names)
    counts = np.eye(n, dtype=int) * 20
    counts[0, -1] = 3
    page = draw(make_run(tmp_path / "run", names, counts=counts))
    assert {"curves.png", "per_class_test.png", "confusion_test.png"} <= set(canvases)
    for canvas in canvases.values():
        check_labels(canvas)
    texts = [box[0] for box in canvases["confusion_test.png"].boxes]
    if n >= 47:
        assert "20" not in texts and ("3" in texts) == (n == 47)


def test_names_no_font_can_write_become_numbers_with_a_legend(tmp_path, canvases, monkeypatch):
    monkeypatch.setattr(report, "SYSTEM", ("no such font.ttf",))
    page = draw(make_run(tmp_path / "run", ["棉花", "plain", "森林"]))
    texts = [box[0] for box in canvases["confusion_test.png"].boxes]
    assert {"#0", "plain", "#2"} <= set(texts) and "棉花" in page
    assert (tmp_path / "run" / "report" / "classes.txt").read_text("utf-8") == "#0\t棉花\n#2\t森林\n"


def test_a_thousand_classes_have_no_matrix_but_pairs(tmp_path, canvases):
    counts = np.eye(1000, dtype=int) * 50
    counts[3, 7] = 40
    page = draw(make_run(tmp_path / "run", [f"n{i:04}" for i in range(1000)], counts=counts))
    assert "confusion_test.png" not in canvases and "too many for a matrix" in page
    assert re.search(r"<td>n0003</td><td>n0007</td><td class=\"n\">40</td>", page)


def test_pairs_show_images_where_the_data_is(tmp_path, canvases):
    data = tmp_path / "data"
    for name, colour in (("red", (250, 0, 0)), ("green", (0, 250, 0))):
        for split in ("train", "test"):
            (data / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (20, 30), colour).save(data / split / name / f"{i}.png")
    run = make_run(tmp_path / "run", ("red", "green"), counts=[[1, 1], [0, 2]])
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "data": str(data)}))
    (run / "predictions_test.csv").write_text(
        "path,label,zero_shot,tuned\ntest/red/0.png,red,red,green\ntest/red/1.png,red,red,red\n"
        "test/green/0.png,green,green,green\ntest/green/9.png,green,green,green\n")
    page = draw(run)
    assert "left out" not in page
    colours = {c for _, c in opened(canvases["pairs_test.png"]).getcolors(1 << 20)}
    for colour in ((250, 0, 0), (0, 250, 0), report.RED, report.BLUE):
        assert any(near(colour, c, 5) for c in colours), colour
    (run / "config.json").write_text(json.dumps(config))
    assert "example images are left out" in draw(run)


def test_several_runs_and_their_parent_give_means_with_error_bars(tmp_path, canvases):
    scores = {(1, 1): 50.0, (1, 2): 54.0, (4, 1): 60.0, (4, 2): 61.0, (16, 1): 70.0}
    runs = [make_run(tmp_path / "all" / f"shots{s}_seed{k}", shots=s, seed=k, accuracy=a)
            for (s, k), a in scores.items()]
    page = draw(tmp_path / "all")
    assert draw(*runs) and report.find_runs([tmp_path / "all"])[0][-1].facts["shots"] == 16
    (tmp_path / "all/cache").mkdir()
    assert len(report.find_runs([tmp_path / "all/cache", *runs])[0]) == len(runs)
    assert '<td class="n">52.00</td><td class="n">2.83</td>' in page  # mean, std of 50 and 54
    table = report.by_shots(report.find_runs(runs)[0])
    assert list(table) == ["all runs"] and list(table["all runs"]) == [1, 4, 16]
    canvas = canvases["shots.png"]
    check_labels(canvas)
    assert {"1", "4", "16", "zero-shot"} <= {box[0] for box in canvas.boxes}
    (tmp_path / "all" / "results.json").write_text('{"runs": []}')  # as the script leaves it
    (tmp_path / "all" / "shots9_seed1").mkdir()
    (tmp_path / "all" / "shots9_seed1" / "metrics.jsonl").write_text("")
    assert "shots9_seed1 is empty" in draw(tmp_path / "all")


def test_metrics_of_any_name_are_drawn_and_grouped(tmp_path, canvases):
    run = lines(tmp_path / "run", *({"step": s, "split": "train", "loss": 1 / s, "itc_loss": 2 / s,
                                     "logit_scale": 14.0} for s in range(1, 500)),
                *({"step": s, "split": "val", "i2t_r1": 10.0 + s / 50, "t2i_r5": 30.0, "note": "x",
                   "fine": True} for s in (100, 200)))
    figures = report.panels(report.find_runs([run])[0])
    assert set(figures) == {"loss", "logit scale", "image to text recall (%)",
                            "text to image recall (%)"}
    assert [s["line"] for s in figures["loss"]] == [True, True]
    assert [s["line"] for s in figures["text to image recall (%)"]] == [False]
    page = draw(run)
    check_labels(canvases["curves.png"])
    assert "not finished" in page and "step 499" in page


def test_a_contrastive_run_shows_its_loss_beside_ln_b_and_recalls_by_direction(tmp_path, canvases):
    run = lines(tmp_path / "run", *({"step": s, "split": "train", "loss": 5 / s, "infonce": 5 / s,
                                     "ln_batch": math.log(64)} for s in range(1, 99)),
                *({"step": s, "split": split, "loss": 3.0, **{f"{way}_r{k}": 5.0 * k + s / 50
                   for way in ("i2t", "t2i") for k in (1, 5, 10)}}
                  for s, split in ((50, "val"), (98, "val"), (98, "best on test"))))
    figures = report.panels(report.find_runs([run])[0])
    assert set(figures) == {"loss", "image to text recall (%)", "text to image recall (%)"}
    assert [s["label"] for s in figures["loss"]] == ["loss, train", "loss, val", "ln_batch, train"]
    assert [s["label"] for s in figures["image to text recall (%)"]] == [
        "i2t_r1", "i2t_r5", "i2t_r10"]
    assert len({s["colour"] for s in figures["image to text recall (%)"]}) == 3
    draw(run)
    check_labels(canvases["curves.png"])


def test_the_page_needs_nothing_from_outside_and_escapes_names(tmp_path):
    evil = "<script>alert('1')</script>"
    run = make_run(tmp_path / "run", (evil, '"><img src=x>', "c&d"))
    page = draw(run)
    assert "<script" not in page and "<img src=x" not in page and "&lt;script&gt;" in page
    assert "(official &lt;2&gt;)" in page
    tags = []
    parser = html.parser.HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(page)
    links = [a[key] for _, a in tags for key in ("src", "href", "srcset", "data") if key in a]
    assert len(links) >= 3 and all(x.startswith("data:image/png;base64,") for x in links)
    assert {tag for tag, _ in tags}.isdisjoint({"script", "link", "iframe", "object"})
    assert not re.search(r"https?://|@import|url\(", page)
    assert "prefers-color-scheme:dark" in page


def test_the_same_run_gives_the_same_bytes(tmp_path):
    run = make_run(tmp_path / "run")
    for out in "ab":
        assert report.main([str(run), "--out", str(tmp_path / out)]) == 0
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert len(files) >= 5
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_broken_files_are_skipped_counted_and_said(tmp_path):
    run = make_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 9\n\xff\xfe\n[1]\n{"step": "x"}\n{"loss": 1}\n\n')
    (run / "confusion_test.json").write_text('{"classes": ["a"], "tuned": [[1, 2]]}')
    (run / "per_class_test.csv").write_text("class,zero_shot,tuned\na,1\nb,nan,5\nc,x,5\n")
    page = draw(run)
    assert "5 broken lines skipped" in page and "confusion_test.json is left out" in page
    (run / "results.json").write_text("{")
    (run / "config.json").write_text("[]")
    page = draw(run)
    assert "results.json cannot be read" in page and "config.json cannot be read" in page


def test_a_single_record_is_enough(tmp_path, canvases):
    draw(lines(tmp_path / "run", {"step": 3, "split": "train", "loss": 0.0}))
    check_labels(canvases["curves.png"])


def test_errors_are_one_line_and_exit_code_2(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "metrics.jsonl").write_text("\n{\n")
    run = make_run(tmp_path / "run")
    (tmp_path / "file").write_text("x")
    for words in ([tmp_path / "empty"], [tmp_path / "blank"], [tmp_path / "none"],
                  [run, "--font", tmp_path / "file"], [run, "--out", tmp_path / "file"]):
        assert report.main(list(map(str, words))) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
    for words in ([], [str(run), "--fo", "x"]):  # no flag may be abbreviated
        with pytest.raises(SystemExit) as stop:
            report.main(words)
        assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_command_prints_the_path_of_the_page(tmp_path):
    run = lines(tmp_path / "run", {"step": 1, "split": "train", "loss": 1.0})
    done = subprocess.run([sys.executable, str(ROOT / "report.py"), str(run)], text=True,
                          capture_output=True)
    assert done.returncode == 0 and done.stderr == ""
    assert pathlib.Path(done.stdout.strip()) == run / "report" / "report.html"
    assert (run / "report" / "report.html").is_file()
