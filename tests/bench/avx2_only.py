"""Run a command as if this processor had AVX2 and nothing newer.

    python tests/bench/avx2_only.py COMMAND [ARGUMENT ...]

ONNX Runtime, numpy, the plugin and qpipe's own target choose their code by what the processor says it has. What they do
on AVX2 can so be tried and timed on a newer one: the instructions are those of AVX2, clock and caches are not.
Needs Linux on x86-64 with a C compiler (``$CC``, default ``cc``) and a processor that lets CPUID trap; exits with 5
where that is missing.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".c")
NEWER = re.compile(r" (avx512\w*|avx_vnni\w*|avx_ifma|avx_ne_convert|avx10\w*|amx_\w+)\b")


def environment(folder: Path) -> dict[str, str]:
    """Return the environment in which processes see AVX2 only; what does it is put into ``folder``."""
    compiler, library = os.environ.get("CC", "cc"), folder / "avx2_only.so"
    if (platform.system(), platform.machine()) != ("Linux", "x86_64") or shutil.which(compiler) is None:
        print(f"avx2_only: needs Linux on x86-64 and a C compiler ({compiler!r}; $CC names another)", file=sys.stderr)
        sys.exit(5)
    subprocess.run([compiler, "-O2", "-Wall", "-shared", "-fPIC", str(SOURCE), "-o", str(library)], check=True)
    cpuinfo = folder / "cpuinfo"
    cpuinfo.write_text(NEWER.sub("", Path("/proc/cpuinfo").read_text()))
    return {**os.environ, "LD_PRELOAD": str(library), "AVX2_ONLY_CPUINFO": str(cpuinfo)}


def main() -> None:
    """Run the command and exit as it does."""
    if len(sys.argv) < 2:
        print(__doc__)
        return
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(subprocess.run(sys.argv[1:], env=environment(Path(folder)), check=False).returncode)


if __name__ == "__main__":
    main()
