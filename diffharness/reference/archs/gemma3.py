"""`gemma3`: Gemma 3, text, 270M to 27B. Norms before and after both branches; five layers slide for each global one.

Gemma 1's scaled embedding and GeGLU; queries and keys are normalised per head. The two kinds of layers have a rope
base each, and what stretches the context (linear scaling) stretches the globals only. GGUF keeps norm weights with
their `1 +` added in, so they are plain factors here.

The scale of scores has no key that the engine's converter writes. It is 1/√head size, except in the 27B models,
which are told by their number of layers: there it is 1/√(width / heads). A key `attention.scale` goes before both.
Images and bidirectional attention are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.archs.gemma import Gemma
from diffharness.reference.decoder import HeadNorms, PostNorms
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import Weights
from diffharness.reference.windows import windows


@dataclass(frozen=True, kw_only=True)
class Gemma3(HeadNorms, PostNorms, Gemma):
    """A `Gemma` of two kinds of layers; `rope_base` and `rope_scaling` are the globals'."""

    sliding_rope_base: float
    sliding_rope_scaling: ops.RopeScaling = ops.NO_SCALING
    attn_softcap: float | None = None

    n_layer_27b: ClassVar[int] = 62  # the size whose scores are scaled otherwise
    slides_by_default: ClassVar[int] = 6  # of this many layers all but the last slide
    default_window: ClassVar[int] = 0  # where no key states one; 0 is none

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        fields = super().read(hp)
        n_layer = fields["n_layer"]
        window = hp.integer("attention.sliding_window", cls.default_window)
        if n_layer == cls.n_layer_27b and not hp.number("attention.scale", 0.0):
            fields["attn_scale"] = max(1, fields["n_embd"] // fields["n_head"][0]) ** -0.5
        return fields | {
            "window": windows(hp, n_layer, window, cls.slides_by_default),
            "sliding_rope_base": hp.number("rope.freq_base_swa", 10_000.0),
            "softcap": hp.number("final_logit_softcapping", 0.0) or None,
        }

    def rotary(self, il: int) -> ops.Rotary:
        rotary = super().rotary(il)
        if self.window[il] is None:
            return rotary
        return replace(rotary, base=self.sliding_rope_base, scaling=self.sliding_rope_scaling)

    def rope_factors(self, w: Weights, il: int) -> Tensor | None:
        return None

    def scores(self, il: int) -> ops.Scores:
        return replace(super().scores(il), softcap=self.attn_softcap)


ARCHS = {"gemma3": Gemma3.from_metadata}
