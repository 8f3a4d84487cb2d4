"""Two models compared with one layer of each in memory: the figures of a whole comparison, with little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser
from qpipe.calibrate.errors import DataError, RecipeError
from qpipe.pipeline import graph
from qpipe.pipeline.cli import main
from qpipe.pipeline.session import make_session
from qpipe.pipeline.side_by_side import side_by_side
from qpipe.pipeline.stages.validate import validate
from qpipe.pipeline.validation import DEPLOYED, EXACT, ValidateOptions

NET = """<ir_version: 10, opset_import: ["": 21]> g (float[N,3,8,8] x) => (float[N,4] y, float[N,6] d, float[6] k) {
    a = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w1, b1)  b = Relu(a)
    c = GlobalAveragePool(b)  d = Flatten(c)  k = Neg(b1)
    e = MatMul(d, w2)  f = MatMul(d, w3)  h = Mul(e, f)  y = Softmax(h) }"""
SHAPES = {"w1": (6, 3, 3, 3), "b1": (6,), "w2": (6, 4), "w3": (6, 4)}


def float_model(text: str = NET) -> onnx.ModelProto:
    model, rng = parser.parse_model(text), np.random.default_rng(0)
    for name, shape in SHAPES.items():
        array = rng.normal(scale=0.4, size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    return model


@pytest.fixture
def batches() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(size, 3, 8, 8)).astype(np.float32)} for size in (4, 1, 7)]


@pytest.fixture
def pair(tmp_path: Path, batches: list[dict[str, np.ndarray]]) -> tuple[Path, Path]:
    """A float model and what `quantize` makes of it with static activations."""
    onnx.save(float_model(), tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", x=np.concatenate([batch["x"] for batch in batches]))
    command = ["quantize", tmp_path / "m.onnx", "--data", tmp_path / "data.npz", "-o", tmp_path / "q.onnx", "-q"]
    assert main([*map(str, command), "--equalize", "smoothquant"]) == 0
    return tmp_path / "m.onnx", tmp_path / "q.onnx"


def test_the_figures_are_those_of_a_whole_comparison(
    pair: tuple[Path, Path], batches: list[dict[str, np.ndarray]]
) -> None:
    whole = validate(*pair, batches, ValidateOptions(per_layer=True, rounds=0))
    parts = validate(*pair, iter(batches), ValidateOptions(layer_by_layer=True))
    wanted = [row for row in whole.table("outputs").rows if row["semantics"] == EXACT]
    assert [row["output"] for row in wanted] == ["y", "d", "k"]
    for row, whole_row in zip(parts.table("outputs").rows, wanted, strict=True):
        # There, the float model runs optimized.
        for key in ("output", "samples", "values"):
            assert row[key] == whole_row[key]
        for key in ("cosine", "cosine_min", "max_abs", "nonfinite"):
            assert row[key] == pytest.approx(whole_row[key], rel=1e-3, abs=1e-7), key
    assert parts.table("layers").rows == whole.table("layers").rows
    assert {row["tensor"] for row in parts.table("layers").rows} >= {"e", "f", "h"}
    assert (parts.totals["samples"], parts.totals["batches"]) == (12, 3)
    assert not any(table.name == "latency" for table in parts.tables)


def test_models_may_compute_the_same_in_another_order(batches: list[dict[str, np.ndarray]]) -> None:
    first, second = float_model(), float_model()
    nodes = {node.output[0]: node for node in float_model().graph.node}
    del second.graph.node[:]
    second.graph.node.extend(nodes[name] for name in "kabcdfehy")
    models = (graph.from_proto(first), graph.from_proto(second))
    pairs = [(name, name) for name in "yhfedk"] + [("e", "f")]
    found: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray]]] = {}
    for tensors, was, now in side_by_side(models, pairs, batches):
        found.setdefault(tensors, []).append((was, now))
    assert sorted(found) == sorted(pairs)
    inner = float_model()
    inner.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "efh")
    session = make_session(inner, exact=True)
    for index, batch in enumerate(batches):
        values = dict(zip([entry.name for entry in session.get_outputs()], session.run(None, batch), strict=True))
        for (one, other), arrays in found.items():
            np.testing.assert_array_equal(arrays[index][0], values[one])
            np.testing.assert_array_equal(arrays[index][1], values[other])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"judge": (DEPLOYED,)}, "--judge deployed"),
        ({"save_inputs": Path("x")}, "--save-inputs"),
        ({"save_outputs": Path("x")}, "--save-outputs"),
    ],
)
def test_what_needs_whole_models_is_refused(pair: tuple[Path, Path], given: dict, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        validate(*pair, iter(()), ValidateOptions(layer_by_layer=True, **given))


def test_no_data_is_no_comparison(pair: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match="gave no samples"):
        validate(*pair, [], ValidateOptions(layer_by_layer=True))


def test_thresholds_are_judged(pair: tuple[Path, Path], capfd: pytest.CaptureFixture[str]) -> None:
    command = ["validate", *map(str, pair), "--data", str(pair[0].with_name("data.npz")), "--layer-by-layer", "--json"]
    assert main([*command, "--min-cosine", "0.9"]) == 0
    assert json.loads(capfd.readouterr().out)["schema_version"] == 1
    assert main([*command, "--min-sqnr-db", "200"]) == 1


_CHILD = """
import sys
from qpipe.pipeline.cli import main
from qpipe.pipeline.memory import peak_memory
folder, *flags = sys.argv[1:]
def run(name):
    pair = [f"{folder}/{name}.onnx", f"{folder}/{name}.q.onnx"]
    return main(["validate", *pair, "--data", f"{folder}/{name}.npz", "--rounds", "0", "-q", *flags])
codes = [run("small")]
before = peak_memory()
codes.append(run("large"))
print(*codes, peak_memory() - before)
"""


def test_memory_does_not_grow_with_the_models(tmp_path: Path) -> None:
    """120 MiB of weights and 30 MiB of codes, in layers of 4 MiB."""
    for name, count in (("small", 2), ("large", 30)):
        nodes = [helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"], f"n{i}") for i in range(count)]
        ends = [helper.make_tensor_value_info(f"h{i}", TensorProto.FLOAT, ["N", 1024]) for i in (0, count)]
        weights = [
            numpy_helper.from_array(np.random.default_rng(i).normal(0, 0.03, (1024, 1024)).astype(np.float32), f"w{i}")
            for i in range(count)
        ]
        body = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
        model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        path = tmp_path / f"{name}.onnx"
        graph.save(graph.from_proto(model), path, external_threshold=0)
        np.savez(tmp_path / f"{name}.npz", h0=np.ones((4, 1024), np.float32))
        out = tmp_path / f"{name}.q.onnx"
        assert main(["quantize", str(path), "-o", str(out), "--scheme", "w8", "--target", "portable", "-q"]) == 0
    grown = {}
    for flag in ("--layer-by-layer", "--per-layer"):
        command = [sys.executable, "-c", _CHILD, str(tmp_path), flag]
        *codes, growth = subprocess.run(command, capture_output=True, text=True).stdout.split()[-3:]
        assert codes == ["0", "0"]
        grown[flag] = int(growth)
    assert grown["--layer-by-layer"] < 64 * 2**20 < grown["--per-layer"]
