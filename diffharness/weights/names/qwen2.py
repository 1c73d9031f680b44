"""`qwen2`: Qwen 2 and 2.5. Biases on Q, K and V; rows in Hugging Face's order; otherwise llama's tensors."""

from __future__ import annotations

from typing import Any

from diffharness.weights.names._blocks import attention_matrices, mlp_rules
from diffharness.weights.names._config import expect_activation
from diffharness.weights.names._keys import (
    Keys,
    decoder_config,
    decoder_example,
    decoder_metadata,
    embedding_rules,
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
    out = [*embedding_rules(metadata), TensorRule("output.bias", (keys.n_vocab,), ("lm_head.bias",), required=False)]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", keys.n_embd),
            *attention_matrices(keys, blk, hf + "self_attn.", bias=True),
            vector(blk, "ffn_norm", hf + "post_attention_layernorm", keys.n_embd),
            *mlp_rules(metadata, il),
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
