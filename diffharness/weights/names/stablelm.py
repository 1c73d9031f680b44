"""`stablelm`: StableLM 3B, StableLM 2 (1.6B, 12B), Stable Code.

The 12B normalises each head by a weight of its own and has no norm before its feed-forward, which reads the
attention's input (`use_parallel_residual`).
"""

from __future__ import annotations

from typing import Any

from diffharness.weights.names._config import expect_activation, need_float, need_int
from diffharness.weights.names._draw import NORM
from diffharness.weights.names._gpt import (
    QKV_BIAS,
    affine,
    gpt_metadata,
    optional,
    rope_keys,
    rotated_share,
    separate_qkv,
)
from diffharness.weights.names._keys import TIED_HEAD, Keys, head_rules, matrix
from diffharness.weights.names._map import STACK, ArchMap, Config, Sizes, TensorRule
from diffharness.weights.source import Metadata

_ARCH = "stablelm"
QK_NORM = "diffharness.qk_layernorm"  # bool


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    n_embd, n_head = need_int(config, "hidden_size"), need_int(config, "num_attention_heads")
    out = gpt_metadata(
        _ARCH,
        n_layer=need_int(config, "num_hidden_layers"),
        n_ctx=need_int(config, "max_position_embeddings"),
        n_embd=n_embd,
        n_ff=need_int(config, "intermediate_size"),
        n_head=n_head,
        n_head_kv=config.get("num_key_value_heads") or n_head,
        eps=need_float(config, "layer_norm_eps", "norm_eps"),
        n_vocab=need_int(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
    )
    return out | {
        f"{_ARCH}.rope.dimension_count": int(rotated_share(config, 0.25, "rope_pct") * (n_embd // n_head)),
        **rope_keys(_ARCH, config, written=False),
        f"{_ARCH}.use_parallel_residual": bool(config.get("use_parallel_residual", False)),
        QKV_BIAS: bool(config.get("use_qkv_bias", False)),
        QK_NORM: bool(config.get("qk_layernorm", False)),
    }


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, n_ff, size = keys.n_embd, keys.integer("feed_forward_length"), keys.head_dim
    n_head, n_kv = keys.n_head, keys.n_head_kv
    of_checkpoint = TIED_HEAD in metadata
    out = [
        TensorRule("token_embd.weight", (keys.n_vocab, n_embd), ("model.embed_tokens.weight",)),
        *affine("", "output_norm", "model.norm", n_embd),
        *head_rules(metadata),
    ]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        attn, sizes = hf + "self_attn.", (n_embd, n_kv * size, n_kv * size)
        norms = [_head_norm(blk, attn, "q", n_head, size), _head_norm(blk, attn, "k", n_kv, size)]
        ffn_norm = affine(blk, "ffn_norm", hf + "post_attention_layernorm", n_embd)
        if not of_checkpoint:
            norms, ffn_norm = optional(norms), optional(ffn_norm)
        out += [
            *affine(blk, "attn_norm", hf + "input_layernorm", n_embd),
            *separate_qkv(metadata, blk, attn, sizes, n_embd, bias=metadata.get(QKV_BIAS)),
            *(norms if metadata.get(QK_NORM, True) else ()),
            *matrix(blk, "attn_output", attn + "o_proj", n_embd, n_embd),
            *(ffn_norm if not (of_checkpoint and keys["use_parallel_residual"]) else ()),
            *matrix(blk, "ffn_gate", hf + "mlp.gate_proj", n_ff, n_embd),
            *matrix(blk, "ffn_up", hf + "mlp.up_proj", n_ff, n_embd),
            *matrix(blk, "ffn_down", hf + "mlp.down_proj", n_embd, n_ff),
        ]
    return out


def _head_norm(blk: str, attn: str, name: str, n_head: int, size: int) -> TensorRule:
    """One weight per head, which the checkpoint keeps apart."""
    hf = tuple(f"{attn}{name}_layernorm.norms.{head}.weight" for head in range(n_head))
    return TensorRule(f"{blk}attn_{name}_norm.weight", (n_head, size), hf, STACK, draw=NORM)


def example(sizes: Sizes) -> dict[str, Any]:
    return {
        "architectures": ["StableLmForCausalLM"],
        "model_type": "stablelm",
        "hidden_act": "silu",
        "hidden_size": sizes.n_embd,
        "intermediate_size": sizes.n_ff,
        "num_hidden_layers": sizes.n_layer,
        "num_attention_heads": sizes.n_head,
        "num_key_value_heads": sizes.n_head_kv,
        "max_position_embeddings": sizes.n_ctx,
        "layer_norm_eps": 1e-3,
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000.0,
        "use_qkv_bias": True,
        "qk_layernorm": True,
        "use_parallel_residual": False,
        "vocab_size": sizes.n_vocab,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }


MAP = ArchMap(
    arch=_ARCH,
    model_types=("stablelm", "stablelm_epoch"),
    architectures=("StableLmForCausalLM", "StableLMEpochForCausalLM"),
    metadata=metadata,
    rules=rules,
    example=example,
)
