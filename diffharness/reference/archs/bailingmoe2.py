"""`bailingmoe2`: Ling and Ring 2.0. dots.llm1's layers with one matrix for Q, K and V, and half of each head turned.

Experts come in groups, chosen first by the sum of their two best. Layers that predict further tokens (`nextn`) are
not part of the forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffharness.reference.archs.dots1 import Dots1
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.nextn import without_nextn


@dataclass(frozen=True, kw_only=True)
class BailingMoe2(Dots1):
    """Differs from dots.llm1 in tensors that a `Decoder` finds by itself, and in layers that no forward has."""

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        return super().read(without_nextn(hp))


ARCHS = {"bailingmoe2": BailingMoe2.from_metadata}
