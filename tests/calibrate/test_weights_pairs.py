"""Weights for kernels that add two products in 16 bits, and one range for all weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.granularity import PER_TENSOR, per_channel
from qpipe.calibrate.qarray import Spec, dequantize, minmax_range, params_from_range, quantize
from qpipe.calibrate.weights import WEIGHT_METHODS
from qpipe.calibrate.weights.pairs import FEW_INPUTS, PAIR_LIMIT, limit_pairs, pair_safe

INT8 = FORMATS.get("int8")


def spec(*, channels: bool = True, limit: int = PAIR_LIMIT) -> Spec:
    return Spec(
        format=INT8, granularity=per_channel(0) if channels else PER_TENSOR, narrow_range=True, pair_limit=limit
    )


def pairs(codes: np.ndarray) -> np.ndarray:
    """Sums of neighbouring codes of one sign, 0 for others."""
    wide = codes.astype(np.int64)[:, : codes.shape[1] - codes.shape[1] % 2].reshape(len(codes), -1, 2)
    alike = np.sign(wide[..., 0]) == np.sign(wide[..., 1])
    return np.abs(wide.sum(axis=2)) * alike


def weights(out: int, inputs: int, seed: int, tail: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(out, inputs)) + tail * rng.standard_t(2, size=(out, inputs))).astype(np.float32)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(2, 254), st.integers(0, 999))
def test_limited_codes_are_the_nearest_that_keep_to_the_limit(out: int, inputs: int, limit: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-127, 128, (out, inputs)).astype(np.int8)
    limited = limit_pairs(codes, limit)
    assert pairs(limited).max(initial=0) <= limit
    untouched = np.repeat(pairs(codes) <= limit, 2, axis=1)
    assert (limited[:, : untouched.shape[1]] == codes[:, : untouched.shape[1]])[untouched].all()
    moved = np.abs(limited.astype(int) - codes)[:, : untouched.shape[1]].reshape(out, -1, 2)
    assert (np.abs(moved[..., 0] - moved[..., 1]) <= 1).all()
    np.testing.assert_array_equal(limit_pairs(limited, limit), limited)


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 5),
    inputs=st.integers(1, 2 * FEW_INPUTS),
    seed=st.integers(0, 999),
    tail=st.sampled_from([0.0, 0.3]),
    channels=st.booleans(),
)
def test_it_beats_what_it_replaces(out: int, inputs: int, seed: int, tail: float, channels: bool) -> None:
    """Never much worse than giving pairs way at the plain scale, or than codes of 7 bits."""
    w, asked = weights(out, inputs, seed, tail), spec(channels=channels)
    found = pair_safe(w, asked)
    assert pairs(found.q).max(initial=0) <= PAIR_LIMIT
    plain = quantize(w, params_from_range(minmax_range(w, asked.granularity), asked))
    cut = limit_pairs(plain.q, PAIR_LIMIT) * np.float64(1) * plain.params.scale
    seven = params_from_range(minmax_range(w, asked.granularity), Spec(
        format=INT8, granularity=asked.granularity, narrow_range=True, reduce_bits=1
    ))  # fmt: skip
    mine = np.square(dequantize(found) - w).sum()
    assert mine <= 1.25 * np.square(cut - w).sum() + 1e-12
    if inputs >= 32:  # with few, chance may favour the scale of 7 bits
        assert mine <= 1.25 * np.square(dequantize(quantize(w, seven)) - w).sum()


def test_the_expected_error_chooses_nearly_as_well_as_trying_every_scale() -> None:
    w = weights(32, 4 * FEW_INPUTS, 1, 0.0)
    found = np.square(dequantize(pair_safe(w, spec())) - w).sum(axis=1)
    base = params_from_range(minmax_range(w, per_channel(0)), spec())
    best = np.full(len(w), np.inf)
    for growth in np.linspace(1, 2, 41):
        scale = base.scale.astype(np.float64) * growth
        codes = limit_pairs(np.clip(np.rint(w / scale), -127, 127).astype(np.int8), PAIR_LIMIT)
        best = np.minimum(best, np.square(codes * scale - w).sum(axis=1))
    assert found.sum() <= 1.03 * best.sum()


def test_one_range_for_all_weights() -> None:
    w = np.float32([[0.5, -1.0], [2.0, 0.25]])
    plain = Spec(format=INT8, narrow_range=True)
    found = WEIGHT_METHODS.resolve("fixed:2.54")(w, plain)
    assert found.params.scale == np.float32(0.02)
    np.testing.assert_array_equal(found.q, np.rint(w / np.float32(0.02)))
    own = WEIGHT_METHODS.get("fixed")(w, plain)
    assert own.params.scale == np.float32(2 / 127)
    np.testing.assert_array_equal(WEIGHT_METHODS.resolve("fixed:0.5")(w, plain).q, [[127, -127], [127, 64]])


@pytest.mark.parametrize("value", ["fixed:-1", "fixed:inf", "fixed:x"])
def test_a_range_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(Exception, match="fixed"):
        WEIGHT_METHODS.resolve(value)
