"""Layouts of the K types, IQ4_XS and the ternary types: blocks of 256 values, most with scales of their own inside.

Arrangement of bits and order of float operations are ggml's (ggml-common.h, `dequantize_row_*` in ggml-quants.c):
these define the types. Values lie in rows of 32; unless a layout says otherwise, neighbouring bytes are neighbouring
values and the fields of one byte belong to different rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffharness.weights.unpack.simple import IQ4, Layout, nibbles

if TYPE_CHECKING:
    from diffharness.weights.unpack.vector import Block, Vector


def q2_k(b: Block) -> None:
    packed = b.bytes(0, 16)  # a scale and a minimum for every 16 values
    scale, minimum = (packed & 15).floats() * b.half(80), (packed >> 4).floats() * b.half(82)
    for row in range(8):
        q = (b.bytes(16 + 32 * (row // 4), 32) >> (2 * (row % 4))) & 3
        halves = 2 * row, 2 * row + 1
        b.put(32 * row, scale.spread(16, *halves) * q.floats() - minimum.spread(16, *halves))


def q3_k(b: Block) -> None:
    low, high = b.bytes(96, 8), b.bytes(104, 4)  # of 16 scales: 4 bits each, then 2
    top = high.pick([0, 1, 2, 3] * 4) >> [2 * (i // 4) for i in range(16)]
    scale = (((nibbles(low) | ((top & 3) << 4)) - 32).floats()) * b.half(108)
    third = b.bytes(0, 32)  # bit i of these is the upper bit of row i; where it is unset, 4 is taken off
    for row in range(8):
        q = (b.bytes(32 + 32 * (row // 4), 32) >> (2 * (row % 4))) & 3
        signed = (q | (((third >> row) & 1) << 2)) - 4
        b.put(32 * row, scale.spread(16, 2 * row, 2 * row + 1) * signed.floats())


def _k_scales(b: Block) -> tuple[Vector, Vector]:
    """Scales and minima of the 8 rows of Q4_K and Q5_K: two float16, then 8 + 8 integers of 6 bits in 12 bytes.

    The first four of each lie in the low 6 bits of bytes 0-3 and 4-7; the last four have their low nibbles in
    bytes 8-11 and their two high bits on top of bytes 0-3 and 4-7.
    """
    first, second, last = b.bytes(4, 4), b.bytes(8, 4), b.bytes(12, 4)
    scale = (first & 63).join((last & 15) | ((first >> 2) & 48))
    minimum = (second & 63).join((last >> 4) | ((second >> 2) & 48))
    return scale.floats() * b.half(0), minimum.floats() * b.half(2)


def q4_k(b: Block) -> None:
    scale, minimum = _k_scales(b)
    for row in range(8):
        q = (b.bytes(16 + 32 * (row // 2), 32) >> (4 * (row % 2))) & 15
        b.put(32 * row, scale[row] * q.floats() - minimum[row])


def q5_k(b: Block) -> None:
    scale, minimum = _k_scales(b)
    fifth = b.bytes(16, 32)
    for row in range(8):
        q = (b.bytes(48 + 32 * (row // 2), 32) >> (4 * (row % 2))) & 15
        b.put(32 * row, scale[row] * (q | (((fifth >> row) & 1) << 4)).floats() - minimum[row])


def q6_k(b: Block) -> None:
    scale = b.bytes(192, 16).floats() * b.half(208)
    for row in range(8):
        half, part = divmod(row, 4)
        low = (b.bytes(64 * half + 32 * (part % 2), 32) >> (4 * (part // 2))) & 15
        high = (b.bytes(128 + 32 * half, 32) >> (2 * part)) & 3
        b.put(32 * row, scale.spread(16, 2 * row, 2 * row + 1) * ((low | (high << 4)) - 32).floats())


def iq4_xs(b: Block) -> None:
    packed = b.bytes(4, 4)
    low = nibbles(packed).pick([0, 4, 1, 5, 2, 6, 3, 7])
    high = (b.bytes(2, 2).spread(4, 0, 1) >> [0, 2, 4, 6] * 2) & 3
    scale = ((low | (high << 4)) - 32).floats() * b.half(0)
    for row in range(8):
        b.put(32 * row, scale[row] * nibbles(b.bytes(8 + 16 * row, 16)).coded(IQ4).floats())


def tq1_0(b: Block) -> None:
    """Five digits of base 3 in a byte, as a fraction of 256: each is what three times the rest carries over."""
    d = b.half(52)
    for first, count, start, digits in ((0, 32, 0, 5), (32, 16, 160, 5), (48, 4, 240, 4)):
        rest = b.bytes(first, count)
        for digit in range(digits):
            carry = (rest.widened(16) * 3) >> 8
            b.put(start + count * digit, (carry - 1).floats() * d)
            rest = rest * 3


def tq2_0(b: Block) -> None:
    d = b.half(64)
    for row in range(8):
        q = (b.bytes(32 * (row // 4), 32) >> (2 * (row % 4))) & 3
        b.put(32 * row, (q - 1).floats() * d)


LAYOUTS: dict[str, Layout] = {
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "IQ4_XS": iq4_xs,
    "TQ1_0": tq1_0,
    "TQ2_0": tq2_0,
}
