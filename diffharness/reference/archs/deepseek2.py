"""`deepseek2`: DeepSeek V2, V2-Lite, V3, R1, Kimi K2, GLM-4.7-Flash. Attention on a latent shared by all heads.

Keys and values of all heads are products of one compressed vector per token (the latent, RMS-normalised), and a small
part of each key, the same for all heads, is turned by its position (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1).
Files come in two forms. Old ones keep the matrix `attn_kv_b` that expands the latent. New ones keep its halves by
head, `attn_k_b` and `attn_v_b`: the first goes to the queries, which then meet the latent itself, the second to what
attention gives. Both are the same function; each file is computed in its own form, whose taps its engine has, unless
nobody listens: then the latent is expanded in either case, which is less work.

Norms of the latents have their own epsilon, 1e-6, whatever the model's other norms have. YaRN here scales the scores
by (0.1 m ln(factor) + 1)², m being `mscale_all_dim`, which GGUF keeps times 0.1 as `rope.scaling.yarn_log_multiplier`;
sines and cosines keep their magnitude then, as `mscale` equals it in every published model.

Experts come in groups, of which some are chosen first: V3 (sigmoid) by the sum of a group's two best experts, with a
bias for the choice, V2 (softmax) by its best one. Layers that predict further tokens (`nextn`) are not part of the
forward. Not supported: Mistral Large's temperature of queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffharness.reference import moe, ops
from diffharness.reference.decoder import Decoder, read_routing
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Tap, Weights, unheard
from diffharness.reference.nextn import without_nextn

_GLM_47_FLASH = (47, 154880)  # layers and tokens of a model whose first files do not say how it gates


@dataclass(frozen=True, kw_only=True)
class Deepseek2(Decoder):
    """A `Decoder` with latent attention; `head_dim` and `head_dim_v` are those of the expanded heads."""

    kv_lora_rank: int
    absorbed: bool  # the file keeps `attn_k_b` and `attn_v_b`
    latent_eps: float = 1e-6

    interleaved: ClassVar[bool] = True

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        hp = without_nextn(hp)
        fields = super().read(hp) | read_routing(hp, gating=_gating(hp), grouped=True)
        if (scale := hp.number("attention.scale", 0.0)) != 0.0:
            hp.refuse("attention.scale", scale, "0 (unset)")
        hp.integer("expert_shared_count", 0)  # read with the tensors, which say so themselves
        absorbed = hp.integer("attention.key_length_mla", 0) != 0
        if absorbed:
            fields["head_dim"] = hp.count("attention.key_length_mla")
            fields["head_dim_v"] = hp.count("attention.value_length_mla")
        if not 0 < fields["n_rot"] < fields["head_dim"]:
            hp.refuse("rope.dimension_count", fields["n_rot"], f"less than the {fields['head_dim']} of a head")
        log_multiplier = hp.number("rope.scaling.yarn_log_multiplier", 0.0)
        return fields | {
            "rope_scaling": _scaling(hp, log_multiplier),
            "attn_scale": _score_scale(hp, fields["head_dim"], log_multiplier),
            "kv_lora_rank": hp.count("attention.kv_lora_rank"),
            "absorbed": absorbed,
        }

    # -- attention -------------------------------------------------------------------------------------

    def attention(self, w: Weights, il: int, h: Tensor, state: State, tap: Tap) -> Tensor:
        blk, n_nope = f"blk.{il}.", self.head_dim - self.n_rot
        cos, sin = self.tables(w, il, h, state)
        q = ops.split_heads(self.queries(w, il, h, tap), self.n_head[il])
        q_nope, q_rot = q[..., :n_nope], self.turn(il, "attn_q", q[..., n_nope:], cos, sin)
        latent, k_rot = self.compressed(w, il, h, tap)  # [B, T, 1, rank], [B, T, 1, n_rot]
        k_rot = self.turn(il, "attn_k", k_rot, cos, sin)
        absorbed = self.absorbed and tap is not unheard
        if absorbed:
            q = torch.cat((by_head(w, blk + "attn_k_b", q_nope), q_rot), dim=-1)
            k, v = torch.cat((latent, k_rot), dim=-1), latent
        else:
            k_nope, v = self.expanded(w, il, latent)
            q = torch.cat((q_nope, q_rot), dim=-1)
            k = torch.cat((k_nope, k_rot.expand(*k_nope.shape[:-1], -1)), dim=-1)
            tap("attn_v", ops.join_heads(v))
        tap("attn_q_rope", ops.join_heads(q))
        tap("attn_k_rope", ops.join_heads(k))
        context = self.attend(il, q, k, v, state)
        if absorbed:
            heads = by_head(w, blk + "attn_v_b", ops.split_heads(context, self.n_head[il]))
            context = ops.join_heads(heads)
        tap("attn_ctx", context)
        return self.project(w, blk + "attn_output", context, "attn_out", tap)

    def queries(self, w: Weights, il: int, h: Tensor, tap: Tap) -> Tensor:
        """Queries [B, T, H · head_dim], by way of a latent of their own except in the small models."""
        blk = f"blk.{il}."
        if not w.has(blk + "attn_q_a.weight"):
            return self.project(w, blk + "attn_q", h, "attn_q", tap)
        h = self.project(w, blk + "attn_q_a", h, "attn_q_a", tap)
        h = self.latent_norm(w, blk + "attn_q_a_norm.weight", h)
        tap("attn_q_a_norm", h)
        return self.project(w, blk + "attn_q_b", h, "attn_q", tap)

    def compressed(self, w: Weights, il: int, h: Tensor, tap: Tap) -> tuple[Tensor, Tensor]:
        """The latent [B, T, 1, rank], normalised, and the part of the keys that turns [B, T, 1, n_rot]."""
        blk = f"blk.{il}."
        both = self.project(w, blk + "attn_kv_a_mqa", h, "attn_kv_a", tap)
        latent = self.latent_norm(w, blk + "attn_kv_a_norm.weight", both[..., : self.kv_lora_rank])
        tap("attn_kv_a_norm", latent)
        return latent.unsqueeze(-2), both[..., self.kv_lora_rank :].unsqueeze(-2)

    def expanded(self, w: Weights, il: int, latent: Tensor) -> tuple[Tensor, Tensor]:
        """The part of each head's key that does not turn [B, T, H, n_nope], and its value [B, T, H, Dv]."""
        blk, n_head = f"blk.{il}.", self.n_head[il]
        if not self.absorbed:
            both = ops.split_heads(ops.project(w, blk + "attn_kv_b", latent.squeeze(-2)), n_head)
            n_nope = self.head_dim - self.n_rot
            return both[..., :n_nope], both[..., n_nope:]
        to_keys, scale = w.get(blk + "attn_k_b.weight"), w.find(blk + "attn_k_b.scale")
        to_keys = to_keys.reshape(n_head, self.kv_lora_rank, -1)
        k = torch.einsum("btr,hrk->bthk", latent.squeeze(-2), to_keys if scale is None else to_keys * scale)
        return k, by_head(w, blk + "attn_v_b", latent.expand(-1, -1, n_head, -1))

    def latent_norm(self, w: Weights, name: str, x: Tensor) -> Tensor:
        """RMSNorm of a latent."""
        return ops.rms_norm(x, w.get(name), self.latent_eps)

    # -- experts ---------------------------------------------------------------------------------------

    def route(self, logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if self.gating != "softmax" or self.n_group <= 1:
            return super().route(logits, bias)
        bias = torch.zeros_like(logits) if bias is None else bias.expand_as(logits)
        outside = outside_best_groups(logits.softmax(dim=-1) + bias, self.n_group, self.n_group_used)
        return moe.route(
            logits,
            self.n_expert_used,
            normalise=self.normalise_experts,
            gating=self.gating,
            bias=bias.masked_fill(outside, -math.inf),
            scale=self.experts_scale,
        )


def by_head(w: Weights, name: str, x: Tensor) -> Tensor:
    """x [B, T, H, in] times each head's own matrix of `name`.weight [H, out, in]; [B, T, H, out]."""
    weight, scale = w.get(name + ".weight"), w.find(name + ".scale")
    matrices = weight if weight.dim() == 3 else weight.reshape(x.shape[-2], -1, weight.shape[-1])
    y = torch.matmul(x.transpose(1, 2), matrices.mT).transpose(1, 2)
    return y if scale is None else y * scale


def outside_best_groups(scores: Tensor, n_group: int, n_used: int) -> Tensor:
    """Which experts are in none of the `n_used` groups with the best single experts; both [..., n_expert]."""
    groups = scores.reshape(*scores.shape[:-1], n_group, -1)
    best = groups.amax(dim=-1).sort(dim=-1, descending=True, stable=True).indices[..., :n_used]
    outside = torch.ones(groups.shape[:-1], dtype=torch.bool, device=scores.device).scatter(-1, best, False)
    return outside[..., None].expand_as(groups).flatten(-2)


def _gating(hp: HyperParameters) -> moe.Gating:
    """How the model makes scores of experts where the file does not say."""
    found = (hp.integer("block_count"), hp.integer("vocab_size", 0))
    return "sigmoid" if found == _GLM_47_FLASH else "softmax"


def _scaling(hp: HyperParameters, log_multiplier: float) -> ops.RopeScaling:
    """The rope's scaling: with `mscale_all_dim`, its magnitude is 1 unless the file states another."""
    if (attn_factor := hp.number("rope.scaling.attn_factor", 1.0)) != 1.0:
        hp.refuse("rope.scaling.attn_factor", attn_factor, "1 (unset)")
    scaling = hp.rope_scaling()
    if log_multiplier == 0.0 or scaling.ext_factor == 0.0:
        return scaling
    return replace(scaling, magnitude=hp.number("rope.scaling.yarn_attn_factor", 1.0))


def _score_scale(hp: HyperParameters, head_dim: int, log_multiplier: float) -> float:
    """1/√head_dim, times the square of what YaRN's `mscale_all_dim` makes of the factor."""
    factor = hp.number("rope.scaling.factor", 1.0)
    if hp.string("rope.scaling.type", "linear") != "yarn" or factor <= 1.0:
        return 1.0 / math.sqrt(head_dim)
    return (log_multiplier * math.log(factor) + 1.0) ** 2 / math.sqrt(head_dim)


ARCHS = {"deepseek2": Deepseek2.from_metadata}
