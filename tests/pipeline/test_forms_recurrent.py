"""LSTM, GRU and RNN: int8 weights, dequantized or multiplied as codes; the same as ONNX Runtime's own tool gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.granularity import per_channel
from qpipe.calibrate.metrics import sqnr_db
from qpipe.calibrate.qarray import Spec, dequantize
from qpipe.pipeline.inspect import inspect_model
from quantizing import FINE, Result, calibrate, error, normal, quantize, random_batches, run

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
LENGTH, BATCH, WIDTH, HIDDEN = 6, 3, 10, 8
OUTPUTS = {"LSTM": ["y", "h", "c"], "GRU": ["y", "h"], "RNN": ["y", "h"]}


def recurrent(op: str, direction: str = "forward", extras: tuple[str, ...] = ("B",)) -> onnx.ModelProto:
    """One recurrent operator with constant weights, and some of its optional inputs."""
    directions, rows = 2 if direction == "bidirectional" else 1, GATES[op] * HIDDEN
    arrays = {
        "W": normal(directions, rows, WIDTH) / 3,
        "R": normal(directions, rows, HIDDEN, seed=1) / 3,
        "B": normal(directions, 2 * rows) / 3,
        "lengths": np.full(BATCH, LENGTH - 1, np.int32),
        "h0": normal(directions, BATCH, HIDDEN),
        "c0": normal(directions, BATCH, HIDDEN, seed=2),
        "P": normal(directions, 3 * HIDDEN) / 3,
    }
    given = [name if name in extras else "" for name in list(arrays)[2:]][: 5 if op == "LSTM" else 3]
    inputs = ["x", "W", "R", *given]
    while not inputs[-1]:
        inputs.pop()
    node = helper.make_node(op, inputs, OUTPUTS[op], name="cell", hidden_size=HIDDEN, direction=direction)
    held = [numpy_helper.from_array(arrays[name], name) for name in inputs if name in arrays]
    x = helper.make_tensor_value_info("x", 1, [LENGTH, BATCH, WIDTH])
    shapes = {"y": [LENGTH, directions, BATCH, HIDDEN]}
    last = [directions, BATCH, HIDDEN]
    outputs = [helper.make_tensor_value_info(name, 1, shapes.get(name, last)) for name in OUTPUTS[op]]
    return helper.make_model(
        helper.make_graph([node], "g", [x], outputs, held), opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )


def fidelity(found: Result) -> float:
    """Signal to noise of all outputs over two batches, dB; the worst."""
    batches = random_batches(found.source)
    pairs = [pair for b in batches for pair in zip(run(found.source, b), run(found.proto, b), strict=True)]
    return min(float(sqnr_db(wanted, got)) for wanted, got in pairs)


@pytest.mark.parametrize("target", ["ort-cpu", "ort-cpu-avx2", "portable", "openvino"])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("op", GATES)
def test_weights_are_stored_as_codes(op: str, direction: str, target: str) -> None:
    found = quantize(recurrent(op, direction), scheme="w8", target=target)
    assert found.ops() == {"DequantizeLinear": 2, op: 1}
    held = found.initializers()
    assert {held["W_quantized"].dtype, held["R_quantized"].dtype} == {np.dtype(np.int8)}
    assert held["W_scale"].shape == held["R_scale"].shape == (GATES[op] * HIDDEN,)
    assert fidelity(found) > 35


@pytest.mark.parametrize("op", GATES)
def test_it_equals_the_float_one_where_scales_are_fine(op: str) -> None:
    source = recurrent(op, "bidirectional")
    found = quantize(source, **{**FINE, "activations": None})
    assert {d.site.slot for d in found.plan.coded()} == {"in1", "in2"}
    assert error(found, random_batches(source)[0]) < 1e-3


def test_four_bits_lie_in_blocks_along_the_inputs() -> None:
    found = quantize(recurrent("LSTM"), scheme="w4", weights={"block_size": 2})
    assert found.initializers()["W_scale"].shape == (1, 4 * HIDDEN, WIDTH // 2)
    assert fidelity(found) > 15


@pytest.mark.parametrize(
    "extras",
    [(), ("B",), ("B", "h0", "c0"), ("h0",), ("B", "lengths"), ("B", "h0", "c0", "P")],
    ids=lambda extras: "+".join(extras) or "none",
)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_an_lstm_multiplies_codes(direction: str, extras: tuple[str, ...]) -> None:
    found = quantize(recurrent("LSTM", direction, extras), scheme="w8a8-dynamic")
    assert found.ops() == {"DynamicQuantizeLSTM": 1}
    assert found.proto.graph.node[0].domain == "com.microsoft"
    assert [entry.name for entry in found.proto.graph.output] == OUTPUTS["LSTM"]
    assert fidelity(found) > 28


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_its_codes_and_scales_lie_as_the_operator_wants_them(granularity: str) -> None:
    source = recurrent("LSTM", "bidirectional")
    found = quantize(source, scheme="w8a8-dynamic", weights={"granularity": granularity}, target="ort-cpu-vnni")
    node, held = found.proto.graph.node[0], found.initializers()
    w, scale = held[node.input[1]], held[node.input[8]]
    assert w.shape == (2, WIDTH, 4 * HIDDEN)
    assert scale.shape == ((2, 4 * HIDDEN) if granularity == "channel" else (2,))
    assert not held[node.input[9]].any()
    real = w.astype(np.float32) * (scale[:, None, :] if scale.ndim == 2 else scale[:, None, None])
    original = numpy_helper.to_array(source.graph.initializer[0]).transpose(0, 2, 1)
    assert np.abs(real - original).max() <= 0.5 * scale.max() * 1.0001


def test_it_is_as_close_as_onnxruntimes_own_tool(tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    source = recurrent("LSTM", "bidirectional", ("B", "h0", "c0"))
    found = quantize(source, scheme="w8a8-dynamic", target="ort-cpu-vnni")
    onnx.save(source, tmp_path / "float.onnx")
    quantize_dynamic(tmp_path / "float.onnx", tmp_path / "theirs.onnx", op_types_to_quantize=["LSTM"], per_channel=True)
    theirs = onnx.load(tmp_path / "theirs.onnx")
    assert [node.op_type for node in theirs.graph.node] == ["DynamicQuantizeLSTM"]
    other = Result(source, found.result, theirs)
    assert fidelity(found) > fidelity(other) - 1


def test_what_has_no_integer_kernel_says_so_and_can_store_its_weights() -> None:
    found = quantize(recurrent("GRU"), scheme="w8a8-dynamic")
    assert "gains nothing from GRU with scales found at run time" in found.reason("cell")
    found = quantize(recurrent("LSTM"), calibration=calibrate(recurrent("LSTM"), random_batches(recurrent("LSTM"))))
    assert "w8a8-dynamic" in found.reason("cell")


def test_one_layer_can_have_a_scheme_of_its_own() -> None:
    found = quantize(recurrent("LSTM"), layers=[{"match": "op:LSTM", "scheme": "w8a8-dynamic"}])
    assert found.ops() == {"DynamicQuantizeLSTM": 1}
    found = quantize(recurrent("GRU"), layers=[{"match": "op:GRU", "scheme": "w8"}])
    assert found.ops() == {"DequantizeLinear": 2, "GRU": 1}


def test_weights_that_are_computed_stay() -> None:
    source = recurrent("LSTM")
    source.graph.node.insert(0, helper.make_node("Tanh", ["R"], ["R1"], name="tanh"))
    source.graph.node[1].input[2] = "R1"
    found = quantize(source, scheme="w8")
    assert not found.plan.coded()
    assert "its weight 'R1' is no constant" in found.reason("cell")


def test_methods_that_look_at_inputs_do_not_look_at_another_tensors() -> None:
    source = recurrent("LSTM")
    statistics = calibrate(source, random_batches(source))
    found = quantize(source, scheme="w8", weights={"algorithm": "gptq"}, calibration=statistics)
    assert {d.algorithm for d in found.plan.coded()} == {"rtn_mse"}
    assert fidelity(found) > 30


def test_inspect_counts_it() -> None:
    found = quantize(recurrent("LSTM"), scheme="w8a8-dynamic")
    assert [node.op for node in inspect_model(found.result.model).quantized] == ["com.microsoft::DynamicQuantizeLSTM"]


def test_a_row_of_gates_has_one_scale_in_both_directions() -> None:
    found = quantize(recurrent("LSTM", "bidirectional"), scheme="w8", target="ort-cpu-vnni")
    qarray = next(q for site, q in found.result.weights.items() if site.slot == "in1")
    assert qarray.params.spec == Spec(format=FORMATS.get("int8"), granularity=per_channel(1), narrow_range=True)
    original = numpy_helper.to_array(found.source.graph.initializer[0])
    assert np.abs(dequantize(qarray) - original).max() <= 0.5 * qarray.params.scale.max() * 1.0001
