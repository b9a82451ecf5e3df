"""Text in, token ids out: CLIP's byte-pair encoding, BERT's WordPiece, RoBERTa's byte-level BPE.

| class              | text towers      | ids equal to                   |
|--------------------|------------------|--------------------------------|
| BPETokenizer       | CLIP's own       | OpenAI's SimpleTokenizer       |
| WordPieceTokenizer | BERT, DistilBERT | transformers' BertTokenizer    |
| ChineseTokenizer   | Chinese-CLIP     | Chinese-CLIP's own tokenizer   |
| ByteBPETokenizer   | RoBERTa          | transformers' RobertaTokenizer |

    tokenizer = BPETokenizer()       # or open_tokenizer(path), or for_model(model)
    tokenizer("a photo of a cat")    # LongTensor (1, 77)
    tokenizer.encode("a cat")        # [320, 2368]; `decode` goes back

CLIP (Radford et al. 2021). A caption is cleaned (mojibake repaired, HTML entities resolved twice,
white space folded, lower case), cut by a regular expression into pieces without white space, and
every piece is merged bottom-up from bytes (Sennrich et al. 2016):

1. Each UTF-8 byte is written as one printable character, so that the merge list can be a plain
   text file: 188 bytes are printable already, the other 68 borrow characters from U+0100 on.
2. The last character of a piece carries "</w>", so "cat" at the end of a word and "cat" inside
   "category" are different symbols.
3. Of all neighbouring pairs the one that stands first in the merge list is joined, wherever it
   occurs, until no neighbouring pair is in the list.

The vocabulary follows from the list: 256 bytes, the same 256 with "</w>", 48,894 merges, start of
text 49406, end of text 49407. Id 0 is the real token "!" and also the padding, so padding cannot
be told by value: what counts is the first end of text, the largest id there is.

RoBERTa (Liu et al. 2019, GPT-2's scheme). Steps 1 and 3 on the text as it is; the space before a
word belongs to its piece.

BERT (Devlin et al. 2019). Control characters are dropped, every ideograph and punctuation mark is
a word of its own, accents are stripped, letters are lower case; then the longest known beginning of
the word is taken off, and again from what is left, marked "##". A word that cannot be spelled so is
[UNK] as a whole.

Text never becomes a special token of BERT or RoBERTa ("[MASK]" is spelled out), as in transformers
with `split_special_tokens=True`. OpenAI's tokenizer takes its two from text, and so does ours.
"""
import functools
import gzip
import hashlib
import html
import json
import math
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
ALL_IDEOGRAPHS = IDEOGRAPH + r"\U0002b820-\U0002b91f"
WORDS = regex.compile(rf"[^{SPACE}]+")
WORDS_AND_IDEOGRAPHS = regex.compile(rf"[{IDEOGRAPH}]|[^{SPACE}{IDEOGRAPH}]+")
CHINESE_WORDS = regex.compile(rf"[{ALL_IDEOGRAPHS}]|[^{SPACE}{ALL_IDEOGRAPHS}]+")
MARK = r"!-/:-@\[-`{-~\p{P}"
MARKS_AND_REST = regex.compile(rf"[{MARK}]|[^{MARK}]+")
DROPPED = regex.compile(r"[\p{Cc}\p{Cf}\p{Co}\p{Cs}\ufffd]")
ACCENTS = regex.compile(r"\p{Mn}")
ASCII_MARKS = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


class TokenizerError(ValueError):
    """A vocabulary or a text that cannot be used; `exit_code` marks it as the user's to mend."""
    exit_code = 2


class Tokenizer:
    """What all kinds share: the cache, the tensor, the special ids.

    A kind cuts a text into chunks whose ids depend on nothing outside the chunk (`_chunks`) and
    finds the ids of one (`_encode_chunk`). Captions do not repeat, but their words do.
    """
    kind = text_kind = "bpe"  # text_kind: as `CLIP.text_kind` has it
    unknown_id = None         # the id of what cannot be spelled, where there is such a thing

    def __init__(self, ids, start, end, pad, merges=None):
        """ids: {symbol: id}; start, end and pad: three of the symbols; merges: pairs of symbols."""
        self.ids, self.symbols = ids, {i: symbol for symbol, i in ids.items()}
        self.start_id, self.end_id, self.pad_id = ids[start], ids[end], ids[pad]
        self.vocab_size = max(self.symbols) + 1
        self.tokens = [self.symbols.get(i) for i in range(self.vocab_size)]  # None: a hole
        self.ranks = merges and {pair: rank for rank, pair in enumerate(merges)}
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

    def __call__(self, texts, context_length=77, truncate=True):
        """Token ids of one text or a list of N texts: LongTensor (N, context_length).

        Start of text, the ids, end of text, then padding. A text that is too long is cut so that
        the end of text stays in the last place, and counted in `self.truncated`; with
        `truncate=False` it raises TokenizerError. `context_length=None` fits the longest text.
        """
        if context_length is not None and context_length < 2:
            raise TokenizerError(f"context_length is {context_length}; expected at least 2")
        most = math.inf if context_length is None else context_length - 2
        flat, lengths = [], []
        for text in [texts] if isinstance(texts, str) else texts:
            ids = self.encode(text)
            if len(ids) > most:
                if not truncate:
                    raise TokenizerError(f"a text has {len(ids) + 2} tokens and the model takes "
                                         f"{context_length}: {text[:60]!r}; shorten it")
                self.truncated += 1
                ids = ids[:most]
            flat += [self.start_id, *ids, self.end_id]
            lengths.append(len(ids) + 2)
        width = max(lengths, default=2) if context_length is None else context_length
        # The padding, five sixths of CLIP's tensor, never exists as Python numbers.
        tokens = torch.full((len(lengths), width), self.pad_id)
        used = torch.arange(width) < torch.tensor(lengths, dtype=torch.long)[:, None]
        return tokens.masked_scatter_(used, torch.tensor(flat, dtype=torch.long))

    def facts(self):
        """What `from_facts` needs to make this tokenizer again, as a dict of plain values."""
        return {"kind": self.kind, **self._made_of()}

    def _made_of(self):
        return {}  # CLIP's is always the same

    def save(self, folder):
        """Write the files that transformers reads; `theirs`: the class and settings it takes."""
        files = {"tokenizer_config.json": json.dumps(self.theirs, indent=2)}
        if self.ranks is None:
            files["vocab.txt"] = "\n".join([*(token or "" for token in self.tokens), ""])
        else:
            files["vocab.json"] = json.dumps(self.ids, ensure_ascii=False)
            files["merges.txt"] = "\n".join(["#version: 0.2", *map(" ".join, self.ranks), ""])
        for name, text in files.items():
            (pathlib.Path(folder) / name).write_text(text, "utf-8", newline="\n")

    def _symbols(self, ids, left_out):
        """The symbols of `ids` up to the first end of text, without the ids in `left_out`."""
        for i in map(int, ids):
            if i == self.end_id:
                return
            if i not in self.symbols:
                raise TokenizerError(f"token id {i} is outside the vocabulary (0 to "
                                     f"{self.vocab_size - 1})")
            if i not in left_out:
                yield self.symbols[i]


# ---------------------------------------------------------------------------- byte-pair encoding

@functools.lru_cache(maxsize=None)
def byte_characters():
    """The printable character of each byte, as a tuple of 256 strings (step 1 above)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]
    borrowed = iter(range(256, 512))
    return tuple(chr(b if b in printable else next(borrowed)) for b in range(256))


def from_byte_characters(text):
    """The text that these characters stand for; half a character becomes U+FFFD."""
    byte_of = {character: bytes([byte]) for byte, character in enumerate(byte_characters())}
    found = b"".join(byte_of.get(c) or c.encode("utf-8", "replace") for c in text)
    return found.decode("utf-8", errors="replace")


def merge(symbols, ranks):
    """Join the neighbours of the lowest rank, all of them left to right, until none has a rank.

    symbols: list[str]; ranks: {(left, right): rank} -> list[str]. A piece of more than
    LONGEST_PIECE symbols is merged in parts; where two meet, ids may differ from the official.
    """
    done = []
    for start in range(0, len(symbols), LONGEST_PIECE):
        part = symbols[start:start + LONGEST_PIECE]
        while len(part) > 1:
            found = [ranks.get(pair, math.inf) for pair in zip(part, part[1:])]
            lowest = min(found)
            if lowest == math.inf:
                break
            joined, i = [], 0
            while i < len(part):
                taken = 2 if i < len(found) and found[i] == lowest else 1
                joined.append("".join(part[i:i + taken]))
                i += taken
            part = joined
        done += part
    return done


def is_plain(text):
    """Printable ASCII without "&": nothing to repair or unescape, which is most of the time."""
    return text.isascii() and "&" not in text and text.replace("\n", " ").isprintable()


def clean(text):
    """What OpenAI's tokenizer sees of `text`: repaired, unescaped, single spaces, lower case."""
    if not is_plain(text):
        text = ACCENT_RUN.sub(lambda run: "".join(sorted(run[0], key=unicodedata.combining)), text)
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return regex.sub(r"\s+", " ", text.strip()).strip().lower()


class BPETokenizer(Tokenizer):
    """CLIP's tokenizer. `path`: a merge list in the place of the bundled one; TokenizerError when
    it is missing or is not CLIP's."""
    theirs = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77,
              "bos_token": "<|startoftext|>", **dict.fromkeys(
                  ["eos_token", "unk_token", "pad_token"], "<|endoftext|>")}

    def __init__(self, path=None):
        path = pathlib.Path(path or MERGES)
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                lines = file.read().split("\n")[1:MERGE_COUNT + 1]  # line 0 names the version
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise TokenizerError(f"cannot read the merge list {path} ({error}); expected CLIP's "
                                 f"bpe_simple_vocab_16e6.txt.gz, which lies in assets/") from None
        if hashlib.sha256("\n".join(lines).encode()).hexdigest() != MERGES_SHA256:
            raise TokenizerError(f"{path} is not CLIP's merge list: the {MERGE_COUNT:,} lines "
                                 f"after the first differ, and every id would")
        merges = [tuple(line.split()) for line in lines]
        # CLIP numbers the bytes by their printable character's place, not by their value.
        symbols = sorted(byte_characters())
        symbols += [symbol + "</w>" for symbol in symbols]
        symbols += ["".join(pair) for pair in merges] + ["<|startoftext|>", "<|endoftext|>"]
        super().__init__({symbol: i for i, symbol in enumerate(symbols)},
                         "<|startoftext|>", "<|endoftext|>", "!", merges)

    def _chunks(self, text):
        # No piece spans white space, so words are independent. All that cleaning does to plain
        # text is to fold spaces and lower case, which can wait until a word is new.
        return text.split() if is_plain(text) else clean(text).split(" ")

    def _encode_chunk(self, word):
        ids = []
        for piece in CLIP_PIECES.findall(word.lower()):  # cleaned words are lower case already
            if piece in ("<|startoftext|>", "<|endoftext|>"):
                ids.append(self.ids[piece])
            else:
                symbols = [byte_characters()[b] for b in piece.encode()]
                symbols[-1] += "</w>"
                ids += [self.ids[symbol] for symbol in merge(symbols, self.ranks)]
        return ids

    def decode(self, ids):
        """The text of `ids` up to the end of text, as `clean` left it, with a space after every
        piece ("don 't"). Raises TokenizerError on an id outside the vocabulary."""
        symbols = self._symbols(ids, {self.start_id})
        return from_byte_characters("".join(symbols).replace("</w>", " ")).strip()


class ByteBPETokenizer(Tokenizer):
    """RoBERTa's tokenizer: of a vocab.json and a merges.txt, of a tokenizer.json, of a Hugging Face
    folder with them, or of the tokens and the merges ("a b") themselves. TokenizerError when a file
    is missing, damaged or of another kind, or a byte or a merge has no id."""
    kind = text_kind = "bytebpe"
    theirs = {"tokenizer_class": "RobertaTokenizer"}

    def __init__(self, vocab, merges=None):
        _, ids, merges, _ = _read(vocab, self.kind, merges)
        super().__init__(ids, "<s>", "</s>", "<pad>", merges)

    def _chunks(self, text):
        return BYTE_PIECES.findall(text)

    def _encode_chunk(self, piece):
        symbols = [byte_characters()[b] for b in piece.encode("utf-8", errors="replace")]
        return [self.ids[symbol] for symbol in merge(symbols, self.ranks)]

    def decode(self, ids):
        """The text of `ids` up to the end, exactly. TokenizerError on an id outside."""
        return from_byte_characters("".join(self._symbols(ids, {self.start_id, self.pad_id})))

    def _made_of(self):
        return {"vocab": self.tokens, "merges": [" ".join(pair) for pair in self.ranks]}


# ------------------------------------------------------------------------------------- WordPiece

class WordPieceTokenizer(Tokenizer):
    """BERT's tokenizer: of a vocab.txt or a tokenizer.json, of a Hugging Face folder with one of
    them, or of the list of tokens. TokenizerError when a file is missing or of another kind.

    What is given wins over what the folder says. Where nothing is said, letters are lowered unless
    the vocabulary has capitals, accents are stripped if letters are lowered, ideographs are split,
    and a word of more than 100 characters is [UNK].
    """
    kind = text_kind = "wordpiece"

    def __init__(self, vocab, lowercase=None, strip_accents=None, split=None, longest_word=None):
        _, ids, _, config = _read(vocab, self.text_kind)
        super().__init__(ids, "[CLS]", "[SEP]", "[PAD]")

        def rule(given, name, default):
            return next(x for x in (given, config.get(name), default) if x is not None)
        capitals = sum(token[:1].isupper() for token in ids)  # a handful are special tokens
        self.lowercase = rule(lowercase, "do_lower_case", capitals <= 100)
        self.strip_accents = rule(strip_accents, "strip_accents", self.lowercase)
        self.split = rule(split, "tokenize_chinese_chars", True)
        self.longest_word = rule(longest_word, "max_input_chars_per_word", 100)
        self.words = WORDS_AND_IDEOGRAPHS if self.split else WORDS
        self.unknown_id, self.longest_token = ids["[UNK]"], max(map(len, ids))

    @property
    def theirs(self):
        return {"tokenizer_class": "BertTokenizer", "do_lower_case": self.lowercase,
                "strip_accents": self.strip_accents, "tokenize_chinese_chars": self.split}

    def _chunks(self, text):
        # All that follows works on characters or between two spaces, so it can come after this.
        return self.words.findall(text)

    def _encode_chunk(self, chunk):
        chunk = DROPPED.sub("", chunk)
        if self.strip_accents:
            # One by one: normalize() takes O(n^2) for a run of n accents, and lower() knows the
            # final sigma, which transformers does not.
            chunk = ACCENTS.sub("", "".join(unicodedata.normalize("NFD", c) for c in chunk))
        if self.lowercase:
            chunk = "".join(map(str.lower, chunk))
        return [i for word in MARKS_AND_REST.findall(chunk) for i in self._encode_word(word)]

    def _encode_word(self, word):
        if len(word) > self.longest_word:
            return [self.unknown_id]
        ids, start = [], 0
        while start < len(word):
            mark = "##" if start else ""
            for end in range(min(len(word), start + self.longest_token), start, -1):
                found = self.ids.get(mark + word[start:end])
                if found is not None:
                    break
            else:
                return [self.unknown_id]
            ids.append(found)
            start = end
        return ids

    def decode(self, ids):
        """The words of `ids` up to the end, parted by spaces; an unknown word is "[UNK]". Case and
        accents are gone. Raises TokenizerError on an id outside the vocabulary."""
        return " ".join(self._symbols(ids, {self.start_id, self.pad_id})).replace(" ##", "")

    def _made_of(self):
        return {"vocab": self.tokens, "lowercase": self.lowercase, "split": self.split,
                "strip_accents": self.strip_accents, "longest_word": self.longest_word}


class ChineseTokenizer(WordPieceTokenizer):
    """Chinese-CLIP's tokenizer: the ids of its own code, which is Google's BERT of 2018.

    Different from transformers' BertTokenizer, seldom and on purpose: characters of private use,
    lone surrogates and words of 101 to 200 characters count, all ideographs stand alone, and the
    final sigma is known. What is punctuation or an accent is up to this Python's Unicode, as there.

    TokenizerError if the vocabulary is not the one that all released models share, unless
    `any_vocab`: with another one every id means another word. `straight_quotes`: curly quotes,
    which are not in the vocabulary, become \", and the text lower case before all else, as the
    authors do in training and evaluation and not in their `tokenize`.
    """
    kind = "chinese"

    def __init__(self, vocab, straight_quotes=True, any_vocab=False):
        super().__init__(vocab, lowercase=True, strip_accents=True, split=True, longest_word=200)
        self.words, self.straight_quotes = CHINESE_WORDS, straight_quotes
        tokens = "\n".join(token or "" for token in self.tokens).encode("utf-8", "replace")
        if hashlib.sha256(tokens).hexdigest() != CHINESE_SHA256 and not any_vocab:
            raise TokenizerError(f"{str(vocab)[:200]} is not the vocabulary of Chinese-CLIP "
                                 f"(21,128 tokens, those of bert-base-chinese): every id would be "
                                 f"another word. For a model of your own, say any_vocab=True")

    def __call__(self, texts, context_length=52, truncate=True):
        return super().__call__(texts, context_length, truncate)

    def _chunks(self, text):
        if self.straight_quotes:
            text = text.lower().replace("\u201c", '"').replace("\u201d", '"')
        return self.words.findall(text)

    def _encode_chunk(self, chunk):
        category, words = unicodedata.category, [""]
        chunk = "".join(c for c in chunk if c != "\ufffd" and category(c) not in ("Cc", "Cf"))
        # Lower case as a whole, for the final sigma; NFD one by one, for its speed.
        for c in "".join(unicodedata.normalize("NFD", c) for c in chunk.lower()):
            if c in ASCII_MARKS or category(c)[0] == "P":
                words += [c, ""]
            elif category(c) != "Mn":
                words[-1] += c
        return [i for word in words for i in self._encode_word(word)]

    def _made_of(self):
        return {"vocab": self.tokens, "straight_quotes": self.straight_quotes, "any_vocab": True}


# ----------------------------------------------------------------------- vocabularies from files

NEEDED = {"wordpiece": ("[PAD]", "[UNK]", "[CLS]", "[SEP]"),
          "bytebpe": ("<s>", "<pad>", "</s>", *byte_characters())}
FAST = {  # model, normalizer and pre_tokenizer of a tokenizer.json
    ("WordPiece", "BertNormalizer", "BertPreTokenizer"): "wordpiece",
    ("BPE", None, "ByteLevel"): "bytebpe"}
# Settings of Hugging Face's files that change ids, with the value that is known here.
ALWAYS = {"clean_text": True, "do_basic_tokenize": True, "use_regex": True, "never_split": None,
          "add_prefix_space": False, "byte_fallback": False, "ignore_merges": False,
          "dropout": None, "continuing_subword_prefix": "##", "end_of_word_suffix": ""}
CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "RobertaTokenizer",
           "BartTokenizer", "CLIPTokenizer", "PreTrainedTokenizer", "TokenizersBackend")


def _content(path):
    """A .json file as a dict, another one as its list of lines."""
    try:
        text = path.read_text("utf-8")
        # Not splitlines(): the Chinese vocabulary has a row that is a line separator, U+2028.
        lines = text.removesuffix("\n").split("\n")
        content = json.loads(text) if path.suffix == ".json" else lines
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"cannot read {path} ({error}); expected a vocabulary as Hugging Face "
                             f"saves it") from None
    if path.suffix == ".json" and not isinstance(content, dict):
        raise TokenizerError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def _read_files(path, merges=None):
    """-> the file read, kind, {token: id}, merges as listed, config by transformers' names."""
    folder, config, added = path if path.is_dir() else path.parent, {}, []
    if path.is_dir():
        names = ["vocab.txt", *["vocab.json"] * (path / "merges.txt").is_file(), "tokenizer.json"]
        path = next((path / name for name in names if (path / name).is_file()), path)
    if path.suffix not in (".txt", ".json"):
        raise TokenizerError(f"no tokenizer in {path}; expected vocab.txt, vocab.json and "
                             f"merges.txt, or tokenizer.json, as Hugging Face saves them")
    content = _content(path)
    if path.suffix == ".txt":
        kind, ids = "wordpiece", {line: i for i, line in enumerate(content)}
    elif path.name != "tokenizer.json":
        kind, ids = "bytebpe", content
        lines = _content(pathlib.Path(merges or folder / "merges.txt"))
        merges = [line for line in lines if line and not line.startswith("#version")]
    else:
        parts = [content[name] if isinstance(content.get(name), dict) else {}
                 for name in ("model", "normalizer", "pre_tokenizer")]
        model, normalizer, cut = parts
        kind, ids = FAST.get(tuple(part.get("type") for part in parts)), model.get("vocab")
        merges, added = model.get("merges"), content.get("added_tokens") or []
        config = {**model, **normalizer, **cut, "do_lower_case": normalizer.get("lowercase"),
                  "tokenize_chinese_chars": normalizer.get("handle_chinese_chars")}
    if isinstance(ids, dict) and "<|startoftext|>" in ids:
        return path, "bpe", ids, None, {}  # its ids are compared with CLIP's
    beside = [_content(folder / name) if (folder / name).is_file() else {}
              for name in ("tokenizer_config.json", "added_tokens.json", "config.json")]
    config |= beside[0]
    odd = [f"{name} {config[name]}" for name, known in ALWAYS.items()
           if config.get(name) not in (None, known, "", [])]
    odd += [f"the added token {token}" for token in (*beside[1], *(
        token.get("content") for token in added if not token.get("special"))) if token not in ids]
    made_by = str(config.get("tokenizer_class", "BertTokenizer")).removesuffix("Fast")
    odd += [f"tokenizer_class {made_by}"] * (made_by not in CLASSES)
    if odd or kind is None:
        raise TokenizerError(f"{path} is no tokenizer of CLIP, BERT or RoBERTa as they were "
                             f"released{': ' if odd else ''}{', '.join(odd[:3])}")
    if kind == "wordpiece" and beside[2].get("model_type") == "chinese_clip":
        kind = "chinese"
    return path, kind, ids, merges, config


def _read(vocab, wanted=None, merges=None):
    """-> kind, {token: id}, merges as pairs of tokens or None, config by transformers' names.

    vocab: vocab.txt, vocab.json (with the file `merges`, or merges.txt beside it), tokenizer.json,
    a folder with them, or the list of tokens (with the list of `merges`). Raises TokenizerError.
    """
    if isinstance(vocab, (list, tuple)):
        path, kind, config = "this vocabulary", wanted, {}
        ids = {token: i for i, token in enumerate(vocab) if token is not None}
    else:
        path, kind, ids, merges, config = _read_files(pathlib.Path(vocab).expanduser(), merges)
    if wanted and wanted != kind.replace("chinese", "wordpiece"):
        raise TokenizerError(f"{path} is a vocabulary of {kind}; expected {wanted}")
    values = list(ids.values()) if isinstance(ids, dict) else [None]
    if not all(type(i) is int and i >= 0 for i in values) or len(set(values)) < len(values) or (
            not all(isinstance(token, str) for token in ids)):
        raise TokenizerError(f"{path} is damaged: expected a different id of 0 or more for every "
                             f"token; fetch it again")
    missing = [token for token in NEEDED.get(kind, ()) if token not in ids]
    if missing or kind == "bytebpe" and not isinstance(merges, (list, tuple)):
        raise TokenizerError(f"{path} lacks {' '.join(missing[:5]) or 'its merges'}, which a "
                             f"vocabulary of {kind} has")
    if kind != "bytebpe":
        return kind, ids, None, config
    pairs = [tuple(map(str, pair)) if isinstance(pair, list) else tuple(str(pair).split(" "))
             for pair in merges]
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys():
            raise TokenizerError(f"the merge {' '.join(pair)[:60]!r} does not fit {path}; expected "
                                 f"two tokens that join to a third")
    return kind, ids, pairs, config


# --------------------------------------------------------------------------- the right tokenizer

KINDS = {kind.kind: kind for kind in (BPETokenizer, WordPieceTokenizer, ChineseTokenizer,
                                      ByteBPETokenizer)}


def from_facts(facts):
    """A tokenizer again from its `facts()`. Raises TokenizerError."""
    facts = dict(facts)
    try:
        return KINDS[facts.pop("kind")](**facts)
    except (KeyError, TypeError) as error:  # a checkpoint can hold anything
        raise TokenizerError(f"a checkpoint's vocabulary is of no known kind ({error})") from None


def open_tokenizer(path):
    """The tokenizer of a file or a Hugging Face folder, of the kind that its files show.

    vocab.txt: WordPiece, or Chinese-CLIP's beside such a model; vocab.json and merges.txt:
    byte-level BPE, or CLIP's, which Hugging Face saves under the same names; tokenizer.json: any
    of them; *.txt.gz: CLIP's merge list; also `facts()`. Raises TokenizerError.
    """
    if isinstance(path, dict):
        return from_facts(path)
    if pathlib.Path(path).suffix == ".gz":
        return BPETokenizer(path)
    kind, ids, _, _ = _read(path)
    if kind == "chinese":
        return ChineseTokenizer(path, any_vocab=True)
    if kind != "bpe":
        return KINDS[kind](path)
    tokenizer = BPETokenizer()
    if tokenizer.ids != ids:
        raise TokenizerError(f"{path} looks like CLIP's vocabulary and differs from it")
    return tokenizer


def for_model(model, path=None):
    """The tokenizer of the text tower of `model`, a `clip_model.CLIP`.

    Of `path` if one is given; else what the model's file said of it; else CLIP's for CLIP's own
    tower; else what lies in or beside the model's file. Raises TokenizerError when there is none,
    or it is not of this tower: another kind, more tokens than the tower has, another padding.
    """
    origin = model.origin or {}
    chinese = origin.get("layout") == "chinese_clip" or str(origin.get("name")).startswith("CN-")
    place = path or model.vocabulary or ({"kind": "bpe"} if model.text_kind == "bpe" else None)
    if place is None and origin.get("path"):
        home = pathlib.Path(origin["path"])
        home = home if home.is_dir() else home.parent
        files = [home / name for name in ("vocab.txt", "vocab.json", "tokenizer.json")]
        place = home if any(file.is_file() for file in files) else None
    if place is None:
        raise TokenizerError(f"the text tower of {origin.get('name') or 'this model'} needs its "
                             f"{model.text_kind} vocabulary; name its folder with --tokenizer" + (
                                 " (the package cn_clip has it in clip/)" if chinese else ""))
    if chinese and not isinstance(place, dict):
        tokenizer = ChineseTokenizer(place, any_vocab=model.config.vocab_size != 21_128)
    else:
        tokenizer = open_tokenizer(place)
    found, needed = tokenizer.text_kind, model.text_kind
    if found != needed or tokenizer.vocab_size > model.config.vocab_size:
        raise TokenizerError(f"the tokenizer {path or ''} is a {found} of {tokenizer.vocab_size:,} "
                             f"tokens and the text tower takes a {needed} of "
                             f"{model.config.vocab_size:,}; name its own with --tokenizer")
    if model.pad_id is not None and tokenizer.pad_id != model.pad_id:
        raise TokenizerError(f"the tokenizer {path or ''} pads with id {tokenizer.pad_id} and the "
                             f"text tower takes {model.pad_id} for padding")
    return tokenizer
