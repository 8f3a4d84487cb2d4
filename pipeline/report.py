"""Reports: tables of results that print, serialize and become one HTML file.

A report is data. Every table says once what its columns mean and how their numbers read; the text, JSON and HTML
forms are all derived from that. Names come from models that others made: they are shown with control characters
spelled out, never interpreted as markup.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..calibrate.errors import ThresholdError

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table as RichTable

SCHEMA_VERSION = 1

KINDS = ("text", "number", "decibel", "share", "ratio", "bytes", "milliseconds", "count")
"""How a column's values read: ``share`` is 0..1 and shown in percent, ``ratio`` is shown as ``1.50x``."""

MISSING = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column of a table.

    Attributes:
        key: Key of the value in every row, and in JSON.
        title: Heading.
        kind: One of `KINDS`.
        about: What the number means, for the HTML report.
    """

    key: str
    title: str
    kind: str = "text"
    about: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of one kind.

    Attributes:
        name: Key in JSON.
        title: Heading.
        columns: In order.
        rows: Values by column key; keys that are missing are shown as "-".
        about: What the table shows.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Mapping[str, Any], ...]
    about: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A picture for the HTML report.

    Attributes:
        title: What it shows, e.g. the name of a tensor.
        svg: A complete ``<svg>`` element; whoever draws it escapes the text in it.
        caption: A sentence below it.
    """

    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A threshold and whether it was kept.

    Attributes:
        name: Name of the option, e.g. ``"min_cosine"``.
        subject: What was measured, e.g. ``"output logits, exact"``.
        value: Measured value.
        limit: The threshold.
        passed: Whether the value keeps it; a NaN keeps none.
    """

    name: str
    subject: str
    value: float
    limit: float
    passed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Results of one command.

    Attributes:
        kind: Command, e.g. ``"validate"``.
        title: Heading.
        totals: The few figures that matter most, by name.
        tables: Details.
        charts: Pictures, HTML only.
        verdicts: Thresholds that were asked for.
        notes: Sentences that a reader of the numbers must know.
        environment: Versions and CPU, see `environment.brief`.
        recipe: What made the model.
    """

    kind: str
    title: str
    totals: Mapping[str, Any] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    notes: tuple[str, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether all thresholds were kept."""
        return all(verdict.passed for verdict in self.verdicts)

    def table(self, name: str) -> Table:
        """Return the table called ``name``.

        Raises:
            KeyError: There is none.
        """
        for table in self.tables:
            if table.name == name:
                return table
        raise KeyError(name)

    def require(self) -> None:
        """Raise unless all thresholds were kept.

        Raises:
            ThresholdError: At least one was not.
        """
        failed = [v for v in self.verdicts if not v.passed]
        if failed:
            first = failed[0]
            raise ThresholdError(
                f"{len(failed)} of {len(self.verdicts)} thresholds not kept",
                where=first.subject,
                found=f"{first.name.partition('_')[2]} {first.value:.6g}",
                expected=f"{first.name} {first.limit:g}",
                do="look at the layers that hurt: --per-layer; or leave them in float: --exclude PATTERN",
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as strict JSON data; infinities and NaN become ``"inf"``, ``"-inf"``, ``"nan"``."""
        data = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "title": self.title,
            "passed": self.passed,
            "totals": self.totals,
            "tables": {table.name: list(table.rows) for table in self.tables},
            "verdicts": [
                {"name": v.name, "subject": v.subject, "value": v.value, "limit": v.limit, "passed": v.passed}
                for v in self.verdicts
            ],
            "notes": list(self.notes),
            "environment": self.environment,
            "recipe": self.recipe,
        }
        plain: dict[str, Any] = _strict(data)
        return plain


def printable(text: str) -> str:
    """Return ``text`` with every control character spelled out, so that no terminal or page obeys it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def show(value: Any, kind: str = "text") -> str:
    """Return a value of a column as people read it."""
    if value is None:
        return MISSING
    if kind == "text" or not isinstance(value, (int, float)):
        return printable(str(value))
    if not math.isfinite(value):
        return {"nan": "NaN", "inf": "∞", "-inf": "-∞"}[str(float(value))]
    return _NUMBERS[kind](value)


def text_tables(report: Report) -> Group:
    """Return the report for a terminal, as something that rich prints."""
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [Text(printable(report.title), style="bold")]
    for table in report.tables:
        if table.rows:
            parts += [Text(), _rich_table(table)]
    lines = [f"{printable(name)}: {show(value, total_kind(name))}" for name, value in report.totals.items()]
    if lines:
        parts += [Text(), Text("   ".join(lines))]
    for note in report.notes:
        parts.append(Text(f"note: {printable(note)}", style="yellow"))
    for v in report.verdicts:
        mark, style = ("PASS", "green") if v.passed else ("FAIL", "bold red")
        parts.append(Text(f"{mark}  {v.name} {v.limit:g}: {v.value:.6g}  ({printable(v.subject)})", style=style))
    return Group(*parts)


def to_text(report: Report, width: int = 120) -> str:
    """Return the report as plain text, at most ``width`` characters wide."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    console.print(text_tables(report))
    written: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in written.splitlines())


def to_json(report: Report) -> str:
    """Return the report as JSON text."""
    return json.dumps(report.to_dict(), indent=1, allow_nan=False)


def _rich_table(table: Table) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(
        title=Text(table.title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for column in table.columns:
        right = column.kind != "text"
        drawn.add_column(Text(column.title), justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in table.rows:
        drawn.add_row(*(Text(show(row.get(column.key), column.kind)) for column in table.columns))
    return drawn


def total_kind(name: str) -> str:
    """Return how a total reads, by the ending of its name: ``size_bytes``, ``latency_ratio``, ``sqnr_db``, ..."""
    endings = {"_bytes": "bytes", "_ratio": "ratio", "_db": "decibel", "_ms": "milliseconds", "_share": "share"}
    return next((kind for ending, kind in endings.items() if name.endswith(ending)), "number")


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def _number(value: float) -> str:
    if isinstance(value, int) or value == 0:
        return f"{value:.0f}"
    return f"{value:.6f}" if 1e-3 <= abs(value) < 10 else f"{value:.4g}"


def _share(value: float) -> str:
    small = 0 < value < 5e-4
    return f"{100 * value:.2g} %" if small else f"{100 * value:.2f} %"


_NUMBERS = {
    "number": _number,
    "count": lambda value: f"{value:,.0f}".replace(",", " "),
    "decibel": lambda value: f"{value:.1f}",
    "share": _share,
    "ratio": lambda value: f"{value:.2f}x",
    "milliseconds": lambda value: f"{value:.3g}",
    "bytes": _bytes,
}


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_strict(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
