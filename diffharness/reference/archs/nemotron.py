"""`nemotron`: Nemotron-3 and -4, Minitron. LayerNorms, a squared ReLU without a gate, a part of each head rotated.

GGUF keeps norm weights with their `1 +` added in, so they are plain factors here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffharness.reference.decoder import Decoder, LayerNorms


@dataclass(frozen=True, kw_only=True)
class Nemotron(LayerNorms, Decoder):
    """A `Decoder` with LayerNorms."""

    activation: ClassVar[str] = "relu_sqr"


ARCHS = {"nemotron": Nemotron.from_metadata}
