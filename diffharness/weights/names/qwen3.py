"""`qwen3`: Qwen 3. Norms of Q and K heads; a head size of its own; biases only where a model has them."""

from __future__ import annotations

from typing import Any

from diffharness.weights.names._blocks import mlp_rules
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

HEAD_DIM = 128  # where config.json does not state one


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    return decoder_metadata(config, "qwen3", head_dim=HEAD_DIM) | sliding_metadata(config, "qwen3")


def config(metadata: Metadata) -> dict[str, Any]:
    named = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu"}
    return named | decoder_config(metadata, "qwen3") | sliding_config(metadata, "qwen3")


def attention_rules(metadata: Metadata, il: int) -> list[TensorRule]:
    """Everything of layer `il` before its feed-forward; Qwen 3 MoE has the same."""
    keys = Keys(metadata)
    blk, hf = f"blk.{il}.", f"model.layers.{il}."
    n_embd, size = keys.n_embd, keys.head_dim
    q, kv = keys.n_head * size, keys.n_head_kv * size
    return [
        vector(blk, "attn_norm", hf + "input_layernorm", n_embd),
        *matrix(blk, "attn_q", hf + "self_attn.q_proj", q, n_embd, bias=None),
        vector(blk, "attn_q_norm", hf + "self_attn.q_norm", size),
        *matrix(blk, "attn_k", hf + "self_attn.k_proj", kv, n_embd, bias=None),
        vector(blk, "attn_k_norm", hf + "self_attn.k_norm", size),
        *matrix(blk, "attn_v", hf + "self_attn.v_proj", kv, n_embd, bias=None),
        *matrix(blk, "attn_output", hf + "self_attn.o_proj", n_embd, q, bias=None),
        vector(blk, "ffn_norm", hf + "post_attention_layernorm", n_embd),
    ]


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_label = len(keys.get("classifier.output_labels") or ()) or 1
    out = embedding_rules(metadata)
    # What rerankers read the last state with, which is not part of the forward to logits.
    shape = (n_label, keys.n_embd) if n_label > 1 else (keys.n_embd,)
    out.append(TensorRule("cls.output.weight", shape, required=False))
    for il in range(Keys(metadata).n_layer):
        out += [*attention_rules(metadata, il), *mlp_rules(metadata, il)]
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(sizes, "qwen3", "Qwen3ForCausalLM")


MAP = ArchMap(
    arch="qwen3",
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM",),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
)
