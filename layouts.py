"""What other libraries call a CLIP's tensors and settings. No file is read or written here.

Inside, names are OpenAI's, with `bert.` for a text tower of the BERT family as in Chinese-CLIP.
Settings that change the features leave no trace in the tensors' shapes: activation, heads, pooling,
epsilons, masks, pixel statistics. `known_from_*` read them from a library's configuration, and
refuse by its name what `clip_model` does not have.
"""
import collections
import contextlib
import dataclasses
import math
import os
import re
from unittest import mock

import torch
from torch import nn

from clip_model import (ACTIVATIONS, CLIP, CONFIGS, FAMILIES, HEAD_OF_WIDTH, BertConfig, CLIPConfig,
                        Pixels, bert_fields)
from files import one_line

LAYOUTS = {  # and the usual name of the file or folder
    "safetensors": "clip.safetensors", "openai": "clip.pt", "open_clip": "open_clip", "hf": "hf",
    "chinese_clip": "chinese_clip.pt"}


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
            ImportError, OSError) as error:
        raise WeightsError(f"{what}: {reason(error)}") from None


def reason(error):
    """The telling line of an exception; of torch's, what a pickle asked for."""
    text = one_line(error)
    wish = re.search(r"Unsupported (global|class|operand)[^.]*\.\S*|GLOBAL \S+", text)
    return text if isinstance(error, WeightsError) else (wish[0] if wish else text)[:300]


def allow(table, harmless=None, **allowed):
    """Refuse by its name a setting of another library that is not among those allowed. harmless:
    the names whose value does not matter; where they are given, every other must be off."""
    for key, value in table.items():
        if key in allowed:
            if value not in allowed[key]:
                raise WeightsError(f"{key} {value!r} is not supported; expected "
                                   f"{' or '.join(map(repr, allowed[key]))}")
        elif harmless is not None and key not in harmless and value:
            raise WeightsError(f"{key} {value!r} is not supported")


# -----------------------------------------------------------------------------
# Names

WRAPPERS = ("state_dict", "model", "model_state_dict", "module", "net", "weights", "ema",
            "model_ema", "state_dict_ema")
# Tensors of a scripted CLIP that hold no weights; the mask is not finite
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def wrapped_in(content):
    """The keys of a training checkpoint whose values can hold the weights, the likely first."""
    return [key for key in WRAPPERS if isinstance(content, dict)
            and isinstance(content.get(key), dict) and content[key]]


def state_in(content):
    """The named tensors in what a file holds, of a training checkpoint its state dict's, without
    the prefixes of DDP (`module.`), torch.compile (`_orig_mod.`) and Lightning (`model.`)."""
    for _ in range(8):  # not for ever: a hostile file can hold itself
        content = next((content[key] for key in wrapped_in(content)), content)
    items = content.items() if isinstance(content, dict) else ()
    state = {name: value for name, value in items
             if isinstance(name, str) and isinstance(value, torch.Tensor)
             and name.rpartition(".")[2] not in NO_WEIGHTS}
    if not state:
        raise WeightsError("no tensors under names; expected a state dict")
    for name, tensor in state.items():  # a stride of 0 makes terabytes of four bytes
        if (tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized
                or tensor.nbytes > tensor.untyped_storage().nbytes()
                or tensor.is_floating_point() and not torch.isfinite(tensor).all()):
            raise WeightsError(f"{name!r} is not a plain tensor of finite numbers")
    shared = os.path.commonprefix([*state])
    wrappers = re.match(r"((module|_orig_mod|model|clip)\.)*", shared)[0]
    return {name.removeprefix(wrappers): value for name, value in state.items()}


HF_NAMES = [  # (OpenAI's, Hugging Face's); beginnings first, then fragments
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
NAMES_OF_HF = [(theirs, ours) for ours, theirs in HF_NAMES]
NAMES_OF_DISTILBERT = [  # (DistilBERT's, BERT's)
    ("transformer.layer.", "encoder.layer."), (".attention.v_lin.", ".attention.self.value."),
    (".attention.q_lin.", ".attention.self.query."), (".attention.k_lin.", ".attention.self.key."),
    (".attention.out_lin.", ".attention.output.dense."),
    (".sa_layer_norm.", ".attention.output.LayerNorm."), (".ffn.lin1.", ".intermediate.dense."),
    (".ffn.lin2.", ".output.dense."), (".output_layer_norm.", ".output.LayerNorm."),
]
TURNED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def rename(name, table):
    for old, new in table:
        if old.startswith("."):
            name = name.replace(old, new)
        elif name.startswith(old):
            name = new + name[len(old):]
    return name


def to_hugging_face(state):
    """OpenAI's names -> Hugging Face's: q, k, v apart, the two projections transposed."""
    out = {}
    for name, tensor in state.items():
        theirs = rename(name, HF_NAMES)
        stem, fused, kind = theirs.partition(".attn.in_proj_")
        if fused:
            for letter, part in zip("qkv", tensor.chunk(3)):
                out[f"{stem}.self_attn.{letter}_proj.{kind}"] = part.contiguous()
        else:
            out[theirs] = tensor.t().contiguous() if name in TURNED else tensor
    return out


def from_hugging_face(state):
    """Hugging Face's names -> OpenAI's; KeyError when one of q, k, v is missing."""
    out = {}
    for name, tensor in state.items():
        ours = rename(name, NAMES_OF_HF)
        if ".self_attn.q_proj." in name:
            parts = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            out[ours.replace(".self_attn.q_proj.", ".attn.in_proj_")] = torch.cat(parts)
        elif not re.search(r"\.self_attn\.[kv]_proj\.|position_ids$", name):
            out[ours] = tensor.t() if name in TURNED.values() else tensor
    return out


def from_bert(state):
    """A BERT under its own names after `bert.`, and what belongs to a CLIP; no heads of others."""
    table, out = "embeddings.word_embeddings.weight", {}
    stem = next(name for name in state if name.endswith(table)).removesuffix(table)
    for name, tensor in state.items():
        part = name.removeprefix(stem)
        if name.startswith(("visual.", "text_projection", "logit_")):
            out[name] = tensor
        elif name.startswith(stem) and re.match(r"(embeddings|encoder|transformer|pooler)\.(?!"
                                                r".*(position|type)_ids$)", part):
            part = rename(part, NAMES_OF_DISTILBERT)
            part = re.sub(r"gamma$", "weight", re.sub(r"beta$", "bias", part))  # TensorFlow's
            out["bert." + part] = tensor
    return out


def openai_names(state):
    """The names of any layout -> (state under OpenAI's, layout)."""
    def any_begins(*beginnings):
        return any(name.startswith(beginnings) for name in state)
    layout = "openai"  # OpenCLIP's CLIP keeps the same names
    side = ("vision_model." if "embeddings.class_embedding" in state else  # a tower alone, of
            "text_model." if "embeddings.token_embedding.weight" in state else "")  # transformers 5
    state = {side + name: tensor for name, tensor in state.items()}
    if any_begins("vision_model.", "text_model."):
        if any_begins("vision_model.head."):
            raise WeightsError("a SigLIP, whose towers are not built as CLIP's")
        layout = "hf"  # transformers before 5 wrapped a dual encoder's image tower once more
        state = from_hugging_face({re.sub(r"^(vision_model\.){2}", r"\1", name): tensor
                                   for name, tensor in state.items()})
    elif "text.token_embedding.weight" in state:  # OpenCLIP's CustomTextCLIP
        state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    elif any_begins("text.transformer.embeddings."):
        raise WeightsError("an OpenCLIP model with a Hugging Face text tower, whose pooling no "
                           "tensor tells")
    elif any_begins("bert.encoder.") and any_begins("visual."):
        layout = "chinese_clip"
    if any(name.endswith("embeddings.word_embeddings.weight") for name in state):
        layout = layout if any_begins("visual.") else "hf"
        state = from_bert(state)
    return state, layout


# -----------------------------------------------------------------------------
# Settings: fields of CLIPConfig, with "text" a dict of fields of BertConfig, and "pixels".
# read(name) gives the table in a JSON file beside the weights, read(name, list) a list; or empty.

BERT_SETTINGS = {  # field of BertConfig: Hugging Face's name
    "vocab_size": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers",
    "heads": "num_attention_heads", "intermediate": "intermediate_size",
    "positions": "max_position_embeddings", "type_vocab": "type_vocab_size",
    "pad_id": "pad_token_id", "eps": "layer_norm_eps", "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob"}
DISTILBERT_SETTINGS = {
    "n_heads": "num_attention_heads", "n_layers": "num_hidden_layers",
    "dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob"}
HARMLESS = {*BERT_SETTINGS.values(), *DISTILBERT_SETTINGS, *(  # read, or told by shapes, or idle
    "_attn_implementation_autoset _name_or_path _valid_processor_keys architectures "
    "attn_pooler_heads attn_pooler_queries bos_token_id cast_dtype classifier_dropout cls_token_id "
    "context_length crop_size custom_text data_format dim directionality do_convert_rgb dtype "
    "embed_dim eos_id eos_token_id finetuning_task gradient_checkpointing head_width heads "
    "hf_model_pretrained hf_pooler_type hf_proj_type hidden_act hidden_dim id2label image_mean "
    "image_size image_std init_logit_bias init_logit_scale initializer_factor initializer_range "
    "label2id label_descriptions label_names layers length_penalty logit_scale_init_value "
    "mask_token_id max_length model_args model_type num_beam_groups num_beams "
    "num_channels num_classes num_features num_return_sequences output_dict output_past "
    "output_tokens pad_id patch_dropout patch_size pooler_fc_size pooler_num_attention_heads "
    "pooler_num_fc_layers pooler_size_per_head pooler_type pretrained_cfg problem_type "
    "processor_class projection_dim qa_dropout quick_gelu repetition_penalty return_dict "
    "sep_token_id seq_classif_dropout sinusoidal_pos_embds size temperature text_cfg text_config "
    "text_config_dict tie_weights_ tie_word_embeddings timm_drop timm_drop_path timm_pool "
    "timm_proj tokenizer_class top_k top_p torch_dtype transformers_version typical_p unk_token_id "
    "use_cache vision_cfg vision_config vision_config_dict width").split()}
ONE_TOWER = {"clip_vision_model": "vision", "clip_text_model": "text"}
CHINESE_CLIP = {"text": {"pool": "first"},  # what none of its own files says
                "pixels": Pixels(resize="squash")}
PROCESSORS = (  # of images; others have other defaults, and other meanings for the same words
    "CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPFeatureExtractor",
    "ChineseCLIPImageProcessor", "ChineseCLIPImageProcessorFast", "ChineseCLIPFeatureExtractor")


def known_from_hugging_face(read):
    """Of a folder that transformers or sentence-transformers wrote."""
    config = read("config.json")
    kind = config.get("model_type")
    if kind in FAMILIES:
        return {"text": bert_settings(config) | pooling_settings(read, kind)}
    known = {"pixels": pixels_from_hugging_face(
        read("processor_config.json").get("image_processor")  # since transformers 5, and first
        or read("preprocessor_config.json"))}
    if kind is None and not {"vision_config", "text_config", "hidden_size"} & config.keys():
        return known if known["pixels"] else {}  # there is none, or another program's
    allow({"model_type": kind} | config, HARMLESS, model_type=(  # the type first: it tells most
        "clip", "chinese_clip", "vision-text-dual-encoder", *ONE_TOWER, *FAMILIES))
    if kind in ONE_TOWER:
        return known | clip_settings(ONE_TOWER[kind], config)
    vision, text = (config.get(f"{side}_config_dict") or config.get(f"{side}_config") or {}
                    for side in ("vision", "text"))  # as there: the old second table counts, whole
    known |= clip_settings("vision", vision)
    if kind == "chinese_clip":
        known["text"] = bert_settings(text | {"model_type": "bert"}) | CHINESE_CLIP["text"]
        known["pixels"] = known["pixels"] or CHINESE_CLIP["pixels"]
    elif text.get("model_type") in FAMILIES:
        known["text"] = bert_settings(text)
    else:
        known |= clip_settings("text", text, (known["activation"],))  # one for both towers here
    return known


def last_token(vocab_size):
    """The id of CLIP's end of text. Tokens that somebody added come after it."""
    return min(vocab_size, 49_408) - 1


def clip_settings(side, config, activations=tuple(ACTIVATIONS)):
    width, heads = (768, 12) if side == "vision" else (512, 8)
    config = {"model_type": "clip", "hidden_act": "quick_gelu", "hidden_size": width,
              "num_attention_heads": heads} | config
    ends = {} if side == "vision" else {  # 2: an old word for the last
        "eos_token_id": (2, last_token(config.get("vocab_size", 49_408)))}
    allow(config, HARMLESS, hidden_act=activations, layer_norm_eps=(1e-5,), **ends,
          model_type=("clip", f"clip_{side}_model", f"chinese_clip_{side}_model"))
    size = {"image_size": config.get("image_size", 224)} if side == "vision" else {}
    return {"activation": config["hidden_act"], f"{side}_layers": config.get("num_hidden_layers"),
            f"{side}_width": config["hidden_size"],
            f"{side}_head": config["hidden_size"] // config["num_attention_heads"], **size}


def bert_settings(config):
    allow(config, HARMLESS, model_type=tuple(FAMILIES), hidden_act=("gelu",),
          activation=("gelu",), position_embedding_type=("absolute",))
    family = config["model_type"]
    given = {DISTILBERT_SETTINGS.get(key, key): value for key, value in config.items()}
    silent = (BertConfig(family, 0, layers=6, pool="first") if family == "distilbert" else
              BertConfig(family, 0, pad_id=int(family == "roberta"), pool="pooler"))
    return dataclasses.asdict(silent) | {
        ours: given[theirs] for ours, theirs in BERT_SETTINGS.items() if theirs in given}


def pooling_settings(read, family):
    """How sentence-transformers makes one vector of a text; {} where it does not say."""
    home = "" if read("modules.json", list) else "../"  # in older folders each has one of its own
    modules = {re.sub("^(BERT|RoBERTa|DistilBERT)$", "Transformer",  # before version 1
                      module["type"].rpartition(".")[2]): module["path"]
               for module in read(home + "modules.json", list)}
    if home and not modules.get("Transformer"):  # another model's
        home, modules = "", {"Dense": "2_Dense"} if read("2_Dense/config.json") else {}
    allow(modules, ("Transformer", "Pooling", "Normalize", "Dropout"))
    config = read(f"{home}{modules.get('Pooling', '1_Pooling')}/config.json")
    modes = [key.removeprefix("pooling_mode_") for key, on in config.items()
             if on is True and key.startswith("pooling_mode_")]
    modes += [str(config["pooling_mode"])] if "pooling_mode" in config else []
    known = {"mean_tokens": "mean", "mean": "mean", "cls_token": "first", "cls": "first"}
    lowers = read("tokenizer_config.json").get("do_lower_case", family != "roberta")
    for file in (f"sentence_{name}_config.json" for name in FAMILIES):
        if read(file).get("do_lower_case") and not lowers:
            raise WeightsError(f"{file} lowers all letters, and the tokenizer does not")
    allow(read(f"{home}config_sentence_transformers.json"), default_prompt_name=(None,))
    if modes or "Pooling" in modules:
        allow({"pooling": " + ".join(modes)}, pooling=tuple(known))
    return {"pool": known[modes[0]]} if modes else {}


def pixels_from_hugging_face(config):
    """Pixels of a preprocessor_config.json, None of an empty one."""
    if not config:
        return None
    size = config.get("size", 224)
    side = next(iter(size.values()), None) if isinstance(size, dict) else size
    square = {"height": side, "width": side}
    squash = size == square
    crop = config.get("do_center_crop", True)
    allow({"do_center_crop": crop} | config, HARMLESS, do_resize=(True,), do_rescale=(True,),
          do_normalize=(True,), rescale_factor=(1 / 255,), resample=(2, 3),
          do_center_crop=(True, False) if squash else (True,),
          size=(side, square, {"shortest_edge": side}),
          crop_size=(side, square) if crop else (config.get("crop_size"),),
          image_processor_type=PROCESSORS, feature_extractor_type=PROCESSORS)
    return make_pixels(config.get("image_mean"), config.get("image_std"), squash and "squash",
                       "bilinear" if config.get("resample") == 2 else "bicubic")


def make_pixels(mean, std, resize, interpolation):
    """Checked Pixels; what is not given is CLIP's, and one number is that of all channels."""
    own = Pixels()
    mean, std = ([x] * 3 if isinstance(x, (int, float)) else x for x in (mean, std))
    found = Pixels(tuple(mean or own.mean), tuple(std or own.std), resize or own.resize,
                   interpolation or own.interpolation)
    allow({"resize_mode": found.resize, "interpolation": found.interpolation},
          resize_mode=("shortest", "squash"), interpolation=("bicubic", "bilinear"))
    if not (len(found.mean) == len(found.std) == 3 and min(found.std) > 0
            and all(map(math.isfinite, found.mean + found.std))):
        raise WeightsError(f"pixel mean {mean} and std {std} are not three numbers each")
    return found


def known_from_timm(config, name):
    """From the config.json of timm's model folders: a model of another name can have the same
    tensors and compute something else."""
    weights = config.get("pretrained_cfg")
    if not weights:
        return {}
    allow(config, HARMLESS, architecture=(name.partition(".")[0],),
          global_pool=("avg", "token", "map", ""))  # of these, others have other tensors
    allow(config.get("model_args") or {}, ())
    resize = weights.get("crop_mode") or "center"
    return {"pixels": make_pixels(weights["mean"], weights["std"], "shortest" if resize == "center"
                                  else resize, weights.get("interpolation"))}


def known_from_open_clip(read):
    config = read("open_clip_config.json")
    model = config.get("model_cfg")
    if model is None:
        return {}
    image, text, pixels = model["vision_cfg"], model["text_cfg"], config.get("preprocess_cfg") or {}
    allow(model, HARMLESS)
    allow(image, HARMLESS, pool_type=("tok",), pos_embed_type=("learnable",), mlp_ratio=(4,))
    allow(text, HARMLESS, pool_type=("argmax",), proj_type=("linear",), mlp_ratio=(4,))
    allow(pixels, mode=("RGB",))
    return {"activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
            "vision_layers": image.get("layers", 12), "text_layers": text.get("layers", 12),
            "vision_head": image.get("head_width", 64), "vision_width": image.get("width", 768),
            "image_size": image.get("image_size", 224), "text_width": text.get("width", 512),
            "text_head": text.get("width", 512) // text.get("heads", 8),
            "pixels": make_pixels(pixels.get("mean"), pixels.get("std"),
                                  pixels.get("resize_mode"), pixels.get("interpolation"))}


CARD = ("clip_config", "pixels", "vocabulary")  # of the card, what every saved file carries


def card(model, tokenizer=None):
    """All that a file of ours tells beside the tensors, as plain values: `weights.load` builds the
    model from it. With `tokenizer`, the vocabulary is taken from there."""
    return {"clip_config": dataclasses.asdict(model.config),
            "pixels": dataclasses.asdict(model.pixels),
            "vocabulary": tokenizer.facts() if tokenizer else model.vocabulary,
            "origin": {key: model.origin[key] for key in ("name", "path", "sha256", "side")
                       if key in model.origin},
            "tensors": len(model.state_dict())}


def known_from_card(card):
    """Its sizes do not count: those of the tensors are taken, and widths must agree."""
    pixels = card.get("pixels")
    return {**card["clip_config"], "pixels": pixels and make_pixels(**pixels),
            "vocabulary": dict(card.get("vocabulary") or {}) or None}


# -----------------------------------------------------------------------------
# Sizes from shapes

def count(state, pattern, said=None):
    """How many different numbers `pattern`'s group takes in the names of `state`. WeightsError if
    the settings said another number of layers: some of them would not be theirs."""
    found = len({match.group(1) for match in map(re.compile(pattern).match, state) if match})
    allow({"num_hidden_layers": found if said is None else said}, num_hidden_layers=(found,))
    return found


def image_fields(sd, known):
    """The CLIPConfig fields of the image tower in these tensors (OpenAI's names)."""
    if any(name.startswith("visual.trunk.") for name in sd):
        head = sd.get("visual.proj.projection.weight")
        if not known.get("backbone"):
            raise WeightsError("its image tower is a classifier's trunk (SigLIP, or another of "
                               "timm), and of which is not written")
        return {"backbone": known["backbone"], "image_size": known["image_size"],
                "vision_layers": 0, "vision_patch": None,
                "vision_width": sd["visual.proj"].shape[0] if head is None else head.shape[1]}
    if "visual.class_embedding" in sd:
        width, _, _, patch = sd["visual.conv1.weight"].shape
        size = patch * math.isqrt(sd["visual.positional_embedding"].shape[0] - 1)
        layers = count(sd, r"visual\.transformer\.resblocks\.(\d+)\.", known.get("vision_layers"))
    else:
        width, patch = sd["visual.layer1.0.conv1.weight"].shape[0], None
        size = 32 * math.isqrt(sd["visual.attnpool.positional_embedding"].shape[0] - 1)
        layers = tuple(count(sd, rf"visual\.layer{i}\.(\d+)\.") for i in (1, 2, 3, 4))
    allow({"vision_width": width, "image_size": size} | known, vision_width=(width,),
          image_size=(size, [size, size]))  # heads are a share of the width
    return {"image_size": size, "vision_layers": layers, "vision_width": width,
            "vision_patch": patch, "activation": known.get("activation", "quick_gelu"),
            "vision_head": known.get("vision_head", HEAD_OF_WIDTH.get(width, 64))}


def text_fields(sd, known):
    """The CLIPConfig fields of the text tower in these tensors (OpenAI's names). Without `known`,
    the published BERTs are told apart by their segments."""
    bert = {name[5:]: tensor for name, tensor in sd.items() if name.startswith("bert.")}
    if not bert:
        width = sd["ln_final.weight"].shape[0]
        allow({"text_width": width} | known, text_width=(width,))
        return {"text_width": width,
                "text_layers": count(sd, r"transformer\.resblocks\.(\d+)\.",
                                     known.get("text_layers")),
                "context_length": sd["positional_embedding"].shape[0],
                "vocab_size": sd["token_embedding.weight"].shape[0],
                "text_head": known.get("text_head", 64),
                "activation": known.get("activation", "quick_gelu")}
    said, segments = known.get("text") or {}, bert.get("embeddings.token_type_embeddings.weight")
    segments = 0 if segments is None else segments.shape[0]
    vocab, width = bert["embeddings.word_embeddings.weight"].shape
    family = said.get("family", {0: "distilbert", 1: "roberta"}.get(segments, "bert"))
    usual = {"family": family, "heads": width // 64, "pad_id": int(family == "roberta"),
             "eps": 1e-5 if family == "roberta" else 1e-12,
             "pool": "pooler" if "pooler.dense.weight" in bert else "first"}
    shapes = {"vocab_size": vocab, "width": width, "type_vocab": segments,
              "layers": count(bert, r"encoder\.layer\.(\d+)\.", said.get("layers")),
              "intermediate": bert["encoder.layer.0.intermediate.dense.weight"].shape[0],
              "positions": bert["embeddings.position_embeddings.weight"].shape[0]}
    return bert_fields(BertConfig(**usual | said | shapes))


@contextlib.contextmanager
def skeleton():
    """Modules made in here have names and shapes and no numbers. Filling them is left out: on
    "meta" it computes nothing, and imports torch's compiler, which takes seconds."""
    names = [name for name in vars(nn.init) if name.endswith("_") and name[0] != "_"]
    idle = dict.fromkeys(names, lambda tensor, *_, **__: tensor)
    with mock.patch.multiple(nn.init, **idle), torch.device("meta"):
        yield


def build(sd, known):
    """The CLIP of exactly these tensors, see `weights.config_from_state_dict`. Added is what they
    do not tell: versions of modules, without which torchvision's MNASNet refuses, and the batch
    counts of older BatchNorms. Parameters become fp32 and contiguous: some accelerators ignored
    in-place updates of strided ones."""
    mlp = "text_projection.layer_norm.weight" in sd
    with about(f"not a CLIP (its first tensor is {next(iter(sd), None)!r})"):
        head = sd["text_projection.layer_norm.weight" if mlp else "text_projection"]
        config = CLIPConfig(embed_dim=head.shape[-1], proj="mlp" if mlp else "linear",
                            **image_fields(sd, known) | text_fields(sd, known))
    # A classifier's trunk can have buffers that no file holds: it is made for real.
    bare = torch.random.fork_rng(devices=[]) if config.backbone else skeleton()
    with about("these sizes make no CLIP"), bare:
        model = CLIP(config)
        if "logit_bias" in sd:  # SigLIP's
            model.logit_bias = nn.Parameter(torch.zeros(()))
    own = model.state_dict()
    state = collections.OrderedDict({
        name: torch.tensor(0) for name in own if name.endswith(".num_batches_tracked")})
    for name, tensor in sd.items():
        like = own.get(name, tensor)
        if tensor.is_floating_point() or not like.is_floating_point():  # integers are no weights
            state[name] = tensor.to(like.dtype).contiguous()
    state._metadata = own._metadata
    with about(f"not a {describe(config)}"):
        missing, odd = model.load_state_dict(state, strict=False, assign=True)
        if missing:
            name = missing[0]
            raise WeightsError(f"{name!r} is {sd[name].dtype if name in sd else 'missing'}")
        if odd:
            raise WeightsError(f"{odd[0]!r} belongs to another model")
    return model


def name_of(config):
    """The name of a CLIP of this size, whatever its activation; "custom" for one without."""
    return next((name for name, known in CONFIGS.items() if known == dataclasses.replace(
        config, activation=known.activation)), "custom")


def describe(config):
    """The two towers in one line."""
    image = config.backbone or ("ViT" if config.vision_patch else "ModifiedResNet")
    text = config.text.family if config.text else "transformer"
    return (f"{name_of(config)} CLIP ({image} of width {config.vision_width} for "
            f"{config.image_size} pixels, {text} of width {config.text_width} and "
            f"{config.text_layers} blocks for {config.vocab_size:,} tokens)")


# -----------------------------------------------------------------------------
# Writing for others

def is_chinese_clip(config):
    """Whether a CLIP of this size is built as Chinese-CLIP: CLIP's image tower, a bare BERT."""
    text = config.text
    return bool(text and text.family == "bert" and text.pool == "first" and not config.backbone
                and config.proj == "linear")


def check_layout(model, layout):
    """Raise WeightsError unless `model` can be written in `layout`."""
    config, text = model.config, model.config.text
    chinese, bias = is_chinese_clip(config), model.logit_bias is not None
    own_image = not config.backbone and config.proj == "linear"
    text_head = text.width // text.heads if text else config.text_head
    openai = (config.activation == "quick_gelu" and text_head == 64
              and config.vision_head == HEAD_OF_WIDTH.get(config.vision_width, 64))
    fits = {
        "safetensors": True, "open_clip": own_image and not text,
        "openai": own_image and not text and openai and config.vision_head == 64,
        "chinese_clip": chinese and openai,  # neither of the two tells its heads
        "hf": own_image and config.vision_patch is not None and (
            not text or chinese or text.family != "distilbert" and text.pool == "pooler")}
    if not fits.get(layout) or bias and layout not in ("safetensors", "open_clip"):
        raise WeightsError(f"the layout {layout!r} has no place for this model: openai and "
                           f"chinese_clip know QuickGELU and heads of 64 alone, hf no ResNet, the "
                           f"three no SigLIP bias, each its own towers; choose safetensors")


def hugging_face_tables(model):
    """{file: content} for transformers' model of such towers and for its image processor."""
    config, bert, chinese = model.config, model.config.text, is_chinese_clip(model.config)
    kind, name = (("chinese_clip", "ChineseCLIPModel") if chinese else ("clip", "CLIPModel")
                  if not bert else ("vision-text-dual-encoder", "VisionTextDualEncoderModel"))
    prefix = "chinese_clip" if chinese else "clip"

    def tower(side, width, layers, head):
        return {"model_type": f"{prefix}_{side}_model", "hidden_size": width,
                "intermediate_size": 4 * width, "num_hidden_layers": layers,
                "num_attention_heads": width // head, "hidden_act": config.activation,
                "projection_dim": config.embed_dim, "layer_norm_eps": 1e-5}
    vision = tower("vision", config.vision_width, config.vision_layers, config.vision_head) | {
        "image_size": config.image_size, "patch_size": config.vision_patch}
    if bert:
        text = {"model_type": "chinese_clip_text_model" if chinese else bert.family,
                "hidden_act": "gelu"} | {
                    theirs: getattr(bert, ours) for ours, theirs in BERT_SETTINGS.items()}
    else:
        text = tower("text", config.text_width, config.text_layers, config.text_head) | {
            "vocab_size": config.vocab_size, "max_position_embeddings": config.context_length,
            "bos_token_id": last_token(config.vocab_size) - 1,
            "eos_token_id": last_token(config.vocab_size),
            "pad_token_id": 0}
    square = {"height": config.image_size, "width": config.image_size}
    squash = model.image_resize == "squash"
    return {"config.json": {
                "architectures": [name], "model_type": kind, "text_config": text,
                "vision_config": vision, "projection_dim": config.embed_dim},
            "preprocessor_config.json": {
                "image_processor_type": f"{'Chinese' * chinese}CLIPImageProcessor",
                "size": square if squash else {"shortest_edge": config.image_size},
                "resample": 2 if model.image_interpolation == "bilinear" else 3,
                "do_resize": True, "do_center_crop": not squash, "crop_size": square,
                "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True,
                "do_normalize": True, "image_mean": model.image_mean,
                "image_std": model.image_std}}


def open_clip_tables(model):
    """{file: content} as in OpenCLIP's model folders."""
    config = model.config
    bias = {} if model.logit_bias is None else {"init_logit_bias": model.logit_bias.item()}
    return {"open_clip_config.json": {
        "model_cfg": bias | {
            "embed_dim": config.embed_dim, "quick_gelu": config.activation == "quick_gelu",
            "vision_cfg": {
                "image_size": config.image_size, "layers": config.vision_layers,
                "width": config.vision_width, "head_width": config.vision_head,
                "patch_size": config.vision_patch},
            "text_cfg": {
                "context_length": config.context_length, "vocab_size": config.vocab_size,
                "width": config.text_width, "layers": config.text_layers,
                "heads": config.text_width // config.text_head}},
        "preprocess_cfg": {
            "size": config.image_size, "mode": "RGB", "mean": list(model.image_mean),
            "std": list(model.image_std), "interpolation": model.image_interpolation,
            "resize_mode": model.image_resize}}}
