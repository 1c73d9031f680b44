"""`phi3`: Phi-3, Phi-3.5 mini, Phi-4, Phi-4 mini. Fused projections; frequencies by the length of the context.

RMSNorm, one matrix for queries, keys and values, one for gate and up, SiLU. LongRoPE (Ding et al., 2024): two lists
of divisors of the rotary frequencies, one for texts within the original context, one for longer ones; what decides is
the length of the whole chunk, not a token's position. Some sizes rotate a part of each head, some have a sliding
window; the engine's graph has no window, so that it differs where a chunk is longer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from diffharness.reference.decoder import Decoder
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Weights


@dataclass(frozen=True, kw_only=True)
class LongRope(Decoder):
    """A `Decoder` whose frequencies are divided by one of two lists, where the file has them."""

    n_ctx_orig: int  # tokens; in longer chunks the long list holds
    span: Literal["short", "long"] = "short"  # of the list in use

    longrope: ClassVar[bool] = True

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        original = hp.integer("rope.scaling.original_context_length", hp.integer("context_length"))
        return super().read(hp) | {"n_ctx_orig": original}

    def rope_factors(self, w: Weights, il: int) -> Tensor | None:
        lists = {span: w.find(f"rope_factors_{span}.weight") for span in ("short", "long")}
        return lists[self.span]

    def tables(self, w: Weights, il: int, x: Tensor, state: State) -> tuple[Tensor, Tensor]:
        if self.span == "short" and len(state.positions) > self.n_ctx_orig:
            return replace(self, span="long").tables(w, il, x, state)
        return super().tables(w, il, x, state)


@dataclass(frozen=True, kw_only=True)
class Phi3(LongRope):
    """Differs from a `Decoder` in LongRoPE and in the feed-forward's fused projection."""

    fused_gate_up: ClassVar[bool] = True


ARCHS = {"phi3": Phi3.from_metadata}
