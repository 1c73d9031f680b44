"""`qwen3`: Qwen 3. Qwen 2's forward without biases, with an RMSNorm of every Q and K head before the rotation."""

from __future__ import annotations

from dataclasses import dataclass

from diffharness.reference.archs.qwen2 import Qwen2
from diffharness.reference.decoder import HeadNorms


@dataclass(frozen=True, kw_only=True)
class Qwen3(HeadNorms, Qwen2):
    """Differs from Qwen 2 in the head norms."""


ARCHS = {"qwen3": Qwen3.from_metadata}
