"""`dots1`: dots.llm1. Norms of query and key heads, experts by sigmoid and bias beside shared ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffharness.reference.decoder import Decoder, HeadNorms, read_routing
from diffharness.reference.hparams import HyperParameters


@dataclass(frozen=True, kw_only=True)
class Dots1(HeadNorms, Decoder):
    """A `Decoder` with head norms, and experts after the leading dense layers."""

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        hp.integer("expert_shared_count", 0)  # told by the tensors' shapes
        return super().read(hp) | read_routing(hp, gating="sigmoid", grouped=True)


ARCHS = {"dots1": Dots1.from_metadata}
