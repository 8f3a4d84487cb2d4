"""Reports as files."""

from __future__ import annotations

from pathlib import Path

from ..calibrate.errors import UsageError
from .files import replace_file
from .html import to_html
from .report import Report, to_json, to_text

_FORMS = {".json": to_json, ".html": to_html, ".htm": to_html, ".txt": to_text}


def save_report(report: Report, path: Path, *, force: bool = False) -> None:
    """Write the report; ``.json``, ``.html`` and ``.txt`` choose the form.

    Raises:
        UsageError: Another suffix.
        WriteError: The file exists (without ``force``), or cannot be written.
    """
    form = _FORMS.get(path.suffix.lower())
    if form is None:
        raise UsageError("a report cannot have this suffix", where=str(path), expected=", ".join(_FORMS))
    content = form(report)
    with replace_file(path, force=force) as temporary:
        temporary.write_text(content, encoding="utf-8")
