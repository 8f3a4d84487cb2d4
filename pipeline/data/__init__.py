"""Sample data from files and scripts as batches: dictionaries from input name to array."""

from __future__ import annotations

__all__: list[str] = []
