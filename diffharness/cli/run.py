"""`diffharness run`: every leg that the inputs allow, a verdict, and a table for the bug report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from diffharness.cli._models import inputs
from diffharness.cli._options import CheckpointOption, EnginesOption, ModelArgument
from diffharness.cli._output import emit, folder_of_run, print_line, printing, result_console, write_text
from diffharness.cli._request import engine_settings
from diffharness.cli._shared import Shared, takes
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


@takes("fixture tokens config override_kv device threads dtype strict out json_file markdown quiet verbose")
def run(
    shared: Shared,
    model: ModelArgument = None,
    checkpoint: CheckpointOption = None,
    engine: EnginesOption = None,
    kernel_tokens: KernelTokensOption = 64,
    grid: GridOption = "small",
    explain: ExplainOption = True,
    noise: NoiseOption = True,
) -> None:
    """Run a GGUF through llama.cpp and through the reference, and say which of engine and file is at fault.

    Without MODEL, the embedded Gemma 4 model runs, with its checkpoint and held-out text.

    Exit code: 0 agree; 1 a verdict against engine, artifact or tokens; 2 unfit input; 125 inconclusive.
    """
    given = inputs(model, shared.fixture, checkpoint)

    from diffharness.pipeline import RunRequest
    from diffharness.pipeline import run as run_all
    from diffharness.report.terminal import line, print_record
    from diffharness.verdict import exit_code

    first, *others = [engine_settings(word, shared.threads) for word in engine or ["native"]]
    with folder_of_run(shared.out):
        record = run_all(
            RunRequest(
                model=given.model,
                engine=first,
                others=tuple(others),
                tolerances=shared.tolerances(),
                checkpoint=given.checkpoint,
                fixture=given.fixture,
                overrides=shared.overrides,
                strict=shared.strict,
                kernel_tokens=kernel_tokens,
                grid=None if grid == "none" else grid,
                explain=explain,
                noise=noise,
                out=shared.out,
                **shared.forward,
            )
        )
        _report(record, shared)
    unreadable = next((f for f in record.findings if f.kind == "artifact.file" and f.leg is None), None)
    if unreadable is not None:  # no leg ran, so there is no table: the message is all
        raise ArtifactFileError(unreadable.message, hint=unreadable.evidence.get("hint"))
    if shared.quiet:
        print_line(line(record), shared.json_file, shared.markdown)
    else:
        with printing():
            print_record(record, result_console(shared.json_file, shared.markdown))
    raise typer.Exit(exit_code(record.verdict, record.findings))


def _report(record: RunRecord, shared: Shared) -> None:
    from diffharness.report.html import to_html
    from diffharness.report.json import to_json
    from diffharness.report.markdown import to_markdown

    if shared.out is not None:
        write_text(shared.out / "run.json", to_json(record))
        write_text(shared.out / "report.md", to_markdown(record))
        write_text(shared.out / "report.html", to_html(record))
    emit(shared.json_file, to_json(record) if shared.json_file else "")
    emit(shared.markdown, to_markdown(record) if shared.markdown else "")
