"""`seed_oss`: Seed-OSS. Llama's forward with biases; the norm before the feed-forward is `post_attention_norm`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffharness.reference.decoder import Decoder


@dataclass(frozen=True, kw_only=True)
class SeedOss(Decoder):
    """A `Decoder` that keeps one norm under another name."""

    ffn_norm: ClassVar[str] = "post_attention_norm.weight"


ARCHS = {"seed_oss": SeedOss.from_metadata}
