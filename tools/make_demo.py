"""Makes demo.zip, the small captioned image set behind `--data demo`, from EuroSAT.

    python -m tools.make_demo --data-dir DIR         the same DIR gives the same bytes

DIR holds EuroSAT_RGB_2750.zip (27,000 Sentinel-2 tiles of 64 x 64 pixels in ten classes, Helber et
al. 2019, MIT licence), CoOp's split_zhou_EuroSAT.json and the licence text LICENSE.phelber. The
demo's train and val images come from the val part of that split and its test images from the test
part. The train part is left to `pretrain_tiny.py`: the bundled model has seen no demo image.

Every image gets the look of another sensor (`other_sensor`): channels of unequal gain, haze, gamma
and noise. A model pretrained on the clean tiles still recognises the classes, but much worse, and
a few labelled images of the new look bring most of it back. That is what few-shot tuning is for,
and it leaves the demo something to show.

demo.zip is stored, since JPEGs do not deflate, and has LICENSE, demo.csv and the images. demo.csv
has the columns path,label,split,caption,source; a caption names the class and what was measured in
the image as it is stored: brightness, texture, tint, the lighter side.
"""
import argparse
import csv
import hashlib
import io
import json
import pathlib
import random
import zipfile

import numpy as np
from PIL import Image

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
    """Image statistics of uint8 (M, S, S, 3): a dict of float arrays (M,) or (M, 2)."""
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
    """Where words begin to apply in a collection, from its statistics `of` (see `measure`).

    Words are relative to the collection, so that they stay informative under any look: the darkest
    eighth is "very dark", tints are deviations from the median colour, and the ordinary is not
    mentioned.
    """
    centre = np.median(of["tint"], axis=0)
    spread = np.abs(of["tint"] - centre).mean(axis=0)
    return {"brightness": np.quantile(of["brightness"], [1 / 8, 1 / 3, 2 / 3, 7 / 8]),
            "detail": np.quantile(of["detail"], [1 / 3, 2 / 3]),
            "centre": centre, "spread": spread,
            "tint": np.quantile(np.hypot(*((of["tint"] - centre) / spread).T), 0.4),
            "slope": np.quantile(np.maximum(np.abs(of["down"]), np.abs(of["across"])), 0.5)}


def facts(of, limits):
    """What is true of each image, as M tuples of PHRASES keys.

    of: statistics of M images. limits: `thresholds` of the collection that they belong to.
    """
    brightness = np.digitize(of["brightness"], limits["brightness"])
    detail = np.digitize(of["detail"], limits["detail"])
    tint = ((of["tint"] - limits["centre"]) / limits["spread"]).T
    tinted = np.where(np.abs(tint[0]) > np.abs(tint[1]),
                      np.where(tint[0] > 0, "reddish", "greenish"),
                      np.where(tint[1] > 0, "yellowish", "bluish"))
    down, across = of["down"], of["across"]
    side = np.where(np.abs(down) > np.abs(across), np.where(down > 0, "bottom", "top"),
                    np.where(across > 0, "right", "left"))
    strong = np.hypot(*tint) > limits["tint"]
    sloped = np.maximum(np.abs(down), np.abs(across)) > limits["slope"]
    out = []
    for i in range(len(side)):
        said = [("very dark", "dark", None, "bright", "very bright")[brightness[i]],
                ("smooth", None, "coarse")[detail[i]],
                str(tinted[i]) if strong[i] else None, str(side[i]) if sloped[i] else None]
        out.append(tuple(fact for fact in said if fact))
    return out


def caption(label, said, rng):
    """An English sentence: the class `label` and the facts `said`, in phrases drawn from `rng`."""
    words = [rng.choice(PHRASES[fact]) for fact in said if fact not in SIDES]
    tail = [", " + rng.choice(PHRASES[fact]) for fact in said if fact in SIDES]
    frame = rng.choice(FRAMES).format(" ".join(["{}", ", ".join(words)]).strip(),
                                      rng.choice(SUBJECTS[label]), "".join(tail))
    return frame.format("An" if frame.removeprefix("{} ")[0] in "aeiou" else "A")


# -----------------------------------------------------------------------------
# The look

def other_sensor(pixels, rng, strength):
    """uint8 (S, S, 3) -> uint8 (S, S, 3): the tile as a second-rate sensor might deliver it.

    In this order: gain per channel, gamma, haze (a veil of one colour), Gaussian noise. `strength`
    scales them all; 0 changes nothing.
    """
    x = pixels.astype(np.float64) / 255
    x = x * (1 + strength * np.array([0.20, -0.10, -0.25]))
    x = np.clip(x, 0, 1) ** (1 + strength * 0.25)
    veil = strength * 0.20
    x = (1 - veil) * x + veil * np.array([0.75, 0.70, 0.60])
    x = x + rng.normal(0, strength * 0.03, x.shape)
    return (np.clip(x, 0, 1) * 255).round().astype(np.uint8)


# -----------------------------------------------------------------------------
# The set

def choose(split, args):
    """[(name in EuroSAT, label, demo split)]: seeded samples per class, classes in split order."""
    rng, out = random.Random(args.seed), []
    for label in sorted({entry[2] for entry in split["val"]}, key=list(SUBJECTS).index):
        pool = {part: [path for path, _, name in split[part] if name == label]
                for part in ("val", "test")}
        tuning = rng.sample(pool["val"], args.train + args.val)
        held_out = rng.sample(pool["test"], args.test)
        out += [(name, label, "train") for name in tuning[:args.train]]
        out += [(name, label, "val") for name in tuning[args.train:]]
        out += [(name, label, "test") for name in held_out]
    return out


def jpeg(pixels, quality):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, optimize=True)
    return buffer.getvalue()


def write_zip(path, members):
    """A stored zip of {name: bytes}, sorted and with one fixed date: equal input, equal bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            info.create_system = 3  # the same on every system
            archive.writestr(info, members[name])


def make(args):
    folder = pathlib.Path(args.data_dir)
    split = json.loads((folder / "split_zhou_EuroSAT.json").read_text())
    chosen = choose(split, args)
    noise = np.random.default_rng(args.seed)
    members = {"LICENSE": (folder / "LICENSE.phelber").read_bytes()}
    rows, stored = [], []
    with zipfile.ZipFile(folder / "EuroSAT_RGB_2750.zip") as archive:
        for name, label, part in chosen:
            with archive.open(f"2750/{name}") as file:
                tile = np.asarray(Image.open(file).convert("RGB"))
            path = f"{part}/{pathlib.PurePosixPath(name).name}"
            members[path] = jpeg(other_sensor(tile, noise, args.strength), args.quality)
            stored.append(np.asarray(Image.open(io.BytesIO(members[path]))))
            rows.append([path, label, part, name])
    words = random.Random(args.seed)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["path", "label", "split", "caption", "source"])
    of = measure(np.stack(stored))
    for (path, label, part, name), said in zip(rows, facts(of, thresholds(of))):
        writer.writerow([path, label, part, caption(label, said, words), f"EuroSAT 2750/{name}"])
    members["demo.csv"] = text.getvalue().encode()
    write_zip(args.output, members)
    content = pathlib.Path(args.output).read_bytes()
    print(f"{args.output}: {len(rows)} images, {len(content):,} bytes, "
          f"sha256 {hashlib.sha256(content).hexdigest()}")


def get_args(argv=None):
    assets = pathlib.Path(__file__).resolve().parent.parent / "assets"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data-dir", required=True, help="folder with EuroSAT's zip, split file and licence")
    add("--output", default=str(assets / "demo.zip"), help="file to write")
    add("--train", type=int, default=64, help="training images per class")
    add("--val", type=int, default=16, help="validation images per class")
    add("--test", type=int, default=100, help="test images per class")
    add("--strength", type=float, default=0.6, help="of the other sensor's look; 0 is the original")
    add("--quality", type=int, default=85, help="JPEG quality")
    add("--seed", type=int, default=0, help="of the choice of images, the noise and the wording")
    return parser.parse_args(argv)


if __name__ == "__main__":
    make(get_args())
