"""Text in, token ids out: CLIP's byte-pair encoding, BERT's WordPiece, RoBERTa's byte-level BPE.

    tokenizer = BPETokenizer()       # or open_tokenizer(path), or for_model(model)
    tokenizer("a photo of a cat")    # LongTensor (1, 77)
    tokenizer.encode("a cat")        # [320, 2368]; `decode` goes back

CLIP (Radford et al. 2021): a caption is cleaned (mojibake repaired, HTML entities resolved twice,
white space folded, lower case) and cut by a regular expression into pieces without white space.
Every piece is merged bottom-up from bytes (Sennrich et al. 2016):

1. Each UTF-8 byte is written as one printable character, so that the merge list can be a text file.
2. The last character of a piece carries "</w>": "cat" is another symbol than in "category".
3. Of all neighbouring pairs the one that stands first in the merge list is joined, wherever it
   occurs, until no neighbouring pair is in the list.

The ids are 256 bytes, the same with "</w>", 48,894 merges, start and end of text. Id 0 is the token
"!" and also the padding: what counts is the first end of text, the largest id.

RoBERTa (Liu et al. 2019): steps 1 and 3 on the text as it is, with the space before each word.
BERT (Devlin et al. 2019): control characters are dropped, every ideograph and punctuation mark is a
word of its own, accents are stripped, letters are lower case; then the longest known beginning of
the word is taken off, and again from what is left, marked "##". A word that cannot be spelled so is
[UNK]. Text never becomes a special token, such as "[MASK]": only CLIP's two are read from text.
"""
import gzip
import hashlib
import html
import itertools
import json
import math
import operator
import pathlib
import unicodedata
import zlib

import ftfy
import regex
import torch

MERGES = pathlib.Path(__file__).resolve().parent / "assets" / "bpe_simple_vocab_16e6.txt.gz"
MERGE_COUNT = 48_894  # the file goes on to 262,145 merges; CLIP uses the first of them
MERGES_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"  # of those lines
CHINESE_SHA256 = "8550a78ca2dd304e6a4b45baa9780db8a93cfacc564b4d1c319905db0122f1e4"  # of the tokens
CACHED_LENGTH, CACHED_CHUNKS = 64, 1_000_000  # a longer run is no word that comes again
LONGEST_PIECE = 1_000  # symbols merged together: the loop is quadratic, and no word is so long
# Step 1 above: the printable character of each byte, and back.
_printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
_borrowed = itertools.count(256)  # where the characters of the other bytes begin
CHARACTERS = tuple(chr(b if b in _printable else next(_borrowed)) for b in range(256))
BYTES = {character: bytes([b]) for b, character in enumerate(CHARACTERS)}

CLIP_PIECES = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE)
BYTE_PIECES = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
# Unicode orders a run of accents by class: ftfy takes O(n^2) for that, and O(n) once it is sorted.
ACCENT_RUN = regex.compile(r"[^\p{ccc=0}]{100,}")

# BERT's character classes. transformers' ideographs lack U+2B820 to U+2B91F, Chinese-CLIP's do not.
SPACE = r"\t\n\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
IDEOGRAPH = (r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b81f"
             r"\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f")
MARKS_AND_REST = regex.compile(r"[!-/:-@\[-`{-~\p{P}]|[^!-/:-@\[-`{-~\p{P}]+")
ACCENTS = regex.compile(r"\p{Mn}")


class TokenizerError(ValueError):
    """A vocabulary or a text that cannot be used; `exit_code` marks it as the user's to mend."""
    exit_code = 2


class Tokenizer:
    """What all kinds share. A kind cuts a text into chunks, whose ids depend on nothing outside,
    and finds the ids of one, which are kept: captions do not repeat, but their words do."""
    kind = text_kind = "bpe"  # text_kind: as `CLIP.text_kind` has it
    rules = {}                # arguments of the class beside the vocabulary

    def __init__(self, ids, start, end, pad, merges=None):
        """ids: {symbol: id}; start, end and pad: three of the symbols; merges: pairs of symbols."""
        self.ids, self.symbols = ids, {i: symbol for symbol, i in ids.items()}
        self.start_id, self.end_id, self.pad_id = ids[start], ids[end], ids[pad]
        self.vocab_size = max(self.symbols) + 1
        self.tokens = [self.symbols.get(i) for i in range(self.vocab_size)]  # None: a hole
        self.ranks = {pair: rank for rank, pair in enumerate(merges or ())}
        self.truncated = 0  # how many texts had to be cut so far
        self._cache = {}    # chunk -> ids

    def encode(self, text):
        """The ids of `text`, without start and end of text: list[int]."""
        ids = []
        for chunk in self._chunks(text):
            known = self._cache.get(chunk)
            if known is None:
                known = self._encode_chunk(chunk)
                if len(chunk) <= CACHED_LENGTH and len(self._cache) < CACHED_CHUNKS:
                    self._cache[chunk] = known
            ids += known
        return ids

    def __call__(self, texts, context_length=77):
        """Token ids of one text or N texts: LongTensor (N, context_length), or as wide as the
        longest if that is None. Start of text, the ids, end of text, padding. A text that is too
        long is cut before its end of text and counted in `self.truncated`."""
        if context_length is not None and context_length < 2:
            raise TokenizerError(f"context_length is {context_length}; expected at least 2")
        flat, lengths = [], []
        for text in [texts] if isinstance(texts, str) else texts:
            ids = self.encode(text)
            if context_length is not None and len(ids) > context_length - 2:
                self.truncated += 1
                ids = ids[:context_length - 2]
            flat += [self.start_id, *ids, self.end_id]
            lengths.append(len(ids) + 2)
        width = max(lengths, default=2) if context_length is None else context_length
        # The padding, five sixths of CLIP's tensor, never exists as Python numbers.
        tokens = torch.full((len(lengths), width), self.pad_id)
        used = torch.arange(width) < torch.tensor(lengths, dtype=torch.long)[:, None]
        return tokens.masked_scatter_(used, torch.tensor(flat, dtype=torch.long))

    def decode(self, ids):
        """The text of `ids` up to the first end of text. TokenizerError on an unknown id."""
        ids = itertools.takewhile(lambda i: i != self.end_id, map(int, ids))
        try:
            return self._join([self.symbols[i] for i in ids if i != self.start_id])
        except KeyError as error:
            raise TokenizerError(f"token id {error} is outside the vocabulary") from None

    def facts(self):
        """What `open_tokenizer` needs to make this tokenizer again, a dict of plain values."""
        merges = {"merges": [" ".join(pair) for pair in self.ranks]} if self.ranks else {}
        return {"kind": self.kind, "vocab": self.tokens, **merges, **self.rules}

    def save(self, folder, longest):
        """Write what transformers reads into a Path; `theirs`: the class and settings it takes."""
        files = {"tokenizer_config.json": json.dumps(self.theirs | {"model_max_length": longest})}
        if self.ranks:
            files["vocab.json"] = json.dumps(self.ids, ensure_ascii=False)
            files["merges.txt"] = "\n".join(["#version: 0.2", *map(" ".join, self.ranks), ""])
        else:
            files["vocab.txt"] = "\n".join([*(token or "" for token in self.tokens), ""])
        for name in ("tokenizer.json", "vocab.txt", "vocab.json", "added_tokens.json"):
            (folder / name).unlink(missing_ok=True)  # another's would count before, or beside
        for name, text in files.items():
            (folder / name).write_text(text, "utf-8", newline="\n")


def from_characters(text):
    """The text whose bytes are written as these characters; half a character becomes U+FFFD."""
    found = b"".join(BYTES.get(c) or c.encode("utf-8", "replace") for c in text)
    return found.decode("utf-8", errors="replace")


def merge(symbols, ranks):
    """Join the neighbours of the lowest rank, left to right, until none has one -> list of symbols.
    ranks: {(left, right): rank}. Where two parts of LONGEST_PIECE meet, ids may be unofficial."""
    done = []
    for start in range(0, len(symbols), LONGEST_PIECE):
        part = symbols[start:start + LONGEST_PIECE]
        while len(part) > 1:
            best = min(zip(part, part[1:]), key=lambda pair: ranks.get(pair, math.inf))
            if best not in ranks:
                break
            joined = part[:1]
            for symbol in part[1:]:
                if (joined[-1], symbol) == best:
                    joined[-1] += symbol
                else:
                    joined.append(symbol)
            part = joined
        done += part
    return done


class BPETokenizer(Tokenizer):
    """CLIP's tokenizer, of its merge list at `path`; TokenizerError when that is another."""
    theirs = {"tokenizer_class": "CLIPTokenizer", "bos_token": "<|startoftext|>", **dict.fromkeys(
        ["eos_token", "unk_token", "pad_token"], "<|endoftext|>")}

    def __init__(self, path=MERGES):
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                lines = file.read().split("\n")[1:MERGE_COUNT + 1]  # line 0 names the version
            if hashlib.sha256("\n".join(lines).encode()).hexdigest() != MERGES_SHA256:
                raise ValueError("other lines, so that every id would differ")
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise TokenizerError(f"{path} is not CLIP's merge list ({error}); expected the "
                                 f"bpe_simple_vocab_16e6.txt.gz of assets/") from None
        merges = [tuple(line.split()) for line in lines]
        # CLIP numbers the bytes by their printable character's place, not by their value.
        symbols = sorted(CHARACTERS)
        symbols += [symbol + "</w>" for symbol in symbols]
        symbols += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
        super().__init__({symbol: i for i, symbol in enumerate(symbols)},
                         "<|startoftext|>", "<|endoftext|>", "!", merges)

    def _chunks(self, text):
        """The words of what OpenAI's tokenizer sees: the text repaired and unescaped."""
        if text.isascii() and "&" not in text and text.replace("\n", " ").isprintable():
            return text.split()  # nothing to repair or unescape, which is most of the time
        text = ACCENT_RUN.sub(lambda run: "".join(sorted(run[0], key=unicodedata.combining)), text)
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        return regex.split(r"\s+", text.strip())

    def _encode_chunk(self, word):
        ids = []
        for piece in CLIP_PIECES.findall(word.lower()):
            if piece in ("<|startoftext|>", "<|endoftext|>"):
                ids.append(self.ids[piece])
            else:
                symbols = [CHARACTERS[b] for b in piece.encode()]
                symbols[-1] += "</w>"
                ids += [self.ids[symbol] for symbol in merge(symbols, self.ranks)]
        return ids

    def _join(self, symbols):
        return from_characters("".join(symbols).replace("</w>", " ")).strip()

    def facts(self):
        return {"kind": self.kind}  # always the same


class ByteBPETokenizer(Tokenizer):
    """RoBERTa's tokenizer: of a vocab.json with merges.txt beside it, a tokenizer.json, a folder
    with them, or the lists of tokens and of merges ("a b"). TokenizerError when they do not fit."""
    kind = text_kind = "bytebpe"
    theirs = {"tokenizer_class": "RobertaTokenizer"}

    def __init__(self, vocab, merges=()):
        _, ids, pairs, _ = read_vocabulary(vocab, self.kind, merges)
        super().__init__(ids, "<s>", "</s>", "<pad>", pairs)

    def _chunks(self, text):
        return BYTE_PIECES.findall(text)

    def _encode_chunk(self, piece):
        symbols = [CHARACTERS[b] for b in piece.encode("utf-8", errors="replace")]
        return [self.ids[symbol] for symbol in merge(symbols, self.ranks)]

    def _join(self, symbols):
        return from_characters("".join(symbols))


class WordPieceTokenizer(Tokenizer):
    """BERT's tokenizer: of a vocab.txt, a tokenizer.json, a folder with one of them, or the list of
    tokens. The arguments win over what the folder says. Where nothing is said, letters are lowered
    unless the vocabulary has capitals, accents are stripped if letters are lowered, and ideographs
    are split. A word of more than `longest_word` characters is [UNK]. Raises TokenizerError."""
    kind = text_kind = "wordpiece"
    ideographs, final_sigma = IDEOGRAPH, False
    dropped = regex.compile(r"[\p{Cc}\p{Cf}\p{Co}\p{Cs}\ufffd]")

    def __init__(self, vocab, lowercase=None, strip_accents=None, split=None, longest_word=100):
        _, ids, _, config = read_vocabulary(vocab, self.text_kind)
        super().__init__(ids, "[CLS]", "[SEP]", "[PAD]")

        def rule(given, name, default):
            return next(x for x in (given, config.get(name), default) if x is not None)
        capitals = sum(token[:1].isupper() for token in ids)  # a handful are special tokens
        self.lowercase = rule(lowercase, "do_lower_case", capitals <= 100)
        self.strip_accents = rule(strip_accents, "strip_accents", self.lowercase)
        self.longest_word, split = longest_word, rule(split, "tokenize_chinese_chars", True)
        self.words = regex.compile(rf"[^{SPACE}{self.ideographs}]+|[{self.ideographs}]" if split
                                   else f"[^{SPACE}]+")
        self.unknown_id, self.longest_token = ids["[UNK]"], max(map(len, ids))
        self.rules = {"lowercase": self.lowercase, "strip_accents": self.strip_accents,
                      "split": split, "longest_word": longest_word}
        self.theirs = {"tokenizer_class": "BertTokenizer", "do_lower_case": self.lowercase,
                       "strip_accents": self.strip_accents, "tokenize_chinese_chars": split}

    def _chunks(self, text):
        return self.words.findall(text)  # what follows works on characters or between spaces

    def _encode_chunk(self, chunk):
        chunk = self.dropped.sub("", chunk)
        if self.strip_accents:  # one by one: normalize() takes O(n^2) for a run of n accents
            chunk = ACCENTS.sub("", "".join(unicodedata.normalize("NFD", c) for c in chunk))
        if self.lowercase:  # str.lower of the whole chunk knows the final sigma
            chunk = chunk.lower() if self.final_sigma else "".join(map(str.lower, chunk))
        return [i for word in MARKS_AND_REST.findall(chunk) for i in self._encode_word(word)]

    def _encode_word(self, word):
        if len(word) > self.longest_word:
            return [self.unknown_id]
        ids, mark = [], ""
        while word:
            lengths = range(min(len(word), self.longest_token), 0, -1)
            longest = next((n for n in lengths if mark + word[:n] in self.ids), 0)
            if not longest:
                return [self.unknown_id]
            ids.append(self.ids[mark + word[:longest]])
            word, mark = word[longest:], "##"
        return ids

    def _join(self, symbols):
        return " ".join(symbols).replace(" ##", "")


class ChineseTokenizer(WordPieceTokenizer):
    """Chinese-CLIP's tokenizer: the ids of its own code, which is Google's BERT of 2018. Unlike in
    transformers, characters of private use, lone surrogates and words of 101 to 200 characters
    count, all ideographs stand alone, and the final sigma is known. straight_quotes: curly quotes,
    which the vocabulary lacks, become straight ones first, as in the authors' training and
    evaluation but not in their `tokenize`."""
    kind = "chinese"
    ideographs, final_sigma = IDEOGRAPH + r"\U0002b820-\U0002b91f", True
    dropped = regex.compile(r"[\p{Cc}\p{Cf}\ufffd]")

    def __init__(self, vocab, straight_quotes=True):
        super().__init__(vocab, lowercase=True, strip_accents=True, split=True, longest_word=200)
        self.straight_quotes, self.rules = straight_quotes, {"straight_quotes": straight_quotes}

    def _chunks(self, text):
        if self.straight_quotes:
            text = text.lower().replace("\u201c", '"').replace("\u201d", '"')
        return super()._chunks(text)


# -----------------------------------------------------------------------------
# Vocabularies in files

NEEDED = {"wordpiece": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
          "bytebpe": ["<s>", "<pad>", "</s>", *CHARACTERS], "bpe": []}
SPECIAL = {"wordpiece": r"\[(PAD|UNK|CLS|SEP|MASK)\]", "bytebpe": "<(s|/s|pad|unk|mask)>",
           "bpe": r"<\|(start|end)oftext\|>"}  # others, added to a vocabulary, change ids
FAST = {("WordPiece", "BertNormalizer", "BertPreTokenizer"): "wordpiece",  # of a tokenizer.json
        ("BPE", None, "ByteLevel"): "bytebpe"}
SETTINGS = {  # those that change ids, as they are here; what lies beside may say otherwise
    "clean_text": "True", "do_basic_tokenize": "True", "add_prefix_space": "False",
    "use_regex": "True", "ignore_merges": "False", "max_input_chars_per_word": "100",
    "continuing_subword_prefix": "(##)?", "end_of_word_suffix": "", "truncation_side": "right",
    "extra_special_tokens": r"\[\]|{}", "additional_special_tokens": r"\[\]",
    "cls_token": r"\[CLS\]|<s>", "sep_token": r"\[SEP\]|</s>", "unk_token": r"\[UNK\]|<unk>",
    "ends": r"(\[CLS\] \[SEP\]|<s> </s>)?",
    "tokenizer_class": "(Bert|DistilBert|Electra|Roberta|Bart)Tokenizer(Fast)?"}
CLIPS = {"truncation_side": "right", "tokenizer_class": "CLIPTokenizer(Fast)?",
         "bos_token": r"<\|startoftext\|>", "eos_token": r"<\|endoftext\|>",
         "ends": r"(<\|startoftext\|> <\|endoftext\|>)?"}
CHINESE = SETTINGS | dict.fromkeys(("do_lower_case", "strip_accents"), "True")


def read_vocabulary(vocab, wanted=None, merges=()):
    """-> kind, {token: id}, merges as pairs of tokens, config by transformers' names. vocab: a file
    or folder, see `open_tokenizer`, or the list of tokens, with the list of `merges`.
    TokenizerError when it is not what the kind, or the one `wanted`, needs."""
    try:
        if isinstance(vocab, (list, tuple)):
            kind, config = wanted, {}
            ids = {token: i for i, token in enumerate(vocab) if token is not None}
        else:
            kind, ids, merges, config = read_files(pathlib.Path(vocab).expanduser())
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
        pairs = [(left, right) for left, right in pairs]  # ValueError where one is no pair
        faults = faults_of(kind, wanted or kind, ids, pairs, config)
        if faults:
            raise ValueError(", ".join(faults[:5]))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise TokenizerError(f"{str(vocab)[:200]} holds no vocab.txt, vocab.json and merges.txt or "
                             f"tokenizer.json of CLIP, BERT or RoBERTa ({type(error).__name__} "
                             f"{' '.join(str(error).split())})") from None
    return kind, ids, pairs, config


def faults_of(kind, wanted, ids, pairs, config):
    """Why a vocabulary of this kind cannot be used as the one `wanted`: a list of short reasons."""
    needed = NEEDED[wanted] + [token for a, b in pairs for token in (a, b, a + b)]
    faults = [f"no {token}" for token in needed if token not in ids]
    berts = CHINESE if config.get("model_type") == "chinese_clip" else SETTINGS
    for name, allowed in (CLIPS if kind == "bpe" else berts).items():
        said = config.get(name)
        if isinstance(said, dict):  # a token of an older file
            said = said.get("content", said)
        if said is not None and not regex.fullmatch(allowed, str(said)):
            faults.append(f"{name} {said}")
    faults += [f"an added token {token}" for token in config.get("added", [])  # cut out of words
               if not regex.fullmatch(SPECIAL[wanted], token)]
    numbers = {operator.index(i) for i in ids.values()}
    if len(numbers) < len(ids) or min(numbers) < 0 or max(numbers) > 1 << 24:
        faults.append("an id twice, below 0 or above 2^24")
    if not faults and kind == "bytebpe" and not pairs:
        faults.append("no merges")
    return faults


def read_files(path):
    """`read_vocabulary` without checks. Raises anything."""
    folder = path if path.is_dir() else path.parent

    def table(name):
        return json.loads((folder / name).read_text("utf-8")) if (folder / name).is_file() else {}

    def lines(name):  # not splitlines(): the Chinese vocabulary has a row that is U+2028
        return (folder / name).read_text("utf-8").removesuffix("\n").split("\n")
    fast, said = table("tokenizer.json"), table("tokenizer_config.json")
    alone = not any((folder / other).is_file() for other in (
        "config.json", "tokenizer_config.json", "vocab.txt", "vocab.json"))
    config = (rules_of(fast, said, alone) | table("config.json") | said
              | table("special_tokens_map.json"))
    added = {token["content"]: token["id"] for token in fast.get("added_tokens", [])}
    decoder = config.get("added_tokens_decoder", {}).values()
    config["added"] = [*table("added_tokens.json"), *added, *(x["content"] for x in decoder)]
    name = path.name
    if path.is_dir():
        names = "vocab.txt", "vocab.json", "tokenizer.json"
        name = next((x for x in names if (folder / x).is_file()), "vocab.txt")
    if name == "tokenizer.json":
        model, normalizer, cut = parts = [
            fast.get(key) or {} for key in ("model", "normalizer", "pre_tokenizer")]
        ids, merges = model["vocab"], model.get("merges", [])
        if "<|startoftext|>" in ids:
            return "bpe", ids, merges[:MERGE_COUNT], config
        kind = FAST[tuple(part.get("type") for part in parts)]
        return kind, ids, merges, {**model, **normalizer, **cut, **config}
    is_json = name.endswith(".json")
    ids = table(name) if is_json else {token: i for i, token in enumerate(lines(name))}
    if fast and fast["model"]["vocab"] | added != ids | added:
        raise ValueError(f"{name} and tokenizer.json have other ids; remove the wrong one")
    if not is_json:
        return "wordpiece", ids, [], config
    merges = [line for line in lines("merges.txt") if line]
    if merges and "#version" in merges[0]:  # that line can say more
        merges = merges[1:]
    kind = "bpe" if "<|startoftext|>" in ids else "bytebpe"
    merges = merges[:MERGE_COUNT] if kind == "bpe" else merges
    if fast and merges != [pair if isinstance(pair, str) else " ".join(pair)
                           for pair in fast["model"]["merges"]]:
        raise ValueError("merges.txt and tokenizer.json differ; remove the wrong one")
    return kind, ids, merges, config


def rules_of(fast, said, alone):
    """What a tokenizer.json says beside its vocabulary, by the names of tokenizer_config.json,
    whose table is `said`. ValueError where transformers would not do it, unless it is `alone`."""
    normalizer, last = fast.get("normalizer") or {}, fast.get("post_processor") or {}
    rules = {"do_lower_case": normalizer.get("lowercase"),
             "strip_accents": normalizer.get("strip_accents"),
             "tokenize_chinese_chars": normalizer.get("handle_chinese_chars")}
    defaults = dict.fromkeys(rules, True)  # of transformers
    defaults["strip_accents"] = said.get("do_lower_case") is not False
    for name, rule in rules.items():
        if not alone and said.get(name) is None and rule not in (None, defaults[name]):
            raise ValueError(f"tokenizer.json has {name} {rule} and tokenizer_config.json does not "
                             f"say it; write it there")
    ends = []  # the start and end that are put around a text
    for step in last.get("processors", [last]):
        if "single" in step:  # a template of one text
            ends += [x["SpecialToken"]["id"] for x in step["single"] if "SpecialToken" in x]
        else:
            ends += [step[end][0] for end in ("cls", "sep") if end in step]
    side = (fast.get("truncation") or {}).get("direction", "right").lower()
    return rules | {"ends": " ".join(ends), "truncation_side": side}


def open_tokenizer(path):
    """The tokenizer of `facts()`, or of a file or Hugging Face folder, of the kind that is found:
    vocab.txt: WordPiece, or Chinese-CLIP's beside such a model; vocab.json and merges.txt:
    byte-level BPE, or CLIP's; tokenizer.json: any; *.txt.gz: CLIP's. Raises TokenizerError."""
    if isinstance(path, dict):
        kinds = BPETokenizer, WordPieceTokenizer, ChineseTokenizer, ByteBPETokenizer
        facts, by_name = dict(path), {each.kind: each for each in kinds}
        try:
            return by_name[facts.pop("kind")](**facts)
        except (KeyError, TypeError):  # a checkpoint can hold anything
            raise TokenizerError("a checkpoint's vocabulary is of no known kind") from None
    if pathlib.Path(path).suffix == ".gz":
        return BPETokenizer(path)
    kind, ids, merges, config = read_vocabulary(path)
    if kind == "wordpiece":
        chinese = config.get("model_type") == "chinese_clip"
        return ChineseTokenizer(path) if chinese else WordPieceTokenizer(path)
    tokenizer = BPETokenizer() if kind == "bpe" else ByteBPETokenizer(path)
    if tokenizer.ids != ids or merges and list(tokenizer.ranks) != merges:
        raise TokenizerError(f"{path} repeats a merge, or differs from CLIP's vocabulary")
    return tokenizer


def for_model(model, path=None):
    """The tokenizer of the text tower of `model`, a `clip_model.CLIP`: of `path` if one is given;
    else what the model's file said of it; else what lies beside the tower's file, if transformers
    wrote that or the tower is a BERT; else CLIP's, for CLIP's own tower. TokenizerError when there
    is none, or one of another kind, with more tokens than the tower has or another padding."""
    origin = model.origin.get("text") or model.origin  # a CLIP of two towers has both
    place, size = path or model.vocabulary, model.config.vocab_size
    is_clips = model.text_kind == "bpe"
    if not place and origin.get("path") and (not is_clips or origin["layout"] == "hf"):
        folder = pathlib.Path(origin["path"]).parent
        place = folder if [*folder.glob("vocab.*"), *folder.glob("tokenizer.json")] else None
    if not place and not is_clips:
        raise TokenizerError(f"the text tower of {origin['name']} needs its {model.text_kind} "
                             f"vocabulary: name the folder with --tokenizer")
    place = place or {"kind": "bpe"}
    if not isinstance(place, dict) and (
            origin.get("layout") == "chinese_clip" or origin["name"].startswith("CN-")):
        tokenizer = ChineseTokenizer(place)
        rows = "\n".join(token or "" for token in tokenizer.tokens).encode("utf-8", "replace")
        if size == 21_128 and hashlib.sha256(rows).hexdigest() != CHINESE_SHA256:
            raise TokenizerError(f"{place} is not the vocabulary of Chinese-CLIP: ids would mean "
                                 f"other words; the package cn_clip has the right one")
    else:
        tokenizer = open_tokenizer(place)
    ours = tokenizer.text_kind, tokenizer.pad_id, tokenizer.vocab_size
    theirs = model.text_kind, model.pad_id, size
    if ours[:2] != theirs[:2] or ours[2] > theirs[2]:
        raise TokenizerError("the tokenizer {} is a {} with padding {} and {:,} tokens, the text "
                             "tower takes a {} with padding {} and {:,}; --tokenizer names another"
                             .format(path or "", *ours, *theirs))
    return tokenizer
