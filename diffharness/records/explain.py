"""What `diffharness explain` found: which departures from the model's definition would reproduce the engine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffharness.records.base import Number, Part, Record
from diffharness.records.legs import GraphLeg
from diffharness.records.run import Divergence, Finding, Verdict
from diffharness.records.subject import Subject

Fit = Literal["yes", "partly", "no"]


class HypothesisRow(Part):
    """One hypothesis, or several that were needed together."""

    names: list[str]
    says: str = Field(description="completes: the engine behaves as if ...")
    fits: Fit = Field(description="yes: every tap of every layer is within its floor; partly: some that were not are")
    equal: bool = Field(default=False, description="as good as the first row: indistinguishable on this fixture")
    fitted: bool = Field(default=False, description="a number in it was fitted to the engine's values")
    tap: str = Field(description="the first failing tap, which local_before and local_after are of")
    local_before: Number
    local_after: Number
    worst_after: Number | None = Field(default=None, description="of any tap of the same layer")
    places: str | None = Field(default=None, description="where it had to be supposed, if not everywhere")
    remaining: list[str] = Field(default=[], description="taps that still fail, in graph order")
    logits_before: Number | None = Field(default=None, description="NMSE end to end, over the scored positions")
    logits_after: Number | None = None


class Facts(Part):
    """What is known of the first failing tap where nothing explains it."""

    tap: str
    ratios: dict[str, Number] = Field(default={}, description="least-squares factor engine / reference by tap")
    rotation: dict[str, list[Number]] = Field(
        default={}, description="attn_q, attn_k: engine's angle per position of each pair, over the model's"
    )
    heads: list[int] = Field(default=[], description="heads with an error above the floor")
    n_heads: int | None = None
    rank: int = Field(description="singular values that hold 99 % of the error's energy")
    rank_of: int = Field(description="how many there are")
    tokens: int = Field(description="tokens of the chunk above the floor")
    tokens_of: int
    words: list[str] = Field(default=[], description="the same in sentences")


class Explanation(Part):
    """The outcome of one search."""

    answer: str
    found: bool = Field(description="whether a hypothesis, or several together, fit everywhere")
    hypotheses: list[HypothesisRow] = Field(default=[], description="the best first")
    facts: Facts | None = None
    tried: int = Field(default=0, description="hypotheses that were tried on a layer")
    evaluations: int = Field(default=0, description="evaluations of one layer, of the embedding or of the head")
    budget: int = 0
    exhausted: bool = Field(default=False, description="the budget ended the search")


class ExplainRecord(Record):
    """One explanation, and the graph leg that it is of."""

    schema_: Literal["diffharness.explain/1"] = Field(default="diffharness.explain/1", alias="schema")
    verdict: Verdict
    first_divergence: Divergence | None = None
    explanation: Explanation | None = Field(default=None, description="null where there is nothing to explain")
    graph: GraphLeg
    findings: list[Finding] = []
    subject: Subject
    repro: str = ""
    timings: dict[str, Number] = Field(default={}, description="seconds by step")
