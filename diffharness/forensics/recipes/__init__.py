"""Recipes: which tensor is stored how, simulated on a checkpoint's values and, of ggml's types, written as GGUF."""

from diffharness.forensics.recipes.blocks import round_to_blocks
from diffharness.forensics.recipes.plan import Plan, Planned, make_plan
from diffharness.forensics.recipes.schema import IntN, Recipe, Scheme, bits_of, name_of
from diffharness.forensics.recipes.simulated import Simulated
from diffharness.forensics.recipes.write import write_recipe

__all__ = [
    "IntN",
    "Plan",
    "Planned",
    "Recipe",
    "Scheme",
    "Simulated",
    "bits_of",
    "make_plan",
    "name_of",
    "round_to_blocks",
    "write_recipe",
]
