"""Equal to transformers, open_clip and torchvision on shared random weights, to 1e-5, both ways;
and what a configuration asks that this CLIP does not have is refused by its name."""
import copy
import dataclasses
import json
import warnings

import pytest
import torch
from helpers import WORDS, images_for, noise, perturb, refused, texts_for, tiny_clip

from clip_model import BERTS, CLIP, CONFIGS, BertConfig, bert_fields
from images import Preprocess, normalise
from layouts import pooling_settings
from tokenizer import BPETokenizer, ChineseTokenizer, WordPieceTokenizer, for_model
from weights import export, load, save

VOCAB, TOLERANCE = 96, 1e-5
BERT = {
    "bert": BertConfig("bert", VOCAB, 32, 3, 2, 48, 24),
    "roberta": BertConfig("roberta", VOCAB, 32, 3, 2, 48, 24, type_vocab=1, pad_id=1, eps=1e-5),
    "distilbert": BertConfig("distilbert", VOCAB, 32, 3, 2, 48, 24, type_vocab=0, pool="first"),
}
GELU = {"hidden_act": "gelu"}
CAPTIONS = ["a photo of a cat's 3 toys!", "The dog"]


def shake(model):
    return perturb(model.eval(), by=0.05, where=lambda *_: True)


def make(name="tiny-vit", bert=None, **changes):
    fields = bert_fields(bert) if bert else {"vocab_size": VOCAB}
    return shake(tiny_clip(config=name, **{**fields, **changes}))


def texts(model):
    """Of 2 tokens, of all that the text tower has, and between."""
    longest = model.config.context_length
    return texts_for(model, (2, 9, longest // 2, longest))


def same_features(ours, encode_image=None, encode_text=None):
    with torch.no_grad():
        for our, their, x in ((ours.encode_image, encode_image, images_for(ours, 3)),
                              (ours.encode_text, encode_text, texts(ours))):
            if their:
                found, expected = our(x), their(x)
                assert found.shape == expected.shape and expected.std() > 0.01
                assert (found - expected).abs().max() <= TOLERANCE


def same_logits(ours, logits):
    images, tokens = images_for(ours, 3), texts(ours)
    with torch.no_grad():
        image, text, scale = ours(images, tokens)
        assert (scale * image @ text.t() - logits(images, tokens)).abs().max() <= TOLERANCE


def same_pixels(model, prepare):
    """What another library makes of a picture is what we make of it."""
    picture = noise(50, 40)
    ours = normalise(Preprocess.of(model)(picture)[None], model.image_mean, model.image_std)
    assert torch.allclose(prepare(picture), ours, rtol=0, atol=1e-6) and ours.std() > 0.1


@pytest.fixture(scope="module")
def open_clip():
    return pytest.importorskip("open_clip", exc_type=(ImportError, RuntimeError, OSError))


@pytest.fixture(scope="module")
def models():
    return pytest.importorskip("torchvision.models", exc_type=(ImportError, RuntimeError, OSError))


# -----------------------------------------------------------------------------
# transformers

def mask(model, tokens):
    return (tokens != model.pad_id).long() if model.config.text else None


def same_as_hugging_face(ours, theirs):
    pooled = ours.config.text is None or ours.config.text.pool == "pooler"

    def encode_image(images):
        return theirs.visual_projection(theirs.vision_model(images).pooler_output)

    def encode_text(tokens):
        out = theirs.text_model(tokens, attention_mask=mask(ours, tokens))
        return theirs.text_projection(out.pooler_output if pooled else out[0][:, 0])
    same_features(ours, encode_image, encode_text)
    same_logits(ours, lambda images, tokens: theirs(
        input_ids=tokens, pixel_values=images, attention_mask=mask(ours, tokens)).logits_per_image)


@pytest.mark.parametrize("text, kind, tokenizer", [
    ("", "CLIP", BPETokenizer), ("bert", "VisionTextDualEncoder", WordPieceTokenizer),
    ("roberta", "VisionTextDualEncoder", None), ("first", "ChineseCLIP", ChineseTokenizer)])
@pytest.mark.parametrize("changes", [{}, {"activation": "gelu", "vision_head": 16}])
def test_transformers_opens_our_folder_and_computes_the_same(tmp_path, transformers, text, kind,
                                                             tokenizer, changes):
    bare = dataclasses.replace(BERT["bert"], pool="first")
    ours = make(bert={"first": bare, **BERT}.get(text), **{} if text else {"vocab_size": 49_408},
                **changes)
    ours.image_mean, ours.image_interpolation = (0.5, 0.4, 0.3), "bilinear"
    ours.image_resize = "squash" if changes or text == "first" else "shortest"
    if tokenizer:
        tokenizer = tokenizer(*[WORDS] if text else [])
    folder = export(ours, tmp_path, "hf", tokenizer).parent
    theirs, report = getattr(transformers, f"{kind}Model").from_pretrained(
        folder, output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same_as_hugging_face(ours, theirs.eval())
    again = load(folder)
    assert again.config == ours.config and again.pixels == ours.pixels
    if tokenizer:
        processor = getattr(transformers, f"{kind}Processor").from_pretrained(folder, backend="pil")
        same_pixels(ours, lambda x: processor(images=x, return_tensors="pt")["pixel_values"])
        assert processor.tokenizer.model_max_length == ours.config.context_length
        for words in CAPTIONS:  # alone: they pad with another word than OpenAI
            assert processor(text=words)["input_ids"] == tokenizer(words, None)[0].tolist()
        inputs = processor(text=CAPTIONS, images=[noise()], padding=True, return_tensors="pt")
        image, features, _ = ours(inputs["pixel_values"], tokenizer(CAPTIONS, 24))
        found = theirs(**inputs)
        assert (found.image_embeds - image).abs().max() <= TOLERANCE
        assert (found.text_embeds - features).abs().max() <= TOLERANCE
        assert for_model(again).kind == tokenizer.kind


def hugging_face_clip(transformers, text=(), vision=(), **more):
    """A small CLIPModel with some settings changed."""
    text = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=256, num_hidden_layers=3,
                num_attention_heads=2, max_position_embeddings=77, eos_token_id=VOCAB - 1,
                bos_token_id=VOCAB - 2, pad_token_id=0) | dict(text)
    vision = dict(hidden_size=48, intermediate_size=192, num_hidden_layers=2, image_size=40,
                  num_attention_heads=3, patch_size=8) | dict(vision)
    torch.manual_seed(3)
    return shake(transformers.CLIPModel(transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=24, **more)))


@pytest.mark.parametrize("text, vision, name", [  # name: of what is refused
    ({}, {}, ""), (GELU, GELU, ""), ({"eos_token_id": 2}, {}, ""),
    ({"num_attention_heads": 4}, {"num_attention_heads": 6}, ""),
    ({"eos_token_id": 5}, {}, "eos_token_id"), (GELU, {}, "hidden_act"), ({}, GELU, "hidden_act"),
    ({"hidden_act": "gelu_new"}, {"hidden_act": "gelu_new"}, "gelu_new"),
    ({"layer_norm_eps": 1e-6}, {}, "layer_norm_eps"),
    ({}, {"layer_norm_eps": 1e-12}, "layer_norm_eps"),
    ({"intermediate_size": 100}, {}, "c_fc")])
def test_a_transformers_folder_is_computed_alike_or_refused_by_name(tmp_path, transformers, text,
                                                                    vision, name):
    theirs = hugging_face_clip(transformers, text, vision)
    theirs.save_pretrained(tmp_path)
    if name:
        refused(lambda: load(tmp_path), name)
        return
    same_as_hugging_face(load(tmp_path), theirs)
    if not text:  # the same from a .bin, alone or in its folder
        (tmp_path / "model.safetensors").unlink()
        torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
        same_as_hugging_face(load(tmp_path / "pytorch_model.bin"), theirs)


def test_the_older_second_table_of_a_config_counts_whole(tmp_path, transformers):
    hugging_face_clip(transformers, GELU, GELU).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    older = {f"{key}_dict": {name: x for name, x in table.items() if name != "hidden_act"}
             for key, table in json.loads(text).items() if key in ("text_config", "vision_config")}
    (tmp_path / "config.json").write_text(json.dumps(json.loads(text) | older))
    same_as_hugging_face(load(tmp_path), transformers.CLIPModel.from_pretrained(tmp_path).eval())


def test_shards_are_read_together_each_verified_and_a_shard_alone_is_named(tmp_path, transformers):
    theirs = hugging_face_clip(transformers)
    theirs.save_pretrained(tmp_path, max_shard_size="200KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    ours = load(tmp_path)
    same_as_hugging_face(ours, theirs)
    index = load(tmp_path / "model.safetensors.index.json")
    assert index.origin == ours.origin | {"name": "model.safetensors.index.json"}
    (tmp_path / "pytorch_model.bin").write_bytes(b"of an older download")
    assert load(tmp_path).origin == ours.origin
    refused(lambda: load(shards[1]), shards[1].name, "index.json", f"{len(shards)}")
    whole = shards[1].read_bytes()
    for content in (whole[:-8], shards[0].read_bytes(), None):  # cut; of other tensors; gone
        shards[1].write_bytes(content) if content else shards[1].unlink()
        refused(lambda: load(tmp_path), shards[1].name)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("text", list(BERT))
def test_we_compute_the_same_from_their_dual_encoder(tmp_path, transformers, text, wrapped):
    vision = transformers.CLIPVisionConfig(hidden_size=48, intermediate_size=192, image_size=32,
                                           num_hidden_layers=2, num_attention_heads=3, patch_size=8)
    theirs = shake(transformers.VisionTextDualEncoderModel(
        transformers.VisionTextDualEncoderConfig(
            vision_config=vision.to_dict(), projection_dim=24,
            text_config=their_bert(transformers, text).config.to_dict())))
    theirs.save_pretrained(tmp_path)
    if wrapped:  # as transformers before 5 named them
        (tmp_path / "model.safetensors").unlink()
        torch.save({name.replace("vision_model.", "vision_model.vision_model."): tensor
                    for name, tensor in theirs.state_dict().items()},
                   tmp_path / "pytorch_model.bin")
    ours = load(tmp_path)
    assert ours.config.vision_head == 16 and ours.config.text == BERT[text]
    if text == "distilbert":  # transformers looks for a pooler that is not there
        same_features(ours, None, lambda tokens: theirs.text_projection(
            theirs.text_model(tokens, attention_mask=mask(ours, tokens))[0][:, 0]))
    else:
        same_as_hugging_face(ours, theirs)


def test_one_tower_of_a_clip_is_read_alone(tmp_path, transformers):
    theirs = hugging_face_clip(transformers, {"projection_dim": 24}, {"projection_dim": 24})
    theirs.save_pretrained(tmp_path)
    for name, kind in (("v", transformers.CLIPVisionModelWithProjection),
                       ("t", transformers.CLIPTextModelWithProjection)):
        kind.from_pretrained(tmp_path).save_pretrained(tmp_path / name)
    ours = load(image_tower=tmp_path / "v", text_tower=tmp_path / "t", embed_dim=24)
    with torch.no_grad():
        ours.logit_scale.copy_(theirs.logit_scale)  # belongs to neither tower
    same_as_hugging_face(ours, theirs)
    refused(lambda: load(tmp_path / "v"), "v", "text_projection")
    for name, tower in (("v", theirs.vision_model), ("t", theirs.text_model)):
        (tmp_path / name / "model.safetensors").unlink()  # as transformers 5 writes it alone
        torch.save(tower.state_dict(), tmp_path / name / "pytorch_model.bin")
    bare = load(image_tower=tmp_path / "v", text_tower=tmp_path / "t").state_dict()
    assert all(torch.equal(bare[name], tensor) for name, tensor in ours.state_dict().items()
               if name not in ("visual.proj", "text_projection", "logit_scale"))


# -----------------------------------------------------------------------------
# The BERT family of transformers

def their_bert(transformers, family, **changes):
    more = dict(vocab_size=VOCAB, max_position_embeddings=24)
    if family == "distilbert":
        config = transformers.DistilBertConfig(dim=32, n_layers=3, n_heads=2, hidden_dim=48, **more)
        return shake(transformers.DistilBertModel(config))
    more |= dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
    if family == "bert":
        return shake(transformers.BertModel(transformers.BertConfig(**more)))
    return shake(transformers.RobertaModel(transformers.RobertaConfig(
        type_vocab_size=1, layer_norm_eps=1e-5, **more)))


@pytest.mark.parametrize("family, pool", [
    ("bert", "pooler"), ("bert", "first"), ("bert", "mean"), ("roberta", "pooler"),
    ("roberta", "mean"), ("distilbert", "first"), ("distilbert", "mean")])
def test_a_text_tower_and_its_gradients_are_transformers_own(tmp_path, transformers, family, pool):
    theirs = their_bert(transformers, family)
    theirs.save_pretrained(tmp_path)
    if pool != BERT[family].pool:
        (tmp_path / "1_Pooling").mkdir()
        mode = {"mean": "pooling_mode_mean_tokens", "first": "pooling_mode_cls_token"}[pool]
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({mode: True, "x": False}))
        module = {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}
        (tmp_path / "modules.json").write_text(json.dumps([module]))
    ours = load(image_tower="tiny-vit:none", text_tower=tmp_path).double()
    assert ours.config.text == dataclasses.replace(BERT[family], pool=pool)
    theirs, tokens = theirs.double(), texts(ours)
    found, seen = ours.bert(tokens), mask(ours, tokens)
    out = theirs(input_ids=tokens, attention_mask=seen)
    expected = out.pooler_output if pool == "pooler" else out[0][:, 0]
    if pool == "mean":  # of sentence-transformers
        expected = (out[0] * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (found * weight).sum().backward()
    (expected * weight).sum().backward()

    def sizes(model):  # names differ; the gradients of equal tensors have equal sums of squares
        return sorted(p.grad.square().sum().item() for p in model.parameters()
                      if p.grad is not None and p.grad.any())
    torch.testing.assert_close(torch.tensor(sizes(ours.bert)), torch.tensor(sizes(theirs)))


@pytest.mark.parametrize("mode, modules, pool", [  # pool: or the name of what is refused
    ("cls", " 2_Pooling 3_Normalize", "first"), ("mean", "0_Transformer 1_Pooling", "mean"),
    ("mean", "0_BERT 1_Pooling", "mean"), ("cls", "0_DistilBERT 1_Pooling", "first"),
    ("max", " 1_Pooling", "max"), (["cls", "mean"], " 1_Pooling", "cls"), ("", " 1_Pooling", "''"),
    ("cls", " 1_Pooling 2_Dropout", "first"), ("mean", "1_Pooling 2_Dense", "Dense"),
    ("mean", " 1_Pooling 2_Normalize 3_Dense", "Dense"), ("cls", " 1_Pooling 2_Norm", "Norm")])
def test_pooling_is_what_sentence_transformers_wrote(mode, modules, pool):
    paths, home = modules.split(" "), "../" if modules[:1] == "0" else ""
    files = {f"{home}{path}/config.json": {"pooling_mode": mode} if mode else {} for path in paths}
    if paths[0] != "1_Pooling":  # else the folders alone show what there is
        files[home + "modules.json"] = [
            {"type": f"x.models.{path[2:] or 'Transformer'}", "path": path} for path in paths]

    def read(name, kind=dict):
        return files.get(name, kind())
    if pool not in ("mean", "first"):
        refused(lambda: pooling_settings(read, "bert"), pool)
        return
    prompts, lowers = f"{home}config_sentence_transformers.json", {"do_lower_case": True}
    files[prompts] = {"default_prompt_name": "query"}
    refused(lambda: pooling_settings(read, "bert"), "default_prompt_name")
    files[prompts], files["sentence_roberta_config.json"] = {"default_prompt_name": None}, lowers
    refused(lambda: pooling_settings(read, "roberta"), "sentence_roberta_config.json")
    assert pooling_settings(read, "bert") == {"pool": pool}  # whose tokenizer does it anyway
    files["tokenizer_config.json"] = {"do_lower_case": False}
    refused(lambda: pooling_settings(read, "bert"), "sentence_roberta_config.json")


def test_other_families_and_settings_of_a_bert_are_refused_by_name(tmp_path, transformers):
    their_bert(transformers, "bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in (("model_type", "xlm-roberta"), ("hidden_act", "gelu_new"),
                       ("is_decoder", True), ("position_embedding_type", "relative_key"),
                       ("num_hidden_layers", 2), ("num_attention_heads", 5)):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        refused(lambda: load(image_tower="tiny-vit:none", text_tower=tmp_path),
                "heads" if value == 5 else f"{key} {value!r}")  # noqa: B023


def test_clip_roberta_has_the_published_count():
    with torch.device("meta"):
        ours = CLIP(dataclasses.replace(CONFIGS["ViT-B/32"], **bert_fields(BERTS["roberta-base"])))
    assert sum(p.numel() for p in ours.parameters()) == 212_888_065


# -----------------------------------------------------------------------------
# open_clip

def same_as_open_clip(ours, theirs):
    same_features(ours, theirs.encode_image, theirs.encode_text)
    same_logits(ours, lambda images, tokens: theirs.get_logits(images, tokens)[0]
                - (theirs.logit_bias if theirs.logit_bias is not None else 0))


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
@pytest.mark.parametrize("changes", [{}, {"activation": "gelu"},
                                     {"vision_head": 16, "text_head": 32}])
def test_open_clip_opens_our_folder_and_computes_the_same(tmp_path, open_clip, name, changes):
    ours = make(name, **changes)
    ours.image_mean, ours.image_interpolation = (0.5, 0.4, 0.3), "bilinear"
    ours.image_resize = "squash" if changes else "shortest"
    ours.logit_bias = torch.nn.Parameter(torch.tensor(-7.5))
    place = f"local-dir:{export(ours, tmp_path, 'open_clip').parent}"
    theirs, _, prepare = open_clip.create_model_and_transforms(place)
    assert theirs.logit_bias.item() == -7.5
    same_as_open_clip(ours, theirs.eval())
    same_pixels(ours, lambda picture: prepare(picture)[None])
    assert torch.equal(open_clip.get_tokenizer(place)(CAPTIONS), BPETokenizer()(CAPTIONS))


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
def test_open_clips_openai_reader_computes_the_same_from_our_file(tmp_path, open_clip, name):
    path = save(make(name), tmp_path / "a.pt", layout="openai", dtype=torch.float16)
    ours = load(path)  # half precision as OpenAI publishes it; their reader rounds to it anyway
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tries the deprecated torch.jit.load first
        theirs = open_clip.load_openai_model(str(path), precision="fp32", device="cpu").eval()
    same_as_open_clip(ours, theirs)


VISION = {"vit": dict(image_size=48, layers=3, width=96, patch_size=16, head_width=32),
          "resnet": dict(image_size=64, layers=[1, 2, 1, 1], width=8, head_width=64,
                         patch_size=None)}
TEXT = dict(context_length=77, vocab_size=VOCAB, width=64, heads=1, layers=2)


def their_model(open_clip, kind="vit", custom=False, vision=(), text=(), **model):
    config = {"embed_dim": 40, "vision_cfg": VISION[kind] | dict(vision),
              "text_cfg": TEXT | dict(text), **model}
    torch.manual_seed(4)
    theirs = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**copy.deepcopy(config))
    return shake(theirs), config | ({"custom_text": True} if custom else {})


@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("kind", ["vit", "resnet"])
@pytest.mark.parametrize("model", [{"quick_gelu": True}, {"quick_gelu": False}, {},
                                   {"init_logit_bias": -10.0}])
def test_we_compute_the_same_from_open_clips_weights(tmp_path, open_clip, kind, custom, model):
    theirs, config = their_model(open_clip, kind, custom, **model)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({
        "model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.4] * 3,
                                                "interpolation": "bilinear"}}))
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    ours = load(tmp_path)  # a model folder, as on the hub
    assert ours.config.activation == ("quick_gelu" if model.get("quick_gelu") else "gelu")
    assert (ours.image_mean, ours.image_std) == ((0.5,) * 3, (0.4,) * 3)
    assert (ours.image_resize, ours.image_interpolation) == ("shortest", "bilinear")
    assert (ours.logit_bias is None) == ("init_logit_bias" not in model)
    same_as_open_clip(ours, theirs)


GRID = [  # (settings of the vision tower, of the text tower, name of what is refused)
    *(({}, {key: value}, "") for key, value in (
        ("pool_type", "argmax"), ("no_causal_mask", False), ("proj_type", "linear"),
        ("heads", 4), ("output_tokens", False), ("pad_id", 3))),
    *(({key: value}, {}, "") for key, value in (
        ("pool_type", "tok"), ("patch_dropout", 0.5), ("head_width", 48), ("no_ln_pre", False))),
    *(({}, {key: value}, key) for key, value in (
        ("pool_type", "first"), ("no_causal_mask", True), ("norm_kwargs", {"eps": 1e-6}),
        ("act_kwargs", {"approximate": "tanh"}), ("hf_tokenizer_name", "bert-base-uncased"))),
    *(({key: value}, {}, key) for key, value in (
        ("pool_type", "avg"), ("no_ln_pre", True), ("pos_embed_type", "sin_cos_2d"),
        ("timm_model_name", "resnet50"))),
    ({"layers": 1}, {}, "num_hidden_layers"), ({"image_size": [32, 128]}, {}, "image_size"),
    ({"width": 192}, {}, "vision_width"),
    ({}, {"width": 192}, "text_width"), ({"mlp_ratio": 2.0}, {}, "mlp_ratio"),
    ({}, {"proj_bias": True}, "proj_bias"),
    ({"ls_init_value": 1e-4}, {}, "ls_init_value")]


@pytest.mark.parametrize("custom", [False, True])
def test_a_grid_of_open_clips_settings_is_computed_alike_or_refused(tmp_path, open_clip, custom):
    for number, (vision, text, name) in enumerate(GRID):
        built = () if name else (vision, text)  # the name alone must be enough
        theirs, config = their_model(open_clip, "vit", custom, *built)
        config["vision_cfg"] |= vision
        config["text_cfg"] |= text
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        torch.save(theirs.state_dict(), folder / "open_clip_pytorch_model.bin")
        if name:
            refused(lambda: load(folder), name, folder)  # noqa: B023
        else:
            same_as_open_clip(load(folder), theirs)


# -----------------------------------------------------------------------------
# torchvision and timm

@pytest.mark.parametrize("name, features", [
    ("resnet18", 512), ("squeezenet1_0", 512), ("mobilenet_v3_small", 1024),
    ("efficientnet_b0", 1280), ("vit_b_32", 768), ("regnet_x_400mf", 400)])
def test_an_image_tower_gives_what_torchvision_would_classify(tmp_path, models, name, features):
    torch.manual_seed(0)
    theirs = models.get_model(name, **{"image_size": 64} if name.startswith("vit") else {})
    images, seen = torch.randn(2, 3, 64, 64), []
    for norm in theirs.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = 1.0
    theirs.train()(images)  # running statistics as they start make the features vanish
    last = [m for m in theirs.eval().modules()
            if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))][-1]
    last.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    theirs(images)
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    ours = load(image_tower=f"torchvision:{name}:{tmp_path / 'a.pth'}",
                text_tower="tiny-vit:none", image_size=64)
    expected = seen[0].mean((2, 3)) if name.startswith("squeezenet") else seen[0]
    assert ours.pooled_image(images).shape == (2, features) == expected.shape
    assert (ours.pooled_image(images) - expected).abs().max() <= TOLERANCE
    assert expected.std() > 1e-4 and ours.image_mean == (0.485, 0.456, 0.406)
    same_features(ours, lambda x: ours.pooled_image(x) @ ours.visual.proj)


def test_pixels_are_those_of_the_published_weights_named(models, monkeypatch):
    make_model, text = models.get_model, "tiny-vit:none"
    monkeypatch.setattr(models, "get_model", lambda name, weights=None: make_model(name))
    for name, mode in (("V1", "bicubic"), ("V2", "bilinear")):
        assert load(None, f"efficientnet_b1:IMAGENET1K_{name}", text).image_interpolation == mode
    pytest.importorskip("timm", reason="timm is not installed")
    ours = load(None, "timm:convnextv2_nano.fcmae_ft_in22k_in1k_384", text, image_size=64)
    assert ours.image_resize == "squash"


def test_buffers_that_no_file_holds_are_there_before_and_after_a_file(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    ours = load(image_tower="timm:levit_128s", text_tower="tiny")
    theirs = timm.create_model("levit_128s", num_classes=0).eval()
    theirs.load_state_dict(ours.visual.trunk.state_dict())
    images = torch.randn(1, 3, 224, 224)
    save(ours, tmp_path / "a.safetensors")
    for model in (ours, load(tmp_path / "a.safetensors")):
        torch.testing.assert_close(model.visual.trunk(images), theirs(images), rtol=0, atol=0)


def test_names_of_torchvision_and_of_timm_are_both_read(tmp_path, models):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    theirs = timm.create_model("mobilenetv3_small_100", num_classes=10).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    torch.save(models.resnet18().state_dict(), tmp_path / "other.pth")
    for prefix in ("", "timm:", "torchvision:"):
        ours = load(image_tower=f"{prefix}mobilenetv3_small_100:{tmp_path / 'timm.pth'}",
                    text_tower="tiny-vit:none", image_size=64)
        assert ours.config.backbone == "timm:mobilenetv3_small_100"
        images = images_for(ours, 2)
        expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
        assert (ours.pooled_image(images) - expected).abs().max() <= TOLERANCE
    again = load(save(ours, tmp_path / "a.safetensors"))
    assert torch.equal(again.encode_image(images), ours.encode_image(images))
    refused(lambda: load(image_tower=f"efficientnet_b0:{tmp_path / 'other.pth'}",
                         text_tower="tiny-vit:none"), "other.pth", "efficientnet_b0")
    refused(lambda: load(image_tower=tmp_path / "other.pth", text_tower="tiny-vit:none"),
            "other.pth", "NAME:FILE")
    torch.save({"fc.weight": torch.ones(10, 512)}, tmp_path / "head.pth")  # the removed layer alone
    refused(lambda: load(image_tower=f"resnet18:{tmp_path / 'head.pth'}",
                         text_tower="tiny-vit:none"), "head.pth", "resnet18")
