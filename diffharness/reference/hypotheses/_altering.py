"""Models made from models: with single steps replaced, in some layers only, or with other weights in view.

Each function returns a new model and leaves its argument as it is; the results can be altered again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor

from diffharness.reference.model import State, Tap, Weights
from diffharness.reference.ops import Rotary, Scores
from diffharness.reference.steps import Steps

Replacement = Callable[..., Any]
"""Called as `f(me, plain, *arguments)`: the altered model, its step as it was, and what the step was called with."""

Alteration = Callable[[Steps], Steps]
Where = Callable[[int], bool]  # of which layers


def everywhere(il: int) -> bool:
    """All layers."""
    return True


def altered(model: Steps, **steps: Replacement) -> Steps:
    """`model` with the steps (methods) of these names replaced; a step that it does not have is an AttributeError."""
    kind = type(model)
    made: Steps = object.__new__(
        type(kind.__name__, (kind,), {n: _method(getattr(kind, n), f) for n, f in steps.items()})
    )
    vars(made).update(vars(model))
    return made


def _method(original: Callable[..., Any], replacement: Replacement) -> Callable[..., Any]:
    def step(self: Steps, *args: Any, **kwargs: Any) -> Any:
        return replacement(self, MethodType(original, self), *args, **kwargs)

    return step


def with_rotary(change: Callable[[Rotary], Rotary], where: Where = everywhere) -> Alteration:
    """Another way of turning queries and keys."""
    return lambda model: altered(model, rotary=lambda me, plain, il: change(plain(il)) if where(il) else plain(il))


def with_scores(change: Callable[[Scores], Scores], where: Where = everywhere) -> Alteration:
    """Another way of making attention scores."""
    return lambda model: altered(model, scores=lambda me, plain, il: change(plain(il)) if where(il) else plain(il))


def with_logits(change: Callable[[Tensor], Tensor]) -> Alteration:
    """What the head gives, changed."""

    def head(me: Steps, plain: Replacement, w: Weights, x: Tensor, state: State, tap: Tap) -> Tensor:
        logits: Tensor = change(plain(w, x, state, lambda name, value: None if name == "logits" else tap(name, value)))
        tap("logits", logits)
        return logits

    return lambda model: altered(model, head=head)


def only_at(base: Steps, other: Steps, places: Iterable[object]) -> Steps:
    """`other` at these places (`embed`, a layer's number, `head`), `base` elsewhere."""
    chosen = frozenset(places)

    def at(place: object) -> Steps:
        return other if place in chosen else base

    return altered(
        base,
        embed=lambda me, plain, w, tokens, state, tap: at("embed").embed(w, tokens, state, tap),
        layer=lambda me, plain, w, il, x, state, tap: at(il).layer(w, il, x, state, tap),
        head=lambda me, plain, w, x, state, tap: at("head").head(w, x, state, tap),
    )


@dataclass(frozen=True)
class Seen:
    """Weights as a hypothesis sees them: under other names, hidden, or changed.

    `rename(name)` is where the tensor is read from, None if there is none. `change(name, value)` is made of what is
    read, whole tensors and rows alike.
    """

    weights: Weights
    rename: Callable[[str], str | None] = lambda name: name
    change: Callable[[str, Tensor], Tensor] = lambda name, value: value

    def get(self, name: str) -> Tensor:
        return self.change(name, self.weights.get(self._stored(name)))

    def find(self, name: str) -> Tensor | None:
        return self.get(name) if self.has(name) else None

    def rows(self, name: str, rows: slice | Tensor) -> Tensor:
        return self.change(name, self.weights.rows(self._stored(name), rows))

    def has(self, name: str) -> bool:
        stored = self.rename(name)
        return stored is not None and self.weights.has(stored)

    def n_rows(self, name: str) -> int:
        return self.weights.n_rows(self._stored(name))

    def _stored(self, name: str) -> str:
        stored = self.rename(name)
        if stored is None:
            raise KeyError(name)
        return stored


def seeing(
    *,
    rename: Callable[[str], str | None] = lambda name: name,
    change: Callable[[str, Tensor], Tensor] = lambda name, value: value,
) -> Alteration:
    """The model on weights that are named or valued otherwise."""
    return viewing(lambda w: Seen(w, rename, change))


def viewing(view: Callable[[Weights], Weights]) -> Alteration:
    """The model on its weights as `view` shows them."""
    return lambda model: altered(
        model,
        embed=lambda me, plain, w, tokens, state, tap: plain(view(w), tokens, state, tap),
        layer=lambda me, plain, w, il, x, state, tap: plain(view(w), il, x, state, tap),
        head=lambda me, plain, w, x, state, tap: plain(view(w), x, state, tap),
    )
