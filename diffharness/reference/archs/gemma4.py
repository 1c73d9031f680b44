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
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from diffharness.reference import moe, ops
from diffharness.reference.archs._gemma_e import GemmaE
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Tap, Weights


@dataclass(frozen=True, kw_only=True)
class Gemma4(GemmaE):
    """Differs from what it shares with Gemma 3n in its globals, its experts and the layers' scalars."""

    sliding_n_rot: int  # `n_rot` is the globals'

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        fields = super().read(hp)
        head_dim = fields["head_dim"]
        sliding_head_dim = hp.integer("attention.key_length_swa", head_dim)
        of_heads = {
            "rope.dimension_count": head_dim,
            "attention.value_length": head_dim,
            "attention.value_length_swa": sliding_head_dim,
        }
        for name, size in of_heads.items():
            if (found := hp.integer(name, size)) != size:
                hp.refuse(name, found, f"the size of a head, {size}")
        window = hp.count("attention.sliding_window")
        slides = hp.booleans("attention.sliding_window_pattern", fields["n_layer"])
        fields["window"] = tuple(window if sliding else None for sliding in slides)
        return fields | {
            "n_rot": head_dim,
            "sliding_n_rot": hp.integer("rope.dimension_count_swa", sliding_head_dim),
            "n_shared_kv": cls.read_shared(hp, fields["window"], 0),
            "n_embd_per_layer": hp.integer("embedding_length_per_layer_input", 0),
        }

    # -- numbers ---------------------------------------------------------------------------------------

    def rotary(self, il: int) -> ops.Rotary:
        rotary = super().rotary(il)
        return rotary if self.window[il] is None else replace(rotary, n_rot=self.sliding_n_rot)

    def rope_factors(self, w: Weights, il: int) -> Tensor | None:
        """On globals, `rope_freqs` divides the frequencies of standing pairs by 1e30."""
        return w.get("rope_freqs.weight") if self.window[il] is None else None

    # -- the forward -----------------------------------------------------------------------------------

    def embed(self, w: Weights, tokens: Tensor, state: State, tap: Tap) -> Tensor:
        x = super().embed(w, tokens, state, tap)
        if self.n_embd_per_layer:
            state.per_layer_inputs = self.per_layer_inputs(w, tokens, x)
        return x

    def layer(self, w: Weights, il: int, x: Tensor, state: State, tap: Tap) -> Tensor:
        blk, came_in = f"blk.{il}.", x
        h = self.mixer(w, il, self.before_attention(w, il, x, tap), state, tap)
        x = self.add(x, self.after_attention(w, il, h, tap))
        tap("ffn_in", x)
        h = self.mlp(w, il, self.before_ffn(w, il, x, tap), state, tap)
        if w.has(blk + "ffn_gate_inp.weight"):
            h = self.norm(w, blk + "post_ffw_norm_1.weight", h) + self.experts(w, il, x, state, tap)
        tap("ffn_out", h)
        x = self.add(x, self.after_ffn(w, il, h, tap))
        if state.per_layer_inputs is not None:
            x = self.add(x, self.own_embedding(w, blk, x, state.per_layer_inputs[:, :, il], state))
        return self.end_layer(w, il, self.scale_layer(w, il, x, came_in), tap)

    def scale_layer(self, w: Weights, il: int, x: Tensor, came_in: Tensor) -> Tensor:
        """The layer's scalar on the whole residual x; what came into the layer is only for comparison."""
        scale = w.find(f"blk.{il}.layer_output_scale.weight")
        return x if scale is None else x * scale

    # -- experts ---------------------------------------------------------------------------------------

    def experts(self, w: Weights, il: int, x: Tensor, state: State, tap: Tap) -> Tensor:
        """The routed experts' weighted sum. Router and experts see the residual x, each under a norm of its own."""
        blk = f"blk.{il}."
        h = self.norm(w, None, x) * w.get(blk + "ffn_gate_inp.scale") / math.sqrt(self.n_embd)
        logits = ops.linear(h, w.get(blk + "ffn_gate_inp.weight"))  # its .scale is of the input, above
        tap("moe_logits", logits)
        weights, chosen = self.route(logits)
        expert_scale = w.find(blk + "ffn_down_exps.scale")
        if expert_scale is not None:
            weights = weights * expert_scale[chosen]
        h = self.norm(w, blk + "pre_ffw_norm_2.weight", x)
        h = moe.mix(h, weights, chosen, lambda index, rows: self.expert(w, blk, index, rows, state))
        tap("moe_experts", h)
        return self.norm(w, blk + "post_ffw_norm_2.weight", h)

    def expert(self, w: Weights, blk: str, index: int, x: Tensor, state: State) -> Tensor:
        act = self.expert_act(w, blk, index, x, state)
        return ops.linear(act, moe.matrix(w, blk + "ffn_down_exps.weight", index))  # its .scale is in the weights


ARCHS = {"gemma4": Gemma4.from_metadata}
