"""What `diffharness gate` decided: a line per rule, with what was measured and what it may be."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffharness.records.base import Number, Part, Record
from diffharness.records.grade import Estimate
from diffharness.records.legs import Status
from diffharness.records.run import Finding
from diffharness.records.subject import Subject

Outcome = Literal["pass", "fail", "inconclusive"]


class RuleRow(Part):
    """One rule, or one class of what it measures by bits per weight."""

    rule: str = Field(description="its name in the gate file")
    scope: str | None = Field(default=None, description="what part it is about, such as `4 bits`")
    status: Status
    optional: bool = Field(default=False, description="the gate may pass where this rule was not run")
    measured: Number | None = Field(default=None, description="the worst value, in `unit`")
    limit: Number | None = None
    bound: Literal["at_most", "at_least"]
    unit: str = ""
    message: str = Field(description="what was measured, or why it was not, in a sentence")
    offenders: list[str] = Field(default=[], description="what is beyond the limit, the worst first")

    @property
    def name(self) -> str:
        return self.rule if self.scope is None else f"{self.rule} ({self.scope})"


class GateScores(Part):
    """Perplexities that the rules were judged by."""

    artifact: Estimate | None = None
    checkpoint: Estimate | None = None
    engine: Estimate | None = Field(default=None, description="the artifact by llama.cpp")


class GateRecord(Record):
    """One gate: pass, fail, or inconclusive where a rule that must run could not."""

    schema_: Literal["diffharness.gate/1"] = Field(default="diffharness.gate/1", alias="schema")
    outcome: Outcome
    summary: str
    gate: str = Field(description="the file that the limits came from")
    rules: list[RuleRow]
    scores: GateScores = GateScores()
    findings: list[Finding] = Field(default=[], description="of the inspection and of the tokenizers")
    subject: Subject
    repro: str = ""
    timings: dict[str, Number] = Field(default={}, description="seconds by step")
