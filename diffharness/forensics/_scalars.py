"""Tensors of one value, which say nothing alone: told by class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from diffharness.forensics._pair import Relation, decibels
from diffharness.forensics._unexplained import UNEXPLAINED
from diffharness.forensics.drift import TensorError

_ALIKE = 1e-3  # spread of what is one factor or one offset, relative to it
_MANY = 64  # values in the evidence
_INITIAL = (0.0, 1.0)  # values that a tensor which was never filled has


def scalars(tensors: Sequence[tuple[TensorError, float, float]]) -> list[tuple[TensorError, Relation]]:
    """(tensor, artifact's value, checkpoint's): one constant, factor or offset for a class, or none of these."""
    by_class: dict[str, list[tuple[TensorError, float, float]]] = defaultdict(list)
    for item in tensors:
        by_class[item[0].klass].append(item)
    out = []
    for klass, members in by_class.items():
        a, b = (np.array([member[i] for member in members], dtype=np.float64) for i in (1, 2))
        relation = _relation(a, b, klass)
        out += [(t, relation) for t, _, _ in members]
    return out


def _relation(a: NDArray[np.float64], b: NDArray[np.float64], klass: str) -> Relation:
    evidence = {"values": a[:_MANY].tolist(), "checkpoint": b[:_MANY].tolist()}
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio, moved = a / b, a - b
        error = float(moved @ moved / (b @ b)) if b.any() else np.inf
    several = len(a) > 1
    if np.ptp(a) == 0 and (float(a[0]) in _INITIAL or (several and np.ptp(b) > 0)):
        value = float(a[0])
        words = f"{'every value' if several else 'its value'} is {value:.6g}"
        return Relation("constant", words, 0.0, evidence | {"value": value}, (klass, value))
    if several and np.isfinite(ratio).all() and np.ptp(ratio) < _ALIKE * np.abs(ratio).max():
        factor = float(ratio.mean())
        return Relation(
            "scale", f"the checkpoint's values times {factor:.4g}", 0.0, evidence | {"scale": factor}, factor
        )
    if several and np.isfinite(moved).all() and np.ptp(moved) < _ALIKE * np.abs(moved).max():
        offset = float(moved.mean())
        words = f"the checkpoint's values {'plus' if offset > 0 else 'minus'} {abs(offset):.4g}"
        return Relation("offset", words, 0.0, evidence | {"offset": offset}, offset)
    return Relation("unexplained", UNEXPLAINED["unexplained"], error, evidence | {"sqnr_db": decibels(error)})
