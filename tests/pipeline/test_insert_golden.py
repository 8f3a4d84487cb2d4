"""Where Q/DQ nodes stand, written out node by node."""

from __future__ import annotations

import numpy as np
import pytest
from quantizing import FINE, Result, error, model, normal, quantize, random_batches, run


def pair(tensor: str, source: str | None = None, result: str | None = None) -> list[str]:
    """The two lines of a Q/DQ pair."""
    codes, parameters = f"{tensor}_QuantizeLinear_Output", f"{tensor}_scale, {tensor}_zero_point"
    return [
        f"{codes} = QuantizeLinear({source or tensor}, {parameters})",
        f"{result or f'{tensor}_DequantizeLinear_Output'} = DequantizeLinear({codes}, {parameters})",
    ]


def stored(tensor: str, *, zero_point: bool = True) -> str:
    """The line of a DequantizeLinear behind stored codes."""
    zero = f", {tensor}_zero_point" if zero_point else ""
    return f"{tensor}_DequantizeLinear_Output = DequantizeLinear({tensor}_quantized, {tensor}_scale{zero})"


def dq(tensor: str) -> str:
    return f"{tensor}_DequantizeLinear_Output"


def test_convolutional_net() -> None:
    found = quantize(
        model(
            """g (float[N,3,8,8] x) => (float[N,5] y) {
                c = Conv<pads=[1,1,1,1]>(x, w, b)
                r = Relu(c)
                d = Conv<pads=[1,1,1,1]>(r, v)
                a = Add(r, d)
                m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)
                k = Concat<axis=1>(m, m)
                f = Flatten(k)
                y = Gemm(f, wg, bg)
            }""",
            w=normal(4, 3, 3, 3),
            b=normal(4),
            v=normal(4, 4, 3, 3),
            wg=normal(128, 5),
            bg=normal(5),
        )
    )
    assert found.edges() == [
        *pair("x"),
        stored("w"),
        stored("b", zero_point=False),
        f"c = Conv({dq('x')}, {dq('w')}, {dq('b')})",
        *pair("r", "c"),  # the Relu is the quantizer's lower end
        stored("v"),
        f"d = Conv({dq('r')}, {dq('v')})",
        *pair("d"),
        f"a = Add({dq('r')}, {dq('d')})",
        *pair("a"),
        f"m = MaxPool({dq('a')})",
        *pair("m"),
        f"k = Concat({dq('m')}, {dq('m')})",
        *pair("k"),
        f"f = Flatten({dq('k')})",
        *pair("f"),
        stored("wg"),
        stored("bg", zero_point=False),
        f"y = Gemm({dq('f')}, {dq('wg')}, {dq('bg')})",
    ]
    # Whatever only moves codes keeps one scale.
    assert len({found.scale_of(dq(name)) for name in ("a", "m", "k", "f")}) == 1
    held = found.initializers()
    np.testing.assert_allclose(held["b_scale"], held["x_scale"] * held["w_scale"], rtol=1e-7)
    assert held["b_quantized"].dtype == np.int32


def test_products_share_the_quantizer_of_their_input() -> None:
    found = quantize(
        model(
            "g (float[N,4] x) => (float[N,4] q, float[N,4] k) { q = MatMul(x, wq)  k = MatMul(x, wk) }",
            wq=normal(4, 4),
            wk=normal(4, 4, seed=1),
        )
    )
    assert found.edges() == [
        *pair("x"),
        stored("wq"),
        f"q = MatMul({dq('x')}, {dq('wq')})",  # the fast kernel keeps a float output
        stored("wk"),
        f"k = MatMul({dq('x')}, {dq('wk')})",
    ]


def test_a_graph_output_keeps_its_name_behind_a_quantizer() -> None:
    found = quantize(
        model("g (float[N,3,4,4] x) => (float[N,2,4,4] y) { y = Conv(x, w) }", w=normal(2, 3, 1, 1)),
    )
    assert found.edges() == [
        *pair("x"),
        stored("w"),
        f"y_QuantizeLinear_Input = Conv({dq('x')}, {dq('w')})",
        *pair("y", "y_QuantizeLinear_Input", "y"),
    ]


def test_an_output_that_is_read_inside_too() -> None:
    source = model(
        "g (float[N,3,4,4] x) => (float[N,3,4,4] y, float[N,3,4,4] z) { y = Conv(x, w)  z = Sigmoid(y) }",
        w=normal(3, 3, 1, 1),
    )
    found = quantize(source)
    assert [o.name for o in found.proto.graph.output] == ["y", "z"]
    assert "y_QuantizeLinear_Input = Conv" in found.edges()[3]
    assert "Sigmoid(y)" in found.edges()[6]


def test_a_shared_weight_is_stored_once_per_axis() -> None:
    w = normal(6, 6)
    found = quantize(
        model(
            """g (float[N,6] x) => (float[N,6] a, float[N,6] b, float[N,6] c) {
                a = MatMul(x, w)  b = MatMul(a, w)  t = Transpose<perm=[1,0]>(w)  c = MatMul(b, t)
            }""",
            w=w,
        )
    )
    codes = [name for name, array in found.initializers().items() if array.dtype == np.int8 and array.size == 36]
    assert len(codes) == 2
    assert "w" not in found.initializers()
    assert found.ops()["Transpose"] == 0
    matrices = [found.initializers()[name].astype(int) for name in codes]
    assert not np.array_equal(matrices[0], matrices[1].T), "each axis has scales of its own"


def test_a_tied_embedding_stays_real_for_its_lookup() -> None:
    table = normal(10, 6)
    source = model(
        """g (int64[N] ids) => (float[N,10] y) {
            e = Gather(table, ids)  h = Tanh(e)  t = Transpose<perm=[1,0]>(table)  y = MatMul(h, t)
        }""",
        table=table,
    )
    found = quantize(source, [{"ids": np.arange(10)}])
    np.testing.assert_array_equal(found.initializers()["table"], table)
    assert found.ops()["Transpose"] == 0
    assert "embedding" in found.reason("Gather_0")
    assert error(found, {"ids": np.arange(10)}) < 0.02


def test_an_initializer_that_is_an_output_keeps_name_type_and_value() -> None:
    w = normal(4, 4)
    source = model("g (float[N,4] x) => (float[N,4] y, float[4,4] w) { y = MatMul(x, w) }", w=w)
    found = quantize(source)
    np.testing.assert_array_equal(run(found.proto, {"x": normal(2, 4)})[1], w)


def test_an_input_that_is_an_output() -> None:
    source = model("g (float[N,4] x) => (float[N,4] x, float[N,4] y) { y = MatMul(x, w) }", w=normal(4, 4))
    found = quantize(source)
    assert [o.name for o in found.proto.graph.output] == ["x", "y"]
    x = normal(2, 4)
    np.testing.assert_array_equal(run(found.proto, {"x": x})[0], x)


def test_names_that_are_taken_are_not_used() -> None:
    source = model(
        """g (float[N,4] x) => (float[N,4] y) {
            x_scale = Tanh(x)  x_QuantizeLinear = MatMul(x, w)  y = Add(x_scale, x_QuantizeLinear)
        }""",
        w=normal(4, 4),
        w_scale=normal(1),
    )
    found = quantize(source)
    names = [o for n in found.proto.graph.node for o in n.output] + list(found.initializers())
    assert len(names) == len(set(names))
    assert {"x_scale", "x_scale_1"} <= set(names)
    assert error(found, random_batches(source, 1)[0]) < 0.05


@pytest.mark.parametrize("bias", [1e9, 1e20])
def test_a_bias_that_does_not_fit_is_added_in_float(bias: float) -> None:
    source = model(
        "g (float[N,3,4,4] x) => (float[N,2,4,4] y) { c = Conv(x, w, b)  y = Tanh(c) }",
        w=normal(2, 3, 1, 1) * 1e-3,
        b=np.array([bias, 0], np.float32),
    )
    found = quantize(source, [{"x": normal(2, 3, 4, 4) * 1e-3}])
    assert not [name for name, array in found.initializers().items() if array.dtype == np.int32]
    assert found.ops()["Add"] == 1
    batch = {"x": normal(2, 3, 4, 4) * 1e-3}
    for exact in (True, False):
        assert np.abs(run(found.proto, batch, exact=exact)[0][:, 0] - 1).max() < 1e-6


@pytest.mark.parametrize("shape", [(5,), (1, 5)])
def test_the_bias_of_a_gemm_may_have_leading_ones(shape: tuple[int, ...]) -> None:
    source = model("g (float[N,4] x) => (float[N,5] y) { y = Gemm(x, w, b) }", w=normal(4, 5), b=normal(*shape))
    found = quantize(source)
    assert found.initializers()["b_quantized"].shape == (5,)
    assert error(found, random_batches(source, 1)[0]) < 0.02


@pytest.mark.parametrize("shape", [(), (1,), (2, 5), (2, 1)])
def test_a_broadcast_bias_stays_real(shape: tuple[int, ...]) -> None:
    source = model("g (float[2,4] x) => (float[2,5] y) { y = Gemm(x, w, b) }", w=normal(4, 5), b=normal(*shape))
    found = quantize(source)
    assert "b_quantized" not in found.initializers()
    assert error(found, random_batches(source, 1)[0]) < 0.02


@pytest.mark.parametrize("attrs", ["alpha=0.5", "beta=2.0"])
def test_the_bias_of_a_scaled_gemm_stays_real(attrs: str) -> None:
    source = model(f"g (float[N,4] x) => (float[N,5] y) {{ y = Gemm<{attrs}>(x, w, b) }}", w=normal(4, 5), b=normal(5))
    found = quantize(source)
    assert "b_quantized" not in found.initializers()
    assert error(found, random_batches(source, 1)[0]) < 0.02


RELU_NET = "g (float[N,3,4,4] x) => (float[N,2,4,4] y) { c = Conv(x, w)  y = %s }"


def relu_net(text: str, **recipe: object) -> Result:
    constants = {"lo": np.asarray(0, np.float32), "hi": np.asarray(0.5, np.float32), "no": np.asarray(-9, np.float32)}
    used = {name: array for name, array in constants.items() if f" {name}" in text}
    return quantize(model(RELU_NET % text, w=normal(2, 3, 1, 1), **used), **recipe)


@pytest.mark.parametrize("text", ["Relu(c)", "Clip(c, lo)", "Clip(c, lo, hi)", "Clip(c, no, hi)", "Clip(c)"])
def test_a_quantizer_absorbs_what_cuts_where_its_codes_end(text: str) -> None:
    found = relu_net(text)
    assert set(found.ops()) == {"QuantizeLinear", "DequantizeLinear", "Conv"}
    assert found.ops()["QuantizeLinear"] == 2
    assert error(found, random_batches(found.source, 1)[0]) < 0.05


def test_a_symmetric_quantizer_stands_before_the_relu() -> None:
    found = relu_net("Relu(c)", activations={"format": "int8", "symmetric": True})
    assert found.edges()[-4:] == [
        "c = Conv(x_DequantizeLinear_Output, w_DequantizeLinear_Output)",
        *pair("c"),
        f"y = Relu({dq('c')})",
    ]


def test_a_clip_whose_limits_come_at_run_time_stays() -> None:
    source = model(
        "g (float[N,3,4,4] x, float lo) => (float[N,2,4,4] y) { c = Conv(x, w)  y = Clip(c, lo) }", w=normal(2, 3, 1, 1)
    )
    found = quantize(source, [{"x": normal(2, 3, 4, 4), "lo": np.asarray(-0.25, np.float32)}])
    assert found.ops()["Clip"] == 1
    assert error(found, {"x": normal(2, 3, 4, 4), "lo": np.asarray(-0.25, np.float32)}) < 0.05


def test_a_relu_with_another_reader_before_it_is_not_absorbed() -> None:
    source = model(
        "g (float[N,3,4,4] x) => (float[N,2,4,4] y) { c = Conv(x, w)  r = Relu(c)  t = Tanh(c)  y = Add(r, t) }",
        w=normal(2, 3, 1, 1),
    )
    found = quantize(source)
    assert found.ops()["Relu"] == 1
    assert error(found, random_batches(source, 1)[0]) < 0.05


def test_constants_beside_codes_are_stored_as_codes() -> None:
    source = model(
        "g (float[N,3,4,4] x) => (float[N,2,4,4] y) { c = Conv(x, w)  m = Mul(c, k)  y = Conv(m, v) }",
        w=normal(2, 3, 1, 1),
        v=normal(2, 2, 1, 1),
        k=np.asarray(0.5, np.float32),
    )
    found = quantize(source)
    assert found.initializers()["k_quantized"].dtype == np.uint8
    held = found.initializers()
    real = (held["k_quantized"].astype(np.float32) - held["k_zero_point"]) * held["k_scale"]
    assert real == 0.5
    assert error(found, random_batches(source, 1)[0]) < 0.05


def test_a_mask_constant_keeps_its_operator_in_float() -> None:
    source = model(
        "g (float[N,2,4,4] x) => (float[N,2,4,4] y) { c = Conv(x, w)  y = Add(c, mask) }",
        w=normal(2, 2, 1, 1),
        mask=np.float32([[0, -3.4e38, 0, 0]]),
    )
    found = quantize(source)
    assert "sentinels" in found.reason("Add_1")
    assert found.ops()["QuantizeLinear"] == 2


def test_everything_at_once_equals_the_float_model_where_scales_are_fine() -> None:
    source = model(
        """g (float[N,4,6,6] x) => (float[N,6] y) {
            c = Conv<pads=[1,1,1,1]>(x, w, b)  r = Clip(c, lo, hi)
            t = ConvTranspose<group=2, pads=[1,1,1,1]>(r, u)  a = Add(r, t)  s = Mul(a, k)
            p, q = Split<axis=1, num_outputs=2>(s)  n = Concat<axis=1>(q, p)
            g = GlobalAveragePool(n)  f = Flatten(g)  m = MatMul(f, wm)  y = Gemm<transB=1>(m, wg, bg)
        }""",
        w=normal(4, 4, 3, 3),
        b=normal(4),
        lo=np.asarray(-1, np.float32),
        hi=np.asarray(6, np.float32),
        u=normal(4, 2, 3, 3),
        k=normal(4, 1, 1),
        wm=normal(4, 5),
        wg=normal(6, 5),
        bg=normal(6),
    )
    batches = random_batches(source, 3)
    found = quantize(source, batches, **FINE)
    assert found.ops()["QuantizeLinear"] >= 9
    assert max(error(found, batch) for batch in batches) < 1e-3
