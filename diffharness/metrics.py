"""The measures of a comparison, one definition each.

Everything accumulates in float64, reads its inputs in blocks of rows (captures are memory-mapped and
larger than memory), and is safe against NaN and infinity: a non-finite value on either side, even on
both alike, gives `inf` where smaller is better and 0 where larger is better. It is never a pass.
An empty comparison is a ValueError, because nothing compared is not agreement.

In every pair the reference is `b` of (a, b), and `ref` of (ref, other).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
Float64Array = NDArray[np.float64]
IntArray = NDArray[np.int64]

_BLOCK_ELEMENTS = 1 << 21  # 16 MiB of float64 per temporary; a few of them live at a time


# -- activations --------------------------------------------------------------------------------------


def nmse(a: FloatArray, b: FloatArray) -> float:
    """Σ(a−b)² / Σb², b the reference; arrays of any one shape.

    This is the normalised mean squared error of llama.cpp's own test tools (`test-backend-ops`),
    so the numbers compare. 0/0 is 0, x/0 is inf.
    """
    error, power = _error_and_power(*_pair(a, b))
    return _total_ratio(error, power)


def nmse_per_token(a: FloatArray, b: FloatArray) -> Float64Array:
    """`nmse` of every row: [n_tokens, ...] twice in, [n_tokens] out. No rows give an empty array."""
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    if a.ndim == 0:
        raise ValueError("nmse_per_token needs arrays with a token axis, got scalars")
    if len(a) == 0:
        return np.zeros(0)
    error, power = _error_and_power(a.reshape(len(a), -1), b.reshape(len(b), -1))
    return ratio(error, power)


def cosine(a: FloatArray, b: FloatArray) -> float:
    """Cosine of the angle between a and b as flat vectors.

    Two zero vectors give 1, one zero vector 0; a non-finite value gives 0.
    """
    a, b = _pair(a, b)
    dot = aa = bb = 0.0
    for rows in _blocks(a):
        x, y = a[rows].astype(np.float64), b[rows].astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            dot += float(np.vdot(x, y))
            aa += float(np.vdot(x, x))
            bb += float(np.vdot(y, y))
    if not np.isfinite([dot, aa, bb]).all():
        return 0.0
    if aa == 0.0 or bb == 0.0:
        return 1.0 if aa == bb else 0.0
    return float(np.clip(dot / (np.sqrt(aa) * np.sqrt(bb)), -1.0, 1.0))


def max_abs(a: FloatArray, b: FloatArray) -> float:
    """The largest |a−b|."""
    a, b = _pair(a, b)
    worst = 0.0
    for rows in _blocks(a):
        with np.errstate(invalid="ignore"):
            largest = float(np.abs(a[rows].astype(np.float64) - b[rows]).max())
        if not np.isfinite(largest):
            return float("inf")
        worst = max(worst, largest)
    return worst


# -- logits -------------------------------------------------------------------------------------------


def log_softmax(logits: FloatArray) -> Float64Array:
    """Log probabilities in float64 over the last axis; the whole result is in memory, so pass few rows."""
    x = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):
        x -= x.max(axis=-1, keepdims=True)
        x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


def kl_per_position(ref: FloatArray, other: FloatArray) -> Float64Array:
    """KL(ref‖other) = Σ p·(log p − log q) in nats, full vocabulary: [n, n_vocab] twice in, [n] out."""
    _check_logits(ref, other)
    kl = np.empty(len(ref))
    for rows in _blocks(ref):
        kl[rows] = _kl(ref[rows], other[rows])
    return kl


def nll_per_position(logits: FloatArray, next_ids: IntArray) -> Float64Array:
    """−log p(next token) in nats: logits [n, n_vocab] and the n tokens that follow in, [n] out."""
    ids = np.asarray(next_ids, dtype=np.int64)
    if logits.ndim != 2 or ids.shape != logits.shape[:1]:
        raise ValueError(f"logits {logits.shape} need one next token per row, got {ids.shape}")
    if ids.size and (ids.min() < 0 or ids.max() >= logits.shape[1]):
        raise ValueError(f"next tokens reach from {ids.min()} to {ids.max()}, outside of {logits.shape[1]} logits")
    nll = np.empty(len(logits))
    for rows in _blocks(logits):
        block = logits[rows]
        picked = np.take_along_axis(log_softmax(block), ids[rows, None], axis=1)[:, 0]
        nll[rows] = np.where(np.isfinite(block).all(axis=1) & np.isfinite(picked), -picked, np.inf)
    return nll


def perplexity(nll: Float64Array) -> float:
    """exp of the mean of the scored positions' NLL (nats)."""
    if nll.size == 0:
        raise ValueError("perplexity of no positions")
    mean = mean_nll(nll)
    return float(np.exp(mean)) if mean < 700 else float("inf")


def mean_nll(nll: Float64Array) -> float:
    """Mean NLL in nats; inf if any is not finite."""
    mean = float(np.mean(nll))
    return mean if np.isfinite(mean) else float("inf")


@dataclass(frozen=True)
class Flips:
    """Positions where the two sides' most likely tokens differ, weighed by what it cost.

    A flip between two tokens that the reference holds almost equal says nothing; `margins` are the
    reference's own logit differences (nats) between its token and the other side's, inf where a
    side is not finite.
    """

    positions: IntArray  # [k] row numbers
    ref_ids: IntArray  # [k]
    other_ids: IntArray  # [k]
    margins: Float64Array  # [k] >= 0

    @property
    def worst(self) -> float:
        """The largest margin; 0 without flips."""
        return float(self.margins.max(initial=0.0))


def flips(ref: FloatArray, other: FloatArray) -> Flips:
    """The rows of [n, n_vocab] logits whose argmax differs; rows with a non-finite value count as flips."""
    _check_logits(ref, other)
    found: list[tuple[IntArray, IntArray, IntArray, Float64Array]] = []
    for rows in _blocks(ref):
        at, ref_ids, other_ids, margins = _flips(ref[rows], other[rows])
        found.append((at + rows.start, ref_ids, other_ids, margins))
    return Flips(*(np.concatenate(part) for part in zip(*found, strict=True)))


@dataclass(frozen=True)
class LogitComparison:
    """Two sides' logits at some positions, b the reference; nats where there is a unit.

    `rows` are the row numbers compared, and the series have one value for each of them.
    `flips.positions` are row numbers of the same kind.
    """

    nmse: float
    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1: float
    rows: IntArray  # [k]
    nmse_series: Float64Array  # [k]
    kl_series: Float64Array  # [k]
    flips: Flips


def compare_logits(ref: FloatArray, other: FloatArray, rows: IntArray | None = None) -> LogitComparison:
    """Compare [n, n_vocab] logits at `rows` (all by default) in one pass over both."""
    if ref.shape != other.shape or ref.ndim != 2:
        raise ValueError(f"logits need one shape [n, n_vocab], got {ref.shape} and {other.shape}")
    chosen = np.arange(len(ref)) if rows is None else np.asarray(rows, dtype=np.int64)
    if chosen.size == 0:
        raise ValueError("no positions to compare logits at")
    if chosen.min() < 0 or chosen.max() >= len(ref):
        raise ValueError(f"positions {chosen.min()} to {chosen.max()} reach outside of {len(ref)} rows of logits")
    error, power, kl = (np.empty(chosen.size) for _ in range(3))
    found: list[tuple[IntArray, IntArray, IntArray, Float64Array]] = []
    per_block = max(1, _BLOCK_ELEMENTS // max(1, ref.shape[1]))
    for start in range(0, chosen.size, per_block):
        part = slice(start, min(start + per_block, chosen.size))
        x, y = ref[chosen[part]], other[chosen[part]]
        if np.array_equal(x, y) and np.isfinite(x).all():  # two runs of one engine: nothing to work out
            error[part], power[part], kl[part] = 0.0, 1.0, 0.0
            continue
        error[part], power[part] = _error_and_power(y, x)
        kl[part] = _kl(x, y)
        at, ref_ids, other_ids, margins = _flips(x, y)
        found.append((chosen[part][at], ref_ids, other_ids, margins))
    columns = zip(*(found or [_flips(ref[:0], other[:0])]), strict=True)
    all_flips = Flips(*(np.concatenate(column) for column in columns))
    return LogitComparison(
        nmse=_total_ratio(error, power),
        kl_mean=float(kl.mean()),
        kl_median=percentile(kl, 50),
        kl_p99=percentile(kl, 99),
        kl_max=float(kl.max()),
        top1=1.0 - len(all_flips.positions) / chosen.size,
        rows=chosen,
        nmse_series=ratio(error, power),
        kl_series=kl,
        flips=all_flips,
    )


def percentile(series: Float64Array, q: float) -> float:
    """The q-th percentile, linear between neighbours, and the upper neighbour if that is inf."""
    method = "linear" if np.isfinite(series).all() else "higher"
    return float(np.percentile(series, q, method=method))  # type: ignore[call-overload]


def ratio(error: Float64Array, power: Float64Array) -> Float64Array:
    """error/power with 0/0 = 0, x/0 = inf, and inf for anything that is not finite."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        found = np.where(error == 0.0, 0.0, error / power)
    return np.where(np.isfinite(error) & np.isfinite(power), found, np.inf)


# -- helpers ------------------------------------------------------------------------------------------


def _pair(a: FloatArray, b: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Both as [rows, width] views, which can be read block by block."""
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape} and {b.shape}")
    if a.size == 0:
        raise ValueError("nothing to compare: the arrays are empty")
    width = a.shape[-1] if a.ndim > 1 else 1
    return a.reshape(-1, width), b.reshape(-1, width)


def _check_logits(ref: FloatArray, other: FloatArray) -> None:
    if ref.shape != other.shape or ref.ndim != 2 or ref.size == 0:
        raise ValueError(f"logits need one shape [n, n_vocab] that is not empty, got {ref.shape} and {other.shape}")


def _blocks(a: FloatArray) -> Iterator[slice]:
    """Slices of rows of a 2-D array, each of about `_BLOCK_ELEMENTS` elements."""
    step = max(1, _BLOCK_ELEMENTS // max(1, a.shape[1]))
    for start in range(0, len(a), step):
        yield slice(start, min(start + step, len(a)))


def _error_and_power(a: FloatArray, b: FloatArray) -> tuple[Float64Array, Float64Array]:
    """Σ(a−b)² and Σb² of every row."""
    error, power = np.empty(len(a)), np.empty(len(a))
    for rows in _blocks(a):
        y = b[rows].astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            power[rows] = np.einsum("ij,ij->i", y, y)
            np.subtract(a[rows], y, out=y)
            error[rows] = np.einsum("ij,ij->i", y, y)
    return error, power


def _total_ratio(error: Float64Array, power: Float64Array) -> float:
    return float(ratio(error.sum(keepdims=True), power.sum(keepdims=True))[0])


def _kl(ref: FloatArray, other: FloatArray) -> Float64Array:
    with np.errstate(invalid="ignore", over="ignore"):
        log_p, log_q = log_softmax(ref), log_softmax(other)
        np.subtract(log_p, log_q, out=log_q)
        kl = np.einsum("ij,ij->i", np.exp(log_p), log_q)
    # Rounding can leave a few 1e-17 below zero; a NaN stems from an infinity or NaN in the logits.
    kl = np.where(np.isfinite(kl), np.maximum(kl, 0.0), np.inf)
    return np.asarray(kl, dtype=np.float64)


def _flips(ref: FloatArray, other: FloatArray) -> tuple[IntArray, IntArray, IntArray, Float64Array]:
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(ref).all(axis=1) & np.isfinite(other).all(axis=1))
    ref_ids, other_ids = ref.argmax(axis=1), other.argmax(axis=1)
    at = np.flatnonzero((ref_ids != other_ids) | ~finite)
    ref_ids, other_ids = ref_ids[at], other_ids[at]
    with np.errstate(invalid="ignore"):
        margins = ref[at, ref_ids].astype(np.float64) - ref[at, other_ids]
    return at, ref_ids, other_ids, np.where(finite[at], margins, np.inf)
