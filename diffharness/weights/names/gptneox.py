"""`gptneox`: GPT-NeoX and Pythia. Queries, keys and values of one matrix, head by head.

GGUF has no key for the activation, which is GELU in its tanh form in GPT-NeoX-20B and with erf in Pythia:
`diffharness.activation` says which.
"""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import need_float, need_int
from diffharness.weights.names._gpt import (
    ACTIVATION,
    Woven,
    affine,
    buffers,
    fused_qkv,
    gelu_of,
    gpt_metadata,
    rope_keys,
    rotated_share,
)
from diffharness.weights.names._keys import Keys, matrix
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.source import Metadata

_HEAD = ("embed_out.weight",)


def metadata(config: Config) -> dict[str, Any]:
    if config.get("attention_bias", True) is not True:
        raise CheckpointError("config.json: `attention_bias`: expected true: GGUF has no such model without biases")
    if config.get("tie_word_embeddings"):
        raise CheckpointError("config.json: `tie_word_embeddings`: expected false for a GPT-NeoX model")
    n_embd, n_head = need_int(config, "hidden_size"), need_int(config, "num_attention_heads")
    out = gpt_metadata(
        "gptneox",
        n_layer=need_int(config, "num_hidden_layers"),
        n_ctx=need_int(config, "max_position_embeddings"),
        n_embd=n_embd,
        n_ff=need_int(config, "intermediate_size"),
        n_head=n_head,
        n_head_kv=None,
        eps=need_float(config, "layer_norm_eps"),
        n_vocab=need_int(config, "vocab_size"),
        tied=False,
    )
    base = {"rope_theta": config.get("rope_theta") or config.get("rotary_emb_base")}
    return out | {
        "gptneox.rope.dimension_count": int(rotated_share(config, 0.25, "rotary_pct") * (n_embd // n_head)),
        **rope_keys("gptneox", {**config, **base}, written=False),
        "gptneox.use_parallel_residual": bool(config.get("use_parallel_residual", True)),
        ACTIVATION: gelu_of(config, "hidden_act", "gelu"),
    }


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, n_ff, kv = keys.n_embd, keys.integer("feed_forward_length"), keys.n_head_kv * keys.head_dim
    woven = Woven(keys.n_head, keys.n_head_kv)
    out = [
        TensorRule("token_embd.weight", (keys.n_vocab, n_embd), ("gpt_neox.embed_in.weight",)),
        *affine("", "output_norm", "gpt_neox.final_layer_norm", n_embd),
        TensorRule("output.weight", (keys.n_vocab, n_embd), _HEAD),
    ]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"gpt_neox.layers.{il}."
        qkv = hf + "attention.query_key_value"
        out += [
            *affine(blk, "attn_norm", hf + "input_layernorm", n_embd),
            *fused_qkv(metadata, blk, qkv, (n_embd, kv, kv), n_embd, layout=woven, bias=True),
            *matrix(blk, "attn_output", hf + "attention.dense", n_embd, n_embd, bias=True),
            *affine(blk, "ffn_norm", hf + "post_attention_layernorm", n_embd),
            *matrix(blk, "ffn_up", hf + "mlp.dense_h_to_4h", n_ff, n_embd, bias=True),
            *matrix(blk, "ffn_down", hf + "mlp.dense_4h_to_h", n_embd, n_ff, bias=True),
        ]
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    """With the tanh form, which the engine computes whatever the model's is."""
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_act": "gelu_fast",
        "hidden_size": sizes.n_embd,
        "intermediate_size": sizes.n_ff,
        "num_hidden_layers": sizes.n_layer,
        "num_attention_heads": sizes.n_head,
        "max_position_embeddings": sizes.n_ctx,
        "layer_norm_eps": 1e-3,
        "rotary_pct": 0.5,
        "rotary_emb_base": 10000,
        "use_parallel_residual": True,
        "vocab_size": sizes.n_vocab,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }


MAP = ArchMap(
    arch="gptneox",
    model_types=("gpt_neox",),
    architectures=("GPTNeoXForCausalLM",),
    metadata=metadata,
    rules=rules,
    example=example,
    ignored=buffers(
        ("gpt_neox.layers.",), ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq")
    ),
)
