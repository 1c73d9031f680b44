"""The engine's runs: strict and native, with and without the callback; a death becomes a finding.

The strict engine's model is a file or slices of layers (`strict_way`); its capture is one either way.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from diffharness.engine.models import EngineModel, OneFile
from diffharness.engine.runner import EVERY_TAP, LOGITS_ONLY, RESIDUALS, EngineCrash, EngineRun
from diffharness.engine.slicing import SlicedStrict, described
from diffharness.engine.strict import strict_settings
from diffharness.engine.survive import survive
from diffharness.legs import settings as settings_leg
from diffharness.metrics import compare_logits
from diffharness.pipeline.crashes import crash_finding, crash_reason, same_refusal
from diffharness.pipeline.strict_way import Chosen
from diffharness.pipeline.work import Work
from diffharness.records import Finding, SettingsPair, StrictWay
from diffharness.settings import EngineSettings

log = logging.getLogger("diffharness")

_CONFIRMED = 3  # slices that run once more before the engine is accused


@dataclass
class EngineRuns:
    """What the engine gave. A run that is None did not come to an end under any settings; `reason` says why."""

    strict: EngineRun | None = None
    way: StrictWay | None = None  # how the strict engine got its model
    native: EngineRun | None = None  # without the callback: what a user gets
    watched: EngineSettings | None = None  # of the native run with the callback, where one came to its end
    pairs: list[SettingsPair] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    reason: str | None = None

    @property
    def named(self) -> dict[str, EngineRun]:
        """The runs that there are, by name."""
        return {name: run for name, run in (("native", self.native), ("strict", self.strict)) if run is not None}


def run_strict(work: Work, chosen: Chosen) -> EngineRuns:
    """Strict with every tap, alone."""
    runs, settings = EngineRuns(way=chosen.way), strict_settings(work.request.engine)
    runs.strict = _run(runs, work, "strict, callback on", settings, chosen.model, EVERY_TAP)
    return runs


def run_all(work: Work, chosen: Chosen) -> EngineRuns:
    """Strict with every tap; native without the callback and with it, which must not matter."""
    return run_native(work, run_strict(work, chosen))


def run_native(work: Work, runs: EngineRuns) -> EngineRuns:
    """`runs`, with native without the callback and with it."""
    native = work.request.engine
    model = OneFile(work.inputs.artifact.paths[0])
    runs.native = _run(runs, work, "native, callback off", native, model, LOGITS_ONLY)
    if runs.native is not None:
        on = _run(runs, work, "native, callback on", runs.native.settings, model, RESIDUALS)
        runs.watched = None if on is None else on.settings
        _compare_callback(runs, work, "native", runs.native, on)
    return runs


def confirm(runs: EngineRuns, work: Work, chosen: Chosen, layers: Collection[int | None]) -> None:
    """Strict without the callback: before the engine is accused of what was captured with it.

    Of slices, which cannot be fed without it, the first that hold one of `layers` (the head: None) run alone, from what
    the slice before gave, once with it and once without.
    """
    if runs.strict is None:
        return
    if not isinstance(chosen.model, SlicedStrict):
        off = _run(runs, work, "strict, callback off", runs.strict.settings, chosen.model, LOGITS_ONLY)
        _compare_callback(runs, work, "strict", off, runs.strict)
        return
    assert runs.strict.capture is not None, "only a traced run has none"
    for part in chosen.model.holding(layers)[:_CONFIRMED]:
        model, what = chosen.model.alone(part, runs.strict.capture), f"strict {described(part)}"
        off = _run(runs, work, f"{what}, callback off", runs.strict.settings, model, LOGITS_ONLY)
        on = _run(runs, work, f"{what}, callback on", runs.strict.settings, model, EVERY_TAP)
        _compare_callback(runs, work, what, off, on)
        for run in (off, on):
            if run is not None and run.capture is not None:
                run.capture.unlink(missing_ok=True)


def _compare_callback(runs: EngineRuns, work: Work, name: str, off: EngineRun | None, on: EngineRun | None) -> None:
    """Nothing if one of the two died, or survived only under other settings than the other."""
    if off is None or on is None or on.settings != off.settings:
        return
    plain, tapped = (run.open().read("logits") for run in (off, on))
    logits = compare_logits(plain, tapped, work.inputs.fixture.scored_positions())
    floor = work.floors["settings.callback"]
    runs.pairs.append(settings_leg.judge_pair(f"{name}, callback off", f"{name}, callback on", logits, floor=floor))


def _run(
    runs: EngineRuns, work: Work, what: str, settings: EngineSettings, model: EngineModel, taps: Sequence[str] | None
) -> EngineRun | None:
    """One capture; after a death the same under the nearest settings that survive, and a finding."""
    request, fixture = work.request, work.inputs.fixture
    chunks, out = fixture.chunks(), work.folder / f"engine-{what.replace(', ', '-').replace(' ', '-')}.safetensors"
    meta = {"fixture": fixture.ids_sha256, "artifact": work.inputs.artifact.label, "run": what}
    request.say(f"engine: {what}")
    with work.timings.step(f"engine: {what}"):
        try:
            run = model.capture(settings, chunks, out, taps=taps, overrides=request.overrides, meta=meta)
            for line in run.log:
                log.debug("llama.cpp: %s", line)
            return run
        except EngineCrash as crash:
            if not crash.is_unusable:
                request.say(f"the engine died ({crash.message}); looking for settings that survive")
            found = survive(crash, settings, model, chunks, out, taps=taps, overrides=request.overrides, meta=meta)
            told = crash_finding(what, crash, found)
            runs.findings[:] = [finding for finding in runs.findings if not same_refusal(finding, told)]
            runs.findings.append(told)
            if found.run is None:
                runs.reason = crash_reason(what, crash)
            return found.run
