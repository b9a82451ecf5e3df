"""Asks large CLIPs once about a few random views of every training image, and keeps the answers.

    python -m tools.reinforce --teacher ViT-B/16 --data flickr8k --data-dir DIR --output stored
    python train_distill.py --reinforced stored --data flickr8k --data-dir DIR

Dataset reinforcement (Faghri et al. 2023; MobileCLIP, Vasu et al. 2024): the training that follows
has the same losses and no teacher in it, and any number of students can learn from one such folder.
It takes 4 bytes x views x images x dimensions: 250 MB for 10 views of 12,000 images by a ViT-B.
Several teachers are asked side by side, and with torchrun several processes share the images.
"""
import functools
import shutil
import sys

from device import (add_device_flags, expanded, guard, number, Parser, SafeStop, start, UserError,
                    whole, write_atomic)  # before torch, which reads what it sets
import numpy as np
import torch

from files import refuse_unusable, write_whole
from pairs import add_pair_flags, decode_once, open_pairs
from scores import encode_images, encode_texts, leave_out
from teachers import digest, open_teachers, Views

STARTED = "images.npy", "texts.npy", "images.cache", "teacher.json.tmp"  # then teacher.json


def main(args):
    """Write the folder -> what was written."""
    run = start(args.device, args.precision, args.seed)
    target = expanded(args.output)
    refuse_unusable(target, "--output")
    there = {file.name for file in target.glob("*")} - {*STARTED}
    if there and not args.overwrite:
        raise UserError(f"--output {target} is there already; --overwrite writes it again")
    pairs = open_pairs(args.data, "train", args.data_dir, args.layout, args.caption_file,
                       args.image_column, args.caption_column)
    pairs.check_files()
    teachers = open_teachers(run, args.teacher, args.teacher_activation, args.tokenizer)
    views = Views([teacher.look for teacher in teachers], args.seed, args.crop, args.randaugment)

    def begin():
        target.mkdir(parents=True, exist_ok=True)
        for name in ("teacher.json", "images.npy", "texts.npy"):
            (target / name).unlink(missing_ok=True)
    run.on_first(begin)
    run.say(*pairs.notes)
    options = decode_once(run, [pairs], target / "images.cache", args)
    texts = torch.cat([encode_texts(run, teacher.model, teacher.tokenizer, pairs.captions)
                       for teacher in teachers], dim=1)
    shape = args.views, len(pairs.paths), texts.shape[1]
    for view in range(args.views):
        what, found = f"view {view + 1} of {args.views}", []
        for teacher in teachers:
            shown = pairs.with_transform(views.each[teacher.look]).image_items()
            features, places = encode_images(run, teacher.model, shown, what=what, epoch=view,
                                             workers=options["workers"])
            found.append(features)
        if view == 0:
            leave_out(run, pairs, places < 0)
        run.say(f"{what}: {shape[1]:,} images")
        run.on_first(functools.partial(add_view, target / "images.npy", shape, view,
                                       torch.cat(found, dim=1)))
    facts = {"format": "reinforced/3", "data": pairs.fingerprint, "split": pairs.split,
             "seed": args.seed, "crop": args.crop, "randaugment": args.randaugment,
             "views": args.views, "probe": views.probe(pairs), "precision": run.precision,
             "teachers": [teacher.facts() for teacher in teachers]}

    def finish():
        write_whole(target / "texts.npy", functools.partial(np.save, arr=texts.numpy()))
        shutil.rmtree(target / "images.cache", ignore_errors=True)
        write_atomic(target / "teacher.json", {**facts, "sha256": digest(target, facts)})
    run.on_first(finish)
    run.say(f"wrote {target}: {args.views} views of {shape[1]:,} images, {len(texts):,} captions, "
            f"{4 * shape[0] * shape[1] * shape[2] / 2 ** 20:,.0f} MB")
    return {"wrote": str(target), "views": args.views, "images": shape[1]}


def add_view(path, shape, view, features):
    """Append the features (n, D) of a view to the .npy of all of them (V, n, D)."""
    try:
        with open(path, "ab") as file:  # not mapped: a full disk would end the process by SIGBUS
            if view == 0:
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            file.write(features.numpy().tobytes())
    except OSError as error:
        raise SafeStop(f"{path} could not be written ({error}); start again") from error


def get_args(argv=None):
    parser = Parser(prog="python -m tools.reinforce", description="Store what teachers say.",
                    aliases={"--output-dir": "--output"})
    add = parser.add_argument
    add("--teacher", nargs="+", required=True, help="one CLIP or several: names, files or folders")
    add("--output", required=True, metavar="FOLDER", help="to be written")
    add("--views", type=whole(1), default=10, help="of an image (default: 10)")
    add("--crop", type=number(0, 1), default=0.4, help="smallest share of an image that a view "
        "keeps; 0: all of it, always (default: 0.4)")
    add("--randaugment", action="store_true", help="distort the views: two of RandAugment's")
    add("--teacher-activation", choices=("quick_gelu", "gelu"), help="where its file does not say")
    add("--tokenizer", help="file or folder of the teachers' vocabulary, if they have none")
    add("--seed", type=whole(0, 2 ** 32 - 1), default=1, help="of the views (default: 1)")
    add("--overwrite", action="store_true", help="write it again where it is there")
    add_device_flags(add)
    add_pair_flags(parser, training=False)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(guard(main, get_args))
