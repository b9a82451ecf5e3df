"""Print the few-shot list of a data set as JSON: {"train": [[path, label], ...], "val": [...]}.

    python -m tools.few_shot dtd --shots 4 --seed 1 --data-dir DIR

Of a published set no image is needed, and mostly no other file: CoOp's splits are bundled. The
lists are those that CoOp and its successors train on. Notes go to standard error.
"""
import json
import sys

from device import guard, Parser, whole  # before torch
from data import few_shot, ImageSet, list_dataset


def main(args):
    source = list_dataset(args.data, args.data_dir)
    train = ImageSet(source, "train")
    val = ImageSet(source, "val") if source.rows["val"] else train.subset([])
    drawn = few_shot(train, args.shots, args.seed, val)
    for part in drawn:
        for note in part.notes[len(train.notes):]:
            print(f"note: {note}", file=sys.stderr)
    print(json.dumps({name: [list(pair) for pair in zip(part.paths, part.labels)]
                      for name, part in zip(("train", "val"), drawn)}))


def get_args(argv=None):
    parser = Parser(prog="python -m tools.few_shot", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("data", metavar="DATA", help="as --data of train_clipfit.py")
    add("--shots", type=whole(0), default=16, help="images per class (default: 16)")
    add("--seed", type=whole(0), default=1, help="seed of the draw (default: 1)")
    add("--data-dir", default="data", help="where named data lies (default: data)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(guard(main, get_args))
