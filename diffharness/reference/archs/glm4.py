"""`glm4`: GLM-4-0414 (9B, 32B), GLM-OCR's text. ChatGLM's layers with norms after attention and feed-forward.

Rotary pairs are neighbours, except in files of models that see images (`rope.dimension_sections`): their rows are
permuted to half-split pairs. To text the sections make no other difference; images are ignored. Layers that predict
further tokens (`nextn`) are not part of the forward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from diffharness.reference import ops
from diffharness.reference.archs.chatglm import ChatGlm
from diffharness.reference.decoder import PostNorms
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.nextn import without_nextn

_SECTIONS = "rope.dimension_sections"


@dataclass(frozen=True, kw_only=True)
class Glm4(PostNorms, ChatGlm):
    """Differs from ChatGLM in the norms after each branch, and in the order of rows where there are sections."""

    has_sections: bool  # for time and height at least

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        has_sections = hp.has(_SECTIONS) and all(hp.integers(_SECTIONS, 2))
        return super().read(without_nextn(hp)) | {"has_sections": has_sections}

    def rotary(self, il: int) -> ops.Rotary:
        return replace(super().rotary(il), interleaved=not self.has_sections)


ARCHS = {"glm4": Glm4.from_metadata}
