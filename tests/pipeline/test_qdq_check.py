"""The Q/DQ checker: every kind of broken model is found, sound models are not complained about."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from qpipe.calibrate.errors import RecipeError
from qpipe.pipeline import graph
from qpipe.pipeline.checks import RULES
from qpipe.pipeline.checks.targets import TRAITS, TargetTraits
from qpipe.pipeline.qdq_check import check_qdq
from qpipe.pipeline.targets import TARGETS


@dataclass
class Net:
    """y = Conv(DQ(Q(x)), DQ(w), DQ(b)), then Q, DQ: the parts that a test breaks one of."""

    opset: int = 21
    x_scale: np.ndarray = field(default_factory=lambda: np.float32(0.02))
    x_zero: np.ndarray | None = field(default_factory=lambda: np.uint8(128))
    w: np.ndarray = field(default_factory=lambda: np.arange(4 * 3, dtype=np.int8).reshape(4, 3, 1, 1))
    w_scale: np.ndarray = field(default_factory=lambda: np.array([0.1, 0.2, 0.3, 0.4], np.float32))
    w_zero: np.ndarray | None = field(default_factory=lambda: np.zeros(4, np.int8))
    w_attrs: dict[str, int] = field(default_factory=lambda: {"axis": 0})
    b_scale: np.ndarray | None = None
    b_zero: np.ndarray | None = None
    y_scale: np.ndarray = field(default_factory=lambda: np.float32(0.5))
    y_zero: np.ndarray | None = field(default_factory=lambda: np.uint8(3))
    y_attrs: dict[str, int] = field(default_factory=dict)

    def build(self) -> onnx.ModelProto:
        b_scale = np.float32(self.x_scale) * self.w_scale if self.b_scale is None else self.b_scale
        arrays = {
            "x_scale": self.x_scale,
            "x_zero": self.x_zero,
            "w": self.w,
            "w_scale": self.w_scale,
            "w_zero": self.w_zero,
            "b": np.array([1, 2, 3, 4], np.int32),
            "b_scale": b_scale,
            "b_zero": self.b_zero,
            "y_scale": self.y_scale,
            "y_zero": self.y_zero,
        }

        def node(op: str, source: str, name: str, result: str, **attrs: int) -> onnx.NodeProto:
            operands = [source, f"{name}_scale", *([f"{name}_zero"] if arrays[f"{name}_zero"] is not None else [])]
            return helper.make_node(op, operands, [result], name=f"{op}_{result}", **attrs)

        nodes = [
            node("QuantizeLinear", "x", "x", "xq"),
            node("DequantizeLinear", "xq", "x", "xd"),
            node("DequantizeLinear", "w", "w", "wd", **self.w_attrs),
            node("DequantizeLinear", "b", "b", "bd", axis=0),
            helper.make_node("Conv", ["xd", "wd", "bd"], ["c"], name="conv"),
            node("QuantizeLinear", "c", "y", "cq", **self.y_attrs),
            node("DequantizeLinear", "cq", "y", "y", **self.y_attrs),
        ]
        net = helper.make_graph(
            nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 8, 8])],
            [numpy_helper.from_array(np.asarray(a), name) for name, a in arrays.items() if a is not None],
            value_info=[helper.make_tensor_value_info("c", TensorProto.FLOAT, ["N", 4, 8, 8])],
        )
        return helper.make_model(net, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)


def findings(proto: onnx.ModelProto, target: str | TargetTraits | None = None) -> dict[str, str]:
    """Return rule -> severity."""
    return {f.rule: f.severity for f in check_qdq(graph.from_proto(proto), target=target)}


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


BROKEN: dict[str, tuple[Net, str]] = {
    "scale NaN": (Net(x_scale=np.float32("nan")), "scale-finite"),
    "scale infinite": (Net(x_scale=np.float32("inf")), "scale-finite"),
    "one of four scales infinite": (Net(w_scale=f32(0.1, np.inf, 0.3, 0.4)), "scale-finite"),
    "scale zero": (Net(y_scale=np.float32(0)), "scale-positive"),
    "scale negative": (Net(y_scale=np.float32(-0.5)), "scale-positive"),
    "one of four scales zero": (Net(w_scale=f32(0.1, 0.2, 0, 0.4)), "scale-positive"),
    "scale subnormal": (Net(y_scale=np.float32(1e-40)), "scale-normal"),
    "scale of another float type": (Net(x_scale=np.float16(0.02)), "scale-type"),
    "scale of a type before its opset": (Net(x_scale=np.float16(0.02), opset=17), "scale-type"),
    "axis out of range": (Net(w_attrs={"axis": 4}), "axis-range"),
    "axis below range": (Net(w_attrs={"axis": -5}), "axis-range"),
    "wrong axis": (Net(w_attrs={"axis": 1}), "scale-length"),
    "missing axis, length does not fit": (Net(w_attrs={}), "scale-length"),
    "missing axis": (Net(w_attrs={}), "axis-missing"),
    "scale too short": (Net(w_scale=f32(0.1, 0.2)), "scale-length"),
    "scale too long": (Net(w_scale=f32(0.1, 0.2, 0.3, 0.4, 0.5)), "scale-length"),
    "activation scale of the wrong length": (
        Net(y_scale=f32(0.1, 0.2, 0.3), y_zero=np.zeros(3, np.uint8), y_attrs={"axis": 1}),
        "scale-length",
    ),
    "scale of rank 4 without blocks": (Net(w_scale=np.ones((4, 3, 1, 1), np.float32)), "scale-length"),
    "zero point too short": (Net(w_zero=np.zeros(3, np.int8)), "zero-point-shape"),
    "zero point one for four scales": (Net(w_zero=np.zeros((), np.int8)), "zero-point-shape"),
    "zero point of another type": (Net(w_zero=np.zeros(4, np.uint8)), "zero-point-type"),
    "zero point for int32": (Net(b_zero=np.ones(4, np.int32)), "zero-point-none"),
    "bias scale off": (Net(b_scale=f32(0.1, 0.2, 0.3, 0.4)), "bias-scale"),
    "bias scale off by 3 ulp": (
        Net(b_scale=f32(0.002, 0.004, 0.006, 0.008) * np.float32(1 + 3 * 2**-22)),
        "bias-scale",
    ),
    "bias scale of the wrong length": (Net(b_scale=f32(0.002, 0.004)), "bias-scale"),
    "16 bits before opset 21": (Net(x_zero=np.uint16(0), opset=19), "type-allowed"),
    "4-bit weights before opset 21": (
        Net(w=np.ones((4, 3, 1, 1), ml_dtypes.int4), w_zero=None, opset=19),
        "type-allowed",
    ),
    "several scales before opset 13": (Net(w_attrs={}, opset=12), "attribute-allowed"),
    "axis before opset 13": (Net(opset=12), "attribute-allowed"),
    "blocks before opset 21": (Net(w_attrs={"axis": 1, "block_size": 1}, opset=19), "attribute-allowed"),
    "blocked scales of the wrong shape": (
        Net(w_attrs={"axis": 1, "block_size": 2}, w_scale=np.ones((4, 1, 1, 1), np.float32), w_zero=None),
        "block-shape",
    ),
    "blocked scales of the wrong rank": (
        Net(w_attrs={"axis": 1, "block_size": 2}, w_scale=f32(1, 1), w_zero=None),
        "block-shape",
    ),
    "negative block size": (Net(w_attrs={"axis": 1, "block_size": -2}), "block-size"),
    "opset without kernels": (Net(opset=28), "opset-ceiling"),
}


def test_the_sound_model_has_no_findings() -> None:
    assert findings(Net().build()) == {}
    assert findings(Net(x_zero=None, x_scale=f32(0.02)).build()) == {}


@pytest.mark.parametrize("name", BROKEN)
def test_every_broken_model_is_found(name: str) -> None:
    net, rule = BROKEN[name]
    found = findings(net.build())
    assert rule in found
    assert found[rule] == RULES.get(rule).severity


def test_most_broken_models_pass_the_onnx_checker() -> None:
    """The reason why this checker exists."""
    passed = 0
    for net, _ in BROKEN.values():
        try:
            onnx.checker.check_model(net.build(), full_check=True)
            passed += 1
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
            continue
    assert passed > len(BROKEN) / 2


def test_a_finding_says_where_what_and_what_to_do() -> None:
    finding = check_qdq(graph.from_proto(Net(w_scale=f32(0.1, 0.2, 0, 0.4)).build()))[0]
    data = finding.to_dict()
    assert data["node"] == "DequantizeLinear_wd"
    assert data["tensor"] == "w_scale"
    assert data["found"] == "1 of 4 scales, the first 0 at 2"
    assert data["expected"] == "scales above 0"
    assert data["do"]
    assert data["severity"] == "error"


def test_errors_come_before_warnings() -> None:
    found = check_qdq(graph.from_proto(Net(w_attrs={}).build()))
    severities = [f.severity for f in found]
    assert severities == sorted(severities)
    assert {"error", "warning"} == set(severities)


def _parsed(text: str) -> onnx.ModelProto:
    return parser.parse_model(text)


HEAD = '<ir_version: 8, opset_import: ["": 17]>'
INITS = "float s = {0.1}, float t = {0.2}, uint8 z = {0}"

STRUCTURES = {
    "codes that nothing reads": (
        f"{HEAD} g (float[4] x) => (float[4] y) <{INITS}> {{ q = QuantizeLinear(x, s, z)  y = Relu(x) }}",
        "quantize-unread",
    ),
    "codes as an output": (
        f"{HEAD} g (float[4] x) => (uint8[4] q) <{INITS}> {{ q = QuantizeLinear(x, s, z) }}",
        "quantize-without-dequantize",
    ),
    "codes read as numbers": (
        f"{HEAD} g (float[4] x) => (uint8[4] y) <{INITS}> {{ q = QuantizeLinear(x, s, z)  y = Max(q, q) }}",
        "quantize-without-dequantize",
    ),
    "codes read as numbers behind a reshape": (
        f"{HEAD} g (float[4] x, int64[2] n) => (uint8[2,2] y) <{INITS}>"
        " { q = QuantizeLinear(x, s, z)  r = Reshape(q, n)  y = Max(r, r) }",
        "quantize-without-dequantize",
    ),
    "another scale behind": (
        f"{HEAD} g (float[4] x) => (float[4] y) <{INITS}>"
        " { q = QuantizeLinear(x, s, z)  y = DequantizeLinear(q, t, z) }",
        "pair-parameters",
    ),
    "rounded twice": (
        f"{HEAD} g (float[4] x) => (float[4] y) <{INITS}> {{ q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)"
        "  r = QuantizeLinear(d, t, z)  y = DequantizeLinear(r, t, z) }",
        "quantized-twice",
    ),
    "no scale": (f"{HEAD} g (uint8[4] q) => (float[4] y) {{ y = DequantizeLinear(q) }}", "scale-present"),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_broken_structure_is_found(name: str) -> None:
    text, rule = STRUCTURES[name]
    assert rule in findings(_parsed(text))


SOUND = {
    "codes through a reshape": f"{HEAD} g (float[4] x, int64[2] n) => (float[2,2] y) <{INITS}>"
    " { q = QuantizeLinear(x, s, z)  r = Reshape(q, n)  y = DequantizeLinear(r, s, z) }",
    "integer operator": f"{HEAD} g (float[4,4] x, uint8[4,4] w) => (int32[4,4] y) <{INITS}>"
    " { q = QuantizeLinear(x, s, z)  y = MatMulInteger(q, w) }",
    "scales as inputs": f"{HEAD} g (float[4] x, float s) => (float[4] y)"
    " { q = QuantizeLinear(x, s)  y = DequantizeLinear(q, s) }",
    "no Q/DQ at all": f"{HEAD} g (float[4] x) => (float[4] y) {{ y = Relu(x) }}",
    "16 bits in ONNX Runtime's domain": '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> g (float[4] x)'
    " => (float[4] y) <float s = {0.1}, uint16 z = {7}>"
    " { q = com.microsoft.QuantizeLinear(x, s, z)  y = com.microsoft.DequantizeLinear(q, s, z) }",
    "Gemm with alpha": f"{HEAD} g (float[1,2] x, int8[2,2] w, int32[2] b) => (float[1,2] y) <{INITS}>"
    " { q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  e = DequantizeLinear(w, s)"
    "  f = DequantizeLinear(b, s)  y = Gemm <alpha = 0.5>(d, e, f) }",
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_structures_have_no_findings(name: str) -> None:
    assert findings(_parsed(SOUND[name])) == {}


def test_nodes_in_subgraphs_and_functions_are_checked_and_named() -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "own": 1]> g (bool c, float[4] x) => (float[4] y)
        <float s = {0}, uint8 z = {0}> {
        m = If (c) <
            then_branch = a () => (float[4] t) { q = QuantizeLinear(x, s, z)  t = DequantizeLinear(q, s, z) },
            else_branch = b () => (float[4] e) { e = Relu(x) }>
        y = own.F(m) }
        <domain: "own", opset_import: ["": 17]> F (v) => (w) {
            n = Constant <value_float = -1.0>()
            u = QuantizeLinear(v, n)
            w = DequantizeLinear(u, n) }"""
    found = check_qdq(graph.from_proto(_parsed(text)))
    nodes = {f.node for f in found if f.rule == "scale-positive"}
    assert len(nodes) == 4
    assert sum("then_branch" in node for node in nodes) == 2
    assert sum(node.startswith("function own::F/") for node in nodes) == 2


def test_targets_add_their_demands() -> None:
    assert findings(Net().build(), "ort-cpu") == {}
    assert set(findings(Net().build(), "tensorrt")) == {"target-type", "zero-point-symmetric"}
    assert set(findings(Net(x_zero=np.uint16(0), y_zero=None).build(), "openvino")) == {"target-type"}
    blocks = Net(w_attrs={"axis": 1, "block_size": 2}, w_scale=np.ones((4, 2, 1, 1), np.float32), w_zero=None)
    assert "target-type" in findings(blocks.build(), "qnn")
    assert "target-type" not in findings(blocks.build(), "ort-cpu")
    with pytest.raises(RecipeError, match="tensorr"):
        findings(Net().build(), "tensorr")


def test_shared_scales_where_the_target_wants_them() -> None:
    def net(behind: str) -> onnx.ModelProto:
        return _parsed(
            f"{HEAD} g (float[1,1,4,4] x) => (float[1,1,3,3] y) <{INITS}> {{ q = QuantizeLinear(x, s, z)"
            "  d = DequantizeLinear(q, s, z)  m = MaxPool <kernel_shape = [2, 2]>(d)"
            f"  r = QuantizeLinear(m, {behind}, z)  y = DequantizeLinear(r, {behind}, z) }}"
        )

    assert findings(net("s"), "qnn") == {}
    assert findings(net("t"), "qnn") == {"shared-scale": "error"}
    assert findings(net("t"), "ort-cpu") == {}


def test_float16_scales_that_lose_digits_are_a_warning() -> None:
    text = """<ir_version: 9, opset_import: ["": 19]> g (float16[4] x) => (float16[4] y) {
        q = QuantizeLinear(x, s)  y = DequantizeLinear(q, s) }"""
    model = _parsed(text)
    model.graph.initializer.append(numpy_helper.from_array(np.array(1e-6, np.float16), "s"))
    assert findings(model) == {"scale-precision": "warning"}


def test_stored_codes_that_do_not_fit_their_type_or_shape() -> None:
    def with_weight(weight: TensorProto) -> dict[str, str]:
        text = f"{HEAD} g (float[4] x) => (float[4] y) <float s = {{0.1}}> {{ y = DequantizeLinear(w, s) }}"
        model = _parsed(text)
        model.graph.initializer.append(weight)
        return findings(model)

    good = TensorProto(name="w", data_type=TensorProto.INT8, dims=[4], int32_data=[-128, 0, 3, 127])
    assert with_weight(good) == {}
    wide = TensorProto(name="w", data_type=TensorProto.INT8, dims=[4], int32_data=[-129, 0, 3, 127])
    assert with_weight(wide) == {"codes-in-range": "error"}
    short = TensorProto(name="w", data_type=TensorProto.INT8, dims=[4], raw_data=b"\x01\x02\x03")
    assert with_weight(short) == {"codes-complete": "error"}


def test_external_weights_are_not_read(tmp_path: Path) -> None:
    """Scales of an external file are judged, weights stay where they are: here the weight file is a hole of 4 GiB."""
    rows = 2**22
    weight = TensorProto(name="w", data_type=TensorProto.INT8, dims=[rows, 1024], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="w.bin")
    weight.external_data.add(key="length", value=str(rows * 1024))
    scale = numpy_helper.from_array(np.array([0.1] * 1023 + [0], np.float32), "s")
    scale.ClearField("raw_data")
    scale.data_location = TensorProto.EXTERNAL
    scale.external_data.add(key="location", value="s.bin")
    (tmp_path / "s.bin").write_bytes(np.array([0.1] * 1023 + [0], np.float32).tobytes())
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(rows * 1024)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wd"], axis=1, name="dq"),
        helper.make_node("MatMul", ["x", "wd"], ["y"]),
    ]
    net = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1024])],
        [weight, scale],
    )
    path = tmp_path / "m.onnx"
    path.write_bytes(
        helper.make_model(net, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    found = check_qdq(graph.load(path))
    assert [(f.rule, f.found) for f in found] == [("scale-positive", "1 of 1024 scales, the first 0 at 1023")]


def test_every_rule_explains_itself_and_is_tried_here() -> None:
    tried = {rule for _, rule in (*BROKEN.values(), *STRUCTURES.values())}
    tried |= {
        "zero-point-symmetric",
        "target-type",
        "shared-scale",
        "scale-precision",
        "codes-complete",
        "codes-in-range",
    }
    assert tried == set(RULES.names())
    for rule in map(RULES.get, RULES.names()):
        assert rule.why.endswith((".", ")", "``", '"'))
        assert rule.do
        assert rule.severity in ("error", "warning")


def test_the_checker_knows_every_target() -> None:
    assert set(TARGETS.names()) <= set(TRAITS)


def test_traits_name_types_that_exist() -> None:
    names = set(TensorProto.DataType.keys())
    assert all(traits.types <= names for traits in TRAITS.values())


@pytest.mark.parametrize(("dtype", "opset"), [(ml_dtypes.bfloat16, 19), (ml_dtypes.float8_e8m0fnu, 24)])
def test_scales_of_other_types(dtype: type, opset: int) -> None:
    def with_scale(value: float) -> dict[str, str]:
        text = f"""<ir_version: 10, opset_import: ["": {opset}]> g (float[4] x) => (float[4] y)
            {{ c = Cast <to = 16>(x)  q = QuantizeLinear(c, s)  d = DequantizeLinear(q, s)  y = Cast <to = 1>(d) }}"""
        model = parser.parse_model(text)
        model.graph.initializer.append(numpy_helper.from_array(np.array(value).astype(dtype), "s"))
        return findings(model)

    assert with_scale(0.25) == {}
    assert "scale-finite" in with_scale(float("nan"))
