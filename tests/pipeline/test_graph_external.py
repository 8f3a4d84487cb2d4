"""External data: what is refused before anything is opened, and what is read a little at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from qpipe.calibrate.errors import ModelError
from qpipe.pipeline import graph
from qpipe.pipeline.cli import main
from qpipe.pipeline.graph.constants import FileValues

SECRET = b"s" * 64
WEIGHT = np.arange(16, dtype=np.float32).reshape(4, 4)


def model_with(*places: dict[str, str], dims: tuple[int, ...] = (4, 4)) -> bytes:
    """Return a model that multiplies by one external weight per place."""
    weights, nodes = [], []
    for i, place in enumerate(places):
        weight = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
        for key, value in place.items():
            weight.external_data.add(key=key, value=value)
        weights.append(weight)
        nodes.append(helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"]))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in ("h0", f"h{len(places)}")]
    body = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    proto = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return proto.SerializeToString()


def weights_of(model: graph.Model) -> list[np.ndarray]:
    return [graph.values(node.inputs[1]) for node in model.graph.nodes]


class Place:
    """A folder with a model, and a secret outside of it."""

    def __init__(self, root: Path) -> None:
        self.outside = root / "outside"
        self.folder = root / "model"
        self.outside.mkdir()
        self.folder.mkdir()
        self.secret = self.outside / "secret.bin"
        self.secret.write_bytes(SECRET)
        (self.folder / "inside.bin").write_bytes(WEIGHT.tobytes())

    def write(self, **entries: str) -> None:
        (self.folder / "model.onnx").write_bytes(model_with(entries))


def nested(place: Place) -> None:
    (place.folder / "a").mkdir()
    place.write(location="a/../../outside/secret.bin")


def linked(place: Place) -> None:
    (place.folder / "w.bin").symlink_to(place.secret)
    place.write(location="w.bin")


def linked_folder(place: Place) -> None:
    (place.folder / "sub").symlink_to(place.outside)
    place.write(location="sub/secret.bin")


def linked_device(place: Place) -> None:
    (place.folder / "w.bin").symlink_to("/dev/zero")
    place.write(location="w.bin")


def fifo(place: Place) -> None:
    os.mkfifo(place.folder / "w.bin")
    place.write(location="w.bin")


def hard_linked(place: Place) -> None:
    (place.folder / "w.bin").hardlink_to(place.secret)
    place.write(location="w.bin")


def short(place: Place) -> None:
    (place.folder / "w.bin").write_bytes(b"1234")
    place.write(location="w.bin")


def looped(place: Place) -> None:
    (place.folder / "w.bin").symlink_to("w.bin")
    place.write(location="w.bin")


ATTACKS: dict[str, tuple[Callable[[Place], None], str]] = {
    "parent": (lambda p: p.write(location="../outside/secret.bin"), "points outside the model folder"),
    "nested": (nested, "points outside the model folder"),
    "absolute": (lambda p: p.write(location=str(p.secret)), "points outside the model folder"),
    "link": (linked, "points outside the model folder"),
    "folder link": (linked_folder, "points outside the model folder"),
    "device": (lambda p: p.write(location="/dev/zero"), "points outside the model folder"),
    "link to device": (linked_device, "points outside the model folder"),
    "fifo": (fifo, "does not lie in a plain file"),
    "hard link": (hard_linked, "has other names"),
    "missing": (lambda p: p.write(location="nothing.bin"), "is missing"),
    "short": (short, "does not fit its file"),
    "negative offset": (lambda p: p.write(location="inside.bin", offset="-64"), "does not fit its file"),
    "huge length": (lambda p: p.write(location="inside.bin", length=str(2**40)), "does not fit its file"),
    "huge offset": (lambda p: p.write(location="inside.bin", offset=str(2**63)), "does not fit its file"),
    "windows parent": (lambda p: p.write(location="..\\outside\\secret.bin"), "points outside the model folder"),
    "windows drive": (lambda p: p.write(location="C:\\secret.bin"), "points outside the model folder"),
    "no location": (lambda p: p.write(offset="0"), "points outside the model folder"),
    "folder": (lambda p: p.write(location="."), "does not lie in a plain file"),
    "looped link": (looped, "is missing or cannot be reached"),
    "through a file": (lambda p: p.write(location="inside.bin/x"), "is missing or cannot be reached"),
    "long name": (lambda p: p.write(location="n" * 300), "is missing or cannot be reached"),
    "nul": (lambda p: p.write(location="inside.bin\0"), "points outside the model folder"),
    "in memory": (lambda p: p.write(location="#1"), "is missing"),
    "no number": (lambda p: p.write(location="inside.bin", offset="x"), "no readable offset or length"),
}

_opened: list[str] | None = None
_watching = False


def _watch(event: str, args: tuple[object, ...]) -> None:
    if _opened is not None and event == "open":
        _opened.append(str(args[0]))


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Every path that this process opens from here on."""
    global _opened, _watching
    if not _watching:
        sys.addaudithook(_watch)
        _watching = True
    _opened = []
    yield _opened
    _opened = None


@pytest.mark.parametrize("style", ["absolute", "relative"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_path_attacks_are_refused_before_anything_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opened: list[str], attack: str, style: str
) -> None:
    place = Place(tmp_path)
    build, reason = ATTACKS[attack]
    build(place)
    monkeypatch.chdir(place.folder)
    path = place.folder / "model.onnx" if style == "absolute" else Path("model.onnx")
    opened.clear()
    with pytest.raises(ModelError, match=reason) as info:
        graph.load(path)
    assert info.value.exit_code == 3
    assert "'w0'" in str(info.value)
    assert opened == [str(path)], "only the model file itself may be opened"


@pytest.mark.parametrize("style", ["absolute", "relative"])
def test_a_link_and_a_hard_link_inside_the_folder_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, style: str
) -> None:
    place = Place(tmp_path)
    (place.folder / "link.bin").symlink_to("inside.bin")
    (place.folder / "second.bin").hardlink_to(place.folder / "inside.bin")
    (place.folder / "model.onnx").write_bytes(
        model_with({"location": "link.bin"}, {"location": "second.bin"}, {"location": "./inside.bin", "offset": "0"})
    )
    monkeypatch.chdir(place.folder)
    path = place.folder / "model.onnx" if style == "absolute" else Path("model.onnx")
    for weight in weights_of(graph.load(path)):
        np.testing.assert_array_equal(weight, WEIGHT)


def test_hard_links_are_read_on_request_or_after_the_remedy(tmp_path: Path) -> None:
    place = Place(tmp_path)
    hard_linked(place)
    path = place.folder / "model.onnx"
    allowed = graph.load(path, allow_hardlinks=True)
    assert weights_of(allowed)[0].tobytes() == SECRET
    with pytest.raises(ModelError) as info:
        graph.load(path)
    assert info.value.do is not None
    assert os.system(info.value.do) == 0
    assert weights_of(graph.load(path))[0].tobytes() == SECRET


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """A model in the layout of the Hugging Face cache: snapshot files are links into ``blobs``."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1234", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    contents = {
        "model.onnx": model_with({"location": "shard-1.data"}, {"location": "shard-2.data", "offset": "64"}),
        "shard-1.data": WEIGHT.tobytes(),
        "shard-2.data": bytes(64) + (2 * WEIGHT).tobytes(),
    }
    for name, content in contents.items():
        blob = blobs / f"{abs(hash(name)):x}"
        blob.write_bytes(content)
        (snapshot / name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot / "model.onnx"


def test_the_hugging_face_cache_layout_is_read(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (cached, Path(cached.name)):
        monkeypatch.chdir(cached.parent)
        first, second = weights_of(graph.load(path))
        np.testing.assert_array_equal(first, WEIGHT)
        np.testing.assert_array_equal(second, 2 * WEIGHT)


def test_the_hugging_face_cache_layout_does_not_open_other_folders(cached: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.bin"
    secret.write_bytes(SECRET)
    shard = cached.parent / "shard-1.data"
    shard.unlink()
    shard.symlink_to(secret)
    with pytest.raises(ModelError, match="points outside the model folder"):
        graph.load(cached)


def test_a_saved_copy_of_a_cached_model_stands_alone(cached: Path, tmp_path: Path) -> None:
    model = graph.load(cached)
    graph.save(model, tmp_path / "copy.onnx", external_threshold=0)
    assert graph.model_hash(cached) == graph.model_hash(tmp_path / "copy.onnx")
    onnx.checker.check_model(tmp_path / "copy.onnx", full_check=True)


def test_a_file_that_changes_after_loading_is_refused(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.write(location="inside.bin")
    model = graph.load(place.folder / "model.onnx")
    inside = place.folder / "inside.bin"
    inside.unlink()
    inside.symlink_to(place.secret)
    with pytest.raises(ModelError, match="cannot be read"):
        weights_of(model)
    inside.unlink()
    inside.write_bytes(WEIGHT.tobytes())
    with pytest.raises(ModelError, match="changed while it was in use"):
        weights_of(model)


def test_values_are_a_read_only_view_of_the_file(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.write(location="inside.bin")
    model = graph.load(place.folder / "model.onnx")
    weight = model.graph.nodes[0].inputs[1]
    array = graph.values(weight)
    assert not array.flags.writeable
    assert not array.flags.owndata
    assert isinstance(weight._values, FileValues), "reading must not keep the values in the graph"
    assert weight.shape == (4, 4)
    assert weight.dtype == np.float32
    assert graph.stored_size(weight) == 64


def test_a_weight_larger_than_memory_is_read_in_part(tmp_path: Path) -> None:
    """1 TiB of holes: more than any machine that runs this has."""
    rows = 2**28
    path = tmp_path / "model.onnx"
    path.write_bytes(model_with({"location": "holes.bin"}, dims=(rows, 1024)))
    with (tmp_path / "holes.bin").open("wb") as file:
        file.truncate(rows * 1024 * 4)
    weight = graph.load(path).graph.nodes[0].inputs[1]
    assert graph.stored_size(weight) == 2**40
    assert graph.values(weight)[-1, -8:].tolist() == [0] * 8


@pytest.mark.parametrize("offset", [0, 1, 4095, 4096, 70000])
def test_any_offset_can_be_mapped(tmp_path: Path, offset: int) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model_with({"location": "w.bin", "offset": str(offset), "length": "64"}))
    (tmp_path / "w.bin").write_bytes(bytes(offset) + WEIGHT.tobytes() + b"more")
    np.testing.assert_array_equal(weights_of(graph.load(path))[0], WEIGHT)


def linked_inside(place: Place) -> None:
    (place.folder / "link.bin").symlink_to("inside.bin")
    place.write(location="link.bin")


REFUSED = (
    *("parent", "nested", "absolute", "link", "folder link", "device", "link to device", "fifo", "hard link"),
    *("missing", "short", "negative offset", "huge length"),
)
COMMANDS = {
    "check": ("check",),
    "inspect": ("inspect", "--tensors"),
    "quantize": ("quantize", "-o", "out/q.onnx", "--scheme", "w8"),
}


@pytest.mark.parametrize("style", ["absolute", "relative"])
@pytest.mark.parametrize("attack", [*REFUSED, "link inside"])
def test_path_attacks_through_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], attack: str, style: str
) -> None:
    """14 cases and 2 styles of path: 13 are refused by every command that reads a model, a link inside is read."""
    place = Place(tmp_path)
    (ATTACKS[attack][0] if attack in ATTACKS else linked_inside)(place)
    (place.folder / "out").mkdir()
    monkeypatch.chdir(place.folder)
    path = str(place.folder / "model.onnx") if style == "absolute" else "model.onnx"
    for name, (command, *options) in COMMANDS.items():
        code = main([command, path, *options])
        told = capfd.readouterr().err
        assert code == (3 if attack in REFUSED else 0), (name, told)
        assert ("'w0'" in told) == (attack in REFUSED)
        assert "Traceback" not in told
    written = sorted(entry.name for entry in (place.folder / "out").iterdir())
    assert written == ([] if attack in REFUSED else ["q.onnx"])
    assert place.secret.read_bytes() == SECRET
