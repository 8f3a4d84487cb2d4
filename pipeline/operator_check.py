"""Compare the three makings of qpipe's own operator, node by node: the plugin's kernel, its function body, numpy.

Each making is judged by the input that it really got, so that a difference belongs to the node and not to what came
before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from ..plugins.outlier_matmul import op as contract
from .calibration.expose import expose
from .calibration.probe import place_weights
from .constants import weight_of
from .graph import Model, all_graphs
from .graph.exporter import skeleton
from .layers import FOLDER_KEY
from .report import Column, Table
from .session import SessionExtras, make_session, plugin_status

Batch = Mapping[str, npt.NDArray[Any]]

PLUGIN, BODY = "plugin", "body"

AGREEMENT = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3.2e-2}
"""Largest difference, in units of the node's largest output, that different orders of summation explain."""


@dataclass(slots=True, kw_only=True)
class OperatorRow:
    """One OutlierMatMul node.

    Attributes:
        node: Its name.
        dtype: Type of its activations.
        differences: Making -> largest difference from numpy, in units of the node's largest output.
        new_outliers: Elements beyond the calibrated amplitude that numpy met.
        elements: Elements of its input, those of outlier columns included; 0 where no batch took its branch.
        unseen: Why it could not be compared, ``""`` when it could.
    """

    node: str
    dtype: str
    differences: dict[str, float] = field(default_factory=dict)
    new_outliers: int = 0
    elements: int = 0
    unseen: str = ""

    def agrees(self) -> bool:
        """Whether all makings give the same numbers, up to the order of summation."""
        return all(difference <= AGREEMENT[self.dtype] for difference in self.differences.values())


def compare_operators(
    model: Model, batches: Sequence[Batch], *, device: str = "cpu", threads: int | None = None
) -> list[OperatorRow]:
    """Run every OutlierMatMul of a model with the plugin and without, and compute it with numpy.

    Args:
        model: The quantized model; nodes inside bodies of If, Loop and Scan are compared as often as they ran.
        batches: Inputs by name.
        device: As for `make_session`; without the plugin it is always the CPU.
        threads: As for `make_session`.

    Returns:
        One row per node, in the graph's order; without a built plugin the rows say nothing of it.
    """
    nodes = {node.name: node for scope in all_graphs(model.graph) for node in scope.nodes if _is_comparable(node)}
    rows = {name: OperatorRow(node=name, dtype=_dtype(node).name) for name, node in nodes.items()}
    if not rows:
        return []
    watch = _watch(model, list(nodes.values()))
    for name, node in nodes.items():
        ends = (node.inputs[0].name, node.outputs[0].name)
        rows[name].unseen = next((watch.missing[end] for end in ends if end in watch.missing), "")
    seen = [node for name, node in nodes.items() if not rows[name].unseen]
    makings = [PLUGIN, BODY] if plugin_status() == "registered" else [BODY]
    for making in makings:
        session = make_session(
            watch.model,
            device=device if making == PLUGIN else "cpu",
            threads=threads,
            extras=SessionExtras(config=watch.config, plugin=making == PLUGIN),
        )
        fed = {entry.name for entry in session.get_inputs()}
        for batch in batches:
            feed = {name: batch[name] for name in fed}
            found = session.run(list(watch.outputs.values()), feed)
            tensors = feed | dict(zip(watch.outputs, found, strict=True))
            tensors |= {name: tensors[name].reshape(-1) for name in watch.lifted}
            for node in seen:
                _update(rows[node.name], making, node, tensors, counts=making == BODY)
    return list(rows.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Watch:
    """A model that hands out what its OutlierMatMul nodes read and give.

    Attributes:
        model: Serialized; weights in data files stay there.
        config: Session entries that it needs.
        outputs: Tensor -> the graph output that carries it; those of 16 bits and those in bodies as float32.
        lifted: Tensors that come out of bodies, flat.
        missing: Tensors that cannot be had, and why.
    """

    model: bytes
    config: dict[str, str]
    outputs: dict[str, str]
    lifted: set[str]
    missing: dict[str, str]


def _watch(model: Model, nodes: Sequence[gs.Node]) -> _Watch:
    built = skeleton(model)
    graph = built.proto.graph
    here = {entry.name for entry in graph.input} | {name for node in graph.node for name in node.output}
    wide: dict[str, str] = {}  # numpy knows no bfloat16: such tensors come out as float32, which holds them exactly
    names = {tensor.name: _dtype(node) for node in nodes for tensor in (node.inputs[0], node.outputs[0])}
    for name, dtype in names.items():
        if name in here and dtype.name == "bfloat16":
            wide[name] = f"qpipe_wide_{name}"
            graph.node.append(onnx.helper.make_node("Cast", [name], [wide[name]], to=onnx.TensorProto.FLOAT))
    exposed = expose(built.proto, [wide.get(name, name) for name in names])
    outputs = {name: exposed.outputs[w] for name in names if (w := wide.get(name, name)) in exposed.outputs}
    folder = place_weights(built)
    config = {FOLDER_KEY: str(folder)} if folder else {}
    data = built.proto.SerializeToString()
    return _Watch(model=data, config=config, outputs=outputs, lifted=exposed.lifted, missing=exposed.not_covered)


def operators_table(rows: Sequence[OperatorRow]) -> Table:
    """Return the table of `compare_operators`."""
    about = "largest difference from the numpy reference on the same input, in units of the node's largest output"
    columns = (
        Column(key="node", title="node"),
        Column(key=PLUGIN, title="plugin", kind="number", about=about),
        Column(key=BODY, title="function body", kind="number", about=about),
        Column(
            key="new_outliers",
            title="new outliers",
            kind="count",
            about="values beyond what calibration saw; they got two digits",
        ),
    )
    shown = [{"node": row.node, **row.differences, "new_outliers": row.new_outliers} for row in rows]
    return Table(
        name="operators",
        title="OutlierMatMul: difference from the numpy reference",
        columns=columns,
        rows=tuple(shown),
        about=about,
    )


def operator_notes(rows: Sequence[OperatorRow]) -> Iterator[str]:
    """Yield what a user should know about the rows."""
    for row in rows:
        if row.unseen:
            yield f"{row.node}: not compared with its reference: {row.unseen}"
        if not row.agrees():
            found = ", ".join(f"{making} {difference:.1e}" for making, difference in row.differences.items())
            yield f"{row.node}: plugin, function body and reference disagree ({found}); please report it"
    met = sum(row.new_outliers for row in rows)
    if met:
        share = met / sum(row.elements for row in rows)
        yield (
            f"{met} new outliers ({share:.4%} of the inputs of OutlierMatMul): values beyond what calibration saw, "
            "kept exact in two digits; many of them ask for calibration data nearer to this"
        )


def _is_comparable(node: gs.Node) -> bool:
    if (node.domain, node.op) != (contract.DOMAIN, contract.OP_TYPE) or len(node.inputs) < 5:
        return False
    return all(_constant(tensor) is not None for tensor in node.inputs[1:5])


def _dtype(node: gs.Node) -> np.dtype[Any]:
    """Type of the activations, which that of the outlier weights is: tensors in bodies need not have one."""
    w_outlier = _constant(node.inputs[4])
    assert w_outlier is not None
    return w_outlier.dtype


def _update(row: OperatorRow, making: str, node: gs.Node, tensors: Batch, *, counts: bool) -> None:
    packed = contract.Packed(**dict(zip(contract.INPUTS[1:5], map(_constant, node.inputs[1:5]), strict=True)))  # type: ignore[arg-type]
    bias = _constant(node.inputs[5]) if len(node.inputs) > 5 else None
    x, y = tensors[node.inputs[0].name], tensors[node.outputs[0].name].reshape(-1, len(packed.w_q))
    if not y.size:
        return  # of no rows, or in a branch that was not taken
    depth = x.shape[-1] if x.ndim > 1 else x.size // len(y)
    if contract.padded(depth, int(node.attrs.get("padding", contract.PADDING))) != packed.w_q.shape[1]:
        row.unseen = "it reads in every iteration what another body computed"
        return
    x = x.astype(_dtype(node)).reshape(-1, depth)
    x = np.tile(x, (len(y) // len(x), 1))  # a body may read the same rows of the main graph in every iteration
    expected, met = contract.reference(x, packed, bias, limit=float(node.attrs.get("limit", 0.0)))
    row.differences[making] = max(row.differences.get(making, 0.0), _difference(y, expected))
    if counts:
        row.new_outliers += int(met)
        row.elements += x.size


def _difference(found: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    wide, reference = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(reference)
    if not np.array_equal(np.isfinite(wide), finite):
        return float("inf")
    largest = np.abs(reference[finite]).max(initial=0.0)
    apart = np.abs(wide[finite] - reference[finite]).max(initial=0.0)
    return float(apart / largest) if largest else float(apart)


def _constant(tensor: gs.Tensor) -> npt.NDArray[Any] | None:
    weight = weight_of(tensor)
    return None if weight is None else np.asarray(weight.values())
