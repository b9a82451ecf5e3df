"""Towers that others made: equal to transformers' and torchvision's own, and CLIPs of any two."""
import dataclasses
import json
import sys

import pytest
import torch
import torch.nn.functional as F

import clip_model
from clip_model import (BERTS, CLIP, CONFIGS, HEADS, BertConfig, BertTower, WeightsError,
                        bert_fields, bucket, inspect, load, save, trim)

VOCAB, EXACT = 60, dict(rtol=0, atol=1e-12)
SMALL = {
    "bert": BertConfig("bert", VOCAB, 32, 3, 2, 48, 24),
    "roberta": BertConfig("roberta", VOCAB, 32, 3, 2, 48, 24, type_vocab=1, pad_id=1, eps=1e-5),
    "distilbert": BertConfig("distilbert", VOCAB, 32, 3, 2, 48, 24, type_vocab=0, pool="first"),
}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def models():
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision does not import here: {error}")
    return models


@torch.no_grad()
def shake(model):
    """Zeros and ones hide swapped names."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.dim() and "running" not in name:
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def texts(pad_id, lengths=(3, 9, 22, 1), width=22):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.full((len(lengths), width), pad_id)
    for row, length in zip(tokens, lengths):
        row[:length] = torch.randint(2, VOCAB, (length,), generator=generator)
    return tokens


def their_tower(transformers, family):
    more = dict(vocab_size=VOCAB, max_position_embeddings=24)
    if family == "distilbert":
        config = transformers.DistilBertConfig(dim=32, n_layers=3, n_heads=2, hidden_dim=48, **more)
        return shake(transformers.DistilBertModel(config))
    more |= dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
    if family == "bert":
        return shake(transformers.BertModel(transformers.BertConfig(**more)))
    return shake(transformers.RobertaModel(transformers.RobertaConfig(
        type_vocab_size=1, layer_norm_eps=1e-5, **more)))


def their_features(theirs, tokens, pad_id, pool):
    out = theirs(input_ids=tokens, attention_mask=(tokens != pad_id).long())
    return out.pooler_output if pool == "pooler" else out.last_hidden_state[:, 0]


def two(image="tiny-vit", tower="roberta", **more):
    """A CLIP of two small towers with random weights; `tower` "" for CLIP's own text tower."""
    torch.manual_seed(0)
    fields = bert_fields(SMALL[tower]) if tower else {"vocab_size": VOCAB}
    return shake(CLIP(dataclasses.replace(CONFIGS[image], **{**fields, **more})))


def same_weights(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


# -----------------------------------------------------------------------------
# The BERT family

@pytest.mark.parametrize("family, pool", [
    ("bert", "pooler"), ("bert", "first"), ("roberta", "pooler"), ("roberta", "first"),
    ("distilbert", "first")])
def test_a_text_tower_and_its_gradients_are_transformers_own(tmp_path, transformers, family, pool):
    theirs = their_tower(transformers, family)
    theirs.save_pretrained(tmp_path)
    ours = load(image_tower="tiny-vit:none", text_tower=tmp_path, pool=pool).bert
    assert ours.config == dataclasses.replace(SMALL[family], pool=pool)
    ours, theirs = ours.double(), theirs.double()
    tokens = texts(ours.config.pad_id)
    found, expected = ours(tokens), their_features(theirs, tokens, ours.config.pad_id, pool)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, **EXACT)
    weight = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    gradients = clip_model.bert_state({name: p.grad for name, p in theirs.named_parameters()
                                       if p.grad is not None})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients.pop(name), **EXACT)
    assert not any(gradient.any() for gradient in gradients.values())  # what is left is unused


@pytest.mark.parametrize("family", list(SMALL))
def test_padding_changes_nothing_however_long(family):
    model = two(tower=family).double()
    tokens = texts(model.pad_id)
    features = model.encode_text(tokens)
    for row, length in zip(range(4), (3, 9, 22, 1)):
        alone = model.encode_text(tokens[row:row + 1, :length])
        torch.testing.assert_close(features[row:row + 1], alone, **EXACT)
    longer = F.pad(tokens, (0, 10), value=model.pad_id)  # more places than positions
    torch.testing.assert_close(model.encode_text(longer), features, **EXACT)
    cut, ends = trim(longer, model.pad_id)
    assert cut.shape == (4, 22) and ends.tolist() == [2, 8, 21, 0]
    torch.testing.assert_close(model.encode_text(cut, ends=ends), features, **EXACT)
    groups, places = bucket(longer, least=1, most=2, pad_id=model.pad_id)
    assert [part.shape[1] for part, _ in groups] == [1, 3, 9, 22]
    parts = torch.cat([model.encode_text(part, ends=ends) for part, ends in groups])[places]
    torch.testing.assert_close(parts, features, **EXACT)
    for fused in (True, False):
        model.fuse_attention(fused)
        assert model.encode_text(torch.full((2, 5), model.pad_id)).isfinite().all()


def test_cutting_by_the_padding_is_right_for_clips_own_texts_too():
    tokens = torch.tensor([[58, 3, 59, 0, 0], [58, 59, 0, 0, 0], [58, 0, 7, 59, 0]])
    for ours, theirs in zip(trim(tokens, 0), trim(tokens)):
        assert torch.equal(ours, theirs)


def test_texts_longer_than_the_positions_are_refused():
    model = two()
    assert model.config.context_length == 22  # 24 rows, of which the first two are no place
    with pytest.raises(ValueError, match="23 tokens.*22 positions"):
        model.encode_text(torch.full((1, 23), 5))


def test_plain_attention_equals_the_fused_one_in_a_bert():
    model = two().double()
    fused = model.encode_text(texts(1))
    model.fuse_attention(False)
    assert not any(layer.fused for layer in model.bert.encoder["layer"])
    torch.testing.assert_close(model.encode_text(texts(1)), fused, **EXACT)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.3)])
def test_dropout_acts_in_training_alone(rates, fused):
    text = dataclasses.replace(SMALL["bert"], dropout=rates[0], attention_dropout=rates[1])
    model = two(tower="", **bert_fields(text)).fuse_attention(fused)
    tokens = texts(0)
    still = model.encode_text(tokens)
    assert torch.equal(model.encode_text(tokens), still)
    model.train()
    if any(rates):
        assert not torch.allclose(model.encode_text(tokens), model.encode_text(tokens), atol=1e-3)
        torch.manual_seed(5)
        once = model.encode_text(tokens)
        torch.manual_seed(5)
        assert torch.equal(model.encode_text(tokens), once)  # drawn from torch's own generator
    else:
        assert torch.equal(model.encode_text(tokens), still)


def test_a_layer_drops_what_it_adds_after_attention_and_after_its_mlp():
    layer = clip_model.BertLayer(dataclasses.replace(SMALL["bert"], dropout=0.5)).train()
    seen = []
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        for part in (layer.attention["output"], layer.output):
            part["dense"].bias.fill_(1)  # so that each sum is what dropout leaves of ones
            part["LayerNorm"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        layer(torch.zeros(4, 7, 32), torch.ones(4, 1, 1, 7, dtype=torch.bool))
    assert [x.unique().tolist() for x in seen] == [[0, 2], [0, 2]]


def test_rounding_frozen_weights_reaches_a_bert():
    model = two().requires_grad_(False)
    model.bert.pooler["dense"].weight.requires_grad_(True)
    tokens, results = texts(1), []
    for dtype in (torch.float32, torch.bfloat16):
        model.round_frozen(dtype)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(model.encode_text(tokens))
    query = model.bert.encoder["layer"][0].attention["self"]["query"]
    assert query.rounded[0].dtype == torch.bfloat16 and query.weight.dtype == torch.float32
    assert model.bert.pooler["dense"].rounded[0] is model.bert.pooler["dense"].weight
    assert torch.equal(*results)


@pytest.mark.parametrize("name, parameters", [
    ("distilbert-base-uncased", 66_362_880), ("roberta-base", 124_645_632),
    ("bert-base-uncased", 109_482_240), ("chinese-roberta-wwm-ext", 102_267_648)])
def test_published_text_towers_have_the_published_counts(transformers, name, parameters):
    with torch.device("meta"):
        ours = BertTower(BERTS[name])
        kind = {"distilbert": "DistilBert", "roberta": "Roberta", "bert": "Bert"}[BERTS[name].family]
        more = {"roberta": dict(max_position_embeddings=514, type_vocab_size=1)}
        theirs = getattr(transformers, kind + "Model")(getattr(transformers, kind + "Config")(
            vocab_size=BERTS[name].vocab_size, **more.get(BERTS[name].family, {})))
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert {key: t.shape for key, t in ours.state_dict().items()} == {
        key: t.shape for key, t in clip_model.bert_state(theirs.state_dict()).items()}


def test_chinese_clips_own_names_and_count():
    bert = dataclasses.replace(BERTS["chinese-roberta-wwm-ext"], pool="first")
    config = dataclasses.replace(CONFIGS["ViT-B/16"], **bert_fields(bert))
    with torch.device("meta"):
        state = CLIP(config).state_dict()
    assert len(state) == 351 and sum(t.numel() for t in state.values()) == 188_262_913
    assert state["text_projection"].shape == (768, 512)
    assert "bert.encoder.layer.11.attention.self.query.bias" in state
    assert clip_model.config_from_state_dict(state) == config


def test_heads_for_other_tasks_and_old_names_are_no_obstacle(tmp_path, transformers):
    config = transformers.BertConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3,
                                     num_attention_heads=2, intermediate_size=48,
                                     max_position_embeddings=24)
    theirs = shake(transformers.BertForMaskedLM(config))
    config.save_pretrained(tmp_path)
    state = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"): t for name, t in theirs.state_dict().items()}
    state["bert.embeddings.position_ids"] = torch.arange(24)[None]
    torch.save(state, tmp_path / "pytorch_model.bin")
    ours = load(image_tower="tiny-vit:none", text_tower=tmp_path)
    assert any("no pooler in the file" in note for note in ours.origin["notes"])
    ours = load(image_tower="tiny-vit:none", text_tower=tmp_path, pool="first")
    expected = their_features(theirs.bert, texts(0), 0, "first")
    assert (ours.bert(texts(0)) - expected).abs().max() < 1e-5


# -----------------------------------------------------------------------------
# torchvision

@pytest.mark.parametrize("name, features", [
    ("resnet18", 512), ("resnet50", 2048), ("squeezenet1_0", 512), ("mobilenet_v3_small", 1024),
    ("efficientnet_b0", 1280), ("vit_b_32", 768), ("regnet_x_400mf", 400)])
def test_an_image_tower_gives_what_torchvision_would_classify(models, name, features):
    size = 64
    torch.manual_seed(0)
    theirs = models.get_model(name, **{"image_size": size} if name.startswith("vit") else {}).eval()
    images, seen = torch.randn(2, 3, size, size), []
    norms = [m for m in theirs.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    theirs.train()(images)  # running statistics as they start make the features vanish
    theirs.eval()
    *_, (_, last) = ((n, m) for n, m in theirs.named_modules()
                     if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)))
    last.register_forward_hook(lambda module, inputs, out: seen.append((inputs[0], out)))
    scores = theirs(images)
    config = dataclasses.replace(CONFIGS["tiny"], backbone=name, image_size=size)
    tower = clip_model.TorchvisionTower(config).eval()
    state = {key: t for key, t in theirs.state_dict().items()
             if not key.startswith(tower.removed + ".")}
    tower.trunk.load_state_dict(state)  # strict
    found = tower.trunk(images)
    assert found.shape == (2, features) == (2, tower.features)
    if name.startswith("squeezenet"):  # it pools behind its last convolution
        expected = seen[0][0].mean((2, 3))
    else:
        expected = seen[0][0]
        assert torch.equal(seen[0][1], scores)
    assert (found - expected).abs().max() <= 1e-5 and expected.std() > 1e-4
    assert (tower(images) - expected @ tower.proj).abs().max() <= 1e-4
    off = [m.p for m in tower.trunk.children() if isinstance(m, torch.nn.Dropout)]
    assert not any(off + [m.p for m in getattr(tower.trunk, "classifier", torch.nn.Identity())
                          .modules() if isinstance(m, torch.nn.Dropout)])


def test_resnet50s_trunk_has_the_published_count_and_normalisation(models):
    config = dataclasses.replace(CONFIGS["tiny"], backbone="resnet50", image_size=224)
    with torch.device("meta"):
        model = CLIP(config)
    assert sum(p.numel() for p in model.visual.trunk.parameters()) == 23_508_032
    assert model.image_mean == (0.485, 0.456, 0.406) and model.image_std == (0.229, 0.224, 0.225)
    assert CLIP(CONFIGS["tiny-vit"]).image_mean == (0.48145466, 0.4578275, 0.40821073)


def test_a_published_weight_file_loads_as_an_image_tower(models, shared):
    path = shared / "weights" / "squeezenet1_0_imagenet.pt"
    model = load(image_tower=f"squeezenet1_0:{path}", text_tower="tiny-vit:none", image_size=96)
    theirs = models.squeezenet1_0()
    theirs.load_state_dict(torch.load(path, weights_only=True))
    images = torch.randn(2, 3, 96, 96)
    assert model.config.image_size == 96
    with torch.no_grad():
        expected = theirs.eval().features(images).relu().mean((2, 3))
        assert (model.visual.trunk(images) - expected).abs().max() < 1e-5
    assert len(model.origin["sha256"]) == 64
    assert not any("squeezenet" in note for note in model.origin["notes"])


# -----------------------------------------------------------------------------
# Two towers

def test_clip_roberta_has_the_published_count_names_and_tensors(transformers):
    config = dataclasses.replace(CONFIGS["ViT-B/32"], **bert_fields(BERTS["roberta-base"]))
    text = transformers.RobertaConfig(max_position_embeddings=514, type_vocab_size=1)
    with torch.device("meta"):
        ours = CLIP(config)
        theirs = transformers.VisionTextDualEncoderModel(
            transformers.VisionTextDualEncoderConfig(
                vision_config=transformers.CLIPVisionConfig().to_dict(),
                text_config=text.to_dict()))
    assert sum(p.numel() for p in ours.parameters()) == 212_888_065
    state = clip_model.to_hugging_face(ours.state_dict())
    assert len(state) == 401
    assert {key: t.shape for key, t in state.items()} == {
        key: t.shape for key, t in theirs.state_dict().items()}
    assert (ours.text_kind, ours.pad_id, ours.config.context_length) == ("bytebpe", 1, 512)


def assert_equal_to_a_dual_encoder(ours, theirs):
    images, tokens = torch.randn(4, 3, 32, 32), texts(ours.pad_id)
    with torch.no_grad():
        image, text, scale = ours(images, tokens)
        out = theirs(input_ids=tokens, pixel_values=images, return_loss=True,
                     attention_mask=(tokens != ours.pad_id).long())
    logits, labels = scale * image @ text.t(), torch.arange(4)
    loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
    assert out.logits_per_image.std() > 0.1
    assert (logits - out.logits_per_image).abs().max() <= 1e-5 and abs(loss - out.loss) <= 1e-5


@pytest.mark.parametrize("text", ["bert", "roberta"])
def test_transformers_computes_the_same_from_our_dual_encoder(tmp_path, transformers, text):
    ours = two(tower=text)
    save(ours, tmp_path, layout="hf")
    theirs, report = transformers.VisionTextDualEncoderModel.from_pretrained(
        tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_equal_to_a_dual_encoder(ours, theirs.eval())
    again = load(tmp_path)
    assert same_weights(again, ours) and again.config == ours.config


@pytest.mark.parametrize("form", ["as saved", "as saved before 5"])
@pytest.mark.parametrize("text", ["bert", "roberta"])
def test_we_compute_the_same_from_their_dual_encoder(tmp_path, transformers, text, form):
    vision = transformers.CLIPVisionConfig(hidden_size=48, intermediate_size=192, image_size=32,
                                           num_hidden_layers=2, num_attention_heads=3, patch_size=8)
    theirs = shake(transformers.VisionTextDualEncoderModel(
        transformers.VisionTextDualEncoderConfig(
            vision_config=vision.to_dict(), projection_dim=24,
            text_config=their_tower(transformers, text).config.to_dict())))
    theirs.save_pretrained(tmp_path)
    if form != "as saved":
        (tmp_path / "model.safetensors").unlink()
        torch.save({name.replace("vision_model.", "vision_model.vision_model."): tensor
                    for name, tensor in theirs.state_dict().items()}, tmp_path / "pytorch_model.bin")
    ours = load(tmp_path)
    assert ours.config.vision_head == 16 and ours.config.text == SMALL[text]
    assert_equal_to_a_dual_encoder(ours, theirs)
    only = load(image_tower=tmp_path, text_tower=tmp_path, embed_dim=24)
    assert all(torch.equal(only.state_dict()[name], tensor)
               for name, tensor in ours.state_dict().items()
               if not name.startswith(("text_projection", "logit_scale")))


def test_a_dual_encoder_that_transformers_cannot_run_loads_all_the_same(tmp_path, transformers):
    vision = transformers.CLIPVisionConfig(hidden_size=64, intermediate_size=256, image_size=32,
                                           num_hidden_layers=2, num_attention_heads=1, patch_size=8)
    text = their_tower(transformers, "distilbert").config
    theirs = shake(transformers.VisionTextDualEncoderModel(transformers.VisionTextDualEncoderConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=24)))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(IndexError):  # it looks for a pooler
        theirs(input_ids=texts(0), pixel_values=torch.zeros(4, 3, 32, 32))
    ours = load(tmp_path)
    assert ours.config.text == SMALL["distilbert"] and ours.text_kind == "wordpiece"
    expected = theirs.text_projection(their_features(theirs.text_model, texts(0), 0, "first"))
    assert (ours.encode_text(texts(0)) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("image, text, proj", [
    ("tiny-vit", "distilbert", "linear"), ("tiny-vit", "bert", "mlp"), ("tiny-rn", "roberta", "mlp"),
    ("tiny-rn", "bert", "linear"), ("tiny-vit", "", "mlp"), ("squeezenet1_0", "distilbert", "mlp"),
    ("mobilenet_v3_small", "", "linear")])
def test_any_two_towers_come_back_from_a_file(tmp_path, models, image, text, proj):
    if image in CONFIGS:
        model = two(image, text, proj=proj)
    else:
        model = two("tiny-vit", text, proj=proj, backbone=image, image_size=64, vision_layers=0,
                    vision_patch=None, vision_width={"squeezenet1_0": 512}.get(image, 1024))
    again = load(save(model, tmp_path / "a.safetensors"))
    assert again.config == model.config and same_weights(again, model) and not again.training
    assert again.image_mean == model.image_mean and again.text_kind == model.text_kind
    images, tokens = torch.randn(3, 3, *[model.config.image_size] * 2), texts(model.pad_id)
    if not text:
        tokens[:, 5], tokens[:, 6:] = VOCAB - 1, 0
    for ours, theirs in zip(again(images, tokens[:3]), model(images, tokens[:3])):
        assert torch.equal(ours, theirs)
    report = inspect(tmp_path / "a.safetensors")
    assert report["architecture"] == "CLIP" and report["config"]["backbone"] == model.config.backbone
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    refused = ["openai", "open_clip"] + ["hf"] * ((image, text, proj) != ("tiny-vit", "bert", "linear"))
    for layout in refused:
        with pytest.raises(WeightsError, match="choose the layout") as error:
            save(model, tmp_path / layout, layout=layout)
        assert "\n" not in str(error.value) and "safetensors" in str(error.value)
        assert not (tmp_path / layout).exists()


@pytest.mark.parametrize("proj", ["linear", "mlp"])
@pytest.mark.parametrize("image", ["tiny-vit", "tiny-rn", "squeezenet1_0"])
def test_gradients_reach_every_tensor_of_both_towers(models, image, proj):
    model = load(image_tower=f"{image}:none", text_tower="tiny-bert:none", proj=proj, embed_dim=16,
                 image_size=64).train()
    size = model.config.image_size
    image, text, scale = model(torch.randn(4, 3, size, size), texts(model.pad_id))
    assert image.shape == text.shape == (4, model.config.embed_dim)
    F.cross_entropy(scale * image @ text.t(), torch.arange(4)).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without
    heads = [name for name in model.state_dict() if name.startswith(HEADS)]
    assert len(heads) == (12 if proj == "mlp" else 3 if "attnpool" in str(heads) else 2)


def test_the_residual_head_is_its_formula():
    torch.manual_seed(0)
    head = clip_model.ResidualHead(6, 4).double().eval()
    x = torch.randn(5, 6, dtype=torch.float64)
    p = x @ head.projection.weight.t() + head.projection.bias
    gelu = p * 0.5 * (1 + torch.erf(p / 2 ** 0.5))
    y = gelu @ head.fc.weight.t() + head.fc.bias + p
    y = (y - y.mean(1, keepdim=True)) / (y.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(head(x), y, **EXACT)
    assert not torch.equal(head.train()(x), head(x))


# -----------------------------------------------------------------------------
# load(image_tower, text_tower)

@pytest.fixture
def clip_file(tmp_path):
    return save(two(tower=""), tmp_path / "clip.safetensors")


def test_a_clips_own_projection_is_kept_where_it_fits(clip_file):
    base = load(clip_file)
    kept = load(clip_file, text_tower="tiny-bert:none", embed_dim=32)
    assert torch.equal(kept.visual.proj, base.visual.proj)
    assert kept.config.text == BERTS["tiny-bert"] and kept.config.embed_dim == 32
    assert "text_projection starts from random numbers" in kept.origin["notes"]
    assert "tiny-bert starts from random numbers" in kept.origin["notes"]
    assert not any("visual" in note for note in kept.origin["notes"])
    model = load(clip_file, image_tower="tiny-rn:none", embed_dim=32, keep_visual_projection=False)
    assert model.origin["notes"] == [
        "tiny-rn starts from random numbers",
        "visual.attnpool.c_proj starts from random numbers",
        "text_projection starts from random numbers (the CLIP's own is (64, 32))"]
    assert kept.logit_scale.item() == pytest.approx(2.6593, abs=1e-4)
    for more in (dict(embed_dim=32, keep_visual_projection=False), dict(embed_dim=24),
                 dict(embed_dim=32, proj="mlp")):
        new = load(clip_file, text_tower="tiny-bert:none", **more)
        assert any(note.startswith("visual.proj starts from random numbers (the CLIP's own is "
                                   "(64, 32))") for note in new.origin["notes"])
        assert not torch.equal(new.visual.proj if new.config.proj == "linear" else
                               new.visual.proj.projection.weight.t()[:, :32], base.visual.proj)
        assert torch.equal(new.visual.ln_post.weight, base.visual.ln_post.weight)


def test_the_tower_that_is_not_named_comes_from_the_clip(clip_file, models):
    base = load(clip_file)
    model = load(clip_file, image_tower="squeezenet1_0", embed_dim=32)
    assert model.config.backbone == "squeezenet1_0" and model.config.image_size == 224
    tokens = texts(0)
    tokens[:, -1] = VOCAB - 1
    assert torch.equal(model.encode_text(tokens), base.encode_text(tokens))
    assert model.image_mean == (0.485, 0.456, 0.406) and model.text_kind == "bpe"


def test_towers_of_two_clips_with_different_activations_are_refused(tmp_path, clip_file):
    other = save(two(tower="", activation="gelu"), tmp_path / "gelu.safetensors")
    with pytest.raises(WeightsError, match="QuickGELU"):
        load(clip_file, image_tower=other)
    model = load(other, text_tower="tiny-bert:none")  # a BERT has its own
    assert model.config.activation == "gelu"


@pytest.mark.parametrize("arguments, message", [
    (dict(text_tower="roberta-base"), "no image tower"),
    (dict(image_tower="tiny-vit:none"), "no text tower"),
    (dict(), "nothing to load"),
    (dict(image_tower="tiny-vit:none", text_tower="roberta-base"),
     "put its config.json and model.safetensors .*roberta-base:none"),
    (dict(image_tower="resnet5000", text_tower="tiny-bert:none"), "no image tower 'resnet5000'"),
    (dict(image_tower="torchvision:ViT-B/32", text_tower="tiny-bert:none"), "no image tower"),
    (dict(image_tower="squeezenet1_0:IMAGENET9K", text_tower="tiny-bert:none"), "no file or model"),
    (dict(image_tower="tiny-vit:none", text_tower="tiny-bert:none", proj="conv"), "proj 'conv'"),
    (dict(image_tower="tiny-vit:none", text_tower="tiny-bert:none", pool="mean"), "pool 'mean'"),
])
def test_what_makes_no_two_towers_is_refused_in_one_line(models, arguments, message):
    with pytest.raises(WeightsError, match=message) as error:
        load(**arguments)
    assert "\n" not in str(error.value)


def bert_folder(path, drop=None, weights=True, **changes):
    """A folder as transformers writes it, made without transformers, and spoilt as asked."""
    tower, config = two(tower="bert").bert, SMALL["bert"]
    state = tower.state_dict()
    state.pop(drop, None)
    text = clip_model.hf_config(two(tower="bert").config)["text_config"]
    assert config.heads == text["num_attention_heads"]
    (path / "config.json").write_text(json.dumps(text | changes))
    if weights:
        torch.save(state, path / "pytorch_model.bin")
    return path


@pytest.mark.parametrize("spoil, message", [
    (dict(weights=False), "has none of model.safetensors"),
    (dict(hidden_act="relu"), "config.json: a bert with another activation"),
    (dict(position_embedding_type="relative_key"), "relative positions"),
    (dict(num_attention_heads=5), "not a BERT"),
    (dict(num_attention_heads="two"), "these sizes make no CLIP|not a BERT"),
    (dict(drop="encoder.layer.1.output.dense.weight"), "lack 'bert.encoder.layer.1.output.dense"),
    (dict(drop="embeddings.position_embeddings.weight"), "there is no 'embeddings.position_emb"),
])
def test_a_spoilt_folder_is_refused_in_one_line(tmp_path, spoil, message):
    with pytest.raises(WeightsError, match=message) as error:
        load(image_tower="tiny-vit:none", text_tower=bert_folder(tmp_path, **spoil))
    assert "\n" not in str(error.value)


def test_weights_of_another_torchvision_model_are_refused(tmp_path, models):
    torch.save(models.resnet18().state_dict(), tmp_path / "a.pt")
    with pytest.raises(WeightsError, match="'visual.trunk.layer1.0.conv1.weight' is|lack 'visual"):
        load(image_tower=f"resnet50:{tmp_path / 'a.pt'}", text_tower="tiny-bert:none")
    model = load(image_tower=f"torchvision:resnet18:{tmp_path / 'a.pt'}",
                 text_tower="tiny-bert:none")
    assert torch.equal(model.visual.trunk.conv1.weight,
                       torch.load(tmp_path / "a.pt", weights_only=True)["conv1.weight"])


def test_a_folder_with_another_image_tower_is_refused(tmp_path, transformers):
    config = transformers.VisionTextDualEncoderConfig(
        vision_config=transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, image_size=32,
                                             num_attention_heads=2, intermediate_size=32).to_dict(),
        text_config=their_tower(transformers, "bert").config.to_dict())
    transformers.VisionTextDualEncoderModel(config).save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="image tower is a 'vit'"):
        load(tmp_path)


def test_a_broken_torchvision_is_named_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(WeightsError, match="needs torchvision, which does not import"):
        load(image_tower="resnet50", text_tower="tiny-bert:none")
    with pytest.raises(WeightsError, match="^this image tower needs torchvision"):
        clip_model.check_state(dataclasses.replace(CONFIGS["tiny"], backbone="resnet50"), {})


def test_inspect_describes_folders_of_towers(tmp_path, capsys):
    folder = bert_folder(tmp_path)
    report = inspect(folder)
    assert report["architecture"] == "text tower" and report["config"]["family"] == "bert"
    assert report["parameters"] == sum(p.numel() for p in BertTower(SMALL["bert"]).parameters())
    save(two(), tmp_path / "dual", layout="hf")
    assert clip_model.main(["--inspect", str(tmp_path / "dual"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["architecture"] == "CLIP" and report["config"]["text"]["family"] == "roberta"
    assert report["parameters"] == sum(p.numel() for p in two().parameters())
