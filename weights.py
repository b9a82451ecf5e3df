"""Weight files in and out: OpenAI's, OpenCLIP's, Hugging Face's, Chinese-CLIP's, and our own.

    from weights import load, save
    model = load("ViT-B/16")                        # OpenAI's, fetched once into ~/.cache/clip
    model = load("runs/clipfit/dtd")                # a run folder, a checkpoint, any file of CLIP's
    model = load(image_tower="resnet50:IMAGENET1K_V2", text_tower="path/of/roberta-base")
    save(model, "clip.safetensors")

A file is never trusted: nothing in it is executed, sizes and checksums are verified first, and what
changes the features without a trace in the shapes (activation, heads, pooling, epsilons, pixel
statistics) is read from the configuration beside it; a setting that `clip_model` does not have is
refused by its name. Every problem is a WeightsError of one line.
"""
import collections
import contextlib
import dataclasses
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
    BERTS, CHINESE_CLIPS, CLIP, CONFIGS, FAMILIES, HEAD_OF_WIDTH, HEADS, BertConfig, CLIPConfig,
    Pixels, bert_fields, canonical_name, make_backbone)


class WeightsError(ValueError):
    """A name or file that gives no CLIP; `exit_code` marks it as something the user can fix."""
    exit_code = 2


OPENAI_URL = "https://openaipublic.azureedge.net/clip/models"
RELEASED = {  # name -> (file, sha256); the hash is also the folder in the URL
    "RN50": ("RN50.pt", "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762"),
    "RN101": ("RN101.pt", "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599"),
    "RN50x4": ("RN50x4.pt", "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd"),
    "RN50x16": ("RN50x16.pt", "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa"),
    "RN50x64": ("RN50x64.pt", "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c"),
    "ViT-B/32": ("ViT-B-32.pt", "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"),
    "ViT-B/16": ("ViT-B-16.pt", "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f"),
    "ViT-L/14": ("ViT-L-14.pt", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"),
    "ViT-L/14@336px": ("ViT-L-14-336px.pt",
                       "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02"),
}
TINY = pathlib.Path(__file__).resolve().parent / "assets" / "tiny_clip.safetensors"
FOLDER_FILES = (  # what a folder is asked for, in this order; the last are those of a run
    "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors",
    "open_clip_pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json",
    "clip.safetensors", "clip.pt", "chinese_clip.pt", "checkpoint_best.pt", "checkpoint_last.pt")
LAYOUTS = ("safetensors", "openai", "open_clip", "hf", "chinese_clip")

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
        harmless = {"torch._utils._rebuild_tensor_v2": self.rebuild, "torch.device": str,
                    "torch._utils._rebuild_parameter": lambda data, *_: data,
                    "collections.OrderedDict": collections.OrderedDict}
        if module == "torch.jit._pickle":  # typed lists
            return lambda data, *_: data
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


def one_line(error):
    """The telling line of an exception."""
    text = re.sub(r"\s+", " ", str(error))
    wish = re.search(r"(Unsupported (global|class|operand)[^.]*\.\S*|GLOBAL \S+)", text)
    return (wish.group(0) if wish else text)[:160] or type(error).__name__


def read_zip(path):
    """A TorchScript archive or a `torch.save` file -> (content, format)."""
    try:
        archive = zipfile.ZipFile(path)
    except Exception:  # BadZipFile, or one of five others when the directory is garbled
        raise WeightsError(f"{path} is truncated ({path.stat().st_size:,} bytes and no zip "
                           f"directory at its end); fetch it again") from None
    with archive:
        names = archive.namelist()
        pickles = [name for name in names if name.count("/") <= 1 and name.endswith("data.pkl")]
        if not pickles:
            raise WeightsError(f"{path} is a zip archive but not a PyTorch file (no data.pkl); "
                               f"if it is a bundle, unpack it and name the weight file inside")
        root = pickles[0].removesuffix("data.pkl")
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()
               if not info.filename.startswith(f"{root}code/")):  # TorchScript deflates its code
            raise WeightsError(f"{path} is a zip with compressed weights, which PyTorch never "
                               f"writes; it was repacked, take the original file")
        try:  # torch.load and torch.jit.load never look at checksums; 0.3 s for 340 MB
            damaged = archive.testzip() is not None
        except Exception:  # a garbled member header raises anything
            damaged = True
        if damaged:
            raise WeightsError(f"{path} is damaged (a member fails its checksum); fetch or copy "
                               f"it again")
        if not any(name.startswith((f"{root}code/", f"{root}constants.pkl")) for name in names):
            return torch_load(path), "PyTorch zip"
        try:
            module = ScriptReader(archive, root).load()
            return dict(module.tensors()), "TorchScript archive"
        except Exception as error:  # a hostile pickle can raise anything
            raise WeightsError(f"{path} is not a TorchScript archive of plain weights and was not "
                               f"run: {one_line(error)}") from None


def torch_load(path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch would say of an odd file is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises five kinds for five kinds of bad file
        raise WeightsError(f"{path} holds more than tensors and plain values, or is no PyTorch "
                           f"file, and was not run: {one_line(error)}") from None


def read_safetensors(path):
    """-> (tensors, metadata). The format has no checksum, so only its frame can be verified."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise WeightsError(f"{path} is not a safetensors file, or truncated: its header says "
                               f"{length:,} bytes of {size:,}")
        try:
            header = json.loads(file.read(length))
            metadata = header.pop("__metadata__", {})
            if not isinstance(metadata, dict):
                raise ValueError("its metadata is no table")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            tensors, position = {}, 0
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                begin, end = entry["data_offsets"]
                if entry["dtype"] not in DTYPES:
                    raise WeightsError(f"{path}: {name!r} is stored as {entry['dtype']}, a "
                                       f"quantised or rare type; expected one of {list(DTYPES)}")
                dtype, shape = DTYPES[entry["dtype"]], [int(n) for n in entry["shape"]]
                count = math.prod(shape)
                if begin != position or end - begin != count * dtype.itemsize or min(
                        shape, default=0) < 0:
                    raise ValueError(f"tensor {name!r} does not fit its place")
                position = end
                tensors[name] = torch.frombuffer(
                    data, dtype=dtype, count=count, offset=8 + length + begin).reshape(
                    shape).clone() if count else torch.empty(shape, dtype=dtype)
            if 8 + length + position != size:
                raise ValueError(f"{size:,} bytes where the header says {8 + length + position:,}")
        except WeightsError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError
                ) as error:
            raise WeightsError(f"{path} is a damaged or truncated safetensors file "
                               f"({one_line(error)}); fetch it again") from None
    return tensors, metadata


def read_shards(path):
    """The tensors of all shards that a Hugging Face *.index.json names, each verified."""
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where or not all(
            isinstance(name, str) and pathlib.PurePath(name).name == name
            for name in where.values()):
        raise WeightsError(f"{path} is not an index of weight shards in its own folder")
    tensors = {}
    for name in sorted(set(where.values())):
        if not (path.parent / name).is_file():
            raise WeightsError(f"{path} names the shard {name}, which is not beside it; fetch it")
        content, _, _ = read_file(path.parent / name)
        expected = {key for key, shard in where.items() if shard == name}
        if not isinstance(content, dict) or content.keys() != expected:
            raise WeightsError(f"{path.parent / name} does not hold the tensors that {path.name} "
                               f"says; fetch both again")
        tensors |= content
    return tensors


def read_json(path):
    """The table in a JSON file; {} where there is no such file, or one with something else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is unreadable: {one_line(error)}") from None
    return content if isinstance(content, dict) else {}


def read_file(path):
    """Any weight file -> (content, format, metadata); WeightsError says what a bad one is."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from None
    if size == 0:
        raise WeightsError(f"{path} is empty (0 bytes): an interrupted download or copy")
    if head.lstrip()[:1] == b"<":
        raise WeightsError(f"{path} is a web page (HTML), not weights: the download gave a login "
                           f"or error page; fetch it again in a browser")
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{path} is a Git LFS pointer of {size} bytes, not the weights; run "
                           f"`git lfs pull` where it came from")
    if head[:2] == b"\x1f\x8b":
        raise WeightsError(f"{path} is gzip-compressed; unpack it first")
    if path.name.endswith(".index.json"):
        return read_shards(path), "shards", {}
    if head[:2] == b"PK":
        content, kind = read_zip(path)
    elif path.suffix == ".safetensors" or head[8:9] == b"{":
        tensors, metadata = read_safetensors(path)
        return tensors, "safetensors", metadata
    elif head[:1] == b"\x80":
        content, kind = torch_load(path), "PyTorch pickle"
    else:
        raise WeightsError(f"{path} is not a weight file: expected a PyTorch .pt/.bin or "
                           f".safetensors, and it begins with {head[:8]!r}")
    return content, kind, getattr(content, "_metadata", None) or {}


# -----------------------------------------------------------------------------
# Names: one layout inside, OpenAI's

HF_NAMES = [  # (OpenAI's, Hugging Face's); whole names first, then fragments
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.proj", "visual_projection.weight"),
    ("text_projection", "text_projection.weight"),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),  # their spelling
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("ln_final.", "text_model.final_layer_norm."),
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    (".ln_1.", ".layer_norm1."), (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."), (".mlp.c_proj.", ".mlp.fc2."),
    (".attn.out_proj.", ".self_attn.out_proj."),
    ("bert.", "text_model."),  # last: what is left of a text_model that is no CLIP's
]
DISTILBERT_NAMES = [  # (BERT's, DistilBERT's)
    ("encoder.layer.", "transformer.layer."),
    (".attention.self.query.", ".attention.q_lin."), (".attention.self.key.", ".attention.k_lin."),
    (".attention.self.value.", ".attention.v_lin."),
    (".attention.output.dense.", ".attention.out_lin."),
    (".attention.output.LayerNorm.", ".sa_layer_norm."), (".intermediate.dense.", ".ffn.lin1."),
    (".output.dense.", ".ffn.lin2."), (".output.LayerNorm.", ".output_layer_norm."),
]


def rename(name, source, target):
    for pair in HF_NAMES:
        old, new = pair[source], pair[target]
        if name == old:
            return new
        if old.endswith("."):
            name = name.replace(old, new) if old[0] == "." else (
                new + name[len(old):] if name.startswith(old) else name)
    return name


def to_hugging_face(state):
    """OpenAI's names -> Hugging Face's: q, k, v apart, the two projections transposed."""
    out = {}
    for name, tensor in state.items():
        if ".attn.in_proj_" in name:
            stem, kind = rename(name, 0, 1).split(".attn.in_proj_")
            for letter, part in zip("qkv", tensor.chunk(3)):
                out[f"{stem}.self_attn.{letter}_proj.{kind}"] = part.contiguous()
        else:
            turned = name in ("visual.proj", "text_projection")
            out[rename(name, 0, 1)] = tensor.t().contiguous() if turned else tensor
    return out


def from_hugging_face(state):
    """Hugging Face's names -> OpenAI's; raises KeyError when one of q, k, v is missing."""
    out = {}
    for name, tensor in state.items():
        if ".self_attn.q_proj." in name:
            parts = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            name = name.replace(".self_attn.q_proj.", ".attn.in_proj_")
            out[rename(name, 1, 0)] = torch.cat(parts)
        elif not re.search(r"\.self_attn\.[kv]_proj\.|position_ids$", name):
            turned = name in ("visual_projection.weight", "text_projection.weight")
            out[rename(name, 1, 0)] = tensor.t() if turned else tensor
    return out


def bert_state(state):
    """The text tower's tensors in a file of the BERT family, under BERT's names; {} without one.

    Heads for other tasks are left out, and with them what stands beside a tower in a whole CLIP.
    """
    table = "embeddings.word_embeddings.weight"
    stem = next((name.removesuffix(table) for name in state if name.endswith(table)), None)
    out = {}
    for name, tensor in state.items() if stem is not None else ():
        name = name.removeprefix(stem) if name.startswith(stem) else ""
        if name.startswith(("embeddings.", "encoder.", "transformer.layer.", "pooler.")) and (
                not name.endswith(("position_ids", "token_type_ids"))):
            for bert, distilbert in DISTILBERT_NAMES if name.startswith("transformer.") else ():
                name = name.replace(distilbert, bert)
            out[re.sub(r"gamma$", "weight", re.sub(r"beta$", "bias", name))] = tensor  # TensorFlow
    return out


def unfuse(state):
    """FlashAttention's names of Chinese-CLIP -> its usual ones; BERT's q, k, v are apart there."""
    out = {}
    for name, tensor in state.items():
        name = name.replace(".attention.self.out_proj.", ".attention.output.dense.")
        if ".attention.self.Wqkv." in name:
            for part, share in zip(("query", "key", "value"), tensor.chunk(3)):
                out[name.replace("Wqkv", part)] = share
        else:
            out[re.sub(r"\.attn\.Wqkv\.(?=weight$|bias$)", ".attn.in_proj_", name)] = tensor
    return out


def plain_state(content, path):
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
        raise WeightsError(f"{path} holds no tensors under names; expected a state dict")
    for name, tensor in state.items():  # a stride of 0 makes terabytes of four bytes
        if (tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized
                or tensor.nbytes > tensor.untyped_storage().nbytes()):
            raise WeightsError(f"{path}: {name!r} is not a plain tensor (sparse, quantized, "
                               f"expanded or without data)")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightsError(f"{path}: {name!r} holds NaN or infinity; the file is damaged or "
                               f"from a run that diverged")
    prefixes = ["module.", "_orig_mod.", "model.", "clip."]
    while found := next((p for p in prefixes if all(n.startswith(p) for n in state)), None):
        state = {name.removeprefix(found): value for name, value in state.items()}
        notes.append(f"prefix {found!r} removed")
    return state, notes


def openai_names(state, path):
    """Any layout's names -> (OpenAI's, layout); a text tower of the BERT family is `bert.`."""
    layout = "openai"  # OpenCLIP's CLIP keeps the same names
    try:
        if any(name.startswith(("vision_model.", "text_model.")) for name in state):
            layout = "hf"  # transformers before 5 wrapped a dual encoder's image tower once more
            state = from_hugging_face({re.sub(r"^(vision_model\.){2}", r"\1", name): tensor
                                       for name, tensor in state.items()})
        elif "text.token_embedding.weight" in state:
            layout = "open_clip"  # its CustomTextCLIP
            state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
        elif any(name.startswith("bert.encoder.") for name in state) and any(
                name.startswith("visual.") for name in state):
            layout, state = "chinese_clip", unfuse(state)
    except KeyError as error:
        raise WeightsError(f"{path} lacks {error} beside its q_proj") from None
    except RuntimeError as error:
        raise WeightsError(f"{path}: shapes that fit no CLIP: {one_line(error)}") from None
    no_weights = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # old buffers
    state = {name: tensor for name, tensor in state.items()
             if name.rpartition(".")[2] not in no_weights}
    if "bert.transformer.layer.0.attention.q_lin.weight" in state:
        state = {name: tensor for name, tensor in state.items() if name[:5] != "bert."} | {
            "bert." + name: tensor for name, tensor in bert_state(state).items()}
    return state, layout


# -----------------------------------------------------------------------------
# What stands beside the tensors. Each reader returns {"image": fields of CLIPConfig, "text":
# fields, "bert": fields of BertConfig, "pixels": Pixels}, of what it knows; unknown settings raise.

def only(table, **allowed):
    """Refuse a setting that changes features and leaves no trace in shapes."""
    for key, values in allowed.items():
        if key in table and table[key] not in values:
            raise WeightsError(f"{key} {table[key]!r} is not supported here; expected "
                               f"{' or '.join(map(repr, values))}")


def known_of_bert(config):
    """What a Hugging Face config of the BERT family says that shapes do not."""
    def get(default, *names):  # DistilBERT has names of its own
        return next((config[name] for name in names if name in config), default)
    family = config.get("model_type", "bert").replace("chinese_clip_text_model", "bert")
    only({"model_type": family}, model_type=tuple(FAMILIES))
    only(config, hidden_act=("gelu",), activation=("gelu",), is_decoder=(False,),
         position_embedding_type=("absolute",))
    return {"family": family, "heads": get(12, "num_attention_heads", "n_heads"),
            "pad_id": get(int(family == "roberta"), "pad_token_id"),
            "eps": get(1e-12, "layer_norm_eps"),
            "dropout": get(0.1, "hidden_dropout_prob", "dropout"),
            "attention_dropout": get(0.1, "attention_probs_dropout_prob", "attention_dropout")}


def known_of_tower(config, width):
    """(head width, activation) of one of Hugging Face's CLIP towers."""
    only(config, hidden_act=("quick_gelu", "gelu"), layer_norm_eps=(1e-5,))
    width = config.get("hidden_size", width)
    return width // config.get("num_attention_heads", width // 64), config.get(
        "hidden_act", "quick_gelu")


def known_from_hugging_face(folder):
    """config.json, preprocessor_config.json and 1_Pooling/config.json of a model folder."""
    config = read_json(folder / "config.json")
    kind, known = config.get("model_type"), {}
    if kind is None:
        return {}
    if kind in FAMILIES:
        return {"bert": known_of_bert(config) | pooling(folder)}
    only(config, model_type=("clip", "chinese_clip", "vision-text-dual-encoder",
                             "clip_vision_model", "clip_text_model", *FAMILIES))
    image = config if kind == "clip_vision_model" else config.get("vision_config") or {}
    text = config if kind == "clip_text_model" else config.get("text_config") or {}
    if kind != "clip_text_model":
        only(image, model_type=("clip", "clip_vision_model", "chinese_clip_vision_model"))
        head, activation = known_of_tower(image, 768)
        known["image"] = {"vision_head": head, "activation": activation}
    bert = kind == "chinese_clip" or text.get("model_type") in FAMILIES
    if bert:
        known["bert"] = known_of_bert(text) | {
            "pool": "first" if kind == "chinese_clip" else "pooler"}
    elif kind != "clip_vision_model":
        only(text, model_type=("clip", "clip_text_model"),
             eos_token_id=(2, text.get("vocab_size", 49_408) - 1))  # where the text is read
        head, activation = known_of_tower(text, 512)
        known["text"] = {"text_head": head, "activation": activation}
    pixels = read_json(folder / "preprocessor_config.json")
    if pixels:
        known["pixels"] = pixels_of_hugging_face(pixels)
    return known


def pooling(folder):
    """How sentence-transformers pools a text tower, {} where it does not say."""
    config = read_json(folder / "1_Pooling" / "config.json")
    modes = {key.removeprefix("pooling_mode_") for key, on in config.items()
             if key.startswith("pooling_mode_") and on is True}
    modes = modes or {mode for mode in [config.get("pooling_mode")] if mode}
    names = {"mean_tokens": "mean", "mean": "mean", "cls_token": "first", "cls": "first"}
    if not modes:
        return {}
    if len(modes) > 1 or not modes <= names.keys():
        raise WeightsError(f"pooling {'+'.join(sorted(modes))} of 1_Pooling/config.json is not "
                           f"supported here; expected mean_tokens or cls_token")
    return {"pool": names[modes.pop()]}


def pixels_of_hugging_face(config):
    """Pixels of a preprocessor_config.json."""
    only(config, do_resize=(True,), do_rescale=(True,), do_normalize=(True,),
         rescale_factor=(1 / 255,), resample=(2, 3))
    size, crop = config.get("size", 224), config.get("crop_size", config.get("size", 224))
    squash = isinstance(size, dict) and "height" in size
    sides = {side for value in (size, crop) for side in (
        value.values() if isinstance(value, dict) else [value])}
    if len(sides) > 1 or not squash and config.get("do_center_crop") is False:
        raise WeightsError(f"images of size {size} and crop_size {crop} are not supported here; "
                           f"expected one number of pixels for both, with do_center_crop")
    return make_pixels(config.get("image_mean"), config.get("image_std"), "squash" if squash
                       else "shortest", "bilinear" if config.get("resample") == 2 else "bicubic",
                       sides.pop())


def make_pixels(mean, std, resize="shortest", interpolation="bicubic", size=None):
    """Checked Pixels; None takes CLIP's. `size` is compared with the tower's when it is known."""
    standard = Pixels()
    mean, std = (tuple(given) if given else own
                 for given, own in ((mean, standard.mean), (std, standard.std)))
    only({"resize_mode": resize, "interpolation": interpolation}, resize_mode=("shortest", "squash"),
         interpolation=("bicubic", "bilinear"))
    if not all(len(x) == 3 and all(isinstance(v, (int, float)) and math.isfinite(v) for v in x)
               for x in (mean, std)) or min(std) <= 0:
        raise WeightsError(f"pixel mean {mean} and std {std} are no three numbers each")
    return Pixels(mean, std, resize, interpolation)


NEUTRAL = (None, False, 0, 0.0, {}, [], "")
OPEN_CLIP = {  # settings of open_clip's configs and their values here; ANY: shapes or nothing tell
    "model_cfg": {"embed_dim": ..., "vision_cfg": ..., "text_cfg": ..., "quick_gelu": ...,
                  "custom_text": ..., "init_logit_scale": ..., "init_logit_bias": ...,
                  "output_dict": ..., "nonscalar_logit_scale": (False,), "cast_dtype": ...},
    "vision_cfg": {"layers": ..., "width": ..., "head_width": ..., "patch_size": ...,
                   "image_size": ..., "mlp_ratio": ..., "patch_dropout": ..., "output_tokens": ...,
                   "pool_type": ("tok",), "pos_embed_type": ("learnable",)},
    "text_cfg": {"context_length": ..., "vocab_size": ..., "width": ..., "heads": ..., "layers": ...,
                 "mlp_ratio": ..., "output_tokens": ..., "pool_type": ("argmax",),
                 "proj_type": ("linear",), "pad_id": ..., "hf_model_pretrained": ...},
}


def known_from_open_clip(folder):
    """open_clip_config.json of a model folder."""
    config = read_json(folder / "open_clip_config.json")
    model = config.get("model_cfg")
    if not isinstance(model, dict):
        return {}
    for name, table in (("model_cfg", model), ("vision_cfg", model["vision_cfg"]),
                        ("text_cfg", model["text_cfg"])):
        for key, value in table.items():
            allowed = OPEN_CLIP[name].get(key, NEUTRAL)
            if allowed is not ... and value not in (*allowed, None):
                raise WeightsError(f"{name}.{key} {value!r} is not supported here")
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    text = model["text_cfg"]
    known = {"image": {"activation": activation,
                       "vision_head": model["vision_cfg"].get("head_width", 64)},
             "text": {"activation": activation,
                      "text_head": text.get("width", 512) // text.get("heads", 8)}}
    pixels = config.get("preprocess_cfg") or {}
    if pixels:
        only(pixels, mode=("RGB",))
        size = pixels.get("size")
        known["pixels"] = make_pixels(
            pixels.get("mean"), pixels.get("std"), pixels.get("resize_mode") or "shortest",
            pixels.get("interpolation") or "bicubic",
            size[0] if isinstance(size, list) and len(set(size)) == 1 else size)
    return known


def known_from_card(card):
    """What `card` wrote. Sizes are not taken from here but from the tensors' shapes."""
    config = dict(card.get("clip_config") or {})
    keys = {"image": ("vision_head", "activation", *(("backbone", "image_size")
                                                    if config.get("backbone") else ())),
            "text": ("text_head", "activation", "vocab_size"), "bert": (
                "family", "heads", "pad_id", "eps", "dropout", "attention_dropout", "pool")}
    tables = {"image": config, "text": config, "bert": config.get("text") or {}}
    known = {part: {key: tables[part][key] for key in keys[part] if key in tables[part]}
             for part in keys}
    pixels = card.get("pixels")
    return known | {"pixels": pixels and make_pixels(pixels["mean"], pixels["std"],
                                                     pixels["resize"], pixels["interpolation"])}


# -----------------------------------------------------------------------------
# Sizes from shapes

def count(state, pattern):
    """How many different numbers `pattern`'s group takes in the names of `state`."""
    return len({match.group(1) for match in map(re.compile(pattern).match, state) if match})


@contextlib.contextmanager
def explained(what):
    """A WeightsError for the tensors that are missing or odd while sizes are read off them."""
    try:
        yield
    except WeightsError:
        raise
    except KeyError as error:
        raise WeightsError(f"not {what}: there is no {error}") from None
    except ImportError as error:
        raise WeightsError(one_line(error)) from None
    except (ValueError, IndexError, TypeError, AttributeError, RuntimeError, ArithmeticError
            ) as error:
        raise WeightsError(f"these sizes make no {what.split(' ', 1)[1]}: {one_line(error)}"
                           ) from None


def image_fields(sd, backbone="", image_size=None, **known):
    """The CLIPConfig fields of the image tower in these tensors (OpenAI's names)."""
    with explained("an image tower of CLIP"):
        if any(name.startswith("visual.trunk.") for name in sd):
            if not (backbone and image_size):
                raise WeightsError("its image tower is the trunk of a classifier, and of which one "
                                   "and for what image size is not written")
            head = sd.get("visual.proj.projection.weight")
            width = sd["visual.proj"].shape[0] if head is None else head.shape[1]
            return {"backbone": backbone, "image_size": image_size, "vision_layers": 0,
                    "vision_patch": None, "vision_width": width} | known
        if "visual.class_embedding" in sd:
            width, _, _, patch = sd["visual.conv1.weight"].shape
            side = math.isqrt(sd["visual.positional_embedding"].shape[0] - 1)
            size, layers = patch * side, count(sd, r"visual\.transformer\.resblocks\.(\d+)\.")
        else:
            width, patch = sd["visual.layer1.0.conv1.weight"].shape[0], None
            size = 32 * math.isqrt(sd["visual.attnpool.positional_embedding"].shape[0] - 1)
            layers = tuple(count(sd, rf"visual\.layer{i}\.(\d+)\.") for i in (1, 2, 3, 4))
    if not layers:
        raise WeightsError("not a CLIP: one of its towers has no blocks")
    return {"image_size": size, "vision_layers": layers, "vision_width": width,
            "vision_patch": patch, "vision_head": HEAD_OF_WIDTH.get(width, 64)} | known


def bert_config(sd, **known):
    """The BertConfig of a text tower under BERT's names; `known` has what leaves no trace in
    shapes. The published models are told apart by their segments."""
    with explained("a text tower of the BERT family"):
        segments = sd.get("embeddings.token_type_embeddings.weight")
        segments = 0 if segments is None else segments.shape[0]
        family = known.get("family", {0: "distilbert", 1: "roberta"}.get(segments, "bert"))
        vocab, width = sd["embeddings.word_embeddings.weight"].shape
        return BertConfig(**{
            "family": family, "vocab_size": vocab, "width": width, "heads": width // 64,
            "layers": count(sd, r"encoder\.layer\.(\d+)\."),
            "intermediate": sd["encoder.layer.0.intermediate.dense.weight"].shape[0],
            "positions": sd["embeddings.position_embeddings.weight"].shape[0],
            "type_vocab": segments, "pad_id": int(family == "roberta"),
            "eps": 1e-5 if family == "roberta" else 1e-12,
            "pool": "pooler" if "pooler.dense.weight" in sd else "first"} | known)


def text_fields(sd, bert=None, **known):
    """The CLIPConfig fields of the text tower in these tensors (OpenAI's names)."""
    tower = {name[5:]: tensor for name, tensor in sd.items() if name.startswith("bert.")}
    if tower:
        return bert_fields(bert_config(tower, **(bert or {})))
    with explained("a text tower of CLIP"):
        layers = count(sd, r"transformer\.resblocks\.(\d+)\.")
        fields = {"text_width": sd["ln_final.weight"].shape[0], "text_layers": layers,
                  "context_length": sd["positional_embedding"].shape[0],
                  "vocab_size": sd["token_embedding.weight"].shape[0]}
    if not layers:
        raise WeightsError("not a CLIP: one of its towers has no blocks")
    return fields | known


def config_from_state_dict(sd, image=None, text=None, bert=None, **known):
    """The CLIPConfig that these tensors' shapes belong to (OpenAI's names; meta tensors will do).

    Head widths and the activation leave no trace in shapes and are taken as OpenAI's unless they
    are among `known`, fields of CLIPConfig (image, text: of one tower; bert: of BertConfig).
    Raises WeightsError naming the first tensor that is missing, unknown or of another shape.
    """
    mlp = "text_projection.layer_norm.weight" in sd
    head = "text_projection.layer_norm.weight" if mlp else "text_projection"
    for name in ("logit_scale", head):
        if name not in sd:
            raise WeightsError(f"not a CLIP: there is no {name!r} (the first of {len(sd)} tensors "
                               f"is {next(iter(sd), None)!r})")
    fields = image_fields(sd, **(image or {})) | text_fields(sd, bert, **(text or {})) | known
    with explained("a CLIP"):
        config = CLIPConfig(embed_dim=sd[head].shape[-1], proj="mlp" if mlp else "linear", **fields)
    check_state(config, sd)
    return config


def check_state(config, state):
    """Raise WeightsError unless `state` has exactly the tensors of a CLIP of this size."""
    with explained("a CLIP"), torch.device("meta"):
        expected = CLIP(config).state_dict()
    expected["logit_bias"] = expected["logit_scale"]
    for name, tensor in expected.items():
        if name not in state and (name.endswith(".num_batches_tracked") or name == "logit_bias"):
            continue  # older BatchNorms did not count; only SigLIP's loss has a bias
        if name not in state:
            raise WeightsError(f"the weights lack {name!r} {tuple(tensor.shape)}")
        if state[name].shape != tensor.shape:
            raise WeightsError(f"{name!r} is {tuple(state[name].shape)} in the weights and "
                               f"{tuple(tensor.shape)} in a CLIP of this size")
        if tensor.is_floating_point() and not state[name].is_floating_point():
            raise WeightsError(f"{name!r} is {state[name].dtype} in the weights; expected floating "
                               f"point")
    extra = next((name for name in state if name not in expected), None)
    if extra is not None:
        raise WeightsError(f"the weights have {extra!r}, which is no part of a CLIP of this size")


# -----------------------------------------------------------------------------
# Loading

class Source(typing.NamedTuple):
    """A weight file, read and checked."""
    state: dict         # tensors under OpenAI's names
    known: dict         # what stands beside the tensors, see above
    vocabulary: dict | None
    origin: dict


def stored_card(content, metadata):
    """What `card` wrote into a file, {} where nothing: a dict of untrusted plain values."""
    if isinstance(content, dict) and isinstance(content.get("card"), dict):
        return content["card"]
    card = {}
    for key in ("clip_config", "pixels", "vocabulary"):
        if isinstance(metadata.get(key), str):
            card[key] = json.loads(metadata[key])
    return card if isinstance(card.get("clip_config"), dict) else {}


def checkpoint_state(content, card, path):
    """The whole state of a run's checkpoint, which may hold no more than what was trained: the
    rest is read from the file that the run began with."""
    tables = [content.get("weights"), content.get("buffers"),
              content.get("ema") if content.get("tested") == "ema" else None]
    state = {}
    for table in tables:
        state |= plain_state(table, path)[0] if table else {}
    if len(state) < card["tensors"]:
        origin = card["origin"]
        try:
            base = read(origin["name"] if origin["name"] in RELEASED else origin["path"],
                        card["clip_config"]["activation"])
        except WeightsError as error:
            raise WeightsError(f"{path} holds only what was trained, and the weights that it began "
                               f"with are not to be had: {error}") from None
        if base.origin["sha256"] != origin["sha256"]:
            raise WeightsError(f"{path} began with other weights than {origin['path']} holds now "
                               f"(sha256 {origin['sha256'][:12]})")
        state = base.state | state
    return state


def read(name_or_path, activation=None):
    """A name, file or folder -> Source. Raises WeightsError."""
    path = locate(name_or_path)
    shard = re.search(r"-(\d{5})-of-(\d{5})\.", path.name)
    if shard and int(shard[2]) > 1:
        raise WeightsError(f"{path} is one of {int(shard[2])} shards; give its folder, or the "
                           f"*.index.json in it")
    content, kind, metadata = read_file(path)
    try:
        card = stored_card(content, metadata)
        if card and isinstance(content.get("weights"), dict):
            state, layout, notes = checkpoint_state(content, card, path), "checkpoint", []
        else:
            state, notes = plain_state(content, path)
            state, layout = openai_names(state, path)
        known = known_from_card(card) if card else known_beside(path.parent, state, layout)
        if known["bert"].get("pool", "pooler") != "pooler":
            state = {name: t for name, t in state.items() if not name.startswith("bert.pooler.")}
        state = spread_embedding(state, known["text"].get("vocab_size", 49_408))
        said = {known[side]["activation"] for side in ("image", "text")
                if "activation" in known[side]}
        if len(said) > 1:
            raise WeightsError("one tower has QuickGELU and the other GELU; expected one for both")
        if not (said or activation or kind == "TorchScript archive" or layout == "chinese_clip"):
            notes.append("the file does not say its activation and QuickGELU, OpenAI's, was taken; "
                         "models trained by LAION need --activation gelu")
        for side in ("image", "text"):
            known[side]["activation"] = activation or next(iter(said), "quick_gelu")
    except WeightsError as error:
        text = str(error)
        raise WeightsError(text if str(path) in text else f"{path}: {text}") from None
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise WeightsError(f"{path}: what stands beside its weights is unreadable: "
                           f"{one_line(error)}") from None
    vocabulary = card.get("vocabulary")
    return Source(state, known, vocabulary if isinstance(vocabulary, dict) else None, {
        "name": str(name_or_path), "path": str(path.resolve()), "sha256": sha256_of(path),
        "layout": layout, "format": kind, "notes": notes})


def known_beside(folder, state, layout):
    """What the configuration of the named library says in the folder of the weights."""
    known = {"image": {}, "text": {}, "bert": {}, "pixels": None}
    if layout == "chinese_clip":
        return known | {"bert": {"pool": "first"}}
    if layout == "hf" or layout == "openai" and "logit_scale" not in state:
        return known | known_from_hugging_face(folder)
    return known | known_from_open_clip(folder)


def load(name_or_path=None, image_tower=None, text_tower=None, proj="linear", embed_dim=512,
         pool=None, image_size=None, activation=None, keep_projections=True):
    """A CLIP with weights, fp32, in eval mode, on the CPU.

    name_or_path: a released name ("ViT-B/16", fetched once into OpenAI's own ~/.cache/clip),
    "tiny" (bundled), a file (.pt, .bin, .safetensors: OpenAI, OpenCLIP, Hugging Face, Chinese-CLIP
    or our own, also a training checkpoint), or a folder of these, also a run's. A name wins over a
    folder of the same name; "./RN50" is the folder. activation: "quick_gelu" or "gelu" where the
    file does not tell; OpenAI's otherwise. Raises WeightsError.

    image_tower, text_tower: the towers of a new CLIP, see `image_part` and `text_part`; the one
    that is not given comes from `name_or_path`. The other arguments are for `join` alone.
    """
    if image_tower is not None or text_tower is not None:
        return join(image_part(image_tower or name_or_path, image_size, activation),
                    text_part(text_tower or name_or_path, pool, activation),
                    proj, embed_dim, keep_projections)
    if name_or_path is None:
        raise WeightsError("nothing to load; expected a name, a path or two towers")
    source = read(name_or_path, activation)
    try:
        config = config_from_state_dict(source.state, **{
            side: source.known[side] for side in ("image", "text", "bert")})
    except WeightsError as error:
        raise WeightsError(f"{source.origin['path']}: {error}") from None
    with torch.device("meta"):  # nothing is initialised only to be overwritten
        model = CLIP(config)
    fill(model, source.state)
    if source.known["pixels"]:
        model.set_pixels(source.known["pixels"])
    model.requires_grad_(True)
    model.origin = source.origin | {"name": name_of(config)}
    model.vocabulary = source.vocabulary
    return model.eval()


def name_of(config):
    """The name of a CLIP of this size, whatever its activation; "custom" for one without."""
    return next((name for name, known in CONFIGS.items() if known == dataclasses.replace(
        config, activation=known.activation)), "custom")


def fill(model, state):
    """load_state_dict in place of the tensors of `model`, which may be on "meta".

    Adds what tensors do not tell: the versions of modules, without which torchvision's MNASNet
    refuses, and the zero count of batches of BatchNorms older than it. Every parameter becomes
    contiguous: some accelerators ignored in-place updates of strided ones.
    """
    if "logit_bias" in state:
        model.logit_bias = torch.nn.Parameter(torch.zeros((), device=model.logit_scale.device))
    own = model.state_dict()
    state = collections.OrderedDict({name: torch.tensor(0) for name in own
                                     if name.endswith(".num_batches_tracked")} | state)
    for name, tensor in state.items():
        state[name] = tensor.to(own[name].dtype).contiguous()
    state._metadata = own._metadata
    model.load_state_dict(state, assign=True)


class Part(typing.NamedTuple):
    """One tower of `join`."""
    fields: dict        # of CLIPConfig
    state: dict         # its tensors, {} for random numbers
    origin: dict
    pixels: Pixels | None = None
    vocabulary: dict | None = None


def join(image, text, proj, embed_dim, keep_projections):
    """A CLIP of two towers, each a Part.

    proj: "linear" without bias, as in OpenAI's and transformers' code, or "mlp", a `ResidualHead`;
    both to `embed_dim`. A tower that comes from a CLIP keeps its own projection where the shapes
    agree, unless keep_projections is false (transformers' dual encoder always starts anew). What
    has no weights is drawn from torch's global generator; `origin["notes"]` tells.
    """
    parts, notes = (image, text), []
    said = {part.fields["activation"] for part in parts if "activation" in part.fields}
    if len(said) > 1:
        raise WeightsError("one CLIP has QuickGELU and the other GELU; give both with the same")
    with explained("a CLIP"):
        model = CLIP(CLIPConfig(embed_dim=embed_dim, proj=proj, **image.fields | text.fields))
    own, state = model.state_dict(), image.state | text.state
    drawn = {name for name in own if name == "logit_scale" or name.startswith("bert.pooler.")}
    for part in parts:
        notes += [f"{part.origin['name']}: {note}" for note in part.origin["notes"]]
        if not part.state:
            notes.append(f"{part.origin['name'].removesuffix(':none')} starts from random numbers")
            drawn |= {name for name in own if name.startswith("visual.") == (part is image)}
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
    fill(model, state)
    if image.pixels:
        model.set_pixels(image.pixels)
    model.vocabulary = text.vocabulary
    model.origin = {"name": " + ".join(part.origin["name"] for part in parts), "path": "",
                    "sha256": "+".join(filter(None, (part.origin["sha256"] for part in parts))),
                    "layout": "towers", "format": "", "notes": notes}
    return model.eval()


CLIP_FIELDS = {"image": ("image_size", "vision_layers", "vision_width", "vision_patch",
                         "vision_head", "activation", "backbone"),
               "text": ("text_width", "text_layers", "context_length", "vocab_size", "text_head",
                        "activation", "text")}


def clip_part(side, name_or_path, activation, size=None, source=None):
    """The image or text tower of a CLIP. "NAME:none" has random weights, for images of `size`."""
    name = canonical_name(str(name_or_path).removesuffix(":none"))
    if name and str(name_or_path).endswith(":none"):
        config = dataclasses.replace(CONFIGS[name], image_size=size or CONFIGS[name].image_size)
        fields = {key: getattr(config, key) for key in CLIP_FIELDS[side]}
        del fields["activation"]
        return Part(fields | ({"activation": activation} if activation else {}), {},
                    {"name": f"{name}:none", "sha256": "", "notes": []})
    state, known, vocabulary, origin = source or read(name_or_path, activation)
    try:
        fields = (image_fields(state, **known["image"]) if side == "image" else
                  text_fields(state, known["bert"], **known["text"]))
    except WeightsError as error:
        raise WeightsError(f"{origin['path']}: {error}; the state dict of a classifier is given "
                           f"as NAME:FILE") from None
    if size not in (None, fields.get("image_size", size)):
        raise WeightsError(f"{name_or_path} takes images of {fields['image_size']} pixels and has "
                           f"no positions for {size}; leave image_size out")
    if fields.get("backbone") or fields.get("text"):
        fields.pop("activation", None)  # has no use for it
    state = {key: tensor for key, tensor in state.items() if not key.startswith("logit_")
             and key.startswith("visual.") == (side == "image")}
    return Part(fields, state, origin, known["pixels"], vocabulary)


def image_part(tower, size, activation):
    """`tower`: what `load` takes, whose image tower it becomes; or "[timm:]NAME[:WEIGHTS]".

    NAME is any classifier of torchvision ("resnet50"), with "timm:" of timm; WEIGHTS one of
    torchvision's published weights ("IMAGENET1K_V2", which it downloads), a file of a state dict,
    or "none", as when it is left out: random numbers. A file may be in the names of either library;
    it is read by the one whose names it has. size: pixels per side of its images, those of its
    published weights unless given. What CLIP and torchvision both know ("vit_b_16") is CLIP's
    without the prefix "torchvision:".
    """
    if tower is None:
        raise WeightsError("no image tower; give one, or a CLIP to take it from")
    text = str(tower)
    library, _, rest = text.partition(":")
    if library not in ("torchvision", "timm"):
        library, rest = "torchvision", text
        if canonical_name(text.removesuffix(":none")) or pathlib.Path(text).expanduser().exists():
            return clip_part("image", text, activation, size)
    name, _, weights = rest.partition(":")
    names = [name, f"timm:{name}"] if library == "torchvision" else [f"timm:{name}", name]
    state, origin = {}, {"name": text, "sha256": "", "notes": []}
    if weights.startswith("IMAGENET") and library == "torchvision":
        state = published(name, weights)
    elif weights not in ("", "none"):
        path = locate(weights)
        state, origin["notes"] = plain_state(read_file(path)[0], path)
        origin["sha256"] = sha256_of(path)
    problems = []
    for backbone in names if weights else names[:1]:
        try:
            with torch.device("meta"):
                trunk, removed, width, side, pixels = make_backbone(backbone, size)
        except (ImportError, ValueError, RuntimeError) as error:
            problems.append(one_line(error))
            continue
        unused = (removed + ".", "AuxLogits.", "aux1.", "aux2.")
        cut = {key: tensor for key, tensor in state.items() if not key.startswith(unused)}
        odd = {key for key in trunk.state_dict().keys() ^ cut.keys()
               if not key.endswith("num_batches_tracked")} if cut else None
        if odd:
            problems.append(f"{backbone} has other tensors ({min(odd)})")
            continue
        if backbone != names[0]:
            origin["notes"].append(f"its tensors have the names of {backbone}")
        fields = {"backbone": backbone, "image_size": side, "vision_layers": 0,
                  "vision_patch": None, "vision_width": width}
        return Part(fields, {f"visual.trunk.{key}": t for key, t in cut.items()}, origin, pixels)
    raise WeightsError(f"no image tower {text!r}: {'; '.join(problems)}; expected a CLIP's name or "
                       f"path, a classifier of torchvision such as resnet50, or timm:NAME")


def published(name, weights):
    """The state dict of one of torchvision's published weights, which torchvision downloads."""
    try:
        from torchvision import models
        return models.get_model(name, weights=weights).state_dict()
    except Exception as error:  # no torchvision, no network, a wrong hash, a full disk
        raise WeightsError(f"torchvision could not fetch {name}:{weights}: {one_line(error)}"
                           ) from None


def text_part(tower, pool, activation):
    """`tower`: a folder or file of Hugging Face's BERT, RoBERTa or DistilBERT; "NAME:none" with a
    NAME out of BERTS, for random numbers; or what `load` takes, whose text tower it becomes.

    pool: see BertConfig; what sentence-transformers' 1_Pooling/config.json says, else the pooler,
    as in transformers' dual encoder, but for DistilBERT, which has none: the first token.
    """
    if tower is None:
        raise WeightsError("no text tower; give one, or a CLIP to take it from")
    text = str(tower)
    here, name = pathlib.Path(text).expanduser().exists(), text.removesuffix(":none")
    if pool not in (None, "pooler", "first", "mean"):
        raise WeightsError(f"pool {pool!r} is not \"pooler\", \"first\" or \"mean\"")
    if name in BERTS and not here:
        if name == text:
            raise WeightsError(f"{name} cannot be fetched from here; put its config.json and "
                               f"model.safetensors (or pytorch_model.bin) into a folder and give "
                               f"that, or {name}:none for random numbers")
        config = dataclasses.replace(BERTS[name], pool=pool or BERTS[name].pool)
        return Part(bert_fields(config), {}, {"name": text, "sha256": "", "notes": []})
    if not here or canonical_name(text):
        return clip_part("text", text, activation)
    source = read(text, activation)
    tower, bert = bert_state(source.state), source.known["bert"]
    if not tower:
        return clip_part("text", text, activation, source=source)
    config = bert_config(tower, **bert)
    notes = [note for note in source.origin["notes"] if "activation" not in note]
    if not bert:
        notes.append("no config.json beside it: heads of 64 and the paddings and epsilons of the "
                     "published models were taken")
    pool = pool or bert.get("pool") or ("first" if config.family == "distilbert" else "pooler")
    if pool == "pooler" and "pooler.dense.weight" not in tower:
        notes.append("no pooler in the file; it starts from random numbers")
    state = {f"bert.{key}": tensor for key, tensor in tower.items()
             if pool == "pooler" or not key.startswith("pooler.")}
    return Part(bert_fields(dataclasses.replace(config, pool=pool)), state, source.origin | {
        "notes": notes}, vocabulary=source.vocabulary)


def spread_embedding(state, vocab_size):
    """A token embedding stored as the rows in use (`save(..., token_rows=...)`) made whole.

    The rows left out were never trained; they become zero.
    """
    rows = state.pop("token_embedding.rows", None)
    if rows is not None:
        part = state.get("token_embedding.weight")
        if part is None or part.dim() != 2 or rows.shape != part.shape[:1] or not len(rows) or (
                rows.is_floating_point() or not isinstance(vocab_size, int)
                or vocab_size * part.shape[1] >= 1 << 31
                or not 0 <= int(rows.min()) <= int(rows.max()) < vocab_size):
            raise WeightsError("token_embedding.rows does not fit token_embedding.weight")
        whole = torch.zeros(vocab_size, part.shape[1], dtype=part.dtype)
        whole[rows.long()] = part
        state["token_embedding.weight"] = whole
    return state


# -----------------------------------------------------------------------------
# Finding and fetching

def locate(name_or_path):
    """The path of a weight file; fetches a released model that is not here. A name wins over a
    file or folder of the same name, which "./NAME" means."""
    text = str(name_or_path)
    path, known = pathlib.Path(os.path.expandvars(text)).expanduser(), canonical_name(text)
    if path.exists() and not (known and path.is_dir() and not text.startswith((".", "/", "~"))):
        return weight_file(path)
    if known == "tiny":
        return TINY
    if known in RELEASED:
        return download(known)
    if known in CHINESE_CLIPS:
        place = CHINESE_CLIPS[known][1]
        raise WeightsError(f"{known} cannot be fetched from here; " + (
            f"take its .pt file from OFA-Sys/{place} on Hugging Face and give its path" if place
            else "its authors published no weights"))
    if known:
        raise WeightsError(f"there are no released weights of {known}; give a file of your own, or "
                           f"start from random numbers: {known}:none as a tower, --weights none")
    raise WeightsError(f"no file or model {text!r}; expected a path, \"tiny\", or one of "
                       f"{', '.join(RELEASED)}")


def weight_file(path):
    """The weight file that a path means; of a run folder the best weights."""
    if path.is_file():
        return path
    best = read_json(path / "results.json").get("weights")
    for name in (*FOLDER_FILES, *([best] if isinstance(best, str) else [])):
        if (path / name).is_file():
            return path / name
    raise WeightsError(f"the folder {path} has none of {', '.join(FOLDER_FILES)}")


def sha256_of(path):
    digest = hashlib.sha256()
    parts = [path]
    if path.name.endswith(".index.json"):
        parts += [path.parent / name for name in sorted(set(
            read_json(path).get("weight_map", {}).values()))]
    for part in parts:
        with open(part, "rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


class HTTPSOnly(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, response, code, message, headers, url):
        if request.full_url.startswith("https:") and not url.startswith("https:"):
            raise urllib.error.URLError("redirected away from https")
        return super().redirect_request(request, response, code, message, headers, url)


def download(name, folder=None):
    """Fetch a released model into `folder` (~/.cache/clip, as OpenAI's code does) -> its path.

    A file that is there and whole is used as it is. A broken transfer goes on where it stopped;
    the file gets its name only after its sha256 is right. CLIP_MIRROR replaces the address.
    """
    file, digest = RELEASED[name]
    folder = pathlib.Path(os.path.expanduser(folder or "~/.cache/clip"))
    if folder.parts[0] == "~":  # HOME is not set, and the system does not know the user
        raise WeightsError(f"there is no home folder to keep {name} in; set HOME, or pass the path "
                           f"of {file} as --weights")
    target, partial = folder / file, folder / (file + ".partial")
    url = f"{os.environ.get('CLIP_MIRROR', OPENAI_URL).rstrip('/')}/{digest}/{file}"
    if target.is_file() and sha256_of(target) == digest:
        return target
    why = "no attempt was made"
    for _ in range(3):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with only_one(folder / (file + ".lock")):
                if target.is_file() and sha256_of(target) == digest:
                    return target  # another process was faster
                transfer(url, partial)
                found = sha256_of(partial)
                if found == digest:
                    os.replace(partial, target)
                    return target
                partial.unlink()
                why = f"its sha256 is {found}"
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
        response = urllib.request.build_opener(HTTPSOnly).open(request, timeout=30)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is missing; the hash will tell
            return
        raise
    with response, open(partial, "ab" if response.status == 206 else "wb") as file:
        have = have if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        while chunk := response.read(1 << 20):
            file.write(chunk)
            have += len(chunk)
            if sys.stderr.isatty():
                print(f"\r{url.rsplit('/', 1)[1]}: {have >> 20:,} of {(total or 0) >> 20:,} MB",
                      end="", file=sys.stderr, flush=True)
        if total is not None and have != total:
            raise OSError(f"the connection ended at {have:,} of {total:,} bytes")


@contextlib.contextmanager
def only_one(lock):
    """Processes that fetch the same file wait for each other (where the system has fcntl)."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -----------------------------------------------------------------------------
# Saving

def is_chinese_clip(config):
    """Whether a CLIP of this size is built as Chinese-CLIP: CLIP's image tower, a bare BERT."""
    text = config.text
    return bool(text and text.family == "bert" and text.pool == "first" and not config.backbone
                and config.proj == "linear")


def check_layout(config, layout, logit_bias=False):
    """Raise WeightsError unless a CLIP of this size can be written in `layout`."""
    if layout not in LAYOUTS:
        raise WeightsError(f"unknown layout {layout!r}; expected one of {', '.join(LAYOUTS)}")
    text, chinese = config.text, is_chinese_clip(config)
    plain = not config.backbone and config.proj == "linear"
    heads = text and (text.heads * 64, config.vision_head) == (  # a .pt does not tell them
        text.width, HEAD_OF_WIDTH.get(config.vision_width, 64))
    fits = {"safetensors": True,
            "chinese_clip": chinese and heads and config.activation == "quick_gelu",
            "hf": plain and config.vision_patch is not None and (
                not text or chinese or text.family != "distilbert" and text.pool == "pooler"),
            "open_clip": plain and not text,
            "openai": plain and not text and not logit_bias and (
                config.activation, config.vision_head, config.text_head) == ("quick_gelu", 64, 64)}
    if not fits[layout]:
        raise WeightsError(f"the layout {layout} has no place for this model (openai: QuickGELU, "
                           f"heads of 64, no SigLIP bias; open_clip: CLIP's own towers; hf: CLIP's "
                           f"ViT with its own text tower, a BERT or a RoBERTa; chinese_clip: a bare "
                           f"BERT, QuickGELU and heads of 64); choose the layout safetensors")


def card(model, tokenizer=None):
    """All that a file must tell beside the tensors, as plain values: `load` builds the model from
    it. With `tokenizer`, the model's vocabulary is taken from there."""
    return {"clip_config": dataclasses.asdict(model.config),
            "pixels": dataclasses.asdict(model.pixels),
            "vocabulary": tokenizer.facts() if tokenizer else model.vocabulary,
            "origin": {key: model.origin[key] for key in ("name", "path", "sha256", "layout")},
            "tensors": len(model.state_dict())}


def kept_tensors(model):
    """{name: Parameter} that a checkpoint must hold for `load` to build the model again: what
    trains, if the rest can be read from the file that the model came from, else all."""
    whole = bool(model.origin["path"])
    return {name: p for name, p in model.named_parameters() if p.requires_grad or not whole}


def save(model, path, layout="safetensors", dtype=None, token_rows=None):
    """Write `model` where the named library reads it; returns the path written.

    layout: "safetensors" (one file, OpenAI's names, sizes in its metadata), "openai" (a .pt state
    dict that OpenAI's `build_model` takes), "open_clip" (a .pt/.safetensors file, or a folder with
    open_clip_config.json for `local-dir:`), "hf" (a folder for transformers' CLIPModel, or with a
    BERT or RoBERTa for its VisionTextDualEncoderModel, or for its ChineseCLIPModel if the BERT has
    no pooler; ViT only), "chinese_clip" (a .pt that the programs of Chinese-CLIP read and resume
    with --reset-optimizer). Every file also carries `card`, which the libraries ignore.
    dtype: stored precision, fp32 unless given. token_rows: LongTensor of the vocabulary rows to
    keep, for the bundled model ("safetensors" only; `load` fills the others with zeros).
    Written beside its place and renamed, so an older file survives an interruption.
    """
    path, config = pathlib.Path(path), model.config
    check_layout(config, layout, model.logit_bias is not None)
    state = {name: tensor.detach().to("cpu", (dtype or torch.float32) if tensor.is_floating_point()
                                      else None).contiguous()
             for name, tensor in model.state_dict().items()}
    if token_rows is not None:
        if layout != "safetensors" or config.text:
            raise WeightsError(f"token_rows needs the layout safetensors and CLIP's text tower, not "
                               f"{layout!r}")
        state["token_embedding.rows"] = token_rows.to(torch.int32).cpu()
        state["token_embedding.weight"] = state["token_embedding.weight"][token_rows.cpu()]
    if layout == "hf":
        state = to_hugging_face(state)
        if config.text and not is_chinese_clip(config):
            # transformers before 5 reads only this form, and later ones both
            state = {re.sub(r"^vision_model\.", "vision_model.vision_model.", name): tensor
                     for name, tensor in state.items()}
    if layout in ("hf", "open_clip") and path.suffix not in (".pt", ".bin", ".safetensors"):
        path.mkdir(parents=True, exist_ok=True)
        tables = hugging_face_tables(model) if layout == "hf" else open_clip_tables(model)
        for name, table in tables.items():
            write(path / name, json.dumps(table, indent=2).encode())
        path /= "model.safetensors" if layout == "hf" else "open_clip_model.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    known = card(model)
    beside = {key: json.dumps(known[key]) for key in ("clip_config", "pixels", "vocabulary")
              if known[key]}
    if path.suffix == ".safetensors" or layout == "safetensors":  # a pickle would lose the sizes
        write(path, *safetensors_bytes(state, {"format": "pt", **beside}))
        return path
    if layout == "chinese_clip":
        state = {"epoch": 0, "step": 0, "name": CHINESE_CLIPS.get(name_of(config), ("custom",))[0],
                 "state_dict": {f"module.{key}": tensor for key, tensor in state.items()},
                 "card": known}
    else:  # torch's own place for what belongs to a state dict and is no tensor
        state = collections.OrderedDict(state)
        state._metadata = beside
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write(path, buffer.getbuffer())
    return path


def export(model, folder, layout, tokenizer=None):
    """`save` into `folder` under the layout's usual name, with the tokenizer's own files where the
    layout is a folder -> the path written."""
    name = {"openai": "clip.pt", "chinese_clip": "chinese_clip.pt",
            "safetensors": "clip.safetensors"}.get(layout, layout)
    if tokenizer is not None and model.vocabulary is None:
        model.vocabulary = tokenizer.facts()
    path = save(model, pathlib.Path(folder) / name, layout)
    if tokenizer is not None and layout == "hf":
        tokenizer.save(path.parent)
    return path


def write(path, *chunks):
    """Bytes to a file beside its place, then renamed: an interruption leaves the older file."""
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


def hugging_face_tables(model):
    """{file: content} for transformers' CLIPModel, ChineseCLIPModel or VisionTextDualEncoderModel,
    and for their image processors."""
    config, bert, chinese = model.config, model.config.text, is_chinese_clip(model.config)

    def tower(width, layers, head, **more):
        return dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                    num_attention_heads=width // head, hidden_act=config.activation,
                    projection_dim=config.embed_dim, layer_norm_eps=1e-5, **more)
    kind, name = (("chinese_clip", "ChineseCLIPModel") if chinese else
                  ("vision-text-dual-encoder", "VisionTextDualEncoderModel") if bert else
                  ("clip", "CLIPModel"))
    if bert:
        text = dict(model_type="chinese_clip_text_model" if chinese else bert.family,
                    vocab_size=bert.vocab_size, hidden_size=bert.width,
                    num_hidden_layers=bert.layers, num_attention_heads=bert.heads,
                    intermediate_size=bert.intermediate, hidden_act="gelu",
                    max_position_embeddings=bert.positions, type_vocab_size=bert.type_vocab,
                    pad_token_id=bert.pad_id, layer_norm_eps=bert.eps,
                    hidden_dropout_prob=bert.dropout,
                    attention_probs_dropout_prob=bert.attention_dropout)
    else:
        text = tower(config.text_width, config.text_layers, config.text_head,
                     model_type="clip_text_model", vocab_size=config.vocab_size,
                     max_position_embeddings=config.context_length, pad_token_id=0,
                     bos_token_id=config.vocab_size - 2, eos_token_id=config.vocab_size - 1)
    vision = tower(config.vision_width, config.vision_layers, config.vision_head,
                   model_type=f"{'chinese_clip' if chinese else 'clip'}_vision_model",
                   image_size=config.image_size, patch_size=config.vision_patch)
    square = {"height": config.image_size, "width": config.image_size}
    squash = model.image_resize == "squash"
    return {"config.json": {
                "architectures": [name], "model_type": kind, "text_config": text,
                "vision_config": vision, "projection_dim": config.embed_dim,
                "logit_scale_init_value": math.log(1 / 0.07)},
            "preprocessor_config.json": {
                "image_processor_type": ("Chinese" if chinese else "") + "CLIPImageProcessor",
                "do_resize": True, "size": square if squash else {
                    "shortest_edge": config.image_size},
                "resample": 2 if model.image_interpolation == "bilinear" else 3,
                "do_center_crop": not squash, "crop_size": square, "do_rescale": True,
                "rescale_factor": 1 / 255, "do_normalize": True, "do_convert_rgb": True,
                "image_mean": list(model.image_mean), "image_std": list(model.image_std)}}


def open_clip_tables(model):
    """{file: content} as in OpenCLIP's model folders."""
    config, layers = model.config, model.config.vision_layers
    table = {"embed_dim": config.embed_dim, "quick_gelu": config.activation == "quick_gelu",
             "vision_cfg": {
                 "image_size": config.image_size, "width": config.vision_width,
                 "layers": list(layers) if isinstance(layers, tuple) else layers,
                 "patch_size": config.vision_patch, "head_width": config.vision_head},
             "text_cfg": {
                 "context_length": config.context_length, "vocab_size": config.vocab_size,
                 "width": config.text_width, "heads": config.text_width // config.text_head,
                 "layers": config.text_layers}}
    if model.logit_bias is not None:
        table["init_logit_bias"] = model.logit_bias.item()
    return {"open_clip_config.json": {"model_cfg": table, "preprocess_cfg": {
        "size": config.image_size, "mode": "RGB", "mean": list(model.image_mean),
        "std": list(model.image_std), "interpolation": model.image_interpolation,
        "resize_mode": model.image_resize}}}


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


def describe(config):
    """The two towers in one line."""
    if config.backbone:
        image = f"{config.backbone}, {config.vision_width} features"
    elif config.vision_patch is None:
        image = (f"ModifiedResNet of {'-'.join(map(str, config.vision_layers))} blocks, "
                 f"{32 * config.vision_width} features")
    else:
        image = (f"ViT of {config.vision_layers} blocks, width {config.vision_width}, patches of "
                 f"{config.vision_patch} pixels")
    text = f"{config.text.family} of" if config.text else "Transformer of CLIP,"
    return (f"{image}, images of {config.image_size} pixels; {text} {config.text_layers} blocks, "
            f"width {config.text_width}, {config.context_length} of {config.vocab_size:,} tokens")


# -----------------------------------------------------------------------------
# What the scripts ask for

def add_model_flags(parser, towers=False):
    """--model, --weights, --activation and --tokenizer; towers: also those of a CLIP of two."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="a released size such as ViT-B/16 or RN50, or tiny "
                       "(bundled); its name is read from the file that --weights gives")
    group.add_argument("--weights", default="auto", help="auto: OpenAI's for the model; none: "
                       "random; else a file, a model folder or a run's folder")
    group.add_argument("--activation", choices=("quick_gelu", "gelu"),
                       help="where the file does not say it")
    group.add_argument("--tokenizer", help="file or folder of the text tower's vocabulary")
    if towers:
        group.add_argument("--image-tower", help="instead of the model's: a CLIP, or "
                           "[timm:]NAME[:FILE] of torchvision or timm")
        group.add_argument("--text-tower", help="instead of the model's: a folder of the BERT "
                           "family, or a CLIP")
        group.add_argument("--proj", choices=("linear", "mlp"), default="linear",
                           help="heads of chosen towers")
        group.add_argument("--embed-dim", type=int, default=512, help="of chosen towers")


def open_clip(args):
    """The CLIP that the flags of `add_model_flags` ask for, on the CPU. WeightsError."""
    def flag(name):
        return getattr(args, name, None)
    known = canonical_name(args.model) if args.model else None
    weights, activation = args.weights or "auto", flag("activation")
    if args.model and not known and weights in ("auto", "none"):
        raise WeightsError(f"unknown --model {args.model!r}; known: {', '.join(CONFIGS)}. A file "
                           f"goes to --weights")
    seed = args.seed if isinstance(args.seed, int) else 0
    torch.manual_seed(seed)
    if flag("image_tower") or flag("text_tower"):
        other = {"none": f"{known}:none", "auto": known}.get(weights, weights)
        return load(other, args.image_tower, args.text_tower, args.proj, args.embed_dim,
                    activation=activation)
    if weights in ("auto", "none") and not known:
        raise WeightsError("no model; name one with --model, or its file with --weights")
    if weights == "none":
        config = CONFIGS[known]
        model = CLIP(dataclasses.replace(config, activation=activation or config.activation))
        model.origin["name"] = known
        return model.eval()
    model = load(known if weights == "auto" else weights, activation=activation)
    if args.model and model.origin["name"] != known:
        raise WeightsError(f"--weights {weights} is not a {args.model} but {model.origin['name']}: "
                           f"{describe(model.config)}; leave --model out to take what it holds")
    return model
