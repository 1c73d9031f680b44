"""Which layers and positions something touches, in words; lists of layers, written and read. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

from diffharness.errors import BadInputError

_RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")


def ranges(numbers: Collection[int]) -> str:
    """`0-3, 7, 9, 10` for {0, 1, 2, 3, 7, 9, 10}."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


def parse_layers(text: str, n_layer: int | None = None) -> frozenset[int]:
    """{0, 1, 2, 7} for `0-2,7`. BadInputError for anything else, and for layers that a model of `n_layer` lacks."""
    layers: set[int] = set()
    of = f" from 0 to {n_layer - 1}" if n_layer is not None else ""
    for part in text.replace(" ", "").split(","):
        match = _RANGE.fullmatch(part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if last < first or (n_layer is not None and last >= n_layer):
            raise BadInputError(f"expected layers{of}, such as 0-5 or 0,3,6-8, found {text!r}")
        layers.update(range(first, last + 1))
    return frozenset(layers)


def period(layers: Collection[int], n_layer: int) -> tuple[int, list[int]] | None:
    """(p, residues) if `layers` are exactly those with certain remainders mod p; p at most half of them all."""
    hit = set(layers)
    for p in range(2, n_layer // 2 + 1):
        residues = sorted({layer % p for layer in hit})
        if len(residues) < p and {layer for layer in range(n_layer) if layer % p in residues} == hit:
            return p, residues
    return None


def describe_layers(layers: Collection[int], kinds: Sequence[str]) -> str:
    """`all 12 layers`, `only global layers (5, 11)`, `only layer 3 (sliding)`.

    `kinds[i]` is what the architecture calls layer i.
    """
    hit, n_layer = set(layers), len(kinds)
    if not hit:
        return "no layer"
    listed = ranges(hit)
    if len(hit) == n_layer:
        return "all layers" if n_layer > 1 else "the only layer"
    if len(hit) == 1:
        layer = min(hit)
        told = f" ({kinds[layer]})" if len(set(kinds)) > 1 and layer < n_layer else ""
        return f"only layer {listed}{told}"
    if len(set(kinds)) > 1:
        touched = {kinds[layer] for layer in hit if layer < n_layer}
        if len(touched) == 1:
            kind = touched.pop()
            every = {layer for layer in range(n_layer) if kinds[layer] == kind}
            return f"only {kind} layers ({listed})" if hit == every else f"only {kind} layers, of them {listed}"
    repeating = period(hit, n_layer)
    if repeating is not None:
        p, residues = repeating
        return f"only layers with number mod {p} in {{{', '.join(map(str, residues))}}} ({listed})"
    return f"only layers {listed}"


def describe_positions(first: int, length: int, landmarks: Mapping[str, int]) -> str:
    """Where in a chunk of `length` tokens a fault begins, and the landmark it begins at, where one is near.

    That a fault spares position 0 alone is the mark of a wrong rotation, which turns it by nothing.
    `landmarks` are positions that mean something: the window, n_ubatch. A small effect may only leave
    the floor some tokens later, so that a landmark counts for the quarter of its length that follows.
    """
    if first <= 0:
        return "from the first position on"
    if first == 1:
        return "at every position but the first"
    for name, at in sorted(landmarks.items(), key=lambda item: -item[1]):
        if 0 < at <= first < at + max(2, at // 4):
            where = name if at == first else f"past {name}, {at}"
            return f"only positions >= {first} ({where})"
    share = f" of {length}" if length else ""
    return f"only positions >= {first}{share}"


def buckets(length: int, landmarks: Collection[int]) -> list[tuple[int, int]]:
    """Ranges [start, stop) of positions in a chunk: powers of four, cut at the landmarks as well."""
    edges = {0, 1, length} | {at for at in landmarks if 0 < at < length}
    edge = 16
    while edge < length:
        edges.add(edge)
        edge *= 4
    ordered = sorted(e for e in edges if e <= length)
    return list(pairwise(ordered))
