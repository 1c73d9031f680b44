"""What a damaged copy will hold, before any of it is computed: contents by tensor, edits, and what a fault gets.

Everything is lazy: a fault plans what happens to a tensor, and the values are made when the file is written,
one tensor at a time. A fault on bytes after one on values, or the reverse, is a chain of such plans.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from diffharness.errors import BadInputError
from diffharness.taps import split
from diffharness.weights.dequant import byte_size, dequantize
from diffharness.weights.gguf_write import encode_floats
from diffharness.weights.source import Float32Array, Metadata, TensorInfo

Bytes = NDArray[np.uint8]
Quantize = Callable[[Float32Array, str], Bytes]  # rows [n, width] and a type: the rows' blocks [n, bytes]

FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Content:
    """One tensor of the copy; of its two forms one is made, the other follows from it."""

    info: TensorInfo
    raw: Callable[[], Bytes]  # 1-D
    values: Callable[[], Float32Array]  # of the tensor's shape


def from_bytes(info: TensorInfo, raw: Callable[[], Bytes]) -> Content:
    """A tensor given by its stored bytes."""
    return Content(info, raw, lambda: dequantize(raw(), info.type, info.shape, tensor=info.name))


def from_values(
    info: TensorInfo, values: Callable[[], Float32Array], quantize: Quantize | None, type_name: str
) -> Content:
    """A tensor given by its values, stored as `type_name` by ggml's quantizer."""
    shape = info.shape
    info = replace(info, type=type_name, n_bytes=byte_size(type_name, shape))

    def raw() -> Bytes:
        if type_name in FLOATS:
            return encode_floats(values(), type_name)
        if quantize is None:
            raise BadInputError(
                f"{info.name} is {type_name}: changing its values needs a quantizer, and none was given",
                hint="store what is changed as F32",
            )
        return np.ascontiguousarray(quantize(values().reshape(-1, shape[-1]), type_name)).reshape(-1).view(np.uint8)

    return Content(info, raw, values)


@dataclass(frozen=True)
class Options:
    """What a user may say beside the fault's name. `layers` leaves tensors outside of the layers out."""

    tensors: str | None = None  # shell pattern; None for the fault's own
    layers: frozenset[int] | None = None
    strength: float | None = None  # None for the fault's own
    type: Literal["keep", "F32"] = "keep"  # of tensors whose values are computed anew


@dataclass(frozen=True)
class Draft:
    """The copy as planned so far."""

    contents: Mapping[str, Content]
    metadata: Metadata  # as of the source; `keys` are changes to it
    keys: Mapping[str, Any]  # new values; None removes
    seed: int
    kept: float = 1.0  # share of the file that is written
    quantize: Quantize | None = None
    type: Literal["keep", "F32"] = "keep"

    def get(self, key: str) -> Any:
        """A metadata value of the copy; None where it has none."""
        return self.keys[key] if key in self.keys else self.metadata.get(key)

    @property
    def arch(self) -> str:
        return str(self.metadata["general.architecture"])

    def rng(self, *what: object) -> np.random.Generator:
        """Random numbers that depend on the seed and on `what` alone."""
        return np.random.default_rng([self.seed, zlib.crc32("|".join(map(str, what)).encode())])

    def changed(self, name: str, values: Callable[[], Float32Array]) -> Content:
        """The tensor with other values, in the type that it is to have."""
        info = self.contents[name].info
        return from_values(info, values, self.quantize, info.type if self.type == "keep" else "F32")


@dataclass(frozen=True)
class Edit:
    """What one fault changes: contents by tensor, with what was done to each, and keys."""

    contents: Mapping[str, Content] = field(default_factory=dict)
    said: Mapping[str, str] = field(default_factory=dict)  # by tensor or key
    removed: Collection[str] = ()
    keys: Mapping[str, Any] = field(default_factory=dict)
    kept: float | None = None


@dataclass(frozen=True)
class Target:
    """What one fault is to do: where, how strongly, and its name, by which its random numbers are drawn."""

    fault: str
    names: Sequence[str]  # tensors that pattern and layers leave
    strength: float


Plan = Callable[[Draft, Target], Edit]


@dataclass(frozen=True)
class Fault:
    """One kind of damage. `strength` is the default; NaN for a fault that takes none."""

    name: str
    what: str  # what it does to a tensor
    shows: str  # the pattern that `inspect` may name, or the verdict without `artifact.`
    plan: Plan = field(repr=False)
    tensors: str = "blk.*"  # where, unless the user says
    strength: float = float("nan")
    means: str = ""  # what strength is
    limits: tuple[float, float] = (-np.inf, np.inf)

    @property
    def takes_strength(self) -> bool:
        return self.strength == self.strength


def select(contents: Mapping[str, Content], pattern: str, layers: frozenset[int] | None) -> list[str]:
    """Tensors of that pattern (alternatives split by commas) and of those layers; BadInputError if there is none."""
    patterns = [part.strip() for part in pattern.split(",")]
    matching = [name for name in contents if any(fnmatchcase(name, part) for part in patterns)]
    if not matching:
        some = ", ".join(list(contents)[:6])
        raise BadInputError(
            f"{pattern!r} matches none of the {len(contents)} tensors",
            hint=f"choose some with --tensors; they are named like {some}",
        )
    found = [name for name in matching if layers is None or split(name)[0] in layers]
    if not found:
        there = sorted({layer for name in contents if (layer := split(name)[0]) is not None})
        raise BadInputError(
            f"no tensor of {pattern!r} is in layers {sorted(layers or ())}",
            hint=f"the model has layers {there[0]} to {there[-1]}" if there else "the model has no layers",
        )
    return found


def share_of(n: int, share: float, least: int = 1) -> int:
    """How many of `n` a share from 0 to 1 stands for, at least `least` and at most all."""
    return min(n, max(least, round(n * share)))
