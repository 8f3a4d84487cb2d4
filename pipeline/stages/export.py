"""Export: a PyTorch module becomes an ONNX file that is known to compute the same."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...calibrate.errors import EnvironmentError_, ModelError
from ..exportable import Exportable
from ..graph import EXTERNAL_THRESHOLD, Model, load, save
from ..inspect import file_bytes
from ..naming import name_after_modules
from ..session import SessionExtras, make_session

DEFAULT_OPSET = 20
"""What torch's exporter writes without conversion, and every runtime of the last two years reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """What was written.

    Attributes:
        path: The model file.
        opset: Version of the standard operators.
        max_difference: Largest |torch - ONNX Runtime| over all outputs on the example.
        relative: The same, relative to the largest magnitude of the output concerned.
        outputs: Number of outputs compared.
    """

    path: Path
    opset: int
    max_difference: float
    relative: float
    outputs: int


def export(
    source: Exportable, path: Path, *, opset: int = DEFAULT_OPSET, tolerance: float = 1e-3, force: bool = False
) -> ExportResult:
    """Export ``source`` to ``path``, run both and compare.

    Args:
        source: The module, forced into evaluation mode.
        path: File to write; nothing is left there when the check fails.
        opset: Version of the standard operators.
        tolerance: Largest difference allowed, relative to the largest magnitude of each output.
        force: Replace an existing file.

    Raises:
        ModelError: The module cannot be exported, or the result computes something else.
        EnvironmentError_: PyTorch or onnxscript is missing.
    """
    program = _run_exporter(source, opset)
    with tempfile.TemporaryDirectory(prefix="qpipe-export-") as folder:
        draft = Path(folder) / "model.onnx"
        program.save(str(draft), external_data=True)
        model = load(draft)
        _check_inference_mode(model)
        difference, relative, count = _compare(source, draft, mapped=file_bytes(model) > EXTERNAL_THRESHOLD)
        if not relative <= tolerance:
            raise ModelError(
                "the exported model computes something else than the module",
                where=str(path),
                found=f"largest difference {difference:.3g}, {relative:.3g} of the output's magnitude",
                expected=f"at most {tolerance:g} of it",
                do="export at another --opset, or allow more with --tolerance",
            )
        save(model, path, force=force)
    return ExportResult(path=path, opset=opset, max_difference=difference, relative=relative, outputs=count)


def _run_exporter(source: Exportable, opset: int) -> Any:
    try:
        import torch
        import torch.onnx
    except ImportError as error:
        raise EnvironmentError_("export needs PyTorch", found=str(error), do="pip install 'qpipe[torch]'") from error
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of every optional package it does not find
    module = source.module
    is_program = isinstance(module, torch.export.ExportedProgram)
    if not is_program:
        module = module.eval()
    dims = {name: torch.export.Dim(name) for axes in source.dynamic.values() for name in axes.values()}
    shapes = tuple(
        {axis: dims[name] for axis, name in source.dynamic.get(key, {}).items()} or None for key in source.example
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # notes of torch about its own internals
            program = torch.onnx.export(
                module,
                () if is_program else tuple(source.example.values()),
                dynamo=True,
                input_names=list(source.example),
                output_names=list(source.outputs) or None,
                dynamic_shapes=None if is_program else shapes,
                opset_version=opset,
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = str(error).strip().splitlines()
        raise ModelError(
            "the module cannot be exported",
            where=type(module).__name__,
            found=reason[0] if reason else type(error).__name__,
            do="make it exportable by torch.export (no data-dependent Python), or pass a .pt2 ExportedProgram",
        ) from error
    state = module.state_dict
    tensors = state if isinstance(state, Mapping) else state()
    name_after_modules(program.model, {k: v.detach().cpu().numpy() for k, v in tensors.items() if v.dim() == 2})
    return program


def _check_inference_mode(model: Model) -> None:
    """Refuse a graph that still trains: a Dropout with training_mode, a BatchNormalization that updates."""
    for node in model.graph.nodes:
        training = node.op == "BatchNormalization" and node.attrs.get("training_mode", 0)
        if training or (node.op == "Dropout" and len(node.inputs) > 2 and not node.inputs[2].is_empty()):
            raise ModelError(
                "the exported graph is in training mode",
                where=node.name,
                found=node.op,
                expected="a module in evaluation mode",
                do="do not call .train() inside forward(); build the module in evaluation mode",
            )


def _compare(source: Exportable, path: Path, *, mapped: bool) -> tuple[float, float, int]:
    """Run the module and the file on the example; return largest absolute and relative difference and the count.

    The module holds all weights already: where they are large, the runtime reads its own from the file (``mapped``).
    """
    import torch

    module = source.module.module() if isinstance(source.module, torch.export.ExportedProgram) else source.module
    with torch.no_grad():
        result = module(*source.example.values())
    expected = [t.detach().cpu().numpy() for t in _flatten(result)]
    session = make_session(path, exact=mapped, extras=SessionExtras(mapped=mapped))
    feed = {name: tensor.detach().cpu().numpy() for name, tensor in source.example.items()}
    names = {entry.name for entry in session.get_inputs()}
    actual = session.run(None, {name: array for name, array in feed.items() if name in names})
    absolute = relative = 0.0
    for want, got in zip(expected, actual, strict=True):
        if want.size == 0:
            continue
        gap = np.abs(want.astype(np.float64) - got.astype(np.float64))
        difference = float(gap.max())
        absolute = max(absolute, difference)
        relative = max(relative, difference / max(float(np.abs(want).max()), 1e-12))
    return absolute, relative, len(expected)


def _flatten(result: Any) -> list[Any]:
    if isinstance(result, Mapping):
        return [t for value in result.values() for t in _flatten(value)]
    if isinstance(result, (list, tuple)):
        return [t for value in result for t in _flatten(value)]
    return [] if result is None else [result]
