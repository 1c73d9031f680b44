"""Element by element: sums and products with ggml's broadcasting, functions of one value, sums along rows.

By the definitions in ggml.h, ggml-cpu/binary-ops.cpp, unary-ops.cpp and vec.h. Float32 as there; where ggml's formula
loses digits (`exp(x) - 1`, `log(1 + exp(x))`, the tails of GELU) the same steps are taken, each rounded to float32.
GELU and quick GELU of F32 and F16 go through ggml's table: its index is the argument as float16, its entry a float16.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from diffharness.replay.call import Call, Kernel

INTEGERS = frozenset({"I8", "I16", "I32", "I64"})
_SQRT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_SQRT_HALF = math.sqrt(0.5)


def values(call: Call, i: int) -> Tensor:
    """Source i [ne3, ne2, ne1, ne0] as it is: int64 of integers, float32 of everything else."""
    return call.ints(i) if call.value(i).type in INTEGERS else call.x(i)


def repeated(x: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """x repeated along every axis until it has `shape`: ggml's broadcasting, where 2 of 6 stands for 2 2 2."""
    times = [wide // narrow for wide, narrow in zip(shape, x.shape, strict=True)]
    if all(narrow in (1, wide) for wide, narrow in zip(shape, x.shape, strict=True)):
        return x.expand(shape)
    return x.repeat(times)


# -- two arguments -------------------------------------------------------------------------------------


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Kernel:
    def kernel(call: Call) -> Tensor:
        x = call.x(0)
        return function(x, repeated(call.x(1), x.shape))

    return kernel


def _add_id(call: Call) -> Tensor:
    """To row i1 of token i2 the row of src1 that ids [.., i2, i1] names: an expert's bias."""
    x, ids = call.x(0), call.ints(2)[0, 0]
    return x + call.x(1)[0, 0][ids[: x.shape[1], : x.shape[2]]]


def _add1(call: Call) -> Tensor:
    return call.x(0) + call.x(1).reshape(-1)[0]


# -- functions of one value ----------------------------------------------------------------------------


def _rounded(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`function` in float64, its result rounded to float32: what libm gives but for a last bit in a thousand."""
    return lambda x: function(x.double()).float()


_exp, _log, _tanh, _expm1, _erf = (_rounded(f) for f in (torch.exp, torch.log, torch.tanh, torch.expm1, torch.erf))


def gelu_plain(x: Tensor) -> Tensor:
    """GELU's tanh form in float32, step by step (`ggml_gelu_f32`).

    The polynomial is fused, as compilers do it for x86 and ARM; without that one entry of the table is the next one.
    """
    cubic = (1.0 + (x * 0.044715).double() * x.double()).float()
    inner = x * _SQRT_2_OVER_PI * cubic
    return 0.5 * x * (1.0 + _tanh(inner))


def gelu_quick_plain(x: Tensor) -> Tensor:
    """x / (1 + exp(-1.702 x)) in float32 (`ggml_gelu_quick_f32`)."""
    return x * (1.0 / (1.0 + _exp(x * -1.702)))


def gelu_erf(x: Tensor) -> Tensor:
    """GELU in its erf form."""
    return 0.5 * x * (1.0 + _erf(x * _SQRT_HALF))


def through_table(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`function` as a table of ggml's gives it: argument and result as float16."""
    return lambda x: function(x.half().float()).half().float()


def _gelu_table(x: Tensor) -> Tensor:
    """The table within ±10, beyond it 0 and x itself, unrounded."""
    entry = through_table(gelu_plain)(x)
    return torch.where(x <= -10.0, torch.zeros_like(x), torch.where(x >= 10.0, x, entry))


# By the type of the argument; F16 reads the table without the two limits, BF16 has no table.
GELU = {"F32": _gelu_table, "F16": through_table(gelu_plain)}
GELU_QUICK = {"F32": through_table(gelu_quick_plain), "F16": through_table(gelu_quick_plain)}


def silu(x: Tensor) -> Tensor:
    """x / (1 + exp(-x))."""
    return torch.nn.functional.silu(x)


def _hard_sigmoid(x: Tensor) -> Tensor:
    return ((x + 3.0) / 6.0).clamp(0.0, 1.0)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) in float32 steps; x itself above 20."""
    return torch.where(x > 20.0, x, _log(1.0 + _exp(x)))


def _round(x: Tensor) -> Tensor:
    """To the nearest integer, halves away from zero; torch rounds them to even."""
    wide = x.double()
    return torch.trunc(wide + torch.copysign(torch.full_like(wide, 0.5), wide)).float()


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "ABS": torch.abs,
    "SGN": torch.sgn,
    "NEG": torch.neg,
    "STEP": lambda x: (x > 0).float(),
    "TANH": torch.tanh,
    "ELU": lambda x: torch.where(x > 0, x, _expm1(x)),
    "RELU": torch.relu,
    "SIGMOID": lambda x: 1.0 / (1.0 + torch.exp(-x)),
    "GELU_ERF": gelu_erf,
    "SILU": silu,
    "HARDSWISH": lambda x: x * _hard_sigmoid(x),
    "HARDSIGMOID": _hard_sigmoid,
    "EXP": torch.exp,
    "EXPM1": lambda x: _exp(x) - 1.0,
    "SOFTPLUS": softplus,
    "FLOOR": torch.floor,
    "CEIL": torch.ceil,
    "ROUND": _round,
    "TRUNC": torch.trunc,
    "SQR": torch.square,
    "SQRT": torch.sqrt,
    "LOG": torch.log,
    "SIN": _rounded(torch.sin),
    "COS": _rounded(torch.cos),
}


def _unary(function: Callable[[Tensor], Tensor]) -> Kernel:
    return lambda call: function(call.x(0))


def _gelu(call: Call) -> Tensor:
    return GELU.get(call.value(0).type, gelu_plain)(call.x(0))


def _gelu_quick(call: Call) -> Tensor:
    return GELU_QUICK.get(call.value(0).type, gelu_quick_plain)(call.x(0))


def _xielu(call: Call) -> Tensor:
    """alpha_p x² + beta x above zero, alpha_n (expm1(min(x, eps)) - x) + beta x below; from op_params[1] on."""
    x, alpha_n, alpha_p, beta, eps = call.x(0), call.f(1), call.f(2), call.f(3), call.f(4)
    below = (_expm1(x.clamp(max=eps)) - x) * alpha_n + beta * x
    return torch.where(x > 0, alpha_p * x * x + beta * x, below)


def _leaky_relu(call: Call) -> Tensor:
    x = call.x(0)
    return torch.where(x > 0, x, x * call.f(0))


def _scale(call: Call) -> Tensor:
    return call.x(0) * call.f(0) + call.f(1)


def _clamp(call: Call) -> Tensor:
    return call.x(0).clamp(max=call.f(1)).clamp(min=call.f(0))


# -- made from parameters ------------------------------------------------------------------------------


def _fill(call: Call) -> Tensor:
    return torch.full(call.node.out.shape, call.f(0))


def _arange(call: Call) -> Tensor:
    start, stop, step = (np.float32(call.f(i)) for i in range(3))
    n = math.ceil((stop - start) / step)
    return torch.from_numpy(start + step * np.arange(n, dtype=np.float32))


# -- along rows ----------------------------------------------------------------------------------------


def _sum(call: Call) -> Tensor:
    return call.x(0).sum(dtype=torch.float64).reshape(1)


def _sum_rows(call: Call) -> Tensor:
    return call.x(0).sum(-1, dtype=torch.float64)


def _mean(call: Call) -> Tensor:
    return call.x(0).mean(-1, dtype=torch.float64)


def _cumsum(call: Call) -> Tensor:
    """Each sum from the one before, in float32."""
    return torch.from_numpy(np.cumsum(call.x(0).numpy(), axis=-1, dtype=np.float32))


def _count_equal(call: Call) -> Tensor:
    return (call.ints(0) == call.ints(1)).sum().reshape(1)


KERNELS: dict[str, Kernel] = {
    "ADD": _binary(torch.add),
    "ADD1": _add1,
    "ADD_ID": _add_id,
    "SUB": _binary(torch.sub),
    "MUL": _binary(torch.mul),
    "DIV": _binary(torch.div),
    **{op: _unary(function) for op, function in _UNARY.items()},
    "GELU": _gelu,
    "GELU_QUICK": _gelu_quick,
    "XIELU": _xielu,
    "LEAKY_RELU": _leaky_relu,
    "SCALE": _scale,
    "CLAMP": _clamp,
    "FILL": _fill,
    "ARANGE": _arange,
    "SUM": _sum,
    "SUM_ROWS": _sum_rows,
    "MEAN": _mean,
    "CUMSUM": _cumsum,
    "COUNT_EQUAL": _count_equal,
}
