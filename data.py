"""Labelled images: by name, from a folder, a table or a zip; few-shot lists; tables.

    train = open_dataset("dtd", "train", data_dir="data")        # CoOp's lists, in their order
    shots = few_shot(train, shots=4, seed=1).preload()           # the published shots, decoded once
    loader = make_loader(shots.with_transform(Preprocess(224, train=True, seed=1)), 32, seed=1)
    for images, labels, indices in loader:                       # uint8 (B, 3, 224, 224), (B,) (B,)
        images = normalise(images)                               # float32, on any device

Pixels, transforms and batches stand in images.py; its names can be imported from here. A source
that is not understood is refused: no class name, label or row is guessed.
"""
import collections
import copy
import csv
import difflib
import hashlib
import io
import json
import lzma
import math
import os
import pathlib
import posixpath
import random
import re
import sys
import unicodedata
from typing import NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from images import (Batches, CLIP_MEAN, CLIP_STD, DataError, EXTRAS, ImageStore,  # noqa: F401
                    import_torchvision, is_image, leaves_folder, load_batches, LostWorker,
                    normalise, one_line, Preprocess, read_image, sample_seed, UnreadableImage)

ASSETS = pathlib.Path(__file__).resolve().parent / "assets"


# -----------------------------------------------------------------------------
# Text files and tables

NO_TEXT = {b"PK": "is a zip or an Excel workbook; export the sheet as CSV",
           b"\x1f\x8b": "is gzipped; unpack it first",
           b"PAR1": "is Parquet; write it as CSV or JSONL"}
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
QUOTED_CELL = re.compile(r'(?:^|(?<=\t))"(?:[^"]|"")*"(?=\t|\r?$)', re.MULTILINE)
# In a cell of several lines, one that looks like the row of another image: a quote never closed.
SWALLOWED = r"\n[^\n{0}]+\.(jpe?g|png|webp)\s*{0}|{0}[^\n{0}]+\.(jpe?g|png|webp)\s*\n"
csv.field_size_limit(1 << 24)    # captions of a megabyte exist


def read_text(path, content=None):
    """A text file (or its bytes), with or without a byte-order mark. Raises DataError."""
    try:
        content = pathlib.Path(path).read_bytes() if content is None else content
        text, bad = content.decode("utf-8-sig"), content.find(b"\0")
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); a file was expected") from None
    except UnicodeDecodeError as error:
        bad = error.start
    if bad >= 0:
        kind = [kind for magic, kind in NO_TEXT.items() if content.startswith(magic)] or [
            "is not UTF-8 text; save it as UTF-8"]
        raise DataError(f"{path}, line {content.count(10, 0, bad) + 1}: the file {kind[0]}")
    return text


def read_table(path, content=None, join=()):
    """A CSV, TSV, JSONL or JSON table (or its bytes) -> columns, [(line, {column: value})].

    The content tells the kind, not the suffix. Columns are stripped and in lower case. Values are
    text as written, of JSON whatever it says. A row must have as many fields as the header; but
    with two columns of which the last is in `join`, delimiters that an unquoted row has too many
    belong to that cell, for captions hold commas. Raises DataError with the line.
    """
    text = read_text(path, content)
    try:
        if text.lstrip()[:1] in ("[", "{"):
            rows = list(json_rows(text))
            return list(dict.fromkeys(key for _, row in rows for key in row)), rows
        header, *rows = delimited_rows(text, join) or [(1, [""])]
    except ValueError as error:
        raise DataError(f"{path}, {error}") from None
    columns = [name.strip().lower() for name in header[1]]
    if len(set(columns)) < len(columns):
        raise DataError(f"{path}, line {header[0]}: two columns of one name among {columns}")
    return columns, [(line, dict(zip(columns, cells, strict=True))) for line, cells in rows]


def json_rows(text):
    """JSONL, or a JSON list, of objects -> (line or place in the list, object)."""
    place = "line 1"
    try:
        listed = text.lstrip().startswith("[")
        entries = json.loads(text) if listed else text.split("\n")  # U+2028 does not end a line
        for number, row in enumerate(entries, 1):
            place = f"{'entry' if listed else 'line'} {number}"
            if listed or row.strip():
                row = row if listed else json.loads(row)
                yield number, {str(key).strip().lower(): value for key, value in row.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{place}: {one_line(error)}; expected an object {{...}}") from None


def delimited_rows(text, join):
    """Comma, semicolon or tab, told by the header -> [(line, cells)], the header first.

    Most writers of TSV quote nothing, so a quote is content; but where every quote in the file is
    part of a well-formed quoted cell, a CSV writer was at work and they are not.
    """
    lines = re.split(r"\r\n|\n|\r", text)
    mark = max(",\t;", key=next(filter(str.strip, lines), "").count)
    plain = mark == "\t" and '"' in QUOTED_CELL.sub("", text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True,
                        quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL)
    swallowed, rows, line, width = re.compile(SWALLOWED.format(mark), re.IGNORECASE), [], 1, 0
    try:
        for cells in reader:
            if not width and any(map(str.strip, cells)):
                width, joins = len(cells), mark != "\t" and cells[-1].strip().lower() in join
            if len(cells) > width == 2 and joins and '"' not in lines[line - 1]:
                cells = lines[line - 1].split(mark, 1)
            if len(cells) == width and "".join(cells).strip():
                rows.append((line, cells))
            elif any(map(str.strip, cells)):
                raise csv.Error(f"{len(cells)} fields where the header has {width}")
            if reader.line_num > line and any(swallowed.search(cell + "\n") for cell in cells):
                raise csv.Error("a quote opens here and closes only after other rows")
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {line}: {error}; a cell with a delimiter, a line break or a quote "
                         f"must stand in quotes, and quotes in it be doubled") from None
    return rows


# -----------------------------------------------------------------------------
# The data set

class Source(NamedTuple):
    """What lies somewhere, before a split is chosen. rows: {"train": [(path, label), ...], "val",
    "test"}, the paths relative to `store`."""
    name: str
    root: str
    store: ImageStore
    rows: dict
    classnames: list
    notes: list = []

    def paths(self):
        return [path for rows in self.rows.values() for path, _ in rows]


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
    reading = None  # in a loader's worker: the cell of shared memory for what it is reading
    transform = images = None

    def __init__(self, source, split):
        if len(source.classnames) < 2 or not source.rows[split]:
            having = [key for key, rows in source.rows.items() if rows]
            raise DataError(f"{source.root}: {len(source.classnames)} classes with the splits "
                            f"{having}; expected two classes or more and {split} images (class "
                            f"folders, or a table, without any splits are cut)")
        self.name, self.root, self.split = source.name, source.root, split
        self.store, self.classnames = source.store, list(source.classnames)
        self.template = TEMPLATES.get(self.name, ANY_TEMPLATE)
        self.templates = [self.template]
        self.paths = [path for path, _ in source.rows[split]]
        self.labels = [label for _, label in source.rows[split]]
        self.counts = {key: len(rows) for key, rows in source.rows.items()}
        lists = json.dumps([self.classnames, source.rows], sort_keys=True)
        self.fingerprint = hashlib.sha256(lists.encode()).hexdigest()
        sizes = " / ".join(f"{count:,} {key}" for key, count in self.counts.items())
        said = f"{self.name}: {sizes} images in {len(self.classnames)} classes, split "
        self.notes = [*source.notes, said + self.fingerprint[:12]]

    def __len__(self):
        return len(self.paths)

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

    def with_transform(self, transform):
        chosen = copy.copy(self)
        chosen.transform, chosen.notes = transform, list(self.notes)
        return chosen

    def subset(self, indices):
        """The same set with only the images at these positions, in this order."""
        chosen = self.with_transform(self.transform)
        chosen.paths = [self.paths[i] for i in indices]
        chosen.labels = [self.labels[i] for i in indices]
        chosen.images = self.images and [self.images[i] for i in indices]
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
        self.refuse_losses(lost, "there is no such file")

    def preload(self, limit=1 << 62):
        """Decode every image into memory once (4 bytes per pixel) and return the set itself.
        Unreadable ones are dropped, or refused as refuse_losses says (DataError). Beyond `limit`
        bytes it gives up, notes that, and images go on being read when asked for."""
        images, lost, held = {}, {}, 0
        for index, path in enumerate([] if self.images else self.paths):
            try:
                images[index] = self.store.image(path)
                held += 4 * images[index].width * images[index].height
            except UnreadableImage as error:
                lost[index] = error
            if held > limit:
                self.notes.append(f"{len(self):,} {self.split} images take over {limit >> 20:,} MB "
                                  f"decoded: they are read again at every use")
                return self
        self.refuse_losses(lost, "; ".join(map(str, [*lost.values()][:1])))
        if images:
            self.paths = [self.paths[i] for i in images]
            self.labels = [self.labels[i] for i in images]
            self.images = list(images.values())
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
        """Raise DataError if the images at positions `lost` are a whole class or more than
        max(1, 1 %); else note them."""
        if not len(lost):
            return
        left = {self.labels[i] for i in set(range(len(self))) - set(lost)}
        empty = [self.classnames[label] for label in sorted(set(self.labels) - left)]
        said = (f"{self.name}: {len(lost):,} of {len(self):,} {self.split} images cannot be read, "
                f"e.g. {self.paths[next(iter(lost))]} ({reason})")
        if not left:
            raise DataError(f"{said}, all under {self.store}: put them there, name the right "
                            f"folder, or leave out --no-download where a set can be fetched")
        if empty or len(lost) > max(1, len(self) // 100):
            raise DataError(f"{said}, more than 1 % or whole classes under {self.store}: restore "
                            f"them, or take the rest with --classes; {len(empty)} of "
                            f"{len(set(self.labels))} classes are empty: {', '.join(empty)}")
        self.notes.append(f"{said}: they are left out")


def few_shot(dataset, shots, seed, val=None):
    """`shots` images per class -> the train subset, or (train, val) with min(shots, 4) per class of
    `val`, drawn after train from the same stream.

    Item for item the list CoOp and its successors draw (Dassl's generate_fewshot_dataset): classes
    in order of first appearance, random.sample of each, a class that is short whole and in order.
    The stream is private, so nothing drawn before matters, and seed 0 is a seed. ImageNet's val is
    its test set and comes back whole, as there. Raises DataError.
    """
    if shots < 0 or seed < 0:
        raise DataError(f"shots {shots}, seed {seed}: expected whole numbers, 0 or more")
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


def make_loader(dataset, batch_size, seed=0, shuffle=True, drop_last=None, rank=0, world_size=1,
                workers=0, **options):
    """DataLoader over an ImageSet with a transform; `loader.batch_sampler` is the Batches.

    `batch_size` is global. Batches depend neither on `workers` nor on how they are started. The
    options go to DataLoader; those that only concern workers are ignored when there are none. A
    worker that dies, or gives nothing for `timeout` seconds (600), raises LostWorker.
    """
    batches = Batches(len(dataset), batch_size, seed, rank, world_size, shuffle, drop_last)
    return load_batches(dataset, batches, workers, options)


# -----------------------------------------------------------------------------
# Class names and prompts

ANY_TEMPLATE = "a photo of a {}."
WORDS = "classnames.txt"       # CoOp's: lines of wnid and name
WNID = re.compile(r"n\d{8}")   # how ImageNet names its folders


def class_prompts(classnames, template):
    """One sentence per class: the name, `_` as space, in place of {} or {c}. Raises DataError."""
    fields = set(re.findall(r"\{[^{}]*\}", template))
    if not fields or not fields <= {"{}", "{c}"}:
        raise DataError(f"template {template!r} has the fields {sorted(fields)}; write {{}} where "
                        f"the class name goes, and no other")
    for text in (template, *classnames):
        if re.search("[\ud800-\udfff]", text):  # bytes that Python could not decode
            raise DataError(f"{text!r} is no readable text, with file names and arguments taken as "
                            f"{sys.getfilesystemencoding()}; set PYTHONUTF8=1, or name it in UTF-8")
    around = re.split(r"\{c?\}", template)
    return [name.replace("_", " ").join(around) for name in classnames]


def cleaned(name):
    """The form in which two class names count as the same: no `_`, case or accent-coding."""
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split()).casefold()


def nearest(name, known):
    close = difflib.get_close_matches(cleaned(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known)[:20])}"


def find_classes(classnames, wanted):
    """Names (raw or cleaned, any case) -> their labels, in the order wanted. Raises DataError."""
    known = collections.defaultdict(list)
    for label, name in enumerate(classnames):
        known[cleaned(name)].append(label)  # ImageNet has two "missile"
    for name in wanted:
        if cleaned(name) not in known:
            raise DataError(f"no class {name!r} among the {len(classnames)}{nearest(name, known)}")
    return [label for name in dict.fromkeys(map(cleaned, wanted)) for label in known[name]]


def halves(labels):
    """Labels of the train list -> (base, new): the first ceil(C/2) of the sorted ones, the rest."""
    ordered = sorted(set(labels))
    middle = math.ceil(len(ordered) / 2)
    return ordered[:middle], ordered[middle:]


def read_words(home):
    """classnames.txt in `home`, near it or in an imagenet folder near it -> {wnid: name}."""
    home = pathlib.Path(home).absolute()
    places = [place / known / WORDS for place in (home, *home.parents[:3])
              for known in (".", "imagenet")]
    table = next(filter(pathlib.Path.is_file, places), None)
    pairs = [line.strip().partition(" ") for line in read_text(table).splitlines()] if table else []
    return {wnid: name.strip() for wnid, _, name in pairs if name.strip()}


def readable_names(names, home):
    """Folder names -> what a prompt can say of them, notes. 001.Black_footed_Albatross loses its
    number; n01440764, and numbers, become words if classnames.txt is near."""
    codes = all(map(WNID.fullmatch, names)) or all(map(str.isdecimal, names))
    words = read_words(home) if codes else {}
    if "imagenetv2" in str(home).lower():  # its folders are line numbers
        words = {str(line): name for line, name in enumerate(words.values())}
    if words and set(names) <= set(words):
        return [words[name] for name in names], [f"class names are those of {WORDS}"]
    bare = [re.sub(r"^\d+[._]\s*", "", name) for name in names]
    numbered = all(re.match(r"\d+[._]", name) for name in names)
    if numbered and all(bare) and len(set(map(cleaned, bare))) == len(names):
        return bare, [f"the numbers before the class names are left out: {names[0]} -> {bare[0]}"]
    return names, [f"class names are codes such as {names[0]}"] * codes


def require_words(images):
    """Raise DataError if the classes of an ImageSet are named by WordNet ids, as the folders of
    ImageNet are: prompts like "a photo of a n01440764." score at chance."""
    if all(map(WNID.fullmatch, images.classnames)):
        raise DataError(f"{images.root}: no prompt can be made of classes named like "
                        f"{images.classnames[0]!r}; put CoOp's {WORDS} (wnid and name) there")


# -----------------------------------------------------------------------------
# The user's own data: class folders, tables, zips, split files

SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "valid": "val", "dev": "val",
               "validation": "val", "eval": "val", "test": "test", "testing": "test"}
PATH_COLUMNS = ("image", "path", "filepath", "filename", "file_name", "file", "image_path")
LABEL_COLUMNS = ("classname", "class", "category", "label")
NO_CLASS = re.compile(r"(.+[ _-])?(train|val|valid|test|pred|image|img|photo|picture|jpe?g|caption|"
                      r"annotation|label)(s|ing|idation|images)?([ _-].+|\d+)?", re.IGNORECASE)


def split_word(name):
    """The name of a folder, or a cell -> "train", "val", "test", or None if it names no split."""
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
    """A table of images and class names -> {split or "all": [(path, class name)]}. `content` is
    that of a table in a zip, whose paths must stay there. Raises DataError."""
    columns, table = read_table(path, content)
    keys = [next((key for key in known if key in columns), None)
            for known in (PATH_COLUMNS, LABEL_COLUMNS, ("split",))]
    if None in keys[:2] or not table:
        raise DataError(f"{path} has {len(table)} rows of {columns}; expected one of "
                        f"{list(PATH_COLUMNS)} and one of {list(LABEL_COLUMNS)}, between commas, "
                        f"tabs or semicolons")
    rows = {}
    for line, record in table:
        cells = [record.get(key) for key in keys]
        image, label, word = ("" if cell is None else str(cell).strip() for cell in cells)
        image, split = image.replace("\\", "/"), split_word(word) if keys[2] else "all"
        outside = ".." in image.split("/") or content and leaves_folder(image)
        if not image or not label or not split or outside or any(
                isinstance(cell, (list, dict, bool)) for cell in cells):
            raise DataError(f"{path}, line {line}: {cells}; expected an image under its folder, a "
                            f"class name and, as split, train, val or test")
        rows.setdefault(split, []).append((posixpath.normpath(image), label))
    return rows


def read_class_folders(store):
    """<class>/<image> or <split>/<class>/<image>, any depth below the class -> rows as read_labels,
    notes. A lone folder around it all, as zips often have, is passed through: store.prefix moves.
    A tree that holds something else raises DataError."""
    names = [name.split("/") for name in store.names()]  # a directory ends in ""
    while (len({parts[0] for parts in names}) == 1 and not split_word(names[0][0])
           and min((len(parts) for parts in names if is_image(parts[-1])), default=0) > 2):
        store.prefix += names[0][0] + "/"
        names = [parts[1:] for parts in names if parts[1:] != [""]]
    level = int(any(split_word(parts[0]) == "train" and parts[2:] not in ([], [""])
                    for parts in names))
    rows, inside, unread = {}, {}, []  # inside: of a class, the folders of its images, "" its own
    for parts in names:
        split = split_word(parts[0]) if level else "all"
        in_class = split is not None and len(parts) > level + 1
        held = inside.setdefault(parts[level], set()) if in_class else None
        if in_class and is_image(parts[-1]):
            inner = parts[level + 1] if len(parts) > level + 2 else ""
            held.add("" if NO_CLASS.fullmatch(inner) else inner)
            rows.setdefault(split, []).append(("/".join(parts), parts[level]))
        elif parts[-1]:
            unread.append("/".join(parts))
    full = sorted(name for name, held in inside.items() if held)
    empty = sorted(set(inside) - set(full))
    taught = {name for _, name in rows.get("train", [])}
    odd = [name for name in full if NO_CLASS.fullmatch(name) and name not in taught]
    folders = set.union(set(), *inside.values())
    if empty or len(odd) >= (1 if taught else len(full)) or (
            "" not in folders and len(folders) < sum(map(len, inside.values()))):
        raise DataError(f"{store}: expected <class>/<image> or train/<class>/<image>, each class "
                        f"with images; found {empty[:3]} without, {full[:3]} with images or with "
                        f"folders of them, and {unread[:2]}, which could be read by its own path")
    return rows, [f"{len(unread):,} files are not read for their suffix or place, e.g. {unread[0]}"
                  ] if unread else []


def number_classes(rows):
    """rows with class names -> rows with labels, classnames. Sorted by name, by value if all are
    numbers. Two names that differ only by case or `_` raise DataError."""
    names = {name for entries in rows.values() for _, name in entries}
    numeric = all(name.isdecimal() for name in names)
    names = sorted(names, key=lambda name: (int(name) if numeric else 0, name))
    if len(set(map(cleaned, names))) < len(names):
        same = [name for name in names if [*map(cleaned, names)].count(cleaned(name)) > 1]
        raise DataError(f"class names {same[:4]} read the same; rename or merge them")
    label = {name: position for position, name in enumerate(names)}
    return {split: [(path, label[name]) for path, name in entries]
            for split, entries in rows.items()}, names


def complete_splits(rows, whole=None):
    """Give user data its three splits, and notes. Rows without any go to the split `whole`, or are
    cut 50/20/30 per class by a fixed permutation; a val without a test is used as the test."""
    rows = {split: list(dict.fromkeys(entries)) for split, entries in rows.items()}
    uses = collections.Counter(path for entries in rows.values() for path, _ in entries)
    twice = [path for path, count in uses.items() if count > 1]
    if twice:
        raise DataError(f"{len(twice)} images are in two splits or classes, e.g. {twice[0]}; list "
                        f"each once, or the score counts what was trained on")
    cut, groups = {split: rows.get(split, []) for split in ("train", "val", "test")}, {}
    if cut["val"] and not cut["test"]:
        return {**cut, "val": [], "test": cut["val"]}, ["no test split: val is used as test"]
    if "all" not in rows or whole:
        return {**cut, **({whole: sorted(rows["all"])} if "all" in rows else {})}, []
    for path, label in sorted(rows["all"]):
        groups.setdefault(label, []).append(path)
    for label, paths in sorted(groups.items()):
        paths = random.Random(0).sample(paths, len(paths))
        train = max(1, round(0.5 * len(paths)))
        val = train + max(0, min(round(0.2 * len(paths)), len(paths) - train - 1))  # test first
        for split, part in zip(cut, (paths[:train], paths[train:val], paths[val:]), strict=True):
            cut[split] += [(path, label) for path in part]
    return cut, ["no splits were given: each class is cut 50/20/30 by a fixed permutation"]


def list_path(path, whole=None):
    """A folder, table, zip or split file of the user's own -> Source."""
    store, suffix, notes = ImageStore(path), path.suffix.lower(), []
    lists = [path] if suffix == ".json" else list(path.glob("split_zhou_*.json"))
    if len(lists) == 1:
        home, rows = lists[0].parent, read_coop_split(lists[0])
        name = next((n for n in KNOWN if KNOWN[n]["split"] == lists[0].name), lists[0].stem)
        source = Source(name, str(home), store, *rows)
        return find_images(source, [home], KNOWN[name]["images"] if name in KNOWN else "")
    inner = [name for name in store.names() if name.endswith(TABLE_SUFFIXES) and "/" not in name
             ] if suffix == ".zip" else []
    if suffix in TABLE_SUFFIXES:
        store, rows = ImageStore(path.parent), read_labels(path)
    elif inner:
        rows = read_labels(inner[0], store.read(inner[0]))
    elif path.is_dir() or suffix == ".zip":
        rows, notes = read_class_folders(store)
    else:
        raise DataError(f"{path}: expected a folder, .csv, .tsv, .jsonl, .zip or a split .json")
    try:
        rows, classnames = number_classes(rows)
        rows, more = complete_splits(rows, whole)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    classnames, said = readable_names(classnames, path)
    return Source(path.stem, str(path), store, rows, classnames, notes + said + more)


# -----------------------------------------------------------------------------
# The published data sets

KNOWN = json.loads((ASSETS / "datasets.json").read_text("utf-8"))["sets"]  # "about" explains them
TEMPLATES = {"demo": "a centered satellite photo of {}.",
             **{name: KNOWN[name].get("template", ANY_TEMPLATE) for name in KNOWN}}


def dataset_name(text):
    """Any usual spelling of a published data set -> our name, or None, as for any path."""
    text = os.fspath(text)
    plain = re.sub(r"[^a-z0-9]", "", text.lower())
    names = {re.sub(r"[^a-z0-9]", "", spelling): name for name in KNOWN
             for spelling in (name, *KNOWN[name].get("spellings", []))}
    return None if "/" in text or os.sep in text else names.get(plain)


def find_images(source, homes, folder):
    """A Source with the ImageStore that holds its paths: `folder` under the first of `homes` where
    some lie, else a zip in the first home, else the first folder, for messages to name."""
    places = [ImageStore(home / folder) for home in homes]
    for archive in sorted(homes[0].glob("*.zip")):
        places += [ImageStore(archive, prefix) for prefix in (f"{folder}/", "")]
    found = (place for place in places if place.has_some(source.paths()))
    return source._replace(store=next(found, places[0]))


def read_aircraft(home):
    """FGVC-Aircraft's own lists, which CoOp takes -> rows, classnames: a label is a line number."""
    def lines(name):
        return [line.strip() for line in read_text(home / name).splitlines() if line.strip()]
    order, rows = lines("variants.txt"), {}
    for split in ("train", "val", "test"):
        pairs = [line.split(" ", 1) for line in lines(f"images_variant_{split}.txt")]
        rows[split] = [(f"{image}.jpg", order.index(variant)) for image, variant in pairs]
    return rows, order


def list_known(name, data_dir):
    """One of the published data sets -> Source. Needs its lists only, and most of CoOp's are
    bundled in assets/coop_splits; images may be absent. ImageNet's val doubles as test, as in CoOp,
    and its four shifts are test only; their files are sorted, unlike CoOp's, so that a seed means
    the same shots on every machine."""
    known = KNOWN[name]
    homes, file = [data_dir / folder for folder in known["folders"]], known["split"]
    home = next((home for home in homes if (home / file).is_file()), homes[0])
    bundled = ASSETS / "coop_splits" / f"{file}.xz"
    if file == WORDS and read_words(home):
        source = list_path(home / known["images"], whole="test")
        test = {"val": source.rows["test"]} if name == "imagenet" else {}
        return source._replace(name=name, rows={**source.rows, **test})
    if name == "fgvc_aircraft" and (home / file).is_file():
        lists = read_aircraft(home)
    elif (home / file).is_file():
        lists = read_coop_split(home / file)
    elif bundled.is_file():
        lists = read_coop_split(bundled, lzma.decompress(bundled.read_bytes()))
    else:
        raise DataError(f"{name}: {home / file} is missing, and nothing is put in its place; get "
                        f"{known['link']}, and the images into {home / known['images']}")
    return find_images(Source(name, str(home), None, *lists), homes, known["images"])


def fetch_images(name, data_dir):
    """Let torchvision download a published data set, md5 checked, into its own folder under
    data_dir, unless some of its images are there. Says what it does. Raises DataError."""
    known = KNOWN[name]
    try:
        source = list_known(name, data_dir)
        if "fetch" not in known or source.store.has_some(source.paths()):
            return
    except DataError:
        if name != "fgvc_aircraft":  # whose lists come with its images
            raise
    print(f"{name}: no images under {data_dir}; fetching {known['size']} to there, once",
          file=sys.stderr, flush=True)
    try:
        getattr(import_torchvision("datasets"), known["fetch"])(str(data_dir), download=True)
    except ImportError:
        pass  # scipy, which torchvision wants for labels that are not needed here
    except Exception as error:
        raise DataError(f"{name}: the download failed ({one_line(error)}); try again, or put the "
                        f"files under {data_dir} by hand") from error


# -----------------------------------------------------------------------------
# Opening any of them

def expanded(path):
    return pathlib.Path(os.path.expandvars(os.path.expanduser(os.fspath(path))))


def find_path(text, data_dir):
    """A path as typed, or one under `data_dir`, or "demo" -> Path. Raises DataError."""
    path = ASSETS / "demo.zip" if text == "demo" else expanded(text)
    places = dict.fromkeys((path, expanded(data_dir) / path))
    found = [place for place in places if place.exists()]
    if not found:
        near = nearest(path.name, [*KNOWN, "demo"]) if len(path.parts) == 1 else ""
        raise DataError(f"there is no file or folder {', nor '.join(map(str, places))}{near}")
    return found[0]


def list_dataset(name_or_path, data_dir="data", whole=None):
    """All splits of what open_dataset takes -> Source. Raises DataError."""
    if name := dataset_name(name_or_path):
        return list_known(name, expanded(data_dir))
    return list_path(find_path(name_or_path, data_dir), whole)


def open_dataset(name_or_path, split, data_dir="data", classes=None, download=True, whole=False):
    """A data set by name, or one's own folder, CSV/TSV/JSONL, zip or CoOp split file -> ImageSet.

    split "train", "val" or "test". `classes` (names) narrows and renumbers. No image is touched,
    but with `download` a published set of which no image is there is fetched first: with several
    processes, on one of them only. `whole` gives all of one's own data without splits to the split
    asked for. A published name wins over a folder of that name; write ./dtd for the folder. Raises
    DataError.
    """
    if split not in ("train", "val", "test"):
        raise DataError(f"split {split!r}: expected train, val or test")
    if download and (name := dataset_name(name_or_path)):
        fetch_images(name, expanded(data_dir))
    images = ImageSet(list_dataset(name_or_path, data_dir, split if whole else None), split)
    return images.select(find_classes(images.classnames, classes)) if classes else images


def add_data_flags(parser):
    """The flags with which a script chooses labelled images."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="demo", help="a data set by name (dtd, eurosat, ...), a "
                       "folder of class folders, a zip, or a CSV/TSV/JSONL file (default: demo)")
    group.add_argument("--data-dir", default="data", help="where the named data sets lie "
                       "(default: data)")
    group.add_argument("--no-download", action="store_true",
                       help="refuse rather than fetch images that are not there")
    group.add_argument("--classes", nargs="+", metavar="NAME", help="train and test on these only")
    group.add_argument("--template", action="append", metavar="TEXT", help="prompt with {} for the "
                       "class; give several for their mean (default: the paper's one)")
    return group
