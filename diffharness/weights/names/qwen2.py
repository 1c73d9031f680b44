"""`qwen2`: Qwen 2 and 2.5. Biases on Q, K and V; rows in Hugging Face's order; otherwise llama's tensors."""

from __future__ import annotations

from typing import Any

from diffharness.weights.names._config import expect_activation
from diffharness.weights.names._keys import (
    Keys,
    decoder_config,
    decoder_example,
    decoder_metadata,
    embedding_rules,
    matrix,
    vector,
)
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._sliding import sliding_config, sliding_metadata
from diffharness.weights.source import Metadata


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    return decoder_metadata(config, "qwen2") | sliding_metadata(config, "qwen2")


def config(metadata: Metadata) -> dict[str, Any]:
    named = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"}
    return named | decoder_config(metadata, "qwen2") | sliding_config(metadata, "qwen2")


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, n_ff = keys.n_embd, keys.integer("feed_forward_length")
    q, kv = keys.n_head * keys.head_dim, keys.n_head_kv * keys.head_dim
    out = [*embedding_rules(metadata), TensorRule("output.bias", (keys.n_vocab,), ("lm_head.bias",), required=False)]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", n_embd),
            *matrix(blk, "attn_q", hf + "self_attn.q_proj", q, n_embd, bias=True),
            *matrix(blk, "attn_k", hf + "self_attn.k_proj", kv, n_embd, bias=True),
            *matrix(blk, "attn_v", hf + "self_attn.v_proj", kv, n_embd, bias=True),
            *matrix(blk, "attn_output", hf + "self_attn.o_proj", n_embd, q),
            vector(blk, "ffn_norm", hf + "post_attention_layernorm", n_embd),
            *matrix(blk, "ffn_gate", hf + "mlp.gate_proj", n_ff, n_embd),
            *matrix(blk, "ffn_up", hf + "mlp.up_proj", n_ff, n_embd),
            *matrix(blk, "ffn_down", hf + "mlp.down_proj", n_embd, n_ff),
        ]
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(sizes, "qwen2", "Qwen2ForCausalLM", head_dim=None)


MAP = ArchMap(
    arch="qwen2",
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM",),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
)
