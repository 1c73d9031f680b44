"""`nemotron`: Nemotron-3 and -4, Minitron. Norm weights are kept as w - 1 in the checkpoint, as w in the GGUF."""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import ATTENTION_BIAS, MLP_BIAS, bias_metadata
from diffharness.weights.names._config import need_float, need_int
from diffharness.weights.names._gpt import (
    affine,
    gpt_metadata,
    rope_keys,
    rotated_share,
    separate_qkv,
)
from diffharness.weights.names._keys import Keys, matrix
from diffharness.weights.names._map import ADD_ONE, ArchMap, Config, Sizes, TensorRule
from diffharness.weights.source import Metadata


def metadata(config: Config) -> dict[str, Any]:
    if config.get("hidden_act", "relu2") != "relu2":
        raise CheckpointError(f"config.json: expected activation relu2, found {config['hidden_act']!r}")
    if config.get("tie_word_embeddings"):
        raise CheckpointError("config.json: `tie_word_embeddings`: expected false for a Nemotron model")
    n_embd, n_head = need_int(config, "hidden_size"), need_int(config, "num_attention_heads")
    out = gpt_metadata(
        "nemotron",
        n_layer=need_int(config, "num_hidden_layers"),
        n_ctx=need_int(config, "max_position_embeddings"),
        n_embd=n_embd,
        n_ff=need_int(config, "intermediate_size"),
        n_head=n_head,
        n_head_kv=config.get("num_key_value_heads") or n_head,
        eps=need_float(config, "norm_eps", "layer_norm_eps"),
        n_vocab=need_int(config, "vocab_size"),
        tied=False,
    )
    size = config.get("head_dim") or n_embd // n_head
    return out | {
        "nemotron.attention.key_length": size,
        "nemotron.attention.value_length": size,
        "nemotron.rope.dimension_count": int(rotated_share(config, 0.5, "rope_percent") * size),
        **rope_keys("nemotron", config),
        **bias_metadata(config),
    }


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, n_ff, q, kv = (
        keys.n_embd,
        keys.integer("feed_forward_length"),
        keys.n_head * keys.head_dim,
        keys.n_head_kv * keys.head_dim,
    )
    attention_bias, mlp_bias = metadata.get(ATTENTION_BIAS), metadata.get(MLP_BIAS)
    out = [
        TensorRule("token_embd.weight", (keys.n_vocab, n_embd), ("model.embed_tokens.weight",)),
        *affine("", "output_norm", "model.norm", n_embd, layout=ADD_ONE),
        TensorRule("output.weight", (keys.n_vocab, n_embd), ("lm_head.weight",)),
    ]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        out += [
            *affine(blk, "attn_norm", hf + "input_layernorm", n_embd, layout=ADD_ONE),
            *separate_qkv(metadata, blk, hf + "self_attn.", (q, kv, kv), n_embd, bias=attention_bias),
            *matrix(blk, "attn_output", hf + "self_attn.o_proj", n_embd, q, bias=attention_bias),
            *affine(blk, "ffn_norm", hf + "post_attention_layernorm", n_embd, layout=ADD_ONE),
            *matrix(blk, "ffn_up", hf + "mlp.up_proj", n_ff, n_embd, bias=mlp_bias),
            *matrix(blk, "ffn_down", hf + "mlp.down_proj", n_embd, n_ff, bias=mlp_bias),
        ]
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    return {
        "architectures": ["NemotronForCausalLM"],
        "model_type": "nemotron",
        "hidden_act": "relu2",
        "hidden_size": sizes.n_embd,
        "intermediate_size": sizes.n_ff,
        "num_hidden_layers": sizes.n_layer,
        "num_attention_heads": sizes.n_head,
        "num_key_value_heads": sizes.n_head_kv,
        "max_position_embeddings": sizes.n_ctx,
        "norm_eps": 1e-3,
        "partial_rotary_factor": 0.5,
        "rope_theta": 5e3,
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": sizes.n_vocab,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }


MAP = ArchMap(
    arch="nemotron",
    model_types=("nemotron",),
    architectures=("NemotronForCausalLM",),
    metadata=metadata,
    rules=rules,
    example=example,
)
