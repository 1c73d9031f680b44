"""What `diffharness recipe` measured: a checkpoint under quantization recipes, simulated in the reference.

The statistics are llama-perplexity's (`--kl-divergence`), each recipe against the checkpoint; `diffharness.kld` has
their definitions.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffharness.records.base import Number, Part, PlainDict, Record
from diffharness.records.grade import Estimate, KlStatistics
from diffharness.records.subject import CheckpointSubject, FixtureSubject


class Baseline(Part):
    """The checkpoint as it is."""

    ppl: Estimate
    bits_per_weight: Number
    n_bytes: int = Field(description="of the tensors that the model has, as stored")
    n_params: int


class Rung(Part):
    """One recipe on the checkpoint."""

    name: str
    about: str = ""
    bits_per_weight: Number = Field(description="of all tensors together, scales and what stays F32 included")
    n_bytes: int = Field(description="of all tensors")
    schemes: dict[str, int] = Field(description="tensors by scheme")
    fell_back: list[str] = Field(
        default=[], description="tensors stored otherwise: their rows are not whole blocks of their scheme"
    )
    can_be_written: bool = Field(description="every scheme is a type of ggml's")
    statistics: KlStatistics


class Written(Part):
    """The GGUF that was written, and what the reference makes of it when it is read back."""

    path: str
    recipe: str
    sha256: str
    n_bytes: int = Field(description="of the file")
    ppl: Number = Field(description="perplexity of the file by the reference")


class RecipeRecord(Record):
    """One ladder: the checkpoint, and each recipe against it."""

    schema_: Literal["diffharness.recipe/1"] = Field(default="diffharness.recipe/1", alias="schema")
    ladder: str | None = Field(default=None, description="the shipped ladder's name, where it is one")
    baseline: Baseline
    rungs: list[Rung] = []
    left_out: dict[str, str] = Field(
        default={}, description="why, by recipe of the ladder that the model has no use for"
    )
    written: Written | None = None
    checkpoint: CheckpointSubject
    fixture: FixtureSubject
    machine: PlainDict = {}
    repro: str = ""
    timings: dict[str, Number] = Field(default={}, description="seconds by step")
