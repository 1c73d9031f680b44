"""`dots1`: dots.llm1. Rows in Hugging Face's order, norms of heads, experts as DeepSeek V3 names them.

The model's config calls its way of choosing experts `noaux_tc`: by sigmoid and bias. A sliding window is part of the
model where `layer_types` names one, although the engine's graph has none; no released model does.
"""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import attention_matrices
from diffharness.weights.names._config import expect_activation, need_int
from diffharness.weights.names._keys import (
    Keys,
    decoder_config,
    decoder_example,
    decoder_metadata,
    embedding_rules,
    vector,
)
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._shared_experts import GATING, experts_config, experts_metadata, feed_forward_rules
from diffharness.weights.names._sliding import GLOBAL, SLIDING
from diffharness.weights.source import Metadata

_ARCH = "dots1"


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    if config.get("attention_bias"):
        raise CheckpointError("config.json: `attention_bias`: expected false, found true: GGUF has no such dots1 model")
    return (
        decoder_metadata(config, _ARCH)
        | experts_metadata(config, _ARCH)
        | {
            f"{_ARCH}.expert_gating_func": GATING["sigmoid"],
            f"{_ARCH}.expert_weights_norm": bool(config.get("norm_topk_prob", False)),
        }
        | _window(config)
    )


def _window(config: Config) -> dict[str, Any]:
    types = config.get("layer_types") or []
    slides = [kind == SLIDING for kind in types]
    if not any(slides):
        return {}
    return {
        f"{_ARCH}.attention.sliding_window": need_int(config, "sliding_window"),
        f"{_ARCH}.attention.sliding_window_pattern": slides,
    }


def config(metadata: Metadata) -> dict[str, Any]:
    keys = Keys(metadata)
    out = decoder_config(metadata, _ARCH) | experts_config(keys)
    slides = keys.by_layer("attention.sliding_window_pattern", 0)
    return out | {
        "architectures": ["Dots1ForCausalLM"],
        "model_type": "dots1",
        "hidden_act": "silu",
        "scoring_func": "noaux_tc",
        "sliding_window": keys.get("attention.sliding_window"),
        "layer_types": [SLIDING if slide else GLOBAL for slide in slides],
    }


def rules(metadata: Metadata) -> list[TensorRule]:
    keys, out = Keys(metadata), embedding_rules(metadata)
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", keys.n_embd),
            *attention_matrices(keys, blk, hf + "self_attn."),
            vector(blk, "attn_q_norm", hf + "self_attn.q_norm", keys.head_dim),
            vector(blk, "attn_k_norm", hf + "self_attn.k_norm", keys.head_dim),
            vector(blk, "ffn_norm", hf + "post_attention_layernorm", keys.n_embd),
            *feed_forward_rules(keys, il, hf + "mlp.", bias="gate.e_score_correction_bias"),
        ]
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(
        sizes,
        "dots1",
        "Dots1ForCausalLM",
        num_key_value_heads=sizes.n_head,
        first_k_dense_replace=1,
        n_routed_experts=sizes.n_expert,
        num_experts_per_tok=sizes.n_expert_used,
        moe_intermediate_size=sizes.n_ff_expert,
        n_shared_experts=2,
        n_group=2 if sizes.n_expert % 2 == 0 else 1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        scoring_func="noaux_tc",
    )


MAP = ArchMap(
    arch=_ARCH,
    model_types=("dots1",),
    architectures=("Dots1ForCausalLM",),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
)
