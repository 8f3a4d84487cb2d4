"""Calibration tables of other tools: ONNX Runtime's three forms and TensorRT's cache.

ONNX Runtime's flatbuffers and text tables and TensorRT's cache hold one magnitude per tensor, so that an asymmetric
range becomes the symmetric one that contains it.

Source: ONNX Runtime, quantization/quant_utils.py, write_calibration_table; TensorRT 8 to 10, calibration cache: a
line ``TRT-<version>-<calibrator>``, then ``tensor: hex``, the bits of the float32 scale amax / 127, most significant
byte first.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ...calibrate.errors import DataError, EnvironmentError_, RecipeError, UsageError
from ...calibrate.qarray import Range
from ..files import replace_file

TRT_HEADER = "TRT-7000-EntropyCalibration2"
_TRT_CODES = 127

Ranges = Mapping[str, Range]


def write_table(ranges: Ranges, path: str | Path, form: str, *, force: bool = False) -> None:
    """Write the ranges of activations as a table that another tool reads.

    Args:
        ranges: One range (per tensor) by tensor name.
        path: The target.
        form: ``"ort-json"``, ``"ort-flatbuffers"``, ``"ort-text"`` or ``"trt-cache"``.
        force: Replace an existing file.

    Raises:
        RecipeError: No such form.
        EnvironmentError_: The flatbuffers form needs ONNX Runtime's package.
        WriteError: The target exists or cannot be written.
    """
    if form not in _WRITERS:
        raise RecipeError(f"no calibration table is called {form!r}", expected=", ".join(_WRITERS))
    data = _WRITERS[form](ranges)
    with replace_file(path, force=force) as tmp:
        tmp.write_bytes(data)


def read_table(path: str | Path) -> dict[str, Range]:
    """Read a table in any of the forms that `write_table` writes, whichever tool wrote it.

    Raises:
        UsageError: No such file.
        DataError: The file is none of them, or is damaged.
    """
    if not Path(path).is_file():
        raise UsageError("no such calibration table", where=str(path))
    data = Path(path).read_bytes()
    readers = [_from_trt] if data.startswith(b"TRT-") else [_from_json, _from_text, _from_flatbuffers]
    for reader in readers:
        try:
            if found := reader(data):
                return found
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error):
            continue
    raise DataError(
        "the file is no calibration table, or is damaged",
        where=str(path),
        expected="ONNX Runtime's calibration.json, .flatbuffers or .cache, or a TensorRT calibration cache",
    )


def _amax(rng: Range) -> float:
    return float(rng.amax.reshape(()))


def _symmetric(amax: float) -> Range:
    if not amax >= 0:
        raise ValueError("a magnitude is 0 or more")
    return Range.of(-amax, amax)


def _line_safe(ranges: Ranges, mark: str) -> None:
    for name in ranges:
        if "\n" in name or (mark == " " and " " in name):
            raise DataError(f"the name {name!r} does not fit into this table", do="use ort-json, which takes any name")


def _to_json(ranges: Ranges) -> bytes:
    def number(value: float) -> dict[str, object]:
        return {"data": value, "dtype": "float32", "CLS": "numpy.array"}

    table = {
        name: {"highest": number(float(rng.hi)), "lowest": number(float(rng.lo)), "CLS": "TensorData"}
        for name, rng in sorted(ranges.items())
    }
    return json.dumps(table).encode()


def _from_json(data: bytes) -> dict[str, Range]:
    def number(entry: object) -> float:
        return float(np.asarray(entry["data"] if isinstance(entry, dict) else entry).reshape(()))

    table = json.loads(data)
    entries = {name: entry for name, entry in table.get("data", table).items() if isinstance(entry, (dict, list))}
    found = {}
    for name, entry in entries.items():
        lo, hi = entry if isinstance(entry, list) else (entry["lowest"], entry["highest"])
        found[name] = Range.of(number(lo), number(hi))
    return found


def _to_text(ranges: Ranges) -> bytes:
    _line_safe(ranges, " ")
    return "".join(f"{name} {_amax(rng)!r}\n" for name, rng in sorted(ranges.items())).encode()


def _from_text(data: bytes) -> dict[str, Range]:
    pairs = [line.rsplit(" ", 1) for line in data.decode().splitlines() if line]
    return {name: _symmetric(abs(float(value))) for name, value in pairs}


def _to_trt(ranges: Ranges) -> bytes:
    _line_safe(ranges, ":")
    lines = [f"{name}: {struct.pack('>f', _amax(rng) / _TRT_CODES).hex()}\n" for name, rng in sorted(ranges.items())]
    return "".join([TRT_HEADER, "\n", *lines]).encode()


def _from_trt(data: bytes) -> dict[str, Range]:
    found = {}
    for line in data.decode().splitlines()[1:]:
        if line.strip():
            name, _, code = line.rpartition(": ")
            scale = np.float32(struct.unpack(">f", bytes.fromhex(code.strip().zfill(8)))[0])
            found[name] = _symmetric(float(scale) * _TRT_CODES)
    return found


def _to_flatbuffers(ranges: Ranges) -> bytes:
    flatbuffers, entry, table = _flatbuffers()
    builder = flatbuffers.Builder(1024)
    offsets = []
    for name, rng in sorted(ranges.items()):
        key, value = builder.CreateString(name), builder.CreateString(repr(_amax(rng)))
        entry.KeyValueStart(builder)
        entry.KeyValueAddKey(builder, key)
        entry.KeyValueAddValue(builder, value)
        offsets.append(entry.KeyValueEnd(builder))
    table.TrtTableStartDictVector(builder, len(offsets))
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    vector = builder.EndVector()
    table.TrtTableStart(builder)
    table.TrtTableAddDict(builder, vector)
    builder.Finish(table.TrtTableEnd(builder))
    return bytes(builder.Output())


def _from_flatbuffers(data: bytes) -> dict[str, Range]:
    _, _, table = _flatbuffers()
    read = table.TrtTable.GetRootAsTrtTable(data, 0)
    pairs = [read.Dict(index) for index in range(read.DictLength())]
    return {pair.Key().decode(): _symmetric(abs(float(pair.Value()))) for pair in pairs}


def _flatbuffers() -> tuple[object, object, object]:
    try:
        import flatbuffers
        from onnxruntime.quantization.CalTableFlatBuffers import KeyValue, TrtTable
    except ImportError as error:
        raise EnvironmentError_(
            "flatbuffers tables need ONNX Runtime's Python package",
            found=str(error),
            do="pip install 'qpipe[cpu]', or choose ort-json or ort-text",
        ) from error
    return flatbuffers, KeyValue, TrtTable


_WRITERS: dict[str, Callable[[Ranges], bytes]] = {
    "ort-json": _to_json,
    "ort-flatbuffers": _to_flatbuffers,
    "ort-text": _to_text,
    "trt-cache": _to_trt,
}
FORMS = tuple(_WRITERS)
