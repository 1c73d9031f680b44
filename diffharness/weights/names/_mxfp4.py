"""MXFP4 as gpt-oss is published: bytes of two 4-bit numbers, and an exponent for every 32 of them.

A number is a sign and one of eight values (E2M1); a block's 32 are multiplied by 2^(exponent - 127) (OCP Microscaling
Formats, 2023). The lower half of a byte is the first of its two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffharness.weights.names._map import Packed
from diffharness.weights.source import Float32Array

_BLOCK = 32
_BIAS = 127
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_POSITIVE, *(-value for value in _POSITIVE)], dtype=np.float32)


@dataclass(frozen=True)
class Mxfp4(Packed):
    """Every `step`-th row, from `first` on, of blocks [n_expert, rows, width / 32, 16] and their scales."""

    first: int = 0
    step: int = 1

    def to_gguf(self, parts: Sequence[Float32Array]) -> Float32Array:
        blocks, scales = (part[:, self.first :: self.step].astype(np.int32) for part in parts)
        numbers = np.empty((*scales.shape, _BLOCK), dtype=np.float32)
        numbers[..., 0::2], numbers[..., 1::2] = _VALUES[blocks & 15], _VALUES[blocks >> 4]
        return np.ldexp(numbers, scales[..., None] - _BIAS).reshape(*scales.shape[:-1], -1)


def mxfp4(shape: tuple[int, int, int], *, first: int = 0, step: int = 1) -> Mxfp4:
    """For GGUF's stack of `shape` [n_expert, out, in], every `step`-th row of the checkpoint's."""
    n_expert, n_out, n_in = shape
    scales = (n_expert, n_out * step, n_in // _BLOCK)
    return Mxfp4(((*scales, _BLOCK // 2), scales), "MXFP4", first=first, step=step)
