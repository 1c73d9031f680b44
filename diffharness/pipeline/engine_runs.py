"""The engine's runs: strict and native, with and without the callback; a death becomes a finding."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from diffharness.engine.runner import EVERY_TAP, LOGITS_ONLY, RESIDUALS, Engine, EngineCrash, EngineRun
from diffharness.engine.strict import strict_settings, write_strict
from diffharness.engine.survive import survive
from diffharness.legs import settings as settings_leg
from diffharness.metrics import compare_logits
from diffharness.pipeline.crashes import crash_finding, crash_reason
from diffharness.pipeline.work import Work
from diffharness.records import Finding, SettingsPair
from diffharness.settings import EngineSettings

log = logging.getLogger("diffharness")


@dataclass
class EngineRuns:
    """What the engine gave. A run that is None did not come to an end under any settings; `reason` says why."""

    strict: EngineRun | None = None
    native: EngineRun | None = None  # without the callback: what a user gets
    watched: EngineSettings | None = None  # of the native run with the callback, where one came to its end
    pairs: list[SettingsPair] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    reason: str | None = None

    @property
    def named(self) -> dict[str, EngineRun]:
        """The runs that there are, by name."""
        return {name: run for name, run in (("native", self.native), ("strict", self.strict)) if run is not None}


@contextmanager
def strict_file(work: Work) -> Iterator[Path]:
    """The artifact rewritten as F32, for as long as the block lasts."""
    path = work.folder / "strict.gguf"
    try:
        with work.timings.step("strict file"):
            work.request.say("writing the artifact as F32")
            write_strict(work.inputs.artifact, work.inputs.artifact, path)
        yield path
    finally:
        path.unlink(missing_ok=True)


def run_strict(work: Work, strict_path: Path) -> EngineRuns:
    """Strict with every tap, alone."""
    runs = EngineRuns()
    runs.strict = _run(runs, work, "strict, callback on", strict_settings(work.request.engine), strict_path, EVERY_TAP)
    return runs


def run_all(work: Work, strict_path: Path) -> EngineRuns:
    """Strict with every tap; native without the callback and with it, which must not matter."""
    runs, native = EngineRuns(), work.request.engine
    runs.strict = _run(runs, work, "strict, callback on", strict_settings(native), strict_path, EVERY_TAP)
    model = work.inputs.artifact.paths[0]
    runs.native = _run(runs, work, "native, callback off", native, model, LOGITS_ONLY)
    if runs.native is not None:
        on = _run(runs, work, "native, callback on", runs.native.settings, model, RESIDUALS)
        runs.watched = None if on is None else on.settings
        _compare_callback(runs, work, "native", runs.native, on)
    return runs


def confirm(runs: EngineRuns, work: Work, strict_path: Path) -> None:
    """Strict without the callback: before the engine is accused of what was captured with it."""
    if runs.strict is not None:
        off = _run(runs, work, "strict, callback off", runs.strict.settings, strict_path, LOGITS_ONLY)
        _compare_callback(runs, work, "strict", off, runs.strict)


def _compare_callback(runs: EngineRuns, work: Work, name: str, off: EngineRun | None, on: EngineRun | None) -> None:
    """Nothing if one of the two died, or survived only under other settings than the other."""
    if off is None or on is None or on.settings != off.settings:
        return
    plain, tapped = (run.open().read("logits") for run in (off, on))
    logits = compare_logits(plain, tapped, work.inputs.fixture.scored_positions())
    floor = work.floors["settings.callback"]
    runs.pairs.append(settings_leg.judge_pair(f"{name}, callback off", f"{name}, callback on", logits, floor=floor))


def _run(
    runs: EngineRuns, work: Work, what: str, settings: EngineSettings, model: Path, taps: Sequence[str] | None
) -> EngineRun | None:
    """One capture; after a death the same under the nearest settings that survive, and a finding."""
    request, fixture = work.request, work.inputs.fixture
    chunks, out = fixture.chunks(), work.folder / f"engine-{what.replace(', ', '-').replace(' ', '-')}.safetensors"
    meta = {"fixture": fixture.ids_sha256, "artifact": work.inputs.artifact.label, "run": what}
    request.say(f"engine: {what}")
    with work.timings.step(f"engine: {what}"):
        try:
            run = Engine(settings).capture(model, chunks, out, taps=taps, overrides=request.overrides, meta=meta)
            for line in run.log:
                log.debug("llama.cpp: %s", line)
            return run
        except EngineCrash as crash:
            if not crash.is_unusable:
                request.say(f"the engine died ({crash.message}); looking for settings that survive")
            found = survive(crash, settings, model, chunks, out, taps=taps, overrides=request.overrides, meta=meta)
            runs.findings.append(crash_finding(what, crash, found))
            if found.run is None:
                runs.reason = crash_reason(what, crash)
            return found.run
