"""`qwen3next`: Qwen 3 Next. Most layers are a gated delta rule, the others attention under a gate; experts everywhere.

A delta-rule layer convolves queries, keys and values of one projection along tokens, normalises queries and keys to
length one, and reads a memory that fades by exp(a · softplus(α + dt)) and is written to with strength sigmoid(β); what
is read is normalised and gated by SiLU of a further projection. Value heads v·r to v·r + r - 1 share key head v. An
attention layer's query projection gives each head's query and its gate; a part of each head turns. GGUF keeps norm
weights with their `1 +` added in. The norm of length one has an epsilon of its own, 1e-6 whatever the other norms have:
the engine takes theirs, which in every released model is the same.

Early files keep queries, keys, values and gate as the checkpoint does, in one matrix `ssm_in`, key head by key head.
Blocks that predict further tokens (`nextn_predict_layers`) come after the model's layers in the file and are not run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from diffharness.reference import ops, recurrent
from diffharness.reference.decoder import HeadNorms
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.hybrid import Hybrid
from diffharness.reference.model import State, Tap, Weights
from diffharness.reference.nextn import without_nextn


@dataclass(frozen=True, kw_only=True)
class Qwen3Next(HeadNorms, Hybrid):
    """A `Hybrid` of gated delta rules and gated attention."""

    ffn_norm: ClassVar[str] = "post_attention_norm.weight"

    n_key_head: int  # of a delta-rule layer
    n_value_head: int
    key_size: int  # of a head
    value_size: int

    l2_eps: ClassVar[float] = 1e-6  # of queries and keys of a delta-rule layer
    usual_interval: ClassVar[int] = 4  # of this many layers the last is attention

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        hp = without_nextn(hp)
        out = super().read(hp)
        n_layer = out["n_layer"]
        interval = hp.integer("full_attention_interval", cls.usual_interval)
        if hp.has("attention.recurrent_layers"):
            recurrent_layers = hp.booleans("attention.recurrent_layers", n_layer)
        elif interval > 0:
            recurrent_layers = tuple((il + 1) % interval != 0 for il in range(n_layer))
        else:
            hp.refuse("full_attention_interval", interval, "a positive number")
        return out | {
            "recurrent": recurrent_layers,
            "experts_scale": hp.number("expert_weights_scale", 0.0) or 1.0,
            **cls._heads(hp),
        }

    @classmethod
    def _heads(cls, hp: HyperParameters) -> dict[str, int]:
        """Sizes of a delta-rule layer."""
        n_key, n_value, inner = hp.count("ssm.group_count"), hp.count("ssm.time_step_rank"), hp.count("ssm.inner_size")
        if n_value % n_key or inner % n_value:
            hp.refuse("ssm.time_step_rank", n_value, f"a multiple of {n_key} key heads and a divisor of {inner}")
        sizes = {"key_size": hp.count("ssm.state_size"), "value_size": inner // n_value}
        return {"n_key_head": n_key, "n_value_head": n_value, **sizes}

    # -- attention layers ------------------------------------------------------------------------------

    def attention(self, w: Weights, il: int, h: Tensor, state: State, tap: Tap) -> Tensor:
        both, k, v = self.qkv(w, il, h, tap)  # of a head the query, then its gate
        q, gate = both.chunk(2, dim=-1)
        cos, sin = self.tables(w, il, h, state)
        q = self.prepare(w, il, "attn_q", q, cos, sin, tap)
        k = self.prepare(w, il, "attn_k", k, cos, sin, tap)
        context = self.attend(il, q, k, v, state)
        tap("attn_ctx", context)
        gate = ops.join_heads(gate).sigmoid()
        tap("attn_gate", gate)
        return self.project(w, f"blk.{il}.attn_output", context * gate, "attn_out", tap)

    # -- delta-rule layers -----------------------------------------------------------------------------

    def recurrence(self, w: Weights, il: int, h: Tensor, tap: Tap) -> Tensor:
        blk = f"blk.{il}."
        qkv, gate = self.qkv_gate(w, blk, h)
        tap("attn_qkv", qkv)
        tap("attn_gate", gate)
        qkv = recurrent.causal_conv(qkv, w.get(blk + "ssm_conv1d.weight"))
        tap("ssm_conv", qkv)
        qkv = F.silu(qkv)
        n_keys, n_values = self.n_key_head * self.key_size, self.n_value_head * self.value_size
        q, k, v = torch.split(qkv, [n_keys, n_keys, n_values], dim=-1)
        beta, alpha = self.beta_alpha(w, blk, h)
        tap("ssm_beta", beta)
        alpha = alpha + w.get(blk + "ssm_dt.bias")
        tap("ssm_dt", alpha)
        log_decay = w.get(blk + "ssm_a") * F.softplus(alpha)
        tap("ssm_decay", log_decay)
        read = recurrent.gated_delta_rule(
            self.by_value_head(self.of_length_one(q)) * self.key_size**-0.5,
            self.by_value_head(self.of_length_one(k)),
            ops.split_heads(v, self.n_value_head),
            log_decay,
            beta,
        )
        read = ops.join_heads(read)
        tap("ssm_scan", read)
        normed = self.norm(w, blk + "ssm_norm.weight", ops.split_heads(read, self.n_value_head))
        normed = ops.join_heads(normed * F.silu(ops.split_heads(gate, self.n_value_head)))
        tap("ssm_norm", normed)
        return self.project(w, blk + "ssm_out", normed, "ssm_out", tap)

    def qkv_gate(self, w: Weights, blk: str, h: Tensor) -> tuple[Tensor, Tensor]:
        """Queries, keys and values side by side, and what gates the output, both by head: [B, T, ...]."""
        if w.has(blk + "attn_qkv.weight"):
            return ops.project(w, blk + "attn_qkv", h), ops.project(w, blk + "attn_gate", h)
        values = self.n_value_head // self.n_key_head * self.value_size
        by_key_head = ops.split_heads(ops.project(w, blk + "ssm_in", h), self.n_key_head)
        q, k, v, gate = torch.split(by_key_head, [self.key_size, self.key_size, values, values], dim=-1)
        return torch.cat([ops.join_heads(x) for x in (q, k, v)], dim=-1), ops.join_heads(gate)

    def of_length_one(self, x: Tensor) -> Tensor:
        """Queries or keys as normalised heads, [B, T, key heads · K] to [B, T, key heads, K]."""
        return recurrent.l2_norm(ops.split_heads(x, self.n_key_head), self.l2_eps)

    def by_value_head(self, heads: Tensor) -> Tensor:
        """The key head of each value head: [B, T, value heads, K]."""
        return heads.repeat_interleave(self.n_value_head // self.n_key_head, dim=2)

    def beta_alpha(self, w: Weights, blk: str, h: Tensor) -> tuple[Tensor, Tensor]:
        """How strongly each value head is written to, and what its decay is made of, both [B, T, value heads]."""
        both = ops.split_heads(ops.project(w, blk + "ssm_ba", h), self.n_key_head)  # of a key head all β, then all α
        beta, alpha = both.chunk(2, dim=-1)
        return beta.flatten(-2).sigmoid(), alpha.flatten(-2)


ARCHS = {"qwen3next": Qwen3Next.from_metadata}
