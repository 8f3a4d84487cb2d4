"""The onnx package's own models of one operator: none crashes, none comes out invalid, none does without a reason.

A few of each operator that takes part, and of those with bodies, sequences or strings; `tests/bench/node_models.py`
takes all 1,884.
"""

from __future__ import annotations

from pathlib import Path

import node_models
import pytest

WEIGHTED = ("conv", "convtranspose", "gemm", "matmul", "einsum", "lstm", "gru", "rnn")
ON_CODES = ("add", "mul", "averagepool", "globalaveragepool", "leakyrelu", "sigmoid", "relu", "clip")
MOVES = (
    "reshape",
    "transpose",
    "concat",
    "split",
    "slice",
    "pad",
    "resize",
    "maxpool",
    "gather",
    "where",
    "expand",
    "tile",
)
AWKWARD = ("if_", "loop", "scan", "identity", "sequence_map", "optionalgetelement", "constant", "cast", "string_split")
MOST = 3
"""Cases of one operator, spread over all that there are."""


def chosen(module: str) -> list:
    cases = node_models.cases_of(module)
    return list(cases[:: max(len(cases) // MOST, 1)][:MOST])


@pytest.mark.parametrize("module", [*WEIGHTED, *ON_CODES, *MOVES, *AWKWARD])
def test_every_model_is_quantized_kept_or_refused(module: str, tmp_path: Path) -> None:
    assert chosen(module)
    for case in chosen(module):
        for constant in (False, True):
            assert node_models.outcome(case, tmp_path, "w8a8", constant=constant).kind


@pytest.mark.parametrize("scheme", ["w8", "w8a8-dynamic"])
@pytest.mark.parametrize("module", WEIGHTED)
def test_what_multiplies_by_a_constant_is_quantized(module: str, scheme: str, tmp_path: Path) -> None:
    found = [node_models.outcome(case, tmp_path, scheme, constant=True) for case in chosen(module)]
    dynamic = scheme == "w8a8-dynamic"
    if module in ("conv", "convtranspose", "gru", "rnn") and dynamic:
        assert all("gains nothing" in outcome.detail for outcome in found if outcome.kind == "kept")
    elif module != "einsum":
        assert "quantized" in {outcome.kind for outcome in found}
    assert all(outcome.kind == "quantized" or outcome.detail for outcome in found)


def test_a_scan_of_opset_8_is_refused_and_not_turned_into_another_one(tmp_path: Path) -> None:
    case = next(case for case in node_models.cases_of("scan") if case.model.opset_import[0].version == 8)
    found = node_models.outcome(case, tmp_path, "w8", constant=False)
    assert found.kind == "refused 3"
    assert "cannot be brought from opset 8" in found.detail
