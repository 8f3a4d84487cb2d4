"""GPTQ: worse weights, better outputs; and step by step what the paper's algorithm does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.calibrate.errors import DataError
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.granularity import PER_TENSOR, per_block, per_channel
from qpipe.calibrate.metrics import mse
from qpipe.calibrate.qarray import QParams, Spec, dequantize, fake_quant, params_from_range, quantize
from qpipe.calibrate.stats.gram import Gram
from qpipe.calibrate.weights import WeightStats, gptq, output_mse
from qpipe.calibrate.weights.gptq import Gptq, damped, inverse_factor
from qpipe.calibrate.weights.grid import Grid
from qpipe.calibrate.weights.pairs import pair_safe
from qpipe.calibrate.weights.quantease import Quantease
from qpipe.calibrate.weights.rtn import Rtn
from qpipe.calibrate.weights.search import mse_range


def correlated(rng, tokens, channels):
    """Inputs as layers see them: some strong directions that all channels share, and noise."""
    mixing = rng.standard_normal((channels // 4, channels)) * 0.8 ** np.arange(channels // 4)[:, None]
    noise = 0.1 * rng.standard_normal((tokens, channels))
    return (rng.standard_normal((tokens, channels // 4)) @ mixing + noise).astype(np.float32)


def layer(out=48, channels=64, seed=0, tokens=2000):
    rng = np.random.default_rng(seed)
    x = correlated(rng, 2 * tokens, channels)
    w = rng.standard_normal((out, channels)).astype(np.float32)
    return w, WeightStats(gram=Gram.of(x[:tokens])), Gram.of(x[tokens:])


SPECS = {
    "int4 channel": Spec(format=FORMATS.get("int4"), granularity=per_channel(0)),
    "int4 block": Spec(format=FORMATS.get("int4"), granularity=per_block(1, 16)),
    "uint4 block asymmetric": Spec(format=FORMATS.get("uint4"), granularity=per_block(1, 16), symmetric=False),
    "int2 block": Spec(format=FORMATS.get("int2"), granularity=per_block(1, 16)),
    "uint2 channel asymmetric": Spec(format=FORMATS.get("uint2"), granularity=per_channel(0), symmetric=False),
    "int8 7 bits": Spec(format=FORMATS.get("int8"), granularity=per_channel(0), narrow_range=True, reduce_bits=1),
    "int4 tensor": Spec(format=FORMATS.get("int4"), granularity=PER_TENSOR),
    "int4 per input": Spec(format=FORMATS.get("int4"), granularity=per_channel(1)),
    "int4 blocks of outputs": Spec(format=FORMATS.get("int4"), granularity=per_block(0, 8)),
    "float4": Spec(format=FORMATS.get("float4_e2m1"), granularity=per_block(1, 16)),
    "mxfp4": Spec(format=FORMATS.get("mxfp4"), granularity=per_block(1, 32)),
    "nvfp4": Spec(format=FORMATS.get("nvfp4"), granularity=per_block(1, 16)),
    "nf4": Spec(format=FORMATS.get("nf4"), granularity=per_block(1, 16)),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("act_order", [True, False])
def test_weights_get_worse_and_outputs_at_least_twice_as_good(spec, act_order):
    w, stats, held_out = layer()
    ours = Gptq(act_order=act_order)(w, spec, stats)
    rounded = dequantize(Rtn()(w, spec))
    nearest = fake_quant(w, ours.params)
    assert mse(w, dequantize(ours)) > 1.2 * mse(w, nearest)
    for gram in (stats.gram, held_out):
        assert output_mse(w, dequantize(ours), gram) <= 0.5 * output_mse(w, rounded, gram)
        assert output_mse(w, dequantize(ours), gram) <= 0.5 * output_mse(w, nearest, gram)


def naive(w, spec, gram, damping, late):
    """Algorithm 1 of the paper without batches: after every column, every later column of every row is updated.

    Args:
        late: Choose the scale of a block when its first column comes, from the columns as they are then.
    """
    hessian = damped(gram, damping)
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    importance = 1 / np.diag(factor) ** 2
    live, size = w.astype(np.float64), spec.granularity.block_size or w.shape[1]
    by_row = Spec(format=spec.format, granularity=per_channel(0), symmetric=spec.symmetric)
    values, scales = np.zeros(w.shape, np.float32), []
    for k in range(w.shape[1]):
        block = slice(k - k % size, k - k % size + size)
        if k % size == 0:
            source = live if late else w
            columns = source[:, block].astype(np.float32)
            params = params_from_range(mse_range(columns, by_row, importance[block]), by_row)
            scales.append(params.scale)
        values[:, k : k + 1] = fake_quant(live[:, k : k + 1], params)
        error = (live[:, k] - values[:, k]) / factor[k, k]
        live[:, k + 1 :] -= np.outer(error, factor[k, k + 1 :])
    return values, np.concatenate(scales, axis=1)


@pytest.mark.parametrize("channels", [1, 2, 31, 64, 100])
@pytest.mark.parametrize("block", [0, 1, 8, 24, 64])
@pytest.mark.parametrize("fmt", ["int4", "uint2"])
def test_halving_does_what_column_by_column_does(channels, block, fmt):
    """Blocks of any size read the updated columns, wherever the halves fall."""
    w, stats, _ = layer(channels=max(channels, 4))
    w, matrix = w[:, :channels], stats.gram.matrix[:channels, :channels]
    gram = Gram(matrix=matrix, tokens=stats.gram.tokens)
    granularity = per_block(1, block) if block else per_channel(0)
    spec = Spec(format=FORMATS.get(fmt), granularity=granularity, symmetric=fmt == "int4")
    ours = Gptq(act_order=False)(w, spec, WeightStats(gram=gram))
    values, scale = naive(w, spec, gram, 0.05, late=True)
    np.testing.assert_allclose(ours.params.scale, scale, rtol=1e-5)
    assert np.isclose(dequantize(ours), values, rtol=1e-4, atol=1e-6).mean() > 0.999


def test_blocks_read_updated_columns_not_the_original_ones():
    w, stats, _ = layer()
    spec = SPECS["int4 block"]
    ours = Gptq(act_order=False)(w, spec, stats)
    early = params_from_range(mse_range(w, spec, 1 / np.diag(inverse_factor(damped(stats.gram, 0.05))) ** 2), spec)
    np.testing.assert_array_equal(ours.params.scale[:, 0], early.scale[:, 0])
    assert not np.isclose(ours.params.scale[:, 1:], early.scale[:, 1:]).all(axis=1).any()


def test_how_channels_are_scaled_does_not_matter():
    """With a scale per input the codes of w s and x / s are those of w and x, damping included."""
    w, stats, _ = layer()
    s = 2.0 ** np.random.default_rng(9).integers(-5, 6, 64).astype(np.float32)
    spec = SPECS["int4 per input"]
    ours, scaled = (Gptq(act_order=False)(w * by, spec, stats.scaled(by)) for by in (np.ones(64, np.float32), s))
    assert (ours.q == scaled.q).mean() > 0.999
    np.testing.assert_allclose(scaled.params.scale, ours.params.scale * s, rtol=1e-6)


def test_act_order_is_the_natural_order_of_the_sorted_layer():
    """Sorting the channels of the layer by energy and solving without act_order gives the same codes, sorted."""
    w, stats, _ = layer()
    spec = SPECS["int4 channel"]
    order = np.argsort(-np.diag(stats.gram.matrix), kind="stable")
    sorted_gram = Gram(matrix=stats.gram.matrix[np.ix_(order, order)], tokens=stats.gram.tokens)
    plain = Gptq(act_order=False)(w[:, order], spec, WeightStats(gram=sorted_gram))
    ours = Gptq(act_order=True)(w, spec, stats)
    assert (ours.q[:, order] == plain.q).mean() > 0.999
    np.testing.assert_allclose(ours.params.scale, plain.params.scale, rtol=1e-6)


def test_act_order_keeps_blocks_where_onnx_expects_them():
    """Codes and scales belong together in the layer's own order: rounding again on that grid changes nothing."""
    w, stats, _ = layer()
    ours = Gptq()(w, SPECS["uint4 block asymmetric"], stats)
    np.testing.assert_array_equal(quantize(dequantize(ours), ours.params).q, ours.q)
    assert output_mse(w, dequantize(ours), stats.gram) < 0.5 * output_mse(w, fake_quant(w, ours.params), stats.gram)


def test_act_order_helps_when_energy_is_unequal():
    rng = np.random.default_rng(7)
    x = correlated(rng, 4000, 64) * np.geomspace(0.1, 10, 64).astype(np.float32)
    w = rng.standard_normal((64, 64)).astype(np.float32)
    stats, spec = WeightStats(gram=Gram.of(x)), SPECS["int4 channel"]
    errors = [output_mse(w, dequantize(Gptq(act_order=a)(w, spec, stats)), stats.gram) for a in (True, False)]
    assert errors[0] < 0.9 * errors[1]


def test_uncorrelated_inputs_leave_nothing_to_make_up_for():
    w = np.random.default_rng(8).standard_normal((16, 32)).astype(np.float32)
    stats, spec = WeightStats(gram=Gram(matrix=np.eye(32), tokens=1)), SPECS["int4 block"]
    np.testing.assert_array_equal(Gptq()(w, spec, stats).q, quantize(w, Gptq()(w, spec, stats).params).q)


def test_dead_inputs_are_rounded_to_nearest_and_disturb_nobody():
    w, stats, _ = layer()
    dead = np.zeros(64, bool)
    dead[[3, 17, 40]] = True
    matrix = np.where(dead | dead[:, None], 0, stats.gram.matrix)
    spec = SPECS["int4 per input"]
    ours = Gptq()(w, spec, WeightStats(gram=Gram(matrix=matrix, tokens=2000)))
    np.testing.assert_array_equal(ours.q[:, dead], quantize(w, ours.params).q[:, dead])
    alone = Gptq()(w[:, ~dead], spec, WeightStats(gram=Gram(matrix=matrix[~dead][:, ~dead], tokens=2000)))
    assert (ours.q[:, ~dead] == alone.q).mean() > 0.999


def test_no_data_at_all_is_rounding():
    w, _, _ = layer()
    ours = Gptq()(w, SPECS["int4 block"], WeightStats(gram=Gram(matrix=np.zeros((64, 64)), tokens=0)))
    np.testing.assert_array_equal(ours.q, quantize(w, ours.params).q)


def test_a_singular_gram_matrix_without_damping_says_what_to_do():
    w, _, _ = layer()
    stats = WeightStats(gram=Gram.of(np.ones((5, 64), np.float32)))
    with pytest.raises(DataError, match=r"gptq:0\.1"):
        Gptq(damping=0)(w, SPECS["int4 block"], stats)
    assert np.isfinite(dequantize(Gptq(damping=0.01)(w, SPECS["int4 block"], stats))).all()


def test_rows_do_not_depend_on_each_other(monkeypatch):
    w, stats, _ = layer(out=10)
    for act_order in (True, False):
        whole = Gptq(act_order=act_order)(w, SPECS["uint4 block asymmetric"], stats)
        monkeypatch.setattr(gptq, "_CHUNK", 64 * 3)  # three rows at once, the last chunk one row
        chunked = Gptq(act_order=act_order)(w, SPECS["uint4 block asymmetric"], stats)
        monkeypatch.undo()
        assert (whole.q == chunked.q).mean() > 0.999
        np.testing.assert_allclose(whole.params.scale, chunked.params.scale, rtol=1e-5)


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 150), seed=st.integers(0, 99))
def test_the_factor_is_that_of_the_inverse(n, seed):
    x = np.random.default_rng(seed).standard_normal((2 * n + 3, n)).astype(np.float32)
    hessian = damped(Gram.of(x), 0.01)
    factor = inverse_factor(hessian)
    np.testing.assert_array_equal(factor, np.triu(factor))
    np.testing.assert_allclose(factor.T @ factor @ hessian, np.eye(n), atol=1e-9)


def test_the_room_for_a_code_is_what_its_neighbour_left():
    spec = Spec(format=FORMATS.get("int8"), granularity=PER_TENSOR, pair_limit=128)
    params = QParams(scale=np.float32([0.5]).reshape(()), zero_point=None, spec=spec)
    grid = Grid.of(params, (6, 2), slice(None), np.arange(2))
    neighbour = np.float32([100, 100, -100, -100, 0, 60]) * np.float32(0.5)
    wanted = np.float32([90, -90, 90, -90, 120, 68]) * np.float32(0.5)
    assert (grid.round(1, wanted, neighbour) / 0.5).tolist() == [28, -90, 90, -28, 120, 68]
    assert (grid.round(1, wanted) / 0.5).tolist() == [90, -90, 90, -90, 120, 68]


@pytest.mark.parametrize("method", [Gptq(), Gptq(act_order=False), Quantease()])
def test_making_up_for_errors_never_breaks_the_pair_limit(method, monkeypatch):
    """Errors that later columns take over push pairs past the limit which the scale alone would have kept."""
    w, stats, _ = layer(out=300)
    spec = Spec(format=FORMATS.get("int8"), granularity=per_channel(0), narrow_range=True, pair_limit=128)

    def most():
        codes = method(w, spec, stats).q.astype(np.int64)
        return np.abs(codes[:, ::2] + codes[:, 1::2]).max()

    assert most() <= 128
    free = Grid.round
    monkeypatch.setattr(Grid, "round", lambda self, k, column, neighbour=None: free(self, k, column))
    assert most() > 128


def test_pair_limit_costs_little_because_other_columns_make_up_for_it():
    w, stats, _ = layer()
    spec = Spec(format=FORMATS.get("int8"), granularity=per_channel(0), narrow_range=True, pair_limit=128)
    nearest = output_mse(w, dequantize(pair_safe(w, spec)), stats.gram)
    assert output_mse(w, dequantize(Gptq()(w, spec, stats)), stats.gram) < 0.5 * nearest
