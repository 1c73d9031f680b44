"""Grok."""

from __future__ import annotations

from tests.oracles.cases import Case, Sizes

CASES = {
    "grok-dense": Case("grok", {"residual_moe": True, "final_logit_softcapping": 3.0, "tie_word_embeddings": False}),
    "grok-temperature": Case("grok", {"attn_temperature_len": 128, "num_experts_per_tok": 6}),
    "grok-two-experts": Case(
        "grok",
        {"num_experts_per_tok": 2},
        engine_differs="makes the experts' weights sum to one, which xAI's own model.py does not",
    ),
    "grok-router-cap": Case(
        "grok", {"router_logit_softcapping": 0.5}, engine_differs="reads router_logit_softcapping and does not cap"
    ),
    "grok-wide": Case("grok", sizes=Sizes(n_embd=256, n_ff=512, n_ff_expert=256, n_vocab=320, n_head_kv=1)),
}
