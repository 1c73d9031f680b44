"""The values that a stored block could have held instead: what its own scales allow.

A quantizer chooses scales for a block, and importance weights move that choice; then each value takes
the nearest level that the scales offer. How far the stored value is from what the nearest level would
have been is therefore hardly any quantizer's doing. Types whose values are chosen several at once, from a
lattice (IQ1 to IQ3), have no such levels.

The arrangement of bits is ggml's (ggml-common.h), as in `dequant`.
"""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np

from diffharness.weights.dequant import BLOCKS, Bytes
from diffharness.weights.source import Float32Array

_IQ4 = np.array(gguf.quants.IQ4_NL.kvalues, dtype=np.float32)

# Blocks [n, bytes] to step and lowest level [n, groups]; the step may be negative, the lowest is then the highest.
_Steps = Callable[[Bytes], tuple[Float32Array, Float32Array]]


@np.errstate(all="ignore")  # damaged scales may be anything
def nearest(raw: Bytes, type_name: str, values: Float32Array) -> Float32Array | None:
    """For each of `values` [rows, width] the nearest level of its block in `raw`; None for a type without levels."""
    blocks = raw.reshape(-1, BLOCKS[type_name][1])
    if type_name in _UNIFORM:
        steps_of, levels = _UNIFORM[type_name]
        step, low = steps_of(blocks)
        x = values.reshape(step.size, -1)
        step, low = step.reshape(-1, 1), low.reshape(-1, 1)
        code = np.rint((x - low) / np.where(step == 0, 1, step))
        best: Float32Array = low + np.clip(code, 0, levels - 1).astype(np.float32) * step
        return best.reshape(values.shape)
    if type_name in _TABLE:
        scale = _TABLE[type_name](blocks)
        x = values.reshape(scale.size, -1)
        scale = scale.reshape(-1, 1)
        code = np.searchsorted((_IQ4[1:] + _IQ4[:-1]) / 2, x / np.where(scale == 0, 1, scale))
        return (_IQ4[code] * scale).reshape(values.shape)
    return None


def has_levels(type_name: str) -> bool:
    return type_name in _UNIFORM or type_name in _TABLE


def _f16(columns: Bytes) -> Float32Array:
    return np.ascontiguousarray(columns).view(np.float16).astype(np.float32)


def _signed(offset: int, levels: int) -> _Steps:
    """One scale first, codes from `-levels / 2` on."""

    def steps(blocks: Bytes) -> tuple[Float32Array, Float32Array]:
        scale = _f16(blocks[:, offset : offset + 2])
        return scale, np.float32(-levels // 2) * scale

    return steps


def _with_minimum(blocks: Bytes) -> tuple[Float32Array, Float32Array]:
    both = _f16(blocks[:, :4])
    return both[:, :1], both[:, 1:]


def _k_scales(blocks: Bytes) -> tuple[Float32Array, Float32Array]:
    """Scales and minima [n, 8, 1] of Q4_K and Q5_K: two float16, then 8 + 8 values of 6 bits in 12 bytes.

    The first four of each lie in the low 6 bits of bytes 0-3 and 4-7; the last four have their low
    nibbles in bytes 8-11 and their two high bits on top of bytes 0-3 and 4-7.
    """
    d = _f16(blocks[:, :4])
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = np.concatenate([a & 63, (c & 15) | ((a >> 2) & 48)], axis=1).astype(np.float32)
    minimum = np.concatenate([b & 63, (c >> 4) | ((b >> 2) & 48)], axis=1).astype(np.float32)
    return (d[:, :1] * scale)[:, :, None], (d[:, 1:] * minimum)[:, :, None]


def _k_with_minimum(blocks: Bytes) -> tuple[Float32Array, Float32Array]:
    """Q4_K and Q5_K: scales and minima of eight groups, 6 bits each."""
    scale, minimum = _k_scales(blocks)
    return scale[:, :, 0], -minimum[:, :, 0]


def _q2_k(blocks: Bytes) -> tuple[Float32Array, Float32Array]:
    d = _f16(blocks[:, 80:84])
    return d[:, :1] * (blocks[:, :16] & 15), -d[:, 1:] * (blocks[:, :16] >> 4)


def _q3_k(blocks: Bytes) -> tuple[Float32Array, Float32Array]:
    """16 scales of 6 bits: low nibbles in eight bytes, two high bits of each in four."""
    packed = blocks[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    high = np.concatenate([(packed[:, 8:] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    scale: Float32Array = _f16(blocks[:, 108:110]) * ((low | (high << 4)).astype(np.float32) - 32)
    return scale, -4 * scale


def _q6_k(blocks: Bytes) -> tuple[Float32Array, Float32Array]:
    scale = _f16(blocks[:, 208:210]) * np.ascontiguousarray(blocks[:, 192:208]).view(np.int8).astype(np.float32)
    return scale, -32 * scale


def _iq4_xs(blocks: Bytes) -> Float32Array:
    high = np.ascontiguousarray(blocks[:, 2:4]).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16)
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    scale: Float32Array = _f16(blocks[:, :2]) * ((low | ((high & 3) << 4)).astype(np.float32) - 32)
    return scale


_UNIFORM: dict[str, tuple[_Steps, int]] = {
    "Q4_0": (_signed(0, 16), 16),
    "Q4_1": (_with_minimum, 16),
    "Q5_0": (_signed(0, 32), 32),
    "Q5_1": (_with_minimum, 32),
    "Q8_0": (_signed(0, 256), 256),
    "Q2_K": (_q2_k, 4),
    "Q3_K": (_q3_k, 8),
    "Q4_K": (_k_with_minimum, 16),
    "Q5_K": (_k_with_minimum, 32),
    "Q6_K": (_q6_k, 64),
}
_TABLE: dict[str, Callable[[Bytes], Float32Array]] = {
    "IQ4_NL": lambda blocks: _f16(blocks[:, :2]),
    "IQ4_XS": _iq4_xs,
}
