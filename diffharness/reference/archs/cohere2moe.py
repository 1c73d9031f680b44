"""`cohere2moe`: Command A+, North Mini. Cohere 2 with routed experts after some dense layers.

Each period begins with the layer that sees everything where the file does not list them; the dense layers at the front
turn their queries and keys whether they slide or not. The experts of highest logits are weighed by the sigmoid (or the
softmax over the chosen ones), and the mean of their sum and of the shared experts' MLP is what the block gives. Norms
are RMSNorms where the file states an epsilon of that kind, else LayerNorms. Layers that predict further tokens, which
`block_count` counts and the lists by layer may not, are not part of the forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.archs.cohere2 import Cohere2
from diffharness.reference.decoder import read_routing
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Tap, Weights
from diffharness.reference.nextn import without_nextn

_RMS = "attention.layer_norm_rms_epsilon"
_SHARED = "expert_shared_count"


@dataclass(frozen=True, kw_only=True)
class Cohere2Moe(Cohere2):
    """A `Cohere2` with experts, and with either kind of norm."""

    rms: bool  # norms are RMSNorms

    global_first: ClassVar[bool] = True

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        hp = without_nextn(hp)
        rms_eps = hp.number(_RMS, 0.0)
        eps = hp.number(cls.eps_key, 0.0) if hp.has(_RMS) else hp.number(cls.eps_key)
        hp.integer(_SHARED, 0)  # how many experts make up the shared MLP, whose width its tensors tell
        return super().read(hp) | read_routing(hp, gating="sigmoid") | {"rms": rms_eps > 0, "eps": rms_eps or eps}

    def turns(self, il: int) -> bool:
        return super().turns(il) or il < self.n_dense

    def norm(self, w: Weights, name: str | None, x: Tensor) -> Tensor:
        weight = None if name is None else w.get(name)
        return ops.rms_norm(x, weight, self.eps) if self.rms else ops.layer_norm(x, weight, None, self.eps)

    def experts(self, w: Weights, il: int, h: Tensor, state: State, tap: Tap) -> Tensor:
        out = super().experts(w, il, h, state, tap)
        return out * 0.5 if w.has(f"blk.{il}.ffn_up_shexp.weight") else out


ARCHS = {"cohere2moe": Cohere2Moe.from_metadata}
