"""Inline: calls of model-local functions become the nodes of their bodies, which are then quantized like all others."""

from __future__ import annotations

import onnx.inliner

from ..graph import Model
from ..graph.exporter import skeleton
from ..graph.importer import adopt


def inline_functions(model: Model) -> Model:
    """Return ``model`` with the bodies of its functions in the places of their calls, of nested ones too.

    A model without functions comes back unchanged. Large weights are not looked at.
    """
    if not model.functions:
        return model
    built = skeleton(model)
    return adopt(onnx.inliner.inline_local_functions(built.proto), model.path, built.weights)
