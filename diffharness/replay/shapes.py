"""Ops that move values and compute nothing: copies, rows taken and written, pieces put together.

By ggml.h and ggml-cpu/ops.cpp. Rows written into a cache are compared together with what stood there before, so that
a row written to the wrong place is seen at both places. Rounding to the type of the output is the driver's; nodes that
only change the view are `replay.views`.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from diffharness.errors import EngineError
from diffharness.replay.activation_quant import rounded
from diffharness.replay.call import Call, Held, Kernel, Partial
from diffharness.replay.elementwise import INTEGERS, repeated, values
from diffharness.weights.dequant import BLOCKS

_N_AXES = 4


def _same(call: Call) -> Tensor:
    """The source's values in the order of its indices."""
    return values(call, 0)


def _copied(call: Call) -> Tensor:
    """The same, from float to integer towards zero."""
    x = values(call, 0)
    if call.node.out.type in INTEGERS:
        return x.trunc().long()
    return x.float()


def _repeat(call: Call) -> Tensor:
    return repeated(values(call, 0), call.node.out.shape)


def _repeat_back(call: Call) -> Tensor:
    """The sum over all repetitions."""
    x, out = call.x(0), call.node.out.shape
    folded = x.reshape([n for wide, narrow in zip(x.shape, out, strict=True) for n in (wide // narrow, narrow)])
    return folded.double().sum((0, 2, 4, 6))


def _concat(call: Call) -> Tensor:
    return torch.cat((values(call, 0), values(call, 1)), dim=_N_AXES - 1 - call.i(0))


# -- rows ----------------------------------------------------------------------------------------------


def _get_rows(call: Call) -> Tensor:
    """Rows ids [1, a, b, n] of the matrices [a, b, .., ne0]: [a, b, n, ne0].

    Of a matrix of the file only these rows are read.
    """
    source, ids = call.value(0), call.ints(1)[0]
    info = call.weights.tensors.get(source.name) if source.is_weight else None
    _within(call, ids, source.shape[2])
    if info is not None and source.offset == 0 and source.shape == (1, 1, *info.shape):
        wanted, where = torch.unique(ids, return_inverse=True)
        return torch.from_numpy(np.asarray(call.weights.take(source.name, wanted.numpy())))[where]
    table = values(call, 0)
    outer, inner = (torch.arange(n) for n in table.shape[:2])
    return table[outer[:, None, None], inner[None, :, None], ids]


def _set_rows(call: Call) -> Held | Partial:
    """The destination (source 2) as it was, with row i of source 0 written to its row ids[.., i].

    The indices [1, c, b, n] repeat over the matrices of source 0. Only the rows that are written are rounded.
    Until late 2025 the destination was no source; then only the written rows are known.
    """
    rows, out = call.x(0), call.x(2) if call.has(2) else torch.zeros(call.node.out.shape)
    ids = repeated(call.ints(1)[0], rows.shape[:3])
    _within(call, ids, out.shape[2])
    outer, inner = (torch.arange(n) for n in rows.shape[:2])
    written = (outer[:, None, None], inner[None, :, None], ids)
    if not call.has(2):
        defined = torch.zeros(out.shape, dtype=torch.bool)
        out[written], defined[written] = rows, True
        return Partial(out, defined)
    out[written] = rounded(rows, call.node.out.type)
    return Held(out)


def _within(call: Call, ids: Tensor, n_rows: int) -> None:
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < n_rows:
        raise EngineError(
            f"node {call.node.name} ({call.node.op}) names rows {int(ids.min())} to {int(ids.max())} of {n_rows}"
        )


# -- pieces --------------------------------------------------------------------------------------------


def _placed(call: Call, *, add: bool) -> Tensor:
    """Source 0 with source 1 laid into it, or added.

    op_params hold the place in bytes: strides nb1, nb2, nb3, and the offset.
    """
    out, piece = values(call, 0).contiguous(), values(call, 1)
    size = BLOCKS[call.value(0).type][1]
    steps = [call.i(i) // size for i in (2, 1, 0)]
    first = call.i(3) // size
    last = first + sum((n - 1) * step for n, step in zip(piece.shape, (*steps, 1), strict=True))
    if min(*steps, first) < 0 or last >= out.numel():
        raise EngineError(f"node {call.node.name} ({call.node.op}) writes element {last} of {out.numel()}")
    place = out.as_strided(piece.shape, (*steps, 1), first)
    place.copy_(place + piece if add else piece)
    return out


def _set(call: Call) -> Tensor:
    return _placed(call, add=False)


def _acc(call: Call) -> Tensor:
    return _placed(call, add=True)


def _pad(call: Call) -> Tensor:
    """Zeros, or with op_params[8] the other end of the row, before and after: lp0, rp0, lp1, rp1, ..."""
    x = call.x(0)
    for axis in range(_N_AXES):
        dim = _N_AXES - 1 - axis
        left, right = call.i(2 * axis), call.i(2 * axis + 1)
        n = x.shape[dim]
        index = torch.arange(-left, n + right)
        padded = x.index_select(dim, index % n)
        if not call.i(8):
            inside = ((index >= 0) & (index < n)).reshape([-1 if i == dim else 1 for i in range(_N_AXES)])
            padded = torch.where(inside, padded, 0.0)
        x = padded
    return x


def _pad_reflect_1d(call: Call) -> Tensor:
    x = call.x(0)
    index = torch.arange(-call.i(0), x.shape[-1] + call.i(1)).abs()
    last = x.shape[-1] - 1
    return x[..., last - (last - index).abs()]


def _roll(call: Call) -> Tensor:
    return call.x(0).roll([call.i(i) for i in range(_N_AXES)], dims=(3, 2, 1, 0))


# -- triangles -----------------------------------------------------------------------------------------


def _diag(call: Call) -> Tensor:
    return torch.diag_embed(call.x(0)[..., 0, :])


def _tri(call: Call) -> Tensor:
    """The part above or below the diagonal, with it or without (ggml_tri_type)."""
    x, kind = call.x(0), call.i(0)
    kept = (x.triu, lambda: x.triu(1), x.tril, lambda: x.tril(-1))
    return kept[kind]()


def _diag_mask(fill: float) -> Kernel:
    """Of row j the columns beyond n_past + j are `fill`."""

    def kernel(call: Call) -> Tensor:
        x, n_past = call.x(0), call.i(0)
        hidden = torch.ones(x.shape[-2:], dtype=torch.bool).triu(n_past + 1)
        return x.masked_fill(hidden, fill)

    return kernel


KERNELS: dict[str, Kernel] = {
    "CONT": _same,
    "CPY": _copied,
    "DUP": _copied,
    "REPEAT": _repeat,
    "REPEAT_BACK": _repeat_back,
    "CONCAT": _concat,
    "GET_ROWS": _get_rows,
    "SET_ROWS": _set_rows,
    "SET": _set,
    "ACC": _acc,
    "PAD": _pad,
    "PAD_REFLECT_1D": _pad_reflect_1d,
    "ROLL": _roll,
    "DIAG": _diag,
    "TRI": _tri,
    "DIAG_MASK_INF": _diag_mask(-math.inf),
    "DIAG_MASK_ZERO": _diag_mask(0.0),
}
