"""A model larger than the memory allowed: quantized to w8 and w4, with peak memory and time beside plain copying.

    python tests/bench/large_model.py [--gib 1] [--layouts one shards cache] [--schemes w8 w4] [--dir FOLDER] [--json]

Builds a float16 transformer of random weights (blocks of Q, K, V, O, up and down projections between normalizations)
in external data, in one of three layouts: ``one`` data file, ``shards`` (a data file per few blocks), or ``cache`` (the
Hugging Face cache: model and shards are links into ``blobs/``). Each quantization is one ``qpipe quantize`` in a child,
whose peak resident memory the kernel reports (``VmHWM``). Beside it stand reading the input and writing as many
bytes as the output once, flushed, in the same run, right before. Input pages are dropped from the page cache before
each (``posix_fadvise``); the system's cache as a whole cannot be dropped without rights, so some reads may still come
from memory. The output is opened in ONNX Runtime, and two of its layers are compared with what quantizing them in
memory gives.

All are for the default target. ``w4`` is round to nearest in blocks of 32 (MatMulNBits), ``w4-qdq`` the same in plain
ONNX; ``w4-mse`` is the scheme ``w4`` as it comes, which searches scales and spends its time on that.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HIDDEN = 2048
INNER = 8192
PAGE = 4096
CHUNK = 2**24
LIMIT_GIB = 1.0
LIMIT_RATIO = 3.0

_INT4 = {"format": "int4", "granularity": "block", "block_size": 32}
SCHEMES = {
    "w8": {"scheme": "w8"},
    "w4": {"scheme": "w4", "weights": {**_INT4, "algorithm": "rtn"}},
    "w4-qdq": {"scheme": "w4", "target": "portable", "weights": {**_INT4, "algorithm": "rtn"}},
    "w4-mse": {"scheme": "w4"},
}


class DataFiles:
    """Data files that random weights of one type are appended to, a chunk at a time.

    Drawing billions of normal numbers takes longer than what is measured: every chunk begins somewhere in a pool.
    """

    def __init__(self, folder: Path, shards: int, dtype: str = "float16") -> None:
        self.dtype = np.dtype(dtype)
        self.onnx_type = helper.np_dtype_to_tensor_dtype(self.dtype)
        self._paths = [folder / f"model.data{'' if shards == 1 else f'-{i}'}" for i in range(shards)]
        self._rng = np.random.default_rng(0)
        self._pool = self._rng.standard_normal(2 * CHUNK // 4, np.float32)

    def weight(self, name: str, shape: tuple[int, int], shard: int) -> TensorProto:
        """Append a weight of normal size for its inputs and return a reference to it."""
        path = self._paths[shard % len(self._paths)]
        tensor = TensorProto(name=name, data_type=self.onnx_type, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        with path.open("ab") as file:
            offset = -(-file.tell() // PAGE) * PAGE
            file.write(bytes(offset - file.tell()))
            left = shape[0] * shape[1]
            while left:
                count = min(left, CHUNK // 4)
                start = self._rng.integers(self._pool.size - count)
                values = self._pool[start : start + count] * np.float32(shape[0] ** -0.5)
                file.write(values.astype(self.dtype).data)
                left -= count
        for key, value in (
            ("location", path.name),
            ("offset", offset),
            ("length", shape[0] * shape[1] * self.dtype.itemsize),
        ):
            tensor.external_data.add(key=key, value=str(value))
        return tensor


def block(index: int, data: DataFiles, shard: int) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """One transformer block from ``h{index}`` to ``h{index + 1}``."""
    nodes, tensors = [], []

    def product(x: str, name: str, shape: tuple[int, int]) -> str:
        tensors.append(data.weight(f"b{index}.{name}", shape, shard))
        nodes.append(helper.make_node("MatMul", [x, f"b{index}.{name}"], [f"b{index}.{name}.y"], f"b{index}/{name}"))
        return f"b{index}.{name}.y"

    def node(op: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [f"b{index}.{output}"], f"b{index}/{output}", **attributes))
        return f"b{index}.{output}"

    ones = np.ones(HIDDEN, data.dtype)
    tensors.extend(numpy_helper.from_array(ones, f"b{index}.{norm}.w") for norm in ("norm1", "norm2"))
    x = node("LayerNormalization", [f"h{index}", f"b{index}.norm1.w"], "norm1", axis=-1)
    q, k, v = (product(x, name, (HIDDEN, HIDDEN)) for name in ("q", "k", "v"))
    scores = node("Softmax", [node("MatMul", [q, node("Transpose", [k], "kt", perm=[0, 2, 1])], "scores")], "attention")
    mixed = product(node("MatMul", [scores, v], "mixed"), "o", (HIDDEN, HIDDEN))
    middle = node("Add", [f"h{index}", mixed], "middle")
    inner = product(node("LayerNormalization", [middle, f"b{index}.norm2.w"], "norm2", axis=-1), "up", (HIDDEN, INNER))
    down = product(node("Relu", [inner], "relu"), "down", (INNER, HIDDEN))
    nodes.append(helper.make_node("Add", [middle, down], [f"h{index + 1}"], f"b{index}/add"))
    return nodes, tensors


def build(folder: Path, gib: float, layout: str, dtype: str = "float16") -> Path:
    """Write the model in one of the layouts and return its path."""
    size = np.dtype(dtype).itemsize * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER)
    count = max(1, round(gib * 2**30 / size))
    home = folder / "blobs" if layout == "cache" else folder
    home.mkdir(parents=True, exist_ok=True)
    shards = 1 if layout == "one" else 3
    data = DataFiles(home, shards, dtype)
    nodes, tensors = [], []
    for index in range(count):
        new_nodes, new_tensors = block(index, data, index * shards // count)
        nodes += new_nodes
        tensors += new_tensors
    ends = [helper.make_tensor_value_info(n, data.onnx_type, ["N", "T", HIDDEN]) for n in ("h0", f"h{count}")]
    body = helper.make_graph(nodes, "large", ends[:1], ends[1:], tensors)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    (home / "model.onnx").write_bytes(model.SerializeToString())
    return _linked(folder, home) if layout == "cache" else home / "model.onnx"


def _linked(folder: Path, blobs: Path) -> Path:
    """Turn the files into the layout of the Hugging Face cache: blobs named by a hash, links in a snapshot."""
    snapshot = folder / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for index, path in enumerate(sorted(blobs.iterdir())):
        blob = path.rename(blobs / f"{index:064x}")
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot / "model.onnx"


def files_of(model: Path) -> list[Path]:
    """The files of a model, data included."""
    return sorted(path for path in model.parent.iterdir() if path.name.startswith(model.stem))


def forget(paths: list[Path]) -> None:
    """Drop the pages of files from the page cache, as far as an ordinary user may."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_once(paths: list[Path]) -> float:
    """Seconds to read files once."""
    buffer = bytearray(CHUNK)
    start = time.perf_counter()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def write_once(folder: Path, size: int) -> float:
    """Seconds to write ``size`` bytes and flush them."""
    chunk = np.random.default_rng(1).bytes(CHUNK)
    path = folder / "written"
    start = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for begin in range(0, size, CHUNK):
            file.write(memoryview(chunk)[: size - begin])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


_CHILD = """
import json, resource, sys, time
start = time.perf_counter()
from qpipe.pipeline.cli import main
from qpipe.pipeline.memory import peak_memory
code = main(sys.argv[1:])
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"code": code, "peak": peak_memory(), "seconds": time.perf_counter() - start,
                  "processor": usage.ru_utime + usage.ru_stime}), file=sys.stderr)
"""


def quantize(model: Path, output: Path, recipe: dict) -> dict:
    """Run ``qpipe quantize`` in a child; return its exit code, peak memory, seconds, and what it printed."""
    keys = output.with_suffix(".yaml")
    keys.write_text(json.dumps(recipe))
    command = ["quantize", model, "-o", output, "--recipe", keys, "--json"]
    done = subprocess.run([sys.executable, "-c", _CHILD, *map(str, command)], capture_output=True, text=True)
    if done.returncode or not done.stderr.strip():
        raise SystemExit(done.stderr)
    facts = json.loads(done.stderr.strip().splitlines()[-1])
    if facts["code"]:
        raise SystemExit(done.stderr)
    printed = json.loads(done.stdout)
    return {**facts, "estimate": printed.get("estimate"), "measured": printed.get("measured")}


_OPEN = """
import resource, sys
import onnxruntime as ort
options = ort.SessionOptions()
options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
options.add_session_config_entry("session.disable_prepacking", "1")
ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print("loads")
"""


def opens(model: Path) -> bool:
    """Whether ONNX Runtime opens a model, in a process of its own; as it is, without folding its weights back."""
    done = subprocess.run([sys.executable, "-c", _OPEN, str(model)], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-500:], file=sys.stderr)
    return done.stdout.strip() == "loads"


def spot_check(source: Path, output: Path, names: list[str]) -> bool:
    """Whether layers of the output hold the codes and scales that quantizing them in memory gives."""
    from qpipe.calibrate.weights import WEIGHT_METHODS
    from qpipe.pipeline import graph
    from qpipe.pipeline.layouts import layout_of
    from qpipe.pipeline.recipe import make_recipe
    from qpipe.pipeline.stages.weights import quantize_layer

    recipe = make_recipe(**json.loads(output.with_suffix(".yaml").read_text())).settled(knows_inputs=False)
    before = {node.name: node for node in graph.load(source).graph.nodes}
    after = {node.name: node for node in graph.load(output).graph.nodes}
    for name in names:
        weight = np.asarray(graph.values(before[name].inputs[1]))
        layout = layout_of(before[name], weight.shape)
        method = WEIGHT_METHODS.resolve(recipe.weights.algorithm or "rtn")
        whole = quantize_layer(weight, recipe.weights.spec(1, 0), layout, method)
        node = after[name]
        if node.op == "MatMulNBits":
            from qpipe.pipeline.forms.nbits import pack_blocks

            codes = pack_blocks((whole.q.astype(np.int16) + 8).astype(np.uint8).T, 4, 32)
            same = np.array_equal(codes, graph.values(node.inputs[1]))
            scale, held = whole.params.scale.T, graph.values(node.inputs[2]).reshape(whole.params.scale.T.shape)
        else:
            dequantize = node.inputs[1].inputs[0]
            same = graph.values(dequantize.inputs[0]).tobytes() == whole.q.tobytes()
            held = graph.values(dequantize.inputs[1])
            scale = whole.params.scale.reshape(held.shape)
        if not (same and np.array_equal(scale.astype(held.dtype), held)):
            return False
    return True


def measure(folder: Path, source: Path, layout: str, scheme: str) -> dict:
    """Quantize once; return a row of the table."""
    output = folder / "out" / f"{scheme}.onnx"
    output.parent.mkdir(exist_ok=True)
    inputs = files_of(source)
    forget(inputs)
    facts = quantize(source, output, SCHEMES[scheme])
    size = sum(path.stat().st_size for path in files_of(output))
    forget(inputs)
    read = read_once(inputs)
    written = write_once(output.parent, size)
    count = len([n for n in onnx.load(source, load_external_data=False).graph.node if n.name.endswith("/q")])
    row = {
        "layout": layout,
        "scheme": scheme,
        "input_bytes": sum(path.stat().st_size for path in inputs),
        "output_bytes": size,
        "peak_bytes": facts["peak"],
        "seconds": facts["seconds"],
        "processor_seconds": facts["processor"],
        "read_seconds": read,
        "write_seconds": written,
        "ratio": facts["seconds"] / (read + written),
        "opens": opens(output),
        "equal": spot_check(source, output, ["b0/q", f"b{count - 1}/down"]),
        "estimate": facts["estimate"],
        "measured": facts["measured"],
    }
    shutil.rmtree(output.parent)
    return row


def _yes(value: bool) -> str:
    return "yes" if value else "NO"


def line(r: dict) -> str:
    """A row as text."""
    return (
        f"{r['layout']:8}{r['scheme']:8}{r['input_bytes'] / 2**30:8.2f}{r['output_bytes'] / 2**30:9.2f}"
        f"{r['peak_bytes'] / 2**30:10.3f}{r['seconds']:8.1f}{r['processor_seconds']:8.1f}{r['read_seconds']:8.1f}"
        f"{r['write_seconds']:9.1f}{r['ratio']:7.2f}  {_yes(r['opens']):5}  {_yes(r['equal'])}"
    )


def table(rows: list[dict]) -> list[str]:
    """The rows as text."""
    lines = [
        f"{'layout':8}{'scheme':8}{'in GiB':>8}{'out GiB':>9}{'peak GiB':>10}{'time s':>8}{'cpu s':>8}{'read s':>8}"
        f"{'write s':>9}{'ratio':>7}  opens  equal",
        *map(line, rows),
    ]
    kept = all(
        r["peak_bytes"] <= LIMIT_GIB * 2**30 and r["ratio"] <= LIMIT_RATIO and r["opens"] and r["equal"] for r in rows
    )
    bounds = f"at most {LIMIT_GIB} GiB, at most {LIMIT_RATIO} times reading and writing once, opens, equal"
    return [*lines, f"{bounds}: {'kept' if kept else 'NOT kept'}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the float16 model (default: 1)")
    parser.add_argument("--layouts", nargs="+", choices=["one", "shards", "cache"], default=["one", "shards", "cache"])
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=["w8", "w4"])
    parser.add_argument("--dir", type=Path, help="where the models are built (default: the temporary folder)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for layout in options.layouts:
        with tempfile.TemporaryDirectory(prefix="qpipe-large-", dir=options.dir) as name:
            source = build(Path(name), options.gib, layout)
            for scheme in options.schemes:
                rows.append(measure(Path(name), source, layout, scheme))
                print(line(rows[-1]), file=sys.stderr)
    print(json.dumps({"gib": options.gib, "rows": rows}) if options.json else "\n".join(table(rows)))


if __name__ == "__main__":
    main()
