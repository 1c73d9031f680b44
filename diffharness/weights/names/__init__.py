"""Names, layouts and hyperparameters between Hugging Face and GGUF, one module per architecture.

Each module states its map in `MAP`, or several in `MAPS`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from diffharness.errors import CheckpointError, UnsupportedError
from diffharness.weights.names._map import ArchMap, Config, RotaryPairs, TensorRule


def _maps() -> dict[str, ArchMap]:
    modules = (
        import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__) if found.name[0] != "_"
    )
    found = [m for module in modules for m in (module.MAPS if hasattr(module, "MAPS") else (module.MAP,))]
    return {m.arch: m for m in sorted(found, key=lambda m: m.arch)}


MAPS: dict[str, ArchMap] = _maps()

__all__ = ["MAPS", "ArchMap", "RotaryPairs", "TensorRule", "config_of_tensors", "for_arch", "for_config", "text_config"]


def for_arch(arch: str) -> ArchMap:
    """The map of `general.architecture`; UnsupportedError names those that are known."""
    if arch not in MAPS:
        raise UnsupportedError(
            f"expected a known architecture, found {arch!r}", hint=f"known: {', '.join(sorted(MAPS))}"
        )
    return MAPS[arch]


def for_config(config: Config) -> ArchMap:
    """The map for a config.json; CheckpointError names the model types that are known."""
    outer, inner = config.get("model_type"), text_config(config).get("model_type")
    for model_type in (outer, inner):
        found = [m for m in MAPS.values() if model_type in m.model_types]
        if found:
            return next((m for m in found if m.covers is None or m.covers(text_config(config))), found[0])
    known = sorted({model_type for arch_map in MAPS.values() for model_type in arch_map.model_types})
    raise CheckpointError(
        f"config.json: expected a known `model_type`, found {outer!r}", hint=f"known: {', '.join(known)}"
    )


def text_config(config: Config) -> Config:
    """The text model's part of a config.json: `text_config` where there is one."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def config_of_tensors(config: Config, tensors: Iterable[str]) -> dict[str, Any]:
    """`config` with what only a model's tensors (GGUF names) tell: a tied head, biases."""
    names = frozenset(tensors)
    out = dict(config) | {"tie_word_embeddings": "output.weight" not in names}
    if "blk.0.attn_output.bias" in names:
        out["attention_bias"] = True
    if "blk.0.ffn_down.bias" in names:
        out["mlp_bias"] = True
    return out
