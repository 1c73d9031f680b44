"""Gemma 4, text: 12B and 31B (dense, K=V globals), 26B-A4B (routed experts), E2B and E4B (per-layer embeddings).

Every layer is a sandwich: norm, attention, norm, add; norm, feed-forward, norm, add; then, in the E models, what
this layer's own token embedding says; at last one stored scalar multiplies the whole residual. Most layers slide;
the global ones have their own head size and number of KV heads, and on them only some pairs of a head turn.

Norm weights are plain factors (no `1 +`). Keys and queries are normalised with a weight, values without one, and
there is no further attention scale. Where a layer has no value projection, the value is the raw key projection.
Images, audio and bidirectional attention are ignored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from diffharness.errors import ArtifactFileError
from diffharness.reference import ops
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Tap, Weights
from diffharness.weights.source import Metadata


@dataclass(frozen=True)
class Gemma4:
    """Hyperparameters; where a tuple, one value per layer."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: tuple[int, ...]
    sliding: tuple[bool, ...]
    global_head_dim: int
    sliding_head_dim: int
    window: int
    eps: float
    global_rope_base: float
    sliding_rope_base: float
    sliding_n_rot: int
    softcap: float | None
    n_shared_kv: int  # this many last layers have no keys and values of their own
    n_embd_per_layer: int  # 0: no per-layer embeddings
    n_expert_used: int  # 0: dense

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> Self:
        """From GGUF keys; raises ArtifactFileError where one is missing or makes no sense."""
        h = HyperParameters(metadata)
        n_layer = h.count("block_count")
        global_head_dim = h.count("attention.key_length")
        sliding_head_dim = h.integer("attention.key_length_swa", global_head_dim)
        sliding = h.booleans("attention.sliding_window_pattern", n_layer)
        n_shared = h.integer("attention.shared_kv_layers", 0)
        if not 0 <= n_shared < n_layer or not set(sliding[n_layer - n_shared :]) <= set(sliding[: n_layer - n_shared]):
            raise ArtifactFileError(
                f"metadata key `{h.key('attention.shared_kv_layers')}`: expected every kind of layer among those with "
                f"keys of their own, found {n_shared} of {n_layer} layers without"
            )
        return cls(
            n_layer=n_layer,
            n_embd=h.count("embedding_length"),
            n_head=h.count("attention.head_count"),
            n_head_kv=h.integers("attention.head_count_kv", n_layer),
            sliding=sliding,
            global_head_dim=global_head_dim,
            sliding_head_dim=sliding_head_dim,
            window=h.count("attention.sliding_window"),
            eps=h.number("attention.layer_norm_rms_epsilon"),
            global_rope_base=h.number("rope.freq_base", 10_000.0),
            sliding_rope_base=h.number("rope.freq_base_swa", 10_000.0),
            sliding_n_rot=h.integer("rope.dimension_count_swa", sliding_head_dim),
            softcap=h.number("final_logit_softcapping", 30.0) or None,  # the format's default; 0 is none
            n_shared_kv=n_shared,
            n_embd_per_layer=h.integer("embedding_length_per_layer_input", 0),
            n_expert_used=h.integer("expert_used_count", 0),
        )

    @property
    def uses_gelu(self) -> bool:
        return True

    def layer_kind(self, il: int) -> str:
        return "sliding" if self.sliding[il] else "global"

    def embed(self, w: Weights, tokens: Tensor, state: State, tap: Tap) -> Tensor:
        x = ops.embed(w, tokens) * math.sqrt(self.n_embd)
        tap("token_embd", x)
        if self.n_embd_per_layer:
            state.per_layer_inputs = self._per_layer_inputs(w, tokens, x)
        return x

    def layer(self, w: Weights, il: int, x: Tensor, state: State, tap: Tap) -> Tensor:
        blk = f"blk.{il}."
        h = ops.rms_norm(x, w.get(blk + "attn_norm.weight"), self.eps)
        tap("attn_norm", h)
        h = self._attention(w, il, h, state, tap)
        h = ops.rms_norm(h, w.get(blk + "post_attention_norm.weight"), self.eps)
        tap("attn_post_norm", h)
        x = x + h
        tap("ffn_in", x)

        h = ops.rms_norm(x, w.get(blk + "ffn_norm.weight"), self.eps)
        tap("ffn_norm", h)
        h = self._dense(w, blk, h, state, tap)
        if w.has(blk + "ffn_gate_inp.weight"):
            h = ops.rms_norm(h, w.get(blk + "post_ffw_norm_1.weight"), self.eps)
            h = h + self._experts(w, blk, x, state, tap)
        tap("ffn_out", h)
        h = ops.rms_norm(h, w.get(blk + "post_ffw_norm.weight"), self.eps)
        tap("ffn_post_norm", h)
        x = x + h

        if state.per_layer_inputs is not None:
            x = x + self._own_embedding(w, blk, x, state.per_layer_inputs[:, :, il], state)
        scale = w.find(blk + "layer_output_scale.weight")
        if scale is not None:
            x = x * scale
        tap("layer_out", x)
        return x

    def head(self, w: Weights, x: Tensor, state: State, tap: Tap) -> Tensor:
        return ops.head(w, x, tap, eps=self.eps, cap=self.softcap)

    # -- attention -----------------------------------------------------------------------------------

    def _attention(self, w: Weights, il: int, x: Tensor, state: State, tap: Tap) -> Tensor:
        blk = f"blk.{il}."
        cos, sin = self._rope(w, il, x, state)
        q = ops.linear(x, w.get(blk + "attn_q.weight"))
        tap("attn_q", q)
        q = ops.rms_norm(ops.split_heads(q, self.n_head), w.get(blk + "attn_q_norm.weight"), self.eps)
        tap("attn_q_norm", ops.join_heads(q))
        q = ops.apply_rope(q, cos, sin, interleaved=False)
        tap("attn_q_rope", ops.join_heads(q))

        lender = self._lender(il)
        if lender == il:
            k, v = self._keys_values(w, il, x, cos, sin, tap)
            if self._lends(il):
                state.shared_kv[il] = k, v
        else:
            k, v = state.shared_kv[lender]
        window = self.window if self.sliding[il] else None
        h = ops.attention(q, k, v, scale=1.0, window=window, watch=state.watch)
        tap("attn_ctx", h)
        h = ops.linear(h, w.get(blk + "attn_output.weight"))
        tap("attn_out", h)
        return h

    def _keys_values(self, w: Weights, il: int, x: Tensor, cos: Tensor, sin: Tensor, tap: Tap) -> tuple[Tensor, Tensor]:
        """Keys, normalised and turned, and values, normalised; both [B, T, Hkv, D]."""
        blk, n_head_kv = f"blk.{il}.", self.n_head_kv[il]
        k = ops.linear(x, w.get(blk + "attn_k.weight"))
        tap("attn_k", k)
        w_v = w.find(blk + "attn_v.weight")
        v = k if w_v is None else ops.linear(x, w_v)
        tap("attn_v", v)
        k = ops.rms_norm(ops.split_heads(k, n_head_kv), w.get(blk + "attn_k_norm.weight"), self.eps)
        tap("attn_k_norm", ops.join_heads(k))
        k = ops.apply_rope(k, cos, sin, interleaved=False)
        tap("attn_k_rope", ops.join_heads(k))
        v = ops.rms_norm(ops.split_heads(v, n_head_kv), None, self.eps)
        tap("attn_v_norm", ops.join_heads(v))
        return k, v

    def _rope(self, w: Weights, il: int, x: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Tables of this layer's kind. On globals, `rope_freqs` divides the frequencies of standing pairs by 1e30."""
        if self.sliding[il]:
            n_rot, base, factors = self.sliding_n_rot, self.sliding_rope_base, None
        else:
            n_rot, base, factors = self.global_head_dim, self.global_rope_base, w.get("rope_freqs.weight")
        return ops.rope_tables(
            state.positions, n_rot, base, freq_factors=factors, arithmetic=state.arithmetic, dtype=x.dtype
        )

    def _lender(self, il: int) -> int:
        """The layer whose keys and values layer `il` attends to: itself, or the last of its kind that has its own."""
        first_shared = self.n_layer - self.n_shared_kv
        if il < first_shared:
            return il
        return max(jl for jl in range(first_shared) if self.sliding[jl] == self.sliding[il])

    def _lends(self, il: int) -> bool:
        return any(self._lender(jl) == il for jl in range(self.n_layer - self.n_shared_kv, self.n_layer))

    # -- feed-forward --------------------------------------------------------------------------------

    def _dense(self, w: Weights, blk: str, x: Tensor, state: State, tap: Tap) -> Tensor:
        gate = ops.linear(x, w.get(blk + "ffn_gate.weight"))
        tap("ffn_gate", gate)
        up = ops.linear(x, w.get(blk + "ffn_up.weight"))
        tap("ffn_up", up)
        h = ops.gelu_tanh(gate, state.arithmetic) * up
        tap("ffn_act", h)
        return ops.linear(h, w.get(blk + "ffn_down.weight"))

    def _experts(self, w: Weights, blk: str, x: Tensor, state: State, tap: Tap) -> Tensor:
        """The routed experts' normalised sum. Router and experts see the residual, each under a norm of its own."""
        h = ops.rms_norm(x, None, self.eps) * w.get(blk + "ffn_gate_inp.scale") / math.sqrt(self.n_embd)
        logits = ops.linear(h, w.get(blk + "ffn_gate_inp.weight"))
        tap("moe_logits", logits)
        weights, experts = ops.route(logits, self.n_expert_used, normalise=True)
        expert_scale = w.find(blk + "ffn_down_exps.scale")
        if expert_scale is not None:
            weights = weights * expert_scale[experts]
        fused = w.has(blk + "ffn_gate_up_exps.weight")

        def ffn(expert: int, rows: Tensor) -> Tensor:
            if fused:
                both = ops.linear(rows, ops.expert_matrix(w, blk + "ffn_gate_up_exps.weight", expert))
                gate, up = both.chunk(2, dim=-1)
            else:
                gate = ops.linear(rows, ops.expert_matrix(w, blk + "ffn_gate_exps.weight", expert))
                up = ops.linear(rows, ops.expert_matrix(w, blk + "ffn_up_exps.weight", expert))
            down = ops.expert_matrix(w, blk + "ffn_down_exps.weight", expert)
            return ops.linear(ops.gelu_tanh(gate, state.arithmetic) * up, down)

        h = ops.rms_norm(x, w.get(blk + "pre_ffw_norm_2.weight"), self.eps)
        h = ops.moe(h, weights, experts, ffn)
        tap("moe_experts", h)
        return ops.rms_norm(h, w.get(blk + "post_ffw_norm_2.weight"), self.eps)

    # -- per-layer embeddings (E models) -------------------------------------------------------------

    def _per_layer_inputs(self, w: Weights, tokens: Tensor, x: Tensor) -> Tensor:
        """What each layer is told of each token [B, T, n_layer, n_embd_per_layer].

        The mean (over √2) of a projection of the embedding, normalised, and of the token's second embedding.
        """
        shape = (*tokens.shape, self.n_layer, self.n_embd_per_layer)
        context = ops.linear(x, w.get("per_layer_model_proj.weight")) / math.sqrt(self.n_embd)
        context = ops.rms_norm(context.reshape(shape), w.get("per_layer_proj_norm.weight"), self.eps)
        identity = ops.embed(w, tokens, "per_layer_token_embd.weight") * math.sqrt(self.n_embd_per_layer)
        return (context + identity.reshape(shape)) / math.sqrt(2.0)

    def _own_embedding(self, w: Weights, blk: str, x: Tensor, told: Tensor, state: State) -> Tensor:
        """The residual gates what this layer was told [B, T, n_embd_per_layer]; [B, T, n_embd]."""
        gate = ops.gelu_tanh(ops.linear(x, w.get(blk + "inp_gate.weight")), state.arithmetic)
        h = ops.linear(gate * told, w.get(blk + "proj.weight"))
        return ops.rms_norm(h, w.get(blk + "post_norm.weight"), self.eps)
