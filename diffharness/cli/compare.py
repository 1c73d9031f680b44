"""`diffharness compare`: two saved runs, tap by tap and position by position."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffharness.cli._shared import Shared, takes


@takes("config json_file markdown quiet verbose")
def compare(
    shared: Shared,
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
) -> None:
    """Compare two saved runs: which taps and tokens differ first, and by how much. No model is run.

    Every tap at every token, and the logits at every position, must be within the tolerance.

    Exit code: 0 the same; 1 they differ; 125 the two kept nothing in common; 2 unfit input.
    """
    from diffharness.pipeline.comparing import CompareRequest
    from diffharness.pipeline.comparing import compare as compare_runs
    from diffharness.report.compare import document

    record = compare_runs(
        CompareRequest(
            a=run_a,
            b=run_b,
            tolerances=shared.tolerances(),
            tolerance=tolerance,
            anyway=anyway,
            repro=shared.repro,
            say=shared.say,
        )
    )
    shared.present(document(record), record, line=record.summary)
    raise typer.Exit(0 if record.outcome == "same" else 1)
