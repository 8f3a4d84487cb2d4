"""All of the onnx package's models of one operator through calibrate, quantize and check: how many came out how.

    python tests/bench/node_models.py [--schemes w8a8 w8 w8a8-dynamic] [--part I/N] [--json]

Each model is taken as it is shipped and with its weights as constants. A row per scheme says how many were quantized,
kept with a reason per node, or refused with an exit code; a fault (a crash, an invalid or far-off result) is listed and
gives exit code 1.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import node_models


def sweep(cases: list, scheme: str, *, constant: bool) -> tuple[Counter, dict[str, str]]:
    """Return how many cases came out how, and the faults by case."""
    counts, faults = Counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            try:
                counts[node_models.outcome(case, Path(folder), scheme, constant=constant).kind] += 1
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what is looked for
                faults[case.name] = f"{type(error).__name__}: {error}"[:300]
    return counts, faults


def main() -> int:
    """Sweep as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", nargs="+", default=["w8a8", "w8", "w8a8-dynamic"])
    parser.add_argument("--part", default="0/1", help="Every N-th case, from the I-th on.")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    start, step = map(int, given.part.split("/"))
    cases = node_models.all_cases()[start::step]
    rows = []
    for scheme in given.schemes:
        for constant in (False, True):
            counts, faults = sweep(cases, scheme, constant=constant)
            rows.append({"scheme": scheme, "constants": constant, **counts, "faults": faults})
            if not given.json:
                told = ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))
                print(f"{scheme:14} {'constants' if constant else 'as shipped':11} {told}, faults {len(faults)}")
                for name, text in faults.items():
                    print(f"    {name}: {text}")
    if given.json:
        print(json.dumps({"cases": len(cases), "rows": rows}))
    return int(any(row["faults"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
