"""A control for lossy KV caches: an F32 cache whose rows are rounded by our own code as they are stored.

The engine that keeps its cache in Q8_0 and this one lose the same by definition of the type; what they do
not share is the engine's quantizer, its storage and its attention over quantized rows. Rows of quantized
types are turned by a Hadamard matrix before and back after, which spreads single large values; llama.cpp
does so where heads are wide enough (attn_rot in llama-kv-cache.cpp). Its attention rounds the query too,
the control's does not. The formats are those of ggml-quants.c: a scale, or a scale and a least value, in
float16 for 32 values.
Standard library and numpy only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from diffharness.engine.bindings import Ggml, GgmlTensor
from diffharness.engine.decoding import GraphCallback
from diffharness.errors import EngineError

F32 = NDArray[np.float32]
BLOCK = 32
TURN = 64
_IQ4_NL = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=np.float32
)  # its levels, in ggml-common.h


def _half(x: F32) -> F32:
    return x.astype(np.float16).astype(np.float32)


def _bf16(x: F32) -> F32:
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000  # to the nearest, ties to even
    return rounded.astype(np.uint32).view(np.float32)


def _inverse(scale: F32) -> F32:
    return np.divide(1.0, scale, out=np.zeros_like(scale), where=scale != 0)


def _symmetric(x: F32, most: int) -> F32:
    """Q8_0: codes -most .. most of the largest magnitude."""
    scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(most)
    return np.asarray(np.round(x * _inverse(scale)) * _half(scale), dtype=np.float32)


def _signed(x: F32, bits: int) -> F32:
    """Q4_0, Q5_0: the value of largest magnitude becomes the lowest code, whichever its sign."""
    low = 1 << (bits - 1)
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)
    scale = largest / np.float32(-low)
    codes = np.minimum(np.floor(x * _inverse(scale) + (low + 0.5)), 2 * low - 1) - low
    return np.asarray(codes * _half(scale), dtype=np.float32)


def _ranged(x: F32, bits: int) -> F32:
    """Q4_1, Q5_1: codes from the least value on."""
    least = x.min(axis=-1, keepdims=True)
    scale = (x.max(axis=-1, keepdims=True) - least) / np.float32((1 << bits) - 1)
    codes = np.clip(np.floor((x - least) * _inverse(scale) + 0.5), 0, (1 << bits) - 1)
    return np.asarray(codes * _half(scale) + _half(least), dtype=np.float32)


def _iq4_nl(x: F32) -> F32:
    """The nearest of 16 uneven levels; without ggml's second fit of the scale, and so a little worse."""
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)
    scale = largest / _IQ4_NL[0]
    edges = (_IQ4_NL[1:] + _IQ4_NL[:-1]) / 2
    return np.asarray(_IQ4_NL[np.searchsorted(edges, x * _inverse(scale))] * _half(scale), dtype=np.float32)


ROUNDINGS: Mapping[str, Callable[[F32], F32]] = {
    "F32": lambda x: x,
    "F16": _half,
    "BF16": _bf16,
    "Q8_0": lambda x: _symmetric(x, 127),
    "Q5_1": lambda x: _ranged(x, 5),
    "Q5_0": lambda x: _signed(x, 5),
    "Q4_1": lambda x: _ranged(x, 4),
    "Q4_0": lambda x: _signed(x, 4),
    "IQ4_NL": _iq4_nl,
}
_WHOLE = frozenset({"F32", "F16", "BF16"})


def rounded(rows: F32, type_name: str) -> F32:
    """Rows [..., width] as `type_name` holds them; width must be whole blocks of 32 but for F32, F16 and BF16."""
    if type_name in _WHOLE:
        return ROUNDINGS[type_name](rows)
    if rows.shape[-1] % BLOCK:
        raise EngineError(f"rows of {rows.shape[-1]} values are not whole blocks of {type_name}")
    return ROUNDINGS[type_name](rows.reshape(*rows.shape[:-1], -1, BLOCK)).reshape(rows.shape)


def turned(rows: F32) -> F32:
    """Rows [..., width] times a Hadamard matrix, 64 values at a time: its own inverse. Other widths stay."""
    if rows.shape[-1] % TURN:
        return rows
    blocks = rows.reshape(*rows.shape[:-1], -1, TURN)
    return np.asarray(blocks @ _HADAMARD, dtype=np.float32).reshape(rows.shape)


def _hadamard(n: int) -> F32:
    matrix = np.ones((1, 1), dtype=np.float32)
    while len(matrix) < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.asarray(matrix / np.sqrt(np.float32(n)), dtype=np.float32)


_HADAMARD = _hadamard(TURN)


class CacheRounder(GraphCallback):
    """The evaluation callback: after rows went into `cache_k_l*` or `cache_v_l*`, they are rounded in place."""

    def __init__(self, ggml: Ggml, type_k: str, type_v: str) -> None:
        self._ggml, self._types = ggml, {"cache_k": type_k, "cache_v": type_v}

    def _ask(self, address: int) -> bool:
        return self._type_of(address) is not None

    def _done(self, address: int) -> bool:
        type_name = self._type_of(address)
        if type_name is not None:
            self._round(address, type_name)
        return True

    def _type_of(self, address: int) -> str | None:
        node = self._ggml.node(address)
        if node.op != "SET_ROWS":
            return None
        names = (node.name, *node.sources)
        return next((kind for stem, kind in self._types.items() for name in names if name.startswith(stem)), None)

    def _round(self, address: int, type_name: str) -> None:
        ggml, cache = self._ggml, GgmlTensor.from_address(address)
        index = GgmlTensor.from_address(cache.src[1])
        buffers = [GgmlTensor.from_address(t.view_src) if t.view_src else t for t in (cache, index)]
        hosts = all(t.buffer and ggml.library.ggml_backend_buffer_is_host(t.buffer) for t in buffers)
        if not hosts or ggml.type_name(cache.type) != "F32" or ggml.type_name(index.type) != "I64":
            raise EngineError("the control needs an F32 cache in this process's memory")
        width, n_rows, stride = cache.ne[0], cache.ne[1], cache.nb[1]
        if width == 1:
            raise EngineError("the control needs flash attention: without it values are stored by single elements")
        at = np.ctypeslib.as_array((ctypes.c_int64 * index.ne[0]).from_address(index.data))
        raw = np.ctypeslib.as_array((ctypes.c_float * (n_rows * stride // 4)).from_address(cache.data))
        rows = raw.reshape(n_rows, stride // 4)[:, :width]
        values = rows[at]
        rows[at] = rounded(values, type_name) if type_name in _WHOLE else turned(rounded(turned(values), type_name))
