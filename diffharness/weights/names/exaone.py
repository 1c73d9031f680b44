"""`exaone`: EXAONE 3.0 and 3.5, as the published code has it. GPT-2's words for Llama's tensors."""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._blocks import attention_matrices, gated_matrices
from diffharness.weights.names._config import expect_activation, need
from diffharness.weights.names._keys import (
    Keys,
    decoder_config,
    decoder_example,
    decoder_metadata,
    head_rules,
    rope_freqs_rule,
    vector,
)
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.source import Metadata

_ARCH = "exaone"
# config.json's own words for what others call otherwise
_WORDS = {"num_hidden_layers": "num_layers", "rms_norm_eps": "layer_norm_epsilon", "hidden_act": "activation_function"}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_FEED_FORWARD = ("c_fc_0", "c_fc_1", "c_proj")


def metadata(config: Config) -> dict[str, Any]:
    common = {**config, **{theirs: need(config, own, theirs) for theirs, own in _WORDS.items()}}
    expect_activation(common, "silu")
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("config.json: expected rope on whole heads, found `partial_rotary_factor`")
    out = decoder_metadata(common, _ARCH)
    out[f"{_ARCH}.rope.dimension_count"] = Keys(out).head_dim
    return out


def config(metadata: Metadata) -> dict[str, Any]:
    out = decoder_config(metadata, _ARCH) | {"hidden_act": "silu"}
    out |= {own: out.pop(theirs) for theirs, own in _WORDS.items()}
    return {"architectures": ["ExaoneForCausalLM"], "model_type": "exaone"} | out


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd = keys.n_embd
    out = [
        TensorRule("token_embd.weight", (keys.n_vocab, n_embd), ("transformer.wte.weight",)),
        TensorRule("output_norm.weight", (n_embd,), ("transformer.ln_f.weight",)),
        *head_rules(metadata),
        rope_freqs_rule(metadata, keys.integer("rope.dimension_count", keys.head_dim)),
    ]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"transformer.h.{il}."
        out += [
            vector(blk, "attn_norm", hf + "ln_1", n_embd),
            *attention_matrices(keys, blk, hf + "attn.attention.", _ATTENTION),
            vector(blk, "ffn_norm", hf + "ln_2", n_embd),
            *gated_matrices(blk, hf + "mlp.", keys.integer("feed_forward_length"), n_embd, _FEED_FORWARD),
        ]
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    out = decoder_example(sizes, "exaone", "ExaoneForCausalLM", head_dim=None, rope_scaling=scaling)
    return out | {own: out.pop(theirs) for theirs, own in _WORDS.items()}


MAP = ArchMap(
    arch=_ARCH,
    model_types=("exaone",),
    architectures=("ExaoneForCausalLM",),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
    transformers=False,
)
