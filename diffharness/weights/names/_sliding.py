"""Kinds of layers in config.json's words, and Qwen's optional sliding window.

`use_sliding_window` is off in every released model and the engine's graphs have no window for these architectures;
where a checkpoint turns it on, it is part of the model and the metadata say so.
"""

from __future__ import annotations

from typing import Any

from diffharness.weights.names._config import need_int
from diffharness.weights.names._keys import Keys
from diffharness.weights.names._map import Config
from diffharness.weights.source import Metadata

SLIDING, GLOBAL = "sliding_attention", "full_attention"  # config.json's words


def by_period(n_layer: int, period: int) -> list[str]:
    """Each layer's kind where the last of every `period` layers is global."""
    return [SLIDING if (il + 1) % period else GLOBAL for il in range(n_layer)]


def sliding_metadata(config: Config, arch: str, *, every_layer: bool = False) -> dict[str, Any]:
    """No keys unless the window is on. `every_layer`: all layers slide, not those from `max_window_layers` on."""
    if not config.get("use_sliding_window") or not config.get("sliding_window"):
        return {}
    n_layer = need_int(config, "num_hidden_layers")
    types = config.get("layer_types")
    first = 0 if every_layer else config.get("max_window_layers", 28)
    pattern = [kind == SLIDING for kind in types] if types else [il >= first for il in range(n_layer)]
    return {
        f"{arch}.attention.sliding_window": need_int(config, "sliding_window"),
        f"{arch}.attention.sliding_window_pattern": pattern,
    }


def sliding_config(metadata: Metadata, arch: str) -> dict[str, Any]:
    """config.json's keys; the window is off where the metadata name none."""
    keys = Keys(metadata)
    window = keys.get("attention.sliding_window", 0)
    if not window:
        return {"use_sliding_window": False, "sliding_window": None}
    slides = keys.by_layer("attention.sliding_window_pattern", 1)
    return {
        "use_sliding_window": True,
        "sliding_window": window,
        "layer_types": [SLIDING if slide else GLOBAL for slide in slides],
    }
