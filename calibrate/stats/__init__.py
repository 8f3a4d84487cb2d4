"""Statistics of activations. ``a.merge(b)`` equals having seen both streams, in any order and any split.

Observers are fed arrays (``update``) and give a `Stats` record (``result``). Nothing here knows a graph.
"""

from __future__ import annotations
