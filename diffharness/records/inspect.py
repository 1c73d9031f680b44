"""What `diffharness inspect` found: every tensor of the artifact against the checkpoint's, and patterns among them.

Every number that an artifact's tensor has, the control's has too: the checkpoint's own tensor quantized
afresh to the same type.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffharness.records.base import Number, Part, Record
from diffharness.records.legs import MetadataRow
from diffharness.records.legs import PatternRow as PatternRow
from diffharness.records.run import Finding, Verdict
from diffharness.records.subject import Subject


class Measures(Part):
    """One tensor against the checkpoint's, which is the reference of every ratio.

    Rows are those of the flattened leading axes. Values that are not finite on either side are left out of
    `max_abs`, `kl_drift` and the outliers.
    """

    cos: Number = Field(description="over the whole tensor")
    cos_row_min: Number
    cos_row_p1: Number = Field(description="1 % quantile over rows")
    cos_row_p50: Number
    error: Number = Field(description="relative error: the root of sum (a-b)^2 / sum b^2")
    sqnr: Number = Field(description="sum b^2 / sum (a-b)^2, in dB")
    scale: Number | None = Field(description="<a,b> / <b,b>: what the checkpoint's tensor was multiplied by")
    max_abs: Number = Field(description="largest |a-b|")
    kl_drift: Number = Field(description="KL of the checkpoint's distribution of values to this one's, in nats")
    outlier_kept: Number | None = Field(
        description="sum of a sign(b) over sum of |b| where |b| is among the largest 0.1 %; below 1 they were clipped"
    )
    channel_kept: Number | None = Field(
        description="sum over columns of the largest |a|, over that of the largest |b|; below 1 they were clipped"
    )


class TensorMeasures(Part):
    """One tensor with its numbers, the control's beside them, and whether it drifted."""

    name: str
    type: str
    shape: list[int] = Field(description="outermost axis first")
    layer: int | None = None
    klass: str = Field(description="the part of a layer that it belongs to, such as `attn_q` or `norm`")
    bpw: Number = Field(description="bits per weight, as stored")
    artifact: Measures | None = Field(default=None, description="null where the two sides cannot be compared")
    control: Measures | None = None
    limit: Number | None = Field(default=None, description="what the relative error may be at most; null: no control")
    ratio: Number | None = Field(
        default=None, description="relative error over the control's; where the control has none, over the limit"
    )
    nan: int = 0
    inf: int = 0
    zero_blocks: int = Field(default=0, description="blocks of zeros where the checkpoint's are not")
    zero_experts: list[int] = Field(default=[], description="experts with such blocks")
    far_rows: int = Field(default=0, description="rows beyond the control, whole or in a block or a value")
    drifted: bool = False
    why: str | None = Field(default=None, description="in which measure it drifted, or what explains it")


class GroupRow(Part):
    """Tensors of one class, or of one layer. Errors are relative: root mean squares, each value counted alike."""

    group: str
    n: int
    drifted: int
    n_params: int
    bpw: Number
    error: Number
    control: Number | None = None
    cos_min: Number | None = None
    worst: str | None = Field(default=None, description="the tensor with the largest error over its control's")


class Grid(Part):
    """Layer x class: relative error over the control's; null where the layer has no such tensor."""

    layers: list[int] = []
    classes: list[str] = []
    ratios: list[list[Number | None]] = []
    drifted: list[list[bool]] = []


class Bins(Part):
    """How the distributions were made."""

    n: int = Field(description="two open ones included")
    span: Number = Field(description="equal bins over the mean +- this many standard deviations of the checkpoint's")
    smoothing: Number = Field(description="values added to each bin of both sides, so that no bin is empty")


class Totals(Part):
    tensors: int = 0
    compared: int = 0
    drifted: int = 0
    drifted_attention: int = Field(default=0, description="of these, in attention")
    bits_per_weight: Number | None = None


class InspectRecord(Record):
    """One inspection: the verdict, the tensors behind it, and what it takes to do it again."""

    schema_: Literal["diffharness.inspect/1"] = Field(default="diffharness.inspect/1", alias="schema")
    verdict: Verdict
    subject: Subject
    totals: Totals = Totals()
    patterns: list[PatternRow] = []
    tensors: list[TensorMeasures] = []
    classes: list[GroupRow] = []
    layers: list[GroupRow] = []
    grid: Grid = Grid()
    layer_kinds: list[str] = Field(default=[], description="by layer, as the architecture calls them")
    metadata: list[MetadataRow] = []
    missing: list[str] = Field(default=[], description="tensors that only the checkpoint has")
    extra: list[str] = Field(default=[], description="tensors that only the artifact has")
    ignored: list[str] = Field(default=[], description="the checkpoint's tensors of other towers, not compared")
    control: str | None = Field(default=None, description="what the control is, or why there is none")
    bins: Bins | None = Field(default=None, description="of `kl_drift`")
    findings: list[Finding] = []
    repro: str = ""
    timings: dict[str, Number] = Field(default={}, description="seconds by step")
