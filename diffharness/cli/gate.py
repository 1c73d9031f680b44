"""`diffharness gate`: pass or fail before publishing, by the limits of a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffharness.cli._models import embedded, model_path
from diffharness.cli._options import CheckpointOption, ModelArgument
from diffharness.cli._output import STDOUT, emit, printing, require_writable, taken
from diffharness.cli._shared import Shared, takes
from diffharness.errors import BadInputError

if TYPE_CHECKING:
    from diffharness.records.gate import Outcome

EXIT: dict[Outcome, int] = {"pass": 0, "fail": 1, "inconclusive": 125}


@takes("fixture tokens config engine device threads dtype json_file markdown quiet verbose")
def gate(
    shared: Shared,
    model: ModelArgument = None,
    checkpoint: CheckpointOption = None,
    gate_file: Annotated[
        Path | None, typer.Option("--gate", metavar="FILE", help="Rules and limits, instead of the shipped ones.")
    ] = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", help="Write JUnit XML, a test case per rule.")
    ] = None,
    github: Annotated[
        bool, typer.Option("--github", help="Print GitHub's workflow commands too, which become annotations.")
    ] = False,
) -> None:
    """Pass or fail a GGUF before it is published: a line per rule with what was measured and what
    it may be.

    Without MODEL, the embedded model with its checkpoint. Without --tokens, the fixture's
    first 2048.

    Exit code: 0 pass; 1 a rule fails; 2 unfit input; 125 a rule that is not optional could
    not be run.
    """
    if junit == STDOUT:
        raise BadInputError("expected a file for --junit, found -", hint="give it a name; CI systems read files")
    require_writable(junit)

    from diffharness.forensics.gate import load_gate
    from diffharness.pipeline.gating import GateRequest, run_gate
    from diffharness.report.ci import to_annotations, to_junit
    from diffharness.report.gate import document

    fixture = shared.fixture
    if model is None:
        own = embedded()
        model_file, checkpoint, fixture = own.model, checkpoint or own.checkpoint, fixture or own.fixture
    elif checkpoint is None:
        raise BadInputError("expected the checkpoint to judge MODEL by", hint="give it with --checkpoint DIR")
    else:
        model_file = model_path(model)
    record = run_gate(
        GateRequest(
            model=model_file,
            checkpoint=checkpoint,
            gate=load_gate(gate_file),
            gate_name=str(gate_file or "configs/gate.yaml"),
            engine=shared.settings(),
            tolerances=shared.tolerances(),
            fixture=fixture,
            **shared.forward,
        )
    )
    emit(junit, to_junit(record) if junit else "")
    shared.present(document(record), record)
    if github:
        with printing():
            # GitHub reads both streams; what somebody asked standard output for stays whole.
            (sys.stderr if taken(shared.json_file, shared.markdown) else sys.stdout).write(to_annotations(record))
    raise typer.Exit(EXIT[record.outcome])
