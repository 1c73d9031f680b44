"""Numbers estimated from the engine's values: ratios, one-dimensional minima, frequencies of rotary pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = (math.sqrt(5) - 1) / 2
_STEPS = 60  # of the golden section: the interval shrinks to 3e-13 of itself
_COHERENT = 0.999  # of a pair's power, when one rotation per position maps ours to the engine's


def nmse(a: Tensor, b: Tensor) -> float:
    """Σ(a−b)² / Σb² in float64."""
    a, b = a.double(), b.double()
    power = float(b.square().sum())
    return float((a - b).square().sum()) / power if power else math.inf


def ratio(engine: Tensor, ours: Tensor) -> float:
    """The least-squares factor of engine over ours."""
    a, b = engine.double(), ours.double()
    power = float(b.square().sum())
    return float((a * b).sum()) / power if power else math.nan


def nice(value: float, within: float = 1e-5) -> float:
    """The number of fewest digits that is within a relative distance of `value`."""
    if not math.isfinite(value) or value == 0:
        return value
    for digits in range(7):
        text = float(f"{value:.{digits}e}")
        if abs(text - value) <= within * abs(value):
            return text
    return value


def minimum(error: Callable[[float], float], low: float, high: float, *, grid: int = 33) -> float:
    """Where `error` is least for a positive number from low to high: a grid in the logarithm, then golden section."""
    a, b = math.log(low), math.log(high)
    points = [a + (b - a) * i / (grid - 1) for i in range(grid)]
    values = [error(math.exp(p)) for p in points]
    best = min(range(grid), key=lambda i: values[i] if math.isfinite(values[i]) else math.inf)
    left, right = points[max(best - 1, 0)], points[min(best + 1, grid - 1)]
    x, y = right - _GOLDEN * (right - left), left + _GOLDEN * (right - left)
    fx, fy = error(math.exp(x)), error(math.exp(y))
    for _ in range(_STEPS):
        if right - left < 1e-9:
            break
        if fx < fy:
            right, y, fy = y, x, fx
            x = right - _GOLDEN * (right - left)
            fx = error(math.exp(x))
        else:
            left, x, fx = x, y, fy
            y = left + _GOLDEN * (right - left)
            fy = error(math.exp(y))
    return math.exp((left + right) / 2)


@dataclass(frozen=True)
class Turning:
    """How the engine turned one set of heads: per pair, radians a position, radians at position 0, and growth."""

    frequency: Tensor  # [pairs], float64
    offset: Tensor  # [pairs]
    magnitude: Tensor  # [pairs]
    coherent: bool  # whether that is all that happened to them


def pairs_of(heads: Tensor, n_rot: int, *, interleaved: bool) -> Tensor:
    """The pairs of heads [..., D] that turn, as complex numbers [..., n_rot / 2]."""
    turned = heads[..., :n_rot].double()
    if interleaved:
        return torch.view_as_complex(turned.reshape(*turned.shape[:-1], n_rot // 2, 2).contiguous())
    return torch.complex(turned[..., : n_rot // 2], turned[..., n_rot // 2 :])


def turning(engine: Tensor, unturned: Tensor) -> Turning:
    """From pairs [tokens, heads, pairs], complex, the engine's turned and ours before: frequencies by position.

    Positions count from 0. The mean step from one position to the next gives the frequency modulo 2π, the slope of
    what is left over all positions its last digits.
    """
    rho = (engine * unturned.conj()).sum(dim=1)  # [tokens, pairs]
    power = unturned.abs().square().sum(dim=1)
    at = torch.arange(len(rho), dtype=torch.float64, device=rho.device)[:, None]
    frequency = (rho[1:] * rho[:-1].conj()).sum(dim=0).angle()
    offset = torch.zeros_like(frequency)
    for _ in range(3):
        left = (rho * torch.polar(torch.ones_like(at), -(at * frequency + offset)).to(rho.dtype)).angle()
        mean = left.mean(dim=0)
        centred = at - at.mean()
        slope = (centred * (left - mean)).sum(dim=0) / centred.square().sum()
        frequency = frequency + slope
        offset = offset + mean - slope * at.mean()
    explained = (rho * torch.polar(torch.ones_like(at), -(at * frequency + offset)).to(rho.dtype)).real.sum(dim=0)
    norm = (engine.abs().square().sum(dim=(0, 1)) * power.sum(dim=0)).sqrt()
    coherent = bool((explained >= _COHERENT * norm).all())
    return Turning(frequency, offset, explained / power.sum(dim=0), coherent)
