"""DeepSeek's families and those built like them: every form of latent attention and of the choice of experts."""

from __future__ import annotations

from typing import Any

from diffharness.weights.names._map import Sizes
from tests.oracles.cases import WIDE, Case

V2: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "n_group": 1,
    "norm_topk_prob": False,
    "rope_interleave": None,
    "routed_scaling_factor": 1.5,
}
GLM: dict[str, Any] = {
    "model_type": "glm4_moe_lite",
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "rope_scaling": None,
    "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
    "first_k_dense_replace": None,
}
# A model of 26 or 27 layers is what llama.cpp takes to have no latent of the queries.
LITE = Sizes(n_layer=26, n_embd=32, n_head=2, n_head_kv=2, head_dim=16, n_ff=32, n_ff_expert=16)


def yarn(**more: Any) -> dict[str, Any]:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}
    return {"rope_scaling": scaling | more}


CASES = {
    "deepseek2-wide": Case("deepseek2", sizes=WIDE),
    "deepseek2-tied-ungrouped": Case("deepseek2", {"tie_word_embeddings": True, "n_group": 1, "rope_scaling": None}),
    "deepseek2-v2": Case("deepseek2", V2 | yarn(mscale=0.707, mscale_all_dim=0.707)),
    "deepseek2-v2-lite": Case("deepseek2", V2 | {"q_lora_rank": None}, sizes=LITE),
    "deepseek2-v2-groups": Case(
        "deepseek2",
        V2 | {"topk_method": "group_limited_greedy", "n_group": 2},
        engine_differs="V2 chooses groups by their best expert, llama.cpp by the sum of the two best (V3's way)",
    ),
    "deepseek2-glm-flash": Case("deepseek2", GLM),
    "deepseek2-eps": Case(
        "deepseek2",
        {"rms_norm_eps": 1e-2},
        engine_differs="latents are normalised with epsilon 1e-6 in the model, with rms_norm_eps in llama.cpp",
    ),
    "deepseek2-yarn-plain": Case(
        "deepseek2",
        yarn(),
        engine_differs="without mscale_all_dim llama.cpp still multiplies scores by (0.1 ln(factor) + 1)^2",
    ),
    "deepseek2-yarn-mscale": Case(
        "deepseek2",
        yarn(mscale=1.0, mscale_all_dim=0.5),
        engine_differs="llama.cpp takes mscale to equal mscale_all_dim, and reads no key that says otherwise",
    ),
    "glm4moe-wide": Case("glm4moe", sizes=WIDE),
    "glm4moe-plain": Case(
        "glm4moe",
        {
            "attention_bias": False,
            "use_qk_norm": False,
            "tie_word_embeddings": True,
            "n_group": 1,
            "n_shared_experts": 2,
        },
    ),
    "glm4moe-yarn": Case("glm4moe", yarn() | {"norm_topk_prob": False, "first_k_dense_replace": 2}),
    "glm4-wide": Case("glm4", sizes=WIDE),
    "glm4-plain": Case("glm4", {"attention_bias": False, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    "glm4-linear": Case("glm4", {"rope_scaling": {"type": "linear", "factor": 3.0}, "partial_rotary_factor": 1.0}),
    "chatglm-wide": Case("chatglm", sizes=WIDE),
    "chatglm-plain": Case("chatglm", {"attention_bias": False, "tie_word_embeddings": True}),
    "dots1-wide": Case("dots1", sizes=WIDE),
    "dots1-plain": Case("dots1", {"n_group": 1, "norm_topk_prob": False, "routed_scaling_factor": 1.0}),
    "dots1-sliding": Case(
        "dots1",
        {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 24, "max_window_layers": 0},
        engine_differs="llama.cpp's graph of dots1 has no sliding window; no published model uses it",
    ),
    "deepseek-wide": Case("deepseek", sizes=WIDE),
    "deepseek-tied-dense-two": Case("deepseek", {"tie_word_embeddings": True, "first_k_dense_replace": 2}),
    "deepseek-normalised": Case(
        "deepseek",
        {"norm_topk_prob": True},
        engine_differs="llama.cpp never divides these models' weights by their sum; no published one asks for it",
    ),
    "bailingmoe-wide": Case("bailingmoe", sizes=WIDE),
    "bailingmoe-plain": Case("bailingmoe", {"norm_topk_prob": False, "num_key_value_heads": 1, "head_dim": None}),
    "bailingmoe2-wide": Case("bailingmoe2", sizes=WIDE),
    "bailingmoe2-plain": Case("bailingmoe2", {"n_group": 1, "partial_rotary_factor": 1.0, "first_k_dense_replace": 0}),
    "bailingmoe2-shared-two": Case("bailingmoe2", {"num_shared_experts": 2} | yarn()),
}
