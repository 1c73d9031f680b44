"""Two captures of one fixture, tap by tap and position by position: nothing is run, nothing is taken for granted.

Every tap that both have is compared over every token, and the logits at every position. A tap differs where its
NMSE, or that of any single token, is above the tolerance. The first capture is the reference of every ratio.
"""

from __future__ import annotations

import numpy as np

from diffharness.captures import Capture, Float32Array
from diffharness.legs.compare import TapComparison, logit_stats
from diffharness.metrics import LogitComparison, compare_logits
from diffharness.records import TapRow
from diffharness.records.compare import CaptureRow, PositionDelta

LOGITS = "logits"
_ROWS = 64  # tokens compared at a time
_POSITIONS = 64  # that are told one by one


def compare_captures(name: str, a: Capture, b: Capture, *, tolerance: float) -> CaptureRow:
    """`b` against `a`. Of captures of different length the leading tokens that both have are compared.

    `ok` only if something was compared and all of it is within the tolerance.
    """
    n_tokens = min(a.n_tokens, b.n_tokens)
    matched: list[str] = []
    unmatched = sorted(set(a.taps) ^ set(b.taps))
    for tap in a.taps:
        if tap in b:
            same_width = a.read(tap).shape[1] == b.read(tap).shape[1]
            (matched if same_width else unmatched).append(tap)
    rows = _taps({tap: (a.read(tap)[:n_tokens], b.read(tap)[:n_tokens]) for tap in matched}, n_tokens, tolerance)
    logits = None
    if LOGITS in matched and n_tokens:
        logits = compare_logits(a.read(LOGITS)[:n_tokens], b.read(LOGITS)[:n_tokens])
    positions = [] if logits is None else _positions(logits, tolerance)
    first = next((row for row in rows if not row.ok), None)
    return CaptureRow(
        name=name,
        ok=bool(rows) and first is None and not positions,
        n_tokens=n_tokens,
        logits=None if logits is None else logit_stats(logits),
        first_tap=None if first is None else first.tap,
        first_token=None if first is None else first.first_token,
        taps=rows,
        positions=positions[:_POSITIONS],
        n_positions=len(positions),
        unmatched=unmatched,
    )


def _taps(sides: dict[str, tuple[Float32Array, Float32Array]], n_tokens: int, tolerance: float) -> list[TapRow]:
    """Rows in graph order; a few tokens of one tap are in memory at a time."""
    comparison = TapComparison(n_tokens)
    for tap, (a, b) in sides.items():
        for start in range(0, n_tokens, _ROWS):
            comparison.feed(tap, start, np.asarray(b[start : start + _ROWS]), np.asarray(a[start : start + _ROWS]))
    return [errors.row(tolerance, tolerance) for errors in comparison.taps]


def _positions(logits: LogitComparison, tolerance: float) -> list[PositionDelta]:
    """Positions above the tolerance, the largest NMSE first."""
    above = np.flatnonzero(~(logits.nmse_series <= tolerance))
    flipped = set(logits.flips.positions.tolist())
    found = [
        PositionDelta(
            token=int(logits.rows[i]),
            nmse=float(logits.nmse_series[i]),
            kl=float(logits.kl_series[i]),
            top1=int(logits.rows[i]) not in flipped,
        )
        for i in above
    ]
    return sorted(found, key=lambda row: (-row.nmse, row.token))
