"""What `tiny_gpt` reads: Python's help topics and the standard library's docstrings and sources.

Help topics are held out by a hash of their name, so that the split survives a change of their text. Many topics repeat
paragraphs of other topics; whatever paragraph occurs in a held-out topic is therefore removed from the training text.
"""

from __future__ import annotations

import ast
import sysconfig
from functools import cache
from pathlib import Path

import numpy as np

from ..text import paragraphs, stable_hash, topics
from .tokenizer import tokenizer

HELD_OUT_EVERY = 8
SOURCES = ("argparse", "contextlib", "copy", "csv", "functools", "heapq", "shutil", "statistics", "string", "textwrap")


@cache
def split_topics() -> tuple[str, str]:
    """Return the text of the training topics and that of the held-out ones; no paragraph is in both."""
    held_out, training = [], []
    for name, text in topics().items():
        (held_out if stable_hash(name) % HELD_OUT_EVERY == 0 else training).extend(paragraphs(text))
    # dict.fromkeys drops repetitions and keeps the order; a layout change does not make a paragraph another one.
    unseen = {" ".join(paragraph.split()): paragraph for paragraph in held_out}
    kept = {" ".join(paragraph.split()): paragraph for paragraph in training}
    kept = {key: paragraph for key, paragraph in kept.items() if key not in unseen}
    return "\n\n".join(kept.values()), "\n\n".join(unseen.values())


def library_text() -> str:
    """Return the docstrings of the standard library's top-level modules and the sources of a few of them."""
    folder = Path(sysconfig.get_path("stdlib"))
    parts = [docstrings(path.read_text("utf-8")) for path in sorted(folder.glob("[a-z]*.py"))]
    sources = [folder / f"{name}.py" for name in SOURCES]
    parts += [path.read_text("utf-8") for path in sources if path.exists()]
    return "\n\n".join(parts)


def docstrings(source: str) -> str:
    """Return the docstrings of a module's source, outermost first, with blank lines between."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    found = [ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    return "\n\n".join(text for text in found if text)


def training_text() -> str:
    """Return everything that the model learns from."""
    return split_topics()[0] + "\n\n" + library_text()


def windows(text: str, length: int, count: int | None = None) -> np.ndarray:
    """Return consecutive windows of a text's tokens [n, length + 1] int64, n <= count, spread evenly over the text.

    A window's first `length` tokens are the input, its last `length` the targets.

    Args:
        text: Source text; what is left after the last full window is dropped.
        length: Tokens per window.
        count: Most windows; None takes all.
    """
    tokens = np.array(tokenizer().encode(text), np.int64)
    starts = np.arange(0, len(tokens) - length, length)
    if count is not None and count < len(starts):
        starts = starts[np.arange(count) * len(starts) // count]
    return tokens[starts[:, None] + np.arange(length + 1)]
