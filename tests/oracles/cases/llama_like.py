"""Variants of the decoders that are Llama with one difference or two."""

from __future__ import annotations

from typing import Any

from diffharness.weights.names._map import Sizes
from tests.oracles.cases import Case

TIED = {"tie_word_embeddings": True}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GROWING: dict[str, Any] = YARN | {"rope_theta": 5e3, "llama_4_scaling_beta": 0.5, "mscale_all_dim": 0.5}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 5e3, "llama_4_scaling_beta": 0.0}
N_HYBRID = 64  # layers of the one EXAONE 4 in which llama.cpp has a window
HYBRID: dict[str, Any] = {"sliding_window": 24, "sliding_window_pattern": "LLLG"}
KINDS = ["full_attention" if (il + 1) % 4 == 0 else "sliding_attention" for il in range(N_HYBRID)]


def deci_block(group: int | None, mult: float | None) -> dict[str, Any]:
    """A layer of Llama-Nemotron, with `group` query heads to a KV head or no attention."""
    return {
        "attention": {"n_heads_in_group": group, "no_op": group is None, "replace_with_linear": False},
        "ffn": {"ffn_mult": mult, "no_op": mult is None},
    }


CASES = {
    "mistral3-small": Case(
        "mistral3", {"rope_parameters": PLAIN_ROPE | {"original_max_position_embeddings": 256}} | TIED
    ),
    "mistral3-mscale": Case(
        "mistral3",
        {"rope_parameters": GROWING | {"mscale": 0.7}},
        engine_differs="llama.cpp takes mscale for 1, and reads no yarn_attn_factor",
    ),
    "mistral3-window": Case(
        "mistral3", {"sliding_window": 24}, engine_differs="llama.cpp's mistral3 graph has no sliding window"
    ),
    "arcee-yarn": Case("arcee", {"rope_scaling": YARN} | TIED),
    "arcee-llama3": Case("arcee", {"rope_scaling": LLAMA_3}),
    "smollm3-yarn": Case("smollm3", {"rope_scaling": YARN} | TIED),
    "smollm3-every-third": Case(
        "smollm3",
        {"no_rope_layer_interval": 3},
        engine_differs="llama.cpp takes every fourth layer to be without rope",
    ),
    "smollm3-window": Case(
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 24},
        engine_differs="llama.cpp's smollm3 graph has no sliding window",
    ),
    "seed_oss-tied": Case("seed_oss", TIED | {"rope_scaling": YARN}),
    "seed_oss-one-kv": Case("seed_oss", sizes=Sizes(n_head_kv=1)),
    "internlm2-one-kv": Case("internlm2", sizes=Sizes(n_head_kv=1)),
    "internlm2-all-kv": Case("internlm2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, Sizes(n_head_kv=4)),
    "baichuan-13b": Case("baichuan", {"num_hidden_layers": 40}, Sizes(n_embd=96, n_head=6, n_ff=128)),
    "baichuan-2": Case("baichuan", {"vocab_size": 125696}),
    "exaone-tied": Case("exaone", TIED | {"rope_scaling": None}),
    "exaone4-hybrid": Case(
        "exaone4", HYBRID | TIED | {"num_hidden_layers": N_HYBRID, "layer_types": KINDS, "rope_scaling": LLAMA_3}
    ),
    "exaone4-window": Case(
        "exaone4",
        HYBRID | {"layer_types": KINDS[:4]},
        engine_differs="llama.cpp has EXAONE 4's window only in a model of 64 layers",
    ),
    "exaone-moe-plain": Case(
        "exaone-moe", {"norm_topk_prob": False, "n_group": 1, "num_shared_experts": 1, "rope_scaling": LLAMA_3}
    ),
    "deci-7b": Case(
        "deci",
        {"model_type": "deci", "block_configs": None, "num_key_value_heads_per_layer": [4, 2, 1, 1]}
        | {"intermediate_size": 96, "num_hidden_layers": 4, "rope_scaling": None},
    ),
    "deci-no-ffn": Case(
        "deci",
        {"num_hidden_layers": 3, "block_configs": [deci_block(2, 6.0), deci_block(2, None), deci_block(4, 6.0)]},
        engine_differs="llama.cpp drops the attention of a layer without feed-forward",
    ),
}
