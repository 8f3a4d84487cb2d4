"""Bad input ends with the stated exit code and message, and nothing half-written."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from .conftest import Run, small_model


def spawn(*arguments: object, **keywords: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qpipe", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **keywords)  # type: ignore[call-overload,no-any-return]


def test_a_missing_model_is_usage_and_names_a_near_one(folder: Path, run: Run) -> None:
    done = run("quantize", "n.onnx", "--data", "data.npz", "-o", "q.onnx")
    assert done.code == 2
    assert "no such file" in done.err
    assert run("inspect", folder).code in (2, 3)


KINDS = {
    "empty": (b"", "empty"),
    "html": (b"<!DOCTYPE html><html></html>", "HTML"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git"),
    "zip": (b"PK\x03\x04" + bytes(100), "zip"),
    "random": (bytes(range(256)) * 9, ""),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_kind_is_named(folder: Path, run: Run, kind: str) -> None:
    data, word = KINDS[kind]
    (folder / "bad.onnx").write_bytes(data)
    done = run("check", "bad.onnx")
    assert done.code == 3
    assert word in done.err
    (folder / "bad.onnx").write_bytes((folder / "m.onnx").read_bytes()[:-40])
    assert run("check", "bad.onnx").code == 3


def test_invalid_onnx_is_refused_with_the_checkers_reason(folder: Path, run: Run) -> None:
    model = small_model()
    first, second = model.graph.node[0], model.graph.node[1]
    first.input[0] = second.output[0]
    onnx.save(model, folder / "cycle.onnx")
    done = run("quantize", "cycle.onnx", "--data", "data.npz", "-o", "q.onnx")
    assert done.code == 3
    assert "not valid ONNX" in done.err
    assert not (folder / "q.onnx").exists()


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "/dev/zero", "a/../../secret.bin"])
def test_weights_outside_the_folder_are_refused(folder: Path, run: Run, location: str) -> None:
    model = small_model()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (folder / "evil.onnx").write_bytes(model.SerializeToString())
    done = run("check", "evil.onnx")
    assert done.code == 3
    assert "outside the model folder" in done.err


def test_external_data_that_is_cut_off_is_named(folder: Path, run: Run) -> None:
    onnx.save(small_model(), folder / "x.onnx", save_as_external_data=True, location="x.data", size_threshold=0)
    (folder / "x.data").write_bytes((folder / "x.data").read_bytes()[:100])
    done = run("check", "x.onnx")
    assert done.code == 3
    assert "x.data" in done.err


def test_pickles_are_refused_and_not_run(folder: Path, run: Run) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(folder / "marker"),)

    np.save(folder / "bomb.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    done = run("calibrate", "m.onnx", "--data", "bomb.npy", "-o", "m.qcal")
    assert done.code == 4
    assert not (folder / "marker").exists()


def test_an_array_that_declares_too_much_is_refused_before_it_is_read(folder: Path, run: Run) -> None:
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }"
    (folder / "big.npy").write_bytes(header.ljust(127) + b"\n")
    assert run("calibrate", "m.onnx", "--data", "big.npy", "-o", "m.qcal").code == 4


def test_a_script_that_raises_shows_its_own_line(folder: Path, run: Run) -> None:
    (folder / "bad.py").write_text("def load_data():\n    yield {}['image']\n")
    done = run("calibrate", "m.onnx", "--data", "bad.py", "-o", "m.qcal")
    assert done.code == 4
    assert "bad.py" in done.err
    assert "2" in done.err
    assert not (folder / "m.qcal").exists()


BATCHES = {
    "nothing": "return iter(())",
    "missing": "yield {'picture': np.zeros((1, 3, 8, 8), np.float32)}",
    "extra": "yield {'image': np.zeros((1, 3, 8, 8), np.float32), 'mask': np.zeros(1)}",
    "rank": "yield {'image': np.zeros((3, 8, 8), np.float32)}",
    "dimension": "yield {'image': np.zeros((1, 4, 8, 8), np.float32)}",
    "type": "yield {'image': np.zeros((1, 3, 8, 8), np.complex64)}",
}


@pytest.mark.parametrize("kind", BATCHES)
def test_data_that_does_not_fit_is_refused_with_both_sides(folder: Path, run: Run, kind: str) -> None:
    (folder / "d.py").write_text(f"import numpy as np\ndef load_data():\n    {BATCHES[kind]}\n")
    done = run("calibrate", "m.onnx", "--data", "d.py", "-o", "m.qcal")
    assert done.code == 4, done.err
    assert not (folder / "m.qcal").exists()


def test_safe_casts_and_names_are_mended_once(folder: Path, run: Run) -> None:
    (folder / "d.py").write_text(
        "import numpy as np\ndef load_data():\n    for _ in range(3):\n"
        "        yield {'picture': np.ones((2, 3, 8, 8), np.float64)}\n"
    )
    done = run("calibrate", "m.onnx", "--data", "d.py", "--map", "picture=image", "-o", "m.qcal")
    assert done.code == 0, done.err
    assert done.err.count("float64") == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_are_refused_or_left_out(folder: Path, run: Run, value: float) -> None:
    images = np.load(folder / "data.npz")["image"]
    images[0, 0, 0, 0] = value
    np.savez(folder / "bad.npz", image=images)
    done = run("calibrate", "m.onnx", "--data", "bad.npz", "-o", "m.qcal")
    assert done.code == 4
    assert "--allow-nonfinite" in done.err
    assert run("calibrate", "m.onnx", "--data", "bad.npz", "-o", "m.qcal", "--allow-nonfinite", "--force").code == 0
    for method in ("minmax", "percentile", "mse", "entropy"):
        assert run("quantize", "m.onnx", "--calib", "m.qcal", "--method", method, "-o", "q.onnx", "--force").code == 0
        for tensor in onnx.load(folder / "q.onnx").graph.initializer:
            if tensor.name.endswith("_scale"):
                assert np.isfinite(numpy_helper.to_array(tensor)).all()


@pytest.mark.parametrize("fill", [0.0, 3.25, -1e-40, 1e28])
def test_constant_data_gives_finite_positive_scales(folder: Path, run: Run, fill: float) -> None:
    np.savez(folder / "c.npz", image=np.full((4, 3, 8, 8), fill, np.float32))
    assert run("quantize", "m.onnx", "--data", "c.npz", "-o", "q.onnx").code == 0
    for tensor in onnx.load(folder / "q.onnx").graph.initializer:
        if tensor.name.endswith("_scale"):
            scale = numpy_helper.to_array(tensor)
            assert (scale >= 2.0**-126).all()
            assert np.isfinite(scale).all()


def test_a_weight_channel_of_zeros_is_no_problem(folder: Path, run: Run) -> None:
    model = small_model()
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[2] = 0
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w1"))
    onnx.save(model, folder / "z.onnx")
    assert run("quantize", "z.onnx", "--data", "data.npz", "-o", "q.onnx").code == 0


def test_weights_that_are_not_finite_are_named_or_skipped(folder: Path, run: Run) -> None:
    model = small_model()
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[0, 0, 0, 0] = np.inf
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w1"))
    onnx.save(model, folder / "inf.onnx")
    data = ("--data", "data.npz")
    assert run("calibrate", "m.onnx", *data, "-o", "m.qcal").code == 0
    done = run("quantize", "inf.onnx", "--calib", "m.qcal", "--calib-by-name", "-o", "q.onnx")
    assert done.code == 3
    assert "'w1'" in done.err
    assert "1 of 162" in done.err
    skipped = run("quantize", "inf.onnx", "--calib", "m.qcal", "--calib-by-name", "-o", "q.onnx", "--skip-nonfinite")
    assert skipped.code == 0, skipped.err


@pytest.mark.parametrize(("opset", "code"), [(7, 3), (9, 3), (11, 0), (13, 0), (21, 0)])
def test_old_opsets_are_refused_with_the_remedy(folder: Path, run: Run, opset: int, code: int) -> None:
    model = small_model()
    model.opset_import[0].version = opset
    onnx.save(model, folder / "o.onnx")
    done = run("quantize", "o.onnx", "--data", "data.npz", "-o", "q.onnx", "--json")
    assert done.code == code, done.err
    if code:
        assert f"opset {opset} has no QuantizeLinear" in done.err
        upgraded = run("quantize", "o.onnx", "--data", "data.npz", "-o", "q.onnx", "--upgrade")
        assert upgraded.code == 0, upgraded.err


def test_a_quantized_model_is_not_quantized_again(calibrated: Path, run: Run) -> None:
    assert run("quantize", "m.onnx", "--calib", "m.qcal", "-o", "q.onnx").code == 0
    done = run("quantize", "q.onnx", "--data", "data.npz", "-o", "r.onnx")
    assert done.code == 3
    assert "quantized already" in done.err
    assert not (calibrated / "r.onnx").exists()


def test_statistics_of_another_model_are_refused(calibrated: Path, run: Run) -> None:
    model = small_model()
    model.graph.node[0].name = "other"
    onnx.save(model, calibrated / "other.onnx")
    done = run("quantize", "other.onnx", "--calib", "m.qcal", "-o", "q.onnx")
    assert done.code == 4
    assert "another model" in done.err
    assert run("quantize", "other.onnx", "--calib", "m.qcal", "-o", "q.onnx", "--calib-by-name").code == 0


def test_an_existing_target_needs_force_and_the_input_is_never_the_target(calibrated: Path, run: Run) -> None:
    (calibrated / "q.onnx").write_bytes(b"precious")
    base = ("quantize", "m.onnx", "--calib", "m.qcal", "-o")
    assert run(*base, "q.onnx").code == 6
    assert (calibrated / "q.onnx").read_bytes() == b"precious"
    assert run(*base, "q.onnx", "--force").code == 0
    before = (calibrated / "m.onnx").read_bytes()
    assert run(*base, "m.onnx", "--force").code == 6
    assert (calibrated / "m.onnx").read_bytes() == before


def test_a_full_disk_leaves_nothing_behind(calibrated: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))

    before = sorted(p.name for p in calibrated.iterdir())
    done = spawn("quantize", "m.onnx", "--calib", "m.qcal", "-o", "q.onnx", cwd=calibrated, preexec_fn=limit)
    assert done.returncode == 6, done.stderr
    assert sorted(p.name for p in calibrated.iterdir()) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_can_go_on(folder: Path, run: Run, number: int, code: int) -> None:
    (folder / "slow.py").write_text(
        "import numpy as np, time\nfrom pathlib import Path\n"
        "def load_data():\n"
        "    for i, image in enumerate(np.load('data.npz')['image']):\n"
        "        if i == 4 and not Path('go').exists():\n"
        "            Path('here').touch()\n"
        "            time.sleep(2)\n"
        "        yield {'image': image[None]}\n"
    )
    command = [sys.executable, "-m", "qpipe", "calibrate", "m.onnx", "--data", "slow.py", "-o", "m.qcal"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "here").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert "--resume" in err
    (folder / "go").touch()
    assert run("calibrate", "m.onnx", "--data", "slow.py", "-o", "m.qcal", "--resume").code == 0
    assert run("calibrate", "m.onnx", "--data", "slow.py", "-o", "whole.qcal").code == 0
    assert (folder / "m.qcal").read_bytes() == (folder / "whole.qcal").read_bytes()


def test_a_closed_pipe_is_no_error(folder: Path) -> None:
    command = f"{sys.executable} -m qpipe explain op | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=folder)
    assert done.stdout.splitlines()[-1] == "0", (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
