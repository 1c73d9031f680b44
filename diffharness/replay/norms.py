"""Norms over rows or groups of channels, without weights: those are MUL nodes of their own.

As ggml-cpu/ops.cpp has them: squares in float32, their sums in float64, the factor a float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffharness.replay.call import Call, Kernel


def _rms_norm(call: Call) -> Tensor:
    """x / sqrt(mean(x²) + eps)."""
    x = call.x(0)
    return x * _factor(x.square().mean(-1, keepdim=True, dtype=torch.float64).float(), call.f(0))


def _norm(call: Call) -> Tensor:
    """(x - mean) / sqrt(variance + eps), the variance that of the whole population."""
    x = call.x(0)
    x = x - x.mean(-1, keepdim=True, dtype=torch.float64).float()
    return x * _factor(x.square().mean(-1, keepdim=True, dtype=torch.float64).float(), call.f(0))


def _l2_norm(call: Call) -> Tensor:
    """x / max(|x|, eps)."""
    x = call.x(0)
    length = x.square().sum(-1, keepdim=True, dtype=torch.float64).sqrt().float()
    return x * (1.0 / length.clamp(min=call.f(0)))


def _group_norm(call: Call) -> Tensor:
    """`_norm` over groups of neighbouring channels (axis ne2) and all their positions; the last may be smaller."""
    x = call.x(0)
    n_groups, eps = call.i(0), call.f(1)
    width = -(-x.shape[1] // n_groups)
    out = []
    for group in torch.split(x, width, dim=1):
        centred = group - group.mean((1, 2, 3), keepdim=True, dtype=torch.float64).float()
        out.append(centred * _factor(centred.square().mean((1, 2, 3), keepdim=True, dtype=torch.float64).float(), eps))
    return torch.cat(out, dim=1)


def _factor(mean_square: Tensor, eps: float) -> Tensor:
    return 1.0 / torch.sqrt(mean_square + eps)


KERNELS: dict[str, Kernel] = {
    "RMS_NORM": _rms_norm,
    "NORM": _norm,
    "L2_NORM": _l2_norm,
    "GROUP_NORM": _group_norm,
}
