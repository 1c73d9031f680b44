"""`mamba`, `mamba2`: Mamba, Falcon Mamba, Mamba 2 and Codestral Mamba. No attention: every layer is one mixer.

Falcon Mamba RMS-normalises what dt, b and c are made of, without weights and with an epsilon of its own, 1e-6 whatever
the other norms have; the engine takes theirs. It is told by `ssm.dt_b_c_rms`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from diffharness.reference import mamba, ops
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Tap, Weights
from diffharness.reference.steps import Steps
from diffharness.weights.names._mamba import DEFAULT_PARTS_EPS, PARTS_EPS
from diffharness.weights.source import Metadata


@dataclass(frozen=True, kw_only=True)
class Mamba(Steps):
    """Norm, mixer, add."""

    n_layer: int
    n_embd: int
    eps: float
    sizes: mamba.MambaSizes
    parts_eps: float | None  # dt, b and c are normalised with it, if at all

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> Self:
        """From GGUF keys; ArtifactFileError names a key that is missing or senseless."""
        return cls(**cls.read(HyperParameters(metadata)))

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        normed = hp.boolean("ssm.dt_b_c_rms", False)
        return {
            "n_layer": hp.count("block_count"),
            "n_embd": hp.count("embedding_length"),
            "eps": hp.number("attention.layer_norm_rms_epsilon"),
            "sizes": mamba.MambaSizes.read(hp, heads=False),
            "parts_eps": float(hp.metadata.get(PARTS_EPS, DEFAULT_PARTS_EPS)) if normed else None,
        }

    def layer_kind(self, il: int) -> str:
        return "recurrent"

    def rotary(self, il: int) -> ops.Rotary:
        return ops.Rotary(0, 1.0, False)

    def scores(self, il: int) -> ops.Scores:
        return ops.Scores(1.0)

    def embed(self, w: Weights, tokens: Tensor, state: State, tap: Tap) -> Tensor:
        x = self.scale_embedding(ops.embed(w, tokens))
        tap("token_embd", x)
        return x

    def layer(self, w: Weights, il: int, x: Tensor, state: State, tap: Tap) -> Tensor:
        h = self.norm(w, f"blk.{il}.attn_norm.weight", x)
        tap("attn_norm", h)
        x = self.add(x, self.recurrence(w, il, h, tap))
        tap("layer_out", x)
        return x

    def head(self, w: Weights, x: Tensor, state: State, tap: Tap) -> Tensor:
        x = self.norm(w, "output_norm.weight", x)
        tap("output_norm", x)
        return ops.logits(w, x, tap)

    def recurrence(self, w: Weights, il: int, h: Tensor, tap: Tap) -> Tensor:
        """The mixer: [B, T, E] to [B, T, E]."""
        eps = self.parts_eps
        norm = None if eps is None else lambda _, x: ops.rms_norm(x, None, eps)
        return mamba.channel_mixer(w, f"blk.{il}.", h, self.sizes, tap, norm)


@dataclass(frozen=True, kw_only=True)
class Mamba2(Mamba):
    """Differs in the mixer."""

    @classmethod
    def read(cls, hp: HyperParameters) -> dict[str, Any]:
        return super().read(hp) | {"sizes": mamba.MambaSizes.read(hp, heads=True)}

    def recurrence(self, w: Weights, il: int, h: Tensor, tap: Tap) -> Tensor:
        return mamba.head_mixer(w, f"blk.{il}.", h, self.sizes, tap, eps=self.eps)


ARCHS = {"mamba": Mamba.from_metadata, "mamba2": Mamba2.from_metadata}
