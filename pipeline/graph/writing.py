"""Saving a model so that the target is the old one or the complete new one, whatever its size and whenever it stops.

A model with external data is two files, and no file system replaces two files in one step. So the new model is first
put in place reading its data under another name (``<model>.data~``), which is one rename; then the data gets its final
name beside that one, and the model is replaced by one that reads it there.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import onnx
from onnx import TensorProto

from ...calibrate.errors import WriteError
from ..files import claim, put, replace_file, require_space, temporary
from . import wire
from .constants import FileValues, Values
from .exporter import Skeleton, skeleton
from .model import Model
from .parallel import in_order
from .protos import MAX_PROTO, location_of, refer
from .scratch import release

EXTERNAL_THRESHOLD = 3 * 2**29
"""Above this size (1.5 GiB) weights go into a data file of their own."""

_WRITEBACK = 2**23
"""Bytes from which on it pays to have them brought to the disk."""

_ALIGNMENT = 4096
"""Weights begin at multiples of a memory page, so that a runtime can map them."""


def save(model: Model, path: str | Path, *, force: bool = False, external_threshold: int | None = None) -> list[Path]:
    """Write a model; see `pipeline.files` for what happens when that is interrupted.

    Args:
        model: The model; not changed.
        path: The target; ``<path>.data`` lies beside it when the weights are external.
        force: Replace existing files.
        external_threshold: Size in bytes above which weights become external data, 1.5 GiB when None.

    Returns:
        The files written, the model last.

    Raises:
        WriteError: The target exists, is the input itself, or cannot be written.
    """
    target = Path(path).absolute()
    data = target.with_name(f"{target.name}.data")
    built = skeleton(model)
    _refuse_input(model, built, (target, data))
    limit = EXTERNAL_THRESHOLD if external_threshold is None else external_threshold
    if built.nbytes > min(limit, MAX_PROTO) and any(_external(built.proto.graph)):
        _save_pair(built, target, data, force)
        return [data, target]
    with replace_file(target, force=force) as tmp:
        require_space(target, built.nbytes)
        is_read = _is_read(data, target)
        _write_whole(built, tmp)
    _remove([*_bridges(data), *([data] if is_read else [])])
    return [target]


def _save_pair(built: Skeleton, target: Path, data: Path, force: bool) -> None:
    with ExitStack() as stack:
        for file in (target, data):
            stack.enter_context(claim(file, force=force))
        require_space(target, built.nbytes)
        leftovers = _bridges(data)
        bridge = next(name for name in _bridge_names(data) if name not in leftovers)
        new_data = stack.enter_context(temporary(data))
        new_model = stack.enter_context(temporary(target))
        bridge_model = stack.enter_context(temporary(target))
        _write_data(built, new_data, data.name)
        new_model.write_bytes(_serialize(built))
        _rename_data(built, bridge.name)
        bridge_model.write_bytes(_serialize(built))
        put(new_data, bridge)
        put(bridge_model, target)
        _duplicate(bridge, new_data)
        put(new_data, data)
        put(new_model, target)
        _remove([bridge, *leftovers])


def _serialize(built: Skeleton) -> bytes:
    return bytes(built.proto.SerializeToString(deterministic=True))


class _Stream:
    """Values one after the other into a file, read and made ahead of the writing."""

    def __init__(self, values: Sequence[Values]) -> None:
        jobs = (job for held in values if held.takes_work for job in itertools.chain(held.jobs(), [_end]))
        self._made = in_order(jobs)
        self._waiting = 0

    def close(self) -> None:
        """Stop making values."""
        self._made.close()

    def write(self, name: str, values: Values, file: IO[bytes]) -> None:
        """Write the next values."""
        made = itertools.takewhile(lambda chunk: chunk is not None, self._made)
        length = sum(file.write(chunk) for chunk in (made if values.takes_work else values.chunks()))
        release(length)
        if length != values.nbytes:
            raise ValueError(f"weight {name!r} gave {length} bytes, its type and shape ask {values.nbytes}")
        self._waiting += length
        if self._waiting >= _WRITEBACK and hasattr(os, "posix_fadvise"):
            # Lets the system begin to bring them to the disk, so that less is left to wait for at the end; it would
            # also drop what is on the disk already, which of the bytes written last is nothing yet.
            file.flush()
            os.posix_fadvise(file.fileno(), file.tell() - self._waiting, 0, os.POSIX_FADV_DONTNEED)
            self._waiting = 0


def _end() -> None:
    """Mark in a stream where the next values begin."""


def _write_data(built: Skeleton, path: Path, name: str) -> None:
    """Stream the weights into ``path`` and make the skeleton's initializers refer to ``name``."""
    tensors = list(_external(built.proto.graph))
    weights = [built.weights[location_of(tensor)] for tensor in tensors]
    with path.open("xb") as file, contextlib.closing(_Stream(weights)) as stream:
        for tensor, values in zip(tensors, weights, strict=True):
            offset = -(-file.tell() // _ALIGNMENT) * _ALIGNMENT
            file.write(bytes(offset - file.tell()))
            stream.write(tensor.name, values, file)
            refer(tensor, location=name, offset=offset, length=values.nbytes)
    # Runtimes read external data of initializers only; attributes and functions keep theirs inside.
    built.fill()


def _write_whole(built: Skeleton, path: Path) -> None:
    """Write the model with all weights inside; see `wire`."""
    parts = list(wire.parts(built))
    streamed = [part.values for part in parts if part.values is not None]
    with path.open("xb") as file, contextlib.closing(_Stream(streamed)) as stream:
        for part in parts:
            file.write(part.head)
            if part.values is not None:
                stream.write(part.values.tensor.name, part.values, file)


def _rename_data(built: Skeleton, name: str) -> None:
    for tensor in _external(built.proto.graph):
        next(entry for entry in tensor.external_data if entry.key == "location").value = name


def _external(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Yield the initializers of a graph, and of the graphs inside it, whose data is elsewhere."""
    yield from (tensor for tensor in graph.initializer if tensor.data_location == TensorProto.EXTERNAL)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _external(attribute.g)


def _bridge_names(data: Path) -> Iterator[Path]:
    return (data.with_name(f"{data.name}~{number or ''}") for number in itertools.count())


def _bridges(data: Path) -> list[Path]:
    """Return the files under a passing name of ``data`` that killed runs left; a model may still read one of them."""
    return list(itertools.takewhile(os.path.lexists, _bridge_names(data)))


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _duplicate(source: Path, copy: Path) -> None:
    """Give a file a second name, or copy it where the file system has no hard links."""
    try:
        copy.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, copy)


def _is_read(data: Path, model: Path) -> bool:
    """Whether ``data`` is what the model that is about to be replaced reads its weights from."""
    if not (data.is_file() and model.is_file() and model.stat().st_size):
        return False
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(data.name.encode()) >= 0


def _refuse_input(model: Model, built: Skeleton, targets: tuple[Path, Path]) -> None:
    sources = {values.source.path for values in built.weights.values() if isinstance(values, FileValues)}
    if model.path is not None:
        sources.add(model.path)
    for target in targets:
        if any(target.exists() and source.exists() and target.samefile(source) for source in sources):
            raise WriteError(
                "the target is the input itself",
                where=str(target),
                do="choose another name with -o; qpipe never overwrites its input",
            )
