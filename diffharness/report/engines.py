"""The reports' part on several engines: a row for each, against the first."""

from __future__ import annotations

from diffharness.records import EngineRow, RunRecord
from diffharness.report._content import Table
from diffharness.report._format import NONE, clean, decimals, percent, scientific


def table(record: RunRecord) -> Table | None:
    """Nothing where one engine ran alone. `strict` is NMSE from the reference, `parts at` the first tap and token."""
    if not record.engines:
        return None
    head = ("engine", "native", "NMSE", "mean KL", "top-1", "perplexity", "strict", "parts at")
    title = "Engines: native logits against the first engine's, strict ones against the reference"
    return Table(title, head, [_row(row) for row in record.engines], numeric=True)


def notes(record: RunRecord) -> list[tuple[str, str]]:
    """What each engine is, settings other than the first's, and why it did not run."""
    told = []
    for row in record.engines:
        build = " ".join(part for part in (row.version, row.commit) if part and part != "unknown")
        settings = ", ".join(f"{key} {value}" for key, value in row.settings.items())
        text = " · ".join(part for part in (build and f"llama.cpp {build}", row.bindings, settings, row.reason) if part)
        if text:
            told.append((clean(row.name, 60), clean(text, 240)))
    return told


def _row(row: EngineRow) -> tuple[str, ...]:
    logits = row.logits
    numbers = (
        (NONE, NONE, NONE)
        if logits is None
        else (scientific(logits.nmse), scientific(logits.kl_mean), percent(logits.top1))
    )
    place = NONE if row.first_tap is None else f"{row.first_tap} @{row.first_token}"
    state = row.status.replace("_", " ")
    return (clean(row.name, 60), state, *numbers, decimals(row.ppl), scientific(row.strict), clean(place, 60))
