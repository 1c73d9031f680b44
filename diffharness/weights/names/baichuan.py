"""`baichuan`: Baichuan 1 and 2, as the published code has it. Queries, keys and values are one matrix, `W_pack`.

Baichuan 2, told by its vocabulary, brings each row of the output head to length one before it uses it; GGUF has no key
for that, so the head is stored so. The engine's converter does not do it: its files of Baichuan 2 have another head.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import gated_matrices
from diffharness.weights.names._config import expect_activation
from diffharness.weights.names._fused_qkv import fused_qkv_parts
from diffharness.weights.names._keys import (
    Keys,
    decoder_config,
    decoder_example,
    decoder_metadata,
    embedding_rules,
    matrix,
    vector,
)
from diffharness.weights.names._map import PLAIN, ArchMap, Config, Mapped, Sizes, TensorRule
from diffharness.weights.source import Float32Array, Metadata

_ARCH = "baichuan"
_N_LAYER = 32  # the engine tells the 7B by it
_VOCABULARY_2 = 125696  # Baichuan 1 has 64000 tokens
_LEAST = 1e-12  # length by which a row is divided, as torch has it
_ROUNDING = 1e-6  # by which a row of length one in float32 may miss it


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    if config.get("num_key_value_heads") not in (None, config.get("num_attention_heads")):
        raise CheckpointError("config.json: expected as many KV heads as heads, found `num_key_value_heads`")
    length = config.get("max_position_embeddings") or config.get("model_max_length")
    out = decoder_metadata({**config, "max_position_embeddings": length}, _ARCH)
    out[f"{_ARCH}.rope.dimension_count"] = Keys(out).head_dim
    return out


def config(metadata: Metadata) -> dict[str, Any]:
    named = {"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "hidden_act": "silu"}
    return named | decoder_config(metadata, _ARCH)


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd = keys.n_embd
    out = [rule for rule in embedding_rules(metadata) if rule.name != "output.weight"]
    layout = NORMALISED if keys.n_vocab >= _VOCABULARY_2 else PLAIN
    out.append(TensorRule("output.weight", (keys.n_vocab, n_embd), ("lm_head.weight",), layout))
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        out += [
            vector(blk, "attn_norm", hf + "input_layernorm", n_embd),
            *fused_qkv_parts(keys, blk, hf + "self_attn.W_pack"),
            *matrix(blk, "attn_output", hf + "self_attn.o_proj", n_embd, n_embd),
            vector(blk, "ffn_norm", hf + "post_attention_layernorm", n_embd),
            *gated_matrices(blk, hf + "mlp.", keys.integer("feed_forward_length"), keys.n_embd),
        ]
    return out


def _at_length_one(rows: Float32Array) -> Float32Array:
    """Each row divided by its length; rows that have length one already stay as they are, to the last bit."""
    lengths = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=-1, keepdims=True))
    lengths[np.abs(lengths - 1) < _ROUNDING] = 1
    out: Float32Array = (rows / np.maximum(lengths, _LEAST)).astype(np.float32)
    return out


NORMALISED = Mapped(_at_length_one, lambda rows: rows, rowwise=True)


def example(sizes: Sizes) -> dict[str, Any]:
    """As deep as the 7B, which is known by that."""
    own: dict[str, Any] = {"num_hidden_layers": _N_LAYER, "num_key_value_heads": None, "head_dim": None}
    return decoder_example(sizes, "baichuan", "BaichuanForCausalLM", **own)


MAP = ArchMap(
    arch=_ARCH,
    model_types=("baichuan",),
    architectures=("BaichuanForCausalLM", "BaiChuanForCausalLM"),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
    transformers=False,
)
