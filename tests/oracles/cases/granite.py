"""Granite in its variants."""

from __future__ import annotations

from typing import Any

from diffharness.weights.names._map import Sizes
from tests.oracles.cases import Case

# Granite 4 without recurrent layers, which has its own class and GGUF's older names; the sizes of mixers that it has
# not are still in its config.
_GRANITE_4: dict[str, Any] = {
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "model_type": "granitemoehybrid",
    "layer_types": ["full_attention"] * Sizes().n_layer,
    "position_embedding_type": "rope",
    "mamba_n_heads": 8,
    "mamba_d_head": Sizes().n_embd // 4,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
}
_DENSE = {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 80}

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
    "granite-4": Case("granite", _GRANITE_4 | _DENSE),
    "granite-4-without-rope": Case("granite", _GRANITE_4 | _DENSE | {"position_embedding_type": "nope"}),
    "granitemoe-4": Case("granitemoe", _GRANITE_4),
    "granitemoe-routed-only": Case(
        "granitemoe",
        {"architectures": ["GraniteMoeForCausalLM"], "model_type": "granitemoe", "shared_intermediate_size": None},
    ),
}
