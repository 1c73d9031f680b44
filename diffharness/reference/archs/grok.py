"""`grok`: xAI's Grok-1, and Grok-2 on texts of its temperature's length. Capped scores, sandwich norms, GELU experts.

The embedding, the scores and the logits are scaled by the model's own factors; scores are capped after the scaling and
before the mask. The routed experts' weights are a softmax over all experts and do not sum to one (xAI's `model.py`;
the engine makes them). Grok-2 adds a dense MLP in every layer, whose sum with the experts is divided by √2, and caps
the router's logits and the output's; both caps are the file's word. Not supported: the temperature of its scores, which
only positions beyond `attention.temperature_length` have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffharness.errors import ArtifactFileError, UnsupportedError
from diffharness.reference import ops
from diffharness.reference.decoder import Decoder
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Tap, Weights

# What files from before these keys mean: Grok-1's numbers.
_CAP = 30.0
_SCORE_SCALE = 0.08838834764831845
_EMBEDDING_SCALE = 78.38367176906169
_LOGIT_SCALE = 0.5773502691896257


@dataclass(frozen=True, kw_only=True)
class Grok(Decoder):
    """A `Decoder` with factors and caps."""

    attn_softcap: float
    router_softcap: float | None
    embedding_scale: float
    temperature_length: int  # 0: none

    activation: ClassVar[str] = "gelu"

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        fields = super().read(hp)
        if not fields["n_expert"]:
            raise ArtifactFileError(f"required metadata key `{hp.key('expert_count')}` is missing or zero")
        return fields | {
            "attn_scale": hp.number("attention.output_scale", _SCORE_SCALE),
            "attn_softcap": hp.number("attn_logit_softcapping", _CAP),
            "router_softcap": hp.number("router_logit_softcapping", 0.0) or None,
            "softcap": hp.number("final_logit_softcapping", 0.0) or None,
            "embedding_scale": hp.number("embedding_scale", _EMBEDDING_SCALE),
            "logit_scale": hp.number("logit_scale", _LOGIT_SCALE),
            "temperature_length": hp.integer("attention.temperature_length", 0),
            "normalise_experts": False,
            "experts_scale": hp.number("expert_weights_scale", 0.0) or 1.0,
        }

    def scores(self, il: int) -> ops.Scores:
        return ops.Scores(self.attn_scale, self.window[il], self.attn_softcap)

    def scale_embedding(self, x: Tensor) -> Tensor:
        return x * self.embedding_scale

    def attend(self, il: int, q: Tensor, k: Tensor, v: Tensor, state: State, sinks: Tensor | None = None) -> Tensor:
        if 0 < self.temperature_length < len(state.positions):
            raise UnsupportedError(
                f"scores of this model have a temperature beyond position {self.temperature_length}, which the "
                f"reference does not know; the text has {len(state.positions)} tokens",
                hint=f"take chunks of at most {self.temperature_length} tokens",
            )
        return super().attend(il, q, k, v, state, sinks)

    def after_attention(self, w: Weights, il: int, h: Tensor, tap: Tap) -> Tensor:
        h = self.norm(w, f"blk.{il}.attn_output_norm.weight", h)
        tap("attn_post_norm", h)
        return h

    def route(self, logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().route(ops.softcap(logits, self.router_softcap), bias)

    def feed_forward(self, w: Weights, il: int, h: Tensor, state: State, tap: Tap) -> Tensor:
        out = self.experts(w, il, h, state, tap)
        if w.has(f"blk.{il}.ffn_up.weight"):
            out = (self.mlp(w, il, h, state, tap) + out) * math.sqrt(0.5)
        tap("ffn_out", out)
        return out

    def after_ffn(self, w: Weights, il: int, h: Tensor, tap: Tap) -> Tensor:
        names = (f"blk.{il}.layer_output_norm.weight", f"blk.{il}.post_ffw_norm.weight")
        h = self.norm(w, next(name for name in names if w.has(name) or name == names[-1]), h)
        tap("ffn_post_norm", h)
        return h


ARCHS = {"grok": Grok.from_metadata}
