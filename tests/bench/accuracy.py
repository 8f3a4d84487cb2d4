"""Static int8 beside its peers: what it costs in accuracy and gains in time, on the reference models.

    python tests/bench/accuracy.py [MODEL ...] [--configs NAME ...] [--no-peers] [--w4] [--defaults] [--json]

Every configuration is made from the same calibration data and evaluated on the same held-out data: the metrics of the
task in exact semantics (ONNX Runtime's optimizations off) and as deployed on this CPU, and the speed over the float
model as deployed, all in turn in this process. ``qpipe plain`` rounds to nearest and equalizes nothing; ``smoothquant``
and ``gptq`` each add one algorithm; ``default`` is what no flag gives. Peers: ONNX Runtime's own tools, and NNCF and
onnxsim where they are installed (``pip install nncf onnxsim``; neither touches onnxruntime). Models with ``+outliers``
have planted outlier features. ``--w4`` adds the 4-bit weights of `accuracy_w4.py`; ``--defaults`` gives the table of
`accuracy_defaults.py` instead: what each single choice of the default recipe is worth.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import accuracy_defaults
import accuracy_w4
from qpipe.models.comparison import PEERS, Maker, Row, Subject, compare, qpipe
from qpipe.pipeline.cli.demo import table

MODELS = ("digits_cnn", "tiny_gpt", "minilm")
RTN = {"algorithm": "rtn"}
CONFIGS: dict[str, Maker] = {
    "qpipe default": qpipe(scheme="w8a8"),
    "qpipe default, no VNNI": qpipe(scheme="w8a8", target="ort-cpu-avx2"),
    "qpipe plain": qpipe(scheme="w8a8", equalize="none", weights=RTN),
    "qpipe smoothquant": qpipe(scheme="w8a8", weights=RTN),
    "qpipe gptq": qpipe(scheme="w8a8", equalize="none"),
    "qpipe cross_layer": qpipe(scheme="w8a8", equalize="cross_layer"),
    "qpipe bias correction": qpipe(scheme="w8a8", bias_correction=True),
    "qpipe mse": qpipe(scheme="w8a8", method="mse"),
}


def nncf(subject: Subject, path: Path) -> None:
    """NNCF's post-training quantization of an ONNX model, told where one is a transformer."""
    import nncf as tool
    import onnx

    kind = None if "cnn" in subject.name else tool.ModelType.TRANSFORMER
    data = tool.Dataset(list(subject.reference.calibration_batches()))
    onnx.save(tool.quantize(onnx.load(subject.float_path), data, model_type=kind), path)


def onnxsim(subject: Subject, path: Path) -> None:
    """onnxsim's static quantization with its defaults."""
    import onnx
    import onnxsim as tool

    data = list(subject.reference.calibration_batches())
    onnx.save(tool.quantize_static(str(subject.float_path), calibration_data=data), path)


def peers() -> dict[str, Maker]:
    """Return ONNX Runtime's tools, and the peers that may be installed: rows of those that are not say so."""
    return {**PEERS, "NNCF": _installed("nncf", nncf), "onnxsim": _installed("onnxsim", onnxsim)}


def _installed(package: str, make: Maker) -> Maker:
    def absent(subject: Subject, path: Path) -> None:
        raise ModuleNotFoundError(f"not installed: pip install {package}")

    return make if importlib.util.find_spec(package) is not None else absent


def measure(models: list[str], configs: dict[str, Maker], folder: Path) -> list[Row]:
    """Return the rows of all models, float first."""
    return [row for name in models for row in compare(Subject.export(name, folder), configs)]


def main() -> None:
    """Measure and print a table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--configs", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--w4", action="store_true")
    parser.add_argument("--defaults", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="qpipe-accuracy-") as folder, contextlib.redirect_stdout(sys.stderr):
        if arguments.defaults:
            found = accuracy_defaults.measure(arguments.models, Path(folder))
        else:
            configs = {name: CONFIGS[name] for name in arguments.configs}
            rows = measure(arguments.models, {**configs, **({} if arguments.no_peers else peers())}, Path(folder))
            w4 = accuracy_w4.measure(Path(folder)) if arguments.w4 else {}
    if arguments.defaults:
        print(json.dumps({"defaults": found}) if arguments.json else accuracy_defaults.text(found))
    elif arguments.json:
        print(json.dumps({"rows": [dataclasses.asdict(row) for row in rows], "w4": w4}))
    else:
        print("\n".join(table(rows)))
        if w4:
            accuracy_w4.show(w4)


if __name__ == "__main__":
    main()
