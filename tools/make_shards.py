"""Write images with captions as WebDataset shards, the image files as they are.

    python -m tools.make_shards flickr8k --data-dir data --out shards --per-shard 1000
    python train_contrastive.py --data shards                              # all splits, or
    python train_contrastive.py --data "shards/train-{000000..000005}.tar"

Shards are plain tars <split>-000000.tar, <split>-000001.tar, ... of 00000000.jpg, .txt with the
first caption, which every reader of WebDataset knows, and .json with all of them. A shard is there
whole or not at all; images that cannot be read are left out and named.
"""
import io
import json
import os
import pathlib
import sys
import tarfile

from device import guard, Parser, refuse_unusable, UserError, whole  # before torch
from captions import list_pairs
from files import write_whole
from images import UnreadableImage
from pairs import PairSet

KEPT = (".jpg", ".jpeg", ".png", ".webp")  # other kinds of file are written as PNG


def main(args):
    out = pathlib.Path(args.out)
    refuse_unusable(out, "--out")
    if any(out.glob("[!.]*.tar")):
        raise UserError(f"--out {out} holds shards already; name another folder")
    source, written = list_pairs(args.data, args.data_dir, args.layout), []
    for split, rows in source.rows.items():
        if not rows or split == "test" and rows is source.rows["val"]:
            continue  # there is none, or val stands in for it
        pairs = PairSet(source, split)
        pairs.check_files()
        queries = {query for _, text, query in rows if text and query is not None}
        if queries and split != "train" and len(queries) != len(pairs.captions):
            print(f"note: {split} has texts of no image or of several, which shards cannot hold: "
                  f"its scores will differ", file=sys.stderr)
        images = [i for i, captions in enumerate(pairs.captions_of) if captions]
        parts = [images[i:i + args.per_shard] for i in range(0, len(images), args.per_shard)]
        count = sum(write_shard(pairs, part, out / f".{split}-{number:06d}.tar")
                    for number, part in enumerate(parts))
        print(f"{split}: {count:,} images in {out}/{split}-{{000000..{len(parts) - 1:06d}}}.tar")
        written += [f"{split}-{number:06d}.tar" for number in range(len(parts))]
    for name in written:  # hidden until all are there: some would be taken for a whole set
        os.replace(out / f".{name}", out / name)
    print(f"train with --data {out}")


def write_shard(pairs, images, path):
    """The images at these positions, with their captions, into one tar -> how many can be read."""
    kept = []

    def write(file):
        with tarfile.open(fileobj=file, mode="w") as tar:
            for i in images:
                try:
                    sample = files_of(pairs, i)
                except UnreadableImage as error:
                    print(f"note: left out: {error}", file=sys.stderr)
                    continue
                kept.append(i)
                for suffix, content in sample.items():
                    info = tarfile.TarInfo(f"{i:08d}{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    write_whole(path, write)
    return len(kept)


def files_of(pairs, i):
    """The files of one sample, {suffix: bytes}. Raises UnreadableImage."""
    path, captions = pairs.paths[i], pairs.texts_of(i)
    content, image = pairs.store.read(path), pairs.store.image(path)
    kind, buffer = os.path.splitext(path)[1].lower(), io.BytesIO()
    if kind not in KEPT:
        image.save(buffer, "png")
        kind, content = ".png", buffer.getvalue()
    about = json.dumps({"captions": captions, "path": path}, ensure_ascii=False)
    # A name that is not UTF-8 is escaped as JSON does it.
    return {kind: content, ".txt": captions[0].encode("utf-8", "backslashreplace"),
            ".json": about.encode("utf-8", "backslashreplace")}


def get_args(argv=None):
    parser = Parser(prog="python -m tools.make_shards", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("data", metavar="DATA", help="as --data of the training scripts")
    add("--data-dir", default="data", help="where named data lies (default: data)")
    add("--layout", default="auto", help="how the data is laid out")
    add("--out", default="shards", help="folder of the tars (default: shards)")
    add("--per-shard", type=whole(1), default=1000, help="images in a tar (default: 1000)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(guard(main, get_args))
