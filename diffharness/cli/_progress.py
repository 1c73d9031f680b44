"""A progress bar on standard error, with a rate and the time left; silent where there is no terminal or with -q."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from diffharness.cli._output import progress_console

if TYPE_CHECKING:
    from rich.progress import Task
    from rich.text import Text


@contextmanager
def progress_bar(what: str, unit: str = "values", *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Gives a function to be told how much of how much is done; the bar is gone when the block ends."""
    from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(f"{(task.speed or 0) / 1e6:.0f}M {unit}/s", style="dim")

    console = progress_console(quiet)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%"), Rate())
    bar = Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
