"""Activations with loud channels, and models quantized with the scheme w8a8-outlier."""

from __future__ import annotations

import numpy as np
import onnx
from qpipe.pipeline import graph
from qpipe.pipeline.stages.collect import CollectOptions, collect
from qpipe.pipeline.stages.decide import wanted_tensors
from qpipe.pipeline.stages.details import wanted_details
from qpipe.pipeline.stages.prepare import prepare
from quantizing import normal, quantize

LOUD = (3, 17, 40)


def loud_batches(count: int = 3, factor: float = 50.0) -> list[dict[str, np.ndarray]]:
    """Activations with three loud channels."""
    batches = [{"x": normal(2, 5, 96, seed=i)} for i in range(count)]
    for batch in batches:
        batch["x"][..., LOUD] *= factor
    return batches


def statistics(proto: onnx.ModelProto, batches: list[dict[str, np.ndarray]], level: str = "channels") -> object:
    """Statistics with magnitudes per channel."""
    prepared = prepare(graph.from_proto(proto))
    options = CollectOptions(details=wanted_details(prepared.graph, level))
    return collect(proto, wanted_tensors(prepared.graph), batches, options)


def outlier(proto: onnx.ModelProto, batches: list[dict[str, np.ndarray]], **recipe: object) -> object:
    found = statistics(proto, batches)
    options = {"min_inputs": 64, **recipe.pop("outliers", {})}
    return quantize(proto, calibration=found, scheme="w8a8-outlier", outliers=options, **recipe)
