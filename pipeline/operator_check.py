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
import onnx_graphsurgeon as gs

from ..plugins.outlier_matmul import op as contract
from .constants import dtype_name, weight_of
from .graph import Model
from .layers import with_outputs
from .report import Column, Table
from .session import SessionExtras, make_session, plugin_status

Batch = Mapping[str, npt.NDArray[Any]]

PLUGIN, BODY = "plugin", "body"

AGREEMENT = {"float32": 1e-4, "float16": 4e-3}
"""Largest difference, in units of the node's largest output, that different orders of summation explain."""


@dataclass(slots=True, kw_only=True)
class OperatorRow:
    """One OutlierMatMul node.

    Attributes:
        node: Its name.
        dtype: Type of its activations.
        differences: Making -> largest difference from numpy, in units of the node's largest output.
        new_outliers: Elements beyond the calibrated amplitude that numpy met.
        elements: Elements of its input, those of outlier columns included.
    """

    node: str
    dtype: str
    differences: dict[str, float] = field(default_factory=dict)
    new_outliers: int = 0
    elements: int = 0

    def agrees(self) -> bool:
        """Whether all makings give the same numbers, up to the order of summation."""
        return all(difference <= AGREEMENT[self.dtype] for difference in self.differences.values())


def compare_operators(
    model: Model, batches: Sequence[Batch], *, device: str = "cpu", threads: int | None = None
) -> list[OperatorRow]:
    """Run every OutlierMatMul of a model with the plugin and without, and compute it with numpy.

    Args:
        model: The quantized model; nodes inside bodies of If, Loop and Scan, and bfloat16 ones, are left out.
        batches: Inputs by name.
        device: As for `make_session`; without the plugin it is always the CPU.
        threads: As for `make_session`.

    Returns:
        One row per node, in the graph's order; without a built plugin the rows say nothing of it.
    """
    nodes = [node for node in model.graph.nodes if _is_comparable(node)]
    rows = {node.name: OperatorRow(node=node.name, dtype=dtype_name(node.inputs[0])) for node in nodes}
    if not rows:
        return []
    names = dict.fromkeys(tensor.name for node in nodes for tensor in (node.inputs[0], node.outputs[0]))
    source, config = with_outputs(model, names)
    makings = [PLUGIN, BODY] if plugin_status() == "registered" else [BODY]
    for making in makings:
        session = make_session(
            source,
            device=device if making == PLUGIN else "cpu",
            threads=threads,
            extras=SessionExtras(config=config, plugin=making == PLUGIN),
        )
        wanted = [output.name for output in session.get_outputs() if output.name in names]
        fed = {entry.name for entry in session.get_inputs()}
        for batch in batches:
            feed = {name: batch[name] for name in fed}
            tensors = feed | dict(zip(wanted, session.run(wanted, feed), strict=True))
            for node in nodes:
                _update(rows[node.name], making, node, tensors, counts=making == BODY)
    return list(rows.values())


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
    return dtype_name(node.inputs[0]) in AGREEMENT and all(_constant(t) is not None for t in node.inputs[1:5])


def _update(row: OperatorRow, making: str, node: gs.Node, tensors: Batch, *, counts: bool) -> None:
    packed = contract.Packed(**dict(zip(contract.INPUTS[1:5], map(_constant, node.inputs[1:5]), strict=True)))  # type: ignore[arg-type]
    bias = _constant(node.inputs[5]) if len(node.inputs) > 5 else None
    x, y = tensors[node.inputs[0].name], tensors[node.outputs[0].name]
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
