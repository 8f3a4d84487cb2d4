"""``com.microsoft.MatMulNBits``: integers of 4 or 8 bits in blocks along the input, multiplied by float activations.

The operator stores unsigned codes; signed ones are shifted by half of their range, which is the zero point that it
assumes when none is given. Zero points are codes too, or real numbers, which fewer kernels take.

Letters: ``N`` outputs, ``K`` inputs, ``B`` block size, ``n`` blocks per output, the last one filled up.
Source: ONNX Runtime, contrib operator MatMulNBits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from ...calibrate.qarray import Spec
from ..graph import Lazy, by_rows
from ..plan import Decision
from . import FORMS, Workbench
from .stored import replace_product, stored_weight

Array = npt.NDArray[Any]


@FORMS.register("nbits")
def insert_nbits(bench: Workbench, node: gs.Node, decisions: list[Decision]) -> None:
    """Replace a MatMul or Gemm by MatMulNBits."""
    weight = stored_weight(bench, node, decisions)
    bits, size = weight.spec.format.bits, weight.spec.granularity.block_size
    arrays = {
        "scales": (weight.scale, "FLOAT"),
        f"Q{bits}": (_packed(weight.codes, weight.spec), "UINT8"),
    }
    if weight.zero is not None and not weight.spec.symmetric:
        arrays["zero_points"] = _zero_points(weight.zero, weight.spec)
    made = {
        what: bench.shared_constant(("nbits", what, *weight.key), f"{weight.name}_{what}", array, onnx_type)
        for what, (array, onnx_type) in arrays.items()
    }
    inputs = [node.inputs[0], made[f"Q{bits}"], made["scales"], *([made["zero_points"]] if len(made) > 2 else [])]
    outputs, depth = weight.codes.shape
    attrs = {"K": depth, "N": outputs, "bits": bits, "block_size": size, "accuracy_level": bench.accuracy_level}
    replace_product(bench, node, "MatMulNBits", inputs, attrs)


def _packed(codes: Array | Lazy, spec: Spec) -> Array | Lazy:
    """Return codes [N, K] as the operator takes them; those that are made when they are read are packed then too."""
    bits, size = spec.format.bits, spec.granularity.block_size
    shape = (codes.shape[0], -(-codes.shape[1] // size), size * bits // 8)
    return by_rows(lambda rows: pack_blocks(_unsigned(rows, spec), bits, size), codes, shape, np.uint8)


def _zero_points(zero: Array, spec: Spec) -> tuple[Array, str]:
    """Return zero points [N, n] as the operator takes them, packed or of the activations' type, and their ONNX type."""
    if spec.float_zero:
        return zero - np.float32(spec.format.qmin), "FLOAT"
    return pack_rows(_unsigned(zero, spec), spec.format.bits), "UINT8"


def _unsigned(codes: Array, spec: Spec) -> Array:
    if spec.format.kind != "int":
        return codes.astype(np.uint8)
    # Bytes wrap around, which makes -2^(bits-1) the code 0.
    return codes.astype(np.int8).view(np.uint8) + np.uint8(2 ** (spec.format.bits - 1))


def pack_blocks(codes: Array, bits: int, size: int) -> Array:
    """Pack codes [N, K] as MatMulNBits wants its input B: [N, n, B * bits / 8], the first code in the low bits.

    A last block that is cut short is filled up with the middle code.
    """
    missing = -codes.shape[1] % size
    filled = np.pad(codes, ((0, 0), (0, missing)), constant_values=2 ** (bits - 1)) if missing else codes
    return pack_rows(filled, bits).reshape(len(codes), -1, size * bits // 8)


def pack_rows(codes: Array, bits: int) -> Array:
    """Pack codes [N, n] of 4 or 8 bits into bytes, every row for itself: [N, ceil(n * bits / 8)]."""
    if bits == 8:
        return np.ascontiguousarray(codes, dtype=np.uint8)
    odd = codes.shape[1] % 2
    even = np.pad(codes.astype(np.uint8), ((0, 0), (0, odd))) if odd else codes.astype(np.uint8, copy=False)
    return np.ascontiguousarray(even[:, 0::2] | even[:, 1::2] << 4)
