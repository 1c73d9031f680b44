"""Relations that change each value by itself: a constant, a scale, an offset, a sign, float16's range, clipping.

Scales are fitted by least squares over the whole tensor, or over each row or column; Gemma's norms off by one are an
offset. Every search gives None where its relation does not explain the tensor.
"""

from __future__ import annotations

import numpy as np

from diffharness.forensics._pair import Pair, Relation
from diffharness.weights.source import Float32Array

_EXACT = 1e-9  # NMSE of float32 rounding
_F16_MAX = 65504.0
_F16_NORMAL = 2.0**-14  # below that a float16 is subnormal, and zero where those are flushed
_STEP = 1 << 20  # elements at a time
_FEWEST = 8  # values from which on a fitted constant is evidence
_MANY = 64  # numbers in the evidence
_MOVED = 0.03  # from 1; the factor of a row that was only quantized is nearer, also in two bits


def constant(pair: Pair) -> Relation | None:
    """Every value the same, which the checkpoint's are not; or zero."""
    a, b = pair.a.reshape(-1), pair.b.reshape(-1)
    if not (a[0] == a).all() or not np.isfinite(a[0]) or (a[0] != 0 and (b[0] == b).all()):
        return None
    value = float(a[0])
    if value == 0.0:
        return Relation("zeroed", "every value is zero", 0.0, {"value": 0.0}, 0.0)
    words = f"every value is {value:.6g}"
    return Relation("constant", words, 0.0, {"value": value}, value, "one value throughout, another for each tensor")


def offset(pair: Pair) -> Relation | None:
    """a = b + o. Whole offsets (a norm ± 1) are tried as such first."""
    if pair.a.size < _FEWEST:
        return None
    if not np.isfinite(pair.a).all() or not np.isfinite(pair.b).all():
        return None
    o = float(np.mean(pair.a, dtype=np.float64) - np.mean(pair.b, dtype=np.float64))
    if o == 0.0:
        return None
    for value in (float(round(o)), o):
        residual = pair.left(pair.b + np.float32(value)) if value else np.inf
        if pair.explains(residual):
            words = f"the checkpoint's values {'plus' if value > 0 else 'minus'} {abs(value):.4g}"
            several = "the checkpoint's values plus a constant"
            return Relation("offset", words, residual, {"offset": value}, value, several)
    return None


def scale(pair: Pair) -> Relation | None:
    """a = s·b; s = −1 is a sign flip."""
    if pair.a.size < _FEWEST or not np.isfinite(pair.a).all():
        return None
    s = _slope(pair.a, pair.b)
    if not np.isfinite(s) or s == 0.0:
        return None
    if -1.1 < s < -0.9 and pair.explains(residual := pair.left(-pair.b)):
        return Relation("sign_flip", "the checkpoint's values with the sign turned", residual, {"scale": -1.0})
    residual = pair.left(pair.b * np.float32(s))
    if not pair.explains(residual):
        return None
    # What quantization takes away of the values' power, it takes of the factor too: no more digits than that leaves.
    words = f"the checkpoint's values times {s:.{2 if pair.control > 0.01 else 3}g}"
    return Relation("scale", words, residual, {"scale": s}, s, "the checkpoint's values times a constant")


def affine(pair: Pair) -> Relation | None:
    """a = s·b + o."""
    if pair.a.size < 2 * _FEWEST or not np.isfinite(pair.a).all():
        return None
    x, y = pair.b.reshape(-1).astype(np.float64), pair.a.reshape(-1).astype(np.float64)
    mean = x.mean()
    x -= mean
    power = float(x @ x)
    if power == 0.0:
        return None
    s = float(x @ y) / power
    o = float(y.mean() - s * mean)
    residual = pair.left(pair.b * np.float32(s) + np.float32(o))
    if not pair.explains(residual):
        return None
    words = f"the checkpoint's values times {s:.4g} plus {o:.4g}"
    several = "the checkpoint's values times a constant plus another"
    return Relation("scale_offset", words, residual, {"scale": s, "offset": o}, (_digits(s), _digits(o)), several)


def float16_range(pair: Pair) -> Relation | None:
    """Values beyond float16's range became infinite, or its largest value."""
    size = np.abs(pair.b)
    n_large = int((size > _F16_MAX).sum())
    if n_large:
        with np.errstate(over="ignore"):
            infinite = pair.b.astype(np.float16).astype(np.float32)
        for how, predicted in (("infinite", infinite), ("65504", np.clip(pair.b, -_F16_MAX, _F16_MAX))):
            residual = pair.left(predicted)
            # What an overflow to infinity leaves is finite, whatever it was before.
            if pair.explains(residual) or (how == "infinite" and pair.t.non_finite and residual < 1e-6):
                words = f"{n_large} values beyond float16's range became {how}"
                several = f"values beyond float16's range became {how}"
                evidence = {"values": n_large, "became": how, "largest": float(size.max())}
                return Relation("float16_overflow", words, residual, evidence, how, several)
    return None


def small_zeroed(pair: Pair) -> Relation | None:
    """Zeros in place of all values up to some size, such as those that a float16 keeps with fewer digits."""
    zero = pair.a == 0
    n = int(zero.sum() - (zero & (pair.b == 0)).sum())
    if not 0 < n <= pair.a.size // 2:
        return None
    size = np.abs(pair.b)
    below = float(size[zero].max())
    residual = pair.left(np.where(size <= below, np.float32(0), pair.b))
    if not pair.explains(residual):
        return None
    if below <= _F16_NORMAL:
        kind, words = "float16_underflow", "values below float16's normal range became zero"
    else:
        kind, words = "small_zeroed", f"values up to {below:.2g} became zero"
    evidence = {"values": n, "below": below}
    return Relation(kind, f"{n} {words}", residual, evidence, None, "the smallest values became zero")


def non_finite(pair: Pair) -> Relation | None:
    """NaN and infinity in a tensor whose other values are sound."""
    fine = np.isfinite(pair.a)
    n = int(fine.size - fine.sum())
    if not n or 2 * n > fine.size or not pair.before <= max(pair.limit, 2 * pair.control, _EXACT):
        return None
    words = f"{n} values are NaN or infinite; the rest is sound"
    return Relation(
        "non_finite", words, pair.before, {"values": n}, None, "values are NaN or infinite; the rest is sound"
    )


def clipped(pair: Pair) -> Relation | None:
    """a = b cut off at a's own extremes, which b exceeds."""
    if pair.a.size < 4 * _FEWEST or not np.isfinite(pair.a).all():
        return None
    low, high = float(pair.a.min()), float(pair.a.max())
    n = int(((pair.b < low) | (pair.b > high)).sum())
    if not 0 < n < pair.a.size // 2 or low == high:
        return None
    residual = pair.left(np.clip(pair.b, low, high))
    if not pair.explains(residual):
        return None
    words = f"{n} values are cut off at {low:.4g} and {high:.4g}"
    return Relation(
        "clipped", words, residual, {"values": n, "low": low, "high": high}, None, "the largest values cut off"
    )


def scaled_rows(pair: Pair) -> Relation | None:
    """Each row times a factor of its own."""
    return _scaled(pair, 1, "row")


def scaled_columns(pair: Pair) -> Relation | None:
    """Each column times a factor of its own, as where a norm was folded into the matrix."""
    return _scaled(pair, 0, "column")


def _scaled(pair: Pair, axis: int, what: str) -> Relation | None:
    if pair.a.ndim < 2 or pair.a.shape[-1] < _FEWEST or pair.a.size // pair.a.shape[-1] < _FEWEST:
        return None
    a, b = (x.reshape(-1, x.shape[-1]) for x in (pair.a, pair.b))
    sub = "ij,ij->i" if axis else "ij,ij->j"
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        factors = np.einsum(sub, a, b, dtype=np.float64) / np.einsum(sub, b, b, dtype=np.float64)
    factors = np.nan_to_num(factors, nan=1.0, posinf=1.0, neginf=1.0).astype(np.float32)
    if not factors.all():
        return None  # zero rows are another story
    predicted = b * (factors[:, None] if axis else factors)
    residual = pair.left(predicted.reshape(pair.a.shape))
    if not pair.explains(residual):
        return None
    moved = np.flatnonzero(np.abs(factors - 1) > _MOVED)
    of = factors[moved] if len(moved) else factors
    span = f"{of.min():.2g}" if np.ptp(of) < 0.03 * np.abs(of).max() else f"{of.min():.3g} to {of.max():.3g}"
    words = f"{len(moved)} of {len(factors)} {what}s times {span}"
    evidence = {f"{what}s": moved[:_MANY].tolist(), "n": len(moved), "factors": of[:_MANY].tolist()}
    part = _experts(moved, pair) if axis else None
    if part is not None:
        words = f"expert{'s' if len(part) > 1 else ''} {', '.join(map(str, part))} times {span}"
        evidence["experts"] = part
    several = f"{what}s times factors of their own"
    return Relation(f"scaled_{what}s", words, residual, evidence, len(moved), several)


def _experts(rows: np.ndarray[tuple[int], np.dtype[np.int64]], pair: Pair) -> list[int] | None:
    """Experts, if `rows` are nearly all rows of some of them."""
    if pair.a.ndim != 3:
        return None
    n = pair.a.shape[1]
    experts, counts = np.unique(rows // n, return_counts=True)
    return experts.tolist() if len(experts) < pair.a.shape[0] and (counts > 0.9 * n).all() else None


def _slope(a: Float32Array, b: Float32Array) -> float:
    """s of a = s·b by least squares; NaN where b is zero."""
    a, b = a.reshape(-1), b.reshape(-1)
    power = product = 0.0
    for i in range(0, a.size, _STEP):
        x = b[i : i + _STEP].astype(np.float64)
        power += float(x @ x)
        product += float(x @ a[i : i + _STEP])
    return product / power if power else np.nan


def _digits(value: float) -> str:
    return f"{value:.3g}"
