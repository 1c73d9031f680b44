"""What an inspection concludes: measured tensors, patterns and metadata in, findings and a verdict out. Pure.

Without a forward, weights that differ everywhere alike stay undecided: another model's, or this one's with damage
everywhere. Only perplexity tells them apart, so the verdict is `inconclusive` and names the command that does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffharness.forensics import classes
from diffharness.forensics.drift import Drift, TensorError
from diffharness.forensics.findings import (
    describe_tensor,
    file_findings,
    information,
    metadata_finding,
    mostly_explained,
)
from diffharness.forensics.lineage import differs_everywhere
from diffharness.forensics.measures import Measured
from diffharness.records import Finding, MetadataRow, Verdict
from diffharness.records.inspect import Measures, PatternRow, TensorMeasures
from diffharness.settings import Floors
from diffharness.verdict import of_findings
from diffharness.words import counted, listed

_PATTERNS_TOLD = 4  # in a sentence; the record has them all
_LONGEST = 120  # characters of a list of rows that a sentence takes
_MANY = 4096  # values from which on a distribution says something


@dataclass(frozen=True)
class Inspected:
    """Everything that an inspection rests on.

    `bpw` are bits per weight by tensor; `surplus` rows of the vocabulary that only the artifact has, by tensor;
    `places` and `relations` what `patterns` and `relations` found.
    """

    drift: Drift
    measured: Mapping[str, Measured]
    bpw: Mapping[str, float]
    places: Sequence[PatternRow] = ()
    relations: Sequence[PatternRow] = ()
    metadata: Sequence[MetadataRow] = ()
    ignored: Sequence[str] = ()
    surplus: Mapping[str, int] = field(default_factory=dict)
    no_control: str | None = None  # why there is none


def drifted(drift: Drift, measured: Mapping[str, Measured], floors: Floors) -> list[TensorError]:
    """Tensors beyond what their type loses, in any measure; those with NaN are another matter."""
    return [t for t in drift.tensors if _beyond_control(t, measured.get(t.name), floors) and not t.non_finite]


def tensor_rows(inspected: Inspected, floors: Floors) -> list[TensorMeasures]:
    """Every tensor with its numbers, in the artifact's order."""
    return [_row(t, inspected.measured.get(t.name), inspected.bpw, floors) for t in inspected.drift.tensors]


def conclude(inspected: Inspected, floors: Floors, *, restore: str) -> tuple[Verdict, list[Finding]]:
    """The verdict and what it rests on; `restore` is the command that a forward is run with."""
    drift, findings = inspected.drift, file_findings(inspected.drift)
    damaged = drifted(drift, inspected.measured, floors)
    used = [row for row in inspected.metadata if row.used]
    if used:
        findings.append(metadata_finding(used, {}))
    if damaged or drift.missing:
        findings.append(_weights_finding(inspected, damaged, floors, restore))
    judged = any(t.judged for t in drift.tensors)
    if not judged:
        why = inspected.no_control or "none could be made of their types"
        text = f"no tensor could be judged for want of a control: {why}"
        findings.append(Finding(kind="inconclusive", leg="artifact", message=text, next_step="diffharness doctor"))
    findings += information(drift, inspected.metadata)
    findings += _surplus(inspected)
    return of_findings(findings) or _agreement(inspected), findings


def _weights_finding(inspected: Inspected, damaged: Sequence[TensorError], floors: Floors, restore: str) -> Finding:
    drift = inspected.drift
    everywhere = (
        not drift.missing
        and not mostly_explained(damaged, inspected.relations)
        and differs_everywhere(drift.tensors, floors, logits_moved=False)
    )
    evidence: dict[str, Any] = {
        "tensors": [t.name for t in damaged],
        "layers": sorted({t.layer for t in damaged if t.layer is not None}),
        "classes": sorted({classes.class_of(t.name) for t in damaged}),
        "patterns": [row.kind for row in (*inspected.relations, *inspected.places)],
        "missing": drift.missing,
    }
    if everywhere:
        text = (
            f"{len(damaged)} of {len(drift.tensors)} tensors differ from the checkpoint, in every layer and alike: "
            "another model's weights, rounding that was learned, or damage everywhere; only a forward tells which"
        )
        return Finding(kind="inconclusive", leg="artifact", message=text, evidence=evidence, next_step=restore)
    parts = []
    if damaged:
        attention = sum(classes.class_of(t.name) in classes.ATTENTION for t in damaged)
        lead = (
            f"{len(damaged)} of {len(drift.tensors)} tensors drifted further from the checkpoint than their types "
            f"explain, {attention} of them in attention: "
        )
        told = _told(inspected)
        rest = len(told) - _PATTERNS_TOLD
        parts += told[:_PATTERNS_TOLD] + ([f"and {rest} more patterns"] if rest > 0 else [])
        parts.append(f"worst {describe_tensor(max(damaged, key=_excess))}")
        parts[0] = lead + parts[0]
    if drift.missing:
        parts.append(f"missing from the artifact: {listed(drift.missing)}")
    return Finding(
        kind="artifact.weights", leg="artifact", message="; ".join(parts), evidence=evidence, next_step=restore
    )


def _told(inspected: Inspected) -> list[str]:
    """What became of which tensors; where they are, so far as that does not say it already."""
    explained = [set(row.tensors) for row in inspected.relations]
    places = [row for row in inspected.places if row.kind != "row" and set(row.tensors) not in explained]
    rows = [row for row in inspected.places if row.kind == "row" and len(row.message) <= _LONGEST]
    return [row.message for row in (*inspected.relations, *places, *rows)]


def _surplus(inspected: Inspected) -> list[Finding]:
    found = []
    for name, rows in inspected.surplus.items():
        text = f"{rows} rows of {name} are only in the artifact, whose vocabulary is larger: not compared"
        found.append(Finding(kind=None, leg="artifact", message=text, evidence={"tensor": name, "rows": rows}))
    if inspected.ignored:
        names = list(inspected.ignored)
        text = f"{counted(len(names), 'tensor')} of the checkpoint, of no part of this model: {listed(names)}"
        found.append(Finding(kind=None, leg="artifact", message=text, evidence={"names": names}))
    return found


def _agreement(inspected: Inspected) -> Verdict:
    keys = "every key that the forward reads" if inspected.metadata else "the metadata"
    n = sum(t.judged for t in inspected.drift.tensors)
    near = counted(
        n,
        "tensor is as near to the checkpoint's as its type allows",
        "tensors are as near to the checkpoint's as their types allow",
    )
    text = f"{near}, and {keys} agrees; no forward was run."
    return Verdict(primary="agree", all=["agree"], summary=text)


# -- one tensor ---------------------------------------------------------------------------------------


def _beyond_control(t: TensorError, measured: Measured | None, floors: Floors) -> list[str]:
    """In which measures a tensor is beyond what its type loses; empty for a sound one."""
    told = []
    if measured is not None and measured.zero_blocks:
        where = f" of experts {listed([str(e) for e in measured.zero_experts])}" if measured.zero_experts else ""
        told.append(f"{measured.zero_blocks} blocks of zeros{where}")
    if not t.error <= t.limit and not t.non_finite and (measured is not None or t.note is None):
        told.append("error")
    if t.far_rows and t.is_matrix:
        n_rows = math.prod(t.shape[:-1])
        told.append("all rows" if t.far_rows == n_rows else f"{t.far_rows} of {n_rows} rows")
    if measured is not None and measured.control is not None and math.prod(t.shape) >= _MANY and t.is_matrix:
        told += _distribution(measured.artifact, measured.control, floors)
    return told or (["values"] if t.damaged else [])


def _distribution(artifact: Measures, control: Measures, floors: Floors) -> list[str]:
    told = []
    if artifact.kl_drift > floors["artifact.kl_drift_factor"] * control.kl_drift + floors["artifact.kl_drift_floor"]:
        told.append("KL")
    if artifact.outlier_kept is not None and control.outlier_kept is not None:
        lost = control.outlier_kept - artifact.outlier_kept
        if lost > floors["artifact.outlier_band"]:
            told.append("outliers")
    return told


def _row(t: TensorError, measured: Measured | None, bpw: Mapping[str, float], floors: Floors) -> TensorMeasures:
    beyond = _beyond_control(t, measured, floors)
    artifact = measured.artifact if measured is not None else None
    control = measured.control if measured is not None else None
    limit = math.sqrt(t.limit) if t.judged and math.isfinite(t.limit) else None
    return TensorMeasures(
        name=t.name,
        type=t.type,
        shape=list(t.shape),
        layer=t.layer,
        klass=classes.class_of(t.name),
        bpw=bpw.get(t.name, 0.0),
        artifact=artifact,
        control=control,
        limit=limit,
        ratio=_ratio(artifact, control, limit),
        nan=measured.nan if measured is not None else t.non_finite,
        inf=measured.inf if measured is not None else 0,
        zero_blocks=measured.zero_blocks if measured is not None else 0,
        zero_experts=measured.zero_experts if measured is not None else [],
        far_rows=t.far_rows,
        drifted=bool(beyond) or t.non_finite > 0,
        why=_why(t, measured, beyond),
    )


def _ratio(artifact: Measures | None, control: Measures | None, limit: float | None) -> float | None:
    if artifact is None or limit is None:
        return None
    # What a float type keeps exactly has an error of 0, or next to it; the limit is then the measure.
    usual = control.error if control is not None and 2 * control.error >= limit / 2 else limit
    return artifact.error / usual if usual > 0 else 0.0 if artifact.error == 0 else math.inf


def _why(t: TensorError, measured: Measured | None, beyond: Sequence[str]) -> str | None:
    counts = ((measured.nan, "NaN"), (measured.inf, "infinite")) if measured is not None else ()
    told = [" and ".join(f"{n} {what}" for n, what in counts if n), *beyond, t.note or ""]
    return "; ".join(text for text in told if text) or None


def _excess(t: TensorError) -> float:
    return t.error / t.limit if t.limit else math.inf
