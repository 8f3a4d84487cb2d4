"""The digits and their fixed split."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from ...calibrate.errors import EnvironmentError_

HELD_OUT = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Images [n, 1, 8, 8] float32 in 0..1 and labels [n] int64, training and test apart."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


@cache
def split() -> Split:
    """Return the digits in a fixed shuffled order: the last 600 are the test part, the other 1197 the training part.

    Raises:
        EnvironmentError_: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise EnvironmentError_("scikit-learn is missing", do="pip install 'qpipe[models]'") from error
    digits = load_digits()
    # RandomState's stream is frozen for good (NEP 19), unlike that of default_rng.
    order = np.random.RandomState(0).permutation(len(digits.target))
    images = (digits.images[order, None] / 16).astype(np.float32)
    labels = digits.target[order].astype(np.int64)
    return Split(
        train_images=images[:-HELD_OUT],
        train_labels=labels[:-HELD_OUT],
        test_images=images[-HELD_OUT:],
        test_labels=labels[-HELD_OUT:],
    )
