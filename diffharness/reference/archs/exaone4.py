"""`exaone4`: EXAONE 4.0 and 4.5, text. Norms only of heads and after each branch; some layers do not turn.

Nothing is normalised before attention and feed-forward. The larger models slide in three layers of four and give the
fourth no rotary embedding; the 1.2B has no window and turns everywhere. Frequencies may be scaled as Llama 3's. The
engine knows the window only in a model of 64 layers. Layers that predict further tokens (`nextn`) are not part of the
forward.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.decoder import Decoder, HeadNorms, PostNorms
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import Tap, Weights
from diffharness.reference.nextn import without_nextn
from diffharness.reference.windows import windows


@dataclass(frozen=True, kw_only=True)
class Hybrid(HeadNorms, Decoder):
    """A `Decoder` with head norms, in which layers slide and turn, or are global and do not."""

    hybrid: bool  # False: no layer slides, and all turn

    slides_by_default: ClassVar[int] = 4  # of this many layers all but the last slide

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        hp = without_nextn(hp)
        window, n_layer = hp.integer("attention.sliding_window", 0), hp.count("block_count")
        base = hp.number("rope.freq_base", 10000.0)
        if (sliding_base := hp.number("rope.freq_base_swa", base)) != base:
            hp.refuse("rope.freq_base_swa", sliding_base, f"the base of all layers, {base}")
        return super().read(hp) | {
            "window": windows(hp, n_layer, window, cls.slides_by_default),
            "hybrid": window > 0,
        }

    def rotary(self, il: int) -> ops.Rotary:
        rotary = super().rotary(il)
        return replace(rotary, n_rot=0) if self.hybrid and self.window[il] is None else rotary


@dataclass(frozen=True, kw_only=True)
class Exaone4(PostNorms, Hybrid):
    """A `Hybrid` with norms after its branches in place of those before them."""

    def before_attention(self, w: Weights, il: int, x: Tensor, tap: Tap) -> Tensor:
        return x

    def before_ffn(self, w: Weights, il: int, x: Tensor, tap: Tap) -> Tensor:
        return x


ARCHS = {"exaone4": Exaone4.from_metadata}
