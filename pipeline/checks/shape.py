"""Rules about axes and lengths: which elements share a scale.

Letters: ``x [d0..dn]`` is the quantized tensor, ``B`` the block size.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import rule
from .context import Context, Problem, Shape, Site, shape_of, text


@rule("axis-range", "error", do="set axis to the dimension that holds the channels")
def axis_range(context: Context) -> Iterator[Problem]:
    """The axis of per-channel and blocked scales exists: ``-r <= axis < r`` for a tensor of rank r.

    Source: ONNX QuantizeLinear, attribute ``axis``.
    """
    for site in context.sites:
        rank = None if site.shape is None else len(site.shape)
        if rank is not None and not site.per_tensor and not -rank <= site.axis < rank:
            yield site.problem(f"axis {site.axis}", f"{-rank} to {rank - 1} for shape {text(site.shape)}")


@rule("axis-missing", "warning", do="write the axis down")
def axis_missing(context: Context) -> Iterator[Problem]:
    """Several scales come with a written axis: left out it means 1, which runtimes and readers take differently."""
    for site in context.sites:
        if site.scale_shape and not site.per_tensor and not site.has_axis:
            yield site.problem(f"scales of shape {text(site.scale_shape)} and no axis", "the attribute axis")


@rule("scale-length", "error", do="give one scale, or one per index of the axis")
def scale_length(context: Context) -> Iterator[Problem]:
    """Unblocked scales are one number, or one per index of the axis.

    Source: ONNX QuantizeLinear: "a scalar for per-tensor quantization, a 1-D tensor for per-axis".
    """
    for site in context.sites:
        scale = site.scale_shape
        if scale is None or site.block_size or site.per_tensor:
            continue
        if len(scale) != 1:
            yield site.problem(f"scales of shape {text(scale)} without block_size", "a scalar or one axis", site.scale)
        elif (length := _dim(site.shape, site.axis)) is not None and scale[0] not in (None, length):
            expected = f"1, or {length} as axis {site.axis} of {text(site.shape)} has"
            yield site.problem(f"{scale[0]} scales", expected, site.scale)


@rule("block-shape", "error", do="give ceil(d/B) scales along the axis and one per index of every other dimension")
def block_shape(context: Context) -> Iterator[Problem]:
    """Blocked scales have the shape of the tensor with ``ceil(d/B)`` in place of ``d`` along the axis.

    Source: ONNX QuantizeLinear-21, attribute ``block_size``.
    """
    for site in context.sites:
        if site.block_size and site.scale_shape is not None and site.shape is not None:
            wanted = _blocked(site)
            if wanted is not None and not _fits(site.scale_shape, wanted):
                yield site.problem(f"scales of shape {text(site.scale_shape)}", text(wanted), site.scale)


@rule("block-size", "error", do="use a block size of 1 or more, or leave it out")
def block_size(context: Context) -> Iterator[Problem]:
    """A block size is not negative.

    Source: ONNX QuantizeLinear-21, attribute ``block_size``.
    """
    for site in context.sites:
        if site.block_size < 0:
            yield site.problem(f"block_size {site.block_size}", "0 or more")


@rule("zero-point-shape", "error", do="give the zero point the shape of the scale")
def zero_point_shape(context: Context) -> Iterator[Problem]:
    """The zero point has the shape of the scale; one number counts as ``[]`` and as ``[1]``.

    Source: ONNX QuantizeLinear: "shape must match y_scale".
    """
    for site in context.sites:
        if site.zero_point is None or site.scale_shape is None:
            continue
        zero = shape_of(site.zero_point)
        single = zero is not None and all(d == 1 for d in zero) and site.per_tensor
        if zero is not None and not single and not _fits(zero, site.scale_shape):
            yield site.problem(f"zero points of shape {text(zero)}", text(site.scale_shape), site.zero_point)


def _dim(shape: Shape | None, axis: int) -> int | None:
    if shape is None or not -len(shape) <= axis < len(shape):
        return None
    return shape[axis]


def _blocked(site: Site) -> Shape | None:
    shape = site.shape
    if shape is None or site.block_size < 0 or not -len(shape) <= site.axis < len(shape):
        return None
    axis = site.axis % len(shape)
    return tuple(d if i != axis or d is None else -(-d // site.block_size) for i, d in enumerate(shape))


def _fits(found: Shape, wanted: Shape) -> bool:
    same = (a is None or b is None or a == b for a, b in zip(found, wanted, strict=False))
    return len(found) == len(wanted) and all(same)
