"""`glm4moe`: GLM-4.5 and 4.6. Layers that predict further tokens are kept as further blocks.

The larger model has norms of query and key heads (`use_qk_norm`), which a file tells by its tensors alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffharness.weights.names._blocks import ATTENTION_BIAS, attention_matrices
from diffharness.weights.names._config import need_int
from diffharness.weights.names._glm import glm_config, glm_metadata
from diffharness.weights.names._keys import Keys, decoder_example, embedding_rules, vector
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._shared_experts import (
    GATING,
    experts_config,
    experts_metadata,
    feed_forward_rules,
    n_main_layers,
    nextn_metadata,
    nextn_rules,
)
from diffharness.weights.source import Metadata

_ARCH = "glm4moe"
_HEAD_NORMS = "diffharness.head_norms"  # bool: norms of query and key heads


def metadata(config: Config) -> dict[str, Any]:
    return (
        glm_metadata(config, _ARCH, bias=False)
        | experts_metadata(config, _ARCH)
        | {
            f"{_ARCH}.expert_gating_func": GATING["sigmoid"],
            f"{_ARCH}.expert_weights_norm": bool(config.get("norm_topk_prob", True)),
            f"{_ARCH}.vocab_size": need_int(config, "vocab_size"),
            _HEAD_NORMS: bool(config.get("use_qk_norm", False)),
        }
        | nextn_metadata(config, _ARCH)
    )


def config(metadata: Metadata) -> dict[str, Any]:
    named = {"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe"}
    out = named | glm_config(metadata, _ARCH) | experts_config(Keys(metadata))
    return out | {"use_qk_norm": bool(metadata.get(_HEAD_NORMS, False))}


def rules(metadata: Metadata) -> list[TensorRule]:
    keys, out = Keys(metadata), embedding_rules(metadata)
    for il in range(keys.n_layer):
        hf = f"model.layers.{il}."
        layer = _layer(metadata, keys, il, hf)
        out += layer if il < n_main_layers(keys) else nextn_rules(keys, il, layer, hf)
    return out


def _layer(metadata: Metadata, keys: Keys, il: int, hf: str) -> list[TensorRule]:
    blk = f"blk.{il}."
    normed = metadata.get(_HEAD_NORMS)
    heads = [
        vector(blk, "attn_q_norm", hf + "self_attn.q_norm", keys.head_dim),
        vector(blk, "attn_k_norm", hf + "self_attn.k_norm", keys.head_dim),
    ]
    return [
        vector(blk, "attn_norm", hf + "input_layernorm", keys.n_embd),
        *attention_matrices(keys, blk, hf + "self_attn.", bias=metadata.get(ATTENTION_BIAS)),
        *(replace(rule, required=bool(normed)) for rule in heads if normed is not False),
        vector(blk, "post_attention_norm", hf + "post_attention_layernorm", keys.n_embd),
        *feed_forward_rules(keys, il, hf + "mlp.", bias="gate.e_score_correction_bias"),
    ]


def example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(
        sizes,
        "glm4_moe",
        "Glm4MoeForCausalLM",
        attention_bias=True,
        use_qk_norm=True,
        partial_rotary_factor=0.5,
        first_k_dense_replace=1,
        n_routed_experts=sizes.n_expert,
        num_experts_per_tok=sizes.n_expert_used,
        moe_intermediate_size=sizes.n_ff_expert,
        n_shared_experts=1,
        n_group=2 if sizes.n_expert % 2 == 0 else 1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
        num_nextn_predict_layers=0,
    )


MAP = ArchMap(
    arch=_ARCH,
    model_types=("glm4_moe",),
    architectures=("Glm4MoeForCausalLM",),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
)
