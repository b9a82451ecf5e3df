"""Chinese-CLIP: model, tokenizer, files and evaluation, against the originals and naive twins."""
import base64
import dataclasses
import io
import json
import os
import pickle
import random
import struct
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

import data
from clip_model import (BertConfig, bert_fields, canonical_name, CHINESE_CLIPS, CLIP, CONFIGS,
                        config_from_state_dict, digest, inspect, load, read_safetensors, save,
                        WeightsError)
from data import (Augment, cached_features, caption_notes, DataError, LMDB, make_loader, open_pairs,
                  PairBatches, Preprocess, read_plain_pickle, recall_at_k, top_k)
from tokenizer import (ChineseTokenizer, open_tokenizer, TokenizerError, WordPieceTokenizer)

VOCAB = 60
BERT = BertConfig("bert", VOCAB, 128, 3, 2, 48, 24, pool="first")


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def vocab(shared):
    return shared / "vocab" / "bert_chinese_vocab.txt"


@pytest.fixture(scope="module")
def chinese(vocab):
    return ChineseTokenizer(vocab)


def model(image="tiny-vit", **changes):
    """A small Chinese-CLIP with weights that hide no swapped names."""
    torch.manual_seed(0)
    fields = {**bert_fields(BERT), **changes}
    made = CLIP(dataclasses.replace(CONFIGS[image], **fields)).eval()
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if tensor.is_floating_point() and tensor.dim() and "running" not in name:
                tensor.add_(0.1 * torch.randn(tensor.shape))
    return made


def texts(lengths=(3, 9, 22, 1), width=22):
    tokens = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in zip(tokens, lengths):
        generator = torch.Generator().manual_seed(2)
        row[:length] = torch.randint(2, VOCAB, (length,), generator=generator)
    return tokens


def pictures(side=32, count=4):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def same(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def the_one_line(call, *args, error=DataError, **options):
    with pytest.raises(error) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -----------------------------------------------------------------------------
# The model

@pytest.mark.parametrize("name, tensors, total, visual, bert", [
    ("CN-RN50", 394, 76_989_537, 38_316_896, 37_886_208),
    ("CN-ViT-B/32", 351, 189_919_489, None, 101_677_056),
    ("CN-ViT-B/16", 351, 188_262_913, 86_192_640, 101_677_056),
    ("CN-ViT-L/14", 495, 406_233_089, 303_966_208, 101_677_056),
    ("CN-ViT-L/14@336px", 495, 406_560_769, None, 101_677_056),
    ("CN-ViT-H/14", 783, 957_598_209, 632_076_800, 324_472_832)])
def test_the_published_counts_of_chinese_clip(name, tensors, total, visual, bert):
    with torch.device("meta"):
        made = CLIP(CONFIGS[name])
    counts = [sum(p.numel() for p in part.parameters()) for part in (made, made.visual, made.bert)]
    assert (len(made.state_dict()), counts[0], counts[2]) == (tensors, total, bert)
    assert visual in (counts[1], None)
    heads = (80, 16) if "H/14" in name else (64, 12)
    assert (made.config.vision_head, made.config.text.heads) == heads
    assert config_from_state_dict(made.state_dict()) == CONFIGS[name]
    assert made.text_kind == "wordpiece" and made.pad_id == 0


@pytest.mark.parametrize("spelling, name", [
    ("ViT-B-16@RoBERTa-wwm-ext-base-chinese", "CN-ViT-B/16"),
    ("clip_cn_vit-b-16.pt", "CN-ViT-B/16"),
    ("OFA-Sys/chinese-clip-vit-large-patch14-336px", "CN-ViT-L/14@336px"),
    ("RN50@RBT3-chinese", "CN-RN50"), ("cn_vit_h14", "CN-ViT-H/14"), ("ViT-B-16", "ViT-B/16"),
    ("RN50@RoBERTa-wwm-ext-base-chinese", None)])
def test_official_spellings_are_understood(spelling, name):
    assert canonical_name(spelling) == name


def test_a_size_without_weights_says_where_they_are():
    said = the_one_line(load, "CN-ViT-B/16", error=WeightsError)
    assert "OFA-Sys/chinese-clip-vit-base-patch16" in said
    assert "published no weights" in the_one_line(load, "CN-ViT-B/32", error=WeightsError)


def their_config(transformers, **vision):
    return transformers.ChineseCLIPConfig(
        text_config=dict(vocab_size=VOCAB, hidden_size=128, num_hidden_layers=3, pad_token_id=0,
                         num_attention_heads=2, intermediate_size=48, max_position_embeddings=24),
        vision_config=dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2,
                           num_attention_heads=1, image_size=32, patch_size=8, **vision),
        projection_dim=32)


def assert_equal_to_theirs(ours, theirs):
    tokens = texts()
    out = theirs(input_ids=tokens, pixel_values=pictures(), attention_mask=(tokens != 0).long())
    images, found, scale = ours(pictures(), tokens)
    assert out.text_embeds.std() > 0.1
    torch.testing.assert_close(images, out.image_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(found, out.text_embeds, rtol=0, atol=1e-5)
    torch.testing.assert_close(scale * images @ found.T, out.logits_per_image, rtol=0, atol=1e-4)


@torch.no_grad()
def test_transformers_loads_and_computes_what_we_saved(tmp_path, transformers):
    ours = model()
    save(ours, tmp_path, "hf")
    theirs, told = transformers.ChineseCLIPModel.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not told["missing_keys"] and not told["unexpected_keys"]
    written = set(read_safetensors(tmp_path / "model.safetensors")[0])  # older versions need these
    assert written == {name for name in theirs.state_dict() if not name.endswith("_ids")}
    assert_equal_to_theirs(ours, theirs.eval())
    assert same(load(tmp_path), ours)


@torch.no_grad()
@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_we_load_and_compute_what_transformers_saved(tmp_path, transformers, act):
    torch.manual_seed(1)
    theirs = transformers.ChineseCLIPModel(their_config(transformers, hidden_act=act)).eval()
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    assert ours.config.text == BERT and ours.config.activation == act
    assert_equal_to_theirs(ours, theirs)


def official(made, prefix="module.", pooler=True, fused=False):
    """A checkpoint as Chinese-CLIP's programs write it."""
    state = {}
    for name, tensor in made.state_dict().items():
        if fused and ".attn.in_proj_" in name:
            name = name.replace("in_proj_", "Wqkv.")
        if fused and ".attention.output.dense." in name:
            name = name.replace("output.dense", "self.out_proj")
        if fused and ".attention.self.key." in name or fused and ".attention.self.value." in name:
            continue
        if fused and ".attention.self.query." in name:
            tensor = torch.cat([made.state_dict()[name.replace("query", part)]
                                for part in ("query", "key", "value")])
            name = name.replace("query", "Wqkv")
        state[prefix + name] = tensor
    if pooler:
        state[prefix + "bert.pooler.dense.weight"] = torch.zeros(128, 128)
        state[prefix + "bert.pooler.dense.bias"] = torch.zeros(128)
    return {"epoch": 15, "step": 0, "name": "x", "state_dict": state}


@pytest.mark.parametrize("image", ["tiny-vit", "tiny-rn"])
@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("fused", [False, True])
def test_official_checkpoints_load_in_every_form(tmp_path, image, prefix, fused):
    ours = model(image)
    torch.save(official(ours, prefix, fused=fused), tmp_path / "epoch.pt")
    loaded = load(tmp_path / "epoch.pt")
    assert same(loaded, ours) and loaded.origin["layout"] == "chinese_clip"
    assert not any("LAION" in note for note in loaded.origin["notes"])


def test_a_bare_state_dict_with_fused_attention_loads(tmp_path):
    torch.save(official(model(), "", False, True)["state_dict"], tmp_path / "bare.pt")
    assert same(load(tmp_path / "bare.pt"), model())


def test_the_text_tower_of_a_chinese_clip_keeps_its_bare_first_token(tmp_path):
    torch.save(official(model()), tmp_path / "epoch.pt")
    joined = load(image_tower="tiny-vit:none", text_tower=tmp_path / "epoch.pt", embed_dim=32)
    assert joined.config.text == BERT
    save(model(), tmp_path / "folder", "hf")
    assert load(image_tower="tiny-vit:none", text_tower=tmp_path / "folder").config.text == BERT


def test_a_dual_encoders_pooler_is_not_taken_for_a_remnant(tmp_path):
    ours = model(**bert_fields(dataclasses.replace(BERT, pool="pooler")))
    assert same(load(save(ours, tmp_path / "dual.safetensors")), ours)
    save(ours, tmp_path / "dual", "hf")
    assert load(tmp_path / "dual").config.text.pool == "pooler"


def test_what_we_save_is_the_official_layout(tmp_path):
    ours = model()
    save(ours, tmp_path / "a.pt", "chinese_clip")
    held = torch.load(tmp_path / "a.pt", weights_only=True)
    assert set(held) == {"epoch", "step", "name", "state_dict"}
    assert {f"module.{name}" for name in ours.state_dict()} == set(held["state_dict"])
    assert same(load(tmp_path / "a.pt"), ours)
    report = inspect(tmp_path / "a.pt")
    assert report["layout"] == "chinese_clip" and report["architecture"] == "CLIP"
    assert report["beside_the_weights"]["epoch"] == 0
    for layout in ("openai", "open_clip"):
        assert "no place" in the_one_line(save, ours, tmp_path / "b.pt", layout, error=WeightsError)
    for other in (CLIP(CONFIGS["tiny-vit"]), model(activation="gelu"),
                  model(**bert_fields(dataclasses.replace(BERT, heads=4)))):
        said = the_one_line(save, other, tmp_path / "b.pt", "chinese_clip", error=WeightsError)
        assert "no place" in said


@torch.no_grad()
@pytest.mark.parametrize("image", ["tiny-vit", "tiny-rn"])
def test_the_official_model_computes_the_same(tmp_path, image):
    official_model = pytest.importorskip("cn_clip.clip.model", reason="cn_clip is not installed")
    ours = model(image)
    config = ours.config
    theirs = official_model.CLIP(
        config.embed_dim, config.image_size, config.vision_layers, config.vision_width,
        config.vision_patch, VOCAB, text_attention_probs_dropout_prob=0.1, text_hidden_act="gelu",
        text_hidden_dropout_prob=0.1, text_hidden_size=128, text_initializer_range=0.02,
        text_intermediate_size=48, text_max_position_embeddings=24, text_num_attention_heads=2,
        text_num_hidden_layers=3, text_type_vocab_size=2)
    save(ours, tmp_path / "a.pt", "chinese_clip")
    held = torch.load(tmp_path / "a.pt", weights_only=True)["state_dict"]
    theirs.load_state_dict({name.removeprefix("module."): t for name, t in held.items()})
    theirs.eval()
    found = ours(pictures(config.image_size), texts())
    for one, two in zip(found, theirs(pictures(config.image_size), texts())):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_padding_changes_nothing_and_the_mask_does():
    ours = model()
    short = ours.encode_text(texts(width=22)[:2, :9])
    torch.testing.assert_close(ours.encode_text(texts(width=24)[:2]), short, rtol=0, atol=1e-6)
    seen = ours.bert(torch.where(texts()[:1] == 0, 5, texts()[:1])) @ ours.text_projection
    assert (seen - short[:1]).abs().max() > 0.01


def test_patches_are_the_same_as_leaving_the_others_out():
    """FLIP: a naive tower in float64 that is given only the kept tokens."""
    ours, images = model().double(), pictures().double()
    kept = torch.stack([torch.randperm(16)[:5] for _ in range(4)])
    tower = ours.visual
    x = tower.conv1(images).flatten(2).transpose(1, 2) + tower.positional_embedding[1:]
    x = torch.stack([row[places] for row, places in zip(x, kept)])
    first = (tower.class_embedding + tower.positional_embedding[0]).expand(4, 1, -1)
    x = tower.ln_pre(torch.cat([first, x], dim=1))
    for block in tower.transformer.resblocks:
        x = block(x)
    expected = tower.ln_post(x[:, 0]) @ tower.proj
    torch.testing.assert_close(ours.encode_image(images, patches=kept), expected)
    whole = torch.arange(16).expand(4, -1)
    torch.testing.assert_close(ours.encode_image(images, patches=whole), ours.encode_image(images))
    with pytest.raises(ValueError, match="only a ViT"):
        model("tiny-rn").encode_image(pictures(64), patches=kept)


def test_recomputed_blocks_give_the_same_gradients_with_dropout():
    gradients = []
    for on in (False, True):
        ours = model().train().recompute_blocks(on)
        torch.manual_seed(5)
        images, found, scale = ours(pictures(), texts())
        (scale * images @ found.T).diagonal().sum().backward()
        gradients.append([p.grad for p in ours.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert sum(hasattr(module, "through") for module in ours.modules()) == 2


def test_a_digest_is_of_one_tower_and_changes_with_any_of_its_weights():
    ours = model()
    before = {side: digest(ours, side) for side in ("image", "text")}
    with torch.no_grad():
        ours.visual.proj[0, 0] += 1e-6
    assert digest(ours, "image") != before["image"] and digest(ours, "text") == before["text"]
    with torch.no_grad():
        ours.logit_scale += 1
        ours.text_projection[0, 0] += 1e-6
    assert digest(ours, "text") != before["text"]


# -----------------------------------------------------------------------------
# The tokenizer

EDGES = {
    "杰尼龟": [3345, 2225, 7991],
    "": [],
    "Hello, WORLD-wide!": [8701, 117, 8572, 118, 8541, 8510, 106],
    "黑色碳纤维材料表面": [7946, 5682, 4823, 5275, 5335, 3332, 3160, 6134, 7481],
    "ＡＢ１２": [8051, 12641, 8939, 8929],
    "“引号”‘单’": [100, 2471, 1384, 100, 100, 1296, 100],
    "[MASK][CLS]": [138, 9622, 8998, 140, 138, 12847, 8118, 140],
    "\ue000x": [100],
    "\ud800": [100],
    "a\ud800\u732b": [100, 4344],
    "ΑΣ ΣΑΣ": [210, 13395, 226, 13380, 13395],
    "é ß İ ﬁ": [147, 191, 151, 100],
    "a\u200bb\xadc": [8425],
    "\ufeffBOM\ufffd\x00": [11059, 8175],
    "a\u2028b\u3000c\xa0d": [143, 144, 145, 146],
    "한국어 かな カナ": [303, 10928, 9877, 13454, 13479, 11953, 13463, 13472, 541, 8730, 598,
                   10714],
    "\U0001f60e\U0001f469\u200d\U0001f469\u200d\U0001f467": [100],
    "\U0002b820\U0002b91f龥㐀": [100, 100, 100, 100],
    "x" * 101: [12243] + [12812] * 32 + [8206],
    "x" * 201: [100],
    "的的的": [4638, 4638, 4638],
    "！？、；：（）《》【】·～￥％×℃〇々": [
        8013, 8043, 510, 8039, 8038, 8020, 8021, 517, 518, 523, 524, 185, 8080, 21123, 8017, 190,
        8320, 13649, 13648],
    "…—–½": [100, 100, 100, 100],
    "the quick brown fox's": [8174, 12345, 10699, 10872, 112, 161],
    "3.14 2026年": [124, 119, 8122, 9707, 8158, 2399],
    "Ą́b": [9386],
    "\x1c\x85\t\r\n": [],
    "ไทย": [100],
    "iPhone13ProMax手机壳": [8210, 8679, 10538, 10014, 2797, 3322, 1900],
    "\uac00\u302e": [100],
}


def test_edge_cases_have_the_ids_of_the_official_tokenizer(vocab):
    bare = ChineseTokenizer(vocab, straight_quotes=False)
    assert {text: bare.encode(text) for text in EDGES} == EDGES


def test_every_character_has_the_ids_of_the_official_tokenizer(vocab):
    theirs = pytest.importorskip("cn_clip.clip.bert_tokenizer", reason="cn_clip is not installed")
    theirs = theirs.FullTokenizer(str(vocab))
    ours = ChineseTokenizer(vocab, straight_quotes=False)
    for code in [*range(0x3100), *range(0xD700, 0x11000), *range(0x1D000, 0x1F800, 3)]:
        text = f"a{chr(code)}b"
        assert ours.encode(text) == theirs.convert_tokens_to_ids(theirs.tokenize(text)), hex(code)


def naive_chinese(text, ids):
    """Google's rules of 2018 in the plainest form, character by character."""
    text = text.lower().replace("\u201c", '"').replace("\u201d", '"')
    words = [""]
    for c in text:
        kind, code = unicodedata.category(c), ord(c)
        if c in "\t\n\r " or kind == "Zs":
            words.append("")
        elif kind in ("Cc", "Cf") or code == 0xFFFD:
            continue
        elif any(low <= code <= high for low, high in (
                (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F),
                (0x2B740, 0x2B81F), (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F))):
            words += [c, ""]
        else:
            words[-1] += c
    found = []
    for word in " ".join(words).split():
        word = "".join(c for c in unicodedata.normalize("NFD", word)
                       if unicodedata.category(c) != "Mn")
        parts = "".join(f" {c} " if 33 <= ord(c) < 127 and not c.isalnum()
                        or unicodedata.category(c)[0] == "P" else c for c in word).split()
        for part in parts:
            pieces, start = [], 0
            while start < len(part) and len(part) <= 200:
                end = next((end for end in range(len(part), start, -1)
                            if ("##" if start else "") + part[start:end] in ids), None)
                if end is None:
                    break
                pieces.append(ids[("##" if start else "") + part[start:end]])
                start = end
            found += pieces if start == len(part) else [ids["[UNK]"]]
    return found


def test_random_texts_have_the_ids_of_the_naive_twin(chinese):
    draw = random.Random(0)
    ranges = ((0x20, 0x180), (0x300, 0x330), (0x4E00, 0x4E40), (0x2000, 0x2030), (0x3A3, 0x3C4),
              (0xFF00, 0xFF20), (0x1F600, 0x1F604))
    pool = [chr(code) for low, high in ranges for code in range(low, high)] + [
        *"\ud800\udfff\ue000\ufeff\ufffd\0\x1c\U0002b820\uac00\u302eΣ\t"]
    for _ in range(4000):
        text = "".join(draw.choice(pool) for _ in range(draw.randrange(12)))
        assert chinese.encode(text) == naive_chinese(text, chinese.ids), ascii(text)


def test_a_text_is_52_tokens_with_the_end_kept(chinese):
    tokens = chinese(["的" * 50, "的" * 51, "的" * 60, "", "杰尼龟"])
    assert tokens.shape == (5, 52) and chinese.truncated == 2
    assert (tokens[:3, 51] == 102).all() and tokens[3].tolist() == [101, 102] + [0] * 50
    assert tokens[4, :5].tolist() == [101, 3345, 2225, 7991, 102]
    chinese.truncated = 0


def test_another_vocabulary_is_refused_unless_asked_for(tmp_path, vocab):
    rows = vocab.read_text("utf-8").split("\n")
    assert rows[343] == "\u2028" and rows[4638] == "的" and rows[21127] == "##😎"
    (tmp_path / "vocab.txt").write_text("\n".join(rows[:200] + rows[201:]), "utf-8")
    assert "any_vocab" in the_one_line(ChineseTokenizer, tmp_path, error=TokenizerError)
    assert ChineseTokenizer(tmp_path, any_vocab=True).vocab_size == 21_127


@pytest.mark.parametrize("layout, file", [
    ("safetensors", "a.safetensors"), ("chinese_clip", "a.pt"), ("hf", "folder")])
def test_a_checkpoint_carries_its_vocabulary(tmp_path, chinese, layout, file):
    ours = model(**bert_fields(dataclasses.replace(BERT, vocab_size=21_128)))
    ours.vocabulary = chinese.vocabulary
    save(ours, tmp_path / file, layout)
    found = open_tokenizer(tmp_path / file)
    assert type(found) is ChineseTokenizer and found.ids == chinese.ids
    assert found.encode("“黑色”Ａ龟") == chinese.encode("“黑色”Ａ龟")
    if layout != "hf":
        again = load(tmp_path / file)
        assert again.vocabulary == chinese.vocabulary
        save(again, tmp_path / "again.safetensors")
        assert open_tokenizer(tmp_path / "again.safetensors").ids == chinese.ids
        assert inspect(tmp_path / file)["vocabulary"] == "21,128 tokens"


def test_transformers_processor_reads_the_folder(tmp_path, transformers, chinese):
    ours = model(**bert_fields(dataclasses.replace(BERT, vocab_size=21_128)))
    ours.vocabulary = chinese.vocabulary
    save(ours, tmp_path, "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("一个穿着泳装的女人, a Bikini").input_ids[1:-1] == chinese.encode(
        "一个穿着泳装的女人, a Bikini")
    size = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert size["size"] == {"height": 32, "width": 32} and not size["do_center_crop"]


def test_a_wordpiece_vocabulary_comes_back_with_its_rules(tmp_path, vocab):
    first = WordPieceTokenizer(vocab, lowercase=False)
    again = open_tokenizer(first.vocabulary)
    text = "Über 黑色 ABC é"
    assert again.encode(text) == first.encode(text) != WordPieceTokenizer(vocab).encode(text)
    assert type(again) is WordPieceTokenizer


@pytest.mark.parametrize("content", [{"a": 1}, {"vocabulary": {"kind": "other", "tokens": []}},
                                     {"vocabulary": {"kind": "chinese", "tokens": [1, 2]}},
                                     {"vocabulary": {"kind": "chinese", "tokens": ["a", "a"]}},
                                     {"vocabulary": [1]}, [1]])
def test_a_checkpoint_without_a_vocabulary_is_one_line(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    the_one_line(open_tokenizer, tmp_path / "a.pt", error=TokenizerError)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_no_code_of_a_checkpoint_runs_for_its_vocabulary(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"vocabulary": Evil()}, tmp_path / "a.pt")
    the_one_line(open_tokenizer, tmp_path / "a.pt", error=TokenizerError)
    (tmp_path / "b.safetensors").write_bytes(b"\xff" * 40)
    the_one_line(open_tokenizer, tmp_path / "b.safetensors", error=TokenizerError)
    assert not (tmp_path / "executed").exists()


def test_statistics_count_what_is_cut_and_unknown(chinese):
    found = chinese.statistics(["的" * 51, "的" * 50, "\ue000 \ud800猫", ""], 52)
    assert found == {"texts": 4, "tokens": 51 + 50 + 3, "longest": 53, "truncated": 1, "unknown": 2}


def test_the_chinese_captions_of_flickr8k_fit_and_are_known(shared, chinese):
    pairs = open_pairs("flickr8k", "train", shared, captions="flickr8kzhc.caption.txt")
    found = chinese.statistics(pairs.captions[:12000], 52)
    assert not found["truncated"] and found["unknown"] < 10
    notes = caption_notes(pairs.captions[:12000], found, 52, flips=True, hues=True)
    assert any("左" in note for note in notes) and any("colours" in note for note in notes)


# -----------------------------------------------------------------------------
# LMDB

def write_lmdb(folder, entries, page=4096):
    """A B+ tree as LMDB lays it out, written in the simplest way: {key: value} of bytes."""
    pages = [b"", b""]

    def node(low, high, flags, key, value=b""):
        packed = struct.pack("<HHHH", low, high, flags, len(key)) + key + value
        return packed + bytes(len(packed) % 2)

    def add(kind, nodes):
        pointers, end, body = [], page, b""
        for packed in nodes:
            end -= len(packed)
            pointers.append(end)
            body = packed + body
        head = struct.pack("<QHHHH", len(pages), 0, kind, 16 + 2 * len(nodes), end)
        head += struct.pack(f"<{len(nodes)}H", *pointers)
        pages.append(head + bytes(end - len(head)) + body)
        return len(pages) - 1

    def level(kind, nodes):
        made, some, size = [], [], 16
        for first, packed in nodes:
            if size + len(packed) + 2 > page:
                made.append((some[0][0], add(kind, [packed for _, packed in some])))
                some, size = [], 16
            some.append((first, packed))
            size += len(packed) + 2
        return made + [(some[0][0], add(kind, [packed for _, packed in some]))]

    leaves = []
    for key, value in sorted(entries.items()):
        low, high, flags, held = len(value) & 0xFFFF, len(value) >> 16, 0, value
        if len(value) > page // 4:
            held, flags = struct.pack("<Q", len(pages)), 1
            count = -(-(len(value) + 16) // page)
            whole = struct.pack("<QHHI", len(pages), 0, 4, count) + value
            whole += bytes(count * page - len(whole))
            pages += [whole[i * page:(i + 1) * page] for i in range(count)]
        leaves.append((key, node(low, high, flags, key, held)))
    made, depth = level(2, leaves) if leaves else [(b"", 2 ** 64 - 1)], int(bool(leaves))
    while len(made) > 1:
        made = level(1, [(key, node(number & 0xFFFF, number >> 16 & 0xFFFF, number >> 32,
                                    key if i else b"")) for i, (key, number) in enumerate(made)])
        depth += 1
    for place in (0, 1):
        free = struct.pack("<IHHQQQQQ", page, 8, 0, 0, 0, 0, 0, 2 ** 64 - 1)
        main = struct.pack("<IHHQQQQQ", 0, 0, depth, 0, 0, 0, len(entries), made[0][1])
        pages[place] = (struct.pack("<QHHHH", place, 0, 8, 0, 0) + struct.pack(
            "<IIQQ", 0xBEEFC0DE, 1, 0, 1 << 40) + free + main + struct.pack(
            "<QQ", len(pages) - 1, place)).ljust(page, b"\0")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data.mdb").write_bytes(b"".join(pages))
    return folder


def entries(count, seed=0):
    draw = random.Random(seed)
    sizes = (0, 1, 5, 100, 900, 3000, 9000)
    return {str(draw.randrange(10 ** 6)).encode(): draw.randbytes(draw.choice(sizes))
            for _ in range(count)}


@pytest.mark.parametrize("count, page", [(0, 4096), (1, 4096), (40, 4096), (3000, 4096),
                                         (400, 256 * 8), (300, 16384)])
def test_lmdb_holds_what_was_written(tmp_path, count, page):
    expected = entries(count)
    found = LMDB(write_lmdb(tmp_path, expected, page))
    assert list(found.items()) == sorted(expected.items()) and len(found) == len(expected)
    assert all(found.get(key) == value for key, value in expected.items())
    assert found.get(b"none") is None and b"none" not in found and found.get(b"none", b"x") == b"x"


def test_lmdb_reads_what_the_lmdb_package_wrote(tmp_path):
    lmdb = pytest.importorskip("lmdb", reason="lmdb is not installed")
    expected = entries(4000)
    with lmdb.open(str(tmp_path), map_size=1 << 28) as env:
        for part in range(4):
            with env.begin(write=True) as change:
                for key in list(expected)[part::4]:
                    change.put(key, expected[key])
        with env.begin(write=True) as change:
            for key in list(expected)[::5]:
                change.delete(key)
                del expected[key]
    assert list(LMDB(tmp_path).items()) == sorted(expected.items())
    with lmdb.open(str(write_lmdb(tmp_path / "ours", expected)), readonly=True, lock=False) as env:
        with env.begin() as look:  # and the writer of these tests writes LMDB
            assert list(look.cursor()) == sorted(expected.items())


def test_a_spoilt_lmdb_is_refused_or_read_but_never_more(tmp_path):
    """Any bytes: one line, or values out of the file itself; no crash, no endless loop."""
    write_lmdb(tmp_path, entries(300))
    sound, draw = (tmp_path / "data.mdb").read_bytes(), random.Random(1)
    refused = 0
    for trial in range(300):
        spoilt = bytearray(sound)
        for _ in range(draw.choice((1, 4, 40))):
            at = draw.choice((draw.randrange(200), 4096 + draw.randrange(200),
                              draw.randrange(len(spoilt))))
            spoilt[at] = draw.randrange(256)
        (tmp_path / "data.mdb").write_bytes(spoilt[:draw.choice((len(spoilt), len(spoilt),
                                                                 draw.randrange(len(spoilt))))])
        try:
            assert sum(len(value) for _, value in LMDB(tmp_path).items()) < 100 * len(sound)
        except DataError as error:
            refused += "\n" not in str(error)
    assert refused > 100


@pytest.mark.parametrize("at, value, said", [
    (16, b"\0\0\0\0", "magic"), (4096 + 20, b"\2\0\0\0", "version 2"),
    (4096 + 92, b"\4\0", "plain"),
    (4096 + 94, b"\xff\xff", "depth"), (4096 + 128, b"\xff" * 8, "twice in the tree|outside"),
    (4096 + 120, b"\1", "entries of")])
def test_a_wrong_field_of_an_lmdb_is_named(tmp_path, at, value, said):
    write_lmdb(tmp_path, entries(300))
    content = bytearray((tmp_path / "data.mdb").read_bytes())
    content[at:at + len(value)] = value
    (tmp_path / "data.mdb").write_bytes(content)
    with pytest.raises(DataError, match=said):
        LMDB(tmp_path)


def test_a_tree_that_meets_itself_is_no_bomb(tmp_path):
    """Branch pages of the same child again and again would be 100 ** 30 leaves."""
    write_lmdb(tmp_path, {b"%05d" % i: b"x" * 50 for i in range(3000)})
    content = bytearray((tmp_path / "data.mdb").read_bytes())
    root, = struct.unpack_from("<Q", content, 4096 + 128)
    for pointer in struct.unpack_from("<20H", content, root * 4096 + 16):
        struct.pack_into("<HHH", content, root * 4096 + pointer, root, 0, 0)  # the page itself
    struct.pack_into("<H", content, 4096 + 94, 30)
    (tmp_path / "data.mdb").write_bytes(content)
    with pytest.raises(DataError, match="twice in the tree"):
        LMDB(tmp_path)


def test_a_value_that_leaves_the_file_is_refused(tmp_path):
    write_lmdb(tmp_path, {b"a": b"x" * 3000})
    content = bytearray((tmp_path / "data.mdb").read_bytes())
    at = content.index(b"\1\0\1\0a") - 4  # size, its high half, flag, length of the key, key
    struct.pack_into("<HH", content, at, 0, 1)
    (tmp_path / "data.mdb").write_bytes(content)
    with pytest.raises(DataError, match="leaves the file"):
        LMDB(tmp_path)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_pickles_of_every_protocol_are_read(protocol):
    for value in ((1, 2, "文"), ("a.jpg", "a.jpg", "x" * 300), (2 ** 40, -5, ""),
                  (70_000, 255, "\\\n\u2028"), ("7", 256, "\ud800" if protocol else "d"), (1, 2),
                  (0, 1, 2, 3, "n")):
        assert read_plain_pickle(pickle.dumps(value, protocol)) == value


class Wide:
    def __reduce__(self):
        return list, ((1,),)


@pytest.mark.parametrize("value", [
    pickle.dumps(Evil()), pickle.dumps(Evil(), 0), pickle.dumps((1, 2, Evil())),
    pickle.dumps(Wide()), pickle.dumps([1]), pickle.dumps({}), pickle.dumps(b"x" * 9),
    pickle.dumps(1.5), b"", b".", b"\x80\x04.", b"\x80\x04X\xff\xff\xff\xffab.",
    b"r\xff\xff\xff\x7f.", b"\x8a\xff.", b"cos\nsystem\n(S'x'\ntR.",
    b"\x80\x02\x82\x01.", b"(t" * 50, b"K\x01K\x02.", b"P1\n.", b"K\x012\x85."])
def test_every_other_pickle_is_refused_and_not_run(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError):
        read_plain_pickle(value)
    assert not (tmp_path / "executed").exists()


# -----------------------------------------------------------------------------
# Layouts

def jpeg(number, side=24):
    buffer = io.BytesIO()
    values = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(values).save(buffer, "png")
    return buffer.getvalue()


TEXTS = [(5, "黑色的猫", [3]), (6, "三只猫", [3, 1, 20]), (7, "红色的猫", [1]), (8, "", []),
         (9, "红色的猫", [20, 11])]
POOL = [3, 1, 20, 11, 100, 7]  # 100 and 7 have no text


def write_tsv(folder, word="train", texts=TEXTS, pool=POOL, encode=base64.b64encode):
    folder.mkdir(exist_ok=True)
    with open(folder / f"{word}_imgs.tsv", "wb") as file:
        for number in pool:
            file.write(str(number).encode() + b"\t" + encode(jpeg(int(number))) + b"\n")
    lines = [{"text_id": i, "text": text, "image_ids": images} for i, text, images in texts]
    (folder / f"{word}_texts.jsonl").write_text(
        "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", "utf-8")
    return folder


def write_split_lmdb(folder, word="train", texts=TEXTS, pool=POOL, protocol=4):
    rows = [(image, i, text) for i, text, images in texts for image in images]
    pairs = {str(n).encode(): pickle.dumps(row, protocol) for n, row in enumerate(rows)}
    write_lmdb(folder / word / "pairs", pairs | {b"num_samples": str(len(rows)).encode()})
    images = {str(number).encode(): base64.urlsafe_b64encode(jpeg(number)) for number in pool}
    write_lmdb(folder / word / "imgs", images | {b"num_images": str(len(pool)).encode()})
    return folder


def rows_of(pairs):
    return [(pairs.paths[owner], text) for owner, text in zip(pairs.owner, pairs.captions)]


def test_the_sources_of_one_set_give_the_same_pairs_and_pixels(tmp_path):
    write_tsv(tmp_path / "tsv")
    write_split_lmdb(tmp_path / "whole" / "lmdb")
    write_split_lmdb(tmp_path / "whole" / "lmdb", "valid")
    os.makedirs(tmp_path / "table")
    rows = [(image, text) for _, text, images in TEXTS for image in images]
    for number in POOL:
        (tmp_path / "table" / f"{number}.png").write_bytes(jpeg(number))
    (tmp_path / "table" / "t.csv").write_text("image,caption,split\n" + "".join(
        f"{image}.png,{text},train\n" for image, text in rows), "utf-8")
    (tmp_path / "table" / "u.jsonl").write_text("\n".join(json.dumps(
        {"image": f"{image}.png", "caption": text, "split": "train"}) for image, text in rows))
    expected = open_pairs(tmp_path / "tsv", "train", transform=Preprocess(16, squash=True))
    wanted = [(str(image), text) for image, text in rows]
    assert expected.name == "tsv" and rows_of(expected) == wanted
    for source in ("tsv/train_texts.jsonl", "tsv/train_imgs.tsv", "whole", "whole/lmdb",
                   "whole/lmdb/train", "table/t.csv", "table/u.jsonl"):
        found = open_pairs(tmp_path / source, "train", transform=Preprocess(16, squash=True))
        found.check_files()
        assert [(path.removesuffix(".png"), text) for path, text in rows_of(found)] == wanted
        for c in range(len(expected)):
            assert torch.equal(found[c][0], expected[c][0])
    val = open_pairs(tmp_path / "whole", "val")
    assert rows_of(open_pairs(tmp_path / "whole", "test")) == rows_of(val) == rows_of(expected)
    assert val.name == "whole" and open_pairs(tmp_path / "whole/lmdb/valid", "val").name == "whole"


def test_images_reach_workers_and_batches(tmp_path):
    write_split_lmdb(tmp_path / "lmdb")
    pairs = open_pairs(tmp_path / "lmdb" / "train", "train", transform=Preprocess(16, squash=True))
    pairs[0]  # the file is mapped before the set is sent to a worker
    alone, other = (torch.cat([batch[0] for batch in data.make_pair_loader(pairs, 2, 1, workers=n)])
                    for n in (0, 1))
    assert torch.equal(alone, other) and len(alone) == 4
    assert len(PairBatches(pairs, 2)) == 2
    assert rows_of(pickle.loads(pickle.dumps(pairs))) == rows_of(pairs)


def test_muges_own_names_and_hidden_labels(tmp_path):
    for word, images in (("MR_train", True), ("MR_valid", True), ("MR_test", False)):
        write_tsv(tmp_path, word)
        os.rename(tmp_path / f"{word}_texts.jsonl", tmp_path / f"{word}_queries.jsonl")
        lines = [{"query_id": i, "query_text": text} | ({"item_ids": ids} if images else {})
                 for i, text, ids in TEXTS]
        (tmp_path / f"{word}_queries.jsonl").write_bytes(
            b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, lines)).encode() + b"\r\n")
    train, test = (open_pairs(tmp_path, split) for split in ("train", "test"))
    assert len(train) == 7 and any("hidden labels" in note for note in train.notes)
    assert rows_of(test) == rows_of(train) and test.retrieval().relevant.tolist() == [
        [0, 0], [1, 0], [1, 1], [1, 2], [2, 1], [4, 2], [4, 3]]
    assert "MR_valid" in test.store.path  # not the pool of the split without labels


@pytest.mark.parametrize("kind", ["tsv", "lmdb"])
def test_a_query_with_several_images_and_images_without_text(tmp_path, kind):
    if kind == "tsv":
        write_tsv(tmp_path, "valid")
    else:
        write_split_lmdb(tmp_path / "lmdb", "valid")
    found = open_pairs(tmp_path, "val").retrieval()
    pool = found.images.paths
    shown = [(text, pool[image]) for text, image in found.relevant.tolist()]
    if kind == "tsv":
        assert found.texts == [text for _, text, _ in TEXTS] and pool == list(map(str, POOL))
        assert any("1 texts name no image" in note for note in found.notes)
    else:  # an LMDB does not know texts without images, and its images are in the order of bytes
        assert found.texts == [text for _, text, images in TEXTS if images]
        assert pool == ["1", "100", "11", "20", "3", "7"]
        (tmp_path / "valid_texts.jsonl").write_text("\n".join(json.dumps(
            {"text_id": i, "text": text, "image_ids": ids}) for i, text, ids in TEXTS))
        assert len(open_pairs(tmp_path, "val").retrieval().texts) == 5  # with it, it does
    assert [path for text, path in shown if text == 1] == ["3", "1", "20"]
    assert any("2 images have no text" in note for note in found.notes)
    assert any("a pool of" in note and "under 10" in note for note in found.notes)
    images = found.images.with_transform(Preprocess(16)).image_items()
    loader = make_loader(images, 4, shuffle=False)
    places = torch.cat([places for _, places, _ in loader])
    assert places.tolist() == list(range(6))  # none is unreadable


def test_captions_without_lists_are_queries_for_their_own_image(shared):
    pairs = open_pairs("flickr8k", "test", shared, captions="flickr8kzhc.caption.txt")
    found = pairs.retrieval()
    assert found.relevant[:, 1].tolist() == pairs.owner and found.texts == pairs.captions
    assert found.images.paths == pairs.paths and not found.notes
    few = pairs.subset(range(3)).retrieval()
    assert len(few.texts) == 15 and len(few.images.paths) == 3 and few.notes
    assert "2 images or more" in the_one_line(pairs.subset([0]).retrieval)


def test_a_subset_keeps_the_queries_of_its_images(tmp_path):
    pairs = open_pairs(write_tsv(tmp_path, "valid"), "val").subset([2, 1])
    assert pairs.paths == ["20", "1"]
    found = pairs.retrieval()
    assert found.texts == ["三只猫", "红色的猫", "红色的猫"]
    assert found.relevant.tolist() == [[0, 1], [0, 0], [1, 1], [2, 0]]


@pytest.mark.parametrize("line, said", [
    ("{broken", "line 2: not JSON"), ('["a"]', "line 2: expected"),
    ('{"text_id": 1}', "line 2: expected"),
    ('{"text_id": 1, "text": "a", "image_ids": 3}', "line 2: expected"), ("[" * 9999, "line 2")])
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, line, said):
    write_tsv(tmp_path)
    texts = tmp_path / "train_texts.jsonl"
    texts.write_text(texts.read_text("utf-8").split("\n")[0] + "\n" + line, "utf-8")
    with pytest.raises(DataError, match=said) as caught:
        open_pairs(tmp_path, "train")
    assert "train_texts.jsonl" in str(caught.value)


def test_a_table_names_the_line_and_keeps_separators_inside_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"image": "a", "text": "一\u2028二"}\n{"image"\n', "utf-8")
    assert "a.jsonl" in (said := the_one_line(open_pairs, tmp_path / "a.jsonl", "train")) and (
        "line 2" in said)
    lines = [json.dumps({"image": f"{i}.png", "caption": "一\u2028二", "split": "train"},
                        ensure_ascii=False) for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), "utf-8")
    assert open_pairs(tmp_path / "a.jsonl", "train").captions == ["一 二"] * 3


def test_string_ids_double_ids_and_lone_surrogates(tmp_path):
    odd = [("t", "猫\ud800", ["店/a.jpg", "x"]), ("t", "狗", ["x", "x"])]
    folder = tmp_path / "odd"
    folder.mkdir()
    content = [("店/a.jpg", 1), ("x", 2), ("x", 3)]
    (folder / "train_imgs.tsv").write_bytes(b"\xef\xbb\xbf" + b"".join(
        name.encode() + b"\t" + base64.b64encode(jpeg(n)) + b"\r\n" for name, n in content))
    (folder / "train_texts.jsonl").write_text("\n".join(json.dumps(
        {"text_id": i, "text": text, "image_ids": ids}) for i, text, ids in odd))
    pairs = open_pairs(folder, "train")
    assert pairs.paths == ["店/a.jpg", "x"] and pairs.captions[0] == "猫\ud800" and pairs.fingerprint
    assert np.array_equal(np.asarray(pairs.picture(1)), np.asarray(Image.open(io.BytesIO(jpeg(3)))))
    assert [note.split(": ")[1][:6] for note in pairs.notes[:2]] == ["1 text", "1 imag"]
    assert pairs.retrieval().relevant.tolist() == [[0, 0], [0, 1], [1, 1]]


def test_missing_and_damaged_images_are_the_usual_faults(tmp_path):
    texts = [(i, f"猫{i}", [i]) for i in range(40)]
    write_tsv(tmp_path, texts=texts, pool=range(39), encode=lambda content: (
        b"***" if content == jpeg(7) else base64.b64encode(content)))
    pairs = open_pairs(tmp_path, "train")
    pairs.check_files()
    assert any("39 (there is no such file)" in note for note in pairs.notes)
    with pytest.raises(data.UnreadableImage, match="train_imgs.tsv:7"):
        pairs.picture(7)
    assert pairs[7][1] != 7  # another pair takes its place
    assert any("1 pairs name images that are not there" in note for note in pairs.retrieval().notes)


def test_a_hostile_pickle_in_an_lmdb_is_refused_by_name_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_split_lmdb(tmp_path / "lmdb")
    first = pickle.dumps((3, 1, "x"))
    for value in (Evil(), (1, 2, Evil()), 5, (1, 2)):
        write_lmdb(tmp_path / "lmdb/train/pairs", {b"0": first, b"1": pickle.dumps(value),
                                                   b"num_samples": b"2"})
        said = the_one_line(open_pairs, tmp_path / "lmdb" / "train", "train")
        assert "pair 1 is refused and was not run" in said
    write_lmdb(tmp_path / "lmdb/train/pairs", {b"0": first, b"num_samples": b"9"})
    assert "pair 1" in the_one_line(open_pairs, tmp_path / "lmdb/train", "train")
    assert not (tmp_path / "executed").exists()


def test_a_tsv_without_tabs_or_content_is_refused(tmp_path):
    write_tsv(tmp_path)
    (tmp_path / "train_imgs.tsv").write_text("no tab here\n")
    assert "train_imgs.tsv, line 1" in the_one_line(open_pairs, tmp_path, "train")
    (tmp_path / "train_imgs.tsv").write_bytes(b"")
    assert "train_imgs.tsv" in the_one_line(open_pairs, tmp_path, "train")


def save_images(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(jpeg(len(name)))


@pytest.mark.parametrize("flat", [True, False])
def test_coco_cn_is_read_with_its_lists(tmp_path, flat):
    names = ["COCO_train2014_000000000009", "COCO_val2014_000000000042",
             "COCO_val2014_000000000073"]
    (tmp_path / "imageid.human-written-caption.txt").write_text(
        "".join(f"{name}#{n}\t一只猫{n}\n" for name in names for n in range(2)), "utf-8")
    for word, name in zip(("train", "val", "test"), names):
        (tmp_path / f"coco-cn_{word}.txt").write_text(name + "\n")
    (tmp_path / "coco-cn_ext.icap2020.txt").write_text("COCO_train2014_01#0\t不\n", "utf-8")
    save_images(tmp_path, [f"images/{n}.jpg" if flat else f"{n[5:-13]}/{n}.jpg" for n in names])
    for word, name in zip(("train", "val", "test"), names):
        pairs = open_pairs(tmp_path, word)
        pairs.check_files()
        path = f"{name}.jpg" if flat else f"{name[5:-13]}/{name}.jpg"
        assert rows_of(pairs) == [(path, f"一只猫{n}") for n in range(2)]


def test_flickr30k_cn_has_a_file_for_each_split(tmp_path):
    for n, word in enumerate(("train", "val", "test")):
        (tmp_path / f"flickr30kzhb_{word}.caption.txt").write_text(
            f"100{n}.jpg#zhb#0 一个男人\n100{n}.jpg#zhb#1 两个男人\n", "utf-8")
    save_images(tmp_path / "flickr30k-images", [f"100{n}.jpg" for n in range(3)])
    for n, word in enumerate(("train", "val", "test")):
        pairs = open_pairs(tmp_path, word)
        pairs.check_files()
        assert rows_of(pairs) == [(f"100{n}.jpg", "一个男人"), (f"100{n}.jpg", "两个男人")]
    (tmp_path / "flickr30kzhm_train.caption.txt").write_text("1000.jpg#zhm#0 人\n", "utf-8")
    assert "not the only train" in the_one_line(open_pairs, tmp_path, "train")


def test_flickr8k_cn_alone_is_found(tmp_path):
    (tmp_path / "flickr8kzhc.caption.txt").write_text("1.jpg#zhc#0 狗\n2.jpg#zhc#0 猫\n", "utf-8")
    for word, name in (("train", "1.jpg"), ("test", "2.jpg")):
        (tmp_path / f"Flickr_8k.{word}Images.txt").write_text(name)
    assert rows_of(open_pairs(tmp_path, "test")) == [("2.jpg", "猫")]


@pytest.mark.parametrize("kind", ["tsv", "lmdb"])
def test_the_doctor_understands_the_layouts(tmp_path, capsys, kind):
    many = [(i, f"猫{i}左边", [i]) for i in range(12)]
    for word, pool in (("train", range(12)), ("valid", [0, *range(20, 24)])):
        texts = [(i, text, [image]) for (i, text, _), image in zip(many, pool)]
        if kind == "tsv":
            write_tsv(tmp_path, word, texts, pool)
        else:
            write_split_lmdb(tmp_path / "lmdb", word, texts, pool)
    assert data.main(["--check", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = {entry["finding"]: entry for entry in report["findings"]}
    assert report["counts"] == {"train": 12, "val": 5, "test": 5} and report["captions"] == 16
    assert found["leakage"]["count"] == 1 and found["leakage"]["examples"] == ["test:0 = train:0"]
    assert any("a pool of 5" in note for note in report["notes"])
    assert any("左" in note for note in report["notes"])
    assert data.main(["--check", str(tmp_path)]) == 0
    assert "with 16 captions" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# Search and scores

def naive_scores(queries, gallery, pairs, k):
    """Chinese-CLIP's evaluation in words: sort each query's whole gallery, look at the first k."""
    hits = 0
    for q in pairs:
        order = sorted(range(len(gallery)), key=lambda g: -float(queries[q] @ gallery[g]))[:k]
        hits += any(g in order for g in pairs[q])
    return 100 * hits / len(pairs)


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_recalls_are_those_of_the_official_evaluation(chunk):
    draw, few = np.random.default_rng(0), 4  # coarse values, so that scores tie
    images = torch.from_numpy(draw.integers(-few, few, (23, 6))).double()
    texts = torch.from_numpy(draw.integers(-few, few, (31, 6))).double()
    relevant = [(t, i) for t in range(30)
                for i in draw.permutation(17)[:draw.integers(1, 4)].tolist()]
    found = recall_at_k(images, texts, torch.tensor(relevant), chunk=chunk)  # text 30 has no image
    by_text = {t: {i for u, i in relevant if u == t} for t in range(31)}
    by_image = {i: {t for t, j in relevant if i == j} for i in {i for _, i in relevant}}
    for k in (1, 5, 10):
        for way, task in (("t2i", (texts, images, by_text)), ("i2t", (images, texts, by_image))):
            assert found[f"{way}_r{k}"] == pytest.approx(naive_scores(*task, k), abs=1e-9)
    shuffled = torch.tensor(relevant)[torch.randperm(len(relevant))]
    assert recall_at_k(images, texts, shuffled, chunk=chunk) == found


def test_a_list_of_pairs_with_one_image_each_is_the_owner():
    images, texts = torch.randn(5, 4), torch.randn(9, 4)
    owner = [0, 0, 1, 2, 2, 3, 4, 4, 4]
    pairs = torch.tensor(list(enumerate(owner)))
    assert recall_at_k(images, texts, owner) == recall_at_k(images, texts, pairs)
    for wrong in (torch.tensor([[9, 0]]), torch.tensor([[0, 5]]), torch.tensor([[-1, 0]]),
                  torch.zeros(9, 3, dtype=torch.long)):
        assert "expected" in the_one_line(recall_at_k, images, texts, wrong)


def test_a_pool_below_ten_never_counts_what_is_no_number():
    images = torch.full((3, 2), float("nan"))
    found = recall_at_k(images, torch.ones(3, 2), [0, 1, 2])
    assert found["i2t_r10"] == found["t2i_r10"] == found["t2i_r1"] == 0


@pytest.mark.parametrize("k, chunk", [(1, 3), (10, 64), (40, 1024)])
def test_top_k_is_a_stable_sort(k, chunk):
    draw = np.random.default_rng(1)
    queries = torch.from_numpy(draw.integers(-2, 3, (25, 4))).float()
    gallery = torch.from_numpy(draw.integers(-2, 3, (33, 4))).float()
    gallery[5] = float("nan")
    scores, places = top_k(queries, gallery, k, chunk)
    assert places.shape == (25, min(k, 33))
    for query, row, found in zip(queries.tolist(), places.tolist(), scores.tolist()):
        score = [sum(a * b for a, b in zip(query, item)) for item in gallery.tolist()]
        score = [float("-inf") if value != value else value for value in score]
        expected = sorted(range(33), key=lambda g: score[g], reverse=True)[:k]
        assert row == expected and found == [score[g] for g in expected]
    assert top_k(queries[:0], gallery, 3)[1].shape == (0, 3)
    assert "expected" in the_one_line(top_k, queries, gallery[:0])


def test_kept_features_are_found_again_and_made_anew_when_anything_changes(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).numpy()
    identity = {"tower": "abc", "size": 224, "mean": (0.5, 0.5)}
    first, known = cached_features(tmp_path / "c", identity, compute, ids=["a", "b", "c", "d"])
    again, found = cached_features(tmp_path / "c", identity, compute, ids=["a", "b", "c", "d"])
    assert (known, found, len(calls)) == (False, True, 1) and np.array_equal(first, again)
    assert isinstance(again, np.memmap)
    for other in (identity | {"size": 225}, identity | {"tower": "abd"}):
        assert not cached_features(tmp_path / "c", other, compute, ids=["a", "b", "c", "d"])[1]
    assert not cached_features(tmp_path / "c", identity, compute, ids=["a", "b", "d", "c"])[1]
    file = next(path for path in sorted((tmp_path / "c").glob("*.npy"))
                if json.loads(path.with_suffix(".json").read_text())["identity"] == {
                    **identity, "mean": [0.5, 0.5]})
    del first, again
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert len(calls) == 4
    cached_features(tmp_path / "c", identity, compute, ids=["a", "b", "c", "d"])
    cached_features(tmp_path / "c", identity, compute, ids=["a", "b", "d", "c"])
    assert len(calls) == 5  # one of the two was damaged


# -----------------------------------------------------------------------------
# Captions and augmentation

def test_doubtful_captions_are_told_with_their_shares():
    captions = ["左边的猫", "a cat on the right", "brightly", "黑色的猫", "黑色的猫"]
    known = {"texts": 5, "tokens": 200, "longest": 60, "truncated": 1, "unknown": 3}
    notes = caption_notes(captions, known, 52, flips=True, hues=True)
    assert [note.split(" captions")[0] for note in notes] == [
        "1 of 5", "3 of 200 tokens (1.50 %) are unknown to the vocabulary", "2 of 5", "2 of 5",
        "1 of 5"]
    assert "the longest has 60" in notes[0] and "(40.0 %)" in notes[2]
    assert caption_notes(captions[:4]) == []
    assert caption_notes([], {**known, "truncated": 0, "unknown": 0}) == []
    tagged = caption_notes(["一个:m 男人:n 在:p 跑:v"] * 1 + ["两:m 个:q 人:n"])
    assert len(tagged) == 1 and "part-of-speech" in tagged[0]


@pytest.fixture(scope="module")
def photo():
    values = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    return Image.fromarray(values).resize((300, 240))


@pytest.mark.parametrize("augment", ["light", "strong", "autoaugment"])
def test_an_augmentation_is_a_function_of_seed_epoch_and_index(photo, augment):
    pytest.importorskip("torchvision.transforms", reason="torchvision is not installed")
    look = pickle.loads(pickle.dumps(Augment(32, augment, seed=3)))
    torch.manual_seed(0)
    first = look(photo, 1, 2)
    state = torch.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(first, Augment(32, augment, seed=3)(photo, 1, 2))
    torch.manual_seed(0)
    assert torch.equal(state, torch.get_rng_state())  # the global generator was not drawn from
    views = {look(photo, epoch, 2).numpy().tobytes() for epoch in range(12)}
    assert len(views) == 12 and first.shape == (3, 32, 32) and first.dtype == torch.float32
    plain = Augment(32, augment, seed=3, colour=False)
    assert plain.distortions == [] or augment == "strong"


def test_no_augmentation_is_the_squashed_image(photo):
    assert torch.equal(Augment(32)(photo, 5, 7), Preprocess(32, squash=True)(photo))
    assert "expected one of" in the_one_line(Augment, 32, "wild")


def test_without_flips_and_colours_an_augmentation_is_the_crop_alone(photo):
    pytest.importorskip("torchvision.transforms", reason="torchvision is not installed")
    crop = Preprocess(32, train=True, seed=3, scale=(0.8, 1.0), flip=False)
    plain = Augment(32, "light", 3, flip=False, colour=False)
    assert torch.equal(plain(photo, 1, 2), crop(photo, 1, 2))
