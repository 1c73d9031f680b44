"""Feed-forwards of DeepSeek's kind: leading dense layers, then routed experts beside shared ones; and `nextn` layers.

Shared experts are one MLP. A router may add a bias to its scores for the choice (`exp_probs_b`). Layers beyond the
model's own that predict further tokens (multi-token prediction, `nextn`) are in some files; no forward reads them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import gated_matrices
from diffharness.weights.names._config import need_float, need_int
from diffharness.weights.names._draw import normal
from diffharness.weights.names._keys import Keys, matrix, vector
from diffharness.weights.names._map import Config, TensorRule
from diffharness.weights.names._moe import PROJECTIONS, expert_rules

GATING = {"softmax": 1, "sigmoid": 2}  # GGUF's `expert_gating_func`
_CHOICE_BIAS = normal(0.2)  # small enough that the bias does not choose alone


def experts_metadata(config: Config, arch: str) -> dict[str, Any]:
    """The keys of experts under DeepSeek's names in config.json; gating and groups only where it names them."""
    out: dict[str, Any] = {
        f"{arch}.leading_dense_block_count": n_leading_dense(config),
        f"{arch}.expert_count": need_int(config, "n_routed_experts", "num_local_experts", "num_experts"),
        f"{arch}.expert_used_count": need_int(config, "num_experts_per_tok"),
        f"{arch}.expert_feed_forward_length": need_int(config, "moe_intermediate_size"),
        f"{arch}.expert_shared_count": config.get("n_shared_experts") or config.get("num_shared_experts") or 0,
    }
    if config.get("routed_scaling_factor") is not None:
        out[f"{arch}.expert_weights_scale"] = need_float(config, "routed_scaling_factor")
    if config.get("n_group") is not None:
        out[f"{arch}.expert_group_count"] = need_int(config, "n_group")
    if config.get("topk_group") is not None:
        out[f"{arch}.expert_group_used_count"] = need_int(config, "topk_group")
    return out


def n_leading_dense(config: Config, default: int | None = None) -> int:
    """Layers without experts, which all must come first, by a word for each layer or else by their number."""
    kinds = config.get("mlp_layer_types")
    if not kinds:
        return need_int({"first_k_dense_replace": default, **config}, "first_k_dense_replace")
    n_dense = next((il for il, kind in enumerate(kinds) if kind != "dense"), len(kinds))
    if "dense" in kinds[n_dense:]:
        raise CheckpointError("config.json: `mlp_layer_types`: expected dense layers before all sparse ones")
    return n_dense


def gating_code(config: Config, *keys: str, default: str) -> int:
    """`expert_gating_func` by the first of `keys` that config.json has."""
    found = next((config[key] for key in keys if config.get(key) is not None), default)
    if found not in GATING:
        raise CheckpointError(f"config.json: `{keys[0]}`: expected softmax or sigmoid, found {found!r}")
    return GATING[found]


def feed_forward_rules(
    keys: Keys,
    il: int,
    mlp: str,
    *,
    bias: str | None = None,
    shared: str = "shared_experts.",
    n_ff_shared: int | None = None,
) -> list[TensorRule]:
    """The dense MLP of a leading layer, or router, experts and shared experts.

    `mlp` is the Hugging Face prefix of the block; in it `shared` that of the shared experts, which are `n_ff_shared`
    wide (their number times an expert's width, unless stated); `bias` the name of the router's bias, if it may have one
    (where it scores by softmax no published model has).
    """
    blk, n_embd = f"blk.{il}.", keys.n_embd
    if il < keys.integer("leading_dense_block_count", 0):
        return gated_matrices(blk, mlp, keys.by_layer("feed_forward_length")[il], n_embd)
    n_ff = expert_width(keys, il)
    out = expert_rules(blk, mlp, PROJECTIONS, fused=mlp, n_expert=keys.n_expert, n_ff=n_ff, n_embd=n_embd)
    if bias is not None:
        name, made = blk + "exp_probs_b.bias", keys.get("expert_gating_func") != GATING["softmax"]
        out.append(TensorRule(name, (keys.n_expert,), (mlp + bias,), required=False, synthetic=made, draw=_CHOICE_BIAS))
    width = n_ff * keys.integer("expert_shared_count", 0) if n_ff_shared is None else n_ff_shared
    return out + (gated_matrices(blk, mlp + shared, width, n_embd, suffix="_shexp") if width else [])


def expert_width(keys: Keys, il: int) -> int:
    """Width of one expert of layer `il`; where no key says, the dense width divided among the experts used."""
    stated = keys.by_layer("expert_feed_forward_length", 0)[il]
    return stated or keys.by_layer("feed_forward_length")[il] // max(1, keys.integer("expert_used_count"))


def fused_pair_rules(rules: Iterable[TensorRule], blk: str) -> list[TensorRule]:
    """The same, gate and up of experts also in one stack `ffn_gate_up_exps`, as files may keep them."""
    out, pair = [], [blk + "ffn_gate_exps.weight", blk + "ffn_up_exps.weight"]
    for rule in rules:
        if rule.name in pair:
            rule = replace(rule, required=False, synthetic=True)
        if rule.name == pair[1]:
            n_expert, n_ff, n_embd = rule.shape
            out.append(TensorRule(blk + "ffn_gate_up_exps.weight", (n_expert, 2 * n_ff, n_embd), required=False))
        out.append(rule)
    return out


def n_main_layers(keys: Keys) -> int:
    """Layers of the forward: `block_count` without those that predict further tokens."""
    return keys.n_layer - keys.integer("nextn_predict_layers", 0)


def nextn_metadata(config: Config, arch: str) -> dict[str, Any]:
    """The keys of a model whose converter keeps the layers that predict further tokens: these count as blocks."""
    if not (n_nextn := config.get("num_nextn_predict_layers") or 0):
        return {}
    return {
        f"{arch}.block_count": need_int(config, "num_hidden_layers") + n_nextn,
        f"{arch}.nextn_predict_layers": n_nextn,
    }


def nextn_rules(keys: Keys, il: int, layer: Iterable[TensorRule], hf: str) -> list[TensorRule]:
    """`layer`'s rules and what a layer beyond the model's own has besides, none of it required."""
    blk, n_embd = f"blk.{il}.nextn.", keys.n_embd
    own = [
        *matrix(blk, "eh_proj", hf + "eh_proj", n_embd, 2 * n_embd),
        vector(blk, "enorm", hf + "enorm", n_embd),
        vector(blk, "hnorm", hf + "hnorm", n_embd),
        vector(blk, "shared_head_norm", hf + "shared_head.norm", n_embd),
    ]
    rare = [
        *matrix(blk, "embed_tokens", hf + "embed_tokens", keys.n_vocab, n_embd),
        *matrix(blk, "shared_head_head", hf + "shared_head.head", keys.n_vocab, n_embd),
    ]
    made = [replace(rule, required=False, synthetic=True) for rule in (*layer, *own)]
    return made + [replace(rule, required=False) for rule in rare]


def experts_config(keys: Keys) -> dict[str, Any]:
    """config.json's keys of layers and experts, as DeepSeek names them."""
    out: dict[str, Any] = {
        "num_hidden_layers": n_main_layers(keys),
        "first_k_dense_replace": keys.integer("leading_dense_block_count", 0),
        "n_routed_experts": keys.n_expert,
        "num_experts_per_tok": keys["expert_used_count"],
        "moe_intermediate_size": expert_width(keys, keys.n_layer - 1),
        "n_shared_experts": keys.integer("expert_shared_count", 0),
        "routed_scaling_factor": keys.get("expert_weights_scale") or 1.0,
        "norm_topk_prob": bool(keys.get("expert_weights_norm", False)),
        "n_group": keys.get("expert_group_count") or 1,
        "topk_group": keys.get("expert_group_used_count") or 1,
    }
    if n_nextn := keys.integer("nextn_predict_layers", 0):
        out["num_nextn_predict_layers"] = n_nextn
    return out
