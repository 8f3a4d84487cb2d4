"""Evidence from ONNX Runtime's CPU provider: its optimizer is run, and each node looked up in the graph that it leaves.

The optimizer keeps the name of a node when it turns it into an integer kernel, with ``_token_<n>`` behind it where it
had to make the name unique, and beside moving them it makes no Q/DQ of its own. So a node that reads codes in the file
is found by its name, and a DequantizeLinear on activations that is left tells of a pair that no kernel took.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from ..graph import Model, clone, save
from ..runtime import load_onnxruntime
from ..session import SessionExtras, make_session
from . import Evidence, Fate, Island, Verdict
from .ort_reasons import why_island, why_wrong
from .structure import INTEGER, PACKED, Candidate, candidates, describe_codes, nodes_of, pairs

WEIGHTS_ONLY = "only its weight is stored as codes, which become real before it runs"
NO_CODES = "it reads no codes in the file"
INTEGER_KERNELS = INTEGER | {"QEmbedLayerNormalization"}
_ADDED_TO_NAMES = re.compile(r"(/\w+Fusion/)?(_token_\d+)*$")
_GIVES_FLOAT = INTEGER_KERNELS | PACKED | {"DequantizeLinear", "Cast"}
_CODES = frozenset(
    getattr(onnx.TensorProto, name) for name in ("INT8", "UINT8", "INT16", "UINT16", "INT4", "UINT4", "INT2", "UINT2")
)
_QGEMM_WITH_FLOAT_OUTPUT = 7
_SIDE_FILE = "session.optimized_model_external_initializers_file_name"


@dataclass(slots=True)
class Optimized:
    """The graph that ONNX Runtime runs.

    Attributes:
        nodes: By name.
        bases: By the name that they have in the file, as far as the optimizer added to it.
        codes: Tensors that hold codes.
        producers: Tensor -> the node that computes it.
        readers: Tensor -> nodes that read it.
    """

    nodes: dict[str, onnx.NodeProto] = field(default_factory=dict)
    bases: dict[str, onnx.NodeProto] = field(default_factory=dict)
    codes: set[str] = field(default_factory=set)
    producers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    readers: dict[str, list[onnx.NodeProto]] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: onnx.GraphProto) -> Optimized:
        """Index a graph and its bodies."""
        found = cls()
        for inner in _graphs(graph):
            found.codes.update(t.name for t in inner.initializer if t.data_type in _CODES)
            found.codes.update(v.name for v in inner.input if v.type.tensor_type.elem_type in _CODES)
            for node in inner.node:
                found._add(node)
        return found

    def _add(self, node: onnx.NodeProto) -> None:
        self.nodes[node.name] = node
        self.bases.setdefault(_ADDED_TO_NAMES.sub("", node.name), node)
        self.producers.update({name: node for name in node.output if name})
        for name in dict.fromkeys(node.input):
            self.readers.setdefault(name, []).append(node)
        if node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear"):
            self.codes.add(node.output[0])
        elif node.op_type == "QGemm":
            self.codes.update(node.output if len(node.input) > _QGEMM_WITH_FLOAT_OUTPUT else ())
        elif node.op_type not in _GIVES_FLOAT and (node.op_type.startswith("QLinear") or self.on_codes(node)):
            self.codes.update(node.output)

    def on_codes(self, node: onnx.NodeProto) -> bool:
        """Whether the first input of a node, or another that is computed, holds codes."""
        return any(name in self.codes and (i == 0 or name in self.producers) for i, name in enumerate(node.input))

    def path_to(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Return what made the codes that a dequantizer reads, and the moves up to it; empty for stored codes."""
        path: list[onnx.NodeProto] = []
        name = node.input[0]
        while name in self.producers:
            path.insert(0, self.producers[name])
            if path[0].op_type == "QuantizeLinear" or _is_kernel(path[0]):
                return path
            name = next((n for n in path[0].input if n in self.codes), "")
        return []

    def feeds_kernel(self, node: onnx.NodeProto) -> bool:
        """Whether an integer kernel reads a result of a node."""
        return any(_is_kernel(reader) for name in node.output for reader in self.readers.get(name, ()))

    def find(self, name: str) -> onnx.NodeProto | None:
        """Return what a node of the file became, None when it is gone under its name."""
        return self.nodes.get(name, self.bases.get(name))


def evidence(model: Model, file: Path | None = None) -> Evidence:
    """Run ONNX Runtime's optimizer on a model and say what became of its pairs and products.

    Args:
        model: Any model.
        file: Holds just this model; None for a model in memory, which goes through a temporary file.

    Raises:
        QpipeError: ONNX Runtime is missing, or does not run the model.
    """
    optimized = Optimized.of(optimize(model, file))
    fates = tuple(_fate(candidate, optimized) for candidate in candidates(model.graph))
    borders, islands = _left(optimized)
    return Evidence(
        source=f"the optimized graph of ONNX Runtime {load_onnxruntime().__version__}, CPU provider, on this CPU",
        measured=True,
        fates=fates,
        pairs=len(pairs(model.graph)),
        borders=borders,
        islands=islands,
    )


def optimize(model: Model, file: Path | None = None) -> onnx.GraphProto:
    """Return the graph that ONNX Runtime's CPU provider makes of a model, weights not loaded."""
    with tempfile.TemporaryDirectory(prefix="qpipe-") as name:
        folder = Path(name)
        # Weights go into a file beside it: a graph that holds them may be too large to be written.
        extras = SessionExtras(optimized_model=folder / "optimized.onnx", config={_SIDE_FILE: "optimized.data"})
        source = folder / "source.onnx"
        if file is not None and all(_name_in_file(node) == node.name for node in nodes_of(model.graph)):
            source = file
        else:
            named = clone(model)
            for node in nodes_of(named.graph):
                vars(node).pop("origin", None)  # else the node is written as it was in the file, without a name
            save(named, source)
        make_session(source, extras=extras)
        return onnx.load(folder / "optimized.onnx", load_external_data=False).graph


def _name_in_file(node: gs.Node) -> str:
    """Return the name that a node has in its file; in memory each has one of its own."""
    origin = vars(node).get("origin")
    return str(origin.proto.name) if origin is not None else ""


def _fate(candidate: Candidate, optimized: Optimized) -> Fate:
    node, found = candidate.node, optimized.find(candidate.node.name)
    verdict, reason = _verdict(candidate, found, optimized), ""
    if verdict == "island":
        reason = why_island(candidate)
    elif verdict == "integer":
        reason = why_wrong(candidate)
    elif verdict == "float":
        reason = WEIGHTS_ONLY if candidate.reads else NO_CODES
    return Fate(
        node=node.name,
        op=node.op,
        verdict=verdict,
        codes=describe_codes(candidate),
        became=found.op_type if found is not None else "",
        reason=reason,
    )


def _verdict(candidate: Candidate, found: onnx.NodeProto | None, optimized: Optimized) -> Verdict:
    if found is None:
        return "merged" if candidate.on_codes else "float"
    if found.op_type in PACKED:
        return "packed"
    if _is_kernel(found):
        return "integer"
    if optimized.on_codes(found):
        return "codes"
    return "island" if candidate.on_codes else "float"


def _is_kernel(node: onnx.NodeProto) -> bool:
    return node.op_type in INTEGER_KERNELS or node.op_type.startswith("QLinear")


def _left(optimized: Optimized) -> tuple[int, tuple[Island, ...]]:
    """Return how many dequantizers stand behind kernels, and which pairs are left as a whole."""
    borders, islands = 0, []
    for node in optimized.nodes.values():
        if node.op_type != "DequantizeLinear" or node.input[0] not in optimized.producers:
            continue
        path = optimized.path_to(node)
        if path and path[0].op_type == "QuantizeLinear" and not any(optimized.feeds_kernel(step) for step in path):
            readers = tuple(reader.name for reader in optimized.readers.get(node.output[0], ()))
            islands.append(Island(tensor=path[0].input[0], readers=readers))
        elif path:
            borders += 1
    return borders, tuple(islands)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)
