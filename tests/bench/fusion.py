"""What ONNX Runtime makes of the reference models, and what that is worth: kernels, islands, speed against float.

    python tests/bench/fusion.py [--models minilm digits_cnn tiny_gpt] [--dir DIR] [--rounds N] [--threads N]
                                 [--clock wall|cpu] [--attention] [--json]

Every model takes its turn in each round of one process; a ratio is the median over rounds of float's time over its own,
above 1 is faster than float. ``passes`` are the rewritings that the target ort-cpu declares, each also alone, on the
w8a8 model. ``--attention`` times one attention block as exporters write it beside ONNX Runtime's own operators for it,
with and without masked keys. ``--clock cpu`` counts processor time of one thread: it is steadier on a busy machine, and
says nothing about how well operators share threads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper
from qpipe.models.comparison import Subject, ort_dynamic, ort_static, qpipe
from qpipe.pipeline import graph
from qpipe.pipeline.fresh import FreshNames
from qpipe.pipeline.fusion import ort
from qpipe.pipeline.ordering import sort_nodes
from qpipe.pipeline.passes import TARGET_PASSES
from qpipe.pipeline.session import make_session
from qpipe.pipeline.stages.prepare import infer_types, prepare

CONFIGS: dict[str, Callable[[Subject, Path], None]] = {
    "quantize_static": ort_static,
    "quantize_dynamic": ort_dynamic,
    "w8a8, no passes": qpipe(scheme="w8a8", target="portable"),
    "w8a8": qpipe(scheme="w8a8", target="ort-cpu"),
    "w8a8-dynamic, no passes": qpipe(scheme="w8a8-dynamic", target="portable"),
    "w8a8-dynamic": qpipe(scheme="w8a8-dynamic", target="ort-cpu"),
}
TIMED_BATCHES = 3
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}
BLOCKS = ((8, 36, 12, 32), (8, 128, 12, 32), (1, 128, 12, 64), (1, 512, 12, 64))
"""Samples, tokens, heads and values per head of the attention blocks."""

Batch = Mapping[str, np.ndarray]


def race(paths: Sequence[Path | bytes], batches: Sequence[Batch], options: argparse.Namespace) -> list[float]:
    """Return, per model, how many times faster than the first one it is."""
    threads = 1 if options.clock == "cpu" else options.threads
    sessions = [make_session(path, threads=threads) for path in paths]
    wanted = [{entry.name for entry in session.get_inputs()} for session in sessions]
    clock, times = CLOCKS[options.clock], [[] for _ in paths]
    for turn in range(options.rounds + 1):
        for session, names, mine in zip(sessions, wanted, times, strict=True):
            start = clock()
            for batch in batches:
                session.run(None, {name: array for name, array in batch.items() if name in names})
            if turn:
                mine.append(clock() - start)
    return [statistics.median(base / own for base, own in zip(times[0], mine, strict=True)) for mine in times]


def of_model(name: str, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Make every configuration of a model, say what became of it, and time all of them in turn."""
    subject = Subject.export(name, folder)
    paths = {"float": subject.float_path}
    for config, make in CONFIGS.items():
        path = folder / f"{name}.{config.replace(', ', '.').replace(' ', '-')}.onnx"
        if not path.exists():
            make(subject, path)
        paths[config] = path
    paths.update(with_single_passes(paths["w8a8, no passes"]))
    batches = list(itertools.islice(subject.reference.evaluation_batches(), TIMED_BATCHES))
    ratios = race(list(paths.values()), batches, options)
    return [
        {"model": name, "config": config, "ratio": ratio, **became(path)}
        for (config, path), ratio in zip(paths.items(), ratios, strict=True)
    ]


def with_single_passes(path: Path) -> dict[str, Path]:
    """Write, for each pass of a target, the model with that pass alone; one that changes nothing is left out."""
    found = {}
    for name, run in TARGET_PASSES.items():
        model = graph.load(path)
        infer_types(model)
        if not run(model.graph, FreshNames(model.graph)):
            continue
        model.graph.cleanup(remove_unused_graph_inputs=False)
        sort_nodes(model.graph)
        target = path.with_name(f"{path.stem}.{name}.onnx")
        graph.save(model, target, force=True)
        found[f"w8a8, {name} alone"] = target
    return found


def became(path: Path) -> dict[str, Any]:
    """Return what ONNX Runtime makes of a model: integer kernels by type, and islands."""
    found = ort.evidence(graph.load(path), path)
    kernels = Counter(fate.became for fate in found.fates if fate.verdict in ("integer", "packed"))
    return {"kernels": dict(kernels), "islands": found.counts()["island"], "pairs": found.pairs, "fused": found.fused}


def block(kind: str, heads: int, size: int) -> bytes:
    """Return one attention block over projections q, k and v [N, T, H * D] and a mask [N, 1, T, T]."""
    width, node = heads * size, helper.make_node
    held = {"heads": np.array([0, 0, heads, size]), "flat": np.array([0, 0, width]), "scale": np.float32(size**-0.5)}
    nodes = []
    if kind == "as exported":
        for name in "qkv":
            order = [0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
            nodes += [node("Reshape", [name, "heads"], [f"{name}r"])]
            nodes += [node("Transpose", [f"{name}r"], [f"{name}t"], perm=order)]
        nodes += [
            node("MatMul", ["qt", "kt"], ["s"]),
            node("Mul", ["s", "scale"], ["scaled"]),
            node("Add", ["scaled", "mask"], ["masked"]),
            node("Softmax", ["masked"], ["p"], axis=-1),
            node("MatMul", ["p", "vt"], ["o"]),
            node("Transpose", ["o"], ["ot"], perm=[0, 2, 1, 3]),
            node("Reshape", ["ot", "flat"], ["y"]),
        ]
    elif kind == "MultiHeadAttention":
        inputs = ["q", "k", "v", "", "", "mask"]
        nodes = [node(kind, inputs, ["y"], num_heads=heads, scale=size**-0.5, domain="com.microsoft")]
    else:
        heads_of = {"q_num_heads": heads, "kv_num_heads": heads, "scale": size**-0.5}
        nodes = [node("Attention", ["q", "k", "v", "mask"], ["y"], **heads_of)]
    real = onnx.TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info(name, real, ["N", "T", width]) for name in "qkv"]
    inputs.append(helper.make_tensor_value_info("mask", real, ["N", 1, "T", "T"]))
    constants = [numpy_helper.from_array(np.asarray(array), name) for name, array in held.items()]
    output = [helper.make_tensor_value_info("y", real, ["N", "T", width])]
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_graph(nodes, "attention", inputs, output, constants)
    return bytes(helper.make_model(made, opset_imports=imports, ir_version=11).SerializeToString())


def floored(heads: int, size: int) -> bytes:
    """Return the block as exported, with the floor that the target ort-cpu puts under masked scores."""
    model = prepare(graph.from_proto(onnx.load_from_string(block("as exported", heads, size))))
    TARGET_PASSES["floor_masked_softmax"](model.graph, FreshNames(model.graph))
    sort_nodes(model.graph)
    return bytes(graph.to_proto(model).SerializeToString())


def attention(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time attention blocks of several shapes, without and with a third of the keys masked."""
    rng, rows = np.random.default_rng(0), []
    for samples, tokens, heads, size in BLOCKS:
        kinds = {kind: block(kind, heads, size) for kind in ("as exported", "MultiHeadAttention", "Attention")}
        kinds["with a floor"] = floored(heads, size)
        batch = {name: rng.standard_normal((samples, tokens, heads * size), dtype=np.float32) for name in "qkv"}
        for masked in (False, True):
            mask = np.zeros((samples, 1, tokens, tokens), np.float32)
            mask[..., 2 * tokens // 3 :] = np.finfo(np.float32).min if masked else 0
            ratios = race(list(kinds.values()), [{**batch, "mask": mask}], options)
            shape = f"{samples} x {tokens} x {heads} x {size}"
            rows.append({"shape": shape, "masked": masked, **dict(zip(kinds, ratios, strict=True))})
    return rows


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["minilm", "digits_cnn", "tiny_gpt"])
    parser.add_argument("--dir", type=Path, help="where models are kept; those that are there are taken")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help="threads of each operator; all cores by default")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--attention", action="store_true", help="time attention blocks instead of models")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    options = parse()
    if options.attention:
        rows = attention(options)
    else:
        with tempfile.TemporaryDirectory() as fresh:
            folder = options.dir or Path(fresh)
            folder.mkdir(parents=True, exist_ok=True)
            rows = [row for name in options.models for row in of_model(name, folder, options)]
    if options.json:
        facts = {"onnxruntime": onnxruntime.__version__, "clock": options.clock, "threads": options.threads}
        print(json.dumps({**facts, "rows": rows}))
        return
    for row in rows:
        print(line_of_block(row) if options.attention else line_of_model(row), flush=True)


def line_of_model(row: dict[str, Any]) -> str:
    """Return a row of the table of models."""
    kernels = ", ".join(f"{kind} {count}" for kind, count in row["kernels"].items()) or "-"
    fused = f"{row['fused']}/{row['pairs']} pairs"
    figures = f"{row['ratio']:6.2f}x  islands {row['islands']:>2}  {fused:<12}"
    return f"{row['model']:<11} {row['config']:<34} {figures} {kernels}"


def line_of_block(row: dict[str, Any]) -> str:
    """Return a row of the table of attention blocks."""
    ratios = "  ".join(f"{kind} {row[kind]:.2f}x" for kind in row if kind not in ("shape", "masked"))
    return f"{row['shape']:<18} {'masked' if row['masked'] else 'full':<7} {ratios}"


if __name__ == "__main__":
    main()
