"""Keys and values: whose they are where layers share them, and what values are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.hypotheses._altering import altered, seeing
from diffharness.reference.hypotheses._scene import Hypothesis, Scene
from diffharness.reference.model import Tap, Weights
from diffharness.reference.steps import Steps
from diffharness.taps import split

CONTEXT = frozenset({"attn_ctx"})
VALUES = frozenset({"attn_v", "attn_v_norm"})


def propose(scene: Scene) -> Iterator[Hypothesis]:
    """Every hypothesis on shared keys and values, and on values made of keys."""
    if not scene.in_layer:
        return
    if getattr(scene.model, "n_shared_kv", 0):
        yield from _lenders(scene)
    if hasattr(scene.model, "norm_values"):
        yield from _values(scene)
    swap = {"attn_k": "attn_v", "attn_v": "attn_k"}
    if scene.has("attn_v.weight") and scene.weights.n_rows(f"blk.{scene.il}.attn_v.weight") == scene.weights.n_rows(
        f"blk.{scene.il}.attn_k.weight"
    ):
        says = "the key and value projections were exchanged"
        taps = frozenset({"attn_k", "attn_v"})
        yield Hypothesis("kv.exchanged", says, taps, seeing(rename=lambda name: _swapped(name, swap)))


def _swapped(name: str, swap: dict[str, str]) -> str:
    layer, rest = split(name)
    stem, _, kind = rest.partition(".")
    return f"blk.{layer}.{swap[stem]}.{kind}" if layer is not None and stem in swap else name


def _lenders(scene: Scene) -> Iterator[Hypothesis]:
    model: Any = scene.model
    own = model.lender(scene.il)
    if own == scene.il:
        return
    kind = model.layer_kind(scene.il)
    lenders = [jl for jl in range(scene.il) if model.lender(jl) == jl]
    fitting = [jl for jl in lenders if jl != own and model.n_head_kv[jl] == model.n_head_kv[own]]
    for jl in fitting:
        if scene.model.rotary(jl).n_rot != scene.model.rotary(own).n_rot:
            continue  # heads of another size
        what = f"layer {jl}, a {model.layer_kind(jl)} one" if model.layer_kind(jl) != kind else f"layer {jl}"
        says = f"{kind} layers without keys and values of their own took them from {what}, and not from layer {own}"
        yield Hypothesis("kv.lender", says, CONTEXT, _borrowing(kind, jl))


def _borrowing(kind: str, lender: int) -> Callable[[Steps], Steps]:
    def step(me: Steps, plain: Callable[[int], int], il: int) -> int:
        own = plain(il)
        return own if own == il or me.layer_kind(il) != kind else lender

    return lambda model: altered(model, lender=step)


def _values(scene: Scene) -> Iterator[Hypothesis]:
    says = "values were not normalised"
    yield Hypothesis(
        "kv.values-not-normed", says, VALUES, lambda model: altered(model, norm_values=lambda me, plain, w, il, v: v)
    )
    says = "values were normalised with the keys' weight"
    yield Hypothesis(
        "kv.values-key-weight", says, VALUES,
        lambda model: altered(
            model, norm_values=lambda me, plain, w, il, v: me.norm(w, f"blk.{il}.attn_k_norm.weight", v)
        ),
    )  # fmt: skip
    if scene.has("attn_v.weight"):
        says = "layers with values of their own used the key projection as the value"
        hide = seeing(rename=lambda name: None if name.endswith("attn_v.weight") else name)
        yield Hypothesis("kv.key-as-value", says, VALUES, hide)
        return
    for name, says, turned in (
        ("kv.value-normed-key", "values were the normalised keys", False),
        ("kv.value-turned-key", "values were the keys after norm and rope", True),
    ):
        for again in (False, True):
            more = ", normalised again" if again else ""
            yield Hypothesis(name, says + more, VALUES, _from_keys(turned, again))


def _from_keys(turned: bool, again: bool) -> Callable[[Steps], Steps]:
    """Where a layer has no value projection: values from its keys, normalised and maybe turned."""

    def step(
        me: Any, plain: Any, w: Weights, il: int, x: Tensor, cos: Tensor, sin: Tensor, tap: Tap
    ) -> tuple[Tensor, Tensor]:
        if w.has(f"blk.{il}.attn_v.weight"):
            return plain(w, il, x, cos, sin, tap)  # type: ignore[no-any-return]
        k, _ = plain(w, il, x, cos, sin, lambda name, value: None if name == "attn_v_norm" else tap(name, value))
        if turned:
            v = k
        else:
            raw = ops.split_heads(ops.project(w, f"blk.{il}.attn_k", x), me.n_head_kv[il])
            v = me.norm_heads(w, il, "attn_k", raw, lambda name, value: None)
        if again:
            v = me.norm_values(w, il, v)
        tap("attn_v_norm", ops.join_heads(v))
        return k, v

    return lambda model: altered(model, keys_values=step)
