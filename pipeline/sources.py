"""SOURCE argument of `qpipe export`: what the user names becomes an `Exportable`.

``file.py:factory`` and ``package.module:factory`` are code by design. A factory takes no arguments and returns a module
(then `--input` describes its inputs), ``(module, example)``, or an object with ``build()``, ``example()`` and
``dynamic_shapes()``. A ``.pt2`` file is an ExportedProgram; a folder is a local Hugging Face model, read from
safetensors, never with remote code.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..calibrate.errors import EnvironmentError_, ModelError, UsageError
from .exportable import Exportable

if TYPE_CHECKING:
    import torch

_GRAMMAR = "file.py:factory | package.module:factory | model.pt2 | local Hugging Face folder"


def resolve_source(source: str, inputs: Sequence[str] = (), dynamic: Sequence[str] = ()) -> Exportable:
    """Find and build what ``source`` names.

    Args:
        source: See the top of this module.
        inputs: ``name=1,3,224,224`` or ``name=1,16:int64``, one per input; example values are made of them.
        dynamic: ``name:0=batch,1=sequence``, one per input.

    Raises:
        UsageError: The source or an option cannot be understood, or names nothing.
        EnvironmentError_: PyTorch or transformers is missing.
    """
    _require("torch", "torch")
    axes = dict(_parse_dynamic(text) for text in dynamic)
    path = Path(source)
    if source.endswith(".pt2"):
        return _from_program(path, axes)
    if path.is_dir():
        return _from_folder(path, axes)
    place, separator, factory = source.rpartition(":")
    if not separator:
        found = "a file without :factory" if path.is_file() else "no such file or folder"
        raise UsageError("the source cannot be understood", where=source, found=found, expected=_GRAMMAR)
    return _from_factory(_load_module(place), factory, inputs, axes)


def _require(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise EnvironmentError_(
            f"export needs the package {package}", found="not installed", do=f"pip install 'qpipe[{extra}]'"
        )


def _load_module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise UsageError(
                "no such module", where=place, found=str(error), expected=_GRAMMAR, do="install it, or give a file.py"
            ) from error
    path = Path(place)
    if not path.is_file():
        raise UsageError("no such file", where=place, expected=_GRAMMAR)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _from_factory(module: ModuleType, name: str, inputs: Sequence[str], axes: dict[str, dict[int, str]]) -> Exportable:
    import torch

    factory = getattr(module, name, None)
    if factory is None:
        functions = sorted(n for n, f in vars(module).items() if callable(f) and not n.startswith("_"))
        raise UsageError(f"there is no {name!r} in it", where=module.__name__, expected=", ".join(functions[:8]))
    made = factory() if callable(factory) and not isinstance(factory, torch.nn.Module) else factory
    example: Any = None
    if isinstance(made, tuple) and len(made) == 2:
        made, example = made
    elif hasattr(module, "example") and not inputs:
        example = module.example()
        axes = axes or (module.dynamic_shapes() if hasattr(module, "dynamic_shapes") else {})
    if not isinstance(made, torch.nn.Module):
        raise UsageError(
            "the factory gave no module", where=name, found=type(made).__name__, expected="torch.nn.Module"
        )
    example = _named(made, dict(_parse_input(text) for text in inputs) if inputs else example)
    return Exportable(module=made, example=example, dynamic=axes, outputs=tuple(getattr(module, "OUTPUTS", ())))


def _named(module: torch.nn.Module, example: Any) -> Mapping[str, torch.Tensor]:
    """Return example inputs by the names of the module's parameters."""
    if example is None:
        parameters = ", ".join(inspect.signature(module.forward).parameters)
        raise UsageError(
            "the factory gives no example inputs",
            found=f"forward({parameters})",
            expected="a factory that returns (module, example), or one --input per parameter",
            do="qpipe export SOURCE -o model.onnx --input x=1,3,224,224",
        )
    if isinstance(example, Mapping):
        return example
    values = example if isinstance(example, (tuple, list)) else (example,)
    return dict(zip(inspect.signature(module.forward).parameters, values, strict=False))


def _from_program(path: Path, axes: dict[str, dict[int, str]]) -> Exportable:
    import torch

    if not path.is_file():
        raise UsageError("no such file", where=str(path), expected="an ExportedProgram saved by torch.export.save")
    try:
        program = torch.export.load(path)
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            "this is no ExportedProgram", where=str(path), found=reason, do="use torch.export.save"
        ) from error
    arguments, keywords = program.example_inputs
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    values = [*arguments, *keywords.values()]
    return Exportable(module=program, example=dict(zip(names, values, strict=False)), dynamic=axes)


def _from_folder(folder: Path, axes: dict[str, dict[int, str]]) -> Exportable:
    from .huggingface import load_folder

    config = folder / "config.json"
    if not config.is_file():
        raise UsageError("no Hugging Face model lies there", where=str(folder), expected="config.json", do=_GRAMMAR)
    _require("transformers", "models")
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError("config.json is no JSON", where=str(config), found=str(error)) from error
    if "auto_map" in settings:
        raise ModelError(
            "this model brings its own code, which qpipe never runs",
            where=str(config),
            found="auto_map",
            do="write a factory that builds the module, and export file.py:factory",
        )
    return load_folder(folder, axes)


def _parse_input(text: str) -> tuple[str, torch.Tensor]:
    import torch

    match = re.fullmatch(r"([\w.]+)=([\d,]+)(?::(\w+))?", text)
    dtype = getattr(torch, match.group(3) or "float32", None) if match else None
    if match is None or not isinstance(dtype, torch.dtype):
        raise UsageError("--input cannot be understood", found=text, expected="name=1,3,224,224 or name=1,16:int64")
    shape = [int(d) for d in match.group(2).split(",") if d]
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return match.group(1), torch.randn(shape, generator=generator).to(dtype)
    return match.group(1), torch.ones(shape, dtype=dtype)


def _parse_dynamic(text: str) -> tuple[str, dict[int, str]]:
    name, separator, axes = text.partition(":")
    match = [re.fullmatch(r"(\d+)=(\w+)", part) for part in axes.split(",")]
    if not separator or not all(match):
        raise UsageError("--dynamic cannot be understood", found=text, expected="input_ids:0=batch,1=sequence")
    return name, {int(m.group(1)): m.group(2) for m in match if m is not None}
