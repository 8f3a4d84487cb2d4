"""Block formats with scales of 8 bits: the rule of the scales, and the form in ONNX, bit for bit."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.granularity import PER_TENSOR, per_block
from qpipe.calibrate.qarray import Spec, dequantize, fake_quant, minmax_range, params_from_range, quantize

BLOCKS = [name for name, fmt in FORMATS.items() if fmt.block_size]
POWER_OF_TWO = [name for name in BLOCKS if FORMATS.get(name).scale_format == "float8_e8m0"]


def solve(x, name, axis=1, rule=None):
    fmt = FORMATS.get(name)
    fmt = replace(fmt, scale_rule=rule) if rule else fmt
    spec = Spec(format=fmt, granularity=per_block(axis, fmt.block_size))
    return params_from_range(minmax_range(x, spec.granularity), spec)


def weights(shape=(64, 96), seed=0):
    """Normal weights whose blocks differ by orders of magnitude; one block is zero."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape) * np.exp2(rng.integers(-20, 10, (shape[0], 1)))
    w[3, :32] = 0
    return w.astype(np.float32)


@pytest.mark.parametrize(
    ("amax", "expected"),
    # floor(log2(amax)) - 2, for the largest power of two of e2m1 is 2^2
    [(4.0, 1.0), (5.0, 1.0), (6.0, 1.0), (7.5, 1.0), (8.0, 2.0), (1.0, 0.25), (3.99, 0.5), (2.0**-100, 2.0**-102)],
)
def test_mxfp4_scale_follows_the_floor_rule_of_the_specification(amax, expected):
    x = np.zeros((1, 32), np.float32)
    x[0, 7] = -amax
    assert solve(x, "mxfp4").scale.tolist() == [[expected]]


@pytest.mark.parametrize(("amax", "expected"), [(6.0, 1.0), (6.01, 2.0), (12.0, 2.0), (3.0, 0.5), (3.1, 1.0)])
def test_rule_up_takes_the_next_power_of_two_so_that_nothing_saturates(amax, expected):
    x = np.zeros((1, 32), np.float32)
    x[0, 0] = amax
    assert solve(x, "mxfp4", rule="up").scale.tolist() == [[expected]]


@pytest.mark.parametrize("name", POWER_OF_TWO)
def test_power_of_two_scales(name):
    x = weights()
    amax = np.abs(x).reshape(64, 3, 32).max(axis=2)
    params = solve(x, name)
    mantissa, exponent = np.frexp(params.scale)
    assert (mantissa == 0.5).all()
    largest_exponent = np.floor(np.log2(FORMATS.get(name).qmax))
    some = amax > 0
    assert np.array_equal((exponent - 1)[some], np.floor(np.log2(amax[some])) - largest_exponent)
    assert params.scale[3, 0] == 1
    up = solve(x, name, rule="up")
    assert (amax / up.scale <= up.spec.qmax).all()
    assert (amax[some] / (up.scale[some] / 2) > up.spec.qmax).all()


def test_nvfp4_scales_are_e4m3_codes_against_one_float32_scale():
    x = weights()
    params = solve(x, "nvfp4")
    tensor_scale = params.scale_codes.params.scale
    assert tensor_scale == np.float32(np.float32(np.abs(x).max() / 6.0) / 448)
    assert params.scale_codes.q.astype(np.float32).max() == 448
    assert params.scale_codes.q.astype(np.float32).min() > 0
    amax = np.abs(x).reshape(64, 6, 16).max(axis=2)
    normal = (params.scale_codes.q.astype(np.float32) > 2**-6) & (amax > 0)
    # e4m3 has 3 bits of mantissa: the scale is within one part in 16 of the ideal one.
    assert np.abs(params.scale[normal] / (amax[normal] / 6) - 1).max() <= 1 / 16 + 1e-6
    assert not fake_quant(x, params)[3, :32].any()


def test_nvfp4_beats_mxfp4_on_normal_weights():
    """Smaller blocks and finer scales: about 1.6 dB, at 4.5 instead of 4.25 bits."""
    w = np.random.default_rng(1).standard_normal((256, 256)).astype(np.float32)
    noise = {name: np.mean((fake_quant(w, solve(w, name)) - w) ** 2) for name in ("nvfp4", "mxfp4")}
    assert 10 * np.log10(noise["mxfp4"] / noise["nvfp4"]) > 1.2


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_onnx_form_computes_the_same_values(name, axis):
    """One DequantizeLinear with the stored scales, or two in a chain, as `scale_levels` says, at `min_opset`."""
    w = weights((64, 48))
    params = solve(w, name, axis=axis)
    fmt, scales = params.spec.format, params.scale_codes
    initializers = [
        numpy_helper.from_array(quantize(w, params).q, "q"),
        numpy_helper.from_array(scales.q, "scale_codes"),
    ]
    nodes, scale = [], "scale_codes"
    if fmt.scale_levels == 2:
        initializers.append(numpy_helper.from_array(scales.params.scale, "tensor_scale"))
        nodes.append(helper.make_node("DequantizeLinear", ["scale_codes", "tensor_scale"], ["scale"]))
        scale = "scale"
    options = {"axis": axis, "block_size": fmt.block_size, "output_dtype": TensorProto.FLOAT}
    nodes.append(helper.make_node("DequantizeLinear", ["q", scale], ["w"], **options))
    output = helper.make_tensor_value_info("w", TensorProto.FLOAT, w.shape)
    imports = [helper.make_opsetid("", fmt.min_opset)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [], [output], initializers),
        opset_imports=imports,
        ir_version=helper.find_min_ir_version_for(imports),
    )
    onnx.checker.check_model(model, full_check=True)
    theirs = ReferenceEvaluator(model).run(None, {})[0]
    assert np.array_equal(theirs, dequantize(quantize(w, params)))


@pytest.mark.parametrize("wrong", [PER_TENSOR, per_block(1, 16), per_block(1, 64)])
def test_other_block_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match="blocks of 32"):
        Spec(format=FORMATS.get("mxfp4"), granularity=wrong)


def test_scales_can_be_stored_as_float16_too():
    fmt = replace(FORMATS.get("int8"), scale_format="float16", scale_rule="up")
    x = np.linspace(-0.3, 0.3, 999, dtype=np.float32)
    params = params_from_range(minmax_range(x, PER_TENSOR), Spec(format=fmt))
    assert params.scale_codes.q.dtype == np.float16
    assert params.scale == np.float32(params.scale_codes.q)
    assert params.scale >= np.float32(0.3 / 127)
    assert np.abs(fake_quant(x, params) - x).max() <= params.scale * 0.5001
