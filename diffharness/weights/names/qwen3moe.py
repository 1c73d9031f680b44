"""`qwen3moe`: Qwen 3 with routed experts in every layer.

`norm_topk_prob` has no GGUF key that the engine reads for this architecture (its graph always normalises); where a
checkpoint says false, `expert_weights_norm` says so. Models that mix dense and sparse layers have no GGUF form.
"""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import expect_activation, need_int
from diffharness.weights.names._keys import Keys, decoder_config, decoder_example, decoder_metadata, embedding_rules
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._moe import PROJECTIONS, expert_rules
from diffharness.weights.names._shared_experts import expert_width
from diffharness.weights.names._sliding import sliding_config, sliding_metadata
from diffharness.weights.names.qwen3 import attention_rules
from diffharness.weights.source import Metadata

_ARCH = "qwen3moe"


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise CheckpointError("config.json: expected experts in every layer, found layers without (mlp_only_layers)")
    out = decoder_metadata(config, _ARCH) | sliding_metadata(config, _ARCH, every_layer=True)
    out[f"{_ARCH}.expert_count"] = need_int(config, "num_experts", "num_local_experts")
    out[f"{_ARCH}.expert_used_count"] = need_int(config, "num_experts_per_tok")
    out[f"{_ARCH}.expert_feed_forward_length"] = need_int(config, "moe_intermediate_size")
    if not config.get("norm_topk_prob", False):
        out[f"{_ARCH}.expert_weights_norm"] = False
    return out


def config(metadata: Metadata) -> dict[str, Any]:
    keys = Keys(metadata)
    named = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu"}
    experts = {
        "num_experts": keys["expert_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "moe_intermediate_size": expert_width(keys, 0),
        "norm_topk_prob": bool(keys.get("expert_weights_norm", True)),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    sliding = sliding_config(metadata, _ARCH)
    sliding.pop("layer_types", None)
    return named | decoder_config(metadata, _ARCH) | experts | sliding


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    sizes = {"n_expert": keys.n_expert, "n_ff": expert_width(keys, 0), "n_embd": keys.n_embd}
    out = embedding_rules(metadata)
    for il in range(keys.n_layer):
        mlp = f"model.layers.{il}.mlp."
        out += [*attention_rules(metadata, il), *expert_rules(f"blk.{il}.", mlp, PROJECTIONS, fused=mlp, **sizes)]
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    experts = {
        "num_experts": sizes.n_expert,
        "num_experts_per_tok": sizes.n_expert_used,
        "moe_intermediate_size": sizes.n_ff_expert,
        "norm_topk_prob": True,
    }
    return decoder_example(sizes, "qwen3_moe", "Qwen3MoeForCausalLM", **experts)


MAP = ArchMap(
    arch=_ARCH,
    model_types=("qwen3_moe",),
    architectures=("Qwen3MoeForCausalLM",),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
)
