"""`qwen3`: Qwen 2's forward without biases, with an RMSNorm of every Q and K head before the rotation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.archs.qwen2 import Qwen2
from diffharness.reference.model import Tap, Weights


@dataclass(frozen=True)
class Qwen3(Qwen2):
    """Differs from Qwen 2 in the head norms, whose weight [head_dim] all heads of a layer share."""

    def norm_heads(self, w: Weights, il: int, name: str, heads: Tensor, tap: Tap) -> Tensor:
        heads = self.norm(w, f"blk.{il}.{name}_norm.weight", heads)
        tap(name + "_norm", ops.join_heads(heads))
        return heads
