"""Sets of layers that a handful of words describe, and which of them say best where something is.

A description costs what it takes to say it, plus one for every tensor that it gets wrong (names a sound one, or leaves
out a damaged one; two for a period); listing a tensor by its name costs one. The cheapest account of all classes is
taken, so that a pattern is only named where it says more than a list.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffharness.layers import ranges

_FITS = 0.75  # least overlap (both over either) of a class's damaged layers and a place that may describe it
_REPEATS = 3  # layers that make a period


@dataclass(frozen=True)
class Place:
    """Some layers, in words: `kind` is `all`, `layer`, `layer_kind`, `layer_range` or `periodic`."""

    kind: str
    layers: frozenset[int]
    words: str
    cost: float
    evidence: tuple[tuple[str, Any], ...] = ()
    weight: int = 1  # of one layer that it gets wrong; many periods are tried, and some would fit anything

    def errors(self, damaged: frozenset[int], present: frozenset[int]) -> int:
        """Layers that this place gets wrong, of those that have the tensor at all."""
        return self.weight * len(damaged ^ (self.layers & present))

    def fits(self, damaged: frozenset[int], present: frozenset[int]) -> bool:
        here = self.layers & present
        return len(here & damaged) >= _FITS * len(here | damaged) > 0


def accounts(
    damaged: Mapping[str, frozenset[int]], present: Mapping[str, frozenset[int]], kinds: Sequence[str]
) -> tuple[float, list[tuple[Place, list[str]]], list[str]]:
    """(cost, places with their classes, classes left to a list) for the layers [by class] where something is.

    `present` has the layers that have the class at all. Places come with at least one class, the one that accounts
    for most first.
    """
    candidates = list(dict.fromkeys(_candidates(damaged, present, kinds)))
    chosen: list[Place] = []
    cost, best = _cost(chosen, damaged, present)
    while True:
        tries = [(*_cost([*chosen, place], damaged, present), place) for place in candidates if place not in chosen]
        if not tries:
            break
        new_cost, new_best, place = min(tries, key=lambda t: t[0])
        if new_cost >= cost - 1e-9:
            break
        chosen, cost, best = [*chosen, place], new_cost, new_best
    used = [(place, [klass for klass, at in best.items() if at == place]) for place in chosen]
    used = [(place, classes) for place, classes in used if classes]
    used.sort(key=lambda item: -sum(len(damaged[klass] & item[0].layers) for klass in item[1]))
    return cost, used, [klass for klass, at in best.items() if at is None]


def _cost(
    places: Sequence[Place], damaged: Mapping[str, frozenset[int]], present: Mapping[str, frozenset[int]]
) -> tuple[float, dict[str, Place | None]]:
    total, best = 0.0, dict[str, Place | None]()
    for klass, layers in damaged.items():
        here = present[klass]
        options: list[tuple[float, Place | None]] = [
            (float(place.errors(layers, here)), place) for place in places if place.fits(layers, here)
        ]
        # Between equals the place, which comes first, says more than the list.
        cost, best[klass] = min([*options, (float(len(layers)), None)], key=lambda option: option[0])
        total += cost
    return total + sum(place.cost for place in places if place in best.values()), best


def _candidates(
    damaged: Mapping[str, frozenset[int]], present: Mapping[str, frozenset[int]], kinds: Sequence[str]
) -> Iterator[Place]:
    n_layer = max([len(kinds), *(max(layers) + 1 for layers in present.values() if layers)], default=0)
    everywhere = frozenset(range(n_layer))
    yield Place("all", everywhere, "every layer", 1.0)
    union = frozenset().union(*damaged.values()) if damaged else frozenset()
    for il in sorted(union):
        told = f" ({kinds[il]})" if il < len(kinds) and len(set(kinds)) > 1 else ""
        yield Place("layer", frozenset({il}), f"layer {il}{told}", 1.1)
    if len(set(kinds)) > 1:
        for kind in dict.fromkeys(kinds):
            layers = frozenset(il for il, k in enumerate(kinds) if k == kind)
            yield Place("layer_kind", layers, f"every {kind} layer ({ranges(layers)})", 1.2, (("layer_kind", kind),))
    sets = {layers for layers in damaged.values() if len(layers) > 1} | ({union} if len(union) > 1 else set())
    for layers in sets:
        here = frozenset().union(*(present[klass] for klass, at in damaged.items() if at == layers)) or everywhere
        yield _longest_range(layers, n_layer, here)
        yield from _periods(layers, n_layer, here)


def _longest_range(layers: Collection[int], n_layer: int, present: frozenset[int]) -> Place:
    """The contiguous layers with the largest surplus of `layers` over the others that are there."""
    best, start, total = (0, 0, 0), 0, 0
    for il in range(n_layer):
        if total <= 0:
            start, total = il, 0
        total += (1 if il in layers else -1) if il in present else 0
        if total > best[0]:
            best = (total, start, il)
    _, first, last = best
    return Place(
        "layer_range",
        frozenset(range(first, last + 1)),
        f"layers {first}-{last}",
        1.4,
        (("first_layer", first), ("last_layer", last)),
    )


def _periods(layers: Collection[int], n_layer: int, present: frozenset[int]) -> Iterator[Place]:
    """Layers with certain remainders: those of which most are among `layers`, for every period up to half of all."""
    for p in range(2, n_layer // 2 + 1):
        residues = []
        for r in range(p):
            here = [il for il in range(r, n_layer, p) if il in present]
            if here and 2 * sum(il in layers for il in here) > len(here):
                residues.append(r)
        chosen = frozenset(il for il in range(n_layer) if il % p in residues)
        if 0 < len(residues) < p and len(chosen & present) >= _REPEATS:
            rest = ", ".join(map(str, residues))
            words = (
                f"every layer whose number mod {p} is {rest}"
                if len(residues) == 1
                else (f"every layer whose number mod {p} is one of {rest}")
            )
            evidence = (("period", p), ("residues", tuple(residues)))
            yield Place("periodic", chosen, f"{words} ({ranges(chosen)})", 1.0 + 0.4 * p, evidence, 2)
