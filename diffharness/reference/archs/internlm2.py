"""`internlm2`: InternLM 2 and 2.5. Llama's forward as it is; what stretches rope past the trained length is ignored."""

from __future__ import annotations

from dataclasses import dataclass

from diffharness.reference.archs.llama import Llama


@dataclass(frozen=True, kw_only=True)
class InternLM2(Llama):
    """Llama, as it is."""


ARCHS = {"internlm2": InternLM2.from_metadata}
