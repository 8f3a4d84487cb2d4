"""Counting, cutting and fingerprinting batches on their way to a model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...calibrate.errors import DataError
from .signature import Batch, InputInfo, Warn, conform
from .sources import batches, known_samples


def samples_in(batch: Batch) -> int:
    """Return the number of samples: the size of the first axis when all arrays share it, else 1."""
    sizes = {array.shape[0] for array in batch.values() if array.ndim}
    return int(sizes.pop()) if len(sizes) == 1 else 1


def is_empty(batch: Batch) -> bool:
    """Whether a batch holds no sample: nothing along the first axis, or no element at all.

    One input without elements is no reason: the cache of a decoder is empty at its first step.
    """
    return bool(batch) and (samples_in(batch) == 0 or all(array.size == 0 for array in batch.values()))


def cut(batch: Batch, start: int, stop: int) -> Batch:
    """Return samples ``start`` to ``stop`` of a batch; scalars stay."""
    return {name: array[start:stop] if array.ndim else array for name, array in batch.items()}


def take(source: Iterable[Batch], samples: int | None, *, whole: bool = False) -> Iterator[Batch]:
    """Yield batches until ``samples`` samples have been yielded.

    Args:
        source: Batches.
        samples: How many at most, None for all.
        whole: Never cut a batch, rather yield a few samples more (for models with a fixed batch size).
    """
    left = samples
    if left is not None and left <= 0:
        return
    for batch in source:
        count = samples_in(batch)
        if left is None or count <= left or whole:
            yield batch
        else:
            yield cut(batch, 0, left)
        if left is not None:
            left -= count
            if left <= 0:
                return


class Fingerprint:
    """Hashes of the data seen so far: of the first sample, the last, and all in order, however they were batched.

    Attributes:
        samples: Number of samples seen.
        first: SHA-256 of the first sample, empty before any.
        last: SHA-256 of the last sample.
        running: Chained SHA-256 of all samples; can be continued from its own text.
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        known = state or {}
        self.samples = int(known.get("samples", 0))
        self.first = str(known.get("first", ""))
        self.last = str(known.get("last", ""))
        self.running = str(known.get("running", hashlib.sha256().hexdigest()))

    def update(self, batch: Batch) -> None:
        """Count a batch in."""
        count = samples_in(batch)
        for index in range(count):
            one = batch if count == 1 else cut(batch, index, index + 1)
            self.last = _digest(one)
            self.first = self.first or self.last
            self.running = hashlib.sha256(bytes.fromhex(self.running + self.last)).hexdigest()
        self.samples += count

    def state(self) -> dict[str, Any]:
        """Return everything as JSON values; `Fingerprint` goes on from it."""
        return {"samples": self.samples, "first": self.first, "last": self.last, "running": self.running}


def _digest(sample: Batch) -> str:
    digest = hashlib.sha256()
    for name in sorted(sample):
        array = np.ascontiguousarray(sample[name])
        digest.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        digest.update(repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedOptions:
    """How data is cut and fitted to a model.

    Attributes:
        samples: How many samples at most, None for all.
        batch: Samples per batch, for files; a fixed batch size of the model goes before it.
        mapping: Name in the data -> name of the model's input.
        batchify: Add a missing first axis of size 1.
        seed: Of the generators that a script draws from; None to leave them alone.
    """

    samples: int | None = None
    batch: int = 1
    mapping: Mapping[str, str] = field(default_factory=dict)
    batchify: bool = False
    seed: int | None = None


class Feed:
    """Batches that fit a model, from any data source; iterate it once.

    Args:
        argument: As for `batches`.
        inputs: What the model takes.
        options: How to cut and fit the data.
        warn: Told each thing once: a cast, samples that were left out.

    Attributes:
        batches: Batches yielded so far.
        skipped: Batches without elements that were left out.
        fingerprint: Of what was yielded so far.
        expected: Samples that there will be, None where only reading the data can tell.
    """

    def __init__(
        self,
        argument: str | Path | Iterable[Any],
        inputs: Sequence[InputInfo],
        options: FeedOptions | None = None,
        *,
        warn: Warn | None = None,
    ) -> None:
        self._argument = argument
        self._inputs = list(inputs)
        self._options = options or FeedOptions()
        fixed = {info.batch for info in inputs if info.batch is not None}
        self._whole = bool(fixed)
        self._fixed = fixed.pop() if len(fixed) == 1 else None
        self._warn = warn
        self._said: set[str] = set()
        known = [n for n in (self._options.samples, known_samples(argument)) if n is not None]
        self.expected = min(known, default=None)
        self.batches = 0
        self.skipped = 0
        self.fingerprint = Fingerprint()

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches."""
        for batch in take(self._conformed(), self._options.samples, whole=self._whole):
            self.batches += 1
            self.fingerprint.update(batch)
            yield batch
        if self.skipped and not self.batches:
            raise DataError(
                "the data gave no samples",
                found=f"{self.skipped} batches, all of them without elements",
                expected="at least one batch with elements",
                do="check what load_data() yields",
            )

    def _conformed(self) -> Iterator[Batch]:
        size = self._fixed or self._options.batch
        for raw in batches(self._argument, inputs=self._inputs, batch=size, seed=self._options.seed):
            if is_empty(raw):
                self.skipped += 1
                self._say("batches without elements were skipped")
                continue
            count = samples_in(raw)
            if self.batches and self._fixed and count < self._fixed:
                self._say(f"the last {count} samples were left out: the model takes batches of {self._fixed} only")
                continue
            yield conform(raw, self._inputs, self._options.mapping, batchify=self._options.batchify, warn=self._say)

    def _say(self, text: str) -> None:
        if self._warn is not None and text not in self._said:
            self._said.add(text)
            self._warn(text)
