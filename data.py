"""Examples in, scores out: datasets by name, folder, table or zip; few-shot lists; batches.

    train = open_dataset("dtd", "train", data_dir="data")        # CoOp's split file, read as it is
    shots = few_shot(train, shots=4, seed=1).preload()           # the published list, decoded once
    loader = make_loader(shots.with_transform(Preprocess(224, train=True, seed=1)), 32, seed=1)
    for images, labels, indices in loader: ...                   # (B, 3, 224, 224), (B,), (B,)

Everything random is a function of plain numbers: the order of an epoch of (seed, epoch), the crop
of an image of (seed, epoch, index), the shots of (seed). So a run is the same for any number of
workers, for fork and for spawn, and goes on from the middle of an epoch with nothing saved but two
integers. Files are never trusted: no pickle, no unpacking, image bombs refused by their header.

    python data.py --few-shot dtd --shots 4 --seed 1 --data-dir DIR      prints the list as JSON
    python data.py --check PATH          is it fit to train on? leaks, copies, damaged files, ...
"""
import argparse
import collections
import contextlib
import copy
import csv
import dataclasses
import difflib
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import random
import re
import sys
import time
import unicodedata
import warnings
import zipfile
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate


class DataError(ValueError):
    """Something the user can fix, said in one line; scripts leave with `exit_code`."""
    exit_code = 2


class UnreadableImage(DataError):
    """One image is missing, damaged, not an image or too large; the message names it."""


def one_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


# -----------------------------------------------------------------------------
# Pictures: from any file to RGB, from RGB to what the image tower eats

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 178_956_970     # where Pillow itself gives up: 0.5 GB once decoded to RGB
MAX_FILE_BYTES = 1 << 29     # of one file inside a zip: its header may claim anything
LONGEST_STRIP = 64           # sides; see Preprocess


def to_rgb(image):
    """PIL image of any mode -> RGB, 8 bits. Alpha is dropped, as CoOp's loader does.

    16-bit grey is divided by 257: Pillow's own conversion clips at 255, so a 16-bit scan comes out
    white. A palette goes through RGBA, where its transparency is understood.
    """
    if image.mode == "RGB":
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = (np.asarray(image).clip(0, 65535).astype(np.uint32) + 128) // 257  # rounded
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA", "La", "RGBa"):
        image = image.convert("RGBA" if image.mode != "La" else "LA")
    return image.convert("RGB")


def read_image(source, name=None, look=None):
    """Path or binary file -> upright RGB image. Raises UnreadableImage, whatever is wrong with it.
    `look` is shown the opened image before its pixels are read.

    The EXIF orientation is applied. CoOp ignores it, so the few photos that carry the tag come out
    turned there; photos without it are the same pixels in both. An animation gives its first frame.
    """
    name = name or getattr(source, "name", source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # half-way bombs and odd tags: the checks here decide
            with Image.open(source) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UnreadableImage(f"{name}: {image.width}x{image.height} pixels, more than "
                                          f"the {MAX_PIXELS:,} that are read; scale it down")
                if look:
                    look(image)
                image.load()
                with contextlib.suppress(Exception):  # damaged tags around sound pixels
                    ImageOps.exif_transpose(image, in_place=True)
                return to_rgb(image)
    except UnreadableImage:
        raise
    except FileNotFoundError:
        raise UnreadableImage(f"{name}: there is no such file") from None
    except Exception as error:  # Pillow's readers raise ten kinds of exception on damaged files
        raise UnreadableImage(f"{name}: not a readable image ({one_line(error)})") from error


def sample_seed(seed, epoch, index):
    """Three integers -> a seed below 2**63, mixed well in its low 32 bits, all that torch's CPU
    generator keeps. The finaliser is splitmix64's."""
    state = 0
    for number in (seed, epoch, index):
        state = (state + number + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ state >> 27) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


def crop_box(width, height, generator, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """A random (left, top, right, bottom), draw for draw as torchvision's RandomResizedCrop: area
    uniform, aspect log-uniform, ten tries, then the largest central box of an allowed aspect."""
    low, high = torch.tensor(ratio).log().tolist()  # rounded to fp32, as there
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(*scale, generator=generator).item()
        aspect = torch.empty(1).uniform_(low, high, generator=generator).exp().item()
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = torch.randint(0, height - h + 1, (1,), generator=generator).item()
            left = torch.randint(0, width - w + 1, (1,), generator=generator).item()
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < ratio[0]:
        h = round(w / ratio[0])
    elif width / height > ratio[1]:
        w = round(h * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class Preprocess:
    """PIL image -> (3, size, size) float tensor, normalised with CLIP's mean and std.

    Evaluation: short side to `size` (bicubic, antialiased), centre crop; bit-equal to torchvision's
    Resize + CenterCrop + ToTensor + Normalize on an RGB image. Training (CoOp's): a random resized
    crop and a flip, torchvision's own under torch.manual_seed(sample_seed(seed, epoch, index)).
    Colours are converted before resizing, as in CoOp; OpenAI's code converts after.
    """

    def __init__(self, size, train=False, seed=0):
        self.size, self.train, self.seed = size, train, seed

    def __call__(self, image, epoch=0, index=0):
        image = to_rgb(image)
        image = self.random_crop(image, epoch, index) if self.train else self.centre_crop(image)
        # In numpy: the same bits as torch's, without waking its threads for one small image.
        pixels = np.asarray(image).transpose(2, 0, 1).astype(np.float32, order="C")  # (3, S, S)
        pixels /= 255
        mean, std = np.array((CLIP_MEAN, CLIP_STD), dtype=np.float32).reshape(2, 3, 1, 1)
        return torch.from_numpy((pixels - mean) / std)

    def centre_crop(self, image):
        size, (width, height) = self.size, image.size
        short, long = sorted(image.size)
        if long > LONGEST_STRIP * short:  # a strip 1 x 5000 would be resized to a gigabyte
            extra = (long - LONGEST_STRIP * short) // 2  # only the middle can reach the crop
            image = ImageOps.crop(image, (extra, 0) if width > height else (0, extra))
            width, height = image.size
            long = max(image.size)
        long = int(size * long / short)  # torchvision's rounding: down here, to even below
        width, height = (size, long) if width <= height else (long, size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - size) / 2), round((height - size) / 2)
        return image.crop((left, top, left + size, top + size))

    def random_crop(self, image, epoch, index):
        generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch, index))
        image = image.crop(crop_box(*image.size, generator))
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        if torch.rand(1, generator=generator).item() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


# -----------------------------------------------------------------------------
# Where pictures lie: a folder or a zip

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff",
                  ".ppm", ".pgm"}


def leaves_folder(name):
    """Whether a relative name would point outside the folder (or archive) it belongs to."""
    return ".." in re.split(r"[/\\]", name) or name[:1] in ("/", "\\") or name[1:2] == ":"


def is_litter(name):
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")


def is_image(name):
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def walk(folder, base="", seen=None):
    """Every posix path below `folder`, sorted; directories end in "/". A directory reached twice
    through links is entered once, so a loop of links ends."""
    seen = set() if seen is None else seen
    if os.path.realpath(folder) in seen:
        return
    seen.add(os.path.realpath(folder))
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot list {folder} ({error.strerror}); make it readable") from None
    for entry in entries:
        if entry.is_dir() and not is_litter(entry.name):
            yield f"{base}{entry.name}/"
            yield from walk(entry.path, f"{base}{entry.name}/", seen)
        elif not is_litter(entry.name):
            yield base + entry.name


class ImageStore:
    """A folder of images, or a zip read in place, never unpacked. `prefix` goes before each path.

    Picklable. Every process opens the zip for itself: two processes that share one open file after
    a fork also share its read position, and would read each other's bytes.
    """

    def __init__(self, path, prefix=""):
        self.path, self.prefix = os.fspath(path), prefix
        self.zipped = os.path.isfile(self.path)
        self._zip = self._pid = None

    def __getstate__(self):
        return {**self.__dict__, "_zip": None, "_pid": None}

    def __str__(self):
        return os.path.join(self.path, self.prefix) if self.prefix else self.path

    def archive(self):
        if self._pid != os.getpid():
            try:
                self._zip = zipfile.ZipFile(self.path)
            except (OSError, zipfile.BadZipFile) as error:
                raise DataError(f"{self.path} is not a zip ({error}); fetch it again") from None
            bad = [name for name in self._zip.namelist() if leaves_folder(name)]
            if bad:
                raise DataError(f"{self.path} is refused: its member {bad[0]!r} lies outside the "
                                f"archive; zip the folder again with relative names")
            self._pid = os.getpid()
        return self._zip

    def names(self):
        """Sorted paths of everything inside, the prefix included; directories end in "/"."""
        if not self.zipped:
            return list(walk(self.path))
        return sorted(name for name in self.archive().namelist()
                      if not any(map(is_litter, name.rstrip("/").split("/"))))

    def has(self, path):
        if not self.zipped:
            return os.path.isfile(os.path.join(self.path, self.prefix, path))
        try:
            return bool(self.archive().getinfo(self.prefix + path))
        except KeyError:
            return False

    def read(self, path):
        """The bytes of one file, of a zip's with its CRC checked. Raises UnreadableImage."""
        name = f"{self.path}{':' if self.zipped else os.sep}{self.prefix}{path}"
        file = pathlib.Path(self.path, self.prefix, path)
        try:
            info = self.archive().getinfo(self.prefix + path) if self.zipped else file.stat()
            size = info.file_size if self.zipped else info.st_size
            if size <= MAX_FILE_BYTES:
                return self.archive().read(info) if self.zipped else file.read_bytes()
        except (KeyError, FileNotFoundError):
            raise UnreadableImage(f"{name}: there is no such file") from None
        except Exception as error:  # zlib.error, BadZipFile, an encrypted member, a disk fault ...
            raise UnreadableImage(f"{name}: cannot be read ({one_line(error)})") from error
        raise UnreadableImage(f"{name}: {size:,} bytes are too many for one file")

    def image(self, path):
        if self.zipped:
            return read_image(io.BytesIO(self.read(path)), f"{self.path}:{self.prefix}{path}")
        return read_image(os.path.join(self.path, self.prefix, path))


def find_images(homes, folder, paths):
    """The ImageStore that holds `paths`: `folder` under the first of `homes` where some lie, else a
    zip in the first home, else whichever folder exists, for error messages to name."""
    sample = paths[::max(1, len(paths) // 200)]  # a set may be there in part
    places = sorted((ImageStore(home / folder) for home in homes),
                    key=lambda place: not os.path.isdir(place.path))
    for archive in sorted(homes[0].glob("*.zip")):
        places += [ImageStore(archive, prefix) for prefix in (f"{folder}/", "")]
    return next((place for place in places if any(map(place.has, sample))), places[0])


# -----------------------------------------------------------------------------
# The dataset object

class ImageSet(Dataset):
    """Labelled images of one split. `set[index]` or `set[(epoch, index)]` -> (image, label, index).

    The image is a tensor if there is a transform, called as transform(image, epoch, index), else a
    PIL image. The pair as key lets the sampler say which epoch it is: workers that live on would
    never see an attribute change. An unreadable image gives zeros and label -1, which scores skip.

    name, split, root      as opened                     paths       as the split file writes them
    labels                 list of int, 0 .. C-1         classnames  C names, raw
    template               prompt with a {}              counts      images per split as published
    fingerprint            sha256 of the lists of all splits: identifies the data on resume
    notes                  sentences worth telling the user
    """

    def __init__(self, listing, split, transform=None):
        self.name, self.root, self.split = listing.name, listing.root, split
        self.store, self.template = listing.store, listing.template
        self.paths = [path for path, _ in listing.rows[split]]
        self.labels = [label for _, label in listing.rows[split]]
        self.classnames = list(listing.classnames)
        self.counts = {key: len(rows) for key, rows in listing.rows.items()}
        lists = json.dumps([self.classnames, listing.rows], sort_keys=True)
        self.fingerprint = hashlib.sha256(lists.encode()).hexdigest()
        sizes = " / ".join(f"{count:,} {key}" for key, count in self.counts.items())
        self.notes = [*listing.notes, f"{self.name}: {sizes} images in {len(self.classnames)} "
                                      f"classes, split {self.fingerprint[:12]}"]
        self.transform, self.images = transform, None

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, (tuple, list)) else (0, key)
        label = self.labels[index]
        if self.images is not None:
            image = self.images[index]
        else:
            try:
                image = self.store.image(self.paths[index])
            except UnreadableImage:
                if self.transform is None:
                    raise
                black = self.transform(Image.new("RGB", (8, 8)), epoch, index)
                return torch.zeros_like(black), -1, index
        return (self.transform(image, epoch, index) if self.transform else image), label, index

    def subset(self, indices):
        """The same set with only the images at these positions, in this order."""
        chosen = copy.copy(self)
        chosen.paths = [self.paths[i] for i in indices]
        chosen.labels = [self.labels[i] for i in indices]
        chosen.images = self.images and [self.images[i] for i in indices]
        chosen.notes = list(self.notes)
        return chosen

    def with_transform(self, transform):
        chosen = copy.copy(self)
        chosen.transform, chosen.notes = transform, list(self.notes)
        return chosen

    def select(self, labels):
        """Only these classes, renumbered 0, 1, ... in the order given."""
        new = {old: position for position, old in enumerate(labels)}
        chosen = self.subset([i for i, label in enumerate(self.labels) if label in new])
        chosen.labels = [new[label] for label in chosen.labels]
        chosen.classnames = [self.classnames[label] for label in labels]
        return chosen

    def check_files(self):
        """Raise DataError unless the images are there, as refuse_losses says. Opens none."""
        lost = [i for i, path in enumerate(self.paths) if not self.store.has(path)]
        if lost:
            self.refuse_losses(lost, f"{self.paths[lost[0]]}: there is no such file")
            self.notes.append(f"{len(lost)} of {len(self):,} {self.split} images are missing, e.g. "
                              f"{self.paths[lost[0]]}: they count as unreadable")

    def preload(self, limit=1 << 62):
        """Decode every image into memory once (4 bytes per pixel) and return the set itself.
        Unreadable ones are dropped and noted, or refused as refuse_losses says (DataError). Beyond
        `limit` bytes it gives up, notes that, and images go on being read when asked for."""
        if self.images is not None:
            return self
        images, lost, reasons, held = [], [], [], 0
        for index, path in enumerate(self.paths):
            try:
                images.append(self.store.image(path))
                held += 4 * images[-1].width * images[-1].height
            except UnreadableImage as error:
                lost.append(index)
                reasons.append(error)
            if held > limit:
                self.notes.append(f"{len(self):,} {self.split} images take over {limit >> 20:,} MB "
                                  f"decoded: they are read again at every use")
                return self
        if lost:
            self.refuse_losses(lost, reasons[0])
            kept = sorted(set(range(len(self))) - set(lost))
            self.paths = [self.paths[i] for i in kept]
            self.labels = [self.labels[i] for i in kept]
            self.notes.append(f"{len(lost)} unreadable {self.split} images left out: {reasons[0]}")
        self.images = images
        return self

    def digest(self):
        """sha256 over the labels and the bytes of the image files: tells whether a set is still the
        one that a run began with. Reads every file; one that cannot be read counts by its name."""
        total = hashlib.sha256()
        for path, label in zip(self.paths, self.labels):
            try:
                content = self.store.read(path)
            except UnreadableImage:
                content = path.encode("utf-8", "surrogateescape")
            total.update(f"{label} {len(content)} ".encode() + content)
        return total.hexdigest()

    def refuse_losses(self, lost, reason):
        """Raise if the images at positions `lost` are a whole class or more than max(1, 1 %)."""
        left = {self.labels[i] for i in set(range(len(self))) - set(lost)}
        empty = [self.classnames[label] for label in sorted(set(self.labels) - left)]
        said = f"{len(self):,} {self.split} images cannot be read"
        if not left:
            fix = ("--download fetches them" if KNOWN.get(self.name, NOWHERE).torchvision
                   else "put them there, or name the right folder")
            raise DataError(f"{self.name}: all {said} under {self.store} ({reason}); {fix}")
        if empty:
            raise DataError(f"{self.name}: {len(empty)} of {len(set(self.labels))} classes have no "
                            f"image under {self.store}: {', '.join(empty)}; use --classes to train "
                            f"on the rest")
        if len(lost) > max(1, len(self) // 100):
            raise DataError(f"{self.name}: {len(lost)} of {said}, more than 1 % ({reason}); "
                            f"restore them or list the rest")


# -----------------------------------------------------------------------------
# Class names and prompts

ANY_TEMPLATE = "a photo of a {}."
TEMPLATES = {  # what CLIPFit trains with; grammar is not repaired ("a photo of a interlaced")
    "oxford_pets": "a photo of a {}, a type of pet.",
    "oxford_flowers": "a photo of a {}, a type of flower.",
    "food101": "a photo of {}, a type of food.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "dtd": "a photo of a {}, a type of texture.",
    "eurosat": "a centered satellite photo of {}.",
    "demo": "a centered satellite photo of {}.",
    "ucf101": "a photo of a person doing {}.",
    **dict.fromkeys(("caltech101", "stanford_cars", "sun397", "imagenet", "imagenetv2",
                     "imagenet-sketch", "imagenet-a", "imagenet-r"), ANY_TEMPLATE),
}


def class_prompts(classnames, template):
    """One sentence per class: the name, `_` as space, in place of {} or {c}. Raises DataError."""
    fields = re.findall(r"\{[^{}]*\}", template)
    unknown = sorted(set(fields) - {"{}", "{c}"})
    if unknown or not fields:
        problem = f"has the unknown field {unknown[0]}" if unknown else "has no place for the class"
        raise DataError(f"template {template!r} {problem}; write {{}} where the class name goes")
    return [re.sub(r"\{c?\}", lambda _: name.replace("_", " "), template) for name in classnames]


def cleaned(name):
    """The form in which two class names count as the same: no `_`, case or accent-coding."""
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split()).casefold()


def find_classes(classnames, wanted):
    """Names (raw or cleaned, any case) -> their labels, in the order wanted. Raises DataError."""
    known = {}
    for label, name in enumerate(classnames):
        known.setdefault(cleaned(name), []).append(label)  # ImageNet has two "missile"
    for name in wanted:
        if cleaned(name) not in known:
            raise DataError(f"no class {name!r} among the {len(classnames)}{nearest(name, known)}")
    return [label for name in dict.fromkeys(map(cleaned, wanted)) for label in known[name]]


def halves(labels):
    """Labels of the train list -> (base, new): the first ceil(C/2) of the sorted ones, the rest."""
    ordered = sorted(set(labels))
    middle = math.ceil(len(ordered) / 2)
    return ordered[:middle], ordered[middle:]


def nearest(name, known):
    close = difflib.get_close_matches(cleaned(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known)[:20])}"


# -----------------------------------------------------------------------------
# Readers: what each kind of file says, before a split is chosen

@dataclasses.dataclass
class Listing:
    """rows: {"train" | "val" | "test": [(path, label)]}, the paths relative to `store`. For the
    doctor: captions [(path, caption)] of a table, and the files in class folders that are no images
    by their name."""
    name: str
    root: str
    store: ImageStore
    rows: dict
    classnames: list
    template: str = ANY_TEMPLATE
    notes: list = dataclasses.field(default_factory=list)
    captions: list = ()
    ignored: list = ()

    def open(self, split, transform=None):
        """One split as an ImageSet. Raises DataError if there is nothing to learn or to score."""
        if len(self.classnames) < 2:
            raise DataError(f"{self.root}: only the class {self.classnames}; two or more are "
                            f"needed (a folder must be the one that holds the class folders)")
        if not self.rows[split]:
            having = ", ".join(key for key, rows in self.rows.items() if rows)
            raise DataError(f"{self.name} has no {split} split, only {having}")
        return ImageSet(self, split, transform)

    def select(self, labels):
        new = {old: position for position, old in enumerate(labels)}
        self.rows = {split: [(path, new[label]) for path, label in rows if label in new]
                     for split, rows in self.rows.items()}
        self.classnames = [self.classnames[label] for label in labels]


def refuse(message, faults):
    """Raise DataError; or go on with the message in `faults`, for the doctor who wants them all."""
    if faults is None:
        raise DataError(message)
    faults.append(message)


SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "dev": "val",
               "validation": "val", "test": "test", "testing": "test"}
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
PATH_COLUMNS = ("image", "path", "filepath", "filename", "file")
LABEL_COLUMNS = ("classname", "class", "category", "label", "title")


def read_text(path, content=None):
    """A text file (or its bytes), with or without a byte-order mark. Raises DataError."""
    try:
        return (pathlib.Path(path).read_bytes() if content is None else content).decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); a file was expected") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save it so") from None


def read_coop_split(path):
    """{"train": [[path, label, class name], ...], "val": ..., "test": ...} -> rows, classnames."""
    text, names, rows = read_text(path), {}, {}
    try:
        content = json.loads(text)
        for split in ("train", "val", "test"):
            rows[split] = [(image, label) for image, label, _ in content.get(split, [])]
            for image, label, name in content.get(split, []):
                if leaves_folder(image) or names.setdefault(label, name) != name:
                    raise ValueError(f"bad entry {[image, label, name]} in {split}")
        if not names or sorted(names) != list(range(len(names))):
            raise ValueError("labels must run from 0 without a gap")
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a split file ({error}); expected train, val and test lists "
                        f"of [relative path, label, class name]") from None
    return rows, [names[label] for label in sorted(names)]


def read_table(text, name, in_zip):
    """CSV, TSV or JSONL -> {split or "all": [(path, class name)]}, notes, [(path, caption)] if it
    has such a column. Raises DataError."""
    first = text.split("\n", 1)[0]
    mark = max(",\t;", key=first.count)
    try:
        records = ([json.loads(line) for line in text.splitlines() if line.strip()]
                   if first.lstrip().startswith("{")
                   else list(csv.DictReader(io.StringIO(text, newline=""), delimiter=mark)))
        records = [{str(key).strip().lower(): "" if value is None else str(value).strip()
                    for key, value in record.items()} for record in records]
    except (ValueError, AttributeError, csv.Error) as error:
        raise DataError(f"{name} is not a readable table ({error})") from None
    columns = list(records[0]) if records else [word.strip() for word in first.split(mark)]
    path_key = next((key for key in PATH_COLUMNS if key in columns), None)
    label_key = next((key for key in LABEL_COLUMNS if key in columns), None)
    if not (path_key and label_key):
        raise DataError(f"{name} has the columns {columns}; expected one of {list(PATH_COLUMNS)} "
                        f"and one of {list(LABEL_COLUMNS)}, separated by comma, tab or semicolon")
    rows, captions, incomplete = {}, [], 0
    for record in records:
        path, label = record.get(path_key, "").replace("\\", "/"), record.get(label_key, "")
        split = SPLIT_WORDS.get(record.get("split", "").lower()) if "split" in columns else "all"
        if ".." in path.split("/") or in_zip and leaves_folder(path):
            raise DataError(f"{name}: {path} points outside its folder; write paths relative to it")
        if not (path and label):
            incomplete += 1
        elif split is None:
            raise DataError(f"{name}: split {record['split']!r}; write train, val or test")
        else:
            rows.setdefault(split, []).append((path, label))
            if "caption" in columns:
                captions.append((path, record.get("caption", "")))
    notes = [f"{incomplete} rows without path or label left out"] if incomplete else []
    return rows, notes, captions


def read_class_folders(store, faults=None):
    """<class>/<image> or <split>/<class>/<image>, any depth below the class -> rows as read_table,
    and the files that are no images by their name. A lone folder around it all, as zips often have,
    is passed through: store.prefix moves."""
    names = [name.split("/") for name in store.names()]  # a directory ends in ""
    while (len({parts[0] for parts in names}) == 1 and names[0][0].lower() not in SPLIT_WORDS
           and min((len(parts) for parts in names if is_image(parts[-1])), default=0) > 2):
        store.prefix += names[0][0] + "/"
        names = [parts[1:] for parts in names if parts[1:] != [""]]
    level = int(any(SPLIT_WORDS.get(parts[0].lower()) == "train" for parts in names))
    rows, found, ignored = {}, set(), []
    for parts in names:
        split = SPLIT_WORDS.get(parts[0].lower()) if level else "all"
        if split and len(parts) > level + 1:
            found.add(parts[level])
            if is_image(parts[-1]):
                rows.setdefault(split, []).append(("/".join(parts), parts[level]))
            elif parts[-1]:
                ignored.append("/".join(parts))
    if not rows:
        raise DataError(f"{store} has no class folders with images; expected <class>/<image> or "
                        f"train/<class>/<image>")
    empty = sorted(found - {name for entries in rows.values() for _, name in entries})
    if empty:
        refuse(f"{store}: no image in the class folder {', '.join(empty)}; add some or remove it",
               faults)
    return rows, ignored


def number_classes(rows, faults=None):
    """rows with class names -> rows with labels, classnames. Sorted by name, by value if all are
    numbers. Two names that differ only by case or `_` raise DataError."""
    names = {name for entries in rows.values() for _, name in entries}
    numeric = all(name.isdecimal() for name in names)
    names = sorted(names, key=lambda name: (int(name) if numeric else 0, name))
    seen = {}
    for name in names:
        if seen.setdefault(cleaned(name), name) != name:
            refuse(f"class names {seen[cleaned(name)]!r} and {name!r} read the same; rename or "
                   f"merge them", faults)
    label = {name: position for position, name in enumerate(names)}
    return {split: [(path, label[name]) for path, name in entries]
            for split, entries in rows.items()}, names


def complete_splits(rows, faults=None):
    """Give user data its three splits. Rows without any (or train alone) are cut 50/20/30 per class
    by a fixed permutation of the sorted paths; a val without a test is used as the test."""
    rows = {split: list(dict.fromkeys(entries)) for split, entries in rows.items()}
    uses = collections.Counter(path for entries in rows.values() for path, _ in entries)
    twice = [path for path, count in uses.items() if count > 1]
    if twice:
        refuse(f"{len(twice)} images are in two splits or classes, e.g. {twice[0]}; list each "
               f"once, or the score counts what was trained on", faults)
    if rows.get("val") and not rows.get("test"):
        return {"train": rows.get("train", []), "val": [], "test": rows["val"]}, [
            "there is no test split: val is used as test"]
    if rows.get("test"):
        return {split: rows.get(split, []) for split in ("train", "val", "test")}, []
    groups, cut = {}, {"train": [], "val": [], "test": []}
    for path, label in sorted(rows.get("all", []) + rows.get("train", [])):
        groups.setdefault(label, []).append(path)
    for label, paths in sorted(groups.items()):
        paths = random.Random(0).sample(paths, len(paths))
        train = max(1, round(0.5 * len(paths)))
        val = train + max(0, min(round(0.2 * len(paths)), len(paths) - train - 1))  # test first
        for split, part in zip(cut, (paths[:train], paths[train:val], paths[val:])):
            cut[split] += [(path, label) for path in part]
    return cut, ["no splits were given: each class is cut 50/20/30 by a fixed permutation"]


def list_path(path, faults=None):
    """A folder, table, zip or split file of the user's own -> Listing."""
    suffix, name, notes, captions, ignored = path.suffix.lower(), path.stem, [], [], []
    splits = list(path.glob("split_zhou_*.json"))
    if suffix == ".json" or len(splits) == 1:
        path = splits[0] if splits else path
        rows, classnames = read_coop_split(path)
        name = next((n for n, known in KNOWN.items() if known.split == path.name), path.stem)
        store = find_images([path.parent], KNOWN.get(name, NOWHERE).images,
                            [image for part in rows.values() for image, _ in part])
        return Listing(name, str(path.parent), store, rows, classnames,
                       TEMPLATES.get(name, ANY_TEMPLATE))
    if not path.exists():
        raise DataError(f"there is no file or folder {path}")
    if suffix in TABLE_SUFFIXES and path.is_file():
        store = ImageStore(path.parent)
        rows, notes, captions = read_table(read_text(path), path, in_zip=False)
    elif path.is_dir() or suffix == ".zip":
        store = ImageStore(path)
        tables = [n for n in store.names() if n.endswith(TABLE_SUFFIXES) and "/" not in n]
        if tables and store.zipped:
            text = read_text(tables[0], store.read(tables[0]))
            rows, notes, captions = read_table(text, tables[0], in_zip=True)
        else:
            rows, ignored = read_class_folders(store, faults)
    else:
        raise DataError(f"{path}: expected a folder, .csv, .tsv, .jsonl, .zip or a split .json")
    rows, classnames = number_classes(rows, faults)
    rows, more = complete_splits(rows, faults)
    return Listing(name, str(path), store, rows, classnames, TEMPLATES.get(name, ANY_TEMPLATE),
                   notes + more, captions, ignored)


# -----------------------------------------------------------------------------
# The published datasets

class Known(NamedTuple):
    """Where one dataset lies. `homes`: its folder under data_dir as CoOp names it, then where
    torchvision's downloader puts it; `images`: the image folder under either."""
    homes: tuple
    images: str
    split: str = ""        # file name of CoOp's split, or of ImageNet's list of class names
    drive: str = ""        # its id on Google Drive
    torchvision: str = ""  # class of torchvision.datasets that downloads the images


NOWHERE = Known((), "")
WNIDS = ("classnames.txt", "1-61f_ol79pViBFDG_IDlUQSwoLcn2XXF")
KNOWN = {
    "caltech101": Known(
        ("caltech-101", "caltech101"), "101_ObjectCategories", "split_zhou_Caltech101.json",
        "1hyarUivQE36mY6jSomru6Fjd-JzwcCzN", "Caltech101"),
    "oxford_pets": Known(
        ("oxford_pets", "oxford-iiit-pet"), "images", "split_zhou_OxfordPets.json",
        "1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs", "OxfordIIITPet"),
    "stanford_cars": Known(
        ("stanford_cars",), "", "split_zhou_StanfordCars.json",
        "1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT"),
    "oxford_flowers": Known(
        ("oxford_flowers", "flowers-102"), "jpg", "split_zhou_OxfordFlowers.json",
        "1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT", "Flowers102"),
    "food101": Known(
        ("food-101",), "images", "split_zhou_Food101.json",
        "1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl", "Food101"),
    "fgvc_aircraft": Known(
        ("fgvc_aircraft", "fgvc-aircraft-2013b/data"), "images", torchvision="FGVCAircraft"),
    "sun397": Known(
        ("sun397", ""), "SUN397", "split_zhou_SUN397.json",
        "1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq", "SUN397"),
    "dtd": Known(
        ("dtd", "dtd/dtd"), "images", "split_zhou_DescribableTextures.json",
        "1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x", "DTD"),
    "eurosat": Known(
        ("eurosat",), "2750", "split_zhou_EuroSAT.json",
        "1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o", "EuroSAT"),
    "ucf101": Known(
        ("ucf101",), "UCF-101-midframes", "split_zhou_UCF101.json",
        "1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y"),
    "imagenet": Known(("imagenet",), "images", *WNIDS),
    "imagenetv2": Known(("imagenetv2",), "imagenetv2-matched-frequency-format-val", *WNIDS),
    "imagenet-sketch": Known(("imagenet-sketch",), "images", *WNIDS),
    "imagenet-a": Known(("imagenet-adversarial",), "imagenet-a", *WNIDS),
    "imagenet-r": Known(("imagenet-rendition",), "imagenet-r", *WNIDS),
}
SPELLINGS = {  # besides the names above, all without case and punctuation
    "caltech": "caltech101", "pets": "oxford_pets", "oxfordiiitpet": "oxford_pets",
    "cars": "stanford_cars", "flowers": "oxford_flowers", "flowers102": "oxford_flowers",
    "food": "food101", "aircraft": "fgvc_aircraft", "sun": "sun397", "ucf": "ucf101",
    "describabletextures": "dtd", "textures": "dtd", "imagenet1k": "imagenet",
}
OFFICIAL = {  # the file that shows the authors' own lists are there
    "dtd": "labels/train1.txt", "oxford_pets": "annotations/trainval.txt",
    "food101": "meta/train.json", "fgvc_aircraft": "variants.txt",
}


def dataset_name(text):
    """Any usual spelling of a published dataset -> our name, or None."""
    plain = re.sub(r"[^a-z0-9]", "", text.lower())
    names = {re.sub(r"[^a-z0-9]", "", name): name for name in [*KNOWN, "demo"]}
    return names.get(plain) or SPELLINGS.get(plain)


def read_official(name, home):
    """The split its authors published -> rows, classnames. Only aircraft and DTD have a val."""
    def lines(file):
        return [line.strip() for line in read_text(home / file).splitlines() if line.strip("# \t")]
    rows = {"train": [], "val": [], "test": []}
    for split in rows:
        if name == "dtd":  # the first of its ten partitions
            rows[split] = [(path, path.split("/")[0]) for path in lines(f"labels/{split}1.txt")]
        elif name == "fgvc_aircraft":
            pairs = [line.partition(" ") for line in lines(f"images_variant_{split}.txt")]
            rows[split] = [(f"{image}.jpg", variant) for image, _, variant in pairs]
        elif name == "food101" and split != "val":
            images = json.loads(read_text(home / f"meta/{split}.json"))
            rows[split] = [(f"{image}.jpg", food) for food in images for image in images[food]]
        elif name == "oxford_pets" and split != "val":  # Great_Dane_7 12 2 9; # starts a comment
            ids = [line.split()[0] for line in lines(
                f"annotations/{'trainval' if split == 'train' else 'test'}.txt") if line[0] != "#"]
            rows[split] = [(f"{pet}.jpg", pet.rpartition("_")[0].lower()) for pet in ids]
    if name != "fgvc_aircraft":
        return number_classes(rows)
    order = lines("variants.txt")  # here a label is a line number
    return {split: [(path, order.index(variant)) for path, variant in entries]
            for split, entries in rows.items()}, order


def list_imagenet(name, data_dir):
    """ImageNet (val doubles as test, as in CoOp) or one of its four shifts, which are test only.

    Lists directories, seconds for 1.28 million files. Sorted, unlike CoOp's, so that a seed means
    the same shots on every machine.
    """
    known, home = KNOWN[name], data_dir / KNOWN[name].homes[0]
    table = home / known.split
    if not table.is_file() and (data_dir / "imagenet" / known.split).is_file():
        table = data_dir / "imagenet" / known.split
    if not table.is_file():
        raise missing_split(name, table)
    words = dict(line.split(" ", 1) for line in read_text(table).splitlines() if " " in line)
    if name == "imagenetv2":  # its folders are line numbers of the list
        words = {str(number): word for number, word in enumerate(words.values())}
    rows = {"train": [], "val": [], "test": []}
    for split, part in {"train": "train/", "test": "val/"}.items():
        part = part if name == "imagenet" else ""
        folder = home / known.images / part
        if folder.is_dir() and (part or split == "test"):
            rows[split] = [(part + image, image.split("/")[0]) for image in walk(folder)
                           if is_image(image) and image.split("/")[0] in words]
    used = {wnid for entries in rows.values() for _, wnid in entries}
    wnids = list(words) if name == "imagenetv2" else sorted(used)  # a label is a rank
    label = {wnid: position for position, wnid in enumerate(wnids)}
    rows = {split: [(path, label[wnid]) for path, wnid in rows[split]] for split in rows}
    rows["val"] = rows["test"] if name == "imagenet" else []
    if not used:
        raise DataError(f"{name}: no image in {home / known.images}; expected one folder per class")
    return Listing(name, str(home), ImageStore(home / known.images), rows,
                   [words[wnid].strip() for wnid in wnids], TEMPLATES[name])


def missing_split(name, target):
    other = "; or use the authors' own lists with --split official" if name in OFFICIAL else ""
    return DataError(f"{name}: {target} is missing, and nothing is put in its place; download "
                     f"https://drive.google.com/uc?id={KNOWN[name].drive} to {target}{other}")


def list_known(name, data_dir, layout, download):
    """One of the published datasets -> Listing. Needs the split file only; images may be absent."""
    if name.startswith("imagenet") and layout == "coop":
        if download:
            download_images(name, data_dir)  # says that there is nothing to download from
        return list_imagenet(name, data_dir)
    known, official = KNOWN[name], layout == "official" or not KNOWN[name].split
    homes = [data_dir / home for home in known.homes]
    if official and name not in OFFICIAL:
        raise DataError(f"{name} has no official layout here, only {', '.join(OFFICIAL)} have one; "
                        f"use --split coop")
    file = OFFICIAL[name] if official else known.split
    if download and official and not any((home / file).is_file() for home in homes):
        download_images(name, data_dir)  # the lists come with the images
    home = next((home for home in homes if (home / file).is_file()), None)
    if home is None and official:
        raise DataError(f"{name}: {homes[0] / file} is missing; unpack the authors' archive into "
                        f"{homes[0]}, or add --download")
    if home is None:
        raise missing_split(name, homes[0] / file)
    rows, classnames = read_official(name, home) if official else read_coop_split(home / file)
    paths = [path for entries in rows.values() for path, _ in entries]
    store = find_images(homes, known.images, paths)
    if download and not any(map(store.has, paths[::50])):
        download_images(name, data_dir)
        store = find_images(homes, known.images, paths)
    return Listing(name, str(home), store, rows, classnames, TEMPLATES[name])


def download_images(name, data_dir):
    """Let torchvision fetch a dataset, md5 checked, into its own folder under data_dir, one of the
    `homes`. CoOp's split file is not part of it. Raises DataError."""
    if not KNOWN[name].torchvision:
        why = "its host is gone" if name == "stanford_cars" else "there is no downloader for it"
        raise DataError(f"{name} cannot be downloaded, {why}; put it under {data_dir} by hand")
    try:
        from torchvision import datasets  # a RuntimeError if it was built for another torch
    except (ImportError, RuntimeError, OSError) as error:
        raise DataError(f"--download needs torchvision, which does not import ({one_line(error)}); "
                        f"install the build for torch {torch.__version__}") from None
    try:
        getattr(datasets, KNOWN[name].torchvision)(str(data_dir), download=True)
    except Exception as error:
        raise DataError(f"{name}: the download failed ({one_line(error)}); try again, or put the "
                        f"files under {data_dir} by hand") from error


def find_listing(text, data_dir, layout="coop", download=False, faults=None):
    """Name or path, as open_dataset takes it -> Listing."""
    path = pathlib.Path(os.path.expandvars(os.path.expanduser(text)))
    name = None if "/" in text or os.sep in text else dataset_name(text)
    if name and name != "demo":
        data_dir = pathlib.Path(os.path.expandvars(os.path.expanduser(data_dir)))
        return list_known(name, data_dir, layout, download)
    if download or layout == "official":
        raise DataError(f"{text}: --download and --split official need the name of a dataset")
    if name or path.exists() or "/" in text or os.sep in text or path.suffix:
        demo = pathlib.Path(__file__).resolve().parent / "assets" / "demo.zip"
        return list_path(demo if name else path, faults)
    raise DataError(f"no dataset or path {text!r}{nearest(text, [*KNOWN, 'demo'])}")


def open_dataset(name_or_path, split, data_dir="data", classes=None, half="all", layout="coop",
                 transform=None, download=False):
    """A dataset by name, or one's own folder, CSV/TSV/JSONL, zip or CoOp split file -> ImageSet.

    split "train", "val" or "test". `classes` (names) narrows and renumbers; then `half` "base" or
    "new" keeps that half of them. Both come before any sampling: for the published base/new shots
    sample first and narrow after, with few_shot(...).select(halves(labels)[0]). layout "official"
    takes the authors' lists instead of CoOp's. No image is touched. A name wins over a folder of
    that name; write ./dtd for the folder. Raises DataError.
    """
    for what, value, known in (("split", split, ("train", "val", "test")),
                               ("half", half, ("all", "base", "new")),
                               ("layout", layout, ("coop", "official"))):
        if value not in known:
            raise DataError(f"{what} {value!r}: expected one of {', '.join(known)}")
    listing = find_listing(os.fspath(name_or_path), data_dir, layout, download)
    if classes is not None:
        listing.select(find_classes(listing.classnames, classes))
    if half != "all":
        labels = [label for _, label in listing.rows["train"] or listing.rows["test"]]
        listing.select(halves(labels)[half == "new"])
    return listing.open(split, transform)


# -----------------------------------------------------------------------------
# Few-shot lists and batches

def few_shot(dataset, shots, seed, val=None):
    """`shots` images per class -> the train subset, or (train, val) with min(shots, 4) per class of
    `val`, drawn after train from the same stream.

    Item for item the list CoOp and its successors draw (Dassl's generate_fewshot_dataset): classes
    in order of first appearance, random.sample of each, a class that is short whole and in order.
    The stream is private, so nothing drawn before matters, and seed 0 is a seed. ImageNet's val is
    its test set and comes back whole, as there. Raises DataError.
    """
    for what, value in (("shots", shots), ("seed", seed)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise DataError(f"{what} {value!r}: expected a whole number, 0 or more")
    stream = random.Random(seed)

    def draw(part, count):
        groups, chosen, short = {}, [], []
        for position, label in enumerate(part.labels):
            groups.setdefault(label, []).append(position)
        for label, group in groups.items():
            if len(group) < count:
                short.append(f"{part.classnames[label]} ({len(group)})")
            chosen += group if len(group) < count else stream.sample(group, count)
        subset = part.subset(chosen)
        if short:
            subset.notes.append(f"fewer than {count} {part.split} images, taken whole: "
                                f"{', '.join(short)}")
        return subset

    train = draw(dataset, shots)
    if val is None:
        return train
    return train, (val if val.name == "imagenet" else draw(val, min(shots, 4)))


class Batches(Sampler):
    """Yields lists of (epoch, index). Global batch b is perm[b*B : (b+1)*B] with perm a function of
    (seed, epoch); rank r of W takes every W-th from r on, so the union over ranks is the same for
    any W (a rank's share of a short last batch may be empty).

    drop_last None is Dassl's rule: a training set drops the remainder unless it is smaller than one
    batch, which is then a single short batch; without shuffling nothing is dropped.
    """

    def __init__(self, n, batch_size, seed=0, rank=0, world_size=1, shuffle=True, drop_last=None):
        if batch_size < 1 or not 0 <= rank < world_size:
            raise DataError(f"batch size {batch_size}, rank {rank} of {world_size}: expected at "
                            f"least 1 image, and 0 <= rank < world size")
        self.n, self.batch_size, self.seed, self.shuffle = n, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.drop_last = shuffle and n >= batch_size if drop_last is None else drop_last
        self.epoch = self.first_batch = 0

    def set_epoch(self, epoch, first_batch=0):
        """The epoch to yield next, and how many of its batches are done already."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self):
        """Batches in a whole epoch."""
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    def global_size(self, batch):
        """Images in global batch number `batch`, over all ranks."""
        return max(0, min(self.batch_size, self.n - batch * self.batch_size))

    def __iter__(self):
        order = list(range(self.n))
        if self.shuffle:  # index -1 is no image: the order has a stream of its own
            generator = torch.Generator().manual_seed(sample_seed(self.seed, self.epoch, -1))
            order = torch.randperm(self.n, generator=generator).tolist()
        epoch = self.epoch
        for batch in range(self.first_batch, len(self)):
            share = order[batch * self.batch_size:(batch + 1) * self.batch_size]
            yield [(epoch, index) for index in share[self.rank::self.world_size]]


def collate(items, size):
    """Items of an ImageSet -> images (B, 3, S, S), labels (B,), indices (B,); B may be 0."""
    if not items:
        return [torch.zeros(0, 3, size, size), *torch.zeros(2, 0, dtype=torch.long)]
    return default_collate(items)


def make_loader(dataset, batch_size, seed=0, shuffle=True, drop_last=None, rank=0, world_size=1,
                workers=0, **options):
    """DataLoader over an ImageSet with a Preprocess; `loader.batch_sampler` is the Batches.

    `batch_size` is global. Batches depend neither on `workers` nor on how they are started. The
    options go to DataLoader; those that only concern workers are ignored when there are none.
    """
    batches = Batches(len(dataset), batch_size, seed, rank, world_size, shuffle, drop_last)
    if workers:
        options = {"persistent_workers": True, **options}
    else:
        for key in ("persistent_workers", "multiprocessing_context", "prefetch_factor", "timeout"):
            options.pop(key, None)
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers,
                      collate_fn=functools.partial(collate, size=dataset.transform.size),
                      generator=torch.Generator(), **options)  # else it draws from the global one


# -----------------------------------------------------------------------------
# Scores

def zero_shot_weights(encode, prompts_per_class, chunk=256):
    """encode(list of str) -> (n, D); one prompt or several per class -> (C, D), unit rows.

    The mean of the unit vectors, made a unit vector again (Radford et al. 2021, section 3.1.4).
    """
    groups = [[group] if isinstance(group, str) else list(group) for group in prompts_per_class]
    if not groups or not all(groups):
        raise DataError("each class needs at least one prompt")
    prompts = [prompt for group in groups for prompt in group]
    features = torch.cat([encode(prompts[i:i + chunk]) for i in range(0, len(prompts), chunk)])
    features = features / features.norm(dim=-1, keepdim=True)
    means = torch.stack([part.mean(dim=0) for part in features.split([len(g) for g in groups])])
    return means / means.norm(dim=-1, keepdim=True)


def classification_scores(predictions, labels, classes):
    """predictions, labels: (N,) ints; label -1 (unreadable image) is left out -> dict of

    accuracy    % right
    macro_f1    %, mean F1 over the classes that occur in `labels`; one never predicted counts 0
    per_class   % right of each class, None if it does not occur
    confusion   (C, C) int64 array, rows = truth
    scored, skipped    how many images counted, how many had label -1
    """
    predictions, labels = (np.asarray(values, dtype=np.int64).reshape(-1)
                           for values in (predictions, labels))
    counted = labels >= 0
    predictions, truth = predictions[counted], labels[counted]
    if not len(truth):
        raise DataError("no image could be scored: all of them were unreadable")
    confusion = np.bincount(truth * classes + predictions, minlength=classes ** 2)
    confusion = confusion.reshape(classes, classes)
    right, actual, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    present = actual > 0
    f1 = 2 * right[present] / (actual + predicted)[present]
    return {"accuracy": 100 * float(right.sum()) / len(truth),
            "macro_f1": 100 * float(f1.mean()),
            "per_class": [100 * int(r) / int(a) if a else None for r, a in zip(right, actual)],
            "confusion": confusion,
            "scored": len(truth), "skipped": int((~counted).sum())}


# -----------------------------------------------------------------------------
# The data doctor

TINY_SIDE, HUGE_PIXELS, STRIP = 32, 25_000_000, 4  # 25 MP take a third of a second to decode
FEW_IMAGES, IMBALANCE = 16, 10
CAPTION_WORDS = 55     # CLIP's BPE makes about 1.3 tokens of an English word: 77, with both ends
NEAR_BITS = 4          # of 63: pictures so close are compared by colour,
NEAR_COLOUR = 0.15     # and are the same within this mean difference, in units of their contrast
NEAR_WINDOW = 128      # neighbours compared: a million frames of one video would take days
COSINES = np.cos(np.pi / 64 * np.outer(np.arange(8), 2 * np.arange(32) + 1)).astype(np.float32)

FINDINGS = {  # in the order of the report: what it is; what to do
    "leakage": "images are byte for byte in another split; keep one, the score counts known images",
    "near_leakage": "images look like one in another split; compare them, keep each in one split",
    "refused": "reasons for which training would refuse this data; mend them first",
    "two_labels": "images have a copy under another class; decide which label is right",
    "missing": "listed files are not there; restore them or take them off the list",
    "empty": "files of 0 bytes; fetch or copy them again",
    "not_image": "files are not known as images, whatever their name; replace or delete them",
    "damaged": "images break off or do not decode; fetch or copy them again",
    "bomb": f"images are not read, being over {MAX_PIXELS:,} pixels; scale them down",
    "duplicates": "images are byte for byte in their split already; keep one of each",
    "near_duplicates": "images look like another of their split; keep one, or it counts twice",
    "no_train": "classes have no train image; nothing can be learned about them",
    "no_test": "classes have no test image; they are never scored",
    "few": f"classes have under {FEW_IMAGES} train images; larger draws take them whole",
    "imbalance": f"classes are {IMBALANCE} or more times below the largest; judge by macro F1",
    "same_names": "class names read the same, and so do their prompts; rename or merge them",
    "ignored": "files in class folders are not read for their suffix; convert to JPEG or PNG",
    "no_caption": "captions are empty; write them or delete the rows",
    "long_caption": f"captions over {CAPTION_WORDS} words, an estimate: probably over 77 tokens; "
                    f"shorten them, the rest is cut off",
    "tiny": f"images have a side under {TINY_SIDE} pixels; enlarged, they show little",
    "huge": f"images are over {HUGE_PIXELS:,} pixels; scale them down once, to decode faster",
    "strip": f"images are over {STRIP} times longer than wide; the centre crop loses most of them",
    "deep": "images have over 8 bits per value; they are cut to 8, see that none comes out dark",
    "cmyk": "images are CMYK; convert them yourself if colour matters, no profile is applied",
    "alpha": "images can be transparent; alpha is dropped, see that nothing ugly lies under it",
    "animated": "images have several frames; only the first is used",
    "turned": "images carry an EXIF rotation; nothing to do here, other programs may ignore it",
}


def header_kinds(image):
    """An opened image, not decoded yet -> those of FINDINGS that its header shows."""
    short, long = sorted(image.size)
    tests = {"tiny": lambda: short < TINY_SIDE, "huge": lambda: short * long > HUGE_PIXELS,
             "strip": lambda: long > STRIP * short, "deep": lambda: image.mode[0] in "IF",
             "cmyk": lambda: image.mode == "CMYK", "alpha": lambda: image.has_transparency_data,
             "animated": lambda: image.is_animated and image.format != "MPO",  # a phone's photo
             # the tags of a PNG may lie behind its pixels: looking for them would decode it
             "turned": lambda: ((image.format != "PNG" or "exif" in image.info)
                                and image.getexif().get(0x0112, 1) in range(2, 9))}
    kinds = []
    for kind, test in tests.items():
        with contextlib.suppress(Exception):  # no such attribute, or tags damaged
            kinds += [kind] if test() else []
    return kinds


def examine(store, path):
    """One file, decoded once -> its FINDINGS, and (sha256, hash, colours), None if unreadable.

    hash: signs of the 63 lowest frequencies of the grey 32 x 32 picture, which survive re-encoding
    and resizing. colours: (8, 8, 3), for there are red and blue circles. JPEG is decoded at an
    eighth to a half of its size if that leaves 64 pixels: same faults found, up to 5 times faster.
    """
    kinds, content = [], None

    def look(image):
        kinds.extend(header_kinds(image))
        image.draft("RGB", (64, 64))
    try:
        content = store.read(path)
        image = read_image(io.BytesIO(content), path, look)
    except UnreadableImage as error:
        cause = error.__cause__  # none where a limit of this file was met
        return ["empty" if content == b"" else
                "bomb" if cause is None or isinstance(cause, Image.DecompressionBombError) else
                "not_image" if isinstance(cause, UnidentifiedImageError) else "damaged"], None
    small = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR, reducing_gap=2))
    waves = COSINES @ small.mean(axis=2, dtype=np.float32) @ COSINES.T  # (8, 8), first the mean
    colours = small.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3)).astype(np.uint8)
    signature = (np.packbits(waves > 0).tobytes(), colours.tobytes())
    return kinds, (hashlib.sha256(content).digest(), *signature)


def near_pairs(hashes, colours):
    """(n,) uint64, (n, 64, 3) -> arrays of positions a, b of pictures that look the same.

    Hashes that differ in 4 bits agree in one of 5 bands; so sort by each band and compare along
    the runs: memory stays linear, and time, which all pairs of 27,000 would make quadratic.
    """
    contrast = colours.std(axis=1, dtype=np.float32).mean(axis=1)
    vivid = np.flatnonzero(contrast > 1)  # flat ones agree by chance
    for shift in range(0, 64, 13):
        band = hashes[vivid] >> np.uint64(shift) & np.uint64(2 ** 13 - 1)
        order = np.lexsort((hashes[vivid], band))
        band, order = band[order], vivid[order]
        for step in range(1, NEAR_WINDOW):
            run = np.flatnonzero(band[step:] == band[:-step])
            if not len(run):
                break
            a, b = order[run], order[run + step]
            bits = np.unpackbits((hashes[a] ^ hashes[b]).view(np.uint8).reshape(-1, 8), axis=1)
            close = bits.sum(axis=1) <= NEAR_BITS
            a, b = a[close], b[close]
            apart = np.abs(np.subtract(colours[a], colours[b], dtype=np.int16)).sum(axis=(1, 2))
            close = apart < NEAR_COLOUR * 64 * 3 * contrast[a]
            yield a[close], b[close]


def find_copies(items, prints, find):
    """items: (split number, label, "split:path"), splits in order; prints: as examine gives them.
    Calls find(kind, example) for each image that an earlier one equals or resembles."""
    if not items:
        return
    split, label = (np.array([item[i] for item in items]) for i in (0, 1))
    across, within, near_across, near_within = np.full((4, len(items)), -1)  # the earlier image
    seen, fresh = {}, []
    for i, (digest, _, _) in enumerate(prints):
        homes = seen.setdefault(digest, {})  # split -> the first image with these bytes
        within[i] = homes.get(split[i], -1)
        across[i] = next((j for other, j in homes.items() if other != split[i]), -1)
        if homes.setdefault(split[i], i) == i:
            fresh.append(i)
    fresh = np.array(fresh)
    hashes = np.frombuffer(b"".join(prints[i][1] for i in fresh), dtype=np.uint64)
    colours = np.frombuffer(b"".join(prints[i][2] for i in fresh), dtype=np.uint8)
    for a, b in near_pairs(hashes, colours.reshape(-1, 64, 3)):
        a, b = np.sort((fresh[a], fresh[b]), axis=0)
        other = split[a] != split[b]
        near_across[b[other]], near_within[b[~other]] = a[other], a[~other]
    near_across[across >= 0] = -1  # said already
    for kind, earlier in {"leakage": across, "near_leakage": near_across, "duplicates": within,
                          "near_duplicates": near_within}.items():
        for i in np.flatnonzero(earlier >= 0):
            for name in [kind, "two_labels"][:1 + (label[i] != label[earlier[i]])]:
                find(name, f"{items[i][2]} = {items[earlier[i]][2]}")


def check_lists(listing, faults, find):
    """What the lists alone show: classes and captions."""
    train, test = (collections.Counter(label for _, label in listing.rows[split])
                   for split in ("train", "test"))
    for label, name in enumerate(listing.classnames):
        if train and not train[label]:
            find("no_train", name)
        elif train and train[label] < FEW_IMAGES:
            find("few", f"{name} ({train[label]})")
        if test and not test[label]:
            find("no_test", name)
        if 0 < train[label] * IMBALANCE <= max(train.values()):
            find("imbalance", f"{name} ({train[label]} to {max(train.values())})")
    names = collections.Counter(map(cleaned, listing.classnames))
    for name in [name for name in names if names[name] > 1]:
        if not any("read the same" in fault for fault in faults):
            find("same_names", name)
    for path, caption in listing.captions:  # a Chinese character is a word here
        words = len(re.findall(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]+", caption))
        if not caption or max(words, len(caption) // 9) > CAPTION_WORDS:
            find("long_caption" if caption else "no_caption", path)
    for path in listing.ignored:
        find("ignored", path)


def check_images(listing, chosen, faults, find):
    """Decode the paths in `chosen` and compare them -> how many were decoded."""
    items, prints, examined = [], [], 0
    for number, (split, rows) in enumerate(listing.rows.items()):
        if split == "val" and (not rows or rows is listing.rows["test"]):
            continue  # no need of one; and ImageNet's val is its test set on purpose
        lost = []
        for position, (path, label) in enumerate(rows):
            kinds, signature = ["missing"], None
            if listing.store.has(path):
                if path not in chosen:
                    continue
                kinds, signature = examine(listing.store, path)
                examined += 1
                if examined % 500 == 0 and sys.stderr.isatty():
                    print(f"{examined:,} images", end="\r", file=sys.stderr, flush=True)
            for kind in kinds:
                find(kind, f"{split}:{path}")
            if signature is None:
                lost.append(position)
            else:
                items.append((number, label, f"{split}:{path}"))
                prints.append(signature)
        try:  # in the words of training itself
            if rows or listing.name not in KNOWN:  # the shifts of ImageNet have no train split
                part = listing.open(split)
                part.refuse_losses(lost, "see below") if lost else None
        except DataError as error:
            faults.append(str(error))
    find_copies(items, prints, find)
    return examined


def check_data(text, data_dir="data", layout="coop", limit=None):
    """All that is worth knowing before training, as a dict for JSON; "usable" is False if training
    would refuse the data. Keeps half a kilobyte per image; `limit` decodes that many, drawn by a
    fixed permutation. Raises DataError if nothing can be listed."""
    if limit is not None and limit < 1:
        raise DataError(f"limit {limit}: expected 1 image or more")
    start, faults, found = time.monotonic(), [], {}
    listing = find_listing(text, data_dir, layout, faults=faults)

    def find(kind, example):
        entry = found.setdefault(kind, {"count": 0, "examples": []})
        entry["count"] += 1
        entry["examples"] += [example] if entry["count"] <= 5 else []
    check_lists(listing, faults, find)
    paths = sorted({path for rows in listing.rows.values() for path, _ in rows})
    chosen = paths if limit is None else random.Random(0).sample(paths, min(limit, len(paths)))
    examined = check_images(listing, set(chosen), faults, find)
    for fault in dict.fromkeys(faults):
        find("refused", fault)
    leaks = sum(found[kind]["count"] for kind in ("leakage", "near_leakage") if kind in found)
    return {"name": listing.name, "root": listing.root, "notes": listing.notes,
            "counts": {split: len(rows) for split, rows in listing.rows.items()},
            "classes": len(listing.classnames), "images": len(paths), "examined": examined,
            "seconds": round(time.monotonic() - start, 2),
            "findings": [{"finding": kind, **found[kind], "what": what, "advice": advice}
                         for kind, (what, _, advice) in ((kind, text.partition("; "))
                                                         for kind, text in FINDINGS.items())
                         if kind in found],
            "usable": not faults, "verdict":
            "training would be refused; mend what is said above" if faults else
            f"usable, but the score flatters (copies across splits: {leaks:,})" if leaks else
            "usable; read the findings first" if found else "usable, nothing to report"}


# -----------------------------------------------------------------------------
# Command line

def get_args(argv=None):
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description="Print the few-shot list of a dataset as JSON, or check "
        "whether images, classes and splits are fit to train on (exit code 2 if they are not).")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--few-shot", metavar="NAME",
                      help="dataset name, or path as for --data of the training scripts")
    what.add_argument("--check", metavar="NAME",
                      help="the same; every image is decoded and compared with all others")
    parser.add_argument("--shots", type=int, default=16, help="images per class (default 16)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the draw (default 1)")
    parser.add_argument("--data-dir", default="data", help="folder of the datasets (default data)")
    parser.add_argument("--split", choices=("coop", "official"), default="coop",
                        help="CoOp's split file (default) or the authors' own lists")
    parser.add_argument("--json", action="store_true", help="the report of --check as JSON")
    parser.add_argument("--limit", type=int, metavar="N",
                        help="--check decodes only N images, a fixed sample (default all)")
    return parser.parse_args(argv)


def print_few_shot(args):
    """{"train": [[path, label], ...], "val": [...]} on standard output; notes go to stderr."""
    train = open_dataset(args.few_shot, "train", args.data_dir, layout=args.split)
    val = open_dataset(args.few_shot, "val", args.data_dir, layout=args.split) \
        if train.counts["val"] else train.subset([])
    for part in (drawn := few_shot(train, args.shots, args.seed, val)):
        for note in part.notes[len(train.notes):]:
            print(f"note: {note}", file=sys.stderr)
    print(json.dumps({key: [list(pair) for pair in zip(part.paths, part.labels)]
                      for key, part in zip(("train", "val"), drawn)}))


def print_check(args):
    """The doctor's report, a line for each finding and the verdict last. Returns the exit code."""
    try:
        report = check_data(args.check, args.data_dir, args.split, args.limit)
    except DataError as error:
        if not args.json:
            raise
        report = {"name": args.check, "findings": [], "usable": False, "verdict": str(error)}
    if args.json:
        print(json.dumps(report))
        return 0 if report["usable"] else 2
    sizes = " / ".join(f"{count:,} {split}" for split, count in report["counts"].items())
    lines = [f"{report['root']}: {sizes} images in {report['classes']:,} classes",
             f"{report['examined']:,} of {report['images']:,} files decoded in "
             f"{report['seconds']:.1f} s" + ("; only some copies can be found among a part"
                                             if args.limit else "")]
    lines += [f"note: {note}" for note in report["notes"]]
    for found in report["findings"]:
        lines.append(f"{found['count']:>7,}  {found['finding']:<16} {found['what']}, e.g. "
                     f"{', '.join(found['examples'])}; {found['advice']}")
    for line in [*lines, f"verdict: {report['verdict']}"]:  # a file name may hold anything
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
        coding = sys.stdout.encoding or "utf-8"
        print(line.encode(coding, "backslashreplace").decode(coding))
    return 0 if report["usable"] else 2


def main(argv=None):
    """Returns the exit code: 0, or 2 after one line on stderr or a report that says why."""
    args = get_args(argv)
    try:
        if args.check is not None:
            return print_check(args)
        print_few_shot(args)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
