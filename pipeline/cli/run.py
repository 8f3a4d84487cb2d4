"""``qpipe run``: a job file, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ...calibrate.errors import RecipeError
from . import output

STEPS = ("export", "calibrate", "quantize", "validate", "check")


@click.command("run", short_help="Run the steps that a job file names.")
@click.argument("job", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Print the command lines and stop.")
def command(job: Path, dry_run: bool) -> None:
    r"""Run JOB, a YAML file with a list of steps; each is a command with its arguments under their own names.

    \b
    steps:
      - calibrate: {model: m.onnx, data: load.py, output: m.qcal}
      - quantize: {model: m.onnx, calib: m.qcal, output: q.onnx, scheme: w8a8}
      - validate: {float_model: m.onnx, quantized_model: q.onnx, data: load.py, min_cosine: 0.99}
    """
    from ..recipe import load_recipe
    from . import cli

    steps = load_recipe(job).get("steps")
    if not isinstance(steps, list) or not steps:
        raise RecipeError("the job names no steps", where=str(job), expected="steps: [{calibrate: {...}}, ...]")
    lines = [_arguments(step, str(job)) for step in steps]
    for line in lines:
        output.note(f"qpipe {' '.join(line)}")
        if not dry_run:
            cli.main(args=line, prog_name="qpipe", standalone_mode=False)


def _arguments(step: Any, where: str) -> list[str]:
    """Return the command line of one step, in the order that the command itself declares.

    Raises:
        RecipeError: The step names no command, or a parameter that the command does not have.
    """
    from . import cli

    if not isinstance(step, dict) or len(step) != 1 or next(iter(step)) not in STEPS:
        raise RecipeError("a step is no command", where=where, found=str(step), expected=" | ".join(STEPS))
    name, given = next(iter(step.items()))
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    line, known = [name], {_key(p): p for p in command.params}
    for key, value in (given or {}).items():
        parameter = known.get(str(key).replace("-", "_"))
        if parameter is None:
            raise RecipeError(
                f"{name} has no parameter {key!r}", where=where, expected=", ".join(sorted(known)), do="correct it"
            )
        line += _words(parameter, value)
    return line


def _key(parameter: click.Parameter) -> str:
    longest = max(parameter.opts, key=len)
    return longest.lstrip("-").replace("-", "_")


def _words(parameter: click.Parameter, value: Any) -> list[str]:
    if isinstance(parameter, click.Argument):
        return [str(v) for v in value] if isinstance(value, list) else [str(value)]
    flag = max(parameter.opts, key=len)
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return [flag] if value else []
    return [word for v in (value if isinstance(value, list) else [value]) for word in (flag, str(v))]
