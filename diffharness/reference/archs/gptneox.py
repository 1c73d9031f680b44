"""`gptneox`: GPT-NeoX, Pythia, Dolly 2. LayerNorms, attention and feed-forward side by side, partial rotation.

Each of the two branches has a norm of its own; where `use_parallel_residual` is false they follow each other instead.
The activation has no GGUF key: Pythia and the default of its config have GELU with erf, GPT-NeoX-20B the tanh form;
where the metadata are not of a checkpoint, erf is taken. The engine computes the tanh form for all, which is the
convention `gelu_erf_as_tanh`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.decoder import Decoder, LayerNorms, ParallelDecoder
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Tap, Weights
from diffharness.reference.steps import Steps
from diffharness.weights.names._gpt import ACTIVATION
from diffharness.weights.source import Metadata


class StatedGelu(Steps):
    """Which GELU the feed-forward has is said by the checkpoint's config; GGUF has no key for it."""

    gelu: str

    @property
    def uses_gelu(self) -> bool:
        return self.gelu in ops.BY_TABLE

    @property
    def uses_erf(self) -> bool:
        return self.gelu == "gelu_erf"

    def act(self, gate: Tensor, state: State) -> Tensor:
        return ops.ACTIVATIONS[self.gelu](gate, state.arithmetic)


def read_gelu(hp: HyperParameters) -> str:
    """The field `gelu`: with erf unless the metadata say otherwise."""
    return "gelu" if hp.metadata.get(ACTIVATION) == "gelu" else "gelu_erf"


@dataclass(frozen=True, kw_only=True)
class GptNeox(StatedGelu, LayerNorms, Decoder):
    """The branches one after the other."""

    gelu: str

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> GptNeox:
        """One of the two kinds, as `use_parallel_residual` says."""
        hp = HyperParameters(metadata)
        kind = ParallelGptNeox if hp.boolean("use_parallel_residual") else GptNeox
        return kind(**kind.read(hp))

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        return super().read(hp) | {"gelu": read_gelu(hp)}


@dataclass(frozen=True, kw_only=True)
class ParallelGptNeox(GptNeox, ParallelDecoder):
    """The branches side by side."""

    def beside(self, w: Weights, il: int, x: Tensor, h: Tensor, tap: Tap) -> Tensor:
        return self.before_ffn(w, il, x, tap)


ARCHS = {"gptneox": GptNeox.from_metadata}
