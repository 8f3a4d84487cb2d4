"""What a runtime made of a model is told as it is: kernels, islands with their reasons, borders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from qpipe.pipeline import graph
from qpipe.pipeline.fusion import Evidence, Fate, ort, rules
from qpipe.pipeline.fusion.engines import ENGINES
from qpipe.pipeline.targets import TARGETS
from quantizing import Array, model, normal, quantize

PRODUCT = """g (float[2,4] x) => (float[2,6] y) {
  q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)
  v = DequantizeLinear<axis={axis}>(w, t)
  y = MatMul(d, v)
}"""
CONV = """g (float[1,3,8,8] x) => (float[1,4,6,6] y{more}) {{
  q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)
  v = DequantizeLinear<axis=0>(w, t)
  c = Conv(d, v)
  {behind}
}}"""
SCALE, ZERO = np.array(0.02, np.float32), np.array(7, np.uint8)
CODED = "e = QuantizeLinear(c, s, z)  y = DequantizeLinear(e, s, z)"


def scales(outputs: int, dtype: type = np.float32) -> Array:
    return np.full(outputs, 0.01, dtype)


def product(codes: type = np.uint8, axis: int = 1, scale: type = np.float32) -> onnx.ModelProto:
    weights = np.arange(24).reshape(4, 6).astype(np.int8)
    held = {"s": SCALE.astype(scale), "z": ZERO.astype(codes), "w": weights, "t": scales(weights.shape[axis], scale)}
    body = PRODUCT.replace("{axis}", str(axis)).replace("float[", "float16[" if scale is np.float16 else "float[")
    return model(body, **held)


def conv(behind: str, more: str = "") -> onnx.ModelProto:
    weights = np.arange(108).reshape(4, 3, 3, 3).astype(np.int8)
    return model(CONV.format(behind=behind, more=more), s=SCALE, z=ZERO, w=weights, t=scales(4))


def fates(proto: onnx.ModelProto) -> dict[str, Fate]:
    return {fate.node: fate for fate in asked(proto).fates}


def asked(proto: onnx.ModelProto) -> Evidence:
    return ort.evidence(graph.from_proto(proto))


def test_a_product_between_codes_is_found_as_an_integer_kernel() -> None:
    found = asked(product())
    (fate,) = found.fates
    assert (fate.node, fate.verdict, fate.became) == ("MatMul_3", "integer", "MatMulIntegerToFloat")
    assert fate.codes == "uint8 x int8"
    assert (found.pairs, found.fused, found.borders, found.islands) == (1, 1, 0, ())


@pytest.mark.parametrize(
    ("proto", "reason"),
    [
        (product(codes=np.uint16), "its input 'x' has uint16 codes, and the kernels there take 8 bits"),
        (product(scale=np.float16), "the scale of 'x' is float16; only float32 scales are fused"),
        (conv("y = Relu(c)"), "no QuantizeLinear stands behind its output 'c'"),
        (conv(CODED, more=", float[1,4,6,6] c"), "its output 'c' has other readers than the quantizer behind it"),
    ],
    ids=["16 bits", "half", "no quantizer", "two readers"],
)
def test_an_island_is_found_and_its_reason_told(proto: onnx.ModelProto, reason: str) -> None:
    found = asked(proto)
    fate = found.fates[0]
    assert fate.verdict == "island"
    assert reason in fate.reason
    assert found.fused < found.pairs
    assert found.islands
    assert fate.node in found.islands[0].readers


def test_an_operator_without_a_kernel_says_so() -> None:
    body = """g (float[2,4] x) => (float[2,4] y) {
      q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  y = Erf(d)
    }"""
    (fate,) = asked(model(body, s=SCALE, z=ZERO)).fates
    assert fate.verdict == "island"
    assert fate.reason == "ONNX Runtime's CPU provider has no integer kernel for Erf"


def test_a_conv_with_a_quantizer_behind_it_is_a_kernel_whose_codes_may_turn_back_into_float() -> None:
    found = asked(conv(CODED))
    assert found.fates[0].became == "QLinearConv"
    assert (found.pairs, found.fused, found.borders, found.islands) == (2, 1, 1, ())


def test_what_moves_codes_between_kernels_is_on_codes() -> None:
    body = """g (float[N,3,8,8] x) => (float[N,6] y) {
      a = Conv<kernel_shape=[3,3]>(x, w)  b = MaxPool<kernel_shape=[6,6]>(a)  c = Flatten(b)  y = Gemm(c, v, u)
    }"""
    source = model(body, w=normal(4, 3, 3, 3), v=normal(4, 6), u=normal(6))
    found = asked(quantize(source, target="ort-cpu").proto)
    assert {fate.op: fate.verdict for fate in found.fates} == {
        "Conv": "integer",
        "MaxPool": "codes",
        "Flatten": "codes",
        "Gemm": "integer",
    }
    assert found.fused == found.pairs > 0


@pytest.mark.parametrize(("scheme", "verdict"), [("w8a8-dynamic", "integer"), ("w4", "packed"), ("w8", "packed")])
def test_other_forms_are_told_too(scheme: str, verdict: str) -> None:
    source = model("g (float[N,64] x) => (float[N,64] y) { y = MatMul(x, w) }", w=normal(64, 64))
    (fate,) = asked(quantize(source, scheme=scheme).proto).fates
    assert fate.verdict == verdict


def test_float_products_and_weights_alone_are_no_islands() -> None:
    body = "g (float[N,3,8,8] x) => (float[N,4,6,6] y, float[N,8,8,8] z) { y = Conv(x, w) z = ConvTranspose(y, v) }"
    source = model(body, w=normal(4, 3, 3, 3), v=normal(4, 8, 3, 3))
    found = {f.op: f for f in asked(quantize(source, scheme="w8", exclude=("op:Conv",)).proto).fates}
    assert (found["Conv"].verdict, found["Conv"].reason) == ("float", ort.NO_CODES)
    assert (found["ConvTranspose"].verdict, found["ConvTranspose"].reason) == ("float", ort.WEIGHTS_ONLY)


def test_nodes_in_bodies_are_found() -> None:
    body = """g (bool c, float[2,4] x) => (float[2,6] y) {
      y = If(c)<then_branch = a () => (float[2,6] u) { u = MatMul(x, w) },
                else_branch = b () => (float[2,6] v) { v = MatMul(x, k) }>
    }"""
    source = model(body, w=normal(4, 6), k=normal(4, 6, seed=1))
    found = asked(quantize(source, scheme="w8a8-dynamic").proto)
    assert [fate.verdict for fate in found.fates] == ["integer", "integer"]


def test_a_file_is_read_where_it_lies_and_unnamed_nodes_get_names(tmp_path: Path) -> None:
    proto = product()
    for node in proto.graph.node:
        node.name = ""
    onnx.save(proto, tmp_path / "m.onnx")
    found = ort.evidence(graph.load(tmp_path / "m.onnx"), tmp_path / "m.onnx")
    assert [fate.verdict for fate in found.fates] == ["integer"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]


def test_every_target_names_an_engine() -> None:
    assert {target.evidence for target in dict(TARGETS.items()).values()} == set(ENGINES)


def test_rules_are_marked_as_rules() -> None:
    for runtime in rules.RULES:
        found = rules.evidence(graph.from_proto(product()), runtime)
        assert not found.measured
        assert "rules of" in found.source


@pytest.mark.parametrize(
    ("proto", "verdict", "reason"),
    [
        (product(), "island", "uint8 codes"),
        (product(codes=np.int8), "island", "a zero point other than 0"),
        (product(codes=np.int8, axis=0), "island", "a zero point other than 0"),
    ],
)
def test_tensorrt_refuses_what_its_documentation_refuses(proto: onnx.ModelProto, verdict: str, reason: str) -> None:
    (fate,) = rules.evidence(graph.from_proto(proto), "tensorrt").fates
    assert fate.verdict == verdict
    assert reason in fate.reason


def test_what_is_made_for_tensorrt_becomes_kernels_by_its_rules() -> None:
    source = model(
        "g (float[N,3,8,8] x) => (float[N,6] y) { a = Conv(x, w, b) c = Relu(a) d = Flatten(c) y = MatMul(d, v) }",
        w=normal(4, 3, 3, 3),
        b=normal(4),
        v=normal(144, 6),
    )
    found = rules.evidence(graph.from_proto(quantize(source, target="tensorrt").proto), "tensorrt")
    assert {fate.op: fate.verdict for fate in found.fates} == {"Conv": "integer", "MatMul": "integer"}
    for_cpu = rules.evidence(graph.from_proto(quantize(source, target="ort-cpu").proto), "tensorrt")
    assert for_cpu.counts()["island"] == 2


def test_cuda_carries_pairs_out_as_they_stand() -> None:
    (fate,) = rules.evidence(graph.from_proto(product()), "ort-cuda").fates
    assert fate.verdict == "island"


def test_openvino_is_asked_what_it_runs() -> None:
    pytest.importorskip("openvino")
    source = model("g (float[4,64] x) => (float[4,32] y) { y = MatMul(x, w) }", w=normal(64, 32))
    ask = ENGINES["openvino"]
    found = ask(graph.from_proto(quantize(source, target="openvino").proto), None)
    assert found.measured
    assert [(fate.op, fate.verdict) for fate in found.fates] == [("MatMul", "integer")]
    assert found.fused == found.pairs == 1
    wide = ask(graph.from_proto(quantize(source, target="openvino", scheme="w8a16").proto), None)
    assert [fate.verdict for fate in wide.fates] == ["island"]
    assert "int16" in wide.fates[0].reason
    assert wide.fused == 0


@pytest.mark.parametrize("target", ["ort-cpu", "portable"])
@pytest.mark.parametrize(
    ("weights", "dynamic", "reason"),
    [
        ({"format": "int8", "granularity": "block", "block_size": 16}, False, "scales in blocks"),
        ({"format": "int8", "granularity": "block", "block_size": 16}, True, "one scale per column"),
        ({"format": "int4"}, True, "takes weights of 8 bits, not int4"),
    ],
)
def test_what_the_runtime_would_compute_wrong_stays_in_float(
    target: str, weights: dict[str, object], dynamic: bool, reason: str
) -> None:
    source = model("g (float[4,64] x) => (float[4,32] y) { y = MatMul(x, w) }", w=normal(64, 32))
    found = quantize(source, target=target, weights=weights, activations={"dynamic": dynamic})
    assert reason in found.reason("MatMul_0")
    assert found.plan.quantized() == []


@pytest.mark.parametrize("size", [16, 64])
def test_the_runtime_still_fuses_blocks_into_a_kernel_that_has_none(size: int) -> None:
    # When this fails, ONNX Runtime was mended, and `Target.fuses_blocks` of its targets may become true.
    source = model("g (float[4,64] x) => (float[4,32] y) { y = MatMul(x, w) }", w=normal(64, 32))
    weights = {"format": "int8", "granularity": "block", "block_size": size}
    proto = quantize(source, target="openvino", weights=weights).proto
    (fate,) = asked(proto).fates
    assert fate.became == "MatMulIntegerToFloat"
    assert fate.reason.startswith("WRONG VALUES")
    assert asked(product(axis=0)).fates[0].reason.startswith("WRONG VALUES")


@pytest.mark.parametrize(
    ("gemm", "reason"),
    [
        ("v = DequantizeLinear<axis=1>(w, t) y = Gemm(d, v)", "its weight 'w' has no zero point"),
        ("v = DequantizeLinear<axis=1>(w, t, o) y = Gemm<alpha=2.0>(d, v)", ""),
        ("v = DequantizeLinear<axis=1>(w, t, o) y = Gemm(d, v, b)", "its bias 'b' is float"),
        ("v = DequantizeLinear<axis=1>(w, t, o) y = Gemm(d, v)", ""),
    ],
)
def test_a_gemm_is_a_kernel_under_conditions(gemm: str, reason: str) -> None:
    body = f"g (float[2,4] x) => (float[2,6] y) {{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) {gemm} }}"
    held = {"s": SCALE, "z": ZERO, "w": np.arange(24).reshape(4, 6).astype(np.int8), "t": scales(6)}
    held |= {"o": np.zeros(6, np.int8)} if "(w, t, o)" in gemm else {}
    held |= {"b": normal(6)} if ", b)" in gemm else {}
    (fate,) = asked(model(body, **held)).fates
    assert fate.verdict == ("island" if reason else "integer")
    assert fate.reason.startswith(reason)
    assert bool(fate.reason) == bool(reason)


@pytest.mark.parametrize("slot", [0, 1])
def test_an_operator_with_one_float_input_is_an_island(slot: int) -> None:
    body = f"""g (float[2,4] x, float[2,4] r) => (float[2,4] y) {{
      q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)
      a = Add({"r, d" if slot == 0 else "d, r"})  e = QuantizeLinear(a, s, z)  y = DequantizeLinear(e, s, z)
    }}"""
    (fate,) = asked(model(body, s=SCALE, z=ZERO)).fates
    assert (fate.verdict, fate.reason) == ("island", "its input 'r' is float")
