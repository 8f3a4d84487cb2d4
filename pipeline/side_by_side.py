"""Run two models side by side over all data, with one layer of each in memory at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy.typing as npt

from .graph import Model
from .segments import Cuts, Stream

Array = npt.NDArray[Any]
Pair = tuple[str, str]
"""A tensor of the first model, and the one of the second that it belongs to."""


def side_by_side(
    models: tuple[Model, Model], pairs: Sequence[Pair], batches: Sequence[Mapping[str, Array]], **where: Any
) -> Iterator[tuple[Pair, Array, Array]]:
    """Yield the values of pairs of tensors, pair by pair and, within a pair, batch by batch.

    Both models run in exact semantics, each node once per batch.

    Args:
        models: The two; each is cut in front of the first reader of each of its tensors.
        pairs: Tensors to compare, in any order.
        batches: Array by input name; a model may take fewer inputs.
        where: Device and libraries of custom operators, see `Stream`.

    Raises:
        DataError: A batch lacks an input.
        UnsupportedError: Something else than a tensor passes a cut.
        QpipeError: As `make_session`.
    """
    first, second = (_Passed(model, [pair[i] for pair in pairs], batches, where) for i, model in enumerate(models))
    for pair in sorted(pairs, key=lambda pair: first.cuts.places[pair[0]]):
        for was, now in zip(first.take(pair[0]), second.take(pair[1]), strict=True):
            yield pair, was, now


class _Passed:
    """One model, and the tensors that it has passed and that are still to be compared."""

    def __init__(
        self, model: Model, tensors: Sequence[str], batches: Sequence[Mapping[str, Array]], where: Mapping[str, Any]
    ) -> None:
        self.cuts = Cuts.of(model, dict.fromkeys(tensors))
        self._stream = Stream.of(self.cuts, batches, exact=True, **where)
        self._ahead, self._uses = iter(self.cuts.places), Counter(tensors)
        self._values: dict[str, list[Array]] = {}

    def take(self, tensor: str) -> list[Array]:
        """Return the values of a tensor batch by batch; the other model may have its tensors in another order."""
        while tensor not in self._values:
            name = next(self._ahead)
            self._values[name] = list(self._stream.advance(name))
        self._uses[tensor] -= 1
        return self._values[tensor] if self._uses[tensor] else self._values.pop(tensor)
