"""`exaone-moe`: K-EXAONE. EXAONE 4's attention under norms before its branches; experts beside shared ones.

After the leading dense layers all are sparse; experts are chosen by the sigmoid of the router's logits plus a bias.
Layers that predict further tokens (`nextn`) are not part of the forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffharness.reference.archs.exaone4 import Hybrid
from diffharness.reference.decoder import read_routing
from diffharness.reference.hparams import HyperParameters


@dataclass(frozen=True, kw_only=True)
class ExaoneMoe(Hybrid):
    """A `Hybrid` with experts."""

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        hp.integer("expert_shared_count", 0)  # told by the tensors' shapes
        return super().read(hp) | read_routing(hp, gating="sigmoid", grouped=True)


ARCHS = {"exaone-moe": ExaoneMoe.from_metadata}
