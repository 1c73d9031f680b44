"""Numbers fitted to values: minima, nice numbers, and the frequencies of pairs."""

from __future__ import annotations

import math

import pytest
import torch

from diffharness.reference import ops
from diffharness.reference.hypotheses import _fit


@pytest.mark.parametrize(
    ("value", "expected"), [(0.0999999, 0.1), (29.99995, 30.0), (9000.01, 9000.0), (math.pi, 3.1416), (0.0, 0.0)]
)
def test_nice(value: float, expected: float) -> None:
    assert _fit.nice(value) == pytest.approx(expected, rel=1e-9)


def test_nice_keeps_what_is_not() -> None:
    assert _fit.nice(1.23456789, within=1e-12) == 1.23456789
    assert math.isnan(_fit.nice(math.nan))


@pytest.mark.parametrize("at", [0.013, 1.0, 700.0])
def test_minimum(at: float) -> None:
    assert _fit.minimum(lambda x: (math.log(x) - math.log(at)) ** 2, 1e-3, 1e3) == pytest.approx(at, rel=1e-6)


def test_ratio() -> None:
    x = torch.arange(1.0, 9.0)
    assert _fit.ratio(3 * x, x) == pytest.approx(3) and math.isnan(_fit.ratio(x, 0 * x))


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("base", [100.0, 10_000.0, 1e6])
def test_frequencies_of_turned_heads(interleaved: bool, base: float) -> None:
    heads = torch.randn(1, 64, 3, 16, generator=torch.Generator().manual_seed(0))
    cos, sin = ops.rope_tables(torch.arange(64), 12, base)
    turned = ops.apply_rope(heads, cos, sin, interleaved=interleaved)
    pairs = [_fit.pairs_of(x[0], 12, interleaved=interleaved) for x in (turned, heads)]
    found = _fit.turning(pairs[0], pairs[1])
    expected = base ** (-torch.arange(0, 12, 2, dtype=torch.float64) / 12)
    assert found.coherent and torch.allclose(found.frequency, expected, rtol=1e-4, atol=1e-7)
    assert torch.allclose(found.offset, torch.zeros(6, dtype=torch.float64), atol=1e-5)
    assert torch.allclose(found.magnitude, torch.ones(6, dtype=torch.float64), atol=1e-5)


def test_what_did_not_turn_is_not_coherent() -> None:
    heads = torch.randn(32, 3, 16, generator=torch.Generator().manual_seed(0))
    other = torch.randn(32, 3, 16, generator=torch.Generator().manual_seed(1))
    pairs = [_fit.pairs_of(x, 16, interleaved=False) for x in (other, heads)]
    assert not _fit.turning(pairs[0], pairs[1]).coherent
