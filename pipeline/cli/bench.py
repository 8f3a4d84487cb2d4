"""``qpipe bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from . import output
from .options import JSON, data_options, feed_from


@click.command("bench", short_help="Time models against each other.")
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@data_options
@click.option("--rounds", type=click.IntRange(min=3), default=9, show_default=True, help="Rounds; medians are given.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of each operator; all cores otherwise.")
@JSON
def command(models: tuple[Path, ...], rounds: int, threads: int | None, as_json: bool, **given: Any) -> None:
    """Time MODELS, all in turn in one process on the same data; the first one is the measure.

    A ratio is the median over rounds of (time of the first) / (time of this one), so that a machine whose speed
    drifts does not decide.
    """
    from ..data import inputs_of
    from ..graph import load
    from ..timing import race

    feed = feed_from(given, inputs_of(load(models[0]).graph))
    results = race(list(models), list(feed), rounds=rounds, threads=threads)
    rows = [[r.path, f"{r.milliseconds:.2f}", f"{r.spread:.0%}", f"{r.ratio:.2f}x"] for r in results]
    data = [{"model": str(r.path), "ms": r.milliseconds, "spread": r.spread, "speed": r.ratio} for r in results]
    output.emit({"results": data}, as_json, output.table(["model", "ms per batch", "spread", "speed"], rows))
