"""What hypotheses are made from: the place of the first divergence, and both sides' values there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from diffharness.reference.hypotheses._altering import Alteration, Where, everywhere
from diffharness.reference.model import Weights
from diffharness.reference.steps import Steps
from diffharness.taps import AFTER_LAYERS, BEFORE_LAYERS, LAYER_TAPS
from diffharness.weights.source import Metadata

Place = int | Literal["embed", "head"]

_ORDER = {name: i for i, name in enumerate((*BEFORE_LAYERS, *LAYER_TAPS, *AFTER_LAYERS))}


@dataclass(frozen=True)
class Hypothesis:
    """One way in which a forward may differ from the model's definition."""

    name: str  # `theme.what`
    says: str  # completes "the engine behaves as if ..."
    taps: frozenset[str]  # where it can show first
    apply: Alteration
    fitted: int = 0  # 1: its number was fitted to the engine's values, not taken from a table; 2: many numbers were


@dataclass(frozen=True)
class Scene:
    """The first diverging place, with values of the first chunk that diverges.

    `ours` and `engine` hold the taps there, [tokens, width], ours on the engine's own input. Of a layer `heads` holds
    what is turned (`attn_q`, `attn_k`), and `qkv` what attention is made of, each [1, tokens, heads, head size].
    """

    model: Steps
    weights: Weights
    metadata: Metadata
    place: Place
    tap: str  # the first failing one, without `blk.N.`
    tokens: Tensor  # [tokens], of the chunk
    ours: Mapping[str, Tensor] = field(default_factory=dict)
    engine: Mapping[str, Tensor] = field(default_factory=dict)
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    qkv: tuple[Tensor, Tensor, Tensor] | None = None
    sinks: Tensor | None = None  # of its attention [heads]

    @property
    def il(self) -> int:
        """The diverging layer's number; 0 outside of the layers."""
        return self.place if isinstance(self.place, int) else 0

    @property
    def in_layer(self) -> bool:
        return isinstance(self.place, int)

    @property
    def positions(self) -> Tensor:
        return torch.arange(len(self.tokens), device=self.tokens.device)

    def has(self, stem: str) -> bool:
        """Whether the diverging layer has a tensor `blk.N.<stem>`."""
        return self.weights.has(f"blk.{self.il}.{stem}")

    def token(self, name: str) -> int | None:
        """A special token's id, such as `bos`."""
        value = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) and 0 <= value < self.weights.n_rows("token_embd.weight") else None

    def scopes(self) -> Iterator[tuple[str, Where]]:
        """Sets of layers that a fault of this layer may extend to, in words that follow a noun: the kind, or all."""
        kinds = {self.model.layer_kind(il) for il in range(self.model.n_layer)}
        if len(kinds) > 1 and self.in_layer:
            kind = self.model.layer_kind(self.il)
            yield f" of {kind} layers", lambda il: self.model.layer_kind(il) == kind
            yield " of all layers", everywhere
        else:
            yield "", everywhere

    def other_kind(self) -> int | None:
        """A layer of another kind than the diverging one, if the model has any."""
        kind = self.model.layer_kind(self.il)
        return next((il for il in range(self.model.n_layer) if self.model.layer_kind(il) != kind), None)

    def may_begin_at(self, taps: frozenset[str]) -> bool:
        """Whether a fault that begins at one of `taps` may be seen first at this scene's: there, or unseen before."""
        here = _ORDER.get(self.tap, len(_ORDER))
        unseen = self.ours.keys() - self.engine.keys()
        return any(tap == self.tap or (tap in unseen and _ORDER.get(tap, here) < here) for tap in taps)


Propose = Callable[[Scene], Iterator[Hypothesis]]
