"""``qpipe plugin build|path|info``."""

from __future__ import annotations

import click

from . import output
from .options import JSON


@click.group("plugin", short_help="Build or find the ONNX Runtime plugin.")
def command() -> None:
    """Build or find the plugin: custom operators for ONNX Runtime. Nothing needs it in order to run a model."""


@command.command("build")
@click.option("--cuda", type=click.Choice(["auto", "on", "off"]), default="auto", show_default=True)
@click.option("--jobs", type=click.IntRange(min=1), help="Compilers that run at once.")
@JSON
def build(cuda: str, jobs: int | None, as_json: bool) -> None:
    """Compile the library with CMake."""
    from ... import plugins

    path = plugins.build(cuda=cuda.upper(), jobs=jobs)
    output.emit({"path": str(path)}, as_json, [f"built {path}"])


@command.command("path")
@JSON
def path(as_json: bool) -> None:
    """Print where the library lies."""
    from ... import plugins

    found = plugins.library_path()
    output.emit({"path": str(found)}, as_json, [str(found)])


@command.command("info")
@JSON
def info(as_json: bool) -> None:
    """Load the library and print what it holds."""
    from ... import plugins

    facts = plugins.info()
    output.emit(facts, as_json, [f"{key:<12}{value}" for key, value in facts.items()])
