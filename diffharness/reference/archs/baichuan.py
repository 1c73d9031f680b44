"""`baichuan`: Baichuan 1 and 2. The 7B is Llama; the 13B has ALiBi in place of rope.

Which of the two a file is, only its number of layers tells: 32 or 40. Other numbers are refused (the engine gives such
a model no positions at all). Baichuan 2 uses the rows of its output head at length one; a file has to hold them so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from diffharness.reference import ops
from diffharness.reference.archs.llama import Llama
from diffharness.reference.hparams import HyperParameters


@dataclass(frozen=True, kw_only=True)
class Baichuan(Llama):
    """Differs from Llama in where positions come from."""

    max_alibi_bias: float  # 0: rope

    alibi_by_layers: ClassVar[dict[int, float]] = {32: 0.0, 40: 8.0}

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        n_layer = hp.count("block_count")
        if n_layer not in cls.alibi_by_layers:
            hp.refuse("block_count", n_layer, "32 (7B, rope) or 40 (13B, ALiBi): it tells which of the two a model is")
        return super().read(hp) | {"max_alibi_bias": cls.alibi_by_layers[n_layer]}

    def rotary(self, il: int) -> ops.Rotary:
        rotary = super().rotary(il)
        return replace(rotary, n_rot=0) if self.max_alibi_bias else rotary

    def scores(self, il: int) -> ops.Scores:
        return replace(super().scores(il), max_alibi_bias=self.max_alibi_bias)


ARCHS = {"baichuan": Baichuan.from_metadata}
