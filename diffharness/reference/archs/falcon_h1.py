"""`falcon-h1`: Falcon H1. In every layer attention and Mamba 2 read the same normed stream, and their sum is added.

GGUF has the model's many multipliers worked into its matrices. Where the mixer's output is normalised at all, it is
gated first, as in every released model; a checkpoint may ask for the norm first (`mamba_norm_before_gate`), which GGUF
has no key for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffharness.reference import mamba
from diffharness.reference.decoder import Decoder
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Tap, Weights
from diffharness.weights.names._mamba import NORM_FIRST


@dataclass(frozen=True, kw_only=True)
class FalconH1(Decoder):
    """A `Decoder` with a Mamba mixer beside its attention."""

    ffn_norm: ClassVar[str] = "ffn_norm"  # the one norm whose name has no `.weight`

    sizes: mamba.MambaSizes
    norm_first: bool  # the mixer's output is normalised before it is gated

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        sizes = mamba.MambaSizes.read(hp, heads=True)
        return super().read(hp) | {"sizes": sizes, "norm_first": bool(hp.metadata.get(NORM_FIRST, False))}

    def mixer(self, w: Weights, il: int, h: Tensor, state: State, tap: Tap) -> Tensor:
        attention = self.attention(w, il, h, state, tap)
        blk, first = f"blk.{il}.", self.norm_first
        return attention + mamba.head_mixer(w, blk, h, self.sizes, tap, eps=self.eps, norm_first=first)


ARCHS = {"falcon-h1": FalconH1.from_metadata}
