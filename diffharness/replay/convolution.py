"""Convolutions and their parts: patches, products with a filter, the transposed forms, pooling.

By the definitions in ggml.h and ggml-cpu/ops.cpp. ggml's dimension 0 (width) is the last axis here, and its op_params
name width first. Products are summed in float64. What occurs in training only (IM2COL_BACK, POOL_2D_BACK) is ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from diffharness.errors import EngineError
from diffharness.replay.call import Call, Kernel

_LOWEST = float(torch.finfo(torch.float32).min)  # what a maximum begins with: the result of padding, and of -inf
_POOL_MAX, _POOL_AVG = 0, 1  # enum ggml_op_pool


@dataclass(frozen=True)
class _Axis:
    """How `n_out` windows of `size` lie along one axis of the input."""

    size: int
    n_out: int
    stride: int
    pad: int
    dilation: int = 1


def _windows(x: Tensor, axes: Sequence[_Axis], fill: float = 0.0) -> Tensor:
    """The last axes of x in windows [..., n_out of each axis, size of each axis], with `fill` outside of x."""
    n_axes = len(axes)
    padding = []
    for axis, n_in in zip(reversed(axes), reversed(x.shape), strict=False):
        end = (axis.n_out - 1) * axis.stride + (axis.size - 1) * axis.dilation + 1
        padding += [axis.pad, max(0, end - axis.pad - n_in)]
    x = functional.pad(x, padding, value=fill)
    first = x.ndim - n_axes
    for i, axis in enumerate(axes):
        x = x.unfold(first + i, (axis.size - 1) * axis.dilation + 1, axis.stride)[..., :: axis.dilation]
        x = x.narrow(first + i, 0, axis.n_out)
    return x


def _axes(call: Call, sizes: Sequence[int], n_outs: Sequence[int]) -> list[_Axis]:
    """Axes with the strides, paddings and dilations of op_params; `sizes` and `n_outs` slowest axis first."""
    n = len(sizes)
    stride, pad, dilation = ([call.i(n * group + i) for i in reversed(range(n))] for group in range(3))
    return [_Axis(*each) for each in zip(sizes, n_outs, stride, pad, dilation, strict=True)]


def _as_filter(call: Call, x: Tensor) -> Tensor:
    """The input as ggml multiplies it: rounded to F16 where the filter, source 0, is F16."""
    return (x.half() if call.value(0).type == "F16" else x).double()


def _split(x: Tensor, n_channels: int) -> Tensor:
    """[n · channels, ...] as [n, channels, ...]."""
    return x.reshape(-1, n_channels, *x.shape[1:])


# -- patches -------------------------------------------------------------------------------------------


def _im2col(call: Call) -> Tensor:
    """[n, OH, OW, IC · KH · KW] of an input [n, IC, IH, IW]; the one-dimensional form lacks the rows.

    The filter [OC, IC, KH, KW] only lends its shape.
    """
    x, (_, _, n_rows, width), out = call.x(1), call.value(0).shape, call.node.out.shape
    is_2d = call.i(6) == 1
    if not is_2d:  # [1, n, IC, IW], out [1, n, OW, IC KW]
        axis = _Axis(width, out[2], call.i(0), call.i(2), call.i(4))
        return _windows(x[0], [axis]).permute(0, 2, 1, 3)
    return _windows(x, _axes(call, (n_rows, width), out[1:3])).permute(0, 2, 3, 1, 4, 5)


def _im2col_3d(call: Call) -> Tensor:
    """[n · OD, OH, OW, IC · KD · KH · KW] of an input [n · IC, ID, IH, IW]."""
    x = _split(call.x(1), call.i(9))
    n_outs = (call.node.out.shape[0] // len(x), *call.node.out.shape[1:3])
    return _windows(x, _axes(call, call.value(0).shape[1:], n_outs)).permute(0, 2, 3, 4, 1, 5, 6, 7)


def _col2im_1d(call: Call) -> Tensor:
    """[OC, T_out] of columns [T_in, OC · K]: column t is added from position t · stride on; the padding is cut off."""
    columns, (stride, n_channels, pad) = call.x(0)[0, 0].double(), (call.i(i) for i in range(3))
    columns = columns.reshape(len(columns), n_channels, -1).permute(1, 2, 0)  # [OC, K, T_in]
    n_out = (columns.shape[2] - 1) * stride + columns.shape[1]
    whole = functional.fold(columns, (1, n_out), (1, columns.shape[1]), stride=(1, stride))
    return whole[:, 0, 0, pad : pad + call.node.out.shape[3]]


# -- products with a filter ----------------------------------------------------------------------------


def _conv_2d(call: Call) -> Tensor:
    """[n, OC, OH, OW] of a filter [OC, IC, KH, KW] and an input [n, IC, IH, IW]."""
    weight = call.x(0).double()
    windows = _windows(_as_filter(call, call.x(1)), _axes(call, weight.shape[2:], call.node.out.shape[2:]))
    return torch.einsum("nchwij,ocij->nohw", windows, weight)


def _conv_3d(call: Call) -> Tensor:
    """[n · OC, OD, OH, OW] of a filter [OC · IC, KD, KH, KW] and an input [n · IC, ID, IH, IW]."""
    weight, x = _split(call.x(0).double(), call.i(9)), _split(_as_filter(call, call.x(1)), call.i(9))
    windows = _windows(x, _axes(call, weight.shape[2:], call.node.out.shape[1:]))
    return torch.einsum("ncdhwijk,ocijk->nodhw", windows, weight)


def _conv_2d_dw(call: Call) -> Tensor:
    """Every channel with a filter of its own [C, 1, KH, KW]; the input is never rounded here."""
    weight = call.x(0).double()
    windows = _windows(call.x(1).double(), _axes(call, weight.shape[2:], call.node.out.shape[2:]))
    return torch.einsum("nchwij,cij->nchw", windows, weight[:, 0])


def _conv_transpose_1d(call: Call) -> Tensor:
    """[OC, (T - 1) · stride + K] of a filter [IC, OC, K] and an input [IC, T]."""
    return functional.conv_transpose1d(_as_filter(call, call.x(1)[0]), call.x(0)[0].double(), stride=call.i(0))


def _conv_transpose_2d(call: Call) -> Tensor:
    """[n, OC, ...] of a filter [IC, OC, KH, KW] and an input [n, IC, IH, IW], the stride the same in both axes."""
    return functional.conv_transpose2d(_as_filter(call, call.x(1)), call.x(0).double(), stride=call.i(0))


# -- pooling -------------------------------------------------------------------------------------------


def _pool_1d(call: Call) -> Tensor:
    """Along rows; an average is over what lies inside of the row."""
    axis = _Axis(call.i(1), call.node.out.shape[3], call.i(2), call.i(3))
    if call.i(0) == _POOL_MAX:
        return _windows(call.x(0), [axis], fill=_LOWEST).amax(-1).clamp(min=_LOWEST)
    x = call.x(0).double()
    n_inside = _windows(torch.ones_like(x), [axis]).sum(-1)
    return _windows(x, [axis]).sum(-1) / n_inside.clamp(min=1)


def _pool_2d(call: Call) -> Tensor:
    """Over the last two axes; an average is over the whole window, its padding included."""
    rows, columns = call.node.out.shape[2:]
    axes = [_Axis(call.i(2), rows, call.i(4), call.i(6)), _Axis(call.i(1), columns, call.i(3), call.i(5))]
    if call.i(0) == _POOL_MAX:
        return _windows(call.x(0), axes, fill=_LOWEST).amax((-2, -1)).clamp(min=_LOWEST)
    if call.i(0) != _POOL_AVG:
        raise EngineError(f"node {call.node.name} pools by an unknown function {call.i(0)}")
    return _windows(call.x(0).double(), axes).mean((-2, -1))


KERNELS: dict[str, Kernel] = {
    "IM2COL": _im2col,
    "IM2COL_3D": _im2col_3d,
    "COL2IM_1D": _col2im_1d,
    "CONV_2D": _conv_2d,
    "CONV_3D": _conv_3d,
    "CONV_2D_DW": _conv_2d_dw,
    "CONV_TRANSPOSE_1D": _conv_transpose_1d,
    "CONV_TRANSPOSE_2D": _conv_transpose_2d,
    "POOL_1D": _pool_1d,
    "POOL_2D": _pool_2d,
}
