"""The report for a terminal of 100 columns: the Markdown report's content, laid out by rich."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from diffharness.records import RunRecord
from diffharness.report import _content, engines, noise
from diffharness.report._content import Table
from diffharness.report._format import clean
from diffharness.report._rich import LONGEST, STYLES, pairs, plain, print_on, table

_CELL = 24  # characters that a cell may ask for: a tap's name


def report(record: RunRecord) -> RenderableType:
    """Something that `Console.print` takes. Strings from files are never read as rich's markup."""
    verdict = record.verdict
    head = Text.assemble(
        ("verdict: ", "bold"), (verdict.primary, f"bold {STYLES.get(verdict.primary, 'red')}"), overflow="fold"
    )
    parts: list[RenderableType] = [head, Text(clean(verdict.summary, LONGEST)), Text()]
    parts += [pairs(_content.subject(record)), Text(), _legs(_content.legs(record))]
    scores = _content.scores(record)
    if scores:
        parts += [Text(), Text("Perplexity", style="bold"), pairs(scores)]
    divergence, affected = _content.divergence(record), _content.affected(record)
    if divergence:
        parts += [Text(), Text(divergence)]
    told = [("Affected", affected)] if affected else []
    told += _content.spread(record)
    if told:
        parts += [Text(), pairs(told)]
    taps = _content.worst_taps(record)
    if taps is not None:
        parts += [Text(), table(taps, cell=_CELL)]
    of_noise, by_layer = noise.pairs(record), noise.layers(record)
    if of_noise:
        parts += [Text(), Text("Noise of the native run", style="bold"), pairs(of_noise)]
    if by_layer is not None:
        parts += [Text(), table(by_layer, cell=_CELL)]
    of_engines, engine_notes = engines.table(record), engines.notes(record)
    if of_engines is not None:
        parts += [Text(), table(of_engines, words=2, cell=_CELL)]
    if engine_notes:
        parts += [Text(), pairs(engine_notes)]
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


def line(record: RunRecord) -> str:
    """The verdict, the first divergence or what the verdict says, and the next step, as one line."""
    verdict = record.verdict
    # What diverges in a file that holds NaN says nothing of where the NaN is.
    where = None if verdict.primary == "artifact.file" else _content.divergence(record)
    told = f"{', '.join(verdict.all)}: {where or clean(verdict.summary)}"
    if verdict.next_step is None:
        return told
    return f"{told.rstrip('.')}. Next: {clean(verdict.next_step, _content.COMMAND)}"


def print_record(record: RunRecord, console: Console) -> None:
    """Print the report; `console` decides on width and colours. A file or pipe gets no spaces at line ends."""
    print_on(console, lambda on: _render(record, on))


def _render(record: RunRecord, console: Console) -> None:
    console.print(report(record))
    for command in commands(record):
        console.print()
        console.print(command, soft_wrap=True)


def to_text(record: RunRecord, *, width: int = 100) -> str:
    """The report as plain text, without colours."""
    return plain(lambda on: _render(record, on), width)


def _item(text: str) -> RenderableType:
    return Padding(Text(f"- {text}"), (0, 0, 0, 1))


def _legs(legs: Table) -> RenderableType:
    """The legs with their numbers; notes stand below each other, where they have room."""
    short = Table(legs.title, legs.head[:-1], [row[:-1] for row in legs.rows])
    notes = [(row[0], row[-1]) for row in legs.rows if row[-1]]
    shown = table(short, words=3, cell=_CELL)
    return Group(shown, Text(), pairs(notes)) if notes else shown
