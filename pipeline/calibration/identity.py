"""Which model statistics belong to, and what to say when they belong to another."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx

from ...calibrate.errors import DataError
from ..graph import Model, Topology, from_proto, load, model_hash, topology


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelIdentity:
    """What makes a model the same model.

    Attributes:
        hash: SHA-256 of graph and weights; empty when nothing is known.
        topology: The nodes and how they hang together; only to say what differs.
    """

    hash: str = ""
    topology: Topology = field(default_factory=lambda: Topology("", ()))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelIdentity:
        """Return the identity that `to_dict` described."""
        nodes = tuple((str(name), str(op)) for name, op in data["nodes"])
        return cls(hash=str(data["hash"]), topology=Topology(str(data["topology"]), nodes))

    def to_dict(self) -> dict[str, Any]:
        """Return the identity as JSON values."""
        nodes = [list(node) for node in self.topology.nodes]
        return {"hash": self.hash, "topology": self.topology.digest, "nodes": nodes}

    def check(self, model: ModelIdentity, *, where: str) -> None:
        """Refuse statistics of another model.

        Args:
            model: The model that they are to be used for.
            where: The statistics, for the message.

        Raises:
            DataError: The models differ; shows up to five differences.
        """
        if self.hash == model.hash:
            return
        lines = self.topology.differences(model.topology) or ["the graphs are the same, the weights differ"]
        raise DataError(
            "the calibration file belongs to another model",
            where=where,
            found=f"statistics of model {self.hash[:12]}, this model {model.hash[:12]}: {'; '.join(lines)}",
            expected="the model that was calibrated (the first; this model is the second)",
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
    return ModelIdentity(hash=model_hash(model), topology=topology(model))
