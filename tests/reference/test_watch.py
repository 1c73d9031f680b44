"""Attention weights are shown to whoever watches: all of them, of each stream, and to nobody else's cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from diffharness.reference import ops
from diffharness.reference.runner import Reference
from tests.reference.random_source import LLAMA, RandomSource

CHUNKS = [np.arange(7), np.arange(7, 14), np.arange(5)]


def heads(n_tokens: int, n_head: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((2, n_tokens, n_head, 8)))


@pytest.mark.parametrize("window", [None, 50])
def test_the_blocks_are_the_weights_of_every_query(window: int | None) -> None:
    n_tokens, n_head, n_kv = 150, 4, 2  # more queries than a block has
    q, k = heads(n_tokens, n_head, 0), heads(n_tokens, n_kv, 1)
    whole = torch.zeros(2, n_head, n_tokens, n_tokens, dtype=torch.float64)

    def watch(weights: Tensor, hidden: Tensor, first_query: int, first_key: int) -> None:
        n_queries, n_keys = hidden.shape
        assert not (weights * hidden).any()
        whole[:, :, first_query : first_query + n_queries, first_key : first_key + n_keys] = weights.flatten(1, 2)

    plain = ops.attention(q, k, k, scale=1.0, window=window)
    watched = ops.attention(q, k, k, scale=1.0, window=window, watch=watch)
    assert torch.equal(plain, watched)
    values = k.transpose(1, 2).repeat_interleave(n_head // n_kv, dim=1)
    assert torch.allclose((whole @ values).transpose(1, 2).flatten(2), plain)


def test_the_runner_names_the_layer_and_cuts_the_streams() -> None:
    source = RandomSource(LLAMA)
    kept: dict[str, np.ndarray] = {}

    def on_tap(tap: str, own: Tensor, _: Tensor | None, rows: slice) -> None:
        kept.setdefault(tap, np.zeros((19, own.shape[-1]), np.float32))[rows] = own.numpy()

    Reference(source).run(CHUNKS, on_tap=on_tap)
    seen: list[tuple[int, int]] = []

    def on_attention(
        layer: int, own: Tensor, local: Tensor | None, hidden: Tensor, first_query: int, first_key: int
    ) -> None:
        assert local is not None and own.shape == local.shape
        assert torch.allclose(own, local, atol=1e-5)  # the other's layer inputs are this model's own
        seen.append((layer, len(own)))

    inputs = lambda layer: kept["token_embd" if layer == 0 else f"blk.{layer - 1}.layer_out"]  # noqa: E731
    Reference(source).run(CHUNKS, engine_inputs=inputs, keep_logits=False, on_attention=on_attention)
    assert seen == [(layer, n) for layer in range(3) for n in (2, 1)]  # two chunks of one length, one of another


def test_nobody_listening_for_logits_leaves_the_head_out() -> None:
    source = RandomSource(LLAMA)
    assert Reference(source).run(CHUNKS, keep_logits=False) is None
    assert "output_norm.weight" not in source.reads
    Reference(source).run(CHUNKS, keep_logits=False, on_tap=lambda *_: None, taps=["logits"])
    assert "output_norm.weight" in source.reads


def test_logits_are_the_same_when_watched() -> None:
    source = RandomSource(LLAMA)
    plain = Reference(source).run(CHUNKS)
    watched = Reference(source).run(CHUNKS, on_attention=lambda *_: None)
    assert plain is not None and watched is not None and torch.equal(plain, watched)
