"""`diffharness matrix`: the same engine, file and tokens under settings that must not matter."""

from __future__ import annotations

from typing import Annotated

import typer

from diffharness.cli._common import (
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
    folder_of_run,
    keep,
    present,
    require_writable,
)
from diffharness.cli._request import command_line, engine_settings, inputs, progress_lines


def matrix(
    ctx: typer.Context,
    model: ModelArgument = None,
    grid: Annotated[
        str, typer.Option("--grid", metavar="NAME|FILE", help="A grid of configs/matrix.yaml, or a file of its form.")
    ] = "default",
    cells: Annotated[
        list[str] | None,
        typer.Option("--cells", metavar="TEXT", help="Only cells whose label or dimension holds TEXT. Repeatable."),
    ] = None,
    taps: Annotated[
        bool, typer.Option("--taps", help="Say of every cell that differs where it does, not only of failing ones.")
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
    """Run llama.cpp under a grid of settings that must not matter, and judge each cell.

    Batch sizes, feeding token by token, threads, flash attention, weight repacking, types of the
    KV cache, several sequences, caches copied, cut, shifted and restored. What honest rounding may
    change is measured on the spot, by a strict engine. Without --tokens, the fixture's first 256.

    Exit code: 0 agree; 1 a cell failed or crashed; 2 unfit input; 125 nothing was compared.
    """
    require_writable(json_file, markdown)

    from diffharness import verdict
    from diffharness.pipeline.matrix import MatrixRequest, run_matrix
    from diffharness.report.matrix import document
    from diffharness.settings import load_tolerances

    given = inputs(model, fixture)
    with folder_of_run(out):
        record = run_matrix(
            MatrixRequest(
                model=given.model,
                engine=engine_settings(engine, threads),
                tolerances=load_tolerances(config),
                fixture=given.fixture,
                n_tokens=tokens,
                overrides=tuple(override_kv or ()),
                device=device,
                dtype=dtype,
                out=out,
                repro=command_line(ctx),
                say=progress_lines(quiet),
                grid=grid,
                cells=tuple(cells or ()),
                taps=taps,
            )
        )
        shown = document(record)
        keep(out, "matrix", shown, record)
    present(shown, record, json_file, markdown)
    raise typer.Exit(verdict.exit_code(record.verdict, record.findings))
