"""Logits of reference and engine as series by position, against the base's where there is one.

The base's logits are written to a capture once; every other side's are taken up piece by piece as they are made, and
let go. So the memory is that of one piece, however many artifacts and tokens there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from diffharness import kld
from diffharness.captures import Capture, CaptureWriter
from diffharness.errors import InconclusiveError
from diffharness.fixture import Fixture, IntArray
from diffharness.kld import BoolArray, Series
from diffharness.metrics import FloatArray, nll_per_position
from diffharness.pipeline.reference_runs import Precision
from diffharness.reference.runner import OnTap
from diffharness.weights.source import WeightSource

LOGITS = "logits"
_PIECE = 1 << 24  # logits compared at a time, 64 MiB of each side


@dataclass(frozen=True)
class Places:
    """Where a fixture is measured: every row that a token follows, or the rows that the fixture scores by hand."""

    rows: IntArray  # [n] ascending
    next_ids: IntArray  # [n]
    positions: IntArray  # [n] in the chunk
    chunk_of: IntArray  # [n]
    scored: BoolArray  # [n] whether the row counts for the statistics

    @classmethod
    def of(cls, fixture: Fixture) -> Places:
        bounds = fixture.chunk_bounds()
        scored = fixture.scored_positions()
        rows = scored
        if fixture.scored is None:  # statistics are of the second half of each chunk, curves begin at its first token
            rows = np.concatenate([np.arange(start, end - 1) for start, end in bounds]).astype(np.int64)
        chunk_of = rows // fixture.chunk
        starts = np.array([start for start, _ in bounds], dtype=np.int64)
        next_ids = np.array(fixture.ids, dtype=np.int64)[rows + 1]
        return cls(rows, next_ids, rows - starts[chunk_of], chunk_of, np.isin(rows, scored))

    def within(self, piece: slice) -> slice:
        """Which of `rows` lie in a piece of the fixture's rows."""
        first, last = np.searchsorted(self.rows, [piece.start, piece.stop])
        return slice(int(first), int(last))


def of_base(
    source: WeightSource, fixture: Fixture, places: Places, precision: Precision, path: Path
) -> tuple[Capture, Series]:
    """The base's logits in a capture at `path`, and its own NLL.

    InconclusiveError where they are not finite: there is nothing to measure against.
    """
    parts: list[Series] = []
    with CaptureWriter(path, fixture.n_tokens, {"source": source.label}) as writer:

        def on_tap(_tap: str, own: Tensor, _local: Tensor | None, rows: slice) -> None:
            logits = own.cpu().numpy()
            writer.write(LOGITS, rows.start, logits)
            parts.extend(_pieces(logits, rows, places, None))

        _forward(source, fixture, precision, on_tap)
        writer.finish()
    series = kld.joined(parts)
    broken = int((~np.isfinite(series.nll)).sum())
    if broken:
        raise InconclusiveError(
            f"{source.label}: its own logits are NaN or infinite at {broken} of {len(series.nll)} positions: "
            "nothing can be measured against it",
            hint="its weights may hold NaN: download or save them again; else its values need --dtype float64",
        )
    return Capture(path), series


def of_reference(
    source: WeightSource, fixture: Fixture, places: Places, precision: Precision, base: Capture | None
) -> Series:
    """One forward of the reference. The base's logits must be as wide as the source's."""
    parts: list[Series] = []

    def on_tap(_tap: str, own: Tensor, _local: Tensor | None, rows: slice) -> None:
        parts.extend(_pieces(own.cpu().numpy(), rows, places, base))

    _forward(source, fixture, precision, on_tap)
    return kld.joined(parts)


def of_capture(capture: Capture, places: Places, base: Capture | None) -> Series:
    """Logits that were captured whole, such as the engine's."""
    logits = capture.read(LOGITS)
    return kld.joined(list(_pieces(logits, slice(0, len(logits)), places, base)))


def _pieces(logits: FloatArray, rows: slice, places: Places, base: Capture | None) -> Iterator[Series]:
    """`logits` are those of the fixture's `rows`; read and compared some at a time."""
    step = max(1, _PIECE // logits.shape[1])
    for at in range(rows.start, rows.stop, step):
        here = places.within(slice(at, min(at + step, rows.stop)))
        picked, next_ids = logits[places.rows[here] - rows.start], places.next_ids[here]
        if base is None:
            yield kld.alone(nll_per_position(picked, next_ids))
        else:
            yield kld.series(base.read(LOGITS)[places.rows[here]], picked, next_ids)


def _forward(source: WeightSource, fixture: Fixture, precision: Precision, on_tap: OnTap) -> None:
    precision.forward(source).run(fixture.chunks(), on_tap=on_tap, taps=[LOGITS], keep_logits=False)
