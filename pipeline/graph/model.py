"""The record that stands for a model: a graphsurgeon graph and what graphsurgeon has no place for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from .constants import Values


@dataclass
class Model:
    """A model in memory. Passes change ``graph`` in place; the other fields travel along.

    Attributes:
        graph: The main graph. Its ``opset`` is the version of the standard operators that is written.
        path: File that the model was loaded from, None when it was built in memory.
        ir_version: Version of the file format that is written.
        metadata: ``metadata_props`` of the model, written sorted by key.
        domains: Opset version of every operator domain beside the standard one.
        functions: Model-local functions, as they are in the file.
        shell: The ModelProto without graph, functions and the fields above: producer, documentation, ...
        weights: External data of tensors that the graph does not hold as constants (inside functions, sparse), by key.
    """

    graph: gs.Graph
    path: Path | None
    ir_version: int
    metadata: dict[str, str] = field(default_factory=dict)
    domains: dict[str, int] = field(default_factory=dict)
    functions: list[onnx.FunctionProto] = field(default_factory=list)
    shell: onnx.ModelProto = field(default_factory=onnx.ModelProto)
    weights: dict[str, Values] = field(default_factory=dict)

    @property
    def opset(self) -> int:
        """Version of the standard operators."""
        return int(self.graph.opset)

    @opset.setter
    def opset(self, version: int) -> None:
        self.graph.opset = version
