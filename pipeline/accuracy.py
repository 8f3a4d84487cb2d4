"""How far one stream of arrays is from another, gathered batch by batch in memory that does not grow.

Letters: ``N`` samples of a batch (first axis), ``V`` elements of one sample, ``C`` classes or tokens of a vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..calibrate.stats.histogram import Histogram, HistogramObserver

Array = npt.NDArray[Any]
F64 = npt.NDArray[np.float64]

CHUNK = 2**16
"""Elements that are widened to float64 at a time: 512 KiB, which stay in the cache (4 times as fast as 2^20)."""

TAIL = 0.999


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """Distance of an approximation from its reference, over all batches.

    The first five mean what the functions of the same name in `calibrate.metrics` mean, of all batches joined.

    Attributes:
        sqnr_db: Signal to quantization noise ratio [dB].
        cosine: Cosine of the angle between the two.
        mse: Mean squared error.
        max_abs: Largest difference.
        cosine_mean: Mean over samples of each sample's cosine.
        cosine_min: Lowest cosine of a sample.
        same: Share of values that are equal, for integers and texts; None for floating-point numbers.
        top1: Share of positions with the same largest score; None where values are no scores.
        kld_mean: Mean Kullback-Leibler divergence from the reference's distribution [nats]; None likewise.
        kld_median: Its median.
        kld_p999: Its 99.9th percentile.
        samples: Samples compared.
        values: Values compared.
        nonfinite: Values that are finite in the reference and are not in the approximation.
        mismatched: Batches in which the two had different shapes; they are in no figure above.
    """

    sqnr_db: float
    cosine: float
    mse: float
    max_abs: float
    cosine_mean: float
    cosine_min: float
    same: float | None
    top1: float | None
    kld_mean: float | None
    kld_median: float | None
    kld_p999: float | None
    samples: int
    values: int
    nonfinite: int
    mismatched: int


class Comparison:
    """Gathers the `Accuracy` of one tensor.

    Args:
        scores: Whether the last axis holds scores of classes or tokens: ``"logits"``, ``"probabilities"``, or None.
    """

    def __init__(self, scores: str | None = None) -> None:
        self._scores = scores
        self._sums = np.zeros(4)  # r r, a a, r a, (r - a)^2
        self._max_abs = 0.0
        self._cosine_sum, self._cosine_min = 0.0, 1.0
        self._samples = self._values = self._nonfinite = self._mismatched = 0
        self._same: int | None = None
        self._rows = self._agreeing = 0
        self._kld_sum = 0.0
        self._kld = HistogramObserver()

    def update(self, reference: Array, approximation: Array) -> None:
        """Compare one batch; arrays of different shapes are only counted.

        The arrays of a sequence are compared one by one. A text counts as 1, as 0 where the other is not the same.
        """
        if reference.shape != approximation.shape:
            self._mismatched += 1
            return
        if reference.size == 0:
            return
        if isinstance(reference.flat[0], np.ndarray):
            for pair in zip(reference.flat, approximation.flat, strict=True):
                self.update(*pair)
            return
        if not _is_float(reference):
            same = np.asarray(reference == approximation)
            self._same = (self._same or 0) + int(np.count_nonzero(same))
            if not _is_numeric(reference):
                reference, approximation = np.ones_like(same), same
        samples = reference.shape[0] if reference.ndim > 1 else 1
        for r, a in _chunks(reference.reshape(samples, -1), approximation.reshape(samples, -1)):
            self._add(r, a)
        if self._scores and reference.ndim and reference.shape[-1] > 1:
            classes = reference.shape[-1]
            for r, a in _chunks(reference.reshape(-1, classes), approximation.reshape(-1, classes)):
                self._rank(r.astype(np.float64), a.astype(np.float64))

    def result(self) -> Accuracy:
        """Return the figures so far."""
        rr, aa, ra, dd = self._sums.tolist()
        ranked = self._rows > 0
        return Accuracy(
            sqnr_db=_decibel(rr, dd),
            cosine=_cosine(rr, aa, ra),
            mse=dd / self._values if self._values else 0.0,
            max_abs=self._max_abs,
            cosine_mean=self._cosine_sum / self._samples if self._samples else 1.0,
            cosine_min=self._cosine_min,
            same=None if self._same is None else self._same / self._values,
            top1=self._agreeing / self._rows if ranked else None,
            kld_mean=self._kld_sum / self._rows if ranked else None,
            kld_median=_quantile(self._kld.result(), 0.5) if ranked else None,
            kld_p999=_quantile(self._kld.result(), TAIL) if ranked else None,
            samples=self._samples,
            values=self._values,
            nonfinite=self._nonfinite,
            mismatched=self._mismatched,
        )

    def _add(self, reference: Array, approximation: Array) -> None:
        """Add whole samples [N, V], a few columns at a time."""
        step = max(1, CHUNK // max(1, len(reference)))
        sums = np.zeros((4, len(reference)))
        for start in range(0, reference.shape[1], step):
            part = slice(start, start + step)
            sums += self._distances(reference[:, part].astype(np.float64), approximation[:, part].astype(np.float64))
        cosines = np.array([_cosine(rr, aa, ra) for rr, aa, ra in sums[:3].T.tolist()])
        self._sums += sums.sum(axis=1)
        self._samples += len(reference)
        self._cosine_sum += float(cosines.sum())
        self._cosine_min = float(np.minimum(self._cosine_min, cosines.min()))

    def _distances(self, r: F64, a: F64) -> F64:
        """Return the four sums [4, N] of ``r`` and ``a`` [N, V]; where the reference is not finite is left out."""
        known = np.isfinite(r)
        if not known.all():
            r, a = np.where(known, r, 0.0), np.where(known, a, 0.0)
        self._values += int(np.count_nonzero(known))
        self._nonfinite += a.size - int(np.count_nonzero(np.isfinite(a)))
        with np.errstate(invalid="ignore", over="ignore"):
            d = r - a
            # np.maximum hands a NaN on; Python's max drops it or not, by the order of its arguments.
            self._max_abs = float(np.maximum(self._max_abs, np.abs(d).max()))
            return np.stack([np.einsum("nv,nv->n", x, y) for x, y in ((r, r), (a, a), (r, a), (d, d))])

    def _rank(self, r: F64, a: F64) -> None:
        """Add rows of scores ``r`` and ``a`` [N, C]."""
        self._rows += len(r)
        self._agreeing += int(np.count_nonzero(r.argmax(axis=1) == a.argmax(axis=1)))
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            log_p, p, total_p = self._distribution(r)
            log_q, _, total_q = self._distribution(a)
            terms = log_p - log_q
            # A class that the reference rules out counts nothing, whatever the other one says.
            terms[p == 0] = 0.0
            divergence = np.einsum("nc,nc->n", p, terms) / total_p - np.log(total_p) + np.log(total_q)
        # Rounding can leave a hair below 0 where both are the same.
        divergence = np.maximum(divergence, 0.0)
        self._kld_sum += float(divergence.sum())
        self._kld.update(divergence.astype(np.float32))

    def _distribution(self, scores: F64) -> tuple[F64, F64, F64]:
        """Return logarithms and values of a distribution [N, C] that is yet to be divided by its total [N]."""
        if self._scores == "probabilities":
            values = np.maximum(scores, np.finfo(np.float32).tiny)
            return np.log(values), values, values.sum(axis=1)
        shifted = scores - scores.max(axis=1, keepdims=True)
        values = np.exp(shifted)
        return shifted, values, values.sum(axis=1)


def _is_float(array: Array) -> bool:
    # Kind V: bfloat16 and its like.
    return array.dtype.kind in "fV"


def _is_numeric(array: Array) -> bool:
    return _is_float(array) or array.dtype.kind in "biu"


def _chunks(reference: Array, approximation: Array) -> Iterator[tuple[Array, Array]]:
    """Yield as many whole rows at a time as fit into `CHUNK` elements, one at least."""
    step = max(1, CHUNK // max(1, reference.shape[1]))
    for start in range(0, len(reference), step):
        yield reference[start : start + step], approximation[start : start + step]


def _cosine(rr: float, aa: float, ra: float) -> float:
    norms = math.sqrt(rr) * math.sqrt(aa) if rr >= 0 and aa >= 0 else math.nan
    if norms == 0:
        return 1.0 if rr == aa == 0 else 0.0
    cosine = ra / norms
    return cosine if math.isnan(cosine) else min(1.0, max(-1.0, cosine))


def _decibel(signal: float, noise: float) -> float:
    if math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return -math.inf if signal == 0 or math.isinf(noise) else 10 * math.log10(signal / noise)


def _quantile(histogram: Histogram, share: float) -> float:
    """Return the value below which ``share`` of all lie, to the width of a bin (2^-7 of it)."""
    bins = histogram.bins()
    if not len(bins.counts):
        return math.nan
    seen = np.cumsum(bins.counts)
    return float(bins.center[min(int(np.searchsorted(seen, share * seen[-1])), len(seen) - 1)])
