"""What makes a model the same model: a hash of its content, and the shape of its graph."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from .constants import Values
from .exporter import skeleton
from .importer import all_graphs
from .model import Model
from .reading import load


@dataclass(frozen=True, slots=True)
class Topology:
    """The nodes of a graph and how they hang together, without weights.

    Attributes:
        digest: SHA-256 over ``nodes`` and their connections.
        nodes: Name and operator of each node, in order.
    """

    digest: str
    nodes: tuple[tuple[str, str], ...]


def model_hash(model: Model | str | Path) -> str:
    """Return the SHA-256 of a model's content: graph and weights, external ones included, however they are stored."""
    if not isinstance(model, Model):
        model = load(model)
    built = skeleton(model)
    total = hashlib.sha256(built.proto.graph.SerializeToString(deterministic=True))
    for _, values in sorted(built.weights.items()):
        total.update(_digest(values))
    return total.hexdigest()


def _digest(values: Values) -> bytes:
    digest = hashlib.sha256()
    for chunk in values.chunks():
        digest.update(chunk)
    return digest.digest()


def topology(model: Model) -> Topology:
    """Return the topology of a model."""
    digest = hashlib.sha256()
    nodes = []
    for graph in all_graphs(model.graph):
        for node in graph.nodes:
            nodes.append((node.name, node.op))
            names = [tensor.name for tensor in [*node.inputs, *node.outputs]]
            digest.update(repr((node.name, node.op, node.domain or "", names)).encode())
    return Topology(digest.hexdigest(), tuple(nodes))
