"""The teachers of distillation: CLIPs that answer, or what they once said of every image.

    python -m tools.reinforce --teacher ViT-B/16 --data flickr8k --output stored    asks them once
    python train_distill.py --reinforced stored --data flickr8k                     and no more

What teachers compute is the same for every student, and most of the cost. A stored teacher (Faghri
et al. 2023) is their features of a few random views of every image. A view is a function of (seed,
its number, the image), so that nothing of it need be kept. The folder of a stored teacher has

    teacher.json    what it was made from, the teachers, and the sha256 of all of it
    images.npy      (V, images, D) fp32 unit rows, K teachers side by side; nan: not readable
    texts.npy       (captions, D)
"""
import dataclasses
import hashlib
import json

import numpy as np
import torch
from torch.utils.data import Dataset

import weights
from files import expanded, one_line
from images import DataError, Preprocess, sample_seed
from tokenizer import for_model


@dataclasses.dataclass
class Teacher:
    """One CLIP. Without `model` its answers for images are stored."""
    name: str
    path: str                       # where its weights lie
    sha256: str
    dim: int                        # D of its features
    scale: float
    look: tuple                     # how it takes images, see look_of
    proj: str                       # the kind of its heads, for a student with its text tower
    activation: str
    model: object = None
    tokenizer: object = None
    texts: torch.Tensor | None = None   # (M, D) unit rows, its answers to all captions, on the host

    def facts(self):
        """Itself in plain values, for teacher.json."""
        return {name: value for name, value in vars(self).items()
                if name not in ("model", "tokenizer", "texts")}


def look_of(model):
    """How a CLIP takes images: size, resize, interpolation."""
    return model.config.image_size, model.image_resize, model.image_interpolation


def open_teachers(run, names, activation=None, tokenizer=None):
    """CLIPs by name, file or folder -> [Teacher], frozen, on the device. tokenizer: file or folder
    of the vocabulary for those that are not OpenAI's."""
    found = []
    for name in names:
        model = run.move(weights.load(name, activation=activation).requires_grad_(False))
        for note in model.origin["notes"]:
            run.say(f"teacher {name}: {note.replace('--activation', '--teacher-activation')}")
        model.fuse_attention(run.fused_attention)
        found.append(Teacher(
            name=model.origin["name"], path=model.origin["path"], sha256=model.origin["sha256"],
            dim=model.config.embed_dim, scale=float(model.logit_scale.exp()), look=look_of(model),
            proj=model.config.proj, activation=model.config.activation, model=model,
            tokenizer=for_model(model, None if model.text_kind == "bpe" else tokenizer)))
    return found


def open_text_teacher(folder):
    """A BERT alone, without a head -> model, frozen, and tokenizer"""
    bert = weights.load(image_tower="tiny-vit:none", text_tower=folder).requires_grad_(False)
    width = len(bert.text_projection)
    bert.text_projection = torch.nn.Parameter(torch.eye(width), requires_grad=False)
    return bert, for_model(bert)


# -----------------------------------------------------------------------------
# What student and teachers see

class Views:
    """PIL image -> a tuple of uint8 (3, S, S): the same random view of it for each of `looks`, the
    ways in which models take images. A function of (seed, epoch, index)."""

    def __init__(self, looks, seed, crop, randaugment):
        scale, augment = (crop, 1.0) if crop else None, ["randaugment"] * randaugment
        self.each = {(size, resize, interpolation): Preprocess(
            size, train=True, seed=seed, scale=scale, flip=False, resize=resize,
            interpolation=interpolation, augment=augment) for size, resize, interpolation in looks}
        self.size = looks[0][0]

    def __call__(self, image, epoch=0, index=0):
        return tuple(draw(image, epoch, index) for draw in self.each.values())

    def probe(self, pairs):
        """The mean colours of view 0 of some images: equal where views are drawn alike."""
        items = pairs.with_transform(self).image_items()
        return [items[i][0][0].float().mean(dim=(1, 2)).tolist()
                for i in range(0, len(items), -(-len(items) // 8))]


# -----------------------------------------------------------------------------
# A stored teacher

def digest(folder, facts):
    """The sha256 of a stored teacher: of its facts and its arrays."""
    found = hashlib.sha256(json.dumps({**facts, "sha256": ""}, sort_keys=True).encode())
    for name in ("images.npy", "texts.npy"):
        found.update(weights.sha256_of(folder / name).encode())
    return found.hexdigest()


class Stored:
    """A folder that tools.reinforce wrote: images (V, n, D) and texts (M, D), read where rows are
    asked for; teachers; facts, what teacher.json holds. DataError where that is not there."""

    def __init__(self, folder):
        self.folder = folder = expanded(folder)
        try:
            self.facts = json.loads((folder / "teacher.json").read_text("utf-8"))
            self.images, self.texts = (torch.from_numpy(np.load(folder / f"{name}.npy", "c"))
                                       for name in ("images", "texts"))
            self.teachers = [Teacher(**{**facts, "look": tuple(facts["look"])})
                             for facts in self.facts["teachers"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder} holds no stored teacher, or a damaged one ({one_line(error)}"
                            f"); write it with python -m tools.reinforce") from None
        self.dims = [teacher.dim for teacher in self.teachers]
        for teacher, texts in zip(self.teachers, self.texts.split(self.dims, dim=1)):
            teacher.texts = texts

    def views(self, looks):
        return Views(looks, *(self.facts[name] for name in ("seed", "crop", "randaugment")))

    def check(self, pairs):
        """Raise DataError unless every byte is as it was written, and these are the images that
        the teachers saw, by their names and the pixels of eight of them, in the same views."""
        facts = self.facts
        if facts.get("sha256") != digest(self.folder, facts):
            raise DataError(f"the stored teacher in {self.folder} is damaged; write it again")
        seen = self.views([teacher.look for teacher in self.teachers]).probe(pairs)
        same = (facts["data"], facts["split"]) == (pairs.fingerprint, pairs.split)
        grey_levels = torch.tensor(seen), torch.tensor(facts["probe"])
        if not same or not torch.allclose(*grey_levels, rtol=0, atol=1):
            raise DataError(f"the stored teacher was asked about other images than those of "
                            f"{pairs.name}, or about other views of them; write it again")

    def answers(self, shown, epoch, used):
        """-> of each teacher the features (n, D_k) of what these captions' images showed."""
        images = [shown.owner[c] for c in used.tolist()]
        found = self.images[[shown.view(epoch, i) for i in images], images]
        if len(lost := found.isnan().any(dim=1).nonzero()):
            raise DataError(f"the stored teacher has no answer for {shown.paths[images[lost[0]]]}, "
                            f"which was not readable then; write it again")
        return found.split(self.dims, dim=1)


class ShownPairs(Dataset):
    """A PairSet each of whose images shows one of `count` stored views, drawn by (seed, epoch,
    image). views: for the looks in use."""

    def __init__(self, pairs, views, count, seed):
        self.pairs, self.transform, self.count, self.seed = (
            pairs.with_transform(None), views, count, seed)
        self.paths, self.owner = pairs.paths, pairs.owner

    def view(self, epoch, image):
        return sample_seed(self.seed + 3, epoch, image) % self.count

    def __getitem__(self, key):
        image, used, asked = self.pairs[key]
        i = self.owner[used]
        return self.transform(image, self.view(key[0], i), i), used, asked
