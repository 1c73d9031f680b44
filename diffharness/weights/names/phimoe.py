"""`phimoe`: Phi-3.5-MoE. Mixtral's experts, LayerNorms (whose epsilon has RMSNorm's key), biases, LongRoPE.

The router's `router_jitter_noise`, which decides how near experts must be to weigh each other down, has no GGUF key.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffharness.weights.names._blocks import ATTENTION_BIAS
from diffharness.weights.names._config import expect_activation, need_int, without_rope
from diffharness.weights.names._gpt import affine, separate_qkv
from diffharness.weights.names._keys import TIED_HEAD, Keys, decoder_example, decoder_metadata, head_rules, matrix
from diffharness.weights.names._longrope import longrope_example, longrope_metadata, longrope_rules
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.names._moe import MIXTRAL, expert_rules
from diffharness.weights.source import Metadata

ROUTER_JITTER = "diffharness.router_jitter_noise"
HEAD_BIAS = "diffharness.head_bias"  # bool


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    out = decoder_metadata(without_rope(config), "phimoe")
    out |= longrope_metadata(config, "phimoe", Keys(out).head_dim, default_theta=1e6)
    return out | {
        "phimoe.attention.sliding_window": config.get("sliding_window") or 0,
        "phimoe.expert_count": need_int(config, "num_local_experts"),
        "phimoe.expert_used_count": need_int(config, "num_experts_per_tok"),
        ROUTER_JITTER: float(config.get("router_jitter_noise", 0.01)),
        ATTENTION_BIAS: bool(config.get("attention_bias", False)),
        HEAD_BIAS: bool(config.get("lm_head_bias", False)),
    }


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, size = keys.n_embd, keys.head_dim
    q, kv = keys.n_head * size, keys.n_head_kv * size
    bias = metadata.get(ATTENTION_BIAS)
    sizes = {"n_expert": keys.n_expert, "n_ff": keys.integer("feed_forward_length"), "n_embd": n_embd}
    out = [
        TensorRule("token_embd.weight", (keys.n_vocab, n_embd), ("model.embed_tokens.weight",)),
        *affine("", "output_norm", "model.norm", n_embd),
        *head_rules(metadata),
        *longrope_rules(metadata, size),
    ]
    if metadata.get(HEAD_BIAS, TIED_HEAD not in metadata):
        required = TIED_HEAD in metadata
        out.append(TensorRule("output.bias", (keys.n_vocab,), ("lm_head.bias",), required=required))
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        moe = hf + "block_sparse_moe."
        out += [
            *affine(blk, "attn_norm", hf + "input_layernorm", n_embd),
            *separate_qkv(metadata, blk, hf + "self_attn.", (q, kv, kv), n_embd, bias=bias),
            *matrix(blk, "attn_output", hf + "self_attn.o_proj", n_embd, q, bias=bias),
            *affine(blk, "ffn_norm", hf + "post_attention_layernorm", n_embd),
            *map(_router, expert_rules(blk, moe, MIXTRAL, fused=hf + "mlp.", **sizes)),
        ]
    return out


def _router(rule: TensorRule) -> TensorRule:
    """In memory transformers calls the router's matrix `mlp.router.weight`."""
    if not rule.name.endswith("ffn_gate_inp.weight"):
        return rule
    return replace(rule, aliases=tuple(((name.replace(".gate.", ".router."),), at) for (name,), at in rule.aliases))


def example(sizes: Sizes) -> dict[str, Any]:
    """The original context is longer than the tests': transformers has the short divisors for every length."""
    scales = {"long_mscale": 1.25, "short_mscale": 1.25, "original_max_position_embeddings": 256}
    longrope = longrope_example(sizes.n_embd // sizes.n_head, 256, **scales)
    more: dict[str, Any] = {
        "head_dim": None,
        "max_position_embeddings": 4 * sizes.n_ctx,
        "sliding_window": None,
        "num_local_experts": sizes.n_expert,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.15,
        "attention_bias": True,
        "lm_head_bias": True,
    }
    return decoder_example(sizes, "phimoe", "PhiMoEForCausalLM", **longrope, **more)


MAP = ArchMap(
    arch="phimoe",
    model_types=("phimoe",),
    architectures=("PhiMoEForCausalLM", "PhimoeForCausalLM"),
    metadata=metadata,
    rules=rules,
    example=example,
)
