"""Bias correction: the mean error of every output channel is gone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.calibrate.bias import correction
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.granularity import PER_TENSOR, per_channel
from qpipe.calibrate.metrics import mse
from qpipe.calibrate.qarray import Spec, fake_quant, minmax_range, params_from_range
from qpipe.calibrate.stats.tokens import Window


def rounded(w, fmt="int4"):
    spec = Spec(format=FORMATS.get(fmt), granularity=per_channel(0))
    return fake_quant(w, params_from_range(minmax_range(w, spec.granularity), spec))


@settings(deadline=None, max_examples=25)
@given(out=st.integers(1, 9), inputs=st.integers(1, 30), seed=st.integers(0, 99))
def test_mean_error_per_channel_is_gone(out, inputs, seed):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((out, inputs)).astype(np.float32)
    x = np.maximum(rng.standard_normal((200, inputs)) + 1, 0)
    w_q = rounded(w)
    before = (x @ w_q.T - x @ w.T).mean(axis=0)
    after = before + correction(w, w_q, x.mean(axis=0))
    np.testing.assert_allclose(after, 0, atol=1e-6)


def test_the_output_error_shrinks():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((16, 64)).astype(np.float32)
    x = np.maximum(rng.standard_normal((500, 64)) + 1, 0)
    fixed = x @ rounded(w).T + correction(w, rounded(w), x.mean(axis=0))
    assert mse(x @ w.T, fixed) < 0.6 * mse(x @ w.T, x @ rounded(w).T)


def test_quantized_inputs_are_accounted_for():
    rng = np.random.default_rng(1)
    w = rng.standard_normal((8, 32)).astype(np.float32)
    x = np.maximum(rng.standard_normal((400, 32)), 0).astype(np.float32)
    coarse = Spec(format=FORMATS.get("uint4"), granularity=PER_TENSOR, symmetric=False)
    x_q = fake_quant(x, params_from_range(minmax_range(x * 0.6, PER_TENSOR), coarse))  # clips, hence a lower mean
    error = x_q.astype(np.float64) @ rounded(w).T - x.astype(np.float64) @ w.T
    mean, mean_q = (a.astype(np.float64).mean(axis=0) for a in (x, x_q))
    np.testing.assert_allclose(error.mean(axis=0) + correction(w, rounded(w), mean, mean_q), 0, atol=1e-6)
    assert np.abs(error.mean(axis=0) + correction(w, rounded(w), mean)).max() > 0.01


def convolve(x, w, groups, pads):
    """Return ``[positions, out]``."""
    window = Window(kernel_shape=w.shape[2:], strides=(1, 1), dilations=(1, 1), pads=pads)
    rows, inputs = len(w) // groups, w.shape[1]
    parts = [
        window.unfold(x[:, g * inputs : (g + 1) * inputs]) @ w[g * rows : (g + 1) * rows].reshape(rows, -1).T
        for g in range(groups)
    ]
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_conv_with_one_mean_per_channel(groups):
    """Exact when every kernel position sees the same mean: no padding and a periodic input, wrapped round once."""
    rng = np.random.default_rng(2)
    w = rng.standard_normal((12, 6 // groups, 3, 3)).astype(np.float32)
    tile = rng.standard_normal((4, 6, 8, 8)) + 1
    x = np.pad(tile, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="wrap")
    error = convolve(x, rounded(w), groups, (0, 0, 0, 0)) - convolve(x, w, groups, (0, 0, 0, 0))
    found = correction(w, rounded(w), tile.mean(axis=(0, 2, 3)), groups=groups)
    assert np.abs(error.mean(axis=0)).max() > 0.01
    np.testing.assert_allclose(error.mean(axis=0) + found, 0, atol=1e-6)


def test_conv_with_padding_is_exact_on_the_unfolded_input():
    rng = np.random.default_rng(3)
    w = rng.standard_normal((5, 3, 3, 3)).astype(np.float32)
    x = rng.standard_normal((4, 3, 6, 6)) + 1
    pads = (1, 1, 1, 1)
    error = convolve(x, rounded(w), 1, pads) - convolve(x, w, 1, pads)
    window = Window(kernel_shape=(3, 3), strides=(1, 1), dilations=(1, 1), pads=pads)
    found = correction(w.reshape(5, -1), rounded(w).reshape(5, -1), window.unfold(x).mean(axis=0))
    np.testing.assert_allclose(error.mean(axis=0) + found, 0, atol=1e-6)


@pytest.mark.parametrize(("w_q", "mean", "groups"), [((2, 4), 3, 1), ((2, 3), 4, 1), ((2, 3), 3, 2)])
def test_shapes_that_do_not_fit_are_refused(w_q, mean, groups):
    with pytest.raises(ValueError, match=r"weight"):
        correction(np.ones((2, 3)), np.ones(w_q), np.ones(mean), groups=groups)
