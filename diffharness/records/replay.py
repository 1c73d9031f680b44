"""What `diffharness replay` found: the kernel leg alone, with every op in its table."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffharness.records.base import Number, Record
from diffharness.records.legs import KernelLeg
from diffharness.records.run import Finding, Verdict
from diffharness.records.subject import Subject


class ReplayRecord(Record):
    """Every node of the engine's graph against its replay."""

    schema_: Literal["diffharness.replay/1"] = Field(default="diffharness.replay/1", alias="schema")
    verdict: Verdict
    kernel: KernelLeg = KernelLeg()
    findings: list[Finding] = []
    subject: Subject
    repro: str = ""
    timings: dict[str, Number] = Field(default={}, description="seconds by step")
