"""`phi2`: Phi-1, Phi-1.5 and Phi-2. Biases everywhere, on the head too; one norm for both branches."""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import need_float, need_int
from diffharness.weights.names._gpt import (
    affine,
    expect_tanh_gelu,
    gpt_metadata,
    rope_keys,
    rotated_share,
    separate_qkv,
)
from diffharness.weights.names._keys import Keys, matrix
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.source import Metadata


def metadata(config: Config) -> dict[str, Any]:
    expect_tanh_gelu(config, "hidden_act", "gelu_new")
    for key in ("qk_layernorm", "tie_word_embeddings"):
        if config.get(key):
            raise CheckpointError(f"config.json: `{key}`: expected false: GGUF has no such Phi model")
    n_embd, n_head = need_int(config, "hidden_size"), need_int(config, "num_attention_heads")
    out = gpt_metadata(
        "phi2",
        n_layer=need_int(config, "num_hidden_layers"),
        n_ctx=need_int(config, "max_position_embeddings"),
        n_embd=n_embd,
        n_ff=config.get("intermediate_size") or 4 * n_embd,
        n_head=n_head,
        n_head_kv=config.get("num_key_value_heads") or n_head,
        eps=need_float(config, "layer_norm_eps", "layer_norm_epsilon"),
        n_vocab=need_int(config, "vocab_size"),
        tied=False,
    )
    out["phi2.rope.dimension_count"] = int(rotated_share(config, 0.5) * n_embd) // n_head
    return out | rope_keys("phi2", config, written=False)


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, n_ff, kv = keys.n_embd, keys.integer("feed_forward_length"), keys.n_head_kv * keys.head_dim
    out = [
        TensorRule("token_embd.weight", (keys.n_vocab, n_embd), ("model.embed_tokens.weight",)),
        *affine("", "output_norm", "model.final_layernorm", n_embd),
        TensorRule("output.weight", (keys.n_vocab, n_embd), ("lm_head.weight",)),
        TensorRule("output.bias", (keys.n_vocab,), ("lm_head.bias",)),
    ]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        out += [
            *affine(blk, "attn_norm", hf + "input_layernorm", n_embd),
            *separate_qkv(metadata, blk, hf + "self_attn.", (n_embd, kv, kv), n_embd, bias=True),
            *matrix(blk, "attn_output", hf + "self_attn.dense", n_embd, n_embd, bias=True),
            *matrix(blk, "ffn_up", hf + "mlp.fc1", n_ff, n_embd, bias=True),
            *matrix(blk, "ffn_down", hf + "mlp.fc2", n_embd, n_ff, bias=True),
        ]
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    return {
        "architectures": ["PhiForCausalLM"],
        "model_type": "phi",
        "hidden_act": "gelu_new",
        "hidden_size": sizes.n_embd,
        "intermediate_size": sizes.n_ff,
        "num_hidden_layers": sizes.n_layer,
        "num_attention_heads": sizes.n_head,
        "num_key_value_heads": sizes.n_head,
        "max_position_embeddings": sizes.n_ctx,
        "layer_norm_eps": 1e-3,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "vocab_size": sizes.n_vocab,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }


MAP = ArchMap(
    arch="phi2",
    model_types=("phi",),
    architectures=("PhiForCausalLM",),
    metadata=metadata,
    rules=rules,
    example=example,
)
