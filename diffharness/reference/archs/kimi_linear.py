"""`kimi-linear`: Kimi Linear. Delta rules with a decay per key component beside latent attention without positions.

A delta-rule layer (KDA) convolves queries, keys and values along tokens, normalises queries and keys to length one, and
reads a memory whose every key component fades by exp(a · softplus(f + dt)); what is read is RMS-normalised and
multiplied by the sigmoid of a gate. Latent attention makes keys and values of a compressed vector, and one part of the
keys is shared by all heads; nothing turns. Experts are chosen by the sigmoid plus a bias. The norm of length one and
that of the compressed vector have an epsilon of their own, 1e-6 whatever the other norms have: the engine takes theirs,
which in the released model is 1e-5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from diffharness.reference import ops, recurrent
from diffharness.reference.decoder import read_routing
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.hybrid import Hybrid
from diffharness.reference.model import Tap, Weights


@dataclass(frozen=True, kw_only=True)
class KimiLinear(Hybrid):
    """A `Hybrid` of Kimi delta attention and latent attention."""

    rank: int  # of the compressed keys and values
    n_shared: int  # components of a key that all heads share
    key_size: int  # of a head of latent attention, the shared components included
    value_size: int
    delta_size: int  # of a head of a delta-rule layer

    fixed_eps: ClassVar[float] = 1e-6  # of the norms of length one and of the compressed keys and values

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        out = super().read(hp)
        if q_rank := hp.integer("attention.q_lora_rank", 0):
            hp.refuse("attention.q_lora_rank", q_rank, "queries that are not compressed")
        key_size, n_shared = hp.count("attention.key_length_mla"), hp.count("rope.dimension_count")
        if n_shared >= key_size:
            hp.refuse("rope.dimension_count", n_shared, f"less than the key's {key_size} components")
        hp.integer("expert_shared_count", 0)  # one MLP in any case
        return out | {
            **read_routing(hp, gating="sigmoid", grouped=True),
            "normalise_experts": True,
            "n_rot": 0,
            "attn_scale": key_size**-0.5,
            "rank": hp.count("attention.kv_lora_rank"),
            "n_shared": n_shared,
            "key_size": key_size,
            "value_size": hp.count("attention.value_length_mla"),
            "delta_size": hp.count("kda.head_dim"),
        }

    # -- latent attention ------------------------------------------------------------------------------

    def qkv(self, w: Weights, il: int, h: Tensor, tap: Tap) -> tuple[Tensor, Tensor, Tensor]:
        blk, n_head = f"blk.{il}.", self.n_head[il]
        q = ops.split_heads(self.project(w, blk + "attn_q", h, "attn_q", tap), n_head)
        both = self.project(w, blk + "attn_kv_a_mqa", h, "attn_kv_a", tap)
        latent, shared = torch.split(both, [self.rank, self.n_shared], dim=-1)
        latent = ops.rms_norm(latent, w.get(blk + "attn_kv_a_norm.weight"), self.fixed_eps)
        tap("attn_kv_a_norm", latent)
        k = torch.einsum("btr,hrk->bthk", latent, w.get(blk + "attn_k_b.weight").reshape(n_head, self.rank, -1))
        v = torch.einsum("btr,hvr->bthv", latent, w.get(blk + "attn_v_b.weight").reshape(n_head, -1, self.rank))
        k = torch.cat((k, shared[:, :, None, :].expand(-1, -1, n_head, -1)), dim=-1)
        return q, k, v

    # -- delta-rule layers -----------------------------------------------------------------------------

    def recurrence(self, w: Weights, il: int, h: Tensor, tap: Tap) -> Tensor:
        blk, n_head = f"blk.{il}.", self.n_head[il]
        q, k, v = (self.convolved(w, blk, name, h, tap) for name in ("q", "k", "v"))
        dt = ops.project(w, blk + "ssm_f_b", ops.project(w, blk + "ssm_f_a", h)) + w.get(blk + "ssm_dt.bias")
        tap("ssm_dt", dt)
        log_decay = w.get(blk + "ssm_a").reshape(n_head, 1) * F.softplus(ops.split_heads(dt, n_head))
        tap("ssm_decay", ops.join_heads(log_decay))
        beta = ops.linear(h, w.get(blk + "ssm_beta.weight").reshape(n_head, -1))
        beta = self.scaled(w, blk + "ssm_beta.scale", beta).sigmoid()
        tap("ssm_beta", beta)
        q, k = (recurrent.l2_norm(ops.split_heads(x, n_head), self.fixed_eps) for x in (q, k))
        v = ops.split_heads(v, n_head)
        read = recurrent.gated_delta_rule(q * self.delta_size**-0.5, k, v, log_decay, beta)
        tap("ssm_scan", ops.join_heads(read))
        gate = ops.project(w, blk + "ssm_g_b", ops.project(w, blk + "ssm_g_a", h))
        tap("attn_gate", gate)
        read = self.norm(w, blk + "ssm_norm.weight", read) * ops.split_heads(gate, n_head).sigmoid()
        tap("ssm_norm", ops.join_heads(read))
        return self.project(w, blk + "attn_output", ops.join_heads(read), "attn_out", tap)

    def convolved(self, w: Weights, blk: str, name: str, h: Tensor, tap: Tap) -> Tensor:
        """Queries (`q`), keys or values of h, convolved along tokens and activated."""
        x = self.project(w, f"{blk}attn_{name}", h, f"attn_{name}", tap)
        x = recurrent.causal_conv(x, w.get(f"{blk}ssm_conv1d_{name}.weight").reshape(x.shape[-1], -1))
        tap(f"attn_{name}_conv", x)
        return F.silu(x)

    def scaled(self, w: Weights, name: str, x: Tensor) -> Tensor:
        """A product with the `.scale` that its matrix may have."""
        scale = w.find(name)
        return x if scale is None else x * scale


ARCHS = {"kimi-linear": KimiLinear.from_metadata}
