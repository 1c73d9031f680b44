"""`exaone`: EXAONE 3.0 and 3.5. Llama's forward on rows in Hugging Face's order; frequencies as Llama 3 scales them."""

from __future__ import annotations

from dataclasses import dataclass

from diffharness.reference.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class Exaone(Decoder):
    """A `Decoder`, as it is."""


ARCHS = {"exaone": Exaone.from_metadata}
