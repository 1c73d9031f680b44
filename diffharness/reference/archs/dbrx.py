"""`dbrx`: Databricks' DBRX. LayerNorms without bias, a clamp on queries, keys and values, experts in every layer.

The three come of one matrix and are clamped together, before the rotation (half-split order). The norm before the
experts is the file's `attn_output_norm`. The routed experts' weights sum to one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffharness.errors import ArtifactFileError
from diffharness.reference.decoder import Decoder, LayerNorms
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import Tap, Weights

PLAIN_WEIGHTS = "diffharness.expert_weights_plain"  # bool, ours: experts' weights are left as the softmax made them


@dataclass(frozen=True, kw_only=True)
class Dbrx(LayerNorms, Decoder):
    """A `Decoder` with a clamp."""

    clamp: float | None  # of queries, keys and values, from both sides

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        fields = super().read(hp)
        if not fields["n_expert"]:
            raise ArtifactFileError(f"required metadata key `{hp.key('expert_count')}` is missing or zero")
        return fields | {
            "clamp": hp.number("attention.clamp_kqv", 0.0) or None,
            "normalise_experts": not hp.metadata.get(PLAIN_WEIGHTS, False),
            "experts_scale": hp.number("expert_weights_scale", 0.0) or 1.0,
        }

    def qkv(self, w: Weights, il: int, h: Tensor, tap: Tap) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().qkv(w, il, h, tap)
        if self.clamp is None:
            return q, k, v
        return q.clamp(-self.clamp, self.clamp), k.clamp(-self.clamp, self.clamp), v.clamp(-self.clamp, self.clamp)

    def before_ffn(self, w: Weights, il: int, x: Tensor, tap: Tap) -> Tensor:
        h = self.norm(w, f"blk.{il}.attn_output_norm.weight", x)
        tap("ffn_norm", h)
        return h


ARCHS = {"dbrx": Dbrx.from_metadata}
