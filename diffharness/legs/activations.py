"""What a run's values say by themselves: the first that is not finite, and those that near the limit of float16.

An engine that keeps keys and values, or multiplies, in float16 overflows at 65504; an activation that comes near is the
first suspect where later values are not finite. Massive activations are common and harmless in float32.
"""

from __future__ import annotations

import numpy as np

from diffharness.captures import Capture
from diffharness.metrics import FloatArray
from diffharness.records.noise import LargeTap, NonFiniteTap
from diffharness.taps import split

FLOAT16_MAX = 65504.0
MOST = 10  # taps listed
_BLOCK_ELEMENTS = 1 << 21


def first_non_finite(capture: Capture) -> NonFiniteTap | None:
    """The first tap in order of computation with a value that is not finite, and its first such token."""
    for tap in capture.taps:
        bad = np.concatenate([(~np.isfinite(block)).sum(axis=1) for _, block in _blocks(capture.read(tap))])
        tokens = np.flatnonzero(bad)
        if tokens.size:
            return NonFiniteTap(tap=tap, layer=split(tap)[0], token=int(tokens[0]), count=int(bad.sum()))
    return None


def large(capture: Capture, share: float) -> list[LargeTap]:
    """Taps with a finite value above `share` of float16's largest number, the largest first; logits do not count."""
    found = []
    for tap in capture.taps:
        if tap == "logits":  # never multiplied by anything
            continue
        largest, token = 0.0, 0
        for start, block in _blocks(capture.read(tap)):
            sizes = np.where(np.isfinite(block), np.abs(block), 0.0).max(axis=1, initial=0.0)
            if sizes.size and float(sizes.max()) > largest:
                largest, token = float(sizes.max()), start + int(sizes.argmax())
        if largest > share * FLOAT16_MAX:
            part = LargeTap(tap=tap, layer=split(tap)[0], token=token, largest=largest, share=largest / FLOAT16_MAX)
            found.append(part)
    return sorted(found, key=lambda row: -row.largest)[:MOST]


def first_non_finite_row(values: FloatArray) -> int | None:
    """The first row of [n, width] with a value that is not finite."""
    for start, block in _blocks(values):
        rows = np.flatnonzero(~np.isfinite(block).all(axis=1))
        if rows.size:
            return start + int(rows[0])
    return None


def _blocks(values: FloatArray) -> list[tuple[int, FloatArray]]:
    """Runs of rows, each with its first row's number; views, so that a mapped file is read piece by piece."""
    step = max(1, _BLOCK_ELEMENTS // max(1, values.shape[1]))
    return [(start, values[start : start + step]) for start in range(0, len(values), step)]
