"""Recipes: what a user may ask, and what is said when it cannot be understood."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from qpipe.calibrate.errors import RecipeError
from qpipe.pipeline.recipe import load_recipe, make_recipe


def test_the_defaults_are_those_of_the_first_scheme() -> None:
    recipe = make_recipe()
    assert (recipe.scheme, recipe.target, recipe.method) == ("w8a8", "ort-cpu", "auto")
    assert recipe.weights is not None
    assert recipe.activations is not None
    assert (recipe.weights.format, recipe.weights.granularity, recipe.activations.dynamic) == ("int8", "channel", False)


def test_keys_go_over_those_of_the_scheme_one_by_one() -> None:
    recipe = make_recipe(weights={"reduce_bits": 1}, activations={"format": "int8"})
    assert recipe.weights is not None
    assert (recipe.weights.format, recipe.weights.reduce_bits) == ("int8", 1)
    assert recipe.activations is not None
    assert recipe.activations.format == "int8"
    assert make_recipe(scheme="float").weights is None


@pytest.mark.parametrize(
    ("keys", "near"),
    [
        ({"sheme": "w8a8"}, "scheme"),
        ({"weights": {"fromat": "int8"}}, "format"),
        ({"scheme": "w8a88"}, "w8a8"),
    ],
)
def test_unknown_words_are_refused_with_near_ones(keys: dict[str, Any], near: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(**keys)
    assert near in str(caught.value.expected)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("keys", [{"weights": {"reduce_bits": 9}}, {"weights": {"granularity": "row"}}, {"include": 3}])
def test_values_out_of_range_are_refused_with_their_place(keys: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="wrong value") as caught:
        make_recipe(**keys)
    assert str(caught.value.where).split(".")[0] == next(iter(keys))


def test_a_digest_tells_recipes_apart() -> None:
    digests = {make_recipe().digest(), make_recipe(method="mse").digest(), make_recipe(exclude=("a",)).digest()}
    assert len(digests) == 3
    assert make_recipe().digest() == make_recipe(scheme="w8a8").digest()


@pytest.mark.parametrize(
    ("text", "words"), [("a: [", "no YAML"), ("- 1\n- 2", "no mapping"), ("!!python/object:os.system x", "no YAML")]
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words) as caught:
        load_recipe(path)
    assert caught.value.where == str(path)


def test_a_missing_file() -> None:
    with pytest.raises(RecipeError, match="cannot read"):
        load_recipe(Path("no such recipe.yaml"))


def test_a_file_and_the_keys_amount_to_the_same(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("target: portable\nweights:\n  reduce_bits: 1\nexclude: ['op:Gemm']\n")
    assert make_recipe(**load_recipe(path)) == make_recipe(
        target="portable", weights={"reduce_bits": 1}, exclude=("op:Gemm",)
    )
