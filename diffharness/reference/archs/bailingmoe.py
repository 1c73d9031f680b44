"""`bailingmoe`: Ling lite and plus of the first generation. Llama's attention, experts in every layer, shared ones too.

Experts are weighed by the softmax over all of them. A normalised head (`norm_head`) is so in the file already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffharness.reference.archs.deepseek import Deepseek
from diffharness.reference.hparams import HyperParameters


@dataclass(frozen=True, kw_only=True)
class BailingMoe(Deepseek):
    """Differs from DeepSeek's first in that no layer is dense, whatever `leading_dense_block_count` says."""

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        return super().read(hp) | {"n_dense": 0}


ARCHS = {"bailingmoe": BailingMoe.from_metadata}
