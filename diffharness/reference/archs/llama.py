"""`llama`: Llama 1 to 3, SmolLM2, Mistral, Mixtral. RMSNorm before each branch, rotary pairs of neighbours.

RMSNorm, rotary attention with grouped KV heads, SiLU-gated feed-forward. GGUF keeps Q and K
permuted to interleaved rotary pairs, so rope here turns (2i, 2i + 1); Llama 3's frequency scaling is the tensor
`rope_freqs`. Mistral's sliding window is part of the model although the engine's llama graph has none: it is
applied where the metadata name it. Not supported: LongRoPE factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from diffharness.reference.decoder import Decoder
from diffharness.reference.hparams import HyperParameters


@dataclass(frozen=True, kw_only=True)
class Llama(Decoder):
    """A `Decoder` whose rotary pairs are neighbours."""

    interleaved: ClassVar[bool] = True

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        return super().read(hp) | {"normalise_experts": hp.boolean("expert_weights_norm", True)}


ARCHS = {"llama": Llama.from_metadata}
