"""data.py: pictures, datasets, few-shot lists, batches, scores; naive twins and real data."""
import io
import itertools
import json
import os
import pathlib
import pickle
import random
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (Batches, DataError, ImageSet, ImageStore, Listing, Preprocess, UnreadableImage,
                  class_prompts, classification_scores, few_shot, find_classes, halves, make_loader,
                  open_dataset, read_image, sample_seed, to_rgb, zero_shot_weights)

ROOT = pathlib.Path(data.__file__).resolve().parent


def noise(width, height, mode="RGB", seed=0):
    """A picture in which every pixel differs from its neighbours."""
    shape = (height, width, len(Image.new(mode, (1, 1)).getbands()))
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(values.squeeze(-1) if shape[-1] == 1 else values, mode=None) \
        if mode in ("RGB", "L", "RGBA") else Image.fromarray(values).convert(mode)


def save(path, image=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or noise(20, 16, seed=len(str(path)))).save(path)
    return path


def class_folder(root, classes=("cat", "dog"), count=10):
    for name, number in itertools.product(classes, range(count)):
        save(root / name / f"{number:03d}.png", noise(12, 10, seed=number))
    return root


def bare_set(labels, split="train", name="bare", names=None):
    """An ImageSet of paths without files."""
    rows = [(f"{position}.jpg", label) for position, label in enumerate(labels)]
    names = names or [f"class {label}" for label in range(max(labels) + 1)]
    rows = {"train": [], "val": [], "test": [], split: rows}
    return ImageSet(Listing(name, ".", ImageStore("."), rows, names), split)


def coop_set(tmp_path, name, split_file):
    """data_dir with one dataset folder that holds only its split file."""
    folder = tmp_path / data.KNOWN[name].homes[0]
    folder.mkdir(parents=True)
    shutil.copy(split_file, folder / data.KNOWN[name].split)
    return tmp_path


def the_one_line(call, *args, **options):
    with pytest.raises(DataError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    return str(caught.value)


# -----------------------------------------------------------------------------
# Pictures

SIZES = [(224, 224), (225, 224), (224, 225), (300, 451), (451, 300), (17, 640), (640, 17), (1, 1),
         (223, 223), (1, 50), (333, 335), (500, 375), (227, 224), (224, 227)]  # 1.5 rounds to 2


@pytest.mark.parametrize("size", [224, 97])
def test_evaluation_pixels_equal_torchvision_bit_for_bit(size):
    transforms = pytest.importorskip("torchvision.transforms", exc_type=Exception)
    theirs = transforms.Compose([
        transforms.Resize(size, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(size),
        transforms.ToTensor(), transforms.Normalize(data.CLIP_MEAN, data.CLIP_STD)])
    for wide, high in SIZES:
        image = noise(wide, high, seed=wide)
        assert torch.equal(Preprocess(size)(image), theirs(image)), (wide, high)
    for image in (noise(40, 61, "L"), noise(61, 40, "RGBA"), noise(61, 40).quantize(16)):
        assert torch.equal(Preprocess(size)(image), theirs(image.convert("RGB")))


def test_training_crops_and_flips_equal_torchvision_for_the_same_seed():
    transforms = pytest.importorskip("torchvision.transforms", exc_type=Exception)
    theirs = transforms.Compose([
        transforms.RandomResizedCrop(32, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(data.CLIP_MEAN, data.CLIP_STD)])
    for wide, high in [(64, 64), (90, 31), (400, 20), (20, 400), (3, 2), (1, 1)]:
        image, ours = noise(wide, high), Preprocess(32, train=True, seed=5)
        for index in range(12):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(sample_seed(5, 2, index))
                expected = theirs(image)
            assert torch.equal(ours(image, 2, index), expected), (wide, high, index)


def test_other_crops_statistics_and_squashing_equal_torchvision():
    transforms = pytest.importorskip("torchvision.transforms", exc_type=Exception)
    bicubic = transforms.InterpolationMode.BICUBIC
    end = [transforms.ToTensor(), transforms.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD)]
    look = dict(mean=data.IMAGENET_MEAN, std=data.IMAGENET_STD)
    crop = Preprocess(32, train=True, seed=5, scale=(0.9, 1.0), flip=False, **look)
    theirs = transforms.Compose([
        transforms.RandomResizedCrop(32, scale=(0.9, 1.0), interpolation=bicubic), *end])
    for wide, high in [(64, 64), (90, 31), (20, 400), (3, 2)]:
        image = noise(wide, high)
        for index in range(6):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(sample_seed(5, 2, index))
                assert torch.equal(crop(image, 2, index), theirs(image)), (wide, high, index)
        squashed = transforms.Compose([transforms.Resize((24, 24), bicubic), *end])(image)
        assert torch.equal(Preprocess(24, squash=True, **look)(image), squashed)


def test_raw_pixels_normalise_to_the_bits_of_the_float_path():
    for options in ({}, {"train": True}, {"squash": True}):
        for wide, high in SIZES[:8]:
            image = noise(wide, high, seed=high)
            raw = Preprocess(97, dtype=torch.uint8, **options)(image, 1, 2)
            assert raw.dtype == torch.uint8 and raw.shape == (3, 97, 97) and raw.is_contiguous()
            whole = Preprocess(97, **options)(image, 1, 2)
            assert torch.equal(data.normalise(raw[None])[0], whole)
    assert data.normalise(whole) is whole
    other = data.normalise(raw[None], data.IMAGENET_MEAN, data.IMAGENET_STD)[0]
    assert torch.equal(other, Preprocess(97, squash=True, mean=data.IMAGENET_MEAN,
                                         std=data.IMAGENET_STD)(image))
    assert "torch.uint8" in the_one_line(Preprocess, 8, dtype=torch.float16)


def test_the_fast_resize_is_within_one_255th_of_the_exact_one():
    """Black-and-white noise, where every clipped value counts, and all proportions."""
    stream = np.random.default_rng(0)
    shapes = SIZES + [tuple(stream.integers(1, 400, 2)) for _ in range(40)]
    for trial, (wide, high) in enumerate(shapes):
        image = Image.fromarray(stream.integers(0, 2, (high, wide, 3), dtype=np.uint8) * 255)
        size = int(stream.integers(8, 230))
        for options in ({}, {"train": True, "seed": trial}, {"squash": True}):
            if options.get("squash") and high > 100 * wide:
                continue  # where some Pillow turns the order of its passes round
            exact, fast = (Preprocess(size, exact=exact, dtype=torch.uint8, **options)(image, 1, 2)
                           for exact in (True, False))
            off = (exact.int() - fast.int()).abs()
            assert off.max() <= 1, (wide, high, size, options, off.max())
            assert trial > 20 or off.float().mean() < 0.3
    whole, array = Preprocess(32, exact=False), np.asarray(noise(50, 40))
    assert torch.equal(whole(array), whole(Image.fromarray(array)))
    assert torch.equal(whole(array), data.normalise(
        Preprocess(32, exact=False, dtype=torch.uint8)(array)[None])[0])


def test_a_sample_is_a_function_of_seed_epoch_and_index_only():
    image, crop = noise(50, 40), Preprocess(16, train=True, seed=1)
    first = crop(image, 3, 7)
    torch.rand(5)
    assert torch.equal(crop(image, 3, 7), first)
    assert torch.equal(pickle.loads(pickle.dumps(crop))(image, 3, 7), first)
    others = [crop(image, 3, 8), crop(image, 4, 7), Preprocess(16, True, 2)(image, 3, 7)]
    assert not any(torch.equal(first, other) for other in others)
    keys = itertools.product(range(9), range(9), range(99))
    seeds = {sample_seed(*key) & 0xFFFFFFFF for key in keys}
    assert len(seeds) > 0.999 * 9 * 9 * 99  # no structure in the bits torch keeps


def test_a_strip_of_one_pixel_costs_no_gigabyte():
    for size in ((1, 5000), (5000, 1), (30000, 2)):
        assert Preprocess(224)(noise(*size)).shape == (3, 224, 224)
        assert Preprocess(224, exact=False)(noise(*size)).shape == (3, 224, 224)


def test_every_colour_mode_comes_out_as_the_right_rgb(tmp_path):
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # 0 .. 65535 in 256 steps
    wanted = np.repeat((ramp // 257).astype(np.uint8)[..., None], 3, axis=2)
    for image in (Image.fromarray(ramp), Image.fromarray(ramp.astype(np.int32))):
        assert np.array_equal(np.asarray(to_rgb(image)), wanted), image.mode
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(every)))[..., 0], np.round(every / 257))
    Image.fromarray(ramp).save(tmp_path / "16.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "16.png")), wanted)

    base = noise(20, 10)
    for mode in ("L", "1", "LA", "CMYK", "YCbCr", "RGBA", "P", "PA", "HSV"):
        image = base.convert("P").convert("PA") if mode == "PA" else base.convert(mode)
        got = to_rgb(image)
        assert got.mode == "RGB" and got.size == (20, 10), mode
        if mode not in ("PA",):
            assert np.array_equal(np.asarray(got), np.asarray(image.convert("RGB"))), mode
    palette = base.quantize(8)
    palette.info["transparency"] = bytes([0, 128] + [255] * 6)  # warns when converted directly
    assert np.array_equal(np.asarray(to_rgb(palette)), np.asarray(palette.convert("RGBA"))[..., :3])


def test_orientation_is_applied_and_the_first_frame_of_an_animation_is_taken(tmp_path):
    tagged = Image.Exif()
    tagged[0x0112] = 6
    noise(20, 10).save(tmp_path / "turned.png", exif=tagged)
    assert np.array_equal(np.asarray(read_image(tmp_path / "turned.png")),
                          np.asarray(noise(20, 10).transpose(Image.Transpose.ROTATE_270)))
    frames = [Image.new("P", (4, 4), colour) for colour in (0, 1)]
    for frame in frames:
        frame.putpalette([255, 0, 0, 0, 0, 255])
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "moving.gif").getpixel((0, 0)) == (255, 0, 0)


def broken_files(folder):
    """Eight files that are no images, by what is wrong with them."""
    folder.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    noise(200, 200).save(buffer, "JPEG")
    whole = buffer.getvalue()
    png = io.BytesIO()
    Image.new("L", (1, 1)).save(png, "PNG")
    header = bytearray(png.getvalue())
    header[16:24] = (60000).to_bytes(4, "big") * 2  # width and height; the checksum follows
    header[29:33] = __import__("zlib").crc32(bytes(header[12:29])).to_bytes(4, "big")
    contents = {"empty": b"", "text": b"not an image at all", "cut": whole[:len(whole) // 2],
                "header only": whole[:30], "html": b"<html>Log in</html>", "zeros": bytes(5000),
                "bomb": bytes(header), "png cut": png.getvalue()[:40]}
    for name, content in contents.items():
        (folder / f"{name}.jpg").write_bytes(content)
    return sorted(contents)


def test_damaged_files_and_bombs_are_refused_with_name_and_reason(tmp_path, monkeypatch):
    for name in broken_files(tmp_path):
        with pytest.raises(UnreadableImage, match=f"{name}.jpg") as caught:
            read_image(tmp_path / f"{name}.jpg")
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # others switch Pillow's own guard off
    with pytest.raises(UnreadableImage, match="60000x60000"):
        read_image(tmp_path / "bomb.jpg")
    with pytest.raises(UnreadableImage, match="no such file"):
        read_image(tmp_path / "absent.jpg")


# -----------------------------------------------------------------------------
# Few-shot lists

def dassl_few_shot(items, shots, rng):
    """Naive twin of generate_fewshot_dataset: items are (path, label)."""
    tracker = {}
    for item in items:
        tracker.setdefault(item[1], []).append(item)
    chosen = []
    for label, group in tracker.items():
        chosen.extend(rng.sample(group, shots) if len(group) >= shots else group)
    return chosen


def pairs(dataset):
    return list(zip(dataset.paths, dataset.labels))


@pytest.mark.parametrize("shots,seed", list(itertools.product((1, 2, 4, 8, 16), (1, 2))))
def test_dtd_shots_equal_the_published_lists(shared, shots, seed):
    published = json.loads(
        (shared / f"dtd/fewshot_indices/shot_{shots}-seed_{seed}.json").read_text())
    train, val = (open_dataset("dtd", split, shared) for split in ("train", "val"))
    random.seed(99)
    random.random()
    state = random.getstate()
    for part, key in zip(few_shot(train, shots, seed, val), ("train", "val")):
        listed = published[key]["data"]
        assert [(f"./data/dtd/images/{path}", label, part.classnames[label])
                for path, label in pairs(part)] == [
            (item["impath"], item["label"], item["classname"]) for item in listed]
        source = train if key == "train" else val
        assert part.paths == [source.paths[i] for i in published[key]["indices"]]
    assert random.getstate() == state


@pytest.mark.parametrize("name,file", [
    ("oxford_flowers", "OxfordFlowers"), ("ucf101", "UCF101"), ("stanford_cars", "StanfordCars"),
    ("oxford_pets", "OxfordPets"), ("caltech101", "Caltech101")])
def test_shots_equal_the_naive_twin_on_real_splits_without_any_image(shared, tmp_path, name, file):
    folder = coop_set(tmp_path, name, shared / f"coop_splits/split_zhou_{file}.json")
    split = json.loads((shared / f"coop_splits/split_zhou_{file}.json").read_text())
    train, val = (open_dataset(name, part, folder) for part in ("train", "val"))
    assert pairs(train) == [(path, label) for path, label, _ in split["train"]]
    for shots, seed in ((16, 1), (1, 0), (3, 3)):
        rng = random.Random(seed)
        drawn = few_shot(train, shots, seed, val)
        assert pairs(drawn[0]) == dassl_few_shot(pairs(train), shots, rng)
        assert pairs(drawn[1]) == dassl_few_shot(pairs(val), min(shots, 4), rng)


def test_short_classes_are_taken_whole_in_order_and_named():
    labels = [2] * 3 + [0] * 9 + [2] * 2 + [1] * 4
    drawn = few_shot(bare_set(labels), 5, seed=7)
    rng = random.Random(7)
    assert pairs(drawn) == dassl_few_shot(pairs(bare_set(labels)), 5, rng)
    assert [x for x in drawn.labels if x == 1] == [1] * 4 and len(drawn) == 14
    assert any("class 1 (4)" in note and "class 2" not in note for note in drawn.notes)


def test_zero_shots_are_an_empty_set_and_nonsense_is_refused():
    assert len(few_shot(bare_set([0, 1]), 0, seed=1)) == 0
    for shots, seed in ((-1, 1), (2.0, 1), (1, -1), (1, 0.5), (True, 1)):
        assert "whole number" in the_one_line(few_shot, bare_set([0, 1]), shots, seed)


def test_validation_of_imagenet_comes_back_whole():
    train, val = bare_set([0, 1] * 9, name="imagenet"), bare_set([0, 1] * 9, "val", "imagenet")
    assert len(few_shot(train, 2, 1, val)[1]) == 18


# -----------------------------------------------------------------------------
# Base and new classes, class names, prompts

def test_halves_split_sorted_labels_with_the_larger_half_first():
    assert halves([3, 1, 0, 2, 4, 1]) == ([0, 1, 2], [3, 4])
    assert halves([5, 9]) == ([5], [9])


def test_dtd_base_and_new_are_24_and_23_and_base_shots_are_a_part_of_all(shared):
    base, new = (open_dataset("dtd", "test", shared, half=half) for half in ("base", "new"))
    assert (len(base.classnames), len(new.classnames)) == (24, 23)
    assert (len(base), len(new)) == (24 * 36, 23 * 36)
    assert sorted(set(new.labels)) == list(range(23))
    train = open_dataset("dtd", "train", shared)
    assert base.classnames + new.classnames == train.classnames
    first, rest = halves(train.labels)
    shots = few_shot(train, 4, 1)
    assert pairs(shots.select(first)) == [pair for pair in pairs(shots) if pair[1] < 24]
    assert set(shots.select(rest).labels) == set(range(23))
    assert {base.fingerprint, new.fingerprint, train.fingerprint} != {train.fingerprint}


def test_classes_are_found_by_any_spelling_and_renumbered_in_the_order_given(shared):
    train = open_dataset("dtd", "train", shared, classes=["Polka-Dotted", "banded"])
    assert train.classnames == ["polka-dotted", "banded"] and len(train) == 120
    assert {label for path, label in pairs(train) if path.startswith("banded/")} == {1}
    assert find_classes(["ice_skating_rink", "Sea or Lake"], ["ICE skating  rink"]) == [0]
    assert find_classes(["missile", "x", "missile"], ["missile"]) == [0, 2]
    line = the_one_line(open_dataset, "dtd", "train", shared, classes=["bandd", "dotted"])
    assert "'banded'" in line


def test_dtd_prompts_are_those_of_the_official_run(shared):
    train = open_dataset("dtd", "train", shared)
    prompts = class_prompts(train.classnames, train.template)
    assert len(prompts) == 47
    assert prompts[0] == "a photo of a banded, a type of texture."
    assert "a photo of a polka-dotted, a type of texture." in prompts
    assert "a photo of a interlaced, a type of texture." in prompts
    assert prompts == [f"a photo of a {name}, a type of texture." for name in train.classnames]


def test_templates_cover_every_known_set_and_bad_ones_are_refused():
    assert set(data.TEMPLATES) == {*data.KNOWN, "demo"}
    assert class_prompts(["a_b", "{c}"], "x {} y {c}") == ["x a b y a b", "x {c} y {c}"]
    assert "no place" in the_one_line(class_prompts, ["a"], "a photo")
    assert "{name}" in the_one_line(class_prompts, ["a"], "a {name} {}")


# -----------------------------------------------------------------------------
# Opening published sets

def test_a_missing_split_names_file_id_and_target_and_writes_nothing(tmp_path):
    for name, known in data.KNOWN.items():
        if not known.split:
            continue
        line = the_one_line(open_dataset, name, "test", tmp_path)
        assert known.split in line and known.drive in line
        assert str(tmp_path / known.homes[0] / known.split) in line
        assert ("--split official" in line) == (name in data.OFFICIAL)
    assert not any(tmp_path.rglob("*"))


def test_names_are_known_in_many_spellings_and_near_misses_are_suggested(shared, tmp_path):
    for text, name in {"DTD": "dtd", "DescribableTextures": "dtd", "describable_textures": "dtd",
                       "oxford-pets": "oxford_pets", "pets": "oxford_pets", "EuroSAT": "eurosat",
                       "ImageNetV2": "imagenetv2", "imagenet_sketch": "imagenet-sketch",
                       "ImageNetA": "imagenet-a", "Caltech101": "caltech101", "food": "food101",
                       "FGVCAircraft": "fgvc_aircraft", "SUN397": "sun397"}.items():
        assert data.dataset_name(text) == name, text
    assert "'eurosat'" in the_one_line(open_dataset, "eurosta", "train", shared)
    assert "no file" in the_one_line(open_dataset, str(tmp_path / "nothing"), "train")
    for wrong in ({"split": "dev"}, {"half": "old"}, {"layout": "zhou"}):
        assert "expected one of" in the_one_line(open_dataset, "dtd", **{"split": "test", **wrong})


def test_missing_classes_are_listed_and_the_rest_can_be_used(shared):
    test = open_dataset("dtd", "test", shared)
    line = the_one_line(test.check_files)
    assert "41 of 47 classes have no image under" in line and "--classes" in line
    assert "bumpy" in line and "zigzagged" in line and "banded" not in line
    here = open_dataset("dtd", "test", shared, classes=["banded", "cracked"])
    here.check_files()
    image, label, index = here.with_transform(Preprocess(32))[71]
    assert image.shape == (3, 32, 32) and (label, index) == (1, 71)


def test_eurosat_is_read_in_place_from_its_zip(shared, tmp_path):
    test = open_dataset("eurosat", "test", shared, transform=Preprocess(64))
    assert len(test) == 8100 and test.store.zipped
    test.check_files()
    half = open_dataset("eurosat", "test", shared, half="base")
    assert len(half) == 4200 and half.classnames[0] == "Annual Crop Land"
    some = test.subset(range(0, 8100, 500))
    alone = [some[i] for i in range(len(some))]
    loader = make_loader(some, 5, shuffle=False, workers=2, multiprocessing_context="fork")
    images = torch.cat([batch[0] for batch in loader])
    assert torch.equal(images, torch.stack([item[0] for item in alone]))
    with zipfile.ZipFile(test.store.path) as archive:
        unpacked = archive.extract("2750/" + some.paths[0], tmp_path)
    assert torch.equal(alone[0][0], Preprocess(64)(Image.open(unpacked)))


def write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_official_lists_are_read_where_their_authors_put_them(tmp_path):
    for split in ("train", "val", "test"):
        write_lines(tmp_path / f"dtd/dtd/labels/{split}1.txt", [f"b/{split}.jpg", f"a/{split}.jpg"])
        write_lines(tmp_path / f"fgvc_aircraft/images_variant_{split}.txt",
                    [f"{split}1 Boeing 707-320", f"{split}2 A300"])
    write_lines(tmp_path / "fgvc_aircraft/variants.txt", ["Boeing 707-320", "A300"])
    for split in ("trainval", "test"):
        write_lines(tmp_path / f"oxford-iiit-pet/annotations/{split}.txt",
                    [f"# a comment", f"Great_Dane_{split} 2 2 1", f"Abyssinian_{split} 1 1 1"])
    for split in ("train", "test"):
        path = tmp_path / f"food-101/meta/{split}.json"
        write_lines(path, [json.dumps({"b_pie": [f"b_pie/{split}"], "a_pie": [f"a_pie/{split}"]})])
    cases = {"dtd": (["a", "b"], [("b/test.jpg", 1), ("a/test.jpg", 0)]),
             "fgvc_aircraft": (["Boeing 707-320", "A300"], [("test1.jpg", 0), ("test2.jpg", 1)]),
             "oxford_pets": (["abyssinian", "great_dane"],
                             [("Great_Dane_test.jpg", 1), ("Abyssinian_test.jpg", 0)]),
             "food101": (["a_pie", "b_pie"], [("b_pie/test.jpg", 1), ("a_pie/test.jpg", 0)])}
    for name, (classnames, rows) in cases.items():
        test = open_dataset(name, "test", tmp_path, layout="official")
        assert (test.classnames, pairs(test)) == (classnames, rows), name
    assert open_dataset("aircraft", "val", tmp_path).paths == ["val1.jpg", "val2.jpg"]
    assert "no val split" in the_one_line(open_dataset, "pets", "val", tmp_path, layout="official")
    assert "no official" in the_one_line(open_dataset, "ucf", "val", tmp_path, layout="official")
    assert "labels/train1.txt" in the_one_line(
        open_dataset, "dtd", "test", tmp_path / "x", layout="official")


def test_imagenet_and_its_shifts_follow_coop_labels(tmp_path):
    names = ["n1 tench", "n2 missile", "n3 sea_lion", "n4 missile"]
    write_lines(tmp_path / "imagenet/classnames.txt", names)
    for wnid in ("n1", "n2", "n3", "n4"):
        for split in ("train", "val"):
            save(tmp_path / f"imagenet/images/{split}/{wnid}/x.JPEG")
    for wnid in ("n2", "n4"):
        save(tmp_path / f"imagenet-adversarial/imagenet-a/{wnid}/y.jpg")
    write_lines(tmp_path / "imagenet-adversarial/imagenet-a/README.txt", ["read me"])
    for number in (0, 3):
        save(tmp_path / f"imagenetv2/imagenetv2-matched-frequency-format-val/{number}/z.jpeg")
    train, val, test = (open_dataset("imagenet", s, tmp_path) for s in ("train", "val", "test"))
    assert pairs(train) == [(f"train/n{i + 1}/x.JPEG", i) for i in range(4)]
    assert val.paths == test.paths == [f"val/n{i}/x.JPEG" for i in range(1, 5)]
    train.check_files()
    shift = open_dataset("imagenet-a", "test", tmp_path)
    assert shift.classnames == ["missile", "missile"] and pairs(shift)[1] == ("n4/y.jpg", 1)
    v2 = open_dataset("imagenetv2", "test", tmp_path)
    assert pairs(v2) == [("0/z.jpeg", 0), ("3/z.jpeg", 3)] and len(v2.classnames) == 4
    assert "no train split" in the_one_line(open_dataset, "imagenet-a", "train", tmp_path)


def test_downloads_go_through_torchvision_and_say_what_failed(tmp_path, shared, monkeypatch):
    tv = pytest.importorskip("torchvision.datasets", exc_type=Exception)

    def dtd(root, download):  # what the real one leaves behind
        for split, name in itertools.product(("train", "val", "test"), ("a", "b")):
            save(pathlib.Path(root) / f"dtd/dtd/images/{name}/{split}.png")
            write_lines(pathlib.Path(root) / f"dtd/dtd/labels/{split}1.txt",
                        [f"a/{split}.png", f"b/{split}.png"])

    def fails(root, download):
        raise RuntimeError("the server is asleep\nand snores")
    monkeypatch.setattr(tv, "DTD", fails)
    line = the_one_line(open_dataset, "dtd", "test", tmp_path, layout="official", download=True)
    assert "the download failed (the server is asleep)" in line
    assert "--download" in the_one_line(open_dataset, "dtd", "test", tmp_path, layout="official")
    monkeypatch.setattr(tv, "DTD", dtd)
    test = open_dataset("dtd", "test", tmp_path, layout="official", download=True)
    assert len(test.preload()) == 2
    split = shared / "coop_splits/split_zhou_StanfordCars.json"
    folder = coop_set(tmp_path, "stanford_cars", split)
    assert "host is gone" in the_one_line(open_dataset, "cars", "test", folder, download=True)
    assert "no downloader" in the_one_line(open_dataset, "imagenet", "test", folder, download=True)
    assert "name of a dataset" in the_one_line(open_dataset, "./x", "test", folder, download=True)


def test_images_are_also_found_where_torchvision_puts_them(tmp_path, shared):
    folder = coop_set(tmp_path, "oxford_pets", shared / "coop_splits/split_zhou_OxfordPets.json")
    assert "--download" in the_one_line(open_dataset("pets", "test", folder).check_files)
    save(tmp_path / "oxford-iiit-pet/images/Abyssinian_201.jpg")
    test = open_dataset("pets", "test", folder, classes=["abyssinian", "bengal"])
    assert test[0][0].size == (20, 16)


# -----------------------------------------------------------------------------
# Opening the user's own files

def test_a_folder_of_class_folders_gets_a_fixed_announced_split(tmp_path):
    class_folder(tmp_path / "pics", ("sea_lion", "Ünï", "猫"))
    parts = [open_dataset(tmp_path / "pics", split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [15, 6, 9]
    assert len({path for part in parts for path in part.paths}) == 30
    assert parts[0].classnames == sorted(["sea_lion", "Ünï", "猫"])
    assert parts[0].paths == open_dataset(tmp_path / "pics", "train").paths
    assert any("50/20/30" in note for note in parts[0].notes)
    assert any("15 train / 6 val / 9 test" in n and parts[0].fingerprint[:12] in n
               for n in parts[0].notes)
    assert [len(part) for part in (p.check_files() or p.preload() for p in parts)] == [15, 6, 9]
    save(tmp_path / "pics/猫/new.png")
    assert open_dataset(tmp_path / "pics", "train").fingerprint != parts[0].fingerprint


def test_tiny_classes_keep_a_training_and_then_a_test_image(tmp_path):
    cuts = {1: (1, 0, 0), 2: (1, 0, 1), 3: (2, 0, 1), 4: (2, 1, 1), 10: (5, 2, 3)}
    for count, expected in cuts.items():
        rows, _ = data.complete_splits({"all": [(f"{i}", 0) for i in range(count)]})
        assert tuple(len(rows[split]) for split in ("train", "val", "test")) == expected


def test_split_folders_litter_and_link_loops_are_understood(tmp_path):
    for split in ("train", "valid", "test"):
        class_folder(tmp_path / "set" / split, ("a/deep", "b"), 3)
    for junk in ("__MACOSX/a/x.png", "train/a/.hidden.png", "train/.cache/x.png"):
        save(tmp_path / "set" / junk)
    for junk in ("train/a/Thumbs.db", ".DS_Store", "train/a/notes.txt"):
        (tmp_path / "set" / junk).write_bytes(b"junk")
    os.symlink(tmp_path / "set", tmp_path / "set/train/a/loop")
    train = open_dataset(tmp_path / "set", "train")
    assert train.classnames == ["a", "b"] and len(train) == 6
    assert len(open_dataset(tmp_path / "set", "val")) == 6
    shutil.rmtree(tmp_path / "set/test")
    only_val = open_dataset(tmp_path / "set", "test")
    assert len(only_val) == 6 and any("val is used as test" in note for note in only_val.notes)


def test_bad_folders_are_refused_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no class folders" in the_one_line(open_dataset, tmp_path / "empty", "train")
    save(tmp_path / "flat/x.png")
    assert "<class>/<image>" in the_one_line(open_dataset, tmp_path / "flat", "train")
    class_folder(tmp_path / "one", ("a",))
    assert "only the class" in the_one_line(open_dataset, tmp_path / "one", "train")
    class_folder(tmp_path / "twice", ("Sea_Lion", "sea lion"), 2)
    assert "'Sea_Lion' and 'sea lion'" in the_one_line(open_dataset, tmp_path / "twice", "train")
    class_folder(tmp_path / "hole", ("a", "b"), 2)
    (tmp_path / "hole/nothing").mkdir()
    assert "nothing" in the_one_line(open_dataset, tmp_path / "hole", "train")
    (tmp_path / "set.xyz").write_bytes(b"")
    assert "expected a folder" in the_one_line(open_dataset, tmp_path / "set.xyz", "train")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads every folder")
def test_a_closed_folder_is_named(tmp_path):
    class_folder(tmp_path / "set")
    (tmp_path / "set/cat").chmod(0)
    assert "cannot list" in the_one_line(open_dataset, tmp_path / "set", "train")


TABLES = {
    "comma.csv": "path,label\na/0.png,cat\na/1.png,dog\nb/2 ü.png,cat\n",
    "bom_crlf.csv": "\ufeffImage;Class\r\na/0.png;cat\r\na/1.png;dog\r\nb/2 ü.png;cat\r\n",
    "tab.tsv": "filepath\ttitle\na/0.png\tcat\na/1.png\tdog\nb/2 ü.png\tcat\n",
    "lines.jsonl": '{"file": "a/0.png", "label": "cat"}\n\n{"file": "a/1.png", "label": "dog"}\n'
                   '{"file": "b/2 ü.png", "label": "cat"}\n',
    "quoted.csv": 'caption,filename,category\n"two\nlines, here",a/0.png,cat\n"x",a/1.png,dog\n'
                  'y,b\\2 ü.png,cat\n,,\n',
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_every_dialect_say_the_same(tmp_path, name):
    for path in ("a/0.png", "a/1.png", "b/2 ü.png"):
        save(tmp_path / path)
    (tmp_path / name).write_bytes(TABLES[name].encode())
    parts = [open_dataset(tmp_path / name, split) for split in ("train", "test")]
    assert sorted(parts[0].paths + parts[1].paths) == ["a/0.png", "a/1.png", "b/2 ü.png"]
    assert parts[0].classnames == ["cat", "dog"] and len(parts[0].preload()) == 2
    assert any("1 rows without" in note for note in parts[0].notes) == (name == "quoted.csv")


def test_a_split_column_is_obeyed_and_integer_labels_sort_as_numbers(tmp_path):
    rows = "\n".join(f"{i}.png,{label},{split}" for i, (label, split) in enumerate(
        itertools.product((10, 9, 2), ("Train", "validation", "test"))))
    (tmp_path / "t.csv").write_text("path,label,Split\n" + rows)
    test = open_dataset(tmp_path / "t.csv", "test")
    assert test.classnames == ["2", "9", "10"] and test.labels == [2, 1, 0]
    assert test.counts == {"train": 3, "val": 3, "test": 3}


def test_bad_tables_are_refused_with_what_was_found(tmp_path):
    def line(text, suffix=".csv"):
        (tmp_path / f"t{suffix}").write_bytes(text if isinstance(text, bytes) else text.encode())
        return the_one_line(open_dataset, tmp_path / f"t{suffix}", "train")
    assert "['picture', 'label']" in line("picture,label\na,b\n")
    assert "path|label" in line("path|label\na|b\n")
    assert "outside its folder" in line("path,label\n../a.png,x\nb.png,y\n")
    assert "'trian'" in line("path,label,split\na.png,x,trian\n")
    assert "two or more" in line("path,label\n")
    assert "columns []" in line("") or "columns" in line("")
    assert "not a readable table" in line('{"path": 1\n', ".jsonl")
    assert "UTF-8" in line("path,label\na,é".encode("latin-1"))
    assert "no file" in the_one_line(open_dataset, tmp_path / "gone.csv", "train")
    assert "e.g. a.png" in line("path,label,split\na.png,x,train\nb.png,y,train\na.png,x,test\n")
    assert "e.g. a.png" in line("path,label\na.png,x\nb.png,y\na.png,y\n")


def test_absolute_paths_are_taken_only_outside_zips(tmp_path):
    save(tmp_path / "far/a.png"), save(tmp_path / "far/b.png")
    text = f"path,label\n{tmp_path}/far/a.png,x\n{tmp_path}/far/b.png,y\n"
    (tmp_path / "near").mkdir()
    (tmp_path / "near/t.csv").write_text(text)
    open_dataset(tmp_path / "near/t.csv", "train").check_files()
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr("t.csv", text)
    assert "outside" in the_one_line(open_dataset, tmp_path / "t.zip", "train")


def demo_zip(path, table="demo.csv"):
    """A zip as assets/demo.zip: a table and the JPEG files it lists."""
    lines = ["path,label,split,caption"]
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(24):
            buffer = io.BytesIO()
            noise(30, 20, seed=number).save(buffer, "JPEG")
            archive.writestr(f"images/{number}.jpg", buffer.getvalue())
            label, split = ("River", "Forest")[number % 2], ("train", "val", "test")[number % 3]
            lines.append(f'images/{number}.jpg,{label},{split},"seen, from above"')
        archive.writestr(table, "\n".join(lines))
    return path


def test_a_zip_with_a_table_is_read_in_place(tmp_path):
    train = open_dataset(demo_zip(tmp_path / "demo.zip"), "train")
    assert train.counts == {"train": 8, "val": 8, "test": 8} and train.labels[:2] == [1, 0]
    assert train.template == "a centered satellite photo of {}."
    train.check_files()
    assert train[0][0].size == (30, 20) and train.paths[0] == "images/0.jpg"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo.zip"]
    other = pickle.loads(pickle.dumps(train))
    assert other[3][0].tobytes() == train[3][0].tobytes()


def test_the_shipped_demo_opens():
    if not (ROOT / "assets/demo.zip").is_file():
        pytest.skip("assets/demo.zip is not here")
    for split in ("train", "val", "test"):
        part = open_dataset("demo", split)
        part.check_files()
        assert part.template == "a centered satellite photo of {}." and len(part.preload()) > 0


def test_every_process_opens_the_zip_for_itself(tmp_path, monkeypatch):
    store = ImageStore(demo_zip(tmp_path / "demo.zip"))
    mine = store.archive()
    assert store.archive() is mine and pickle.loads(pickle.dumps(store))._zip is None
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as a forked worker sees itself
    assert store.archive() is not mine and len(store.names()) == 25


def test_a_zip_of_class_folders_is_read_through_its_lone_outer_folder(tmp_path):
    class_folder(tmp_path / "x/outer")
    (tmp_path / "x/__MACOSX").mkdir()
    shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "x")
    train = open_dataset(tmp_path / "set.zip", "train")
    assert train.classnames == ["cat", "dog"] and train.paths[0].startswith("cat/")
    assert len(train.preload()) == 10


def test_zips_that_are_broken_or_reach_outside_are_refused(tmp_path, monkeypatch):
    (tmp_path / "bad.zip").write_bytes(b"<html>")
    assert "is not a zip" in the_one_line(open_dataset, tmp_path / "bad.zip", "train")
    for name in ("../evil.jpg", "/etc/evil.jpg", "a/..\\..\\x.jpg"):
        with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
            archive.writestr(name, b"x")
        assert "refused" in the_one_line(open_dataset, tmp_path / "evil.zip", "train")
    path = demo_zip(tmp_path / "flip.zip")
    content = bytearray(path.read_bytes())
    content[content.index(b"images/0.jpg") + 200] ^= 1  # one bit inside the first member
    path.write_bytes(bytes(content))
    with pytest.raises(UnreadableImage, match="CRC|images/0.jpg"):
        open_dataset(path, "train")[0]
    monkeypatch.setattr(data, "MAX_FILE_BYTES", 900)  # the table is shorter, the images are not
    with pytest.raises(UnreadableImage, match="too many"):
        open_dataset(path, "train")[1]


def test_a_split_file_of_ones_own_opens_and_bad_ones_are_refused(tmp_path, monkeypatch):
    class_folder(tmp_path, ("a", "b"), 3)
    entries = [["a/000.png", 0, "a"], ["b/000.png", 1, "b"]]

    def write(content):
        (tmp_path / "my.json").write_text(json.dumps(content))
        return tmp_path / "my.json"
    monkeypatch.setenv("MY_SET", str(tmp_path))
    write({"train": entries, "val": [], "test": entries})
    test = open_dataset("$MY_SET/my.json", "test")
    assert test.classnames == ["a", "b"] and test.preload().images[0].size == (12, 10)
    for bad in ([], {"train": [["a.png", 0]], "test": []}, {"train": [["../a.png", 0, "a"]]},
                {"train": [["a.png", 1, "a"]]}, {"train": [["a", 0, "a"], ["b", 0, "b"]]}):
        assert "not a split file" in the_one_line(open_dataset, write(bad), "train")


def test_a_coop_folder_opens_by_path(shared):
    train = open_dataset(shared / "dtd", "train", classes=["banded", "braided"])
    assert train.name == "dtd" and train.template == data.TEMPLATES["dtd"]
    train.check_files()


# -----------------------------------------------------------------------------
# Unreadable images in a set

def test_evaluation_skips_and_preload_drops_unreadable_images(tmp_path):
    class_folder(tmp_path / "s/train", count=60)
    class_folder(tmp_path / "s/test", count=60)
    (tmp_path / "s/train/cat/003.png").write_bytes(b"")
    train = open_dataset(tmp_path / "s", "train", transform=Preprocess(8))
    bad = train.paths.index("train/cat/003.png")
    image, label, index = train[(4, bad)]
    assert (label, index) == (-1, bad) and not image.any() and image.shape == (3, 8, 8)
    with pytest.raises(UnreadableImage, match="003.png"):
        train.with_transform(None)[bad]
    kept = train.subset(range(len(train))).preload()
    assert len(kept) == 119 and "train/cat/003.png" not in kept.paths
    assert any("1 unreadable" in note and "003.png" in note for note in kept.notes)
    assert torch.equal(kept[bad][0], train[bad + 1][0]) and len(train) == 120
    for number in (4, 5):
        (tmp_path / f"s/train/cat/{number:03d}.png").write_bytes(b"junk")
    assert "more than 1 %" in the_one_line(train.preload)
    for file in (tmp_path / "s/train/dog").iterdir():
        file.write_bytes(b"junk")
    assert "1 of 2 classes" in the_one_line(train.preload)
    shutil.rmtree(tmp_path / "s/train")
    assert "all 120 train images" in the_one_line(train.check_files)


def test_a_few_missing_images_are_noted_and_many_refused(tmp_path):
    train = open_dataset(class_folder(tmp_path, count=50), "train")
    (tmp_path / train.paths[3]).unlink()
    train.check_files()
    assert any("1 of 50" in note for note in train.notes)
    (tmp_path / train.paths[4]).unlink()
    assert "2 of 50" in the_one_line(train.check_files)


# -----------------------------------------------------------------------------
# Batches and loaders

def test_batches_are_a_permutation_of_seed_and_epoch_shared_out_to_ranks():
    whole = Batches(23, 5, seed=3, drop_last=False)
    whole.set_epoch(2)
    batches = list(whole)
    assert len(batches) == len(whole) == 5
    assert [whole.global_size(batch) for batch in range(6)] == [5, 5, 5, 5, 3, 0]
    assert sorted(index for batch in batches for _, index in batch) == list(range(23))
    assert {epoch for batch in batches for epoch, _ in batch} == {2}
    def order(seed, epoch):
        other = Batches(23, 5, seed, drop_last=False)
        other.set_epoch(epoch)
        return [index for batch in other for _, index in batch]
    assert order(3, 2) == [index for batch in batches for _, index in batch]
    assert order(3, 2) != order(3, 1) and order(3, 2) != order(2, 2)
    for world in (1, 2, 3, 7):
        ranks = [pickle.loads(pickle.dumps(Batches(23, 5, 3, rank, world, drop_last=False)))
                 for rank in range(world)]
        for rank in ranks:
            rank.set_epoch(2)
        for number, shares in enumerate(zip(*ranks)):  # every rank has as many batches
            merged = [key for group in itertools.zip_longest(*shares) for key in group if key]
            assert merged == batches[number]


def test_a_set_smaller_than_the_batch_is_one_short_batch_and_larger_ones_drop_the_rest(shared):
    train = open_dataset("dtd", "train", shared)
    lengths = [len(Batches(len(few_shot(train, shots, 1)), 32)) for shots in (1, 2, 4, 8, 16)]
    assert lengths == [1, 2, 5, 11, 23]
    eurosat = open_dataset("eurosat", "train", shared)
    lengths = [len(Batches(len(few_shot(eurosat, shots, 1)), 32)) for shots in (1, 2, 4, 8, 16)]
    assert lengths == [1, 1, 1, 2, 5]
    assert [len(batch) for batch in Batches(10, 32)] == [10]
    assert [len(batch) for batch in Batches(10, 4, shuffle=False)] == [4, 4, 2]
    assert list(Batches(4, 3, shuffle=False))[0] == [(0, 0), (0, 1), (0, 2)]
    assert list(Batches(0, 4)) == []


def test_an_epoch_goes_on_from_the_middle():
    first, second = Batches(40, 4, seed=1), Batches(40, 4, seed=1)
    first.set_epoch(5)
    second.set_epoch(5, first_batch=6)
    assert list(first)[6:] == list(second) and len(second) == 10


def two_epochs(dataset, first_batch=0, **options):
    loader = make_loader(dataset, 5, seed=9, **options)
    found = []
    for epoch in (0, 1):
        loader.batch_sampler.set_epoch(epoch, first_batch)
        found += [tuple(part.clone() for part in batch) for batch in loader]
    return found


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(x, y) for a, b in zip(left, right) for x, y in zip(a, b))


def test_batches_do_not_depend_on_workers_nor_on_how_they_start(tmp_path):
    train = open_dataset(class_folder(tmp_path, count=24), "train",
                         transform=Preprocess(8, train=True, seed=3))
    alone = two_epochs(train)
    assert alone[0][0].shape == (5, 3, 8, 8) and not torch.equal(alone[0][0], alone[4][0])
    state = torch.get_rng_state()
    assert same(alone, two_epochs(train.subset(range(24)).preload()))
    assert torch.equal(state, torch.get_rng_state())  # loading leaves the global stream alone
    assert same(alone, two_epochs(train, workers=2, multiprocessing_context="fork"))
    held = train.subset(range(24)).preload()  # decoded images travel to a spawned worker
    assert same(alone, two_epochs(held, workers=1, multiprocessing_context="spawn"))
    half = len(alone) // 2
    assert same(alone[2:half] + alone[half + 2:],
                two_epochs(train, first_batch=2, workers=2, multiprocessing_context="fork"))


def test_a_rank_without_images_gets_an_empty_batch(tmp_path):
    train = open_dataset(class_folder(tmp_path), "train", transform=Preprocess(8))
    loader = make_loader(train, 4, shuffle=False, rank=2, world_size=3)
    sizes = [tuple(part.shape) for part in list(loader)[-1]]
    assert len(train) == 10 and sizes == [(0, 3, 8, 8), (0,), (0,)]
    assert list(loader)[-1][1].dtype == torch.long
    raw = train.with_transform(Preprocess(8, dtype=torch.uint8))
    kinds = [images.dtype for images, _, _ in make_loader(raw, 4, rank=2, world_size=3)]
    assert kinds == [torch.uint8] * len(kinds)


# -----------------------------------------------------------------------------
# Scores

def test_zero_shot_weights_equal_the_naive_mean_of_unit_vectors():
    torch.manual_seed(0)
    table = {f"{c} {t}": torch.randn(6, dtype=torch.float64) for c in range(5) for t in range(4)}
    groups = [[f"{c} {t}" for t in range(1 + c % 4)] for c in range(5)]
    calls = []

    def encode(texts):
        calls.append(len(texts))
        return torch.stack([table[text] for text in texts])
    weights = zero_shot_weights(encode, groups, chunk=3)
    for row, group in zip(weights, groups):
        mean = sum(table[text] / table[text].norm() for text in group) / len(group)
        assert torch.allclose(row, mean / mean.norm(), atol=1e-12)
    assert max(calls) == 3 and sum(calls) == sum(map(len, groups))
    single = zero_shot_weights(encode, ["0 0", "1 1"])
    assert torch.allclose(single[1], table["1 1"] / table["1 1"].norm(), atol=1e-12)
    assert "at least one prompt" in the_one_line(zero_shot_weights, encode, [["0 0"], []])


def naive_scores(predictions, labels, classes):
    scored = [(p, t) for p, t in zip(predictions, labels) if t >= 0]
    f1 = []
    for c in sorted({t for _, t in scored}):
        hit = sum(p == t == c for p, t in scored)
        f1.append(2 * hit / (sum(p == c for p, _ in scored) + sum(t == c for _, t in scored)))
    return 100 * sum(p == t for p, t in scored) / len(scored), 100 * sum(f1) / len(f1)


def test_accuracy_and_macro_f1_equal_the_naive_twin_and_sklearn():
    rng = np.random.default_rng(0)
    for _ in range(20):
        labels = rng.integers(-1, 6, 60)
        labels[labels == 4] = 5           # a class that never occurs
        predictions = rng.integers(0, 6, 60)
        predictions[predictions == 2] = 4  # one never predicted, one predicted that never occurs
        scores = classification_scores(torch.from_numpy(predictions), labels.tolist(), 7)
        accuracy, macro_f1 = naive_scores(predictions, labels, 7)
        assert scores["accuracy"] == pytest.approx(accuracy, abs=1e-12)
        assert scores["macro_f1"] == pytest.approx(macro_f1, abs=1e-12)
        assert scores["skipped"] == (labels == -1).sum() == 60 - scores["scored"]
        assert scores["per_class"][4] is None and scores["per_class"][2] == 0
        assert scores["confusion"].sum() == scores["scored"]
        assert scores["confusion"][5, 4] == ((labels == 5) & (predictions == 4)).sum()
        try:
            from sklearn.metrics import f1_score
        except ImportError:
            continue
        seen = labels >= 0
        theirs = f1_score(labels[seen], predictions[seen], average="macro",
                          labels=np.unique(labels[seen]))
        assert scores["macro_f1"] == pytest.approx(100 * theirs, abs=1e-10)
    assert "no image could be scored" in the_one_line(classification_scores, [0, 1], [-1, -1], 2)


# -----------------------------------------------------------------------------
# Command line

def test_the_command_prints_the_published_list_and_nothing_else(shared, tmp_path):
    command = [sys.executable, str(ROOT / "data.py"), "--few-shot", "dtd", "--seed", "1"]
    done = subprocess.run([*command, "--shots", "4", "--data-dir", str(shared)], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    printed = json.loads(done.stdout)
    published = json.loads((shared / "dtd/fewshot_indices/shot_4-seed_1.json").read_text())
    for split in ("train", "val"):
        assert printed[split] == [[item["impath"].split("images/")[1], item["label"]]
                                  for item in published[split]["data"]]
    assert done.returncode == 0 and done.stderr == ""


def test_the_command_line_refuses_in_one_line_with_exit_code_2(tmp_path, capsys):
    assert data.main(["--few-shot", "dtd", "--data-dir", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: dtd: ") and err.count("\n") == 1
    for wrong in (["--few-shot"], ["--few", "dtd"], [], ["--few-shot", "dtd", "--shots", "x"]):
        with pytest.raises(SystemExit) as caught:
            data.main(wrong)
        assert caught.value.code == 2
    with pytest.raises(SystemExit):
        data.main(["--help"])
    assert "--data-dir" in capsys.readouterr().out


def test_the_command_works_on_a_users_own_zip(tmp_path, capsys):
    assert data.main(["--few-shot", str(demo_zip(tmp_path / "my.zip")), "--shots", "9"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["train"]) == 8 and "note: fewer than 9" in err


# -----------------------------------------------------------------------------
# The data doctor

def photo(seed, width=72, height=64):
    """A soft picture with large shapes, as photographs are: it survives re-encoding."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def photo_folder(root, count=34, classes=("cat", "dog")):
    for label, number in itertools.product(range(len(classes)), range(count)):
        save(root / classes[label] / f"{number:03d}.jpg", photo(1000 * label + number))
    return root


def split_folder(root):
    """16 train and 2 test pictures of two classes, no two alike."""
    for split, first, count in (("train", 0, 16), ("test", 16, 2)):
        for label, name in enumerate(("cat", "dog")):
            for number in range(first, first + count):
                save(root / split / name / f"{number}.jpg", photo(1000 * label + number))
    return root


def checked(path, **options):
    """The report of the doctor, after a look at its form, and {finding: examples}."""
    report = json.loads(json.dumps(data.check_data(str(path), **options)))
    assert [f["finding"] for f in report["findings"]] == [
        key for key in data.FINDINGS if key in {f["finding"] for f in report["findings"]}]
    for found in report["findings"]:
        assert found["what"] and found["advice"] and found["count"] >= len(found["examples"]) > 0
    return report, {found["finding"]: found["examples"] for found in report["findings"]}


def test_the_doctor_finds_nothing_in_clean_data(tmp_path, capsys):
    report, found = checked(photo_folder(tmp_path / "clean"))
    assert found == {} and report["usable"] and report["examined"] == report["images"] == 68
    assert report["counts"] == {"train": 34, "val": 14, "test": 20}
    assert data.main(["--check", str(tmp_path / "clean")]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 4 and out.endswith("verdict: usable, nothing to report\n") and not err
    with zipfile.ZipFile(tmp_path / "clean.zip", "w") as archive:
        for file in sorted((tmp_path / "clean").rglob("*.jpg")):
            archive.write(file, file.relative_to(tmp_path))
    zipped, found = checked(tmp_path / "clean.zip")
    assert found == {} and zipped["counts"] == report["counts"] and zipped["examined"] == 68


def test_the_doctor_names_every_kind_of_odd_picture(tmp_path, monkeypatch):
    folder = split_folder(tmp_path / "set")
    odd = folder / "train/cat"
    for name, kind in {"empty": "empty", "text": "not_image", "html": "not_image",
                       "zeros": "not_image", "png cut": "not_image", "cut": "damaged",
                       "bomb": "bomb"}.items():
        broken_files(tmp_path / "broken")
        shutil.copy(tmp_path / f"broken/{name}.jpg", odd / f"{kind} {name}.jpg")
    ramp = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint16) * 500
    Image.fromarray(ramp).save(odd / "deep.png")
    photo(50).convert("CMYK").save(odd / "cmyk.jpg")
    clear = photo(51).quantize(16)
    clear.save(odd / "alpha palette.png", transparency=bytes([0, 128] + [255] * 14))
    photo(52).convert("RGBA").save(odd / "alpha.png")
    photo(53).save(odd / "animated.gif", save_all=True, append_images=[photo(54)])
    tagged = Image.Exif()
    tagged[0x0112] = 6
    photo(55).save(odd / "turned.jpg", exif=tagged)
    photo(56).save(odd / "turned.png", exif=tagged)
    photo(59).save(odd / "sound pixels, damaged tags.jpg", exif=b"Exif\0\0no tags at all")
    photo(57, 64, 20).save(odd / "tiny.jpg")
    photo(58, 1000, 40).save(odd / "strip.jpg")
    noise(5200, 5000, "L").resize((5200, 5000)).save(odd / "huge.jpg", quality=5)
    (odd / "ignored.heic").write_bytes(b"x")
    report, found = checked(folder)
    for kind in ("empty", "not_image", "damaged", "bomb", "deep", "cmyk", "alpha", "animated",
                 "turned", "tiny", "strip", "huge", "ignored"):
        files = {file.name for file in odd.iterdir() if file.name.startswith(kind)}
        assert {os.path.basename(example) for example in found.pop(kind)} == files, kind
    assert "more than 1 %" in found.pop("refused")[0] and not report["usable"]
    assert found == {}
    for limit in ("MAX_PIXELS", "MAX_FILE_BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(data, limit, 4000 if limit == "MAX_PIXELS" else 500)
            assert data.examine(ImageStore(odd), "0.jpg") == (["bomb"], None)
    for file in odd.glob("*.*"):  # six of the faults alone would do
        if file.name.startswith(("text", "not_image", "damaged", "empty", "bomb")):
            file.unlink()
    assert checked(folder)[0]["usable"]


def test_the_doctor_sees_copies_within_and_above_all_across_splits(tmp_path, capsys):
    folder = split_folder(tmp_path / "set")
    shutil.copy(folder / "train/cat/3.jpg", folder / "test/cat/same.jpg")
    photo(3).resize((90, 80)).save(folder / "train/cat/again.png")  # same.jpg still counts once
    photo(1004).save(folder / "test/cat/encoded.jpg", quality=60)  # a dog, in truth
    photo(5).resize((50, 44), Image.Resampling.BICUBIC).save(folder / "test/cat/smaller.png")
    photo(6).resize((140, 130), Image.Resampling.LANCZOS).save(folder / "train/cat/larger.jpg")
    shutil.copy(folder / "train/cat/7.jpg", folder / "train/dog/twin.jpg")
    red = np.asarray(photo(8))
    Image.fromarray(red[..., [2, 0, 1]]).save(folder / "test/cat/recoloured.png")
    for split in ("train", "test"):  # flat pictures agree by chance, only their bytes can tell
        Image.new("RGB", (64, 64), (90, 90, 90 + len(split))).save(folder / split / "cat/flat.png")
    report, found = checked(folder)
    assert report["findings"][0]["finding"] == "leakage" and report["usable"]
    assert "splits: 3)" in report["verdict"]
    assert found == {
        "leakage": ["test:test/cat/same.jpg = train:train/cat/3.jpg"],
        "near_leakage": ["test:test/cat/encoded.jpg = train:train/dog/4.jpg",
                         "test:test/cat/smaller.png = train:train/cat/5.jpg"],
        "two_labels": ["test:test/cat/encoded.jpg = train:train/dog/4.jpg",
                       "train:train/dog/twin.jpg = train:train/cat/7.jpg"],
        "duplicates": ["train:train/dog/twin.jpg = train:train/cat/7.jpg"],
        "near_duplicates": ["train:train/cat/again.png = train:train/cat/3.jpg",
                            "train:train/cat/larger.jpg = train:train/cat/6.jpg"]}
    assert data.main(["--check", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "leakage" in lines[2] and "same.jpg" in lines[2] and len(lines) == 8


def test_near_pairs_equal_the_naive_search_of_all_pairs():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 300, dtype=np.uint64)
    for i in range(0, 300, 3):  # two relatives of every third, at most 6 bits away
        for relative in (1, 2):
            flips = rng.choice(64, rng.integers(0, 7), replace=False).astype(np.uint64)
            hashes[i + relative] = hashes[i] ^ np.bitwise_or.reduce(
                np.uint64(1) << flips, initial=np.uint64(0))
    colours = np.repeat(rng.integers(0, 256, (100, 64, 3), dtype=np.uint8), 3, axis=0)
    colours[200] = 255 - colours[200]
    found = {(min(pair), max(pair)) for a, b in data.near_pairs(hashes, colours)
             for pair in zip(a.tolist(), b.tolist())}
    naive = {(a, b) for a, b in itertools.combinations(range(300), 2) if 200 not in (a, b)
             and bin(int(hashes[a] ^ hashes[b])).count("1") <= data.NEAR_BITS}
    assert found == naive and 100 < len(naive) < 300
    same, flat = np.zeros(3000, dtype=np.uint64), np.zeros((3000, 64, 3), np.uint8)
    flat[:, 0] = 2
    assert sum(len(a) for a, _ in data.near_pairs(same, flat)) == 0
    pairs_found = sum(len(a) for a, _ in data.near_pairs(same, flat + colours[0]))
    assert 3000 < pairs_found <= 5 * data.NEAR_WINDOW * 3000  # all alike: no quadratic time


def test_the_doctor_reads_class_lists_and_goes_on_after_a_refusal(tmp_path, capsys):
    folder = photo_folder(tmp_path / "set", 3, ("Sea_Lion", "sea lion", "owl"))
    (folder / "hollow").mkdir()
    for number in range(42):
        save(folder / "many" / f"{number}.jpg", photo(5000 + number))
    report, found = checked(folder)
    assert len(found["refused"]) == 2 and not report["usable"]
    assert "hollow" in found["refused"][0] and "'Sea_Lion' and 'sea lion'" in found["refused"][1]
    assert found["few"] == ["Sea_Lion (2)", "owl (2)", "sea lion (2)"]
    assert found["imbalance"] == [f"{name} (2 to 21)" for name in ("Sea_Lion", "owl", "sea lion")]
    assert set(found) == {"refused", "few", "imbalance"}
    assert data.main(["--check", str(folder)]) == 2
    assert "refused" in capsys.readouterr().out.splitlines()[-1]
    split = {"train": [["a.jpg", 0, "crane"], ["b.jpg", 1, "owl"], ["c.jpg", 0, "crane"]],
             "test": [["a.jpg", 0, "crane"], ["d.jpg", 2, "Crane"]]}
    for number, name in enumerate("abcd"):
        save(tmp_path / f"own/{name}.jpg", photo(number))
    (tmp_path / "own/my.json").write_text(json.dumps(split))
    report, found = checked(tmp_path / "own/my.json")
    assert found == {"leakage": ["test:a.jpg = train:a.jpg"], "no_train": ["Crane"],
                     "no_test": ["owl"], "few": ["crane (2)", "owl (1)"], "same_names": ["crane"]}
    assert report["usable"]


def test_the_doctor_reads_tables_with_captions_and_missing_files(tmp_path):
    rows = ["path,label,split,caption"]
    for number in range(40):
        save(tmp_path / f"{number}.jpg", photo(number))
        caption = {0: "", 1: "word " * 56, 2: "猫" * 56, 3: "x" * 600, 4: "word " * 55,
                   5: "猫" * 55}.get(number, f"picture {number}")
        rows.append(f"{number}.jpg,{'ab'[number % 2]},{'test' if number > 35 else 'train'},{caption}")
    (tmp_path / "t.csv").write_text("\n".join(rows), encoding="utf-8")
    report, found = checked(tmp_path / "t.csv")
    assert found == {"no_caption": ["0.jpg"], "long_caption": ["1.jpg", "2.jpg", "3.jpg"]}
    (tmp_path / "7.jpg").unlink()
    report, found = checked(tmp_path / "t.csv")
    assert found.pop("missing") == ["train:7.jpg"] and report["usable"] and len(found) == 2
    (tmp_path / "8.jpg").unlink()
    report, found = checked(tmp_path / "t.csv")
    assert "2 of 36 train images" in found["refused"][0] and not report["usable"]
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        for file in [tmp_path / "t.csv", *tmp_path.glob("*.jpg")]:
            archive.write(file, file.name)
    report, found = checked(tmp_path / "t.zip")
    assert set(found) == {"refused", "missing", "no_caption", "long_caption"}


def test_the_doctor_speaks_json_and_one_line_and_survives_any_file_name(tmp_path, capsys):
    assert data.main(["--check", str(tmp_path / "none"), "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["usable"] is False and "no file" in json.loads(out)["verdict"] and not err
    assert data.main(["--check", str(tmp_path / "none")]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    folder = split_folder(tmp_path / "set")
    try:
        (folder / os.fsdecode(b"train/cat/\xff\n\x1b[2J.jpg")).write_bytes(b"")
    except OSError:
        (folder / "train/cat/\n.jpg").write_bytes(b"")
    (folder / "train/dog/猫.jpg").write_bytes(b"")
    command = [sys.executable, str(ROOT / "data.py"), "--check", str(folder)]
    done = subprocess.run(command, capture_output=True, timeout=120,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2 and not done.stderr and b"\x1b" not in done.stdout
    assert len(done.stdout.splitlines()) == 5 and b"\\u732b.jpg" in done.stdout
    assert data.main(["--check", str(folder), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["findings"][1]["count"] == 2
    assert data.main(["--check", "demo", "--json", "--limit", "5"]) == 0
    assert json.loads(capsys.readouterr().out)["examined"] == 5
    assert "1 image or more" in the_one_line(data.check_data, str(folder), limit=0)
    with pytest.raises(SystemExit):
        data.main(["--check", "demo", "--few-shot", "demo"])


def test_the_doctor_on_real_data(shared):
    report, found = checked("eurosat", data_dir=shared, limit=600)
    assert report["examined"] == 600 and report["images"] == 27000 and report["usable"]
    assert set(found) <= {"near_leakage", "near_duplicates"}
    report, found = checked("dtd", data_dir=shared)
    assert "41 of 47 classes" in found["refused"][0] and report["examined"] == 720
    assert found["near_duplicates"][0] == "train:bubbly/bubbly_0149.jpg = train:bubbly/bubbly_0157.jpg"
