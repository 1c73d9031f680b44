"""What an explanation prints: the answer, the hypotheses with their errors before and after, and else the facts."""

from __future__ import annotations

from diffharness.records.explain import ExplainRecord, Explanation, Facts, HypothesisRow
from diffharness.report import _content
from diffharness.report._format import NONE, clean, scientific
from diffharness.report.document import Document, Section, Table
from diffharness.words import listed

_RATIOS = 24  # taps whose factor is shown
_LONGEST = 160  # characters of a hypothesis in a table


def document(record: ExplainRecord) -> Document:
    """The report, for a terminal of 100 columns and for Markdown."""
    told = record.explanation
    sections = [Section(pairs=_subject(record))]
    if told is not None:
        sections += [_hypotheses(told)] if told.hypotheses else []
        sections += [_facts(told.facts)] if told.facts is not None else []
    findings = [
        f"{f.kind or 'note'}: {f.message}"
        for f in record.findings
        if f.message not in record.verdict.summary and f.kind != "engine.graph"
    ]
    if findings:
        sections.append(Section("Findings", remarks=findings))
    commands = [("Next", record.verdict.next_step), ("Reproduce", record.repro)]
    return Document(
        command="explain",
        outcome=record.verdict.primary,
        summary=_summary(record),
        sections=sections,
        commands=[(label, command) for label, command in commands if command],
    )


def _summary(record: ExplainRecord) -> str:
    if record.explanation is None:
        nothing = "There is nothing to explain: " if record.verdict.primary == "agree" else ""
        return nothing + record.verdict.summary
    answer = record.explanation.answer
    return answer[:1].upper() + answer[1:] + ("" if answer.endswith(".") else ".")


def _subject(record: ExplainRecord) -> list[tuple[str, str]]:
    about, first, told = record.subject, record.first_divergence, record.explanation
    rows = [("artifact", _content.artifact(about.artifact))]
    if about.fixture is not None:
        rows.append(("fixture", _content.tokens(about.fixture)))
    if about.engine is not None and about.engine.overrides:
        rows.append(("overrides", ", ".join(about.engine.overrides)))
    if first is not None:
        where = f" from token {first.token} on" if first.token else ""
        rows.append(("first divergence", f"{first.tap}{where}, local NMSE {scientific(first.nmse_local)}"))
    if record.graph.affected:
        rows.append(("affected", record.graph.affected))
    if told is not None:
        ended = ", where the search ended" if told.exhausted else ""
        rows.append(
            ("search", f"{told.tried} hypotheses, {told.evaluations} of at most {told.budget} evaluations{ended}")
        )
    return rows


def _hypotheses(told: Explanation) -> Section:
    first = told.hypotheses[0]
    title = f"The engine behaves as if ... (NMSE at {first.tap}, and of the logits end to end)"
    head = ("", "fits", "local before", "after", "logits before", "after")
    return Section(title, tables=[Table("", head, [_row(row) for row in told.hypotheses])], words=2)


def _row(row: HypothesisRow) -> tuple[str, ...]:
    says = f"{row.says} ({row.places})" if row.places else row.says
    return (
        clean(says, _LONGEST),
        row.fits + (", as well" if row.equal else ""),
        scientific(row.local_before),
        scientific(row.local_after),
        scientific(row.logits_before),
        scientific(row.logits_after),
    )


def _facts(facts: Facts) -> Section:
    ratios = [(tap, f"{value:.6g}") for tap, value in list(facts.ratios.items())[:_RATIOS]]
    remarks = list(facts.words)
    for name, values in facts.rotation.items():
        remarks.append(f"{name}: {listed([f'{value:.5g}' for value in values], 16)}")
    table = Table("engine / reference, by least squares", ("tap", "factor"), ratios or [(NONE, NONE)])
    return Section("What is known", tables=[table], remarks=remarks)
