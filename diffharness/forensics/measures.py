"""Every number about one tensor: the artifact's values against the checkpoint's, and the control's beside them.

Rows come in runs that fit the cache, so that a large tensor need never be in memory whole, and nothing is copied to
float64 but sums. Ratios have the checkpoint below the line.

The distributions of `kl_drift` are histograms of `BINS` equal bins over the checkpoint's mean +- `SPAN` of its standard
deviations, with an open bin to either side and `SMOOTHING` added to each. Half a standard deviation wide, with one of
them around the mean, since the levels of a type of few bits fall into holes of finer bins: a fresh Q4_0 is then at
1e-3, in bins of an eighth at 0.3, as far as real damage. The bins, and what counts as an outlier, are taken from rows
spread over the first values fed; of tensors above `COUNTED` values every k-th run of rows is counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from diffharness.forensics.rounding import STEP, rounded
from diffharness.forensics.sums import ratio
from diffharness.records.inspect import Bins, Measures
from diffharness.weights.dequant import BLOCKS
from diffharness.weights.source import Float32Array

Float64Array = NDArray[np.float64]

BINS = 17
SPAN = 4.25  # standard deviations to either side
SMOOTHING = 0.5  # values added to each bin
COUNTED = 1 << 22  # values of a tensor that its histogram counts at most
OUTLIERS = 1e-3  # share of the values, the largest, that are outliers
_RUN = 1 << 16  # elements worked on at a time: what is made of them stays in the second-level cache
_SAMPLE = 1 << 20  # values that the bins and the outliers' threshold are taken from
_FLOAT_BLOCK = 32  # of types that have no blocks


@dataclass(frozen=True)
class Measured:
    """One tensor's numbers, and the control's where there was one."""

    artifact: Measures
    control: Measures | None
    nan: int
    inf: int
    zero_blocks: int  # all zero where neither the checkpoint's nor the control's are
    zero_experts: list[int]  # experts of a stack with such blocks


def bins() -> Bins:
    """How the histograms are made, for the record."""
    return Bins(n=BINS + 2, span=SPAN, smoothing=SMOOTHING)


def measure(a: Float32Array, b: Float32Array, c: Float32Array | None, type_name: str) -> Measured:
    """The numbers of whole tensors of one shape: artifact, checkpoint, control.

    Without a control, F32, F16 and BF16 are measured beside the checkpoint's own rounding.
    """
    if c is None and type_name in STEP:
        c = rounded(b, type_name)
    gauge = Gauge(type_name, a.shape, with_control=c is not None)
    gauge.feed(a, b, c)
    return gauge.finish()


@dataclass
class _Side:
    """Sums of one side (artifact or control) against the checkpoint."""

    columns: Float32Array  # [width], largest |value|
    dot: list[Float64Array] = field(default_factory=list)  # [rows] of each run, of side times checkpoint
    power: list[Float64Array] = field(default_factory=list)  # of the side's squares
    error: list[Float64Array] = field(default_factory=list)  # of the difference's squares
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS + 2, dtype=np.int64))
    max_abs: float = 0.0
    kept: float = 0.0  # sum at the outliers' places, against the checkpoint's sign


class Gauge:
    """One tensor's numbers, added up as rows of artifact, checkpoint and control come in."""

    def __init__(self, type_name: str, shape: Sequence[int], *, with_control: bool) -> None:
        self._width = shape[-1] if len(shape) else 1
        self._rows_per_expert = shape[-2] if len(shape) > 2 else 0
        block = BLOCKS.get(type_name, (1, 1))[0]
        block = block if block > 1 else _FLOAT_BLOCK
        self._block = block if self._width % block == 0 else self._width
        self._sides = [_Side(np.zeros(self._width, dtype=np.float32)) for _ in range(1 + with_control)]
        self._own = _Side(np.zeros(self._width, dtype=np.float32))  # the checkpoint itself: power, columns, counts
        self._every = max(1, -(-math.prod(shape) // COUNTED))  # of how many runs one is counted
        self._low = self._bin = self._threshold = 0.0
        self._top = 0.0  # sum of |b| over the outliers
        self._at = self._runs = 0
        self._nan = self._inf = 0
        self._zero_rows: list[tuple[int, int]] = []  # row, blocks

    def feed(self, a: Float32Array, b: Float32Array, c: Float32Array | None) -> None:
        """The next rows, in any shape whose last axis is the tensor's."""
        a, b = a.reshape(-1, self._width), b.reshape(-1, self._width)
        sides = [a] if c is None or len(self._sides) < 2 else [a, c.reshape(-1, self._width)]
        if not b.size:
            return
        if not self._runs:
            self._set_scale(b)
        for rows in _runs(*b.shape):
            self._run([side[rows] for side in sides], b[rows])

    def _set_scale(self, b: Float32Array) -> None:
        """Bins and the outliers' threshold, from rows spread over `b`."""
        every = max(1, -(-b.size // _SAMPLE))
        sample = b[::every].reshape(-1) if len(b) >= every else b.reshape(-1)[::every]
        values = sample[np.isfinite(sample)].astype(np.float64)
        if not values.size:
            values = np.zeros(1)
        n_top = max(1, int(values.size * OUTLIERS))
        self._threshold = float(np.partition(np.abs(values), values.size - n_top)[values.size - n_top])
        mean, deviation = float(values.mean()), float(values.std())
        # A tensor of one value, or of equal ones, has no deviation: its own size is then the scale.
        span = SPAN * deviation if deviation > 1e-6 * abs(mean) else abs(mean) or 1.0
        self._low, self._bin = mean - span, 2 * span / BINS

    def _run(self, sides: list[Float32Array], b: Float32Array) -> None:
        counted = self._runs % self._every == 0
        self._runs += 1
        size = np.abs(b)
        own = self._own
        own.power.append(_products(b, b))
        np.maximum(own.columns, size.max(axis=0), out=own.columns)
        places = np.flatnonzero(size >= self._threshold)
        signs = np.sign(b.reshape(-1)[places])
        self._top += float(size.reshape(-1)[places].sum(dtype=np.float64))
        if counted:
            own.counts += self._histogram(b)
        for side, values in zip(self._sides, sides, strict=False):
            self._add(side, values, b, counted)
            at = values.reshape(-1)[places]
            side.kept += float(np.dot(np.nan_to_num(at, posinf=0.0, neginf=0.0), signs))
        self._find_zeros(sides, b)
        self._at += len(b)
        if not np.isfinite(self._sides[0].power[-1]).all():
            self._nan += int(np.isnan(sides[0]).sum())
            self._inf += int(np.isinf(sides[0]).sum())

    def _add(self, side: _Side, values: Float32Array, b: Float32Array, counted: bool) -> None:
        with np.errstate(invalid="ignore", over="ignore"):
            difference = values - b
            side.power.append(_products(values, values))
            side.dot.append(_products(values, b))
            side.error.append(_products(difference, difference))
            np.abs(difference, out=difference)
            largest = float(difference.max())
            if not math.isfinite(largest):
                largest = float(difference[np.isfinite(difference)].max(initial=0.0))
            side.max_abs = max(side.max_abs, largest)
            np.abs(values, out=difference)
            np.fmax(side.columns, difference.max(axis=0), out=side.columns)
        if counted:
            side.counts += self._histogram(values)

    def _histogram(self, values: Float32Array) -> NDArray[np.int64]:
        flat = values.reshape(-1)
        with np.errstate(invalid="ignore", over="ignore"):
            place = (flat - np.float32(self._low)) * np.float32(1 / self._bin)
            if not np.isfinite(place.sum()):
                place = place[np.isfinite(place)]
        np.floor(place, out=place)
        np.clip(place, -1, BINS, out=place)
        place += 1
        return np.bincount(place.astype(np.int64), minlength=BINS + 2)

    def _find_zeros(self, sides: list[Float32Array], b: Float32Array) -> None:
        """Blocks of the artifact that are all zero and ought not to be."""
        a = sides[0].reshape(len(b), -1, self._block)
        # Most rows have none: a block of zeros has a zero at its end.
        if a[..., -1].all():
            return
        empty = np.asarray(~a.any(axis=2))
        for other in (b, *sides[1:]):
            empty &= np.asarray(other.reshape(a.shape).any(axis=2))
        counts = empty.sum(axis=1)
        for row in np.flatnonzero(counts):
            self._zero_rows.append((self._at + int(row), int(counts[row])))

    def finish(self) -> Measured:
        """The numbers, once every row was fed."""
        artifact, *control = (self._measures(side) for side in self._sides)
        per_expert = self._rows_per_expert
        return Measured(
            artifact=artifact,
            control=control[0] if control else None,
            nan=self._nan,
            inf=self._inf,
            zero_blocks=sum(n for _, n in self._zero_rows),
            zero_experts=sorted({row // per_expert for row, _ in self._zero_rows}) if per_expert else [],
        )

    def _measures(self, side: _Side) -> Measures:
        own = self._own
        by_row = [_joined(sums) for sums in (side.dot, side.power, own.power, side.error)]
        dot, squares, power, error = (float(sums.sum()) for sums in by_row)
        cosines = _cosines(*by_row)
        low, first, median = np.quantile(cosines, (0.0, 0.01, 0.5)) if len(cosines) else (1.0, 1.0, 1.0)
        relative = ratio(error, power)
        total = float(own.columns.sum(dtype=np.float64))
        columns = float(side.columns[np.isfinite(side.columns)].sum(dtype=np.float64))
        [cosine] = _cosines(*(np.array([value]) for value in (dot, squares, power, error)))
        return Measures(
            cos=float(cosine),
            cos_row_min=float(low),
            cos_row_p1=float(first),
            cos_row_p50=float(median),
            error=math.sqrt(relative),
            sqnr=math.inf if relative == 0 else -10 * math.log10(relative) if math.isfinite(relative) else -math.inf,
            scale=dot / power if power > 0 and math.isfinite(dot) else None,
            max_abs=side.max_abs,
            kl_drift=_kl(own.counts, side.counts),
            outlier_kept=side.kept / self._top if self._top > 0 else None,
            channel_kept=columns / total if total > 0 and math.isfinite(total) else None,
        )


def _joined(runs: Sequence[Float64Array]) -> Float64Array:
    return np.concatenate(runs) if runs else np.zeros(0)


def _runs(n_rows: int, width: int) -> Iterator[slice]:
    step = max(1, _RUN // max(1, width))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def _products(x: Float32Array, y: Float32Array) -> Float64Array:
    """Sum over each row of x times y; in float64 where float32 cannot hold the squares (a divisor of 1e30)."""
    with np.errstate(invalid="ignore", over="ignore"):
        sums = np.asarray(np.einsum("ij,ij->i", x, y), dtype=np.float64)
        if not np.isfinite(sums).all():
            sums = np.asarray(np.einsum("ij,ij->i", x.astype(np.float64), y.astype(np.float64)))
    return sums


def _cosines(dot: Float64Array, power_a: Float64Array, power_b: Float64Array, error: Float64Array) -> Float64Array:
    """Cosine of each row; of equal rows, zeros among them, it is 1; of zeros against anything else 0."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        found = dot / (np.sqrt(power_a) * np.sqrt(power_b))
    found = np.where(np.isfinite(found), np.clip(found, -1.0, 1.0), 0.0)
    return np.asarray(np.where(error == 0.0, 1.0, found))


def _kl(reference: NDArray[np.int64], other: NDArray[np.int64]) -> float:
    """KL(reference || other) of two histograms over the same bins, in nats."""
    p, q = reference + SMOOTHING, other + SMOOTHING
    p, q = p / p.sum(), q / q.sum()
    return max(0.0, float((p * np.log(p / q)).sum()))
