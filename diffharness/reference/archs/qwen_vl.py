"""`qwen2vl`, `qwen3vl`, `qwen3vlmoe`: Qwen 2, 2.5 and 3 VL, text. The forwards of Qwen 2, 3 and 3 MoE with M-RoPE.

Multimodal rotary embedding gives each pair of components one of a token's positions in time, height and width. In text
the three are the same number, so that it is the plain rotary embedding whatever `rope.dimension_sections` says; a
fourth section, of pairs that belong to none of them, no model has. Images are ignored, and with them
`n_deepstack_layers`, which adds their features after the first layers.

The engine differs in three ways, all seen in text: for `qwen2vl` it reads no epsilon and adds no `output.bias`, and for
the others it leaves the pairs unturned that fall in none of the interleaved sections (61 and 62 of 64 in Qwen 3 VL).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffharness.reference.archs.qwen2 import Qwen2
from diffharness.reference.archs.qwen3 import Qwen3
from diffharness.reference.archs.qwen3moe import Qwen3Moe
from diffharness.reference.decoder import Decoder
from diffharness.reference.hparams import HyperParameters


class TextPositions(Decoder):
    """A `Decoder` whose rotary sections must be stated, and do not matter for text."""

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        hp.integers("rope.dimension_sections", 4)
        hp.integer("n_deepstack_layers", 0)
        return super().read(hp)


@dataclass(frozen=True, kw_only=True)
class Qwen2Vl(TextPositions, Qwen2):
    """Qwen 2's forward."""


@dataclass(frozen=True, kw_only=True)
class Qwen3Vl(TextPositions, Qwen3):
    """Qwen 3's forward."""


@dataclass(frozen=True, kw_only=True)
class Qwen3VlMoe(TextPositions, Qwen3Moe):
    """Qwen 3 MoE's forward."""


ARCHS = {
    "qwen2vl": Qwen2Vl.from_metadata,
    "qwen3vl": Qwen3Vl.from_metadata,
    "qwen3vlmoe": Qwen3VlMoe.from_metadata,
}
