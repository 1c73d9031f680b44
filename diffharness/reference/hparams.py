"""Reading hyperparameters out of GGUF metadata, with errors that name the key.

Keys are given without the architecture: `block_count` means `<general.architecture>.block_count`. Defaults are
those that the GGUF format documents; a key without a default is required.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from diffharness.errors import ArtifactFileError, UnsupportedError
from diffharness.reference.ops import RopeScaling
from diffharness.weights.source import Metadata

_MOST = 1 << 20

T = TypeVar("T", int, float, str, bool)


class HyperParameters:
    """Typed look-ups in one model's metadata.

    Raises ArtifactFileError where a required key is missing or a value is not of the kind asked for.
    """

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata
        arch = metadata.get("general.architecture")
        if not isinstance(arch, str):
            raise ArtifactFileError("metadata key `general.architecture` is missing or not a string")
        self.arch = arch

    def key(self, name: str) -> str:
        """The full key of `name`."""
        return f"{self.arch}.{name}"

    def has(self, name: str) -> bool:
        return self.metadata.get(self.key(name)) is not None

    def integer(self, name: str, default: int | None = None) -> int:
        return self._one(name, default, int, _as_int)

    def number(self, name: str, default: float | None = None) -> float:
        return self._one(name, default, float, _as_float)

    def string(self, name: str, default: str | None = None) -> str:
        return self._one(name, default, str, _as_str)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        return self._one(name, default, bool, _as_bool)

    def integers(self, name: str, n: int, default: int | None = None) -> tuple[int, ...]:
        """One integer per layer; a single value in the metadata stands for all of them."""
        return self._many(name, n, default, _as_int)

    def booleans(self, name: str, n: int, default: bool | None = None) -> tuple[bool, ...]:
        """One truth value per layer; a single value in the metadata stands for all of them."""
        return self._many(name, n, default, _as_bool)

    def count(self, name: str, default: int | None = None) -> int:
        """An integer that must be positive, a default too, and small enough to make lists of that length."""
        value = self.integer(name, default)
        if not 0 < value <= _MOST:
            raise ArtifactFileError(f"metadata key `{self.key(name)}`: expected a number up to {_MOST}, found {value}")
        return value

    def refuse(self, name: str, found: object, expected: str) -> NoReturn:
        """UnsupportedError: the key `name` holds what this tool does not know."""
        raise UnsupportedError(f"metadata key `{self.key(name)}`: expected {expected}, found {_shorten(found)}")

    def heads(self, n_layer: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Heads and KV heads of every layer, checked to fit each other."""
        n_head = self.integers("attention.head_count", n_layer)
        n_head_kv = self.integers("attention.head_count_kv", n_layer, n_head[0])
        for heads, kv in zip(n_head, n_head_kv, strict=True):
            if heads <= 0 or kv <= 0 or heads % kv:
                key = self.key("attention.head_count_kv")
                raise ArtifactFileError(f"metadata key `{key}`: expected a divisor of {heads} heads, found {kv}")
        return n_head, n_head_kv

    def windows(self, n_layer: int) -> tuple[int | None, ...]:
        """Each layer's sliding window, None where a layer sees all earlier tokens.

        `attention.sliding_window` says how many keys a sliding layer sees, itself included (0: no window);
        `attention.sliding_window_pattern`, one truth value per layer, which layers slide (absent: all).
        """
        window = self.integer("attention.sliding_window", 0)
        slides = self.booleans("attention.sliding_window_pattern", n_layer, True)
        return tuple(window if window > 0 and slide else None for slide in slides)

    def rope_scaling(self, *, longrope: bool = False) -> RopeScaling:
        """The keys `rope.scaling.*` (linear, yarn; none where the model has none).

        `longrope`: the caller reads LongRoPE's divisors, the tensors `rope_factors_*`, which have the factor in them.
        """
        kind = self.string("rope.scaling.type", "linear")
        factor = self.number("rope.scaling.factor", self.number("rope.scale_linear", 0.0)) or 1.0
        if factor < 0.0:
            self.refuse("rope.scaling.factor", factor, "a positive number")
        # `attn_factor` multiplies the default; `yarn_attn_factor` is the model's own `attention_factor`, in its place.
        magnitude = self.number("rope.scaling.attn_factor", 1.0)
        if kind == "none" or (longrope and kind == "longrope"):
            return RopeScaling(magnitude=magnitude)
        if kind == "linear":
            return RopeScaling(freq_scale=1.0 / factor, magnitude=magnitude)
        if kind != "yarn":
            self.refuse("rope.scaling.type", kind, f"none, linear{', longrope' if longrope else ''} or yarn")
        magnitude *= 1.0 + 0.1 * math.log(factor) if factor > 1.0 else 1.0
        return RopeScaling(
            freq_scale=1.0 / factor,
            ext_factor=self.number("rope.scaling.yarn_ext_factor", 1.0),
            magnitude=self.number("rope.scaling.yarn_attn_factor", magnitude),
            beta_fast=self.number("rope.scaling.yarn_beta_fast", 32.0),
            beta_slow=self.number("rope.scaling.yarn_beta_slow", 1.0),
            n_ctx_orig=self.integer("rope.scaling.original_context_length", self.integer("context_length")),
        )

    def _one(self, name: str, default: T | None, kind: type[T], read: Callable[[Any], T | None]) -> T:
        raw = self.metadata.get(self.key(name))
        if raw is None:
            if default is None:
                raise ArtifactFileError(f"required metadata key `{self.key(name)}` is missing")
            return default
        value = read(raw)
        if value is None:
            raise ArtifactFileError(f"metadata key `{self.key(name)}`: expected {kind.__name__}, found {_shorten(raw)}")
        return value

    def _many(self, name: str, n: int, default: T | None, read: Callable[[Any], T | None]) -> tuple[T, ...]:
        raw = self.metadata.get(self.key(name), default)
        if raw is None:
            raise ArtifactFileError(f"required metadata key `{self.key(name)}` is missing")
        items = list(raw) if isinstance(raw, (list, tuple)) else [raw] * n
        values = [value for value in map(read, items) if value is not None]
        if len(values) < n or len(values) != len(items):
            raise ArtifactFileError(
                f"metadata key `{self.key(name)}`: expected one value per layer ({n}), found {_shorten(raw)}"
            )
        return tuple(values[:n])


def _as_int(raw: object) -> int | None:
    return raw if isinstance(raw, int) and not isinstance(raw, bool) else None


def _as_float(raw: object) -> float | None:
    number = isinstance(raw, (int, float)) and not isinstance(raw, bool)
    return float(raw) if number and math.isfinite(raw) else None  # type: ignore[arg-type]


def _as_str(raw: object) -> str | None:
    return raw if isinstance(raw, str) else None


def _as_bool(raw: object) -> bool | None:
    return bool(raw) if isinstance(raw, (bool, int)) else None


def _shorten(raw: object) -> str:
    text = repr(raw)
    return text if len(text) <= 60 else text[:57] + "..."
