"""`qwen35`, `qwen35moe`: Qwen 3.5 and 3.6, dense and with experts. Qwen 3 Next with its projections apart.

GGUF keeps value heads so that head v belongs to key head v modulo the number of key heads. The rotary embedding has
sections for time, height and width of images, which on text all turn by the token's position. Images are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.archs.qwen3next import Qwen3Next
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import Weights


@dataclass(frozen=True, kw_only=True)
class Qwen35(Qwen3Next):
    """Differs from Qwen 3 Next in how a delta-rule layer's tensors are kept."""

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        out = super().read(hp)
        sections = hp.integers("rope.dimension_sections", 4, 0)
        # Sections take turns pair by pair; the fourth, which no position of a text belongs to, has what they leave.
        turns = [i % max(1, sum(sections)) for i in range(out["n_rot"] // 2)]
        if any(sections) and any(i >= 3 * sections[i % 3] for i in turns):
            hp.refuse("rope.dimension_sections", list(sections), f"sections that cover {out['n_rot'] // 2} pairs")
        return out

    def by_value_head(self, heads: Tensor) -> Tensor:
        return heads.repeat(1, 1, self.n_value_head // self.n_key_head, 1)

    def beta_alpha(self, w: Weights, blk: str, h: Tensor) -> tuple[Tensor, Tensor]:
        return ops.project(w, blk + "ssm_beta", h).sigmoid(), ops.project(w, blk + "ssm_alpha", h)


ARCHS = {"qwen35": Qwen35.from_metadata, "qwen35moe": Qwen35.from_metadata}
