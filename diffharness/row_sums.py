"""Sums of squares by row, which NMSE is made of, in the values' own precision: as fast as reading them.

`metrics` has the definitions, in float64. Here a caller looks whether the sums are `in_range`, and takes them again of
float64 values where they are not; errors are then good to five digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]

# A row whose values nearly cancel has no scale of its own to measure an error against: the float noise in it comes
# from operands of the usual size. It is measured against this share of the median row's power.
QUIET_SHARE = 1e-2

_SMALLEST, LARGEST = 1e-30, 1e30  # squares of float32 values between these stay normal numbers, and so do their sums


@dataclass(frozen=True)
class RowSums:
    error: FloatArray  # [rows], of (a - b)^2
    power: FloatArray  # [rows], of b^2
    largest: float  # of |a - b|; inf where a value is not finite

    @property
    def in_range(self) -> bool:
        """Whether the working precision held every square; false also where a value is not finite."""
        lost = self.largest > 0 and not (self.error > 0).any()
        held = (self.power > _SMALLEST).all() and (self.power < LARGEST).all()
        return bool(held) and self.largest**2 < LARGEST and not lost


def row_sums(a: FloatArray, b: FloatArray) -> RowSums:
    """Of [rows, width] twice. Differences of near values are exact, and a sum's last digits do not matter."""
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        difference = a - b
        largest = max(float(difference.max(initial=0.0)), -float(difference.min(initial=0.0)))
        return RowSums(
            error=np.einsum("ij,ij->i", difference, difference),
            power=np.einsum("ij,ij->i", b, b),
            largest=largest if np.isfinite(largest) else float("inf"),
        )


def least_power(power: FloatArray) -> float:
    """The power [rows] below which a row counts as one whose values nearly cancel."""
    finite = power[np.isfinite(power)]
    return QUIET_SHARE * float(np.median(finite)) if finite.size else 0.0
