"""Which rows of a large tensor stand for all: evenly spread, so that no part is left out, and the same every time."""

from __future__ import annotations

import numpy as np

from diffharness.weights.source import IntArray

# Values of a tensor that are quantized afresh at most: 0.1 s of most types on two cores. ggml searches
# the lattice of these for each group of values, at 0.02 to 0.13 million values a second.
_VALUES = 1 << 20
_SLOW_VALUES = 1 << 15
_SLOW = frozenset({"IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S"})
_LEAST = 32  # rows, however long


def again_at_most(type_name: str, width: int) -> int:
    """Rows of that width that are quantized afresh at most."""
    return max(_LEAST, (_SLOW_VALUES if type_name in _SLOW else _VALUES) // max(1, width))


def spread_rows(n_rows: int, n: int) -> IntArray:
    """`n` of `n_rows` rows in order: one of each of `n` equal parts, at a place drawn with a fixed seed.

    Drawn, since every k-th row may be the same row of every head.
    """
    if n >= n_rows:
        return np.arange(n_rows)
    bounds = np.arange(n + 1) * n_rows // n
    drawn = np.random.default_rng(n_rows).random(n)
    return np.asarray((bounds[:-1] + drawn * np.diff(bounds)).astype(np.int64))
