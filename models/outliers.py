"""Plant systematic outlier features in a transformer without changing its float function.

Large language models have a few channels, the same ones in every layer, whose activations are tens of times larger
than all others. Small models do not; here such channels are made. A LayerNorm output channel is multiplied by a factor
(weight and bias) and everything that reads it undoes this:

- the linear layers that read it divide that column of their weight by the factor;
- where the LayerNorm's output is also the residual branch, as in post-LayerNorm models (BERT, MiniLM), the branch is
  multiplied by an explicit `residual_scale` [d], 1 / factor on the planted channels. The alternative, planting between
  the value and the output projection, would leave most MatMul inputs without outliers: this way the inputs of the
  query, key, value and first MLP projections of every layer have them, as in the models that are imitated.

In exact arithmetic the function is the same; in float32 the results differ by rounding. A per-tensor scale that covers
the planted channels leaves few codes for the rest, so quantizing becomes hard.

Source: Dettmers et al., LLM.int8(), arXiv:2208.07339, section 4 (the phenomenon); the transformation is that of
SmoothQuant, arXiv:2211.10438, equation 3, applied backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import nn

FEATURES = 6
FACTOR = 40.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PlantSite:
    """A LayerNorm [d] together with everything that reads its output.

    Attributes:
        norm: The LayerNorm.
        readers: The linear layers [out, d] that read it.
        residual: The module, called as `module(x, residual)`, that reads it as a residual branch, if there is one.
    """

    norm: nn.LayerNorm
    readers: tuple[nn.Linear, ...]
    residual: nn.Module | None = None


class Plantable(Protocol):
    """A module that names the places where outlier features can be planted."""

    def outlier_sites(self) -> Sequence[PlantSite]:
        """Return the sites; all of their LayerNorms are of the same width."""


PlantableModule = TypeVar("PlantableModule", bound=Plantable)


@torch.no_grad()
def plant(module: PlantableModule, features: int = FEATURES, factor: float = FACTOR, seed: int = 0) -> PlantableModule:
    """Plant outlier features at every site of a module, in place, and return the module.

    Args:
        module: Changed in place.
        features: How many channels; the same ones at every site.
        factor: How many times larger they become.
        seed: Chooses the channels, see `planted_channels`.
    """
    for site in module.outlier_sites():
        width = site.norm.normalized_shape[0]
        gain = torch.ones(width)
        gain[torch.from_numpy(planted_channels(width, features, seed))] = factor
        site.norm.weight.mul_(gain)
        site.norm.bias.mul_(gain)
        for reader in site.readers:
            reader.weight.div_(gain)
        if site.residual is not None:
            _scale_residual(site.residual, 1 / gain)
    return module


def planted_channels(width: int, features: int = FEATURES, seed: int = 0) -> np.ndarray:
    """Return the channels that `plant` chooses, ascending.

    Args:
        width: Number of channels.
        features: How many to choose.
        seed: Fixes the choice.
    """
    return np.sort(np.random.RandomState(seed).permutation(width)[:features])


def _scale_residual(module: nn.Module, scale: torch.Tensor) -> None:
    if hasattr(module, "residual_scale"):
        module.residual_scale.mul_(scale)
        return
    module.register_buffer("residual_scale", scale)
    module.register_forward_pre_hook(lambda owner, args: (args[0], args[1] * owner.residual_scale))
