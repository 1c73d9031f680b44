"""`starcoder2`: StarCoder 2. LayerNorms, biases everywhere, grouped KV heads, GELU in its tanh form without a gate.

The sliding window of 4096 is part of the model although the engine's graph has none: it is applied where the metadata
name it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffharness.reference.decoder import Decoder, LayerNorms


@dataclass(frozen=True, kw_only=True)
class StarCoder2(LayerNorms, Decoder):
    """A `Decoder` with LayerNorms."""

    activation: ClassVar[str] = "gelu"


ARCHS = {"starcoder2": StarCoder2.from_metadata}
