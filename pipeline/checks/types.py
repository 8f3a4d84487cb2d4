"""Rules about number types: what the opset allows, what belongs together, what the target runs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from . import rule
from .context import Context, Problem, Site, type_name

CONTRIB_TYPES = frozenset({"INT4", "UINT4", "INT8", "UINT8", "INT16", "UINT16", "INT32", "FLOAT8E4M3FN", "FLOAT8E5M2"})
"""Types of ONNX Runtime's own com.microsoft Q/DQ operators. Source: ONNX Runtime, ContribOperators."""

SEPARATE_SCALE_TYPE = 23
"""First opset in which the scale of a QuantizeLinear may have another type than the tensor."""

CEILING = 25
"""Highest opset whose Q/DQ operators ONNX Runtime has been seen to run."""


@rule("type-allowed", "error", do="raise the opset to the first that has the type, or use another type")
def type_allowed(context: Context) -> Iterator[Problem]:
    """The opset's Q/DQ operators take the type of the codes: per opset 10 8 bits, 19 float8, 21 4 and 16 bits, ...

    Source: ONNX QuantizeLinear and DequantizeLinear, type constraints of each version.
    """
    for site in context.sites:
        allowed = _allowed(site, "y_zero_point" if site.is_quantize else "x")
        if site.codes_type is not None and allowed and site.codes_type not in allowed:
            yield site.problem(f"{site.codes_type} at opset {site.scope.opset}", " ".join(sorted(allowed)))


@rule("scale-type", "error", do="store the scale in a type that the opset allows")
def scale_type(context: Context) -> Iterator[Problem]:
    """The scale has a type that the opset allows; up to opset 22 a QuantizeLinear's has that of the tensor.

    Source: ONNX QuantizeLinear and DequantizeLinear, type constraints of each version.
    """
    for site in context.sites:
        found, allowed = type_name(site.scale), _allowed(site, "y_scale" if site.is_quantize else "x_scale")
        if found is None or not allowed:
            continue
        if found not in allowed:
            yield site.problem(f"{found} scale at opset {site.scope.opset}", " ".join(sorted(allowed)), site.scale)
            continue
        real = site.x if site.is_quantize else site.y
        declared = type_name(real)
        bound = site.scope.opset < SEPARATE_SCALE_TYPE
        if bound and declared not in (None, "INT32") and declared != found and not site.is_contrib:
            yield site.problem(f"{found} scale", f"{declared}, the type of {real.name}", site.scale)


@rule("attribute-allowed", "error", do="raise the opset, or use one scale per tensor")
def attribute_allowed(context: Context) -> Iterator[Problem]:
    """The opset's Q/DQ operators have the attributes: ``axis`` from 13, ``block_size`` from 21 on.

    Source: ONNX QuantizeLinear and DequantizeLinear, attributes of each version.
    """
    for site in context.sites:
        schema = _schema(site)
        extra = [] if schema is None else sorted(set(site.node.attrs) - set(schema.attributes))
        if extra:
            yield site.problem(f"{', '.join(extra)} at opset {site.scope.opset}", "attributes that the opset knows")
        # Before axes existed, several scales had no meaning.
        elif schema is not None and "axis" not in schema.attributes and site.scale_shape and not site.per_tensor:
            yield site.problem(f"several scales at opset {site.scope.opset}", "one scale per tensor before opset 13")


@rule("zero-point-type", "error", do="store the zero point in the type of the codes")
def zero_point_type(context: Context) -> Iterator[Problem]:
    """The zero point has the type of the codes, which is also that of the tensor between Q and DQ.

    Source: ONNX QuantizeLinear: "y_zero_point and y must have the same type".
    """
    for site in context.sites:
        found = type_name(site.zero_point)
        codes = type_name(site.y) if site.is_quantize else type_name(site.x)
        if codes is None and not site.is_quantize and (producer := context.producer(site.x, "QuantizeLinear")):
            codes = producer.codes_type
        if found is not None and codes is not None and found != codes:
            yield site.problem(f"{found} zero point", f"{codes}, the type of the codes", site.zero_point)


@rule("zero-point-none", "error", do="leave the zero point out")
def zero_point_none(context: Context) -> Iterator[Problem]:
    """int32 and floating-point codes have no zero point other than 0.

    Source: ONNX DequantizeLinear: "no zero point in the case of dequantizing int32", "usually not used" for floats.
    """
    for site in context.sites:
        kind = site.codes_type or ""
        if site.zeros is not None and (kind == "INT32" or kind.startswith("FLOAT")) and _nonzero(site):
            yield site.problem(f"zero point other than 0 for {kind}", "0 or none", site.zero_point)


@rule("zero-point-symmetric", "error", do="quantize again for this target")
def zero_point_symmetric(context: Context) -> Iterator[Problem]:
    """Targets with symmetric arithmetic have zero points of 0.

    Source: NVIDIA TensorRT developer guide, explicit quantization.
    """
    if context.target is None or not context.target.symmetric:
        return
    for site in context.sites:
        if _nonzero(site):
            yield site.problem("zero point other than 0", "0 for this target", site.zero_point)


@rule("target-type", "error", do="quantize again for this target")
def target_type(context: Context) -> Iterator[Problem]:
    """The target runs the type of the codes, and blocks where blocks are used."""
    if context.target is None:
        return
    for site in context.sites:
        if site.codes_type is not None and site.codes_type not in context.target.types:
            yield site.problem(site.codes_type, " ".join(sorted(context.target.types)))
        if site.block_size and not context.target.blocks:
            yield site.problem(f"blocks of {site.block_size}", "per-tensor or per-channel scales for this target")


@rule("opset-ceiling", "warning", do="export or convert to a lower opset")
def opset_ceiling(context: Context) -> Iterator[Problem]:
    """The opset is one whose Q/DQ operators runtimes have kernels for: ONNX Runtime has none for those of opset 28."""
    ceiling = CEILING if context.target is None else context.target.max_opset
    for site in context.sites:
        since = getattr(_schema(site), "since_version", 0)
        if ceiling is not None and since > ceiling:
            yield site.problem(f"{site.node.op}-{since}", f"{site.node.op}-{ceiling} or lower")
            return


def _schema(site: Site) -> onnx.defs.OpSchema | None:
    if site.is_contrib or not onnx.defs.has(site.node.op, site.scope.opset):
        return None
    return onnx.defs.get_schema(site.node.op, site.scope.opset)


def _allowed(site: Site, operand: str) -> frozenset[str]:
    """Return the ONNX type names that the opset allows for an input; empty when nothing is known."""
    if site.is_contrib:
        return CONTRIB_TYPES if operand in ("x", "y_zero_point") else frozenset({"FLOAT", "FLOAT16"})
    schema = _schema(site)
    if schema is None:
        return frozenset()
    kind = next(i.type_str for i in schema.inputs if i.name == operand)
    constraints = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
    return frozenset(_element(allowed) for allowed in constraints.get(kind, [kind]))


def _element(type_text: str) -> str:
    """Return ``"INT8"`` for ``"tensor(int8)"``."""
    return type_text.removeprefix("tensor(").removesuffix(")").upper()


def _nonzero(site: Site) -> bool:
    return site.zeros is not None and bool(np.any(site.zeros.astype(np.float32) != 0))
