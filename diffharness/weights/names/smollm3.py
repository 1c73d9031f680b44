"""`smollm3`: SmolLM3. Llama's tensors.

GGUF has no key for the layers without rope and takes every fourth for one; a checkpoint that says otherwise states it
in a key of ours. A sliding window, which no released model has, is stated where a checkpoint turns it on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffharness.weights.names import llama
from diffharness.weights.names._config import expect_activation, need_int
from diffharness.weights.names._keys import Keys, decoder_config, decoder_example, decoder_metadata
from diffharness.weights.names._map import ArchMap, Config, Sizes
from diffharness.weights.names._sliding import GLOBAL, SLIDING
from diffharness.weights.source import Metadata

ROPE_LAYERS = "diffharness.rope_layers"
"""List of bool, by layer: queries and keys are turned by their position. Every layer but each fourth if absent."""

_ARCH = "smollm3"
_PERIOD = 4


def metadata(config: Config) -> dict[str, Any]:
    expect_activation(config, "silu")
    out = decoder_metadata(config, _ARCH, default_theta=2e6)
    out[f"{_ARCH}.rope.dimension_count"] = Keys(out).head_dim
    n_layer, period = need_int(config, "num_hidden_layers"), config.get("no_rope_layer_interval") or _PERIOD
    turns = [bool(turns) for turns in config.get("no_rope_layers") or _all_but_each(period, n_layer)][:n_layer]
    if turns != _all_but_each(_PERIOD, n_layer):
        out[ROPE_LAYERS] = turns
    if config.get("use_sliding_window") and config.get("sliding_window"):
        types = config.get("layer_types")
        slides = [kind == SLIDING for kind in types] if types else [not turn for turn in turns]
        out[f"{_ARCH}.attention.sliding_window"] = need_int(config, "sliding_window")
        out[f"{_ARCH}.attention.sliding_window_pattern"] = slides
    return out


def config(metadata: Metadata) -> dict[str, Any]:
    keys = Keys(metadata)
    named = {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "hidden_act": "silu"}
    out = named | decoder_config(metadata, _ARCH)
    turns = metadata.get(ROPE_LAYERS, _all_but_each(_PERIOD, keys.n_layer))
    out["no_rope_layers"] = [int(turn) for turn in turns]
    window = keys.get("attention.sliding_window", 0)
    slides = keys.by_layer("attention.sliding_window_pattern", 1) if window else [0] * keys.n_layer
    return out | {
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
        "use_sliding_window": bool(window),
        "sliding_window": window or None,
        "layer_types": [SLIDING if slide else GLOBAL for slide in slides],
    }


def _all_but_each(period: int, n_layer: int) -> list[bool]:
    return [(il + 1) % period != 0 for il in range(n_layer)]


def example(sizes: Sizes) -> dict[str, Any]:
    """Long enough that one layer is without rope."""
    sizes = replace(sizes, n_layer=max(sizes.n_layer, _PERIOD + 1))
    return decoder_example(sizes, "smollm3", "SmolLM3ForCausalLM", pad_token_id=0)


MAP = ArchMap(
    arch=_ARCH,
    model_types=("smollm3",),
    architectures=("SmolLM3ForCausalLM",),
    metadata=metadata,
    config=config,
    rules=llama.rules,
    example=example,
)
