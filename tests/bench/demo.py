"""The table that ``qpipe demo`` prints, for the README.

python tests/bench/demo.py [--write README.md]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance"))
from capabilities import write_between_markers

START, END = "<!-- demo: start -->", "<!-- demo: end -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo, and print or write its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the markers of FILE")
    options = parser.parse_args(arguments)
    command = [sys.executable, "-m", "qpipe", "demo"]
    text = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.rstrip()
    if options.write:
        write_between_markers(options.write, f"```text\n{text}\n```", (START, END))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
