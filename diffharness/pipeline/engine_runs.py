"""The engine's runs: strict and native, each with and without the callback; a death becomes a finding."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from diffharness.engine.runner import Engine, EngineCrash, EngineRun
from diffharness.engine.strict import strict_settings, write_strict
from diffharness.engine.survive import survive
from diffharness.legs import settings as settings_leg
from diffharness.metrics import compare_logits
from diffharness.pipeline.crashes import crash_finding
from diffharness.pipeline.work import Work
from diffharness.records import Finding, SettingsPair
from diffharness.settings import EngineSettings

log = logging.getLogger("diffharness")
_EVERY_TAP: None = None
_RESIDUALS = ("token_embd", "blk.*.layer_out")  # enough to split the graph in every layer
_NO_CALLBACK: Sequence[str] = ()


@dataclass
class EngineRuns:
    """What the engine gave. A run that is None did not come to an end under any settings; `reason` says why."""

    strict: EngineRun | None = None
    native: EngineRun | None = None  # without the callback: what a user gets
    pairs: list[SettingsPair] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    reason: str | None = None

    @property
    def named(self) -> dict[str, EngineRun]:
        """The runs that there are, by name."""
        return {name: run for name, run in (("native", self.native), ("strict", self.strict)) if run is not None}


def run_all(work: Work) -> EngineRuns:
    """Strict on the artifact rewritten as F32, native on the artifact; callback on against off for both."""
    runs, native = EngineRuns(), work.request.engine
    strict_file = work.folder / "strict.gguf"
    try:
        with work.timings.step("strict file"):
            work.request.say("writing the artifact as F32")
            write_strict(work.inputs.artifact, work.inputs.artifact, strict_file)
        _, runs.strict = _both(runs, work, "strict", strict_settings(native), strict_file, _EVERY_TAP)
    finally:
        strict_file.unlink(missing_ok=True)
    runs.native, _ = _both(runs, work, "native", native, work.inputs.artifact.paths[0], _RESIDUALS)
    return runs


def _both(
    runs: EngineRuns, work: Work, name: str, settings: EngineSettings, model: Path, taps: Sequence[str] | None
) -> tuple[EngineRun | None, EngineRun | None]:
    """Without the callback, then with it and `taps`; what survives the first is what the second runs under."""
    off = _run(runs, work, f"{name}, callback off", settings, model, _NO_CALLBACK)
    if off is None:
        return None, None
    on = _run(runs, work, f"{name}, callback on", off.settings, model, taps)
    if on is not None and on.settings == off.settings:
        plain, tapped = (run.open().read("logits") for run in (off, on))
        logits = compare_logits(plain, tapped, work.inputs.fixture.scored_positions())
        floor = work.floors["settings.callback"]
        runs.pairs.append(settings_leg.judge_pair(f"{name}, callback off", f"{name}, callback on", logits, floor=floor))
    return off, on


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
            request.say(f"the engine died ({crash.message}); looking for settings that survive")
            found = survive(crash, settings, model, chunks, out, taps=taps, overrides=request.overrides, meta=meta)
            runs.findings.append(crash_finding(what, crash, found))
            if found.run is None:
                runs.reason = f"the engine {'refused' if crash.kind == 'refused' else 'died'} ({what}): {crash.message}"
            return found.run
