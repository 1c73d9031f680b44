"""Where a failing cell first differs: residuals and router logits of cell, base and strict engine, tap by tap.

Every tap has the bound that its own three runs give it, as logits have (legs/settings.py), so that rounding in the
first layers is not taken for the fault. A token whose router took other experts on a near tie, with all taps before
within their bounds, differs for no one's fault: such tokens are told apart. Tokens behind it in the same chunk attend
to it, and may be as far off as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from diffharness.captures import Capture
from diffharness.engine.crash import EngineCrash
from diffharness.engine.exercising import delete
from diffharness.legs.compare import Choice, other_experts
from diffharness.legs.settings import (
    BoolArray,
    Bound,
    Control,
    FloorClass,
    as_pair,
    bound,
    judge_logits,
    passed_on,
)
from diffharness.metrics import nmse_per_token
from diffharness.pipeline.cell_judge import CellJudge, Compared, Judged, fill, lossy_types, position
from diffharness.pipeline.grids import Cell
from diffharness.settings import Floors
from diffharness.taps import split

TAPS = ("token_embd", "blk.*.layer_out", "blk.*.moe_logits")


@dataclass(frozen=True)
class Place:
    """The first tap, in order of computation, that leaves its bound, and its first token that does; None for none.

    `flipped` [n_tokens] are tokens that a near tie between experts sent another way before anything else was off.
    """

    tap: str | None
    token: int | None
    flipped: BoolArray


def locate(
    base: Capture,
    cell: Capture,
    strict: Capture | None,
    rounded: Sequence[Capture],
    logits: Bound,
    rows: NDArray[np.int64],
    floor: FloorClass,
    floors: Floors,
    *,
    choice: Choice | None = None,
    chunk_of: NDArray[np.int64] | None = None,
) -> Place:
    """Compare the taps that both have, at fixture rows `rows`; `choice` is how the model chooses experts, if it does.

    `chunk_of` [n_tokens] numbers the chunks, all tokens being of one if not given.

    `rounded` are controls of lossy caches, which take the strict engine's place. A tap without a control has the bound
    of the `logits`, which gather the rounding of all taps before them.
    """
    flipped: BoolArray = np.zeros(base.n_tokens, dtype=np.bool_)
    chunks = np.zeros(base.n_tokens, dtype=np.int64) if chunk_of is None else chunk_of
    for tap in base.taps:
        if tap == "logits" or tap not in cell:
            continue
        error = _error(base, cell, tap, rows)
        control = _control(base, cell, strict, rounded, tap, rows)
        limit = logits if control is None else bound(floor, control, rows, floors)
        allowed = np.maximum(limit.tokens, passed_on(error, flipped[rows], chunks[rows]))
        above = ~(error <= allowed) & ~flipped[rows]
        if above.sum() <= limit.isolated:  # as of logits: an honest outlier must not hide the near ties beside it
            above &= ~(error <= limit.outlier)
        if above.any():
            return Place(tap, int(rows[np.flatnonzero(above)[0]]), flipped)
        layer, name = split(tap)
        if choice is not None and layer is not None and name == "moe_logits":
            flipped[rows] |= other_experts(base.read(tap)[rows], cell.read(tap)[rows], layer, choice)
    return Place(None, None, flipped)


def _control(
    base: Capture, cell: Capture, strict: Capture | None, rounded: Sequence[Capture], tap: str, rows: NDArray[np.int64]
) -> Control | None:
    found = [_error(base, one, tap, rows) for one in rounded if tap in one]
    if not found and strict is not None and tap in strict:
        found = [np.fmin(_error(strict, base, tap, rows), _error(strict, cell, tap, rows))]
    if not found:
        return None
    tokens = np.full(base.n_tokens, np.nan)
    tokens[rows] = np.max(found, axis=0)
    return Control(float(tokens[rows].mean()), tokens)


def _error(ref: Capture, other: Capture, tap: str, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """NMSE by token; one whose values nearly cancel is measured by the usual size."""
    a, b = ref.read(tap)[rows], other.read(tap)[rows]
    return nmse_per_token(b, a)


class Locator:
    """Runs what `locate` needs: a failing cell, its base and the strict engine, with the taps."""

    def __init__(self, judge: CellJudge, choice: Choice | None) -> None:
        """`choice`: how the model chooses experts, where it routes."""
        self._judge, self._choice = judge, choice

    def place(self, cell: Cell, judged: Judged) -> None:
        """Write into a compared cell's row where it first differs; acquit it where only near ties of experts went off.

        What cannot be placed is left as it is; but where the model routes, near ties cannot be told then, and nothing
        is judged.
        """
        judge, runs, compared = self._judge, self._judge.runs, judged.compared
        assert compared is not None and judged.pair is not None, "only a cell that was compared is placed"
        if cell.feed.way == "sequences":
            self._leave(judged, "the tokens of several sequences are mixed in the graph")
            return
        settings = cell.resolved(runs.base.settings, runs.longest)
        try:
            base, strict = runs.base_capture(cell.against, TAPS), runs.strict_capture(cell.against, TAPS)
            types = lossy_types(settings, runs.base.settings)
            rounded = [one for pair in types if (one := runs.rounded_capture(pair, TAPS)) is not None]
            runs.say(f"{cell.label}: again, with taps")
            run = runs.run(cell, settings, taps=TAPS)
        except EngineCrash as crash:
            self._leave(judged, crash.message)
            return
        try:
            floor = cell.floor_for(windowed=judge.windowed)
            rows, limit = compared.logits.rows, compared.judged.bound
            chunk_of = np.repeat(np.arange(len(runs.text.chunks)), [len(chunk) for chunk in runs.text.chunks])
            found = locate(
                base, run.open(), strict, rounded, limit, rows, floor, judge.floors,
                choice=self._choice, chunk_of=chunk_of,
            )  # fmt: skip
            self._write(judged, compared, found, rows, chunk_of)
        finally:
            delete(run)

    def _leave(self, judged: Judged, reason: str) -> None:
        if self._choice is not None and judged.row.status == "fail":
            judged.row.status, judged.pair = "not judged", None
            judged.row.reason = f"experts may have changed on near ties, which cannot be told here: {reason}"

    def _write(
        self,
        judged: Judged,
        compared: Compared,
        found: Place,
        rows: NDArray[np.int64],
        chunk_of: NDArray[np.int64],
    ) -> None:
        row, pair, flipped = judged.row, judged.pair, found.flipped[rows]
        assert pair is not None
        row.router_flips = int(flipped.sum())
        if not compared.judged.ok and flipped.any():
            behind = passed_on(compared.logits.nmse_series, flipped, chunk_of[rows])
            again = judge_logits(compared.logits, compared.judged.bound, leave_out=flipped, passed_on=behind)
            if again.ok and flipped.all():
                row.status, judged.pair = "not judged", None
                row.reason = "every token had a near tie between experts that went the other way"
                return
            if again.ok:
                fill(row, replace(compared, judged=again), self._judge.runs.text)
                row.reason = f"{row.router_flips} tokens left out: a near tie between experts went the other way"
                if (behind > 0).any():
                    row.reason += f"; {int(((behind > 0) & ~flipped).sum())} behind them may be as far off"
                judged.pair = as_pair(pair.a, pair.b, compared.logits, again)
                return
        if found.tap is not None:
            row.first_tap, row.first_token = found.tap, found.token
            row.first_position = None if found.token is None else position(self._judge.runs.text, found.token)
            if not pair.ok:
                pair.first_tap = found.tap
