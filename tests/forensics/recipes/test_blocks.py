"""Integers in blocks, value by value against the formulas, and what blocks do that are hard to round."""

from __future__ import annotations

import numpy as np
import pytest

from diffharness.forensics.recipes import IntN, round_to_blocks
from diffharness.weights.source import Float32Array

SCHEMES = [IntN(bits=bits, block=32, asymmetric=asymmetric) for bits in (2, 3, 4, 8) for asymmetric in (False, True)]


def by_hand(block: Float32Array, scheme: IntN) -> list[float]:
    """The module's formulas, one value at a time."""
    x = [np.float32(v) for v in block]
    if scheme.asymmetric:
        low, most, m = 0, 2**scheme.bits - 1, np.float32(np.float16(min(x)))
        d = np.float32(np.float16((max(x) - m) / np.float32(most)))
    else:
        most, m = 2 ** (scheme.bits - 1) - 1, np.float32(0)
        low, d = -most - 1, np.float32(np.float16(max(abs(v) for v in x) / np.float32(most)))
    codes = [min(max(round(float((v - m) / d)), low), most) if d else 0 for v in x]  # round() takes ties to even too
    return [float(np.float32(np.float32(q) * d) + m) for q in codes]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 3e-6])
def test_values_are_those_of_the_formulas(scheme: IntN, scale: float) -> None:
    values = (np.random.default_rng(0).standard_t(4, (3, 64)) * scale).astype(np.float32)
    rounded = round_to_blocks(values, scheme)
    expected = [by_hand(block, scheme) for block in values.reshape(-1, 32)]
    np.testing.assert_array_equal(rounded.reshape(-1, 32), np.array(expected, dtype=np.float32))
    assert rounded.shape == values.shape and rounded.dtype == np.float32


def test_codes_are_taken_against_the_stored_scale() -> None:
    # The scale 1/7 is a little smaller in float16, so that a value just below 3.5 of the one is above 3.5 of the other.
    stored = np.float32(np.float16(1 / 7))
    value = np.float32(3.5002) * stored
    assert np.rint(value * 7) == 3 and np.rint(value / stored) == 4
    block = np.zeros(32, dtype=np.float32)
    block[:2] = 1.0, value
    assert round_to_blocks(block, IntN(bits=4, block=32))[1] == np.float32(4) * stored


def test_a_value_that_is_stored_exactly_stays() -> None:
    codes = np.random.default_rng(1).integers(-7, 8, (4, 32)).astype(np.float32)
    codes[:, 0] = 7
    np.testing.assert_array_equal(round_to_blocks(codes * np.float32(0.25), IntN(bits=4, block=32)), codes * 0.25)


@pytest.mark.parametrize("bits", range(2, 9))
def test_error_is_at_most_half_a_step(bits: int) -> None:
    values = np.random.default_rng(bits).standard_normal((16, 128)).astype(np.float32)
    blocks = values.reshape(-1, 16)
    for asymmetric in (False, True):
        rounded = round_to_blocks(values, IntN(bits=bits, block=16, asymmetric=asymmetric)).reshape(-1, 16)
        span = np.ptp(blocks, axis=1) if asymmetric else np.abs(blocks).max(axis=1)
        step = span / (2**bits - 1 if asymmetric else 2 ** (bits - 1) - 1)
        # the scale's own rounding, 2^-11 of it, is multiplied by as many steps as there are
        allowed = step * (0.5 + 2.0**-11 * 2**bits) + np.abs(blocks).max(axis=1) * 2.0**-10
        assert (np.abs(rounded - blocks).max(axis=1) <= allowed).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_zeros_and_constants(scheme: IntN) -> None:
    zeros = np.zeros((2, 32), dtype=np.float32)
    np.testing.assert_array_equal(round_to_blocks(zeros, scheme), zeros)
    constant = np.full((1, 32), 0.5, dtype=np.float32)
    np.testing.assert_allclose(round_to_blocks(constant, scheme), constant, rtol=2**-10)


def test_a_scale_below_float16_is_lost() -> None:
    values = np.full((1, 32), 1e-8, dtype=np.float32)
    assert not round_to_blocks(values, IntN(bits=4, block=32)).any()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_float16_cannot_hold_is_not_finite_and_stays_in_its_block(scheme: IntN) -> None:
    values = np.ones((1, 64), dtype=np.float32)
    values[0, 3] = -3e38
    rounded = round_to_blocks(values, scheme)
    assert not np.isfinite(rounded[0, :32]).all()
    assert np.isfinite(rounded[0, 32:]).all()
    values[0, 3] = np.nan
    rounded = round_to_blocks(values, scheme)
    assert np.isnan(rounded[0, 3]) and np.isfinite(rounded[0, 32:]).all()


def test_rows_are_independent_and_any_number_of_axes_will_do() -> None:
    scheme = IntN(bits=3, block=16)
    values = np.random.default_rng(5).standard_normal((5, 7, 48)).astype(np.float32)
    whole = round_to_blocks(values, scheme)
    np.testing.assert_array_equal(round_to_blocks(values[2:4, 1], scheme), whole[2:4, 1])


def test_ragged_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="whole blocks of 32"):
        round_to_blocks(np.zeros((2, 40), dtype=np.float32), IntN(bits=4, block=32))
