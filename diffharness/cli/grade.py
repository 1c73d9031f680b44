"""`diffharness grade`: many artifacts on one fixture, against one checkpoint, in one table."""

from __future__ import annotations

from typing import Annotated

import typer

from diffharness.cli._common import (
    CheckpointOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    FixtureOption,
    JsonOption,
    MarkdownOption,
    OutOption,
    OverrideKvOption,
    QuietOption,
    ThreadsOption,
    TokensOption,
    VerboseOption,
    keep,
    make_folder,
    model_path,
    present,
    require_writable,
)
from diffharness.cli._request import command_line, engine_settings, progress_lines


def grade(
    ctx: typer.Context,
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="GGUFs: paths, or hf://owner/repo/file.gguf.")
    ],
    checkpoint: CheckpointOption = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="GGUF", help="Measure against this artifact instead of a checkpoint."),
    ] = None,
    control: Annotated[
        bool,
        typer.Option("--control", help="Grade the checkpoint freshly quantized to each artifact's types as well."),
    ] = False,
    attention: Annotated[
        bool, typer.Option("--attention", help="Compare how attention is spread, by layer and head.")
    ] = False,
    no_engine: Annotated[bool, typer.Option("--no-engine", help="Leave llama.cpp's own perplexities out.")] = False,
    chunk: Annotated[
        int | None,
        typer.Option("--chunk", metavar="N", min=3, help="Cut the fixture into chunks of N tokens."),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Print every statistic that llama-perplexity --kl-divergence prints.")
    ] = False,
    fixture: FixtureOption = None,
    tokens: TokensOption = None,
    config: ConfigOption = None,
    engine: EngineOption = None,
    override_kv: OverrideKvOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    dtype: DtypeOption = "float32",
    out: OutOption = None,
    json_file: JsonOption = None,
    markdown: MarkdownOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Grade GGUFs: perplexity by the reference and by llama.cpp, KL and agreement against the
    checkpoint.

    Without --checkpoint and --against, perplexities only. Without --tokens, the fixture's
    first 2048. A --chunk longer than the model's sliding window and than llama.cpp's
    n_ubatch (512) shows what only breaks on long prompts.

    Exit code: 0 graded; 1 an artifact lost more than its --control; 2 unfit input, or an
    artifact was not graded.
    """
    require_writable(json_file, markdown)
    if out is not None:
        make_folder(out)

    from diffharness.pipeline.grade_inputs import GradeRequest
    from diffharness.pipeline.grading import grade as grade_all
    from diffharness.pipeline.grading import has_errors, is_beyond
    from diffharness.report.grade import document
    from diffharness.settings import load_tolerances

    record = grade_all(
        GradeRequest(
            models=tuple(models),
            engine=engine_settings(engine, threads),
            tolerances=load_tolerances(config),
            checkpoint=checkpoint,
            against=against,
            fixture=fixture,
            n_tokens=tokens,
            chunk=chunk,
            with_engine=not no_engine,
            with_control=control,
            with_attention=attention,
            overrides=tuple(override_kv or ()),
            device=device,
            dtype=dtype,
            out=out,
            repro=command_line(ctx),
            locate=model_path,
            say=progress_lines(quiet),
        )
    )
    shown = document(record, full=full)
    keep(out, "grade", shown, record)
    present(shown, record, json_file, markdown)
    raise typer.Exit(2 if has_errors(record) else 1 if is_beyond(record) else 0)
