"""Attention and feed-forward of a layer: one after the other, or side by side on the same residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from diffharness.reference.decoder import Decoder, ParallelDecoder
from diffharness.reference.hypotheses._altering import altered
from diffharness.reference.hypotheses._scene import Hypothesis, Scene
from diffharness.reference.model import State, Tap, Weights

READS = frozenset({"ffn_in", "ffn_norm"})


def propose(scene: Scene) -> Iterator[Hypothesis]:
    """The other way, where the feed-forward has a norm of its own."""
    model = scene.model
    if not scene.in_layer or not isinstance(model, Decoder) or not scene.has(model.ffn_norm):
        return
    way = type(model).layer
    if way is ParallelDecoder.layer:
        says = "the feed-forward read what attention had been added to, and not the layer's input"
        yield Hypothesis("branches.in-line", says, READS, lambda model: altered(model, layer=_in_line))
    elif way is Decoder.layer:
        says = "the feed-forward read the layer's input, and not what attention had been added to"
        yield Hypothesis("branches.abreast", says, READS, lambda model: altered(model, layer=_abreast))


def _in_line(me: Any, plain: Any, w: Weights, il: int, x: Tensor, state: State, tap: Tap) -> Tensor:
    return Decoder.layer(me, w, il, x, state, tap)


def _abreast(me: Any, plain: Any, w: Weights, il: int, x: Tensor, state: State, tap: Tap) -> Tensor:
    h = me.mixer(w, il, me.before_attention(w, il, x, tap), state, tap)
    x_and_attention = me.add(x, me.after_attention(w, il, h, tap))
    h = me.feed_forward(w, il, me.before_ffn(w, il, x, tap), state, tap)
    out: Tensor = me.end_layer(w, il, me.add(x_and_attention, me.after_ffn(w, il, h, tap)), tap)
    return out
