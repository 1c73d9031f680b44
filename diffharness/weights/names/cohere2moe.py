"""`cohere2moe`: Cohere 2 with experts. A checkpoint has one tensor per expert and matrix.

The engine's converter leaves `expert_gating_func` out, which GGUF reads as the sigmoid, and takes weights as not
normalised where config.json does not say; the classes' defaults are the softmax and normalised weights, so both are
written here. What GGUF has no words for is refused: a sum of routed and shared experts in the mean's place, dense
layers elsewhere than at the front, and dense layers that see everything without being turned.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import ATTENTION_BIAS, attention_rules, fused_or_not, gated_matrices, mlp_rules
from diffharness.weights.names._config import need_int
from diffharness.weights.names._keys import Keys, embedding_rules, vector
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._moe import PROJECTIONS, expert_rules
from diffharness.weights.names._shared_experts import n_leading_dense, n_main_layers, nextn_metadata, nextn_rules
from diffharness.weights.names._sliding import SLIDING, by_period
from diffharness.weights.names.command_r import PERIOD, cohere_example, cohere_metadata
from diffharness.weights.source import Metadata

_ARCH = "cohere2moe"
_GATING = {"softmax": 3, "sigmoid": 2}  # GGUF's numbers; 3 is the softmax over the chosen experts


def metadata(config: Config) -> dict[str, Any]:
    tied = bool(config.get("tie_word_embeddings", True))
    out = cohere_metadata({**config, "tie_word_embeddings": True}, _ARCH, default_theta=10000.0)
    out |= {"diffharness.tied_head": tied}
    if config.get("rms_norm_eps") is not None:
        out[f"{_ARCH}.attention.layer_norm_rms_epsilon"] = float(config["rms_norm_eps"])
    n_ff, n_shared = need_int(config, "intermediate_size"), int(config.get("num_shared_experts") or 0)
    head_dim, n_dense = int(config.get("head_dim") or 128), n_leading_dense(config, 0)
    _check(config, n_dense)
    gating = config.get("expert_selection_fn", "softmax")
    if gating not in _GATING:
        raise CheckpointError(f"config.json: `expert_selection_fn`: expected softmax or sigmoid, found {gating!r}")
    out |= {
        f"{_ARCH}.feed_forward_length": int(config.get("prefix_dense_intermediate_size") or n_ff),
        f"{_ARCH}.attention.key_length": head_dim,
        f"{_ARCH}.attention.value_length": head_dim,
        f"{_ARCH}.rope.dimension_count": head_dim,
        f"{_ARCH}.attention.sliding_window": int(config.get("sliding_window") or 4096),
        f"{_ARCH}.attention.sliding_window_pattern": [kind == SLIDING for kind in _kinds(config, n_dense)],
        f"{_ARCH}.leading_dense_block_count": n_dense,
        f"{_ARCH}.expert_count": need_int(config, "num_experts"),
        f"{_ARCH}.expert_used_count": need_int(config, "num_experts_per_tok"),
        f"{_ARCH}.expert_feed_forward_length": n_ff,
        f"{_ARCH}.expert_weights_norm": bool(config.get("norm_topk_prob", True)),
        f"{_ARCH}.expert_gating_func": _GATING[gating],
    }
    if n_shared:
        out[f"{_ARCH}.expert_shared_count"] = n_shared
        out[f"{_ARCH}.expert_shared_feed_forward_length"] = n_ff * n_shared
    return out | nextn_metadata(config, _ARCH)


def _kinds(config: Config, n_dense: int) -> list[str]:
    """Each layer's kind: listed, or by one period for the dense layers and one for the rest."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    n_layer = need_int(config, "num_hidden_layers")
    dense = by_period(n_dense, int(config.get("prefix_dense_sliding_window_pattern") or 1))
    return dense + by_period(n_layer - n_dense, int(config.get("sliding_window_pattern") or PERIOD))


def _check(config: Config, n_dense: int) -> None:
    """CheckpointError for what GGUF cannot say."""
    how = config.get("shared_expert_combination_strategy", "average")
    if config.get("num_shared_experts") and how != "average":
        raise CheckpointError(f"config.json: expected the average of routed and shared experts, found {how!r}")
    unturned = config.get("prefix_dense_sliding_window_pattern", 1) != 1
    if unturned and any(kind != SLIDING for kind in _kinds(config, n_dense)[:n_dense]):
        raise CheckpointError("config.json: expected dense layers that are turned, found global ones that are not")


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_main = n_main_layers(keys)
    out = embedding_rules(metadata)
    for il in range(keys.n_layer):
        layer = _layer_rules(metadata, il)
        if il >= n_main:  # predicts a further token: no part of the forward, and often left out
            beyond = nextn_rules(keys, il, layer, f"model.layers.{il}.")
            layer = [replace(rule, required=False, synthetic=False) for rule in beyond]
        out += layer
    return out


def _layer_rules(metadata: Metadata, il: int) -> list[TensorRule]:
    keys, blk, hf = Keys(metadata), f"blk.{il}.", f"model.layers.{il}."
    out = [
        vector(blk, "attn_norm", hf + "input_layernorm", keys.n_embd),
        *attention_rules(metadata, il, bias=metadata.get(ATTENTION_BIAS)),
    ]
    if il < keys.integer("leading_dense_block_count", 0):
        return out + mlp_rules(metadata, il)
    mlp = hf + "mlp."
    n_ff = keys.integer("expert_feed_forward_length", 0) or keys.integer("feed_forward_length")
    router, gate, up, down = expert_rules(
        blk, mlp, PROJECTIONS, fused=mlp, n_expert=keys.n_expert, n_ff=n_ff, n_embd=keys.n_embd
    )
    both = TensorRule(blk + "ffn_gate_up_exps.weight", (keys.n_expert, 2 * n_ff, keys.n_embd))
    out += [router, *fused_or_not(metadata, [gate, up], [both]), down]
    n_shared = keys.integer("expert_shared_count", 0)
    if not n_shared:
        return out
    width = keys.integer("expert_shared_feed_forward_length", 0) or n_ff * n_shared
    return out + gated_matrices(blk, mlp + "shared_experts.", width, keys.n_embd, suffix="_shexp")


def example(sizes: Sizes) -> dict[str, Any]:
    return cohere_example(
        sizes,
        "cohere2_moe",
        "Cohere2MoeForCausalLM",
        head_dim=sizes.head_dim,
        intermediate_size=sizes.n_ff_expert,
        prefix_dense_intermediate_size=sizes.n_ff,
        first_k_dense_replace=1,
        num_experts=sizes.n_expert,
        num_experts_per_tok=sizes.n_expert_used,
        num_shared_experts=2,
        expert_selection_fn="sigmoid",
        norm_topk_prob=True,
        sliding_window=sizes.window,
        sliding_window_pattern=2,
        layer_norm_eps=1e-3,
    )


MAP = ArchMap(
    arch=_ARCH,
    model_types=("cohere2_moe",),
    architectures=("Cohere2MoeForCausalLM",),
    metadata=metadata,
    rules=rules,
    example=example,
)
