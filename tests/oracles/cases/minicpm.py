"""MiniCPM's generations in their variants."""

from __future__ import annotations

from tests.oracles.cases import Case

CASES: dict[str, Case] = {
    "minicpm-plain": Case("minicpm", {"rope_scaling": None, "tie_word_embeddings": True}),
    "minicpm-experts": Case("minicpm", {"num_experts": 6, "num_experts_per_tok": 2, "rope_scaling": None}),
    "minicpm3-short": Case("minicpm3", {"original_max_position_embeddings": 256, "tie_word_embeddings": False}),
    "minicpm3-epsilon": Case(
        "minicpm3",
        {"rms_norm_eps": 1e-3},
        engine_differs="norms of latents have the model's epsilon in the graph; the model's code leaves theirs at 1e-6",
    ),
    "minicpm3-scales": Case(
        "minicpm3",
        {"scale_emb": 3.0, "scale_depth": 0.9, "dim_model_base": 20},
        engine_differs="the published model's three scales are built into the graph, whatever a config says",
    ),
}
