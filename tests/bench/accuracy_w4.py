"""4-bit weights of tiny_gpt: what each algorithm loses, beside ONNX Runtime's own quantizer for MatMulNBits.

    python tests/bench/accuracy_w4.py [--only TEXT ...] [--symmetric] [--json]

All rows: blocks of 32, zero points unless ``--symmetric``, activations in float32, the same calibration windows, the
same 25 products. ONNX Runtime's quantizer does not look through the Transpose of the tied embedding, so every tool gets
a file in which that is folded. Measured in exact semantics:

*held out*: increase of the perplexity of text that the model never saw: the held-out help topics, and docstrings of
packages of the standard library, 400 windows of 128 tokens.
*KL*: mean divergence of the next token's distribution from the float model's, times 1000, on the same text; never
negative, and hardly touched by chance.
*beside*: the row that this one is compared with, and the difference of both figures from that row's. ``±`` is the
standard error over windows, of the difference window by window: what the choice of text leaves open.

Needs torch.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import math
import os
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from qpipe.models import Batch, get
from qpipe.models.comparison import Subject, run, size_on_disk
from qpipe.models.tiny_gpt.corpus import docstrings, split_topics, windows
from qpipe.models.tiny_gpt.network import CONTEXT
from qpipe.pipeline.recipe import make_recipe
from qpipe.pipeline.workflow import quantize_file

BLOCK = 32
FLOAT_ACTIVATIONS = 1
"""Accuracy level of MatMulNBits at which activations are not rounded."""
Maker = Callable[[Path, Path, bool], None]
"""Writes one configuration: float model, target, whether codes are symmetric."""


def qpipe(algorithm: str | None, equalize: str | None = None, **weights: Any) -> Maker:
    """Return a maker for the scheme w4 with an algorithm, None for its default."""

    def make(source: Path, target: Path, symmetric: bool) -> None:
        chosen = {"algorithm": algorithm} if algorithm else {}
        options = {**chosen, "accuracy_level": FLOAT_ACTIVATIONS, "symmetric": symmetric, **weights}
        recipe = make_recipe(scheme="w4", equalize=equalize, weights=options)
        quantize_file(source, target, recipe, get("tiny_gpt").calibration_batches())

    return make


def onnxruntime(kind: str) -> Maker:
    """Return a maker for one of the algorithms of ONNX Runtime's MatMulNBitsQuantizer."""

    def make(source: Path, target: Path, symmetric: bool) -> None:
        from onnxruntime.quantization import CalibrationDataReader, matmul_nbits_quantizer

        class Reader(CalibrationDataReader):
            def __init__(self) -> None:
                self._batches = list(get("tiny_gpt").calibration_batches())
                self.rewind()

            def rewind(self) -> None:
                self._next = 0

            def get_next(self) -> Batch | None:
                self._next += 1
                return self._batches[self._next - 1] if self._next <= len(self._batches) else None

        configs: dict[str, Callable[[], Any]] = {
            "rtn": matmul_nbits_quantizer.RTNWeightOnlyQuantConfig,
            "hqq": lambda: matmul_nbits_quantizer.HQQWeightOnlyQuantConfig(block_size=BLOCK, bits=4),
            "gptq": lambda: matmul_nbits_quantizer.GPTQWeightOnlyQuantConfig(calibration_data_reader=Reader()),
            "gptq actorder mse": lambda: matmul_nbits_quantizer.GPTQWeightOnlyQuantConfig(
                calibration_data_reader=Reader(), actorder=True, mse=True
            ),
        }
        quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
            onnx.load(source),
            block_size=BLOCK,
            is_symmetric=symmetric,
            accuracy_level=FLOAT_ACTIVATIONS,
            algo_config=configs[kind](),
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(target), False)

    return make


CONFIGS: dict[str, Maker] = {
    "qpipe rtn": qpipe("rtn"),
    "qpipe rtn_mse": qpipe("rtn_mse"),
    "qpipe hqq": qpipe("hqq"),
    "qpipe hqq, float zero points": qpipe("hqq", float_zero_points=True),
    "qpipe awq": qpipe("awq_clip", "awq"),
    "qpipe gptq, float inputs": qpipe("gptq", sequential=False),
    "qpipe gptq": qpipe("gptq"),
    "qpipe quantease": qpipe("quantease"),
    "ONNX Runtime RTN": onnxruntime("rtn"),
    "ONNX Runtime HQQ": onnxruntime("hqq"),
    "ONNX Runtime GPTQ": onnxruntime("gptq"),
    "ONNX Runtime GPTQ, act-order, mse": onnxruntime("gptq actorder mse"),
}

BESIDE = {
    "qpipe hqq": "qpipe rtn",
    "qpipe hqq, float zero points": "qpipe hqq",
    "qpipe awq": "qpipe hqq, float zero points",
    "qpipe gptq": "qpipe awq",
    "ONNX Runtime RTN": "qpipe rtn",
    "ONNX Runtime HQQ": "qpipe hqq, float zero points",
    "ONNX Runtime GPTQ": "qpipe gptq",
    "ONNX Runtime GPTQ, act-order, mse": "qpipe gptq",
}
"""Each row and the one that it is compared with."""
PACKAGES = (
    *("asyncio", "collections", "concurrent", "ctypes", "curses", "dbm", "email", "html", "http", "importlib", "json"),
    *("logging", "multiprocessing", "re", "sqlite3", "unittest", "urllib", "wsgiref", "xml", "zoneinfo"),
)
"""Packages of the standard library, of which the model read nothing: it learned from modules beside them."""


def fold_transposes(source: Path, target: Path) -> None:
    """Write the model with constants in place of their transposes."""
    model = onnx.load(source)
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in [n for n in model.graph.node if n.op_type == "Transpose" and n.input[0] in values]:
        perm = next((list(a.ints) for a in node.attribute), None)
        array = np.ascontiguousarray(onnx.numpy_helper.to_array(values[node.input[0]]).transpose(perm))
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, node.output[0]))
        model.graph.node.remove(node)
    onnx.save(model, target)


def held_out_tokens(count: int = 400) -> np.ndarray:
    """Return windows [count, 129] of text that the model was not trained on: it read no package's docstrings."""
    topics = windows(split_topics()[1], CONTEXT)
    folder = Path(sysconfig.get_path("stdlib"))
    files = [path for name in PACKAGES for path in sorted((folder / name).rglob("*.py"))]
    text = "\n\n".join(docstrings(path.read_text("utf-8")) for path in files)
    return np.concatenate([topics, windows(text, CONTEXT, count - len(topics))])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the logarithm of the probabilities, float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a model makes of each window.

    Attributes:
        loss: Mean cross-entropy of the next token, [windows].
        divergence: Mean divergence from the float model's distribution, [windows].
    """

    loss: np.ndarray
    divergence: np.ndarray

    def above(self, other: Scores) -> dict[str, float]:
        """Return by how much the figures are higher than another model's, with standard errors."""
        loss, divergence = self.loss - other.loss, self.divergence - other.divergence
        root = math.sqrt(len(loss))
        return {
            "held_out_percent": 100 * math.expm1(loss.mean()),
            "held_out_error": 100 * float(loss.std(ddof=1)) / root,
            "kl_thousandths": 1000 * float(divergence.mean()),
            "kl_error": 1000 * float(divergence.std(ddof=1)) / root,
        }


class Judge:
    """Measures models against the float one.

    Args:
        path: The float model.
    """

    def __init__(self, path: Path) -> None:
        self._batches = np.array_split(held_out_tokens(), 50)
        self._reference = [log_softmax(logits) for logits in self._logits(path)]
        self.float = self._scores(self._reference)

    def _logits(self, path: Path) -> Iterator[np.ndarray]:
        feeds = ({"input_ids": np.ascontiguousarray(part[:, :-1])} for part in self._batches)
        return (batch["logits"] for batch in run(path, feeds, exact=True))

    def _scores(self, found: Iterable[np.ndarray]) -> Scores:
        losses, divergences = [], []
        for tokens, p, q in zip(self._batches, self._reference, found, strict=True):
            losses.append(-np.take_along_axis(q, tokens[:, 1:, None], axis=-1).mean(axis=(1, 2)))
            divergences.append((np.exp(p) * (p - q)).sum(axis=-1).mean(axis=1))
        return Scores(loss=np.concatenate(losses), divergence=np.concatenate(divergences))

    def scores(self, path: Path) -> Scores:
        """Return what a model makes of each window."""
        return self._scores(map(log_softmax, self._logits(path)))


def measure(folder: Path, only: list[str] | None = None, *, symmetric: bool = False) -> dict[str, dict[str, Any]]:
    """Return one row per configuration, the float model first; one that fails holds ``error``.

    Args:
        folder: Where all files go.
        only: Parts of the names that are wanted; None for all.
        symmetric: Codes without zero points.
    """
    plain = folder / "tiny_gpt.folded.onnx"
    fold_transposes(Subject.export("tiny_gpt", folder).float_path, plain)
    judge = Judge(plain)
    rows: dict[str, dict[str, Any]] = {"float": _row(plain, judge.float, judge.float)}
    known: dict[str, Scores] = {}
    for name, make in CONFIGS.items():
        if (only and not any(text in name for text in only)) or (symmetric and "zero points" in name):
            continue
        path, start = folder / f"{name.replace(' ', '-')}.onnx", time.process_time()
        path.unlink(missing_ok=True)
        try:
            with _silence():
                make(plain, path, symmetric)
        except Exception as error:  # noqa: BLE001 - a peer's failure is a result, whatever it raises
            rows[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            continue
        seconds = time.process_time() - start
        known[name] = judge.scores(path)
        rows[name] = {**_row(path, known[name], judge.float), "cpu_seconds": seconds}
    for name, other in BESIDE.items():
        if name in known and other in known:
            rows[name]["beside"] = {"row": other, **known[name].above(known[other])}
    return rows


def _row(path: Path, scores: Scores, reference: Scores) -> dict[str, Any]:
    perplexity = math.exp(scores.loss.mean())
    return {"perplexity": perplexity, **scores.above(reference), "megabytes": size_on_disk(path) / 1e6}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    logging.disable(logging.INFO)
    talk = io.StringIO()
    with contextlib.redirect_stdout(talk), contextlib.redirect_stderr(talk), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Print the table."""
    print(f"{'':<34}{'perplexity':>10}{'held out %':>16}{'KL':>15}{'MB':>6}{'CPU s':>7}  beside: held out %, KL")
    for name, row in rows.items():
        if "error" in row:
            print(f"{name:<34}failed: {row['error']}")
            continue
        seconds = f"{row['cpu_seconds']:7.1f}" if "cpu_seconds" in row else ""
        beside = f"  {row['beside']['row']}:{_figures(row['beside'])}" if "beside" in row else ""
        print(f"{name:<34}{row['perplexity']:10.3f}{_figures(row)}{row['megabytes']:6.2f}{seconds}{beside}")


def _figures(found: dict[str, float]) -> str:
    held_out = f"{found['held_out_percent']:+9.2f} ± {found['held_out_error']:.2f}"
    return f"{held_out}{found['kl_thousandths']:+8.2f} ± {found['kl_error']:.2f}"


def main() -> None:
    """Measure and print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="rows whose names hold one of these")
    parser.add_argument("--symmetric", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            Subject.export("tiny_gpt", Path(folder))
        rows = measure(Path(folder), arguments.only, symmetric=arguments.symmetric)
    if arguments.json:
        print(json.dumps({"block": BLOCK, "symmetric": arguments.symmetric, "cores": os.cpu_count(), "rows": rows}))
    else:
        show(rows)


if __name__ == "__main__":
    main()
