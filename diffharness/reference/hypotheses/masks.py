"""Attention: which keys a query sees beside windows, and which KV head it reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.hypotheses._altering import Alteration, altered
from diffharness.reference.hypotheses._scene import Hypothesis, Scene
from diffharness.reference.hypotheses.attention import CONTEXT
from diffharness.reference.model import State
from diffharness.reference.ops import Scores
from diffharness.reference.steps import Steps


def propose(scene: Scene) -> Iterator[Hypothesis]:
    """Every hypothesis on masks and on groups of heads."""
    if not scene.in_layer or scene.qkv is None or not scene.may_begin_at(CONTEXT):
        return
    if {x.shape[1] for x in scene.qkv} == {len(scene.tokens)}:
        yield from _masks(scene)
        yield from _groups(scene)


def _masks(scene: Scene) -> Iterator[Hypothesis]:
    yield _masked(
        "mask-none", "queries saw the keys after them", lambda distance, s: torch.zeros_like(distance, dtype=torch.bool)
    )
    yield _masked(
        "mask-self",
        "queries did not see their own key",
        lambda distance, s: (distance < 0) | ((distance == 0) & _later(distance)),
    )
    yield _masked("mask-next", "queries saw one key after them", lambda distance, s: distance < -1)
    yield _masked("first-key", "the first token's key were not seen", _without_first)


def _later(distance: Tensor) -> Tensor:
    rows = torch.arange(len(distance), device=distance.device)
    return (rows > 0)[:, None]


def _without_first(distance: Tensor, scores: Scores) -> Tensor:
    hidden = distance < 0 if scores.window is None else (distance < 0) | (distance >= scores.window)
    hidden = hidden.clone()
    hidden[1:, 0] = True
    return hidden


def _masked(name: str, says: str, hidden: Callable[[Tensor, Scores], Tensor]) -> Hypothesis:
    def attend(
        me: Steps, plain: Callable[..., Tensor], il: int, q: Tensor, k: Tensor, v: Tensor, state: State, *sinks: Any
    ) -> Tensor:
        scores = me.scores(il)
        at = torch.arange(q.shape[1], device=q.device)
        return masked(q, k, v, scores, hidden(at[:, None] - at[None, :], scores), *sinks)

    return Hypothesis(f"attention.{name}", says, CONTEXT, lambda model: altered(model, attend=attend))


def masked(q: Tensor, k: Tensor, v: Tensor, scores: Scores, hidden: Tensor, sinks: Tensor | None = None) -> Tensor:
    """Attention of q [B, T, H, D] on k, v [B, S, Hkv, D], where `hidden` [T, S] says which keys are not seen."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    logits = ops.softcap(torch.einsum("bthd,bshd->bhts", q * scores.scale, k), scores.softcap)
    slopes = ops.alibi_slopes(q.shape[2], scores.max_alibi_bias)
    if slopes is not None:
        at = torch.arange(q.shape[1], device=q.device)
        logits = logits - slopes.to(logits)[:, None, None] * (at[:, None] - at)
    logits = logits.masked_fill(hidden, -math.inf)
    if sinks is not None:
        logits = torch.cat((logits, sinks.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)), dim=-1)
    weights = logits.softmax(dim=-1)[..., : k.shape[1]]
    return torch.einsum("bhts,bshd->bthd", weights, v).flatten(-2)


def _groups(scene: Scene) -> Iterator[Hypothesis]:
    assert scene.qkv is not None
    n_head, n_kv = scene.qkv[0].shape[2], scene.qkv[1].shape[2]
    if n_kv in (1, n_head):
        return
    says = f"query head h read KV head h mod {n_kv}, and not h // {n_head // n_kv}"
    yield Hypothesis("attention.groups", says, CONTEXT, _reading(lambda h: h % n_kv))
    yield Hypothesis(
        "attention.first-kv-head", "every query head read the first KV head", CONTEXT, _reading(lambda h: 0)
    )
    says = "KV heads were read in reverse order"
    yield Hypothesis("attention.kv-reversed", says, CONTEXT, _reading(lambda h: n_kv - 1 - h // (n_head // n_kv)))


def _reading(kv_head: Callable[[int], int]) -> Alteration:
    """Query head h reads KV head `kv_head(h)`."""

    def attend(
        me: Steps, plain: Callable[..., Tensor], il: int, q: Tensor, k: Tensor, v: Tensor, state: State, *sinks: Any
    ) -> Tensor:
        if k.shape[2] in (1, q.shape[2]):
            return plain(il, q, k, v, state, *sinks)
        which = torch.tensor([kv_head(h) % k.shape[2] for h in range(q.shape[2])], device=q.device)
        return plain(il, q, k[:, :, which], v[:, :, which], state, *sinks)

    return lambda model: altered(model, attend=attend)
