"""What ``qpipe explain MODEL [NODE]`` prints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...calibrate.errors import UsageError
from . import output

if TYPE_CHECKING:
    from ..fusion import Evidence, Fate
    from ..plan import Decision
    from ..stages.explain import Explanation

_SEVERAL = re.compile(r"'[^']*'|(?<=quantizer of )\S+")
_REPLACED = re.compile(r"_(quant|OutlierMatMul)$")
"""End of the name of an integer product that took the place of a float one."""


def print_model(file: Path, found: Explanation, given: dict[str, Any]) -> None:
    """Print what became of all nodes: the totals, and the nodes in groups unless each is asked for."""
    rows = _rows(found)
    if given["every_node"]:
        body = output.table(["node", "op", "stored as", "runs as", "why"], rows)
    else:
        body = output.table(["nodes", "op", "stored as", "runs as", "why", "first"], _grouped(rows))
    lines = [*_head(file, found), "", *body]
    if found.evidence.islands:
        lines += ["", "pairs that are carried out as they stand, around float operators:"]
        lines += output.table(["tensor", "read by"], [[i.tensor, ", ".join(i.readers)] for i in found.evidence.islands])
    output.emit(_data(file, found), given["as_json"], lines)


def print_node(file: Path, found: Explanation, node: str, given: dict[str, Any]) -> None:
    """Print what is known of one node.

    Raises:
        UsageError: There is no such node; the message names near ones.
    """
    decisions = [d for d in found.plan.decisions if d.site.node == node] if found.plan is not None else []
    fate = _fates(found).get(node)
    if fate is None and not decisions:
        raise _no_such_node(file, found, node)
    lines = [f"{node} ({fate.op if fate is not None else decisions[0].op})"]
    if decisions:
        rows = [[d.site.slot or "-", d.site.tensor, _stored(d), d.reason] for d in decisions]
        lines += output.table(["slot", "tensor", "stored as", "why"], rows)
    if fate is not None:
        lines += [f"runs as: {_runs(fate)}", *([f"why    : {fate.reason}"] if fate.reason else [])]
        lines += [f"by     : {found.evidence.source}"]
    data = _data(file, found)
    data["evidence"]["nodes"] = [entry for entry in data["evidence"]["nodes"] if _plain(entry["node"]) == node]
    if data["plan"] is not None:
        data["plan"]["decisions"] = [entry for entry in data["plan"]["decisions"] if entry["node"] == node]
    output.emit(data, given["as_json"], lines)


def _head(file: Path, found: Explanation) -> list[str]:
    from ..stages.tune import describe_passes

    evidence, counts = found.evidence, found.evidence.counts()
    kind = "quantized" if found.plan is None else "float; what quantizing it would give"
    lines = [f"{file}: {kind}, target {found.target}", f"by {evidence.source}"]
    if found.random:
        lines.append("scales are of random numbers here: they do not change what fuses (--calib takes real ones)")
    lines.append(
        f"{counts['integer']} integer kernels{_by_kernel(evidence, 'integer')}; "
        f"{counts['packed']} kernels on packed weights{_by_kernel(evidence, 'packed')}; "
        f"{counts['codes']} other nodes on codes; "
        f"{counts['merged']} merged into neighbours; {counts['island']} left between Q/DQ"
    )
    if evidence.pairs and evidence.measured:
        lines.append(
            f"{evidence.pairs} Q/DQ pairs: {evidence.fused} became part of kernels, {evidence.borders} turn codes back "
            f"into float behind one, {len(evidence.islands)} are islands"
        )
    return lines + [f"rewritten for {found.target}: {line}" for line in describe_passes(found.passes)]


def _by_kernel(evidence: Evidence, verdict: str) -> str:
    from collections import Counter

    kinds = Counter(fate.became for fate in evidence.fates if fate.verdict == verdict)
    return f" ({', '.join(f'{name} {n}' for name, n in kinds.most_common())})" if kinds else ""


def _rows(found: Explanation) -> list[list[str]]:
    """Return node, operator, what is stored, what it runs as, and why."""
    fates = _fates(found)
    if found.plan is None:
        return [[fate.node, fate.op, fate.codes, _runs(fate), fate.reason] for fate in fates.values()]
    rows = []
    for name, decision in found.plan.nodes().items():
        fate = fates.get(name)
        quantized = decision.spec is not None
        runs = _runs(fate) if fate is not None and (quantized or fate.verdict != "float") else ""
        why = (
            fate.reason
            if fate is not None and fate.verdict in ("island", "integer") and fate.reason
            else decision.reason
        )
        rows.append([name, decision.op, _stored(decision), runs, why])
    return rows


def _grouped(rows: list[list[str]]) -> Iterator[list[Any]]:
    """Yield rows that differ in names alone as one, with their number and the first name."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, *rest in rows:
        key = tuple(_SEVERAL.sub("...", text) for text in rest)
        groups.setdefault(key, []).append(name)
    for key, names in sorted(groups.items(), key=lambda item: not item[0][2]):  # what runs on codes comes first
        yield [len(names), *key, names[0]]


def _fates(found: Explanation) -> dict[str, Fate]:
    return {_plain(fate.node): fate for fate in found.evidence.fates}


def _plain(name: str) -> str:
    return _REPLACED.sub("", name)


def _runs(fate: Fate) -> str:
    from ..fusion import VERDICTS

    return f"{VERDICTS[fate.verdict]}{f': {fate.became}' if fate.became else ''}"


def _stored(decision: Decision) -> str:
    from ..plan import spec_text

    return spec_text(decision.spec) if decision.spec is not None else "float"


def _no_such_node(file: Path, found: Explanation, node: str) -> UsageError:
    from ..patterns import near_names

    known = sorted({*_fates(found), *({d.site.node for d in found.plan.decisions} if found.plan is not None else ())})
    return UsageError(
        "the model has no such node, or none that has to do with quantization",
        where=str(file),
        found=node,
        expected=", ".join(near_names(node, known)),
        do=f"qpipe explain {file} --all",
    )


def _data(file: Path, found: Explanation) -> dict[str, Any]:
    return {
        "model": str(file),
        "quantized": found.plan is None,
        "target": found.target,
        "random_scales": found.random,
        "passes": found.passes,
        "evidence": found.evidence.to_dict(),
        "plan": found.plan.to_dict() if found.plan is not None else None,
    }
