"""HQQ: fits the bulk of the weights, needs no data."""

from dataclasses import replace

import numpy as np
import pytest
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.granularity import per_block, per_channel
from qpipe.calibrate.qarray import Spec, dequantize
from qpipe.calibrate.weights.hqq import Hqq, shrink
from qpipe.calibrate.weights.rtn import Rtn, RtnMse


def squared_error(method, w, spec):
    return spec.granularity.reduce(np.square(w - dequantize(method(w, spec)), dtype=np.float64), np.add)


@pytest.mark.parametrize("fmt", ["int2", "int4", "uint2", "uint4"])
@pytest.mark.parametrize("granularity", [per_channel(0), per_block(1, 32)])
def test_weight_error_under_heavy_tails_is_lower_than_that_of_rounding(fmt, granularity):
    w = np.random.default_rng(0).standard_t(3, (64, 256)).astype(np.float32)
    fmt = FORMATS.get(fmt)
    spec = Spec(format=fmt, granularity=granularity, symmetric=fmt.is_signed)
    assert squared_error(Hqq(), w, spec).sum() < 0.95 * squared_error(Rtn(), w, spec).sum()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("fmt", ["uint4", "int4", "int8", "float4_e2m1", "mxfp4", "nf4"])
def test_no_scale_is_worse_than_after_the_clip_search(fmt, symmetric):
    w = np.random.default_rng(1).standard_t(3, (48, 96)).astype(np.float32)
    fmt = FORMATS.get(fmt)
    spec = Spec(format=fmt, granularity=per_block(1, fmt.block_size or 16), symmetric=symmetric)
    assert (squared_error(Hqq(), w, spec) <= squared_error(RtnMse(), w, spec) * (1 + 1e-5)).all()


def test_a_zero_point_that_can_move_gains_most():
    """Skewed weights: the zero point of the full range is wrong once the tail is clipped."""
    w = (np.random.default_rng(2).exponential(1, (64, 128)) - 0.2).astype(np.float32)
    spec = Spec(format=FORMATS.get("uint4"), granularity=per_block(1, 32), symmetric=False)
    searched, ours = squared_error(RtnMse(), w, spec), squared_error(Hqq(), w, spec)
    assert ours.sum() < 0.965 * searched.sum()  # 0.974 when the zero point stays
    moved = Hqq()(w, spec).params.zero_point.astype(int) - RtnMse()(w, spec).params.zero_point.astype(int)
    assert set(np.unique(moved)) == {-1, 0, 1}
    assert (ours < searched).mean() > 0.5


@pytest.mark.parametrize("fmt", ["uint4", "int4", "uint2"])
def test_a_zero_point_that_is_no_code_fits_the_weights_better(fmt):
    w = np.random.default_rng(5).standard_normal((64, 256)).astype(np.float32)
    codes = Spec(format=FORMATS.get(fmt), granularity=per_block(1, 32), symmetric=False)
    real = replace(codes, float_zero=True)
    assert squared_error(Hqq(), w, real).sum() < 0.9 * squared_error(Hqq(), w, codes).sum()
    assert (squared_error(Hqq(), w, real) <= squared_error(RtnMse(), w, real) * (1 + 1e-5)).all()
    zero_point = Hqq()(w, real).params.zero_point
    assert np.abs(zero_point - np.rint(zero_point)).mean() > 0.2  # 0.25 when it falls anywhere


def test_values_on_a_shifted_grid_are_found_again():
    """Codes 0 to 3 at 0.1, 0.35, 0.6 and 0.85 with one outlier among them: only s and z together fit the bulk."""
    codes = np.random.default_rng(6).integers(0, 4, (32, 64))
    w = (0.1 + 0.25 * codes).astype(np.float32)
    w[:, 0] = 1.0
    spec = Spec(format=FORMATS.get("uint2"), granularity=per_channel(0), symmetric=False, float_zero=True)
    found = Hqq()(w, spec)
    np.testing.assert_array_equal(found.q[:, 1:], codes[:, 1:])
    np.testing.assert_allclose(dequantize(found)[:, 1:], w[:, 1:], atol=0.02)
    assert squared_error(Hqq(), w, spec).sum() < 0.7 * squared_error(RtnMse(), w, spec).sum()


@pytest.mark.parametrize("granularity", [per_channel(0), per_block(1, 32)])
@pytest.mark.parametrize("fmt", ["int2", "int4", "uint4"])
def test_shrinkage_lowers_the_norm_that_it_stands_for(fmt, granularity):
    """With beta near 0 nothing is an outlier and what remains is least squares: it minimizes p = 2, not p = 0.7."""
    w = np.random.default_rng(2).standard_t(2, (64, 256)).astype(np.float32)
    fmt = FORMATS.get(fmt)
    spec = Spec(format=fmt, granularity=granularity, symmetric=fmt.is_signed)
    norms = [np.sum(np.abs(w - dequantize(m(w, spec)), dtype=np.float64) ** 0.7) for m in (Hqq(), Hqq(beta=1e-6))]
    assert norms[0] < norms[1]


def test_without_iterations_it_is_the_clip_search():
    w = np.random.default_rng(3).standard_t(3, (8, 64)).astype(np.float32)
    spec = Spec(format=FORMATS.get("uint4"), granularity=per_channel(0))
    np.testing.assert_array_equal(Hqq(iterations=0)(w, spec).q, RtnMse()(w, spec).q)


def test_shrink_is_the_soft_threshold_for_p_1_and_keeps_large_errors_below():
    x = np.linspace(-3, 3, 61, dtype=np.float32)
    np.testing.assert_allclose(shrink(x, 2, 1.0), np.sign(x) * np.maximum(np.abs(x) - 0.5, 0), atol=1e-6)
    half = shrink(x, 2, 0.5)
    assert half[30] == 0
    np.testing.assert_array_equal(half, -half[::-1])
    assert half[-1] == pytest.approx(3 - 3**-0.5 / 2, rel=1e-6)  # less of a large error is taken off than by p = 1
    assert (np.abs(half) <= np.abs(x)).all()
