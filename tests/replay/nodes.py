"""Recorded nodes made of numpy arrays, for tests of single kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffharness.recorded import PLAIN, Path, RecordedNode, Value
from diffharness.replay.call import Call
from diffharness.replay.kernels import KERNELS
from diffharness.weights.dequant import byte_size
from diffharness.weights.source import Overlay, TensorInfo, WeightSource

TYPE_OF = {dtype: name for name, dtype in PLAIN.items()}


class NoWeights:
    """A file without tensors, to which `arrays` may be added by name (kept as float32)."""

    def __init__(self, **arrays: NDArray[Any]) -> None:
        self.label, self.arch, self.metadata = "no file", "none", {}
        self.arrays = {name: np.asarray(array, dtype=np.float32) for name, array in arrays.items()}
        self.tensors = {n: TensorInfo(n, a.shape, "F32", a.nbytes) for n, a in self.arrays.items()}

    def read(self, name: str) -> NDArray[np.float32]:
        return self.arrays[name]

    def take(self, name: str, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        return self.arrays[name][rows]


def four(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """A shape padded with leading ones."""
    a, b, c, d = (1,) * (4 - len(shape)) + tuple(shape)
    return a, b, c, d


def value(array: NDArray[Any], name: str = "x") -> Value:
    """A plain array (F32, F16, I32, ...) as the worker would send it; a strided numpy view keeps its strides."""
    array = np.asarray(array)
    if array.dtype == np.float64 or array.dtype not in TYPE_OF:
        array = array.astype(np.float32)
    while array.ndim < 4:
        array = array[None]
    last = sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)) + array.itemsize
    n_bytes = last if array.size else 0
    raw = np.frombuffer(ctypes.string_at(array.ctypes.data, n_bytes), dtype=np.uint8)
    return Value(name, TYPE_OF[array.dtype], four(array.shape), _strides(array), raw)


def _strides(array: NDArray[Any]) -> tuple[int, int, int, int]:
    a, b, c, d = array.strides
    return a, b, c, d


def blocks(raw: NDArray[np.uint8], type_name: str, shape: Sequence[int], name: str = "x") -> Value:
    """Contiguous quantized (or BF16) rows given as their bytes."""
    whole = four(shape)
    row = byte_size(type_name, (whole[3],))
    first = byte_size(type_name, (1,)) if type_name == "BF16" else row
    strides = (row * whole[2] * whole[1], row * whole[2], row, first)
    return Value(name, type_name, whole, strides, np.ascontiguousarray(raw).reshape(-1).view(np.uint8))


def weight(name: str, shape: Sequence[int], type_name: str = "F32") -> Value:
    """A tensor of the file: the kernel finds it in `weights`."""
    return Value(name, type_name, four(shape), value(np.zeros(four(shape), np.float32)).strides, None)


def params(*values: int | float) -> NDArray[np.int32]:
    """op_params: ints stay ints, floats become their float32 bits."""
    out = np.zeros(16, dtype=np.int32)
    for i, each in enumerate(values):
        out[i] = np.float32(each).view(np.int32) if isinstance(each, float) else each
    return out


def node(
    op: str,
    out: NDArray[Any] | Value | Sequence[int],
    *sources: NDArray[Any] | Value | None,
    op_params: NDArray[np.int32] | None = None,
    name: str = "node",
    path: Path = "batch",
) -> RecordedNode:
    """A node; `out` may be just the output's shape (then F32 zeros)."""
    whole = out if isinstance(out, Value | np.ndarray) else np.zeros(tuple(out), np.float32)
    return RecordedNode(
        index=0,
        name=name,
        op=op,
        params=params() if op_params is None else op_params,
        out=whole if isinstance(whole, Value) else value(whole, name),
        sources=tuple(s if s is None or isinstance(s, Value) else value(s, f"src{i}") for i, s in enumerate(sources)),
        path=path,
    )


def replay(recorded: RecordedNode, weights: WeightSource | Overlay | NoWeights | None = None) -> Tensor:
    """The node's kernel on it, reshaped to the node's output shape [ne3, ne2, ne1, ne0]."""
    result = KERNELS[recorded.op](Call(recorded, weights or NoWeights()))
    return (result if isinstance(result, Tensor) else result.values).reshape(recorded.out.shape)
