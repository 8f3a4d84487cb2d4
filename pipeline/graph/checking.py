"""Is this graph a valid ONNX model? Asked after loading and after every stage, without its large weights."""

from __future__ import annotations

import re

import onnx

from ...calibrate.errors import ModelError
from .exporter import skeleton
from .importer import all_graphs
from .model import Model


def check(model: Model, *, after: str) -> None:
    """Check the structure of a model, so that a wrong graph becomes an error at the stage that made it.

    Names of tensors must be unique in their scope, nodes must come after what they read, and the ONNX checker must
    accept the whole (large weights left out).

    Raises:
        ModelError: Something is wrong; names the stage ``after``.
    """
    for graph in all_graphs(model.graph):
        names: dict[str, object] = {}
        for tensor in graph.tensors().values():
            names[tensor.name] = tensor
        for node in graph.nodes:
            for tensor in [*node.inputs, *node.outputs]:
                if tensor.name and names[tensor.name] is not tensor:
                    raise ModelError(
                        f"two tensors are called {tensor.name!r} after {after}",
                        where=f"node {node.name!r} ({node.op})",
                        expected="one tensor per name",
                    )
    check_proto(skeleton(model).proto, where=str(model.path or "model in memory"), after=after)


def check_proto(proto: onnx.ModelProto, *, where: str, after: str = "loading") -> None:
    """Run the ONNX checker.

    Raises:
        ModelError: With the checker's reason and node.
    """
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        reason, _, context = str(error).strip().partition("\n\n==> Context: ")
        node = re.search(r"[Nn]ode[ (:]+(?:name: )?([^)\n]*)", context or reason)
        raise ModelError(
            f"the model is not valid ONNX (after {after}): {reason.splitlines()[0]}",
            where=f"{where}, {context.splitlines()[0]}" if context else where,
            found=node.group(0) if node else None,
            do="export the model again, or report this if qpipe wrote it",
        ) from error
