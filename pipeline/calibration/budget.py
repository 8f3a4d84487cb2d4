"""Keeping one run of the model within memory."""

from __future__ import annotations

from typing import NamedTuple

from ..data import Batch
from ..data.feed import cut, samples_in
from .limits import survey
from .probe import Probe

_ALIVE = 4  # tensors at a time, if all were as large as the largest


class Piece(NamedTuple):
    """What one run is given, and about how many bytes of activations it will hold at a time, as far as known."""

    batch: Batch
    nbytes: int


class Budget:
    """Keeps a run within memory: refuses bombs, and cuts batches whose activations would not fit.

    Args:
        probe: What runs.
        max_memory: Bytes that one tensor may take.
        batch_bytes: Bytes of activations that one run may hand out.
    """

    def __init__(self, probe: Probe, max_memory: int, batch_bytes: int) -> None:
        self._probe = probe
        self._max_memory = max_memory
        self._batch_bytes = batch_bytes
        self._judged = 0
        self._fetched = 0.0  # bytes per byte of a batch
        self._held = 0.0

    def pieces(self, batch: Batch) -> list[Piece]:
        """Return the batch, or parts of it along its first axis.

        Raises:
            ModelError: A tensor would be too large.
        """
        size = nbytes(batch)
        if size >= 2 * self._judged:
            known = survey(self._probe.skeleton(), batch, self._max_memory)
            self._judged = size
            self._fetched = sum(known[name].nbytes for name in self._probe.fetched if name in known) / max(size, 1)
            # The runtime lets go of what was read for the last time.
            largest = max((one.nbytes for one in known.values()), default=0)
            self._held = self._fetched + _ALIVE * largest / max(size, 1)
        count = min(-(-int(size * self._fetched) // self._batch_bytes), samples_in(batch))
        if count <= 1 or not self._probe.can_split:
            return [self._piece(batch)]
        step = -(-samples_in(batch) // count)
        return [self._piece(cut(batch, start, start + step)) for start in range(0, samples_in(batch), step)]

    def _piece(self, batch: Batch) -> Piece:
        return Piece(batch, int(nbytes(batch) * self._held))


def nbytes(batch: Batch) -> int:
    """Return the bytes of a batch."""
    return sum(array.nbytes for array in batch.values())
