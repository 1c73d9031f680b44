"""Sums over the rows of one tensor and the blocks of its rows: the checkpoint's values, and differences from them.

Everything that is said of a tensor's error follows from these few sums, so that rows may come in runs
and no tensor need be in memory whole. Products are summed over a block in float32, over blocks in
float64: of 256 values that is 1e-7 of the sum at most.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffharness.weights.source import Float32Array, IntArray

Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_PIECE = 1 << 16  # values worked on at a time: what is made of them stays in the second-level cache
_IN_FLOAT32 = 1024  # values of a block that are summed in float32 at most


def blocks_per_row(width: int) -> int:
    """Into how many equal blocks of 128 to 512 values a row is cut; 1 where that does not come out even."""
    return next((width // size for size in (256, *range(255, 127, -1), *range(257, 513)) if width % size == 0), 1)


def pieces(n_rows: int, width: int) -> Iterator[slice]:
    """Rows in pieces that fit the cache."""
    step = max(1, _PIECE // max(1, width))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def products(x: Float32Array, y: Float32Array, n_blocks: int) -> Float64Array:
    """Sum of x times y over each block [rows, n_blocks]; in float64 where float32 does not hold the squares."""
    shape = (len(x), n_blocks, -1) if x.size else (len(x), n_blocks, 0)
    x, y = x.reshape(shape), y.reshape(shape)
    if x.shape[2] <= _IN_FLOAT32:
        sums: Float64Array = np.einsum("ijk,ijk->ij", x, y).astype(np.float64)
        if np.isfinite(sums).all():
            return sums
    return np.asarray(np.einsum("ijk,ijk->ij", x.astype(np.float64), y.astype(np.float64)))


@dataclass
class Sums:
    """Of one side (artifact or control) against the checkpoint's values b; d is the difference."""

    error: Float64Array  # [rows, blocks], of d^2
    lean: Float64Array  # [rows], of d times b
    shift: Float64Array  # [rows], of d
    non_finite: int = 0  # values of the side

    @classmethod
    def of(cls, n_rows: int, n_blocks: int) -> Sums:
        return cls(np.zeros((n_rows, n_blocks)), np.zeros(n_rows), np.zeros(n_rows))

    def add(self, at: int, side: Float32Array, b: Float32Array) -> None:
        """Rows `at` and on; both [n, width]."""
        n_blocks = self.error.shape[1]
        with np.errstate(invalid="ignore", over="ignore"):
            for rows in pieces(*b.shape):
                into = slice(at + rows.start, at + rows.stop)
                x, y = side[rows], b[rows]
                d = x - y
                error = self.error[into] = products(d, d, n_blocks)
                self.lean[into] = products(d, y, n_blocks).sum(axis=1)
                self.shift[into] = d.sum(axis=1)
                if not np.isfinite(error).all():
                    self.non_finite += int((~np.isfinite(x)).sum())

    @classmethod
    def usual(cls, powers: Powers, rows: IntArray, side: Float32Array, b: Float32Array) -> Sums:
        """Sums of some rows of `side`; of the others what these lose on the average, without a shift."""
        sums = cls.of(*powers.power.shape)
        sums.put(rows, side, b)
        power = float(powers.power[rows].sum())
        others = np.ones(len(powers.power), dtype=np.bool_)
        others[rows] = False
        for part, of in ((sums.error, powers.power), (sums.lean, powers.rows)):
            total = float(part[rows].sum())
            part[others] = of[others] * (total / power if power > 0.0 else 0.0)
        return sums

    def put(self, rows: IntArray, side: Float32Array, b: Float32Array) -> None:
        """Rows `rows` anew."""
        new = Sums.of(len(rows), self.error.shape[1])
        new.add(0, side, b)
        self.error[rows], self.lean[rows], self.shift[rows] = new.error, new.lean, new.shift

    @property
    def rows(self) -> Float64Array:
        """[rows], of d^2."""
        return np.asarray(self.error.sum(axis=1))


@dataclass
class Powers:
    """Of the checkpoint's values b themselves."""

    power: Float64Array  # [rows, blocks], of b^2

    @classmethod
    def of(cls, n_rows: int, n_blocks: int) -> Powers:
        return cls(np.zeros((n_rows, n_blocks)))

    def add(self, at: int, b: Float32Array) -> None:
        with np.errstate(invalid="ignore", over="ignore"):
            for rows in pieces(*b.shape):
                self.power[at + rows.start : at + rows.stop] = products(b[rows], b[rows], self.power.shape[1])

    @property
    def rows(self) -> Float64Array:
        return np.asarray(self.power.sum(axis=1))


def ratio(error: float, power: float) -> float:
    """NMSE; 0 where there is no error, infinite where there is nothing to be relative to."""
    if not np.isfinite([error, power]).all():
        return float("inf")
    if error == 0.0:
        return 0.0
    return error / power if power > 0.0 else float("inf")


def cosine(sums: Sums, powers: Powers) -> float:
    """Of the side with the checkpoint: <b + d, b> over the norms. Of two tensors of zeros it is 1."""
    power, error, lean = float(powers.power.sum()), float(sums.error.sum()), float(sums.lean.sum())
    side = power + 2 * lean + error
    if error == 0.0:
        return 1.0
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.float64(power + lean) / np.sqrt(np.float64(power) * side)
    return float(np.clip(found, -1.0, 1.0)) if np.isfinite(found) else 0.0
