"""`deepseek2`: DeepSeek V2 and V3, Kimi K2, GLM-4.7-Flash.

The checkpoint's `kv_b_proj` holds, head by head, what expands the latent to a key and to a value. GGUF keeps the two
apart, the first transposed (`attn_k_b`, `attn_v_b`); files of before 2025 keep it whole (`attn_kv_b`), without the
keys `attention.key_length_mla` and `value_length_mla`. DeepSeek V3's layer for the prediction of a further token is
left out by the converter, GLM-4.7-Flash's is kept.
"""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import expect_activation, need_float, need_int, rope_parameters
from diffharness.weights.names._draw import by_width, normal
from diffharness.weights.names._keys import (
    Keys,
    decoder_config,
    decoder_example,
    decoder_metadata,
    embedding_rules,
    matrix,
    vector,
)
from diffharness.weights.names._map import ArchMap, Config, Piece, Sizes, TensorRule
from diffharness.weights.names._shared_experts import (
    GATING,
    experts_config,
    experts_metadata,
    feed_forward_rules,
    fused_pair_rules,
    gating_code,
    n_main_layers,
    nextn_metadata,
    nextn_rules,
)
from diffharness.weights.source import Metadata

_ARCH = "deepseek2"
_V2, _V3, _GLM = "deepseek_v2", "deepseek_v3", "glm4_moe_lite"
# What the classes assume of experts where a config.json leaves a key out.
_DEFAULTS: dict[str, dict[str, Any]] = {
    _V2: {"n_shared_experts": 2},
    _V3: {
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
    },
    _GLM: {"first_k_dense_replace": 1, "n_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.8},
}


def metadata(config: Config) -> dict[str, Any]:
    config = {**_DEFAULTS.get(str(config.get("model_type")), {}), **config}
    _expect_a_gguf_form(config)
    n_rot, rank = need_int(config, "qk_rope_head_dim"), need_int(config, "kv_lora_rank")
    out = decoder_metadata(config, _ARCH) | {
        f"{_ARCH}.attention.head_count_kv": 1,  # the latent, which all heads share
        f"{_ARCH}.attention.key_length": rank + n_rot,
        f"{_ARCH}.attention.value_length": rank,
        f"{_ARCH}.attention.key_length_mla": need_int(config, "qk_nope_head_dim") + n_rot,
        f"{_ARCH}.attention.value_length_mla": need_int(config, "v_head_dim"),
        f"{_ARCH}.attention.kv_lora_rank": rank,
        f"{_ARCH}.rope.dimension_count": n_rot,
        **_routing(config),
    }
    if config.get("q_lora_rank") is not None:
        out[f"{_ARCH}.attention.q_lora_rank"] = need_int(config, "q_lora_rank")
    rope = rope_parameters(config, default_theta=10000.0)
    if rope["rope_type"] == "yarn" and rope.get("mscale_all_dim"):
        out[f"{_ARCH}.rope.scaling.yarn_log_multiplier"] = 0.1 * need_float(rope, "mscale_all_dim")
        if rope.get("mscale") == rope["mscale_all_dim"] and rope.get("attention_factor") is None:
            out.pop(f"{_ARCH}.rope.scaling.yarn_attn_factor", None)  # 1, as the engine takes it to be
    return out | (nextn_metadata(config, _ARCH) if config.get("model_type") == _GLM else {})


def _routing(config: Config) -> dict[str, Any]:
    out = experts_metadata(config, _ARCH)
    gates = "softmax" if config.get("model_type") == _V2 else "sigmoid"
    out[f"{_ARCH}.expert_gating_func"] = gating_code(config, "scoring_func", default=gates)
    if config.get("norm_topk_prob") and config.get("model_type") != _V2:
        out[f"{_ARCH}.expert_weights_norm"] = True
    return out


def _expect_a_gguf_form(config: Config) -> None:
    expect_activation(config, "silu")
    wanted = {"attention_bias": (False, None), "rope_interleave": (True, None), "moe_layer_freq": (1, None)}
    for key, values in wanted.items():
        if config.get(key) not in values:
            raise CheckpointError(f"config.json: `{key}`: expected {values[0]}, found {config[key]!r}")
    if config.get("model_type") == _V2 and config.get("topk_method") == "greedy" and (config.get("n_group") or 1) > 1:
        raise CheckpointError("config.json: groups of experts that the choice (topk_method greedy) leaves aside")


def config(metadata: Metadata) -> dict[str, Any]:
    keys = Keys(metadata)
    v2 = keys.get("expert_gating_func") == GATING["softmax"]
    kind = (_V2, "DeepseekV2ForCausalLM") if v2 else ("deepseek_v3", "DeepseekV3ForCausalLM")
    if keys.get("nextn_predict_layers"):
        kind = (_GLM, "Glm4MoeLiteForCausalLM")
    n_rot, rank = keys.integer("rope.dimension_count"), keys.integer("attention.kv_lora_rank")
    out = decoder_config(metadata, _ARCH) | experts_config(keys)
    del out["head_dim"]
    if log_multiplier := keys.get("rope.scaling.yarn_log_multiplier"):
        scale = {"mscale": 10 * log_multiplier, "mscale_all_dim": 10 * log_multiplier}
        out["rope_scaling"] = {**out.get("rope_scaling", {}), **scale}
    return out | {
        "model_type": kind[0],
        "architectures": [kind[1]],
        "hidden_act": "silu",
        "num_key_value_heads": keys.n_head,
        "kv_lora_rank": rank,
        "q_lora_rank": keys.get("attention.q_lora_rank"),
        "qk_rope_head_dim": n_rot,
        "qk_nope_head_dim": _size(keys, "key") - n_rot,
        "v_head_dim": _size(keys, "value"),
        "scoring_func": "softmax" if v2 else "sigmoid",
        "topk_method": ("group_limited_greedy" if out["n_group"] > 1 else "greedy") if v2 else "noaux_tc",
    }


def rules(metadata: Metadata) -> list[TensorRule]:
    keys, out = Keys(metadata), embedding_rules(metadata)
    n_main = n_main_layers(keys)
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        mlp = feed_forward_rules(keys, il, hf + "mlp.", bias="gate.e_score_correction_bias")
        layer = [
            vector(blk, "attn_norm", hf + "input_layernorm", keys.n_embd),
            *_attention(keys, blk, hf + "self_attn."),
            vector(blk, "ffn_norm", hf + "post_attention_layernorm", keys.n_embd),
            *fused_pair_rules(mlp, blk),
        ]
        out += layer if il < n_main else nextn_rules(keys, il, layer, hf)
    return out


def _attention(keys: Keys, blk: str, hf: str) -> list[TensorRule]:
    n_embd, n_head = keys.n_embd, keys.n_head
    rank, n_rot = keys.integer("attention.kv_lora_rank"), keys.integer("rope.dimension_count")
    size_k, size_v = _size(keys, "key"), _size(keys, "value")
    rank_q = keys.integer("attention.q_lora_rank", 0)
    if rank_q:
        out = [
            *matrix(blk, "attn_q_a", hf + "q_a_proj", rank_q, n_embd),
            vector(blk, "attn_q_a_norm", hf + "q_a_layernorm", rank_q),
            *matrix(blk, "attn_q_b", hf + "q_b_proj", n_head * size_k, rank_q),
        ]
    else:
        out = matrix(blk, "attn_q", hf + "q_proj", n_head * size_k, n_embd)
    expand = _expand if _is_absorbed(keys) else _expand_whole
    return [
        *out,
        *matrix(blk, "attn_kv_a_mqa", hf + "kv_a_proj_with_mqa", rank + n_rot, n_embd),
        vector(blk, "attn_kv_a_norm", hf + "kv_a_layernorm", rank),
        *expand(blk, hf + "kv_b_proj.weight", n_head, size_k - n_rot, size_v, rank),
        *matrix(blk, "attn_output", hf + "o_proj", n_embd, n_head * size_v),
    ]


def _is_absorbed(keys: Keys) -> bool:
    return keys.integer("attention.key_length_mla", 0) != 0


def _size(keys: Keys, of: str) -> int:
    """Components of an expanded head's `key` or `value`."""
    return keys.integer(f"attention.{of}_length" + ("_mla" if _is_absorbed(keys) else ""))


def _expand(blk: str, hf: str, n_head: int, n_nope: int, size_v: int, rank: int) -> list[TensorRule]:
    """`attn_k_b` [H, rank, n_nope] and `attn_v_b` [H, size_v, rank], each a part of every head's rows."""
    whole, n = (n_head * (n_nope + size_v), rank), n_nope + size_v
    k = Piece(whole, lambda w: w.reshape(n_head, n, rank)[:, :n_nope].transpose(0, 2, 1))
    v = Piece(whole, lambda w: w.reshape(n_head, n, rank)[:, n_nope:])
    heads = (n_head,) if n_head > 1 else ()  # GGUF has no trailing axes of 1
    return [
        TensorRule(blk + "attn_k_b.weight", (*heads, rank, n_nope), (hf,), k, draw=normal(1.3 / rank**0.5)),
        TensorRule(blk + "attn_v_b.weight", (*heads, size_v, rank), (hf,), v, draw=by_width()),
    ]


def _expand_whole(blk: str, hf: str, n_head: int, n_nope: int, size_v: int, rank: int) -> list[TensorRule]:
    """`attn_kv_b`, the checkpoint's very matrix."""
    return [TensorRule(blk + "attn_kv_b.weight", (n_head * (n_nope + size_v), rank), (hf,))]


def example(sizes: Sizes) -> dict[str, Any]:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32, "beta_slow": 1}
    groups = 2 if sizes.n_expert % 2 == 0 else 1
    return decoder_example(
        sizes,
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        rms_norm_eps=1e-6,  # what the norms of latents have, whatever is said here
        num_key_value_heads=sizes.n_head,
        head_dim=None,
        q_lora_rank=2 * sizes.n_embd,
        kv_lora_rank=sizes.n_embd,
        qk_nope_head_dim=sizes.head_dim * 3 // 4,
        qk_rope_head_dim=sizes.head_dim // 2,
        v_head_dim=sizes.head_dim,
        rope_scaling={"type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0, **scaling},
        first_k_dense_replace=1,
        n_routed_experts=sizes.n_expert,
        num_experts_per_tok=sizes.n_expert_used,
        moe_intermediate_size=sizes.n_ff_expert,
        n_shared_experts=2,
        n_group=groups,
        topk_group=1,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )


MAP = ArchMap(
    arch=_ARCH,
    model_types=(_V3, _V2, "kimi_k2", _GLM),
    architectures=("DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM", "Glm4MoeLiteForCausalLM"),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
    ignored=("model.layers.61.",),  # DeepSeek V3's further token: used by nothing, and kept by no converter
)
