"""What `diffharness grade` measured: many artifacts on one fixture, against one base where there is one.

The statistics are llama-perplexity's (`--kl-divergence`); `diffharness.kld` has their definitions. Errors are standard
errors, null where the positions are too few for one. Everything is from float32 logits.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffharness.records.attention import AttentionHealth
from diffharness.records.base import Number, Part, PlainDict, Record
from diffharness.records.run import Finding
from diffharness.records.subject import ArtifactSubject, CheckpointSubject, EngineSubject, FixtureSubject


class Estimate(Part):
    """A number and its standard error."""

    value: Number
    error: Number | None = Field(default=None, description="positions taken as independent")


class KlStatistics(Part):
    """One side against the base over the scored positions, as llama-perplexity prints it."""

    n: int = Field(description="scored positions")
    ppl: Estimate
    ppl_base: Estimate
    correlation: Number | None = Field(default=None, description="of the two sides' NLL, -1 to 1")
    ln_ratio: Estimate = Field(description="ln(PPL/PPL of the base)")
    ratio: Estimate = Field(description="PPL/PPL of the base")
    difference: Estimate = Field(description="PPL - PPL of the base")
    kl: Estimate = Field(description="mean KL(base || this) in nats, over the full vocabulary")
    kl_quantiles: dict[str, Number] = Field(description="by `max`, `99.9%`, ... `50%`, ... `min`")
    p_diff: Estimate = Field(description="mean of p - p of the base, of the token that follows; a share from -1 to 1")
    p_diff_quantiles: dict[str, Number]
    p_diff_rms: Estimate
    top1: Estimate = Field(description="share of positions whose most likely token is the same, 0 to 1")


class PositionBucket(Part):
    """Positions of a chunk from `start` to before `stop`, over all chunks; every position that a token follows."""

    start: int
    stop: int
    n: int
    nll: Number = Field(description="mean, in nats")
    nll_base: Number | None = None
    kl: Number | None = Field(default=None, description="mean KL from the base, in nats")
    top1: Number | None = None


class ControlRow(Part):
    """The checkpoint quantized afresh to the artifact's types, graded in the same way."""

    statistics: KlStatistics
    positions: list[PositionBucket] = []
    kl_ratio: Number | None = Field(default=None, description="artifact's mean KL over the control's")
    kl_limit: Number = Field(description="what the mean KL may be at most")
    median_limit: Number = Field(description="what the median KL may be at most; loss is beyond if both are")
    beyond: bool = Field(description="more is lost than the types explain")


class EngineGrade(Part):
    """The artifact by llama.cpp with its default settings. `error` says why it has no numbers."""

    ppl: Estimate | None = None
    kl: Estimate | None = Field(default=None, description="mean KL(base by the reference || artifact by llama.cpp)")
    within_noise: bool | None = Field(default=None, description="as in the artifact's row")
    positions: list[PositionBucket] = []
    error: str | None = None


class GradeRow(Part):
    """One artifact. `error` says why it has no numbers."""

    label: str
    artifact: ArtifactSubject
    bpw: Number | None = Field(default=None, description="bits per weight: bytes of all tensors, times 8, by weights")
    ppl: Estimate | None = Field(default=None, description="perplexity by the reference")
    engine: EngineGrade | None = None
    statistics: KlStatistics | None = None
    within_noise: bool | None = Field(
        default=None, description="the mean KL is within bf16's limit, and ranks nothing; null without `bf16`"
    )
    positions: list[PositionBucket] = []
    control: ControlRow | None = None
    control_error: str | None = Field(default=None, description="why there is no control")
    attention: AttentionHealth | None = None
    error: str | None = None
    notes: list[str] = []


class Paired(Part):
    """Mean of the differences a - b at the same positions; its standard error is from blocks of positions."""

    mean: Number
    error: Number | None = Field(default=None, description="null where the blocks are too few")
    z: Number | None = Field(default=None, description="mean over error")
    critical: Number | None = Field(default=None, description="what |z| is above in 5 % of cases without a difference")
    blocks: int
    told_apart: bool = Field(description="|z| is above the critical value, and the mean not within the noise")
    within_noise: bool = Field(default=False, description="|mean| is within bf16's limit")


class PairRow(Part):
    """Two artifacts by their labels, `a` given before `b`: how a differs from b in NLL, and in KL from the base."""

    a: str
    b: str
    nll: Paired
    kl: Paired | None = None


class Bf16Noise(Part):
    """What products in bfloat16 make of the same tokens and weights: measured against the same forward in float32."""

    label: str = Field(description="whose weights")
    nmse: Number = Field(description="of the logits")
    statistics: KlStatistics = Field(description="over the run's first `n` tokens, float32 being the base")
    limit: Number = Field(
        description="nats: mean KL, or a difference of mean KL or NLL, that tells nothing: twice the KL"
    )
    supported: bool | None = Field(description="the CPU has AVX512-BF16 or AMX; without, this is slower than float32")


class BaseRow(Part):
    """What the artifacts are measured against."""

    label: str
    kind: Literal["checkpoint", "artifact"]
    ppl: Estimate
    positions: list[PositionBucket] = []


class GradeRecord(Record):
    """One table: the base, the artifacts, and which of them can be told apart."""

    schema_: Literal["diffharness.grade/1"] = Field(default="diffharness.grade/1", alias="schema")
    base: BaseRow | None = None
    bf16: Bf16Noise | None = Field(default=None, description="of --matmul bf16; null where all is in float32 or more")
    rows: list[GradeRow] = []
    pairs: list[PairRow] = []
    landmarks: dict[str, int] = Field(default={}, description="positions where something changes: the window, n_ubatch")
    unreached: dict[str, int] = Field(default={}, description="the same where no chunk is long enough to show it")
    findings: list[Finding] = []
    checkpoint: CheckpointSubject | None = None
    fixture: FixtureSubject
    engine: EngineSubject | None = None
    machine: PlainDict = {}
    repro: str = ""
    timings: dict[str, Number] = Field(default={}, description="seconds by step")
