"""`llama`: Llama 1 to 3, SmolLM2, Mistral, and Mixtral's experts.

Pre-norm decoder: RMSNorm, rotary attention with grouped KV heads, SiLU-gated feed-forward. GGUF keeps Q and K
permuted to interleaved rotary pairs, so rope here turns (2i, 2i + 1); Llama 3's frequency scaling is the tensor
`rope_freqs`. Mistral's sliding window is part of the model although the engine's llama graph has none: it is
applied where the metadata name it. Not supported: fused `attn_qkv`, LongRoPE factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Tap, Weights
from diffharness.reference.steps import Steps
from diffharness.weights.source import Metadata


@dataclass(frozen=True)
class Llama(Steps):
    """Hyperparameters, and the forward that they parametrise."""

    n_layer: int
    n_embd: int
    n_head: tuple[int, ...]  # by layer
    n_head_kv: tuple[int, ...]
    head_dim: int
    eps: float
    n_rot: int  # rotated components of a head
    rope_base: float
    rope_scaling: ops.RopeScaling
    attn_scale: float
    window: tuple[int | None, ...]  # by layer: keys in sight, None for all
    n_expert: int  # 0: a dense feed-forward
    n_expert_used: int
    normalise_experts: bool  # weights of the routed experts sum to one

    interleaved: ClassVar[bool] = True  # rope pairs (2i, 2i + 1)

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> Self:
        """Read GGUF keys; ArtifactFileError names a key that is missing or senseless."""
        hp = HyperParameters(metadata)
        n_layer = hp.count("block_count")
        n_head, n_head_kv = hp.heads(n_layer)
        n_embd = hp.count("embedding_length")
        head_dim = hp.integer("attention.key_length", n_embd // n_head[0])
        n_expert = hp.integer("expert_count", 0)
        return cls(
            n_layer=n_layer,
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=n_head_kv,
            head_dim=head_dim,
            eps=hp.number("attention.layer_norm_rms_epsilon"),
            n_rot=hp.integer("rope.dimension_count", head_dim),
            rope_base=hp.number("rope.freq_base", 10000.0),
            rope_scaling=hp.rope_scaling(),
            attn_scale=hp.number("attention.scale", 0.0) or head_dim**-0.5,
            window=hp.windows(n_layer),
            n_expert=n_expert,
            n_expert_used=hp.count("expert_used_count") if n_expert else 0,
            normalise_experts=hp.boolean("expert_weights_norm", True),
        )

    @property
    def uses_gelu(self) -> bool:
        return False

    def layer_kind(self, il: int) -> str:
        return "global" if self.window[il] is None else "sliding"

    def rotary(self, il: int) -> ops.Rotary:
        return ops.Rotary(self.n_rot, self.rope_base, self.interleaved, self.rope_scaling)

    def rope_factors(self, w: Weights, il: int) -> Tensor | None:
        return w.find("rope_freqs.weight")

    def scores(self, il: int) -> ops.Scores:
        return ops.Scores(self.attn_scale, self.window[il])

    def embed(self, w: Weights, tokens: Tensor, state: State, tap: Tap) -> Tensor:
        x = self.scale_embedding(ops.embed(w, tokens))
        tap("token_embd", x)
        return x

    def layer(self, w: Weights, il: int, x: Tensor, state: State, tap: Tap) -> Tensor:
        x = self.add(x, self._attention(w, il, x, state, tap))
        tap("ffn_in", x)
        h = self.norm(w, f"blk.{il}.ffn_norm.weight", x)
        tap("ffn_norm", h)
        h = self._experts(w, il, h, state, tap) if self.n_expert else self._feed_forward(w, il, h, state, tap)
        tap("ffn_out", h)
        x = self.add(x, h)
        tap("layer_out", x)
        return x

    def head(self, w: Weights, x: Tensor, state: State, tap: Tap) -> Tensor:
        x = self.norm(w, "output_norm.weight", x)
        tap("output_norm", x)
        return ops.logits(w, x, tap)

    # -- parts of a layer ------------------------------------------------------------------------------

    def _attention(self, w: Weights, il: int, x: Tensor, state: State, tap: Tap) -> Tensor:
        blk = f"blk.{il}."
        h = self.norm(w, blk + "attn_norm.weight", x)
        tap("attn_norm", h)
        cos, sin = self.tables(w, il, x, state)
        q = self._project(w, il, "attn_q", h, self.n_head[il], tap)
        q = self.prepare(w, il, "attn_q", q, cos, sin, tap)
        k = self._project(w, il, "attn_k", h, self.n_head_kv[il], tap)
        k = self.prepare(w, il, "attn_k", k, cos, sin, tap)
        v = self._project(w, il, "attn_v", h, self.n_head_kv[il], tap)
        context = self.attend(il, q, k, v, state)
        tap("attn_ctx", context)
        out = ops.linear(context, w.get(blk + "attn_output.weight"), w.find(blk + "attn_output.bias"))
        tap("attn_out", out)
        return out

    def _project(self, w: Weights, il: int, name: str, h: Tensor, n_head: int, tap: Tap) -> Tensor:
        y = ops.linear(h, w.get(f"blk.{il}.{name}.weight"), w.find(f"blk.{il}.{name}.bias"))
        tap(name, y)
        return ops.split_heads(y, n_head)

    def act(self, gate: Tensor, state: State) -> Tensor:
        return ops.silu(gate)

    def _feed_forward(self, w: Weights, il: int, h: Tensor, state: State, tap: Tap) -> Tensor:
        blk = f"blk.{il}."
        gate = ops.linear(h, w.get(blk + "ffn_gate.weight"), w.find(blk + "ffn_gate.bias"))
        tap("ffn_gate", gate)
        up = ops.linear(h, w.get(blk + "ffn_up.weight"), w.find(blk + "ffn_up.bias"))
        tap("ffn_up", up)
        act = self.gated(gate, up, state)
        tap("ffn_act", act)
        return ops.linear(act, w.get(blk + "ffn_down.weight"), w.find(blk + "ffn_down.bias"))

    def route(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        return ops.route(logits, self.n_expert_used, normalise=self.normalise_experts)

    def _experts(self, w: Weights, il: int, h: Tensor, state: State, tap: Tap) -> Tensor:
        blk = f"blk.{il}."
        logits = ops.linear(h, w.get(blk + "ffn_gate_inp.weight"))
        tap("moe_logits", logits)
        weights, experts = self.route(logits)

        def expert(index: int, x: Tensor) -> Tensor:
            gate = ops.linear(x, ops.expert_matrix(w, blk + "ffn_gate_exps.weight", index))
            up = ops.linear(x, ops.expert_matrix(w, blk + "ffn_up_exps.weight", index))
            return ops.linear(self.gated(gate, up, state), ops.expert_matrix(w, blk + "ffn_down_exps.weight", index))

        out = ops.moe(h, weights, experts, expert)
        tap("moe_experts", out)
        return out
