"""The text that ships with Python itself: `pydoc_data.topics`, cut into paragraphs and sentences.

No download, no licence question, on every machine. The wording differs a little between Python versions, so nothing
here depends on positions: whatever is chosen is chosen by a hash of the text or of the topic's name.
"""

from __future__ import annotations

import hashlib
import re

_MARKUP = re.compile(r"::=|>>>|\*\*\*|===|---|^\s*[|+]", re.MULTILINE)
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)\"*][.?!])\s+(?=[A-Z\"*])")


def topics() -> dict[str, str]:
    """Return the texts of Python's `help()` by topic, in the order of their names."""
    from pydoc_data.topics import topics as texts

    return dict(sorted(texts.items()))


def paragraphs(text: str) -> list[str]:
    """Return the blocks of a text between blank lines, with their line breaks and indents."""
    return [block.strip("\n").rstrip() for block in re.split(r"\n\s*\n", text) if block.strip()]


def stable_hash(text: str) -> int:
    """Return a hash of a text that is the same in every process and on every machine (`hash()` is not)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def sentences(words: tuple[int, int] = (6, 40)) -> list[str]:
    """Return the sentences of all topics, each once, in an order that mixes the topics and never changes.

    Args:
        words: Fewest and most words of a sentence, both included.
    """
    found = {
        sentence
        for text in topics().values()
        for paragraph in paragraphs(text)
        if not _MARKUP.search(paragraph)
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split()))
        if words[0] <= len(sentence.split()) <= words[1] and sentence[0].isupper() and sentence[-1] in ".?!"
    }
    return sorted(found, key=stable_hash)
