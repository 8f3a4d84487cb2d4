"""Per-channel magnitudes, Gram matrices, patches of a Conv and outlier channels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from qpipe.calibrate.stats.channel_amax import ChannelAmax, outlier_channels
from qpipe.calibrate.stats.gram import Gram
from qpipe.calibrate.stats.tokens import Window, as_tokens

TOKENS = hnp.arrays(np.float32, st.tuples(st.integers(1, 20), st.just(3)), elements=st.floats(-8, 8, width=32))


@given(TOKENS)
def test_channel_statistics_are_what_they_say(x):
    stats = ChannelAmax.of(x)
    wide = np.abs(x.astype(np.float64))
    assert np.array_equal(stats.amax, wide.max(axis=0).astype(np.float32))
    assert np.allclose(stats.mean, wide.mean(axis=0), rtol=1e-12)
    assert np.allclose(stats.energy, (wide**2).sum(axis=0), rtol=1e-12)


@given(TOKENS, st.integers(0, 20))
def test_channel_merge_is_exact_in_amax_and_tokens(x, cut):
    cut = min(cut, len(x))
    one, other, whole = ChannelAmax.of(x[:cut]), ChannelAmax.of(x[cut:]), ChannelAmax.of(x)
    for merged in (one.merge(other), other.merge(one)):
        assert np.array_equal(merged.amax, whole.amax)
        assert merged.tokens == whole.tokens
        assert np.allclose(merged.total, whole.total, rtol=1e-14)
    assert np.array_equal(one.merge(other).total, other.merge(one).total)


@given(TOKENS, st.integers(0, 20))
def test_gram_merges_to_the_whole(x, cut):
    cut = min(cut, len(x))
    wide = x.astype(np.float64)
    merged = Gram.of(x[:cut]).merge(Gram.of(x[cut:]))
    assert merged.tokens == len(x)
    assert np.allclose(merged.matrix, wide.T @ wide, rtol=1e-12, atol=1e-12)
    assert np.allclose(merged.matrix, merged.matrix.T, rtol=1e-15)


def test_gram_of_many_rows_is_cut_into_passes():
    x = np.random.default_rng(0).standard_normal((10_000, 4)).astype(np.float32)
    wide = x.astype(np.float64)
    assert np.allclose(Gram.of(x).matrix, wide.T @ wide, rtol=1e-12)


@pytest.mark.parametrize("kind", [ChannelAmax, Gram])
def test_other_channel_counts_do_not_merge(kind):
    with pytest.raises(ValueError, match="3 channels cannot be merged with 4"):
        kind.of(np.ones((2, 3), np.float32)).merge(kind.of(np.ones((2, 4), np.float32)))


@pytest.mark.parametrize(("axis", "shape"), [(-1, (30, 5)), (1, (50, 3)), (0, (75, 2))])
def test_tokens_keep_the_channel_axis(axis, shape):
    x = np.random.default_rng(1).standard_normal((2, 3, 5, 5)).astype(np.float32)
    tokens = as_tokens(x, axis)
    assert tokens.shape == shape
    moved = np.moveaxis(x, axis, 0).reshape(shape[1], -1)
    assert np.array_equal(tokens.T, moved)


def test_tokens_drop_what_is_no_measurement():
    x = np.array([[1, np.nan], [np.inf, -2], [-3.4e38, 5]], np.float32)
    assert as_tokens(x).tolist() == [[1, 0], [0, -2], [0, 5]]


@settings(max_examples=40)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(*[st.integers(0, 2)] * 4),
)
def test_patches_times_weight_is_the_convolution(kernel, strides, dilations, pads):
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    rng = np.random.default_rng(5)
    x = rng.integers(-4, 5, (2, 3, 7, 6)).astype(np.float32)
    w = rng.integers(-4, 5, (4, 3, *kernel)).astype(np.float32)
    attributes = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "pads": pads}
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], **attributes)
    infos = [onnx.helper.make_tensor_value_info(name, 1, None) for name in "xwy"]
    graph = onnx.helper.make_graph([node], "g", infos[:2], infos[2:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    expected = ReferenceEvaluator(model).run(None, {"x": x, "w": w})[0]
    patches = as_tokens(x, window=Window(**attributes))
    product = patches @ w.reshape(4, -1).T
    assert np.array_equal(product, np.moveaxis(expected, 1, -1).reshape(-1, 4))


def test_outlier_channels_are_found_with_their_energy():
    x = np.random.default_rng(2).standard_normal((500, 64)).astype(np.float32)
    x[:, 7] *= 100
    x[:, 30] *= 30
    found = outlier_channels(ChannelAmax.of(x))
    assert [f.channel for f in found] == [7, 30]
    energy = np.square(x.astype(np.float64)).sum(axis=0)
    assert found[0].share == pytest.approx(energy[7] / energy.sum(), rel=1e-12)
    assert found[0].share > 0.9
    assert found[1].amax == np.abs(x[:, 30]).max()
    assert outlier_channels(ChannelAmax.of(x), limit=1) == found[:1]


def test_even_channels_have_no_outliers():
    assert outlier_channels(ChannelAmax.of(np.ones((4, 8), np.float32))) == []
    assert outlier_channels(ChannelAmax.of(np.zeros((4, 8), np.float32))) == []
    assert outlier_channels(ChannelAmax.of(np.zeros((4, 0), np.float32))) == []
