"""Tables of other tools: written as those tools write them, and read back."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qpipe.calibrate.errors import DataError, RecipeError, UsageError, WriteError
from qpipe.calibrate.qarray import Range
from qpipe.pipeline.calibration import read_table, write_table
from qpipe.pipeline.calibration.tables import FORMS

RANGES = {"x": Range.of(-10.0, 2.0), "layer/y": Range.of(0.0, 0.996), "z.1": Range.of(0.0, 0.0)}
NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8)
BOUNDS = st.floats(0, 2.0**100, width=32)


@pytest.mark.parametrize("form", FORMS)
def test_a_table_is_read_back(form, tmp_path):
    write_table(RANGES, tmp_path / "t", form)
    found = read_table(tmp_path / "t")
    assert set(found) == set(RANGES)
    for name, rng in RANGES.items():
        assert found[name].amax == pytest.approx(rng.amax, rel=1e-6)
    if form == "ort-json":
        assert found == RANGES


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=st.dictionaries(NAMES, st.tuples(BOUNDS, BOUNDS), min_size=1, max_size=4))
def test_any_names_and_ranges_survive(form, tmp_path, table):
    ranges = {name: Range.of(-lo, hi) for name, (lo, hi) in table.items()}
    write_table(ranges, tmp_path / "t", form, force=True)
    found = read_table(tmp_path / "t")
    assert {name: float(rng.amax) for name, rng in found.items()} == pytest.approx(
        {name: float(rng.amax) for name, rng in ranges.items()}, rel=1e-6
    )


def test_tensorrt_cache_has_its_known_bytes(tmp_path):
    write_table({"images": Range.of(0, 0.0078451801 * 127)}, tmp_path / "t", "trt-cache")
    assert (tmp_path / "t").read_text() == "TRT-7000-EntropyCalibration2\nimages: 3c008912\n"


def test_tensorrt_cache_of_another_version_is_read(tmp_path):
    (tmp_path / "t").write_text("TRT-8601-MinMaxCalibration\n(Unnamed Layer* 3): out: 3c008912\n")
    assert read_table(tmp_path / "t")["(Unnamed Layer* 3): out"].hi == pytest.approx(0.00784518 * 127, rel=1e-6)


def test_onnxruntime_reads_our_json(tmp_path):
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    write_table(RANGES, tmp_path / "t", "ort-json")
    table = json.loads((tmp_path / "t").read_bytes())
    for name, rng in RANGES.items():
        data = calibrate.TensorData.from_dict(table[name])
        assert data.range_value == (rng.lo, rng.hi)
        assert data.lowest.dtype == np.float32


def test_we_read_what_onnxruntime_writes(tmp_path):
    quantization = pytest.importorskip("onnxruntime.quantization")
    calibrate = pytest.importorskip("onnxruntime.quantization.calibrate")
    numbers = {"a": (np.float32(0), np.float32(3.5)), "b": (np.float32(-1), np.float32(2))}
    cache = {name: calibrate.TensorData(lowest=lo, highest=hi) for name, (lo, hi) in numbers.items()}
    quantization.write_calibration_table(cache, dir=str(tmp_path))
    for name in ("calibration.json", "calibration.flatbuffers", "calibration.cache"):
        found = read_table(tmp_path / name)
        assert {key: float(rng.hi) for key, rng in found.items()} == {"a": 3.5, "b": 2.0}
    assert read_table(tmp_path / "calibration.json")["b"].lo == -1


def test_onnxruntime_flatbuffers_hold_the_magnitude(tmp_path):
    tables = pytest.importorskip("onnxruntime.quantization.CalTableFlatBuffers.TrtTable")
    write_table(RANGES, tmp_path / "t", "ort-flatbuffers")
    table = tables.TrtTable.GetRootAsTrtTable((tmp_path / "t").read_bytes(), 0)
    pairs = {table.Dict(i).Key().decode(): float(table.Dict(i).Value()) for i in range(table.DictLength())}
    assert pairs == {"x": 10.0, "layer/y": pytest.approx(0.996), "z.1": 0.0}


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"{}x", b"just text", b"TRT-1\nx: zz\n", b"a nan\n", b"[1, 2]"])
def test_what_is_no_table_is_refused(content, tmp_path):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(DataError, match="no calibration table"):
        read_table(tmp_path / "t")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60))
def test_any_bytes_are_a_table_or_refused(tmp_path, content):
    (tmp_path / "t").write_bytes(content)
    with contextlib.suppress(DataError):
        assert all(rng.hi >= 0 for rng in read_table(tmp_path / "t").values())


def test_misuse_is_named(tmp_path):
    with pytest.raises(RecipeError, match="ort-jsn"):
        write_table(RANGES, tmp_path / "t", "ort-jsn")
    with pytest.raises(UsageError, match="no such"):
        read_table(tmp_path / "none")
    with pytest.raises(DataError, match="does not fit"):
        write_table({"a b": Range.of(0, 1)}, tmp_path / "t", "ort-text")
    write_table(RANGES, tmp_path / "t", "ort-json")
    with pytest.raises(WriteError, match="exists"):
        write_table(RANGES, tmp_path / "t", "ort-json")
