"""How much memory this process took at most."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_memory() -> int:
    """Return the largest resident size of this process since its program began, in bytes.

    Linux counts it anew for every program (``VmHWM``). ``ru_maxrss`` goes on from what the process that started this
    one took, which a small program started by a large one would report as its own; it is for other systems.
    """
    if _STATUS.exists():
        lines = _STATUS.read_text(encoding="utf-8", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
