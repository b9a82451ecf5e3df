"""Examples in, scores out: datasets by name, folder, table or zip; few-shot lists; images with
captions; batches.

    train = open_dataset("dtd", "train", data_dir="data")        # CoOp's split file, read as it is
    shots = few_shot(train, shots=4, seed=1).preload()           # the published list, decoded once
    loader = make_loader(shots.with_transform(Preprocess(224, train=True, seed=1)), 32, seed=1)
    for images, labels, indices in loader: ...                   # (B, 3, 224, 224), (B,), (B,)

    pairs = open_pairs("flickr8k", "train", data_dir="data")     # also COCO, tables, WebDataset
    loader = make_pair_loader(pairs.with_transform(Preprocess(224, train=True)), 256, seed=1)
    for images, used, asked in loader: ...                       # texts: pairs.captions[used[i]]

Everything random is a function of plain numbers: the order of an epoch of (seed, epoch), the crop
of an image and the caption it comes with of (seed, epoch, index), the shots of (seed). So a run is
the same for any number of workers, for fork and for spawn, and goes on from the middle of an epoch
with nothing saved but two integers. Files are never trusted: no pickle runs, no unpacking, image
bombs refused by their header.

    python data.py --few-shot dtd --shots 4 --seed 1 --data-dir DIR      prints the list as JSON
    python data.py --make-shards flickr8k --data-dir DIR --out DIR --per-shard 1000
    python data.py --check PATH          is it fit to train on? leaks, copies, damaged files, ...
"""
import argparse
import base64
import binascii
import bisect
import collections
import contextlib
import copy
import csv
import dataclasses
import difflib
import functools
import gzip
import hashlib
import io
import json
import math
import mmap
import os
import pathlib
import random
import re
import struct
import sys
import tarfile
import time
import unicodedata
import warnings
import zipfile
import zlib
from typing import NamedTuple

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info


class DataError(ValueError):
    """Something the user can fix, said in one line; scripts leave with `exit_code`."""
    exit_code = 2


class UnreadableImage(DataError):
    """One image is missing, damaged, not an image or too large; the message names it."""


class LostWorker(DataError):
    """A process that reads images died or hangs; the message names what it was reading."""
    exit_code = 3


def one_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


# -----------------------------------------------------------------------------
# Pictures: from any file to RGB, from RGB to what the image tower eats

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)     # what torchvision's backbones were trained with
IMAGENET_STD = (0.229, 0.224, 0.225)
MAX_PIXELS = 178_956_970     # where Pillow itself gives up: 0.5 GB once decoded to RGB
MAX_FILE_BYTES = 1 << 29     # of one file inside a zip: its header may claim anything
LONGEST_STRIP = 64           # sides; see Preprocess
PILLOW = int(PIL.__version__.split(".")[0])


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
    """PIL image, or uint8 (H, W, 3) array -> (3, size, size) float32, normalised by mean and std.

    Evaluation: short side to `size` (bicubic, antialiased), centre crop; bit-equal to torchvision's
    Resize + CenterCrop + ToTensor + Normalize on an RGB image. With `squash` the whole image goes
    to size x size. Training (CoOp's): a random resized crop of `scale` times the area and, with
    `flip`, a flip, torchvision's own under torch.manual_seed(sample_seed(seed, epoch, index));
    open_clip trains with scale (0.9, 1.0) and no flip. Colours are converted before resizing, as in
    CoOp; OpenAI's code converts after.

    dtype torch.uint8 gives the pixels as they are, a quarter of the bytes to hand on; `normalise`
    then finishes whole batches. exact=False resizes faster, with at most 1/255 of difference in any
    value before it is normalised: from JPEG to batch 1.8 times the images per second of Pillow and
    torchvision on one core, for test images (tests/bench_data.py).
    """

    def __init__(self, size, train=False, seed=0, exact=True, dtype=torch.float32, mean=CLIP_MEAN,
                 std=CLIP_STD, squash=False, scale=(0.08, 1.0), flip=True):
        if dtype not in (torch.float32, torch.uint8):
            raise DataError(f"Preprocess cannot give {dtype}; choose torch.float32 or torch.uint8")
        self.size, self.train, self.seed, self.exact = size, train, seed, exact
        self.dtype, self.mean, self.std = dtype, mean, std
        self.squash, self.scale, self.flip = squash, scale, flip

    def __call__(self, image, epoch=0, index=0):
        image = to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(image))
        box, shape, flip = self.plan(*image.size, epoch, index)
        image = image if box == (0, 0, *image.size) else image.crop(box)
        pixels = (self.resize_exactly if self.exact else self.resize_fast)(image, shape)
        pixels = self.distort(pixels[..., ::-1] if flip else pixels, epoch, index)  # (3, S, S)
        if self.dtype == torch.uint8:
            return torch.from_numpy(np.require(pixels, requirements="CW"))
        # In numpy: the same bits as torch's, without waking its threads for one small image.
        pixels = pixels.astype(np.float32, order="C")
        pixels /= 255
        mean, std = np.array((self.mean, self.std), dtype=np.float32).reshape(2, 3, 1, 1)
        return torch.from_numpy((pixels - mean) / std)

    def distort(self, pixels, epoch, index):
        return pixels  # an Augment does

    def plan(self, width, height, epoch, index):
        """What to cut out first (left, top, right, bottom), the (width, height) to resize that to,
        and whether to flip. The centre of the result is taken if it is larger than size x size."""
        size, flip = self.size, False
        if self.train:
            generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch, index))
            box = crop_box(width, height, generator, self.scale)
            if self.flip:
                flip = torch.rand(1, generator=generator).item() < 0.5
            return box, (size, size), flip
        if self.squash:
            return (0, 0, width, height), (size, size), flip
        short, long = sorted((width, height))
        # A strip 1 x 5000 would be resized to a gigabyte; only the middle can reach the crop.
        extra = max(0, (long - LONGEST_STRIP * short) // 2)
        x, y = (extra, 0) if width > height else (0, extra)
        long = int(size * (long - 2 * extra) / short)  # torchvision rounds down here, to even below
        shape = (size, long) if width <= height else (long, size)
        return (x, y, width - x, height - y), shape, flip

    def resize_exactly(self, image, shape):
        image = image.resize(shape, Image.Resampling.BICUBIC)
        left, top = (round((side - self.size) / 2) for side in shape)
        image = image.crop((left, top, left + self.size, top + self.size))
        return np.asarray(image).transpose(2, 0, 1)

    def resize_fast(self, image, shape):
        """The sums of resize_exactly as two sparse matrix products, of the rows and columns that
        the crop keeps. Values between them are clipped as there but not rounded: that is all the
        difference, at most half of the weights' absolute sum, below 1."""
        size, (width, height) = self.size, image.size
        # Clipping makes the order matter. Pillow takes columns first; 13 rows, if many are to go.
        rows_first = PILLOW >= 13 and height > shape[1] and (
            height - shape[1] > 2 * (width - shape[0]))
        second, first = [(old, new, round((new - size) / 2), size)
                         for old, new in zip(image.size, shape)]
        if not rows_first:
            image, first, second = image.transpose(Image.Transpose.TRANSPOSE), second, first
        used = image.width * 3
        stride = used // 32 * 32 + 48        # no power of two, for the caches' sake
        pixels = np.empty((image.height, stride), dtype=np.float32)
        pixels[:, :used] = np.asarray(image).reshape(-1, used)
        place, weight = bicubic(*first)
        pixels = F.embedding_bag(place, torch.from_numpy(pixels), mode="sum",
                                 per_sample_weights=weight)                # (S, stride)
        pixels = pixels.t().contiguous().clamp_(0, 255)
        place, weight = bicubic(*second, bands=3)
        pixels = F.embedding_bag(place, pixels, mode="sum", per_sample_weights=weight)
        pixels = pixels.add_(0.5).clamp_(0, 255).numpy().astype(np.uint8).reshape(3, size, size)
        return pixels.transpose(0, 2, 1) if rows_first else pixels


# Chinese-CLIP's ways to train: the share of the area that a crop takes, then what distorts it.
AUGMENTS = {"none": None, "light": (0.8, 1.0), "strong": (0.7, 1.0), "autoaugment": (0.9, 1.0)}


class Augment(Preprocess):
    """Preprocess for training under one of AUGMENTS; every image is seeded as there.

    none          the whole image, squashed to size x size: what Chinese-CLIP does unless told
    light         crop of 0.8 to 1, flip, ColorJitter(0.2, 0.2, 0.2)
    strong        crop of 0.7 to 1, flips of both kinds, ColorJitter(0.3, 0.3, 0.3, hue 0.1), turned
                  up to 15 degrees and moved up to a tenth: for a few hundred images
    autoaugment   crop of 0.9 to 1, flip, AutoAugment's ImageNet policy as torchvision has it, whose
                  posterize differs a little from the one of timm that Chinese-CLIP trains with

    flip, colour: False leaves out the flips, or all that changes colours. Needs torchvision for all
    but "none"; DataError without it.
    """

    def __init__(self, size, augment="none", seed=0, flip=True, colour=True, **options):
        if augment not in AUGMENTS:
            raise DataError(f"augment {augment!r}: expected one of {', '.join(AUGMENTS)}")
        plain = AUGMENTS[augment] is None
        super().__init__(size, train=not plain, seed=seed, squash=plain, flip=flip,
                         scale=AUGMENTS[augment] or (1.0, 1.0), **options)
        self.augment, self.colour = augment, colour
        self.distortions = [] if plain else self.prepare()

    def prepare(self):
        try:
            from torchvision import transforms as T  # a RuntimeError if built for another torch
        except (ImportError, RuntimeError, OSError) as error:
            raise DataError(f"the augmentation {self.augment} needs torchvision, which does not "
                            f"import ({one_line(error)}); install the build for torch "
                            f"{torch.__version__}, or take none") from None
        chosen = []
        if self.augment == "strong":
            chosen += [T.RandomVerticalFlip()] if self.flip else []
            chosen += [T.RandomAffine(15, (0.1, 0.1), interpolation=T.InterpolationMode.BILINEAR)]
        if self.augment == "autoaugment":
            return chosen + [T.AutoAugment()] * self.colour
        jitter = (0.3, 0.3, 0.3, 0.1) if self.augment == "strong" else (0.2, 0.2, 0.2)
        return chosen + [T.ColorJitter(*jitter)] * self.colour

    def distort(self, pixels, epoch, index):
        if not self.distortions:
            return pixels
        image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(sample_seed(self.seed + 1, epoch, index))
            for distortion in self.distortions:
                image = distortion(image)
        return np.asarray(image).transpose(2, 0, 1)


@functools.lru_cache(maxsize=1024)
def bicubic(old, new, first, count, bands=1):
    """What Pillow takes from a line of `old` values to make values first .. first + count - 1 of
    `new`: positions and weights, both (bands * count, taps), for each band of a line of pixels.
    A cubic with a = -1/2, widened when it shrinks."""
    scale = old / new
    centre, reach = (np.arange(first, first + count) + 0.5) * scale, 2 * max(1, scale)
    low = np.maximum(centre - reach + 0.5, 0).astype(np.int64)
    high = np.minimum(centre + reach + 0.5, old).astype(np.int64)
    place = low[:, None] + np.arange((high - low).max())
    x = np.abs(place + 0.5 - centre[:, None]) / max(1, scale)
    weight = np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)
    weight[(x >= 2) | (place >= high[:, None])] = 0
    weight /= weight.sum(axis=1, keepdims=True)
    place = np.minimum(place, old - 1) * bands + np.arange(bands).reshape(-1, 1, 1)
    return (torch.from_numpy(place.astype(np.int32)).flatten(0, 1),
            torch.from_numpy(np.tile(weight.astype(np.float32), (bands, 1))))


def normalise(images, mean=CLIP_MEAN, std=CLIP_STD):
    """uint8 (B, 3, H, W) on any device -> float32 there, (images / 255 - mean) / std, on a CPU the
    bits that a Preprocess with dtype torch.float32 gives. Floats come back as they are."""
    if images.is_floating_point():
        return images
    images = images.float().div_(255)
    for channel, (m, s) in enumerate(zip(mean, std)):  # as numbers: a tensor would be an upload
        images[:, channel].sub_(m).div_(s)
    return images


# -----------------------------------------------------------------------------
# Views: random crops and distortions that a few numbers describe, so that they can be made again

# RandAugment's 14 operations (Cubuk et al. 2020) in the order of torchvision and of DataCompDR,
# whose files name them by number; their strengths are those of torchvision's magnitude 9 of 31.
DISTORTIONS = ("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness",
               "Color", "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast",
               "Equalize")
STRENGTHS = {"ShearX": 0.3, "ShearY": 0.3, "TranslateX": 150 / 331 * 224, "Rotate": 30.0,
             "TranslateY": 150 / 331 * 224, "Brightness": 0.9, "Color": 0.9, "Contrast": 0.9,
             "Sharpness": 0.9}
DRAWN_AT = 224  # translations are pixels of an image of this size


def distort(image, number, strength):
    """One of DISTORTIONS on an RGB image: the pixels of torchvision's RandAugment on PIL."""
    what, size = DISTORTIONS[number], image.size
    matrix = {"ShearX": (1, strength, 0, 0, 1, 0), "ShearY": (1, 0, 0, strength, 1, 0),
              "TranslateX": (1, 0, -int(strength), 0, 1, 0),
              "TranslateY": (1, 0, 0, 0, 1, -int(strength))}.get(what)
    if matrix:
        return image.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)
    if what == "Rotate":
        return image.rotate(strength, Image.Resampling.NEAREST)
    if what in ("Brightness", "Color", "Contrast", "Sharpness"):
        return getattr(ImageEnhance, what)(image).enhance(1.0 + strength)
    if what in ("Posterize", "Solarize"):
        return getattr(ImageOps, what.lower())(image, int(strength) if what == "Posterize"
                                               else strength)
    return getattr(ImageOps, what.lower())(image) if what != "Identity" else image


class Views:
    """PIL image -> a random view of it, uint8 (3, S, S), or one for each of several `sizes`: what a
    student and its teachers see of one image differs in pixels per side alone.

    `draw` chooses a view and `show` makes it. Between them it is a list as DataCompDR stores it,
    [[top, left, height, width], [[operation, strength], ...]]: a crop of `scale` of the area,
    torchvision's RandomResizedCrop, then `augment` operations of RandAugment. Without `scale` the
    view is always Preprocess's for evaluation, and its list is empty.
    """
    dtype = torch.uint8

    def __init__(self, sizes, seed=0, scale=None, augment=0):
        self.sizes, self.size, self.seed = tuple(sizes), sizes[0], seed
        self.scale, self.augment = scale, augment
        self.still = [Preprocess(size, dtype=torch.uint8) for size in self.sizes]

    def __call__(self, image, epoch=0, index=0):
        image = to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(image))
        return self.show(image, self.draw(*image.size, epoch, index))

    def draw(self, width, height, epoch, index):
        if not self.scale:
            return []
        generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch, index))
        left, top, right, bottom = crop_box(width, height, generator, self.scale)
        chosen = []
        for number in torch.randint(len(DISTORTIONS), (self.augment,),
                                    generator=generator).tolist():
            strength = 9 / 30 * STRENGTHS.get(DISTORTIONS[number], 0.0)
            if strength and torch.rand(1, generator=generator).item() < 0.5:
                strength = -strength
            strength = {"Posterize": 7.0, "Solarize": 178.5}.get(DISTORTIONS[number], strength)
            chosen.append([number, float(np.float32(strength))])  # as it can be stored
        return [[top, left, bottom - top, right - left]] + ([chosen] if chosen else [])

    def show(self, image, numbers):
        """Raises UnreadableImage when the crop does not lie in the image: not the one it was."""
        if not numbers:
            views = [still(image) for still in self.still]
        else:
            top, left, height, width = numbers[0]
            if min(top, left) < 0 or min(height, width) < 1 or (
                    left + width > image.width or top + height > image.height):
                raise UnreadableImage(f"a stored crop {numbers[0]} does not fit an image of "
                                      f"{image.width} x {image.height}: it is another one")
            cut = image.crop((left, top, left + width, top + height))
            views = [self.finish(cut, size, numbers[1] if len(numbers) > 1 else None)
                     for size in self.sizes]
        return views[0] if len(views) == 1 else tuple(views)

    def finish(self, cut, size, operations):
        view = cut.resize((size, size), Image.Resampling.BICUBIC)
        for number, strength in operations or ():
            if DISTORTIONS[number].startswith("Translate"):
                strength *= size / DRAWN_AT
            view = distort(view, number, strength)
        return torch.from_numpy(np.array(view).transpose(2, 0, 1).copy())


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
        try:
            is_folder = entry.is_dir()
        except OSError:  # a link to itself
            is_folder = False
        if is_folder and not is_litter(entry.name):
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

    reading = None  # in a loader's worker: the cell of shared memory for what it is reading

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, (tuple, list)) else (0, key)
        if self.reading is not None:
            self.reading[0] = index
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
                            f"image under {self.store}: {', '.join(empty)} ({reason}); use "
                            f"--classes to train on the rest")
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
    for text in (template, *classnames):
        if re.search("[\ud800-\udfff]", text):  # bytes that Python could not decode
            raise DataError(f"{text!r} is no readable text, with file names and arguments taken as "
                            f"{sys.getfilesystemencoding()}; set PYTHONUTF8=1, or name it in UTF-8")
    return [re.sub(r"\{c?\}", lambda _: name.replace("_", " "), template) for name in classnames]


def read_templates(given):
    """Prompts, or files with one per line (or a JSON list) -> list of str."""
    found = []
    for one in given:
        file = os.path.expanduser(one)
        if "{" in one and not os.path.isfile(file):
            found.append(one)
            continue
        text = read_text(file)
        listed = load_json(one, text.encode()) if text.lstrip()[:1] == "[" else text.splitlines()
        found += [line.strip() for line in listed if line.strip()]
    return found


def prompts_per_class(classnames, templates):
    """For each class its prompts: templates with {} or {c}, or functions of the name."""
    columns = [[t(name.replace("_", " ")) for name in classnames] if callable(t) else
               class_prompts(classnames, t) for t in templates]
    return [list(row) for row in zip(*columns)]


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

    def store_of(self, split):
        return self.store

    def open(self, split, transform=None):
        """One split as an ImageSet. Raises DataError if there is nothing to learn or to score."""
        if len(self.classnames) < 2:
            raise DataError(f"{self.root}: only the class {str(self.classnames)[:80]}; two or more "
                            f"are needed (a folder must be the one that holds the class folders)")
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
NO_SPLITS = "no splits were given: each class is cut 50/20/30 by a fixed permutation"
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


def read_json_lines(text):
    """JSONL -> its objects. ValueError with the line. U+2028 and its like do not end a line."""
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {one_line(error)}") from None
            if not isinstance(records[-1], dict):
                raise ValueError(f"line {number}: a {type(records[-1]).__name__}, not an object")
    return records


def read_records(text, name):
    """CSV, TSV, semicolons or JSONL -> rows as dicts of what was written, with lower-case keys, and
    all the keys. Raises DataError."""
    first = text.lstrip().split("\n", 1)[0]
    mark, limit = max(",\t;", key=first.count), csv.field_size_limit(1 << 24)
    try:
        records = (read_json_lines(text) if first.startswith("{") else
                   list(csv.DictReader(io.StringIO(text, newline=""), delimiter=mark)))
        records = [{str(key).strip().lower(): value for key, value in record.items()}
                   for record in records]
    except (ValueError, AttributeError, csv.Error) as error:
        raise DataError(f"{name} is not a readable table ({error})") from None
    finally:
        csv.field_size_limit(limit)
    return records, list(dict.fromkeys(key for record in records for key in record)) or [
        word.strip().lower() for word in first.split(mark)]


def read_table(text, name, in_zip):
    """CSV, TSV or JSONL -> {split or "all": [(path, class name)]}, notes, [(path, caption)] if it
    has such a column. Raises DataError."""
    records, columns = read_records(text, name)
    records = [{key: "" if value is None else str(value).strip() for key, value in record.items()}
               for record in records]
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
    return cut, [NO_SPLITS]


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


def spelled_out(classnames, folder, data_dir=None):
    """The words for class folders named by wnids, n01440764, as ImageNet's are, or by numbers, as
    ImageNetV2's, out of CoOp's classnames.txt near by. Other names come back as they are. Raises
    DataError where it has no words for them: prompts with wnids score at chance."""
    home = pathlib.Path(folder).absolute()
    version2 = "imagenetv2" in re.sub(r"[^a-z0-9]", "", str(home).lower()) and all(
        map(str.isdecimal, classnames))
    if not version2 and not all(re.fullmatch(r"n\d{8}", name) for name in classnames):
        return list(classnames)
    places = [place / known for known in (".", "imagenet") for place in (
        home, *home.parents[:3], pathlib.Path(os.path.expanduser(data_dir or home)))]
    table = next(filter(pathlib.Path.is_file, (place / WNIDS[0] for place in places)), None)
    words = dict(line.strip().split(" ", 1) for line in (read_text(table) if table else ""
                                                         ).splitlines() if " " in line.strip())
    if version2:
        words = {str(number): word for number, word in enumerate(words.values())}
    absent = [name for name in classnames if name not in words]
    if absent:
        raise DataError(f"{folder}: {len(absent)} class folders are named like {absent[0]!r}, of "
                        f"which no prompt can be made; put CoOp's {WNIDS[0]} (lines of wnid and "
                        f"name) into {home.parent}")
    return [words[name].strip() for name in classnames]


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


def open_zero_shot(name_or_path, data_dir="data"):
    """A labelled test set for zero-shot classification -> ImageSet, with `templates`: what
    open_dataset takes (ImageNet and its shifts by name: only the classes that a shift has; all
    images of a folder without splits), or a folder of CLIP_benchmark: test/nshards.txt, test/0.tar
    ... with `cls` beside each image,
    classnames.txt and zeroshot_classification_templates.txt."""
    home = pathlib.Path(os.path.expanduser(os.fspath(name_or_path)))
    if not (home / "classnames.txt").is_file() or not (home / "test").is_dir():
        listing = find_listing(os.fspath(name_or_path), data_dir)
        if NO_SPLITS in listing.notes:
            listing.notes.remove(NO_SPLITS)
            listing.rows = {"train": [], "val": [], "test": sorted(sum(listing.rows.values(), []))}
        listing.classnames = spelled_out(listing.classnames, listing.root, data_dir)
        images = listing.open("test")
        images.templates = [images.template]
        return images
    classnames = read_text(home / "classnames.txt").splitlines()
    classnames = [name.strip() for name in classnames if name.strip()]
    files = sorted((home / "test").glob("*.tar"), key=lambda f: (len(f.stem), f.stem))
    index, rows, notes, odd = {}, [], [], 0
    for file in files:
        for _, parts in tar_samples(file, notes):
            kind = next((kind for kind in TAR_IMAGES if kind in parts), None)
            label = read_span(file, *parts["cls"][1:]).strip() if "cls" in parts else b""
            if not kind or not label.isdigit() or int(label) >= len(classnames):
                odd += 1
                continue
            path = f"test/{file.name}:{parts[kind][0]}"
            index[path] = (str(file), *parts[kind][1:])
            rows.append((path, int(label)))
    if not rows:
        raise DataError(f"{home}: no sample with an image and a `cls` below {len(classnames)} in "
                        f"{len(files)} shards of test/; is it a set of another kind?")
    check_shards(home / "test", files, notes)
    notes += [f"{odd:,} samples without an image or a label left out"] if odd else []
    listing = Listing(home.name, str(home), TarStore(home, index),
                      {"train": [], "val": [], "test": rows}, classnames, notes=notes)
    images, prompts = listing.open("test"), home / "zeroshot_classification_templates.txt"
    images.templates = read_templates([str(prompts)]) if prompts.is_file() else [images.template]
    return images


# -----------------------------------------------------------------------------
# Image-caption pairs

class TarStore(ImageStore):
    """Images inside plain tars, read in place: `index` maps a path to (file, offset, bytes)."""

    def __init__(self, path, index):
        super().__init__(path)
        self.index, self.zipped = index, True

    def has(self, path):
        return path in self.index

    def read(self, path):
        try:
            file, offset, size = self.index[path]
            with open(file, "rb") as tar:
                tar.seek(offset)
                content = tar.read(size)
        except (KeyError, OSError) as error:
            raise UnreadableImage(f"{self.path}:{path}: cannot be read ({error})") from None
        if len(content) < size:
            raise UnreadableImage(f"{self.path}:{path}: the shard ends inside it")
        return content


class Base64Store(TarStore):
    """Images as base64 text, at places in a TSV or LMDB: `index` as a TarStore's, by image id."""

    def __init__(self, path, index):
        super().__init__(path, index)
        self._maps = {}

    def __getstate__(self):
        return {**super().__getstate__(), "_maps": {}}

    def read(self, path):
        try:
            file, offset, size = self.index[path]
            if file not in self._maps:
                self._maps[file] = map_file(file)
            text = self._maps[file][offset:offset + size].rstrip(b"\r\n")
            return base64.b64decode(text.translate(URL_SAFE), validate=True)
        except KeyError:
            raise UnreadableImage(f"{self.path}:{path}: there is no such image") from None
        except (binascii.Error, DataError) as error:
            raise UnreadableImage(f"{self.path}:{path}: no base64 of an image ({error})") from error

    def image(self, path):
        return read_image(io.BytesIO(self.read(path)), f"{self.path}:{path}")


URL_SAFE = bytes.maketrans(b"-_", b"+/")


def map_file(path):
    """A file mapped into memory, read only. Raises DataError."""
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: it is empty
        raise DataError(f"cannot read {path} ({one_line(error)}); copy it again") from None


@dataclasses.dataclass
class PairListing:
    """rows: {"train" | "val" | "test" | "all": [(path, caption)]}; stores: where the images of a
    split lie, "all" for those that have no store of their own. Where texts are listed apart from
    images: texts {split: [(text, [path, ...])]}, and pools {split: [path, ...]} of all images."""
    name: str
    root: str
    stores: dict
    rows: dict
    notes: list = dataclasses.field(default_factory=list)
    texts: dict = dataclasses.field(default_factory=dict)
    pools: dict = dataclasses.field(default_factory=dict)

    def store_of(self, split):
        return self.stores.get(split) or self.stores["all"]


class Retrieval(NamedTuple):
    """What a search is scored on: `PairSet.retrieval`."""
    images: "PairSet"       # its paths are the pool; images.image_items() goes to make_loader
    texts: list             # the queries, N of them
    relevant: torch.Tensor  # (R, 2) int64: text, image; a text may have several images, or none
    notes: list


class PairSet(Dataset):
    """Images with their captions. `set[c]` or `set[(epoch, c)]` -> (image, used, asked), where
    asked is c, a position in `captions`, and used is c too unless its image cannot be read: then it
    is another pair, found by (c, number of tries) alone, so the same in every run and worker, if by
    rare chance one whose image is in the batch already. The crop is that of index c either way.
    DataError if a hundred tries find no image.

    name, split, root   as opened                   paths      images as listed, each once
    captions            list of str, folded blanks  owner      caption -> position in paths
    counts              images per split            notes      sentences worth telling the user
    fingerprint         sha256 of the lists of all splits: identifies the data on resume
    """

    reading = None  # in a loader's worker: the cell of shared memory for what it is reading

    def __init__(self, listing, split, transform=None):
        self.name, self.root, self.split = listing.name, listing.root, split
        self.store = listing.store_of(split)
        self.paths = list(dict.fromkeys(path for path, _ in listing.rows[split]))
        place = {path: position for position, path in enumerate(self.paths)}
        self.owner = [place[path] for path, _ in listing.rows[split]]
        self.captions = [caption for _, caption in listing.rows[split]]
        self.counts = {key: len({path for path, _ in rows}) for key, rows in listing.rows.items()}
        lists = json.dumps(listing.rows, sort_keys=True)
        self.fingerprint = hashlib.sha256(lists.encode()).hexdigest()
        sizes = " / ".join(f"{count:,} {key}" for key, count in self.counts.items())
        self.notes = [*listing.notes, f"{self.name}: {sizes} images, {len(self):,} {split} "
                                      f"captions, split {self.fingerprint[:12]}"]
        self.transform, self.pixels = transform, None
        self.questions = listing.texts.get(split) or [
            question for part in listing.texts.values() for question in part
            if any(path in place for path in question[1])]
        self.pool = listing.pools.get(split) or self.paths

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, key):
        epoch, asked = key if isinstance(key, (tuple, list)) else (0, key)
        used = asked
        if self.reading is not None:
            self.reading[0] = self.owner[asked]
        for attempt in range(1, 101):
            try:
                image = self.picture(self.owner[used])
                return (self.transform(image, epoch, asked) if self.transform else image,
                        used, asked)
            except UnreadableImage as error:
                reason, used = error, sample_seed(0, attempt, asked) % len(self)
        raise DataError(f"{self.name}: a hundred images cannot be read ({reason}); restore them")

    def picture(self, position):
        """The decoded image at a position in paths. Raises UnreadableImage."""
        if self.pixels is None:
            return self.store.image(self.paths[position])
        if not self.pixels.place[position, 1]:
            raise UnreadableImage(f"{self.paths[position]}: not readable when the cache was filled")
        return Image.fromarray(self.pixels[position])

    def image_items(self):
        """A data set of the images, each once, for features: see PairImages."""
        return PairImages(self)

    def retrieval(self):
        """-> Retrieval: the set as a search task, by the rules of Chinese-CLIP's evaluation: every
        listed text is a query, be it without images, and every listed image is in the pool, be it
        without text. Without such lists each caption is a query for its own image. Call it before
        `cache`, and cache its images. Raises DataError if there is nothing to choose from."""
        place = {path: position for position, path in enumerate(self.pool)}
        texts = self.questions or [(caption, [self.paths[owner]]) for caption, owner
                                   in zip(self.captions, self.owner)]
        wanted = [(text, path) for text, (_, paths) in enumerate(texts)
                  for path in dict.fromkeys(paths)]
        relevant = [(text, place[path]) for text, path in wanted if path in place]
        if len(place) < 2 or not relevant:
            raise DataError(f"{self.name}: {len(place)} {self.split} images for {len(texts)} "
                            f"texts with {len(relevant)} pairs; a search needs 2 images or more")
        notes = [f"{count} {what}" for count, what in (
            (len(wanted) - len(relevant), "pairs name images that are not there: not scored"),
            (len(texts) - len({text for text, _ in wanted}), "texts name no image: always missed"),
            (len(place) - len({path for _, path in wanted} & place.keys()),
             "images have no text: they are in the pool and ask nothing")) if count]
        least = min(len(place), len(texts))
        notes += [f"a pool of {least}: R@k is 100 from k = {least} on, whatever the model does; "
                  f"the official evaluation refuses pools under 10"] * (least < 10)
        images = copy.copy(self)
        if list(place) != self.paths:
            images.paths, images.pixels = list(place), None
            kept = [c for c, owner in enumerate(self.owner) if self.paths[owner] in place]
            images.owner = [place[self.paths[self.owner[c]]] for c in kept]
            images.captions = [self.captions[c] for c in kept]
            images.__dict__.pop("groups", None)
        return Retrieval(images, [" ".join(text.split()) for text, _ in texts],
                         torch.tensor(relevant), notes)

    @functools.cached_property
    def groups(self):
        """Positions in `captions` sorted by image; where each image begins there; its count."""
        owner = np.asarray(self.owner, dtype=np.int64)
        count = np.bincount(owner, minlength=len(self.paths))
        return np.argsort(owner, kind="stable"), np.cumsum(count) - count, count

    def texts_of(self, image):
        """The captions of the image at this position in paths."""
        order, start, count = self.groups
        return [self.captions[c] for c in order[start[image]:start[image] + count[image]]]

    def subset(self, images):
        """The same set with only the images at these positions, in this order."""
        chosen, (order, start, count) = copy.copy(self), self.groups
        kept = [order[start[i]:start[i] + count[i]].tolist() for i in images]
        chosen.paths = [self.paths[i] for i in images]
        chosen.owner = [position for position, group in enumerate(kept) for _ in group]
        chosen.captions = [self.captions[c] for group in kept for c in group]
        chosen.pixels = self.pixels and self.pixels.subset(images)
        chosen.notes = list(self.notes)
        chosen.__dict__.pop("groups", None)
        here = set(chosen.paths)
        chosen.pool, chosen.questions = chosen.paths, [
            (text, here_too) for text, paths in self.questions
            if (here_too := [path for path in paths if path in here])]
        return chosen

    def with_transform(self, transform):
        chosen = copy.copy(self)
        chosen.transform, chosen.notes = transform, list(self.notes)
        return chosen

    def check_files(self):
        """Note the images that are missing; DataError if they are more than max(1, 1 %)."""
        lost = [i for i, path in enumerate(self.paths) if not self.store.has(path)]
        self.refuse_losses(lost, "there is no such file", "missing")

    def refuse_losses(self, lost, reason, what="unreadable"):
        """Raise DataError if the images at positions `lost` are over max(1, 1 %), else note."""
        if not lost:
            return
        said = (f"{len(lost):,} of {len(self.paths):,} {self.split} images are {what}, e.g. "
                f"{self.paths[lost[0]]} ({reason})")
        if len(lost) > max(1, len(self.paths) // 100) or len(lost) == len(self.paths):
            raise DataError(f"{self.name}: {said}, more than 1 %, under {self.store}; restore "
                            f"them, name the right folder, or list the rest")
        self.notes.append(f"{said}: other pairs take their places")

    def contents(self):
        """sha1 of the bytes of each image of `paths`, "" where they cannot be had. Read once."""
        if not hasattr(self.store, "known_contents"):
            self.store.known_contents = {}
        known = self.store.known_contents
        for path in self.paths:
            if path not in known:
                try:
                    known[path] = hashlib.sha1(self.store.read(path)).hexdigest()
                except (DataError, OSError, KeyError):
                    known[path] = ""
        return [known[path] for path in self.paths]

    def cache(self, mode="ram", side=256, folder=None, limit=1 << 62, workers=0):
        """Decode every image once, to at most `side` pixels on its short side (never enlarged), and
        take all further crops from there; returns the set itself.

        "ram": 3 bytes per pixel in memory, which forked workers read in place. "disk": a file in
        `folder`, mapped into memory, named after the list and `side` and found again by the next
        run; files that change under the same name are not noticed. "none": nothing. Beyond `limit`
        bytes it gives up, notes that, and images go on being read when asked for. Raises DataError
        if more than max(1, 1 %) of the images cannot be read.
        """
        if mode not in ("ram", "disk", "none") or mode == "disk" and folder is None:
            raise DataError(f"cache {mode!r}: expected ram, none, or disk with a folder")
        if mode == "none" or self.pixels is not None:
            return self
        shrunk = self.with_transform(functools.partial(shrink, side=side)).image_items()
        if mode == "disk":
            identity = json.dumps([self.fingerprint, self.paths, str(self.store), side, CACHE])
            file = os.path.join(folder, hashlib.sha256(identity.encode()).hexdigest()[:24] + CACHE)
            self.pixels = PixelCache.open(file, len(self.paths))
            if self.pixels is None:
                os.makedirs(folder, exist_ok=True)
                self.pixels = PixelCache.fill(shrunk, limit, workers, file)
        else:
            self.pixels = PixelCache.fill(shrunk, limit, workers)
        if self.pixels is None:
            self.notes.append(f"{len(self.paths):,} {self.split} images take over {limit >> 20:,} "
                              f"MB decoded: they are read again at every use")
        else:
            lost = np.flatnonzero(self.pixels.place[:, 1] == 0).tolist()
            self.refuse_losses(lost, "when the cache was filled")
        return self


class PairImages(Dataset):
    """The images of a PairSet, each once: `[i]` or `[(epoch, i)]` -> (image, position, i), position
    being i, or -1 with an image of zeros where it cannot be read. Goes to make_loader like an
    ImageSet; the caller counts the -1 and hands them to `refuse_losses` of the set."""

    reading = None  # as in PairSet

    def __init__(self, pairs):
        self.pairs, self.transform, self.paths = pairs, pairs.transform, pairs.paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, (tuple, list)) else (0, key)
        if self.reading is not None:
            self.reading[0] = index
        try:
            image = self.pairs.picture(index)
        except UnreadableImage:
            if self.transform is None:
                raise
            black = self.transform(Image.new("RGB", (8, 8)), epoch, index)
            return torch.zeros_like(black), -1, index
        return (self.transform(image, epoch, index) if self.transform else image), index, index


def shrink(image, epoch, index, side):
    """RGB image -> uint8 (H, W, 3), its short side at most `side`."""
    short = min(image.size)
    if short > side:
        image = image.resize([round(length * side / short) for length in image.size],
                             Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image))


CACHE = ".pixels1"         # ending of a cache file: pixels, (n, 3) int64 places, 4 int64 of foot
SLAB_BYTES = 1 << 28       # memory is taken in such pieces, for the sum is known only afterwards


class PixelCache:
    """Decoded images in a few flat uint8 tensors; `[i]` -> (H, W, 3) array, a view.

    place (n, 3) int64: where image i begins in the whole, its height and width (0 if lost). No
    image straddles two slabs. A file is one slab, mapped, and is mapped again after pickling.
    """

    def __init__(self, place, slabs, starts, file=None):
        self.place, self.slabs, self.starts, self.file = place, slabs, starts, file

    def __getstate__(self):
        return {**self.__dict__, "slabs": None if self.file else self.slabs}

    def __getitem__(self, i):
        if self.slabs is None:
            self.slabs = [torch.from_file(self.file, size=os.path.getsize(self.file),
                                          dtype=torch.uint8)]
        begin, height, width = self.place[i].tolist()
        slab = bisect.bisect_right(self.starts, begin) - 1
        begin -= self.starts[slab]
        return self.slabs[slab].numpy()[begin:begin + height * width * 3].reshape(height, width, 3)

    def subset(self, images):
        return PixelCache(self.place[list(images)], self.slabs, self.starts, self.file)

    @classmethod
    def fill(cls, shrunk, limit, workers, file=None):
        """Decode shrunk PairImages into memory or `file` -> PixelCache, None beyond `limit`."""
        place, slabs, starts, end, used, check = [], [], [], 0, 0, 0
        temporary = f"{file}.{os.getpid()}.part"
        with contextlib.ExitStack() as stack:
            out = file and stack.enter_context(open(temporary, "wb"))
            stack.callback(lambda: file and pathlib.Path(temporary).unlink(missing_ok=True))
            for image, position, _ in DataLoader(shrunk, batch_size=None, num_workers=workers,
                                                 generator=torch.Generator()):
                image = image if position >= 0 else image[:0]
                flat = image.flatten()
                if end + len(flat) > limit:
                    return None
                if out:
                    out.write(flat.numpy())
                    check = zlib.crc32(flat.numpy(), check)
                else:
                    if not slabs or used + len(flat) > SLAB_BYTES:
                        slabs.append(torch.empty(max(SLAB_BYTES, len(flat)), dtype=torch.uint8))
                        starts.append(end)
                        used = 0
                    slabs[-1][used:used + len(flat)] = flat
                    used += len(flat)
                place.append((end, *image.shape[:2]))
                end += len(flat)
            place = np.array(place, dtype=np.int64).reshape(-1, 3)
            if not out:
                slabs[-1:] = [slab[:used].clone() for slab in slabs[-1:]]
                return cls(place, slabs, starts)
            foot = np.array((len(place), end, check, zlib.crc32(place)), dtype=np.int64)
            out.write(place.tobytes() + foot.tobytes())
            out.flush()
            os.fsync(out.fileno())
            out.close()
            os.replace(temporary, file)
        return cls(place, None, [0], file)

    @classmethod
    def open(cls, file, n):
        """The cache in `file`, all of it checked (a pass over the file); None if it is no good."""
        try:
            with open(file, "rb") as source:
                source.seek(-32, os.SEEK_END)
                count, end, check, check_place = np.frombuffer(source.read(32), dtype=np.int64)
                if count != n or end < 0 or source.tell() != end + 24 * n + 32:
                    return None
                source.seek(end)
                place = np.frombuffer(source.read(24 * n), dtype=np.int64).reshape(n, 3)
                source.seek(0)
                found, left = 0, int(end)
                while left:
                    piece = source.read(min(left, 1 << 24))
                    found, left = zlib.crc32(piece, found), left - len(piece)
                whole = found == check and zlib.crc32(place.tobytes()) == check_place
        except (OSError, ValueError):
            return None
        return cls(place, None, [0], file) if whole else None


# -----------------------------------------------------------------------------
# Readers of pairs

IMAGE_COLUMNS = ("image", "filepath", "filename", "path", "image_path", "image_name", "file")
CAPTION_COLUMNS = ("caption", "title", "text", "captions", "comment")
PAIR_IMAGES = ("Images", "images", "Flicker8k_Dataset", "Flickr8k_Dataset", "flickr30k-images",
               "flickr30k_images", "flickr30k_images/flickr30k_images", "")
TAR_IMAGES = ("jpg", "jpeg", "png", "webp")
REINFORCED = ("paug.json", "syn.json", "npz", "pth.gz")  # beside them, see ShardTeacher
NEVER = "2258277193_586949ec62.jpg"  # Flickr8k captions it, but no copy has the image
HASHED = (0.8, 0.1, 0.1)


def locate(home, paths):
    """The ImageStore under `home` that holds `paths`, in one of the usual folders or a zip."""
    sample = paths[::max(1, len(paths) // 50)]
    places = [find_images([home], folder, paths) for folder in PAIR_IMAGES]
    return next((place for place in places if any(map(place.has, sample))), ImageStore(home))


def load_json(path, content=None):
    try:
        return json.loads(read_text(path, content))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({one_line(error)}); fetch it again") from None


def read_coco(home):
    """COCO 2017 as folders, or its zips as published -> {split: rows}, {split: store}, notes."""
    rows, stores, notes = {}, {}, ["the captions of COCO's test images are not public: val2017 is "
                                   "used as val and as test"]
    for split, part in (("train", "train2017"), ("val", "val2017")):
        name, archive = f"annotations/captions_{part}.json", home / "annotations_trainval2017.zip"
        if (home / name).is_file():
            content = load_json(home / name)
        elif archive.is_file() and ImageStore(archive).has(name):
            content = load_json(name, ImageStore(archive).read(name))
        else:
            continue
        try:
            names = {image["id"]: image["file_name"] for image in content["images"]}
            captions, lost = {image: [] for image in names}, []
            for note in content["annotations"]:
                captions.get(note["image_id"], lost).append(note["caption"])
        except (KeyError, TypeError) as error:
            raise DataError(f"{name} is no COCO caption file ({error!r} missing); expected images "
                            f"and annotations with captions") from None
        if lost:
            notes.append(f"{name}: {len(lost):,} captions of unlisted images left out")
        rows[split] = [(names[image], text) for image in names for text in captions[image]]
        paths = [path for path, _ in rows[split]]
        stores[split] = find_images([home, home / "images"], part, paths)
    if "val" in rows:
        rows["test"], stores["test"] = rows["val"], stores["val"]
    return rows, stores, notes


def read_karpathy(path):
    """dataset_coco.json, dataset_flickr8k.json or dataset_flickr30k.json -> {split: rows}. COCO's
    restval counts as train, as everyone trains."""
    rows = {"train": [], "val": [], "test": []}
    try:
        for image in load_json(path)["images"]:
            file = "/".join(filter(None, (image.get("filepath"), image["filename"])))
            split = "train" if image["split"] == "restval" else image["split"]
            rows[split] += [(file, sentence["raw"]) for sentence in image["sentences"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no Karpathy split ({error!r}); expected images with filename, "
                        f"split and sentences") from None
    return rows


def read_lines(path, home):
    """Flickr's "name.jpg#0<TAB>caption", or Kaggle's "name.jpg| 0| caption" of Flickr30k, where one
    row lacks its second bar, and the lists Flickr_8k.*Images.txt in `home`, if any -> {split or
    "all": rows}, notes. Images in no list are left out, as the authors do."""
    rows, odd, names, bars = [], 0, 0, 0
    for line in read_text(path).removeprefix("image_name| comment_number| comment").splitlines():
        match = re.match(r"\s*(.+?)(?:#(?:\w+#)?\d+[ \t]|\s*\|\s*\d+(\s*\|)?)\s*(.*)", line)
        if not match:
            odd += bool(line.strip())
            continue
        name, count = re.subn(r"(\.jpe?g)\.\d+$", r"\1", match[1])
        names, bars = names + count, bars + (not match[2] and line[match.end(1)] != "#")
        if name != NEVER:
            rows.append((name, match[3]))
    notes = [f"{count} {what}" for count, what in (
        (names, "image names like a.jpg.1 read as a.jpg"), (odd, "lines of no known form left out"),
        (bars, "rows without their second | repaired")) if count]
    lists = {}
    for split, word in (("train", "train"), ("val", "dev"), ("test", "test")):
        if home and (home / f"Flickr_8k.{word}Images.txt").is_file():
            listed = read_text(home / f"Flickr_8k.{word}Images.txt").split()
            lists.update(dict.fromkeys(listed, split))
    if not lists:
        return {"all": rows}, notes
    unused = len({name for name, _ in rows} - set(lists))
    notes += [f"{unused} images are in no split and not used"] if unused else []
    return {split: [row for row in rows if lists.get(row[0]) == split]
            for split in ("train", "val", "test")}, notes


def read_pair_table(path, image_column=None, caption_column=None, content=None):
    """CSV, TSV or JSONL (or its bytes) -> {split or "all": rows}. Values stay text: "None", "null"
    and "NA" are captions. Raises DataError with the columns there are."""
    records, columns = read_records(read_text(path, content), path)
    image_keys = [image_column.lower()] if image_column else IMAGE_COLUMNS
    caption_keys = [caption_column.lower()] if caption_column else CAPTION_COLUMNS
    for keys in (image_keys, caption_keys):
        if not set(keys) & set(columns):
            raise DataError(f"{path} has the columns {columns}; expected one of {list(keys)}")
    rows = {}
    for record in records:
        name, texts = (next((record[key] for key in keys if key in record), "")
                       for keys in (image_keys, caption_keys))
        name = str(name or "").strip().replace("\\", "/")
        split = str(record.get("split") or "all").strip().lower()
        split = SPLIT_WORDS.get(split, split)
        if split not in ("train", "val", "test", "all"):
            raise DataError(f"{path}: split {split!r}; write train, val or test")
        rows.setdefault(split, []).extend(
            (name, text) for text in (texts if isinstance(texts, list) else [texts]))
    return rows


def read_text_files(store):
    """Images with a text file of the same name beside each, one caption per line -> {split or
    "all": rows}, notes. The splits are top folders train, val, test, if there is one train."""
    names = store.names()
    texts, rows, alone = {name for name in names if name.endswith(".txt")}, {}, 0
    divided = any(SPLIT_WORDS.get(name.split("/")[0].lower()) == "train" for name in names)
    for name in names:
        if is_image(name):
            beside = os.path.splitext(name)[0] + ".txt"
            split = SPLIT_WORDS.get(name.split("/")[0].lower()) if divided else "all"
            alone += beside not in texts
            if beside in texts and split:
                lines = read_text(beside, store.read(beside)).splitlines()
                rows.setdefault(split, []).extend((name, line) for line in lines or [""])
    return rows, [f"{alone} images without a text file left out"] * bool(alone)


def tar_members(file, notes):
    """The plain files of a tar -> (name, offset, bytes). Links, devices, sparse files and names
    that lead out of it are counted in `notes`; what follows damage is left out and noted."""
    odd, size = 0, os.path.getsize(file)
    try:
        with tarfile.open(file, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # or it keeps them all
                plain = member.isreg() and not member.issparse()
                if member.size < 0 or plain and member.size > size - member.offset_data:
                    raise tarfile.ReadError("unexpected end of data")
                if plain and not leaves_folder(member.name):
                    yield member.name, member.offset_data, member.size
                else:
                    odd += not member.isdir()
            tar.fileobj.seek(tar.offset)  # a bad header ends the loop like the end mark of zeros
            if tar.fileobj.read(512) != bytes(512):
                raise tarfile.ReadError("no end mark")
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        notes.append(f"{file} is damaged ({one_line(error)}): only what comes before is used")
    if odd:
        notes.append(f"{file}: {odd} links, devices, sparse files or names outside it ignored")


def read_class_captions(store):
    """Class folders of images -> {split or "all": rows}, with "a photo of a <name>." """
    rows, _ = read_class_folders(store)
    names = sorted({name for entries in rows.values() for _, name in entries})
    words = dict(zip(names, spelled_out(names, store.path)))
    rows = {split: [(path, words[name]) for path, name in entries]
            for split, entries in rows.items()}
    template = TEMPLATES.get(dataset_name(os.path.basename(store.path)) or "", ANY_TEMPLATE)
    return {split: [(path, class_prompts([name], template)[0]) for path, name in entries]
            for split, entries in rows.items()}, ["captions are made of the class folders' names"]


def tar_key(name):
    """The name of a shard's member -> (key, kind), as webdataset: the key, folder included, ends at
    the first dot of the base name; the kind is the rest in small letters. Both "" for a name that
    has none, and for webdataset's own __members__."""
    folder, slash, base = name.rpartition("/")
    stem, dot, kind = base.partition(".")
    if not stem or not dot or re.fullmatch("__.*__", stem):
        return "", ""
    return folder + slash + stem, kind.lower()


def tar_samples(file, notes):
    """The samples of a shard -> (key, {kind: (name, offset, bytes)}). Members of one sample stand
    side by side: another key closes it, and so does a kind that it has already (shards that were
    joined begin with a key that another ended with). No sample goes over the end of its shard."""
    key, parts = None, {}
    for name, *span in tar_members(file, notes):
        this, kind = tar_key(name)
        if not this:
            continue
        if this != key or kind in parts:
            if parts:
                yield key, parts
            key, parts = this, {}
        parts[kind] = (name, *span)
    if parts:
        yield key, parts


def read_span(file, offset, size):
    with open(file, "rb") as tar:
        tar.seek(offset)
        return tar.read(size)


def read_tars(files, home=None):
    """WebDataset shards -> {split or "all": rows}, TarStore, notes. Members up to the first dot of
    their name belong together: jpg, jpeg, png or webp with txt, or json with "captions" (a list) or
    "caption". A shard whose path below `home` says train, val or test is of that split."""
    files = [os.path.abspath(file) for file in files]
    home = os.path.abspath(home or os.path.commonpath(map(os.path.dirname, files)))
    index, rows, notes, incomplete, kinds = {}, {}, [], 0, collections.Counter()
    totals = collections.Counter()
    for file in files:
        shard, samples = os.path.relpath(file, home).replace(os.sep, "/"), 0
        words = re.findall("[a-z]+", shard.lower())
        split = next((SPLIT_WORDS[word] for word in reversed(words) if word in SPLIT_WORDS), "all")
        for _, parts in tar_samples(file, notes):
            kind, samples = next((kind for kind in TAR_IMAGES if kind in parts), None), samples + 1
            texts = [text for text in tar_captions(file, parts) if text.strip()]
            if len(texts) == 1 and "txt" in parts and one_a_line(os.path.dirname(file)):
                texts = [line for line in texts[0].splitlines() if line.strip()]
            kinds.update(list(parts))
            if not kind or not texts:
                incomplete += 1
                continue
            name, offset, size = parts[kind]
            path = f"{shard}:{name}"
            while path in index:  # a key that comes again, in another sample
                path += "+"
            index[path] = (file, offset, size)
            rows.setdefault(split, []).extend((path, text) for text in texts)
        totals[os.path.dirname(file)] += samples
        promised = promised_samples(file)
        if promised not in (None, samples):
            notes.append(f"{file} has {samples:,} samples and {promised:,} by its folder's list")
    for folder, samples in totals.items():
        with contextlib.suppress(OSError, ValueError):
            promised = int(pathlib.Path(folder, "__len__").read_text("utf-8"))
            if promised != samples and not shard_lists(folder):  # which say it of each shard
                notes.append(f"{folder} has {samples:,} samples and __len__ says {promised:,}")
    if incomplete:
        notes.append(f"{incomplete:,} samples without image or caption left out; the shards hold "
                     + ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(8)))
    return rows, TarStore(home, index), notes


@functools.lru_cache
def shard_lists(folder):
    """{shard: samples} of a folder by sizes.json or DataCompDR's info.json, and its nshards.txt."""
    for name in ("sizes.json", "info.json"):
        with contextlib.suppress(OSError, DataError):
            content = load_json(os.path.join(folder, name))
            found = content.get("lengths", content) if isinstance(content, dict) else {}
            if isinstance(found, dict):
                return {key: n for key, n in found.items() if isinstance(n, int)}
    return {}


def promised_samples(file):
    return shard_lists(os.path.dirname(file)).get(os.path.basename(file))


def check_shards(folder, files, notes):
    """Compare what a folder's nshards.txt says with what is there, and note it."""
    with contextlib.suppress(OSError, ValueError):
        promised = int(pathlib.Path(folder, "nshards.txt").read_text("utf-8"))
        if promised != len(files):
            notes.append(f"{folder} has {len(files)} shards and nshards.txt says {promised}")


@functools.lru_cache
def one_a_line(folder):
    """Whether a txt in these shards has a caption on each line, as in CLIP_benchmark's."""
    with contextlib.suppress(OSError, ValueError):
        return "retrieval" in pathlib.Path(folder).parent.joinpath("dataset_type.txt").read_text(
            "utf-8")
    return False


def tar_captions(file, parts):
    """The captions of one sample: json's "captions", or txt, or json's "caption" or "text"."""
    def read(kind):
        if kind not in parts or parts[kind][2] > 1 << 20:
            return ""
        with open(file, "rb") as tar:
            tar.seek(parts[kind][1])
            return tar.read(parts[kind][2]).decode("utf-8-sig", "replace")
    try:
        content = json.loads(read("json") or "{}")
        content = content if isinstance(content, dict) else {}
    except (ValueError, RecursionError):
        content = {}
    texts = {name: [text for text in (held if isinstance(held, list) else [held])
                    if isinstance(text, str) and text.strip()] for name, held in content.items()
             if name in ("captions", "caption", "text")}
    if isinstance(content.get("captions"), list):
        return texts["captions"]
    text = read("txt")
    return [text] if text.strip() else texts.get("caption") or texts.get("text", [])


def expand(pattern):
    """shard-{0000..0012}.tar -> the names it stands for, zeros kept. Several groups give every
    combination; {a,b} gives either, and may hold groups itself, as in bash."""
    begin, depth, cuts = pattern.find("{"), 0, []
    for i in range(max(begin, 0), len(pattern)):
        depth += {"{": 1, "}": -1}.get(pattern[i], 0)
        if pattern[i] in "{}," and depth == (pattern[i] != "}"):
            cuts.append(i)
        if begin >= 0 and depth == 0:
            break
    if begin < 0 or depth:
        return [pattern]
    parts = [pattern[low + 1:high] for low, high in zip(cuts, cuts[1:])]
    if len(parts) > 1:
        stands_for = [done for part in parts for done in expand(part)]
    elif match := re.fullmatch(r"(\d+)\.\.(\d+)", parts[0]):
        low, high = match.groups()
        if not 0 <= int(high) - int(low) < 1 << 20:
            raise DataError(f"{pattern}: {{{match[0]}}} counts no shards; write {{0000..0012}}")
        stands_for = [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
    else:  # braces that are part of the name
        stands_for = [f"{{{done}}}" for done in expand(parts[0])]
    rest = expand(pattern[cuts[-1] + 1:])
    return [pattern[:begin] + middle + end for middle in stands_for for end in rest]


# -----------------------------------------------------------------------------
# Chinese-CLIP's own files: TSV and JSONL, LMDB; the lists of Flickr30k-CN and COCO-CN

TEXT_KEYS = (("text_id", "query_id"), ("text", "query_text"), ("image_ids", "item_ids"))


def split_word(name):
    """The last of train, val(id), test, ... among the words of a file's name, else "all"."""
    words = re.findall("[a-z]+", name.lower())
    return next((SPLIT_WORDS[word] for word in reversed(words) if word in SPLIT_WORDS), "all")


def read_texts(path, notes):
    """{"text_id", "text", "image_ids"} a line, or MUGE's own names -> [(text, [path, ...])]. Ids
    can be numbers or text. Raises DataError with the line."""
    found, seen, twice = [], set(), 0
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            text_id, text, images = (next((record[key] for key in keys if key in record), None)
                                     for keys in TEXT_KEYS)
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON ({one_line(error)}); mend or delete "
                            f"it") from None
        images = [] if images is None else images
        if not isinstance(text, str) or not isinstance(images, list):
            raise DataError(f'{path}, line {number}: expected {{"text_id": 1, "text": "...", '
                            f'"image_ids": [2, 3]}}, found {line.strip()[:60]}')
        twice += str(text_id) in seen
        seen.add(str(text_id))
        found.append((text, [str(image) for image in images]))
    if twice:
        notes.append(f"{path.name}: {twice} text ids come twice; each line is a query of its own")
    return found


def index_tsv(path, notes):
    """"id<TAB>base64" a line -> {id: (file, offset, bytes)}. Of an id that comes twice the last
    counts, as in the LMDB that the authors make of it. Raises DataError with the line."""
    content, index, number, twice = map_file(path), {}, 0, 0
    begin, size = 3 * (content[:3] == b"\xef\xbb\xbf"), len(content)
    while begin < size:
        number += 1
        end = content.find(b"\n", begin)
        end = size if end < 0 else end
        tab = content.find(b"\t", begin, end)
        if tab < 0 and content[begin:end].strip():
            raise DataError(f"{path}, line {number}: no tab between the image's id and its base64")
        if tab >= 0:
            image = content[begin:tab].decode("utf-8", "replace").strip()
            twice += image in index
            index[image] = (os.path.abspath(path), tab + 1, end - tab - 1)
        begin = end + 1
    if twice:
        notes.append(f"{path.name}: {twice} image ids come twice; the last of each counts")
    return index


class LMDB:
    """An LMDB file, read only, without the lmdb package: `.get(key)`, `.items()`, `len`, `in`.

    `path`: the folder with data.mdb. All keys are found at once when it is opened, by NumPy, page
    level by page level of the B+ tree; then each look-up is one of a dict. Keys and values are
    bytes, keys in byte order. Every offset is checked against the file. DataError if it is damaged,
    or more than one plain table of 64-bit little-endian LMDB 0.9.
    """

    def __init__(self, path):
        path = pathlib.Path(path)
        self.path = path / "data.mdb" if path.is_dir() else path
        self.content = map_file(self.path)
        try:
            self.spans = self.read_tree(*self.read_meta())  # key -> (begin, end)
        except (ValueError, IndexError, OverflowError, MemoryError, struct.error) as error:
            raise DataError(f"{self.path} is not an LMDB file that can be read "
                            f"({one_line(error)}); copy or make it again") from None

    def __len__(self):
        return len(self.spans)

    def __contains__(self, key):
        return key in self.spans

    def get(self, key, default=None):
        span = self.spans.get(key)
        return default if span is None else self.content[span[0]:span[1]]

    def items(self):
        for key, (begin, end) in self.spans.items():
            yield key, self.content[begin:end]

    def read_meta(self):
        """-> page size, depth, entries and root page, of the newer of the two meta pages."""
        metas, page = [], 0
        for place in (0, 1):
            at = place * page + 16
            magic, version = struct.unpack_from("<II", self.content, at)
            if magic != 0xBEEFC0DE or version != 1:
                raise ValueError(f"no LMDB 0.9: magic {magic:x}, version {version}")
            page = struct.unpack_from("<I", self.content, at + 24)[0]
            if page not in [1 << power for power in range(8, 17)]:
                raise ValueError(f"pages of {page} bytes")
            flags, depth, _, _, _, entries, root = struct.unpack_from("<HHQQQQQ", self.content,
                                                                      at + 76)
            last, transaction = struct.unpack_from("<QQ", self.content, at + 120)
            metas.append((transaction, page, flags, depth, entries, root, last))
        _, page, flags, depth, entries, root, last = max(metas)
        if flags or depth > 32:
            raise ValueError(f"not a plain table (flags {flags}, depth {depth})")
        if (last + 1) * page > len(self.content):
            raise ValueError(f"it breaks off: {len(self.content):,} bytes of {(last + 1) * page:,}")
        return page, depth, entries, root

    def read_tree(self, page, depth, entries, root):
        """-> {key: (begin, end)} of all leaves below the page `root`."""
        if not entries:
            return {}
        halves = np.frombuffer(self.content, dtype="<u2", count=len(self.content) // 2)
        total, pages = len(self.content) // page, np.array([root], dtype=np.uint64)
        for level in range(1, depth + 1):
            if pages.max() >= total or len(np.unique(pages)) < len(pages):
                raise ValueError("a page outside the file, or twice in the tree")
            start = pages.astype(np.int64) * page
            kind, lower = halves[start // 2 + 5], halves[start // 2 + 6].astype(np.int64)
            count = (lower - 16) // 2  # nodes of each page
            if (kind & 3 != (2 if level == depth else 1)).any() or (count < 1).any() or (
                    (lower > page).any()):
                raise ValueError("a page of the wrong kind")
            within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            start = np.repeat(start, count)
            place = halves[(start + 16) // 2 + within].astype(np.int64)
            if (place % 2).any() or (place + 8 > page).any():
                raise ValueError("an entry outside its page")
            node = halves[((start + place) // 2)[:, None] + np.arange(4)].astype(np.uint64)
            pages = node[:, 0] | node[:, 1] << np.uint64(16) | node[:, 2] << np.uint64(32)
        if len(node) != entries:
            raise ValueError(f"{len(node):,} entries of {entries:,}")
        return self.read_leaves(page, start, start + place + 8, node)

    def read_leaves(self, page, start, at, node):
        """Keys begin at `at`; node (n, 4): size, its high half, flags, length of the key."""
        size = (node[:, 0] | node[:, 1] << np.uint64(16)).astype(np.int64)
        flags, begin = node[:, 2], at + node[:, 3].astype(np.int64)
        big = flags == 1  # the value lies on pages of its own, whose number stands here
        if (flags > 1).any() or (begin + np.where(big, 8, size) > start + page).any():
            raise ValueError("an entry that leaves its page, or another table inside")
        if big.any():
            octets = np.frombuffer(self.content, dtype=np.uint8)
            number = octets[begin[big][:, None] + np.arange(8)].astype(np.uint64)
            number = (number << np.arange(0, 64, 8, dtype=np.uint64)).sum(axis=1, dtype=np.uint64)
            if number.max() > len(self.content) // page:
                raise ValueError("a page outside the file")
            keys_end, begin = begin, begin.copy()
            begin[big] = number.astype(np.int64) * page + 16
        else:
            keys_end = begin
        if (begin + size > len(self.content)).any():
            raise ValueError("a value that leaves the file")
        content = self.content
        keys = [content[a:b] for a, b in zip(at.tolist(), keys_end.tolist())]
        return dict(zip(keys, zip(begin.tolist(), (begin + size).tolist())))


def read_plain_pickle(data):
    """Bytes of a pickle of numbers, text and tuples of them -> the value. Any other opcode, and so
    all that could run code or claim memory, raises ValueError."""
    stack, marks, memo, at = [], [], {}, 0
    try:
        while True:
            code, at = data[at], at + 1
            if code == 0x2E and len(stack) == 1:                              # STOP
                return stack[0]
            elif code in (0x58, 0x8C):                                        # text
                wide = 4 if code == 0x58 else 1
                end = at + wide + int.from_bytes(data[at:at + wide], "little")
                if end > len(data):
                    raise ValueError("text that breaks off")
                stack.append(data[at + wide:end].decode("utf-8", "surrogatepass"))
                at = end
            elif code in (0x4B, 0x4D, 0x4A):                                  # 1, 2, 4 bytes
                wide = {0x4B: 1, 0x4D: 2, 0x4A: 4}[code]
                stack.append(int.from_bytes(data[at:at + wide], "little", signed=wide == 4))
                at += wide
            elif code == 0x8A and data[at] <= 8:                              # a longer number
                stack.append(int.from_bytes(data[at + 1:at + 1 + data[at]], "little", signed=True))
                at += 1 + data[at]
            elif code in (0x94, 0x71, 0x72):                                  # remember the top
                wide = {0x94: 0, 0x71: 1, 0x72: 4}[code]
                key = int.from_bytes(data[at:at + wide], "little") if wide else len(memo)
                memo[key], at = stack[-1], at + wide
            elif code in (0x68, 0x6A):                                        # recall
                wide = 1 if code == 0x68 else 4
                stack.append(memo[int.from_bytes(data[at:at + wide], "little")])
                at += wide
            elif code in (0x86, 0x87):                                        # tuple of 2, 3
                stack[-(code - 0x84):] = [tuple(stack[-(code - 0x84):])]
            elif code == 0x28:                                                # mark
                marks.append(len(stack))
            elif code == 0x74:                                                # tuple to the mark
                cut = marks.pop()
                stack[cut:] = [tuple(stack[cut:])]
            elif code in (0x80, 0x95):                                        # protocol, frame
                at += 1 if code == 0x80 else 8
            elif code in (0x49, 0x4C, 0x56, 0x70, 0x67):                      # protocol 0: lines
                end = data.index(b"\n", at)
                line, at = data[at:end].decode("ascii"), end + 1
                if code == 0x56:
                    stack.append(line.encode("ascii").decode("raw_unicode_escape"))
                elif code == 0x70:
                    memo[int(line)] = stack[-1]
                else:
                    stack.append(memo[int(line)] if code == 0x67 else int(line.rstrip("L")))
            else:
                raise ValueError(f"opcode 0x{code:02x}")
    except (IndexError, KeyError, UnicodeError) as error:
        raise ValueError(f"broken ({type(error).__name__})") from None


def read_lmdb(folder, notes):
    """One split's folder with pairs and imgs -> rows, texts, Base64Store."""
    pairs, images = LMDB(folder / "pairs"), LMDB(folder / "imgs")
    file = os.path.abspath(images.path)
    index = {key.decode("utf-8", "replace"): (file, begin, end - begin)
             for key, (begin, end) in images.spans.items() if key != b"num_images"}
    rows, texts = [], {}
    try:
        number = int(pairs.get(b"num_samples", len(pairs)))
        for i in range(number):
            image, text_id, text = read_plain_pickle(pairs.get(str(i).encode(), b""))
            rows.append((str(image), str(text)))
            texts.setdefault((str(text_id), str(text)), []).append(str(image))
    except (ValueError, TypeError) as error:
        raise DataError(f"{pairs.path}: pair {len(rows)} is refused and was not run: it is not a "
                        f"plain (image id, text id, text), {one_line(error)}") from None
    apart = [path for path in folder.parent.parent.glob("*_texts.jsonl")
             if split_word(path.stem) == split_word(folder.name)]
    questions = read_texts(apart[0], notes) if apart else [
        (text, paths) for (_, text), paths in texts.items()]
    return rows, questions, Base64Store(file, index)


def read_chinese(kind, files):
    """TSV and JSONL, or the folders of LMDBs -> rows, stores, notes, texts, pools by split."""
    rows, stores, notes, texts, pools = {}, {}, [], {}, {}
    for file in files:
        split = split_word(file.stem)
        if kind == "lmdb":
            pairs, questions, store = read_lmdb(file, notes)
        else:
            images, questions = images_beside(file), read_texts(file, notes)
            store = Base64Store(images, index_tsv(images, notes))
            pairs = [(path, text) for text, paths in questions for path in paths]
        if split in rows:
            raise DataError(f"{file} is a second {split} split beside {stores[split].path}; name "
                            f"the one that is meant")
        if not pairs:
            notes.append(f"{file.name} names no images (hidden labels?): not used")
            continue
        rows[split], stores[split] = pairs, store
        texts[split], pools[split] = questions, list(store.index)
    if "val" in rows and "test" not in rows:
        for table in (stores, texts, pools):
            table["test"] = table["val"]
    return rows, stores, notes, texts, pools


def images_beside(texts):
    """The path of the images that belong to a file of texts: train_texts.jsonl, train_imgs.tsv."""
    return texts.with_name(re.sub(r"_(texts|queries)\.jsonl$", "_imgs.tsv", texts.name))


def read_caption_lists(files, home):
    """"image#id#0 caption" lines: Flickr30k-CN has a file for each split, COCO-CN lists of image
    names beside its one, Flickr8k-CN Flickr8k's lists -> rows, notes."""
    rows, notes, lists = {}, [], {}
    for path in home.glob("coco-cn_*.txt"):
        if split_word(path.stem) != "all":
            lists |= dict.fromkeys(read_text(path).split(), split_word(path.stem))
    for path in files:
        found, more = read_lines(path, home)
        notes += more
        if set(found) == {"all"} and split_word(path.stem) in rows:
            raise DataError(f"{path} is not the only {split_word(path.stem)} split in {home}; name "
                            f"the caption file that is meant")
        for split, entries in found.items():
            for name, text in entries:
                part = (split if split != "all" else lists.get(name) if lists else
                        split_word(path.stem))
                year = re.match(r"COCO_((?:train|val)2014)_", name)
                name = name if is_image(name) else name + ".jpg"
                if part:
                    rows.setdefault(part, []).append((f"{year[1]}/{name}" if year else name, text))
    return rows, notes


# What to look for in a folder, in this order: layout -> (patterns, what a user would call it)
PAIR_LAYOUTS = {
    "chinese": (("*_texts.jsonl", "*_queries.jsonl"), "Chinese-CLIP's TSV and JSONL"),
    "lmdb": (("pairs/data.mdb", "*/pairs/data.mdb", "lmdb/*/pairs/data.mdb"),
             "Chinese-CLIP's LMDB"),
    "coco": (("annotations/captions_*2017.json", "annotations_trainval2017.zip"), "COCO 2017"),
    "karpathy": (("dataset_*.json",), "a Karpathy split"),
    "lines": (("*.token.txt", "*.token", "results.csv", "*/results.csv"), "Flickr's captions"),
    "lists": (("imageid.human-written-caption.txt", "*zhc.caption.txt", "*train*.caption.txt",
               "*val*.caption.txt", "*test*.caption.txt"), "COCO-CN, Flickr30k-CN or Flickr8k-CN"),
    "table": (("captions.txt", "*.csv", "*.tsv", "*.jsonl"), "one table"),
    "tars": (("*.tar", "*/*.tar"), "WebDataset shards"),
    "texts": (("*.txt", "*/*.txt", "*/*/*.txt"), "images with a text file each"),
    "classes": (("*/*", "*/*/*"), "class folders, whose names become captions"),
}


def find_layout(path, layout):
    """-> the layout of a file or folder, and the files that show it."""
    if path.is_file():
        texts = path.with_name(re.sub(r"_imgs\.tsv$", "_texts.jsonl", path.name))
        texts = texts if texts.is_file() else path.with_name(
            re.sub(r"_imgs\.tsv$", "_queries.jsonl", path.name))
        if layout in ("auto", "chinese") and images_beside(texts) != texts and texts.is_file() and (
                images_beside(texts).is_file()):
            return "chinese", [texts]
        if layout in ("coco", "texts", "lmdb", "lists"):
            raise DataError(f"{path}: the layout {layout} is that of a folder; name the folder")
        if path.suffix == ".zip":
            tables = [name for name in ImageStore(path).names()
                      if name.endswith(TABLE_SUFFIXES) and "/" not in name]
            if len(tables) != 1:
                raise DataError(f"{path} holds {len(tables)} tables; expected one .csv, .tsv or "
                                f".jsonl with images and captions, beside the images")
            return "zip", tables
        with path.open("rb") as file:
            head = file.read(1 << 12).decode("utf-8-sig", "replace").lstrip()
        kind = ("karpathy" if path.suffix == ".json" else "tars" if path.suffix == ".tar" else
                "lines" if re.match(r"image_name\||[^,\t\n]+#(\w+#)?\d+\s", head) else "table")
        return kind if layout == "auto" else layout, [path]
    for kind in PAIR_LAYOUTS if layout == "auto" else [layout]:
        files = sorted({file for pattern in PAIR_LAYOUTS[kind][0] for file in path.glob(pattern)})
        if kind == "chinese":
            files = [file for file in files if images_beside(file).is_file()]
        if kind == "lmdb":
            files = [file.parent.parent for file in files]
        if kind == "table" and len(files) > 1:
            files = [file for file in files if file.stem.lower() in SPLIT_WORDS]
        if kind == "classes":
            files = [file for file in files if is_image(file.name)][:1]
        if kind == "texts":
            files = [file for file in files[:1000] if any(
                file.with_suffix(suffix).is_file() for suffix in IMAGE_SUFFIXES)]
        if len(files) == 1 and kind in ("lines", "table"):
            return find_layout(files[0], layout)
        if files:
            return kind, files
    looked = "; ".join(f"{what} ({', '.join(patterns)})" for kind, (patterns, what) in
                       PAIR_LAYOUTS.items() if layout in ("auto", kind))
    raise DataError(f"{path} holds no pairs that are understood; looked for {looked}")


def find_pairs(path, layout, captions, image_column, caption_column):
    """A file or folder -> PairListing, before missing splits are made."""
    path = path.parent.parent if re.fullmatch("captions_.*2017.json", path.name) else path
    simple, home = layout == "simple-clip", path if path.is_dir() else path.parent
    if captions is not None:
        path = home / captions if (home / captions).is_file() else pathlib.Path(captions)
        if not path.is_file():
            raise DataError(f"there is no caption file {home / captions}")
    kind, files = find_layout(path, "auto" if simple else layout)
    alone = kind in ("table", "zip") and path.is_file()
    name = path.stem if alone else home.absolute().name
    notes, stores = [], None
    texts, pools = {}, {}
    if kind == "coco":
        rows, stores, notes = read_coco(home)
    elif kind in ("chinese", "lmdb"):
        rows, stores, notes, texts, pools = read_chinese(kind, files)
        name = [part for part in home.absolute().parts
                if part.lower() not in ("lmdb", *SPLIT_WORDS)][-1]
    elif kind == "lists":
        rows, notes = read_caption_lists(files, home)
        flat = {split: [(image.split("/")[-1], text) for image, text in entries]
                for split, entries in rows.items()}
        for rows in (rows, flat):  # COCO's images lie in folders by year, or all in one
            images = [image for entries in rows.values() for image, _ in entries]
            stores = {"all": locate(home, images)}
            if any(map(stores["all"].has, images[::max(1, len(images) // 50)])):
                break
    elif kind == "karpathy":
        rows = read_karpathy(files[0])
    elif kind == "lines":
        rows, notes = read_lines(files[0], None if simple else home)
    elif kind == "tars":
        rows, store, notes = read_tars(files, home)
        check_shards(home, files, notes)
        stores = {"all": store}
    elif kind == "texts":
        stores = {"all": ImageStore(home)}
        rows, notes = read_text_files(stores["all"])
    elif kind == "classes":
        stores = {"all": ImageStore(home)}
        rows, notes = read_class_captions(stores["all"])
    elif kind == "zip":
        stores = {"all": ImageStore(path)}
        rows = read_pair_table(f"{path}:{files[0]}", image_column, caption_column,
                               stores["all"].read(files[0]))
    else:
        rows = {}
        for file in files:
            for split, entries in read_pair_table(file, image_column, caption_column).items():
                if split == "all" and len(files) > 1:
                    split = SPLIT_WORDS[file.stem.lower()]
                rows.setdefault(split, []).extend(entries)
    if stores is None:
        stores = {"all": locate(home, [image for entries in rows.values() for image, _ in entries])}
    return PairListing(name, str(path), stores, rows, notes, texts, pools)


def clean_pairs(listing):
    """Fold the blanks in captions; drop pairs without image name or caption, and count them. An
    image path may be absolute, but not lead out of the data's folder by two dots."""
    kept = {}
    for split, rows in listing.rows.items():
        rows = [(name, "" if text is None else " ".join(str(text).split())) for name, text in rows]
        kept[split] = [(name, text) for name, text in rows if name and text]
        for name, _ in kept[split]:
            if ".." in name and ".." in name.split("/"):
                raise DataError(f"{listing.root}: {name} points outside its folder; write paths "
                                f"relative to it")
    dropped = sum(len(rows) - len(kept[split]) for split, rows in listing.rows.items())
    if not any(kept.values()):
        raise DataError(f"{listing.root} has no image with a caption; expected at least one row"
                        + "".join(f"; {note}" for note in listing.notes))
    if dropped:
        listing.notes.append(f"{dropped:,} rows without image or caption left out")
    listing.rows = kept


def split_pairs(listing, layout, ratio):
    """Give pairs their three splits: by the hash of the image's name where there are none, so that
    new images move no old ones; or as the simple-CLIP notebook does, which every copy of it shares:
    a fifth of the image numbers, drawn by NumPy with seed 42, is both val and test."""
    rows = listing.rows
    if layout != "simple-clip" and any(rows[split] for split in rows if split != "all"):
        rest = rows.get("all", [])
        if rest:
            listing.notes.append(f"{len(rest):,} rows of no split are taken as train")
        if rows.get("val") and not rows.get("test"):
            listing.notes.append("there is no test split: val is used as test")
        taught = {path for path, _ in rows.get("train", []) + rest}
        leaks = {path for split in ("val", "test") for path, _ in rows.get(split, [])} & taught
        if leaks:
            listing.notes.append(f"{len(leaks):,} images of val or test are in train too, e.g. "
                                 f"{min(leaks)}: their scores flatter")
        listing.rows = {"train": rows.get("train", []) + rest, "val": rows.get("val", []),
                        "test": rows.get("test") or rows.get("val", [])}
        return
    rows = [row for entries in rows.values() for row in entries]
    images = list(dict.fromkeys(path for path, _ in rows))
    if layout == "simple-clip":
        drawn = np.random.RandomState(42).choice(len(images), len(images) // 5, replace=False)
        held = {images[i] for i in drawn}
        part = {path: "test" if path in held else "train" for path in images}
        listing.notes.append("split 80/20 by image as the simple-CLIP notebook: val is also test")
    else:
        if len(ratio) != 3 or min(ratio) < 0 or abs(sum(ratio) - 1) > 1e-6:
            raise DataError(f"split_ratio {ratio}: expected shares of train, val, test, sum 1")
        part = {}
        for path in images:
            digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()
            share = int.from_bytes(digest[:6], "big") / 2 ** 48
            part[path] = ("train" if share < ratio[0] else
                          "val" if share < ratio[0] + ratio[1] else "test")
        listing.notes.append("no splits were given: images are cut "
                             f"{'/'.join(f'{100 * r:g}' for r in ratio)} by a hash of their names")
    listing.rows = {split: [row for row in rows if part[row[0]] == split]
                    for split in ("train", "val", "test")}
    if layout == "simple-clip":
        listing.rows["val"] = listing.rows["test"]


def find_pair_path(text, data_dir):
    """Path, or name of a folder under data_dir in any usual spelling -> Path. Raises DataError."""
    path, data_dir = (pathlib.Path(os.path.expandvars(os.path.expanduser(name)))
                      for name in (text, data_dir))

    def plain(name):
        name = re.sub(r"[^a-z0-9]", "", name.lower())
        return "coco" if name in ("coco2017", "mscoco", "mscoco2017") else name
    if text == "demo":
        return pathlib.Path(__file__).resolve().parent / "assets" / "demo.zip"
    if "/" in text or os.sep in text or path.suffix:
        if not path.exists():
            raise DataError(f"there is no file or folder {path}")
        return path
    here = sorted(data_dir.iterdir()) if data_dir.is_dir() else []
    same = [folder for folder in [data_dir / text, *here, path]
            if plain(folder.name) == plain(text) and folder.exists()]
    if not same:
        raise DataError(f"no pairs {text!r}: neither a path nor a folder in {data_dir}" + (
            nearest(text, [folder.name for folder in here]) if here else
            ", where nothing is; say with --data-dir where the data lies, or give its path"))
    return same[0]


def find_shards(text):
    """A list of files, or a pattern of braces, several joined by :: (a folder or * stands for the
    tars that match) -> files. One name that is no pattern comes back as it is; one with braces that
    is there is no pattern."""
    if isinstance(text, (list, tuple)):
        shards = [os.fspath(name) for name in text]
    else:
        shards = [name for part in map(os.path.expanduser, os.fspath(text).split("::"))
                  for name in ([part] if os.path.exists(part) else expand(part))]
        if len(shards) == 1 and "*" not in shards[0]:
            return shards
        shards = [str(file) for name in shards for file in (
            sorted(pathlib.Path(name).glob("*.tar")) if os.path.isdir(name) else
            sorted(pathlib.Path(os.path.dirname(name) or ".").glob(os.path.basename(name)))
            if "*" in name else [name])]
    missing = [name for name in shards if not os.path.isfile(name)]
    if missing or not shards:
        raise DataError(f"{len(missing)} of {len(shards)} shards are missing, e.g. "
                        f"{(missing or ['none given'])[0]}")
    return shards


def list_pairs(name_or_path, data_dir="data", layout="auto", image_column=None,
               caption_column=None, split_ratio=HASHED, captions=None):
    """The three splits of image-caption pairs, as open_pairs takes them -> PairListing."""
    if layout not in (known := ("auto", "simple-clip", *PAIR_LAYOUTS)):
        raise DataError(f"layout {layout!r}: expected one of {', '.join(known)}")
    several = isinstance(name_or_path, (list, tuple)) or "::" in os.fspath(name_or_path)
    shards = find_shards(name_or_path)
    if several or len(shards) > 1:
        rows, store, notes = read_tars(shards)
        for folder in sorted(set(map(os.path.dirname, shards))):
            check_shards(folder, [file for file in shards if os.path.dirname(file) == folder],
                         notes)
        listing = PairListing(os.path.basename(store.path), str(store), {"all": store}, rows, notes)
    else:
        path = find_pair_path(shards[0], data_dir)
        listing = find_pairs(path, layout, captions, image_column, caption_column)
    clean_pairs(listing)
    split_pairs(listing, layout, split_ratio)
    return listing


def open_pairs(name_or_path, split, data_dir="data", layout="auto", image_column=None,
               caption_column=None, split_ratio=HASHED, captions=None, transform=None):
    """Images with captions, split "train", "val" or "test" -> PairSet. No image is touched.

    Understood, by what lies in the folder: Chinese-CLIP's TSV and JSONL (MUGE also under the names
    of its competition) or LMDB, whole or one split of it, COCO-CN, Flickr30k-CN, COCO 2017
    (folders, or the zips as published), Karpathy JSON, Flickr8k and Flickr30k (token file or
    Kaggle's tables), CSV/TSV/JSONL, a zip with one of these and its images (as "demo"), images with
    a text file each, WebDataset tars (a folder, shard-{0000..0012}.tar, or a list). `layout` names
    one of PAIR_LAYOUTS if several lie there, or is "simple-clip" for that notebook's split.
    `captions` picks another caption file of the folder, such as a translation. Without splits,
    images are cut by `split_ratio`, see split_pairs. Pairs without caption are left out and noted.
    Raises DataError.
    """
    if split not in ("train", "val", "test"):
        raise DataError(f"split {split!r}: expected one of train, val, test")
    listing = list_pairs(name_or_path, data_dir, layout, image_column, caption_column, split_ratio,
                         captions)
    if not listing.rows[split]:
        having = ", ".join(key for key, rows in listing.rows.items() if rows)
        raise DataError(f"{listing.name} has no {split} split, only {having}")
    return PairSet(listing, split, transform)


# -----------------------------------------------------------------------------
# Stored teachers: views of the images, and what the teachers make of them and of the captions

STORED = ("images", "texts", "views", "sizes")  # the arrays of a folder, beside its teacher.json


class StoredTeacher:
    """A folder with embeddings of `views` random views of each image, the numbers that make each
    view again, and embeddings of each caption, computed once (Faghri et al. 2023; MobileCLIP).

    teacher.json    what it was made from, and the CRC-32 of each array:
    images.npy      (V, n, D) unit rows; of K teachers side by side, `dims` says where to cut
    texts.npy       (M, D)
    views.npy       (V, n, 4 + 2 A) a crop and A distortions, see Views
    sizes.npy       (n, 2) width and height that the image had
    """

    def __init__(self, folder, facts, arrays):
        self.folder, self.facts, self.arrays = folder, facts, arrays
        self.views, self.dims = facts["views"], [t["dim"] for t in facts["teachers"]]

    def __getstate__(self):
        return {**self.__dict__, "arrays": None}

    @classmethod
    def create(cls, folder, facts, images, captions, augment, dtype):
        """Empty arrays in `folder`.part, to be filled and then closed with `complete`."""
        part, dim = pathlib.Path(f"{folder}.part"), sum(t["dim"] for t in facts["teachers"])
        try:
            part.mkdir(parents=True, exist_ok=True)
            for name, shape, kind in zip(STORED, (
                    (facts["views"], images, dim), (captions, dim),
                    (facts["views"], images, 4 + 2 * augment), (images, 2)), (
                    dtype, dtype, np.float32, np.int32)):
                np.lib.format.open_memmap(part / f"{name}.npy", "w+", kind, shape).flush()
        except OSError as error:
            raise DataError(f"{part} cannot be written ({one_line(error)}); name another "
                            f"folder") from None

    @classmethod
    def filling(cls, folder, facts):
        part = pathlib.Path(f"{folder}.part")
        return cls(part, facts, {name: np.load(part / f"{name}.npy", "r+") for name in STORED})

    @classmethod
    def complete(cls, folder, facts):
        """Sign the filled arrays and put the folder into its place."""
        part, folder = pathlib.Path(f"{folder}.part"), pathlib.Path(folder)
        facts = {**facts, "crc": {name: file_crc(part / f"{name}.npy") for name in STORED}}
        (part / "teacher.json").write_text(json.dumps(facts, indent=1), "utf-8")
        if folder.exists():
            folder.rename(f"{folder}.old")
        part.rename(folder)
        for name in (*(f"{name}.npy" for name in STORED), "teacher.json"):
            pathlib.Path(f"{folder}.old", name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            pathlib.Path(f"{folder}.old").rmdir()

    @classmethod
    def open(cls, folder):
        """Raises DataError unless every array is there and whole."""
        folder = pathlib.Path(os.path.expanduser(folder))
        facts = load_json(folder / "teacher.json")
        try:
            arrays = {name: np.load(folder / f"{name}.npy", "r", allow_pickle=False)
                      for name in STORED}
            bad = [name for name in STORED
                   if file_crc(folder / f"{name}.npy") != facts["crc"][name]]
            if bad:
                raise ValueError(f"the checksum of {bad[0]}.npy is wrong")
            return cls(folder, facts, arrays)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"the stored teacher in {folder} is damaged ({one_line(error)}); write "
                            f"it again with --write-reinforced") from None

    def adopt(self, pairs):
        """The pairs in the form that is taught here. Raises DataError for another data set."""
        ours = [self.facts["data"], self.facts["split"], self.facts["images"]]
        theirs = [pairs.fingerprint, pairs.split, len(pairs.paths)]
        if ours != theirs:
            raise DataError(f"the stored teacher in {self.folder} is of other data: split "
                            f"{ours[0][:12]}, {ours[2]} {ours[1]} images, and this is "
                            f"{theirs[0][:12]}, {theirs[2]} {theirs[1]}; write it again")
        lost = set(self.facts["lost"])
        self.kept = [i for i in range(len(pairs.paths)) if i not in lost]
        order, start, count = pairs.groups
        self.rows = np.concatenate([order[start[i]:start[i] + count[i]] for i in self.kept])
        return pairs.subset(self.kept)

    def array(self, name):
        if self.arrays is None:  # in a worker
            self.arrays = {name: np.load(self.folder / f"{name}.npy", "r") for name in STORED}
        return self.arrays[name]

    def sample(self, image, view, caption, place):
        """-> the view's numbers, the size its image had, embeddings (D,) of view and caption."""
        i = self.kept[image]
        flat = [float(x) for x in self.array("views")[view, i]]
        numbers = [[int(x) for x in flat[:4]]] if flat[3] else []
        if len(flat) > 4 and numbers:
            numbers.append([[int(op), s] for op, s in zip(flat[4::2], flat[5::2])])
        return (numbers, tuple(self.array("sizes")[i].tolist()), self.array("images")[view, i],
                self.array("texts")[self.rows[caption]])


def file_crc(path):
    total = 0
    with open(path, "rb") as source:
        while piece := source.read(1 << 24):
            total = zlib.crc32(piece, total)
    return total


class ShardTeacher:
    """The same out of shards in the published layout of DataCompDR: beside each image (or in shards
    of their own, under the same keys) `paug.json` {"param_aug": [view, ...]}, `npz` or `pth.gz`
    {"image_emb": (V, D), "text_emb": (captions, D)}, and `syn.json` {"syn_text": [...]}, captions
    that a model wrote. Read when a sample is asked for, so nothing is copied."""

    def __init__(self, files, dims):
        self.beside, notes = {}, []  # {key: {shard: its members}}
        for file in map(os.path.abspath, files):
            for key, parts in tar_samples(file, notes):
                held = {kind: (file, *parts[kind][1:]) for kind in parts if kind in REINFORCED}
                if held:
                    self.beside.setdefault(key, {}).setdefault(file, {}).update(held)
        self.dims, self.folder = list(dims), os.path.dirname(files[0])
        self.facts = {"teachers": [{"name": f"stored {i}", "sha256": "", "dim": dim}
                                   for i, dim in enumerate(dims)]}

    def adopt(self, pairs):
        """The pairs that are taught here, their synthetic captions behind the real ones."""
        self.members, rows, views = [], [], set()
        for i, path in enumerate(pairs.paths):
            parts = self.find(pairs, path)
            if "paug.json" in parts and ("npz" in parts or "pth.gz" in parts):
                self.members.append(parts)
                written = self.read(path, parts, "syn.json") if "syn.json" in parts else []
                rows += [(path, text) for text in pairs.texts_of(i) + written]
                views.add(len(self.read(path, parts, "paug.json")))
        if not rows:
            kinds = sorted({kind for places in self.beside.values() for parts in places.values()
                            for kind in parts})
            raise DataError(f"no sample of {pairs.name} has paug.json and npz or pth.gz in "
                            f"{self.folder}; found of these: {', '.join(kinds) or 'nothing'}")
        self.views = min(views)
        taught = PairSet(PairListing(pairs.name, pairs.root, {"all": pairs.store},
                                     {pairs.split: rows}), pairs.split)
        left = len(pairs.paths) - len(taught.paths)
        taught.notes = pairs.notes + taught.notes[-1:] + (
            [f"{left:,} images without a stored teacher left out"] if left else [])
        return taught

    def find(self, pairs, path):
        """What stands beside an image: in its own shard, or else under its key in others. Raises
        DataError where a key comes again and it is not clear whose is meant."""
        key = tar_key(path.rpartition(":")[2])[0]
        places, found = self.beside.get(key, {}), {}
        own = places.get(getattr(pairs.store, "index", {}).get(path, [""])[0], {})
        if "paug.json" in own and ("npz" in own or "pth.gz" in own):
            return own
        for parts in places.values():
            if twice := found.keys() & parts.keys():
                raise DataError(f"{path}: more than one shard holds a {min(twice)} of the key "
                                f"{key!r}, e.g. {min(places)}; which is its own is not known")
            found |= parts
        return found

    def read(self, path, parts, kind):
        """The list in one of an image's JSON members. Raises DataError."""
        try:
            return list(json.loads(read_span(*parts[kind]))[
                {"paug.json": "param_aug", "syn.json": "syn_text"}[kind]])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{path}: its {kind} in {parts[kind][0]} cannot be used "
                            f"({one_line(error)})") from None

    def sample(self, image, view, caption, place):
        parts = self.members[image]
        numbers = self.read(f"image {image}", parts, "paug.json")[view]
        try:
            numbers = [some for some in numbers if some]
            crop, *operations = numbers or [[0, 0, 1, 1]]
            if len(crop) != 4 or any(not 0 <= number < len(DISTORTIONS)
                                     for number, _ in sum(operations, [])):
                raise ValueError(f"{numbers} is no view")
            if "npz" in parts:
                held = dict(np.load(io.BytesIO(read_span(*parts["npz"])), allow_pickle=False))
            else:
                packed = gzip.decompress(read_span(*parts["pth.gz"]))
                held = {key: torch.as_tensor(value).float().numpy() for key, value in torch.load(
                    io.BytesIO(packed), weights_only=True).items()}
            row, text = held["image_emb"][view], held["text_emb"][place]
            if row.shape != (sum(self.dims),) or text.shape != row.shape:
                raise ValueError(f"embeddings of {row.shape}, expected {sum(self.dims)}")
        except Exception as error:  # of zipfile, zlib, pickle, numpy
            raise DataError(f"image {image}: its stored embeddings in {parts['paug.json'][0]} "
                            f"cannot be used ({one_line(error)}); --teacher-dims says where to "
                            f"cut") from None
        return numbers, None, row, text


class StoredPairs(Dataset):
    """A PairSet whose items are (view, image embedding (D,), text embedding (D,), c, c): the view
    of this epoch, drawn by (seed, epoch, image), or the epochs' turn with `in_turn`. An image that
    cannot be read any more, or is not the one it was, raises DataError."""
    reading = None

    def __init__(self, pairs, teacher, transform, seed=0, in_turn=False):
        self.pairs, self.teacher, self.transform = pairs, teacher, transform
        self.seed, self.in_turn = seed, in_turn
        self.paths, self.owner, self.groups = pairs.paths, pairs.owner, pairs.groups
        order, start, _ = self.groups
        self.place = np.empty(len(order), dtype=np.int64)  # of a caption among its image's
        self.place[order] = np.arange(len(order)) - start[np.asarray(self.owner)[order]]

    def __len__(self):
        return len(self.owner)

    def view(self, epoch, image):
        """Number of the view that an image shows in an epoch."""
        number = epoch if self.in_turn else sample_seed(self.seed, epoch, image)
        return number % self.teacher.views

    def __getitem__(self, key):
        epoch, c = key
        i = self.owner[c]
        if self.reading is not None:
            self.reading[0] = i
        numbers, size, row, text = self.teacher.sample(i, self.view(epoch, i), c,
                                                       int(self.place[c]))
        try:
            image = self.pairs.picture(i)
            if numbers and size and size != image.size:  # a cache of another side, say
                numbers = [scaled(numbers[0], size, image.size), *numbers[1:]]
            view = self.transform.show(image, numbers)
        except UnreadableImage as error:
            raise DataError(f"{error}; its teacher is stored, so no other takes its place: restore "
                            f"the image, or write the stored teacher again") from None
        as_tensor = functools.partial(torch.tensor, dtype=torch.float32)
        return view, as_tensor(row), as_tensor(text), c, c


class ViewItems(Dataset):
    """Images for a stored teacher: `[(view, i)]` -> (pixels, numbers (4 + 2 A,), size (2,), i or -1
    where the image cannot be read, i)."""
    reading = None

    def __init__(self, pairs, transform):
        self.pairs, self.transform, self.paths = pairs, transform, pairs.paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        view, i = key
        if self.reading is not None:
            self.reading[0] = i
        position = i
        try:
            image = self.pairs.picture(i)
        except UnreadableImage:
            image, position = Image.new("RGB", (64, 64)), -1
        numbers = self.transform.draw(*image.size, view, i)
        flat = [x for part in numbers for x in (part if part and not isinstance(part[0], list)
                                                else sum(part, []))]
        flat += [0.0] * (4 + 2 * self.transform.augment - len(flat))
        return (self.transform.show(image, numbers), torch.tensor(flat), torch.tensor(image.size),
                position, i)


def scaled(crop, old, new):
    """A crop [top, left, height, width] of an image of size `old` in the same image at `new`."""
    x, y = new[0] / old[0], new[1] / old[1]
    top, left = round(crop[0] * y), round(crop[1] * x)
    return [top, left, max(1, min(round(crop[2] * y), new[1] - top)),
            max(1, min(round(crop[3] * x), new[0] - left))]


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


class PairBatches(Batches):
    """Yields lists of (epoch, caption) in which no image comes twice in one global batch, else two
    captions of it would be each other's negatives. A function of (seed, epoch); rank r of W takes
    every W-th of a batch. Every batch is full: the rest of an epoch is left out, by chance.

    captions "one": each image once per epoch, with one of its captions drawn by (seed, epoch,
    image). "all": each caption once per epoch, but of an image with more captions than there are
    batches only so many. COCO's 592k captions are ordered in about a second per epoch.
    """

    def __init__(self, pairs, batch_size, seed=0, rank=0, world_size=1, captions="one"):
        order, start, count = pairs.groups
        if captions not in ("one", "all"):
            raise DataError(f"captions {captions!r}: expected one or all")
        if batch_size < 2:
            raise DataError(f"batch size {batch_size}: a contrastive loss needs 2 pairs or more; "
                            f"that of one pair is 0")
        if batch_size > len(count):
            raise DataError(f"batch size {batch_size} with {len(count)} images: no image may come "
                            f"twice in a batch; take {len(count)} or less")
        self.order, self.start, self.count, self.every = order, start, count, captions == "all"
        self.most = len(order) // batch_size if self.every else 1  # captions of one image
        while self.every and self.most != (
                batches := int(np.minimum(count, self.most).sum()) // batch_size):
            self.most = batches  # leaving captions out may have cost a batch
        super().__init__(int(np.minimum(count, self.most).sum()), batch_size, seed, rank,
                         world_size, drop_last=True)

    def epoch_order(self):
        """Positions of captions, (batches, B)."""
        stream = sample_seed(self.seed, self.epoch, -1)
        stream = np.random.RandomState([stream & 0xFFFFFFFF, stream >> 32])  # frozen for ever
        n, batches, size = len(self.count), len(self), self.batch_size
        if not self.every:
            draw = sample_seed(self.seed, self.epoch, np.arange(n, dtype=np.uint64))
            pick = (draw % self.count.astype(np.uint64)).astype(np.int64)
            chosen = stream.permutation(self.order[self.start + pick])
            return chosen[:batches * size].reshape(batches, size)
        # Write the captions image by image into a table with a row for each place in the batch and
        # a column for each batch. An image lies in one row or runs over into the next. Shuffle each
        # row, then part the few images that meet themselves in a column.
        image = np.repeat(np.arange(n), self.count)                # of each entry of self.order
        mixed = np.lexsort((stream.random_sample(len(image)), image))
        rank = np.arange(len(image)) - self.start[image]
        kept = np.sort(stream.permutation(mixed[rank < self.most])[:batches * size])
        place = stream.permutation(n)
        kept = kept[np.argsort(place[image[kept]], kind="stable")].reshape(size, batches)
        table = np.take_along_axis(kept, stream.random_sample(kept.shape).argsort(axis=1), axis=1)
        over = image[kept[:-1, -1]] == image[kept[1:, 0]]          # runs over, per row
        for row in np.flatnonzero(over) + 1:
            one = image[kept[row, 0]]
            before, mine = image[table[row - 1]] == one, image[table[row]] == one
            clash = np.flatnonzero(before & mine)
            free = stream.permutation(np.flatnonzero(~before & ~mine))[:len(clash)]
            table[row, clash], table[row, free] = table[row, free], table[row, clash]
        return self.order[table.T]

    def __iter__(self):
        epoch = self.epoch
        for share in self.epoch_order()[self.first_batch:]:
            yield [(epoch, c) for c in share[self.rank::self.world_size].tolist()]


class Mixture(Dataset):
    """Several PairSets as one, their captions and images numbered through: what a batch is drawn
    from that replays older data. `[(epoch, c)]` as in a PairSet."""

    reading = None  # as in PairSet; its number is the image's among `paths`

    def __init__(self, parts):
        self.parts, self.transform = list(parts), parts[0].transform
        self.starts = np.cumsum([0, *map(len, parts)]).tolist()        # of captions
        images = np.cumsum([0, *(len(part.paths) for part in parts)]).tolist()
        self.paths = [path for part in parts for path in part.paths]
        self.captions = [caption for part in parts for caption in part.captions]
        self.owner = [i + first for part, first in zip(parts, images) for i in part.owner]

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, key):
        epoch, asked = key
        if self.reading is not None:
            self.reading[0] = self.owner[asked]
        part = int(np.searchsorted(self.starts, asked, side="right")) - 1
        start = self.starts[part]
        image, used, _ = self.parts[part][epoch, asked - start]
        return image, used + start, asked


class MixedBatches(Batches):
    """Yields lists of (epoch, caption of a Mixture): in every global batch sizes[k] pairs of part
    k, each part in the order of its own PairBatches. An epoch is one of the first part; the others
    go round as often as they are short, each pass an epoch of theirs. The same for any rank count.
    """

    def __init__(self, mixture, sizes, seed=0, rank=0, world_size=1, captions="one"):
        self.parts = [PairBatches(part, size, seed + 7919 * k, 0, 1, captions)
                      for k, (part, size) in enumerate(zip(mixture.parts, sizes))]
        self.starts = mixture.starts
        super().__init__(len(self.parts[0]) * sum(sizes), sum(sizes), seed, rank, world_size,
                         drop_last=True)

    def __iter__(self):
        epoch, orders = self.epoch, {}
        for batch in range(self.first_batch, len(self)):
            share = []
            for k, part in enumerate(self.parts):
                turn, place = divmod(epoch * len(self) + batch, len(part))
                if orders.get(k, (None,))[0] != turn:
                    part.set_epoch(turn)
                    orders[k] = turn, part.epoch_order()
                share += [(turn, self.starts[k] + c) for c in orders[k][1][place].tolist()]
            yield share[self.rank::self.world_size]


def collate(items, size, dtype=torch.float32):
    """Items of an ImageSet -> images (B, 3, S, S), labels (B,), indices (B,); B may be 0."""
    if not items:
        return [torch.zeros(0, 3, size, size, dtype=dtype), *torch.zeros(2, 0, dtype=torch.long)]
    return default_collate(items)


WORKER_TIMEOUT = 600  # seconds without a batch after which workers are taken to hang


class Loader(DataLoader):
    """A DataLoader that names what its workers were reading when one of them dies or hangs."""

    def __iter__(self):
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            if not str(error).startswith(("DataLoader worker", "DataLoader timed out")):
                raise
            reading = ", ".join(f"worker {worker} {self.dataset.paths[index]}" for worker, index in
                                enumerate(self.worker_init_fn.args[0].tolist()) if index >= 0)
            raise LostWorker(f"{one_line(error).split('. ')[0]} while reading {reading or '?'}: "
                             f"look at these files and at the memory that is free, or read with "
                             f"--workers 0; the last checkpoint is intact") from error


def tell_reading(places, worker):
    """Run in each new worker: from now on it keeps in `places` the position that it is reading."""
    get_worker_info().dataset.reading = places[worker:worker + 1].numpy()


def make_loader(dataset, batch_size, seed=0, shuffle=True, drop_last=None, rank=0, world_size=1,
                workers=0, **options):
    """DataLoader over an ImageSet with a Preprocess; `loader.batch_sampler` is the Batches.

    `batch_size` is global. Batches depend neither on `workers` nor on how they are started. The
    options go to DataLoader; those that only concern workers are ignored when there are none. A
    worker that dies, or gives nothing for `timeout` seconds, raises LostWorker.
    """
    batches = Batches(len(dataset), batch_size, seed, rank, world_size, shuffle, drop_last)
    return load_batches(dataset, batches, workers, options)


def load_batches(dataset, batches, workers, options):
    if workers:
        places = torch.full((workers,), -1).share_memory_()
        options = {"persistent_workers": True, "timeout": WORKER_TIMEOUT,
                   "worker_init_fn": functools.partial(tell_reading, places), **options}
    else:
        for key in ("persistent_workers", "multiprocessing_context", "prefetch_factor", "timeout"):
            options.pop(key, None)
    view = dataset.transform
    join = functools.partial(collate, size=view.size, dtype=view.dtype)
    return Loader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=join,
                  generator=torch.Generator(), **options)  # else it draws from the global one


class WeightedPairBatches(PairBatches):
    """Batches drawn with replacement from several sources of shards: an image of a source comes
    with a probability proportional to the source's weight, twice in an epoch perhaps, but never
    twice in a batch. Each batch is a function of (seed, epoch, its number)."""

    def __init__(self, pairs, batch_size, seed=0, rank=0, world_size=1, weights=()):
        super().__init__(pairs, batch_size, seed, rank, world_size)
        self.weights = np.asarray(weights, dtype=np.float64) / np.sum(weights)

    def epoch_order(self):
        rows = []
        for batch in range(len(self)):
            stream = sample_seed(self.seed, self.epoch, -2 - batch)
            stream = np.random.RandomState([stream & 0xFFFFFFFF, stream >> 32])
            images = stream.choice(len(self.weights), self.batch_size, False, self.weights)
            pick = (stream.random_sample(len(images)) * self.count[images]).astype(np.int64)
            rows.append(self.order[self.start[images] + pick])
        return np.stack(rows)


def source_weights(pairs, source, weights):
    """The weight of each image, for `data` "a::b" and weights "1::2". Raises DataError."""
    sources, given = os.fspath(source).split("::"), weights.split("::")
    try:
        given = [float(weight) for weight in given]
    except ValueError:
        given = []
    if len(given) != len(sources) or min(given) <= 0 or not math.isfinite(sum(given)):
        raise DataError(f"weights {weights!r} for {len(sources)} sources: expected a positive "
                        f"number for each, joined by ::")
    if not isinstance(pairs.store, TarStore):
        raise DataError(f"weights of sources are for shards, and {pairs.name} is none")
    place = {os.path.abspath(file): i for i, part in enumerate(map(os.path.expanduser, sources))
             for file in (pathlib.Path(part).rglob("*.tar") if os.path.isdir(part) else
                          find_shards([part] if os.path.isfile(part) else part))}
    return [given[place[pairs.store.index[path][0]]] for path in pairs.paths]


def make_pair_loader(pairs, batch_size, seed=0, captions="one", rank=0, world_size=1, workers=0,
                     weights=None, **options):
    """DataLoader for contrastive training over a PairSet with a Preprocess: batches of images
    (B, 3, S, S), used (B,), asked (B,). `loader.batch_sampler` is the PairBatches; `batch_size` and
    `options` as for make_loader."""
    batches = PairBatches(pairs, batch_size, seed, rank, world_size, captions)
    if weights is not None:  # of each image
        batches = WeightedPairBatches(pairs, batch_size, seed, rank, world_size, weights)
    return load_batches(pairs, batches, workers, options)


class FeatureLoader:
    """A loader's batches with the rows of (n, F) features in the place of images. Pairs
    whose row is not a number, the image being lost, are replaced as a PairSet replaces them."""

    def __init__(self, loader, features):
        self.batch_sampler, self.dataset, self.features = (loader.batch_sampler, loader.dataset,
                                                           features)
        self.owner = torch.tensor(loader.dataset.owner)
        self.lost = set(features.isnan().any(dim=1)[self.owner].nonzero()[:, 0].tolist())

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        for batch in self.batch_sampler:
            asked = torch.tensor([c for _, c in batch], dtype=torch.long)
            used = torch.tensor([self.replaced(c) for _, c in batch], dtype=torch.long)
            yield self.features[self.owner[used]], used, asked

    def replaced(self, asked):
        if asked not in self.lost:
            return asked
        starts = getattr(self.dataset, "starts", [0, len(self.dataset)])
        part = int(np.searchsorted(starts, asked, side="right")) - 1
        start, n = starts[part], starts[part + 1] - starts[part]
        return next(c for attempt in range(1, 101) if (c := start + sample_seed(
            0, attempt, asked - start) % n) not in self.lost)


def make_mixed_loader(parts, sizes, seed=0, captions="one", rank=0, world_size=1, workers=0,
                      **options):
    """make_pair_loader over several PairSets: each batch has sizes[k] pairs of parts[k]. The
    loader's data set is the Mixture, whose captions `used` and `asked` count."""
    mixture = Mixture(parts)
    batches = MixedBatches(mixture, sizes, seed, rank, world_size, captions)
    return load_batches(mixture, batches, workers, options)


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


def recall_at_k(image_features, text_features, owner, ks=(1, 5, 10), chunk=1024):
    """Retrieval both ways between unit features (N, D) and (M, D); text j belongs to image
    owner[j], or `owner` has (R, 2) pairs of a text and an image -> dict in % of queries: i2t_r1,
    ..., t2i_r10, mean_recall (of them), rsum (their sum), and i2t_median_rank, t2i_median_rank, 1
    being best. The rules are those of `retrieval_ranks`."""
    ranks = retrieval_ranks(image_features, text_features, owner, chunk, max(ks))
    found = {}
    for way, (_, rank) in ranks.items():
        found |= {f"{way}_r{k}": 100 * float((rank < k).mean()) for k in ks}
    scores = list(found.values())
    return {**found, "mean_recall": sum(scores) / len(scores), "rsum": sum(scores),
            **{f"{way}_median_rank": float(np.median(rank + 1))
               for way, (_, rank) in ranks.items()}}


def retrieval_ranks(image_features, text_features, owner, chunk=1024, least_never=10):
    """The rank of the first right answer to each query, 0 being best, features and `owner` as for
    recall_at_k -> {"i2t": (images that ask, ranks), "t2i": (texts that ask, ranks)}, numpy int64.

    As in the papers, a query counts as found or not: an image if any of its texts is among the
    first k. Rank: the number of strictly higher scores and of equal ones with a smaller index; a
    score that is not a number is never a hit. Scores are fp32, a block of at most `chunk` queries
    and 64 MB at a time. An image without text is in the gallery but asks nothing; a text without
    image asks in vain. These are also the rules of Chinese-CLIP's evaluation programs.
    """
    images, texts = image_features.detach().float(), text_features.detach().float()
    owner = torch.as_tensor(owner, dtype=torch.long).cpu()
    pairs = owner if owner.dim() == 2 else torch.stack((torch.arange(len(owner)), owner), dim=1)
    if len(owner) < 1 or pairs.shape[1:] != (2,) or images.shape[1:] != texts.shape[1:] or (
            owner.dim() == 1 and len(owner) != len(texts)) or pairs.min() < 0 or (
            (pairs.amax(dim=0) >= torch.tensor([len(texts), len(images)])).any()):
        raise DataError(f"images {tuple(images.shape)}, texts {tuple(texts.shape)}, owner "
                        f"{tuple(owner.shape)}: expected (N, D), (M, D), and M numbers below N, or "
                        f"(R, 2) pairs of a text and an image")
    ranks = {"i2t": [], "t2i": []}
    for way, queries, gallery in (("i2t", images, texts), ("t2i", texts, images)):
        asking, wanted = pairs[pairs[:, 0 if way == "t2i" else 1].argsort(stable=True)].T
        asking, wanted = (asking, wanted) if way == "t2i" else (wanted, asking)
        asking = asking.contiguous()
        places = torch.arange(len(gallery), device=images.device)
        some = max(1, min(chunk, (1 << 24) // len(gallery)))
        never = max(len(gallery), least_never)
        for start in range(0, len(queries), some):
            scores = queries[start:start + some] @ gallery.T               # (some, gallery)
            low, high = torch.searchsorted(asking, torch.tensor((start, start + len(scores))))
            right = torch.zeros(scores.shape, dtype=torch.bool)
            right[asking[low:high] - start, wanted[low:high]] = True
            right = right.to(images.device)
            valid = right & ~scores.isnan()
            best = scores.masked_fill(~valid, -math.inf).amax(dim=1, keepdim=True)
            first = torch.where(valid & (scores == best), places, len(gallery)).amin(dim=1)
            ahead = (scores > best) | (scores == best) & (places < first[:, None])
            rank = torch.where(first < len(gallery), ahead.sum(dim=1), never)
            asks = torch.ones(len(rank), dtype=torch.bool) if way == "t2i" else right.any(dim=1)
            ranks[way].append(torch.stack([start + asks.nonzero()[:, 0].cpu(), rank[asks].cpu()]))
    return {way: tuple(torch.cat(parts, dim=1).numpy()) for way, parts in ranks.items()}


RECALLS = ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")


def hit_table(ranks, relevant, images):
    """What `retrieval_ranks` found, by image: (n, 8) float64 with, for image to text and then for
    text to image, how many queries and how many found within 1, 5 and 10. A text counts with its
    first right image, as they are not independent; a text without any is a row of its own.
    relevant: (R, 2) pairs of a text and an image."""
    asking, rank = ranks["t2i"]
    first = np.full(asking.max(initial=-1) + 1, images)
    np.minimum.at(first, relevant[:, 0].numpy(), relevant[:, 1].numpy())
    alone = first >= images
    first[alone] = images + np.arange(alone.sum())
    table = np.zeros((images + int(alone.sum()), 8))
    for column, (rows, rank) in ((0, ranks["i2t"]), (4, (first[asking], rank))):
        for k, hit in enumerate((np.ones(len(rank), bool), rank < 1, rank < 5, rank < 10)):
            np.add.at(table[:, column + k], rows, hit)
    return table


def recalls(sums):
    """Sums over rows of a hit_table (..., 8) -> {RECALLS, mean_recall, r1: the mean of both
    directions' R@1}, in %, each (...,)."""
    sums = np.asarray(sums, dtype=np.float64)
    found = {f"{way}_r{k}": 100 * sums[..., column + i] / np.maximum(sums[..., column], 1)
             for way, column in (("i2t", 0), ("t2i", 4)) for i, k in enumerate((1, 5, 10), 1)}
    found["mean_recall"] = sum(found.values()) / 6
    found["r1"] = (found["i2t_r1"] + found["t2i_r1"]) / 2
    return found if sums.ndim > 1 else {key: float(value) for key, value in found.items()}


def bootstrap(table, draws=1000, seed=0):
    """`recalls` under `draws` resamplings of a hit_table's rows, images that is (Efron 1979) ->
    dict of arrays (draws,). Tables of one test set are resampled alike, so that the difference of
    two arrays is that of two models on the same images."""
    stream, sums = np.random.RandomState(seed), []
    for _ in range(draws):
        sums.append(np.bincount(stream.randint(len(table), size=len(table)),
                                minlength=len(table)) @ table)
    return recalls(np.stack(sums))


def transfer(scores, own):
    """What a sequence of stages did to every test set (Lopez-Paz and Ranzato 2017).

    scores: a dict {set: score} before any stage, then one after each; own: the set of each stage ->
    forgetting          [{set: best score so far - score now}] for each row
    backward_transfer   mean over the stages but the last of (score at the end - just after it)
    forward_transfer    mean over the stages but the first of (score just before it - at the start)
    None where there is no such stage."""
    forgetting = [{name: max(row[name] for row in scores[:k + 1]) - scores[k][name]
                   for name in scores[0]} for k in range(len(scores))]
    back = [scores[-1][name] - scores[k][name] for k, name in enumerate(own[:-1], 1)]
    ahead = [scores[k][name] - scores[0][name] for k, name in enumerate(own[1:], 1)]
    return {"forgetting": forgetting,
            "backward_transfer": sum(back) / len(back) if back else None,
            "forward_transfer": sum(ahead) / len(ahead) if ahead else None}


def batch_losses(image, text, owner, scale, size=64):
    """Mean over rows of the InfoNCE of batches of `size` captions in the order of the file, and
    its floor: rows of one image are each other's negatives there, so even a perfect model has
    ln(copies of the image in the batch). As run_clip.py evaluates."""
    loss = floor = 0.0
    for some in torch.arange(len(text)).split(size):
        z = scale * image[owner[some]] @ text[some].T
        label = torch.arange(len(some))
        loss += len(some) * float(F.cross_entropy(z, label) + F.cross_entropy(z.T, label)) / 2
        copies = (owner[some][:, None] == owner[some]).sum(dim=1)
        floor += float(copies.to(torch.float64).log().sum())
    return loss / len(text), floor / len(text)


def row_error(image, text, owner, k=5):
    """% of captions whose own row is not among the first k when the gallery has a row per caption,
    so that every image stands there with as many equal copies as it has captions. As the simple
    CLIP evaluates; with k copies of the best image in front it is 100 - R@1 of text to image."""
    copies = torch.bincount(owner, minlength=len(image)).float()
    earlier = torch.zeros(len(owner))  # captions of the same image that stand before
    order = owner.argsort(stable=True)
    earlier[order] = torch.arange(len(owner)) - (copies.cumsum(0) - copies)[owner[order]]
    missed = 0
    for some in torch.arange(len(text)).split(1024):
        scores = text[some] @ image.T
        own = scores.gather(1, owner[some][:, None])
        ahead = ((scores > own) * copies).sum(dim=1) + earlier[some]
        missed += int((ahead >= k).sum())
    return 100 * missed / len(text)


def top_k(queries, gallery, k=10, chunk=1024):
    """The k best of `gallery` (N, D) for each of `queries` (Q, D), best first -> scores (Q, k) in
    fp32 and places (Q, k) in the gallery, k at most N. Of equal scores the smaller place is first,
    as after a stable sort; one that is not a number comes last. At most `chunk` queries and 64 MB
    of scores at a time."""
    queries, gallery = queries.detach().float(), gallery.detach().float()
    if not len(gallery) or queries.shape[1:] != gallery.shape[1:] or k < 1:
        raise DataError(f"queries {tuple(queries.shape)}, gallery {tuple(gallery.shape)}, k {k}: "
                        f"expected (Q, D) and (N, D) with N > 0, and 1 or more")
    k, found = min(k, len(gallery)), []
    some = max(1, min(chunk, (1 << 24) // len(gallery)))
    for start in range(0, len(queries), some):
        scores = queries[start:start + some] @ gallery.T                   # (some, N)
        scores.masked_fill_(scores.isnan(), -math.inf)
        best, places = scores.topk(min(k + 1, len(gallery)), dim=1)
        tied = (best[:, 1:] == best[:, :-1]).any(dim=1).nonzero()[:, 0]
        best, places = best[:, :k].contiguous(), places[:, :k].contiguous()
        if len(tied):  # topk takes any of several equal ones
            ordered = scores[tied].sort(dim=1, descending=True, stable=True)
            best[tied], places[tied] = ordered[0][:, :k], ordered[1][:, :k]
        found.append((best, places))
    if not found:
        return queries.new_zeros(0, k), torch.zeros(0, k, dtype=torch.long, device=queries.device)
    return tuple(torch.cat(parts) for parts in zip(*found))


def cached_features(folder, identity, compute, ids=None):
    """The features (N, D) of `compute()`, kept in `folder` -> (array mapped into memory, whether it
    was there already).

    identity: plain values that decide every bit of them: the digest of the tower, the fingerprint
    of the data, how pixels or tokens were made, the precision. Another identity is another file.
    ids: what the rows are, kept beside them. A file whose checksum is wrong is made again.
    """
    folder = pathlib.Path(folder)
    identity = json.loads(json.dumps({"identity": identity, "ids": ids}))
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    file, said = folder / f"{key}.npy", folder / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(said.read_text("utf-8"))
        found = np.load(file, mmap_mode="r", allow_pickle=False)
        if kept["identity"] == identity["identity"] and kept["crc32"] == zlib.crc32(
                np.ascontiguousarray(found).data):
            return found, True
    features = np.ascontiguousarray(compute())
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(identity | {"shape": features.shape, "crc32": zlib.crc32(features.data)})
    buffer = io.BytesIO()
    np.save(buffer, features, allow_pickle=False)
    for path, content in ((file, buffer.getbuffer()), (said, text.encode())):
        temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
        with open(temporary, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    return np.load(file, mmap_mode="r", allow_pickle=False), False


def save_embeddings(folder, image, text, about):
    """Features as clip-retrieval lays them out: img_emb/img_emb_0.npy, text_emb/text_emb_0.npy and
    metadata/metadata_0.jsonl with a dict per image."""
    folder = pathlib.Path(folder)
    for name, rows in (("img_emb", image), ("text_emb", text)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        np.save(folder / name / f"{name}_0.npy", rows)
    (folder / "metadata").mkdir(exist_ok=True)
    (folder / "metadata" / "metadata_0.jsonl").write_text("".join(
        json.dumps(row, ensure_ascii=False) + "\n" for row in about), "utf-8", "backslashreplace")


SIDES = re.compile(r"[左右]|\b(?:left|right)\b", re.IGNORECASE)
COLOURS = re.compile(r"[红橙黄绿蓝紫黑白灰粉棕]|\b(?:red|orange|yellow|green|blue|purple|black|"
                     r"white|gr[ae]y|pink|brown)\b", re.IGNORECASE)
TAGGED = re.compile(r"(?:^|\s)\S+[:/][a-z]{1,3}(?=\s|$)")  # a word with its part of speech


def caption_notes(captions, statistics=None, context_length=None, flips=False, hues=False,
                  diagonal=True):
    """What is doubtful about captions as a training set, a sentence each.

    statistics: `tokenizer.statistics(captions, context_length)`, for the shares that are cut and
    unknown. flips, hues: whether the augmentation mirrors images or changes their colours.
    diagonal: whether the loss takes equal captions for negatives.
    """
    n, notes = len(captions), []

    def share(count, what):
        if count:
            notes.append(f"{count:,} of {n:,} captions ({100 * count / n:.1f} %) {what}")
    if statistics:
        share(statistics["truncated"], f"are longer than the {context_length} tokens that are read "
              f"(the longest has {statistics['longest']}); the rest is cut off")
        unknown, tokens = statistics["unknown"], max(1, statistics["tokens"])
        if unknown:
            notes.append(f"{unknown:,} of {tokens:,} tokens ({100 * unknown / tokens:.2f} %) are "
                         f"unknown to the vocabulary")
    if flips:
        share(sum(map(bool, map(SIDES.search, captions))),
              "name left or right (左, 右), which is wrong after a flip; augment without flips")
    if hues:
        share(sum(map(bool, map(COLOURS.search, captions))),
              "name colours, which hue changes and inversions make wrong; augment without them")
    tagged = sum(len(TAGGED.findall(caption)) > 1 for caption in captions)
    if tagged > n // 10:
        share(tagged, "carry part-of-speech tags (词:n); take the file without them")
    different = len(set(captions))
    if n and different < n and diagonal:
        repeated = n - different
        share(repeated, "repeat another; as negatives they contradict each other, so give them "
                        "targets by text (multi-positive loss) or mask them")
    return notes


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
            if listing.store_of(split).has(path):
                if path not in chosen:
                    continue
                kinds, signature = examine(listing.store_of(split), path)
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


class PairRows(Listing):
    """A PairListing as the doctor looks at it: images without classes."""

    def __init__(self, pairs):
        rows = {split: [(path, 0) for path in dict.fromkeys(path for path, _ in entries)]
                for split, entries in pairs.rows.items()}
        if pairs.rows["test"] == pairs.rows["val"]:
            rows["test"] = rows["val"]
        captions = list(dict.fromkeys(row for entries in pairs.rows.values() for row in entries))
        super().__init__(pairs.name, pairs.root, None, rows, [], notes=pairs.notes + caption_notes(
            [text for _, text in captions], flips=True), captions=captions)
        self.pairs, self.store_of = pairs, pairs.store_of

    def open(self, split, transform=None):
        pairs = PairSet(self.pairs, split, transform)
        if split != "train":
            self.notes += [f"{split}: {note}" for note in pairs.retrieval().notes]
        return pairs


def find_any_listing(text, data_dir, layout, faults):
    """The Listing of classes or of pairs that lies there: pairs first where their files show it."""
    path = pathlib.Path(os.path.expandvars(os.path.expanduser(text)))
    with contextlib.suppress(DataError):
        if path.exists() and find_layout(path, "auto")[0] not in ("table", "texts", "zip",
                                                                       "classes"):
            return PairRows(list_pairs(text, data_dir))
    try:
        return find_listing(text, data_dir, layout, faults=faults)
    except DataError as error:
        with contextlib.suppress(DataError):
            return PairRows(list_pairs(text, data_dir))
        raise error


def check_data(text, data_dir="data", layout="coop", limit=None):
    """All that is worth knowing before training, as a dict for JSON; "usable" is False if training
    would refuse the data. Keeps half a kilobyte per image; `limit` decodes that many, drawn by a
    fixed permutation. Raises DataError if nothing can be listed."""
    if limit is not None and limit < 1:
        raise DataError(f"limit {limit}: expected 1 image or more")
    start, faults, found = time.monotonic(), [], {}
    listing = find_any_listing(text, data_dir, layout, faults)

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
            "classes": len(listing.classnames), "captions": len(listing.captions),
            "images": len(paths), "examined": examined,
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
    what.add_argument("--make-shards", metavar="NAME", help="write image-caption pairs, by name "
                      "or path, as WebDataset tars into the folder --out")
    parser.add_argument("--out", default="shards", help="folder of the tars (default shards)")
    parser.add_argument("--per-shard", type=int, default=1000, metavar="N",
                        help="images in a tar (default 1000)")
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
    lines = [f"{report['root']}: {sizes} images " + (
                 f"in {report['classes']:,} classes" if report["classes"] else
                 f"with {report['captions']:,} captions"),
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


def make_shards(name, data_dir, out, per_shard):
    """Write every split of a pair set as WebDataset shards `out`/<split>-000000.tar, with the image
    files as they are -> lines that tell what was written. Raises DataError."""
    out = pathlib.Path(out)
    if per_shard < 1 or any(out.glob("*.tar")):
        raise DataError(f"--per-shard {per_shard}, --out {out}: expected 1 or more, and a folder "
                        f"without shards")
    out.mkdir(parents=True, exist_ok=True)
    said, listing = [], list_pairs(name, data_dir)
    for split, rows in listing.rows.items():
        if not rows or split == "test" and rows == listing.rows["val"]:
            continue
        pairs = PairSet(listing, split)
        pairs.check_files()
        said += pairs.notes[-1:]
        for shard, start in enumerate(range(0, len(pairs.paths), per_shard)):
            final = out / f"{split}-{shard:06d}.tar"
            with tarfile.open(f"{final}.part", "w") as tar:
                for i in range(start, min(start + per_shard, len(pairs.paths))):
                    add_sample(tar, pairs, i)
            os.replace(f"{final}.part", final)
    return said


def add_sample(tar, pairs, i):
    """<key>.jpg, .txt with the first caption, which every reader knows, and .json with all."""
    kind = os.path.splitext(pairs.paths[i])[1].lower().lstrip(".")
    try:
        content, texts = pairs.store.read(pairs.paths[i]), pairs.texts_of(i)
        if kind not in TAR_IMAGES:
            buffer, kind = io.BytesIO(), "png"
            pairs.store.image(pairs.paths[i]).save(buffer, "png")
            content = buffer.getvalue()
    except UnreadableImage as error:
        print(f"note: left out: {error}", file=sys.stderr)
        return
    listed = json.dumps({"path": pairs.paths[i], "captions": texts}, ensure_ascii=False)
    for suffix, data in ((kind, content), ("txt", texts[0].encode()), ("json", listed.encode())):
        info = tarfile.TarInfo(f"{i:08d}.{suffix}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def main(argv=None):
    """Returns the exit code: 0, or 2 after one line on stderr or a report that says why."""
    args = get_args(argv)
    try:
        if args.check is not None:
            return print_check(args)
        if args.make_shards is not None:
            print(*make_shards(args.make_shards, args.data_dir, args.out, args.per_shard), sep="\n")
            count = len(list(pathlib.Path(args.out).glob("*.tar")))
            print(f"wrote {count} shards into {args.out}; train with --data {args.out}")
            return 0
        print_few_shot(args)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
