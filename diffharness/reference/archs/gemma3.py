"""`gemma3`: Gemma 3, text, 270M to 27B. Norms before and after both branches; five layers slide for each global one.

Norm, attention, norm, add; norm, GeGLU, norm, add. The two
kinds of layers have a rope base each, and what stretches the context (linear scaling) stretches the globals only.
Queries and keys are normalised per head. GGUF keeps norm weights with their `1 +` added in, so they are plain factors
here. Gemma 2 is the same without the norms of queries and keys and with capped scores; see `gemma2.py`.

The scale of scores has no key that the engine's converter writes. It is 1/√head size, except in the 27B models,
which are told by their number of layers: there it is 1/√(width / heads). A key `attention.scale` goes before both.
Images and bidirectional attention are ignored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Self, TypedDict

from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.hparams import HyperParameters
from diffharness.reference.model import State, Tap, Weights
from diffharness.reference.steps import Steps
from diffharness.reference.windows import windows
from diffharness.weights.source import Metadata


class _Common(TypedDict):
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    eps: float
    n_rot: int
    global_rope_base: float
    global_rope_scaling: ops.RopeScaling
    attn_scale: float


@dataclass(frozen=True)
class Gemma3(Steps):
    """Hyperparameters, and the forward that they parametrise."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    eps: float
    window: tuple[int | None, ...]  # by layer: keys in sight, None for all
    n_rot: int
    global_rope_base: float
    global_rope_scaling: ops.RopeScaling
    sliding_rope_base: float
    sliding_rope_scaling: ops.RopeScaling
    attn_scale: float
    attn_softcap: float | None
    softcap: float | None

    activation: ClassVar[str] = "gelu"
    n_layer_27b: ClassVar[int] = 62  # the size whose scores are scaled otherwise
    slides_by_default: ClassVar[int] = 6  # of this many layers all but the last slide

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> Self:
        """From GGUF keys; raises ArtifactFileError where one is missing or makes no sense."""
        hp = HyperParameters(metadata)
        return cls(
            **cls._common(hp),
            window=cls._windows(hp, 0),
            sliding_rope_base=hp.number("rope.freq_base_swa", 10_000.0),
            sliding_rope_scaling=ops.NO_SCALING,
            attn_softcap=None,
            softcap=hp.number("final_logit_softcapping", 0.0) or None,
        )

    def layer_kind(self, il: int) -> str:
        return "global" if self.window[il] is None else "sliding"

    def rotary(self, il: int) -> ops.Rotary:
        if self.window[il] is not None:
            return ops.Rotary(self.n_rot, self.sliding_rope_base, False, self.sliding_rope_scaling)
        return ops.Rotary(self.n_rot, self.global_rope_base, False, self.global_rope_scaling)

    def scores(self, il: int) -> ops.Scores:
        return ops.Scores(self.attn_scale, self.window[il], self.attn_softcap)

    def scale_embedding(self, x: Tensor) -> Tensor:
        return x * math.sqrt(self.n_embd)

    def embed(self, w: Weights, tokens: Tensor, state: State, tap: Tap) -> Tensor:
        x = self.scale_embedding(ops.embed(w, tokens))
        tap("token_embd", x)
        return x

    def layer(self, w: Weights, il: int, x: Tensor, state: State, tap: Tap) -> Tensor:
        blk = f"blk.{il}."
        h = self.norm(w, blk + "attn_norm.weight", x)
        tap("attn_norm", h)
        h = self._attention(w, il, h, state, tap)
        h = self.norm(w, blk + "post_attention_norm.weight", h)
        tap("attn_post_norm", h)
        x = self.add(x, h)
        tap("ffn_in", x)

        h = self.norm(w, blk + "ffn_norm.weight", x)
        tap("ffn_norm", h)
        gate = ops.project(w, blk + "ffn_gate", h)
        tap("ffn_gate", gate)
        up = ops.project(w, blk + "ffn_up", h)
        tap("ffn_up", up)
        h = self.gated(gate, up, state)
        tap("ffn_act", h)
        h = ops.project(w, blk + "ffn_down", h)
        tap("ffn_out", h)
        h = self.norm(w, blk + "post_ffw_norm.weight", h)
        tap("ffn_post_norm", h)
        x = self.add(x, h)
        tap("layer_out", x)
        return x

    def head(self, w: Weights, x: Tensor, state: State, tap: Tap) -> Tensor:
        x = self.norm(w, "output_norm.weight", x)
        tap("output_norm", x)
        return ops.logits(w, x, tap, cap=self.softcap)

    # -- attention -----------------------------------------------------------------------------------

    def _attention(self, w: Weights, il: int, x: Tensor, state: State, tap: Tap) -> Tensor:
        blk = f"blk.{il}."
        heads = {}
        for name, n_head in (("attn_q", self.n_head), ("attn_k", self.n_head_kv), ("attn_v", self.n_head_kv)):
            y = ops.project(w, blk + name, x)
            tap(name, y)
            heads[name] = ops.split_heads(y, n_head)
        cos, sin = self.tables(w, il, x, state)
        q, k = (self.prepare(w, il, name, heads[name], cos, sin, tap) for name in ("attn_q", "attn_k"))
        h = self.attend(il, q, k, heads["attn_v"], state)
        tap("attn_ctx", h)
        h = ops.project(w, blk + "attn_output", h)
        tap("attn_out", h)
        return h

    def norm_heads(self, w: Weights, il: int, name: str, heads: Tensor, tap: Tap) -> Tensor:
        heads = self.norm(w, f"blk.{il}.{name}_norm.weight", heads)
        tap(name + "_norm", ops.join_heads(heads))
        return heads

    # -- reading metadata ----------------------------------------------------------------------------

    @classmethod
    def _windows(cls, hp: HyperParameters, default: int) -> tuple[int | None, ...]:
        """By layer; `default` is the window where the file states none, 0 for no window."""
        window = hp.integer("attention.sliding_window", default)
        return windows(hp, hp.count("block_count"), window, cls.slides_by_default)

    @classmethod
    def _common(cls, hp: HyperParameters) -> _Common:
        """What Gemma 2 reads in the same way."""
        n_layer, n_embd, n_head = (
            hp.count("block_count"),
            hp.count("embedding_length"),
            hp.count("attention.head_count"),
        )
        head_dim = hp.count("attention.key_length") if hp.has("attention.key_length") else max(1, n_embd // n_head)
        default_scale = (max(1, n_embd // n_head) if n_layer == cls.n_layer_27b else head_dim) ** -0.5
        return _Common(
            n_layer=n_layer,
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=hp.integer("attention.head_count_kv", n_head),
            eps=hp.number("attention.layer_norm_rms_epsilon"),
            n_rot=hp.integer("rope.dimension_count", head_dim),
            global_rope_base=hp.number("rope.freq_base", 10_000.0),
            global_rope_scaling=hp.rope_scaling(),
            attn_scale=hp.number("attention.scale", default_scale),
        )


ARCHS = {"gemma3": Gemma3.from_metadata}
