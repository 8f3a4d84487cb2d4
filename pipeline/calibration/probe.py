"""A session that hands out the inner tensors of a model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx

from ...calibrate.errors import DataError
from ..data import Batch
from ..graph import Model
from ..graph.constants import FileValues
from ..graph.exporter import Skeleton, skeleton
from ..graph.protos import location_of, refer
from ..session import SessionExtras, make_session, ort_errors, translate
from .expose import Exposed, expose
from .job import Job
from .limits import survey
from .moved import moved
from .native import CountersOnDevice, countable, counters_of

IN_MEMORY = 3 * 2**29
"""Bytes of a model up to which a runtime may hold its weights, packed for its kernels."""

_FLOATS = {
    "tensor(float)": onnx.TensorProto.FLOAT,
    "tensor(float16)": onnx.TensorProto.FLOAT16,
    "tensor(bfloat16)": onnx.TensorProto.BFLOAT16,
    "tensor(double)": onnx.TensorProto.DOUBLE,
}


class Probe:
    """Runs a model and yields the tensors that are watched, one by one.

    Args:
        model: The model; not changed. Weights in data files stay there; those of a large model are not packed either.
        job: What to watch, and how to run.

    Attributes:
        watched: The tensors that can be had, in topological order.
        counters: Of the tensors that are counted inside the graph and not yielded; None when there are none.
        not_covered: Tensors that cannot be had, and why.
        lifted: Watched tensors that come out of a body flat: their axes are gone.
        same: Watched tensors that are not had because they hold the values of another one, and which.
        sentinels: Magnitude from which finite values are masks, by watched tensor that is had.
        lanes: How many threads may `run` at a time.

    Raises:
        QpipeError: As `make_session`.
    """

    def __init__(self, model: Model, job: Job) -> None:
        built = skeleton(model)
        mapped = built.nbytes > IN_MEMORY
        if mapped or job.device != "cpu" or any(detail.gram for detail in job.details.values()):
            # Lanes would hold more than activations. Matrices of one batch are as large as those of all.
            job = dataclasses.replace(job, lanes=1)
        graph = built.proto.graph
        own = [entry.name for entry in graph.output]
        # Before the session, which computes what does not depend on the inputs.
        known = survey(built.proto, {}, job.tensor_bytes)
        self.same = moved(graph, job.tensors, job.details)
        counted = tuple(name for name in job.tensors if name not in self.same)
        inside = countable(built.proto, dataclasses.replace(job, tensors=counted), known)
        exposed = expose(built.proto, job.tensors, {*inside, *self.same})
        self._skeleton = built.proto.SerializeToString()
        self._taken = {entry.name for entry in graph.input}
        self.sentinels = {name: job.sentinel_of(known[name].onnx_type) for name in inside}
        self.counters = counters_of(built.proto, job, self.sentinels)
        config: dict[str, str] = {}
        folder = place_weights(built)
        if folder is not None:
            config["session.model_external_initializers_file_folder_path"] = str(folder)
        self.lanes = 1 if isinstance(self.counters, CountersOnDevice) else job.lanes  # those count one batch at a time
        if self.lanes > 1:
            config["session.intra_op.allow_spinning"] = "0"  # threads that wait busily would take cores from the others
        data = built.proto.SerializeToString()
        del built, graph
        extras = SessionExtras(config=config, op_libraries=job.op_libraries, mapped=mapped, ragged=True, eager=True)
        self._session = make_session(data, exact=mapped, device=job.device, threads=job.session_threads, extras=extras)
        types = {entry.name: entry.type for entry in self._session.get_outputs()}
        types |= {entry.name: entry.type for entry in self._session.get_inputs()}
        wrong = _without_floats(exposed, types)
        wrong |= {name: wrong[source] for name, source in self.same.items() if source in wrong}
        self.same = {name: source for name, source in self.same.items() if name not in wrong}
        self.not_covered = {**exposed.not_covered, **wrong}
        self.lifted = exposed.lifted
        self._inputs = [name for name in exposed.inputs if name not in wrong]
        self._outputs = {output: name for name, output in exposed.outputs.items() if name not in wrong}
        self._own = [name for name in own if types[name] in _FLOATS]
        self.watched = [name for name in exposed.order if name not in wrong]
        for name in self.watched:
            if name not in self.sentinels and name not in self.same:
                self.sentinels[name] = job.sentinel_of(_FLOATS[types[exposed.outputs.get(name, name)]])

    def run(self, batch: Batch) -> Iterator[tuple[str, npt.NDArray[Any], bool]]:
        """Run the model on a batch and yield its tensors; each is let go before the next.

        Yields:
            Name, values, and whether the name is an output of the model rather than a watched tensor. A tensor that
            is both comes twice.

        Raises:
            DataError: The batch does not fit the model.
            ModelError: The model fails on it.
        """
        for name in self._inputs:
            yield name, batch[name], False
        names = list(dict.fromkeys([*self._own, *self._outputs]))
        try:
            arrays = self._run(names, batch)
        except ort_errors() as error:
            raise _run_error(error, batch) from error
        own = set(self._own)
        for index, name in enumerate(names):
            array, arrays[index] = arrays[index], None
            if name in own:
                yield name, array, True
            if name in self._outputs:
                yield self._outputs[name], array, False

    def _run(self, names: list[str], batch: Batch) -> list[Any]:
        if self.counters is not None:
            return self.counters.run(self._session, names, batch)
        return list(self._session.run(names, batch))

    def skeleton(self) -> onnx.ModelProto:
        """Return the model that runs, without large weights."""
        return onnx.ModelProto.FromString(self._skeleton)

    @property
    def fetched(self) -> list[str]:
        """Names of the graph outputs that one run copies out."""
        return list(dict.fromkeys([*self._own, *self._outputs]))

    @property
    def can_split(self) -> bool:
        """Whether every input takes batches of any size."""
        inputs = [entry for entry in self._session.get_inputs() if entry.name in self._taken]
        return all(entry.shape and not isinstance(entry.shape[0], int) for entry in inputs)


def _without_floats(exposed: Exposed, types: Mapping[str, str]) -> dict[str, str]:
    named = {**{name: name for name in exposed.inputs}, **exposed.outputs}
    return {name: f"it is a {types[out]}" for name, out in named.items() if types[out] not in _FLOATS}


def place_weights(built: Skeleton) -> Path | None:
    """Fill the weights in but for those that lie in data files; return the folder of those files, None without any."""
    outside = [t for t in built.proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    weights = [(tensor, built.weights[location_of(tensor)]) for tensor in outside]
    files = [(tensor, values.source) for tensor, values in weights if isinstance(values, FileValues)]
    folder = Path(os.path.commonpath([source.path.parent for _, source in files])) if files else None
    for tensor, source in files:
        path = source.path.relative_to(folder).as_posix()
        refer(tensor, location=path, offset=source.offset, length=source.length)
    built.fill()
    return folder


def _run_error(error: Exception, batch: Batch) -> Exception:
    if type(error).__name__ != "InvalidArgument":
        return translate(error, where="calibration run")
    shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in batch.items())
    return DataError("a batch does not fit the model", found=shapes, expected=str(error), do="qpipe inspect the model")
