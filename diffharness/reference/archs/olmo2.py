"""`olmo2`: OLMo 2 and 3. Nothing is normalised before a block, and all that it gives is.

Queries and keys are normalised over all heads at once. In OLMo 3 three layers slide for each one that sees everything;
what stretches the context (YaRN) stretches the layers that see everything only, and each kind has its rope base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.decoder import Decoder, PostNorms, WideNorms
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import Tap, Weights
from diffharness.reference.windows import sliding_layers

_PERIOD = 4  # in files with a window that do not list the layers


@dataclass(frozen=True, kw_only=True)
class Olmo2(WideNorms, PostNorms, Decoder):
    """A `Decoder` whose norms come after its blocks."""

    sliding_rope_base: float

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        fields = super().read(hp)
        window, n_layer = hp.integer("attention.sliding_window", 0), fields["n_layer"]
        slides = sliding_layers(hp, n_layer, _PERIOD) if window > 0 else (False,) * n_layer
        return fields | {
            "window": tuple(window if slide else None for slide in slides),
            "sliding_rope_base": hp.number("rope.freq_base_swa", fields["rope_base"]),
        }

    def rotary(self, il: int) -> ops.Rotary:
        if self.window[il] is None:
            return super().rotary(il)
        return ops.Rotary(self.n_rot, self.sliding_rope_base, self.interleaved)

    def before_attention(self, w: Weights, il: int, x: Tensor, tap: Tap) -> Tensor:
        return x

    def before_ffn(self, w: Weights, il: int, x: Tensor, tap: Tap) -> Tensor:
        return x


ARCHS = {"olmo2": Olmo2.from_metadata}
