"""What the commands make of the options they share: engine settings, the embedded model, the command line, progress."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

from diffharness.cli._common import ARGUMENTS, model_path, progress_console

if TYPE_CHECKING:
    from diffharness.settings import EngineSettings


class Embedded(NamedTuple):
    """The model that ships with the package."""

    model: Path
    checkpoint: Path
    fixture: str


def embedded() -> Embedded:
    """What a command runs on where the caller names nothing else."""
    from diffharness.settings import data_dir

    folder = data_dir("fixtures") / "tiny-gemma4"
    return Embedded(folder / "tiny-gemma4-Q4_K_M.gguf", folder / "checkpoint", str(folder / "heldout.json"))


class Inputs(NamedTuple):
    """What a command was given to run on."""

    model: Path
    checkpoint: Path | None
    fixture: str | None


def inputs(model: str | None, fixture: str | None, checkpoint: Path | None = None) -> Inputs:
    """The files behind the arguments; without MODEL the embedded model, and what is not named comes with it."""
    if model is not None:
        return Inputs(model_path(model), checkpoint, fixture)
    own = embedded()
    return Inputs(own.model, checkpoint or own.checkpoint, fixture or own.fixture)


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
