"""What `diffharness compare` found: two saved runs, tap by tap and position by position, the first as the reference."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffharness.records.base import Number, Part, Plain, Record
from diffharness.records.legs import LogitStats, TapRow
from diffharness.records.run import Divergence, Score, VerdictKind


class RunSide(Part):
    """One of the two runs, by its own record."""

    path: str
    verdict: VerdictKind
    summary: str
    first_divergence: Divergence | None = None
    engine: str | None = Field(default=None, description="version and commit")
    reference_scores: dict[str, Score] = {}
    engine_scores: dict[str, Score] = {}


class Unlike(Part):
    """One thing that is not the same in what the two runs were made of."""

    what: str
    a: Plain = None
    b: Plain = None


class PositionDelta(Part):
    """The logits of one token of the flattened fixture."""

    token: int
    nmse: Number
    kl: Number = Field(description="KL(A || B) in nats")
    top1: bool = Field(description="the most likely token is the same")


class CaptureRow(Part):
    """One capture that both runs kept. NMSE has A below the line."""

    name: str
    ok: bool
    n_tokens: int = Field(description="tokens compared")
    logits: LogitStats | None = Field(default=None, description="over every position; null where B or A has no logits")
    first_tap: str | None = Field(default=None, description="in graph order, the first above the tolerance")
    first_token: int | None = Field(default=None, description="of that tap")
    taps: list[TapRow] = []
    positions: list[PositionDelta] = Field(default=[], description="above the tolerance, the largest NMSE first")
    n_positions: int = Field(default=0, description="how many positions are above the tolerance")
    unmatched: list[str] = Field(default=[], description="taps that one of the two lacks, or has in another width")


class CompareRecord(Record):
    """Two saved runs."""

    schema_: Literal["diffharness.compare/1"] = Field(default="diffharness.compare/1", alias="schema")
    outcome: Literal["same", "differs"]
    summary: str
    tolerance: Number = Field(description="what the NMSE of every tap, and of every token of it, may be at most")
    a: RunSide
    b: RunSide
    unlike: list[Unlike] = Field(default=[], description="inputs, settings, builds and machines that are not the same")
    captures: list[CaptureRow] = []
    only_a: list[str] = Field(default=[], description="captures that only A kept")
    only_b: list[str] = []
    repro: str = ""
