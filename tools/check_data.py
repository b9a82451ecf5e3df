"""Is this data fit to train on? Copies across splits, unreadable files, classes without images.

    python -m tools.check_data DATA [--data-dir DIR] [--json]

DATA is what --data of the training scripts takes: labelled images, captioned ones, or both. Every
image is decoded, and compared with all others by its bytes. The verdict comes last. Exit code 2 if
training would refuse the data.
"""
import collections
import hashlib
import io
import json
import sys

from device import guard, Parser  # before torch
from captions import list_pairs
from data import DataError, dataset_name, ImageSet, list_dataset, read_image, UnreadableImage
from pairs import PairSet

FINDINGS = {  # in the order of the report: what it is; what to do
    "leakage": "images are byte for byte in another split; keep one, the score counts known images",
    "refused": "reasons for which training would refuse this data; mend them first",
    "unreadable": "files are missing, empty, damaged or no images; fetch them again, or delete or "
                  "unlist them",
    "duplicates": "images are byte for byte in their split already; keep one of each, in the right "
                  "class",
    "no_train": "classes have no train image; nothing can be learned about them",
    "no_test": "classes have no test image; they are never scored",
    "same_caption": "captions repeat another; as negatives they would contradict each other: keep "
                    "--positives mask, or take multi",
}


def open_parts(data, data_dir):
    """-> class names, the parts {split: ImageSet or PairSet} and [(path, caption)]. What is both
    is examined as classes, with its captions. DataError if it is neither."""
    source = pairs = None
    reasons = []
    try:
        source = list_dataset(data, data_dir)
    except DataError as error:
        reasons.append(error)
    try:
        pairs = None if dataset_name(data) else list_pairs(data, data_dir)
    except DataError as error:
        reasons.append(error)
    if not source and not pairs:
        if len({str(reason) for reason in reasons}) == 1:
            raise reasons[0]
        raise DataError(f"neither classes ({reasons[0]}) nor captions ({reasons[1]})")
    rows = sum(pairs.rows.values(), []) if pairs else []
    captions = list(dict.fromkeys((path, text) for path, text, _ in rows if path and text))
    kind, listed, twin = (ImageSet, source, "val") if source else (PairSet, pairs, "test")
    parts = {split: kind(listed, split) for split, rows in listed.rows.items()
             if rows and (split != twin or listed.rows["val"] is not listed.rows["test"])}
    return source.classnames if source else [], parts, captions


def check_images(parts, findings):
    """Decode every image and compare its bytes with those before -> how many were decoded."""
    first, decoded = {}, 0  # sha256 -> {split: its first image there}
    for split, part in parts.items():
        lost = []
        for i, path in enumerate(part.paths):
            example = f"{split}:{path}"
            try:
                content = part.store.read(path)
                read_image(io.BytesIO(content), path)
            except UnreadableImage:
                findings["unreadable"].append(example)
                lost.append(i)
                continue
            decoded += 1
            same = first.setdefault(hashlib.sha256(content).digest(), {})
            elsewhere = [other for its_split, other in same.items() if its_split != split]
            if elsewhere:
                findings["leakage"].append(f"{example} = {elsewhere[0]}")
            elif same:
                findings["duplicates"].append(f"{example} = {same[split]}")
            same.setdefault(split, example)
        try:  # in the words of training itself
            part.refuse_losses(lost, "see below")
            if split != "train" and isinstance(part, PairSet):
                part.retrieval()
        except DataError as error:
            findings["refused"].append(str(error))
    return decoded


def check_data(data, data_dir="data"):
    """All that is worth knowing before training, as a dict for JSON; "usable" is False if training
    would refuse the data. Raises DataError if nothing can be listed."""
    findings, first = collections.defaultdict(list), {}
    classnames, parts, captions = open_parts(data, data_dir)
    for split in {"train", "test"} & set(parts) if classnames else ():
        held = {classnames[label] for label in parts[split].labels}
        findings[f"no_{split}"] = [name for name in classnames if name not in held]
    findings["same_caption"] = [path for i, (path, text) in enumerate(captions)
                                if first.setdefault(text, i) != i]
    decoded = check_images(parts, findings)
    findings["refused"] += ["there are no train images"] * ("train" not in parts)
    kinds = [kind for kind in FINDINGS if findings[kind]]
    if "refused" in kinds:
        verdict = "training would be refused; mend what is said above"
    elif "leakage" in kinds:
        copies = len(findings["leakage"])
        verdict = f"usable, but the score flatters (copies across splits: {copies:,})"
    else:
        verdict = "usable; read the findings first" if kinds else "usable, nothing to report"
    some = next(iter(parts.values()))
    counts = {split: len(part.paths) for split, part in parts.items()}
    return {"name": some.name, "root": some.root,
            "notes": list(dict.fromkeys(note for part in parts.values() for note in part.notes)),
            "counts": counts, "classes": len(classnames), "captions": len(captions),
            "images": sum(counts.values()), "examined": decoded,
            "findings": [{"finding": kind, "count": len(findings[kind]), "about": FINDINGS[kind],
                          "examples": findings[kind][:5]} for kind in kinds],
            "usable": "refused" not in kinds, "verdict": verdict}


def print_report(report):
    sizes = " / ".join(f"{count:,} {split}" for split, count in report["counts"].items())
    lines = [f"{report['root']}: {sizes} images in {report['classes']:,} classes, with "
             f"{report['captions']:,} captions",
             f"{report['examined']:,} of {report['images']:,} files decoded"]
    lines += [f"note: {note}" for note in report["notes"]]
    lines += [f"{found['count']:>7,}  {found['finding']:<13} {found['about']}; e.g. "
              f"{', '.join(found['examples'])}" for found in report["findings"]]
    for line in [*lines, f"verdict: {report['verdict']}"]:  # a file name may hold anything
        print("".join(c if c.isprintable() else repr(c)[1:-1] for c in line))


def main(args):
    report = check_data(args.data, args.data_dir)
    print(json.dumps(report)) if args.json else print_report(report)
    if not report["usable"]:
        sys.exit(2)


def get_args(argv=None):
    parser = Parser(prog="python -m tools.check_data", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("data", metavar="DATA", help="as --data of the training scripts")
    add("--data-dir", default="data", help="where named data lies (default: data)")
    add("--json", action="store_true", help="print the report as JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(guard(main, get_args))
