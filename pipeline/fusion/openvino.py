"""Evidence from OpenVINO: the model is compiled for the CPU, and each node looked up in the runtime model.

The runtime model names, for every operator that it runs, the operators of the file that went into it, and the precision
that the kernel computes with.

Source: OpenVINO, `CompiledModel.get_runtime_model` and its execution graph information.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from ...calibrate.errors import EnvironmentError_, UnsupportedError
from ..graph import Model, save
from . import Evidence, Fate, Island, Verdict
from .structure import BYTES, INTEGER, PRODUCTS, Candidate, candidates, describe_codes, pairs, port_of

INSTALL = "pip install 'qpipe[conformance]'"
_CODES = ("i8", "u8", "i4", "u4")
_SEPARATE_BIAS = "/WithoutBiases"
_ROUNDING = "FakeQuantize"
_BEHIND = frozenset({"Add", "Relu", "Clip", "Mul", "Cast"})
_FUSED_BEHIND = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """What runs an operator.

    Attributes:
        kind: Type of layer.
        precision: Of what it computes with.
        gives: Precision of its results.
    """

    kind: str
    precision: str
    gives: str


def evidence(model: Model, file: Path | None = None) -> Evidence:
    """Compile a model with OpenVINO and say what became of its products.

    A quantizer that is left and gives float is an island; one that gives codes, or is part of a kernel, is fused.
    Codes of 16 bits are never computed with there.

    Args:
        model: Any model.
        file: Holds just this model; None for a model in memory, which goes through a temporary file.

    Raises:
        EnvironmentError_: OpenVINO is not installed.
        UnsupportedError: It does not compile the model.
    """
    openvino = _load()
    found, islands = _kernels(openvino, model, file), []
    for node in pairs(model.graph):
        quantizer = node.inputs[0].inputs[0]
        kernel = found.get(quantizer.name)
        is_rounded = kernel is not None and kernel.kind == _ROUNDING and kernel.gives not in _CODES
        if is_rounded or port_of(node).codes not in BYTES:
            readers = tuple(str(reader.name) for reader in node.outputs[0].outputs)
            islands.append(Island(tensor=str(quantizer.inputs[0].name), readers=readers))
    return Evidence(
        source=f"the runtime model of OpenVINO {openvino.__version__.partition('-')[0]}, CPU plugin, on this CPU",
        measured=True,
        fates=tuple(_fate(candidate, found) for candidate in candidates(model.graph)),
        pairs=len(pairs(model.graph)),
        islands=tuple(islands),
    )


def _load() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise EnvironmentError_(
            "OpenVINO is not installed, so it cannot be asked", found=str(error), expected="openvino", do=INSTALL
        ) from error
    return openvino


def _kernels(openvino: Any, model: Model, file: Path | None) -> dict[str, Kernel]:
    """Return, for every operator of the file that is still known, what runs it."""
    found: dict[str, Kernel] = {}
    with tempfile.TemporaryDirectory(prefix="qpipe-") as name:
        source = file or Path(name) / "source.onnx"
        if file is None:
            save(model, source)
        for op in _compiled(openvino, source).get_runtime_model().get_ordered_ops():
            facts = {key: _text(value) for key, value in op.get_rt_info().items()}
            kernel = Kernel(
                kind=facts.get("layerType", ""),
                precision=facts.get("runtimePrecision", ""),
                gives=facts.get("outputPrecisions", "").partition(",")[0],
            )
            for original in facts.get("originalLayersNames", "").split(","):
                found.setdefault(original.partition(_SEPARATE_BIAS)[0], kernel)
    return found


def _compiled(openvino: Any, source: Path) -> Any:
    core = openvino.Core()
    try:
        return core.compile_model(core.read_model(str(source)), "CPU")
    except RuntimeError as error:
        raise UnsupportedError(
            "OpenVINO does not compile the model",
            where=str(source),
            found=str(error).strip().splitlines()[-1],
            do="choose another --target",
        ) from error


def _names(node: gs.Node) -> list[str]:
    """Return the names under which a node may be known: what is fused goes by the name of the last operator."""
    names = [str(node.name), *(str(tensor.name) for tensor in node.outputs)]
    for _ in range(_FUSED_BEHIND):
        readers = [reader for tensor in node.outputs for reader in tensor.outputs]
        if len(readers) != 1 or readers[0].op not in _BEHIND:
            break
        node = readers[0]
        names.append(str(node.name))
    return names


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))


def _fate(candidate: Candidate, found: dict[str, Kernel]) -> Fate:
    node = candidate.node
    kernel = next((found[name] for name in _names(node) if name in found), None)
    verdict: Verdict = "float"
    reason = ""
    wide = next((p for p in candidate.reads.values() if not p.stored and p.codes not in BYTES), None)
    if kernel is not None and wide is not None:
        verdict, reason = "island", f"OpenVINO does not compute with the {wide.codes} codes of {wide.tensor!r}"
    elif kernel is not None and kernel.precision in _CODES:
        verdict = "integer" if node.op in PRODUCTS | INTEGER else "codes"
    elif kernel is not None and candidate.on_codes:
        verdict = "island"
        reason = f"OpenVINO computes it in {kernel.precision}: it has no integer kernel for these codes or shapes"
    elif candidate.on_codes:
        verdict = "merged"
    else:
        reason = "it reads no codes of activations in the file"
    became = f"{kernel.kind} {kernel.precision}" if kernel is not None else ""
    codes = describe_codes(candidate)
    return Fate(node=node.name, op=node.op, verdict=verdict, codes=codes, became=became, reason=reason)
