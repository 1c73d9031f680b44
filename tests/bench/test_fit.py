"""Exponents of powers that are known."""

from __future__ import annotations

import math

import pytest

from bench.fit import exponent


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0, -1.0])
def test_a_power_is_found(power: float) -> None:
    sizes = [128, 256, 512, 2048]
    assert exponent(sizes, [0.37 * size**power for size in sizes]) == pytest.approx(power, abs=1e-12)


def test_least_squares_of_the_logarithms() -> None:
    # Logarithms 0, 1, 1 at 0, 1, 2: the slope is 1/2.
    assert exponent([1, math.e, math.e**2], [1, math.e, math.e]) == pytest.approx(0.5)


def test_what_is_there_at_any_size_draws_it_toward_zero() -> None:
    sizes = [4, 8, 16]
    assert 0.4 < exponent(sizes, [10 + size for size in sizes]) < 0.6


@pytest.mark.parametrize(
    ("sizes", "values"),
    [([], []), ([1], [1]), ([2, 2], [1, 3]), ([1, 2], [1]), ([0, 1], [1, 1]), ([1, 2], [1, 0])],
)
def test_what_has_no_exponent_is_refused(sizes: list[float], values: list[float]) -> None:
    with pytest.raises(ValueError):
        exponent(sizes, values)
