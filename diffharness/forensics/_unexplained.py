"""What no relation explains: noise at its SQNR, values unrelated to the checkpoint's, or something between."""

from __future__ import annotations

import math

import numpy as np

from diffharness.forensics._pair import Pair, Relation, decibels

_CORRELATED = 0.1  # correlation of the residual with the checkpoint's values up to which it is noise
_UNRELATED = 0.1  # cosine up to which values have nothing to do with the checkpoint's
_STEP = 1 << 20  # elements at a time

UNEXPLAINED = {
    "noise": "unexplained: noise at SQNR",
    "unexplained": "unexplained: SQNR",
    "unrelated": "values unrelated to the checkpoint's: SQNR",
}
"""Kinds of rows that explain nothing, and the words that an SQNR in dB completes."""


def unexplained(pair: Pair) -> Relation:
    """One of `UNEXPLAINED`, by the correlation of what differs with the checkpoint's values."""
    a, b = pair.a.reshape(-1), pair.b.reshape(-1)
    xx = yy = xy = 0.0
    for i in range(0, a.size, _STEP):
        x, y = b[i : i + _STEP].astype(np.float64), a[i : i + _STEP].astype(np.float64)
        fine = np.isfinite(x) & np.isfinite(y)
        if not fine.all():
            x, y = x[fine], y[fine]
        xx, yy, xy = xx + float(x @ x), yy + float(y @ y), xy + float(x @ y)
    difference = max(xx + yy - 2 * xy, 0.0)
    cos = xy / math.sqrt(xx * yy) if xx > 0 and yy > 0 else 0.0
    correlation = (xy - xx) / math.sqrt(difference * xx) if difference > 0 and xx > 0 else 0.0
    error = difference / xx if xx > 0 else math.inf
    kind = "unrelated" if abs(cos) < _UNRELATED else "noise" if abs(correlation) < _CORRELATED else "unexplained"
    evidence = {"sqnr_db": decibels(error), "cos": cos, "correlation": correlation}
    return Relation(kind, UNEXPLAINED[kind], error, evidence)
