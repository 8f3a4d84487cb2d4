"""Finding, loading and building the library, and what is said when it cannot be."""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import onnxruntime as ort
import pytest
from qpipe import plugins
from qpipe.calibrate.errors import PluginError

OTHER_MACHINE = 183 if platform.machine() == "x86_64" else 62  # ELF's e_machine: aarch64, x86-64


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No library in any of the places."""
    monkeypatch.delenv(plugins.PATH_VARIABLE, raising=False)
    monkeypatch.setattr(plugins, "_SOURCE", tmp_path / "package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def refused(error: PluginError, *, found: str, do: str = "qpipe plugin build") -> None:
    assert error.exit_code == 5
    assert found in (error.found or error.what)
    assert error.do is not None
    assert do in error.do


def test_a_missing_library_says_how_to_build_it(nowhere) -> None:
    assert not plugins.is_built()
    for use in (plugins.library_path, plugins.info, lambda: plugins.register(ort.SessionOptions())):
        with pytest.raises(PluginError) as caught:
            use()
        refused(caught.value, found="not built")


def test_a_variable_that_names_no_file(nowhere, monkeypatch) -> None:
    monkeypatch.setenv(plugins.PATH_VARIABLE, str(nowhere / "gone.so"))
    assert not plugins.is_built()
    with pytest.raises(PluginError, match="names no file") as caught:
        plugins.library_path()
    assert caught.value.exit_code == 5


def test_the_places_in_order(nowhere, monkeypatch) -> None:
    places = [
        nowhere / "cache" / "qpipe" / f"plugin-{platform.machine()}" / plugins.NAME,
        nowhere / "build" / "plugins" / plugins.NAME,
        nowhere / "package" / plugins.NAME,
        nowhere / "named.so",
    ]
    for place in places[:3]:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
        assert plugins.library_path() == place
    places[3].touch()
    monkeypatch.setenv(plugins.PATH_VARIABLE, str(places[3]))
    assert plugins.library_path() == places[3]


def damaged(library: Path, kind: str) -> bytes:
    data = bytearray(library.read_bytes())
    if kind == "text":
        return b"version https://git-lfs.github.com/spec/v1\n"
    if kind == "cut":
        return bytes(data[: len(data) // 3])
    data[18:20] = OTHER_MACHINE.to_bytes(2, "little")
    return bytes(data)


@pytest.mark.parametrize("kind", ["text", "cut", "other machine"])
def test_a_library_that_does_not_load(plugin_library, kind, tmp_path, monkeypatch) -> None:
    bad = tmp_path / "bad.so"
    bad.write_bytes(damaged(plugin_library, kind))
    monkeypatch.setenv(plugins.PATH_VARIABLE, str(bad))
    assert plugins.is_built()
    for use in (plugins.info, lambda: plugins.register(ort.SessionOptions())):
        with pytest.raises(PluginError, match="does not load") as caught:
            use()
        refused(caught.value, found="")
        assert caught.value.where == str(bad)
        assert platform.machine() in caught.value.expected


def test_a_library_of_something_else(tmp_path, monkeypatch) -> None:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    other = tmp_path / "other.so"
    subprocess.run(["cc", "-shared", "-o", str(other), "-x", "c", "-"], input=b"int nothing;", check=True)
    monkeypatch.setenv(plugins.PATH_VARIABLE, str(other))
    with pytest.raises(PluginError, match="does not load") as caught:
        plugins.register(ort.SessionOptions())
    refused(caught.value, found="RegisterCustomOps")


def test_a_library_built_from_older_sources(tmp_path, monkeypatch) -> None:
    """It loads and lacks a function that this package calls: said at once, with the line that builds it anew."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    old = tmp_path / "old.so"
    source = "".join(f"void {name}(void) {{}}" for name in plugins.ENTRY_POINTS[:-1])
    subprocess.run(["cc", "-shared", "-o", str(old), "-x", "c", "-"], input=source.encode(), check=True)
    monkeypatch.setenv(plugins.PATH_VARIABLE, str(old))
    with pytest.raises(PluginError, match="does not load") as caught:
        plugins.info()
    refused(caught.value, found=plugins.ENTRY_POINTS[-1])


def test_an_old_onnxruntime_is_refused_before_it_fails_late(plugin_library, monkeypatch) -> None:
    monkeypatch.setattr(ort, "__version__", "1.17.3")
    with pytest.raises(PluginError, match="too old") as caught:
        plugins.register(ort.SessionOptions())
    refused(caught.value, found="1.17.3", do="pip install --upgrade onnxruntime")


def test_the_library_itself_refuses_an_old_onnxruntime(plugin_library) -> None:
    """GetApi returns null for a version that the runtime does not know: no crash, a status that says why."""
    create_type = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    get_type = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    version_type = ctypes.CFUNCTYPE(ctypes.c_void_p)
    version_text = ctypes.create_string_buffer(b"1.12.0")
    said: list[bytes] = []
    asked: list[int] = []

    def create(_code: int, text: bytes) -> int:
        said.append(text)
        return 1

    create_status = create_type(create)
    old_api = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))

    def get(version: int) -> int | None:
        asked.append(version)
        return ctypes.addressof(old_api) if version == 1 else None

    class Base(ctypes.Structure):
        _fields_ = (("get_api", get_type), ("get_version", version_type))

    base = Base(get_type(get), version_type(lambda: ctypes.addressof(version_text)))
    register = ctypes.CDLL(str(plugin_library)).RegisterCustomOps
    register.restype = ctypes.c_void_p
    register.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    assert register(None, ctypes.addressof(base)) == 1
    assert asked == [18, 1]
    assert said == [b"qpipe's operators need ONNX Runtime 1.18 or newer, this is 1.12.0"]


def test_info(plugin_library) -> None:
    facts = plugins.info()
    assert facts["path"] == str(plugin_library)
    assert facts["api_version"] == 18
    assert facts["lanes"][-1] == "scalar"
    assert set(facts) == {"path", "version", "api_version", "compiler", "cuda", "lanes"}


def test_nothing_but_its_entry_points_is_exported(plugin_library) -> None:
    if shutil.which("nm") is None:
        pytest.skip("needs nm")
    listing = subprocess.run(["nm", "-D", "--defined-only", plugin_library], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in listing.stdout.splitlines()}
    assert names == set(plugins.ENTRY_POINTS)


def test_headers_come_from_the_named_folder(nowhere, monkeypatch, tmp_path) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("ORT_INCLUDE_DIR", str(tmp_path))
    (tmp_path / "onnxruntime_c_api.h").touch()
    assert plugins.headers_path() == tmp_path


def test_building_without_headers_says_where_to_get_them(monkeypatch, tmp_path) -> None:
    if Path("/usr/include/onnxruntime/onnxruntime_c_api.h").exists():
        pytest.skip("this system has the headers installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ORT_INCLUDE_DIR", raising=False)
    with pytest.raises(PluginError, match="C headers") as caught:
        plugins.build(folder=tmp_path)
    refused(caught.value, found="", do="make plugin-headers")


def test_a_compiler_error_is_shown(monkeypatch, tmp_path) -> None:
    (tmp_path / "onnxruntime_c_api.h").write_text("#error these are not the headers\n")
    monkeypatch.setenv("ORT_INCLUDE_DIR", str(tmp_path))
    with pytest.raises(PluginError, match="does not build") as caught:
        plugins.build(cuda="OFF", folder=tmp_path)
    assert "these are not the headers" in caught.value.found or "Error" in caught.value.found
    assert not (tmp_path / plugins.NAME).exists()


def test_a_missing_tool_is_named(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PluginError, match="cmake is needed") as caught:
        plugins.build(folder=tmp_path)
    assert caught.value.exit_code == 5
