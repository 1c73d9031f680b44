"""`falcon`: Falcon 7B, 40B, 180B, Falcon 2 11B. LayerNorms, no biases, attention and feed-forward side by side.

Both branches read one norm, or, in the larger sizes, one each: then `attn_norm_2` is the attention's and `attn_norm`
the feed-forward's. One KV head for all, or several. The activation has no GGUF key: every published config says GELU
with erf, and so it is here unless a checkpoint says otherwise. The engine computes the tanh form. Falcon-RW (ALiBi,
biases) has no GGUF form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffharness.reference.archs.gptneox import StatedGelu, read_gelu
from diffharness.reference.decoder import LayerNorms, ParallelDecoder
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import Tap, Weights


@dataclass(frozen=True, kw_only=True)
class Falcon(StatedGelu, LayerNorms, ParallelDecoder):
    """A `ParallelDecoder` with LayerNorms, one for both branches or one for each."""

    gelu: str

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        return super().read(hp) | {"gelu": read_gelu(hp)}

    def before_attention(self, w: Weights, il: int, x: Tensor, tap: Tap) -> Tensor:
        if not w.has(f"blk.{il}.attn_norm_2.weight"):
            return super().before_attention(w, il, x, tap)
        h = self.norm(w, f"blk.{il}.attn_norm_2.weight", x)
        tap("attn_norm_2", h)
        return h

    def beside(self, w: Weights, il: int, x: Tensor, h: Tensor, tap: Tap) -> Tensor:
        return super().before_attention(w, il, x, tap) if w.has(f"blk.{il}.attn_norm_2.weight") else h


ARCHS = {"falcon": Falcon.from_metadata}
