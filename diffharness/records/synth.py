"""What `diffharness synth` made."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from diffharness.records.base import Record


class SynthRecord(Record):
    """A synthetic model: its files, and what makes the same one again."""

    schema_: Literal["diffharness.synth/1"] = Field(default="diffharness.synth/1", alias="schema")
    arch: str
    seed: int
    gguf: str
    checkpoint: str
    fixture: str
    n_tokens: int
    n_layer: int
    n_tensors: int
    n_parameters: int
    n_bytes: int = Field(description="of the GGUF")
    types: dict[str, int] = Field(description="tensors by type")
    narrow: list[str] = Field(default=[], description="matrices that stay F32: their rows are no whole blocks")
    config: dict[str, Any] = Field(description="config.json")
    repro: str = ""
