"""What exchanging parts between an artifact and its checkpoint says: how much each part matters, and whose it is.

Pure: outcomes of mixtures come from a callable. Parts of the checkpoint are put into the artifact ("restored"), and
parts of the artifact into the checkpoint ("harm"). Damage gets better as parts are restored, and each damaged part does
harm by itself. A model that was trained otherwise is told from that by either of two marks:

misfit    whichever part is exchanged, in either direction, it gets worse: the parts belong together
coherent  the parts together change far more than the sum of what each changes alone. Differences that know nothing of
          each other (quantization, noise, damage) add up, as long as they are small: the KL of the whole is the sum of
          the KLs of the parts. Training moves all parts in one direction, and the whole grows with its square.

Floors: `restore.told`, `restore.misfit`, `restore.coherent`, `artifact.kl_factor`, `artifact.kl_floor`,
`artifact.lineage_share`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffharness.forensics.drift import Drift
from diffharness.forensics.groups import Group, family
from diffharness.forensics.lineage import differs_everywhere
from diffharness.forensics.loss import KlLimits
from diffharness.metrics import Float64Array, IntArray, mean_nll, perplexity
from diffharness.paired import paired
from diffharness.records.grade import Paired
from diffharness.settings import Floors

Told = Literal["better", "worse", "same"]
Mark = Literal["misfit", "coherent"]

_FEWEST_PARTS = 3  # moved parts that a mark of lineage needs
_MOST = 2 / 3  # of them; what hardly differs (norms) may be lost in the noise


@dataclass(frozen=True)
class Outcome:
    """One mixture at the scored positions [n], in nats: NLL, and KL from the checkpoint to it."""

    nll: Float64Array
    kl: Float64Array

    @property
    def ppl(self) -> float:
        return perplexity(self.nll)

    @property
    def nll_mean(self) -> float:
        return mean_nll(self.nll)

    @property
    def kl_mean(self) -> float:
        return mean_nll(self.kl)

    @property
    def kl_median(self) -> float:
        return float(np.median(self.kl))


Evaluate = Callable[[frozenset[Group]], Outcome]
"""The outcome of a mixture in which these groups were exchanged."""


@dataclass(frozen=True)
class Rung:
    """One group exchanged alone. `change` is its NLL less the base's; `told` whether that is more than noise."""

    group: Group
    outcome: Outcome
    change: Paired
    told: Told

    @property
    def moved(self) -> bool:
        """Whether the exchange changed anything at all."""
        return self.change.mean != 0.0


@dataclass(frozen=True)
class Lineage:
    """`mark` is None where nothing speaks for another model; `additivity` is None where it cannot be said."""

    mark: Mark | None
    additivity: float | None


def ladder(
    groups: Iterable[Group], evaluate: Evaluate, base: Outcome, chunk_of: IntArray, floors: Floors
) -> list[Rung]:
    """Every group exchanged alone, by perplexity, lowest first. `chunk_of` [n] is each scored position's chunk."""
    rungs = []
    for group in groups:
        outcome = evaluate(frozenset({group}))
        change = paired(outcome.nll, base.nll, chunk_of)
        rungs.append(Rung(group, outcome, change, told(change, floors)))
    return sorted(rungs, key=lambda rung: rung.outcome.nll_mean)


def is_spread(drift: Drift, floors: Floors, *, logits_moved: bool) -> bool:
    """Whether the tensors differ from the checkpoint's all over, as those of another model do, beyond what types lose.

    So they do where `forensics.lineage` finds them different everywhere alike, or where matrices of every layer, of
    several classes, or nearly all vectors are. Not where each was multiplied with a constant: nobody trains that.
    """
    matrices = [t for t in drift.tensors if t.is_matrix and t.judged]
    vectors = [t for t in drift.tensors if not t.is_matrix and t.judged]
    damaged = [t for t in matrices if t.damaged]
    rescaled = [t for t in damaged if t.cos**2 > 0.5 and 1 - t.cos**2 <= 0.5 * t.error]  # alike, and most of it is size
    if damaged and 2 * len(rescaled) >= len(damaged):
        return False
    if differs_everywhere(drift.tensors, floors, logits_moved=logits_moved):
        return True
    beyond = [*damaged, *(t for t in vectors if t.damaged)]
    if len({family(t.name) for t in beyond}) < _FEWEST_PARTS:
        return False
    in_every_layer = {t.layer for t in damaged} >= {t.layer for t in matrices if t.layer is not None}
    nearly_all = len(beyond) - len(damaged) >= floors["artifact.lineage_share"] * len(vectors) > 0
    return in_every_layer or nearly_all


def told(change: Paired, floors: Floors) -> Told:
    """Better or worse, where the change is beyond `restore.told` times the limit of a single comparison."""
    if not np.isfinite(change.mean):
        return "same" if np.isnan(change.mean) else "worse" if change.mean > 0 else "better"
    if change.error is None or change.z is None or change.critical is None:
        exact = change.error == 0.0 and change.mean != 0.0
        return "same" if not exact else "worse" if change.mean > 0 else "better"
    if abs(change.z) <= floors["restore.told"] * change.critical:
        return "same"
    return "worse" if change.mean > 0 else "better"


def is_too_short(change: Paired) -> bool:
    """Whether there are too few positions to tell a change from noise."""
    return change.error is None and bool(np.isfinite(change.mean))


def lost_more(ours: Outcome, control: Outcome, floors: Floors) -> bool:
    """Whether more was lost than the control loses."""
    return KlLimits.of(control.kl_mean, control.kl_median, floors).passed_by(ours.kl_mean, ours.kl_median)


def additivity(harms: Sequence[Rung], whole: Outcome, control: Outcome | None) -> float | None:
    """Sum of the parts' mean KL over the whole's, each less what quantization loses; None where the whole lost nothing.

    `harms` are disjoint parts that make up the whole, each alone in the checkpoint. 1 where the parts are independent
    and their differences small.
    """
    usual = control.kl_mean if control is not None else 0.0
    beyond = whole.kl_mean - usual
    parts = sum(rung.outcome.kl_mean for rung in harms) - usual
    if not np.isfinite([beyond, parts]).all() or beyond <= 0.5 * usual or beyond <= 0.0:
        return None
    return max(0.0, parts) / beyond


def is_other_lineage(
    restored: Sequence[Rung],
    harms: Sequence[Rung],
    artifact: Outcome,
    floors: Floors,
    *,
    spread: bool,
    control: Outcome | None = None,
    small: float | None = None,
) -> Lineage:
    """Whether the artifact is another model, rather than this one damaged.

    `restored` and `harms` are ladders over the same disjoint groups, from artifact and from checkpoint. `spread`: the
    tensors differ from the checkpoint's all over (`is_spread`), without which nothing is another model. `small` is
    `additivity` of the same differences made small, for an artifact whose own are too large to add up; without it the
    artifact's own is taken.
    """
    ratio = additivity(harms, artifact, control)
    if not spread:
        return Lineage(None, ratio)
    fits_badly = ratio is None or ratio >= floors["restore.misfit"]
    if fits_badly and _worse_throughout(restored) and _worse_throughout(harms):
        return Lineage("misfit", ratio)
    known = ratio if small is None else small
    n_moved = sum(rung.moved for rung in harms)
    if known is not None and known <= floors["restore.coherent"] and n_moved >= _FEWEST_PARTS:
        return Lineage("coherent", known)
    return Lineage(None, known)


def _worse_throughout(rungs: Sequence[Rung]) -> bool:
    """Most parts that moved anything made it worse, and none made it better."""
    moved = [rung for rung in rungs if rung.moved]
    worse = [rung for rung in moved if rung.told == "worse"]
    if len(moved) < _FEWEST_PARTS or any(rung.told == "better" for rung in moved):
        return False
    return len(worse) >= _MOST * len(moved)
