"""The statistics that `llama-perplexity --kl-divergence` prints, by its definitions, from float32 logits of both sides.

The definitions are those of tools/perplexity/perplexity.cpp in llama.cpp. What differs here is what they are taken of:
llama-perplexity stores the base's log probabilities in 16 bits (65535 steps between the largest logit and 16 below it,
or the smallest), cuts lower ones off at that, and leaves tokens below exp(-16) out of the KL. Here the base is in
float32, every token counts, and sums are in float64. It also prints no statistics of fewer than 100 positions.

Standard errors take the positions as independent, as there; `diffharness.paired` has one that does not.
A value that is not finite on either side makes NLL and KL infinite, and its position no agreement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffharness.metrics import Float64Array, FloatArray, IntArray, log_softmax, percentile
from diffharness.records.grade import Estimate, KlStatistics, PositionBucket

BoolArray = NDArray[np.bool_]

_BLOCK_ELEMENTS = 1 << 20  # 8 MiB of float64 per temporary
FEWEST = 10  # positions that a standard error needs more of

_TAILS = {"99.9%": 99.9, "99%": 99.0, "95%": 95.0, "90%": 90.0}
_HEADS = {"10%": 10.0, "5%": 5.0, "1%": 1.0, "0.1%": 0.1}
KL_QUANTILES = {"max": 100.0, **_TAILS, "50%": 50.0, **_HEADS, "min": 0.0}
P_DIFF_QUANTILES = {"max": 100.0, **_TAILS, "75%": 75.0, "50%": 50.0, "25%": 25.0, **_HEADS, "min": 0.0}


@dataclass(frozen=True)
class Series:
    """One side, by position, and against the base where there is one (else `nll` alone is there, the others are empty).

    All are [n]: `nll` and `nll_base` of the token that follows, `kl` of base to side, in nats; `p_diff` its probability
    less the base's; `same_top` whether the most likely token is the base's.
    """

    nll: Float64Array
    nll_base: Float64Array
    kl: Float64Array
    p_diff: Float64Array
    same_top: BoolArray

    @property
    def has_base(self) -> bool:
        return len(self.kl) == len(self.nll)

    def at(self, rows: IntArray | BoolArray) -> Series:
        """Some of the positions."""
        if not self.has_base:
            return alone(self.nll[rows])
        return Series(self.nll[rows], self.nll_base[rows], self.kl[rows], self.p_diff[rows], self.same_top[rows])


def alone(nll: Float64Array) -> Series:
    """A side without a base."""
    return Series(nll, np.empty(0), np.empty(0), np.empty(0), np.empty(0, dtype=np.bool_))


def joined(parts: Sequence[Series]) -> Series:
    """Series of neighbouring positions as one."""
    return Series(
        nll=np.concatenate([part.nll for part in parts]),
        nll_base=np.concatenate([part.nll_base for part in parts]),
        kl=np.concatenate([part.kl for part in parts]),
        p_diff=np.concatenate([part.p_diff for part in parts]),
        same_top=np.concatenate([part.same_top for part in parts]),
    )


def series(base: FloatArray, other: FloatArray, next_ids: IntArray) -> Series:
    """Logits [n, n_vocab] of both sides and the n tokens that follow in; memory is bounded, whatever n.

    Raises ValueError if the shapes do not fit each other.
    """
    if base.shape != other.shape or base.ndim != 2 or base.shape[:1] != next_ids.shape:
        shapes = f"{base.shape}, {other.shape}, {next_ids.shape}"
        raise ValueError(f"expected logits of one shape and a token for each row, got {shapes}")
    step = max(1, _BLOCK_ELEMENTS // max(1, base.shape[1]))
    rows = range(0, len(base), step)
    parts = [_block(base[at : at + step], other[at : at + step], next_ids[at : at + step]) for at in rows]
    return joined(parts or [_block(base, other, next_ids)])


def _block(base: FloatArray, other: FloatArray, next_ids: IntArray) -> Series:
    finite_base, finite = np.isfinite(base).all(axis=1), np.isfinite(other).all(axis=1)
    both: BoolArray = np.logical_and(finite_base, finite)
    at = np.arange(len(base))
    with np.errstate(invalid="ignore", over="ignore"):
        log_p = log_softmax(base)
        same_top = base.argmax(axis=1) == other.argmax(axis=1)
        log_q = log_p if base is other else log_softmax(other)
        nll_base, nll = -log_p[at, next_ids], -log_q[at, next_ids]
        kl = np.einsum("ij,ij->i", np.exp(log_p), log_p - log_q)
    nll_base, nll = np.where(finite_base, nll_base, np.inf), np.where(finite, nll, np.inf)
    return Series(
        nll=nll,
        nll_base=nll_base,
        kl=np.where(both, np.maximum(kl, 0.0), np.inf),  # rounding can leave a few 1e-17 below zero
        p_diff=np.exp(-nll) - np.exp(-nll_base),
        same_top=same_top & both,
    )


def statistics(series: Series) -> KlStatistics:
    """Everything that llama-perplexity prints of these positions; ValueError if there are none."""
    if not len(series.nll) or not series.has_base:
        raise ValueError("statistics of no positions, or without a base")
    log_ppl, log_base = mean(series.nll), mean(series.nll_base)
    covariance = _covariance(series.nll, series.nll_base)
    ln_ratio = Estimate(
        value=_less(log_ppl.value, log_base.value),
        error=_error_of_difference(log_ppl.error, log_base.error, covariance),
    )
    ppl, ppl_base = perplexity(series.nll), perplexity(series.nll_base)
    ratio = _exp(ln_ratio.value)
    of_difference = _error_of_difference(ppl.error, ppl_base.error, covariance * ppl.value * ppl_base.value)
    square = mean(series.p_diff**2)
    rms = math.sqrt(square.value)
    share = float(series.same_top.mean())
    n = len(series.nll)
    return KlStatistics(
        n=n,
        ppl=ppl,
        ppl_base=ppl_base,
        correlation=_correlation(covariance, log_ppl.error, log_base.error),
        ln_ratio=ln_ratio,
        ratio=Estimate(value=ratio, error=None if ln_ratio.error is None else _finite(ratio * ln_ratio.error)),
        difference=Estimate(value=_less(ppl.value, ppl_base.value), error=of_difference),
        kl=mean(series.kl),
        kl_quantiles={name: percentile(series.kl, q) for name, q in KL_QUANTILES.items()},
        p_diff=mean(series.p_diff),
        p_diff_quantiles={name: percentile(series.p_diff, q) for name, q in P_DIFF_QUANTILES.items()},
        p_diff_rms=Estimate(value=rms, error=0.5 / rms * square.error if rms and square.error is not None else None),
        top1=Estimate(value=share, error=math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None),
    )


def perplexity(nll: Float64Array) -> Estimate:
    """exp of the mean NLL; its error is the mean's times the perplexity."""
    log_ppl = mean(nll)
    value = _exp(log_ppl.value)
    return Estimate(value=value, error=None if log_ppl.error is None else _finite(value * log_ppl.error))


def mean(values: Float64Array) -> Estimate:
    """Mean and sqrt(var / (n - 1)), var the mean square less the squared mean; no error of 10 values or fewer."""
    n = len(values)
    if n == 0:
        raise ValueError("mean of no positions")
    value = float(values.mean())
    if not math.isfinite(value):
        return Estimate(value=math.inf)
    return Estimate(value=value, error=math.sqrt(float(values.var()) / (n - 1)) if n > FEWEST else None)


def by_position(series: Series, positions: IntArray, buckets: Sequence[tuple[int, int]]) -> list[PositionBucket]:
    """Means over each bucket [start, stop) of positions in a chunk; buckets that hold none are left out."""
    found = []
    for start, stop in buckets:
        part = series.at((positions >= start) & (positions < stop))
        if not len(part.nll):
            continue
        bucket = PositionBucket(start=start, stop=stop, n=len(part.nll), nll=mean(part.nll).value)
        if part.has_base:
            bucket.nll_base, bucket.kl = mean(part.nll_base).value, mean(part.kl).value
            bucket.top1 = float(part.same_top.mean())
        found.append(bucket)
    return found


# -- helpers ------------------------------------------------------------------------------------------


def _covariance(a: Float64Array, b: Float64Array) -> float:
    """Of the two means: the covariance of the values over n - 1."""
    if len(a) < FEWEST or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.nan
    return float(((a - a.mean()) * (b - b.mean())).mean()) / (len(a) - 1)


def _error_of_difference(a: float | None, b: float | None, covariance: float) -> float | None:
    if a is None or b is None:
        return None
    variance = a * a + b * b - 2 * covariance
    return _finite(math.sqrt(max(variance, 0.0))) if math.isfinite(variance) else None


def _correlation(covariance: float, a: float | None, b: float | None) -> float | None:
    return _finite(covariance / (a * b)) if a and b else None


def _less(a: float, b: float) -> float:
    """a - b; infinite where both are, as the side is no better for it."""
    return a - b if math.isfinite(b) else math.inf


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
