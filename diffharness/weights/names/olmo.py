"""`olmo`, `olmo2` (OLMo 2 and 3) and `olmoe`.

OLMo 1 has no tensors of norms, and Q and K rows permuted to interleaved rotary pairs; the others have rows as Hugging
Face has them, and no biases in any released model. OLMoE's epsilon is the config's here (the engine's converter writes
1e-5 whatever it is), and its graph never normalises the experts' weights: where a checkpoint does,
`expert_weights_norm` says so.
"""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import (
    ATTENTION_BIAS,
    attention_rules,
    bias_metadata,
    layer_norm_metadata,
    mlp_rules,
)
from diffharness.weights.names._config import expect_activation, need_int, rope_parameters
from diffharness.weights.names._keys import Keys, decoder_example, decoder_metadata, embedding_rules, vector
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._moe import PROJECTIONS, expert_rules
from diffharness.weights.names._sliding import GLOBAL, SLIDING, by_period
from diffharness.weights.source import Metadata

_PERIOD = 4  # of OLMo 3, whose last layer is global

# -- OLMo 1 ---------------------------------------------------------------------------------------------


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    out = layer_norm_metadata({**config, "layer_norm_eps": 1e-5}, "olmo") | bias_metadata(config)
    if config.get("clip_qkv") is not None:
        out["olmo.attention.clamp_kqv"] = float(config["clip_qkv"])
    return out


def rules(metadata: Metadata) -> list[TensorRule]:
    out = [rule for rule in embedding_rules(metadata) if rule.name != "output_norm.weight"]
    for il in range(Keys(metadata).n_layer):
        out += attention_rules(metadata, il, permuted=True, bias=metadata.get(ATTENTION_BIAS))
        out += mlp_rules(metadata, il)
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(sizes, "olmo", "OlmoForCausalLM", head_dim=None, rms_norm_eps=None, clip_qkv=0.8)


# -- OLMo 2 and 3 ---------------------------------------------------------------------------------------


def olmo2_metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    slides = config.get("model_type") == "olmo3"
    theta = 500000.0 if slides else 10000.0
    out = decoder_metadata({"rms_norm_eps": 1e-5, **config}, "olmo2", default_theta=theta) | bias_metadata(config)
    if not slides:
        return out
    n_layer = need_int(config, "num_hidden_layers")
    kinds = config.get("layer_types") or by_period(n_layer, _PERIOD)
    out["olmo2.attention.sliding_window"] = need_int({"sliding_window": 4096, **config}, "sliding_window")
    out["olmo2.attention.sliding_window_pattern"] = [kind == SLIDING for kind in kinds]
    per_kind = config.get("rope_parameters") or {}
    if isinstance(per_kind.get(SLIDING), dict):
        rope = rope_parameters(config, default_theta=theta, layer_type=SLIDING)
        if rope["rope_type"] != "default":
            raise CheckpointError(f"config.json: expected plain rope in sliding layers, found {rope['rope_type']!r}")
        if rope["rope_theta"] != out["olmo2.rope.freq_base"]:
            out["olmo2.rope.freq_base_swa"] = rope["rope_theta"]
    return out


def olmo2_rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    out = embedding_rules(metadata)
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        out += [
            *attention_rules(metadata, il, bias=metadata.get(ATTENTION_BIAS)),
            *_wide_norms(keys, blk, hf),
            vector(blk, "post_attention_norm", hf + "post_attention_layernorm", keys.n_embd),
            *mlp_rules(metadata, il),
            vector(blk, "post_ffw_norm", hf + "post_feedforward_layernorm", keys.n_embd),
        ]
    return out


def _wide_norms(keys: Keys, blk: str, hf: str) -> list[TensorRule]:
    return [
        vector(blk, "attn_q_norm", hf + "self_attn.q_norm", keys.n_head * keys.head_dim),
        vector(blk, "attn_k_norm", hf + "self_attn.k_norm", keys.n_head_kv * keys.head_dim),
    ]


def olmo2_example(sizes: Sizes) -> dict[str, Any]:
    yarn = {"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0, "original_max_position_embeddings": 40}
    kinds = {GLOBAL: yarn, SLIDING: {"rope_type": "default", "rope_theta": 5e3}}
    sliding: dict[str, Any] = {"sliding_window": sizes.window, "rope_theta": None, "rope_parameters": kinds}
    return decoder_example(sizes, "olmo3", "Olmo3ForCausalLM", head_dim=None, **sliding)


# -- OLMoE ----------------------------------------------------------------------------------------------


def olmoe_metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    if config.get("clip_qkv") is not None:
        raise CheckpointError("config.json: expected no `clip_qkv`, for which GGUF has no place in OLMoE")
    out = decoder_metadata({"rms_norm_eps": 1e-5, **config}, "olmoe") | bias_metadata(config)
    out["olmoe.expert_count"] = need_int({"num_experts": 64, **config}, "num_experts", "num_local_experts")
    out["olmoe.expert_used_count"] = need_int({"num_experts_per_tok": 8, **config}, "num_experts_per_tok")
    if config.get("norm_topk_prob"):
        out["olmoe.expert_weights_norm"] = True
    return out


def olmoe_rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    sizes = {"n_expert": keys.n_expert, "n_ff": keys.integer("feed_forward_length"), "n_embd": keys.n_embd}
    out = embedding_rules(metadata)
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", keys.n_embd),
            *attention_rules(metadata, il, bias=metadata.get(ATTENTION_BIAS)),
            *_wide_norms(keys, blk, hf),
            vector(blk, "ffn_norm", hf + "post_attention_layernorm", keys.n_embd),
            *expert_rules(blk, hf + "mlp.", PROJECTIONS, fused=hf + "mlp.", **sizes),
        ]
    return out


def olmoe_example(sizes: Sizes) -> dict[str, Any]:
    experts = {
        "num_experts": sizes.n_expert,
        "num_experts_per_tok": sizes.n_expert_used,
        "intermediate_size": sizes.n_ff_expert,
        "norm_topk_prob": False,
        "num_key_value_heads": sizes.n_head,  # the engine takes the norm of keys to be as wide as that of queries
    }
    return decoder_example(sizes, "olmoe", "OlmoeForCausalLM", head_dim=None, **experts)


MAPS = (
    ArchMap(
        arch="olmo",
        model_types=("olmo",),
        architectures=("OlmoForCausalLM",),
        metadata=metadata,
        rules=rules,
        example=example,
    ),
    ArchMap(
        arch="olmo2",
        model_types=("olmo2", "olmo3"),
        architectures=("Olmo2ForCausalLM", "Olmo3ForCausalLM"),
        metadata=olmo2_metadata,
        rules=olmo2_rules,
        example=olmo2_example,
    ),
    ArchMap(
        arch="olmoe",
        model_types=("olmoe",),
        architectures=("OlmoeForCausalLM",),
        metadata=olmoe_metadata,
        rules=olmoe_rules,
        example=olmoe_example,
    ),
)
