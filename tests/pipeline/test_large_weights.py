"""Weights quantized region by region give the codes and scales that they give as a whole."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.granularity import PER_TENSOR, Granularity, per_block, per_channel
from qpipe.calibrate.qarray import QArray, Spec
from qpipe.calibrate.weights import WEIGHT_METHODS
from qpipe.pipeline import graph, streaming
from qpipe.pipeline.constants import weight_of
from qpipe.pipeline.extents import Extent, extent_jobs, extremes, reader_of
from qpipe.pipeline.graph import lazy
from qpipe.pipeline.graph.halves import widened
from qpipe.pipeline.graph.lazy import Lazy, by_rows, regions
from qpipe.pipeline.layouts import layout_of
from qpipe.pipeline.plan import Decision, Plan, Site
from qpipe.pipeline.stages import weights as stage

TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
OPS = {
    "MatMul": ((64, 48), {}),
    "Gemm": ((48, 64), {"transB": 1}),
    "stack": ((3, 32, 24), {}),
    "Conv": ((10, 8, 3, 3), {}),
    "ConvTranspose": ((8, 10, 2, 2), {}),
    "odd": ((37, 19), {}),
}
OUT_AXIS = {"MatMul": 1, "Gemm": 0, "stack": 2, "Conv": 0, "ConvTranspose": 1, "odd": 1}
IN_AXIS = {"MatMul": 0, "Gemm": 1, "stack": 1, "Conv": 1, "ConvTranspose": 0, "odd": 0}


@pytest.fixture(autouse=True)
def small_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make even small weights fall into many pieces."""
    monkeypatch.setattr(lazy.regions, "__defaults__", (256, 8))
    monkeypatch.setattr(streaming, "_STRIP", 200)
    # By name the package gives a function of that name.
    monkeypatch.setattr(sys.modules["qpipe.pipeline.graph.constants"], "_WINDOW", 512)
    monkeypatch.setattr("qpipe.pipeline.graph.scratch.LARGE", 128)


def placed(folder: Path, array: np.ndarray, kind: str, place: str) -> graph.Model:
    """Return a model of one node of ``kind`` whose weight lies inside or outside, perhaps behind a Transpose."""
    op = kind if kind in ("Gemm", "Conv", "ConvTranspose") else "MatMul"
    turned = place == "turned"
    stored = np.ascontiguousarray(array.T) if turned else array
    nodes = [helper.make_node(op, ["x", "v" if turned else "w"], ["y"], "n", **OPS[kind][1])]
    if turned:
        nodes.insert(0, helper.make_node("Transpose", ["w"], ["v"], "t", perm=list(range(array.ndim))[::-1]))
    number = helper.np_dtype_to_tensor_dtype(array.dtype)
    ends = [helper.make_tensor_value_info(end, number, [f"{end}{i}" for i in range(array.ndim)]) for end in "xy"]
    tensors = [numpy_helper.from_array(stored, "w")]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors), opset_imports=[helper.make_opsetid("", 21)]
    )
    model = graph.from_proto(proto)
    if place == "memory":
        return model
    graph.save(model, folder / "m.onnx", external_threshold=0)
    return graph.load(folder / "m.onnx")


def weight_in(model: graph.Model) -> tuple[gs.Node, gs.Tensor]:
    node = next(node for node in model.graph.nodes if node.name == "n")
    return node, node.inputs[1]


def plan_of(node: gs.Node, spec: Spec, algorithm: str) -> Plan:
    site = Site(node=node.name, slot="in1", tensor=node.inputs[1].name, role="weight")
    decision = Decision(site=site, op=node.op, spec=spec, reason="", algorithm=algorithm)
    return Plan(decisions=(decision,), groups={}, target="portable", recipe_hash="", model_hash="")


def values_of(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_t(3, shape)).astype(TYPES[dtype])


def both_ways(model: graph.Model, spec: Spec, algorithm: str) -> tuple[QArray, QArray]:
    """Return what the stage makes of the model's weight, and what the algorithm makes of the whole of it."""
    node, tensor = weight_in(model)
    weight = weight_of(tensor)
    assert weight is not None
    (found,) = stage.quantize_weights(model.graph, plan_of(node, spec, algorithm)).values()
    method = WEIGHT_METHODS.resolve(algorithm)
    return found, stage.quantize_layer(weight.values(), spec, layout_of(node, weight.shape), method)


def assert_equal(found: QArray, whole: QArray) -> None:
    assert np.array_equal(found.params.scale, whole.params.scale)
    assert found.params.scale.dtype == whole.params.scale.dtype
    assert (found.params.zero_point is None) == (whole.params.zero_point is None)
    if whole.params.zero_point is not None:
        assert found.params.zero_point is not None
        assert np.array_equal(found.params.zero_point, whole.params.zero_point)
    codes = np.asarray(found.q)
    assert codes.dtype == whole.q.dtype
    assert codes.tobytes() == whole.q.tobytes()


def granularities(kind: str) -> dict[str, Granularity]:
    return {
        "tensor": PER_TENSOR,
        "channel": per_channel(OUT_AXIS[kind]),
        "block": per_block(IN_AXIS[kind], 8),
        "odd block": per_block(IN_AXIS[kind], 5),
    }


CASES = [
    (kind, name, place)
    for kind, name, place in itertools.product(OPS, ["tensor", "channel", "block", "odd block"], ["external", "turned"])
    if not (place == "turned" and kind in ("Conv", "ConvTranspose"))
    and not (name == "odd block" and len(OPS[kind][0]) > 2)  # blocks must not cross from one matrix to the next
]


@pytest.mark.parametrize(("kind", "granularity", "place"), CASES)
@pytest.mark.parametrize("algorithm", ["rtn", "rtn_mse:4", "fixed:0.2"])
def test_codes_and_scales_are_those_of_the_whole_weight(
    tmp_path: Path, kind: str, granularity: str, place: str, algorithm: str
) -> None:
    spec = Spec(format=FORMATS.get("int4"), granularity=granularities(kind)[granularity])
    model = placed(tmp_path, values_of(OPS[kind][0], "float16"), kind, place)
    found, whole = both_ways(model, spec, algorithm)
    assert isinstance(found.q, Lazy)
    assert_equal(found, whole)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("place", ["memory", "external"])
@pytest.mark.parametrize(
    ("fmt", "symmetric"),
    [("int8", True), ("uint8", False), ("uint4", False), ("int2", True), ("float8_e4m3fn", True), ("int16", True)],
)
def test_every_format_and_type_of_weight(tmp_path: Path, dtype: str, place: str, fmt: str, symmetric: bool) -> None:
    spec = Spec(format=FORMATS.get(fmt), granularity=per_channel(1), symmetric=symmetric)
    assert_equal(*both_ways(placed(tmp_path, values_of((64, 48), dtype), "MatMul", place), spec, "rtn"))


@pytest.mark.parametrize("algorithm", ["rtn", "rtn_mse:4", "hqq"])
@pytest.mark.parametrize("place", ["external", "turned"])
def test_weights_with_limited_pairs(tmp_path: Path, algorithm: str, place: str) -> None:
    spec = Spec(format=FORMATS.get("int8"), granularity=per_channel(1), narrow_range=True, pair_limit=128)
    found, whole = both_ways(placed(tmp_path, values_of((64, 48), "float16"), "MatMul", place), spec, algorithm)
    assert not isinstance(found.q, Lazy)
    assert_equal(found, whole)


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (1, 40), (40, 1)])
@pytest.mark.parametrize("algorithm", ["rtn", "rtn_mse:4"])
def test_weights_of_few_elements(tmp_path: Path, shape: tuple[int, int], algorithm: str) -> None:
    spec = Spec(format=FORMATS.get("int8"), granularity=per_channel(1))
    assert_equal(*both_ways(placed(tmp_path, values_of(shape, "float32"), "MatMul", "memory"), spec, algorithm))


def test_a_saved_lazy_weight_is_the_whole_one(tmp_path: Path) -> None:
    spec = Spec(format=FORMATS.get("int4"), granularity=per_block(0, 8))
    model = placed(tmp_path, values_of((64, 48), "float16"), "MatMul", "external")
    found, whole = both_ways(model, spec, "rtn")
    node, _ = weight_in(model)
    node.inputs[1] = graph.constant("codes", found.q, "INT4")
    for threshold in (0, None):
        graph.save(model, tmp_path / "q.onnx", force=True, external_threshold=threshold)
        again = graph.values(weight_in(graph.load(tmp_path / "q.onnx"))[1])
        assert again.tobytes() == whole.q.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", TYPES)
def test_one_pass_finds_what_is_not_finite(tmp_path: Path, dtype: str, bad: float) -> None:
    array = values_of((64, 48), dtype)
    array[63, 1] = array[0, 0] = bad
    model = placed(tmp_path, array, "MatMul", "external")
    node, _ = weight_in(model)
    for granularity in granularities("MatMul").values():
        plan = plan_of(node, Spec(format=FORMATS.get("int8"), granularity=granularity), "rtn")
        (surveyed,) = stage.survey_weights(model.graph, plan).values()
        assert not surveyed.is_finite
        with pytest.raises(stage.ModelError, match="not finite") as info:
            stage.settle_nonfinite(model.graph, plan, skip=False)
        assert "2 of 3072" in str(info.value)
        (kept,) = stage.settle_nonfinite(model.graph, plan, skip=True).decisions
        assert kept.spec is None


def test_half_precision_is_widened_exactly() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    for x in (every, finite, finite.reshape(2, -1)[:, ::2]):
        assert widened(x).view(np.uint32).tolist() == x.astype(np.float32).view(np.uint32).tolist()


@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    dtype=st.sampled_from(list(TYPES)),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_extremes_are_those_of_the_values(shape: list[int], dtype: str, seed: int, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    granularity = data.draw(st.sampled_from([PER_TENSOR, per_channel(axis), per_block(axis, 2), per_block(axis, 3)]))
    bits = np.random.default_rng(seed).integers(0, 2**16, shape).astype(np.uint16)
    x = bits.view(np.float16 if dtype == "float32" else TYPES[dtype]).astype(TYPES[dtype])
    wide = x.astype(np.float32)
    found, expected = extremes(x, granularity), [granularity.reduce(wide, u) for u in (np.minimum, np.maximum)]
    sound = np.isfinite(expected[0]) & np.isfinite(expected[1])
    assert np.array_equal(np.isfinite(found[0]) & np.isfinite(found[1]), sound)
    assert np.array_equal(found[0][sound], expected[0][sound])
    assert np.array_equal(found[1][sound], expected[1][sound])


@given(shape=st.lists(st.integers(0, 12), max_size=4), limit=st.integers(1, 60), multiple=st.sampled_from([8, 24]))
@settings(max_examples=200, deadline=None)
def test_regions_cover_an_array_in_order_and_fill_bytes(shape: list[int], limit: int, multiple: int) -> None:
    array = np.arange(int(np.prod(shape))).reshape(shape)
    pieces = [array[region].reshape(-1) for region in regions(tuple(shape), limit, multiple)]
    assert np.array_equal(np.concatenate([*pieces, np.empty(0, int)]), array.reshape(-1))
    assert all(piece.size % 8 == 0 for piece in pieces[:-1])


def lazy_of(array: np.ndarray) -> Lazy:
    return Lazy(array.shape, array.dtype, lambda: lambda region: array[region])


def test_a_lazy_array_is_an_array_for_those_who_do_not_know_it() -> None:
    array = np.arange(40 * 24, dtype=np.int16).reshape(40, 24)
    made = lazy_of(array)
    for found, expected in [
        (np.asarray(made), array),
        (np.asarray(made.T), array.T),
        (np.asarray(made.transpose(1, 0)), array.T),
        (made.astype(np.float32), array.astype(np.float32)),
        (made.reshape(-1), array.reshape(-1)),
        (made[3:5], array[3:5]),
        (made - array, array - array),
        (np.ascontiguousarray(made.T), array.T),
        (np.pad(made, 1), np.pad(array, 1)),
    ]:
        assert np.array_equal(found, expected)
    assert made.reshape(40, -1) is made
    assert len(made) == 40
    assert made.max() == array.max()
    with pytest.raises(AttributeError):
        made.no_such_thing  # noqa: B018


def test_rows_are_mapped_on_demand() -> None:
    array = np.random.default_rng(0).integers(0, 16, (24, 40)).astype(np.uint8)

    def packed(rows: np.ndarray) -> np.ndarray:
        return rows[:, 0::2] | rows[:, 1::2] << 4

    expected = packed(array.T)
    assert np.array_equal(by_rows(packed, array.T, (40, 12), np.uint8), expected)
    made = by_rows(packed, lazy_of(array).T, (40, 12), np.uint8)
    assert isinstance(made, Lazy)
    assert np.array_equal(np.asarray(made), expected)
    assert graph.values(graph.constant("c", made, "UINT8")).tobytes() == expected.tobytes()


def test_a_turned_weight_is_read_in_the_order_of_its_file(tmp_path: Path) -> None:
    array = values_of((64, 48), "float16")
    _, tensor = weight_in(placed(tmp_path, array, "MatMul", "turned"))
    weight = weight_of(tensor)
    assert weight is not None
    assert np.array_equal(reader_of(weight)((slice(3, 30), slice(5, 40))), array[3:30, 5:40])
    extent = Extent.empty(weight.shape, per_channel(1))
    places = [job() for job in extent_jobs(weight, per_channel(1))]
    assert len(places) > 3
    for part in places:
        extent.add(*part)
    assert np.array_equal(extent.lo, array.astype(np.float32).min(axis=0, keepdims=True))
    assert np.array_equal(extent.hi, array.astype(np.float32).max(axis=0, keepdims=True))
    assert places[0][0][1].stop - places[0][0][1].start < 48, "cut along the axis that is outermost in the file"


def test_a_weight_is_looked_at_once_before_its_codes_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = placed(tmp_path, values_of((64, 48), "float16"), "MatMul", "external")
    node, _ = weight_in(model)
    plan = plan_of(node, Spec(format=FORMATS.get("int8"), granularity=per_channel(1)), "rtn")
    read: list[int] = []
    original = graph.external.FileRange.read  # type: ignore[attr-defined]

    def counted(self: object, start: int, length: int) -> bytearray:
        read.append(length)
        return original(self, start, length)

    monkeypatch.setattr("qpipe.pipeline.graph.external.FileRange.read", counted)
    settled = stage.settle_global(model.graph, stage.settle_nonfinite(model.graph, plan, skip=False))
    (found,) = stage.quantize_weights(model.graph, settled).values()
    assert sum(read) == 64 * 48 * 2
    np.asarray(found.q)
    assert sum(read) == 2 * 64 * 48 * 2


@pytest.mark.parametrize("place", ["memory", "external", "turned"])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_constant_in_another_type_is_cast_region_by_region(tmp_path: Path, dtype: str, place: str) -> None:
    model = placed(tmp_path, values_of((64, 48), dtype), "MatMul", place)
    node, tensor = weight_in(model)
    weight = weight_of(tensor)
    assert weight is not None
    for onnx_type, wanted in (("FLOAT", np.float32), ("FLOAT16", np.float16), ("BFLOAT16", ml_dtypes.bfloat16)):
        cast = graph.recast("cast", weight.constant, onnx_type)
        expected = np.asarray(graph.values(weight.constant)).astype(wanted)
        assert graph.values(cast).tobytes() == expected.tobytes()
        through = weight_of(cast)
        assert through is not None
        assert reader_of(through)((slice(3, 30), slice(5, 40))).tobytes() == expected[3:30, 5:40].tobytes()
    node.inputs[1] = graph.recast("cast", weight.constant, "FLOAT")
    spec = Spec(format=FORMATS.get("int4"), granularity=per_block(0, 8))
    assert_equal(*both_ways(model, spec, "rtn"))
