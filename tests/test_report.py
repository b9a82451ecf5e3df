"""tools.report on folders of runs: what it shows, leaves out with a note, and refuses."""
import json
import shutil
import sys

import numpy as np
import pytest
from helpers import attempt, refused

pytest.importorskip("matplotlib")


def copied(source, folder, **facts):
    """A few-shot run of three classes, with other facts and, in its log, damage."""
    shutil.copytree(source, folder)
    for name in ("config", "results"):
        table = json.loads((folder / f"{name}.json").read_text())
        (folder / f"{name}.json").write_text(json.dumps(table | facts))
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "split": "train", "loss": "nan", "lr": 0.1}\n{"step": 8, "spl')
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


def report(*flags):
    return attempt("tools.report", *flags)


def page_of(result):
    with open(result.ok().out.strip(), encoding="utf-8") as file:
        return file.read()


def test_a_run_is_drawn_and_what_it_lacks_is_noted(whole_run, tmp_path):
    run = copied(whole_run("clipfit"), tmp_path / "run")
    (run / "confusion_test.json").write_text(json.dumps({
        "classes": ["cat", "dog <b>", "猫", "yak"],
        "zero_shot": [[4, 6, 0, 0], [6, 4, 0, 0], [3, 3, 4, 0], [0, 0, 0, 0]],
        "tuned": [[6, 4, 0, 0], [1, 9, 0, 0], [0, 0, 10, 0], [0, 0, 0, 0]]}))
    page = page_of(report(run))
    assert "dog &lt;b&gt;" in page and "<script" not in page and 'src="http' not in page
    assert "--lr 0.0005 (official" in page
    assert "<td>cat</td><td>dog &lt;b&gt;</td><td>4</td><td>40</td>" in page  # 4 of 10 cats
    places = [page.index(f"<td>{name}</td><td>10</td><td>40</td><td>{score}</td><td>{gain}</td>")
              for name, score, gain in (("猫", 100, 60), ("dog &lt;b&gt;", 90, 50), ("cat", 60, 20))]
    assert places == sorted(places) and "yak" not in page  # which has no image
    assert "1 logged values are not finite" in page and "has a broken line" in page
    for name in ("curves", "confusion_test"):
        assert (run / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG"), name


def test_several_runs_give_one_table_over_shots(whole_run, tmp_path):
    for shots, seed, accuracy in ((1, 1, 50.0), (1, 2, 54.0), (4, 1, 60.0), (4, 2, 0.0)):
        copied(whole_run("clipfit"), tmp_path / "runs" / f"{shots}_{seed}", shots=shots, seed=seed,
               accuracy=accuracy)
    (tmp_path / "runs" / "4_2" / "results.json").unlink()
    page = page_of(report(tmp_path / "runs", "--out", tmp_path / "out"))
    assert "<td>1</td><td>2</td><td>52</td><td>2.828</td>" in page  # mean and std of 50 and 54
    assert "the run is not finished" in page and (tmp_path / "out" / "shots.png").exists()
    copied(whole_run("clipfit"), tmp_path / "runs" / "other", shots=8, identity={"lr": 9})
    page = page_of(report(tmp_path / "runs", "--out", tmp_path / "other"))
    assert "differ in more than shots" in page and not (tmp_path / "other" / "shots.png").exists()


def test_stages_show_their_matrix_maps_and_the_texts_that_moved(tmp_path):
    plan = write_plan(tmp_path / "plan")
    assert "<td>english</td><td>text 0</td><td>3</td><td>1</td>" in page_of(report(plan))
    drawn = {path.name for path in (plan / "report").glob("*.png")}
    assert {"matrix.png", "map_pca.png", "curves_english.png"} <= drawn


def test_refusals(whole_run, tmp_path, monkeypatch):
    run = copied(whole_run("clipfit"), tmp_path / "run")
    (tmp_path / "empty").mkdir()
    refused(report(tmp_path / "absent"), "absent")
    refused(report(tmp_path / "empty"), tmp_path / "empty")
    refused(report(run, "--font", tmp_path / "x.ttf"), "--font")
    refused(report(run, "--out", run / "metrics.jsonl"), "--out")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(report(run), "matplotlib")
