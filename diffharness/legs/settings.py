"""The settings leg: the same engine, twice, under settings that must not matter.

In every run: with and without the evaluation callback that the capture hangs on. Asking for nodes
splits the graph's execution and can hide a fusion bug, so what was captured is only evidence if the
uncaptured run says the same.

Floor: `settings.callback` (NMSE over all logits, and of any one position).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from diffharness.legs.compare import logit_stats
from diffharness.metrics import LogitComparison
from diffharness.records import Divergence, Finding, SettingsLeg, SettingsPair

CALLBACK = ("callback off", "callback on")


@dataclass(frozen=True)
class SettingsOutcome:
    leg: SettingsLeg
    first_divergence: Divergence | None
    findings: list[Finding]


def judge_pair(a: str, b: str, logits: LogitComparison, *, floor: float, first_tap: str | None = None) -> SettingsPair:
    """One pair: the engine under settings `a` (ref) and under settings `b` (other), at fixture rows `logits.rows`."""
    above = np.flatnonzero(~(logits.nmse_series <= floor))
    ok = above.size == 0 and logits.nmse <= floor
    worst = int(above[0]) if above.size else int(logits.nmse_series.argmax())
    return SettingsPair(
        a=a,
        b=b,
        ok=ok,
        logits=logit_stats(logits),
        nmse=logits.nmse,
        floor=floor,
        first_tap=None if ok else first_tap or "logits",
        first_token=None if ok else int(logits.rows[worst]),
    )


def judge(pairs: Iterable[SettingsPair], *, reason: str | None = None) -> SettingsOutcome:
    """The leg from its pairs; without any pair it did not run, for `reason`."""
    compared: Sequence[SettingsPair] = list(pairs)
    if not compared:
        return SettingsOutcome(SettingsLeg(reason=reason or "no two settings were compared"), None, [])
    failing = [pair for pair in compared if not pair.ok]
    leg = SettingsLeg(
        status="fail" if failing else "pass",
        reason=reason,
        logits=max(compared, key=lambda pair: pair.nmse).logits,
        pairs=list(compared),
    )
    if not failing:
        return SettingsOutcome(leg, None, [])
    first = failing[0]
    leg.reason = _message(first)
    divergence = Divergence(leg="settings", tap=first.first_tap or "logits", token=first.first_token, nmse=first.nmse)
    findings = [
        Finding(
            kind="engine.settings",
            leg="settings",
            message=f"a setting that must not matter matters: {_message(pair)}",
            evidence=pair.model_dump(),
        )
        for pair in failing
    ]
    return SettingsOutcome(leg, divergence, findings)


def _message(pair: SettingsPair) -> str:
    return (
        f"{pair.a} against {pair.b}: logits NMSE {pair.nmse:.1e} (floor {pair.floor:.0e}), "
        f"first at token {pair.first_token}"
    )
