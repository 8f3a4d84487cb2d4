"""Cross-layer equalization: the chain computes the same, its channels are balanced."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.calibrate.equalize.cross_layer import cross_layer, magnitudes
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.granularity import PER_TENSOR
from qpipe.calibrate.metrics import mse
from qpipe.calibrate.qarray import Spec, fake_quant, minmax_range, params_from_range


def unbalanced(rng, shape, axis):
    """A weight whose channels along ``axis`` differ by orders of magnitude."""
    factors = 10 ** rng.uniform(-2, 1, shape[axis])
    return rng.standard_normal(shape) * factors.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def network(seed=0):
    """Pointwise Conv, depthwise Conv, pointwise Conv, as in MobileNet."""
    rng = np.random.default_rng(seed)
    weights = [unbalanced(rng, (24, 6), 0), unbalanced(rng, (24, 1, 3), 0), unbalanced(rng, (5, 24), 1)]
    return weights, [rng.standard_normal(24), rng.standard_normal(24), rng.standard_normal(5)], rng


def run(weights, biases, x):
    """x [n, 6, length] -> [n, 5, length - 2], with Relu between."""
    first = np.maximum(np.einsum("oi,nil->nol", weights[0], x) + biases[0][:, None], 0)
    taps = np.lib.stride_tricks.sliding_window_view(first, 3, axis=2)
    second = np.maximum(np.einsum("ok,nolk->nol", weights[1][:, 0], taps) + biases[1][:, None], 0)
    return np.einsum("oi,nil->nol", weights[2], second) + biases[2][:, None]


def equalized(weights, biases):
    s1, s2 = cross_layer([magnitudes(weights[0]), magnitudes(weights[1], groups=24), magnitudes(weights[2])])
    moved = [weights[0] / s1[:, None], weights[1] * s1[:, None, None] / s2[:, None, None], weights[2] * s2]
    return moved, [biases[0] / s1, biases[1] / s2, biases[2]]


def per_tensor_int8(w):
    spec = Spec(format=FORMATS.get("int8"))
    return fake_quant(w.astype(np.float32), params_from_range(minmax_range(w, PER_TENSOR), spec)).astype(np.float64)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 999))
def test_the_float_function_stays_what_it_was(seed):
    weights, biases, rng = network(seed)
    x = rng.standard_normal((3, 6, 9))
    np.testing.assert_allclose(run(*equalized(weights, biases), x), run(weights, biases, x), rtol=1e-9, atol=1e-9)


def test_what_makes_a_channel_and_what_reads_it_end_up_equal():
    weights, biases, _ = network()
    (first, depthwise, last), _ = equalized(weights, biases)
    made, middle, read = np.abs(first).max(1), np.abs(depthwise).max((1, 2)), np.abs(last).max(0)
    np.testing.assert_allclose(made, middle, rtol=1e-3)
    np.testing.assert_allclose(middle, read, rtol=1e-3)


def test_the_scale_of_a_pair_is_the_paper_s():
    scale = cross_layer([np.array([[1.0, 9.0], [4.0, 2.0]]), np.array([[1.0, 1.0], [0.5, 16.0]])])
    np.testing.assert_allclose(scale[0], [3.0, 0.5])


def test_weights_with_one_scale_lose_less():
    weights, biases, rng = network(3)
    x = rng.standard_normal((20, 6, 9))
    exact = run(weights, biases, x)
    before = mse(exact, run([per_tensor_int8(w) for w in weights], biases, x))
    moved, shifted = equalized(weights, biases)
    assert mse(exact, run([per_tensor_int8(w) for w in moved], shifted, x)) < before / 10


def test_dead_channels_stay_as_they_are():
    first, following = np.ones((3, 2)), np.ones((4, 3))
    first[0] = 0
    following[:, 1] = 0
    assert cross_layer([first * 5, following])[0].tolist() == pytest.approx([1, 1, 5**0.5])


def test_magnitudes_of_a_grouped_conv_are_block_diagonal():
    w = np.arange(1, 25, dtype=np.float64).reshape(4, 2, 3) * -1
    expected = np.zeros((4, 4))
    expected[:2, :2], expected[2:, 2:] = [[3, 6], [9, 12]], [[15, 18], [21, 24]]
    np.testing.assert_array_equal(magnitudes(w, groups=2), expected)


def test_layers_that_do_not_follow_each_other_are_refused():
    with pytest.raises(ValueError, match="chain"):
        cross_layer([np.ones((3, 2)), np.ones((4, 5))])
