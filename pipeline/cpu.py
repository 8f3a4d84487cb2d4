"""What this CPU can do, as far as integer kernels care."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """Return the model name of the CPU, or what the platform says about it."""
    names = re.findall(r"^(?:model name|Model)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return str(names[0]).strip() if names else platform.processor() or platform.machine()


@functools.cache
def cpu_features() -> dict[str, bool]:
    """Return which instruction sets that matter to integer kernels this CPU has.

    Keys: ``avx2``, ``avx512f``, ``avx512_vnni``, ``avx_vnni``, ``amx_int8`` (x86), ``dotprod``, ``i8mm`` (Arm).
    On systems without /proc/cpuinfo all are False: nothing is claimed that was not seen.
    """
    flags = set(re.findall(r"\w+", " ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", _cpuinfo(), re.MULTILINE))))
    names = {"dotprod": "asimddp"}
    features = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "dotprod", "i8mm")
    return {feature: names.get(feature, feature) in flags for feature in features}


def has_vnni() -> bool:
    """Whether the CPU multiplies int8 into 32-bit sums without saturating in between (x86 VNNI or AMX)."""
    features = cpu_features()
    return features["avx512_vnni"] or features["avx_vnni"] or features["amx_int8"]


def int8_saturates() -> bool:
    """Whether fused int8 kernels clip intermediate sums here: x86 without VNNI. Seven-bit weights avoid it."""
    return platform.machine().lower() in ("x86_64", "amd64", "i686") and not has_vnni()


def _cpuinfo() -> str:
    return _CPUINFO.read_text(encoding="utf-8", errors="replace") if _CPUINFO.is_file() else ""
