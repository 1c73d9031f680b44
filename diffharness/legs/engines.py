"""Several engines against the first of them: the same file and fixture, native and strict.

The first has legs of its own. Of another one its strict run, on the same F32 file, is held against the reference:
there only the graph can differ, and which of two engines is wrong is plain, unless rounding grows to that size in the
model: then both are as far off, or, where a router chose other experts on a near tie, only few tokens are. Its native
run is held against the first's, and differs honestly as far as rounding goes: by as much as either differs from its own
strict run.
What is further away is not decided here: the engine's own legs do that.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field

import numpy as np

from diffharness.legs.compare import logit_stats
from diffharness.legs.settings import Control, bound, judge_logits
from diffharness.metrics import FloatArray, IntArray, compare_logits, nmse
from diffharness.records import EngineRow, Finding
from diffharness.settings import Floors

STRICT = "engines.strict"
SAME = "compare.nmse"
GRAPH = "graph.logits"
FACTOR = "settings.factor"  # of two distances that rounding makes alike


@dataclass(frozen=True)
class EngineLogits:
    """One engine's logits, each [n_tokens, n_vocab]; strict ones are None where that run did not come to an end."""

    native: FloatArray
    strict: FloatArray | None


@dataclass(frozen=True)
class Judged:
    """The row's numbers are set; `findings` say what follows."""

    row: EngineRow
    findings: list[Finding] = field(default_factory=list)


def judge(
    row: EngineRow,
    first: EngineRow,
    logits: EngineLogits,
    of_first: EngineLogits,
    reference: FloatArray | None,
    scored: IntArray,
    floors: Floors,
    *,
    first_passes: bool,
    model: str,
    routed: bool = False,
) -> Judged:
    """One engine after the first. `first_passes` says whether the first's own graph leg passed.

    `routed` is whether the model has experts.
    """
    compared = compare_logits(of_first.native, logits.native, scored)
    row.logits = logit_stats(compared)
    row.status = "same" if compared.nmse <= floors[SAME] else "differs"
    command = shlex.join(["diffharness", "run", model, "--engine", row.name])
    findings: list[Finding] = []
    control, few = None, False
    if logits.strict is not None and of_first.strict is not None:
        row.strict_from_first = nmse(logits.strict[scored], of_first.strict[scored])
        if reference is not None:
            row.strict = nmse(logits.strict[scored], reference[scored])
            series = compare_logits(reference, logits.strict, scored).nmse_series
            few = routed and float(np.median(series)) <= floors[GRAPH]
        findings += _graph(row, first, floors, first_passes=first_passes, few=few, command=command)
        first_noise, noise = (
            compare_logits(strict, native, scored)
            for strict, native in ((of_first.strict, of_first.native), (logits.strict, logits.native))
        )
        control = Control.nearer(first_noise, noise, len(logits.native))
    judged = judge_logits(compared, bound("rounding", control, compared.rows, floors))
    if row.status == "differs" and not findings:  # other graphs explain other numbers
        flips = routed and judged.above.size < compared.rows.size / 2
        findings.append(_rounding(row, first, judged.ok, judged.bound.nmse, command, flips=flips))
    return Judged(row, findings)


def _graph(
    row: EngineRow, first: EngineRow, floors: Floors, *, first_passes: bool, few: bool, command: str
) -> list[Finding]:
    """What the strict runs say: nothing where they agree. `few` tokens off may be experts' near ties."""
    apart = row.strict_from_first or 0.0
    if apart <= floors[STRICT]:
        return []
    evidence = row.model_dump(mode="json")
    said = f"strict runs of {row.name} and {first.name} differ by NMSE {apart:.1e} (floor {floors[STRICT]:.0e})"
    if row.strict is None or first.strict is None:
        return [_undecided(f"{said}, and there is no reference to say which is right", evidence, command)]
    distances = f"from the reference {row.strict:.1e} and {first.strict:.1e}"
    if first_passes and row.strict <= floors[FACTOR] * first.strict:
        return []  # no more than the order of sums leaves in this model
    if first_passes and few and row.strict > floors[GRAPH]:
        return [_undecided(f"{said}, {distances}, at few tokens: experts may have changed", evidence, command)]
    if first_passes and row.strict > floors[GRAPH]:
        message = f"{row.name} computes something else than the model, and {first.name} does not: {said}, {distances}"
        return [Finding(kind="engine.graph", leg=None, message=message, evidence=evidence, next_step=command)]
    if not first_passes and row.strict < first.strict:
        message = f"{row.name} is nearer to the model than {first.name}: {said}, {distances}"
        return [Finding(kind=None, leg=None, message=message, evidence=evidence, next_step=command)]
    return [_undecided(f"{said}, {distances}", evidence, command)]


def _rounding(row: EngineRow, first: EngineRow, ok: bool, limit: float, command: str, *, flips: bool) -> Finding:
    """What the native runs say; `flips` is whether a few other choices of experts may be all of it."""
    assert row.logits is not None
    said = f"native runs of {row.name} and {first.name} differ by NMSE {row.logits.nmse:.1e}"
    at = "" if row.first_tap is None else f", first at {row.first_tap}, token {row.first_token}"
    evidence = row.model_dump(mode="json")
    if not ok and flips:
        message = f"{said}{at}: at few tokens more than rounding explains ({limit:.0e}), as where experts nearly tie"
        return Finding(kind=None, leg=None, message=message, evidence=evidence, next_step=command)
    if not ok:
        return _undecided(f"{said}{at}: more than rounding explains ({limit:.0e})", evidence, command)
    message = f"{said}{at}: no more than rounding explains ({limit:.0e})"
    return Finding(kind=None, leg=None, message=message, evidence=evidence)


def _undecided(message: str, evidence: dict[str, object], command: str) -> Finding:
    return Finding(kind="inconclusive", leg=None, message=message, evidence=evidence, next_step=command)
