"""What the commands make of the options they share: engine settings, the command line, progress."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING

import typer

from diffharness.cli._output import progress_console

if TYPE_CHECKING:
    from diffharness.settings import EngineSettings

ARGUMENTS = "diffharness.arguments"  # where a context keeps the words that followed the program's name


def engine_settings(engine: str | None, threads: int | None) -> EngineSettings:
    """The settings of `--engine`, `native` without; `--threads` go for the reference too."""
    from diffharness.builds import find_engine

    settings = find_engine(engine or "native")
    if threads is None:
        return settings
    import torch

    torch.set_num_threads(threads)
    return settings.changed(threads=threads)


def command_line(ctx: typer.Context) -> str:
    """The command that does this again."""
    return shlex.join(["diffharness", *ctx.meta.get(ARGUMENTS, ())])


def progress_lines(quiet: bool) -> Callable[[str], None]:
    """Prints lines on standard error; what they quote from a file is made harmless."""
    from diffharness.report._format import clean

    console = progress_console(quiet)
    return lambda text: console.print(clean(text), markup=False)
