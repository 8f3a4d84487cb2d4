"""Trained weights on disk: one compressed `.npz` of float16 arrays, widened to float32 when loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def save_weights(module: torch.nn.Module, path: Path) -> None:
    """Write the parameters and buffers of a module; floating-point ones as float16.

    The file depends on nothing but the values: the same weights give the same bytes.

    Args:
        module: Its `state_dict()` is stored; tied tensors are stored once, under their first name.
        path: Target, ending in `.npz`.
    """
    seen: set[int] = set()
    arrays = {}
    for name, tensor in module.state_dict().items():
        if tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        arrays[name] = tensor.half().numpy() if tensor.is_floating_point() else tensor.numpy()
    np.savez_compressed(path, **arrays)


def load_weights(module: torch.nn.Module, path: Path) -> torch.nn.Module:
    """Load weights that `save_weights` wrote and return the module in evaluation mode.

    Raises:
        RuntimeError: The file and the module do not have the same tensors.
    """
    import torch

    with np.load(path) as file:
        state = {name: torch.from_numpy(file[name]) for name in file.files}
    module.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in state.items()})
    return module.eval()
