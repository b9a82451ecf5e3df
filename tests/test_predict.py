"""tools.predict: the classes of images, through its command line."""
import csv

import pytest
from helpers import attempt, class_folder, noise, refused, run_main, save_picture

from tools import predict

COLOURS = ["red", "green", "blue"]


def test_a_runs_own_classes_are_those_that_its_test_gave(tmp_path, capsys):
    """From the run's folder, its checkpoint and its export; prompts by two templates."""
    data, run = class_folder(tmp_path / "data"), tmp_path / "run"
    run_main("train_clipfit", "--data", data, "--model", "tiny", "--epochs", 2, "--workers", 0,
             "--output-dir", run, "--export", "hf", "--template", "{}", "--template", "a {} thing")
    rows = list(csv.DictReader(open(run / "predictions_test.csv", encoding="utf-8")))
    for weights in (run, run / "checkpoint_last.pt", run / "export" / "hf"):
        found = run_main(predict, "--weights", weights, data / "test")
        assert {path: best[0][0] for path, best in found.items()} == {
            str(data / row["path"]): row["tuned"] for row in rows}
        assert all(sum(x for _, x in best) == pytest.approx(100) for best in found.values())
        again = run_main(predict, "--weights", weights, data / "test", "--classes", "red,", "green",
                         "blue ,")
        assert {path: [name for name, _ in best] for path, best in again.items()} == {
            path: [name for name, _ in best] for path, best in found.items()}
        assert capsys.readouterr().out.count("asked as '{}', 'a {} thing'") == 2
    run_main("train_clipfit", "--data", data, "--model", "tiny", "--epochs", 2, "--workers", 0,
             "--output-dir", run, "--setting", "fewshot", "--classes", "red", "blue", "--overwrite")
    found = run_main(predict, "--weights", run, data / "test")
    assert {name for best in found.values() for name, _ in best} == {"red", "blue"}
    assert not (run / "export").exists()  # of the run before
    (run / "confusion_test.json").write_text("{")
    refused(attempt(predict, "--weights", run, data / "test"), "confusion_test.json")


def test_what_cannot_be_read_is_counted_and_a_table_written(tmp_path):
    save_picture(tmp_path / "in" / "deep" / "图.png", noise())
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "in" / "notes.txt").write_text("no picture is meant")
    flags = [tmp_path / "in", tmp_path / "absent.png", "--csv", tmp_path / "out.csv"]
    done = attempt(predict, *flags, "--weights", "tiny", "--data", "demo").ok()
    assert "2 of 3" in done.out and "bad.jpg" in done.out and "absent.png" in done.out
    table = list(csv.DictReader(open(tmp_path / "out.csv", encoding="utf-8")))
    assert [row["rank"] for row in table] == list("12345")  # five of the demo's ten classes
    assert {row["image"] for row in table} == {str(tmp_path / "in" / "deep" / "图.png")}
    percent = [float(row["percent"]) for row in table]
    assert percent == sorted(percent, reverse=True)
    strange = attempt(predict, tmp_path / "in", "--weights", "tiny", "--classes", "banded", "braided", "cracked").ok()
    assert "'banded', 'braided', 'cracked'" in strange.out and "NOTE" not in done.out  # no such words


@pytest.mark.parametrize("flags, name", [
    (["absent.png", "--classes", *COLOURS], "absent.png"), (["x.png"], "--classes"),
    (["x.png", "--classes", "red", ""], "--classes"), (["x.png", "--classes", "red", "Red"], "--classes"),
    (["x.png", "--classes", *COLOURS, "--data", "demo"], "--data"),
    (["x.png", "--data", "dtdd"], "dtdd"),
    (["x.png", "--classes", *COLOURS, "--template", "no place"], "no place"),
    (["x.png", "--classes", *COLOURS, "--csv", "absent/out.csv"], "--csv"),
    (["x.png", "--classes", *COLOURS, "--csv", "empty"], "--csv"),
    (["empty", "--classes", *COLOURS], "no images")])
def test_what_cannot_be_asked_is_refused(flags, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_picture("x.png")
    (tmp_path / "empty").mkdir()
    refused(attempt(predict, "--weights", "tiny", *flags), name)
