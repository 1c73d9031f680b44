"""`ernie4_5`, `ernie4_5-moe`: Baidu's ERNIE 4.5, text.

Rows of Q and K are in ggml's NORM order in the checkpoint. Tensors of layers that predict further tokens are left
alone. Models with biases (`use_bias`, none published) have no GGUF form, nor have experts that stop before the end.
"""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import attention_rules, gated_matrices
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
from diffharness.weights.names._map import ArchMap, Config, Shaped, Sizes, TensorRule
from diffharness.weights.names._moe import PROJECTIONS, expert_rules
from diffharness.weights.source import Metadata

_DENSE, _MOE = "ernie4_5", "ernie4_5-moe"


def metadata(config: Config) -> dict[str, Any]:
    return _metadata(config, _DENSE, head_dim=128)


def moe_metadata(config: Config) -> dict[str, Any]:
    n_layer, end = need_int(config, "num_hidden_layers"), config.get("moe_layer_end_index", -1)
    if end not in (None, -1, n_layer - 1):
        raise CheckpointError(f"config.json: `moe_layer_end_index`: expected the last layer or -1, found {end!r}")
    n_ff, n_shared = need_int(config, "moe_intermediate_size"), int(config.get("moe_num_shared_experts") or 0)
    return _metadata(config, _MOE) | {
        f"{_MOE}.expert_count": need_int(config, "moe_num_experts", "num_experts"),
        f"{_MOE}.expert_used_count": need_int(config, "moe_k", "num_experts_per_tok"),
        f"{_MOE}.interleave_moe_layer_step": int(config.get("moe_layer_interval") or 1),
        f"{_MOE}.leading_dense_block_count": int(config.get("moe_layer_start_index", 1)),
        f"{_MOE}.expert_feed_forward_length": n_ff,
        f"{_MOE}.expert_shared_count": n_shared,
        f"{_MOE}.expert_shared_feed_forward_length": n_ff * n_shared,
    }


def _metadata(config: Config, arch: str, **more: Any) -> dict[str, Any]:
    expect_activation(config, "silu")
    if config.get("use_bias"):
        raise CheckpointError("config.json: expected a model without biases, found `use_bias` true")
    return decoder_metadata({"tie_word_embeddings": True, **config}, arch, default_theta=500_000.0, **more)


def config(metadata: Metadata) -> dict[str, Any]:
    named = {"architectures": ["Ernie4_5ForCausalLM"], "model_type": "ernie4_5", "hidden_act": "silu"}
    return named | decoder_config(metadata, _DENSE) | {"use_bias": False}


def moe_config(metadata: Metadata) -> dict[str, Any]:
    keys = Keys(metadata)
    n_ff = keys.integer("expert_feed_forward_length")
    return decoder_config(metadata, _MOE) | {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        "hidden_act": "silu",
        "use_bias": False,
        "moe_num_experts": keys["expert_count"],
        "moe_k": keys["expert_used_count"],
        "moe_layer_interval": keys["interleave_moe_layer_step"],
        "moe_layer_start_index": keys.get("leading_dense_block_count", 0),
        "moe_layer_end_index": -1,
        "moe_intermediate_size": n_ff,
        "moe_num_shared_experts": keys.integer("expert_shared_feed_forward_length", 0) // max(1, n_ff),
    }


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    out = embedding_rules(metadata)
    for il in range(keys.n_layer):
        out += _layer_rules(metadata, il)
        n_ff = keys.integer("feed_forward_length")
        out += gated_matrices(f"blk.{il}.", f"model.layers.{il}.mlp.", n_ff, keys.n_embd)
    return out


def moe_rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    first, step = keys.integer("leading_dense_block_count", 0), max(1, keys.integer("interleave_moe_layer_step"))
    out = embedding_rules(metadata)
    for il in range(keys.n_layer):
        out += _layer_rules(metadata, il)
        if il >= first and (il + 1) % step == 0:
            out += _expert_rules(keys, il)
        else:
            n_ff = keys.integer("feed_forward_length")
            out += gated_matrices(f"blk.{il}.", f"model.layers.{il}.mlp.", n_ff, keys.n_embd)
    return out


def _layer_rules(metadata: Metadata, il: int) -> list[TensorRule]:
    """Norms and attention."""
    blk, hf, n_embd = f"blk.{il}.", f"model.layers.{il}.", Keys(metadata).n_embd
    return [
        vector(blk, "attn_norm", hf + "input_layernorm", n_embd),
        *attention_rules(metadata, il, bias=None),
        vector(blk, "ffn_norm", hf + "post_attention_layernorm", n_embd),
    ]


def _expert_rules(keys: Keys, il: int) -> list[TensorRule]:
    blk, mlp, n_embd = f"blk.{il}.", f"model.layers.{il}.mlp.", keys.n_embd
    n_expert, n_ff = keys.n_expert, keys.integer("expert_feed_forward_length")
    shared = keys.integer("expert_shared_feed_forward_length", 0)
    bias = TensorRule(
        blk + "exp_probs_b.bias",
        (n_expert,),
        (mlp + "moe_statics.e_score_correction_bias",),
        layout=Shaped((n_expert,), (1, n_expert)),
        required=False,
        synthetic=True,
        draw=normal(0.15),
    )
    return [
        *expert_rules(blk, mlp, PROJECTIONS, fused=mlp, n_expert=n_expert, n_ff=n_ff, n_embd=n_embd),
        bias,
        *(gated_matrices(blk, mlp + "shared_experts.", shared, n_embd, suffix="_shexp") if shared else []),
    ]


def example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(sizes, "ernie4_5", "Ernie4_5ForCausalLM", use_bias=False)


def moe_example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(
        sizes,
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        head_dim=None,
        use_bias=False,
        moe_num_experts=sizes.n_expert,
        moe_k=sizes.n_expert_used,
        moe_layer_interval=1,
        moe_layer_start_index=1,
        moe_layer_end_index=-1,
        moe_intermediate_size=sizes.n_ff_expert,
        moe_num_shared_experts=2,
    )


MAPS = (
    ArchMap(
        arch=_DENSE,
        model_types=("ernie4_5",),
        architectures=("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
        metadata=metadata,
        config=config,
        rules=rules,
        example=example,
    ),
    ArchMap(
        arch=_MOE,
        model_types=("ernie4_5_moe",),
        architectures=("Ernie4_5_MoeForCausalLM",),
        metadata=moe_metadata,
        config=moe_config,
        rules=moe_rules,
        example=moe_example,
        ignored=("model.mtp_",),
    ),
)
