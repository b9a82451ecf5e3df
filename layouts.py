"""What other libraries call a CLIP's tensors and settings. No file is read or written here.

Inside, names are OpenAI's, with `bert.` for a text tower of the BERT family as in Chinese-CLIP.
A setting that changes the features leaves often no trace in the shapes of the tensors: activation,
heads, pooling, epsilons, causal mask, pixel statistics. `known_from_*` read them from a library's
configuration, and refuse by its name what `clip_model` does not have: never is it passed over.
"""
import contextlib
import dataclasses
import math
import re

import torch

from clip_model import (
    ACTIVATIONS, CLIP, CONFIGS, FAMILIES, HEAD_OF_WIDTH, BertConfig, CLIPConfig, Pixels, bert_fields)

LAYOUTS = ("safetensors", "openai", "open_clip", "hf", "chinese_clip")


class WeightsError(ValueError):
    """A name or file that gives no CLIP; `exit_code` marks it as something the user can fix."""
    exit_code = 2


@contextlib.contextmanager
def about(what):
    """What goes wrong in here with a file's content becomes a WeightsError: "what: why"."""
    try:
        yield
    except KeyError as error:
        raise WeightsError(f"{what}: there is no {error}") from None
    except (ValueError, TypeError, AttributeError, IndexError, ArithmeticError, RuntimeError,
            ImportError) as error:
        raise WeightsError(f"{what}: {one_line(error)}") from None


def one_line(error):
    """The telling line of an exception."""
    text = re.sub(r"\s+", " ", str(error))
    wish = re.search(r"(Unsupported (global|class|operand)[^.]*\.\S*|GLOBAL \S+)", text)
    text = text if isinstance(error, WeightsError) else (wish.group(0) if wish else text)[:160]
    return text or type(error).__name__


# -----------------------------------------------------------------------------
# Names

HF_NAMES = [  # (OpenAI's, Hugging Face's); whole names first, then beginnings, then fragments
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
TURNED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def rename(name, table, source, target):
    for pair in table:
        old, new = pair[source], pair[target]
        if name == old:
            return new
        if old.startswith("."):
            name = name.replace(old, new)
        elif old.endswith(".") and name.startswith(old):
            name = new + name[len(old):]
    return name


def to_hugging_face(state):
    """OpenAI's names -> Hugging Face's: q, k, v apart, the two projections transposed."""
    out = {}
    for name, tensor in state.items():
        theirs = rename(name, HF_NAMES, 0, 1)
        if ".attn.in_proj_" in theirs:
            stem, kind = theirs.split(".attn.in_proj_")
            for letter, part in zip("qkv", tensor.chunk(3)):
                out[f"{stem}.self_attn.{letter}_proj.{kind}"] = part.contiguous()
        else:
            out[theirs] = tensor.t().contiguous() if name in TURNED else tensor
    return out


def from_hugging_face(state):
    """Hugging Face's names -> OpenAI's; KeyError when one of q, k, v is missing."""
    out = {}
    for name, tensor in state.items():
        ours = rename(name, HF_NAMES, 1, 0)
        if ".self_attn.q_proj." in name:
            parts = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            out[ours.replace(".self_attn.q_proj.", ".attn.in_proj_")] = torch.cat(parts)
        elif not re.search(r"\.self_attn\.[kv]_proj\.|position_ids$", name):
            out[ours] = tensor.t() if name in TURNED.values() else tensor
    return out


def from_bert(state):
    """A text tower of the BERT family under BERT's own names after `bert.`, beside what belongs to
    a CLIP. Heads for other tasks are left out."""
    table = "embeddings.word_embeddings.weight"
    stem = next(name for name in state if name.endswith(table)).removesuffix(table)
    out = {}
    for name, tensor in state.items():
        part = name.removeprefix(stem)
        if name.startswith(("visual.", "text_projection", "logit_")):
            out[name] = tensor
        elif name.startswith(stem) and part.startswith(
                ("embeddings.", "encoder.", "transformer.", "pooler.")) and not part.endswith(
                ("position_ids", "token_type_ids")):
            if part.startswith("transformer."):
                part = rename(part, DISTILBERT_NAMES, 1, 0)
            part = re.sub(r"gamma$", "weight", re.sub(r"beta$", "bias", part))  # TensorFlow's
            out["bert." + part] = tensor
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


def openai_names(state):
    """The names of any layout -> (state under OpenAI's, layout)."""
    def any_begins(*beginnings):
        return any(name.startswith(beginnings) for name in state)
    layout = "openai"  # OpenCLIP's CLIP keeps the same names
    buffers = ("input_resolution", "context_length", "vocab_size", "attn_mask")
    state = {name: t for name, t in state.items() if name.rpartition(".")[2] not in buffers}
    if any_begins("vision_model.", "text_model."):
        layout = "hf"  # transformers before 5 wrapped a dual encoder's image tower once more
        state = from_hugging_face({re.sub(r"^(vision_model\.){2}", r"\1", name): tensor
                                   for name, tensor in state.items()})
    elif "text.token_embedding.weight" in state:
        layout = "open_clip"  # its CustomTextCLIP
        state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    elif any_begins("visual.") and any_begins("bert.encoder."):
        layout, state = "chinese_clip", unfuse(state)
    if any(name.endswith("embeddings.word_embeddings.weight") for name in state):
        layout, state = layout if any_begins("visual.") else "hf", from_bert(state)
    return state, layout


# -----------------------------------------------------------------------------
# Settings: fields of CLIPConfig, with "text" a dict of fields of BertConfig, and "pixels"

def allow(table, **allowed):
    """Refuse by its name a setting of another library that is not among those allowed."""
    for key, values in allowed.items():
        if key in table and table[key] not in values:
            raise WeightsError(f"{key} {table[key]!r} is not supported here; expected "
                               f"{' or '.join(map(repr, values))}")


def known_from_hugging_face(read):
    """What a model folder says; read(name) gives a JSON file's table, {} where there is none."""
    config = read("config.json")
    kind = config.get("model_type")
    if kind is None:
        return {}
    if kind in FAMILIES:
        return {"text": bert_settings(config) | pooling_settings(read)}
    allow(config, model_type=("clip", "chinese_clip", "vision-text-dual-encoder",
                              "clip_vision_model", "clip_text_model", *FAMILIES))
    known = {"pixels": pixels_from_hugging_face(read("preprocessor_config.json"))}
    image = config if kind == "clip_vision_model" else config.get("vision_config") or {}
    text = config if kind == "clip_text_model" else config.get("text_config") or {}
    if kind != "clip_text_model":
        allow(image, model_type=("clip", "clip_vision_model", "chinese_clip_vision_model"),
              hidden_act=tuple(ACTIVATIONS), layer_norm_eps=(1e-5,))
        known |= {"activation": image.get("hidden_act", "quick_gelu"), "vision_head": image.get(
            "hidden_size", 768) // image.get("num_attention_heads", 12)}
    if kind == "chinese_clip":
        known["text"] = bert_settings(text | {"model_type": "bert"}) | {"pool": "first"}
    elif text.get("model_type") in FAMILIES:
        known["text"] = bert_settings(text)
    elif kind != "clip_vision_model":
        allow(text, model_type=("clip", "clip_text_model"), layer_norm_eps=(1e-5,),
              eos_token_id=(2, text.get("vocab_size", 49_408) - 1))  # 2 is their word for the last
        allow({"hidden_act": "quick_gelu", **text}, hidden_act=(
            (known["activation"],) if known.get("activation") else tuple(ACTIVATIONS)))
        known |= {"activation": text.get("hidden_act", "quick_gelu"), "text_head": text.get(
            "hidden_size", 512) // text.get("num_attention_heads", 8)}
    return known


def bert_settings(config):
    """What a Hugging Face config of the BERT family says that shapes do not."""
    def get(default, *names):  # DistilBERT has names of its own
        return next((config[name] for name in names if name in config), default)
    allow(config, model_type=tuple(FAMILIES), hidden_act=("gelu",), activation=("gelu",),
          is_decoder=(False,), position_embedding_type=("absolute",))
    family = config["model_type"]
    return {"family": family, "heads": get(12, "num_attention_heads", "n_heads"),
            "pad_id": get(int(family == "roberta"), "pad_token_id"),
            "eps": get(1e-12, "layer_norm_eps"),
            "dropout": get(0.1, "hidden_dropout_prob", "dropout"),
            "attention_dropout": get(0.1, "attention_probs_dropout_prob", "attention_dropout")}


def pooling_settings(read):
    """How sentence-transformers makes one vector of a text; {} where it does not say."""
    config = read("1_Pooling/config.json")
    modes = {key.removeprefix("pooling_mode_") for key, on in config.items()
             if key.startswith("pooling_mode_") and on is True} or {config.get("pooling_mode")}
    names = {"mean_tokens": "mean", "mean": "mean", "cls_token": "first", "cls": "first"}
    if modes == {None}:
        return {}
    if len(modes) > 1 or not modes <= names.keys() or read("2_Dense/config.json"):
        raise WeightsError(f"the pooling of sentence-transformers in this folder "
                           f"({' + '.join(sorted(modes))}, or a Dense layer after it) is not "
                           f"supported here; expected mean_tokens or cls_token alone")
    return {"pool": names[modes.pop()]}


def pixels_from_hugging_face(config):
    """Pixels of a preprocessor_config.json, None of an empty one."""
    if not config:
        return None
    allow(config, do_resize=(True,), do_rescale=(True,), do_normalize=(True,),
          rescale_factor=(1 / 255,), resample=(2, 3))
    size = config.get("size", 224)
    squash = isinstance(size, dict) and "height" in size
    crop = size if squash and not config.get("do_center_crop") else config.get("crop_size", size)
    sides = {side for value in (size, crop) for side in (
        value.values() if isinstance(value, dict) else [value])}
    if len(sides) > 1 or not squash and config.get("do_center_crop") is False:
        raise WeightsError(f"images of size {size} and crop_size {crop} are not supported here; "
                           f"expected the same pixels for both, and do_center_crop")
    return make_pixels(config.get("image_mean"), config.get("image_std"), "squash" if squash
                       else "shortest", "bilinear" if config.get("resample") == 2 else "bicubic")


def make_pixels(mean, std, resize, interpolation):
    """Checked Pixels; None takes CLIP's."""
    own = Pixels()
    mean, std = tuple(mean or own.mean), tuple(std or own.std)
    resize, interpolation = resize or own.resize, interpolation or own.interpolation
    allow({"resize_mode": resize, "interpolation": interpolation},
          resize_mode=("shortest", "squash"), interpolation=("bicubic", "bilinear"))
    if not (len(mean) == len(std) == 3 and all(map(math.isfinite, mean + std)) and min(std) > 0):
        raise WeightsError(f"pixel mean {mean} and std {std} are not three numbers each")
    return Pixels(mean, std, resize, interpolation)


TOLD_BY_SHAPES = ("embed_dim vision_cfg text_cfg quick_gelu custom_text init_logit_scale "
                  "init_logit_bias output_dict cast_dtype layers width head_width heads patch_size "
                  "image_size mlp_ratio patch_dropout output_tokens context_length vocab_size "
                  "pad_id eos_id attn_pooler_queries attn_pooler_heads timm_pool timm_proj "
                  "timm_drop timm_drop_path hf_model_pretrained hf_proj_type hf_pooler_type").split()
OPEN_CLIP_ONLY = {"pos_embed_type": "learnable", "proj_type": "linear"}  # the one value there is


def known_from_open_clip(read):
    """What an OpenCLIP folder says: every setting that is not listed must be off."""
    config = read("open_clip_config.json")
    model = config.get("model_cfg")
    if model is None:
        return {}
    image, text = model["vision_cfg"], model["text_cfg"]
    for part, pool in ((model, None), (image, "tok"), (text, "argmax")):
        only = OPEN_CLIP_ONLY | {"pool_type": pool}
        for key, value in part.items():
            if key not in TOLD_BY_SHAPES and value and value != only.get(key):
                raise WeightsError(f"{key} {value!r} is not supported here; expected "
                                   f"{only.get(key)!r}")
    pixels = config.get("preprocess_cfg") or {}
    allow(pixels, mode=("RGB",))
    return {"activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
            "vision_head": image.get("head_width", 64),
            "text_head": text.get("width", 512) // text.get("heads", 8),
            "pixels": make_pixels(pixels.get("mean"), pixels.get("std"),
                                  pixels.get("resize_mode"), pixels.get("interpolation"))}


def known_from_card(card):
    """What `weights.card` wrote. Its sizes are not believed: those of the tensors are taken."""
    pixels = card.get("pixels")
    return {**card["clip_config"], "pixels": pixels and make_pixels(
        pixels["mean"], pixels["std"], pixels["resize"], pixels["interpolation"])}


# -----------------------------------------------------------------------------
# Sizes from shapes

def count(state, pattern):
    """How many different numbers `pattern`'s group takes in the names of `state`."""
    return len({match.group(1) for match in map(re.compile(pattern).match, state) if match})


def image_fields(sd, known):
    """The CLIPConfig fields of the image tower in these tensors (OpenAI's names)."""
    if any(name.startswith("visual.trunk.") for name in sd):
        if not (known.get("backbone") and known.get("image_size")):
            raise WeightsError("its image tower is the trunk of a classifier, and of which one and "
                               "for what image size is not written")
        head = sd.get("visual.proj.projection.weight")
        return {"backbone": known["backbone"], "image_size": known["image_size"],
                "vision_layers": 0, "vision_patch": None,
                "vision_width": sd["visual.proj"].shape[0] if head is None else head.shape[1]}
    if "visual.class_embedding" in sd:
        width, _, _, patch = sd["visual.conv1.weight"].shape
        size = patch * math.isqrt(sd["visual.positional_embedding"].shape[0] - 1)
        layers = count(sd, r"visual\.transformer\.resblocks\.(\d+)\.")
    else:
        width, patch = sd["visual.layer1.0.conv1.weight"].shape[0], None
        size = 32 * math.isqrt(sd["visual.attnpool.positional_embedding"].shape[0] - 1)
        layers = tuple(count(sd, rf"visual\.layer{i}\.(\d+)\.") for i in (1, 2, 3, 4))
    return {"image_size": size, "vision_layers": layers, "vision_width": width,
            "vision_patch": patch,
            "vision_head": known.get("vision_head", HEAD_OF_WIDTH.get(width, 64))}


def text_fields(sd, known):
    """The CLIPConfig fields of the text tower in these tensors (OpenAI's names)."""
    bert = {name[5:]: tensor for name, tensor in sd.items() if name.startswith("bert.")}
    if bert:
        return bert_fields(bert_config(bert, **known.get("text") or {}))
    return {"text_width": sd["ln_final.weight"].shape[0],
            "text_layers": count(sd, r"transformer\.resblocks\.(\d+)\."),
            "context_length": sd["positional_embedding"].shape[0],
            "vocab_size": sd["token_embedding.weight"].shape[0],
            "text_head": known.get("text_head", 64)}


def bert_config(sd, **known):
    """The BertConfig of a tower under BERT's names. Without `known`, the published models are told
    apart by their segments."""
    segments = sd.get("embeddings.token_type_embeddings.weight")
    segments = 0 if segments is None else segments.shape[0]
    family = known.get("family", {0: "distilbert", 1: "roberta"}.get(segments, "bert"))
    vocab, width = sd["embeddings.word_embeddings.weight"].shape
    return BertConfig(**{
        "family": family, "heads": width // 64, "pad_id": int(family == "roberta"),
        "eps": 1e-5 if family == "roberta" else 1e-12,
        "pool": "pooler" if "pooler.dense.weight" in sd else "first"} | known | {
        "vocab_size": vocab, "width": width, "type_vocab": segments,
        "layers": count(sd, r"encoder\.layer\.(\d+)\."),
        "intermediate": sd["encoder.layer.0.intermediate.dense.weight"].shape[0],
        "positions": sd["embeddings.position_embeddings.weight"].shape[0]})


def config_from_state_dict(sd, **known):
    """The CLIPConfig that these tensors' shapes belong to (OpenAI's names; meta tensors will do).

    What leaves no trace in shapes is taken as OpenAI's, or as the published BERTs have it, unless
    it is among `known`: fields of CLIPConfig, `text` a dict of fields of BertConfig. WeightsError
    names the first tensor that is missing, unknown or of another shape.
    """
    mlp = "text_projection.layer_norm.weight" in sd
    head = "text_projection.layer_norm.weight" if mlp else "text_projection"
    for name in (head, "logit_scale"):
        if name not in sd:
            raise WeightsError(f"not a CLIP: there is no {name!r} (the first of {len(sd)} tensors "
                               f"is {next(iter(sd), None)!r})")
    with about("not a CLIP"):
        config = CLIPConfig(
            embed_dim=sd[head].shape[-1], proj="mlp" if mlp else "linear",
            activation=known.get("activation", "quick_gelu"),
            **image_fields(sd, known), **text_fields(sd, known))
    check_state(config, sd)
    return config


def check_state(config, state):
    """Raise WeightsError unless `state` has exactly the tensors of a CLIP of this size."""
    with about("these sizes make no CLIP"), torch.device("meta"):
        expected = CLIP(config).state_dict()
    expected["logit_bias"] = expected["logit_scale"]
    for name, tensor in expected.items():
        if name not in state:
            if name.endswith(".num_batches_tracked") or name == "logit_bias":
                continue  # older BatchNorms did not count; only SigLIP's loss has a bias
            raise WeightsError(f"the weights lack {name!r} {tuple(tensor.shape)}")
        if state[name].shape != tensor.shape:
            raise WeightsError(f"{name!r} is {tuple(state[name].shape)} in the weights and "
                               f"{tuple(tensor.shape)} in a CLIP of this size")
        if tensor.is_floating_point() and not state[name].is_floating_point():
            raise WeightsError(f"{name!r} is {state[name].dtype}; expected floating point")
    extra = next((name for name in state if name not in expected), None)
    if extra is not None:
        raise WeightsError(f"the weights have {extra!r}, which is no part of a CLIP of this size")


def name_of(config):
    """The name of a CLIP of this size, whatever its activation; "custom" for one without."""
    return next((name for name, known in CONFIGS.items() if known == dataclasses.replace(
        config, activation=known.activation)), "custom")


def describe(config):
    """The two towers in one line."""
    kind = config.backbone or (
        f"ModifiedResNet of {'-'.join(map(str, config.vision_layers))} blocks"
        if config.vision_patch is None else
        f"ViT of {config.vision_layers} blocks, patches of {config.vision_patch} pixels")
    text = config.text.family if config.text else "transformer"
    return (f"{kind}, width {config.vision_width}, for images of {config.image_size} pixels; "
            f"{text} of {config.text_layers} blocks, width {config.text_width}, for "
            f"{config.context_length} tokens out of {config.vocab_size:,}")


# -----------------------------------------------------------------------------
# Writing for others

def is_chinese_clip(config):
    """Whether a CLIP of this size is built as Chinese-CLIP: CLIP's image tower, a bare BERT."""
    text = config.text
    return bool(text and text.family == "bert" and text.pool == "first" and not config.backbone
                and config.proj == "linear")


def check_layout(config, layout, logit_bias=False):
    """Raise WeightsError unless a CLIP of this size can be written in `layout`. logit_bias: whether
    it has SigLIP's."""
    text, chinese = config.text, is_chinese_clip(config)
    plain = not config.backbone and config.proj == "linear"
    quick = config.activation == "quick_gelu"
    heads = (config.vision_head, text.width // text.heads if text else config.text_head)
    if layout not in LAYOUTS:
        raise WeightsError(f"unknown layout {layout!r}; expected one of {', '.join(LAYOUTS)}")
    fits, room = {
        "safetensors": (True, ""),
        "openai": (plain and not text and quick and heads == (64, 64) and not logit_bias,
                   "CLIP's own towers with heads of 64, QuickGELU and no SigLIP bias"),
        "open_clip": (plain and not text, "CLIP's own towers"),
        "hf": (plain and config.vision_patch is not None and (not text or chinese or (
            text.family != "distilbert" and text.pool == "pooler")),
            "CLIP's ViT with its own text tower, a bare BERT, or a BERT or RoBERTa with pooler"),
        "chinese_clip": (chinese and quick and heads == (
            HEAD_OF_WIDTH.get(config.vision_width, 64), 64),
            "CLIP's image towers and a bare BERT with heads of 64 and QuickGELU"),
    }[layout]
    if not fits:
        raise WeightsError(f"the layout {layout} has a place only for {room}, which this model "
                           f"does not have; choose the layout safetensors")


def hugging_face_tables(model):
    """{file: content} for transformers' CLIPModel, ChineseCLIPModel or VisionTextDualEncoderModel,
    and for their image processors."""
    config, bert, chinese = model.config, model.config.text, is_chinese_clip(model.config)

    def tower(width, layers, head):
        return {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
                "num_attention_heads": width // head, "hidden_act": config.activation,
                "projection_dim": config.embed_dim, "layer_norm_eps": 1e-5}
    kind, name = (("chinese_clip", "ChineseCLIPModel") if chinese else
                  ("vision-text-dual-encoder", "VisionTextDualEncoderModel") if bert else
                  ("clip", "CLIPModel"))
    vision = tower(config.vision_width, config.vision_layers, config.vision_head) | {
        "model_type": f"{'chinese_clip' if chinese else 'clip'}_vision_model",
        "image_size": config.image_size, "patch_size": config.vision_patch}
    if bert:
        text = {"model_type": "chinese_clip_text_model" if chinese else bert.family,
                "vocab_size": bert.vocab_size, "hidden_size": bert.width, "hidden_act": "gelu",
                "num_hidden_layers": bert.layers, "num_attention_heads": bert.heads,
                "intermediate_size": bert.intermediate, "type_vocab_size": bert.type_vocab,
                "max_position_embeddings": bert.positions, "pad_token_id": bert.pad_id,
                "layer_norm_eps": bert.eps, "hidden_dropout_prob": bert.dropout,
                "attention_probs_dropout_prob": bert.attention_dropout}
    else:
        text = tower(config.text_width, config.text_layers, config.text_head) | {
            "model_type": "clip_text_model", "vocab_size": config.vocab_size, "pad_token_id": 0,
            "max_position_embeddings": config.context_length,
            "bos_token_id": config.vocab_size - 2, "eos_token_id": config.vocab_size - 1}
    square = {"height": config.image_size, "width": config.image_size}
    squash = model.image_resize == "squash"
    return {"config.json": {
                "architectures": [name], "model_type": kind, "text_config": text,
                "vision_config": vision, "projection_dim": config.embed_dim,
                "logit_scale_init_value": math.log(1 / 0.07)},
            "preprocessor_config.json": {
                "image_processor_type": f"{'Chinese' if chinese else ''}CLIPImageProcessor",
                "do_resize": True, "do_center_crop": not squash, "crop_size": square,
                "size": square if squash else {"shortest_edge": config.image_size},
                "resample": 2 if model.image_interpolation == "bilinear" else 3,
                "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
                "do_convert_rgb": True, "image_mean": list(model.image_mean),
                "image_std": list(model.image_std)}}


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
