"""Cohere's decoders in their variants."""

from __future__ import annotations

from tests.oracles.cases import Case, Sizes

CASES: dict[str, Case] = {
    # Norms of heads are read by the engine in models of 64 layers or more only.
    "command-r-norms-of-heads": Case("command-r", {"use_qk_norm": True}, Sizes(n_layer=64)),
    "cohere2-other-pattern": Case("cohere2", {"sliding_window_pattern": 3}, Sizes(n_layer=7)),
    "cohere2moe-softmax": Case(
        "cohere2moe", {"expert_selection_fn": "softmax", "num_shared_experts": 0, "tie_word_embeddings": False}
    ),
    "cohere2moe-further-token": Case("cohere2moe", {"num_nextn_predict_layers": 1}),
    "cohere2moe-rms": Case(
        "cohere2moe", {"rms_norm_eps": 1e-3, "norm_topk_prob": False, "first_k_dense_replace": 2}, Sizes(n_layer=6)
    ),
}
