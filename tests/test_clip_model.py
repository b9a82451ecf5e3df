"""clip_model.py: published names and counts, and its shortcuts against naive twins in float64."""
import dataclasses

import official
import pytest
import torch
import torch.nn.functional as F
from helpers import images_for, texts_for, tiny_clip

from clip_model import (CLIP, CONFIGS, BertConfig, bert_fields, canonical_name, ends_of, evaluating,
                        project, text_pieces, training_mode, unit)
from weights import RELEASED, config_from_state_dict

VOCAB, EXACT = 64, {"rtol": 0, "atol": 1e-12}
BERTS = {
    "bert": BertConfig("bert", VOCAB, 32, 3, 2, 48, 24),
    "mean": BertConfig("bert", VOCAB, 32, 3, 2, 48, 24, pool="mean"),
    "roberta": BertConfig("roberta", VOCAB, 32, 3, 2, 48, 24, type_vocab=1, pad_id=1, eps=1e-5),
    "distilbert": BertConfig("distilbert", VOCAB, 32, 3, 2, 48, 24, type_vocab=0, pool="first"),
}


def make(name="tiny-vit", bert="", **changes):
    fields = bert_fields(BERTS[bert]) if bert else {"vocab_size": VOCAB}
    return tiny_clip(config=name, dtype=torch.float64, **{**fields, **changes})


# -----------------------------------------------------------------------------
# Published names, shapes and counts

COUNTS = {  # total, image tower
    "RN50": (102_007_137, 38_316_896), "RN101": (119_688_033, 56_259_936),
    "RN50x4": (178_300_601, 87_137_080), "RN50x16": (290_979_217, 167_328_912),
    "RN50x64": (623_258_305, 420_380_352), "ViT-B/32": (151_277_313, 87_849_216),
    "ViT-B/16": (149_620_737, 86_192_640), "ViT-L/14": (427_616_513, 303_966_208),
    "ViT-L/14@336px": (427_944_193, 304_293_888), "CN-ViT-B/16": (188_262_913, 86_192_640),
    "CN-RN50": (76_989_537, 38_316_896), "CN-ViT-H/14": (957_598_209, 632_076_800),
}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_every_size_has_the_published_counts_and_is_told_from_shapes_alone(name):
    with torch.device("meta"):
        model = CLIP(CONFIGS[name])
    assert config_from_state_dict(model.state_dict()) == CONFIGS[name]
    assert all(p.requires_grad for p in model.parameters())
    if name in COUNTS:
        assert COUNTS[name] == tuple(sum(p.numel() for p in part.parameters())
                                     for part in (model, model.visual))


def test_names_are_found_however_they_are_spelt():
    assert len(RELEASED) == 9 and all(len(digest) == 64 for digest in RELEASED.values())
    for spelling, name in [
            ("ViT-B-16", "ViT-B/16"), ("vit_b16", "ViT-B/16"), ("rn50", "RN50"), ("Tiny", "tiny"),
            ("RN50X4", "RN50x4"), ("ViT-L-14-336", "ViT-L/14@336px"), ("cn-rn50", "CN-RN50"),
            ("ViT-B/8", None), ("ViT-B-32.pt", None), ("resnet50", None), ("", None)]:
        assert canonical_name(spelling) == name


# -----------------------------------------------------------------------------
# Twins

@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("fused", [True, False])
def test_towers_and_their_gradients_equal_their_naive_twins(activation, fused):
    """official.py: all rows of all blocks by torch's own attention with its full mask."""
    model = make(activation=activation, vision_head=16, text_head=32).fuse_attention(fused)
    tokens, images = texts_for(model, [2, 9, 77, 30]), images_for(model, 3)
    weight = torch.randn(7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = []
    for text, image in ((model.encode_text(tokens), model.encode_image(images)), (
            official.text_features(model, tokens), official.image_features(model, images))):
        model.zero_grad(set_to_none=True)
        features = torch.cat([text, image])
        (features * weight).sum().backward()
        found.append([features, [p.grad for p in model.parameters() if p.grad is not None]])
    (ours, gradients), (theirs, truth) = found
    torch.testing.assert_close(ours, theirs, **EXACT)
    torch.testing.assert_close(gradients, truth, rtol=0, atol=1e-10)
    assert len(truth) == len(list(model.parameters())) - 1  # all but the scale's


@pytest.mark.parametrize("bert", ["", "bert"])
@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
def test_plain_attention_and_recomputed_blocks_give_the_same_gradients(name, bert):
    model = make(name, bert)
    images, results = images_for(model, 2), []
    tokens = texts_for(model, [5, 9], 22)
    for fused, recompute in ((True, False), (False, False), (True, True)):
        model.fuse_attention(fused).recompute_blocks(recompute).zero_grad()
        image, text, scale = model(images, tokens)
        (scale * image @ text.t()).square().sum().backward()
        results.append([image, text, *(p.grad.clone() for p in model.parameters())])
    for other in results[1:]:
        for found, expected in zip(other, results[0]):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    kernels = []
    real = F.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention",
                      lambda *a, **k: kernels.append(1) or real(*a, **k))
        model.fuse_attention(False).recompute_blocks(False)(images, tokens)
        assert not kernels  # the ResNet's pool honours it too
        model.fuse_attention(True)(images, tokens)
        assert kernels


def test_the_residual_head_is_its_formula():
    head, x = make(proj="mlp").text_projection, torch.randn(5, 64, dtype=torch.float64)
    p = F.linear(x, head.projection.weight, head.projection.bias)
    y = F.linear(F.gelu(p), head.fc.weight, head.fc.bias) + p
    expected = F.layer_norm(y, (32,), head.layer_norm.weight, head.layer_norm.bias, 1e-5)
    torch.testing.assert_close(head(x), expected, **EXACT)
    assert not torch.equal(head.train()(x), head(x))  # dropout


def test_initial_weights_have_the_papers_statistics():
    torch.manual_seed(0)
    W, layers = 256, 3
    model = CLIP(dataclasses.replace(CONFIGS["tiny-vit"], text_width=W, text_layers=layers,
                                     vocab_size=4000, embed_dim=128, vision_width=192))
    expected = {
        "token_embedding.weight": 0.02, "positional_embedding": 0.01, "text_projection": W ** -0.5,
        "visual.proj": 192 ** -0.5, "visual.positional_embedding": 192 ** -0.5,
        "visual.transformer.resblocks.0.mlp.c_fc.weight": (3 * 192) ** -0.5}
    for i in range(layers):
        block = f"transformer.resblocks.{i}."
        expected |= {block + "attn.in_proj_weight": W ** -0.5,
                     block + "attn.out_proj.weight": (W * 2 * layers) ** -0.5,
                     block + "mlp.c_proj.weight": (W * 2 * layers) ** -0.5,
                     block + "mlp.c_fc.weight": (2 * W) ** -0.5}
        assert not model.get_parameter(block + "attn.in_proj_bias").any()
    for name, spread in expected.items():
        tensor = model.get_parameter(name)
        assert tensor.std().item() == pytest.approx(spread, rel=0.05), name
        assert abs(tensor.mean().item()) < 5 * spread / tensor.numel() ** 0.5, name
    assert model.logit_scale.item() == pytest.approx(2.6593, abs=1e-4)
    resnet = CLIP(dataclasses.replace(CONFIGS["tiny-rn"], vision_layers=(2, 1, 1, 1))).visual
    for letter in "qkvc":
        weight = resnet.get_parameter(f"attnpool.{letter}_proj.weight")
        assert weight.std().item() == pytest.approx(256 ** -0.5, rel=0.05)
    gains = {n: p for n, p in resnet.named_parameters() if n.endswith("bn3.weight")}
    assert len(gains) == 6 and (gains.pop("bn3.weight") == 1).all()  # the stem's is not a branch
    assert not any(gain.any() for gain in gains.values())


# -----------------------------------------------------------------------------
# Lengths of texts

@pytest.mark.parametrize("bert", ["", *BERTS])
def test_features_do_not_depend_on_the_batch_the_padding_or_the_pieces(bert):
    model = make(bert=bert)
    lengths = (3, 9, 22, 4, 12)
    tokens = texts_for(model, lengths, 22)
    features = model.encode_text(tokens)
    for row, length in enumerate(lengths):
        alone = model.encode_text(tokens[row:row + 1, :length])
        torch.testing.assert_close(features[row:row + 1], alone, **EXACT)
    longer = F.pad(tokens, (0, 10), value=model.pad_id)
    torch.testing.assert_close(model.encode_text(longer), features, **EXACT)
    assert ends_of(longer, model.text_pad).tolist() == [2, 8, 21, 3, 11]
    for size in (1, 2, 100):
        pieces, places = text_pieces(longer, size, model.text_pad)
        assert [part.shape[1] for part, _ in pieces] == {
            1: [3, 4, 9, 12, 22], 2: [4, 12, 22], 100: [22]}[size]
        parts = torch.cat([model.encode_text(part, ends=at) for part, at in pieces])[places]
        torch.testing.assert_close(parts, features, **EXACT)
    nothing = torch.zeros(0, 22, dtype=torch.long)
    assert model.encode_text(nothing).shape == (0, 32) == model.encode_image(
        torch.zeros(0, 3, 32, 32, dtype=torch.float64)).shape
    pieces, places = text_pieces(nothing, 2, model.text_pad)
    assert len(pieces) == 1 and len(places) == 0
    if bert:
        with pytest.raises(ValueError, match="positions"):
            model.encode_text(torch.full((1, 25), 5))
        assert model.encode_text(torch.full((2, 5), model.pad_id)).isfinite().all()


def test_what_stands_after_the_end_of_text_changes_nothing_and_what_stands_before_does():
    model = make()
    tokens = texts_for(model, [4, 15, 9])
    features, changed = model.encode_text(tokens), tokens.clone()
    for row, length in zip(changed, (4, 15, 9)):
        row[length:] = VOCAB - 1  # a second end of text
    torch.testing.assert_close(model.encode_text(changed), features, **EXACT)
    changed[:, 1] = 7
    assert (model.encode_text(changed) - features).abs().max() > 1e-4


@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3)])
def test_a_berts_dropout_acts_in_training_alone_and_evaluating_ends_it(rates):
    text = dataclasses.replace(BERTS["bert"], dropout=rates[0], attention_dropout=rates[1])
    model = make(**bert_fields(text))
    tokens = texts_for(model, [3, 9, 22, 1])
    still = model.encode_text(tokens)
    model.train().visual.eval()
    with evaluating(model):
        assert torch.equal(model.encode_text(tokens), still)
    assert model.bert.training and not model.visual.training
    for fused in (True, False):
        model.fuse_attention(fused)
        torch.manual_seed(5)
        once = model.encode_text(tokens)
        torch.manual_seed(5)
        assert torch.equal(model.encode_text(tokens), once)
        assert torch.allclose(model.encode_text(tokens), once) == (not any(rates))


@pytest.mark.parametrize("statistics", [True, False])
def test_what_is_frozen_has_no_training_mode(statistics):
    """A tower, a part of one; a head trains on. The frozen BatchNorm is not among those told."""
    model = make("tiny-rn", "bert")
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(("bert.encoder.layer.1.", "visual.layer1.")))
    norms = training_mode(model, statistics)
    assert all(norm.training == statistics for norm in norms) and model.visual.bn1 in norms
    assert not model.visual.layer1[0].bn1.training and model.visual.layer1[0].bn1 not in norms
    assert [layer.training for layer in model.bert.encoder["layer"]] == [True, False, True]
    model.visual.requires_grad_(False)
    assert not training_mode(model) and model.bert.training and not model.visual.training


# -----------------------------------------------------------------------------
# The whole

@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
def test_forward_gives_unit_fp32_rows_also_under_autocast(name):
    model = make(name).float()
    images, tokens = images_for(model, 2), texts_for(model, [5, 9, 3])
    exact = model(images, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(images, tokens)
    for image, text, scale in (exact, rough):
        assert image.shape == (2, 32) and text.shape == (3, 32) and scale.shape == ()
        assert image.dtype == text.dtype == scale.dtype == torch.float32
        torch.testing.assert_close(image.norm(dim=1), torch.ones(2), rtol=0, atol=1e-6)
        torch.testing.assert_close(text.norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)
    assert 0 < (exact[0] - rough[0]).abs().max() < 0.1
    torch.testing.assert_close(unit(project(model.pooled_image(images), model.image_head)),
                               exact[0])
    torch.testing.assert_close(unit(model.pooled_text(tokens) @ model.text_projection), exact[1])
    for wrong in (torch.zeros(1, 3, 40, model.config.image_size), torch.zeros(1, 3, 24, 24)):
        with pytest.raises(ValueError, match="pixels"):
            model.encode_image(wrong)


@pytest.mark.parametrize("bert", ["", "roberta"])
def test_rounding_frozen_weights_gives_autocasts_own_numbers_and_keeps_the_masters(bert):
    model = make(bert=bert).float().requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    block = model.bert.encoder["layer"][0] if bert else model.transformer.resblocks[0]
    linear = block.output["dense"] if bert else block.mlp.c_proj
    linear.bias.requires_grad_(True)
    tokens, images, results = texts_for(model, [3, 9, 22]), images_for(model, 2), []
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        model.round_frozen(dtype).zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):
            image, text, _ = model(images, tokens)
        text.sum().backward()
        results.append([image, text, linear.bias.grad])
    for ours in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(ours, results[0]))
    model.round_frozen(torch.bfloat16)
    assert linear.rounded[1] is linear.bias and linear.rounded[0].dtype == torch.bfloat16
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("changes", [
    {"text_head": 48}, {"vision_head": 0}, {"activation": "relu"}, {"proj": "conv"},
    bert_fields(dataclasses.replace(BERTS["bert"], pool="max")),
    bert_fields(dataclasses.replace(BERTS["bert"], family="ernie")),
    bert_fields(dataclasses.replace(BERTS["bert"], heads=5))])
def test_what_makes_no_clip_is_refused(changes):
    with pytest.raises(ValueError):
        CLIP(dataclasses.replace(CONFIGS["tiny-vit"], **changes))
