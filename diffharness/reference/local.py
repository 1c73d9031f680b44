"""One place of a forward at a time, on inputs that are given: the embedding, one layer, or the head.

Weights of the place stay in memory until another place is asked for, so that many models can be tried on one layer
for the price of their arithmetic. Keys and values that a layer borrows are made when it asks for them, by their own
layer on that layer's own given input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffharness.errors import InconclusiveError
from diffharness.reference.hypotheses import Place
from diffharness.reference.model import DEFINITION, Arithmetic, State, Tap
from diffharness.reference.runner import DTYPES, EngineInputs, Layer
from diffharness.reference.steps import Steps
from diffharness.reference.weights import SourceWeights
from diffharness.weights.source import IntArray, WeightSource

OnRows = Callable[[str, Tensor, slice], None]
"""Called with a tap's name without `blk.N.`, its value [rows, width], and the rows of all tokens that it is of."""


@dataclass(frozen=True)
class Chunk:
    """One chunk of the fixture, and which rows of all tokens it is."""

    ids: IntArray
    rows: slice


class LocalForward:
    """Places of models on one source of weights, fed with `inputs`; close it when done."""

    def __init__(
        self,
        source: WeightSource,
        inputs: EngineInputs,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        arithmetic: Arithmetic = DEFINITION,
    ) -> None:
        self.weights = SourceWeights(source, dtype=DTYPES[dtype], device=device)
        self.weights.keep = True
        self._inputs, self._arithmetic = inputs, arithmetic
        self._place: Place | None = None

    def close(self) -> None:
        self.weights.close()

    def input(self, place: Layer, rows: slice) -> Tensor:
        """The given input of a layer or of the head [1, rows, E]; InconclusiveError where there is none."""
        values = self._inputs(place)
        if values is None:
            raise InconclusiveError(
                f"the engine gave no input of {'the head' if place == 'head' else f'layer {place}'}",
                hint="check that the engine exposes token_embd and layer_out",
            )
        x = torch.from_numpy(np.array(values[rows]))
        return x.to(device=self.weights.device, dtype=self.weights.dtype)[None]

    @torch.inference_mode()
    def run(self, model: Steps, place: Place, chunks: Sequence[Chunk], on_tap: OnRows) -> None:
        """Evaluate `place` of `model` on every chunk and tell each tap."""
        if place != self._place:
            self.weights.close()
            self._place = place
        for chunk in chunks:
            self._run(model, place, chunk, lambda name, value, rows=chunk.rows: on_tap(name, value[0], rows))  # type: ignore[misc]

    def _run(self, model: Steps, place: Place, chunk: Chunk, tap: Tap) -> None:
        device = self.weights.device
        tokens = torch.from_numpy(chunk.ids.astype(np.int64))[None].to(device)
        state = State(torch.arange(tokens.shape[1], device=device), self._arithmetic)
        if place == "embed":
            model.embed(self.weights, tokens, state, tap)
        elif place == "head":
            model.head(self.weights, self.input("head", chunk.rows), state, tap)
        else:
            model.embed(self.weights, tokens, state, _ignore)  # for what the state tells layers of their tokens
            state.shared_kv = _Lent(
                lambda il: model.layer(self.weights, il, self.input(il, chunk.rows), state, _ignore)
            )
            model.layer(self.weights, place, self.input(place, chunk.rows), state, tap)


class _Lent(dict[int, tuple[Tensor, Tensor]]):
    """Keys and values by layer; those that are missing are made by running their layer."""

    def __init__(self, run: Callable[[int], object]) -> None:
        super().__init__()
        self._run = run

    def __missing__(self, il: int) -> tuple[Tensor, Tensor]:
        self._run(il)
        if il not in self:
            raise KeyError(il)
        return self[il]


def _ignore(name: str, value: Tensor) -> None:
    """A tap that nobody listens to."""
