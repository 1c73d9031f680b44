"""One damaged tensor beside the checkpoint's, a relation between the two, and when it counts as an explanation.

A relation predicts the artifact's values from the checkpoint's. What it leaves (NMSE of the artifact against the
prediction) is held against what the type loses anyway (`TensorError.control` and `limit`):

* it explains all if it leaves at most the limit and takes away half of the excess over the control (nine tenths
  where the tensor was within the limit as a whole, and only some rows are far);
* it explains most if it takes away nine tenths of that excess: something else was lost as well, and is said.

Nothing else counts. One parameter fitted to noise takes away nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from diffharness.forensics.drift import TensorError
from diffharness.weights.source import Float32Array

_STEP = 1 << 21  # elements at a time
_GATE = 1 << 16  # elements that a prediction is tried on first
_HOPE = 0.7  # of the sample's NMSE: a prediction that does not explain even with this is given up
_UNRELATED = 2.0  # NMSE of values that have nothing to do with each other; nothing is worse for good reason


@dataclass(frozen=True)
class Relation:
    """What a tensor's values are. `words` completes "blk.0.attn_q.weight: ..."; `key` merges tensors alike."""

    kind: str
    words: str
    residual: float  # NMSE against the prediction
    evidence: dict[str, Any] = field(default_factory=dict)
    key: Hashable = None  # what tensors of one row share beside the kind
    several: str = ""  # the words where tensors with different keys are told together; "" for the same


@dataclass(frozen=True)
class Pair:
    """The values of both sides, of one shape."""

    t: TensorError
    a: Float32Array
    b: Float32Array

    def left(self, predicted: Float32Array) -> float:
        """NMSE of the artifact's values against `predicted` [the tensor's shape]; rejected on a sample if hopeless."""
        a, c = self.a.reshape(-1), predicted.reshape(-1)
        if a.size > 4 * _GATE:
            stride = a.size // _GATE | 1  # odd, so that it does not keep to one column
            sampled = nmse(a[::stride], c[::stride])
            if not self.explains(_HOPE * sampled):
                return sampled
        return nmse(a, c)

    def explains(self, residual: float) -> bool:
        return self.whole(residual) or self._excess(residual) <= 0.1 * self._excess(self.before) > 0

    def whole(self, residual: float) -> bool:
        """The explanation leaves no more than the type loses."""
        before = self._excess(self.before)
        share = 0.5 if self.t.error > self.t.limit else 0.1  # below the limit all is within it, explained or not
        return residual <= self.limit and self._excess(residual) <= share * before > 0

    @property
    def control(self) -> float:
        """What the type loses; 0 where nothing is known of it."""
        control = self.t.control
        return control if control is not None and math.isfinite(control) else 0.0

    @property
    def limit(self) -> float:
        return self.t.limit if math.isfinite(self.t.limit) else 0.0

    @cached_property
    def before(self) -> float:
        """The tensor's NMSE, over its finite values where not all are; at most that of unrelated values."""
        error = self.t.error
        if not math.isfinite(error):
            fine = np.isfinite(self.a)
            error = nmse(self.a[fine], self.b[fine]) if fine.any() else _UNRELATED
        return min(error, _UNRELATED)

    def _excess(self, error: float) -> float:
        return math.inf if math.isnan(error) else max(0.0, error - self.control)


Search = Callable[[Pair], Relation | None]


def nmse(a: Float32Array, c: Float32Array) -> float:
    """Σ(a−c)²/Σc², in float64, piece by piece; equal infinities do not differ, other non-finite values give inf."""
    a, c = a.reshape(-1), c.reshape(-1)
    error = power = 0.0
    for start in range(0, a.size, _STEP):
        x, y = a[start : start + _STEP], c[start : start + _STEP]
        alike = None
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            same = (x == y) | np.isfinite(x) & np.isfinite(y)
            if not same.all():
                return math.inf
            alike = np.isfinite(x)
            x, y = x[alike], y[alike]
        y64 = y.astype(np.float64)
        power += float(y64 @ y64)
        y64 -= x
        error += float(y64 @ y64)
    return 0.0 if error == 0.0 else error / power if power > 0.0 else math.inf


def decibels(error: float) -> float:
    """SQNR of an NMSE, in dB."""
    return math.inf if error <= 0.0 else -10.0 * math.log10(error) if math.isfinite(error) else -math.inf
