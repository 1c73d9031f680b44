"""Recipes and ladders by name: the shipped ones under configs/recipes, files, and types of ggml's as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from diffharness.errors import SettingsError
from diffharness.forensics.recipes.schema import Recipe, bits_of, ggml_types
from diffharness.settings import configs_dir, load_yaml

_FALL_BACK = ("Q8_0", "F16")  # for rows that a type's blocks do not fit; llama.cpp, too, takes a larger type then


class Ladder(BaseModel):
    """Recipes in the order in which they are compared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    about: str
    recipes: list[str]


class Ladders(BaseModel):
    """configs/ladders.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ladders: dict[str, Ladder]


def recipe_names() -> list[str]:
    """Names under configs/recipes."""
    return sorted(path.stem for path in (configs_dir() / "recipes").glob("*.yaml"))


def load_recipe(name_or_file: str) -> Recipe:
    """A recipe by its shipped name, from a YAML file, or by a type of ggml's, which is then meant for every matrix.

    SettingsError if there is none of that name, or the file is not a recipe.
    """
    path = Path(name_or_file)
    if path.suffix in (".yaml", ".yml"):
        return load_yaml(Recipe, path, name=path.stem)
    if "/" not in name_or_file and (shipped := configs_dir() / "recipes" / f"{name_or_file}.yaml").is_file():
        return load_yaml(Recipe, shipped, name=shipped.stem)
    if name_or_file.upper() in ggml_types():
        return of_type(name_or_file.upper())
    raise SettingsError(
        f"no recipe is called {name_or_file!r}",
        hint=f"known: {', '.join(recipe_names())}; any ggml type, such as Q4_0; or give a .yaml file",
    )


def of_type(type_name: str) -> Recipe:
    """Every matrix in one type; those that its blocks do not fit in Q8_0, or F16 where that does not fit either."""
    otherwise = tuple(other for other in _FALL_BACK if bits_of(other) > bits_of(type_name))
    return Recipe(name=type_name, about=f"every matrix {type_name}", tensors={"*": type_name}, otherwise=otherwise)


def load_ladder(name: str) -> list[Recipe]:
    """The recipes of a shipped ladder, in order."""
    ladders = load_yaml(Ladders, configs_dir() / "ladders.yaml").ladders
    if name not in ladders:
        raise SettingsError(f"no ladder is called {name!r}", hint=f"known: {', '.join(ladders)}")
    return [load_recipe(recipe) for recipe in ladders[name].recipes]


def unique_names(recipes: Sequence[Recipe]) -> list[Recipe]:
    """`recipes`; SettingsError if two of them go by one name, so that a table would not tell them apart."""
    names = [recipe.name for recipe in recipes]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SettingsError(
            f"two recipes are called {twice!r}", hint="give one of them another `name:`, or leave one out"
        )
    return list(recipes)
