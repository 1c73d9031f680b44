"""`diffharness inspect`: tensor forensics, no forward."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from diffharness.cli._common import (
    ARGUMENTS,
    ConfigOption,
    EngineOption,
    JsonOption,
    MarkdownOption,
    QuietOption,
    ThreadsOption,
    VerboseOption,
    model_path,
    present,
    progress_console,
    require_writable,
)
from diffharness.cli._progress import progress_bar


def inspect(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A GGUF: a path, or hf://owner/repo/file.gguf.")],
    checkpoint: Annotated[
        Path,
        typer.Option("--checkpoint", metavar="DIR", help="The Hugging Face folder that MODEL claims to come from."),
    ],
    config: ConfigOption = None,
    engine: EngineOption = None,
    threads: ThreadsOption = None,
    json_file: JsonOption = None,
    markdown: MarkdownOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Compare every tensor and key of a GGUF with the checkpoint's, and say what drifted, where, and in what pattern.

    No forward is run. Each tensor is judged by a control: the checkpoint's own, quantized afresh to the same type by
    the quantizer of the engine's build.

    Exit code: 0 agree; 1 weights, metadata or the file are damaged; 2 unfit input; 125 only a forward could tell.
    """
    require_writable(json_file, markdown)
    model_file = model_path(model)

    from diffharness.pipeline.inspecting import InspectRequest
    from diffharness.pipeline.inspecting import inspect as inspect_all
    from diffharness.report._format import clean
    from diffharness.report.inspect import document
    from diffharness.settings import load_engine, load_tolerances
    from diffharness.verdict import exit_code

    settings = load_engine(engine or "native")
    if threads is not None:
        settings = settings.changed(threads=threads)
    progress = progress_console(quiet)
    with progress_bar("tensors", quiet=quiet) as watch:
        record = inspect_all(
            InspectRequest(
                model=model_file,
                checkpoint=checkpoint,
                engine=settings,
                tolerances=load_tolerances(config),
                repro=shlex.join(["diffharness", *ctx.meta.get(ARGUMENTS, ())]),
                say=lambda text: progress.print(clean(text), markup=False),
                watch=watch,
            )
        )
    present(document(record), record, json_file, markdown)
    raise typer.Exit(exit_code(record.verdict, record.findings))
