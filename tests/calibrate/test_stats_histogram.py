"""The float-bits histogram: exact, whatever the split, order, shape and type of the data."""

from __future__ import annotations

from collections import Counter

import ml_dtypes
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from qpipe.calibrate.stats.extrema import Extrema
from qpipe.calibrate.stats.histogram import Histogram, HistogramObserver

SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e30, -1e30, 3.4028235e38, 1e-45, -1e-42, 9.9e29, 2.0**-126]
VALUES = st.one_of(st.floats(width=32), st.sampled_from([float(np.float32(v)) for v in SPECIAL]))
ARRAYS = hnp.arrays(np.float32, st.integers(0, 60), elements=VALUES)


def counted(x: np.ndarray, sentinel: float = 1e30) -> tuple[Counter, Extrema, int]:
    """Count one value at a time, as the definition says."""
    bins: Counter = Counter()
    kept, nan, pos, neg, masks, low_bits = [], 0, 0, 0, 0, 0
    for value in x.reshape(-1):
        bits = int(value.view(np.uint32))
        if np.isnan(value):
            nan += 1
        elif np.isinf(value):
            pos, neg = pos + (value > 0), neg + (value < 0)
        elif abs(float(value)) >= sentinel:
            masks += 1
        else:
            bins[bits >> 16] += 1
            low_bits |= bits & 0xFFFF
            kept.append(float(value))
    extrema = Extrema(
        finite=len(kept),
        lo=min(kept, default=0.0) + 0.0,
        hi=max(kept, default=0.0) + 0.0,
        nan=nan,
        pos_inf=int(pos),
        neg_inf=int(neg),
        sentinel=masks,
    )
    return bins, extrema, low_bits


@given(ARRAYS)
def test_counts_what_the_definition_says(x):
    bins, extrema, low_bits = counted(x)
    histogram = Histogram.of(x)
    assert dict(zip(histogram.ids.tolist(), histogram.counts.tolist(), strict=True)) == bins
    assert histogram.extrema == extrema
    assert histogram.low_bits == low_bits
    assert histogram.total == x.size
    assert np.signbit([histogram.lo, histogram.hi]).tolist() == [extrema.lo < 0, extrema.hi < 0]


@given(ARRAYS, st.lists(st.integers(0, 60), max_size=4), st.randoms())
def test_any_split_and_order_gives_the_same_bits(x, cuts, random):
    parts = np.split(x, sorted(min(cut, x.size) for cut in cuts))
    random.shuffle(parts)
    observer = HistogramObserver()
    for part in parts:
        observer.update(part)
    merged = Histogram.empty()
    for part in parts:
        merged = merged.merge(Histogram.of(part))
    added = HistogramObserver()
    for part in parts:
        added.add(Histogram.of(part))
    assert observer.result() == Histogram.of(x)
    assert merged == Histogram.of(x)
    assert added.result() == Histogram.of(x)


@given(ARRAYS, ARRAYS, ARRAYS)
def test_merge_is_commutative_and_associative_with_an_identity(x, y, z):
    a, b, c = Histogram.of(x), Histogram.of(y), Histogram.of(z)
    assert a.merge(b) == b.merge(a)
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    assert a.merge(Histogram.empty()) == a


def test_large_arrays_are_cut_into_passes_without_a_seam():
    x = np.random.default_rng(1).standard_normal(700_001).astype(np.float32)
    x[123_456], x[600_000] = np.nan, 50.0
    histogram = Histogram.of(x)
    ids, counts = np.unique(x[~np.isnan(x)].view(np.uint32) >> 16, return_counts=True)
    assert np.array_equal(histogram.ids, ids)
    assert np.array_equal(histogram.counts, counts)
    assert histogram.extrema == Extrema(finite=700_000, lo=float(np.nanmin(x)), hi=50.0, nan=1)


@given(hnp.arrays(np.float16, 40, elements=st.floats(width=16)))
def test_float16_widens_without_loss(x):
    assert Histogram.of(x) == Histogram.of(x.astype(np.float32))
    assert Histogram.of(x).low_bits & ~0xE000 == 0


def test_bfloat16_bins_are_single_values():
    x = np.random.default_rng(2).standard_normal(5000).astype(ml_dtypes.bfloat16)
    bins = Histogram.of(x).bins()
    values, counts = np.unique(x.astype(np.float64), return_counts=True)
    assert np.array_equal(bins.low, values)
    assert np.array_equal(bins.high, values)
    assert np.array_equal(bins.counts, counts)


def test_float64_is_rounded_and_what_overflows_is_a_sentinel():
    x = np.array([0.1, 1e300, -1e300, np.inf, np.nan, -2.5])
    histogram = Histogram.of(x)
    assert histogram.extrema == Extrema(finite=2, lo=-2.5, hi=float(np.float32(0.1)), nan=1, pos_inf=1, sentinel=2)


@pytest.mark.parametrize("x", [np.arange(3), np.array([True]), np.array(["a"]), np.array([1j])])
def test_other_types_are_refused(x):
    with pytest.raises(TypeError, match="floating-point"):
        Histogram.of(x)


def test_strided_and_scalar_arrays():
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert Histogram.of(x[:, ::2, ::-1]) == Histogram.of(np.ascontiguousarray(x[:, ::2]))
    assert Histogram.of(np.float32(3.0).reshape(())).hi == 3.0


@given(ARRAYS, st.integers(0, 7))
@settings(max_examples=60)
def test_bins_are_ordered_and_hold_every_value(x, coarseness):
    histogram = Histogram.of(x)
    bins = histogram.bins(coarseness)
    kept = x[np.abs(x) < 1e30].astype(np.float64)
    assert bins.counts.sum() == kept.size
    assert (bins.low <= bins.center).all()
    assert (bins.center <= bins.high).all()
    assert (bins.high[:-1] <= bins.low[1:]).all()
    normal = kept[np.abs(kept) >= 2.0**-126]
    inside = (normal[:, None] >= bins.low) & (normal[:, None] <= bins.high)
    assert inside.any(axis=1).all()
    if kept.size:
        assert bins.low[0] >= histogram.lo
        assert bins.high[-1] <= histogram.hi


@given(ARRAYS)
def test_absolute_is_the_histogram_of_magnitudes(x):
    mine, direct = Histogram.of(x).absolute(), Histogram.of(np.abs(x))
    assert np.array_equal(mine.ids, direct.ids)
    assert np.array_equal(mine.counts, direct.counts)
    assert mine.hi == direct.hi
    assert mine.lo <= direct.lo


def test_zeros_are_counted():
    x = np.array([0.0, -0.0, 1e-45, 1.0, -3.0], np.float32)
    assert Histogram.of(x).zero == 3
    assert Histogram.empty().zero == 0


def test_two_thousand_observers_take_little_memory():
    x = np.random.default_rng(3).standard_normal(20_000).astype(np.float32)
    process, observers = psutil.Process(), []
    before = process.memory_full_info().uss
    for _ in range(200):
        observers.append(HistogramObserver())
        observers[-1].update(x)
        kept = observers[-1].result()
    assert 10 * (process.memory_full_info().uss - before) < 200e6
    assert 2000 * (kept.ids.nbytes + kept.counts.nbytes) < 200e6
