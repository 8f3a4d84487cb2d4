"""What a target lists runs there: every format, granularity and operator, quantized by qpipe for that target.

The models are qpipe's own output; each runs in the target's runtime as deployed, against the numpy oracle.
"""

import capabilities
import engines
import forms
import numpy as np
import numpy_oracle
import onnx
import pytest
from onnx import helper, numpy_helper
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.metrics import sqnr_db
from qpipe.pipeline.targets import TARGETS
from quantizing import Result, calibrate, quantize

ENGINES = {
    "ort-cpu": "ort-deployed",
    "ort-cpu-avx2": "ort-deployed",
    "openvino": "openvino",
    "portable": "reference",
}
"""The runtime of each target that can be had here; the two of NVIDIA cannot."""
GRANULARITIES = ("tensor", "channel", "block")
ACTIVATIONS = tuple(n for n, f in FORMATS.items() if f.lowering == "qdq" and not f.block_size)


def float_model(operator):
    """One operator with a weight, N(0, 1) times N(0, 1/64), and an input for it."""
    rng = np.random.default_rng(3)
    w = (rng.standard_normal(operator.weight_shape) / 8).astype(np.float32)
    x = rng.standard_normal(operator.input_shape).astype(np.float32)
    node = helper.make_node(operator.op_type, ["x", "w"], ["y"], name="product", **dict(operator.attributes))
    infos = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("x", operator.input_shape), ("y", forms.output_shape(operator)))
    ]
    graph = helper.make_graph([node], "g", infos[:1], infos[1:], [numpy_helper.from_array(w, "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), x


def outputs(found: Result, x, target):
    """What the runtime of a target makes of a quantized model, and what the oracle does."""
    expected = numpy_oracle.run(found.proto, {"x": x})[0]
    try:
        got = np.asarray(engines.ENGINES[ENGINES[target]](found.proto, {"x": x})[0])
    except engines.Missing as error:
        pytest.skip(str(error))
    return got, expected


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("operator", forms.OPERATORS)
@pytest.mark.parametrize("target", ENGINES)
def test_every_listed_format_of_weights_runs(target, operator, granularity):
    source, x = float_model(forms.OPERATORS[operator])
    op_type, facts = forms.OPERATORS[operator].op_type, TARGETS.get(target)
    assert op_type in facts.forms["weights"]
    ran = 0
    for name in sorted(facts.weight_formats):
        fmt = FORMATS.get(name)
        if fmt.block_size and granularity != "block":
            continue
        weights = {"format": name, "granularity": granularity, "accuracy_level": 1}
        found = quantize(source, scheme="w8", target=target, weights=weights)
        if found.plan.nodes()["product"].spec is None:
            assert target in found.reason("product")
            continue
        if target == "portable" and operator == "ConvTranspose g2":
            continue  # the reference evaluator's ConvTranspose fails with groups
        got, expected = outputs(found, x, target)
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max(), name
        ran += 1
    assert ran >= 8 or (target == "portable" and operator == "ConvTranspose g2")


@pytest.mark.parametrize("operator", forms.OPERATORS)
@pytest.mark.parametrize("target", ENGINES)
def test_every_format_of_activations_runs_or_is_refused_with_a_reason(target, operator):
    source, x = float_model(forms.OPERATORS[operator])
    known, facts = calibrate(source, [{"x": x}]), TARGETS.get(target)
    for name in ACTIVATIONS:
        fmt = FORMATS.get(name)
        options = {"format": name, "symmetric": fmt.is_signed}
        weights = {"reduce_bits": 1} if fmt.bits == 8 and fmt.is_integer else {}
        found = quantize(
            source, calibration=known, target=target, activations=options, weights=weights, method="minmax"
        )
        decisions = [d for d in found.plan.decisions if d.site.role == "activation"]
        stored = [d for d in decisions if d.spec is not None]
        if name in facts.refused:
            assert decisions
            assert all(facts.refused[name] in d.reason for d in decisions)
        elif forms.OPERATORS[operator].op_type not in facts.kernels:
            assert "no integer kernel" in found.reason("product")
        assert bool(stored) == (name not in facts.refused and forms.OPERATORS[operator].op_type in facts.kernels)
        if target == "portable" and operator == "ConvTranspose g2":
            continue
        got, expected = outputs(found, x, target)
        form = forms.Form(weight="int8", activation=name, granularity="channel", operator=operator)
        output = [d for d in found.plan.decisions if d.site.role == "output" and d.spec is not None]
        if name in facts.emulated and name.startswith("float8"):  # some codes beside, and what sums make of them
            assert sqnr_db(expected, got) > 20, name
        elif output:
            params = next(s.params for key, s in found.result.activations.items() if key[0] == "y")
            assert capabilities.codes_apart(got, expected, params) <= 1, name
        else:
            assert np.abs(got - expected).max() <= capabilities.tolerance(form) * np.abs(expected).max(), name
