"""Where two tokenizations of one text part. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TokenDifference:
    """The first place where two tokenizations of one text differ; None where one has ended."""

    position: int
    id_a: int | None
    id_b: int | None
    piece_a: str | None
    piece_b: str | None
    before: tuple[str, ...]  # the pieces that both share just before
    after_a: tuple[str, ...]  # the pieces from the difference on
    after_b: tuple[str, ...]
    n_a: int  # lengths of both
    n_b: int


def first_difference(
    ids_a: Sequence[int],
    ids_b: Sequence[int],
    piece_of: Callable[[int], str],
    *,
    context: int = 6,
) -> TokenDifference | None:
    """The first position at which the ids differ (a length difference counts), or None."""
    shared = min(len(ids_a), len(ids_b))
    position = next((i for i in range(shared) if ids_a[i] != ids_b[i]), shared)
    if position == len(ids_a) == len(ids_b):
        return None
    after_a, after_b = (tuple(piece_of(i) for i in ids[position : position + context]) for ids in (ids_a, ids_b))
    return TokenDifference(
        position=position,
        id_a=ids_a[position] if after_a else None,
        id_b=ids_b[position] if after_b else None,
        piece_a=after_a[0] if after_a else None,
        piece_b=after_b[0] if after_b else None,
        before=tuple(piece_of(i) for i in ids_a[max(0, position - context) : position]),
        after_a=after_a,
        after_b=after_b,
        n_a=len(ids_a),
        n_b=len(ids_b),
    )
