"""Patterns that pick nodes: a glob on the name, ``re:`` and a regular expression, ``op:`` and an operator type."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable

import onnx_graphsurgeon as gs

from ..calibrate.errors import RecipeError


def matches(pattern: str, node: gs.Node) -> bool:
    """Whether ``pattern`` picks ``node``.

    Raises:
        RecipeError: The regular expression is broken.
    """
    if pattern.startswith("op:"):
        return fnmatch.fnmatchcase(node.op, pattern[3:])
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], node.name) is not None
        except re.error as error:
            raise RecipeError("a pattern is no regular expression", where=pattern, found=str(error)) from error
    return fnmatch.fnmatchcase(node.name, pattern)


def require_matches(patterns: Iterable[str], nodes: Iterable[gs.Node]) -> None:
    """Refuse patterns that pick nothing: a misspelled one must not pass unnoticed.

    Raises:
        RecipeError: A pattern matches no node; the message names near ones.
    """
    known = list(nodes)
    for pattern in patterns:
        if any(matches(pattern, node) for node in known):
            continue
        is_op = pattern.startswith("op:")
        pool = sorted({node.op for node in known} if is_op else {node.name for node in known})
        bare = pattern[3:] if pattern.startswith(("op:", "re:")) else pattern
        near = near_names(bare.strip("*"), pool)
        raise RecipeError(
            f"the pattern {pattern!r} matches no node",
            found=f"{len(pool)} {'operator types' if is_op else 'node names'}",
            expected=", ".join(near),
            do="correct the pattern; qpipe inspect lists operator types and names",
        )


def near_names(name: str, known: list[str]) -> list[str]:
    """Return the three known names nearest to ``name``, or the first three when none is near."""
    return difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
