"""`falcon`: Falcon 7B, 40B, 180B and Falcon 2 11B. Queries, keys and values of one matrix, KV head by KV head.

The engine's converter leaves out `rope_theta` and writes 4 · width as the feed-forward's; here both are the config's.
GGUF has no key for the activation, GELU with erf in every published config: `diffharness.activation` says which.
"""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import need_float, need_int
from diffharness.weights.names._gpt import (
    ACTIVATION,
    Woven,
    affine,
    fused_qkv,
    gelu_of,
    gpt_metadata,
    optional,
    rope_keys,
)
from diffharness.weights.names._keys import TIED_HEAD, Keys, head_rules, matrix
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.source import Metadata

TWO_NORMS = "diffharness.two_norms"  # bool: attention and feed-forward have a norm each


def metadata(config: Config) -> dict[str, Any]:
    new = bool(config.get("new_decoder_architecture", False))
    parallel = new or config.get("parallel_attn", True)
    for key, wrong in (("alibi", config.get("alibi")), ("bias", config.get("bias")), ("parallel_attn", not parallel)):
        if wrong:
            raise CheckpointError(f"config.json: `{key}` is {config.get(key)!r}: GGUF has no such Falcon model")
    n_embd, n_head = need_int(config, "hidden_size"), need_int(config, "num_attention_heads", "n_head")
    n_head_kv = 1
    if new or not config.get("multi_query", True):
        n_head_kv = config.get("num_kv_heads") or config.get("n_head_kv") or n_head
    out = gpt_metadata(
        "falcon",
        n_layer=need_int(config, "num_hidden_layers", "n_layer"),
        n_ctx=config.get("max_position_embeddings") or 2048,
        n_embd=n_embd,
        n_ff=config.get("ffn_hidden_size") or 4 * n_embd,
        n_head=n_head,
        n_head_kv=n_head_kv,
        eps=need_float(config, "layer_norm_epsilon"),
        n_vocab=need_int(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", True)),
    )
    return out | {
        **rope_keys("falcon", config, written=False),
        ACTIVATION: gelu_of(config, "activation", "gelu"),
        TWO_NORMS: new and (config.get("num_ln_in_parallel_attn") or 2) == 2,
    }


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, n_ff, kv = keys.n_embd, keys.integer("feed_forward_length"), keys.n_head_kv * keys.head_dim
    woven, of_checkpoint = Woven(keys.n_head, keys.n_head_kv), TIED_HEAD in metadata
    two = metadata.get(TWO_NORMS, True)
    out = [
        TensorRule("token_embd.weight", (keys.n_vocab, n_embd), ("transformer.word_embeddings.weight",)),
        *affine("", "output_norm", "transformer.ln_f", n_embd),
        *head_rules(metadata),
    ]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"transformer.h.{il}."
        attn = hf + "self_attention."
        norms = affine(blk, "attn_norm", hf + ("ln_mlp" if two and of_checkpoint else "input_layernorm"), n_embd)
        if two:
            second = affine(blk, "attn_norm_2", hf + "ln_attn", n_embd)
            norms += second if of_checkpoint else optional(second)
        out += [
            *norms,
            *fused_qkv(metadata, blk, attn + "query_key_value", (n_embd, kv, kv), n_embd, layout=woven, bias=False),
            *matrix(blk, "attn_output", attn + "dense", n_embd, n_embd),
            *matrix(blk, "ffn_up", hf + "mlp.dense_h_to_4h", n_ff, n_embd),
            *matrix(blk, "ffn_down", hf + "mlp.dense_4h_to_h", n_embd, n_ff),
        ]
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    """As Falcon 40B, but with GELU in its tanh form, which the engine computes whatever the model's is."""
    return {
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "activation": "gelu_pytorch_tanh",
        "hidden_size": sizes.n_embd,
        "ffn_hidden_size": sizes.n_ff,
        "num_hidden_layers": sizes.n_layer,
        "num_attention_heads": sizes.n_head,
        "num_kv_heads": sizes.n_head_kv,
        "new_decoder_architecture": True,
        "max_position_embeddings": sizes.n_ctx,
        "layer_norm_epsilon": 1e-3,
        "rope_theta": 5e3,
        "alibi": False,
        "bias": False,
        "vocab_size": sizes.n_vocab,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }


MAP = ArchMap(
    arch="falcon",
    model_types=("falcon", "RefinedWeb", "RefinedWebModel"),
    architectures=("FalconForCausalLM", "RWForCausalLM"),
    metadata=metadata,
    rules=rules,
    example=example,
)
