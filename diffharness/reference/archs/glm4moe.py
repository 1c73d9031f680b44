"""`glm4moe`: GLM-4.5, 4.6 and their Air models. Half of each head turned, routed experts beside shared ones.

Norm, attention, add; norm (kept as `post_attention_norm`), feed-forward, add. Queries and keys have biases, and head
norms in the larger model. Experts are chosen by the sigmoid of the router's logits plus a bias; after the leading
dense layers all are sparse. Layers that predict further tokens (`nextn`) are not part of the forward. Images are
ignored: sections of the rotary embedding (`rope.dimension_sections`) make no difference to text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffharness.reference.decoder import Decoder, HeadNorms, read_routing
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import Tap, Weights
from diffharness.reference.nextn import without_nextn


@dataclass(frozen=True, kw_only=True)
class Glm4Moe(HeadNorms, Decoder):
    """A `Decoder` with experts, and head norms where the file has them."""

    ffn_norm: ClassVar[str] = "post_attention_norm.weight"

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        hp = without_nextn(hp)
        hp.integer("expert_shared_count", 0)  # told by the tensors' shapes
        return super().read(hp) | read_routing(hp, gating="sigmoid", grouped=True)

    def norm_heads(self, w: Weights, il: int, name: str, heads: Tensor, tap: Tap) -> Tensor:
        return super().norm_heads(w, il, name, heads, tap) if w.has(f"blk.{il}.{name}_norm.weight") else heads


ARCHS = {"glm4moe": Glm4Moe.from_metadata}
