"""What `diffharness bisect` found: the first engine of an ordered list that differs from the list's first."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffharness.records.base import Number, Part, Record
from diffharness.records.legs import LogitStats
from diffharness.records.run import Divergence, VerdictKind
from diffharness.records.subject import ArtifactSubject, FixtureSubject


class StepRow(Part):
    """One engine that was run. `logits` are its native run's against the first engine's, over the scored positions."""

    index: int = Field(description="place in the list, from 0")
    engine: str
    version: str | None = None
    commit: str | None = None
    bindings: str | None = None
    state: Literal["first", "same", "changed", "skipped"]
    reason: str | None = Field(default=None, description="what changed, or why it was skipped")
    verdicts: list[VerdictKind] = Field(default=[], description="of its own whole run; empty where none was made")
    summary: str | None = None
    first_divergence: Divergence | None = None
    logits: LogitStats | None = None
    ppl: Number | None = None
    seconds: Number = 0.0


class BisectRecord(Record):
    """The search. Engines that no row is about were not run."""

    schema_: Literal["diffharness.bisect/1"] = Field(default="diffharness.bisect/1", alias="schema")
    outcome: Literal["unchanged", "changed", "unclear"]
    summary: str
    engines: list[str]
    on: Literal["verdict", "numbers", "either"]
    floor: Number = Field(description="logits NMSE above which the numbers have changed")
    steps: list[StepRow] = Field(default=[], description="in the order in which they were run")
    first_changed: int | None = Field(default=None, description="index of the first engine known to have changed")
    last_same: int | None = Field(default=None, description="index of the last engine before it known not to have")
    candidates: list[int] = Field(
        default=[], description="the change came with one of these; more than one: skips hide it"
    )
    artifact: ArtifactSubject
    fixture: FixtureSubject | None = None
    next_step: str | None = None
    repro: str = ""
    timings: dict[str, Number] = Field(default={}, description="seconds by step")
