"""What exchanging parts of artifact and checkpoint comes to: findings and verdict. Pure; the numbers are in."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from diffharness.forensics import groups as grouping
from diffharness.forensics.drift import Drift
from diffharness.forensics.findings import file_findings, information, metadata_finding
from diffharness.forensics.groups import Group
from diffharness.forensics.restore import Lineage, Outcome, Rung
from diffharness.records import Finding, MetadataRow, Verdict
from diffharness.records.restore import SearchResult, Side
from diffharness.settings import Floors
from diffharness.verdict import of_findings
from diffharness.words import listed

_SHOWN = 4  # groups in a sentence
MARKS = {
    "misfit": "whichever part is exchanged with the checkpoint, in either direction, it gets worse",
    "coherent": "its parts, each alone in the checkpoint, change far less than all of them together, "
    "as training does and damage does not",
}


@dataclass
class Evidence:
    """All that the verdict rests on. `ladders` are by the side that the groups were put into."""

    kinds: Sequence[str]
    drift: Drift
    metadata: Sequence[MetadataRow]
    artifact: Outcome
    checkpoint: Outcome
    control: Outcome | None
    too_short: bool  # to tell a change from noise
    rounded_otherwise: bool  # all that differs is which levels the values took, and the logits are none the worse
    lost_more: bool  # than the control, by KL
    spread: bool = False
    lineage: Lineage | None = None
    ladders: Mapping[Side, Sequence[Rung]] = field(default_factory=dict)
    search: SearchResult | None = None

    @property
    def damaged(self) -> list[str]:
        """Tensors beyond what their types lose."""
        return [t.name for t in self.drift.tensors if t.damaged and not t.non_finite]

    @property
    def is_suspect(self) -> bool:
        """Whether the tensors or the logits are further from the checkpoint than the types explain."""
        return self.lost_more or bool(self.drift.missing) or (bool(self.damaged) and not self.rounded_otherwise)


def conclude(evidence: Evidence, floors: Floors, model: str, checkpoint: str) -> tuple[Verdict, list[Finding]]:
    """The verdict, and all findings. `model` and `checkpoint` go into suggested commands."""
    findings = [*file_findings(evidence.drift), *_of_metadata(evidence), *_of_weights(evidence, floors)]
    verdict = of_findings(findings) or _unaccused(evidence, model, checkpoint)
    if verdict.primary == "inconclusive" and verdict.next_step is None:
        verdict.next_step = _command(model, checkpoint, "--tokens 2048")
    if verdict.primary == "artifact.weights" and evidence.search is None:
        verdict.next_step = _command(model, checkpoint, "--search")
    return verdict, [*findings, *_effects(evidence), *information(evidence.drift, evidence.metadata)]


def _unaccused(evidence: Evidence, model: str, checkpoint: str) -> Verdict:
    if evidence.too_short:
        text = f"{len(evidence.artifact.nll)} scored positions are too few to tell a change from noise."
        step = _command(model, checkpoint, "--tokens 2048")
        return Verdict(primary="inconclusive", all=["inconclusive"], summary=text, next_step=step)
    if evidence.control is None:
        text = f"there is no control to judge the loss of the artifact's types by; {_scores(evidence)}."
        step = _command(model, checkpoint, "-v")
        return Verdict(primary="inconclusive", all=["inconclusive"], summary=text, next_step=step)
    text = f"the artifact loses what its types lose: {_scores(evidence)}."
    return Verdict(primary="agree", all=["agree"], summary=text)


def _of_metadata(evidence: Evidence) -> list[Finding]:
    used = [row for row in evidence.metadata if row.used]
    by_key = {next(iter(r.group.keys)): r for r in evidence.ladders.get("artifact", ()) if len(r.group.keys) == 1}
    for row in used:
        if row.key in by_key:
            row.repaired_ppl = by_key[row.key].outcome.ppl
    ppl = {"artifact": evidence.artifact.ppl, "checkpoint": evidence.checkpoint.ppl}
    return [metadata_finding(used, ppl)] if used else []


def _of_weights(evidence: Evidence, floors: Floors) -> list[Finding]:
    if not evidence.is_suspect:
        return []
    if evidence.lineage is not None and evidence.lineage.mark is not None:
        return [_other_model(evidence, evidence.lineage, floors)]
    used = any(row.used for row in evidence.metadata)
    if not evidence.damaged and not evidence.drift.missing:
        if used or any(t.note for t in evidence.drift.tensors) or any(t.non_finite for t in evidence.drift.tensors):
            return []  # these explain what was lost
        message = f"more is lost than the types explain, though no single tensor stands out: {_scores(evidence)}"
    else:
        every = [t.name for t in evidence.drift.tensors] + evidence.drift.missing
        where = grouping.in_words([Group("", frozenset(evidence.damaged))], evidence.kinds, every)
        message = (
            f"{len(evidence.damaged)} of {len(evidence.drift.tensors)} tensors are further from the checkpoint than "
            f"their types explain: {where}; {_scores(evidence)}"
        )
        if evidence.drift.missing:
            message += f"; missing from the artifact: {listed(evidence.drift.missing)}"
    if evidence.too_short:
        few = f"{len(evidence.artifact.nll)} scored positions are too few to tell damage from another model"
        return [Finding(kind="inconclusive", leg="artifact", message=f"{few}; {message}", next_step=None)]
    evidence_fields = {"tensors": evidence.damaged, "missing": evidence.drift.missing}
    return [Finding(kind="artifact.weights", leg="artifact", message=message, evidence=evidence_fields)]


def other_model(lineage: Lineage, ppl: float, ppl_checkpoint: float, floors: Floors) -> str:
    """What an artifact is whose lineage has a mark, and by what that is known."""
    assert lineage.mark is not None, "said only of another model"
    ratio = f" (additivity of KL {lineage.additivity:.2f})" if lineage.additivity is not None else ""
    is_sound = ppl <= floors["artifact.lineage_ppl"] * ppl_checkpoint
    what = "a sound model, but not" if is_sound else "a model that was trained otherwise, not"
    return f"{what} made from this checkpoint: {MARKS[lineage.mark]}{ratio}"


def _other_model(evidence: Evidence, lineage: Lineage, floors: Floors) -> Finding:
    what = other_model(lineage, evidence.artifact.ppl, evidence.checkpoint.ppl, floors)
    return Finding(
        kind="artifact.lineage",
        leg="artifact",
        message=f"{what}; {_scores(evidence)}",
        evidence={"mark": lineage.mark, "additivity": lineage.additivity},
        next_step="give the checkpoint that it was made from with --checkpoint",
    )


def _effects(evidence: Evidence) -> list[Finding]:
    """What restoring and exchanging did, as sentences."""
    findings = []
    titles: dict[Side, tuple[str, Outcome]] = {
        "artifact": ("restoring only {}: {}", evidence.artifact),
        "checkpoint": ("only {} of the artifact in the checkpoint: {}", evidence.checkpoint),
    }
    for side, rungs in evidence.ladders.items():
        text, base = titles[side]
        for rung in [r for r in rungs if r.told != "same"][:_SHOWN]:
            change = f"{base.ppl:.4g} -> {rung.outcome.ppl:.4g}"
            findings.append(Finding(kind=None, leg="artifact", message=text.format(rung.group.label, change)))
    return findings


def _scores(evidence: Evidence) -> str:
    control = f", control {evidence.control.ppl:.4f}" if evidence.control is not None else ""
    kl = f"mean KL {evidence.artifact.kl_mean:.1e}"
    kl += f" (control {evidence.control.kl_mean:.1e})" if evidence.control is not None else ""
    return f"perplexity {evidence.artifact.ppl:.4f}, checkpoint {evidence.checkpoint.ppl:.4f}{control}; {kl}"


def _command(model: str, checkpoint: str, more: str) -> str:
    return f"diffharness restore {shlex.quote(model)} --checkpoint {shlex.quote(checkpoint)} {more}"
