"""Hunyuan V1."""

from __future__ import annotations

from tests.oracles.cases import Case, Sizes

_PLAIN = {"rope_type": "default", "rope_theta": 5e3}
_N_LAYER = 4

CASES = {
    "hunyuan-dense-tied-wide": Case(
        "hunyuan-dense",
        {"tie_word_embeddings": True, "rope_parameters": _PLAIN},
        Sizes(n_embd=256, n_ff=512, head_dim=64, n_vocab=320, n_head_kv=1),
    ),
    "hunyuan-moe-tied-wide": Case(
        "hunyuan-moe",
        {"tie_word_embeddings": True, "rope_parameters": _PLAIN},
        Sizes(n_embd=256, n_ff=512, head_dim=64, n_vocab=320),
    ),
    "hunyuan-moe-lists": Case("hunyuan-moe", {"moe_topk": [3] * _N_LAYER, "num_shared_expert": [1] * _N_LAYER}),
}
