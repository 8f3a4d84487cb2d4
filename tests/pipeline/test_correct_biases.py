"""Biases take back what quantizing adds to the mean of each output channel."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import pytest
from qpipe.calibrate.errors import DataError
from qpipe.pipeline.stages.quantize import QuantizeOptions
from qpipe.pipeline.stages.sequential import Data
from quantizing import Result, model, normal, quantize, run

CONV = ("float[N,4,8,8] x", "float[N,M,K,L] y")
BODIES = {
    "Conv": (*CONV, "y = Conv<pads=[1,1,1,1]>(x, w, b)", (6, 4, 3, 3)),
    "Conv without bias": (*CONV, "y = Conv(x, w)", (6, 4, 3, 3)),
    "depthwise Conv": (*CONV, "y = Conv<group=4>(x, w, d)", (4, 1, 3, 3)),
    "Gemm": ("float[N,12] x", "float[N,6] y", "y = Gemm<transB=1>(x, w, b)", (6, 12)),
    "MatMul and Add": ("float[N,5,12] x", "float[N,5,6] y", "h = MatMul(x, w)  y = Add(b, h)", (12, 6)),
}


def source(name: str) -> onnx.ModelProto:
    given, result, body, shape = BODIES[name]
    weights = {"w": normal(*shape), "b": normal(6, seed=4), "d": normal(4, seed=4)}
    used = {key: array for key, array in weights.items() if key in re.findall(r"\w+", body.split("=", 1)[1])}
    return model(f"g ({given}) => ({result}) {{ {body} }}", **used)


def batches(name: str, count: int = 3) -> list[dict[str, Any]]:
    rng = np.random.default_rng(5)
    shape = [int(n) for n in re.findall(r"\d+", BODIES[name][0])]
    return [{"x": rng.gamma(1.0, size=(8, *shape)).astype(np.float32)} for _ in range(count)]


def corrected(proto: onnx.ModelProto, data: list[dict[str, Any]], *, on: bool = True, **recipe: Any) -> Result:
    options = QuantizeOptions(data=Data(batches=data) if on else None)
    return quantize(proto, data, bias_correction=on, options=options, equalize="none", **recipe)


def shift(found: Result, data: list[dict[str, Any]], axis: int) -> float:
    """Largest |mean error| of an output channel, relative to the spread of the outputs."""
    wanted, got = (np.concatenate([run(p, batch)[0] for batch in data]) for p in (found.source, found.proto))
    others = tuple(i for i in range(wanted.ndim) if i != axis % wanted.ndim)
    return float(np.abs((got - wanted).mean(axis=others)).max() / wanted.std())


@pytest.mark.parametrize("scheme", ["w8a8", "w4"])
@pytest.mark.parametrize("name", BODIES)
def test_the_mean_error_of_every_channel_is_gone(name: str, scheme: str) -> None:
    data, axis = batches(name), 1 if "Conv" in name else -1
    recipe = {"scheme": scheme, "target": "portable", "weights": {"algorithm": "rtn"}}
    if scheme == "w8a8":
        recipe["weights"]["reduce_bits"] = 4  # so that there is an error worth correcting
    plain, found = (corrected(source(name), data, on=on, **recipe) for on in (False, True))
    assert found.result.corrected == 1
    before, after = shift(plain, data, axis), shift(found, data, axis)
    assert before > 0.005
    # Padding, and int32 biases, are what is left: a Conv of groups is corrected as if it saw no padding.
    assert after < 0.1 * before


def test_layers_are_corrected_behind_corrected_layers() -> None:
    proto = model(
        "g (float[N,12] x) => (float[N,6] y) { a = Gemm(x, w, b)  r = Relu(a)  y = Gemm(r, v, c) }",
        w=normal(12, 16),
        b=normal(16, seed=2),
        v=normal(16, 6),
        c=normal(6, seed=3),
    )
    data = [{"x": normal(64, 12, seed=7)}]
    recipe = {"scheme": "w8", "target": "portable", "weights": {"reduce_bits": 5, "algorithm": "rtn"}}
    plain, found = (corrected(proto, data, on=on, **recipe) for on in (False, True))
    assert found.result.corrected == 2
    assert shift(found, data, -1) < 0.01 * shift(plain, data, -1)


def test_what_has_no_bias_is_passed_over() -> None:
    proto = model("g (float[N,12] x) => (float[N,6] y) { y = MatMul(x, w) }", w=normal(12, 6))
    assert corrected(proto, [{"x": normal(4, 12)}]).result.corrected == 0


def test_statistics_alone_are_not_enough() -> None:
    proto = source("Gemm")
    with pytest.raises(DataError, match="takes data") as caught:
        quantize(proto, batches("Gemm"), bias_correction=True)
    assert "--data" in str(caught.value.do)
