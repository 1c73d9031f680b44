"""`deepseek`: DeepSeek MoE 16B, as its published code has it. Llama's attention, Q and K permuted in the GGUF.

`norm_topk_prob` has no GGUF key that the engine reads for this architecture (its graph never normalises); where a
checkpoint says true, `expert_weights_norm` says so.
"""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import attention_matrices
from diffharness.weights.names._config import expect_activation
from diffharness.weights.names._keys import (
    Keys,
    decoder_config,
    decoder_example,
    decoder_metadata,
    embedding_rules,
    vector,
)
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._shared_experts import experts_config, experts_metadata, feed_forward_rules
from diffharness.weights.source import Metadata

_ARCH = "deepseek"


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    for key, wanted in (("attention_bias", False), ("moe_layer_freq", 1), ("scoring_func", "softmax")):
        if config.get(key) not in (wanted, None):
            raise CheckpointError(f"config.json: `{key}`: expected {wanted}, found {config[key]!r}")
    out = decoder_metadata(config, _ARCH) | experts_metadata(config, _ARCH)
    out[f"{_ARCH}.rope.dimension_count"] = Keys(out).head_dim
    out[f"{_ARCH}.expert_weights_scale"] = 1.0  # the model's code reads none
    if f"{_ARCH}.rope.scaling.type" not in out:
        out[f"{_ARCH}.rope.scaling.type"] = "none"
    if config.get("norm_topk_prob"):
        out[f"{_ARCH}.expert_weights_norm"] = True
    return out


def config(metadata: Metadata) -> dict[str, Any]:
    out = decoder_config(metadata, _ARCH) | experts_config(Keys(metadata))
    for name in ("n_group", "topk_group", "routed_scaling_factor", "head_dim"):  # what the model's code does not read
        del out[name]
    named = {"architectures": ["DeepseekForCausalLM"], "model_type": "deepseek", "hidden_act": "silu"}
    return named | out | {"scoring_func": "softmax", "moe_layer_freq": 1}


def rules(metadata: Metadata) -> list[TensorRule]:
    keys, out = Keys(metadata), embedding_rules(metadata)
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", keys.n_embd),
            *attention_matrices(keys, blk, hf + "self_attn.", permuted=True),
            vector(blk, "ffn_norm", hf + "post_attention_layernorm", keys.n_embd),
            *feed_forward_rules(keys, il, hf + "mlp."),
        ]
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(
        sizes,
        "deepseek",
        "DeepseekForCausalLM",
        head_dim=None,
        first_k_dense_replace=1,
        n_routed_experts=sizes.n_expert,
        num_experts_per_tok=sizes.n_expert_used,
        moe_intermediate_size=sizes.n_ff_expert,
        n_shared_experts=2,
        norm_topk_prob=False,
        scoring_func="softmax",
        moe_layer_freq=1,
    )


MAP = ArchMap(
    arch=_ARCH,
    model_types=("deepseek",),
    architectures=("DeepseekForCausalLM",),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
    transformers=False,
    otherwise="put together of its parts",
)
