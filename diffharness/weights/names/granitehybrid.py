"""`granitehybrid`: Granite 4 with recurrent layers, and Bamba.

Granite keeps gate and up of its MLP, and of all experts, in one tensor each; Bamba's are apart. Granite without
recurrent layers is another architecture in GGUF (`granite`, `granitemoe`), in the same words of config.json.

Q and K rows are permuted to interleaved rotary pairs. Of Bamba's heads only a part turns, and only its rows are
permuted: the engine's converter pairs rows of the whole head, which makes another model of Bamba.
"""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import ATTENTION_BIAS, bias_metadata, gated_matrices
from diffharness.weights.names._config import expect_activation, need_int, rope_parameters
from diffharness.weights.names._keys import (
    Keys,
    decoder_example,
    decoder_metadata,
    head_rules,
    matrix,
    rope_freqs_rule,
    vector,
)
from diffharness.weights.names._mamba import expect_unlimited
from diffharness.weights.names._mamba import head_rules as mixer_rules
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._reorder import PartPairs
from diffharness.weights.names.granite import HYBRID, attends, expert_rules, scales, shared_mlp_rules, turns
from diffharness.weights.source import Metadata

_ARCH = "granitehybrid"
_BAMBA = "diffharness.bamba"  # bool: tensors have Bamba's names
_CONTEXT = 1 << 20  # what the engine's converter states where no position is ever used


# -- keys -------------------------------------------------------------------------------------------------


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    expect_unlimited(config)
    bamba = config.get("model_type") == "bamba"
    by_layer = attends(config)
    if all(by_layer):
        raise CheckpointError("config.json: expected recurrent layers: without them GGUF calls the model another")
    if config.get("mamba_proj_bias") or not config.get("mamba_conv_bias", True):
        raise CheckpointError("config.json: expected a bias in the mixers' convolution and none in their projections")
    out = decoder_metadata(config, _ARCH)
    keys = Keys(out)
    size, inner = keys.head_dim, (config.get("mamba_expand") or 2) * keys.n_embd
    rope = bamba or turns(config)
    share = _rotary_share(config) if bamba else 1.0
    kv = keys.n_head_kv
    out |= {
        f"{_ARCH}.attention.head_count_kv": [kv if attention else 0 for attention in by_layer],
        f"{_ARCH}.rope.dimension_count": int(size * share),
        f"{_ARCH}.rope.scaling.finetuned": rope,
        f"{_ARCH}.ssm.conv_kernel": config.get("mamba_d_conv") or 4,
        f"{_ARCH}.ssm.state_size": config.get("mamba_d_state") or 256,
        f"{_ARCH}.ssm.group_count": config.get("mamba_n_groups") or 1,
        f"{_ARCH}.ssm.inner_size": inner,
        f"{_ARCH}.ssm.time_step_rank": need_int(config, "mamba_n_heads"),
        _BAMBA: bamba,
        **bias_metadata(config),
    }
    if not rope:
        out[f"{_ARCH}.context_length"] = _CONTEXT
    if bamba:
        return out
    return out | _granite_metadata(config, keys.integer("feed_forward_length"))


def _granite_metadata(config: Config, n_ff: int) -> dict[str, Any]:
    """Scales and experts."""
    out: dict[str, Any] = {**scales(config, _ARCH)}
    n_shared = need_int(config, "shared_intermediate_size")
    if config.get("num_local_experts"):
        out[f"{_ARCH}.expert_count"] = need_int(config, "num_local_experts")
        out[f"{_ARCH}.expert_used_count"] = need_int(config, "num_experts_per_tok")
        out[f"{_ARCH}.expert_shared_feed_forward_length"] = n_shared
    elif n_shared != n_ff:
        raise CheckpointError(f"config.json: `shared_intermediate_size`: GGUF has {n_ff} for it, found {n_shared}")
    return out


def _rotary_share(config: Config) -> float:
    """Bamba turns a part of each head: as the new form of a config says it, or as the number of components."""
    rope = rope_parameters(config, default_theta=10000.0)
    if share := rope.get("partial_rotary_factor") or config.get("partial_rotary_factor"):
        return float(share)
    size = need_int(config, "hidden_size") // need_int(config, "num_attention_heads")
    return float(config["attn_rotary_emb"]) / size if config.get("attn_rotary_emb") else 0.5


# -- tensors ----------------------------------------------------------------------------------------------


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    bamba, n_embd = bool(metadata.get(_BAMBA)), keys.n_embd
    final = "model.final_layernorm" if bamba else "model.norm"
    out = [
        TensorRule("token_embd.weight", (keys.n_vocab, n_embd), ("model.embed_tokens.weight",)),
        TensorRule("output_norm.weight", (n_embd,), (final + ".weight",)),
        *head_rules(metadata),
        rope_freqs_rule(metadata, keys.integer("rope.dimension_count", keys.head_dim)),
    ]
    n_kv = keys.by_layer("attention.head_count_kv")
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        norm = "pre_ff_layernorm" if bamba else "post_attention_layernorm"
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", n_embd),
            *(_attention(metadata, il, blk, hf) if n_kv[il] else mixer_rules(keys, blk, hf + "mamba.")),
            vector(blk, "ffn_norm", hf + norm, n_embd),
        ]
        if bamba:
            out += gated_matrices(blk, hf + "feed_forward.", keys.integer("feed_forward_length"), n_embd)
        else:
            out += _granite_feed_forward(metadata, blk, hf)
    return out


def _attention(metadata: Metadata, il: int, blk: str, hf: str) -> list[TensorRule]:
    keys, attn = Keys(metadata), hf + "self_attn."
    bias = bool(metadata.get(ATTENTION_BIAS)) or None
    n_head, n_kv = keys.by_layer("attention.head_count")[il], keys.by_layer("attention.head_count_kv")[il]
    n_embd, q, kv = keys.n_embd, n_head * keys.head_dim, n_kv * keys.head_dim
    n_rot = keys.integer("rope.dimension_count", keys.head_dim)
    return [
        *matrix(blk, "attn_q", attn + "q_proj", q, n_embd, layout=PartPairs(n_head, n_rot), bias=bias),
        *matrix(blk, "attn_k", attn + "k_proj", kv, n_embd, layout=PartPairs(n_kv, n_rot), bias=bias),
        *matrix(blk, "attn_v", attn + "v_proj", kv, n_embd, bias=bias),
        *matrix(blk, "attn_output", attn + "o_proj", n_embd, q, bias=bias),
    ]


def _granite_feed_forward(metadata: Metadata, blk: str, hf: str) -> list[TensorRule]:
    keys = Keys(metadata)
    if keys.n_expert:
        return expert_rules(keys, blk, hf)
    n_embd, n_ff = keys.n_embd, keys.integer("feed_forward_length")
    biases = (("gate", n_ff), ("up", n_ff), ("down", n_embd))
    return [
        *shared_mlp_rules(blk, "", hf + "shared_mlp.", n_ff, n_embd),
        *(TensorRule(f"{blk}ffn_{part}.bias", (n,), required=False) for part, n in biases),
    ]


# -- synthetic models -------------------------------------------------------------------------------------


def example(sizes: Sizes) -> dict[str, Any]:
    kinds = ["full_attention" if il % 4 == 2 else "linear_attention" for il in range(sizes.n_layer)]
    return decoder_example(
        sizes,
        HYBRID,
        "GraniteMoeHybridForCausalLM",
        head_dim=None,
        intermediate_size=sizes.n_ff_expert,
        shared_intermediate_size=sizes.n_ff,
        num_local_experts=sizes.n_expert,
        num_experts_per_tok=sizes.n_expert_used,
        layer_types=kinds,
        embedding_multiplier=3.0,
        attention_multiplier=0.1,
        residual_multiplier=0.35,
        logits_scaling=2.5,
        position_embedding_type="nope",
        mamba_n_heads=8,
        mamba_d_head=sizes.n_embd // 4,
        mamba_n_groups=2,
        mamba_d_state=16,
        mamba_d_conv=4,
        mamba_expand=2,
    )


MAP = ArchMap(
    arch=_ARCH,
    model_types=(HYBRID, "bamba"),
    architectures=("GraniteMoeHybridForCausalLM", "BambaForCausalLM"),
    metadata=metadata,
    rules=rules,
    example=example,
    covers=lambda config: not all(attends(config)),
)
