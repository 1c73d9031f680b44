"""`qwen2moe`: Qwen 1.5 and 2 MoE. Qwen 2's attention; routed experts, and a shared one under a sigmoid gate of its own.

The routed experts' weights are a softmax over all experts and do not sum to one, unless the metadata say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffharness.errors import ArtifactFileError
from diffharness.reference.archs.qwen2 import Qwen2
from diffharness.reference.hparams import HyperParameters


@dataclass(frozen=True, kw_only=True)
class Qwen2Moe(Qwen2):
    """Differs from Qwen 2 in its feed-forward."""

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        fields = super().read(hp)
        if not fields["n_expert"]:
            raise ArtifactFileError(f"required metadata key `{hp.key('expert_count')}` is missing or zero")
        return fields | {
            "normalise_experts": hp.boolean("expert_weights_norm", False),
            "experts_scale": hp.number("expert_weights_scale", 0.0) or 1.0,
        }


ARCHS = {"qwen2moe": Qwen2Moe.from_metadata}
