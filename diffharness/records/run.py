"""The run record: everything that a run found, as one JSON document (schema `diffharness.run/1`).

Fields may be added under this schema, none renamed and none removed. Tokens are rows of the flattened
fixture: chunk after chunk, counted from 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from diffharness.records.base import Number, Part, PlainDict, Record, load, parse
from diffharness.records.legs import LegName, Legs, LogitStats
from diffharness.records.subject import Subject

SCHEMA = "diffharness.run/1"

VerdictKind = Literal[
    "agree",
    "engine.graph",
    "engine.kernel",
    "engine.settings",
    "engine.crash",
    "artifact.weights",
    "artifact.metadata",
    "artifact.lineage",
    "artifact.file",
    "tokens",
    "inconclusive",
]


class Verdict(Part):
    """What the run concludes: `primary` is what to act on first, `all` everything that holds."""

    primary: VerdictKind
    all: list[VerdictKind]
    summary: str
    next_step: str | None = None


class Divergence(Part):
    """The first place, in order of computation, where two sides part."""

    leg: LegName
    tap: str
    layer: int | None = None
    token: int | None = None
    position: int | None = Field(default=None, description="the token's position within its chunk")
    nmse: Number | None = None
    nmse_local: Number | None = None


class Score(Part):
    """Teacher-forced perplexity over the scored positions; `nll` is the mean in nats."""

    ppl: Number
    nll: Number
    n: int = 0


class Scores(Part):
    """`reference`: artifact, checkpoint, control. `engine`: native, strict."""

    reference: dict[str, Score] = {}
    engine: dict[str, Score] = {}


class Finding(Part):
    """One piece of evidence. `kind` is the verdict that it speaks for, null for information."""

    kind: VerdictKind | None
    leg: LegName | None
    message: str
    evidence: PlainDict = {}
    next_step: str | None = Field(default=None, description="a command that would tell more")


class EngineRow(Part):
    """One of several engines, against the first; logits over the scored positions."""

    name: str
    status: Literal["first", "same", "differs", "not_run"] = Field(description="of the native run")
    reason: str | None = Field(default=None, description="why it did not run")
    version: str | None = None
    commit: str | None = None
    bindings: str | None = None
    settings: PlainDict = Field(default={}, description="in which it differs from the first, the build apart")
    ppl: Number | None = None
    logits: LogitStats | None = Field(default=None, description="native run against the first engine's")
    strict: Number | None = Field(default=None, description="logits NMSE of its strict run from the reference")
    strict_from_first: Number | None = Field(default=None, description="the same from the first engine's strict run")
    first_tap: str | None = Field(default=None, description="where the two native runs part first")
    first_token: int | None = None


class RunRecord(Record):
    """One run: the verdict, the legs behind it, and what it takes to do it again."""

    schema_: Literal["diffharness.run/1"] = Field(default="diffharness.run/1", alias="schema")
    verdict: Verdict
    first_divergence: Divergence | None = None
    legs: Legs = Legs()
    scores: Scores = Scores()
    engines: list[EngineRow] = Field(default=[], description="where several were given; the first has the legs")
    findings: list[Finding] = []
    subject: Subject
    repro: str = ""
    timings: dict[str, Number] = Field(default={}, description="seconds by step")


def parse_record(text: str, where: str = "the run record") -> RunRecord:
    """A record back from its JSON; BadInputError if it is none, or of another schema."""
    return parse(RunRecord, text, where)


def load_record(path: Path) -> RunRecord:
    """The record in a file, or in a run folder's `run.json`."""
    return load(RunRecord, path / "run.json" if path.is_dir() else path)
