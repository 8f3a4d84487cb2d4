"""What a quantization will take: sizes that follow from the plan, and no weight read for them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper
from qpipe.pipeline import estimate, graph
from qpipe.pipeline.cli import main
from qpipe.pipeline.recipe import SCHEMES, make_recipe
from qpipe.pipeline.stages.prepare import prepare
from qpipe.pipeline.stages.preview import preview
from qpipe.pipeline.stages.quantize import quantize_model
from qpipe.pipeline.stages.sequential import Data
from qpipe.pipeline.workflow import Job
from quantizing import model as build

RECIPES = {
    "w8": {"scheme": "w8"},
    "w8 qdq": {"scheme": "w8", "target": "portable"},
    "w4": {"scheme": "w4", "weights": {"algorithm": "rtn"}},
    "w4 qdq": {"scheme": "w4", "target": "portable", "weights": {"algorithm": "rtn"}},
    "uint4": {"scheme": "w4", "target": "portable", "weights": {"format": "uint4", "symmetric": False}},
    "float": {"scheme": "float"},
}


def write_model(path: Path, shapes: list[tuple[int, int]], *, holes: bool = False) -> Path:
    """A chain of products whose float32 weights lie in ``<path>.data``: random, or a file of holes."""
    rng = np.random.default_rng(0)
    data = path.with_name(f"{path.name}.data")
    tensors, nodes, offset = [], [], 0
    with data.open("wb") as file:
        for i, shape in enumerate(shapes):
            tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            length = 4 * shape[0] * shape[1]
            for key, value in (("location", data.name), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            if not holes:
                file.write(rng.standard_normal(shape, np.float32).tobytes())
            tensors.append(tensor)
            nodes.append(helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"], f"n{i}"))
            offset += length
        file.truncate(offset)
    ends = [
        helper.make_tensor_value_info("h0", TensorProto.FLOAT, ["N", shapes[0][0]]),
        helper.make_tensor_value_info(f"h{len(shapes)}", TensorProto.FLOAT, ["N", shapes[-1][1]]),
    ]
    body = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def test_every_scheme_can_be_estimated(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.onnx", [(512, 512), (512, 512)])
    model = prepare(graph.load(path))
    x = np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32)
    calibration = Job.open(path).collect([{"h0": x}])
    for name in SCHEMES:
        target = {"target": "ort-cuda"} if name in ("fp16", "bf16", "fp8") else {}
        cost = preview(model, make_recipe(scheme=name, **target), calibration, tmp_path, 0.0).cost
        assert cost.output_bytes > 0, name


@pytest.mark.parametrize("name", RECIPES)
def test_the_output_is_as_large_as_was_said(tmp_path: Path, name: str) -> None:
    path = write_model(tmp_path / "m.onnx", [(512, 1024), (1024, 512), (512, 512)])
    recipe = make_recipe(**RECIPES[name])
    model = prepare(graph.load(path))
    expected = preview(model, recipe, None, tmp_path, 0.0).cost
    written = graph.save(quantize_model(model, recipe).model, tmp_path / "q.onnx", external_threshold=0)
    assert estimate.measured(written, 1.0).output_bytes == pytest.approx(
        expected.output_bytes, rel=0.02, abs=9 * 4096
    )  # padding to pages


def test_the_parts_of_an_estimate_grow_with_what_is_to_do(tmp_path: Path) -> None:
    model = prepare(graph.load(write_model(tmp_path / "m.onnx", [(1024, 1024)] * 8)))
    few = prepare(graph.load(write_model(tmp_path / "f.onnx", [(1024, 1024)])))
    recipe = make_recipe(scheme="w8")
    slow = make_recipe(scheme="w8", weights={"algorithm": "hqq"})
    costs = [preview(m, r, None, tmp_path, 0.0).cost for m, r in ((few, recipe), (model, recipe), (model, slow))]
    assert costs[1].output_bytes > 6 * costs[0].output_bytes
    assert costs[2].output_bytes == costs[1].output_bytes
    assert costs[2].seconds > 2 * costs[1].seconds
    later = preview(few, recipe, None, tmp_path, 100.0).cost
    assert 100 < later.seconds < 200
    assert min(cost.peak_bytes for cost in costs) > 10 * 2**20


def test_nothing_but_a_sample_of_the_weights_is_read(tmp_path: Path) -> None:
    """1 TiB of holes."""
    rows = 2**19
    path = write_model(tmp_path / "m.onnx", [(rows, rows)], holes=True)
    model = prepare(graph.load(path))
    before = psutil.Process().memory_info().rss  # what other tests left in this process is no matter of the estimate
    cost = preview(model, make_recipe(scheme="w8", target="portable"), None, tmp_path, 0.0).cost
    assert cost.output_bytes == pytest.approx(rows * rows, rel=0.01)
    assert cost.seconds > 60
    assert cost.peak_bytes - before < 2**29, "a model is never held"


def test_a_dry_run_says_what_is_to_come_and_writes_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "m.onnx", [(256, 512), (512, 256)])
    before = sorted(entry.name for entry in tmp_path.iterdir())
    assert main(["quantize", "m.onnx", "--scheme", "w8", "--dry-run", "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["measured"] is None
    assert sorted(entry.name for entry in tmp_path.iterdir()) == before
    assert main(["quantize", "m.onnx", "--scheme", "w8", "--dry-run"]) == 0
    assert "nothing was quantized or written" in capfd.readouterr().out
    assert main(["quantize", "m.onnx", "--scheme", "w8", "-o", "q.onnx", "--json"]) == 0
    done = json.loads(capfd.readouterr().out)
    assert set(done["estimate"]) == set(done["measured"]) == {"output_bytes", "peak_bytes", "seconds"}
    assert done["measured"]["output_bytes"] == (tmp_path / "q.onnx").stat().st_size
    assert done["estimate"]["output_bytes"] == pytest.approx(done["measured"]["output_bytes"], rel=0.1)
    assert done["plan"]["decisions"] == said["plan"]["decisions"]
    assert main(["quantize", "m.onnx", "--scheme", "w8", "-o", "r.onnx"]) == 0
    rows = [line.split()[0] for line in capfd.readouterr().out.splitlines() if line.endswith(" s")]
    assert rows == ["estimated", "measured"]


def test_a_folder_that_cannot_be_written_is_no_concern_of_the_estimate(tmp_path: Path) -> None:
    model = prepare(graph.load(write_model(tmp_path / "m.onnx", [(64, 64)])))
    assert preview(model, make_recipe(scheme="w8"), None, tmp_path / "nowhere", 0.0).cost.seconds < 60


def test_the_result_of_a_preview_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = prepare(graph.load(write_model(tmp_path / "m.onnx", [(64, 64), (64, 64)])))
    before = graph.to_proto(model)
    preview(model, make_recipe(scheme="w4"), None, tmp_path, 0.0)
    assert graph.to_proto(model) == before
    onnx.checker.check_model(before)


def test_runs_of_the_data_are_foreseen_and_counted(tmp_path: Path) -> None:
    model = prepare(graph.load(write_model(tmp_path / "m.onnx", [(64, 64)] * 3)))
    data = Data(batches=[{"h0": np.random.default_rng(i).normal(size=(8, 64)).astype(np.float32)} for i in range(4)])
    rounded, in_order = ({"scheme": "w4", "weights": {"algorithm": name}} for name in ("rtn", "gptq"))
    cases = [(rounded, data, 0, 0), (in_order, None, 0, 0), (in_order, data, 2, 3)]
    cases += [({**rounded, "bias_correction": True}, data, 2, 0), ({**in_order, "bias_correction": True}, data, 4, 3)]
    for keys, known, count, layers in cases:
        coming = preview(model, make_recipe(**keys), None, tmp_path, 0.0, known)
        assert (coming.runs.count, coming.runs.layers) == (count, layers)
        assert bool(coming.runs.seconds) == bool(count)
        assert coming.cost.seconds > coming.runs.seconds


def test_equalizing_is_foreseen_as_it_happens(tmp_path: Path) -> None:
    """A norm takes the scale of the first layer's input, a Gelu does not take that of the second's."""
    rng = np.random.default_rng(0)
    gain = np.where(np.arange(32) % 9 == 0, 30, 1).astype(np.float32)
    source = build(
        """g (float[N,32] x) => (float[N,32] y) {
            n = LayerNormalization(x, gain)  h = MatMul(n, w)  a = Gelu(h)  y = MatMul(a, v) }""",
        gain=gain,
        w=rng.normal(size=(32, 64)).astype(np.float32) * np.linspace(0.1, 5, 64, dtype=np.float32),
        v=rng.normal(size=(64, 32)).astype(np.float32),
    )
    onnx.save(source, tmp_path / "m.onnx")
    job = Job.open(tmp_path / "m.onnx")
    known = job.collect([{"x": rng.normal(size=(512, 32)).astype(np.float32)}])
    recipe = make_recipe(scheme="w8a8", target="ort-cpu-vnni", equalize="smoothquant:0.8")
    before = graph.to_proto(job.model)
    foreseen = preview(job.model, recipe, known, tmp_path, 0.0).foreseen
    assert graph.to_proto(job.model) == before
    assert [(entry.tensor, entry.folds) for entry in foreseen] == [("n", True), ("a", False)]
    happened = job.quantize(recipe, known).equalized
    assert [(e.tensor, e.layers, e.folded) for e in happened] == [(e.tensor, e.layers, e.folds) for e in foreseen]


def test_a_dry_run_tells_of_equalizing_and_of_runs_of_the_data(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "m.onnx", [(256, 64), (64, 64)])
    wanted = ["--random", "8", "--scheme", "w4", "--algorithm", "gptq", "--equalize", "awq", "--bias-correction"]
    assert main(["quantize", "m.onnx", *wanted, "--dry-run"]) == 0
    said = capfd.readouterr().out
    assert "to equalize by awq: 2 inputs of 2 layers; 1 fold into what makes them, 1 take a Mul\n" in said
    assert "2 layers one after the other and biases: 4 more runs of the data" in said
    assert main(["quantize", "m.onnx", *wanted, "--dry-run", "--json"]) == 0
    data = json.loads(capfd.readouterr().out)
    assert [(entry["tensor"], entry["folds"]) for entry in data["equalize"]] == [("h0", False), ("h1", True)]
    assert (data["data_runs"]["count"], data["data_runs"]["layers"]) == (4, 2)
    assert main(["quantize", "m.onnx", *wanted, "-o", "q.onnx", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["data_runs"] is None
