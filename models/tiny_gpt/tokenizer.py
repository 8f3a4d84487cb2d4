"""Byte-pair encoding over bytes: 256 bytes and the merges of `vocabulary.json`.

Text is first cut into words (letters, a digit, punctuation, white space; one leading blank belongs to the word), then
inside every word the pair of neighbours with the lowest rank is merged until no known pair is left. Any text can be
encoded and `decode(encode(text)) == text`.

Source: Sennrich et al., arXiv:1508.07909; over bytes as in Radford et al., Language Models are Unsupervised Multitask
Learners, section 2.2.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

VOCABULARY = Path(__file__).with_name("vocabulary.json")
BYTES = 256

Pair = tuple[int, int]

_WORD = re.compile(r" ?[^\W\d_]+| ?\d| ?[^\s\w]+| ?_+|\s+(?!\S)|\s+")


class Tokenizer:
    """Encode text to token ids and back.

    Args:
        merges: Pairs of token ids; the pair of rank i becomes token 256 + i.
    """

    def __init__(self, merges: Iterable[Pair]) -> None:
        self.merges = [(int(a), int(b)) for a, b in merges]
        self._rank = {pair: rank for rank, pair in enumerate(self.merges)}
        self._bytes = [bytes([value]) for value in range(BYTES)]
        for a, b in self.merges:
            self._bytes.append(self._bytes[a] + self._bytes[b])
        self._words: dict[str, list[int]] = {}

    @property
    def size(self) -> int:
        """The number of tokens."""
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return [token for word in _WORD.findall(text) for token in self._word(word)]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of some token ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self._bytes[token] for token in tokens).decode(errors="replace")

    def _word(self, word: str) -> list[int]:
        if word not in self._words:
            tokens = list(word.encode())
            while len(tokens) > 1:
                pair = min(itertools.pairwise(tokens), key=lambda p: self._rank.get(p, len(self._rank)))
                if pair not in self._rank:
                    break
                tokens = merge(tokens, pair, BYTES + self._rank[pair])
            self._words[word] = tokens
        return self._words[word]


def merge(tokens: list[int], pair: Pair, new: int) -> list[int]:
    """Return the tokens with every occurrence of `pair`, from the left, replaced by `new`."""
    merged: list[int] = []
    position = 0
    while position < len(tokens):
        hit = tuple(tokens[position : position + 2]) == pair
        merged.append(new if hit else tokens[position])
        position += 2 if hit else 1
    return merged


def learn(text: str, size: int) -> list[Pair]:
    """Return the merges that byte-pair encoding learns from a text; ties go to the smaller pair.

    Args:
        text: Training text.
        size: Wanted number of tokens, the 256 bytes included.
    """
    counts = Counter(_WORD.findall(text))
    words = [(list(word.encode()), count) for word, count in sorted(counts.items())]
    merges: list[Pair] = []
    for new in range(BYTES, size):
        pairs: Counter[Pair] = Counter()
        for tokens, count in words:
            for pair in itertools.pairwise(tokens):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        words = [(merge(tokens, best, new) if best[0] in tokens else tokens, count) for tokens, count in words]
    return merges


@cache
def tokenizer() -> Tokenizer:
    """Return the tokenizer of the committed vocabulary."""
    return Tokenizer(json.loads(VOCABULARY.read_text())["merges"])
