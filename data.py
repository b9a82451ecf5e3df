"""Labelled images: by name, from a folder, a table or a zip; few-shot lists; tables.

    train = open_dataset("dtd", "train", data_dir="data")        # CoOp's lists, in their order
    shots = few_shot(train, shots=4, seed=1).preload()           # the published shots, decoded once
    loader = make_loader(shots.with_transform(Preprocess(224, train=True, seed=1)), 32, seed=1)
    for images, labels, indices in loader:                       # uint8 (B, 3, 224, 224), (B,) (B,)
        images = normalise(images)                               # float32, on any device

Names of images.py can be imported from here. What is not understood is refused, never guessed.
"""
import collections
import contextlib
import csv
import difflib
import functools
import hashlib
import io
import json
import lzma
import os
import pathlib
import posixpath
import random
import re
import shutil
import sys
import unicodedata

from fetch import fetch, only_one
from files import expanded, one_line
from images import (Batches, CLIP_MEAN, CLIP_STD, DataError, EXTRAS, folder_splits,  # noqa: F401
                    IMAGE_SUFFIXES, Images, ImageStore, import_torchvision, is_image, leaves_folder,
                    Loader, locate, LostWorker, NO_PHOTO, normalise, note_leaks, Preprocess,
                    read_image, sample_seed, Source, split_of, split_word, SPLITS, UnreadableImage)

ASSETS = pathlib.Path(__file__).resolve().parent / "assets"
DEMO = ASSETS / "demo.zip"


# -----------------------------------------------------------------------------
# Text files and tables

NO_TEXT = {  # how other files begin
    b"pk\3\4": "a zip or an Excel workbook: export the sheet as CSV",
    b"par1": "Parquet: write it as CSV or JSONL", b"arrow1": "an Arrow file: write it as JSONL",
    b"\x1f\x8b": "gzipped: unpack it", (b"\xff\xfe", b"\xfe\xff"): "UTF-16: save it as UTF-8",
    (b"<!doctype", b"<html"): "a web page: fetch the file itself",
    b"version https://git-lfs": "a Git LFS pointer: run git lfs pull"}
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl")
IMAGE_COLUMNS = ("image", "filepath", "file_name", "filename", "path", "image_path", "image_name",
                 "file", "image_id")
SPLIT_COLUMNS = ("subset", "partition", "phase", "set")
SPLIT_FLAG = re.compile(r"((is|in)_)?(train|test|val)(ing|id|idation)?(_?(image|set|data|list))?s?|"
                        r"\w*split")  # what is so called is there to tell splits
QUOTED_CELL = re.compile(r'(?:^|(?<=\t))"(?:[^"]|"")*"(?=\t|\r?$)', re.MULTILINE)
# In a cell of several lines, what looks like the row of another image: a quote never closed.
NAME = r"[^\n{0}]+(%s)\s*" % "|".join(map(re.escape, IMAGE_SUFFIXES))
SWALLOWED = rf"\n{NAME}{{0}}|{{0}}{NAME}[\n{{0}}]"
EMPTY = re.compile(r"(?i:nan)?|<NA>|#N/A|NULL")  # what pandas, Excel and SQL write for nothing
csv.field_size_limit(1 << 24)    # captions of a megabyte exist


def read_text(path, content=None):
    """A text file (or its bytes), with or without a byte-order mark. Raises DataError."""
    try:
        content = pathlib.Path(path).read_bytes() if content is None else content
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); a file was expected") from None
    for begin, kind in NO_TEXT.items():
        if content[:40].lower().startswith(begin):
            raise DataError(f"{path} is {kind}")
    try:
        text, bad = content.decode("utf-8-sig"), content.find(b"\0")
    except UnicodeDecodeError as error:
        bad = error.start
    if bad >= 0:
        raise DataError(f"{path}, line {content.count(10, 0, bad) + 1}: no UTF-8 text; save it as "
                        f"UTF-8")
    return text


def table_rows(path, content, known, own=(None, None), captions=False):
    """A table of images and their classes or captions -> [(line, image, cell, split or "all")].
    `known`: what the second column may be called; own: the user's names of both, or None. Surplus
    delimiters belong to captions, as read_table says. Raises DataError."""
    wanted = [(name.lower(),) if name else names
              for name, names in zip(own, (IMAGE_COLUMNS, known), strict=True)]
    columns, records = read_table(path, content, join=wanted[1] if captions else ())
    if not records:
        raise DataError(f"{path} has a header and no rows")
    texts = {column: tuple(str(record.get(column) or "").strip() for _, record in records)
             for column in columns}
    images, values, splits = found = choose_columns(texts, *wanted, captions)
    several = [competing for competing in found if len(competing) > 1]
    if not images or not values or several:
        cure = "; choose with --image-column, --caption-column or --caption-file" * captions
        cure = f"; these compete, rename or remove some: {several}" * bool(several) + cure
        raise DataError(f"{path} is not understood: its first line, {columns[:9]}, should name one "
                        f"column of {list(wanted[0])} and one of {list(wanted[1])}{cure}")
    for column in ("folder", "folder_name", "subfolder", "dir", "directory"):
        if column in texts and is_finer(texts[column], texts[images[0]]):
            raise DataError(f"{path}: images of one name in different folders, by the column "
                            f"{column}; write folder/name into the column {images[0]}")
    rows, split_column = [], splits[0] if splits else "split"
    for line, record in records:
        image, word = record.get(images[0]), record.get(split_column)
        split = "all" if word in (None, "", "all") else isinstance(word, str) and split_word(word)
        if not split or not isinstance(image or "", str):
            raise DataError(f"{path}, line {line}: expected the path of an image, and train, val "
                            f"or test in the column {split_column}, if that tells splits; "
                            f"found {str(record)[:80]}")
        image = (image or "").strip().replace("\\", "/")
        rows.append((line, image and posixpath.normpath(image), record.get(values[0]), split))
    return rows


def choose_columns(texts, image_names, value_names, captions):
    """{column: cells} -> the columns of images, of classes or captions, of splits: several compete.
    Words count before codes for them, and names of files; columns of equal cells are one."""
    def different(columns, part=str):
        if len(columns) < 2:  # the parts of a large table take time
            return columns
        found = {tuple(map(part, texts[column])): column for column in reversed(columns)}
        return list(found.values())[::-1]
    images = [name for name in image_names if name in texts]
    values = [name for name in value_names if name in texts]
    splits = split_columns(texts, images + values)
    images = [name for name in images if any(map(is_image, texts[name]))] or images
    images = [name for name in images if all(texts[name])] or images
    words = [name for name in values if not all(map(CODE.fullmatch, texts[name]))]
    if words and not captions:  # codes that tell apart what has one word compete with it
        words += [name for name in values
                  if name not in words and is_finer(texts[name], texts[words[0]])]
    return (different(images, lambda path: pathlib.PureWindowsPath(path).stem),
            different(words or values), different(splits))


def is_finer(cells, others):
    """Whether rows with equal cells in `others` have different ones in `cells`."""
    return len(set(zip(cells, others))) > len(set(others))


def split_columns(texts, taken):
    """The columns that tell splits, of {column: cells} without those `taken`: "split", else those
    of words that name two of them, or one in SPLIT_COLUMNS, else a SPLIT_FLAG of yes and no."""
    if "split" in texts:
        return ["split"]
    named, flags = [], []
    for key in texts.keys() - {*taken}:
        cells = set(texts[key])
        if len(cells) >= 10:
            continue
        words = set(map(split_word, cells)) - {None}
        usual = key in SPLIT_COLUMNS and (words or cells <= {"0", "1", "2"})
        yes_no = {*map(str.lower, cells)} <= {"", "0", "1", "true", "false", "yes", "no"}
        differ = len(cells) > 1 or key.startswith("is_")
        if usual or len(words) > 1:
            named.append(key)
        elif SPLIT_FLAG.fullmatch(key) and differ and (words or yes_no):
            flags.append(key)
    return sorted(named or flags)


def read_table(path, content=None, join=()):
    """A CSV, TSV, JSONL or JSON table (or its bytes) -> columns, [(line, {column: value})].
    The content tells the kind. Columns are stripped and in lower case, values as written. A row has
    as many fields as the header; but with two columns of which the last is in `join`, delimiters
    that an unquoted row has too many belong to that cell. Raises DataError with the line."""
    text = read_text(path, content)
    try:
        if text.lstrip()[:1] in ("[", "{"):
            rows = list(json_rows(text))
            return list(dict.fromkeys(key for _, row in rows for key in row)), rows
        header, *rows = delimited_rows(text, join) or [(1, [""])]
    except ValueError as error:
        raise DataError(f"{path}, {error}") from None
    columns = [name.strip().lower() for name in header[1]]
    if any(columns.count(name) > 1 for name in columns if name):
        raise DataError(f"{path}, line {header[0]}: two columns of one name among {columns}")
    for line, cells in rows:  # a nameless index before the others is usual
        if odd := [cell for name, cell in zip(columns[1:], cells[1:]) if not name and cell.strip()]:
            raise DataError(f"{path}, line {line}: name the column of {odd[0]!r}, or quote texts")
    return columns, [(line, dict(zip(columns, cells, strict=True))) for line, cells in rows]


def columns_of(path, content):
    """The columns of a table's bytes, by their first line alone -> a set; empty of other files."""
    with contextlib.suppress(DataError):
        return {*read_table(path, content.lstrip().partition(b"\n")[0])[0]}
    return set()


def json_rows(text):
    """JSONL, or a JSON list, of objects -> (line or place in the list, {key: value}). A value that
    is an object is a tuple of its (key, value): a dict has only the last of several equal keys."""
    parse = functools.partial(json.loads, object_pairs_hook=tuple)
    listed, number = text.lstrip().startswith("["), 0
    try:
        entries = parse(text) if listed else text.split("\n")  # U+2028 does not end a line
        for number, entry in enumerate(entries, 1):
            if not listed and not entry.strip():
                continue
            pairs, row = entry if listed else parse(entry), {}
            if not isinstance(pairs, tuple):
                raise ValueError(f"a {type(pairs).__name__}")
            for key, value in pairs:
                value = None if value != value else value  # pandas' NaN
                if row.setdefault(key.strip().lower(), value) != value:
                    raise ValueError(f"two values of one name, {key}")
            yield number, row
    except (ValueError, RecursionError) as error:
        where = f"{'entry' if listed else 'line'} {number}: " if number else ""
        raise ValueError(f"{where}{one_line(error)}; expected an object {{...}}") from None


def delimited_rows(text, join):
    """Comma, semicolon or tab, told by the header -> [(line, cells)], the header first. Most TSV is
    written without quotes: there a quote is content, unless all are part of well-formed cells."""
    lines = re.split(r"\r\n|\n|\r", text)
    mark = max(",\t;", key=next(filter(str.strip, lines), "").count)
    plain = mark == "\t" and '"' in QUOTED_CELL.sub("", text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True,
                        quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL)
    swallowed = re.compile(mark if mark == "\t" else SWALLOWED.format(mark), re.IGNORECASE)
    rows, line, width = [], 1, 0
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
            if mark != "\t" and re.search(rf'{mark}\s+"', lines[line - 1]) and any(
                    re.fullmatch(r'\s+".*"\s*', cell) for cell in cells):
                raise csv.Error("a quote follows a blank")
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"line {line}: {error}; a cell with a delimiter, a line break or a quote "
                         f"must stand in quotes, and quotes in it be doubled") from None
    return rows


# -----------------------------------------------------------------------------
# The data set

class ImageSet(Images):
    """Labelled images of one split; items as of Images.

    name, split, root      as opened                     paths       as the split file writes them
    labels                 list of int, 0 .. C-1         classnames  C names, raw
    template               a prompt with {}              counts      images per split as published
    fingerprint            sha256 of the lists of all splits: identifies the data on resume
    notes                  sentences worth telling the user
    """

    def __init__(self, source, split):
        if len(source.classnames) < 2:
            raise DataError("; ".join([f"{source.root}: expected two classes, found "
                                       f"{source.classnames}", *source.notes]))
        paths, labels = zip(*source.part(split))
        super().__init__(source.store, list(paths), list(labels))
        self.classnames = list(source.classnames)
        self.template = TEMPLATES.get(source.name, ANY_TEMPLATE)
        self.introduce(source, split, [self.classnames, source.rows],
                       f"in {len(self.classnames)} classes")

    def subset(self, indices):
        """The same set with only the images at these positions, in this order."""
        chosen = self.with_transform(self.transform)
        chosen.notes = list(self.notes)
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

    def preload(self, limit=1 << 62):
        """Decode every image into memory once (4 bytes per pixel) and return the set itself, but
        for a note beyond `limit` bytes. Unreadable ones are dropped, or refused (refuse_losses)."""
        if self.images:
            return self
        images, lost, size = {}, {}, 0
        for index, path in enumerate(self.paths):
            try:
                images[index] = self.store.image(path)
                size += 4 * images[index].width * images[index].height
            except UnreadableImage as error:
                lost[index] = error
            if size > limit:
                self.notes.append(f"{len(self):,} {self.split} images take over {limit >> 20:,} MB "
                                  f"decoded: they are read again at every use")
                return self
        if lost:
            self.refuse_losses(list(lost), str(next(iter(lost.values()))))
        self.paths = [self.paths[i] for i in images]
        self.labels = [self.labels[i] for i in images]
        self.images = list(images.values())
        return self

    def digest(self):
        """sha256 over the labels and the bytes of the image files, or names of those that cannot
        be read: tells whether a set is still the one that a run began with."""
        total = hashlib.sha256()
        for path, label in zip(self.paths, self.labels, strict=True):
            try:
                content = self.store.read(path)
            except UnreadableImage:
                content = path.encode("utf-8", "surrogateescape")
            total.update(f"{label} {len(content)} ".encode() + content)
        return total.hexdigest()

    def refuse_losses(self, lost, reason):
        """As of Images; a whole class that is lost is refused too."""
        left = {self.labels[i] for i in set(range(len(self))) - set(lost)}
        empty = [self.classnames[label] for label in sorted(set(self.labels) - left)]
        if self.name in KNOWN and len(lost) == len(self):
            flag = "leave out --no-download, or " if "fetch" in KNOWN[self.name] else ""
            reason += f"; {flag}{by_hand(self.name, pathlib.Path(self.root))}"
        also = (f" ({len(empty)} of {len(set(self.labels))} classes are empty: {', '.join(empty)}; "
                f"take others with --classes)" if empty else "")
        return super().refuse_losses(lost, reason, also)


def few_shot(dataset, shots, seed, val=None):
    """`shots` images per class -> the train subset, or (train, val) with min(shots, 4) per class of
    `val`, drawn after train from the same stream. Item for item what CoOp draws (Dassl's
    generate_fewshot_dataset): classes in order of first appearance, random.sample of each, a short
    class whole and in order. ImageNet's val, its test set, comes back whole. Raises DataError."""
    if shots < 0 or seed < 0:
        raise DataError(f"shots {shots}, seed {seed}: expected whole numbers, 0 or more")
    stream = random.Random(seed)
    def draw(part, count):
        chosen, short = [], []
        for label, group in grouped(enumerate(part.labels)).items():
            if len(group) < count:
                short.append(f"{part.classnames[label]} ({len(group)})")
            chosen += group if len(group) < count else stream.sample(group, count)
        subset = part.subset(chosen)
        if short:
            said = f"fewer than {count} {part.split} images, taken whole: {', '.join(short)}"
            subset.notes.append(said)
        return subset
    train = draw(dataset, shots)
    if val is None:
        return train
    return train, (val if val.name == "imagenet" else draw(val, min(shots, 4)))


def make_loader(dataset, batch_size, seed=0, shuffle=True, drop_last=None, rank=0, world_size=1,
                workers=0, **options):
    """DataLoader over an ImageSet with a transform; `loader.batch_sampler` is the Batches. The
    global `batch_size`. A worker that dies or is silent for `timeout` (600) s raises LostWorker."""
    batches = Batches(len(dataset), batch_size, seed, rank, world_size, shuffle, drop_last)
    return Loader(dataset, batches, workers, **options)


# -----------------------------------------------------------------------------
# Class names and prompts

ANY_TEMPLATE = "a photo of a {}."
WORDS = "classnames.txt"       # CoOp's: lines of wnid and name
WNID = re.compile(r"(?<![^\W_])n\d{8}(?!\d)")   # how ImageNet names its folders
CODE = re.compile(r"(?i)n\d{8}|(class|label|category|id)?[\W_]*\d[\d.]*|" + EMPTY.pattern)
NUMBER = re.compile(  # before words, or a WordNet id behind them
    r"(?i)^(?:(?:class|label|category|id)?[\W_]*(\d+)|n\d{8})[\W_]+(?=[^\W\d_])|[\W_]+n\d{8}$")


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
    known = grouped(enumerate(map(cleaned, classnames)))  # ImageNet has two "missile"
    for name in wanted:
        if cleaned(name) not in known:
            raise DataError(f"no class {name!r} among the {len(classnames)}{nearest(name, known)}")
    return [label for name in dict.fromkeys(map(cleaned, wanted)) for label in known[name]]


def halves(labels):
    """Labels of the train list -> (base, new): the first ceil(C/2) of the sorted ones, the rest."""
    ordered = sorted(set(labels))
    middle = (len(ordered) + 1) // 2
    return ordered[:middle], ordered[middle:]


def find_words(home):
    """classnames.txt in `home`, near it or in an imagenet folder near it, or None."""
    home = pathlib.Path(home).absolute()
    near = [folder / known / WORDS for folder in (home, *home.parents[:3])
            for known in (".", "imagenet")]
    return next(filter(pathlib.Path.is_file, near), None)


def readable_names(names, home):
    """Folder names -> what a prompt can say of them, notes. 001.Black_footed_Albatross loses its
    number; n01440764, and numbers alone, become words if classnames.txt is near."""
    codes = all(map(CODE.fullmatch, names))
    table = find_words(home) if codes else None
    lines = [line.strip().partition(" ") for line in read_text(table).splitlines()] if table else []
    words = {wnid: name.strip() for wnid, _, name in lines if name.strip()}
    if "imagenetv2" in str(home).lower():  # its folders are line numbers
        words = {str(line): name for line, name in enumerate(words.values())}
    if words and set(names) <= set(words):
        return [words[name] for name in names], [f"class names are those of {WORDS}"]
    bare, found = [NUMBER.sub("", name) for name in names], [NUMBER.search(name) for name in names]
    numbers = [match[1] for match in found if match and match[1]]
    counted = sorted(map(int, numbers)) in ([*range(len(names))], [*range(1, len(names) + 1)])
    padded = len(set(map(len, numbers))) == 1 and any(number[0] == "0" for number in numbers)
    attached = all(re.match(r"\d+[._-]", name) for name in names)  # else 1 euro, 2 pounds are words
    if all(found) and (not numbers or counted or padded or attached) and (
            len(set(map(cleaned, bare))) == len(names)):
        return bare, [f"the numbers before the class names are left out: {names[0]} -> {bare[0]}"]
    joined = [name for name in names if re.search("[a-z][A-Z]", name)]
    notes = [f"class names are codes such as {names[0]}"] * codes
    return names, notes + [f"class names such as {name} are asked as one word; rename them with _ "
                           f"between words" for name in joined[:1] if 2 * len(joined) >= len(names)]


def require_words(images):
    """Raise DataError if classes of an ImageSet are named by WordNet ids, as the folders of
    ImageNet are: prompts like "a photo of a n01440764." score at chance."""
    if ids := list(filter(WNID.search, images.classnames)):
        raise DataError(f"{images.root}: no prompt can be made of classes named like {ids[0]!r}; "
                        f"put CoOp's {WORDS} (wnid and name) there")


# -----------------------------------------------------------------------------
# The user's own data: class folders, tables, zips, split files

LABEL_COLUMNS = ("classname", "class_name", "label_name", "category_name", "class", "category",
                 "label")
NO_CLASS = re.compile(
    r"(?!(with|without|no)[ _-])(.+[ _-])?(train|val|valid|test|pred|image|img|photo|picture|jpe?g|"
    r"batch|fold|caption|annotation|label|mask|segmentation|depth)(e?s|ing|idation|images|class|"
    r"object)?([ _-].+|\d+)?", re.IGNORECASE)
KIND = "(mask|seg|segmentation|label|gt|depth|annot|annotation|bbox|overlay|heatmap)s?"
MASK = re.compile(rf"(?P<at>.*/)?((?P<of>.+)[ ._-]{KIND}([ ._-]?\d+)?|{KIND}[ ._-](?P<of_it>.+))",
                  re.IGNORECASE)


def read_coop_split(path):
    """{"train": [[path, label, class name], ...], "val": ..., "test": ...} -> rows, classnames."""
    content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else None
    text, names, labels, rows = read_text(path, content), {}, {}, {}
    try:
        listed = json.loads(text)
        if not isinstance(listed, dict) or not {"train"} <= set(listed) <= set(SPLITS):
            raise ValueError(f"it holds {', '.join(map(str, listed))[:60]}")
        for split in SPLITS:
            rows[split] = [(image, label) for image, label, _ in listed.get(split, [])]
            for image, label, name in listed.get(split, []):
                sound = type(label) is int and name.strip() and not leaves_folder(image)
                if not sound or (names.setdefault(label, name) != name
                                 or labels.setdefault(image, label) != label):
                    raise ValueError(f"bad entry {[image, label, name]} in {split}")
        if sorted(names) != list(range(len(names))) or len(set(names.values())) < len(names):
            raise ValueError("labels must run from 0 without a gap, each with its own name")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is not a split file ({one_line(error)}); expected train, val and "
                        f"test lists of [relative path, label, class name]") from None
    return rows, [names[label] for label in sorted(names)]


def read_labels(path, content=None):
    """A table of images and class names -> {split or "all": [(path, class name)]}. `content` is
    that of a table in a zip, whose paths must stay there. Raises DataError."""
    rows = {}
    for line, image, cell, split in table_rows(path, content, LABEL_COLUMNS):
        label = "" if isinstance(cell, (list, tuple, bool, type(None))) else str(cell).strip()
        outside = ".." in image.split("/") or content and leaves_folder(image)
        if not image or outside or EMPTY.fullmatch(label) or label[0] in "[{":
            raise DataError(f"{path}, line {line}: expected an image under its folder and the name "
                            f"of its class, found {image!r} and {cell!r}")
        rows.setdefault(split, []).append((image, label))
    return rows


def read_class_folders(store):
    """<class>/<image> or <split>/<class>/<image>, any depth below the class -> rows as read_labels,
    notes. A tree that holds something else raises DataError."""
    names, unread = [name.split("/") for name in store.names()], []  # a directory ends in ""
    while True:
        tops = {parts[0] for parts in names if len(parts) > 1}
        depths = [len(parts) for parts in names if is_image(parts[-1])]
        if len(tops) != 1 or split_word(min(tops)) or min(depths, default=0) <= 2:
            break
        unread += [store.prefix + parts[0] for parts in names if len(parts) == 1]
        store.prefix += min(tops) + "/"  # through a lone folder around it all, as zips often have
        names = [parts[1:] for parts in names if parts[1:] not in ([], [""])]
    level = int(any(split_word(parts[0]) == "train" and parts[2:] not in ([], [""])
                    for parts in names))
    # inner: of a class, its folders with images; "" is itself. masks: those with something else
    rows, inner, masks = {}, {}, set()
    for *folders, file in names:
        path = "/".join([*folders, file])
        split = split_word("".join(folders[:1])) if level else "all"
        name, *below = folders[level:] or [""]
        if split and name:
            inner.setdefault(name, set())
        if split and name and is_image(file):
            rows.setdefault(split, []).append((path, name))
            own = [at for at in below if not at.isdecimal() and not NO_CLASS.fullmatch(at)]
            inner[name].add(own[0] if own else "")
            masks |= {f"{name}/{at}" for at in below[:1] if NO_PHOTO.search(at) or split_word(at)}
        elif file:
            unread.append(store.prefix + path)
    refuse_other_trees(store, rows, inner, masks, unread, level)
    notes = [f"{len(unread):,} files are not read for their suffix or place, e.g. {unread[0]}"
             ] if unread else []
    below = set().union(*inner.values())
    notes += [f"folders inside a class, such as {max(below)}, are no classes"] if any(below) else []
    return rows, notes


def refuse_other_trees(store, rows, inner, masks, unread, level):
    """Raise DataError unless what read_class_folders found in its own variables are classes."""
    stems, twins = {os.path.splitext(path)[0] for path in paths_of(rows)}, []
    for match in filter(None, map(MASK.fullmatch, stems)):
        photo = (match["at"] or "") + (match["of"] or match["of_it"])
        twins += [match[0]] * (photo in stems)
    if twins:
        raise DataError(f"{store}: {len(twins):,} images are named as the masks of others, e.g. "
                        f"{min(twins)}; move them out of the folders of classes")
    telling = [name for name in unread if not level and tells_splits(store, name)][:2]
    if telling:
        raise DataError(f"{store}: {telling} may say which images are to train on, and the folders "
                        f"do not: give the table itself, make folders train and test, or move it")
    full = sorted(filter(inner.get, inner))
    taught = {name for _, name in rows.get("train", [])}
    odd = [name for name in full if NO_CLASS.fullmatch(name) and name not in taught]
    too_odd = len(odd) >= (1 if taught else len(full)) or len({*map(split_word, odd)} - {None}) > 1
    below = set().union(*inner.values())
    shared = "" not in below and len(below) < sum(map(len, inner.values()))  # by several classes
    # Several folders in each class, and no number in their names: they are the classes, perhaps.
    nested = full and "" not in below and all(
        len(inner[name]) > 1 and not re.search(r"\d", "".join(inner[name])) for name in full)
    if len(full) < len(inner) or too_odd or shared or nested or masks:
        tables = [name for name in unread if name.lower().endswith(TABLE_SUFFIXES)][:2]
        raise DataError(f"{store}: expected <class>/<image> or train/<class>/<image>, each class "
                        f"with images; found {sorted(set(inner) - set(full))[:3]} without, "
                        f"{[*sorted(masks), *full][:3]} with images or with folders of them" +
                        ", which may be the classes: a table can say it" * bool(nested) +
                        f", and {tables}, which could be read by its path" * bool(tables))


def tells_splits(store, name):
    """Whether a file beside folders of classes looks as if it said which images are for training:
    by its name, or by a column of the table in it."""
    stem, suffix = os.path.splitext(os.path.basename(name).lower())
    if suffix in (*TABLE_SUFFIXES, ".txt") and SPLIT_FLAG.fullmatch(stem):
        return True
    if suffix not in TABLE_SUFFIXES:
        return False
    columns = columns_of(name, ImageStore(store.path).read(name))
    return columns.intersection(IMAGE_COLUMNS) and any(
        key in SPLIT_COLUMNS[:3] or SPLIT_FLAG.fullmatch(key) and key[:3] != "val"
        for key in columns)  # "set" and "valid" have other meanings too


def number_classes(rows):
    """rows with class names -> rows with labels, classnames. Sorted by name, by value if all are
    numbers. Two names that differ only by case or `_` raise DataError."""
    names = {name for entries in rows.values() for _, name in entries}
    numeric = all(name.isdecimal() for name in names)
    names = sorted(names, key=lambda name: (int(name) if numeric else 0, name))
    uses = collections.Counter(map(cleaned, names))
    if same := [name for name in names if uses[cleaned(name)] > 1]:
        raise DataError(f"class names {same[:4]} read the same; rename or merge them")
    for name in names:
        parts = re.split(r"\s*[|,;]\s*", name)
        if len(parts) > 1 and set(parts) <= set(names):
            raise DataError(f"the class {name!r} joins others; expected one class for each image")
    label = {name: position for position, name in enumerate(names)}
    return {split: [(path, label[name]) for path, name in entries]
            for split, entries in rows.items()}, names


def complete_splits(rows, whole=None):
    """Give user data its three splits, and notes. Rows without any go to the split `whole`, or
    those that folders name, or are cut 50/20/30 per class; a val without a test is the test."""
    rows = {split: list(dict.fromkeys(entries)) for split, entries in rows.items()}
    uses = collections.Counter(path for entries in rows.values() for path, _ in entries)
    if twice := [path for path, count in uses.items() if count > 1]:
        raise DataError(f"{len(twice)} images are in two splits or classes, e.g. {twice[0]}; list "
                        f"each once, or the score counts what was trained on")
    if "all" in rows and len(rows) > 1:
        raise DataError(f"{len(rows['all'])} rows name no split and others do; fill the column")
    rest = rows.pop("all", [])
    in_folders = {} if whole else folder_splits([path for path, _ in rest])
    taught = {label for path, label in rest if in_folders.get(path) == "train"}
    if in_folders and taught == {label for _, label in rest}:  # else they are the names of classes
        for path, label in rest:
            rows.setdefault(in_folders[path], []).append((path, label))
        rest = []
    rows = {split: rows.get(split, []) for split in SPLITS}
    if rows["val"] and not rows["test"]:
        return {**rows, "val": [], "test": rows["val"]}, ["no test split: val is used as test"]
    if whole and rest:
        rows[whole] = sorted(rest)
    if whole or not rest:
        return rows, []
    for label, paths in sorted(grouped(sorted(rest)).items()):
        paths = random.Random(0).sample(paths, len(paths))
        train = max(1, round(0.5 * len(paths)))
        val = train + max(0, min(round(0.2 * len(paths)), len(paths) - train - 1))  # test first
        for split, part in zip(SPLITS, (paths[:train], paths[train:val], paths[val:]), strict=True):
            rows[split] += [(path, label) for path in part]
    return rows, ["no splits were given: each class is cut 50/20/30 by a fixed permutation"]


def grouped(pairs):
    """[(item, label)] -> {label: items}, labels in order of first appearance."""
    groups = {}
    for item, label in pairs:
        groups.setdefault(label, []).append(item)
    return groups


def paths_of(rows):
    return [path for entries in rows.values() for path, _ in entries]


def list_path(path, whole=None):
    """A folder, table, zip or split file of the user's own -> Source."""
    store, suffix, notes = ImageStore(path), path.suffix.lower(), []
    lists = [path] if suffix == ".json" else list(path.glob("split_zhou_*.json"))
    if len(lists) == 1:
        name = next((n for n in KNOWN if KNOWN[n]["split"] == lists[0].name), lists[0].stem)
        rows, classnames = read_coop_split(lists[0])
        home, folder = lists[0].parent, KNOWN.get(name, {}).get("images", "")
        store = locate(home, paths_of(rows), home / folder)
        return Source(name, str(home), store, rows, classnames, note_leaks(rows))
    members = store.names() if suffix == ".zip" else ()
    inner = [name for name in members if name.lower().endswith(TABLE_SUFFIXES) and "/" not in name]
    if len(inner) > 1:  # others may lie beside that of the images and their classes
        columns = {name: columns_of(name, store.read(name)) for name in inner}
        inner = [name for name, found in columns.items()
                 if found & {*IMAGE_COLUMNS} and found & {*LABEL_COLUMNS}]
    if suffix in TABLE_SUFFIXES:
        rows = read_labels(path)
        store = locate(path.parent, paths_of(rows), split=split_of(path.name))
    elif len(inner) == 1:
        rows = read_labels(inner[0], store.read(inner[0]))
        store = locate(path, paths_of(rows), split=split_of(inner[0]))
    elif path.is_dir() or suffix == ".zip" and not inner:
        rows, notes = read_class_folders(store)
    else:
        raise DataError(f"{path}{inner or ''}: expected a folder, .zip, one .csv, .tsv or .jsonl, "
                        f"or a split .json")
    try:
        rows, classnames = number_classes(rows)
        rows, more = complete_splits(rows, whole)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    classnames, said = readable_names(classnames, path)
    name = "own_demo" if path.stem == "demo" and path != DEMO else path.stem  # has no recipe
    return Source(name, str(path), store, rows, classnames, notes + said + more)


# -----------------------------------------------------------------------------
# The published data sets, and opening any

KNOWN = json.loads((ASSETS / "datasets.json").read_text("utf-8"))["sets"]  # "about" explains them
DRIVE = "https://drive.google.com/"
TEMPLATES = {"demo": "a centered satellite photo of {}.",
             **{name: KNOWN[name].get("template", ANY_TEMPLATE) for name in KNOWN}}


def dataset_name(text):
    """Any usual spelling of a published data set -> our name, or None, as for any path."""
    text = os.fspath(text)
    plain = re.sub(r"[^a-z0-9]", "", text.lower())
    names = {re.sub(r"[^a-z0-9]", "", spelling): name for name in KNOWN
             for spelling in (name, *KNOWN[name].get("spellings", []))}
    return None if "/" in text or os.sep in text else names.get(plain)


def read_aircraft(file):
    """FGVC-Aircraft's own lists, which CoOp takes -> rows, classnames: a label is a line number."""
    def lines(name):
        listed = read_text(file.with_name(name)).splitlines()
        return [line.strip() for line in listed if line.strip()]
    order, rows = lines(file.name), {}
    for split in SPLITS:
        pairs = [line.split(" ", 1) for line in lines(f"images_variant_{split}.txt")]
        rows[split] = [(f"{image}.jpg", order.index(variant)) for image, variant in pairs]
    return rows, order


def list_known(name, data_dir):
    """One of the published data sets -> Source. Images may be absent. ImageNet's val is also its
    test, as in CoOp; its shifts are test only. Files are sorted: a seed gives the same shots."""
    known, file = KNOWN[name], list_of(name, data_dir)
    likely = [data_dir / folder / known["images"] for folder in known["folders"]]
    home = data_dir / known["folders"][0]
    if not file or file.name == WORDS and not likely[0].exists():
        raise DataError(f"{name}: its list or its images' folder is missing, and nothing is put in "
                        f"its place; {by_hand(name, home)}")
    if file.name == WORDS:
        source = list_path(likely[0], whole="test")
        source.name = name
        if name == "imagenet":
            source.rows["val"] = source.rows["test"]
        return source
    rows, classnames = (read_aircraft if name == "fgvc_aircraft" else read_coop_split)(file)
    return Source(name, str(home), locate(home, paths_of(rows), *likely), rows, classnames)


def list_of(name, data_dir):
    """The list of a published data set, the user's before the bundled one, or class names; None."""
    known = KNOWN[name]
    homes = [data_dir / folder for folder in known["folders"]]
    if known["split"] == WORDS:
        return find_words(homes[0])
    lists = [home / known["split"] for home in homes]
    bundled = ASSETS / "coop_splits" / f"{known['split']}.xz"
    return next(filter(pathlib.Path.is_file, [*lists, bundled]), None)


def by_hand(name, home):
    known = KNOWN[name]
    listed = f"{home / known['split']} from {known['link']} and " if "link" in known else ""
    return f"get {listed}its images from {known['archive']} into {home / known['images']}"


def lacks(name, data_dir):
    """What of a published data set is to be fetched first: "list", "images" or ""."""
    known = KNOWN[name]
    if not list_of(name, data_dir) and "link" in known:  # fgvc_aircraft's come with its images
        return "list" if known["link"].startswith(DRIVE) else "images"
    source = list_known(name, data_dir) if "fetch" in known else None
    return "images" if source and not any(map(source.store.has, paths_of(source.rows))) else ""


def fetch_missing(name, data_dir):
    """Get what a published data set lacks: its list, or class names, from where CoOp keeps them;
    its images, if none is there, by torchvision. One process fetches, others wait. DataError."""
    known, new, done = KNOWN[name], data_dir / f".{name}.new", data_dir / f".{name}.done"
    if not lacks(name, data_dir) and not done.exists():
        return
    try:
        with only_one(data_dir / f".{name}"), contextlib.ExitStack() as at_end:
            at_end.callback(shutil.rmtree, new, ignore_errors=True)
            for what, size in (("list", known["split"]), ("images", known.get("size"))):
                if lacks(name, data_dir) == what and not done.exists():
                    shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
                    print(f"{name}: no {what} under {data_dir}; fetching {size} to there, once",
                          flush=True)
                    fetch_part(what, known, new)
                    os.rename(new, done)  # only what is whole is moved in, also by the next process
                if done.exists():
                    shutil.copytree(done, data_dir, copy_function=shutil.move, dirs_exist_ok=True)
                    shutil.rmtree(done)
    except Exception as error:
        raise DataError(f"{name}: the download failed ({one_line(error)}); try again, or "
                        f"{by_hand(name, data_dir / known['folders'][0])}") from error


def fetch_part(what, known, new):
    """Fetch the "list" or the "images" of a published data set into the folder `new`."""
    target = new / known["folders"][0] / known["split"]
    if what == "images":
        with contextlib.suppress(ImportError):  # of scipy, for labels that are not needed here
            getattr(import_torchvision("datasets"), known["fetch"])(str(new), download=True)
    elif problem := fetch(known["link"], target):
        raise DataError(problem)
    elif target.name != WORDS:
        read_coop_split(target)  # or it is a page that asks for something
    elif not WNID.match(read_text(target)):
        raise DataError("what came is no list of class names")


def find_path(text, data_dir, known=KNOWN):
    """A path as typed, or one under `data_dir`, or "demo" -> Path. Raises DataError."""
    path = DEMO if text == "demo" else expanded(text)
    tried = dict.fromkeys((path, expanded(data_dir) / path))
    found = next(filter(pathlib.Path.exists, tried), None)
    if not found:
        near = nearest(path.name, [*known, "demo"]) if len(path.parts) == 1 else ""
        raise DataError(f"there is no file or folder {', nor '.join(map(str, tried))}{near}")
    return found


def list_dataset(name_or_path, data_dir="data", whole=None):
    """All splits of what open_dataset takes -> Source. Raises DataError."""
    if name := dataset_name(name_or_path):
        return list_known(name, expanded(data_dir))
    return list_path(find_path(name_or_path, data_dir), whole)


def open_dataset(name_or_path, split, data_dir="data", classes=None, download=True, whole=False):
    """A data set by name, or one's own folder, CSV/TSV/JSONL, zip or CoOp split file -> ImageSet.

    `classes` (names) narrows and renumbers. `download`: fetch a published set of which no image is
    there. `whole`: one's own data without splits is all of the one asked for. A published name
    wins: write ./dtd for a folder. No image is opened. Raises DataError."""
    if split not in SPLITS:
        raise DataError(f"split {split!r}: expected train, val or test")
    if download and (name := dataset_name(name_or_path)):
        here, home = expanded(name_or_path), expanded(data_dir).resolve()
        if here.exists() and here.resolve().parent != home and lacks(name, home):
            raise DataError(f"{name} is not in {data_dir}, and {name_or_path} is here: write "
                            f"./{name_or_path} for it, or --data-dir . if it is the published one")
        fetch_missing(name, expanded(data_dir))
    images = ImageSet(list_dataset(name_or_path, data_dir, split if whole else None), split)
    return images.select(find_classes(images.classnames, classes)) if classes else images


def add_data_flags(parser):
    """The flags with which a script chooses labelled images."""
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="demo", help="a data set by name (dtd, eurosat, ...), a "
                       "folder of class folders, a zip, or a CSV/TSV/JSONL file (default: demo)")
    group.add_argument("--data-dir", default="data", help="where the named data sets lie "
                       "(default: data)")
    group.add_argument("--no-download", action="store_true", help="refuse rather than fetch images "
                       "that are not there")
    group.add_argument("--classes", nargs="+", metavar="NAME", help="train and test on these only")
    group.add_argument("--template", action="extend", nargs="+", metavar="TEXT", help="prompt with "
                       "{} for the class; of several the mean (default: the paper's one)")
    return group
