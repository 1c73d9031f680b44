"""`deepseek`: DeepSeek MoE 16B. Llama's attention, routed experts beside shared ones.

Experts are weighed by the softmax over all of them; whether the weights of the chosen sum to one is `norm_topk_prob`
of the model (`expert_weights_norm` in the metadata, false where it is absent, as in the released models).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffharness.reference.decoder import Decoder, read_routing
from diffharness.reference.hparams import HyperParameters


@dataclass(frozen=True, kw_only=True)
class Deepseek(Decoder):
    """A `Decoder` with experts after the leading dense layers."""

    interleaved: ClassVar[bool] = True

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        hp.integer("expert_shared_count", 0)  # told by the tensors' shapes
        return super().read(hp) | read_routing(hp)


ARCHS = {"deepseek": Deepseek.from_metadata}
