"""`kimi-linear`: Kimi Linear.

config.json counts layers from one and lists those of each kind, or, as transformers saves it, has a word per layer. Of
latent attention GGUF keeps the matrix that makes keys and values in two parts, the keys' transposed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import gated_matrices
from diffharness.weights.names._config import expect_activation, need, need_int
from diffharness.weights.names._draw import around, by_width, normal
from diffharness.weights.names._keys import Keys, decoder_example, decoder_metadata, embedding_rules, matrix, vector
from diffharness.weights.names._map import ArchMap, Config, Piece, Shaped, Sizes, TensorRule
from diffharness.weights.names._moe import MIXTRAL, expert_rules
from diffharness.weights.names._reorder import MINUS_EXP, decays
from diffharness.weights.names._shared_experts import GATING, n_leading_dense
from diffharness.weights.source import Float32Array, Metadata

_ARCH = "kimi-linear"
_CONV = by_width(1.6)


# -- keys -------------------------------------------------------------------------------------------------


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    _expect_known(config)
    linear = config.get("linear_attn_config") or {}
    context = need_int(config, "model_max_length", "max_position_embeddings")
    out = decoder_metadata({**config, "head_dim": None, "max_position_embeddings": context}, _ARCH)
    n_shared, rank = need_int(config, "qk_rope_head_dim"), need_int(config, "kv_lora_rank")
    n_linear = linear.get("num_heads") or config.get("linear_num_heads")
    if n_linear is not None and n_linear != out[f"{_ARCH}.attention.head_count"]:
        raise CheckpointError(f"config.json: expected as many heads in every layer, found {n_linear} in recurrent ones")
    return out | {
        f"{_ARCH}.attention.head_count_kv": [int(attends) for attends in _attends(config, linear)],
        f"{_ARCH}.rope.dimension_count": n_shared,
        f"{_ARCH}.attention.kv_lora_rank": rank,
        f"{_ARCH}.attention.key_length": rank + n_shared,
        f"{_ARCH}.attention.value_length": rank,
        f"{_ARCH}.attention.key_length_mla": need_int(config, "qk_nope_head_dim") + n_shared,
        f"{_ARCH}.attention.value_length_mla": need_int(config, "v_head_dim"),
        f"{_ARCH}.ssm.conv_kernel": linear.get("short_conv_kernel_size") or config.get("linear_conv_kernel_dim") or 4,
        f"{_ARCH}.kda.head_dim": linear.get("head_dim") or config.get("linear_head_dim") or 128,
        f"{_ARCH}.expert_count": need_int(config, "num_experts", "num_local_experts"),
        f"{_ARCH}.expert_used_count": need_int(config, "num_experts_per_token", "num_experts_per_tok"),
        f"{_ARCH}.expert_feed_forward_length": need_int(config, "moe_intermediate_size"),
        f"{_ARCH}.expert_shared_count": need_int(config, "num_shared_experts", "n_shared_experts"),
        f"{_ARCH}.expert_weights_scale": float(need(config, "routed_scaling_factor")),
        f"{_ARCH}.expert_gating_func": GATING["sigmoid"],
        f"{_ARCH}.leading_dense_block_count": n_leading_dense(config, 1),
    }


def _expect_known(config: Config) -> None:
    """CheckpointError for what neither GGUF nor the reference has a form of."""
    if config.get("q_lora_rank"):
        raise CheckpointError("config.json: expected queries that are not compressed, found `q_lora_rank`")
    if config.get("moe_renormalize", config.get("norm_topk_prob", True)) is False:
        raise CheckpointError("config.json: expected experts' weights that sum to one (`moe_renormalize`)")
    if config.get("moe_router_activation_func", "sigmoid") != "sigmoid" or config.get("moe_layer_freq", 1) != 1:
        raise CheckpointError("config.json: expected sigmoid routing in every layer but the leading ones")
    if (config.get("num_expert_group") or config.get("n_group") or 1) != 1:
        raise CheckpointError("config.json: expected experts without groups (`num_expert_group`)")
    if config.get("mla_use_nope") is False:
        raise CheckpointError("config.json: expected attention without positions (`mla_use_nope`)")


def _attends(config: Config, linear: Config) -> list[bool]:
    """By layer, whether it has latent attention."""
    n_layer, kinds = need_int(config, "num_hidden_layers"), config.get("layer_types")
    if kinds is not None and len(kinds) == n_layer:
        return [kind == "full_attention" for kind in kinds]
    listed = linear.get("full_attn_layers")
    if listed is None:
        raise CheckpointError("config.json lacks `linear_attn_config.full_attn_layers`")
    return [il + 1 in listed for il in range(n_layer)]


# -- tensors ----------------------------------------------------------------------------------------------


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, out = keys.n_embd, embedding_rules(metadata)
    n_head = max(keys.by_layer("attention.head_count"))  # layers without KV heads may state none
    n_kv = keys.by_layer("attention.head_count_kv")
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        attn = hf + "self_attn."
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", n_embd),
            *(_latent(keys, n_head, blk, attn) if n_kv[il] else _delta(keys, n_head, blk, attn)),
            vector(blk, "ffn_norm", hf + "post_attention_layernorm", n_embd),
        ]
        if il < keys.integer("leading_dense_block_count", 0):
            dense = gated_matrices(blk, hf + "mlp.", keys.integer("feed_forward_length"), n_embd)
            out += [_also(rule, hf + "mlp.", hf + "block_sparse_moe.") for rule in dense]
        else:
            out += _experts(keys, blk, hf + "block_sparse_moe.")
    return out


def _delta(keys: Keys, n_head: int, blk: str, hf: str) -> list[TensorRule]:
    n_embd, size, kernel = keys.n_embd, keys.integer("kda.head_dim"), keys.integer("ssm.conv_kernel")
    inner, out = n_head * size, []
    for name in ("q", "k", "v"):
        gguf, in_hf = (1, inner, 1, kernel), (inner, 1, kernel)
        out += [
            *matrix(blk, f"attn_{name}", f"{hf}{name}_proj", inner, n_embd, bias=None),
            TensorRule(
                f"{blk}ssm_conv1d_{name}.weight",
                gguf,
                (f"{hf}{name}_conv1d.weight",),
                Shaped(gguf, in_hf),
                draw=_CONV,
            ),
        ]
    a_shape = (1, 1, n_head, 1)
    return [
        *out,
        *matrix(blk, "ssm_f_a", hf + "f_a_proj", size, n_embd),
        *matrix(blk, "ssm_f_b", hf + "f_b_proj", inner, size),
        *matrix(blk, "ssm_beta", hf + "b_proj", n_head, n_embd),
        TensorRule(blk + "ssm_dt.bias", (inner,), (hf + "dt_bias",), draw=around(0.5, 0.8, -3.0)),
        TensorRule(blk + "ssm_a", a_shape, (hf + "A_log",), MINUS_EXP, draw=decays(0.05, 1.0)),
        *matrix(blk, "ssm_g_a", hf + "g_a_proj", size, n_embd),
        *matrix(blk, "ssm_g_b", hf + "g_b_proj", inner, size),
        vector(blk, "ssm_norm", hf + "o_norm", size),
        *matrix(blk, "attn_output", hf + "o_proj", n_embd, inner),
    ]


def _latent(keys: Keys, n_head: int, blk: str, hf: str) -> list[TensorRule]:
    n_embd, rank = keys.n_embd, keys.integer("attention.kv_lora_rank")
    size_k, size_v = keys.integer("attention.key_length_mla"), keys.integer("attention.value_length_mla")
    n_shared = keys.integer("rope.dimension_count")
    own = size_k - n_shared  # components of a key that are its head's own
    whole, joint = (n_head * (own + size_v), rank), (hf + "kv_b_proj.weight",)

    def of_keys(w: Float32Array) -> Float32Array:
        return w.reshape(n_head, own + size_v, rank)[:, :own].transpose(0, 2, 1)

    def of_values(w: Float32Array) -> Float32Array:
        return w.reshape(n_head, own + size_v, rank)[:, own:]

    return [
        *matrix(blk, "attn_q", hf + "q_proj", n_head * size_k, n_embd),
        *matrix(blk, "attn_kv_a_mqa", hf + "kv_a_proj_with_mqa", rank + n_shared, n_embd),
        vector(blk, "attn_kv_a_norm", hf + "kv_a_layernorm", rank),
        TensorRule(blk + "attn_k_b.weight", (n_head, rank, own), joint, Piece(whole, of_keys)),
        TensorRule(blk + "attn_v_b.weight", (n_head, size_v, rank), joint, Piece(whole, of_values)),
        *matrix(blk, "attn_output", hf + "o_proj", n_embd, n_head * size_v),
    ]


def _experts(keys: Keys, blk: str, hf: str) -> list[TensorRule]:
    n_expert, n_ff, n_embd = keys.n_expert, keys.integer("expert_feed_forward_length"), keys.n_embd
    in_memory = hf.replace("block_sparse_moe.", "mlp.")
    routed = expert_rules(blk, hf, MIXTRAL, fused=in_memory, n_expert=n_expert, n_ff=n_ff, n_embd=n_embd)
    bias = TensorRule(blk + "exp_probs_b.bias", (n_expert,), (hf + "gate.e_score_correction_bias",), draw=normal(0.3))
    n_shared = max(1, keys.integer("expert_shared_count", 1)) * n_ff
    shared = gated_matrices(blk, hf + "shared_experts.", n_shared, n_embd, suffix="_shexp")
    return [*routed, *(_also(rule, hf, in_memory) for rule in (bias, *shared))]


def _also(rule: TensorRule, hf: str, other: str) -> TensorRule:
    """The rule with another prefix: transformers has one for both kinds in memory, and the other one when it saves."""
    parts = tuple(part.replace(hf, other) for part in rule.hf)
    return replace(rule, aliases=((parts, rule.layout),))


# -- synthetic models -------------------------------------------------------------------------------------


def example(sizes: Sizes) -> dict[str, Any]:
    full = [il + 1 for il in range(sizes.n_layer) if il % 4 == 2]
    return decoder_example(
        sizes,
        "kimi_linear",
        "KimiLinearForCausalLM",
        head_dim=None,
        num_key_value_heads=sizes.n_head,
        rope_theta=None,
        rms_norm_eps=1e-6,  # that of the norm of queries and keys, whatever the others have
        max_position_embeddings=None,
        model_max_length=sizes.n_ctx,
        kv_lora_rank=24,
        q_lora_rank=None,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=20,
        linear_attn_config={
            "full_attn_layers": full,
            "kda_layers": [il + 1 for il in range(sizes.n_layer) if il + 1 not in full],
            "head_dim": 16,
            "num_heads": sizes.n_head,
            "short_conv_kernel_size": 4,
        },
        num_experts=sizes.n_expert,
        num_experts_per_token=sizes.n_expert_used,
        num_shared_experts=2,
        moe_intermediate_size=sizes.n_ff_expert,
        moe_renormalize=True,
        moe_router_activation_func="sigmoid",
        routed_scaling_factor=2.5,
        first_k_dense_replace=1,
        num_expert_group=1,
        topk_group=1,
        pad_token_id=0,
    )


MAP = ArchMap(
    arch=_ARCH,
    model_types=("kimi_linear",),
    architectures=("KimiLinearForCausalLM",),
    metadata=metadata,
    rules=rules,
    example=example,
)
