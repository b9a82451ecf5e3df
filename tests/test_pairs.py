"""data.py: image-caption pairs, their readers, batches, cache and recall; twins and real data."""
import csv
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (DataError, LostWorker, make_loader, make_pair_loader, open_pairs, PairBatches,
                  Preprocess, recall_at_k, sample_seed)


def save(path, side=16, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (side, side + seed % 5, 3), np.uint8)
    Image.fromarray(values).save(path)
    return path


def the_one_line(call, *args, **options):
    with pytest.raises(DataError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def table(folder, images=10, captions=2, broken=(), name="pairs.csv"):
    """A folder of PNGs with a CSV that gives each some captions, all train."""
    with open(folder / name, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(("image", "caption", "split"))
        for i in range(images):
            path = save(folder / f"{i}.png", seed=i)
            if i in broken:
                path.write_bytes(b"no image")
            for j in range(captions):
                for split in ("train", "val", "test"):
                    out.writerow((f"{i}.png", f"caption {j} of {i}", split))
    return folder / name


def uneven(tmp_path, counts):
    """A set whose image i has counts[i] captions; no image files."""
    rows = [{"image": f"{i}.png", "captions": [f"{i} {j}" for j in range(count)], "split": "train"}
            for i, count in enumerate(counts)]
    (tmp_path / "uneven.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return open_pairs(tmp_path / "uneven.jsonl", "train")


# -----------------------------------------------------------------------------
# Layouts

def test_flickr8k_has_the_published_counts(shared):
    sets = {split: open_pairs("flickr8k", split, shared) for split in ("train", "val", "test")}
    assert {split: (len(s.paths), len(s)) for split, s in sets.items()} == {
        "train": (6000, 30000), "val": (1000, 5000), "test": (1000, 5000)}
    train = sets["train"]
    train.check_files()
    assert train.counts == {"train": 6000, "val": 1000, "test": 1000}
    assert any("91 images are in no split" in note for note in train.notes)
    assert len({s.fingerprint for s in sets.values()}) == 1
    assert not set(sets["train"].paths) & set(sets["test"].paths)
    assert train.texts_of(0) == train.captions[:5] and train.owner[:6] == [0, 0, 0, 0, 0, 1]
    image, used, asked = train[29999]
    assert image.size == (224, 224) and used == asked == 29999


def test_the_chinese_captions_of_flickr8k_are_chosen_by_name_or_path(shared):
    by_name = open_pairs("flickr8k", "train", shared, captions="flickr8kzhc.caption.txt")
    by_path = open_pairs(shared / "flickr8k" / "flickr8kzhc.caption.txt", "train")
    assert len(by_name) == len(by_path) == 30000 and by_name.captions == by_path.captions
    assert by_name.captions[0] == "一个穿着泳装的女人躺在海水里。"
    by_path.check_files()


def test_the_simple_clip_split_is_the_notebooks(shared, tmp_path):
    """Its lines, on the Kaggle table of the same rows: 5 rows an image, ids drawn with seed 42."""
    rows = [line.partition("#")[::2] for line in
            (shared / "flickr8k" / "Flickr8k.token.txt").read_text("utf-8").splitlines()]
    rows = [(name, text.partition("\t")[2]) for name, text in rows if "2258277193" not in name]
    assert len(rows) == 40455
    np.random.seed(42)
    valid = set(np.random.choice(np.arange(0, 8091), size=int(0.2 * 8091), replace=False))
    theirs = [name for i, (name, _) in enumerate(rows) if i // 5 in valid]
    with open(tmp_path / "captions.txt", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    for where in (shared / "flickr8k", tmp_path):
        test = open_pairs(where, "test", layout="simple-clip")
        assert len(test.paths) == 1618 and [test.paths[i] for i in test.owner] == theirs
        assert len(open_pairs(where, "train", layout="simple-clip").paths) == 6473
    cut = open_pairs(tmp_path, "train")
    shares = np.array(list(cut.counts.values())) / 8091
    assert sum(cut.counts.values()) == 8091 and abs(shares - [0.8, 0.1, 0.1]).max() < 0.01
    assert any("80/10/10" in note for note in cut.notes)


def coco_zips(source, folder):
    folder.mkdir()
    for name in ("train2017", "val2017", "annotations"):
        file = "annotations_trainval2017" if name == "annotations" else name
        with zipfile.ZipFile(folder / f"{file}.zip", "w") as out:
            for path in sorted((source / name).iterdir())[:400]:
                out.write(path, f"{name}/{path.name}")
    return folder


def test_coco_folders_and_zips_are_the_same_pairs(shared, tmp_path):
    zips = coco_zips(shared / "coco_mini", tmp_path / "coco")
    for split, images, captions in (("train", 80, 400), ("val", 79, 395), ("test", 79, 395)):
        whole, zipped = open_pairs("coco_mini", split, shared), open_pairs(zips, split)
        assert (len(whole.paths), len(whole)) == (images, captions)
        assert whole.captions == zipped.captions and whole.fingerprint == zipped.fingerprint
        assert not any("\n" in text or text != text.strip() for text in whole.captions)
        whole.check_files(), zipped.check_files()
        assert np.array_equal(np.asarray(whole[7][0]), np.asarray(zipped[7][0]))
    by_file = open_pairs(shared / "coco_mini" / "annotations" / "captions_val2017.json", "train")
    assert by_file.store.path.endswith("train2017") and len(by_file) == 400


def test_karpathy_json_counts_restval_as_train(tmp_path):
    def entry(name, split, folder=None):
        return {"filename": name, "split": split, **({"filepath": folder} if folder else {}),
                "sentences": [{"raw": f" a {name}\n"}, {"raw": f"b {name}"}]}
    images = [entry("1.png", "train", "val2014"), entry("2.png", "restval", "train2014"),
              entry("3.png", "val", "val2014"), entry("4.png", "test", "val2014")]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    for image in images:
        save(tmp_path / image["filepath"] / image["filename"])
    train = open_pairs(tmp_path, "train")
    assert train.paths == ["val2014/1.png", "train2014/2.png"]
    assert train.captions == ["a 1.png", "b 1.png", "a 2.png", "b 2.png"]
    train.check_files()
    assert len(open_pairs(tmp_path / "dataset_coco.json", "test")) == 2
    (tmp_path / "dataset_coco.json").write_text('{"images": [{"split": "train"}]}')
    assert "Karpathy" in the_one_line(open_pairs, tmp_path, "train")


def test_the_flickr30k_table_with_its_dirty_row_is_repaired(tmp_path):
    (tmp_path / "results.csv").write_text(
        "image_name| comment_number| comment\n1.jpg| 0| Two | men .\n"
        "2.jpg| 4   A dog runs across the grass .\n3.jpg| 1|\n1.jpg| 1| None\n")
    whole = open_pairs(tmp_path, "train", split_ratio=(1, 0, 0))
    assert dict(zip(whole.captions, [whole.paths[i] for i in whole.owner])) == {
        "Two | men .": "1.jpg", "A dog runs across the grass .": "2.jpg", "None": "1.jpg"}
    assert any("1 rows without their second" in note for note in whole.notes)
    assert any("1 rows without image or caption left out" in note for note in whole.notes)


def test_the_flickr30k_token_file_is_read_and_cut_by_name(tmp_path):
    lines = [f"{i}.jpg#{k}\tcaption {k} of {i}" for i in range(300) for k in range(5)]
    (tmp_path / "results_20130124.token").write_text("\n".join(lines))
    parts = {split: open_pairs(tmp_path, split) for split in ("train", "val", "test")}
    sizes = [len(part.paths) for part in parts.values()]
    assert sum(sizes) == 300 and sizes[0] > 210 and min(sizes) > 10
    more = lines + [f"new{i}.jpg#0\tx" for i in range(50)]  # moves no old image
    (tmp_path / "results_20130124.token").write_text("\n".join(more))
    for split, part in parts.items():
        assert set(part.paths) <= set(open_pairs(tmp_path, split).paths)


@pytest.mark.parametrize("text, name", [
    ("\ufeffimage,caption\r\n1.png,None\r\n1.png,\"two\nlines, quoted\"\r\n2.png,NA\r\n"
     "3.png,null\r\n2.png,  \r\n", "pairs.csv"),
    ("filepath\ttitle\n1.png\tNone\n1.png\ttwo lines, quoted \n2.png\tNA\n3.png\tnull\n"
     "2.png\t\n", "pairs.tsv"),
    ("Path;Text\n1.png;None\n1.png;two lines, quoted\n2.png;NA\n3.png;null\n2.png;\n", "pairs.csv"),
    ('{"image": "1.png", "captions": ["None", "two lines, quoted"]}\n'
     '{"image": "2.png", "caption": "NA", "id": 7}\n{"image": "3.png", "caption": "null"}\n'
     '{"image": "2.png", "caption": null}\n', "pairs.jsonl")])
def test_tables_of_every_kind_keep_words_that_look_like_nothing(tmp_path, text, name):
    (tmp_path / name).write_bytes(text.encode())
    for where in (tmp_path, tmp_path / name):
        pairs = open_pairs(where, "train", split_ratio=(1, 0, 0))
        assert pairs.captions == ["None", "two lines, quoted", "NA", "null"]
        assert [pairs.paths[i] for i in pairs.owner] == ["1.png", "1.png", "2.png", "3.png"]
        assert any("1 rows without image or caption left out" in note for note in pairs.notes)


def test_a_zip_with_a_table_is_read_in_place(tmp_path):
    file = table(tmp_path, 6, 2)
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as out:
        for path in [file, *tmp_path.glob("*.png")]:
            out.write(path, path.name)
    zipped, plain = open_pairs(tmp_path / "p.zip", "val"), open_pairs(file, "val")
    assert zipped.captions == plain.captions and zipped.owner == plain.owner
    zipped.check_files()
    assert np.array_equal(np.asarray(zipped[5][0]), np.asarray(plain[5][0]))
    with zipfile.ZipFile(tmp_path / "q.zip", "w") as out:
        out.writestr("deep/t.csv", "image,caption\n")
    demo = open_pairs("demo", "train")
    demo.check_files()
    assert demo.name == "demo" and min(demo.counts.values()) > 100 and demo[0][0].size == (64, 64)
    assert "holds 0 tables" in the_one_line(open_pairs, tmp_path / "q.zip", "train")


def test_bad_tables_are_refused_with_what_they_hold(tmp_path):
    file = tmp_path / "t.csv"
    for text, said in (("a,b\n1,2\n", "['a', 'b']"), ("image,caption\n", "no image with a caption"),
                       ("image,caption\n1.png,\n", "no image with a caption"), ("", "columns"),
                       ("image,caption\n../1.png,x\n", "points outside"),
                       ("image,caption,split\n1.png,x,best\n", "'best'"),
                       ("image,label\n1.png,x\n", "caption")):
        file.write_text(text)
        assert said in the_one_line(open_pairs, file, "train"), text
    file.write_text("img,words\n1.png,x\n")
    assert "'nope'" in the_one_line(open_pairs, file, "train", image_column="nope")
    given = open_pairs(file, "train", image_column="img", caption_column="Words",
                       split_ratio=(1, 0, 0))
    assert given.captions == ["x"]
    assert "split_ratio" in the_one_line(open_pairs, file, "train", image_column="img",
                                         caption_column="words", split_ratio=(1, 1, 1))
    (tmp_path / "empty").mkdir()
    said = the_one_line(open_pairs, tmp_path / "empty", "train")
    assert "COCO" in said and "WebDataset" in said and "token" in said
    assert "no pairs 'flikr'" in the_one_line(open_pairs, "flikr", "train", tmp_path)


def test_tables_named_after_splits_and_split_columns_are_the_splits(tmp_path):
    for split, image in (("train", "1"), ("dev", "2"), ("test", "3")):
        (tmp_path / f"{split}.tsv").write_text(f"image\tcaption\n{image}.png\tx\n")
    assert [open_pairs(tmp_path, split).paths for split in ("train", "val", "test")] == [
        ["1.png"], ["2.png"], ["3.png"]]
    one = tmp_path / "one.csv"
    one.write_text("image,caption,split\n1.png,x,train\n2.png,y,valid\n1.png,z,valid\n")
    assert open_pairs(one, "test").paths == ["2.png", "1.png"]
    notes = open_pairs(one, "val").notes
    assert any("1 images of val or test are in train too" in note for note in notes)
    far = save(tmp_path / "far" / "9.png")
    one.write_text(f"image,caption,split\n{far},x,train\n2.png,y,test\n4.png,z,\n")
    absolute = open_pairs(one, "train")
    assert absolute.store.has(str(far)) and absolute[0][0].size == (16, 16)
    assert absolute.captions == ["x", "z"] and any("no split" in n for n in absolute.notes)
    assert "no val split" in the_one_line(open_pairs, one, "val")


def test_a_text_file_beside_each_image_holds_its_captions(tmp_path):
    for split, name in (("train", "a b"), ("train", "é"), ("val", "c"), ("train", "alone")):
        save(tmp_path / split / f"{name}.png")
        if name != "alone":
            (tmp_path / split / f"{name}.txt").write_text(f"one {name}\n\n  two  words \n")
    train = open_pairs(tmp_path, "train")
    assert sorted(train.paths) == ["train/a b.png", "train/é.png"] and len(train) == 4
    assert "two words" in train.captions and any("1 images without" in n for n in train.notes)
    train.check_files()
    assert open_pairs(tmp_path, "test").paths == ["val/c.png"]


# -----------------------------------------------------------------------------
# Shards

def add(tar, name, content, **fields):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    tar.addfile(info, io.BytesIO(content))


def png(seed=0):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (9, 8, 3), np.uint8)).save(
        buffer, "png")
    return buffer.getvalue()


def test_shards_made_by_the_command_are_the_pairs_they_were_made_of(shared, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    whole = open_pairs("flickr8k", "train", shared)
    with open(small / "t.jsonl", "w") as file:
        for split, start in (("train", 0), ("val", 25), ("test", 30)):
            for i in range(start, start + (25 if split == "train" else 5)):
                file.write(json.dumps({"image": whole.paths[i], "captions": whole.texts_of(i),
                                       "split": split}) + "\n")
                shutil.copy(os.path.join(whole.store.path, whole.paths[i]), small)
    command = [sys.executable, data.__file__, "--make-shards", small / "t.jsonl",
               "--out", tmp_path / "tars", "--per-shard", "10"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = sorted(os.listdir(tmp_path / "tars"))
    assert names == ["test-000000.tar", "train-000000.tar", "train-000001.tar", "train-000002.tar",
                     "val-000000.tar"]
    pattern = str(tmp_path / "tars" / "train-{000000..000002}.tar")
    listed = [tmp_path / "tars" / name for name in names if name.startswith("train")]
    for where in (tmp_path / "tars", pattern, listed):
        tars = open_pairs(where, "train")
        source = open_pairs(small / "t.jsonl", "train")
        assert tars.captions == source.captions and tars.owner == source.owner
        for i in (0, 9, 10, 24):
            assert tars.store.read(tars.paths[i]) == source.store.read(source.paths[i])
        tars.check_files()
    assert data.main(list(map(str, command[2:]))) == 2  # never over other shards
    view = Preprocess(16, train=True, dtype=torch.uint8, exact=False)
    batches = [[batch for batch in make_pair_loader(pairs.with_transform(view), 8, seed=1,
                                                    workers=workers)]
               for pairs in (tars, source) for workers in (0, 2)]
    for other in batches[1:]:
        for one, two in zip(batches[0], other, strict=True):
            assert all(map(torch.equal, one, two))


def test_a_hostile_tar_gives_its_sound_samples_and_writes_nothing(tmp_path):
    folder = tmp_path / "tars"
    folder.mkdir()
    with tarfile.open(folder / "00.tar", "w") as tar:
        add(tar, "../out.png", png()), add(tar, "../out.txt", b"out")
        add(tar, "/abs.png", png()), add(tar, "/abs.txt", b"abs")
        add(tar, "link.png", b"", type=tarfile.SYMTYPE, linkname="/etc/hostname")
        add(tar, "link.txt", b"link")
        add(tar, "hard.png", b"", type=tarfile.LNKTYPE, linkname="../../x")
        add(tar, "node.png", b"", type=tarfile.CHRTYPE)
        add(tar, "dir", b"", type=tarfile.DIRTYPE)
        add(tar, "dir/a.b.png", png(1)), add(tar, "dir/a.txt", b"not of a.b.png")
        add(tar, "good.PNG", png(2)), add(tar, "good.txt", " a\n good\tone ".encode())
        add(tar, "js.png", png(3)), add(tar, "js.json", b'{"caption": "from json"}')
        add(tar, "bad.png", png(4)), add(tar, "bad.json", b'{"caption": ')
        add(tar, "no.png", png(5)), add(tar, "no.txt", b"  ")
    pairs = open_pairs(folder, "train", split_ratio=(1, 0, 0))
    assert pairs.paths == ["00.tar:good.PNG", "00.tar:js.png"]
    assert pairs.captions == ["a good one", "from json"]
    assert any("7 links, devices" in note for note in pairs.notes), pairs.notes
    assert any("samples without image or caption" in note for note in pairs.notes)
    assert pairs[1][0].size == (8, 9)
    assert sorted(os.listdir(tmp_path)) == ["tars"] and os.listdir(folder) == ["00.tar"]


def test_sparse_members_are_not_read(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "good.png", png()), add(tar, "good.txt", b"good")
        info = tarfile.TarInfo("huge.png")
        info.type = tarfile.GNUTYPE_SPARSE
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        header[483:495] = b"%011o\0" % (1 << 32)  # the size it would unpack to
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        tar.fileobj.write(header)
        tar.offset += 512
        add(tar, "huge.txt", b"huge"), add(tar, "next.png", png()), add(tar, "next.txt", b"next")
    pairs = open_pairs(tmp_path, "train", split_ratio=(1, 0, 0))
    assert pairs.captions == ["good", "next"]
    assert any("1 links, devices, sparse files" in note for note in pairs.notes)


@pytest.mark.parametrize("damage", ["cut in a file", "cut in a header", "cut between", "garbage",
                                    "negative size"])
def test_a_damaged_shard_gives_what_lies_before_the_damage(tmp_path, damage):
    file = tmp_path / "0.tar"
    with tarfile.open(file, "w") as tar:
        for i in range(5):
            add(tar, f"{i}.txt", f"caption {i}".encode()), add(tar, f"{i}.png", png(i))
            if i == 2:
                third = tar.offset
    content = bytearray(file.read_bytes())
    if damage == "garbage":
        content[third:third + 512] = b"\x07" * 512
    elif damage == "negative size":
        content[third + 124:third + 136] = b"\xff" * 12
        content[third + 148:third + 156] = b" " * 8
        content[third + 148:third + 156] = b"%06o\0 " % sum(content[third:third + 512])
    else:
        content = content[:third + {"cut in a file": 1300, "cut in a header": 300,
                                    "cut between": 0}[damage]]
    file.write_bytes(content)
    pairs = open_pairs(file, "train", split_ratio=(1, 0, 0))
    assert pairs.captions == ["caption 0", "caption 1", "caption 2"]
    assert sum("is damaged" in note for note in pairs.notes) == 1
    assert pairs[2][0].size == (8, 9)


def test_files_that_are_no_plain_tar_and_missing_shards_are_named(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"\x1f\x8b" + b"no tar" * 500)
    assert "is damaged" in the_one_line(open_pairs, tmp_path, "train")
    said = the_one_line(open_pairs, str(tmp_path / "x-{00..04}.tar"), "train")
    assert "5 of 5 shards are missing" in said and "x-00.tar" in said
    assert "counts no shards" in the_one_line(open_pairs, str(tmp_path / "x-{4..1}.tar"), "train")
    assert "shards" in the_one_line(open_pairs, [], "train")


# -----------------------------------------------------------------------------
# The set

def test_an_unreadable_image_is_replaced_by_the_same_pair_in_every_worker(tmp_path):
    pairs = open_pairs(table(tmp_path, 60, 3, broken=range(40)), "train")
    pairs = pairs.with_transform(Preprocess(8))
    for c in range(120):  # the captions of the first forty
        image, used, same = pairs[(3, c)]
        tries = [sample_seed(0, attempt, c) % len(pairs) for attempt in range(1, 100)]
        assert same == c and used == next(t for t in tries if pairs.owner[t] >= 40)
        assert torch.equal(image, pairs[(0, used)][0])
    epochs = [[(used.tolist(), asked.tolist(), images) for images, used, asked in
               make_pair_loader(pairs, 60, seed=2, workers=workers)] for workers in (0, 2)]
    assert epochs[0][0][:2] == epochs[1][0][:2] and torch.equal(epochs[0][0][2], epochs[1][0][2])
    assert sum(u != a for u, a in zip(*epochs[0][0][:2])) == 40


def test_images_are_each_seen_once_and_the_unreadable_one_is_minus_one(tmp_path):
    pairs = open_pairs(table(tmp_path, 9, 2, broken=[4]), "test").with_transform(Preprocess(8))
    loader = make_loader(pairs.image_items(), 4, shuffle=False)
    images, positions, indices = (torch.cat(part) for part in zip(*loader))
    assert indices.tolist() == list(range(9)) and positions.tolist() == [0, 1, 2, 3, -1, 5, 6, 7, 8]
    assert not images[4].any() and images[5].any()
    pairs.refuse_losses(indices[positions < 0].tolist(), "damaged")
    assert "1 of 9 test images are unreadable, e.g. 4.png" in pairs.notes[-1]
    assert "more than 1 %" in the_one_line(pairs.refuse_losses, [1, 2], "damaged")


def test_missing_images_are_noted_or_refused(tmp_path):
    file = table(tmp_path, 20, 1)
    (tmp_path / "3.png").unlink()
    pairs = open_pairs(file, "train")
    pairs.check_files()
    assert "1 of 20 train images are missing, e.g. 3.png" in pairs.notes[-1]
    (tmp_path / "5.png").unlink()
    assert "2 of 20" in the_one_line(open_pairs(file, "train").check_files)
    for i in range(20):
        (tmp_path / f"{i}.png").unlink(missing_ok=True)
    said = the_one_line(open_pairs(file, "train").with_transform(Preprocess(8)).__getitem__, 0)
    assert "a hundred" in said


def test_a_subset_keeps_the_captions_of_its_images(tmp_path):
    pairs = uneven(tmp_path, [1, 3, 2, 4])
    some = pairs.subset([3, 0])
    assert some.paths == ["3.png", "0.png"] and some.owner == [0, 0, 0, 0, 1]
    assert some.captions == ["3 0", "3 1", "3 2", "3 3", "0 0"]
    assert some.texts_of(1) == ["0 0"] and pairs.texts_of(1) == ["1 0", "1 1", "1 2"]
    assert some.subset([1]).captions == ["0 0"] and some.fingerprint == pairs.fingerprint


def test_the_fingerprint_changes_with_any_caption_of_any_split(tmp_path):
    file = table(tmp_path, 4, 2)
    before = open_pairs(file, "train").fingerprint
    assert open_pairs(file, "test").fingerprint == before
    text = file.read_text()
    file.write_text(text.replace("caption 1 of 3,test", "caption 1 of 3!,test"))
    assert open_pairs(file, "train").fingerprint != before


# -----------------------------------------------------------------------------
# Batches

@pytest.mark.parametrize("captions", ["one", "all"])
def test_no_image_comes_twice_in_a_batch_and_nothing_more_than_once(tmp_path, captions):
    pairs = uneven(tmp_path, [5] * 40 + [1, 2, 7, 60, 30])
    for size in (2, 3, 8, 16, 44, 45):
        batches = PairBatches(pairs, size, seed=1, captions=captions)
        for epoch in (0, 1):
            batches.set_epoch(epoch)
            listed = list(batches)
            assert len(listed) == len(batches) > 0 and batches.global_size(0) == size
            assert {e for batch in listed for e, _ in batch} == {epoch}
            for batch in listed:
                assert len({pairs.owner[c] for _, c in batch}) == len(batch) == size
            seen = [c for batch in listed for _, c in batch]
            assert len(set(seen)) == len(seen)
            whole = 45 if captions == "one" else sum(
                min(count, len(batches)) for count in pairs.groups[2])
            assert whole - len(seen) < size  # what is left out is less than a batch


def test_one_caption_per_image_is_drawn_anew_in_every_epoch(tmp_path):
    pairs = uneven(tmp_path, [4] * 300)
    drawn = []
    for epoch in range(40):
        batches = PairBatches(pairs, 300, seed=5)
        batches.set_epoch(epoch)
        (batch,) = batches
        chosen = {pairs.owner[c]: c for _, c in batch}
        assert sorted(chosen) == list(range(300))
        for image in (0, 7, 299):  # by (seed, epoch, image), as its scalar twin says
            assert chosen[image] == 4 * image + sample_seed(5, epoch, image) % 4
        drawn.append([chosen[image] % 4 for image in range(300)])
    counts = np.stack([(np.array(drawn) == k).sum() for k in range(4)])
    assert (abs(counts - 3000) < 250).all()


@pytest.mark.parametrize("captions", ["one", "all"])
def test_pair_batches_resume_and_split_over_ranks_as_one_list(tmp_path, captions):
    pairs = uneven(tmp_path, [5] * 30)
    whole = PairBatches(pairs, 7, seed=3, captions=captions)
    whole.set_epoch(4)
    whole = list(whole)
    for world in (1, 2, 3):
        ranks = [pickle.loads(pickle.dumps(PairBatches(pairs, 7, 3, rank, world, captions)))
                 for rank in range(world)]
        for batches in ranks:
            batches.set_epoch(4, first_batch=2)
        for batch, *shares in zip(whole[2:], *ranks, strict=True):
            assert shares == [batch[rank::world] for rank in range(world)]
    again = PairBatches(pairs, 7, seed=3, captions=captions)
    orders = [list(again)]
    for epoch in (1, 4):
        again.set_epoch(epoch)
        orders.append([[c for _, c in batch] for batch in again])
    assert orders[2] == [[c for _, c in batch] for batch in whole] and orders[1] != orders[2]
    assert list(PairBatches(pairs, 7, seed=4, captions=captions)) != orders[0]


def test_all_captions_mix_so_that_images_meet_anew(tmp_path):
    """The captions of one image do not share their neighbours, as they would if shuffled once."""
    pairs = uneven(tmp_path, [5] * 200)
    mates = {}
    for batch in PairBatches(pairs, 20, seed=0, captions="all"):
        images = [pairs.owner[c] for _, c in batch]
        for image in images:
            mates.setdefault(image, []).extend(other for other in images if other != image)
    different = [len(set(others)) / len(others) for others in mates.values()]
    assert np.mean(different) > 0.75  # 95 draws of 199: 76 different ones by chance, 0.8


def test_any_two_images_meet_in_a_batch_sooner_or_later(tmp_path):
    pairs, met = uneven(tmp_path, [5] * 12), set()
    batches = PairBatches(pairs, 4, seed=0, captions="all")
    for epoch in range(8):
        batches.set_epoch(epoch)
        for batch in batches:
            images = {pairs.owner[c] for _, c in batch}
            met |= {(one, two) for one in images for two in images if one < two}
    assert len(met) == 12 * 11 / 2


def test_impossible_pair_batches_are_refused(tmp_path):
    pairs = uneven(tmp_path, [5, 5, 5])
    assert "is 0" in the_one_line(PairBatches, pairs, 1)
    assert "3 images" in the_one_line(PairBatches, pairs, 4)
    assert "one or all" in the_one_line(PairBatches, pairs, 2, captions="some")
    assert "rank 2" in the_one_line(PairBatches, pairs, 2, rank=2, world_size=2)


# -----------------------------------------------------------------------------
# Cache

def views(pairs, size=16):
    crop = Preprocess(size, train=True, seed=3)
    return [pairs.with_transform(crop)[(2, c)][0] for c in range(0, len(pairs), 3)]


def test_a_cache_gives_the_pixels_of_no_cache_where_sides_allow(tmp_path):
    pairs = open_pairs(table(tmp_path, 9, 2), "train")
    plain = views(pairs)
    for mode, workers in (("ram", 0), ("ram", 2), ("disk", 0), ("disk", 0)):
        cached = open_pairs(tmp_path / "pairs.csv", "train")
        assert cached.cache(mode, 16, tmp_path / "cache", workers=workers) is cached
        for one, two in zip(plain, views(pickle.loads(pickle.dumps(cached))), strict=True):
            assert torch.equal(one, two)
        part = cached.subset([5, 1])
        assert torch.equal(views(part)[0], views(pairs.subset([5, 1]))[0])
    assert len(os.listdir(tmp_path / "cache")) == 1
    small = open_pairs(tmp_path / "pairs.csv", "train").cache("ram", 8)
    assert {min(small[c][0].size) for c in range(18)} == {8}
    assert small[8][0].size == (10, 8)  # of 20 x 16
    assert open_pairs(tmp_path / "pairs.csv", "train").cache("none").pixels is None


def test_slabs_hold_every_image_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SLAB_BYTES", 2000)  # two or three images in each
    pairs = open_pairs(table(tmp_path, 9, 2, broken=[0]), "train")
    cached = open_pairs(tmp_path / "pairs.csv", "train").cache("ram", 16)
    assert len(cached.pixels.slabs) > 2 and "1 of 9" in cached.notes[-1]
    for one, two in zip(views(pairs), views(cached), strict=True):
        assert torch.equal(one, two)  # replacements too


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "foot"])
def test_a_damaged_cache_file_is_made_again(tmp_path, damage):
    pairs = open_pairs(table(tmp_path, 9, 2), "train")
    pairs.cache("disk", 16, tmp_path / "cache")
    (file,) = (tmp_path / "cache").iterdir()
    sound = file.read_bytes()
    content = bytearray(sound)
    if damage in ("flip", "foot"):
        content[100 if damage == "flip" else -9] ^= 1
    file.write_bytes({"cut": content[:-40], "empty": b""}.get(damage, content))
    again = open_pairs(tmp_path / "pairs.csv", "train").cache("disk", 16, tmp_path / "cache")
    assert file.read_bytes() == sound and os.listdir(tmp_path / "cache") == [file.name]
    assert torch.equal(views(again)[1], views(pairs)[1])
    stamp = file.stat().st_mtime_ns
    open_pairs(tmp_path / "pairs.csv", "train").cache("disk", 16, tmp_path / "cache")
    assert file.stat().st_mtime_ns == stamp  # a sound one is used


def test_a_cache_beyond_its_limit_gives_up_and_says_so(tmp_path):
    pairs = open_pairs(table(tmp_path, 9, 2), "train").cache("ram", 16, limit=4000)
    assert pairs.pixels is None and "read again at every use" in pairs.notes[-1]
    pairs.cache("disk", 16, tmp_path / "cache", limit=4000)
    assert pairs.pixels is None and os.listdir(tmp_path / "cache") == []
    assert "expected ram" in the_one_line(pairs.cache, "gpu")
    broken = open_pairs(table(tmp_path, 9, 2, broken=[1, 2]), "train")
    assert "2 of 9" in the_one_line(broken.cache, "ram", 16)


# -----------------------------------------------------------------------------
# Recall

def naive_recall(images, texts, owner, k):
    """Sort every list by (-score, index) in float64; scores that are no number go last."""
    scores = images.double() @ texts.double().T
    i2t, t2i = [], []
    for i in range(len(images)):
        order = sorted(range(len(texts)), key=lambda j: (scores[i, j].isnan().item(),
                                                         -scores[i, j].nan_to_num().item(), j))
        own = [r for r, j in enumerate(order) if owner[j] == i and not scores[i, j].isnan()]
        if i in owner:
            i2t.append(min(own, default=len(texts)))
    for j in range(len(texts)):
        order = sorted(range(len(images)), key=lambda i: (scores[i, j].isnan().item(),
                                                          -scores[i, j].nan_to_num().item(), i))
        lost = scores[owner[j], j].isnan()
        t2i.append(len(images) if lost else order.index(owner[j]))
    return [100 * np.mean(np.array(ranks) < k) for ranks in (i2t, t2i)], [
        np.median(ranks) + 1 for ranks in (i2t, t2i)]


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_recall_equals_sorting_in_float64_with_ties_and_uneven_captions(chunk):
    stream = np.random.default_rng(chunk)
    for trial in range(6):
        n = int(stream.integers(2, 30))
        owner = [i for i in range(n) for _ in range(int(stream.integers(0 if i else 1, 7)))]
        stream.shuffle(owner)
        # small whole numbers: every sum is exact and many scores are equal
        images, texts = (torch.from_numpy(stream.integers(-1, 2, (rows, 3))).float()
                         for rows in (n, len(owner)))
        if trial % 2:
            texts[stream.integers(len(owner))] = torch.nan
        found = recall_at_k(images, texts, owner, ks=(1, 3), chunk=chunk)
        for k in (1, 3):
            (i2t, t2i), medians = naive_recall(images, texts, owner, k)
            assert found[f"i2t_r{k}"] == pytest.approx(i2t), (trial, k)
            assert found[f"t2i_r{k}"] == pytest.approx(t2i), (trial, k)
        assert [found["i2t_median_rank"], found["t2i_median_rank"]] == medians
        recalls = [found[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in (1, 3)]
        assert found["rsum"] == pytest.approx(sum(recalls))
        assert found["mean_recall"] == pytest.approx(np.mean(recalls))


def test_recall_of_right_and_of_collapsed_features():
    owner = [i for i in range(50) for _ in range(5)]
    images = torch.eye(50)
    found = recall_at_k(images, images[owner], torch.tensor(owner))
    assert set(found) == {*(f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)),
                          "mean_recall", "rsum", "i2t_median_rank", "t2i_median_rank"}
    assert found["mean_recall"] == 100 and found["rsum"] == 600 and found["t2i_median_rank"] == 1
    same = recall_at_k(torch.ones(50, 4), torch.ones(250, 4), owner)  # all ties: no free hits
    assert same["t2i_r1"] == 2 and same["i2t_r5"] == 2 and same["i2t_r10"] == 4
    lost = recall_at_k(torch.full((50, 4), torch.nan), torch.ones(250, 4), owner)
    assert lost["rsum"] == 0
    for bad in ([0] * 249, [50] * 250, [-1] * 250):
        assert "expected (N, D)" in the_one_line(recall_at_k, images, images[owner], bad)


def test_a_dead_worker_is_named_with_the_image_it_was_reading(shared):
    pairs = open_pairs("flickr8k", "val", shared).subset(range(8)).with_transform(Preprocess(32))
    pairs.picture = lambda position: os._exit(1)
    for dataset in (pairs, pairs.image_items()):
        loader = make_loader(dataset, 4, shuffle=False, workers=1)
        with pytest.raises(LostWorker, match=re.escape(pairs.paths[0])):
            list(loader)
