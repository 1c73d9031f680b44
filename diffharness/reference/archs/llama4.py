"""`llama4`: Scout and Maverick, text. Three layers of four see only their own chunk; every fourth has no rotation.

The layers that see a chunk turn their heads and then normalise them without a weight (Maverick does not normalise).
The others see all earlier tokens, turn nothing, and multiply their queries by 1 + s ln(1 + floor((position + 1) / L)).
Every `interleave_moe_layer_step`-th layer has experts beside a shared one: an expert's weight is the sigmoid of the
router's logit, and it multiplies the expert's input, not its output.

The engine has chunk size and temperature in its code and no keys for them. Here they are read from
`attention.sliding_window` (8192), `attention.temperature_length` (8192) and `attention.temperature_scale` (0.1), where
a file has them. A window of 0 says that all layers see everything and turn (MobileLLM).
Images are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffharness.reference import moe, ops
from diffharness.reference.decoder import Decoder
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Tap, Weights
from diffharness.reference.windows import sliding_layers
from diffharness.weights.names.llama4 import HEAD_NORMS

_CHUNK = 8192
_TEMPERATURE = 0.1
_PERIOD = 4  # the last layer of each period sees all and turns nothing
_EXPERTS_WITHOUT_NORMS = 128  # by which Maverick is known


@dataclass(frozen=True, kw_only=True)
class Llama4(Decoder):
    """Hyperparameters; where a tuple, one value per layer."""

    chunk: tuple[int | None, ...]  # positions per chunk, None where a layer sees all
    turns: tuple[bool, ...]
    head_norms: bool
    temperature: float  # 0: none
    temperature_length: int
    moe_step: int  # every so-manieth layer has experts; 0: none has
    sliding_rope_base: float

    interleaved: ClassVar[bool] = True

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        fields = super().read(hp)
        n_layer = fields["n_layer"]
        chunked = not hp.has("attention.sliding_window") or hp.integer("attention.sliding_window") > 0
        size = hp.integer("attention.sliding_window", _CHUNK)
        step = hp.integer("interleave_moe_layer_step")
        if step < 0:
            hp.refuse("interleave_moe_layer_step", step, "0 or more")
        return fields | {
            "window": (None,) * n_layer,
            "chunk": tuple(size if chunked and sees else None for sees in sliding_layers(hp, n_layer, _PERIOD)),
            "turns": tuple(not chunked or (il + 1) % _PERIOD != 0 for il in range(n_layer)),
            "head_norms": bool(hp.metadata.get(HEAD_NORMS, fields["n_expert"] != _EXPERTS_WITHOUT_NORMS)),
            "temperature": hp.number("attention.temperature_scale", _TEMPERATURE) if chunked else 0.0,
            "temperature_length": hp.integer("attention.temperature_length", 0) or _CHUNK,
            "moe_step": step,
            "sliding_rope_base": hp.number("rope.freq_base_swa", fields["rope_base"]),
            "normalise_experts": hp.boolean("expert_weights_norm", False),
            "experts_scale": hp.number("expert_weights_scale", 0.0) or 1.0,
        }

    # -- numbers ---------------------------------------------------------------------------------------

    def layer_kind(self, il: int) -> str:
        return "global" if self.chunk[il] is None else "chunked"

    def rotary(self, il: int) -> ops.Rotary:
        base = self.rope_base if self.chunk[il] is None else self.sliding_rope_base
        return ops.Rotary(self.n_rot if self.turns[il] else 0, base, self.interleaved, self.rope_scaling)

    def scores(self, il: int) -> ops.Scores:
        return ops.Scores(self.attn_scale, chunk=self.chunk[il])

    def has_experts(self, il: int) -> bool:
        return self.n_expert > 0 and self.moe_step > 0 and (il + 1) % self.moe_step == 0

    # -- steps -----------------------------------------------------------------------------------------

    def prepare(self, w: Weights, il: int, name: str, heads: Tensor, cos: Tensor, sin: Tensor, tap: Tap) -> Tensor:
        if not self.turns[il]:
            return heads
        heads = self.turn(il, name, heads, cos, sin)
        tap(name + "_rope", ops.join_heads(heads))
        if self.head_norms:
            heads = self.norm(w, None, heads)
            tap(name + "_rope_norm", ops.join_heads(heads))
        return heads

    def attend(self, il: int, q: Tensor, k: Tensor, v: Tensor, state: State, sinks: Tensor | None = None) -> Tensor:
        if not self.turns[il] and self.temperature:
            steps = (state.positions + 1) // self.temperature_length
            factor = 1 + self.temperature * torch.log1p(steps.to(torch.float64))
            q = q * factor.to(q)[:, None, None]
        return super().attend(il, q, k, v, state, sinks)

    def route(self, logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # Chosen by the logits themselves: sigmoids of large ones are equal in float32.
        best, chosen = logits.sort(dim=-1, descending=True, stable=True)
        weights = best[..., : self.n_expert_used].sigmoid()
        if self.normalise_experts:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights * self.experts_scale, chosen[..., : self.n_expert_used]

    def experts(self, w: Weights, il: int, h: Tensor, state: State, tap: Tap) -> Tensor:
        blk = f"blk.{il}."
        logits = ops.project(w, blk + "ffn_gate_inp", h)
        tap("moe_logits", logits)
        weights, chosen = self.route(logits)
        out = torch.zeros_like(h)
        for rank in range(self.n_expert_used):
            weight, which = weights[..., rank : rank + 1], chosen[..., rank : rank + 1]
            as_it_is = torch.ones_like(weight)
            out = out + moe.mix(h * weight, as_it_is, which, lambda index, x: self.expert(w, blk, index, x, state))
        tap("moe_experts", out)
        return out + self.shared_expert(w, blk, h, state, tap)


ARCHS = {"llama4": Llama4.from_metadata}
