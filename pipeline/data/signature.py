"""What a model takes, and whether a batch fits it.

Shapes: an `InputInfo` shape holds a size, a name or None per axis; a name or None means any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ...calibrate.errors import DataError, UnsupportedError

Array = npt.NDArray[Any]
Batch = dict[str, Array]
Warn = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputInfo:
    """One input of a model.

    Attributes:
        name: Its name.
        dtype: numpy or ml_dtypes type; object for strings.
        shape: Size, name or None (any size) per axis; None when even the rank is open.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...] | None

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.name} {self.dtype}[...]"
        return f"{self.name} {self.dtype}[{','.join('?' if dim is None else str(dim) for dim in self.shape)}]"

    @property
    def batch(self) -> int | None:
        """Size of the first axis when it is fixed."""
        first = self.shape[0] if self.shape else None
        return first if isinstance(first, int) else None


def inputs_of(graph: Any) -> list[InputInfo]:
    """Return the inputs of a graphsurgeon graph.

    Raises:
        UnsupportedError: An input is no tensor (a sequence, an optional), or has no type.
    """
    return [_input(tensor) for tensor in graph.inputs]


def _input(tensor: Any) -> InputInfo:
    if tensor.dtype is None:
        raise UnsupportedError(
            f"input {tensor.name!r} is no tensor of a known type",
            found=str(tensor.type),
            expected="tensors",
            do="export the model with tensors as inputs",
        )
    shape = None if tensor.shape is None else tuple(tensor.shape)
    return InputInfo(name=tensor.name, dtype=np.dtype(tensor.dtype), shape=shape)


def to_array(value: Any) -> Array:
    """Return ``value`` as an array; a torch tensor is detached and brought to the CPU first.

    Raises:
        DataError: It is no array of numbers, booleans or strings.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise DataError("a value of a batch is no array", found=str(error), expected="arrays of one shape") from error
    if array.dtype == object and not all(isinstance(item, str | bytes) for item in array.reshape(-1)):
        raise DataError("a value of a batch is no array", found=f"{type(value).__name__} of Python objects")
    return array


def conform(
    batch: Mapping[str, Any],
    inputs: Sequence[InputInfo],
    mapping: Mapping[str, str] | None = None,
    *,
    batchify: bool = False,
    warn: Warn | None = None,
) -> Batch:
    """Return ``batch`` as the model takes it.

    Names are mapped; types are cast where that is safe (float to float, integers that fit), with a warning each.

    Args:
        batch: Array (or torch tensor, or list) by name.
        inputs: What the model takes.
        mapping: Name in the data -> name of the model's input.
        batchify: Add a first axis of size 1 to arrays that lack exactly one axis.
        warn: Told about every cast, in words that are the same for the same cast.

    Raises:
        DataError: A name is missing or too much, or a type, rank or size is wrong; shows the model's side and the
            data's side.
    """
    renamed = {(mapping or {}).get(name, name): to_array(value) for name, value in batch.items()}
    expected = {info.name: info for info in inputs}
    for wrong, text in (
        ([name for name in expected if name not in renamed], "has no array for input"),
        ([name for name in renamed if name not in expected], "has an array that is no input of the model:"),
    ):
        if wrong:
            raise _mismatch(f"the data {text} {wrong[0]!r}", inputs, renamed, _rename_hint(expected, renamed))
    fitted: Batch = {}
    for name, info in expected.items():
        array = renamed[name]
        if batchify and info.shape is not None and array.ndim == len(info.shape) - 1:
            array = array[np.newaxis]
        problem, remedy = _shape_problem(array, info)
        if problem:
            raise _mismatch(f"input {name!r} {problem}", inputs, renamed, remedy)
        cast = _cast(array, info, warn)
        if cast is None:
            remedy = f"convert {name!r} to {info.dtype} in the data yourself; the values would change meaning"
            raise _mismatch(f"input {name!r} has type {array.dtype}, not {info.dtype}", inputs, renamed, remedy)
        fitted[name] = cast
    return fitted


def _mismatch(what: str, inputs: Iterable[InputInfo], given: Mapping[str, Array], remedy: str) -> DataError:
    shown = [f"{name} {array.dtype}[{','.join(map(str, array.shape))}]" for name, array in given.items()]
    return DataError(
        what, found=", ".join(shown) or "nothing", expected=", ".join(str(info) for info in inputs), do=remedy
    )


def _rename_hint(expected: Mapping[str, InputInfo], given: Mapping[str, Array]) -> str:
    spare = [name for name in given if name not in expected]
    missing = [name for name in expected if name not in given]
    pairs = [f"--map {old}={new}" for old, new in zip(spare, missing, strict=False)]
    if pairs:
        return f"rename the keys in the data, or {' '.join(pairs)}"
    return f"remove {', '.join(spare)} from the data" if spare else f"add {', '.join(missing)} to the data"


def _shape_problem(array: Array, info: InputInfo) -> tuple[str, str]:
    if info.shape is None:
        return "", ""
    if array.ndim != len(info.shape):
        lacks_batch = array.ndim == len(info.shape) - 1
        remedy = "--batchify adds the missing first axis" if lacks_batch else "reshape the data to the model's rank"
        return f"has {array.ndim} axes, not {len(info.shape)}", remedy
    for axis, (size, dim) in enumerate(zip(array.shape, info.shape, strict=True)):
        if isinstance(dim, int) and dim >= 0 and size != dim:
            remedy = f"give the data --batch {dim}" if axis == 0 else "pad, cut or resize the data to the model's size"
            return f"has size {size} on axis {axis}, not {dim}", remedy
    return "", ""


def _kind(dtype: np.dtype[Any]) -> str:
    """Return "f" for floats, "i" for integers, "b" for booleans, "s" for strings, else numpy's own letter."""
    if dtype.kind in "fc":
        return dtype.kind
    if dtype.kind in "OUS":
        return "s"
    if dtype.kind in "iu" or dtype.name in ("int2", "uint2", "int4", "uint4"):
        return "i"
    return "f" if dtype.name.startswith(("float", "bfloat")) else dtype.kind


def _cast(array: Array, info: InputInfo, warn: Warn | None) -> Array | None:
    """Return ``array`` in the model's type, None when that would change what the values mean."""
    have, want = array.dtype, info.dtype
    if have == want or (_kind(have) == _kind(want) == "s"):
        return array
    if _kind(have) != _kind(want) or _kind(want) not in "fi":
        return None
    with np.errstate(over="ignore"):
        cast = array.astype(want)
    if _kind(want) == "i":
        kept = bool(np.array_equal(cast.astype(have), array)) and _same_sign(cast, array)
    else:
        kept = bool(np.array_equal(np.isfinite(cast.astype(np.float64)), np.isfinite(array.astype(np.float64))))
    if not kept:
        return None
    if warn is not None:
        warn(f"input {info.name!r}: {have} cast to {want}")
    return cast


def _same_sign(one: Array, other: Array) -> bool:
    limits = np.iinfo if one.dtype.kind in "iu" else ml_dtypes.iinfo
    low, high = limits(one.dtype).min, limits(one.dtype).max
    return one.size == 0 or (int(low) <= int(other.min()) and int(other.max()) <= int(high))
