"""Products of matrices: MUL_MAT, MUL_MAT_ID, OUT_PROD.

ggml rounds the float32 operand to the type that belongs to the other one's before the product (`VEC_DOT_TYPE`); from
there on it sums exactly what is summed here, in float32 and in another order. So a single row, a batch, repacked
weights, tiles and tinyBLAS must all give these numbers: what is left is rounding of sums, NMSE about 1e-13.

A weight is dequantized from the file's bytes in pieces of some megabytes, of a stack of experts only those to which a
token was routed.

Where a row of the output is further from the engine's than that, two things are granted before it counts. First, the
other honest arithmetics of the activations' type (`activation_quant.ARITHMETICS`); each row keeps the nearest. They
round the same inputs and differ by one step in rare codes, each worth at most 1 / 127^2 of its block's energy and 1e-6
of an ordinary row's. Second, values whose terms nearly cancel: the gate of a shared expert is a single number, and in
one token of some hundred so near to zero that rounding is all there is to compare. Each value may come nearer by 2^-24
of the sum of its terms' magnitudes; what float32 sums are off by is a tenth of it. In rows that do not cancel this is
an NMSE of 1e-11, so that no fault hides in it: an output that is wrong stays wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffharness.errors import EngineError
from diffharness.recorded import Value
from diffharness.replay.activation_quant import MINIMA, VEC_DOT_TYPE, arithmetics, as_held, minima
from diffharness.replay.call import Call, Kernel, NoReplay
from diffharness.replay.distance import nmse_by_row
from diffharness.weights.dequant import byte_size, can_dequantize, dequantize
from diffharness.weights.gguf_file import GgufFile

_PIECE = 1 << 22  # values of a weight held as float32 at a time: 16 MiB
_RELEASE_FROM = 1 << 24  # bytes of a weight that are let go of after use
_HADAMARD = 1  # GGML_HINT_SRC0_IS_HADAMARD in op_params[1]: computed by butterflies, without rounding the activations
_NOISE = 1e-11  # NMSE of an output row above which something is granted
_SUM_ROUNDING = 2.0**-24  # of the sum of the magnitudes of a value's terms

_Entries = Callable[[Tensor], Tensor]  # what is done to both operands, entry by entry


def _as_they_are(x: Tensor) -> Tensor:
    return x


def _mul_mat(call: Call) -> Tensor:
    """out[i3, i2, j, i] = sum of src1[i3, i2, j, :] * src0[i3 / r3, i2 / r2, i, :]."""
    rows = Rows(call, 0)
    x = call.x(1)
    n3, n2, n1, _ = x.shape
    m3, m2, m1, _ = rows.shape
    held = "F32" if call.i(1) == _HADAMARD else rows.held

    def compute(arithmetic: str, entries: _Entries = _as_they_are) -> Tensor:
        operand = entries(as_held(x, held, arithmetic)).reshape(m3, n3 // m3, m2, n2 // m2, n1, -1)
        out = torch.empty(*operand.shape[:-1], m1)
        for i3, i2 in product(range(m3), range(m2)):
            for first, last, weight in rows.pieces(i3, i2):
                out[i3, :, i2, :, :, first:last] = operand[i3, :, i2] @ entries(weight).T
        return out.reshape(n3, n2, n1, m1)

    return _granted(call, compute, arithmetics(held))


def _mul_mat_id(call: Call) -> Tensor:
    """out[t, u, i] = sum of src1[t, u mod ne11, :] * src0[ids[t, u], i, :]."""
    rows = Rows(call, 0)
    x, ids = call.x(1)[0], call.ints(2)[0, 0]
    n_experts, m1 = rows.shape[1:3]
    experts = np.unique(ids.numpy()).tolist()
    if experts and not 0 <= experts[0] <= experts[-1] < n_experts:
        raise EngineError(f"node {call.node.name} has rows for experts {experts} of {n_experts}")
    slots = torch.arange(ids.shape[1]) % x.shape[1]

    def compute(arithmetic: str, entries: _Entries = _as_they_are) -> Tensor:
        operand = entries(as_held(x, rows.held, arithmetic))
        out = torch.empty(*ids.shape, m1)
        for expert in experts:
            token, used = torch.nonzero(ids == expert, as_tuple=True)
            routed = operand[token, slots[used]]
            for first, last, weight in rows.pieces(0, expert):
                out[token, used, first:last] = routed @ entries(weight).T
        return out

    return _granted(call, compute, arithmetics(rows.held))


def _out_prod(call: Call) -> Tensor:
    """out[i3, i2, j, i] = sum over k of src1[i3, i2, k, j] * src0[i3 / r3, i2 / r2, k, i]; nothing is rounded."""
    a, b = call.x(0), call.x(1)
    for axis in (0, 1):
        a = a.repeat_interleave(b.shape[axis] // a.shape[axis], dim=axis)
    return b.transpose(2, 3) @ a


# ── a matrix, row by row ─────────────────────────────────────────────────────────────────────────────


class Rows:
    """Source i, rows [ne3, ne2, ne1, ne0] that are dequantized when they are needed."""

    def __init__(self, call: Call, i: int) -> None:
        value = call.value(i)
        if value.type not in VEC_DOT_TYPE or not can_dequantize(value.type):
            raise NoReplay(f"node {call.node.name} multiplies by {value.name} of type {value.type}")
        self.shape, self.held, self._type = value.shape, VEC_DOT_TYPE[value.type], value.type
        self._bytes = _stored(value, _raw(value, call))
        self._file = call.weights if value.is_weight else None
        self._name = value.name

    def pieces(self, i3: int, i2: int) -> Iterator[tuple[int, int, Tensor]]:
        """One matrix in runs of rows: first, last, values [last - first, ne0], of Q4_1 and Q5_1 with the minima of
        the row's blocks as further columns."""
        n, width = self.shape[2:]
        step = max(1, _PIECE // max(1, width))
        for first in range(0, n, step):
            last = min(first + step, n)
            raw = np.ascontiguousarray(self._bytes[i3, i2, first:last])
            values = torch.from_numpy(dequantize(raw, self._type, (last - first, width)))
            if self._type in MINIMA:
                values = torch.cat([values, minima(raw, self._type)], dim=1)
            yield first, last, values
        if isinstance(self._file, GgufFile) and self._bytes.size >= _RELEASE_FROM:
            self._file.release(self._name)


def _raw(value: Value, call: Call) -> NDArray[np.uint8]:
    """The bytes of a source; of a tensor of the file they are the file's, of a view of one those from its beginning."""
    if value.raw is not None:
        return value.raw
    if not isinstance(call.weights, GgufFile):
        raise NoReplay(f"{value.name} can only be read from the GGUF file itself, not from {call.weights.label}")
    info = call.weights.tensors.get(value.name)
    if info is None:
        raise EngineError(f"the engine's graph uses {value.name}, which {call.weights.label} does not have")
    if info.type != value.type:
        raise EngineError(f"the engine holds {value.name} as {value.type}, {call.weights.label} as {info.type}")
    return call.weights.raw(value.name)[value.offset :]


def _stored(value: Value, raw: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`raw` as rows of bytes [ne3, ne2, ne1, bytes of a row]; EngineError if one would lie outside of it."""
    n_bytes = byte_size(value.type, value.shape[3:])
    steps = value.strides[:3]
    end = sum((n - 1) * step for n, step in zip(value.shape[:3], steps, strict=True)) + n_bytes
    if min(steps) < 0 or end > raw.size:
        raise EngineError(f"{value.name} of shape {value.shape} reaches to byte {end}, there are {raw.size}")
    return np.lib.stride_tricks.as_strided(raw, (*value.shape[:3], n_bytes), (*steps, 1), writeable=False)


# ── what is granted to the engine ────────────────────────────────────────────────────────────────


class _Product(Protocol):
    """The product by one arithmetic of the activations, after `entries` was applied to both operands."""

    def __call__(self, arithmetic: str, entries: _Entries = ...) -> Tensor: ...


def _granted(call: Call, compute: _Product, names: tuple[str, ...]) -> Tensor:
    """The output as near to the engine's as arithmetic that is as right can come."""
    ours, distance = _nearest(call, compute, names)
    if not _is_off(distance):
        return ours
    slack = (_SUM_ROUNDING * compute(names[0], torch.abs)).nan_to_num_(0, 0, 0)
    theirs = torch.from_numpy(call.node.out.array().reshape(ours.shape).copy())
    return ours + (theirs - ours).nan_to_num_(0).clamp_(-slack, slack)


def nearest(call: Call, compute: Callable[[str], Tensor], names: tuple[str, ...]) -> Tensor:
    """The output by the first arithmetic of `names`; of rows that are not the engine's, by the one that is nearest."""
    return compute(names[0]) if len(names) == 1 else _nearest(call, compute, names)[0]


def _nearest(call: Call, compute: Callable[[str], Tensor], names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """The output, and the NMSE of each row [..., 1]; zeros where the engine's output is not at hand."""
    ours = compute(names[0])
    if call.node.out.raw is None:
        return ours, torch.zeros(1)
    theirs = call.node.out.array().reshape(ours.shape)
    distance = _distance(theirs, ours)
    for name in names[1:]:
        if not _is_off(distance):
            break
        other = compute(name)
        ours = torch.where(_distance(theirs, other) < distance, other, ours)
        distance = _distance(theirs, ours)
    return ours, distance


def _is_off(distance: Tensor) -> bool:
    return bool((distance > _NOISE).any())


def _distance(theirs: NDArray[np.float32], ours: Tensor) -> Tensor:
    """NMSE of each row: [..., 1]."""
    b = ours.reshape(-1, ours.shape[-1]).numpy()
    return torch.from_numpy(nmse_by_row(theirs.reshape(b.shape), b)).reshape(*ours.shape[:-1], 1)


KERNELS: dict[str, Kernel] = {"MUL_MAT": _mul_mat, "MUL_MAT_ID": _mul_mat_id, "OUT_PROD": _out_prod}
