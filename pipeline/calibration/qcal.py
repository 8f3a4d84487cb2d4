"""The ``.qcal`` file: plain safetensors, with everything that is no array as JSON in its metadata.

Any safetensors reader opens it: the arrays of tensor ``T`` are ``T:ids``, ``T:counts`` and, where collected,
``T:channel_amax``, ``T:channel_total``, ``T:channel_energy``, ``T:gram``. The metadata key ``qcal`` holds the rest as
JSON, a checksum of every array among it; ``checksum`` covers that JSON and the file's own index. The file depends on
its content only: no dates, no host, a fixed order.

Source: safetensors format, https://huggingface.co/docs/safetensors: 8 bytes header length, JSON header, data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...calibrate.errors import DataError, UsageError
from ...calibrate.stats.channel_amax import ChannelAmax
from ...calibrate.stats.extrema import Extrema
from ...calibrate.stats.gram import Gram
from ...calibrate.stats.histogram import Histogram
from ..files import replace_file
from .identity import ModelIdentity
from .record import Calibration, TensorStats

Array = npt.NDArray[Any]

SCHEMA = 1
_DTYPES = {"I64": np.dtype("<i8"), "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "U16": np.dtype("<u2")}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # the limit of the safetensors library
_CHUNK = 1 << 24


def save(calibration: Calibration, path: str | Path, *, force: bool = False) -> None:
    """Write a ``.qcal`` file; the target is the old file or the complete new one.

    Raises:
        WriteError: The target exists (without ``force``) or cannot be written.
    """
    blocks = dict(_blocks(calibration))
    # The widest first, so that every array is aligned.
    order = sorted(blocks, key=lambda name: (-blocks[name].dtype.itemsize, name))
    index: dict[str, Any] = {}
    end = 0
    for name in order:
        start, end = end, end + blocks[name].nbytes
        shape = list(blocks[name].shape)
        index[name] = {"dtype": _NAMES[blocks[name].dtype], "shape": shape, "data_offsets": [start, end]}
    content = json.dumps(_content(calibration, blocks), sort_keys=True)
    metadata = {"checksum": _checksum(content, index), "format": "qcal", "qcal": content, "schema": str(SCHEMA)}
    header = json.dumps({"__metadata__": metadata, **index}).encode()
    header += b" " * (-len(header) % 8)
    with replace_file(path, force=force) as tmp, tmp.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            file.write(memoryview(np.ascontiguousarray(blocks[name])).cast("B") if blocks[name].size else b"")


def load(path: str | Path) -> Calibration:
    """Read a ``.qcal`` file; its arrays stay on the disk, mapped.

    Raises:
        UsageError: No such file.
        DataError: It is no ``.qcal`` file, is damaged, or was written by a newer qpipe.
    """
    if not Path(path).is_file():
        raise UsageError("no such calibration file", where=str(path))
    try:
        header, data = _open(Path(path))
        metadata = header.pop("__metadata__")
        if metadata.get("format") != "qcal":
            raise _Damage("it is a safetensors file, but holds no calibration")
        if int(metadata["schema"]) > SCHEMA:
            raise _Damage(f"its schema {metadata['schema']} is newer than {SCHEMA}", do="pip install --upgrade qpipe")
        if int(metadata["schema"]) < 1:
            raise _Damage(f"there is no schema {metadata['schema']}")
        if _checksum(metadata["qcal"], header) != metadata["checksum"]:
            raise _Damage("the checksum of its header is wrong")
        content = json.loads(metadata["qcal"])
        arrays = {name: _array(entry, data) for name, entry in header.items()}
        for name, expected in content["checksums"].items():
            if _crc(arrays[name]) != expected:
                raise _Damage(f"the checksum of block {name!r} is wrong")
        return _calibration(content, arrays)
    except (_Damage, LookupError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        do = error.do if isinstance(error, _Damage) else ""
        raise DataError(
            "the calibration file cannot be used",
            where=str(path),
            found=str(error)
            if isinstance(error, _Damage)
            else f"its header is damaged ({type(error).__name__}: {error})",
            expected=f"a complete .qcal file of schema {SCHEMA} or older",
            do=do or "copy or collect it again",
        ) from error


class _Damage(Exception):  # noqa: N818 - becomes a DataError
    def __init__(self, text: str, do: str = "") -> None:
        super().__init__(text)
        self.do = do


def _open(path: Path) -> tuple[dict[str, Any], Array]:
    """Return the JSON header and the mapped data bytes of a safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise _Damage("it is cut off or no .qcal file: its header is longer than the file")
        header = json.loads(file.read(length))
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        raise _Damage("it is no .qcal file: its header has no metadata")
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    if max(ends, default=0) != size - 8 - length:
        raise _Damage(f"it has {size - 8 - length} bytes of data where its header says {max(ends, default=0)}")
    if size == 8 + length:
        return header, np.zeros(0, np.uint8)
    return header, np.memmap(path, np.uint8, "r", offset=8 + length)


def _array(entry: dict[str, Any], data: Array) -> Array:
    start, end = entry["data_offsets"]
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    if start < 0 or end - start != math.prod(shape) * dtype.itemsize:
        raise _Damage("a block's size does not fit its shape")
    return np.asarray(data[start:end]).view(dtype).reshape(shape)


def _checksum(content: str, index: dict[str, Any]) -> str:
    text = json.dumps([content, index], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _crc(array: Array) -> int:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    total = 0
    for first in range(0, flat.size, _CHUNK):
        total = zlib.crc32(flat[first : first + _CHUNK], total)
    return total


def _blocks(calibration: Calibration) -> Iterator[tuple[str, Array]]:
    for name, stats in calibration.tensors.items():
        yield f"{name}:ids", stats.histogram.ids
        yield f"{name}:counts", stats.histogram.counts
        if stats.channels is not None:
            yield f"{name}:channel_amax", stats.channels.amax
            yield f"{name}:channel_total", stats.channels.total
            yield f"{name}:channel_energy", stats.channels.energy
        if stats.gram is not None:
            yield f"{name}:gram", stats.gram.matrix


def _content(calibration: Calibration, blocks: dict[str, Array]) -> dict[str, Any]:
    return {
        "tensors": [[name, _scalars(stats)] for name, stats in calibration.tensors.items()],
        "samples": calibration.samples,
        "skipped": calibration.skipped,
        "model": calibration.model.to_dict(),
        "data": [dict(entry) for entry in calibration.data],
        "options": dict(calibration.options),
        "versions": dict(calibration.versions),
        "not_covered": dict(calibration.not_covered),
        "checksums": {name: _crc(array) for name, array in blocks.items()},
    }


def _scalars(stats: TensorStats) -> dict[str, Any]:
    found = {"low_bits": stats.histogram.low_bits, **dataclasses.asdict(stats.histogram.extrema)}
    if stats.channels is not None:
        found["channel_tokens"] = stats.channels.tokens
    if stats.gram is not None:
        found["gram_tokens"] = stats.gram.tokens
    return found


def _calibration(content: dict[str, Any], arrays: dict[str, Array]) -> Calibration:
    return Calibration(
        tensors={name: _stats(name, scalars, arrays) for name, scalars in content["tensors"]},
        samples=content["samples"],
        skipped=content["skipped"],
        model=ModelIdentity.from_dict(content["model"]),
        data=tuple(content["data"]),
        options=content["options"],
        versions=content["versions"],
        not_covered=content["not_covered"],
    )


def _stats(name: str, scalars: dict[str, Any], arrays: dict[str, Array]) -> TensorStats:
    numbers = {field.name: scalars[field.name] for field in dataclasses.fields(Extrema)}
    histogram = Histogram(
        ids=arrays[f"{name}:ids"],
        counts=arrays[f"{name}:counts"],
        low_bits=scalars["low_bits"],
        extrema=Extrema(**numbers),
    )
    channels = gram = None
    if "channel_tokens" in scalars:
        amax, total, energy = (arrays[f"{name}:channel_{part}"] for part in ("amax", "total", "energy"))
        channels = ChannelAmax(amax=amax, total=total, energy=energy, tokens=scalars["channel_tokens"])
    if "gram_tokens" in scalars:
        gram = Gram(matrix=arrays[f"{name}:gram"], tokens=scalars["gram_tokens"])
    return TensorStats(histogram=histogram, channels=channels, gram=gram)
