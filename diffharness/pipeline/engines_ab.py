"""Several engines in one run: each of the others native and strict, on the first one's files and ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffharness.captures import Capture
from diffharness.engine.models import EngineModel, OneFile
from diffharness.engine.runner import EVERY_TAP, LOGITS_ONLY, EngineCrash, EngineRun
from diffharness.engine.strict import strict_settings
from diffharness.legs import engines as engines_leg
from diffharness.legs.engines import EngineLogits
from diffharness.legs.saved import compare_captures
from diffharness.metrics import FloatArray, nll_per_position, nmse, perplexity
from diffharness.pipeline.crashes import crash_finding
from diffharness.pipeline.engine_runs import EngineRuns
from diffharness.pipeline.reference_runs import GraphRuns, experts_used
from diffharness.pipeline.strict_way import Chosen
from diffharness.pipeline.work import Work
from diffharness.records import EngineRow, Finding
from diffharness.settings import EngineSettings

_OF_THE_BUILD = frozenset({"lib_dir", "python"})


def ab_rows(
    work: Work, engine: EngineRuns, graph: GraphRuns | None, chosen: Chosen
) -> tuple[list[EngineRow], list[Finding]]:
    """The first engine's row and one for each of `work.request.others`, and what follows from them.

    Without others, or where the first's native run did not come to an end, there are no rows. `chosen` is the
    artifact as F32, `graph` the reference's passes against the first engine's strict run.
    """
    others, native = work.request.others, engine.native
    if not others:
        return [], []
    if native is None:
        message = f"the other engines were not run: {engine.reason or 'the first did not run'}"
        return [], [Finding(kind=None, leg=None, message=message)]
    reference, passes = _reference(graph)
    scored = work.inputs.fixture.scored_positions()
    of_first = EngineLogits(_logits(native), None if engine.strict is None else _logits(engine.strict))
    first = _row(work.request.engine, native.info, of_first.native, work)
    first.status = "first"
    if of_first.strict is not None and reference is not None:
        first.strict = nmse(of_first.strict[scored], reference[scored])
    rows, findings = [first], []
    for index, settings in enumerate(others, start=1):
        work.request.say(f"engine: {settings.name}")
        with work.timings.step(f"engine: {settings.name}"):
            other = _Other(work, settings, index)
            try:
                run = other.native()
            except EngineCrash as crash:
                found = crash_finding(f"{settings.name}, native", crash)
                refused = found.kind == "inconclusive"  # it is only this engine that says nothing
                findings.append(found.model_copy(update={"kind": None}) if refused else found)
                rows.append(EngineRow(name=settings.name, status="not_run", reason=crash.message))
                continue
            logits = EngineLogits(_logits(run), other.strict(chosen.model, findings))
            row = _row(settings, run.info, logits.native, work)
            row.settings = {k: v for k, v in native.settings.differences(settings).items() if k not in _OF_THE_BUILD}
            _first_tap(row, other, native, logits.native, of_first.native)
            judged = engines_leg.judge(
                row,
                first,
                logits,
                of_first,
                reference,
                scored,
                work.floors,
                first_passes=passes,
                model=str(work.request.model),
                routed=bool(experts_used(work.inputs.artifact)),
            )
        rows.append(judged.row)
        findings += judged.findings
    return rows, findings


class _Other:
    """One engine and where its captures go."""

    def __init__(self, work: Work, settings: EngineSettings, index: int) -> None:
        self.work, self.settings, self.index = work, settings, index
        self.artifact = OneFile(work.inputs.artifact.paths[0])

    def native(self) -> EngineRun:
        """As a user would run it. Raises EngineCrash."""
        return self.capture(self.settings, self.artifact, "native", LOGITS_ONLY)

    def strict(self, model: EngineModel, findings: list[Finding]) -> FloatArray | None:
        """Logits of the strict run, or a finding that says why there are none."""
        try:
            return _logits(self.capture(strict_settings(self.settings), model, "strict", LOGITS_ONLY))
        except EngineCrash as crash:
            findings.append(crash_finding(f"{self.settings.name}, strict", crash))
            return None

    def every_tap(self, settings: EngineSettings, what: str) -> Capture:
        """A native run with every tap, under this engine's settings or the first's."""
        return self.capture(settings, self.artifact, what, EVERY_TAP).open()

    def capture(self, settings: EngineSettings, model: EngineModel, what: str, taps: Sequence[str] | None) -> EngineRun:
        work = self.work
        out = work.folder / f"engine-{self.index}-{what}.safetensors"
        meta = {"fixture": work.inputs.fixture.ids_sha256, "artifact": work.inputs.artifact.label, "run": what}
        overrides = work.request.overrides
        return model.capture(settings, work.inputs.fixture.chunks(), out, taps=taps, overrides=overrides, meta=meta)


def _first_tap(row: EngineRow, other: _Other, native: EngineRun, logits: FloatArray, of_first: FloatArray) -> None:
    """Where two native runs that differ part first; both run again, with every tap."""
    tolerance = other.work.floors[engines_leg.SAME]
    if logits.shape != of_first.shape or nmse(logits, of_first) <= tolerance:
        return
    try:
        a = other.every_tap(native.settings, "first-every-tap")
        b = other.every_tap(other.settings, "every-tap")
    except EngineCrash:  # it lives without the callback, and the settings leg is about that
        return
    compared = compare_captures(row.name, a, b, tolerance=tolerance)
    row.first_tap, row.first_token = compared.first_tap, compared.first_token


def _row(settings: EngineSettings, info: Mapping[str, Any], logits: FloatArray, work: Work) -> EngineRow:
    fixture = work.inputs.fixture
    nll = nll_per_position(logits[fixture.scored_positions()], fixture.next_ids())
    return EngineRow(
        name=settings.name,
        status="same",
        version=info.get("version"),
        commit=info.get("commit"),
        bindings=info.get("bindings"),
        ppl=perplexity(nll),
    )


def _logits(run: EngineRun) -> FloatArray:
    return run.open().read("logits")


def _reference(graph: GraphRuns | None) -> tuple[FloatArray | None, bool]:
    """The reference's logits under the arithmetic that passed, and whether any did."""
    if graph is None:
        return None, False
    if graph.conventions is not None and graph.conventions.ok and graph.convention_logits is not None:
        return graph.convention_logits, True
    return graph.logits, graph.definition.ok
