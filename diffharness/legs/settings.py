"""The settings leg: the same engine, twice, under settings that must not matter.

Two runs that compute in the same way must give the same bits, or nearly: such a pair has a floor. Two runs that
round differently (another order of sums, another kernel for another batch, flash attention) differ by as much
as either differs from the strict engine, which rounds least; that distance, measured on the same tokens, is their
control. It is the smaller one of the two runs' distances, token by token, so that a run that is wrong cannot
excuse itself. A lossy type of the KV cache has a control of its own: the same rounding made by our code.

A pair is judged over all tokens and at every single one, since a fault may touch only those past a boundary.
Floors: `settings.<class>` for each `FloorClass`, with `_token` behind for single tokens, and the factors
`settings.factor` and `settings.token_factor` that a control is multiplied by.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from diffharness.legs.compare import logit_stats
from diffharness.metrics import LogitComparison
from diffharness.records import Divergence, Finding, SettingsLeg, SettingsPair
from diffharness.settings import Floors

CALLBACK = ("callback off", "callback on")

# same: nothing changes the arithmetic. rounding: other order of sums, another kernel, other precision of some steps.
FloorClass = Literal["same", "rounding"]

# Percentile of a control's tokens that any token may reach, or their mean where few tokens make it: two runs need not
# be off at the same ones.
USUAL = 95

Series = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class SettingsOutcome:
    leg: SettingsLeg
    first_divergence: Divergence | None
    findings: list[Finding]


# -- one pair -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Control:
    """What an honest difference is: NMSE over all tokens, and at each of them [n_tokens]; nan where not known."""

    nmse: float
    tokens: Series

    @classmethod
    def nearer(cls, a: LogitComparison, b: LogitComparison, n_tokens: int) -> Control:
        """From two runs' distances to the strict engine: the smaller one everywhere."""
        return cls(min(a.nmse, b.nmse), np.fmin(_by_token(a, n_tokens), _by_token(b, n_tokens)))

    @classmethod
    def of(cls, logits: LogitComparison, n_tokens: int) -> Control:
        """The distance of one run that is known to be honest."""
        return cls(logits.nmse, _by_token(logits, n_tokens))

    def larger(self, other: Control) -> Control:
        """Of two honest differences the larger one everywhere."""
        return Control(max(self.nmse, other.nmse), np.fmax(self.tokens, other.tokens))


@dataclass(frozen=True)
class Bound:
    """What the NMSE of a pair may be at most: over all tokens, and at each compared one [k].

    Up to `isolated` tokens may be at `outlier`: what honest runs do to a token that no rounding leaves as it is.
    """

    nmse: float
    tokens: Series
    isolated: int = 0
    outlier: float = 0.0


@dataclass(frozen=True)
class Judgement:
    """`above` are fixture rows over their bound; `first` is the first of them, or the worst one of a failing mean."""

    ok: bool
    above: NDArray[np.int64]
    first: int | None
    bound: Bound


def bound(floor: FloorClass, control: Control | None, rows: NDArray[np.int64], floors: Floors) -> Bound:
    """The bound at fixture rows `rows`; without a control, or where it is not finite, the class's floor alone."""
    least, least_token = floors[f"settings.{floor}"], floors[f"settings.{floor}_token"]
    tokens = np.full(rows.size, least_token)
    if control is None or not np.isfinite(control.nmse):
        return Bound(least, tokens)
    finite = control.tokens[np.isfinite(control.tokens)]
    usual = max(control.nmse, float(np.percentile(finite, USUAL))) if finite.size else 0.0
    here = control.tokens[rows]
    tokens += floors["settings.token_factor"] * np.where(np.isfinite(here), np.maximum(here, usual), usual)
    share, factor = floors.get("settings.isolated_share", 0.0), floors["settings.factor"]
    isolated = max(1, int(share * rows.size)) if share > 0 else 0
    return Bound(least + factor * control.nmse, tokens, isolated, factor * float(finite.max(initial=0.0)))


def judge_logits(
    logits: LogitComparison, limit: Bound, *, leave_out: BoolArray | None = None, passed_on: Series | None = None
) -> Judgement:
    """Whether a comparison stays within its bound; `leave_out` [k] are tokens that something else explains.

    `passed_on` [k] is how far off others may be on their account, 0 for nothing. With tokens left out the mean is over
    those that neither is true of, of their own NMSE.
    """
    keep = np.ones(logits.rows.size, dtype=np.bool_) if leave_out is None else ~leave_out
    own = keep if passed_on is None else keep & (passed_on == 0)
    if passed_on is not None:
        limit = replace(limit, tokens=np.maximum(limit.tokens, passed_on))
    above = keep & ~(logits.nmse_series <= limit.tokens)
    if above.sum() <= limit.isolated:
        above &= ~(logits.nmse_series <= limit.outlier)
    series = np.where(own, logits.nmse_series, 0.0)
    mean = logits.nmse if own.all() else float(series.sum() / max(1, own.sum()))
    ok = not above.any() and mean <= limit.nmse
    first = None if ok else int(logits.rows[np.flatnonzero(above)[0] if above.any() else series.argmax()])
    return Judgement(ok, logits.rows[above], first, limit)


def passed_on(error: Series, flipped: BoolArray, chunk_of: NDArray[np.int64]) -> Series:
    """How far off a token [k] may be by attention to flipped ones before it in its chunk: as the worst of them."""
    own = np.where(flipped & np.isfinite(error), error, 0.0)
    found = np.zeros(own.size)
    for chunk in np.unique(chunk_of):
        at = np.flatnonzero(chunk_of == chunk)
        found[at[1:]] = np.maximum.accumulate(own[at])[:-1]
    return found


def judge_pair(a: str, b: str, logits: LogitComparison, *, floor: float, first_tap: str | None = None) -> SettingsPair:
    """One pair: the engine under settings `a` (ref) and under settings `b` (other), at fixture rows `logits.rows`."""
    judged = judge_logits(logits, Bound(floor, np.full(logits.rows.size, floor)))
    return as_pair(a, b, logits, judged, first_tap=first_tap)


def as_pair(
    a: str, b: str, logits: LogitComparison, judged: Judgement, *, first_tap: str | None = None
) -> SettingsPair:
    """The record's part of a judged pair."""
    at = None if judged.first is None else int(np.flatnonzero(logits.rows == judged.first)[0])
    return SettingsPair(
        a=a,
        b=b,
        ok=judged.ok,
        logits=logit_stats(logits),
        nmse=logits.nmse,
        floor=judged.bound.nmse,
        first_tap=None if judged.ok else first_tap or "logits",
        first_token=judged.first,
        token_nmse=None if at is None else float(logits.nmse_series[at]),
        token_floor=None if at is None else float(judged.bound.tokens[at]),
    )


# -- the leg ------------------------------------------------------------------------------------------


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
    place = f"first at token {pair.first_token}"
    if pair.token_nmse is not None and pair.nmse <= pair.floor:  # the mean hides it
        place += f" with {pair.token_nmse:.1e} (floor {pair.token_floor or 0.0:.0e})"
    tap = f", tap {pair.first_tap}" if pair.first_tap not in (None, "logits") else ""
    return f"{pair.a} against {pair.b}: logits NMSE {pair.nmse:.1e} (floor {pair.floor:.0e}), {place}{tap}" + (
        f"; {pair.note}" if pair.note else ""
    )


def _by_token(logits: LogitComparison, n_tokens: int) -> Series:
    tokens = np.full(n_tokens, np.nan)
    tokens[logits.rows] = logits.nmse_series
    return tokens
