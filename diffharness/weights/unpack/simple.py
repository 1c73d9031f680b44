"""Layouts of the types whose values have one scale (and minimum) to 16 to 128 of them, and of the 16-bit floats.

Arrangement of bits and order of float operations are ggml's (ggml-common.h, `dequantize_row_*` in ggml-quants.c):
these define the types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import gguf
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from diffharness.weights.unpack.vector import Block, Vector

Layout = Callable[["Block"], None]

LUMP = 32

IQ4: tuple[int, ...] = tuple(gguf.quants.IQ4_NL.kvalues)
_FP4: tuple[int, ...] = tuple(gguf.quants.MXFP4.kvalues)  # twice the values of E2M1

# Half of 2^(byte - 127), which makes up for the doubled values. The two lowest are denormal; 255 is no NaN here.
_E8M0 = np.ldexp(np.float32(1), np.arange(256) - 128).astype(np.float32)


def _halved_ue4m3() -> NDArray[np.float32]:
    """Half of each E4M3 with bias 7; of its codes only 127 is no number, for which ggml takes 0."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    values = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8.0 + mantissa, exponent - 10)) / 2
    values[127] = 0
    return np.asarray(values, dtype=np.float32)


_UE4M3 = _halved_ue4m3()


def nibbles(packed: Vector) -> Vector:
    """All the low halves of bytes, then all the high ones."""
    return (packed & 15).join(packed >> 4)


def q1_0(b: Block) -> None:
    d = b.half(0)
    for part in range(4):
        b.put(32 * part, (b.bits(2 + 4 * part, 32) * 2 - 1).floats() * d)


def q4_0(b: Block) -> None:
    b.put(0, (nibbles(b.bytes(2, 16)) - 8).floats() * b.half(0))


def q4_1(b: Block) -> None:
    b.put(0, nibbles(b.bytes(4, 16)).floats() * b.half(0) + b.half(2))


def q5_0(b: Block) -> None:
    q = nibbles(b.bytes(6, 16)) | (b.bits(2, 32) << 4)
    b.put(0, (q - 16).floats() * b.half(0))


def q5_1(b: Block) -> None:
    q = nibbles(b.bytes(8, 16)) | (b.bits(4, 32) << 4)
    b.put(0, q.floats() * b.half(0) + b.half(2))


def q8_0(b: Block) -> None:
    b.put(0, b.bytes(2, 32).floats() * b.half(0))


def iq4_nl(b: Block) -> None:
    b.put(0, nibbles(b.bytes(2, 16)).coded(IQ4).floats() * b.half(0))


def mxfp4(b: Block) -> None:
    d = b.entry(_E8M0, b.word(0))
    b.put(0, nibbles(b.bytes(1, 16)).coded(_FP4).floats() * d)


def nvfp4(b: Block) -> None:
    for part in range(4):
        q = nibbles(b.bytes(4 + 8 * part, 8)).coded(_FP4)
        b.put(16 * part, q.floats() * b.entry(_UE4M3, b.word(part)))


def f16(b: Block) -> None:
    b.put(0, b.from_half(b.words(0, LUMP)))


def bf16(b: Block) -> None:
    b.put(0, b.from_bfloat(b.words(0, LUMP)))


# Types without blocks, so many values at a time.
LUMPED: dict[str, Layout] = {"F16": f16, "BF16": bf16}

LAYOUTS: dict[str, Layout] = {
    "Q1_0": q1_0,
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "IQ4_NL": iq4_nl,
    "MXFP4": mxfp4,
    "NVFP4": nvfp4,
}
