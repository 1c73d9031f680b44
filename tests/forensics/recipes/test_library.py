"""Shipped recipes and ladders, files, and ggml's types by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffharness.errors import SettingsError
from diffharness.forensics.recipes import IntN, make_plan
from diffharness.forensics.recipes.library import load_ladder, load_recipe, of_type, recipe_names, unique_names
from diffharness.forensics.recipes.schema import ggml_types
from diffharness.weights.source import TensorInfo
from tests.reference.random_source import LLAMA, QWEN3MOE, RandomSource


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_says_what_it_is(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.about and recipe.otherwise


@pytest.mark.parametrize("metadata", [LLAMA, QWEN3MOE], ids=lambda m: m["general.architecture"])
@pytest.mark.parametrize("ladder", ["gemma4", "ggml"])
def test_shipped_ladders_fit_every_architecture(ladder: str, metadata: dict[str, object]) -> None:
    for recipe in load_ladder(ladder):
        plan = make_plan(recipe, RandomSource(metadata).tensors)
        assert "token_embd.weight" in plan.fell_back, "rows of 24 fit no block"


def test_the_gemma4_ladder() -> None:
    int4, asymmetric, int8 = IntN(bits=4, block=32), IntN(bits=4, block=32, asymmetric=True), IntN(bits=8, block=32)
    names = ["token_embd", "blk.0.attn_q", "blk.0.ffn_gate", "blk.0.ffn_up", "blk.0.ffn_down"]
    tensors = {f"{name}.weight": TensorInfo(f"{name}.weight", (64, 64), "BF16", 0) for name in names}
    schemes = [[t.scheme for t in make_plan(r, tensors).tensors.values()] for r in load_ladder("gemma4")]
    assert schemes == [
        [int4, int4, int4, int4, int4],
        [int8, int4, int4, int4, int8],
        [int8, asymmetric, asymmetric, asymmetric, int8],
        [int8, int8, int4, int4, int8],
        [int8, int8, asymmetric, asymmetric, int8],
    ]


@pytest.mark.parametrize("name", ggml_types())
def test_every_type_is_a_recipe(name: str) -> None:
    tensors = {n: TensorInfo(n, (8, width), "F32", 0) for n, width in (("a.weight", 256), ("b.weight", 24))}
    plan = make_plan(load_recipe(name.lower()), tensors)
    assert plan.tensors["a.weight"].scheme == name
    assert plan.tensors["b.weight"].scheme == (name if name in ("F32", "F16", "BF16") else "F16")


def test_a_file_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('name: ours\ntensors: {"*": Q4_0}\n')
    assert load_recipe(str(path)).name == "ours"


@pytest.mark.parametrize("name", ["int5", "../recipes/int4", "Q9_0"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(SettingsError, match="no recipe is called") as caught:
        load_recipe(name)
    assert "gate-up-int4" in str(caught.value.hint)
    with pytest.raises(SettingsError, match="no ladder is called"):
        load_ladder(name)


def test_names_tell_recipes_apart() -> None:
    assert len(unique_names([of_type("Q4_0"), of_type("Q5_0")])) == 2
    with pytest.raises(SettingsError, match="two recipes are called 'Q4_0'"):
        unique_names([of_type("Q4_0"), of_type("Q4_0")])
