"""Reading config.json, in both of its forms, and what it says of rope.

The old form has `rope_theta` and `rope_scaling` with `type` or `rope_type`; transformers 5's has `rope_parameters`,
possibly one per layer type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffharness.errors import CheckpointError
from diffharness.weights.names._map import Config
from diffharness.weights.source import Float32Array, Metadata

LLAMA3_ROPE = "diffharness.rope.llama3"  # [factor, low_freq_factor, high_freq_factor, original context]


def need(config: Config, *keys: str) -> Any:
    """The value of the first of `keys` that is there and not null; CheckpointError if none is."""
    for key in keys:
        if config.get(key) is not None:
            return config[key]
    raise CheckpointError(f"config.json lacks `{keys[0]}`")


def need_int(config: Config, *keys: str) -> int:
    value = need(config, *keys)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(f"config.json: `{keys[0]}`: expected a whole number, found {value!r}")
    return value


def need_float(config: Config, *keys: str) -> float:
    value = need(config, *keys)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise CheckpointError(f"config.json: `{keys[0]}`: expected a number, found {value!r}")
    return float(value)


def expect_activation(config: Config, *names: str) -> None:
    """CheckpointError unless the feed-forward's activation is one of `names` (or not stated)."""
    found = config.get("hidden_activation") or config.get("hidden_act") or names[0]
    if found not in names:
        raise CheckpointError(f"config.json: expected activation {' or '.join(names)}, found {found!r}")


def rope_parameters(config: Config, *, default_theta: float, layer_type: str | None = None) -> dict[str, Any]:
    """The rope of one kind of layer in transformers 5's words: `rope_type`, `rope_theta` and what the type needs."""
    rope: dict[str, Any] = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if layer_type is not None and isinstance(rope.get(layer_type), Mapping):
        rope = dict(rope[layer_type])
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    rope["rope_theta"] = float(rope.get("rope_theta") or config.get("rope_theta") or default_theta)
    if rope.get("original_max_position_embeddings") is None:
        original = config.get("original_max_position_embeddings") or config.get("max_position_embeddings")
        rope["original_max_position_embeddings"] = original
    return rope


def without_rope(config: Config) -> dict[str, Any]:
    """`config` without what it says of the rotary embedding's scaling, for which the caller has other keys."""
    return {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_parameters")}


def rope_metadata(arch: str, rope: Config) -> dict[str, Any]:
    """GGUF keys of what `rope_parameters` gave: default, linear, yarn or llama3; CheckpointError for others."""
    key = f"{arch}.rope."
    out: dict[str, Any] = {key + "freq_base": float(rope["rope_theta"])}
    kind = rope["rope_type"]
    if kind == "linear":
        out |= {key + "scaling.type": "linear", key + "scaling.factor": need_float(rope, "factor")}
    elif kind == "yarn":
        out |= {
            key + "scaling.type": "yarn",
            key + "scaling.factor": need_float(rope, "factor"),
            key + "scaling.original_context_length": need_int(rope, "original_max_position_embeddings"),
        }
        if (attention_factor := _yarn_attention_factor(rope)) is not None:
            out[key + "scaling.yarn_attn_factor"] = attention_factor
        for name in ("beta_fast", "beta_slow"):
            if rope.get(name):
                out[f"{key}scaling.yarn_{name}"] = need_float(rope, name)
        if rope.get("truncate") is False:
            raise CheckpointError("config.json: yarn without truncation is not supported: GGUF has no key for it")
    elif kind == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        out[LLAMA3_ROPE] = [need_float(rope, name) for name in names]
    elif kind != "default":
        raise CheckpointError(
            f"config.json: expected rope type default, linear, yarn or llama3, found {kind!r}",
        )
    return out


def _yarn_attention_factor(rope: Config) -> float | None:
    """The factor on sine and cosine where the model states one; None for the default, 0.1 ln(factor) + 1."""
    if rope.get("attention_factor") is not None:
        return need_float(rope, "attention_factor")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        log = math.log(need_float(rope, "factor"))
        return (0.1 * need_float(rope, "mscale") * log + 1.0) / (0.1 * need_float(rope, "mscale_all_dim") * log + 1.0)
    return None


def rope_config(metadata: Metadata, arch: str, default_theta: float = 10000.0) -> dict[str, Any]:
    """config.json's rope keys in their old form, which every version of transformers reads."""
    key = f"{arch}.rope."
    out: dict[str, Any] = {"rope_theta": metadata.get(key + "freq_base", default_theta)}
    kind = metadata.get(key + "scaling.type", "none")
    if LLAMA3_ROPE in metadata:
        factor, low, high, original = metadata[LLAMA3_ROPE]
        out["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": int(original),
        }
    elif kind in ("linear", "yarn") and key + "scaling.factor" in metadata:
        scaling: dict[str, Any] = {"rope_type": kind, "factor": metadata[key + "scaling.factor"]}
        for gguf, hf in (
            ("original_context_length", "original_max_position_embeddings"),
            ("yarn_attn_factor", "attention_factor"),
            ("yarn_beta_fast", "beta_fast"),
            ("yarn_beta_slow", "beta_slow"),
        ):
            if f"{key}scaling.{gguf}" in metadata:
                scaling[hf] = metadata[f"{key}scaling.{gguf}"]
        out["rope_scaling"] = scaling
    return out


def llama3_divisors(
    n_rot: int, base: float, *, factor: float, low: float, high: float, original: float
) -> Float32Array:
    """By what each rotary pair's frequency is divided, [n_rot / 2] (Llama 3.1's scaling).

    Pairs that turn more than `high` times within the original context keep their frequency, those that turn less
    than `low` times are slowed by `factor`, those between are mixed. In float32 throughout, as transformers and the
    engine's converter have it; their `pow` may differ from numpy's in the last bit.
    """
    f32 = np.float32
    exponents = np.arange(0, n_rot, 2, dtype=np.float32) / f32(n_rot)
    # A number over a tensor is, in torch, the tensor's reciprocal times the number; to the last bit that differs.
    wavelength = f32(1) / (f32(1) / f32(base) ** exponents) * f32(2 * math.pi)
    turns = f32(1) / wavelength * f32(original)
    share = ((turns - f32(low)) / f32(high - low)).clip(0, 1) if high != low else (turns > f32(low)).astype(np.float32)
    divisors: Float32Array = (f32(1) / ((f32(1) - share) / f32(factor) + share)).astype(np.float32)
    return divisors
