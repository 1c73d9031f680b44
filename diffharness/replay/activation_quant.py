"""Activations as ggml's CPU backend holds them before a dot product, and keys and values as its cache holds them.

The arithmetic is ggml's, float32 operation by operation, so that codes and scales are the engine's own to the last
bit: an activation that lies on the boundary of two codes falls on the engine's side. What is returned are the values
that the codes stand for, not the codes.

The same codes have more than one honest arithmetic, since ggml's vector units differ (`ARITHMETICS`): x86 multiplies by
127/max, ARM and most others by the reciprocal of the scale, plain C rounds halves away from zero; a compiler may fuse
the product of a Q8_K code with its rounding. The first of each list is that of x86 builds, where tiles, tinyBLAS, AMX
and repacked weights all take the same. Any two of a list differ by one step in a few codes of a million, or of a
hundred where values lie on a coarse grid and are often halfway between two codes.

Of damaged inputs (NaN, infinities) only the kind is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffharness.weights.dequant import BLOCKS, byte_size

# The type to which ggml's CPU backend converts a float32 operand before its product with each type (ggml-cpu.c).
VEC_DOT_TYPE: dict[str, str] = {
    "F32": "F32",
    "F16": "F16",
    "BF16": "BF16",
    **dict.fromkeys(("Q1_0", "Q2_0", "Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "MXFP4", "NVFP4"), "Q8_0"),
    **dict.fromkeys(("Q4_1", "Q5_1"), "Q8_1"),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0"), "Q8_K"),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "Q8_K"),
}

MINIMA = {"Q4_1": 2, "Q5_1": 2}  # where the float16 minimum of a block of 32 lies

_BY_MAX, _BY_SCALE, _AWAY = "by 127/max", "by 1/scale", "by 1/scale, halves away from zero"
_PRODUCT, _FUSED = "product rounded", "product fused"
ARITHMETICS: dict[str, tuple[str, ...]] = {
    "Q8_0": (_BY_MAX, _BY_SCALE, _AWAY),
    "Q8_1": (_BY_MAX, _BY_SCALE, _AWAY),
    "Q8_K": (_PRODUCT, _FUSED),
}


def arithmetics(type_name: str) -> tuple[str, ...]:
    """The names of the honest ways to make values of the type, the usual one first; types with one way have ''."""
    return ARITHMETICS.get(type_name, ("",))


def rounded(x: Tensor, type_name: str, arithmetic: str | None = None) -> Tensor:
    """Rows [..., n] of real numbers as the type holds them, in x's own dtype; float64 is first rounded to float32.

    Of Q8_1 the values are scale times code; its separately stored sum, which is not that of the values, is in
    `excess`. Raises ValueError if n is not made of whole blocks, or for a type to which ggml converts no activations.
    """
    take = _ROUND.get(type_name)
    if take is None:
        raise ValueError(f"activations are never held as {type_name}; known are {', '.join(_ROUND)}")
    block = BLOCKS[type_name][0]
    if x.shape[-1] % block:
        raise ValueError(f"rows of {x.shape[-1]} elements are not made of whole {type_name} blocks of {block}")
    blocks = x.detach().to(torch.float32).reshape(-1, block)
    return take(blocks, arithmetic or arithmetics(type_name)[0]).reshape(x.shape).to(x.dtype)


def as_held(x: Tensor, held: str, arithmetic: str | None = None) -> Tensor:
    """Rows [..., n] as `rounded`; of Q8_1 with `excess` as n / 32 more columns, for `minima` of the other operand."""
    values = rounded(x, held, arithmetic)
    return torch.cat([values, excess(x, arithmetic).to(values)], dim=-1) if held == "Q8_1" else values


def minima(rows: NDArray[np.uint8], type_name: str) -> Tensor:
    """What the codes of each block of Q4_1 or Q5_1 are counted from: rows of bytes in, float32 [..., n / 32] out."""
    at = MINIMA[type_name]
    blocks = rows.reshape(*rows.shape[:-1], -1, byte_size(type_name, (32,)))[..., at : at + 2]
    return torch.from_numpy(np.ascontiguousarray(blocks).view(np.float16)[..., 0].astype(np.float32))


def excess(x: Tensor, arithmetic: str | None = None) -> Tensor:
    """By how much the sum that a Q8_1 block stores exceeds that of its values: float32 [..., n / 32].

    The minima of Q4_1 and Q5_1 blocks are multiplied by the stored sum: scale in float32, times the sum of the codes,
    rounded to float16; the codes are multiplied by the scale in float16.
    """
    blocks = x.detach().to(torch.float32).reshape(-1, 32)
    scale, codes = _eight_bit(blocks, arithmetic or _BY_MAX)
    n = codes.sum(dim=1, keepdim=True)  # of at most 32 * 127: exact
    return (_f16(scale * n).double() - _f16(scale).double() * n.double()).to(torch.float32).reshape(*x.shape[:-1], -1)


# ── plain numbers ────────────────────────────────────────────────────────────────────────────────


def _f16(x: Tensor) -> Tensor:
    return x.to(torch.float16).to(torch.float32)


def _divide(number: float, by: Tensor) -> Tensor:
    """number / by, zero where `by` is zero.

    A Python number divided by a tensor is the product with a reciprocal in torch, which rounds twice.
    """
    return torch.where(by == 0, 0.0, torch.full_like(by, number) / by)


# ── blocks [n, 32] or [n, 256] of activations ────────────────────────────────────────────────────


def _eight_bit(blocks: Tensor, arithmetic: str) -> tuple[Tensor, Tensor]:
    """The float32 scale [n, 1] and the codes [n, 32] of Q8_0 and Q8_1."""
    largest = blocks.abs().amax(dim=1, keepdim=True)
    scale = largest / torch.full_like(largest, 127.0)
    factor = _divide(127.0, largest) if arithmetic == _BY_MAX else _divide(1.0, scale)
    scaled = blocks * factor
    if arithmetic == _AWAY:
        return scale, torch.trunc(scaled.double() + 0.5 * scaled.sign()).float()
    return scale, torch.round(scaled)


def _q8_0(blocks: Tensor, arithmetic: str) -> Tensor:
    scale, codes = _eight_bit(blocks, arithmetic)
    return _f16(scale) * codes


def _q8_k(blocks: Tensor, arithmetic: str) -> Tensor:
    """The scale is a float32, the reciprocal of -127 / (the value of largest magnitude, with its sign)."""
    inverse = _divide(-127.0, _largest(blocks))
    if arithmetic == _FUSED:
        codes = torch.round(blocks.double() * inverse.double()).float()  # 24 + 24 bits: the product is exact
    else:
        codes = torch.round(blocks * inverse)
    return _divide(1.0, inverse) * codes


def _largest(blocks: Tensor) -> Tensor:
    """The value of largest magnitude of each block with its sign, the first one of equals: [n, 1]."""
    return blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))


# ── types of the KV cache: ggml's reference quantizers ───────────────────────────────────────────


def _signed(levels: int) -> Callable[[Tensor, str], Tensor]:
    """Q4_0 and Q5_0: the value of largest magnitude becomes the code 0, which stands for -levels / 2."""
    middle = levels // 2

    def take(blocks: Tensor, _: str) -> Tensor:
        largest = _largest(blocks)
        scale = largest / torch.full_like(largest, -float(middle))
        codes = torch.trunc(blocks * _divide(1.0, scale) + (middle + 0.5)).clamp_(max=levels - 1)
        return _f16(scale) * (codes - middle)

    return take


def _with_minimum(levels: int) -> Callable[[Tensor, str], Tensor]:
    """Q4_1 and Q5_1."""

    def take(blocks: Tensor, _: str) -> Tensor:
        minimum = blocks.amin(dim=1, keepdim=True)
        span = blocks.amax(dim=1, keepdim=True) - minimum
        scale = span / torch.full_like(span, levels - 1.0)
        codes = torch.trunc((blocks - minimum) * _divide(1.0, scale) + 0.5).clamp_(max=levels - 1)
        return _f16(scale) * codes + _f16(minimum)

    return take


def _iq4_nl(blocks: Tensor, _: str) -> Tensor:
    """Codes for the scale that maps the largest value to the end of the table, then the best scale for these codes."""
    table = torch.tensor(gguf.quants.IQ4_NL.kvalues, dtype=torch.float32, device=blocks.device)
    largest = _largest(blocks)
    scaled = blocks * _divide(1.0, largest / torch.full_like(largest, float(table[0])))
    above = torch.searchsorted(table, scaled.contiguous(), right=True).clamp_(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    values = torch.where(scaled - low < high - scaled, low, high)
    weighted = blocks * blocks * values
    terms, squares = weighted * blocks, weighted * values
    dot, norm = torch.zeros_like(largest), torch.zeros_like(largest)
    for i in range(blocks.shape[1]):  # summed one by one, as there: the order decides the last bit
        dot += terms[:, i : i + 1]
        norm += squares[:, i : i + 1]
    scale = torch.where((norm > 0) & (largest.abs() >= _EPSILON), dot / norm, 0.0)
    return _f16(scale) * values


_EPSILON = 1e-15  # below this ggml takes a block of IQ4_NL for zeros

_ROUND: dict[str, Callable[[Tensor, str], Tensor]] = {
    "F32": lambda x, _: x,
    "F16": lambda x, _: _f16(x),
    "BF16": lambda x, _: x.to(torch.bfloat16).to(torch.float32),
    "Q8_0": _q8_0,
    "Q8_1": _q8_0,
    "Q8_K": _q8_k,
    "Q4_0": _signed(16),
    "Q5_0": _signed(32),
    "Q4_1": _with_minimum(16),
    "Q5_1": _with_minimum(32),
    "IQ4_NL": _iq4_nl,
}
