"""Equal to transformers and open_clip on the same random weights, in both directions, to 1e-5."""
import dataclasses
import json
import warnings

import pytest
import torch

from clip_model import CLIP, CONFIGS, load, save

VOCAB, TOLERANCE = 96, 1e-5


def make(name="tiny-vit", **changes):
    torch.manual_seed(0)
    model = CLIP(dataclasses.replace(CONFIGS[name], vocab_size=VOCAB, **changes)).eval()
    shake(model)
    return model


@torch.no_grad()
def shake(model):
    """Biases, gains and running statistics start at 0 and 1, where a swap would not show."""
    generator = torch.Generator().manual_seed(1)
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var"):
            tensor.mul_(1.5)
        elif tensor.is_floating_point() and tensor.dim():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))


def inputs(model):
    generator = torch.Generator().manual_seed(2)
    size = model.config.image_size
    images = torch.randn(3, 3, size, size, generator=generator)
    tokens = torch.zeros(4, 77, dtype=torch.long)
    for row, length in zip(tokens, (2, 9, 30, 77)):
        row[:length] = torch.randint(1, VOCAB - 2, (length,), generator=generator)
        row[0], row[length - 1] = VOCAB - 2, VOCAB - 1
    return images, tokens


def assert_equal_features(ours, encode_image, encode_text):
    images, tokens = inputs(ours)
    with torch.no_grad():
        for found, expected in ((ours.encode_image(images), encode_image(images)),
                                (ours.encode_text(tokens), encode_text(tokens))):
            assert found.shape == expected.shape and expected.std() > 0.01  # nothing is trivially equal
            assert (found - expected).abs().max() <= TOLERANCE


def assert_equal_logits(ours, logits):
    images, tokens = inputs(ours)
    with torch.no_grad():
        image, text, scale = ours(images, tokens)
        assert (scale * image @ text.t() - logits(images, tokens)).abs().max() <= TOLERANCE


# -----------------------------------------------------------------------------
# transformers

@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


def assert_equal_to_hugging_face(ours, theirs):
    def encode_image(images):
        return theirs.visual_projection(theirs.vision_model(images).pooler_output)

    def encode_text(tokens):
        return theirs.text_projection(theirs.text_model(tokens).pooler_output)
    assert_equal_features(ours, encode_image, encode_text)
    assert_equal_logits(ours, lambda images, tokens: theirs(
        input_ids=tokens, pixel_values=images).logits_per_image)


@pytest.mark.parametrize("changes", [{}, {"activation": "gelu"}, {"vision_head": 16, "text_head": 32}])
def test_transformers_computes_the_same_from_our_folder(tmp_path, transformers, changes):
    ours = make(**changes)
    save(ours, tmp_path / "hf", layout="hf")
    theirs, report = transformers.CLIPModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_equal_to_hugging_face(ours, theirs.eval())


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("form", ["safetensors", "bin", "file"])
def test_we_compute_the_same_from_a_transformers_folder(tmp_path, transformers, activation, form):
    torch.manual_seed(3)
    text = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=256, num_hidden_layers=3,
                num_attention_heads=2, max_position_embeddings=77, hidden_act=activation,
                eos_token_id=VOCAB - 1, bos_token_id=VOCAB - 2, pad_token_id=0)
    vision = dict(hidden_size=48, intermediate_size=192, num_hidden_layers=2, num_attention_heads=3,
                  image_size=40, patch_size=8, hidden_act=activation)
    theirs = transformers.CLIPModel(transformers.CLIPConfig(
        text_config=text, vision_config=vision, projection_dim=24)).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path)
    path = tmp_path
    if form != "safetensors":
        (tmp_path / "model.safetensors").unlink()
        path = tmp_path / "pytorch_model.bin"
        torch.save(theirs.state_dict(), path)
        path = tmp_path if form == "bin" else path
    ours = load(path)
    assert ours.config.activation == activation
    assert (ours.config.vision_head, ours.config.text_head) == (16, 32)
    assert ours.origin["layout"] == "hf" and all(p.is_contiguous() for p in ours.parameters())
    assert_equal_to_hugging_face(ours, theirs)


# -----------------------------------------------------------------------------
# open_clip

@pytest.fixture(scope="module")
def open_clip():
    try:
        import open_clip
    except (ImportError, RuntimeError, OSError) as error:  # it needs a torchvision that imports
        pytest.skip(f"open_clip does not import here: {error}")
    return open_clip


def assert_equal_to_open_clip(ours, theirs):
    assert_equal_features(ours, theirs.encode_image, theirs.encode_text)
    assert_equal_logits(ours, lambda images, tokens: theirs.get_logits(images, tokens)[0])


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
@pytest.mark.parametrize("changes", [
    {}, {"activation": "gelu"}, {"vision_head": 16, "text_head": 32}])
def test_open_clip_computes_the_same_from_our_folder(tmp_path, open_clip, name, changes):
    ours = make(name, **changes)
    save(ours, tmp_path / "folder", layout="open_clip")
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'folder'}").eval()
    assert_equal_to_open_clip(ours, theirs)


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
def test_open_clips_openai_reader_computes_the_same_from_our_file(tmp_path, open_clip, name):
    path = save(make(name), tmp_path / "a.pt", layout="openai", dtype=torch.float16)
    ours = load(path)  # half precision as OpenAI publishes it; their reader rounds to it anyway
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tries the deprecated torch.jit.load first
        theirs = open_clip.load_openai_model(str(path), precision="fp32", device="cpu").eval()
    assert_equal_to_open_clip(ours, theirs)


def their_model(open_clip, name, quick_gelu):
    torch.manual_seed(4)
    vision = {"tiny-vit": dict(image_size=48, layers=3, width=96, patch_size=16, head_width=32),
              "tiny-rn": dict(image_size=64, layers=(1, 2, 1, 1), width=8, head_width=64,
                              patch_size=None)}[name]
    text = dict(context_length=77, vocab_size=VOCAB, width=64, heads=1, layers=2)
    model = open_clip.CLIP(40, vision, text, quick_gelu=quick_gelu).eval()
    shake(model)
    return model, {"embed_dim": 40, "quick_gelu": quick_gelu, "vision_cfg": vision, "text_cfg": text}


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_we_compute_the_same_from_open_clips_weights(tmp_path, open_clip, name, quick_gelu):
    theirs, config = their_model(open_clip, name, quick_gelu)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    ours = load(tmp_path)  # a model folder, as on the hub
    assert ours.config.activation == ("quick_gelu" if quick_gelu else "gelu")
    assert_equal_to_open_clip(ours, theirs)
    package = pytest.importorskip("safetensors.torch", reason="the safetensors package is not here")
    package.save_file(theirs.state_dict(), tmp_path / "open_clip_model.safetensors")
    assert_equal_to_open_clip(load(tmp_path), theirs)


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-rn"])
def test_we_compute_the_same_from_open_clips_training_checkpoint(tmp_path, open_clip, name):
    theirs, config = their_model(open_clip, name, False)
    optimizer = torch.optim.AdamW(theirs.parameters())
    torch.save({"epoch": 3, "name": "run", "optimizer": optimizer.state_dict(), "state_dict": {
        f"module.{key}": value for key, value in theirs.state_dict().items()}}, tmp_path / "epoch_3.pt")
    if name == "tiny-vit":  # bare tensors do not tell heads narrower than 64
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    ours = load(tmp_path / "epoch_3.pt", activation="gelu")
    assert ours.origin["notes"] == ["weights found under 'state_dict'", "prefix 'module.' removed"]
    assert_equal_to_open_clip(ours, theirs)


def test_open_clips_full_size_configs_have_our_names_and_shapes(open_clip):
    for ours_name, theirs_name in (("ViT-B/16", "ViT-B-16-quickgelu"), ("RN50x4", "RN50x4-quickgelu")):
        config = open_clip.get_model_config(theirs_name)
        with torch.device("meta"):
            theirs = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"],
                                    quick_gelu=True).state_dict()
            ours = CLIP(CONFIGS[ours_name]).state_dict()
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
