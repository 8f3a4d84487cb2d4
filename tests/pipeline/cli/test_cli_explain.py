"""``qpipe explain MODEL [NODE]``: will it fuse?"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from .conftest import Run, small_model


@pytest.fixture
def quantized(calibrated: Path, run: Run) -> Path:
    done = run("quantize", "m.onnx", "--calib", "m.qcal", "-o", "q.onnx", "--target", "ort-cpu")
    assert done.code == 0, done.err
    return calibrated


def test_a_quantized_model_is_explained_by_what_the_runtime_made_of_it(quantized: Path, run: Run) -> None:
    del quantized
    done = run("explain", "q.onnx")
    assert done.code == 0, done.err
    assert "q.onnx: quantized, target ort-cpu" in done.out
    assert "QLinearConv 1" in done.out
    assert "0 left between Q/DQ" in done.out
    assert "integer kernel: QGemm" in done.out


def test_a_float_model_is_explained_by_what_it_would_become(folder: Path, run: Run) -> None:
    before = sorted(p.name for p in folder.iterdir())
    done = run("explain", "m.onnx")
    assert done.code == 0, done.err
    assert "m.onnx: float; what quantizing it would give, target ort-cpu" in done.out
    assert "scales are of random numbers here" in done.out
    assert "QLinearConv 1" in done.out
    assert sorted(p.name for p in folder.iterdir()) == before


def test_statistics_take_the_place_of_random_numbers(calibrated: Path, run: Run) -> None:
    del calibrated
    done = run("explain", "m.onnx", "--calib", "m.qcal", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["random_scales"] is False


@pytest.mark.parametrize("file", ["m.onnx", "q.onnx"])
def test_one_node_is_explained(quantized: Path, run: Run, file: str) -> None:
    del quantized
    done = run("explain", file, "Conv_a")
    assert done.code == 0, done.err
    assert "Conv_a (Conv)" in done.out
    assert "integer kernel: QLinearConv" in done.out
    assert "Gemm" not in done.out
    assert ("int32 with scale s_x * s_w" in done.out) == (file == "m.onnx")


def test_json_is_one_object_with_every_node(quantized: Path, run: Run) -> None:
    del quantized
    data = json.loads(run("explain", "q.onnx", "--json").out)
    assert data["quantized"] is True
    assert data["plan"] is None
    assert data["evidence"]["measured"] is True
    assert {n["op"]: n["verdict"] for n in data["evidence"]["nodes"]} == {
        "Conv": "integer",
        "GlobalAveragePool": "integer",
        "Flatten": "codes",
        "Gemm": "integer",
    }
    assert data["evidence"]["pairs"]["total"] == data["evidence"]["pairs"]["fused"]
    one = json.loads(run("explain", "m.onnx", "Conv_a", "--json").out)
    assert {d["node"] for d in one["plan"]["decisions"]} == {"Conv_a"}


def test_every_node_can_be_listed(folder: Path, run: Run) -> None:
    del folder
    grouped, every = run("explain", "m.onnx"), run("explain", "m.onnx", "--all")
    assert "Relu_b" in every.out
    assert len(every.out.splitlines()) >= len(grouped.out.splitlines())


def test_another_target_and_scheme_can_be_asked_for(folder: Path, run: Run) -> None:
    del folder
    done = run("explain", "m.onnx", "--target", "tensorrt")
    assert done.code == 0, done.err
    assert "TensorRT was not asked" in done.out
    assert "Conv on int8 1" in done.out
    done = run("explain", "m.onnx", "--scheme", "w8a8-dynamic")
    assert done.code == 0, done.err
    assert "random" not in done.out
    assert "DynamicQuantizeMatMul 1" in done.out


def test_islands_are_shown_with_node_and_reason(folder: Path, run: Run) -> None:
    del folder
    done = run("explain", "m.onnx", "--scheme", "w8a16")
    assert done.code == 0, done.err
    assert "has int16 codes" in done.out
    assert "pairs that are carried out as they stand" in done.out


def test_near_names_are_offered_for_a_node_that_is_none(quantized: Path, run: Run) -> None:
    del quantized
    done = run("explain", "q.onnx", "Conv_b")
    assert done.code == 2
    assert "Conv_a" in done.err
    assert "qpipe explain q.onnx --all" in done.err


def test_a_file_that_is_none_and_a_word_that_is_none(folder: Path, run: Run) -> None:
    del folder
    missing = run("explain", "n.onnx")
    assert missing.code == 2
    assert "m.onnx" in missing.err
    assert run("explain", "nothing").code == 2
    assert run("explain", "scheme").code == 0


def test_a_model_that_random_numbers_do_not_run_asks_for_statistics(folder: Path, run: Run) -> None:
    proto = small_model(
        """<ir_version: 8, opset_import: ["": 17]> small (float[N,6] x, int64[M] shape) => (float[A,B] y) {
        r = Reshape(x, shape)
        y = MatMul(r, w2) }"""
    )
    del proto.graph.initializer[:2]
    onnx.save(proto, folder / "odd.onnx")
    assert np.prod((6, 4)) == 24
    done = run("explain", "odd.onnx")
    assert done.code == 4
    assert "qpipe calibrate odd.onnx --data DATA -o model.qcal" in done.err


@pytest.mark.parametrize(
    ("scheme", "kernel"), [("w8a8-outlier", "integer kernel: OutlierMatMul"), ("w8", "kernel on packed weights")]
)
def test_operators_that_take_the_place_of_others_go_by_their_names(
    folder: Path, run: Run, scheme: str, kernel: str
) -> None:
    body = '<ir_version: 8, opset_import: ["": 17]> small (float[N,128] x) => (float[N,64] y) { y = MatMul(x, w) }'
    proto = onnx.parser.parse_model(body)
    weight = np.random.default_rng(0).normal(size=(128, 64)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    proto.graph.node[0].name = "layer"
    onnx.save(proto, folder / "one.onnx")
    done = run("explain", "one.onnx", "layer", "--scheme", scheme)
    assert done.code == 0, done.err
    assert kernel in done.out
