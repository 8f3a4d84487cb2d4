"""What deployment targets ask of Q/DQ nodes, as far as the checker can see it in a file."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from ...calibrate.errors import RecipeError

EIGHT_BIT = frozenset({"INT8", "UINT8", "INT32"})
INTEGERS = EIGHT_BIT | {"INT16", "UINT16", "INT4", "UINT4"}
FLOAT8 = frozenset({"FLOAT8E4M3FN", "FLOAT8E5M2"})
ORT_TYPES = INTEGERS | FLOAT8 | {"FLOAT8E4M3FNUZ", "FLOAT8E5M2FNUZ", "INT2", "UINT2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetTraits:
    """Demands of one target.

    Attributes:
        types: ONNX types of codes that it runs.
        symmetric: Zero points must be 0.
        shared_scales: Operators that only move values need the same scale on both sides.
        blocks: Blocked scales run.
        positive_blocks: Scales of blocks of weights must be above 0 like all others.
        max_opset: Highest opset whose Q/DQ it runs; None when no ceiling is known.
    """

    types: frozenset[str]
    symmetric: bool = False
    shared_scales: bool = False
    blocks: bool = True
    positive_blocks: bool = False
    max_opset: int | None = None


TRAITS = {
    "ort-cpu": TargetTraits(types=ORT_TYPES, max_opset=25),
    "ort-cuda": TargetTraits(types=ORT_TYPES, max_opset=25),
    "openvino": TargetTraits(types=INTEGERS - {"UINT16"} | FLOAT8 | {"FLOAT4E2M1"}),
    "portable": TargetTraits(types=ORT_TYPES | {"FLOAT4E2M1"}, max_opset=25),
    "qnn": TargetTraits(types=INTEGERS, shared_scales=True, blocks=False, max_opset=25),
    "tensorrt": TargetTraits(
        types=frozenset({"INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1"}), symmetric=True, positive_blocks=True
    ),
}

TRAITS["ort-cpu-avx2"] = TRAITS["ort-cpu-vnni"] = TRAITS["ort-cpu"]


def traits_of(target: str) -> TargetTraits:
    """Return the demands of the target called ``target``.

    Raises:
        RecipeError: No such target.
    """
    if target in TRAITS:
        return TRAITS[target]
    near = difflib.get_close_matches(target, TRAITS, n=1)
    raise RecipeError(
        f"the checker knows no target {target!r}",
        expected=near[0] if near else None,
        do=f"use one of: {', '.join(sorted(TRAITS))}",
    )
