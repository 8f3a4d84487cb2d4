"""Saving a model so that the target is the old one or the complete new one, whatever its size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import TensorProto

from ...calibrate.errors import WriteError
from .. import files
from .exporter import Skeleton, fill, keyed_tensors, location_of, skeleton
from .model import Model

EXTERNAL_THRESHOLD = 3 * 2**29
"""Above this size (1.5 GiB) weights go into a data file of their own."""

_ALIGNMENT = 4096


def save(model: Model, path: str | Path, *, force: bool = False, external_threshold: int | None = None) -> list[Path]:
    """Write a model; see `pipeline.files` for what happens when that is interrupted.

    Args:
        model: The model; not changed.
        path: The target, ``<path>.data`` beside it when the weights are external.
        force: Replace existing files.
        external_threshold: Size in bytes above which weights become external data, 1.5 GiB when None.

    Returns:
        The files written, the model last.

    Raises:
        WriteError: The target exists, is the input itself, or cannot be written.
    """
    target = Path(path).absolute()
    _refuse_input(model, target)
    built = skeleton(model)
    limit = EXTERNAL_THRESHOLD if external_threshold is None else external_threshold
    if sum(values.nbytes for values in built.weights.values()) + built.proto.ByteSize() <= limit:
        for tensor in keyed_tensors(built.proto):
            fill(tensor, built.weights)
        with files.replace_file(target, force=force) as tmp:
            tmp.write_bytes(built.proto.SerializeToString(deterministic=True))
        return [target]
    data = target.with_name(f"{target.name}.data")
    _refuse_input(model, data)
    with files.replace_file(target, force=force) as tmp, files.replace_file(data, force=force) as data_tmp:
        _write_data(built, data_tmp, data.name)
        tmp.write_bytes(built.proto.SerializeToString(deterministic=True))
    return [data, target]


def _write_data(built: Skeleton, path: Path, name: str) -> None:
    """Stream the weights into ``path`` and put references to ``name`` into the skeleton."""
    with path.open("xb") as file:
        for tensor in _initializers(built.proto.graph):
            if tensor.data_location != TensorProto.EXTERNAL:
                continue
            offset = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
            file.write(bytes(offset - file.tell()))
            for chunk in built.weights[location_of(tensor)].chunks():
                file.write(chunk)
            del tensor.external_data[:]
            for key, value in (("location", name), ("offset", offset), ("length", file.tell() - offset)):
                tensor.external_data.add(key=key, value=str(value))
        for tensor in keyed_tensors(built.proto):
            # Runtimes read external data of initializers only; attributes and functions keep theirs inside.
            if location_of(tensor) in built.weights:
                fill(tensor, built.weights)


def _initializers(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _initializers(attribute.g)


def _refuse_input(model: Model, target: Path) -> None:
    sources = {values.source.path for values in skeleton(model).weights.values() if hasattr(values, "source")}
    if model.path is not None:
        sources.add(model.path)
    for source in sources:
        if target.exists() and source.exists() and os.path.samefile(target, source):
            raise WriteError(
                "the target is the input itself",
                where=str(target),
                do="choose another name with -o; qpipe never overwrites its input",
            )
