"""What every reference model promises."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from qpipe import models
from qpipe.calibrate.errors import UsageError

NAMES = models.names()
LIMIT_BYTES = 5_000_000


def rows(batches) -> set[bytes]:
    """Return every sample of some batches, padding cut off."""
    found = set()
    for batch in batches:
        for index in range(len(next(iter(batch.values())))):
            key = batch.get("input_ids", batch.get("image"))[index]
            if "attention_mask" in batch:
                key = key[batch["attention_mask"][index] == 1]
            found.add(key.tobytes())
    return found


def test_names_lists_every_package_beside():
    folders = {path.parent.name for path in Path(models.__file__).parent.glob("*/__init__.py")}
    assert set(NAMES) == folders


def test_unknown_name_is_refused():
    with pytest.raises(UsageError, match="no such reference model"):
        models.get("digits")


def test_getting_a_model_imports_nothing_heavy():
    heavy = ("torch", "sklearn", "transformers", "tokenizers", "onnx", "onnxruntime")
    code = (
        "import sys; from qpipe import models; [models.get(n) for n in models.names()];"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_committed_weights_are_small():
    sizes = {path: path.stat().st_size for path in Path(models.__file__).parent.rglob("*.npz")}
    assert {path.parent.name for path in sizes} == {"digits_cnn", "tiny_gpt"}
    assert sum(sizes.values()) < LIMIT_BYTES


@pytest.mark.torch
@pytest.mark.parametrize("name", NAMES)
def test_module_is_in_evaluation_mode_and_float32(name, built):
    import torch

    module = built(name)
    assert not any(part.training for part in module.modules())
    assert {p.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.torch
@pytest.mark.parametrize("name", NAMES)
def test_example_names_match_data_and_signature(name, built):
    import inspect

    model = models.get(name)
    inputs = list(model.example())
    assert inputs == list(inspect.signature(built(name).forward).parameters)
    assert inputs == list(model.dynamic_shapes())
    for batch in itertools.chain(model.calibration_batches(), model.evaluation_batches()):
        assert list(batch) == inputs


@pytest.mark.torch
@pytest.mark.parametrize("name", NAMES)
def test_batches_are_the_same_on_every_call(name):
    model = models.get(name)
    for produce in (model.calibration_batches, model.evaluation_batches):
        first, second = list(produce()), list(produce())
        assert len(first) == len(second) > 1
        for a, b in zip(first, second, strict=True):
            for key in a:
                np.testing.assert_array_equal(a[key], b[key])


@pytest.mark.torch
@pytest.mark.parametrize("name", NAMES)
def test_calibration_and_evaluation_are_disjoint(name):
    model = models.get(name)
    assert not rows(model.calibration_batches()) & rows(model.evaluation_batches())


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize(("name", "outliers"), [("digits_cnn", False), ("tiny_gpt", False), ("minilm", True)])
def test_exported_graph_agrees_at_other_batch_and_length(name, outliers, built, run, tmp_path):
    import torch

    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, module = models.get(name), built(name, outliers)
    program = torch.onnx.export(
        module,
        kwargs=model.example(),
        dynamo=True,
        dynamic_shapes=model.dynamic_shapes(),
        opset_version=20,
        output_names=list(model.OUTPUTS),
        verbose=False,
    )
    program.save(tmp_path / "model.onnx")
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == list(model.example())
    batches = [{key: array[:3] for key, array in b.items()} for b in itertools.islice(model.evaluation_batches(), 2)]
    for batch, expected in zip(batches, run(name, module, batches), strict=True):
        found = dict(zip(model.OUTPUTS, session.run(list(model.OUTPUTS), batch), strict=True))
        for key in expected:
            np.testing.assert_allclose(found[key], expected[key], atol=1e-4, rtol=0)
