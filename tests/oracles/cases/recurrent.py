"""Models with recurrent layers: delta rules, Mamba and short convolutions, by themselves or beside attention."""

from __future__ import annotations

from tests.oracles.cases import WIDE, Case

_YARN = {"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0, "original_max_position_embeddings": 40}
_L2_EPS = (
    "queries and keys of a delta rule are normalised with the epsilon of the other norms; the definition has 1e-6 "
    "whatever those have"
)
_FALCON_MAMBA = {"model_type": "falcon_mamba", "architectures": ["FalconMambaForCausalLM"]}
_PARTS_EPS = (
    "what dt, b and c are made of is normalised with the epsilon of the other norms; Falcon Mamba has one of its own "
    "for these (`mixer_rms_eps`, 1e-6 in the released models, whose other norms have 1e-5), which GGUF has no key for"
)
_NORM_FIRST = "the mixer's output is gated and then normalised; the checkpoint asks for the norm first"
_NO_OUTPUT_BIAS = "the bias of attention's output projection is loaded and never added"
_ALWAYS_NORMALISED = "experts' weights are made to sum to one whatever `norm_topk_prob` says"
_FIXED_EPS = (
    "queries and keys of a delta rule, and the compressed keys and values, are normalised with the epsilon of the "
    "other norms; the definition has 1e-6 whatever those have, which in the released model is 1e-5"
)

CASES = {
    "mamba-tied": Case("mamba", {"tie_word_embeddings": True, "time_step_rank": "auto"}),
    "mamba-falcon": Case("mamba", _FALCON_MAMBA | {"mixer_rms_eps": 1e-3}, engine_differs=""),
    "mamba-falcon-eps": Case("mamba", _FALCON_MAMBA, engine_differs=_PARTS_EPS),
    "mamba-wide": Case("mamba", sizes=WIDE),
    "mamba2-tied": Case("mamba2", {"tie_word_embeddings": True, "n_groups": 1}),
    "mamba2-wide": Case("mamba2", sizes=WIDE),
    "qwen3next-interval": Case("qwen3next", {"layer_types": None, "full_attention_interval": 2}),
    "qwen3next-tied": Case("qwen3next", {"tie_word_embeddings": True}),
    "qwen3next-yarn": Case(
        "qwen3next", {"rope_theta": None, "rope_parameters": _YARN | {"partial_rotary_factor": 0.5}}
    ),
    "qwen3next-eps": Case("qwen3next", {"rms_norm_eps": 1e-3}, engine_differs=_L2_EPS),
    "qwen3next-wide": Case("qwen3next", sizes=WIDE),
    "qwen35-even": Case("qwen35", {"linear_num_value_heads": 2, "tie_word_embeddings": True}),
    "qwen35-eps": Case("qwen35", {"rms_norm_eps": 1e-3}, engine_differs=_L2_EPS),
    "qwen35-wide": Case("qwen35", sizes=WIDE),
    "qwen35moe-even": Case("qwen35moe", {"linear_num_value_heads": 2}),
    "qwen35moe-wide": Case("qwen35moe", sizes=WIDE),
    "falcon-h1-plain": Case("falcon-h1", {"mamba_rms_norm": False, "mamba_n_groups": 1, "mamba_conv_bias": True}),
    "falcon-h1-mlp-bias": Case("falcon-h1", {"mlp_bias": True}),
    "falcon-h1-biases": Case("falcon-h1", {"attention_bias": True}, engine_differs=_NO_OUTPUT_BIAS),
    "falcon-h1-norm-first": Case("falcon-h1", {"mamba_norm_before_gate": True}, engine_differs=_NORM_FIRST),
    "falcon-h1-wide": Case("falcon-h1", sizes=WIDE),
    "nemotron_h-biases": Case("nemotron_h", {"mlp_bias": True}),
    "nemotron_h-wide": Case("nemotron_h", sizes=WIDE),
    "nemotron_h_moe-plain": Case("nemotron_h_moe", {"moe_latent_size": None, "norm_topk_prob": False}),
    "nemotron_h_moe-wide": Case("nemotron_h_moe", sizes=WIDE),
    "granitehybrid-dense": Case("granitehybrid", {"num_local_experts": 0, "intermediate_size": 96}),
    "granitehybrid-rope": Case("granitehybrid", {"position_embedding_type": "rope", "attention_bias": True}),
    "granitehybrid-wide": Case("granitehybrid", sizes=WIDE),
    "lfm2-tied": Case("lfm2", {"block_auto_adjust_ff_dim": False, "tie_word_embeddings": True, "conv_L_cache": 5}),
    "lfm2-wide": Case("lfm2", sizes=WIDE),
    "lfm2moe-wide": Case("lfm2moe", sizes=WIDE),
    "jamba-dense": Case("jamba", {"num_experts": 1, "num_experts_per_tok": 1, "mamba_dt_rank": "auto"}),
    "jamba-wide": Case("jamba", sizes=WIDE),
    "lfm2moe-unnormalised": Case("lfm2moe", {"norm_topk_prob": False}, engine_differs=_ALWAYS_NORMALISED),
    "kimi-linear-eps": Case("kimi-linear", {"rms_norm_eps": 1e-3}, engine_differs=_FIXED_EPS),
    "kimi-linear-wide": Case("kimi-linear", sizes=WIDE),
}
