"""What `diffharness restore` found: perplexity and KL with groups of tensors exchanged between two models."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffharness.records.base import Number, Part, Record
from diffharness.records.legs import MetadataRow
from diffharness.records.run import Finding, Score, Verdict
from diffharness.records.subject import Subject

Side = Literal["artifact", "checkpoint"]


class MixtureScore(Score):
    """A mixture's perplexity, and its KL from the checkpoint."""

    kl_mean: Number = Field(description="mean KL(checkpoint || this) in nats, over the full vocabulary")


class GroupScore(MixtureScore):
    """One group exchanged alone. `change` is the mean NLL less that of the side it was put into."""

    into: Side = Field(description="artifact: the checkpoint's group was put into it; checkpoint: the artifact's")
    group: str
    tensors: list[str] = []
    keys: list[str] = Field(default=[], description="metadata keys")
    drifted: int = Field(default=0, description="of the tensors, how many are further off than their types explain")
    change: Number = Field(description="nats a token; below zero is better")
    error: Number | None = Field(default=None, description="standard error of `change`; null where it cannot be said")
    told: Literal["better", "worse", "same"] = Field(description="`same`: no more than noise")


class SearchResult(Part):
    """The smallest set of groups found whose restoration is enough."""

    target: Number = Field(description="perplexity that had to be reached")
    target_of: Literal["checkpoint", "control"]
    within: Number = Field(description="distance allowed, as a share: 0.01 for 1 %")
    reached: bool = Field(description="false where putting back everything was not enough")
    words: str = Field(description="what has to be put back")
    tensors: list[str] = []
    keys: list[str] = []
    groups: list[str] = []
    score: MixtureScore | None = None
    minimal: bool = Field(description="none of the groups can be left out")
    finest: bool = Field(description="nor can any of them be cut into fewer layers")
    forwards: int
    budget: int


class LineageMarks(Part):
    """What speaks for and against another model."""

    spread: bool = Field(description="the tensors differ from the checkpoint's all over")
    mark: Literal["misfit", "coherent"] | None = None
    additivity: Number | None = Field(
        default=None, description="sum of the groups' mean KL, each alone in the checkpoint, over that of all together"
    )


class RestoreRecord(Record):
    """One restoration: the verdict, the scores behind it, and what it takes to do it again."""

    schema_: Literal["diffharness.restore/1"] = Field(default="diffharness.restore/1", alias="schema")
    verdict: Verdict
    subject: Subject
    scores: dict[str, MixtureScore] = Field(default={}, description="artifact, checkpoint, control")
    groups: list[GroupScore] = Field(default=[], description="by `into`; what matters most comes first")
    search: SearchResult | None = None
    lineage: LineageMarks | None = None
    layer_kinds: list[str] = Field(default=[], description="by layer, as the architecture calls them")
    metadata: list[MetadataRow] = []
    findings: list[Finding] = []
    forwards: int = 0
    layers_run: int = Field(default=0, description="over all forwards; each starts at the first layer that changed")
    repro: str = ""
    timings: dict[str, Number] = Field(default={}, description="seconds by step")
