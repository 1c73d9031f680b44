"""Findings in, verdict out. Pure: nothing here runs, reads or measures.

`primary` is the suspect to act on first, in this order:

1. `artifact.file`: the file cannot be trusted as a container; numbers computed from it say nothing.
2. `engine.graph`, `engine.kernel`: wrong numbers from right inputs, silently, for every such file.
3. `engine.crash`: loud, so it misleads nobody, but the file cannot be used there. A crash that no
   setting survives, on a file whose metadata are wrong, is put down to the metadata first.
4. `engine.settings`: wrong numbers, but some settings give right ones.
5. `artifact.metadata` before `artifact.weights`: one key is repaired in a minute, and a wrong key makes
   sound weights look bad. Then `artifact.lineage`: the comparison was with the wrong checkpoint.
6. `tokens`: the numbers hold for the ids that were run; only texts turn into other ids. Last, because
   another lineage brings another tokenizer along.

All that holds is in `all`. Findings from numbers that a NaN in the file explains do not hold.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence

from diffharness.records import LEG_NAMES, Finding, LegName, Legs, Verdict, VerdictKind
from diffharness.words import listed

PRIORITY: tuple[VerdictKind, ...] = (
    "artifact.file",
    "engine.graph",
    "engine.kernel",
    "engine.crash",
    "engine.settings",
    "artifact.metadata",
    "artifact.weights",
    "artifact.lineage",
    "tokens",
    "inconclusive",
    "agree",
)
# Verdicts that rest on the numbers of a forward, which NaN in the file spoils.
_FROM_NUMBERS: frozenset[VerdictKind] = frozenset({"engine.graph", "engine.kernel", "engine.settings"})
# One of these must have passed before anything agrees: the others compare the engine with itself, or no numbers.
DECISIVE: tuple[LegName, ...] = ("graph", "artifact")
UNSURVIVED = "survives"  # evidence key of a crash: the settings under which the engine lives, null for none

_QUESTION: dict[LegName, str] = {
    "tokens": "the tokenizers",
    "graph": "the engine's graph",
    "kernel": "the engine's kernels",
    "settings": "the engine's settings",
    "artifact": "the artifact against a checkpoint",
}


def decide(
    findings: Sequence[Finding], legs: Legs, *, model: str = "MODEL", needs: Collection[LegName] = DECISIVE
) -> Verdict:
    """The verdict of one run.

    `model` goes into suggested commands; `needs` are the legs of which at least one must have passed
    before the run agrees (a command that runs one leg alone names that one).
    """
    kinds = {finding.kind for finding in findings if finding.kind is not None} - {"agree"}
    if "artifact.file" in kinds:
        kinds -= _FROM_NUMBERS
    if kinds - {"inconclusive"}:
        return _guilty(kinds, findings)
    status = {name: legs.get(name).status for name in LEG_NAMES}
    unexplained = "fail" in status.values()  # a failing leg has a finding; if not, nothing is certain
    if "inconclusive" in kinds or unexplained or not any(status[name] == "pass" for name in needs):
        return _inconclusive(legs, findings, model, needs)
    return Verdict(primary="agree", all=["agree"], summary=_agreement(legs), next_step=_next_step(legs, model))


def of_findings(findings: Sequence[Finding]) -> Verdict | None:
    """The verdict where findings alone decide, of a command without legs; None where none of them accuses."""
    kinds = {finding.kind for finding in findings if finding.kind is not None}
    return _guilty(kinds, findings) if kinds else None


def exit_code(verdict: Verdict, findings: Sequence[Finding] = ()) -> int:
    """0 agree, 1 any guilty suspect, 2 a file that could not be read at all, 125 inconclusive.

    A finding of `artifact.file` that belongs to no leg is one from opening the file; NaN inside of a
    readable file was found by a leg, and is a verdict like the others.
    """
    if any(finding.kind == "artifact.file" and finding.leg is None for finding in findings):
        return 2
    return {"agree": 0, "inconclusive": 125}.get(verdict.primary, 1)


def _guilty(kinds: Collection[VerdictKind], findings: Sequence[Finding]) -> Verdict:
    """Inconclusive only where nothing else is."""
    ordered = _ordered(kinds, findings)
    guilty: list[VerdictKind] = [kind for kind in ordered if kind != "inconclusive"] or ordered
    lead = next(finding for finding in findings if finding.kind == guilty[0])
    also = f" Also: {', '.join(guilty[1:])}." if guilty[1:] else ""
    return Verdict(primary=guilty[0], all=guilty, summary=_sentence(lead.message) + also, next_step=lead.next_step)


def _ordered(kinds: Collection[VerdictKind], findings: Sequence[Finding]) -> list[VerdictKind]:
    order = list(PRIORITY)
    crashes = [finding for finding in findings if finding.kind == "engine.crash"]
    if crashes and all(finding.evidence.get(UNSURVIVED) is None for finding in crashes):
        order.remove("engine.crash")
        order.insert(order.index("artifact.metadata") + 1, "engine.crash")
    return sorted(kinds, key=order.index)


def _inconclusive(legs: Legs, findings: Sequence[Finding], model: str, needs: Collection[LegName]) -> Verdict:
    leading = next((finding for finding in findings if finding.kind == "inconclusive"), None)
    missing = [f"{name}: {legs.get(name).reason}" for name in needs if legs.get(name).reason]
    if leading is not None:
        summary = _sentence(leading.message)
    else:
        summary = _sentence("nothing decisive was compared" + (f" ({'; '.join(missing)})" if missing else ""))
    step = (leading.next_step if leading else None) or _next_step(legs, model) or "diffharness doctor"
    return Verdict(primary="inconclusive", all=["inconclusive"], summary=summary, next_step=step)


def _agreement(legs: Legs) -> str:
    passed = [name for name in LEG_NAMES if legs.get(name).status == "pass"]
    absent = [_QUESTION[name] for name in LEG_NAMES if legs.get(name).status == "not_run"]
    if legs.kernel.status == "pass" and legs.kernel.without:
        nodes = listed([f"{each.count} {each.op}" for each in legs.kernel.without], 6)
        absent.append(f"nodes without a replay ({nodes} of {legs.kernel.nodes_total})")
    if legs.settings.status == "pass" and legs.settings.reason:
        absent.append(f"some settings ({legs.settings.reason})")
    text = f"everything that was compared agrees ({', '.join(passed)})"
    if legs.graph.conventions:
        text += f", the graph with ggml's conventions {', '.join(legs.graph.conventions)}"
    return _sentence(text + (f"; not compared: {', '.join(absent)}" if absent else ""))


def _next_step(legs: Legs, model: str) -> str | None:
    """The command that would tell more where nobody is guilty: what is missing most is a checkpoint."""
    if legs.artifact.status == "not_run" and not legs.artifact.tensors:
        return f"diffharness run {shlex.quote(model)} --checkpoint DIR"
    return None


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."
