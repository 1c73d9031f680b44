"""Norms, RMSNorms and LayerNorms: offset and epsilon, norms left out or of another sort, weights exchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffharness.reference.hypotheses import _fit
from diffharness.reference.hypotheses._altering import Alteration, Replacement, Seen, altered, seeing
from diffharness.reference.hypotheses._scene import Hypothesis, Scene
from diffharness.reference.model import Tap, Weights
from diffharness.reference.steps import Steps
from diffharness.taps import split

EPSILONS = (1e-5, 1e-6, 1e-12, 1e-8, 1e-3, 1e-4, 0.0)

# What a tap shows is normalised by: the first of these that the model has.
WEIGHTS_OF: dict[str, tuple[str, ...]] = {
    "token_embd": ("token_embd_norm.weight",),
    "attn_norm": ("attn_norm.weight",),
    "attn_norm_2": ("attn_norm_2.weight",),
    "attn_q_a_norm": ("attn_q_a_norm.weight",),
    "attn_kv_a_norm": ("attn_kv_a_norm.weight",),
    "attn_q_norm": ("attn_q_norm.weight",),
    "attn_k_norm": ("attn_k_norm.weight",),
    "attn_q_rope_norm": ("attn_q_norm.weight",),
    "attn_k_rope_norm": ("attn_k_norm.weight",),
    "attn_sub_norm": ("attn_sub_norm.weight",),
    "ssm_norm": ("ssm_norm.weight",),
    "attn_post_norm": ("post_attention_norm.weight",),
    "ffn_norm": ("ffn_norm.weight", "ffn_norm", "post_attention_norm.weight", "attn_output_norm.weight"),
    "ffn_post_norm": ("post_ffw_norm.weight", "layer_output_norm.weight"),
    "output_norm": ("output_norm.weight", "token_embd_norm.weight"),
}
# What comes into a norm, where that is a tap of its own.
INPUT_OF = {
    "attn_q_norm": "attn_q",
    "attn_k_norm": "attn_k",
    "attn_q_rope_norm": "attn_q_rope",
    "attn_k_rope_norm": "attn_k_rope",
    "attn_post_norm": "attn_out",
    "ffn_norm": "ffn_in",
    "ffn_post_norm": "ffn_out",
}
# Behind these taps a norm works that has no tap of its own.
_UNSEEN = {"moe_logits", "moe_experts", "ffn_out", "attn_v_norm", "ssm_dt", "ssm_scan"}
NORMED = frozenset(WEIGHTS_OF) | _UNSEEN
# Heads as normalised, before they are turned and after.
HEADS_NORMED = frozenset({"attn_q_norm", "attn_k_norm"})
HEADS_NORMED_LAST = frozenset({"attn_q_rope_norm", "attn_k_rope_norm"})

Norm = Callable[[Tensor, "Tensor | None", float], Tensor]  # x, weight, epsilon
Change = Callable[[Tensor], Tensor]


def propose(scene: Scene) -> Iterator[Hypothesis]:
    """Every hypothesis on norms."""
    stem = _stem(scene, scene.tap)
    if (scene.place == "embed" and stem is None) or not scene.may_begin_at(NORMED):
        return
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
    taps = HEADS_NORMED | HEADS_NORMED_LAST
    if scene.in_layer and scene.has("attn_q_norm.weight") and scene.may_begin_at(taps):
        says = "queries and keys were not normalised"
        yield Hypothesis("norm.heads-skipped", says, taps, lambda model: altered(model, norm_heads=_not_normed))
        says = "queries and keys were normalised over all heads together"
        yield Hypothesis("norm.heads-together", says, taps, lambda model: altered(model, norm_heads=_together))


def _stem(scene: Scene, tap: str) -> str | None:
    """The weight that a tap's value is normalised by, without `blk.N.`."""
    prefix = f"blk.{scene.il}." if scene.in_layer else ""
    return next((stem for stem in WEIGHTS_OF.get(tap, ()) if scene.weights.has(prefix + stem)), None)


def _of(scene: Scene, what: str, where: Callable[[str | None], bool]) -> Iterator[Hypothesis]:
    def other(name: str, says: str, norm: Replacement) -> Hypothesis:
        return Hypothesis(f"norm.{name}", says, NORMED, _normed(norm, where))

    def formula(name: str, says: str, norm: Norm) -> Hypothesis:
        return other(name, says, lambda me, plain, w, name, x: norm(x, _weight(w, name), me.eps))

    def eps_of(value: float) -> Hypothesis:
        says = f"the epsilon of {what} were {value:.4g}"
        if what != "norms":
            return other("eps", says, _with_eps(value))
        # Mixers have norms that are no step of their own.
        return Hypothesis("norm.eps", says, NORMED, _having_eps(value))

    own = scene.model.eps
    if what == "norms":
        yield from _every_eps(scene)
    yield other("plus-one", f"1 were added to the weights of {what}", _with_weight(lambda v: v + 1))
    yield other("minus-one", f"1 were taken from the weights of {what}", _with_weight(lambda v: v - 1))
    for eps in EPSILONS:
        if eps != own:
            yield eps_of(eps)
    yield other("weight-absent", f"{what} had no weight", _with_weight(torch.ones_like))
    yield other("skipped", f"{what} were left out", lambda me, plain, w, name, x: x)
    if _takes_mean(scene):
        yield other("bias-absent", f"{what} had no bias", _with_bias(torch.zeros_like))
        yield other("mean-kept", f"{what} did not take the mean off", _uncentred)
    else:
        yield formula("eps-outside", f"the epsilon of {what} were added outside of the root", _outside)
        mean = "{} took the mean off first"
        yield formula("mean", mean.format(what), lambda x, w, e: _rms(x - x.mean(dim=-1, keepdim=True), w, e))
        yield formula("sum", f"{what} divided by the root of the sum, not of the mean, of squares", _by_sum)
    eps_fit = _eps(scene)
    if eps_fit is not None and eps_fit != own:
        yield replace(eps_of(eps_fit), fitted=1)


def _every_eps(scene: Scene) -> Iterator[Hypothesis]:
    """One epsilon for all norms, where the model has some with another of their own."""
    own = _own_epsilons(scene.model)
    fitted = _eps(scene)
    for eps in dict.fromkeys((scene.model.eps, *EPSILONS, *([] if fitted is None else [fitted]))):
        if any(eps != value for value in own.values()):
            says = f"the epsilon of all norms were {eps:.4g}, also of those with one of their own"
            yield Hypothesis("norm.every-eps", says, NORMED, _having_eps(eps, *own), int(eps == fitted))


def _own_epsilons(model: Steps) -> dict[str, float]:
    """Attributes beside `eps` that are an epsilon of some norm."""
    names = [name for name in dir(model) if name.endswith("_eps")]
    return {name: value for name in names if isinstance(value := getattr(model, name), float)}


def _having_eps(eps: float, *names: str) -> Alteration:
    """The model with another `eps`, and as much for the attributes `names`."""

    def alter(model: Steps) -> Steps:
        made = altered(model)
        vars(made).update(dict.fromkeys(("eps", *names), eps))
        return made

    return alter


def _takes_mean(scene: Scene) -> bool:
    """Whether the model's norms are LayerNorms, as one that is given a constant more shows."""
    stem = _stem(scene, scene.tap) or _stem(scene, "attn_norm") or "output_norm.weight"
    name = f"blk.{scene.il}.{stem}" if scene.in_layer else stem
    if not scene.weights.has(name):
        return False
    x = scene.weights.get(name).new_tensor([1.0, -1.0]).repeat(scene.weights.n_rows(name) // 2 + 1)
    x = x[: scene.weights.n_rows(name)]
    return torch.allclose(scene.model.norm(scene.weights, name, x), scene.model.norm(scene.weights, name, x + 3))


def _weight(w: Weights, name: str | None) -> Tensor | None:
    return None if name is None else w.find(name)


def _with_eps(eps: float) -> Replacement:
    """The model's own norm with another epsilon."""
    return lambda me, plain, w, name, x: plain.__func__(replace(me, eps=eps), w, name, x)


def _with_weight(change: Change) -> Replacement:
    """The model's own norm with its weight changed."""
    return lambda me, plain, w, name, x: plain(_changing(w, name, change), name, x)


def _with_bias(change: Change) -> Replacement:
    """The model's own norm with its bias changed."""

    def step(me: Steps, plain: Callable[..., Tensor], w: Weights, name: str | None, x: Tensor) -> Tensor:
        bias = None if name is None else name.removesuffix("weight") + "bias"
        return plain(_changing(w, bias, change), name, x)

    return step


def _changing(w: Weights, name: str | None, change: Change) -> Weights:
    return Seen(w, change=lambda n, value: change(value) if n == name else value)


def _uncentred(me: Steps, plain: Callable[..., Tensor], w: Weights, name: str | None, x: Tensor) -> Tensor:
    bias = None if name is None else w.find(name.removesuffix("weight") + "bias")
    y = _rms(x, _weight(w, name), me.eps)
    return y if bias is None else y + bias


def _rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def _outside(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x / (x.square().mean(dim=-1, keepdim=True).sqrt() + eps)
    return y if weight is None else y * weight


def _by_sum(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def _normed(norm: Replacement, where: Callable[[str | None], bool]) -> Alteration:
    def step(me: Steps, plain: Callable[..., Tensor], w: Weights, name: str | None, x: Tensor) -> Any:
        return norm(me, plain, w, name, x) if where(name) else plain(w, name, x)

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
    others = [stem for tap in WEIGHTS_OF for stem in [_stem(scene, tap)] if stem is not None]
    for other in dict.fromkeys(others):
        if other == stem or scene.weights.get(f"blk.{scene.il}.{other}").shape != own.shape:
            continue
        swap = {stem: other, other: stem}
        says = "{} and {} were exchanged".format(*sorted(swap))
        taps = frozenset(tap for tap in WEIGHTS_OF if _stem(scene, tap) in swap)
        yield Hypothesis("norm.exchanged", says, taps, seeing(rename=_swapping(swap)))


def _swapping(swap: dict[str, str]) -> Callable[[str], str | None]:
    def rename(name: str) -> str:
        layer, stem = split(name)
        return f"blk.{layer}.{swap[stem]}" if layer is not None and stem in swap else name

    return rename


def _eps(scene: Scene) -> float | None:
    """The epsilon by which the engine's values at the first failing tap are explained, the quietest tokens first."""
    stem = _stem(scene, scene.tap)
    ours, engine = scene.ours.get(scene.tap), scene.engine.get(scene.tap)
    source = scene.ours.get(INPUT_OF.get(scene.tap, "input"))
    if scene.place == "embed":
        source = scene.weights.rows("token_embd.weight", scene.tokens)
    if ours is None or engine is None or source is None or stem is None:
        return None
    heads = scene.heads.get(scene.tap.removesuffix("_norm").removesuffix("_rope"))
    name = f"blk.{scene.il}.{stem}" if scene.in_layer else stem
    if heads is not None and scene.weights.n_rows(name) == heads.shape[-1]:
        ours, engine, source = (x.reshape(heads.shape[1:]).flatten(0, 1) for x in (ours, engine, source))
    if ours.shape != source.shape:
        return None
    ours, engine, source = ours.double(), engine.double(), source.double()
    bias = scene.weights.find(name.removesuffix("weight") + "bias") if _takes_mean(scene) else None
    if bias is not None:
        ours, engine = ours - bias, engine - bias
    if _takes_mean(scene):
        source = source - source.mean(dim=-1, keepdim=True)
    square = source.square().mean(dim=-1)
    shrink = (engine * ours).sum(dim=-1) / ours.square().sum(dim=-1)
    eps = (square + scene.model.eps) / shrink.square() - square
    weight = 1 / square.square()  # small tokens tell most
    value = float((eps * weight).sum() / weight.sum())
    return _fit.nice(value, 1e-3) if value > 0 else None
