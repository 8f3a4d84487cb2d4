"""4-bit weights of tiny_gpt: what each algorithm loses, beside ONNX Runtime's own quantizer for MatMulNBits.

    python tests/bench/accuracy_w4.py [--only TEXT ...] [--symmetric] [--json]

All rows: blocks of 32, zero points unless ``--symmetric``, activations in float32, the same calibration windows, the
same 25 products. ONNX Runtime's quantizer does not look through the Transpose of the tied embedding, so every tool gets
a file in which that is folded. Measured in exact semantics:

*held out*: increase of the perplexity of held-out text. The model is not at a minimum of that text's loss, so a part
of it, of either sign, is chance.
*trained on*: the same for text that the model was trained on, outside the calibration windows. There the loss is near
its minimum, and chance plays a smaller part.
*KL*: mean divergence of the next token's distribution from the float model's, times 1000, on held-out text; never
negative, hence the number that orders algorithms.

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
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from qpipe.models import Batch, get
from qpipe.models.comparison import Subject, run, size_on_disk
from qpipe.models.tiny_gpt.corpus import split_topics, windows
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
    "qpipe awq": qpipe("awq_clip", "awq"),
    "qpipe gptq, float inputs": qpipe("gptq", sequential=False),
    "qpipe gptq": qpipe("gptq"),
    "qpipe quantease": qpipe("quantease"),
    "ONNX Runtime RTN": onnxruntime("rtn"),
    "ONNX Runtime HQQ": onnxruntime("hqq"),
    "ONNX Runtime GPTQ": onnxruntime("gptq"),
    "ONNX Runtime GPTQ, act-order, mse": onnxruntime("gptq actorder mse"),
}


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


def trained_batches(count: int = 80) -> Iterator[np.ndarray]:
    """Yield token windows [8, 129] of text that the model was trained on, none of them for calibration."""
    used = {tuple(row) for row in windows(split_topics()[0], CONTEXT, 32)}
    every = [row for row in windows(split_topics()[0], CONTEXT, 10**6)[5::11] if tuple(row) not in used][:count]
    for start in range(0, len(every), 8):
        yield np.stack(every[start : start + 8])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return the logarithm of the probabilities, float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


class Judge:
    """Measures models against the float one.

    Args:
        path: The float model.
    """

    def __init__(self, path: Path) -> None:
        self._reference = get("tiny_gpt")
        self._float = [log_softmax(logits) for logits in self._held_out(path)]
        self._base = self._perplexities(path, self._float)

    def _held_out(self, path: Path) -> list[np.ndarray]:
        return [batch["logits"] for batch in run(path, self._reference.evaluation_batches(), exact=True)]

    def _perplexities(self, path: Path, held_out: list[np.ndarray]) -> tuple[float, float]:
        # Logarithms of probabilities are logits of the same distribution.
        own = self._reference.score([{"logits": part} for part in held_out])["perplexity"]
        losses = []
        tokens = list(trained_batches())
        feeds = ({"input_ids": np.ascontiguousarray(part[:, :-1])} for part in tokens)
        for part, batch in zip(tokens, run(path, feeds, exact=True), strict=True):
            losses.append(-np.take_along_axis(log_softmax(batch["logits"]), part[:, 1:, None], axis=-1).ravel())
        return own, math.exp(np.concatenate(losses).mean())

    def row(self, path: Path) -> dict[str, float]:
        """Return what a model loses."""
        found = [log_softmax(logits) for logits in self._held_out(path)]
        pairs = zip(self._float, found, strict=True)
        divergence = np.concatenate([(np.exp(p) * (p - q)).sum(axis=-1).ravel() for p, q in pairs])
        held_out, trained = self._perplexities(path, found)
        return {
            "perplexity": held_out,
            "held_out_percent": 100 * (held_out / self._base[0] - 1),
            "trained_percent": 100 * (trained / self._base[1] - 1),
            "kl_thousandths": 1000 * float(divergence.mean()),
            "megabytes": size_on_disk(path) / 1e6,
        }


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
    rows: dict[str, dict[str, Any]] = {"float": judge.row(plain)}
    for name, make in CONFIGS.items():
        if only and not any(text in name for text in only):
            continue
        path, start = folder / f"{name.replace(' ', '-')}.onnx", time.process_time()
        path.unlink(missing_ok=True)
        try:
            with _silence():
                make(plain, path, symmetric)
        except Exception as error:  # noqa: BLE001 - a peer's failure is a result, whatever it raises
            rows[name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
            continue
        rows[name] = {**judge.row(path), "cpu_seconds": time.process_time() - start}
    return rows


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
    print(f"{'':<36}{'perplexity':>11}{'held out':>10}{'trained on':>12}{'KL':>8}{'MB':>7}{'CPU s':>8}")
    for name, row in rows.items():
        if "error" in row:
            print(f"{name:<36}failed: {row['error']}")
            continue
        seconds = f"{row['cpu_seconds']:8.1f}" if "cpu_seconds" in row else ""
        print(
            f"{name:<36}{row['perplexity']:11.3f}{row['held_out_percent']:+9.2f}%{row['trained_percent']:+11.2f}%"
            f"{row['kl_thousandths']:8.2f}{row['megabytes']:7.2f}{seconds}"
        )


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
