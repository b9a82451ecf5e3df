"""What a CLIP takes images for: the five likeliest classes of each.

    python -m tools.predict --weights ViT-B/16 photo.jpg folder --classes cat dog "polar bear"
    python -m tools.predict --weights ViT-B/16 folder --data food101 --csv predictions.csv
    python -m tools.predict --weights runs/train_clipfit/mine photo.jpg    the run's own classes

The numbers are shares of the softmax over these classes, in %: an image of none of them gets high
ones too.
"""
import csv
import io
import sys

from device import (add_device_flags, expanded, guard, Parser, start, UserError,  # before torch
                    write_atomic)

from data import (ANY_TEMPLATE, cleaned, is_image, list_dataset, Preprocess, require_words,
                  TEMPLATES)
from images import Images, ImageStore
from scores import encode_images, text_classifier
from tokenizer import for_model
from weights import load, read_json


def choose_classes(args):
    """-> class names, templates: the flags', or those of the CLIPFit run that --weights is in."""
    names = [name.strip(" ,") for name in args.classes or ()]  # cat, dog
    templates, path = [ANY_TEMPLATE], expanded(args.weights)
    if args.data:
        source = list_dataset(args.data, args.data_dir)
        require_words(source)
        names, templates = source.classnames, [TEMPLATES.get(source.name, ANY_TEMPLATE)]
    elif path.exists():
        places = [path, *path.parents][:3]  # as a file of a run, or in its export/
        tables = [read_json(file) for place in places
                  for file in sorted(place.glob("confusion_*.json"))]
        if tables:
            names = names or [name for table in tables for name in table.get("classes", ())]
            templates = tables[0].get("templates", templates)
    names = [*{cleaned(name): name for name in names if name}.values()]
    if len(names) < 2:
        raise UserError(f"{len(names)} classes: give two or more as --classes, a data set of them "
                        f"as --data, or as --weights the folder of one run of train_clipfit.py, "
                        f"such as .../shots4_seed1")
    return names, args.template or templates


def main(args):
    """Print the classes of each image -> {path: [(class, %), ...]}, without what cannot be read."""
    names, templates = choose_classes(args)
    paths, found = [], {}
    for path in map(expanded, args.images):
        if path.is_dir():
            paths += [str(path / name) for name in ImageStore(path).names() if is_image(name)]
        else:
            paths.append(str(path))
    if not paths:
        raise UserError(f"{', '.join(args.images)}: there are no images in there")
    if args.csv and (expanded(args.csv).is_dir() or not expanded(args.csv).parent.is_dir()):
        raise UserError(f"--csv {args.csv}: expected a file in a folder that is there")
    run = start(args.device, args.precision)
    model = load(args.weights, activation=args.activation)
    run.say(*model.origin["notes"])
    tokenizer = for_model(model, args.tokenizer)
    model = run.move(model).fuse_attention(run.fused_attention)
    run.say(f"{len(names)} classes, asked as {', '.join(map(repr, templates))}")
    classes = text_classifier(run, model, tokenizer, names, templates)
    images = Images(ImageStore("."), paths, range(len(paths)), Preprocess.of(model))
    features, labels = encode_images(run, model, images, workers=args.workers)
    scale = float(model.logit_scale.detach().exp())
    values, places = (scale * features @ classes.T).softmax(dim=1).topk(min(5, len(names)))
    for path, label, shares, best in zip(paths, labels, values.tolist(), places.tolist()):
        if label >= 0:  # else the image cannot be read
            found[path] = [(names[i], 100 * share) for i, share in zip(best, shares)]
            run.say(f"{path}: " + ", ".join(f"{name} {x:.1f} %" for name, x in found[path]))
    lost = [path for path in paths if path not in found]
    if lost:
        run.say(f"{len(lost)} of {len(paths)} images cannot be read: {', '.join(lost[:20])}")
    if not found:
        missing = "" if expanded(paths[0]).exists() else " (there is no such file)"
        raise UserError(f"none of {len(paths)} images can be read, e.g. {paths[0]}{missing}")
    if args.csv:
        out = io.StringIO()
        csv.writer(out).writerows([("image", "rank", "class", "percent"), *(
            (path, rank, *best) for path in found for rank, best in enumerate(found[path], 1))])
        write_atomic(expanded(args.csv), out.getvalue())
    return found


def get_args(argv=None):
    parser = Parser(prog="python -m tools.predict", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="an image, or a folder of images at any depth")
    add("--weights", required=True, help="a run, its checkpoint or export, a file, a model's name")
    known = parser.add_mutually_exclusive_group().add_argument
    known("--classes", nargs="+", metavar="NAME", help="what to tell apart")
    known("--data", help="a data set whose classes and template to take")
    add("--data-dir", default="data", help="where named data lies (default: data)")
    add("--template", action="append", metavar="TEXT", help="prompt with {}; several: their mean")
    add("--csv", metavar="FILE", help="also write a table there")
    add("--tokenizer", help="vocabulary, where the weights have none")
    add("--activation", choices=("quick_gelu", "gelu"), help="where the file does not say it")
    add_device_flags(add)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(guard(main, get_args))
