"""`xverse`: XVERSE 7B, 13B and 65B. Llama's forward as it is; routed experts and dynamic rope are not supported."""

from __future__ import annotations

from dataclasses import dataclass

from diffharness.reference.archs.llama import Llama


@dataclass(frozen=True, kw_only=True)
class Xverse(Llama):
    """Llama, as it is."""


ARCHS = {"xverse": Xverse.from_metadata}
