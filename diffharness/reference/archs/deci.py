"""`deci`: DeciLM and Llama-Nemotron (51B, Super, Ultra). Llama whose layers differ, and may lack a half or both.

By layer: the number of KV heads and the width of the feed-forward; attention may be one matrix (heads, but no KV
heads) or missing (no heads), and the feed-forward may be missing (width 0). The engine forgets the attention of a
layer that has no feed-forward, and builds nothing at all of a layer that has neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffharness.errors import ArtifactFileError
from diffharness.reference.archs.llama import Llama
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Tap, Weights


class _MissingHeads(HyperParameters):
    """Layers without heads or KV heads are sound."""

    def heads(self, n_layer: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        n_head = self.integers("attention.head_count", n_layer)
        n_head_kv = self.integers("attention.head_count_kv", n_layer, n_head[0])
        if n_head[0] <= 0:
            self.refuse("attention.head_count", n_head, "a first layer with attention")
        for heads, kv in zip(n_head, n_head_kv, strict=True):
            if heads < 0 or kv < 0 or kv > heads or (kv and heads % kv):
                key = self.key("attention.head_count_kv")
                raise ArtifactFileError(f"metadata key `{key}`: expected 0 or a divisor of {heads} heads, found {kv}")
        return n_head, n_head_kv


@dataclass(frozen=True, kw_only=True)
class Deci(Llama):
    """Differs from Llama in what a layer may lack; whether it has a feed-forward, the file says."""

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        return super().read(_MissingHeads(hp.metadata))

    def layer_kind(self, il: int) -> str:
        if self.n_head[il] == 0:
            return "no attention"
        return super().layer_kind(il) if self.n_head_kv[il] else "linear"

    def layer(self, w: Weights, il: int, x: Tensor, state: State, tap: Tap) -> Tensor:
        if self.n_head[il]:
            h = self.before_attention(w, il, x, tap)
            x = self.add(x, self.after_attention(w, il, self.mixer(w, il, h, state, tap), tap))
            tap("ffn_in", x)
        if w.has(f"blk.{il}.ffn_norm.weight"):
            h = self.before_ffn(w, il, x, tap)
            x = self.add(x, self.after_ffn(w, il, self.feed_forward(w, il, h, state, tap), tap))
        return self.end_layer(w, il, x, tap)

    def mixer(self, w: Weights, il: int, h: Tensor, state: State, tap: Tap) -> Tensor:
        if self.n_head_kv[il]:
            return self.attention(w, il, h, state, tap)
        return self.project(w, f"blk.{il}.attn_output", h, "attn_out", tap)


ARCHS = {"deci": Deci.from_metadata}
