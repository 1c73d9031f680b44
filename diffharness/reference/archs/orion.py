"""`orion`: Orion-14B. Llama's forward with LayerNorms, which have biases."""

from __future__ import annotations

from dataclasses import dataclass

from diffharness.reference.decoder import Decoder, LayerNorms


@dataclass(frozen=True, kw_only=True)
class Orion(LayerNorms, Decoder):
    """A `Decoder` with another norm."""


ARCHS = {"orion": Orion.from_metadata}
