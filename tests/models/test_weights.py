"""Weights on disk."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

from qpipe.models.weights import load_weights, save_weights  # noqa: E402


def test_round_trip_is_float16_and_keeps_integers(tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    module[1].num_batches_tracked.fill_(70_001)
    save_weights(module, tmp_path / "w.npz")
    loaded = load_weights(torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2)), tmp_path / "w.npz")
    assert not loaded.training
    for key, value in module.state_dict().items():
        assert loaded.state_dict()[key].dtype == value.dtype
        expected = value.half().float() if value.is_floating_point() else value
        assert torch.equal(loaded.state_dict()[key], expected)


def test_same_weights_give_the_same_bytes(tmp_path):
    module = torch.nn.Linear(3, 4)
    save_weights(module, tmp_path / "a.npz")
    save_weights(module, tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_other_tensors_are_refused(tmp_path):
    np.savez(tmp_path / "w.npz", weight=np.zeros((4, 3), np.float16))
    with pytest.raises(RuntimeError, match="bias"):
        load_weights(torch.nn.Linear(3, 4), tmp_path / "w.npz")
