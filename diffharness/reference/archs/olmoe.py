"""`olmoe`: OLMoE. Experts whose weights are the softmax over all of them, not made to sum to one.

Norms stand before the blocks; queries and keys are normalised over all heads at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffharness.reference.decoder import Decoder, WideNorms
from diffharness.reference.hparams import HyperParameters


@dataclass(frozen=True, kw_only=True)
class Olmoe(WideNorms, Decoder):
    """A `Decoder` with wide norms and experts."""

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        return super().read(hp) | {"normalise_experts": hp.boolean("expert_weights_norm", False)}


ARCHS = {"olmoe": Olmoe.from_metadata}
