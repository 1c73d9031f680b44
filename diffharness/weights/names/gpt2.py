"""`gpt2`: GPT-2. One matrix for queries, keys and values; matrices are transposed (`Conv1D`); the head is tied."""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import need_float, need_int
from diffharness.weights.names._draw import normal
from diffharness.weights.names._gpt import affine, also_spelled, buffers, expect_tanh_gelu, fused_qkv, gpt_metadata
from diffharness.weights.names._keys import Keys, head_rules, matrix
from diffharness.weights.names._map import PLAIN, TRANSPOSED, ArchMap, Config, Sizes, TensorRule
from diffharness.weights.source import Metadata


def metadata(config: Config) -> dict[str, Any]:
    expect_tanh_gelu(config, "activation_function", "gelu_new")
    for key, value in (("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if config.get(key, value) != value:
            raise CheckpointError(f"config.json: `{key}`: expected {value}: GGUF has no key for it")
    n_embd = need_int(config, "n_embd", "hidden_size")
    return gpt_metadata(
        "gpt2",
        n_layer=need_int(config, "n_layer", "num_hidden_layers"),
        n_ctx=need_int(config, "n_positions", "n_ctx", "max_position_embeddings"),
        n_embd=n_embd,
        n_ff=config.get("n_inner") or 4 * n_embd,
        n_head=need_int(config, "n_head", "num_attention_heads"),
        n_head_kv=None,
        eps=need_float(config, "layer_norm_epsilon"),
        n_vocab=need_int(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", True)),
    )


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, n_ff = keys.n_embd, keys.integer("feed_forward_length")
    kv = keys.n_head_kv * keys.head_dim
    out = [
        TensorRule("token_embd.weight", (keys.n_vocab, n_embd), ("transformer.wte.weight",)),
        TensorRule(
            "position_embd.weight",
            (keys.integer("context_length"), n_embd),
            ("transformer.wpe.weight",),
            draw=normal(0.7),
        ),
        *affine("", "output_norm", "transformer.ln_f", n_embd),
        *head_rules(metadata),
    ]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"transformer.h.{il}."
        sizes = (n_embd, kv, kv)
        out += [
            *affine(blk, "attn_norm", hf + "ln_1", n_embd),
            *_turned(fused_qkv(metadata, blk, hf + "attn.c_attn", sizes, n_embd, layout=TRANSPOSED, bias=True)),
            *_turned(matrix(blk, "attn_output", hf + "attn.c_proj", n_embd, n_embd, layout=TRANSPOSED, bias=True)),
            *affine(blk, "ffn_norm", hf + "ln_2", n_embd),
            *_turned(matrix(blk, "ffn_up", hf + "mlp.c_fc", n_ff, n_embd, layout=TRANSPOSED, bias=True)),
            *_turned(matrix(blk, "ffn_down", hf + "mlp.c_proj", n_embd, n_ff, layout=TRANSPOSED, bias=True)),
        ]
    return also_spelled(out, lambda name: name.removeprefix("transformer."))


def _turned(rules: list[TensorRule]) -> list[TensorRule]:
    """Only matrices are transposed, not their biases."""
    return [
        TensorRule(rule.name, rule.shape, rule.hf, PLAIN, rule.required) if len(rule.shape) == 1 else rule
        for rule in rules
    ]


def example(sizes: Sizes) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_embd": sizes.n_embd,
        "n_layer": sizes.n_layer,
        "n_head": sizes.n_head,
        "n_inner": sizes.n_ff,
        "n_positions": sizes.n_ctx,
        "n_ctx": sizes.n_ctx,
        "layer_norm_epsilon": 1e-3,
        "vocab_size": sizes.n_vocab,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }


MAP = ArchMap(
    arch="gpt2",
    model_types=("gpt2",),
    architectures=("GPT2LMHeadModel",),
    metadata=metadata,
    rules=rules,
    example=example,
    ignored=buffers(("h.", "transformer.h."), ("attn.bias", "attn.masked_bias")),
)
