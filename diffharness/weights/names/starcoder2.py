"""`starcoder2`: StarCoder 2. Biases everywhere, grouped KV heads, the head tied in most sizes.

The engine's converter leaves out the sliding window of 4096, and its graph has none; it is written here because the
model has it.
"""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import need_float, need_int
from diffharness.weights.names._gpt import affine, expect_tanh_gelu, gpt_metadata, rope_keys, separate_qkv
from diffharness.weights.names._keys import Keys, head_rules, matrix
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.source import Metadata


def metadata(config: Config) -> dict[str, Any]:
    expect_tanh_gelu(config, "hidden_act", "gelu_pytorch_tanh")
    if config.get("use_bias", True) is not True:
        raise CheckpointError("config.json: `use_bias`: expected true: GGUF has no such model without biases")
    n_head = need_int(config, "num_attention_heads")
    out = gpt_metadata(
        "starcoder2",
        n_layer=need_int(config, "num_hidden_layers"),
        n_ctx=need_int(config, "max_position_embeddings"),
        n_embd=need_int(config, "hidden_size"),
        n_ff=need_int(config, "intermediate_size"),
        n_head=n_head,
        n_head_kv=config.get("num_key_value_heads") or n_head,
        eps=need_float(config, "norm_epsilon", "layer_norm_epsilon"),
        n_vocab=need_int(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", True)),
    ) | rope_keys("starcoder2", config)
    if config.get("sliding_window"):
        out["starcoder2.attention.sliding_window"] = need_int(config, "sliding_window")
    return out


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, n_ff, kv = keys.n_embd, keys.integer("feed_forward_length"), keys.n_head_kv * keys.head_dim
    out = [
        TensorRule("token_embd.weight", (keys.n_vocab, n_embd), ("model.embed_tokens.weight",)),
        *affine("", "output_norm", "model.norm", n_embd),
        *head_rules(metadata),
    ]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        out += [
            *affine(blk, "attn_norm", hf + "input_layernorm", n_embd),
            *separate_qkv(metadata, blk, hf + "self_attn.", (n_embd, kv, kv), n_embd, bias=True),
            *matrix(blk, "attn_output", hf + "self_attn.o_proj", n_embd, n_embd, bias=True),
            *affine(blk, "ffn_norm", hf + "post_attention_layernorm", n_embd),
            *matrix(blk, "ffn_up", hf + "mlp.c_fc", n_ff, n_embd, bias=True),
            *matrix(blk, "ffn_down", hf + "mlp.c_proj", n_embd, n_ff, bias=True),
        ]
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    return {
        "architectures": ["Starcoder2ForCausalLM"],
        "model_type": "starcoder2",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": sizes.n_embd,
        "intermediate_size": sizes.n_ff,
        "num_hidden_layers": sizes.n_layer,
        "num_attention_heads": sizes.n_head,
        "num_key_value_heads": sizes.n_head_kv,
        "max_position_embeddings": sizes.n_ctx,
        "norm_epsilon": 1e-3,
        "rope_theta": 5e3,
        "sliding_window": None,
        "use_bias": True,
        "vocab_size": sizes.n_vocab,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }


MAP = ArchMap(
    arch="starcoder2",
    model_types=("starcoder2",),
    architectures=("Starcoder2ForCausalLM",),
    metadata=metadata,
    rules=rules,
    example=example,
)
