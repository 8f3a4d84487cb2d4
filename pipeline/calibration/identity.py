"""Which model statistics belong to, and what to say when they belong to another."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from ...calibrate.errors import DataError
from ..graph import Model, from_proto, load, model_hash, topology

_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """What makes a model the same model.

    Attributes:
        hash: SHA-256 of graph and weights; empty when nothing is known.
        topology: SHA-256 of the nodes and how they hang together.
        nodes: Name and operator of each node, in order; only to say what differs.
    """

    hash: str = ""
    topology: str = ""
    nodes: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelIdentity:
        """Return the identity that `to_dict` described."""
        nodes = tuple((str(name), str(op)) for name, op in data["nodes"])
        return cls(hash=str(data["hash"]), topology=str(data["topology"]), nodes=nodes)

    def to_dict(self) -> dict[str, Any]:
        """Return the identity as JSON values."""
        return {"hash": self.hash, "topology": self.topology, "nodes": [list(node) for node in self.nodes]}

    def differences(self, other: ModelIdentity) -> list[str]:
        """Return what ``other`` has different, one line each; empty when they are the same model."""
        if self.hash == other.hash:
            return []
        if self.topology == other.topology:
            return ["the graphs are the same, the weights differ"]
        lines = []
        matcher = difflib.SequenceMatcher(None, self.nodes, other.nodes, autojunk=False)
        for kind, a0, a1, b0, b1 in matcher.get_opcodes():
            if kind != "equal":
                lines += [f"only in the statistics: {op} {name!r}" for name, op in self.nodes[a0:a1]]
                lines += [f"only in the model: {op} {name!r}" for name, op in other.nodes[b0:b1]]
        return lines or ["the same nodes are connected differently"]

    def check(self, model: ModelIdentity, *, where: str) -> None:
        """Refuse statistics of another model.

        Args:
            model: The model that they are to be used for.
            where: The statistics, for the message.

        Raises:
            DataError: The models differ; shows up to five differences.
        """
        lines = self.differences(model)
        if not lines:
            return
        more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
        raise DataError(
            "the calibration file belongs to another model",
            where=where,
            found=f"model {self.hash[:12]}: " + "; ".join([*lines[:_SHOWN], *more]),
            expected=f"model {model.hash[:12]}",
            do="calibrate this model again, or pass --calib-by-name to match tensors by name only",
        )


def identify(model: Model | onnx.ModelProto | str | Path) -> ModelIdentity:
    """Return the identity of a model; reads all its weights once.

    Raises:
        ModelError: The model is broken.
        UsageError: No such file.
    """
    if isinstance(model, (str, Path)):
        model = load(model)
    elif isinstance(model, onnx.ModelProto):
        model = from_proto(model)
    shape = topology(model)
    return ModelIdentity(hash=model_hash(model), topology=shape.digest, nodes=shape.nodes)
