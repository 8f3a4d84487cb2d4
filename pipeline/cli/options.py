"""Options that several commands share: one spelling and one help text each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import click

from ...calibrate.errors import UsageError
from . import output

if TYPE_CHECKING:
    from ..data import Feed, InputInfo

MODEL = click.argument("model", type=click.Path(path_type=Path))
OUTPUT = click.option(
    "-o", "--output", "output_path", required=True, type=click.Path(path_type=Path), help="File to write."
)
FORCE = click.option("--force", is_flag=True, help="Replace existing files.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON object on stdout.")
QUIET = click.option("-q", "--quiet", is_flag=True, help="No progress, and no summary of a file written.")


class Bytes(click.ParamType):
    """A number of bytes: ``1048576``, ``1024KiB``, ``1.5GiB``, ``2GB``."""

    name = "bytes"
    _UNITS: ClassVar[dict[str, int]] = {
        "": 1,
        **{f"{unit}iB": 1024**i for i, unit in enumerate("KMGT", 1)},
        **{f"{unit}B": 1000**i for i, unit in enumerate("KMGT", 1)},
    }

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes that was written."""
        units = {unit.lower(): size for unit, size in self._UNITS.items()}
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(value).lower())
        size = int(float(found[1]) * units[found[2]]) if found and found[2] in units else 0
        if size < 1:
            self.fail(f"{value!r} is no number of bytes; write 8GiB, 500MB or 1048576", param, ctx)
        return size


MAX_MEMORY = click.option(
    "--max-memory",
    type=Bytes(),
    metavar="SIZE",
    help="Refuse a model that makes a tensor of more (8GiB, 500MB) while it runs; else, more than the machine has.",
)
DEVICE = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where the model runs."
)
CUSTOM_OPS = click.option(
    "--custom-op-library",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Library of custom operators that the model needs.",
)
UPGRADE = click.option("--upgrade", is_flag=True, help="Convert a model below opset 13 first.")
INLINE = click.option("--inline", is_flag=True, help="Replace calls of model-local functions by their bodies first.")
HARDLINKS = click.option("--allow-hardlinks", is_flag=True, help="Accept data files that have other names elsewhere.")

_DATA_HELP = (
    "script.py[:function] that yields dicts of arrays, .npz, .npy, a folder of them, polygraphy JSON, or a folder "
    "with test_data_set_*."
)


_DATA_OPTIONS = (
    click.option("--data", help=_DATA_HELP),
    click.option(
        "--random",
        "random_samples",
        type=click.IntRange(min=1),
        help="Use N random samples. Ranges of random data mean nothing; the result says so.",
    ),
    click.option("--samples", type=click.IntRange(min=1), help="Use at most N samples."),
    click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Samples per batch."),
    click.option("--map", "mapping", multiple=True, metavar="OLD=NEW", help="The data calls model input NEW OLD."),
    click.option("--batchify", is_flag=True, help="Add a batch axis of 1 where the data lacks it."),
    click.option("--seed", type=int, default=0, show_default=True, help="For --random, and what a script draws from."),
)


def data_options(function: Any) -> Any:
    """Add the options that say where data comes from; `feed_from` reads them."""
    for option in reversed(_DATA_OPTIONS):
        function = option(function)
    return function


def feed_from(given: Mapping[str, Any], inputs: Sequence[InputInfo]) -> Feed:
    """Build the feed that the data options describe.

    Args:
        given: Values of `data_options` by parameter name.
        inputs: What the model takes.

    Raises:
        UsageError: No data was given, or `--map` cannot be understood.
    """
    from ..data import Feed, FeedOptions, random_batches

    options = FeedOptions(
        samples=given["samples"],
        batch=given["batch"],
        mapping=dict(_pair(text) for text in given["mapping"]),
        batchify=given["batchify"],
        seed=given["seed"],
    )
    if given["data"]:
        return Feed(given["data"], inputs, options, warn=output.warn)
    if given["random_samples"]:
        output.warn("random data: the ranges that come of it mean nothing")
        return Feed(random_batches(inputs, given["random_samples"], given["seed"]), inputs, options, warn=output.warn)
    raise UsageError(
        "no data was given; qpipe never makes some up",
        expected="--data script.py (its load_data() yields dicts), --data samples.npz, or --data folder/",
        do="for a dry run of the mechanics only: --random 8",
    )


def _pair(text: str) -> tuple[str, str]:
    old, separator, new = text.partition("=")
    if not separator or not old or not new:
        raise UsageError("--map cannot be understood", found=text, expected="OLD=NEW")
    return old, new
