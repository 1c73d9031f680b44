"""Dequantization of every tensor type that gguf-py knows, bit-identical to gguf-py and ggml's C routines.

The types that nearly all weights have are unpacked here, a cache-sized run of blocks at a time in
two threads (numpy releases the GIL), three to twenty times as fast as `gguf.quants`, which does the
rest. The order of the float32 operations is that of ggml's `dequantize_row_*`, which is what makes
the results equal to the last bit; the arrangement of bits is ggml's too (ggml-common.h).

A block unpacker gets `blocks` [n_blocks, type_size] uint8 and fills `out` [n_blocks, block_size] float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import gguf
import numpy as np
from numpy.typing import NDArray

from diffharness.errors import ArtifactFileError, UnsupportedError
from diffharness.weights.source import Float32Array

Bytes = NDArray[np.uint8]
Unpack = Callable[[Bytes, Float32Array], None]

# (elements, bytes) of one block of each type
BLOCKS: dict[str, tuple[int, int]] = {t.name: (n, size) for t, (n, size) in gguf.GGML_QUANT_SIZES.items()}
TYPE_IDS: dict[str, int] = {t.name: int(t) for t in gguf.GGML_QUANT_SIZES}
TYPE_NAMES: dict[int, str] = {i: name for name, i in TYPE_IDS.items()}

_RUN = 1 << 16  # elements unpacked at a time: 256 KiB of output, which stays in the second-level cache
_THREADS = 2
_PARALLEL_FROM = 1 << 20  # elements; below this a second thread costs more than it gives

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


def dequantize(raw: Bytes, type_name: str, shape: Sequence[int], *, tensor: str | None = None) -> Float32Array:
    """The float32 values [*shape] of the stored bytes `raw`; `tensor` only serves the error's message.

    Raises UnsupportedError for a type that has no dequantization, ArtifactFileError where bytes do not fit the shape.
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
    out = np.empty((n // block, block), dtype=np.float32)
    if type_name == "F32":  # a copy, so that the caller holds no part of the file's mapping
        out.reshape(-1).view(np.uint8)[...] = data
        return out.reshape(shape)
    _in_runs(_UNPACK.get(type_name) or _library(type_name), data.reshape(-1, size), out)
    return out.reshape(shape)


def can_dequantize(type_name: str) -> bool:
    return type_name in dequantizable()


@cache
def dequantizable() -> tuple[str, ...]:
    """The names of the types that `dequantize` takes, in ggml's order."""
    return tuple(name for name in BLOCKS if name == "F32" or name in _UNPACK or _library_knows(name))


def _in_runs(unpack: Unpack, blocks: Bytes, out: Float32Array) -> None:
    n_blocks, block = out.shape
    step = max(1, _RUN // block)

    def work(first: int, last: int) -> None:
        # Damaged scales may be infinite or NaN; that is for `non_finite` to tell, not for a warning.
        with np.errstate(all="ignore"):
            for i in range(first, last, step):
                j = min(i + step, last)
                unpack(blocks[i:j], out[i:j])

    if out.size < _PARALLEL_FROM:
        work(0, n_blocks)
        return
    bounds = [n_blocks * k // _THREADS for k in range(_THREADS + 1)]
    with ThreadPoolExecutor(_THREADS - 1) as pool:
        others: list[Future[None]] = [pool.submit(work, a, b) for a, b in pairwise(bounds[1:])]
        work(bounds[0], bounds[1])
        for other in others:
            other.result()


# ── the long tail, by gguf-py ────────────────────────────────────────────────────────────────────


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
        # As one row: the library works in groups of 16 rows, which is slow where a row is one block.
        out[...] = gguf.quants.dequantize(np.ascontiguousarray(blocks).reshape(1, -1), kind).reshape(out.shape)

    return unpack


# ── plain numbers ────────────────────────────────────────────────────────────────────────────────


def _numbers(dtype: type[np.generic]) -> Unpack:
    def unpack(blocks: Bytes, out: Float32Array) -> None:
        np.copyto(out, np.ascontiguousarray(blocks).view(dtype), casting="unsafe")

    return unpack


def _bf16(blocks: Bytes, out: Float32Array) -> None:
    np.left_shift(np.ascontiguousarray(blocks).view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)


# ── blocks of 32 with one scale ──────────────────────────────────────────────────────────────────


def _f16(columns: Bytes) -> Float32Array:
    """float16 columns [n, 2k bytes] as float32 [n, k]."""
    return np.ascontiguousarray(columns).view(np.float16).astype(np.float32)


def _scaled(q: NDArray[np.uint8] | NDArray[np.int8], scale: Float32Array, out: Float32Array) -> None:
    """out = scale * q, in float32; `q` has out's shape, `scale` broadcasts."""
    np.copyto(out, q)
    np.multiply(scale, out, out=out)


def _nibbles(packed: Bytes) -> Bytes:
    """[n, m] bytes -> [n, 2m]: all the low nibbles, then all the high ones."""
    n, m = packed.shape
    q = np.empty((n, 2 * m), dtype=np.uint8)
    np.bitwise_and(packed, 15, out=q[:, :m])
    np.right_shift(packed, 4, out=q[:, m:])
    return q


def _q8_0(blocks: Bytes, out: Float32Array) -> None:
    _scaled(np.ascontiguousarray(blocks[:, 2:]).view(np.int8), _f16(blocks[:, :2]), out)


def _q4_0(blocks: Bytes, out: Float32Array) -> None:
    q = _nibbles(blocks[:, 2:]).view(np.int8)
    q -= 8
    _scaled(q, _f16(blocks[:, :2]), out)


def _q4_1(blocks: Bytes, out: Float32Array) -> None:
    scale = _f16(blocks[:, :4])
    _scaled(_nibbles(blocks[:, 4:]), scale[:, :1], out)
    out += scale[:, 1:]


def _with_fifth_bit(blocks: Bytes) -> Bytes:
    """5-bit values [n, 32] of 4 bytes of high bits followed by 16 bytes of nibbles."""
    high = np.unpackbits(blocks[:, :4], axis=1, bitorder="little")
    high <<= 4
    q = _nibbles(blocks[:, 4:])
    q |= high
    return q


def _q5_0(blocks: Bytes, out: Float32Array) -> None:
    q = _with_fifth_bit(blocks[:, 2:]).view(np.int8)
    q -= 16
    _scaled(q, _f16(blocks[:, :2]), out)


def _q5_1(blocks: Bytes, out: Float32Array) -> None:
    scale = _f16(blocks[:, :4])
    _scaled(_with_fifth_bit(blocks[:, 4:]), scale[:, :1], out)
    out += scale[:, 1:]


# ── K types: super-blocks of 256 ─────────────────────────────────────────────────────────────────


def k_scales(blocks: Bytes) -> tuple[Float32Array, Float32Array]:
    """Scales and minima [n, 8, 1] of Q4_K and Q5_K: two float16, then 8 + 8 values of 6 bits in 12 bytes.

    The first four of each lie in the low 6 bits of bytes 0-3 and 4-7; the last four have their low
    nibbles in bytes 8-11 and their two high bits on top of bytes 0-3 and 4-7.
    """
    d = _f16(blocks[:, :4])
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = np.concatenate([a & 63, (c & 15) | ((a >> 2) & 48)], axis=1).astype(np.float32)
    minimum = np.concatenate([b & 63, (c >> 4) | ((b >> 2) & 48)], axis=1).astype(np.float32)
    return (d[:, :1] * scale)[:, :, None], (d[:, 1:] * minimum)[:, :, None]


def _q4_k(blocks: Bytes, out: Float32Array) -> None:
    scale, minimum = k_scales(blocks)
    values = out.reshape(-1, 8, 32)
    _scaled(_pairs(blocks[:, 16:144]), scale, values)
    values -= minimum


def _pairs(packed: Bytes) -> Bytes:
    """[n, 128] bytes -> [n, 8, 32]: of every 32 bytes first the low nibbles, then the high ones."""
    n = packed.shape[0]
    p = packed.reshape(n, 4, 32)
    q = np.empty((n, 4, 2, 32), dtype=np.uint8)
    np.bitwise_and(p, 15, out=q[:, :, 0])
    np.right_shift(p, 4, out=q[:, :, 1])
    return q.reshape(n, 8, 32)


def _q5_k(blocks: Bytes, out: Float32Array) -> None:
    scale, minimum = k_scales(blocks)
    q = _pairs(blocks[:, 48:176])
    high = blocks[:, 16:48]
    for i in range(8):  # bit i of the 32 high bytes belongs to the i-th 32 values
        q[:, i] |= ((high >> i) & 1) << 4
    values = out.reshape(-1, 8, 32)
    _scaled(q, scale, values)
    values -= minimum


def _q6_k(blocks: Bytes, out: Float32Array) -> None:
    n = blocks.shape[0]
    low = blocks[:, :128].reshape(n, 2, 64)  # per half of 128: nibbles of values 0-63, then of 64-127
    high = blocks[:, 128:192].reshape(n, 2, 1, 32)  # per half: four 2-bit fields
    q = np.empty((n, 2, 4, 32), dtype=np.uint8)
    halves = q.reshape(n, 2, 2, 64)
    np.bitwise_and(low, 15, out=halves[:, :, 0])
    np.right_shift(low, 4, out=halves[:, :, 1])
    for i in range(4):
        q[:, :, i] |= ((high[:, :, 0] >> (2 * i)) & 3) << 4
    signed = q.view(np.int8)
    signed -= 32
    scale = _f16(blocks[:, 208:210]) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    _scaled(signed.reshape(n, 16, 16), scale[:, :, None], out.reshape(n, 16, 16))


# ── four bits that index a fixed table ───────────────────────────────────────────────────────────

_IQ4 = np.array(gguf.quants.IQ4_NL.kvalues, dtype=np.int8)


def _iq4_nl(blocks: Bytes, out: Float32Array) -> None:
    _scaled(_IQ4.take(_nibbles(blocks[:, 2:])), _f16(blocks[:, :2]), out)


def _iq4_xs(blocks: Bytes, out: Float32Array) -> None:
    n = blocks.shape[0]
    high = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16)
    scale = np.empty((n, 4, 2), dtype=np.uint8)  # low nibbles of the eight 6-bit scales
    np.bitwise_and(blocks[:, 4:8], 15, out=scale[:, :, 0])
    np.right_shift(blocks[:, 4:8], 4, out=scale[:, :, 1])
    signed = (scale.reshape(n, 8) | ((high & 3) << 4).astype(np.uint8)).view(np.int8) - np.int8(32)
    d = _f16(blocks[:, :2]) * signed.astype(np.float32)
    q = _nibbles(np.ascontiguousarray(blocks[:, 8:]).reshape(-1, 16))
    _scaled(_IQ4.take(q).reshape(n, 8, 32), d[:, :, None], out.reshape(n, 8, 32))


_UNPACK: dict[str, Unpack] = {
    "F16": _numbers(np.float16),
    "BF16": _bf16,
    "F64": _numbers(np.float64),
    "I8": _numbers(np.int8),
    "I16": _numbers(np.int16),
    "I32": _numbers(np.int32),
    "I64": _numbers(np.int64),
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
