"""Tokens: a BOS too many or too few, first tokens replaced, another token's row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from diffharness.reference.hypotheses._altering import Alteration, altered
from diffharness.reference.hypotheses._scene import Hypothesis, Scene
from diffharness.reference.model import State, Tap, Weights
from diffharness.reference.steps import Steps

EMBEDDING = frozenset({"token_embd"})
HIDDEN = frozenset({"attn_q_rope", "attn_k_rope", "attn_ctx"})
_USUAL = (0, 1, 2)  # where BOS usually is, of models that do not say
_ROWS = 1 << 13  # of the embedding read at once
_SAME = 0.99  # cosine of one row to itself, whatever scales it


def propose(scene: Scene) -> Iterator[Hypothesis]:
    """Every hypothesis on the tokens that the engine was given, or took itself to be given."""
    if scene.place == "embed":
        yield from _read(scene)
    elif scene.place == 0 and scene.may_begin_at(HIDDEN):
        bos = scene.token("bos")
        before = {int(scene.tokens[0]): "one more of the first token"}
        before |= {token: f"token {token}" for token in _USUAL} if bos is None else {bos: "one more BOS"}
        for token, what in before.items():
            yield Hypothesis("tokens.hidden", f"{what} stood unseen before the tokens", HIDDEN, _preceded(token))


def _read(scene: Scene) -> Iterator[Hypothesis]:
    """Other ids, as the embedding shows them."""
    names = ("bos", "eos", "unknown", "padding")
    specials = {token: name for name in reversed(names) if (token := scene.token(name)) is not None}
    candidates = (*reversed(specials), _row(scene, 0, int(scene.tokens[0])))
    for token in dict.fromkeys(candidates):
        what = f"token {token}" + (f" ({specials[token].upper()})" if token in specials else "")
        says = f"{what} stood before the tokens, every token one place late"
        yield Hypothesis("tokens.late", says, EMBEDDING, _reading(lambda ids, t=token: _late(ids, t)))  # type: ignore[misc]
        if token != int(scene.tokens[0]):
            says = f"{what} stood in the place of the first"
            yield Hypothesis("tokens.first", says, EMBEDDING, _reading(lambda ids, t=token: _first(ids, t)))  # type: ignore[misc]
    end = _row(scene, -1, int(scene.tokens[-1]))
    says = "the first token were left out, every other token one place early"
    yield Hypothesis("tokens.early", says, EMBEDDING, _reading(lambda ids: _early(ids, end)))
    limit = scene.weights.n_rows("token_embd.weight")
    for by, words in ((1, "one too high"), (-1, "one too low")):
        says = f"token ids were {words}"
        yield Hypothesis("tokens.ids", says, EMBEDDING, _reading(lambda ids, by=by: (ids + by) % limit))  # type: ignore[misc]


def _row(scene: Scene, at: int, default: int) -> int:
    """The id whose row the engine's embedding of one token is nearest to, by angle."""
    engine = scene.engine.get("token_embd")
    if engine is None:
        return default
    n, best, found = scene.weights.n_rows("token_embd.weight"), -1.0, default
    for start in range(0, n, _ROWS):
        rows = scene.weights.rows("token_embd.weight", slice(start, min(start + _ROWS, n)))
        cosines = torch.cosine_similarity(rows, engine[at].to(rows), dim=-1)
        value, index = cosines.max(dim=0)
        if float(value) > max(best, _SAME):
            best, found = float(value), start + int(index)
    return found


def _reading(change: Callable[[Tensor], Tensor]) -> Alteration:
    return lambda model: altered(
        model, embed=lambda me, plain, w, tokens, state, tap: plain(w, change(tokens), state, tap)
    )


def _late(ids: Tensor, token: int) -> Tensor:
    return torch.cat((torch.full_like(ids[..., :1], token), ids[..., :-1]), dim=-1)


def _early(ids: Tensor, token: int) -> Tensor:
    return torch.cat((ids[..., 1:], torch.full_like(ids[..., :1], token)), dim=-1)


def _first(ids: Tensor, token: int) -> Tensor:
    return torch.cat((torch.full_like(ids[..., :1], token), ids[..., 1:]), dim=-1)


def _preceded(token: int) -> Alteration:
    """Every chunk with one token before it: its stream depends on itself alone, so that it is made aside."""

    def alter(model: Steps) -> Steps:
        streams: dict[int, Tensor] = {}  # of the token before, by layer
        told: list[Tensor | None] = []
        shared: dict[int, tuple[Tensor, Tensor]] = {}

        def alone(w: Weights, il: int, like: Tensor, state: State) -> Tensor:
            """The stream of the token before as it comes into layer `il` [1, 1, E]."""
            at_zero = replace(state, positions=state.positions[:1] * 0, shared_kv=shared, per_layer_inputs=None)
            if not streams:
                ids = torch.full((1, 1), token, device=like.device)
                streams[0] = model.embed(w, ids, at_zero, _ignore)
                told[:] = [at_zero.per_layer_inputs]
            at_zero.per_layer_inputs = told[0]
            for jl in range(max(k for k in streams if k <= il), il):
                streams[jl + 1] = model.layer(w, jl, streams[jl], at_zero, _ignore)
            return streams[il]

        def layer(
            me: Steps, plain: Callable[..., Tensor], w: Weights, il: int, x: Tensor, state: State, tap: Tap
        ) -> Tensor:
            before = alone(w, il, x, state).to(x).expand(len(x), -1, -1)
            extended = replace(
                state,
                positions=torch.arange(len(state.positions) + 1, device=x.device),
                per_layer_inputs=_extended(state.per_layer_inputs, told[0]),
            )
            out = plain(w, il, torch.cat((before, x), dim=1), extended, lambda name, value: tap(name, value[:, 1:]))
            return out[:, 1:]

        return altered(model, layer=layer)

    return alter


def _extended(inputs: Tensor | None, first: Tensor | None) -> Tensor | None:
    if inputs is None or first is None:
        return inputs
    return torch.cat((first.expand(len(inputs), *first.shape[1:]), inputs), dim=1)


def _ignore(name: str, value: Tensor) -> None:
    """A tap that nobody listens to."""
