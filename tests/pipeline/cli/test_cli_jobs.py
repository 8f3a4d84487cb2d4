"""The main job through the command line, step by step, and what it prints."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import yaml
from onnx import parser

from .conftest import Run


def test_calibrate_quantize_validate(calibrated: Path, run: Run) -> None:
    done = run("quantize", "m.onnx", "--calib", "m.qcal", "-o", "q.onnx")
    assert done.code == 0, done.err
    assert "quantized 5 of 5 nodes" in done.out
    ops = {n.op_type for n in onnx.load(calibrated / "q.onnx").graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "Conv", "Gemm"} <= ops
    assert run("check", "q.onnx").code == 0
    done = run("validate", "m.onnx", "q.onnx", "--data", "load.py", "--min-cosine", "0.99", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    rows = {row["semantics"]: row for row in report["tables"]["outputs"]}
    assert set(rows) == {"exact", "deployed"}
    assert rows["exact"]["sqnr_db"] > 25


def test_quantize_collects_when_given_data(folder: Path, run: Run) -> None:
    rounding = ("--algorithm", "rtn", "-q")  # sums of products, which GPTQ takes, round differently batch by batch
    assert run("quantize", "m.onnx", "--data", "load.py", "-o", "a.onnx", *rounding).code == 0
    assert run("calibrate", "m.onnx", "--data", "data.npz", "--batch", "5", "-o", "m.qcal").code == 0
    assert run("quantize", "m.onnx", "--calib", "m.qcal", "-o", "b.onnx", *rounding).code == 0
    assert (folder / "a.onnx").read_bytes() == (folder / "b.onnx").read_bytes(), "other batches, same statistics"


@pytest.mark.parametrize("method", ["minmax", "percentile:99.9", "mse", "entropy", "auto"])
def test_every_method_is_solved_from_the_same_file(calibrated: Path, run: Run, method: str) -> None:
    assert run("quantize", "m.onnx", "--calib", "m.qcal", "--method", method, "-o", "q.onnx").code == 0
    session = ort.InferenceSession(calibrated / "q.onnx", providers=["CPUExecutionProvider"])
    assert np.isfinite(session.run(None, {"image": np.ones((2, 3, 8, 8), np.float32)})[0]).all()


def test_json_is_exactly_one_object_on_stdout(calibrated: Path, run: Run) -> None:
    commands = (
        ("quantize", "m.onnx", "--calib", "m.qcal", "-o", "q.onnx", "--json"),
        ("inspect", "m.onnx", "--json"),
        ("inspect", "m.qcal", "--json"),
        ("check", "q.onnx", "--json"),
        ("explain", "method", "--json"),
        ("explain", "format", "int8", "--json"),
        ("explain", "target", "ort-cpu", "--json"),
        ("explain", "scheme", "w8a8", "--json"),
        ("bench", "m.onnx", "q.onnx", "--data", "data.npz", "--rounds", "3", "--json"),
    )
    for command in commands:
        done = run(*command)
        assert done.code == 0, (command, done.err)
        assert json.loads(done.out)["schema_version"] == 1, command
    done = run("check", "missing.onnx", "--json")
    assert done.code == 2
    assert json.loads(done.out)["error"]["exit_code"] == 2


def test_a_dry_run_prints_a_reason_for_every_node_and_writes_nothing(calibrated: Path, run: Run) -> None:
    before = sorted(p.name for p in calibrated.iterdir())
    done = run("quantize", "m.onnx", "--calib", "m.qcal", "--dry-run", "--exclude", "op:Gemm")
    assert done.code == 0
    lines = {line.split()[0]: line for line in done.out.splitlines() if line.startswith(("Conv_", "Gemm_", "Relu_"))}
    assert "int8 per channel" not in lines["Gemm_scores"]
    assert "excluded by the pattern 'op:Gemm'" in lines["Gemm_scores"]
    assert "absorbed" in lines["Relu_b"]
    assert sorted(p.name for p in calibrated.iterdir()) == before


@pytest.mark.parametrize("pattern", ["Conv_*", "re:^Conv", "op:Conv"])
def test_include_takes_globs_expressions_and_operators(calibrated: Path, run: Run, pattern: str) -> None:
    done = run("quantize", "m.onnx", "--calib", "m.qcal", "-o", "q.onnx", "--include", pattern, "--json")
    plan = json.loads(done.out)["plan"]
    assert {d["op"] for d in plan["decisions"] if d["role"] == "weight"} == {"Conv"}


def test_a_recipe_file_and_flags_say_the_same(calibrated: Path, run: Run) -> None:
    flags = ("--method", "minmax", "--target", "portable", "--exclude", "op:Gemm")
    assert run("quantize", "m.onnx", "--calib", "m.qcal", "-o", "a.onnx", *flags, "--save-recipe", "r.yaml").code == 0
    saved = yaml.safe_load((calibrated / "r.yaml").read_text())
    assert (saved["method"], saved["target"], saved["exclude"]) == ("minmax", "portable", ["op:Gemm"])
    assert run("quantize", "m.onnx", "--calib", "m.qcal", "-o", "b.onnx", "--recipe", "r.yaml").code == 0
    assert (calibrated / "a.onnx").read_bytes() == (calibrated / "b.onnx").read_bytes()


@pytest.mark.parametrize("equalize", ["none", "smoothquant:0.5", "awq"])
def test_a_saved_recipe_equalizes_the_same(calibrated: Path, run: Run, equalize: str) -> None:
    flags = ("--data", "data.npz", "--equalize", equalize, "--bias-correction", "--algorithm", "gptq")
    assert run("quantize", "m.onnx", "-o", "a.onnx", *flags, "--save-recipe", "r.yaml").code == 0
    saved = yaml.safe_load((calibrated / "r.yaml").read_text())
    assert (saved["equalize"] or "none", saved["bias_correction"]) == (equalize, True)
    assert run("quantize", "m.onnx", "--data", "data.npz", "-o", "b.onnx", "--recipe", "r.yaml").code == 0
    assert (calibrated / "a.onnx").read_bytes() == (calibrated / "b.onnx").read_bytes()


def test_a_saved_plan_explains_a_node(calibrated: Path, run: Run) -> None:
    assert run("quantize", "m.onnx", "--calib", "m.qcal", "--dry-run", "--save-plan", "plan.json").code == 0
    done = run("explain", "plan", "plan.json", "Conv_a")
    assert done.code == 0
    assert "int8 per channel (axis 0)" in done.out
    assert run("explain", "plan", "plan.json", "Conv_x").code == 2


def test_a_job_file_runs_all_steps(folder: Path, run: Run) -> None:
    (folder / "job.yaml").write_text(
        "steps:\n"
        "  - calibrate: {model: m.onnx, data: data.npz, output: m.qcal}\n"
        "  - quantize: {model: m.onnx, calib: m.qcal, output: q.onnx, exclude: ['op:Gemm']}\n"
        "  - validate: {float_model: m.onnx, quantized_model: q.onnx, data: data.npz, min_cosine: 0.99}\n"
    )
    assert run("run", "job.yaml", "--dry-run").code == 0
    assert not (folder / "q.onnx").exists()
    done = run("run", "job.yaml")
    assert done.code == 0, done.err
    assert (folder / "q.onnx").exists()
    (folder / "job.yaml").write_text("steps:\n  - quantize: {model: m.onnx, shceme: w8a8}\n")
    done = run("run", "job.yaml")
    assert done.code == 2
    assert "shceme" in done.err


def test_thresholds_set_the_exit_code(calibrated: Path, run: Run) -> None:
    assert run("quantize", "m.onnx", "--calib", "m.qcal", "-o", "q.onnx").code == 0
    done = run("validate", "m.onnx", "q.onnx", "--data", "data.npz", "--min-sqnr-db", "90", "--rounds", "0")
    assert done.code == 1
    assert "not kept" in done.err


def test_polygraphys_own_command_line_accepts_the_files(calibrated: Path, run: Run) -> None:
    assert run("quantize", "m.onnx", "--calib", "m.qcal", "-o", "q.onnx").code == 0
    saved = ("--save-inputs", "in.json", "--save-outputs", "out.json", "--samples", "8", "--rounds", "0")
    assert run("validate", "m.onnx", "q.onnx", "--data", "data.npz", *saved).code == 0
    tool = Path(sys.executable).with_name("polygraphy")
    command = [tool, "run", "q.onnx", "--onnxrt", "--load-inputs", "in.json", "--load-outputs", "out.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_export_from_a_file_and_from_a_program(folder: Path, run: Run) -> None:
    torch = pytest.importorskip("torch")
    (folder / "net.py").write_text(
        "import torch\n"
        "def make():\n"
        "    net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 4))\n"
        "    return net.train(), {'input': torch.randn(2, 8)}\n"
        "def bare():\n"
        "    return make()[0]\n"
    )
    done = run("export", "net.py:make", "-o", "e.onnx", "--dynamic", "input:0=batch", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["relative_difference"] < 1e-5
    graph = onnx.load(folder / "e.onnx").graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert "Dropout" not in {n.op_type for n in graph.node}, "exported in evaluation mode"
    assert run("export", "net.py:bare", "-o", "f.onnx").code == 2
    assert run("export", "net.py:bare", "-o", "f.onnx", "--input", "input=2,8").code == 0
    program = torch.export.export(torch.nn.Linear(8, 4).eval(), (torch.randn(2, 8),))
    torch.export.save(program, folder / "p.pt2")
    done = run("export", "p.pt2", "-o", "g.onnx")
    assert done.code == 0, done.err
    assert run("export", "net.py:nothing", "-o", "h.onnx").code == 2
    assert run("export", "nowhere", "-o", "h.onnx").code == 2


def test_progress_without_a_terminal_has_speed_memory_and_the_time_left(
    folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qpipe.pipeline.cli.output._PLAIN_SECONDS", 0.0)
    done = run("calibrate", "m.onnx", "--data", "data.npz", "--batch", "4", "-o", "m.qcal")
    line = next(line for line in done.err.splitlines() if line.startswith("calibrating: 20 of 24"))
    assert re.fullmatch(r"calibrating: 20 of 24  [\d.]+ samples/s, peak \d+ MB, 0:00:\d\d left", line), line
    assert re.search(r"24 samples, \d tensors, [\d.]+ samples/s, peak \d+ MB", done.err)


def test_tensors_inside_functions_are_named_as_not_covered(folder: Path, run: Run) -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "local": 1]> g (float[N,4] x) => (float[N,4] y)
        { a = Relu (x) y = local.f (a) }
        <opset_import: ["": 17], domain: "local"> f (p) => (q) { s = Mul (p, p) q = Add (s, p) }"""
    onnx.save(parser.parse_model(text), folder / "f.onnx")
    np.save(folder / "x.npy", np.ones((3, 4), np.float32))
    done = run("calibrate", "f.onnx", "--data", "x.npy", "-o", "f.qcal")
    assert done.code == 0, done.err
    assert "not covered: s, q: it is inside the model-local function f" in done.err
    assert "was not observed" in run("inspect", "f.qcal").out


@pytest.mark.parametrize("form", ["ort-json", "ort-flatbuffers", "ort-text", "trt-cache"])
def test_tables_of_other_tools_are_written_and_shown(calibrated: Path, run: Run, form: str) -> None:
    done = run("calibrate", "--merge", "m.qcal", "-o", "n.qcal", "--emit", form, "--method", "mse", "--json")
    assert done.code == 0, done.err
    table = json.loads(done.out)["written"][1]
    shown = json.loads(run("inspect", table, "--json").out)["ranges"]
    assert "image" in shown
    lo, hi = shown["image"]
    assert lo < 0 < hi
    assert "ranges of" in run("inspect", table).out
    (calibrated / "bad.cache").write_bytes(b"TRT-1\nx: zz\n")
    refused = run("inspect", "bad.cache")
    assert refused.code == 4
    assert "no calibration table, or is damaged" in refused.err
