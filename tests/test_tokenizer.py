"""tokenizer.py: ids equal to open_clip's, which are OpenAI's, to transformers' and cn_clip's."""
import gzip
import html
import json
import pickle
import random
import re
import shutil
import unicodedata

import ftfy
import pytest
import torch
from helpers import refused, ROOT, tiny_clip

from clip_model import bert_fields, BertConfig
from tokenizer import (BPETokenizer, ByteBPETokenizer, ChineseTokenizer, for_model, MERGES,
                       open_tokenizer, WordPieceTokenizer)

TINY = ROOT / "assets" / "tiny_vocab"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer()


def vocabulary(folder, tokens, **config):
    """A BERT folder of these tokens -> the folder"""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*tokens, ""]), "utf-8", newline="\n")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


NASTY = [
    "", " ", "\n", "\t \r\n", "!", "A", "0123456789", "DON'T I'LL we've they're he'd I'm it's",
    "''s", "polka-dotted", "a/b\\c 3.14% #tag @user",
    "a\u00a0b\u2003c\u200bd\u2028e\x85f\x1cg\x0bh\x00i", "naïve café nai\u0308ve",
    "straße STRASSE ẞ", "İstanbul ǅ", "Σίσυφος ΣΊΣΥΦΟΣ ΣΑΣ ς", "ﬁne ﬂow",
    "ｆｕｌｌ ｗｉｄｔｈ １２３", "汉字 测试，黑色。", "日本語のテスト ｶﾞ",
    "한국어 \uac00\u302e", "العربية עברית हिन्दी ไทย", "²³¹ ½ Ⅷ ٣", "😀👨‍👩‍👧‍👦🇩🇪👍🏽❤️",
    "😀" * 40, "&amp;amp;amp; &lt;b&gt; &eacute;&#233;&#xe9; & ; AT&T",
    "<b> &amp;amp;lt; &amp;eacute;", "&#0;&#28;&#xD800;&#x110000;&nbsp;x&notit;",
    "donâ€™t Ã©tÃ© â€œqâ€\x9d", "“curly” ‘quotes’ — dash… –", "\ufeffbom", "\ud800",
    "a\udfffb", "\ufffd\U0010ffff\ue000 \U0002b820龥", "\x1b[31mred\x1b[0m",
    "a <|endoftext|> b<|EndOfText|>", "<|startoftext|><|startoftext", "</w> a</w>b",
    "'ſ x K \u212b", "...!!!???-----__init__", "x" * 300, "aaaaab" * 50, "abcabc" * 60,
    "Ġhello ÿ¡¬®", "hello\u0301 o\u0308\u0308\u0308 \u0301",
    "[MASK] a [CLS] b[SEP]c <mask> <s>x</s>", "##ing ##", "狗" * 150,
    "x" * 100 + " " + "y" * 101 + " " + "z" * 201, "two  spaces   three", " leading",
    "trailing ", "x \n"]


def random_strings(count, seed):
    stream = random.Random(seed)
    alphabets = ["etaoin shrdlu", "ABC abc 123", "'stremvld ", "!?.,-#@& ;", " \t\n\r\x0b\x1c\x85",
                 "áéíßñçøœ", "汉字テスト한국，。", "😀👍🏽❤️‍🔥", "αβγΣς", "İıſK",
                 "â€™Ã©œ\x9d", "&amp;lt;#39x",
                 "\u0301\u0308\u200d\ufeff", "".join(map(chr, range(32, 256)))]
    for _ in range(count):
        mixed = [stream.choice(alphabets) for _ in range(stream.randrange(1, 4))]
        letters = "".join(mixed)
        if stream.random() < 0.3:
            letters = [chr(stream.choice([stream.randrange(0x3000),
                                          stream.randrange(0xe000, 0x110000)])) for _ in range(9)]
        yield "".join(stream.choice(letters) for _ in range(stream.randrange(1, 30)))


def test_golden_ids(bpe):
    """Read off OpenAI's tokenizer."""
    assert bpe.encode("A dog runs across the grass .") == [320, 1929, 5586, 2500, 518, 5922, 269]
    assert bpe.encode("Hello  world!! don't &amp; naïve 123") == [
        3306, 1002, 748, 847, 713, 261, 1097, 35689, 563, 272, 273, 274]
    assert bpe("a diagram").tolist()[0][:5] == [49406, 320, 22697, 49407, 0]
    assert bpe.encode("a<|endoftext|> <|StartOfText|>") == [320, 49407, 49406]
    assert (bpe.start_id, bpe.end_id, bpe.pad_id, bpe.vocab_size) == (49406, 49407, 0, 49408)


def test_any_text_equals_open_clips(bpe):
    theirs, stream = pytest.importorskip("open_clip.tokenizer").SimpleTokenizer(), random.Random(2)
    pieces = ["".join(stream.choice(letters) for _ in range(length)) for letters in (
        "a", "ab", "aab", "hello", "!?", "é汉") for length in (2, 3, 8, 17, 64, 65, 700)]
    plain = [f"a{chr(c)}B C{chr(c)} {chr(c)}d" for c in range(128)]
    for text in [*NASTY, *pieces, *plain, *random_strings(4000, seed=0)]:
        shown = html.unescape(html.unescape(ftfy.fix_text(text)))
        # It spells its special tokens otherwise, and takes U+001C to U+001F for white space.
        if not re.search("[\x1c-\x1f]|oftext", shown, re.I):
            expected = theirs.encode(text)
            assert bpe.encode(text) == expected, ascii(text)
            assert bpe.encode(text) == expected, ascii(text)  # from the cache
    assert torch.equal(bpe(["a dog", "naïve café"]), theirs(["a dog", "naïve café"]))


def test_a_batch_is_padded_and_a_long_text_keeps_its_end():
    bpe, words = BPETokenizer(), "one two three four five six seven eight nine ten "
    tokens = bpe(["a dog", "", words * 20], context_length=77)
    assert tokens.shape == (3, 77) and tokens.dtype == torch.long and bpe.truncated == 1
    assert tokens[0].tolist() == [49406, 320, 1929, 49407] + [0] * 73
    assert tokens[1].tolist() == [49406, 49407] + [0] * 75
    assert tokens[2].tolist() == [49406, *bpe.encode(words * 20)[:75], 49407]
    assert bpe("a dog", context_length=3).tolist() == [[49406, 320, 49407]] and bpe.truncated == 2
    assert bpe([]).shape == (0, 77) and bpe([], context_length=None).shape == (0, 2)
    assert bpe(iter(["a dog runs", ""]), context_length=None).shape == (2, 5)
    refused(lambda: bpe("a", context_length=1), "context_length")
    assert bpe.truncated == 2


def test_decoding_gives_the_cleaned_text_back(bpe):
    for text in ["a photo of a cat .", "naïve café", "汉字", "😀", "x" * 200]:
        assert bpe.decode(bpe.encode(text)) == text
    assert bpe.decode(bpe.encode("Hello  world!! don't &amp; naïve 123")) == (
        "hello world !! don 't & naïve 1 2 3")
    assert bpe.decode(bpe("a dog", context_length=9)[0]) == "a dog" and bpe.decode([]) == ""
    assert bpe.decode(bpe.encode("é")[:1] + [127])  # half a character is replaced, not fatal
    for bad in (-1, 49_408):
        refused(lambda bad=bad: bpe.decode([bad]), bad)


def test_huge_texts_end(bpe):
    tokenizers = [bpe, open_tokenizer(TINY / "bytebpe"), open_tokenizer(TINY / "wordpiece"),
                  ChineseTokenizer(TINY / "wordpiece")]
    for text in ("hello world " * 20_000, "!" * 100_000, "狗" * 20_000, "\u0301\u0323" * 80_000,
                 "&amp;" * 60_000, "e\u0301" * 40_000):
        for tokenizer in tokenizers:
            assert tokenizer(text, context_length=77).shape == (1, 77)


def test_a_bad_merge_list_is_refused(tmp_path):
    good = MERGES.read_bytes()
    lines = gzip.decompress(good).decode("utf-8").split("\n")
    swapped = [*lines[:100], lines[101], lines[100], *lines[102:]]
    middle = len(good) // 2
    for name, content in {
            "plain": b"#version: 0.2\ni n\n", "cut": good[:middle],
            "flipped": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1:],
            "swapped": gzip.compress("\n".join(swapped).encode())}.items():
        (tmp_path / f"{name}.gz").write_bytes(content)
        refused(lambda name=name: open_tokenizer(tmp_path / f"{name}.gz"), f"{name}.gz")
    refused(lambda: BPETokenizer(tmp_path / "missing.gz"), "missing.gz")
    (tmp_path / "cut_to_clip.gz").write_bytes(gzip.compress("\n".join(lines[:48_895]).encode()))
    assert BPETokenizer(tmp_path / "cut_to_clip.gz").ids == BPETokenizer().ids


# Characters that transformers' older Unicode tables class otherwise: newer ones, and these four.
def in_old_tables(text):
    return not any(c in "\u166d\u1734\u1885\u1886" or
                   unicodedata.ucd_3_2_0.category(c) in ("Cn", "Cs") for c in text)


def their_ids(tokenizer, texts):
    texts = [text.encode("utf-8", "replace").decode() for text in texts]  # Rust has no surrogates
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def characters(folder, **config):
    """A vocabulary of single characters shows what becomes of each, beside its neighbours."""
    found = [c for c in map(chr, range(0x21, 0x30000)) if in_old_tables(c) and not c.isspace()]
    return vocabulary(folder, [*WORDS, *found, *("##" + c for c in found)], **config)


@pytest.mark.parametrize("config", [
    {}, {"do_lower_case": False}, {"do_lower_case": True, "strip_accents": False},
    {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False}])
def test_wordpiece_equals_transformers(config, transformers, tmp_path):
    for folder in (characters(tmp_path / "c", **config), vocabulary(
            tmp_path / "t", (TINY / "wordpiece/vocab.txt").read_text("utf-8").split(), **config)):
        theirs = transformers.BertTokenizerFast.from_pretrained(folder)
        ours = WordPieceTokenizer(folder, lowercase=None if config else True)
        texts = [f"a{c}B" for c in map(chr, range(1, 0x30000, 11))]
        texts = [text for text in [*texts, *NASTY, *random_strings(1500, 7)] if in_old_tables(text)]
        for text, expected in zip(texts, their_ids(theirs, texts)):
            assert ours.encode(text) == expected, ascii(text)
        saved = folder / "saved"
        theirs.save_pretrained(saved)  # as tokenizer.json
        again = open_tokenizer(saved)
        assert type(again) is WordPieceTokenizer
        assert all(again.encode(text) == ours.encode(text) for text in texts[::9])
        (saved / "tokenizer_config.json").unlink()
        assert open_tokenizer(saved).rules == again.rules  # tokenizer.json alone
        shutil.copy(folder / "vocab.txt", saved)
        if config:  # transformers takes its own defaults then, whatever tokenizer.json says
            refused(lambda saved=saved: open_tokenizer(saved), "tokenizer_config.json")


def test_byte_level_bpe_equals_transformers(transformers, tmp_path):
    theirs = transformers.RobertaTokenizerFast.from_pretrained(TINY / "bytebpe")
    theirs.save_pretrained(tmp_path)
    texts = [*NASTY, *random_strings(3000, seed=8)]
    for ours in (ByteBPETokenizer(TINY / "bytebpe"), open_tokenizer(tmp_path)):
        for text, expected in zip(texts, their_ids(theirs, texts)):
            assert ours.encode(text) == expected, ascii(text)
            assert ours.decode(ours.encode(text)) == text.encode("utf-8", "replace").decode()
    assert (ours.start_id, ours.pad_id, ours.end_id) == (0, 1, 2)


def test_batches_equal_transformers_and_special_tokens_are_text(transformers):
    texts = ["a dog runs", "", "two dogs run across the green grass", "一只狗"]
    for name, kind in (("wordpiece", "BertTokenizerFast"), ("bytebpe", "RobertaTokenizerFast")):
        ours = open_tokenizer(TINY / name)
        theirs = getattr(transformers, kind).from_pretrained(TINY / name)
        for length in (77, 8):
            expected = theirs(texts, padding="max_length", truncation=True, max_length=length,
                              return_tensors="pt")["input_ids"]
            assert torch.equal(ours(texts, context_length=length), expected)
        assert not {ours.start_id, ours.end_id, ours.pad_id} & set(
            ours.encode("[CLS][SEP] [PAD] <s></s> <pad>"))


@pytest.mark.parametrize("full", [False, True])
def test_chinese_equals_cn_clip(full, tmp_path):
    """Every kind of character and word, with single characters and with the released vocabulary."""
    theirs = pytest.importorskip("cn_clip.clip.bert_tokenizer")
    folder = ROOT.__class__(theirs.__file__).parent if full else characters(tmp_path / "c")
    theirs = theirs.FullTokenizer(str(folder / "vocab.txt"))
    ours = ChineseTokenizer(folder / "vocab.txt", straight_quotes=False)
    sweep = [*range(1, 0x3100), *range(0xD700, 0x11000, 3), *range(0x1D000, 0x1F800, 9),
             *range(0x2B810, 0x2B930, 3)]
    texts = [*(f"a{chr(code)}b" for code in sweep), *NASTY, *random_strings(3000, seed=9)]
    # What is an accent or a mark is up to Python's Unicode there; newer characters differ.
    for text in texts:
        if all(unicodedata.category(c) != "Cn" and c != "\U0001171e" for c in text):
            expected = theirs.convert_tokens_to_ids(theirs.tokenize(text))
            assert ours.encode(text) == expected, ascii(text)
    if full:  # the row U+2028 counts, and curly quotes are known as straight ones
        assert ours("杰尼龟", 7).tolist() == [[101, 3345, 2225, 7991, 102, 0, 0]]
        assert ours.ids["##😎"] == 21_127 and ours("狗" * 60, 52)[0, -1] == 102
        quoting = ChineseTokenizer(folder / "vocab.txt")
        assert quoting.encode("“引号”") == ours.encode('"引号"')


def test_case_is_what_is_given_or_the_folder_says_or_the_vocabulary_shows(tmp_path):
    tokens = [*WORDS, "A", "a", "é", "e"]
    assert WordPieceTokenizer(vocabulary(tmp_path / "a", tokens)).encode("A é") == [5, 7]
    cased = vocabulary(tmp_path / "b", tokens, do_lower_case=False, cls_token={"content": "[CLS]"},
                       added_tokens_decoder={"9": {"content": "[MASK]", "special": True}})
    for path in (cased, cased / "vocab.txt"):
        assert WordPieceTokenizer(path).encode("A é") == [4, 6]
        assert WordPieceTokenizer(path, lowercase=True).encode("A é") == [5, 7]
    names = [f"N{i}" for i in range(200)]  # a cased vocabulary whose folder does not say so
    assert WordPieceTokenizer([*tokens, *names]).encode("A é") == [4, 6]


@pytest.mark.parametrize("ours", [
    BPETokenizer(), WordPieceTokenizer(TINY / "wordpiece", lowercase=False),
    ChineseTokenizer(TINY / "wordpiece", straight_quotes=False),
    ByteBPETokenizer(TINY / "bytebpe" / "vocab.json")], ids=lambda ours: ours.kind)
def test_a_tokenizer_comes_back_from_facts_files_and_pickle(ours, transformers, tmp_path):
    torch.save({"vocabulary": ours.facts()}, tmp_path / "checkpoint.pt")
    stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["vocabulary"]
    (tmp_path / "added_tokens.json").write_text('{"weave": 4}')  # another's
    ours.save(tmp_path, 40)
    if ours.kind == "chinese":
        (tmp_path / "config.json").write_text('{"model_type": "chinese_clip"}')
    texts = [*NASTY, "A photo of the 黑色森林"]
    for again in (open_tokenizer(stored), pickle.loads(pickle.dumps(ours))):
        assert type(again) is type(ours)
        assert [again.encode(text) for text in texts] == [ours.encode(text) for text in texts]
    opened = open_tokenizer(tmp_path)
    assert type(opened) is type(ours) and opened.encode("A photo") == ours.encode("A photo")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == 40
    sentence = "a photo of the forest, 黑色"
    assert theirs(sentence)["input_ids"] == ours(sentence, context_length=None)[0].tolist()
    theirs.save_pretrained(tmp_path)  # now with a tokenizer.json, which adds the kind's own tokens
    assert open_tokenizer(tmp_path).encode("A photo") == ours.encode("A photo")
    theirs.add_tokens(["<ent>"], special_tokens=True)
    theirs.save_pretrained(tmp_path)
    refused(lambda: open_tokenizer(tmp_path), "<ent>")


BYTES = json.loads((TINY / "bytebpe" / "vocab.json").read_text("utf-8"))
PAIR = (TINY / "bytebpe" / "merges.txt").read_text("utf-8").split("\n")[1]
FAST = {"model": {"type": "BPE", "vocab": BYTES, "merges": [PAIR.split()]}, "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
BERT = "\n".join(WORDS)
BAD = {
    "nothing": {}, "no merges": {"vocab.json": BYTES}, "no [SEP]": {"vocab.txt": BERT[:-6]},
    "not UTF-8": {"vocab.txt": b"\xff\xfe[PAD]"}, "a web page": {"vocab.txt": "<!DOCTYPE html>"},
    "a damaged config": {"vocab.txt": BERT, "tokenizer_config.json": "{"},
    "deep": {"vocab.json": "[" * 100_000, "merges.txt": PAIR},
    "an id of text": {"vocab.json": BYTES | {"er": "7"}, "merges.txt": PAIR},
    "an id twice": {"vocab.json": BYTES | {"er": 7}, "merges.txt": PAIR},
    "half a merge": {"vocab.json": BYTES, "merges.txt": PAIR + "\nc\n"},
    "a merge without id": {"vocab.json": BYTES, "merges.txt": "q q\n"},
    "a prefix space": {"vocab.json": BYTES, "merges.txt": PAIR,
                       "tokenizer_config.json": {"add_prefix_space": True}},
    "another class": {"vocab.txt": BERT, "tokenizer_config.json": {
        "tokenizer_class": "BertJapaneseTokenizer"}},
    "another start": {"vocab.txt": BERT, "tokenizer_config.json": {"cls_token": "[MASK]"}},
    "a map of another": {"vocab.txt": BERT, "special_tokens_map.json": {"cls_token": "[MASK]"}},
    "other merges": {"vocab.json": BYTES, "merges.txt": PAIR, "tokenizer.json": {
        "model": {"vocab": BYTES, "merges": [PAIR, PAIR]}}},
    "cut on the left by the way": {"tokenizer.json": FAST | {"truncation": {"direction": "Left"}}},
    "CLIP's, read by another": {"vocab.json": BPETokenizer().ids, "merges.txt": "",
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}},
    "CLIP's, ended otherwise": {"vocab.json": BPETokenizer().ids, "merges.txt": "",
                                "special_tokens_map.json": {"eos_token": "!"}},
    "another end": {"tokenizer.json": FAST | {"post_processor": {
        "type": "RobertaProcessing", "sep": ["<s>", 0], "cls": ["<s>", 0]}}},
    "an old table": {"vocab.txt": BERT, "tokenizer_config.json": {"cls_token": {"content": "[SEP]"}}},
    "another unknown": {"vocab.txt": BERT, "tokenizer_config.json": {"unk_token": "[MASK]"}},
    "two rules": {"vocab.txt": BERT, "tokenizer_config.json": {"model_max_length": 9},
                  "tokenizer.json": {"normalizer": {"lowercase": False}}},
    "two tables": {"vocab.txt": BERT, "tokenizer.json": {"model": {"vocab": {"[PAD]": 9}}}},
    "cut on the left": {"vocab.txt": BERT, "tokenizer_config.json": {"truncation_side": "left"}},
    "Chinese accents": {"vocab.txt": BERT, "config.json": {"model_type": "chinese_clip"},
                        "tokenizer_config.json": {"strip_accents": False}},
    "an added word": {"vocab.txt": BERT, "added_tokens.json": {"weave": 4}},
    "added in words": {"tokenizer.json": FAST | {"added_tokens": [{"content": "er", "id": 9}]}},
    "added by a table": {"vocab.txt": BERT, "tokenizer_config.json": {
        "added_tokens_decoder": {"4": {"content": "[E1]", "special": True}}}},
    "a list": {"vocab.txt": BERT, "tokenizer_config.json": {"extra_special_tokens": ["[E1]"]}},
    "no basic cut": {"vocab.txt": BERT, "tokenizer_config.json": {"do_basic_tokenize": False}},
    "a number": {"tokenizer.json": 5}, "empty": {"tokenizer.json": {}},
    "unigram": {"tokenizer.json": FAST | {"model": {"type": "Unigram", "vocab": []}}},
    "odd merges": {"tokenizer.json": FAST | {"model": FAST["model"] | {"merges": [5, [1, 2]]}}},
    "merges ignored": {"tokenizer.json": FAST | {"model": FAST["model"] | {"ignore_merges": True}}},
    "a normalizer": {"tokenizer.json": FAST | {"normalizer": {"type": "NFC"}}},
    "a generic class": {"tokenizer.json": FAST, "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast"}},
    "a far id": {"vocab.json": BYTES | {"far": 10 ** 12}, "merges.txt": PAIR},
    "changed CLIP": {"vocab.json": {"<|startoftext|>": 0}, "merges.txt": "a b"},
    "CLIP's tokens, merged otherwise": {"tokenizer.json": {"model": {
        "vocab": BPETokenizer().ids, "merges": [*map(list, BPETokenizer().ranks)][::-1]}}}}


def test_a_vocabulary_that_cannot_be_read_right_is_refused(tmp_path):
    for kind, files in BAD.items():
        folder = tmp_path / kind
        folder.mkdir()
        for name, content in files.items():
            text = content if isinstance(content, (str, bytes)) else json.dumps(content)
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        refused(lambda folder=folder: open_tokenizer(folder), folder)
    for make in (WordPieceTokenizer, ByteBPETokenizer, open_tokenizer):
        for name in ("none", "vocab.txt", "vocab.json", "model.safetensors"):
            refused(lambda make=make, name=name: make(tmp_path / name), name)
    refused(lambda: WordPieceTokenizer(TINY / "bytebpe"), "bytebpe")
    (tmp_path / "tokenizer.json").write_text(json.dumps(FAST))  # the one they were made from
    assert open_tokenizer(tmp_path).encode(PAIR.replace(" ", "") + " b") == [
        BYTES[PAIR.replace(" ", "")], BYTES["Ġ"], BYTES["b"]]
    beside = clip("roberta", 500, path=str(tmp_path / "model.safetensors"))
    assert for_model(beside).encode("b") == [BYTES["b"]]


def test_facts_that_make_no_tokenizer_are_refused():
    for facts in ({}, {"kind": "other", "vocab": []}, {"kind": "chinese", "vocab": [1, 2]},
                  {"kind": "wordpiece", "vocab": ["a", "a"]}, {"kind": "wordpiece"}, {"kind": []},
                  {"kind": "bytebpe", "vocab": list(BYTES), "merges": 5}):
        refused(lambda facts=facts: open_tokenizer(facts))


def clip(family, vocab_size, **origin):
    text = {"vocab_size": vocab_size} if family == "clip" else bert_fields(BertConfig(
        family, vocab_size, 32, 1, 1, 32, 40, pad_id=1 if family == "roberta" else 0))
    model = tiny_clip(**text)
    model.origin.update(origin)
    return model


def test_a_model_gets_the_tokenizer_of_its_own_text_tower(tmp_path):
    assert type(for_model(clip("clip", 49_408))) is BPETokenizer
    refused(lambda: for_model(clip("clip", 1000)), "49,408", "1,000")  # ids beyond the embedding
    beside = clip("clip", 49_408, layout="hf", path=str(tmp_path / "model.safetensors"))
    BPETokenizer().save(tmp_path, 77)
    assert type(for_model(beside)) is BPETokenizer
    merges = tmp_path / "merges.txt"
    words = merges.read_text("utf-8").split("\n", 1)[1]
    for head in ('"bpe_simple_vocab_16e6.txt#version: 0.2\n', "\ufeff#version: 0.2\n", ""):
        merges.write_text(head + words + "not used\n", "utf-8")  # OpenAI's own list is longer
        assert type(for_model(beside)) is BPETokenizer
    (tmp_path / "added_tokens.json").write_text('{"<my-cat>": 49408}')
    refused(lambda: for_model(beside), "<my-cat>")
    bert, roberta = clip("bert", 300), clip("roberta", 500)
    refused(lambda: for_model(bert), "--tokenizer")
    assert type(for_model(bert, TINY / "wordpiece")) is WordPieceTokenizer
    assert type(for_model(roberta, TINY / "bytebpe")) is ByteBPETokenizer
    refused(lambda: for_model(bert, TINY / "bytebpe"), "bytebpe", "wordpiece")
    refused(lambda: for_model(clip("bert", 200), TINY / "wordpiece"), "265", "200")
    padded = clip("bert", 300)
    padded.pad_id = 3
    refused(lambda: for_model(padded, TINY / "wordpiece"), "pad")
    bert.vocabulary = WordPieceTokenizer(TINY / "wordpiece", lowercase=False).facts()
    assert not for_model(bert).lowercase and for_model(bert, TINY / "wordpiece").lowercase
    chinese = clip("bert", 300, name="CN-ViT-B/16")
    assert type(for_model(chinese, TINY / "wordpiece" / "vocab.txt")) is ChineseTokenizer
    refused(lambda: for_model(clip("bert", 21_128, name="CN-ViT-B/16"), TINY / "wordpiece"),
            "Chinese-CLIP")
