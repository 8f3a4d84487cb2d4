"""The onnx package's own vectors of the quantization operators, rebuilt with initializers at each opset.

33 of QuantizeLinear, DequantizeLinear and DynamicQuantizeLinear, 12 of QLinearMatMul, QLinearConv, MatMulInteger and
ConvInteger. As shipped they are stamped with the newest opset and pass scales as inputs, which runtimes refuse for
these reasons alone.
"""

import importlib

import engines
import numpy as np
import numpy_oracle
import onnx
import pytest
from onnx import TensorProto, defs, helper, numpy_helper
from onnx.backend.test.case import node as onnx_cases
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.granularity import PER_TENSOR
from qpipe.calibrate.qarray import Spec, minmax_range, params_from_range, quantize

QDQ = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
INTEGER = ("QLinearMatMul", "QLinearConv", "MatMulInteger", "ConvInteger")
PASSABLE = tuple(map(np.dtype, ("float32", "float16", "int32", "uint8", "int8", "uint16", "int16")))
OPSETS = (10, 13, 19, 21, 23, 25)


def load_cases():
    """Importing a module of cases makes them; collecting all 1,884 would take half a minute."""
    for name in (*QDQ, *INTEGER):
        importlib.import_module(f"onnx.backend.test.case.node.{name.lower()}")
    prefixes = tuple(f"test_{name.lower()}" for name in (*QDQ, *INTEGER))
    return {case.name: case for case in onnx_cases._NodeTestCases if case.name.startswith(prefixes)}


CASES = load_cases()


def is_qdq(name):
    return name.startswith(tuple(f"test_{op.lower()}" for op in QDQ))


def as_array(data):
    return numpy_helper.to_array(data) if isinstance(data, TensorProto) else np.asarray(data)


def vectors(case):
    (inputs, outputs), names = case.data_sets[0], [i.name for i in case.model.graph.input]
    return dict(zip(names, map(as_array, inputs), strict=True)), [as_array(output) for output in outputs]


def type_word(dtype):
    return onnx.TensorProto.DataType.Name(helper.np_dtype_to_tensor_dtype(dtype)).lower()


def accepts(schema, node, arrays):
    """Whether a schema has the attributes, and takes the types of the inputs, of a node."""
    if not {a.name for a in node.attribute} <= set(schema.attributes):
        return False
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    for formal, name in zip(schema.inputs, node.input, strict=False):
        types = allowed.get(formal.type_str, {formal.type_str})
        if name in arrays and f"tensor({type_word(arrays[name].dtype)})" not in types:
            return False
    return True


def first_opset_of_granularity(node, arrays):
    """Scales of rank 0 from the start, [d] from opset 13, blocks from 21: shapes are not part of a schema."""
    if node.op_type not in QDQ[:2] or node.input[1] not in arrays:
        return 10
    scale = arrays[node.input[1]]
    return 10 if scale.size == 1 else 13 if scale.ndim == 1 else 21


def is_valid(case, opset):
    arrays, _ = vectors(case)
    for node in case.model.graph.node:
        try:
            schema = defs.get_schema(node.op_type, opset)
        except defs.SchemaError:
            return False
        if not accepts(schema, node, arrays) or opset < first_opset_of_granularity(node, arrays):
            return False
    return True


def rebuild(case, opset):
    """The case at another opset: everything but the first input becomes an initializer, and that too when its type
    cannot be passed (4 bits, float8); an output of such a type is read as float32 through a scale of 1."""
    arrays, outputs = vectors(case)
    graph = case.model.graph
    first = graph.input[0].name
    fed = [first] if arrays[first].dtype in PASSABLE else []
    initializers = [numpy_helper.from_array(a, name) for name, a in arrays.items() if name not in fed]
    nodes = list(graph.node)
    infos = []
    for info, output in zip(graph.output, outputs, strict=True):
        if output.dtype not in PASSABLE:
            initializers.append(numpy_helper.from_array(np.float32(1), f"{info.name}_one"))
            nodes.append(helper.make_node("DequantizeLinear", [info.name, f"{info.name}_one"], [f"{info.name}_real"]))
            infos.append(helper.make_tensor_value_info(f"{info.name}_real", TensorProto.FLOAT, output.shape))
        else:
            infos.append(info)
    imports = [helper.make_opsetid("", opset)]
    model = helper.make_model(
        helper.make_graph(nodes, case.name, [i for i in graph.input if i.name in fed], infos, initializers),
        opset_imports=imports,
        ir_version=helper.find_min_ir_version_for(imports),
    )
    return model, {name: arrays[name] for name in fed}, outputs


VALID = [(name, opset) for name, case in CASES.items() for opset in OPSETS if is_valid(case, opset)]


def assert_same(theirs, expected):
    for got, wanted in zip(theirs, expected, strict=True):
        assert got.shape == wanted.shape
        if wanted.dtype == np.float32 and wanted.ndim == 0:  # a dynamic scale, printed with 8 digits in the vectors
            assert np.allclose(got, wanted, rtol=1e-6, atol=0)
        else:
            assert np.array_equal(np.asarray(got, np.float64), wanted.astype(np.float64), equal_nan=True)


def test_there_are_33_and_12():
    counted = [is_qdq(name) for name in CASES]
    assert (counted.count(True), counted.count(False)) == (33, 12)
    assert {name for name, _ in VALID} == set(CASES)


@pytest.mark.parametrize(("name", "opset"), VALID)
def test_oracle_passes(name, opset):
    model, feeds, expected = rebuild(CASES[name], opset)
    onnx.checker.check_model(model, full_check=True)
    assert_same(numpy_oracle.run(model, feeds), expected)


def known_gap(name, opset, engine):
    """What the runtimes of today do not have, None for everything else."""
    if engine == "reference" and opset < 19 and "_dequantizelinear" in name:
        return "the reference evaluator has DequantizeLinear from opset 19 only"
    if engine == "ort-exact" and "float4e2m1" in name:
        return "ONNX Runtime's CPU provider has no kernel for float4"
    if engine == "ort-exact" and name == "test_convinteger_with_padding":
        return "ONNX Runtime's ConvInteger takes one zero point for all weights"
    return None


def runtime_cases():
    for name, opset in VALID:
        for engine in ("reference", "ort-exact"):
            gap = known_gap(name, opset, engine)
            yield pytest.param(name, opset, engine, marks=[pytest.mark.xfail(reason=gap, strict=False)] if gap else [])


@pytest.mark.parametrize(("name", "opset", "engine"), runtime_cases())
def test_runtime_agrees(name, opset, engine):
    model, feeds, expected = rebuild(CASES[name], opset)
    assert_same(engines.ENGINES[engine](model, feeds), expected)


@pytest.mark.parametrize("name", [name for name in CASES if "dynamicquantizelinear" in name])
def test_calibrated_parameters_give_the_codes_of_the_dynamic_vectors(name):
    arrays, (codes, scale, zero_point) = vectors(CASES[name])
    x = arrays["x"]
    params = params_from_range(minmax_range(x, PER_TENSOR), Spec(format=FORMATS.get("uint8"), symmetric=False))
    assert np.allclose(params.scale, scale, rtol=1e-6, atol=0)
    assert params.zero_point == zero_point
    assert np.array_equal(quantize(x, params).q, codes)
