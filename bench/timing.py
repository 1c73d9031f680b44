"""Paired timing: both sides in turn, so that what slows the machine down slows down both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Work = Callable[[], object]


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
