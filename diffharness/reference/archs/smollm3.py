"""`smollm3`: SmolLM3. Llama's forward in which every fourth layer does not turn queries and keys.

Which layers do not has no GGUF key: it is every fourth, unless the metadata come from a checkpoint that says
otherwise (`diffharness.rope_layers`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from diffharness.errors import ArtifactFileError
from diffharness.reference import ops
from diffharness.reference.archs.llama import Llama
from diffharness.reference.hparams import HyperParameters
from diffharness.weights.names.smollm3 import ROPE_LAYERS


@dataclass(frozen=True, kw_only=True)
class SmolLM3(Llama):
    """Differs from Llama in layers without a rotary embedding."""

    turns: tuple[bool, ...]  # by layer: queries and keys are turned by their position

    period: ClassVar[int] = 4  # the last layer of each is without

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        fields = super().read(hp)
        n_layer = fields["n_layer"]
        stated = hp.metadata.get(ROPE_LAYERS, [(il + 1) % cls.period != 0 for il in range(n_layer)])
        if not isinstance(stated, (list, tuple)) or len(stated) != n_layer:
            raise ArtifactFileError(f"metadata key `{ROPE_LAYERS}`: expected one truth value per layer ({n_layer})")
        return fields | {"turns": tuple(bool(turns) for turns in stated)}

    def rotary(self, il: int) -> ops.Rotary:
        rotary = super().rotary(il)
        return rotary if self.turns[il] else replace(rotary, n_rot=0)


ARCHS = {"smollm3": SmolLM3.from_metadata}
