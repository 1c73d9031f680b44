"""`qwen`: Qwen 1. Llama's forward on one matrix of queries, keys and values, with a bias.

What the model does only past the length it was trained on (rope stretched by the length of the text, queries scaled by
its logarithm) is ignored, as it is by the engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from diffharness.reference.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Qwen(Decoder):
    """A `Decoder`, as it is."""


ARCHS = {"qwen": Qwen.from_metadata}
