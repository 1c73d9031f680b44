"""Binary search for the first change in an ordered list, where some places cannot be looked at. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Probe = Callable[[int], bool | None]
"""Whether the place has changed from the first; None if that cannot be told."""


@dataclass(frozen=True)
class Found:
    """`last_same` and `first_changed` have only places between them that cannot be looked at.

    `first_changed` is None where the last place that could be looked at has not changed; `last_same` is it then.
    """

    last_same: int
    first_changed: int | None
    skipped: list[int] = field(default_factory=list)  # ascending

    @property
    def candidates(self) -> list[int]:
        """Where the change may have come: one place, or more where skipped ones hide it."""
        return [] if self.first_changed is None else list(range(self.last_same + 1, self.first_changed + 1))


def bisect(n: int, probe: Probe) -> Found:
    """Search places 1 .. n - 1 for the first that has changed from place 0, with about log2(n) probes.

    The last place is looked at first, or the nearest before it that can be. As every bisection this takes it
    that what has changed stays so. ValueError for a list of one.
    """
    if n < 2:
        raise ValueError(f"a list of {n} has nothing to search")
    skipped: set[int] = set()
    low, high = 0, n
    for place in range(n - 1, 0, -1):
        state = probe(place)
        if state is None:
            skipped.add(place)
            continue
        if not state:
            return Found(place, None, sorted(skipped))
        high = place
        break
    if high == n:
        return Found(0, None, sorted(skipped))
    while open_places := [place for place in range(low + 1, high) if place not in skipped]:
        place = min(open_places, key=lambda at: (abs(2 * at - low - high), at))
        state = probe(place)
        if state is None:
            skipped.add(place)
        elif state:
            high = place
        else:
            low = place
    return Found(low, high, sorted(skipped))
