"""What quantize and calibrate say of a file that they wrote, and what --quiet leaves of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from qpipe.pipeline.cli.quantize import _split
from qpipe.pipeline.plan import Decision, Site
from qpipe.pipeline.recipe import make_recipe


def quantized_whole(folder: Path) -> str:
    """Write a model of which nothing is left in float."""
    text = '<ir_version: 8, opset_import: ["": 21]> g (float[N,64] x) => (float[N,64] y) { y = MatMul(x, w) }'
    model = parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(np.eye(64, dtype=np.float32), "w"))
    onnx.save(model, folder / "whole.onnx")
    return "whole.onnx"


def test_quiet_leaves_nothing_of_the_summary(folder: Path, run: Callable) -> None:
    command = ("quantize", "m.onnx", "--scheme", "w8", "--target", "portable")
    told = run(*command, "-o", "a.onnx")
    assert (told.code, "quantized" in told.out, "wrote" in told.out) == (0, True, True)
    done = run(*command, "-o", "b.onnx", "-q")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert (folder / "b.onnx").read_bytes() == (folder / "a.onnx").read_bytes()
    assert json.loads(run(*command, "-o", "c.onnx", "-q", "--json").out)["quantized_nodes"] == 2
    assert run("calibrate", "m.onnx", "--data", "data.npz", "-o", "m.qcal", "-q").out == ""


@pytest.mark.parametrize("flag", ["--dry-run", "--why"])
def test_what_is_asked_for_is_said_quietly_too(folder: Path, run: Callable, flag: str) -> None:
    done = run("quantize", "m.onnx", "--scheme", "w8", "--target", "portable", "-o", "q.onnx", "-q", flag)
    assert done.code == 0, done.err
    assert "GlobalAveragePool_c" in done.out


def test_no_table_of_what_is_left_where_nothing_is(folder: Path, run: Callable) -> None:
    heading = "left in float"
    some = run("quantize", "m.onnx", "--scheme", "w8", "--target", "portable", "-o", "a.onnx")
    assert heading in some.out
    none = run("quantize", quantized_whole(folder), "--scheme", "w8", "--target", "portable", "-o", "b.onnx")
    assert "quantized 1 of 1 nodes" in none.out
    assert heading not in none.out
    assert "reason" not in none.out


def test_decisions_are_parted_without_comparing_each_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = [Site(node=f"n{i}", slot="in1", tensor="w", role="weight") for i in range(4)]
    decisions = [Decision(site=site, op="MatMul", spec=None, reason="") for site in sites]

    def compared(self: Decision, other: object) -> bool:
        raise AssertionError("two decisions were compared")

    monkeypatch.setattr(Decision, "__eq__", compared)
    quantized, kept = _split(decisions, make_recipe(scheme="w8"))
    assert (len(quantized), len(kept)) == (0, 4)
