"""What can go wrong while calibrating: every fault with the exit code and the words that the user gets.

`FAULTS` is the table; the numbers group variants of one fault. What needs a second run, a signal or a comparison has a
test of its own below, named after its fault.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from qpipe.calibrate.stats.histogram import Histogram
from qpipe.pipeline.calibration import load

from .conftest import Run, small_model

SHAPE = (4, 3, 8, 8)
CALIBRATE = ("calibrate", "m.onnx", "-o", "m.qcal", "--data")
Setup = Callable[[Path], object]


@dataclass(frozen=True)
class Fault:
    """A fault: how it comes about, the command that meets it, and what the user gets."""

    make: Setup
    command: tuple[str, ...]
    code: int
    words: tuple[str, ...]


def script(body: str) -> Setup:
    """Write d.py whose load_data() is ``body``."""
    text = f"import numpy as np\ndef load_data():\n    {body}\n"
    return lambda folder: (folder / "d.py").write_text(text)


def images(**changes: float) -> Setup:
    """Write bad.npz: normal images whose first values are replaced."""

    def make(folder: Path) -> None:
        x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
        for value in changes.values():
            x.reshape(-1)[0] = value
        np.savez(folder / "bad.npz", image=x)

    return make


def bomb(folder: Path) -> None:
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N] image) => (float[M] y)'
        "<int64[1] s = {68719476736}> { big = ConstantOfShape (s) y = Add (big, image) }"
    )
    model.graph.node[0].name = "huge"
    onnx.save(model, folder / "bomb.onnx")


class Payload:
    """Creates a marker file when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._marker = str(folder / "marker")

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self._marker,)


def pickled(name: str) -> Setup:
    def make(folder: Path) -> None:
        array = np.array([Payload(folder)], dtype=object)
        if name.endswith(".npz"):
            np.savez(folder / name, image=array)
        elif name.endswith(".npy"):
            np.save(folder / name, array, allow_pickle=True)
        else:
            (folder / name).write_bytes(b"\x80\x04.")

    return make


def declares_too_much(name: str) -> Setup:
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }"
    data = header.ljust(127) + b"\n" + bytes(64)

    def make(folder: Path) -> None:
        if name.endswith(".npy"):
            (folder / name).write_bytes(data)
        else:
            with zipfile.ZipFile(folder / name, "w") as archive:
                archive.writestr("image.npy", data)

    return make


def fixed_batch(folder: Path) -> None:
    model = small_model()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx.save(model, folder / "fixed.onnx")


def other_model(folder: Path) -> None:
    model = small_model()
    for node in model.graph.node:
        node.name = f"other_{node.name}"
    model.graph.node[1].op_type = "Sigmoid"
    onnx.save(model, folder / "other.onnx")


def spoil(change: Callable[[bytes], bytes]) -> Setup:
    """Calibrate, and change the bytes of the file."""

    def make(folder: Path) -> None:
        command = [sys.executable, "-m", "qpipe", *CALIBRATE, "data.npz"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        (folder / "m.qcal").write_bytes(change((folder / "m.qcal").read_bytes()))

    return make


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


QUANTIZE = ("quantize", "m.onnx", "--calib", "m.qcal", "-o", "q.onnx")
IMAGE = "np.ones((2, 3, 8, 8), np.float32)"

FAULTS = {
    "9 memory bomb": Fault(
        bomb, ("calibrate", "bomb.onnx", "--random", "2", "-o", "m.qcal"), 3, ("'huge'", "would need 256 GiB")
    ),
    "9 limit of the user": Fault(
        lambda _: None, (*CALIBRATE, "data.npz", "--max-memory", "1000"), 3, ("would need", "raise --max-memory")
    ),
    "10 pickle in npy": Fault(pickled("p.npy"), (*CALIBRATE, "p.npy"), 4, ("holds Python objects; refused",)),
    "10 pickle in npz": Fault(pickled("p.npz"), (*CALIBRATE, "p.npz"), 4, ("holds Python objects; refused",)),
    "10 torch file": Fault(pickled("p.pt"), (*CALIBRATE, "p.pt"), 4, (".pt files may hold pickled code; refused",)),
    "11 npy bomb": Fault(declares_too_much("b.npy"), (*CALIBRATE, "b.npy"), 4, ("declares another size",)),
    "11 npz bomb": Fault(declares_too_much("b.npz"), (*CALIBRATE, "b.npz"), 4, ("declares another size",)),
    "12 script raises": Fault(
        script("yield {}['image']"), (*CALIBRATE, "d.py"), 4, ("load_data() raised KeyError", "d.py:3, in load_data")
    ),
    "12 script does not compile": Fault(script("yield ("), (*CALIBRATE, "d.py"), 4, ("SyntaxError", "d.py:3")),
    "13 no samples": Fault(
        script("return iter(())"), (*CALIBRATE, "d.py"), 4, ("gave no samples", "used up before gives nothing again")
    ),
    "14 input missing": Fault(
        script(f"yield {{'picture': {IMAGE}}}"),
        (*CALIBRATE, "d.py"),
        4,
        ("no array for input 'image'", "picture float32[2,3,8,8]", "image float32[N,3,8,8]", "--map picture=image"),
    ),
    "14 input too much": Fault(
        script(f"yield {{'image': {IMAGE}, 'mask': np.zeros(2)}}"),
        (*CALIBRATE, "d.py"),
        4,
        ("no input of the model: 'mask'", "remove mask"),
    ),
    "14 type": Fault(
        script("yield {'image': np.ones((2, 3, 8, 8), np.int64)}"),
        (*CALIBRATE, "d.py"),
        4,
        ("has type int64, not float32", "convert 'image'"),
    ),
    "14 rank": Fault(
        script("yield {'image': np.ones((3, 8, 8), np.float32)}"),
        (*CALIBRATE, "d.py"),
        4,
        ("has 3 axes, not 4", "--batchify"),
    ),
    "14 rank mended": Fault(
        script("yield {'image': np.ones((3, 8, 8), np.float32)}"),
        (*CALIBRATE, "d.py", "--batchify"),
        0,
        ("1 samples,",),
    ),
    "14 fixed size": Fault(
        script("yield {'image': np.ones((2, 4, 8, 8), np.float32)}"),
        (*CALIBRATE, "d.py"),
        4,
        ("has size 4 on axis 1, not 3",),
    ),
    "14 fixed batch": Fault(
        lambda folder: (fixed_batch(folder), script(f"yield {{'image': {IMAGE}[:1]}}")(folder)),
        ("calibrate", "fixed.onnx", "-o", "m.qcal", "--data", "d.py"),
        4,
        ("has size 1 on axis 0, not 2", "--batch 2"),
    ),
    "14 safe cast": Fault(
        script("\n    ".join(["yield {'image': np.ones((2, 3, 8, 8))}"] * 2)),
        (*CALIBRATE, "d.py"),
        0,
        ("warning: input 'image': float64 cast to float32",),
    ),
    "15 batches without elements": Fault(
        script(f"yield {{'image': {IMAGE}[:0]}}\n    yield {{'image': {IMAGE}}}"),
        (*CALIBRATE, "d.py"),
        0,
        ("warning: batches without elements were skipped", "2 samples,"),
    ),
    "15 nothing else": Fault(
        script(f"yield {{'image': {IMAGE}[:0]}}"), (*CALIBRATE, "d.py"), 4, ("1 batches, all of them without elements",)
    ),
    "17 NaN": Fault(images(one=np.nan), (*CALIBRATE, "bad.npz"), 4, ("is not finite", "NaN", "--allow-nonfinite")),
    "17 NaN accepted": Fault(
        images(one=np.nan),
        (*CALIBRATE, "bad.npz", "--allow-nonfinite"),
        0,
        ("warning", "the first is 'image': 1 NaN, 0 +Inf, 0 -Inf of 768 values; they are left out"),
    ),
    "18 Inf": Fault(images(one=np.inf), (*CALIBRATE, "bad.npz"), 4, ("is not finite", "+Inf", "--allow-nonfinite")),
    "18 mask values": Fault(
        images(one=-3.4e38), (*CALIBRATE, "bad.npz", "--allow-nonfinite"), 0, ("mask values", "first is 'image'")
    ),
    "38 other model": Fault(
        lambda folder: (spoil(bytes)(folder), other_model(folder)),
        ("quantize", "other.onnx", "--calib", "m.qcal", "-o", "q.onnx"),
        4,
        ("belongs to another model", "statistics of model", "only in the first: Conv_a (Conv)", "--calib-by-name"),
    ),
    "39 cut off": Fault(
        spoil(lambda b: b[:-9]), QUANTIZE, 4, ("cannot be used", "bytes of data where its header says")
    ),
    "39 header cut off": Fault(spoil(lambda b: b[:50]), QUANTIZE, 4, ("cannot be used", "cut off")),
    "39 bit in the data": Fault(spoil(lambda b: flip(b, len(b) - 5)), QUANTIZE, 4, ("checksum of block",)),
    "39 bit in the header": Fault(
        spoil(lambda b: b.replace(b'\\"samples\\": 24', b'\\"samples\\": 25', 1)),
        QUANTIZE,
        4,
        ("checksum of its header",),
    ),
    "39 newer schema": Fault(
        spoil(lambda b: b.replace(b'"schema": "1"', b'"schema": "7"')), QUANTIZE, 4, ("schema 7 is newer", "--upgrade")
    ),
    "39 some text": Fault(spoil(lambda _: b"hello"), QUANTIZE, 4, ("cut off or no .qcal file",)),
    "49 another order": Fault(
        lambda folder: spoil(bytes)(folder),
        ("calibrate", "m.onnx", "--data", "load.py:backwards", "-o", "m.qcal", "--resume"),
        4,
        ("not the data of the run to resume", "give the same data in the same order"),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault(folder: Path, run: Run, name: str) -> None:
    fault = FAULTS[name]
    (folder / "load.py").write_text(
        "import numpy as np\n"
        "def load_data():\n    return [{'image': i[None]} for i in np.load('data.npz')['image']]\n"
        "def backwards():\n    return load_data()[::-1]\n"
    )
    fault.make(folder)
    before = (folder / "m.qcal").read_bytes() if (folder / "m.qcal").exists() else None
    done = run(*fault.command)
    assert done.code == fault.code, done.err
    for word in fault.words:
        assert word in done.err + done.out, done.err
        assert done.err.count(word) <= 1, "said once"
    assert not (folder / "marker").exists(), "code of the data ran"
    assert not (folder / "q.onnx").exists()
    if fault.code:
        after = (folder / "m.qcal").read_bytes() if (folder / "m.qcal").exists() else None
        assert after == before, "a refusal changes no file"


def test_16_any_batches_have_the_statistics_of_one(folder: Path, run: Run) -> None:
    script(
        "x = np.load('data.npz')['image']\n    yield from ({'image': x[a:b]} for a, b in ((9, 24), (0, 1), (1, 9)))"
    )(folder)
    assert run(*CALIBRATE, "d.py").code == 0
    assert run("calibrate", "m.onnx", "--data", "data.npz", "--batch", "24", "-o", "one.qcal").code == 0
    ragged, one = load(folder / "m.qcal"), load(folder / "one.qcal")
    assert ragged.tensors["image"].histogram == one.tensors["image"].histogram
    assert ragged.samples == one.samples == 24


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy", "auto"])
def test_18_an_infinity_enters_no_scale(folder: Path, run: Run, method: str) -> None:
    images(one=np.inf)(folder)
    assert run(*CALIBRATE, "bad.npz", "--allow-nonfinite").code == 0
    assert run(*QUANTIZE, "--method", method).code == 0
    clean = np.load(folder / "bad.npz")["image"].reshape(-1)[1:]
    scales = scales_of(folder)
    assert scales
    assert all(np.isfinite(s).all() and (s > 0).all() for s in scales.values())
    assert float(scales["image_scale"]) <= (clean.max() - clean.min()) / 255 * 1.01


def scales_of(folder: Path) -> dict[str, np.ndarray]:
    stored = onnx.load(folder / "q.onnx").graph.initializer
    return {t.name: numpy_helper.to_array(t) for t in stored if t.name.endswith("_scale")}


def test_19_a_tensor_of_zeros_has_scale_1_and_is_said_to_be_dead(folder: Path, run: Run) -> None:
    np.savez(folder / "zero.npz", image=np.zeros(SHAPE, np.float32))
    assert run(*CALIBRATE, "zero.npz").code == 0
    assert "image is dead: all of its values are 0" in run("inspect", "m.qcal").out
    assert run(*QUANTIZE).code == 0
    assert scales_of(folder)["image_scale"] == 1


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "entropy", "auto"])
@pytest.mark.parametrize("fill", [3.25, -1e-40, 1e-38, 1e29, -1e29])
def test_20_a_constant_has_a_finite_normal_scale(folder: Path, run: Run, method: str, fill: float) -> None:
    np.savez(folder / "c.npz", image=np.full(SHAPE, fill, np.float32))
    assert run("quantize", "m.onnx", "--data", "c.npz", "--method", method, "-o", "q.onnx").code == 0
    for scale in scales_of(folder).values():
        assert np.isfinite(scale).all()
        assert (scale >= np.float32(2.0**-126)).all()


def test_38_the_names_alone_may_do(folder: Path, run: Run) -> None:
    assert run(*CALIBRATE, "data.npz").code == 0
    other_model(folder)
    done = run("quantize", "other.onnx", "--calib", "m.qcal", "-o", "q.onnx")
    found = next(line for line in done.err.splitlines() if "found" in line)
    assert 1 <= found.count(";") + 1 <= 6, "at most five differences"
    assert run("quantize", "other.onnx", "--calib", "m.qcal", "-o", "q.onnx", "--calib-by-name").code == 0


SLOW = """
import numpy as np, time
from pathlib import Path
def load_data():
    for i, image in enumerate(np.load('data.npz')['image']):
        if i == {stop} and not Path('go').exists():
            Path('here').touch()
            time.sleep({seconds})
        yield {{'image': image[None]}}
"""


def started(folder: Path, stop: int, seconds: float) -> subprocess.Popen[str]:
    """Start a calibration that saves after every batch, and wait until it reads sample ``stop``."""
    (folder / "slow.py").write_text(SLOW.format(stop=stop, seconds=seconds))
    command = [sys.executable, "-m", "qpipe", *CALIBRATE, "slow.py", "--save-every", "1"]
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (folder / "here").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


def resumed(folder: Path, run: Run) -> bool:
    """Let the run go on to its end; return whether the file is that of an undisturbed run."""
    (folder / "go").touch()
    done = run(*CALIBRATE, "slow.py", "--resume")
    assert done.code == 0, done.err
    assert run("calibrate", "m.onnx", "--data", "slow.py", "-o", "whole.qcal").code == 0
    return (folder / "m.qcal").read_bytes() == (folder / "whole.qcal").read_bytes()


def test_42_killed_it_goes_on_to_the_same_bytes(folder: Path, run: Run) -> None:
    process = started(folder, 7, 60)
    process.kill()
    process.communicate(timeout=60)
    assert 0 < load(folder / "m.qcal").samples <= 7
    assert sorted(p.suffix for p in folder.iterdir() if p.name.startswith("m.")) == [".onnx", ".qcal"]
    assert resumed(folder, run)


def test_43_a_second_ctrl_c_stops_at_once_and_the_last_save_stands(folder: Path, run: Run) -> None:
    process = started(folder, 5, 60)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "--resume" in err
    assert 0 < load(folder / "m.qcal").samples <= 5
    assert resumed(folder, run)


def test_48_memory_does_not_grow_with_tiny_batches(folder: Path) -> None:
    script("x = np.ones((1, 3, 8, 8), np.float32)\n    yield from ({'image': x} for _ in range(int(COUNT)))")(folder)
    source = (folder / "d.py").read_text()
    peaks = []
    for count in (200, 4000):
        (folder / "d.py").write_text(source.replace("COUNT", str(count)))
        text = (
            "import sys; from qpipe.pipeline.cli import main; from qpipe.pipeline.memory import peak_memory\n"
            f"code = main(['calibrate', 'm.onnx', '--data', 'd.py', '-o', 'c{count}.qcal', '-q'])\n"
            "print(peak_memory()); sys.exit(code)"
        )
        done = subprocess.run([sys.executable, "-c", text], cwd=folder, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 2**20)
    assert peaks[1] - peaks[0] < 16, f"{peaks} MiB"


RANDOM = """
import random
import numpy as np
def load_data():
    for _ in range(3):
        yield {'image': np.random.standard_normal((2, 3, 8, 8)).astype(np.float32) * random.random()}
"""


def test_49_a_loader_that_draws_is_seeded_and_its_samples_are_remembered(folder: Path, run: Run) -> None:
    (folder / "draws.py").write_text(RANDOM)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run("calibrate", "m.onnx", "--data", "draws.py", "--seed", seed, "-o", f"{name}.qcal").code == 0
    a, b, c = ((folder / f"{name}.qcal").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    (entry,) = load(folder / "a.qcal").data
    assert len(entry["first"]) == len(entry["last"]) == 64
    assert entry["first"] != load(folder / "c.qcal").data[0]["first"]


def test_random_data_is_remembered_to_the_end(folder: Path, run: Run) -> None:
    done = run("calibrate", "m.onnx", "--random", 8, "-o", "m.qcal", "--json")
    assert json.loads(done.out)["samples"] == 8
    assert run(*QUANTIZE).code == 0
    metadata = {entry.key: entry.value for entry in onnx.load(folder / "q.onnx").metadata_props}
    assert metadata["qpipe.calibration"] == "random"
    assert "calibrated with random data" in run("validate", "m.onnx", "q.onnx", "--data", "data.npz").out
    assert load(folder / "m.qcal").tensors["image"].histogram != Histogram.empty()


def test_every_fault_of_calibration_is_here() -> None:
    own = {name.split("_")[1] for name in globals() if name.startswith("test_")}
    numbers = {name.split()[0] for name in FAULTS} | {number for number in own if number.isdigit()}
    assert numbers == {*map(str, range(9, 21)), "38", "39", "42", "43", "48", "49"}
