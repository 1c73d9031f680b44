"""NMSE over all and by row, values that are not finite, and what is not defined."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from diffharness import metrics
from diffharness.replay.distance import distance, quiet_power
from diffharness.row_sums import QUIET_SHARE

RNG = np.random.default_rng(5)
A = RNG.standard_normal((1, 2, 30, 40)).astype(np.float32)


def test_it_is_the_nmse_of_the_metrics() -> None:
    b = A + RNG.standard_normal(A.shape).astype(np.float32) * 1e-3
    found = distance(A, b)
    assert found.nmse == pytest.approx(metrics.nmse(A, b), rel=1e-5)
    rows = metrics.nmse_per_token(A.reshape(-1, 40), b.reshape(-1, 40))
    assert found.worst_row == rows.argmax() and found.worst_row_nmse == pytest.approx(rows.max(), rel=1e-4)
    assert found.max_abs == pytest.approx(np.abs(A - b).max(), rel=1e-6)


def test_equal_values_are_at_zero() -> None:
    assert distance(A, A.copy()) == distance(np.zeros_like(A), np.zeros_like(A))
    assert distance(A, A.copy()).nmse == 0.0


def test_one_row_is_found() -> None:
    b = A.copy()
    b[0, 1, 7] *= 1.001
    found = distance(A, b)
    assert found.worst_row == 37 and found.worst_row_nmse == pytest.approx(1e-6, rel=0.01)


def test_zeros_must_be_zeros() -> None:
    a = np.zeros((4, 8), np.float32)
    a[2, 3] = 1e-30
    assert distance(a, np.zeros_like(a)).nmse == np.inf


def test_a_row_that_cancels_is_measured_by_the_usual_power() -> None:
    a, b = np.ones((10, 8), np.float32), np.ones((10, 8), np.float32)
    a[3], b[3] = 2e-6, 1e-6
    assert distance(a, b).worst_row_nmse == pytest.approx(1e-12 / QUIET_SHARE, rel=1e-3)


def test_a_single_row_that_cancels_is_measured_by_the_power_of_others() -> None:
    """The gate of a shared expert: one value, 1e-5 of what it usually is, off by its rounding."""
    others = RNG.standard_normal((1, 1, 64, 1)).astype(np.float32)
    a, b = np.full((1, 1, 1, 1), 1.1e-5, np.float32), np.full((1, 1, 1, 1), 1e-5, np.float32)
    assert distance(a, b).nmse == pytest.approx(0.01, rel=1e-3)
    found = distance(a, b, quiet=quiet_power(others))
    assert found.nmse == found.worst_row_nmse < 1e-8
    assert distance(a * 1e5, b * 1e5, quiet=quiet_power(others)).nmse == pytest.approx(0.01, rel=1e-3)


def test_the_power_of_many_rows_is_taken_in_pieces() -> None:
    rows = RNG.standard_normal((1, 1, 64, 1 << 16)).astype(np.float32)
    tracemalloc.start()
    found = quiet_power(rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == pytest.approx(QUIET_SHARE * np.median((rows.astype(np.float64) ** 2).sum(axis=-1)), rel=1e-5)
    assert peak < rows.nbytes / 4


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_the_same_infinity_is_equal_and_another_is_not(value: float) -> None:
    a, b = A.copy(), A.copy()
    a[0, 0, 3, 4] = b[0, 0, 3, 4] = value
    assert distance(a, b).nmse == 0.0
    b[0, 0, 3, 4] = 1.0
    for found in (distance(a, b), distance(b, a)):
        assert found.nmse == found.worst_row_nmse == found.max_abs == np.inf and found.worst_row == 3
    b[0, 0, 3, 4] = -value if np.isinf(value) else np.inf
    assert distance(a, b).nmse == np.inf


def test_values_beyond_float32s_squares() -> None:
    for scale in (1e-25, 1e25):
        a = (A.astype(np.float64) * scale).astype(np.float32)
        assert distance(a, a * np.float32(1.001)).nmse == pytest.approx(1e-6, rel=0.02)


def test_what_is_not_defined_is_left_out() -> None:
    a, defined = A.copy(), np.ones(A.shape, np.bool_)
    a[0, 0, 5] = 77
    defined[0, 0, 5] = False
    assert distance(a, A, defined).nmse == 0.0
    defined[0, 0, 5, 0] = True
    assert distance(a, A, defined).nmse > 1.0


def test_integers_and_nothing() -> None:
    a = np.arange(12).reshape(3, 4)
    assert distance(a, a.copy()).nmse == 0.0 and distance(a, a[::-1]).nmse > 0.1
    assert distance(np.zeros((0, 4)), np.zeros((0, 4))).worst_row is None
    with pytest.raises(ValueError, match="shapes differ"):
        distance(a, a[:2])
