"""`ernie4_5`, `ernie4_5-moe`: Baidu's ERNIE 4.5, text. Llama's forward; the MoE has a bias on the choice of experts.

Rotary pairs are neighbours, in the checkpoint already. In the MoE the first layers are dense, then every layer (or
every `interleave_moe_layer_step`-th) has routed experts, whose weights sum to one, and shared ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffharness.reference.decoder import Decoder, read_routing
from diffharness.reference.hparams import HyperParameters


@dataclass(frozen=True, kw_only=True)
class Ernie(Decoder):
    """The dense model; files may state a number of experts that it has not."""

    interleaved: ClassVar[bool] = True

    def has_experts(self, il: int) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class ErnieMoe(Decoder):
    """The model with experts."""

    moe_step: int  # of the layers after the dense ones, every so-manieth has experts

    interleaved: ClassVar[bool] = True

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        fields = (
            super().read(hp) | read_routing(hp, normalise=True) | {"moe_step": hp.count("interleave_moe_layer_step")}
        )
        hp.integer("expert_shared_count", 0)  # says nothing that the tensors do not say
        # Every published model normalises, and files that llama.cpp's tools write say false where it is not asked.
        return fields | {"normalise_experts": True}

    def has_experts(self, il: int) -> bool:
        return super().has_experts(il) and (il + 1) % self.moe_step == 0


ARCHS = {"ernie4_5": Ernie.from_metadata, "ernie4_5-moe": ErnieMoe.from_metadata}
