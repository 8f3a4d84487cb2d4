"""Times of models as ratios: all take turns in one process, so that a change of the machine's speed cancels out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from .session import make_session

Batch = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Time of one model.

    Attributes:
        path: The model.
        milliseconds: Median time per batch.
        spread: Distance of the quartiles over the median.
        ratio: Time of the first model over time of this one, median over rounds; above 1 is faster.
    """

    path: Path
    milliseconds: float
    spread: float
    ratio: float


def race(
    paths: Sequence[Path], batches: Sequence[Batch], *, rounds: int = 9, threads: int | None = None
) -> list[Timing]:
    """Time models as they are deployed, on the same batches, in turn; the first round only warms up.

    Args:
        paths: Models; the first one is the measure of the others.
        batches: What each of them is fed; inputs that a model lacks are left out.
        rounds: Rounds that count, at least 3.
        threads: Threads of each operator, None for all cores.
    """
    sessions = [make_session(path, threads=threads) for path in paths]
    wanted = [{entry.name for entry in session.get_inputs()} for session in sessions]
    feeds = [[{k: a for k, a in batch.items() if k in names} for batch in batches] for names in wanted]
    times: list[list[float]] = [[] for _ in paths]
    for turn in range(rounds + 1):
        for i, session in enumerate(sessions):
            start = time.perf_counter()
            for feed in feeds[i]:
                session.run(None, feed)
            if turn:
                times[i].append(time.perf_counter() - start)
    return [_timing(path, mine, times[0], len(batches)) for path, mine in zip(paths, times, strict=True)]


def _timing(path: Path, mine: list[float], base: list[float], batches: int) -> Timing:
    middle = statistics.median(mine)
    low, _, high = statistics.quantiles(mine, n=4)
    return Timing(
        path=path,
        milliseconds=1000 * middle / max(batches, 1),
        spread=(high - low) / middle,
        ratio=statistics.median(b / t for b, t in zip(base, mine, strict=True)),
    )
