"""Cells of a settings grid, run one after another in workers that keep the model loaded.

Decision: one worker serves the cells whose settings load the model alike (build, mmap, extra buffers, layers on
a GPU, overrides), each in a context of its own. What is shared are weights that nothing writes to. A worker in
which a cell died, hung or was refused ends with it, and the next cell gets a new one; so a death is that cell's
only, and costs one loading of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffharness.captures import Capture
from diffharness.engine import feeding
from diffharness.engine.feeding import LOGITS, Feed
from diffharness.engine.process import Dialogue
from diffharness.engine.runner import check_overrides
from diffharness.settings import EngineSettings

LOADING = ("n_gpu_layers", "extra_bufts", "use_mmap", "lib_dir", "python")


@dataclass(frozen=True)
class Text:
    """What every cell evaluates: a model, ids by chunk, and what the engine is told of the model besides."""

    model: Path
    arch: str
    chunks: Sequence[NDArray[np.int64]]
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CellRun:
    """What a cell gave. Without a capture the model cannot do it, for the reason in `not_run`."""

    capture: Path | None
    rows: dict[str, NDArray[np.int64]]  # recorded rows, by logits' name
    not_run: str | None = None
    eval_s: float = 0.0

    def open(self) -> Capture:
        assert self.capture is not None, "a cell that did not run has no capture"
        return Capture(self.capture)


class Exerciser:
    """Runs cells. Close it, or use it as a context manager: no process is left then."""

    def __init__(self, text: Text) -> None:
        self.text = text
        self._dialogue: Dialogue | None = None
        self._loaded: dict[str, Any] = {}

    def run(
        self,
        settings: EngineSettings,
        out: Path,
        *,
        feed: Feed | None = None,
        taps: Sequence[str] = (),
        overrides: Sequence[str] = (),
        rounded: tuple[str, str] | None = None,
        trace: bool = False,
    ) -> CellRun:
        """One cell; a feed of several phases takes a new process for each.

        `taps` as in `Engine.capture`. `rounded` are the types that keys and values are rounded to as they are
        stored, see `kv_rounding`. With `trace` nothing is captured. Raises EngineCrash, OutputError.
        """
        check_overrides(overrides)
        feed = feed or Feed()
        settings = settings.changed(n_seq_max=max(settings.n_seq_max, feed.n_seq))
        lengths = [len(chunk) for chunk in self.text.chunks]
        longest = max(feeding.positions(feed, n) for n in lengths)
        n_ctx = longest * settings.n_seq_max
        state = out.with_name(out.name + ".state")
        by_phase = feeding.scripts(feed, lengths, min(settings.n_batch, n_ctx), str(state))
        request = {
            "settings": settings.model_dump(mode="json"),
            "chunks": [[int(token) for token in chunk] for chunk in self.text.chunks],
            "out": str(out),
            "taps": list(taps),
            "meta": dict(self.text.meta),
            "arch": self.text.arch,
            "n_ctx": n_ctx,
            "rounded": rounded,
            "trace": trace,
        }
        answer: dict[str, Any] = {}
        try:
            for i, scripts in enumerate(by_phase):
                if i:
                    self.close()
                answer = self._ask(settings, overrides, {**request, "scripts": scripts})
                if answer["not_run"] is not None:
                    return CellRun(None, {}, not_run=answer["not_run"])
        finally:
            for path in (out.with_name(out.name + ".part"), *(Path(f"{state}.{i}") for i in range(len(lengths)))):
                path.unlink(missing_ok=True)
        rows = {name: _rows(spans) for name, spans in answer["rows"].items()}
        return CellRun(None if trace else out, rows, eval_s=answer["eval_s"])

    def _ask(self, settings: EngineSettings, overrides: Sequence[str], request: Mapping[str, Any]) -> dict[str, Any]:
        loading = {name: request["settings"][name] for name in LOADING} | {"overrides": list(overrides)}
        loading["time_limit_s"] = settings.time_limit_s
        if self._dialogue is None or self._dialogue.closed or loading != self._loaded:
            self.close()
            job = {
                "kind": "serve_cells",
                "model": str(self.text.model.absolute()),
                "settings": request["settings"],
                "overrides": list(overrides),
            }
            self._dialogue, self._loaded = Dialogue(settings, job), loading
        answer = None
        try:
            answer = self._dialogue.ask(request)
        finally:
            if answer is None:  # one that was refused may have left something behind, if only its last words
                self.close()
        return answer

    def close(self) -> None:
        """End the worker. A later cell starts a new one."""
        if self._dialogue is not None:
            self._dialogue.close()
            self._dialogue = None

    def __enter__(self) -> Exerciser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _rows(spans: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    return np.concatenate([np.arange(start, stop) for start, stop in spans]).astype(np.int64)


def delete(run: CellRun) -> None:
    """Its capture, which may be as large as all logits of a text."""
    if run.capture is not None:
        with suppress(OSError):
            run.capture.unlink(missing_ok=True)


__all__ = ["LOGITS", "CellRun", "Exerciser", "Text", "delete"]
