"""Image towers to distil into: MobileViT, torchvision's small ones, CLIP's own; their taps; and
small CLIPs cut out of large ones."""
import dataclasses
import json
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import clip_model
from clip_model import (CLIP, CONFIGS, MOBILEVITS, MobileViT, MobileViTTower, ModifiedResNet,
                        TorchvisionTower, VisionTransformer, WeightsError, inherit, load, save)

VOCAB = 60
PUBLISHED = {"mobilevit_xxs": (1_272_024, 951_024), "mobilevit_xs": (2_317_848, 1_932_848),
             "mobilevit_s": (5_578_632, 4_937_632)}
# name -> features, channels at strides 8, 16 and 32: hand-copied from the classifiers' definitions
STUDENTS = {
    "mobilevit_xxs": (320, 48, 64, 320), "mobilevit_xs": (384, 64, 80, 384),
    "mobilevit_s": (640, 96, 128, 640),
    "mobilenet_v2": (1280, 32, 96, 1280), "mobilenet_v3_small": (1024, 24, 48, 576),
    "mobilenet_v3_large": (1280, 40, 112, 960), "efficientnet_b0": (1280, 40, 112, 1280),
    "efficientnet_v2_s": (1280, 64, 160, 1280), "convnext_tiny": (768, 192, 384, 768),
    "shufflenet_v2_x0_5": (1024, 48, 96, 1024), "regnet_y_400mf": (440, 104, 208, 440),
    "regnet_x_400mf": (400, 64, 160, 400), "mnasnet0_5": (1280, 24, 48, 1280),
    "resnet18": (512, 128, 256, 512), "swin_t": (768, 192, 384, 768),
}
OTHERS = ["convnext_base", "efficientnet_b2", "efficientnet_v2_m", "mnasnet1_3", "regnet_y_1_6gf",
          "resnet50", "resnext50_32x4d", "shufflenet_v2_x2_0", "swin_v2_t", "wide_resnet50_2"]


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


def tower_of(name, size=64, embed_dim=16):
    config = dataclasses.replace(CONFIGS["tiny"], embed_dim=embed_dim, backbone=name,
                                 image_size=size)
    return (MobileViTTower if name in MOBILEVITS else TorchvisionTower)(config)


def small(name, **changes):
    """One of CLIP's own towers with random weights that are no zeros and no ones."""
    torch.manual_seed(0)
    changes = {"vocab_size": VOCAB, "vision_layers": 3} | changes
    if name == "tiny-rn":
        changes["vision_layers"] = (1, 1, 1, 1)
    return shake(CLIP(dataclasses.replace(CONFIGS[name], **changes)))


@torch.no_grad()
def shake(model):
    """Zeros and ones hide swapped names; running statistics as they start make features vanish."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.dim():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.add_(0.1 * (noise.abs() if "running_var" in name else noise))
    return model.eval()


def hooks_of(module):
    return [m for m in module.modules() if m._forward_hooks or m._forward_pre_hooks]


# -----------------------------------------------------------------------------
# MobileViT

@pytest.mark.parametrize("name", MOBILEVITS)
def test_a_mobilevit_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        whole, trunk = MobileViT(name, 1000), MobileViT(name)
    assert (sum(p.numel() for p in whole.parameters()),
            sum(p.numel() for p in trunk.parameters())) == PUBLISHED[name]
    assert whole(torch.empty(2, 3, 96, 96, device="meta")).shape == (2, 1000)


def their_mobilevit(transformers, name):
    expansion, channels, widths = MOBILEVITS[name]
    config = transformers.MobileViTConfig(
        hidden_sizes=list(widths), neck_hidden_sizes=[16, *channels, 4 * channels[-1]],
        expand_ratio=float(expansion), num_labels=1000)
    return shake(transformers.MobileViTForImageClassification(config))


@pytest.mark.parametrize("name, size", [("mobilevit_xxs", 64), ("mobilevit_xxs", 72),
                                        ("mobilevit_xs", 101), ("mobilevit_s", 96)])
def test_a_mobilevit_from_transformers_files_gives_their_features(tmp_path, transformers, name,
                                                                  size):
    theirs = their_mobilevit(transformers, name)
    theirs.save_pretrained(tmp_path)
    model = load(image_tower=f"{name}:{tmp_path}", text_tower="tiny-vit:none", image_size=size)
    assert model.config.image_size == size and model.config.backbone == name
    assert model.image_mean == (0.0, 0.0, 0.0) and model.image_std == (1.0, 1.0, 1.0)
    assert any("trained on BGR" in note for note in model.origin["notes"])
    trunk, theirs = model.visual.trunk.double(), theirs.double()
    images = torch.rand(2, 3, size, size - 10, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.mobilevit(images.flip(1), output_hidden_states=True)
        found = model.visual.double().taps(images)
    assert expected.pooler_output.std() > 1e-3 and found.pooled.shape[1] == model.visual.features
    torch.testing.assert_close(found.pooled, expected.pooler_output, rtol=0, atol=1e-9)
    torch.testing.assert_close(trunk(images), expected.pooler_output, rtol=0, atol=1e-9)
    for stride, theirs in ((8, expected.hidden_states[2]), (16, expected.hidden_states[3]),
                           (32, expected.last_hidden_state)):
        torch.testing.assert_close(found.maps[stride], theirs, rtol=0, atol=1e-9)


def test_gradients_of_a_mobilevit_are_transformers_own(transformers):
    theirs = their_mobilevit(transformers, "mobilevit_xxs").double()
    state, _ = clip_model.mobilevit_state(theirs.state_dict())
    ours = MobileViT("mobilevit_xxs").double()
    ours.load_state_dict(state)
    images = torch.rand(3, 3, 72, 72, dtype=torch.float64)
    theirs.train()
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ours.train()(images).square().sum().backward()
    theirs.mobilevit(images.flip(1)).pooler_output.square().sum().backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    grads, _ = clip_model.mobilevit_state(grads)
    assert grads.keys() == dict(ours.named_parameters()).keys()
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-6, atol=1e-9, msg=name)


def test_one_corner_of_the_patches_never_sees_another():
    """Before the fusing convolution a pixel reaches only pixels at its own corner of a patch."""
    torch.manual_seed(0)
    block = clip_model.MobileViTBlock(4, 8, 1).double().eval()
    block.local_rep = block.conv_proj = nn.Identity()
    block.fusion = nn.Identity()
    x = torch.randn(1, 8, 6, 4, dtype=torch.float64, requires_grad=True)
    block(x)[:, 8:, 3, 2].square().sum().backward()  # patch (1, 1), corner (1, 0)
    reached = x.grad.abs().sum(1)[0] > 0
    expected = torch.zeros(6, 4, dtype=torch.bool)
    expected[1::2, 0::2] = True
    assert torch.equal(reached, expected)


def test_apples_names_are_kept_and_their_classifier_is_left_out(tmp_path):
    torch.manual_seed(0)
    whole = MobileViT("mobilevit_xxs", 1000)
    names = set(whole.state_dict())
    for name in ("conv_1.block.conv.weight", "layer_1.0.block.exp_1x1.block.norm.running_mean",
                 "layer_2.2.block.red_1x1.block.conv.weight",
                 "layer_3.0.block.conv_3x3.block.conv.weight",
                 "layer_3.1.local_rep.conv_3x3.block.norm.bias",
                 "layer_3.1.local_rep.conv_1x1.block.conv.weight",
                 "layer_4.1.global_rep.3.pre_norm_mha.1.qkv_proj.bias",
                 "layer_4.1.global_rep.4.weight",
                 "layer_5.1.global_rep.0.pre_norm_ffn.4.weight",
                 "layer_5.1.conv_proj.block.norm.weight",
                 "layer_5.1.fusion.block.conv.weight", "conv_1x1_exp.block.norm.weight",
                 "classifier.fc.weight"):
        assert name in names
    torch.save({"model": whole.state_dict()}, tmp_path / "apple.pt")
    state = {name: t for name, t in whole.state_dict().items() if "classifier" not in name}
    torch.save(state, tmp_path / "own.pt")
    apple, own = (load(image_tower=f"mobilevit_xxs:{tmp_path / file}", text_tower="tiny-vit:none")
                  for file in ("apple.pt", "own.pt"))
    stem = "conv_1.block.conv.weight"
    assert torch.equal(apple.visual.trunk.state_dict()[stem], state[stem].flip(1))
    for name, tensor in own.visual.trunk.state_dict().items():
        assert torch.equal(tensor, state[name])
        assert name == stem or torch.equal(tensor, apple.visual.trunk.state_dict()[name])
    assert not any("BGR" in note for note in own.origin["notes"]) and own.config.image_size == 256
    assert clip_model.inspect(tmp_path / "apple.pt")["config"] == {"backbone": "mobilevit_xxs"}


def test_a_mobilevit_of_another_size_is_refused(tmp_path):
    torch.save(MobileViT("mobilevit_xxs", 10).state_dict(), tmp_path / "a.pt")
    with pytest.raises(WeightsError, match="is .32, 16.* in the weights and .64, 16.* in a CLIP"):
        load(image_tower=f"mobilevit_xs:{tmp_path / 'a.pt'}", text_tower="tiny-vit:none")


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("layer_5.1.fusion.block.conv.weight"), "lack 'visual.trunk.layer_5"),
    (lambda state: state.update(extra=torch.zeros(2)), "have 'visual.trunk.extra'"),
    (lambda state: state.update({"conv_1.block.conv.weight": torch.zeros(16, 3, 5, 5)}), "is .16"),
    (lambda state: state.update({"conv_1.block.conv.weight": torch.zeros(3) / 0}), "NaN")])
def test_a_spoilt_mobilevit_file_is_refused_in_one_line(tmp_path, change, message):
    state = MobileViT("mobilevit_xxs", 10).state_dict()
    change(state)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=message) as error:
        load(image_tower=f"mobilevit_xxs:{tmp_path / 'a.pt'}", text_tower="tiny-vit:none")
    assert "\n" not in str(error.value)


def test_a_mobilevit_needs_no_torchvision(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    model = load(image_tower="mobilevit_xxs", text_tower="tiny-vit:none", image_size=64)
    again = load(save(model, tmp_path / "a.safetensors"))
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(again.encode_image(images), model.encode_image(images))
    with pytest.raises(WeightsError, match="needs torchvision"):
        load(image_tower="mobilenet_v2", text_tower="tiny-vit:none")


def test_both_forms_of_attention_give_a_mobilevits_numbers():
    model = shake(load(image_tower="mobilevit_xxs", text_tower="tiny-vit:none", image_size=64))
    images = torch.rand(2, 3, 64, 64)
    fused = model.encode_image(images)
    assert {m.fused for m in model.fuse_attention(False).visual.modules()
            if isinstance(m, clip_model.MobileViTAttention)} == {False}
    plain = model.encode_image(images)
    assert not torch.equal(plain, fused)
    torch.testing.assert_close(plain, fused, rtol=1e-4, atol=1e-4)


# -----------------------------------------------------------------------------
# Every image tower: features and taps

@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_trains_at_any_size_and_its_taps_are_at_three_strides(models, name):
    torch.manual_seed(0)
    features, *channels = STUDENTS[name]
    tower = tower_of(name).train()
    assert tower.features == features
    assert tower.tap_channels == dict(zip((8, 16, 32), channels))
    for height, width in ((64, 64), (72, 101)):
        out = tower.taps(torch.randn(2, 3, height, width))
        assert out.embedding.shape == (2, 16) and out.pooled.shape == (2, features)
        for (stride, x), count in zip(out.maps.items(), channels):
            rest = 0 if name == "convnext_tiny" else stride - 1  # which cuts a margin off
            assert x.shape == (2, count, (height + rest) // stride, (width + rest) // stride)
    (out.embedding.square().sum() + sum(x.square().mean() for x in out.maps.values())).backward()
    grads = {name: p.grad for name, p in tower.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    zero = [name for name, grad in grads.items() if not grad.any()]
    assert len(zero) <= 0.02 * len(grads), zero


@pytest.mark.parametrize("name", [*STUDENTS, *OTHERS])
def test_maps_have_their_places_at_224_pixels(models, name):
    sides = {}
    with torch.device("meta"):
        tower = tower_of(name, 224).eval()
        for stride, path in tower.tap_modules.items():  # what comes next in the same container
            parent = tower.trunk.get_submodule(path.rpartition(".")[0])
            parts = [m for n, m in parent.named_children() if "relu" not in n]
            place = parts.index(tower.trunk.get_submodule(path)) + 1
            for part in parts[place:place + 1]:
                part.register_forward_hook(
                    lambda m, i, x, stride=stride: sides.update({stride: x.shape}))
        out = tower.taps(torch.empty(2, 3, 224, 224))
    for stride in (8, 16):  # so the tapped module is the last at its stride
        assert 112 // stride in sides[stride] and 224 // stride not in sides[stride]
    assert 7 not in sides.get(32, ())
    assert {s: x.shape for s, x in out.maps.items()} == {
        s: (2, c, 224 // s, 224 // s) for s, c in tower.tap_channels.items()}
    assert list(out.maps) == [8, 16, 32] and out.pooled.shape == (2, tower.features)


def by_hand(tower, images):
    """The maps from running the trunk's parts one after another."""
    trunk, maps, x = tower.trunk, [], images
    names = {module: name for name, module in trunk.named_modules()}
    parts = (trunk.features if hasattr(trunk, "features") else trunk.layers if
             hasattr(trunk, "layers") else [trunk.stem, *trunk.trunk_output] if
             hasattr(trunk, "stem") else trunk.children())
    for part in parts:
        if names[part] in ("avgpool", "fc"):
            break
        x = part(x)
        if names[part] in tower.tap_modules.values():
            maps.append(x.clone())  # before anything could work in place
    return maps


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0", "convnext_tiny",
                                  "shufflenet_v2_x0_5", "regnet_x_400mf", "mnasnet0_5", "resnet18"])
def test_a_map_is_what_the_trunk_computes_up_to_there(models, name):
    torch.manual_seed(0)
    tower = tower_of(name)
    tower.trunk.train()
    for module in tower.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tower(images)
        tower.eval()
        out, expected = tower.taps(images), by_hand(tower, images)
    assert len(expected) == 3
    assert all(torch.equal(a, b) for a, b in zip(out.maps.values(), expected))


def towers():
    return [("tiny-vit", small("tiny-vit").visual, 32), ("tiny-rn", small("tiny-rn").visual, 64),
            ("mobilevit_xxs", shake(tower_of("mobilevit_xxs")), 64),
            ("mobilenet_v3_small", shake(tower_of("mobilenet_v3_small")), 64)]


def test_taps_give_what_forward_gives_bit_for_bit_and_leave_no_hook(models):
    for name, tower, size in towers():
        images, rng = torch.randn(2, 3, size, size), torch.get_rng_state()
        with torch.no_grad():
            out, bare = tower.taps(images), tower.taps(images, at=())
            assert torch.equal(out.embedding, tower(images)), name
        assert torch.equal(bare.embedding, out.embedding) and torch.equal(bare.pooled, out.pooled)
        assert bare.maps == {} == bare.attention and out.pooled.shape == (2, tower.features)
        assert set(out.maps) <= set(tower.tap_channels), name
        assert all(x.shape[1] == tower.tap_channels[tap] for tap, x in out.maps.items())
        head = tower.attnpool.c_proj if name == "tiny-rn" else tower.proj
        assert torch.equal(clip_model.project(out.pooled, head), out.embedding)
        assert torch.equal(rng, torch.get_rng_state()) and not hooks_of(tower), name


def test_a_forward_that_fails_leaves_no_hook(models):
    tower = tower_of("mobilenet_v3_small")
    with pytest.raises(RuntimeError):
        tower.taps(torch.randn(2, 4, 64, 64))
    assert not hooks_of(tower)


def test_taps_come_in_the_order_asked_for_and_unknown_ones_are_refused(models):
    for name, tower, size in towers():
        images = torch.randn(1, 3, size, size)
        known = list(tower.tap_channels)
        assert list(tower.taps(images, at=known[::-1]).maps) == known[::-1]
        with pytest.raises(ValueError, match="to tap: this ViT's are 0 to 2" if name == "tiny-vit"
                           else "at stride 4 to tap; this image tower's are at 8, 16, 32") as error:
            tower.taps(images, at=(known[0], 4))
        assert "\n" not in str(error.value)
        if name != "tiny-vit":
            with pytest.raises(ValueError, match="without a class token"):
                tower.taps(images, attention=(-1,))
    other = tower_of("alexnet", 64)
    assert other.tap_channels == {} == other.taps(torch.randn(1, 3, 64, 64)).maps
    with pytest.raises(ValueError, match="are not known"):
        other.taps(torch.randn(1, 3, 64, 64), at=(8,))


def test_train_mode_counts_a_batch_once_and_knowing_the_channels_counts_none(models):
    for name in ("mobilenet_v3_small", "mobilevit_xxs", "regnet_x_400mf"):
        tower = tower_of(name).train()
        state = {key: t.clone() for key, t in tower.state_dict().items()}
        rng = torch.get_rng_state()
        assert tower.tap_channels[32] and torch.equal(rng, torch.get_rng_state())
        assert all(torch.equal(t, state[key]) for key, t in tower.state_dict().items())
        tower.taps(torch.randn(2, 3, 64, 64))
        assert {int(t) for key, t in tower.state_dict().items() if "num_batches" in key} == {1}


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "mnasnet0_5"])
def test_batch_norm_has_forgotten_its_first_statistics_after_150_batches(models, name):
    """With torchvision's own momentum, 0.01 and 0.0003, a student that learned well was evaluated
    at chance after 345 steps: activations of a new tower are so small that a remainder of the
    first variance, 1, outweighs theirs."""
    torch.manual_seed(0)
    tower, seen = tower_of(name).train(), {}
    norms = {m: n for n, m in tower.named_modules() if isinstance(m, nn.BatchNorm2d)}
    for norm in norms:
        norm.register_forward_pre_hook(lambda m, x: seen.update({m: x[0].transpose(0, 1).flatten(1)}))
    images = torch.randn(16, 3, 64, 64) + 1
    with torch.no_grad():
        for _ in range(150):
            tower(images)
    for norm, x in seen.items():
        torch.testing.assert_close(norm.running_var, x.var(dim=1), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("number", range(4))
def test_autocast_and_checkpointing_change_no_gradient(models, number):
    name, tower, size = towers()[number]
    images = torch.randn(2, 3, size, size)

    def loss(out):
        return out.embedding.square().mean() + sum(x.square().mean() for x in out.maps.values())

    def gradients(run):
        tower.zero_grad()
        loss(run()).backward()
        return {key: p.grad.clone() for key, p in tower.named_parameters() if p.grad is not None}
    plain = gradients(lambda: tower.taps(images))
    # a wrapped forward, as gradient checkpointing of a whole tower does it
    again = gradients(lambda: checkpoint(tower.taps, images, use_reentrant=False))
    assert plain.keys() == again.keys() and all(torch.equal(plain[k], again[k]) for k in plain)
    with torch.autocast("cpu", torch.bfloat16):
        low = tower.taps(images)
        assert torch.equal(low.embedding, tower(images))
    assert low.embedding.dtype == torch.bfloat16
    high = tower.taps(images).embedding
    assert F.cosine_similarity(low.embedding.float(), high).min() > 0.98


def test_recomputed_blocks_are_tapped_all_the_same(monkeypatch):
    model, images, calls = small("tiny-vit").train(), torch.randn(2, 3, 32, 32), []

    def gradients():
        model.zero_grad()
        out = model.visual.taps(images, at=(0, -1), attention=(2,))
        (out.embedding.sum() + sum(x.square().mean() for x in out.maps.values())
         + out.attention[2].square().sum()).backward()
        return [p.grad.clone() for p in model.visual.parameters()]
    plain = gradients()

    def counted(*args, **more):
        calls.append(1)
        return checkpoint(*args, **more)
    monkeypatch.setattr(clip_model, "checkpoint", counted)
    model.recompute_blocks()
    again = gradients()
    assert len(calls) == 3 and all(torch.equal(a, b) for a, b in zip(plain, again))


# -----------------------------------------------------------------------------
# ViT: token grids and the class token's attention

def naive_tokens(visual, images):
    """Every block's output (B, 1 + G*G, W) by nn.MultiheadAttention, and its weights."""
    x = visual.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1)
    x, outputs, weights = visual.ln_pre(x + visual.positional_embedding), [], []
    for block in visual.transformer.resblocks:
        attention = nn.MultiheadAttention(x.shape[-1], block.attn.heads, batch_first=True).double()
        attention.load_state_dict(block.attn.state_dict())
        y = block.ln_1(x)
        y, w = attention(y, y, y, average_attn_weights=False)
        x = x + y
        x = x + block.mlp(block.ln_2(x))
        outputs.append(x)
        weights.append(w)
    return outputs, weights


@pytest.mark.parametrize("fused", [True, False])
def test_grids_and_class_rows_are_those_of_multi_head_attention(fused):
    model = small("tiny-vit", vision_width=96, vision_head=32).double().fuse_attention(fused)
    visual = model.visual
    with torch.no_grad():
        visual.transformer.resblocks[2].attn.in_proj_weight.mul_(3)  # rows far from uniform
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    out = visual.taps(images, at=(0, 1, -1), attention=(0, -1, 2))
    outputs, weights = naive_tokens(visual, images)
    assert list(out.maps) == [0, 1, -1] and list(out.attention) == [0, -1, 2]
    for i in (0, 1, -1):
        expected = outputs[i][:, 1:].reshape(3, 4, 4, 96).permute(0, 3, 1, 2)  # the class token off
        torch.testing.assert_close(out.maps[i], expected, rtol=0, atol=1e-10)
    for i in (0, -1, 2):
        assert out.attention[i].shape == (3, 3, 17)
        torch.testing.assert_close(out.attention[i], weights[i][:, :, 0], rtol=0, atol=1e-10)
        assert (out.attention[i].sum(-1) - 1).abs().max() < 1e-12
    assert out.attention[-1].std() > 1e-2
    renormalised = out.attention[-1][..., 1:] / out.attention[-1][..., 1:].sum(-1, keepdim=True)
    assert (renormalised.sum(-1) - 1).abs().max() < 1e-12
    torch.testing.assert_close(out.embedding, visual(images), rtol=0, atol=1e-10)
    torch.testing.assert_close(out.pooled, visual.ln_post(outputs[-1][:, 0]), rtol=0, atol=1e-10)


def test_class_rows_in_fp32_are_right_to_a_millionth():
    visual = small("tiny-vit").visual
    images = torch.randn(3, 3, 32, 32)
    found = visual.taps(images, at=(), attention=(-1,)).attention[-1]
    expected = naive_tokens(visual.double(), images.double())[1][-1][:, :, 0]
    assert (found - expected).abs().max() < 1e-6


def test_a_vits_own_choice_of_tap_is_the_last_block_whose_patches_are_used():
    visual = small("tiny-vit").visual
    images = torch.randn(2, 3, 32, 32)
    assert list(visual.taps(images).maps) == [1]
    plain, differs = visual.taps(images, at=(0, 1, 2)).embedding, []
    for block in visual.transformer.resblocks:
        def disturb(module, inputs, x):  # all tokens but the class token
            return torch.cat([x[:, :1], x[:, 1:] + 1], dim=1)
        with block.register_forward_hook(disturb):
            differs.append(not torch.equal(visual.taps(images, at=(0, 1, 2)).embedding, plain))
    assert differs == [True, True, False]
    one = small("tiny-vit", vision_layers=1).visual
    assert list(one.taps(images).maps) == [0]


def test_the_published_vit_b_16_gives_a_grid_of_14():
    with torch.device("meta"):
        visual = VisionTransformer(CONFIGS["ViT-B/16"])
        out = visual.taps(torch.empty(2, 3, 224, 224), at=(5, -1), attention=(-1,))
    assert {i: x.shape for i, x in out.maps.items()} == {5: (2, 768, 14, 14), -1: (2, 768, 14, 14)}
    assert out.attention[-1].shape == (2, 12, 197) and visual.features == 768


def test_the_maps_of_a_modified_resnet_are_its_stages():
    visual = small("tiny-rn").visual.double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    out = visual.taps(images, at=(16, 8))
    x = F.relu(visual.bn1(visual.conv1(images)))
    x = F.relu(visual.bn2(visual.conv2(x)))
    x = visual.layer1(F.avg_pool2d(F.relu(visual.bn3(visual.conv3(x))), 2))
    second = visual.layer2(x)
    assert torch.equal(out.maps[8], second) and torch.equal(out.maps[16], visual.layer3(second))
    assert out.pooled.shape == (2, visual.features) == (2, 256) and list(out.maps) == [16, 8]


def test_round_frozen_copies_are_used_for_the_class_row():
    model = small("tiny-vit").requires_grad_(False).round_frozen(torch.bfloat16)
    images = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        row = model.visual.taps(images, at=(), attention=(-1,)).attention[-1]
        model.round_frozen(torch.float32)
        again = model.visual.taps(images, at=(), attention=(-1,)).attention[-1]
    assert torch.equal(row, again)


# -----------------------------------------------------------------------------
# Files

@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilenet_v3_small", "shufflenet_v2_x0_5",
                                  "regnet_x_400mf", "mnasnet0_5", "ViT-T/16", "tiny-rn"])
def test_a_clip_with_a_student_comes_back_from_its_file(tmp_path, models, capsys, name):
    model = shake(load(image_tower=f"{name}:none", text_tower="tiny-vit:none", embed_dim=24,
                       image_size=96))
    again = load(save(model, tmp_path / "student.safetensors"))
    assert again.config == model.config and again.config.image_size == 96
    assert again.image_mean == model.image_mean and again.image_std == model.image_std
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        for a, b in zip(again.visual.taps(images)[:2], model.visual.taps(images)[:2]):
            assert torch.equal(a, b)
    assert clip_model.main(["--inspect", str(tmp_path / "student.safetensors"), "--json"]) == 0
    resumed = load(image_tower=f"{name}:none", text_tower="tiny-vit:none", embed_dim=24,
                   image_size=96)
    torch.save({"model": model.state_dict()}, tmp_path / "checkpoint.pt")
    resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"])
    report = json.loads(capsys.readouterr().out)
    assert report["config"]["backbone"] == ("" if name in CONFIGS else name)
    kind = {"ViT-T/16": "ViT of 12 blocks, width 192", "tiny-rn": "ModifiedResNet of 1-1-1-1"}
    assert report["image_tower"].startswith(kind.get(name, name))
    assert report["image_tower"].endswith("for images of 96 pixels")
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    if name not in CONFIGS:
        assert f"{model.visual.features} features" in report["image_tower"]


def test_a_new_vit_takes_the_activation_of_the_tower_beside_it(tmp_path):
    path = save(small("tiny-vit", activation="gelu"), tmp_path / "gelu.safetensors")
    assert load(path, image_tower="ViT-T/16:none").config.activation == "gelu"
    assert load(image_tower="ViT-T/16:none", text_tower="tiny-vit:none").config.activation == (
        "quick_gelu")
    model = load(image_tower="ViT-T/16:none", text_tower="tiny-vit:none", activation="gelu")
    assert isinstance(model.visual.transformer.resblocks[0].mlp.gelu, nn.GELU)


def test_a_size_without_released_weights_says_so():
    for call in (dict(name_or_path="ViT-T/16"), dict(image_tower="ViT-T-16", text_tower="tiny")):
        with pytest.raises(WeightsError, match="no released weights of ViT-T/16.*ViT-T/16:none"):
            load(**call)


def test_a_trained_towers_image_size_is_not_changed_in_silence(tmp_path):
    path = save(small("tiny-vit"), tmp_path / "a.safetensors")
    assert load(image_tower=path, text_tower="tiny-vit:none", image_size=32).config.image_size == 32
    with pytest.raises(WeightsError, match="takes images of 32 pixels and has no positions for 64"):
        load(image_tower=path, text_tower="tiny-vit:none", image_size=64)


@pytest.mark.parametrize("name, count", [("ViT-T/16", 5_622_912), ("ViT-8M/16", 8_276_992)])
def test_small_vits_have_the_sizes_of_their_names(name, count):
    with torch.device("meta"):
        model = CLIP(CONFIGS[name])
    assert sum(p.numel() for p in model.visual.parameters()) == count
    assert model.visual.transformer.resblocks[0].attn.heads == CONFIGS[name].vision_width // 64


# -----------------------------------------------------------------------------
# Weight inheritance

def teacher(**changes):
    return small("tiny-vit", **{"vision_layers": 5, "vision_width": 128, "text_layers": 4,
                                "text_width": 128} | changes)


def student(**changes):
    torch.manual_seed(7)
    config = dataclasses.replace(teacher().config, **{
        "vision_layers": 2, "vision_width": 64, "text_layers": 3, "text_width": 64} | changes)
    return CLIP(config).eval()


def test_a_student_of_the_teachers_size_becomes_the_teacher():
    large = teacher()
    large.logit_scale.data.fill_(4.0)
    copy = student(vision_layers=5, vision_width=128, text_layers=4, text_width=128)
    scale = copy.logit_scale.clone()
    lines = inherit(copy, large)
    assert lines == [
        "image tower: blocks 0, 1, 2, 3, 4 of 5, 128 of 128 channels; 100.0 % of its numbers are "
        "inherited",
        "text tower: blocks 0, 1, 2, 3 of 4, 128 of 128 channels; 100.0 % of its numbers are "
        "inherited"]
    assert all(torch.equal(t, large.state_dict()[name]) for name, t in copy.state_dict().items()
               if name != "logit_scale")
    assert torch.equal(copy.logit_scale, scale)


def test_blocks_are_chosen_evenly():
    """Where the blocks left out do nothing, the shorter tower is the longer one."""
    large, short = teacher(), student(vision_width=128, text_width=128)
    with torch.no_grad():
        for tower, kept in ((large.visual, (0, 2)), (large, (0, 1, 2))):
            for i, block in enumerate(tower.transformer.resblocks):
                for part in (block.attn.out_proj, block.mlp.c_proj) if i not in kept else ():
                    part.weight.zero_(), part.bias.zero_()
    lines = inherit(short, large)
    assert lines[0].startswith("image tower: blocks 0, 2 of 5") and "0, 1, 2 of 4" in lines[1]
    images, tokens = torch.randn(3, 3, 32, 32), torch.tensor([[1, 5, 59], [2, 59, 0]])
    torch.testing.assert_close(short.encode_image(images), large.encode_image(images),
                               rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(short.encode_text(tokens), large.encode_text(tokens),
                               rtol=1e-5, atol=1e-5)


def test_a_narrow_student_gets_leading_channels_and_whole_heads():
    large, narrow = teacher(vision_head=32), student(vision_head=32, embed_dim=24)
    lines = inherit(narrow, large)
    ours, theirs = narrow.state_dict(), large.state_dict()
    for block, source in ((0, 0), (1, 2)):  # of 5
        stem, other = (f"visual.transformer.resblocks.{i}." for i in (block, source))
        full = theirs[other + "attn.in_proj_weight"].view(3, 4, 32, 128)     # q k v, head, d, W
        expected = full[:, :2, :, :64].reshape(3 * 64, 64)
        assert torch.equal(ours[stem + "attn.in_proj_weight"], expected)
        bias = theirs[other + "attn.in_proj_bias"].view(3, 4, 32)[:, :2].reshape(-1)
        assert torch.equal(ours[stem + "attn.in_proj_bias"], bias)
        full = theirs[other + "attn.out_proj.weight"].view(128, 4, 32)       # W, head, d
        assert torch.equal(ours[stem + "attn.out_proj.weight"], full[:64, :2].flatten(1))
        assert torch.equal(ours[stem + "mlp.c_fc.weight"],
                           theirs[other + "mlp.c_fc.weight"][:256, :64])
        assert torch.equal(ours[stem + "mlp.c_proj.weight"],
                           theirs[other + "mlp.c_proj.weight"][:64, :256])
    assert torch.equal(ours["visual.conv1.weight"], theirs["visual.conv1.weight"][:64])
    assert torch.equal(ours["visual.proj"], theirs["visual.proj"][:64, :24])
    assert torch.equal(ours["token_embedding.weight"], theirs["token_embedding.weight"][:, :64])
    assert torch.equal(ours["text_projection"], theirs["text_projection"][:64, :24])
    assert len(lines) == 2 and "64 of 128 channels; 100.0 %" in lines[0]
    assert narrow.encode_image(torch.randn(2, 3, 32, 32)).isfinite().all()


def test_what_does_not_fit_stays_and_is_told():
    large = teacher()
    other = student(vision_patch=16, image_size=64, vocab_size=90)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    lines = inherit(other, large)
    assert lines[1] == ("image tower: visual.conv1.weight (64, 3, 16, 16) stays: the teacher's is "
                        "(128, 3, 8, 8)")
    assert lines[3] == ("text tower: token_embedding.weight (90, 64) stays: the teacher's is "
                        "(60, 128)") and len(lines) == 4
    share = float(re.search(r"([\d.]+) %", lines[2])[1])
    whole = sum(t.numel() for n, t in before.items() if not n.startswith(("visual", "logit")))
    assert share == pytest.approx(100 * (1 - 90 * 64 / whole), abs=0.06)
    for name in ("visual.conv1.weight", "token_embedding.weight", "logit_scale"):
        assert torch.equal(other.state_dict()[name], before[name])
    smaller = student(vocab_size=40)  # its ids mean other words, so no part of the table fits
    assert "token_embedding.weight (40, 64) stays" in inherit(smaller, large)[-1]


def test_positions_are_resized_to_the_students_grid():
    large, other = teacher(), student(image_size=16, vision_width=128)
    with torch.no_grad():  # a plane in the grid's two coordinates stays a plane
        table = large.visual.positional_embedding
        down, right = torch.meshgrid(torch.arange(4.), torch.arange(4.), indexing="ij")
        table[1:] = (down + 10 * right).flatten()[:, None]
    lines = inherit(other, large, text=False)
    assert lines[1] == "image tower: visual.positional_embedding resized from 16 to 4 patches"
    found, table = other.visual.positional_embedding.detach(), table.detach()
    assert torch.equal(found[0], table[0]) and found.shape == (5, 128)
    grid = found[1:, 0].view(2, 2)
    assert grid[1, 0] - grid[0, 0] == pytest.approx(2, abs=0.3)  # bicubic at so few points
    assert grid[0, 1] - grid[0, 0] == pytest.approx(20, abs=3)
    assert grid.mean() == pytest.approx(16.5)
    same = clip_model.resize_positions(table, 16)
    torch.testing.assert_close(same, table, rtol=0, atol=1e-5)


def test_a_bert_inherits_from_a_bert_of_its_family():
    bert = clip_model.BertConfig("bert", VOCAB, 32, 6, 4, 48, 24)
    large = shake(CLIP(dataclasses.replace(CONFIGS["tiny-vit"], **clip_model.bert_fields(bert))))
    short = dataclasses.replace(bert, layers=3, width=16, heads=2, intermediate=24)
    tower = CLIP(dataclasses.replace(CONFIGS["tiny-vit"], **clip_model.bert_fields(short)))
    lines = inherit(tower, large, image=False)
    assert lines[0].startswith("text tower: blocks 0, 2, 4 of 6, 16 of 32")
    ours, theirs = tower.bert.state_dict(), large.bert.state_dict()
    assert torch.equal(ours["encoder.layer.2.attention.self.key.weight"],
                       theirs["encoder.layer.4.attention.self.key.weight"][:16, :16])
    assert torch.equal(ours["encoder.layer.1.intermediate.dense.weight"],
                       theirs["encoder.layer.2.intermediate.dense.weight"][:24, :16])
    other = CLIP(dataclasses.replace(CONFIGS["tiny-vit"], **clip_model.bert_fields(
        dataclasses.replace(short, family="roberta", type_vocab=1, pad_id=1))))
    with pytest.raises(WeightsError, match="is a roberta and cannot inherit from a bert"):
        inherit(other, large, image=False)


@pytest.mark.parametrize("changes, message", [
    (dict(backbone="mobilevit_xxs"), "tower is a mobilevit_xxs and cannot inherit from a ViT"),
    (dict(vision_patch=None, vision_layers=(1, 1, 1, 1), image_size=64, vision_width=8),
     "image tower is a ModifiedResNet and cannot inherit from a ViT"),
    (dict(vision_head=32), "its head is 32 and the teacher's 64"),
    (dict(activation="gelu"), "its activation is gelu and the teacher's quick_gelu"),
    (dict(vision_layers=6), "from a smaller one: layers 6 from 5"),
    (dict(text_layers=5), "the text tower cannot inherit from a smaller one: layers 5 from 4"),
    (dict(vision_width=192), "from a smaller one: width 192 from 128"),
])
def test_other_families_and_larger_students_are_refused_and_left_alone(changes, message):
    pupil = student(**changes)
    before = {name: t.clone() for name, t in pupil.state_dict().items()}
    with pytest.raises(WeightsError, match=message) as error:
        inherit(pupil, teacher())
    assert "\n" not in str(error.value) and error.value.exit_code == 2
    assert all(torch.equal(t, before[name]) for name, t in pupil.state_dict().items())


def test_two_resnets_are_no_family_here():
    with pytest.raises(WeightsError, match="a ModifiedResNet and cannot inherit from a Modified"):
        inherit(small("tiny-rn"), small("tiny-rn"), text=False)


def test_a_towers_requires_grad_and_training_mode_outlast_inheriting():
    pupil = student().train()
    pupil.visual.requires_grad_(False)
    inherit(pupil, teacher())
    assert pupil.training and not any(p.requires_grad for p in pupil.visual.parameters())
    assert all(p.requires_grad and p.grad_fn is None for p in pupil.transformer.parameters())


def test_contracts_of_all_four_kinds_of_image_tower_agree():
    for kind in (VisionTransformer, ModifiedResNet, TorchvisionTower, MobileViTTower):
        assert kind.taps.__code__.co_varnames[:4] == ("self", "images", "at", "attention")
        assert kind.taps.__defaults__ == (None, ())
