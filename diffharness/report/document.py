"""What a command prints, once, for terminal and Markdown: a verdict line, pairs, tables, remarks, commands.

A command's own module turns its record into a `Document`; how that looks is decided here. Strings from files are made
harmless on the way out.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from diffharness.report._content import COMMAND, Table
from diffharness.report._format import clean
from diffharness.report.markdown import code, escape

__all__ = ["Document", "Section", "Table", "print_document", "to_markdown", "to_text"]

_CELL = 28  # characters that a cell may ask for before it folds
_LONGEST = 1200  # characters of one remark
STYLES = {"pass": "green", "ok": "green", "fail": "red", "agree": "green", "inconclusive": "yellow"}


@dataclass(frozen=True)
class Section:
    """A titled part: pairs of label and text, then tables, then remarks, each of which may be missing.

    `words` is how many leading columns of each table hold words; the others are numbers, set right.
    """

    title: str = ""
    pairs: Sequence[tuple[str, str]] = ()
    tables: Sequence[Table] = ()
    remarks: Sequence[str] = ()
    words: int = 1


@dataclass(frozen=True)
class Document:
    """`outcome` is a verdict kind, or pass or fail, or empty where the command judges nothing."""

    command: str
    outcome: str
    summary: str
    sections: Sequence[Section] = ()
    commands: Sequence[tuple[str, str]] = field(default=())  # label, command line to be copied


def print_document(document: Document, console: Console) -> None:
    """Print it; `console` decides on width and colours. What goes into a file or pipe has no spaces at line ends."""
    if console.is_terminal:
        _render(document, console)
    else:
        console.out(to_text(document, width=console.width), end="", highlight=False)


def to_text(document: Document, *, width: int = 100) -> str:
    """The document as plain text, without colours."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        _render(document, console)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def to_markdown(document: Document) -> str:
    """The same as Markdown, to be pasted."""
    lines = [f"### diffharness {document.command}" + (f": {document.outcome}" if document.outcome else ""), ""]
    lines += [_escaped(document.summary), ""] if document.summary else []
    for section in document.sections:
        lines += [f"**{_escaped(section.title)}**", ""] if section.title else []
        if section.pairs:
            lines += ["| | |", "| --- | --- |"]
            lines += [f"| {_escaped(label)} | {_escaped(text)} |" for label, text in section.pairs] + [""]
        for table in section.tables:
            lines += [_escaped(table.title), ""] if table.title else []
            marks = ["---" if i < section.words else "--:" for i in range(len(table.head))]
            lines.append(f"| {' | '.join(map(_escaped, table.head))} |")
            lines.append(f"| {' | '.join(marks)} |")
            lines += [f"| {' | '.join(map(_escaped, row))} |" for row in table.rows] + [""]
        lines += [f"- {_escaped(remark)}" for remark in section.remarks] + ([""] if section.remarks else [])
    for label, command in document.commands:
        lines += [f"{label}: {code(command)}", ""]
    return "\n".join(lines).rstrip() + "\n"


def _render(document: Document, console: Console) -> None:
    console.print(_body(document))
    for label, command in document.commands:
        console.print()
        console.print(Text.assemble((f"{label}: ", "bold"), clean(command, COMMAND)), soft_wrap=True)


def _body(document: Document) -> RenderableType:
    parts: list[RenderableType] = []
    if document.outcome:
        style = STYLES.get(document.outcome, "red")
        label = "" if document.outcome in ("pass", "fail") else "verdict: "
        parts.append(Text.assemble((label, "bold"), (document.outcome, f"bold {style}"), overflow="fold"))
    if document.summary:
        parts.append(Text(clean(document.summary, _LONGEST)))
    for section in document.sections:
        parts.append(Text())
        if section.title:
            parts.append(Text(clean(section.title), style="bold"))
        if section.pairs:
            parts.append(_pairs(section.pairs))
        for i, table in enumerate(section.tables):
            parts += ([Text()] if i or section.pairs else []) + [_table(table, section.words)]
        parts += [Padding(_hanging(clean(remark, _LONGEST)), (0, 0, 0, 1)) for remark in section.remarks]
    return Group(*parts)


def _hanging(remark: str) -> RichTable:
    """A dash, and the remark beside it however many lines it takes."""
    grid = RichTable.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text("-"), Text(remark))
    return grid


def _pairs(rows: Sequence[tuple[str, str]]) -> RichTable:
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(Text(clean(label)), Text(clean(text, _LONGEST)))
    return grid


def _table(table: Table, words: int) -> RenderableType:
    shown = RichTable(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for i, name in enumerate(table.head):
        longest = max((len(row[i]) for row in table.rows), default=0)
        shown.add_column(
            Text(name),
            justify="left" if i < words else "right",
            overflow="fold",
            header_style="dim",
            min_width=min(longest, _CELL),
        )
    for row in table.rows:
        shown.add_row(*(Text(clean(cell), style=STYLES.get(cell, "")) for cell in row))
    return Group(Text(table.title, style="bold"), shown) if table.title else shown


def _escaped(text: str) -> str:
    return escape(clean(text, _LONGEST))
