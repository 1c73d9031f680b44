"""The report for a terminal of 100 columns: the Markdown report's content, laid out by rich."""

from __future__ import annotations

import io

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from diffharness.records import RunRecord
from diffharness.report import _content
from diffharness.report._content import Table
from diffharness.report._format import clean

_CELL = 24  # characters that a cell may ask for: a tap's name
_STYLES = {"pass": "green", "ok": "green", "fail": "red", "fails": "red", "agree": "green", "inconclusive": "yellow"}


def report(record: RunRecord) -> RenderableType:
    """Something that `Console.print` takes. Strings from files are never read as rich's markup."""
    verdict = record.verdict
    head = Text.assemble(
        ("verdict: ", "bold"), (verdict.primary, f"bold {_STYLES.get(verdict.primary, 'red')}"), overflow="fold"
    )
    parts: list[RenderableType] = [head, Text(clean(verdict.summary, 1200)), Text()]
    parts += [_pairs(_content.subject(record)), Text(), _legs(_content.legs(record))]
    scores = _content.scores(record)
    if scores:
        parts += [Text(), Text("Perplexity", style="bold"), _pairs(scores)]
    divergence, affected = _content.divergence(record), _content.affected(record)
    if divergence:
        parts += [Text(), Text(divergence)]
    told = [("Affected", affected)] if affected else []
    told += _content.spread(record)
    if told:
        parts += [Text(), _pairs(told)]
    taps = _content.worst_taps(record)
    if taps is not None:
        parts += [Text(), _table(taps)]
    findings = _content.findings(record)
    if findings:
        parts += [Text(), Text("Findings", style="bold"), *(_item(line) for line in findings)]
    return Group(*parts)


def commands(record: RunRecord) -> list[Text]:
    """The next step and this run's own command, each to be printed on one line however long: it is to be copied."""
    named = (("Next", record.verdict.next_step), ("Reproduce", record.repro))
    return [
        Text.assemble((f"{label}: ", "bold"), clean(command, _content.COMMAND)) for label, command in named if command
    ]


def print_record(record: RunRecord, console: Console) -> None:
    """Print the report; `console` decides on width and colours. A file or pipe gets no spaces at line ends."""
    if console.is_terminal:
        _render(record, console)
    else:
        console.out(to_text(record, width=console.width), end="", highlight=False)


def _render(record: RunRecord, console: Console) -> None:
    console.print(report(record))
    for command in commands(record):
        console.print()
        console.print(command, soft_wrap=True)


def to_text(record: RunRecord, *, width: int = 100) -> str:
    """The report as plain text, without colours."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        _render(record, console)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def _item(text: str) -> RenderableType:
    return Padding(Text(f"- {text}"), (0, 0, 0, 1))


def _pairs(rows: list[tuple[str, str]]) -> RichTable:
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(Text(label), Text(text))
    return grid


def _legs(table: Table) -> RenderableType:
    """The legs with their numbers; notes stand below each other, where they have room."""
    short = Table(table.title, table.head[:-1], [row[:-1] for row in table.rows])
    notes = [(row[0], row[-1]) for row in table.rows if row[-1]]
    shown = _table(short, words=3)
    return Group(shown, Text(), _pairs(notes)) if notes else shown


def _table(table: Table, words: int = 1) -> RenderableType:
    """A title of its own width and the columns, of which the first `words` are not numbers."""
    shown = RichTable(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for i, name in enumerate(table.head):
        longest = max((len(row[i]) for row in table.rows), default=0)
        shown.add_column(
            Text(name),
            justify="left" if i < words else "right",
            overflow="fold",
            header_style="dim",
            min_width=min(longest, _CELL),  # heads fold before cells do
        )
    for row in table.rows:
        shown.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    return Group(Text(table.title, style="bold"), shown)
