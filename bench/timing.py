"""Paired timing: both sides in turn, so that what slows the machine down slows down both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Work = Callable[[], object]
Timed = Callable[[], float]  # works, and says itself how many seconds of it count


@dataclass(frozen=True)
class Row:
    """One line of the report. `ratio` is ours over theirs; at most `limit` is promised (None: just a number)."""

    what: str
    ratio: float
    limit: float | None
    detail: str

    @property
    def ok(self) -> bool:
        return self.limit is None or self.ratio <= self.limit


def seconds(work: Work) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def paired(ours: Work, theirs: Work, rounds: int = 5) -> tuple[float, float, float]:
    """Median ratio ours / theirs of `rounds` pairs after one unmeasured pair, and both medians in seconds."""
    ours(), theirs()
    pairs = []
    for i in range(rounds):
        # Who goes first alternates: the first may find the caches cold, the second the processor hot.
        if i % 2:
            b = seconds(theirs)
            a = seconds(ours)
        else:
            a = seconds(ours)
            b = seconds(theirs)
        pairs.append((a, b))
    ratio = statistics.median(a / b for a, b in pairs)
    return ratio, statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def in_turn(sides: Mapping[str, Timed], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in every round; who begins moves on from round to round."""
    names = list(sides)
    found: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found[name].append(sides[name]())
    return found


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Of the ratios within each round, so that what slows a whole round down does not count."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
