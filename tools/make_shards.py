"""Write images with captions as WebDataset shards, the image files as they are.

    python -m tools.make_shards flickr8k --data-dir data --out shards --per-shard 1000
    python train_contrastive.py --data shards                              # all splits, or
    python train_contrastive.py --data "shards/train-{000000..000005}.tar"

Shards are plain tars <split>-000000.tar, <split>-000001.tar, ... of 00000000.jpg, .txt with the
first caption, which every reader of WebDataset knows, and .json with all of them. Any source that
training reads can be written. A shard is there whole or not at all; images that cannot be read are
left out and counted.
"""
import io
import json
import os
import pathlib
import sys
import tarfile

from device import guard, Parser, UserError, whole  # before torch
from images import UnreadableImage
from pairs import open_pairs

KEPT = (".jpg", ".jpeg", ".png", ".webp")  # other kinds of file are written as PNG


def main(args):
    """-> {split: (shards, images)}."""
    out, written, before = pathlib.Path(args.out), {}, None
    if any(out.glob("*.tar")):
        raise UserError(f"--out {out} holds shards already; name another folder")
    counts = open_pairs(args.data, "train", args.data_dir, args.layout).counts
    for split in filter(counts.get, ("train", "val", "test")):
        pairs = open_pairs(args.data, split, args.data_dir, args.layout)
        if before and pairs.rows == before.rows:  # val, which stands in for a missing test
            continue
        pairs.check_files()
        images = [i for i, captions in enumerate(pairs.captions_of) if captions]
        parts = [images[i:i + args.per_shard] for i in range(0, len(images), args.per_shard)]
        lost = sum(write_shard(pairs, part, out / f"{split}-{number:06d}.tar")
                   for number, part in enumerate(parts))
        written[split], before = (len(parts), len(images) - lost), pairs
        print(f"{split}: {written[split][1]:,} images in {out}/{split}-"
              f"{{000000..{len(parts) - 1:06d}}}.tar" + f"; {lost} unreadable" * bool(lost))
    print(f"train with --data {out}")
    return written


def write_shard(pairs, images, file):
    """The images at these positions -> how many of them could not be read."""
    lost, part = 0, file.with_suffix(".part")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(part, "w") as tar:
        for i in images:
            try:
                pairs.store.image(pairs.paths[i])
                add_sample(tar, pairs, i)
            except UnreadableImage as error:
                lost += 1
                print(f"note: left out: {error}", file=sys.stderr)
    os.replace(part, file)
    return lost


def add_sample(tar, pairs, i):
    kind, content = os.path.splitext(pairs.paths[i])[1].lower(), pairs.store.read(pairs.paths[i])
    if kind not in KEPT:
        kind, buffer = ".png", io.BytesIO()
        pairs.store.image(pairs.paths[i]).save(buffer, "png")
        content = buffer.getvalue()
    about = {"captions": pairs.texts_of(i), "path": pairs.paths[i]}
    for suffix, data in ((kind, content), (".txt", about["captions"][0].encode()),
                         (".json", json.dumps(about, ensure_ascii=False).encode())):
        info = tarfile.TarInfo(f"{i:08d}{suffix}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def get_args(argv=None):
    parser = Parser(prog="python -m tools.make_shards",
                    description="Write images with captions as WebDataset shards.")
    parser.add_argument("data", metavar="DATA", help="captioned images by name or path, as for "
                        "--data of the training scripts")
    parser.add_argument("--data-dir", default="data", help="where named data lies (default: data)")
    parser.add_argument("--layout", default="auto", help="how the data is laid out")
    parser.add_argument("--out", default="shards", help="folder of the tars (default: shards)")
    parser.add_argument("--per-shard", type=whole(1), default=1000, metavar="N",
                        help="images in a tar (default: 1000)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(guard(main, get_args))
