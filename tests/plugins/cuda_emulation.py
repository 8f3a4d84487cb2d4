"""Build and call the emulated CUDA kernels (cuda_emulation/emulate.cc) from tests."""

from __future__ import annotations

import ctypes as c
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from qpipe.plugins.outlier_matmul.contract import Packed

HERE = Path(__file__).resolve().parent / "cuda_emulation"
PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(ml_dtypes.bfloat16): 2}
NOTHING, SMALL, MMA, WGMMA = range(4)
NO_SHARE, SHARE_W, SHARE_X, SPLIT_K = range(4)


class Operands(c.Structure):
    """Mirror of args.cuh."""

    _fields_ = [
        *((name, c.c_void_p) for name in ("x", "w_codes", "w_scale", "outlier_index", "w_outlier", "bias", "y", "new")),
        ("m", c.c_int64),
        ("n", c.c_int64),
        *((name, c.c_int32) for name in ("k", "k_padded", "o", "o_padded")),
        ("limit", c.c_float),
    ]


class Plan(c.Structure):
    """Mirror of plan.cuh."""

    _fields_ = [
        *((name, c.c_int32) for name in ("path", "tile", "share", "cluster", "blocks")),
        ("cost", c.c_double),
    ]


class Device(c.Structure):
    """Mirror of plan.cuh."""

    _fields_ = [(name, c.c_int32) for name in ("capability", "multiprocessors", "shared_bytes", "wgmma")]


class Shape(c.Structure):
    """Mirror of plan.cuh."""

    _fields_ = [("m", c.c_int64), ("n", c.c_int64), *((n, c.c_int32) for n in ("k_padded", "o_padded", "element"))]


class _Call(c.Structure):
    _fields_ = [
        ("op", Operands),
        ("type", c.c_int32),
        ("plan", Plan),
        ("int8", c.c_int32),
        ("late_copies", c.c_int32),
        ("late_products", c.c_int32),
        ("scratch", c.c_void_p),
    ]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the row kernel left: low digits [M, Kp], scales [M], outliers [M, Op], high digits [M, Kp]."""

    codes: np.ndarray
    scale: np.ndarray
    outliers: np.ndarray
    high: np.ndarray


class Emulation:
    """The library; one call at a time."""

    def __init__(self, path: Path) -> None:
        self._library = c.CDLL(str(path))
        self._library.emulation_error.restype = c.c_char_p
        self._library.emulation_call_bytes.restype = c.c_int64
        assert self._library.emulation_call_bytes() == c.sizeof(_Call)

    def choose(self, shape: Shape, device: Device) -> Plan:
        """Return the plan for a shape."""
        plan = Plan()
        self._library.plan(c.byref(shape), c.byref(device), c.byref(plan))
        return plan

    def candidates(self, shape: Shape, device: Device) -> list[Plan]:
        """Return every plan that could run a shape with more than eight rows."""
        plans = (Plan * 32)()
        count = self._library.plan_candidates(c.byref(shape), c.byref(device), plans)
        return [plans[i] for i in range(count)]

    def tile_order(self, tiles_m: int, tiles_n: int) -> list[tuple[int, int]]:
        """Return tile coordinates by block number."""
        m, n = (np.zeros(tiles_m * tiles_n, np.int32) for _ in range(2))
        self._library.tile_order(tiles_m, tiles_n, _pointer(m), _pointer(n))
        return list(zip(m.tolist(), n.tolist(), strict=True))

    def swizzle(self, row: int, chunk: int) -> int:
        """Return the byte offset of a 16-byte chunk in a tile of 128-byte rows."""
        return self._library.swizzle(row, chunk)

    def run(
        self,
        x: np.ndarray,
        packed: Packed,
        plan: Plan,
        *,
        bias: np.ndarray | None = None,
        limit: float = 0.0,
        late: tuple[bool, bool] = (False, False),
        int8: bool = True,
    ) -> tuple[np.ndarray, int, Rows | None]:
        """Run a plan and return y [M, N], the new outliers counted, and the quantized rows (None for small M)."""
        m, k = x.shape
        n, k_padded = packed.w_q.shape
        y = np.full(m * n + 64, 0x7B, x.dtype).view(np.uint8)
        y[:] = 0xA5
        new = np.zeros(1, np.uint64)
        arrays = (x, packed.w_q, packed.w_scale, packed.outlier_index, packed.w_outlier, bias, y, new)
        arrays = tuple(None if a is None else _aligned(a) for a in arrays)
        o, o_padded = packed.outlier_index.size, packed.w_outlier.shape[1]
        op = Operands(*(None if a is None else _pointer(a) for a in arrays), m, n, k, k_padded, o, o_padded, limit)
        offsets = (c.c_int64 * 6)()
        self._library.scratch_offsets(c.byref(op), c.c_int64(x.dtype.itemsize), offsets)
        scratch = _aligned(np.full(offsets[5] + 256, 0xCD, np.uint8))
        call = _Call(op, TYPES[x.dtype], plan, int8, *map(int, late), _pointer(scratch))
        if self._library.emulate(c.byref(call)):
            raise AssertionError(self._library.emulation_error().decode())
        result = arrays[6].view(x.dtype)
        assert (result[m * n :].view(np.uint8) == 0xA5).all(), "a kernel wrote past the end of y"
        rows = None if plan.path == SMALL else _rows(scratch, list(offsets), op, x.dtype)
        return result[: m * n].reshape(m, n), int(arrays[7][0]), rows

    def count(
        self, x: np.ndarray, state: np.ndarray, *, sentinel: float = 1e30, blocks: int = 2, skip: int = 0
    ) -> None:
        """Add the values of ``x [size]`` to ``state`` uint64 [65544]; ``skip`` of them are left out in front."""
        values = _aligned(x)[skip:]
        if self._library.count_values(
            _pointer(values),
            TYPES[x.dtype],
            c.c_int64(values.size),
            c.c_float(sentinel),
            blocks,
            _pointer(state),
        ):
            raise AssertionError(self._library.emulation_error().decode())


def build(folder: Path) -> Emulation:
    """Compile the library into ``folder``."""
    compiler = shutil.which("g++")
    assert compiler is not None
    target = folder / "libcuda_emulation.so"
    includes = [HERE, PLUGINS / "outlier_matmul" / "cuda", PLUGINS / "range_stats" / "cuda"]
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        + [f"-I{path}" for path in includes]
        + [str(HERE / "emulate.cc"), "-o", str(target)],
        check=True,
    )
    return Emulation(target)


def _pointer(array: np.ndarray) -> c.c_void_p:
    return c.c_void_p(array.ctypes.data)


def _aligned(array: np.ndarray) -> np.ndarray:
    """Return a copy of ``array`` that begins at a multiple of 256, as device memory does."""
    raw = np.empty(array.nbytes + 512, np.uint8)
    start = -raw.ctypes.data % 256
    copy = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _rows(scratch: np.ndarray, offsets: list[int], op: Operands, dtype: np.dtype) -> Rows:
    def part(offset: int, kind: np.dtype | type, *shape: int) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(kind).itemsize
        return scratch[offset : offset + size].view(kind).reshape(shape)

    scale, outliers, count, column, digit, _ = offsets
    high = np.zeros((op.m, op.k_padded), np.int32)
    if op.limit > 0:
        counts, columns, digits = (part(a, np.int32, op.m, s) for a, s in ((count, 1), (column, 64), (digit, 64)))
        for row in range(op.m):
            used = counts[row, 0]
            high[row, columns[row, :used]] = digits[row, :used]
    return Rows(
        codes=part(0, np.int8, op.m, op.k_padded).copy(),
        scale=part(scale, np.float32, op.m).copy(),
        outliers=part(outliers, dtype, op.m, op.o_padded).copy(),
        high=high,
    )
