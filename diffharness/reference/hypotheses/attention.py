"""Attention: how scores are scaled, capped and biased, windows, chunks and sinks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.hypotheses import _fit
from diffharness.reference.hypotheses._altering import Alteration, altered, with_scores
from diffharness.reference.hypotheses._scene import Hypothesis, Scene
from diffharness.reference.model import State, Weights
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
    yield from _chunks(scene)
    yield from _biased(scene)
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
        max(n_rot, 1) ** -0.5: f"1/sqrt({n_rot}), of what turns of a head",
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


def _chunks(scene: Scene) -> Iterator[Hypothesis]:
    own = scene.model.scores(scene.il).chunk
    if own is None:
        return
    says = "every earlier token were seen, also of other chunks{scope}"
    yield from _scored("chunk-absent", says, lambda s: replace(s, chunk=None), scene)
    says = f"a window of {own} tokens were in the place of the chunks{{scope}}"
    yield from _scored("chunk-window", says, lambda s: replace(s, chunk=None, window=own), scene)
    for size in (2 * own, own // 2):
        says = f"chunks{{scope}} were of {size} tokens, not {own}"
        yield from _scored("chunk", says, lambda s, n=size: replace(s, chunk=max(1, n)), scene)  # type: ignore[misc]


def _biased(scene: Scene) -> Iterator[Hypothesis]:
    """What is added to scores, or stands beside them: ALiBi's slopes and sinks."""
    bias = scene.model.scores(scene.il).max_alibi_bias
    if bias:
        says = "ALiBi{scope} were absent"
        yield from _scored("alibi-absent", says, lambda s: replace(s, max_alibi_bias=0.0), scene)
        for factor in (0.5, 2.0):
            says = f"ALiBi's largest bias{{scope}} were {factor * bias:g}, and not {bias:g}"
            other = factor * bias
            yield from _scored("alibi", says, lambda s, b=other: replace(s, max_alibi_bias=b), scene)  # type: ignore[misc]
    if scene.sinks is not None:
        for name, says, change in (
            ("sinks-absent", "attention sinks were absent", lambda sinks: None),
            ("sinks-zero", "attention sinks were 0 in every head", torch.zeros_like),
        ):
            yield Hypothesis(f"attention.{name}", says, CONTEXT, _with_sinks(change))


def _with_sinks(change: Callable[[Tensor], Tensor | None]) -> Alteration:
    def step(me: Steps, plain: Callable[..., Tensor | None], w: Weights, il: int) -> Tensor | None:
        sinks = plain(w, il)
        return None if sinks is None else change(sinks)

    return lambda model: altered(model, sinks=step)


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
    slopes = ops.alibi_slopes(q.shape[1], scores.max_alibi_bias)
    if slopes is not None:
        logits = logits - torch.arange(len(logits))[:, None].to(logits) * slopes.to(logits)
    sinks = None if scene.sinks is None else scene.sinks.to(logits)
    top = logits.max(dim=0).values if sinks is None else torch.maximum(logits.max(dim=0).values, sinks)
    weights = (logits - top).exp()
    total = weights.cumsum(0) if sinks is None else weights.cumsum(0) + (sinks - top).exp()
    contexts = (weights[..., None] * values).cumsum(0) / total[..., None]  # [windows, H, D]
    error = (contexts.flatten(1) - engine[-1].double()).square().sum(dim=1)
    return int(error.argmin()) + 1


# -- fitted -------------------------------------------------------------------------------------------


def _fitted(scene: Scene) -> Iterator[Hypothesis]:
    assert scene.qkv is not None
    engine = scene.engine.get("attn_ctx")
    if engine is None or scene.qkv[1].shape[1] != scene.qkv[0].shape[1]:
        return
    q, k, v = (x[:, :_FIT_TOKENS].double() for x in scene.qkv)
    if engine.shape[1] != q.shape[2] * v.shape[3]:
        return  # what attention gives is changed before it is shown
    own = scene.model.scores(scene.il)
    state = State(scene.positions[:_FIT_TOKENS])
    sinks = None if scene.sinks is None else scene.sinks.double()

    def error(scores: Scores) -> float:
        model = altered(scene.model, scores=lambda me, plain, il: scores)
        return _fit.nmse(engine[:_FIT_TOKENS], model.attend(scene.il, q, k, v, state, sinks)[0])

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
