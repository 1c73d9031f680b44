"""Values rounded to integers in blocks, as a file with float16 scales would give them back.

The scale (and minimum) is rounded to float16 first, and the codes are taken against the rounded one, so that what
is simulated is what could be stored. With n bits and a block's values x, all in float32:

    symmetric     d = f16(max|x| / (2^(n-1) - 1))       q = round(x / d), kept within -2^(n-1) .. 2^(n-1) - 1
                  value = q d
    asymmetric    m = f16(min x)
                  d = f16((max x - m) / (2^n - 1))      q = round((x - m) / d), kept within 0 .. 2^n - 1
                  value = q d + m

The symmetric scale is that of the symmetric range, so that the largest value of either sign has a code of its own;
the one code below, -2^(n-1), is used only where rounding d down leaves room for it. Ties round to even. A block of
zeros, or one whose scale is zero in float16, has q = 0. A scale beyond float16 is infinite, and what comes of it is
not finite, as in a file. NaN stays NaN, and takes its block along.
"""

from __future__ import annotations

import numpy as np

from diffharness.forensics.recipes.schema import IntN
from diffharness.weights.source import Float32Array

_RUN = 1 << 18  # values at a time: 1 MiB per temporary, which stays in a cache


def round_to_blocks(values: Float32Array, scheme: IntN) -> Float32Array:
    """`values` [..., width] as `scheme` gives them back; ValueError unless the width is made of whole blocks."""
    if values.shape[-1] % scheme.block:
        raise ValueError(f"rows of {values.shape[-1]} values are not made of whole blocks of {scheme.block}")
    blocks = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, scheme.block)
    out = np.empty_like(blocks)
    step = _RUN // scheme.block
    rounded = _asymmetric if scheme.asymmetric else _symmetric
    with np.errstate(all="ignore"):
        for start in range(0, len(blocks), step):
            out[start : start + step] = rounded(blocks[start : start + step], scheme.bits)
    return out.reshape(values.shape)


def _symmetric(x: Float32Array, bits: int) -> Float32Array:
    most = 2 ** (bits - 1) - 1
    d = _stored(np.abs(x).max(axis=1, keepdims=True) / np.float32(most))
    return _codes(x, d, -most - 1, most) * d


def _asymmetric(x: Float32Array, bits: int) -> Float32Array:
    most = 2**bits - 1
    m = _stored(x.min(axis=1, keepdims=True))
    d = _stored((x.max(axis=1, keepdims=True) - m) / np.float32(most))
    return _codes(x - m, d, 0, most) * d + m


def _stored(values: Float32Array) -> Float32Array:
    return values.astype(np.float16).astype(np.float32)


def _codes(x: Float32Array, d: Float32Array, least: int, most: int) -> Float32Array:
    codes = np.clip(np.rint(x / d), np.float32(least), np.float32(most))
    # Without a scale there is nothing to tell apart. NaN in the scale itself stays.
    return np.where(d == 0, np.float32(0), codes)
