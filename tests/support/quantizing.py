"""Build a float model from ONNX text, quantize it, and look at what came out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper, parser
from qpipe.pipeline import graph
from qpipe.pipeline.calibration import Calibration
from qpipe.pipeline.plan import Decision, Plan
from qpipe.pipeline.qdq_check import check_qdq
from qpipe.pipeline.recipe import make_recipe
from qpipe.pipeline.session import make_session
from qpipe.pipeline.stages.collect import CollectOptions, collect
from qpipe.pipeline.stages.decide import wanted_tensors
from qpipe.pipeline.stages.details import wanted_details
from qpipe.pipeline.stages.prepare import prepare
from qpipe.pipeline.stages.quantize import Quantized, QuantizeOptions, needed_detail, needs_statistics, quantize_model

Array = np.ndarray[Any, Any]
Batch = Mapping[str, Array]

FINE: dict[str, Any] = {
    "target": "portable",
    "method": "minmax",
    "weights": {"format": "int16", "granularity": "channel"},
    "activations": {"format": "uint16", "symmetric": False},
}
"""A recipe whose scales are so fine that the quantized model equals the float one."""


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Array:
    """Normally distributed values."""
    return np.random.default_rng(seed + 7 * len(shape)).normal(size=shape).astype(dtype)


def model(body: str, *, opset: int = 21, ir: int = 10, domains: str = "", **weights: Array) -> onnx.ModelProto:
    """A model from the text of a graph, ``g (float[N,4] x) => (float[N,6] y) { ... }``, and arrays by name."""
    imports = f'["" : {opset}{", " + domains if domains else ""}]'
    proto = parser.parse_model(f"<ir_version: {ir}, opset_import: {imports}>\n{body}")
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    for index, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    return proto


def random_batches(proto: onnx.ModelProto, count: int = 2, seed: int = 0) -> list[dict[str, Array]]:
    """Batches of random values for all inputs; free dimensions are 2."""
    rng = np.random.default_rng(seed)
    known = {tensor.name for tensor in proto.graph.initializer}
    batches = []
    for _ in range(count):
        batch = {}
        for entry in proto.graph.input:
            if entry.name in known:
                continue
            kind = entry.type.tensor_type
            shape = [d.dim_value if d.HasField("dim_value") else 2 for d in kind.shape.dim]
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            if np.issubdtype(dtype, np.integer):
                batch[entry.name] = rng.integers(0, 2, shape).astype(dtype)
            elif dtype == np.bool_:
                batch[entry.name] = rng.integers(0, 2, shape).astype(bool)
            else:
                batch[entry.name] = rng.normal(size=shape).astype(dtype)
        batches.append(batch)
    return batches


def calibrate(proto: onnx.ModelProto, batches: Iterable[Batch], detail: str = "none") -> Calibration:
    """Statistics of all tensors that a rule may ask for, with what ``detail`` names of the inputs of layers."""
    prepared = prepare(graph.from_proto(proto))
    options = CollectOptions(details=wanted_details(prepared.graph, detail))
    return collect(proto, wanted_tensors(prepared.graph), batches, options)


@dataclass(frozen=True, slots=True)
class Result:
    """A float model and what became of it."""

    source: onnx.ModelProto
    result: Quantized
    proto: onnx.ModelProto

    @property
    def plan(self) -> Plan:
        return self.result.plan

    def ops(self) -> Counter[str]:
        """Operators of the main graph by type."""
        return Counter(node.op_type for node in self.proto.graph.node)

    def edges(self) -> list[str]:
        """The main graph, a line per node: ``y = Op(a, b)``."""
        return [f"{', '.join(n.output)} = {n.op_type}({', '.join(n.input)})" for n in self.proto.graph.node]

    def reason(self, node: str) -> str:
        """Why a node is what it is."""
        return self.plan.nodes()[node].reason

    def sites(self, node: str) -> list[Decision]:
        """All decisions of one node."""
        return [d for d in self.plan.decisions if d.site.node == node]

    def initializers(self) -> dict[str, Array]:
        """Values of the main graph's constants."""
        return {t.name: numpy_helper.to_array(t) for t in self.proto.graph.initializer}

    def scale_of(self, tensor: str) -> float:
        """Scale with which a tensor of the result is quantized or dequantized."""
        held = self.initializers()
        nodes = [n for n in self.proto.graph.node if tensor in (*n.input[:1], *n.output)]
        node = next(n for n in nodes if n.op_type in ("QuantizeLinear", "DequantizeLinear"))
        return float(held[node.input[1]].reshape(-1)[0])


def quantize(
    proto: onnx.ModelProto,
    batches: Sequence[Batch] | None = None,
    *,
    calibration: Calibration | None = None,
    options: QuantizeOptions | None = None,
    **recipe: Any,
) -> Result:
    """Calibrate, quantize, and hold the result against the ONNX checker and the Q/DQ rules."""
    chosen = make_recipe(**recipe)
    if calibration is None and needs_statistics(chosen):
        batches = random_batches(proto) if batches is None else batches
        calibration = calibrate(proto, batches, needed_detail(chosen))
    options = options or QuantizeOptions()
    done = quantize_model(prepare(graph.from_proto(proto)), chosen, calibration, options=options)
    findings = check_qdq(done.model, target=chosen.target)
    assert [f for f in findings if f.severity == "error"] == []
    result = graph.to_proto(done.model)
    onnx.checker.check_model(result, full_check=not any(opset.domain for opset in result.opset_import))
    return Result(proto, done, result)


def run(proto: onnx.ModelProto, batch: Batch, *, exact: bool = True) -> list[Array]:
    """Outputs of a model in ONNX Runtime."""
    return list(make_session(proto, exact=exact).run(None, dict(batch)))


def error(found: Result, batch: Batch) -> float:
    """Largest error of any output, relative to that output's largest value; whole numbers must agree."""
    worst = 0.0
    for wanted, got in zip(run(found.source, batch), run(found.proto, batch), strict=True):
        assert wanted.shape == got.shape
        assert wanted.dtype == got.dtype
        if wanted.size == 0:
            continue
        if not np.issubdtype(np.result_type(wanted.dtype), np.floating):
            np.testing.assert_array_equal(wanted, got)
            continue
        difference = np.abs(wanted.astype(np.float64) - got.astype(np.float64)).max()
        worst = max(worst, float(difference / max(np.abs(wanted.astype(np.float64)).max(), 1e-30)))
    return worst


def signature(proto: onnx.ModelProto) -> list[tuple[str, str, bytes]]:
    """Side, name and type of inputs and outputs, in order."""
    known = {tensor.name for tensor in proto.graph.initializer}
    return [
        (side, entry.name, entry.type.SerializeToString(deterministic=True))
        for side, entries in (("input", proto.graph.input), ("output", proto.graph.output))
        for entry in entries
        if entry.name not in known
    ]
