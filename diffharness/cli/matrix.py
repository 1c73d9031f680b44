"""`diffharness matrix`: the same engine, file and tokens under settings that must not matter."""

from __future__ import annotations

from typing import Annotated

import typer

from diffharness.cli._models import inputs
from diffharness.cli._options import ModelArgument
from diffharness.cli._output import folder_of_run
from diffharness.cli._shared import Shared, takes


@takes("fixture tokens config engine override_kv device threads dtype out json_file markdown quiet verbose")
def matrix(
    shared: Shared,
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
) -> None:
    """Run llama.cpp under a grid of settings that must not matter, and judge each cell.

    Batch sizes, feeding token by token, threads, flash attention, weight repacking, types of the
    KV cache, several sequences, caches copied, cut, shifted and restored. What honest rounding may
    change is measured on the spot, by a strict engine. Without --tokens, the fixture's first 256.

    Exit code: 0 agree; 1 a cell failed or crashed; 2 unfit input; 125 nothing was compared.
    """
    from diffharness import verdict
    from diffharness.pipeline.matrix import MatrixRequest, run_matrix
    from diffharness.report.matrix import document

    given = inputs(model, shared.fixture)
    with folder_of_run(shared.out):
        record = run_matrix(
            MatrixRequest(
                model=given.model,
                engine=shared.settings(),
                tolerances=shared.tolerances(),
                fixture=given.fixture,
                overrides=shared.overrides,
                out=shared.out,
                **shared.forward,
                grid=grid,
                cells=tuple(cells or ()),
                taps=taps,
            )
        )
        shown = document(record)
        shared.keep("matrix", shown, record)
    shared.present(shown, record)
    raise typer.Exit(verdict.exit_code(record.verdict, record.findings))
