"""`internlm2`: InternLM 2 and 2.5, as the published code has it. Queries, keys and values are one matrix.

Its rows are grouped: a group's query heads, its key, its value. In the GGUF they are three matrices, of which queries
and keys are permuted to interleaved rotary pairs. `dynamic` rope changes nothing within the trained length, to which
this tool keeps, and GGUF has no words for it: it is taken for no scaling.
"""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import gated_matrices
from diffharness.weights.names._config import expect_activation, rope_parameters
from diffharness.weights.names._fused_qkv import fused_qkv_parts
from diffharness.weights.names._keys import (
    Keys,
    decoder_config,
    decoder_example,
    decoder_metadata,
    matrix,
    vector,
)
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.source import Metadata

_ARCH = "internlm2"
_FEED_FORWARD = ("w1", "w3", "w2")


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    if config.get("bias"):
        raise CheckpointError("config.json: expected projections without biases, found `bias` true")
    if rope_parameters(config, default_theta=10000.0)["rope_type"] == "dynamic":
        config = {**config, "rope_scaling": None}
    return decoder_metadata(config, _ARCH)


def config(metadata: Metadata) -> dict[str, Any]:
    named = {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "hidden_act": "silu", "bias": False}
    return named | decoder_config(metadata, _ARCH)


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd = keys.n_embd
    out = [
        TensorRule("token_embd.weight", (keys.n_vocab, n_embd), ("model.tok_embeddings.weight",)),
        TensorRule("output_norm.weight", (n_embd,), ("model.norm.weight",)),
        TensorRule("output.weight", (keys.n_vocab, n_embd), ("output.weight",)),
    ]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        out += [
            vector(blk, "attn_norm", hf + "attention_norm", n_embd),
            *fused_qkv_parts(keys, blk, hf + "attention.wqkv", grouped=True),
            *matrix(blk, "attn_output", hf + "attention.wo", n_embd, keys.n_head * keys.head_dim),
            vector(blk, "ffn_norm", hf + "ffn_norm", n_embd),
            *gated_matrices(blk, hf + "feed_forward.", keys.integer("feed_forward_length"), n_embd, _FEED_FORWARD),
        ]
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(sizes, "internlm2", "InternLM2ForCausalLM", head_dim=None, bias=False)


MAP = ArchMap(
    arch=_ARCH,
    model_types=("internlm2",),
    architectures=("InternLM2ForCausalLM",),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
    transformers=False,
)
