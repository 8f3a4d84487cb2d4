"""OutlierMatMul on the CPU against ONNX Runtime's own float32 MatMul and DynamicQuantizeMatMul, in one run.

    python tests/bench/outlier_matmul.py [--threads 2] [--rows 1 8 64 512] [--shapes 4096x4096] [--lane avx2]
        [--clock cpu] [--json]
    python tests/bench/outlier_matmul.py --break-even [--threads 1] [--clock cpu]

Every cell is a ratio of times, float32 MatMul = 1.0, larger is faster. The candidates of one cell are timed in turn,
round after round, so that a change of clock speed or a neighbour's load falls on all of them; a cell is the median.
Products of few rows stand several times in one graph, each with weights of its own, where the weights are small: one
call of a session from Python costs as much as one of them.

``--lane`` forces the plugin's instruction set, not ONNX Runtime's: the ratios then say how lanes compare, not how
libraries do. With AVX2 both can be compared anywhere:

    python tests/bench/avx2_only.py python tests/bench/outlier_matmul.py --threads 1 --clock cpu

``--break-even`` measures small products, and ONNX Runtime's int8 with a static scale beside them: from which number of
inputs on OutlierMatMul (`OutlierOptions.min_inputs`) and static scales (`STATIC_FROM`) are faster than float.
"""

from __future__ import annotations

import argparse
import json
import os
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
BREAK_EVEN = tuple((k, n * k) for k in (32, 64, 96, 128, 192, 256) for n in (1, 4))
BREAK_EVEN_ROWS = (64, 512)
STATIC = "MatMulIntegerToFloat"
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
SECONDS_PER_CELL = 2.0
COPIES_UP_TO_BYTES = 64 << 20  # of float32 weights
FEW_ROWS = 8


@dataclass(frozen=True)
class Candidate:
    name: str
    session: ort.InferenceSession
    outputs: int

    def bind(self, x: np.ndarray) -> ort.IOBinding:
        """Results go to memory that is there already, as they do between the operators of a network."""
        binding = self.session.io_binding()
        binding.bind_cpu_input("x", x)
        for output in self.session.get_outputs():
            y = np.zeros((len(x), self.outputs), np.float32)
            binding.bind_ortvalue_output(output.name, ort.OrtValue.ortvalue_from_numpy(y))
        return binding

    def seconds(self, binding: ort.IOBinding, clock: Callable[[], float]) -> float:
        start = clock()
        self.session.run_with_iobinding(binding)
        return clock() - start


Node = tuple[str, str, dict[str, np.ndarray]]


def session(copies: list[Node], inputs: int, threads: int) -> ort.InferenceSession:
    """Open a session on a graph that applies each (operator, domain, constants) to the same x."""
    nodes, initializers, results = [], [], []
    for number, (op_type, domain, constants) in enumerate(copies):
        names = {name: f"{name}_{number}" for name in constants}
        initializers += [numpy_helper.from_array(value, names[name]) for name, value in constants.items()]
        results.append(helper.make_tensor_value_info(f"y_{number}", onnx.TensorProto.FLOAT, None))
        data = "x"
        if op_type == STATIC:
            data = f"q_{number}"
            nodes.append(helper.make_node("QuantizeLinear", ["x", names["x_scale"], names["x_zero"]], [data]))
        nodes.append(helper.make_node(op_type, [data, *names.values()], [f"y_{number}"], domain=domain))
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["M", inputs])
    graph = helper.make_graph(nodes, "bench", [x], results, initializers)
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid(DOMAIN, 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    plugins.register(options)
    model = helper.make_model(graph, opset_imports=imports, ir_version=9)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def candidates(inputs: int, outputs: int, threads: int, *, few_rows: bool) -> list[Candidate]:
    count = max(1, min(8, COPIES_UP_TO_BYTES // (inputs * outputs * 4))) if few_rows else 1
    rng = np.random.default_rng(0)
    scale = np.float32(1 / np.sqrt(inputs))
    weights = [rng.standard_normal((outputs, inputs), dtype=np.float32) * scale for _ in range(count)]
    copies: dict[str, list[Node]] = {
        "MatMul": [("MatMul", "", {"w": w.T.copy()}) for w in weights],
        "DynamicQuantize": [dynamic_quantize(w) for w in weights],
        "static": [static(w) for w in weights],
    }
    for outliers in OUTLIERS:
        index = np.linspace(0, inputs - 1, min(outliers, inputs)).astype(int)
        copies[f"O={outliers}"] = [(OP_TYPE, DOMAIN, pack(w, index, np.float32).inputs()) for w in weights]
    return [Candidate(name, session(nodes, inputs, threads), outputs) for name, nodes in copies.items()]


def dynamic_quantize(w: np.ndarray) -> Node:
    packed = pack(w, [], np.float32)
    constants = {"w": packed.w_q[:, : w.shape[1]].T.copy(), "s": packed.w_scale}
    return "DynamicQuantizeMatMul", "com.microsoft", constants


def static(w: np.ndarray) -> Node:
    """What ONNX Runtime makes of QuantizeLinear, DequantizeLinear and MatMul: the scheme w8a8 of one layer."""
    packed = pack(w, [], np.float32)
    constants = {
        "w": packed.w_q[:, : w.shape[1]].T.copy(),
        "x_scale": np.float32(8 / 255),
        "w_scale": packed.w_scale,
        "x_zero": np.uint8(128),
    }
    return STATIC, "com.microsoft", constants


def measure(items: list[Candidate], rows: int, inputs: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return the median time of each candidate in microseconds."""
    x = np.random.default_rng(1).standard_normal((rows, inputs), dtype=np.float32)
    bound = [(item, item.bind(x)) for item in items]
    for item, binding in bound:
        item.seconds(binding, clock)
    times: dict[str, list[float]] = {item.name: [] for item in items}
    end = time.perf_counter() + SECONDS_PER_CELL
    while time.perf_counter() < end or len(times[items[0].name]) < 7:
        for item, binding in bound:
            times[item.name].append(item.seconds(binding, clock))
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--shapes", nargs="+", metavar="KxN")
    parser.add_argument("--break-even", action="store_true", help="small products: from where int8 gains")
    parser.add_argument("--lane", help="instruction set of the plugin; qpipe plugin info lists those of this CPU")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: processor time of all threads")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    shapes = BREAK_EVEN if arguments.break_even else SHAPES
    arguments.shapes = arguments.shapes or [f"{k}x{n}" for k, n in shapes]
    arguments.rows = arguments.rows or list(BREAK_EVEN_ROWS if arguments.break_even else ROWS)
    return arguments


def main() -> None:
    """Measure every cell and print the table."""
    arguments = parse()
    if arguments.lane:
        os.environ["QPIPE_LANE"] = arguments.lane
    lane = os.environ.get("QPIPE_LANE") or plugins.info()["lanes"][0]
    results = []
    for shape in arguments.shapes:
        inputs, outputs = (int(part) for part in shape.split("x"))
        items, few_rows = [], None
        for rows in arguments.rows:
            if few_rows != (rows <= FEW_ROWS):
                few_rows = rows <= FEW_ROWS
                items = candidates(inputs, outputs, arguments.threads, few_rows=few_rows)
            micros = measure(items, rows, inputs, CLOCKS[arguments.clock])
            results.append({"K": inputs, "N": outputs, "M": rows, "microseconds": micros})
            if not arguments.json:
                report(results[-1], lane if len(results) == 1 else "")
    if arguments.json:
        facts = {"plugin": plugins.info(), "onnxruntime": ort.__version__, "threads": arguments.threads, "lane": lane}
        print(json.dumps({**facts, "clock": arguments.clock, "cells": results}))


def report(cell: dict, heading: str) -> None:
    micros = cell["microseconds"]
    names = list(micros)[1:]
    if heading:
        print(f"float32 MatMul = 1.0, larger is faster; OutlierMatMul's lane: {heading}")
        print(f"{'K x N':>12} {'M':>4} {'MatMul us':>10}  " + "".join(f"{n:>16}" for n in names) + "   O=64 / O=0")
    ratios = "".join(f"{micros['MatMul'] / micros[name]:16.2f}" for name in names)
    cost = micros["O=64"] / micros["O=0"]
    print(
        f"{cell['K']:>5} x {cell['N']:>4} {cell['M']:>4} {micros['MatMul']:10.0f}  {ratios}   {cost:10.2f}", flush=True
    )


if __name__ == "__main__":
    main()
