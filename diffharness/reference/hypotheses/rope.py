"""Rotary embedding: base, frequency factors, scaling, order of pairs, how much of a head turns, and when."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.hypotheses._altering import Alteration, Where, altered, with_rotary
from diffharness.reference.hypotheses._scene import Hypothesis, Scene
from diffharness.reference.hypotheses.norms import HEADS_NORMED, HEADS_NORMED_LAST
from diffharness.reference.model import State, Tap, Weights
from diffharness.reference.ops import Rotary
from diffharness.reference.steps import Steps

TURNED = frozenset({"attn_q_rope", "attn_k_rope"})
BASES = (10_000.0, 100_000.0, 160_000.0, 500_000.0, 1_000_000.0, 5_000_000.0, 10_000_000.0, 150_000.0)
_STANDS = 1e10  # a frequency factor from which on a pair does not turn


def propose(scene: Scene) -> Iterator[Hypothesis]:
    """Every hypothesis on how queries and keys are turned."""
    if not scene.in_layer or not scene.may_begin_at(TURNED | HEADS_NORMED | {"attn_ctx"}):
        return
    yield from _kinds(scene)
    yield from _bases(scene)
    yield from _factors(scene)
    yield from _scaling(scene)
    yield from _pairs(scene)


def _kinds(scene: Scene) -> Iterator[Hypothesis]:
    """Layers taken for layers of another kind, with everything that belongs to it."""
    other = scene.other_kind()
    if other is None:
        return
    kind, theirs = scene.model.layer_kind(scene.il), scene.model.layer_kind(other)

    def like(il: int) -> int:
        return other if scene.model.layer_kind(il) == kind else il

    yield Hypothesis(
        "kind.other",
        f"{kind} layers were {theirs} ones, in rope and window",
        TURNED | {"attn_ctx"},
        lambda model: altered(
            model,
            rotary=lambda me, plain, il: plain(like(il)),
            scores=lambda me, plain, il: plain(like(il)),
            rope_factors=lambda me, plain, w, il: plain(w, like(il)),
        ),
    )


def rotating(name: str, says: str, change: Callable[[Rotary], Rotary], where: Where, fitted: int = 0) -> Hypothesis:
    return Hypothesis(f"rope.{name}", says, TURNED, with_rotary(change, where), fitted)


# -- bases --------------------------------------------------------------------------------------------


def _bases(scene: Scene) -> Iterator[Hypothesis]:
    own = scene.model.rotary(scene.il).base
    others = {scene.model.rotary(il).base: scene.model.layer_kind(il) for il in range(scene.model.n_layer)}
    for scope, where in scene.scopes():
        for base in dict.fromkeys([*others, *BASES]):
            if base != own:
                that = f", that of {others[base]} layers" if base in others else ""
                says = f"the rope base{scope} were {base:.10g}{that}"
                yield rotating("base", says, lambda r, b=base: replace(r, base=b), where)  # type: ignore[misc]


# -- frequency factors --------------------------------------------------------------------------------


def _factors(scene: Scene) -> Iterator[Hypothesis]:
    factors = scene.model.rope_factors(scene.weights, scene.il)
    other = scene.other_kind()
    theirs = None if other is None else scene.model.rope_factors(scene.weights, other)
    if factors is not None:
        all_turn = ", so that every pair of a head turned" if bool((factors > _STANDS).any()) else ""
        yield _factored("factors-absent", f"the rope frequency factors were absent{all_turn}", lambda f: None)
        yield _factored("factors-inverted", "rope frequencies were multiplied by their factors", lambda f: 1 / f)
        yield _factored("factors-squared", "the rope frequency factors were applied twice", lambda f: f * f)
    elif theirs is not None and other is not None:
        n_pairs = scene.model.rotary(scene.il).n_rot // 2
        if len(theirs) >= n_pairs:
            kind = scene.model.layer_kind(other)
            says = f"the rope frequency factors of {kind} layers were applied to all layers"
            yield Hypothesis(
                "rope.factors-everywhere", says, TURNED, lambda model: _with_factors(model, theirs[:n_pairs])
            )


def _factored(name: str, says: str, change: Callable[[Tensor], Tensor | None]) -> Hypothesis:
    def factors(me: Steps, plain: Callable[..., Tensor | None], w: Weights, il: int) -> Tensor | None:
        value = plain(w, il)
        return None if value is None else change(value)

    return Hypothesis(f"rope.{name}", says, TURNED, lambda model: altered(model, rope_factors=factors))


def _with_factors(model: Steps, factors: Tensor) -> Steps:
    def given(me: Steps, plain: Callable[..., Tensor | None], w: Weights, il: int) -> Tensor | None:
        value = plain(w, il)
        return factors if value is None else value

    return altered(model, rope_factors=given)


# -- scaling ------------------------------------------------------------------------------------------


def _scaling(scene: Scene) -> Iterator[Hypothesis]:
    own = scene.model.rotary(scene.il).scaling
    other = scene.other_kind()
    for scope, where in scene.scopes():
        for name, says, scaling in _other_scalings(own):
            yield rotating(name, says.format(scope=scope), lambda r, s=scaling: replace(r, scaling=s), where)  # type: ignore[misc]
        if other is not None and scene.model.rotary(other).scaling != own:
            kind, scaling = scene.model.layer_kind(other), scene.model.rotary(other).scaling
            says = f"the rope scaling{scope} were that of {kind} layers"
            yield rotating("scaling-of-others", says, lambda r, s=scaling: replace(r, scaling=s), where)  # type: ignore[misc]


def _other_scalings(own: ops.RopeScaling) -> Iterator[tuple[str, str, ops.RopeScaling]]:
    if own == ops.NO_SCALING:
        return
    yarn = own.ext_factor != 0
    if not yarn and own.freq_scale == 1:  # LongRoPE, whose frequencies are a list
        yield "magnitude-1", "the magnitude of rope{scope} were absent", replace(own, magnitude=1.0)
        yield (
            "magnitude-squared",
            "the magnitude of rope{scope} were applied twice",
            replace(own, magnitude=own.magnitude**2),
        )
        return
    kind = "yarn" if yarn else "linear"
    yield "scaling-dropped", f"{kind} rope scaling{{scope}} were dropped", ops.NO_SCALING
    yield (
        "scaling-twice",
        f"{kind} rope scaling{{scope}} were applied twice",
        replace(own, freq_scale=own.freq_scale**2),
    )
    yield (
        "scaling-inverted",
        f"{kind} rope scaling{{scope}} were turned over",
        replace(own, freq_scale=1 / own.freq_scale),
    )
    if not yarn:
        return
    yield "yarn-linear", "rope{scope} were scaled linearly, not by yarn", replace(own, ext_factor=0.0)
    yield (
        "yarn-linear-plain",
        "rope{scope} were scaled linearly, without yarn's magnitude",
        replace(own, ext_factor=0.0, magnitude=1.0),
    )
    yield (
        "yarn-unscaled",
        "yarn only changed the magnitude of rope{scope}",
        replace(own, ext_factor=0.0, freq_scale=1.0),
    )
    yield "yarn-magnitude-1", "yarn's magnitude{scope} were absent", replace(own, magnitude=1.0)
    yield (
        "yarn-magnitude-squared",
        "yarn's magnitude{scope} were applied twice",
        replace(own, magnitude=own.magnitude**2),
    )
    default = 1.0 - 0.1 * math.log(own.freq_scale)
    yield "yarn-magnitude-default", "yarn's magnitude{scope} were 1 + 0.1 ln(factor)", replace(own, magnitude=default)
    yield "yarn-betas", "yarn's betas{scope} were 32 and 1", replace(own, beta_fast=32.0, beta_slow=1.0)
    both = replace(own, beta_fast=32.0, beta_slow=1.0, magnitude=default)
    yield "yarn-defaults", "yarn's betas and magnitude{scope} were the defaults", both
    stretched = int(own.n_ctx_orig / own.freq_scale)
    yield "yarn-context", f"yarn's original context{{scope}} were {stretched}", replace(own, n_ctx_orig=stretched)


# -- pairs --------------------------------------------------------------------------------------------


def _pairs(scene: Scene) -> Iterator[Hypothesis]:
    rotary = scene.model.rotary(scene.il)
    order = "half-split pairs (i, i + n/2)" if rotary.interleaved else "interleaved pairs (2i, 2i + 1)"
    says = f"queries and keys were turned in {order}"
    yield rotating("pairs", says, lambda r: replace(r, interleaved=not r.interleaved), lambda il: True)
    heads = scene.heads.get("attn_q")
    size = 0 if heads is None else heads.shape[-1]
    for scope, where in scene.scopes():
        for n_rot in dict.fromkeys((size, size // 2, size // 4, 3 * size // 4)):
            if n_rot % 2 or not 0 < n_rot <= size or n_rot == rotary.n_rot:
                continue
            if scene.model.rope_factors(scene.weights, scene.il) is not None and n_rot != rotary.n_rot:
                continue
            says = "the whole head turned" if n_rot == size else f"only the first {n_rot} components of a head turned"
            yield rotating("n-rot", f"{says}{scope and ',' + scope}", lambda r, n=n_rot: replace(r, n_rot=n), where)  # type: ignore[misc]
    yield Hypothesis(
        "rope.backwards", "queries and keys were turned backwards", TURNED, with_tables(lambda c, s: (c, -s))
    )
    yield Hypothesis(
        "rope.absent",
        "queries and keys were not turned",
        TURNED,
        with_tables(lambda c, s: (torch.ones_like(c), torch.zeros_like(s))),
    )
    for name, what in (("attn_q", "queries"), ("attn_k", "keys")):
        yield Hypothesis(f"rope.{name}-absent", f"{what} were not turned", frozenset({f"{name}_rope"}), _unturned(name))
    if HEADS_NORMED & scene.ours.keys():
        says = "queries and keys were normalised after they were turned"
        alter = partial(altered, prepare=_norm_last)
        yield Hypothesis("rope.before-norm", says, TURNED | HEADS_NORMED, alter)
    if HEADS_NORMED_LAST & scene.ours.keys() and scene.has("attn_q_norm.weight"):
        says = "queries and keys were normalised before they were turned"
        alter = partial(altered, prepare=_norm_first)
        yield Hypothesis("rope.behind-norm", says, TURNED | HEADS_NORMED_LAST, alter)
    for offset, what in ((1, "one too many"), (-1, "one too few")):
        yield Hypothesis("rope.position", f"positions were {what}", TURNED, moved(offset))


def with_tables(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Alteration:
    return lambda model: altered(model, tables=lambda me, plain, *args: change(*plain(*args)))


def _unturned(which: str) -> Alteration:
    def turn(me: Steps, plain: Callable[..., Tensor], il: int, name: str, heads: Tensor, *tables: Tensor) -> Tensor:
        return heads if name == which else plain(il, name, heads, *tables)

    return lambda model: altered(model, turn=turn)


def _norm_last(
    me: Steps,
    plain: Callable[..., Tensor],
    w: Weights,
    il: int,
    name: str,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    tap: Tap,
) -> Tensor:
    x = me.turn(il, name, x, cos, sin)
    tap(name + "_rope", ops.join_heads(x))
    return me.norm_heads(w, il, name, x, tap)


def _norm_first(
    me: Steps,
    plain: Callable[..., Tensor],
    w: Weights,
    il: int,
    name: str,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    tap: Tap,
) -> Tensor:
    x = me.norm_heads(w, il, name, x, lambda _, value: tap(name + "_rope_norm", value))
    x = me.turn(il, name, x, cos, sin)
    tap(name + "_rope", ops.join_heads(x))
    return x


def moved(offset: int) -> Alteration:
    """Positions `offset` further on."""

    def tables(me: Steps, plain: Callable[..., object], w: Weights, il: int, x: Tensor, state: State) -> object:
        return plain(w, il, x, replace(state, positions=state.positions + offset))

    return lambda model: altered(model, tables=tables)
