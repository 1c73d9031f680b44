"""Ops whose result is a choice among values: what was chosen is compared, not the indices, so that ties are free."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffharness.recorded import RecordedNode

# Whether the order of the chosen values is part of the result.
CHOICES = {"ARGSORT": True, "TOP_K": False, "ARGMAX": True}


def chosen(
    node: RecordedNode, engine: NDArray[Any], replayed: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any], str | None]:
    """The values [..., k] that the indices of engine and replay stand for, and what is wrong with the engine's.

    A row that chooses an index twice, or one that is none, is wrong whatever it stands for.
    """
    source = node.sources[0]
    assert source is not None and source.raw is not None
    values = np.asarray(source.array(), dtype=np.float32)
    if node.op == "ARGMAX":  # [rows] of a matrix
        engine, replayed = engine.reshape(1, 1, -1, 1), replayed.reshape(1, 1, -1, 1)
    n = values.shape[-1]
    outside = (engine < 0) | (engine >= n)
    if outside.any():
        return engine, np.full(engine.shape, np.nan, dtype=np.float32), f"an index is outside of 0 to {n - 1}"
    ordered = np.sort(engine, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]).any()
    ours, theirs = (np.take_along_axis(values, np.asarray(i, dtype=np.int64), axis=-1) for i in (replayed, engine))
    if not CHOICES[node.op]:
        ours, theirs = np.sort(ours, axis=-1), np.sort(theirs, axis=-1)
    if twice:
        return theirs, np.full(theirs.shape, np.nan, dtype=np.float32), "an index is chosen twice in a row"
    return theirs, ours, None
