import numpy as np
import pytest

from diffharness.metrics import nmse_per_token, ratio
from diffharness.row_sums import QUIET_SHARE, least_power, row_sums


def values(seed: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(5, 64)) * scale).astype(np.float32)


def test_the_sums_are_those_of_the_definition() -> None:
    a, b = values(0), values(1)
    sums = row_sums(a, b)
    assert sums.in_range
    np.testing.assert_allclose(ratio(sums.error, sums.power), nmse_per_token(a, b), rtol=1e-5)
    assert sums.largest == np.abs(a - b).max()


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_what_float32_does_not_hold_is_said(scale: float) -> None:
    a, b = values(0, scale), values(1, scale)
    assert not row_sums(a, b).in_range
    wide = row_sums(a.astype(np.float64), b.astype(np.float64))
    np.testing.assert_allclose(ratio(wide.error, wide.power), nmse_per_token(a, b))


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_value_that_is_not_finite_is_out_of_range(odd: float, side: int) -> None:
    sides = [values(0), values(1)]
    sides[side][2, 3] = odd
    sums = row_sums(*sides)
    assert not sums.in_range and sums.largest == np.inf


def test_quiet_rows_are_measured_against_the_usual_power() -> None:
    power = np.array([1e-12, 1.0, 2.0, 3.0, np.inf])
    assert least_power(power) == pytest.approx(QUIET_SHARE * 1.5)
    assert least_power(np.array([np.nan])) == 0.0
