"""Another model, or this one damaged? What the spread of the tensors' errors says.

A fine-tune moves every layer and nearly every matrix, by like amounts; damage stands out of a file
that otherwise holds the checkpoint's values. Where training moved the matrices by less than their
types lose, the vectors (norms, scalars, kept in full precision) still show it: a little, in every layer,
or in a few while the logits moved by more than such vectors explain.

Floors: `artifact.lineage_share`, `artifact.lineage_alike`, `artifact.lineage_vector`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffharness.forensics.drift import TensorError
from diffharness.settings import Floors

_LAYERS = 0.5  # share of the layers, where the types of the others would not show it


def differs_everywhere(tensors: Sequence[TensorError], floors: Floors, *, logits_moved: bool = False) -> bool:
    """Whether nearly every matrix, and every layer, differs from the checkpoint alike, beyond what its type loses.

    `logits_moved`: the logits differ from the checkpoint's by more than quantization explains; False where
    there was no forward. Noise on everything differs alike as well: that a model is sound, only a forward tells.
    """
    matrices = [t for t in tensors if t.is_matrix and t.judged]
    vectors = [t for t in tensors if not t.is_matrix and t.judged]
    moved, telling = _moved(matrices, vectors, floors, logits_moved)
    if not moved or len(moved) < floors["artifact.lineage_share"] * len(telling):
        return False
    return _layers(telling) <= _layers(moved) and len(_layers(moved)) >= _LAYERS * len(_layers(matrices))


def is_rounded_otherwise(tensors: Sequence[TensorError], floors: Floors) -> bool:
    """Whether all that differs is which of its block's levels a value took, in nearly every matrix of the layers.

    That is what a quantizer leaves which learns its rounding (GPTQ, AutoRound): further from the checkpoint than the
    nearest levels would be, by design, though within what the type loses. Light training of every matrix looks the
    same; where the logits are no further from the checkpoint's than a plain quantization's, neither is damage.
    """
    with_levels = [t for t in tensors if t.misplaced is not None and t.layer is not None]
    damaged = [t for t in tensors if t.damaged]
    by_levels = [t for t in damaged if t.misplaced is not None and t.error <= t.limit and not t.beyond_rows]
    enough = floors["artifact.lineage_share"] * len(with_levels)
    return len(by_levels) == len(damaged) and sum(t.layer is not None for t in by_levels) >= enough > 0


def _moved(
    matrices: Sequence[TensorError], vectors: Sequence[TensorError], floors: Floors, logits_moved: bool
) -> tuple[list[TensorError], Sequence[TensorError]]:
    """Matrices that differ as one would expect of all if one did, and those in which that would show."""
    alike, share = floors["artifact.lineage_alike"], floors["artifact.lineage_share"]
    damaged = [t for t in matrices if t.damaged]
    # Where values beside their levels are counted, the others show whether they moved alike.
    local = [t for t in damaged if t.layer is not None and t.is_local and t.misplaced is None]
    if local and len(damaged) < share * len(matrices):
        return [], matrices  # a few rows or blocks of a few tensors: nobody trains that
    trained = [t for t in vectors if t.damaged]
    if trained and not damaged:
        lightly = all(t.error <= floors["artifact.lineage_vector"] for t in trained)
        everywhere = len(_long(trained)) >= share * len(_long(vectors)) > 0
        return [t for t in matrices if not t.exact] if lightly and (everywhere or logits_moved) else [], matrices
    usual = float(np.median([t.excess for t in damaged or matrices])) if matrices else 0.0
    # In types whose levels importance weights blur, less than that blur does not show.
    telling = [t for t in matrices if t.damaged or t.misplaced is None or t.misplaced_usual <= usual]
    return [t for t in telling if t.damaged or t.excess >= alike * usual > 0], telling


def _long(vectors: Sequence[TensorError]) -> list[TensorError]:
    """Without single values: a little training need not move one."""
    return [t for t in vectors if t.shape != (1,)]


def _layers(tensors: Sequence[TensorError]) -> set[int]:
    return {t.layer for t in tensors if t.layer is not None}
