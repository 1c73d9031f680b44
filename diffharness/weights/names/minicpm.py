"""`minicpm` and `minicpm3`.

MiniCPM 1 to 4 have Llama's names, with Q and K rows permuted to interleaved rotary pairs; MiniCPM-MoE's experts are
`mlp.experts.N.w1` and so on. MiniCPM 3 has rows as Hugging Face has them; its scales have keys here only where they
are not those of the published model, which the engine has built in.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from diffharness.weights.names._blocks import attention_rules, mlp_rules
from diffharness.weights.names._config import expect_activation, need_float, need_int, without_rope
from diffharness.weights.names._draw import normal
from diffharness.weights.names._keys import Keys, decoder_example, decoder_metadata, embedding_rules, matrix, vector
from diffharness.weights.names._longrope import LONG, longrope_example, longrope_metadata, longrope_rules
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._moe import MIXTRAL, expert_rules
from diffharness.weights.source import Metadata

_BUILT_IN: dict[str, Any] = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256}


def _metadata(config: Config, arch: str, n_rot: int) -> dict[str, Any]:
    """The keys of both, without the scales."""
    expect_activation(config, "silu")
    out = decoder_metadata({"tie_word_embeddings": True, **without_rope(config)}, arch)
    return out | longrope_metadata(config, arch, n_rot)


def _scales(config: Config, arch: str) -> dict[str, float]:
    return {
        f"{arch}.embedding_scale": need_float(config, "scale_emb"),
        f"{arch}.residual_scale": need_float(config, "scale_depth") / math.sqrt(need_int(config, "num_hidden_layers")),
        f"{arch}.logit_scale": need_int(config, "hidden_size") / need_float(config, "dim_model_base"),
    }


# -- MiniCPM 1, 2, 4 ------------------------------------------------------------------------------------


def metadata(config: Config) -> dict[str, Any]:
    size = need_int(config, "hidden_size") // max(1, need_int(config, "num_attention_heads"))
    out = _metadata(config, "minicpm", int(config.get("head_dim") or size)) | _scales(config, "minicpm")
    if LONG in out:
        out["minicpm.rope.scaling.type"] = "longrope"
    if config.get("num_experts"):
        out["minicpm.expert_count"] = need_int(config, "num_experts")
        out["minicpm.expert_used_count"] = need_int(config, "num_experts_per_tok")
    return out


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_rot, n_ff = keys.integer("rope.dimension_count", keys.head_dim), keys.integer("feed_forward_length")
    out = [*embedding_rules(metadata), *longrope_rules(metadata, n_rot)]
    out.append(TensorRule("rope_freqs.weight", (n_rot // 2,), required=False))
    bias = False if LONG in metadata else None  # an artifact from elsewhere may have biases
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", keys.n_embd),
            *attention_rules(metadata, il, permuted=True, bias=bias),
            vector(blk, "ffn_norm", hf + "post_attention_layernorm", keys.n_embd),
        ]
        if keys.n_expert:
            sizes = {"n_expert": keys.n_expert, "n_ff": n_ff, "n_embd": keys.n_embd}
            out += expert_rules(blk, hf + "mlp.", MIXTRAL, fused=hf + "mlp.", **sizes)
            out += _shared_rules(keys, blk)
        else:
            out += mlp_rules(metadata, il, bias=bias)
    return out


def _shared_rules(keys: Keys, blk: str) -> list[TensorRule]:
    """An MLP beside the experts, which the engine reads although no published model has one."""
    n_ff = keys.integer("expert_shared_feed_forward_length", 0)
    shapes = {"gate": (n_ff, keys.n_embd), "up": (n_ff, keys.n_embd), "down": (keys.n_embd, n_ff)}
    return [TensorRule(f"{blk}ffn_{part}_shexp.weight", shape) for part, shape in shapes.items() if n_ff]


def example(sizes: Sizes) -> dict[str, Any]:
    scales = {"scale_emb": 3.0, "scale_depth": 0.9, "dim_model_base": sizes.n_embd // 3}
    longrope = longrope_example(sizes.n_embd // sizes.n_head, 48)
    return decoder_example(sizes, "minicpm", "MiniCPMForCausalLM", head_dim=None, **scales, **longrope)


# -- MiniCPM 3 ------------------------------------------------------------------------------------------


def minicpm3_metadata(config: Config) -> dict[str, Any]:
    n_still, n_rot = need_int(config, "qk_nope_head_dim"), need_int(config, "qk_rope_head_dim")
    size = need_int(config, "hidden_size") // max(1, need_int(config, "num_attention_heads"))
    out = _metadata({**config, "head_dim": None}, "minicpm3", n_rot) | {
        "minicpm3.attention.q_lora_rank": need_int(config, "q_lora_rank"),
        "minicpm3.attention.kv_lora_rank": need_int(config, "kv_lora_rank"),
        "minicpm3.attention.key_length": n_still + n_rot,
        "minicpm3.attention.value_length": int(config.get("v_head_dim") or size),
    }
    complete = _BUILT_IN | {key: value for key, value in config.items() if value is not None}
    built_in = _scales({**complete, **_BUILT_IN}, "minicpm3")
    return out | {key: value for key, value in _scales(complete, "minicpm3").items() if value != built_in[key]}


def minicpm3_rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, n_head, size = keys.n_embd, keys.n_head, keys.head_dim
    n_rot = keys.integer("rope.dimension_count", size)
    size_v = keys.integer("attention.value_length", n_embd // max(1, n_head))
    rank_q, rank = keys.integer("attention.q_lora_rank"), keys.integer("attention.kv_lora_rank")
    embedding, *rest = embedding_rules(metadata)
    # The built-in scales are a wide model's: of a narrow one's usual embedding they would make logits of certainty.
    drawn = normal(1.3 * math.sqrt(n_embd) / _BUILT_IN["dim_model_base"])
    out = [replace(embedding, draw=drawn), *rest, *longrope_rules(metadata, n_rot)]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        attn = hf + "self_attn."
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", n_embd),
            *matrix(blk, "attn_q_a", attn + "q_a_proj", rank_q, n_embd),
            vector(blk, "attn_q_a_norm", attn + "q_a_layernorm", rank_q),
            *matrix(blk, "attn_q_b", attn + "q_b_proj", n_head * size, rank_q),
            *matrix(blk, "attn_kv_a_mqa", attn + "kv_a_proj_with_mqa", rank + n_rot, n_embd),
            vector(blk, "attn_kv_a_norm", attn + "kv_a_layernorm", rank),
            *matrix(blk, "attn_kv_b", attn + "kv_b_proj", n_head * (size - n_rot + size_v), rank),
            *matrix(blk, "attn_output", attn + "o_proj", n_embd, n_head * size_v),
            vector(blk, "ffn_norm", hf + "post_attention_layernorm", n_embd),
            *mlp_rules(metadata, il),
        ]
    return out


def minicpm3_example(sizes: Sizes) -> dict[str, Any]:
    latent = {
        "q_lora_rank": 2 * sizes.n_embd,
        "kv_lora_rank": sizes.n_embd,
        "qk_nope_head_dim": sizes.head_dim * 3 // 4,
        "qk_rope_head_dim": sizes.head_dim // 2,
        "v_head_dim": sizes.head_dim,
        "num_key_value_heads": sizes.n_head,
        "rms_norm_eps": 1e-6,  # what the norms of latents have, whatever is said here
        "tie_word_embeddings": True,
    }
    longrope = longrope_example(sizes.head_dim // 2, 48)
    return decoder_example(sizes, "minicpm3", "MiniCPM3ForCausalLM", head_dim=None, **latent, **_BUILT_IN, **longrope)


MAPS = (
    ArchMap(
        arch="minicpm",
        model_types=("minicpm",),
        architectures=("MiniCPMForCausalLM",),
        metadata=metadata,
        rules=rules,
        example=example,
        transformers=False,
    ),
    ArchMap(
        arch="minicpm3",
        model_types=("minicpm3",),
        architectures=("MiniCPM3ForCausalLM",),
        metadata=minicpm3_metadata,
        rules=minicpm3_rules,
        example=minicpm3_example,
    ),
)
