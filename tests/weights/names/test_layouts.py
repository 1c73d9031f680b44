"""Layouts: exact in both directions, and what they say about rows is true."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffharness.weights.names._map import ADD_ONE, PLAIN, STACK, RotaryPairs
from diffharness.weights.names._moe import FusedHalf


def numbers(*shape: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


@given(n_head=st.integers(1, 5), half=st.integers(1, 4), width=st.integers(0, 3))
def test_rotary_pairs_there_and_back(n_head: int, half: int, width: int) -> None:
    shape = (n_head * half * 2, width) if width else (n_head * half * 2,)
    w, layout = numbers(*shape), RotaryPairs(n_head)
    there = layout.to_gguf([w])
    (back,) = layout.to_hf(there)
    assert np.array_equal(back, w)
    heads, pairs = w.reshape(n_head, 2, half, -1), there.reshape(n_head, half, 2, -1)
    for i in range(half):
        assert np.array_equal(pairs[:, i, 0], heads[:, 0, i]) and np.array_equal(pairs[:, i, 1], heads[:, 1, i])


def test_stack_there_and_back() -> None:
    parts = [numbers(2, 3) + i for i in range(4)]
    stacked = STACK.to_gguf(parts)
    assert stacked.shape == (4, 2, 3)
    assert all(np.array_equal(a, b) for a, b in zip(STACK.to_hf(stacked), parts, strict=True))


def test_add_one_and_plain() -> None:
    w = np.array([-1.0, 0.0, 0.5], np.float32)
    assert ADD_ONE.to_gguf([w]).tolist() == [0.0, 1.0, 1.5]
    assert np.array_equal(ADD_ONE.to_hf(ADD_ONE.to_gguf([w]))[0], w)
    assert PLAIN.to_gguf([w]) is w


def test_halves_of_a_fused_stack() -> None:
    gate, up = numbers(3, 2, 4), numbers(3, 2, 4) + 100
    fused = np.concatenate([gate, up], axis=1)
    assert np.array_equal(FusedHalf(0).to_gguf([fused]), gate)
    assert np.array_equal(FusedHalf(1).to_gguf([fused]), up)
    with pytest.raises(TypeError, match="fused"):
        FusedHalf(0).to_hf(gate)
