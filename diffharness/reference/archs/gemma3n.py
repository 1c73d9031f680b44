"""`gemma3n`: Gemma 3n, text: E2B and E4B. Four residual streams (AltUp), of which a layer computes one.

A layer predicts all streams from all of them, runs attention and feed-forward on the active one, and corrects each by
what that changed; what the layer's own token embedding says is added to the others. A low-rank branch beside attention
(Laurel) joins it; attention is otherwise Gemma 4's: no scale, heads normalised, values without a weight, keys and
values of the last layers borrowed. In the first layers only the gates that stand out (mean + s · standard deviation)
open. Norm weights are plain factors.

The streams are one axis here and in taps: [.., n_streams · n_embd], the first stream first; the tap `token_embd` is
what enters the first layer. The standard deviation is of all gates, as the model's own code has it; the engine's
divides by one less. Images and audio are ignored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffharness import taps
from diffharness.errors import ArtifactFileError
from diffharness.reference import ops
from diffharness.reference.decoder import Decoder, HeadNorms, PostNorms
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Tap, Weights
from diffharness.reference.windows import windows

_PERIOD = 5  # the last layer of each period sees all
_N_OWN_KV = 20  # layers with keys and values of their own, where no key says
_N_SPARSE, _SPARSITY = 10, 1.6448533535003662  # sparse layers and their s, where no key says: 95 % of gates are closed
_LEAST_SQUARE = 1e-5  # of a projected stream, before its magnitude is made the first's


@dataclass(frozen=True, kw_only=True)
class Gemma3n(HeadNorms, PostNorms, Decoder):
    """Hyperparameters; where a tuple, one value per layer."""

    sliding_rope_base: float
    n_stream: int
    active: int  # the stream that layers compute
    n_embd_per_layer: int
    n_shared_kv: int  # this many last layers have no keys and values of their own
    sparsity: tuple[float | None, ...]  # by layer: standard deviations above the mean at which gates open

    activation: ClassVar[str] = "gelu"

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        fields = super().read(hp)
        n_layer = fields["n_layer"]
        n_shared = hp.integer("attention.shared_kv_layers", max(0, n_layer - _N_OWN_KV))
        window = windows(hp, n_layer, hp.count("attention.sliding_window"), _PERIOD)
        kinds = [size is None for size in window]
        if not 0 <= n_shared < n_layer or not set(kinds[n_layer - n_shared :]) <= set(kinds[: n_layer - n_shared]):
            raise ArtifactFileError(
                f"metadata key `{hp.key('attention.shared_kv_layers')}`: expected every kind of layer among those with "
                f"keys of their own, found {n_shared} of {n_layer} layers without"
            )
        n_stream = hp.integer("altup.num_inputs", 4)
        active = hp.integer("altup.active_idx", 0)
        if n_stream < 2 or not 0 <= active < n_stream:
            hp.refuse("altup.active_idx", f"{active} of {n_stream}", "one of several streams")
        return fields | {
            "window": window,
            "attn_scale": 1.0,
            "rope_base": hp.number("rope.freq_base", 1e6),
            "sliding_rope_base": hp.number("rope.freq_base_swa", 1e4),
            "softcap": hp.number("final_logit_softcapping", 30.0) or None,
            "n_stream": n_stream,
            "active": active,
            "n_embd_per_layer": hp.integer("embedding_length_per_layer_input", 256),
            "n_shared_kv": n_shared,
            "sparsity": cls._sparsity(hp, n_layer),
        }

    @staticmethod
    def _sparsity(hp: HyperParameters, n_layer: int) -> tuple[float | None, ...]:
        """`activation_sparsity_scale`, which is minus infinity where a layer's gates are all let through: None here."""
        scales = hp.metadata.get(hp.key("activation_sparsity_scale"))
        if scales is None:
            return tuple(_SPARSITY if il < _N_SPARSE else None for il in range(n_layer))
        values = [value for value in scales if isinstance(value, (int, float))]
        if len(values) < n_layer:
            hp.refuse("activation_sparsity_scale", scales, f"{n_layer} numbers")
        return tuple(float(value) if math.isfinite(value) else None for value in values[:n_layer])

    # -- numbers ---------------------------------------------------------------------------------------

    def leaves_alone(self, tensor: str) -> bool:
        """Keys and values of layers that borrow theirs, which the engine's loader wants to be there."""
        layer, stem = taps.split(tensor)
        own = self.n_layer - self.n_shared_kv
        return layer is not None and own <= layer < self.n_layer and stem.startswith(("attn_k", "attn_v"))

    def rotary(self, il: int) -> ops.Rotary:
        base, scaling = self.rope_base, self.rope_scaling
        if self.window[il] is not None:
            base, scaling = self.sliding_rope_base, ops.NO_SCALING
        return ops.Rotary(self.n_rot, base, self.interleaved, scaling)

    def rope_factors(self, w: Weights, il: int) -> Tensor | None:
        return None

    def has_experts(self, il: int) -> bool:
        return False

    def scale_embedding(self, x: Tensor) -> Tensor:
        return x * math.sqrt(self.n_embd)

    # -- the forward -----------------------------------------------------------------------------------

    def embed(self, w: Weights, tokens: Tensor, state: State, tap: Tap) -> Tensor:
        x = self.scale_embedding(ops.embed(w, tokens))
        state.per_layer_inputs = self._per_layer_inputs(w, tokens, x)
        others = [self._as_large(ops.linear(x, matrix), x) for matrix in w.get("altup_proj.weight")]
        streams = torch.cat((x, *others), dim=-1)
        tap("token_embd", streams)
        return streams

    def layer(self, w: Weights, il: int, x: Tensor, state: State, tap: Tap) -> Tensor:
        blk = f"blk.{il}."
        predicted = self._predict(w, blk, self._streams(x))
        active = predicted[..., self.active, :]
        h = self.before_attention(w, il, active, tap)
        beside = h + self.norm(
            w, blk + "laurel_post_norm.weight", ops.project(w, blk + "laurel_r", ops.project(w, blk + "laurel_l", h))
        )
        h = self.after_attention(w, il, self.attention(w, il, h, state, tap), tap)
        joined = (self.add(active, h) + beside) / math.sqrt(2.0)
        tap("ffn_in", joined)
        h = self.feed_forward(w, il, self.before_ffn(w, il, joined, tap), state, tap)
        activated = self.add(joined, self.after_ffn(w, il, h, tap))

        streams = self._correct(w, blk, predicted, activated)
        told = self._own_embedding(w, il, streams[..., self.active, :], state)
        streams = torch.cat((streams[..., :1, :], streams[..., 1:, :] + told[..., None, :]), dim=-2)
        return self.end_layer(w, il, streams.flatten(-2), tap)

    def head(self, w: Weights, x: Tensor, state: State, tap: Tap) -> Tensor:
        first, *others = self._streams(x).unbind(-2)
        back = w.get("altup_unembd_proj.weight")
        total = first
        for matrix, stream in zip(back, others, strict=True):
            total = total + self._as_large(ops.linear(stream, matrix), first)
        return super().head(w, total / self.n_stream, state, tap)

    # -- streams ---------------------------------------------------------------------------------------

    def _streams(self, x: Tensor) -> Tensor:
        """[B, T, n_stream · E] as [B, T, n_stream, E]."""
        return x.reshape(*x.shape[:-1], self.n_stream, self.n_embd)

    def _as_large(self, x: Tensor, measure: Tensor) -> Tensor:
        """x of the magnitude of `measure`, token by token."""
        wanted = measure.square().mean(dim=-1, keepdim=True).sqrt()
        return x * wanted / x.square().mean(dim=-1, keepdim=True).clamp(min=_LEAST_SQUARE).sqrt()

    def _modalities(self, w: Weights, blk: str, x: Tensor) -> Tensor:
        """What the router makes of one stream [B, T, E]: [B, T, n_stream], between -1 and 1."""
        h = self.norm(w, blk + "altup_router_norm.weight", x) / self.n_embd
        return ops.linear(h, w.get(blk + "altup_router.weight")).tanh()

    def _predict(self, w: Weights, blk: str, streams: Tensor) -> Tensor:
        """Each stream plus a mix of all streams [B, T, n_stream, E]."""
        modalities = self._modalities(w, blk, streams[..., self.active, :])
        mix = ops.project(w, blk + "altup_predict_coef", modalities)
        return streams + mix.reshape(*mix.shape[:-1], self.n_stream, self.n_stream) @ streams

    def _correct(self, w: Weights, blk: str, predicted: Tensor, activated: Tensor) -> Tensor:
        """Each predicted stream plus its share of what the active one came out different."""
        shares = 1 + ops.project(w, blk + "altup_correct_coef", self._modalities(w, blk, activated))
        surprise = activated - predicted[..., self.active, :]
        return predicted + shares[..., None] * surprise[..., None, :]

    # -- per-layer embeddings --------------------------------------------------------------------------

    def _per_layer_inputs(self, w: Weights, tokens: Tensor, x: Tensor) -> Tensor:
        """What each layer is told of each token [B, T, n_layer, n_embd_per_layer]."""
        shape = (*tokens.shape, self.n_layer, self.n_embd_per_layer)
        context = ops.linear(x, w.get("per_layer_model_proj.weight")) / math.sqrt(self.n_embd)
        context = self.norm(w, "per_layer_proj_norm.weight", context.reshape(shape))
        identity = ops.embed(w, tokens, "per_layer_token_embd.weight") * math.sqrt(self.n_embd_per_layer)
        return (context + identity.reshape(shape)) / math.sqrt(2.0)

    def _own_embedding(self, w: Weights, il: int, x: Tensor, state: State) -> Tensor:
        """What the active stream x lets through of what layer `il` was told: [B, T, E]."""
        assert state.per_layer_inputs is not None
        blk = f"blk.{il}."
        gate = self.act(ops.project(w, blk + "inp_gate", x * w.get(blk + "altup_correct_scale.weight")), state)
        h = ops.project(w, blk + "proj", gate * state.per_layer_inputs[:, :, il])
        return self.norm(w, blk + "post_norm.weight", h)

    # -- attention and feed-forward --------------------------------------------------------------------

    def attention(self, w: Weights, il: int, h: Tensor, state: State, tap: Tap) -> Tensor:
        blk = f"blk.{il}."
        cos, sin = self.tables(w, il, h, state)
        q = ops.split_heads(self.project(w, blk + "attn_q", h, "attn_q", tap), self.n_head[il])
        q = self.prepare(w, il, "attn_q", q, cos, sin, tap)
        lender = self.lender(il)
        if lender == il:
            k, v = (
                ops.split_heads(self.project(w, blk + name, h, name, tap), self.n_head_kv[il])
                for name in ("attn_k", "attn_v")
            )
            k, v = self.prepare(w, il, "attn_k", k, cos, sin, tap), self.norm(w, None, v)
            tap("attn_v_norm", ops.join_heads(v))
            if any(self.lender(jl) == il for jl in range(il + 1, self.n_layer)):
                state.shared_kv[il] = k, v
        else:
            k, v = state.shared_kv[lender]
        context = self.attend(il, q, k, v, state)
        tap("attn_ctx", context)
        return self.project(w, blk + "attn_output", context, "attn_out", tap)

    def lender(self, il: int) -> int:
        """The layer whose keys and values layer `il` attends to: itself, or the last of its kind that has its own."""
        first_shared = self.n_layer - self.n_shared_kv
        if il < first_shared:
            return il
        return max(jl for jl in range(first_shared) if (self.window[jl] is None) == (self.window[il] is None))

    def mlp(self, w: Weights, il: int, h: Tensor, state: State, tap: Tap) -> Tensor:
        blk = f"blk.{il}."
        gate = self.project(w, blk + "ffn_gate", h, "ffn_gate", tap)
        up = self.project(w, blk + "ffn_up", h, "ffn_up", tap)
        act = self.gated(self.open_gates(gate, self.sparsity[il]), up, state)
        tap("ffn_act", act)
        return ops.project(w, blk + "ffn_down", act)

    def open_gates(self, gate: Tensor, deviations: float | None) -> Tensor:
        """What a gate stands out above the mean and so many standard deviations of its token's gates."""
        if deviations is None:
            return gate
        spread = self.spread(gate)
        return (gate - gate.mean(dim=-1, keepdim=True) - spread * deviations).relu()

    def spread(self, gate: Tensor) -> Tensor:
        """The standard deviation of each token's gates [B, T, 1]."""
        return gate.std(dim=-1, keepdim=True, unbiased=False)


ARCHS = {"gemma3n": Gemma3n.from_metadata}
