"""`phimoe`: Phi-3.5-MoE. LayerNorms, biases, LongRoPE, two of many experts, each weighed by a softmax of its own.

SparseMixer's routing (Liu et al., 2024) at inference: the first expert is the one of the highest logit; its weight is
its softmax among those experts whose logit is near the highest, as a share of the larger of the logit's magnitude and
the highest. Then the same of the rest for the second. So the two weights do not sum to one, and both are one where no
other logit is near. `router_jitter_noise`, half of what near means, has no GGUF key: 0.01 unless a checkpoint says.

The engine has RMSNorm where the model has LayerNorm, and Mixtral's routing: it is another model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffharness.reference.archs.phi3 import LongRope
from diffharness.reference.decoder import LayerNorms
from diffharness.reference.hparams import HyperParameters
from diffharness.weights.names.phimoe import ROUTER_JITTER


@dataclass(frozen=True, kw_only=True)
class PhiMoe(LayerNorms, LongRope):
    """Differs from Phi 3 in norms, experts and how they are chosen."""

    router_jitter: float

    eps_key: ClassVar[str] = "attention.layer_norm_rms_epsilon"

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        fields = super().read(hp)
        if fields["n_expert_used"] != 2:
            hp.refuse("expert_used_count", fields["n_expert_used"], "2")
        return fields | {"router_jitter": float(hp.metadata.get(ROUTER_JITTER, 0.01))}

    def route(self, logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weights, experts, left = [], [], logits
        for _ in range(self.n_expert_used):
            best, expert = left.max(dim=-1, keepdim=True)
            near = (best - logits) / logits.abs().clamp(min=best) <= 2 * self.router_jitter
            weights.append(left.masked_fill(~near, -math.inf).softmax(dim=-1).gather(-1, expert))
            experts.append(expert)
            left = left.scatter(-1, expert, -math.inf)
        return torch.cat(weights, dim=-1), torch.cat(experts, dim=-1)


ARCHS = {"phimoe": PhiMoe.from_metadata}
