"""`seed_oss`: Seed-OSS. Biases on Q, K and V; the norm before the feed-forward is named after the attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffharness.weights.names._blocks import attention_matrices, gated_matrices
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
from diffharness.weights.source import Metadata

_ARCH = "seed_oss"
_HEAD_DIM = 128  # where config.json does not state one


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    return decoder_metadata(config, _ARCH, head_dim=_HEAD_DIM)


def config(metadata: Metadata) -> dict[str, Any]:
    named = {"architectures": ["SeedOssForCausalLM"], "model_type": "seed_oss", "hidden_act": "silu"}
    return named | decoder_config(metadata, _ARCH) | {"attention_bias": True, "attention_out_bias": False}


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    out = embedding_rules(metadata)
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        attention = attention_matrices(keys, blk, hf + "self_attn.", out_bias=None)
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", keys.n_embd),
            *(replace(rule, synthetic=True) if _is_own_bias(rule) else rule for rule in attention),
            vector(blk, "post_attention_norm", hf + "post_attention_layernorm", keys.n_embd),
            *gated_matrices(blk, hf + "mlp.", keys.integer("feed_forward_length"), keys.n_embd, bias=None),
        ]
    return out


def _is_own_bias(rule: TensorRule) -> bool:
    """Whether every released model has the bias."""
    return rule.name.endswith(".bias") and "attn_output" not in rule.name


def example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(sizes, "seed_oss", "SeedOssForCausalLM")


MAP = ArchMap(
    arch=_ARCH,
    model_types=("seed_oss",),
    architectures=("SeedOssForCausalLM",),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
)
