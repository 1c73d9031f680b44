"""The engine's runs behind a settings grid: the cells' own, and those that several cells share.

Shared runs are made when the first cell asks for them: other ways of feeding that cells are compared with, taps of
base and strict engine, and an F32 cache with our own rounding as a control of lossy caches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffharness.captures import Capture
from diffharness.engine.exercising import LOGITS, CellRun, Exerciser, Text, delete
from diffharness.engine.feeding import Feed
from diffharness.engine.runner import RESIDUALS, EngineCrash
from diffharness.metrics import LogitComparison, compare_logits
from diffharness.pipeline.grids import Cell
from diffharness.pipeline.request import Say
from diffharness.settings import EngineSettings

Logits = NDArray[np.float32]
WHOLE = Feed()

# Ways of feeding that see another text than the whole one, so that only the same way on the strict engine compares.
OTHER_TEXT = frozenset({"cut", "cut_and_shifted"})

_LEAST_LIMIT_S = 120.0
_SLOWER = 200.0  # a cell that takes this many times as long as the base has hung


@dataclass(frozen=True)
class Strict:
    """The engine that rounds least: its logits of the whole text, and its file and settings as long as they last."""

    logits: Logits
    model: Path | None = None
    settings: EngineSettings | None = None  # None: the reference stands in for it


@dataclass(frozen=True)
class Base:
    """What the cells are compared with; `seconds` are what loading and evaluation took."""

    settings: EngineSettings
    logits: Logits
    seconds: float


class CellRuns:
    """Runs cells of one text. Close it, or use it as a context manager: no worker and no shared capture is left."""

    def __init__(
        self,
        text: Text,
        base: Base,
        strict: Strict | None,
        folder: Path,
        *,
        overrides: Sequence[str] = (),
        say: Say = lambda text: None,
    ) -> None:
        self.text, self.base, self.strict, self.folder = text, base, strict, folder
        self.overrides, self.say = tuple(overrides), say
        self.longest = max(map(len, text.chunks))
        self.limit_s = min(base.settings.time_limit_s, max(_LEAST_LIMIT_S, _SLOWER * base.seconds))
        self._cells = Exerciser(text)
        self._kept: dict[str, CellRun] = {}
        self._rounded: dict[tuple[str, str], LogitComparison | None] = {}

    def run(self, cell: Cell, settings: EngineSettings, *, taps: Sequence[str] = (), trace: bool = False) -> CellRun:
        """The cell's own capture, which the caller deletes. Raises EngineCrash, OutputError."""
        limited = settings.changed(time_limit_s=min(settings.time_limit_s, self.limit_s))
        return self._cells.run(
            limited,
            self.folder / "engine-cell.safetensors",
            feed=cell.feed,
            taps=taps or (RESIDUALS if cell.callback else ()),
            overrides=(*self.overrides, *cell.overrides),
            trace=trace,
        )

    def node_of(self, cell: Cell, settings: EngineSettings, crash: EngineCrash) -> dict[str, Any]:
        """The node in which a cell died: it is run again node by node. Empty where none had begun."""
        self.say(f"{cell.label}: the engine died; again, node by node")
        try:
            self.run(cell, settings, trace=True)
        except EngineCrash as again:
            return again.node or crash.node
        return crash.node

    # -- shared ---------------------------------------------------------------------------------------

    def base_logits(self, feed: Feed | None) -> Logits:
        """The base's logits when fed in this way. Raises EngineCrash."""
        return self.base.logits if feed is None else self.base_capture(feed).read(LOGITS)

    def base_capture(self, feed: Feed | None, taps: Sequence[str] = ()) -> Capture:
        """The base fed in this way. Raises EngineCrash."""
        return self._keep("base", self._cells, self.base.settings, feed or WHOLE, taps)

    def strict_logits(self, feed: Feed | None) -> Logits | None:
        """The strict engine's logits of what a base that is fed so computes; None where it cannot be run so."""
        if self.strict is None:
            return None
        if feed is None or feed.way not in OTHER_TEXT:
            return self.strict.logits
        capture = self.strict_capture(feed)
        return None if capture is None else capture.read(LOGITS)

    def strict_capture(self, feed: Feed | None, taps: Sequence[str] = ()) -> Capture | None:
        """The strict engine; None where its file is gone, or it died."""
        if self.strict is None or self.strict.model is None or self.strict.settings is None:
            return None
        way = feed if feed is not None and feed.way in OTHER_TEXT else WHOLE
        with Exerciser(Text(self.strict.model, self.text.arch, self.text.chunks, self.text.meta)) as cells:
            try:
                return self._keep("strict", cells, self.strict.settings, way, taps)
            except EngineCrash:
                return None

    def rounded(self, types: tuple[str, str]) -> LogitComparison | None:
        """The base with an F32 cache whose keys and values our code rounds to `types`, against the base.

        None where the engine cannot be run so: without flash attention, or with a cache that is not in this memory.
        """
        if types not in self._rounded:
            capture = self.rounded_capture(types)
            compared = None if capture is None else compare_logits(self.base.logits, capture.read(LOGITS))
            self._rounded[types] = compared
        return self._rounded[types]

    def rounded_capture(self, types: tuple[str, str], taps: Sequence[str] = ()) -> Capture | None:
        """What `rounded` compares, with taps."""
        plain = self.base.settings.changed(type_k="F32", type_v="F32", flash_attn="on")
        with contextlib.suppress(EngineCrash):
            return self._keep(f"rounded-{'-'.join(types)}", self._cells, plain, WHOLE, taps, rounded=types)
        return None

    def _keep(
        self,
        name: str,
        cells: Exerciser,
        settings: EngineSettings,
        feed: Feed,
        taps: Sequence[str],
        *,
        rounded: tuple[str, str] | None = None,
    ) -> Capture:
        name = f"{name}-{feed.way}{'-taps' if taps else ''}"
        if name not in self._kept:
            out = self.folder / f"engine-{name}.safetensors"
            self.say(f"engine: {name}")
            run = cells.run(settings, out, feed=feed, taps=taps, overrides=self.overrides, rounded=rounded)
            if run.not_run is not None:
                raise EngineCrash(run.not_run, kind="refused")
            self._kept[name] = run
        return self._kept[name].open()

    def close(self) -> None:
        self._cells.close()
        for run in self._kept.values():
            delete(run)
        self._kept.clear()

    def __enter__(self) -> CellRuns:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
