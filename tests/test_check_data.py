"""tools.check_data and tools.few_shot: what they find and print, through their command lines."""
import itertools
import json
import os
import shutil

from helpers import attempt, cli, noise, refused, save_picture
from tools import check_data, few_shot
from tools.check_data import FINDINGS


def split_folder(root, counts=(("train", 16), ("test", 2))):
    """Pictures of two classes, no two alike."""
    numbers = itertools.count()
    for (split, count), name in itertools.product(counts, ("cat", "dog")):
        for i in range(count):
            save_picture(root / split / name / f"{i}.png", noise(seed=next(numbers)))
    return root


def found(data, *flags, code=0):
    """{finding: examples} of the report as JSON, after a look at its form."""
    result = attempt(check_data, data, "--json", *flags)
    assert result.code == code, result.err
    report = json.loads(result.out)
    kinds = [finding["finding"] for finding in report["findings"]]
    assert kinds == [kind for kind in FINDINGS if kind in kinds]
    assert report["usable"] == (code == 0)
    return {finding["finding"]: finding["examples"] for finding in report["findings"]}


def test_clean_data_is_usable_as_folder_and_as_zip(tmp_path):
    folder = split_folder(tmp_path / "set")
    assert found(folder) == {}
    said = attempt(check_data, folder).ok()
    assert "36 of 36 files decoded" in said.out and said.out.splitlines()[-1].startswith("verdict")
    shutil.make_archive(tmp_path / "set", "zip", tmp_path, "set")
    assert found(tmp_path / "set.zip") == {}


def test_unreadable_tiny_and_copied_pictures_are_named(tmp_path):
    folder = split_folder(tmp_path / "set")
    odd = folder / "train/cat"
    for name, content in {"empty": b"", "page": b"<html>",
                          "cut": (odd / "0.png").read_bytes()[:700]}.items():
        (odd / f"{name}.png").write_bytes(content)
    shutil.copy(odd / "3.png", folder / "test/cat/same.png")
    shutil.copy(odd / "7.png", folder / "train/dog/twin.png")
    kinds = found(folder, code=2)
    assert "1 %" in kinds.pop("refused")[0]
    assert kinds == {
        "leakage": ["test:test/cat/same.png = train:train/cat/3.png"],
        "unreadable": [f"train:train/cat/{name}.png" for name in ("cut", "empty", "page")],
        "duplicates": ["train:train/dog/twin.png = train:train/cat/7.png"]}
    for name in ("empty.png", "page.png"):
        (odd / name).unlink()
    assert "unreadable" in found(folder)  # one is borne


def test_classes_and_captions_are_looked_at_where_they_are(tmp_path):
    lists = {"train": [["0.jpg", 0, "crane"], ["1.jpg", 1, "owl"], ["2.jpg", 0, "crane"]],
             "test": [["0.jpg", 0, "crane"], ["3.jpg", 2, "gull"]]}
    rows = ["filepath\ttitle"]
    for i in range(40):
        save_picture(tmp_path / f"{i}.jpg", noise(seed=i))
        rows.append(f"{i}.jpg\tpicture {min(i, 38)}")
    (tmp_path / "lists.json").write_text(json.dumps(lists))
    assert found(tmp_path / "lists.json") == {
        "leakage": ["test:0.jpg = train:0.jpg"], "no_train": ["gull"], "no_test": ["owl"]}
    (tmp_path / "pairs.csv").write_text("\n".join(rows), "utf-8")  # open_clip's form: no classes
    (repeated,) = found(tmp_path / "pairs.csv").pop("same_caption")
    assert repeated in ("38.jpg", "39.jpg")
    (tmp_path / "5.jpg").unlink()
    assert found(tmp_path / "pairs.csv")["unreadable"][0].endswith("5.jpg")
    assert set(found("demo")) == {"same_caption"}


def test_splits_of_equal_file_names_are_each_looked_at(tmp_path):
    (tmp_path / "annotations").mkdir()
    coco = {"images": [{"id": 1, "file_name": "0.png"}],
            "annotations": [{"image_id": 1, "caption": "a dog"}]}
    for split in ("train", "val"):
        save_picture(tmp_path / split / "0.png")
        (tmp_path / f"annotations/captions_{split}.json").write_text(json.dumps(coco))
    (tmp_path / "val/0.png").write_bytes(b"x")
    assert found(tmp_path, code=2)["unreadable"] == ["val:0.png"]
    save_picture(tmp_path / "val/0.png", noise())
    assert "a search needs 2 images" in found(tmp_path, code=2)["refused"][0]
    (tmp_path / "annotations/captions_train.json").unlink()
    assert "there are no train images" in found(tmp_path, code=2)["refused"]


def test_refusals_are_one_line_and_any_file_name_can_be_printed(tmp_path):
    refused(attempt(check_data, tmp_path / "none", "--json"), "none")
    folder = split_folder(tmp_path / "set")
    (folder / os.fsdecode(b"train/cat/\xff\n\x1b[2J.jpg")).write_bytes(b"")
    (folder / "train/dog/猫.jpg").write_bytes(b"")
    said = cli("-m", "tools.check_data", folder, env={"PYTHONIOENCODING": "ascii"})
    assert said.code == 2 and not said.err and "\x1b" not in said.out and "unread" in said.out


def test_few_shot_prints_a_list_and_nothing_else(tmp_path):
    said = attempt(few_shot, "dtd", "--shots", 4, "--seed", 1, "--data-dir", tmp_path)
    drawn = json.loads(said.ok().out)
    assert drawn["train"][:2] == [["banded/banded_0117.jpg", 0], ["banded/banded_0142.jpg", 0]]
    assert drawn["val"][0] == ["banded/banded_0008.jpg", 0] and said.err == ""
    assert len(drawn["train"]) == len(drawn["val"]) == 4 * 47
    refused(attempt(few_shot, "dtd", "--shots", -1), "shots")
    short = attempt(few_shot, split_folder(tmp_path / "set"), "--shots", 99).ok()
    assert len(json.loads(short.out)["train"]) == 32 and "fewer than 99" in short.err
