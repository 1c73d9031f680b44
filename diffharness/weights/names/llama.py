"""`llama`: Llama, SmolLM2, Mistral and Mixtral.

Q and K rows are permuted to interleaved rotary pairs in the GGUF. Mistral's sliding window has a GGUF key that the
engine's converter does not write for this architecture; it is written here because the model has it.
"""

from __future__ import annotations

from typing import Any

from diffharness.weights.names._blocks import gated_matrices
from diffharness.weights.names._config import expect_activation, need_int
from diffharness.weights.names._keys import (
    Keys,
    decoder_config,
    decoder_example,
    decoder_metadata,
    embedding_rules,
    matrix,
    rope_freqs_rule,
    vector,
)
from diffharness.weights.names._map import ArchMap, Config, RotaryPairs, Sizes, TensorRule
from diffharness.weights.names._moe import MIXTRAL, expert_rules
from diffharness.weights.source import Metadata

_MIXTRAL_THETA = 1e6  # Mixtral's own default; Llama's and Mistral's is 1e4


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    n_expert = config.get("num_local_experts") or config.get("num_experts")
    out = decoder_metadata(config, "llama", default_theta=_MIXTRAL_THETA if n_expert else 10000.0)
    keys = Keys(out)
    out["llama.rope.dimension_count"] = keys.head_dim
    if n_expert:
        out["llama.expert_count"] = n_expert
        out["llama.expert_used_count"] = need_int(config, "num_experts_per_tok")
    if config.get("sliding_window"):
        out["llama.attention.sliding_window"] = need_int(config, "sliding_window")
    return out


def config(metadata: Metadata) -> dict[str, Any]:
    keys = Keys(metadata)
    out = decoder_config(metadata, "llama")
    window = keys.get("attention.sliding_window", 0)
    if n_expert := keys.n_expert:
        out |= {"num_local_experts": n_expert, "num_experts_per_tok": keys["expert_used_count"]}
        out |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "sliding_window": window or None}
    elif window:
        out |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": window}
    else:
        out |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return out | {"hidden_act": "silu"}


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, size, n_ff = keys.n_embd, keys.head_dim, keys.by_layer("feed_forward_length")
    n_head = keys.by_layer("attention.head_count")
    n_head_kv = keys.by_layer("attention.head_count_kv", n_head[0])
    n_expert = keys.n_expert
    out = [*embedding_rules(metadata), rope_freqs_rule(metadata, keys.integer("rope.dimension_count", size))]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        q, kv = n_head[il] * size, n_head_kv[il] * size
        attn = hf + "self_attn."
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", n_embd),
            *matrix(blk, "attn_q", attn + "q_proj", q, n_embd, layout=RotaryPairs(n_head[il]), bias=None),
            *matrix(blk, "attn_k", attn + "k_proj", kv, n_embd, layout=RotaryPairs(n_head_kv[il]), bias=None),
            *matrix(blk, "attn_v", attn + "v_proj", kv, n_embd, bias=None),
            *matrix(blk, "attn_output", attn + "o_proj", n_embd, q, bias=None),
            vector(blk, "ffn_norm", hf + "post_attention_layernorm", n_embd),
        ]
        if n_expert:
            moe = hf + "block_sparse_moe."
            out += expert_rules(blk, moe, MIXTRAL, fused=hf + "mlp.", n_expert=n_expert, n_ff=n_ff[il], n_embd=n_embd)
        else:
            out += gated_matrices(blk, hf + "mlp.", n_ff[il], n_embd, bias=None)
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(sizes, "llama", "LlamaForCausalLM")


MAP = ArchMap(
    arch="llama",
    model_types=("llama", "mistral", "mixtral"),
    architectures=("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM"),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
)
