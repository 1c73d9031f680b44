"""`seed_oss`: Seed-OSS. Llama's forward with biases; the norm before the feed-forward is `post_attention_norm`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffharness.reference.decoder import Decoder
from diffharness.reference.model import Tap, Weights


@dataclass(frozen=True, kw_only=True)
class SeedOss(Decoder):
    """A `Decoder` that keeps one norm under another name."""

    def before_ffn(self, w: Weights, il: int, x: Tensor, tap: Tap) -> Tensor:
        h = self.norm(w, f"blk.{il}.post_attention_norm.weight", x)
        tap("ffn_norm", h)
        return h


ARCHS = {"seed_oss": SeedOss.from_metadata}
