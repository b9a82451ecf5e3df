"""tools.report on folders written here: what it shows, leaves out with a note, and refuses."""
import csv
import json
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")
from tools import report  # noqa: E402


def write_run(folder, shots=4, seed=1, accuracy=60.0, finished=True):
    """A few-shot run of three classes, as train_clipfit.py leaves it."""
    folder.mkdir(parents=True)
    facts = {"method": "clipfit", "data": "nowhere", "model": "tiny", "shots": shots, "seed": seed}
    (folder / "config.json").write_text(json.dumps({**facts, "identity": facts}))
    records = [{"step": 1, "split": "train", "loss": 2.0, "lr": 0.1, "data_wait": 0.5},
               {"step": 2, "split": "train", "loss": "nan", "lr": 0.1},
               {"step": 3, "split": "test", "accuracy": accuracy}]
    lines = "\n".join(map(json.dumps, records)) + '\n{"step": 4, "spl'
    (folder / "metrics.jsonl").write_text(lines)
    if finished:
        results = {**facts, "accuracy": accuracy, "zero_shot_accuracy": 40.0,
                   "departures": ["--lr 1 (official 0.002)"]}
        (folder / "results.json").write_text(json.dumps(results))
    classes = ["cat", "dog <b>", "猫"]
    with open(folder / "per_class_test.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("class", "images", "zero_shot", "tuned"), *(
            (name, 10, 40.0, 60.0) for name in classes)])
    (folder / "confusion_test.json").write_text(json.dumps(
        {"classes": classes, "zero_shot": np.eye(3).tolist(),
         "tuned": [[6, 4, 0], [1, 9, 0], [0, 0, 10]]}))
    return folder


def write_plan(folder):
    """A plan of one stage with kept embeddings, in which text 0 rises from rank 3 to rank 1."""
    (folder / "english").mkdir(parents=True)
    score = {"r1": 30.0, "interval": {"r1": [20.0, 40.0]}}
    rows = [{"row": row, "stage": stage, "sets": {"english": {**score, "r1": r1}}}
            for row, stage, r1 in (("start", None, 30.0), ("english", "english", 45.0))]
    (folder / "results.json").write_text(json.dumps(
        {"method": "staged", "rows": rows, "identity": {}}))
    (folder / "plan.json").write_text(json.dumps({"stages": [{"name": "english"}]}))
    (folder / "english" / "metrics.jsonl").write_text(json.dumps(
        {"step": 1, "split": "train", "loss": 1.0}) + "\n")
    images = np.eye(12, dtype=np.float32)
    before = images.copy()
    before[0] = [0.1, 0.8, 0.5, *[0] * 9]
    for row, texts in (("start", before), ("english", images)):
        place = folder / "embeddings" / row / "english"
        place.mkdir(parents=True)
        np.save(place / "img_emb.npy", images)
        np.save(place / "text_emb.npy", texts)
        (place / "metadata.json").write_text(json.dumps({
            "paths": [f"{i}.jpg" for i in range(12)], "texts": [f"text {i}" for i in range(12)],
            "relevant": [[i, i] for i in range(12)]}))
    return folder


def page_of(out):
    return (out / "report.html").read_text("utf-8")


def test_a_run_is_drawn_and_what_it_lacks_is_noted(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    assert report.main([str(run)]) == 0
    page = page_of(run / "report")
    assert "dog &lt;b&gt;" in page and "<script" not in page and 'src="http' not in page
    assert "--lr 1 (official 0.002)" in page
    assert "<td>cat</td><td>dog &lt;b&gt;</td><td>4</td><td>40</td>" in page  # 4 of 10 cats
    assert "1 logged values are not finite" in page and "has a broken line" in page
    for name in ("curves", "per_class_test", "confusion_test"):
        assert (run / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name
    assert "example images are left out" in page  # its data is not here


def test_several_runs_give_one_table_over_shots(tmp_path, capsys):
    for shots, seed, accuracy in ((1, 1, 50.0), (1, 2, 54.0), (4, 1, 60.0)):
        write_run(tmp_path / "runs" / f"{shots}_{seed}", shots, seed, accuracy)
    write_run(tmp_path / "runs" / "stopped", finished=False)
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    page = page_of(tmp_path / "out")
    assert "<td>1</td><td>2</td><td>52</td><td>2.828</td>" in page  # mean and std of 50 and 54
    assert "the run is not finished" in page and (tmp_path / "out" / "shots.png").exists()


def test_stages_show_their_matrix_maps_and_the_texts_that_moved(tmp_path, capsys):
    plan = write_plan(tmp_path / "plan")
    assert report.main([str(plan)]) == 0
    page = page_of(plan / "report")
    assert "<td>english</td><td>text 0</td><td>3</td><td>1</td>" in page
    drawn = {path.name for path in (plan / "report").glob("*.png")}
    assert {"matrix.png", "map_pca.png", "curves_english.png"} <= drawn


@pytest.mark.parametrize("case", ["no folder", "no run", "no matplotlib", "no font"])
def test_refusals_are_one_line(case, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    flags = {"no folder": [str(tmp_path / "absent")], "no run": [str(tmp_path / "empty")],
             "no matplotlib": [str(write_run(tmp_path / "a"))],
             "no font": [str(write_run(tmp_path / "b")), "--font", str(tmp_path / "x.ttf")]}[case]
    if case == "no matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main(flags) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("error: ")
    assert {"no folder": "absent", "no matplotlib": "matplotlib", "no font": "--font"}.get(
        case, str(tmp_path)) in said
