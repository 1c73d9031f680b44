"""Paired differences: a planted one is told apart, none is not, and neighbours that are alike do not make it sure."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffharness.paired import BLOCK, MANY_CHUNKS, block_numbers, critical, paired


def chunks(n_chunks: int, length: int = 256) -> np.ndarray:
    return np.repeat(np.arange(n_chunks), length)


def alike(rng: np.random.Generator, n: int, share: float) -> np.ndarray:
    """Values of variance 1 of which each keeps `share` of the one before."""
    values = rng.standard_normal(n)
    for i in range(1, n):
        values[i] = share * values[i - 1] + math.sqrt(1 - share**2) * values[i]
    return values


def told_apart(seed: int, share: float, mean: float = 0.0, n_chunks: int = 4) -> bool:
    rng = np.random.default_rng(seed)
    b = 5 * rng.random(n_chunks * 256)
    return paired(b + mean + alike(rng, len(b), share), b, chunks(n_chunks)).told_apart


def test_mean_and_error_of_independent_differences() -> None:
    rng = np.random.default_rng(1)
    b = rng.random(2048)
    difference = 0.3 + rng.standard_normal(2048)
    found = paired(b + difference, b, chunks(8))
    assert found.mean == pytest.approx(difference.mean())
    assert found.error == pytest.approx(1 / math.sqrt(2048), rel=0.3)
    assert found.z == pytest.approx(found.mean / found.error)
    assert found.told_apart and found.blocks == 64


def test_no_difference_is_told_apart_about_as_often_as_promised() -> None:
    assert sum(told_apart(seed, 0.0) for seed in range(200)) <= 20  # 5 % would be 10
    assert sum(told_apart(seed, 0.7) for seed in range(200)) <= 24


def test_neighbours_that_are_alike_fool_the_error_for_independent_positions() -> None:
    def naive(seed: int) -> bool:
        difference = alike(np.random.default_rng(seed), 1024, 0.7)
        return abs(difference.mean()) > 1.96 * difference.std() / math.sqrt(1024)

    assert sum(naive(seed) for seed in range(200)) > 60


def test_a_planted_difference_is_found() -> None:
    assert all(told_apart(seed, 0.3, mean=0.4) for seed in range(50))


def test_the_larger_error_counts() -> None:
    swings = np.tile([1.0, -1.0], 512)  # neighbours that cancel: blocks know of no error at all
    found = paired(swings, np.zeros(1024), chunks(4))
    assert found.error == pytest.approx(1 / math.sqrt(1023)) and not found.told_apart


def test_equal_sides_and_equal_differences() -> None:
    b = np.random.default_rng(2).random(512)
    same = paired(b, b, chunks(2))
    assert same.mean == 0 and same.error == 0 and same.z is None and not same.told_apart
    assert paired(np.ones(512), np.zeros(512), chunks(2)).told_apart


def test_infinite_sides() -> None:
    b = np.zeros(512)
    a = b.copy()
    a[3] = math.inf
    one = paired(a, b, chunks(2))
    assert one.mean == math.inf and one.error is None and one.told_apart
    both = paired(a, a, chunks(2))
    assert math.isnan(both.mean) and not both.told_apart


def test_too_few_blocks_tell_nothing() -> None:
    found = paired(np.ones(100), np.zeros(100), chunks(1, 100))
    assert found.blocks == 3 and found.error is None and not found.told_apart


def test_blocks_stay_inside_of_chunks() -> None:
    assert block_numbers(chunks(2, 2 * BLOCK + 5)).tolist() == [0] * BLOCK + [1] * (BLOCK + 5) + [2] * BLOCK + [3] * (
        BLOCK + 5
    )
    assert block_numbers(chunks(3, 10)).tolist() == [0] * 10 + [1] * 10 + [2] * 10
    many = chunks(MANY_CHUNKS, 100)
    assert (block_numbers(many) == many).all()
    assert block_numbers(np.array([4, 4, 7])).tolist() == [0, 0, 1]


@pytest.mark.parametrize(("freedom", "value"), [(4, 2.776), (7, 2.365), (15, 2.131), (30, 2.042), (1000, 1.962)])
def test_critical_values_are_student_s(freedom: int, value: float) -> None:
    assert critical(freedom) == pytest.approx(value, rel=3e-3)


def test_sides_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="alike on both sides"):
        paired(np.ones(4), np.ones(5), np.zeros(4, dtype=np.int64))
