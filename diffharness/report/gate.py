"""The gate as a document: a line per rule, and below it what is beyond the limits."""

from __future__ import annotations

from collections.abc import Sequence

from diffharness.records.gate import GateRecord, RuleRow
from diffharness.report import _content
from diffharness.report._format import NONE, scientific, size
from diffharness.report.document import Document, Section, Table
from diffharness.report.grade_statistics import estimate

_SHOWN = 6  # offenders of a rule
_HEAD = ("rule", "status", "at", "measured", "limit")
_BOUND = {"at_most": "<=", "at_least": ">="}


def document(record: GateRecord) -> Document:
    """Every rule in the gate file's order."""
    about = record.subject
    pairs = [("artifact", f"{about.artifact.path} · {size(about.artifact.n_bytes)}")]
    if about.checkpoint is not None:
        pairs.append(("checkpoint", about.checkpoint.path))
    if about.fixture is not None:
        pairs.append(("fixture", _content.tokens(about.fixture)))
    pairs.append(("gate", record.gate))
    scores = record.scores
    shown = [(name, found) for name, found in (("checkpoint", scores.checkpoint), ("artifact", scores.artifact),
             ("artifact by llama.cpp", scores.engine)) if found is not None]  # fmt: skip
    if shown:
        pairs.append(("perplexity", " · ".join(f"{name} {estimate(found, 4)}" for name, found in shown)))
    rows = [_row(rule) for rule in record.rules]
    sections = [Section(pairs=pairs), Section(tables=[Table("", _HEAD, rows)], words=3)]
    sections += [
        Section(f"Beyond the limit: {rule.name}", remarks=_some(rule.offenders))
        for rule in record.rules
        if rule.status == "fail" and rule.offenders
    ]
    commands = [("Reproduce", record.repro)] if record.repro else []
    return Document("gate", record.outcome, record.summary, sections, commands)


def _some(offenders: Sequence[str]) -> list[str]:
    rest = len(offenders) - _SHOWN
    return [*offenders[:_SHOWN], *([f"and {rest} more in the record"] if rest > 0 else [])]


def _row(rule: RuleRow) -> tuple[str, ...]:
    status = rule.status.replace("_", " ") + (" (optional)" if rule.optional and rule.status == "not_run" else "")
    return (rule.name, status, rule.message, measured(rule), limit(rule))


def measured(rule: RuleRow) -> str:
    """The value with its unit, as short as it can be without rounding to the limit's other side."""
    if rule.measured is None:
        return NONE
    value, most = rule.measured, rule.limit
    shown = (text for text in _shown(value) if most is None or _side(float(text), most) == _side(value, most))
    return next(shown, repr(value)) + rule.unit


def _shown(value: float) -> list[str]:
    """From few digits to many; cosines begin with six."""
    few = scientific(value) if 0 < abs(value) < 1e-3 else f"{value:.6g}" if 0.9 < value < 1 else f"{value:.4g}"
    return [few, *(f"{value:.{digits}g}" for digits in (6, 8, 12))]


def _side(value: float, most: float) -> int:
    return (value > most) - (value < most)


def limit(rule: RuleRow) -> str:
    """`<= 0`, `>= 0.99`, `<= 2%`."""
    return NONE if rule.limit is None else f"{_BOUND[rule.bound]} {rule.limit:g}{rule.unit}"
