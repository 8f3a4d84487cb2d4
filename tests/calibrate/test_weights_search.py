"""The layout of one row per scale, and the clip search in it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.granularity import PER_TENSOR, per_block, per_channel
from qpipe.calibrate.qarray import Range, Spec, dequantize, fake_quant, minmax_range, params_from_range
from qpipe.calibrate.stats.channel_amax import ChannelAmax
from qpipe.calibrate.weights import WEIGHT_METHODS, WeightStats, search
from qpipe.calibrate.weights.groups import from_groups, row_spec, to_groups
from qpipe.calibrate.weights.rtn import Rtn, RtnMse
from qpipe.calibrate.weights.search import mse_range

GRANULARITIES = [
    PER_TENSOR,
    *(per_channel(a) for a in (0, 1, -1)),
    *(per_block(a, b) for a in (0, 1) for b in (1, 3, 8)),
]


@settings(deadline=None, max_examples=60)
@given(granularity=st.sampled_from(GRANULARITIES), out=st.integers(1, 9), inputs=st.integers(1, 17))
def test_groups_are_the_elements_of_each_scale(granularity, out, inputs):
    x = np.random.default_rng(0).standard_normal((out, inputs)).astype(np.float32)
    groups = to_groups(x, granularity)
    for ufunc in (np.minimum, np.maximum):
        reduced = ufunc.reduce(groups, axis=1, initial=0)[:, None]
        wanted = ufunc(granularity.reduce(x, ufunc), 0)
        np.testing.assert_array_equal(from_groups(reduced, granularity, x.shape), wanted)


@pytest.mark.parametrize(
    "fmt", ["int2", "uint2", "int4", "uint4", "int8", "float4_e2m1", "float8_e4m3fn", "mxfp4", "nf4"]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_scale_is_worse_than_the_full_range(fmt, symmetric):
    """Holds for each scale by itself, not only on average; the exception is a scale relative to one of the tensor."""
    fmt = FORMATS.get(fmt)
    w = np.random.default_rng(1).standard_t(3, (40, 70)).astype(np.float32)
    spec = Spec(format=fmt, granularity=per_block(1, fmt.block_size or 16), symmetric=symmetric)

    def cost(rng):
        return spec.granularity.reduce(np.square(w - fake_quant(w, params_from_range(rng, spec))), np.add)

    full, found = cost(minmax_range(w, spec.granularity)), cost(mse_range(w, spec))
    assert (found <= full * (1 + 1e-5)).all()
    assert found.sum() < (0.99 if fmt.bits <= 4 else 1.0001) * full.sum()


def test_two_level_scales_gain_on_the_whole():
    w = np.random.default_rng(1).standard_t(3, (40, 64)).astype(np.float32)
    spec = Spec(format=FORMATS.get("nvfp4"), granularity=per_block(1, 16))
    errors = [np.square(w - dequantize(method(w, spec))).sum() for method in (Rtn(), RtnMse())]
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_search_finds_what_trying_every_range_finds(granularity):
    w = np.random.default_rng(2).standard_t(2, (9, 24)).astype(np.float32)
    spec = Spec(format=FORMATS.get("int4"), granularity=granularity)
    full = minmax_range(w, granularity)

    def cost(ratio):
        rng = Range(lo=full.lo * np.float32(ratio), hi=full.hi * np.float32(ratio))
        difference = np.square(w - fake_quant(w, params_from_range(rng, spec)), dtype=np.float64)
        return granularity.reduce(difference, np.add)

    every = np.min([cost(ratio) for ratio in np.linspace(1, 0.3, 24)], axis=0)
    found = mse_range(w, spec)
    difference = np.square(w - fake_quant(w, params_from_range(found, spec)), dtype=np.float64)
    np.testing.assert_allclose(granularity.reduce(difference, np.add), every, rtol=1e-5, atol=1e-12)


def test_heavy_tails_are_clipped_and_uniform_weights_are_not():
    rng = np.random.default_rng(3)
    spec = Spec(format=FORMATS.get("int4"), granularity=per_channel(0), narrow_range=True)
    heavy = rng.standard_t(2, (8, 512)).astype(np.float32)
    flat = rng.uniform(-1, 1, (8, 512)).astype(np.float32)
    kept = [np.median(mse_range(w, spec).amax / minmax_range(w, spec.granularity).amax) for w in (heavy, flat)]
    assert kept[0] < 0.85
    assert kept[1] > 0.9


def test_a_power_of_two_scale_may_grow():
    """7.9 in a block of mxfp4 gets the scale 1 and saturates at 6; with many such values the scale 2 is better."""
    w = np.full((1, 32), 7.9, np.float32)
    spec = Spec(format=FORMATS.get("mxfp4"), granularity=per_block(1, 32))
    assert dequantize(Rtn()(w, spec)).max() == 6
    assert dequantize(RtnMse()(w, spec)).max() == 8


def test_importance_protects_the_weights_that_meet_large_inputs():
    rng = np.random.default_rng(4)
    w = rng.standard_t(3, (32, 64)).astype(np.float32)
    x = rng.standard_normal((500, 64)).astype(np.float32)
    x[:, :4] *= 30
    spec = Spec(format=FORMATS.get("int4"), granularity=per_channel(0))
    stats = WeightStats(channels=ChannelAmax.of(x))
    plain, aware = (dequantize(WEIGHT_METHODS.get("rtn_mse")(w, spec, s)) for s in (None, stats))
    assert np.square(w - plain).sum() < np.square(w - aware).sum()
    assert np.square(x @ (w - aware).T).sum() < 0.8 * np.square(x @ (w - plain).T).sum()


@pytest.mark.parametrize("fmt", ["int2", "int4", "uint4", "int8", "float4_e2m1", "mxfp4", "nf4", "nvfp4"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_rows_that_are_done_early_have_the_range_of_a_whole_search(fmt, symmetric, weighted, monkeypatch):
    fmt = FORMATS.get(fmt)
    rng = np.random.default_rng(6)
    w = rng.standard_t(3, (500, fmt.block_size or 32)).astype(np.float32)
    importance = rng.uniform(0, 2, w.shape[1]) if weighted else np.ones(w.shape[1])
    spec = Spec(format=fmt, granularity=per_block(1, w.shape[1]), symmetric=symmetric)
    looked_at = []

    def counted(x, params):
        looked_at.append(len(x) if x.shape[1] == w.shape[1] else 0)
        return fake_quant(x, params)

    def error(difference, rows):
        return np.square(difference, dtype=np.float64) @ importance

    monkeypatch.setattr(search, "fake_quant", counted)
    whole = search.search_clip(w, row_spec(spec), error)
    every = sum(looked_at)
    looked_at.clear()
    early = mse_range(w, spec, importance if weighted else None)
    costs = [error(fake_quant(w, params_from_range(found, row_spec(spec))) - w, None) for found in (early, whole)]
    np.testing.assert_allclose(costs[0], costs[1], rtol=1e-5)
    assert every == 25 * len(w)
    assert sum(looked_at) <= (0.8 if fmt.bits > 3 else 1) * every


def test_large_weights_are_searched_in_chunks_without_a_seam():
    w = np.random.default_rng(5).standard_normal((600, 512)).astype(np.float32)  # more than two chunks
    spec = Spec(format=FORMATS.get("int4"), granularity=per_block(1, 32))
    whole = mse_range(w, spec)
    for rows in (slice(0, 7), slice(250, 260), slice(593, 600)):
        part = mse_range(w[rows], spec)
        np.testing.assert_array_equal(whole.hi[rows], part.hi)
        np.testing.assert_array_equal(whole.lo[rows], part.lo)
