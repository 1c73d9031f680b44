"""What `diffharness damage` did to a copy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffharness.records.base import Part, Record


class FaultRow(Part):
    """One kind of damage that can be done."""

    name: str
    what: str
    shows: str
    """The pattern that `inspect` may name; where there is none, the verdict without `artifact.`."""
    tensors: str
    """Where it is put unless told: a shell pattern; empty where it is no matter of tensors."""
    strength: float | None
    """The default; None for a fault that takes none."""
    means: str
    """What strength is."""


class ChangeRow(Part):
    """One tensor or key that was meant to change."""

    name: str
    type: str | None
    """Of a tensor, as written; None for a metadata key."""
    what: str
    changed: bool
    """Whether the bytes differ: a type may round a small difference away."""


class DamageRecord(Record):
    """The copy and everything that differs from its source; or, without one, the list of faults."""

    schema_: Literal["diffharness.damage/1"] = Field(default="diffharness.damage/1", alias="schema")
    source: str | None = None
    out: str | None = None
    checkpoint: str | None = None
    """Where the clean values came from; None: from the artifact itself."""
    how: list[str] = []
    """Faults with their strengths, in the order in which they were done: `scale:1.1`."""
    seed: int = 0
    n_tensors: int = 0
    n_bytes: int = 0
    truncated_from: int | None = None
    """Bytes of the whole copy, where it was cut short: `out` is then no readable GGUF."""
    changes: list[ChangeRow] = []
    faults: list[FaultRow] = []
    """Of `--list`."""
    repro: str = ""
