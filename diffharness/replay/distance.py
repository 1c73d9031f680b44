"""How far a node's output is from its replay: NMSE over all, by row, and the largest difference.

NMSE is the definition of `diffharness.metrics`, the replay below the line. Values that are not finite count as equal
where both sides have the same one, and as an infinite error elsewhere. Sums are taken in the values' own precision,
and in float64 where that would lose them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffharness.metrics import ratio
from diffharness.row_sums import RowSums, least_power, row_sums

Array = NDArray[Any]
Float64Array = NDArray[np.float64]

_BLOCK = 1 << 18  # elements compared at a time: they stay in the cache


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
    error, power, worst = _sums(a, b, keep)
    least = least_power(power) if quiet is None else quiet
    by_row = ratio(error, np.maximum(power, least))
    row = int(by_row.argmax())
    total = float(ratio(error.sum(keepdims=True), np.maximum(power.sum(keepdims=True), least * len(power)))[0])
    return Distance(total, row, float(by_row[row]), worst)


def quiet_power(replayed: Array) -> float:
    """What `distance` takes as `quiet`, from more rows [..., ne0] than those that it is about.

    A single token has one row, which for an output of one value, such as the gate of a shared expert, is a single
    product of two vectors: by itself it cannot be told from one that cancels.
    """
    rows = replayed.reshape(-1, replayed.shape[-1])
    return least_power(_sums(rows, rows, None)[1])


def nmse_by_row(engine: Array, replayed: Array) -> Float64Array:
    """Of [n, ne0] values, [n]; a row whose values nearly cancel is measured by its own power."""
    error, power, _ = _sums(engine, replayed, None)
    return ratio(error, power)


def _sums(a: Array, b: Array, keep: NDArray[np.bool_] | None) -> tuple[Float64Array, Float64Array, float]:
    """Sum (a-b)^2 and sum b^2 of each row, and the largest |a-b|."""
    error, power, largest = np.empty(len(a)), np.empty(len(a)), 0.0
    step = max(1, _BLOCK // max(1, a.shape[1]))
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        sums = _of_block(a[rows], b[rows], None if keep is None else keep[rows])
        error[rows], power[rows], largest = sums.error, sums.power, max(largest, sums.largest)
    return error, power, largest


def _of_block(a: Array, b: Array, keep: NDArray[np.bool_] | None) -> RowSums:
    if keep is not None:
        a, b = np.where(keep, a, 0), np.where(keep, b, 0)
    if a.dtype == b.dtype == np.float32:
        sums = row_sums(a, b)
        if sums.in_range:
            return sums
    a, b = a.astype(np.float64), b.astype(np.float64)
    odd = ~(np.isfinite(a) & np.isfinite(b))
    if odd.any():
        same = odd & ((a == b) | (np.isnan(a) & np.isnan(b)))
        a, b = np.where(odd, np.where(same, 0.0, np.inf), a), np.where(odd, 0.0, b)
    return row_sums(a, b)
