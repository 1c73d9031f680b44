"""What the faults do, held against a plain account of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffharness.damage import Damage
from diffharness.damage.values import decibels_of_cosine
from diffharness.metrics import cosine
from tests.damage.conftest import sqnr, values

Make = Callable[..., Damage]
Q, UP, NORM = "blk.1.attn_q.weight", "blk.1.ffn_up.weight", "blk.1.attn_norm.weight"


def both(model: Path, done: Damage, name: str) -> tuple[np.ndarray, np.ndarray]:
    return values(model)[name], values(done.out)[name]


@pytest.mark.parametrize("decibels", [-6.0, 3.0, 20.0])
def test_noise_is_as_loud_as_asked(model: Path, damaged: Make, decibels: float) -> None:
    a, b = both(model, damaged("noise", strength=decibels, tensors=UP), UP)
    assert sqnr(a, b) == pytest.approx(decibels, abs=0.1)


def test_cosine_as_noise(model: Path, damaged: Make) -> None:
    a, b = both(model, damaged("noise", strength=decibels_of_cosine(0.45), tensors=UP), UP)
    assert cosine(a, b) == pytest.approx(0.45, abs=0.01)


@pytest.mark.parametrize(
    ("how", "name", "expected"),
    [
        ("offset:-1", NORM, lambda v: v - 1),
        ("constant:1", NORM, np.ones_like),
        ("scale:1.5", UP, lambda v: v * np.float32(1.5)),
        ("f16-underflow:0.2", UP, lambda v: np.where(np.abs(v) <= np.quantile(np.abs(v), 0.2), 0, v)),
        ("clip:0.01", UP, lambda v: np.clip(v, -np.quantile(np.abs(v), 0.99), np.quantile(np.abs(v), 0.99))),
    ],
)
def test_plain_changes(model: Path, damaged: Make, how: str, name: str, expected: Callable[..., np.ndarray]) -> None:
    a, b = both(model, damaged(how, tensors=name), name)
    np.testing.assert_allclose(b, expected(a), atol=4e-3)


def test_transposed(model: Path, damaged: Make) -> None:
    a, b = both(model, damaged("transposed", tensors=UP), UP)
    assert (b.reshape(-1) == a.T.reshape(-1)).all()


def test_transposed_experts(model: Path, damaged: Make) -> None:
    name = "blk.1.ffn_up_exps.weight"
    a, b = both(model, damaged("transposed", tensors=name), name)
    assert sqnr(a.transpose(0, 2, 1).reshape(a.shape), b) > 35  # Q8_0 once more


def test_rows_and_values(model: Path, damaged: Make) -> None:
    a, b = both(model, damaged("zero-rows:0.1", tensors=UP), UP)
    zero = (b == 0).all(axis=1)
    assert zero.sum() == 51 and (a[~zero] == b[~zero]).all()
    a, b = both(model, damaged("one-value:50", tensors=UP), UP)
    assert (a != b).sum() == 1 and b.max() == pytest.approx(50, rel=0.05)
    a, b = both(model, damaged("one-channel:4", tensors=UP), UP)
    assert (a != b).any(axis=0).sum() == 1


def test_overflow(model: Path, damaged: Make) -> None:
    a, b = both(model, damaged("f16-overflow:0.01", tensors=UP), UP)
    gone = np.isinf(b)
    assert gone.mean() == pytest.approx(0.01, rel=0.1)
    assert np.abs(a[gone]).min() > np.abs(a[~gone]).max() and (np.sign(a[gone]) == np.sign(b[gone])).all()


def test_large_values_only(model: Path, damaged: Make) -> None:
    """Strength 0 is float16's own limit, which a scaled norm passes."""
    done = damaged("scale:40000", "f16-overflow:0", tensors=NORM)
    a, b = both(model, done, NORM)
    assert (np.isinf(b) == (np.abs(a) * 40000 > 65504)).all() and np.isinf(b).any()
