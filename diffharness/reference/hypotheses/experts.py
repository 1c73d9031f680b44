"""Routed experts: how many, how they are chosen and weighed, and which is which."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffharness.reference import moe
from diffharness.reference.hypotheses import _fit
from diffharness.reference.hypotheses._altering import Alteration, altered, seeing
from diffharness.reference.hypotheses._scene import Hypothesis, Scene
from diffharness.reference.moe import SCORES
from diffharness.reference.steps import Steps

ROUTED = frozenset({"moe_experts"})
LOGITS = frozenset({"moe_logits"})


def _normalised(p: Tensor) -> Tensor:
    return p / p.sum(dim=-1, keepdim=True)


# What makes weights of the experts with the largest logits, likeliest first.
WEIGHINGS: dict[str, tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    # says: scores of all experts, weights of the chosen
    "not-normalised": ("experts were weighed by their softmax, not normalised", lambda x: x.softmax(-1), lambda p: p),
    "softmax-after": (
        "the softmax were taken after the choice of experts, so that their weights sum to one",
        lambda x: x.softmax(-1),
        _normalised,
    ),
    "sigmoid": ("the router's gate were a sigmoid", torch.sigmoid, lambda p: p),
    "sigmoid-normalised": ("the router's gate were a sigmoid, normalised", torch.sigmoid, _normalised),
    "uniform": ("all chosen experts weighed the same", torch.sigmoid, lambda p: torch.full_like(p, 1 / p.shape[-1])),
    "one-each": ("experts were added up without weights", torch.sigmoid, torch.ones_like),
    "twice": (
        "a second softmax were taken over the chosen experts' weights",
        lambda x: x.softmax(-1),
        lambda p: p.softmax(-1),
    ),
    "largest": ("experts' weights were divided by the largest", lambda x: x.softmax(-1), lambda p: p / p[..., :1]),
}


def propose(scene: Scene) -> Iterator[Hypothesis]:
    """Every hypothesis on routed experts."""
    n_used: int = getattr(scene.model, "n_expert_used", 0)
    router = f"blk.{scene.il}.ffn_gate_inp.weight"
    if not scene.in_layer or not n_used or not scene.weights.has(router):
        return
    n_expert = scene.weights.n_rows(router)
    for n in range(1, min(n_expert, 2 * n_used + 1) + 1):
        if n != n_used:
            says = f"{n} experts were used for a token, and not {n_used}"
            yield Hypothesis("experts.used", says, ROUTED, lambda model, n=n: replace(model, n_expert_used=n))  # type: ignore[misc]
    yield from _stated(scene)
    for name, (says, score, weigh) in WEIGHINGS.items():
        yield Hypothesis(f"experts.{name}", says, ROUTED, _routing(score, weigh, n_used))
    yield Hypothesis("experts.lowest", "the experts of lowest score were chosen", ROUTED, _lowest())
    for stem, says, taps in (
        ("ffn_gate_inp.scale", "the scale of the router's input were absent", LOGITS),
        ("ffn_down_exps.scale", "the experts' own scales were absent", ROUTED),
    ):
        if scene.has(stem):
            yield Hypothesis("experts.scale-absent", says, taps, seeing(change=_ones(stem)))
    for by, words in ((1, "one late"), (-1, "one early")):
        says = f"the chosen experts' numbers were {words}"
        yield Hypothesis("experts.number", says, ROUTED, _renumbered(lambda e, by=by: (e + by) % n_expert))  # type: ignore[misc]
    yield from _shared(scene)
    yield from _permuted(scene, n_expert)


def _stated(scene: Scene) -> Iterator[Hypothesis]:
    """What the model states of the choice and the weights of experts, otherwise."""
    stated: dict[str, tuple[object, str]] = {
        "normalise_experts": (False, "experts' weights were not normalised"),
        "experts_scale": (1.0, "the scale of experts' weights were absent"),
        "n_group": (1, "experts were chosen among all groups"),
        "router_softcap": (None, "the cap of the router's logits were absent"),
    }
    if getattr(scene.model, "normalise_experts", True) is False:
        stated["normalise_experts"] = True, "experts' weights were normalised"
    for field, (value, says) in stated.items():
        if getattr(scene.model, field, value) != value:
            yield Hypothesis(f"experts.{field}", says, ROUTED, _with(**{field: value}))
    if getattr(scene.model, "n_group", 1) > 1:
        for n_best, what in ((2, "the sum of their two best experts"), (1, "their best expert")):
            says = f"groups of experts were chosen by {what}"
            yield Hypothesis("experts.groups", says, ROUTED, partial(altered, route=_by_groups(n_best)))
    own = getattr(scene.model, "gating", None)
    for gating in SCORES if own else ():
        if gating != own:
            says = f"the router's gate were a {gating.replace('_', ' ')}, and no {str(own).replace('_', ' ')}"
            if gating == "softmax_of_chosen":
                says = WEIGHINGS["softmax-after"][0]
            yield Hypothesis("experts.gating", says, ROUTED, partial(_gated, gating=gating))
    ours, engine = scene.ours.get("moe_experts"), scene.engine.get("moe_experts")
    if scene.tap == "moe_experts" and ours is not None and engine is not None:
        scale = _fit.nice(_fit.ratio(engine, ours) * getattr(scene.model, "experts_scale", 1.0))
        if hasattr(scene.model, "experts_scale") and abs(scale / scene.model.experts_scale - 1) > 1e-4:
            says = f"the scale of experts' weights were {scale:.6g}"
            yield Hypothesis("experts.scale", says, ROUTED, _with(experts_scale=scale), 1)
    if scene.has("exp_probs_b.bias"):
        says = "the bias on the choice of experts were left out"
        yield Hypothesis("experts.bias-absent", says, ROUTED, seeing(change=_zeros("exp_probs_b.bias")))
        says = "the bias on the choice of experts were in their weights too"
        yield Hypothesis("experts.bias-weighs", says, ROUTED, lambda model: altered(model, route=_biased))


def _shared(scene: Scene) -> Iterator[Hypothesis]:
    """Shared experts, which every token goes to."""
    taps = frozenset({"ffn_shexp", "ffn_out"})
    if not scene.has("ffn_up_shexp.weight"):
        return
    says = "shared experts were left out"
    yield Hypothesis("experts.shared-absent", says, taps, seeing(change=_zeros("ffn_down_shexp.weight")))
    if scene.has("ffn_gate_inp_shexp.weight"):
        says = "the gate of the shared experts were left out"
        hide = seeing(rename=lambda name: None if name.endswith("ffn_gate_inp_shexp.weight") else name)
        yield Hypothesis("experts.shared-gate-absent", says, taps, hide)


def _with(**fields: object) -> Alteration:
    """The model with other hyperparameters."""
    return lambda model: replace(model, **fields)  # type: ignore[type-var]


def _gated(model: Steps, gating: moe.Gating) -> Steps:
    """Another gate, and groups chosen in the engine's one way: a model's own may depend on its gate."""
    other = _with(gating=gating)(model)
    return altered(other, route=_by_groups(2)) if getattr(model, "n_group", 1) > 1 else other


def _by_groups(n_best: int) -> Any:
    """The model's way with experts, its groups taken by the sum of the `n_best` highest scores in each."""

    def route(me: Steps, plain: Any, logits: Tensor, *bias: Any) -> tuple[Tensor, Tensor]:
        model: Any = me
        added = torch.zeros_like(logits) if not bias or bias[0] is None else bias[0].expand_as(logits)
        scores = SCORES[model.gating](logits) + added
        groups = scores.reshape(*scores.shape[:-1], model.n_group, -1)
        together = groups.topk(min(n_best, groups.shape[-1]), dim=-1).values.sum(dim=-1)
        taken = torch.zeros_like(together, dtype=torch.bool)
        taken = taken.scatter(-1, together.topk(model.n_group_used, dim=-1).indices, True)
        left = ~taken[..., None].expand_as(groups).flatten(-2)
        return moe.route(
            logits,
            model.n_expert_used,
            normalise=model.normalise_experts,
            gating=model.gating,
            bias=added.masked_fill(left, -math.inf),
            scale=model.experts_scale,
        )

    return route


def _biased(me: Steps, plain: Any, logits: Tensor, *bias: Any) -> tuple[Tensor, Tensor]:
    model: Any = me
    _, experts = plain(logits, *bias)
    scores = SCORES[model.gating](logits) + bias[0]
    chosen = scores.gather(-1, experts)
    return (_normalised(chosen) if model.normalise_experts else chosen) * model.experts_scale, experts


def _zeros(stem: str) -> Callable[[str, Tensor], Tensor]:
    return lambda name, value: torch.zeros_like(value) if name.endswith(stem) else value


def _routing(score: Callable[[Tensor], Tensor], weigh: Callable[[Tensor], Tensor], n_used: int) -> Any:
    def route(me: Steps, plain: Any, logits: Tensor, *bias: Any) -> tuple[Tensor, Tensor]:
        order = logits.sort(dim=-1, descending=True, stable=True).indices[..., :n_used]
        return weigh(score(logits).gather(-1, order)), order

    return lambda model: altered(model, route=route)


def _lowest() -> Any:
    def route(me: Steps, plain: Any, logits: Tensor, *bias: Any) -> tuple[Tensor, Tensor]:
        _, experts = plain(-logits)
        p = logits.softmax(-1).gather(-1, experts)
        return _normalised(p), experts

    return lambda model: altered(model, route=route)


def _renumbered(number: Callable[[Tensor], Tensor]) -> Any:
    def route(me: Steps, plain: Any, logits: Tensor, *bias: Any) -> tuple[Tensor, Tensor]:
        weights, experts = plain(logits, *bias)
        return weights, number(experts)

    return lambda model: altered(model, route=route)


def _ones(stem: str) -> Callable[[str, Tensor], Tensor]:
    return lambda name, value: torch.ones_like(value) if name.endswith(stem) else value


def _permuted(scene: Scene, n_expert: int) -> Iterator[Hypothesis]:
    """The router's rows in the order in which its logits match the engine's."""
    ours, engine = scene.ours.get("moe_logits"), scene.engine.get("moe_logits")
    if scene.tap != "moe_logits" or ours is None or engine is None:
        return
    distance = torch.cdist(engine.double().T, ours.double().T)  # [engine's expert, ours]
    order = distance.argmin(dim=1)
    if len(set(order.tolist())) != n_expert or torch.equal(order, torch.arange(n_expert, device=order.device)):
        return
    router = f"blk.{scene.il}.ffn_gate_inp.weight"
    listed = ", ".join(map(str, order.tolist()[:12])) + (", ..." if n_expert > 12 else "")
    says = f"the router's rows stood in another order than the experts ({listed})"
    permute = seeing(change=lambda name, value: value[order] if _is_router(name, router) else value)
    yield Hypothesis("experts.order", says, LOGITS, permute, 1)


def _is_router(name: str, like: str) -> bool:
    return name.endswith(like.partition(".")[2].partition(".")[2])
