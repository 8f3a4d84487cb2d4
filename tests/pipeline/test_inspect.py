"""Facts about models and calibrations."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, parser
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.qarray import Spec
from qpipe.calibrate.ranges import resolve
from qpipe.calibrate.stats.channel_amax import ChannelAmax
from qpipe.calibrate.stats.histogram import Histogram
from qpipe.pipeline import graph
from qpipe.pipeline.calibration import Calibration, TensorStats
from qpipe.pipeline.cli import main
from qpipe.pipeline.html import to_html
from qpipe.pipeline.inspect import inspect_model, memory_by_precision
from qpipe.pipeline.inspect_calibration import calibration_report, inspect_calibration, share_clipped


def test_memory_of_13_billion_parameters() -> None:
    sizes = {name: size / 1e9 for name, size in memory_by_precision(13e9).items()}
    assert sizes == {"FP32": 52.0, "FP16": 26.0, "INT8": 13.0, "INT4": 6.5}


def _float_model() -> onnx.ModelProto:
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17], producer_name: "me", producer_version: "2">'
        " g (float[N,4] x, int64[2] n) => (float[2,5] y)"
        " { h = MatMul(x, w)  a = Add(h, b)  r = Reshape(a, k)  y = Mul(r, c) }"
    )
    arrays = {
        "w": np.ones((4, 10), np.float32),
        "b": np.ones(10, np.float32),
        "k": np.array([2, 5], np.int64),
        "c": np.float32(2),
    }
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items())
    return model


def test_float_model() -> None:
    facts = inspect_model(graph.from_proto(_float_model()))
    assert facts.parameters == 50
    assert facts.bits_per_weight == 32
    assert facts.bytes_by_type == {"FLOAT": 204, "INT64": 16}
    assert facts.parameters_by_type == {"FLOAT": 50}
    assert facts.operators == {"MatMul": 1, "Add": 1, "Reshape": 1, "Mul": 1}
    assert facts.inputs == ("x float[N,4]", "n int64[2]")
    assert facts.opsets == {"ai.onnx": 17}
    assert facts.producer == "me 2"
    assert facts.quantized == ()
    assert facts.memory_by_precision["INT4"] == 25
    assert {fact.name: fact.role for fact in facts.tensors} == {
        "w": "weight",
        "b": "weight",
        "k": "other",
        "c": "other",
    }
    data = json.loads(json.dumps(facts.to_dict()))
    assert data["schema_version"] == 1


def test_quantized_model_counts_scales_into_the_bits() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], axis=0, block_size=32),
        helper.make_node("MatMul", ["d", "wd"], ["m"], name="mm"),
        helper.make_node("QuantizeLinear", ["m", "s", "z"], ["mq"]),
        helper.make_node("DequantizeLinear", ["mq", "s", "z"], ["y"]),
    ]
    arrays = {
        "s": np.float32(0.1),
        "z": np.uint8(3),
        "w": np.ones((64, 8), ml_dtypes.int4),
        "ws": np.ones((2, 8), np.float32),
    }
    net = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 8])],
        [numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items()],
    )
    model = helper.make_model(net, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    facts = inspect_model(graph.from_proto(model))
    assert facts.parameters == 512
    stored = 512 // 2 + 16 * 4 + 4 + 1
    assert facts.bits_per_weight == 8 * stored / 512
    assert facts.parameters_by_type == {"INT4": 512}
    (node,) = facts.quantized
    assert (node.node, node.op, node.inputs, node.output) == ("mm", "MatMul", ("UINT8", "INT4"), "UINT8")


def test_packed_and_integer_operators_of_onnxruntime() -> None:
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> g (float[2,64] x, uint8[4,4] u) => (float[2,8] y)'
        " { y = com.microsoft.MatMulNBits <K = 64, N = 8, bits = 4, block_size = 32> (x, w, s)"
        "   i = MatMulInteger(u, v) }"
    )
    arrays = {
        "w": np.zeros((8, 2, 16), np.uint8),
        "s": np.ones(16, np.float32),
        "v": np.ones((4, 4), np.int8),
    }
    model.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in arrays.items())
    facts = inspect_model(graph.from_proto(model))
    assert facts.parameters == 64 * 8 + 16
    assert facts.bits_per_weight == 8 * (256 + 64 + 16) / (512 + 16)
    assert facts.operators["com.microsoft::MatMulNBits"] == 1
    assert {node.op: node.inputs for node in facts.quantized} == {
        "com.microsoft::MatMulNBits": ("float", "INT4"),
        "MatMulInteger": ("UINT8", "INT8"),
    }


def test_subgraphs_functions_and_shared_weights_count_once() -> None:
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "own": 1]> g (bool c, float[4] x) => (float[4] y)
        <float[4] w = {1, 2, 3, 4}> {
        a = Mul(x, w)  b = Mul(a, w)
        m = If (c) <
            then_branch = t () => (float[4] p) <float[4] v = {1, 2, 3, 4}> { p = Add(b, v) },
            else_branch = e () => (float[4] q) { q = Add(b, w) }>
        y = own.F(m) }
        <domain: "own", opset_import: ["": 17]> F (i) => (o) {
            k = Constant <value = float[2] {1, 2}>()  o = Concat <axis = 0> (i, k) }"""
    )
    facts = inspect_model(graph.from_proto(model))
    assert facts.parameters == 4 + 4 + 2
    assert facts.subgraphs == 2
    assert facts.functions == ("own::F",)
    assert facts.operators["Add"] == 2


def test_a_sparse_weight_counts_as_it_is_stored(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[N,90] x) => (float[N,90] y) { y = MatMul(x, w) }'
    model = parser.parse_model(text)
    values, places = numpy_helper.from_array(np.float32([1]), "w"), numpy_helper.from_array(np.array([3]), "i")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [90, 90]))
    onnx.save(model, tmp_path / "m.onnx")
    facts = inspect_model(graph.load(tmp_path / "m.onnx"))
    assert facts.parameters == 90 * 90
    assert facts.bytes_by_type["FLOAT"] < 100
    assert facts.file_bytes == (tmp_path / "m.onnx").stat().st_size


def test_weights_are_never_read(tmp_path: Path) -> None:
    """The weight is a hole of 8 GiB in a sparse file."""
    rows = 2**21
    path = _hollow_model(tmp_path, rows, 1024)
    facts = inspect_model(graph.load(path))
    assert facts.parameters == rows * 1024
    assert facts.data_files == {str(tmp_path / "w.bin"): rows * 4096}
    assert facts.file_bytes == path.stat().st_size + rows * 4096
    assert facts.tensors[0].external == "w.bin"


def test_the_command_tells_what_13_billion_parameters_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """52 GB of weights, in a file that is one hole."""
    path = _hollow_model(tmp_path, 130_000, 100_000)
    assert main(["inspect", str(path)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory")]
    assert re.findall(r"[\d.]+ [GM]B", line) == ["52.0 GB", "26.0 GB", "13.0 GB", "6.5 GB"]


def _hollow_model(folder: Path, rows: int, columns: int) -> Path:
    """Write a product with a weight [rows, columns] whose data file is one hole."""
    size = 4 * rows * columns
    weight = TensorProto(
        name="w", data_type=TensorProto.FLOAT, dims=[rows, columns], data_location=TensorProto.EXTERNAL
    )
    weight.external_data.add(key="location", value="w.bin")
    weight.external_data.add(key="length", value=str(size))
    with (folder / "w.bin").open("wb") as file:
        file.truncate(size)
    net = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, columns])],
        [weight],
    )
    path = folder / "m.onnx"
    model = helper.make_model(net, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def _calibration() -> tuple[Calibration, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    plain = rng.normal(size=(500, 32)).astype(np.float32)
    outlier = plain.copy()
    outlier[:, 5] *= 50
    positive = np.maximum(plain, 0)
    spoiled = plain.copy()
    spoiled[0, 0], spoiled[1, 1] = np.nan, np.inf
    arrays = {
        "plain": plain,
        "outlier": outlier,
        "<relu>": positive,
        "spoiled": spoiled,
        "dead": np.zeros((4, 4), np.float32),
    }
    tensors = {
        name: TensorStats(
            histogram=Histogram.of(x), channels=ChannelAmax.of(np.nan_to_num(x, posinf=0)) if x.shape[1] > 4 else None
        )
        for name, x in arrays.items()
    }
    return Calibration(tensors=tensors, samples=500, not_covered={"ids": "it is a tensor(int64)"}), arrays


def test_rows_say_what_the_data_says() -> None:
    calibration, arrays = _calibration()
    rows = {row.tensor: row for row in inspect_calibration(calibration)}
    assert list(rows) == list(arrays)
    for name in ("plain", "outlier", "<relu>", "dead"):
        x, row = arrays[name], rows[name]
        assert (row.lo, row.hi) == (x.min(), x.max())
        assert row.values == x.size
        assert row.zeros == np.mean(x == 0)
        magnitudes = np.sort(np.abs(x).reshape(-1))
        at = int(np.ceil(0.9999 * x.size)) - 1
        assert row.p9999 == pytest.approx(magnitudes[at], rel=2**-7)
    assert (rows["spoiled"].nan, rows["spoiled"].inf) == (1, 1)
    assert [o.channel for o in rows["outlier"].outliers] == [5]
    assert rows["plain"].outliers == ()
    json.dumps([row.to_dict() for row in rows.values()])


def test_clipped_shares_are_those_of_the_data() -> None:
    calibration, arrays = _calibration()
    for row in inspect_calibration(calibration, methods=("minmax", "percentile:99", "mse")):
        assert set(row.clipped) == {"minmax", "percentile:99", "mse"}
        assert row.clipped["minmax"] == 0
        x = arrays[row.tensor]
        x = x[np.isfinite(x)]
        for method, (lo, hi) in row.ranges.items():
            outside = np.mean((x < lo) | (x > hi))
            # A bin is counted as evenly filled, so a bin at each end may be off.
            near = np.mean((np.abs(x - lo) < abs(lo) * 2**-7) | (np.abs(x - hi) < abs(hi) * 2**-7))
            assert abs(row.clipped[method] - outside) <= near, (row.tensor, method)


def test_ranges_are_those_that_quantizing_would_take() -> None:
    calibration, _ = _calibration()
    spec = Spec(format=FORMATS.get("int8"), symmetric=True)
    row = inspect_calibration(calibration, methods=("mse",), spec=spec)[0]
    solved = resolve("mse")(calibration.tensors["plain"].histogram, spec)
    assert row.ranges["mse"] == (float(solved.lo), float(solved.hi))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=50), st.floats(-50, 0), st.floats(0, 50))
def test_clipped_share_stays_between_what_is_certain(values: list[float], lo: float, hi: float) -> None:
    x = np.array(values, np.float32)
    bins = Histogram.of(x).bins()
    found = share_clipped(bins, (lo, hi))
    certain = sum(c for low, high, c in zip(bins.low, bins.high, bins.counts, strict=True) if high < lo or low > hi)
    possible = sum(c for low, high, c in zip(bins.low, bins.high, bins.counts, strict=True) if low < lo or high > hi)
    assert certain / x.size - 1e-12 <= found <= possible / x.size + 1e-12


def test_calibration_report_draws_every_tensor() -> None:
    calibration, _ = _calibration()
    result = calibration_report(calibration, inspect_calibration(calibration), title="c.qcal")
    assert [chart.title for chart in result.charts] == list(calibration.tensors)
    assert any("ids was not observed" in note for note in result.notes)
    assert any("spoiled: 1 NaN" in note for note in result.notes)
    html = to_html(result)
    assert html.count("<svg") == 5
    assert "&lt;relu&gt;" in html
    rows = {row["tensor"]: row for row in result.table("tensors").rows}
    assert rows["outlier"]["outliers"].startswith("5 (")


def test_empty_calibration_is_no_crash() -> None:
    empty = Calibration(tensors={"none": TensorStats(histogram=Histogram.empty())})
    rows = inspect_calibration(empty)
    assert rows[0].clipped["mse"] == 0
    to_html(calibration_report(empty, rows, title="empty"))
    to_html(calibration_report(Calibration(tensors={}), [], title="nothing"))
