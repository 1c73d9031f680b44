"""Whether a tensor's values are the nearest that its own blocks could hold.

An importance matrix changes the scales of blocks, and with them the error, several times over; but with
the scales chosen each value still takes the level nearest to the checkpoint's. So the error beyond
that of the nearest levels is hardly any quantizer's doing, and noise, another scale or offset, or other
values altogether show in it long before they exceed the control's error. Types without levels of
single values (IQ1 to IQ3, MXFP4) are measured by their scale and offset.

Floors: `artifact.levels`, `artifact.levels_row` and `artifact.levels_usual`, which `.<type>` overrides;
`artifact.scale`, `artifact.shift`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffharness.forensics.sums import Float64Array, Powers, Sums, products
from diffharness.settings import Floors
from diffharness.weights.dequant import Bytes
from diffharness.weights.grid import nearest
from diffharness.weights.source import Float32Array, IntArray

_QUIET = 1e-2  # of the median row's power: a quieter row is measured against this


@dataclass(frozen=True)
class Levels:
    """Rows of the artifact: sums of squares of the error, of the nearest levels' error, and of the checkpoint."""

    rows: IntArray  # which they are
    error: Float64Array
    nearest: Float64Array
    power: Float64Array

    @property
    def misplaced(self) -> float:
        """NMSE beyond that of the nearest levels."""
        power = float(self.power.sum())
        return _share(float((self.error - self.nearest).sum()), power)

    def limit(self, type_name: str, usual: float, floors: Floors) -> float:
        """What `misplaced` may be; `usual` is the control's NMSE."""
        return _floor("artifact.levels", type_name, floors) * self._own(usual) + floors["artifact.tensor_floor"]

    def usual(self, type_name: str, usual: float, floors: Floors) -> float:
        """What importance weights may leave of `misplaced`."""
        return _floor("artifact.levels_usual", type_name, floors) * self._own(usual)

    def _own(self, usual: float) -> float:
        return max(_share(float(self.nearest.sum()), float(self.power.sum())), usual)

    def far(self, type_name: str, usual: float, floors: Floors) -> IntArray:
        """The rows that by themselves are beyond what a row may be."""
        power = np.maximum(self.power, _QUIET * float(np.median(self.power))) if len(self.power) else self.power
        allowed = _floor("artifact.levels_row", type_name, floors) * np.maximum(self.nearest, usual * power)
        beyond = ~(self.error - self.nearest <= allowed + floors["artifact.tensor_floor"] * power)
        return self.rows[beyond]


def levels_of(rows: IntArray, raw: Bytes, type_name: str, a: Float32Array, b: Float32Array) -> Levels | None:
    """Of rows a of the artifact, stored as `raw`, with rows b of the checkpoint; None for a type without levels."""
    best = nearest(raw, type_name, b)
    if best is None:
        return None
    with np.errstate(all="ignore"):
        error, own, power = (products(x, x, 1)[:, 0] for x in (a - b, best - b, b))
    return Levels(rows, error, own, power)


def leans(sums: Sums, control: Sums, powers: Powers, known: IntArray | None, width: int) -> tuple[float, float]:
    """By how much the tensor's scale and its mean differ from the control's, the mean in root mean squares.

    `known` are the control's rows that were made; None for all.
    """
    power, n = float(powers.power.sum()), len(powers.power) * width
    some = slice(None) if known is None else known
    n_known = n if known is None else len(known) * width
    if not power > 0.0 or not n_known:
        return 0.0, 0.0
    scale = float(sums.lean.sum() - control.lean.sum()) / power
    shift = float(sums.shift.sum()) / n - float(control.shift[some].sum()) / n_known
    return abs(scale), abs(shift) / float(np.sqrt(power / n))


def lean_limits(usual: float, n_values: int, floors: Floors) -> tuple[float, float]:
    """What the two may be. The error of few values does not average out."""
    root = float(np.sqrt(usual))
    spread = 5.0 * root / float(np.sqrt(max(1, n_values)))
    return floors["artifact.scale"] * root + spread, floors["artifact.shift"] * root + spread


def _floor(name: str, type_name: str, floors: Floors) -> float:
    return floors.get(f"{name}.{type_name}", floors[name])


def _share(part: float, power: float) -> float:
    if not np.isfinite([part, power]).all():
        return float("inf")
    return max(0.0, part / power) if power > 0.0 else 0.0 if part <= 0.0 else float("inf")
