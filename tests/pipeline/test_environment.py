"""Facts about the installation, found by trying, and the advice drawn from them."""

from __future__ import annotations

import importlib.metadata
import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import onnx
import pytest
from qpipe.calibrate.errors import EnvironmentError_
from qpipe.pipeline import ceilings, environment, runtime, session


@pytest.fixture(scope="module")
def found() -> environment.Environment:
    return environment.examine()


def test_facts_are_json_data(found: environment.Environment) -> None:
    data = json.loads(json.dumps(found.to_dict()))
    assert data["schema_version"] == 1
    assert {"system", "cpu", "packages", "runtime", "cuda", "plugin", "storage", "advice"} <= set(data)


def test_floors_come_from_the_own_metadata(found: environment.Environment) -> None:
    packages = found.facts["packages"]
    assert packages["onnx"]["version"] == onnx.__version__
    assert packages["onnx"]["floor"] == "1.21"
    assert packages["onnx"]["optional"] is False
    assert packages["torch"]["optional"] is True
    assert "pytest" not in packages


def test_the_cpu_provider_is_usable_and_unusable_ones_say_why(found: environment.Environment) -> None:
    providers = found.facts["runtime"]["providers"]
    assert providers["CPUExecutionProvider"] == {"usable": True, "why_not": None}
    for fact in providers.values():
        assert fact["usable"] is (fact["why_not"] is None)


def test_ceilings_separate_what_loads_from_what_does_not() -> None:
    measured = ceilings.measure()
    opset = measured["max_opset"]
    assert measured["max_qdq_opset"] <= opset <= onnx.defs.onnx_opset_version()
    assert ceilings.opens(ceilings._model(ceilings._relu(), opset=opset))
    if opset < onnx.defs.onnx_opset_version():
        assert not ceilings.opens(ceilings._model(ceilings._relu(), opset=opset + 1))
    ir = measured["max_ir_version"]
    assert not ceilings.opens(ceilings._model(ceilings._relu(), opset=7, ir_version=ir + 1))
    assert measured["types"]["INT8"]
    assert measured["types"]["UINT8"]


def test_a_provider_that_is_not_built_in_is_named() -> None:
    assert "without" in str(session.provider_error("NoSuchExecutionProvider"))


def _facts(found: environment.Environment, **changes: Any) -> dict[str, Any]:
    facts = json.loads(json.dumps(found.facts))
    facts["cpu"]["int8_saturates"] = False
    for section, change in changes.items():
        facts[section].update(change)
    return facts


def _advice(facts: dict[str, Any]) -> list[environment.Advice]:
    return list(environment.advise(facts))


def test_two_distributions_of_onnxruntime_are_an_error_with_the_exact_lines(found: environment.Environment) -> None:
    both = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
    advice = _advice(_facts(found, runtime={"distributions": both}))
    conflict = next(a for a in advice if "overwrite" in a.what)
    assert conflict.level == "error"
    assert conflict.do == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"


def test_both_distributions_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(environment.metadata, "version", version)
    assert environment.runtime_facts()["distributions"] == versions


def test_missing_onnxruntime_is_a_fact_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise EnvironmentError_("qpipe needs ONNX Runtime for this", found="No module named 'onnxruntime'")

    monkeypatch.setattr(runtime, "load_onnxruntime", missing)
    facts = environment.runtime_facts()
    assert facts["version"] is None
    assert "No module" in facts["error"]
    advice = list(environment._advise_runtime(facts, {"driver": None, "libraries": {}}))
    assert advice[-1].level == "error"
    assert "pip install 'qpipe[cpu]'" in advice[-1].do


def test_old_and_missing_packages(found: environment.Environment) -> None:
    packages = {
        "onnx": {"version": "1.16.0", "floor": "1.21", "optional": False, "ok": False},
        "rich": {"version": None, "floor": "13.7", "optional": False, "ok": False},
    }
    advice = _advice(_facts(found, packages=packages))
    assert {(a.level, a.do) for a in advice if "qpipe needs" in a.what} == {
        ("warning", "pip install --upgrade 'onnx>=1.21'"),
        ("error", "pip install --upgrade 'rich>=13.7'"),
    }


@pytest.mark.parametrize(
    ("version", "floor", "ok"), [("1.9.0", "1.21", False), ("1.21", "1.21", True), ("2.10.0+cpu", "2.9.1", True)]
)
def test_versions_compare_as_numbers(version: str, floor: str, ok: bool) -> None:
    assert (environment._number(version) >= environment._number(floor)) is ok


def test_driver_without_usable_cuda_names_the_missing_libraries(found: environment.Environment) -> None:
    cuda = {"driver": "NVRM version: 580", "libraries": {"cudart": "/usr/lib/libcudart.so", "cudnn": None}}
    providers = {"CUDAExecutionProvider": {"usable": False, "why_not": "?"}}
    advice = _advice(_facts(found, cuda=cuda, runtime={"providers": providers}))
    warning = next(a for a in advice if "NVIDIA" in a.what)
    assert "cudnn" in warning.what
    assert "cudart" not in warning.what
    assert warning.do == "pip install 'onnxruntime-gpu[cuda,cudnn]'"


def test_cuda_libraries_are_found_where_pip_puts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "nvidia" / "cudnn" / "lib" / "libcudnn.so.9"
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(environment.sys, "path", [str(tmp_path)])
    assert environment.cuda_facts()["libraries"]["cudnn"] == str(library)


def test_saturating_cpu_broken_plugin_and_full_disk_are_said(found: environment.Environment) -> None:
    place = {"path": "/data", "free_bytes": 10 * 2**20, "writable": True}
    closed = {"path": "/closed", "free_bytes": 2**40, "writable": False}
    facts = _facts(found, storage={"folder": place, "temporary": closed})
    facts["cpu"]["int8_saturates"] = True
    facts["plugin"] = {"built": True, "loads": False, "error": "needs C API 99"}
    levels = {a.what.split(":")[0].split(",")[0]: a.level for a in _advice(facts)}
    assert levels["this CPU has no VNNI"] == "note"
    assert levels["the operator library does not load"] == "error"
    assert levels["10 MiB are free in /data"] == "warning"
    assert levels["/closed is not writable"] == "error"


def test_storage_facts_see_a_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: usage(3, 2, 1))
    monkeypatch.setattr(environment.os, "access", lambda path, mode: False)
    facts = environment.storage_facts(tmp_path)["folder"]
    assert facts == {"path": str(tmp_path), "free_bytes": 1, "writable": False}


def test_brief_is_what_a_report_needs() -> None:
    facts = environment.brief()
    assert facts["packages"]["onnx"] == onnx.__version__
    assert "vnni" in facts["cpu"]
