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


class _MainLayers(HyperParameters):
    """`block_count` is that of the forward, without layers that predict further tokens."""

    def count(self, name: str) -> int:
        n = super().count(name) - (self.integer("nextn_predict_layers", 0) if name == "block_count" else 0)
        if n <= 0:
            self.refuse(name, n, "a layer beside those that predict further tokens")
        return n


@dataclass(frozen=True, kw_only=True)
class Hybrid(HeadNorms, Decoder):
    """A `Decoder` with head norms, in which layers slide and turn, or are global and do not."""

    hybrid: bool  # False: no layer slides, and all turn

    slides_by_default: ClassVar[int] = 4  # of this many layers all but the last slide

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        hp = _MainLayers(hp.metadata)
        window, n_layer = hp.integer("attention.sliding_window", 0), hp.count("block_count")
        period = hp.metadata.get(hp.key("attention.sliding_window_pattern"), cls.slides_by_default)
        if isinstance(period, int) and not isinstance(period, bool):
            slides = tuple(period == 0 or il % period < period - 1 for il in range(n_layer))
        else:
            slides = hp.booleans("attention.sliding_window_pattern", n_layer)
        base = hp.number("rope.freq_base", 10000.0)
        if (sliding_base := hp.number("rope.freq_base_swa", base)) != base:
            hp.refuse("rope.freq_base_swa", sliding_base, f"the base of all layers, {base}")
        return super().read(hp) | {
            "window": tuple(window if window > 0 and slide else None for slide in slides),
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
