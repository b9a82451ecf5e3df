"""Text in, token ids out: CLIP's byte-pair encoding, BERT's WordPiece, RoBERTa's byte-level BPE.

| class              | text towers                    | ids equal to                   |
|--------------------|--------------------------------|--------------------------------|
| BPETokenizer       | CLIP's own                     | OpenAI's SimpleTokenizer       |
| WordPieceTokenizer | BERT, DistilBERT               | transformers' BertTokenizer    |
| ChineseTokenizer   | Chinese-CLIP                   | Chinese-CLIP's own tokenizer   |
| ByteBPETokenizer   | RoBERTa                        | transformers' RobertaTokenizer |

All have `encode(text)`, `decode(ids)`, `tokenizer(texts)`, `statistics(texts)`, `start_id`,
`end_id`, `pad_id`, `vocab_size` and `truncated`; `open_tokenizer(path)` picks the class by the
files that it finds, or by the `vocabulary` that a checkpoint carries.

CLIP (Radford et al. 2021). A caption is cleaned (mojibake repaired, HTML entities resolved twice,
white space folded, lower case), cut by a regular expression into pieces that never span white
space, and every piece is merged bottom-up from bytes:

1. Each UTF-8 byte is written as one printable character, so that the merge list can be a plain
   text file: 188 bytes are printable already and stand for themselves, the other 68 borrow the
   characters from U+0100 on. A space becomes U+0120, for instance.
2. The last character of a piece carries "</w>", so "cat" at the end of a word and "cat" inside
   "category" are different symbols.
3. Of all neighbouring pairs the one that stands first in the merge list is joined, wherever it
   occurs, until no neighbouring pair is in the list.

The vocabulary follows from the list: 256 bytes, the same 256 with "</w>", 48,894 merges, start of
text 49406, end of text 49407. Id 0 is the real token "!", and it is also the padding, so padding
cannot be told by value: what counts is the first end of text, which is the largest id there is.

RoBERTa (Liu et al. 2019, GPT-2's scheme). Steps 1 and 3 on the text as it is: case is kept and
nothing is repaired, and the space before a word belongs to the word's piece.

BERT (Devlin et al. 2019). Control characters are dropped, every ideograph and punctuation mark is
a word of its own, accents are stripped, letters are lower case; then the longest known beginning of
the word is taken off, and again from what is left, marked "##". A word that cannot be spelled so is
[UNK] as a whole.

Text never becomes a special token of BERT or RoBERTa: "[MASK]" and "<mask>" in a caption are
spelled out, as in transformers with `split_special_tokens=True`; without that it gives their ids.
OpenAI's tokenizer does take its two special strings from text, and so does ours.

Nothing is read at import and there is no global instance.
"""
import functools
import gzip
import hashlib
import heapq
import html
import json
import pathlib
import unicodedata
import zlib

import ftfy
import regex
import torch

MERGES = pathlib.Path(__file__).resolve().parent / "assets" / "bpe_simple_vocab_16e6.txt.gz"
MERGE_COUNT = 48_894  # the file goes on to 262,145 merges; CLIP uses the first of them
MERGES_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"  # of those lines

PIECES = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE)
BYTE_PIECES = regex.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

# Unicode's normal form orders such a run by class, and ftfy's way to it takes O(n^2): minutes for a
# megabyte. In order already it takes O(n).
ACCENT_RUN = regex.compile(r"[^\p{ccc=0}]{100,}")

# BERT's character classes as transformers has them: U+2B820 to U+2B91F are missing among its
# ideographs. Characters newer than Unicode 8 can fall into other classes there than here.
SPACE = r"\t\n\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
IDEOGRAPH = (r"\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b81f"
             r"\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f")
MARK = r"!-/:-@\[-`{-~\p{P}"
WORDS = regex.compile(rf"[^{SPACE}]+")
WORDS_AND_IDEOGRAPHS = regex.compile(rf"[{IDEOGRAPH}]|[^{SPACE}{IDEOGRAPH}]+")
PUNCTUATED = regex.compile(rf"[{MARK}]|[^{MARK}]+")
DROPPED = regex.compile(r"[\p{Cc}\p{Cf}\p{Co}\p{Cs}\ufffd]")
ACCENTS = regex.compile(r"\p{Mn}")

CACHED_LENGTH = 64  # a longer run without a space is not a word that comes again
CACHED_CHUNKS = 1_000_000


class TokenizerError(ValueError):
    """A vocabulary file or text that cannot be used; `exit_code` marks it as the user's to fix."""
    exit_code = 2


class Tokenizer:
    """What the three kinds share: the cache, the tensor, the special ids.

    A kind cuts a text into chunks whose ids depend on nothing outside the chunk (`_chunks`) and
    finds the ids of one (`_encode_chunk`). Captions do not repeat, but their words do.
    """
    text_kind = "bpe"    # as in `CLIP.text_kind`
    unknown_id = None    # the id of what cannot be spelled, where there is such a thing
    vocabulary = None    # plain values to put into a checkpoint; `open_tokenizer` takes them back

    def __init__(self, ids, start, end, pad):
        self.ids = ids  # symbol -> id
        self.symbols = {i: symbol for symbol, i in ids.items()}
        self.start_id, self.end_id, self.pad_id = ids[start], ids[end], ids[pad]
        self.vocab_size = max(self.symbols) + 1
        self.truncated = 0
        self._cache = {}  # chunk -> ids

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
        `truncate=False` it raises TokenizerError instead. `context_length=None` is the length of
        the longest of the texts.
        """
        if context_length is not None and context_length < 2:
            raise TokenizerError(f"context_length is {context_length}; start and end of text alone "
                                 f"need 2")
        texts = [texts] if isinstance(texts, str) else list(texts)
        flat, lengths = [], []
        for text in texts:
            ids = self.encode(text)
            if context_length is not None and len(ids) > context_length - 2:
                if not truncate:
                    raise TokenizerError(f"a text has {len(ids) + 2} tokens and the model takes "
                                         f"{context_length}: {text[:60]!r}; shorten it or allow "
                                         f"truncation")
                self.truncated += 1
                ids = ids[:context_length - 2]
            flat += [self.start_id, *ids, self.end_id]
            lengths.append(len(ids) + 2)
        if context_length is None:
            context_length = max(lengths, default=2)
        # The padding, five sixths of CLIP's tensor, never exists as Python numbers.
        tokens = torch.full((len(texts), context_length), self.pad_id)
        used = torch.arange(context_length) < torch.tensor(lengths, dtype=torch.long)[:, None]
        return tokens.masked_scatter_(used, torch.tensor(flat, dtype=torch.long))

    def statistics(self, texts, context_length):
        """What of `texts` a tower of so many positions gets, as a dict of numbers: texts; tokens,
        without start and end; longest, of one text with both; truncated, how many texts are over
        `context_length`; unknown, how many tokens stand for something that cannot be spelled."""
        ids = [self.encode(text) for text in texts]
        lengths = [len(row) + 2 for row in ids]
        return {"texts": len(ids), "tokens": sum(map(len, ids)), "longest": max(lengths, default=2),
                "truncated": sum(length > context_length for length in lengths),
                "unknown": sum(row.count(self.unknown_id) for row in ids)}

    def _symbols(self, ids, left_out):
        """The symbols of `ids` up to the first end of text, without the ids in `left_out`."""
        for i in map(int, ids):
            if i == self.end_id:
                return
            if i in left_out:
                continue
            if i not in self.symbols:
                raise TokenizerError(f"token id {i} is outside the vocabulary (0 to "
                                     f"{self.vocab_size - 1})")
            yield self.symbols[i]


@functools.lru_cache(maxsize=None)
def byte_characters():
    """The printable character of each byte, as a tuple of 256 strings (step 1 above)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]
    borrowed = iter(range(256, 512))
    return tuple(chr(b if b in printable else next(borrowed)) for b in range(256))


@functools.lru_cache(maxsize=None)
def character_bytes():
    """byte_characters() the other way: {character: one byte}."""
    return {character: bytes([byte]) for byte, character in enumerate(byte_characters())}


def from_byte_characters(text):
    """The bytes that `text` stands for; a character that stands for none is itself."""
    return b"".join(character_bytes().get(c) or c.encode("utf-8", "replace") for c in text)


def merge_pairs(symbols, ranks):
    """Join the symbols of one piece by rank: list[str] -> list[str], in O(n log n).

    The textbook loop looks at every pair again after each merge, which is quadratic: hours for
    a megabyte without a space. Here a heap holds the mergeable pairs and a linked list the
    symbols. All pairs of one rank are joined left to right before the next rank is looked at,
    as in OpenAI's loop: pairs that come into being meanwhile wait for the next round.
    """
    count = len(symbols)
    following = list(range(1, count + 1))
    previous = list(range(-1, count - 1))
    heap = []

    def offer(left):
        right = following[left]
        if right < count:
            rank = ranks.get((symbols[left], symbols[right]))
            if rank is not None:
                heapq.heappush(heap, (rank, left, symbols[left], symbols[right]))

    for left in range(count - 1):
        offer(left)
    while heap:
        rank, joined = heap[0][0], []
        while heap and heap[0][0] == rank:
            _, left, first, second = heapq.heappop(heap)
            right = following[left]
            if right == count or symbols[left] != first or symbols[right] != second:
                continue  # one of the two was joined to something else since
            symbols[left], symbols[right] = first + second, None
            following[left] = following[right]
            if following[right] < count:
                previous[following[right]] = left
            joined.append(left)
        for left in joined:
            offer(left)
            if previous[left] >= 0:
                offer(previous[left])
    return [symbol for symbol in symbols if symbol is not None]


# ------------------------------------------------------------------------------------------ CLIP

def in_order(text):
    """`text` with its long runs of accents as Unicode's normal form orders them."""
    return ACCENT_RUN.sub(lambda run: "".join(sorted(run[0], key=unicodedata.combining)), text)


def is_plain(text):
    """Printable ASCII without "&": nothing to repair or unescape, which is most of the time."""
    return text.isascii() and "&" not in text and text.replace("\n", " ").isprintable()


def clean(text):
    """What OpenAI's tokenizer sees of `text`: repaired, unescaped, single spaces, lower case."""
    if not is_plain(text):
        text = in_order(text)
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return regex.sub(r"\s+", " ", text.strip()).strip().lower()


class BPETokenizer(Tokenizer):
    """CLIP's tokenizer.

    `tokenizer(texts)` gives the (N, 77) ids that a text tower takes. `tokenizer.truncated` counts
    the texts that had to be cut since the tokenizer was made. Raises TokenizerError when the merge
    list is missing or is not CLIP's.
    """
    start_id, end_id, pad_id, vocab_size = 49_406, 49_407, 0, 49_408

    def __init__(self, path=None):
        path = pathlib.Path(path or MERGES)
        try:
            with gzip.open(path, "rt", encoding="utf-8") as file:
                lines = file.read().split("\n")[1:MERGE_COUNT + 1]  # line 0 names the version
        except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
            raise TokenizerError(f"cannot read the merge list {path} ({error}); expected CLIP's "
                                 f"bpe_simple_vocab_16e6.txt.gz, which this project keeps in "
                                 f"assets/") from None
        merges = [tuple(line.split()) for line in lines]
        if hashlib.sha256("\n".join(lines).encode()).hexdigest() != MERGES_SHA256:
            raise TokenizerError(f"{path} is not CLIP's merge list: the {MERGE_COUNT:,} lines "
                                 f"after the first differ, and every id would")
        # CLIP numbers the bytes by their printable character's place, not by their value.
        symbols = sorted(byte_characters())
        symbols += [symbol + "</w>" for symbol in symbols]
        symbols += ["".join(merge) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
        super().__init__({symbol: i for i, symbol in enumerate(symbols)},
                         "<|startoftext|>", "<|endoftext|>", "!")
        self.ranks = {merge: rank for rank, merge in enumerate(merges)}

    def _chunks(self, text):
        # No piece spans white space, so words are independent. All that cleaning does to plain
        # text is to fold spaces and lower case, which can wait until a word is new.
        return text.split() if is_plain(text) else clean(text).split(" ")

    def _encode_chunk(self, word):
        ids = []
        for piece in PIECES.findall(word.lower()):  # cleaned words are lower case already
            if piece in ("<|startoftext|>", "<|endoftext|>"):
                ids.append(self.ids[piece])
            else:
                symbols = [byte_characters()[b] for b in piece.encode()]
                symbols[-1] += "</w>"
                ids += [self.ids[symbol] for symbol in merge_pairs(symbols, self.ranks)]
        return ids

    def decode(self, ids):
        """The text of `ids`; start, end and everything after the first end are left out.

        White space and case were folded by `encode`, so this is the cleaned text, with a space
        after every piece ("don 't"). Raises TokenizerError on an id outside the vocabulary.
        """
        out = bytearray()
        for symbol in self._symbols(ids, left_out={self.start_id}):
            ends = symbol.endswith("</w>")
            out += from_byte_characters(symbol[:-4] if ends else symbol) + b" " * ends
        return out.decode("utf-8", errors="replace").strip()


# ----------------------------------------------------------------------- vocabularies from files

def read_text(path):
    try:
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"cannot read {path} ({error}); expected a vocabulary in UTF-8, as "
                             f"Hugging Face saves it") from None


def read_json(path):
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def read_tokenizer_json(path, **expected):
    """The content of a tokenizer.json, whose parts must have the `expected` types."""
    content = read_json(path)
    for part, kind in expected.items():
        if not isinstance(content.get(part), dict) or content[part].get("type") != kind:
            raise TokenizerError(f"{path} has another {part} than {kind}; expected BERT's or "
                                 f"RoBERTa's tokenizer")
    return content


def find_files(path, *names):
    """(files, config): of a folder `names` or else tokenizer.json, and its tokenizer_config.json."""
    if not path.is_dir():
        return [path], {}  # a file is meant as it is
    config = path / "tokenizer_config.json"
    config = read_json(config) if config.exists() else {}
    for choice in (names, ("tokenizer.json",)):
        if all((path / name).is_file() for name in choice):
            return [path / name for name in choice], config
    raise TokenizerError(f"{path} has neither {' and '.join(names)} nor tokenizer.json")


def check_vocabulary(path, ids, needed):
    """Raises TokenizerError unless `ids` maps text to distinct ids and has all the `needed`."""
    values = list(ids.values()) if isinstance(ids, dict) else [None]
    if not all(type(i) is int and i >= 0 for i in values) or len(set(values)) < len(values):
        raise TokenizerError(f"{path} is damaged: expected a different id of 0 or more for every "
                             f"token; fetch it again")
    missing = [token for token in needed if token not in ids]
    if missing:
        raise TokenizerError(f"{path} lacks {' '.join(missing[:5])} of the {len(needed)} tokens "
                             f"that this kind of vocabulary needs")


# ------------------------------------------------------------------------------------------ BERT

def read_wordpiece(path):
    """(token -> id, settings by their names in tokenizer_config.json, the file read). In the place
    of a path, a list of tokens in the order of their ids will do."""
    if isinstance(path, (list, tuple)):
        if not all(isinstance(token, str) for token in path):
            raise TokenizerError("a vocabulary of something else than text; expected its tokens")
        return {token: i for i, token in enumerate(path)}, {}, "the vocabulary of a checkpoint"
    (path,), config = find_files(path, "vocab.txt")
    if path.suffix != ".json":
        # Not splitlines(): the Chinese vocabulary has a row that is a line separator, U+2028.
        lines = read_text(path).removesuffix("\n").split("\n")
        return {line: i for i, line in enumerate(lines)}, config, path
    content = read_tokenizer_json(path, model="WordPiece", normalizer="BertNormalizer",
                                  pre_tokenizer="BertPreTokenizer")
    model, normalizer = content["model"], content["normalizer"]
    if model.get("continuing_subword_prefix") != "##" or normalizer.get("clean_text") is not True:
        raise TokenizerError(f"{path} is not BERT's: expected clean_text and the prefix '##'")
    config = {"do_lower_case": normalizer.get("lowercase"),
              "strip_accents": normalizer.get("strip_accents"),
              "tokenize_chinese_chars": normalizer.get("handle_chinese_chars")} | config
    return model.get("vocab"), config, path


class WordPieceTokenizer(Tokenizer):
    """BERT's tokenizer, of a vocab.txt, a tokenizer.json or a Hugging Face folder with one of them.

    Where the folder does not say otherwise, letters are lowered, accents stripped if letters are
    lowered, and ideographs split; `lowercase` wins over the folder. A word of more than
    `longest_word` characters is [UNK]: transformers has 100, Chinese-CLIP's own tokenizer 200.
    `vocab` can also be the list of tokens. Raises TokenizerError when a file is missing, damaged
    or of another kind.
    """
    text_kind = "wordpiece"

    def __init__(self, vocab, lowercase=None, longest_word=100):
        ids, config, path = read_wordpiece(vocab if isinstance(vocab, (list, tuple)) else
                                           pathlib.Path(vocab))
        check_vocabulary(path, ids, ["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
        super().__init__(ids, "[CLS]", "[SEP]", "[PAD]")
        if lowercase is None:
            lowercase = config.get("do_lower_case") is not False
        strip, split = config.get("strip_accents"), config.get("tokenize_chinese_chars")
        self.lowercase, self.strip_accents = lowercase, lowercase if strip is None else strip
        self.words = WORDS if split is False else WORDS_AND_IDEOGRAPHS
        self.split, self.unknown_id = split is not False, ids["[UNK]"]
        self.longest_word, self.longest_symbol = longest_word, max(map(len, ids))

    @property
    def vocabulary(self):
        """The tokens in the order of their ids, and the rules, as plain values. None if an id has
        no token."""
        tokens = [self.symbols.get(i) for i in range(self.vocab_size)]
        return None if None in tokens else {
            "kind": "wordpiece", "tokens": tokens, "lowercase": self.lowercase,
            "strip_accents": self.strip_accents, "split": self.split,
            "longest_word": self.longest_word}

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
        return [i for word in PUNCTUATED.findall(chunk) for i in self._encode_word(word)]

    def _encode_word(self, word):
        if len(word) > self.longest_word:
            return [self.unknown_id]
        ids, start = [], 0
        while start < len(word):
            mark = "##" if start else ""
            for end in range(min(len(word), start + self.longest_symbol), start, -1):
                found = self.ids.get(mark + word[start:end])
                if found is not None:
                    break
            else:
                return [self.unknown_id]
            ids.append(found)
            start = end
        return ids

    def decode(self, ids):
        """The words of `ids`, parted by spaces; start, padding and all after the end are left out.

        Case, accents and what stood between the words are gone, and an unknown word is "[UNK]".
        Raises TokenizerError on an id outside the vocabulary.
        """
        return " ".join(self._symbols(ids, {self.start_id, self.pad_id})).replace(" ##", "")


CHINESE_SHA256 = "8550a78ca2dd304e6a4b45baa9780db8a93cfacc564b4d1c319905db0122f1e4"  # of the rows
ALL_IDEOGRAPHS = IDEOGRAPH + r"\U0002b820-\U0002b91f"
CHINESE_WORDS = regex.compile(rf"[{ALL_IDEOGRAPHS}]|[^{SPACE}{ALL_IDEOGRAPHS}]+")
ASCII_MARKS = frozenset("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def is_mark(character):
    """Punctuation as BERT has it: all of ASCII that is no letter, digit, space or control."""
    return character in ASCII_MARKS or unicodedata.category(character)[0] == "P"


class ChineseTokenizer(WordPieceTokenizer):
    """Chinese-CLIP's tokenizer: the ids of its own code, which is Google's BERT of 2018.

    Different from transformers' BertTokenizer, seldom and on purpose: characters of private use,
    lone surrogates and words of 101 to 200 characters count, all ideographs stand alone, and the
    final sigma is known. What is punctuation or an accent is up to this Python's Unicode, as there.

    `vocab`: the vocab.txt, a folder with it, or the list of tokens. TokenizerError if it is not
    the one all released models share, unless `any_vocab`: with another one every id means another
    word. `straight_quotes`: curly quotes, which are not in the vocabulary, become \", and the text
    lower case before all else, as the authors do in training and evaluation and not in `tokenize`.
    """

    def __init__(self, vocab, straight_quotes=True, any_vocab=False):
        super().__init__(vocab, lowercase=True, longest_word=200)
        self.strip_accents, self.words, self.split = True, CHINESE_WORDS, True
        self.straight_quotes = straight_quotes
        tokens = [self.symbols.get(i, "") for i in range(self.vocab_size)]
        found = hashlib.sha256("\n".join(tokens).encode("utf-8", "replace")).hexdigest()
        if found != CHINESE_SHA256 and not any_vocab:
            raise TokenizerError(f"{vocab if isinstance(vocab, (str, pathlib.Path)) else 'this'} "
                                 f"is not the vocabulary of Chinese-CLIP (21,128 tokens, those of "
                                 f"Google's bert-base-chinese): its ids would mean other words. "
                                 f"For a model with a vocabulary of its own, say any_vocab=True")

    def __call__(self, texts, context_length=52, truncate=True):
        return super().__call__(texts, context_length, truncate)

    @property
    def vocabulary(self):
        known = super().vocabulary
        return known and {"kind": "chinese", "tokens": known["tokens"],
                          "straight_quotes": self.straight_quotes}

    def _chunks(self, text):
        if self.straight_quotes:
            text = text.lower().replace("\u201c", '"').replace("\u201d", '"')
        return self.words.findall(text)

    def _encode_chunk(self, chunk):
        chunk = "".join(c for c in chunk
                        if c != "\ufffd" and unicodedata.category(c) not in ("Cc", "Cf")).lower()
        chunk = in_order(chunk)
        chunk = [c for c in unicodedata.normalize("NFD", chunk) if unicodedata.category(c) != "Mn"]
        words = [[]]
        for character in chunk:
            if is_mark(character):
                words += [[character], []]
            else:
                words[-1].append(character)
        return [i for word in words if word for i in self._encode_word("".join(word))]


# --------------------------------------------------------------------------------------- RoBERTa

def read_byte_bpe(path, merges=None):
    """(token -> id, merges as tuples of two tokens, the file of the vocabulary)."""
    (path, *more), config = find_files(path, "vocab.json", "merges.txt")
    merges = more[0] if more else merges
    if merges is None:
        content = read_tokenizer_json(path, model="BPE", pre_tokenizer="ByteLevel")
        ids, pairs = content["model"].get("vocab"), content["model"].get("merges")
        config = content["pre_tokenizer"] | config
        if content.get("normalizer") or not config.get("use_regex", True):
            raise TokenizerError(f"{path} is not RoBERTa's: expected no normalizer, and use_regex")
    else:
        ids = read_json(path)
        pairs = [line for line in read_text(pathlib.Path(merges)).split("\n")
                 if line and not line.startswith("#version")]
    if config.get("add_prefix_space"):
        raise TokenizerError(f"{path} goes with add_prefix_space, which changes the text first; "
                             f"expected RoBERTa's tokenizer, where it is false")
    if not isinstance(pairs, list):
        raise TokenizerError(f"{path} has no list of merges")
    pairs = [map(str, pair) if isinstance(pair, list) else str(pair).split(" ") for pair in pairs]
    return ids, [tuple(pair) for pair in pairs], path


class ByteBPETokenizer(Tokenizer):
    """RoBERTa's tokenizer, of a vocab.json and a merges.txt, or of a Hugging Face folder with them.

    A tokenizer.json, or a folder with only that, will do as well. Raises TokenizerError when a
    file is missing, damaged or of another kind, or when a byte or a merge has no id.
    """
    text_kind = "bytebpe"

    def __init__(self, vocab, merges=None):
        ids, pairs, path = read_byte_bpe(pathlib.Path(vocab), merges)
        check_vocabulary(path, ids, ["<s>", "<pad>", "</s>", *byte_characters()])
        for pair in pairs:
            if len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys():
                raise TokenizerError(f"the merge {' '.join(pair)[:60]!r} does not fit {path}; "
                                     f"expected two tokens that join to a third")
        super().__init__(ids, "<s>", "</s>", "<pad>")
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}

    def _chunks(self, text):
        return BYTE_PIECES.findall(text)

    def _encode_chunk(self, piece):
        symbols = [byte_characters()[b] for b in piece.encode("utf-8", errors="replace")]
        return [self.ids[symbol] for symbol in merge_pairs(symbols, self.ranks)]

    def decode(self, ids):
        """The text of `ids`, exactly; start, padding and all after the first end are left out.

        Raises TokenizerError on an id outside the vocabulary.
        """
        symbols = self._symbols(ids, {self.start_id, self.pad_id})
        return from_byte_characters("".join(symbols)).decode("utf-8", errors="replace")


def stored_vocabulary(path):
    """The `vocabulary` that a checkpoint carries: out of a safetensors file's header, or a file of
    torch.save, read without running it. Raises TokenizerError."""
    found = None
    try:
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                header = json.loads(file.read(min(int.from_bytes(file.read(8), "little"), 1 << 27)))
            found = json.loads(header["__metadata__"].get("vocabulary", "null"))
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            found = content.get("vocabulary")
    except Exception as error:  # a damaged or hostile file can raise anything
        raise TokenizerError(f"{path} is not a checkpoint that can be read "
                             f"({str(error).splitlines()[:1]})") from None
    if not isinstance(found, dict):
        raise TokenizerError(f"{path} carries no vocabulary; name its vocab.txt or folder")
    return found


def from_vocabulary(known):
    """A tokenizer again from its `vocabulary`. Raises TokenizerError."""
    tokens = known.get("tokens")
    if not isinstance(tokens, (list, tuple)) or known.get("kind") not in ("wordpiece", "chinese"):
        raise TokenizerError("a vocabulary of no known kind; expected wordpiece or chinese, with "
                             "its tokens")
    if known["kind"] == "chinese":  # who wrote the checkpoint has answered for the tokens
        return ChineseTokenizer(tokens, known.get("straight_quotes") is not False, any_vocab=True)
    found = WordPieceTokenizer(tokens, bool(known.get("lowercase")), known.get("longest_word", 100))
    found.strip_accents, found.split = bool(known.get("strip_accents")), known.get("split", True)
    found.words = WORDS_AND_IDEOGRAPHS if found.split else WORDS
    return found


def open_tokenizer(path):
    """The tokenizer of a file or a Hugging Face folder, of the kind that its files show.

    vocab.txt: WordPiece; vocab.json and merges.txt: byte-level BPE, or CLIP's, which Hugging Face
    saves under the same names; tokenizer.json: any of them; *.txt.gz: CLIP's merge list; the folder
    of a ChineseCLIPModel: Chinese-CLIP's own; a checkpoint (.safetensors, .pt): the vocabulary that
    it carries. That `vocabulary`, a dict, will do in the place of a path. Raises TokenizerError
    when there is nothing of this or it cannot be read.
    """
    if isinstance(path, dict):
        return from_vocabulary(path)
    path = pathlib.Path(path)
    if path.suffix in (".safetensors", ".pt", ".pth", ".bin"):
        return from_vocabulary(stored_vocabulary(path))
    if (path / "vocab.txt").is_file() and (path / "config.json").is_file() and (
            read_json(path / "config.json").get("model_type") == "chinese_clip"):
        return ChineseTokenizer(path, any_vocab=True)
    if path.suffix == ".gz":
        return BPETokenizer(path)
    if path.name in ("vocab.json", "merges.txt"):
        path = path.parent
    if path.suffix == ".txt" or (path / "vocab.txt").is_file():
        return WordPieceTokenizer(path)
    try:
        (vocab, *merges), _ = find_files(path, "vocab.json", "merges.txt")
        content = read_json(vocab)
    except TokenizerError as error:
        raise TokenizerError(f"no tokenizer in {path}: {error}; expected vocab.txt, vocab.json and "
                             f"merges.txt, tokenizer.json, or CLIP's .txt.gz") from None
    model = {"vocab": content} if merges else content.get("model")
    model = model if isinstance(model, dict) else {}
    if "<|startoftext|>" in (model.get("vocab") or {}):
        tokenizer = BPETokenizer()
        if tokenizer.ids != model["vocab"]:
            raise TokenizerError(f"{vocab} looks like CLIP's vocabulary and differs from it")
        return tokenizer
    return WordPieceTokenizer(path) if model.get("type") == "WordPiece" else ByteBPETokenizer(path)


if __name__ == "__main__":  # a worked example
    tokenizer = BPETokenizer()
    print(tokenizer.encode("A photo of a polka-dotted mug."))  # [320, 1125, 539, 320, 29476, ...
    print(tokenizer.decode(tokenizer.encode("Hello  world!! don't &amp; naïve 123")))
    # hello world !! don 't & naïve 1 2 3
