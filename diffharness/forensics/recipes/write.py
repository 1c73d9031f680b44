"""A recipe of ggml's types as a GGUF file: the very blocks that the simulation rounds to, written as they are made."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from diffharness.errors import BadInputError
from diffharness.forensics.control import Quantize
from diffharness.forensics.recipes.plan import Plan
from diffharness.forensics.recipes.schema import PLAIN, name_of
from diffharness.forensics.recipes.simulated import Simulated
from diffharness.weights.gguf_values import encode_value
from diffharness.weights.gguf_write import RawTensor, write_tensors
from diffharness.weights.source import WeightSource

RECIPE_KEY = "diffharness.recipe"
_QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION: the layout of the blocks


def write_recipe(
    path: str | Path, checkpoint: WeightSource, plan: Plan, quantize: Quantize, metadata: Mapping[str, Any]
) -> None:
    """Write `checkpoint` under `plan`, with `metadata` beside its hyperparameters (`convert.gguf_metadata`).

    Some 32 MiB of a tensor are in memory at a time. Raises BadInputError where the recipe has schemes that are not
    ggml's, OutputError where the file cannot be written.
    """
    only = plan.simulated_only
    if only:
        raise BadInputError(
            f"recipe {plan.recipe.name}: expected only ggml types to write a GGUF with, found "
            f"{name_of(plan.tensors[only[0]].scheme)} for {only[0]}" + (f" and {len(only) - 1} more" * (len(only) > 1)),
            hint="no GGUF holds such integers; take a recipe of ggml types, such as Q4_0",
        )
    source = Simulated(checkpoint, plan, quantize)
    tensors = [
        RawTensor(name, info.shape, info.type, partial(source.encoded, name)) for name, info in source.tensors.items()
    ]
    values = {**checkpoint.metadata, **metadata, RECIPE_KEY: plan.recipe.name}
    if any(info.type not in PLAIN for info in source.tensors.values()):
        values["general.quantization_version"] = _QUANTIZATION_VERSION
    first = {"general.architecture": checkpoint.arch}  # llama.cpp's tools and people expect it first
    write_tensors(path, {key: encode_value(key, value) for key, value in {**first, **values}.items()}, tensors)
