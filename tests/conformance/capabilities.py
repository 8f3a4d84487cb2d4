"""Which runtime runs which format, at which granularity, in which operator, and how right its result is.

    python tests/conformance/capabilities.py                     the table, as markdown
    python tests/conformance/capabilities.py --json              every outcome
    python tests/conformance/capabilities.py --write README.md   put the table between the two markers of a file

Every outcome is compared with the numpy oracle. "yes" means: equal up to the rounding of float sums; behind a quantizer
at most one code apart; with a quantizer in front at most four of its steps, for some runtimes multiply by the
reciprocal of the scale instead of dividing. Anything else that runs is "off by" the largest error, relative to the
largest output.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from engines import ENGINES, Missing, version
from forms import OPERATORS, Form, all_forms, build, output_params
from numpy_oracle import run
from qpipe.calibrate.formats import FORMATS
from qpipe.calibrate.qarray import QArray, QParams, dequantize, quantize

Array = np.ndarray[Any, Any]

START, END = "<!-- capabilities: start -->", "<!-- capabilities: end -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one engine made of one form.

    Attributes:
        form: The form.
        engine: Name of the engine.
        status: ``"yes"``, ``"off"`` (runs, other values), ``"no"`` or ``"missing"``.
        error: Largest error relative to the largest output; None when it did not run.
        reason: First line of what the engine said when it refused.
    """

    form: Form
    engine: str
    status: str
    error: float | None = None
    reason: str = ""


def judge(form: Form, expected: Array, got: Array) -> tuple[str, float]:
    """Compare an output with the oracle's: ``"yes"`` or ``"off"``, and the largest relative error."""
    if got.shape != expected.shape:
        return "off", float("inf")
    with np.errstate(all="ignore"):
        error = float(np.abs(got.astype(np.float64) - expected).max() / np.abs(expected).max())
    params = output_params(form)
    if params is None:
        return "yes" if error <= tolerance(form) else "off", error
    grid = dequantize(quantize(got, params))
    on_grid = bool(np.abs(got - grid).max() <= 1e-5 * np.abs(expected).max())
    return "yes" if on_grid and codes_apart(got, expected, params) <= 1 else "off", error


def tolerance(form: Form) -> float:
    """Return the relative error that an output in float32 may have."""
    if form.carrier == "cast":
        return 4 * float(FORMATS.get(form.weight).float_info.eps)
    if not form.activation or form.carrier == "dynamic":
        return 1e-5
    fmt = FORMATS.get(form.activation)
    return 4 / (fmt.qmax - fmt.qmin) if fmt.is_integer else float(fmt.float_info.eps) / 4


def codes_apart(a: Array, b: Array, params: QParams) -> int:
    """Return how many codes lie between two arrays of dequantized values, at most."""
    ordinals = [_ordinals(quantize(x, params)) for x in (a, b)]
    return int(np.abs(ordinals[0] - ordinals[1]).max())


def _ordinals(qarray: QArray) -> Array:
    fmt = qarray.params.spec.format
    if fmt.is_integer:
        return qarray.q.astype(np.int64)
    # Sign and magnitude: the bits of the magnitude count upwards with the value.
    bits = qarray.q.view(np.uint8).astype(np.int64)
    return np.where(bits >> 7, -(bits & 0x7F), bits)


def measure(forms: Iterable[Form], engines: Sequence[str]) -> list[Outcome]:
    """Run every form in every engine."""
    outcomes = []
    for form in forms:
        model, feeds = build(form)
        expected = run(model, feeds)[0]
        outcomes += [_outcome(form, engine, model, feeds, expected) for engine in engines]
    return outcomes


def _outcome(form: Form, engine: str, model: Any, feeds: dict[str, Array], expected: Array) -> Outcome:
    try:
        got = np.asarray(ENGINES[engine](model, feeds)[0])
    except Missing as error:
        return Outcome(form=form, engine=engine, status="missing", reason=str(error))
    except Exception as error:  # noqa: BLE001 - every engine has its own ways to refuse, and refusing is a result
        lines = [line for line in str(error).splitlines() if line.strip()]
        return Outcome(form=form, engine=engine, status="no", reason=(lines or [type(error).__name__])[0][:200])
    status, error_size = judge(form, expected, got)
    return Outcome(form=form, engine=engine, status=status, error=error_size)


def table(outcomes: Sequence[Outcome], engines: Sequence[str]) -> str:
    """Return the outcomes as a markdown table: a row per form, granularities with equal cells joined."""
    by_row: dict[tuple[Any, ...], dict[str, list[Outcome]]] = {}
    for outcome in outcomes:
        by_row.setdefault(outcome.form.row, {}).setdefault(outcome.engine, []).append(outcome)
    merged: dict[tuple[Any, ...], list[tuple[str, int]]] = {}
    for (weight, activation, granularity, carrier, variant), cells in by_row.items():
        texts = tuple(cell(cells[engine]) for engine in engines)
        key = (weight, activation, carrier, variant, texts)
        opset = min(outcome.form.opset for found in cells.values() for outcome in found)
        merged.setdefault(key, []).append((granularity, opset))
    lines = [
        f"| weight | activation | scale per | form | opset | {' | '.join(engines)} |",
        f"|{'---|' * (5 + len(engines))}",
    ]
    for (weight, activation, carrier, variant, texts), found in merged.items():
        granularities = ", ".join(granularity for granularity, _ in found)
        opsets = ", ".join(dict.fromkeys(str(opset) for _, opset in found))
        form = ", ".join(part for part in (carrier.replace("qdq", "Q/DQ"), variant) if part)
        scale = "-" if carrier == "cast" else granularities
        row = (weight, activation or "float32", scale, form, opsets, *texts)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def cell(outcomes: Sequence[Outcome]) -> str:
    """Return one cell: what most operators do, then the others by name."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.status, []).append(outcome)
    ranked = sorted(groups.values(), key=len, reverse=True)
    words = [_word(found) for found in ranked]
    names = [", ".join(outcome.form.operator for outcome in found) for found in ranked]
    return "; ".join([words[0], *(f"{name}: {word}" for name, word in zip(names[1:], words[1:], strict=True))])


def _word(outcomes: Sequence[Outcome]) -> str:
    status = outcomes[0].status
    if status != "off":
        return {"missing": "not installed"}.get(status, status)
    error = max(outcome.error or 0.0 for outcome in outcomes)
    bound = next((b for b in (0.0001, 0.001, 0.01, 0.03, 0.1, 0.3, 1.0) if error < b), None)
    return f"off < {100 * bound:g} %" if bound else "wrong"


@functools.cache
def facts() -> dict[str, Any]:
    """Return what the outcomes depend on: versions, and the CPU's integer instructions."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text(encoding="utf-8") if path.exists() else ""
    return {
        "versions": {engine: version(engine) for engine in ENGINES},
        "machine": platform.machine(),
        "vnni": "vnni" in flags,
        "numpy": np.__version__,
    }


def report(outcomes: Sequence[Outcome], engines: Sequence[str]) -> str:
    """Return the table with the sentences that it needs beside it."""
    versions = ", ".join(f"{engine} {facts()['versions'][engine] or 'not installed'}" for engine in engines)
    vnni = "with" if facts()["vnni"] else "without"
    return "\n\n".join(
        [
            f"Operators: {', '.join(OPERATORS)} (g2: of 2 groups); MatMul alone for dynamic and packed forms. "
            "yes: equal to the numpy oracle up to float rounding, or at most one code apart behind a quantizer. "
            "off < 3 %: runs; largest error relative to the largest output. no: refused. "
            "Opset: the first that can carry the form; models are built at it, at 19 at least.",
            f"Measured with {versions} on {facts()['machine']} {vnni} VNNI: without it, full 8-bit weights overflow "
            "the 16-bit sums of integer kernels, and 7-bit weights do not. ort-exact: all optimizations off. "
            "ort-deployed: all on, `session.qdq_matmulnbits_accuracy_level` 1. ort-default: that option not set. "
            "openvino: `DYNAMIC_QUANTIZATION_GROUP_SIZE` 0, without which products of stored weights round activations "
            "to 8 bits on CPUs with VNNI.",
            table(outcomes, engines),
        ]
    )


def as_data(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return everything as plain data."""
    rows = []
    for outcome in outcomes:
        form = outcome.form
        keys = ("weight", "activation", "granularity", "carrier", "variant", "operator", "opset")
        row = {key: getattr(form, key) for key in keys}
        error = outcome.error if outcome.error is None or np.isfinite(outcome.error) else str(outcome.error)
        rows.append(
            {**row, "engine": outcome.engine, "status": outcome.status, "error": error, "reason": outcome.reason}
        )
    return {"facts": facts(), "outcomes": rows}


def write_between_markers(path: Path, text: str, markers: tuple[str, str] = (START, END)) -> None:
    """Replace what stands between two markers of a file.

    Raises:
        ValueError: A marker is not there.
    """
    first, last = markers
    before, start, rest = path.read_text(encoding="utf-8").partition(first)
    _, end, after = rest.partition(last)
    if not start or not end:
        raise ValueError(f"{path} has no {first} ... {last}")
    path.write_text(f"{before}{first}\n\n{text}\n\n{last}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print every outcome as JSON")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the markers of FILE")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="only this engine (may be repeated)")
    parser.add_argument("--operator", action="append", choices=OPERATORS, help="only this operator (may be repeated)")
    options = parser.parse_args(arguments)
    engines = options.engine or list(ENGINES)
    forms = [form for form in all_forms() if not options.operator or form.operator in options.operator]
    outcomes = measure(forms, engines)
    if options.write:
        write_between_markers(options.write, report(outcomes, engines))
    print(json.dumps(as_data(outcomes), indent=1) if options.json else report(outcomes, engines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
