"""Packing, the reference's arithmetic against plain loops, and the choice of outlier columns."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.calibrate.errors import UnsupportedError
from qpipe.plugins.outlier_matmul.op import (
    MAX_NEW_OUTLIERS,
    X_TYPES,
    pack,
    padded,
    quantize_rows,
    reference,
    select_outliers,
)

TWO_DIGITS = 127 * 128 + 63


def slow_codes(row: np.ndarray, index: set[int], limit: float) -> tuple[list[int], float]:
    """One row by the rule's words, one value at a time. Python's `round` rounds half to even."""
    regular = {k: float(v) for k, v in enumerate(row) if k not in index}
    new = {k for k, v in regular.items() if limit > 0 and abs(v) > np.float32(limit)}
    if len(new) > MAX_NEW_OUTLIERS:
        new = set()
    quiet = max((abs(v) for k, v in regular.items() if k not in new), default=0.0)
    loud = max((abs(regular[k]) for k in new), default=0.0)
    scale = max(np.float32(quiet) / np.float32(127), np.float32(loud) / np.float32(TWO_DIGITS), np.float32(2.0**-126))
    inverse = np.float32(1) / scale
    codes = [0] * len(row)
    for k, value in regular.items():
        bound = TWO_DIGITS if k in new else 127
        codes[k] = max(-bound, min(bound, round(float(np.float32(value) * inverse))))
    return codes, float(scale)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 5),
    inputs=st.integers(1, 90),
    share=st.floats(0, 1),
    limit=st.sampled_from([0.0, 0.5, 2.0]),
    magnitude=st.sampled_from([1e-40, 1e-3, 1.0, 1e20]),
)
def test_codes_follow_the_rule(seed, rows, inputs, share, limit, magnitude) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, inputs)) * magnitude).astype(np.float32)
    index = np.sort(rng.permutation(inputs)[: int(share * inputs)]).astype(np.int32)
    got = quantize_rows(x, index, limit=limit * magnitude)
    for row, codes, scale in zip(x, got.codes, got.scale, strict=True):
        expected = slow_codes(row, set(index.tolist()), limit * magnitude)
        assert (codes.tolist(), float(scale)) == expected


def test_ties_round_to_even_codes() -> None:
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]], np.float32)
    assert quantize_rows(x, np.zeros(0, np.int32)).codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), inputs=st.integers(1, 70), outputs=st.integers(1, 20), share=st.floats(0, 1))
def test_packing_keeps_every_weight_once(seed, inputs, outputs, share) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((outputs, inputs)).astype(np.float32)
    index = rng.permutation(inputs)[: int(share * inputs)]
    packed = pack(w, index, np.float32)
    assert packed.outlier_index.tolist() == sorted(index.tolist())
    assert packed.w_q.shape == (outputs, padded(inputs))
    assert packed.w_outlier.shape == (outputs, padded(index.size))
    assert not packed.w_q[:, inputs:].any()
    assert not packed.w_outlier[:, index.size :].any()
    assert not packed.w_q[:, packed.outlier_index].any()
    assert packed.w_q.min(initial=0) >= -127
    np.testing.assert_array_equal(packed.w_outlier[:, : index.size], w[:, packed.outlier_index])
    regular = np.setdiff1d(np.arange(inputs), index)
    back = packed.w_q[:, regular] * packed.w_scale[:, None]
    assert (np.abs(back - w[:, regular]) <= packed.w_scale[:, None] * 0.5001).all()
    amax = np.abs(w[:, regular]).max(axis=1, initial=0)
    np.testing.assert_allclose(packed.w_scale, np.where(amax > 0, amax / 127, 1), rtol=1e-6)


@pytest.mark.parametrize(
    ("index", "dtype", "padding"),
    [
        ([5], np.float32, 16),
        ([-1], np.float32, 16),
        ([1, 1], np.float32, 16),
        ([], np.float64, 16),
        ([], np.float32, 8),
    ],
)
def test_packing_refuses_what_the_operator_cannot_take(index, dtype, padding) -> None:
    with pytest.raises(UnsupportedError):
        pack(np.ones((3, 5)), index, dtype, padding=padding)


def test_wider_padding() -> None:
    packed = pack(np.ones((3, 70)), [1, 2], np.float16, padding=64)
    assert packed.w_q.shape == (3, 128)
    assert packed.w_outlier.shape == (3, 64)


@pytest.mark.parametrize("dtype", X_TYPES, ids=lambda d: d.name)
def test_outlier_columns_rescue_accuracy(dtype) -> None:
    """40 times larger columns cost plain int8 an error of a few percent; as outliers they cost nothing."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 512)).astype(np.float32)
    loud = [7, 100, 333]
    x[:, loud] *= 40
    x, w = x.astype(dtype), rng.standard_normal((128, 512)).astype(np.float32)
    exact = x.astype(np.float64) @ w.T.astype(np.float64)

    def error(index: list[int]) -> float:
        y, _ = reference(x, pack(w, index, dtype))
        return float(np.linalg.norm(y.astype(np.float64) - exact) / np.linalg.norm(exact))

    assert error(loud) < 0.005
    assert error([]) > 5 * error(loud)


def test_reference_keeps_rank_and_type() -> None:
    packed = pack(np.ones((5, 8)), [0], np.float16)
    for shape in [(8,), (0, 8), (2, 3, 8), (1, 2, 1, 2, 8)]:
        y, met = reference(np.ones(shape, np.float16), packed, np.ones(5, np.float32))
        assert y.shape == (*shape[:-1], 5)
        assert y.dtype == np.float16
        assert (y == 9).all()
        assert met == 0


def test_too_many_new_outliers_make_a_loud_row() -> None:
    x = np.ones((2, 200), np.float32)
    x[0, :MAX_NEW_OUTLIERS] = 100
    x[1, : MAX_NEW_OUTLIERS + 1] = 100
    rows = quantize_rows(x, np.zeros(0, np.int32), limit=2.0)
    assert rows.new_outliers == 2 * MAX_NEW_OUTLIERS + 1
    assert rows.codes[0].max() == 12700
    assert rows.codes[1].max() == 127
    assert rows.codes[1].min() == 1


def test_relative_choice() -> None:
    amax = np.ones(100)
    amax[[3, 50, 51]] = [40, 8, 5]
    chosen = select_outliers(amax, threshold=6.0)
    assert chosen.index.tolist() == [3, 50]
    assert chosen.limit == 5
    assert chosen.bound == 6
    assert chosen.capped == 0
    assert chosen.energy_share == pytest.approx((40**2 + 8**2) / (97 + 40**2 + 8**2 + 25))


def test_typical_magnitude_sets_the_bound_and_the_energy() -> None:
    amax, mean = np.array([10.0, 4, 3, 3]), np.array([5.0, 1, 1, 1])
    chosen = select_outliers(amax, mean, threshold=6.0)
    assert chosen.index.tolist() == [0]
    assert chosen.bound == 6
    assert chosen.energy_share == pytest.approx(25 / 28)


def test_absolute_choice_and_cap() -> None:
    amax = np.array([7.0, 1, 6, 20, 5.9, 6])
    chosen = select_outliers(amax, threshold=6.0, absolute=True, cap=3)
    assert chosen.index.tolist() == [0, 2, 3]
    assert chosen.capped == 1
    assert chosen.limit == 6
    assert select_outliers(amax, threshold=6.0, absolute=True, cap=0).index.size == 0


def test_nothing_stands_out() -> None:
    for amax in (np.zeros(5), np.ones(5), np.zeros(0)):
        chosen = select_outliers(amax, threshold=6.0)
        assert chosen.index.dtype == np.int32
        assert chosen.index.size == 0
        assert chosen.energy_share == 0


def test_the_fewest_columns() -> None:
    amax = np.array([1.0, 3, 2, 1])
    for least, cap, expected in ((0, 4, []), (1, 4, [1]), (2, 4, [1, 2]), (1, 0, [])):
        chosen = select_outliers(amax, threshold=6.0, cap=cap, least=least)
        assert chosen.index.tolist() == expected
        assert chosen.capped == 0
        assert chosen.limit == np.delete(amax, expected).max()


@pytest.mark.parametrize("amax", [[math.nan], [math.inf]])
def test_amplitudes_must_be_finite(amax) -> None:
    with pytest.raises(ValueError, match="finite"):
        select_outliers(np.array(amax), threshold=6.0)
