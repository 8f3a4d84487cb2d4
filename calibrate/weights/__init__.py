"""Weight algorithms: pure functions that turn ``w [out, in]`` (and statistics of its input) into a `QArray`.

Letters: ``out`` output channels, ``in`` input channels, ``x [tokens, in]`` the layer's input, ``y = x wᵀ``.

For one layer of a graph::

    method = WEIGHT_METHODS.resolve("gptq")                   # or "gptq:0.05": its first option
    method.needs                                              # {"gram"}: fields of WeightStats to collect
    stats = WeightStats(gram=gram, channels=channels)         # of x, as the layer will see it
    qarray = method(w, spec, stats)                           # codes [out, in]
    output_mse(w, dequantize(qarray), gram)                   # what it costs at the output

Layouts. A MatMul or Gemm that stores ``[in, out]`` is transposed; a Conv ``[out, in/groups, kH, kW]`` is reshaped to
``[out, in/groups * kH * kW]`` and its statistics are those of the unfolded input (`qpipe.calibrate.stats.tokens`); a
grouped Conv is one layer per group. The spec is meant for ``[out, in]``: axis 0 is a scale per output channel, axis 1
with a block size are blocks along the input. Scales come back in ``spec.granularity.scale_shape(w.shape)``.

To propagate errors, collect ``gram`` behind the already quantized prefix: the algorithms only see what the layer will.
With ``drift`` beside it, `qpipe.calibrate.weights.correction` makes the weight answer what the prefix did to the input.
An equalizer (`qpipe.calibrate.equalize`) comes first: pass ``w * channel_scale`` and ``stats.scaled(channel_scale)``.

Learned rounding (AdaRound) is left out because it did not earn its place: on layers of MiniLM it took 400 times as long
as GPTQ for the same held-out error, and `quantease` refines GPTQ's codes for the same objective in a second pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..qarray import QArray, Spec
from ..registry import Registry
from ..stats.channel_amax import ChannelAmax
from ..stats.gram import Gram

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightStats:
    """What is known of a layer's input ``x [tokens, in]``; a method names the fields that it needs.

    Attributes:
        gram: ``XᵀX`` [in, in].
        channels: Magnitudes per input channel, [in].
        drift: ``(X - x)ᵀ x`` [in, in] with ``X`` the same tokens in the float model, where x comes from quantized
            layers; None where they are one.
        lo: Smallest value of x, at most 0; -Inf when it is not known.
        hi: Largest value of x, at least 0; Inf when it is not known.
    """

    gram: Gram | None = None
    channels: ChannelAmax | None = None
    drift: Array | None = None
    lo: float = -math.inf
    hi: float = math.inf

    @property
    def energy(self) -> Array | None:
        """Sum of squares per input channel, [in]; None when nothing was collected."""
        if self.channels is not None:
            return self.channels.energy
        return None if self.gram is None else np.diag(self.gram.matrix)

    @property
    def interval(self) -> tuple[float, float]:
        """An interval that holds all values of x: what is known of it as a whole, and of its channels."""
        amax = math.inf if self.channels is None else float(self.channels.amax.max(initial=0))
        return max(self.lo, -amax), min(self.hi, amax)

    def scaled(self, channel_scale: Array) -> WeightStats:
        """Return the statistics of ``x / channel_scale``, ``channel_scale`` [in] > 0."""
        inverse = 1 / channel_scale.astype(np.float64)
        largest = float(inverse.max(initial=0))
        gram, channels, drift = self.gram, self.channels, self.drift
        if gram is not None:
            gram = Gram(matrix=gram.matrix * inverse * inverse[:, None], tokens=gram.tokens)
        if drift is not None:
            drift = drift * inverse * inverse[:, None]
        if channels is not None:
            channels = ChannelAmax(
                amax=(channels.amax * inverse).astype(np.float32),
                total=channels.total * inverse,
                energy=channels.energy * inverse**2,
                tokens=channels.tokens,
            )
        return WeightStats(gram=gram, channels=channels, drift=drift, lo=self.lo * largest, hi=self.hi * largest)


class WeightMethod(Protocol):
    """A weight algorithm: a frozen dataclass whose fields are its options, registered under its name.

    Its docstring says What / When to use / Options / Source.

    Attributes:
        needs: Fields of `WeightStats` without which it cannot work.
    """

    needs: ClassVar[frozenset[str]]

    def __call__(self, w: Array, spec: Spec, stats: WeightStats | None = None) -> QArray:
        """Quantize ``w``.

        Args:
            w: Weight [out, in] of any float type, finite; not written to.
            spec: How it is to be quantized, in the axes of [out, in].
            stats: Statistics of the layer's input; None when nothing was collected.

        Returns:
            Codes [out, in]. The same arguments give the same bits.

        Raises:
            DataError: Statistics that the method `needs` are missing or do not fit.
            ValueError: The weight is not finite.
        """
        ...


WEIGHT_METHODS: Registry[WeightMethod] = Registry("weight method", __name__)


def gram_of(method: str, w: Array, stats: WeightStats | None) -> Gram:
    """Return the Gram matrix that ``method`` needs for ``w`` [out, in].

    Raises:
        DataError: There is none, it is of another shape, or it is not finite.
    """
    shape = (w.shape[1], w.shape[1])
    if stats is None or stats.gram is None:
        raise DataError(f"{method} needs the Gram matrix of the layer's input", expected=f"gram {list(shape)}")
    gram = stats.gram
    if gram.matrix.shape != shape or not np.isfinite(gram.matrix).all():
        found = f"{list(gram.matrix.shape)}{'' if np.isfinite(gram.matrix).all() else ', not finite'}"
        raise DataError(f"{method} cannot use this Gram matrix", found=found, expected=f"finite {list(shape)}")
    return gram


def output_mse(w: Array, w_q: Array, gram: Gram) -> float:
    """Return the mean squared error of the layer's output, ``tr((w - w_q) XᵀX (w - w_q)ᵀ) / (tokens * out)``.

    Args:
        w: Weight [out, in].
        w_q: What stands in its place, dequantized [out, in].
        gram: Of the layer's input.
    """
    difference = w.astype(np.float64) - w_q.astype(np.float64)
    return float(np.vdot(difference @ gram.matrix, difference)) / max(gram.tokens * len(w), 1)
