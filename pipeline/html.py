"""The HTML form of a report: one file that opens offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from .report import Report, printable, show, total_kind

TEMPLATES = Path(__file__).parent / "templates"


def to_html(report: Report) -> str:
    """Return the report as one self-contained HTML page: no network, no library, every name escaped."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["show"] = show
    environment.filters["printable"] = printable
    return environment.get_template("report.html.j2").render(
        report=report,
        totals=[(_words(name), show(value, total_kind(name))) for name, value in report.totals.items()],
        charts=[(chart, Markup(chart.svg)) for chart in report.charts],
        environment_text=_pretty(report.environment),
        recipe_text=_pretty(report.recipe),
        sort_key=_sort_key,
    )


def _words(name: str) -> str:
    """Return a total's name as a label: ``worst_sqnr_db`` -> ``worst SQNR (dB)``."""
    units = {"_bytes": "", "_share": "", "_db": " (dB)", "_ms": " (ms)"}
    for ending, unit in units.items():
        if name.endswith(ending):
            name = name.removesuffix(ending) + unit
    return printable(name.replace("_", " ").replace("sqnr", "SQNR"))


def _pretty(data: Any) -> str:
    return json.dumps(data, indent=2, sort_keys=True, default=str) if data else ""


def _sort_key(value: Any) -> str:
    """Return what the page sorts a cell by: the number itself, not what is shown of it."""
    return repr(float(value)) if isinstance(value, (int, float)) else printable(str(value or ""))
