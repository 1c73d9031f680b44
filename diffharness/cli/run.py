"""`diffharness run`: every leg that the inputs allow, a verdict, and a table for the bug report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffharness.cli._common import (
    CheckpointOption,
    ConfigOption,
    DeviceOption,
    DtypeOption,
    EnginesOption,
    FixtureOption,
    JsonOption,
    MarkdownOption,
    ModelArgument,
    OutOption,
    OverrideKvOption,
    QuietOption,
    StrictOption,
    ThreadsOption,
    TokensOption,
    VerboseOption,
    emit,
    folder_of_run,
    print_line,
    printing,
    require_writable,
    result_console,
    write_text,
)
from diffharness.cli._request import command_line, engine_settings, inputs, progress_lines
from diffharness.errors import ArtifactFileError

if TYPE_CHECKING:
    from diffharness.records import RunRecord


KernelTokensOption = Annotated[
    int, typer.Option(metavar="N", min=0, help="Replay the nodes of the first N tokens; 0 for none.")
]
GridOption = Annotated[
    str, typer.Option(metavar="NAME|FILE", help="The grid of settings that must not matter; none for none.")
]
ExplainOption = Annotated[bool, typer.Option(help="Search for what would explain a graph that differs.")]
NoiseOption = Annotated[bool, typer.Option(help="Take the native run's error apart: rounding, and what is not.")]


def run(
    ctx: typer.Context,
    model: ModelArgument = None,
    checkpoint: CheckpointOption = None,
    fixture: FixtureOption = None,
    tokens: TokensOption = None,
    config: ConfigOption = None,
    engine: EnginesOption = None,
    override_kv: OverrideKvOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    dtype: DtypeOption = "float32",
    strict: StrictOption = "auto",
    kernel_tokens: KernelTokensOption = 64,
    grid: GridOption = "small",
    explain: ExplainOption = True,
    noise: NoiseOption = True,
    out: OutOption = None,
    json_file: JsonOption = None,
    markdown: MarkdownOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Run a GGUF through llama.cpp and through the reference, and say which of engine and file is at fault.

    Without MODEL, the embedded Gemma 4 model runs, with its checkpoint and held-out text.

    Exit code: 0 agree; 1 a verdict against engine, artifact or tokens; 2 unfit input; 125 inconclusive.
    """
    require_writable(json_file, markdown)
    given = inputs(model, fixture, checkpoint)

    from diffharness.pipeline import RunRequest
    from diffharness.pipeline import run as run_all
    from diffharness.report.terminal import line, print_record
    from diffharness.settings import load_tolerances
    from diffharness.verdict import exit_code

    first, *others = [engine_settings(word, threads) for word in engine or ["native"]]
    with folder_of_run(out):
        record = run_all(
            RunRequest(
                model=given.model,
                engine=first,
                others=tuple(others),
                tolerances=load_tolerances(config),
                checkpoint=given.checkpoint,
                fixture=given.fixture,
                n_tokens=tokens,
                overrides=tuple(override_kv or ()),
                device=device,
                dtype=dtype,
                strict=strict,
                kernel_tokens=kernel_tokens,
                grid=None if grid == "none" else grid,
                explain=explain,
                noise=noise,
                out=out,
                repro=command_line(ctx),
                say=progress_lines(quiet),
            )
        )
        _report(record, out, json_file, markdown)
    unreadable = next((f for f in record.findings if f.kind == "artifact.file" and f.leg is None), None)
    if unreadable is not None:  # no leg ran, so there is no table: the message is all
        raise ArtifactFileError(unreadable.message, hint=unreadable.evidence.get("hint"))
    if quiet:
        print_line(line(record), json_file, markdown)
    else:
        with printing():
            print_record(record, result_console(json_file, markdown))
    raise typer.Exit(exit_code(record.verdict, record.findings))


def _report(record: RunRecord, out: Path | None, json_file: Path | None, markdown: Path | None) -> None:
    from diffharness.report.html import to_html
    from diffharness.report.json import to_json
    from diffharness.report.markdown import to_markdown

    if out is not None:
        write_text(out / "run.json", to_json(record))
        write_text(out / "report.md", to_markdown(record))
        write_text(out / "report.html", to_html(record))
    emit(json_file, to_json(record) if json_file else "")
    emit(markdown, to_markdown(record) if markdown else "")
