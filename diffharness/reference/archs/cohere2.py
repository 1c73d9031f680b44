"""`cohere2`: Command R7B, Command A. Command R with a sliding window and no position in the other layers.

Three layers slide for each one that sees everything, and only those that slide turn their queries and keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from diffharness.reference import ops
from diffharness.reference.archs.command_r import CommandR
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.windows import sliding_layers


@dataclass(frozen=True, kw_only=True)
class Cohere2(CommandR):
    """Differs from `CommandR` in its windows and in where it turns."""

    global_first: ClassVar[bool] = False  # the layer of each period that sees everything is its first
    period: ClassVar[int] = 4

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        fields = super().read(hp)
        base = hp.number("rope.freq_base_swa", fields["rope_base"])
        if base != fields["rope_base"]:
            hp.refuse("rope.freq_base_swa", base, "the base that all layers have")
        window = hp.count("attention.sliding_window")
        slides = sliding_layers(hp, fields["n_layer"], cls.period, global_first=cls.global_first)
        return fields | {
            "window": tuple(window if s else None for s in slides),
            "logit_scale": hp.number("logit_scale"),
        }

    def rotary(self, il: int) -> ops.Rotary:
        rotary = super().rotary(il)
        return rotary if self.turns(il) else replace(rotary, n_rot=0)

    def turns(self, il: int) -> bool:
        """Whether layer `il` has a rotary embedding."""
        return self.window[il] is not None


ARCHS = {"cohere2": Cohere2.from_metadata}
