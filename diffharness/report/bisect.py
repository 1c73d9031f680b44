"""What a bisection prints: each engine that was run, and the first that changed."""

from __future__ import annotations

from diffharness.records.bisect import BisectRecord, StepRow
from diffharness.report import _content
from diffharness.report._format import NONE, decimals, percent, scientific
from diffharness.report.document import Document, Section, Table

_NUMBERS = ("logits NMSE", "mean KL", "top-1", "perplexity")
_OUTCOMES = {"unchanged": "pass", "changed": "fail", "unclear": "inconclusive"}


def document(record: BisectRecord) -> Document:
    """The report, for a terminal of 100 columns and for Markdown."""
    pairs = [("artifact", _content.artifact(record.artifact))]
    if record.fixture is not None:
        pairs.append(("fixture", _content.tokens(record.fixture)))
    what = {"verdict": "the verdict", "numbers": "the numbers", "either": "the verdict or the numbers"}[record.on]
    floor = "" if record.on == "verdict" else f", logits NMSE above {scientific(record.floor)}"
    pairs += [
        ("looked for", f"the first engine with which {what} change{'s' if record.on == 'verdict' else ''}{floor}"),
        ("engines", f"{len(record.engines)}, of which {len(record.steps)} were run"),
    ]
    ordered = sorted(record.steps, key=lambda step: step.index)
    judged = any(step.verdicts for step in ordered)
    head = ("#", "engine", "state", "build", *(("verdict",) if judged else ()), *_NUMBERS)
    table = Table("", head, [_row(step, judged) for step in ordered])
    sections = [Section(pairs=pairs), Section("Engines", tables=[table], words=len(head) - len(_NUMBERS))]
    reasons = [f"{step.engine}: {step.reason}" for step in ordered if step.reason]
    if reasons:
        sections.append(Section(remarks=reasons))
    commands = [("Next", record.next_step), ("Reproduce", record.repro)]
    return Document(
        command="bisect",
        outcome=_OUTCOMES[record.outcome],
        summary=record.summary,
        sections=sections,
        commands=[(label, command) for label, command in commands if command],
    )


def _row(step: StepRow, judged: bool) -> tuple[str, ...]:
    build = " ".join(part for part in (step.version, step.commit) if part)
    logits = step.logits
    numbers = (
        (NONE, NONE, NONE)
        if logits is None
        else (scientific(logits.nmse), scientific(logits.kl_mean), percent(logits.top1))
    )
    verdict = (step.verdicts[0] if step.verdicts else NONE,) if judged else ()
    return (str(step.index), step.engine, step.state, build or NONE, *verdict, *numbers, decimals(step.ppl))


def line(step: StepRow) -> str:
    """One engine as a line of progress."""
    parts = [f"{step.index}: {step.engine}", step.state]
    if step.verdicts:
        parts.append(", ".join(step.verdicts))
    if step.logits is not None and step.state == "same":
        parts.append(f"logits NMSE {scientific(step.logits.nmse)}")
    if step.reason:
        parts.append(step.reason)
    return " · ".join(parts)
