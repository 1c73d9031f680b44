"""Where in a model the damaged tensors are, in as few words as say it. Pure: no tensor is read.

Among tensors: a class, a layer, a kind of layers, a range of layers, a period in the layers' numbers, a shard of a
split file. Within tensors, from the rows that are beyond the control: experts of a stack, heads of attention, single
rows. What the damaged values are is the question of `relations`.

A pattern is named where it is a shorter account than a list of names (`_places`); it may be wrong on a quarter of its
tensors, and its evidence says on how many: `share`, of the damaged tensors it is about, and `sound`, tensors it
includes that are not damaged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffharness.forensics._places import Place, accounts
from diffharness.forensics.drift import TensorError
from diffharness.forensics.heads import Heads
from diffharness.layers import ranges
from diffharness.records.inspect import PatternRow
from diffharness.words import listed

BoolArray = NDArray[np.bool_]

_SHOWN = 6  # names in a sentence; the row has them all
_MOST_PARTS = 3  # rows of the answer for tensors with the same experts, heads or rows; beyond, they are told together
_LISTED = 64  # numbers of rows in the evidence
_MOSTLY = 0.75  # share of a shard's tensors, or of a head's rows, that is damaged where the whole is said to be
_SHARD_COST = 1.05  # as the costs in `_places`


def find_patterns(
    damaged: Sequence[TensorError],
    every: Sequence[TensorError],
    kinds: Sequence[str],
    *,
    shard_of: Callable[[str], int] | None = None,
    hyper: Heads | None = None,
) -> list[PatternRow]:
    """What the damaged tensors have in common, the row about most tensors first; then what is within tensors.

    `every` holds all compared tensors, `kinds[il]` is what the architecture calls layer il, `shard_of` gives the
    number of the file that a tensor is stored in. Rows are told by `TensorError.far` where it is there.
    """
    return [*_among(damaged, every, kinds, shard_of), *_within(damaged, every, kinds, hyper)] if damaged else []


def where(members: Sequence[TensorError], every: Sequence[TensorError], kinds: Sequence[str] = ()) -> str:
    """In which tensors, in words: `attn_q, attn_k in every layer`."""
    return "; ".join(row.message for row in _by_place(members, every, kinds, max(1, len(members)))[1])


# -- among tensors ------------------------------------------------------------------------------------


def _among(
    damaged: Sequence[TensorError],
    every: Sequence[TensorError],
    kinds: Sequence[str],
    shard_of: Callable[[str], int] | None,
) -> list[PatternRow]:
    cost, rows = _by_place(damaged, every, kinds, len(damaged))
    if shard_of is None:
        return rows
    shards: dict[int, list[TensorError]] = defaultdict(list)
    for t in every:
        shards[shard_of(t.name)].append(t)
    bad = {t.name for t in damaged}
    for shard, tensors in sorted(shards.items()) if len(shards) > 1 else ():
        hit = [t for t in tensors if t.name in bad]
        if len(hit) < max(2.0, _MOSTLY * len(tensors)):
            continue
        rest = [t for t in damaged if shard_of(t.name) != shard]
        rest_cost, rest_rows = _by_place(rest, every, kinds, len(damaged))
        if _SHARD_COST + len(tensors) - len(hit) + rest_cost < cost:
            cost = _SHARD_COST + len(tensors) - len(hit) + rest_cost
            which = "every tensor" if len(hit) == len(tensors) else f"{len(hit)} of {len(tensors)} tensors"
            evidence = _evidence(hit, len(damaged), len(tensors) - len(hit)) | {"shard": shard, "shards": len(shards)}
            text = f"{which} stored in shard {shard + 1} of {len(shards)}"
            rows = _sorted([_row("shard", text, hit, evidence), *rest_rows])
    return rows


def _by_place(
    damaged: Sequence[TensorError], every: Sequence[TensorError], kinds: Sequence[str], n_damaged: int
) -> tuple[float, list[PatternRow]]:
    at: dict[str, set[int]] = defaultdict(set)
    present: dict[str, set[int]] = defaultdict(set)
    for t in every:
        if t.layer is not None:
            present[t.klass].add(t.layer)
    for t in damaged:
        if t.layer is not None:
            at[t.klass].add(t.layer)
            present[t.klass].add(t.layer)
    has = {klass: frozenset(layers) for klass, layers in present.items()}
    cost, places, _ = accounts({klass: frozenset(layers) for klass, layers in at.items()}, has, kinds)
    rows, told = [], set[str]()
    outside = [t for t in damaged if t.layer is None]
    for place, classes in places:
        members = [t for t in damaged if t.klass in classes and t.layer in place.layers]
        sound = sum(len(place.layers & has[klass]) for klass in classes) - len(members)
        row = _place_row(place, classes, members, has, sound, n_damaged)
        if row.kind == "everywhere" and len(outside) == sum(t.layer is None for t in every) > 0:
            members = [*members, *outside]  # embedding and head belong to everything
            row = _row(row.kind, f"{row.message}, {_names(outside)}", members, row.evidence)
            row.evidence["share"] = len(members) / n_damaged
        told |= {t.name for t in members}
        rows.append(row)
    alone = [t for t in damaged if t.name not in told]
    if alone:
        kind = "tensor" if len(alone) == 1 else "tensors"
        rows.append(_row(kind, _names(alone), alone, _evidence(alone, n_damaged, 0)))
    return cost + len(outside), _sorted(rows)


def _place_row(
    place: Place,
    classes: Sequence[str],
    members: Sequence[TensorError],
    present: dict[str, frozenset[int]],
    sound: int,
    n_damaged: int,
) -> PatternRow:
    whole = {klass for klass, layers in present.items() if layers & place.layers} <= set(classes)
    named = "every tensor" if whole and len(classes) > 1 else _classes(classes)
    kind, where = place.kind, place.words
    if kind == "all":
        kind = "everywhere" if whole and len(classes) > 1 else "class" if len(classes) == 1 else "classes"
        having = frozenset().union(*(present[klass] for klass in classes))
        if len(having) < len(place.layers):
            where = f"every layer that has {'it' if len(classes) == 1 else 'them'} ({ranges(having)})"
    text = f"{named} in {where}"
    if sound:
        text += f", but for {sound} of {sound + len(members)}"
    evidence = {"classes": list(classes), **dict(place.evidence)} | _evidence(members, n_damaged, sound)
    return _row(kind, text, members, evidence)


def _evidence(members: Sequence[TensorError], n_damaged: int, sound: int) -> dict[str, Any]:
    layers = sorted({t.layer for t in members if t.layer is not None})
    return {"layers": layers, "share": len(members) / n_damaged, "sound": sound}


def _sorted(rows: Sequence[PatternRow]) -> list[PatternRow]:
    return sorted(rows, key=lambda row: (row.kind in ("tensor", "tensors"), -len(row.tensors)))


# -- within tensors -----------------------------------------------------------------------------------


def _within(
    damaged: Sequence[TensorError], every: Sequence[TensorError], kinds: Sequence[str], hyper: Heads | None
) -> list[PatternRow]:
    """Tensors of which only some experts, heads or rows are far, grouped by which."""
    groups: dict[tuple[str, tuple[int, ...]], list[TensorError]] = defaultdict(list)
    for t in damaged:
        part = _part(t, hyper)
        if part is not None:
            groups[part].append(t)
    rows = []
    for kind in ("expert", "head", "row"):
        by_numbers = {numbers: members for (k, numbers), members in groups.items() if k == kind}
        if len(by_numbers) > _MOST_PARTS:
            rows.append(_different_parts(kind, by_numbers, every, kinds, len(damaged)))
            continue
        for numbers, members in sorted(by_numbers.items(), key=lambda item: -len(item[1])):
            what = f"{kind} {numbers[0]}" if len(numbers) == 1 else f"{kind}s {_numbers(numbers)}"
            evidence = {f"{kind}s": list(numbers)[:_LISTED]} | _evidence(members, len(damaged), 0)
            rows.append(_row(kind, f"only {what} of {where(members, every, kinds)}", members, evidence))
    return rows


def _different_parts(
    kind: str,
    by_numbers: Mapping[tuple[int, ...], Sequence[TensorError]],
    every: Sequence[TensorError],
    kinds: Sequence[str],
    n_damaged: int,
) -> PatternRow:
    members = [t for tensors in by_numbers.values() for t in tensors]
    counts = sorted({len(numbers) for numbers in by_numbers})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    by_tensor = {t.name: list(numbers)[:_LISTED] for numbers, tensors in by_numbers.items() for t in tensors}
    evidence = {f"{kind}s": dict(list(by_tensor.items())[:_LISTED])} | _evidence(members, n_damaged, 0)
    text = f"only {n} {kind}{'' if n == '1' else 's'} of each, not the same ones, of {where(members, every, kinds)}"
    return _row(kind, text, members, evidence)


def _numbers(numbers: Sequence[int]) -> str:
    return ranges(numbers[:_SHOWN]) + (f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else "")


def _part(t: TensorError, hyper: Heads | None) -> tuple[str, tuple[int, ...]] | None:
    """(`expert`, `head` or `row`, numbers) of what is far in a tensor; None where most is, or nothing is known."""
    far: BoolArray | None = getattr(t, "far", None)
    if far is None or not far.any() or t.layer is None:
        return None
    far = np.asarray(far).ravel()
    n_head = hyper.of_tensor(t.layer, t.klass) if hyper is not None and not t.klass.startswith("attn_output") else 0
    n_expert = t.shape[0] if len(t.shape) == 3 or t.klass.startswith("ffn_gate_inp.") else 0
    for kind, n in (("expert", n_expert), ("head", n_head)):
        if n > 1 and len(far) % n == 0:
            share = far.reshape(n, -1).mean(axis=1)
            hit = np.flatnonzero(share > 0)
            if len(hit) <= n // 2 and (share[hit] >= _MOSTLY).all():
                return kind, tuple(map(int, hit))
    hit = np.flatnonzero(far)
    return ("row", tuple(map(int, hit))) if t.is_matrix and len(hit) <= max(1, len(far) // 10) else None


# -- words --------------------------------------------------------------------------------------------


def _row(kind: str, message: str, members: Sequence[TensorError], evidence: dict[str, Any]) -> PatternRow:
    return PatternRow(kind=kind, message=message, tensors=[t.name for t in members], evidence=evidence)


def _classes(classes: Sequence[str]) -> str:
    return ", ".join(klass.removesuffix(".weight") for klass in classes)


def _names(tensors: Sequence[TensorError]) -> str:
    return listed([t.name for t in tensors], _SHOWN)
