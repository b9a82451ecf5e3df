"""tools.check_data and tools.few_shot: what they find and print, through their command lines."""
import io
import itertools
import json
import os
import shutil
import zipfile

import numpy as np
from PIL import Image

from helpers import attempt, cli, refused, save_picture
from tools import check_data, few_shot
from tools.check_data import FINDINGS, near_pairs


def photo(seed, width=72, height=64):
    """A soft picture with large shapes, as photographs are: it survives re-encoding."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def split_folder(root, counts=(("train", 16), ("test", 2))):
    """Pictures of two classes, no two alike."""
    numbers = itertools.count()
    for (split, count), name in itertools.product(counts, ("cat", "dog")):
        for i in range(count):
            save_picture(root / split / name / f"{i}.jpg", photo(next(numbers)))
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
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in sorted(folder.rglob("*.jpg")):
            archive.write(file, file.relative_to(tmp_path))
    assert found(tmp_path / "set.zip") == {}


def test_odd_and_unreadable_pictures_are_named_by_kind(tmp_path):
    folder, whole = split_folder(tmp_path / "set"), io.BytesIO()
    odd = folder / "train/cat"
    photo(90).save(whole, "JPEG")
    for name, content in {"empty": b"", "not_image": b"<html>", "damaged": whole.getvalue()[:700]
                          }.items():
        (odd / f"{name}.jpg").write_bytes(content)
    photo(91).convert("RGBA").save(odd / "alpha.png")
    photo(92).save(odd / "animated.gif", save_all=True, append_images=[photo(93)])
    photo(94, 64, 20).save(odd / "tiny.jpg")
    photo(95, 1000, 40).save(odd / "strip.jpg")
    kinds = found(folder, code=2)
    assert "1 %" in kinds.pop("refused")[0]
    assert {kind: [os.path.basename(path).split(".")[0] for path in paths]
            for kind, paths in kinds.items()} == {kind: [kind] for kind in kinds}
    assert set(kinds) == {"empty", "not_image", "damaged", "alpha", "animated", "tiny", "strip"}
    for name in ("empty.jpg", "not_image.jpg"):
        (odd / name).unlink()
    assert "damaged" in found(folder)  # one is borne


def test_copies_are_seen_within_and_above_all_across_splits(tmp_path):
    folder = split_folder(tmp_path / "set")
    shutil.copy(folder / "train/cat/3.jpg", folder / "test/cat/same.jpg")
    Image.open(folder / "train/dog/4.jpg").save(folder / "test/cat/encoded.jpg", quality=60)
    Image.open(folder / "train/cat/5.jpg").resize((50, 44)).save(folder / "test/cat/smaller.png")
    shutil.copy(folder / "train/cat/7.jpg", folder / "train/dog/twin.jpg")
    recoloured = np.asarray(photo(8))[..., [2, 0, 1]]
    Image.fromarray(recoloured).save(folder / "test/cat/recoloured.png")
    assert found(folder) == {
        "leakage": ["test:test/cat/same.jpg = train:train/cat/3.jpg"],
        "near_leakage": ["test:test/cat/encoded.jpg = train:train/dog/4.jpg",
                         "test:test/cat/smaller.png = train:train/cat/5.jpg"],
        "two_labels": ["train:train/dog/twin.jpg = train:train/cat/7.jpg",
                       "test:test/cat/encoded.jpg = train:train/dog/4.jpg"],
        "duplicates": ["train:train/dog/twin.jpg = train:train/cat/7.jpg"]}
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 240, dtype=np.uint64)
    hashes[1::2] = hashes[::2] ^ (np.uint64(1) << rng.integers(0, 63, 120, dtype=np.uint64))
    colours = np.repeat(rng.integers(0, 256, (120, 64, 3), dtype=np.uint8), 2, axis=0)
    naive = {(a, b) for a, b in itertools.combinations(range(240), 2)
             if bin(int(hashes[a] ^ hashes[b])).count("1") <= 4}
    assert {tuple(sorted(pair)) for pair in near_pairs(hashes, colours)} == naive


def test_classes_and_captions_are_looked_at_where_they_are(tmp_path):
    lists = {"train": [["0.jpg", 0, "crane"], ["1.jpg", 1, "owl"], ["2.jpg", 0, "crane"]],
             "test": [["0.jpg", 0, "crane"], ["3.jpg", 2, "gull"]]}
    rows = ["filepath\ttitle"]
    for i in range(40):
        save_picture(tmp_path / f"{i}.jpg", photo(i))
        caption = {1: "word " * 56, 2: "猫" * 56, 3: "to the left", 4: "a red bird"}
        rows.append(f"{i}.jpg\t{caption.get(i, f'picture {min(i, 38)}')}")
    (tmp_path / "lists.json").write_text(json.dumps(lists))
    assert found(tmp_path / "lists.json") == {
        "leakage": ["test:0.jpg = train:0.jpg"], "no_train": ["gull"], "no_test": ["owl"],
        "few": ["crane (2)", "owl (1)"]}
    (tmp_path / "pairs.csv").write_text("\n".join(rows), "utf-8")  # open_clip's form: no classes
    kinds = found(tmp_path / "pairs.csv")
    assert {kind: sorted(paths) for kind, paths in kinds.items()} == {
        "long_caption": ["1.jpg", "2.jpg"], "same_caption": kinds["same_caption"],
        "sides": ["3.jpg"], "colours": ["4.jpg"]}
    assert len(kinds["same_caption"]) == 1 and kinds["same_caption"][0] in ("38.jpg", "39.jpg")
    assert set(found("demo", "--limit", 5)) == {"same_caption", "sides", "colours"}


def test_refusals_are_one_line_and_any_file_name_can_be_printed(tmp_path):
    refused(attempt(check_data, tmp_path / "none"), "none")
    refused(attempt(check_data, "demo", "--limit", 0), "--limit")
    assert found(tmp_path / "none", code=2) == {}
    folder = split_folder(tmp_path / "set")
    (folder / os.fsdecode(b"train/cat/\xff\n\x1b[2J.jpg")).write_bytes(b"")
    (folder / "train/dog/猫.jpg").write_bytes(b"")
    said = cli("-m", "tools.check_data", folder, env={"PYTHONIOENCODING": "ascii"})
    assert said.code == 2 and not said.err and "\x1b" not in said.out and "empty" in said.out


def test_few_shot_prints_a_list_and_nothing_else(tmp_path):
    said = cli("-m", "tools.few_shot", "dtd", "--shots", 4, "--seed", 1, "--data-dir", tmp_path)
    drawn = json.loads(said.ok().out)
    assert drawn["train"][:2] == [["banded/banded_0117.jpg", 0], ["banded/banded_0142.jpg", 0]]
    assert drawn["val"][0] == ["banded/banded_0008.jpg", 0] and said.err == ""
    assert len(drawn["train"]) == len(drawn["val"]) == 4 * 47
    refused(attempt(few_shot, "dtd", "--shots", -1), "shots")
    short = attempt(few_shot, split_folder(tmp_path / "set"), "--shots", 99).ok()
    assert len(json.loads(short.out)["train"]) == 32 and "fewer than 99" in short.err
