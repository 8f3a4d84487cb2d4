"""Layouts, tile order, choice of kernels and the calibration counters of the CUDA sources, on the CPU."""

from __future__ import annotations

import itertools

import cuda_emulation as ce
import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import pytest
from qpipe.calibrate.errors import UnsupportedError
from qpipe.calibrate.stats.histogram import Histogram
from qpipe.plugins.range_stats.device import attach, empty_state, histogram_of

H200 = ce.Device(90, 132, 232448, 1)
A100 = ce.Device(80, 108, 166912)
L40 = ce.Device(89, 142, 101376)
SHAPES = [(4096, 4096), (4096, 11008), (11008, 4096), (8192, 28672), (384, 1536), (1024, 1000)]  # K, N


def test_the_swizzle_is_a_bijection_without_bank_conflicts(emulation: ce.Emulation) -> None:
    places = {emulation.swizzle(row, chunk) for row in range(64) for chunk in range(8)}
    assert places == set(range(0, 64 * 128, 16))
    for first in range(0, 64, 8):
        for chunk in range(8):
            banks = {emulation.swizzle(first + row, chunk) // 16 % 8 for row in range(8)}
            assert len(banks) == 8


@pytest.mark.parametrize(("tiles_m", "tiles_n"), [(1, 1), (1, 9), (7, 3), (8, 5), (9, 4), (33, 17)])
def test_every_tile_is_taken_once(emulation: ce.Emulation, tiles_m: int, tiles_n: int) -> None:
    order = emulation.tile_order(tiles_m, tiles_n)
    assert sorted(order) == [(m, n) for m in range(tiles_m) for n in range(tiles_n)]


def sweep(emulation: ce.Emulation, device: ce.Device, element: int) -> set[tuple[int, int, int, int]]:
    chosen = set()
    for k, n in SHAPES:
        for m in [1, 2, 4, 8, 9, 12, *range(16, 512, 16), *range(512, 4097, 128)]:
            plan = emulation.choose(ce.Shape(m, n, k, 16, element), device)
            assert plan.path == ce.SMALL or m > 4
            assert plan.path != ce.SMALL or m <= 8
            assert plan.blocks > 0
            assert plan.blocks % plan.cluster == 0
            chosen.add((plan.path, plan.tile, plan.share, plan.cluster))
    return chosen


@pytest.mark.parametrize("device", [A100, L40], ids=["sm_80", "sm_89"])
def test_every_mma_tile_is_reached(emulation: ce.Emulation, device: ce.Device) -> None:
    chosen = sweep(emulation, device, 2)
    assert {tile for path, tile, _, _ in chosen if path == ce.MMA} == {0, 1, 2}
    assert not any(path == ce.WGMMA for path, *_ in chosen)


def test_every_wgmma_tile_and_way_of_sharing_is_reached(emulation: ce.Emulation) -> None:
    chosen = sweep(emulation, H200, 2)
    assert {tile for path, tile, _, _ in chosen if path == ce.WGMMA} == {0, 1, 2}
    assert {share for path, _, share, _ in chosen if path == ce.WGMMA} >= {ce.SHARE_W, ce.SPLIT_K}
    assert not any(path == ce.MMA for path, *_ in chosen)
    assert not any(tile == 2 for path, tile, *_ in sweep(emulation, H200, 4) if path == ce.WGMMA)


def test_an_estimate_never_jumps_down_as_rows_are_added(emulation: ce.Emulation) -> None:
    for k, n in SHAPES:
        costs = [emulation.choose(ce.Shape(m, n, k, 16, 2), H200).cost for m in range(9, 2049, 7)]
        assert all(later >= earlier * 0.999 for earlier, later in itertools.pairwise(costs))


def test_a_library_without_sm_90a_code_plans_no_wgmma(emulation: ce.Emulation) -> None:
    assert emulation.choose(ce.Shape(512, 4096, 4096, 16, 2), ce.Device(90, 132, 232448, 0)).path == ce.MMA


def test_nothing_is_planned_for_an_empty_output(emulation: ce.Emulation) -> None:
    for m, n in ((0, 64), (64, 0)):
        plan = emulation.choose(ce.Shape(m, n, 64, 0, 2), H200)
        assert (plan.path, plan.blocks) == (ce.NOTHING, 0)


def test_rows_too_long_for_shared_memory_take_the_two_kernel_path(emulation: ce.Emulation) -> None:
    assert emulation.choose(ce.Shape(8, 4096, 28672, 16, 2), H200).path == ce.WGMMA
    assert emulation.choose(ce.Shape(1, 4096, 28672, 16, 2), H200).path == ce.SMALL


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
def test_the_counters_are_those_of_the_histogram(emulation: ce.Emulation, dtype: type) -> None:
    rng = np.random.default_rng(4)
    x = (rng.normal(size=120_001) * np.exp2(rng.integers(-20, 15, 120_001))).astype(np.float32)
    x[rng.integers(0, x.size, 3000)] = 0
    x[:9] = [-0.0, np.nan, np.inf, -np.inf, 1e-40, -1e-30, 2e-39, 60000, -60000]
    if dtype is not np.float16:
        x[9:12] = [3e38, -3e38, 1e25]
    with np.errstate(over="ignore"):
        x = x.astype(dtype)
    state = empty_state().view(np.uint64)
    emulation.count(x[:70_000], state)  # two runs: the state goes on
    emulation.count(x[69_995:], state, skip=5, blocks=1)  # begins at an odd address
    assert histogram_of(state.view(np.int64)) == Histogram.of(x)


def test_counting_nothing_changes_nothing(emulation: ce.Emulation) -> None:
    state = empty_state().view(np.uint64)
    emulation.count(np.zeros(0, np.float32), state, blocks=1)
    assert histogram_of(state.view(np.int64)) == Histogram.empty()


def test_counters_become_inputs_and_outputs_of_the_graph() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 17]> g (float[n, 4] x) => (float[n, 4] y) { h = Relu(x) y = Exp(h) }"""
    )
    assert attach(proto, ["h", "x", "h"], sentinel=1e20) == ["h", "x"]
    assert [entry.name for entry in proto.graph.input] == ["x", "h_range_state", "x_range_state"]
    assert [entry.name for entry in proto.graph.output] == ["y", "h_range_state_next", "x_range_state_next"]
    assert [(n.op_type, n.input[0]) for n in proto.graph.node] == [
        ("RangeStats", "x"),
        ("Relu", "x"),
        ("RangeStats", "h"),
        ("Exp", "h"),
    ]
    with pytest.raises(UnsupportedError):
        attach(proto, ["nowhere"])
