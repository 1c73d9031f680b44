"""The table of `diffharness matrix`: how far each cell is from the base and the strict engine, and what is allowed."""

from __future__ import annotations

from collections import Counter
from typing import get_args

from diffharness.records.matrix import CellRow, CellStatus, MatrixRecord
from diffharness.report import _content
from diffharness.report._format import NONE, decimals, percent, scientific
from diffharness.report.document import Document, Section, Table
from diffharness.settings import EngineSettings


def document(record: MatrixRecord) -> Document:
    """The record as a document."""
    remarks = _remarks(record)
    sections = [
        Section(pairs=_about(record), tables=[_cells(record)] if record.cells else [], words=2),
        *([Section("Remarks", remarks=remarks)] if remarks else []),
    ]
    next_step = record.verdict.next_step
    commands = [("Next", next_step)] if next_step else []
    return Document(
        command="matrix",
        outcome=record.verdict.primary,
        summary=record.verdict.summary,
        sections=sections,
        commands=[*commands, *([("Reproduce", record.repro)] if record.repro else [])],
    )


def _about(record: MatrixRecord) -> list[tuple[str, str]]:
    subject = record.subject
    about = [("artifact", _content.artifact(subject.artifact))]
    if subject.fixture is not None:
        about.append(("fixture", _content.tokens(subject.fixture)))
    if subject.engine is not None:
        about.append(("engine", f"llama.cpp {subject.engine.version or 'of unknown version'}"))
    base = record.base
    told = [f"{key} {value}" for key, value in _changed(base.settings).items()]
    text = ", ".join(told) or "as asked for"
    if base.survived is not None:
        text = f"with {base.survived}, since it dies as asked for; {text}"
    if base.strict is not None:
        text += f"; {scientific(base.strict.nmse)} NMSE from the {base.control}, top-1 {percent(base.strict.top1)}"
    about.append(("base", text))
    counts = Counter(row.status for row in record.cells)
    told = [f"{counts[status]} {status}" for status in get_args(CellStatus) if counts[status]]
    about.append(("cells", ", ".join(told) or "none was run"))
    return about


def _changed(settings: dict[str, object]) -> dict[str, object]:
    defaults = EngineSettings().model_dump(mode="json")
    return {key: value for key, value in settings.items() if key not in ("name",) and value != defaults.get(key)}


def _cells(record: MatrixRecord) -> Table:
    """The place is told only where a cell has one."""
    head: tuple[str, ...] = ("cell", "", "NMSE", "bound", "token", "KL", "top-1", "strict")
    rows = [_row(row) for row in record.cells]
    if all(row[-1] == NONE for row in rows):
        rows = [row[:-1] for row in rows]
    else:
        head = (*head, "first at")
    return Table("NMSE from the base, the worst token as a share of its bound, NMSE from the strict engine", head, rows)


def _row(row: CellRow) -> tuple[str, ...]:
    logits, strict = row.logits, row.strict
    share = None if row.token_nmse is None or not row.token_bound else row.token_nmse / row.token_bound
    return (
        row.label,
        "fails" if row.status == "fail" else row.status,
        scientific(None if logits is None else logits.nmse),
        scientific(row.bound),
        decimals(share, 2),
        scientific(None if logits is None else logits.kl_mean),
        percent(None if logits is None else logits.top1),
        scientific(None if strict is None else strict.nmse),
        _first(row),
    )


def _first(row: CellRow) -> str:
    if row.first_tap is None:
        return NONE
    return row.first_tap if row.first_token is None else f"{row.first_tap} @{row.first_token}"


def _remarks(record: MatrixRecord) -> list[str]:
    remarks = []
    against = {row.against for row in record.cells} - {"base"}
    for way in sorted(against):
        labels = ", ".join(row.label for row in record.cells if row.against == way)
        remarks.append(f"compared with the base fed as `{way}`, not with the whole text at once: {labels}")
    remarks += [f"{row.label}: {row.status}: {row.reason}" for row in record.cells if row.reason]
    lossy = ", ".join(row.label for row in record.cells if row.lossy and row.control is not None)
    remarks += [f"judged by a control with the same rounding of keys and values: {lossy}"] if lossy else []
    told = record.verdict.summary
    remarks += [finding.message for finding in record.findings if finding.message not in told]
    return remarks
