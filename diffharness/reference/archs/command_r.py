"""`command-r`: Command R and R+, Aya. Attention and feed-forward read one LayerNorm of the same residual stream.

LayerNorms have no bias. The largest models normalise queries and keys of each head, every head with weights of its
own. Rotary pairs are neighbours, the head is the embedding, logits are multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.decoder import LayerNorms, ParallelDecoder
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import Tap, Weights


@dataclass(frozen=True, kw_only=True)
class CommandR(LayerNorms, ParallelDecoder):
    """A `ParallelDecoder` with LayerNorms and scaled logits."""

    interleaved: ClassVar[bool] = True

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        return super().read(hp) | {"logit_scale": hp.number("logit_scale", 0.0) or 1.0}

    def norm_heads(self, w: Weights, il: int, name: str, heads: Tensor, tap: Tap) -> Tensor:
        weight = w.find(f"blk.{il}.{name}_norm.weight")  # [H, D]
        if weight is None:
            return heads
        heads = ops.layer_norm(heads, None, None, self.eps) * weight
        tap(name + "_norm", ops.join_heads(heads))
        return heads


ARCHS = {"command-r": CommandR.from_metadata}
