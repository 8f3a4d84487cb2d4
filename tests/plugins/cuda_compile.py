"""Compile the CUDA sources, read what ptxas says of each kernel; as a program, print the table of plugins/CUDA.md."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

PLUGINS = Path(__file__).resolve().parents[2] / "plugins"
KERNEL_SOURCES = (PLUGINS / "outlier_matmul" / "kernel.cu", PLUGINS / "range_stats" / "kernel.cu")
ARCHITECTURES = ("80", "90a")
EMPTY = 8
"""Registers of a kernel that is empty on an architecture (wgmma before sm_90a)."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What ptxas says of one kernel: registers, bytes of stack and of spills."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int

    @property
    def is_empty(self) -> bool:
        """Whether the kernel has no code on this architecture."""
        return self.registers <= EMPTY


def ort_headers() -> Path | None:
    """Return the folder of ONNX Runtime's C headers, fetching them where that is possible."""
    result = subprocess.run([PLUGINS / "fetch_headers.sh"], capture_output=True, text=True, check=False)
    return Path(result.stdout.strip()) if result.returncode == 0 else None


def compile_source(source: Path, architecture: str, folder: Path, headers: Path) -> tuple[list[Figures], str]:
    """Compile one file for one architecture and return its kernels' figures and everything the compiler printed.

    Raises:
        subprocess.CalledProcessError: It does not compile.
    """
    nice = [shutil.which("nice") or "nice", "-n", "10"]
    nvcc = ["nvcc", "-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Xptxas", "-v", f"-I{headers}"]
    target = ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    result = subprocess.run(
        [*nice, *nvcc, *target, "-c", str(source), "-o", str(folder / f"{source.parent.name}.{architecture}.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    text = result.stdout + result.stderr
    if result.returncode:
        raise RuntimeError(f"{source} does not compile for sm_{architecture}:\n{text}")
    return list(parse(text)), text


def parse(text: str) -> list[Figures]:
    """Read ptxas -v."""
    found = []
    for block in text.split("Compiling entry function '")[1:]:
        name, architecture = re.match(r"(\S+)' for 'sm_(\w+)'", block).groups()
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block
        ).groups()
        registers = re.search(r"Used (\d+) registers", block).group(1)
        figures = (int(value) for value in (registers, stack, stores, loads))
        found.append(
            Figures(
                kernel=demangle(name),
                architecture=architecture,
                **dict(zip(("registers", "stack", "spill_stores", "spill_loads"), figures, strict=True)),
            )
        )
    return found


def demangle(name: str) -> str:
    """Return a kernel's name without namespaces and parameters."""
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"\(.*\)$", "", text.removeprefix("void ")).replace("qpipe::", "")


def main() -> int:
    """Print the table."""
    headers = ort_headers()
    if headers is None or shutil.which("nvcc") is None:
        print("nvcc or ONNX Runtime's headers are missing", file=sys.stderr)
        return 5
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            figures
            for source in KERNEL_SOURCES
            for architecture in ARCHITECTURES
            for figures in compile_source(source, architecture, Path(folder), headers)[0]
        ]
    print("| kernel | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |")
    print("|---|" + "---|" * len(ARCHITECTURES))
    for kernel in sorted({row.kernel for row in rows if not row.is_empty}):
        cells = []
        for architecture in ARCHITECTURES:
            row = next(r for r in rows if (r.kernel, r.architecture) == (kernel, architecture))
            spills = f"{row.spill_stores} / {row.spill_loads}"
            cells.append("-" if row.is_empty else f"{row.registers} registers, spills {spills}")
        print(f"| `{kernel}` | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
