"""Operands of products for ggml's own kernels: weights of every type, also rearranged ones, in a test's graph."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffharness.engine.bindings import GgmlTensor, _InitParams
from diffharness.recorded import RecordedNode
from diffharness.weights.dequant import BLOCKS, TYPE_IDS, byte_size
from diffharness.weights.gguf_write import encode_floats
from tests.replay.ggml_graph import Graph, _libraries

Bytes = NDArray[np.uint8]
_P = ctypes.c_void_p


@dataclass(frozen=True)
class Weight:
    """A matrix, or a stack of them, as stored."""

    type: str
    shape: tuple[int, ...]
    raw: Bytes


def weight(values: NDArray[np.float32], type_name: str) -> Weight:
    """By ggml's quantizer; random codes in types whose quantizer must first build its tables for seconds."""
    if type_name in ("F32", "F16", "BF16"):
        return Weight(type_name, values.shape, encode_floats(values, type_name).reshape(-1))
    if type_name[:3] in ("IQ1", "IQ2", "IQ3"):
        return Weight(type_name, values.shape, _any_codes(byte_size(type_name, values.shape), type_name))
    width = values.shape[-1]
    ggml, _ = _libraries()
    raw = ggml.quantize(values.reshape(-1, width), TYPE_IDS[type_name], np.ones(width, dtype=np.float32))
    return Weight(type_name, values.shape, raw)


def _any_codes(n_bytes: int, type_name: str) -> Bytes:
    """Blocks of random bits, each with a float16 scale between 1/128 and 1/64 (those of IQ1_M lie in nibbles)."""
    raw = np.random.default_rng(n_bytes).integers(0, 256, n_bytes, dtype=np.uint8)
    blocks = raw.reshape(-1, BLOCKS[type_name][1])
    if type_name == "IQ1_M":
        blocks[:, 53] = blocks[:, 53] & 15 | 0x20
        blocks[:, 55] = blocks[:, 55] & 15 | 0x20
    else:
        blocks[:, 1] = 0x20 | blocks[:, 1] & 3
    return raw


def tensor(g: Graph, w: Weight) -> int:
    address = _new(g._context, w)
    ctypes.memmove(GgmlTensor.from_address(address).data, w.raw.ctypes.data, w.raw.size)
    return address


@contextmanager
def rearranged(w: Weight) -> Iterator[int | None]:
    """The weight where llama.cpp's repacking puts it; None if this build does not repack that type or shape."""
    ggml, _ = _libraries()
    lib, kind = ggml.library, _repack_type()
    context = lib.ggml_init(_InitParams(1 << 16, None, True))
    buffer = None
    try:
        address = _new(context, w)
        if kind is not None:
            lib.ggml_backend_alloc_ctx_tensors_from_buft.restype = _P
            buffer = lib.ggml_backend_alloc_ctx_tensors_from_buft(_P(context), _P(kind))
        if buffer is None or not GgmlTensor.from_address(address).extra:
            yield None
        else:
            lib.ggml_backend_tensor_set(
                _P(address), _P(w.raw.ctypes.data), ctypes.c_size_t(0), ctypes.c_size_t(w.raw.size)
            )
            yield address
    finally:
        if buffer is not None:
            lib.ggml_backend_buffer_free(_P(buffer))
        lib.ggml_free(context)


def of_file(node: RecordedNode, w: Weight) -> RecordedNode:
    """The node as if source 0 had the bytes of the file, not those of memory."""
    first = node.sources[0]
    assert first is not None
    return replace(node, sources=(replace(first, raw=w.raw), *node.sources[1:]))


def _new(context: int, w: Weight) -> int:
    ggml, _ = _libraries()
    ne = ((1,) * (4 - len(w.shape)) + w.shape)[::-1]
    address: int = ggml.library.ggml_new_tensor_4d(context, TYPE_IDS[w.type], *ne)
    return address


def _repack_type() -> int | None:
    ggml, cpu = _libraries()
    lib: Any = ggml.library
    cpu.ggml_backend_cpu_reg.restype = _P
    lib.ggml_backend_reg_get_proc_address.restype = lib.ggml_backend_reg_dev_get.restype = _P
    lib.ggml_backend_buft_name.restype = ctypes.c_char_p
    registry = _P(cpu.ggml_backend_cpu_reg())
    function = lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    device = lib.ggml_backend_reg_dev_get(registry, ctypes.c_size_t(0))
    kinds = ctypes.CFUNCTYPE(ctypes.POINTER(_P), _P)(function)(device)
    i = 0
    while kinds[i]:
        if lib.ggml_backend_buft_name(_P(kinds[i])) == b"CPU_REPACK":
            return int(kinds[i])
        i += 1
    return None


class CpuTraits(ctypes.Structure):
    """struct ggml_type_traits_cpu."""

    _fields_ = [("from_float", _P), ("vec_dot", _P), ("vec_dot_type", ctypes.c_int), ("nrows", ctypes.c_int64)]


def traits(type_name: str) -> CpuTraits:
    """What the CPU backend knows of a type."""
    _, cpu = _libraries()
    cpu.ggml_get_type_traits_cpu.restype = _P
    return CpuTraits.from_address(cpu.ggml_get_type_traits_cpu(TYPE_IDS[type_name]))


def converted(x: NDArray[np.float32], type_name: str, n_bytes: int) -> Bytes:
    """Values as the CPU backend converts activations and cache rows."""
    out, x = np.zeros(n_bytes, dtype=np.uint8), np.ascontiguousarray(x)
    function = ctypes.CFUNCTYPE(None, _P, _P, ctypes.c_int64)(traits(type_name).from_float)
    function(x.ctypes.data, out.ctypes.data, x.size)
    return out
