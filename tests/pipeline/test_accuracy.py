"""Accuracy gathered batch by batch equals the definitions on everything at once."""

from __future__ import annotations

import dataclasses
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from qpipe.calibrate import metrics
from qpipe.pipeline import accuracy
from qpipe.pipeline.accuracy import Comparison


def _compare(pairs: list[tuple[np.ndarray, np.ndarray]], scores: str | None = None) -> accuracy.Accuracy:
    comparison = Comparison(scores)
    for reference, approximation in pairs:
        comparison.update(reference, approximation)
    return comparison.result()


SAMPLES = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 6), st.integers(1, 4)), elements=st.floats(-1e3, 1e3, width=32)
)


@settings(max_examples=80, deadline=None)
@given(st.lists(SAMPLES, min_size=1, max_size=4), st.integers(0, 2**31))
def test_batches_together_are_the_metrics_of_everything(batches: list[np.ndarray], seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = [(b, b + rng.normal(scale=0.1, size=b.shape).astype(np.float32)) for b in batches]
    found = _compare(pairs)
    r, a = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (0, 1))
    for name in ("sqnr_db", "cosine", "mse", "max_abs"):
        assert getattr(found, name) == pytest.approx(getattr(metrics, name)(r, a), rel=1e-6, abs=1e-9)
    each = [metrics.cosine(x, y) for pair in pairs for x, y in zip(*pair, strict=True)]
    assert found.cosine_min == pytest.approx(min(each), abs=1e-9)
    assert found.cosine_mean == pytest.approx(np.mean(each), abs=1e-9)
    assert found.samples == len(each)
    assert found.values == r.size


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    r = rng.normal(size=(7, 5, 11)).astype(np.float32)
    a = r + rng.normal(scale=0.05, size=r.shape).astype(np.float32)
    whole = _compare([(r, a)], "logits")
    for chunk in (1, 13, 60):
        monkeypatch.setattr(accuracy, "CHUNK", chunk)
        parts = _compare([(r, a)], "logits")
        for name, value in dataclasses.asdict(whole).items():
            assert getattr(parts, name) == (value if value is None else pytest.approx(value, rel=1e-12)), name


def test_scores_by_hand() -> None:
    r = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    a = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]))
    found = _compare([(r, a)], "logits")
    divergence = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert found.top1 == 0.5
    assert found.kld_mean == pytest.approx(divergence / 2)
    assert found.kld_p999 == pytest.approx(divergence, rel=2**-7)
    assert found.kld_median == pytest.approx(0, abs=1e-9)
    same = _compare([(np.exp(r), np.exp(a))], "probabilities")
    assert same.kld_mean == pytest.approx(found.kld_mean)
    assert _compare([(r, a)]).top1 is None


def test_logits_may_be_shifted_and_masked() -> None:
    """A softmax knows no constant offset; minus infinity is a mask that both share."""
    r = np.array([[1.0, 2.0, -np.inf]])
    found = _compare([(r, r + 5)], "logits")
    assert found.kld_mean == pytest.approx(0, abs=1e-12)
    assert found.top1 == 1.0
    assert found.nonfinite == 0
    assert found.values == 2


def test_a_nan_is_counted_and_spoils_every_figure() -> None:
    r = np.ones((2, 3), np.float32)
    a = r.copy()
    a[1, 2] = np.nan
    found = _compare([(r, r), (r, a), (r, r)])
    assert found.nonfinite == 1
    for name in ("sqnr_db", "cosine", "mse", "max_abs", "cosine_min", "cosine_mean"):
        assert math.isnan(getattr(found, name)), name


def test_infinities_of_the_approximation_are_no_success() -> None:
    found = _compare([(np.ones((1, 2), np.float32), np.array([[1, np.inf]], np.float32))])
    assert found.nonfinite == 1
    assert found.sqnr_db == -math.inf
    assert not found.cosine >= 0.5


def test_equal_zero_integers_and_odd_types() -> None:
    zeros = np.zeros((2, 3), np.float32)
    found = _compare([(zeros, zeros)])
    assert (found.sqnr_db, found.cosine, found.mse) == (math.inf, 1.0, 0.0)
    integers = _compare([(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5]))])
    assert integers.same == 0.75
    assert _compare([(zeros, zeros)]).same is None
    half = np.array([[1, 2]], ml_dtypes.bfloat16)
    assert _compare([(half, half)]).values == 2
    assert _compare([(np.array(3.0), np.array(4.0))]).max_abs == 1.0


def test_texts_and_sequences() -> None:
    one, other = np.array(["a", "b"], object), np.array(["a", "c"], object)
    found = _compare([(one, one), (one, other)])
    assert (found.same, found.values, found.max_abs) == (0.75, 4, 1.0)
    assert found.sqnr_db == pytest.approx(10 * math.log10(4))
    tensors = np.empty(2, object)
    tensors[0], tensors[1] = np.ones((2, 3), np.float32), np.zeros(3, np.float32)
    assert (_compare([(tensors, tensors)]).values, _compare([(tensors, tensors[:1])]).mismatched) == (9, 1)


def test_other_shapes_are_counted_apart() -> None:
    found = _compare([(np.ones((2, 3)), np.ones((2, 4))), (np.ones((2, 3)), np.ones((2, 3)))])
    assert found.mismatched == 1
    assert found.values == 6


def test_memory_does_not_grow_with_batches() -> None:
    import tracemalloc

    comparison, x = Comparison("logits"), np.random.default_rng(0).normal(size=(8, 50)).astype(np.float32)
    comparison.update(x, x + 0.01)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(200):
        comparison.update(x, x + 0.01)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 200_000
