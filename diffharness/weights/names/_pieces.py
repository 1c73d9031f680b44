"""Pieces of tensors that keep several of GGUF's stacks in one, an expert (or a row) along the first axis.

As gpt-oss and Llama 4 publish their experts: gate and up in one tensor [n_expert, n_embd, 2 · n_ff], side by side or
taking turns, and every matrix transposed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffharness.weights.names._map import Piece
from diffharness.weights.source import Float32Array


@dataclass(frozen=True)
class StackPiece(Piece):
    """A `Piece` whose view goes expert by expert, so that single experts can be read."""

    rowwise: bool = True

    def to_gguf(self, parts: Sequence[Float32Array]) -> Float32Array:
        return np.ascontiguousarray(self.view(parts[0].reshape(-1, *self.hf[1:])))


def transposed(shape: tuple[int, int, int]) -> StackPiece:
    """The whole stack, GGUF's [n_expert, out, in], with each matrix [in, out]."""
    n, n_out, n_in = shape
    return StackPiece((n, n_in, n_out), lambda whole: whole.transpose(0, 2, 1))


def half(shape: tuple[int, ...], part: int, *, turns: bool) -> StackPiece:
    """Gate (0) or up (1), GGUF's [n_expert, n_ff, n_embd], or their biases [n_expert, n_ff], of a transposed pair.

    `turns`: the two take turns in the last axis; otherwise they are its halves.
    """
    n, n_ff, *inner = shape
    cut = slice(part, None, 2) if turns else slice(part * n_ff, (part + 1) * n_ff)
    if inner:
        return StackPiece((n, *inner, 2 * n_ff), lambda whole: whole[..., cut].transpose(0, 2, 1))
    return StackPiece((n, 2 * n_ff), lambda whole: whole[..., cut])
