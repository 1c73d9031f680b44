"""Attention health: how attention is spread over the keys, in the checkpoint, the artifact and the control.

A part of other commands' records. Numbers are means over the queries of a range of positions; null where there is
nothing to average.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffharness.records.base import Number, Part
from diffharness.records.run import Finding

Values = list[list[list[Number | None]]]


class AttentionSide(Part):
    """One model's numbers, each by layer, query head and range."""

    entropy: Values = Field(description="of a query's weights, over ln(keys that it sees): 0 one key, 1 uniform")
    first_share: Values = Field(description="weight on position 0, over the queries that see it")
    effective_keys: Values = Field(description="exp of the mean entropy in nats")


class HeadChange(Part):
    """One head whose attention is spread otherwise than in the checkpoint, in the range where it stands out most."""

    layer: int
    kind: str = Field(description="`global`, `sliding`, ... as the architecture calls the layer")
    head: int
    how: Literal["flattened", "collapsed"]
    streams: list[Literal["own", "local"]] = Field(
        description="`own`: in the artifact by itself; `local`: on the checkpoint's own layer input, by its own weights"
    )
    start: int = Field(description="first position of the range")
    stop: int
    checkpoint: Number = Field(description="relative entropy")
    artifact: Number = Field(description="in the first of `streams`, as are control and limit")
    control: Number | None = None
    limit: Number = Field(description="what artifact and checkpoint may differ by")


class AttentionHealth(Part):
    """Per layer and head on every side, and the heads that changed beyond what quantization explains."""

    kinds: list[str] = Field(description="of layers, by layer")
    ranges: list[tuple[int, int]] = Field(description="[start, stop) of positions in a chunk; one-key queries left out")
    checkpoint: AttentionSide
    artifact: AttentionSide
    control: AttentionSide | None = Field(default=None, description="the checkpoint quantized afresh")
    changed: list[HeadChange] = []
    findings: list[Finding] = []
