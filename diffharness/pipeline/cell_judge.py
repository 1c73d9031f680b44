"""One cell of a settings grid at a time: run, compared with the base and the strict engine, judged."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from diffharness.engine.crash import EngineCrash
from diffharness.engine.exercising import LOGITS, CellRun, Text, delete
from diffharness.engine.feeding import Feed
from diffharness.errors import SettingsError
from diffharness.legs.compare import logit_stats
from diffharness.legs.settings import Control, Judgement, as_pair, bound, judge_logits
from diffharness.metrics import LogitComparison, compare_logits
from diffharness.pipeline.cell_runs import WHOLE, CellRuns, Logits
from diffharness.pipeline.crashes import crash_finding
from diffharness.pipeline.grids import Cell
from diffharness.records import Finding, SettingsPair
from diffharness.records.matrix import CellRow
from diffharness.settings import EngineSettings, Floors

LOSSLESS = frozenset({"F32", "F16"})  # flash attention casts keys of F32 to F16
SHIFTING = frozenset({"cut_and_shifted", "shifted"})  # ways of feeding that rest on relative positions
_AWAY = Cell(label="positions away from 0", dimension="context shift", floor="rounding")
_TOLD_APART = 4.0  # how many times further from the strict engine one of two must be to be named


@dataclass(frozen=True)
class Compared:
    """One capture against its reference and the strict engine."""

    logits: LogitComparison
    strict: LogitComparison | None
    control: Control | None
    judged: Judgement


@dataclass
class Judged:
    """A cell's row, and what it says for the verdict."""

    row: CellRow
    pair: SettingsPair | None = None
    findings: list[Finding] = field(default_factory=list)
    compared: Compared | None = None


class CellJudge:
    """Takes cell after cell. `windowed` is whether the model has a sliding window."""

    def __init__(self, runs: CellRuns, floors: Floors, *, windowed: bool = False) -> None:
        self.runs, self.floors, self.windowed = runs, floors, windowed
        self.n_tokens = sum(map(len, runs.text.chunks))
        self.noise = None if runs.strict is None else compare_logits(runs.strict.logits, runs.base.logits)
        self._repeat: Control | None = None

    def order(self, cells: Sequence[Cell]) -> list[Cell]:
        """Repeats first, since they tell the engine's own noise; then such together as load the model alike."""

        def key(cell: Cell) -> tuple[bool, str]:
            loading = {name: cell.settings[name] for name in ("use_mmap", "extra_bufts") if name in cell.settings}
            return not cell.is_repeat, f"{loading}{cell.engine}{cell.overrides}"

        return sorted(cells, key=key)

    def judge(self, cell: Cell) -> Judged:
        """Run and judge one cell. Whatever becomes of the engine, a row comes back; raises OutputError."""
        started = time.monotonic()
        found = self._judge(cell)
        found.row.seconds = time.monotonic() - started
        return found

    def _judge(self, cell: Cell) -> Judged:
        base = self.runs.base.settings
        row = CellRow(
            label=cell.label,
            dimension=cell.dimension,
            feed=cell.feed.way,
            against="base" if cell.against is None else cell.against.way,
            floor=cell.floor_for(windowed=self.windowed),
            lossy=cell.lossy,
            status="not run",
        )
        try:
            settings = cell.resolved(base, self.runs.longest)
        except SettingsError as error:
            row.reason = error.message
            return Judged(row)
        row.changes = base.differences(settings)
        unchanged = not (row.changes or cell.callback or cell.overrides) and cell.feed == WHOLE
        if unchanged and not cell.is_repeat:
            row.reason = "the base's own setting"
            return Judged(row)
        try:
            run = self.runs.run(cell, settings)
        except EngineCrash as crash:
            return self._crashed(cell, row, settings, crash)
        try:
            return self._compare(cell, row, settings, run)
        except EngineCrash as crash:
            row.reason = f"nothing to compare it with: {crash.message}"
            return Judged(row)
        finally:
            delete(run)

    # -- judging --------------------------------------------------------------------------------------

    def _compare(self, cell: Cell, row: CellRow, settings: EngineSettings, run: CellRun) -> Judged:
        if run.not_run is not None:
            row.reason = run.not_run
            return Judged(row)
        capture, reference = run.open(), self.runs.base_logits(cell.against)
        found = [self._one(cell, settings, reference, capture.read(name), rows) for name, rows in run.rows.items()]
        if cell.is_repeat:
            self._repeat = Control.of(found[0].logits, self.n_tokens)
        worst = max(found, key=lambda one: (not one.judged.ok, one.logits.nmse))
        judgeable = worst.judged.ok or worst.control is not None or row.floor == "same"
        if not worst.judged.ok and judgeable and cell.feed.way in SHIFTING and not self._is_relative(settings):
            row.reason = "this model's values depend on absolute positions: no shift leaves them as they are"
            return Judged(row)
        fill(row, worst, self.runs.text)
        if not judgeable:
            row.status = "not judged"
            row.reason = "there is no strict engine to tell rounding from a fault by"
            return Judged(row)
        who = "base" if cell.against is None else f"base fed as `{row.against}`"
        pair = as_pair(who, cell.label, worst.logits, worst.judged)
        pair.note = row.reason = self._further(worst)
        return Judged(row, pair, compared=worst)

    def _one(
        self, cell: Cell, settings: EngineSettings, reference: Logits, other: Logits, rows: NDArray[np.int64]
    ) -> Compared:
        logits = compare_logits(reference, other, rows)
        strict_logits = self.runs.strict_logits(cell.against)
        strict = None if strict_logits is None else compare_logits(strict_logits, other, rows)
        floor, control = cell.floor_for(windowed=self.windowed), self._repeat
        if floor != "same":
            control = self._lossy(settings) or self._rounding(cell, reference, strict_logits, strict, rows)
        return Compared(logits, strict, control, judge_logits(logits, bound(floor, control, rows, self.floors)))

    def _rounding(
        self,
        cell: Cell,
        reference: Logits,
        strict_logits: Logits | None,
        strict: LogitComparison | None,
        rows: NDArray[np.int64],
    ) -> Control | None:
        """How far base and cell are from the strict engine; of the whole text, where it was not fed like the cell."""
        if strict is None or strict_logits is None or self.noise is None:
            return None if self.noise is None else Control.of(self.noise, self.n_tokens)
        own = self.noise if cell.against is None else compare_logits(strict_logits, reference, rows)
        return Control.nearer(own, strict, self.n_tokens)

    def _is_relative(self, settings: EngineSettings) -> bool:
        """Whether the base gives the same values when all positions are further from 0, and so may be shifted."""
        try:
            away = self.runs.base_logits(Feed(way="offset"))
        except EngineCrash:
            return False
        found = self._one(_AWAY, settings, self.runs.base.logits, away, np.arange(self.n_tokens))
        return found.judged.ok

    def _lossy(self, settings: EngineSettings) -> Control | None:
        """Where keys or values are of other types than the base's, and some are lossy: what these types may change."""
        found = [self.runs.rounded(types) for types in lossy_types(settings, self.runs.base.settings)]
        controls = [Control.of(one, self.n_tokens) for one in found if one is not None]
        return reduce(Control.larger, controls) if controls else None

    def _further(self, found: Compared) -> str | None:
        """Which of the two a failing pair accuses, where the strict engine tells."""
        if found.judged.ok or found.strict is None or self.noise is None:
            return None
        at = np.flatnonzero(found.strict.rows == found.judged.first)
        cell, base = float(found.strict.nmse_series[at[0]]), float(self.noise.nmse_series[found.judged.first])
        if max(cell, base) < _TOLD_APART * min(cell, base):
            return None
        who = "the cell" if cell > base else "the base"
        return f"{who} is the one further from the strict engine there, {max(cell, base):.1e} to {min(cell, base):.1e}"

    # -- deaths ---------------------------------------------------------------------------------------

    def _crashed(self, cell: Cell, row: CellRow, settings: EngineSettings, crash: EngineCrash) -> Judged:
        """A refusal is a cell that did not run; a death is a finding, with its node from a traced run."""
        row.reason = crash.message
        if crash.is_unusable:
            return Judged(row)
        row.status = "crash"
        node = self.runs.node_of(cell, settings, crash)
        at = f" in node {node['node']} ({node.get('op')})" if node.get("node") else ""
        row.first_tap = str(node["node"]) if at else None
        finding = crash_finding(f"cell {cell.label}", crash)
        finding.message = f"the engine died (cell {cell.label}){at}: {crash.message}; it survives as the base"
        finding.evidence |= {
            "node": dict(node) or None,
            "survives": "the base's settings",
            "cell": cell.label,
            "changes": row.changes,
        }
        return Judged(row, None, [finding])


def lossy_types(a: EngineSettings, b: EngineSettings) -> list[tuple[str, str]]:
    """The types of keys and values of two caches that differ in them, of each that is lossy."""
    types = [(one.type_k, one.type_v) for one in (a, b)]
    return [pair for pair in types if not set(pair) <= LOSSLESS] if types[0] != types[1] else []


def fill(row: CellRow, found: Compared, text: Text) -> None:
    """The row's numbers: of its logits, and of the token that decided or came nearest to its bound."""
    judged, logits = found.judged, found.logits
    row.status = "ok" if judged.ok else "fail"
    row.logits, row.bound, row.tokens_above = logit_stats(logits), judged.bound.nmse, int(judged.above.size)
    row.control = None if found.control is None else found.control.nmse
    row.strict = None if found.strict is None else logit_stats(found.strict)
    row.first_tap = row.first_token = row.first_position = None
    at = int(np.argmax(logits.nmse_series / judged.bound.tokens))
    if judged.first is not None:
        at = int(np.flatnonzero(logits.rows == judged.first)[0])
        row.first_tap, row.first_token, row.first_position = LOGITS, judged.first, position(text, judged.first)
    row.token_nmse, row.token_bound = float(logits.nmse_series[at]), float(judged.bound.tokens[at])


def position(text: Text, token: int) -> int:
    """A fixture row's place within its chunk."""
    for chunk in text.chunks:
        if token < len(chunk):
            return token
        token -= len(chunk)
    raise ValueError("a row behind the text's end")
