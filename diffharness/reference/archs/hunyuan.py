"""`hunyuan-dense`, `hunyuan-moe`: Tencent's Hunyuan V1. Heads of queries and keys are normalised after the rotation.

Otherwise llama's forward in half-split order; in the MoE every layer has routed experts, whose weights sum to one,
beside a shared one. What the checkpoints call dynamic scaling of the context is a larger rope base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffharness.errors import ArtifactFileError
from diffharness.reference import ops
from diffharness.reference.decoder import Decoder, HeadNorms
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import Tap, Weights


@dataclass(frozen=True, kw_only=True)
class Hunyuan(HeadNorms, Decoder):
    """The dense model."""

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        fields = super().read(hp)
        if fields["n_expert"] == 1:  # some files say so of a dense model
            fields |= {"n_expert": 0, "n_expert_used": 0}
        alpha, size = hp.number("rope.scaling.alpha", 0.0), fields["head_dim"]
        if alpha > 0.0:
            fields["rope_base"] *= alpha ** (size / (size - 2))
        return fields

    def prepare(self, w: Weights, il: int, name: str, heads: Tensor, cos: Tensor, sin: Tensor, tap: Tap) -> Tensor:
        heads = self.turn(il, name, heads, cos, sin)
        tap(name + "_rope", ops.join_heads(heads))
        return self.norm_heads(w, il, name, heads, lambda _, value: tap(name + "_rope_norm", value))

    def has_experts(self, il: int) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class HunyuanMoe(Hunyuan):
    """The model with experts."""

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        fields = super().read(hp) | {
            "n_expert": hp.count("expert_count"),
            "n_expert_used": hp.count("expert_used_count"),
        }
        hp.integer("expert_shared_count", 0)  # says nothing that the tensors do not say
        if fields["n_expert_used"] > fields["n_expert"]:
            raise ArtifactFileError(
                f"metadata key `{hp.key('expert_used_count')}`: expected at most {fields['n_expert']} experts, "
                f"found {fields['n_expert_used']}"
            )
        return fields | {"experts_scale": hp.number("expert_weights_scale", 0.0) or 1.0}

    def has_experts(self, il: int) -> bool:
        return True


ARCHS = {"hunyuan-dense": Hunyuan.from_metadata, "hunyuan-moe": HunyuanMoe.from_metadata}
