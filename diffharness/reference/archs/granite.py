"""`granite`, `granitemoe`: Granite 3 and 4 without recurrent layers. Llama with a scale at every joint.

The embedding is multiplied, what each branch gives is multiplied before it is added, scores have a scale of their own,
and logits are divided. Experts are weighed by the softmax over the chosen ones; an MLP that every token goes to may
stand beside them. In `granite` the key `rope.scaling.finetuned` is a switch of the rotary embedding: false is off.
Images are ignored, and with them `deepstack_mapping`, which adds their features to the input of some layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffharness.reference.decoder import Decoder
from diffharness.reference.hparams import HyperParameters


@dataclass(frozen=True, kw_only=True)
class Scaled(Decoder):
    """A `Decoder` whose embedding, branches and logits are scaled."""

    embedding_scale: float
    residual_scale: float

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        fields = super().read(hp)
        return fields | cls.read_scales(hp, fields)

    @classmethod
    def read_scales(cls, hp: HyperParameters, fields: dict[str, Any]) -> dict[str, Any]:
        """The fields `embedding_scale`, `residual_scale` and `logit_scale`; `fields` are all others."""
        return {
            "embedding_scale": hp.number("embedding_scale", 0.0) or 1.0,
            "residual_scale": hp.number("residual_scale", 0.0) or 1.0,
            "logit_scale": 1.0 / divisor_of_logits(hp),
        }

    def scale_embedding(self, x: Tensor) -> Tensor:
        return x * self.embedding_scale

    def add(self, x: Tensor, h: Tensor) -> Tensor:
        return x + h * self.residual_scale


@dataclass(frozen=True, kw_only=True)
class Granite(Scaled):
    """A `Scaled` decoder whose rotary embedding has a switch."""

    interleaved: ClassVar[bool] = True

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        fields = super().read(hp)
        return fields if hp.boolean("rope.scaling.finetuned", True) else fields | {"n_rot": 0}


@dataclass(frozen=True, kw_only=True)
class GraniteMoe(Scaled):
    """A `Scaled` decoder that always has its rotary embedding."""

    interleaved: ClassVar[bool] = True


def divisor_of_logits(hp: HyperParameters, default: float | None = None) -> float:
    """The key `logit_scale` of models that divide by it."""
    divisor = hp.number("logit_scale", default)
    if divisor == 0.0:
        hp.refuse("logit_scale", divisor, "what logits are divided by")
    return divisor


ARCHS = {"granite": Granite.from_metadata, "granitemoe": GraniteMoe.from_metadata}
