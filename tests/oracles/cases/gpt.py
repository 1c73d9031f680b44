"""Cases of the decoders with LayerNorms, and of Phi 3's kin."""

from __future__ import annotations

from diffharness.weights.names._longrope import longrope_example
from diffharness.weights.names._map import Sizes
from tests.oracles.cases import Case

WINDOW = "llama.cpp's graph has no sliding window for this architecture"
PHIMOE = "llama.cpp has RMSNorm where the model has LayerNorm, and weighs experts as Mixtral does"

SIX_HEADS = Sizes(n_embd=96, n_head=6)
TANH = {"ffn_config": {"ffn_type": "mptmlp", "ffn_act_fn": {"name": "gelu", "approximate": "tanh"}}}
SAME = [1.0 + 0.25 * i for i in range(8)]
LONG_PHIMOE = longrope_example(
    16,
    48,
    long_factor=SAME,
    short_factor=SAME,
    long_mscale=1.25,
    short_mscale=1.25,
    original_max_position_embeddings=48,
)

CASES = {
    "bloom-six-heads": Case("bloom", sizes=SIX_HEADS),
    "gpt2-untied": Case("gpt2", {"tie_word_embeddings": False}),
    "gptneox-sequential": Case("gptneox", {"use_parallel_residual": False}),
    "gptneox-erf": Case("gptneox", {"hidden_act": "gelu"}),
    "falcon-multi-query": Case("falcon", {"new_decoder_architecture": False, "num_kv_heads": None}),
    "falcon-one-norm": Case("falcon", {"num_ln_in_parallel_attn": 1}),
    "falcon-erf": Case("falcon", {"activation": "gelu"}),
    # transformers has no other form of GELU for MPT.
    "mpt-tanh": Case("mpt", TANH, transformers=1e-4),
    "mpt-six-heads": Case("mpt", TANH, sizes=SIX_HEADS, transformers=1e-4),
    "nemotron-biases": Case("nemotron", {"attention_bias": True, "mlp_bias": True}),
    "nemotron-linear": Case("nemotron", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "phi2-grouped": Case("phi2", {"num_key_value_heads": 2}),
    "phi3-short": Case("phi3", {**longrope_example(12, 256), "max_position_embeddings": 1024}),
    "phi3-plain": Case("phi3", {"rope_scaling": None, "partial_rotary_factor": 1.0, "tie_word_embeddings": True}),
    "phi3-window": Case("phi3", {"sliding_window": 24}, engine_differs=WINDOW),
    "phimoe": Case("phimoe", engine_differs=PHIMOE),
    # The same divisors for every length: transformers has the short ones for long contexts too.
    "phimoe-long": Case("phimoe", LONG_PHIMOE, engine_differs=PHIMOE),
    "stablelm-parallel": Case("stablelm", {"use_parallel_residual": True}),
    "stablelm-plain": Case("stablelm", {"use_qkv_bias": False, "qk_layernorm": False}),
    "starcoder2-window": Case("starcoder2", {"sliding_window": 24}, engine_differs=WINDOW),
}
