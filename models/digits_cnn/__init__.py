"""A small convolutional network on scikit-learn's bundled handwritten digits (8 x 8 pixels, ten classes).

Input `image` [n, 1, 8, 8] float32 in 0..1, output `logits` [n, 10]. Metric: accuracy on 600 held-out digits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...calibrate.errors import DataError

if TYPE_CHECKING:
    import torch

    from .. import Batch

METRICS = {"accuracy": "higher"}
OUTPUTS = ("logits",)
WEIGHTS = Path(__file__).with_name("weights.npz")


def build() -> torch.nn.Module:
    """Return the trained network in evaluation mode, with its BatchNorm layers left as they are."""
    from ..weights import load_weights
    from .network import DigitsCNN

    return load_weights(DigitsCNN(), WEIGHTS)


def example() -> dict[str, torch.Tensor]:
    """Return two calibration images, `image` [2, 1, 8, 8]."""
    import torch

    return {"image": torch.from_numpy(next(calibration_batches())["image"][:2])}


def dynamic_shapes() -> dict[str, dict[int, str]]:
    """Return the dynamic axes: the batch."""
    return {"image": {0: "batch"}}


def calibration_batches(samples: int = 128, batch: int = 32) -> Iterator[Batch]:
    """Yield images of the training part.

    Args:
        samples: How many images.
        batch: Images per batch; the last batch may be smaller.
    """
    from .data import split

    yield from _batches(split().train_images[:samples], batch)


def evaluation_batches(batch: int = 64) -> Iterator[Batch]:
    """Yield the held-out images; the last batch is smaller.

    Args:
        batch: Images per batch.
    """
    from .data import split

    yield from _batches(split().test_images, batch)


def score(outputs: Sequence[Batch], reference: Sequence[Batch] | None = None) -> dict[str, float]:
    """Return the share of held-out digits that are classified correctly.

    Args:
        outputs: `logits` [n, 10] per evaluation batch, in order.
        reference: Not used: the labels are the reference.

    Raises:
        DataError: The outputs are not as many as the held-out digits.
    """
    from .data import split

    del reference
    labels = split().test_labels
    predicted = np.concatenate([np.asarray(o["logits"]) for o in outputs]).argmax(axis=1)
    if predicted.shape != labels.shape:
        raise DataError(
            "outputs do not match the evaluation data", found=str(len(predicted)), expected=str(len(labels))
        )
    return {"accuracy": float((predicted == labels).mean())}


def _batches(images: np.ndarray, batch: int) -> Iterator[Batch]:
    for start in range(0, len(images), batch):
        yield {"image": images[start : start + batch]}
