"""Clip search against the layer's output, the second half of AWQ.

Letters: ``out``, ``in`` dimensions of a weight, ``e`` inputs that share a scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ..qarray import QArray, Range, Spec, params_from_range, quantize
from . import WEIGHT_METHODS, WeightStats, gram_of
from .groups import along_rows, row_spec
from .pairs import pair_safe
from .search import mse_range, search_clip

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class AwqClip:
    """What: round to nearest, with the clipped range whose error at the layer's output is smallest.

    Each scale is judged alone: the cost of clipping the weights of one block is what the layer's output loses when
    only that block is quantized, ``d G dᵀ`` with the block's part G of XᵀX. So correlated inputs are seen inside a
    block, not across blocks.

    When to use: after the scale search of AWQ (``equalize: awq``); 4 bits and fewer where GPTQ is too slow or
        overfits.
    Options: none.
    Source: Lin et al., "AWQ: activation-aware weight quantization", section 4 and its released code (2023).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __call__(self, w: Array, spec: Spec, stats: WeightStats | None = None) -> QArray:
        """Return the codes of ``w`` [out, in]."""
        matrix = gram_of("awq_clip", w, stats).matrix
        if spec.pair_limit:
            return pair_safe(w, spec, np.diag(matrix))
        return quantize(w, params_from_range(_output_range(np.asarray(w, dtype=np.float32), spec, matrix), spec))


def _output_range(w: F32, spec: Spec, gram: Array) -> Range:
    granularity = spec.granularity
    if granularity.axis is not None and not along_rows(granularity):
        # All weights of a scale meet the same input, whose energy is the whole of G.
        return mse_range(w, spec, np.diag(gram))
    relative = (gram / (np.trace(gram) / len(gram) or 1.0)).astype(np.float32)
    if granularity.axis is None:
        whole = search_clip(
            w.reshape(1, -1), row_spec(spec), lambda d, _: _cost(d.reshape(w.shape), relative).sum()[None]
        )
        return Range(lo=whole.lo.reshape(()), hi=whole.hi.reshape(()))
    size = granularity.block_size or w.shape[1]
    parts = [slice(start, start + size) for start in range(0, w.shape[1], size)]
    found = [_block_range(w[:, part], spec, relative[part, part]) for part in parts]
    return Range(lo=np.concatenate([r.lo for r in found], axis=1), hi=np.concatenate([r.hi for r in found], axis=1))


def _block_range(w: F32, spec: Spec, gram: F32) -> Range:
    return search_clip(w, row_spec(spec), lambda d, _: _cost(d, gram))


def _cost(difference: F32, gram: F32) -> F32:
    return np.asarray(np.einsum("oe,oe->o", difference @ gram, difference))


WEIGHT_METHODS.add("awq_clip", AwqClip())
