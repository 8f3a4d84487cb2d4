"""Chains of more and more nodes, calibrated and quantized, beside ONNX Runtime's quantize_static in the same run.

    python tests/bench/chain.py [--nodes 500 1000 2000] [--rounds N] [--json]

Every way is a new process: the commands `qpipe calibrate` and `qpipe quantize`, and a Python that imports and calls
`quantize_static`, which does both. Ways and lengths take turns; a figure is the processor time of the round with the
least. *growth* is the time of a length over that of the shortest; where *nodes* is the same figure, time is linear.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

WIDTH, SAMPLES = 8, 4
SHAPE = ["N", WIDTH, 8, 8]
STATIC = """
import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

class Reader(CalibrationDataReader):
    def __init__(self):
        self.rest = iter(np.load({data!r})[:, None])

    def get_next(self):
        x = next(self.rest, None)
        return None if x is None else {{"x": x}}

quantize_static({source!r}, {target!r}, Reader(), quant_format=QuantFormat.QDQ)
"""


def chain(nodes: int) -> onnx.ModelProto:
    """Build convolutions of their own weights, each with a Relu and every second one with a sum around it."""
    rng = np.random.default_rng(0)
    made, weights, last = [], [], "x"
    while len(made) < nodes:
        index = len(weights)
        array = rng.normal(size=(WIDTH, WIDTH, 1, 1)) / WIDTH**0.5
        weights.append(numpy_helper.from_array(array.astype(np.float32), f"w{index}"))
        made.append(helper.make_node("Conv", [last, f"w{index}"], [f"c{index}"], name=f"conv{index}"))
        made.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"], name=f"relu{index}"))
        if index % 2:
            made.append(helper.make_node("Add", [f"r{index}", last], [f"a{index}"], name=f"add{index}"))
        last = made[-1].output[0]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, SHAPE) for name in ("x", last)]
    graph = helper.make_graph(made, "chain", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def commands(folder: Path, nodes: int) -> dict[str, list[str]]:
    """Write a chain and return the command of each way."""
    source, data, qcal = folder / f"chain{nodes}.onnx", folder / "data.npy", folder / f"chain{nodes}.qcal"
    onnx.save(chain(nodes), source)
    own, target = [sys.executable, "-m", "qpipe"], str(folder / "out.onnx")
    peer = STATIC.format(source=str(source), target=target, data=str(data))
    return {
        "calibrate": [*own, "calibrate", str(source), "--data", str(data), "-o", str(qcal), "--force", "--quiet"],
        "quantize": [*own, "quantize", str(source), "--calib", str(qcal), "-o", target, "--force", "--quiet"],
        "quantize_static": [sys.executable, "-c", peer],
    }


def processor_seconds(command: list[str]) -> float:
    """Run a command that must succeed and return the processor time that it took."""
    before = os.times()
    subprocess.run(command, check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def measure(folder: Path, lengths: list[int], rounds: int) -> dict[int, dict[str, float]]:
    """Return the processor seconds of each way, by number of nodes; ``qpipe`` is both of its commands."""
    np.save(folder / "data.npy", np.random.default_rng(1).normal(size=(SAMPLES, *SHAPE[1:])).astype(np.float32))
    ways = {nodes: commands(folder, nodes) for nodes in lengths}
    least: dict[int, dict[str, float]] = {nodes: {} for nodes in lengths}
    for _ in range(rounds):
        for nodes, named in ways.items():
            for name, command in named.items():
                least[nodes][name] = min(least[nodes].get(name, np.inf), processor_seconds(command))
    return {nodes: {"qpipe": row["calibrate"] + row["quantize"], **row} for nodes, row in least.items()}


def show(seconds: dict[int, dict[str, float]]) -> None:
    """Print the table."""
    first = next(iter(seconds))
    names = list(seconds[first])
    print(f"{'nodes':>6} {'growth':>6}" + "".join(f"{f'{name} s':>18} {'growth':>6}" for name in names))
    for nodes, row in seconds.items():
        cells = (f"{row[name]:>18.2f} {row[name] / seconds[first][name]:>6.1f}" for name in names)
        print(f"{nodes:>6} {nodes / first:>6.1f}{''.join(cells)}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", nargs="+", type=int, default=[500, 1000, 2000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(Path(folder), args.nodes, args.rounds)
    print(json.dumps(seconds)) if args.json else show(seconds)


if __name__ == "__main__":
    main()
