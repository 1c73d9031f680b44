"""Layouts of recurrent layers' tensors: heads in another order, parts of a projection gathered, decays as logarithms.

A and its logarithm are told apart by the sign: GGUF keeps A = -exp(A_log), and the recurrence takes exp(dt · A).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffharness.weights.names._map import Draw, Layout, Mapped, Piece
from diffharness.weights.source import Float32Array


@dataclass(frozen=True)
class Tiled:
    """Heads from grouped order (all of group 0, all of group 1, ...) to tiled (the first of each, then the second).

    Applies along `axis` from `first` on: there are `n_head` heads of `size` elements each, in `n_group` groups.
    """

    n_group: int
    n_head: int
    size: int = 1
    first: int = 0
    axis: int = 0
    rowwise: bool = False

    def to_gguf(self, parts: Sequence[Float32Array]) -> Float32Array:
        return np.take(parts[0], self._order(), axis=self.axis)

    def to_hf(self, tensor: Float32Array) -> list[Float32Array]:
        return [np.take(tensor, np.argsort(self._order()), axis=self.axis)]

    def _order(self) -> NDArray[np.int64]:
        """For each element in GGUF's order, the one in the checkpoint's that it is."""
        heads = np.arange(self.n_head).reshape(self.n_group, -1).T.ravel()
        moved = self.first + (heads[:, None] * self.size + np.arange(self.size)).ravel()
        return np.concatenate((np.arange(self.first), moved))


@dataclass(frozen=True)
class PartPairs:
    """As `RotaryPairs`, where only the first `n_rot` rows of each head turn: the others stay where they are."""

    n_head: int
    n_rot: int
    rowwise: bool = False

    def to_gguf(self, parts: Sequence[Float32Array]) -> Float32Array:
        return parts[0][self._half_split_rows(len(parts[0]))]

    def to_hf(self, tensor: Float32Array) -> list[Float32Array]:
        return [tensor[np.argsort(self._half_split_rows(len(tensor)))]]

    def _half_split_rows(self, n_rows: int) -> NDArray[np.int64]:
        head = n_rows // self.n_head
        turned = np.arange(self.n_rot).reshape(2, -1).T.ravel()
        within = np.concatenate((turned, np.arange(self.n_rot, head)))
        return (np.arange(self.n_head)[:, None] * head + within).ravel()


@dataclass(frozen=True)
class Chained:
    """One layout after another, each of a single tensor."""

    layouts: tuple[Layout, ...]  # from the checkpoint to GGUF
    rowwise: bool = False

    def to_gguf(self, parts: Sequence[Float32Array]) -> Float32Array:
        for layout in self.layouts:
            parts = [layout.to_gguf(parts)]
        return parts[0]

    def to_hf(self, tensor: Float32Array) -> list[Float32Array]:
        for layout in reversed(self.layouts):
            [tensor] = layout.to_hf(tensor)
        return [tensor]


@dataclass(frozen=True)
class Scaled:
    """Values times `factors` one after another, and rows times their own (count and factor, from the top)."""

    factors: tuple[float, ...]
    rows: tuple[tuple[int, float], ...] = ()

    @property
    def rowwise(self) -> bool:
        return not self.rows

    def to_gguf(self, parts: Sequence[Float32Array]) -> Float32Array:
        values = parts[0]
        for factor in self._all(values.ndim):
            values = values * factor
        return values

    def to_hf(self, tensor: Float32Array) -> list[Float32Array]:
        for factor in reversed(self._all(tensor.ndim)):
            tensor = tensor / factor
        return [tensor]

    def _all(self, n_axes: int) -> list[Float32Array]:
        whole = [np.asarray(factor, np.float32) for factor in self.factors if factor != 1.0]
        if not self.rows:
            return whole
        by_row = np.concatenate([np.full(n, factor, np.float32) for n, factor in self.rows])
        return [*whole, by_row.reshape(-1, *(1,) * (n_axes - 1))]


@dataclass(frozen=True)
class Pieces(Piece):
    """Several parts of one Hugging Face tensor, one after another along the first axis: `view` gives the first."""

    others: tuple[Callable[[Float32Array], Float32Array], ...] = ()

    def to_gguf(self, parts: Sequence[Float32Array]) -> Float32Array:
        whole = parts[0].reshape(self.hf)
        rows = [np.ascontiguousarray(view(whole)).reshape(-1, self.hf[-1]) for view in (self.view, *self.others)]
        return np.concatenate(rows)

    def put(self, tensor: Float32Array, whole: Float32Array) -> None:
        at = 0
        for part in (self.view, *self.others):
            view = part(whole)
            n_rows = view.size // self.hf[-1]
            view[...] = tensor[at : at + n_rows].reshape(view.shape)
            at += n_rows


def _minus_exp(log: Float32Array) -> Float32Array:
    return (-np.exp(log.astype(np.float64))).astype(np.float32)


def _log_of_minus(a: Float32Array) -> Float32Array:
    return np.log(-a.astype(np.float64)).astype(np.float32)


MINUS_EXP = Mapped(_minus_exp, _log_of_minus)


def decays(low: float, high: float) -> Draw:
    """A = -exp(A_log) with exp(A_log) between `low` and `high`, of values that both forms hold exactly."""

    def draw(generator: np.random.Generator, shape: tuple[int, ...]) -> Float32Array:
        a = -generator.uniform(low, high, shape).astype(np.float32)
        for _ in range(4):  # until a round trip through the logarithm changes nothing
            a = _minus_exp(_log_of_minus(a))
        return a

    return draw
