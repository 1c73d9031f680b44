"""What reports for a terminal are laid out of: pairs of label and text, tables, and where they are printed."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from diffharness.report._content import Table
from diffharness.report._format import clean

_GAP = 2  # spaces between columns
_LEAST = 8  # characters that a column of words keeps
LONGEST = 1200  # characters of one remark
STYLES = {"pass": "green", "ok": "green", "fail": "red", "fails": "red", "agree": "green", "inconclusive": "yellow"}

Render = Callable[[Console], None]


def print_on(console: Console, render: Render) -> None:
    """`console` decides on width and colours. What goes into a file or pipe has no spaces at line ends."""
    if console.is_terminal:
        render(console)
    else:
        console.out(plain(render, console.width), end="", highlight=False)


def plain(render: Render, width: int) -> str:
    """What it prints, without colours."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        render(console)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def pairs(rows: Sequence[tuple[str, str]]) -> RichTable:
    """Labels, and texts beside them however many lines they take."""
    grid = RichTable.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(Text(clean(label)), Text(clean(text, LONGEST)))
    return grid


def table(told: Table, words: int = 1, *, cell: int) -> RenderableType:
    """A title of its own width and the columns, of which the first `words` are not numbers.

    Cells longer than `cell` may be folded.
    """
    shown = _Columns(told, words, cell)
    return Group(Text(told.title, style="bold"), shown) if told.title else shown


class _Columns:
    """Laid out once the width is known: rich cuts off what the least widths of columns leave no room for."""

    def __init__(self, told: Table, words: int, cell: int) -> None:
        self._told, self._words, self._cell = told, words, cell

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        told, words = self._told, self._words
        least = [
            min(max((cell_len(clean(row[i])) for row in told.rows), default=0), self._cell)
            for i in range(len(told.head))
        ]
        excess = sum(least) + _GAP * (len(least) - 1) - options.max_width
        for i in sorted(range(words), key=lambda i: -least[i]):  # words can be read folded, numbers cannot
            taken = max(0, min(excess, least[i] - _LEAST))
            least[i] -= taken
            excess -= taken
        shown = RichTable(box=None, padding=(0, _GAP, 0, 0), pad_edge=False)
        for i, name in enumerate(told.head):
            shown.add_column(
                Text(name),
                justify="left" if i < words else "right",
                overflow="fold",
                header_style="dim",
                min_width=least[i],  # heads fold before cells do
            )
        for row in told.rows:
            shown.add_row(*(Text(clean(text), style=STYLES.get(text, "")) for text in row))
        yield shown
