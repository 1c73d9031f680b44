"""LongRoPE (Ding et al., 2024) between config.json and GGUF: two lists of divisors of the rotary frequencies.

GGUF keeps the lists as tensors, `rope_factors_long` for contexts longer than the original one and `rope_factors_short`
for the others, and one factor on sine and cosine for both.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from diffharness.errors import CheckpointError
from diffharness.weights.names._config import need, need_float, need_int, rope_metadata, rope_parameters
from diffharness.weights.names._map import Config, TensorRule
from diffharness.weights.source import Float32Array, Metadata

LONG, SHORT = "diffharness.rope.long_factor", "diffharness.rope.short_factor"  # what the two tensors hold

_LISTS = {"rope_factors_long.weight": LONG, "rope_factors_short.weight": SHORT}
_TYPES = ("longrope", "su", "yarn")  # names that Phi-3's configs have had for it


def longrope_metadata(config: Config, arch: str, n_rot: int, *, default_theta: float = 10000.0) -> dict[str, Any]:
    """GGUF keys of the rotary embedding of a config that has LongRoPE or no scaling; CheckpointError for others."""
    rope = rope_parameters(config, default_theta=default_theta)
    original = need_int(rope, "original_max_position_embeddings")
    out: dict[str, Any] = {
        f"{arch}.rope.dimension_count": n_rot,
        f"{arch}.rope.scaling.original_context_length": original,
    }
    if not rope.get("long_factor"):
        return out | rope_metadata(arch, rope)
    if rope["rope_type"] not in _TYPES:
        raise CheckpointError(f"config.json: expected rope type longrope, found {rope['rope_type']!r}")
    out[f"{arch}.rope.freq_base"] = float(rope["rope_theta"])
    out[f"{arch}.rope.scaling.attn_factor"] = float(np.float32(_magnitude(config, rope, original)))
    for key, name in ((LONG, "long_factor"), (SHORT, "short_factor")):
        divisors = need(rope, name)
        if not isinstance(divisors, list) or len(divisors) != n_rot // 2:
            raise CheckpointError(f"config.json: `{name}`: expected {n_rot // 2} numbers")
        out[key] = [float(divisor) for divisor in divisors]
    return out


def _magnitude(config: Config, rope: Config, original: int) -> float:
    """The factor on sine and cosine: as the config states it, or √(1 + ln(scale) / ln(original context))."""
    stated = {need_float(rope, key) for key in ("long_mscale", "short_mscale") if rope.get(key) is not None}
    if len(stated) > 1:
        raise CheckpointError("config.json: `long_mscale` and `short_mscale` differ, for which GGUF has no key")
    if stated:
        return stated.pop()
    if rope.get("attention_factor") is not None:
        return need_float(rope, "attention_factor")
    scale = rope.get("factor") or need_int(config, "max_position_embeddings") / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def longrope_rules(metadata: Metadata, n_rot: int) -> list[TensorRule]:
    """The two tensors: computed where the metadata come from a checkpoint that has them, else they may be there."""
    if LONG in metadata:
        return [TensorRule(name, (n_rot // 2,), values=_Listed(metadata[key])) for name, key in _LISTS.items()]
    return [TensorRule(name, (n_rot // 2,), required=False) for name in _LISTS]


class _Listed:
    """The numbers of a list, as a tensor."""

    def __init__(self, numbers: list[float]) -> None:
        self.numbers = numbers

    def __call__(self) -> Float32Array:
        return np.array(self.numbers, dtype=np.float32)


def longrope_example(n_rot: int, original: int, **more: Any) -> dict[str, Any]:
    """config.json's keys of a synthetic model with LongRoPE; `more` goes into `rope_scaling`."""
    pairs = range(n_rot // 2)
    scaling = {
        "type": "longrope",
        "long_factor": [1.5 + 0.5 * i for i in pairs],
        "short_factor": [1.0 + 0.125 * i for i in pairs],
    }
    return {"original_max_position_embeddings": original, "rope_scaling": scaling | more}
