"""`diffharness compare`: two saved runs, tap by tap and position by position."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffharness.cli._common import (
    ConfigOption,
    JsonOption,
    MarkdownOption,
    QuietOption,
    VerboseOption,
    present,
    require_writable,
)
from diffharness.cli._request import command_line, progress_lines


def compare(
    ctx: typer.Context,
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run folder (--out): the golden one.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="The run folder to be checked.")],
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            metavar="NMSE",
            min=0.0,
            show_default="1e-6, as llama-results",
            help="What the NMSE of any tap, and of any token of it, may be at most.",
        ),
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Compare runs of different artifacts or fixtures too.")
    ] = False,
    config: ConfigOption = None,
    json_file: JsonOption = None,
    markdown: MarkdownOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Compare two saved runs: which taps and tokens differ first, and by how much. No model is run.

    Every tap at every token, and the logits at every position, must be within the tolerance.

    Exit code: 0 the same; 1 they differ; 125 the two kept nothing in common; 2 unfit input.
    """
    require_writable(json_file, markdown)

    from diffharness.pipeline.comparing import CompareRequest
    from diffharness.pipeline.comparing import compare as compare_runs
    from diffharness.report.compare import document
    from diffharness.settings import load_tolerances

    record = compare_runs(
        CompareRequest(
            a=run_a,
            b=run_b,
            tolerances=load_tolerances(config),
            tolerance=tolerance,
            anyway=anyway,
            repro=command_line(ctx),
            say=progress_lines(quiet),
        )
    )
    present(document(record), record, json_file, markdown, line=record.summary if quiet else None)
    raise typer.Exit(0 if record.outcome == "same" else 1)
