"""`gemma4`: Gemma 4, text. 12B and 31B (K=V globals), 26B-A4B (routed experts), E2B and E4B (per-layer embeddings).

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
from typing import ClassVar, Self

from torch import Tensor

from diffharness.errors import ArtifactFileError
from diffharness.reference import moe, ops
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Tap, Weights
from diffharness.reference.steps import Steps
from diffharness.weights.source import Metadata


@dataclass(frozen=True)
class Gemma4(Steps):
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

    activation: ClassVar[str] = "gelu"

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> Self:
        """From GGUF keys; raises ArtifactFileError where one is missing or makes no sense."""
        h = HyperParameters(metadata)
        n_layer = h.count("block_count")
        global_head_dim = h.count("attention.key_length")
        sliding_head_dim = h.integer("attention.key_length_swa", global_head_dim)
        sliding = h.booleans("attention.sliding_window_pattern", n_layer)
        of_heads = {
            "rope.dimension_count": global_head_dim,
            "attention.value_length": global_head_dim,
            "attention.value_length_swa": sliding_head_dim,
        }
        for name, size in of_heads.items():
            if (found := h.integer(name, size)) != size:
                h.refuse(name, found, f"the size of a head, {size}")
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

    def layer_kind(self, il: int) -> str:
        return "sliding" if self.sliding[il] else "global"

    def rotary(self, il: int) -> ops.Rotary:
        if self.sliding[il]:
            return ops.Rotary(self.sliding_n_rot, self.sliding_rope_base, False)
        return ops.Rotary(self.global_head_dim, self.global_rope_base, False)

    def rope_factors(self, w: Weights, il: int) -> Tensor | None:
        """On globals, `rope_freqs` divides the frequencies of standing pairs by 1e30."""
        return None if self.sliding[il] else w.get("rope_freqs.weight")

    def scores(self, il: int) -> ops.Scores:
        return ops.Scores(1.0, self.window if self.sliding[il] else None)

    def scale_embedding(self, x: Tensor) -> Tensor:
        return x * math.sqrt(self.n_embd)

    def embed(self, w: Weights, tokens: Tensor, state: State, tap: Tap) -> Tensor:
        x = self.scale_embedding(ops.embed(w, tokens))
        tap("token_embd", x)
        if self.n_embd_per_layer:
            state.per_layer_inputs = self._per_layer_inputs(w, tokens, x)
        return x

    def layer(self, w: Weights, il: int, x: Tensor, state: State, tap: Tap) -> Tensor:
        blk, came_in = f"blk.{il}.", x
        h = self.norm(w, blk + "attn_norm.weight", x)
        tap("attn_norm", h)
        h = self._attention(w, il, h, state, tap)
        h = self.norm(w, blk + "post_attention_norm.weight", h)
        tap("attn_post_norm", h)
        x = self.add(x, h)
        tap("ffn_in", x)

        h = self.norm(w, blk + "ffn_norm.weight", x)
        tap("ffn_norm", h)
        h = self._dense(w, blk, h, state, tap)
        if w.has(blk + "ffn_gate_inp.weight"):
            h = self.norm(w, blk + "post_ffw_norm_1.weight", h)
            h = h + self._experts(w, blk, x, state, tap)
        tap("ffn_out", h)
        h = self.norm(w, blk + "post_ffw_norm.weight", h)
        tap("ffn_post_norm", h)
        x = self.add(x, h)

        if state.per_layer_inputs is not None:
            x = self.add(x, self.own_embedding(w, blk, x, state.per_layer_inputs[:, :, il], state))
        x = self.scale_layer(w, il, x, came_in)
        tap("layer_out", x)
        return x

    def scale_layer(self, w: Weights, il: int, x: Tensor, came_in: Tensor) -> Tensor:
        """The layer's scalar on the whole residual x; what came into the layer is only for comparison."""
        scale = w.find(f"blk.{il}.layer_output_scale.weight")
        return x if scale is None else x * scale

    def head(self, w: Weights, x: Tensor, state: State, tap: Tap) -> Tensor:
        x = self.norm(w, "output_norm.weight", x)
        tap("output_norm", x)
        return ops.logits(w, x, tap, cap=self.softcap)

    # -- attention -----------------------------------------------------------------------------------

    def _attention(self, w: Weights, il: int, x: Tensor, state: State, tap: Tap) -> Tensor:
        blk = f"blk.{il}."
        cos, sin = self.tables(w, il, x, state)
        q = ops.project(w, blk + "attn_q", x)
        tap("attn_q", q)
        q = self.prepare(w, il, "attn_q", ops.split_heads(q, self.n_head), cos, sin, tap)

        lender = self.lender(il)
        if lender == il:
            k, v = self.keys_values(w, il, x, cos, sin, tap)
            if self._lends(il):
                state.shared_kv[il] = k, v
        else:
            k, v = state.shared_kv[lender]
        h = self.attend(il, q, k, v, state)
        tap("attn_ctx", h)
        h = ops.project(w, blk + "attn_output", h)
        tap("attn_out", h)
        return h

    def norm_heads(self, w: Weights, il: int, name: str, heads: Tensor, tap: Tap) -> Tensor:
        heads = self.norm(w, f"blk.{il}.{name}_norm.weight", heads)
        tap(name + "_norm", ops.join_heads(heads))
        return heads

    def keys_values(self, w: Weights, il: int, x: Tensor, cos: Tensor, sin: Tensor, tap: Tap) -> tuple[Tensor, Tensor]:
        """Keys, normalised and turned, and values, normalised; both [B, T, Hkv, D]."""
        blk, n_head_kv = f"blk.{il}.", self.n_head_kv[il]
        raw = ops.project(w, blk + "attn_k", x)
        tap("attn_k", raw)
        k = self.prepare(w, il, "attn_k", ops.split_heads(raw, n_head_kv), cos, sin, tap)
        w_v = w.find(blk + "attn_v.weight")
        v = raw if w_v is None else ops.linear(x, w_v)
        tap("attn_v", v)
        v = self.norm_values(w, il, ops.split_heads(v, n_head_kv))
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
        return max(jl for jl in range(first_shared) if self.sliding[jl] == self.sliding[il])

    def _lends(self, il: int) -> bool:
        return any(self.lender(jl) == il for jl in range(il + 1, self.n_layer))

    # -- feed-forward --------------------------------------------------------------------------------

    def _dense(self, w: Weights, blk: str, x: Tensor, state: State, tap: Tap) -> Tensor:
        gate = ops.project(w, blk + "ffn_gate", x)
        tap("ffn_gate", gate)
        up = ops.project(w, blk + "ffn_up", x)
        tap("ffn_up", up)
        h = self.gated(gate, up, state)
        tap("ffn_act", h)
        return ops.project(w, blk + "ffn_down", h)

    def route(self, logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return moe.route(logits, self.n_expert_used, normalise=True)

    def _experts(self, w: Weights, blk: str, x: Tensor, state: State, tap: Tap) -> Tensor:
        """The routed experts' normalised sum. Router and experts see the residual, each under a norm of its own."""
        h = self.norm(w, None, x) * w.get(blk + "ffn_gate_inp.scale") / math.sqrt(self.n_embd)
        logits = ops.linear(h, w.get(blk + "ffn_gate_inp.weight"))  # its .scale is of the input, above
        tap("moe_logits", logits)
        weights, experts = self.route(logits)
        expert_scale = w.find(blk + "ffn_down_exps.scale")
        if expert_scale is not None:
            weights = weights * expert_scale[experts]
        fused = w.has(blk + "ffn_gate_up_exps.weight")

        def ffn(expert: int, rows: Tensor) -> Tensor:
            if fused:
                both = moe.project(w, blk + "ffn_gate_up_exps", expert, rows)
                gate, up = both.chunk(2, dim=-1)
            else:
                gate = moe.project(w, blk + "ffn_gate_exps", expert, rows)
                up = moe.project(w, blk + "ffn_up_exps", expert, rows)
            down = moe.matrix(w, blk + "ffn_down_exps.weight", expert)
            return ops.linear(self.gated(gate, up, state), down)

        h = self.norm(w, blk + "pre_ffw_norm_2.weight", x)
        h = moe.mix(h, weights, experts, ffn)
        tap("moe_experts", h)
        return self.norm(w, blk + "post_ffw_norm_2.weight", h)

    # -- per-layer embeddings (E models) -------------------------------------------------------------

    def _per_layer_inputs(self, w: Weights, tokens: Tensor, x: Tensor) -> Tensor:
        """What each layer is told of each token [B, T, n_layer, n_embd_per_layer].

        The mean (over √2) of a projection of the embedding, normalised, and of the token's second embedding.
        """
        shape = (*tokens.shape, self.n_layer, self.n_embd_per_layer)
        context = ops.linear(x, w.get("per_layer_model_proj.weight")) / math.sqrt(self.n_embd)
        context = self.norm(w, "per_layer_proj_norm.weight", context.reshape(shape))
        identity = ops.embed(w, tokens, "per_layer_token_embd.weight") * math.sqrt(self.n_embd_per_layer)
        return (context + identity.reshape(shape)) / math.sqrt(2.0)

    def own_embedding(self, w: Weights, blk: str, x: Tensor, told: Tensor, state: State) -> Tensor:
        """The residual gates what this layer was told [B, T, n_embd_per_layer]; [B, T, n_embd]."""
        gate = self.act(ops.project(w, blk + "inp_gate", x), state)
        h = ops.linear(gate * told, w.get(blk + "proj.weight"))
        return self.norm(w, blk + "post_norm.weight", h)


ARCHS = {"gemma4": Gemma4.from_metadata}
