"""Dequantization of every tensor type that gguf-py knows, bit-identical to gguf-py and ggml's C routines.

What a block of each type holds is written down in `unpack` and compiled for the processor at hand when a type is
first met, in about 20 ms; it runs at the speed of memory, in several threads where there is much to do. A type
that only a later gguf-py knows is left to `gguf.quants`.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import gguf
import numpy as np
from numpy.typing import NDArray

from diffharness.errors import ArtifactFileError, UnsupportedError
from diffharness.machine import usable_cores
from diffharness.weights import room
from diffharness.weights.source import Float32Array
from diffharness.weights.unpack import LAYOUTS, LUMP, LUMPED, Unpack

Bytes = NDArray[np.uint8]

# (elements, bytes) of one block of each type
BLOCKS: dict[str, tuple[int, int]] = {t.name: (n, size) for t, (n, size) in gguf.GGML_QUANT_SIZES.items()}
TYPE_IDS: dict[str, int] = {t.name: int(t) for t in gguf.GGML_QUANT_SIZES}
TYPE_NAMES: dict[int, str] = {i: name for name, i in TYPE_IDS.items()}

_RUN = 1 << 16  # elements that gguf-py or numpy unpacks at a time: 256 KiB of output stay in the second-level cache
_MOST_THREADS = 4  # which is enough to keep memory busy
_PARALLEL_FROM = 1 << 23  # elements; below this a second thread costs more than it gives
_STREAMED_FROM = 1 << 23  # elements: 32 MiB of values, about what a last-level cache holds

# Where the float16 scales of a block lie, of types whose values are finite exactly if these are.
SCALES: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


def byte_size(type_name: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of numpy shape `shape`; ValueError where a row is not made of whole blocks."""
    block, size = BLOCKS[type_name]
    if shape[-1] % block:
        raise ValueError(f"rows of {shape[-1]} elements are not made of whole {type_name} blocks of {block}")
    n = size * (shape[-1] // block)
    for length in shape[:-1]:
        n *= length
    return n


def dequantize(
    raw: Bytes, type_name: str, shape: Sequence[int], *, tensor: str | None = None, threads: int | None = None
) -> Float32Array:
    """The float32 values [*shape] of the stored bytes `raw`; `tensor` only serves the error's message.

    Large tensors take up to `threads` threads, of all usable cores where that is left open.
    Raises UnsupportedError for a type that has no dequantization or where memory does not suffice, ArtifactFileError
    where bytes do not fit the shape.
    """
    where = f"tensor {tensor}" if tensor else "a tensor"
    if not can_dequantize(type_name):
        raise UnsupportedError(
            f"{where} has type {type_name}, which cannot be dequantized; known are {', '.join(dequantizable())}",
            hint="requantize that tensor, or update the gguf package",
            tensor=tensor,
        )
    data = raw.reshape(-1).view(np.uint8)
    n = 1
    for length in shape:
        n *= length
    block, size = BLOCKS[type_name]
    if n % block or data.size != n // block * size:
        raise ArtifactFileError(
            f"{where} of shape {tuple(shape)} and type {type_name}: {n} elements need {n / block * size:g} bytes, "
            f"found {data.size}",
            tensor=tensor,
        )
    out = room.floats((n // block, block), f"{where} of shape {tuple(shape)} as float32", tensor=tensor)
    if type_name == "F32":  # a copy, so that the caller holds no part of the file's mapping
        out.reshape(-1).view(np.uint8)[...] = data
        return out.reshape(shape)
    unpack = _unpacker(type_name, out.size >= _STREAMED_FROM)
    _in_threads(unpack, data.reshape(-1, size), out, usable_cores() if threads is None else threads)
    return out.reshape(shape)


def can_dequantize(type_name: str) -> bool:
    return type_name in dequantizable()


@cache
def dequantizable() -> tuple[str, ...]:
    """The names of the types that `dequantize` takes, in ggml's order."""
    ours = {"F32", *_NUMBERS, *LUMPED, *LAYOUTS}
    return tuple(name for name in BLOCKS if name in ours or _library_knows(name))


def _in_threads(unpack: Unpack, blocks: Bytes, out: Float32Array, threads: int) -> None:
    n_threads = 1 if out.size < _PARALLEL_FROM else min(threads, _MOST_THREADS)
    # Between whole lumps, so that every part begins with a cache line.
    bounds = [len(blocks) * k // n_threads // LUMP * LUMP for k in range(n_threads)] + [len(blocks)]
    parts = [(blocks[a:b], out[a:b]) for a, b in pairwise(bounds)]
    if n_threads == 1:
        unpack(*parts[0])
        return
    with ThreadPoolExecutor(n_threads - 1) as pool:
        others = [pool.submit(unpack, *part) for part in parts[1:]]
        unpack(*parts[0])
        for other in others:
            other.result()


@cache
def _unpacker(type_name: str, streamed: bool = False) -> Unpack:
    if type_name in _NUMBERS:
        return _numbers(_NUMBERS[type_name])
    if type_name not in LAYOUTS and type_name not in LUMPED:
        return _library(type_name)
    from diffharness.weights.unpack.machine import compiled  # here, so that naming types does not load LLVM

    block, size = BLOCKS[type_name]
    if type_name in LAYOUTS:
        return compiled(LAYOUTS[type_name], block, size, streamed=streamed)
    return _with_rest(compiled(LUMPED[type_name], LUMP, LUMP * size, streamed=streamed))


def _with_rest(unpack_lumps: Unpack) -> Unpack:
    """For blocks of one value: those that do not fill a lump are unpacked as part of one that is filled up."""

    def unpack(blocks: Bytes, out: Float32Array) -> None:
        n, size = blocks.shape
        whole = n - n % LUMP
        unpack_lumps(blocks[:whole].reshape(-1, LUMP * size), out[:whole].reshape(-1, LUMP))
        if whole < n:
            lump, values = np.zeros((LUMP, size), np.uint8), room.floats((1, LUMP), "a lump")
            lump[: n - whole] = blocks[whole:]
            unpack_lumps(lump.reshape(1, -1), values)
            out[whole:, 0] = values[0, : n - whole]

    return unpack


# ── by numpy and gguf-py ─────────────────────────────────────────────────────────────────────────

_NUMBERS: dict[str, type[np.generic]] = {
    "F64": np.float64,
    "I8": np.int8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
}


def _numbers(dtype: type[np.generic]) -> Unpack:
    def unpack(blocks: Bytes, out: Float32Array) -> None:
        with np.errstate(over="ignore"):
            np.copyto(out, blocks.view(dtype), casting="unsafe")

    return unpack


@cache
def _library_knows(type_name: str) -> bool:
    kind = gguf.GGMLQuantizationType[type_name]
    try:
        gguf.quants.dequantize(np.zeros((1, BLOCKS[type_name][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _library(type_name: str) -> Unpack:
    kind = gguf.GGMLQuantizationType[type_name]

    def unpack(blocks: Bytes, out: Float32Array) -> None:
        step = max(1, _RUN // out.shape[1])
        # Damaged scales may be infinite or NaN; that is for `non_finite` to tell, not for a warning.
        with np.errstate(all="ignore"):
            for i in range(0, len(blocks), step):
                part = out[i : i + step]
                # As one row: the library works in groups of 16 rows, which is slow where a row is one block.
                part[...] = gguf.quants.dequantize(blocks[i : i + step].reshape(1, -1), kind).reshape(part.shape)

    return unpack
