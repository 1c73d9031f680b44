"""`lfm2`, `lfm2moe`: LFM 2 and 2.5, dense and with experts. Short convolutions under two gates beside attention.

A layer without KV heads projects to b, c and x, convolves b · x over a few tokens, and gives c times that. Attention
normalises queries and keys per head. The final norm is stored as `token_embd_norm`. Experts are chosen by the sigmoid
plus a bias, and weighed by their share of the sum of sigmoids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffharness.reference import moe, ops, recurrent
from diffharness.reference.decoder import HeadNorms, read_routing
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.hybrid import Hybrid
from diffharness.reference.model import State, Tap, Weights


@dataclass(frozen=True, kw_only=True)
class Lfm2(HeadNorms, Hybrid):
    """A `Hybrid` of attention and short convolutions."""

    sum_offset: ClassVar[float] = 1e-6  # added to the sum that experts' weights are divided by

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        out = super().read(hp)
        if hp.count("shortconv.l_cache") < 2:
            hp.refuse("shortconv.l_cache", 1, "at least 2 tokens")
        n_dense = hp.integer("leading_dense_block_count", 0)
        if not out["n_expert"]:
            return out
        return out | read_routing(hp, gating="softmax", normalise=True) | {"n_dense": n_dense}

    def head(self, w: Weights, x: Tensor, state: State, tap: Tap) -> Tensor:
        x = self.norm(w, "token_embd_norm.weight", x)
        tap("output_norm", x)
        return ops.logits(w, x, tap)

    def recurrence(self, w: Weights, il: int, h: Tensor, tap: Tap) -> Tensor:
        blk = f"blk.{il}.shortconv."
        b, c, x = self.project(w, blk + "in_proj", h, "ssm_in", tap).chunk(3, dim=-1)
        y = recurrent.causal_conv(b * x, w.get(blk + "conv.weight"))
        tap("ssm_conv", y)
        return self.project(w, blk + "out_proj", c * y, "ssm_out", tap)

    def route(self, logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weights, chosen = moe.route(logits, self.n_expert_used, normalise=False, gating=self.gating, bias=bias)
        if self.normalise_experts:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + self.sum_offset)
        return weights * self.experts_scale, chosen


ARCHS = {"lfm2": Lfm2.from_metadata, "lfm2moe": Lfm2.from_metadata}
