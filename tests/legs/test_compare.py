from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffharness import metrics
from diffharness.errors import InconclusiveError
from diffharness.legs.compare import TapComparison, highest, other_experts, unmatched


def values(n: int = 40, width: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 39), max_size=4), seed=st.integers(0, 99), noise=st.sampled_from([0.0, 1e-6, 0.3]))
def test_blocks_add_up_to_the_whole(cuts: list[int], seed: int, noise: float) -> None:
    own = values(seed=seed)
    engine = (own + noise * values(seed=seed + 1)).astype(np.float32)
    local = (own + noise / 2 * values(seed=seed + 2)).astype(np.float32)
    comparison = TapComparison(len(own))
    edges = sorted({0, *cuts, len(own)})
    for start, stop in pairwise(edges):
        rows = slice(start, stop)
        comparison.feed("blk.0.attn_q", start, engine[rows], own[rows], local[rows])
    (errors,) = comparison.taps
    row = errors.row(floor=1e-8, token_floor=1e-7)
    # squares are summed in float32, whose last digits no floor depends on
    assert row.nmse == pytest.approx(metrics.nmse(engine, own), rel=1e-5)
    assert row.nmse_local == pytest.approx(metrics.nmse(engine, local), rel=1e-5)
    assert row.cos == pytest.approx(metrics.cosine(engine, own))
    assert row.max_abs == pytest.approx(metrics.max_abs(engine, own), rel=1e-6)
    assert row.worst_token == int(metrics.nmse_per_token(engine, local).argmax())
    assert row.ok is (noise < 0.1)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e18, 1e30])
def test_no_square_is_lost_or_overflows(scale: float) -> None:
    own = (values() * scale).astype(np.float32)
    engine = (own * np.float32(1.001)).astype(np.float32)
    comparison = TapComparison(len(own))
    comparison.feed("blk.0.attn_q", 0, engine, own, own)
    row = comparison.taps[0].row(floor=1e-8, token_floor=1e-7)
    assert row.nmse == pytest.approx(metrics.nmse(engine, own), rel=1e-5) and row.ok is False


def test_a_difference_too_small_to_square_still_counts() -> None:
    own = np.full((2, 4), 1e-12, dtype=np.float32)
    engine = own.copy()
    engine[1, 0] += np.float32(1e-16)
    comparison = TapComparison(2)
    comparison.feed("blk.0.attn_q", 0, engine, own, own)
    assert (comparison.taps[0].row().nmse or 0.0) == pytest.approx(metrics.nmse(engine, own), rel=1e-5)


def test_the_first_token_above_its_floor_is_named() -> None:
    own = values()
    engine = own.copy()
    engine[17] *= 1.001
    engine[30] *= 2.0
    comparison = TapComparison(len(own))
    comparison.feed("blk.0.attn_q", 0, engine, own, own)
    row = comparison.taps[0].row(floor=1e-8, token_floor=1e-7)
    assert (row.ok, row.first_token, row.worst_token) == (False, 17, 30)


def test_one_bad_token_among_loud_ones_is_seen() -> None:
    own = values()
    own[0] *= 1e5  # a first token with massive activations hides the rest in the mean
    engine = own.copy()
    engine[20] *= 1.01
    comparison = TapComparison(len(own))
    comparison.feed("blk.0.layer_out", 0, engine, own, own)
    row = comparison.taps[0].row(floor=1e-8, token_floor=1e-7)
    assert row.nmse_local is not None and row.nmse_local < 1e-8
    assert (row.ok, row.first_token) == (False, 20)


def test_a_token_that_nearly_cancels_is_measured_against_the_usual_size() -> None:
    own = values()
    own[5] *= 1e-6
    engine = own + np.float32(1e-7) * values(seed=3)
    comparison = TapComparison(len(own))
    comparison.feed("blk.0.ffn_in", 0, engine, own, own)
    assert comparison.taps[0].row(floor=1e-8, token_floor=1e-7).ok is True


@pytest.mark.parametrize("side", ["engine", "reference", "both"])
def test_what_is_not_finite_never_passes(side: str) -> None:
    own, engine = values(), values()
    if side != "reference":
        engine[7, 3] = np.nan
    if side != "engine":
        own[7, 3] = np.nan
    comparison = TapComparison(len(own))
    comparison.feed("blk.0.attn_q", 0, engine, own, own)
    (errors,) = comparison.taps
    row = errors.row(floor=1e-8, token_floor=1e-7)
    assert row.ok is False and row.nmse_local == np.inf and row.first_token == 7
    assert errors.non_finite == {"engine": int(side != "reference"), "reference": int(side != "engine")}


def test_rows_come_in_graph_order() -> None:
    comparison = TapComparison(4)
    x = values(4)
    for tap in ("logits", "blk.1.attn_q", "blk.0.layer_out", "token_embd", "blk.0.attn_norm"):
        comparison.feed(tap, 0, x, x)
    assert [e.tap for e in comparison.taps] == [
        "token_embd", "blk.0.attn_norm", "blk.0.layer_out", "blk.1.attn_q", "logits",
    ]  # fmt: skip


def test_shapes_that_differ_cannot_be_compared() -> None:
    comparison = TapComparison(4)
    with pytest.raises(InconclusiveError, match=r"\(4, 16\).*\(4, 8\)"):
        comparison.feed("blk.0.attn_q", 0, values(4), values(4, 8))


def test_other_experts() -> None:
    a = np.array([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]], dtype=np.float32)
    b = np.array([[2.0, 3.0, 1.0, 0.0], [3.0, 1.0, 2.0, 0.0]], dtype=np.float32)
    assert other_experts(a, b, 0, highest(2)).tolist() == [False, True]
    assert other_experts(a, b, 0, highest(9)).tolist() == [False, False]


def test_unmatched_taps_are_listed_in_graph_order() -> None:
    lone = unmatched(["blk.0.attn_q", "blk.0.layer_out", "logits"], ["logits", "blk.0.attn_v_norm"])
    assert lone.engine == ["blk.0.attn_q", "blk.0.layer_out"]
    assert lone.reference == ["blk.0.attn_v_norm"]


@pytest.mark.parametrize("engine", [[], ["blk.0.q"]])
def test_no_shared_tap_names_both_sets(engine: list[str]) -> None:
    with pytest.raises(InconclusiveError) as caught:
        unmatched(engine, ["blk.0.attn_q"])
    assert "blk.0.attn_q" in str(caught.value)
    assert ("blk.0.q" if engine else "has none") in str(caught.value)
