"""weights.py, layouts.py and tools.convert: files there and back, files that must not be trusted,
what a run leaves, two towers, fetching."""
import argparse
import dataclasses
import hashlib
import http.server
import io
import json
import math
import os
import pickle
import random
import shutil
import struct
import threading
import warnings
import zipfile

import helpers
import pytest
import torch
from helpers import (
    Child, Payload, attempt, damaged_files, images_for, refused, run_main, texts_for, tiny_clip)
from torch import nn

import weights
from clip_model import BERTS, CLIP, CONFIGS, BertConfig, Pixels, bert_fields
from files import SafeStop
from layouts import LAYOUTS, hugging_face_tables, known_from_timm, to_hugging_face
from tools import convert
from tokenizer import WordPieceTokenizer, for_model
from weights import (add_model_flags, card, digest, export, kept_tensors, load, open_clip, save)

VOCAB = 64
BERT = BertConfig("bert", VOCAB, 64, 2, 1, 96, 24)
FIELDS = {"bert": bert_fields(BERT), "": {"vocab_size": VOCAB},
          "bare": bert_fields(dataclasses.replace(BERT, pool="first")),
          "roberta": bert_fields(dataclasses.replace(BERT, family="roberta", pad_id=1)),
          "mean": bert_fields(dataclasses.replace(BERT, pool="mean"))}
BACKBONE = {"backbone": "squeezenet1_0", "image_size": 64, "vision_layers": 0,
            "vision_patch": None, "vision_width": 512}


def make(name="tiny-vit", bert="", seed=0, **changes):
    return tiny_clip(seed, config=name, **{**FIELDS[bert], **changes})


def texts(model):
    return texts_for(model, (9, 5, 7))


def same(one, two):
    """Equal configs, tensors, pixels and features."""
    a, b = one.state_dict(), two.state_dict()
    assert one.config == two.config and one.pixels == two.pixels and a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    inputs = images_for(one, 2), texts(one)
    return all(map(torch.equal, one(*inputs), two(*inputs)))


# -----------------------------------------------------------------------------
# Files there and back

@pytest.mark.parametrize("changes, layouts", [
    ({}, "safetensors openai open_clip hf"),
    ({"name": "tiny-rn"}, "safetensors openai open_clip"),
    ({"activation": "gelu"}, "safetensors open_clip hf"),
    ({"vision_head": 16, "text_head": 32}, "safetensors open_clip hf"),
    ({"bert": "bert"}, "safetensors hf"), ({"bert": "roberta"}, "safetensors hf"),
    ({"bert": "mean"}, "safetensors"), ({"bert": "bare"}, "safetensors hf chinese_clip"),
    ({"name": "tiny-rn", "bert": "bare"}, "safetensors chinese_clip"),
    ({"bert": "bert", "proj": "mlp", **BACKBONE}, "safetensors")])
def test_every_layout_brings_back_all_that_a_model_is(tmp_path, changes, layouts):
    if "backbone" in changes:
        pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    model = make(**changes)
    model.image_mean, model.image_std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    model.image_resize, model.image_interpolation = "squash", "bilinear"
    model.vocabulary = {"kind": "wordpiece", "vocab": ["a", "ö"]} if model.config.text else None
    for bias in (False, True):
        if bias:
            model.logit_bias = nn.Parameter(torch.tensor(-3.5))
        for layout in LAYOUTS:
            if layout not in layouts.split() or bias and layout not in ("safetensors", "open_clip"):
                refused(lambda: save(model, tmp_path / "no", layout), layout)  # noqa: B023
                assert not (tmp_path / "no").exists()
                continue
            path = export(model, tmp_path / layout, layout)
            paths = [path, path.parent]
            if layout in ("openai", "open_clip"):
                paths.append(save(model, tmp_path / f"{layout}.pt", layout))
            for place in paths:
                back = load(place)
                assert same(back, model) and back.vocabulary == model.vocabulary
                assert back.origin["notes"] == [] or layout == "chinese_clip"
                assert not back.training and all(p.requires_grad for p in back.parameters())
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """What OpenAI published: a traced CLIP with three numbers in buffers, matrices in half
    precision -> path, its state dict."""
    model, path = make(), tmp_path_factory.mktemp("archive") / "a.pt"
    for name, number in (("input_resolution", 32), ("context_length", 77), ("vocab_size", VOCAB)):
        model.register_buffer(name, torch.tensor(number))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated and warns of the shortcuts
        traced = torch.jit.trace(model, (images_for(model, 2), texts(model)), check_trace=False)
        for parameter in traced.parameters():
            if parameter.dim() > 1:
                parameter.data = parameter.data.half()
        traced.save(str(path))
        return path, torch.jit.load(str(path)).state_dict()


def test_a_torchscript_archive_is_read_bit_for_bit_without_running_it(archive):
    path, reference = archive
    model = load(path)
    assert model.config == make().config and model.origin["format"] == "TorchScript"
    assert model.origin["notes"] == [] and {"input_resolution", "vocab_size"} <= reference.keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, reference[key].to(tensor.dtype))


def test_an_archive_of_another_library_does_not_say_its_activation(tmp_path):
    model, path = make(), tmp_path / "other.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, (images_for(model, 2), texts(model)), check_trace=False).save(path)
    assert "--activation" in load(path).origin["notes"][0]


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
def test_load_gives_contiguous_fp32_masters_whatever_is_stored(tmp_path, name):
    model = make(name)
    state = {key: t.half() for key, t in model.state_dict().items()}
    torch.save(state, tmp_path / "half.pt")
    torch.save({key: t.t().contiguous().t() if t.dim() == 2 else t for key, t in state.items()
                if "num_batches" not in key}, tmp_path / "strided.pt")  # before BatchNorms counted
    files = [tmp_path / "half.pt", tmp_path / "strided.pt"]
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        files.append(save(model, tmp_path / f"{dtype}.safetensors", dtype=dtype))
    for file in files:
        for key, tensor in load(file).state_dict(keep_vars=True).items():
            assert tensor.is_contiguous() and tensor.is_leaf
            assert tensor.dtype == (torch.long if "num_batches" in key else torch.float32)
            assert torch.allclose(tensor, model.state_dict()[key], atol=0.02)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "model.clip."])
@pytest.mark.parametrize("keys", [["state_dict"], ["model", "state_dict"], ["ema"]])
def test_weights_are_found_inside_training_checkpoints_of_others(tmp_path, prefix, keys):
    model = make("tiny-rn")
    content = {prefix + key: tensor for key, tensor in model.state_dict().items()}
    content[prefix + "attn_mask"] = torch.full((3, 3), -torch.inf).triu(1)  # of a scripted model
    for key in reversed(keys):
        content = {"ema": {}, key: content, "epoch": 3, "optimizer": {"state": {0: torch.ones(1)}}}
    for zipped in (False, True):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
        back = load(tmp_path / "a.pt")
        assert same(back, model) and len(back.origin["notes"]) == 1
    torch.save({"model": model.state_dict(), "model_ema": model.state_dict()}, tmp_path / "a.pt")
    assert "EMA" in load(tmp_path / "a.pt").origin["notes"][1]
    assert "--activation" in back.origin["notes"][0]
    assert load(tmp_path / "a.pt", activation="gelu").config.activation == "gelu"
    for path in (save(make(), tmp_path / "own.safetensors"), bare_folder(tmp_path / "hf")):
        assert "trained with quick_gelu" in load(path, activation="gelu").origin["notes"][0]


def test_the_bundled_model_stores_only_the_words_in_use(tmp_path):
    assert load("tiny").config == CONFIGS["tiny"] and load("tiny").origin["name"] == "tiny"
    model, rows = make(), torch.tensor([3, 5, 40, VOCAB - 2, VOCAB - 1])
    path = save(model, tmp_path / "rows.safetensors", token_rows=rows)
    back = load(path)
    assert back.config == model.config and path.stat().st_size < save(
        model, tmp_path / "all.safetensors").stat().st_size - 50 * 64 * 4
    with torch.no_grad():
        expected = torch.zeros(VOCAB, 64).index_copy(0, rows, model.token_embedding.weight[rows])
    assert torch.equal(back.token_embedding.weight, expected)


def test_chinese_clips_own_files_are_read_and_written(tmp_path):
    model = make(bert="bare")
    model.image_resize = "squash"  # as their programs do, which no file says
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    state["module.bert.pooler.dense.weight"] = torch.zeros(64, 64)  # of the BERT it began with
    state["module.bert.pooler.dense.bias"] = torch.zeros(64)
    torch.save({"epoch": 3, "step": 9, "name": "x", "state_dict": state}, tmp_path / "a.pt")
    back = load(tmp_path / "a.pt")
    assert same(back, model) and back.origin["layout"] == "chinese_clip"
    stored = torch.load(export(model, tmp_path, "chinese_clip"), weights_only=True)
    assert {"epoch", "step", "name"} <= stored.keys()
    assert all(name.startswith("module.") for name in stored["state_dict"])


def test_a_clip_with_another_bert_does_not_come_back_as_chinese_clip(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(helpers.WORDS))
    for bert in ("bert", "bare", "mean"):
        back = load(save(make(bert=bert), tmp_path / "a.safetensors"))
        assert back.origin["layout"] == "safetensors" and for_model(back).kind == "wordpiece"
        both = load(image_tower="tiny-vit:none", text_tower=tmp_path / "a.safetensors")
        assert for_model(both, tmp_path).kind == "wordpiece"


def test_an_interrupted_save_leaves_the_older_file(tmp_path, monkeypatch):
    path = save(make(), tmp_path / "a.safetensors")

    def fail(*_):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(SafeStop, match="No space"):
            save(make(seed=1), path)
    assert same(load(path), make()) and same(load(save(make(seed=1), path)), make(seed=1))


# -----------------------------------------------------------------------------
# What stands beside the weights

def with_table(folder, name, table):
    (folder / name).write_text(json.dumps(table))
    return folder


def bare_folder(path, layout="hf"):
    """A folder as another library writes it: no word of ours in the file of tensors."""
    package = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    file = export(make(), path, layout)
    package.save_file(package.load_file(file), file)
    return file.parent


def test_pixel_statistics_and_resize_beside_the_weights_are_taken(tmp_path):
    folder, clips, half = bare_folder(tmp_path), make().pixels, ((0.5,) * 3, (0.4,) * 3)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    for table, expected in (
            (size, clips), ({"size": 32, "crop_size": 32, "do_center_crop": True}, clips),
            (size | {"image_mean": 0.5, "image_std": 0.4}, Pixels(*half)),
            (size | {"image_mean": [0.5] * 3, "image_std": [0.4] * 3, "resample": 2},
             Pixels(*half, "shortest", "bilinear")),
            ({"size": {"height": 32, "width": 32}, "do_center_crop": False},
             dataclasses.replace(clips, resize="squash"))):
        assert load(with_table(folder, "preprocessor_config.json", table)).pixels == expected
    with_table(folder, "processor_config.json", {"image_processor": size | {
        "image_mean": [0.25] * 3}})  # as transformers 5 writes it, and reads it first
    assert load(folder).image_mean == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("name, table, word", [
    ("preprocessor_config.json", {"resample": 0}, "resample"),
    ("preprocessor_config.json", {"do_normalize": False}, "do_normalize"),
    ("preprocessor_config.json", {"rescale_factor": 1}, "rescale_factor"),
    ("preprocessor_config.json", {"size": {"shortest_edge": 256}, "crop_size": 224}, "crop_size"),
    ("preprocessor_config.json", {"size": 32, "do_center_crop": False}, "do_center_crop"),
    ("preprocessor_config.json", {"size": {"height": 48, "width": 48}, "crop_size": 32}, "crop_s"),
    ("preprocessor_config.json", {"image_mean": [0.5]}, "mean"),
    ("preprocessor_config.json", {"size": {"longest_edge": 32}}, "longest_edge"),
    ("preprocessor_config.json", {"crop_pct": 0.875}, "crop_pct"),
    ("preprocessor_config.json", {"image_processor_type": "ViTImageProcessor"}, "ViTImage"),
    ("preprocessor_config.json", {"image_std": [0, 1, 1]}, "std"),
    ("open_clip_config.json", {"preprocess_cfg": {"resize_mode": "longest"}}, "longest"),
    ("open_clip_config.json", {"preprocess_cfg": {"interpolation": "nearest"}}, "nearest"),
    ("open_clip_config.json", {"preprocess_cfg": {"mode": "L"}}, "mode")])
def test_pixels_that_cannot_be_honoured_are_refused_by_name(tmp_path, name, table, word):
    folder = bare_folder(tmp_path, "hf" if name.startswith("pre") else "open_clip")
    if name.startswith("open"):
        table |= {"model_cfg": json.loads((folder / name).read_text())["model_cfg"]}
    refused(lambda: load(with_table(folder, name, table)), word, folder)


def test_json_of_others_beside_the_weights_is_no_obstacle_and_damaged_json_is(tmp_path):
    for layout, name in (("hf", "config.json"), ("open_clip", "open_clip_config.json")):
        folder = bare_folder(tmp_path, layout)
        for content in ("[1, 2]", '{"lr": 0.1, "model": "ViT-B/32"}'):
            (folder / name).write_text(content)
            assert any("--activation" in note for note in load(folder).origin["notes"])
        for content in ("{", "\udc80", '{"model_cfg": 3, "model_type": 4}'):
            (folder / name).write_text(content, errors="surrogateescape")
            refused(lambda: load(folder), folder)  # noqa: B023
    (folder / "open_clip_config.json").unlink()
    refused(lambda: load(with_table(folder, "config.json", {"text_config": {}})), "model_type")


@pytest.mark.parametrize("layout", ["hf", "open_clip"])
def test_settings_of_the_other_library_beside_the_weights_count(tmp_path, archive, layout):
    gelu = make(activation="gelu", vision_head=16)
    gelu.set_pixels(Pixels((0.5,) * 3, (0.4,) * 3))
    export(gelu, tmp_path, layout).unlink()
    state = gelu.state_dict()
    torch.save(state if layout == "hf" else to_hugging_face(state), tmp_path / layout / "a.pt")
    assert same(load(tmp_path / layout / "a.pt"), gelu)
    shutil.copy(archive[0], tmp_path / layout / "b.pt")  # OpenAI's own needs no settings
    if layout == "hf":
        assert load(tmp_path / layout / "b.pt").config.activation == "quick_gelu"
        (tmp_path / layout / "config.json").unlink()
        assert load(tmp_path / layout / "a.pt").pixels == gelu.pixels  # of the preprocessor


def test_openclips_weights_come_before_those_of_a_tower_beside_them(tmp_path):
    folder = bare_folder(tmp_path, "open_clip")
    (folder / "model.safetensors").write_bytes(b"the image tower in timm's names")
    assert same(load(folder), make())
    tuned = make(seed=3)  # saved by transformers into the same folder, later
    export(tuned, tmp_path / "hf", "hf")
    for name in ("model.safetensors", "config.json"):
        shutil.copy(tmp_path / "hf" / "hf" / name, folder)
    assert same(load(folder), tuned)
    clip = make(vocab_size=49_409)  # one word was added; it comes after the end of text
    text = hugging_face_tables(clip)["config.json"]["text_config"]
    assert text["eos_token_id"] == 49_407


def test_a_model_name_wins_over_a_folder_and_a_file_over_a_model_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(make(), tmp_path / "tiny" / "clip.safetensors")
    save(make(), tmp_path / "mine" / "clip.safetensors")
    shutil.copy(tmp_path / "mine" / "clip.safetensors", tmp_path / "RN50.pt")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("THERE", str(tmp_path))
    assert load("tiny").config == CONFIGS["tiny"]
    for place in ("./tiny", tmp_path / "tiny", "mine", "~/mine", "$THERE/mine", "RN50.pt"):
        assert load(place).config == make().config
    refused(lambda: load("nowhere.pt"), "nowhere.pt")
    refused(lambda: load(tmp_path), tmp_path, "mine, tiny")  # where there are some
    refused(lambda: load("CN-ViT-B/16"), "CN-ViT-B/16")
    refused(lambda: load(with_table(tmp_path / "mine", "adapter_config.json", {})), "adapter_c")


def test_a_timm_folder_is_taken_as_it_stands_or_refused_by_name():
    config = {"architecture": "resnet18", "num_classes": 10, "global_pool": "avg",
              "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_mode": "squash"}}
    assert known_from_timm(config, "resnet18")["pixels"] == Pixels(*[(0.5,) * 3] * 2, "squash")
    border = {"pretrained_cfg": config["pretrained_cfg"] | {"crop_mode": "border"}}
    refused(lambda: known_from_timm(config | border, "resnet18"), "border")
    for more in ({"model_args": {"act_layer": "gelu"}}, {"global_pool": "max"}, {"new": 1}):
        refused(lambda: known_from_timm(config | more, "resnet18"), *more.get("model_args", more))  # noqa: B023


OLDER = {  # some of what transformers 4 wrote into every part of a config.json
    "chunk_size_feed_forward": 0, "id2label": {"0": "LABEL_0"}, "is_decoder": False,
    "max_length": 20, "temperature": 1.0, "tie_word_embeddings": True, "torch_dtype": "float32"}


@pytest.mark.parametrize("layout, file, parts", [
    ("hf", "config.json", ("", "text_config", "vision_config")),
    ("open_clip", "open_clip_config.json", ("model_cfg", "text_cfg", "vision_cfg"))])
def test_a_setting_that_is_not_known_is_refused_by_its_name(tmp_path, layout, file, parts):
    folder = bare_folder(tmp_path, layout)
    content = json.loads((folder / file).read_text())
    inside = {"": content, **content, **content.get("model_cfg", {})}
    for part in parts:
        inside[part] |= OLDER if part.endswith("config") else {}
    assert same(load(with_table(folder, file, content)), make())
    for part in parts:
        inside[part]["a_new_setting"] = 1
        refused(lambda: load(with_table(folder, file, content)), "a_new_setting", folder)
        if layout == "hf":  # the type tells more
            kind, inside[part]["model_type"] = inside[part]["model_type"], "siglip"
            refused(lambda: load(with_table(folder, file, content)), "siglip", folder)
            inside[part]["model_type"] = kind
        del inside[part]["a_new_setting"]
        for key, name in (("num_hidden_layers", "num_hidden_layers"), ("hidden_size", "_width"),
                          ("image_size", "image_size")):  # not those of the tensors
            if size := inside[part].get(key):
                inside[part][key] = size + 1
                refused(lambda: load(with_table(folder, file, content)), name, folder)  # noqa: B023
                inside[part][key] = size
    if content.pop("model_type", None):
        refused(lambda: load(with_table(folder, file, content)), "model_type", folder)


# -----------------------------------------------------------------------------
# Files that must not be trusted

def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def zip_of(members, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def members_of(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def script(pickled):
    return zip_of({"m/data.pkl": pickled, "m/code/__torch__.py": "", "m/version": "3",
                   "m/constants.pkl": pickle.dumps(()), "m/data/0": bytes(8)})


def tensors_file(header, data=bytes(8)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def bad_files():
    """{kind: (bytes, or a function of the canary's path; a name that the refusal must hold)}"""
    state = make().state_dict()
    hf = to_hugging_face(state)

    def changed(name, tensor):
        return saved(state | {name: tensor}), name

    def without(part, table=state):
        return saved({key: tensor for key, tensor in table.items() if part not in key})
    storage = (b"\x80\x02c__torch__\nM\n)\x81}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n"
               b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00"
               b"\x00cpuK\x02tQK\x00K\x09\x85K\x01\x85\x89NtRsb.")
    return {
        "zip of something else": (zip_of({"word/document.xml": "x"}), "data.pkl"),
        "compressed zip": (zip_of(members_of(saved(state)), zipfile.ZIP_DEFLATED), "compressed"),
        "TensorFlow": (b"\x89HDF\r\n\x1a\n" + bytes(9), "pytorch_model.bin"),
        "a run's objects": (saved({"args": argparse.Namespace(lr=1)}), "weights_only=False"),
        "a list": (saved([1, 2]), ""), "tensors under numbers": (saved({0: torch.zeros(3)}), ""),
        "a gap": (tensors_file({"a": entry(4, 12)}, bytes(12)), "'a'"),
        "lying shape": (tensors_file({"a": entry(0, 8, [10 ** 9])}), "'a'"),
        "8-bit floats": (tensors_file({"a": entry(0, 8, [8], "F8_E4M3")}), "F8_E4M3"),
        "header nests": (tensors_file(b'{"a":' * 100_000), ""),
        "giant header": (struct.pack("<Q", 2 ** 60) + b"{}" + bytes(100), ""),
        "NaN weights": changed("ln_final.bias", torch.full((64,), math.nan)),
        "integer weights": changed("ln_final.bias", torch.ones(64, dtype=torch.int8)),
        "a terabyte in four bytes": changed("token_embedding.weight", torch.zeros(1, 1).expand(
            10 ** 10, 64)),
        "meta tensor": changed("text_projection", torch.zeros(64, 32, device="meta")),
        "an extra tensor": changed("visual.head.weight", torch.zeros(3)),
        "another shape": changed("visual.ln_post.bias", torch.zeros(65)),
        "a missing tensor": (without("resblocks.1.ln_2.weight"), "resblocks.1.ln_2.weight"),
        "SigLIP": (saved(hf | {"vision_model.head.probe": torch.zeros(1)}), "SigLIP"),
        "OpenCLIP's text tower": (saved({"text.transformer.embeddings.x": torch.zeros(1)}), "pooling"),
        "hf without k": (without("0.self_attn.k_proj.bias", hf), "k_proj.bias"),
        "runs, zip": (lambda canary: saved({"w": Payload(canary)}), ""),
        "runs, TorchScript": (lambda canary: script(pickle.dumps({"w": Payload(canary)}, 2)), ""),
        "evaluates": (script(b"\x80\x02cbuiltins\neval\nX\x04\x00\x00\x001+11\x85R."), "eval"),
        "a huge memo": (script(b"\x80\x02}r\x00\x00\x00\x40."), "memo"),
        "out of bounds": (script(storage), "")}


BAD = bad_files()


@pytest.mark.parametrize("kind", list(BAD))
def test_a_bad_file_is_refused_in_one_line_and_never_run(tmp_path, kind):
    data, word = BAD[kind]
    canary, path = tmp_path / "canary", tmp_path / "a.pt"
    path.write_bytes(data(canary) if callable(data) else data)
    for place in (path, tmp_path / "clip.safetensors"):
        path = path.rename(place)
        line = refused(lambda: load(place), place.name, word if place.suffix == ".pt" else "")  # noqa: B023
        assert len(line) < 600 and not canary.exists()
    assert attempt(convert, "inspect", path).code in (0, 2) and not canary.exists()


@pytest.mark.parametrize("file", ["whole.pt", "whole.safetensors"])
def test_damaged_files_are_named_as_what_they_are(tmp_path, file):
    whole = save(make(), tmp_path / file, "open_clip" if file.endswith(".pt") else "safetensors")
    words = {"empty": "empty", "gzip": "gzip", "html": "web page", "lfs": "LFS"}
    for kind, path in damaged_files(tmp_path / "damaged", whole).items():
        if (kind, path.suffix) != ("flipped", ".safetensors"):  # the format has no checksum
            refused(lambda: load(path), path, words.get(kind, ""))  # noqa: B023
            refused(attempt(convert, "inspect", path), path)


@pytest.mark.parametrize("claim", [
    {"vision_head": 0}, {"text_head": 48}, {"activation": "relu"}, {"vocab_size": "x"},
    {"text": {"pool": 3}, "backbone": "no such"}, {"text_layers": 10 ** 9}, "{", [1], {}])
def test_claims_of_a_file_about_itself_are_not_believed(tmp_path, claim):
    model, path = make(), tmp_path / "a.safetensors"
    vocabulary = "null" if claim else "[1]"
    if isinstance(claim, dict):
        claim = dataclasses.asdict(model.config) | claim
    path.write_bytes(b"".join(weights.safetensors_bytes(model.state_dict(), {
        "vocabulary": vocabulary, "clip_config": claim if claim == "{" else json.dumps(claim)})))
    try:
        assert same(load(path), model) and vocabulary == "null"
        attempt(convert, "inspect", path).ok()
    except weights.WeightsError:
        refused(lambda: load(path), path)
        refused(attempt(convert, "inspect", path), path)


def mutate(data, rng):
    """One to eight bytes changed, pieces copied or cut out; half of all near the beginning."""
    data, kind = bytearray(data), rng.choice(["byte", "byte", "copy", "cut"])
    for _ in range(1 if kind == "cut" else rng.choice([1, 2, 8])):
        at, other = (rng.randrange(rng.choice([len(data), min(3000, len(data))])) for _ in "ab")
        if kind == "byte":
            data[at] = rng.randrange(256)
        else:
            size = rng.choice([8, 100])
            data[at:at + size] = data[other:other + size] if kind == "copy" else b""
    return bytes(data)


def repacked(data, rng):
    """The pickle of a zip changed, and the zip's checksums right again."""
    members = members_of(data)
    name = next(name for name in members if name.endswith("data.pkl"))
    return zip_of(members | {name: mutate(members[name], rng)})


@pytest.mark.parametrize("kind, change, times", [
    ("safetensors", mutate, 100), ("zip", mutate, 60), ("legacy", mutate, 60),
    ("script", repacked, 80), ("zip", repacked, 60)])
def test_mutated_files_load_or_are_refused_in_one_line(tmp_path, archive, kind, change, times):
    state = make(text_layers=1, vision_layers=1, context_length=8).state_dict()
    data = {"safetensors": b"".join(weights.safetensors_bytes(state, {})), "zip": saved(state),
            "legacy": saved(state, _use_new_zipfile_serialization=False),
            "script": archive[0].read_bytes()}[kind]
    rng, refusals = random.Random(f"{kind} {change.__name__}"), 0
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
    for _ in range(times):
        path.write_bytes(change(data, rng))
        try:
            load(path)
        except weights.WeightsError as error:
            refusals += 1
            assert "\n" not in str(error) and len(str(error)) < 600
    assert refusals > times // 10


# -----------------------------------------------------------------------------
# What a run leaves

def a_run(folder, model, trains):
    """A checkpoint as the scripts write it, after one step of 0.01 on each tensor that trains."""
    for name, p in model.named_parameters():
        p.requires_grad_(trains(name))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 if p.requires_grad else 0)
    kept = {name: p.detach().clone() for name, p in kept_tensors(model).items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"format": "x/2", "weights": kept, "buffers": dict(model.named_buffers()),
                "card": card(model), "optimizer": {"state": {}}}, folder / "checkpoint_best.pt")
    return folder / "checkpoint_best.pt"


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
def test_a_checkpoint_that_holds_only_what_trained_takes_the_rest_from_its_base(tmp_path, name):
    base = save(make(name, activation="gelu"), tmp_path / "base.pt", "open_clip")
    model = load(base)
    model.image_mean, model.vocabulary = (0.5, 0.5, 0.5), {"kind": "bpe"}
    path = a_run(tmp_path / "run", model, lambda name: name.endswith("bias"))
    assert path.stat().st_size < base.stat().st_size / 2
    for place in (path, path.parent):
        back = load(place)
        assert same(back, model) and back.vocabulary == {"kind": "bpe"}
    again = a_run(tmp_path / "next", back, lambda name: name.startswith("visual."))
    assert same(load(again), back)  # a run from a run from a file
    report = json.loads(attempt(convert, "inspect", again, "--json").ok().out)
    assert report["architecture"] == "CLIP" and report["layout"] == "checkpoint"
    save(make(name, seed=5), base, "open_clip")
    refused(lambda: load(path), path, base.name)
    base.write_bytes(path.read_bytes())  # itself what it was, and not to be read for ever
    assert len(refused(lambda: load(path), path, base.name)) < 1000
    base.unlink()
    refused(lambda: load(path), path, base.name)


def test_digests_tell_towers_and_heads_apart():
    model = make()
    before = digest(model, "image"), digest(model, "text")
    with torch.no_grad():
        model.visual.ln_post.bias[3] += 1
        model.logit_scale += 1
    assert digest(model, "image") != before[0] and digest(model, "text") == before[1]
    before = digest(model, "image"), digest(model, "image", head=False)
    model.visual.proj.data += 1
    assert digest(model, "image") != before[0] and digest(model, "image", False) == before[1]


def flags(**given):
    parser = argparse.ArgumentParser()
    add_model_flags(parser, towers=True)
    parser.set_defaults(**{"seed": 3, **given})
    return parser.parse_args([])


def test_the_model_is_what_the_weights_hold_and_a_model_that_contradicts_is_refused(tmp_path):
    path = save(CLIP(CONFIGS["tiny-vit"]), tmp_path / "a.pt", "openai")
    for model in (None, "tiny-vit", "Tiny_ViT"):
        found = open_clip(flags(model=model, weights=str(path)))
        assert found.origin["name"] == "tiny-vit" and found.config == CONFIGS["tiny-vit"]
    refused(lambda: open_clip(flags(model="RN50", weights=str(path))), "RN50", "tiny-vit")
    assert open_clip(flags(model="tiny")).origin["sha256"] == load("tiny").origin["sha256"]
    one, two = (open_clip(flags(model="tiny-vit", weights="none", activation=a))
                for a in (None, "gelu"))
    assert one.config.activation == "quick_gelu" and two.config.activation == "gelu"
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert not torch.equal(one.visual.proj, open_clip(
        flags(model="tiny-vit", weights="none", seed=4)).visual.proj)
    for wrong in ({"model": "ViT-Z"}, {}, {"model": "a.pt", "weights": "none"}):
        refused(lambda: open_clip(flags(**wrong)), "--model")  # noqa: B023
    both = open_clip(flags(image_tower="tiny-rn:none", text_tower="tiny-bert:none", embed_dim=8))
    assert both.config.embed_dim == 8 and both.origin["name"] == "tiny-rn+tiny-bert"
    half = open_clip(flags(model="tiny", text_tower="tiny-bert:none", embed_dim=128))
    assert torch.equal(half.visual.proj, load("tiny").visual.proj)


# -----------------------------------------------------------------------------
# Two towers

def test_a_clips_own_projection_is_kept_where_it_fits_and_notes_say_what_is_random(tmp_path):
    file = save(make(), tmp_path / "clip.safetensors")
    base, kept = load(file), load(file, text_tower="tiny-bert:none", embed_dim=32)
    assert torch.equal(kept.visual.proj, base.visual.proj)
    assert kept.config.text == BERTS["tiny-bert"] and kept.text_kind == "wordpiece"
    assert kept.origin["notes"] == ["tiny-bert starts from random numbers"]
    assert kept.logit_scale.item() == pytest.approx(2.6593, abs=1e-4)
    for more in ({"embed_dim": 24}, {"embed_dim": 32, "proj": "mlp"}):
        new = load(file, text_tower="tiny-bert:none", **more)
        assert "visual.proj starts from random numbers" in new.origin["notes"]
        assert torch.equal(new.visual.ln_post.weight, base.visual.ln_post.weight)
    gelu = save(make(activation="gelu"), tmp_path / "gelu.safetensors")
    refused(lambda: load(file, image_tower=gelu), "GELU")
    assert load(gelu, text_tower="tiny-bert:none").config.activation == "gelu"
    swapped = load(file, image_tower="tiny-rn:none", embed_dim=32)
    assert torch.equal(swapped.encode_text(texts(base)), base.encode_text(texts(base)))


@pytest.mark.parametrize("towers", [
    {"text_tower": "roberta-base"}, {"image_tower": "tiny-vit:none"}, {},
    {"image_tower": "tiny-vit:none", "text_tower": "roberta-base"},
    {"image_tower": "resnet5000", "text_tower": "tiny-bert:none"},
    {"image_tower": "squeezenet1_0:nowhere.pt", "text_tower": "tiny-bert:none"},
    {"image_tower": "tiny-vit:none", "text_tower": "tiny-bert:none", "proj": "conv"}])
def test_what_makes_no_two_towers_is_refused_in_one_line(towers):
    refused(lambda: load(**towers))


def test_a_text_tower_of_bare_tensors_has_old_names_and_heads_of_other_tasks(tmp_path):
    bert = make(bert="bert").bert
    state = {f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"): t for name, t in bert.state_dict().items()}
    state |= {"bert.embeddings.position_ids": torch.arange(24)[None],
              "cls.predictions.bias": torch.zeros(VOCAB)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    ours = load(image_tower="tiny-vit:none", text_tower=tmp_path)
    assert torch.equal(ours.bert(texts(ours)), bert(texts(ours)))
    assert any("config.json" in note for note in ours.origin["notes"])
    report = convert.inspect(tmp_path / "pytorch_model.bin")
    assert report["architecture"] == "text tower" and report["config"]["family"] == "bert"
    torch.save({"fc.weight": torch.zeros(2, 3)}, tmp_path / "classifier.pt")
    report = convert.inspect(tmp_path / "classifier.pt")
    assert report["architecture"] is report["layout"] is None and "NAME:FILE" in report["why"]


# -----------------------------------------------------------------------------
# tools.convert

def test_convert_inspects_exports_and_shrinks(tmp_path):
    path = save(make(), tmp_path / "a.safetensors")
    report = json.loads(attempt(convert, "inspect", path, "--json").ok().out)
    assert report["parameters"] == sum(p.numel() for p in make().parameters())
    assert report["config"] == json.loads(json.dumps(dataclasses.asdict(make().config)))
    attempt(convert, "export", path, "--layout", "hf", "--out", tmp_path / "out").ok()
    assert same(load(tmp_path / "out" / "hf"), make())
    other = tmp_path / "out" / "hf" / "processor_config.json"
    other.write_text("{}")  # another model's, which would count
    attempt(convert, "export", path, "--layout", "hf", "--out", tmp_path / "out").ok()
    assert not other.exists()
    refused(attempt(convert, "export", path, "--layout", "chinese_clip", "--out", tmp_path), "clip")
    refused(attempt(convert, "shrink", path, "--like", "ViT-Z", "--out", tmp_path), "--like")
    refused(attempt(convert, "shrink", path, "--like", "ViT-8M/16", "--out", tmp_path / "b.pt"))
    refused(attempt(convert, "onnx", tmp_path / "none.pt", "--out", tmp_path), "none.pt")
    (tmp_path / "file").write_text("")
    for command in ("export", "onnx"):
        refused(attempt(convert, command, path, "--out", tmp_path / "file"), "--out", "file")
    out = tmp_path / "small.safetensors"
    model = make(vision_layers=4, vision_width=128)
    attempt(convert, "shrink", save(model, path), "--like", "tiny-vit", "--out", out).ok()
    small, theirs = load(out), model.state_dict()
    for name in ("attn.in_proj_weight", "mlp.c_fc.weight"):
        found = small.state_dict()[f"visual.transformer.resblocks.1.{name}"]
        source = theirs[f"visual.transformer.resblocks.2.{name}"]
        if name.startswith("attn"):  # the leading heads of queries, keys and values
            source = torch.cat([source[i:i + 64] for i in (0, 128, 256)])
        assert torch.equal(found, source[:len(found), :64])
    assert torch.equal(small.encode_text(texts(small)), model.encode_text(texts(model)))


@pytest.mark.slow
def test_convert_writes_onnx_that_gives_the_same_features(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    path = save(make(), tmp_path / "a.safetensors")
    assert run_main(convert, "onnx", path, "--out", tmp_path / "out")["difference"] < 1e-5
    assert {"image.onnx", "text.onnx"} <= {file.name for file in (tmp_path / "out").iterdir()}


# -----------------------------------------------------------------------------
# Fetching, from a server of our own

class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`: {path: bytes}. plan: what the next answers for weights are; then honest.
    linked: weights come from elsewhere, with their sha256 on the way, as from huggingface.co."""
    plan, log, files, linked = [], [], {}, ""

    def do_GET(self):
        content, large = self.files.get(self.path), not self.path.endswith((".json", ".txt"))
        if content is None:
            return self.send_error(404)
        begin = self.headers.get("Range")
        self.log.append((self.path, begin))
        if self.linked and large and not self.path.startswith("/cdn"):
            self.files["/cdn" + self.path] = content
            self.send_response(308)
            self.send_header("Location", "/cdn" + self.path)
            self.send_header("X-Linked-Etag", '"' + self.linked(content).hexdigest() + '"')
            return self.end_headers()
        step = self.plan.pop(0) if self.plan and large else "ok"
        begin = int(begin[6:-1]) if begin and step != "no ranges" else 0
        if isinstance(step, int) or begin >= len(content):
            return self.send_error(step if isinstance(step, int) else 416)
        body = b"<html>log in</html>" if step == "html" else content[begin:]
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"' + "f" * 64 + '"' if self.path.startswith("/cdn") else "x")
        self.end_headers()
        self.wfile.write(body[:len(body) // 2] if step == "break" else body)
        self.close_connection = True

    def log_message(self, *_):
        pass


NAME, CACHED = "openai/clip-vit-base-patch32", "openai--clip-vit-base-patch32"
NOBODY = "http://127.0.0.1:9/nothing"  # nobody listens there


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of one small released model, RN50, at /clip; the test scripts its answers."""
    content = save(make(), tmp_path / "source.pt", layout="openai").read_bytes()
    digest, cache = hashlib.sha256(content).hexdigest(), tmp_path / "home" / ".cache" / "clip"
    handler = type("Handler", (Server,), {
        "plan": [], "log": [], "files": {f"/clip/{digest}/RN50.pt": content}, "cache": cache,
        "digest": digest, "content": content, "target": cache / "RN50.pt"})
    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=http_server.serve_forever, args=(0.02,), daemon=True).start()
    handler.address = f"http://127.0.0.1:{http_server.server_port}"
    monkeypatch.setattr(weights, "OPENAI_URL", NOBODY)
    monkeypatch.setenv("CLIP_MIRROR", f"{handler.address}/clip/")
    monkeypatch.setenv("HF_ENDPOINT", handler.address + "/")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setitem(weights.RELEASED, "RN50", digest)
    yield handler
    http_server.shutdown()
    http_server.server_close()


def cached(server):
    """What lies in the cache under its final name."""
    return {p.name for p in server.cache.iterdir() if p.suffix not in (".lock", ".partial")}


@pytest.mark.parametrize("plan", [[500], ["break"], ["break", "no ranges"], ["html"]])
def test_a_released_name_is_fetched_once_whatever_passes_and_then_used_offline(server, monkeypatch,
                                                                               plan):
    server.plan.extend(plan)
    assert same(load("rn50"), make()) and load("rn50").origin["sha256"] == server.digest
    assert len(server.log) == 2
    if plan == ["break"]:  # goes on where it stopped
        assert server.log[1][1] == f"bytes={len(server.content) // 2}-"
    monkeypatch.setenv("CLIP_MIRROR", NOBODY)
    assert same(load("RN50"), make()) and cached(server) == {"RN50.pt"}
    (server.cache / "RN50.pt.lock").unlink()  # one that cannot be written, as in a read-only folder
    (server.cache / "RN50.pt.lock").mkdir()
    assert same(load("RN50"), make())


def test_a_released_name_has_a_second_source(server, monkeypatch):
    monkeypatch.setattr(weights, "OPENAI_URL", f"{server.address}/clip")
    for mirror in (NOBODY, f"{server.address}/empty", ""):
        monkeypatch.setenv("CLIP_MIRROR", mirror)
        assert same(load("RN50"), make())
        server.target.unlink()


def test_a_partial_or_damaged_file_of_an_earlier_run_is_completed_or_replaced(server):
    server.target.parent.mkdir(parents=True)
    partial = server.target.with_name("RN50.pt.partial")
    for begun in (server.content[:1000], server.content, b"x" * 1000):
        server.target.write_bytes(b"half of an older download")
        partial.write_bytes(begun)
        assert same(load("RN50"), make()) and not partial.exists()
        assert server.target.read_bytes() == server.content
        server.target.unlink()


def test_lasting_trouble_says_what_to_do_by_hand(server, monkeypatch):
    for step in (404, 500, "html", "break", "offline"):
        server.plan[:] = [step] * 3
        if step == "offline":
            monkeypatch.setenv("CLIP_MIRROR", NOBODY)
        refused(lambda: load("RN50"), "--weights", server.digest, server.target, "CLIP_MIRROR")
        assert cached(server) == set()


def test_processes_that_fetch_at_once_fetch_once(server):
    children = [Child(lambda: load("RN50") and 0) for _ in range(3)]
    assert [child.end().code for child in children] == [0, 0, 0]
    assert len(server.log) == 1 and server.target.read_bytes() == server.content


@pytest.fixture
def hub(tmp_path, server):
    """The server with a model of Hugging Face's in two shards -> it, the model"""
    model = make(bert="bert")
    model.image_mean = (0.1, 0.2, 0.3)
    path = export(model, tmp_path, "hf", WordPieceTokenizer(helpers.WORDS))
    files, (state, _, metadata) = {}, weights.read_file(path)
    where = {name: f"{'ab'[name < 'text']}.safetensors" for name in state}
    for shard in set(where.values()):
        part = {name: tensor for name, tensor in state.items() if where[name] == shard}
        files[shard] = b"".join(weights.safetensors_bytes(part, metadata))
    path.unlink()
    files |= {file.name: file.read_bytes() for file in path.parent.iterdir()}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": where}).encode()
    server.files |= {f"/{NAME}/resolve/main/{name}": data for name, data in files.items()}
    return server, model


@pytest.mark.parametrize("linked", [None, hashlib.sha256])
@pytest.mark.parametrize("plan", [[], ["ok", "break"], [503, "break", "no ranges"]])
def test_a_model_of_hugging_face_is_fetched_once_and_then_used_offline(hub, plan, linked,
                                                                       monkeypatch):
    server, model = hub
    server.linked = linked
    server.plan.extend(plan)
    image, text = images_for(model, 2), texts(model)
    assert all(map(torch.equal, load(NAME)(image, text), model(image, text)))
    assert any(begin for _, begin in server.log) == bool(plan) and cached(server) == {CACHED}
    monkeypatch.setenv("HF_ENDPOINT", NOBODY)
    found = open_clip(flags(weights=NAME))
    assert found.pixels == model.pixels and for_model(found).kind == "wordpiece"
    both = open_clip(flags(image_tower="tiny-vit:none", text_tower=NAME, embed_dim=32))
    assert for_model(both).kind == "wordpiece"
    assert torch.equal(both.encode_text(text), model.encode_text(text))
    both = open_clip(flags(image_tower=NAME, text_tower="tiny-vit:none", embed_dim=32))
    assert torch.equal(both.encode_image(image), model.encode_image(image))


def test_links_of_a_hubs_cache_keep_their_names(hub, tmp_path):
    server, _ = hub
    snapshot = tmp_path / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    load(NAME)
    for number, file in enumerate(list((server.cache / CACHED).iterdir())):
        if file.is_file():
            (snapshot / file.name).symlink_to(file.rename(file.with_name(f"blob{number}")))
    found = load(snapshot)
    assert for_model(found).kind == "wordpiece"
    assert same(load(a_run(tmp_path / "run", found, lambda name: name.endswith("bias"))), found)


@pytest.mark.parametrize("fault", ["dies", "checksum", "offline", "nothing there", "login", "html"])
def test_a_model_of_hugging_face_that_does_not_come_leaves_nothing_half(hub, monkeypatch, fault):
    server, model = hub
    server.plan[:] = {"dies": ["ok"] + ["break"] * 9, "login": [401] * 3}.get(fault, [fault])
    server.linked = hashlib.blake2s if fault == "checksum" else None
    if fault == "offline":
        monkeypatch.setenv("HF_ENDPOINT", NOBODY)
    if fault == "nothing there":
        server.files.clear()
    result = attempt(convert, "inspect", NAME)
    refused(result, NAME, server.cache / CACHED, "--weights")
    assert cached(server) == set() and not result.out
    if fault == "dies":  # the first shard is there and is not fetched again
        server.plan.clear()
        assert torch.equal(load(NAME).encode_text(texts(model)), model.encode_text(texts(model)))
        assert sum(path.endswith("/a.safetensors") for path, _ in server.log) == 1


def test_a_whole_model_of_an_unknown_kind_is_kept_and_a_cut_table_is_not(hub):
    server, _ = hub
    for content, place in ((b'{"model_type":', ".partial"),
                           (b'{"model_type": "siglip"}', "/model.safetensors.index.json")):
        server.files[f"/{NAME}/resolve/main/config.json"] = content
        refused(attempt(convert, "inspect", NAME), CACHED + place)
        assert cached(server) == (set() if place == ".partial" else {CACHED})
