"""Exporting a local Hugging Face folder: from safetensors, without remote code."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from .conftest import Run

pytestmark = [pytest.mark.torch, pytest.mark.slow]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A folder with a small BERT of random weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).eval().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_folder_becomes_a_checked_model_with_named_axes(bert: Path, run: Run) -> None:
    done = run("export", bert, "-o", bert.parent / "bert.onnx", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["relative_difference"] < 1e-3
    graph = onnx.load(bert.parent / "bert.onnx").graph
    assert [entry.name for entry in graph.input] == ["input_ids", "attention_mask"]
    dims = graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param for d in dims] == ["batch", "sequence"]
    assert any("query" in node.name for node in graph.node), "nodes are called after their modules"


def test_a_model_that_brings_its_own_code_is_refused(bert: Path, run: Run) -> None:
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    (bert / "evil.py").write_text("raise SystemExit('ran')")
    done = run("export", bert, "-o", bert.parent / "bert.onnx")
    assert done.code == 3
    assert "never runs" in done.err


def test_pickled_weights_are_not_read(bert: Path, run: Run) -> None:
    (bert / "model.safetensors").unlink()
    (bert / "pytorch_model.bin").write_bytes(b"not read")
    done = run("export", bert, "-o", bert.parent / "bert.onnx")
    assert done.code == 3
    assert not (bert.parent / "bert.onnx").exists()
