"""The architecture, held by tests: floors, packages, budgets, documentation, quick start-up."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

import pytest
import qpipe

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    p
    for top in ("calibrate", "plugins", "pipeline", "models")
    for p in (ROOT / top).rglob("*.py")
    if "build" not in p.relative_to(ROOT).parts
)
STANDARD = frozenset(sys.stdlib_module_names) | {"__future__"}

REGISTRIES = ("rules", "passes", "targets", "forms")
FLOORS = {
    "calibrate": 0,
    "plugins": 1,
    "pipeline": 2,
    "stages": 4,
    "workflow": 4,
    "cli": 5,
    **dict.fromkeys(REGISTRIES, 3),
}


def floor_of(module: tuple[str, ...]) -> int:
    """Floor of a module, given as its path inside the package."""
    if module[0] == "pipeline" and len(module) > 1 and module[1] in FLOORS:
        return FLOORS[module[1]]
    return FLOORS.get(module[0], 6)


def imports_of(path: Path) -> Iterator[tuple[str, ...]]:
    """Modules inside the package that a file imports, as paths."""
    here = path.relative_to(ROOT).with_suffix("").parts
    base = here[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            package = base[: len(base) - node.level + 1]
            target = (*package, *(node.module.split(".") if node.module else ()))
            yield target if node.module else (*target, node.names[0].name)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "qpipe":
            yield tuple(node.module.split(".")[1:])


def outside_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found - STANDARD


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_from_its_floor_and_below(path: Path) -> None:
    here = path.relative_to(ROOT).with_suffix("").parts
    if here[0] == "models" or here[:3] == ("pipeline", "cli", "demo"):
        pytest.skip("stands beside the floors")
    for target in imports_of(path):
        assert floor_of(target) <= floor_of(here), f"{here} imports {target}"
        if here[0] == "pipeline" and here[1] in REGISTRIES and target[0] == "pipeline" and len(target) > 1:
            assert target[1] == here[1] or target[1] not in REGISTRIES, f"{here} imports the sibling {target}"


def test_the_map_names_every_file() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = {word.removesuffix(".py").rpartition("/")[2] for word in re.findall(r"`([\w/.]+)`", text)}
    one_per_item = {*REGISTRIES, "cli", "formats", "ranges", "weights", "equalize", "stats", "cpu", "models"}
    for path in SOURCES:
        listed = path.stem != "__init__" and not one_per_item & set(path.relative_to(ROOT).parts[:-1])
        assert not listed or path.stem in named, f"CONTRIBUTING.md does not say where {path.name} belongs"


def test_floor_zero_needs_numpy_and_ml_dtypes_only() -> None:
    for path in SOURCES:
        if path.relative_to(ROOT).parts[0] == "calibrate":
            assert outside_imports(path) <= {"numpy", "ml_dtypes"}, path


def test_the_packages_list_names_every_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {p.parent.relative_to(ROOT) for p in SOURCES if p.name == "__init__.py"}
    assert set(listed) == {"qpipe", *(".".join(("qpipe", *f.parts)) for f in folders)}


def functions() -> Iterator[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, node


def length(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    """Lines of a definition without its docstring."""
    assert node.end_lineno is not None
    doc = node.body[0] if ast.get_docstring(node) is not None else None
    without = (doc.end_lineno or 0) - doc.lineno + 1 if doc is not None else 0
    return node.end_lineno - node.lineno + 1 - without


def test_files_are_short() -> None:
    lines = {p: len(p.read_text().splitlines()) for p in SOURCES}
    assert median(lines.values()) <= 150
    assert {p: n for p, n in lines.items() if n > 400} == {}


def test_functions_are_short() -> None:
    lengths = {f"{p.relative_to(ROOT)}:{f.name}": length(f) for p, f in functions()}
    assert quantiles(lengths.values(), n=10)[-1] <= 35
    long = {name: n for name, n in lengths.items() if n > 60}
    assert len(long) < 0.03 * len(lengths), long


def test_functions_take_few_parameters() -> None:
    many = {
        f"{p.relative_to(ROOT)}:{f.name}": n
        for p, f in functions()
        if (n := len([a for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs) if a.arg != "self"])) > 6
    }
    assert many == {}


def test_classes_are_short() -> None:
    found = {
        f"{p.relative_to(ROOT)}:{node.name}": length(node)
        for p in SOURCES
        for node in ast.walk(ast.parse(p.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    assert {name: n for name, n in found.items() if n > 150} == {}


def public(node: ast.AST, path: Path) -> bool:
    return not getattr(node, "name", "_").startswith("_") and not path.stem.startswith("_")


def is_setter(node: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Attribute) and d.attr == "setter" for d in node.decorator_list)


def test_public_functions_are_typed_and_documented() -> None:
    problems = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        scopes = [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and public(n, path))]
        for scope in scopes:
            for node in scope.body:
                if not isinstance(node, ast.FunctionDef) or not public(node, path) or is_setter(node):
                    continue
                name = f"{path.relative_to(ROOT)}:{node.name}"
                if not ast.get_docstring(node):
                    problems.append(f"{name} has no docstring")
                arguments = [a for a in (*node.args.args, *node.args.kwonlyargs) if a.arg not in ("self", "cls")]
                if node.returns is None or any(a.annotation is None for a in arguments):
                    problems.append(f"{name} is not fully typed")
    assert problems == []


def test_every_module_has_a_docstring() -> None:
    assert [p for p in SOURCES if not ast.get_docstring(ast.parse(p.read_text()))] == []


HEAVY = ("torch", "onnx", "onnxruntime", "numpy", "rich", "pydantic", "polygraphy", "yaml", "ml_dtypes", "transformers")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["quantize", "--help"], ["explain", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from qpipe.pipeline.cli import main; "
        f"code = main({arguments!r}); "
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "HEAVY [] 0"


def test_public_names_exist() -> None:
    for name in qpipe.__all__:
        assert getattr(qpipe, name) is not None
    assert set(qpipe.__all__) <= set(dir(qpipe))


def test_importing_the_package_is_cheap() -> None:
    code = f"import sys, qpipe; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("word", ["/work/", "/tmp/", "/root/", "helper-"])
def test_the_repository_does_not_speak_of_the_machine_it_was_written_on(word: str) -> None:
    texts = [*SOURCES, *ROOT.glob("*.md"), *ROOT.glob("plugins/**/*.md"), ROOT / "Makefile", ROOT / "pyproject.toml"]
    assert [p for p in texts if p.exists() and word in p.read_text(errors="ignore")] == []
