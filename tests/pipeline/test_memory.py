"""The peak that a run reports is its own."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
from qpipe.pipeline.memory import peak_memory

_CHILD = "from qpipe.pipeline.memory import peak_memory; print(peak_memory())"


def child_peak() -> int:
    return int(subprocess.run([sys.executable, "-c", _CHILD], capture_output=True, text=True, check=True).stdout)


def test_what_is_touched_counts() -> None:
    before = peak_memory()
    held = np.ones(before // 8 + 2**23)  # more than all that was resident at any time
    assert peak_memory() > held.nbytes


def test_a_process_does_not_report_what_its_parent_took() -> None:
    """A child that is started by a process of 256 MiB begins with that process's memory, until its program begins."""
    held = np.ones(2**25)
    assert peak_memory() > held.nbytes
    assert child_peak() < held.nbytes // 2
