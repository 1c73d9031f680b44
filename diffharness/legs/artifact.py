"""The artifact leg: is the file what the checkpoint says, but for what its types lose?

The same reference runs on the artifact, on the checkpoint and on a control (the checkpoint freshly
quantized to the artifact's own types), so that no engine is involved. Loss that the control shares is
normal and only reported. Beyond it stand a hyperparameter that differs, tensors that are damaged, or
a sound model that was made from something else.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffharness.forensics.drift import Drift, TensorError
from diffharness.forensics.findings import (
    decimals,
    describe_tensor,
    explained,
    file_findings,
    information,
    metadata_finding,
    mostly_explained,
)
from diffharness.forensics.lineage import is_rounded_otherwise
from diffharness.forensics.loss import KlLimits
from diffharness.forensics.restoration import other_model
from diffharness.forensics.restore import Lineage, is_spread
from diffharness.layers import describe_layers, ranges
from diffharness.legs.compare import TapComparison, logit_stats
from diffharness.metrics import LogitComparison
from diffharness.records import ArtifactLeg, Divergence, Finding, MetadataRow, TapRow, VerdictKind
from diffharness.records.inspect import PatternRow
from diffharness.settings import Floors
from diffharness.taps import split
from diffharness.words import counted, listed

_TOLD = 3  # relations in a sentence; the leg has them all


@dataclass(frozen=True)
class ArtifactInputs:
    """Everything the leg may rest on; what is None was not to be had.

    `logits`: checkpoint (ref) against artifact; `control_logits`: checkpoint (ref) against control.
    `taps` and `control_taps` were fed (artifact or control, checkpoint) as (engine, own).
    `perplexity` by `artifact`, `checkpoint`, `control`. `kinds` by layer. `places` and `relations` say where the
    damaged tensors are and what became of them.
    """

    kinds: Sequence[str]
    metadata: Sequence[MetadataRow] = ()
    drift: Drift | None = None
    places: Sequence[PatternRow] = ()
    relations: Sequence[PatternRow] = ()
    logits: LogitComparison | None = None
    control_logits: LogitComparison | None = None
    taps: TapComparison | None = None
    control_taps: TapComparison | None = None
    perplexity: Mapping[str, float] = field(default_factory=dict)
    lineage: Lineage | None = None  # asked for where `may_be_other_model`
    too_short: bool = False  # it was, and there are too few positions to tell


@dataclass(frozen=True)
class ArtifactOutcome:
    leg: ArtifactLeg
    first_divergence: Divergence | None
    findings: list[Finding]


def not_run(reason: str) -> ArtifactOutcome:
    """The leg without a checkpoint, or where the reference could not run on one of the two."""
    return ArtifactOutcome(ArtifactLeg(reason=reason), None, [])


def judge(inputs: ArtifactInputs, floors: Floors) -> ArtifactOutcome:
    """The leg and its findings: artifact.file, artifact.metadata, artifact.weights, artifact.lineage."""
    drift = inputs.drift or Drift([], [], [])
    damaged = [t for t in drift.tensors if t.damaged and not t.non_finite]
    excess = kl_excess(inputs, floors)
    by_design: list[TensorError] = []
    if rounded_by_design(inputs, floors):
        damaged, by_design = [], damaged
    used = [row for row in inputs.metadata if row.used]
    rows = _tap_rows(inputs, floors)
    findings = file_findings(drift)
    broken = bool(findings)
    if used:
        findings.append(metadata_finding(used, inputs.perplexity))
    pattern = describe_damage(damaged, drift.tensors, inputs.kinds) if damaged else None
    kind: VerdictKind = "inconclusive" if inputs.too_short else "artifact.weights"
    other: str | None = None
    if inputs.lineage is not None and inputs.lineage.mark is not None:
        kind, ppl = "artifact.lineage", inputs.perplexity
        other = other_model(inputs.lineage, ppl["artifact"], ppl["checkpoint"], floors)
    if damaged or drift.missing:
        findings.append(_weights_finding(kind, damaged, drift, pattern, inputs, excess, other))
    elif excess and not used and not broken and not any(t.note for t in drift.tensors):
        # Values rounded on the way (a note) lose what the control, made from the checkpoint itself, keeps.
        findings.append(_unexplained_finding(kind, inputs, excess, other))
    findings += information(drift, inputs.metadata)
    if by_design:
        findings.append(_rounding_finding(by_design, inputs))
    guilty = any(finding.kind for finding in findings)
    judged = any(t.judged for t in drift.tensors) or inputs.control_logits is not None
    leg = ArtifactLeg(
        status="fail" if guilty else "pass" if judged else "not_run",
        reason=_reason(findings, judged),
        logits=None if inputs.logits is None else logit_stats(inputs.logits),
        control=None if inputs.control_logits is None else logit_stats(inputs.control_logits),
        taps=rows,
        tensors=[t.row().model_copy(update={"damaged": t.damaged and t not in by_design}) for t in drift.tensors],
        metadata=list(inputs.metadata),
        missing=drift.missing,
        extra=drift.extra,
        pattern=pattern,
        patterns=[*inputs.relations, *inputs.places],
    )
    return ArtifactOutcome(leg, _first_divergence(rows) if guilty else None, findings)


def _rounding_finding(tensors: Sequence[TensorError], inputs: ArtifactInputs) -> Finding:
    text = (
        f"{counted(len(tensors), 'tensor holds', 'tensors hold')} other levels than the nearest, as a quantizer leaves "
        f"them that learns its rounding; {_kl(inputs)}, no more than plain rounding loses"
    )
    return Finding(kind=None, leg="artifact", message=text, evidence={"tensors": [t.name for t in tensors]})


def kl_excess(inputs: ArtifactInputs, floors: Floors) -> float | None:
    """Mean KL over what the control's allows, where it is above; None where it is not, or without a control."""
    ours, control = inputs.logits, inputs.control_logits
    if ours is None or control is None:
        return None
    limits = KlLimits.of(control.kl_mean, control.kl_median, floors)
    return ours.kl_mean / limits.mean if limits.passed_by(ours.kl_mean, ours.kl_median) else None


def rounded_by_design(inputs: ArtifactInputs, floors: Floors) -> bool:
    """Whether all that differs is how values were rounded, and the logits are none the worse for it."""
    if inputs.drift is None or inputs.control_logits is None or kl_excess(inputs, floors) is not None:
        return False
    return is_rounded_otherwise(inputs.drift.tensors, floors)


def may_be_other_model(inputs: ArtifactInputs, floors: Floors) -> bool:
    """Whether the tensors differ all over, in no way that has a name, beyond what rounding does: worth its forwards."""
    excess = kl_excess(inputs, floors) is not None
    if inputs.drift is None or not is_spread(inputs.drift, floors, logits_moved=excess):
        return False
    damaged = [t for t in inputs.drift.tensors if t.damaged]
    return not rounded_by_design(inputs, floors) and not mostly_explained(damaged, inputs.relations)


def describe_damage(damaged: Sequence[TensorError], every: Sequence[TensorError], kinds: Sequence[str]) -> str:
    """Classes by the layers they are damaged in: `attn_q, attn_k in all layers; layer_output_scale in only layer 3`."""
    layers_of: dict[str, set[int]] = defaultdict(set)
    has: dict[str, set[int]] = defaultdict(set)
    outside = [t.name for t in damaged if t.layer is None]
    for t in every:
        if t.layer is not None:
            has[t.klass].add(t.layer)
    for t in damaged:
        if t.layer is not None:
            layers_of[t.klass].add(t.layer)
    groups: dict[str, list[str]] = defaultdict(list)
    for klass, layers in layers_of.items():
        if layers == has[klass]:
            where = "every layer" if len(layers) == len(kinds) else f"every layer that has them ({ranges(layers)})"
        else:
            where = describe_layers(layers, kinds)
        groups[where].append(klass.removesuffix(".weight"))
    parts = [f"{', '.join(classes)} in {where}" for where, classes in groups.items()]
    return "; ".join(parts + ([", ".join(outside)] if outside else []))


# -- words --------------------------------------------------------------------------------------------


def _weights_finding(
    kind: VerdictKind,
    damaged: Sequence[TensorError],
    drift: Drift,
    pattern: str | None,
    inputs: ArtifactInputs,
    excess: float | None,
    other: str | None,
) -> Finding:
    parts = []
    if damaged:
        worst = max(damaged, key=lambda t: t.error / t.limit if t.limit else math.inf)
        lead = "" if other is None else f"{other}; "
        lead += "tensors are further from the checkpoint than their types explain: "
        parts.append(f"{lead}{len(damaged)} of {len(drift.tensors)}")
        parts += [f"{pattern}", *(row.message for row in explained(inputs.relations)[:_TOLD])]
        parts.append(f"worst {describe_tensor(worst)}")
    if drift.missing:
        parts.append(f"missing from the artifact: {listed(drift.missing)}")
    if inputs.logits is not None:
        parts.append(_kl(inputs))
    evidence: dict[str, Any] = {
        "tensors": [t.row().model_dump() | {"far_rows": t.far_rows, "note": t.note} for t in damaged],
        "layers": sorted({t.layer for t in damaged if t.layer is not None}),
        "classes": sorted({t.klass for t in damaged}),
        "pattern": pattern,
        "patterns": [row.kind for row in (*inputs.relations, *inputs.places)],
        "missing": drift.missing,
        "perplexity": dict(inputs.perplexity),
        "kl_over_limit": excess,
    }
    return Finding(kind=kind, leg="artifact", message="; ".join(parts), evidence=evidence)


def _unexplained_finding(kind: VerdictKind, inputs: ArtifactInputs, excess: float, other: str | None) -> Finding:
    lead = other or "more is lost than the types explain, though no single tensor stands out"
    return Finding(
        kind=kind,
        leg="artifact",
        message=f"{lead}: {_kl(inputs)}",
        evidence={"kl_over_limit": excess, "perplexity": dict(inputs.perplexity)},
    )


def _reason(findings: Sequence[Finding], judged: bool) -> str | None:
    guilty = [finding.message for finding in findings if finding.kind]
    if guilty:
        return "; ".join(guilty)
    return None if judged else "no control to judge the loss of the artifact's types by"


def _tap_rows(inputs: ArtifactInputs, floors: Floors) -> list[TapRow]:
    rows = []
    for errors in inputs.taps.taps if inputs.taps else []:
        row = errors.row()
        control = inputs.control_taps.get(row.tap) if inputs.control_taps else None
        if control is not None and row.nmse is not None:
            row.nmse_control = control.row().nmse
            if row.nmse_control is not None:
                row.floor = floors["artifact.kl_factor"] * row.nmse_control + floors["artifact.kl_floor"]
                row.ok = bool(row.nmse <= row.floor)
        rows.append(row)
    return rows


def _first_divergence(rows: Sequence[TapRow]) -> Divergence | None:
    row = next((row for row in rows if row.ok is False), None)
    if row is None:
        return None
    return Divergence(leg="artifact", tap=row.tap, layer=split(row.tap)[0], token=row.worst_token, nmse=row.nmse)


def _kl(inputs: ArtifactInputs) -> str:
    assert inputs.logits is not None, "asked for only where there are logits"
    text = f"mean KL {inputs.logits.kl_mean:.1e}"
    if inputs.control_logits is not None:
        text += f" (control {inputs.control_logits.kl_mean:.1e})"
    own, theirs = inputs.perplexity.get("artifact"), inputs.perplexity.get("checkpoint")
    if own is not None and theirs is not None:
        text += f", perplexity {decimals(own)} (checkpoint {decimals(theirs)})"
    return text
