"""Is this data fit to train on? Copies across splits, damaged files, classes, captions.

    python -m tools.check_data DATA [--data-dir DIR] [--json] [--limit N]

DATA is what --data of the training scripts takes: labelled images, captioned ones, or both. Every
image is decoded and compared with all others: exactly, and by a small picture of it, which survives
re-encoding and resizing. The verdict comes last. Exit code 2 if training would refuse the data.
"""
import collections
import contextlib
import hashlib
import io
import json
import random
import re
import sys
import time

from device import guard, Parser  # before torch
import numpy as np
from PIL import Image, UnidentifiedImageError

from data import DataError, dataset_name, ImageSet, list_dataset, read_image, UnreadableImage
from images import MAX_PIXELS
from pairs import open_pairs

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
    "long_caption": f"captions over {CAPTION_WORDS} words, an estimate: probably over 77 tokens; "
                    f"shorten them, the rest is cut off",
    "same_caption": "captions repeat another; as negatives they contradict each other, so train "
                    "with positives by text",
    "sides": "captions name left or right (左, 右), wrong after a flip; train without flips",
    "colours": "captions name colours, wrong after a change of hue; train without colour changes",
    "tags": "captions carry part-of-speech tags (词:n); take the file without them",
    "tiny": f"images have a side under {TINY_SIDE} pixels; enlarged, they show little",
    "huge": f"images are over {HUGE_PIXELS:,} pixels; scale them down once, to decode faster",
    "strip": f"images are over {STRIP} times longer than wide; the centre crop loses most of them",
    "alpha": "images can be transparent; alpha is dropped, see that nothing ugly lies under it",
    "animated": "images have several frames; only the first is used",
}
WORD = re.compile(r"[\u3400-\u9fff]|[^\s\u3400-\u9fff]{1,9}")  # nine letters at most
CAPTION_TESTS = {
    "long_caption": lambda text: len(WORD.findall(text)) > CAPTION_WORDS,
    "sides": re.compile(r"[左右]|\b(?:left|right)\b", re.IGNORECASE).search,
    "colours": re.compile(r"[红橙黄绿蓝紫黑白灰粉棕]|\b(?:red|orange|yellow|green|blue|purple|"
                          r"black|white|gr[ae]y|pink|brown)\b", re.IGNORECASE).search,
    "tags": re.compile(r"(?:(?:^|\s)\S+[:/][a-z]{1,3}(?=\s|$).*){2}").search,
}


class Findings(dict):
    """kind -> {"count": n, "examples": the first five}."""

    def add(self, kind, example):
        entry = self.setdefault(kind, {"count": 0, "examples": []})
        entry["count"] += 1
        entry["examples"] += [example] if entry["count"] <= 5 else []


def open_parts(data, data_dir):
    """-> class names, the parts {split: ImageSet or PairSet} and [(path, caption)]. What is both
    is examined as classes, with its captions. DataError if it is neither."""
    source, parts, captions, reasons = None, {}, {}, []
    try:
        source = list_dataset(data, data_dir)
    except DataError as error:
        reasons.append(error)
    if not dataset_name(data):
        for split in ("train", "val", "test"):
            try:
                pairs = open_pairs(data, split, data_dir)
            except DataError as error:
                reasons.append(error)
            else:
                if all(pairs.paths != other.paths for other in parts.values()):  # val as test
                    parts[split] = pairs
                    captions.update(dict.fromkeys(
                        (pairs.paths[i], text) for i, text in zip(pairs.owner, pairs.captions)))
    if source is None and not parts:
        raise reasons[0] if len({str(reason) for reason in reasons}) == 1 else DataError(
            f"neither classes ({reasons[0]}) nor captions ({reasons[1]})")
    if source:
        parts = {split: ImageSet(source, split) for split, rows in source.rows.items()
                 if rows and (split != "val" or rows is not source.rows["test"])}
    return source.classnames if source else [], parts, list(captions)


def check_lists(classnames, parts, captions, findings):
    """What the lists alone show: classes and captions."""
    train, test = (collections.Counter(parts[split].labels if split in parts and classnames else ())
                   for split in ("train", "test"))
    for label, name in enumerate(classnames):
        if train and not train[label]:
            findings.add("no_train", name)
        elif train and train[label] < FEW_IMAGES:
            findings.add("few", f"{name} ({train[label]})")
        if test and not test[label]:
            findings.add("no_test", name)
        if 0 < train[label] * IMBALANCE <= max(train.values(), default=0):
            findings.add("imbalance", f"{name} ({train[label]} to {max(train.values())})")
    seen = set()
    for path, text in captions:
        for kind, test in CAPTION_TESTS.items():
            if test(text):
                findings.add(kind, path)
        if text in seen:
            findings.add("same_caption", path)
        seen.add(text)


def header_kinds(image):
    """An opened image, not decoded yet -> those of FINDINGS that its header shows."""
    short, long = sorted(image.size)
    tests = {"tiny": lambda: short < TINY_SIDE, "huge": lambda: short * long > HUGE_PIXELS,
             "strip": lambda: long > STRIP * short, "alpha": lambda: image.has_transparency_data,
             "animated": lambda: image.is_animated and image.format != "MPO"}  # a phone's photo
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
        cause = error.__cause__
        return ["empty" if content == b"" else
                "bomb" if "are too many" in str(cause) or isinstance(
                    cause, Image.DecompressionBombError) else
                "not_image" if isinstance(cause, UnidentifiedImageError) else "damaged"], None
    small = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR, reducing_gap=2))
    waves = COSINES @ small.mean(axis=2, dtype=np.float32) @ COSINES.T  # (8, 8), first the mean
    colours = small.reshape(8, 4, 8, 4, 3).mean(axis=(1, 3)).astype(np.uint8)
    bits = np.packbits(waves > 0)
    return kinds, (hashlib.sha256(content).digest(), bits.tobytes(), colours.tobytes())


def check_images(parts, chosen, findings):
    """Decode the paths in `chosen` and compare them -> how many were decoded."""
    items, prints = [], []
    for split, part in parts.items():
        labels, lost = getattr(part, "labels", [0] * len(part.paths)), []
        for i, path in enumerate(part.paths):
            kinds, signature = ["missing"], None
            if part.store.has(path):
                if path not in chosen:
                    continue
                kinds, signature = examine(part.store, path)
            for kind in kinds:
                findings.add(kind, f"{split}:{path}")
            if signature is None:
                lost.append(i)
            else:
                items.append((split, labels[i], f"{split}:{path}"))
                prints.append(signature)
        try:  # in the words of training itself
            part.refuse_losses(lost, "see below")
        except DataError as error:
            findings.add("refused", str(error))
    find_copies(items, prints, findings)
    return len(items)


def find_copies(items, prints, findings):
    """items: (split, label, "split:path"), splits in order; prints: as examine gives them. Adds a
    finding for each image that equals or resembles an earlier one."""
    first, pairs, fresh = {}, [], []
    for i, (digest, _, _) in enumerate(prints):
        same = first.setdefault(digest, [])  # the first image with these bytes in each split
        other = [j for j in same if items[j][0] != items[i][0]]
        pairs += [(i, j, "") for j in (other or same)[:1]]
        if len(other) == len(same):
            same.append(i)
            fresh.append(i)
    exact = {i for i, _, _ in pairs}
    hashes = np.frombuffer(b"".join(prints[i][1] for i in fresh), dtype=np.uint64)
    colours = np.frombuffer(b"".join(prints[i][2] for i in fresh), dtype=np.uint8)
    near = {}
    for a, b in near_pairs(hashes, colours.reshape(-1, 64, 3)):
        i, j = max(fresh[a], fresh[b]), min(fresh[a], fresh[b])
        across = items[i][0] != items[j][0]
        if i not in exact and (i not in near or across):
            near[i] = j
    pairs += [(i, near[i], "near_") for i in sorted(near)]
    for i, j, how in pairs:
        what, example = how + "duplicates", f"{items[i][2]} = {items[j][2]}"
        findings.add(what if items[i][0] == items[j][0] else how + "leakage", example)
        if items[i][1] != items[j][1]:
            findings.add("two_labels", example)


def near_pairs(hashes, colours):
    """(n,) uint64, (n, 64, 3) -> pairs of positions of pictures that look the same.

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
            yield from zip(a[close].tolist(), b[close].tolist())


def check_data(data, data_dir="data", limit=None):
    """All that is worth knowing before training, as a dict for JSON; "usable" is False if training
    would refuse the data. Keeps half a kilobyte per image; `limit` decodes that many, drawn by a
    fixed permutation. Raises DataError if nothing can be listed."""
    start, findings = time.monotonic(), Findings()
    classnames, parts, captions = open_parts(data, data_dir)
    check_lists(classnames, parts, captions, findings)
    paths = sorted({path for part in parts.values() for path in part.paths})
    chosen = paths if limit is None else random.Random(0).sample(paths, min(limit, len(paths)))
    examined = check_images(parts, set(chosen), findings)
    leaks = sum(findings[kind]["count"] for kind in ("leakage", "near_leakage") if kind in findings)
    whole = next(iter(parts.values()))
    told = [(kind, *text.split("; ", 1)) for kind, text in FINDINGS.items() if kind in findings]
    verdict = ("training would be refused; mend what is said above" if "refused" in findings else
               f"usable, but the score flatters (copies across splits: {leaks:,})" if leaks else
               "usable; read the findings first" if findings else "usable, nothing to report")
    return {"name": whole.name, "root": whole.root,
            "notes": list(dict.fromkeys(note for part in parts.values() for note in part.notes)),
            "counts": {split: len(part.paths) for split, part in parts.items()},
            "classes": len(classnames), "captions": len(captions),
            "images": len(paths), "examined": examined,
            "seconds": round(time.monotonic() - start, 2),
            "findings": [{"finding": kind, **findings[kind], "what": what, "advice": advice}
                         for kind, what, advice in told],
            "usable": "refused" not in findings, "verdict": verdict}


def print_report(report):
    sizes = " / ".join(f"{count:,} {split}" for split, count in report["counts"].items())
    lines = [f"{report['root']}: {sizes} images in {report['classes']:,} classes, with "
             f"{report['captions']:,} captions",
             f"{report['examined']:,} of {report['images']:,} files decoded in "
             f"{report['seconds']:.1f} s"]
    lines += [f"note: {note}" for note in report["notes"]]
    for found in report["findings"]:
        lines.append(f"{found['count']:>7,}  {found['finding']:<16} {found['what']}, e.g. "
                     f"{', '.join(found['examples'])}; {found['advice']}")
    for line in [*lines, f"verdict: {report['verdict']}"]:  # a file name may hold anything
        print("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))


def main(args):
    if args.limit is not None and args.limit < 1:
        raise DataError(f"--limit {args.limit}: expected 1 image or more")
    try:
        report = check_data(args.data, args.data_dir, args.limit)
    except DataError as error:
        if not args.json:
            raise
        report = {"name": args.data, "findings": [], "usable": False, "verdict": str(error)}
    print(json.dumps(report)) if args.json else print_report(report)
    if not report["usable"]:
        sys.exit(2)


def get_args(argv=None):
    parser = Parser(prog="python -m tools.check_data",
                    description="Check whether images, classes, captions and splits are fit to "
                    "train on (exit code 2 if they are not).")
    parser.add_argument("data", metavar="DATA", help="as --data of the training scripts")
    parser.add_argument("--data-dir", default="data", help="where the named data sets lie "
                        "(default: data)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--limit", type=int, metavar="N",
                        help="decode only N images, a fixed sample (default: all)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(guard(main, get_args))
