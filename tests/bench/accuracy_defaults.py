"""What each choice of the default recipes is worth: one changed at a time, on the reference models.

    python tests/bench/accuracy.py --defaults [MODEL ...] [--json]

*noise*: mean over the held-out samples of the squared error of the outputs over their energy, in exact semantics, as
a distance in dB from that of the default recipe: above 0 the alternative is worse. ``±`` is the standard error of the
difference, sample by sample: what the choice of samples leaves open. ``*`` marks an alternative that is better by more
than two of them; the default is right where there is none, or where what it costs (time, a Mul) is not worth it.
Statistics are collected once per model; what runs the data itself (layer by layer, bias correction) does so.
"""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from qpipe.models import Batch
from qpipe.models.comparison import Subject, run
from qpipe.pipeline.recipe import make_recipe
from qpipe.pipeline.stages.quantize import runs_layers
from qpipe.pipeline.workflow import Job, quantize_file

BATCHES = 12
"""Batches of held-out samples that are looked at, of 8 in most models."""

ALTERNATIVES: dict[str, dict[str, dict[str, Any]]] = {
    "w8a8": {
        "equalize: none": {"equalize": "none"},
        "equalize: smoothquant": {"equalize": "smoothquant"},
        "equalize: awq": {"equalize": "awq"},
        "equalize: cross_layer": {"equalize": "cross_layer"},
        "method: minmax": {"method": "minmax"},
        "method: percentile:99.99": {"method": "percentile:99.99"},
        "method: mse": {"method": "mse"},
        "method: entropy": {"method": "entropy"},
        "algorithm: rtn": {"weights": {"algorithm": "rtn"}},
        "algorithm: rtn_mse": {"weights": {"algorithm": "rtn_mse"}},
        "algorithm: hqq": {"weights": {"algorithm": "hqq"}},
        "algorithm: gptq, in order": {"weights": {"algorithm": "gptq"}},
        "bias_correction: true": {"bias_correction": True},
    },
    "w4": {
        "algorithm: rtn": {"weights": {"algorithm": "rtn"}},
        "algorithm: rtn_mse": {"weights": {"algorithm": "rtn_mse"}},
        "algorithm: hqq": {"weights": {"algorithm": "hqq"}},
        "algorithm: quantease": {"weights": {"algorithm": "quantease"}},
        "algorithm: gptq, not in order": {"weights": {"algorithm": "gptq", "sequential": False}},
        "awq": {"equalize": "awq", "weights": {"algorithm": "awq_clip"}},
        "awq and gptq": {"equalize": "awq", "weights": {"algorithm": "gptq"}},
        "bias_correction: true": {"bias_correction": True},
    },
}
"""Scheme -> name -> keys that differ from its default recipe."""


def measure(models: list[str], folder: Path) -> list[dict[str, Any]]:
    """Return one row per model, scheme and alternative, each default first."""
    return [row for name in models for scheme in ALTERNATIVES for row in _rows(Subject.export(name, folder), scheme)]


def _rows(subject: Subject, scheme: str) -> Iterator[dict[str, Any]]:
    default, known = None, None
    batches = list(itertools.islice(subject.reference.evaluation_batches(), BATCHES))
    exact = list(run(subject.float_path, iter(batches), exact=True))
    if scheme == "w8a8":
        known = Job.open(subject.float_path).collect(subject.reference.calibration_batches(), detail="auto")
    for name, keys in {"default": {}, **ALTERNATIVES[scheme]}.items():
        path, start = subject.folder / f"{subject.name}.alternative.onnx", time.process_time()
        path.unlink(missing_ok=True)
        recipe = make_recipe(scheme=scheme, **keys)
        shared = known if not runs_layers(recipe) and recipe.equalize not in ("awq", "cross_layer") else None
        quantize_file(subject.float_path, path, recipe, shared or subject.reference.calibration_batches())
        seconds = time.process_time() - start
        noise = _noise(run(path, iter(batches), exact=True), exact)
        default = noise if default is None else default
        apart = 10 * (np.log10(noise) - np.log10(default))
        row = {
            "model": subject.name,
            "scheme": scheme,
            "recipe": name,
            "sqnr_db": -10 * math.log10(noise.mean()),
            "noise_db": float(apart.mean()),
            "noise_error": float(apart.std(ddof=1)) / math.sqrt(len(apart)),
            "cpu_seconds": seconds,
        }
        print(f"{subject.name} {scheme} {name}: {row['noise_db']:+.2f} dB", file=sys.stderr)
        yield row


def _noise(outputs: Iterable[Batch], reference: list[Batch]) -> np.ndarray:
    """Return the squared error over the energy of each sample, [samples]."""
    found = []
    for batch, wanted in zip(outputs, reference, strict=True):
        sums = np.zeros((2, len(next(iter(wanted.values())))))
        for name, array in wanted.items():
            exact = array.astype(np.float64).reshape(len(array), -1)
            error = batch[name].astype(np.float64).reshape(len(array), -1) - exact
            sums += np.square(error).sum(axis=1), np.square(exact).sum(axis=1)
        found.append(sums[0] / sums[1])
    return np.maximum(np.concatenate(found), np.finfo(np.float64).tiny)


def is_better(row: dict[str, Any]) -> bool:
    """Whether an alternative has less noise than the default, beyond chance."""
    return bool(row["noise_db"] < -2 * row["noise_error"])


def text(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table, a block per model and scheme."""
    lines: list[str] = []
    for model, scheme in dict.fromkeys((row["model"], row["scheme"]) for row in rows):
        block = [row for row in rows if (row["model"], row["scheme"]) == (model, scheme)]
        lines += [f"{f'{model} {scheme}':<34}{'SQNR dB':>8}{'noise dB':>15}{'CPU s':>7}"]
        for row in block:
            noise = "" if row is block[0] else f"{row['noise_db']:+7.2f} ± {row['noise_error']:.2f}"
            noise += "*" if is_better(row) else " "
            lines.append(f"{row['recipe']:<34}{row['sqnr_db']:8.2f}{noise:>15}{row['cpu_seconds']:7.1f}")
        lines.append("")
    return "\n".join(lines)
