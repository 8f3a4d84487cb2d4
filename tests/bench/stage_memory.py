"""Peak memory of every command on a model of float weights in external data, beside the size of the model.

    python tests/bench/stage_memory.py [--gib 2] [--type float32|float16] [--rows NAME ...] [--dir FOLDER] [--json]

Each row is one `qpipe` command in a process of its own; "export" is of a float32 PyTorch module as large, which its
factory holds before qpipe begins, "quantize layers" is GPTQ layer by layer. ``peak`` is what the kernel says the
process had resident at most (``VmHWM``); pages of mapped files count there, though the kernel may take them back at any
time. ``own`` is the largest memory of its own (``RssAnon``, looked at fifty times a second): what cannot be taken back.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from large_model import HIDDEN, build

_QCAL = ("--calib", "{gram}")
_GPTQ = ("quantize", "{model}", "--scheme", "w4", "--algorithm", "gptq", "-o", "{out}")
ROWS = {
    "export": ("export", "{module}:build", "-o", "{out}"),
    "check": ("check", "{model}"),
    "inspect": ("inspect", "{model}", "--tensors", "--json"),
    "dry run": ("quantize", "{model}", "--scheme", "w4", "--dry-run"),
    "quantize w8": ("quantize", "{model}", "--scheme", "w8", "-o", "{out}"),
    "quantize w4": ("quantize", "{model}", "--scheme", "w4", "-o", "{out}"),
    "quantize dynamic": ("quantize", "{model}", "--scheme", "w8a8-dynamic", "-o", "{dynamic}"),
    "calibrate": ("calibrate", "{model}", "--data", "{data}", "-o", "{channels}"),
    "calibrate gram": ("calibrate", "{model}", "--data", "{data}", "--detail", "gram", "-o", "{gram}"),
    "quantize static": ("quantize", "{model}", "--calib", "{channels}", "-o", "{static}"),
    "quantize outlier": ("quantize", "{model}", "--scheme", "w8a8-outlier", "--calib", "{channels}", "-o", "{out}"),
    "quantize gptq": (*_GPTQ, *_QCAL),
    "quantize layers": (*_GPTQ, "--data", "{data}"),
    "quantize equalized": ("quantize", "{model}", "--equalize", "smoothquant", "--data", "{data}", "-o", "{out}"),
    "check result": ("check", "{static}"),
    "validate": ("validate", "{model}", "{static}", "--data", "{data}", "--rounds", "1"),
    "validate layers": ("validate", "{model}", "{static}", "--data", "{data}", "--rounds", "0", "--per-layer"),
    "layer by layer": ("validate", "{model}", "{static}", "--data", "{data}", "--layer-by-layer"),
}


_MODULE = """
import torch

def build():
    layers = [torch.nn.Linear({hidden}, {hidden}, bias=False) for _ in range({count})]
    return torch.nn.Sequential(*layers).eval(), {{"x": torch.ones(2, {hidden})}}
"""


_CHILD = """
import sys
from qpipe.pipeline.cli import main
from qpipe.pipeline.memory import peak_memory
code = main(sys.argv[1:])
print(peak_memory(), file=sys.stderr)
sys.exit(code)
"""


def measure(command: list[str]) -> dict:
    """Run a command; return its exit code, peak and own memory [bytes], seconds and the end of what it said."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen([sys.executable, "-c", _CHILD, *command], stdout=subprocess.DEVNULL, stderr=told)
        own = 0
        while process.poll() is None:
            own = max(own, anonymous(process.pid))
            time.sleep(0.02)
        told.seek(0)
        *said, peak = told.read().splitlines() or ["0"]
    return {
        "code": process.returncode,
        "peak_bytes": int(peak) if peak.isdigit() else 0,
        "own_bytes": own,
        "seconds": time.perf_counter() - start,
        "tail": " ".join(said)[-300:],
    }


def anonymous(pid: int) -> int:
    """Bytes of a process that belong to no file; 0 where the kernel does not say."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def run(folder: Path, options: argparse.Namespace) -> list[dict]:
    """Build the model and run the rows."""
    model = build(folder, options.gib, "one", options.type)
    x = np.random.default_rng(0).normal(size=(2, 16, HIDDEN)).astype(options.type)
    np.savez(folder / "data.npz", h0=x)
    count = round(options.gib * 2**30 / (4 * HIDDEN * HIDDEN))
    (folder / "module.py").write_text(_MODULE.format(hidden=HIDDEN, count=count))
    results = folder / "results"
    results.mkdir()
    places = {name: results / f"{name}.onnx" for name in ("out", "static", "dynamic")}
    places |= {name: folder / f"{name}.qcal" for name in ("channels", "gram")}
    places |= {"model": model, "data": folder / "data.npz", "module": folder / "module.py"}
    size = sum(path.stat().st_size for path in folder.iterdir() if path.name.startswith(model.name[:5]))
    rows = []
    for name in options.rows or ROWS:
        command = [part.format(**places) for part in ROWS[name]]
        if "-o" in command:
            command.append("--force")
        rows.append({"row": name, "model_bytes": size, **measure(command)})
        print(line(rows[-1]), file=sys.stderr)
        for path in results.glob("out.*"):
            path.unlink()
    return rows


def line(row: dict) -> str:
    """A row as text."""
    gib = [row[key] / 2**30 for key in ("peak_bytes", "own_bytes")]
    failed = "" if row["code"] == 0 else f"  exit code {row['code']}: {row['tail']}"
    return f"{row['row']:18}{gib[0]:10.3f}{gib[1]:10.3f}{row['seconds']:8.1f}{failed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the model (default: 2)")
    parser.add_argument("--type", choices=["float32", "float16"], default="float32")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), help="only these; later rows need earlier ones")
    parser.add_argument("--dir", type=Path, help="where everything is built (default: the temporary folder)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qpipe-stages-", dir=options.dir) as name:
        rows = run(Path(name), options)
    if options.json:
        print(json.dumps({"gib": options.gib, "type": options.type, "rows": rows}))
        return
    print(f"model of {rows[0]['model_bytes'] / 2**30:.2f} GiB, {options.type}")
    print("\n".join([f"{'command':18}{'peak GiB':>10}{'own GiB':>10}{'time s':>8}", *map(line, rows)]))


if __name__ == "__main__":
    main()
