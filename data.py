"""Images in, batches out: transforms, labelled data sets, few-shot lists, loaders.

    train = open_dataset("dtd", "train", data_dir="data")        # CoOp's split, read as it is
    shots = few_shot(train, shots=4, seed=1).preload()           # the published list, decoded once
    loader = make_loader(shots.with_transform(Preprocess(224, train=True, seed=1)), 32, seed=1)
    for images, labels, indices in loader: ...                   # uint8 (B, 3, 224, 224), (B,), (B,)
    images = normalise(images)                                   # float32, on any device

Everything random is a function of plain numbers: the order of an epoch of (seed, epoch), the crop
of an image of (seed, epoch, index), the shots of (seed). So a run is the same for any number of
workers and processes, and goes on from the middle of an epoch with nothing saved but two integers.
Files are never trusted: no pickle, no unpacking, image bombs refused by their header.
"""
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
import lzma
import math
import os
import pathlib
import random
import re
import sys
import unicodedata
import warnings
import zipfile
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, get_worker_info

ASSETS = pathlib.Path(__file__).resolve().parent / "assets"


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
# Images: from any file to RGB, from RGB to what the image tower takes

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_PIXELS = 178_956_970     # where Pillow itself gives up: 0.5 GB once decoded to RGB
MAX_FILE_BYTES = 1 << 29     # of one file inside a zip: its header may claim anything
LONGEST_STRIP = 64           # sides; see Preprocess.plan
RUNS_A_PROGRAM = ("EPS", "WMF")   # Pillow hands these to Ghostscript or to Windows
EXTRAS = ("colour", "randaugment")


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

    The EXIF orientation is applied; CoOp ignores it, so the few photos that carry the tag come out
    turned there. An animation gives its first frame.
    """
    name = name or getattr(source, "name", source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd tags and near bombs: the checks here decide
            with Image.open(source) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UnreadableImage(f"{name}: {image.width}x{image.height} pixels, more than "
                                          f"the {MAX_PIXELS:,} that are read; scale it down")
                if image.format in RUNS_A_PROGRAM:
                    raise UnreadableImage(f"{name}: {image.format} is not read; save it as PNG")
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
    generator keeps. The finaliser is splitmix64's. Also takes arrays of uint64."""
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
    """PIL image, or uint8 (H, W, 3) array -> uint8 (3, size, size); `normalise` finishes a batch.

    Evaluation: the short side to `size`, then the centre, or with resize="squash" the whole image
    to size x size; the pixels of torchvision's Resize + CenterCrop, bit for bit. Training (CoOp's):
    a random resized crop of `scale` times the area (None: no crop) and, with `flip`, a flip:
    torchvision's own under torch.manual_seed(sample_seed(seed, epoch, index)). Then `augment`:

    colour        ColorJitter(0.2, 0.2, 0.2)
    randaugment   two operations of RandAugment (Cubuk et al. 2020) at magnitude 9

    Both are torchvision's; DataError without it. Draws do not depend on `size`: a student and a
    teacher of another size see the same view. dtype torch.float32 also normalises, as CLIP does.
    """

    def __init__(self, size, train=False, seed=0, scale=(0.08, 1.0), flip=True, resize="shortest",
                 interpolation="bicubic", augment=(), dtype=torch.uint8):
        for what, value, known in (("dtype", dtype, (torch.uint8, torch.float32)),
                                   ("resize", resize, ("shortest", "squash")),
                                   ("interpolation", interpolation, ("bicubic", "bilinear"))):
            if value not in known:
                raise DataError(f"{what} {value!r}: expected {' or '.join(map(str, known))}")
        self.size, self.train, self.seed, self.scale, self.flip = size, train, seed, scale, flip
        self.squash, self.dtype = resize == "squash", dtype
        self.filter = getattr(Image.Resampling, interpolation.upper())
        self.extras = extra_transforms(augment) if train else []

    @classmethod
    def of(cls, model, train=False, **options):
        """The transform that a CLIP was trained for: its size, resize mode and interpolation."""
        return cls(model.config.image_size, train, resize=model.image_resize,
                   interpolation=model.image_interpolation, **options)

    def __call__(self, image, epoch=0, index=0):
        image = to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(image))
        box, shape, flip = self.plan(*image.size, epoch, index)
        image = image if box == (0, 0, *image.size) else image.crop(box)
        image = image.resize(shape, self.filter)
        left, top = (round((side - self.size) / 2) for side in shape)
        image = image.crop((left, top, left + self.size, top + self.size))
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.extras:
            with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
                torch.manual_seed(sample_seed(self.seed + 1, epoch, index))
                for extra in self.extras:
                    image = extra(image)
        pixels = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())    # (3, S, S)
        return pixels if self.dtype == torch.uint8 else normalise(pixels[None])[0]

    def plan(self, width, height, epoch, index):
        """What to cut out first (left, top, right, bottom), the (width, height) to resize that to,
        and whether to flip. The centre of the result is taken if it is larger than size x size."""
        size, flip, box = self.size, False, None
        if self.train:
            generator = torch.Generator().manual_seed(sample_seed(self.seed, epoch, index))
            box = crop_box(width, height, generator, self.scale) if self.scale else None
            flip = self.flip and torch.rand(1, generator=generator).item() < 0.5
        if box or self.squash:
            return box or (0, 0, width, height), (size, size), flip
        short, long = sorted((width, height))
        # A strip 1 x 5000 would be resized to a gigabyte; only the middle can reach the crop.
        extra = max(0, (long - LONGEST_STRIP * short) // 2)
        x, y = (extra, 0) if width > height else (0, extra)
        long = int(size * (long - 2 * extra) / short)  # torchvision rounds down here, to even below
        shape = (size, long) if width <= height else (long, size)
        return (x, y, width - x, height - y), shape, flip


def extra_transforms(names):
    """Names out of EXTRAS -> torchvision transforms of a PIL image. Raises DataError."""
    unknown = [name for name in names if name not in EXTRAS]
    if unknown:
        raise DataError(f"augment {unknown[0]!r}: expected some of {', '.join(EXTRAS)}")
    if not names:
        return []
    transforms = import_torchvision(f"augment {names[0]}").transforms
    known = {"colour": lambda: transforms.ColorJitter(0.2, 0.2, 0.2),
             "randaugment": lambda: transforms.RandAugment(num_ops=2, magnitude=9)}
    return [known[name]() for name in names]


def import_torchvision(purpose):
    try:
        import torchvision  # a RuntimeError if it was built for another torch
        return torchvision
    except (ImportError, RuntimeError, OSError) as error:
        raise DataError(f"{purpose} needs torchvision, which does not import ({one_line(error)}); "
                        f"install the build for torch {torch.__version__}") from None


def normalise(images, mean=CLIP_MEAN, std=CLIP_STD):
    """Pixel values 0 .. 255, uint8 or float (B, 3, H, W) on any device -> a new float32 tensor
    there, (images / 255 - mean) / std; the bits of torchvision's ToTensor + Normalize on a CPU."""
    images = images.to(torch.float32, copy=True).div_(255)
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):  # a tensor would be an upload
        images[:, channel].sub_(m).div_(s)
    return images


# -----------------------------------------------------------------------------
# Where images lie: a folder or a zip

IMAGE_SUFFIXES = set("""
    .jpg .jpeg .jpe .jfif .png .apng .bmp .dib .gif .webp .tif .tiff .ppm .pgm .pbm .pnm .avif
    .avifs .jp2 .j2k .jpf .jpx .j2c .jpc .tga .icb .vda .vst .pcx .dds .qoi .sgi .rgb .rgba .bw .xbm
    .xpm .mpo .ico .icns .psd .msp""".split())  # all that Pillow opens by itself


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
        if is_litter(entry.name):
            continue
        try:
            is_folder = entry.is_dir()
        except OSError:  # a link to itself
            is_folder = False
        yield base + entry.name + "/" * is_folder
        if is_folder:
            yield from walk(entry.path, f"{base}{entry.name}/", seen)


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
        return self.prefix + path in self.archive().NameToInfo

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
    places = sorted((ImageStore(home / folder) for home in homes),
                    key=lambda place: not os.path.isdir(place.path))
    for archive in sorted(homes[0].glob("*.zip")):
        places += [ImageStore(archive, prefix) for prefix in (f"{folder}/", "")]
    return next((place for place in places if holds_some(place, paths)), places[0])


def holds_some(store, paths):
    return any(map(store.has, paths[::max(1, len(paths) // 200)]))  # a set may be there in part


def find_path(text, data_dir):
    """A path as typed, or one under `data_dir`, or "demo" -> Path. Raises DataError."""
    if text == "demo":
        return ASSETS / "demo.zip"
    path, data_dir = (pathlib.Path(os.path.expandvars(os.path.expanduser(os.fspath(name))))
                      for name in (text, data_dir))
    found = next((place for place in (path, data_dir / path) if place.exists()), None)
    if found is None:
        raise DataError(f"there is no file or folder {path}, nor {data_dir / path}")
    return found


# -----------------------------------------------------------------------------
# Text files and tables

NO_TEXT = {b"PK": "a zip or an Excel workbook; export the sheet as CSV",
           b"\x1f\x8b": "gzipped; unpack it first", b"PAR1": "Parquet; write it as CSV or JSONL",
           b"\xff\xfe": "UTF-16 text; save it as UTF-8", b"\xfe\xff": "UTF-16 text; save it as UTF-8"}
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
csv.field_size_limit(1 << 24)    # characters; captions of a megabyte exist


def read_text(path, content=None):
    """A text file (or its bytes), with or without a byte-order mark. Raises DataError."""
    try:
        content = pathlib.Path(path).read_bytes() if content is None else content
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); a file was expected") from None
    for magic, kind in NO_TEXT.items():
        if content.startswith(magic):
            raise DataError(f"{path} is {kind}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text (byte {error.start}); open it in an "
                        f"editor and save it as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}, line {line}: a NUL byte, so this is no UTF-8 text; save it so")
    return text


def read_table(path, content=None, join=()):
    """A CSV, TSV, JSONL or JSON table -> columns, [(line, {column: value})].

    The content tells the kind, not the suffix. Columns are stripped and in lower case. Values are
    text as written, of JSON whatever it says; a JSON row may lack columns, another row must have as
    many fields as the header. But with two columns of which the last is in `join`, the delimiters
    that an unquoted row has too many belong to that cell: captions hold commas. Raises DataError
    with the line; a JSON list counts its objects.
    """
    text = read_text(path, content)
    try:
        if text.lstrip()[:1] in ("{", "["):
            return read_json_rows(text)
        return read_delimited(text, join)
    except ValueError as error:
        raise DataError(f"{path}, {error}") from None


def read_json_rows(text):
    """JSONL, or a JSON list of objects, as read_table. ValueError "line N: ..."."""
    if text.lstrip().startswith("["):
        try:
            numbered = list(enumerate(json.loads(text), 1))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"no JSON list: {one_line(error)}") from None
    else:
        numbered = []
        for line, row in enumerate(text.split("\n"), 1):  # U+2028 and its like end no line
            try:
                numbered += [(line, json.loads(row))] if row.strip() else []
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {line}: no JSON: {one_line(error)}") from None
    rows = []
    for line, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(f"line {line}: a {type(row).__name__}, not an object {{...}}")
        rows.append((line, {str(key).strip().lower(): value for key, value in row.items()}))
        if len(rows[-1][1]) < len(row):
            raise ValueError(f"line {line}: two keys of the same name")
    return list(dict.fromkeys(key for _, row in rows for key in row)), rows


def read_delimited(text, join):
    """Comma, semicolon or tab, told by the header, as read_table. ValueError "line N: ..."."""
    lines = re.split(r"\r\n|\n|\r", text)
    header = next(filter(str.strip, lines), "")
    mark = max(",\t;", key=header.count)
    fields = split_tabs(lines) if mark == "\t" else None
    fields = fields or split_quoted(text, mark)
    (_, names), *rows = fields or [(1, [""])]
    columns = [name.strip().lower() for name in names]
    twice = [name for name in columns if name and columns.count(name) > 1]
    if twice:
        raise ValueError(f"line 1: two columns are named {twice[0]!r}")
    joins = mark != "\t" and len(columns) == 2 and columns[1] in join
    table = []
    for line, cells in rows:
        raw = lines[line - 1]
        if joins and len(cells) > 2 and '"' not in raw:
            cells = raw.split(mark, 1)
        if len(cells) != len(columns):
            quotes = ', or put the cell in quotes' if len(cells) > len(columns) else ""
            raise ValueError(f"line {line}: {len(cells)} fields where the header has "
                             f"{len(columns)}; mend the row{quotes}")
        table.append((line, dict(zip(columns, cells, strict=True))))
    return columns, table


def split_tabs(lines):
    """Lines of a TSV -> [(line, cells)], or None if some line has another number of cells.

    Most writers of TSV quote nothing, so a quote is a character; but where every quote in the file
    is part of a well-formed quoted cell, a CSV writer was at work and the quotes are not content.
    """
    rows = [(number, line.split("\t")) for number, line in enumerate(lines, 1) if line.strip()]
    if len({len(cells) for _, cells in rows}) > 1:
        return None
    quoted = re.compile(r'"(?:[^"]|"")*"')
    if any('"' in cell and not quoted.fullmatch(cell) for _, cells in rows for cell in cells):
        return rows
    return [(number, [cell[1:-1].replace('""', '"') if cell[:1] == '"' else cell
                      for cell in cells]) for number, cells in rows]


def split_quoted(text, mark):
    """What a strict CSV reader makes of it -> [(line, cells)]. ValueError "line N: ..."."""
    reader, rows, line = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True), [], 1
    try:
        for cells in reader:
            rows += [(line, cells)] if any(map(str.strip, cells)) else []
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {line}: {error}; quotes must enclose a whole cell, and be doubled "
                         f"inside") from None
    return rows


# -----------------------------------------------------------------------------
# The dataset object

ANY_TEMPLATE = "a photo of a {}."


@dataclasses.dataclass
class Listing:
    """What a source says before a split is chosen. rows: {"train" | "val" | "test": [(path, label)]},
    the paths relative to `store`."""
    name: str
    root: str
    store: ImageStore
    rows: dict
    classnames: list
    templates: list = dataclasses.field(default_factory=lambda: [ANY_TEMPLATE])
    notes: list = dataclasses.field(default_factory=list)

    def open(self, split):
        """One split as an ImageSet. Raises DataError if there is nothing to learn or to score."""
        if len(self.classnames) < 2:
            raise DataError(f"{self.root}: only the class {str(self.classnames)[:80]}; two or more "
                            f"are needed (a folder must be the one that holds the class folders)")
        if not self.rows[split]:
            having = ", ".join(key for key, rows in self.rows.items() if rows)
            raise DataError(f"{self.name} has no {split} split, only {having}; add one, or give "
                            f"the class folders (or rows) without splits to have them cut")
        return ImageSet(self, split)


class ImageSet(Dataset):
    """Labelled images of one split. `set[index]` or `set[(epoch, index)]` -> (image, label, index).

    The image is a tensor if there is a transform, called as transform(image, epoch, index), else a
    PIL image. The pair as key lets the sampler say which epoch it is: workers that live on would
    never see an attribute change. An unreadable image gives black and label -1, which scores skip.

    name, split, root      as opened                     paths       as the split file writes them
    labels                 list of int, 0 .. C-1         classnames  C names, raw
    template, templates    prompts with a {}             counts      images per split as published
    fingerprint            sha256 of the lists of all splits: identifies the data on resume
    notes                  sentences worth telling the user
    """

    def __init__(self, listing, split):
        self.name, self.root, self.split = listing.name, listing.root, split
        self.store, self.templates = listing.store, list(listing.templates)
        self.template = self.templates[0]
        self.paths = [path for path, _ in listing.rows[split]]
        self.labels = [label for _, label in listing.rows[split]]
        self.classnames = list(listing.classnames)
        self.counts = {key: len(rows) for key, rows in listing.rows.items()}
        lists = json.dumps([self.classnames, listing.rows], sort_keys=True)
        self.fingerprint = hashlib.sha256(lists.encode()).hexdigest()
        sizes = " / ".join(f"{count:,} {key}" for key, count in self.counts.items())
        self.notes = [*listing.notes, f"{self.name}: {sizes} images in {len(self.classnames)} "
                                      f"classes, split {self.fingerprint[:12]}"]
        self.transform, self.images = None, None

    def __len__(self):
        return len(self.paths)

    reading = None  # in a loader's worker: the cell of shared memory for what it is reading

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, (tuple, list)) else (0, key)
        if self.reading is not None:
            self.reading[0] = index
        label = self.labels[index]
        try:
            image = self.images[index] if self.images else self.store.image(self.paths[index])
        except UnreadableImage:
            if self.transform is None:
                raise
            image, label = Image.new("RGB", (8, 8)), -1
        return (self.transform(image, epoch, index) if self.transform else image), label, index

    def subset(self, indices):
        """The same set with only the images at these positions, in this order."""
        chosen = self.with_transform(self.transform)
        chosen.paths = [self.paths[i] for i in indices]
        chosen.labels = [self.labels[i] for i in indices]
        chosen.images = self.images and [self.images[i] for i in indices]
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
        images, reasons, held = {}, {}, 0
        for index, path in enumerate([] if self.images else self.paths):
            try:
                images[index] = self.store.image(path)
                held += 4 * images[index].width * images[index].height
            except UnreadableImage as error:
                reasons[index] = error
            if held > limit:
                self.notes.append(f"{len(self):,} {self.split} images take over {limit >> 20:,} MB "
                                  f"decoded: they are read again at every use")
                return self
        if reasons:
            first = next(iter(reasons.values()))
            self.refuse_losses(reasons, first)
            self.paths = [self.paths[i] for i in images]
            self.labels = [self.labels[i] for i in images]
            self.notes.append(f"{len(reasons)} unreadable {self.split} images left out: {first}")
        self.images = self.images or list(images.values())
        return self

    def digest(self):
        """sha256 over the labels and the bytes of the image files: tells whether a set is still the
        one that a run began with. Reads every file; one that cannot be read counts by its name."""
        total = hashlib.sha256()
        for path, label in zip(self.paths, self.labels, strict=True):
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
            fix = ("leave out --no-download to fetch them" if getattr(KNOWN.get(self.name), "fetch", "")
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
# The user's own data: class folders, tables, zips, split files

SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "dev": "val",
               "validation": "val", "eval": "val", "test": "test", "testing": "test"}
PATH_COLUMNS = ("image", "path", "filepath", "filename", "file_name", "file", "image_path")
LABEL_COLUMNS = ("classname", "class", "category", "label")
NO_CLASS = re.compile(r"(images?|imgs?|photos?|pictures?|jpe?g(images)?|png|annotations|captions|"
                      r"(train|val|test)[ _-]?(images?)?(20\d\d)?)", re.IGNORECASE)
WNID = re.compile(r"n\d{8}")
NO_SPLITS = "no splits were given: each class is cut 50/20/30 by a fixed permutation"


def split_word(name):
    """The name of a folder or cell -> "train", "val", "test", or None if it names no split."""
    return SPLIT_WORDS.get(re.sub(r"[ _-]?set$", "", name.strip().lower()))


def read_coop_split(path, content=None):
    """{"train": [[path, label, class name], ...], "val": ..., "test": ...} -> rows, classnames."""
    text, names, rows = read_text(path, content), {}, {}
    try:
        listed = json.loads(text)
        for split in ("train", "val", "test"):
            rows[split] = [(image, label) for image, label, _ in listed.get(split, [])]
            for image, label, name in listed.get(split, []):
                if leaves_folder(image) or names.setdefault(label, name) != name:
                    raise ValueError(f"bad entry {[image, label, name]} in {split}")
        if not names or sorted(names) != list(range(len(names))):
            raise ValueError("labels must run from 0 without a gap")
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a split file ({error}); expected train, val and test lists "
                        f"of [relative path, label, class name]") from None
    return rows, [names[label] for label in sorted(names)]


def read_labels(path, content=None):
    """A table of images and class names -> {split or "all": [(path, class name)]}, notes. `content`:
    of a table inside a zip, whose paths must stay there. Raises DataError."""
    columns, table = read_table(path, content)
    path_key = next((key for key in PATH_COLUMNS if key in columns), None)
    label_key = next((key for key in LABEL_COLUMNS if key in columns), None)
    if not (path_key and label_key):
        raise DataError(f"{path} has the columns {columns}; expected one of {list(PATH_COLUMNS)} "
                        f"and one of {list(LABEL_COLUMNS)}, separated by comma, tab or semicolon")
    rows, incomplete = {}, 0
    for line, record in table:
        cells = [record.get(key) for key in (path_key, label_key, "split")]
        if any(isinstance(cell, (list, dict, bool)) for cell in cells):
            raise DataError(f"{path}, line {line}: expected text in {path_key} and {label_key}")
        image, label, word = ("" if cell is None else str(cell).strip() for cell in cells)
        image = image.replace("\\", "/")
        split = split_word(word) if "split" in columns else "all"
        if ".." in image.split("/") or content and leaves_folder(image):
            raise DataError(f"{path}, line {line}: {image} points outside its folder; write paths "
                            f"relative to it")
        if not (image and label):
            incomplete += 1
        elif split is None:
            raise DataError(f"{path}, line {line}: split {word!r}; write train, val or test")
        else:
            rows.setdefault(split, []).append((image, label))
    if not rows:
        raise DataError(f"{path} has no row with {path_key} and {label_key}")
    return rows, [f"{incomplete} rows without path or label left out"] if incomplete else []


def read_class_folders(store):
    """<class>/<image> or <split>/<class>/<image>, any depth below the class -> rows as read_labels,
    notes. A lone folder around it all, as zips often have, is passed through: store.prefix moves."""
    names = [name.split("/") for name in store.names()]  # a directory ends in ""
    while (len({parts[0] for parts in names}) == 1 and not split_word(names[0][0])
           and min((len(parts) for parts in names if is_image(parts[-1])), default=0) > 2):
        store.prefix += names[0][0] + "/"
        names = [parts[1:] for parts in names if parts[1:] != [""]]
    level = int(any(split_word(parts[0]) == "train" and len(parts) > 2 and parts[2]
                    for parts in names))
    rows, found, unread = {}, set(), []
    for parts in names:
        split = split_word(parts[0]) if level else "all"
        inside = split and len(parts) > level + 1
        if inside:
            found.add(parts[level])
        if inside and is_image(parts[-1]):
            rows.setdefault(split, []).append(("/".join(parts), parts[level]))
        elif parts[-1] and (inside or is_image(parts[-1]) or parts[-1].endswith(TABLE_SUFFIXES)):
            unread.append("/".join(parts))
    check_class_folders(store, rows, found, level, unread)
    return rows, [f"{len(unread):,} files are not read (no image by their suffix, or in no class "
                  f"folder), e.g. {unread[0]}"] if unread else []


def check_class_folders(store, rows, found, level, unread):
    """Refuse a tree that holds something other than class folders."""
    tables = [name for name in unread if name.endswith(TABLE_SUFFIXES)]
    hint = f"; {tables[0]} is a table: give its path to read that" if tables else ""
    if not rows:
        raise DataError(f"{store} has no class folders with images; expected <class>/<image> or "
                        f"train/<class>/<image>{hint}")
    classes = {name for entries in rows.values() for _, name in entries}
    if all(map(NO_CLASS.fullmatch, classes)):
        raise DataError(f"{store}: {', '.join(sorted(classes))} are no names of classes; expected "
                        f"<class>/<image> or train/<class>/<image>{hint}")
    empty = sorted(found - classes)
    if empty:
        raise DataError(f"{store}: no image in the class folder {', '.join(empty)}; add some or "
                        f"remove it")
    inner = collections.defaultdict(set)  # what lies in each class folder, if that is all folders
    for path, name in (entry for entries in rows.values() for entry in entries):
        rest = path.split("/")[level + 1:]
        inner[name].add(rest[0] if len(rest) > 1 else None)
    same = [set.intersection(*inner.values()) - {None}, any(None in names for names in inner.values())]
    if same[0] and not same[1]:
        raise DataError(f"{store}: {', '.join(sorted(inner)[:3])} all hold a folder "
                        f"{sorted(same[0])[0]}, so which are the classes? Name the outer folders "
                        f"train, val and test, or write a table of image and label")


def number_classes(rows):
    """rows with class names -> rows with labels, classnames. Sorted by name, by value if all are
    numbers. Two names that differ only by case or `_` raise DataError."""
    names = {name for entries in rows.values() for _, name in entries}
    numeric = all(name.isdecimal() for name in names)
    names = sorted(names, key=lambda name: (int(name) if numeric else 0, name))
    seen = {}
    for name in names:
        if seen.setdefault(cleaned(name), name) != name:
            raise DataError(f"class names {seen[cleaned(name)]!r} and {name!r} read the same; "
                            f"rename or merge them")
    label = {name: position for position, name in enumerate(names)}
    return {split: [(path, label[name]) for path, name in entries]
            for split, entries in rows.items()}, names


def complete_splits(rows):
    """Give user data its three splits. Rows without any are cut 50/20/30 per class by a fixed
    permutation of the sorted paths; a val without a test is used as the test."""
    rows = {split: list(dict.fromkeys(entries)) for split, entries in rows.items()}
    uses = collections.Counter(path for entries in rows.values() for path, _ in entries)
    twice = [path for path, count in uses.items() if count > 1]
    if twice:
        raise DataError(f"{len(twice)} images are in two splits or classes, e.g. {twice[0]}; list "
                        f"each once, or the score counts what was trained on")
    if "all" not in rows:
        cut = {split: rows.get(split, []) for split in ("train", "val", "test")}
        if cut["val"] and not cut["test"]:
            return {**cut, "val": [], "test": cut["val"]}, [
                "there is no test split: val is used as test"]
        return cut, []
    groups, cut = {}, {"train": [], "val": [], "test": []}
    for path, label in sorted(rows["all"]):
        groups.setdefault(label, []).append(path)
    for label, paths in sorted(groups.items()):
        paths = random.Random(0).sample(paths, len(paths))
        train = max(1, round(0.5 * len(paths)))
        val = train + max(0, min(round(0.2 * len(paths)), len(paths) - train - 1))  # test first
        for split, part in zip(cut, (paths[:train], paths[train:val], paths[val:]), strict=True):
            cut[split] += [(path, label) for path in part]
    return cut, [NO_SPLITS]


def read_words(home):
    """CoOp's classnames.txt, lines of wnid and name, in a folder near `home` -> {wnid: name}."""
    home = pathlib.Path(home).absolute()
    places = [place / known / WNIDS for place in (home, *home.parents[:3])
              for known in (".", "imagenet")]
    table = next(filter(pathlib.Path.is_file, places), None)
    lines = read_text(table).splitlines() if table else []
    return {wnid: words.strip() for wnid, _, words in (line.strip().partition(" ") for line in lines)
            if words.strip()}


def readable_names(names, home):
    """Folder names -> what a prompt can say of them, notes. 001.Black_footed_Albatross loses its
    number; n01440764, and the line numbers of ImageNetV2, become words if classnames.txt is near."""
    words = {}
    if all(map(WNID.fullmatch, names)):
        words = read_words(home)
    elif "imagenetv2" in re.sub(r"[^a-z0-9]", "", str(home).lower()):
        words = {str(line): word for line, word in enumerate(read_words(home).values())}
    if words and all(name in words for name in names):
        return [words[name] for name in names], [f"class names are taken from {WNIDS}"]
    bare = [re.sub(r"^\d+[._]", "", name) for name in names]
    if all(a != b for a, b in zip(bare, names, strict=True)) and all(
            map(str.strip, bare)) and len(set(map(cleaned, bare))) == len(names):
        return bare, [f"the numbers before the class names are left out: {names[0]} -> {bare[0]}"]
    return names, []


def require_words(images):
    """Raise DataError if the classes of an ImageSet are named by WordNet ids, as the folders of
    ImageNet are: prompts like "a photo of a n01440764." score at chance."""
    if all(map(WNID.fullmatch, images.classnames)):
        raise DataError(f"{images.root}: {len(images.classnames)} classes are named like "
                        f"{images.classnames[0]!r}, of which no prompt can be made; put CoOp's "
                        f"{WNIDS} (lines of wnid and name) into {images.root}")


def list_path(path, whole=None):
    """A folder, table, zip or split file of the user's own -> Listing. Data without splits goes to
    the split `whole`, if one is named."""
    name, suffix = path.stem, path.suffix.lower()
    splits = list(path.glob("split_zhou_*.json"))
    if suffix == ".json" or len(splits) == 1:
        path = splits[0] if splits else path
        rows, classnames = read_coop_split(path)
        name = next((n for n, known in KNOWN.items() if known.split == path.name), path.stem)
        folder = KNOWN[name].images if name in KNOWN else ""
        store = find_images([path.parent], folder,
                            [image for part in rows.values() for image, _ in part])
        return Listing(name, str(path.parent), store, rows, classnames, [template_of(name)])
    if suffix in TABLE_SUFFIXES and path.is_file():
        store = ImageStore(path.parent)
        rows, notes = read_labels(path)
    elif path.is_dir() or suffix == ".zip":
        store = ImageStore(path)
        tables = [n for n in store.names() if n.endswith(TABLE_SUFFIXES) and "/" not in n]
        if tables and store.zipped:
            rows, notes = read_labels(tables[0], store.read(tables[0]))
        else:
            rows, notes = read_class_folders(store)
    else:
        raise DataError(f"{path}: expected a folder, .csv, .tsv, .jsonl, .zip or a split .json")
    rows, classnames = number_classes(rows)
    classnames, said = readable_names(classnames, path)
    unsplit = sorted(rows["all"]) if whole and set(rows) == {"all"} else None
    rows, more = complete_splits(rows)
    if unsplit:
        rows, more = {**dict.fromkeys(rows, []), whole: unsplit}, []
    return Listing(name, str(path), store, rows, classnames, [template_of(name)],
                   notes + said + more)


# -----------------------------------------------------------------------------
# The published datasets

class Known(NamedTuple):
    """Where one dataset lies. `homes`: its folder under data_dir as CoOp names it, then where
    torchvision's downloader puts it; `images`: the image folder under either."""
    homes: tuple
    images: str
    split: str = ""     # file name of CoOp's split, or of ImageNet's list of class names
    drive: str = ""     # its id on Google Drive
    fetch: str = ""     # class of torchvision.datasets that downloads the images
    size: str = ""      # of that download
    official: str = ""  # the file that shows that the authors' own lists are there
    template: str = ANY_TEMPLATE  # what CLIPFit trains with; grammar is not repaired


WNIDS = "classnames.txt"
IMAGENET = (WNIDS, "1-61f_ol79pViBFDG_IDlUQSwoLcn2XXF")
KNOWN = {
    "caltech101": Known(
        ("caltech-101", "caltech101"), "101_ObjectCategories", "split_zhou_Caltech101.json",
        "1hyarUivQE36mY6jSomru6Fjd-JzwcCzN", "Caltech101", "140 MB"),
    "oxford_pets": Known(
        ("oxford_pets", "oxford-iiit-pet"), "images", "split_zhou_OxfordPets.json",
        "1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs", "OxfordIIITPet", "810 MB",
        "annotations/trainval.txt", "a photo of a {}, a type of pet."),
    "stanford_cars": Known(
        ("stanford_cars",), "", "split_zhou_StanfordCars.json",
        "1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT"),
    "oxford_flowers": Known(
        ("oxford_flowers", "flowers-102"), "jpg", "split_zhou_OxfordFlowers.json",
        "1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT", "Flowers102", "345 MB",
        template="a photo of a {}, a type of flower."),
    "food101": Known(
        ("food-101",), "images", "split_zhou_Food101.json",
        "1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl", "Food101", "5 GB", "meta/train.json",
        "a photo of {}, a type of food."),
    "fgvc_aircraft": Known(
        ("fgvc_aircraft", "fgvc-aircraft-2013b/data"), "images", "", "", "FGVCAircraft", "2.8 GB",
        "variants.txt", "a photo of a {}, a type of aircraft."),
    "sun397": Known(
        ("sun397", ""), "SUN397", "split_zhou_SUN397.json",
        "1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq", "SUN397", "37 GB"),
    "dtd": Known(
        ("dtd", "dtd/dtd"), "images", "split_zhou_DescribableTextures.json",
        "1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x", "DTD", "600 MB", "labels/train1.txt",
        "a photo of a {}, a type of texture."),
    "eurosat": Known(
        ("eurosat",), "2750", "split_zhou_EuroSAT.json",
        "1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o", "EuroSAT", "95 MB",
        template="a centered satellite photo of {}."),
    "ucf101": Known(
        ("ucf101",), "UCF-101-midframes", "split_zhou_UCF101.json",
        "1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y", template="a photo of a person doing {}."),
    "imagenet": Known(("imagenet",), "images", *IMAGENET),
    "imagenetv2": Known(("imagenetv2",), "imagenetv2-matched-frequency-format-val", *IMAGENET),
    "imagenet-sketch": Known(("imagenet-sketch",), "images", *IMAGENET),
    "imagenet-a": Known(("imagenet-adversarial",), "imagenet-a", *IMAGENET),
    "imagenet-r": Known(("imagenet-rendition",), "imagenet-r", *IMAGENET),
}
TEMPLATES = {**{name: known.template for name, known in KNOWN.items()},
             "demo": KNOWN["eurosat"].template}
SPELLINGS = {  # besides the names above, all without case and punctuation
    "caltech": "caltech101", "pets": "oxford_pets", "oxfordiiitpet": "oxford_pets",
    "cars": "stanford_cars", "flowers": "oxford_flowers", "flowers102": "oxford_flowers",
    "food": "food101", "aircraft": "fgvc_aircraft", "sun": "sun397", "ucf": "ucf101",
    "describabletextures": "dtd", "textures": "dtd", "imagenet1k": "imagenet",
}


def template_of(name):
    return TEMPLATES.get(name, ANY_TEMPLATE)


def dataset_name(text):
    """Any usual spelling of a published dataset -> our name, or None, as for any path."""
    text = os.fspath(text)
    plain = re.sub(r"[^a-z0-9]", "", text.lower())
    names = {re.sub(r"[^a-z0-9]", "", name): name for name in KNOWN}
    return None if "/" in text or os.sep in text else names.get(plain) or SPELLINGS.get(plain)


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
    home = data_dir / KNOWN[name].homes[0]
    words = read_words(home)
    if not words:
        raise missing_split(name, home)
    if name == "imagenetv2":  # its folders are line numbers of the list
        words = {str(number): word for number, word in enumerate(words.values())}
    rows = {"train": [], "val": [], "test": []}
    for split, part in {"train": "train/", "test": "val/"}.items():
        part = part if name == "imagenet" else ""
        folder = home / KNOWN[name].images / part
        if folder.is_dir() and (part or split == "test"):
            rows[split] = [(part + image, image.split("/")[0]) for image in walk(folder)
                           if is_image(image) and image.split("/")[0] in words]
    used = {wnid for entries in rows.values() for _, wnid in entries}
    if not used:
        raise DataError(f"{name}: no image in {home / KNOWN[name].images}; expected one folder per "
                        f"class")
    wnids = list(words) if name == "imagenetv2" else sorted(used)  # a label is a rank
    label = {wnid: position for position, wnid in enumerate(wnids)}
    rows = {split: [(path, label[wnid]) for path, wnid in rows[split]] for split in rows}
    rows["val"] = rows["test"] if name == "imagenet" else []
    return Listing(name, str(home), ImageStore(home / KNOWN[name].images), rows,
                   [words[wnid] for wnid in wnids], [template_of(name)])


def missing_split(name, home):
    known = KNOWN[name]
    other = "; or use the authors' own lists with --split official" if known.official else ""
    return DataError(f"{name}: {home / known.split} is missing, and nothing is put in its place; "
                     f"download https://drive.google.com/uc?id={known.drive} to there, and the "
                     f"images to {home / known.images} unless they are{other}")


def list_known(name, data_dir, layout="coop"):
    """One of the published datasets -> Listing. Needs the split only, and most of CoOp's are
    bundled in assets/coop_splits; images may be absent."""
    known = KNOWN[name]
    if name.startswith("imagenet") and layout == "coop":
        return list_imagenet(name, data_dir)
    homes = [data_dir / home for home in known.homes]
    if layout == "official" or not known.split:
        if not known.official:
            having = ", ".join(key for key, other in KNOWN.items() if other.official)
            raise DataError(f"{name} has no official lists here, only {having} have; use "
                            f"--split coop")
        home = next((home for home in homes if (home / known.official).is_file()), None)
        if home is None:
            raise DataError(f"{name}: {homes[0] / known.official} is missing; unpack the authors' "
                            f"archive into {homes[0]}, or leave out --no-download to fetch it")
        rows, classnames = read_official(name, home)
    else:
        bundled = ASSETS / "coop_splits" / f"{known.split}.xz"
        home = next((home for home in homes if (home / known.split).is_file()), None)
        if home is None and not bundled.is_file():
            raise missing_split(name, homes[0])
        rows, classnames = read_coop_split(
            home / known.split if home else bundled,
            None if home else lzma.decompress(bundled.read_bytes()))
    paths = [path for entries in rows.values() for path, _ in entries]
    store = find_images(homes, known.images, paths)
    return Listing(name, str(home or homes[0]), store, rows, classnames, [template_of(name)])


def fetch_images(name, data_dir, layout="coop"):
    """Let torchvision download a published dataset, md5 checked, into its own folder under
    data_dir, unless some of its images are there. Says what it does. Raises DataError."""
    known = KNOWN[name]
    lists_come_along = (layout == "official" or not known.split) and known.official
    try:
        listing = list_known(name, data_dir, layout)
    except DataError:
        if not lists_come_along:
            raise
    else:
        paths = [path for entries in listing.rows.values() for path, _ in entries]
        if holds_some(listing.store, paths) or not known.fetch:
            return
    datasets = import_torchvision(f"fetching {name}").datasets
    print(f"{name}: no images under {data_dir}; fetching {known.size} into it once", file=sys.stderr,
          flush=True)
    try:
        getattr(datasets, known.fetch)(str(data_dir), download=True)
    except Exception as error:
        raise DataError(f"{name}: the download failed ({one_line(error)}); try again, or put the "
                        f"files under {data_dir} by hand") from error


def list_dataset(name_or_path, data_dir="data", layout="coop", whole=None):
    """All splits of what open_dataset takes -> Listing. Raises DataError."""
    name = dataset_name(name_or_path)
    data_dir = pathlib.Path(os.path.expandvars(os.path.expanduser(os.fspath(data_dir))))
    if name:
        return list_known(name, data_dir, layout)
    if layout == "official":
        raise DataError(f"{name_or_path}: --split official needs the name of a dataset")
    try:
        path = find_path(name_or_path, data_dir)
    except DataError as error:
        text = os.fspath(name_or_path)
        hint = "" if "/" in text or os.sep in text else nearest(text, [*KNOWN, "demo"])
        raise DataError(f"{error}{hint}") from None
    return list_path(path, whole)


def open_dataset(name_or_path, split, data_dir="data", layout="coop", classes=None, download=True,
                 whole=False):
    """A dataset by name, or one's own folder, CSV/TSV/JSONL, zip or CoOp split file -> ImageSet.

    split "train", "val" or "test". `classes` (names) narrows and renumbers. layout "official" takes
    the authors' lists instead of CoOp's. No image is touched, but with `download` a published set
    of which no image is there is fetched first: with several processes, on one of them only.
    `whole` gives all of one's own data without splits to the split asked for. A published name wins
    over a folder of that name; write ./dtd for the folder. Raises DataError.
    """
    for what, value, known in (("split", split, ("train", "val", "test")),
                               ("layout", layout, ("coop", "official"))):
        if value not in known:
            raise DataError(f"{what} {value!r}: expected one of {', '.join(known)}")
    name = dataset_name(name_or_path)
    if download and name:
        fetch_images(name, pathlib.Path(os.path.expandvars(os.path.expanduser(data_dir))), layout)
    images = list_dataset(name_or_path, data_dir, layout, split if whole else None).open(split)
    if classes is not None:
        images = images.select(find_classes(images.classnames, classes))
    return images


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


def collate(items, size, dtype=torch.uint8):
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
            places = self.worker_init_fn.args[0].tolist()
            reading = ", ".join(f"worker {worker} {self.dataset.paths[index]}"
                                for worker, index in enumerate(places) if index >= 0)
            raise LostWorker(f"{one_line(error).split('. ')[0]} while reading {reading or '?'}: "
                             f"look at these files and at the memory that is free, or read with "
                             f"--workers 0; the last checkpoint is intact") from error


def tell_reading(places, worker):
    """Run in each new worker: from now on it keeps in `places` the position that it is reading."""
    get_worker_info().dataset.reading = places[worker:worker + 1].numpy()


def make_loader(dataset, batch_size, seed=0, shuffle=True, drop_last=None, rank=0, world_size=1,
                workers=0, **options):
    """DataLoader over an ImageSet with a transform; `loader.batch_sampler` is the Batches.

    `batch_size` is global. Batches depend neither on `workers` nor on how they are started. The
    options go to DataLoader; those that only concern workers are ignored when there are none. A
    worker that dies, or gives nothing for `timeout` seconds, raises LostWorker.
    """
    batches = Batches(len(dataset), batch_size, seed, rank, world_size, shuffle, drop_last)
    return load_batches(dataset, batches, workers, options)


def load_batches(dataset, batches, workers, options):
    """A Loader over any data set with .transform, .paths and .reading, in the order of `batches`."""
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


def add_data_flags(parser):
    """The flags with which a script chooses labelled images."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="demo", help="a data set by name (dtd, eurosat, ...), a "
                       "folder of class folders, a zip, or a CSV/TSV/JSONL file (default: demo)")
    group.add_argument("--data-dir", default="data", help="where the named data sets lie "
                       "(default: data)")
    group.add_argument("--no-download", action="store_true",
                       help="refuse rather than fetch images that are not there")
    group.add_argument("--split", choices=("coop", "official"), default="coop",
                       help="CoOp's lists of images, or those of the authors (default: coop)")
    group.add_argument("--classes", nargs="+", metavar="NAME", help="train and test on these only")
    group.add_argument("--template", help="prompt with {} for the class; default: the paper's")
    return group
