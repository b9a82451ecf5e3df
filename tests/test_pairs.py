"""captions.py and pairs.py: every captioned source, the set, its batches, cache and shards."""
import base64
import collections
import csv
import io
import itertools
import json
import os
import pickle
import random
import shutil
import tarfile
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
from helpers import attempt, cli, Payload, processes, refused, run_main
from PIL import Image

from captions import list_pairs
from data import open_dataset, Preprocess, sample_seed
from device import start
from pairs import (FeatureLoader, identities, make_pair_loader, Mixture, open_pairs, PairBatches)
from tools import make_shards

SPLITS = ("train", "val", "test")


def picture(seed=0, kind="png"):
    out, draw = io.BytesIO(), np.random.default_rng(seed)
    Image.fromarray(draw.integers(0, 256, (16, 16 + seed % 5, 3), np.uint8)).save(out, kind)
    return out.getvalue()


def content(value):
    return (picture(value) if isinstance(value, int) else
            value.encode() if isinstance(value, str) else value)


def write(folder, files):
    """{name: text, bytes, or the seed of a picture} -> the folder."""
    for name, value in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content(value))
    return folder


def table(folder, images=10, captions=2, broken=()):
    """A CSV that gives each picture some captions, in all three splits."""
    rows = [f"{i}.png,caption {j} of {i},{split}" for i in range(images) for j in range(captions)
            for split in SPLITS]
    write(folder, {f"{i}.png": "no image" if i in broken else i for i in range(images)})
    return write(folder, {"pairs.csv": "\n".join(["image,caption,split", *rows])})


def uneven(folder, counts):
    """A set whose image i has counts[i] captions; no image files."""
    rows = [{"image": f"{i}.png", "captions": [f"text {i} {j}" for j in range(count)]}
            for i, count in enumerate(counts)]
    write(folder, {"uneven.jsonl": "\n".join(map(json.dumps, rows))})
    return open_pairs(folder, "train", whole=True)


def rows_of(pairs):
    return [(pairs.paths[owner], text) for owner, text in zip(pairs.owner, pairs.captions)]


def everything(source, **options):
    """The rows of a source without splits, its files checked."""
    pairs = open_pairs(source, "train", whole=True, **options)
    pairs.check_files()
    return rows_of(pairs)


def said(pairs, *words):
    return all(any(word in note for note in pairs.notes) for word in words)


# -----------------------------------------------------------------------------
# Sources

SCENES = [(f"p{i}.png", text) for i, text in enumerate(
    ("scene #1 here", 'the "best" view', "wet, happy and brown", "café by the sea"))]


def lines(form, head="", scenes=SCENES):
    return head + "\n".join(form.format(*scene) for scene in scenes)


def as_csv(*head, mark=",", end="\n", start=""):
    out = io.StringIO(start, newline="")
    out.seek(len(start))
    csv.writer(out, delimiter=mark, lineterminator=end).writerows([head, *SCENES])
    return out.getvalue()


JSON_LINES = "\n".join(json.dumps({"image": name, "caption": text}) for name, text in SCENES)
SOURCES = {
    "csv": {"any.csv": as_csv("image", "caption")},
    "commas without quotes": {"a.csv": lines("{},{}", "image,caption\n")},
    "tsv of open_clip": {"train.csv": lines("{}\t{}", "filepath\ttitle\n")},
    "tsv of pandas": {"a.tsv": as_csv("path", "text", mark="\t")},
    "empty columns": {"a.csv": as_csv("image", "caption").replace("\n", ",,\n")},
    "semicolons, BOM, CRLF": {"a.csv": as_csv("Image", "Caption", mark=";", end="\r\n",
                                              start="\ufeff")},
    "kaggle's flickr8k": {"captions.txt": as_csv("image", "caption")},
    "json lines": {"a.jsonl": JSON_LINES}, "json lines in .json": {"a.json": JSON_LINES},
    "json list": {"a.json": "[" + JSON_LINES.replace("\n", ",") + "]"},
    "imagefolder": {"metadata.csv": as_csv("file_name", "text")},
    "token": {"Flickr8k.token.txt": lines("{}#0\t{}"),
              "Flickr8k.lemma.token.txt": lines("{}#0\tlemma {}")},
    "kaggle's flickr30k": {"results.csv": lines(
        "{}| 0| {}", "image_name| comment_number| comment\n").replace("0| café", "4   café")},
    "flickr30k, a log": {"results.csv": lines("{}| 0| {}"), "log.csv": "epoch,loss\n1,2\n"},
    "metadata beside, a log": {"metadata.csv": as_csv("file_name", "text"), "a.csv": "a,b\n1,2\n"},
    "flickr30k-cn": {"flickr30kzhb.caption.txt": lines("{}#zhb#0 {}")},
    "texts beside": {"0_stats.json": "{}", "dataset_info.json": "{}", **{
        name.replace("png", "txt"): text for name, text in SCENES}},
    "TEXTS beside": {name.replace("png", "TXT"): text for name, text in SCENES},
    "karpathy": {"dataset_any.json": json.dumps({"images": [
        {"filename": name, "split": "restval", "sentences": [{"raw": text}]}
        for name, text in SCENES]})},
    "coco": {"annotations/captions_train2014.json": json.dumps({
        "images": [{"id": i, "file_name": name} for i, (name, _) in enumerate(SCENES)],
        "annotations": [{"image_id": i, "caption": text} for i, (_, text) in enumerate(SCENES)]})}}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("place", ["", "Images/", "deep/images/", "a.zip"])
def test_one_set_in_every_layout_with_its_images_in_every_place(tmp_path, name, place):
    files, beside = SOURCES[name], "beside" in name or name == "imagefolder"
    folder = write(tmp_path / "[s]et", files)
    if place == "a.zip" and not beside:
        with zipfile.ZipFile(folder / "a.zip", "w") as archive:
            for i, (image, _) in enumerate(SCENES):
                archive.writestr(f"a/{image}", picture(i))
    else:
        write(folder, {place * (not beside) + image: i for i, (image, _) in enumerate(SCENES)})
    assert everything(folder) == everything("[s]et", data_dir=tmp_path) == SCENES
    lone = shutil.make_archive(tmp_path / "lone", "zip", tmp_path, "[s]et")
    if place in ("", "Images/"):
        assert [text for _, text in everything(lone)] == [text for _, text in SCENES]
    if len(files) == 1:
        assert everything(folder / next(iter(files))) == SCENES
        assert everything(folder, caption_file=next(iter(files))) == SCENES


def test_flickr8k_has_the_published_counts_and_the_notebooks_split(shared):
    sets = [open_pairs("flickr8k", split, shared) for split in SPLITS]
    assert [(len(s.paths), len(s)) for s in sets] == [(6000, 30000), (1000, 5000), (1000, 5000)]
    sets[0].check_files()
    assert said(sets[0], "91 images") and sets[0].texts_of(0) == sets[0].captions[:5]
    chinese = open_pairs("flickr8k", "train", shared, caption_file="flickr8kzhc.caption.txt")
    assert len(chinese) == 30000 and chinese.captions[0] == "一个穿着泳装的女人躺在海水里。"
    found = open_pairs("flickr8k", "test", shared, "simple-clip")
    text = (shared / "flickr8k" / "Flickr8k.token.txt").read_text("utf-8")
    rows = [line.partition("#")[0] for line in text.splitlines() if "2258277193" not in line]
    np.random.seed(42)  # the lines of the simple-CLIP notebook: 5 rows an image
    valid = set(np.random.choice(np.arange(0, 8091), size=int(0.2 * 8091), replace=False))
    assert [found.paths[i] for i in found.owner] == [
        name for i, name in enumerate(rows) if i // 5 in valid]


def test_coco_as_folders_as_published_zips_and_as_the_data_folder_itself(shared, tmp_path):
    for name in ("train2017", "val2017", "annotations"):
        file = "annotations_trainval2017" if name == "annotations" else name
        shutil.make_archive(tmp_path / file, "zip", shared / "coco_mini", name)
        write(tmp_path, {f"._{file}.zip": "of a Mac"})
    for split, images, captions in (("train", 80, 400), ("val", 79, 395), ("test", 79, 395)):
        found = [open_pairs("coco_mini", split, shared), open_pairs(tmp_path, split),
                 open_pairs("coco", split, tmp_path)]  # as in the README of HF's run_clip
        assert {(len(s.paths), len(s), s.fingerprint) for s in found} == {
            (images, captions, found[0].fingerprint)}
        found[1].check_files()
        assert np.array_equal(found[0][7][0], found[1][7][0])


def test_splits_come_from_columns_file_names_folders_and_lists(tmp_path):
    one = write(tmp_path / "column", {"a.csv": "image,caption,Usage\n1.png,None,train\n2.png,NA,dev"
                                               '\n3.png,"two\nlines",\n1.png,w,PublicTest\n4.png,,\n'})
    train = open_pairs(one, "train")
    assert rows_of(train) == [("1.png", "None"), ("3.png", "two lines")]
    assert open_pairs(one, "test").paths == ["2.png", "1.png"]
    assert said(train, "1 rows without image or caption", "no split", "val is used as test",
                "1 images of val or test are in train too")
    for word in ("train", "dev", "test"):
        write(tmp_path, {
            f"paths/data/{word}/metadata.csv": "file_name,text\n1.png,not the nearest",
            f"names/{word}_captions.csv": f"image,caption\n{word}/1.png,a picture",
            f"hf/data/{word}/metadata.jsonl": '{"file_name": "./1.png", "text": "a picture"}',
            f"texts/{word}/1.png": 1, f"texts/{word}/1.txt": "a picture\n\nanother one",
            f"jsons/{word}/1.png": 1, f"jsons/{word}/1.json": '{"caption": "a picture"}'})
    write(tmp_path / "paths", {"a.csv": "image,caption\n" + "\n".join(
        f"./{word}/1.png,a picture" for word in ("train", "dev", "test"))})
    for word, split in (("train", "train"), ("dev", "val"), ("test", "test")):
        for name in ("names", "hf", "texts", "jsons", "paths"):
            found = open_pairs(tmp_path / name, split)
            assert found.paths == ["data/" * (name == "hf") + f"{word}/1.png"]
            assert found.captions[0] == "a picture"
            assert said(found, "several") == (name == "texts")


def test_images_of_one_name_are_those_in_the_folder_of_their_split(tmp_path):
    for i, word in enumerate(("train2017", "val2017")):
        coco = {"images": [{"id": 1, "file_name": "1.png"}],
                "annotations": [{"image_id": ("1", 1.0)[i], "caption": f"number {i}"}]}
        write(tmp_path, {f"{word}/1.png": i, f"annotations/captions_{word}.json": json.dumps(coco)})
    for split, i, file in (("train", 0, ""), ("val", 1, ""), ("test", 1, ""),
                           ("val", 1, "annotations/captions_val2017.json")):
        found = open_pairs(tmp_path / file, split)
        assert found.captions == [f"number {i}"] and found.store.read("1.png") == picture(i)
        assert said(found, f"captions are read from {file or 'annotations/captions_train2017'}")
    write(tmp_path, {"images/1.png": 2})  # not the only one of all the names
    assert open_pairs(tmp_path, "val").store.read("1.png") == picture(1)


def test_images_without_splits_are_where_they_are_found_first(tmp_path):
    rows = "image,caption\n" + "".join(f"{i}.png,a dog\n" for i in range(40))
    for root, first, other in (("my_test", "", "masks/"), ("x", "images/", "depth/"),
                               ("y", "train_images/", "train_masks/"), ("z", "F8k/", "F8k_256/")):
        for i in range(40):
            write(tmp_path / root, {f"{first}{i}.png": 0, f"{other}{i}.png": 1, "a.csv": rows})
        if root != "z":  # one lost image does not make a folder of masks the better one
            (tmp_path / root / f"{first}7.png").unlink()
        for split in SPLITS:
            assert open_pairs(tmp_path / root, split).store.read("1.png") == picture(0)


def test_a_lone_table_takes_the_folder_of_its_split_and_does_not_guess(tmp_path):
    rows = "".join(f"{i}.png,{'cat' if i % 2 else 'dog'}\n" for i in range(8))
    for i, word in enumerate(("test", "train")):
        write(tmp_path, {f"{word}/{n}.png": i for n in range(8)})
    for kind in ("label", "caption"):
        opened = open_dataset if kind == "label" else open_pairs
        write(tmp_path, {f"{name}.csv": f"image,{kind}\n{rows}" for name in ("train", "rows")})
        found = opened(tmp_path / "train.csv", "train", whole=True)
        assert found.store.read("1.png") == picture(1)
        refused(lambda: opened(tmp_path / "rows.csv", "train"), tmp_path / "test", tmp_path / "train")


@pytest.mark.parametrize("text, caption", [
    ("image,caption,set\n0.png,a dog,City\n1.png,a cat,Star Wars\n", "a dog"),
    ('image,caption\n0.png," ""a"" dog"\n1.png,a cat\n', '"a" dog'),
    ('image\tcaption\n0.png\t "a dog"\n1.png\ta "cat\n', '"a dog"'),
    ('{"image": "0.png", "caption": "a dog", "exif": {"Make": 1, "make": 2}}\n'
     '{"image": "1.png", "caption": "a cat"}\n', "a dog")])
def test_what_only_looks_like_a_fault_is_read(tmp_path, text, caption):
    write(tmp_path, {"a.csv": text})
    assert open_pairs(tmp_path / "a.csv", "train", whole=True).captions[0] == caption


def test_a_shard_of_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write(tmp_path / "in", {f"train/{name}{i}.{kind}": value for i in range(2)
                            for kind, value in (("png", i), ("txt", f"text {i}"))})
    attempt("tools.make_shards", tmp_path / "in", "--out", tmp_path / "out").ok()
    assert {*open_pairs(tmp_path / "out", "train").captions} == {"text 0", "text 1"}


@pytest.mark.parametrize("top", ["", "images/"])
def test_splits_stand_in_the_folders_of_paths(tmp_path, top):
    for kind, opened in (("label", open_dataset), ("caption", open_pairs)):
        write(tmp_path, {"a.csv": f"image,{kind}\n" + "".join(
            f"{top}{word}/{i}.png,{name}\n" for word in ("train", "test")
            for i, name in enumerate(("cat", "dog")))})
        for word in ("train", "test"):
            assert opened(tmp_path / "a.csv", word).paths == [f"{top}{word}/{i}.png" for i in (0, 1)]


def test_new_images_move_no_old_ones(tmp_path):
    before = {}
    for count in (300, 350):
        uneven(tmp_path, [1] * count)
        parts = {split: set(open_pairs(tmp_path, split).paths) for split in SPLITS}
        assert sum(map(len, parts.values())) == count and len(parts["train"]) > 210
        assert all(len(part) > 10 and before.get(split, set()) <= part
                   for split, part in parts.items())
        before = parts


# -----------------------------------------------------------------------------
# What is not understood is refused

def no_captions(folder, files, *names):
    refused(lambda: open_pairs(write(folder, {**files, ".x": ""}), "train", whole=True), *names)


IMAGES = {"images/a.jpg": 1, "images/b.jpg": 2}


@pytest.mark.parametrize("name, content, kind", [
    ("train-00000-of-00001.parquet", b"PAR1\x15\xff", "Parquet"),
    ("0.tar.gz", b"\x1f\x8b\x08\0 packed", "packed"), ("0.tar", b"BZh91AY packed", "packed"),
    ("0.tar", b"PK\3\4 no tar" * 99, "damaged"), ("captions.csv", b"\x1f\x8b", "gzip"),
    ("metadata.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
    ("a.csv", b"PK\3\4\0", "Excel"), ("a.jsonl", b"ARROW1\0\0", "Arrow"),
    ("a.csv", "image,text\n".encode("utf-16"), "UTF-16"), ("a.json", b"<!DOCTYPE html>", "web page"),
    ("a.csv", "a,b\n".encode("utf-16-le"), "UTF-8"), ("a.tsv", "图像,文字\n".encode("gbk"), "UTF-8")])
def test_a_file_whose_type_the_message_misnames(tmp_path, name, content, kind):
    no_captions(tmp_path, {name: content}, name, kind)
    refused(lambda: open_pairs(tmp_path / name, "train"), name)


@pytest.mark.parametrize("text, names", [
    ("", []), ("image,caption\n", []), ("title,filepath\na dog, wet,a.png\n", ["line 2"]),
    ('image,caption\na.png,"best view\nb.png,x\nc.png,"y\n', ["line 2"]),
    ("image\tcaption\na.png\ta\tb\n", ["line 2"]), ("image,caption\na.png\n", ["line 2"]),
    ('image,caption\na,b\nc,"begins\nd.jpg,e\nf.jpg,ends"\n', ["line 3"]),
    ('image, caption\na,b\nc, "x, y"\n', ["line 3"]), ('image, caption\na, "b"\n', ["line 2"]),
    ('id\timage\tcaption\n1\t1.jpg\t"a\n2\t2.jpg\tb"\n', ["line 2"]),  # a stray pair of quotes
    ('id,image,caption\n1,1.avif,"a\n2,2.avif,b"\n', ["line 2"]),
    ('{"image": "a", "caption": "b", "Caption": "c"}\n', ["line 1"]),
    ('[{"image": "a", "caption": "b", "caption": "c"}]', ["caption"]), ("image|caption\na|b\nc,d|e\n", ["line 3"]),
    ("image,caption,,\na.png,a dog,,\nb.png,a dog, brown, wet\n", ["line 3"]),
    ("image,caption,Caption\n1,2,3\n", ["two columns"]), ('{"a": 1}\n\n{"a": \n', ["line 3"]),
    ("picture,words\na.png,a cat\n", ["picture", "--image-column"]),
    ("image,label\na.png,cat\n", ["label", "--caption-column"]),
    ("image,title,text\na.png,a,b\n", ["title", "--caption-column"]),  # which one is not guessed
    ("images/0.jpg,a nice view\nimages/1.jpg,another\n", ["a nice view"])])
def test_a_row_that_does_not_fit_its_header(tmp_path, text, names):
    no_captions(tmp_path, {"a.csv": text}, "a.csv", *names)


@pytest.mark.parametrize("files, names", [
    ({}, ["--layout classes"]), (IMAGES, ["--layout classes"]),
    ({**IMAGES, "text/a.txt": "a cat", "text/b.txt": "a dog"}, ["text/a.txt"]),
    ({**IMAGES, "notes.xlsx": b"PK\3\4"}, ["notes.xlsx"]),
    ({**IMAGES, "labels.json": '{"a": 1}'}, ["labels.json"]),
    ({**IMAGES, "annotations/instances_val2017.json": '{"images": []}'}, ["instances_val2017"]),
    ({**IMAGES, "images/x.txt": "a cat"}, ["images/x.txt"]),
    ({"a.json": json.dumps({f"{i}.jpg": ["a cat"] for i in range(999)})}, ["a.json", "0.jpg"]),
    ({"annotations/captions_val2017.json": '{"images": [{"id": 1}], "annotations": []}'},
     ["captions_val2017.json"]),
    ({"a.csv": "image,caption\na.png,x y", "captions.txt": "image,caption\na.png,x y"},
     ["a.csv", "captions.txt", "--caption-file"]),
    ({"captions.txt": "image,caption\na.png,x y", "results.csv": "image,caption\na.png,y x"},
     ["captions.txt", "results.csv", "--caption-file"]),
    ({"captions.csv": "image,caption\na.png,x y", "metadata.csv": "file_name,title\na.png,y x"},
     ["captions.csv", "metadata.csv", "--caption-file"]),
    ({"x_imgs.tsv": "1\tQQ=="}, ["x_texts.jsonl"]),
    ({"a.csv": "image,caption\na.png,\nb.png,nan\n"}, ["0 captions"]),
    ({"a.csv": "image,caption,split\na.png,x y,train\nb.png,x y,best"}, ["a.csv", "line 3"]),
    ({"a.csv": "image,caption\na.png,b.png\nb.png,c.png\n"}, ["b.png"]),        # columns mixed up
    ({"a.csv": "image,text\na.png,3\nb.png,17\n"}, ["3"]),                       # labels
    ({"a.csv": "image,text\na.png,\"['a dog', 'a cat']\"\n"}, ["a dog"]),        # Python's lists
    ({"a.csv": "image,text\na.png,b'a dog'\nb.png,\"('a dog', 'x')\"\n"}, ["a dog"]),
    ({"a.json": f"[{'1' * 5000}]"}, ["a.json"]),                                 # too long an integer
    ({"a.tsv": "image\tcaption\na\thttp://x/a.jpg\nb\thttps://y.z\n"}, ["http"]),
    ({"a.png": 1, "a.txt": "0 0.5 0.5 0.1 0.1\n1 0.2 0.2 0.3 0.3"}, ["0.5"]),    # boxes
    ({"a.csv": 'image,caption\na.png,"{""en"": ""b c""}"\n'}, ["a.csv", "line 2"]),
    ({"a.png": 1, "a.jpg": 1, "a.txt": "a photo and its mask"}, ["a.jpg", "a.txt"]),
    ({"dataset_a.json": '{"images": [{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b"}],'
                        '"annotations": [{"image_id": 1, "caption": "b c"}]}'}, ["dataset_a.json"]),
    ({"a.jsonl": '{"image": {"path": "a.png"}, "caption": "b c"}'}, ["a.jsonl", "line 1"]),
    ({"a.jsonl": '{"image": "a.png", "caption": [["b c"]]}'}, ["a.jsonl", "line 1"]),
    ({"a.jsonl": '{"image": "a", "caption": "b c"}\n["a"]'}, ["a.jsonl", "line 2"]),
    ({"a.token": "a.jpg#0\tx y\nno caption here\n"}, ["a.token", "line 2"]),
    ({"dataset_a.json": '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": '
                        '[{"image_id": 1, "caption": ["b c"]}]}'}, ["dataset_a.json"]),
    ({"x_imgs.tsv": "no tab", "x_texts.jsonl": "{}"}, ["x_imgs.tsv", "line 1"]),
    ({"x_imgs.tsv": "1\tQQ==", "x_texts.jsonl": '{"text": "a b", "image_ids": 3}'},
     ["x_texts.jsonl", "line 1"])])
def test_a_folder_or_a_cell_that_holds_something_else(tmp_path, files, names):
    no_captions(tmp_path, files, *names)


@pytest.mark.parametrize("name", ["a_imgs.tsv", "MUGE/a_imgs.tsv", "MUGE/a.tar"])
def test_what_is_not_read_inside_a_zip(tmp_path, name):
    packed = shutil.make_archive(tmp_path / "set", "zip", write(tmp_path / "set", {name: ""}))
    refused(lambda: open_pairs(packed, "train"), "set.zip", name)


def test_cells_with_lists_and_rows_without_a_partner(tmp_path):
    source = write(tmp_path / "lists", {"a.csv": 'image,captions\n1.png,"[ ""one"", ""two""]"\n'
                                                 '2.png,"[sic] one, two"\n3.png,nan\n./4.png,17\n'
                                                 'x/..//4.png,<NA>\n5.png,[]\n'})
    found = open_pairs(source, "train", whole=True)
    assert rows_of(found) == [("1.png", "one"), ("1.png", "two"), ("2.png", "[sic] one, two"),
                              ("4.png", "17")]
    assert said(found, "3 rows without", "1 hold no words")
    half = write(tmp_path / "half", {"h.jsonl": '{"image": "\\ud83d.png", "caption": "half"}\n'})
    assert sum(map(len, list_pairs(half).rows.values())) == 1
    coco = {"images": [{"id": i, "file_name": f"a\\{i}.png"} for i in range(2)],
            "annotations": [{"image_id": i, "caption": f"number {i}"} for i in (1, 2, 2)]}
    write(tmp_path / "coco", {"annotations/captions_train2017.json": json.dumps(coco)})
    found = open_pairs(tmp_path / "coco", "train")
    assert rows_of(found) == [("a/1.png", "number 1")] and said(found, "3 rows without")


def test_class_folders_are_captions_only_when_asked_for(tmp_path):
    write(tmp_path, {f"{name}/{i}.png": i for name in ("red_fox", "owl") for i in range(10)})
    found = open_pairs(tmp_path, "train", layout="classes")
    found.check_files()
    assert all(text == ("a photo of a owl." if "owl" in path else "a photo of a red fox.")
               for path, text in rows_of(found)) and len(set(found.captions)) == 2


def test_names_splits_and_columns_that_are_not_there(tmp_path):
    refused(lambda: open_pairs("flikr", "train", tmp_path), "flikr")
    refused(lambda: open_pairs(tmp_path, "train", layout="cocoa"), "cocoa")
    refused(lambda: open_pairs(f"{tmp_path}/x-{{00..04}}.tar", "train"), "x-00.tar")
    source = write(tmp_path, {"a.csv": "pic,words,split\na.png,a b,train", "a.png": 1})
    named = {"image_column": "PIC", "caption_column": "words"}
    assert everything(source, **named) == [("a.png", "a b")]
    refused(lambda: open_pairs(source, "val", **named), "val")
    refused(lambda: open_pairs(source, "trian", **named), "trian")
    refused(lambda: open_pairs(source, "train", caption_file="none.csv"), "none.csv")
    refused(lambda: open_pairs(source, "train", layout="webdataset"), "webdataset", "*.tar")
    for name in ("coco", "kaggle's flickr30k", "texts beside"):  # are no tables
        refused(partial(open_pairs, write(tmp_path / name, {**SOURCES[name], "p0.png": 0}), "train",
                        caption_column="words"), "--caption-column")


def test_a_hash_holds_out_no_image_or_two_and_more(tmp_path):
    for count in range(2, 30):
        rows = [f"{i}.png,number {i}" for i in range(count)]
        source = list_pairs(write(tmp_path / str(count), {"a.csv": "image,caption\n" + "\n".join(rows)}))
        assert 1 not in map(len, source.rows.values()) and sum(map(len, source.rows.values())) == count


PIECES = ("a", "b c", "é", ",", "\t", ";", '"', '""', "\n", "\r\n", "\0", "|", "#0", " ", ".jpg",
          "\u2028", "'", "x" * 70_000)


def strict(text, mark):
    """RFC 4180 -> rows, None if it is not that. Blank rows are skipped."""
    try:
        rows = list(csv.reader(io.StringIO(text.replace("\r\n", "\n"), newline=""),
                               delimiter=mark, strict=True))
    except csv.Error:
        return None
    return [row for row in rows if "".join(row).strip()]


def test_a_fuzzed_table_is_read_as_a_strict_reader_reads_it_or_refused_with_its_line(tmp_path):
    """As quoted where that is well formed; else a TSV without quoting, and a table of two columns
    with bare commas in its captions."""
    draw, seen = random.Random(0), collections.Counter()
    for trial in range(600):
        mark, quote = draw.choice(",;\t"), draw.random() < 0.6
        rows = [["image", "caption", "note"][:draw.choice((2, 3))]]
        for i in range(draw.randrange(1, 5)):
            width = len(rows[0]) + draw.choice((0, 0, 0, 0, 0, 0, 1, -1))
            rows.append([f"{i}.jpg", *("".join(draw.choices(
                PIECES, [6] * 3 + [1] * 15, k=draw.randrange(1, 4))) for _ in range(width - 1))])
        out = io.StringIO(newline="")
        csv.writer(out, delimiter=mark, lineterminator="\n").writerows(rows)
        text = out.getvalue() if quote else "\n".join(mark.join(row) for row in rows)
        write(tmp_path, {"a.csv": draw.choice(("", "\ufeff")) + text})
        try:
            found = rows_of(open_pairs(tmp_path, "train", whole=True))
        except ValueError as error:  # DataError; anything else is a fault
            assert error.exit_code == 2 and "\n" not in str(error)
            assert "line " in str(error) or "captions of images" in str(error)
            seen["refused"] += 1
            continue
        rows = strict(text, mark)
        if rows is None or len({*map(len, rows)}) > 1:
            rows = ([line.split(mark) for line in text.replace("\r\n", "\n").split("\n")
                     if line.strip()] if mark == "\t" else
                    [[row[0], mark.join(row[1:])] for row in rows])
        rows = [(row[0].strip(), " ".join(row[1].split())) for row in rows[1:]]
        assert found == [row for row in rows if all(row)], (trial, text)
        seen["quoted" if quote else "plain"] += 1
    assert len(seen) == 3 and min(seen.values()) > 30, seen


# -----------------------------------------------------------------------------
# Shards

def tar(path, members):
    """Members as `write` takes them, or a dict of fields of a TarInfo."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as out:
        for name, value in members:
            info, fields = tarfile.TarInfo(name), value if isinstance(value, dict) else {}
            held = b"" if fields else content(value)
            info.size = len(held)
            for field in fields.items():
                setattr(info, *field)
            out.addfile(info, io.BytesIO(held))
    return path


def test_shards_made_by_the_tool_are_the_pairs_they_were_made_of(tmp_path):
    rows = [{"image": f"{i}.{'bmp' if i == 3 else 'png'}", "captions": [f"one {i}", f"two\n{i}"],
             "split": "train" if i < 25 else "val"} for i in range(30)]
    write(tmp_path, {row["image"]: picture(i, row["image"][-3:]) for i, row in enumerate(rows)})
    write(tmp_path, {"t.jsonl": "\n".join(map(json.dumps, rows))})
    made, command = tmp_path / "tars", ("tools.make_shards", tmp_path / "t.jsonl", "--out",
                                        tmp_path / "tars", "--per-shard", 10)
    pattern = f"{made}/train-{{000000..000002}}.tar"
    assert pattern in cli("-m", *command).ok().out
    names = [f"train-00000{i}.tar" for i in range(3)]
    assert sorted(os.listdir(made)) == [*names, "val-000000.tar"]
    source = open_pairs(tmp_path / "t.jsonl", "train")
    for where in (made, pattern, "::".join(f"{made}/{name}" for name in names)):
        found = open_pairs(where, "train")
        found.check_files()
        assert found.captions == source.captions and found.owner == source.owner
        assert all(np.array_equal(found[c][0], source[c][0]) for c in range(50))
    assert found.store.read(found.paths[0]) == picture(0) and len(open_pairs(made, "test")) == 10
    refused(attempt(*command), "--out")
    shutil.rmtree(made)
    with pytest.MonkeyPatch.context() as patch:  # the third shard fails
        write_shard = make_shards.write_shard
        patch.setattr(make_shards, "write_shard", lambda *rest: (
            1 / ("002" not in rest[-1].name) and write_shard(*rest)))
        with pytest.raises(ZeroDivisionError):
            run_main(make_shards, *command[1:])
    refused(lambda: open_pairs(made, "train"), made)
    assert attempt(*command).ok() and open_pairs(made, "train").captions == source.captions
    refused(attempt("tools.make_shards", tmp_path, "--out", tmp_path / "t.jsonl"), "--out")
    broken = table(tmp_path / "broken", broken=(3,))
    assert "train: 9 images" in attempt("tools.make_shards", broken, "--out", tmp_path / "x").ok().out


def test_a_hostile_tar_gives_its_sound_samples_and_writes_nothing(tmp_path):
    tar(tmp_path / "tars" / "00.tar", {
        "../out.png": 1, "../out.txt": "out of it", "/abs.png": 1, "/abs.txt": "abs b",
        "link.png": {"type": tarfile.SYMTYPE, "linkname": "/etc/hostname"}, "link.txt": "a link",
        "hard.png": {"type": tarfile.LNKTYPE, "linkname": "../../x"},
        "node.png": {"type": tarfile.CHRTYPE}, "dir": {"type": tarfile.DIRTYPE},
        "dir/good.PNG": 2, "dir/good.txt": " a\n good\tone ", "js.png": 3,
        "js.json": '{"caption": "from json"}', "many.png": 3, "many.txt": "one of many",
        "many.json": '{"captions": ["first one", "second one"]}', "no.png": 5, "no.txt": "  ",
        "bad.png": 4, "bad.json": '{"caption": ', "odd.png": 4, "odd.txt": b"caf\xe9 a"}.items())
    found = open_pairs(tmp_path / "tars", "train", whole=True)
    assert rows_of(found) == [("00.tar:dir/good.PNG", "a good one"), ("00.tar:js.png", "from json"),
                              ("00.tar:many.png", "first one"), ("00.tar:many.png", "second one")]
    assert said(found, "3 images without a caption") and found[1][0].size == (19, 16)
    assert sorted(os.listdir(tmp_path)) == ["tars"]
    tar(tmp_path / "joined.tar", [("a.png", 1), ("a.txt", "one"), ("a.png", 2), ("a.txt", "two")])
    refused(lambda: open_pairs(tmp_path / "joined.tar", "train"), "joined.tar", "a.png")


@pytest.mark.parametrize("damage", ["in a file", "in a header", "between", "garbage", "size"])
def test_a_damaged_shard_gives_what_lies_before_the_damage(tmp_path, damage):
    file = tar(tmp_path / "0.tar", [member for i in range(5) for member in (
        (f"{i}.txt", f"caption {i}"), (f"{i}.png", i))])
    with tarfile.open(file) as whole:
        third = whole.getmember("3.txt").offset
    held = bytearray(file.read_bytes())
    if damage == "garbage":
        held[third:third + 512] = b"\x07" * 512
    elif damage == "size":
        held[third + 124:third + 136] = b"\xff" * 12
    else:
        held = held[:third + {"in a file": 1300, "in a header": 300, "between": 0}[damage]]
    file.write_bytes(held)
    found = open_pairs(file, "train", whole=True)
    assert found.captions == ["caption 0", "caption 1", "caption 2"]
    assert said(found, "0.tar is damaged") and found[2][0].size == (18, 16)


# -----------------------------------------------------------------------------
# Chinese-CLIP

TEXTS = [(5, "黑色的猫", [3]), (6, "三只猫", [3, 1, 20]), (7, "红色的猫", [1]), (8, "狗和鸟", []),
         (9, "红色的猫", [20, 11])]
POOL = [3, 1, 20, 11, 100, 7]  # 100 and 7 have no text
PAIRS = [(image, text) for _, text, images in TEXTS for image in images]


def write_tsv(folder, word="train", ends=("texts", "text_id", "text", "image_ids"), hidden=False):
    end, *keys = ends
    records = [dict(zip(keys[:2 if hidden else 3], row)) for row in TEXTS]
    return write(folder, {
        f"{word}_imgs.tsv": b"".join(b"%d\t%s\r\n" % (i, base64.b64encode(picture(i)))
                                     for i in POOL),
        f"{word}_{end}.jsonl": "\n".join(map(json.dumps, records))})


def write_lmdb(folder, word="train", pairs=None):
    lmdb = pytest.importorskip("lmdb", reason="lmdb is not installed")
    pairs = pairs or [pickle.dumps((image, i, text)) for i, text, images in TEXTS
                      for image in images]
    for part, entries in (("pairs", {"num_samples": b"%d" % len(pairs), **dict(enumerate(pairs))}),
                          ("imgs", {"num_images": b"6", **{
                              i: base64.urlsafe_b64encode(picture(i)) for i in POOL}})):
        (folder / word / part).mkdir(parents=True)
        with lmdb.open(str(folder / word / part), map_size=1 << 24) as made:
            with made.begin(write=True) as change:
                for key, value in entries.items():
                    change.put(str(key).encode(), value)
    return folder


def test_tsv_and_lmdb_give_the_same_pairs_and_pixels(tmp_path):
    folder = write_lmdb(write_lmdb(tmp_path / "muge" / "lmdb"), "valid")
    tsv = write_tsv(tmp_path / "tsv")
    for source in (tsv, tsv / "train_imgs.tsv", folder, folder.parent, folder / "train"):
        found = open_pairs(source, "train", whole=True)
        found.check_files()
        assert found.name in ("tsv", "train_imgs", "muge")
        assert [(int(path.rpartition(":")[2]), text) for path, text in rows_of(found)] == PAIRS
        assert all(np.array_equal(found[c][0], Image.open(io.BytesIO(picture(image))))
                   for c, (image, _) in enumerate(PAIRS))
        view = found.with_transform(Preprocess(16))  # a worker opens it for itself
        one, two = (next(iter(make_pair_loader(view, 4, workers=workers))) for workers in (0, 1))
        assert all(map(torch.equal, one, two))
    assert said(open_pairs(folder, "test"), "val is used as test")
    assert open_pairs(folder / "train", "train").counts == {"train": 6, "val": 0, "test": 0}


def test_muges_names_hidden_labels_and_the_official_rule_of_a_search(tmp_path):
    for word in ("MR_train", "MR_valid", "MR_test"):
        write_tsv(tmp_path, word, ("queries", "query_id", "query_text", "item_ids"),
                  hidden=word == "MR_test")
    test = open_pairs(tmp_path, "test")
    found = test.retrieval()  # every line is a query and every image is in the pool
    assert found.texts == [text for _, text, _ in TEXTS] and len(found.notes) == 1
    assert [path.rpartition(":")[2] for path in test.paths] == list(map(str, POOL))
    assert found.relevant.tolist() == [[n, POOL.index(image)] for n, (_, _, images) in
                                       enumerate(TEXTS) for image in images]
    part = test.subset([2, 4, 1])
    some = part.retrieval()
    assert some.texts == ["三只猫", "红色的猫", "红色的猫"]
    assert [path.rpartition(":")[2] for path in part.paths] == ["20", "100", "1"]
    assert sorted(some.relevant.tolist()) == [[0, 0], [0, 2], [1, 0], [2, 2]]
    assert {len(batch) for batch in PairBatches(test, 4)} == {4}
    refused(lambda: PairBatches(test, 5), "4 images")  # those without text are in no batch
    plain = uneven(tmp_path / "plain", [2, 1, 3])
    assert plain.retrieval().relevant.tolist() == [[c, i] for c, i in enumerate(plain.owner)]
    refused(plain.subset([0]).retrieval, "2 images")


def test_a_pickle_runs_no_code_and_a_broken_lmdb_is_refused(tmp_path):
    good, mark = pickle.dumps((3, 1, "a cat")), tmp_path / "executed"
    for i, value in enumerate((pickle.dumps(Payload(mark)), pickle.dumps((1, 2, Payload(mark))),
                               pickle.dumps(5), pickle.dumps((1, 2)), b"", b"\x80\x04X\xff\xff\xff",
                               b"cos\nsystem\n(S'x'\ntR.", pickle.dumps((1, 2, 3)))):
        folder = write_lmdb(tmp_path / str(i), pairs=[good, value])
        refused(lambda folder=folder: open_pairs(folder, "train"), "pair 1", "not run")
    assert not mark.exists()
    file = write_lmdb(tmp_path / "cut") / "train" / "pairs" / "data.mdb"
    file.write_bytes(file.read_bytes()[:-4096])
    refused(lambda: open_pairs(tmp_path / "cut", "train"), "pairs")


# -----------------------------------------------------------------------------
# The set

def test_an_unreadable_image_is_replaced_by_the_same_pair_in_every_worker(tmp_path):
    pairs = open_pairs(table(tmp_path, 60, 3, broken=range(40)), "train")
    pairs = pairs.with_transform(Preprocess(8))
    refused(lambda: pairs.subset(range(40))[0], "a hundred")
    for c in range(120):  # the captions of the first forty
        image, used, asked = pairs[(3, c)]
        tries = (sample_seed(0, attempt, c) % len(pairs) for attempt in range(1, 100))
        assert asked == c and used == next(t for t in tries if pairs.owner[t] >= 40)
        assert torch.equal(image, pairs[(0, used)][0])
    (one,), (two,) = (list(make_pair_loader(pairs, 60, seed=2, workers=n)) for n in (0, 2))
    assert all(map(torch.equal, one, two)) and (one[1] != one[2]).sum() == 40
    features = torch.arange(60.0)[:, None].repeat(1, 2)
    features[:40] = torch.nan
    (rows, *found), = FeatureLoader(make_pair_loader(pairs, 60, seed=2), features)
    assert all(map(torch.equal, found, one[1:]))
    assert rows[:, 0].tolist() == [pairs.owner[c] for c in one[1]]


def test_a_listing_may_be_larger_than_an_image(tmp_path, monkeypatch):
    path = table(tmp_path, 9, 2)
    monkeypatch.setattr("images.MAX_FILE_BYTES", 60)
    pairs = open_pairs(path, "train")
    assert len(pairs.captions) == 18
    with pytest.raises(ValueError, match="bytes are too many"):
        pairs.store.image(pairs.paths[0])


def test_a_lost_image_that_was_allowed_is_not_counted_again(tmp_path):
    pairs = open_pairs(table(tmp_path, 9, 2), "train").with_transform(Preprocess(8))
    both, batch = Mixture([pairs, pairs]), (torch.tensor([7, 2, 4]), torch.tensor([3, 2, 4]))
    assert pairs.replaced(*batch) == ["1.png"] and both.replaced(*batch) == ["0:1.png"]
    assert "1.png" in pairs.refuse_losses([1], "lost") and not pairs.refuse_losses([1], "lost")
    assert pairs.replaced(*batch) == both.replaced(*batch) == []


def test_a_subset_keeps_the_captions_of_its_images_and_the_fingerprint_sees_all(tmp_path):
    pairs = uneven(tmp_path, [1, 3, 2, 4])
    some = pairs.subset([3, 0])
    assert some.paths == ["3.png", "0.png"] and some.owner == [0, 0, 0, 0, 1]
    assert some.captions == [f"text 3 {j}" for j in range(4)] + ["text 0 0"]
    assert some.texts_of(1) == some.subset([1]).captions == ["text 0 0"]
    assert some.fingerprint == pairs.fingerprint
    file = table(tmp_path / "t", 4, 2) / "pairs.csv"
    before = open_pairs(file, "train").fingerprint
    assert open_pairs(file, "test").fingerprint == before
    file.write_text(file.read_text().replace("caption 1 of 3,test", "caption 1 of 3!,test"))
    assert open_pairs(file, "train").fingerprint != before


# -----------------------------------------------------------------------------
# Batches

def batches_of(pairs, size, seed=1, captions="one", epoch=0, first=0, rank=0, world=1):
    batches = pickle.loads(pickle.dumps(PairBatches(pairs, size, seed, rank, world, captions)))
    batches.set_epoch(epoch, first)
    return list(batches)


def images_in(pairs, batch):
    return [pairs.owner[c] for _, c in batch]


@pytest.mark.parametrize("captions", ["one", "all"])
def test_no_image_comes_twice_in_a_batch_and_no_caption_twice_in_an_epoch(tmp_path, captions):
    counts = [5] * 40 + [1, 2, 7, 60, 30]
    pairs = uneven(tmp_path, counts)
    for size, epoch in itertools.product((2, 3, 8, 16, 44, 45), (0, 1)):
        listed = batches_of(pairs, size, captions=captions, epoch=epoch)
        assert len(listed) == len(PairBatches(pairs, size, captions=captions))
        assert {e for batch in listed for e, _ in batch} == {epoch}
        assert all(len(set(images_in(pairs, batch))) == size for batch in listed)
        seen = [c for batch in listed for _, c in batch]
        rounds = 1 if captions == "one" else sorted(counts)[-size]
        assert len(set(seen)) == len(seen) > sum(min(n, rounds) for n in counts) - size


def test_one_caption_is_drawn_anew_and_all_mix_so_that_images_meet_anew(tmp_path):
    pairs, drawn, mates = uneven(tmp_path, [4] * 300), [], set()
    for epoch in range(40):
        (batch,) = batches_of(pairs, 300, epoch=epoch)
        assert sorted(images_in(pairs, batch)) == list(range(300))
        drawn += [c % 4 for _, c in batch]
    assert (abs(np.bincount(drawn) - 3000) < 250).all()
    for batch in batches_of(pairs, 20, captions="all"):
        mates |= set(itertools.permutations(images_in(pairs, batch), 2))
    assert len(mates) > 0.8 * 4 * 300 * 19  # hardly any two meet again in the same epoch


@pytest.mark.parametrize("captions", ["one", "all"])
def test_batches_resume_and_split_over_processes_as_one_list(tmp_path, captions):
    pairs = uneven(tmp_path, [5] * 30)
    whole = batches_of(pairs, 7, captions=captions, epoch=4)
    for world in (1, 2, 3):
        shares = [batches_of(pairs, 7, 1, captions, 4, 2, rank, world) for rank in range(world)]
        for batch, *parts in zip(whole[2:], *shares, strict=True):
            assert parts == [batch[rank::world] for rank in range(world)]
    orders = [whole, *(batches_of(pairs, 7, seed, captions, epoch)
                       for seed, epoch in ((1, 4), (1, 1), (2, 4)))]
    assert len({json.dumps([images_in(pairs, batch) for batch in order]) for order in orders}) == 3
    refused(lambda: PairBatches(pairs, 1, captions=captions), "2")
    refused(lambda: PairBatches(pairs, 31, captions=captions), "30 images")


def test_mixed_batches_hold_a_share_of_every_part(tmp_path):
    parts = [open_pairs(table(tmp_path / str(n), n, 2, broken), "train").with_transform(
        Preprocess(8)) for n, broken in ((12, [3]), (5, []))]
    loader = make_pair_loader(Mixture(parts), [4, 2], seed=1, captions="all")
    mixed, seen = loader.dataset, set()
    assert isinstance(mixed, Mixture) and len(mixed) == 34 and len(loader.batch_sampler) == 6
    for epoch in range(3):
        loader.batch_sampler.set_epoch(epoch)
        for _, used, asked in loader:
            owner = [mixed.owner[c] for c in asked]
            assert [i >= 12 for i in owner] == [False] * 4 + [True] * 2 and len(set(owner)) == 6
            assert all(mixed.owner[c] != 3 for c in used)
            seen |= {c for c in asked.tolist() if c >= 24}
    assert seen == set(range(24, 34))  # the small part goes round
    features = torch.arange(17.0)[:, None]
    features[3] = torch.nan
    for (_, *one), (rows, *two) in zip(loader, FeatureLoader(loader, features), strict=True):
        assert all(map(torch.equal, one, two))
        assert rows[:, 0].tolist() == [mixed.owner[c] for c in two[0]]
    ids = identities(mixed)
    assert ids[:, 0].tolist() == mixed.owner  # of two folders: other images, but the same words
    assert len(ids[:, 1].unique()) == 24
    assert identities(Mixture([parts[0], parts[0]]))[:, 0].max() == 11


# -----------------------------------------------------------------------------
# Cache

def views(pairs):
    pairs = pairs.with_transform(Preprocess(16, train=True, seed=3))
    return [[part.tolist() if torch.is_tensor(part) else part for part in pairs[(2, c)]]
            for c in range(0, len(pairs), 3)]


def test_a_cache_gives_the_pixels_of_no_cache_and_sees_that_a_file_has_changed(tmp_path):
    plain = open_pairs(table(tmp_path, 9, 2, broken=[1]), "train")
    for workers in (0, 2, 0):  # the last finds the file of the first
        pairs = open_pairs(tmp_path, "train")
        assert pairs.cache(None, tmp_path / f"c{workers}", workers=workers) is pairs
        assert views(plain) == views(pickle.loads(pickle.dumps(pairs))) and pairs.pixels
        assert said(pairs, "1 of 9") and views(plain.subset([5, 2])) == views(pairs.subset([5, 2]))
    before = views(plain)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "0.png")
    assert before != views(plain) == views(
        open_pairs(tmp_path, "train").cache(None, tmp_path / "c0"))
    some = open_pairs(tmp_path, "train").cache(None, tmp_path / "none", limit=4000)
    assert some.pixels is None and said(some, "decoded at every use")
    assert views(plain) == views(some) and not list((tmp_path / "none").iterdir())
    assert open_pairs(tmp_path, "train").cache(None, tmp_path / "off", limit=0).pixels is None
    worse = open_pairs(table(tmp_path / "w", 9, 2, broken=[1, 2]), "train")
    refused(lambda: worse.cache(None, tmp_path / "w" / "c"), "2 of 9")


def test_a_cache_that_broke_off_is_made_again_and_without_a_folder_there_is_none(tmp_path):
    pairs = open_pairs(table(tmp_path, 9, 2), "train").cache(None, tmp_path / "c")
    held = pairs.pixels.read_bytes()
    pairs.pixels.write_bytes(held[:-40])
    pairs.pixels.with_suffix(".json").unlink()  # it is written last
    for content in ("", "[", "[[0, 9]]", held):  # of the index; the last: another run beside it
        again = open_pairs(tmp_path, "train").cache(None, tmp_path / "c")
        assert pairs.pixels.read_bytes() == held and views(again) == views(pairs)
        assert {path.suffix for path in (tmp_path / "c").iterdir()} == {".json", ".pixels"}
        if content is not held:
            pairs.pixels.with_suffix(".json").write_text(content)
    reading = open(pairs.pixels, "rb")
    pairs.pixels.with_suffix(".json").unlink()
    assert open_pairs(tmp_path, "train").cache(None, tmp_path / "c").pixels
    assert reading.read() == held  # what a run has open stays whole while another one fills
    reading.close()
    other = open_pairs(tmp_path, "train").cache(None, tmp_path / "pairs.csv")
    assert other.pixels is None and views(other) == views(pairs)


def test_the_first_process_fills_the_cache_for_all(tmp_path):
    table(tmp_path, 9, 2)

    def work(rank):
        pairs = open_pairs(tmp_path, "train").cache(start("cpu"), tmp_path / "c")
        print("found", pairs.pixels, np.sum(views(pairs)[3][0]))
    one, two = (result.ok().out.partition("found")[2] for result in processes(2, work))
    assert one == two != "" and len(list((tmp_path / "c").iterdir())) == 2
