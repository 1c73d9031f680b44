"""How a synthetic model's values are drawn: activations near one, and nothing that could be left out unseen."""

from __future__ import annotations

import numpy as np

from diffharness.weights.names._map import Draw
from diffharness.weights.source import Float32Array


def normal(std: float, mean: float = 0.0) -> Draw:
    """Normal values."""

    def draw(generator: np.random.Generator, shape: tuple[int, ...]) -> Float32Array:
        values: Float32Array = generator.standard_normal(shape, dtype=np.float32) * np.float32(std) + np.float32(mean)
        return values

    return draw


def uniform(low: float, high: float) -> Draw:
    """Values between `low` and `high`."""

    def draw(generator: np.random.Generator, shape: tuple[int, ...]) -> Float32Array:
        return generator.uniform(low, high, shape).astype(np.float32)

    return draw


def by_width(gain: float = 1.3) -> Draw:
    """A matrix [..., out, in] that makes outputs `gain` times as large as its inputs, roughly."""

    def draw(generator: np.random.Generator, shape: tuple[int, ...]) -> Float32Array:
        return normal(gain / shape[-1] ** 0.5)(generator, shape)

    return draw


def around(mean: float = 1.0, spread: float = 0.3, least: float = 0.3) -> Draw:
    """Values around `mean`, such as a norm's weights, none closer to zero than `least` times the mean."""

    def draw(generator: np.random.Generator, shape: tuple[int, ...]) -> Float32Array:
        share = 1 + np.clip(generator.standard_normal(shape) * spread, least - 1, 1 - least)
        return (mean * share).astype(np.float32)

    return draw


EMBEDDING = normal(0.7)
MATRIX = by_width()
BIAS = normal(0.5)
NORM = around()


def default_draw(name: str, shape: tuple[int, ...]) -> Draw:
    """What a GGUF tensor's name and shape call for."""
    if name.endswith("token_embd.weight"):
        return EMBEDDING
    if name.endswith(".bias"):
        return BIAS
    return MATRIX if len(shape) > 1 else NORM
