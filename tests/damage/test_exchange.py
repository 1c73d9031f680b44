"""Faults of place move whole rows, heads, experts and layers, and change no value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffharness.damage import Damage
from diffharness.damage.exchange import moved
from diffharness.weights.names._map import RotaryPairs
from tests.damage.conftest import N_LAYER, raws, sqnr, values

Make = Callable[..., Damage]


@pytest.mark.parametrize(("n", "share", "expected"), [(2, 1.0, 2), (8, 1.0, 8), (100, 0.1, 10), (100, 0.0, 2)])
def test_moved(n: int, share: float, expected: int) -> None:
    for seed in range(20):
        order = moved(n, share, np.random.default_rng(seed))
        assert sorted(order) == list(range(n)) and (order != np.arange(n)).sum() == expected


def rows_of(a: np.ndarray, b: np.ndarray) -> list[int]:
    """Which row of `a` each row of `b` is."""
    at = {row.tobytes(): i for i, row in enumerate(a)}
    return [at[row.tobytes()] for row in b]


@pytest.mark.parametrize(("name", "heads"), [("blk.1.attn_q.weight", 8), ("blk.1.attn_k.weight", 2)])
def test_heads_move_whole(model: Path, damaged: Make, name: str, heads: int) -> None:
    order = np.array(rows_of(values(model)[name], values(damaged("permuted-heads", tensors=name).out)[name]))
    by_head = order.reshape(heads, -1)
    size = by_head.shape[1]
    assert (by_head % size == np.arange(size)).all() and (by_head[:, 0] // size != np.arange(heads)).all()


def test_experts(model: Path, damaged: Make) -> None:
    name = "blk.1.ffn_up_exps.weight"
    a, b = values(model)[name], values(damaged("permuted-experts", tensors=name).out)[name]
    order = rows_of(a.reshape(len(a), -1), b.reshape(len(b), -1))
    assert all(i != j for i, j in enumerate(order))


def test_rotary_pairs(model: Path, damaged: Make) -> None:
    name = "blk.1.attn_k.weight"
    clean = values(model)[name]
    there = values(damaged("rope-interleaved", tensors=name).out)[name]
    assert (there == RotaryPairs(2).to_gguf([clean])).all()
    back = values(damaged("rope-half-split", tensors=name).out)[name]
    assert (back == RotaryPairs(2).to_hf(clean)[0]).all()
    as_all = values(damaged("rope-all-heads", tensors=name).out)[name]
    assert (as_all == RotaryPairs(8).to_gguf([RotaryPairs(2).to_hf(clean)[0]])).all()


def test_layers(model: Path, damaged: Make) -> None:
    done = damaged("permuted-layers")
    a, b = raws(model), raws(done.out)
    for il in range(N_LAYER):
        [source] = {j for j in range(N_LAYER) if b[f"blk.{il}.attn_q.weight"] == a[f"blk.{j}.attn_q.weight"]}
        assert source != il
        moved = {name.split(".", 2)[2] for name in a if name.startswith("blk.0.")}
        assert all(b[f"blk.{il}.{klass}"] == a[f"blk.{source}.{klass}"] for klass in moved)


def test_a_share_of_the_layers(model: Path, damaged: Make) -> None:
    done = damaged("permuted-layers:0.3")
    assert len({name.split(".")[1] for name in done.tensors}) == 2


def test_gate_for_up_in_the_type_of_each(model: Path, damaged: Make) -> None:
    gate, up = "blk.1.ffn_gate.weight", "blk.1.ffn_up.weight"
    done = damaged("swapped-gate-up", tensors=gate)
    a, b = values(model), values(done.out)
    assert sqnr(a[gate], b[up]) > 60 and 15 < sqnr(a[up], b[gate]) < 30  # F16 and Q4_K
    both = damaged("swapped-gate-up", layers=frozenset({0}))
    assert set(both.tensors) == {f"blk.0.ffn_{x}{e}.weight" for x in ("gate", "up") for e in ("", "_exps")}


def test_swapped_and_duplicated(model: Path, damaged: Make) -> None:
    done = damaged("swapped:2", tensors="blk.*.attn_q.weight")
    a, b = raws(model), raws(done.out)
    assert len(done.tensors) == 4 and sorted(a.values()) == sorted(b.values())
    done = damaged("duplicated:3", tensors="blk.*.attn_q.weight")
    b = raws(done.out)
    assert len(done.tensors) == 3
    assert all(b[name] in {a[f"blk.{j}.attn_q.weight"] for j in range(N_LAYER)} - {a[name]} for name in done.tensors)
    assert len({b[f"blk.{j}.attn_q.weight"] for j in range(N_LAYER)}) == N_LAYER - 3
