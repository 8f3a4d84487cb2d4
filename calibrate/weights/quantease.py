"""QuantEase: coordinate descent on the codes, for the error at the layer's output.

With ``D = w - q`` and ``G = H D`` (``H = XᵀX / tokens + damping``, columns of the weight as rows): when all other
columns stay, the best value of column k is ``q_k + G_k / H_kk``, rounded.

Letters: ``out``, ``in`` dimensions of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..qarray import F64, QArray, Spec, dequantize, quantize
from . import WEIGHT_METHODS, WeightStats, gram_of
from .gptq import Gptq, damped
from .grid import Grid

Array = npt.NDArray[Any]

_BATCH = 64
"""Columns whose changes are passed on to all others in one matrix product."""


@dataclass(frozen=True, slots=True)
class Quantease:
    """What: GPTQ, then sweeps over the columns that choose each code anew, now that all others are known.

    GPTQ can only make up for an error in later columns; a sweep also lets earlier columns answer. No step makes the
    damped output error larger. Scales stay GPTQ's.

    When to use: 2 to 4 bits where the last few percent of output error count: about 5 % less than GPTQ on held-out
        data at 4 bits and 10 % at 2, for twice the time.
    Options: damping and act_order as of GPTQ; sweeps.
    Source: Behdin et al., "QuantEase: optimization-based quantization for language models", algorithm 1 (2023).
    """

    damping: float = 0.05
    act_order: bool = True
    sweeps: int = 2

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __call__(self, w: Array, spec: Spec, stats: WeightStats | None = None) -> QArray:
        """Return the codes of ``w`` [out, in]."""
        hessian = damped(gram_of("quantease", w, stats), self.damping)
        start = Gptq(damping=self.damping, act_order=self.act_order)(w, spec, stats)
        values = np.ascontiguousarray(dequantize(start).T, dtype=np.float64)
        gradient = hessian @ (w.T.astype(np.float64) - values)
        grid = Grid.of(start.params, w.shape, slice(None), np.arange(w.shape[1]))
        for _ in range(self.sweeps):
            for first in range(0, len(values), _BATCH):
                batch = slice(first, first + _BATCH)
                gradient += hessian[:, batch] @ _descend(values, gradient, hessian, grid, batch)
        return quantize(np.ascontiguousarray(values.T, dtype=np.float32), start.params)


def _descend(values: F64, gradient: F64, hessian: F64, grid: Grid, batch: slice) -> F64:
    """Choose the codes of the columns in ``batch`` in turn.

    Args:
        values: [in, out], the rounded weights; written to.
        gradient: G, [in, out], as it was before the batch.
        hessian: H, [in, in].
        grid: The values that each weight can take.
        batch: Some columns.

    Returns:
        What was taken off the values, [batch, out].
    """
    change = np.zeros_like(values[batch])
    for i, k in enumerate(range(*batch.indices(len(values)))):
        pull = gradient[k] + hessian[k, batch][:i] @ change[:i]
        paired = grid.spec.pair_limit and k ^ 1 < len(values)
        rounded = grid.round(k, values[k] + pull / hessian[k, k], values[k ^ 1] if paired else None)
        change[i] = values[k] - rounded
        values[k] = rounded
    return change


WEIGHT_METHODS.add("quantease", Quantease())
