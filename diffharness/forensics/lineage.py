"""Another model, or this one damaged? What the spread of the tensors' errors says.

A fine-tune moves every layer and nearly every matrix, by like amounts; damage stands out of a file
that otherwise holds the checkpoint's values. Where training moved the matrices by less than their
types lose, the vectors (norms, scalars, kept in full precision) still show it: a little, in every layer.

Floors: `artifact.lineage_share`, `artifact.lineage_alike`, `artifact.lineage_vector`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffharness.forensics.drift import TensorError
from diffharness.legs._floors import Floors


def differs_everywhere(tensors: Sequence[TensorError], floors: Floors) -> bool:
    """Whether nearly every matrix, and every layer, differs from the checkpoint alike, beyond what its type loses."""
    matrices = [t for t in tensors if t.is_matrix and t.judged]
    moved = _moved(matrices, [t for t in tensors if not t.is_matrix and t.judged], floors)
    if not matrices or len(moved) < floors["artifact.lineage_share"] * len(matrices):
        return False
    return _layers(matrices) <= _layers(moved)


def _moved(matrices: Sequence[TensorError], vectors: Sequence[TensorError], floors: Floors) -> list[TensorError]:
    """Matrices that differ as one would expect of all if one did."""
    alike = floors["artifact.lineage_alike"]
    damaged = [t for t in matrices if t.damaged]
    if damaged:
        usual = float(np.median([t.excess for t in damaged]))
        return [t for t in matrices if t.damaged or t.excess >= alike * usual]
    trained = [t for t in vectors if t.damaged]
    if trained:
        lightly = all(t.error <= floors["artifact.lineage_vector"] for t in trained)
        everywhere = len(trained) >= floors["artifact.lineage_share"] * len(vectors)
        return [t for t in matrices if not t.exact] if lightly and everywhere else []
    return [t for t in matrices if t.excess >= alike * (t.control or 0.0) > 0]


def _layers(tensors: Sequence[TensorError]) -> set[int]:
    return {t.layer for t in tensors if t.layer is not None}
