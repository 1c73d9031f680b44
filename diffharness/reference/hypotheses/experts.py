"""Routed experts: how many, how they are chosen and weighed, and which is which."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffharness.reference.hypotheses._altering import altered, seeing
from diffharness.reference.hypotheses._scene import Hypothesis, Scene
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
    yield from _permuted(scene, n_expert)


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
