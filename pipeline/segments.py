"""Run a model over all its data one segment at a time, with weights that may change in front of each segment.

The nodes lie in topological order; the model is cut in front of the first reader of each tensor that is asked for. A
segment holds the nodes from one cut to the next, and only its weights are in memory. Between two segments live, for
every batch, the tensors that later nodes still read; large ones lie in the scratch file. So every node runs once per
batch, however many cuts there are.

What does not depend on the model's inputs is not carried from segment to segment: each that needs it computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper, numpy_helper

from ..calibrate.errors import DataError, UnsupportedError
from .calibration.probe import IN_MEMORY, place_weights
from .graph import Model
from .graph.exporter import Skeleton, skeleton
from .graph.scratch import keep
from .session import SessionExtras, make_session, ort_errors, translate

Array = npt.NDArray[Any]
Batch = Mapping[str, Array]
Replacements = Callable[[str], Mapping[int, Array]]
"""Node name -> what stands in place of its inputs, by their number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cuts:
    """A model and where it is cut. Nodes are numbered in topological order.

    Attributes:
        built: The model without its large weights.
        nodes: Of its main graph.
        places: Tensor -> its first reader, in the order of the cuts.
        made: Tensor -> the node that makes it, -1 for the model's inputs; of those that depend on the inputs.
        last: Tensor -> the last node that reads it on the way to one of the cuts.
        inputs: Element type by name of the model's inputs.
    """

    built: Skeleton
    nodes: Sequence[NodeProto]
    places: Mapping[str, int]
    made: Mapping[str, int]
    last: Mapping[str, int]
    inputs: Mapping[str, int]

    @classmethod
    def of(cls, model: Model, tensors: Iterable[str]) -> Cuts:
        """Return the cuts in front of the readers of ``tensors``; behind all nodes for those that no node reads."""
        built = skeleton(model)
        graph, first, last = built.proto.graph, dict[str, int](), dict[str, int]()
        nodes, constants = list(graph.node), {tensor.name for tensor in graph.initializer}
        inputs = {i.name: i.type.tensor_type.elem_type for i in graph.input if i.name not in constants}
        made = dict.fromkeys(inputs, -1)
        for index, node in enumerate(nodes):
            names = reads(node)
            for name in names:
                first.setdefault(name, index)
            if not names.isdisjoint(made):
                made.update(dict.fromkeys(filter(None, node.output), index))
        at = {name: first.get(name, len(nodes)) for name in tensors}
        places = dict(sorted(at.items(), key=lambda item: item[1]))
        for index in leading_to(places, nodes):
            last.update(dict.fromkeys(reads(nodes[index]), index))
        for name, place in places.items():
            last[name] = max(place, last.get(name, 0))
        return cls(built=built, nodes=nodes, places=places, made=made, last=last, inputs=inputs)

    def alive(self, tensor: str) -> frozenset[str]:
        """Return the tensors that live at the cut of ``tensor``: itself, and what is made before and needed later."""
        place = self.places[tensor]
        return frozenset({tensor, *(n for n, made in self.made.items() if made < place <= self.last.get(n, -1))})


@dataclass(slots=True, kw_only=True)
class Stream:
    """All batches of the data on their way through a model.

    Attributes:
        cuts: The model.
        live: The tensors that are alive, by batch.
        replaced: Constants in place of inputs of nodes; asked once per node, when its segment runs.
        device: Where it runs.
        op_libraries: Libraries of custom operators that it needs.
        exact: Run every operator as ONNX defines it; what is large runs so in any case.
    """

    cuts: Cuts
    live: list[dict[str, Array]]
    replaced: Replacements = field(default=lambda node: {})  # noqa: ARG005
    device: str = "cpu"
    op_libraries: tuple[Path, ...] = ()
    exact: bool = False

    @classmethod
    def of(cls, cuts: Cuts, batches: Iterable[Batch], **options: Any) -> Stream:
        """Return the stream at the model's inputs.

        Args:
            cuts: The model.
            batches: Array by input name.
            options: Fields.

        Raises:
            DataError: A batch lacks an input.
        """
        return cls(cuts=cuts, live=[_fed(batch, cuts.inputs) for batch in batches], **options)

    def advance(self, tensor: str) -> Iterator[Array]:
        """Run the nodes in front of the first reader of ``tensor``, and yield its values batch by batch.

        The cuts must be passed in their order.

        Raises:
            UnsupportedError: Something else than a tensor lives at the cut.
            QpipeError: As `make_session`.
        """
        wanted = self.cuts.alive(tensor)
        segment = self._segment(wanted)
        for index, known in enumerate(self.live):
            made = segment(known) if segment else {}
            self.live[index] = {name: array for name, array in {**known, **made}.items() if name in wanted}
            yield self.live[index][tensor]

    def _segment(self, wanted: frozenset[str]) -> Callable[[Batch], Batch] | None:
        """Return what makes the ``wanted`` tensors that are not alive yet; None when all are."""
        known = self.live[0]
        missing = sorted(wanted - set(known))
        if not missing:
            return None
        part = Skeleton(self._proto(missing, known), self.cuts.built.weights)
        config = {}
        mapped, folder = part.nbytes > IN_MEMORY, place_weights(part)
        if folder is not None:
            config["session.model_external_initializers_file_folder_path"] = str(folder)
        extras = SessionExtras(config=config, op_libraries=self.op_libraries, mapped=mapped, plugin=False)
        session = make_session(part.proto, exact=mapped or self.exact, device=self.device, extras=extras)
        inputs = [entry.name for entry in session.get_inputs()]

        def run(batch: Batch) -> Batch:
            try:
                arrays = session.run(missing, {name: batch[name] for name in inputs})
            except ort_errors() as error:
                raise translate(error, where="running layer by layer") from error
            return {name: _kept(name, array) for name, array in zip(missing, arrays, strict=True)}

        return run

    def _proto(self, missing: Sequence[str], known: Batch) -> onnx.ModelProto:
        """Return the model of the nodes that make ``missing`` from the ``known`` tensors."""
        whole = self.cuts.built.proto
        proto = onnx.ModelProto()
        proto.ir_version = whole.ir_version
        proto.functions.extend(whole.functions)
        proto.opset_import.extend(whole.opset_import)
        graph, arrays = proto.graph, dict[int, Mapping[int, Array]]()
        graph.name = "segment"

        def needs(index: int) -> set[str]:
            node = self.cuts.nodes[index]
            arrays[index] = self.replaced(node.name)
            rest = {name for slot, name in enumerate(node.input) if slot not in arrays[index]}
            return (reads(node) - (set(node.input) - rest)) - set(known)

        for index in leading_to(missing, self.cuts.nodes, needs):
            graph.node.append(self.cuts.nodes[index])
            for slot, array in arrays[index].items():
                name = f"{graph.node[-1].input[slot]}|{index}"
                graph.node[-1].input[slot] = name
                graph.initializer.append(numpy_helper.from_array(array, name))
        used = {name for node in graph.node for name in reads(node)}
        graph.initializer.extend(tensor for tensor in whole.graph.initializer if tensor.name in used)
        graph.sparse_initializer.extend(t for t in whole.graph.sparse_initializer if t.values.name in used)
        graph.input.extend(_info(name, array) for name, array in known.items() if name in used)
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in missing)
        return proto


def reads(node: NodeProto) -> set[str]:
    """Return the names that a node reads, those that its bodies take from outside included."""
    names = set(node.input)
    for attribute in node.attribute:
        for body in [attribute.g] if attribute.type == AttributeProto.GRAPH else attribute.graphs:
            names |= _taken(body)
    return names - {""}


def _taken(body: GraphProto) -> set[str]:
    own = {i.name for i in body.input} | {t.name for t in body.initializer} | {n for x in body.node for n in x.output}
    return ({name for node in body.node for name in reads(node)} | {o.name for o in body.output}) - own


def leading_to(
    tensors: Iterable[str], nodes: Sequence[NodeProto], needs: Callable[[int], set[str]] | None = None
) -> list[int]:
    """Return the numbers of the nodes that ``tensors`` depend on.

    Args:
        tensors: Names.
        nodes: In topological order.
        needs: What must be made for a node, by its number; None for all that it reads.
    """
    wanted, found = set(tensors), []
    for index in range(len(nodes) - 1, -1, -1):
        if not wanted.isdisjoint(nodes[index].output):
            found.append(index)
            wanted.difference_update(nodes[index].output)
            wanted |= needs(index) if needs is not None else reads(nodes[index])
    return found[::-1]


def _info(name: str, array: Array) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim)


def _kept(name: str, array: Any) -> Array:
    if not isinstance(array, np.ndarray):
        raise UnsupportedError(
            "the model cannot be run layer by layer",
            where=f"tensor {name!r}",
            found=f"a {type(array).__name__}",
            expected="tensors between its layers",
            do="qpipe quantize with --set weights.sequential=false, or qpipe validate without --layer-by-layer",
        )
    return keep(array) if array.dtype.hasobject is False else array


def _fed(batch: Batch, inputs: Mapping[str, int]) -> dict[str, Array]:
    missing = sorted(set(inputs) - set(batch))
    if missing:
        raise DataError("a batch lacks an input of the model", found=", ".join(batch), expected=", ".join(missing))
    known = TensorProto.DataType
    types = {name: helper.tensor_dtype_to_np_dtype(kind) for name, kind in inputs.items() if kind != known.UNDEFINED}
    return {name: np.asarray(batch[name], dtype=types.get(name)) for name in inputs}
