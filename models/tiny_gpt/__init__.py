"""A decoder-only transformer of 1.3 M parameters, trained on the text that ships with Python.

Input `input_ids` [n, t] int64 with t <= 128, output `logits` [n, t, 1024]. Metric: perplexity of held-out help topics,
e to the mean cross-entropy of the next token. It depends a little on the Python version, whose text it is, so compare
perplexities within one run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...calibrate.errors import DataError

if TYPE_CHECKING:
    import torch

    from .. import Batch

METRICS = {"perplexity": "lower"}
OUTPUTS = ("logits",)
WEIGHTS = Path(__file__).with_name("weights.npz")
CALIBRATION_WINDOWS = 32
EVALUATION_WINDOWS = 80


def build(outliers: bool = False) -> torch.nn.Module:
    """Return the trained transformer in evaluation mode.

    Args:
        outliers: Plant outlier features, see `models/outliers.py`; the float function stays the same.
    """
    from ..weights import load_weights
    from .network import TinyGPT

    module = load_weights(TinyGPT(), WEIGHTS)
    if outliers:
        from ..outliers import plant

        plant(module)
    return module


def build_with_outliers() -> torch.nn.Module:
    """Return `build(outliers=True)`; a factory without arguments, as the command line wants it."""
    return build(outliers=True)


def example() -> dict[str, torch.Tensor]:
    """Return two short windows, `input_ids` [2, 16]."""
    import torch

    return {"input_ids": torch.from_numpy(next(calibration_batches())["input_ids"][:2, :16])}


def dynamic_shapes() -> dict[str, dict[int, str]]:
    """Return the dynamic axes: batch and tokens."""
    return {"input_ids": {0: "batch", 1: "tokens"}}


def calibration_batches(samples: int = CALIBRATION_WINDOWS, batch: int = 8) -> Iterator[Batch]:
    """Yield windows of 128 tokens, spread evenly over the help topics that the model was trained on.

    Args:
        samples: Most windows.
        batch: Windows per batch; the last batch may be smaller.
    """
    from .corpus import split_topics, windows
    from .network import CONTEXT

    yield from _batches(windows(split_topics()[0], CONTEXT, samples), batch)


def evaluation_batches(batch: int = 8) -> Iterator[Batch]:
    """Yield windows of 128 tokens of the held-out help topics.

    Args:
        batch: Windows per batch; the last batch may be smaller.
    """
    yield from _batches(_evaluation_windows(), batch)


def score(outputs: Sequence[Batch], reference: Sequence[Batch] | None = None) -> dict[str, float]:
    """Return the perplexity of the held-out text.

    Args:
        outputs: `logits` [n, t, v] per evaluation batch, in order.
        reference: Not used: the text is the reference.

    Raises:
        DataError: The outputs are not as many as the held-out windows.
    """
    del reference
    targets = _evaluation_windows()[:, 1:]
    found = sum(len(o["logits"]) for o in outputs)
    if found != len(targets):
        raise DataError(
            "outputs do not match the evaluation data", found=f"{found} windows", expected=f"{len(targets)} windows"
        )
    losses, start = [], 0
    for output in outputs:
        logits = output["logits"].astype(np.float64)
        wanted = targets[start : start + len(logits), :, None]
        start += len(logits)
        top = logits.max(axis=-1)
        log_sum = top + np.log(np.exp(logits - top[..., None]).sum(axis=-1))
        losses.append((log_sum - np.take_along_axis(logits, wanted, axis=-1)[..., 0]).ravel())
    return {"perplexity": math.exp(np.concatenate(losses).mean())}


def _evaluation_windows() -> np.ndarray:
    from .corpus import split_topics, windows
    from .network import CONTEXT

    return windows(split_topics()[1], CONTEXT, EVALUATION_WINDOWS)


def _batches(tokens: np.ndarray, batch: int) -> Iterator[Batch]:
    for start in range(0, len(tokens), batch):
        yield {"input_ids": np.ascontiguousarray(tokens[start : start + batch, :-1])}
