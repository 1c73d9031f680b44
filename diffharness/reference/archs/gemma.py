"""`gemma`: Gemma 1, CodeGemma. Llama's order of parts with GeGLU and a scaled embedding.

GELU is its tanh form, the embedding is multiplied by the root of its width, and the head is the embedding. GGUF keeps
norm weights with their `1 +` added in, so they are plain factors here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffharness.reference.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Gemma(Decoder):
    """A `Decoder` whose embedding is scaled."""

    activation: ClassVar[str] = "gelu"

    def scale_embedding(self, x: Tensor) -> Tensor:
        return x * math.sqrt(self.n_embd)


ARCHS = {"gemma": Gemma.from_metadata}
