"""DBRX."""

from __future__ import annotations

from tests.oracles.cases import Case, Sizes

_ATTENTION = {"clip_qkv": 1e4, "kv_n_heads": 1, "rope_theta": 5e3}
_FEED_FORWARD = {"ffn_hidden_size": 64, "moe_num_experts": 6, "moe_top_k": 2, "moe_normalize_expert_weights": None}

CASES = {
    "dbrx-wide-clamp-wide": Case(
        "dbrx", {"attn_config": _ATTENTION}, Sizes(n_embd=256, n_ff_expert=256, n_vocab=320, n_head_kv=1)
    ),
    "dbrx-plain-weights": Case(
        "dbrx", {"ffn_config": _FEED_FORWARD}, engine_differs="its graph always makes the experts' weights sum to one"
    ),
}
