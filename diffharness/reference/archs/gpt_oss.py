"""`gpt-oss`: OpenAI's 20B and 120B. Attention sinks, every second layer slides, experts with a clamped SwiGLU.

Each head has a sink: one more score in its softmax, without a value. Every projection has a bias, the router and each
expert too; the norm before the experts is the file's `post_attention_norm`. Experts are chosen by the router's logits,
and the softmax is taken over the chosen ones. The clamped SwiGLU has constants that no key states (`_ALPHA`, `_LIMIT`).

YaRN in these models mixes between fractions of a dimension (`truncate` is false in every published config). GGUF has
no key for that, and the engine rounds to whole dimensions; a checkpoint that says true is known by a key of our own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.decoder import Decoder
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Weights
from diffharness.reference.windows import windows
from diffharness.weights.names.gpt_oss import TRUNCATE

_ALPHA = 1.702  # the gain of the sigmoid
_LIMIT = 7.0  # of the gate from above, of what it gates from both sides
_PERIOD = 2  # the last layer of each period sees all


@dataclass(frozen=True, kw_only=True)
class GptOss(Decoder):
    """A `Decoder` with sinks, biases and experts of its own kind."""

    ffn_norm: ClassVar[str] = "post_attention_norm.weight"

    sliding_rope_base: float

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        fields = super().read(hp)
        scaling = replace(fields["rope_scaling"], truncate=bool(hp.metadata.get(TRUNCATE, False)))
        return fields | {
            "rope_scaling": scaling,
            "sliding_rope_base": hp.number("rope.freq_base_swa", fields["rope_base"]),
            "window": windows(hp, fields["n_layer"], hp.count("attention.sliding_window"), _PERIOD),
            "gating": "softmax_of_chosen",
            "normalise_experts": False,
            "experts_scale": hp.number("expert_weights_scale", 0.0) or 1.0,
        }

    def rotary(self, il: int) -> ops.Rotary:
        base = self.rope_base if self.window[il] is None else self.sliding_rope_base
        return ops.Rotary(self.n_rot, base, self.interleaved, self.rope_scaling)

    def rope_factors(self, w: Weights, il: int) -> Tensor | None:
        return None

    def sinks(self, w: Weights, il: int) -> Tensor | None:
        return w.get(f"blk.{il}.attn_sinks.weight")

    def gated_expert(self, gate: Tensor, up: Tensor, state: State) -> Tensor:
        gate, up = gate.clamp(max=_LIMIT), up.clamp(-_LIMIT, _LIMIT)
        return gate * (_ALPHA * gate).sigmoid() * (up + 1)


ARCHS = {"gpt-oss": GptOss.from_metadata}
