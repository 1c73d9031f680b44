"""`gemma2`: Gemma 2. Gemma 3's forward without norms of queries and keys, and with capped attention scores.

Every other layer slides, the first one does; both kinds have one rope. Scores are scaled, then capped; logits too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffharness.reference.archs.gemma3 import Gemma3
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import Tap, Weights


@dataclass(frozen=True, kw_only=True)
class Gemma2(Gemma3):
    """Differs from Gemma 3 in what it reads and in `norm_heads`."""

    n_layer_27b: ClassVar[int] = 46
    slides_by_default: ClassVar[int] = 2
    default_window: ClassVar[int] = 4096

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        """The format's defaults: a window of 4096, scores capped at 50, logits at 30."""
        fields = super().read(hp)
        return fields | {
            "sliding_rope_base": hp.number("rope.freq_base_swa", fields["rope_base"]),
            "sliding_rope_scaling": fields["rope_scaling"],
            "attn_softcap": hp.number("attn_logit_softcapping", 50.0) or None,
            "softcap": hp.number("final_logit_softcapping", 30.0) or None,
        }

    def norm_heads(self, w: Weights, il: int, name: str, heads: Tensor, tap: Tap) -> Tensor:
        return heads


ARCHS = {"gemma2": Gemma2.from_metadata}
