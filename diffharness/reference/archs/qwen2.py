"""`qwen2`: Qwen 2, 2.5. Llama's forward with biases on Q, K and V, and rotary pairs in half-split order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffharness.reference.archs.llama import Llama


@dataclass(frozen=True, kw_only=True)
class Qwen2(Llama):
    """Differs from llama in the order of rotary pairs; the biases are read where a model has them."""

    interleaved: ClassVar[bool] = False  # rope pairs (i, i + n_rot/2)


ARCHS = {"qwen2": Qwen2.from_metadata}
