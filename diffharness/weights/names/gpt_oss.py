"""`gpt-oss`: OpenAI's 20B and 120B.

The experts of a layer are one tensor of gates and ups that take turns, and one of downs, each matrix transposed; both
have biases. The published files hold the matrices as MXFP4 blocks and scales, BF16 copies as numbers; both are read.

YaRN's `truncate` has no GGUF key: every published config says false, which the engine does not compute. It is kept
under a key of our own. So are layer types that do not alternate, under the key that the engine reads.
"""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import attention_matrices
from diffharness.weights.names._config import expect_activation, need_int, rope_parameters, without_rope
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
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._mxfp4 import mxfp4
from diffharness.weights.names._pieces import half, transposed
from diffharness.weights.names._sliding import GLOBAL, SLIDING, by_period
from diffharness.weights.source import Metadata

_ARCH = "gpt-oss"
_THETA = 150_000.0
_PERIOD = 2  # the last layer of each is global
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_CLAMP = {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}  # the engine's graph has these numbers in it
TRUNCATE = "diffharness.rope.yarn_truncate"  # bool


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    if not config.get("attention_bias", True):
        raise CheckpointError("config.json: expected biases on every projection, found `attention_bias` false")
    for key, value in _CLAMP.items():
        if config.get(key, value) != value:
            raise CheckpointError(
                f"config.json: expected `{key}` {value}, found {config[key]!r}: GGUF has no key for it"
            )
    rope = rope_parameters(config, default_theta=_THETA)
    if not (config.get("rope_parameters") or config.get("rope_scaling")):
        rope |= _ROPE
    truncate = rope.pop("truncate", True)
    out = decoder_metadata(without_rope(config) | {"rope_parameters": rope}, _ARCH, default_theta=_THETA, head_dim=64)
    out |= {
        f"{_ARCH}.attention.sliding_window": need_int(config, "sliding_window"),
        f"{_ARCH}.expert_count": need_int(config, "num_local_experts", "num_experts"),
        f"{_ARCH}.expert_used_count": need_int(config, "num_experts_per_tok", "experts_per_token"),
        f"{_ARCH}.expert_feed_forward_length": need_int(config, "intermediate_size"),
    }
    if rope["rope_type"] == "yarn":
        out[TRUNCATE] = bool(truncate)
    kinds = config.get("layer_types")
    n_layer = need_int(config, "num_hidden_layers")
    if kinds and list(kinds) != by_period(n_layer, _PERIOD):
        out[f"{_ARCH}.attention.sliding_window_pattern"] = [kind == SLIDING for kind in kinds]
    return out


def config(metadata: Metadata) -> dict[str, Any]:
    keys = Keys(metadata)
    out = decoder_config(metadata, _ARCH) | {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "hidden_act": "silu",
        "attention_bias": True,
        "intermediate_size": keys["expert_feed_forward_length"],
        "num_local_experts": keys["expert_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "sliding_window": keys["attention.sliding_window"],
        **_CLAMP,
    }
    slides = keys.get("attention.sliding_window_pattern")
    kinds = by_period(keys.n_layer, _PERIOD)
    if isinstance(slides, (list, tuple)):
        kinds = [SLIDING if slide else GLOBAL for slide in slides]
    rope = out.pop("rope_scaling", {"rope_type": "default"}) | {"rope_theta": out.pop("rope_theta")}
    if rope["rope_type"] == "yarn":
        rope["truncate"] = bool(metadata.get(TRUNCATE, False))
    return out | {"layer_types": kinds, "rope_parameters": rope}


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, out = keys.n_embd, embedding_rules(metadata)
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", n_embd),
            *attention_matrices(keys, blk, hf + "self_attn.", bias=True, out_bias=True),
            TensorRule(blk + "attn_sinks.weight", (keys.n_head,), (hf + "self_attn.sinks",), draw=normal(1.5)),
            vector(blk, "post_attention_norm", hf + "post_attention_layernorm", n_embd),
            *matrix(blk, "ffn_gate_inp", hf + "mlp.router", keys.n_expert, n_embd, bias=True),
            *_expert_rules(keys, il),
        ]
    return out


def _expert_rules(keys: Keys, il: int) -> list[TensorRule]:
    blk, hf = f"blk.{il}.", f"model.layers.{il}.mlp.experts."
    n_expert, n_embd, n_ff = keys.n_expert, keys.n_embd, keys.integer("expert_feed_forward_length")
    wide = by_width(3.0)  # so that the clamp clamps
    out = []
    for part, name in enumerate(("gate", "up")):
        stack, bias = (n_expert, n_ff, n_embd), (n_expert, n_ff)
        packed = (hf + "gate_up_proj_blocks", hf + "gate_up_proj_scales")
        out += [
            TensorRule(
                f"{blk}ffn_{name}_exps.weight",
                stack,
                (hf + "gate_up_proj",),
                layout=half(stack, part, turns=True),
                aliases=((packed, mxfp4(stack, first=part, step=2)),),
                draw=wide,
            ),
            TensorRule(
                f"{blk}ffn_{name}_exps.bias",
                bias,
                (hf + "gate_up_proj_bias",),
                layout=half(bias, part, turns=True),
            ),
        ]
    down, packed = (n_expert, n_embd, n_ff), (hf + "down_proj_blocks", hf + "down_proj_scales")
    return [
        *out,
        TensorRule(
            blk + "ffn_down_exps.weight",
            down,
            (hf + "down_proj",),
            layout=transposed(down),
            aliases=((packed, mxfp4(down)),),
        ),
        TensorRule(blk + "ffn_down_exps.bias", (n_expert, n_embd), (hf + "down_proj_bias",)),
    ]


def example(sizes: Sizes) -> dict[str, Any]:
    rope = _ROPE | {"factor": 4.0, "original_max_position_embeddings": 300, "truncate": True}
    return decoder_example(
        sizes,
        "gpt_oss",
        "GptOssForCausalLM",
        intermediate_size=sizes.n_ff_expert,
        rope_theta=None,
        rope_parameters=rope | {"rope_theta": 5e3},
        attention_bias=True,
        num_local_experts=sizes.n_expert,
        num_experts_per_tok=sizes.n_expert_used,
        sliding_window=sizes.window,
        layer_types=by_period(sizes.n_layer, _PERIOD),
        **_CLAMP,
    )


MAP = ArchMap(
    arch=_ARCH,
    model_types=("gpt_oss",),
    architectures=("GptOssForCausalLM",),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
)
