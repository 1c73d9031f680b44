"""`exaone-moe`: K-EXAONE. EXAONE 4's attention under Llama's norms, experts as DeepSeek V3 has them.

Layers that predict further tokens are kept as further blocks, as in EXAONE 4; theirs are dense.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import attention_matrices, gated_matrices
from diffharness.weights.names._config import expect_activation, need_int
from diffharness.weights.names._keys import (
    Keys,
    decoder_config,
    decoder_example,
    decoder_metadata,
    embedding_rules,
    rope_freqs_rule,
    vector,
)
from diffharness.weights.names._map import PLAIN, ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._shared_experts import (
    GATING,
    expert_width,
    experts_config,
    experts_metadata,
    feed_forward_rules,
    n_main_layers,
    nextn_metadata,
)
from diffharness.weights.names.exaone4 import further_rules, window_config, window_metadata
from diffharness.weights.source import Metadata

_ARCH = "exaone-moe"
# What the class assumes where a config.json leaves a key out.
_DEFAULTS: dict[str, Any] = {"num_shared_experts": 1, "routed_scaling_factor": 2.5}
# As published; the other spelling is that of transformers in memory.
_BIAS, _BIAS_IN_MEMORY = "e_score_correction_bias", "gate.e_score_correction_bias"


def metadata(config: Config) -> dict[str, Any]:
    config = {**_DEFAULTS, **config}
    expect_activation(config, "silu")
    if config.get("scoring_func", "sigmoid") != "sigmoid":
        raise CheckpointError(f"config.json: `scoring_func`: expected sigmoid, found {config['scoring_func']!r}")
    older = {"first_k_dense_replace": config.get("first_last_k_dense_replace", 1)}
    experts = experts_metadata({**older, **config}, _ARCH)
    n_ff_shared = need_int(config, "moe_intermediate_size") * experts[f"{_ARCH}.expert_shared_count"]
    return (
        decoder_metadata(config, _ARCH)
        | experts
        | {
            f"{_ARCH}.expert_shared_feed_forward_length": n_ff_shared,
            f"{_ARCH}.expert_gating_func": GATING["sigmoid"],
            f"{_ARCH}.expert_weights_norm": bool(config.get("norm_topk_prob", True)),
        }
        | window_metadata(config, _ARCH)
        | nextn_metadata(config, _ARCH)
    )


def config(metadata: Metadata) -> dict[str, Any]:
    keys = Keys(metadata)
    out = decoder_config(metadata, _ARCH) | experts_config(keys) | window_config(keys)
    out["num_experts"], out["num_shared_experts"] = out.pop("n_routed_experts"), out.pop("n_shared_experts")
    named = {"architectures": ["ExaoneMoEForCausalLM"], "model_type": "exaone_moe", "hidden_act": "silu"}
    return named | out | {"scoring_func": "sigmoid"}


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    out = [*embedding_rules(metadata), rope_freqs_rule(metadata, keys.integer("rope.dimension_count", keys.head_dim))]
    for il in range(n_main_layers(keys)):
        hf = f"model.layers.{il}."
        n_ff_shared = keys.integer("expert_shared_feed_forward_length", 0) or expert_width(keys, il)
        feed_forward = feed_forward_rules(keys, il, hf + "mlp.", bias=_BIAS, n_ff_shared=n_ff_shared)
        out += [*_attention(keys, il, hf), *map(_named_otherwise, feed_forward)]
    for il in range(n_main_layers(keys), keys.n_layer):
        hf = f"mtp.layers.{il - n_main_layers(keys)}."
        mlp = gated_matrices(f"blk.{il}.", hf + "mlp.", keys.integer("feed_forward_length"), keys.n_embd)
        out += further_rules(keys, il, [*_attention(keys, il, hf), *mlp])
    return out


def _attention(keys: Keys, il: int, hf: str) -> list[TensorRule]:
    blk = f"blk.{il}."
    return [
        vector(blk, "attn_norm", hf + "input_layernorm", keys.n_embd),
        *attention_matrices(keys, blk, hf + "self_attn."),
        vector(blk, "attn_q_norm", hf + "self_attn.q_norm", keys.head_dim),
        vector(blk, "attn_k_norm", hf + "self_attn.k_norm", keys.head_dim),
        vector(blk, "ffn_norm", hf + "post_attention_layernorm", keys.n_embd),
    ]


def _named_otherwise(rule: TensorRule) -> TensorRule:
    """The router's bias with its other spelling."""
    if not rule.name.endswith("exp_probs_b.bias"):
        return rule
    [name] = rule.hf
    return replace(rule, aliases=(((name.replace(_BIAS, _BIAS_IN_MEMORY),), PLAIN),))


def example(sizes: Sizes) -> dict[str, Any]:
    """Long enough that a global layer is among the sparse ones."""
    sizes = replace(sizes, n_layer=max(sizes.n_layer, 4))
    return decoder_example(
        sizes,
        "exaone_moe",
        "ExaoneMoEForCausalLM",
        sliding_window=sizes.window,
        sliding_window_pattern=4,
        first_k_dense_replace=1,
        num_experts=sizes.n_expert,
        num_experts_per_tok=sizes.n_expert_used,
        moe_intermediate_size=sizes.n_ff_expert,
        num_shared_experts=2,
        n_group=2 if sizes.n_expert % 2 == 0 else 1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        scoring_func="sigmoid",
    )


MAP = ArchMap(
    arch=_ARCH,
    model_types=("exaone_moe",),
    architectures=("ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM"),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
)
