"""Text in, token ids out: CLIP's byte-pair encoding (Radford et al. 2021), ids equal to OpenAI's.

A caption is cleaned (mojibake repaired, HTML entities resolved twice, white space folded, lower
case), cut by a regular expression into pieces that never span white space, and every piece is
merged bottom-up from bytes:

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

Nothing is read at import and there is no global instance.
"""
import functools
import gzip
import hashlib
import heapq
import html
import pathlib
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
CACHED_LENGTH = 64  # a longer run without a space is not a word that comes again
CACHED_WORDS = 1_000_000


class TokenizerError(ValueError):
    """A vocabulary file or text that cannot be used; `exit_code` marks it as the user's to fix."""
    exit_code = 2


@functools.lru_cache(maxsize=None)
def byte_characters():
    """The printable character of each byte, as a tuple of 256 strings (step 1 above)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]
    borrowed = iter(range(256, 512))
    return tuple(chr(b if b in printable else next(borrowed)) for b in range(256))


def clean(text):
    """What OpenAI's tokenizer sees of `text`: repaired, unescaped, single spaces, lower case."""
    # ftfy repairs what a wrong decoding broke. It has nothing to do on printable ASCII without an
    # entity, and it is most of the time of a short caption, so such text goes past it.
    if not (text.isascii() and text.replace("\n", " ").isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return regex.sub(r"\s+", " ", text.strip()).strip().lower()


class BPETokenizer:
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
        characters = byte_characters()
        # CLIP numbers the bytes by their printable character's place, not by their value.
        symbols = sorted(characters)
        symbols += [symbol + "</w>" for symbol in symbols]
        symbols += ["".join(merge) for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
        self.symbols = symbols  # id -> text
        self.ids = {symbol: i for i, symbol in enumerate(symbols)}
        self.ranks = {merge: rank for rank, merge in enumerate(merges)}
        self.byte_of = {character: byte for byte, character in enumerate(characters)}
        self.truncated = 0
        self._words = {}  # a word between two spaces -> its ids

    def encode(self, text):
        """The ids of `text`, without start and end of text: list[int]."""
        ids = []
        for word in clean(text).split(" "):  # no piece spans a space, so words are independent
            known = self._words.get(word)
            if known is None:
                known = self._encode_word(word)
            ids += known
        return ids

    def _encode_word(self, word):
        ids = []
        for piece in PIECES.findall(word):
            if piece in ("<|startoftext|>", "<|endoftext|>"):
                ids.append(self.ids[piece])
            else:
                characters = byte_characters()
                ids += [self.ids[s] for s in self._merge([characters[b] for b in piece.encode()])]
        if len(word) <= CACHED_LENGTH and len(self._words) < CACHED_WORDS:
            self._words[word] = ids
        return ids

    def _merge(self, symbols):
        """Join the symbols of one piece by rank: list[str] -> list[str], in O(n log n).

        The textbook loop looks at every pair again after each merge, which is quadratic: hours for
        a megabyte without a space. Here a heap holds the mergeable pairs and a linked list the
        symbols. All pairs of one rank are joined left to right before the next rank is looked at,
        as in OpenAI's loop: pairs that come into being meanwhile wait for the next round.
        """
        symbols[-1] += "</w>"
        count = len(symbols)
        following = list(range(1, count + 1))
        previous = list(range(-1, count - 1))
        heap = []

        def offer(left):
            right = following[left]
            if right < count:
                rank = self.ranks.get((symbols[left], symbols[right]))
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

    def decode(self, ids):
        """The text of `ids`; start, end and everything after the first end are left out.

        White space and case were folded by `encode`, so this is the cleaned text, with a space
        after every piece ("don 't"). Raises TokenizerError on an id outside the vocabulary.
        """
        out = bytearray()
        for i in map(int, ids):
            if i == self.end_id:
                break
            if i == self.start_id:
                continue
            if not 0 <= i < self.vocab_size:
                raise TokenizerError(f"token id {i} is outside the vocabulary (0 to "
                                     f"{self.vocab_size - 1})")
            symbol = self.symbols[i]
            ends = symbol.endswith("</w>")
            out += bytes(self.byte_of[c] for c in (symbol[:-4] if ends else symbol))
            out += b" " if ends else b""
        return out.decode("utf-8", errors="replace").strip()

    def __call__(self, texts, context_length=77, truncate=True):
        """Token ids of one text or a list of N texts: LongTensor (N, context_length).

        Start of text, the ids, end of text, then padding. A text that is too long is cut so that
        the end of text stays in the last place, and counted in `self.truncated`; with
        `truncate=False` it raises TokenizerError instead.
        """
        if context_length < 2:
            raise TokenizerError(f"context_length is {context_length}; start and end of text alone "
                                 f"need 2")
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = []
        for text in texts:
            ids = self.encode(text)
            if len(ids) > context_length - 2:
                if not truncate:
                    raise TokenizerError(f"a text has {len(ids) + 2} tokens and the model takes "
                                         f"{context_length}: {text[:60]!r}; shorten it or allow "
                                         f"truncation")
                self.truncated += 1
                ids = ids[:context_length - 2]
            padding = [self.pad_id] * (context_length - 2 - len(ids))
            rows.append([self.start_id, *ids, self.end_id, *padding])
        return torch.tensor(rows, dtype=torch.long).view(len(texts), context_length)


if __name__ == "__main__":  # a worked example
    tokenizer = BPETokenizer()
    print(tokenizer.encode("A photo of a polka-dotted mug."))  # [320, 1125, 539, 320, 29476, ...
    print(tokenizer.decode(tokenizer.encode("Hello  world!! don't &amp; naïve 123")))
    # hello world !! don 't & naïve 1 2 3
