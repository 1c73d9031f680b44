"""`minicpm`: MiniCPM 1, 2 and 4. Llama with the scales of tensor programs (Hu et al., 2024).

The embedding is multiplied, each branch is multiplied before it is added, logits are divided. Files of before those
keys have the scales of the first models: 12, 1.4/√layers, and a division by width/256, which the engine multiplies by
instead. LongRoPE or one list of divisors (`rope_freqs`) may stretch the context. Not supported: sparse attention
(InfLLM v2) beyond its dense length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffharness.reference.archs.granite import Scaled, divisor_of_logits
from diffharness.reference.archs.phi3 import LongRope
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import Weights

EMBEDDING_SCALE, DEPTH_SCALE, BASE_WIDTH = 12.0, 1.4, 256  # of the models before the keys


@dataclass(frozen=True, kw_only=True)
class MiniCpm(LongRope, Scaled):
    """A `Scaled` decoder with LongRoPE."""

    interleaved: ClassVar[bool] = True

    @classmethod
    def read_scales(cls, hp: HyperParameters, fields: dict[str, Any]) -> dict[str, Any]:
        depth = DEPTH_SCALE / math.sqrt(fields["n_layer"])
        return {
            "embedding_scale": hp.number("embedding_scale", EMBEDDING_SCALE) or 1.0,
            "residual_scale": hp.number("residual_scale", depth) or 1.0,
            "logit_scale": 1.0 / divisor_of_logits(hp, fields["n_embd"] / BASE_WIDTH),
        }

    def rope_factors(self, w: Weights, il: int) -> Tensor | None:
        one_list = w.find("rope_freqs.weight")
        return super().rope_factors(w, il) if one_list is None else one_list


ARCHS = {"minicpm": MiniCpm.from_metadata}
