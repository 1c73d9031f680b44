"""`orion`: Orion-14B, as the published code has it. LayerNorms with biases.

config.json calls their epsilon `rms_norm_eps`. The engine's converter writes no `rope.freq_base`; it is written here
because the model has one.
"""

from __future__ import annotations

from typing import Any

from diffharness.weights.names._blocks import attention_matrices, gated_matrices
from diffharness.weights.names._config import expect_activation
from diffharness.weights.names._keys import (
    Keys,
    decoder_config,
    decoder_example,
    decoder_metadata,
    embedding_rules,
    vector,
)
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.source import Metadata

_ARCH = "orion"
_RMS_EPS, _EPS = (f"{_ARCH}.attention.{name}" for name in ("layer_norm_rms_epsilon", "layer_norm_epsilon"))


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    length = config.get("max_sequence_length") or config.get("max_position_embeddings")
    out = decoder_metadata({**config, "max_position_embeddings": length}, _ARCH)
    out[_EPS] = out.pop(_RMS_EPS)
    return out


def config(metadata: Metadata) -> dict[str, Any]:
    named = {"architectures": ["OrionForCausalLM"], "model_type": "orion", "hidden_act": "silu"}
    return named | decoder_config({**metadata, _RMS_EPS: Keys(metadata)["attention.layer_norm_epsilon"]}, _ARCH)


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    bias = TensorRule("output_norm.bias", (keys.n_embd,), ("model.norm.bias",))
    out = [*embedding_rules(metadata), bias]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        for gguf, name in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            out += [
                vector(blk, gguf, hf + name, keys.n_embd),
                TensorRule(f"{blk}{gguf}.bias", (keys.n_embd,), (f"{hf}{name}.bias",)),
            ]
        out += [
            *attention_matrices(keys, blk, hf + "self_attn."),
            *gated_matrices(blk, hf + "mlp.", keys.integer("feed_forward_length"), keys.n_embd),
        ]
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    return decoder_example(sizes, "orion", "OrionForCausalLM", head_dim=None)


MAP = ArchMap(
    arch=_ARCH,
    model_types=("orion",),
    architectures=("OrionForCausalLM",),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
    transformers=False,
)
