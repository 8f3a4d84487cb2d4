"""Validate: run the float model and the quantized one over data, side by side, and say how far apart they are.

The quantized model runs twice: in *exact* semantics, every operator as ONNX defines it, which judges the model; and
*as deployed*, with ONNX Runtime's fused integer kernels, which judges model and machine together and is what is timed.
Polygraphy's comparator streams the batches through all sessions in turn; nothing is kept but sums.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy.typing as npt

from ...calibrate.errors import DataError, ModelError, RecipeError
from .. import environment
from ..accuracy import Comparison
from ..data import InputInfo, conform, inputs_of, samples_in
from ..graph import EXTERNAL_THRESHOLD, Model, load, to_proto
from ..graph.scratch import keep
from ..inspect import file_bytes
from ..layers import Layer, common_layers, score_outputs, with_outputs
from ..operator_check import OperatorRow, compare_operators, operator_notes, operators_table
from ..qdq_check import check_qdq
from ..recorder import Recorder
from ..report import Report
from ..rescaling import Rescaling
from ..session import SessionExtras, int8_saturates, make_session, ort_errors, session_facts
from ..side_by_side import side_by_side
from ..validation import (
    DEPLOYED,
    EXACT,
    FLOAT,
    SEMANTICS,
    Accuracies,
    ValidateOptions,
    findings_table,
    latency_table,
    layer_charts,
    layer_rows,
    layers_table,
    nan_first,
    outputs_table,
    speedup,
    verdicts,
)
from .lower import runnable

if TYPE_CHECKING:
    import onnx
    import onnxruntime

Batch = Mapping[str, npt.NDArray[Any]]

LAYERS = "float layers"

KEPT_BATCHES = 2
"""Batches that are kept for timing, and for comparing qpipe's operators with their numpy reference."""


_DEFAULTS = ValidateOptions()


def validate(
    float_path: Path, quantized_path: Path, batches: Iterable[Batch], options: ValidateOptions = _DEFAULTS
) -> Report:
    """Compare a quantized model with its float model.

    Args:
        float_path: The float model.
        quantized_path: The quantized one; it may take fewer inputs.
        batches: Inputs by name; sizes may vary. Iterated once.
        options: How.

    Returns:
        A report with the tables ``outputs``, ``latency``, and ``layers``, ``operators`` and ``findings`` where there
        are any; `Report.require` raises when thresholds were not kept.

    Raises:
        DataError: There are no batches, or they do not fit.
        ModelError: A model is broken, or the two have no output in common.
        RecipeError: A threshold, an output or a run was named that does not exist here.
        EnvironmentError_: ONNX Runtime, a device or a library is missing.
        WriteError: Inputs or outputs cannot be saved.
    """
    pair = _Pair.load(Path(float_path), Path(quantized_path), options)
    run = (_LayerByLayer if options.layer_by_layer else _Run)(pair, options)
    with contextlib.ExitStack() as files:
        run.record(files)
        run.over(batches)
    if options.rounds and run.sessions and not run.is_large:
        run.time()
    return _report(pair, run, options)


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """Both models and what they have in common."""

    paths: Mapping[str, Path]
    models: Mapping[str, Model]
    inputs: list[InputInfo]
    outputs: tuple[str, ...]
    scores: Mapping[str, str]
    layers: list[Layer]

    @classmethod
    def load(cls, float_path: Path, quantized_path: Path, options: ValidateOptions) -> _Pair:
        first, second = (load(path, allow_hardlinks=options.allow_hardlinks) for path in (float_path, quantized_path))
        theirs = {tensor.name for tensor in second.graph.outputs}
        outputs = tuple(tensor.name for tensor in first.graph.outputs if tensor.name in theirs)
        if not outputs:
            raise ModelError(
                "the two models have no output in common",
                where=f"{float_path} and {quantized_path}",
                found=", ".join(sorted(theirs)),
                expected=", ".join(tensor.name for tensor in first.graph.outputs),
            )
        unknown = set(options.logits) - set(outputs)
        if unknown:
            raise RecipeError(f"no output is called {sorted(unknown)[0]!r}", expected=", ".join(outputs))
        return cls(
            paths={FLOAT: float_path, EXACT: quantized_path, DEPLOYED: quantized_path, LAYERS: float_path},
            models={FLOAT: first, EXACT: second, LAYERS: first},
            inputs=inputs_of(first.graph),
            outputs=outputs,
            scores=score_outputs(first, options.logits),
            layers=common_layers(first, second) if options.per_layer or options.layer_by_layer else [],
        )


class _Run:
    """The sessions, and what was gathered from them."""

    semantics: ClassVar[tuple[str, ...]] = SEMANTICS

    def __init__(self, pair: _Pair, options: ValidateOptions) -> None:
        self._pair, self._options = pair, options
        self.is_large = max(file_bytes(model) for model in pair.models.values()) > EXTERNAL_THRESHOLD
        self.sessions = {name: self._session(name) for name in self._names()}
        self.outputs = {
            (name, semantics): Comparison(pair.scores.get(name))
            for name in pair.outputs
            for semantics in self.semantics
        }
        self.layers = {layer: (Comparison(), Rescaling()) for layer in pair.layers}
        self.milliseconds: dict[str, list[float]] = {}
        self.operators: list[OperatorRow] = []
        self.batches = self.samples = 0
        self._kept: list[Batch] = []
        self._texts: dict[str, npt.NDArray[Any]] = {}
        self._inputs: Recorder | None = None
        self._results: Recorder | None = None

    def record(self, files: contextlib.ExitStack) -> None:
        """Open the files that were asked for; ``files`` puts them in place in the end."""
        options = self._options
        if options.save_inputs is not None:
            self._inputs = files.enter_context(Recorder(options.save_inputs, force=options.force))
        if options.save_outputs is not None:
            recorder = Recorder(options.save_outputs, runner=options.saved_run, force=options.force)
            self._results = files.enter_context(recorder)

    def over(self, batches: Iterable[Batch]) -> None:
        """Run all batches through all sessions, in turn."""
        from polygraphy.comparator import Comparator
        from polygraphy.exception import PolygraphyException
        from polygraphy.logger import G_LOGGER

        from ..runners import SessionRunner

        runners = [SessionRunner(session, name, self._texts) for name, session in self.sessions.items()]
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
            try:
                for step in Comparator.run(runners, self._fitting(batches), streaming=True):
                    self._gather({name: results[0] for name, results in step.items()})
            except (*ort_errors(), PolygraphyException) as error:
                raise _run_error(error) from error
        options = self._options
        self.operators = compare_operators(
            self._pair.models[EXACT], self._kept, device=options.device, threads=options.threads
        )

    def time(self) -> None:
        """Time float and deployed model on the batches that were kept, in turn; the first round only warms up."""
        times: dict[str, list[float]] = {FLOAT: [], DEPLOYED: []}
        for turn in range(self._options.rounds + 1):
            for name, taken in times.items():
                session = self.sessions[name]
                wanted = {entry.name for entry in session.get_inputs()}
                feeds = [{key: batch[key] for key in wanted} for batch in self._kept]
                start = time.perf_counter()
                for feed in feeds:
                    session.run(None, feed)
                if turn:
                    taken.append(1000 * (time.perf_counter() - start) / len(feeds))
        self.milliseconds = times

    def _names(self) -> tuple[str, ...]:
        return (FLOAT, EXACT, DEPLOYED, *((LAYERS,) if self._pair.layers else ()))

    def _session(self, name: str) -> onnxruntime.InferenceSession:
        options, path = self._options, self._pair.paths[name]
        model = self._pair.models.get(name, self._pair.models[EXACT])
        older = runnable(model)
        source: Path | bytes | onnx.ModelProto = path if older is model else to_proto(older)
        config: dict[str, str] = {}
        if self._pair.layers and name in (EXACT, LAYERS):
            names = (layer.tensor if name == LAYERS else layer.quantized for layer in self._pair.layers)
            source, config = with_outputs(self._pair.models[name], names)
        return make_session(
            source,
            exact=name in (EXACT, LAYERS) or (self.is_large and name == FLOAT),
            device=options.device,
            threads=options.threads,
            extras=SessionExtras(config=config, op_libraries=options.op_libraries, mapped=self.is_large),
        )

    def _fitting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for given in batches:
            batch = conform(given, self._pair.inputs)
            if self.batches == 0:
                self._check_inputs(batch)
            if len(self._kept) < KEPT_BATCHES:
                self._kept.append(batch)
            if self._inputs is not None:
                self._inputs.append(batch)
            self._texts.update({name: array for name, array in batch.items() if array.dtype.kind in "OUS"})
            yield batch
            self.batches += 1
            self.samples += samples_in(batch)
            if self._options.progress is not None:
                self._options.progress(self.samples)
        if not self.samples:
            raise DataError(
                "the data gave no samples",
                do="a generator that was iterated before is empty the second time: give a fresh one",
            )

    def _check_inputs(self, batch: Batch) -> None:
        for entry in inputs_of(self._pair.models[EXACT].graph):
            if entry.name not in batch:
                raise ModelError(
                    f"the quantized model has an input {entry.name!r} that the float model has not",
                    where=str(self._pair.paths[EXACT]),
                    expected=", ".join(batch),
                )

    def _gather(self, results: Mapping[str, Any]) -> None:
        for (name, semantics), comparison in self.outputs.items():
            comparison.update(results[FLOAT][name], results[semantics][name])
        for layer, gatherers in self.layers.items():
            for gatherer in gatherers:
                gatherer.update(results[LAYERS][layer.tensor], results[EXACT][layer.quantized])
        if self._results is not None:
            saved = results[self._options.saved_run]
            self._results.append({name: saved[name] for name in self._pair.outputs})


class _LayerByLayer(_Run):
    """The same without sessions of whole models."""

    semantics = (EXACT,)

    def record(self, files: contextlib.ExitStack) -> None:  # noqa: ARG002 - nothing is opened
        """Refuse what needs whole models.

        Raises:
            RecipeError: Inputs or outputs are to be saved, or the run as deployed is to be judged.
        """
        options = self._options
        asked = {"--save-inputs": options.save_inputs, "--save-outputs": options.save_outputs}
        asked["--judge deployed"] = DEPLOYED if DEPLOYED in options.judge else None
        for flag, value in asked.items():
            if value is not None:
                raise RecipeError(f"{flag} needs the whole models", do="leave it out, or --layer-by-layer")

    def over(self, batches: Iterable[Batch]) -> None:
        """Run all batches through one layer after the other of both models."""
        pair, options = self._pair, self._options
        fed = [{name: keep(array) for name, array in batch.items()} for batch in self._fitting(batches)]
        gatherers: dict[tuple[str, str], list[Comparison | Rescaling]] = {}
        for layer, found in self.layers.items():
            gatherers.setdefault((layer.tensor, layer.quantized), []).extend(found)
        for (name, _), comparison in self.outputs.items():
            gatherers.setdefault((name, name), []).append(comparison)
        models = (runnable(pair.models[FLOAT]), runnable(pair.models[EXACT]))
        where = {"device": options.device, "op_libraries": options.op_libraries}
        for tensors, was, now in side_by_side(models, list(gatherers), fed, **where):
            for gatherer in gatherers[tensors]:
                gatherer.update(was, now)

    def _names(self) -> tuple[str, ...]:
        return ()


def _run_error(error: Exception) -> DataError:
    return DataError("a model cannot run this data", found=str(error), do="look at both models with qpipe inspect")


def _report(pair: _Pair, run: _Run, options: ValidateOptions) -> Report:
    accuracies = {key: comparison.result() for key, comparison in run.outputs.items()}
    layers = layer_rows(
        {layer: (comparison.result(), rescaling.noise()) for layer, (comparison, rescaling) in run.layers.items()}
    )
    findings = check_qdq(pair.models[EXACT])
    tables = [outputs_table(accuracies)]
    if run.milliseconds:
        tables.append(latency_table(run.milliseconds))
    if options.per_layer or options.layer_by_layer:
        tables.append(layers_table(layers))
    if run.operators:
        tables.append(operators_table(run.operators))
    if findings:
        tables.append(findings_table([finding.to_dict() for finding in findings]))
    return Report(
        kind="validate",
        title=f"{pair.paths[FLOAT].name} against {pair.paths[EXACT].name}",
        totals=_totals(pair, run, accuracies),
        tables=tuple(tables),
        charts=layer_charts(layers),
        verdicts=tuple(verdicts(accuracies, options.thresholds, options.judge)),
        notes=(*_notes(pair, run, accuracies, options), *operator_notes(run.operators)),
        environment={
            **environment.brief(),
            "sessions": {name: session_facts(session) for name, session in run.sessions.items()},
        },
        recipe=_recipe(pair.models[EXACT].metadata),
    )


def _totals(pair: _Pair, run: _Run, accuracies: Accuracies) -> dict[str, Any]:
    sizes = {name: file_bytes(pair.models[name]) for name in (FLOAT, EXACT)}
    exact = [accuracy for (_, semantics), accuracy in accuracies.items() if semantics == EXACT]
    return {
        "samples": run.samples,
        "batches": run.batches,
        "float_bytes": sizes[FLOAT],
        "quantized_bytes": sizes[EXACT],
        "size_ratio": sizes[FLOAT] / sizes[EXACT],
        "speedup_ratio": speedup(run.milliseconds) if run.milliseconds else None,
        "worst_sqnr_db": min((a.sqnr_db for a in exact), key=nan_first),
        "worst_cosine": min((a.cosine for a in exact), key=nan_first),
    }


def _notes(pair: _Pair, run: _Run, accuracies: Accuracies, options: ValidateOptions) -> Iterator[str]:
    quantized = pair.models[EXACT]
    if options.layer_by_layer:
        yield "one layer of each model was in memory at a time: in exact semantics, and latency was not measured"
    elif run.is_large:
        yield "weights stayed in their files, to save memory, and latency was not measured: qpipe bench does that"
    if int8_saturates() and any(node.op == "QuantizeLinear" for node in quantized.graph.nodes):
        yield "this CPU has no VNNI: fused int8 kernels clip sums, so the deployed figures hold for such CPUs only"
    if quantized.metadata.get("qpipe.calibration") == "random":
        yield "the quantized model was calibrated with random data: its ranges say nothing about real inputs"
    for (name, semantics), accuracy in accuracies.items():
        if accuracy.nonfinite:
            yield f"output {name}, {semantics}: {accuracy.nonfinite} values are not finite where the float model's are"
        if accuracy.mismatched:
            yield f"output {name}, {semantics}: {accuracy.mismatched} batches gave another shape and were not compared"


def _recipe(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return what the model says about how it was made: its metadata under ``qpipe.``."""
    own = {key.removeprefix("qpipe."): value for key, value in metadata.items() if key.startswith("qpipe.")}
    with contextlib.suppress(KeyError, json.JSONDecodeError):
        own["recipe"] = json.loads(own["recipe"])
    return own
