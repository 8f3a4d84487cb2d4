"""A corrected weight answers the float model's output from the input that the quantized layers before it give."""

import numpy as np
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.granularity import per_block
from qpipe.calibrate.qarray import Spec, dequantize
from qpipe.calibrate.stats.gram import Gram
from qpipe.calibrate.weights import WeightStats
from qpipe.calibrate.weights.correction import corrected
from qpipe.calibrate.weights.gptq import Gptq


def case(seed=0, tokens=4000, channels=48, noise=0.15):
    """Return w, x as it was, and x as the quantized layers give it: some of it lost, some of it noise."""
    rng = np.random.default_rng(seed)
    was = rng.standard_normal((tokens, 12)) @ rng.standard_normal((12, channels)) + rng.standard_normal(
        (tokens, channels)
    )
    now = 0.9 * was + noise * was.std() * rng.standard_normal(was.shape)
    w = rng.standard_normal((32, channels)).astype(np.float32)
    return w, was.astype(np.float32), now.astype(np.float32)


def stats_of(was, now):
    drift = (was - now).astype(np.float64).T @ now.astype(np.float64)
    return WeightStats(gram=Gram.of(now), drift=drift)


def error(w, w_q, was, now):
    return float(np.square(was @ w.T - now @ w_q.T).mean())


def test_the_output_comes_closer_to_the_float_models_on_new_tokens():
    w, was, now = case()
    half = len(was) // 2
    fit = corrected(w, stats_of(was[:half], now[:half]))
    assert error(w, fit, was[half:], now[half:]) < 0.8 * error(w, w, was[half:], now[half:])


def test_rounding_the_corrected_weight_beats_rounding_the_weight():
    w, was, now = case()
    spec, half = Spec(format=FORMATS.get("int4"), granularity=per_block(1, 16)), len(was) // 2
    stats = stats_of(was[:half], now[:half])
    plain, fit = (dequantize(Gptq()(each, spec, stats)) for each in (w, corrected(w, stats)))
    assert error(w, fit, was[half:], now[half:]) < 0.9 * error(w, plain, was[half:], now[half:])


def test_it_is_the_damped_least_squares_fit():
    w, was, now = case(tokens=300)
    x, target = now.astype(np.float64), was.astype(np.float64) @ w.T
    gram = x.T @ x
    ridge = 0.2 * np.diag(np.diag(gram))
    wanted = np.linalg.solve(gram + ridge, x.T @ target + ridge @ w.T).T
    np.testing.assert_allclose(corrected(w, stats_of(was, now)), wanted, rtol=1e-3, atol=1e-4)


def test_without_drift_nothing_changes():
    w, was, _ = case()
    for stats in (None, WeightStats(), WeightStats(gram=Gram.of(was))):
        assert corrected(w, stats) is w
    np.testing.assert_array_equal(corrected(w, stats_of(was, was)), w)


def test_dead_channels_and_too_few_tokens_do_no_harm():
    w, was, now = case(tokens=5)
    was[:, 3] = now[:, 3] = 0
    fit = corrected(w, stats_of(was, now))
    assert np.isfinite(fit).all()
    np.testing.assert_array_equal(fit[:, 3], w[:, 3])


def test_a_channel_scale_does_not_change_what_is_corrected():
    w, was, now = case()
    s = np.geomspace(0.1, 10, w.shape[1]).astype(np.float32)
    stats = stats_of(was, now)
    np.testing.assert_allclose(corrected(w * s, stats.scaled(s)) / s, corrected(w, stats), rtol=1e-3, atol=1e-4)
