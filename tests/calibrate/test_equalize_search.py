"""SmoothQuant and AWQ: the float function stays, the error shrinks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.calibrate.equalize import EQUALIZERS, LIMIT, error_parts, output_error
from qpipe.calibrate.equalize.awq import Awq
from qpipe.calibrate.equalize.layer_errors import LayerErrors
from qpipe.calibrate.equalize.smoothquant import WEIGHT_ERROR, SmoothQuant, below, both_series
from qpipe.calibrate.errors import DataError, RecipeError
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.granularity import PER_TENSOR, per_block, per_channel
from qpipe.calibrate.metrics import mse
from qpipe.calibrate.qarray import Spec, dequantize, fake_quant, minmax_range, params_from_range
from qpipe.calibrate.stats.channel_amax import ChannelAmax
from qpipe.calibrate.stats.gram import Gram
from qpipe.calibrate.weights import WeightStats
from qpipe.calibrate.weights.awq_clip import AwqClip
from qpipe.calibrate.weights.rtn import Rtn, RtnMse

W8 = Spec(format=FORMATS.get("int8"), granularity=per_channel(0), narrow_range=True)
X8 = Spec(format=FORMATS.get("int8"), granularity=PER_TENSOR)
W4 = Spec(format=FORMATS.get("int4"), granularity=per_block(1, 32))


def layer(outliers, seed=0, channels=128, out=64, tokens=2000):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, channels)).astype(np.float32)
    x[:, rng.permutation(channels)[: len(outliers)]] *= np.asarray(outliers, np.float32)
    w = (0.05 * rng.standard_normal((out, channels))).astype(np.float32)
    return w, x, WeightStats(gram=Gram.of(x), channels=ChannelAmax.of(x))


def simulate(w, x, s, spec, method=None, stats=None):
    """Return the mean squared output error with x / s in int8 (per tensor) and w s as ``spec`` and ``method`` say."""
    smooth = x / s
    quantized = fake_quant(smooth, params_from_range(minmax_range(smooth, PER_TENSOR), X8))
    weights = dequantize((method or Rtn())(w * s, spec, stats))
    return mse(x @ w.T, quantized @ weights.T)


@pytest.mark.parametrize("name", EQUALIZERS.names())
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 99), alpha=st.sampled_from([None, 0.0, 0.3, 1.0]), dead=st.booleans())
def test_the_float_function_stays_what_it_was(name, seed, alpha, dead):
    w, x, _ = layer([30, 0.01, 1e-6], seed, channels=12, out=5, tokens=40)
    if dead:
        x[:, 3] = 0
        w[:, 5] = 0
    stats = WeightStats(gram=Gram.of(x), channels=ChannelAmax.of(x))
    s = type(EQUALIZERS.get(name))(alpha=alpha)(w, W8, stats, X8)
    assert s.shape == (12,)
    assert s.dtype == np.float32
    assert (s >= 1 / LIMIT).all()
    assert (s <= LIMIT).all()
    np.testing.assert_allclose((x / s) @ (w * s).T, x @ w.T, rtol=1e-4, atol=1e-5)


def test_dead_channels_keep_a_scale_of_one():
    w, x, _ = layer([30], channels=12)
    x[:, 3] = 0
    w[:, 5] = 0
    stats = WeightStats(gram=Gram.of(x), channels=ChannelAmax.of(x))
    assert SmoothQuant(alpha=0.5)(w, W8, stats, X8)[[3, 5]].tolist() == [1, 1]
    assert Awq(alpha=0.5)(w, W8, stats, None)[3] == 1
    nothing = WeightStats(gram=Gram.of(0 * x), channels=ChannelAmax.of(0 * x))
    assert (Awq()(w, W8, nothing, None) == 1).all()
    assert (SmoothQuant()(w, W8, nothing, X8) == 1).all()


def test_smoothquant_is_equation_4():
    w, x, stats = layer([30], channels=12)
    s = SmoothQuant(alpha=0.7)(w, W8, stats, X8)
    np.testing.assert_allclose(s, np.abs(x).max(axis=0) ** 0.7 / np.abs(w).max(axis=0) ** 0.3, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 0.75, None])
def test_smoothquant_makes_int8_better_when_channels_stick_out(alpha):
    w, x, stats = layer([60, 80, 40, 70])
    before = simulate(w, x, np.ones(128, np.float32), W8)
    assert simulate(w, x, SmoothQuant(alpha=alpha)(w, W8, stats, X8), W8) < before / 8


@pytest.mark.parametrize("outliers", [[], [5], [60, 80, 40], [300]])
def test_the_searched_alpha_is_near_the_best_that_can_be_found_by_running_the_layer(outliers):
    w, x, stats = layer(outliers, seed=1)
    fixed = [simulate(w, x, SmoothQuant(alpha=a / 10)(w, W8, stats, X8), W8) for a in range(11)]
    untouched = simulate(w, x, np.ones(128, np.float32), W8)
    searched = simulate(w, x, SmoothQuant()(w, W8, stats, X8), W8)
    assert searched < 1.15 * min(*fixed, untouched)


@pytest.mark.parametrize("outliers", [[], [60, 80, 40]])
def test_the_expected_error_is_the_one_that_shows(outliers):
    w, x, stats = layer(outliers, seed=2)
    for alpha in (0.0, 0.5, 1.0):
        s = SmoothQuant(alpha=alpha)(w, W8, stats, X8)
        expected = output_error(w * s, W8, stats.scaled(s), X8, Rtn())
        assert expected == pytest.approx(simulate(w, x, s, W8), rel=0.3)


SPECS = {
    "per channel": W8,
    "per tensor": Spec(format=FORMATS.get("int8"), granularity=PER_TENSOR),
    "4 bits": Spec(format=FORMATS.get("int4"), granularity=per_channel(0)),
    "asymmetric": Spec(format=FORMATS.get("uint8"), granularity=per_channel(0), symmetric=False),
    "blocks": W4,
}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("x_spec", [X8, None])
@pytest.mark.parametrize("spec", SPECS)
def test_errors_of_a_layer_are_those_of_its_rounded_weight(spec, x_spec, order):
    w, _, stats = layer([60, 0.01, 40], out=600)
    w[[3, 4]], w[:, 7] = 0, 0
    w, alone = np.asarray(w, order=order), WeightStats(channels=stats.channels)
    errors = LayerErrors(w, SPECS[spec], stats, x_spec)
    np.testing.assert_array_equal(errors.w_amax, np.abs(w).max(axis=0))
    for s in (np.ones(128, np.float32), SmoothQuant(alpha=0.6)(w, W8, stats, X8)):
        inputs, expected = errors.total(s, 0), error_parts(w * s, SPECS[spec], alone.scaled(s), x_spec, Rtn())
        weights = errors.total(s) - inputs
        assert errors.total(s, enough=inputs / 2) == inputs
        assert weights == pytest.approx(expected[0], rel=1e-3)
        # Coarse rounding changes how large the weights are, and with them the errors of activations, a little.
        assert inputs == pytest.approx(expected[1], rel=0.1)


@pytest.mark.parametrize("outliers", [[], [5], [60, 80, 40], [300], [3, 10, 30, 100, 300]])
@pytest.mark.parametrize("out", [64, 600])
def test_following_falling_errors_finds_the_best_of_all(outliers, out):
    w, _, stats = layer(outliers, seed=3, out=out)
    errors = LayerErrors(w, W8, stats, X8)
    every = [scale for series in both_series(errors) for scale in series]
    smallest = min(errors.total(s, WEIGHT_ERROR) for s in every)
    # Where channels differ little, so do the errors, and they waver: by less than what is worth a search.
    allowed = 1.0 if max(outliers, default=0) > 5 else 1.005
    assert errors.total(SmoothQuant()(w, W8, stats, X8), WEIGHT_ERROR) <= allowed * smallest


def test_smoothquant_needs_no_gram_matrix():
    w, _, stats = layer([60, 80, 40])
    alone = SmoothQuant()(w, W8, WeightStats(channels=stats.channels), X8)
    np.testing.assert_array_equal(alone, SmoothQuant()(w, W8, stats, X8))


def test_a_ceiling_scales_only_the_channels_above_it():
    """Powers of all magnitudes would stir up every column of the weights."""
    s = below(np.array([8.0, 1.0, 0.0, 4.0]), np.array([1.0, 1.0, 1.0, 0.0]), 0.25)
    assert s.tolist() == [4, 1, 1, 1]


def test_known_bounds_make_the_expected_error_that_of_a_one_sided_tensor():
    w, x, _ = layer([])
    x = np.maximum(x, 0)
    one_sided = Spec(format=FORMATS.get("uint8"), granularity=PER_TENSOR, symmetric=False)
    known = WeightStats(channels=ChannelAmax.of(x), lo=0.0, hi=float(x.max()))
    unknown = WeightStats(channels=ChannelAmax.of(x))
    assert known.interval == (0.0, x.max())
    assert known.scaled(np.full(128, 2.0)).interval == (0.0, x.max() / 2)
    parts = [error_parts(w, W8, stats, one_sided, Rtn())[1] for stats in (known, unknown)]
    assert parts[0] == pytest.approx(parts[1] / 4)


def weight_error(w, x, s, spec, method, stats):
    return mse(x @ w.T, (x / s) @ dequantize(method(w * s, spec, stats.scaled(s))).T)


@pytest.mark.parametrize("spec", [W4, Spec(format=FORMATS.get("int4"), granularity=per_channel(0))])
def test_awq_protects_the_weights_that_meet_large_inputs(spec):
    w, x, stats = layer([30, 20, 10, 5] * 4)
    one = np.ones(128, np.float32)
    s = Awq()(w, spec, stats, None)
    assert np.corrcoef(s, stats.channels.mean)[0, 1] > 0.9
    for method, gain in ((Rtn(), 0.75), (RtnMse(), 0.97)):  # the latter knows of the large inputs by itself
        assert weight_error(w, x, s, spec, method, stats) < gain * weight_error(w, x, one, spec, method, stats)
    clipped = weight_error(w, x, s, spec, AwqClip(), stats)
    assert clipped < weight_error(w, x, s, spec, Rtn(), stats)


def test_awq_leaves_equal_channels_alone():
    w, _, _ = layer([])
    x = np.eye(128, dtype=np.float32)
    stats = WeightStats(gram=Gram.of(x), channels=ChannelAmax.of(x))
    np.testing.assert_array_equal(Awq()(w, W4, stats, None), np.ones(128))


@pytest.mark.parametrize("name", EQUALIZERS.names())
def test_missing_or_unfit_statistics_are_an_error(name):
    w, x, stats = layer([], channels=12)
    for wrong in (None, WeightStats(gram=stats.gram), WeightStats(gram=stats.gram, channels=ChannelAmax.of(x[:, :5]))):
        with pytest.raises(DataError, match=name):
            EQUALIZERS.get(name)(w, W8, wrong, X8)
    without = WeightStats(channels=stats.channels)
    if "gram" not in EQUALIZERS.get(name).needs:
        assert EQUALIZERS.get(name)(w, W8, without, X8).shape == (12,)
        return
    with pytest.raises(DataError, match="Gram"):
        EQUALIZERS.get(name)(w, W8, without, X8)


@pytest.mark.parametrize("name", EQUALIZERS.names())
def test_registered_like_everything_else(name):
    equalizer = EQUALIZERS.get(name)
    assert equalizer.needs <= set(WeightStats.__dataclass_fields__)
    assert all(part in type(equalizer).__doc__ for part in ("What:", "When to use:", "Options:", "Source:"))
    assert EQUALIZERS.resolve(f"{name}:0.5").alpha == 0.5
    with pytest.raises(RecipeError):
        EQUALIZERS.resolve(f"{name}:1.5")
