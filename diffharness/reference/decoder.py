"""The decoder that most architectures are: norm, attention, add; norm, feed-forward or experts, add.

An architecture's file inherits `Decoder` (or one of its variants below), reads what is its own in `read`, and
overrides the steps in which it differs. Which optional tensors a model has (biases, a fused `attn_qkv`, shared experts)
the file itself says. Shapes: B batch, T tokens, H heads, D head size, E width of the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from diffharness.reference import moe, ops
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Tap, Weights
from diffharness.reference.steps import Steps
from diffharness.weights.source import Metadata


@dataclass(frozen=True, kw_only=True)
class Decoder(Steps):
    """Hyperparameters, and the forward that they parametrise."""

    n_layer: int
    n_embd: int
    n_head: tuple[int, ...]  # by layer
    n_head_kv: tuple[int, ...]
    head_dim: int  # of queries and keys
    head_dim_v: int
    eps: float
    n_rot: int  # rotated components of a head
    rope_base: float
    rope_scaling: ops.RopeScaling
    attn_scale: float
    window: tuple[int | None, ...]  # by layer: keys in sight, None for all
    n_expert: int = 0  # 0: a dense feed-forward
    n_expert_used: int = 0
    normalise_experts: bool = True  # weights of the routed experts sum to one
    gating: moe.Gating = "softmax"
    experts_scale: float = 1.0  # of the routed experts' weights
    n_group: int = 1  # of experts, of which `n_group_used` are chosen first
    n_group_used: int = 1
    n_dense: int = 0  # leading layers without experts
    softcap: float | None = None  # of logits
    logit_scale: float = 1.0

    interleaved: ClassVar[bool] = False  # rope pairs (2i, 2i + 1); otherwise (i, i + n_rot/2)
    longrope: ClassVar[bool] = False  # reads the tensors `rope_factors_*`
    eps_key: ClassVar[str] = "attention.layer_norm_rms_epsilon"
    ffn_norm: ClassVar[str] = "ffn_norm.weight"  # the tensor of each layer that normalises the feed-forward's input
    fused_gate_up: ClassVar[bool] = False  # `ffn_up` holds the gate's rows and then its own

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> Self:
        """From GGUF keys; ArtifactFileError names a key that is missing or senseless."""
        return cls(**cls.read(HyperParameters(metadata)))

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        """The fields by the keys that every decoder has; of experts their number alone."""
        n_layer, n_embd = hp.count("block_count"), hp.count("embedding_length")
        n_head, n_head_kv = hp.heads(n_layer)
        head_dim = hp.count("attention.key_length", n_embd // n_head[0])
        n_expert = hp.integer("expert_count", 0)
        return {
            "n_layer": n_layer,
            "n_embd": n_embd,
            "n_head": n_head,
            "n_head_kv": n_head_kv,
            "head_dim": head_dim,
            "head_dim_v": hp.integer("attention.value_length", n_embd // n_head[0]),
            "eps": hp.number(cls.eps_key),
            "n_rot": hp.integer("rope.dimension_count", head_dim),
            "rope_base": hp.number("rope.freq_base", 10000.0),
            "rope_scaling": hp.rope_scaling(longrope=cls.longrope),
            "attn_scale": hp.number("attention.scale", 0.0) or head_dim**-0.5,
            "window": hp.windows(n_layer),
            "n_expert": n_expert,
            "n_expert_used": hp.count("expert_used_count") if n_expert else 0,
        }

    # -- numbers ---------------------------------------------------------------------------------------

    def layer_kind(self, il: int) -> str:
        return "global" if self.window[il] is None else "sliding"

    def rotary(self, il: int) -> ops.Rotary:
        return ops.Rotary(self.n_rot, self.rope_base, self.interleaved, self.rope_scaling)

    def rope_factors(self, w: Weights, il: int) -> Tensor | None:
        return w.find("rope_freqs.weight")

    def scores(self, il: int) -> ops.Scores:
        return ops.Scores(self.attn_scale, self.window[il])

    def has_experts(self, il: int) -> bool:
        """Whether layer `il` routes its tokens to experts."""
        return self.n_expert > 0 and il >= self.n_dense

    # -- the forward -----------------------------------------------------------------------------------

    def embed(self, w: Weights, tokens: Tensor, state: State, tap: Tap) -> Tensor:
        x = self.scale_embedding(ops.embed(w, tokens))
        tap("token_embd", x)
        return x

    def layer(self, w: Weights, il: int, x: Tensor, state: State, tap: Tap) -> Tensor:
        h = self.before_attention(w, il, x, tap)
        h = self.mixer(w, il, h, state, tap)
        x = self.add(x, self.after_attention(w, il, h, tap))
        tap("ffn_in", x)
        h = self.before_ffn(w, il, x, tap)
        h = self.feed_forward(w, il, h, state, tap)
        x = self.add(x, self.after_ffn(w, il, h, tap))
        return self.end_layer(w, il, x, tap)

    def head(self, w: Weights, x: Tensor, state: State, tap: Tap) -> Tensor:
        x = self.norm(w, "output_norm.weight", x)
        tap("output_norm", x)
        return ops.logits(w, x, tap, cap=self.softcap, scale=self.logit_scale)

    # -- steps of a layer ------------------------------------------------------------------------------

    def before_attention(self, w: Weights, il: int, x: Tensor, tap: Tap) -> Tensor:
        """The attention's input [B, T, E], of the residual stream."""
        h = self.norm(w, f"blk.{il}.attn_norm.weight", x)
        tap("attn_norm", h)
        return h

    def after_attention(self, w: Weights, il: int, h: Tensor, tap: Tap) -> Tensor:
        """What is added to the residual stream, of the attention's output."""
        return h

    def before_ffn(self, w: Weights, il: int, x: Tensor, tap: Tap) -> Tensor:
        """The feed-forward's input [B, T, E], of the residual stream."""
        h = self.norm(w, f"blk.{il}.{self.ffn_norm}", x)
        tap("ffn_norm", h)
        return h

    def after_ffn(self, w: Weights, il: int, h: Tensor, tap: Tap) -> Tensor:
        """What is added to the residual stream, of the feed-forward's output."""
        return h

    def end_layer(self, w: Weights, il: int, x: Tensor, tap: Tap) -> Tensor:
        """The residual stream as the layer hands it on."""
        tap("layer_out", x)
        return x

    def mixer(self, w: Weights, il: int, h: Tensor, state: State, tap: Tap) -> Tensor:
        """What mixes tokens: attention; hybrids choose by layer."""
        return self.attention(w, il, h, state, tap)

    # -- attention -------------------------------------------------------------------------------------

    def attention(self, w: Weights, il: int, h: Tensor, state: State, tap: Tap) -> Tensor:
        """Attention with its projections: [B, T, E] to [B, T, E]."""
        q, k, v = self.qkv(w, il, h, tap)
        cos, sin = self.tables(w, il, h, state)
        q = self.prepare(w, il, "attn_q", q, cos, sin, tap)
        k = self.prepare(w, il, "attn_k", k, cos, sin, tap)
        context = self.attend(il, q, k, v, state, self.sinks(w, il))
        tap("attn_ctx", context)
        context = self.after_context(w, il, h, context, tap)
        return self.project(w, f"blk.{il}.attn_output", context, "attn_out", tap)

    def qkv(self, w: Weights, il: int, h: Tensor, tap: Tap) -> tuple[Tensor, Tensor, Tensor]:
        """Heads of queries, keys and values [B, T, H, D], of three matrices or of one."""
        blk, n_head, n_kv = f"blk.{il}.", self.n_head[il], self.n_head_kv[il]
        if w.has(blk + "attn_qkv.weight"):
            y = self.project(w, blk + "attn_qkv", h, "attn_qkv", tap)
            q, k, v = torch.split(y, [n_head * self.head_dim, n_kv * self.head_dim, n_kv * self.head_dim_v], dim=-1)
        else:
            q, k, v = (self.project(w, blk + name, h, name, tap) for name in ("attn_q", "attn_k", "attn_v"))
        return ops.split_heads(q, n_head), ops.split_heads(k, n_kv), ops.split_heads(v, n_kv)

    def project(self, w: Weights, name: str, h: Tensor, tap_name: str, tap: Tap) -> Tensor:
        """`ops.project` of h, told under `tap_name`."""
        y = ops.project(w, name, h)
        tap(tap_name, y)
        return y

    def sinks(self, w: Weights, il: int) -> Tensor | None:
        """A score in each head [H] that takes its share of attention and has no value; None for none."""
        return None

    def after_context(self, w: Weights, il: int, h: Tensor, context: Tensor, tap: Tap) -> Tensor:
        """What goes into the output projection, of the heads' output [B, T, H · D] and the attention's input h."""
        return context

    # -- feed-forward ----------------------------------------------------------------------------------

    def feed_forward(self, w: Weights, il: int, h: Tensor, state: State, tap: Tap) -> Tensor:
        """The dense MLP or the experts of layer `il`: [B, T, E] to [B, T, E]."""
        out = self.experts(w, il, h, state, tap) if self.has_experts(il) else self.mlp(w, il, h, state, tap)
        tap("ffn_out", out)
        return out

    def mlp(self, w: Weights, il: int, h: Tensor, state: State, tap: Tap) -> Tensor:
        """down(gated(gate(h), up(h))), or down(act(up(h))) where there is no gate."""
        blk = f"blk.{il}."
        if w.has(blk + "ffn_gate.weight"):
            gate = self.project(w, blk + "ffn_gate", h, "ffn_gate", tap)
            act = self.gated(gate, self.project(w, blk + "ffn_up", h, "ffn_up", tap), state)
        else:
            up = self.project(w, blk + "ffn_up", h, "ffn_up", tap)
            act = self.gated_halves(up, state) if self.fused_gate_up else self.act(up, state)
        tap("ffn_act", act)
        return ops.project(w, blk + "ffn_down", act)

    def gated_halves(self, both: Tensor, state: State) -> Tensor:
        """`gated` of the gate and the rest, which come as the halves of one projection."""
        gate, up = both.chunk(2, dim=-1)
        return self.gated(gate, up, state)

    def experts(self, w: Weights, il: int, h: Tensor, state: State, tap: Tap) -> Tensor:
        """The routed experts' weighted sum, plus the shared experts where there are any."""
        blk = f"blk.{il}."
        logits = ops.project(w, blk + "ffn_gate_inp", h)
        tap("moe_logits", logits)
        weights, chosen = self.route(logits, w.find(blk + "exp_probs_b.bias"))
        out = moe.mix(h, weights, chosen, lambda index, x: self.expert(w, blk, index, x, state))
        tap("moe_experts", out)
        if w.has(blk + "ffn_up_shexp.weight"):
            out = out + self.shared_expert(w, blk, h, state, tap)
        return out

    def route(self, logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return moe.route(
            logits,
            self.n_expert_used,
            normalise=self.normalise_experts,
            gating=self.gating,
            bias=bias,
            scale=self.experts_scale,
            n_group=self.n_group,
            n_group_used=self.n_group_used,
        )

    def expert(self, w: Weights, blk: str, index: int, x: Tensor, state: State) -> Tensor:
        """Routed expert `index` on rows x [n, E]."""
        return moe.project(w, blk + "ffn_down_exps", index, self.expert_act(w, blk, index, x, state))

    def expert_act(self, w: Weights, blk: str, index: int, x: Tensor, state: State) -> Tensor:
        """What goes into the last projection of routed expert `index`, of its rows x [n, E]."""
        if w.has(blk + "ffn_gate_up_exps.weight"):
            gate, up = moe.project(w, blk + "ffn_gate_up_exps", index, x).chunk(2, dim=-1)
            return self.gated_expert(gate, up, state)
        up = moe.project(w, blk + "ffn_up_exps", index, x)
        if w.has(blk + "ffn_gate_exps.weight"):
            return self.gated_expert(moe.project(w, blk + "ffn_gate_exps", index, x), up, state)
        return self.act(up, state)

    def gated_expert(self, gate: Tensor, up: Tensor, state: State) -> Tensor:
        """What goes into a routed expert's last projection."""
        return self.gated(gate, up, state)

    def shared_expert(self, w: Weights, blk: str, h: Tensor, state: State, tap: Tap) -> Tensor:
        """The experts that every token goes to, stored as one MLP; under a sigmoid gate where the model has one."""
        up = ops.project(w, blk + "ffn_up_shexp", h)
        if w.has(blk + "ffn_gate_shexp.weight"):
            act = self.gated(ops.project(w, blk + "ffn_gate_shexp", h), up, state)
        else:
            act = self.act(up, state)
        out = ops.project(w, blk + "ffn_down_shexp", act)
        gate = w.find(blk + "ffn_gate_inp_shexp.weight")
        if gate is not None:
            out = out * ops.linear(h, gate.reshape(1, -1)).sigmoid()
        tap("ffn_shexp", out)
        return out


def read_routing(
    hp: HyperParameters, *, gating: moe.Gating = "softmax", normalise: bool = False, grouped: bool = False
) -> dict[str, Any]:
    """Fields of a `Decoder` from the keys of architectures that state how experts are chosen and weighed.

    `gating` and `normalise` are the architecture's own where the file does not say; `grouped`: it has groups.
    """
    code = hp.integer("expert_gating_func", 0)
    if code not in (0, *moe.GATING):
        hp.refuse("expert_gating_func", code, "1 to 4 (softmax, sigmoid, softmax of the chosen, root of softplus)")
    return {
        "gating": moe.GATING.get(code, gating),
        "normalise_experts": hp.boolean("expert_weights_norm", normalise),
        "experts_scale": hp.number("expert_weights_scale", 0.0) or 1.0,
        "n_group": hp.integer("expert_group_count", 0) or 1 if grouped else 1,
        "n_group_used": hp.integer("expert_group_used_count", 0) or 1 if grouped else 1,
        "n_dense": hp.integer("leading_dense_block_count", 0),
    }


class LayerNorms(Steps):
    """Norms are LayerNorms, with a bias where the file has one, and without weight where it has none."""

    eps_key: ClassVar[str] = "attention.layer_norm_epsilon"

    def norm(self, w: Weights, name: str | None, x: Tensor) -> Tensor:
        if name is None:
            return ops.layer_norm(x, None, None, self.eps)
        return ops.layer_norm(x, w.find(name), w.find(name.removesuffix("weight") + "bias"), self.eps)


class HeadNorms(Steps):
    """Each head of queries and keys is normalised by itself; all heads of a layer share the weight [D]."""

    def norm_heads(self, w: Weights, il: int, name: str, heads: Tensor, tap: Tap) -> Tensor:
        heads = self.norm(w, f"blk.{il}.{name}_norm.weight", heads)
        tap(name + "_norm", ops.join_heads(heads))
        return heads


class WideNorms(Steps):
    """Queries and keys are normalised over all heads at once, by a weight [H · D]."""

    def norm_heads(self, w: Weights, il: int, name: str, heads: Tensor, tap: Tap) -> Tensor:
        joined = self.norm(w, f"blk.{il}.{name}_norm.weight", ops.join_heads(heads))
        tap(name + "_norm", joined)
        return ops.split_heads(joined, heads.shape[-2])


class PostNorms(Steps):
    """What attention and feed-forward give is normalised before it is added to the residual stream."""

    def after_attention(self, w: Weights, il: int, h: Tensor, tap: Tap) -> Tensor:
        h = self.norm(w, f"blk.{il}.post_attention_norm.weight", h)
        tap("attn_post_norm", h)
        return h

    def after_ffn(self, w: Weights, il: int, h: Tensor, tap: Tap) -> Tensor:
        h = self.norm(w, f"blk.{il}.post_ffw_norm.weight", h)
        tap("ffn_post_norm", h)
        return h


@dataclass(frozen=True, kw_only=True)
class ParallelDecoder(Decoder):
    """Attention and feed-forward read the same residual stream, and both are added to it."""

    def layer(self, w: Weights, il: int, x: Tensor, state: State, tap: Tap) -> Tensor:
        h = self.before_attention(w, il, x, tap)
        attention = self.after_attention(w, il, self.mixer(w, il, h, state, tap), tap)
        ffn = self.after_ffn(w, il, self.feed_forward(w, il, self.beside(w, il, x, h, tap), state, tap), tap)
        return self.end_layer(w, il, self.add(self.add(x, ffn), attention), tap)

    def beside(self, w: Weights, il: int, x: Tensor, h: Tensor, tap: Tap) -> Tensor:
        """The feed-forward's input, of the residual stream x and the attention's input h: that very input."""
        return h
