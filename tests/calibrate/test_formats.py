"""The records of the formats against what ONNX and the number types themselves say."""

import statistics

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from qpipe.calibrate.errors import RecipeError
from qpipe.calibrate.formats import FORMATS

ALL = dict(FORMATS.items())
QDQ = sorted(name for name, fmt in ALL.items() if fmt.lowering == "qdq")
CASTS = sorted(name for name, fmt in ALL.items() if fmt.lowering == "cast")


def types_at(op, opset, parameter):
    schema = onnx.defs.get_schema(op, opset)
    strings = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    return {text.removeprefix("tensor(").removesuffix(")") for text in strings[parameter]}


def onnx_word(fmt):
    """How a type is called in a schema: FLOAT8E4M3FN -> float8e4m3fn."""
    return fmt.onnx_type.lower()


def is_in_schemas(fmt, opset):
    """Whether Q and DQ of an opset take the codes, and the scales, of a format."""
    try:
        codes = types_at("QuantizeLinear", opset, "T3" if opset >= 23 else "T2")
        codes &= types_at("DequantizeLinear", opset, "T1" if opset >= 19 else "T")
    except onnx.defs.SchemaError:
        return False
    if onnx_word(fmt) not in codes:
        return False
    scale = FORMATS.get(fmt.scale_format)
    if scale.lowering != "scale":
        return opset >= 21 or not fmt.block_size
    return opset >= 23 and onnx_word(scale) in types_at("DequantizeLinear", opset, "T2")


@pytest.mark.parametrize("name", QDQ)
def test_min_opset_is_the_first_whose_operators_take_the_type(name):
    fmt = ALL[name]
    first = next(opset for opset in range(10, onnx.defs.onnx_opset_version() + 1) if is_in_schemas(fmt, opset))
    assert fmt.min_opset == first


@pytest.mark.parametrize("name", CASTS)
def test_cast_takes_the_type_at_min_opset(name):
    fmt = ALL[name]
    word = {"FLOAT": "float", "DOUBLE": "double"}.get(fmt.onnx_type, fmt.onnx_type.lower())
    assert word in types_at("Cast", fmt.min_opset, "T2")
    assert fmt.min_opset == 10 or word not in types_at("Cast", fmt.min_opset - 1, "T2")


def test_every_type_that_quantize_linear_can_write_has_a_format():
    newest = types_at("QuantizeLinear", onnx.defs.onnx_opset_version(), "T3")
    assert newest == {onnx_word(ALL[name]) for name in QDQ}


@pytest.mark.parametrize("name", sorted(ALL))
def test_type_of_codes_is_the_one_that_onnx_names(name):
    fmt = ALL[name]
    elem_type = getattr(TensorProto, fmt.onnx_type)
    if fmt.codebook:
        assert np.dtype(fmt.dtype) == np.dtype(ml_dtypes.uint4)
        assert fmt.onnx_type == "UINT8"
    else:
        assert helper.tensor_dtype_to_np_dtype(elem_type) == np.dtype(fmt.dtype)


@pytest.mark.parametrize("name", sorted(ALL))
def test_bounds_are_those_of_the_type(name):
    fmt = ALL[name]
    if fmt.codebook:
        assert (fmt.qmin, fmt.qmax) == (-1, 1)
        return
    info = ml_dtypes.iinfo(fmt.dtype) if fmt.is_integer else fmt.float_info
    assert (fmt.qmin, fmt.qmax) == (float(info.min), float(info.max))
    assert fmt.bits == info.bits


@pytest.mark.parametrize("name", sorted(ALL))
def test_kind_agrees_with_sign_and_zeros(name):
    fmt = ALL[name]
    assert fmt.kind in ("int", "uint", "float", "codebook")
    assert fmt.is_integer == (fmt.kind in ("int", "uint"))
    assert fmt.is_signed == (fmt.kind != "uint")
    assert fmt.source
    assert fmt.zeros((2, 3)).shape == (2, 3)
    assert fmt.zeros((2, 3)).dtype == np.dtype(fmt.dtype)


def test_bits_per_value_count_the_scales():
    expected = {"int8": 8, "mxfp4": 4.25, "mxfp8_e4m3": 8.25, "nvfp4": 4.5, "nf4": 4, "float16": 16}
    assert {name: ALL[name].bits_per_value for name in expected} == expected


def test_scale_levels_say_how_many_dequantize_linear_it_takes():
    assert ALL["nvfp4"].scale_levels == 2
    assert {ALL[name].scale_levels for name in QDQ if name != "nvfp4"} == {1}
    assert {ALL[name].scale_levels for name in CASTS} == {0}


def test_nf4_is_made_of_the_quantiles_of_a_normal_distribution():
    """Eight positive and seven negative quantiles, evenly spaced in probability up to 0.9677083, and zero."""
    quantile = statistics.NormalDist().inv_cdf
    positive = [quantile(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    negative = [-quantile(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    values = np.sort(np.array([*positive, 0.0, *negative])) / max(positive)
    assert np.abs(values - np.asarray(ALL["nf4"].codebook)).max() < 2e-7


def test_unknown_name_suggests_near_ones():
    with pytest.raises(RecipeError) as caught:
        FORMATS.get("float8_e4m3")
    assert "float8_e4m3fn" in caught.value.expected
