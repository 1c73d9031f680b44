"""`minimax-m2`: MiniMax M2. Tensors in Mixtral's words, norms over all heads, a bias on the choice of experts."""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import attention_rules
from diffharness.weights.names._config import expect_activation, need_int
from diffharness.weights.names._draw import normal
from diffharness.weights.names._keys import (
    Keys,
    decoder_config,
    decoder_example,
    decoder_metadata,
    embedding_rules,
    vector,
)
from diffharness.weights.names._map import PLAIN, ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._moe import MIXTRAL, expert_rules
from diffharness.weights.names._shared_experts import GATING
from diffharness.weights.source import Metadata

_ARCH = "minimax-m2"
_THETA = 5e6


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    wanted = {"scoring_func": "sigmoid", "use_qk_norm": True, "qk_norm_type": "per_layer", "use_routing_bias": True}
    for key, value in wanted.items():
        if config.get(key, value) != value:
            raise CheckpointError(f"config.json: `{key}`: expected {value}, found {config[key]!r}")
    out = decoder_metadata(config, _ARCH, default_theta=_THETA, head_dim=128)
    size = Keys(out).head_dim
    rope = config.get("rope_parameters") or {}
    share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return out | {
        f"{_ARCH}.rope.dimension_count": int(config.get("rotary_dim") or size * share),
        f"{_ARCH}.expert_count": need_int(config, "num_local_experts", "num_experts"),
        f"{_ARCH}.expert_used_count": need_int(config, "num_experts_per_tok"),
        f"{_ARCH}.expert_feed_forward_length": need_int(config, "intermediate_size"),
        f"{_ARCH}.expert_gating_func": GATING["sigmoid"],
    }


def config(metadata: Metadata) -> dict[str, Any]:
    keys = Keys(metadata)
    n_rot = keys.integer("rope.dimension_count", keys.head_dim)
    return decoder_config(metadata, _ARCH) | {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "hidden_act": "silu",
        "num_local_experts": keys["expert_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "scoring_func": "sigmoid",
        "use_qk_norm": True,
        "rotary_dim": n_rot,
        "partial_rotary_factor": n_rot / keys.head_dim,
    }


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, n_expert, n_ff = keys.n_embd, keys.n_expert, keys.integer("feed_forward_length")
    out = embedding_rules(metadata)
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        moe, fused = hf + "block_sparse_moe.", hf + "mlp."
        bias = TensorRule(
            blk + "exp_probs_b.bias",
            (n_expert,),
            (moe + "e_score_correction_bias",),
            aliases=(((fused + "e_score_correction_bias",), PLAIN),),
            draw=normal(0.3),
        )
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", n_embd),
            *attention_rules(metadata, il, bias=None),
            vector(blk, "attn_q_norm", hf + "self_attn.q_norm", keys.n_head * keys.head_dim),
            vector(blk, "attn_k_norm", hf + "self_attn.k_norm", keys.n_head_kv * keys.head_dim),
            vector(blk, "ffn_norm", hf + "post_attention_layernorm", n_embd),
            *expert_rules(blk, moe, MIXTRAL, fused=fused, n_expert=n_expert, n_ff=n_ff, n_embd=n_embd),
            bias,
        ]
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(
        sizes,
        "minimax_m2",
        "MiniMaxM2ForCausalLM",
        intermediate_size=sizes.n_ff_expert,
        num_local_experts=sizes.n_expert,
        num_experts_per_tok=sizes.n_expert_used,
        scoring_func="sigmoid",
        use_qk_norm=True,
        rotary_dim=sizes.head_dim // 2,
    )


MAP = ArchMap(
    arch=_ARCH,
    model_types=("minimax_m2",),
    architectures=("MiniMaxM2ForCausalLM",),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
)
