"""`hunyuan-dense`, `hunyuan-moe`: Tencent's Hunyuan V1.

`dynamic` rope with an `alpha` is a fixed stretch of the base, which is what GGUF keeps, in float32. As the engine's
converter does, the context is then given as 256k, whatever config.json says. In the MoE an expert is as wide as the
shared one, which the engine's loader takes for granted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import attention_rules, gated_matrices
from diffharness.weights.names._config import expect_activation, need_int, rope_parameters, without_rope
from diffharness.weights.names._keys import (
    Keys,
    decoder_config,
    decoder_example,
    decoder_metadata,
    embedding_rules,
    vector,
)
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._moe import PROJECTIONS, expert_rules
from diffharness.weights.source import Metadata

_DENSE, _MOE = "hunyuan-dense", "hunyuan-moe"
_STRETCHED_CONTEXT = 256 * 1024


def metadata(config: Config) -> dict[str, Any]:
    return _metadata(config, _DENSE)


def moe_metadata(config: Config) -> dict[str, Any]:
    n_ff, n_shared = need_int(config, "intermediate_size"), _same(config, "num_shared_expert", 1)
    if _same(config, "moe_intermediate_size", n_ff) != n_ff:
        raise CheckpointError(
            f"config.json: `moe_intermediate_size`: expected `intermediate_size`, {n_ff}, found "
            f"{config['moe_intermediate_size']!r}"
        )
    return _metadata(config, _MOE) | {
        f"{_MOE}.expert_count": _same(config, "num_experts"),
        f"{_MOE}.expert_used_count": _same(config, "moe_topk"),
        f"{_MOE}.expert_feed_forward_length": n_ff,
        f"{_MOE}.expert_shared_count": n_shared,
        f"{_MOE}.expert_shared_feed_forward_length": n_ff * n_shared,
    }


def _same(config: Config, key: str, default: int | None = None) -> int:
    """A number that config.json gives once, or once for every layer."""
    found = config.get(key, default)
    values = found if isinstance(found, list) and found else [found]
    if len(set(values)) != 1:
        raise CheckpointError(f"config.json: `{key}`: expected the same for every layer, found {values!r}")
    return need_int({key: values[0]}, key)


def _metadata(config: Config, arch: str) -> dict[str, Any]:
    expect_activation(config, "silu")
    for key, wanted in (("attention_bias", False), ("mlp_bias", False), ("use_qk_norm", True), ("use_cla", False)):
        if config.get(key, wanted) != wanted:
            raise CheckpointError(f"config.json: `{key}`: expected {wanted}, found {config[key]!r}")
    rope = rope_parameters(config, default_theta=10000.0)
    plain = without_rope(config)
    if not plain.get("head_dim") and config.get("attention_head_dim"):
        plain["head_dim"] = config["attention_head_dim"]
    stretched = rope["rope_type"] == "dynamic" and rope.get("alpha")
    if stretched:
        size = int(plain.get("head_dim") or need_int(config, "hidden_size") // need_int(config, "num_attention_heads"))
        base = np.float32(rope["rope_theta"] * float(rope["alpha"]) ** (size / (size - 2)))
        rope = {"rope_type": "default", "rope_theta": float(base)}
    out = decoder_metadata(plain | {"rope_parameters": rope}, arch)
    if stretched:
        out |= {
            f"{arch}.context_length": _STRETCHED_CONTEXT,
            f"{arch}.rope.scaling.type": "none",
            f"{arch}.rope.scaling.factor": 1.0,
            f"{arch}.rope.scaling.original_context_length": _STRETCHED_CONTEXT,
        }
    return out


def config(metadata: Metadata) -> dict[str, Any]:
    named = {"architectures": ["HunYuanDenseV1ForCausalLM"], "model_type": "hunyuan_v1_dense", "hidden_act": "silu"}
    return named | decoder_config(metadata, _DENSE) | {"attention_bias": False}


def moe_config(metadata: Metadata) -> dict[str, Any]:
    keys = Keys(metadata)
    n_ff = keys.integer("feed_forward_length")
    return decoder_config(metadata, _MOE) | {
        "architectures": ["HunYuanMoEV1ForCausalLM"],
        "model_type": "hunyuan_v1_moe",
        "hidden_act": "silu",
        "attention_bias": False,
        "num_experts": keys.n_expert,
        "moe_topk": keys["expert_used_count"],
        "moe_intermediate_size": n_ff,
        "num_shared_expert": (keys.integer("expert_shared_feed_forward_length", 0) or n_ff) // n_ff,
    }


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    out = embedding_rules(metadata)
    for il in range(keys.n_layer):
        n_ff = keys.integer("feed_forward_length")
        out += _layer_rules(metadata, il)
        out += gated_matrices(f"blk.{il}.", f"model.layers.{il}.mlp.", n_ff, keys.n_embd)
    return out


def moe_rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_ff = keys.integer("feed_forward_length")
    sizes: Mapping[str, int] = {"n_expert": keys.n_expert, "n_ff": n_ff, "n_embd": keys.n_embd}
    shared = keys.integer("expert_shared_feed_forward_length", 0) or n_ff
    out = embedding_rules(metadata)
    for il in range(keys.n_layer):
        blk, mlp = f"blk.{il}.", f"model.layers.{il}.mlp."
        router, *stacks = expert_rules(blk, mlp, PROJECTIONS, fused=mlp, **sizes)
        out += [
            *_layer_rules(metadata, il),
            replace(router, hf=(mlp + "gate.wg.weight",)),
            *stacks,
            *gated_matrices(blk, mlp + "shared_mlp.", shared, keys.n_embd, suffix="_shexp"),
        ]
    return out


def _layer_rules(metadata: Metadata, il: int) -> list[TensorRule]:
    """Norms and attention."""
    keys = Keys(metadata)
    blk, hf, n_embd = f"blk.{il}.", f"model.layers.{il}.", keys.n_embd
    return [
        vector(blk, "attn_norm", hf + "input_layernorm", n_embd),
        *attention_rules(metadata, il, bias=None),
        vector(blk, "attn_q_norm", hf + "self_attn.query_layernorm", keys.head_dim),
        vector(blk, "attn_k_norm", hf + "self_attn.key_layernorm", keys.head_dim),
        vector(blk, "ffn_norm", hf + "post_attention_layernorm", n_embd),
    ]


_STRETCH = {"rope_type": "dynamic", "alpha": 40.0, "factor": 1.0, "rope_theta": 500.0}


def example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(
        sizes, "hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", rope_theta=None, rope_parameters=_STRETCH
    )


def moe_example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(
        sizes,
        "hunyuan_v1_moe",
        "HunYuanMoEV1ForCausalLM",
        rope_theta=None,
        rope_parameters=_STRETCH,
        num_experts=sizes.n_expert,
        moe_topk=sizes.n_expert_used,
        moe_intermediate_size=sizes.n_ff,
        num_shared_expert=1,
    )


MAPS = (
    ArchMap(
        arch=_DENSE,
        model_types=("hunyuan_v1_dense",),
        architectures=("HunYuanDenseV1ForCausalLM",),
        metadata=metadata,
        config=config,
        rules=rules,
        example=example,
    ),
    ArchMap(
        arch=_MOE,
        model_types=("hunyuan_v1_moe", "hunyuan"),
        architectures=("HunYuanMoEV1ForCausalLM",),
        metadata=moe_metadata,
        config=moe_config,
        rules=moe_rules,
        example=moe_example,
    ),
)
