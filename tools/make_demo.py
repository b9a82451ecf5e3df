"""Make demo.zip, the small captioned image set behind `--data demo`, from EuroSAT.

    python -m tools.make_demo --data-dir DIR         the same DIR gives the same bytes

DIR is as for the training scripts: DIR/eurosat holds EuroSAT_RGB_2750.zip (27,000 Sentinel-2 tiles
of 64 x 64 pixels in ten classes, Helber et al. 2019, MIT licence), and here also the text of that
licence, LICENSE.phelber. The demo's train and val images come from the val part of CoOp's split and
its test images from the test part. The train part is left to `pretrain_tiny.py`: the bundled model
has seen no demo image.

Every image gets the look of another sensor (`other_sensor`). A model pretrained on the clean tiles
still recognises the classes, but much worse, and a few labelled images bring most of it back: that
is what few-shot tuning is for.

demo.zip is stored, since JPEGs do not deflate, and has LICENSE, demo.csv and the images. demo.csv
has the columns path,label,split,caption,source; a caption names the class and what was measured in
the image as it is stored: brightness, texture, tint, the lighter side.
"""
import csv
import hashlib
import io
import pathlib
import random
import sys
import zipfile

from device import expanded, guard, Parser, UserError  # before torch
import numpy as np
from PIL import Image

from data import ASSETS, open_dataset

COUNTS = {"train": 64, "val": 16, "test": 100}  # images of each class
STRENGTH = 0.6                                  # of the other sensor's look; 0: the original
# How a sentence may speak of each class of CoOp's split.
SUBJECTS = {
    "Annual Crop Land": ("annual crop land", "fields of annual crops", "freshly sown fields"),
    "Forest": ("forest", "a dense forest", "woodland full of trees"),
    "Herbaceous Vegetation Land": ("herbaceous vegetation land", "wild grass and herbs",
                                   "grassland with low shrubs"),
    "Highway or Road": ("a highway or road", "a highway", "a road across the land"),
    "Industrial Buildings": ("industrial buildings", "factories and warehouses",
                             "an industrial area with large roofs"),
    "Pasture Land": ("pasture land", "a pasture", "meadows for grazing"),
    "Permanent Crop Land": ("permanent crop land", "orchards and vineyards",
                            "rows of fruit trees and vines"),
    "Residential Buildings": ("residential buildings", "houses and streets",
                              "a residential neighbourhood"),
    "River": ("a river", "a river and its banks", "running water"),
    "Sea or Lake": ("the sea or a lake", "open water", "the surface of a lake or the sea"),
}
FRAMES = ("{} satellite photo of {}{}.", "{} satellite image of {}{}.", "{} aerial view of {}{}.",
          "{} picture of {} taken from space{}.", "{} photo of {} seen from above{}.")
# One entry is one thing that can be true of an image; the phrases of an entry say the same.
PHRASES = {
    "very dark": ("very dark", "nearly black"), "dark": ("dark", "dim"),
    "bright": ("bright", "light"), "very bright": ("very bright", "brilliant"),
    "smooth": ("smooth", "plain"), "coarse": ("coarse", "richly detailed"),
    "reddish": ("reddish", "red-tinted"), "yellowish": ("yellowish", "yellow-tinted"),
    "greenish": ("greenish", "green-tinted"), "bluish": ("bluish", "blue-tinted"),
    "top": ("lighter at the top", "lighter in the upper half"),
    "bottom": ("lighter at the bottom", "lighter in the lower half"),
    "left": ("lighter on the left", "lighter in the left half"),
    "right": ("lighter on the right", "lighter in the right half"),
}
SIDES = ("top", "bottom", "left", "right")


# -----------------------------------------------------------------------------
# Captions. pretrain_tiny.py writes its own with the same functions.

def measure(pixels):
    """Statistics of images, uint8 (M, S, S, 3): a dict of float arrays (M,) or (M, 2)."""
    x = pixels.astype(np.float32)
    luma = x @ np.float32([0.299, 0.587, 0.114])                          # (M, S, S)
    half = luma.shape[1] // 2
    detail = sum(np.abs(np.diff(luma, axis=axis)).mean((1, 2)) for axis in (1, 2))
    red, green, blue = x.mean((1, 2)).T
    return {"brightness": luma.mean((1, 2)), "detail": detail,
            "tint": np.stack([red - green, (red + green) / 2 - blue], axis=1),
            "down": luma[:, half:].mean((1, 2)) - luma[:, :half].mean((1, 2)),
            "across": luma[:, :, half:].mean((1, 2)) - luma[:, :, :half].mean((1, 2))}


def thresholds(of):
    """Where words begin to apply in a collection, from its statistics `of` (see `measure`). Words
    are relative to the collection, so that they say something under any look: the darkest eighth is
    "very dark", tints are deviations from the median colour, the ordinary is not mentioned."""
    centre = np.median(of["tint"], axis=0)
    spread = np.abs(of["tint"] - centre).mean(axis=0)
    tint = np.hypot(*((of["tint"] - centre) / spread).T)
    slope = np.maximum(np.abs(of["down"]), np.abs(of["across"]))
    return {"brightness": np.quantile(of["brightness"], [1 / 8, 1 / 3, 2 / 3, 7 / 8]),
            "detail": np.quantile(of["detail"], [1 / 3, 2 / 3]), "centre": centre, "spread": spread,
            "tint": np.quantile(tint, 0.4), "slope": np.quantile(slope, 0.5)}


def facts(of, limits):
    """What is true of each image, as M tuples of keys of PHRASES. of: statistics of M images;
    limits: `thresholds` of the collection that they belong to."""
    brightness = np.digitize(of["brightness"], limits["brightness"])
    detail = np.digitize(of["detail"], limits["detail"])
    red, yellow = ((of["tint"] - limits["centre"]) / limits["spread"]).T
    found = []
    for i, (down, across) in enumerate(zip(of["down"], of["across"])):
        said = [("very dark", "dark", None, "bright", "very bright")[brightness[i]],
                ("smooth", None, "coarse")[detail[i]]]
        if np.hypot(red[i], yellow[i]) > limits["tint"]:
            said.append(("reddish" if red[i] > 0 else "greenish") if abs(red[i]) > abs(yellow[i])
                        else ("yellowish" if yellow[i] > 0 else "bluish"))
        if max(abs(down), abs(across)) > limits["slope"]:
            said.append(("bottom" if down > 0 else "top") if abs(down) > abs(across)
                        else ("right" if across > 0 else "left"))
        found.append(tuple(fact for fact in said if fact))
    return found


def caption(label, said, rng):
    """An English sentence: the class `label` and the facts `said`, in phrases drawn from `rng`."""
    words = [rng.choice(PHRASES[fact]) for fact in said if fact not in SIDES]
    tail = [", " + rng.choice(PHRASES[fact]) for fact in said if fact in SIDES]
    frame = rng.choice(FRAMES).format(" ".join(["{}", ", ".join(words)]).strip(),
                                      rng.choice(SUBJECTS[label]), "".join(tail))
    return frame.format("An" if frame.removeprefix("{} ")[0] in "aeiou" else "A")


# -----------------------------------------------------------------------------
# The look, and the set

def other_sensor(pixels, rng):
    """uint8 (S, S, 3) -> uint8 (S, S, 3): the tile as a second-rate sensor might deliver it. In
    this order: gain per channel, gamma, haze (a veil of one colour), Gaussian noise."""
    x = pixels.astype(np.float64) / 255
    x = x * (1 + STRENGTH * np.array([0.20, -0.10, -0.25]))
    x = np.clip(x, 0, 1) ** (1 + STRENGTH * 0.25)
    veil = STRENGTH * 0.20
    x = (1 - veil) * x + veil * np.array([0.75, 0.70, 0.60])
    x = x + rng.normal(0, STRENGTH * 0.03, x.shape)
    return (np.clip(x, 0, 1) * 255).round().astype(np.uint8)


def choose(val, test):
    """[(demo split, class, image set, path in it)]: seeded samples of each class."""
    rng, chosen = random.Random(0), []
    for place, name in enumerate(val.classnames):
        pools = [[path for path, label in zip(part.paths, part.labels) if label == place]
                 for part in (val, test)]
        tuning = rng.sample(pools[0], COUNTS["train"] + COUNTS["val"])
        chosen += [("train", name, val, path) for path in tuning[:COUNTS["train"]]]
        chosen += [("val", name, val, path) for path in tuning[COUNTS["train"]:]]
        chosen += [("test", name, test, path) for path in rng.sample(pools[1], COUNTS["test"])]
    return chosen


def write_zip(path, members):
    """A stored zip of {name: bytes}, sorted and with one fixed date: equal input, equal bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            info.create_system = 3  # the same on every system
            archive.writestr(info, members[name])


def main(args):
    licence = expanded(args.data_dir) / "eurosat" / "LICENSE.phelber"
    if not licence.is_file():
        raise UserError(f"{licence} is missing: the licence of EuroSAT, which goes into the demo")
    chosen = choose(*(open_dataset("eurosat", part, args.data_dir) for part in ("val", "test")))
    noise, words = np.random.default_rng(0), random.Random(0)
    members, stored = {"LICENSE": licence.read_bytes()}, []
    for split, _, images, path in chosen:
        content = io.BytesIO()
        look = other_sensor(np.asarray(images.store.image(path)), noise)
        Image.fromarray(look).save(content, "JPEG", quality=85, optimize=True)
        members[f"{split}/{pathlib.PurePosixPath(path).name}"] = content.getvalue()
        stored.append(np.asarray(Image.open(content)))
    text, of = io.StringIO(), measure(np.stack(stored))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "split", "caption", "source"])
    for (split, name, _, path), said in zip(chosen, facts(of, thresholds(of))):
        writer.writerow([f"{split}/{pathlib.PurePosixPath(path).name}", name, split,
                         caption(name, said, words), f"EuroSAT 2750/{path}"])
    write_zip(args.output, {**members, "demo.csv": text.getvalue().encode()})
    content = pathlib.Path(args.output).read_bytes()
    print(f"{args.output}: {len(chosen)} images, {len(content):,} bytes, "
          f"sha256 {hashlib.sha256(content).hexdigest()}")


def get_args(argv=None):
    parser = Parser(prog="python -m tools.make_demo", description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", required=True, help="where eurosat/ lies, with its licence")
    parser.add_argument("--output", default=str(ASSETS / "demo.zip"), help="file to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(guard(main, get_args))
