"""`phi2`: Phi-1, Phi-1.5, Phi-2. One LayerNorm feeds attention and feed-forward, which stand side by side.

Biases everywhere, on the head too; a part of each head is rotated; GELU in its tanh form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffharness.reference.decoder import LayerNorms, ParallelDecoder


@dataclass(frozen=True, kw_only=True)
class Phi2(LayerNorms, ParallelDecoder):
    """A `ParallelDecoder` with LayerNorms."""

    activation: ClassVar[str] = "gelu"


ARCHS = {"phi2": Phi2.from_metadata}
