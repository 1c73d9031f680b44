"""Layouts of the types IQ1 to IQ3: blocks of 256 values that are rows of fixed tables, found by an index.

The tables (the grids, and the signs of 7 bits that stand for 8) are gguf-py's. Arrangement of bits and order of
float operations are ggml's (ggml-common.h, `dequantize_row_*` in ggml-quants.c): these define the types.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import gguf
import numpy as np
from numpy.typing import NDArray

from diffharness.weights.unpack.simple import Layout

if TYPE_CHECKING:
    from diffharness.weights.unpack.vector import Block, Vector

# An even number of minus signs is stored without the eighth.
_SIGNS = np.frombuffer(gguf.quants.IQ2_XXS.ksigns, dtype=np.uint8)


@cache
def _grid(type_name: str) -> NDArray[np.int8]:
    """The table of a type, [entries, 8 or 4 values]."""
    quant = getattr(gguf.quants, type_name)
    quant.init_grid()
    return np.asarray(quant.grid, dtype=np.int8).reshape(quant.grid_shape)


def _signed(b: Block, values: Vector, signs: Vector) -> Vector:
    """Eight floats, negative where the bit of the byte `signs` is set."""
    return values.negated().where(b.flags(signs), values)


def _eight_signs(b: Block, index: Vector) -> Vector:
    return b.entry(_SIGNS, index & 127)[0]


def iq2_xxs(b: Block) -> None:
    d, grid = b.half(0), _grid("IQ2_XXS")
    for row in range(8):
        at = 2 + 8 * row
        word = b.word(at + 4, 32)  # four times 7 bits of signs, 4 bits of scale
        scale = d * ((word >> 28).floats() + 0.5) * 0.25
        for part in range(4):
            values = scale * b.entry(grid, b.word(at + part)).floats()
            b.put(32 * row + 8 * part, _signed(b, values, _eight_signs(b, word >> (7 * part))))


def iq2_xs(b: Block) -> None:
    d, grid = b.half(0), _grid("IQ2_XS")
    for row in range(8):
        for part in range(4):
            scale = d * (((b.word(66 + row) >> (4 * (part // 2))) & 15).floats() + 0.5) * 0.25
            word = b.word(2 + 2 * (4 * row + part), 16)
            values = scale * b.entry(grid, word & 511).floats()
            b.put(32 * row + 8 * part, _signed(b, values, _eight_signs(b, word >> 9)))


def iq2_s(b: Block) -> None:
    d, grid = b.half(0), _grid("IQ2_S")
    for row in range(8):
        upper = b.word(66 + row).widened(16)
        for part in range(4):
            scale = d * (((b.word(74 + row) >> (4 * (part // 2))) & 15).floats() + 0.5) * 0.25
            index = b.word(2 + 4 * row + part).widened(16) | (((upper >> (2 * part)) & 3) << 8)
            values = scale * b.entry(grid, index).floats()
            b.put(32 * row + 8 * part, _signed(b, values, b.word(34 + 4 * row + part)))


def iq3_xxs(b: Block) -> None:
    d, grid = b.half(0), _grid("IQ3_XXS")
    for row in range(8):
        word = b.word(66 + 4 * row, 32)  # four times 7 bits of signs, 4 bits of scale
        scale = d * ((word >> 28).floats() + 0.5) * 0.5
        for part in range(4):
            at = 2 + 8 * row + 2 * part
            four, more = b.entry(grid, b.word(at)), b.entry(grid, b.word(at + 1))
            values = scale * four.join(more).floats()
            b.put(32 * row + 8 * part, _signed(b, values, _eight_signs(b, word >> (7 * part))))


def iq3_s(b: Block) -> None:
    d, grid = b.half(0), _grid("IQ3_S")
    for row in range(8):
        scale = d * (((b.word(106 + row // 2) >> (4 * (row % 2))) & 15) * 2 + 1).floats()
        upper = b.word(66 + row).widened(16)
        for part in range(4):
            at = 2 + 8 * row + 2 * part
            four, more = (
                b.entry(grid, b.word(at + i).widened(16) | (((upper >> (2 * part + i)) & 1) << 8)) for i in (0, 1)
            )
            values = scale * four.join(more).floats()
            b.put(32 * row + 8 * part, _signed(b, values, b.word(74 + 4 * row + part)))


def _shifted(values: Vector, down: Vector, scale: Vector) -> Vector:
    """Values of -1, 0 and 1 moved up by an eighth, down where the integer `down` is not 0, and scaled."""
    zero = down.equals(0)
    floats = values.floats()
    return scale * (floats + 0.125).where(zero, floats - 0.125)


def iq1_s(b: Block) -> None:
    d, grid = b.half(0), _grid("IQ1_S")
    for row in range(8):
        word = b.word(34 + 2 * row, 16)  # four times the 3 upper bits of an index, 3 bits of scale, the shift
        scale = d * (((word >> 12) & 7) * 2 + 1).floats()
        for part in range(4):
            index = b.word(2 + 4 * row + part).widened(16) | (((word >> (3 * part)) & 7) << 8)
            b.put(32 * row + 8 * part, _shifted(b.entry(grid, index), word & 0x8000, scale))


def iq1_m(b: Block) -> None:
    grid = _grid("IQ1_M")
    words = [b.word(48 + 2 * i, 16) for i in range(4)]  # each four times 3 bits of scale, and 4 bits of the block's
    d = b.from_half((words[0] >> 12) | ((words[1] >> 8) & 0xF0) | ((words[2] >> 4) & 0xF00) | (words[3] & 0xF000))
    for row in range(8):
        for part in range(4):
            three = words[row // 2] >> (6 * (row % 2) + 3 * (part // 2))
            scale = d * ((three & 7) * 2 + 1).floats()
            upper = b.word(32 + 2 * row + part // 2).widened(16) >> (4 * (part % 2))
            index = b.word(4 * row + part).widened(16) | ((upper & 7) << 8)
            b.put(32 * row + 8 * part, _shifted(b.entry(grid, index), upper & 8, scale))


LAYOUTS: dict[str, Layout] = {
    "IQ1_S": iq1_s,
    "IQ1_M": iq1_m,
    "IQ2_XXS": iq2_xxs,
    "IQ2_XS": iq2_xs,
    "IQ2_S": iq2_s,
    "IQ3_XXS": iq3_xxs,
    "IQ3_S": iq3_s,
}
