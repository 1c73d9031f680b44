"""Queries, keys and values of one matrix, against the same thing row by row."""

from __future__ import annotations

import numpy as np
import pytest

from diffharness.weights.names._fused_qkv import fused_qkv_parts
from diffharness.weights.names._keys import Keys

N_HEAD, N_KV, SIZE, N_EMBD = 6, 2, 4, 5
KEYS = Keys(
    {
        "general.architecture": "a",
        "a.embedding_length": N_EMBD,
        "a.attention.head_count": N_HEAD,
        "a.attention.head_count_kv": N_KV,
        "a.attention.key_length": SIZE,
    }
)
SHARE = N_HEAD // N_KV
# Which head of the whole each head is, by how the whole is laid out.
STACKED = {"attn_q": list(range(6)), "attn_k": [6, 7], "attn_v": [8, 9]}
GROUPED = {"attn_q": [0, 1, 2, 5, 6, 7], "attn_k": [3, 8], "attn_v": [4, 9]}


def rows_of(name: str, heads: list[int]) -> list[int]:
    """Rows of the whole in GGUF's order: of queries and keys the components i and i + size/2 are neighbours."""
    order = [0, 2, 1, 3] if name != "attn_v" else [0, 1, 2, 3]
    return [head * SIZE + component for head in heads for component in order]


@pytest.mark.parametrize(("grouped", "layout"), [(False, STACKED), (True, GROUPED)])
def test_every_row_has_its_place(grouped: bool, layout: dict[str, list[int]]) -> None:
    n_rows = (N_HEAD + 2 * N_KV) * SIZE
    values = np.random.default_rng(0)
    whole = {
        "weight": values.standard_normal((n_rows, N_EMBD)).astype(np.float32),
        "bias": values.standard_normal(n_rows).astype(np.float32),
    }
    again = {kind: np.zeros_like(value) for kind, value in whole.items()}
    rules = fused_qkv_parts(KEYS, "blk.0.", "qkv", grouped=grouped)
    assert [rule.name for rule in rules if rule.required] == [f"blk.0.{name}.weight" for name in layout]
    for rule in rules:
        name, kind = rule.name.removeprefix("blk.0.").split(".")
        assert rule.hf == (f"qkv.{kind}",)
        part = rule.layout.to_gguf([whole[kind]]).reshape(rule.shape)
        assert np.array_equal(part, whole[kind][rows_of(name, layout[name])])
        again[kind] += rule.layout.to_hf(part)[0]
    assert all(np.array_equal(again[kind], whole[kind]) for kind in whole)
