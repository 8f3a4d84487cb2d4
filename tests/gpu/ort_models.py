"""Whole models under ONNX Runtime's CUDA provider: float16 against w8a8-outlier, same data, interleaved.

    python tests/gpu/ort_models.py [--model block|minilm|all] [--rows 1,16,64,512,4096] [--json]

``block``: transformer layers with hidden size 4096 and planted outlier features. ``minilm``: the reference model, fixed
to one sequence length. Every node has to run on the chosen provider (``session.disable_cpu_ep_fallback=1``). ``--device
cpu --hidden 256 --mlp 512 --layers 1`` tries the program where there is no GPU; its times mean nothing there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from qpipe import plugins
from qpipe.calibrate.metrics import cosine
from qpipe.plugins.outlier_matmul import op as outlier_matmul

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
OUTLIERS = 6
REPEATS = 30


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; times in milliseconds."""

    model: str
    rows: int
    float16_ms: float
    outlier_ms: float
    cosine: float

    @property
    def speed(self) -> float:
        return self.float16_ms / self.outlier_ms


class BlockBuilder:
    """Transformer layers as an ONNX graph, float16, products either MatMul or OutlierMatMul."""

    def __init__(self, args: argparse.Namespace, *, quantized: bool) -> None:
        self.hidden, self.mlp, self.heads, self.quantized = args.hidden, args.mlp, args.hidden // 128, quantized
        self.rng = np.random.default_rng(1)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def node(self, kind: str, inputs: list[str], name: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def linear(self, x: str, inputs: int, outputs: int, name: str, outliers: np.ndarray) -> str:
        w = (self.rng.standard_normal((outputs, inputs), np.float32) / np.sqrt(inputs)).astype(np.float16)
        if not self.quantized:
            return self.node("MatMul", [x, self.constant(f"{name}_w", np.ascontiguousarray(w.T))], name)
        packed = outlier_matmul.pack(w, outliers, np.float16)
        names = [self.constant(f"{name}_{key}", value) for key, value in packed.inputs().items()]
        return self.node(outlier_matmul.OP_TYPE, [x, *names], name, domain=outlier_matmul.DOMAIN)

    def norm(self, x: str, name: str) -> tuple[str, np.ndarray]:
        """LayerNormalization whose scale makes a few features large, and which they are."""
        outliers = np.sort(self.rng.permutation(self.hidden)[:OUTLIERS])
        scale = np.ones(self.hidden, np.float16)
        scale[outliers] = 40
        inputs = [x, self.constant(f"{name}_scale", scale), self.constant(f"{name}_bias", np.zeros_like(scale))]
        return self.node("LayerNormalization", inputs, name), outliers

    def attention(self, x: str, name: str) -> str:
        y, outliers = self.norm(x, f"{name}_norm")
        split = self.constant(f"{name}_split", np.array([0, -1, self.heads, 128], np.int64))
        join = self.constant(f"{name}_join", np.array([0, -1, self.hidden], np.int64))
        turned = {}
        for part, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
            product = self.linear(y, self.hidden, self.hidden, f"{name}_{part}", outliers)
            wide = self.node("Reshape", [product, split], f"{name}_{part}_split")
            turned[part] = self.node("Transpose", [wide], f"{name}_{part}_turned", perm=perm)
        scores = self.node("MatMul", [turned["q"], turned["k"]], f"{name}_scores")
        factor = self.constant(f"{name}_factor", np.array(128**-0.5, np.float16))
        weights = self.node("Softmax", [self.node("Mul", [scores, factor], f"{name}_scaled")], f"{name}_weights")
        mixed = self.node("MatMul", [weights, turned["v"]], f"{name}_mixed")
        back = self.node("Transpose", [mixed], f"{name}_back", perm=[0, 2, 1, 3])
        joined = self.node("Reshape", [back, join], f"{name}_joined")
        out = self.linear(joined, self.hidden, self.hidden, f"{name}_out", np.zeros(0, np.int64))
        return self.node("Add", [x, out], f"{name}_sum")

    def feed_forward(self, x: str, name: str) -> str:
        y, outliers = self.norm(x, f"{name}_norm")
        gate = self.linear(y, self.hidden, self.mlp, f"{name}_gate", outliers)
        up = self.linear(y, self.hidden, self.mlp, f"{name}_up", outliers)
        silu = self.node("Mul", [gate, self.node("Sigmoid", [gate], f"{name}_sigmoid")], f"{name}_silu")
        both = self.node("Mul", [silu, up], f"{name}_both")
        down = self.linear(both, self.mlp, self.hidden, f"{name}_down", np.zeros(0, np.int64))
        return self.node("Add", [x, down], f"{name}_sum")

    def model(self, layers: int) -> onnx.ModelProto:
        x = "x"
        for layer in range(layers):
            x = self.feed_forward(self.attention(x, f"layer{layer}_attention"), f"layer{layer}_mlp")
        self.nodes[-1].output[0] = "y"
        shape = ["batch", "tokens", self.hidden]
        ends = [[helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape)] for name in ("x", "y")]
        graph = helper.make_graph(self.nodes, "block", *ends, self.constants)
        imports = [helper.make_opsetid("", 17), helper.make_opsetid(outlier_matmul.DOMAIN, outlier_matmul.VERSION)]
        return helper.make_model(graph, opset_imports=imports, ir_version=10)


def open_session(path: Path, device: str):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if device == "cuda":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    plugins.register(options)
    return onnxruntime.InferenceSession(str(path), options, providers=[PROVIDERS[device]])


class Runner:
    """A session whose inputs and outputs stay on the device."""

    def __init__(self, path: Path, device: str, feeds: dict[str, np.ndarray]) -> None:
        import onnxruntime

        self.session = open_session(path, device)
        self.binding = self.session.io_binding()
        self.held = {k: onnxruntime.OrtValue.ortvalue_from_numpy(v, device, 0) for k, v in feeds.items()}
        for name, value in self.held.items():
            self.binding.bind_ortvalue_input(name, value)
        for output in self.session.get_outputs():
            self.binding.bind_output(output.name, device)
        for _ in range(3):
            self.milliseconds()

    def milliseconds(self) -> float:
        start = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        self.binding.synchronize_outputs()
        return 1e3 * (time.perf_counter() - start)

    def result(self) -> np.ndarray:
        return self.binding.copy_outputs_to_cpu()[0].astype(np.float32)


def compare(name: str, rows: int, paths: tuple[Path, Path], device: str, feeds: dict[str, np.ndarray]) -> Row:
    runners = [Runner(path, device, feeds) for path in paths]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):
        for runner, taken in zip(runners, times, strict=True):
            taken.append(runner.milliseconds())
    exact, tested = (runner.result() for runner in runners)
    medians = [statistics.median(taken) for taken in times]
    return Row(model=name, rows=rows, float16_ms=medians[0], outlier_ms=medians[1], cosine=float(cosine(exact, tested)))


def block_rows(args: argparse.Namespace, folder: Path) -> Iterator[Row]:
    paths = (folder / "block.onnx", folder / "block_outlier.onnx")
    for path, quantized in zip(paths, (False, True), strict=True):
        model = BlockBuilder(args, quantized=quantized).model(args.layers)
        onnx.save(model, path, save_as_external_data=True, location=path.name + ".data")
    for rows in args.rows:
        x = np.random.default_rng(2).standard_normal((1, rows, args.hidden), np.float32).astype(np.float16)
        yield compare("block", rows, paths, args.device, {"x": x})


def minilm_rows(args: argparse.Namespace, folder: Path) -> Iterator[Row]:
    from qpipe import models
    from qpipe.models.comparison import Subject
    from qpipe.pipeline.graph import save
    from qpipe.pipeline.recipe import make_recipe
    from qpipe.pipeline.stages.collect import CollectOptions
    from qpipe.pipeline.stages.quantize import needed_detail
    from qpipe.pipeline.workflow import Job

    source = args.minilm or Subject.export("minilm", folder).float_path
    evaluated = next(iter(models.get("minilm").evaluation_batches()))
    calibrated = list(models.get("minilm").calibration_batches())
    # One shape for all: the graph then holds no node that works on shapes.
    shapes = [array.shape for batch in (evaluated, *calibrated) for array in batch.values()]
    shape = tuple(int(extent) for extent in np.max(shapes, axis=0))
    feeds, *padded = ({k: pad(v, shape) for k, v in batch.items()} for batch in (evaluated, *calibrated))
    paths = (folder / "minilm16.onnx", folder / "minilm16_outlier.onnx")
    write_float16(source, paths[0], dict.fromkeys(feeds, shape), folder)
    job, recipe = Job.open(paths[0]), make_recipe(scheme="w8a8-outlier")
    # Float16 turns the mask's large negative number into -Inf.
    options, needed = CollectOptions(allow_nonfinite=True), job.needed(recipe)
    calibration = job.collect(padded, options, detail=needed_detail(recipe), tensors=needed)
    save(job.quantize(recipe, calibration).model, paths[1])
    yield compare("minilm", int(np.prod(shape)), paths, args.device, feeds)


def pad(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.pad(array, [(0, b - a) for a, b in zip(array.shape, shape, strict=True)])


def write_float16(source: Path, target: Path, shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    """Fix the input shapes, fold what depends on shapes only (it would run on the CPU), convert to float16."""
    import onnxruntime
    from onnxruntime.transformers.float16 import convert_float_to_float16

    fixed, folded = folder / "fixed.onnx", folder / "folded.onnx"
    model = onnx.load(source)
    for entry in model.graph.input:
        for dim, extent in zip(entry.type.tensor_type.shape.dim, shapes[entry.name], strict=True):
            dim.Clear()
            dim.dim_value = extent
    onnx.save(model, fixed)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(folded)
    onnxruntime.InferenceSession(str(fixed), options, providers=["CPUExecutionProvider"])
    onnx.save(convert_float_to_float16(onnx.load(folded), keep_io_types=True), target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=["block", "minilm", "all"], default="all")
    parser.add_argument("--device", choices=sorted(PROVIDERS), default="cuda")
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1, 16, 64, 512])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=11008)
    parser.add_argument("--minilm", type=Path, help="exported float32 model; exported here when left out")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="qpipe-gpu-") as folder:
        if args.model in ("block", "all"):
            found += block_rows(args, Path(folder))
        if args.model in ("minilm", "all"):
            found += minilm_rows(args, Path(folder))
    if args.json:
        print(json.dumps([{**asdict(row), "speed": row.speed} for row in found]))
        return 0
    print(f"{'model':<8} {'rows':>5} {'float16 ms':>11} {'outlier ms':>11} {'x':>6} {'cosine':>9}")
    for row in found:
        times = f"{row.float16_ms:11.3f} {row.outlier_ms:11.3f} {row.speed:6.2f}"
        print(f"{row.model:<8} {row.rows:5d} {times} {row.cosine:9.6f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
