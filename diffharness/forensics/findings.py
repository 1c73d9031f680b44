"""Findings about a file's tensors and metadata, in words: what `inspect` and the artifact leg of a run both say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from diffharness.forensics.drift import Drift, TensorError
from diffharness.records import Finding, MetadataRow
from diffharness.records.inspect import PatternRow
from diffharness.words import counted, listed

_UNEXPLAINED = frozenset({"noise", "unexplained", "unrelated", "shape"})  # relations that say that there is none


def non_finite_finding(counts: Mapping[str, int]) -> Finding:
    """NaN or infinity in a readable file, by tensor; `artifact.file`."""
    names = sorted(counts)
    return Finding(
        kind="artifact.file",
        leg="artifact",
        message=f"the file holds NaN or infinity: {sum(counts.values())} values in {listed(names)}",
        evidence={"tensors": dict(counts)},
    )


def file_findings(drift: Drift) -> list[Finding]:
    """At most one: that tensors hold NaN or infinity."""
    broken = {t.name: t.non_finite for t in drift.tensors if t.non_finite}
    return [non_finite_finding(broken)] if broken else []


def metadata_finding(used: Sequence[MetadataRow], perplexity: Mapping[str, float]) -> Finding:
    """Keys that matter and differ; with the perplexity before and after repair where it was measured."""
    before = perplexity.get("artifact")
    parts = []
    for row in used:
        text = f"{row.key} is {shown(row.artifact)}, by the checkpoint's config {shown(row.checkpoint)}"
        if row.repaired_ppl is not None:
            text += f" (perplexity {decimals(before)} -> {decimals(row.repaired_ppl)} repaired)"
        parts.append(text)
    what = "metadata that the forward reads" if any(row.note is None for row in used) else "metadata"
    return Finding(
        kind="artifact.metadata",
        leg="artifact",
        message=f"{what} differs from the checkpoint: " + "; ".join(parts),
        evidence={"keys": [row.model_dump() for row in used], "perplexity": dict(perplexity)},
    )


def information(drift: Drift, metadata: Sequence[MetadataRow]) -> list[Finding]:
    """What is told without blame: keys without effect, tensors that were not judged, roundings on the way."""
    unread = [row.key for row in metadata if not row.used]
    unjudged = [t.name for t in drift.tensors if not t.judged]
    rounded = [t.name for t in drift.tensors if t.note and not t.damaged]
    notes = [
        (unread, "metadata key", "unlike the checkpoint's, without effect on the forward"),
        (drift.extra, "tensor", "that the checkpoint does not have"),
        (unjudged, "tensor", "not judged, for want of a control of the type"),
        (rounded, "tensor", "with the checkpoint's values rounded to 16 bits before conversion"),
    ]
    return [
        Finding(
            kind=None,
            leg="artifact",
            message=f"{counted(len(names), noun)} {what}: {listed(names)}",
            evidence={"names": list(names)},
        )
        for names, noun, what in notes
        if names
    ]


def explained(relations: Sequence[PatternRow]) -> list[PatternRow]:
    """The relations that say what became of their tensors."""
    return [row for row in relations if row.kind not in _UNEXPLAINED]


def mostly_explained(damaged: Sequence[TensorError], relations: Sequence[PatternRow]) -> bool:
    """Whether it is known what became of most damaged tensors: then nobody trained them to be so."""
    names = {name for row in explained(relations) for name in row.tensors}
    return 2 * sum(t.name in names for t in damaged) >= len(damaged) > 0


def describe_tensor(t: TensorError) -> str:
    """`blk.3.attn_q.weight (Q4_K, NMSE 2.1e-01, control 5.0e-03)`."""
    if t.note and not math.isfinite(t.error):
        return f"{t.name} ({t.note})"
    control = "" if t.control is None else f", control {t.control:.1e}"
    rows = f", {t.far_rows} rows beyond it" if t.far_rows > 0 and t.error <= t.limit else ""
    return f"{t.name} ({t.type}, NMSE {t.error:.1e}{control}{rows})"


def decimals(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4f}"


def shown(value: Any) -> str:
    return "missing" if value is None else str(value)
