"""`granitehybrid`: Granite 4 with recurrent layers, and Bamba. Granite with Mamba 2 in the place of most attention.

A layer without KV heads is recurrent. The key `rope.scaling.finetuned` is a switch of the rotary embedding: Granite 4
has none, Bamba has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffharness.reference import mamba
from diffharness.reference.archs.granite import Granite
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.hybrid import Hybrid
from diffharness.reference.model import Tap, Weights


@dataclass(frozen=True, kw_only=True)
class GraniteHybrid(Granite, Hybrid):
    """Differs from Granite in its recurrent layers."""

    sizes: mamba.MambaSizes

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        return super().read(hp) | {"sizes": mamba.MambaSizes.read(hp, heads=True)}

    @classmethod
    def read_scales(cls, hp: HyperParameters, fields: dict[str, Any]) -> dict[str, Any]:
        return {
            "embedding_scale": hp.number("embedding_scale", 0.0) or 1.0,
            "residual_scale": hp.number("residual_scale", 0.0) or 1.0,
            "logit_scale": 1.0 / (hp.number("logit_scale", 0.0) or 1.0),
        }

    def recurrence(self, w: Weights, il: int, h: Tensor, tap: Tap) -> Tensor:
        return mamba.head_mixer(w, f"blk.{il}.", h, self.sizes, tap, eps=self.eps)


ARCHS = {"granitehybrid": GraniteHybrid.from_metadata}
