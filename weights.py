"""Weight files in and out: OpenAI's, OpenCLIP's, Hugging Face's, Chinese-CLIP's, and our own.

    from weights import load, save
    model = load("ViT-B/16")                  # OpenAI's, fetched once into ~/.cache/clip
    model = load("laion/CLIP-ViT-B-32-laion2B-s34B-b79K")    # from huggingface.co, likewise
    model = load("runs/clipfit/dtd")          # a run's folder, a checkpoint, a file of any layout
    model = load(image_tower="resnet50:IMAGENET1K_V2", text_tower="FacebookAI/roberta-base")
    save(model, "clip.safetensors")

A file is never trusted: nothing in it is executed, its frame and checksums are verified, sizes are
read off the tensors. How libraries name tensors and settings is the subject of layouts.py. Mirrors
are named by the variables CLIP_MIRROR (of CLIP_MIRROR/SHA256/RN50.pt) and HF_ENDPOINT.
"""
import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import mmap
import os
import pathlib
import pickle
import pickletools
import re
import typing
import warnings
import zipfile

import torch

from clip_model import (
    BERTS, CLIP, CONFIGS, FAMILIES, HEADS, CLIPConfig, bert_fields, canonical_name, make_backbone)
from fetch import fetch, hash_files, only_one
from files import expanded, mistaken, write_atomic, write_whole
from layouts import (
    CARD, CHINESE_CLIP, LAYOUTS, WeightsError, about, build, card, check_layout, describe,
    hugging_face_tables, image_fields, is_chinese_clip, known_from_card, known_from_hugging_face,
    known_from_open_clip, known_from_timm, name_of, open_clip_tables, openai_names, reason,
    skeleton, state_in, text_fields, to_hugging_face, wrapped_in)

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
UNREAD = {"path": "", "sha256": "", "notes": []}  # the origin of a tower that has no file
TINY = pathlib.Path(__file__).resolve().parent / "assets" / "tiny_clip.safetensors"
WEIGHTS = (  # what a folder is asked for, see `weights_in`: files of other libraries, then our own
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
    "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "pytorch_model.bin.index.json",
    "clip.safetensors", "clip.pt", "chinese_clip.pt", "checkpoint_best.pt", "checkpoint_last.pt")
HUB_SETTINGS = (  # what can stand beside the weights: how to compute, and the tokenizer
    "config.json", "open_clip_config.json", "preprocessor_config.json", "processor_config.json",
    "modules.json", "1_Pooling/config.json", "tokenizer_config.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "tokenizer.json", "adapter_config.json",
    "special_tokens_map.json",
    "config_sentence_transformers.json", *(f"sentence_{kind}_config.json" for kind in FAMILIES))
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}
STORAGES = dict(zip(("DoubleStorage", "FloatStorage", "HalfStorage", "BFloat16Storage",
                     "LongStorage", "IntStorage", "ShortStorage", "CharStorage", "ByteStorage",
                     "BoolStorage"), DTYPES.values()))
kept_hash = functools.lru_cache(lambda paths, times: hash_files(*paths))  # times: of change

# -----------------------------------------------------------------------------
# Reading files. Nothing here runs code that a file brings along.

class ScriptObject:
    """Stands for every class of a TorchScript archive; holds its attributes and does nothing."""
    attributes = {}

    def __setstate__(self, state):
        self.attributes = state if isinstance(state, dict) else {}

    def tensors(self, prefix=""):
        for name, value in self.attributes.items():
            if isinstance(value, torch.Tensor):
                yield f"{prefix}{name}", value
            elif isinstance(value, ScriptObject):
                yield from value.tensors(f"{prefix}{name}.")


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
        def first(data, *_):
            return data
        if module.startswith("__torch__"):
            return ScriptObject
        if module == "torch.jit._pickle":  # typed lists
            return first
        harmless = {
            "torch._utils._rebuild_tensor_v2": lambda storage, offset, size, stride, *_: (
                torch.as_strided(storage, size, stride, offset)),  # checks the storage's bounds
            "torch._utils._rebuild_parameter": first, "torch.device": str,
            "collections.OrderedDict": collections.OrderedDict,
            **{f"torch.{storage}": storage for storage in STORAGES}}
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


def read_pytorch(path):
    """A TorchScript archive or a `torch.save` file -> (content, format)."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                root = next((name[:-8] for name in names
                             if re.fullmatch("[^/]*/?data.pkl", name)), None)
                if root is None:
                    raise ValueError("no data.pkl; unpack a bundle first")
                for info in archive.infolist():
                    if info.compress_type and not info.filename.startswith(f"{root}code/"):
                        raise ValueError("compressed weights, which PyTorch never writes")
                if archive.testzip():  # torch.load never looks at checksums; 0.3 s for 340 MB
                    raise ValueError("a member fails its checksum")
                if f"{root}constants.pkl" in names:
                    return dict(ScriptReader(archive, root).load().tensors()), "TorchScript"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch would say of an odd file is said below
            return torch.load(path, map_location="cpu", weights_only=True), "PyTorch"
    except Exception as error:  # a damaged or hostile file can raise anything
        advice = "" if not isinstance(error, pickle.UnpicklingError) else (
            ", or save the state_dict of torch.load(FILE, weights_only=False) if you trust it")
        raise WeightsError(f"not a whole PyTorch file of tensors and plain values; fetch it again"
                           f"{advice}. Nothing in it was run ({reason(error)})") from None


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
            raise WeightsError(f"{name!r} is of type {entry['dtype']}; convert the file to one of "
                               f"{', '.join(DTYPES)}")
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


def shards_of(path):
    """{file: names of its tensors} of a Hugging Face *.index.json; of another file, {}."""
    shards = collections.defaultdict(set)
    if path.name.endswith(".index.json"):
        for tensor, name in read_json(path)["weight_map"].items():
            if pathlib.PurePath(name).name != name:
                raise WeightsError(f"{path.name} names {name!r}, outside its own folder")
            shards[path.with_name(name)].add(tensor)
    return shards


def read_json(path, kind=dict):
    """The table in a JSON file; {} where there is no such file, or one with something else."""
    with about(path), contextlib.suppress(FileNotFoundError):
        content = json.loads(path.read_text("utf-8"))
        return content if isinstance(content, kind) else kind()
    return kind()


def read_file(path):
    """Any weight file -> (content, format, metadata); WeightsError says what a bad one is."""
    with about(path):
        with open(path, "rb") as file:
            if what := mistaken(file):
                raise WeightsError(what)
            file.seek(0)
            header = file.read(9)
        tensors = {}
        for shard, names in shards_of(path).items():
            content, _, _ = read_file(shard)
            if content.keys() != names:
                raise WeightsError(f"{shard.name} holds other tensors than it says; fetch both "
                                   f"again")
            tensors |= content
        if tensors:
            return tensors, "shards", {}
        if path.suffix == ".safetensors" or header[8:] == b"{":
            with about("not read as safetensors (if it is cut short or damaged, fetch it again)"):
                tensors, metadata = read_safetensors(path)
            return tensors, "safetensors", metadata
        if not header.startswith((b"PK", b"\x80")):
            raise WeightsError("neither PyTorch's nor safetensors; give model.safetensors or "
                               "pytorch_model.bin (.h5, .msgpack, .gguf, .onnx ... are not read)")
        content, kind = read_pytorch(path)
    return content, kind, getattr(content, "_metadata", {})  # see `save`


# -----------------------------------------------------------------------------
# Loading

class Source(typing.NamedTuple):
    """A weight file, read and checked, or one tower of it."""
    state: dict               # tensors under OpenAI's names; {} for random numbers
    known: dict               # what stands beside the tensors, see layouts.py
    origin: dict              # CLIP.origin
    fields: dict = {}         # of CLIPConfig: those of the one tower


def read(name_or_path, activation=None):
    """A name, file or folder -> Source. Raises WeightsError."""
    path = locate(name_or_path)
    content, kind, metadata = read_file(path)
    with about(path):
        if re.search(r"-of-(?!00001)\d{5}\.", path.name):
            raise WeightsError("one shard of several; give its folder, or the *.index.json in it")
        card = content.get("card") if isinstance(content, dict) else None
        card = card or {key: json.loads(metadata[key]) for key in CARD if key in metadata}
        if "weights" in content and card:
            state, layout = checkpoint_state(content, card), "checkpoint"
        else:
            state, layout = openai_names(state_in(content))
            if card and kind == "safetensors" and layout == "chinese_clip":
                layout = "safetensors"  # our own file of a CLIP with another BERT: same names
        released = kind == "TorchScript" and any(  # OpenAI's; others are scripted as well
            name.endswith("input_resolution") for name in content)
        with about("its settings, or those in config.json, preprocessor_config.json and other JSON "
                   "beside it (move away what is not of this model)"):
            known = known_from_card(card) if card else known_beside(path, layout, released)
        if (known.get("text") or {}).get("pool", "pooler") != "pooler":
            state = {name: t for name, t in state.items() if not name.startswith("bert.pooler.")}
        state, notes = spread_embedding(state, known.get("vocab_size", 49_408)), []
        if "logit_scale" in state and not (activation or "activation" in known or
                                           released or layout == "chinese_clip"):
            notes.append("the file does not say its activation and heads: OpenAI's were taken, "
                         "QuickGELU and 64 wide; models trained by LAION need --activation gelu")
        if layout == "hf" and "bert.embeddings.LayerNorm.weight" in state and "text" not in known:
            notes.append("no config.json beside it: heads of 64 were taken")
        said = known.get("activation")
        known["activation"] = activation or said or "quick_gelu"
        if said not in (None, known["activation"]):
            notes.append(f"it was trained with {said}; --activation {activation} is taken instead")
        if not card and any("ema" in key for key in wrapped_in(content)[1:]):
            notes.append("it holds averaged weights (EMA) too; the plain ones were taken")
        name = (card.get("origin", {}).get("name") or canonical_name(name_or_path)
                or expanded(name_or_path).resolve().name)
        return Source(state, known, {
            "name": name, "path": os.path.abspath(path), "sha256": sha256_of(path),  # a link stays
            "layout": layout, "format": kind, "notes": notes})


def known_beside(path, layout, released):
    """What the JSON files beside a weight file without a card tell, see layouts.py."""
    def beside(name, kind=dict):
        return read_json(path.parent / name, kind)
    if layout == "chinese_clip":
        return dict(CHINESE_CLIP)
    if released:
        return known_from_open_clip(beside)
    if layout == "hf":
        return known_from_hugging_face(beside) or known_from_open_clip(beside)
    return known_from_open_clip(beside) or known_from_hugging_face(beside)


def checkpoint_state(content, card):
    """The whole state of a run's checkpoint. It may hold only what was trained: the rest is read
    from the file that the run began with."""
    state = {}
    for key in ("weights", "buffers", *(["ema"] if content.get("tested") == "ema" else [])):
        state |= state_in(content[key]) if content.get(key) else {}
    origin = card["origin"]
    if len(state) < card["tensors"] and origin["path"]:
        with about("it holds only what was trained; put back what it began with"):
            base, sha256 = origin["path"], origin["sha256"]
            if not expanded(base).exists():
                if sha256 not in (*RELEASED.values(), sha256_of(TINY)):
                    raise WeightsError(f"{base}, with the sha256 {sha256}")
                base = origin["name"]
            elif sha256_of(expanded(base)) != sha256:
                raise WeightsError(f"{base} holds others now than those of sha256 {sha256}")
            source = read(base)
        state = {name: t for name, t in source.state.items() if origin.get("side") != "text"
                 or not name.startswith("visual.")} | state  # a student with its teacher's texts
    return state


def load(name_or_path=None, image_tower=None, text_tower=None, proj="linear", embed_dim=512,
         image_size=None, activation=None):
    """A CLIP with weights, fp32, in eval mode, on the CPU. Raises WeightsError.

    name_or_path: a released name ("ViT-B/16"), "tiny" (bundled), a file (.pt, .bin, .safetensors:
    OpenAI, OpenCLIP, Hugging Face, Chinese-CLIP or our own, also a training checkpoint), a folder
    of these, also a run's, or ORG/NAME of huggingface.co. activation: "quick_gelu" or "gelu" where
    the file does not tell; OpenAI's otherwise. image_tower, text_tower: the towers of a new CLIP,
    see `tower_of`; one that is not given comes from `name_or_path`. proj, embed_dim: see `join`."""
    if image_tower is not None or text_tower is not None:
        return join(tower_of("image", image_tower or name_or_path, image_size, activation),
                    tower_of("text", text_tower or name_or_path, None, activation),
                    proj, embed_dim)
    source = read(name_or_path, activation)
    with about(source.origin["path"]):
        model = build(source.state, source.known)
    name = name_of(model.config)
    model.origin = source.origin | ({"name": name} if name != "custom" else {})
    return finish(model, source, source)


def config_from_state_dict(sd, **known):
    """The CLIPConfig that these tensors' shapes belong to (OpenAI's names; meta tensors will do).

    What leaves no trace in shapes is taken as OpenAI's, or as the published BERTs have it, unless
    it is among `known`: fields of CLIPConfig, `text` a dict of fields of BertConfig. WeightsError
    names the first tensor that is missing, unknown or of another shape."""
    return build(sd, known).config


def finish(model, image, text):
    """What the Sources of its two towers tell beside the tensors -> the model, ready to use."""
    if image.known.get("pixels"):
        model.set_pixels(image.known["pixels"])
    model.vocabulary = text.known.get("vocabulary")
    return model.requires_grad_(True).eval()


def join(image, text, proj, embed_dim):
    """A CLIP of two towers, each a Source. proj: "linear" (no bias) or "mlp", a `ResidualHead`, to
    `embed_dim`. A tower that comes from a CLIP keeps its own projection where the shapes agree.
    What has no weights is drawn from torch's global generator; `origin["notes"]` tells."""
    if len({s.fields.get("activation") for s in (image, text)} - {None}) > 1:
        raise WeightsError("one CLIP has QuickGELU and the other GELU; give both with the same")
    with about("these towers make no CLIP"):
        model = CLIP(CLIPConfig(embed_dim=embed_dim, proj=proj, **image.fields | text.fields))
    own, notes = model.state_dict(), []
    state = image.state | text.state | {"logit_scale": own["logit_scale"]}
    for source in (image, text):
        notes += [f"{source.origin['name']}: {note}" for note in source.origin["notes"]]
        if not source.state:
            notes.append(f"{source.origin['name']} starts from random numbers")
            state |= {name: t for name, t in own.items()
                      if name.startswith("visual.") == (source is image)}
    for part in (*HEADS, "bert.pooler"):
        drawn = {name: t for name, t in own.items() if name.startswith(part)}
        if any(name not in state or state[name].shape != t.shape for name, t in drawn.items()):
            notes.append(f"{part} starts from random numbers")
            state = {name: t for name, t in state.items() if not name.startswith(part)} | drawn
    model = build(state, dataclasses.asdict(model.config))
    model.origin = {
        "name": f"{image.origin['name']}+{text.origin['name']}", "path": "",
        "sha256": f"{image.origin['sha256']}+{text.origin['sha256']}".strip("+"),
        "layout": "towers", "notes": notes, "text": text.origin}
    return finish(model, image, text)


def tower_of(side, tower, size, activation):
    """The image or text tower -> Source with its `fields`. `tower` is what `load` takes; of random
    numbers "NAME:none", with NAME a key of CONFIGS or of BERTS; or a `classifier`. size: pixels per
    side of images. What CLIP and torchvision both know ("vit_b_16") is CLIP's."""
    tower = str(tower or "")
    name = tower.removesuffix(":none")
    known = canonical_name(name)
    if name != tower and name in BERTS and side == "text":
        return Source({}, {}, {"name": name} | UNREAD, bert_fields(BERTS[name]))
    if name != tower and known:
        parts = ("vision_", "image_", "backbone") if side == "image" else (
            "text", "context_", "vocab_")
        config = dataclasses.replace(CONFIGS[known], image_size=size or CONFIGS[known].image_size)
        fields = {key: getattr(config, key) for key in vars(config) if key.startswith(parts)}
        fields |= {"activation": activation} if activation else {}
        return Source({}, {}, {"name": known} | UNREAD, fields)
    if side == "image" and tower and not (known or is_hub_name(tower) or expanded(tower).exists()):
        return classifier(tower, size)
    source = read(tower, activation)
    with about(f"{source.origin['path']} (the state dict of a classifier is given as NAME:FILE) "
               f"has no {side} tower"):
        fields = (image_fields if side == "image" else text_fields)(source.state, source.known)
    if size not in (None, fields.get("image_size", size)):
        raise WeightsError(f"{tower} takes images of {fields['image_size']} pixels, not {size}")
    return source._replace(fields=fields, state={
        key: tensor for key, tensor in source.state.items() if not key.startswith("logit_")
        and key.startswith("visual.") == (side == "image")})


def classifier(text, size):
    """The image tower "[timm:]NAME[:WEIGHTS]" -> Source. NAME: any classifier of torchvision, or of
    timm. WEIGHTS: some that torchvision publishes ("IMAGENET1K_V2") and downloads, the file of a
    state dict in the names of either library, or "none", the default: random numbers."""
    def shapes(tensors):
        return {(key, t.shape) for key, t in tensors.items() if not key.endswith("_tracked")}
    library, name, weights = re.fullmatch(r"(torchvision:|timm:)?([^:]*):?(.*)", text).groups()
    state, known, problems, origin, preset = {}, {}, [], {"name": name} | UNREAD, "DEFAULT"
    if weights.startswith("IMAGENET"):
        with about(f"torchvision could not fetch {text}"):
            from torchvision import models
            state = state_in(models.get_model(name, weights=weights).state_dict())
        library, preset = "torchvision:", weights
    elif weights not in ("", "none"):
        path = locate(weights)
        with about(path):
            state = state_in(read_file(path)[0])
            known = known_from_timm(read_json(path.parent / "config.json"), name)
        origin["sha256"] = sha256_of(path)
    names = [f"timm:{name}", name] if library == "timm:" else [name, f"timm:{name}"]
    for backbone in names if state else names[:1]:
        try:
            with skeleton():
                trunk, removed, width, side, pixels = make_backbone(backbone, size, preset)
        except (ImportError, ValueError, RuntimeError) as error:
            problems.append(reason(error))
            continue
        kept = {key: t for key, t in state.items() if not key.startswith(f"{removed}.")}
        other = shapes(kept) ^ shapes(trunk.state_dict())
        if not state or not other:
            return Source({f"visual.trunk.{key}": t for key, t in kept.items()},
                          {"pixels": pixels, **known}, origin, fields={
                              "backbone": backbone, "image_size": side, "vision_layers": 0,
                              "vision_patch": None, "vision_width": width})
        problems.append(f"{backbone} has other tensors ({min(other)[0]})")
    raise WeightsError(f"no image tower {text!r}: {'; '.join(problems)}; expected a CLIP's name or "
                       f"path, or [timm:]NAME[:FILE] with a classifier such as resnet50")


def spread_embedding(state, vocab_size):
    """A token embedding of which `save` kept `token_rows` made whole: the others become zero."""
    rows, part = state.pop("token_embedding.rows", None), state.get("token_embedding.weight")
    if rows is None:
        return state
    if vocab_size * part.shape[1] >= 1 << 31:
        raise WeightsError(f"{vocab_size} words are too many")
    whole = torch.zeros(vocab_size, part.shape[1], dtype=part.dtype)
    return state | {"token_embedding.weight": whole.index_copy(0, rows.long(), part)}


# -----------------------------------------------------------------------------
# Finding and fetching

def is_hub_name(text):
    """Whether it is ORG/NAME as on huggingface.co: not "ViT-B/32", nor the path of a file."""
    file = text.endswith((".pt", ".pth", ".bin", ".json", ".safetensors"))
    return bool(re.fullmatch(r"\w[\w.-]*/[A-Za-z][\w.-]*", text)) and not file


def weights_in(folder):
    """WEIGHTS, in the order in which those of a folder are looked for: beside OpenCLIP's settings,
    and none of transformers, model.safetensors can be of the image tower alone, in timm's names."""
    openclip = (folder / "open_clip_config.json").is_file() and not read_json(
        folder / "config.json").get("model_type")
    return sorted(WEIGHTS, key=lambda name: openclip and not name.startswith("open_clip"))


def locate(name_or_path):
    """The path of a weight file; fetches what is not here. A released name wins over a folder of
    the same name, which "./NAME" means."""
    text = str(name_or_path or "")
    folder, known = expanded(text), "" if is_hub_name(text) else canonical_name(text)
    if folder.is_file():
        return folder
    if not text or not folder.is_dir() or known and text[0] not in "./~":
        if known == "tiny":
            return TINY
        if known in RELEASED:
            return download(known)
        if not is_hub_name(text):
            raise WeightsError(
                f"no weights {text!r} here; expected a file or folder, \"tiny\", ORG/NAME of "
                f"huggingface.co or one of {', '.join(RELEASED)}; random numbers are --weights "
                f"none, or NAME:none as a tower")
        folder = from_hub(text)
    best = read_json(folder / "results.json").get("weights")  # of a run in several stages
    if (folder / "adapter_config.json").is_file():
        raise WeightsError(f"{folder} has an adapter_config.json, of a LoRA: merge that into its "
                           f"model with peft's merge_and_unload() and save the result")
    for name in (*weights_in(folder), best if isinstance(best, str) else ""):
        if (folder / name).is_file():
            return folder / name
    inside = sorted({path.parent.name for path in folder.glob("*/*") if path.name in WEIGHTS})
    here = sorted(path.name for path in folder.iterdir())[:5]
    raise WeightsError(f"the folder {folder} has none of {', '.join(WEIGHTS)}; " + (
        f"there are such in its {', '.join(inside)}: give that" if inside else
        f"it has {', '.join(here) or 'no files'}"))


def sha256_of(path):
    """Of a file's bytes; of an index of shards, with theirs behind."""
    paths = path, *sorted(shards_of(path))
    return kept_hash(paths, tuple(path.stat().st_mtime_ns for path in paths))


def place_of(name):
    """Where a released model is kept, as OpenAI's code does."""
    return expanded("~/.cache/clip") / (re.sub(r"[/@]", "-", name) + ".pt")


def still_to_fetch(args):
    """"" or, in words, which released weights `open_clip(args)` would have to fetch; of no --model
    those of ViT-B/16. WeightsError for weights that are nowhere."""
    text = (args.model or "ViT-B/16") if args.weights == "auto" else args.weights
    name = canonical_name(text)
    if name in RELEASED and not place_of(name).is_file():
        return (f"the weights of {name} are not here either: "
                f"{OPENAI_URL}/{RELEASED[name]}/{place_of(name).name} goes to {place_of(name)}")
    if text != "none" and not is_hub_name(text):
        with about(text):
            locate(text)
    return ""


def download(name):
    """Fetch a released model -> its path."""
    digest, problems, target = RELEASED[name], [], place_of(name)
    with about(target), only_one(target):
        if target.is_file() and sha256_of(target) == digest:
            return target
        for base in filter(None, (os.environ.get("CLIP_MIRROR"), OPENAI_URL)):
            url = f"{base.rstrip('/')}/{digest}/{target.name}"
            if not (problem := fetch(url, target, digest)):
                return target
            problems.append(f"{url}: {problem}")
    raise WeightsError(f"could not fetch {name} ({'; '.join(problems)}); put the file with sha256 "
                       f"{digest} at {target} by hand, pass its path as --weights, or name a "
                       f"mirror in the variable CLIP_MIRROR")


def from_hub(name):
    """Fetch what is needed of a model of huggingface.co -> its folder, whole, in ~/.cache/clip."""
    folder = expanded("~/.cache/clip") / name.replace("/", "--")
    partial = folder.with_name(folder.name + ".partial")
    base = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")

    def get(file):
        """Whether the model has this file, which then is in `partial`."""
        if file not in HUB_SETTINGS and (partial / file).is_file():  # of an earlier run
            return True
        problem = fetch(f"{base}/{name}/resolve/main/{file}", partial / file)
        if problem and not problem.startswith("HTTP Error 404"):
            raise WeightsError(problem)
        return not problem
    with about(f"no file or folder {name!r} here, and {base} did not give it; config.json, the "
               f"weights and the tokenizer's files can be put by hand into {folder}, or a folder "
               f"for --weights"), only_one(folder):
        if not folder.is_dir():
            for file in HUB_SETTINGS:
                get(file)
            weights = next(filter(get, weights_in(partial)), None)
            if not weights:
                raise WeightsError(f"it has none of {', '.join(WEIGHTS)}")
            for shard in shards_of(partial / weights):
                get(shard.name)
            with about(f"{partial} (delete it to fetch all anew)"):
                for file in partial.rglob("*.json"):  # not every server tells checksums
                    read_json(file)
                read_file(partial / weights)
            os.replace(partial, folder)
    return folder


# -----------------------------------------------------------------------------
# Saving

def kept_tensors(model):
    """{name: Parameter} that a checkpoint must hold: what trains and the logits' scale and bias, if
    `load` can read the rest from where the model came from; else all. A script that changes frozen
    tensors of a loaded model empties origin["path"]."""
    return {name: p for name, p in model.named_parameters()
            if p.requires_grad or p.dim() == 0 or not model.origin["path"]}


def save(model, path, layout="safetensors", dtype=torch.float32, token_rows=None):
    """Write `model` where the named library reads it; returns the path written.

    layout: "safetensors" (one file, OpenAI's names), "openai" (a .pt state dict that OpenAI's
    `build_model` takes), "open_clip" (a .pt/.safetensors file, or a folder for `local-dir:`), "hf"
    (a folder for transformers) or "chinese_clip" (a .pt that its programs read, and resume with
    --reset-optimizer). Each carries `card` too, which those pass over. dtype: stored precision.
    token_rows: the vocabulary rows to keep, LongTensor. An interruption leaves the old file."""
    path, config, known = pathlib.Path(path), model.config, card(model)
    check_layout(model, layout)
    state = {name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None)
             .contiguous() for name, tensor in model.state_dict().items()}
    if token_rows is not None:
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
        (path / "processor_config.json").unlink(missing_ok=True)  # of transformers: it would count
        for name, table in tables.items():
            write_atomic(path / name, table)
        path /= "model.safetensors" if layout == "hf" else "open_clip_model.safetensors"
    beside = {key: json.dumps(known[key]) for key in CARD if known[key]}
    if path.suffix == ".safetensors" or layout == "safetensors":
        chunks = safetensors_bytes(state, {"format": "pt", **beside})
        write_whole(path, lambda file: file.writelines(chunks))
        return path
    if layout == "chinese_clip":
        state = {"epoch": 0, "step": 0, "name": name_of(config), "card": known, "state_dict": {
            f"module.{key}": tensor for key, tensor in state.items()}}
    else:  # torch's own place for what goes with a state dict and is no tensor
        state = collections.OrderedDict(state)
        state._metadata = beside
    write_whole(path, lambda file: torch.save(state, file))
    return path


def export(model, folder, layout, tokenizer=None):
    """`save` into `folder` under the layout's usual name, "hf" with the tokenizer -> that path."""
    if tokenizer is not None:
        model.vocabulary = tokenizer.facts()
    path = save(model, pathlib.Path(folder) / LAYOUTS.get(layout, layout), layout)
    if tokenizer is not None and layout == "hf":
        tokenizer.save(path.parent, model.config.context_length)
    return path


def safetensors_bytes(state, metadata):
    """The chunks of a safetensors file: 8 bytes of header length, header, tensors."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, begin = {"__metadata__": metadata}, 0
    for name, tensor in state.items():
        end = begin + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8
    yield from (len(text).to_bytes(8, "little"), text)
    for tensor in state.values():
        yield tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b""


def digest(model, side, head=True):
    """The sha256 of one tower ("image" or "text"), with its projection or without: names, shapes,
    values. It changes with any weight, which makes it the key to features that were kept."""
    found = hashlib.sha256(json.dumps(dataclasses.asdict(model.config)).encode())
    for name, tensor in model.state_dict().items():
        left_out = name.startswith(("logit_",) if head else ("logit_", *HEADS))
        if not left_out and name.startswith("visual.") == (side == "image"):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().numpy().tobytes())
    return found.hexdigest()


# -----------------------------------------------------------------------------
# What the scripts ask for

def add_model_flags(parser, towers=False):
    """--model, --weights, --activation and --tokenizer; towers: also those of a CLIP of two."""
    add = parser.add_argument_group("model").add_argument
    add("--model", help="a released size such as ViT-B/16 or RN50, or tiny (bundled)")
    add("--weights", default="auto", help="auto: OpenAI's for the model; none: random; or a file, "
        "a model's or run's folder or ORG/NAME of huggingface.co: its model (default: "
        f"{'none' if towers else 'auto'})")
    add("--activation", choices=("quick_gelu", "gelu"), help="where the file does not say it")
    add("--tokenizer", help="file or folder of the text tower's vocabulary")
    if towers:
        add("--image-tower", help="instead of the model's: a CLIP, or [timm:]NAME[:FILE]")
        add("--text-tower", help="instead of the model's: a folder of the BERT family, or a CLIP")
        add("--proj", choices=("linear", "mlp"), default="linear", help="heads of chosen towers")
        add("--embed-dim", type=int, default=512, help="of chosen towers (default: 512)")


def open_clip(args):
    """The CLIP that the flags of `add_model_flags` ask for, on the CPU. Raises WeightsError."""
    known = canonical_name(args.model or "")
    weights, activation = args.weights or "auto", getattr(args, "activation", None)
    image, text = getattr(args, "image_tower", None), getattr(args, "text_tower", None)
    torch.manual_seed(args.seed if isinstance(args.seed, int) else 0)
    if weights in ("auto", "none") and not known and not (image and text):
        wrong = f"unknown --model {args.model!r}" if args.model else "no CLIP to start from"
        raise WeightsError(f"{wrong}; expected --weights FILE, or --model {', '.join(CONFIGS)}")
    source = {"none": f"{known}:none", "auto": known}.get(weights, weights)
    if image or text:
        return load(source, image, text, args.proj, args.embed_dim, activation=activation)
    if weights == "none":
        model = CLIP(dataclasses.replace(
            CONFIGS[known], activation=activation or CONFIGS[known].activation)).eval()
        model.origin["name"] = known
        model.origin["notes"].append(f"{known} starts from random numbers")
        return model
    model = load(source, activation=activation)
    if args.model and model.origin["name"] != known:
        raise WeightsError(f"--weights {weights} holds no {args.model} but a "
                           f"{describe(model.config)}; leave --model out to take it")
    return model
