"""The CPU kernel against the numpy reference: integer sums bit for bit, outputs within float32 rounding."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper
from outlier_models import BFLOAT16, TYPES, Case, open_session, random_case, run, tensor
from qpipe import plugins
from qpipe.plugins.outlier_matmul.op import MAX_NEW_OUTLIERS, Packed, pack, padded, quantize_rows

pytestmark = pytest.mark.usefixtures("plugin_library")
LANES = ("scalar", "avx2", "emulated-vnni", "avxvnni", "avx512vnni", "amx")
DTYPES = list(TYPES)
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=LANES)
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param not in plugins.info()["lanes"]:
        pytest.skip(f"this CPU has no lane {request.param}")
    monkeypatch.setenv("QPIPE_LANE", request.param)
    return request.param


def assert_close(case: Case, got: np.ndarray) -> None:
    exact, bound = case.bounds()
    assert got.shape == exact.shape
    assert got.dtype == case.x.dtype
    excess = np.abs(got.astype(np.float64) - exact) / bound
    assert excess.max(initial=0) <= 1


def integers(w_q: np.ndarray, index: list[int] = (), dtype: np.dtype = np.float32) -> Packed:
    """Codes with scale 1: with rows whose scale is 1 too, y is the integer sum itself."""
    outputs, inputs = w_q.shape
    full = np.zeros((outputs, padded(inputs)), np.int8)
    full[:, :inputs] = w_q
    full[:, list(index)] = 0
    return Packed(
        w_q=full,
        w_scale=np.ones(outputs, np.float32),
        outlier_index=np.array(index, np.int32),
        w_outlier=np.zeros((outputs, padded(len(index))), dtype),
    )


@QUICK
@given(
    seed=st.integers(0, 2**32 - 1),
    lead=st.lists(st.integers(0, 4), min_size=0, max_size=4),
    inputs=st.integers(1, 150),
    outputs=st.integers(1, 90),
    share=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    threads=st.sampled_from([1, 2]),
)
def test_outputs_match_the_reference(lane, seed, lead, inputs, outputs, share, dtype, bias, threads) -> None:
    case = random_case(seed, (*lead, inputs), outputs, int(share * inputs), dtype, bias=bias)
    got, new_outliers = run(open_session(case.model(), threads=threads), case.x)
    assert_close(case, got)
    assert new_outliers == 0


@QUICK
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.sampled_from([1, 2, 3, 4, 5, 7, 23, 24, 25, 31, 64, 70]),
    inputs=st.integers(1, 1100),
    outputs=st.integers(1, 80),
    spread=st.sampled_from(["extreme", "even", "normal"]),
)
def test_integer_sums_are_exact(lane, seed, rows, inputs, outputs, spread) -> None:
    """Whether pairs of weights can overflow 16 bits in every order of the inputs, in some, or in hardly any."""
    rng = np.random.default_rng(seed)
    choices = np.array([-127, 127]) if spread == "extreme" else np.arange(-127, 128)
    share = np.exp(-((choices / 40) ** 2) / 2) if spread == "normal" else np.ones(choices.size)
    w_q = rng.choice(choices, (outputs, inputs), p=share / share.sum()).astype(np.int8)
    x = rng.choice(choices, (rows, inputs)).astype(np.float32)
    x[:, rng.integers(inputs)] = 127  # the row's scale is exactly 1
    case = Case(x=x, packed=integers(w_q))
    got, _ = run(open_session(case.model()), x)
    exact = x.astype(np.int64) @ w_q.T.astype(np.int64)
    np.testing.assert_array_equal(got, exact.astype(np.float32))


def test_rows_beyond_a_block_are_exact(lane) -> None:
    """More rows than are quantized at a time; some of them with new outliers, in more than one block."""
    rng = np.random.default_rng(12)
    w_q = rng.integers(-127, 128, (20, 1000)).astype(np.int8)
    x = rng.integers(-127, 128, (1100, 1000)).astype(np.float32)
    x[:, 0] = 127
    x[::77, 1] = 9_000
    case = Case(x=x, packed=integers(w_q), limit=127.0)
    got, new_outliers = run(open_session(case.model(), threads=2), x)
    exact = x.astype(np.int64) @ w_q.T.astype(np.int64)
    np.testing.assert_array_equal(got, exact.astype(np.float32))
    assert new_outliers == np.count_nonzero(x == 9_000)


@pytest.mark.parametrize("rows", [3, 40])
def test_sums_beyond_24_bits_are_exact_until_they_become_float(lane, rows) -> None:
    inputs = 20_016
    w_q = np.full((5, inputs), 127, np.int8)
    w_q[:, ::7] = -126
    x = np.full((rows, inputs), 127, np.float32)
    got, _ = run(open_session(Case(x=x, packed=integers(w_q)).model()), x)
    exact = x.astype(np.int64) @ w_q.T.astype(np.int64)
    assert exact.min() > 2**24
    np.testing.assert_array_equal(got, exact.astype(np.float32))


@pytest.mark.parametrize("rows", [1, 2, 9, 40])
@pytest.mark.parametrize("inputs", [16, 64, 83])
@pytest.mark.parametrize("first", [0, 1, 15])
def test_any_number_of_columns_may_be_outliers(lane, rows, inputs, first) -> None:
    """All of them, too: the integer product then is empty."""
    case = random_case(rows, (rows, inputs), 37, 0, np.dtype(np.float32))
    w = np.random.default_rng(inputs).standard_normal((37, inputs)).astype(np.float32)
    case.packed = pack(w, np.arange(first, inputs), np.float32)
    assert_close(case, run(open_session(case.model()), case.x)[0])


def test_outlier_columns_may_come_in_any_order(lane) -> None:
    """The contract wants them ascending; a file that does not keep to it must not make the kernel read elsewhere."""
    case = random_case(11, (9, 80), 20, 4, np.dtype(np.float32))
    expected = run(open_session(case.model()), case.x)[0]
    order = [2, 0, 3, 1]
    case.packed.outlier_index[:] = case.packed.outlier_index[order]
    case.packed.w_outlier[:, :4] = case.packed.w_outlier[:, order]
    np.testing.assert_allclose(run(open_session(case.model()), case.x)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [5, 33])
@pytest.mark.parametrize("magnitude", [1e-38, 1e-20, 1.0, 1e30])
def test_codes_and_scales_are_exact(lane, rows, magnitude) -> None:
    """A weight that is the identity hands out the codes, times the row's scale."""
    rng = np.random.default_rng(rows)
    x = (rng.standard_normal((rows, 96)) * magnitude).astype(np.float32)
    x[0, :8] = np.arange(8) + 0.5
    x[0, 8] = 127  # scale 1: the halves before are ties
    x[1] = 0
    case = Case(x=x, packed=integers(np.eye(96, dtype=np.int8), [4, 50]))
    codes = quantize_rows(x, case.packed.outlier_index)
    got, _ = run(open_session(case.model()), x)
    with np.errstate(over="ignore"):
        expected = codes.codes.astype(np.float32) * codes.scale[:, None]
    np.testing.assert_array_equal(got, expected)


@QUICK
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.sampled_from([1, 3, 8, 40]),
    inputs=st.integers(70, 400),
    loud=st.lists(st.integers(0, 80), min_size=1, max_size=4),
)
def test_new_outliers_get_two_digits_exactly(lane, seed, rows, inputs, loud) -> None:
    rng = np.random.default_rng(seed)
    w_q = rng.integers(-127, 128, (9, inputs)).astype(np.int8)
    x = rng.integers(-127, 128, (rows, inputs)).astype(np.float32)
    quiet, index = rng.integers(inputs), rng.integers(inputs)
    for row, count in enumerate(loud[:rows]):
        x[row, rng.permutation(inputs)[:count]] = rng.choice([-1, 1], min(count, inputs)) * rng.integers(128, 16320)
    x[:, quiet] = 127
    case = Case(x=x, packed=integers(w_q, [int(index)]), limit=127.0)
    case.packed.w_outlier[:] = 0
    got, new_outliers = run(open_session(case.model()), x)
    expected, count = case.expected()
    assert new_outliers == count
    assert_close(case, got)
    few = (np.abs(np.delete(x, index, axis=1)) > 127).sum(axis=1) <= MAX_NEW_OUTLIERS
    if quiet != index:  # scale 1 on rows without, or with few, new outliers
        np.testing.assert_array_equal(got[few], expected[few])


def test_new_outliers_do_not_coarsen_their_row(lane) -> None:
    case = random_case(0, (6, 256), 32, 3, np.dtype(np.float32), bias=False, limit=5.0)
    regular = np.setdiff1d(np.arange(256), case.packed.outlier_index)
    case.x[2, regular[10]] = 300.0
    exact = case.x.astype(np.float64) @ unpacked(case.packed, 256).T
    with_limit, met = run(open_session(case.model()), case.x)
    case.limit = 0.0
    without, _ = run(open_session(case.model()), case.x)
    assert met >= 1
    error_with, error_without = (np.abs(y[2] - exact[2]).mean() for y in (with_limit, without))
    assert error_with < error_without / 10


def unpacked(packed: Packed, inputs: int) -> np.ndarray:
    w = packed.w_q[:, :inputs].astype(np.float64) * packed.w_scale[:, None]
    w[:, packed.outlier_index] = packed.w_outlier[:, : packed.outlier_index.size]
    return w


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: d.name)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [4, 30])
def test_non_finite_rows(lane, dtype, value, rows) -> None:
    case = random_case(1, (rows, 80), 20, 4, dtype, limit=3.0)
    regular = np.setdiff1d(np.arange(80), case.packed.outlier_index)
    case.x[1, regular[5]] = value
    case.x[2, case.packed.outlier_index[0]] = value
    got, _ = run(open_session(case.model()), case.x)
    assert np.isnan(got[1].astype(np.float32)).all()
    assert not np.isfinite(got[2].astype(np.float32)).any()
    expected, _ = case.expected()
    np.testing.assert_array_equal(got[2].astype(np.float32), expected[2].astype(np.float32))
    others = np.delete(np.arange(rows), [1, 2])
    assert np.isfinite(got[others].astype(np.float32)).all()


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=lambda d: d.name)
def test_every_16_bit_value_converts_exactly(lane, dtype) -> None:
    """All 65,536 values through an outlier column of weight 1."""
    every = np.arange(65536, dtype=np.uint16).view(dtype)
    x = every.reshape(-1, 1)
    case = Case(x=x, packed=integers(np.zeros((1, 1), np.int8), [0], dtype))
    case.packed.w_outlier[0, 0] = 1
    got = run(open_session(case.model()), x)[0].astype(np.float32).reshape(-1)
    np.testing.assert_array_equal(got, every.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=lambda d: d.name)
def test_results_round_half_to_even(lane, dtype) -> None:
    rng = np.random.default_rng(2)
    upper = rng.integers(0, 65536, 4000).astype(np.uint32) << 16
    bits = np.concatenate([upper | 0x8000, upper | 0x7FFF, upper | 0x8001, upper | 0x1000, upper | 0x3000])
    bias = bits.astype(np.uint32).view(np.float32)
    bias = np.concatenate([bias[~np.isnan(bias)], np.float32([65519.99, 65520, 65536, 2**-25, 2**-24, 3e-8, 3.4e38])])
    packed = integers(np.zeros((bias.size, 16), np.int8), dtype=dtype)
    case = Case(x=np.zeros((1, 16), dtype), packed=packed, bias=bias)
    got = run(open_session(case.model()), case.x)[0].astype(np.float32).reshape(-1)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(got, bias.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("rows", [1, 6, 100])
def test_threads_change_nothing(rows) -> None:
    case = random_case(3, (rows, 700), 333, 9, np.dtype(np.float32), limit=3.0)
    one, four = (run(open_session(case.model(), threads=threads), case.x) for threads in (1, 4))
    np.testing.assert_array_equal(one[0], four[0])
    assert one[1] == four[1] > 0


def test_concurrent_runs_of_one_session() -> None:
    case = random_case(4, (30, 200), 150, 6, np.dtype(np.float32), limit=3.0)
    session = open_session(case.model(), threads=2)
    inputs = [random_case(seed, (1 + seed % 37, 200), 1, 0, np.dtype(np.float32)).x for seed in range(40)]
    expected = [run(session, x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for (y, met), (alone, alone_met) in zip(pool.map(lambda x: run(session, x), inputs), expected, strict=True):
            np.testing.assert_array_equal(y, alone)
            assert met == alone_met


@pytest.mark.parametrize("rows", [2, 40])
def test_weights_may_be_computed(lane, rows) -> None:
    """Weights that are no constants: read anew in every run."""
    case = random_case(5, (rows, 60), 21, 3, np.dtype(np.float32))
    model = case.model()
    kinds = {"w_q": onnx.TensorProto.INT8, "outlier_index": onnx.TensorProto.INT32}
    feeds = {"x": case.x, **case.packed.inputs(), "bias": case.bias}
    for name, value in feeds.items():
        if name != "x":
            kind = kinds.get(name, onnx.TensorProto.FLOAT)
            model.graph.input.append(helper.make_tensor_value_info(name, kind, value.shape))
    del model.graph.initializer[:]
    assert_close(case, open_session(model).run(["y"], feeds)[0])


def test_symbolic_shapes_come_out() -> None:
    model = random_case(6, (2, 3, 40), 24, 2, np.dtype(np.float16)).model()
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert open_session(model).get_outputs()[0].shape == ["d0", "d1", 24]


def test_half_precision_among_float_neighbours() -> None:
    case = random_case(7, (4, 64), 16, 2, np.dtype(np.float16), bias=False)
    model = case.model()
    nodes = model.graph.node
    nodes[0].input[0], nodes[0].output[0] = "half", "wide"
    nodes.insert(0, helper.make_node("Cast", ["x"], ["half"], to=onnx.TensorProto.FLOAT16))
    nodes.append(helper.make_node("Cast", ["wide"], ["y"], to=onnx.TensorProto.FLOAT))
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    got = open_session(model).run(["y"], {"x": case.x.astype(np.float32)})[0]
    assert_close(case, got.astype(np.float16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_scale": np.ones(3, np.float32)}, "w_scale"),
        ({"w_q": np.zeros((20, 96), np.int8)}, "w_q has 96, expected 80"),
        ({"w_outlier": np.zeros((20, 32), np.float32)}, "w_outlier has 32 columns"),
        ({"outlier_index": np.array([1, 2, 80], np.int32)}, "outlier_index holds 80"),
        ({"outlier_index": np.array([-1, 2, 3], np.int32)}, "outlier_index holds -1"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change, message) -> None:
    case = random_case(8, (4, 80), 20, 3, np.dtype(np.float32))
    model = case.model()
    for initializer in model.graph.initializer:
        if initializer.name in change:
            initializer.CopyFrom(tensor(change[initializer.name], initializer.name))
    with pytest.raises(Exception, match=message):
        run(open_session(model), case.x)


@pytest.mark.parametrize(("name", "value"), [("limit", -1.0), ("limit", float("nan")), ("padding", 8)])
def test_attributes_that_make_no_sense_are_refused(name, value) -> None:
    model = random_case(9, (4, 80), 20, 3, np.dtype(np.float32)).model()
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.append(helper.make_attribute(name, value))
    with pytest.raises(Exception, match=f"{name} is"):
        open_session(model)


def test_a_lane_that_is_not_there_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("QPIPE_LANE", "abacus")
    with pytest.raises(Exception, match="QPIPE_LANE=abacus"):
        open_session(random_case(10, (4, 80), 20, 3, np.dtype(np.float32)).model())
