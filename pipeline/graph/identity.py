"""What makes a model the same model: a hash of its content, and the shape of its graph."""

from __future__ import annotations

import difflib
import functools
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto

from .constants import Values
from .exporter import skeleton
from .model import Model
from .parallel import cores
from .protos import all_tensors, embed, header, location_of
from .queries import all_graphs
from .reading import load
from .scratch import release


@dataclass(frozen=True, slots=True)
class Topology:
    """The nodes of a graph and how they hang together, without weights.

    Attributes:
        digest: SHA-256 over ``nodes`` and the names of what they read and write.
        nodes: Name and operator of each node, in order.
    """

    digest: str
    nodes: tuple[tuple[str, str], ...]

    def differences(self, other: Topology, limit: int = 5) -> list[str]:
        """Say how ``other`` differs from this, ``limit`` differences at most; empty when the digests agree."""
        if self.digest == other.digest:
            return []
        found = list(_differences(self.nodes, other.nodes))
        more = [f"and {len(found) - limit} more"] if len(found) > limit else []
        return [*found[:limit], *more] or ["the same nodes, but connected in another way"]


def _differences(one: tuple[tuple[str, str], ...], other: tuple[tuple[str, str], ...]) -> Iterator[str]:
    matcher = difflib.SequenceMatcher(None, one, other, autojunk=False)
    for kind, start, stop, other_start, other_stop in matcher.get_opcodes():
        if kind != "equal":
            yield from (f"only in the first: {name} ({op})" for name, op in one[start:stop])
            yield from (f"only in the second: {name} ({op})" for name, op in other[other_start:other_stop])


def model_hash(model: Model | str | Path) -> str:
    """Return the SHA-256 of what a model computes: graph, functions and all weights, wherever they are stored.

    Metadata, documentation, producer and IR version do not count, so a saved copy has the hash of its source.
    External weights are read once, a few megabytes at a time.
    """
    return begin_hash(model if isinstance(model, Model) else load(model))()


def begin_hash(model: Model) -> Callable[[], str]:
    """Begin to compute `model_hash` of a model as it is now, in threads; the function returned waits for it."""
    built = skeleton(model)
    content = onnx.ModelProto(graph=built.proto.graph, functions=built.proto.functions)
    content.opset_import.extend(built.proto.opset_import)
    tensors = list(all_tensors(content))
    pool = ThreadPoolExecutor(max(1, cores() - 1), thread_name_prefix="qpipe-hash")
    digests = [pool.submit(_digest, tensor, built.weights) for tensor in tensors]
    pool.shutdown(wait=False)

    @functools.cache
    def finish() -> str:
        # The threads go on from the front; this one would only wait, and takes what they have not begun, from the back.
        own = {n: _digest(tensors[n], built.weights) for n in reversed(range(len(tensors))) if digests[n].cancel()}
        for number, tensor in enumerate(tensors):
            found, bare = own.get(number) or digests[number].result(), header(tensor)
            bare.ClearField("doc_string")
            bare.ClearField("metadata_props")
            tensor.CopyFrom(bare)
            embed(tensor, found)
        _drop_documentation(content.graph)
        return hashlib.sha256(content.SerializeToString(deterministic=True)).hexdigest()

    return finish


def _digest(tensor: TensorProto, weights: dict[str, Values]) -> bytes:
    digest = hashlib.sha256()
    if tensor.data_type == TensorProto.STRING:
        digest.update(repr(list(tensor.string_data)).encode())
        return digest.digest()
    values = weights.get(location_of(tensor)) or Values(tensor)
    for chunk in values.chunks():
        digest.update(chunk)
    release(values.nbytes)
    return digest.digest()


def _drop_documentation(graph: onnx.GraphProto) -> None:
    for field in ("doc_string", "metadata_props", "value_info", "name"):
        graph.ClearField(field)
    for node in graph.node:
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _drop_documentation(attribute.g)


def topology(model: Model) -> Topology:
    """Return the topology of a model, graphs inside its nodes included."""
    digest = hashlib.sha256()
    nodes = []
    for graph in all_graphs(model.graph):
        for node in graph.nodes:
            nodes.append((node.name, node.op))
            read, written = ([tensor.name for tensor in side] for side in (node.inputs, node.outputs))
            digest.update(repr((node.name, node.op, node.domain or "", read, written)).encode())
    return Topology(digest.hexdigest(), tuple(nodes))
