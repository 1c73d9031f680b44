"""Recipes as YAML: what is a recipe, what is not, and that the message says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffharness.errors import SettingsError
from diffharness.forensics.recipes import IntN, Recipe, bits_of, name_of
from diffharness.settings import load_yaml


def load(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return load_yaml(Recipe, path, name=path.stem)


def test_a_recipe_of_both_kinds_of_schemes(tmp_path: Path) -> None:
    recipe = load(
        tmp_path, 'tensors:\n  "*ffn_down*": q6_k\n  "*": {bits: 4, block: 32, asymmetric: true}\notherwise: F16\n'
    )
    assert recipe.name == "mine" and list(recipe.tensors) == ["*ffn_down*", "*"]
    assert recipe.tensors["*ffn_down*"] == "Q6_K"
    assert recipe.tensors["*"] == IntN(bits=4, block=32, asymmetric=True)
    assert recipe.otherwise == ("F16",)


def test_otherwise_may_be_a_list(tmp_path: Path) -> None:
    recipe = load(tmp_path, 'tensors: {"*": Q4_K}\notherwise: [Q8_0, {bits: 8, block: 16}]\n')
    assert recipe.otherwise == ("Q8_0", IntN(bits=8, block=16))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tensors: {}\n", "tensors"),
        ("about: nothing\n", "tensors"),
        ('tensors: {"*": Q4_X}\n', "no such type 'Q4_X'"),
        ('tensors: {"*": I32}\n', "no such type 'I32'"),
        ('tensors: {"*": 4}\n', "expected a ggml type such as Q4_K"),
        ('tensors: {"*": {bits: 1, block: 32}}\n', "greater than or equal to 2"),
        ('tensors: {"*": {bits: 9, block: 32}}\n', "less than or equal to 8"),
        ('tensors: {"*": {bits: 4.0, block: 32}}\n', "valid integer"),
        ('tensors: {"*": {bits: 4, block: 48}}\n', "16, 32, 64 or 128"),
        ('tensors: {"*": {bits: 4}}\n', "block"),
        ('tensors: {"*": {bits: 4, block: 32, symmetric: true}}\n', "symmetric"),
        ('tensors: {"*": {bits: 4, block: 32, asymmetric: maybe}}\n', "true or false"),
        ('tensors: {"*": Q4_0}\nscale: f16\n', "scale"),
        ("- Q4_0\n", "mapping"),
        ('tensors: {"*": [\n', "not YAML"),
    ],
)
def test_what_is_no_recipe(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SettingsError, match=r"mine\.yaml") as caught:
        load(tmp_path, text)
    assert says in str(caught.value)


def test_bits_include_scales() -> None:
    assert bits_of(IntN(bits=4, block=32)) == 4.5
    assert bits_of(IntN(bits=4, block=32, asymmetric=True)) == 5.0
    assert bits_of(IntN(bits=8, block=128)) == 8.125
    assert bits_of("Q8_0") == 8.5 and bits_of("Q4_K") == 4.5 and bits_of("BF16") == 16


def test_names() -> None:
    assert name_of("Q4_K") == "Q4_K"
    assert name_of(IntN(bits=4, block=64)) == "int4 block 64"
    assert name_of(IntN(bits=3, block=16, asymmetric=True)) == "int3 block 16 asymmetric"
