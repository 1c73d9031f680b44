"""`granite_swa`: Granite Swash, dense or with experts. Granite with windows, sinks, and layers without position.

Each head has a sink: a score that takes its share of attention and has no value. `attention.rope_pattern` says which
layers turn their queries and keys. Gate and up of the experts come as one tensor, and those of the shared MLP as well.
Images are ignored, and with them `deepstack_mapping`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.archs.granite import Scaled
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Tap, Weights


@dataclass(frozen=True, kw_only=True)
class GraniteSwa(Scaled):
    """A `Scaled` decoder with windows, sinks and a choice of layers that turn."""

    turns: tuple[bool, ...]  # by layer

    interleaved: ClassVar[bool] = True

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        fields = super().read(hp)
        n_layer, window = fields["n_layer"], hp.count("attention.sliding_window")
        slides = hp.booleans("attention.sliding_window_pattern", n_layer)
        return fields | {
            "window": tuple(window if slide else None for slide in slides),
            "turns": hp.booleans("attention.rope_pattern", n_layer, True),
        }

    def rotary(self, il: int) -> ops.Rotary:
        rotary = super().rotary(il)
        return rotary if self.turns[il] else replace(rotary, n_rot=0)

    def sinks(self, w: Weights, il: int) -> Tensor | None:
        return w.get(f"blk.{il}.attn_sinks.weight")

    def shared_expert(self, w: Weights, blk: str, h: Tensor, state: State, tap: Tap) -> Tensor:
        act = self.gated_halves(ops.project(w, blk + "ffn_up_shexp", h), state)
        out = ops.project(w, blk + "ffn_down_shexp", act)
        tap("ffn_shexp", out)
        return out


ARCHS = {"granite_swa": GraniteSwa.from_metadata}
