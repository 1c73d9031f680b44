"""`stablelm`: StableLM 3B, StableLM 2, Stable Code. Llama with LayerNorms, a part of each head rotated.

In the 12B every head of queries and keys is normalised with a weight of its own, and the feed-forward has no norm: it
reads the attention's input. The tensors tell; the key `use_parallel_residual` of older files is not always right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.decoder import Decoder, LayerNorms
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Tap, Weights


@dataclass(frozen=True, kw_only=True)
class StableLm(LayerNorms, Decoder):
    """A `Decoder` with LayerNorms, of heads too, whose branches may stand side by side."""

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        hp.boolean("use_parallel_residual", False)
        return super().read(hp)

    def norm_heads(self, w: Weights, il: int, name: str, heads: Tensor, tap: Tap) -> Tensor:
        weight = w.find(f"blk.{il}.{name}_norm.weight")  # [H, D]
        if weight is None:
            return heads
        heads = self.norm(w, None, heads) * weight
        tap(name + "_norm", ops.join_heads(heads))
        return heads

    def layer(self, w: Weights, il: int, x: Tensor, state: State, tap: Tap) -> Tensor:
        h = self.before_attention(w, il, x, tap)
        x = self.add(x, self.mixer(w, il, h, state, tap))
        tap("ffn_in", x)
        if w.has(f"blk.{il}.ffn_norm.weight"):
            h = self.before_ffn(w, il, x, tap)
        return self.end_layer(w, il, self.add(x, self.feed_forward(w, il, h, state, tap)), tap)


ARCHS = {"stablelm": StableLm.from_metadata}
