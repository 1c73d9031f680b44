"""Explanations of single tensors as rows: tensors with the same one are told together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from diffharness.forensics._pair import Relation, decibels
from diffharness.forensics._unexplained import UNEXPLAINED
from diffharness.forensics.drift import TensorError
from diffharness.forensics.patterns import where
from diffharness.records.inspect import PatternRow

_MOST_ROWS = 4  # rows for one kind of relation; beyond, its tensors are told together
_ALIKE = 0.02  # between two fitted numbers that are taken for one
_MOST_TENSORS = 64  # tensors with evidence of their own


def merged(
    found: Sequence[tuple[TensorError, Relation]], every: Sequence[TensorError], kinds: Sequence[str]
) -> list[PatternRow]:
    """One row per explanation, each tensor once; `every` and `kinds` are for saying where the tensors are."""
    groups: dict[str, dict[Hashable, list[tuple[TensorError, Relation]]]] = defaultdict(lambda: defaultdict(list))
    for t, relation in found:
        groups[relation.kind][relation.key].append((t, relation))
    rows = []
    for kind, unclustered in groups.items():
        by_key = _clustered(unclustered)
        if kind in UNEXPLAINED or len(by_key) > _MOST_ROWS:
            members = [item for items in by_key.values() for item in items]
            rows.append(_row(kind, members, every, kinds, alike=False))
        else:
            rows += [_row(kind, members, every, kinds, alike=True) for members in by_key.values()]
    return rows


def _clustered(
    by_key: Mapping[Hashable, list[tuple[TensorError, Relation]]],
) -> dict[Hashable, list[tuple[TensorError, Relation]]]:
    """Groups whose keys are numbers within `_ALIKE` of the next one are one."""
    out: dict[Hashable, list[tuple[TensorError, Relation]]] = {}
    last: float | None = None
    for key in sorted(by_key, key=lambda k: (isinstance(k, float), k if isinstance(k, float) else 0.0)):
        if last is not None and isinstance(key, float) and abs(key - last) <= _ALIKE * abs(key):
            next(reversed(out.values())).extend(by_key[key])
        else:
            out[key] = list(by_key[key])
        last = key if isinstance(key, float) else None
    return out


def _row(
    kind: str,
    members: Sequence[tuple[TensorError, Relation]],
    every: Sequence[TensorError],
    kinds: Sequence[str],
    *,
    alike: bool,
) -> PatternRow:
    order = {t.name: i for i, t in enumerate(every)}
    members = sorted(members, key=lambda member: order.get(member[0].name, 0))
    tensors, relations = [t for t, _ in members], [relation for _, relation in members]
    middle = _middle(relations)
    told = {relation.words for relation in relations}
    alike = alike and (len(told) == 1 or isinstance(middle.key, float) or not middle.several)
    words = middle.words if alike or len(members) == 1 else middle.several or middle.words
    if kind in UNEXPLAINED:
        words += f" {_span([relation.evidence['sqnr_db'] for relation in relations])} dB"
    evidence: dict[str, Any] = {}
    if alike or len(members) == 1:
        evidence |= middle.evidence
    else:
        evidence["by_tensor"] = {t.name: relation.evidence for t, relation in members[:_MOST_TENSORS]}
    if kind not in UNEXPLAINED:
        evidence["residual"] = max(relation.residual for relation in relations)
        evidence["complete"] = all(_complete(t, relation) for t, relation in members)
        left = [decibels(r.residual) for t, r in members if not _complete(t, r) and math.isfinite(r.residual)]
        if left:
            words += f"; what is left is at {_span(left)} dB, more than the type loses"
    message = f"{where(tensors, every, kinds)}: {words}"
    return PatternRow(kind=kind, message=message, tensors=[t.name for t in tensors], evidence=evidence)


def _complete(t: TensorError, relation: Relation) -> bool:
    return relation.residual == 0.0 or relation.residual <= t.limit < math.inf


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def _middle(relations: Sequence[Relation]) -> Relation:
    """Of relations that differ by a fitted number the one with the middle number."""
    if not all(isinstance(relation.key, float) for relation in relations):
        return relations[0]
    return sorted(relations, key=lambda relation: float(str(relation.key)))[len(relations) // 2]
