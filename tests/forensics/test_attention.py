"""What the meter adds up, against the definitions written out with whole matrices in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from diffharness.forensics.attention import AttentionMeter, AttentionStats
from diffharness.reference import ops

RANGES = [(1, 16), (16, 40), (40, 150)]


def measured(q: Tensor, k: Tensor, window: int | None = None) -> AttentionStats:
    meter = AttentionMeter(RANGES)
    ops.attention(q, k, k, scale=1.0, window=window, watch=lambda *args: meter.see(0, *args))
    return meter.stats()


def heads(n_tokens: int, n_head: int, scale: float, seed: int = 0) -> Tensor:
    values = np.random.default_rng(seed).standard_normal((2, n_tokens, n_head, 8)) * scale
    return torch.from_numpy(values.astype(np.float32))


@pytest.mark.parametrize("window", [None, 30])
def test_means_are_those_of_the_whole_matrices(window: int | None) -> None:
    q, k = heads(150, 4, 2.0), heads(150, 2, 2.0, seed=1)
    stats = measured(q, k, window)
    scores = torch.einsum("bthd,bshd->bhts", q.double(), k.double().repeat_interleave(2, dim=2))
    distance = torch.arange(150)[:, None] - torch.arange(150)
    seen = (distance >= 0) & (distance < (window or 150))
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    entropy = torch.special.entr(weights).sum(-1).numpy()  # [chunk, head, query]
    for i, (start, stop) in enumerate(RANGES):
        rows = np.arange(start, stop)
        ratio = entropy[..., rows] / np.log(seen.sum(-1).numpy()[rows])
        assert stats.entropy[0, :, i] == pytest.approx(ratio.mean(axis=(0, 2)), rel=1e-5)
        assert stats.effective_keys[0, :, i] == pytest.approx(np.exp(entropy[..., rows].mean(axis=(0, 2))), rel=1e-5)
        see_first = [row for row in rows if seen[row, 0]]
        if see_first:
            first = weights[..., see_first, 0].mean(dim=(0, 2)).numpy()
            assert stats.first_share[0, :, i] == pytest.approx(first, rel=1e-5)
        else:
            assert np.isnan(stats.first_share[0, :, i]).all()


@pytest.mark.parametrize(("scale", "entropy"), [(0.0, 1.0), (1e3, 0.0)])
def test_the_two_ends(scale: float, entropy: float) -> None:
    """No preference is 1; one key with everything, where float32 has no smaller weight than 0, is 0 and no NaN."""
    stats = measured(heads(150, 2, scale), heads(150, 2, 1.0, seed=1))
    assert stats.entropy == pytest.approx(np.full((1, 2, 3), entropy), abs=0.01)
    assert stats.effective_keys[0, 0, 2] == pytest.approx(94 if entropy else 1.0, rel=0.05)


def test_layers_with_fewer_heads_have_nan_where_the_others_have_heads() -> None:
    meter = AttentionMeter(RANGES)
    for layer, n_head in enumerate((2, 4)):
        q = heads(20, n_head, 1.0)
        ops.attention(q, q, q, scale=1.0, watch=lambda *args, layer=layer: meter.see(layer, *args))
    stats = meter.stats()
    assert stats.entropy.shape == (2, 4, 3)
    assert np.isnan(stats.entropy[0, 2:]).all() and np.isfinite(stats.entropy[0, :2, :2]).all()
    assert np.isnan(stats.entropy[:, :, 2]).all()  # no query is that far


def test_nothing_seen_is_no_layer() -> None:
    assert AttentionMeter(RANGES).stats().n_layer == 0
