"""What `diffharness matrix` found: the same engine, file and tokens under settings that must not matter."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffharness.records.base import Number, Part, PlainDict, Record
from diffharness.records.legs import Leg, LogitStats
from diffharness.records.run import Finding, Verdict
from diffharness.records.subject import Subject

CellStatus = Literal["ok", "fail", "crash", "not run", "not judged"]


class CellRow(Part):
    """One cell of the grid. Its logits against the base's (or `against`), over every token that the cell decodes."""

    label: str
    dimension: str
    changes: PlainDict = Field(default={}, description="engine settings that differ from the base's")
    feed: str = Field(default="whole", description="how the text is fed")
    against: str = Field(default="base", description="what it is compared with: the base, or a way of feeding")
    floor: str = Field(description="the class of its floor")
    lossy: bool = False
    status: CellStatus
    reason: str | None = Field(default=None, description="why it failed, crashed or did not run")
    logits: LogitStats | None = None
    bound: Number | None = Field(default=None, description="what logits.nmse may be at most")
    control: Number | None = Field(default=None, description="the honest difference that the bound comes from")
    token_nmse: Number | None = Field(default=None, description="of the token nearest to, or furthest over, its bound")
    token_bound: Number | None = None
    tokens_above: int = Field(default=0, description="tokens over their bound")
    router_flips: int = Field(default=0, description="tokens left out: a near tie between experts went the other way")
    strict: LogitStats | None = Field(default=None, description="against the strict engine, not judged")
    first_tap: str | None = None
    first_token: int | None = None
    first_position: int | None = Field(default=None, description="of first_token within its chunk")
    seconds: Number = 0.0


class MatrixBase(Part):
    """What the cells are compared with."""

    settings: PlainDict
    survived: str | None = Field(default=None, description="what had to be changed for the base to run at all")
    strict: LogitStats | None = Field(default=None, description="the base against the strict engine")
    control: Literal["strict engine", "reference", "none"] = "none"


class MatrixRecord(Record):
    """The settings leg in full."""

    schema_: Literal["diffharness.matrix/1"] = Field(default="diffharness.matrix/1", alias="schema")
    verdict: Verdict
    leg: Leg
    base: MatrixBase
    cells: list[CellRow] = []
    findings: list[Finding] = []
    subject: Subject
    repro: str = ""
    timings: dict[str, Number] = Field(default={}, description="seconds by step")
