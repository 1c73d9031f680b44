"""Norms: offset and epsilon, norms left out or of another sort, weights exchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffharness.reference.hypotheses import _fit
from diffharness.reference.hypotheses._altering import Alteration, altered, seeing
from diffharness.reference.hypotheses._scene import Hypothesis, Scene
from diffharness.reference.model import Tap, Weights
from diffharness.reference.steps import Steps
from diffharness.taps import split

EPSILONS = (1e-5, 1e-6, 1e-12, 1e-8, 1e-3, 1e-4, 0.0)

# What a tap shows is normalised by.
WEIGHT_OF = {
    "attn_norm": "attn_norm.weight",
    "attn_q_norm": "attn_q_norm.weight",
    "attn_k_norm": "attn_k_norm.weight",
    "attn_post_norm": "post_attention_norm.weight",
    "ffn_norm": "ffn_norm.weight",
    "ffn_post_norm": "post_ffw_norm.weight",
    "output_norm": "output_norm.weight",
}
# What comes into a norm, where that is a tap of its own.
INPUT_OF = {
    "attn_q_norm": "attn_q",
    "attn_k_norm": "attn_k",
    "attn_post_norm": "attn_out",
    "ffn_norm": "ffn_in",
    "ffn_post_norm": "ffn_out",
}
# Behind these taps a norm works that has no tap of its own.
_UNSEEN = {"moe_logits", "moe_experts", "ffn_out", "attn_v_norm"}
NORMED = frozenset(WEIGHT_OF) | _UNSEEN

Norm = Callable[[Tensor, "Tensor | None", float], Tensor]  # x, weight, epsilon


def propose(scene: Scene) -> Iterator[Hypothesis]:
    """Every hypothesis on norms."""
    if scene.place == "embed" or not scene.may_begin_at(NORMED):
        return
    stem = WEIGHT_OF.get(scene.tap)
    # A name for what all norms are, then one for this norm alone.
    scopes: list[tuple[str, Callable[[str | None], bool]]] = [("norms", lambda name: True)]
    if stem is not None:
        plural = "s" if scene.in_layer else ""
        scopes.append(
            (f"{stem.removesuffix('.weight')}{plural}", lambda name: name is not None and split(name)[1] == stem)
        )
    elif hasattr(scene.model, "norm_values"):
        scopes.append(("norms without a weight", lambda name: name is None))
    for what, where in scopes:
        yield from _of(scene, what, where)
    if stem is not None and scene.in_layer:
        yield from _exchanged(scene, stem)
    taps = frozenset({"attn_q_norm", "attn_k_norm"})
    if scene.in_layer and scene.has("attn_q_norm.weight") and scene.may_begin_at(taps):
        says = "queries and keys were not normalised"
        yield Hypothesis("norm.heads-skipped", says, taps, lambda model: altered(model, norm_heads=_not_normed))
        says = "queries and keys were normalised over all heads together"
        yield Hypothesis("norm.heads-together", says, taps, lambda model: altered(model, norm_heads=_together))


def _of(scene: Scene, what: str, where: Callable[[str | None], bool]) -> Iterator[Hypothesis]:
    def other(name: str, says: str, norm: Norm) -> Hypothesis:
        return Hypothesis(f"norm.{name}", says, NORMED, _normed(norm, where))

    own = scene.model.eps
    yield other(
        "plus-one", f"1 were added to the weights of {what}", lambda x, w, e: _rms(x, w if w is None else w + 1, e)
    )
    yield other(
        "minus-one", f"1 were taken from the weights of {what}", lambda x, w, e: _rms(x, w if w is None else w - 1, e)
    )
    for eps in EPSILONS:
        if eps != own:
            yield other("eps", f"the epsilon of {what} were {eps:g}", lambda x, w, e, eps=eps: _rms(x, w, eps))  # type: ignore[misc]
    yield other("eps-outside", f"the epsilon of {what} were added outside of the root", _outside)
    yield other("weight-absent", f"{what} had no weight", lambda x, w, e: _rms(x, None, e))
    yield other("skipped", f"{what} were left out", lambda x, w, e: x)
    yield other("mean", f"{what} took the mean off first", lambda x, w, e: _rms(x - x.mean(dim=-1, keepdim=True), w, e))
    yield other("sum", f"{what} divided by the root of the sum, not of the mean, of squares", _by_sum)
    eps_fit = _eps(scene)
    if eps_fit is not None and eps_fit != own:
        text = f"the epsilon of {what} were {eps_fit:.4g}"
        made = other("eps", text, lambda x, w, e: _rms(x, w, eps_fit))
        yield replace(made, fitted=1)


def _rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def _outside(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x / (x.square().mean(dim=-1, keepdim=True).sqrt() + eps)
    return y if weight is None else y * weight


def _by_sum(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def _normed(norm: Norm, where: Callable[[str | None], bool]) -> Alteration:
    def step(me: Steps, plain: Callable[..., Tensor], w: Weights, name: str | None, x: Tensor) -> Tensor:
        if not where(name):
            return plain(w, name, x)
        return norm(x, None if name is None else w.get(name), me.eps)

    return lambda model: altered(model, norm=step)


def _not_normed(me: Steps, plain: Any, w: Weights, il: int, name: str, heads: Tensor, tap: Tap) -> Tensor:
    return heads


def _together(me: Steps, plain: Any, w: Weights, il: int, name: str, heads: Tensor, tap: Tap) -> Tensor:
    weight = w.get(f"blk.{il}.{name}_norm.weight").repeat(heads.shape[-2])
    out = _rms(heads.flatten(-2), weight, me.eps)
    tap(name + "_norm", out)
    return out.reshape(heads.shape)


def _exchanged(scene: Scene, stem: str) -> Iterator[Hypothesis]:
    """The weight of another norm of the layer in this one's place, and this one's in the other's."""
    own = scene.weights.get(f"blk.{scene.il}.{stem}")
    for other in WEIGHT_OF.values():
        name = f"blk.{scene.il}.{other}"
        if other == stem or not scene.weights.has(name) or scene.weights.get(name).shape != own.shape:
            continue
        swap = {stem: other, other: stem}
        says = "{} and {} were exchanged".format(*sorted(swap))
        taps = frozenset(tap for tap, weight in WEIGHT_OF.items() if weight in swap)
        yield Hypothesis("norm.exchanged", says, taps, seeing(rename=_swapping(swap)))


def _swapping(swap: dict[str, str]) -> Callable[[str], str | None]:
    def rename(name: str) -> str:
        layer, stem = split(name)
        return f"blk.{layer}.{swap[stem]}" if layer is not None and stem in swap else name

    return rename


def _eps(scene: Scene) -> float | None:
    """The epsilon by which the engine's values at the first failing tap are explained, from the median token."""
    ours, engine = scene.ours.get(scene.tap), scene.engine.get(scene.tap)
    source = scene.ours.get(INPUT_OF.get(scene.tap, "input"))
    if ours is None or engine is None or source is None or scene.tap not in WEIGHT_OF:
        return None
    heads = scene.heads.get(scene.tap.removesuffix("_norm"))
    if heads is not None and scene.tap in ("attn_q_norm", "attn_k_norm"):
        shape = heads.shape[1:]
        ours, engine, source = (x.reshape(shape).flatten(0, 1) for x in (ours, engine, source))
    ours, engine, source = ours.double(), engine.double(), source.double()
    square = source.square().mean(dim=-1)
    shrink = (engine * ours).sum(dim=-1) / ours.square().sum(dim=-1)
    eps = (square + scene.model.eps) / shrink.square() - square
    weight = 1 / square.square()  # small tokens tell most
    value = float((eps * weight).sum() / weight.sum())
    return _fit.nice(value, 1e-3) if value > 0 else None
