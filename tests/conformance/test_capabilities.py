"""The capability forms: all valid, all right where they run, refused only where that is known."""

import json

import capabilities
import engines
import forms
import numpy as np
import numpy_oracle
import onnx
import pytest
from qpipe.calibrate.qarray import QArray, dequantize, quantize

FORMS = list(forms.all_forms())
GROUPED = "ConvTranspose g2"
INTEGER_FORMATS = {"int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "uint16"}


def measured(engine, chosen):
    outcomes = capabilities.measure(chosen, [engine])
    if outcomes and outcomes[0].status == "missing":
        pytest.skip(outcomes[0].reason)
    return outcomes


def describe(outcomes):
    return [(*outcome.form.row, outcome.form.operator, outcome.error, outcome.reason) for outcome in outcomes]


def test_every_form_is_a_valid_model():
    for form in FORMS:
        model, feeds = forms.build(form)
        onnx.checker.check_model(model, full_check=True)
        assert [i.name for i in model.graph.input] == list(feeds) == ["x"]
        assert model.opset_import[0].version == max(form.opset, forms.FLOOR_OPSET)


def test_every_format_granularity_and_operator_is_there():
    weight_only = {(f.weight, f.granularity, f.operator) for f in FORMS if not f.activation and f.carrier == "qdq"}
    for fmt in INTEGER_FORMATS | {"float8_e4m3fn", "float8_e5m2", "float4_e2m1"}:
        for granularity in ("tensor", "channel", "block"):
            for operator in forms.OPERATORS:
                assert (fmt, granularity, operator) in weight_only
    assert {f.weight for f in FORMS} >= {"mxfp4", "mxfp8_e4m3", "nvfp4", "nf4", "bnb_fp4", "float16", "bfloat16"}


def test_the_oracle_agrees_with_float_where_quantization_is_fine():
    """Against an independent product of the unquantized arrays: 16-bit weights lose less than 1e-4."""
    for form in FORMS:
        if (form.weight, form.activation, form.granularity, form.carrier) != ("int16", None, "channel", "qdq"):
            continue
        model, feeds = forms.build(form)
        y = numpy_oracle.run(model, feeds)[0]
        weights = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
        w = weights["w_codes"] * weights["w_scale"].reshape(
            [-1 if axis == forms.OPERATORS[form.operator].output_axis else 1 for axis in range(weights["w_codes"].ndim)]
        )
        node = next(n for n in model.graph.node if n.op_type == forms.OPERATORS[form.operator].op_type)
        plain = onnx.helper.make_graph(
            [onnx.helper.make_node(node.op_type, ["x", "w"], ["y"], **dict(forms.OPERATORS[form.operator].attributes))],
            "plain",
            list(model.graph.input),
            list(model.graph.output),
            [onnx.numpy_helper.from_array(w.astype(np.float32), "w")],
        )
        float_model = onnx.helper.make_model(plain, opset_imports=list(model.opset_import), ir_version=10)
        exact = engines.ENGINES["ort-exact"](float_model, feeds)[0]
        assert np.abs(exact - y).max() <= 1e-5 * np.abs(y).max()


def test_reference_is_never_off():
    outcomes = measured("reference", FORMS)
    assert not describe([o for o in outcomes if o.status == "off"])
    refused = [o for o in outcomes if o.status == "no"]
    # Its ConvTranspose fails with groups, and it knows no com.microsoft operator.
    assert not describe([o for o in refused if o.form.operator != GROUPED and not o.form.carrier.startswith("MatMul")])


def test_ort_with_optimizations_off_is_never_off():
    outcomes = measured("ort-exact", FORMS)
    # Its MatMulInteger kernel saturates on CPUs without VNNI even so: full 8-bit weights are not exact there.
    saturating = [o for o in outcomes if o.form.carrier == "dynamic" and o.form.variant != "7-bit weights"]
    assert not describe([o for o in outcomes if o.status == "off" and o not in saturating])
    refused = {o.form.weight for o in outcomes if o.status == "no"}
    assert refused <= {"float4_e2m1", "mxfp4", "mxfp8_e4m3", "mxfp8_e5m2", "nvfp4", "bfloat16"}
    float32_scales = [o for o in outcomes if o.form.weight.startswith("mxfp8") and o.form.variant == "float32 scales"]
    assert {o.status for o in float32_scales} == {"yes"}


def test_ort_as_deployed_is_right_for_weight_only_forms_and_7_bit_weights():
    chosen = [f for f in FORMS if not f.activation or f.variant == "7-bit weights"]
    outcomes = measured("ort-deployed", chosen)
    assert not describe([o for o in outcomes if o.status == "off"])


def test_ort_as_deployed_runs_all_integer_forms():
    chosen = [f for f in FORMS if f.weight in INTEGER_FORMATS and f.activation in INTEGER_FORMATS]
    assert not describe([o for o in measured("ort-deployed", chosen) if o.status == "no"])


@pytest.mark.parametrize("engine", ["openvino", "tract"])
def test_portable_forms_are_right_in_other_engines(engine):
    """int8 per tensor and per channel, weight-only or with 7-bit weights: what every engine here runs."""
    chosen = [
        f
        for f in FORMS
        if f.weight == "int8" and f.granularity != "block" and (not f.activation or f.variant == "7-bit weights")
    ]
    assert not describe([o for o in measured(engine, chosen) if o.status != "yes"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["openvino", "tract"])
def test_other_engines_load_what_the_table_lists(engine):
    loads = {
        "openvino": {
            f for f in FORMS if "fnuz" not in f.weight and not f.weight.endswith("int2") and "bnb" not in f.carrier
        },
        "tract": {f for f in FORMS if f.weight in ("int8", "uint8") and f.granularity != "block"},
    }[engine]
    chosen = [f for f in loads if not f.carrier.startswith("MatMul") and f.activation not in ("uint16", "int16")]
    assert not describe([o for o in measured(engine, chosen) if o.status == "no"])


@pytest.mark.parametrize(
    ("row", "change", "status"),
    [
        (("int8", None, "tensor", "qdq", ""), 1e-6, "yes"),
        (("int8", None, "tensor", "qdq", ""), 1e-4, "off"),
        (("int8", "uint8", "tensor", "qdq", "float32 output"), 0.01, "yes"),
        (("int8", "uint8", "tensor", "qdq", "float32 output"), 0.02, "off"),
    ],
)
def test_judge_knows_right_from_wrong(row, change, status):
    form = forms.Form(
        **dict(zip(("weight", "activation", "granularity", "carrier", "variant"), row, strict=True)), operator="Gemm"
    )
    expected = np.linspace(-2, 2, 240, dtype=np.float32).reshape(5, 48)
    wrong = expected.copy()
    wrong[0, 0] += 2 * change
    assert capabilities.judge(form, expected, wrong)[0] == status


@pytest.mark.parametrize("activation", ["uint8", "int16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize(("codes", "status"), [(0, "yes"), (1, "yes"), (2, "off")])
def test_judge_counts_codes_behind_a_quantizer(activation, codes, status):
    form = forms.Form(weight="int8", activation=activation, granularity="tensor", operator="Gemm")
    params = forms.output_params(form)
    q = quantize(np.linspace(0.5, 3, 99, dtype=np.float32), params).q
    shifted = (q.view(f"u{q.itemsize}") + np.uint8(codes)).view(q.dtype)
    values, moved = (dequantize(QArray(q=a, params=params)) for a in (q, shifted))
    assert capabilities.judge(form, values, moved)[0] == status
    between = dequantize(QArray(q=(q.view(f"u{q.itemsize}") + np.uint8(1)).view(q.dtype), params=params)) + values
    assert capabilities.judge(form, values, between / 2)[0] == "off"


def test_table_and_json_hold_every_form(capsys):
    assert capabilities.main(["--engine", "ort-exact", "--operator", "Gemm"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    chosen = [f for f in FORMS if f.operator == "Gemm"]
    assert len({line.count("|") for line in lines}) == 1
    assert {line.split("|")[1].strip() for line in lines[1:]} == {f.weight for f in chosen}
    assert capabilities.main(["--engine", "ort-exact", "--operator", "Gemm", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["outcomes"]) == len(chosen)


def test_table_is_written_between_the_markers(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{capabilities.START}\nold\n{capabilities.END}\nafter\n", encoding="utf-8")
    capabilities.write_between_markers(path, "new")
    assert path.read_text(encoding="utf-8") == f"before\n{capabilities.START}\n\nnew\n\n{capabilities.END}\nafter\n"
    path.write_text("no markers\n", encoding="utf-8")
    with pytest.raises(ValueError, match="capabilities: start"):
        capabilities.write_between_markers(path, "new")
