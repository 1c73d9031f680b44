"""`bloom`: BLOOM and BLOOMZ. Queries, keys and values of one matrix, head by head; a norm after the embedding."""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import need_float, need_int
from diffharness.weights.names._gpt import Woven, affine, also_spelled, fused_qkv, gpt_metadata
from diffharness.weights.names._keys import Keys, head_rules, matrix
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.source import Metadata


def metadata(config: Config) -> dict[str, Any]:
    if config.get("apply_residual_connection_post_layernorm"):
        raise CheckpointError(
            "config.json: `apply_residual_connection_post_layernorm`: expected false: GGUF has no key for it"
        )
    n_embd = need_int(config, "hidden_size", "n_embed")
    n_head = need_int(config, "n_head", "num_attention_heads")
    return gpt_metadata(
        "bloom",
        n_layer=need_int(config, "n_layer", "num_hidden_layers"),
        n_ctx=config.get("seq_length") or n_embd,
        n_embd=n_embd,
        n_ff=4 * n_embd,
        n_head=n_head,
        n_head_kv=n_head,
        eps=need_float(config, "layer_norm_epsilon"),
        n_vocab=need_int(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", True)),
    )


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, n_ff, kv = keys.n_embd, keys.integer("feed_forward_length"), keys.n_head_kv * keys.head_dim
    woven = Woven(keys.n_head, keys.n_head_kv)
    out = [
        TensorRule("token_embd.weight", (keys.n_vocab, n_embd), ("transformer.word_embeddings.weight",)),
        *affine("", "token_embd_norm", "transformer.word_embeddings_layernorm", n_embd),
        *affine("", "output_norm", "transformer.ln_f", n_embd),
        *head_rules(metadata),
    ]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"transformer.h.{il}."
        qkv = hf + "self_attention.query_key_value"
        out += [
            *affine(blk, "attn_norm", hf + "input_layernorm", n_embd),
            *fused_qkv(metadata, blk, qkv, (n_embd, kv, kv), n_embd, layout=woven, bias=True),
            *matrix(blk, "attn_output", hf + "self_attention.dense", n_embd, n_embd, bias=True),
            *affine(blk, "ffn_norm", hf + "post_attention_layernorm", n_embd),
            *matrix(blk, "ffn_up", hf + "mlp.dense_h_to_4h", n_ff, n_embd, bias=True),
            *matrix(blk, "ffn_down", hf + "mlp.dense_4h_to_h", n_embd, n_ff, bias=True),
        ]
    return also_spelled(out, lambda name: name.removeprefix("transformer."))


def example(sizes: Sizes) -> dict[str, Any]:
    return {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "hidden_size": sizes.n_embd,
        "n_layer": sizes.n_layer,
        "n_head": sizes.n_head,
        "layer_norm_epsilon": 1e-3,
        "seq_length": sizes.n_ctx,
        "apply_residual_connection_post_layernorm": False,
        "vocab_size": sizes.n_vocab,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }


MAP = ArchMap(
    arch="bloom",
    model_types=("bloom",),
    architectures=("BloomForCausalLM",),
    metadata=metadata,
    rules=rules,
    example=example,
)
