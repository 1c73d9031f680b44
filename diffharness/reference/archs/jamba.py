"""`jamba`: Jamba. Mamba 1 in the place of most attention, experts in the place of some feed-forwards.

A layer without KV heads is recurrent; what dt, b and c are made of is RMS-normalised with weights. Attention has no
rotary embedding. Experts' weights are the softmax over all, not made to sum to one. Which layers have experts the
tensors say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffharness.reference import mamba
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.hybrid import Hybrid
from diffharness.reference.model import State, Tap, Weights


@dataclass(frozen=True, kw_only=True)
class Jamba(Hybrid):
    """A `Hybrid` of attention and Mamba 1."""

    sizes: mamba.MambaSizes

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        own = {"n_rot": 0, "normalise_experts": False, "sizes": mamba.MambaSizes.read(hp, heads=False)}
        return super().read(hp) | own

    def recurrence(self, w: Weights, il: int, h: Tensor, tap: Tap) -> Tensor:
        blk = f"blk.{il}."
        return mamba.channel_mixer(
            w, blk, h, self.sizes, tap, lambda part, x: self.norm(w, f"{blk}ssm_{part}_norm.weight", x)
        )

    def feed_forward(self, w: Weights, il: int, h: Tensor, state: State, tap: Tap) -> Tensor:
        routed = w.has(f"blk.{il}.ffn_gate_inp.weight")
        out = self.experts(w, il, h, state, tap) if routed else self.mlp(w, il, h, state, tap)
        tap("ffn_out", out)
        return out


ARCHS = {"jamba": Jamba.from_metadata}
