"""`lfm2`, `lfm2moe`: LFM 2 and 2.5, dense and with experts.

The width of the dense model's feed-forward follows from a stated one by a rule (`block_auto_adjust_ff_dim`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import gated_matrices
from diffharness.weights.names._config import need_float, need_int
from diffharness.weights.names._draw import normal
from diffharness.weights.names._keys import Keys, decoder_example, decoder_metadata, head_rules, matrix, vector
from diffharness.weights.names._mamba import convolution
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._moe import MIXTRAL, expert_rules
from diffharness.weights.names._shared_experts import GATING
from diffharness.weights.source import Metadata

DENSE, SPARSE = "lfm2", "lfm2moe"


# -- keys -------------------------------------------------------------------------------------------------


def metadata(arch: str, config: Config) -> dict[str, Any]:
    if config.get("conv_bias"):
        raise CheckpointError("config.json: expected convolutions without biases, found `conv_bias` true")
    n_ff = _width(config) if arch == DENSE else need_int(config, "intermediate_size")
    tied = config.get("tie_word_embeddings", config.get("tie_embedding", True))
    whole = {"norm_eps": 1e-5, **config, "intermediate_size": n_ff, "tie_word_embeddings": tied}
    out = decoder_metadata(whole | {"rms_norm_eps": need_float(whole, "norm_eps")}, arch, default_theta=1e6)
    kv = out[f"{arch}.attention.head_count_kv"]
    out |= {
        f"{arch}.attention.head_count_kv": [kv if attends else 0 for attends in _attends(config)],
        f"{arch}.shortconv.l_cache": config.get("conv_L_cache") or 3,
    }
    if arch == DENSE:
        return out
    if not config.get("use_expert_bias", True):
        raise CheckpointError("config.json: expected a bias in the choice of experts (`use_expert_bias`)")
    out |= {
        f"{arch}.expert_count": need_int(config, "num_experts"),
        f"{arch}.expert_used_count": need_int(config, "num_experts_per_tok"),
        f"{arch}.expert_feed_forward_length": need_int(config, "moe_intermediate_size"),
        f"{arch}.leading_dense_block_count": config.get("num_dense_layers", 2),
        f"{arch}.expert_gating_func": GATING["sigmoid"],
    }
    if not config.get("norm_topk_prob", True):
        out[f"{arch}.expert_weights_norm"] = False
    scale = float(config.get("routed_scaling_factor") or 1.0)
    return out | ({f"{arch}.expert_weights_scale": scale} if scale != 1.0 else {})


def _width(config: Config) -> int:
    n_ff = need_int(config, "block_ff_dim", "intermediate_size")
    if not config.get("block_auto_adjust_ff_dim", True):
        return n_ff
    n_ff = int(2 * n_ff / 3)
    factor, multiple = config.get("block_ffn_dim_multiplier", 1.0), config.get("block_multiple_of", 256)
    return n_ff if factor is None else -(-int(factor * n_ff) // multiple) * multiple


def _attends(config: Config) -> list[bool]:
    """By layer, whether it attends."""
    n_layer, kinds = need_int(config, "num_hidden_layers"), config.get("layer_types")
    if kinds is None:
        indices = config.get("full_attn_idxs")
        return [indices is None or il in indices for il in range(n_layer)]
    if len(kinds) != n_layer or not set(kinds) <= {"conv", "full_attention"}:
        raise CheckpointError(f"config.json: `layer_types`: expected {n_layer} of conv, full_attention, found {kinds}")
    return [kind == "full_attention" for kind in kinds]


# -- tensors ----------------------------------------------------------------------------------------------


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, n_expert = keys.n_embd, keys.n_expert
    out = [
        TensorRule("token_embd.weight", (keys.n_vocab, n_embd), ("model.embed_tokens.weight",)),
        TensorRule("token_embd_norm.weight", (n_embd,), ("model.embedding_norm.weight",)),
        *head_rules(metadata),
    ]
    n_kv = keys.by_layer("attention.head_count_kv")
    n_dense = keys.integer("leading_dense_block_count", 0)
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        ffn = hf + "feed_forward."
        out += [
            vector(blk, "attn_norm", hf + "operator_norm", n_embd),
            *(_attention(keys, il, blk, hf + "self_attn.") if n_kv[il] else _convolution(keys, blk, hf + "conv.")),
            vector(blk, "ffn_norm", hf + "ffn_norm", n_embd),
        ]
        if n_expert and il >= n_dense:
            out += _experts(keys, blk, ffn)
        else:
            out += gated_matrices(blk, ffn, keys.integer("feed_forward_length"), n_embd, ("w1", "w3", "w2"))
    return out


def _attention(keys: Keys, il: int, blk: str, hf: str) -> list[TensorRule]:
    n_embd, size = keys.n_embd, keys.head_dim
    q = keys.by_layer("attention.head_count")[il] * size
    kv = keys.by_layer("attention.head_count_kv")[il] * size
    return [
        *matrix(blk, "attn_q", hf + "q_proj", q, n_embd, bias=None),
        *matrix(blk, "attn_k", hf + "k_proj", kv, n_embd, bias=None),
        *matrix(blk, "attn_v", hf + "v_proj", kv, n_embd, bias=None),
        *matrix(blk, "attn_output", hf + "out_proj", n_embd, q),
        vector(blk, "attn_q_norm", hf + "q_layernorm", size),
        vector(blk, "attn_k_norm", hf + "k_layernorm", size),
    ]


def _convolution(keys: Keys, blk: str, hf: str) -> list[TensorRule]:
    n_embd = keys.n_embd
    return [
        *matrix(blk, "shortconv.in_proj", hf + "in_proj", 3 * n_embd, n_embd),
        *convolution(blk, hf + "conv", n_embd, keys.integer("shortconv.l_cache"), gguf="shortconv.conv", bias=False),
        *matrix(blk, "shortconv.out_proj", hf + "out_proj", n_embd, n_embd),
    ]


def _experts(keys: Keys, blk: str, hf: str) -> list[TensorRule]:
    sizes = {"n_expert": keys.n_expert, "n_ff": keys.integer("expert_feed_forward_length"), "n_embd": keys.n_embd}
    bias = TensorRule(blk + "exp_probs_b.bias", (keys.n_expert,), (hf + "expert_bias",), draw=normal(0.3))
    return [*expert_rules(blk, hf, MIXTRAL, fused=hf, **sizes), bias]


# -- synthetic models -------------------------------------------------------------------------------------


def example(arch: str, sizes: Sizes) -> dict[str, Any]:
    more: dict[str, Any] = {
        "intermediate_size": sizes.n_ff,
        "layer_types": ["full_attention" if il % 3 == 1 else "conv" for il in range(sizes.n_layer)],
        "conv_L_cache": 3,
        "conv_bias": False,
        "norm_eps": 1e-3,
        "rms_norm_eps": None,
        "hidden_act": None,
        "head_dim": None,
        "pad_token_id": 0,
    }
    if arch == DENSE:
        rule = {"block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.5, "block_multiple_of": 32}
        return decoder_example(sizes, "lfm2", "Lfm2ForCausalLM", **more, **rule)
    experts = {
        "num_experts": sizes.n_expert,
        "num_experts_per_tok": sizes.n_expert_used,
        "moe_intermediate_size": sizes.n_ff_expert,
        "num_dense_layers": 1,
        "use_expert_bias": True,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    }
    return decoder_example(sizes, "lfm2_moe", "Lfm2MoeForCausalLM", **more, **experts)


def _map(arch: str, model_type: str, architecture: str) -> ArchMap:
    return ArchMap(
        arch=arch,
        model_types=(model_type,),
        architectures=(architecture,),
        metadata=partial(metadata, arch),
        rules=rules,
        example=partial(example, arch),
    )


MAPS = (_map(DENSE, "lfm2", "Lfm2ForCausalLM"), _map(SPARSE, "lfm2_moe", "Lfm2MoeForCausalLM"))
