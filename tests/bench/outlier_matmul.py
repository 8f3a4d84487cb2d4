"""OutlierMatMul on the CPU against ONNX Runtime's own float32 MatMul and DynamicQuantizeMatMul, in one run.

    python tests/bench/outlier_matmul.py [--threads 2] [--rows 1 8 64 512] [--shapes 4096x4096] [--clock cpu] [--json]

Every cell is a ratio of times, float32 MatMul = 1.0, larger is faster. The candidates of one cell are timed in turn,
round after round, so that a change of clock speed or a neighbour's load falls on all of them; a cell is the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from qpipe import plugins
from qpipe.plugins.outlier_matmul.op import DOMAIN, OP_TYPE, pack

SHAPES = ((384, 1536), (768, 3072), (4096, 4096), (4096, 11008))
ROWS = (1, 8, 64, 512)
OUTLIERS = (0, 8, 64)
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
SECONDS_PER_CELL = 2.0


@dataclass(frozen=True)
class Candidate:
    name: str
    session: ort.InferenceSession

    def seconds(self, x: np.ndarray, clock: Callable[[], float]) -> float:
        start = clock()
        self.session.run(None, {"x": x})
        return clock() - start


def session(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], inputs: int, threads: int) -> ort.InferenceSession:
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["M", inputs])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "bench", [x], [y], initializers)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid(DOMAIN, 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    plugins.register(options)
    model = helper.make_model(graph, opset_imports=imports, ir_version=9)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def candidates(inputs: int, outputs: int, threads: int) -> list[Candidate]:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((outputs, inputs), dtype=np.float32) / np.float32(np.sqrt(inputs))
    made = [
        Candidate("MatMul", session([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": w.T.copy()}, inputs, threads))
    ]
    plain = pack(w, [], np.float32)
    dynamic = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s"], ["y"], domain="com.microsoft")
    columns = {"w": plain.w_q[:, :inputs].T.copy(), "s": plain.w_scale}
    made.append(Candidate("DynamicQuantize", session([dynamic], columns, inputs, threads)))
    for count in OUTLIERS:
        packed = pack(w, np.linspace(0, inputs - 1, count).astype(int), np.float32).inputs()
        node = helper.make_node(OP_TYPE, ["x", *packed], ["y"], domain=DOMAIN)
        made.append(Candidate(f"O={count}", session([node], packed, inputs, threads)))
    return made


def measure(items: list[Candidate], rows: int, inputs: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return the median time of each candidate in microseconds."""
    x = np.random.default_rng(1).standard_normal((rows, inputs), dtype=np.float32)
    for item in items:
        item.seconds(x, clock)
    times: dict[str, list[float]] = {item.name: [] for item in items}
    end = time.perf_counter() + SECONDS_PER_CELL
    while time.perf_counter() < end or len(times[items[0].name]) < 7:
        for item in items:
            times[item.name].append(item.seconds(x, clock))
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--shapes", nargs="+", default=[f"{k}x{n}" for k, n in SHAPES], metavar="KxN")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: processor time of all threads")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measure every cell and print the table."""
    arguments = parse()
    results = []
    for shape in arguments.shapes:
        inputs, outputs = (int(part) for part in shape.split("x"))
        items = candidates(inputs, outputs, arguments.threads)
        for rows in arguments.rows:
            micros = measure(items, rows, inputs, CLOCKS[arguments.clock])
            results.append({"K": inputs, "N": outputs, "M": rows, "microseconds": micros})
            if not arguments.json:
                report(results[-1], first=len(results) == 1)
    if arguments.json:
        facts = {"plugin": plugins.info(), "onnxruntime": ort.__version__, "threads": arguments.threads}
        print(json.dumps({**facts, "clock": arguments.clock, "cells": results}))


def report(cell: dict, *, first: bool) -> None:
    micros = cell["microseconds"]
    names = list(micros)[1:]
    if first:
        print(f"{'K x N':>12} {'M':>4} {'MatMul us':>10}  " + "".join(f"{name:>16}" for name in names) + "   O=64 / O=0")
    ratios = "".join(f"{micros['MatMul'] / micros[name]:16.2f}" for name in names)
    cost = micros["O=64"] / micros["O=0"]
    print(f"{cell['K']:>5} x {cell['N']:>4} {cell['M']:>4} {micros['MatMul']:10.0f}  {ratios}   {cost:10.2f}", flush=True)


if __name__ == "__main__":
    main()
