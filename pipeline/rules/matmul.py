"""MatMul and Gemm.

Weight layouts: MatMul ``B [.., in, out]``; Gemm ``B [in, out]``, or ``[out, in]`` when transB is set.
Source: ONNX operators MatMul-13 and Gemm-13.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from . import OpRule, add


def _matmul_out(_node: gs.Node, rank: int) -> int | None:
    # The runtimes take one scale per column of a plain matrix; a stack of matrices gets one scale.
    return 1 if rank == 2 else None


def _matmul_in(_node: gs.Node, rank: int) -> int | None:
    return 0 if rank == 2 else None


def _gemm_out(node: gs.Node, _rank: int) -> int | None:
    return 0 if node.attrs.get("transB", 0) else 1


def _gemm_in(node: gs.Node, _rank: int) -> int | None:
    return 1 if node.attrs.get("transB", 0) else 0


_REASON = "multiplies by a weight: runs on codes"

add(
    OpRule(
        op="MatMul",
        kind="weighted",
        data=(0, 1),
        weight=1,
        out_axis=_matmul_out,
        in_axis=_matmul_in,
        reason=_REASON,
    )
)
add(
    OpRule(
        op="Gemm",
        kind="weighted",
        data=(0, 1),
        weight=1,
        bias=2,
        out_axis=_gemm_out,
        in_axis=_gemm_in,
        reason=_REASON,
    )
)
