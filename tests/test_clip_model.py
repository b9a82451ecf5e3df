"""clip_model.py: published names and counts, exactness of its shortcuts, and files it must not trust."""
import copy
import dataclasses
import gzip
import hashlib
import http.server
import io
import json
import math
import multiprocessing
import os
import pathlib
import pickle
import random
import struct
import subprocess
import sys
import threading
import time
import warnings
import zipfile

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import clip_model
from clip_model import (CLIP, CONFIGS, RELEASED, Attention, AttentionPool2d, QuickGELU, Transformer,
                        WeightsError, canonical_name, config_from_state_dict, load, save, trim)

VOCAB = 64
NINE = list(RELEASED)


def small(name="tiny-vit", **changes):
    return dataclasses.replace(CONFIGS[name], **{"vocab_size": VOCAB, **changes})


def make(name="tiny-vit", seed=0, **changes):
    """A small model with every tensor moved away from its initial value (zeros prove nothing)."""
    torch.manual_seed(seed)
    model = CLIP(small(name, **changes)).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point() and tensor.dim():
                tensor.add_(0.05 * torch.randn_like(tensor))
    return model


def some_texts(lengths, seed=0, vocab=VOCAB, context=77):
    """Start of text, random ids, end of text, zeros; lengths count both ends."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.zeros(len(lengths), context, dtype=torch.long)
    for row, length in zip(tokens, lengths):
        row[:length] = torch.randint(1, vocab - 2, (length,), generator=generator)
        row[0], row[length - 1] = vocab - 2, vocab - 1
    return tokens


def some_images(n, size, seed=0):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def same_weights(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# -----------------------------------------------------------------------------
# Published names, shapes and counts

COUNTS = {  # contrastive.md 1.6: total, image tower
    "RN50": (102_007_137, 38_316_896), "RN101": (119_688_033, 56_259_936),
    "RN50x4": (178_300_601, 87_137_080), "RN50x16": (290_979_217, 167_328_912),
    "RN50x64": (623_258_305, 420_380_352), "ViT-B/32": (151_277_313, 87_849_216),
    "ViT-B/16": (149_620_737, 86_192_640), "ViT-L/14": (427_616_513, 303_966_208),
    "ViT-L/14@336px": (427_944_193, 304_293_888),
}


def published_tensors(config):
    """Names and shapes as OpenAI published them, written from their description."""
    out = {}

    def norm(name, width, batch=False):
        out[name + ".weight"] = out[name + ".bias"] = (width,)
        if batch:
            out[name + ".running_mean"] = out[name + ".running_var"] = (width,)
            out[name + ".num_batches_tracked"] = ()

    def linear(name, fan_out, fan_in):
        out[name + ".weight"], out[name + ".bias"] = (fan_out, fan_in), (fan_out,)

    def blocks(prefix, width, layers):
        for i in range(layers):
            block = f"{prefix}transformer.resblocks.{i}"
            out[block + ".attn.in_proj_weight"] = (3 * width, width)
            out[block + ".attn.in_proj_bias"] = (3 * width,)
            linear(block + ".attn.out_proj", width, width)
            norm(block + ".ln_1", width)
            linear(block + ".mlp.c_fc", 4 * width, width)
            linear(block + ".mlp.c_proj", width, 4 * width)
            norm(block + ".ln_2", width)

    width, embed = config.vision_width, config.embed_dim
    if config.vision_patch:
        tokens = (config.image_size // config.vision_patch) ** 2 + 1
        out["visual.conv1.weight"] = (width, 3, config.vision_patch, config.vision_patch)
        out["visual.class_embedding"] = (width,)
        out["visual.positional_embedding"] = (tokens, width)
        norm("visual.ln_pre", width)
        blocks("visual.", width, config.vision_layers)
        norm("visual.ln_post", width)
        out["visual.proj"] = (width, embed)
    else:
        for i, (fan_in, fan_out) in enumerate(
                [(3, width // 2), (width // 2, width // 2), (width // 2, width)], 1):
            out[f"visual.conv{i}.weight"] = (fan_out, fan_in, 3, 3)
            norm(f"visual.bn{i}", fan_out, batch=True)
        fan_in = width
        for stage, count in enumerate(config.vision_layers):
            planes = width << stage
            for i in range(count):
                block = f"visual.layer{stage + 1}.{i}"
                for k, shape in enumerate([(planes, fan_in, 1, 1), (planes, planes, 3, 3),
                                           (4 * planes, planes, 1, 1)], 1):
                    out[f"{block}.conv{k}.weight"] = shape
                    norm(f"{block}.bn{k}", shape[0], batch=True)
                if i == 0:
                    out[f"{block}.downsample.0.weight"] = (4 * planes, fan_in, 1, 1)
                    norm(f"{block}.downsample.1", 4 * planes, batch=True)
                fan_in = 4 * planes
        side, channels = config.image_size // 32, 32 * width
        out["visual.attnpool.positional_embedding"] = (side * side + 1, channels)
        for letter in "qkv":
            linear(f"visual.attnpool.{letter}_proj", channels, channels)
        linear("visual.attnpool.c_proj", embed, channels)
    width = config.text_width
    blocks("", width, config.text_layers)
    out["token_embedding.weight"] = (config.vocab_size, width)
    out["positional_embedding"] = (config.context_length, width)
    norm("ln_final", width)
    out["text_projection"] = (width, embed)
    out["logit_scale"] = ()
    return out


def on_meta(config):
    with torch.device("meta"):
        return CLIP(config)


@pytest.mark.parametrize("name", NINE)
def test_released_sizes_have_the_published_names_shapes_and_counts(name):
    model = on_meta(CONFIGS[name])
    found = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    assert found == published_tensors(CONFIGS[name])
    total = sum(p.numel() for p in model.parameters())
    visual = sum(p.numel() for p in model.visual.parameters())
    assert (total, visual) == COUNTS[name]
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_config_is_inferred_from_shapes_alone(name):
    assert config_from_state_dict(on_meta(CONFIGS[name]).state_dict()) == CONFIGS[name]


def test_head_widths_of_the_released_models():
    for name in NINE:
        config, model = CONFIGS[name], on_meta(CONFIGS[name])
        assert model.transformer.resblocks[0].attn.heads == config.text_width // 64
        if config.vision_patch:
            assert model.visual.transformer.resblocks[0].attn.heads == config.vision_width // 64
        else:
            assert model.visual.attnpool.heads == config.vision_width * 32 // 64


def test_released_hashes_and_files_are_openais():
    assert set(RELEASED) == set(COUNTS)
    assert all(len(digest) == 64 and int(digest, 16) for _, digest in RELEASED.values())
    assert RELEASED["ViT-B/16"][1].startswith("5806e77cd80f8b59")
    assert RELEASED["ViT-L/14@336px"][0] == "ViT-L-14-336px.pt"
    assert len({digest for _, digest in RELEASED.values()}) == 9


def test_names_are_found_however_they_are_spelt():
    for spelling, name in [("ViT-B-16", "ViT-B/16"), ("vit_b16", "ViT-B/16"), ("rn50", "RN50"),
                           ("RN50X4", "RN50x4"), ("ViT-L-14-336", "ViT-L/14@336px"),
                           ("vit-l/14@336px", "ViT-L/14@336px"), ("Tiny", "tiny")]:
        assert canonical_name(spelling) == name
    assert canonical_name("ViT-B/8") is None


# -----------------------------------------------------------------------------
# Exactness, against twins in float64

def test_attention_is_torchs_multihead_attention():
    torch.manual_seed(0)
    ours = Attention(48, 4).double()
    theirs = nn.MultiheadAttention(48, 4, batch_first=True).double()
    nn.init.normal_(ours.in_proj_bias)
    nn.init.normal_(ours.out_proj.bias)
    theirs.load_state_dict(ours.state_dict())  # strict: the names are the same
    x = torch.randn(3, 7, 48, dtype=torch.float64)
    mask = torch.full((7, 7), -math.inf, dtype=torch.float64).triu(1)
    for causal in (False, True):
        expected = theirs(x, x, x, attn_mask=mask if causal else None, need_weights=False)[0]
        torch.testing.assert_close(ours(x, causal), expected, rtol=0, atol=1e-12)
        rows = torch.tensor([0, 6, 3])
        torch.testing.assert_close(ours(x, causal, rows), expected[range(3), rows], rtol=0, atol=1e-12)
    torch.testing.assert_close(ours(x, rows=0), theirs(x, x, x)[0][:, 0], rtol=0, atol=1e-12)


def test_attention_pool_is_torchs_functional_form():
    torch.manual_seed(0)
    pool = AttentionPool2d(side=3, channels=64, heads=4, embed_dim=10).double()
    x = torch.randn(2, 64, 3, 3, dtype=torch.float64)
    sequence = x.flatten(2).permute(2, 0, 1)
    sequence = torch.cat([sequence.mean(0, keepdim=True), sequence])
    sequence = sequence + pool.positional_embedding[:, None]
    expected = F.multi_head_attention_forward(
        sequence[:1], sequence, sequence, 64, 4, None,
        torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias]), None, None, False, 0,
        pool.c_proj.weight, pool.c_proj.bias, training=False, need_weights=False,
        use_separate_proj_weight=True, q_proj_weight=pool.q_proj.weight,
        k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight)[0][0]
    torch.testing.assert_close(pool(x), expected, rtol=0, atol=1e-12)


def twin_norm(x, state, name):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * state[name + ".weight"] + state[name + ".bias"]


def twin_blocks(x, state, prefix, layers, heads, causal, activation):
    """All rows of all blocks, one sample and one head at a time: (L, W) -> (L, W)."""
    length, width = x.shape
    size = width // heads
    for i in range(layers):
        def get(name):
            return state[f"{prefix}transformer.resblocks.{i}.{name}"]
        y = twin_norm(x, state, f"{prefix}transformer.resblocks.{i}.ln_1")
        q, k, v = (y @ get("attn.in_proj_weight").t() + get("attn.in_proj_bias")).split(width, -1)
        heads_out = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = q[:, part] @ k[:, part].t() / size ** 0.5
            if causal:
                for row in range(length):
                    scores[row, row + 1:] = -math.inf
            heads_out.append(scores.softmax(-1) @ v[:, part])
        x = x + torch.cat(heads_out, -1) @ get("attn.out_proj.weight").t() + get("attn.out_proj.bias")
        y = twin_norm(x, state, f"{prefix}transformer.resblocks.{i}.ln_2")
        y = y @ get("mlp.c_fc.weight").t() + get("mlp.c_fc.bias")
        y = y / (1 + (-1.702 * y).exp()) if activation == "quick_gelu" else (
            y * 0.5 * (1 + torch.erf(y / 2 ** 0.5)))
        x = x + y @ get("mlp.c_proj.weight").t() + get("mlp.c_proj.bias")
    return x


def twin_text(model, tokens):
    """OpenAI's text tower as described: 77 positions, full mask, every row of every block."""
    config, state = model.config, {k: v.detach().double() for k, v in model.state_dict().items()}
    out = []
    for ids in tokens:
        x = state["token_embedding.weight"][ids] + state["positional_embedding"]
        x = twin_blocks(x, state, "", config.text_layers, config.text_width // config.text_head,
                        True, config.activation)
        x = twin_norm(x, state, "ln_final")
        end = next(i for i, token in enumerate(ids) if token == config.vocab_size - 1)
        out.append(x[end] @ state["text_projection"])
    return torch.stack(out)


def twin_vit(model, images):
    config, state = model.config, {k: v.detach().double() for k, v in model.state_dict().items()}
    patch, grid, out = config.vision_patch, config.image_size // config.vision_patch, []
    for image in images.double():
        rows = [state["visual.class_embedding"]]
        for i in range(grid):
            for j in range(grid):
                pixels = image[:, i * patch:(i + 1) * patch, j * patch:(j + 1) * patch]
                rows.append((state["visual.conv1.weight"] * pixels).sum((1, 2, 3)))
        x = torch.stack(rows) + state["visual.positional_embedding"]
        x = twin_blocks(twin_norm(x, state, "visual.ln_pre"), state, "visual.", config.vision_layers,
                        config.vision_width // config.vision_head, False, config.activation)
        out.append(twin_norm(x[0], state, "visual.ln_post") @ state["visual.proj"])
    return torch.stack(out)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_towers_equal_their_naive_twins(activation):
    model = make(activation=activation, vision_head=16, text_head=32).double()
    tokens, images = some_texts([2, 9, 77, 30]), some_images(3, 32).double()
    torch.testing.assert_close(model.encode_text(tokens), twin_text(model, tokens), rtol=0, atol=1e-12)
    torch.testing.assert_close(model.encode_image(images), twin_vit(model, images), rtol=0, atol=1e-12)


def test_the_last_blocks_shortcut_equals_all_rows():
    torch.manual_seed(0)
    tower = Transformer(32, 3, 2, "quick_gelu").double()
    x, rows = torch.randn(4, 11, 32, dtype=torch.float64), torch.tensor([10, 0, 4, 4])
    for causal in (False, True):
        everything = x
        for block in tower.resblocks:
            everything = block(everything, causal)
        shortcut = tower(x, rows, causal)
        torch.testing.assert_close(shortcut, everything[range(4), rows], rtol=0, atol=1e-12)
    torch.testing.assert_close(tower(x, 0), tower(x, torch.zeros(4, dtype=torch.long)),
                               rtol=0, atol=1e-12)


def test_gradients_through_the_shortcuts_equal_the_twins():
    model = make().double()
    tokens = some_texts([5, 12, 3])
    weight = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (model.encode_text(tokens) * weight).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    state = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    features = []
    for ids, end in zip(tokens, [4, 11, 2]):
        x = state["token_embedding.weight"][ids] + state["positional_embedding"]
        x = twin_norm(twin_blocks(x, state, "", 2, 1, True, "quick_gelu"), state, "ln_final")
        features.append(x[end] @ state["text_projection"])
    (torch.stack(features) * weight).sum().backward()
    assert found  # and nothing of the image tower moved
    assert not any(name.startswith("visual.") for name in found)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, state[name].grad, rtol=0, atol=1e-11)


def test_text_features_do_not_depend_on_the_length_of_the_batch():
    model = make().double()
    tokens = some_texts([4, 15, 9])
    whole = model.encode_text(tokens)
    for length in (15, 20, 77):
        torch.testing.assert_close(model.encode_text(tokens[:, :length]), whole, rtol=0, atol=1e-12)
        ends = tokens.argmax(-1)  # `ends` given: no cut at all
        torch.testing.assert_close(model.encode_text(tokens[:, :length], ends=ends), whole,
                                   rtol=0, atol=1e-12)
    longer = torch.cat([tokens, some_texts([70], seed=1)])
    torch.testing.assert_close(model.encode_text(longer)[:3], whole, rtol=0, atol=1e-12)
    for i in range(3):
        torch.testing.assert_close(model.encode_text(tokens[i:i + 1])[0], whole[i], rtol=0, atol=1e-12)


def test_what_stands_after_the_end_of_text_changes_nothing():
    model = make().double()
    tokens = some_texts([4, 15, 9])
    changed = tokens.clone()
    for row, end in zip(changed, (3, 14, 8)):
        row[end + 1:] = torch.randint(1, VOCAB, (76 - end,))  # a second end of text may be among it
        row[-1] = VOCAB - 1
    torch.testing.assert_close(model.encode_text(changed), model.encode_text(tokens), rtol=0, atol=1e-12)
    changed = tokens.clone()
    changed[:, 1] = 7  # but what stands before it does
    assert (model.encode_text(changed) - model.encode_text(tokens)).abs().max() > 1e-4


def test_trim_cuts_to_the_longest_text_and_keeps_an_empty_batch():
    cut, ends = trim(some_texts([4, 15, 9]))
    assert cut.shape == (3, 15) and ends.tolist() == [3, 14, 8]
    model = make()
    assert model.encode_text(torch.zeros(0, 77, dtype=torch.long)).shape == (0, 32)
    assert model.encode_image(torch.zeros(0, 3, 32, 32)).shape == (0, 32)


def test_quick_gelu_is_x_times_sigmoid_of_1_702_x():
    x = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    torch.testing.assert_close(QuickGELU()(x), x / (1 + torch.exp(-1.702 * x)), rtol=0, atol=1e-14)
    assert (QuickGELU()(x) - F.gelu(x)).abs().max() > 0.01


def test_initial_weights_have_the_papers_statistics():
    torch.manual_seed(0)
    config = small(text_width=256, text_layers=3, vocab_size=4000, embed_dim=128, vision_width=192)
    model = CLIP(config)

    def spread(tensor, expected):
        assert tensor.std().item() == pytest.approx(expected, rel=0.05)
        assert abs(tensor.mean().item()) < 5 * expected / tensor.numel() ** 0.5
    W, layers = 256, 3
    spread(model.token_embedding.weight, 0.02)
    spread(model.positional_embedding, 0.01)
    spread(model.text_projection, W ** -0.5)
    for block in model.transformer.resblocks:
        spread(block.attn.in_proj_weight, W ** -0.5)
        spread(block.attn.out_proj.weight, W ** -0.5 * (2 * layers) ** -0.5)
        spread(block.mlp.c_proj.weight, W ** -0.5 * (2 * layers) ** -0.5)
        spread(block.mlp.c_fc.weight, (2 * W) ** -0.5)
        assert not block.attn.in_proj_bias.any() and not block.attn.out_proj.bias.any()
        assert (block.ln_1.weight == 1).all() and block.ln_1.eps == 1e-5
    spread(model.visual.proj, 192 ** -0.5)
    spread(model.visual.positional_embedding, 192 ** -0.5)
    vit = model.visual.transformer.resblocks[0]  # torch's defaults: uniform
    assert vit.attn.in_proj_weight.abs().max() <= (6 / (4 * 192)) ** 0.5
    spread(vit.attn.in_proj_weight, (6 / (4 * 192)) ** 0.5 / 3 ** 0.5)
    spread(vit.mlp.c_fc.weight, 192 ** -0.5 / 3 ** 0.5)
    assert model.logit_scale.item() == pytest.approx(2.6593, abs=1e-4)

    model = CLIP(small("tiny-rn", vision_layers=(2, 1, 1, 1)))
    channels = 32 * 8
    for letter in "qkvc":
        spread(getattr(model.visual.attnpool, letter + "_proj").weight, channels ** -0.5)
    gains = {n: p for n, p in model.visual.named_parameters() if n.endswith("bn3.weight")}
    assert len(gains) == 6 and (gains.pop("bn3.weight") == 1).all()  # the stem's is not a branch
    assert not any(gain.any() for gain in gains.values())


def test_forward_gives_unit_fp32_rows_also_under_autocast():
    for name, size in (("tiny-vit", 32), ("tiny-rn", 64)):
        model = make(name)
        images, tokens = some_images(2, size), some_texts([5, 9, 3])
        exact = model(images, tokens)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(images, tokens)
        for image, text, scale in (exact, rough):
            assert image.shape == (2, 32) and text.shape == (3, 32) and scale.shape == ()
            assert image.dtype == text.dtype == scale.dtype == torch.float32
            torch.testing.assert_close(image.norm(dim=1), torch.ones(2), rtol=0, atol=1e-6)
            torch.testing.assert_close(text.norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)
            assert scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
        assert (exact[0] - rough[0]).abs().max() < 0.1
    raw = model.encode_image(images)
    torch.testing.assert_close(model.encode_image(images, normalize=True),
                               raw / raw.norm(dim=1, keepdim=True))


def test_images_of_another_size_are_refused_in_words():
    with pytest.raises(ValueError, match=r"\(40, 32\) pixels and this model takes \(32, 32\)"):
        make().encode_image(torch.zeros(1, 3, 40, 32))


def test_a_head_width_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="does not divide"):
        CLIP(small(text_head=48))
    with pytest.raises(ValueError, match="activation"):
        CLIP(small(activation="relu"))


# -----------------------------------------------------------------------------
# Files there and back

class OpenAIShaped(CLIP):
    """A CLIP with the three extra scalars of the released archives."""

    def __init__(self, config):
        super().__init__(config)
        for name in ("input_resolution", "context_length", "vocab_size"):
            value = config.image_size if name == "input_resolution" else getattr(config, name)
            self.register_buffer(name, torch.tensor(value))


def torchscript_file(path, model):
    """What OpenAI published: a traced CLIP, matrices in half precision, and its state dict."""
    config = model.config
    shaped = OpenAIShaped(config).eval()
    shaped.load_state_dict(model.state_dict(), strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated and warns of the reader's shortcuts
        traced = torch.jit.trace(shaped, (some_images(2, config.image_size), some_texts([5, 9])),
                                 check_trace=False)
        for parameter in traced.parameters():
            if parameter.dim() > 1:
                parameter.data = parameter.data.half()
        traced.save(str(path))
        return torch.jit.load(str(path), map_location="cpu").state_dict()


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """{"tiny-vit": (path, state dict), "tiny-rn": ...} of TorchScript archives, made once."""
    folder = tmp_path_factory.mktemp("archives")
    return {name: (folder / f"{name}.pt", torchscript_file(folder / f"{name}.pt", make(name)))
            for name in ("tiny-vit", "tiny-rn")}


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
def test_a_torchscript_archive_is_read_bit_for_bit_without_running_it(archives, name):
    path, reference = archives[name]
    names = zipfile.ZipFile(path).infolist()
    assert any(i.compress_type == zipfile.ZIP_DEFLATED for i in names)  # its code, as in the real ones
    content, kind, _ = clip_model.read_file(path)
    assert kind == "TorchScript archive"
    assert content.keys() == reference.keys()
    for key, tensor in reference.items():
        assert content[key].dtype == tensor.dtype and torch.equal(content[key], tensor)
    assert {"input_resolution", "context_length", "vocab_size"} <= reference.keys()
    model = load(path)
    assert model.config == small(name) and model.origin["format"] == "TorchScript archive"
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, reference[key].to(tensor.dtype))


def test_extra_tensors_of_script_modules_do_not_disturb(tmp_path):
    state = make().state_dict()
    state["transformer.resblocks.0.attn_mask"] = torch.zeros(77, 77)
    state["attn_mask"], state["vocab_size"] = torch.zeros(77, 77), torch.tensor(64)
    torch.save(state, tmp_path / "a.pt")
    assert load(tmp_path / "a.pt").config == small()


LAYOUTS = ["model.safetensors", "openai/model.pt", "openai/model.safetensors", "open_clip/model.pt",
           "open_clip/folder", "hf/folder", "hf/pytorch_model.bin"]


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
@pytest.mark.parametrize("target", LAYOUTS)
def test_every_layout_comes_back_as_it_went(tmp_path, name, target):
    model = make(name)
    layout = target.split("/")[0] if "/" in target else "safetensors"
    path = tmp_path / target.split("/")[-1]
    if layout == "hf" and name == "tiny-rn":
        with pytest.raises(WeightsError, match="no ResNet image tower"):
            save(model, path, layout=layout)
        return
    before = copy.deepcopy(model.state_dict())
    written = save(model, path, layout=layout)
    assert written.is_file() and not list(tmp_path.rglob("*.partial"))
    back = load(path)
    assert same_weights(back, model) and back.config == model.config
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert back.origin["layout"] == ("hf" if layout == "hf" else "openai")
    assert back.origin["sha256"] == hashlib.sha256(written.read_bytes()).hexdigest()
    images, tokens = some_images(2, model.config.image_size), some_texts([5, 9])
    for one, two in zip(back(images, tokens), model(images, tokens)):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_load_gives_contiguous_fp32_masters_in_eval_mode(tmp_path, archives, name, dtype):
    files = [save(make(name), tmp_path / "a.safetensors", dtype=dtype),
             save(make(name), tmp_path / "b.pt", layout="openai", dtype=dtype), archives[name][0]]
    if name == "tiny-vit":
        files.append(save(make(name), tmp_path / "hf", layout="hf", dtype=dtype))
        strided = {key: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor
                   for key, tensor in make(name).state_dict().items()}
        torch.save(strided, tmp_path / "strided.pt")
        files.append(tmp_path / "strided.pt")
    for file in files:
        model = load(file)
        assert not model.training and not any(module.training for module in model.modules())
        for key, tensor in model.state_dict(keep_vars=True).items():
            assert tensor.is_contiguous() and tensor.device.type == "cpu", key
            if key.endswith("num_batches_tracked"):
                assert tensor.dtype == torch.long
            else:
                assert tensor.dtype == torch.float32
        assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    assert all(p.is_contiguous() for p in CLIP(small(name)).parameters())
    loaded = load(files[0])
    assert dtype == torch.float64 or not same_weights(loaded, make(name))
    assert torch.allclose(loaded.ln_final.weight, make(name).ln_final.weight, atol=0.02)


def test_a_whole_state_dict_cast_to_half_loads(tmp_path):
    """Many files are written as {k: v.half()}, integer counters and all; others lack the counters."""
    state = {key: tensor.half() for key, tensor in make("tiny-rn").state_dict().items()}
    torch.save(state, tmp_path / "half.pt")
    assert load(tmp_path / "half.pt").visual.bn1.num_batches_tracked.dtype == torch.long
    state = {key: tensor for key, tensor in state.items() if "num_batches" not in key}
    torch.save(state, tmp_path / "old.pt")
    model = load(tmp_path / "old.pt")
    assert model.visual.bn1.num_batches_tracked.item() == 0
    model.train()(some_images(2, 64), some_texts([3, 4]))
    assert model.visual.bn1.num_batches_tracked.item() == 1


def test_sizes_that_shapes_cannot_tell_travel_with_the_file(tmp_path):
    model = make(activation="gelu", vision_head=16, text_head=32)
    for layout, path in [("safetensors", tmp_path / "a.safetensors"), ("safetensors", tmp_path / "a.pt"),
                         ("open_clip", tmp_path / "folder"), ("hf", tmp_path / "hf")]:
        save(model, path, layout=layout)
        assert load(path).config == model.config
    narrow = make(text_width=32, text_head=8, vision_width=16, vision_head=8)  # narrower than a head
    save(narrow, tmp_path / "narrow.safetensors")
    assert load(tmp_path / "narrow.safetensors").config == narrow.config
    save(make(), tmp_path / "bare.pt", layout="open_clip")
    assert load(tmp_path / "bare.pt", activation="gelu").config.activation == "gelu"
    assert load(tmp_path / "bare.pt").config.activation == "quick_gelu"
    with pytest.raises(WeightsError, match="'relu' is not one of"):
        load(tmp_path / "bare.pt", activation="relu")
    with pytest.raises(WeightsError, match="QuickGELU"):  # OpenAI's code would compute another model
        save(model, tmp_path / "b.pt", layout="openai")
    with pytest.raises(WeightsError, match="unknown layout"):
        save(model, tmp_path / "b.pt", layout="onnx")
    assert not (tmp_path / "b.pt").exists()


def test_safetensors_files_open_in_the_safetensors_package_and_back(tmp_path):
    package = pytest.importorskip("safetensors.torch", reason="the safetensors package is not here")
    for dtype in (None, torch.float16, torch.bfloat16):
        model = make("tiny-rn")
        path = save(model, tmp_path / "ours.safetensors", dtype=dtype)
        theirs = package.load_file(path)
        for key, tensor in model.state_dict().items():
            assert torch.equal(theirs[key], tensor.to(dtype) if tensor.is_floating_point() and dtype
                               else tensor), key
        package.save_file(theirs, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
        content, kind, metadata = clip_model.read_file(tmp_path / "theirs.safetensors")
        assert kind == "safetensors" and metadata == {"format": "pt"}
        assert all(torch.equal(content[key], theirs[key]) for key in theirs)
    tensors = {"empty": torch.zeros(0, 3), "bool": torch.tensor([True, False]),
               "byte": torch.arange(5, dtype=torch.uint8), "scalar": torch.tensor(3.5),
               "long": torch.arange(7), "double": torch.randn(3, 5, dtype=torch.float64)}
    package.save_file(tensors, tmp_path / "mixed.safetensors")
    content, _, _ = clip_model.read_file(tmp_path / "mixed.safetensors")
    assert content.keys() == tensors.keys()
    assert all(torch.equal(content[key], tensors[key]) and content[key].dtype == tensors[key].dtype
               for key in tensors)


@pytest.mark.parametrize("prefixes", [
    ["module."], ["_orig_mod."], ["model."], ["clip."], ["module.", "_orig_mod."],
    ["_orig_mod.", "module."], ["model.", "clip.", "module."], ["module.", "module."]])
def test_prefixes_of_wrappers_are_taken_off_and_reported(tmp_path, prefixes):
    model = make("tiny-rn")
    state = {"".join(prefixes) + key: tensor for key, tensor in model.state_dict().items()}
    torch.save(state, tmp_path / "a.pt")
    back = load(tmp_path / "a.pt")
    assert same_weights(back, model)
    *removed, activation = back.origin["notes"]
    assert removed == [f"prefix {prefix!r} removed" for prefix in prefixes]
    assert "QuickGELU" in activation  # a bare state dict cannot say it


@pytest.mark.parametrize("keys", [["state_dict"], ["model"], ["model_state_dict"], ["module"],
                                  ["net"], ["weights"], ["ema"], ["model", "state_dict"]])
def test_weights_are_found_inside_a_training_checkpoint(tmp_path, keys):
    model = make()
    content = model.state_dict()
    for key in reversed(keys):
        content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"step": torch.tensor(1.)}}},
                   "rng": torch.get_rng_state(), "note": None, 7: torch.zeros(2)}
    for legacy in (False, True):
        torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
        back = load(tmp_path / "a.pt")
        assert same_weights(back, model)
        assert back.origin["notes"][:len(keys)] == [f"weights found under {k!r}" for k in keys]
        assert back.origin["format"] == ("PyTorch pickle" if legacy else "PyTorch zip")


def test_tensors_under_numbers_are_not_taken_for_weights(tmp_path):
    torch.save({0: torch.zeros(3), 1: torch.zeros(2)}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match="holds no tensors under names"):
        load(tmp_path / "a.pt")


def test_a_bundled_model_stores_only_the_embedding_rows_in_use(tmp_path):
    model = make()
    rows = torch.tensor([3, 5, 40, VOCAB - 2, VOCAB - 1])
    path = save(model, tmp_path / "rows.safetensors", dtype=torch.float16, token_rows=rows)
    assert path.stat().st_size < save(model, tmp_path / "all.safetensors", dtype=torch.float16
                                      ).stat().st_size - 50 * 64 * 2
    back = load(path)
    assert back.config == model.config and back.token_embedding.weight.shape == (VOCAB, 64)
    stored = model.token_embedding.weight[rows].half().float()
    assert torch.equal(back.token_embedding.weight[rows], stored)
    others = [i for i in range(VOCAB) if i not in rows.tolist()]
    assert not back.token_embedding.weight[others].any()
    assert clip_model.inspect(path)["architecture"] == "CLIP"
    for bad in (torch.tensor([3, 64]), torch.tensor([-1])):
        state = {"token_embedding.rows": bad, "token_embedding.weight": torch.zeros(len(bad), 4)}
        with pytest.raises(WeightsError, match="does not fit"):
            clip_model.spread_embedding(state, VOCAB)
    with pytest.raises(WeightsError, match="token_rows needs the layout safetensors"):
        save(model, tmp_path / "a.pt", layout="openai", token_rows=rows)


def test_hugging_face_names_map_both_ways():
    model = make()
    theirs = clip_model.to_hugging_face(model.state_dict())
    assert theirs["visual_projection.weight"].shape == (32, 64)
    assert torch.equal(theirs["text_projection.weight"], model.text_projection.t())
    q = theirs["vision_model.encoder.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(q, model.visual.transformer.resblocks[1].attn.in_proj_weight[:64])
    assert "vision_model.pre_layrnorm.weight" in theirs and len(theirs) == 2 * 2 * 16 + 14
    theirs["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # older files have it
    back = clip_model.from_hugging_face(theirs)
    state = model.state_dict()
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)


def test_an_interrupted_save_leaves_the_older_file(tmp_path, monkeypatch):
    path = save(make(), tmp_path / "a.safetensors")
    old = path.read_bytes()
    for call, error in (("fsync", OSError(28, "No space left on device")),
                        ("replace", KeyboardInterrupt())):
        def fail(*_, error=error):
            raise error
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(type(error)):
                save(make(seed=1), path)
        assert path.read_bytes() == old
    assert same_weights(load(path), make())
    save(make(seed=1), path)
    assert same_weights(load(path), make(seed=1)) and len(list(tmp_path.iterdir())) == 1


# -----------------------------------------------------------------------------
# Bad files: each is named as what it is, in one line, and nothing in it runs

class Payload:
    """Unpickling this runs a shell command; the canary shows whether it did."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def zip_of(members, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def safetensors_of(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def members_of(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def flipped_in(data, member):
    """One bit of a stored member turned over."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        info = archive.getinfo(member)
    data = bytearray(data)
    start = info.header_offset
    name, extra = struct.unpack("<HH", data[start + 26:start + 30])
    data[start + 30 + name + extra + info.file_size // 2] ^= 1
    return bytes(data)


def bad_files():
    """name -> (file name, function of the canary path giving its bytes, what the message must say)"""
    state = make().state_dict()
    rn = make("tiny-rn").state_dict()
    good, tensors = saved(state), b"".join(clip_model.safetensors_bytes(state, {}))
    self_holding = {}
    self_holding["model"] = self_holding
    first = next(name for name in members_of(good) if "/data/" in name)

    def without(name):
        return saved({key: tensor for key, tensor in state.items() if key != name})

    def changed(**changes):
        return saved({**state, **{key.replace("__", "."): value for key, value in changes.items()}})

    def script(pickled, **members):
        return zip_of({"m/data.pkl": pickled, "m/code/__torch__.py": "", "m/version": "3",
                       "m/constants.pkl": pickle.dumps(()), **members})
    hf = clip_model.to_hugging_face(state)
    cases = {
        "empty": ("a.pt", b"", "is empty (0 bytes)"),
        "html": ("a.pt", b"\n<!DOCTYPE html><html>Log in</html>", "is a web page"),
        "xml": ("a.pt", b"<?xml version='1.0'?><Error>AccessDenied</Error>", "is a web page"),
        "lfs pointer": ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n"
                        b"size 890579\n", "is a Git LFS pointer"),
        "gzip": ("a.pt", gzip.compress(good), "is gzip-compressed"),
        "truncated zip": ("a.pt", good[:len(good) // 2], "is truncated"),
        "bit flip in a tensor": ("a.pt", flipped_in(good, first), "is damaged (a member fails"),
        "bit flip in the pickle": ("a.pt", flipped_in(good, first.split("/")[0] + "/data.pkl"),
                                   "is damaged (a member fails"),
        "zip of something else": ("a.pt", zip_of({"word/document.xml": "x"}), "no data.pkl"),
        "empty zip": ("a.zip", zip_of({}), "no data.pkl"),
        "compressed zip": ("a.pt", zip_of(members_of(good), zipfile.ZIP_DEFLATED), "repacked"),
        "random bytes": ("a.pt", bytes(random.Random(0).randbytes(5000)), "is not a weight file"),
        "random bytes as safetensors": ("a.safetensors", bytes(random.Random(1).randbytes(5000)),
                                        "is not a safetensors file, or truncated"),
        "text": ("a.txt", b"hello, these are no weights", "is not a weight file"),
        "three bytes": ("a.safetensors", b"abc", "is not a safetensors file, or truncated"),
        "truncated safetensors": ("a.safetensors", tensors[:-100], "damaged or truncated safetensors"),
        "truncated header": ("a.safetensors", tensors[:500], "is not a safetensors file, or truncated"),
        "longer than said": ("a.safetensors", tensors + b"x", "bytes where the header says"),
        "overlapping": ("a.safetensors", safetensors_of({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
                        "tensor 'b' does not fit its place"),
        "the same place twice": ("a.safetensors", safetensors_of({"a": entry(0, 8), "b": entry(0, 8)},
                                                                 bytes(8)), "does not fit its place"),
        "a gap": ("a.safetensors", safetensors_of({"a": entry(4, 12)}, bytes(12)), "does not fit"),
        "lying shape": ("a.safetensors", safetensors_of({"a": entry(0, 8, [10 ** 9])}, bytes(8)),
                        "does not fit its place"),
        "beyond the end": ("a.safetensors", safetensors_of({"a": entry(0, 4000, [1000])}, bytes(8)),
                           "damaged or truncated"),
        "negative shape": ("a.safetensors", safetensors_of({"a": entry(0, 8, [-1, -2])}, bytes(8)),
                           "does not fit its place"),
        "huge empty shape": ("a.safetensors", safetensors_of({"a": entry(0, 0, [0, 2 ** 62, 2 ** 62])}),
                             "damaged or truncated"),
        "infinite shape": ("a.safetensors", safetensors_of(
            b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,0]}}'), "damaged or truncated"),
        "backward": ("a.safetensors", safetensors_of({"a": entry(8, 0)}, bytes(8)), "does not fit"),
        "unknown dtype": ("a.safetensors", safetensors_of({"a": entry(0, 8, [2], "F31")}, bytes(8)),
                          "F31"),
        "header is no json": ("a.safetensors", safetensors_of(b'{"a": ' + b" " * 50), "damaged"),
        "header is a list": ("a.safetensors", safetensors_of([1, 2]), "damaged"),
        "header nests": ("a.safetensors", safetensors_of(b'{"a":' * 100_000), "damaged"),
        "metadata is a number": ("a.safetensors", safetensors_of({"__metadata__": 5, "a": entry(0, 8)},
                                                                 bytes(8)), "damaged"),
        "giant header": ("a.safetensors", safetensors_of({}, b"", 2 ** 60), "is not a safetensors file"),
        "bad clip_config": ("a.safetensors", b"".join(clip_model.safetensors_bytes(
            state, {"clip_config": "{"})), "clip_config is unreadable"),
        "lying clip_config": ("a.safetensors", b"".join(clip_model.safetensors_bytes(
            state, {"clip_config": '{"vision_head": 0, "vocab_size": 64}'})), "make no CLIP"),
        "lying vocabulary": ("a.safetensors", b"".join(clip_model.safetensors_bytes(
            state, {"clip_config": '{"vocab_size": 65}'})), "'token_embedding.weight' is (64, 64)"),
        "lying heads": ("a.safetensors", b"".join(clip_model.safetensors_bytes(
            state, {"clip_config": '{"text_head": 48}'})), "does not divide"),
        "NaN weights": ("a.pt", changed(ln_final__bias=torch.full((64,), math.nan)),
                        "'ln_final.bias' holds NaN or infinity"),
        "infinite in fp32": ("a.pt", changed(ln_final__bias=torch.full((64,), 1e300,
                                                                       dtype=torch.float64)),
                             "'ln_final.bias' holds NaN or infinity"),
        "integer weights": ("a.pt", changed(ln_final__bias=torch.ones(64, dtype=torch.int8)),
                            "'ln_final.bias' is torch.int8"),
        "sparse weights": ("a.pt", changed(text_projection=state["text_projection"].to_sparse()),
                           "'text_projection' is not a plain tensor"),
        "a terabyte in four bytes": ("a.pt", changed(token_embedding__weight=torch.zeros(1, 1).expand(
            10 ** 10, 64)), "'token_embedding.weight' is not a plain tensor"),
        "meta tensor": ("a.pt", changed(text_projection=torch.zeros(64, 32, device="meta")),
                        "'text_projection' is not a plain tensor"),
        "a dict in itself": ("a.pt", saved(self_holding), "holds no tensors under names"),
        "a list": ("a.pt", saved([1, 2]), "holds no tensors under names"),
        "a lone tensor": ("a.pt", saved(torch.zeros(3)), "holds no tensors under names"),
        "a missing tensor": ("a.pt", without("transformer.resblocks.1.ln_2.weight"),
                             "lack 'transformer.resblocks.1.ln_2.weight' (64,)"),
        "a missing block": ("a.pt", saved({k: v for k, v in state.items() if "resblocks.0." not in k}),
                            "lack 'visual.transformer.resblocks.0.attn.in_proj_weight'"),
        "no blocks": ("a.pt", saved({k: v for k, v in state.items() if not k.startswith("transformer.")}),
                      "has no blocks"),
        "no end of the tower": ("a.pt", without("ln_final.weight"), "there is no 'ln_final.weight'"),
        "an extra tensor": ("a.pt", changed(visual__head__weight=torch.zeros(3)),
                            "have 'visual.head.weight', which is no part"),
        "another shape": ("a.pt", changed(visual__ln_post__bias=torch.zeros(65)),
                          "'visual.ln_post.bias' is (65,) in the weights and (64,)"),
        "scalar where a matrix is": ("a.pt", changed(text_projection=torch.tensor(1.)), "make no CLIP"),
        "flat convolution": ("a.pt", changed(visual__conv1__weight=torch.zeros(64, 192)), "make no CLIP"),
        "empty positions": ("a.pt", changed(visual__positional_embedding=torch.zeros(0, 64)),
                            "make no CLIP"),
        "towers mixed": ("a.pt", saved({**rn, "visual.proj": torch.zeros(64, 32)}),
                         "there is no 'visual.positional_embedding'"),
        "hf without k": ("a.pt", saved({key: tensor for key, tensor in hf.items()
                                        if "0.self_attn.k_proj.bias" not in key}),
                         "self_attn.k_proj.bias' beside its q_proj"),
        "hf with odd q": ("a.pt", saved({**hf, "text_model.encoder.layers.0.self_attn.q_proj.weight":
                                         torch.zeros(3, 5)}), "shapes that fit no CLIP"),
        "pickle that runs, zip": ("a.pt", lambda canary: saved({"w": Payload(canary)}), "was not run"),
        "pickle that runs, legacy": ("a.pt", lambda canary: saved(
            {"w": Payload(canary)}, _use_new_zipfile_serialization=False), "was not run"),
        "pickle that runs, bare": ("a.pkl", lambda canary: pickle.dumps(Payload(canary)), "was not run"),
        "pickle that runs, TorchScript": ("a.pt", lambda canary: script(
            pickle.dumps({"w": Payload(canary)}, protocol=2)), "was not run: it asks for posix.system"),
        "pickle that evaluates, TorchScript": ("a.pt", lambda canary: script(
            b"\x80\x02cbuiltins\neval\nX\x04\x00\x00\x001+11\x85R."), "it asks for builtins.eval"),
        "TorchScript that is no module": ("a.pt", script(pickle.dumps([1])), "top is not a module"),
        "TorchScript lacking data": ("a.pt", script(
            b"\x80\x02c__torch__\nM\n)\x81}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n("
            b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
            b"K\x02tQK\x00K\x02\x85K\x01\x85\x89N tRsb.".replace(b" ", b"")), "was not run"),
        "TorchScript out of bounds": ("a.pt", script(
            b"\x80\x02c__torch__\nM\n)\x81}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n("
            b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
            b"K\x02tQK\x00K\x09\x85K\x01\x85\x89NtRsb.", **{"m/data/0": bytes(8)}), "was not run"),
    }
    return {name: (file, data if callable(data) else lambda _, data=data: data, says)
            for name, (file, data, says) in cases.items()}


BAD = bad_files()


@pytest.mark.parametrize("case", list(BAD))
def test_a_bad_file_is_named_as_what_it_is_and_never_run(tmp_path, capsys, case):
    file, data, says = BAD[case]
    canary = tmp_path / "canary"
    path = tmp_path / file
    path.write_bytes(data(canary))
    began = time.monotonic()
    with pytest.raises(WeightsError) as caught:
        load(path)
    message = str(caught.value)
    assert says in message and "\n" not in message and len(message) < 600, message
    assert str(path) in message and caught.value.exit_code == 2
    assert not canary.exists() and time.monotonic() - began < 10
    code = clip_model.main(["--inspect", str(path)])
    out, err = capsys.readouterr()
    if code == 0:  # a readable file that is something else is explained, not refused
        assert "architecture" in out and not err
    else:
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and not out
    assert not canary.exists()


def test_the_payload_of_these_tests_would_run(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def test_missing_files_and_folders_are_named(tmp_path, capsys):
    with pytest.raises(WeightsError, match="no file or model 'nowhere.pt'"):
        load("nowhere.pt")
    with pytest.raises(WeightsError, match="has none of model.safetensors"):
        load(tmp_path)
    save(make(), tmp_path / "hf", layout="hf")
    (tmp_path / "hf" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="config.json is unreadable"):
        load(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(
        '{"vision_config": {"num_attention_heads": 0}}')
    with pytest.raises(WeightsError, match="config.json is unreadable"):
        load(tmp_path / "hf")
    assert clip_model.main(["--inspect", "nowhere.pt"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_home_and_environment_variables_in_a_path_are_expanded(tmp_path, monkeypatch):
    save(make(), tmp_path / "a.safetensors")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WEIGHTS_FOLDER", str(tmp_path))
    assert load("~/a.safetensors").config == load("$WEIGHTS_FOLDER/a.safetensors").config == small()


def test_weights_of_another_architecture_name_the_first_key(tmp_path, shared):
    with pytest.raises(WeightsError, match="there is no 'text_projection'.*'features.0.weight'"):
        load(shared / "weights" / "squeezenet1_0_imagenet.pt")
    report = clip_model.inspect(shared / "weights" / "squeezenet1_0_imagenet.pt")
    assert report["architecture"] is None and report["first_tensors"][0] == "features.0.weight"
    assert report["parameters"] == 1_248_424


def test_inspect_explains_a_file_and_its_json_parses(tmp_path, capsys, archives):
    files = {save(make(), tmp_path / "a.safetensors"): "safetensors",
             save(make(), tmp_path / "b.pt", layout="openai"): "PyTorch zip",
             save(make(), tmp_path / "hf", layout="hf").parent: "safetensors",
             archives["tiny-vit"][0]: "TorchScript archive"}
    for path, kind in files.items():
        assert clip_model.main(["--inspect", str(path), "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["architecture"] == "CLIP" and report["format"] == kind
        assert report["config"] == json.loads(json.dumps(dataclasses.asdict(small())))
        assert report["parameters"] == sum(p.numel() for p in make().parameters())
        assert report["layout"] == ("hf" if path.is_dir() else "openai")
        assert len(report["sha256"]) == 64 and report["released_as"] is None
    torch.save({"epoch": 3, "state_dict": make("tiny-rn").state_dict()}, tmp_path / "c.pt")
    assert clip_model.main(["--inspect", str(tmp_path / "c.pt")]) == 0
    text = capsys.readouterr().out
    assert "'epoch': 3" in text and "weights found under 'state_dict'" in text
    assert json.loads(json.dumps(clip_model.inspect(tmp_path / "c.pt")))["config"]["vision_patch"] is None


def test_inspect_as_a_command_refuses_in_one_line_with_code_2(tmp_path):
    path = tmp_path / "evil.pt"
    path.write_bytes(saved({"w": Payload(tmp_path / "canary")}))
    done = subprocess.run([sys.executable, clip_model.__file__, "--inspect", str(path)],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"error: {path} holds more than tensors")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "canary").exists()


# -----------------------------------------------------------------------------
# Fuzz

WATCH = {"on": False, "seen": []}
RUNS_CODE = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "os.startfile")


def watch(event, _):
    if WATCH["on"] and event.startswith(RUNS_CODE):
        WATCH["seen"].append(event)


sys.addaudithook(watch)


def mutate(data, rng):
    data = bytearray(data)
    kind = rng.randrange(5)
    places = [rng.randrange(len(data)) if rng.random() < 0.5 else  # headers stand at both ends
              rng.choice([rng.randrange(min(3000, len(data))), len(data) - 1 - rng.randrange(
                  min(3000, len(data)))]) for _ in range(rng.choice([1, 1, 2, 8]))]
    if kind <= 1:
        for place in places:
            data[place] = rng.choice([data[place] ^ 1 << rng.randrange(8), 0, 255, rng.randrange(256)])
    elif kind == 2:
        del data[places[0]:]
    elif kind == 3:  # a range copied over another
        length = rng.choice([1, 4, 16, 300])
        data[places[0]:places[0] + length] = data[places[-1]:places[-1] + length]
    else:
        del data[places[0]:places[0] + rng.choice([1, 8, 100])]
    return bytes(data)


def test_a_pickle_that_asks_for_a_huge_memo_is_refused_before_it_has_one(tmp_path, archives):
    members = members_of(archives["tiny-vit"][0].read_bytes())
    name = next(name for name in members if name.endswith("data.pkl"))
    members[name] = members[name][:-1] + b"r" + (2 ** 30).to_bytes(4, "little") + b"."
    (tmp_path / "a.pt").write_bytes(zip_of(members))
    with pytest.raises(WeightsError, match="memo of 1,073,741,824 places"):
        load(tmp_path / "a.pt")


def repacked(data, rng):
    """The pickle of a zip changed, and the zip's checksums right again."""
    members = members_of(data)
    name = next(name for name in members if name.endswith("data.pkl"))
    members[name] = mutate(members[name], rng)
    return zip_of(members)


@pytest.fixture(scope="module")
def small_files(tmp_path_factory, archives):
    torch.manual_seed(0)
    model = CLIP(small(text_width=64, text_layers=1, vision_layers=1, context_length=8, vocab_size=8))
    state = model.state_dict()
    return {"safetensors": b"".join(clip_model.safetensors_bytes(state, {"clip_config": json.dumps(
                dataclasses.asdict(model.config))})),
            "zip": saved(state), "legacy": saved(state, _use_new_zipfile_serialization=False),
            "torchscript": archives["tiny-vit"][0].read_bytes()}


@pytest.mark.parametrize("kind, change, times", [
    ("safetensors", mutate, 200), ("zip", mutate, 300), ("legacy", mutate, 150),
    ("torchscript", mutate, 150), ("torchscript", repacked, 150)])
def test_mutated_files_load_or_are_refused_in_one_line(tmp_path, small_files, kind, change, times):
    rng, refused = random.Random(f"{kind} {change.__name__}"), 0
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
    WATCH["on"] = True
    try:
        for i in range(times):
            path.write_bytes(change(small_files[kind], rng))
            began = time.monotonic()
            try:
                load(path)
            except WeightsError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 600, (i, str(error))
            assert time.monotonic() - began < 10, i
    finally:
        WATCH["on"] = False
    assert not WATCH["seen"] and refused > times // 10


# -----------------------------------------------------------------------------
# Download, from a server of our own

class Server(http.server.BaseHTTPRequestHandler):
    plan, log, content, ranges = [], [], b"", True  # plan: what the next answers are; then honest

    def do_GET(self):
        cls = type(self)
        begin = self.headers.get("Range")
        cls.log.append((self.path, begin))
        step = cls.plan.pop(0) if cls.plan else "ok"
        begin = int(begin[6:-1]) if begin and cls.ranges else 0
        if isinstance(step, int):
            return self.send_error(step)
        if begin >= len(cls.content):
            return self.send_error(416)
        body = {"wrong": b"x" * len(cls.content), "html": b"<html>log in</html>"}.get(
            step, cls.content)[begin:]
        self.send_response(206 if begin else 200)
        if step == "chunked":  # a body without a length, which ends in the middle of a chunk
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"ffff\r\n" + body[:100])
        else:
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:len(body) // 2] if step == "break" else body)
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A mirror that serves one small released model; its class is scripted by the test."""
    content = save(make(), tmp_path / "source.pt", layout="openai").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    handler = type("Handler", (Server,), {"plan": [], "log": [], "content": content, "ranges": True})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("CLIP_MIRROR", f"http://127.0.0.1:{server.server_port}/clip/")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(clip_model, "RELEASED", {"RN50": ("small.pt", digest)})
    handler.digest, handler.target = digest, tmp_path / "home" / ".cache" / "clip" / "small.pt"
    yield handler
    server.shutdown()
    server.server_close()


def test_a_released_name_is_fetched_once_and_then_used_offline(mirror, monkeypatch):
    model = load("rn50")
    assert same_weights(model, make()) and model.origin["name"] == "RN50"
    assert model.origin["sha256"] == mirror.digest
    assert mirror.log == [(f"/clip/{mirror.digest}/small.pt", None)]
    assert not mirror.target.with_name("small.pt.partial").exists()
    monkeypatch.setenv("CLIP_MIRROR", "http://127.0.0.1:9/nothing")
    assert same_weights(load("RN50"), make()) and len(mirror.log) == 1


def test_a_broken_transfer_goes_on_where_it_stopped(mirror):
    mirror.plan = ["break"]
    assert same_weights(load("RN50"), make())
    half = len(mirror.content) // 2
    assert [begin for _, begin in mirror.log] == [None, f"bytes={half}-"]


def test_a_partial_file_of_an_earlier_run_is_completed(mirror):
    mirror.target.parent.mkdir(parents=True)
    partial = mirror.target.with_name("small.pt.partial")
    partial.write_bytes(mirror.content[:1000])
    assert clip_model.download("RN50") == mirror.target
    assert mirror.log[0][1] == "bytes=1000-" and mirror.target.read_bytes() == mirror.content
    os.replace(mirror.target, partial)  # all there, only the name is missing
    assert clip_model.download("RN50").read_bytes() == mirror.content


def test_a_damaged_partial_or_cached_file_is_fetched_again(mirror):
    mirror.target.parent.mkdir(parents=True)
    mirror.target.with_name("small.pt.partial").write_bytes(b"x" * 1000)
    mirror.target.write_bytes(b"half of an older download")
    assert clip_model.download("RN50").read_bytes() == mirror.content
    assert [begin for _, begin in mirror.log] == ["bytes=1000-", None]


def test_a_server_without_ranges_is_read_from_the_start(mirror):
    mirror.ranges, mirror.plan = False, ["break"]
    assert clip_model.download("RN50").read_bytes() == mirror.content
    assert len(mirror.log) == 2


@pytest.mark.parametrize("plan", [[500], [503, 500], [500, "break"], ["chunked"], ["wrong"], ["html"]])
def test_passing_trouble_of_a_server_is_survived(mirror, plan):
    mirror.plan = list(plan)
    assert clip_model.download("RN50").read_bytes() == mirror.content
    assert len(mirror.log) == len(plan) + 1


@pytest.mark.parametrize("plan, tries, why", [
    ([404] * 3, 1, "(Not Found)"), ([500] * 3, 3, "(Internal Server Error)"),
    (["wrong"] * 3, 3, "its sha256 is"), (["html"] * 3, 3, "its sha256 is"),
    (["chunked"] * 3, 3, "IncompleteRead")])
def test_lasting_trouble_says_what_to_do_by_hand(mirror, capsys, plan, tries, why):
    mirror.plan = list(plan)
    with pytest.raises(WeightsError) as caught:
        load("RN50")
    message = str(caught.value)
    assert why in message and "\n" not in message
    assert f"/clip/{mirror.digest}/small.pt" in message and str(mirror.target) in message
    assert len(mirror.log) == tries and not mirror.target.exists()
    mirror.plan = list(plan)
    assert clip_model.main(["--inspect", "RN50"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_offline_the_error_names_address_hash_and_place(mirror, monkeypatch):
    monkeypatch.setenv("CLIP_MIRROR", "http://127.0.0.1:9/clip")  # nobody listens there
    with pytest.raises(WeightsError) as caught:
        load("RN50")
    for part in (f"http://127.0.0.1:9/clip/{mirror.digest}/small.pt", f"sha256 {mirror.digest}",
                 str(mirror.target), "refused", "by hand"):
        assert part in str(caught.value)


def test_a_folder_that_cannot_be_written_is_reported(mirror, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WeightsError, match="could not fetch RN50.*(exists|directory)"):
        clip_model.download("RN50", tmp_path / "file" / "cache")


def test_a_redirect_away_from_https_is_refused():
    handler = clip_model.HTTPSOnly()
    request = clip_model.urllib.request.Request("https://example.org/a")
    with pytest.raises(OSError, match="away from https"):
        handler.redirect_request(request, None, 302, "Found", {}, "http://example.org/a")
    assert handler.redirect_request(request, None, 302, "Found", {}, "https://example.org/b")


def test_threads_that_fetch_at_once_fetch_once(mirror):
    found = []
    threads = [threading.Thread(target=lambda: found.append(clip_model.download("RN50")))
               for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == [mirror.target] * 4 and len(mirror.log) == 1
    assert mirror.target.read_bytes() == mirror.content


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_processes_that_fetch_at_once_fetch_once(mirror):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking beside the server's thread
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=clip_model.download, args=("RN50",)) for _ in range(3)]
        for process in processes:
            process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(mirror.log) == 1 and mirror.target.read_bytes() == mirror.content


def test_the_bundled_model_loads_by_name():
    if not clip_model.TINY.is_file():
        pytest.skip("assets/tiny_clip.safetensors is not here")
    model = load("tiny")
    assert model.config == CONFIGS["tiny"] and model.origin["name"] == "tiny"


def test_the_module_reads_and_computes_nothing_at_import():
    code = ("import sys, builtins, os; import torch; before = torch.random.get_rng_state();"
            "opened = [];"
            "sys.addaudithook(lambda e, a: opened.append(str(a[0])) if e == 'open' else None);"
            "import clip_model; after = torch.random.get_rng_state();"
            "assert torch.equal(before, after);"
            "print([o for o in opened if 'assets' in o or '.cache/clip' in o])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60,
                          cwd=pathlib.Path(clip_model.__file__).parent)
    assert done.returncode == 0 and done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("causal, rows", [(False, None), (True, None), (False, 0),
                                          (True, torch.tensor([2, 6, 0]))])
def test_plain_attention_equals_the_fused_one(causal, rows):
    torch.manual_seed(0)
    attention = clip_model.Attention(64, 2).double()
    x = torch.randn(3, 7, 64, dtype=torch.float64, requires_grad=True)
    results = []
    for fused in (True, False):
        attention.fused = fused
        out = attention(x, causal, rows)
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, attention.in_proj_weight])))
    for ours, theirs in zip(*results):
        assert (ours - theirs).abs().max() < 1e-12


def test_buckets_hold_every_text_once_and_give_the_features_of_the_whole_batch():
    torch.manual_seed(0)
    model = CLIP(dataclasses.replace(CONFIGS["tiny-vit"], vocab_size=100)).double()
    tokens = torch.randint(1, 98, (41, 77))
    for row, end in zip(tokens, torch.randint(2, 20, (41,))):
        row[end:] = 0
        row[end] = 99
    groups, places = clip_model.bucket(tokens, least=5, most=12)
    assert len(groups) > 3 and all(len(part) <= 12 for part, _ in groups)
    assert sum(part.shape[1] for part, _ in groups) < 20 * len(groups)  # most are cut shorter
    features = torch.cat([model.encode_text(part, ends=ends) for part, ends in groups])[places]
    assert (features - model.encode_text(tokens)).abs().max() < 1e-12
    assert len(clip_model.bucket(tokens, least=64)[0]) == 1


def test_rounding_frozen_weights_once_gives_autocast_s_own_numbers_and_keeps_the_masters():
    torch.manual_seed(0)
    model = CLIP(dataclasses.replace(CONFIGS["tiny-vit"], vocab_size=100))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.requires_grad_(False)
    for block in model.transformer.resblocks:
        block.mlp.c_proj.bias.requires_grad_(True)
    tokens, images = torch.randint(1, 99, (3, 9)), torch.randn(2, 3, 32, 32)
    results = []
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        model.round_frozen(dtype)
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            image, text, _ = model(images, tokens)
        text.sum().backward()
        results.append([image, text, model.transformer.resblocks[0].mlp.c_proj.bias.grad])
    for ours in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ours, results[0]))
    assert model.transformer.resblocks[0].attn.rounded is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    # A freed tensor is never a stale copy.
    model.round_frozen(torch.bfloat16)
    bias = model.transformer.resblocks[0].mlp.c_proj.bias
    assert model.transformer.resblocks[0].mlp.c_proj.rounded[1] is bias
