"""`qwen3moe`: Qwen 3 MoE. Qwen 3's attention, and routed experts instead of the dense feed-forward in every layer.

Whether the routed experts' weights are made to sum to one is `norm_topk_prob` of the model (`expert_weights_norm`
in the metadata, true where it is absent, as in every released model).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from diffharness.errors import ArtifactFileError
from diffharness.reference.archs.qwen3 import Qwen3
from diffharness.weights.source import Metadata


@dataclass(frozen=True, kw_only=True)
class Qwen3Moe(Qwen3):
    """Differs from Qwen 3 in that experts are not optional."""

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> Self:
        model = super().from_metadata(metadata)
        if model.n_expert <= 0:
            raise ArtifactFileError("required metadata key `qwen3moe.expert_count` is missing or zero")
        return model


ARCHS = {"qwen3moe": Qwen3Moe.from_metadata}
