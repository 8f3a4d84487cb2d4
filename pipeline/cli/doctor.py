"""``qpipe doctor``."""

from __future__ import annotations

from typing import Any

import click

from . import output
from .options import JSON


@click.command("doctor", short_help="Show what this installation can do.")
@JSON
def command(as_json: bool) -> None:
    """Show versions, providers that really open, CPU instructions, opset ceilings, plugin, disk; and what to mend."""
    from ..environment import examine

    found = examine()
    lines: list[str] = []
    for section, facts in found.facts.items():
        lines += [section, *_facts(facts, "  ")]
    lines += [""] if found.advice else ["", "nothing to mend"]
    for advice in found.advice:
        lines.append(f"{advice.level}: {advice.what}" + (f"\n  do: {advice.do}" if advice.do else ""))
    output.emit(found.to_dict(), as_json, lines)


def _facts(facts: Any, indent: str) -> list[str]:
    lines = []
    for key, value in facts.items():
        if isinstance(value, dict):
            inner = ", ".join(f"{k} {_text(v)}" for k, v in value.items() if not isinstance(v, dict))
            nested = {k: v for k, v in value.items() if isinstance(v, dict)}
            lines += [f"{indent}{key:<22}{inner}".rstrip(), *_facts(nested, indent + "  ")]
        else:
            lines.append(f"{indent}{key:<22}{_text(value)}")
    return lines


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(v) for v in value) or "none"
    return "-" if value is None else str(value)
