"""`diffharness gate`: pass or fail before publishing, by the limits of a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffharness.cli._common import (
    STDOUT,
    CheckpointOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    FixtureOption,
    JsonOption,
    MarkdownOption,
    ModelArgument,
    QuietOption,
    ThreadsOption,
    TokensOption,
    VerboseOption,
    emit,
    model_path,
    present,
    printing,
    require_writable,
    taken,
)
from diffharness.cli._request import command_line, embedded, engine_settings, progress_lines
from diffharness.errors import BadInputError

if TYPE_CHECKING:
    from diffharness.records.gate import Outcome

EXIT: dict[Outcome, int] = {"pass": 0, "fail": 1, "inconclusive": 125}


def gate(
    ctx: typer.Context,
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
    fixture: FixtureOption = None,
    tokens: TokensOption = None,
    config: ConfigOption = None,
    engine: EngineOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    dtype: DtypeOption = "float32",
    json_file: JsonOption = None,
    markdown: MarkdownOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Pass or fail a GGUF before it is published: a line per rule with what was measured and what
    it may be.

    Without MODEL, the embedded model with its checkpoint. Without --tokens, the fixture's
    first 2048.

    Exit code: 0 pass; 1 a rule fails; 2 unfit input; 125 a rule that is not optional could
    not be run.
    """
    require_writable(json_file, markdown, junit)
    if junit == STDOUT:
        raise BadInputError("expected a file for --junit, found -", hint="give it a name; CI systems read files")

    from diffharness.forensics.gate import load_gate
    from diffharness.pipeline.gating import GateRequest, run_gate
    from diffharness.report.ci import to_annotations, to_junit
    from diffharness.report.gate import document
    from diffharness.settings import load_tolerances

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
            engine=engine_settings(engine, threads),
            tolerances=load_tolerances(config),
            fixture=fixture,
            n_tokens=tokens,
            device=device,
            dtype=dtype,
            repro=command_line(ctx),
            say=progress_lines(quiet),
        )
    )
    emit(junit, to_junit(record) if junit else "")
    present(document(record), record, json_file, markdown)
    if github:
        with printing():
            # GitHub reads both streams; what somebody asked standard output for stays whole.
            (sys.stderr if taken(json_file, markdown) else sys.stdout).write(to_annotations(record))
    raise typer.Exit(EXIT[record.outcome])
