"""Rescaled channels are told from noise."""

from __future__ import annotations

import numpy as np
import pytest
from qpipe.pipeline.rescaling import Rescaling


def _noise(*pairs: tuple[np.ndarray, np.ndarray]) -> float | None:
    rescaling = Rescaling()
    for reference, approximation in pairs:
        rescaling.update(reference, approximation)
    return rescaling.noise()


@pytest.mark.parametrize(("shape", "axis"), [((64, 16), -1), ((4, 32, 16), -1), ((2, 16, 6, 6), 1)])
def test_noise_behind_a_factor_per_channel(shape: tuple[int, ...], axis: int) -> None:
    rng = np.random.default_rng(0)
    r = rng.normal(size=shape).astype(np.float32)
    noise = rng.normal(scale=0.01, size=shape).astype(np.float32)
    factor = np.geomspace(0.02, 50, 16).astype(np.float32)
    factor = factor.reshape(-1, 1, 1) if axis == 1 else factor
    left = _noise((r, (r + noise) * factor))
    assert left == pytest.approx(np.square(noise).sum() / np.square(r).sum(), rel=0.2)
    assert _noise((r[:1], (r * factor)[:1]), (r[1:], (r * factor)[1:])) == pytest.approx(0, abs=1e-12)


def test_noise_alone_is_no_rescaling() -> None:
    rng = np.random.default_rng(0)
    r = rng.normal(size=(256, 16)).astype(np.float32)
    for scale in (1e-7, 1e-3, 0.1, 1.0, 10.0):
        assert _noise((r, r + rng.normal(scale=scale, size=r.shape).astype(np.float32))) is None


def test_few_values_other_shapes_and_odd_values_claim_nothing() -> None:
    r = np.ones((2, 16), np.float32)
    assert _noise((r, 3 * r)) is None
    assert _noise((np.ones((64, 4)), np.ones((64, 5)))) is None
    assert _noise((np.ones(64), np.ones(64))) is None
    assert _noise() is None
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 4))
    y = 2 * x
    y[0, 0], x[1, 1] = np.nan, -np.inf
    assert _noise((x, y)) == pytest.approx(0, abs=1e-12)
