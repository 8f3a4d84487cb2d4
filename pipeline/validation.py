"""What a validation is asked for, and its tables: outputs, latency, layers, thresholds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..calibrate.errors import RecipeError
from .accuracy import Accuracy
from .charts import bars_svg
from .layers import Layer
from .report import Chart, Column, Table, Verdict

FLOAT, EXACT, DEPLOYED = "float", "exact", "deployed"
SEMANTICS = (EXACT, DEPLOYED)
WORST_LAYERS = 24

Accuracies = Mapping[tuple[str, str], Accuracy]
"""Accuracy by output and semantics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What every output has to keep; None is not asked for.

    Attributes:
        min_cosine: Cosine over everything.
        min_sample_cosine: Lowest cosine of a sample.
        min_sqnr_db: Signal to noise ratio [dB].
        max_abs: Largest difference.
        min_top1: Share of positions with the same largest score, 0..1.
        max_kld: Mean Kullback-Leibler divergence [nats].
    """

    min_cosine: float | None = None
    min_sample_cosine: float | None = None
    min_sqnr_db: float | None = None
    max_abs: float | None = None
    min_top1: float | None = None
    max_kld: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidateOptions:
    """How to validate.

    Attributes:
        thresholds: What has to be kept.
        judge: Semantics that the thresholds apply to: any of `SEMANTICS`.
        per_layer: Compare inner activations too.
        layer_by_layer: The same with one layer of each model in memory at a time, and what passes between them in the
            scratch file: in exact semantics, not timed, and nothing is recorded.
        logits: Names of outputs that hold scores, beside those that are recognised.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``.
        threads: Threads inside an operator, None for ONNX Runtime's choice.
        op_libraries: Further custom-op libraries.
        allow_hardlinks: As for `graph.load`.
        save_inputs: Where inputs are written in polygraphy's format.
        save_outputs: Where outputs of ``saved_run`` are written in polygraphy's format.
        saved_run: ``"deployed"``, ``"exact"`` or ``"float"``.
        force: Replace existing files.
        rounds: How often the models are timed, 0 for not at all. Models that are large enough to have their weights in
            data files are not timed: a runtime would hold them in memory.
        progress: Called with the number of samples done.
    """

    thresholds: Thresholds = field(default_factory=Thresholds)
    judge: tuple[str, ...] = (EXACT,)
    per_layer: bool = False
    layer_by_layer: bool = False
    logits: tuple[str, ...] = ()
    device: str = "cpu"
    threads: int | None = None
    op_libraries: tuple[Path, ...] = ()
    allow_hardlinks: bool = False
    save_inputs: Path | None = None
    save_outputs: Path | None = None
    saved_run: str = DEPLOYED
    force: bool = False
    rounds: int = 5
    progress: Callable[[int], None] | None = None


_MEASURED = {
    "min_cosine": "cosine",
    "min_sample_cosine": "cosine_min",
    "min_sqnr_db": "sqnr_db",
    "max_abs": "max_abs",
    "min_top1": "top1",
    "max_kld": "kld_mean",
}


def outputs_table(accuracies: Accuracies) -> Table:
    """Return a row per output and semantics; columns that no output has a figure for are left out."""
    columns = (
        Column(key="output", title="output"),
        Column(key="semantics", title="semantics", about="exact: as ONNX defines it; deployed: fused kernels, here"),
        Column(key="sqnr_db", title="SQNR dB", kind="decibel", about="signal to quantization noise ratio"),
        Column(key="cosine", title="cosine", kind="number", about="over everything"),
        Column(key="cosine_min", title="lowest", kind="number", about="lowest cosine of a sample"),
        Column(key="mse", title="MSE", kind="number", about="mean squared error"),
        Column(key="max_abs", title="max diff", kind="number", about="largest difference"),
        Column(key="top1", title="same top-1", kind="share", about="positions with the same largest score"),
        Column(key="kld_mean", title="KLD", kind="number", about="mean Kullback-Leibler divergence, nats"),
        Column(key="kld_p999", title="KLD 99.9 %", kind="number", about="its 99.9th percentile"),
        Column(key="same", title="equal", kind="share", about="equal values, for integers"),
    )
    rows = tuple(
        {"output": name, "semantics": semantics, **asdict(accuracy)}
        for (name, semantics), accuracy in accuracies.items()
    )
    used = tuple(c for c in columns if c.key not in ("top1", "kld_mean", "kld_p999", "same") or _any(rows, c.key))
    about = "Every output of the quantized model against the float model."
    return Table(name="outputs", title="Outputs", columns=used, rows=rows, about=about)


def _any(rows: Iterable[Mapping[str, Any]], key: str) -> bool:
    return any(row[key] is not None for row in rows)


def latency_table(milliseconds: Mapping[str, list[float]]) -> Table:
    """Return a row per timed model.

    Args:
        milliseconds: Times per batch of the runs `FLOAT` and `DEPLOYED`, one per round.
    """
    columns = (
        Column(key="run", title="run"),
        Column(key="median_ms", title="median ms", kind="milliseconds", about="per batch"),
        Column(key="speedup", title="speed", kind="ratio", about="float time over this time, median over rounds"),
    )
    rows = tuple(
        {
            "run": name,
            "median_ms": statistics.median(times),
            "speedup": 1.0 if name == FLOAT else speedup(milliseconds),
        }
        for name, times in milliseconds.items()
    )
    about = "Both models take turns in one process on the same batches. Compare ratios, not milliseconds."
    return Table(name="latency", title="Latency", columns=columns, rows=rows, about=about)


def speedup(milliseconds: Mapping[str, list[float]]) -> float:
    """Return float time over quantized time, median over rounds; above 1 the quantized model is faster."""
    # Pairs of the same round: a slow moment of the machine hits both.
    return statistics.median(a / b for a, b in zip(milliseconds[FLOAT], milliseconds[DEPLOYED], strict=True))


def layer_rows(accuracies: Mapping[Layer, tuple[Accuracy, float | None]]) -> list[dict[str, Any]]:
    """Return a row per layer that is in floating point, the one that adds most noise first.

    Noise is counted by its energy relative to the signal's; a layer adds what its result has more than the noisiest
    tensor that it is computed from. Where the noise is not a number at all the layer comes first.

    Args:
        accuracies: Accuracy of each layer, and the noise left when its channels are scaled back (see `Rescaling`).
    """
    measured = {layer: pair for layer, pair in accuracies.items() if pair[0].values and pair[0].same is None}
    noise = {layer.tensor: _noise(*pair) for layer, pair in measured.items()}
    rows = []
    for layer, (accuracy, rescaled) in measured.items():
        plain = {key: getattr(accuracy, key) for key in ("sqnr_db", "cosine", "max_abs", "nonfinite")}
        if rescaled is not None:
            plain |= {"sqnr_db": _decibel(rescaled), "cosine": None, "max_abs": None}
        added = noise[layer.tensor] - max((noise[name] for name in layer.before if name in noise), default=0.0)
        row = {"tensor": layer.tensor, "node": layer.node, "op": layer.op, **plain, "added_noise": added}
        rows.append({**row, "rescaled": rescaled is not None})
    return sorted(rows, key=lambda row: nan_first(-row["added_noise"]))


def _noise(accuracy: Accuracy, rescaled: float | None) -> float:
    """Return the energy of the noise relative to that of the signal."""
    if rescaled is not None:
        return rescaled
    return math.nan if math.isnan(accuracy.sqnr_db) else 10 ** (-accuracy.sqnr_db / 10)


def _decibel(noise: float) -> float:
    return -10 * math.log10(noise) if noise else math.inf


def layers_table(rows: list[dict[str, Any]]) -> Table:
    """Return the table of `layer_rows`."""
    columns = (
        Column(key="tensor", title="tensor"),
        Column(key="op", title="operator"),
        Column(key="sqnr_db", title="SQNR dB", kind="decibel"),
        Column(key="cosine", title="cosine", kind="number"),
        Column(key="max_abs", title="max diff", kind="number"),
        Column(key="added_noise", title="noise added", kind="number", about="noise to signal here, less that before"),
    )
    about = (
        "Inner activations of both models in exact semantics, the layer that adds most noise first. "
        "Noise added is noise to signal of the tensor, less that of the noisiest tensor it is computed from. "
        "Tensors whose channels were rescaled on purpose are judged after scaling them back; they show no cosine."
    )
    return Table(name="layers", title="Layers, worst first", columns=columns, rows=tuple(rows), about=about)


def findings_table(rows: list[dict[str, Any]]) -> Table:
    """Return the table of what the Q/DQ checker found."""
    keys = ("severity", "rule", "node", "tensor", "found", "expected")
    columns = tuple(Column(key=key, title=key) for key in keys)
    return Table(name="findings", title="What qpipe check finds", columns=columns, rows=tuple(rows))


def layer_charts(rows: list[dict[str, Any]]) -> tuple[Chart, ...]:
    """Return a chart of the layers that add most noise; none when no layer adds any."""
    worst = [row for row in rows[:WORST_LAYERS] if row["added_noise"] > 0]
    if not worst:
        return ()
    svg = bars_svg([row["tensor"] for row in worst], [100 * row["added_noise"] for row in worst], " %")
    return (Chart(title="Layers that add most noise", svg=svg, caption="energy of the noise in % of the signal's"),)


def verdicts(accuracies: Accuracies, thresholds: Thresholds, judge: Collection[str]) -> Iterator[Verdict]:
    """Yield whether each output keeps each threshold that was asked for.

    Args:
        accuracies: What was measured.
        thresholds: What was asked for.
        judge: Semantics that the thresholds apply to.

    Raises:
        RecipeError: A threshold on scores, and no output is known to hold scores.
    """
    for name, limit in asdict(thresholds).items():
        if limit is None:
            continue
        # An output of another shape keeps no threshold, whatever the batches say that could be compared.
        found = {
            key: math.nan if accuracy.mismatched else getattr(accuracy, _MEASURED[name])
            for key, accuracy in accuracies.items()
        }
        judged = {key: value for key, value in found.items() if value is not None and key[1] in judge}
        if not judged:
            raise RecipeError(
                f"{name} was asked for, and no output is known to hold scores",
                expected=f"semantics among {', '.join(SEMANTICS)}, and an output of scores",
                do="name the output: --logits NAME",
            )
        for (output, semantics), value in judged.items():
            passed = value >= limit if name.startswith("min_") else value <= limit
            subject = f"output {output}, {semantics}"
            yield Verdict(name=name, subject=subject, value=value, limit=limit, passed=passed)


def nan_first(value: float) -> float:
    """Return a key by which NaN counts as the lowest number."""
    return -math.inf if math.isnan(value) else value
