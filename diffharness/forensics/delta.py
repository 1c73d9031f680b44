"""Delta debugging on the complement: the smallest set that is still enough, found by leaving parts of it out.

After Zeller's and Hildebrandt's ddmin (Simplifying and isolating failure-inducing input, 2002), of which only the
complements are tested: where nearly everything is needed, small subsets never are enough. Parts are left out in ever
smaller runs; what withstands one by one is 1-minimal. Units that can be cut are then cut, and it begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Unit = TypeVar("Unit", bound=Hashable)
Enough = Callable[[frozenset[Unit]], "bool | None"]
"""Whether a set of units is enough; None if that can no longer be afforded."""


@dataclass(frozen=True)
class Smallest(Generic[Unit]):
    """`units` are enough. `minimal`: none of them can be left out, as they are. `finest`: nor could any be cut."""

    units: list[Unit]
    minimal: bool
    finest: bool
    tests: int


def smallest(
    units: Sequence[Unit], enough: Enough[Unit], cut: Callable[[Unit], Sequence[Unit]] = lambda unit: [unit]
) -> Smallest[Unit]:
    """A smallest subset of `units` (which are enough together) in the order given: the first are left out first.

    `cut` gives a unit's parts, or the unit alone where it has none. Where `enough` gives None the best so far is
    returned.
    """
    search = _Search(list(units), enough)
    minimal, whole, parts = False, list(units), list(units)
    try:
        search.reduce()
        minimal = True
        while True:
            parts = [part for unit in search.kept for part in cut(unit)]
            if len(parts) == len(search.kept):
                return Smallest(search.kept, True, True, search.tests)
            whole, search.kept = search.kept, parts
            search.one_by_one()  # a run of parts is a whole unit, of which it is known that it is needed
    except _OverError:
        # Parts of which none was left out so far say no more than the units that they are of.
        untouched = minimal and len(search.kept) == len(parts)
        return Smallest(whole if untouched else search.kept, untouched, False, search.tests)


class _OverError(Exception):
    """No test can be afforded any more."""


class _Search(Generic[Unit]):
    """`kept` is enough at any time."""

    def __init__(self, kept: list[Unit], enough: Enough[Unit]) -> None:
        self.kept, self.tests = kept, 0
        self._enough, self._known = enough, dict[frozenset[Unit], bool]()

    def reduce(self) -> None:
        """Leave out runs of half of the units, of a quarter, and so on down to single ones."""
        run = (len(self.kept) + 1) // 2
        while run > 1:
            self._leave_out_runs(run)
            run = min((run + 1) // 2, (len(self.kept) + 1) // 2)
        self.one_by_one()

    def one_by_one(self) -> None:
        """Leave out single units until a whole round changes nothing."""
        before = -1
        while before != len(self.kept):
            before = len(self.kept)
            self._leave_out_runs(1)

    def _leave_out_runs(self, run: int) -> None:
        at = 0
        while at < len(self.kept):
            fewer = self.kept[:at] + self.kept[at + run :]
            if self._is_enough(frozenset(fewer)):
                self.kept = fewer
            else:
                at += run

    def _is_enough(self, units: frozenset[Unit]) -> bool:
        if units not in self._known:
            found = self._enough(units)
            if found is None:
                raise _OverError
            self._known[units] = found
            self.tests += 1
        return self._known[units]
