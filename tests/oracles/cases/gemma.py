"""Gemma 1 in its variants."""

from __future__ import annotations

from tests.oracles.cases import Case

CASES: dict[str, Case] = {
    "gemma-one-kv-head": Case("gemma", {"num_key_value_heads": 1, "hidden_act": "gelu"}),
}
