"""digits_cnn: accuracy, layers, data."""

from __future__ import annotations

import numpy as np
import pytest
from qpipe.calibrate.errors import DataError
from qpipe.models import digits_cnn

pytest.importorskip("sklearn")


@pytest.mark.torch
def test_float_accuracy(built, run):
    outputs = run("digits_cnn", built("digits_cnn"), digits_cnn.evaluation_batches())
    assert digits_cnn.score(outputs)["accuracy"] >= 0.985


@pytest.mark.torch
def test_layers_that_a_convolutional_net_brings(built):
    from torch import nn

    kinds = [type(part) for part in built("digits_cnn").modules()]
    convolutions = [part for part in built("digits_cnn").modules() if isinstance(part, nn.Conv2d)]
    assert kinds.count(nn.BatchNorm2d) == len(convolutions) == 7
    assert any(c.groups == c.in_channels > 1 for c in convolutions)
    assert nn.Linear in kinds


def test_split_covers_all_digits_once():
    from qpipe.models.digits_cnn.data import split
    from sklearn.datasets import load_digits

    data = split()
    everything = np.concatenate([data.train_images, data.test_images])[:, 0]
    assert len(data.test_images) == 600
    expected = (load_digits().images / 16).astype(np.float32)
    assert sorted(i.tobytes() for i in everything) == sorted(i.tobytes() for i in expected)
    assert np.bincount(data.test_labels, minlength=10).min() >= 40


def test_batches_have_the_stated_shape():
    calibration = list(digits_cnn.calibration_batches())
    assert [b["image"].shape for b in calibration] == [(32, 1, 8, 8)] * 4
    evaluation = list(digits_cnn.evaluation_batches())
    assert sum(len(b["image"]) for b in evaluation) == 600
    assert {b["image"].dtype for b in calibration + evaluation} == {np.dtype(np.float32)}
    assert 0.0 <= min(b["image"].min() for b in evaluation) < max(b["image"].max() for b in evaluation) <= 1.0


def test_score_counts_right_answers():
    from qpipe.models.digits_cnn.data import split

    labels = split().test_labels
    perfect = np.eye(10, dtype=np.float32)[labels]
    wrong = perfect.copy()
    wrong[:60] = np.roll(wrong[:60], 1, axis=1)
    assert digits_cnn.score([{"logits": perfect[:100]}, {"logits": perfect[100:]}]) == {"accuracy": 1.0}
    assert digits_cnn.score([{"logits": wrong}]) == {"accuracy": 0.9}
    with pytest.raises(DataError):
        digits_cnn.score([{"logits": perfect[:-1]}])


@pytest.mark.torch
def test_training_is_reproducible_and_learns():
    import torch
    from qpipe.models.digits_cnn.train import accuracy, train

    threads = torch.get_num_threads()
    try:
        first, second = train(epochs=2), train(epochs=2)
    finally:
        torch.set_num_threads(threads)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
    assert accuracy(first) > 0.5
