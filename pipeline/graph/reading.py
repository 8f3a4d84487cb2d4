"""Reading a model file that may be anything: what it is, whether it is safe, whether it is valid, in that order."""

from __future__ import annotations

import difflib
import stat
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from ...calibrate.errors import ModelError, UsageError
from .checking import check_proto, check_tensor
from .constants import FileValues, Values
from .embedded import split
from .external import DataFolder
from .importer import adopt
from .model import Model
from .protos import MAX_PROTO, byte_size, flaws, keyed_tensors, refer
from .scratch import mapped

_START = 2048
"""Bytes that tell what a file is."""
_MAPPED = 2**26
"""Bytes from which a model file is mapped; smaller ones may be overwritten while they are in use."""
_LFS = b"version https://git-lfs.github.com/spec/"
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (_LFS, "a git-lfs pointer", "git lfs pull"),
    (b"PK\x03\x04", "a zip archive (a torch checkpoint?)", "give the .onnx file; qpipe export makes one"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"\x80\x02", "a Python pickle (a torch checkpoint?)", "give the .onnx file; qpipe export makes one"),
    (b"\x80\x04", "a Python pickle (a torch checkpoint?)", "give the .onnx file; qpipe export makes one"),
    (b"GGUF", "a GGUF file", "give the ONNX export of the model"),
    (b"\x89HDF\r\n", "an HDF5 file (a Keras model?)", "convert it to ONNX first"),
)


def load(path: str | Path, *, allow_hardlinks: bool = False) -> Model:
    """Load a model; its external data stays in its files.

    Args:
        path: The ``.onnx`` file; the model's folder is the one it lies in.
        allow_hardlinks: Accept data files that have other names outside the model's folder.

    Returns:
        The model, checked.

    Raises:
        UsageError: There is no such file, it is a folder, or it may not be read.
        ModelError: The file is no ONNX model, is invalid, or refers to data it must not or cannot use.
    """
    model = Path(path)
    data = _read(model)
    kind = _kind(bytes(data[:_START]), len(data))
    if kind is not None:
        raise ModelError(f"{model.name} is no ONNX model but {kind[0]}", where=str(model), do=kind[1])
    folder, parted = DataFolder(model, allow_hardlinks=allow_hardlinks), split(data)
    proto = _parse(parted.rest, model)
    weights = resolve(proto, folder)
    embedded = parted.attach(proto)
    if embedded is None:
        proto, embedded = _parse(data, model), {}
        weights = resolve(proto, folder)
    weights.update(embedded)
    check_proto(proto, where=str(model))
    return adopt(proto, model.absolute(), weights)


def _parse(data: bytes | memoryview, path: Path) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(bytes(data))
    except DecodeError as error:
        raise ModelError(
            f"{path.name} is no ONNX model, or is cut off",
            where=str(path),
            found=f"{len(data)} bytes that do not parse: {error}",
            expected="an ONNX model (protobuf)",
            do="fetch or export the file again and compare its size with the original",
        ) from error
    for flaw in flaws(proto):
        raise ModelError(f"{path.name} is damaged", where=str(path), found=flaw, do="fetch or export it again")
    return proto


def _read(path: Path) -> bytes | memoryview:
    """Return the content of a file; that of a large one is mapped, and only what is looked at is read."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UsageError("this is a folder, not a model file", where=str(path), do=_nearby(path, path.name))
        if not stat.S_ISREG(status.st_mode):
            raise UsageError("this is a device, pipe or socket, not a model file", where=str(path))
        if status.st_size > MAX_PROTO:
            raise ModelError(
                f"{path.name} is too large to be one protobuf message",
                where=str(path),
                found=f"{status.st_size} bytes",
                expected=f"at most {MAX_PROTO}",
                do="export it again with its weights in an external data file",
            )
        if status.st_size < _MAPPED:
            return path.read_bytes()
        with path.open("rb") as file:
            return memoryview(mapped(file.fileno(), status.st_size))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError("no such file", where=str(path), do=_nearby(path.parent, path.name)) from None
    except PermissionError:
        raise UsageError("no permission to read this file", where=str(path), do=f"chmod u+r {path}") from None


def _nearby(folder: Path, name: str) -> str:
    """Say which model files lie in or under ``folder``, the nearest name first."""
    if not folder.is_dir():
        return f"check the path: {folder} does not exist"
    found = [entry for pattern in ("*.onnx", "*/*.onnx") for entry in sorted(folder.glob(pattern))[:100]]
    if not found:
        return f"check the path: no .onnx file lies in {folder}"
    near = difflib.get_close_matches(name, [entry.name for entry in found], n=1, cutoff=0.0)
    best = next(entry for entry in found if not near or entry.name == near[0])
    return f"did you mean {best}?"


def _kind(start: bytes, size: int) -> tuple[str, str] | None:
    """Recognise common files that are no model by their first bytes; return the kind and what to do."""
    if not size:
        return "an empty file (0 bytes)", "fetch or export the file again"
    for magic, kind, remedy in _KINDS:
        if start.startswith(magic):
            return kind, remedy
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size:
        return "a safetensors file", "give the .onnx file; qpipe export makes one from a model folder"
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "an HTML page", "download the file itself, not the page that shows it"
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in start) and _decodes(start):
        return "a text file", "give the .onnx file"
    return None


def _decodes(data: bytes) -> bool:
    return "\ufffd" not in data[:-4].decode(errors="replace")


def resolve(proto: onnx.ModelProto, folder: DataFolder) -> dict[str, Values]:
    """Apply the path rules to every tensor with external data, before anything is opened.

    Returns:
        The values by key; each such tensor's ``location`` has become the key.

    Raises:
        ModelError: A rule is broken.
    """
    weights: dict[str, Values] = {}
    for tensor in keyed_tensors(proto):
        check_tensor(tensor, where=str(folder.folder))
        entries = {entry.key: entry.value for entry in tensor.external_data}
        source = folder.locate(tensor.name, entries, byte_size(tensor.data_type, tensor.dims))
        values = FileValues(tensor, source)
        weights[values.key] = values
        refer(tensor, location=values.key)
    return weights
