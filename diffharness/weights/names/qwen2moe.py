"""`qwen2moe`: Qwen 1.5 and 2 MoE.

`norm_topk_prob`, false in every released model, has no GGUF key that the engine reads for this architecture; where a
checkpoint says true, `expert_weights_norm` says so. Models that mix dense and sparse layers have no GGUF form.
"""

from __future__ import annotations

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
    vector,
)
from diffharness.weights.names._map import ArchMap, Config, Shaped, Sizes, TensorRule
from diffharness.weights.names._moe import PROJECTIONS, expert_rules
from diffharness.weights.names._shared_experts import expert_width
from diffharness.weights.names._sliding import GLOBAL, SLIDING, sliding_config, sliding_metadata
from diffharness.weights.source import Metadata

_ARCH = "qwen2moe"


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        raise CheckpointError("config.json: expected experts in every layer, found layers without (mlp_only_layers)")
    if not config.get("qkv_bias", True):
        raise CheckpointError("config.json: expected biases on Q, K and V, found `qkv_bias` false")
    out = decoder_metadata(config, _ARCH) | sliding_metadata({"layer_types": _layer_types(config), **config}, _ARCH)
    out |= {
        f"{_ARCH}.expert_count": need_int(config, "num_experts", "num_local_experts"),
        f"{_ARCH}.expert_used_count": need_int(config, "num_experts_per_tok"),
        f"{_ARCH}.expert_feed_forward_length": need_int(config, "moe_intermediate_size"),
        f"{_ARCH}.expert_shared_feed_forward_length": need_int(config, "shared_expert_intermediate_size"),
    }
    if config.get("norm_topk_prob", False):
        out[f"{_ARCH}.expert_weights_norm"] = True
    return out


def _layer_types(config: Config) -> list[str]:
    """Where a window is on and config.json lists no kinds: every second of the first layers slides."""
    last = config.get("max_window_layers", 28)
    n_layer = need_int(config, "num_hidden_layers")
    return [SLIDING if il % 2 == 0 and il < last else GLOBAL for il in range(n_layer)]


def config(metadata: Metadata) -> dict[str, Any]:
    keys = Keys(metadata)
    named = {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "hidden_act": "silu"}
    return {
        **named,
        **decoder_config(metadata, _ARCH),
        **sliding_config(metadata, _ARCH),
        "num_experts": keys["expert_count"],
        "num_experts_per_tok": keys["expert_used_count"],
        "moe_intermediate_size": expert_width(keys, 0),
        "shared_expert_intermediate_size": _shared_ff(keys),
        "norm_topk_prob": bool(keys.get("expert_weights_norm", False)),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": True,
    }


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, n_ff = keys.n_embd, _shared_ff(keys)
    sizes = {"n_expert": keys.n_expert, "n_ff": expert_width(keys, 0), "n_embd": n_embd}
    out = embedding_rules(metadata)
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        mlp = hf + "mlp."
        gate = TensorRule(
            blk + "ffn_gate_inp_shexp.weight",
            (n_embd,),
            (mlp + "shared_expert_gate.weight",),
            layout=Shaped((n_embd,), (1, n_embd)),
        )
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", n_embd),
            *attention_matrices(keys, blk, hf + "self_attn.", bias=True),
            vector(blk, "ffn_norm", hf + "post_attention_layernorm", n_embd),
            *expert_rules(blk, mlp, PROJECTIONS, fused=mlp, **sizes),
            gate,
            *gated_matrices(blk, mlp + "shared_expert.", n_ff, n_embd, suffix="_shexp"),
        ]
    return out


def _shared_ff(keys: Keys) -> int:
    return keys.integer("expert_shared_feed_forward_length", 0) or keys.integer("feed_forward_length")


def example(sizes: Sizes) -> dict[str, Any]:
    experts = {
        "num_experts": sizes.n_expert,
        "num_experts_per_tok": sizes.n_expert_used,
        "moe_intermediate_size": sizes.n_ff_expert,
        "shared_expert_intermediate_size": sizes.n_ff,
        "norm_topk_prob": False,
    }
    return decoder_example(sizes, "qwen2_moe", "Qwen2MoeForCausalLM", head_dim=None, **experts)


MAP = ArchMap(
    arch=_ARCH,
    model_types=("qwen2_moe",),
    architectures=("Qwen2MoeForCausalLM",),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
)
