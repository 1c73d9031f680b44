"""`bloom`: BLOOM, BLOOMZ. ALiBi in place of positions, LayerNorms everywhere, one more after the embedding.

One matrix for queries, keys and values, biases everywhere, GELU in its tanh form.
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
class Bloom(LayerNorms, Decoder):
    """A `Decoder` with LayerNorms whose scores fall with distance."""

    max_alibi_bias: float

    activation: ClassVar[str] = "gelu"

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        bias = hp.number("attention.max_alibi_bias", 8.0)
        if bias != 8.0:  # a constant of the model, which the engine does not read either
            hp.refuse("attention.max_alibi_bias", bias, "8")
        return super().read(hp) | {"n_rot": 0, "max_alibi_bias": bias}

    def scores(self, il: int) -> ops.Scores:
        return ops.Scores(self.attn_scale, self.window[il], max_alibi_bias=self.max_alibi_bias)

    def embed(self, w: Weights, tokens: Tensor, state: State, tap: Tap) -> Tensor:
        x = self.norm(w, "token_embd_norm.weight", ops.embed(w, tokens))
        tap("token_embd", x)
        return x


ARCHS = {"bloom": Bloom.from_metadata}
