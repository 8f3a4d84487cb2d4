"""The command line: parse, call one stage, print. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import click

from ...calibrate.errors import QpipeError
from . import output

COMMANDS = {
    "export": "Export a PyTorch model to ONNX and check that it computes the same.",
    "calibrate": "Run the model on real data once and store what its activations were.",
    "quantize": "Quantize a model; say what was done and what was left alone, and why.",
    "validate": "Compare a quantized model with its float model on real data.",
    "inspect": "Show what is in a model or in a statistics file.",
    "check": "Check a model: valid ONNX, safe files, sound scales and zero points.",
    "explain": "Explain a model, a node, a scheme, a method, a target, a format or a value.",
    "doctor": "Show what this machine and this installation can do.",
    "demo": "Run the whole job on a reference model and print a comparison.",
    "run": "Run all steps that a recipe file names.",
    "bench": "Time two models against each other in the same process.",
    "plugin": "Build or find the ONNX Runtime plugin.",
}
"""Command -> the line that ``qpipe --help`` prints, so that it needs to import none of them."""

INTERRUPTED, TERMINATED, BUG = 130, 143, 70

_OBJECTS = 50_000
"""New objects after which garbage is looked for."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, treated as the first Ctrl-C."""

    exit_code = TERMINATED


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the names in the order of the usual work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import and return a command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f".{cmd_name.replace('-', '_')}", __name__)
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="qpipe", prog_name="qpipe")
def cli() -> None:
    """Quantize ONNX models: right by default, fast, explained, proven."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 ok, 1 a result is below a threshold, 2 usage, 3 bad or unsafe model, 4 bad data, 5 environment, 6 cannot write,
    70 a bug in qpipe, 130 Ctrl-C, 143 SIGTERM.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    stdout = sys.stdout
    if arguments is None:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        cli.main(args=given, prog_name="qpipe", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show(file=sys.stderr)
        return 2
    except QpipeError as error:
        output.fail(error, as_json="--json" in given)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as stop:
        cause = stop.__cause__ or stop  # click wraps an interruption
        output.note(str(cause) or "stopped")
        return int(getattr(cause, "exit_code", INTERRUPTED))
    except BrokenPipeError:
        return _reader_gone()
    except SystemExit:
        if sys.stdout is not stdout:  # click swaps it and leaves when the reader of a pipe is gone
            return _reader_gone()
        raise
    except Exception as error:  # noqa: BLE001 - the last line of defence: a bug must not look like a result
        return output.bug(error)
    return 0


def _reader_gone() -> int:
    """End quietly: whoever read our output has seen enough (``| head``)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # so that the interpreter's last flush finds somewhere to go
    return 0


def entry() -> None:
    """Console script."""
    # What a command imports stays to its end: looking for garbage in it every few hundred objects finds none.
    gc.set_threshold(_OBJECTS, *gc.get_threshold()[1:])
    code = main()
    gc.freeze()  # and so does looking once more at the very end
    sys.exit(code)


def _terminate(_signal: int, _frame: FrameType | None) -> Any:
    raise Terminated
