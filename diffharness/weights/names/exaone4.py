"""`exaone4`: EXAONE 4.0. Norms of heads and after each branch, none before them."""

from __future__ import annotations

from typing import Any

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import expect_activation, need_int
from diffharness.weights.names._halves import attention_matrices, gated_matrices
from diffharness.weights.names._keys import (
    Keys,
    decoder_config,
    decoder_example,
    decoder_metadata,
    embedding_rules,
    rope_freqs_rule,
    vector,
)
from diffharness.weights.names._map import ArchMap, Config, Sizes, TensorRule
from diffharness.weights.source import Metadata

_ARCH = "exaone4"
_SLIDING, _GLOBAL = "sliding_attention", "full_attention"
_WINDOW, _PERIOD = 4096, 4  # where config.json leaves them out; of so many layers all but the last slide


def metadata(config: Config) -> dict[str, Any]:
    config = {"sliding_window": _WINDOW, **config}
    expect_activation(config, "silu")
    if config.get("num_nextn_predict_layers"):
        raise CheckpointError("config.json: expected no layers that predict further tokens, found some")
    out = decoder_metadata(config, _ARCH)
    if config["sliding_window"]:
        out[f"{_ARCH}.attention.sliding_window"] = need_int(config, "sliding_window")
        out[f"{_ARCH}.attention.sliding_window_pattern"] = _slides(config)
    return out


def _slides(config: Config) -> list[bool]:
    """Which layers slide: by `layer_types`, or a period as a number or as letters (`LLLG`)."""
    n_layer, types = need_int(config, "num_hidden_layers"), config.get("layer_types")
    if types:
        return [kind == _SLIDING for kind in types][:n_layer]
    pattern = config.get("sliding_window_pattern") or _PERIOD
    if isinstance(pattern, str):
        return [pattern[il % len(pattern)] == "L" for il in range(n_layer)]
    return [(il + 1) % pattern != 0 for il in range(n_layer)]


def config(metadata: Metadata) -> dict[str, Any]:
    keys = Keys(metadata)
    named = {"architectures": ["Exaone4ForCausalLM"], "model_type": "exaone4", "hidden_act": "silu"}
    window = keys.get("attention.sliding_window", 0)
    slides = _slides_by_pattern(keys) if window else [0] * keys.n_layer
    return (
        named
        | decoder_config(metadata, _ARCH)
        | {"sliding_window": window or None, "layer_types": [_SLIDING if slide else _GLOBAL for slide in slides]}
    )


def _slides_by_pattern(keys: Keys) -> list[int]:
    """The metadata's pattern, by layer or as the length of a period."""
    pattern = keys.get("attention.sliding_window_pattern", _PERIOD)
    if isinstance(pattern, int) and not isinstance(pattern, bool):
        return [int(pattern == 0 or il % pattern < pattern - 1) for il in range(keys.n_layer)]
    return keys.by_layer("attention.sliding_window_pattern")


def rules(metadata: Metadata) -> list[TensorRule]:
    keys = Keys(metadata)
    n_embd, size = keys.n_embd, keys.head_dim
    out = [*embedding_rules(metadata), rope_freqs_rule(metadata, keys.integer("rope.dimension_count", size))]
    for il in range(keys.n_layer):
        blk, hf = f"blk.{il}.", f"model.layers.{il}."
        out += [
            *attention_matrices(keys, blk, hf + "self_attn."),
            vector(blk, "attn_q_norm", hf + "self_attn.q_norm", size),
            vector(blk, "attn_k_norm", hf + "self_attn.k_norm", size),
            vector(blk, "post_attention_norm", hf + "post_attention_layernorm", n_embd),
            *gated_matrices(keys, blk, hf + "mlp."),
            vector(blk, "post_ffw_norm", hf + "post_feedforward_layernorm", n_embd),
        ]
    return out


def example(sizes: Sizes) -> dict[str, Any]:
    """As the 1.2B, without a window: the engine has the 32B's only in a model of 64 layers."""
    scaling = {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    types = [_GLOBAL] * sizes.n_layer
    out = decoder_example(
        sizes, "exaone4", "Exaone4ForCausalLM", head_dim=None, rope_scaling=scaling, layer_types=types
    )
    return out | {"sliding_window": None}


MAP = ArchMap(
    arch=_ARCH,
    model_types=("exaone4",),
    architectures=("Exaone4ForCausalLM",),
    metadata=metadata,
    config=config,
    rules=rules,
    example=example,
)
