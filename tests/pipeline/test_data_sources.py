"""Every kind of data source, and every way in which it can be broken."""

from __future__ import annotations

import contextlib
import io
import pickle
import struct
import sys
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qpipe.calibrate.errors import DataError
from qpipe.pipeline.data import InputInfo, batches, random_batches

X = np.arange(70, dtype=np.float32).reshape(10, 7)
INPUT = InputInfo(name="x", dtype=np.dtype(np.float32), shape=("N", 7))
IDS = InputInfo(name="ids", dtype=np.dtype(np.int64), shape=("N", "S"))


def shapes(argument: Any, **options: Any) -> list[dict[str, tuple[int, ...]]]:
    return [{name: array.shape for name, array in batch.items()} for batch in batches(argument, **options)]


def joined(argument: Any, name: str = "x", **options: Any) -> np.ndarray:
    return np.concatenate([batch[name] for batch in batches(argument, **options)])


def write_npz(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def npy(shape: tuple[int, ...], descr: str = "<f4", body: bytes = b"", version: int = 1) -> bytes:
    """Return an .npy file that declares whatever it is told to."""
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(text)) + text + body


@contextlib.contextmanager
def at_most(limit: int) -> Iterator[None]:
    """Fail when the block holds more than ``limit`` bytes at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_is_cut_along_the_first_axis(tmp_path: Path, save: Any, order: str) -> None:
    save(tmp_path / "a.npz", x=np.asarray(X, order=order), ids=np.arange(10), scale=np.float32(3))
    assert shapes(tmp_path / "a.npz", batch=4) == [{"x": (n, 7), "ids": (n,), "scale": ()} for n in (4, 4, 2)]
    np.testing.assert_array_equal(joined(tmp_path / "a.npz", batch=4), X)
    assert [int(batch["scale"]) for batch in batches(str(tmp_path / "a.npz"), batch=4)] == [3, 3, 3]


@given(
    count=st.integers(1, 12),
    width=st.integers(0, 3),
    batch=st.integers(1, 13),
    dtype=st.sampled_from(["<f4", ">f4", "<f2", "<i8", "|b1", "<U3", "|u1"]),
)
@settings(max_examples=60, deadline=None)
def test_any_npz_comes_back_whole(
    tmp_path_factory: pytest.TempPathFactory, count: int, width: int, batch: int, dtype: str
) -> None:
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    array = np.arange(count * width).reshape(count, width).astype(dtype)
    np.savez_compressed(path, x=array)
    pieces = [piece["x"] for piece in batches(path, batch=batch)]
    assert all(len(piece) == batch for piece in pieces[:-1])
    assert 0 < len(pieces[-1]) <= batch
    np.testing.assert_array_equal(np.concatenate(pieces), array)


def test_npy_takes_the_name_of_the_only_input(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", X)
    np.testing.assert_array_equal(joined(tmp_path / "a.npy", inputs=[INPUT], batch=3), X)
    for inputs in ([], [INPUT, IDS]):
        with pytest.raises(DataError, match="one array without a name"):
            shapes(tmp_path / "a.npy", inputs=inputs)


def test_a_folder_of_arrays_is_read_in_order(tmp_path: Path) -> None:
    for i in (1, 0, 2):
        np.savez(tmp_path / f"part-{i}.npz", x=X[3 * i : 3 * i + 3])
    np.testing.assert_array_equal(joined(tmp_path, batch=2), X[:9])


def test_a_folder_of_npy_is_columns_when_named_after_inputs_and_batches_otherwise(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "ids.npy", np.ones((10, 2), np.int64))
    assert shapes(tmp_path, inputs=[INPUT, IDS], batch=5) == [{"ids": (5, 2), "x": (5, 7)}] * 2
    with pytest.raises(DataError, match="one array without a name"):
        shapes(tmp_path, inputs=[InputInfo(name="a", dtype=IDS.dtype, shape=None), IDS])
    (tmp_path / "ids.npy").unlink()
    np.save(tmp_path / "z.npy", X)
    np.testing.assert_array_equal(joined(tmp_path, inputs=[INPUT], batch=5), np.concatenate([X, X]))


def test_polygraphy_files_and_folders_are_read(tmp_path: Path) -> None:
    from polygraphy.json import save_json

    feeds = [{"x": X[:2]}, {"x": X[2:5]}]
    save_json(feeds, str(tmp_path / "inputs.json"))
    assert shapes(tmp_path / "inputs.json") == [{"x": (2, 7)}, {"x": (3, 7)}]
    folder = tmp_path / "inputs"
    folder.mkdir()
    for i, feed in enumerate(feeds):
        save_json(feed, str(folder / f"{i:010}.json"))
    np.testing.assert_array_equal(joined(folder), X[:5])


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe", b'"text"', b'{"x": {"polygraphy_class": "?"}}'])
def test_json_that_is_not_polygraphys_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError):
        shapes(tmp_path / "a.json")


def test_onnx_test_data_sets_are_read_in_numerical_order(tmp_path: Path) -> None:
    for i in range(11):
        folder = tmp_path / f"test_data_set_{i}"
        folder.mkdir()
        named = onnx.numpy_helper.from_array(np.array([[i]]), "ids")
        unnamed = onnx.numpy_helper.from_array(X[i % 10 : i % 10 + 1])
        (folder / "input_0.pb").write_bytes(unnamed.SerializeToString())
        (folder / "input_1.pb").write_bytes(named.SerializeToString())
        (folder / "output_0.pb").write_bytes(b"ignored")
    assert joined(tmp_path, "ids", inputs=[INPUT, IDS]).reshape(-1).tolist() == list(range(11))
    assert shapes(tmp_path / "test_data_set_3", inputs=[INPUT, IDS]) == [{"x": (1, 7), "ids": (1, 1)}]


def test_a_serialized_tensor_may_not_point_to_another_file(tmp_path: Path) -> None:
    tensor = onnx.numpy_helper.from_array(X, "x")
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    (tmp_path / "input_0.pb").write_bytes(tensor.SerializeToString())
    with pytest.raises(DataError, match="refers to another file"):
        shapes(tmp_path, inputs=[INPUT])
    for content in (b"\xff\xff\xff", b"", onnx.TensorProto(data_type=99, dims=[1]).SerializeToString()):
        (tmp_path / "input_0.pb").write_bytes(content)
        with pytest.raises(DataError, match="no serialized tensor"):
            shapes(tmp_path, inputs=[INPUT])


class Reader:
    """As ONNX Runtime's CalibrationDataReader."""

    def __init__(self) -> None:
        self._left = iter([{"x": X[:1]}, {"x": X[1:3]}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


def generated() -> Iterator[dict[str, np.ndarray]]:
    yield {"x": X[:1]}
    yield {"x": X[1:3]}


@pytest.mark.parametrize(
    "source", [Reader, generated, lambda: list(generated()), lambda: tuple(generated())], ids=range(4)
)
def test_objects_of_the_python_api(source: Any) -> None:
    assert shapes(source()) == [{"x": (1, 7)}, {"x": (2, 7)}]


def test_one_dict_is_one_batch_and_lists_become_arrays() -> None:
    assert shapes({"x": [[1.0, 2.0]]}) == [{"x": (1, 2)}]
    assert shapes([X, X], inputs=[INPUT]) == [{"x": (10, 7)}] * 2


@pytest.mark.torch
def test_torch_tensors_and_loaders() -> None:
    torch = pytest.importorskip("torch")
    samples = [{"x": torch.from_numpy(row).requires_grad_()} for row in X]
    loader = torch.utils.data.DataLoader(samples, batch_size=4)
    np.testing.assert_array_equal(joined(loader), X)


def script(folder: Path, body: str, name: str = "load.py") -> Path:
    path = folder / name
    path.write_text("import numpy as np\n" + body)
    return path


def test_a_script_is_run(tmp_path: Path) -> None:
    script(tmp_path, "SIZE = 3\n", "helper.py")
    path = script(
        tmp_path,
        "from helper import SIZE\n"
        "def load_data():\n    for i in range(SIZE):\n        yield {'x': np.full((1, 2), i)}\n"
        "def other():\n    return [{'x': np.zeros((5, 2))}]\n",
    )
    before = list(sys.path)
    assert joined(path).tolist() == [[0, 0], [1, 1], [2, 2]]
    assert shapes(f"{path}:other") == [{"x": (5, 2)}]
    assert sys.path == before


def test_dataclasses_and_reader_classes_work_in_a_script(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        "from dataclasses import dataclass\n@dataclass\nclass Reader:\n    left: int = 2\n    def get_next(self):\n"
        "        self.left -= 1\n        return {'x': np.ones((1, 2))} if self.left >= 0 else None\n",
    )
    assert shapes(f"{path}:Reader") == [{"x": (1, 2)}] * 2


RAISING = {
    "while imported": ("raise RuntimeError('early')", "RuntimeError: early", ":2, in <module>"),
    "syntax": ("def load_data(:\n", "SyntaxError", ":2"),
    "missing module": ("import not_there\n", "ModuleNotFoundError", ":2, in <module>"),
    "when called": ("def load_data():\n    return 1 / 0\n", "ZeroDivisionError", ":3, in load_data"),
    "while yielding": (
        "def load_data():\n    yield {'x': np.ones(1)}\n    np.zeros(3)[5]\n",
        "IndexError",
        ":4, in load_data",
    ),
    "deep in a library": ("def load_data():\n    yield {'x': np.linalg.inv(np.zeros((2, 2)))}\n", "Singular", ":3, in"),
    "exit": ("def load_data():\n    raise SystemExit(0)\n", "SystemExit", ":3, in load_data"),
}


@pytest.mark.parametrize("case", RAISING)
def test_what_a_script_raises_is_reported_with_its_own_line(tmp_path: Path, case: str) -> None:
    body, message, place = RAISING[case]
    path = script(tmp_path, body)
    with pytest.raises(DataError, match=message) as info:
        shapes(path)
    assert info.value.exit_code == 4
    assert str(info.value.where).startswith(f"{path}{place}")


def test_an_interruption_is_not_the_users_error(tmp_path: Path) -> None:
    path = script(tmp_path, "def load_data():\n    raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        shapes(path)


def test_a_missing_function_is_suggested(tmp_path: Path) -> None:
    path = script(tmp_path, "def load_dat():\n    pass\n")
    with pytest.raises(DataError, match="has no function 'load_data'") as info:
        shapes(path)
    assert info.value.do == "--data load.py:load_dat"
    with pytest.raises(DataError, match="no such script"):
        shapes(tmp_path / "missing.py")


@pytest.mark.parametrize("body", ["return None", "return 5", "return 'x.npz'"])
def test_a_function_that_returns_no_batches_is_refused(tmp_path: Path, body: str) -> None:
    with pytest.raises(DataError, match=r"gave (NoneType|int|str)"):
        shapes(script(tmp_path, f"def load_data():\n    {body}\n"))


@pytest.mark.parametrize(
    "body", ["return\n    yield", "return []", "g = iter([{'x': 1}]); list(g); return g"], ids=["none", "list", "used"]
)
def test_data_without_samples_is_an_error(tmp_path: Path, body: str) -> None:
    with pytest.raises(DataError, match="gave no samples") as info:
        shapes(script(tmp_path, f"def load_data():\n    {body}\n"))
    assert "a generator that was used up" in str(info.value.do)


@pytest.mark.parametrize("item", [(X, X), "text", 5, None, {1: X}])
def test_a_batch_that_is_no_dict_is_refused(item: object) -> None:
    with pytest.raises(DataError, match=r"a batch (is a|has a key)"):
        shapes([item], inputs=[INPUT])


@pytest.mark.parametrize("value", [[[1], [2, 3]], {"a": 1}, [None]])
def test_a_value_that_is_no_array_is_refused(value: object) -> None:
    with pytest.raises(DataError, match="is no array"):
        shapes([{"x": value}])


class Payload:
    """Writes a marker file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._marker,)


@pytest.mark.parametrize("kind", ["npy", "npz", "bare"])
def test_pickles_are_refused_and_never_run(tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "marker"
    array = np.array([Payload(marker)], dtype=object)
    path = tmp_path / ("a.npz" if kind == "npz" else "a.npy")
    if kind == "bare":
        path.write_bytes(pickle.dumps(Payload(marker)))
    else:
        np.savez(path, x=array) if kind == "npz" else np.save(path, array)
    with pytest.raises(DataError, match=r"Python objects; refused") as info:
        shapes(path, inputs=[INPUT])
    assert info.value.exit_code == 4
    assert not marker.exists()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".bin"])
def test_torch_and_pickle_files_are_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
    with pytest.raises(DataError, match="may hold pickled code"):
        shapes(path)
    assert not (tmp_path / "marker").exists()


BROKEN = {
    "declares 2^40": npy((2**40,)),
    "declares 2^40 in one sample": npy((1, 2**40)),
    "overflows": npy((2**62, 2**62)),
    "negative": npy((-1, 4)),
    "too short": npy((4, 4), body=bytes(60)),
    "too long": npy((4, 4), body=bytes(70)),
    "no header": b"\x93NUMPY\x01\x00",
    "bad header": b"\x93NUMPY\x01\x00\x05\x00abcd\n",
    "calls": npy((1,), descr="__import__('os')"),
    "version": npy((1,), version=9),
    "text": b"1,2,3\n",
    "empty": b"",
    "objects": npy((1,), descr="|O", body=b"12345678"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_a_broken_array_is_refused_before_memory_is_asked_for(tmp_path: Path, case: str, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "npz":
        write_npz(path, {"x.npy": BROKEN[case]})
    else:
        path.write_bytes(BROKEN[case])
    with at_most(2**20), pytest.raises(DataError) as info:
        shapes(path, inputs=[INPUT])
    assert info.value.exit_code == 4
    assert str(path) in str(info.value.where)


def test_a_zip_bomb_is_read_in_small_pieces(tmp_path: Path) -> None:
    """256 MiB of zeros in 256 kB: taking the first samples must not unpack the rest."""
    path, rows = tmp_path / "a.npz", 2**10
    write_npz(path, {"x.npy": npy((rows, 2**18), "|u1", bytes(rows * 2**18))})
    with at_most(16 * 2**20):
        first = next(batches(path, batch=8))
    assert first["x"].shape == (8, 2**18)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reading_needs_one_batch_of_memory(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "a.npz", x=np.ones((64, 2**18), np.float32))
    with at_most(20 * 2**20):
        assert sum(len(batch["x"]) for batch in batches(tmp_path / "a.npz", batch=4)) == 64


def test_a_sample_beyond_any_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qpipe.pipeline.data.arrays.MAX_PIECE", 100)
    np.savez(tmp_path / "a.npz", x=X)
    assert len(shapes(tmp_path / "a.npz", batch=3)) == 4
    with pytest.raises(DataError, match="does not fit into memory") as info:
        shapes(tmp_path / "a.npz", batch=4)
    assert "--batch" in str(info.value.do)


ARCHIVES = {
    "no zip": b"hello",
    "cut off": None,
    "no array inside": {"readme.txt": b"hello"},
    "nothing inside": {},
    "different lengths": {"x.npy": npy((2,), body=bytes(8)), "y.npy": npy((3,), body=bytes(12))},
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_a_broken_archive_is_refused(tmp_path: Path, case: str) -> None:
    path, content = tmp_path / "a.npz", ARCHIVES[case]
    if isinstance(content, dict):
        write_npz(path, content)
    elif content is None:
        np.savez(path, x=X)
        path.write_bytes(path.read_bytes()[:-40])
    else:
        path.write_bytes(content)
    with pytest.raises(DataError) as info:
        shapes(path)
    assert str(path) in str(info.value.where)


def test_damaged_archives_never_raise_anything_else(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, x=X, ids=np.arange(10))
    whole = buffer.getvalue()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        data[generator.integers(len(data))] ^= 1 << int(generator.integers(8))
        (tmp_path / "a.npz").write_bytes(data)
        try:
            shapes(tmp_path / "a.npz", batch=4)
        except DataError:
            refused += 1
    assert refused > 50


def test_unknown_data_is_refused_with_what_is_possible(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("1,2")
    (tmp_path / "empty").mkdir()
    for path, reason in (("a.csv", "cannot be read"), ("empty", "holds no data"), ("nowhere", "no such data")):
        with pytest.raises(DataError, match=reason) as info:
            shapes(tmp_path / path)
        assert "script.py" in str(info.value.expected)


def test_random_batches_follow_the_signature_and_the_seed() -> None:
    image = InputInfo(name="image", dtype=np.dtype(np.float16), shape=("N", 3, "H", None))
    flag = InputInfo(name="flag", dtype=np.dtype(bool), shape=())
    inputs = [image, IDS, flag]
    made = list(random_batches(inputs, 5, seed=1, batch=2, sizes={"H": 4}))
    assert [batch["image"].shape for batch in made] == [(2, 3, 4, 16), (2, 3, 4, 16), (1, 3, 4, 16)]
    assert [batch["ids"].shape for batch in made] == [(2, 16), (2, 16), (1, 16)]
    assert {batch["image"].dtype for batch in made} == {np.dtype(np.float16)}
    assert set(np.concatenate([batch["ids"].reshape(-1) for batch in made])) == {0, 1}
    assert made[0]["flag"].shape == ()
    again = list(random_batches(inputs, 5, seed=1, batch=2, sizes={"H": 4}))
    other = list(random_batches(inputs, 5, seed=2, batch=2, sizes={"H": 4}))
    assert all(np.array_equal(a[name], b[name]) for a, b in zip(made, again, strict=True) for name in a)
    assert not np.array_equal(made[0]["image"], other[0]["image"])
    with pytest.raises(DataError, match="cannot be made for text"):
        list(random_batches([InputInfo(name="t", dtype=np.dtype(object), shape=(1,))], 1))
