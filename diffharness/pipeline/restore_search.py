"""The smallest set of groups whose restoration brings the artifact's perplexity near to a sound one's."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from diffharness.forensics import groups as grouping
from diffharness.forensics.delta import Smallest, smallest
from diffharness.forensics.drift import Drift
from diffharness.forensics.groups import Group, joined
from diffharness.forensics.restore import Outcome
from diffharness.pipeline.exchanging import Exchange
from diffharness.records.restore import MixtureScore, SearchResult


@dataclass(frozen=True)
class Task:
    """What is searched for. `groups` are those to search among; None: by class, then by ever smaller blocks of layers.

    `within` is the distance allowed to the target, as a share of its perplexity.
    """

    kinds: Sequence[str]
    keys: Collection[str]  # of the metadata, that differ and are used
    groups: Sequence[Group] | None
    within: float
    budget: int  # forwards


def search(exchange: Exchange, drift: Drift, control: Outcome | None, task: Task) -> SearchResult:
    """Delta debugging from everything that drifted, or from everything, down.

    The target is the control's perplexity where that is the higher one: quantization's own loss need not be repaired.
    """
    mixtures, meter, started = exchange.mixtures, exchange.meter, exchange.mixtures.count.forwards
    from_control = control is not None and control.ppl > exchange.checkpoint.ppl
    target = control.ppl if control is not None and from_control else exchange.checkpoint.ppl
    meter.planned = started + task.budget

    def enough(units: frozenset[Group]) -> bool | None:
        whole = joined(units)
        if mixtures.count.forwards - started >= task.budget and not mixtures.is_known(whole):
            return None
        meter.doing = f"{len(units)} groups restored"
        return mixtures.of(whole).ppl <= target * (1 + task.within)

    some, all_of_them = _units(exchange, drift, task)
    units = some if enough(frozenset(some)) else all_of_them
    reached = bool(enough(frozenset(units)))
    found: Smallest[Group] = Smallest(units, minimal=False, finest=False, tests=0)
    if reached:
        found = smallest(units, enough, grouping.halves)
    best = joined(found.units)
    return SearchResult(
        target=target,
        target_of="control" if from_control else "checkpoint",
        within=task.within,
        reached=reached,
        words=grouping.in_words(found.units, task.kinds, mixtures.names),
        tensors=sorted(best.tensors),
        keys=sorted(best.keys),
        groups=[group.label for group in found.units],
        score=score(mixtures.of(best)) if mixtures.is_known(best) else None,
        minimal=found.minimal,
        finest=found.finest,
        forwards=mixtures.count.forwards - started,
        budget=task.budget,
    )


def _units(exchange: Exchange, drift: Drift, task: Task) -> tuple[list[Group], list[Group]]:
    """Groups with drifted tensors only, and groups of every tensor that differs.

    The least drifted come first, to be left out first; metadata keys come last.
    """
    differing = exchange.mixtures.names - exchange.mixtures.equal
    drifted = frozenset(t.name for t in drift.tensors if t.damaged) | frozenset(drift.missing)
    weight = {t.name: t.excess * math.prod(t.shape) for t in drift.tensors}
    keys = grouping.of_keys(task.keys)

    def units(tensors: frozenset[str]) -> list[Group]:
        if task.groups is None:
            found = grouping.by_class(tensors)
        else:
            found = [group for group in grouping.limited(task.groups, tensors) if group.tensors]
        return [*sorted(found, key=lambda group: sum(weight.get(name, 0.0) for name in group.tensors)), *keys]

    return units(differing & drifted), units(differing)


def score(outcome: Outcome) -> MixtureScore:
    """An outcome as the record has it."""
    return MixtureScore(ppl=outcome.ppl, nll=outcome.nll_mean, n=len(outcome.nll), kl_mean=outcome.kl_mean)
