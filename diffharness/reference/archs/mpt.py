"""`mpt`: MPT 7B and 30B, SEA-LION. ALiBi, or learned positions; clipped queries, keys and values; no biases.

LayerNorms; queries and keys may be normalised over all heads at once (`qk_ln`). The activation has no GGUF key: it is
GELU with erf unless a checkpoint says otherwise. The engine computes the tanh form. AWQ's `ffn.act.scales` divide the
activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.archs.gptneox import StatedGelu, read_gelu
from diffharness.reference.archs.olmo import Clamped
from diffharness.reference.decoder import LayerNorms, WideNorms
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Tap, Weights


@dataclass(frozen=True, kw_only=True)
class Mpt(StatedGelu, WideNorms, LayerNorms, Clamped):
    """A `Clamped` decoder with LayerNorms whose scores fall with distance."""

    gelu: str
    max_alibi_bias: float

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        return super().read(hp) | {
            "n_rot": 0,
            "gelu": read_gelu(hp),
            "max_alibi_bias": hp.number("attention.max_alibi_bias", 0.0),
        }

    def scores(self, il: int) -> ops.Scores:
        return ops.Scores(self.attn_scale, self.window[il], max_alibi_bias=self.max_alibi_bias)

    def embed(self, w: Weights, tokens: Tensor, state: State, tap: Tap) -> Tensor:
        x = ops.embed(w, tokens)
        if w.has("position_embd.weight"):
            x = x + w.rows("position_embd.weight", state.positions)
        tap("token_embd", x)
        return x

    def norm_heads(self, w: Weights, il: int, name: str, heads: Tensor, tap: Tap) -> Tensor:
        # Both or neither: the one without the other is no model's, and the engine leaves it alone.
        if not all(w.has(f"blk.{il}.attn_{part}_norm.weight") for part in "qk"):
            return heads
        return super().norm_heads(w, il, name, heads, tap)

    def mlp(self, w: Weights, il: int, h: Tensor, state: State, tap: Tap) -> Tensor:
        blk = f"blk.{il}."
        act = self.act(self.project(w, blk + "ffn_up", h, "ffn_up", tap), state)
        scales = w.find(blk + "ffn.act.scales")
        act = act if scales is None else act / scales
        tap("ffn_act", act)
        return ops.project(w, blk + "ffn_down", act)


ARCHS = {"mpt": Mpt.from_metadata}
