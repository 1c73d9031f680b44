"""What vision and diffusion graphs add: resizing, windows, relative positions, the embedding of a time step.

By the definitions in ggml.h and ggml-cpu/ops.cpp. ggml's dimension 0 is the last axis here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from diffharness.errors import EngineError
from diffharness.replay.call import Call, Kernel

_F32 = np.float32
_NEAREST, _BILINEAR, _BICUBIC = 0, 1, 2  # enum ggml_scale_mode
_ALIGN_CORNERS, _ANTIALIAS = 1 << 8, 1 << 9  # enum ggml_scale_flag

Floats = NDArray[np.float32]


# -- resizing ------------------------------------------------------------------------------------------


def _upscale(call: Call) -> Tensor:
    """Every mode is a product with one matrix [n_out, n_in] per axis; channels and batch go by the nearest."""
    x, flags = call.x(0).double(), call.i(0)
    mode, outs = flags & 0xFF, call.node.out.shape
    if mode not in (_NEAREST, _BILINEAR, _BICUBIC):
        raise EngineError(f"node {call.node.name} scales in an unknown mode {mode}")
    matrices = []
    for axis, (n_in, n_out) in enumerate(zip(x.shape, outs, strict=True)):
        is_image = axis >= 2
        aligned = is_image and bool(flags & _ALIGN_CORNERS)
        factor = _F32((n_out - 1) / (n_in - 1)) if aligned and min(n_in, n_out) > 1 else _F32(n_out / n_in)
        matrix = _MATRICES[mode if is_image else _NEAREST]
        if mode == _BILINEAR and is_image and flags & _ANTIALIAS:
            matrix = _antialiased
        matrices.append(torch.from_numpy(matrix(n_in, n_out, factor, _F32(0.0 if aligned else 0.5))).double())
    return torch.einsum("abcd,ea,fb,gc,hd->efgh", x, *matrices)


def _nearest(n_in: int, n_out: int, factor: np.float32, _: np.float32) -> Floats:
    return _matrix(n_in, [np.trunc(np.arange(n_out, dtype=_F32) / factor)], [np.ones(n_out, _F32)])


def _bilinear(n_in: int, n_out: int, factor: np.float32, offset: np.float32) -> Floats:
    at = (np.arange(n_out, dtype=_F32) + offset) / factor - offset
    low = np.floor(at)
    share = np.clip(at - np.clip(low, 0, n_in - 1), 0, 1).astype(_F32)
    return _matrix(n_in, [low, low + 1], [1 - share, share])


def _bicubic(n_in: int, n_out: int, factor: np.float32, offset: np.float32) -> Floats:
    """Bicubic convolution with alpha = -0.75, as PyTorch has it."""
    at = (np.arange(n_out, dtype=_F32) + offset) / factor - offset
    low = np.floor(at)
    x, a = at - low, _F32(-0.75)

    def near(x: Floats) -> Floats:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: Floats) -> Floats:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return _matrix(n_in, [low - 1, low, low + 1, low + 2], [far(x + 1), near(x), near(1 - x), far(2 - x)])


def _antialiased(n_in: int, n_out: int, factor: np.float32, offset: np.float32) -> Floats:
    """A triangle as wide as the source pixels that fall on one target pixel, normalised inside of the image."""
    support = max(_F32(1.0), _F32(1.0) / factor)
    at = (np.arange(n_out, dtype=_F32)[:, None] + offset) / factor
    source = np.arange(n_in, dtype=_F32)
    low = np.trunc(np.maximum(at - support + offset, 0))
    high = np.minimum(np.trunc(at + support + offset), n_in)
    weights = np.maximum(1 - np.abs((source - at + offset) * (_F32(1.0) / support)), 0)
    weights = np.where((source >= low) & (source < high), weights, 0)
    total = weights.sum(1, keepdims=True)
    matrix: Floats = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return matrix


def _matrix(n_in: int, sources: list[Floats], weights: list[Floats]) -> Floats:
    """[n_out, n_in] with each output's weights at its sources; sources outside of the image are its border."""
    out = np.zeros((len(weights[0]), n_in), dtype=_F32)
    for source, weight in zip(sources, weights, strict=True):
        np.add.at(out, (np.arange(len(out)), np.clip(source, 0, n_in - 1).astype(np.int64)), weight)
    return out


_MATRICES: dict[int, Callable[[int, int, np.float32, np.float32], Floats]] = {
    _NEAREST: _nearest,
    _BILINEAR: _bilinear,
    _BICUBIC: _bicubic,
}


# -- windows and relative positions --------------------------------------------------------------------


def _win_part(call: Call) -> Tensor:
    """An image [1, rows, columns, channels], filled up with zeros, in square windows [n, w, w, channels] row by row."""
    x, (across, down, size) = call.x(0)[0], (call.i(i) for i in range(3))
    x = functional.pad(x, (0, 0, 0, across * size - x.shape[1], 0, down * size - x.shape[0]))
    return x.reshape(down, size, across, size, -1).permute(0, 2, 1, 3, 4)


def _win_unpart(call: Call) -> Tensor:
    """The reverse of WIN_PART: the windows put together, what was filled up cut off."""
    x, size = call.x(0), call.i(0)
    _, rows, columns, channels = call.node.out.shape
    across = math.ceil(columns / size)
    x = x[: math.ceil(rows / size) * across].reshape(-1, across, size, size, channels).permute(0, 2, 1, 3, 4)
    return x.reshape(-1, across * size, channels)[:rows, :columns]


def _get_rel_pos(call: Call) -> Tensor:
    """[1, n_q, n_k, channels]: query i and key j take row n_k - 1 - j + i of the table."""
    _, n_q, n_k, _ = call.node.out.shape
    return call.x(0)[0, 0][torch.arange(n_q)[:, None] + n_k - 1 - torch.arange(n_k)]


def _add_rel_pos(call: Call) -> Tensor:
    """Every query's scores of a square of keys, plus its term for the key's column (source 1) and row (source 2)."""
    by_column, by_row = call.x(1), call.x(2)
    n = by_row.shape[-1]
    return call.x(0).reshape(-1, n, n) + by_row.reshape(-1, n, 1) + by_column.reshape(-1, 1, n)


# -- time steps ----------------------------------------------------------------------------------------


def _timestep_embedding(call: Call) -> Tensor:
    """Cosines, then sines, of the time step times dim / 2 frequencies, from 1 down to 1 / max_period.

    An odd dim ends in a zero. The angle is taken in float32, as ggml does: at step 1000 its rounding shows in the
    sixth digit.
    """
    steps, dim, max_period = call.x(0).reshape(-1).numpy(), call.i(0), call.i(1)
    half = dim // 2
    powers = -np.log(_F32(max_period)) * np.arange(half, dtype=_F32) / _F32(half)
    angles = torch.from_numpy(steps[:, None] * np.exp(powers)).double()
    return functional.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


KERNELS: dict[str, Kernel] = {
    "UPSCALE": _upscale,
    "WIN_PART": _win_part,
    "WIN_UNPART": _win_unpart,
    "GET_REL_POS": _get_rel_pos,
    "ADD_REL_POS": _add_rel_pos,
    "TIMESTEP_EMBEDDING": _timestep_embedding,
}
