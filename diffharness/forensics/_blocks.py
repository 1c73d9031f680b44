"""Damage to some blocks of a tensor whose rest is sound, and bytes that were read from the wrong place.

A block is one of the type's, or 32 values of types that have none. It is off where its NMSE is beyond the usual
block's (the control's, or the median block's) by more than importance weights explain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffharness.forensics._pair import Pair, Relation, nmse
from diffharness.forensics.rounding import STEP, rounded
from diffharness.weights.dequant import BLOCKS, dequantize
from diffharness.weights.gguf_write import encode_floats
from diffharness.weights.source import Float32Array

Bytes = NDArray[np.uint8]
Float64Array = NDArray[np.float64]

_OFF = 16.0  # times the usual block's NMSE; importance weights reach 24 in one block of thousands, and that type's 0.5
_EXACT = 1e-9  # NMSE of float32 rounding
_QUIET = 1e-2  # of the median block's power: a quieter block is held against that
_SUB = 16  # values that share a scale and a minimum in every type that has sub-blocks (some have 32)
_MOSTLY = 0.9
_FEW = 0.1  # share of the blocks that counts as isolated
_MANY = 64


def some_blocks(pair: Pair) -> Relation | None:
    """Zeroed blocks, wrong block scales, flipped bits or blocks of other values, where the others are sound."""
    blocks = _Blocks.of(pair)
    if blocks is None:
        return None
    off = blocks.off
    n = int(off.sum())
    if not n or n > len(off) // 2 or not blocks.rest_is_sound(pair):
        return None
    at = np.flatnonzero(off)
    evidence: dict[str, Any] = {"blocks": n, "of": len(off), "block": blocks.size, "places": at[:_MANY].tolist()}
    evidence |= _where(at, blocks.size, pair)
    for search in (_non_finite, _zeroed, _scaled, _flipped):
        found = search(pair, blocks, at)
        if found is not None:
            kind, words, more = found
            several = _SEVERAL[kind]
            return Relation(kind, words, blocks.rest, evidence | more, several=several)
    if n > _FEW * len(off):
        return None
    words = f"{n} of {len(off)} blocks of {blocks.size} values hold something else; the rest is sound"
    return Relation("isolated_blocks", words, blocks.rest, evidence, several=_SEVERAL["isolated_blocks"])


_SEVERAL = {
    "non_finite_blocks": "NaN or infinity in some blocks; the rest is sound",
    "zeroed_blocks": "blocks of zeros; the rest is sound",
    "block_scales": "blocks with a wrong scale or minimum; the rest is sound",
    "flipped_bits": "flipped bits",
    "isolated_blocks": "isolated blocks hold something else; the rest is sound",
}


@dataclass(frozen=True)
class _Blocks:
    size: int
    error: Float64Array  # [blocks], Σ(a−b)²
    power: Float64Array  # Σb²
    off: NDArray[np.bool_]
    usual: float  # NMSE of a sound block
    rest: float  # NMSE of all the others

    @classmethod
    def of(cls, pair: Pair) -> _Blocks | None:
        size = BLOCKS[pair.t.type][0]
        size = size if size > 1 else 32
        if pair.a.size % size or pair.a.size < 4 * size or not np.isfinite(pair.b).all():
            return None
        a, b = pair.a.reshape(-1, size), pair.b.reshape(-1, size)
        error, power = np.empty(len(a)), np.empty(len(a))
        step = max(1, (1 << 20) // size)
        for i in range(0, len(a), step):
            y = b[i : i + step].astype(np.float64)
            power[i : i + step] = np.einsum("ij,ij->i", y, y)
            with np.errstate(invalid="ignore", over="ignore"):
                y -= a[i : i + step]
                error[i : i + step] = np.einsum("ij,ij->i", y, y)
        error = np.nan_to_num(error, nan=np.inf)
        base = np.maximum(power, max(_QUIET * float(np.median(power)), 1e-30))
        usual = max(pair.control, float(np.median(error / base)), _EXACT / _OFF)
        off = error > _OFF * usual * base
        power_rest = float(power[~off].sum())
        rest = float(error[~off].sum()) / power_rest if power_rest > 0 else 0.0
        return cls(size, error, power, off, usual, rest)

    def rest_is_sound(self, pair: Pair) -> bool:
        return self.rest <= max(pair.limit, _EXACT) or (pair.explains(self.rest) and pair.t.error > pair.limit)


_Found = tuple[str, str, dict[str, Any]]


def _non_finite(pair: Pair, blocks: _Blocks, at: NDArray[np.int64]) -> _Found | None:
    bad = ~np.isfinite(pair.a.reshape(-1, blocks.size)[at])
    if not bad.any():
        return None
    n = int(bad.any(axis=1).sum())
    words = f"NaN or infinity in {n} of {len(blocks.off)} blocks of {blocks.size} values; the rest is sound"
    return "non_finite_blocks", words, {"values": int(bad.sum())}


def _zeroed(pair: Pair, blocks: _Blocks, at: NDArray[np.int64]) -> _Found | None:
    zero = ~pair.a.reshape(-1, blocks.size)[at].any(axis=1)
    if zero.mean() < _MOSTLY:
        return None
    return "zeroed_blocks", f"{int(zero.sum())} of {len(blocks.off)} blocks of {blocks.size} values are zero", {}


def _scaled(pair: Pair, blocks: _Blocks, at: NDArray[np.int64]) -> _Found | None:
    """Off blocks whose sub-blocks are each affine in the checkpoint's: they have scales and minima of their own."""
    x, y = (v.reshape(-1, blocks.size)[at].astype(np.float64) for v in (pair.b, pair.a))
    if not np.isfinite(y).all():
        return None
    sub = _SUB if blocks.size % _SUB == 0 and blocks.size > _SUB else blocks.size
    x, y = x.reshape(len(at), -1, sub), y.reshape(len(at), -1, sub)
    x = x - x.mean(axis=2, keepdims=True)
    y = y - y.mean(axis=2, keepdims=True)
    xx, xy, yy = (np.einsum("ijk,ijk->ij", u, v) for u, v in ((x, x), (x, y), (y, y)))
    with np.errstate(divide="ignore", invalid="ignore"):
        fitted = np.where(xx > 0, xy * xy / xx, 0.0).sum(axis=1)
        left = (yy.sum(axis=1) - fitted) / fitted  # of the scaled block's own power
        factor = xy.sum(axis=1) / xx.sum(axis=1)
    good = left < max(_OFF * blocks.usual, 1e-6)
    if good.mean() < _MOSTLY:
        return None
    f = factor[good]
    span = f"{f.min():.4g}" if np.ptp(f) < 0.05 * np.abs(f).max() else f"{f.min():.4g} to {f.max():.4g}"
    n = f"{int(good.sum())} of {len(blocks.off)}"
    words = f"{n} blocks of {blocks.size} values have a wrong scale or minimum (factors {span})"
    return "block_scales", words, {"factors": f[:_MANY].tolist()}


def _flipped(pair: Pair, blocks: _Blocks, at: NDArray[np.int64]) -> _Found | None:
    """Single bits of stored floats; what the bits of a quantized block were cannot be told."""
    if pair.t.type not in ("F32", "F16", "BF16") or pair.t.type not in STEP:
        return None
    word = np.uint32 if pair.t.type == "F32" else np.uint16
    x, y = (v.reshape(-1, blocks.size)[at] for v in (pair.a, rounded(pair.b, pair.t.type)))
    bits = encode_floats(x, pair.t.type).view(word) ^ encode_floats(y, pair.t.type).view(word)
    bits = bits[bits != 0]
    single = (bits & (bits - word(1))) == 0
    if not len(bits) or single.mean() < _MOSTLY:
        return None
    which = np.log2(bits[single].astype(np.float64)).astype(int)
    n = int(single.sum())
    words = f"{n} bit{'s' if n > 1 else ''} flipped"
    return "flipped_bits", words, {"flips": n, "bits": sorted(set(which.tolist()))}


def _where(at: NDArray[np.int64], size: int, pair: Pair) -> dict[str, list[int]]:
    """Rows, and experts where few of them, that the blocks lie in."""
    width = pair.a.shape[-1]
    out = {"rows": np.unique(at * size // width)[:_MANY].tolist()} if pair.a.ndim > 1 else {}
    if pair.a.ndim == 3:
        experts = np.unique(at * size // (width * pair.a.shape[1]))
        if len(experts) <= pair.a.shape[0] // 2:
            out["experts"] = experts.tolist()
    return out


# -- displaced bytes ------------------------------------------------------------------------------------

_NEAR = 64  # bytes: every displacement up to here is tried
_FAR = 4096  # and up to here those by whole blocks, or by the format's alignment
_ALIGNMENT = 32
_KNOWN = 0.5  # cosine of values that are in their place; displaced ones have nothing to do with the checkpoint's
_TOGETHER = 128  # displacements tried in one go
_SAMPLED = 6  # blocks that each displacement is tried on


def displaced(pair: Pair, raw: Callable[[], Bytes]) -> Relation | None:
    """The tensor's bytes stored some bytes late or early: read from the right place, they are the checkpoint's."""
    if pair.t.cos > _KNOWN and not pair.t.non_finite:
        return None
    block, size = BLOCKS[pair.t.type]
    data = np.asarray(raw()).reshape(-1).view(np.uint8)
    n_blocks = data.size // size
    if n_blocks < 4 or data.size != pair.a.size // block * size:
        return None
    shifts = sorted(
        {k for k in range(-_NEAR, _NEAR + 1) if k}
        | {k * step for step in (size, _ALIGNMENT) for k in range(-(_FAR // step), _FAR // step + 1) if k},
        key=abs,
    )
    shifts = [k for k in shifts if abs(k) * 2 < data.size]
    b = pair.b.reshape(-1, block)
    hopeful = max(_OFF * pair.control, 1e-3)
    for i in range(0, len(shifts), _TOGETHER):
        some = shifts[i : i + _TOGETHER]
        for k, error in zip(some, _tried(data, some, b, pair.t.type, size), strict=True):
            if error > hopeful:
                continue
            lo, hi = _inside(k, size, n_blocks)
            rows = np.ascontiguousarray(data[lo * size + k : hi * size + k])
            residual = nmse(dequantize(rows, pair.t.type, (hi - lo, block)), b[lo:hi])
            if pair.explains(residual):
                words = f"its bytes are displaced by {k:+d}"
                return Relation("displaced_bytes", words, residual, {"bytes": k}, k, "its bytes are displaced")
    return None


def _inside(k: int, size: int, n_blocks: int) -> tuple[int, int]:
    """Blocks [lo, hi) that lie wholly within the tensor's bytes wherever they were moved to."""
    return -(-max(0, -k) // size), n_blocks - -(-max(0, k) // size)


def _tried(data: Bytes, shifts: Sequence[int], b: Float32Array, type_name: str, size: int) -> list[float]:
    """Median NMSE of some blocks under each displacement."""
    places = []
    for k in shifts:
        lo, hi = _inside(k, size, len(b))
        places.append(np.linspace(lo, hi - 1, _SAMPLED).astype(np.int64))
    blocks = np.stack(places)
    starts = blocks * size + np.array(shifts)[:, None]
    rows = np.ascontiguousarray(data[starts.reshape(-1, 1) + np.arange(size)])
    values = dequantize(rows, type_name, (len(rows), b.shape[1]))
    with np.errstate(all="ignore"):  # bytes read at the wrong place may be any number
        return list(map(float, np.median(_errors(values, b[blocks.ravel()]).reshape(blocks.shape), axis=1)))


def _errors(a: Float32Array, b: Float32Array) -> Float32Array:
    with np.errstate(all="ignore"):
        error = np.einsum("ij,ij->i", b - a, b - a)
        power = np.einsum("ij,ij->i", b, b)
        return np.nan_to_num(np.where(error == 0, 0.0, error / power), nan=np.inf)
