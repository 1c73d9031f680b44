"""Keys and synthetic configs that the maps of Qwen 3 Next and 3.5 share; `_qwen_next_tensors` has the tensors."""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import expect_activation, need_int, rope_parameters
from diffharness.weights.names._keys import Keys, decoder_example, decoder_metadata
from diffharness.weights.names._map import Config, Sizes

RECURRENT, ATTENTION = "linear_attention", "full_attention"  # config.json's words

# What the classes assume where a config.json leaves a key out.
DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "rms_norm_eps": 1e-6,
}
_ROTARY_SHARE = 0.25
INTERVAL = 4
_L2_EPS = 1e-6  # of the norm of queries and keys


# -- keys -----------------------------------------------------------------------------------------------


def next_metadata(config: Config, arch: str) -> dict[str, Any]:
    """The keys of a text model's config, those of experts where it has any."""
    config = DEFAULTS | {key: value for key, value in config.items() if value is not None}
    expect_activation(config, "silu")
    if config.get("num_experts") and (config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1):
        raise CheckpointError("config.json: expected experts in every layer, found layers without (mlp_only_layers)")
    dense = need_int(config, "intermediate_size") if config.get("intermediate_size") is not None else None
    out = decoder_metadata({**config, "intermediate_size": dense or 0}, arch)
    if dense is None:
        del out[f"{arch}.feed_forward_length"]
    rope = rope_parameters(config, default_theta=10000.0)
    share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or _ROTARY_SHARE
    kinds = _layer_kinds(config)
    out |= {
        f"{arch}.rope.dimension_count": int(Keys(out).head_dim * share),
        f"{arch}.ssm.conv_kernel": need_int(config, "linear_conv_kernel_dim"),
        f"{arch}.ssm.state_size": need_int(config, "linear_key_head_dim"),
        f"{arch}.ssm.group_count": need_int(config, "linear_num_key_heads"),
        f"{arch}.ssm.time_step_rank": need_int(config, "linear_num_value_heads"),
        f"{arch}.ssm.inner_size": (
            need_int(config, "linear_value_head_dim") * need_int(config, "linear_num_value_heads")
        ),
        f"{arch}.attention.recurrent_layers": [kind == RECURRENT for kind in kinds],
        f"{arch}.full_attention_interval": _interval(kinds),
    }
    if n_expert := config.get("num_experts"):
        out |= {
            f"{arch}.expert_count": n_expert,
            f"{arch}.expert_used_count": need_int(config, "num_experts_per_tok"),
            f"{arch}.expert_feed_forward_length": need_int(config, "moe_intermediate_size"),
            f"{arch}.expert_shared_feed_forward_length": need_int(config, "shared_expert_intermediate_size"),
        }
        if config.get("norm_topk_prob") is False:
            raise CheckpointError("config.json: expected `norm_topk_prob` true: GGUF's graph always normalises")
    return out


def _layer_kinds(config: Config) -> list[str]:
    """Each layer's kind in config.json's words."""
    n_layer = need_int(config, "num_hidden_layers")
    interval = config.get("full_attention_interval", INTERVAL)
    listed = config.get("layer_types")
    kinds = list(listed) if listed else [_kind(il, interval) for il in range(n_layer)]
    if len(kinds) != n_layer or not set(kinds) <= {RECURRENT, ATTENTION}:
        raise CheckpointError(
            f"config.json: `layer_types`: expected {n_layer} times {RECURRENT} or {ATTENTION}, found {kinds}"
        )
    return kinds


def _interval(kinds: list[str]) -> int:
    """Of how many layers the last attends; the usual number where layers follow no such rule, which they then say."""
    by_rule = (n for n in range(1, len(kinds) + 1) if kinds == [_kind(il, n) for il in range(len(kinds))])
    return next(by_rule, INTERVAL)


def _kind(il: int, interval: int) -> str:
    return RECURRENT if (il + 1) % interval else ATTENTION


def next_example(sizes: Sizes, model_type: str, architecture: str, **more: Any) -> dict[str, Any]:
    """config.json of a synthetic model, its attention layer not where it usually is.

    The epsilon is the usual one: the norm of queries and keys has that one whatever the others have, and the engine
    knows one for all.
    """
    delta: dict[str, Any] = {
        "layer_types": [ATTENTION if il % 4 == 2 else RECURRENT for il in range(sizes.n_layer)],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": _L2_EPS,
    }
    return decoder_example(sizes, model_type, architecture, **(delta | more))


def experts_example(sizes: Sizes) -> dict[str, Any]:
    """The keys of experts."""
    return {
        "num_experts": sizes.n_expert,
        "num_experts_per_tok": sizes.n_expert_used,
        "moe_intermediate_size": sizes.n_ff_expert,
        "shared_expert_intermediate_size": sizes.n_ff_expert // 2,
        "norm_topk_prob": True,
    }
