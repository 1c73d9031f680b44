"""Llama 4, with a chunk and a temperature that matter within few tokens, which the engine cannot be told."""

from __future__ import annotations

from tests.oracles.cases import Case, Sizes

_CONSTANTS = "chunk size and temperature are constants of the graph, and no keys that it reads"

CASES = {
    "llama4-chunk": Case("llama4", {"attention_chunk_size": 24}, engine_differs=_CONSTANTS),
    "llama4-temperature": Case("llama4", {"floor_scale": 16, "attn_scale": 0.5}, engine_differs=_CONSTANTS),
    "llama4-no-temperature": Case("llama4", {"attn_temperature_tuning": False}),
    "llama4-every-layer": Case("llama4", {"interleave_moe_layer_step": 1, "num_experts_per_tok": 1}),
    "llama4-no-head-norms": Case("llama4", {"use_qk_norm": False, "num_local_experts": 128}),
    "llama4-tied-wide": Case(
        "llama4",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e3}},
        Sizes(n_embd=256, n_ff=512, n_ff_expert=256, head_dim=64, n_vocab=320, n_layer=8),
    ),
}
