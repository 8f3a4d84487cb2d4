"""The bars that the main job has to clear, on the reference models, in exact semantics."""

from __future__ import annotations

from pathlib import Path

import pytest
from qpipe.models.comparison import Row, Subject, compare, qpipe

pytestmark = [pytest.mark.slow, pytest.mark.torch]

PLAIN = {"scheme": "w8a8", "equalize": "none", "weights": {"algorithm": "rtn"}}
"""int8 without any algorithm that makes up for its error."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bars")


def rows(name: str, folder: Path, *schemes: str) -> dict[str, Row]:
    pytest.importorskip("torch")
    configs = {scheme: qpipe(**PLAIN) if scheme == "plain" else qpipe(scheme=scheme) for scheme in schemes}
    found = compare(Subject.export(name, folder), configs)
    assert [row.error for row in found if row.error] == []
    return {row.config: row for row in found}


def test_digits_cnn_loses_at_most_three_tenths_of_a_point(folder: Path) -> None:
    found = rows("digits_cnn", folder, "w8a8")
    assert found["float"].metrics["accuracy"] >= 0.985
    assert found["w8a8"].metrics["accuracy"] >= found["float"].metrics["accuracy"] - 0.003
    assert found["w8a8"].deployed["accuracy"] >= found["float"].metrics["accuracy"] - 0.003


def test_tiny_gpt_stays_within_one_percent(folder: Path) -> None:
    found = rows("tiny_gpt", folder, "w8a8", "w8a8-outlier")
    limit = 1.01 * found["float"].metrics["perplexity"]
    assert found["w8a8"].metrics["perplexity"] <= limit
    assert found["w8a8"].deployed["perplexity"] <= limit
    assert found["w8a8-outlier"].metrics["perplexity"] <= 1.005 * found["float"].metrics["perplexity"]


def test_minilm_keeps_its_neighbours(folder: Path) -> None:
    found = rows("minilm", folder, "w8a8", "w8a8-outlier")
    assert found["w8a8"].metrics["cosine_mean"] >= 0.9985
    assert found["w8a8"].metrics["recall_at_10"] >= 0.955
    assert abs(found["w8a8"].metrics["cosine_mean"] - found["w8a8"].deployed["cosine_mean"]) < 5e-4, "no saturation"
    assert found["w8a8-outlier"].metrics["cosine_mean"] >= 0.9994
    assert found["w8a8-outlier"].metrics["recall_at_10"] >= 0.97


def test_planted_outliers_ruin_a_shared_scale_and_nothing_that_knows_of_them(folder: Path) -> None:
    gpt = rows("tiny_gpt+outliers", folder, "plain", "w8a8", "w8a8-outlier")
    limit = gpt["float"].metrics["perplexity"]
    assert gpt["w8a8-outlier"].metrics["perplexity"] <= 1.005 * limit
    assert gpt["w8a8"].metrics["perplexity"] <= 1.02 * limit
    assert gpt["plain"].metrics["perplexity"] > 1.02 * limit
    encoder = rows("minilm+outliers", folder, "plain", "w8a8", "w8a8-outlier")
    assert encoder["w8a8-outlier"].metrics["cosine_mean"] >= 0.999
    assert encoder["w8a8"].metrics["cosine_mean"] >= 0.997
    assert encoder["plain"].metrics["cosine_mean"] < 0.97


@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_halves_what_four_bits_cost_tiny_gpt(folder: Path, symmetric: bool) -> None:
    """By the divergence of outputs: perplexity of held-out text moves by chance as well, by about half a percent."""
    pytest.importorskip("torch")
    ways = {"rtn": ("rtn", None), "hqq": ("hqq", None), "awq": ("awq_clip", "awq"), "gptq": ("gptq", None)}
    shared = {"accuracy_level": 1, "symmetric": symmetric}
    configs = {
        name: qpipe(scheme="w4", equalize=equalize, weights={"algorithm": algorithm, **shared})
        for name, (algorithm, equalize) in ways.items()
    }
    found = {row.config: row for row in compare(Subject.export("tiny_gpt", folder), configs)}
    noise = {name: 10 ** (-found[name].sqnr_db[0] / 10) for name in ways}
    assert noise["gptq"] < noise["awq"] < noise["hqq"] < noise["rtn"]
    assert noise["gptq"] <= 0.5 * noise["rtn"]


def test_four_bits_by_default_keep_minilms_neighbours(folder: Path) -> None:
    found = rows("minilm", folder, "w4")
    assert found["w4"].metrics["cosine_mean"] >= 0.99
    assert found["w4"].metrics["recall_at_10"] >= 0.89
