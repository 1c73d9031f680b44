"""What Gemma 3n and Gemma 4 share: keys and values that late layers borrow, and a second embedding of each token.

The last layers attend to keys and values of earlier ones, each to those of the last layer of its kind that has its
own. Values are normalised without a weight, and scores have no scale. Of the second embedding every layer is told its
own part, as much of it as the residual stream lets through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffharness import taps
from diffharness.errors import ArtifactFileError
from diffharness.reference import ops
from diffharness.reference.archs.gemma3 import Gemma3
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Tap, Weights


@dataclass(frozen=True, kw_only=True)
class GemmaE(Gemma3):
    """Differs from Gemma 3 in attention, and has the steps of per-layer embeddings, which `layer` is to call."""

    n_shared_kv: int  # this many last layers have no keys and values of their own
    n_embd_per_layer: int  # 0: no per-layer embeddings

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        hp.count("attention.sliding_window")
        return super().read(hp) | {"attn_scale": 1.0, "softcap": hp.number("final_logit_softcapping", 30.0) or None}

    @staticmethod
    def read_shared(hp: HyperParameters, window: tuple[int | None, ...], default: int) -> int:
        """`attention.shared_kv_layers`; ArtifactFileError where a layer that borrows has none of its kind to lend."""
        n_layer, n_shared = len(window), hp.integer("attention.shared_kv_layers", default)
        kinds = [size is None for size in window]
        if not 0 <= n_shared < n_layer or not set(kinds[n_layer - n_shared :]) <= set(kinds[: n_layer - n_shared]):
            raise ArtifactFileError(
                f"metadata key `{hp.key('attention.shared_kv_layers')}`: expected every kind of layer among those with "
                f"keys of their own, found {n_shared} of {n_layer} layers without"
            )
        return n_shared

    # -- attention -------------------------------------------------------------------------------------

    def attention(self, w: Weights, il: int, h: Tensor, state: State, tap: Tap) -> Tensor:
        blk = f"blk.{il}."
        cos, sin = self.tables(w, il, h, state)
        q = ops.split_heads(self.project(w, blk + "attn_q", h, "attn_q", tap), self.n_head[il])
        q = self.prepare(w, il, "attn_q", q, cos, sin, tap)
        lender = self.lender(il)
        if lender == il:
            k, v = self.keys_values(w, il, h, cos, sin, tap)
            if any(self.lender(jl) == il for jl in range(il + 1, self.n_layer)):
                state.shared_kv[il] = k, v
        else:
            k, v = state.shared_kv[lender]
        context = self.attend(il, q, k, v, state)
        tap("attn_ctx", context)
        return self.project(w, blk + "attn_output", context, "attn_out", tap)

    def keys_values(self, w: Weights, il: int, h: Tensor, cos: Tensor, sin: Tensor, tap: Tap) -> tuple[Tensor, Tensor]:
        """Keys, normalised and turned, and values, normalised; both [B, T, Hkv, D].

        Where the file has no value projection, the value is the raw key projection.
        """
        blk, n_kv = f"blk.{il}.", self.n_head_kv[il]
        raw = self.project(w, blk + "attn_k", h, "attn_k", tap)
        k = self.prepare(w, il, "attn_k", ops.split_heads(raw, n_kv), cos, sin, tap)
        v = ops.project(w, blk + "attn_v", h) if w.has(blk + "attn_v.weight") else raw
        tap("attn_v", v)  # after all that comes of the key: the two may be one tensor, which listeners may write into
        v = self.norm_values(w, il, ops.split_heads(v, n_kv))
        tap("attn_v_norm", ops.join_heads(v))
        return k, v

    def norm_values(self, w: Weights, il: int, v: Tensor) -> Tensor:
        """Value heads [B, T, Hkv, D], each normalised without a weight."""
        return self.norm(w, None, v)

    def lender(self, il: int) -> int:
        """The layer whose keys and values layer `il` attends to: itself, or the last of its kind that has its own."""
        first_shared = self.n_layer - self.n_shared_kv
        if il < first_shared:
            return il
        return max(jl for jl in range(first_shared) if self.layer_kind(jl) == self.layer_kind(il))

    def leaves_alone(self, tensor: str) -> bool:
        """Keys and values of layers that borrow theirs: files have them, and some of the engine's loaders want them."""
        layer, stem = taps.split(tensor)
        own = self.n_layer - self.n_shared_kv
        return layer is not None and own <= layer < self.n_layer and stem.startswith(("attn_k", "attn_v"))

    # -- per-layer embeddings --------------------------------------------------------------------------

    def per_layer_inputs(self, w: Weights, tokens: Tensor, x: Tensor) -> Tensor:
        """What each layer is told of each token [B, T, n_layer, n_embd_per_layer]; x is the embedding [B, T, E].

        The mean (over √2) of a projection of the embedding, normalised, and of the token's second embedding.
        """
        shape = (*tokens.shape, self.n_layer, self.n_embd_per_layer)
        context = ops.linear(x, w.get("per_layer_model_proj.weight")) / math.sqrt(self.n_embd)
        context = self.norm(w, "per_layer_proj_norm.weight", context.reshape(shape))
        identity = ops.embed(w, tokens, "per_layer_token_embd.weight") * math.sqrt(self.n_embd_per_layer)
        return (context + identity.reshape(shape)) / math.sqrt(2.0)

    def own_embedding(self, w: Weights, blk: str, x: Tensor, told: Tensor, state: State) -> Tensor:
        """The residual x [B, T, E] gates what this layer was told [B, T, n_embd_per_layer]; [B, T, E]."""
        gate = self.act(ops.project(w, blk + "inp_gate", x), state)
        h = ops.project(w, blk + "proj", gate * told)
        return self.norm(w, blk + "post_norm.weight", h)
