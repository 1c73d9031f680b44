"""A grid's cells, one after another: judged, placed where they fail, gathered for leg and verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from diffharness.engine.exercising import Text
from diffharness.engine.runner import EngineRun
from diffharness.errors import BadInputError
from diffharness.legs.compare import Choice, highest, logit_stats
from diffharness.pipeline.cell_judge import CellJudge, Judged
from diffharness.pipeline.cell_runs import Base, CellRuns, Strict
from diffharness.pipeline.first_tap import Locator
from diffharness.pipeline.grids import Cell
from diffharness.pipeline.reference_runs import choice_of
from diffharness.pipeline.work import Work
from diffharness.records import Finding, LogitStats, SettingsPair
from diffharness.records.matrix import CellRow
from diffharness.weights.gguf_file import GgufFile

_WINDOW = "attention.sliding_window"
_EXPERTS = "expert_used_count"


@dataclass
class GridOutcome:
    """Rows in the grid's order, pairs for the settings leg, and findings of cells that died."""

    rows: list[CellRow] = field(default_factory=list)
    pairs: list[SettingsPair] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    noise: LogitStats | None = None  # base against strict engine


def run_grid(
    work: Work, cells: Sequence[Cell], base: EngineRun, strict: Strict | None, *, taps: bool = False
) -> GridOutcome:
    """Every cell against `base`, whose capture holds the logits of the whole fixture.

    Without `strict` cells that round otherwise are not judged; without its file, failing ones are placed less sharply.
    With `taps` every cell that differs at all is placed, not only those that fail. Raises OutputError.
    """
    artifact, fixture, request = work.inputs.artifact, work.inputs.fixture, work.request
    arch = str(artifact.metadata["general.architecture"])
    meta = {"fixture": fixture.ids_sha256, "artifact": artifact.label}
    text = Text(artifact.paths[0], arch, fixture.chunks(), meta)
    held = Base(base.settings, base.open().read("logits"), base.load_s + base.eval_s)
    found: dict[str, Judged] = {}
    with CellRuns(text, held, strict, work.folder, overrides=request.overrides, say=request.say) as runs:
        judge = CellJudge(runs, work.floors, windowed=_number(artifact, _WINDOW) is not None)
        locator = Locator(judge, _choice(artifact))
        for cell in judge.order(cells):
            request.say(f"cell: {cell.label}")
            judged = found[cell.label] = judge.judge(cell)
            differs = judged.pair is not None and judged.pair.nmse > 0
            if judged.row.status == "fail" or (taps and differs):
                locator.place(cell, judged)
    noise, ordered = judge.noise, [found[cell.label] for cell in cells]
    return GridOutcome(
        rows=[one.row for one in ordered],
        pairs=[one.pair for one in ordered if one.pair is not None],
        findings=[finding for one in ordered for finding in one.findings],
        noise=None if noise is None else logit_stats(noise),
    )


def _choice(artifact: GgufFile) -> Choice | None:
    """How the model chooses experts; by their logits alone, where the reference does not know the architecture."""
    try:
        return choice_of(artifact)
    except BadInputError:
        top_k = _number(artifact, _EXPERTS)
        return None if top_k is None else highest(top_k)


def _number(artifact: GgufFile, key: str) -> int | None:
    value = artifact.metadata.get(f"{artifact.metadata['general.architecture']}.{key}")
    return value if isinstance(value, int) and value > 0 else None
