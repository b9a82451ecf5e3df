"""Captioned sources: which layout lies there, and which image has which caption.

    source = list_pairs("flickr8k", data_dir="data")             # no image is touched

A source is found (which of LAYOUTS lies there), read (every reader gives a Source), cleaned and
split. What is not understood is refused. No file can run code, and nothing is unpacked.
"""
import collections
import contextlib
import fnmatch
import functools
import glob
import hashlib
import io
import json
import os
import pathlib
import pickle
import re
import tarfile

import numpy as np

import data
from data import columns_of, read_table, read_text, table_rows
from files import expanded, one_line
from images import (DataError, folder_splits, ImageStore, is_image, leaves_folder, locate,
                    note_leaks, Source, SpanStore, split_of, split_word, SPLITS)


# -----------------------------------------------------------------------------
# Caption files: COCO's and Karpathy's JSON, Flickr's lines, tables

def matching(store, *patterns):
    """The names in a folder or zip that match one of some patterns, sorted."""
    if store.zipped:
        return [name for name in store.names() if any(
            fnmatch.fnmatch(name, pattern) and name.count("/") == pattern.count("/")
            for pattern in patterns)]
    found = [glob.glob(pattern, root_dir=store.path) for pattern in patterns]
    return sorted({name.replace(os.sep, "/") for name in sum(found, [])})


CAPTION_COLUMNS = ("caption", "captions", "title", "text")
# Flickr's "name.jpg#0<TAB>caption", or Kaggle's "name.jpg| 0| caption", where one row of Flickr30k
# lacks its second bar; Flickr8k has captions of one image that no copy holds
LINE = re.compile(r"\s*(.+?)(?:#(?:\w+#)?\d+[ \t]|\s*\|\s*\d+(?:\s*\|)?)\s*(.*)")
LINES = re.compile(r"\s*(?![\s\[{])(?:image_name\||[^,\t\n]+#(?:\w+#)?\d+\s)")
NEVER = "2258277193_586949ec62.jpg"
NO_COLUMNS = "leave out --image-column and --caption-column, which name columns of tables"
# Of img2dataset, of Hugging Face's datasets, of Kaggle: about the data, not the data
ABOUT = re.compile(r"(.*/)?(\d+_stats|dataset_(infos?|dict)|dataset-metadata)\.json")


def read_captions(store, names, columns):
    """Caption files, each told by its content. Several are splits by their names, else it is not
    known which one is meant: DataError."""
    source, files = Source(), {}
    for name in names:
        inner = ImageStore(os.path.join(store.path, name)) if name.endswith(".zip") else store
        members = [name] if inner is store else matching(inner, "annotations/captions_*.json")
        files |= {member: inner.read(member) for member in members}
    for name, content in files.items():
        taken = {"all", *source.rows} if len(files) > 1 else ()
        for split, path, text in read_caption_file(name, content, columns):
            split = split_of(name) if split == "all" and taken else split
            if split in taken:
                raise DataError(f"{store} holds {len(files)} caption files whose names are not "
                                f"those of splits: {', '.join([*files][:9])}; choose one with "
                                f"--caption-file")
            source.add(split, [(path, text)])
    for name in matching(store, "Flickr_8k.*Images.txt", "*/Flickr_8k.*Images.txt",
                         "coco-cn_*.txt", "*/coco-cn_*.txt"):
        if (split := split_of(name.replace("Images", ""))) != "all":
            for image in read_text(name, store.read(name)).split():
                source.lists[pathlib.PurePath(image).stem] = split
    return source


def read_caption_file(name, content, columns):
    """One file -> (split or "all", path, caption) for each row."""
    lines, whole = LINES.match(content[:4096].decode("utf-8-sig", "replace")), None
    if lines and not any(columns):
        return read_lines(name, read_text(name, content))
    with contextlib.suppress(ValueError, RecursionError):  # JSON lines, perhaps
        if name.endswith(".json"):  # pandas writes an id as 391895.0
            whole = json.loads(read_text(name, content), parse_float=lambda x: x.removesuffix(".0"))
    listed = isinstance(whole, dict) and "images" in whole
    if any(columns) and (lines or listed):
        raise DataError(f"{name} is no table: {NO_COLUMNS}")
    return read_json(name, whole) if listed else read_pair_table(name, content, columns)


def read_lines(name, text):
    """Flickr's captions, those of Flickr8k-CN, Flickr30k-CN and COCO-CN."""
    for number, line in enumerate(text.split("\n"), 1):
        if match := LINE.match(line):
            image = match[1] if "." in match[1] else f"{match[1]}.jpg"  # COCO-CN: without suffix
            if not image.startswith(NEVER):
                yield "all", image, match[2]
        elif line.strip() and not line.startswith("image_name|"):
            raise DataError(f"{name}, line {number}: expected an image, # or |, and its caption")


def read_json(name, whole):
    """COCO's captions, or a Karpathy split (dataset_coco.json, ...). An image without a caption, or
    a caption without an image, is a row without it."""
    captions = {}
    try:
        for note in whole.get("annotations", ()):
            captions.setdefault(str(note["image_id"]), []).append(note["caption"] + "")  # a text
        named = {(str(image.get("id")), image.get("file_name")) for image in whole["images"]}
        if captions and len(dict(named)) < len(named):
            raise DataError(f"{name}: images of different names have one id; number them through")
        for image in whole["images"]:
            if "annotations" in whole:
                path, split = image["file_name"].replace("\\", "/"), name
                texts = captions.pop(str(image["id"]), [])
            else:
                path = "/".join(filter(None, (image.get("filepath"), image["filename"])))
                split, texts = image["split"], [text["raw"] + "" for text in image["sentences"]]
            yield from ((split_of(split), path, text) for text in texts or [""])
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{name} is not a caption file of COCO or Karpathy ({error!r})") from None
    yield from ((split_of(name), "", text) for texts in captions.values() for text in texts)


def read_pair_table(name, content, columns):
    """CSV, TSV or JSON; "None" and "NA" are captions. A cell may hold several, as a JSON list. The
    images of a metadata.* lie beside it, as Hugging Face's."""
    folder, slash, base = name.rpartition("/")
    folder = folder + slash if base.startswith("metadata.") else ""
    for line, image, cell, split in table_rows(name, content, CAPTION_COLUMNS, columns, True):
        if isinstance(cell, str) and re.match(r'\s*[\[{]\s*["{}\[\]]', cell):
            with contextlib.suppress(ValueError, RecursionError):
                cell = json.loads(cell)
        texts = cell or [""] if isinstance(cell, list) else [cell]
        for text in texts:
            if not isinstance(text or "", str):
                raise DataError(f"{name}, line {line}: expected text as caption, not "
                                f"{str(cell)[:80]}")
            yield split, image and folder + image, text


# -----------------------------------------------------------------------------
# Captions in files of their own: beside each image of a folder, or of WebDataset's tars

def read_beside(store, names, columns, mark="/"):
    """Images with a text of the same name beside each. Splits are the words of top folders, if one
    is train, or (mark ":") of shards. The last resort, and so what refuses unknown sources."""
    names = [name for name in store.names() if not name.endswith("/")]
    source, images = Source(store=store), [name for name in names if is_image(name)]
    stems, lost, several = [os.path.splitext(name)[0] for name in images], [], []
    uses = collections.Counter(stems)  # two: a photo, its mask
    files = {(stem, suffix.lower()): f"{stem}{suffix}"
             for stem, suffix in map(os.path.splitext, names) if uses[stem] == 1}
    split = {name: split_of(name.partition(mark)[0]) for name in images if mark in name}
    split = split if mark == ":" or "train" in split.values() else {}
    for name, stem in zip(images, stems):
        texts = captions_beside(store, stem, files, lines=mark == "/")
        if not texts:
            lost.append(f"{name} (it has no text of its own in UTF-8)")
        if mark == "/" and len(texts) > 1 and (stem, ".json") not in files:
            several.append(stem)
        source.add(split.get(name, "all"), ((name, text) for text in texts))
    if 2 * len(lost) > len(images) or not images:
        unread = sorted(set(names) - set(images), key=lambda name: (name.count("/"), name))
        raise DataError(
            f"{store} holds no captions that are understood; not read: "
            f"{', '.join(unread[:4] + lost[:1])} ({len(unread):,} files, {len(images):,} images). "
            f"Write a CSV of image and caption, or a text beside each image (Parquet, Excel and "
            f"packed files are not read), or take the names of class folders with --layout classes")
    if lost:
        source.notes.append(f"{len(lost):,} images without a caption left out, e.g. {lost[0]}")
    if several:
        source.notes.append(f"each line of a text is a caption: {len(several):,} texts have "
                            f"several, e.g. {several[0]}.txt")
    return source


def captions_beside(store, stem, files, lines):
    """The "captions" of <stem>.json, or its .txt (`lines`: one a line), or "caption" or "text"."""
    held = {}
    for kind in (".json", ".txt"):
        try:
            text = read_text(stem, store.read(files[stem, kind]))
            held |= json.loads(text) if kind == ".json" else {
                "txt": text.splitlines() if lines else text}
        except (KeyError, ValueError, TypeError, RecursionError):
            continue  # there is none, or it does not count
    for key in ("captions", "txt", "caption", "text"):
        texts = held.get(key) if isinstance(held.get(key), list) else [held.get(key)]
        if texts := [text for text in texts if isinstance(text, str) and text.strip()]:
            return texts
    return []


def read_tars(store, names, columns):
    """WebDataset shards: images with .txt or .json under the same key."""
    notes, index = [], {}
    for shard in names:
        file = os.path.join(store.path, shard)
        for name, offset, size in tar_members(file, notes):
            if f"{shard}:{name}" in index:
                raise DataError(f"{file} holds {name} twice; make the shard again")
            index[f"{shard}:{name}"] = (file, offset, size)
    if not index:
        raise DataError("; ".join(notes) or f"{store} holds empty shards")
    source = read_beside(SpanStore(store.path, index), names, columns, mark=":")
    source.store.index = {name: span for name, span in index.items() if is_image(name)}
    source.notes += notes
    return source


def tar_members(file, notes):
    """The plain files of a tar -> (name, offset, bytes). Links, devices, sparse files and names
    that lead out of it are passed over; what follows damage is left out and noted."""
    size = os.path.getsize(file)
    try:
        with tarfile.open(file, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # or it keeps them all
                if member.isreg() and not member.issparse() and not leaves_folder(member.name):
                    if not 0 <= member.size <= size - member.offset_data:
                        raise tarfile.ReadError("it ends inside a file")
                    yield member.name, member.offset_data, member.size
            tar.fileobj.seek(tar.offset)  # a bad header ends the loop like the end mark of zeros
            if tar.fileobj.read(512) != bytes(512):
                raise tarfile.ReadError("no end mark")
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        with open(file, "rb") as damaged:
            if damaged.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ")):
                raise DataError(f"{file} is packed; unpack it: shards are read in place") from None
        notes.append(f"{file} is damaged ({one_line(error)}): only what comes before is used")


SHARDS = re.compile(r"\{(\d+)\.\.(\d+)\}")


def find_shards(text):
    """Names with {0000..0012}, zeros kept, several joined by ::, a folder standing for its tars
    -> their common folder, their names in it. Raises DataError."""
    names, files = text.split("::"), []
    for name in names:  # grows by what {0000..0012} stands for
        path = expanded(name).absolute()
        if group := SHARDS.search(name):
            numbers = range(int(group[1]), int(group[2]) + 1)[:1 << 20]
            names += [name.replace(group[0], f"{n:0{len(group[1])}}", 1) for n in numbers]
        else:
            files += sorted(path.rglob("[!.]*.tar")) if path.is_dir() else [path]
    missing = [str(file) for file in files if not file.is_file()]
    if missing or not files:
        raise DataError(f"{text}: {len(missing)} of {len(files)} shards are missing {missing[:1]}")
    home = pathlib.Path(os.path.commonpath([file.parent for file in files]))
    return home, [file.relative_to(home).as_posix() for file in files]


# -----------------------------------------------------------------------------
# Chinese-CLIP's own files: TSV with JSONL, LMDB

def read_tsv(store, names, columns):
    """<split>_imgs.tsv, "id<TAB>base64" a line (of an id that comes twice the last counts), with a
    <split>_texts.jsonl or MUGE's <split>_queries.jsonl, whose lines are the queries."""
    source = Source(store=SpanStore(store.path, {}, coded=True))
    for name in names:
        file, offset, split = os.path.join(store.path, name), 0, split_of(name)
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                image, tab, content = line.removeprefix(b"\xef\xbb\xbf").partition(b"\t")
                offset += len(line)
                if line.strip() and not tab:
                    raise DataError(f"{file}, line {number}: no tab between an id and its base64")
                if tab:
                    path = f"{name}:{image.decode('utf-8', 'replace').strip()}"
                    source.store.index[path] = (file, offset - len(content), len(content))
                    source.add(split, [(path, "", 0)])
        texts = name.replace("_imgs.tsv", "_queries.jsonl")
        texts = texts if store.has(texts) else name.replace("_imgs.tsv", "_texts.jsonl")
        for number, record in read_table(texts, store.read(texts))[1]:
            text = record.get("text", record.get("query_text"))
            images = record.get("image_ids", record.get("item_ids")) or []
            if not isinstance(text, str) or not isinstance(images, list):
                raise DataError(f'{texts}, line {number}: expected {{"text_id": 1, "text": "...", '
                                f'"image_ids": [2, 3]}}, found {str(record)[:60]}')
            source.add(split, [(f"{name}:{image}", text, number) for image in images]
                        or [("", text, number)])
    return source


@functools.lru_cache(maxsize=None)
def open_lmdb(folder, pid):
    """The LMDB in a folder; each process opens it for itself, once. Raises DataError."""
    try:
        import lmdb
        opened = lmdb.open(folder, readonly=True, lock=False, readahead=False)
        size = (opened.info()["last_pgno"] + 1) * opened.stat()["psize"]
        if size > os.path.getsize(os.path.join(folder, "data.mdb")):
            raise OSError("it breaks off")  # reading beyond the end would kill the process
        return opened.begin()
    except Exception as error:  # there is no lmdb, or one of its own exceptions
        raise DataError(f"the LMDB {folder} cannot be read ({one_line(error)}); pip install lmdb, "
                        f"or use the TSV and JSONL files that it was made of") from None


class LMDBStore(SpanStore):
    """Images in LMDBs, as base64 text under their ids. A path is <folder of the LMDB>:<id>."""

    def raw(self, path):
        folder, _, image = path.partition(":")
        opened = open_lmdb(os.path.join(self.path, folder), os.getpid())
        return opened.get(image.encode()) or b""


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, text and tuples: a pickle runs code through names alone, and finds none."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_lmdb(store, names, columns):
    """<split>/pairs, pickled (image id, text id, text) under "0", "1", ..., and <split>/imgs."""
    source = Source(store=LMDBStore(store.path, {}, coded=True))
    for name in names:
        prefix = name.removesuffix("pairs/data.mdb")
        folder = os.path.join(store.path, prefix)
        split = split_of(os.path.basename(os.path.abspath(folder)))
        images = open_lmdb(os.path.join(folder, "imgs"), os.getpid())
        paths = [f"{prefix}imgs:{key.decode('utf-8', 'replace')}"
                 for key in images.cursor().iternext(values=False) if key != b"num_images"]
        source.store.index |= dict.fromkeys(paths, (os.path.join(folder, "imgs/data.mdb"), 0, 0))
        source.add(split, ((path, "", 0) for path in paths))
        pairs = open_lmdb(os.path.join(folder, "pairs"), os.getpid())
        i = "num_samples"
        try:
            for i in range(int(pairs.get(b"num_samples") or pairs.stat()["entries"])):
                pair = io.BytesIO(pairs.get(b"%d" % i) or b"")
                image, text_id, text = PlainUnpickler(pair).load()
                source.add(split, [(f"{prefix}imgs:{image}", text + "", f"{text_id} {text}")])
        except Exception as error:  # a broken pickle raises anything
            raise DataError(f"{name}: pair {i} is refused and was not run: no (image id, text id, "
                            f"text), {one_line(error)}") from None
    return source


def read_classes(store, names, columns):
    """Labelled images as open_dataset takes them, with captions like "a photo of a <class>." """
    source = data.list_dataset(store.path)
    template = data.ImageSet(source, "train").template  # or it refuses what cannot be trained on
    prompts = data.class_prompts(source.classnames, template)
    source.rows = {split: [(path, prompts[label]) for path, label in rows]
                   for split, rows in source.rows.items()}
    source.notes.append("captions are made of the names of classes")
    return source


# -----------------------------------------------------------------------------
# find -> read -> clean -> split

# What to look for in a folder or zip, in this order: layout -> (patterns, reader)
LAYOUTS = {
    "tsv": (("*_imgs.tsv",), read_tsv),                                        # Chinese-CLIP, MUGE
    "lmdb": (("pairs/data.mdb", "*/pairs/data.mdb", "lmdb/*/pairs/data.mdb"), read_lmdb),
    "coco": (("annotations/captions_*.json", "annotations_trainval*.zip"), read_captions),
    "karpathy": (("dataset_*.json",), read_captions),
    "flickr": (("*[!a].token.txt", "*.token", "results.csv", "*/results.csv"), read_captions),
    "lists": (("imageid.human-written-caption.txt", "*.caption.txt"), read_captions),  # COCO-CN ...
    "imagefolder": (("metadata.jsonl", "metadata.csv", "*/metadata.jsonl", "*/metadata.csv"),
                    read_captions),                                            # Hugging Face's
    "table": (("captions.txt", "*.csv", "*.tsv", "*.jsonl"), read_captions),
    "webdataset": (("*.tar", "*/*.tar"), read_tars),
    "json": (("*.json",), read_captions),
    "nested": (("*/*/metadata.jsonl", "*/*/metadata.csv"), read_captions),     # as imagefolder
    "texts": ((), read_beside),
    "classes": ((), read_classes),
}


def holds_captions(store, name, own):
    """Whether a file has Flickr's lines, or columns of images and captions (own: their names)."""
    content = store.read(name)
    if LINES.match(content[:4096].decode("utf-8-sig", "replace")):
        return True
    columns = columns_of(name, content)
    return all({given.lower()} & columns if given else columns.intersection(names)
               for given, names in zip(own, (data.IMAGE_COLUMNS, CAPTION_COLUMNS)))


def find_captions(path, layout, caption_file, own):
    """A folder, zip or file -> its folder or zip, the layout, the names of its caption files.
    own: the names of the columns, if they are given."""
    home = path if path.is_dir() or path.suffix.lower() == ".zip" else path.parent
    if caption_file:
        return home, "table", [os.path.relpath(home / caption_file, home)]
    if home != path:
        for name, (patterns, _) in LAYOUTS.items():
            for pattern in filter(path.match, patterns):
                home = path.parents[pattern.count("/")]
                return home, name, [path.relative_to(home).as_posix()]
        return home, "table", [path.name]
    store = ImageStore(home)
    tops = {name.partition("/")[0] for name in store.names()} if store.zipped else ()
    inside = [glob.escape(top) + "/" for top in tops if len(tops) == 1]  # a lone folder
    for name, (patterns, _) in LAYOUTS.items():
        found = matching(store, *(top + pattern for pattern in patterns for top in ["", *inside]))
        found = [file for file in found if not ABOUT.fullmatch(file)]
        if name == "json":  # those beside an image are of that image
            stems = {os.path.splitext(file)[0] for file in store.names() if is_image(file)}
            found = [file for file in found if file[:-5] not in stems]
        if found and layout == "auto" and name in ("flickr", "imagefolder", "table"):
            others = {*found, *matching(store, *LAYOUTS["table"][0])}  # which one is meant?
            if len(others) > 1:
                found = [x for x in sorted(others) if holds_captions(store, x, own)] or found
        if found and layout in ("auto", "simple-clip", name):
            if store.zipped and name in ("tsv", "lmdb", "webdataset"):
                raise DataError(f"{home} holds {found[0]}, which is read in place: unpack the zip")
            return home, name, found
    if patterns := LAYOUTS.get(layout, ((),))[0]:
        raise DataError(f"{home} holds no --layout {layout}: expected {', '.join(patterns)}")
    return home, "classes" if layout == "classes" else "texts", []


# A caption without words: numbers (a label, a box), an address, the name of a file, a list as text
NO_WORDS = re.compile(r"[\W\d_]*|\S+://\S+|\S+\.(jpe?g|png|webp|gif)"
                      r"|\w*[\[({]+\s*b?(['\"]).*\2.*[\])}]|b(['\"]).*\3", re.IGNORECASE)


def clean(root, source):
    """Fold the blanks in captions; drop rows without image or caption, and count them. Raises
    DataError if nothing is left, or most captions hold no words; a few that do are noted."""
    dropped, captions = 0, []
    for split, rows in source.rows.items():
        kept = []
        for path, caption, *query in rows:
            caption = " ".join((caption or "").split())
            caption = "" if data.EMPTY.fullmatch(caption) else caption
            if path and caption or query:
                kept.append((path, caption, query[0] if query else None))
        dropped += len(rows) - len(kept)
        paired = [caption for path, caption, _ in kept if path and caption]
        captions += paired
        source.rows[split] = kept if paired else []  # MUGE hides the captions of its test
    sample = captions[::len(captions) // 1000 + 1]
    odd = [caption for caption in sample if NO_WORDS.fullmatch(caption)]
    said = f"of {len(sample)} captions {len(odd)} hold no words, e.g. {odd[:1]}"
    if 2 * len(odd) >= len(sample):
        raise DataError("; ".join([f"{root} gives {len(captions):,} captions of images; {said}; "
                                   f"name another column or file", *source.notes]))
    if odd:
        source.notes.append(said)
    if dropped:
        source.notes.append(f"{dropped:,} rows without image or caption left out")


def choose_splits(source, layout, whole):
    """The rows of each split. The first of these that there is decides:

    simple-clip     as that notebook: a fifth of the images is both val and test
    its own splits  rows of none are train, val stands in for a missing test
    lists           of images
    whole           all for that one
    folders         train, test, ... in which all images lie
    hash            of the names, 80/10/10: new images move no old ones. None is held out alone
    """
    notes = source.notes
    if layout != "simple-clip" and set(source.rows) - {"all"}:
        rows = {split: source.rows.get(split, []) for split in SPLITS}
        if rest := source.rows.get("all"):
            notes.append(f"{len(rest):,} rows of no split are taken as train")
            rows["train"] = rows["train"] + rest
        if rows["val"] and not rows["test"]:
            notes.append("there is no test split: val is used as test")
            rows["test"] = rows["val"]
        notes += note_leaks(rows)
        return rows
    pairs = [row for part in source.rows.values() for row in part]
    images = list(dict.fromkeys(row[0] for row in pairs))
    if layout == "simple-clip":
        drawn = np.random.RandomState(42).choice(len(images), len(images) // 5, replace=False)
        part_of = dict.fromkeys(images, "train") | {images[i]: "test" for i in drawn}
        notes.append("split 80/20 by image as the simple-CLIP notebook: val is also test")
    elif source.lists:
        part_of = {path: source.lists.get(pathlib.PurePath(path).stem) for path in images}
        unused = sum(part is None for part in part_of.values())
        notes += [f"{unused} images are in no split and not used"] * bool(unused)
    elif whole:
        part_of = dict.fromkeys(images, whole)
    elif not (part_of := folder_splits(images)):
        part_of = {path: hashed_split(path) for path in images}
        count = collections.Counter(part_of.values())
        part_of = {path: part if count[part] > 1 else "train"  # a search needs two images
                   for path, part in part_of.items()}
        notes.append("no splits were given: images are cut 80/10/10 by a hash of names")
    rows = {split: [row for row in pairs if part_of[row[0]] == split] for split in SPLITS}
    return {**rows, "val": rows["test"]} if layout == "simple-clip" else rows


def hashed_split(path):
    digest = hashlib.sha256(path.encode("utf-8", "surrogatepass")).digest()
    share = int.from_bytes(digest[:6], "big") / 2 ** 48
    return "train" if share < 0.8 else "val" if share < 0.9 else "test"


def list_pairs(name_or_path, data_dir="data", layout="auto", caption_file=None, image_column=None,
               caption_column=None, whole=None):
    """What pairs.open_pairs takes, but `whole` is the split that takes all -> Source, in splits."""
    text, path = os.fspath(name_or_path), expanded(data_dir)
    columns = image_column, caption_column
    if layout not in (known := ("auto", "simple-clip", *LAYOUTS)):
        raise DataError(f"layout {layout!r}: expected one of {', '.join(known)}")
    if "::" in text or SHARDS.search(text):
        kind, (home, names) = "webdataset", find_shards(text)
        path = home
    else:
        if text.lower() != "coco" or not matching(ImageStore(path), *LAYOUTS["coco"][0]):
            path = data.find_path(text, data_dir, ())  # else data_dir is COCO, as for run_clip
        home, kind, names = find_captions(path, layout, caption_file, columns)
    reader = LAYOUTS[kind][1]
    if any(columns) and reader is not read_captions:
        raise DataError(f"{text} is read as {kind}: {NO_COLUMNS}")
    source = reader(ImageStore(home), names, columns)
    if names:
        more = f" and {len(names) - 3} more" * (len(names) > 3)
        source.notes.append(f"captions are read from {', '.join(names[:3])}{more}")
    clean(text, source)
    if set(source.rows) == {"all"} and not source.store:  # then it is one table of one folder
        paths = [path for path, *_ in source.rows["all"] if path]
        source.store = locate(home, paths, split=split_of(os.path.basename(names[0])))
    source.rows = choose_splits(source, layout, whole)
    parts = [part for part in path.absolute().parts if part != "lmdb" and not split_word(part)]
    source.name = pathlib.PurePath(parts[-1]).stem if path.is_file() else parts[-1]
    source.root = str(home)
    return source
