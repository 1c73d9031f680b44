"""Qwen 2 MoE."""

from __future__ import annotations

from tests.oracles.cases import Case, Sizes

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40, "rope_theta": 5e3}

CASES = {
    "qwen2moe-yarn": Case("qwen2moe", {"rope_parameters": _YARN}),
    "qwen2moe-normalised": Case(
        "qwen2moe", {"norm_topk_prob": True}, engine_differs="its graph never makes the experts' weights sum to one"
    ),
    "qwen2moe-window": Case(
        "qwen2moe",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 3},
        engine_differs="its graph has no window",
    ),
    "qwen2moe-tied-wide": Case(
        "qwen2moe",
        sizes=Sizes(n_embd=256, n_ff=512, n_ff_expert=256, head_dim=64, n_vocab=320, n_head_kv=1),
    ),
}
