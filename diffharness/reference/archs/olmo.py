"""`olmo`: OLMo 1. Norms without weights, and projections cut off at a bound.

LayerNorm in its bare form stands before attention, before the feed-forward and before the head. Queries, keys and
values are clamped to ±`attention.clamp_kqv` where the model says so. Rotary pairs are neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffharness.reference.decoder import Decoder, LayerNorms
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import Tap, Weights


@dataclass(frozen=True, kw_only=True)
class Clamped(Decoder):
    """A `Decoder` that cuts queries, keys and values off at a bound, before they turn."""

    clamp: float | None  # the bound, from both sides

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        clamp = hp.number("attention.clamp_kqv", 0.0)
        return super().read(hp) | {"clamp": clamp if clamp > 0.0 else None}

    def qkv(self, w: Weights, il: int, h: Tensor, tap: Tap) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().qkv(w, il, h, tap)
        if self.clamp is None:
            return q, k, v
        return q.clamp(-self.clamp, self.clamp), k.clamp(-self.clamp, self.clamp), v.clamp(-self.clamp, self.clamp)


@dataclass(frozen=True, kw_only=True)
class Olmo(LayerNorms, Clamped):
    """A `Clamped` decoder with bare LayerNorms, which the file has no tensors of."""

    interleaved: ClassVar[bool] = True


ARCHS = {"olmo": Olmo.from_metadata}
