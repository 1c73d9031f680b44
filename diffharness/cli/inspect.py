"""`diffharness inspect`: tensor forensics, no forward."""

from __future__ import annotations

import typer

from diffharness.cli._common import (
    ConfigOption,
    EngineOption,
    JsonOption,
    MarkdownOption,
    QuietOption,
    RequiredCheckpointOption,
    RequiredModelArgument,
    ThreadsOption,
    VerboseOption,
    model_path,
    present,
    require_writable,
)
from diffharness.cli._progress import progress_bar
from diffharness.cli._request import command_line, engine_settings, progress_lines


def inspect(
    ctx: typer.Context,
    model: RequiredModelArgument,
    checkpoint: RequiredCheckpointOption,
    config: ConfigOption = None,
    engine: EngineOption = None,
    threads: ThreadsOption = None,
    json_file: JsonOption = None,
    markdown: MarkdownOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Compare every tensor and key of a GGUF with the checkpoint's, and say what drifted, where,
    and in what pattern.

    No forward is run. Each tensor is judged by a control: the checkpoint's own, quantized
    afresh to the same type by the quantizer of the engine's build.

    Exit code: 0 agree; 1 weights, metadata or the file are damaged; 2 unfit input; 125 only
    a forward could tell.
    """
    require_writable(json_file, markdown)
    model_file = model_path(model)

    from diffharness.pipeline.inspecting import InspectRequest
    from diffharness.pipeline.inspecting import inspect as inspect_all
    from diffharness.report.inspect import document
    from diffharness.settings import load_tolerances
    from diffharness.verdict import exit_code

    with progress_bar("tensors", quiet=quiet) as watch:
        record = inspect_all(
            InspectRequest(
                model=model_file,
                checkpoint=checkpoint,
                engine=engine_settings(engine, threads),
                tolerances=load_tolerances(config),
                repro=command_line(ctx),
                say=progress_lines(quiet),
                watch=watch,
            )
        )
    present(document(record), record, json_file, markdown)
    raise typer.Exit(exit_code(record.verdict, record.findings))
