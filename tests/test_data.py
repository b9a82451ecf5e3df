"""images.py, data.py: pixels, data sets, few-shot lists, batches; twins and real data. What a text
file or a table may be is in test_pairs.py, where captions make it harder."""
from functools import partial
import hashlib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
import io
import itertools
import json
import lzma
import os
import pathlib
import pickle
import random
import shutil
import tarfile
import threading
import time
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (Batches, class_prompts, few_shot, find_classes, halves, ImageSet,
                  ImageStore, LostWorker, make_loader, normalise, open_dataset, Preprocess, read_image,
                  require_words, sample_seed, UnreadableImage)
from helpers import attempt, class_folder, noise, refused, save_picture


def pairs(images):
    return list(zip(images.paths, images.labels))


def bare_set(labels, split="train", name="bare"):
    """An ImageSet of paths without files."""
    rows = {"train": [], "val": [], "test": [],
            split: [(f"{i}.jpg", label) for i, label in enumerate(labels)]}
    names = [f"class {label}" for label in range(max(labels) + 1)]
    return ImageSet(data.Source(name, ".", ImageStore("."), rows, names), split)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# -----------------------------------------------------------------------------
# Pixels

SIZES = [(224, 224), (225, 224), (300, 451), (451, 300), (17, 640), (640, 17), (1, 1), (223, 223),
         (1, 50), (333, 335), (500, 375), (227, 224), (224, 227)]  # 1.5 rounds to 2


@pytest.mark.parametrize("size,kind", [(224, "bicubic"), (97, "bicubic"), (97, "bilinear")])
def test_evaluation_pixels_equal_torchvision_bit_for_bit(size, kind):
    transforms = pytest.importorskip("torchvision.transforms", exc_type=Exception)
    mode = transforms.InterpolationMode(kind)
    end = [transforms.ToTensor(), transforms.Normalize(data.CLIP_MEAN, data.CLIP_STD)]
    theirs = transforms.Compose([transforms.Resize(size, mode), transforms.CenterCrop(size), *end])
    squashed = transforms.Compose([transforms.Resize((size, size), mode), *end])
    ours = Preprocess(size, interpolation=kind)
    squash = Preprocess(size, resize="squash", interpolation=kind)
    images = [noise(wide, high, seed=wide) for wide, high in SIZES]
    images += [noise(40, 61, "L"), noise(61, 40, "RGBA"), noise(61, 40).quantize(16)]
    for image in images:
        pixels = ours(image)
        assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
        assert torch.equal(normalise(pixels[None])[0], theirs(image.convert("RGB"))), image
        assert torch.equal(normalise(squash(image)[None])[0], squashed(image.convert("RGB")))
    assert torch.equal(ours(np.asarray(images[3])), ours(images[3]))
    half = torch.rand(2, 3, 4, 4) * 255   # pixels may be mixed before
    before = half.clone()
    expected = (half.double() / 255 - 0.5) / 0.25
    assert torch.allclose(normalise(half, (0.5,) * 3, (0.25,) * 3).double(), expected, atol=1e-6)
    assert torch.equal(half, before)


@pytest.mark.parametrize("scale,flip", [((0.08, 1.0), True), ((0.9, 1.0), False)])
def test_training_crops_and_flips_equal_torchvision_for_the_same_seed(scale, flip):
    transforms = pytest.importorskip("torchvision.transforms", exc_type=Exception)
    theirs = transforms.Compose([
        transforms.RandomResizedCrop(32, scale, interpolation=transforms.InterpolationMode.BICUBIC),
        *[transforms.RandomHorizontalFlip()] * flip, transforms.PILToTensor()])
    ours = Preprocess(32, train=True, seed=5, scale=scale, flip=flip)
    for wide, high in [(64, 64), (90, 31), (400, 20), (20, 400), (3, 2), (1, 1)]:
        for index in range(8):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(sample_seed(5, 2, index))
                expected = theirs(noise(wide, high))
            assert torch.equal(ours(noise(wide, high), 2, index), expected), (wide, high, index)


def test_a_view_is_a_function_of_seed_epoch_and_index_only():
    image, crop = noise(50, 40), Preprocess(16, train=True, seed=1, augment=("colour",))
    first = crop(image, 3, 7)
    torch.rand(5)
    state = torch.get_rng_state()
    assert torch.equal(crop(image, 3, 7), first) and torch.equal(torch.get_rng_state(), state)
    others = [crop(image, 3, 8), crop(image, 4, 7), Preprocess(16, True, 1)(image, 3, 7)]
    assert not any(torch.equal(first, other) for other in others)
    keys = itertools.product(range(9), range(9), range(99))
    seeds = {sample_seed(*key) & 0xFFFFFFFF for key in keys}
    assert len(seeds) > 0.999 * 9 * 9 * 99  # no structure in the bits torch keeps
    refused(lambda: Preprocess(16, True, augment=("cutout",)), "cutout")
    for size in ((1, 5000), (5000, 1), (30000, 2)):  # a strip costs no gigabyte
        assert Preprocess(224)(noise(*size)).shape == (3, 224, 224)


def test_a_larger_view_shows_the_same_crop_flip_and_distortion():
    """What a teacher of another image size sees."""
    smooth = noise(5, 4).resize((160, 120), Image.Resampling.BICUBIC)
    for options in ({}, {"augment": ("randaugment",)}, {"scale": None, "augment": ("colour",)}):
        small, large = (Preprocess(size, train=True, seed=3, **options) for size in (32, 64))
        for index in range(12):
            one = small(smooth, 1, index).float()
            other = torch.nn.functional.avg_pool2d(large(smooth, 1, index).float(), 2)
            assert (one - other).abs().mean() < 12, (options, index)
        spread = torch.stack([small(smooth, 1, i).float() for i in range(12)]).std(0).mean()
        assert spread > 15


def test_an_image_mode_suffix_or_file_name_form(tmp_path):
    def same(name, wanted):
        assert np.array_equal(np.asarray(read_image(tmp_path / name)), np.asarray(wanted)), name
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # 0 .. 65535 in 256 steps
    grey = np.repeat((ramp // 257).astype(np.uint8)[..., None], 3, axis=2)
    for name in ("16.png", "16.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        same(name, grey)
    Image.fromarray(ramp // 16).save(tmp_path / "dim.png")  # black, nearly
    refused(lambda: read_image(tmp_path / "dim.png"), "4095 of 65535")
    write(tmp_path / "16.pgm", b"P5 16 16 65535 " + ramp.astype(">u2").tobytes())
    same("16.pgm", grey)
    for mode, suffix in (("L", "png"), ("1", "png"), ("CMYK", "tif"), ("YCbCr", "jpg"),
                         ("RGBA", "png"), ("LA", "png"), ("RGB", "tga"), ("RGB", "jp2")):
        path = save_picture(tmp_path / f"{mode}.{suffix}", noise(20, 10).convert(mode))
        same(path.name, Image.open(path).convert("RGB"))
    palette, tagged = noise(20, 10).quantize(8), Image.Exif()
    palette.save(tmp_path / "p.png", transparency=bytes([0, 128] + [255] * 6))
    same("p.png", np.asarray(palette.convert("RGBA"))[..., :3])
    tagged[0x0112] = 6
    for name in ("turned.png", "turned.webp", "turned.tif"):
        noise(20, 10).save(tmp_path / name, exif=tagged, lossless=True)
        same(name, noise(20, 10).transpose(Image.Transpose.ROTATE_270))
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name in ("moving.gif", "moving.webp", "moving.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        same(name, frames[0])
    for kind in (np.float32, np.int32, np.uint16):  # no one knows what is white
        Image.fromarray(ramp.astype(kind)).save(tmp_path / "deep.tif")
        held = (tmp_path / "deep.tif").read_bytes()  # of the last, 0 is made to be white
        write(tmp_path / "deep.tif", held.replace(b"\6\1\3\0\1\0\0\0\1\0", b"\6\1\3\0\1\0\0\0\0\0"))
        refused(lambda: read_image(tmp_path / "deep.tif"), "deep.tif")
    folder = class_folder(tmp_path / "set", ("a", "b"), all=4)
    for name in ("a/x.tga", "b/x.jp2", "a/WITH SPACE.JPG", "b/100%.png", "b/é#1.png", "a/no.webp.jpeg"):
        save_picture(folder / name)
    assert len(open_dataset(folder, "train", whole=True).preload()) == 14
    write(folder / "a/photo.heic", "x")
    save_picture(folder / "loose.png")
    notes = open_dataset(folder, "train").notes
    assert any("2 files" in note and "photo.heic" in note for note in notes)


def test_damaged_files_bombs_and_programs_are_refused_by_name(tmp_path, monkeypatch):
    photo, dot = io.BytesIO(), io.BytesIO()
    noise(200, 200).save(photo, "JPEG")
    Image.new("L", (1, 1)).save(dot, "PNG")
    bomb = bytearray(dot.getvalue())
    bomb[16:24] = (60000).to_bytes(4, "big") * 2  # width and height; the checksum follows
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # others switch Pillow's own guard off
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    for name, content in {"empty": b"", "text": b"not an image", "cut": photo.getvalue()[:9000],
                          "header": photo.getvalue()[:30], "zeros": bytes(5000), "eps": eps,
                          "bomb": bytes(bomb), "png cut": dot.getvalue()[:40]}.items():
        refused(partial(read_image, write(tmp_path / f"{name}.jpg", content)), f"{name}.jpg")
        with pytest.raises(UnreadableImage):
            read_image(tmp_path / f"{name}.jpg")
    refused(partial(read_image, tmp_path / "bomb.jpg"), "pixels are too many")
    refused(partial(read_image, tmp_path / "absent.jpg"), "absent.jpg")


# -----------------------------------------------------------------------------
# Few-shot lists

def naive_few_shot(items, shots, stream):
    """Dassl's generate_fewshot_dataset; items are (path, label)."""
    groups, chosen = {}, []
    for item in items:
        groups.setdefault(item[1], []).append(item)
    for group in groups.values():
        chosen.extend(stream.sample(group, shots) if len(group) >= shots else group)
    return chosen


def test_dtd_shots_equal_all_published_lists(shared):
    train, val = (open_dataset("dtd", split, shared) for split in ("train", "val"))
    state = random.getstate()
    for shots, seed in itertools.product((1, 2, 4, 8, 16), (1, 2)):
        file = shared / f"dtd/fewshot_indices/shot_{shots}-seed_{seed}.json"
        published = json.loads(file.read_text())
        for part, key in zip(few_shot(train, shots, seed, val), ("train", "val")):
            assert [(f"./data/dtd/images/{path}", label, part.classnames[label])
                    for path, label in pairs(part)] == [
                (item["impath"], item["label"], item["classname"])
                for item in published[key]["data"]]
    assert random.getstate() == state


BUNDLED = {"caltech101": "52ce8320", "dtd": "f26ebecc", "eurosat": "541503a7",
           "oxford_flowers": "2f50c42f", "oxford_pets": "d7f3ffe6", "stanford_cars": "40acee7a",
           "ucf101": "d78cb834"}


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_splits_are_the_published_files_in_their_order(name, tmp_path):
    file = data.ASSETS / "coop_splits" / (data.KNOWN[name]["split"] + ".xz")
    content = lzma.decompress(file.read_bytes())
    assert hashlib.sha256(content).hexdigest().startswith(BUNDLED[name])
    train, val = (open_dataset(name, part, tmp_path, download=False) for part in ("train", "val"))
    listed = json.loads(content)
    assert pairs(train) == [(path, label) for path, label, _ in listed["train"]]
    assert not any(tmp_path.iterdir())
    for shots, seed in ((16, 1), (1, 0)):
        stream = random.Random(seed)
        drawn = few_shot(train, shots, seed, val)
        assert pairs(drawn[0]) == naive_few_shot(pairs(train), shots, stream)
        assert pairs(drawn[1]) == naive_few_shot(pairs(val), min(shots, 4), stream)


def test_short_classes_are_taken_whole_and_nonsense_is_refused():
    labels = [2] * 3 + [0] * 9 + [2] * 2 + [1] * 4
    drawn = few_shot(bare_set(labels), 5, seed=7)
    assert pairs(drawn) == naive_few_shot(pairs(bare_set(labels)), 5, random.Random(7))
    assert any("class 1 (4)" in note and "class 2" not in note for note in drawn.notes)
    assert len(few_shot(bare_set([0, 1]), 0, seed=1)) == 0
    refused(partial(few_shot, bare_set([0, 1]), -1, 1), "shots")
    train, val = bare_set([0, 1] * 9, name="imagenet"), bare_set([0, 1] * 9, "val", "imagenet")
    assert len(few_shot(train, 2, 1, val)[1]) == 18


def test_base_and_new_classes_names_and_prompts():
    assert halves([3, 1, 0, 2, 4, 1]) == ([0, 1, 2], [3, 4])
    train = open_dataset("dtd", "train", download=False)
    shots, (base, new) = few_shot(train, 4, 1), halves(train.labels)
    assert (len(base), len(new)) == (24, 23)
    assert pairs(shots.select(base)) == [pair for pair in pairs(shots) if pair[1] < 24]
    assert set(shots.select(new).labels) == set(range(23))
    some = open_dataset("dtd", "train", classes=["Polka-Dotted", "banded"], download=False)
    assert some.classnames == ["polka-dotted", "banded"] and len(some) == 120
    assert {label for path, label in pairs(some) if path.startswith("banded/")} == {1}
    assert find_classes(["ice_skating_rink", "Sea or Lake"], ["ICE skating  rink"]) == [0]
    refused(lambda: open_dataset("dtd", "train", classes=["bandd"], download=False), "'banded'")
    assert class_prompts(train.classnames, train.template)[0] == (
        "a photo of a banded, a type of texture.")
    assert class_prompts(["a_b", "{c}"], "x {} y {c}") == ["x a b y a b", "x {c} y {c}"]
    for template in ("a photo", "a {name} {}", "{0}", "{c!r}", "{}}{name}"):
        refused(partial(class_prompts, ["a"], template), repr(template))


# -----------------------------------------------------------------------------
# Published sets

def test_what_is_missing_is_said_at_once_and_nothing_is_written(tmp_path, monkeypatch):
    for name, download in itertools.product(("food101", "sun397", "imagenet", "imagenet-r"), (0, 1)):
        known = data.KNOWN[name]
        refused(partial(open_dataset, name, "test", tmp_path, download=download), known["split"],
                known["link"], tmp_path / known["folders"][0] / known["images"])
    refused(lambda: open_dataset("aircraft", "test", tmp_path, download=False), "variants.txt")
    refused(lambda: open_dataset("eurosta", "train", tmp_path), "'eurosat'")
    test = open_dataset("cars", "test", tmp_path)  # has no downloader
    refused(test.check_files, tmp_path / "stanford_cars", "https://github.com/pytorch/vision")
    refused(lambda: open_dataset("dtd", "dev"), "'dev'")
    assert {path.suffix for path in tmp_path.rglob("*")} <= {".lock"}
    for text, name in {"DescribableTextures": "dtd", "oxford-pets": "oxford_pets",
                       "ImageNetA": "imagenet-a", "SUN397": "sun397", "./dtd": None}.items():
        assert data.dataset_name(text) == name, text
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "flowers/rose/1.jpg", "")
    refused(lambda: open_dataset("flowers", "test"), "./flowers", "--data-dir .")


def food(folder):
    """Food101 of two classes -> its list and its archive, as CoOp and torchvision fetch them."""
    rows = [[f"{name}/{i}.jpg", label, name] for label, name in enumerate(("pie", "soup"))
            for i in range(4)]
    for path, _, _ in rows:
        save_picture(folder / "food-101/images" / path)
    for part in ("train", "test"):
        write(folder / f"food-101/meta/{part}.json",
              json.dumps({name: [f"{name}/0"] for name in ("pie", "soup")}))
    with tarfile.open(folder / "food-101.tar.gz", "w:gz") as archive:
        archive.add(folder / "food-101", "food-101")
    listed = json.dumps({"train": rows[::2], "val": [], "test": rows[1::2]})
    return write(folder / "list", listed), folder / "food-101.tar.gz"


@pytest.mark.parametrize("fault", ["", "list cut", "list is a page", "archive cut", "no network"])
def test_one_command_from_zero_or_one_line_and_nothing_half_in_place(tmp_path, monkeypatch, fault):
    tv = pytest.importorskip("torchvision.datasets", exc_type=Exception)
    listed, archive = food(tmp_path / "made")
    monkeypatch.setattr(tv.Food101, "_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    for file in (listed, archive):
        if fault == f"{file.name.partition('.')[0].replace('food-101', 'archive')} cut":
            file.write_bytes(file.read_bytes()[:99])
    if fault == "list is a page":
        write(listed, "<!doctype html>log in")
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "made")
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    address = f"http://127.0.0.1:{9 if fault == 'no network' else server.server_port}"
    monkeypatch.setattr(tv.Food101, "_URL", f"{address}/food-101.tar.gz")
    monkeypatch.setitem(data.KNOWN, "food101", {**data.KNOWN["food101"], "link": f"{address}/list"})
    monkeypatch.setattr(data, "DRIVE", address)
    home = tmp_path / "data"
    command = partial(attempt, "train_clipfit", "--data", "food101", "--data-dir", home, "--weights",
                      "tiny", "--shots", 1, "--dry-run", "--device", "cpu", "--workers", 0,
                      "--output-dir", tmp_path / "run")
    refused(command("--no-download"), "food-101")
    result = command()
    server.shutdown()
    if not fault:
        said = result.ok().out
        assert said.index("split_zhou_Food101.json") < said.index("5 GB") and str(home) in said
        assert "4 train / 0 val / 4 test images in 2 classes" in said
        command().ok()  # without the server
    elif "archive" in fault:
        assert result.code == 2 and "food-101.tar.gz" in result.err.splitlines()[-1]
        assert {file.name for file in home.rglob("*") if file.is_file()} == {
            ".food101.lock", "split_zhou_Food101.json"}
    else:
        refused(result, "food101: ", address)
        assert [file.name for file in home.rglob("*") if file.is_file()] == [".food101.lock"]


def test_images_that_came_in_part_are_not_kept_and_one_process_fetches(tmp_path, monkeypatch):
    tv = pytest.importorskip("torchvision.datasets", exc_type=Exception)
    some, calls = {"classes": ["banded", "woven"]}, []
    listed = open_dataset("dtd", "test", tmp_path, download=False, **some)

    def fetch(root, download):
        if not (pathlib.Path(root) / "dtd").exists():  # as torchvision looks
            calls.append(root)
            for path in listed.paths:
                save_picture(pathlib.Path(root, "dtd/dtd/images", path))
                if len(calls) == 1:
                    raise RuntimeError("the disk is full\nand the cellar")
    monkeypatch.setattr(tv, "DTD", fetch)
    write(tmp_path / "dtd/mine.txt", "")
    refused(lambda: open_dataset("dtd", "test", tmp_path), "disk is full", "dtd-r1.0.1.tar.gz",
            tmp_path / "dtd/images")
    assert {file.name for file in tmp_path.rglob("*") if file.is_file()} == {"mine.txt", ".dtd.lock"}
    refused(open_dataset("dtd", "test", tmp_path, download=False).check_files, "--no-download")
    save_picture(tmp_path / ".dtd.new/dtd/dtd/images" / listed.paths[0])  # of one that was killed
    two = [threading.Thread(target=open_dataset, args=("dtd", "test", tmp_path)) for _ in "12"]
    for work in (threading.Thread.start, threading.Thread.join):
        list(map(work, two))
    assert len(calls) == 2 and len(open_dataset("dtd", "test", tmp_path, **some).preload()) == 72
    refused(open_dataset("dtd", "test", tmp_path).check_files, "--classes", "bubbly")


def test_aircraft_has_lists_of_its_own_that_come_with_its_images(tmp_path, monkeypatch):
    tv = pytest.importorskip("torchvision.datasets", exc_type=Exception)

    def fetch(root, download):
        home = pathlib.Path(root) / "fgvc-aircraft-2013b/data"
        write(home / "variants.txt", "Boeing 707-320\nA300\n")
        for split in ("train", "val", "test"):
            lines = f"{split}1 Boeing 707-320\n{split}2 A300\n"
            write(home / f"images_variant_{split}.txt", lines)
            save_picture(home / f"images/{split}1.jpg")
    monkeypatch.setattr(tv, "FGVCAircraft", fetch)
    test = open_dataset("aircraft", "test", tmp_path)
    assert pairs(test) == [("test1.jpg", 0), ("test2.jpg", 1)] and test[0][0].size == (32, 32)


def test_imagenet_and_its_shifts_follow_coop_labels_and_words(tmp_path):
    wnids = [f"n0000000{i}" for i in range(1, 5)]
    names = ["tench", "missile", "sea lion", "missile"]
    write(tmp_path / "imagenet/classnames.txt", "\n".join(map(" ".join, zip(wnids, names))))
    refused(partial(open_dataset, "imagenet", "val", tmp_path, download=False), "imagenet/images")
    for wnid, split in itertools.product(wnids, ("train", "val")):
        save_picture(tmp_path / f"imagenet/images/{split}/{wnid}/x.JPEG")
    for wnid in wnids[1::2]:
        save_picture(tmp_path / f"imagenet-adversarial/imagenet-a/{wnid}/y.jpg")
    write(tmp_path / "imagenet-adversarial/imagenet-a/README.txt", "read me")
    for number in (0, 3):
        folder = tmp_path / "imagenetv2/imagenetv2-matched-frequency-format-val"
        save_picture(folder / f"{number}/z.jpeg")
    train, val, test = (open_dataset("imagenet", s, tmp_path) for s in ("train", "val", "test"))
    assert pairs(train) == [(f"train/{wnid}/x.JPEG", i) for i, wnid in enumerate(wnids)]
    assert val.paths == test.paths == [f"val/{wnid}/x.JPEG" for wnid in wnids]
    assert train.classnames == names
    shift = open_dataset("imagenet-a", "test", tmp_path)
    assert shift.classnames == ["missile", "missile"] and shift.labels == [0, 1]
    refused(lambda: open_dataset("imagenet-r", "test", tmp_path), "missing", "/hendrycks/imagenet-r")
    v2 = open_dataset("imagenetv2", "test", tmp_path)
    assert v2.classnames == ["tench", "missile"] and v2.paths == ["0/z.jpeg", "3/z.jpeg"]
    refused(lambda: open_dataset("imagenet-a", "train", tmp_path), "train")
    by_path = open_dataset(tmp_path / "imagenet/images", "test")  # words are near by
    assert by_path.classnames == train.classnames
    shutil.copytree(tmp_path / "imagenet/images", tmp_path / "alone/a/b/c/images")
    require_words(by_path)
    refused(lambda: require_words(open_dataset(tmp_path / "alone/a/b/c/images", "test")),
            "n00000001", "classnames.txt")
    some = class_folder(tmp_path / "some", ("cat", "n02085620 dog"), all=2)
    refused(lambda: require_words(open_dataset(some, "train")), "n02085620")


# -----------------------------------------------------------------------------
# The user's own files

def test_class_folders_get_a_fixed_announced_split(tmp_path):
    folder = class_folder(tmp_path / "pics.v2", ("sea_lion", "Ünï", "猫"), all=10)
    parts = [open_dataset("pics.v2", split, tmp_path) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [15, 6, 9] == [len(part.preload()) for part in parts]
    assert len({path for part in parts for path in part.paths}) == 30
    assert parts[0].classnames == sorted(["sea_lion", "Ünï", "猫"])
    assert parts[0].paths == open_dataset(folder, "train").paths
    assert any("50/20/30" in note for note in parts[0].notes)
    assert len(open_dataset(folder, "test", whole=True)) == 30
    save_picture(folder / "猫/new.png")
    assert open_dataset(folder, "train").fingerprint != parts[0].fingerprint
    tiny = class_folder(tmp_path / "tiny", ("a", "b"), all=2)  # a training, then a test image
    assert open_dataset(tiny, "train").counts == {"train": 2, "val": 0, "test": 2}


def test_split_folders_litter_and_link_loops_are_understood(tmp_path):
    folder = class_folder(tmp_path / "set", ("a/deep", "b"), Training=3, Valid=3, test_set=3)
    for junk in ("__MACOSX/a/x.png", "Training/a/.hidden.png", "Training/.cache/x.png",
                 "Training/a/@eaDir/0.png/thumb.jpg", "lost+found/x.png"):
        save_picture(folder / junk)
    write(folder / "Training/a/Thumbs.db", "junk")
    os.symlink(folder, folder / "Training/a/loop")
    train = open_dataset(folder, "train")
    assert train.classnames == ["a", "b"] and len(train) == 6 and len(train.notes) == 2
    assert "such as deep" in train.notes[0]
    assert len(open_dataset(folder, "val")) == len(open_dataset(folder, "test")) == 6
    shutil.rmtree(folder / "test_set")
    assert len(open_dataset(folder, "test")) == 6  # val, and said so
    assert any("val is used as test" in note for note in open_dataset(folder, "test").notes)
    shutil.rmtree(folder / "Valid")  # a lone train folder is not cut: no image is lost
    assert len(open_dataset(folder, "train")) == 6
    refused(lambda: open_dataset(folder, "test"), "test", "train")


def test_a_folder_that_holds_something_else(tmp_path):
    (tmp_path / "empty").mkdir()
    class_folder(tmp_path / "lone", ("cat",), all=4)
    class_folder(tmp_path / "flat", ("images",), all=4)
    for name in ("captions.csv", "a.csv"):  # which table of a zip is meant?
        write(tmp_path / "flat" / name, "path,label\nimages/0.png,a\nimages/1.png,b\n")
    shutil.make_archive(tmp_path / "flat", "zip", tmp_path / "flat")
    write(tmp_path / "flat/a.csv", "id,x\n1,2\n")  # of one, it is clear
    shutil.make_archive(tmp_path / "clear", "zip", tmp_path / "flat")
    assert open_dataset(tmp_path / "clear.zip", "train").classnames == ["a", "b"]
    class_folder(tmp_path / "coco", ("train2017", "val2017"), all=4)
    class_folder(tmp_path / "kaggle", ("seg_train/a", "seg_test/a", "seg_pred"), all=4)
    class_folder(tmp_path / "tiny_imagenet", ("dog/images", "cat/images"), train=2)
    class_folder(tmp_path / "tiny_imagenet", ("images",), val=2)
    class_folder(tmp_path / "nested", ("one/cat", "one/dog", "two/cat", "two/dog"), all=2)
    class_folder(tmp_path / "twice", ("Sea_Lion", "sea lion"), all=2)
    class_folder(tmp_path / "pixels", ("images", "masks"), all=2)
    class_folder(tmp_path / "hole", ("a", "b"), all=2)
    class_folder(tmp_path / "office", ("amazon/images/bike", "dslr/images/bike"), all=2)
    class_folder(tmp_path / "more", ("train", "test", "unlabeled"), all=2)
    class_folder(tmp_path / "covid", ("ill/images", "ill/masks", "well/images"), all=2)
    class_folder(tmp_path / "parts", ("batch_1", "batch_2"), all=2)
    write(tmp_path / "parts/labels.csv", "image,label\n0.png,a\n")
    for name, mask in (("busi", "1_mask_1"), ("first", "mask_1"), ("dots", "1.overlay")):
        class_folder(tmp_path / name, ("ill", "well"), all=2)
        save_picture(tmp_path / name / f"ill/{mask}.png")
    for name, table in (("listed", "meta.csv"), ("cub", "train_test_split.txt")):
        class_folder(tmp_path / name, ("a", "b"), all=4)
        write(tmp_path / name / table, "image,label,split\na/0.png,a,test\n")
    class_folder(tmp_path / "sun", ("in/bar", "in/pub", "out/sea", "out/sky"), all=2)
    (tmp_path / "hole/nothing").mkdir()
    write(tmp_path / "set.xyz", "")
    write(tmp_path / "bad.zip", "<html>")
    for name, words in {"empty": [], "lone": [], "flat": ["images", "captions.csv"],
                        "flat.zip": ["a.csv", "captions.csv"],
                        "coco": ["train2017"], "kaggle": ["seg_pred"], "nested": ["one"],
                        "twice": ["'Sea_Lion'", "'sea lion'"], "hole": ["nothing"], "set.xyz": [],
                        "pixels": ["masks"], "office": ["amazon"], "more": ["unlabeled"],
                        "covid": ["ill/masks"], "busi": ["ill/1_mask_1"], "first": ["mask_1"],
                        "dots": ["1.overlay"], "listed": ["meta.csv"], "sun": ["in"],
                        "cub": ["train_test_split.txt"],
                        "parts": ["batch_1", "labels.csv"],
                        "tiny_imagenet": ["images"], "bad.zip": [], "gone": []}.items():
        refused(partial(open_dataset, tmp_path / name, "train"), name, *words)
    class_folder(tmp_path / "kept", ("Pets/cat", "Pets/dog"), all=4)
    write(tmp_path / "kept/read me.docx", "")  # beside the lone folder
    write(tmp_path / "kept/history.csv", "epoch,train,val\n1,0.5,0.4\n")
    assert open_dataset(tmp_path / "kept", "train").classnames == ["cat", "dog"]
    shutil.rmtree(tmp_path / "tiny_imagenet/val")
    assert len(open_dataset(tmp_path / "tiny_imagenet", "train")) == 4


@pytest.mark.parametrize("folders, names, said", [
    (("001.Black_footed_Albatross", "002.Laysan"), ["Black_footed_Albatross", "Laysan"], "001."),
    (("0-cat", "1-dog"), ["cat", "dog"], "0-cat -> cat"),
    (("01 cat", "02 dog"), ["cat", "dog"], ""), (("1 - cat", "2 - dog"), ["cat", "dog"], ""),
    (("(1) cat", "(2) dog"), ["cat", "dog"], ""), (("cl", "class_01_cat"), 0, ""),
    (("class_01_cat", "class_02_dog"), ["cat", "dog"], ""),
    (("cat_n02085620", "n02085782.dog"), ["cat", "dog"], ""), (("no_mask", "with_mask"), 0, ""),
    (("n02085620-Chihuahua", "n02085782-Spaniel"), ["Chihuahua", "Spaniel"], "n02085620"),
    (("2_door_car", "4_door_car"), ["2_door_car", "4_door_car"], ""),
    (("1 euro", "5 dollars"), 0, ""), (("007 bond", "3 cats"), ["3 cats", "007 bond"][::-1], ""),
    (("AnnualCrop", "SeaLake"), 0, "AnnualCrop"), (("iPad", "a", "b"), ["a", "b", "iPad"], "50/"),
    (("10", "9", "2"), ["2", "9", "10"], "codes"), (("class_0", "class_1"), 0, "codes"),
    (("n01440764", "n01443537"), 0, "codes")])
def test_a_class_name_that_is_no_word(tmp_path, folders, names, said):
    train = open_dataset(class_folder(tmp_path / "set", folders, all=4), "train")
    assert train.classnames == (names or list(folders))
    assert any(said in note for note in train.notes)
    assert ("codes" in str(train.notes)) == (said == "codes")
    write(tmp_path / "set/classnames.txt", "2 two\n9 nine\n10 ten\nn01440764 tench\n")
    if folders[0] == "10":
        assert open_dataset(tmp_path / "set", "train").classnames == ["two", "nine", "ten"]
    if folders[0] == "n01440764":  # of which one is listed
        refused(partial(require_words, open_dataset(tmp_path / "set", "train")), folders[0])


def test_a_class_may_be_called_like_a_split_or_hold_folders_of_images(tmp_path):
    for name in ("cat", "dog"):
        class_folder(tmp_path / "nested" / name, ["images_part1"], all=6)
    assert open_dataset(tmp_path / "nested", "train").classnames == ["cat", "dog"]
    class_folder(tmp_path / "lone", ("bus", "train"), all=4)
    assert open_dataset(tmp_path / "lone", "train").counts["train"] == 4
    rows = [f"{name}/{i}.png,{name}" for name in ("test tube", "toy train") for i in range(10)]
    table = write(tmp_path / "a.csv", "\n".join(["image,label", *rows]))
    assert set(open_dataset(table, "train").labels) == {0, 1}


def test_tables_of_labels_are_read_with_their_images_wherever_they_lie(tmp_path):
    rows = "\n".join(f"{i}.png,{label},{split}" for i, (label, split) in enumerate(
        itertools.product((10, 9, 2), ("Train", "validation", "test"))))
    test = open_dataset(write(tmp_path / "t.csv", "path,label,Usage\n" + rows), "test")
    assert test.classnames == ["2", "9", "10"] and test.labels == [2, 1, 0]
    for path in ("a/0.png", "a/1.png", "b/2 ü.png"):
        save_picture(tmp_path / path)
    windows = "\ufeffNr;Image;Class\n1;a\\0.png;cat\n2;a\\1.png;dog\n3;b\\2 ü.png;cat\n;;\n"
    train = open_dataset(write(tmp_path / "w.csv", windows.replace("\n", "\r\n")), "train")
    assert train.classnames == ["cat", "dog"] and len(train.preload()) == 2
    named = ("filename,class,label,\n0.png,0,cat,\n,,,\n1.png,,dog,\n",  # words before codes
             "path,label,class,source\n0.png,cat,cat,train\n1.png,dog,dog,train\n",
             "image_id,file_name,label\n7,0.png,cat\n8,1.png,dog\n",
             "image_id,label\n0.png,cat\n1.png,dog\n",
             "filename,path,label,valid,cv_split\n0.png,a\\0.png,cat,1,3\n1.png,a\\1.png,dog,1,4\n",
             "filename,path,label,test\n0.png,,cat,PCR\n1.png,a/1.png,dog,antigen\n",
             "path,label,subset,valid\n0.png,cat,train,1\n1.png,dog,train,0\n",
             '{"path": "0.png", "label": "cat", "by": NaN}\n{"path": "1.png", "label": "dog"}\n')
    for text in (f"path,label\n{tmp_path}/a/0.png,cat\n./a//1.png,dog\n", *named):
        train = open_dataset(write(tmp_path / "n.csv", text), "train")
        assert len(train.preload()) == 2 and train.classnames == ["cat", "dog"]


@pytest.mark.parametrize("text", [
    "picture,label\na,b\n", "filepath\ttitle\na\tb\n", "path|label\na|b\n", "", "path,label\n",
    "path,label\n../a.png,x\nb.png,y\n", "path,label,split\na.png,x,trian\nb.png,y,train\n",
    "path,label,split\na.png,x,\nb.png,y,train\n", "path,label\na.png,dry, wet\n",
    "path,label\na.png,x\nb.png,\n", "path,label\na.png,x\nb.png,nan\nc.png,y\n",
    "path,label,split\na.png,x,train\nb.png,y,train\na.png,x,test\n",
    "path,label\na.png,x\nb.png,y\n./a.png,y\n", '{"path": "a", "label": ["x"]}\n',
    "path,label,class\na.png,0,x\nb.png,1,x\nc.png,0,y\n",
    "path,category,label\na.png,x,y\nb.png,z,y\n", "path,label\na.png,<NA>\nb.png,y\n",
    "path,label,set,phase\na.png,x,train,test\nb.png,y,test,train\n",
    "path,label,set\na.png,x,train\nb.png,y,test\nc.png,y,best\n",
    'path,label\na.png, "x"\nb.png,y\n', "path,label,partition\na.png,x,0\nb.png,y,2\n",
    "path,label,is_valid\na.png,x,True\nb.png,y,False\n",
    "path,label,is_test\na.png,x,0\nb.png,y,1\n", "path,label,train\na.png,x,1\nb.png,y,0\n",
    "path,label,data_split\na.png,x,train\nb.png,y,holdout\n",
    "image,file,label\na.png,b.png,x\nb.png,a.png,y\n",  # two images of a row
    "path,label\na.png,x\nb.png,y\nc.png,y | x\n",  # two classes of an image
    "path,label,folder\na.png,x,1\nb.png,y,1\na.png,x,2\n",  # two images of one name
    'path,label\na.png,"[""x"", ""y""]"\nb.png,y\n', '{"path": 3, "label": "x"}\n',
    '{"path": "a", "label": true}\n{"path": "b", "label": false}\n'])
def test_a_cell_that_is_not_what_its_column_promises(tmp_path, text):
    refused(partial(open_dataset, write(tmp_path / "bad.csv", text), "train"), "bad")


def test_zips_are_read_in_place_and_hostile_ones_refused(tmp_path):
    folder, path = class_folder(tmp_path / "outer", ("cat", "dog"), all=10), tmp_path / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.png")):
            archive.write(file, file.relative_to(tmp_path))
    train = open_dataset(path, "train")  # through the lone outer folder
    assert train.paths[0].startswith("cat/") and len(train.subset(range(10)).preload()) == 10
    again = pickle.loads(pickle.dumps(train))
    assert again[3][0].tobytes() == train[3][0].tobytes()
    for name in ("../evil.jpg", "/etc/evil.jpg", "a/..\\..\\x.jpg"):
        with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
            archive.writestr(name, b"x")
        refused(partial(open_dataset, tmp_path / "evil.zip", "train"), "evil.zip")
    named = write(tmp_path / "e.zip", path.read_bytes().replace(b"/cat", "/é-".encode()))
    assert open_dataset(named, "train").classnames == ["dog", "é-"]  # no flag says that it is UTF-8
    assert len(open_dataset(named, "train").preload()) == 10
    write(named, path.read_bytes().replace(b"outer/", b"outer\\"))  # of older Windows zippers
    assert open_dataset(named, "train").paths == train.paths
    write(named, path.read_bytes().replace(b"/cat", b"/\xa8\xa6-"))  # of GBK
    refused(partial(open_dataset, named, "train"), "e.zip", "UTF-8")
    content = bytearray(path.read_bytes())
    content[content.index((folder / "cat/3.png").read_bytes()) + 60] ^= 1
    path.write_bytes(bytes(content))
    refused(lambda: ImageStore(path).read("outer/cat/3.png"), "cat/3.png", "CRC")
    demo = open_dataset("demo", "test").subset(range(0, 1000, 60)).with_transform(Preprocess(32))
    assert demo.template == "a centered satellite photo of {}."
    own = open_dataset(class_folder(tmp_path / "demo", all=4), "test")  # no prompt for satellites
    assert own.template == data.ANY_TEMPLATE and own.name != "demo"
    loader = make_loader(demo, 5, shuffle=False, workers=2, multiprocessing_context="fork")
    assert torch.equal(torch.cat([images for images, _, _ in loader]),
                       torch.stack([demo[i][0] for i in range(len(demo))]))


def test_labels_and_names_of_different_lengths(tmp_path, monkeypatch):
    """In a split file of one's own."""
    class_folder(tmp_path, ("a", "b"), all=3)
    monkeypatch.setenv("MY_SET", str(tmp_path))
    entries = [["a/0.png", 0, "a"], ["b/0.png", 1, "b"]]
    write(tmp_path / "my.json", json.dumps({"train": entries, "test": entries}))
    test = open_dataset("$MY_SET/my.json", "test")
    assert len(test.preload()) == 2 and any("2 images of val or test are in train" in note
                                            for note in test.notes)
    odd = [["a.png", 0]], [["../a.png", 0, "a"]], [["a.png", 1, "a"]], [["a", 0, "a"], ["b", 0, "b"]]
    odd += [["a", 0, "a"], ["b", 2, "b"]], [["a", 0, "a"], ["b", 1, "a"]], [["a", -1, "a"], *entries]
    odd += [["a", "0", "a"]], [["a", 0.0, "a"], ["b", 1.0, "b"]], [["a", 0, 5], ["b", 1, 6]]
    odd += [["a", False, "a"], ["b", True, "b"]], [["a", 0, "a"], ["a", 1, "b"], ["b", 1, "b"]]
    odd += [["a", 0, " "], ["b", 1, "b"]],
    for content in ([], {"a": 1}, {"train": entries, "validation": entries},
                    *({"train": rows, "test": entries[:1]} for rows in odd)):
        write(tmp_path / "my.json", json.dumps(content))
        refused(lambda: open_dataset("$MY_SET/my.json", "train"), "my.json")


def test_unreadable_images_are_skipped_dropped_or_refused(tmp_path):
    folder = class_folder(tmp_path / "s", ("cat", "dog"), train=60, test=1)
    write(folder / "train/cat/3.png", b"")
    train = open_dataset(folder, "train").with_transform(Preprocess(8))
    bad = train.paths.index("train/cat/3.png")
    image, label, index = train[(4, bad)]
    assert (label, index) == (-1, bad) and not image.any() and image.shape == (3, 8, 8)
    kept = train.subset(range(len(train))).preload()
    assert len(kept) == 119 and "train/cat/3.png" not in kept.paths
    assert any("1 of 120" in note and "3.png" in note for note in kept.notes)
    assert torch.equal(kept[bad][0], train[bad + 1][0]) and len(train) == 120
    assert train.subset(range(9)).preload(limit=4 * 32 * 32).images is None
    digest = train.digest()
    (folder / "train/cat/3.png").unlink()
    train.check_files()
    assert train.digest() != digest and any("1 of 120" in note for note in train.notes)
    (folder / "train/cat/4.png").unlink()
    refused(train.check_files, "1 %", "3.png")
    for content, cure in (("version https://git-lfs.github.com/spec/v1", "git lfs pull"),
                          ("<html>", "web page"), ("", "interrupted")):
        write(folder / "train/cat/5.png", content)
        refused(lambda: train.store.image("train/cat/5.png"), "5.png", cure)  # noqa: B023
    for file in (folder / "train/dog").iterdir():
        write(file, "junk")
    refused(train.preload, "--classes", "dog")


# -----------------------------------------------------------------------------
# Batches and loaders

def test_batches_are_a_permutation_of_seed_and_epoch_shared_out_to_ranks():
    def batches(seed=3, epoch=2, rank=0, world=1, first=0, **options):
        sampler = pickle.loads(pickle.dumps(Batches(23, 5, seed, rank, world, **options)))
        sampler.set_epoch(epoch, first_batch=first)
        return list(sampler)
    whole = batches(drop_last=False)
    assert sorted(i for batch in whole for _, i in batch) == list(range(23))
    assert {epoch for batch in whole for epoch, _ in batch} == {2}
    assert whole != batches(epoch=1, drop_last=False) and whole != batches(2, drop_last=False)
    assert batches() == whole[:4] and batches(first=3, drop_last=False) == whole[3:]
    for world in (2, 3, 7):
        shares = zip(*(batches(rank=r, world=world, drop_last=False) for r in range(world)))
        for number, parts in enumerate(shares):  # every rank has as many batches
            merged = [key for group in itertools.zip_longest(*parts) for key in group if key]
            assert merged == whole[number]
    assert [len(batch) for batch in Batches(10, 32)] == [10]
    assert [len(batch) for batch in Batches(10, 4, shuffle=False)] == [4, 4, 2]
    assert [Batches(23, 5).global_size(batch) for batch in (0, 4, 5)] == [5, 3, 0]
    refused(lambda: Batches(4, 0), "batch size 0")


def test_batches_do_not_depend_on_workers_nor_on_how_they_start(tmp_path):
    def two_epochs(images, first_batch=0, **options):
        loader, found = make_loader(images, 5, seed=9, **options), []
        for epoch in (0, 1):
            loader.batch_sampler.set_epoch(epoch, first_batch)
            found += [part.clone() for batch in loader for part in batch]
        return found

    def same(left, right):
        return len(left) == len(right) and all(map(torch.equal, left, right))
    folder = class_folder(tmp_path, ("cat", "dog"), all=24)
    train = open_dataset(folder, "train").with_transform(Preprocess(8, train=True, seed=3))
    alone, state = two_epochs(train), torch.get_rng_state()
    held = train.subset(range(24)).preload()  # decoded images travel to a spawned worker
    assert len(alone) == 24 and not torch.equal(alone[0], alone[12])
    assert same(alone, two_epochs(held))
    assert torch.equal(state, torch.get_rng_state())  # loading leaves the global stream alone
    assert same(alone, two_epochs(train, workers=2, multiprocessing_context="fork"))
    assert same(alone, two_epochs(held, workers=1, multiprocessing_context="spawn"))
    later = two_epochs(train, first_batch=2, workers=2, multiprocessing_context="fork")
    assert same(alone[6:12] + alone[18:], later)
    last = list(make_loader(train.subset(range(4)), 4, rank=2, world_size=5, shuffle=False))[-1]
    none = list(make_loader(train.subset(range(4)), 4, rank=4, world_size=5))[-1]
    assert last[2].tolist() == [2] and [tuple(x.shape) for x in none] == [(0, 3, 8, 8), (0,), (0,)]


@pytest.mark.parametrize("fault", [lambda: time.sleep(60), lambda: os._exit(7)])
def test_a_worker_that_hangs_or_dies_ends_the_run_with_advice(monkeypatch, tmp_path, fault):
    class Stuck(ImageSet):
        def __getitem__(self, key):
            return fault() if key[1] == 7 else super().__getitem__(key)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
    images = Stuck(data.list_dataset(class_folder(tmp_path)), "train").with_transform(Preprocess(8))
    with pytest.raises(LostWorker) as caught:
        list(make_loader(images, 6, workers=1, timeout=1, multiprocessing_context="fork"))
    assert caught.value.exit_code == 3 and "--workers 0" in str(caught.value)
