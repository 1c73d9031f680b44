"""`minicpm3`: MiniCPM 3. MiniCPM's scales and LongRoPE with attention on a latent shared by all heads.

A low-rank product makes queries, another (the latent, RMS-normalised) keys and values of all heads; a small part of
each key, the same for all heads, comes beside the latent and is turned by its position, as is the last part of each
query. Norms of the latents have their own epsilon, 1e-6, whatever the model's other norms have; the engine takes the
model's. GGUF's keys for the scales are read where a file has them; the engine has the published model's built in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.archs.granite import Scaled
from diffharness.reference.archs.minicpm import BASE_WIDTH, DEPTH_SCALE, EMBEDDING_SCALE
from diffharness.reference.archs.phi3 import LongRope
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Tap, Weights


@dataclass(frozen=True, kw_only=True)
class MiniCpm3(LongRope, Scaled):
    """A `Scaled` decoder with latent attention; `n_rot` is the size of the part of a head that turns, the last one."""

    kv_lora_rank: int

    latent_eps: ClassVar[float] = 1e-6

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        hp.count("attention.q_lora_rank")  # there is no form without one
        fields = super().read(hp) | {"kv_lora_rank": hp.count("attention.kv_lora_rank")}
        if not 0 < fields["n_rot"] <= fields["head_dim"]:
            hp.refuse("rope.dimension_count", fields["n_rot"], f"at most the {fields['head_dim']} of a head")
        return fields

    @classmethod
    def read_scales(cls, hp: HyperParameters, fields: dict[str, Any]) -> dict[str, Any]:
        return {
            "embedding_scale": hp.number("embedding_scale", 0.0) or EMBEDDING_SCALE,
            "residual_scale": hp.number("residual_scale", 0.0) or DEPTH_SCALE / math.sqrt(fields["n_layer"]),
            "logit_scale": 1.0 / (hp.number("logit_scale", 0.0) or fields["n_embd"] / BASE_WIDTH),
        }

    def attention(self, w: Weights, il: int, h: Tensor, state: State, tap: Tap) -> Tensor:
        blk, n_head, n_still = f"blk.{il}.", self.n_head[il], self.head_dim - self.n_rot
        low = self.project(w, blk + "attn_q_a", h, "attn_q_a", tap)
        low = self.latent_norm(w, blk + "attn_q_a_norm.weight", low, "attn_q_a_norm", tap)
        q = ops.split_heads(self.project(w, blk + "attn_q_b", low, "attn_q", tap), n_head)

        both = self.project(w, blk + "attn_kv_a_mqa", h, "attn_kv_a", tap)
        latent = both[..., : self.kv_lora_rank]
        latent = self.latent_norm(w, blk + "attn_kv_a_norm.weight", latent, "attn_kv_a_norm", tap)
        heads = ops.split_heads(ops.project(w, blk + "attn_kv_b", latent), n_head)
        v = heads[..., n_still:].contiguous()  # a tap is the memory that the forward goes on with
        tap("attn_v", ops.join_heads(v))

        cos, sin = self.tables(w, il, h, state)
        q = torch.cat((q[..., :n_still], self.turn(il, "attn_q", q[..., n_still:], cos, sin)), dim=-1)
        shared = self.turn(il, "attn_k", both[..., None, self.kv_lora_rank :], cos, sin)  # [B, T, 1, n_rot]
        k = torch.cat((heads[..., :n_still], shared.expand(*heads.shape[:-1], -1)), dim=-1)
        tap("attn_q_rope", ops.join_heads(q))
        tap("attn_k_rope", ops.join_heads(k))
        context = self.attend(il, q, k, v, state)
        tap("attn_ctx", context)
        return self.project(w, blk + "attn_output", context, "attn_out", tap)

    def latent_norm(self, w: Weights, name: str, x: Tensor, tap_name: str, tap: Tap) -> Tensor:
        """RMSNorm of a latent, told under `tap_name`."""
        x = ops.rms_norm(x, w.get(name), self.latent_eps)
        tap(tap_name, x)
        return x


ARCHS = {"minicpm3": MiniCpm3.from_metadata}
