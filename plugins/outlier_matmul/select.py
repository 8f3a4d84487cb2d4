"""Choose outlier columns at calibration.

Letters: ``K`` input channels, ``O`` chosen columns.

Source: Dettmers et al. 2022, "LLM.int8()", arXiv 2208.07339, section 3.1 (the absolute criterion, 6.0).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

ABSOLUTE_THRESHOLD = 6.0
"""The paper's criterion: |x| >= 6 makes a feature an outlier."""
DEFAULT_CAP = 64


class Selection(NamedTuple):
    """Chosen columns and what choosing them means.

    Attributes:
        index: int32 [O], ascending.
        energy_share: Share of the activations' energy that the columns hold, 0..1.
        bound: Magnitude from which a channel counted as an outlier.
        capped: How many more columns met the criterion than the cap allowed.
        limit: Largest calibrated magnitude among the columns that stay regular (the operator's ``limit``).
    """

    index: npt.NDArray[np.int32]
    energy_share: float
    bound: float
    capped: int
    limit: float


def select_outliers(
    channel_amax: npt.ArrayLike,
    typical: npt.ArrayLike | None = None,
    *,
    threshold: float,
    absolute: bool = False,
    cap: int = DEFAULT_CAP,
    least: int = 0,
) -> Selection:
    """Choose the channels whose amplitude is out of proportion.

    Args:
        channel_amax: Largest magnitude of each input channel, [K].
        typical: Typical magnitude of each channel (mean or root mean square of |x|) [K], or one number for the row;
            None takes the amplitudes themselves. The median over the channels is the row's typical amplitude: unlike
            the mean it does not move when a few channels are 1000 times larger.
        threshold: A channel is an outlier from ``threshold`` times the row's typical amplitude, or from
            ``threshold`` itself when ``absolute``.
        absolute: Take ``threshold`` as a magnitude, as the paper does (6.0).
        cap: Most columns that may be chosen; the largest are kept.
        least: Fewest columns to choose, the largest first, where ``cap`` allows: some runtimes cannot run the function
            body with none.

    Returns:
        The selection; ties at the cap go to the lower channel number.

    Raises:
        ValueError: A threshold or cap that is not positive, or amplitudes that are not finite.
    """
    amax = np.asarray(channel_amax, dtype=np.float64).reshape(-1)
    level = amax if typical is None else np.broadcast_to(np.asarray(typical, dtype=np.float64), amax.shape)
    if not (threshold > 0 and cap >= 0 and np.isfinite(amax).all() and np.isfinite(level).all()):
        raise ValueError("threshold must be positive, cap not negative, amplitudes finite")
    bound = threshold if absolute else threshold * float(np.median(level)) if amax.size else threshold
    met = np.flatnonzero((amax >= bound) & (amax > 0))
    order = np.argsort(-amax, kind="stable")
    strongest = order[np.isin(order, met)]
    index = np.sort(order[: min(cap, least)] if len(strongest) < least else strongest[:cap])
    per_channel = typical is not None and np.ndim(typical) > 0
    energy = np.square(level if per_channel else amax)
    regular = np.delete(amax, index)
    return Selection(
        index=index.astype(np.int32),
        energy_share=float(energy[index].sum() / energy.sum()) if energy.sum() > 0 else 0.0,
        bound=float(bound),
        capped=max(len(strongest) - len(index), 0),
        limit=float(regular.max(initial=0.0)),
    )
