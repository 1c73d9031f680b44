"""`mistral3`: Mistral Small 3 and Ministral 3, text. Llama with YaRN, and queries that grow with their position.

Ministral 3 multiplies the turned query at position p by 1 + β ln(1 + ⌊p / original context⌋) (`temperature_scale` is
β), so that attention stays sharp far beyond the context it was first trained on. Mistral Small 3 has neither. With
`yarn_log_multiplier` m, sine and cosine are scaled by (0.1 ln(factor) + 1) / (0.1 m ln(factor) + 1). Images are
ignored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.archs.llama import Llama
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State


@dataclass(frozen=True, kw_only=True)
class Mistral3(Llama):
    """Differs from Llama in the queries' scale and in how YaRN's magnitude is stated."""

    query_growth: float  # β; 0: queries are as they are
    growth_step: int  # positions after which queries grow

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        if shared := hp.integer("expert_shared_feed_forward_length", 0):
            hp.refuse("expert_shared_feed_forward_length", shared, "no shared experts")
        fields = super().read(hp)
        growth, step = hp.number("attention.temperature_scale", 0.0), fields["rope_scaling"].n_ctx_orig
        if growth and not step:
            step = hp.count("rope.scaling.original_context_length")
        return fields | {
            "rope_scaling": _with_log_multiplier(hp, fields["rope_scaling"]),
            "experts_scale": hp.number("expert_weights_scale", 0.0) or 1.0,
            "query_growth": growth,
            "growth_step": step,
        }

    def attend(self, il: int, q: Tensor, k: Tensor, v: Tensor, state: State, sinks: Tensor | None = None) -> Tensor:
        if self.query_growth:
            times = state.positions.div(self.growth_step, rounding_mode="floor").to(q.dtype)
            q = q * (1 + self.query_growth * (1 + times).log())[:, None, None]
        return super().attend(il, q, k, v, state, sinks)


def _with_log_multiplier(hp: HyperParameters, scaling: ops.RopeScaling) -> ops.RopeScaling:
    """The magnitude by `yarn_log_multiplier`, unless the file states the magnitude itself."""
    multiplier = hp.number("rope.scaling.yarn_log_multiplier", 0.0)
    if not multiplier or not scaling.ext_factor or hp.has("rope.scaling.yarn_attn_factor"):
        return scaling
    log = max(0.0, -0.1 * math.log(scaling.freq_scale))
    magnitude = (log + 1) / (multiplier * log + 1) * hp.number("rope.scaling.attn_factor", 1.0)
    return replace(scaling, magnitude=magnitude)


ARCHS = {"mistral3": Mistral3.from_metadata}
