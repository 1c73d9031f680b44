"""`diffharness run`: every leg that the inputs allow, a verdict, and a table for the bug report."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

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
    ModelArgument,
    OutOption,
    OverrideKvOption,
    QuietOption,
    ThreadsOption,
    TokensOption,
    VerboseOption,
    emit,
    make_folder,
    model_path,
    progress_console,
    require_writable,
    result_console,
    write_text,
)
from diffharness.errors import ArtifactFileError

if TYPE_CHECKING:
    from diffharness.records import RunRecord

EMBEDDED = "tiny-gemma4"


def run(
    model: ModelArgument = None,
    checkpoint: CheckpointOption = None,
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
    """Run a GGUF through llama.cpp and through the reference, and say which of engine and file is at fault.

    Without MODEL, the embedded Gemma 4 model runs, with its checkpoint and held-out text. Exit code: 0
    everything agrees, 1 a verdict against engine, artifact or tokens, 2 unfit input, 125 inconclusive.
    """
    require_writable(json_file, markdown)
    if out is not None:
        make_folder(out)
    if model is None:
        model_file, checkpoint, fixture = _embedded(checkpoint, fixture)
    else:
        model_file = model_path(model)

    import torch

    from diffharness.pipeline import RunRequest
    from diffharness.pipeline import run as run_all
    from diffharness.report.terminal import print_record
    from diffharness.settings import load_engine, load_tolerances
    from diffharness.verdict import exit_code

    settings = load_engine(engine or "native")
    if threads is not None:
        settings = settings.changed(threads=threads)
        torch.set_num_threads(threads)
    progress = progress_console(quiet)
    record = run_all(
        RunRequest(
            model=model_file,
            engine=settings,
            tolerances=load_tolerances(config),
            checkpoint=checkpoint,
            fixture=fixture,
            n_tokens=tokens,
            overrides=tuple(override_kv or ()),
            device=device,
            dtype=dtype,
            out=out,
            repro=_command_line(),
            say=lambda text: progress.print(text, markup=False),
        )
    )
    _report(record, out, json_file, markdown)
    unreadable = next((f for f in record.findings if f.kind == "artifact.file" and f.leg is None), None)
    if unreadable is not None:  # no leg ran, so there is no table: the message is all
        raise ArtifactFileError(unreadable.message, hint=unreadable.evidence.get("hint"))
    print_record(record, result_console(json_file, markdown))
    raise typer.Exit(exit_code(record.verdict, record.findings))


def _embedded(checkpoint: Path | None, fixture: str | None) -> tuple[Path, Path, str]:
    """The model that ships with the package, where the caller names nothing else."""
    from diffharness.settings import data_dir

    folder = data_dir("fixtures") / EMBEDDED
    return (
        folder / "tiny-gemma4-Q4_K_M.gguf",
        checkpoint or folder / "checkpoint",
        fixture or str(folder / "heldout.json"),
    )


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


def _command_line() -> str:
    """This very call, for whoever wants to make it again."""
    return shlex.join(["diffharness", *sys.argv[1:]])
