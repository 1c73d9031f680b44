"""Gated units: a function of the gate times the other half.

Either one tensor whose rows hold both halves, gate first unless op_params[1] (`swapped`) is set, or two sources of the
same shape, of which the first is the gate (ggml.h, `ggml_glu_op`; ggml-cpu/ops.cpp and vec.h).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffharness.replay.call import Call, Kernel
from diffharness.replay.elementwise import GELU, GELU_QUICK, gelu_erf, gelu_plain, gelu_quick_plain, silu

_SWAPPED, _ALPHA, _LIMIT = 1, 2, 3  # places in op_params; the first is the function itself


def _halves(call: Call) -> tuple[Tensor, Tensor]:
    """The gate and what it is multiplied with."""
    x = call.x(0)
    if call.has(1):
        return x, call.x(1)
    first, second = x.chunk(2, dim=-1)
    return (second, first) if call.i(_SWAPPED) else (first, second)


def _gated(function: Callable[[Tensor], Tensor]) -> Kernel:
    def kernel(call: Call) -> Tensor:
        gate, up = _halves(call)
        return function(gate) * up

    return kernel


def _gated_by_type(table: dict[str, Callable[[Tensor], Tensor]], plain: Callable[[Tensor], Tensor]) -> Kernel:
    def kernel(call: Call) -> Tensor:
        gate, up = _halves(call)
        return table.get(call.value(0).type, plain)(gate) * up

    return kernel


def _swiglu_oai(call: Call) -> Tensor:
    """gate · sigmoid(alpha · gate) · (up + 1), the gate cut above `limit`, the other half on both sides."""
    gate, up = _halves(call)
    limit = call.f(_LIMIT)
    gate = gate.clamp(max=limit)
    return gate / (1.0 + torch.exp(call.f(_ALPHA) * -gate)) * (up.clamp(-limit, limit) + 1.0)


def _swiglu_clamp(call: Call) -> Tensor:
    gate, up = _halves(call)
    limit = call.f(_LIMIT)
    return silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


KERNELS: dict[str, Kernel] = {
    "REGLU": _gated(torch.relu),
    "GEGLU": _gated_by_type(GELU, gelu_plain),
    "SWIGLU": _gated(silu),
    "SWIGLU_OAI": _swiglu_oai,
    "GEGLU_ERF": _gated(gelu_erf),
    "GEGLU_QUICK": _gated_by_type(GELU_QUICK, gelu_quick_plain),
    "SWIGLU_CLAMP": _swiglu_clamp,
}
