"""Collecting: what is counted, what is refused, and that neither batches, order nor processes change the result."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser
from qpipe.calibrate.errors import DataError, ModelError, UsageError, WriteError
from qpipe.calibrate.stats.channel_amax import ChannelAmax
from qpipe.calibrate.stats.gram import Gram
from qpipe.calibrate.stats.histogram import Histogram
from qpipe.calibrate.stats.tokens import Window, as_tokens
from qpipe.pipeline.calibration import load, native, probe, save
from qpipe.pipeline.calibration.observe import Detail
from qpipe.pipeline.graph import from_proto
from qpipe.pipeline.graph import load as load_model
from qpipe.pipeline.graph import save as save_model
from qpipe.pipeline.graph.constants import FileValues
from qpipe.pipeline.stages.collect import Checkpoints, CollectOptions, collect

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((4, 4)).astype(np.float32)

CHAIN = """
<ir_version: 8, opset_import: ["": 17]>
chain (float[N, T, 4] x) => (float[N, T, 4] y)
{
    a = MatMul (x, w)
    b = Relu (a)
    y = Mul (b, b)
}
"""


@pytest.fixture(autouse=True, params=["native", "numpy"])
def counting(request, monkeypatch) -> str:
    """Count inside the graph, and by numpy: everything below holds of both."""
    if request.param == "numpy":
        monkeypatch.setattr(native, "usable", lambda device: False)
    elif not native.usable("cpu"):
        pytest.skip("the plugin library is not built")
    return request.param


def chain() -> onnx.ModelProto:
    """Return a small model with free batch and length."""
    model = parser.parse_model(CHAIN)
    model.graph.initializer.append(onnx.numpy_helper.from_array(WEIGHT, "w"))
    return model


def activations(x: np.ndarray) -> dict[str, np.ndarray]:
    """Return what the chain computes, element by element as ONNX Runtime does."""
    import onnxruntime

    model = chain()
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in "ab")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return {"x": x, **dict(zip("yab", session.run(["y", "a", "b"], {"x": x}), strict=True))}


def data(*shape: int) -> np.ndarray:
    """Return small whole numbers: sums of their products are exact in any order."""
    return np.random.default_rng(sum(shape)).integers(-3, 4, (*shape, 4)).astype(np.float32)


def test_counts_inputs_inner_tensors_and_outputs():
    x = data(6, 5)
    found = collect(chain(), ["y", "b", "x", "a"], [{"x": x}])
    assert list(found.tensors) == ["x", "a", "b", "y"]
    for name, values in activations(x).items():
        assert found.tensors[name].histogram == Histogram.of(values)
    assert found.samples == 6
    assert found.not_covered == {}
    assert found.versions["onnxruntime"]
    assert len(found.model.hash) == 64


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.randoms())
def test_any_batches_in_any_order_give_the_same_histograms(sizes, random):
    model = parser.parse_model(CHAIN)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.rint(WEIGHT * 2), "w"))
    x = data(sum(sizes), 3)
    parts = np.split(x, np.cumsum(sizes)[:-1])
    random.shuffle(parts)
    whole = collect(model, ["x", "a", "b", "y"], [{"x": x}])
    split = collect(model, ["x", "a", "b", "y"], [{"x": part} for part in parts])
    assert {n: s.histogram for n, s in whole.tensors.items()} == {n: s.histogram for n, s in split.tensors.items()}
    assert whole.samples == split.samples


def test_ragged_lengths_are_fine():
    batches = [{"x": data(n, t)} for n, t in [(2, 3), (1, 7), (5, 1)]]
    found = collect(chain(), ["a"], batches)
    assert found.samples == 8
    assert found.tensors["a"].histogram.total == 4 * (6 + 7 + 5)


def test_batches_without_elements_are_skipped_and_counted():
    batches = [{"x": data(0, 3)}, {"x": data(2, 3)}, {"x": data(2, 0)}]
    found = collect(chain(), ["a"], batches)
    assert (found.samples, found.skipped) == (2, 2)


def test_no_data_is_an_error_that_says_why():
    with pytest.raises(DataError, match="no samples") as caught:
        collect(chain(), ["a"], iter([]))
    assert "fresh" in caught.value.do
    with pytest.raises(DataError, match="2 batches without elements"):
        collect(chain(), ["a"], [{"x": data(0, 3)}] * 2)


def test_a_batch_that_does_not_fit_is_a_data_error():
    with pytest.raises(DataError, match="does not fit"):
        collect(chain(), ["a"], [{"x": data(2, 3)[0]}])


def test_channels_and_gram_of_a_matmul_input():
    x, other = data(3, 5), data(2, 2)
    options = CollectOptions(details={"x": Detail(gram=True), "a": Detail()})
    found = collect(chain(), ["x", "a", "b"], [{"x": x}, {"x": other}], options)
    tokens = as_tokens(np.concatenate([x.reshape(-1, 4), other.reshape(-1, 4)]))
    assert np.array_equal(found.tensors["x"].gram.matrix, Gram.of(tokens).matrix)
    assert found.tensors["x"].gram.tokens == 19
    assert np.array_equal(found.tensors["x"].channels.total, ChannelAmax.of(tokens).total)
    assert found.tensors["a"].gram is None
    assert found.tensors["a"].channels.tokens == 19
    assert found.tensors["b"].channels is None


def test_patches_of_a_convolution_input():
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[N, 2, 5, 5] x) => (float[N, 3, H, W] y)
        { r = Relu (x)  y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r, w) }
    """)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((3, 2, 3, 3), np.float32), "w"))
    window = Window(kernel_shape=(3, 3), strides=(1, 1), dilations=(1, 1), pads=(1, 1, 1, 1))
    x = RNG.integers(-3, 4, (2, 2, 5, 5)).astype(np.float32)
    found = collect(model, ["r"], [{"x": x}], CollectOptions(details={"r": Detail(window=window, gram=True)}))
    tokens = as_tokens(np.maximum(x, 0), window=window)
    assert tokens.shape == (50, 18)
    assert np.array_equal(found.tensors["r"].gram.matrix, Gram.of(tokens).matrix)


def test_activations_are_let_go_batch_by_batch():
    seen: list[weakref.ref] = []

    def batches():
        for index in range(6):
            gc.collect()
            assert sum(ref() is not None for ref in seen) <= 1
            x = data(2, 3 + index)
            seen.append(weakref.ref(x))
            yield {"x": x}
            del x

    collect(chain(), ["x", "a"], batches())
    assert len(seen) == 6


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(bad):
    def spoiled(share: int) -> dict[str, np.ndarray]:
        x = data(50, 20)
        x.reshape(-1)[::share] = bad
        return {"x": x}

    said: list[str] = []
    model = chain()
    del model.graph.output[:]
    model.graph.node.add(op_type="Shape", input=["a"], output=["n"])
    model.graph.output.append(onnx.helper.make_tensor_value_info("n", onnx.TensorProto.INT64, [3]))
    found = collect(model, ["x"], [spoiled(3000)], CollectOptions(warn=said.append))
    histogram = found.tensors["x"].histogram
    assert (histogram.nonfinite, histogram.amax) == (2, 3.0)
    assert len(said) == 1
    assert "'x'" in said[0]
    with pytest.raises(DataError, match="'x' is not finite") as caught:
        collect(model, ["x", "b"], [spoiled(300)])
    assert caught.value.exit_code == 4
    assert "--allow-nonfinite" in caught.value.do
    allowed = collect(model, ["x"], [spoiled(300)], CollectOptions(allow_nonfinite=True))
    assert allowed.tensors["x"].histogram.nonfinite == 14


def masked_attention(mask: str) -> onnx.ModelProto:
    """Scores with a mask of the model's own, as exporters write them."""
    text = f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N,4] x, bool[4] keep) => (float[N,4] y)
        {{ {mask}  s = Add (x, m)  r = Reshape (s, shape)  y = Softmax (r) }}"""
    model = parser.parse_model(text)
    arrays = {"low": np.float32(-np.inf), "zero": np.float32(0), "shape": np.array([-1, 4])}
    used = {name: array for name, array in arrays.items() if name in mask or name == "shape"}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in used.items())
    return model


@pytest.mark.parametrize(
    "mask",
    [
        "m = Where (keep, zero, low)",
        "c = Constant <value_float = -inf> ()  m = Where (keep, zero, c)",
        "c = Constant <value = float {inf}> ()  n = Neg (c)  m = Where (keep, zero, n)",
    ],
)
def test_infinities_that_the_model_brings_along_are_masks(mask: str) -> None:
    batch = {"x": data(1, 4)[0], "keep": np.array([True, False, True, False])}
    found = collect(masked_attention(mask), ["m", "s", "r"], [batch])
    assert found.tensors["r"].histogram.extrema.neg_inf == batch["x"].size // 2
    spoiled = {**batch, "x": np.full_like(batch["x"], -np.inf)}
    spoiled["x"][:, 0] = 0
    with pytest.raises(DataError, match="'x' is not finite"):
        collect(masked_attention(mask), ["x", "m"], [spoiled])
    spoiled["x"][:, 1] = np.nan
    with pytest.raises(DataError, match="is not finite"):
        collect(masked_attention(mask), ["s"], [spoiled])


@pytest.mark.parametrize("asks", [True, False])
def test_rows_that_are_masked_as_a_whole_are_nan_where_the_model_reckons_with_it(asks: bool) -> None:
    rest = "n = IsNaN (p)  y = Where (n, zero, p)" if asks else "y = Where (keep, zero, p)"
    model = parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N,4] x, bool[N,4] keep) => (float[N,4] y)
        {{ m = Where (keep, zero, low)  s = Add (x, m)  p = Softmax (s)  {rest} }}""")
    arrays = {"low": np.float32(-np.inf), "zero": np.float32(0)}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    batch = {"x": data(1, 4)[0], "keep": np.ones((4, 4), bool)}
    batch["keep"][1] = False
    options = CollectOptions(allow_nonfinite=False)
    if asks:
        assert collect(model, ["p"], [batch], options).tensors["p"].histogram.extrema.nan == 4
    else:
        model.graph.output[0].name = "z"
        model.graph.node.add(op_type="IsInf", input=["y"], output=["z"])
        model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.BOOL
        with pytest.raises(DataError, match="'p' is not finite"):
            collect(model, ["p"], [batch], options)


def test_an_input_without_elements_is_no_empty_batch():
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[N,S,4] cache, float[N,1,4] x) => (float[N,T,4] y) { y = Concat <axis = 1> (cache, x) }
    """)
    first = {"cache": np.zeros((2, 0, 4), np.float32), "x": data(2, 1)[:, :, :4]}
    found = collect(model, ["x", "y"], [first])
    assert (found.samples, found.skipped) == (2, 0)
    with pytest.raises(DataError, match="no samples"):
        collect(model, ["x", "y"], [{name: array[:0] for name, array in first.items()}])


def test_values_that_are_no_arrays():
    with pytest.raises(DataError, match="no array"):
        collect(chain(), ["a"], [{"x": [data(2, 3), data(2, 4)]}])


def test_an_output_that_is_not_finite_is_refused_at_once():
    x = data(1, 500)
    x[0, 0, 0] = np.nan
    batches = iter([{"x": x}, *({"x": data(1, 2)} for _ in range(20))])
    with pytest.raises(DataError, match="output 'y' is not finite"):
        collect(chain(), ["a"], batches)
    assert next(batches) is not None
    assert collect(chain(), ["a"], [{"x": x}], CollectOptions(allow_nonfinite=True)).samples == 1


def test_mask_sentinels_are_reported_and_never_in_a_range():
    x = data(2, 3)
    x[0, 0, 0] = np.finfo(np.float32).min
    said: list[str] = []
    found = collect(chain(), ["x"], [{"x": x}], CollectOptions(allow_nonfinite=True, warn=said.append))
    assert found.tensors["x"].histogram.sentinel == 1
    assert found.tensors["x"].histogram.amax == 3.0
    assert "mask values" in said[0]
    lower = collect(chain(), ["x"], [{"x": x}], CollectOptions(allow_nonfinite=True, sentinel=3.0))
    assert lower.tensors["x"].histogram.amax == 2.0


def test_tensors_that_cannot_be_had_are_named():
    model = parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17, "local": 1]>
        g (float[N] x, int64[N] i) => (float[N] y, int64[N] j)
        { h = local.f (x)  y = Add (h, w)  j = Add (i, i) }
        <domain: "local", opset_import: ["": 17]>
        f (p) => (q) { inner = Relu (p)  q = Neg (inner) }
    """)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1, np.float32), "w"))
    batch = {"x": np.ones(3, np.float32), "i": np.ones(3, np.int64)}
    found = collect(model, ["h", "w", "i", "j", "inner", "nowhere"], [batch])
    assert list(found.tensors) == ["h"]
    assert found.not_covered == {
        "w": "it is a constant",
        "i": "it is a tensor(int64)",
        "j": "it is a tensor(int64)",
        "inner": "it is inside the model-local function f",
        "nowhere": "the model has no such tensor",
    }


def test_float16_activations_are_counted():
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float16[N] x) => (float16[N] y) { y = Neg (x) }'
    )
    x = np.linspace(-2, 3, 11).astype(np.float16)
    assert collect(model, ["y"], [{"x": x}]).tensors["y"].histogram == Histogram.of(-x)


def test_the_ends_of_float16_are_masks_and_the_user_may_go_lower():
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float16[N] x) => (float16[N] y) { y = Neg (x) }'
    )
    x = np.array([-65504, 100, 2, -1], np.float16)
    found = collect(model, ["x", "y"], [{"x": x}]).tensors
    for histogram in (found["x"].histogram, found["y"].histogram):
        assert histogram.amax == 100
        assert histogram.sentinel == 1
    lower = collect(model, ["x"], [{"x": x}], CollectOptions(sentinel=50.0)).tensors["x"].histogram
    assert (lower.amax, lower.sentinel) == (2, 2)
    wide = collect(chain(), ["x"], [{"x": np.full((1, 1, 4), 65504, np.float32)}]).tensors["x"].histogram
    assert wide.amax == 65504


@pytest.mark.parametrize(
    "node", ["y = Expand (x, s)", "y = Tile (x, s)", "c = ConstantOfShape (s)  y = Add (c, x)"], ids=lambda n: n[4:10]
)
def test_a_memory_bomb_is_refused_before_it_runs(node):
    model = parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[M] y) {{ {node} }}')
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2**36]), "s"))
    with pytest.raises(ModelError, match="256 GiB") as caught:
        collect(model, ["y"], [{"x": np.ones(1, np.float32)}])
    assert caught.value.exit_code == 3
    assert "--max-memory" in caught.value.do


def test_a_limit_below_the_model_is_kept():
    batch = {"x": data(10, 100)}
    with pytest.raises(ModelError, match="MatMul"):
        collect(chain(), ["a"], [batch], CollectOptions(max_memory=10_000))
    assert collect(chain(), ["a"], [batch], CollectOptions(max_memory=20_000)).samples == 10


def test_a_large_batch_is_run_in_pieces(monkeypatch):
    sizes = []
    original = probe.Probe.run
    monkeypatch.setattr(
        probe.Probe, "run", lambda self, batch: (sizes.append(len(batch["x"])), original(self, batch))[1]
    )
    x = data(64, 100)
    whole = collect(chain(), ["a"], [{"x": x}])
    pieces = collect(chain(), ["a"], [{"x": x}], CollectOptions(batch_bytes=30_000))
    assert sizes[0] == 64
    assert len(sizes) > 3
    assert sum(sizes[1:]) == 64
    assert pieces.tensors["a"].histogram == whole.tensors["a"].histogram


def test_types_that_the_plugin_does_not_count_are_counted_all_the_same():
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (double[N] x) => (double[N] y) { a = Abs (x)  y = Neg (a) }'
    )
    x = np.linspace(-2, 3, 11)
    found = collect(model, ["x", "a", "y"], [{"x": x}])
    assert list(found.tensors) == ["x", "a", "y"]
    assert found.tensors["a"].histogram == Histogram.of(np.abs(x))


def test_weights_of_a_large_model_stay_in_their_file(tmp_path, monkeypatch):
    save_model(from_proto(chain_of_large_weights()), tmp_path / "m.onnx", external_threshold=0)
    assert (tmp_path / "m.onnx.data").stat().st_size >= 2**20
    batch = {"x": np.ones((2, 512), np.float32)}
    inside = collect(tmp_path / "m.onnx", ["a"], [batch])
    monkeypatch.setattr(probe, "IN_MEMORY", 1000)
    filled = []
    monkeypatch.setattr(FileValues, "chunks", lambda self: filled.append(self) or [])
    outside = collect(load_model(tmp_path / "m.onnx"), ["a"], [batch], CollectOptions(identity=inside.model))
    found, expected = (result.tensors["a"].histogram.extrema for result in (outside, inside))
    # Nothing is packed or fused then, and float sums are added in another order.
    assert found.total == expected.total
    assert [found.lo, found.hi] == pytest.approx([expected.lo, expected.hi], rel=1e-5)
    assert filled == []


def test_a_large_model_in_memory_is_run_from_a_file(monkeypatch):
    """One that was converted or equalized has its weights nowhere else, and is no single message any more."""
    monkeypatch.setattr(probe, "IN_MEMORY", 1000)
    monkeypatch.setattr("qpipe.pipeline.stages.collect._LARGE", 1000)
    opened = []
    original = probe.make_session
    monkeypatch.setattr(probe, "make_session", lambda data, **how: opened.append((data, how)) or original(data, **how))
    model = chain_of_large_weights()
    collect(from_proto(model), ["a"], [{"x": np.ones((2, 512), np.float32)}])
    ((data, how),) = opened
    assert len(data) < 2**16 < model.ByteSize()
    assert how["extras"].mapped
    assert how["exact"]


def chain_of_large_weights() -> onnx.ModelProto:
    """Return a model with a weight of one megabyte."""
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 512] x) => (float[N, 512] y)'
        "{ a = MatMul (x, w) y = Neg (a) }"
    )
    weight = np.random.default_rng(1).standard_normal((512, 512)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return model


def test_without_the_plugin_the_same_bytes_are_written(tmp_path, counting):
    if counting == "numpy":
        pytest.skip("compares both")
    x = np.random.default_rng(8).standard_normal((9, 70, 4)).astype(np.float32)
    for name, use in (("native", True), ("numpy", False)):
        options = CollectOptions(
            details={"x": Detail(), "a": Detail(gram=True), "b": Detail()},
            checkpoints=Checkpoints(path=tmp_path / name),
            native=use,
        )
        collect(chain(), ["y", "b", "a", "x"], [{"x": x[:3]}, {"x": x[3:]}], options)
    assert (tmp_path / "native").read_bytes() == (tmp_path / "numpy").read_bytes()


def test_progress_is_told():
    seen = []
    collect(chain(), ["a"], [{"x": data(2, 3)}] * 3, CollectOptions(progress=lambda n, rate: seen.append((n, rate))))
    assert [count for count, _ in seen] == [2, 4, 6]
    assert all(rate > 0 for _, rate in seen)


def test_the_result_is_saved(tmp_path):
    checkpoints = Checkpoints(path=tmp_path / "a.qcal", batches=2)
    found = collect(chain(), ["x", "a"], [{"x": data(2, 3)}] * 3, CollectOptions(checkpoints=checkpoints))
    saved = load(tmp_path / "a.qcal")
    assert saved.samples == found.samples == 6
    assert saved.tensors["a"].histogram == found.tensors["a"].histogram
    with pytest.raises(WriteError, match="exists"):
        collect(chain(), ["x", "a"], [{"x": data(2, 3)}], CollectOptions(checkpoints=checkpoints))


def test_a_missing_model_is_a_usage_error():
    with pytest.raises(UsageError):
        collect(Path("none.onnx"), ["a"], [])


def test_saved_statistics_fit_the_model_again(tmp_path):
    found = collect(chain(), ["a"], [{"x": data(2, 3)}])
    save(found, tmp_path / "a.qcal")
    again = collect(chain(), ["a"], [{"x": data(1, 1)}])
    load(tmp_path / "a.qcal").check_model(again.model)
    other = chain()
    other.graph.node[1].op_type = "Sigmoid"
    with pytest.raises(DataError, match="Sigmoid"):
        load(tmp_path / "a.qcal").check_model(collect(other, ["a"], [{"x": data(1, 1)}]).model)


def test_memory_does_not_grow_with_the_number_of_batches():
    seen = []

    def batches():
        for index in range(2500):
            if index % 500 == 0:
                gc.collect()
                seen.append(psutil.Process().memory_info().rss)
            yield {"x": data(1 + index % 3, 20 + index % 50)}

    collect(chain(), ["x", "a", "b", "y"], batches())
    assert seen[-1] - seen[1] < 16 * 2**20
