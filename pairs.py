"""Images with captions: any captioned source as a data set, and batches of pairs.

    pairs = open_pairs("flickr8k", "train", data_dir="data")     # no image is touched
    view = Preprocess(224, train=True, seed=1)
    loader = make_pair_loader(pairs.with_transform(view), 256, seed=1)
    for images, used, asked in loader: ...                       # texts: pairs.captions[used[i]]

What sources are understood stands in captions.py. Batches are functions of (seed, epoch).
"""
import contextlib
import functools
import hashlib
import io
import json
import os
import pathlib
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from captions import LAYOUTS, list_pairs
from images import (Batches, DataError, ignore_stop, Images, Loader, locate, sample_seed, SpanStore,
                    SPLITS, UnreadableImage)


class Retrieval(NamedTuple):
    """What a search is scored on: `PairSet.retrieval`."""
    texts: list             # the queries; the images are the pool
    relevant: torch.Tensor  # (R, 2) int64: text, image; a text may have several images, or none
    notes: list


class PairSet(Images):
    """Images with their captions. `set[c]` or `set[(epoch, c)]` -> (image, used, asked): asked is
    c, a position in `captions`, and so is used, unless its image cannot be read; then used is
    another pair, found by c alone, so the same in every run and worker. The image is a PIL image,
    or what transform(image, epoch, c) makes of it. DataError if a hundred tries find none.

    name, split, root   as opened                   paths      images as listed, each once
    captions            list of str, folded blanks  owner      caption -> position in paths
    counts              images per split            notes      sentences worth telling the user
    fingerprint         sha256 of the lists of all splits: identifies the data on resume
    pixels              the file of `cache`, or None
    """

    def __init__(self, source, split):
        self.take(source.part(split))
        own = "val" if source.rows[split] is source.rows["val"] else split  # val is used as test
        self.store = source.store or locate(source.root, self.paths, split=own)
        self.introduce(source, split, source.rows, f"with {len(self):,} {split} captions")
        self.transform = self.pixels = None

    def take(self, rows):
        """Hold these rows [(path, caption, query)] instead."""
        self.rows, pairs = rows, [row for row in rows if row[0] and row[1]]
        self.paths = list(dict.fromkeys(row[0] for row in rows if row[0]))
        place = {path: position for position, path in enumerate(self.paths)}
        self.owner, self.captions = [place[row[0]] for row in pairs], [row[1] for row in pairs]
        self.__dict__.pop("captions_of", None)

    @functools.cached_property
    def captions_of(self):
        """For each image the positions of its captions."""
        found = [[] for _ in self.paths]
        for c, owner in enumerate(self.owner):
            found[owner].append(c)
        return found

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, key):
        epoch, asked = key if isinstance(key, tuple) else (0, key)
        used = asked
        for attempt in range(1, 101):
            try:
                image = self.store.image(self.paths[self.owner[used]])
                image = self.transform(image, epoch, asked) if self.transform else image
                return image, used, asked
            except UnreadableImage as error:
                reason, used = error, sample_seed(0, attempt, asked) % len(self)
        raise DataError(f"{self.name}: a hundred images cannot be read ({reason}); restore them")

    def image_items(self):
        """The images, each once, labelled by its own position. The caller counts the -1 of
        unreadable ones and hands them to `refuse_losses`."""
        return Images(self.store, self.paths, range(len(self.paths)), self.transform)

    def retrieval(self):
        """-> Retrieval. Each caption is a query for its own image. Where texts are listed apart, as
        for Chinese-CLIP, each text is a query, even without an image, and each image is in the
        pool, even without a text. DataError if there is nothing to choose from."""
        place = {path: position for position, path in enumerate(self.paths)}
        asking = [(i if query is None else query, path, text)
                  for i, (path, text, query) in enumerate(self.rows) if text]
        texts = {query: text for query, _, text in asking}
        number = {query: i for i, query in enumerate(texts)}
        relevant = dict.fromkeys((number[query], place[path]) for query, path, _ in asking if path)
        if len(place) < 2 or not relevant:
            raise DataError(f"{self.name}: {len(relevant)} pairs of {len(texts)} texts and "
                            f"{len(place)} {self.split} images; a search needs 2 images")
        notes = [f"{self.split} is small: t2i R@k is always 100 from k = {len(place)} on, i2t from "
                 f"k = {len(texts)} on"] * (min(len(place), len(texts)) < 10)
        return Retrieval(list(texts.values()), torch.tensor(list(relevant)), notes)

    def texts_of(self, image):
        """The captions of the image at this position in paths."""
        return [self.captions[c] for c in self.captions_of[image]]

    def replaced(self, used, asked):
        """The names of images for which others stand in a batch, as they cannot be read; without
        those that `refuse_losses` has allowed."""
        names = (self.paths[self.owner[c]] for c in asked[used != asked].tolist())
        return [name for name in names if name not in self.lost]

    def describe(self, captions):
        """A batch of these captions, by the names of its first images."""
        return "the batch of " + ", ".join(self.paths[self.owner[c]] for c in captions[:8].tolist())

    def subset(self, images):
        """The same set with only the images at these positions, in this order."""
        chosen, rows = self.with_transform(self.transform), []
        chosen.notes = list(self.notes)
        pairs = [row for row in self.rows if row[0] and row[1]]
        for i in images:
            rows += [pairs[c] for c in self.captions_of[i]] or [(self.paths[i], "", 0)]
        chosen.take(rows)
        return chosen

    def stamps(self):
        """What identifies the images: other files, or other bytes under their names, change it."""
        there = filter(self.store.has, self.paths)
        return [str(self.store), [(path, *self.store.stamp(path)) for path in there]]

    def cache(self, run, folder, limit=8 << 30, workers=0):
        """Decode every image once into one file of `folder`, read from then on, and return the set.
        Images keep their size: of smaller ones other random crops would come.

        The first process fills it (run: a Run, or None for one process), and the next run finds it.
        If it would take over `limit` bytes, that is noted. DataError if over 1 % cannot be read:
        of training images only if they are kept, for otherwise nothing else needs them all now."""
        if self.pixels or limit <= 0 and self.split == "train":
            return self
        identity = json.dumps(self.stamps())
        file = pathlib.Path(folder, hashlib.sha256(identity.encode()).hexdigest()[:24] + ".pixels")
        if run and len(self.paths) > 2000 and not file.with_suffix(".json").is_file():
            run.say(f"decoding {len(self.paths):,} {self.split} images once, into {folder}")
        fill = functools.partial(fill_pixels, self, file, limit, workers)
        reason, lost = run.on_first(fill) if run else fill()
        spans = read_spans(file)
        if reason or spans is None:
            if limit > 0:  # else it was asked for
                self.notes.append(f"{self.split} images are decoded at every use: {reason or file}")
        else:
            lost = [i for i, span in enumerate(spans) if not span]
            index = {path: (file, *span) for path, span in zip(self.paths, spans) if span}
            self.store, self.pixels = SpanStore(str(self.store), index), file
        self.refuse_losses(lost, "they do not decode")
        return self


def as_ppm(image, epoch, index):
    """RGB image -> its pixels as the bytes of a PPM file."""
    out = io.BytesIO()
    image.save(out, "ppm")
    return out.getvalue()


def read_spans(file):
    """Where `fill_pixels` put each image in its file: (offset, bytes), or None for one that cannot
    be read. None if the two files are not whole."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        spans = json.loads(file.with_suffix(".json").read_text())
        if file.stat().st_size == sum(size for _, size in filter(None, spans)):
            return spans


def fill_pixels(pairs, file, limit, workers):
    """Write the images of a set to `file`, then their places to a JSON -> "" or why not, and the
    positions of unreadable ones. Held-out images are all decoded, even if they are too many to
    keep: what cannot be scored should be known before a run trains."""
    items = pairs.with_transform(as_ppm).image_items()
    index, spans, reason = file.with_suffix(".json"), [], ""
    part = file.with_suffix(f".{os.getpid()}.part")  # another run may fill, or read, the same
    if read_spans(file) is not None:
        return "", []
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as out:
            for content, position, i in DataLoader(items, None, num_workers=workers,
                                                   worker_init_fn=ignore_stop,
                                                   generator=torch.Generator()):
                spans.append((out.tell(), len(content)) if position >= 0 else None)
                if not reason:
                    out.write(content if position >= 0 else b"")
                    whole = out.tell() / (i + 1) * len(items)
                    if whole > limit and i >= min(32, len(items)) - 1:  # told early
                        reason = f"they take about {whole / 2**30:,.1f} GB"
                if reason and pairs.split == "train":
                    break
            if reason:
                raise OSError(reason)
            out.flush()
            os.fsync(out.fileno())
        os.replace(part, file)
        part.write_text(json.dumps(spans))
        os.replace(part, index)
    except OSError as error:
        reason = str(error)
    finally:
        with contextlib.suppress(OSError):  # it has another name, or there is none
            part.unlink()
    return reason, [i for i, span in enumerate(spans) if not span]


def open_pairs(name_or_path, split, data_dir="data", layout="auto", caption_file=None,
               image_column=None, caption_column=None, whole=False):
    """Images with captions, split "train", "val" or "test" -> PairSet. No image is touched.

    name_or_path: a folder, a file of captions, a zip of one with its images, or shards (a folder,
    shard-{0000..0012}.tar, several joined by ::), also under `data_dir`. layout: one of LAYOUTS, or
    "simple-clip", that notebook's split. caption_file: another one of the folder. whole: a source
    without splits goes to the asked one undivided. Raises DataError."""
    return PairSet(list_pairs(name_or_path, data_dir, layout, caption_file, image_column,
                              caption_column, split if whole else None), split)


def open_splits(args):
    """The train, val and test pairs that the flags of `add_pair_flags` name, None for a split that
    there is not; their files are looked for. What is to be told of the whole is in train.notes."""
    source = list_pairs(args.data, args.data_dir, args.layout, args.caption_file,
                        args.image_column, args.caption_column)
    sets = [PairSet(source, split) if split == "train" or source.rows[split] else None
            for split in SPLITS]
    for pairs in filter(None, sets):
        pairs.notes = pairs.notes if pairs.split == "train" else []
        pairs.check_files()
    return sets


# -----------------------------------------------------------------------------
# Batches

class PairBatches(Batches):
    """Yields lists of (epoch, caption) in which no image comes twice in one global batch, else two
    captions of it would be each other's negatives. A function of (seed, epoch); rank r of W takes
    every W-th of a batch. Every batch is full: the rest of an epoch is left out, by chance.

    An epoch goes in rounds over the images, each with its next caption in an order of the epoch's
    own: captions "one" is one round, "all" as many as have images for a batch. Of a Mixture, every
    batch has batch_size[k] pairs of part k. An epoch is one of the first part; the others go round
    as often as they are short, each pass an epoch. counts: pairs of a batch by process."""

    def __init__(self, pairs, batch_size, seed=0, rank=0, world_size=1, captions="one"):
        if captions not in ("one", "all"):
            raise DataError(f"captions {captions!r}: expected one or all")
        self.sizes = [batch_size] if isinstance(batch_size, int) else list(batch_size)
        self.counts = [len(range(r, sum(self.sizes), world_size)) for r in range(world_size)]
        self.owners, self.rounds, self.lengths = [], [], []
        for part, size in zip(getattr(pairs, "parts", [pairs]), self.sizes, strict=True):
            owner = np.asarray(part.owner, dtype=np.int64)
            count = np.bincount(owner)
            images = (count > 0).sum()
            if not 1 <= size <= images or sum(self.sizes) < 2:
                raise DataError(f"--batch-size {size}: expected 2 up to the {images} images to "
                                f"train on, as no batch has one twice")
            self.owners.append(owner)
            self.rounds.append(int(np.sort(count)[-size]) if captions == "all" else 1)
            self.lengths.append(int(np.minimum(count, self.rounds[-1]).sum()) // size)
        super().__init__(self.lengths[0] * sum(self.sizes), sum(self.sizes), seed, rank, world_size,
                         drop_last=True)

    def order(self, k, epoch):
        """Positions of captions in part k, (its batches, its size)."""
        owner, size, length = self.owners[k], self.sizes[k], self.lengths[k]
        seed = sample_seed(self.seed + 7919 * k, epoch, -1)
        stream = np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32])  # frozen for ever
        mixed = np.lexsort((stream.random_sample(len(owner)), owner))  # by image, then by chance
        first = np.searchsorted(owner[mixed], owner[mixed])
        turn, queue = np.arange(len(owner)) - first, mixed[:0]  # turn 0: an image's first caption
        for number in range(self.rounds[k]):
            more = stream.permutation(mixed[turn == number])
            unfinished = queue[len(queue) // size * size:]
            again = np.isin(owner[more], owner[unfinished])
            queue = np.concatenate((queue, more[~again], more[again]))
        return queue[:length * size].reshape(length, size)

    def __iter__(self):
        epoch, turns, orders = self.epoch, {}, {}
        starts = np.cumsum([0, *map(len, self.owners)])
        for batch in range(self.first_batch, len(self)):
            share = []
            for k, length in enumerate(self.lengths):
                turn, place = divmod(epoch * len(self) + batch, length)
                if turns.get(k) != turn:
                    turns[k], orders[k] = turn, self.order(k, turn) + starts[k]
                share += [(turn, c) for c in orders[k][place].tolist()]
            yield share[self.rank::self.world_size]


class Mixture(PairSet):
    """Several PairSets as one, their captions and images numbered through: what batches that replay
    older data are drawn from. The transform is the first one's; paths are <part>:<path>."""

    def __init__(self, parts):
        self.parts, self.transform = list(parts), parts[0].transform
        self.name, self.notes, self.store = " + ".join(part.name for part in parts), [], self
        self.take([(f"{k}:{path}", text, query) for k, part in enumerate(parts)
                   for path, text, query in part.rows if path])

    @property
    def lost(self):
        return {f"{k}:{path}" for k, part in enumerate(self.parts) for path in part.lost}

    def image(self, path):
        part, _, path = path.partition(":")
        return self.parts[int(part)].store.image(path)


class FeatureLoader:
    """A loader's batches with the rows of (n, F) features in the place of images. A pair whose row
    is not a number, its image being lost, is replaced as in a PairSet."""

    def __init__(self, loader, features):
        self.batch_sampler, self.dataset = loader.batch_sampler, loader.dataset
        self.features, self.owner = features, torch.tensor(self.dataset.owner)
        gone = features.isnan().any(dim=1).tolist()
        self.lost = {path for path, nan in zip(self.dataset.paths, gone, strict=True) if nan}
        self.pairs = self.dataset.with_transform(None)
        self.pairs.store = self

    def __len__(self):
        return len(self.batch_sampler)

    def image(self, path):
        if path in self.lost:
            raise UnreadableImage(f"{path}: it had no features")

    def __iter__(self):
        for batch in self.batch_sampler:
            used = torch.tensor([self.pairs[key][1] for key in batch], dtype=torch.long)
            asked = torch.tensor([c for _, c in batch], dtype=torch.long)
            yield self.features[self.owner[used]], used, asked


def make_pair_loader(pairs, batch_size, seed=0, captions="one", rank=0, world_size=1, workers=0,
                     **options):
    """DataLoader for contrastive training over a PairSet with a Preprocess: batches of images
    (B, 3, S, S), used (B,), asked (B,). `loader.batch_sampler` is the PairBatches; `batch_size`
    (global; of a Mixture a list, the pairs of each part) and `options` as for make_loader."""
    batches = PairBatches(pairs, batch_size, seed, rank, world_size, captions)
    return Loader(pairs, batches, workers, **options)


def decode_once(run, sets, folder, args):
    """`PairSet.cache` the images of some sets, as the flags say, and say what was found -> loader
    options. What is decoded needs no workers, unless --workers asks for them."""
    options = run.loader_options(args.workers)
    for pairs in sets:
        told = len(pairs.notes)
        pairs.cache(run, folder, int(min(2 ** 20, args.cache_gb) * 2 ** 30), options["workers"])
        run.say(*(f"note: {note}" for note in pairs.notes[told:]))
    if args.workers < 0 and all(pairs.pixels for pairs in sets):
        options["workers"] = 0
    return options


def identities(pairs):
    """A PairSet or Mixture -> (M, 2) int64: for each caption the number of its image and of its
    wording, in which case does not count. Equal numbers are no negatives of each other."""
    image, wording = {}, {}
    return torch.tensor([(image.setdefault((str(part.store), part.paths[owner]), len(image)),
                          wording.setdefault(caption.casefold(), len(wording)))
                         for part in getattr(pairs, "parts", [pairs])
                         for owner, caption in zip(part.owner, part.captions)])


def add_pair_flags(parser, training=True):
    """The flags of captioned data, the same in every script."""
    group = parser.add_argument_group("images with captions")
    group.add_argument("--data", default="demo", help="a folder, a caption file, shards such as "
                       "shard-{0000..0012}.tar, or a name under --data-dir (default: demo)")
    group.add_argument("--data-dir", default="data", help="where named data lies (default: data)")
    group.add_argument("--layout", default="auto", choices=("auto", "simple-clip", *LAYOUTS),
                       help="how the data is laid out, or simple-clip for that notebook's split")
    group.add_argument("--caption-file", help="another caption file, such as a translation")
    group.add_argument("--image-column", help="default: found by name")
    group.add_argument("--caption-column", help="default: found by name")
    if training:
        group.add_argument("--captions", choices=("one", "all"), default="one", help="in each "
                           "epoch one caption of each image, or all (default: one)")
    group.add_argument("--cache-gb", type=float, default=8.0, help="keep decoded images in a "
                       "file of at most this size, 0: do not (default: 8)")
    return group
