"""Rotary embedding as the engine's values show it: frequencies measured pair by pair, and what numbers give them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from diffharness.reference.hypotheses import _fit
from diffharness.reference.hypotheses._altering import Alteration, altered, with_rotary
from diffharness.reference.hypotheses._scene import Hypothesis, Scene
from diffharness.reference.hypotheses.rope import TURNED, rotating, with_tables
from diffharness.reference.model import State, Weights
from diffharness.reference.ops import Rotary
from diffharness.reference.steps import Steps

_CLOSER = 0.01  # of the error of all frequencies that a number of YaRN's must leave at most
_DISTINCT = 1e-4  # relative distance of frequencies that counts


def measure(scene: Scene, name: str = "attn_q") -> tuple[_fit.Turning, Tensor] | None:
    """How the engine turned `attn_q` or `attn_k`, and the angle of each pair at position 1 as it should be."""
    heads, engine = scene.heads.get(name), scene.engine.get(f"{name}_rope")
    if heads is None or engine is None or heads.shape[1] != len(engine) or len(engine) < 3:
        return None
    rotary = scene.model.rotary(scene.il)
    n_tokens, n_head, size = heads.shape[1:]
    if engine.shape[1] % n_head or engine.shape[1] // n_head < size:
        return None
    turned = engine.reshape(n_tokens, n_head, -1)[..., -size:]  # of latent attention a head's last part alone turns
    pairs = [_fit.pairs_of(x, rotary.n_rot, interleaved=rotary.interleaved) for x in (turned, heads[0])]
    return _fit.turning(pairs[0], pairs[1]), frequencies(scene.model, scene, heads)


def frequencies(model: Steps, scene: Scene, heads: Tensor) -> Tensor:
    """By how much each pair of the scene's layer turns from one position to the next [pairs], float64."""
    state = State(scene.positions)  # of the whole chunk, whose length may matter
    cos, sin = model.tables(scene.weights, scene.il, heads.double(), state)
    return torch.atan2(sin, cos)[1].double()


def propose(scene: Scene) -> Iterator[Hypothesis]:
    """A base, a scale or factors that give the frequencies at which the engine turned the pairs."""
    found = measure(scene) if scene.in_layer and scene.tap in TURNED else None
    if found is None or not found[0].coherent:
        return
    measured, expected = found
    frequency, rotary = measured.frequency, scene.model.rotary(scene.il)
    index = torch.arange(len(frequency), dtype=torch.float64, device=frequency.device)
    turns = (expected > 1e-9) & (frequency > 1e-9)
    if turns.sum() >= 2:
        change = torch.log(frequency[turns] / expected[turns])
        weight = frequency[turns].square()
        at = index[turns] * 2 / rotary.n_rot
        slope = float((weight * at * change).sum() / (weight * at * at).sum())
        scale = float((weight * change).sum() / weight.sum())
        base = _fit.nice(rotary.base * math.exp(-slope))
        for scope, where in scene.scopes():
            yield rotating("base", f"the rope base{scope} were {base:.10g}", lambda r: replace(r, base=base), where, 1)
            factor = _fit.nice(math.exp(-scale))
            says = f"positions{scope} were divided by {factor:.6g} before they turn anything"
            if abs(scale) > _DISTINCT:
                yield rotating("scale", says, _scaled(1 / factor), where, 1)
    yield from _scalings(scene, frequency)
    magnitude = float(measured.magnitude.mean())
    if abs(magnitude - 1) > _DISTINCT:
        says = f"turned queries and keys were multiplied by {_fit.nice(magnitude):.6g}"
        yield Hypothesis("rope.magnitude", says, TURNED, with_tables(lambda c, s: (c * magnitude, s * magnitude)), 1)
    if bool(((frequency - expected).abs() > _DISTINCT * expected).any()):
        share = ", ".join(f"{value:.3g}" for value in (frequency / expected.clamp_min(1e-30)).tolist()[:6])
        says = f"each pair turned at a frequency of its own ({share}, ... of the model's)"
        yield Hypothesis("rope.frequencies", says, TURNED, _turning_at(frequency, scene.model.layer_kind(scene.il)), 2)


def _scalings(scene: Scene, frequency: Tensor) -> Iterator[Hypothesis]:
    """Of YaRN, where a line through logarithms tells nothing: the base, or the factor, that comes nearest."""
    rotary, heads = scene.model.rotary(scene.il), scene.heads["attn_q"]
    scaling = rotary.scaling
    if scaling.ext_factor == 0:
        return

    def fitted(change: Callable[[Rotary, float], Rotary], own: float, reach: float) -> float | None:
        def error(value: float) -> float:
            model = with_rotary(lambda r: change(r, value))(scene.model)
            return _fit.nmse(frequencies(model, scene, heads).log(), frequency.clamp_min(1e-12).log())

        value = _fit.nice(_fit.minimum(error, own / reach, own * reach), 1e-3)
        return value if error(value) < _CLOSER * error(own) else None

    base = fitted(lambda r, b: replace(r, base=b), rotary.base, 1000.0)
    factor = fitted(lambda r, x: _of_factor(r, x, magnitude=False), 1 / scaling.freq_scale, 64.0)
    for scope, where in scene.scopes():
        if base is not None:
            yield rotating("base", f"the rope base{scope} were {base:.10g}", lambda r: replace(r, base=base), where, 1)
        if factor is not None:
            says = f"yarn's factor{scope} were {factor:.6g}"
            yield rotating("factor", says, lambda r: _of_factor(r, factor, magnitude=True), where, 1)
            says += ", its magnitude as it is"
            yield rotating("factor", says, lambda r: _of_factor(r, factor, magnitude=False), where, 1)


def _of_factor(rotary: Rotary, factor: float, *, magnitude: bool) -> Rotary:
    """Another factor of the scaling, with the magnitude that YaRN gives it or the own one."""
    scaling = replace(rotary.scaling, freq_scale=1 / factor)
    return replace(rotary, scaling=replace(scaling, magnitude=1 + 0.1 * math.log(factor)) if magnitude else scaling)


def _scaled(by: float) -> Callable[[Rotary], Rotary]:
    return lambda r: replace(r, scaling=replace(r.scaling, freq_scale=r.scaling.freq_scale * by))


def _turning_at(frequency: Tensor, kind: str) -> Alteration:
    def tables(me: Steps, plain: Callable[..., object], w: Weights, il: int, x: Tensor, state: State) -> object:
        if me.layer_kind(il) != kind:
            return plain(w, il, x, state)
        angles = state.positions.double()[:, None] * frequency
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    return lambda model: altered(model, tables=tables)
