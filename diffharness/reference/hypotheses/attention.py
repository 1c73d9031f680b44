"""Attention: how scores are scaled and capped, which keys a query sees, which KV head it reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.hypotheses import _fit
from diffharness.reference.hypotheses._altering import Alteration, altered, with_scores
from diffharness.reference.hypotheses._scene import Hypothesis, Scene
from diffharness.reference.model import State
from diffharness.reference.ops import Scores
from diffharness.reference.steps import Steps

CONTEXT = frozenset({"attn_ctx"})
_FIT_TOKENS = 128  # of the diverging chunk; more make a fit no better
_SHARE = 0.5  # of the error that a fitted number must take away to be worth a trial


def propose(scene: Scene) -> Iterator[Hypothesis]:
    """Every hypothesis on attention itself."""
    if not scene.in_layer or scene.qkv is None or not scene.may_begin_at(CONTEXT):
        return
    if {x.shape[1] for x in scene.qkv} != {len(scene.tokens)}:
        return  # an unseen token before the others is supposed already
    yield from _scales(scene)
    yield from _caps(scene)
    yield from _windows(scene)
    yield from _masks(scene)
    yield from _groups(scene)
    yield from _fitted(scene)


def _scored(
    name: str, says: str, change: Callable[[Scores], Scores], scene: Scene, fitted: int = 0
) -> Iterator[Hypothesis]:
    for scope, where in scene.scopes():
        yield Hypothesis(f"attention.{name}", says.format(scope=scope), CONTEXT, with_scores(change, where), fitted)


def _scales(scene: Scene) -> Iterator[Hypothesis]:
    assert scene.qkv is not None
    own = scene.model.scores(scene.il).scale
    n_head, size = scene.qkv[0].shape[2:]
    n_rot, n_embd = scene.model.rotary(scene.il).n_rot, scene.model.n_embd
    scales = {
        1.0: "1",
        size**-0.5: f"1/sqrt({size}), of the head size",
        (n_embd // n_head) ** -0.5: f"1/sqrt({n_embd // n_head}), of width / heads",
        n_rot**-0.5: f"1/sqrt({n_rot}), of what turns of a head",
        n_embd**-0.5: f"1/sqrt({n_embd}), of the width",
        1 / size: f"1/{size}, of the head size",
        own * own: f"{own * own:.6g}, applied twice",
    }
    tried = [own]
    for scale, words in scales.items():
        if not any(math.isclose(scale, other) for other in tried):
            tried.append(scale)
            says = f"attention scores{{scope}} were scaled by {words}"
            yield from _scored("scale", says, lambda s, x=scale: replace(s, scale=x), scene)  # type: ignore[misc]


def _caps(scene: Scene) -> Iterator[Hypothesis]:
    own = scene.model.scores(scene.il).softcap
    if own is not None:
        says = "attn_logit_softcapping{scope} were absent"
        yield from _scored("softcap-absent", says, lambda s: replace(s, softcap=None), scene)
        yield from _scored(
            "softcap-doubled", f"attn_logit_softcapping{{scope}} were {2 * own:g}, twice the model's",
            lambda s: replace(s, softcap=2 * own), scene,
        )  # fmt: skip
        yield from _scored(
            "softcap-halved", f"attn_logit_softcapping{{scope}} were {own / 2:g}, half the model's",
            lambda s: replace(s, softcap=own / 2), scene,
        )  # fmt: skip
    for cap in (50.0, 30.0):
        if cap != own:
            says = f"attn_logit_softcapping{{scope}} were {cap:g}"
            yield from _scored("softcap", says, lambda s, c=cap: replace(s, softcap=c), scene)  # type: ignore[misc]


def _windows(scene: Scene) -> Iterator[Hypothesis]:
    own, n_tokens = scene.model.scores(scene.il).window, len(scene.tokens)
    if own is not None:
        says = "the sliding window{scope} were absent"
        yield from _scored("window-absent", says, lambda s: replace(s, window=None), scene)
        for by, words in ((-1, "one less"), (1, "one more")):
            says = f"the sliding window{{scope}} were {own + by}, {words} than the model's"
            yield from _scored("window-off-by-one", says, _moved_window(by), scene)
    other = scene.other_kind()
    if other is not None and scene.model.scores(other).window != own:
        kind, theirs = scene.model.layer_kind(scene.il), scene.model.scores(other).window
        says = (
            f"the sliding window were on {kind} layers too" if own is None else f"{kind} layers saw every earlier token"
        )
        where = next(iter(scene.scopes()))[1]
        other_window = with_scores(lambda s: replace(s, window=theirs), where)
        yield Hypothesis("attention.window-elsewhere", says, CONTEXT, other_window)
        yield Hypothesis(
            "attention.window-exchanged",
            "the sliding window were on the other layers",
            CONTEXT,
            lambda model: altered(model, scores=lambda me, plain, il: replace(plain(il), window=_other(model, il))),
        )
    seen = _seen(scene)
    if seen is not None and seen != own and seen < n_tokens:
        yield from _scored(
            "window", f"the sliding window{{scope}} were {seen}", lambda s: replace(s, window=seen), scene, 1
        )


def _moved_window(by: int) -> Callable[[Scores], Scores]:
    return lambda s: replace(s, window=None if s.window is None else s.window + by)


def _other(model: Steps, il: int) -> int | None:
    """The window of the nearest layer of another kind."""
    kind = model.layer_kind(il)
    other = next((jl for jl in range(model.n_layer) if model.layer_kind(jl) != kind), il)
    return model.scores(other).window


def _seen(scene: Scene) -> int | None:
    """How many of the latest keys make the engine's context of the last token."""
    assert scene.qkv is not None
    q, k, v = (x[0].double() for x in scene.qkv)
    engine = scene.engine.get("attn_ctx")
    if engine is None or k.shape[0] != q.shape[0]:
        return None
    scores, group = scene.model.scores(scene.il), q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(group, dim=1).flip(0), v.repeat_interleave(group, dim=1).flip(0)
    logits = ops.softcap(torch.einsum("hd,thd->th", q[-1] * scores.scale, keys), scores.softcap)
    weights = (logits - logits.max(dim=0).values).exp()
    contexts = (weights[..., None] * values).cumsum(0) / weights.cumsum(0)[..., None]  # [windows, H, D]
    error = (contexts.flatten(1) - engine[-1].double()).square().sum(dim=1)
    return int(error.argmin()) + 1


# -- masks and heads ----------------------------------------------------------------------------------


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
        return masked(q, k, v, scores, hidden(at[:, None] - at[None, :], scores))

    return Hypothesis(f"attention.{name}", says, CONTEXT, lambda model: altered(model, attend=attend))


def masked(q: Tensor, k: Tensor, v: Tensor, scores: Scores, hidden: Tensor) -> Tensor:
    """Attention of q [B, T, H, D] on k, v [B, S, Hkv, D], where `hidden` [T, S] says which keys are not seen."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    logits = ops.softcap(torch.einsum("bthd,bshd->bhts", q * scores.scale, k), scores.softcap)
    weights = logits.masked_fill(hidden, -math.inf).softmax(dim=-1)
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


# -- fitted -------------------------------------------------------------------------------------------


def _fitted(scene: Scene) -> Iterator[Hypothesis]:
    assert scene.qkv is not None
    engine = scene.engine.get("attn_ctx")
    if engine is None or scene.qkv[1].shape[1] != scene.qkv[0].shape[1]:
        return
    q, k, v = (x[:, :_FIT_TOKENS].double() for x in scene.qkv)
    own = scene.model.scores(scene.il)

    def error(scores: Scores) -> float:
        made = ops.attention(q, k, v, scale=scores.scale, window=scores.window, softcap=scores.softcap)
        return _fit.nmse(engine[:_FIT_TOKENS], made[0])

    before = error(own)
    scale = _fit.minimum(lambda x: error(replace(own, scale=x)), own.scale / 64, own.scale * 64)
    if error(replace(own, scale=scale)) < _SHARE * before:
        root = _fit.nice(scale**-2, 1e-4)
        exact = _fit.nice(scale)
        scale, words = (root**-0.5, f"1/sqrt({root:g})") if root == int(root) and root > 1 else (exact, f"{exact:.6g}")
        says = f"attention scores{{scope}} were scaled by {words}"
        yield from _scored("scale", says, lambda s: replace(s, scale=scale), scene, 1)
    cap = _fit.minimum(lambda x: error(replace(own, softcap=x)), 0.1, 1000.0)
    if error(replace(own, softcap=cap)) < _SHARE * before:
        cap = _fit.nice(cap, 1e-4)
        yield from _scored(
            "softcap", f"attn_logit_softcapping{{scope}} were {cap:.6g}", lambda s: replace(s, softcap=cap), scene, 1
        )
