"""Weight files in and out: OpenAI's, OpenCLIP's, Hugging Face's, Chinese-CLIP's, and our own.

    from weights import load, save
    model = load("ViT-B/16")                  # OpenAI's, fetched once into ~/.cache/clip
    model = load("runs/clipfit/dtd")          # a run's folder, a checkpoint, a file of any layout
    model = load(image_tower="resnet50:IMAGENET1K_V2", text_tower="path/of/roberta-base")
    save(model, "clip.safetensors")

A file is never trusted: nothing in it is executed, its frame and checksums are verified first, and
sizes are read off the tensors. Every problem is a WeightsError of one line. What a file calls its
tensors, and what stands beside them, is the subject of layouts.py.
"""
import collections
import contextlib
import dataclasses
import functools
import hashlib
import http.client
import io
import json
import math
import mmap
import os
import pathlib
import pickle
import pickletools
import re
import sys
import typing
import urllib.error
import urllib.request
import warnings
import zipfile

import torch

from clip_model import (
    BERTS, CLIP, CONFIGS, HEADS, CLIPConfig, bert_fields, canonical_name,
    make_backbone)
from layouts import (
    WeightsError, about, check_layout, check_state, config_from_state_dict, describe,
    hugging_face_tables, image_fields, is_chinese_clip, known_from_card, known_from_hugging_face,
    known_from_open_clip, name_of, one_line, open_clip_tables, openai_names, text_fields,
    to_hugging_face)

OPENAI_URL = "https://openaipublic.azureedge.net/clip/models"
RELEASED = {  # name -> sha256, which is also the folder in the URL
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"}
TINY = pathlib.Path(__file__).resolve().parent / "assets" / "tiny_clip.safetensors"
FOLDER_FILES = (  # what a folder is asked for, in this order; the last are those of a run
    "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json",
    "clip.safetensors", "clip.pt", "chinese_clip.pt", "checkpoint_best.pt", "checkpoint_last.pt")

# -----------------------------------------------------------------------------
# Reading files. Nothing here runs code that a file brings along.

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}
STORAGES = {"DoubleStorage": torch.float64, "FloatStorage": torch.float32,
            "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
            "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
            "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool}


class ScriptObject:
    """Stands for every class of a TorchScript archive; holds its attributes and does nothing."""

    def __init__(self, *_):
        self.attributes = {}

    def __setstate__(self, state):
        self.attributes = state if isinstance(state, dict) else {}

    def tensors(self, prefix="", seen=()):
        if id(self) in seen:
            raise pickle.UnpicklingError("a module that contains itself")
        for name, value in self.attributes.items():
            if isinstance(value, torch.Tensor):
                yield prefix + str(name), value
            elif isinstance(value, ScriptObject):
                yield from value.tensors(f"{prefix}{name}.", (*seen, id(self)))


class ScriptReader(pickle.Unpickler):
    """Reads the tensors out of a TorchScript archive; any other wish of the pickle is refused."""

    def __init__(self, archive, root):
        self.archive, self.root, self.storages = archive, root, {}
        data = archive.read(f"{root}data.pkl")
        for code, number, _ in pickletools.genops(data):  # the unpickler's table grows to the
            if code.name.endswith("PUT") and number > len(data):  # largest: gigabytes of zeros
                raise pickle.UnpicklingError(f"it asks for a memo of {number:,} places")
        super().__init__(io.BytesIO(data))

    def find_class(self, module, name):
        if module.startswith("__torch__"):
            return ScriptObject
        if module == "torch" and name in STORAGES:
            return name
        if module == "torch.jit._pickle":  # typed lists
            return lambda data, *_: data
        harmless = {"torch._utils._rebuild_tensor_v2": self.rebuild, "torch.device": str,
                    "torch._utils._rebuild_parameter": lambda data, *_: data,
                    "collections.OrderedDict": collections.OrderedDict}
        if f"{module}.{name}" not in harmless:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return harmless[f"{module}.{name}"]

    def persistent_load(self, pid):
        _, kind, key, *_ = pid
        if key not in self.storages:
            raw = bytearray(self.archive.read(f"{self.root}data/{key}"))
            self.storages[key] = (torch.frombuffer(raw, dtype=STORAGES[kind]) if raw else
                                  torch.empty(0, dtype=STORAGES[kind]))
        return self.storages[key]

    @staticmethod
    def rebuild(storage, offset, size, stride, *_):
        return torch.as_strided(storage, size, stride, offset)  # checks the storage's bounds


def read_zip(path):
    """A TorchScript archive or a `torch.save` file -> (content, format)."""
    try:
        archive = zipfile.ZipFile(path)
    except Exception:  # BadZipFile, or one of five others when the directory is garbled
        raise WeightsError("truncated: no zip directory at its end; fetch it again") from None
    with archive:
        names = archive.namelist()
        root = next((name.removesuffix("data.pkl") for name in names
                     if name.count("/") <= 1 and name.endswith("data.pkl")), None)
        if root is None:
            raise WeightsError("a zip archive without a data.pkl, so not PyTorch's; if it is a "
                               "bundle, unpack it and name the weight file inside")
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()
               if not info.filename.startswith(f"{root}code/")):  # TorchScript deflates its code
            raise WeightsError("a zip with compressed weights, which PyTorch never writes; it was "
                               "repacked, take the original file")
        try:  # torch.load and torch.jit.load never look at checksums; 0.3 s for 340 MB
            damaged = archive.testzip() is not None
        except Exception:  # a garbled member header raises anything
            damaged = True
        if damaged:
            raise WeightsError("damaged (a member fails its checksum); fetch it again")
        if not any(name.startswith((f"{root}code/", f"{root}constants.pkl")) for name in names):
            return torch_load(path), "PyTorch zip"
        try:
            return dict(ScriptReader(archive, root).load().tensors()), "TorchScript archive"
        except Exception as error:  # a hostile pickle can raise anything
            raise WeightsError(f"a TorchScript archive of more than plain weights, which was not "
                               f"run: {one_line(error)}") from None


def torch_load(path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch would say of an odd file is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises five kinds for five kinds of bad file
        raise WeightsError(f"more than tensors and plain values, or no PyTorch file; it was not "
                           f"run: {one_line(error)}") from None


def read_safetensors(path):
    """-> (tensors, metadata). The format has no checksum, so only its frame can be verified."""
    size, tensors, position = path.stat().st_size, {}, 0
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if not 10 <= start <= min(size, 100_000_000):
            raise WeightsError(f"a header of {start:,} bytes in a file of {size:,}")
        header = json.loads(file.read(start - 8))
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    metadata = dict(header.pop("__metadata__", {}))
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise WeightsError(f"{name!r} is of type {entry['dtype']}, which is not read here; "
                               f"expected one of {', '.join(DTYPES)}")
        dtype, shape = DTYPES[entry["dtype"]], [int(n) for n in entry["shape"]]
        (begin, end), count = entry["data_offsets"], math.prod(shape)
        if begin != position or end - begin != count * dtype.itemsize or min(shape, default=0) < 0:
            raise WeightsError(f"tensor {name!r} does not fit its place")
        flat = (torch.frombuffer(data, dtype=dtype, count=count, offset=start + begin) if count
                else torch.empty(0, dtype=dtype))
        tensors[name], position = flat.reshape(shape).clone(), end
    if start + position != size:
        raise WeightsError(f"{size:,} bytes where the header says {start + position:,}")
    return tensors, metadata


def read_shards(path):
    """The tensors of all shards that a Hugging Face *.index.json names, each verified."""
    where, tensors = read_json(path)["weight_map"], {}
    for name in sorted(set(where.values())):
        if pathlib.PurePath(name).name != name:
            raise WeightsError(f"it names {name!r}, outside its own folder")
        content, _, _ = read_file(path.parent / name)
        if content.keys() != {key for key, shard in where.items() if shard == name}:
            raise WeightsError(f"{name} holds other tensors than it says; fetch both again")
        tensors |= content
    return tensors


def read_json(path):
    """The table in a JSON file; {} where there is no such file, or one with something else."""
    with about(path), contextlib.suppress(FileNotFoundError):
        content = json.loads(path.read_text("utf-8"))
        return content if isinstance(content, dict) else {}
    return {}


def read_file(path):
    """Any weight file -> (content, format, metadata); WeightsError says what a bad one is."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from None
    for wrong, what in (
            (size == 0, "empty (0 bytes): an interrupted download or copy"),
            (head.lstrip()[:1] == b"<", "a web page (HTML): the download gave a login or error "
             "page; fetch it again in a browser"),
            (head.startswith(b"version https://git-lfs"), "a Git LFS pointer; run `git lfs pull` "
             "where it came from"),
            (head[:2] == b"\x1f\x8b", "gzip-compressed; unpack it first")):
        if wrong:
            raise WeightsError(f"{path} is {what}")
    with about(path):
        if path.name.endswith(".index.json"):
            return read_shards(path), "shards", {}
        if path.suffix == ".safetensors" or head[8:9] == b"{":
            with about("damaged, truncated or no safetensors file"):
                tensors, metadata = read_safetensors(path)
            return tensors, "safetensors", metadata
        if head[:2] == b"PK":
            content, kind = read_zip(path)
        elif head[:1] == b"\x80":
            content, kind = torch_load(path), "PyTorch pickle"
        else:
            raise WeightsError(f"not a weight file: expected a PyTorch .pt/.bin or .safetensors, "
                               f"and it begins with {head[:8]!r}")
    return content, kind, getattr(content, "_metadata", {})  # see `save`


def state_in(content):
    """The named tensors that a file holds -> (state, notes).

    Finds the state dict inside a training checkpoint and takes off the prefixes that wrappers
    leave (`module.` of DDP, `_orig_mod.` of torch.compile, `model.` of Lightning).
    """
    notes = []
    for _ in range(8):  # a hostile file can hold itself
        inner = next((key for key in ("state_dict", "model", "model_state_dict", "module", "net",
                                      "weights", "ema", "model_ema", "state_dict_ema")
                      if isinstance(content, dict) and isinstance(content.get(key), dict)
                      and content[key]), None)
        if inner is None:
            break
        notes.append(f"weights found under {inner!r}")
        content = content[inner]
    state = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)
             and isinstance(name, str)} if isinstance(content, dict) else {}
    if not state:
        raise WeightsError("no tensors under names; expected a state dict")
    for name, tensor in state.items():  # a stride of 0 makes terabytes of four bytes
        if (tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized
                or tensor.nbytes > tensor.untyped_storage().nbytes()):
            raise WeightsError(f"{name!r} is not a plain tensor (sparse, quantized, expanded or "
                               f"without data)")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightsError(f"{name!r} holds NaN or infinity: a damaged file, or a run that "
                               f"diverged")
    prefixes = ("module.", "_orig_mod.", "model.", "clip.")
    while found := next((p for p in prefixes if all(n.startswith(p) for n in state)), None):
        state = {name.removeprefix(found): value for name, value in state.items()}
        notes.append(f"prefix {found!r} removed")
    return state, notes


# -----------------------------------------------------------------------------
# Loading

class Source(typing.NamedTuple):
    """A weight file, read and checked, or one tower of it."""
    state: dict               # tensors under OpenAI's names; {} for random numbers
    known: dict               # what stands beside the tensors, see layouts.py
    origin: dict              # CLIP.origin
    vocabulary: dict | None = None
    fields: dict = {}         # of CLIPConfig: those of the one tower


def read(name_or_path, activation=None):
    """A name, file or folder -> Source. Raises WeightsError."""
    path = locate(name_or_path)
    shard = re.search(r"-\d{5}-of-(\d{5})\.", path.name)
    if shard and int(shard[1]) > 1:
        raise WeightsError(f"{path} is one shard of {int(shard[1])}; give its folder, or the "
                           f"*.index.json in it")
    content, kind, metadata = read_file(path)
    with about(path):
        card = stored_card(content, metadata)
        if card and isinstance(content.get("weights"), dict):
            state, layout, notes = checkpoint_state(content, card), "checkpoint", []
        else:
            state, notes = state_in(content)
            state, layout = openai_names(state)
        known = known_from_card(card) if card else known_beside(path.parent, layout)
        if (known.get("text") or {}).get("pool", "pooler") != "pooler":
            state = {name: t for name, t in state.items() if not name.startswith("bert.pooler.")}
        state = spread_embedding(state, known.get("vocab_size", 49_408))
        if not (activation or "activation" in known or kind == "TorchScript archive"
                or layout == "chinese_clip") and "logit_scale" in state:
            notes.append("the file does not say its activation and heads: OpenAI's were taken, "
                         "QuickGELU and 64 wide; models trained by LAION need --activation gelu")
        known["activation"] = activation or known.get("activation", "quick_gelu")
        vocabulary, name = card.get("vocabulary"), card.get("origin", {}).get("name")
        return Source(state, known, {
            "name": str(name or short(name_or_path)), "path": str(path.resolve()), "sha256": sha256_of(path),
            "layout": layout, "format": kind, "notes": notes},
            vocabulary if isinstance(vocabulary, dict) else None)


def short(tower):
    """What a name, a file or NAME:WEIGHTS is called in tables and folders of runs."""
    text = str(tower)
    if expanded(text).exists():
        return expanded(text).resolve().name
    return re.sub(r"^(torchvision|timm):", "", text).partition(":")[0]


def known_beside(folder, layout):
    """What a library's configuration in the folder of the weights says."""
    def table(name):
        return read_json(folder / name)
    if layout == "chinese_clip":
        return {"text": {"pool": "first"}}
    return (known_from_hugging_face if layout == "hf" else known_from_open_clip)(table)


def stored_card(content, metadata):
    """What `card` wrote into a file, of untrusted plain values; {} where there is none."""
    found = content.get("card") if isinstance(content, dict) else None
    if not isinstance(found, dict):
        found = {key: json.loads(metadata[key]) for key in ("clip_config", "pixels", "vocabulary")
                 if key in metadata}
    return found if isinstance(found.get("clip_config"), dict) else {}


def checkpoint_state(content, card):
    """The whole state of a run's checkpoint. It may hold no more than what was trained: the rest
    is read from the file that the run began with."""
    state = {}
    for key in ("weights", "buffers", *(["ema"] if content.get("tested") == "ema" else [])):
        state |= state_in(content[key])[0] if content.get(key) else {}
    if len(state) < card["tensors"] and card["origin"]["path"]:
        origin = card["origin"]
        gone = not expanded(origin["path"]).exists()
        name = origin["name" if gone and origin["name"] in (*RELEASED, "tiny") else "path"]
        with about("it holds only what was trained, and of the weights that it began with"):
            base = read(name)
        if base.origin["sha256"] != origin["sha256"]:
            raise WeightsError(f"it began with weights of sha256 {origin['sha256']}, and {name} "
                               f"holds others now")
        state = base.state | state
    return state


def load(name_or_path=None, image_tower=None, text_tower=None, proj="linear", embed_dim=512,
         pool=None, image_size=None, activation=None, keep_projections=True):
    """A CLIP with weights, fp32, in eval mode, on the CPU.

    name_or_path: a released name ("ViT-B/16", fetched once into OpenAI's own ~/.cache/clip),
    "tiny" (bundled), a file (.pt, .bin, .safetensors: OpenAI, OpenCLIP, Hugging Face, Chinese-CLIP
    or our own, also a training checkpoint), or a folder of these, also a run's. A name wins over a
    folder of the same name; "./RN50" is the folder. activation: "quick_gelu" or "gelu" where the
    file does not tell; OpenAI's otherwise. Raises WeightsError.

    image_tower, text_tower: the towers of a new CLIP, see `image_source` and `text_source`; the one
    that is not given comes from `name_or_path`. The other arguments are for `join` alone.
    """
    if image_tower is not None or text_tower is not None:
        return join(image_source(image_tower or name_or_path, image_size, activation),
                    text_source(text_tower or name_or_path, pool, activation),
                    proj, embed_dim, keep_projections)
    if name_or_path is None:
        raise WeightsError("nothing to load; expected a name, a path or two towers")
    source = read(name_or_path, activation)
    with about(source.origin["path"]):
        config = config_from_state_dict(source.state, **source.known)
    with torch.device("meta"):  # nothing is initialised only to be overwritten
        model = CLIP(config)
    model.origin = source.origin
    if name_of(config) != "custom":
        model.origin["name"] = name_of(config)
    return fill(model, source.state, source.known.get("pixels"), source.vocabulary)


def fill(model, state, pixels, vocabulary):
    """Give a model, which may be on "meta", its tensors and what goes with them -> the model.

    Adds what tensors do not tell: the versions of modules, without which torchvision's MNASNet
    refuses, and the zero count of batches of BatchNorms older than it. Every parameter becomes
    contiguous: some accelerators ignored in-place updates of strided ones.
    """
    if "logit_bias" in state:
        model.logit_bias = torch.nn.Parameter(model.logit_scale.detach().clone())
    own = model.state_dict()
    state = collections.OrderedDict({name: torch.tensor(0) for name in own
                                     if name.endswith(".num_batches_tracked")} | state)
    for name, tensor in state.items():
        state[name] = tensor.to(own[name].dtype).contiguous()
    state._metadata = own._metadata
    model.load_state_dict(state, assign=True)
    if pixels:
        model.set_pixels(pixels)
    model.vocabulary = vocabulary
    return model.requires_grad_(True).eval()


def join(image, text, proj, embed_dim, keep_projections):
    """A CLIP of two towers, each a Source.

    proj: "linear" without bias, as in OpenAI's and transformers' code, or "mlp", a `ResidualHead`;
    both to `embed_dim`. A tower that comes from a CLIP keeps its own projection where the shapes
    agree, unless keep_projections is false (transformers' dual encoder always starts anew). What
    has no weights is drawn from torch's global generator; `origin["notes"]` tells.
    """
    sources, notes = (image, text), []
    said = {source.fields["activation"] for source in sources if "activation" in source.fields}
    if len(said) > 1:
        raise WeightsError("one CLIP has QuickGELU and the other GELU; give both with the same")
    with about("these towers make no CLIP"):
        model = CLIP(CLIPConfig(embed_dim=embed_dim, proj=proj, **image.fields | text.fields))
    own, state = model.state_dict(), image.state | text.state
    drawn = {name for name in own if name == "logit_scale" or name.startswith("bert.pooler.")}
    for source in sources:
        notes += [f"{source.origin['name']}: {note}" for note in source.origin["notes"]]
        if not source.state:
            notes.append(f"{source.origin['name']} starts from random numbers")
            drawn |= {name for name in own if name.startswith("visual.") == (source is image)}
    for head in HEADS:
        names = {name for name in own if name.startswith(head)}
        fits = all(name in state and state[name].shape == own[name].shape for name in names)
        if names and not (fits and keep_projections):
            had = state.get(head, state.get(head + ".weight"))
            notes.append(f"{head} starts from random numbers" + (
                "" if had is None else f" (the CLIP's own is {tuple(had.shape)})"))
            state = {name: t for name, t in state.items() if not name.startswith(head)}
            drawn |= names
    state = {name: own[name] for name in drawn} | state
    check_state(model.config, state)
    model.origin = {"name": "+".join(source.origin["name"] for source in sources), "path": "",
                    "sha256": "+".join(filter(None, (s.origin["sha256"] for s in sources))),
                    "layout": "towers", "format": "", "notes": notes}
    return fill(model, state, image.known.get("pixels"), text.vocabulary)


IMAGE_FIELDS = ("image_size", "vision_layers", "vision_width", "vision_patch", "vision_head",
                "backbone")
TEXT_FIELDS = ("text_width", "text_layers", "context_length", "vocab_size", "text_head", "text")


def clip_source(side, tower, activation, size=None):
    """The image or text tower of a CLIP. "NAME:none" has random weights, for images of `size`."""
    name = canonical_name(tower.removesuffix(":none"))
    if name and tower.endswith(":none"):
        config = dataclasses.replace(CONFIGS[name], image_size=size or CONFIGS[name].image_size)
        fields = {key: getattr(config, key) for key in (
            IMAGE_FIELDS if side == "image" else TEXT_FIELDS)}
        known = {"activation": activation} if activation else {}
        source = Source({}, known, {"name": name, "sha256": "", "notes": []})
    else:
        source = read(tower, activation)
        known, what = source.known, f"{source.origin['path']} is no CLIP or tower of one"
        with about(what + " (the state dict of a classifier is given as NAME:FILE)"):
            fields = (image_fields if side == "image" else text_fields)(source.state, known)
        if size not in (None, fields.get("image_size", size)):
            raise WeightsError(f"{tower} takes images of {fields['image_size']} pixels and has no "
                               f"positions for {size}; leave image_size out")
    if "activation" in known and not (fields.get("backbone") or fields.get("text")):
        fields["activation"] = known["activation"]
    return source._replace(fields=fields, state={
        key: tensor for key, tensor in source.state.items() if not key.startswith("logit_")
        and key.startswith("visual.") == (side == "image")})


def image_source(tower, size, activation):
    """`tower`: what `load` takes, whose image tower it becomes; or "[timm:]NAME[:WEIGHTS]".

    NAME is any classifier of torchvision ("resnet50"), or of timm; WEIGHTS one of torchvision's
    published weights ("IMAGENET1K_V2", which it downloads), a file of a state dict, or "none", as
    when it is left out: random numbers. A file may be in the names of either library, and is read
    by the one whose names it has. size: pixels per side of its images, those of its published
    weights unless given. What CLIP and torchvision both know ("vit_b_16") is CLIP's, without the
    prefix "torchvision:".
    """
    if tower is None:
        raise WeightsError("no image tower; give one, or a CLIP to take it from")
    text = str(tower)
    library, _, rest = text.partition(":")
    if library not in ("torchvision", "timm"):
        library, rest = "torchvision", text
        if canonical_name(text.removesuffix(":none")) or expanded(text).exists():
            return clip_source("image", text, activation, size)
    name, _, weights = rest.partition(":")
    state, origin, problems = {}, {"name": short(text), "sha256": "", "notes": []}, []
    if weights.startswith("IMAGENET"):
        state = published(name, weights)
    elif weights not in ("", "none"):
        path = locate(weights)
        with about(path):
            state, origin["notes"] = state_in(read_file(path)[0])
        origin["sha256"] = sha256_of(path)
    names = [name, f"timm:{name}"] if library == "torchvision" else [f"timm:{name}", name]
    for backbone in names if state else names[:1]:
        try:
            with torch.device("meta"):
                trunk, removed, width, side, pixels = make_backbone(backbone, size)
        except (ImportError, ValueError, RuntimeError) as error:
            problems.append(one_line(error))
            continue
        cut = {key: tensor for key, tensor in state.items()
               if not key.startswith((f"{removed}.", "AuxLogits.", "aux1.", "aux2."))}
        odd = [key for key in trunk.state_dict().keys() ^ cut.keys()
               if not key.endswith(".num_batches_tracked")]
        if state and odd:
            problems.append(f"{backbone} has other tensors ({min(odd)})")
            continue
        if backbone != names[0]:
            origin["notes"].append(f"its tensors have the names of {backbone}")
        return Source({f"visual.trunk.{key}": t for key, t in cut.items()}, {"pixels": pixels},
                      origin, fields={
                          "backbone": backbone, "image_size": side, "vision_layers": 0,
                          "vision_patch": None, "vision_width": width})
    raise WeightsError(f"no image tower {text!r}: {'; '.join(problems)}; expected a CLIP's name or "
                       f"path, or [timm:]NAME[:FILE] with a classifier such as resnet50")


def published(name, weights):
    """The state dict of one of torchvision's published weights, which torchvision downloads."""
    try:
        from torchvision import models
        return models.get_model(name, weights=weights).state_dict()
    except Exception as error:  # no torchvision, no network, a wrong hash, a full disk
        raise WeightsError(f"torchvision could not fetch {name}:{weights}: {one_line(error)}"
                           ) from None


def text_source(tower, pool, activation):
    """`tower`: a folder or file of Hugging Face's BERT, RoBERTa or DistilBERT; "NAME:none" with a
    NAME out of BERTS, for random numbers; or what `load` takes, whose text tower it becomes.

    pool: see BertConfig; what sentence-transformers' 1_Pooling/config.json says, else the pooler,
    as in transformers' dual encoder, but for DistilBERT, which has none: the first token.
    """
    if tower is None:
        raise WeightsError("no text tower; give one, or a CLIP to take it from")
    text, name = str(tower), str(tower).removesuffix(":none")
    if pool not in (None, "pooler", "first", "mean"):
        raise WeightsError(f"pool {pool!r} is not \"pooler\", \"first\" or \"mean\"")
    if name in BERTS and not expanded(text).exists():
        if name == text:
            raise WeightsError(f"{name} cannot be fetched from here; put its config.json and "
                               f"model.safetensors (or pytorch_model.bin) into a folder and give "
                               f"that, or {name}:none for random numbers")
        bert = dataclasses.replace(BERTS[name], pool=pool or BERTS[name].pool)
        return Source({}, {}, {"name": name, "sha256": "", "notes": []}, fields=bert_fields(bert))
    source = clip_source("text", text, activation)
    bert = source.fields.get("text")
    if not bert:
        return source
    known, notes = source.known.get("text") or {}, source.origin["notes"]
    if "heads" not in known and source.origin["layout"] == "hf":
        notes.append("no config.json beside it: heads of 64 and the rest as in the published models")
    pool = pool or known.get("pool") or ("first" if bert.family == "distilbert" else "pooler")
    if pool == "pooler" and bert.pool != "pooler":
        notes.append("no pooler in the file; it starts from random numbers")
    return source._replace(
        fields=source.fields | {"text": dataclasses.replace(bert, pool=pool)},
        state={key: tensor for key, tensor in source.state.items()
               if pool == "pooler" or not key.startswith("bert.pooler.")})


def spread_embedding(state, vocab_size):
    """A token embedding stored as the rows in use (`save(..., token_rows=...)`) made whole; the
    rows left out were never trained and become zero."""
    rows, part = state.pop("token_embedding.rows", None), state.get("token_embedding.weight")
    if rows is None:
        return state
    if part is None or part.dim() != 2 or rows.shape != part.shape[:1] or not len(rows) or (
            rows.is_floating_point() or not isinstance(vocab_size, int)
            or vocab_size * part.shape[1] >= 1 << 31
            or not 0 <= int(rows.min()) <= int(rows.max()) < vocab_size):
        raise WeightsError("token_embedding.rows does not fit token_embedding.weight")
    whole = torch.zeros(vocab_size, part.shape[1], dtype=part.dtype)
    whole[rows.long()] = part
    return state | {"token_embedding.weight": whole}


# -----------------------------------------------------------------------------
# Finding and fetching

def expanded(path):
    return pathlib.Path(os.path.expandvars(path)).expanduser()


def locate(name_or_path):
    """The path of a weight file; fetches a released model that is not here. A name wins over a
    folder of the same name, which "./NAME" means."""
    text = str(name_or_path)
    path, known = expanded(text), canonical_name(text)
    if path.is_file():
        return path
    if path.is_dir() and not (known and not text.startswith((".", "/", "~"))):
        best = read_json(path / "results.json").get("weights")  # of a run in several stages
        for name in (*FOLDER_FILES, *([best] if isinstance(best, str) else [])):
            if (path / name).is_file():
                return path / name
        raise WeightsError(f"the folder {path} has none of {', '.join(FOLDER_FILES)}")
    if known == "tiny":
        return TINY
    if known in RELEASED:
        return download(known)
    if known:
        raise WeightsError(f"weights of {known} cannot be fetched from here; give a file (Chinese-"
                           f"CLIP's are OFA-Sys's on Hugging Face), or start from random numbers: "
                           f"{known}:none as a tower, --weights none")
    raise WeightsError(f"no file or model {text!r}; expected a path, \"tiny\", or one of "
                       f"{', '.join(RELEASED)}")


def sha256_of(path):
    """Of a file's bytes; of an index of shards, those of the shards too."""
    stat = path.stat()
    digest = hash_file(str(path), stat.st_size, stat.st_mtime_ns)
    if path.name.endswith(".index.json"):
        shards = sorted(set(read_json(path)["weight_map"].values()))
        parts = [digest, *(sha256_of(path.parent / name) for name in shards)]
        digest = hashlib.sha256("".join(parts).encode()).hexdigest()
    return digest


@functools.lru_cache
def hash_file(path, size, modified):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def download(name):
    """Fetch a released model into ~/.cache/clip, as OpenAI's code does -> its path.

    A file that is there and whole is used as it is. A broken transfer goes on where it stopped;
    the file gets its name only after its sha256 is right. CLIP_MIRROR replaces the address.
    """
    digest, file = RELEASED[name], re.sub(r"[/@]", "-", name) + ".pt"
    folder = expanded("~/.cache/clip")
    if folder.parts[0] == "~":  # HOME is not set, and the system does not know the user
        raise WeightsError(f"there is no home folder to keep {name} in; set HOME, or pass the path "
                           f"of {file} as --weights")
    target, partial = folder / file, folder / (file + ".partial")
    url = f"{os.environ.get('CLIP_MIRROR', OPENAI_URL).rstrip('/')}/{digest}/{file}"
    if target.is_file() and sha256_of(target) == digest:
        return target
    for _ in range(3):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with only_one(folder / (file + ".lock")):
                if target.is_file() and sha256_of(target) == digest:
                    return target  # another process was faster
                transfer(url, partial)
                why = f"its sha256 is {sha256_of(partial)}"
                if digest in why:
                    os.replace(partial, target)
                    return target
                partial.unlink()
        except (OSError, ValueError, http.client.HTTPException) as error:  # urllib's are OSErrors
            why = one_line(getattr(error, "reason", error))
            if isinstance(error, urllib.error.HTTPError) and error.code < 500:
                break
    raise WeightsError(f"could not fetch {name} from {url} ({why}); put the file with sha256 "
                       f"{digest} at {target} by hand, or pass its path as --weights")


def transfer(url, partial):
    """Append to `partial` what is missing of `url`; OSError when the transfer stops early."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is missing; the hash will tell
            return
        raise
    goes_on = response.status == 206
    with response, open(partial, "ab" if goes_on else "wb") as file:
        have = have if goes_on else 0
        total = have + int(response.headers.get("Content-Length") or 0)
        while chunk := response.read(1 << 20):
            have += file.write(chunk)
            if sys.stderr.isatty():
                print(f"\r{url.rsplit('/', 1)[1]}: {have >> 20:,} of {total >> 20:,} MB", end="",
                      file=sys.stderr, flush=True)
        if "Content-Length" in response.headers and have != total:
            raise OSError(f"the connection ended at {have:,} of {total:,} bytes")


@contextlib.contextmanager
def only_one(lock):
    """Processes that fetch the same file wait for each other (where the system has fcntl)."""
    with open(lock, "w") as file, contextlib.suppress(ImportError):
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        return
    yield


# -----------------------------------------------------------------------------
# Saving

def card(model, tokenizer=None):
    """All that a file must tell beside the tensors, as plain values: `load` builds the model from
    it. With `tokenizer`, the vocabulary is taken from there."""
    return {"clip_config": dataclasses.asdict(model.config),
            "pixels": dataclasses.asdict(model.pixels),
            "vocabulary": tokenizer.facts() if tokenizer else model.vocabulary,
            "origin": {key: model.origin[key] for key in ("name", "path", "sha256", "layout")},
            "tensors": len(model.state_dict())}


def kept_tensors(model):
    """{name: Parameter} that a checkpoint must hold for `load` to build the model again: what
    trains (and the scale and bias of the logits, which scripts set), if the rest can be read from
    the file that the model came from; else all. A script that changes other frozen tensors of a
    loaded model must empty model.origin["path"]."""
    whole = bool(model.origin["path"])
    return {name: p for name, p in model.named_parameters()
            if p.requires_grad or p.dim() == 0 or not whole}


def save(model, path, layout="safetensors", dtype=None, token_rows=None):
    """Write `model` where the named library reads it; returns the path written.

    layout: "safetensors" (one file, OpenAI's names), "openai" (a .pt state dict that OpenAI's
    `build_model` takes), "open_clip" (a .pt/.safetensors file, or a folder for `local-dir:`), "hf"
    (a folder for transformers' CLIPModel, or with a BERT or RoBERTa for its
    VisionTextDualEncoderModel, or for its ChineseCLIPModel if the BERT has no pooler; ViT only),
    "chinese_clip" (a .pt that the programs of Chinese-CLIP read and resume with --reset-optimizer).
    Each also carries `card`, which those programs pass over. dtype: stored precision, fp32 unless
    given. token_rows: LongTensor of the vocabulary rows to keep, for the bundled model
    ("safetensors" only). Written beside its place and renamed: an interruption leaves the old file.
    """
    path, config = pathlib.Path(path), model.config
    check_layout(config, layout, model.logit_bias is not None)
    state = {name: tensor.detach().to("cpu", (dtype or torch.float32) if tensor.is_floating_point()
                                      else None).contiguous()
             for name, tensor in model.state_dict().items()}
    if token_rows is not None:
        if layout != "safetensors" or config.text:
            raise WeightsError("token_rows needs the layout safetensors and CLIP's text tower")
        state["token_embedding.rows"] = token_rows.to("cpu", torch.int32)
        state["token_embedding.weight"] = state["token_embedding.weight"][token_rows.cpu()]
    if layout == "hf":
        state = to_hugging_face(state)
        if config.text and not is_chinese_clip(config):
            # transformers before 5 reads only this form, and later ones both
            state = {re.sub(r"^vision_model\.", "vision_model.vision_model.", name): tensor
                     for name, tensor in state.items()}
    if layout in ("hf", "open_clip") and path.suffix not in (".pt", ".bin", ".safetensors"):
        tables = hugging_face_tables(model) if layout == "hf" else open_clip_tables(model)
        for name, table in tables.items():
            write(path / name, json.dumps(table, indent=2).encode())
        path /= "model.safetensors" if layout == "hf" else "open_clip_model.safetensors"
    known = card(model)
    beside = {key: json.dumps(known[key]) for key in ("clip_config", "pixels", "vocabulary")
              if known[key]}
    if path.suffix == ".safetensors" or layout == "safetensors":
        write(path, *safetensors_bytes(state, {"format": "pt", **beside}))
        return path
    if layout == "chinese_clip":
        state = {"epoch": 0, "step": 0, "name": name_of(config), "state_dict": {
            f"module.{key}": tensor for key, tensor in state.items()}, "card": known}
    else:  # torch's own place for what goes with a state dict and is no tensor
        state = collections.OrderedDict(state)
        state._metadata = beside
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getbuffer())
    return path


def export(model, folder, layout, tokenizer=None):
    """`save` into `folder` under the layout's usual name, and for "hf" the tokenizer's own files
    -> the path written."""
    if tokenizer is not None:
        model.vocabulary = tokenizer.facts()
    path = save(model, pathlib.Path(folder) / {
        "openai": "clip.pt", "chinese_clip": "chinese_clip.pt",
        "safetensors": "clip.safetensors"}.get(layout, layout), layout)
    if tokenizer is not None and layout == "hf":
        tokenizer.save(path.parent)
    return path


def write(path, *chunks):
    """Bytes to a file beside its place, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    with open(temporary, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def safetensors_bytes(state, metadata):
    """The chunks of a safetensors file: 8 bytes of header length, header, tensors."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, begin = {"__metadata__": metadata}, 0
    for name, tensor in state.items():
        end = begin + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8
    yield len(text).to_bytes(8, "little")
    yield text
    for tensor in state.values():
        yield tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""


def digest(model, side):
    """The sha256 of one tower with its projection ("image" or "text"): names, shapes, values. It
    changes with any weight, which makes it the key to features that were kept."""
    found = hashlib.sha256(json.dumps(dataclasses.asdict(model.config)).encode())
    for name, tensor in model.state_dict().items():
        if not name.startswith("logit_") and name.startswith("visual.") == (side == "image"):
            tensor = tensor.detach().cpu().contiguous()
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


# -----------------------------------------------------------------------------
# What the scripts ask for

def add_model_flags(parser, towers=False):
    """--model, --weights, --activation and --tokenizer; towers: also those of a CLIP of two."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="a released size such as ViT-B/16 or RN50, or tiny "
                       "(bundled); what --weights holds if that is a file")
    group.add_argument("--weights", default="auto", help="auto: OpenAI's for the model; none: "
                       "random; else a file, a model's folder or a run's folder (default: auto)")
    group.add_argument("--activation", choices=("quick_gelu", "gelu"), help="where the weight file "
                       "does not say it (default: quick_gelu, OpenAI's)")
    group.add_argument("--tokenizer", help="file or folder of the text tower's vocabulary")
    if towers:
        group.add_argument("--image-tower", help="instead of the model's: a CLIP, or "
                           "[timm:]NAME[:FILE] of torchvision or timm")
        group.add_argument("--text-tower", help="instead of the model's: a folder of the BERT "
                           "family, or a CLIP")
        group.add_argument("--proj", choices=("linear", "mlp"), default="linear",
                           help="heads of chosen towers (default: linear)")
        group.add_argument("--embed-dim", type=int, default=512,
                           help="of chosen towers (default: 512)")


def open_clip(args):
    """The CLIP that the flags of `add_model_flags` ask for, on the CPU. Raises WeightsError."""
    known = canonical_name(args.model) if args.model else None
    weights, activation = args.weights or "auto", getattr(args, "activation", None)
    image, text = getattr(args, "image_tower", None), getattr(args, "text_tower", None)
    torch.manual_seed(args.seed if isinstance(args.seed, int) else 0)
    if weights in ("auto", "none") and not known and not (image and text):
        raise WeightsError(f"unknown --model {args.model!r}; known: {', '.join(CONFIGS)}. A file "
                           f"goes to --weights")
    if image or text:
        other = {"none": f"{known}:none", "auto": known}.get(weights, weights)
        return load(other, image, text, args.proj, args.embed_dim, activation=activation)
    if weights == "none":
        model = CLIP(dataclasses.replace(
            CONFIGS[known], activation=activation or CONFIGS[known].activation)).eval()
        model.origin["name"] = known
        return model
    model = load(known if weights == "auto" else weights, activation=activation)
    if args.model and model.origin["name"] != known:
        raise WeightsError(f"--weights {weights} is not a {args.model} but {model.origin['name']}: "
                           f"{describe(model.config)}; leave --model out to take what it holds")
    return model
