"""The settings leg within a run: the callback's pairs, and the grid's cells on the native run."""

from __future__ import annotations

from diffharness.legs import settings as settings_leg
from diffharness.legs.settings import SettingsOutcome
from diffharness.pipeline.cell_runs import WHOLE, Strict
from diffharness.pipeline.engine_runs import EngineRuns
from diffharness.pipeline.grid_run import run_grid
from diffharness.pipeline.grids import load_grid
from diffharness.pipeline.work import Work


def run_all(work: Work, engine: EngineRuns) -> SettingsOutcome:
    """The callback's pairs, and the grid's cells on the native run."""
    if engine.native is None or work.request.grid is None:
        return settings_leg.judge(engine.pairs, reason=engine.reason)
    artifact = work.inputs.artifact
    if artifact.metadata.get(f"{artifact.arch}.attention.causal") is False:
        return settings_leg.judge(engine.pairs, reason="a model that is not causal takes a text at once")
    with work.timings.step("settings"):
        strict = None if engine.strict is None else Strict(engine.strict.open().read("logits"))
        cells = run_grid(work, load_grid(work.request.grid), engine.native, strict)
    # The leg passes without the cells that were not compared, and says why; the base's own setting is none of them.
    unheard = [
        f"{row.label}: {row.reason}"
        for row in cells.rows
        if row.status == "not judged" or (row.status == "not run" and (row.changes or row.feed != WHOLE.way))
    ]
    reason = "; ".join(part for part in (engine.reason, *unheard) if part) or None
    judged = settings_leg.judge([*engine.pairs, *cells.pairs], reason=reason)
    return SettingsOutcome(judged.leg, judged.first_divergence, [*judged.findings, *cells.findings])
