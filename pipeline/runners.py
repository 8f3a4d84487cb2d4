"""Sessions in polygraphy's comparator, which has words for tensors of numbers only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata

if TYPE_CHECKING:
    import onnxruntime


class SessionRunner(OnnxrtRunner):  # type: ignore[misc]
    """Runs a session on batches that fit it already.

    An output that is no tensor comes as a one-dimensional array of objects: the elements of a sequence, or nothing
    where an optional holds nothing.

    Args:
        session: What runs.
        name: What the run is called.
        texts: Arrays of strings of the batch at hand, by input; whoever feeds the comparator keeps it up to date.
    """

    def __init__(self, session: onnxruntime.InferenceSession, name: str, texts: Mapping[str, npt.NDArray[Any]]) -> None:
        super().__init__(lambda: session, name=name)
        self._given = texts
        self._texts = [entry.name for entry in session.get_inputs() if entry.type == "tensor(string)"]

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Return types and shapes of the inputs that polygraphy feeds: all but strings, of which it takes none."""
        found = TensorMetadata()
        for name, (dtype, shape) in super().get_input_metadata_impl().items():
            if name not in self._texts:
                found.add(name, dtype, shape)
        return found

    def infer_impl(self, feed_dict: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs by name."""
        found = super().infer_impl({**feed_dict, **{name: self._given[name] for name in self._texts}})
        return {
            name: value if isinstance(value, np.ndarray) else _objects(value or []) for name, value in found.items()
        }


def _objects(values: list[Any]) -> npt.NDArray[Any]:
    array = np.empty(len(values), object)
    for index, value in enumerate(values):  # at once, numpy would join arrays of one shape
        array[index] = value
    return array
