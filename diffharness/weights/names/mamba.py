"""`mamba`, `mamba2`: Mamba, Falcon Mamba, Mamba 2 and Codestral Mamba."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import expect_activation, need_float, need_int
from diffharness.weights.names._keys import TIED_HEAD, Keys, head_rules
from diffharness.weights.names._mamba import DEFAULT_PARTS_EPS, PARTS_EPS, channel_rules, expect_unlimited
from diffharness.weights.names._mamba import head_rules as mixer_rules
from diffharness.weights.names._map import PLAIN, ArchMap, Config, Sizes, TensorRule
from diffharness.weights.source import Metadata

_CONTEXT = 1 << 20  # states have no length: any number would do


# -- keys -------------------------------------------------------------------------------------------------


def metadata1(config: Config) -> dict[str, Any]:
    n_embd = need_int(config, "hidden_size", "d_model")
    rank = config.get("time_step_rank", "auto")
    out = _common(config, "mamba", tied=True, state=16)
    out["mamba.ssm.time_step_rank"] = -(n_embd // -16) if rank == "auto" else need_int(config, "time_step_rank")
    out["mamba.ssm.dt_b_c_rms"] = config.get("model_type") == "falcon_mamba"
    eps = config.get("mixer_rms_eps", DEFAULT_PARTS_EPS)
    if out["mamba.ssm.dt_b_c_rms"] and eps != DEFAULT_PARTS_EPS:
        out[PARTS_EPS] = float(eps)
    return out


def metadata2(config: Config) -> dict[str, Any]:
    out = _common(config, "mamba2", tied=False, state=128)
    size = config.get("head_dim", 64)
    n_head = out["mamba2.ssm.inner_size"] // max(1, size)
    if config.get("num_heads", n_head) != n_head or n_head * size != out["mamba2.ssm.inner_size"]:
        raise CheckpointError(f"config.json: expected {n_head} heads of {size}, found {config.get('num_heads')}")
    expect_unlimited(config)
    return out | {"mamba2.ssm.time_step_rank": n_head, "mamba2.ssm.group_count": config.get("n_groups", 8)}


def _common(config: Config, arch: str, *, tied: bool, state: int) -> dict[str, Any]:
    """What both have: `tied` and `state` are the class's own defaults."""
    expect_activation(config, "silu")
    n_embd = need_int(config, "hidden_size", "d_model")
    for name in ("use_bias", "use_conv_bias"):
        if config.get(name, name == "use_conv_bias") != (name == "use_conv_bias"):
            raise CheckpointError(f"config.json: `{name}`: GGUF has no form of such a model")
    return {
        "general.architecture": arch,
        "general.type": "model",
        f"{arch}.block_count": need_int(config, "num_hidden_layers", "n_layer"),
        f"{arch}.context_length": _CONTEXT,
        f"{arch}.embedding_length": n_embd,
        f"{arch}.feed_forward_length": 0,
        f"{arch}.attention.head_count": 0,
        f"{arch}.ssm.conv_kernel": config.get("conv_kernel", 4),
        f"{arch}.ssm.inner_size": int(config.get("expand", 2) * n_embd),
        f"{arch}.ssm.state_size": config.get("state_size", state),
        f"{arch}.attention.layer_norm_rms_epsilon": need_float(
            {"layer_norm_epsilon": 1e-5, **config}, "layer_norm_epsilon"
        ),
        f"{arch}.vocab_size": need_int(config, "vocab_size"),
        TIED_HEAD: bool(config.get("tie_word_embeddings", tied)),
    }


# -- tensors ----------------------------------------------------------------------------------------------


def rules1(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    out = _outer_rules(metadata)
    for il in range(keys.n_layer):
        out += [_norm(keys, il), *channel_rules(keys, f"blk.{il}.", f"backbone.layers.{il}.mixer.")]
    return out


def rules2(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    out = _outer_rules(metadata)
    for il in range(keys.n_layer):
        out += [_norm(keys, il), *mixer_rules(keys, f"blk.{il}.", f"backbone.layers.{il}.mixer.")]
    return out


def _outer_rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    older = ((("backbone.embedding.weight",), PLAIN),)
    return [
        TensorRule("token_embd.weight", (keys.n_vocab, keys.n_embd), ("backbone.embeddings.weight",), aliases=older),
        TensorRule("output_norm.weight", (keys.n_embd,), ("backbone.norm_f.weight",)),
        *head_rules(metadata),
    ]


def _norm(keys: Keys, il: int) -> TensorRule:
    return TensorRule(f"blk.{il}.attn_norm.weight", (keys.n_embd,), (f"backbone.layers.{il}.norm.weight",))


# -- synthetic models -------------------------------------------------------------------------------------


def _example(sizes: Sizes, model_type: str, architecture: str, more: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": sizes.n_embd,
        "num_hidden_layers": sizes.n_layer,
        "state_size": 16,
        "expand": 2,
        "conv_kernel": 4,
        "layer_norm_epsilon": 1e-3,
        "vocab_size": sizes.n_vocab,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float32",
        **more,
    }


def example1(sizes: Sizes) -> dict[str, Any]:
    more = {"intermediate_size": 2 * sizes.n_embd, "time_step_rank": 6}
    return _example(sizes, "mamba", "MambaForCausalLM", more)


def example2(sizes: Sizes) -> dict[str, Any]:
    more = {"head_dim": sizes.head_dim, "num_heads": 2 * sizes.n_embd // sizes.head_dim, "n_groups": 2}
    return _example(sizes, "mamba2", "Mamba2ForCausalLM", more)


MAPS = (
    ArchMap(
        arch="mamba",
        model_types=("mamba", "falcon_mamba"),
        architectures=("MambaForCausalLM", "FalconMambaForCausalLM"),
        metadata=metadata1,
        rules=rules1,
        example=example1,
    ),
    ArchMap(
        arch="mamba2",
        model_types=("mamba2",),
        architectures=("Mamba2ForCausalLM",),
        metadata=metadata2,
        rules=rules2,
        example=example2,
    ),
)
