"""`jamba`: Jamba. Which layers have experts config.json says and a GGUF's tensors tell."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import gated_matrices
from diffharness.weights.names._config import expect_activation, need_int
from diffharness.weights.names._keys import Keys, decoder_example, decoder_metadata, head_rules, matrix, vector
from diffharness.weights.names._mamba import channel_rules
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._moe import PROJECTIONS, expert_rules
from diffharness.weights.source import Metadata

_ARCH = "jamba"
_ROUTED = "diffharness.jamba.routed_layers"  # by layer: whether it has experts; unknown of a GGUF from elsewhere


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    if config.get("mamba_proj_bias") or not config.get("mamba_conv_bias", True):
        raise CheckpointError("config.json: expected a bias in the mixers' convolution and none in their projections")
    out = decoder_metadata({"rms_norm_eps": 1e-6, **config}, _ARCH)
    keys = Keys(out)
    n_layer, n_embd, n_kv = keys.n_layer, keys.n_embd, keys.n_head_kv
    rank, n_expert = config.get("mamba_dt_rank", "auto"), need_int({"num_experts": 16, **config}, "num_experts")
    attends = _every(config, "attn_layer", n_layer, period=8, offset=4)
    routed = _every(config, "expert_layer", n_layer, period=2, offset=1)
    return out | {
        f"{_ARCH}.attention.head_count_kv": [n_kv if here else 0 for here in attends],
        f"{_ARCH}.ssm.conv_kernel": config.get("mamba_d_conv") or 4,
        f"{_ARCH}.ssm.inner_size": (config.get("mamba_expand") or 2) * n_embd,
        f"{_ARCH}.ssm.state_size": config.get("mamba_d_state") or 16,
        f"{_ARCH}.ssm.time_step_rank": -(n_embd // -16)
        if rank in ("auto", None)
        else need_int(config, "mamba_dt_rank"),
        f"{_ARCH}.expert_count": n_expert,
        f"{_ARCH}.expert_used_count": need_int({"num_experts_per_tok": 2, **config}, "num_experts_per_tok"),
        _ROUTED: [n_expert > 1 and here for here in routed],
    }


def _every(config: Config, name: str, n_layer: int, *, period: int, offset: int) -> list[bool]:
    """By layer, whether it is one of every so many."""
    period, offset = config.get(name + "_period", period), config.get(name + "_offset", offset)
    if not 0 <= offset < period:
        raise CheckpointError(f"config.json: `{name}_offset`: expected less than the period {period}, found {offset}")
    return [il % period == offset for il in range(n_layer)]


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd = keys.n_embd
    out = [
        TensorRule("token_embd.weight", (keys.n_vocab, n_embd), ("model.embed_tokens.weight",)),
        TensorRule("output_norm.weight", (n_embd,), ("model.final_layernorm.weight",)),
        *head_rules(metadata),
    ]
    n_kv, routed = keys.by_layer("attention.head_count_kv"), metadata.get(_ROUTED)
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", n_embd),
            *(_attention(keys, il, blk, hf + "self_attn.") if n_kv[il] else _mixer(keys, blk, hf + "mamba.")),
            vector(blk, "ffn_norm", hf + "pre_ff_layernorm", n_embd),
        ]
        dense = gated_matrices(blk, hf + "feed_forward.", keys.integer("feed_forward_length"), n_embd)
        experts = _experts(keys, blk, hf + "feed_forward.")
        if routed is not None:
            out += experts if routed[il] else dense
        else:
            out += [replace(rule, required=False) for rule in (*dense, *experts)]
    return out


def _attention(keys: Keys, il: int, blk: str, hf: str) -> list[TensorRule]:
    n_embd, size = keys.n_embd, keys.head_dim
    q = keys.by_layer("attention.head_count")[il] * size
    kv = keys.by_layer("attention.head_count_kv")[il] * size
    return [
        *matrix(blk, "attn_q", hf + "q_proj", q, n_embd, bias=None),
        *matrix(blk, "attn_k", hf + "k_proj", kv, n_embd, bias=None),
        *matrix(blk, "attn_v", hf + "v_proj", kv, n_embd, bias=None),
        *matrix(blk, "attn_output", hf + "o_proj", n_embd, q),
    ]


def _mixer(keys: Keys, blk: str, hf: str) -> list[TensorRule]:
    rank, state = keys.integer("ssm.time_step_rank"), keys.integer("ssm.state_size")
    return [
        *channel_rules(keys, blk, hf),
        vector(blk, "ssm_dt_norm", hf + "dt_layernorm", rank),
        vector(blk, "ssm_b_norm", hf + "b_layernorm", state),
        vector(blk, "ssm_c_norm", hf + "c_layernorm", state),
    ]


def _experts(keys: Keys, blk: str, hf: str) -> list[TensorRule]:
    sizes = {"n_expert": keys.n_expert, "n_ff": keys.integer("feed_forward_length"), "n_embd": keys.n_embd}
    router, *stacks = expert_rules(blk, hf, PROJECTIONS, fused=hf, **sizes)
    return [replace(router, hf=(hf + "router.weight",)), *stacks]


def example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(
        sizes,
        "jamba",
        "JambaForCausalLM",
        head_dim=None,
        rope_theta=None,
        num_experts=sizes.n_expert,
        num_experts_per_tok=sizes.n_expert_used,
        attn_layer_period=3,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=16,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_dt_rank=6,
        pad_token_id=0,
    )


MAP = ArchMap(
    arch=_ARCH,
    model_types=("jamba",),
    architectures=("JambaForCausalLM",),
    metadata=metadata,
    rules=rules,
    example=example,
)
