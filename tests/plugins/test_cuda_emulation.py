"""The CUDA kernels of OutlierMatMul, run thread by thread on the CPU, against the operator's numpy reference.

Codes, scales and outliers must be equal bit for bit, integer sums too (through float32 outputs without outliers);
outputs within what float32 accumulation of the outlier product can differ from float64.
"""

from __future__ import annotations

import math

import cuda_emulation as ce
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qpipe.plugins.outlier_matmul import contract

F16, BF16, F32 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
MMA_TILES = ((16, 32), (64, 64), (128, 128))
WGMMA_TILES = ((64, 128), (128, 128), (128, 256))
EARLY, LATE_PRODUCTS, LATE_COPIES = (False, False), (False, True), (True, False)


def mma(tile: int, m: int, n: int) -> ce.Plan:
    rows, columns = MMA_TILES[tile]
    return ce.Plan(ce.MMA, tile, ce.NO_SHARE, 1, math.ceil(m / rows) * math.ceil(n / columns), 0)


def wgmma(tile: int, m: int, n: int, share: int = ce.NO_SHARE, cluster: int = 1, clusters: int = 1) -> ce.Plan:
    """Persistent blocks unless the cluster splits K; ``clusters``: at most so many."""
    rows, columns = WGMMA_TILES[tile]
    down, across = math.ceil(m / rows), math.ceil(n / columns)
    units = math.ceil(down / (cluster if share == ce.SHARE_W else 1)) * math.ceil(
        across / (cluster if share == ce.SHARE_X else 1)
    )
    count = units if share == ce.SPLIT_K else min(units, clusters)
    return ce.Plan(ce.WGMMA, tile, share, cluster, count * cluster, 0)


def small(n: int, blocks: int = 2) -> ce.Plan:
    return ce.Plan(ce.SMALL, 0, ce.NO_SHARE, 1, min(blocks, math.ceil(n / 16)), 0)


def make_case(
    seed: int, m: int, n: int, k: int, o: int, dtype: np.dtype
) -> tuple[np.ndarray, contract.Packed, np.ndarray]:
    rng = np.random.default_rng(seed)
    index = np.sort(rng.permutation(k)[:o])
    x = rng.normal(size=(m, k)).astype(np.float32)
    x[:, index] *= 40
    packed = contract.pack(rng.normal(size=(n, k)).astype(np.float32), index, dtype)
    return x.astype(dtype), packed, rng.normal(size=n).astype(np.float32)


def assert_rows_equal(rows: ce.Rows | None, x: np.ndarray, packed: contract.Packed, limit: float) -> None:
    if rows is None:
        return
    expected = contract.quantize_rows(x, packed.outlier_index, limit=limit)
    k, o = x.shape[1], packed.outlier_index.size
    codes = rows.codes.astype(np.int32) + 128 * rows.high
    np.testing.assert_array_equal(codes[:, :k], expected.codes)
    assert not codes[:, k:].any()
    np.testing.assert_array_equal(rows.scale.view(np.uint32), expected.scale.view(np.uint32))
    np.testing.assert_array_equal(
        rows.outliers[:, :o].view(np.uint8), np.ascontiguousarray(x[:, packed.outlier_index]).view(np.uint8)
    )
    assert not rows.outliers[:, o:].astype(np.float32).any()


def assert_close(y: np.ndarray, x: np.ndarray, packed: contract.Packed, bias: np.ndarray | None, limit: float) -> None:
    expected, _ = contract.reference(x, packed, bias, limit=limit)
    row = contract.quantize_rows(x, packed.outlier_index, limit=limit)
    k, o = x.shape[1], packed.outlier_index.size
    with np.errstate(all="ignore"):
        # Every product's share of the float32 rounding: a few units of 2^-24 of the sum of magnitudes (2^-20 for the
        # two-part tf32 products), then half a unit of the output's own type.
        main = np.abs(row.codes @ packed.w_q[:, :k].T.astype(np.float64)) * row.scale[:, None] * packed.w_scale
        tail = np.abs(x[:, packed.outlier_index].astype(np.float64)) @ np.abs(packed.w_outlier[:, :o].T.astype(float))
        unit = {F32: 2.0**-23, F16: 2.0**-10, BF16: 2.0**-7}[x.dtype]
        wide = expected.astype(np.float64)
        bound = main * 2.0**-21 + tail * 2.0**-19 + np.abs(bias if bias is not None else 0) * 2.0**-22
        bound = bound + unit * np.abs(wide) + (2.0**-24 if x.dtype == F16 else 1e-37)
    got = y.astype(np.float64)
    finite = np.isfinite(wide)
    np.testing.assert_array_equal(got[~finite], wide[~finite])
    assert (np.abs(got[finite] - wide[finite]) <= bound[finite]).all()


def check(
    emulation: ce.Emulation, plan: ce.Plan, shape: tuple[int, int, int, int], dtype: np.dtype, **options: object
) -> None:
    m, n, k, o = shape
    x, packed, bias = make_case(hash(shape) % 2**32, m, n, k, o, dtype)
    y, _, rows = emulation.run(x, packed, plan, bias=bias, **options)
    assert_rows_equal(rows, x, packed, 0.0)
    assert_close(y, x, packed, bias, 0.0)


@pytest.mark.parametrize("late", [EARLY, LATE_COPIES], ids=["early", "late"])
@pytest.mark.parametrize("int8", [True, False], ids=["int8", "widened"])
@pytest.mark.parametrize(
    ("tile", "shape", "dtype"),
    [
        (0, (21, 70, 1100, 5), F16),  # more stages than slots, a K tail inside a chunk
        (0, (3, 33, 40, 0), F32),
        (1, (70, 71, 300, 17), F32),  # odd N: no vector stores
        (1, (64, 72, 720, 0), BF16),
        (2, (130, 136, 300, 70), BF16),  # two outlier stages
        (2, (129, 130, 16, 1), F32),
    ],
)
def test_mma_kernel(
    emulation: ce.Emulation,
    tile: int,
    shape: tuple[int, int, int, int],
    dtype: np.dtype,
    late: tuple[bool, bool],
    int8: bool,
) -> None:
    check(emulation, mma(tile, *shape[:2]), shape, dtype, late=late, int8=int8)


@pytest.mark.parametrize("late", [LATE_PRODUCTS, LATE_COPIES], ids=["late-products", "late-copies"])
@pytest.mark.parametrize(
    ("tile", "share", "cluster", "clusters", "shape", "dtype"),
    [
        (0, ce.NO_SHARE, 1, 2, (150, 200, 900, 70), F16),  # several tiles per block
        (0, ce.SHARE_X, 2, 1, (70, 300, 900, 40), F32),
        (0, ce.SHARE_W, 2, 1, (150, 136, 260, 8), BF16),  # the last cluster has a block without rows
        (0, ce.SPLIT_K, 4, 1, (70, 200, 900, 5), F16),
        (1, ce.SHARE_W, 2, 1, (150, 201, 900, 40), BF16),
        (1, ce.SPLIT_K, 2, 1, (130, 130, 900, 5), F32),
        (2, ce.SHARE_W, 2, 1, (130, 300, 900, 64), BF16),
        (2, ce.NO_SHARE, 1, 1, (20, 520, 130, 0), F16),
    ],
)
def test_wgmma_kernel(
    emulation: ce.Emulation,
    tile: int,
    share: int,
    cluster: int,
    clusters: int,
    shape: tuple[int, int, int, int],
    dtype: np.dtype,
    late: tuple[bool, bool],
) -> None:
    check(emulation, wgmma(tile, *shape[:2], share, cluster, clusters), shape, dtype, late=late)


@pytest.mark.parametrize("m", range(1, 9))
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_small_m_kernel(emulation: ce.Emulation, m: int, dtype: np.dtype) -> None:
    check(emulation, small(75), (m, 75, 2100 + m, 5 * (m - 1)), dtype)  # several runs per warp, several tiles


PLANS = [mma(1, 9, 40), wgmma(0, 9, 40), wgmma(0, 9, 40, ce.SPLIT_K, 2), small(40)]


@pytest.mark.parametrize("plan", PLANS, ids=["mma", "wgmma", "split", "small"])
@pytest.mark.parametrize("rows", [8])
def test_integer_sums_are_exact(emulation: ce.Emulation, plan: ce.Plan, rows: int) -> None:
    x, packed, _ = make_case(1, rows, 40, 1000, 0, F32)
    y, _, _ = emulation.run(x, packed, plan)
    row = contract.quantize_rows(x, packed.outlier_index)
    sums = row.codes @ packed.w_q[:, :1000].T.astype(np.int32)
    np.testing.assert_array_equal(y, sums.astype(np.float32) * packed.w_scale * row.scale[:, None])


@pytest.mark.parametrize("plan", PLANS, ids=["mma", "wgmma", "split", "small"])
def test_special_rows(emulation: ce.Emulation, plan: ce.Plan) -> None:
    x, packed, bias = make_case(2, 8, 40, 500, 3, F32)
    regular = next(i for i in range(500) if i not in packed.outlier_index)
    x[0] = 0
    x[1, regular] = np.inf
    x[2, regular] = np.nan
    x[3, packed.outlier_index[0]] = -np.inf
    x[4] = 1e-42  # the scale is the smallest normal number
    x[5, regular] = 3e38
    y, _, rows = emulation.run(x, packed, plan, bias=bias)
    assert_rows_equal(rows, x, packed, 0.0)
    assert np.isnan(y[1:3]).all()
    assert np.isinf(y[3]).all()
    assert_close(y, x, packed, bias, 0.0)


@pytest.mark.parametrize("plan", PLANS, ids=["mma", "wgmma", "split", "small"])
def test_new_outliers_get_two_digits(emulation: ce.Emulation, plan: ce.Plan) -> None:
    x, packed, bias = make_case(3, 8, 40, 500, 3, F32)
    x = np.clip(x, -4, 4)
    regular = [i for i in range(500) if i not in packed.outlier_index]
    x[0, regular[7]] = 300
    x[1, regular[:64]] = -9  # the most that still get two digits
    x[2, regular[:65]] = 9  # one more: the whole row is loud
    y, met, rows = emulation.run(x, packed, plan, bias=bias, limit=5.0)
    assert met == 1 + 64 + 65
    assert_rows_equal(rows, x, packed, 5.0)
    assert_close(y, x, packed, bias, 5.0)


def test_a_misaligned_row_is_read_element_by_element(emulation: ce.Emulation) -> None:
    check(emulation, mma(0, 20, 33), (20, 33, 101, 2), F16)
    check(emulation, small(33), (5, 33, 101, 2), F16)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 70),
    k=st.integers(1, 400),
    share=st.floats(0, 1),
    dtype=st.sampled_from([F32, F16, BF16]),
    path=st.sampled_from(["mma", "wgmma", "small"]),
    late=st.sampled_from([EARLY, LATE_COPIES, LATE_PRODUCTS]),
)
def test_drawn_shapes(
    emulation: ce.Emulation, m: int, n: int, k: int, share: float, dtype: np.dtype, path: str, late: tuple[bool, bool]
) -> None:
    m = min(m, 8) if path == "small" else m
    plan = {"mma": mma(0, m, n), "wgmma": wgmma(0, m, n), "small": small(n)}[path]
    check(emulation, plan, (m, n, k, min(k, int(share * 40))), dtype, late=late)
