"""Images with captions: every captioned source in, batches of pairs out.

    pairs = open_pairs("flickr8k", "train", data_dir="data")     # no image is touched
    view = Preprocess(224, train=True, seed=1)
    loader = make_pair_loader(pairs.with_transform(view), 256, seed=1)
    for images, used, asked in loader: ...                       # texts: pairs.captions[used[i]]

A source is found (which of LAYOUTS lies there), read (each reader gives the same Listing), cleaned,
split, and opened as a PairSet. What is not understood is refused with the names of the files that
were not read: a wrong guess would train on wrong captions. Class folders become captions only when
asked for with layout "classes".

Batches are functions of (seed, epoch), captions of (seed, epoch, image), so a run is the same for
any number of workers and processes. No file can run code, and nothing is unpacked.
"""
import base64
import binascii
import collections
import copy
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import pickle
import re
import shutil
import tarfile
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data import (Batches, class_prompts, DataError, find_path, ImageStore, is_image, leaves_folder,
                  load_batches, one_line, open_dataset, read_table, read_text, sample_seed,
                  split_word, UnreadableImage)


class NotCaptions(DataError):
    """A file without captions in a known form; in its folder another layout may fit."""


@dataclasses.dataclass
class Listing:
    """What every reader returns.

    rows    {"train" | "val" | "test" | "all": [(path, caption) or (path, caption, query)]}: the
            query tells rows of one search text apart from other texts, "" is the path of a text
            that has no image
    stores  {split or "all": where its images lie}; without an entry they are looked for
    pools   {split: [path, ...]}: images that can be found in a search, with captions or without
    """
    rows: dict
    stores: dict = dataclasses.field(default_factory=dict)
    notes: list = dataclasses.field(default_factory=list)
    pools: dict = dataclasses.field(default_factory=dict)


class Options(NamedTuple):
    """What the user says about a source, for the readers."""
    image_column: str = None
    caption_column: str = None
    use_lists: bool = True     # the lists of train, val and test images beside Flickr's captions


# -----------------------------------------------------------------------------
# The set

class Retrieval(NamedTuple):
    """What a search is scored on: `PairSet.retrieval`."""
    images: "PairSet"       # its paths are the pool, n of them
    texts: list             # the queries, M of them
    relevant: torch.Tensor  # (R, 2) int64: text, image; a text may have several images, or none
    notes: list


class PairSet(Dataset):
    """Images with their captions. `set[c]` or `set[(epoch, c)]` -> (image, used, asked), where
    asked is c, a position in `captions`, and used is c too unless its image cannot be read: then it
    is another pair, found by (c, number of tries) alone, so the same in every run and worker. The
    crop is that of index c either way. DataError if a hundred tries find no image. The image is
    what transform(image, epoch, c) makes of it, without a transform a PIL image.

    name, split, root   as opened                   paths      images as listed, each once
    captions            list of str, folded blanks  owner      caption -> position in paths
    counts              images per split            notes      sentences worth telling the user
    fingerprint         sha256 of the lists of all splits: identifies the data on resume
    """

    reading = None  # in a loader's worker: the cell of shared memory for what it is reading

    def __init__(self, name, root, listing, split):
        rows, pool = listing.rows[split], listing.pools.get(split, [])
        self.name, self.root, self.split = name, root, split
        self.paths = list(dict.fromkeys([*pool, *(path for path, _, _ in rows if path)]))
        place = {path: position for position, path in enumerate(self.paths)}
        pairs = [row for row in rows if row[0] and row[1]]
        self.owner = [place[path] for path, _, _ in pairs]
        self.captions = [caption for _, caption, _ in pairs]
        self.query = [query for _, _, query in pairs]         # of each caption, None: its own
        self.queries = {query: text for _, text, query in rows if query is not None}
        self.counts = {key: len({row[0] for row in part}) for key, part in listing.rows.items()}
        lists = json.dumps([listing.rows, listing.pools], sort_keys=True)
        self.fingerprint = hashlib.sha256(lists.encode()).hexdigest()
        sizes = " / ".join(f"{count:,} {key}" for key, count in self.counts.items())
        self.notes = [*listing.notes, f"{name}: {sizes} images, {len(self):,} {split} captions, "
                                      f"split {self.fingerprint[:12]}"]
        self.store = (listing.stores.get(split) or listing.stores.get("all")
                      or locate(pathlib.Path(root), self.paths))
        self.transform = self.pixels = None

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
        return self.pixels.image(position)

    def image_items(self):
        """A data set of the images, each once, for features: see PairImages."""
        return PairImages(self)

    def retrieval(self):
        """-> Retrieval: the set as a search task. Each caption is a query for its own image; where
        texts are listed by themselves, as in Chinese-CLIP's evaluation, every text is a query, even
        without an image, and every image is in the pool, even without a text. DataError if there
        is nothing to choose from."""
        texts, wanted = self.captions, list(enumerate(self.owner))
        if self.queries:
            number = {query: i for i, query in enumerate(self.queries)}
            texts = list(self.queries.values())
            wanted = list(dict.fromkeys((number[query], image)
                                        for query, image in zip(self.query, self.owner)))
        if len(self.paths) < 2 or not wanted:
            raise DataError(f"{self.name}: {len(self.paths)} {self.split} images for {len(texts)} "
                            f"texts with {len(wanted)} pairs; a search needs 2 images or more")
        notes = [f"{count} {what}" for count, what in (
            (len(texts) - len({text for text, _ in wanted}), "texts have no image: always missed"),
            (len(self.paths) - len({image for _, image in wanted}),
             "images have no text: they are in the pool and ask nothing")) if count]
        least = min(len(self.paths), len(texts))
        if least < 10:
            notes.append(f"a pool of {least}: R@k is 100 from k = {least} on, whatever the model "
                         f"does; the official evaluation refuses pools under 10")
        return Retrieval(self, texts, torch.tensor(wanted), notes)

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
        chosen, (order, start, count) = self.with_transform(self.transform), self.groups
        images = list(images)
        kept = [order[start[i]:start[i] + count[i]].tolist() for i in images]
        flat = [c for group in kept for c in group]
        chosen.paths = [self.paths[i] for i in images]
        chosen.owner = [position for position, group in enumerate(kept) for _ in group]
        chosen.captions = [self.captions[c] for c in flat]
        chosen.query = [self.query[c] for c in flat]
        here = set(chosen.query)
        chosen.queries = {query: text for query, text in self.queries.items() if query in here}
        chosen.pixels = self.pixels and self.pixels.subset(images)
        chosen.__dict__.pop("groups", None)
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
        known = self.store.__dict__.setdefault("known_contents", {})
        for path in self.paths:
            if path not in known:
                try:
                    known[path] = hashlib.sha1(self.store.read(path)).hexdigest()
                except UnreadableImage:
                    known[path] = ""
        return [known[path] for path in self.paths]

    def cache(self, run, side, folder, limit=8 << 30, workers=0):
        """Decode every image once, to at most `side` pixels on its short side (never enlarged),
        into one file of `folder` that all processes map; all further crops come from there. Returns
        the set itself.

        The first process fills the file (run: a Run, or None for one process), and the next run
        finds it: files that change under the same name are not noticed. If the images take more
        than `limit` bytes, or than half of the free disk, that is noted and they are read when
        asked for. Raises DataError if more than max(1, 1 %) of them cannot be read.
        """
        if self.pixels is not None or limit <= 0:
            return self
        identity = json.dumps([self.fingerprint, self.paths, str(self.store), side])
        file = pathlib.Path(folder) / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.pixels"
        fill = functools.partial(fill_pixels, self, side, file, limit, workers)
        reason = run.on_first(fill) if run else fill()
        self.pixels = Pixels.open(file, len(self.paths))
        if self.pixels is None:
            self.notes.append(f"no cache of decoded {self.split} images, they are read again at "
                              f"every use: {reason or f'{file} is not to be seen here'}")
        else:
            self.refuse_losses(self.pixels.lost(), "when the cache was filled")
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
            image, position = self.pairs.picture(index), index
        except UnreadableImage:
            image, position = Image.new("RGB", (8, 8)), -1
        return self.transform(image, epoch, index) if self.transform else image, position, index


class Pixels:
    """Decoded images in one file, mapped into memory: all values (uint8), then `place` (n, 3)
    int64, where image i begins, its height and width (0 if lost), then n and the bytes of values.
    """

    def __init__(self, file, place):
        self.file, self.place, self.values = file, place, None

    def __getstate__(self):
        return {**self.__dict__, "values": None}  # each process maps the file for itself

    @classmethod
    def open(cls, file, n):
        """None if there is no such file, or it is not whole."""
        try:
            with open(file, "rb") as source:
                source.seek(-16, os.SEEK_END)
                count, end = np.frombuffer(source.read(16), dtype=np.int64).tolist()
                if count != n or source.tell() != end + 24 * n + 16:
                    return None
                source.seek(end)
                return cls(file, np.frombuffer(source.read(24 * n), np.int64).reshape(n, 3))
        except (OSError, ValueError):
            return None

    def subset(self, images):
        return Pixels(self.file, self.place[images])

    def lost(self):
        return np.flatnonzero(self.place[:, 1] == 0).tolist()

    def image(self, i):
        if self.values is None:
            self.values = np.memmap(self.file, dtype=np.uint8, mode="r")
        begin, height, width = self.place[i].tolist()
        if not height:
            raise UnreadableImage(f"image {i}: not readable when the cache was filled")
        values = self.values[begin:begin + height * width * 3]
        return Image.fromarray(np.array(values).reshape(height, width, 3))


def shrink(image, epoch, index, side):
    """RGB image -> uint8 (H, W, 3), its short side at most `side`."""
    short = min(image.size)
    if short > side:
        image = image.resize([round(length * side / short) for length in image.size],
                             Image.Resampling.BICUBIC)
    return np.array(image)


def fill_pixels(pairs, side, file, limit, workers):
    """Write the file of `Pixels` unless it is there, whole or not at all -> why it was not."""
    if Pixels.open(file, len(pairs.paths)):
        return None
    items = pairs.with_transform(functools.partial(shrink, side=side)).image_items()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        limit = min(limit, shutil.disk_usage(file.parent).free // 2)
        some = [items[i][0].size for i in range(0, len(items), len(items) // 32 + 1)]
        if sum(some) / len(some) * len(items) > 1.1 * limit:  # told before anything is decoded
            return f"they take about {sum(some) / len(some) * len(items) / 2**30:,.1f} GB"
        return write_pixels(items, file, limit, workers)
    except OSError as error:
        return f"{file.parent} cannot be written ({one_line(error)})"


def write_pixels(items, file, limit, workers):
    place, end, part = [], 0, file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as out:
            for image, position, _ in DataLoader(items, batch_size=None, num_workers=workers,
                                                 generator=torch.Generator()):
                image = np.asarray(image)[:None if position >= 0 else 0]     # lost: no rows
                place.append((end, *image.shape[:2]))
                end += out.write(image.tobytes())
                if end > limit:
                    return f"they take more than {limit / 2**30:,.1f} GB"
            out.write(np.array(place, dtype=np.int64).tobytes())
            out.write(np.array((len(place), end), dtype=np.int64).tobytes())
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


# -----------------------------------------------------------------------------
# Where images lie

def locate(home, paths):
    """The ImageStore under `home` with most of `paths`: itself, a folder in it, or a zip."""
    sample, best = paths[::max(1, len(paths) // 50)], (0, ImageStore(home))
    for place in places(home):
        found = sum(map(place.has, sample))
        if found == len(sample):
            return place
        best = max(best, (found, place), key=lambda pair: pair[0])  # of equals the first
    return best[1]


def places(home):
    yield ImageStore(home)
    if home.is_file():  # a zip
        tops = {name.split("/")[0] for name in ImageStore(home).names() if "/" in name}
        yield from (ImageStore(home, f"{top}/") for top in sorted(tops))
        return
    folders = sorted(folder for folder in home.iterdir() if folder.is_dir())
    yield from map(ImageStore, folders)
    for archive in sorted(home.glob("*.zip")):
        if is_zip(archive):
            yield from (ImageStore(archive), ImageStore(archive, f"{archive.stem}/"))
    for folder in folders:  # images/train2017, flickr30k_images/flickr30k_images
        yield from (ImageStore(inner) for inner in sorted(folder.iterdir()) if inner.is_dir())


def split_of(name):
    """The last of train, val, test, ... among the words of a file's name, None if there is none."""
    return next(filter(None, map(split_word, reversed(re.findall("[a-z]+", name.lower())))), None)


def is_zip(file):
    with open(file, "rb") as source:
        return source.read(2) == b"PK"


class SpanStore(ImageStore):
    """Images inside larger files, read in place: `index` maps a path to (file, offset, bytes), of
    the image itself or, with `coded`, of its base64 text."""

    def __init__(self, path, index, coded=False):
        super().__init__(path)
        self.index, self.coded, self.zipped = index, coded, True

    def has(self, path):
        return path in self.index

    def raw(self, path):
        """The bytes at the path's place, None if there is no such path."""
        if path not in self.index:
            return None
        file, offset, size = self.index[path]
        with open(file, "rb") as source:
            source.seek(offset)
            content = source.read(size)
        if len(content) < size:
            raise OSError("the file ends inside it")
        return content

    def read(self, path):
        try:
            content = self.raw(path)
            if content is None:
                raise UnreadableImage(f"{self.path}:{path}: there is no such image")
            if self.coded:
                content = base64.b64decode(content.strip().translate(URL_SAFE), validate=True)
            return content
        except (OSError, binascii.Error) as error:
            raise UnreadableImage(f"{self.path}:{path}: cannot be read ({one_line(error)})"
                                  ) from error


URL_SAFE = bytes.maketrans(b"-_", b"+/")


# -----------------------------------------------------------------------------
# Caption files: COCO's and Karpathy's JSON, Flickr's lines, tables

IMAGE_COLUMNS = ("image", "filepath", "file_name", "filename", "path", "image_path", "image_name",
                 "file")
CAPTION_COLUMNS = ("caption", "title", "text", "captions", "comment")
# Flickr's "name.jpg#0<TAB>caption", or Kaggle's "name.jpg| 0| caption", where one row of Flickr30k
# lacks its second bar
LINE = re.compile(r"\s*(.+?)(?:#(?:\w+#)?\d+[ \t]|\s*\|\s*\d+(\s*\|)?)\s*(.*)")
LINES = re.compile(r"\s*(?:image_name\||[^,\t\n]+#(?:\w+#)?\d+\s)")
NEVER = "2258277193_586949ec62.jpg"  # Flickr8k captions it, but no copy has the image


def read_captions(home, files, options):
    """Caption files, each understood by its content -> Listing. Several are splits by their names,
    or else it is not known which one is meant: DataError."""
    found, notes, others = [], [], []
    for name, content in caption_members(files):
        try:
            found.append((name, read_caption_file(home, name, content, options, notes)))
        except NotCaptions as error:
            others.append(str(error))
    if not found:
        raise NotCaptions("; ".join(others))
    notes += [f"not read: {other}" for other in others]
    rows = {}
    for name, part in found:
        if "all" in part and len(found) > 1:
            part[split_of(name) or "all"] = part.pop("all")
        if len(found) > 1 and ("all" in part or set(part) & set(rows)):
            raise DataError(f"{home} holds {len(found)} caption files whose names are not those of "
                            f"splits: {', '.join(name for name, _ in found[:4])}; choose one with "
                            f"--caption-file")
        rows.update(part)
    return Listing(rows, notes=notes)


def caption_members(files):
    """(name, bytes) of caption files, out of a zip those inside."""
    for file in files:
        if file.suffix.lower() != ".zip":
            yield str(file), None
            continue
        archive = ImageStore(file)
        names = [name for name in archive.names() if re.fullmatch(
            r"annotations/captions_[^/]*\.json|[^/]+\.(?:csv|tsv|jsonl|json)", name)]
        if not names:
            raise NotCaptions(f"{file} has no table of captions (.csv, .tsv, .jsonl) at its top")
        for name in names:
            yield f"{file}:{name}", archive.read(name)


def read_caption_file(home, name, content, options, notes):
    """One file -> {split or "all": rows}."""
    if content is None:
        try:
            content = pathlib.Path(name).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {name} ({error.strerror})") from None
    if LINES.match(content[:4096].decode("utf-8-sig", "replace")):
        return read_lines(home, name, read_text(name, content), options.use_lists, notes)
    if name.endswith(".json"):
        try:
            found = json.loads(read_text(name, content))
        except (ValueError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            found = []  # JSON lines perhaps: the table reader will say
        if isinstance(found, dict):
            return read_coco_json(name, found, notes)
    return read_pair_table(name, content, options)


def read_coco_json(name, found, notes):
    """COCO's captions_*.json, or a Karpathy split (dataset_coco.json, dataset_flickr8k.json, ...),
    whose restval counts as train, as everyone trains."""
    try:
        if "annotations" not in found:
            rows = {}
            for image in found["images"]:
                file = "/".join(filter(None, (image.get("filepath"), image["filename"])))
                split = "train" if image["split"] == "restval" else image["split"]
                rows.setdefault(split, []).extend((file, text["raw"])
                                                  for text in image["sentences"])
            if not set(rows) <= {"train", "val", "test"}:
                raise KeyError("train, val or test as split")
            return rows
        names = {image["id"]: image["file_name"] for image in found["images"]}
        captions, lost = {image: [] for image in names}, []
        for note in found["annotations"]:
            captions.get(note["image_id"], lost).append(note["caption"])
    except (KeyError, TypeError, AttributeError) as error:
        raise NotCaptions(f"{name} is no caption file of COCO or Karpathy ({error!r})") from None
    if lost:
        notes.append(f"{name}: {len(lost):,} captions of unlisted images left out")
    return {split_of(name.rpartition("/")[2]) or "all": [
        (names[image], text) for image, texts in captions.items() for text in texts]}


def read_lines(home, name, text, use_lists, notes):
    """Flickr's captions, and those of Flickr8k-CN, Flickr30k-CN and COCO-CN. The splits are lists
    of image names in `home`, if any; images in no list are left out, as the authors do."""
    lists, rows, renamed, odd = {}, {}, 0, 0
    for file in itertools.chain(home.glob("Flickr_8k.*Images.txt"), home.glob("coco-cn_*.txt")):
        split = split_of(re.sub("Images$", "", file.stem))
        if split and use_lists:
            lists.update(dict.fromkeys(read_text(file).split(), split))
    for line in text.removeprefix("image_name| comment_number| comment").split("\n"):
        match = LINE.match(line)
        if not match:
            odd += bool(line.strip())
            continue
        image, count = re.subn(r"(\.jpe?g)\.\d+$", r"\1", match[1])
        renamed += count
        split = lists.get(image, "unlisted") if lists else "all"
        year = re.match(r"COCO_((?:train|val)2014)_", image)
        if year:  # COCO's images, in folders by year or all in one
            image = image if is_image(image) else f"{image}.jpg"
            image = f"{year[1]}/{image}" if (home / year[1]).is_dir() else image
        if image != NEVER:
            rows.setdefault(split, []).append((image, match[3]))
    unlisted = len({image for image, _ in rows.pop("unlisted", [])})
    notes += [f"{name}: {count} {what}" for count, what in (
        (renamed, "image names like a.jpg.1 read as a.jpg"),
        (odd, "lines of no known form left out"),
        (unlisted, "images are in no split and not used")) if count]
    return rows


def read_pair_table(name, content, options):
    """CSV, TSV, JSON lines or a JSON list -> {split or "all": rows}. Values stay text: "None",
    "null" and "NA" are captions. An image path is relative to the folder of a metadata.* file."""
    image_keys = [options.image_column.lower()] if options.image_column else IMAGE_COLUMNS
    caption_keys = [options.caption_column.lower()] if options.caption_column else CAPTION_COLUMNS
    columns, records = read_table(name, content, join=caption_keys)
    for keys, flag in ((image_keys, "--image-column"), (caption_keys, "--caption-column")):
        if not set(keys) & set(columns):
            raise NotCaptions(f"{name} has the columns {columns}; expected one of {list(keys)}, or "
                              f"name it with {flag}")
    rows = {}
    for line, record in records:
        image, texts = (next((record[key] for key in keys if key in record), None)
                        for keys in (image_keys, caption_keys))
        texts = texts if isinstance(texts, list) else [texts]
        split = record.get("split") or ""
        wrong = [x for x in (image, split, *texts) if x is not None and not isinstance(x, str)]
        if wrong:
            raise DataError(f"{name}, line {line}: {str(wrong[0])[:40]!r} is a "
                            f"{type(wrong[0]).__name__}, where text was expected")
        if split.strip() and not split_word(split):
            raise DataError(f"{name}, line {line}: split {split!r}; write train, val or test")
        image = (image or "").strip().replace("\\", "/")
        rows.setdefault(split_word(split) or "all", []).extend((image, text) for text in texts)
    return rows


def read_image_folder(home, files, options):
    """Hugging Face's imagefolder: metadata.jsonl or .csv beside the images of the whole, or of
    train/, test/, ..., with file_name."""
    whole = Listing({})
    for file in files:
        folder = file.parent.relative_to(home).as_posix()
        part = read_captions(home, [file], options)
        for split, rows in part.rows.items():
            split = split_of(folder) if split == "all" and len(files) > 1 else split
            if folder != ".":
                rows = [(f"{folder}/{path}" if path else "", text) for path, text in rows]
            whole.rows.setdefault(split or "all", []).extend(rows)
        whole.notes += part.notes
    return whole


def read_text_files(home, files, options):
    """Images with a text file of the same name beside each, one caption per line. The splits are
    top folders train, val, test, if there is one train."""
    store, rows, alone = ImageStore(home), {}, 0
    names = store.names()
    texts = {os.path.splitext(name)[0]: name for name in names if name.lower().endswith(".txt")}
    images = [name for name in names if is_image(name)]
    divided = any(split_word(name.split("/")[0]) == "train" for name in images if "/" in name)
    for name in images:
        text = texts.get(os.path.splitext(name)[0])
        split = split_word(name.split("/")[0]) if divided else "all"
        alone += text is None
        if text and split:
            lines = read_text(text, store.read(text)).splitlines()
            rows.setdefault(split, []).extend((name, line) for line in lines or [""])
    if alone * 2 > len(images) or not rows:
        raise NotCaptions(f"{alone:,} of {len(images):,} images have no text file of the same name "
                          f"beside them")
    notes = [f"{alone} images without a text file left out"] * bool(alone)
    return Listing(rows, {"all": store}, notes)


def read_classes(name, data_dir):
    """Labelled images, as data.open_dataset takes them -> Listing, with captions such as "a photo
    of a <class>." Only by layout "classes"."""
    train = open_dataset(name, "train", data_dir, download=False)
    rows = {}
    for split in filter(train.counts.get, ("train", "val", "test")):
        images = open_dataset(name, split, data_dir, download=False) if split != "train" else train
        prompts = class_prompts(images.classnames, images.template)
        rows[split] = [(path, prompts[label]) for path, label in zip(images.paths, images.labels)]
    note = "captions are made of the names of classes"
    return Listing(rows, {"all": train.store}, [*train.notes[:-1], note])


# -----------------------------------------------------------------------------
# WebDataset shards

PACKED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
TEXT_BYTES = 1 << 20  # of a txt or json member that is read


def tar_members(file, notes):
    """The plain files of a tar -> (name, offset, bytes). Links, devices, sparse files and names
    that lead out of it are counted in `notes`; what follows damage is left out and noted."""
    odd, size = 0, os.path.getsize(file)
    with open(file, "rb") as source:
        head = source.read(6)
    for magic, kind in PACKED.items():
        if head.startswith(magic):
            raise DataError(f"{file} is packed with {kind}, and shards are read in place; unpack "
                            f"it to a plain tar")
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


def tar_samples(file, notes):
    """The samples of a shard -> {kind: (name, offset, bytes)}, as webdataset: the key of a member
    ends at the first dot of its base name, the kind is the rest. Members of one sample stand side
    by side: another key closes it, and so does a kind that it has already (shards that were joined
    begin with a key that another ended with)."""
    key, parts = None, {}
    for name, *span in tar_members(file, notes):
        folder, slash, base = name.rpartition("/")
        stem, dot, kind = base.partition(".")
        if not stem or not dot or re.fullmatch("__.*__", stem):  # webdataset's own __members__
            continue
        if folder + slash + stem != key or kind.lower() in parts:
            if parts:
                yield parts
            key, parts = folder + slash + stem, {}
        parts[kind.lower()] = (name, *span)
    if parts:
        yield parts


def tar_captions(file, parts, one_a_line):
    """The captions of one sample: json's "captions", or txt, or json's "caption" or "text"."""
    def read(kind):
        _, offset, size = parts.get(kind, ("", 0, 0))
        if not 0 < size <= TEXT_BYTES:
            return ""
        with open(file, "rb") as tar:
            tar.seek(offset)
            return tar.read(size).decode("utf-8-sig")
    try:
        content = json.loads(read("json") or "{}")
    except (ValueError, RecursionError):
        content = {}
    content = content if isinstance(content, dict) else {}
    try:
        text = read("txt")
    except UnicodeDecodeError:
        text = ""
    texts = text.splitlines() if one_a_line else [text]
    for found in (content.get("captions"), texts, [content.get("caption")], [content.get("text")]):
        found = [text for text in found or [] if isinstance(text, str) and text.strip()]
        if found:
            return found
    return []


def read_tars(home, files, options=None):
    """WebDataset shards: images with a txt, or with a json that holds captions. A shard whose path
    below `home` says train, val or test is of that split."""
    index, rows, notes, lost, kinds = {}, {}, [], 0, collections.Counter()
    for file in files:
        shard = file.relative_to(home).as_posix()
        split, about = split_of(shard) or "all", file.parent.parent / "dataset_type.txt"
        one_a_line = about.is_file() and "retrieval" in read_text(about)  # CLIP_benchmark's
        for parts in tar_samples(file, notes):
            kinds.update(parts)
            kind = next((kind for kind in parts if is_image(f"x.{kind}") and "." not in kind), None)
            texts = tar_captions(file, parts, one_a_line) if kind else []
            if not texts:
                lost += 1
                continue
            path = f"{shard}:{parts[kind][0]}"
            while path in index:  # a key that comes again, in another sample
                path += "+"
            index[path] = (str(file), *parts[kind][1:])
            rows.setdefault(split, []).extend((path, text) for text in texts)
    for folder, count in collections.Counter(file.parent for file in files).items():
        promised = folder / "nshards.txt"
        if promised.is_file() and read_text(promised).strip() != str(count):
            notes.append(f"{folder} has {count} shards, and its nshards.txt says "
                         f"{read_text(promised).strip()[:20]}")
    if lost:
        notes.append(f"{lost:,} samples without image or caption left out; the shards hold "
                     + ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(8)))
    return Listing(rows, {"all": SpanStore(home, index)}, notes)


def find_shards(text):
    """A list of files, or names with braces, several joined by ::, a folder standing for its tars
    -> files. Raises DataError."""
    names = ([os.fspath(name) for name in text] if isinstance(text, (list, tuple)) else
             [name for part in map(os.path.expanduser, text.split("::"))
              for name in ([part] if os.path.exists(part) else expand(part))])
    files = [file for name in map(pathlib.Path, names) for file in (
        sorted(name.rglob("*.tar")) if name.is_dir() else [name])]
    missing = [file for file in files if not file.is_file()]
    if missing or not files:
        raise DataError(f"{len(missing)} of {len(files)} shards are missing, e.g. "
                        f"{(missing or ['none given'])[0]}")
    return [file.absolute() for file in files]


def expand(pattern):
    """shard-{0000..0012}.tar -> the names it stands for, zeros kept. Several groups give every
    combination; {a,b} gives either, and may hold groups itself, as in bash."""
    inner = re.search(r"\{([^{}]*)\}", pattern)
    if not inner:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", inner[1])
    if numbers:
        low, high = numbers.groups()
        if not 0 <= int(high) - int(low) < 1 << 20:
            raise DataError(f"{pattern}: {inner[0]} counts no shards; write {{0000..0012}}")
        parts = [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
    else:
        parts = inner[1].split(",")
    before, after = pattern[:inner.start()], pattern[inner.end():]
    return [name for part in parts for name in expand(before + part + after)]


# -----------------------------------------------------------------------------
# Chinese-CLIP's own files: TSV with JSONL, LMDB

TEXT_KEYS = (("text", "query_text"), ("image_ids", "item_ids"))


def read_chinese(home, files, options):
    """<split>_imgs.tsv, "id<TAB>base64" a line, each with <split>_texts.jsonl, {"text_id", "text",
    "image_ids"} a line, or under MUGE's own names."""
    whole = Listing({})
    for images in files:
        base = images.name.removesuffix("_imgs.tsv")
        texts = [images.with_name(base + end) for end in ("_texts.jsonl", "_queries.jsonl")]
        if not any(file.is_file() for file in texts):
            raise DataError(f"{images} has no {texts[0].name} beside it")
        texts = next(file for file in texts if file.is_file())
        rows = read_texts(texts)
        store = SpanStore(images, index_tsv(images, whole.notes), coded=True)
        add_split(whole, split_of(base) or "all", texts, rows, store, list(store.index))
    return whole


def add_split(whole, split, file, rows, store, pool):
    if not any(path for path, _, _ in rows):
        whole.notes.append(f"{file.name} names no images (hidden labels?): not used")
    elif split in whole.rows:
        raise DataError(f"{file} is a second {split} split beside {whole.stores[split].path}; name "
                        f"the one that is meant")
    else:
        whole.rows[split], whole.stores[split], whole.pools[split] = rows, store, pool


def read_texts(path):
    """The texts of a split -> [(image, text, line)], image "" for a text without any. Each line is
    a query of its own. Raises DataError with the line."""
    rows = []
    for line, record in read_table(path)[1]:
        text, images = (next((record[key] for key in keys if key in record), None)
                        for keys in TEXT_KEYS)
        images = [] if images is None else images
        if not isinstance(text, str) or not isinstance(images, list):
            raise DataError(f'{path}, line {line}: expected {{"text_id": 1, "text": "...", '
                            f'"image_ids": [2, 3]}}, found {str(record)[:60]}')
        rows += [(str(image), text, line) for image in images or [""]]
    return rows


def index_tsv(path, notes):
    """"id<TAB>base64" a line -> {id: (file, offset, bytes)}. Of an id that comes twice the last
    counts, as in the LMDB that the authors make of it. Raises DataError with the line."""
    index, offset, twice = {}, 0, 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            name, tab, content = line.removeprefix(b"\xef\xbb\xbf").partition(b"\t")
            if not tab and line.strip():
                raise DataError(f"{path}, line {number}: no tab between the image's id and its "
                                f"base64")
            if tab:
                image = name.decode("utf-8", "replace").strip()
                twice += image in index
                index[image] = (str(path), offset + len(line) - len(content), len(content))
            offset += len(line)
    if twice:
        notes.append(f"{path.name}: {twice} image ids come twice; the last of each counts")
    return index


@functools.lru_cache(maxsize=None)
def open_lmdb(folder, pid):
    """The LMDB in a folder, opened once in each process. Raises DataError."""
    try:
        import lmdb
    except ImportError:
        raise DataError(f"{folder} is an LMDB; pip install lmdb, or use the TSV and JSONL files it "
                        f"was made of") from None
    try:
        opened = lmdb.open(str(folder), readonly=True, lock=False, readahead=False)
        pages = opened.info()["last_pgno"] + 1
        if pages * opened.stat()["psize"] > os.path.getsize(os.path.join(folder, "data.mdb")):
            raise lmdb.Error("it breaks off")  # reading beyond the end would kill the process
        return opened
    except (lmdb.Error, OSError) as error:
        raise DataError(f"{folder} is not an LMDB that can be read ({one_line(error)}); copy or "
                        f"make it again") from None


class LMDBStore(SpanStore):
    """Images in an LMDB, as base64 text under their ids."""

    def __init__(self, path):
        super().__init__(path, {}, coded=True)

    def raw(self, path):
        with open_lmdb(self.path, os.getpid()).begin() as look:
            return look.get(path.encode("utf-8", "surrogateescape"))

    def has(self, path):
        return self.raw(path) is not None


class PlainUnpickler(pickle.Unpickler):
    """Numbers, text, and tuples of them: a pickle can only run code through names, none is found.
    """

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_pairs_lmdb(folder):
    """The pairs of one split, pickled (image id, text id, text) under "0", "1", ... -> rows."""
    rows = []
    with open_lmdb(folder, os.getpid()).begin() as look:
        count = int(look.get(b"num_samples") or look.stat()["entries"])
        for number in range(count):
            try:
                value = PlainUnpickler(io.BytesIO(look.get(str(number).encode()) or b"")).load()
                image, text_id, text = value
                if not isinstance(text, str) or not isinstance(image, (int, str)):
                    raise ValueError(f"{str(value)[:40]}")
            except Exception as error:  # a broken pickle raises anything
                raise DataError(f"{folder}: pair {number} is refused and was not run: it is not a "
                                f"plain (image id, text id, text), {one_line(error)}") from None
            rows.append((str(image), text, f"{text_id} {text}"))
    return rows


def read_lmdb(home, files, options):
    """<split>/pairs and <split>/imgs, each an LMDB, of one split or several."""
    whole = Listing({})
    for file in files:
        folder = file.parent.parent
        rows, store = read_pairs_lmdb(folder / "pairs"), LMDBStore(folder / "imgs")
        with open_lmdb(store.path, os.getpid()).begin() as look:
            pool = [key.decode("utf-8", "surrogateescape")
                    for key in look.cursor().iternext(values=False) if key != b"num_images"]
        texts = folder.parent.parent / f"{folder.name}_texts.jsonl"  # knows texts without images
        if texts.is_file():
            rows = read_texts(texts)
        add_split(whole, split_of(folder.name) or "all", folder, rows, store, pool)
    return whole


# -----------------------------------------------------------------------------
# find -> read -> clean -> split

# What to look for in a folder, in this order: layout -> (patterns, reader)
LAYOUTS = {
    "chinese": (("*_imgs.tsv",), read_chinese),                         # Chinese-CLIP's, MUGE
    "lmdb": (("pairs/data.mdb", "*/pairs/data.mdb", "lmdb/*/pairs/data.mdb"), read_lmdb),
    "coco": (("annotations/captions_*.json", "annotations_trainval20*.zip"), read_captions),
    "karpathy": (("dataset_*.json",), read_captions),
    "lines": (("*.token.txt", "*.token", "results.csv", "*/results.csv"), read_captions),  # Flickr
    "lists": (("imageid.human-written-caption.txt", "*.caption.txt"), read_captions),  # COCO-CN ...
    "imagefolder": (("metadata.jsonl", "metadata.csv", "*/metadata.jsonl", "*/metadata.csv"),
                    read_image_folder),                                # Hugging Face
    "table": (("captions.txt", "*.csv", "*.tsv", "*.jsonl", "*.json"), read_captions),
    "webdataset": (("*.tar", "*/*.tar"), read_tars),
    "texts": ((".",), read_text_files),                            # images with a text file each
    "classes": ((), read_classes),                                 # only when it is asked for
}
ADVICE = {
    ".parquet": "write its images as files, with a metadata.jsonl of file_name and text",
    ".arrow": "write its images as files, with a metadata.jsonl of file_name and text",
    ".xlsx": "save it as CSV in UTF-8", ".xls": "save it as CSV in UTF-8",
    ".gz": "unpack it", ".tgz": "unpack it", ".zst": "unpack it", ".xz": "unpack it",
    ".txt": "a text belongs beside its image, under the same name",
}


def find_source(path, layout):
    """A file or folder -> its home, and [(layout, files)] that may fit, in the order to try."""
    if path.is_dir():
        found = []
        for name in LAYOUTS if layout == "auto" else [layout]:
            files = sorted({file for pattern in LAYOUTS[name][0] for file in
                            (path.glob(pattern) if pattern != "." else [path])})
            files = [file for file in files if ".lemma." not in file.name]  # Flickr8k's second file
            found += [(name, files)] * bool(files)
        return path, found
    if path.match("annotations/captions_*.json"):
        return path.parent.parent, [("coco", [path])]
    images = path.with_name(re.sub(r"_(texts|queries)\.jsonl$", "_imgs.tsv", path.name))
    kind = ("chinese" if images.match("*_imgs.tsv") and images.is_file() else
            "webdataset" if path.suffix == ".tar" else "table")
    home = path if path.suffix.lower() == ".zip" else path.parent
    return home, [(kind, [images if kind == "chinese" else path])]


def read_source(path, layout, caption_file, options):
    """-> name, home, Listing. Raises DataError, naming the files that were not read."""
    home = path
    if caption_file:
        home = path if path.is_dir() else path.parent
        path = next((file for file in (home / caption_file, pathlib.Path(caption_file))
                     if file.is_file()), None)
        if not path:
            raise DataError(f"there is no caption file {home / caption_file}")
        found = find_source(path, layout)[1]
    else:
        home, found = find_source(path, layout)
    name, reasons = (home.absolute() if home.is_dir() else home).name, []
    if path.is_file() and not caption_file:
        name = path.stem
    for kind, files in found:
        try:
            listing = LAYOUTS[kind][1](home, files, options)
            if kind in ("chinese", "lmdb"):
                name = [part for part in home.absolute().parts
                        if part.lower() != "lmdb" and not split_word(part)][-1]
            return name, home, listing
        except NotCaptions as error:
            if len(found) == 1:
                raise
            reasons.append(str(error))
    raise DataError(nothing_found(home, reasons))


def nothing_found(home, reasons):
    """One line: what lies in a folder without known captions, and what would help."""
    files = [file for pattern in ("*", "*/*") for file in itertools.islice(home.glob(pattern), 9999)
             if file.is_file() and not is_image(file.name) and not file.name.startswith(".")]
    said = [f"{file.relative_to(home)}" for file in sorted(files)[:4]]
    said += [f"{len(files) - 4} more"] * (len(files) > 4)
    kinds = dict.fromkeys(file.suffix.lower() for file in files)
    advice = [f"{kind}: {ADVICE[kind]}" for kind in kinds if kind in ADVICE]
    return (f"{home} holds no captions that are understood (looked for {', '.join(LAYOUTS)}). "
            f"Not read: {', '.join(said) or 'nothing but images and folders'}"
            + "".join(f"; {reason}" for reason in reasons[:2])
            + "".join(f"; {line}" for line in advice[:2])
            + ". Name the caption file with --caption-file, or take the names of class folders as "
              "captions with --layout classes")


# Cells that cannot be captions: numbers (labels, boxes), addresses, file names
NO_WORDS = re.compile(r"[\W\d_]*|\S+://\S+|\S+\.(?:jpe?g|png|webp|gif)", re.IGNORECASE)


def clean(root, listing):
    """Fold the blanks in captions; drop rows without image or caption, and count them. An image
    path may be absolute, but not lead out of the data's folder by two dots. Raises DataError."""
    dropped = count = wordless = 0
    for split, rows in listing.rows.items():
        kept = []
        for path, caption, *query in rows:
            caption = " ".join((caption or "").split())
            if ".." in path and ".." in path.split("/"):
                raise DataError(f"{root}: {path} points outside its folder; write paths relative "
                                f"to it")
            if path and caption:
                count, wordless = count + 1, wordless + bool(NO_WORDS.fullmatch(caption))
                example = caption
            elif not query:
                dropped += 1
                continue
            kept.append((path, caption, query[0] if query else None))
        listing.rows[split] = kept
    if not count:
        raise DataError(f"{root} has no image with a caption; expected at least one"
                        + "".join(f"; {note}" for note in listing.notes))
    if wordless * 2 > count:
        raise DataError(f"{root}: {wordless:,} of {count:,} captions are no words, such as "
                        f"{example[:60]!r}; name another column or file")
    if dropped:
        listing.notes.append(f"{dropped:,} rows without image or caption left out")


def split_rows(listing, layout, asked, whole):
    """Give a listing its three splits. Without any: all for the one that is asked with `whole`;
    or as the simple-CLIP notebook does, a fifth of the image numbers, drawn by NumPy with seed 42,
    is both val and test; or 80/10/10 by the hash of the image's name, so that new images move no
    old ones."""
    rows, notes = listing.rows, listing.notes
    if layout != "simple-clip" and any(rows[split] for split in rows if split != "all"):
        rest = rows.pop("all", [])
        if rest:
            notes.append(f"{len(rest):,} rows of no split are taken as train")
        rows["train"] = rows.get("train", []) + rest
        if rows.get("val") and not rows.get("test"):
            notes.append("there is no test split: val is used as test")
            for table in (rows, listing.stores, listing.pools):
                if "val" in table:
                    table["test"] = table["val"]
        taught = {row[0] for row in rows["train"]}
        leaks = {row[0] for split in ("val", "test") for row in rows.get(split, [])} & taught
        if leaks:
            notes.append(f"{len(leaks):,} images of val or test are in train too, e.g. "
                         f"{min(leaks)}: their scores flatter")
        listing.rows = {split: rows.get(split, []) for split in ("train", "val", "test")}
        return
    everything = [row for part in rows.values() for row in part]
    if whole:
        part_of = dict.fromkeys((row[0] for row in everything), asked)
    elif layout == "simple-clip":
        images = list(dict.fromkeys(row[0] for row in everything))
        drawn = np.random.RandomState(42).choice(len(images), len(images) // 5, replace=False)
        held = {images[i] for i in drawn}
        part_of = {path: "test" if path in held else "train" for path in images}
        notes.append("split 80/20 by image as the simple-CLIP notebook: val is also test")
    else:
        part_of = {path: hashed_split(path) for path in {row[0] for row in everything}}
        notes.append("no splits were given: images are cut 80/10/10 by a hash of their names")
    listing.rows = {split: [row for row in everything if part_of[row[0]] == split]
                    for split in ("train", "val", "test")}
    if layout == "simple-clip":
        listing.rows["val"] = listing.rows["test"]


def hashed_split(path):
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()
    share = int.from_bytes(digest[:6], "big") / 2 ** 48
    return "train" if share < 0.8 else "val" if share < 0.9 else "test"


def open_pairs(name_or_path, split, data_dir="data", layout="auto", caption_file=None,
               image_column=None, caption_column=None, whole=False):
    """Images with captions, split "train", "val" or "test" -> PairSet. No image is touched.

    name_or_path: a folder, a file of captions, a zip of one with its images, or shards (a folder,
    shard-{0000..0012}.tar, several joined by ::, a list of files); names are looked for under
    `data_dir` too. layout: one of LAYOUTS if several lie there, or "simple-clip" for that
    notebook's split. caption_file picks another caption file of the folder, such as a translation.
    whole: data without splits goes to the asked split undivided. Raises DataError.
    """
    known = ("auto", "simple-clip", *LAYOUTS)
    if split not in ("train", "val", "test") or layout not in known:
        raise DataError(f"split {split!r}, layout {layout!r}: expected train, val or test, and one "
                        f"of {', '.join(known)}")
    options = Options(image_column, caption_column, layout != "simple-clip")
    text = name_or_path if isinstance(name_or_path, (list, tuple)) else os.fspath(name_or_path)
    if isinstance(text, (list, tuple)) or "::" in text or (
            "{" in text and not os.path.exists(text)):
        files = find_shards(text)
        home = pathlib.Path(os.path.commonpath([file.parent for file in files]))
        name, listing = home.name, read_tars(home, files)
    elif layout == "classes":
        name, home, listing = pathlib.Path(text).stem, text, read_classes(text, data_dir)
    else:
        path = find_pair_path(text, data_dir)
        name, home, listing = read_source(path, "auto" if layout == "simple-clip" else layout,
                                          caption_file, options)
    clean(name_or_path, listing)
    split_rows(listing, layout, split, whole)
    if not listing.rows[split]:
        having = ", ".join(key for key, rows in listing.rows.items() if rows)
        raise DataError(f"{name} has no {split} split, only {having}")
    return PairSet(name, str(home), listing, split)


def find_pair_path(text, data_dir):
    """data.find_path; and "coco" may be `data_dir` itself, where COCO's own commands put it."""
    home = pathlib.Path(os.path.expanduser(data_dir))
    if re.sub(r"[^a-z0-9]", "", text.lower()) in ("coco", "coco2017", "mscoco") and not (
            home / text).exists() and any(
            next(home.glob(pattern), None) for pattern in LAYOUTS["coco"][0]):
        return home
    return find_path(text, data_dir)


# -----------------------------------------------------------------------------
# Batches

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
        self.images = np.flatnonzero(count)       # a search's pool holds some without captions
        start, count = start[self.images], count[self.images]
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
            draw = sample_seed(self.seed, self.epoch, self.images.astype(np.uint64))
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

    def part_of(self, c):
        """-> the number of the part that caption c belongs to."""
        return int(np.searchsorted(self.starts, c, side="right")) - 1

    def __getitem__(self, key):
        epoch, asked = key
        if self.reading is not None:
            self.reading[0] = self.owner[asked]
        part = self.part_of(asked)
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


class FeatureLoader:
    """A loader's batches with the rows of (n, F) features in the place of images. Pairs whose row
    is not a number, the image being lost, are replaced as a PairSet replaces them."""

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
        start, end = 0, len(self.dataset)
        if isinstance(self.dataset, Mixture):
            part = self.dataset.part_of(asked)
            start, end = self.dataset.starts[part:part + 2]
        tries = (start + sample_seed(0, attempt, asked - start) % (end - start)
                 for attempt in range(1, 101))
        return next(c for c in tries if c not in self.lost)


def make_pair_loader(pairs, batch_size, seed=0, captions="one", rank=0, world_size=1, workers=0,
                     **options):
    """DataLoader for contrastive training over a PairSet with a Preprocess: batches of images
    (B, 3, S, S), used (B,), asked (B,). `loader.batch_sampler` is the PairBatches; `batch_size`
    (global) and `options` as for make_loader."""
    batches = PairBatches(pairs, batch_size, seed, rank, world_size, captions)
    return load_batches(pairs, batches, workers, options)


def make_mixed_loader(parts, sizes, seed=0, captions="one", rank=0, world_size=1, workers=0,
                      **options):
    """make_pair_loader over several PairSets: each batch has sizes[k] pairs of parts[k]. The
    loader's data set is the Mixture, whose captions `used` and `asked` count."""
    mixture = Mixture(parts)
    batches = MixedBatches(mixture, sizes, seed, rank, world_size, captions)
    return load_batches(mixture, batches, workers, options)


def identities(pairs):
    """A PairSet or Mixture -> (M, 2) int64: for each caption the number of its image and of its
    wording, in which case does not count. Equal numbers are no negatives of each other."""
    image, wording = {}, {}
    return torch.tensor([(image.setdefault((str(part.store), part.paths[owner]), len(image)),
                          wording.setdefault(caption.casefold(), len(wording)))
                         for part in getattr(pairs, "parts", [pairs])
                         for owner, caption in zip(part.owner, part.captions)])


def add_pair_flags(parser):
    """The flags of captioned data, the same in every script."""
    group = parser.add_argument_group("images with captions")
    group.add_argument("--data", default="demo", help="a folder, a caption file, shards such as "
                       "shard-{0000..0012}.tar, or a name under --data-dir (default: demo)")
    group.add_argument("--data-dir", default="data", help="where named data lies (default: data)")
    group.add_argument("--layout", default="auto", choices=("auto", "simple-clip", *LAYOUTS),
                       help="how the data is laid out, or simple-clip for that notebook's split")
    group.add_argument("--caption-file", help="another caption file, such as a translation")
    group.add_argument("--image-column", help="default: found by name")
    group.add_argument("--caption-column", help="default: found by name")
    group.add_argument("--captions", choices=("one", "all"), default="one", help="in each epoch "
                       "one caption of each image, or all (default: one)")
    group.add_argument("--cache-gb", type=float, default=8.0, help="keep decoded images in a file "
                       "of at most this size, 0: do not (default: 8)")
