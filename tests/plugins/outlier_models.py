"""Models with one OutlierMatMul, cases for them, and how far a result may be from the reference."""

from __future__ import annotations

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from qpipe import plugins
from qpipe.plugins.outlier_matmul.op import DOMAIN, OP_TYPE, Packed, pack, reference

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    BFLOAT16: TensorProto.BFLOAT16,
}
SMALLEST_STEP = {np.dtype(np.float32): 1e-37, np.dtype(np.float16): 2.0**-25, BFLOAT16: 1e-37}
EPSILON = {np.dtype(np.float32): 2.0**-24, np.dtype(np.float16): 2.0**-11, BFLOAT16: 2.0**-8}


@dataclass
class Case:
    """One product: activations, constants, and what the operator is told."""

    x: np.ndarray
    packed: Packed
    bias: np.ndarray | None = None
    limit: float = 0.0
    functions: list[onnx.FunctionProto] = field(default_factory=list)
    opset: int = 17
    counter: bool = True

    def model(self) -> onnx.ModelProto:
        constants = dict(self.packed.inputs())
        if self.bias is not None:
            constants["bias"] = self.bias
        names = ["x", *constants]
        outputs = ["y", "new_outliers"][: 2 if self.counter else 1]
        node = helper.make_node(OP_TYPE, names, outputs, domain=DOMAIN, limit=float(self.limit))
        kind = TYPES[self.x.dtype]
        dims = [*(f"d{i}" for i in range(self.x.ndim - 1)), self.x.shape[-1]]
        infos = [helper.make_tensor_value_info("y", kind, [*dims[:-1], self.packed.w_q.shape[0]])]
        infos += [helper.make_tensor_value_info("new_outliers", TensorProto.INT64, [])] * self.counter
        initializers = [tensor(value, name) for name, value in constants.items()]
        graph = helper.make_graph([node], "g", [helper.make_tensor_value_info("x", kind, dims)], infos, initializers)
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid(DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=10, functions=self.functions)

    def expected(self) -> tuple[np.ndarray, int]:
        y, new_outliers = reference(self.x, self.packed, self.bias, limit=self.limit)
        return y, int(new_outliers)

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the exact result before it is rounded to T, and how far each output may be from it.

        That is float32 sums in any order, and one rounding to T.
        """
        count = self.packed.outlier_index.size
        rows = self.x.reshape(-1, self.x.shape[-1]).astype(np.float64)
        exact = reference(self.x.astype(np.float32), self.packed, self.bias, limit=self.limit)[0]
        magnitude = np.abs(exact.reshape(len(rows), exact.shape[-1]).astype(np.float64))
        outliers = np.abs(rows[:, self.packed.outlier_index])
        parts = outliers @ np.abs(self.packed.w_outlier[:, :count]).astype(np.float64).T
        bias = 0 if self.bias is None else np.abs(self.bias)
        # The integer part is at most the result plus everything else that was added to it.
        terms = magnitude + 2 * (parts + bias)
        sums = EPSILON[np.dtype(np.float32)] * (count + 6) * terms
        rounding = EPSILON[self.x.dtype] * (magnitude + sums) + SMALLEST_STEP[self.x.dtype]
        return exact, (sums + rounding).reshape(exact.shape)


def tensor(value: np.ndarray, name: str) -> onnx.TensorProto:
    return numpy_helper.from_array(value, name)


def random_case(
    seed: int,
    shape: tuple[int, ...],
    outputs: int,
    outliers: int,
    dtype: np.dtype,
    *,
    bias: bool = True,
    limit: float = 0,
) -> Case:
    rng = np.random.default_rng(seed)
    inputs = shape[-1]
    index = rng.permutation(inputs)[:outliers]
    x = rng.standard_normal(shape).astype(np.float32)
    x[..., index] *= 40
    w = rng.standard_normal((outputs, inputs)).astype(np.float32)
    return Case(
        x=x.astype(dtype),
        packed=pack(w, index, dtype),
        bias=rng.standard_normal(outputs).astype(np.float32) if bias else None,
        limit=limit,
    )


def open_session(
    model: onnx.ModelProto, *, plugin: bool = True, threads: int = 1, optimize: bool = True
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if plugin:
        plugins.register(options)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, x: np.ndarray) -> list[np.ndarray]:
    """Run on ``x``; bfloat16 goes in and comes out as ONNX Runtime's own value, numpy having no such type."""
    if x.dtype != BFLOAT16:
        return session.run(None, {"x": x})
    binding = session.io_binding()
    value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(x.view(np.uint16), TensorProto.BFLOAT16)
    binding.bind_ortvalue_input("x", value)
    for output in session.get_outputs():
        binding.bind_output(output.name)
    session.run_with_iobinding(binding)
    y, *rest = binding.get_outputs()
    return [bfloat16_of(y), *(item.numpy() for item in rest)]


def bfloat16_of(value: ort.OrtValue) -> np.ndarray:
    import ctypes

    shape = value.shape()
    size = int(np.prod(shape))
    words = (ctypes.c_uint16 * size).from_address(value.data_ptr()) if size else (ctypes.c_uint16 * 0)()
    return np.array(words, dtype=np.uint16).view(BFLOAT16).reshape(shape)
