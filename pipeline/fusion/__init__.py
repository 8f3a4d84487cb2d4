"""Will it fuse? What a runtime makes of the Q/DQ pairs and the integer operators of a file, with evidence.

`structure` says what the file asks for, one `Candidate` per node that reads or computes codes. An engine says what
became of each: `ort` runs ONNX Runtime's optimizer and looks nodes up in its result, `openvino` compiles the model and
reads its runtime model, `rules` goes by what a vendor documents and marks it so.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["integer", "packed", "codes", "merged", "island", "float"]

VERDICTS: dict[Verdict, str] = {
    "integer": "integer kernel",
    "packed": "kernel on packed weights",
    "codes": "on codes",
    "merged": "part of a neighbour",
    "island": "left between Q/DQ",
    "float": "float",
}
"""Verdict -> the words that are printed. An island is what costs time and gains none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What became of a node.

    Attributes:
        node: Its name in the file.
        op: Its operator type there.
        verdict: One of `VERDICTS`.
        codes: Types of the codes that it reads, e.g. ``uint8 x int8``.
        became: Operator type, or kernel, in the runtime; empty where the node is gone.
        reason: Why it is an island or in float, or what is wrong with the kernel; else empty.
    """

    node: str
    op: str
    verdict: Verdict
    codes: str = ""
    became: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Island:
    """A Q/DQ pair that the runtime carries out as it stands: it rounds values, costs time, and feeds no kernel.

    Attributes:
        tensor: What is quantized and dequantized.
        readers: Nodes that read the rounded values.
    """

    tensor: str
    readers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a runtime makes of a file.

    Attributes:
        source: Where the facts come from, e.g. a runtime and its version.
        measured: Whether a runtime was asked; False for rules.
        fates: One per candidate node, in the order of the file.
        pairs: Q/DQ pairs on activations in the file.
        borders: Pairs of which the dequantizing half is left, behind a kernel that gives codes.
        islands: Pairs that are left as a whole.
    """

    source: str
    measured: bool
    fates: tuple[Fate, ...]
    pairs: int = 0
    borders: int = 0
    islands: tuple[Island, ...] = ()

    @property
    def fused(self) -> int:
        """Pairs that became part of integer kernels as a whole."""
        return max(self.pairs - self.borders - len(self.islands), 0)

    def counts(self) -> Counter[Verdict]:
        """Return how many nodes got each verdict."""
        return Counter(fate.verdict for fate in self.fates)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON data."""
        return {
            "source": self.source,
            "measured": self.measured,
            "counts": dict(self.counts()),
            "pairs": {
                "total": self.pairs,
                "fused": self.fused,
                "borders": self.borders,
                "islands": [asdict(island) for island in self.islands],
            },
            "nodes": [asdict(fate) for fate in self.fates],
        }
