"""Validation of a quantized model against its float one: figures, layers, thresholds, polygraphy's files, refusals."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import psutil
import pytest
from onnx import helper, numpy_helper, parser
from qpipe.calibrate import metrics
from qpipe.calibrate.errors import (
    DataError,
    ModelError,
    RecipeError,
    ThresholdError,
    UnsupportedError,
    UsageError,
    WriteError,
)
from qpipe.pipeline import data, report
from qpipe.pipeline.graph import load
from qpipe.pipeline.layers import common_layers, score_outputs
from qpipe.pipeline.session import make_session
from qpipe.pipeline.stages.validate import ValidateOptions, validate
from qpipe.pipeline.validation import DEPLOYED, EXACT, Thresholds

NET = """<ir_version: 8, opset_import: ["": 17]> g (float[N,8] x) => (float[N,4] logits, float[N,6] features) {
    a = MatMul(x, w1)  b = Relu(a)  c = MatMul(b, w2)  features = Tanh(c)  d = MatMul(features, w3)
    logits = Add(d, b3) }"""
SHAPES = {"w1": (8, 6), "w2": (6, 6), "w3": (6, 4), "b3": (4,)}


def _weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(scale=0.5, size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def _model(text: str, weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    model = parser.parse_model(text)
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return model


def _batches(*sizes: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.normal(size=(size, 8)).astype(np.float32)} for size in sizes]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A float model, and the same with weights rounded to int8 and an activation through Q/DQ."""
    weights = _weights()
    onnx.save(_model(NET, weights), tmp_path / "float.onnx")
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[N,8] x) => (float[N,4] logits, float[N,6] features)
        <float s = {0.02}, uint8 z = {0}> {
        v1 = DequantizeLinear(w1_q, w1_s)  a = MatMul(x, v1)
        q = QuantizeLinear(a, s, z)  b = DequantizeLinear(q, s, z)
        v2 = DequantizeLinear(w2_q, w2_s)  c = MatMul(b, v2)  features = Tanh(c)
        v3 = DequantizeLinear(w3_q, w3_s)  d = MatMul(features, v3)  logits = Add(d, b3) }"""
    stored = {"b3": weights["b3"]}
    for name in ("w1", "w2", "w3"):
        scale = np.float32(np.abs(weights[name]).max() / 127)
        stored |= {f"{name}_q": np.rint(weights[name] / scale).astype(np.int8), f"{name}_s": scale}
    onnx.save(_model(text, stored), tmp_path / "int8.onnx")
    return tmp_path / "float.onnx", tmp_path / "int8.onnx"


def test_figures_are_the_metrics_of_both_models_outputs(pair: tuple[Path, Path]) -> None:
    batches = _batches(3, 1, 5)
    result = validate(*pair, iter(batches))
    rows = {(row["output"], row["semantics"]): row for row in result.table("outputs").rows}
    assert set(rows) == set(itertools.product(("logits", "features"), (EXACT, DEPLOYED)))
    sessions = {s: make_session(pair[1], exact=s == EXACT) for s in (EXACT, DEPLOYED)}
    reference = make_session(pair[0])
    for (name, semantics), row in rows.items():
        r, a = (
            np.concatenate([session.run([name], batch)[0] for batch in batches])
            for session in (reference, sessions[semantics])
        )
        for figure in ("sqnr_db", "cosine", "mse", "max_abs"):
            assert row[figure] == pytest.approx(getattr(metrics, figure)(r, a), rel=1e-9), (name, figure)
        if name == "logits":
            assert row["top1"] == np.mean(r.argmax(-1) == a.argmax(-1))
            assert 0 < row["kld_mean"] < 0.01
        else:
            assert row["top1"] is None
    assert result.totals["samples"] == 9
    assert result.totals["batches"] == 3


def test_report_names_sizes_latency_and_environment(pair: tuple[Path, Path]) -> None:
    result = validate(*pair, _batches(2))
    assert result.totals["float_bytes"] == pair[0].stat().st_size
    assert result.totals["quantized_bytes"] == pair[1].stat().st_size
    latency = {row["run"]: row for row in result.table("latency").rows}
    assert latency["float"]["speedup"] == 1
    assert latency["deployed"]["median_ms"] > 0
    assert result.totals["speedup_ratio"] == latency["deployed"]["speedup"]
    sessions = result.environment["sessions"]
    assert sessions["exact"]["graph_optimization"] == "ORT_DISABLE_ALL"
    assert sessions["deployed"]["qdq_matmulnbits_accuracy_level"] == 4
    json.loads(report.to_json(result))
    assert "float.onnx against int8.onnx" in report.to_text(result)
    untimed = validate(*pair, _batches(2), ValidateOptions(rounds=0))
    assert untimed.totals["speedup_ratio"] is None


def test_a_model_against_itself_is_perfect(pair: tuple[Path, Path]) -> None:
    result = validate(pair[0], pair[0], _batches(4), ValidateOptions(per_layer=True, judge=(EXACT,)))
    exact = [row for row in result.table("outputs").rows if row["semantics"] == EXACT]
    assert all(row["cosine"] > 1 - 1e-12 and row["sqnr_db"] > 120 for row in exact)
    assert all(abs(row["added_noise"]) < 1e-12 for row in result.table("layers").rows)


def test_the_layer_that_hurts_comes_first(tmp_path: Path) -> None:
    weights = _weights()
    onnx.save(_model(NET, weights), tmp_path / "float.onnx")
    hurt = {**weights, "w2": weights["w2"] + np.random.default_rng(2).normal(scale=0.2, size=(6, 6)).astype(np.float32)}
    onnx.save(_model(NET, hurt), tmp_path / "hurt.onnx")
    result = validate(tmp_path / "float.onnx", tmp_path / "hurt.onnx", _batches(4, 4), ValidateOptions(per_layer=True))
    rows = result.table("layers").rows
    assert rows[0]["tensor"] == "c"
    assert rows[0]["op"] == "MatMul"
    before = {row["tensor"]: row for row in rows}
    assert before["a"]["added_noise"] == 0
    assert before["b"]["sqnr_db"] == math.inf
    assert set(before) == {"a", "b", "c", "d", "features", "logits"}
    assert any("add most noise" in chart.title for chart in result.charts)


@pytest.mark.parametrize("kept", ["a", "b"])
def test_a_relu_left_to_the_quantizer_is_compared_behind_it(kept: str, pair: tuple[Path, Path]) -> None:
    """Whichever of the two names the quantized model keeps: before the quantizer it has negative values."""
    model = onnx.load(pair[1])
    names = {"a": {"a": "a", "b": "a_dequantized"}, "b": {"a": "b", "b": "b_dequantized"}}[kept]
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    onnx.save(model, pair[1])
    layers = {layer.tensor: layer for layer in common_layers(load(pair[0]), load(pair[1]))}
    assert set(layers) == {"b", "c", "features", "d", "logits"}
    assert layers["b"].quantized == f"{kept}_dequantized"
    assert layers["b"].op == ("MatMul, Relu" if kept == "a" else "Relu")
    assert layers["c"].before == ("b",)
    result = validate(*pair, _batches(8), ValidateOptions(per_layer=True))
    rows = {row["tensor"]: row for row in result.table("layers").rows}
    assert rows["b"]["sqnr_db"] > 30


def test_channels_rescaled_on_purpose_hurt_nobody(tmp_path: Path) -> None:
    weights = _weights()
    factor = np.array([0.1, 10, 1, 30, 0.5, 2], np.float32)
    scaled = {**weights, "w1": weights["w1"] * factor, "w2": weights["w2"] / factor[:, None]}
    onnx.save(_model(NET, weights), tmp_path / "float.onnx")
    onnx.save(_model(NET, scaled), tmp_path / "scaled.onnx")
    options = ValidateOptions(per_layer=True, rounds=0)
    rows = validate(tmp_path / "float.onnx", tmp_path / "scaled.onnx", _batches(32), options).table("layers").rows
    rescaled = {row["tensor"] for row in rows if row["rescaled"]}
    assert rescaled == {"a", "b"}
    assert max(row["added_noise"] for row in rows) < 1e-10


def test_per_layer_with_external_data(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "external"
    folder.mkdir()
    for path in pair:
        onnx.save(
            onnx.load(path),
            folder / path.name,
            save_as_external_data=True,
            location=f"{path.name}.data",
            size_threshold=0,
        )
    inside = validate(*pair, _batches(4), ValidateOptions(per_layer=True, rounds=0))
    outside = validate(
        folder / "float.onnx", folder / "int8.onnx", _batches(4), ValidateOptions(per_layer=True, rounds=0)
    )
    assert outside.table("layers").rows == inside.table("layers").rows
    data = (folder / "float.onnx.data").stat().st_size
    assert outside.totals["float_bytes"] == (folder / "float.onnx").stat().st_size + data


def test_per_layer_in_the_layout_of_the_hugging_face_cache(pair: tuple[Path, Path], tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    split = {"save_as_external_data": True, "location": "model.onnx.data", "size_threshold": 0}
    onnx.save(onnx.load(pair[0]), blobs / "aa", **split)
    (blobs / "model.onnx.data").rename(blobs / "bb")
    for name, blob in (("model.onnx", "aa"), ("model.onnx.data", "bb")):
        (snapshot / name).symlink_to(Path("../../blobs") / blob)
    options = ValidateOptions(per_layer=True, rounds=0)
    linked = validate(snapshot / "model.onnx", pair[1], _batches(4), options)
    assert linked.table("layers").rows == validate(*pair, _batches(4), options).table("layers").rows


def test_thresholds_set_the_outcome(pair: tuple[Path, Path]) -> None:
    kept = Thresholds(min_cosine=0.9, min_sample_cosine=0.5, min_sqnr_db=10, max_abs=10, min_top1=0.1, max_kld=1)
    result = validate(*pair, _batches(16), ValidateOptions(thresholds=kept))
    assert result.passed
    assert {v.name for v in result.verdicts} == set(kept.__slots__)
    assert {v.subject for v in result.verdicts if v.name == "min_top1"} == {"output logits, exact"}
    result.require()
    missed = Thresholds(min_cosine=0.9999999)
    result = validate(*pair, _batches(16), ValidateOptions(thresholds=missed, judge=(EXACT, DEPLOYED)))
    assert [v.passed for v in result.verdicts] == [False] * 4
    with pytest.raises(ThresholdError) as caught:
        result.require()
    assert caught.value.exit_code == 1


def test_nan_keeps_no_threshold(pair: tuple[Path, Path], tmp_path: Path) -> None:
    broken = onnx.load(pair[1])
    for tensor in broken.graph.initializer:
        if tensor.name == "w3_s":
            tensor.CopyFrom(numpy_helper.from_array(np.float32("nan"), "w3_s"))
    onnx.save(broken, tmp_path / "nan.onnx")
    limits = Thresholds(min_cosine=-1, max_abs=1e30, min_sqnr_db=-1e30)
    result = validate(pair[0], tmp_path / "nan.onnx", _batches(2), ValidateOptions(thresholds=limits))
    assert {v.passed for v in result.verdicts if "logits" in v.subject} == {False}
    assert {v.passed for v in result.verdicts if "features" in v.subject} == {True}
    assert result.totals["worst_cosine"] != result.totals["worst_cosine"]
    assert any("not finite" in note for note in result.notes)
    assert {row["rule"] for row in result.table("findings").rows} == {"scale-finite"}


def test_an_output_of_another_shape_keeps_no_threshold(tmp_path: Path) -> None:
    head = '<ir_version: 8, opset_import: ["": 17]> g (float[N,8] x) => '
    for name, text in (("a", "(float[N,8] y) { y = Tanh(x) }"), ("b", "(float[N,9] y) { y = Pad(x, p) }")):
        onnx.save(_model(head + text, {"p": np.array([0, 0, 0, 1])} if name == "b" else {}), tmp_path / f"{name}.onnx")
    options = ValidateOptions(thresholds=Thresholds(min_cosine=-1, max_abs=1e30))
    result = validate(tmp_path / "a.onnx", tmp_path / "b.onnx", _batches(2), options)
    assert [v.passed for v in result.verdicts] == [False, False]
    assert any("another shape" in note for note in result.notes)


def test_strings_sequences_and_sparse_weights_are_compared(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N,2] x, string[N] t) => (seq(float[N,2]) s, string[N] u, float[N,2] y) {
        y = MatMul(x, w)  s = SequenceConstruct(y, x)  u = Identity(t)
    }"""
    model = _model(text, {})
    values, places = numpy_helper.from_array(np.float32([1, 2]), "w"), numpy_helper.from_array(np.array([0, 3]), "i")
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, places, [2, 2]))
    onnx.save(model, tmp_path / "sparse.onnx")
    dense = _model(text, {"w": np.float32([[1, 0], [0, 2.5]])})
    onnx.save(dense, tmp_path / "dense.onnx")
    batches = [{"x": np.ones((size, 2), np.float32), "t": np.array(["a"] * size, object)} for size in (1, 3)]
    result = validate(tmp_path / "sparse.onnx", tmp_path / "dense.onnx", batches)
    rows = {(r["output"], r["semantics"]): r for r in result.table("outputs").rows}
    for semantics in (EXACT, DEPLOYED):
        assert rows["s", semantics]["values"] == 16
        assert rows["s", semantics]["max_abs"] == rows["y", semantics]["max_abs"] == 0.5
        assert rows["u", semantics]["same"] == 1


def test_strings_are_saved_and_read_again_and_sequences_refused(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[N,2] x, string[N] t) => (string[N] u, seq(float[N,2]) s) {
        u = Identity(t)  s = SequenceConstruct(x, x)
    }"""
    path, inputs = tmp_path / "m.onnx", tmp_path / "in.json"
    onnx.save(_model(text, {}), path)
    batch = {"x": np.ones((2, 2), np.float32), "t": np.array(["a", "bcd"], object)}
    validate(path, path, [batch], ValidateOptions(save_inputs=inputs))
    (again,) = data.batches(inputs)
    assert again["t"].tolist() == ["a", "bcd"]
    assert validate(path, path, [again]).table("outputs").rows[0]["same"] == 1
    with pytest.raises(UnsupportedError, match="sequence"):
        validate(path, path, [batch], ValidateOptions(save_outputs=tmp_path / "out.json"))
    assert not (tmp_path / "out.json").exists()


def test_a_threshold_on_scores_needs_an_output_of_scores(tmp_path: Path) -> None:
    model = _model('<ir_version: 8, opset_import: ["": 17]> g (float[N,8] x) => (float[N,8] y) { y = Tanh(x) }', {})
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    options = ValidateOptions(thresholds=Thresholds(min_top1=0.5))
    with pytest.raises(RecipeError, match="scores") as caught:
        validate(path, path, _batches(2), options)
    assert "--logits" in str(caught.value.do)
    named = ValidateOptions(thresholds=Thresholds(min_top1=0.5), logits=("y",))
    assert validate(path, path, _batches(2), named).passed
    with pytest.raises(RecipeError, match="no output is called 'z'"):
        validate(path, path, _batches(2), ValidateOptions(logits=("z",)))


SCORES = {
    "y = Softmax <axis = -1> (x)": "probabilities",
    "y = Softmax <axis = 1> (x)": "probabilities",
    "y = Softmax <axis = 0> (x)": None,
    "y = LogSoftmax <axis = -1> (x)": "logits",
    "y = Gemm(x, w)": "logits",
    "t = MatMul(x, w) y = Add(b, t)": "logits",
    "u = Transpose <perm = [1,0]> (w) y = MatMul(x, u)": "logits",
    "t = Transpose <perm = [1,0]> (x) y = MatMul(x, t)": None,
    "y = Relu(x)": None,
    "t = MatMul(x, w) y = Add(x, t)": None,
}


@pytest.mark.parametrize("nodes", SCORES)
def test_outputs_of_scores_are_recognised(nodes: str, tmp_path: Path) -> None:
    text = f'<ir_version: 8, opset_import: ["": 17]> g (float[4,4] x) => (float[4,4] y) {{ {nodes} }}'
    model = _model(text, {"w": np.eye(4, dtype=np.float32), "b": np.ones(4, np.float32)})
    onnx.save(model, tmp_path / "m.onnx")
    expected = {} if SCORES[nodes] is None else {"y": SCORES[nodes]}
    assert score_outputs(load(tmp_path / "m.onnx")) == expected


def test_saved_files_are_polygraphys_own(pair: tuple[Path, Path], tmp_path: Path) -> None:
    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json

    batches = _batches(3, 2)
    inputs, outputs = tmp_path / "inputs", tmp_path / "outputs"
    validate(*pair, batches, ValidateOptions(save_inputs=inputs, save_outputs=outputs, saved_run=EXACT))
    assert sorted(p.name for p in inputs.iterdir()) == ["0000000000.json", "0000000001.json"]
    session = make_session(pair[1], exact=True)
    for index, batch in enumerate(batches):
        name = f"{index:010d}.json"
        assert np.array_equal(load_json(str(inputs / name))["x"], batch["x"])
        saved = RunResults.load(str(outputs / name))
        assert [runner for runner, _ in saved.items()] == [EXACT]
        results = dict(zip(("logits", "features"), session.run(["logits", "features"], batch), strict=True))
        for output, array in saved[EXACT][0].items():
            assert np.array_equal(array, results[output])


def test_the_quantized_file_passes_polygraphys_command_line(pair: tuple[Path, Path], tmp_path: Path) -> None:
    options = ValidateOptions(save_inputs=tmp_path / "in.json", save_outputs=tmp_path / "out.json")
    validate(*pair, _batches(3, 2), options)
    tool = Path(sys.executable).parent / "polygraphy"
    command = [
        tool,
        "run",
        pair[1],
        "--onnxrt",
        "--load-inputs",
        "in.json",
        "--load-outputs",
        "out.json",
        "--atol",
        "1e-5",
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "2/2 iterations" in done.stdout


def test_nothing_is_overwritten_and_nothing_half_written(pair: tuple[Path, Path], tmp_path: Path) -> None:
    taken, folder = tmp_path / "in.json", tmp_path / "outputs"
    taken.write_text("mine")
    with pytest.raises(WriteError):
        validate(*pair, _batches(1), ValidateOptions(save_inputs=taken))
    assert taken.read_text() == "mine"
    folder.mkdir()
    (folder / "old").write_text("mine")
    with pytest.raises(WriteError, match="exists"):
        validate(*pair, _batches(1), ValidateOptions(save_outputs=folder))
    validate(*pair, _batches(1), ValidateOptions(save_inputs=taken, save_outputs=folder, force=True))
    assert [p.name for p in folder.iterdir()] == ["0000000000.json"]
    before = sorted(tmp_path.iterdir())

    def failing() -> Iterator[dict[str, np.ndarray]]:
        yield from _batches(1)
        raise DataError("the reader broke")

    options = ValidateOptions(save_inputs=tmp_path / "new.json", save_outputs=tmp_path / "new")
    with pytest.raises(DataError, match="the reader broke"):
        validate(*pair, failing(), options)
    assert sorted(tmp_path.iterdir()) == before


def test_data_that_does_not_fit_is_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match="no samples"):
        validate(*pair, [])
    with pytest.raises(DataError, match="'x'"):
        validate(*pair, [{"y": np.zeros((1, 8), np.float32)}])
    with pytest.raises(DataError, match="size 7"):
        validate(*pair, [{"x": np.zeros((1, 7), np.float32)}])


def test_a_run_that_fails_is_an_error_of_the_data(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[N] x, float[M] v) => (float[K] y) { y = Add(x, v) }'
    onnx.save(_model(text, {}), tmp_path / "m.onnx")
    batch = {"x": np.zeros(3, np.float32), "v": np.zeros(4, np.float32)}
    with pytest.raises(DataError, match="cannot run"):
        validate(tmp_path / "m.onnx", tmp_path / "m.onnx", [batch])
    captured = capfd.readouterr()
    assert captured.out == ""


def test_models_that_do_not_belong_together_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    renamed = _model(NET.replace("logits", "other").replace("features", "more"), _weights())
    onnx.save(renamed, tmp_path / "renamed.onnx")
    with pytest.raises(ModelError, match="no output in common"):
        validate(pair[0], tmp_path / "renamed.onnx", _batches(1))
    onnx.save(_model(NET.replace("x)", "z)").replace("(x,", "(z,"), _weights()), tmp_path / "input.onnx")
    with pytest.raises(ModelError, match="input 'z'"):
        validate(pair[0], tmp_path / "input.onnx", _batches(1))
    with pytest.raises(UsageError, match=r"none\.onnx"):
        validate(pair[0], tmp_path / "none.onnx", _batches(1))


def test_random_calibration_is_said(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = onnx.load(pair[1])
    helper.set_model_props(model, {"qpipe.calibration": "random", "qpipe.recipe": '{"scheme": "w8a8"}', "other": "x"})
    onnx.save(model, tmp_path / "random.onnx")
    result = validate(pair[0], tmp_path / "random.onnx", _batches(1), ValidateOptions(rounds=0))
    assert any("random data" in note for note in result.notes)
    assert result.recipe == {"calibration": "random", "recipe": {"scheme": "w8a8"}}


def test_progress_counts_samples(pair: tuple[Path, Path]) -> None:
    seen: list[int] = []
    validate(*pair, _batches(3, 1, 5), ValidateOptions(progress=seen.append, rounds=0))
    assert seen == [3, 4, 9]


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[N,1000] x) => (float[N,1000] y) { y = Relu(x) }'
    path = tmp_path / "m.onnx"
    onnx.save(_model(text, {}), path)
    process, seen = psutil.Process(), []

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for index in range(30):
            yield {"x": np.full((1000, 1000), index, np.float32)}  # 4 MB, three outputs of the same size

    def progress(_samples: int) -> None:
        seen.append(process.memory_info().rss)

    validate(path, path, batches(), ValidateOptions(progress=progress, rounds=0))
    assert max(seen) - seen[9] < 60 * 2**20
