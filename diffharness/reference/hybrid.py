"""`Hybrid`: a decoder some of whose layers carry a recurrent state in the place of attention.

An architecture's file says which layers those are and what they compute (`recurrence`).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from diffharness.errors import ArtifactFileError
from diffharness.reference.decoder import Decoder
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Tap, Weights
from diffharness.weights.source import Metadata


class HybridParameters(HyperParameters):
    """Hyperparameters of a model in which layers without attention have no heads or no KV heads (0)."""

    def heads(self, n_layer: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Heads and KV heads of every layer; a layer that has none is given those of the first that has some."""
        n_head = _filled(self.integers("attention.head_count", n_layer))
        n_head_kv = _filled(self.integers("attention.head_count_kv", n_layer, n_head[0]))
        for heads, kv in zip(n_head, n_head_kv, strict=True):
            if heads < 0 or kv < 0 or (kv and heads % kv):
                key = self.key("attention.head_count_kv")
                raise ArtifactFileError(f"metadata key `{key}`: expected a divisor of {heads} heads, found {kv}")
        return n_head, n_head_kv


def _filled(counts: tuple[int, ...]) -> tuple[int, ...]:
    usual = next((n for n in counts if n), 1)
    return tuple(n or usual for n in counts)


@dataclass(frozen=True, kw_only=True)
class Hybrid(Decoder):
    """A `Decoder` whose layers mix tokens by attention or by a recurrence."""

    recurrent: tuple[bool, ...]  # by layer

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> Self:
        return cls(**cls.read(HybridParameters(metadata)))

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        """As every decoder's; a layer without KV heads is recurrent."""
        out = super().read(hp)
        n_head_kv = hp.integers("attention.head_count_kv", out["n_layer"], 1)
        return out | {"recurrent": tuple(n == 0 for n in n_head_kv)}

    def layer_kind(self, il: int) -> str:
        return "recurrent" if self.recurrent[il] else super().layer_kind(il)

    def mixer(self, w: Weights, il: int, h: Tensor, state: State, tap: Tap) -> Tensor:
        return self.recurrence(w, il, h, tap) if self.recurrent[il] else self.attention(w, il, h, state, tap)

    @abstractmethod
    def recurrence(self, w: Weights, il: int, h: Tensor, tap: Tap) -> Tensor:
        """What a recurrent layer makes of its normed input: [B, T, E] to [B, T, E]."""
