"""What would make the reference reproduce an engine that fails the graph leg: a search among hypotheses.

Local first. At the first diverging place (the embedding, a layer, the head) every hypothesis that can show there is
tried on the engine's own input of that place. Those that bring every tap of it to its floor go through the whole
model, locally and end to end; where one holds in some places and breaks others, it is supposed in the former only.
What still fails then is searched in the same way, on top of what was found. A search never changes a verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffharness.layers import describe_layers
from diffharness.legs._facts import facts_of
from diffharness.legs._graph_pass import PassResult
from diffharness.legs._trials import UNFIT, Budget, BudgetSpentError, LocalTrials, Trial, alike
from diffharness.records.explain import Explanation, Fit, HypothesisRow
from diffharness.reference.hypotheses import Place, only_at
from diffharness.reference.local import Chunk
from diffharness.reference.steps import Steps
from diffharness.taps import split
from diffharness.words import listed

__all__ = ["Budget", "LocalTrials", "search"]

_ROUNDS = 3  # places that may be wrong for reasons of their own
_VERIFIED = 6  # hypotheses of one place that go through the whole model

WholePass = Callable[[Steps], PassResult]
ChunksAt = Callable[[Place, int | None], Sequence[Chunk]]
"""The chunks to try a place on: which place, and the first row that fails."""


@dataclass(frozen=True)
class _Verified:
    """A trial after the whole model: with `places` it is supposed at these only."""

    trial: Trial
    model: Steps
    result: PassResult
    places: frozenset[Place] | None

    @property
    def key(self) -> tuple[bool, int, bool]:
        return not self.result.ok, len(self.result.failing), self.places is not None


def search(trials: LocalTrials, model: Steps, before: PassResult, whole: WholePass, chunks: ChunksAt) -> Explanation:
    """Explain `before`, a failing pass of `model`; `whole` makes the same pass of another model."""
    budget, per_pass = trials.budget, model.n_layer + 2
    base, result = model, before
    steps: list[_Verified] = []
    rows: list[HypothesisRow] = []
    for _ in range(_ROUNDS):
        if not result.failing:
            break
        found = _round(trials, base, result, whole, chunks, per_pass)
        if not rows:
            rows = [_row(one, before, trials.kinds) for one in found]
        if not found or len(found[0].result.failing) >= len(result.failing):
            break
        steps.append(found[0])
        base, result = found[0].model, found[0].result
    if len(steps) > 1:
        rows.insert(0, _together(steps, before, trials.kinds))
    rows = _marked(rows)
    solved = bool(rows) and rows[0].fits == "yes"
    facts = None
    if not solved and result.failing:
        place = place_of(result.failing[0].tap)
        facts = facts_of(trials, base, place, result.failing[0], chunks(place, result.failing[0].first_token))
    return Explanation(
        answer=_answer(rows, facts.words if facts else [], budget),
        found=solved,
        hypotheses=rows,
        facts=facts,
        tried=budget.tried,
        evaluations=budget.spent,
        budget=budget.most,
        exhausted=budget.exhausted,
    )


def place_of(tap: str) -> Place:
    """Where in the forward a tap is made."""
    layer, name = split(tap)
    return layer if layer is not None else "embed" if name == "token_embd" else "head"


def _round(
    trials: LocalTrials, base: Steps, result: PassResult, whole: WholePass, chunks: ChunksAt, per_pass: int
) -> list[_Verified]:
    """The hypotheses that repair the first failing place, after the whole model; the best first.

    They are tried on a part of the text. Where what fits there fails at the same place further on, they are tried once
    more on a part that reaches that far.
    """
    first = result.failing[0]
    place, row = place_of(first.tap), first.first_token
    trials.reserve = per_pass
    found: list[_Verified] = []
    for _ in range(2):
        found = _on(trials, base, result, whole, place, chunks(place, row), per_pass)
        later = next((tap for tap in found[0].result.failing if place_of(tap.tap) == place), None) if found else None
        if later is None or (later.first_token or 0) <= (row or 0):
            break
        row = later.first_token
    return found


def _on(
    trials: LocalTrials,
    base: Steps,
    result: PassResult,
    whole: WholePass,
    place: Place,
    chunks: Sequence[Chunk],
    per_pass: int,
) -> list[_Verified]:
    try:
        candidates = trials.search(base, place, chunks)
    except BudgetSpentError:
        return []
    verified: list[_Verified] = []
    for trial in candidates[:_VERIFIED]:
        if any(one.result.ok and not _worth(trial, one.trial) for one in verified):
            continue
        try:
            trials.budget.spend(per_pass)
            verified.append(_verify(trial, base, result, whole, trials, per_pass))
        except BudgetSpentError:
            break
        except UNFIT:
            continue
    order = {id(trial): i for i, trial in enumerate(candidates)}
    found = sorted(verified, key=lambda one: (*one.key, order[id(one.trial)]))
    if found and found[0].result.ok and found[0].places is None:
        return [one for one in found if one.places is None]  # what had to be restricted says the same in more words
    return found


def _worth(trial: Trial, found: Trial) -> bool:
    """Whether a trial may still be as good an explanation as one that was found: as near, and as little fitted."""
    return alike(trial.after, found.after) and trial.fitted <= found.fitted


def _verify(
    trial: Trial, base: Steps, before: PassResult, whole: WholePass, trials: LocalTrials, per_pass: int
) -> _Verified:
    after = whole(trial.model)
    failed, fails = _places(before), _places(after)
    broken = fails - failed
    if not broken or not failed - fails:
        return _Verified(trial, trial.model, after, None)
    everywhere: set[Place] = {"embed", "head", *range(base.n_layer)}
    held = frozenset(everywhere - broken)
    mixed = only_at(base, trial.model, held)
    trials.budget.spend(per_pass)
    return _Verified(trial, mixed, whole(mixed), frozenset(failed - fails))


def _places(result: PassResult) -> set[Place]:
    return {place_of(row.tap) for row in result.failing}


# -- rows and words -----------------------------------------------------------------------------------


def _row(one: _Verified, before: PassResult, kinds: Sequence[str]) -> HypothesisRow:
    trial, left = one.trial, [row.tap for row in one.result.failing]
    fits: Fit = "yes" if one.result.ok else "partly" if len(left) < len(before.failing) else "no"
    return HypothesisRow(
        names=[h.name for h in trial.hypotheses],
        says=trial.says,
        fits=fits,
        fitted=any(h.fitted for h in trial.hypotheses),
        tap=trial.tap,
        local_before=trial.before,
        local_after=trial.after,
        worst_after=trial.worst,
        places=_words(one.places, kinds),
        remaining=left,
        logits_before=before.logits.nmse if before.logits else None,
        logits_after=one.result.logits.nmse if one.result.logits else None,
    )


def _words(places: frozenset[Place] | None, kinds: Sequence[str]) -> str | None:
    """`only layers 3, 7`; None for everywhere."""
    if places is None:
        return None
    layers = {place for place in places if isinstance(place, int)}
    outside = sorted(str(place) for place in places if not isinstance(place, int))
    return ", ".join([*([describe_layers(layers, kinds)] if layers else []), *outside])


def _together(steps: Sequence[_Verified], before: PassResult, kinds: Sequence[str]) -> HypothesisRow:
    """Hypotheses of several places, each on top of the one before."""
    rows = [_row(step, before, kinds) for step in steps]
    says = ", and ".join(map(supposed, rows))
    last = rows[-1]
    return rows[0].model_copy(
        update={
            "names": [name for row in rows for name in row.names],
            "says": says,
            "fits": last.fits,
            "fitted": any(row.fitted for row in rows),
            "places": None,
            "remaining": last.remaining,
            "logits_after": last.logits_after,
        }
    )


def _marked(rows: Sequence[HypothesisRow]) -> list[HypothesisRow]:
    """Rows that are as good as the first one say so."""
    if not rows or rows[0].fits != "yes":
        return list(rows)
    best = rows[0].local_after
    return [
        row.model_copy(update={"equal": i > 0 and row.fits == "yes" and alike(row.local_after, best)})
        for i, row in enumerate(rows)
    ]


def _answer(rows: Sequence[HypothesisRow], facts: Sequence[str], budget: Budget) -> str:
    if rows and rows[0].fits == "yes":
        best = rows[0]
        also = [row.says for row in rows if row.equal]
        told = f", or as if {'; or as if '.join(also)}: indistinguishable on this fixture" if also else ""
        return f"the engine behaves as if {supposed(best)}: {numbers(best)}{told}"
    ended = f" The search ended at its bound of {budget.most} evaluations of a layer." if budget.exhausted else ""
    known = f" Known is: {'; '.join(facts)}." if facts else ""
    if rows and rows[0].fits == "partly":
        best = rows[0]
        rest = listed(best.remaining, 3)
        return (
            f"no hypothesis explains everything; in part the engine behaves as if {supposed(best)}: {numbers(best)}, "
            f"while {rest} still differ{'s' if len(best.remaining) == 1 else ''}.{known}{ended}"
        )
    return f"none of the {budget.tried} hypotheses that were tried fits.{known}{ended}"


def supposed(row: HypothesisRow) -> str:
    """What is supposed, and where."""
    return f"{row.says} ({row.places})" if row.places else row.says


def numbers(row: HypothesisRow) -> str:
    """`NMSE 3.1e-01 -> 4.0e-13 at logits, ...`."""
    text = f"NMSE {row.local_before:.1e} -> {row.local_after:.1e} at {row.tap}"
    if row.logits_before is not None and row.logits_after is not None:
        text += f", of the logits end to end {row.logits_before:.1e} -> {row.logits_after:.1e}"
    return text
