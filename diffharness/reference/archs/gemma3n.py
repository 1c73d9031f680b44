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

from diffharness.reference import ops
from diffharness.reference.archs._gemma_e import GemmaE
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Tap, Weights

_N_OWN_KV = 20  # layers with keys and values of their own, where no key says
_N_SPARSE, _SPARSITY = 10, 1.6448533535003662  # sparse layers and their s, where no key says: 95 % of gates are closed
_LEAST_SQUARE = 1e-5  # of a projected stream, before its magnitude is made the first's


@dataclass(frozen=True, kw_only=True)
class Gemma3n(GemmaE):
    """Differs from what it shares with Gemma 4 in its streams and its sparse layers."""

    n_stream: int
    active: int  # the stream that layers compute
    sparsity: tuple[float | None, ...]  # by layer: standard deviations above the mean at which gates open

    slides_by_default: ClassVar[int] = 5

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        fields = super().read(hp)
        n_layer = fields["n_layer"]
        n_stream = hp.integer("altup.num_inputs", 4)
        active = hp.integer("altup.active_idx", 0)
        if n_stream < 2 or not 0 <= active < n_stream:
            hp.refuse("altup.active_idx", f"{active} of {n_stream}", "one of several streams")
        return fields | {
            "rope_base": hp.number("rope.freq_base", 1e6),
            "n_stream": n_stream,
            "active": active,
            "n_embd_per_layer": hp.integer("embedding_length_per_layer_input", 256),
            "n_shared_kv": cls.read_shared(hp, fields["window"], max(0, n_layer - _N_OWN_KV)),
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

    # -- the forward -----------------------------------------------------------------------------------

    def embed(self, w: Weights, tokens: Tensor, state: State, tap: Tap) -> Tensor:
        x = self.scale_embedding(ops.embed(w, tokens))
        state.per_layer_inputs = self.per_layer_inputs(w, tokens, x)
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
        assert state.per_layer_inputs is not None
        told = self.own_embedding(w, blk, streams[..., self.active, :], state.per_layer_inputs[:, :, il], state)
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

    # -- what a layer is told, and its feed-forward ----------------------------------------------------

    def own_embedding(self, w: Weights, blk: str, x: Tensor, told: Tensor, state: State) -> Tensor:
        return super().own_embedding(w, blk, x * w.get(blk + "altup_correct_scale.weight"), told, state)

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
