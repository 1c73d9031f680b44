"""The small steps of a forward, one method each: what architectures take alike, and what one may take otherwise.

An architecture inherits them, states its own numbers (`rotary`, `scores`, `eps`) and overrides the steps in which it
differs. That every step is a method also lets a hypothesis replace a single one (`reference.hypotheses`).
Shapes: B batch, T tokens, H heads, D head size, E width of the residual stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.model import State, Tap, Weights


class Steps(ABC):
    """A model, as far as its steps go; subclasses are frozen dataclasses of hyperparameters."""

    n_layer: int
    n_embd: int
    eps: float

    # -- what a model is -----------------------------------------------------------------------------

    activation: ClassVar[str] = "silu"  # of the feed-forward; one of ops.ACTIVATIONS

    @property
    def uses_gelu(self) -> bool:
        """Whether ggml's CPU backend looks the activation up in a float16 table."""
        return self.activation in ops.BY_TABLE

    @property
    def uses_erf(self) -> bool:
        """Whether the activation is GELU with erf."""
        return self.activation == "gelu_erf"

    def leaves_alone(self, tensor: str) -> bool:
        """Whether a file may have `tensor` although the model has no use for it."""
        return False

    @abstractmethod
    def layer_kind(self, il: int) -> str:
        """`global`, `sliding`: what to call this layer in per-layer summaries."""

    @abstractmethod
    def embed(self, w: Weights, tokens: Tensor, state: State, tap: Tap) -> Tensor:
        """Token ids [B, T] to the first layer's input [B, T, E]."""

    @abstractmethod
    def layer(self, w: Weights, il: int, x: Tensor, state: State, tap: Tap) -> Tensor:
        """One layer: residual stream in, residual stream out, both [B, T, E]."""

    @abstractmethod
    def head(self, w: Weights, x: Tensor, state: State, tap: Tap) -> Tensor:
        """Last layer's output to logits [B, T, n_vocab]; the head's rows are read in chunks."""

    # -- numbers -------------------------------------------------------------------------------------

    @abstractmethod
    def rotary(self, il: int) -> ops.Rotary:
        """How layer `il` turns its queries and keys."""

    @abstractmethod
    def scores(self, il: int) -> ops.Scores:
        """How layer `il` makes attention scores."""

    def rope_factors(self, w: Weights, il: int) -> Tensor | None:
        """What divides the frequencies of layer `il`'s pairs [n_rot / 2], if anything does."""
        return None

    # -- steps ---------------------------------------------------------------------------------------

    def scale_embedding(self, x: Tensor) -> Tensor:
        """The embedding's rows as they enter the residual stream."""
        return x

    def norm(self, w: Weights, name: str | None, x: Tensor) -> Tensor:
        """RMSNorm of x [..., n] with the weight `name`, or without one."""
        return ops.rms_norm(x, None if name is None else w.get(name), self.eps)

    def add(self, x: Tensor, h: Tensor) -> Tensor:
        """What a branch made, added to the residual stream."""
        return x + h

    def tables(self, w: Weights, il: int, x: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Cosines and sines for layer `il` at the state's positions, each [T, n_rot / 2]."""
        rotary = self.rotary(il)
        if rotary.n_rot == 0:
            return x.new_empty(x.shape[1], 0), x.new_empty(x.shape[1], 0)
        return ops.rope_tables(
            state.positions,
            rotary.n_rot,
            rotary.base,
            freq_factors=self.rope_factors(w, il),
            scaling=rotary.scaling,
            arithmetic=state.arithmetic,
            dtype=x.dtype,
        )

    def prepare(self, w: Weights, il: int, name: str, heads: Tensor, cos: Tensor, sin: Tensor, tap: Tap) -> Tensor:
        """Queries or keys (`attn_q`, `attn_k`) [B, T, H, D], normalised where the model does so, and turned."""
        heads = self.norm_heads(w, il, name, heads, tap)
        heads = self.turn(il, name, heads, cos, sin)
        if cos.shape[-1]:
            tap(name + "_rope", ops.join_heads(heads))
        return heads

    def norm_heads(self, w: Weights, il: int, name: str, heads: Tensor, tap: Tap) -> Tensor:
        """Each head normalised by itself, where the model does so."""
        return heads

    def turn(self, il: int, name: str, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Heads turned by their position; as they are where the layer has no rotary embedding (n_rot is 0)."""
        if cos.shape[-1] == 0:
            return heads
        return ops.apply_rope(heads, cos, sin, interleaved=self.rotary(il).interleaved)

    def attend(self, il: int, q: Tensor, k: Tensor, v: Tensor, state: State, sinks: Tensor | None = None) -> Tensor:
        """Causal attention, heads joined: [B, T, H · D]; `sinks` [H] are scores without a value."""
        scores = self.scores(il)
        slopes = ops.alibi_slopes(q.shape[2], scores.max_alibi_bias)
        return ops.attention(
            q,
            k,
            v,
            scale=scores.scale,
            window=scores.window,
            softcap=scores.softcap,
            chunk=scores.chunk,
            slopes=None if slopes is None else slopes.to(q),
            sinks=sinks,
            watch=state.watch,
            arithmetic=state.arithmetic,
        )

    def act(self, gate: Tensor, state: State) -> Tensor:
        """The feed-forward's activation."""
        return ops.ACTIVATIONS[self.activation](gate, state.arithmetic)

    def gated(self, gate: Tensor, up: Tensor, state: State) -> Tensor:
        """What goes into the feed-forward's last projection."""
        return self.act(gate, state) * up

    def route(self, logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Weights and numbers of each token's experts, both [B, T, n_used], from the router's logits.

        `bias` [n_expert] is added to the scores for the choice only.
        """
        raise NotImplementedError("a model without experts")
