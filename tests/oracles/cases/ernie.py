"""ERNIE 4.5."""

from __future__ import annotations

from tests.oracles.cases import Case, Sizes

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40, "rope_theta": 5e3}

CASES = {
    "ernie4_5-tied-wide": Case(
        "ernie4_5",
        {"tie_word_embeddings": True, "rope_parameters": _YARN},
        Sizes(n_embd=256, n_ff=512, head_dim=64, n_vocab=320, n_head_kv=1),
    ),
    "ernie4_5-moe-unshared": Case("ernie4_5-moe", {"moe_num_shared_experts": 0, "moe_layer_start_index": 2}),
    "ernie4_5-moe-tied-wide": Case(
        "ernie4_5-moe",
        {"tie_word_embeddings": True, "moe_num_shared_experts": 1, "moe_layer_start_index": 0},
        Sizes(n_embd=256, n_ff=512, n_ff_expert=256, head_dim=64, n_vocab=320),
    ),
}
