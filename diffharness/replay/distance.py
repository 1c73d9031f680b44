"""How far a node's output is from its replay: NMSE over all, by row, and the largest difference.

NMSE is the definition of `diffharness.metrics`, the replay below the line. Values that are not finite count as equal
where both sides have the same one, and as an infinite error elsewhere. Sums are taken in the values' own precision,
and in float64 where that would lose them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffharness.metrics import ratio

Array = NDArray[Any]
Float64Array = NDArray[np.float64]

# A row whose values nearly cancel has no scale of its own: it is measured against this share of the median row's power.
QUIET_SHARE = 1e-2
_BLOCK = 1 << 18  # elements compared at a time: they stay in the cache
_SMALLEST, _LARGEST = 1e-30, 1e30  # squares of float32 values between these stay normal numbers


@dataclass(frozen=True)
class Distance:
    """`worst_row` counts rows of ne0 values, slowest axis first; None where nothing was compared."""

    nmse: float
    worst_row: int | None
    worst_row_nmse: float
    max_abs: float


def distance(
    engine: Array, replayed: Array, defined: NDArray[np.bool_] | None = None, quiet: float | None = None
) -> Distance:
    """Of [..., ne0] values; those that are not `defined` are left out.

    `quiet` is the power of a row below which it counts as one that cancels, `quiet_power` of these rows if not given.
    """
    if engine.shape != replayed.shape:
        raise ValueError(f"shapes differ: {engine.shape} and {replayed.shape}")
    if engine.size == 0:
        return Distance(0.0, None, 0.0, 0.0)
    width = engine.shape[-1]
    a, b = engine.reshape(-1, width), replayed.reshape(-1, width)
    keep = None if defined is None else np.broadcast_to(defined, engine.shape).reshape(-1, width)
    error, power, worst = np.empty(len(a)), np.empty(len(a)), 0.0
    for rows in _blocks(len(a), width):
        error[rows], power[rows], largest = _sums(a[rows], b[rows], None if keep is None else keep[rows])
        worst = max(worst, largest)
    least = _share(power) if quiet is None else quiet
    by_row = ratio(error, np.maximum(power, least))
    row = int(by_row.argmax())
    total = float(ratio(error.sum(keepdims=True), np.maximum(power.sum(keepdims=True), least * len(power)))[0])
    return Distance(total, row, float(by_row[row]), worst)


def quiet_power(replayed: Array) -> float:
    """What `distance` takes as `quiet`, from more rows [..., ne0] than those that it is about.

    A single token has one row, which for an output of one value, such as the gate of a shared expert, is a single
    product of two vectors: by itself it cannot be told from one that cancels.
    """
    rows = replayed.reshape(-1, replayed.shape[-1]).astype(np.float64)
    return _share(np.einsum("ij,ij->i", rows, rows))


def _share(power: Float64Array) -> float:
    finite = power[np.isfinite(power)]
    return QUIET_SHARE * float(np.median(finite)) if finite.size else 0.0


def _blocks(n_rows: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK // max(1, width))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def _sums(a: Array, b: Array, keep: NDArray[np.bool_] | None) -> tuple[Float64Array, Float64Array, float]:
    """Sum (a-b)^2 and sum b^2 of each row, and the largest |a-b|."""
    if keep is not None:
        a, b = np.where(keep, a, 0), np.where(keep, b, 0)
    if a.dtype == b.dtype == np.float32:
        error, power, largest = _plain(a, b)
        lost = largest > 0 and not (error > 0).any()
        if not lost and largest**2 < _LARGEST and (power > _SMALLEST).all() and (power < _LARGEST).all():
            return error.astype(np.float64), power.astype(np.float64), largest
    return _careful(a.astype(np.float64), b.astype(np.float64))


def _plain(a: Array, b: Array) -> tuple[Array, Array, float]:
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        difference = a - b
        largest = max(float(difference.max()), -float(difference.min()))
        error, power = np.einsum("ij,ij->i", difference, difference), np.einsum("ij,ij->i", b, b)
    return error, power, largest if largest == largest else float("inf")


def _careful(a: Float64Array, b: Float64Array) -> tuple[Float64Array, Float64Array, float]:
    odd = ~(np.isfinite(a) & np.isfinite(b))
    if odd.any():
        same = odd & ((a == b) | (np.isnan(a) & np.isnan(b)))
        a, b = np.where(odd, np.where(same, 0.0, np.inf), a), np.where(odd, 0.0, b)
    error, power, largest = _plain(a, b)
    return error, power, largest
