"""From files to batches: what labelled images and image-caption pairs share.

    image = read_image("cat.jpg")                        # upright RGB, or UnreadableImage
    pixels = Preprocess(224)(image)                      # uint8 (3, 224, 224), as torchvision's
    pixels = normalise(pixels[None])                     # float32 (1, 3, 224, 224), on any device

Everything random is a function of plain numbers: the order of an epoch of (seed, epoch), the crop
of an image of (seed, epoch, index). So a run is the same for any number of workers and processes,
and goes on in mid-epoch from two integers. Files are never trusted: nothing is unpacked.
"""
import base64
import contextlib
import copy
import dataclasses
import functools
import glob
import hashlib
import importlib
import io
import json
import os
import pathlib
import re
import signal
import warnings
import zipfile

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, default_collate, Sampler

from files import mistaken, one_line


class DataError(ValueError):
    """Something the user can fix, said in one line; scripts leave with `exit_code`."""
    exit_code = 2


class UnreadableImage(DataError):
    """One image is missing, damaged, not an image or too large; the message names it."""


class LostWorker(DataError):
    """A process that reads images died or hangs."""
    exit_code = 3


# -----------------------------------------------------------------------------
# Pixels: from any file to RGB, from RGB to what the image tower takes

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 178_956_970     # where Pillow itself gives up: 0.5 GB once decoded to RGB
MAX_FILE_BYTES = 1 << 29     # of an image, or of anything in a zip, whose header may claim anything
LONGEST_STRIP = 64           # a strip of 1 x 5000 pixels would be resized to a gigabyte
EXTRAS = {"colour": lambda transforms: transforms.ColorJitter(0.2, 0.2, 0.2),
          "randaugment": lambda transforms: transforms.RandAugment(num_ops=2, magnitude=9)}


def to_rgb(image):
    """PIL image of any mode -> RGB, 8 bits; alpha is dropped, as by CoOp's loader. 16-bit grey is
    scaled, where Pillow gives white. ValueError if it is not known which number is white."""
    inverted = image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(262) == 0
    if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM") or inverted:
        raise ValueError("more than 8 bits, and it is not known which is white; save it as PNG")
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        if 0 < grey.max() < 4096:
            raise ValueError(f"the brightest of its 16-bit pixels is {grey.max()} of 65535; scale "
                             f"it, or save it with 8 bits")
        grey = (grey + 128) // 257  # rounded
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA", "La", "RGBa"):  # RGB would not understand the alpha of a palette
        image = image.convert("RGBA" if image.mode != "La" else "LA")
    return image if image.mode == "RGB" else image.convert("RGB")


def read_image(source, name=None):
    """Path or binary file -> upright RGB image. Raises UnreadableImage, whatever is wrong with it.
    The EXIF orientation is applied (CoOp ignores it). An animation gives its first frame."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd tags and near bombs: the checks here decide
            with Image.open(source) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ValueError(f"{image.width}x{image.height} pixels are too many")
                if image.format in ("EPS", "WMF"):  # Pillow has other programs read these
                    raise ValueError(f"{image.format} is not read; save it as PNG")
                image.load()
                with contextlib.suppress(Exception):  # damaged tags around sound pixels
                    ImageOps.exif_transpose(image, in_place=True)
                return to_rgb(image)
    except Exception as error:  # Pillow's readers raise ten kinds of exception on damaged files
        why = re.sub(r" <_io\S+ object at \S+>", "", one_line(error))
        if isinstance(source, io.BytesIO) and b"<svg" not in source.getvalue():
            why = mistaken(source) or why
        raise UnreadableImage(f"{name or source}: no readable image ({why})") from error


def sample_seed(seed, epoch, index):
    """Three integers (or arrays of uint64) -> a seed, mixed well (splitmix64) in its low 32 bits
    too, all that torch's CPU generator keeps."""
    state = 0
    for number in (seed, epoch, index):
        state = (state + number + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ state >> 27) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


class Preprocess:
    """PIL image, or uint8 (H, W, 3) array -> uint8 (3, size, size); `normalise` finishes a batch.

    Evaluation: the short side to `size`, then the centre, or with resize="squash" the whole image;
    the pixels of torchvision's Resize + CenterCrop, bit for bit. Training, as CoOp's: a random
    resized crop of `scale` times the area (None: no crop) and, with `flip`, a flip: torchvision's
    under torch.manual_seed(sample_seed(seed, epoch, index)). Then `augment`, some of EXTRAS
    (RandAugment: Cubuk et al. 2020). No draw depends on `size`: a student and a teacher see the
    same view. DataError where torchvision does not import."""

    def __init__(self, size, train=False, seed=0, scale=(0.08, 1.0), flip=True, resize="shortest",
                 interpolation="bicubic", augment=()):
        self.size, self.train, self.seed, self.scale, self.flip = size, train, seed, scale, flip
        self.squash = {"shortest": False, "squash": True}[resize]
        self.filter = getattr(Image.Resampling, interpolation.upper())
        if not set(augment) <= set(EXTRAS):
            raise DataError(f"augment {list(augment)}: expected some of {', '.join(EXTRAS)}")
        transforms = import_torchvision("transforms") if train else None  # once, before workers
        self.extras = [EXTRAS[name](transforms) for name in augment if train]

    @classmethod
    def of(cls, model, train=False, **options):
        """The transform that a CLIP was trained for: its size, resize mode and interpolation."""
        return cls(model.config.image_size, train, resize=model.image_resize,
                   interpolation=model.image_interpolation, **options)

    def __call__(self, image, epoch=0, index=0):
        image = to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(image))
        image = self.draw(image, epoch, index) if self.train else self.fit(image, self.squash)
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())

    def draw(self, image, epoch, index):
        """A random view of the image."""
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the CPU's generator
            torch.default_generator.manual_seed(sample_seed(self.seed, epoch, index))
            if self.scale:
                crop = import_torchvision("transforms").RandomResizedCrop
                top, left, height, width = crop.get_params(image, self.scale, (3 / 4, 4 / 3))
                image = image.crop((left, top, left + width, top + height))
            image = self.fit(image, whole=self.scale or self.squash)
            if self.flip and torch.rand(1).item() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            torch.default_generator.manual_seed(sample_seed(self.seed + 1, epoch, index))
            for extra in self.extras:
                image = extra(image)
        return image

    def fit(self, image, whole):
        """The whole image, or its middle, at size x size."""
        size, (width, height) = self.size, image.size
        if whole:
            return image.resize((size, size), self.filter)
        short, long = sorted((width, height))
        spare = max(0, (long - LONGEST_STRIP * short) // 2)  # cut off both ends of a strip
        if spare:
            x, y = (spare, 0) if width > height else (0, spare)
            image = image.crop((x, y, width - x, height - y))
        long = int(size * (long - 2 * spare) / short)  # torchvision rounds down here, to even below
        image = image.resize((size, long) if width <= height else (long, size), self.filter)
        left, top = round((image.width - size) / 2), round((image.height - size) / 2)
        return image.crop((left, top, left + size, top + size))


def import_torchvision(part):
    try:
        return importlib.import_module(f"torchvision.{part}")
    except (ImportError, RuntimeError, OSError) as error:  # built for another torch
        raise DataError(f"torchvision.{part} is needed here and does not import ({one_line(error)})"
                        f"; install the build for torch {torch.__version__}") from None


def normalise(images, mean=CLIP_MEAN, std=CLIP_STD):
    """Pixels 0 .. 255, uint8 or float (B, 3, H, W) on any device -> a new float32 tensor there,
    (images / 255 - mean) / std; the bits of torchvision's ToTensor + Normalize on a CPU."""
    images = images.to(torch.float32, copy=True).div_(255)
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):  # a tensor would be an upload
        images[:, channel].sub_(m).div_(s)
    return images


# -----------------------------------------------------------------------------
# Where images lie: in a folder, a zip, or inside larger files

IMAGE_SUFFIXES = (  # of what Pillow reads by itself
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".dib", ".gif", ".webp",
    ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".jpx", ".tga",
    ".pcx", ".dds", ".qoi", ".sgi", ".xbm", ".xpm", ".ico", ".icns", ".psd")


def leaves_folder(name):
    """Whether a relative name would point outside the folder (or archive) it belongs to."""
    return ".." in re.split(r"[/\\]", name) or name[:1] in ("/", "\\") or name[1:2] == ":"


def is_litter(name):
    return name.startswith(".") or name in (
        "__MACOSX", "Thumbs.db", "desktop.ini", "@eaDir", "lost+found", "$RECYCLE.BIN")


def is_image(name):
    return name.lower().endswith(IMAGE_SUFFIXES)


def walk(folder):
    """Every posix path below `folder`; directories end in "/" and are entered once, so a loop of
    links ends. Raises DataError."""
    def refuse(error):
        raise DataError(f"cannot list {error.filename} ({error.strerror}); make it readable")
    seen = set()
    for at, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        base = "" if at == os.fspath(folder) else f"{os.path.relpath(at, folder)}/"
        if os.path.realpath(at) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(at))
        folders[:] = [name for name in folders if not is_litter(name)]
        yield from (f"{base}{name}/".replace(os.sep, "/") for name in folders)
        yield from (f"{base}{name}".replace(os.sep, "/") for name in files if not is_litter(name))


@functools.lru_cache(maxsize=None)
def open_zip(path, pid, changed):
    """Each process opens a zip for itself: two would share its read position. Raises DataError."""
    try:
        archive = zipfile.ZipFile(path)
        for info in archive.infolist():  # most programs write UTF-8 even where no flag says so
            if not info.flag_bits & 0x800 and info.filename == info.orig_filename:
                info.filename = info.filename.encode("cp437").decode("utf-8")
            info.filename = info.filename.replace("\\", "/")  # of older Windows zippers
        archive.NameToInfo = {info.filename: info for info in archive.infolist()}
        if bad := list(filter(leaves_folder, archive.namelist())):
            raise zipfile.BadZipFile(f"its member {bad[0]!r} lies outside of it")
        return archive
    except (OSError, zipfile.BadZipFile, UnicodeError) as error:
        raise DataError(f"{path} is no sound zip ({error}); fetch it again, or zip the folder with "
                        f"relative names in UTF-8") from None


class ImageStore:
    """A folder of images, or a zip read in place, never unpacked. `prefix` goes before each path.
    Other stores have other `names`, `has` and `content`. Picklable."""

    def __init__(self, path, prefix=""):
        self.path, self.prefix = os.fspath(path), prefix
        self.zipped = os.path.isfile(self.path)

    def __str__(self):
        return os.path.join(self.path, self.prefix).rstrip(os.sep)

    def archive(self):
        return open_zip(self.path, os.getpid(), os.stat(self.path).st_mtime_ns)

    def names(self):
        """Sorted paths of everything inside, the prefix included; directories end in "/"."""
        if not self.zipped:
            return sorted(walk(self.path))
        return sorted(name for name in self.archive().namelist()
                      if not any(map(is_litter, name.rstrip("/").split("/"))))

    def has(self, path):
        if not self.zipped:
            return os.path.isfile(os.path.join(self.path, self.prefix, path))
        return self.prefix + path in self.archive().NameToInfo

    def stamp(self, path):
        """The size of a file, and its checksum or time, which change with its bytes."""
        if self.zipped:
            info = self.archive().getinfo(self.prefix + path)
            return info.file_size, info.CRC
        found = os.stat(os.path.join(self.path, self.prefix, path))
        return found.st_size, found.st_mtime_ns

    def content(self, path):
        size = self.stamp(path)[0]
        if size > MAX_FILE_BYTES and (self.zipped or is_image(path)):
            raise ValueError(f"{size:,} bytes are too many")
        if self.zipped:
            return self.archive().read(self.prefix + path)
        return pathlib.Path(self.path, self.prefix, path).read_bytes()

    def read(self, path):
        """The bytes of one file, of a zip's with its CRC checked. Raises UnreadableImage."""
        try:
            return self.content(path)
        except Exception as error:  # zlib.error, BadZipFile, an encrypted member, a disk fault ...
            raise UnreadableImage(f"{self}/{path}: cannot be read ({one_line(error)})") from error

    def image(self, path):
        return read_image(io.BytesIO(self.read(path)), f"{self}/{path}")


class SpanStore(ImageStore):
    """Images inside larger files, read in place: `index` maps a path to (file, offset, bytes), of
    the image or, if `coded`, of its base64 text in either alphabet."""

    def __init__(self, path, index, coded=False):
        super().__init__(path)
        self.index, self.coded = index, coded

    def names(self):
        return sorted(self.index)

    def has(self, path):
        return path in self.index

    def stamp(self, path):
        file, offset, size = self.index[path]
        return size, offset, str(file), os.stat(file).st_mtime_ns

    def raw(self, path):
        file, offset, size = self.index[path]
        with open(file, "rb") as source:
            source.seek(offset)
            return source.read(size)  # less, if the file was cut: no image, or no base64 then

    def content(self, path):
        if not self.coded:
            return self.raw(path)
        text = self.raw(path).strip().translate(bytes.maketrans(b"-_", b"+/"))
        return base64.b64decode(text, validate=True)


SPLIT_WORDS = {word: split for split, words in {
    "train": "train training restval",  # of COCO, in Karpathy's split: as everyone trains
    "val": "val valid validation dev eval publictest",  # of FER2013, as privatetest
    "test": "test testing privatetest"}.items() for word in words.split()}
NO_PHOTO = re.compile(r"mask|annot|label|segment|depth", re.IGNORECASE)
PLAIN_FOLDER = re.compile(r"(jpe?g|image|img|photo|picture)+s?", re.IGNORECASE)


def split_word(name):
    """The name of a folder, or a cell -> "train", "val", "test", or None if it names no split."""
    return SPLIT_WORDS.get(re.sub(r"[ _-]?set$", "", name.strip().lower()))


@functools.lru_cache
def split_of(name):
    """The last of train, val, test, ... among the words of a file's name, else "all"."""
    return next(filter(None, map(split_word, reversed(re.findall("[a-z]+", name.lower())))), "all")


def folder_splits(paths):
    """{path: its split} if the first folders that differ name splits, train among them, else {}."""
    folders = [path.split("/")[:-1] for path in paths]
    level = len(os.path.commonprefix(folders))
    found = [split_of("".join(names[level:level + 1])) for names in folders]
    return dict(zip(paths, found)) if {"train"} < {*found} <= {*SPLITS} else {}


def places(root, *first):
    """Where the images of a folder or zip may lie, the likely places first, in lists of equally
    likely ones: `first`, itself, its folders, its zips (as COCO publishes them), their folders."""
    yield from ([ImageStore(place)] for place in (*first, root))
    yield [ImageStore(root, folder) for folder in folders_in(root, 1)]
    zips = [file for file in sorted(pathlib.Path(root).glob("*.zip")) if not is_litter(file.name)]
    yield [store for file in zips for stores in places(file) for store in stores]
    yield [ImageStore(root, folder) for folder in folders_in(root, 2)]


def folders_in(root, depth):
    """The folders at a depth of a folder or zip, as prefixes like "data/images/", sorted."""
    if not os.path.isfile(root):
        return sorted(glob.glob("*/" * depth, root_dir=root))
    names = [name.split("/") for name in ImageStore(root).names()]
    return sorted({"/".join(name[:depth]) + "/" for name in names if len(name) > depth})


def locate(root, paths, *first, split="all"):
    """Of `places` the nearest that holds all of about 200 of the paths, else most of them. Of equal
    ones that named like the `split` of the paths, or images, and train before train_224. DataError
    if nothing tells which."""
    sample, merits, inside = paths[::len(paths) // 200 + 1], {}, {}
    for level, stores in enumerate(places(root, *first)):
        for store in stores:
            inside[store] = os.path.relpath(str(store), root) if level > len(first) else ""
            folder = os.path.basename(inside[store])
            plain = bool(PLAIN_FOLDER.fullmatch(folder)) - bool(NO_PHOTO.search(folder))
            named = split != "all" and {split: 1, "all": 0}.get(split_of(inside[store]), -1)
            having = sum(map(store.has, sample))  # `refuse_losses` bears one lost, or 1 %
            whole = min(len(sample), having + max(1, len(sample) // 100)) if having else 0
            merits[store] = whole, named, plain, having, -level
        whole, named, _, having, _ = best = max(merits.values())
        if having == len(sample) and named >= 0:
            break
    found = [store for store in merits if merits[store] == best]
    shortest = min(found, key=lambda store: len(inside[store]))
    clear = all(grown_from(inside[store], inside[shortest]) for store in found)
    if whole == len(sample) and not clear:
        raise DataError(f"{' and '.join(map(str, found[:4]))} hold images of the same names, "
                        f"such as {sample[0]}; write the folder into the listed paths, or keep one")
    return shortest


def grown_from(long, short):
    """Whether the first parts in which two paths differ begin alike: images_224/a, images/a."""
    parts = zip(long.split(os.sep), short.split(os.sep))
    return next((a.startswith(b) for a, b in parts if a != b), long == short)


# -----------------------------------------------------------------------------
# A set of images

SPLITS = ("train", "val", "test")


@dataclasses.dataclass
class Source:
    """What lies somewhere, before a split is chosen.

    rows    {"train", "val", "test", or "all" without splits: [(path, label), ...]}, or of captions
            [(path, caption, query), ...]. Rows of one query are one search text with several
            images; path "" is a text without an image, caption "" an image without a text
    store   where the images lie; None: they are looked for
    lists   {stem of an image's name: its split}, where splits are lists of images
    """
    name: str = ""
    root: str = ""
    store: ImageStore = None
    rows: dict = dataclasses.field(default_factory=dict)
    classnames: list = ()
    notes: list = dataclasses.field(default_factory=list)
    lists: dict = dataclasses.field(default_factory=dict)

    def add(self, split, rows):
        self.rows.setdefault(split, []).extend(rows)

    def part(self, split):
        """The rows of a split. DataError if there are none."""
        if not self.rows.get(split):
            having = [key for key, rows in self.rows.items() if rows]
            raise DataError("; ".join([f"{self.root or self.name}: no {split} images, only the "
                                       f"splits {having}: add some", *self.notes]))
        return self.rows[split]


def note_leaks(rows):
    """{split: [(path, ...)]} -> notes on images of val or test that are trained on, too."""
    tested = {row[0] for row in rows["val"] + rows["test"] if row[0]}
    leaks = tested & {row[0] for row in rows["train"]}
    return [f"{len(leaks):,} images of val or test are in train too by their names, e.g. "
            f"{min(leaks)}: scores on known images flatter"] if leaks else []


class Images(Dataset):
    """Images, each with a label. `set[index]` or `set[(epoch, index)]` -> (image, label, index).

    The image is a PIL image, or what transform(image, epoch, index) makes of it. The epoch is in
    the key, for workers that live on would never see an attribute change. An unreadable image gives
    black and label -1, which scores skip."""
    images = None   # decoded, where they are kept in memory

    def __init__(self, store, paths, labels, transform=None):
        self.store, self.paths, self.labels, self.transform = store, paths, labels, transform
        self.notes = []

    def introduce(self, source, split, lists, what):
        """Take the name of a Source, and say what it holds. lists: all that identifies it."""
        self.name, self.root, self.split = source.name, source.root, split
        self.counts = {key: len({row[0] for row in rows if row[0]})
                       for key, rows in source.rows.items()}
        self.fingerprint = hashlib.sha256(json.dumps(lists, sort_keys=True).encode()).hexdigest()
        sizes = " / ".join(f"{count:,} {key}" for key, count in self.counts.items())
        self.notes = [*source.notes, f"{self.name}: {sizes} images {what} under {self.store}, "
                                     f"split {self.fingerprint[:12]}"]
        self.lost = set()  # names of images that cannot be read, but few enough

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, (tuple, list)) else (0, key)
        label = self.labels[index]
        try:
            image = self.images[index] if self.images else self.store.image(self.paths[index])
        except UnreadableImage:
            if self.transform is None:
                raise
            image, label = Image.new("RGB", (8, 8)), -1
        return (self.transform(image, epoch, index) if self.transform else image), label, index

    def with_transform(self, transform):
        chosen = copy.copy(self)
        chosen.transform = transform
        return chosen

    def check_files(self):
        """Raise DataError unless the images are there, as refuse_losses says. Opens none."""
        lost = [i for i, path in enumerate(self.paths) if not self.store.has(path)]
        self.refuse_losses(lost, "there is no such file")

    def refuse_losses(self, lost, reason, also=""):
        """Raise DataError if the images at positions `lost` are more than max(1, 1 %), or if there
        is `also` something wrong; else note them -> the note, "" if it is an old one."""
        if not lost:
            return ""
        said = (f"{self.name}: {len(lost):,} of {len(self.paths):,} {self.split} images cannot be "
                f"read, e.g. {os.path.join(str(self.store), self.paths[lost[0]])} ({reason})")
        if also or len(lost) > max(1, len(self.paths) // 100) or len(lost) == len(self.paths):
            raise DataError(f"{said}, more than 1 %{also}: put them there, or correct their paths "
                            f"in the list, or take them off it")
        self.lost.update(self.paths[i] for i in lost)
        note = f"{said}: they are left out"
        if note in self.notes:
            return ""
        self.notes.append(note)
        return note


# -----------------------------------------------------------------------------
# Batches

class Batches(Sampler):
    """Yields lists of (epoch, index). Global batch b is perm[b*B : (b+1)*B] with perm a function of
    (seed, epoch); rank r of W takes every W-th from r on (of a short last batch perhaps none).

    drop_last None is Dassl's rule: training drops the remainder of all but a lone short batch."""

    def __init__(self, n, batch_size, seed=0, rank=0, world_size=1, shuffle=True, drop_last=None):
        if batch_size < 1:
            raise DataError(f"batch size {batch_size}: expected 1 or more")
        self.n, self.batch_size, self.seed, self.shuffle = n, batch_size, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.drop_last = shuffle and n >= batch_size if drop_last is None else drop_last
        self.epoch = self.first_batch = 0

    def set_epoch(self, epoch, first_batch=0):
        """The epoch to yield next, and how many of its batches are done already."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self):
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
        nothing = torch.zeros(0, 3, size, size, dtype=torch.uint8)
        return [nothing, *torch.zeros(2, 0, dtype=torch.long)]
    return default_collate(items)


class Loader(DataLoader):
    """A DataLoader over a set with .transform, as `batches` order it; LostWorker if one is lost."""

    def __init__(self, dataset, batches, workers=0, **options):
        if workers:
            options = {"persistent_workers": True, "timeout": 600, "worker_init_fn": ignore_stop,
                       **options}
        super().__init__(dataset, batch_sampler=batches, num_workers=workers,
                         collate_fn=functools.partial(collate, size=dataset.transform.size),
                         generator=torch.Generator(), **options)  # the global one stays as it is

    def __iter__(self):
        try:
            yield from super().__iter__()
        except RuntimeError as error:
            if not str(error).startswith(("DataLoader worker", "DataLoader timed out")):
                raise
            for worker in self._iterator._workers:  # one that hangs does not hear SIGTERM
                with contextlib.suppress(RuntimeError):  # torch raises at its death
                    worker.kill()
                    worker.join()
            raise LostWorker(f"{one_line(error).split('. ')[0]}: look at the memory that is free, "
                             f"or read with --workers 0, which shows the image that does it; "
                             f"what was saved before is intact") from error


def ignore_stop(worker):
    """A stop is often sent to the whole group; the parent needs one more batch before it saves."""
    for name in {"SIGTERM", "SIGHUP"} & {*dir(signal)}:
        signal.signal(getattr(signal, name), signal.SIG_IGN)
