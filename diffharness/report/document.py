"""What a command prints, once, for terminal and Markdown: a verdict line, pairs, tables, remarks, commands.

A command's own module turns its record into a `Document`; how that looks is decided here. Strings from files are made
harmless on the way out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from diffharness.report._content import COMMAND, Table
from diffharness.report._format import clean
from diffharness.report._rich import LONGEST, STYLES, pairs, plain, print_on
from diffharness.report._rich import table as rich_table
from diffharness.report.markdown import code, escape

__all__ = ["Document", "Section", "Table", "print_document", "to_markdown", "to_text"]

_CELL = 28  # characters that a cell may ask for before it folds


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
    print_on(console, lambda on: _render(document, on))


def to_text(document: Document, *, width: int = 100) -> str:
    """The document as plain text, without colours."""
    return plain(lambda on: _render(document, on), width)


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
        parts.append(Text(clean(document.summary, LONGEST)))
    for section in document.sections:
        parts.append(Text())
        if section.title:
            parts.append(Text(clean(section.title), style="bold"))
        if section.pairs:
            parts.append(pairs(section.pairs))
        for i, table in enumerate(section.tables):
            parts += ([Text()] if i or section.pairs else []) + [rich_table(table, section.words, cell=_CELL)]
        parts += [Padding(_hanging(clean(remark, LONGEST)), (0, 0, 0, 1)) for remark in section.remarks]
    return Group(*parts)


def _hanging(remark: str) -> RichTable:
    """A dash, and the remark beside it however many lines it takes."""
    grid = RichTable.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text("-"), Text(remark))
    return grid


def _escaped(text: str) -> str:
    return escape(clean(text, LONGEST))
