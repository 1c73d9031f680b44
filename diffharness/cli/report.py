"""`diffharness report`: a saved record, rendered again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from diffharness.cli._output import STDOUT, emit, require_writable


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder (--out), or a record that --json of any command wrote.")
    ],
    form: Annotated[
        Literal["text", "md", "json", "html"],
        typer.Option(
            "--format", help="html is for records of `run` only; json is the record as this version writes it."
        ),
    ] = "text",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Where it goes; - for standard output.")
    ] = STDOUT,
) -> None:
    """Render a saved run again, without running a model.

    Exit code: 0 done; 2 no record, or one of another schema version.
    """
    require_writable(output)

    from diffharness.report.saved import render

    emit(output, render(run, form))
