"""The reports' part on several engines: a row for each, against the first."""

from __future__ import annotations

from diffharness.records import EngineRow, RunRecord
from diffharness.report._content import Table
from diffharness.report._format import NONE, clean, decimals, percent, scientific


def table(record: RunRecord) -> Table | None:
    """Nothing where one engine ran alone."""
    if not record.engines:
        return None
    head = ("engine", "build", "", "NMSE", "mean KL", "top-1", "perplexity", "strict", "first tap", "token")
    title = "Engines: native logits against the first; strict runs against the reference"
    return Table(title, head, [_row(row) for row in record.engines], numeric=True)


def notes(record: RunRecord) -> list[tuple[str, str]]:
    """Why an engine did not run, and other settings than the first's, by engine."""
    told = []
    for row in record.engines:
        settings = ", ".join(f"{key} {value}" for key, value in row.settings.items())
        text = "; ".join(part for part in (row.reason, settings) if part)
        if text:
            told.append((clean(row.name, 60), clean(text, 240)))
    return told


def _row(row: EngineRow) -> tuple[str, ...]:
    build = " ".join(part for part in (row.version, row.commit) if part)
    logits = row.logits
    numbers = (
        (NONE, NONE, NONE)
        if logits is None
        else (scientific(logits.nmse), scientific(logits.kl_mean), percent(logits.top1))
    )
    build_and_state = (clean(build, 40) or NONE, row.status.replace("_", " "))
    place = (clean(row.first_tap or NONE, 40), NONE if row.first_token is None else str(row.first_token))
    return (clean(row.name, 60), *build_and_state, *numbers, decimals(row.ppl), scientific(row.strict), *place)
