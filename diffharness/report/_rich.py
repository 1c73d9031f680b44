"""What reports for a terminal are laid out of: pairs of label and text, tables, and where they are printed."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
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
        widths = self._widths(options.max_width - _GAP * len(told.head))
        shown = RichTable(box=None, padding=(0, _GAP, 0, 0), pad_edge=False)
        for i, name in enumerate(told.head):
            justify: JustifyMethod = "left" if i < words else "right"
            shown.add_column(Text(name), justify=justify, overflow="fold", header_style="dim", width=widths[i])
        for row in told.rows:
            shown.add_row(*(Text(clean(text), style=STYLES.get(text, "")) for text in row))
        yield shown

    def _widths(self, room: int) -> list[int]:
        """Long words fold first, then heads at their spaces, then all words, then heads; numbers never do."""
        told, words = self._told, self._words
        cells = [max((cell_len(clean(row[i])) for row in told.rows), default=1) for i in range(len(told.head))]
        widths = [max(1, longest, cell_len(name)) for longest, name in zip(cells, told.head, strict=True)]
        asked = [min(longest, self._cell) for longest in cells[:words]]
        pieces = [max((cell_len(piece) for piece in name.split()), default=1) for name in told.head]
        whole = [max(pair) for pair in zip([*asked, *cells[words:]], pieces, strict=True)]
        folded = [max(min(longest, _LEAST), piece) for longest, piece in zip(asked, pieces, strict=False)]
        least = [*(min(longest, _LEAST) for longest in asked), *cells[words:]]
        for floor in ([*whole[:words], *widths[words:]], whole, [*folded, *whole[words:]], least):
            while sum(widths) > room:
                over = [i for i, width in enumerate(widths) if width > max(1, floor[i])]
                if not over:
                    break
                widths[max(over, key=widths.__getitem__)] -= 1
        return widths
