"""`bailingmoe2`: Ling and Ring 2.0, as their published code has them. Queries, keys and values stay one matrix.

Layers that predict further tokens are kept as further blocks, with a norm of their own at the end.
"""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import need_int
from diffharness.weights.names._gpt import rotated_share
from diffharness.weights.names._keys import Keys, decoder_example, decoder_metadata, matrix, vector
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._shared_experts import (
    GATING,
    expert_width,
    experts_metadata,
    feed_forward_rules,
    gating_code,
    n_main_layers,
    nextn_metadata,
    nextn_rules,
)
from diffharness.weights.names.bailingmoe import bailing_config, ends, expect_bailing
from diffharness.weights.source import Metadata

_ARCH = "bailingmoe2"
_SHARE = 0.5  # of a head's components turns, where config.json does not say


def metadata(config: Config) -> dict[str, Any]:
    expect_bailing(config)
    out = decoder_metadata(config, _ARCH) | experts_metadata(config, _ARCH)
    keys = Keys(out)
    if keys.n_head * keys.head_dim != keys.n_embd:
        raise CheckpointError(
            f"config.json: expected heads as wide as the model ({keys.n_embd}), found {keys.n_head} of {keys.head_dim}"
        )
    n_shared = keys.integer("expert_shared_count")
    wide = config.get("moe_shared_expert_intermediate_size") or need_int(config, "moe_intermediate_size") * n_shared
    return (
        out
        | {
            f"{_ARCH}.rope.dimension_count": int(keys.head_dim * rotated_share(config, _SHARE)),
            f"{_ARCH}.expert_shared_feed_forward_length": wide // max(1, n_shared),
            f"{_ARCH}.expert_weights_norm": bool(config.get("norm_topk_prob", True)),
            f"{_ARCH}.expert_gating_func": gating_code(
                config, "score_function", "moe_router_activation", default="sigmoid"
            ),
        }
        | nextn_metadata(config, _ARCH)
    )


def config(metadata: Metadata) -> dict[str, Any]:
    keys = Keys(metadata)
    named = {"architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe_v2"}
    width = keys.integer("expert_shared_feed_forward_length", 0) or expert_width(keys, keys.n_layer - 1)
    return (
        named
        | bailing_config(metadata, _ARCH)
        | {
            "moe_shared_expert_intermediate_size": width * keys.integer("expert_shared_count", 0),
            "partial_rotary_factor": keys.integer("rope.dimension_count", keys.head_dim) / keys.head_dim,
            "score_function": "softmax" if keys.get("expert_gating_func") == GATING["softmax"] else "sigmoid",
            "use_qk_norm": True,
        }
    )


def rules(metadata: Metadata) -> list[TensorRule]:
    keys, out = Keys(metadata), ends(metadata)
    for il in range(keys.n_layer):
        hf = f"model.layers.{il}."
        layer = _layer(keys, il, hf)
        if il >= n_main_layers(keys):
            layer += [vector(f"blk.{il}.", "layer_output_norm", hf + "final_layernorm", keys.n_embd)]
            layer = nextn_rules(keys, il, layer, hf)
        out += layer
    return out


def _layer(keys: Keys, il: int, hf: str) -> list[TensorRule]:
    blk, attn, size = f"blk.{il}.", hf + "attention.", keys.head_dim
    rows = (keys.n_head + 2 * keys.n_head_kv) * size
    width = keys.integer("expert_shared_feed_forward_length", 0) or expert_width(keys, il)
    return [
        vector(blk, "attn_norm", hf + "input_layernorm", keys.n_embd),
        *matrix(blk, "attn_qkv", attn + "query_key_value", rows, keys.n_embd),
        vector(blk, "attn_q_norm", attn + "query_layernorm", size),
        vector(blk, "attn_k_norm", attn + "key_layernorm", size),
        *matrix(blk, "attn_output", attn + "dense", keys.n_embd, keys.n_head * size),
        vector(blk, "ffn_norm", hf + "post_attention_layernorm", keys.n_embd),
        *feed_forward_rules(
            keys,
            il,
            hf + "mlp.",
            bias="gate.expert_bias",
            n_ff_shared=width * keys.integer("expert_shared_count", 0),
        ),
    ]


def example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(
        sizes,
        "bailing_moe_v2",
        "BailingMoeV2ForCausalLM",
        head_dim=sizes.n_embd // sizes.n_head,
        first_k_dense_replace=1,
        num_experts=sizes.n_expert,
        num_experts_per_tok=sizes.n_expert_used,
        moe_intermediate_size=sizes.n_ff_expert,
        num_shared_experts=1,
        n_group=2 if sizes.n_expert % 2 == 0 else 1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        score_function="sigmoid",
        partial_rotary_factor=0.5,
        num_nextn_predict_layers=0,
        use_bias=False,
        use_qkv_bias=False,
        use_qk_norm=True,
    )


MAP = ArchMap(
    arch=_ARCH,
    model_types=("bailing_moe_v2",),
    architectures=("BailingMoeV2ForCausalLM",),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
    transformers=False,
    otherwise="put together of its parts",
)
