"""Granite in its variants."""

from __future__ import annotations

from tests.oracles.cases import Case

CASES: dict[str, Case] = {
    "granite-biases": Case("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "granite-head-size": Case("granite", {"head_dim": 32, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "granite_swa-experts": Case(
        "granite_swa",
        {
            "architectures": ["GraniteMoeSWAForCausalLM"],
            "model_type": "granitemoe_swa",
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "intermediate_size": 64,
            "shared_intermediate_size": 96,
            "tie_word_embeddings": True,
        },
    ),
    "granitemoe-routed-only": Case(
        "granitemoe",
        {"architectures": ["GraniteMoeForCausalLM"], "model_type": "granitemoe", "shared_intermediate_size": None},
    ),
}
