"""OLMo's generations in their variants."""

from __future__ import annotations

from tests.oracles.cases import Case

_TWO_BASES = {
    "full_attention": {"rope_type": "default", "rope_theta": 5e3},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
}
_OLMO2 = {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "rope_parameters": {"rope_theta": 5e3}}

CASES: dict[str, Case] = {
    "olmo-unbounded-tied": Case("olmo", {"clip_qkv": None, "tie_word_embeddings": True}),
    "olmo2-second": Case("olmo2", {**_OLMO2, "num_key_value_heads": 1}),
    "olmo2-two-bases": Case(
        "olmo2",
        {"rope_parameters": _TWO_BASES},
        engine_differs="the sliding layers' own rope base is read and not used: the graph has one for all",
    ),
    "olmoe-normalised": Case(
        "olmoe",
        {"norm_topk_prob": True},
        engine_differs="the graph never makes the experts' weights sum to one, and no key makes it",
    ),
}
