"""`gemma2`: Gemma 2. Gemma 3's forward without norms of queries and keys, and with capped attention scores.

Every other layer slides, the first one does; both kinds have one rope. Scores are scaled, then capped; logits too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from diffharness.reference.archs.gemma3 import Gemma3
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import Tap, Weights
from diffharness.weights.source import Metadata


@dataclass(frozen=True)
class Gemma2(Gemma3):
    """Differs from Gemma 3 in what it reads and in `norm_heads`."""

    n_layer_27b: ClassVar[int] = 46
    slides_by_default: ClassVar[int] = 2

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> Self:
        """From GGUF keys; raises ArtifactFileError where one is missing or makes no sense.

        The format's defaults: a window of 4096, scores capped at 50, logits at 30.
        """
        hp = HyperParameters(metadata)
        common = cls._common(hp)
        return cls(
            **common,
            window=cls._windows(hp, 4096),
            sliding_rope_base=hp.number("rope.freq_base_swa", common["global_rope_base"]),
            sliding_rope_scaling=common["global_rope_scaling"],
            attn_softcap=hp.number("attn_logit_softcapping", 50.0) or None,
            softcap=hp.number("final_logit_softcapping", 30.0) or None,
        )

    def norm_heads(self, w: Weights, il: int, name: str, heads: Tensor, tap: Tap) -> Tensor:
        return heads


ARCHS = {"gemma2": Gemma2.from_metadata}
