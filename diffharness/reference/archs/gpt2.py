"""`gpt2`: GPT-2. Positions are vectors that are added to the embedding; nothing is rotated.

Pre-norm decoder with LayerNorms and biases everywhere, one matrix for queries, keys and values, GELU in its tanh form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.decoder import Decoder, LayerNorms
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Tap, Weights


@dataclass(frozen=True, kw_only=True)
class Gpt2(LayerNorms, Decoder):
    """A `Decoder` with LayerNorms and learned positions."""

    activation: ClassVar[str] = "gelu"

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        return super().read(hp) | {"n_rot": 0}

    def embed(self, w: Weights, tokens: Tensor, state: State, tap: Tap) -> Tensor:
        x = ops.embed(w, tokens) + w.rows("position_embd.weight", state.positions)
        tap("token_embd", x)
        return x


ARCHS = {"gpt2": Gpt2.from_metadata}
