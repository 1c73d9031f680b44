"""A report that fits a GitHub issue: at most `MAX_LINES` lines, whatever the run found."""

from __future__ import annotations

import re
from collections.abc import Sequence

from diffharness.records import RunRecord
from diffharness.report import _content, engines, noise
from diffharness.report._content import Table
from diffharness.report._format import clean

MAX_LINES = 60
_FINDINGS = 6
_NOISE = 2
_LONGEST = 1200  # characters of one line

_SPECIAL = re.compile(r"([\\`*\[\]<>|~#]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))")


def to_markdown(record: RunRecord) -> str:
    """The verdict, what was tested, the legs, the first divergence, the worst taps, and how to do it again."""
    verdict = record.verdict
    lines = [f"### diffharness: {verdict.primary}", "", escape(clean(verdict.summary, _LONGEST)), ""]
    lines += _table(Table("", ("subject", ""), [(label, text) for label, text in _content.subject(record)]))
    lines += ["", *_table(_content.legs(record))]
    scores = _content.scores(record)
    if scores:
        names, values = zip(*scores, strict=True)
        lines += ["", *_table(Table("", ("perplexity", *map(escape, names)), [("", *values)], numeric=True))]
    divergence, affected = _content.divergence(record), _content.affected(record)
    told = [divergence, affected and f"Affected: {affected}"]
    told += [f"{label}: {text}" for label, text in [*_content.spread(record), *noise.pairs(record)[:_NOISE]]]
    if any(told):
        lines += ["", *(f"- {escape(text)}" for text in told if text)]
    taps = _content.worst_taps(record)
    if taps is not None:
        lines += ["", escape(taps.title), "", *_table(taps)]
    of_engines = engines.table(record)
    if of_engines is not None:
        lines += ["", escape(of_engines.title), "", *_table(of_engines)]
        lines += ["", *(f"- {escape(name)}: {escape(text)}" for name, text in engines.notes(record))]
    findings = _content.findings(record, _FINDINGS)
    if findings:
        lines += ["", *(f"- {escape(text)}" for text in findings)]
    if verdict.next_step:
        lines += ["", f"Next: {code(verdict.next_step)}"]
    if record.repro:
        lines += ["", f"Reproduce: {code(record.repro)}"]
    return "\n".join(lines[:MAX_LINES]) + "\n"


def escape(text: str) -> str:
    """Plain text that Markdown shows as it is; no mention of a GitHub user comes of it."""
    return _SPECIAL.sub(r"\\\1", text).replace("@", "@\u200b")


def code(text: str) -> str:
    """A code span around any one line of text."""
    shown = clean(text, _content.COMMAND)
    ticks = "`" * (max((len(run) for run in re.findall("`+", shown)), default=0) + 1)
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{ticks}{pad}{shown}{pad}{ticks}"


def _table(table: Table) -> list[str]:
    align = ["---", *("--:" if table.numeric else "---" for _ in table.head[1:])]
    return [_row(table.head), _row(align), *(_row([escape(cell) for cell in row]) for row in table.rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
