"""Images per second on one core: Pillow's decoding + torchvision's transforms against ours.

    python tests/bench_data.py [--rounds 5]

Both sides of a row start from the same JPEG files and end with normalised float batches of 32,
one thread, in alternation; medians. The images are those of the development data (DTD). Not
collected by pytest.
"""
import argparse
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from PIL import Image  # noqa: E402

from data import CLIP_MEAN, CLIP_STD, normalise, Preprocess, read_image  # noqa: E402

DTD = pathlib.Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "dtd" / "images"
BATCH = 32


def batches(paths, view):
    for i in range(0, len(paths), BATCH):
        yield torch.stack([view(path) for path in paths[i:i + BATCH]])


def transform_rows(rounds=5, images=360):
    """Print a markdown table: evaluation and training transforms against torchvision's."""
    from torchvision import transforms as tv
    paths = sorted(DTD.glob("*/*.jpg"))
    paths = paths[::max(1, len(paths) // images)][:images]
    if not paths:
        print("no images to measure with: the development data is not here")
        return
    bicubic = tv.InterpolationMode.BICUBIC
    end = [tv.ToTensor(), tv.Normalize(CLIP_MEAN, CLIP_STD)]
    theirs = {"test": tv.Compose([tv.Resize(224, bicubic), tv.CenterCrop(224), *end]),
              "train": tv.Compose([tv.RandomResizedCrop(224, interpolation=bicubic),
                                   tv.RandomHorizontalFlip(), *end])}
    exact, fast = Preprocess(224), Preprocess(224, exact=False, dtype=torch.uint8)
    crop = Preprocess(224, train=True, exact=False, dtype=torch.uint8)
    crop_exactly = Preprocess(224, train=True)

    def official(kind):
        for _ in batches(paths, lambda path: theirs[kind](Image.open(path).convert("RGB"))):
            pass

    def ours(view):
        for batch in batches(paths, lambda path: view(read_image(path))):
            normalise(batch)
    rows = {"test images, exact": ("test", exact),
            "test images, exact=False, uint8": ("test", fast),
            "training crops, exact": ("train", crop_exactly),
            "training crops, exact=False, uint8": ("train", crop)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    print(f"\n| {len(paths)} JPEGs decoded, resized, normalised, one core | torchvision, images/s "
          f"| ours, images/s | ratio | largest difference |\n|---|---:|---:|---:|---:|")
    for name, (kind, view) in rows.items():
        ours(view), official(kind)
        speed = {"theirs": [], "ours": []}
        for _ in range(rounds):
            for side, work in (("theirs", lambda: official(kind)), ("ours", lambda: ours(view))):
                began = time.perf_counter()
                work()
                speed[side].append(len(paths) / (time.perf_counter() - began))
        ratio = statistics.median(a / b for a, b in zip(speed["ours"], speed["theirs"]))
        twin = Preprocess(224, train=kind == "train", dtype=torch.uint8)
        raw = Preprocess(224, train=kind == "train", exact=view.exact, dtype=torch.uint8)
        worst = max(int((twin(image).int() - raw(image).int()).abs().max())
                    for image in map(read_image, paths))
        print(f"| {name} | {statistics.median(speed['theirs']):.0f} "
              f"| {statistics.median(speed['ours']):.0f} | {ratio:.2f} | {worst}/255 |")
    torch.set_num_threads(threads)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    transform_rows(parser.parse_args().rounds)
