"""What every weight method promises, whatever it does inside."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from qpipe.calibrate.errors import DataError, RecipeError
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.granularity import PER_TENSOR, per_block, per_channel
from qpipe.calibrate.qarray import SMALLEST_SCALE, Spec, dequantize
from qpipe.calibrate.stats.channel_amax import ChannelAmax
from qpipe.calibrate.stats.gram import Gram
from qpipe.calibrate.weights import WEIGHT_METHODS, WeightStats, output_mse

METHODS = WEIGHT_METHODS.names()
FORMAT_NAMES = [name for name, fmt in FORMATS.items() if fmt.lowering != "scale"]


def stats_of(x):
    return WeightStats(gram=Gram.of(x), channels=ChannelAmax.of(x))


@st.composite
def specs(draw):
    fmt = FORMATS.get(draw(st.sampled_from(FORMAT_NAMES)))
    axis = draw(st.sampled_from([0, 1]))
    block = draw(st.sampled_from([2, 5]))
    granularity = draw(st.sampled_from([PER_TENSOR, per_channel(axis), per_block(axis, block)]))
    if fmt.block_size:
        granularity = per_block(axis, fmt.block_size)
    symmetric = draw(st.booleans())
    narrow = draw(st.booleans()) and symmetric and fmt.kind == "int"
    reduce_bits = draw(st.sampled_from([0, 1])) if fmt.is_integer and fmt.bits >= 4 else 0
    return Spec(
        format=fmt,
        granularity=granularity,
        symmetric=symmetric,
        narrow_range=narrow,
        reduce_bits=reduce_bits,
        float_zero=draw(st.booleans()) and not symmetric and fmt.is_integer,
    )


def check(qarray, w, spec):
    assert qarray.q.shape == w.shape
    assert qarray.q.dtype == spec.format.dtype
    scale = qarray.params.scale
    assert scale.dtype == np.float32
    assert scale.shape == spec.granularity.scale_shape(w.shape)
    assert (scale >= SMALLEST_SCALE).all()
    assert np.isfinite(scale).all()
    assert np.isfinite(dequantize(qarray)).all()
    assert qarray.params.spec == spec
    if spec.format.is_integer:
        codes = qarray.q.astype(np.int64)
        assert codes.min(initial=0 if spec.qmin <= 0 else spec.qmin) >= spec.qmin
        assert codes.max(initial=0) <= spec.qmax
    zero_point = qarray.params.zero_point
    if zero_point is None:
        assert spec.middle == 0
    else:
        assert zero_point.shape == scale.shape
        assert zero_point.dtype == spec.zero_dtype
        assert np.isfinite(zero_point.astype(np.float32)).all()
    if qarray.params.scale_codes is not None:
        assert np.array_equal(dequantize(qarray.params.scale_codes), scale)


@pytest.mark.parametrize("name", METHODS)
@settings(deadline=None, max_examples=40)
@given(
    spec=specs(),
    shape=st.tuples(st.integers(1, 7), st.integers(1, 40)),
    seed=st.integers(0, 99),
    size=st.sampled_from([0.0, 1e-30, 1e-3, 1.0, 1e3]),
)
@example(spec=Spec(format=FORMATS.get("int4"), granularity=per_block(1, 5)), shape=(3, 12), seed=0, size=1.0)
@example(spec=Spec(format=FORMATS.get("nvfp4"), granularity=per_block(1, 16)), shape=(3, 40), seed=0, size=1.0)
@example(spec=Spec(format=FORMATS.get("mxfp4"), granularity=per_block(1, 32)), shape=(3, 40), seed=0, size=1.0)
def test_codes_and_scales_are_valid(name, spec, shape, seed, size):
    rng = np.random.default_rng(seed)
    w = (rng.standard_t(3, shape) * size).astype(np.float32)
    x = rng.standard_normal((50, shape[1])).astype(np.float32)
    x[:, rng.random(shape[1]) < 0.2] = 0
    check(WEIGHT_METHODS.get(name)(w, spec, stats_of(x)), w, spec)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_zero_is_a_zero(name, symmetric):
    w = np.zeros((3, 8), np.float32)
    x = np.zeros((4, 8), np.float32)
    spec = Spec(format=FORMATS.get("uint4"), granularity=per_block(1, 4), symmetric=symmetric)
    assert not dequantize(WEIGHT_METHODS.get(name)(w, spec, stats_of(x))).any()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_float_types_count_as_their_float32(name, dtype):
    rng = np.random.default_rng(1)
    w = rng.standard_normal((6, 24)).astype(ml_dtypes.bfloat16).astype(dtype)
    stats = stats_of(rng.standard_normal((60, 24)).astype(np.float32))
    spec = Spec(format=FORMATS.get("int4"), granularity=per_block(1, 8))
    ours = WEIGHT_METHODS.get(name)(w, spec, stats)
    wide = WEIGHT_METHODS.get(name)(w.astype(np.float32), spec, stats)
    assert np.array_equal(dequantize(ours), dequantize(wide))


@pytest.mark.parametrize("name", METHODS)
def test_the_same_call_gives_the_same_bits_and_leaves_its_arguments_alone(name):
    rng = np.random.default_rng(2)
    w = rng.standard_normal((16, 48)).astype(np.float32)
    stats = stats_of(rng.standard_normal((200, 48)).astype(np.float32))
    kept = w.copy(), stats.gram.matrix.copy()
    spec = Spec(format=FORMATS.get("uint4"), granularity=per_block(1, 16), symmetric=False)
    first, second = (WEIGHT_METHODS.get(name)(w, spec, stats) for _ in range(2))
    assert np.array_equal(first.q, second.q)
    assert np.array_equal(first.params.scale, second.params.scale)
    assert np.array_equal(w, kept[0])
    assert np.array_equal(stats.gram.matrix, kept[1])


@pytest.mark.parametrize("name", METHODS)
def test_needs_are_real_fields_and_their_absence_is_an_error(name):
    method = WEIGHT_METHODS.get(name)
    assert method.needs <= set(WeightStats.__dataclass_fields__)
    w = np.ones((2, 3), np.float32)
    spec = Spec(format=FORMATS.get("int8"), granularity=per_channel(0))
    if not method.needs:
        check(method(w, spec), w, spec)
        return
    for missing in (None, WeightStats()):
        with pytest.raises(DataError, match=name):
            method(w, spec, missing)


@pytest.mark.parametrize("name", [n for n in METHODS if "gram" in WEIGHT_METHODS.get(n).needs])
@pytest.mark.parametrize("matrix", [np.eye(4), np.full((3, 3), np.nan)])
def test_a_gram_matrix_that_does_not_fit_is_an_error(name, matrix):
    spec = Spec(format=FORMATS.get("int8"), granularity=per_channel(0))
    with pytest.raises(DataError, match="Gram"):
        WEIGHT_METHODS.get(name)(np.ones((2, 3), np.float32), spec, WeightStats(gram=Gram(matrix=matrix, tokens=9)))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_an_error(name, bad):
    w = np.ones((2, 4), np.float32)
    w[1, 2] = bad
    spec = Spec(format=FORMATS.get("int8"), granularity=per_channel(0))
    with pytest.raises(ValueError, match="finite"):
        WEIGHT_METHODS.get(name)(w, spec, stats_of(np.eye(4, dtype=np.float32)))


@pytest.mark.parametrize("name", METHODS)
def test_the_docstring_has_the_four_parts(name):
    doc = type(WEIGHT_METHODS.get(name)).__doc__
    assert all(part in doc for part in ("What:", "When to use:", "Options:", "Source:"))


def test_options_are_set_by_name_and_number():
    assert WEIGHT_METHODS.resolve("gptq:0.05").damping == 0.05
    assert WEIGHT_METHODS.resolve("gptq") == WEIGHT_METHODS.get("gptq")
    for wrong in ("gptq:much", "gptq:-1", "hqq:2", "rtn:1", "rtn_mse:0", "gtpq"):
        with pytest.raises(RecipeError):
            WEIGHT_METHODS.resolve(wrong)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("granularity", [PER_TENSOR, per_channel(0)])
def test_pairs_stay_within_their_limit(name, granularity):
    rng = np.random.default_rng(3)
    spec = Spec(format=FORMATS.get("int8"), granularity=granularity, narrow_range=True, pair_limit=128)
    w = rng.standard_normal((12, 33)).astype(np.float32)
    w[:6, 4:6], w[6:, 4:6] = 3, -3  # one pair in each row, of either sign, that must give way; too few to widen scales
    stats = stats_of(rng.standard_normal((300, 33)).astype(np.float32))
    codes = WEIGHT_METHODS.get(name)(w, spec, stats).q.astype(np.int64)
    first, second = codes[:, 0:32:2], codes[:, 1:32:2]
    assert (np.abs(first + second) <= 128).all()
    assert np.abs(codes).max() > 64
    assert (np.sign(codes[:, 4]) == np.repeat([1, -1], 6)).all()


def test_output_mse_is_the_mean_squared_error_of_the_output():
    rng = np.random.default_rng(4)
    w, x = rng.standard_normal((5, 7)), rng.standard_normal((11, 7)).astype(np.float32)
    w_q = np.round(w)
    direct = np.mean(np.square(x @ w.T - x @ w_q.T))
    assert output_mse(w, w_q, Gram.of(x)) == pytest.approx(direct, rel=1e-6)


def test_scaled_statistics_are_those_of_the_scaled_input():
    rng = np.random.default_rng(5)
    x, s = rng.standard_normal((30, 6)).astype(np.float32), np.float32(2) ** np.arange(-3, 3).astype(np.float32)
    ours, direct = stats_of(x).scaled(s), stats_of(x / s)
    np.testing.assert_allclose(ours.gram.matrix, direct.gram.matrix, rtol=1e-12)
    np.testing.assert_array_equal(ours.channels.amax, direct.channels.amax)
    np.testing.assert_allclose(ours.channels.total, direct.channels.total, rtol=1e-12)
    np.testing.assert_allclose(ours.channels.energy, direct.channels.energy, rtol=1e-12)
    assert (ours.gram.tokens, ours.channels.tokens) == (30, 30)
